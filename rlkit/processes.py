"""Several processes of one run: which of them this is, and how they agree.

A launcher such as `torchrun --nproc_per_node 4` starts the same program several times; accelerate then joins the copies
in a process group (gloo on CPUs, NCCL on GPUs) and chooses each one's device. All of them go through the same steps at
the same time; process 0, the *main* one, alone writes files and talks to the user. Methods named here as collective
have to be called by all processes in the same order, or they wait for one another in vain.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from rlkit.errors import RlkitError, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")


def launched() -> int:
    """How many processes the launcher started, as its environment variable `WORLD_SIZE` says; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main() -> bool:
    """Whether this is the process that writes and speaks, before it has joined the others."""
    return launched() == 1 or int(os.environ.get("RANK") or 0) == 0


def say(line: str) -> None:
    """A line for the user on standard error, from the main process."""
    if is_main():
        print(line, file=sys.stderr, flush=True)


class Processes:
    """The processes of a run, seen from one of them. This class is the case of one process; `join` finds others.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        device: what the launcher gives this process, or None where it has no say.
    """

    rank = 0
    size = 1
    device: torch.device | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process. Collective."""
        return flag

    def sum(self, values: Tensor) -> Tensor:
        """Element by element, the sum over processes. Collective."""
        return values

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank, in every process. Collective."""
        return [value]

    def from_main(self, make: Callable[[], T]) -> T:
        """What the main process makes, in every process; an error there is one everywhere. Collective."""
        return make()

    def wait(self) -> None:
        """Go on when all have come here. Collective."""

    def same(self, what: str, value: Any) -> None:
        """Make sure that `value` is equal everywhere. Collective.

        Raises:
            RlkitError: it is not, which would make the processes compute different things.
        """
        found = self.gather(value)
        odd = [rank for rank, other in enumerate(found) if other != found[0]]
        if odd:
            raise RlkitError(
                f"{what}: process {odd[0]} has {found[odd[0]]!s:.80}, process 0 has {found[0]!s:.80}; all of them "
                "have to see the same files and settings"
            )

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process goes through before the others do, which then find what it left behind. Collective."""
        yield

    def wrapped(self, module: torch.nn.Module) -> torch.nn.Module:
        """`module` such that a backward pass averages its gradients over processes."""
        return module


class _Several(Processes):
    """A process among others, joined by accelerate."""

    def __init__(self, device: str) -> None:
        import torch
        from accelerate import PartialState

        for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true":
                raise UserError(
                    f"accelerate was set up for {kind}, which rlkit does not use; start the processes with torchrun or "
                    "`accelerate launch --multi_gpu`, and divide weights among them with `--fsdp true`"
                )
        cpu = device == "cpu" or not torch.cuda.is_available()
        here, devices = int(os.environ.get("LOCAL_WORLD_SIZE") or 1), torch.cuda.device_count()
        if not cpu and here > devices:
            raise UserError(f"{here} processes were started on a machine with {devices} CUDA devices")
        state = PartialState(cpu=cpu)
        if state.num_processes != launched():
            raise RlkitError(
                f"the launcher started {launched()} processes, but {state.num_processes} joined (as "
                f"{state.distributed_type}); `torchrun --nproc_per_node N` is known to work"
            )
        self.rank, self.size = state.process_index, state.num_processes
        self.device = state.device if not cpu else torch.device("cpu")
        self._torch, self._state = torch, state
        atexit.register(self._leave)  # its threads must not outlive the interpreter
        # Flags and texts go through gloo, so that asking a question never waits for a GPU's queue.
        self._control = None if cpu else torch.distributed.new_group(backend="gloo")

    def _leave(self) -> None:
        if self._torch.distributed.is_initialized():
            # A thread of the group that lets go of a tensor while the interpreter ends would abort the process.
            gc.collect()
            self._torch.distributed.destroy_process_group()
            gc.collect()

    def any(self, flag: bool) -> bool:
        votes = self._torch.tensor([int(flag)])
        self._torch.distributed.all_reduce(votes, group=self._control)
        return bool(votes.item())

    def sum(self, values: Tensor) -> Tensor:
        total = values.clone()
        self._torch.distributed.all_reduce(total)
        return total

    def gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        self._torch.distributed.all_gather_object(found, value, group=self._control)
        return found

    def from_main(self, make: Callable[[], T]) -> T:
        box: list[Any] = [None]
        if self.is_main:
            try:
                box = [(make(), None)]
            except Exception as error:
                box = [(None, error if isinstance(error, RlkitError) else RlkitError(f"process 0: {error}"))]
                self._torch.distributed.broadcast_object_list(box, src=0, group=self._control)
                raise
        self._torch.distributed.broadcast_object_list(box, src=0, group=self._control)
        value, failed = box[0]
        if failed is not None:
            raise failed
        return value

    def wait(self) -> None:
        self._torch.distributed.barrier(group=self._control)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        with self._state.main_process_first():
            yield

    def wrapped(self, module: torch.nn.Module) -> torch.nn.Module:
        with warnings.catch_warnings():  # `broadcast_buffers` has a new name in PyTorch 2.13, which older ones lack
            warnings.simplefilter("ignore", FutureWarning)
            return self._torch.nn.parallel.DistributedDataParallel(
                module,
                device_ids=None if self.device is None or self.device.type == "cpu" else [self.device],
                # They are constants here (tables of positions), and synchronising them would make inference collective.
                broadcast_buffers=False,
            )


_joined: Processes | None = None
_alone = 0


def join(device: str = "auto") -> Processes:
    """The processes that this one was started with; the first call waits for all of them.

    Args:
        device: auto, cpu or cuda.

    Raises:
        UserError: a device that cannot be had by several processes, or a back end that rlkit does not use.
        RlkitError: fewer processes joined than were started.
    """
    global _joined
    if _alone or launched() == 1:
        return Processes()
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"`device`: got {device!r}; several processes take auto, cpu or cuda: each gets its own")
    if _joined is None:
        _joined = _Several(device)
    joined = _joined.device.type if _joined.device is not None else device
    if device not in ("auto", joined):
        raise UserError(f"`device`: got {device!r}, but the processes have joined on {joined}")
    return _joined


@contextmanager
def alone() -> Iterator[None]:
    """Within, `join` gives one process: for work that each does for itself, or the main one for all."""
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1
