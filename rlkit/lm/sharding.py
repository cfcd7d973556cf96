"""Weights divided among processes by PyTorch's FSDP2 (`fully_shard`): dividing, gathering, and state in and out.

Every block of a model, and the rest of it, keep a share of each weight in every process and gather the whole for the
moment it is used. State goes in and out whole (PyTorch's `torch.distributed.checkpoint.state_dict`), so a checkpoint
does not tell how many processes wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlkit.errors import RlkitError


def shard(scorer: nn.Module, device: torch.device) -> nn.Module:
    """`scorer` with its parameters divided among all processes: block by block, then what is left, all in place.

    Raises:
        RlkitError: a parameter stayed whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    kinds = {kind for module in scorer.modules() for kind in getattr(module, "_no_split_modules", None) or ()}
    for module in list(scorer.modules()):
        if type(module).__name__ in kinds:
            fully_shard(module, mesh=mesh)
    fully_shard(scorer, mesh=mesh)
    # Now, or a block that sampling calls before the whole was called once would take itself for the whole.
    state: Any = scorer
    state._get_fsdp_state()._lazy_init()
    whole = [name for name, parameter in scorer.named_parameters() if not isinstance(parameter, DTensor)]
    if whole:
        raise RlkitError(f"`fsdp`: {whole[0]} was not divided among the processes")
    return scorer


def is_sharded(model: nn.Module) -> bool:
    """Whether some module of `model` gathers its parameters in the forward pass, as a collective call."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())


@contextmanager
def gathered(scorer: nn.Module) -> Iterator[None]:
    """All parameters whole in every process, for a while, so that the model can be called without the others.

    For inference: what is changed meanwhile is lost. Collective at both ends; nothing happens to a model that is whole.
    """
    if not is_sharded(scorer):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    parts: list[Any] = [module for module in scorer.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not scorer, recurse=False)


def is_divided(tensor: Tensor) -> bool:
    """Whether every process has a part of `tensor` only."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from the processes where it is divided. Collective."""
    return tensor.full_tensor() if is_divided(tensor) else tensor  # type: ignore[attr-defined]


def divided_like(own: Tensor, tensor: Tensor) -> Tensor:
    """A whole `tensor`, which all processes have, divided as `own` is."""
    if not is_divided(own):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    model: Any = own
    return distribute_tensor(tensor.to(own.device), model.device_mesh, model.placements, src_data_rank=None)


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a sharded model, whole, on the CPU, in the main process; empty in the others. Collective."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found: Any = get_model_state_dict(model, options=options)
    return dict(found)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What `optimizer.state_dict()` gives in one process, in the main one; without state in the others. Collective."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    if not optimizer.state:  # PyTorch would make one by a step
        return optimizer.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    named: Any = get_optimizer_state_dict(model, optimizer, options=options)
    numbers = {name: i for i, name in enumerate(_names(model, optimizer))}
    state = {numbers[name]: dict(values) for name, values in named.get("state", {}).items()}
    return {"state": dict(sorted(state.items())), "param_groups": optimizer.state_dict()["param_groups"]}


def set_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what `optimizer_state` gave, or `state_dict()` in one process. Collective."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    if state["state"]:
        names = _names(model, optimizer)
        named: dict[str, Any] = {
            "state": {names[int(number)]: values for number, values in state["state"].items()},
            "param_groups": [{**g, "params": [names[int(i)] for i in g["params"]]} for g in state["param_groups"]],
        }
        set_optimizer_state_dict(model, optimizer, named, options=StateDictOptions(full_state_dict=True))
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})  # PyTorch made lists of tuples


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimiser's parameters, in its order."""
    owners = {parameter: name for name, parameter in model.named_parameters()}
    return [owners[p] for group in optimizer.param_groups for p in group["params"]]
