"""An SAC that Stable-Baselines3 saved, as an rlkit SAC with the same actions, values and temperature.

The zip holds JSON, in which some values are pickles beside a readable description, and PyTorch files. Only what can be
read without unpickling is: weights by PyTorch's `weights_only` reader, spaces and networks by their description. What
that leaves open (a learning-rate schedule, `train_freq`) takes rlkit's default, and a line says so. The replay buffer,
optimiser states and `VecNormalize` statistics are not in the zip's readable part, so learning goes on with new ones.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlkit.envs.spaces import space_to_json
from rlkit.errors import UserError

if TYPE_CHECKING:
    from rlkit.trainers.sac import SAC

PLAIN = (
    "learning_rate", "buffer_size", "learning_starts", "batch_size", "tau", "gamma", "gradient_steps",
    "target_update_interval", "ent_coef", "target_entropy", "n_steps",
)  # fmt: skip
"""Fields that have the same name and meaning in both libraries."""


def from_sb3(file: str | Path, env: str | None = None, **fields: Any) -> tuple[SAC, list[str]]:
    """(the trainer, lines about what could not be read).

    Args:
        file: what `SAC.save` of Stable-Baselines3 wrote.
        env: gymnasium id of its environment, which the file does not hold; learning and evaluating need it.
        fields: of the configuration, over those of the file.

    Raises:
        UserError: no such file, another algorithm, or a network or space that this SAC does not have.
    """
    from rlkit.trainers.sac import SAC

    data, weights, variables = _read(Path(file))
    _check(file, data, weights)
    spaces = {name: _box(file, name, data.get(f"{name}_space")) for name in ("observation", "action")}
    notes: list[str] = []
    config: dict[str, Any] = {}
    for name in PLAIN:
        if isinstance(data.get(name), int | float | str):
            config[name] = data[name]
        elif name in data:
            notes.append(f"`{name}` cannot be read without unpickling; it is rlkit's default now")
    notes.append("`train_freq` cannot be read without unpickling; it is rlkit's default now")
    config |= {"policy_kwargs": _networks(file, data, weights), "env": env, **fields}
    if config["env"] is None:
        notes.append("the file names no environment; give `--env ID` to evaluate it or to go on learning")
    saved = {"spaces": {name: space_to_json(space) for name, space in spaces.items()}}
    trainer = SAC(config=SAC.make_config({k: v for k, v in config.items() if v is not None}), saved=saved)
    _load(trainer, weights, variables)
    trainer.clock, trainer.updates = int(data.get("num_timesteps", 0)), int(data.get("_n_updates", 0))
    return trainer, notes


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """The JSON, the policy's weights, and the variables beside it."""
    if not file.exists():
        raise UserError(f"there is no {file}")

    def tensors(archive: zipfile.ZipFile, name: str) -> dict[str, Tensor]:
        content = io.BytesIO(archive.read(name))
        try:
            found = torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds, pickle's own among them
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{file}: its `{name}` cannot be read without running code: {reason}") from None
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            raise UserError(f"{file}: its `{name}` holds something else than tensors")
        return found

    try:
        with zipfile.ZipFile(file) as archive:
            data = json.loads(archive.read("data"))
            if not isinstance(data, dict):
                raise UserError(f"{file}: its `data` is no JSON object")
            return data, tensors(archive, "policy.pth"), tensors(archive, "pytorch_variables.pth")
    except zipfile.BadZipFile as error:
        raise UserError(f"{file} is no zip file that Stable-Baselines3 saved: {error}") from None
    except KeyError as error:
        raise UserError(f"{file} was not saved by Stable-Baselines3: {error.args[0]}") from None
    except ValueError as error:
        raise UserError(f"{file}: its `data` is no JSON: {error}") from None


def _check(file: str | Path, data: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    policy = data.get("policy_class")
    module = policy.get("__module__") if isinstance(policy, Mapping) else None
    if module != "stable_baselines3.sac.policies":
        raise UserError(f"{file}: its policy is from {module}; rlkit converts Stable-Baselines3's SAC")
    if data.get("use_sde"):
        raise UserError(f"{file}: it explores by state (`use_sde`), which rlkit's SAC does not have")
    known = re.compile(r"actor\.(latent_pi\.\d+|mu|log_std)\.|critic(_target)?\.qf\d+\.\d+\.")
    other = [name for name in weights if not known.match(name)]
    if other:
        raise UserError(f"{file}: `{other[0]}` is of a network that rlkit's SAC does not have (a features extractor?)")


def _box(file: str | Path, name: str, described: Any) -> gym.spaces.Box:
    """A space from the readable part of its description."""
    kind = described.get(":type:") if isinstance(described, Mapping) else None
    if kind != "<class 'gymnasium.spaces.box.Box'>":
        raise UserError(f"{file}: its {name} space is {kind}; only a Box can be read without unpickling")
    try:
        shape, dtype = tuple(int(n) for n in described["_shape"]), np.dtype(described["dtype"])
        low, high = (_bounds(described, side, shape, dtype) for side in ("low", "high"))
        return gym.spaces.Box(low, high, shape, dtype.type)
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{file}: its {name} space cannot be read without unpickling: {error}") from None


def _bounds(described: Mapping[str, Any], side: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """`[-1. -1. -8.]` as an array; of a long one only a bound that is the same everywhere is written out."""
    text = str(described[f"{side}_repr"] if "..." in described[side] else described[side])
    values = [float(word) for word in text.replace("[", " ").replace("]", " ").split()]
    array = np.array(values, dtype)
    return np.full(shape, array[0], dtype) if len(values) == 1 else array.reshape(shape)


def _networks(file: str | Path, data: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """`policy_kwargs`: widths and number of critics from the weights, the activation from its description."""
    described = data.get("policy_kwargs")
    text = str(described.get("activation_fn", "ReLU")) if isinstance(described, Mapping) else "ReLU"
    names = {"ReLU": "relu", "Tanh": "tanh", "ELU": "elu", "GELU": "gelu", "SiLU": "silu", "LeakyReLU": "leaky_relu"}
    activation = text.rpartition(".")[2].rstrip("'>")
    if activation not in names:
        raise UserError(f"{file}: its activation is {text}; rlkit's networks have {', '.join(names)}")
    widths = {
        "pi": [len(weights[f"{name}.weight"]) for name in _layers(weights, "actor.latent_pi")],
        "qf": [len(weights[f"{name}.weight"]) for name in _layers(weights, "critic.qf0")[:-1]],
    }
    critics = len({name.split(".")[1] for name in weights if name.startswith("critic.")})
    return {"net_arch": widths, "activation_fn": names[activation], "n_critics": critics}


def _layers(weights: Mapping[str, Tensor], prefix: str) -> list[str]:
    """The linear layers of a `Sequential`, in order."""
    numbers = {int(name.split(".")[-2]) for name in weights if name.startswith(f"{prefix}.")}
    return [f"{prefix}.{number}" for number in sorted(numbers)]


@torch.no_grad()
def _load(trainer: SAC, weights: Mapping[str, Tensor], variables: Mapping[str, Tensor]) -> None:
    actor: Any = trainer.actor
    for ours, theirs in zip(actor.trunk.layers, _layers(weights, "actor.latent_pi"), strict=True):
        ours.weight.copy_(weights[f"{theirs}.weight"])
        ours.bias.copy_(weights[f"{theirs}.bias"])
    actor.head.weight.copy_(torch.cat([weights["actor.mu.weight"], weights["actor.log_std.weight"]]))
    actor.head.bias.copy_(torch.cat([weights["actor.mu.bias"], weights["actor.log_std.bias"]]))
    critics: dict[str, Any] = {"critic": trainer.critic, "critic_target": trainer.critic_target}
    for prefix, part in critics.items():
        for n in range(trainer.config.policy_kwargs.n_critics):
            for layer, theirs in zip(part.net.layers, _layers(weights, f"{prefix}.qf{n}"), strict=True):
                layer.weight[n].copy_(weights[f"{theirs}.weight"].t())
                layer.bias[n, 0].copy_(weights[f"{theirs}.bias"])
    if "log_ent_coef" in variables:
        trainer.log_alpha.value.copy_(variables["log_ent_coef"].squeeze())
    elif "ent_coef_tensor" in variables:
        alpha = float(variables["ent_coef_tensor"])
        trainer.log_alpha.value.fill_(math.log(alpha) if alpha > 0 else -math.inf)
