"""Several processes of one run: which of them this is, and how they agree.

A launcher such as `torchrun --nproc_per_node 4` starts the same program several times; accelerate then joins the copies
in a process group (gloo on CPUs, NCCL on GPUs) and chooses each one's device. All of them go through the same steps at
the same time; process 0, the *main* one, alone writes files and talks to the user. Methods named here as collective
have to be called by all processes in the same order, or they wait for one another in vain; work of one process alone
that may fail goes through `together`, `tally` or `from_main`, which make its error one of all. A process that ends by
itself ends the others: whatever they wait for becomes an error.
"""

from __future__ import annotations

import atexit
import gc
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from rlkit.errors import RlkitError, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
E = TypeVar("E", bound=Exception)

WAIT = timedelta(hours=3)  # that processes wait for one another: one may evaluate or write for all


def launched() -> int:
    """How many processes the launcher started, as its environment variable `WORLD_SIZE` says; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def here() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or launched()) if launched() > 1 else 1


def expected() -> tuple[int, int]:
    """(rank, size) that `join` is going to find."""
    alone = _alone or launched() == 1
    return (0, 1) if alone else (int(os.environ.get("RANK") or 0), launched())


def is_main() -> bool:
    """Whether this is the process that writes and speaks, before it has joined the others."""
    return launched() == 1 or int(os.environ.get("RANK") or 0) == 0


def say(line: str) -> None:
    """A line for the user on standard error, from the main process."""
    if is_main():
        print(line, file=sys.stderr, flush=True)


def shared(error: E) -> E:
    """`error`, marked as one that all processes raise, so that the main one alone says it."""
    error.shared = True  # type: ignore[attr-defined]
    return error


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

    def __init__(self) -> None:
        self._wish: Callable[[], bool] = lambda: False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process. Collective."""
        return flag

    def sum(self, values: Tensor) -> Tensor:
        """Element by element, the sum over processes. Collective."""
        return values

    def listen(self, wish: Callable[[], bool]) -> None:
        """Ask `wish` from now on whether this process wishes to stop."""
        self._wish = wish

    def vote(self) -> bool:
        """Whether any process wishes to stop. Collective, unless `tally` or `average` has just asked all of them."""
        return self._wish()

    def tally(self, work: Callable[[], Sequence[int]], n: int) -> list[int]:
        """The sums over processes of the `n` whole numbers that `work` returns. Collective.

        An error of `work` in one process is one in all; `work` itself must not be collective.
        """
        return list(work())

    def average(self, tensors: list[Tensor]) -> list[Tensor]:
        """Tensor by tensor, the mean over processes, in one message. Collective."""
        return tensors

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Name by name, the mean over processes, which have the same names in the same order. Collective."""
        return dict(values)

    def rows(self, values: Tensor, most: int) -> Tensor:
        """(N, width): the float64 rows (n, width) of all processes, at most `most` of each, in order of rank.

        Collective.
        """
        return values

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank, in every process. Collective."""
        return [value]

    def together(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns in every process, in order of rank. Collective.

        An error of `work` in one process is one in all; `work` itself must not be collective.
        """
        return [work()]

    def from_main(self, make: Callable[[], T], helpers: Mapping[str, Callable[..., Any]] | None = None) -> T:
        """What the main process makes, in every process; an error there is one everywhere. Collective.

        Args:
            make: called by the main process while the others wait; another `from_main` within it is its own business.
            helpers: what the others can be asked for meanwhile; see `joined_by`.
        """
        return make()

    def joined_by(self, helper: str, *args: Any) -> AbstractContextManager[None]:
        """Within `from_main`: the others call `helpers[helper](*args)` now, so the main process may do its collective
        part of it. Elsewhere nothing, for there all processes come here.
        """
        return nullcontext()

    def wait(self) -> None:
        """Go on when all have come here. Collective."""

    def same(self, what: str, value: Any) -> None:
        """Make sure that `value` is equal everywhere; see `alike`. Collective."""
        self.alike({what: value})

    def alike(self, values: Mapping[str, Any]) -> None:
        """Make sure that what the texts name is equal everywhere. Collective.

        Raises:
            RlkitError: it is not, which would make the processes compute different things.
        """
        found = self.gather(values)
        for rank, others in enumerate(found):
            for what, value in found[0].items():
                if others[what] != value:
                    raise shared(
                        RlkitError(
                            f"{what}: process {rank} has {others[what]!s:.80}, process 0 has {value!s:.80}; all of "
                            "them have to see the same files and settings"
                        )
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
        super().__init__()
        import torch
        from accelerate import PartialState

        for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true":
                raise UserError(
                    f"accelerate was set up for {kind}, which rlkit does not use; start the processes with torchrun or "
                    "`accelerate launch --multi_gpu`, and divide weights among them with `--fsdp true`"
                )
        cpu = device == "cpu" or not torch.cuda.is_available()
        devices = torch.cuda.device_count()
        if not cpu and here() > devices:
            raise UserError(f"{here()} processes were started on a machine with {devices} CUDA devices")
        state = PartialState(cpu=cpu, timeout=WAIT)
        if state.num_processes != launched():
            raise RlkitError(
                f"the launcher started {launched()} processes, but {state.num_processes} joined (as "
                f"{state.distributed_type}); `torchrun --nproc_per_node N` is known to work"
            )
        self.rank, self.size = state.process_index, state.num_processes
        self.device = state.device if not cpu else torch.device("cpu")
        self._torch, self._state = torch, state
        self._leading = False  # whether the main process is at work while the others wait for it
        self._known: bool | None = None  # the outcome of a vote that was held along with something else
        atexit.register(self._leave)  # its threads must not outlive the interpreter
        # Flags and texts go through gloo, so that asking a question never waits for a GPU's queue.
        self._control = None if cpu else torch.distributed.new_group(backend="gloo", timeout=WAIT)

    def _leave(self) -> None:
        if self._torch.distributed.is_initialized():
            # A thread of the group that lets go of a tensor while the interpreter ends would abort the process.
            gc.collect()
            self._torch.distributed.destroy_process_group()
            gc.collect()

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Around whatever needs the others.

        Raises:
            RlkitError: one of them is gone, or this is the main process's turn alone (see `from_main`).
        """
        if self._leading:
            raise RlkitError("all processes have to take part in this, and the main one alone has got here")
        try:
            yield
        except RuntimeError as error:
            reason = re.sub(r"^\[\S+\] ", "", str(error).strip()).split(". ")[0].split("\n")[0]
            raise RlkitError(
                f"lost touch with the other processes: one of them has ended, or hangs ({reason}); it, or the "
                "launcher, says why. As many processes can go on from the last checkpoint by `rlkit resume`"
            ) from error

    def any(self, flag: bool) -> bool:
        return self._sums([int(flag)])[0] > 0

    def _sums(self, numbers: Sequence[int]) -> list[int]:
        counts = self._torch.tensor(numbers, dtype=self._torch.int64)
        with self._reaching():
            self._torch.distributed.all_reduce(counts, group=self._control)
        return counts.tolist()

    def listen(self, wish: Callable[[], bool]) -> None:
        self._wish, self._known = wish, None

    def vote(self) -> bool:
        known, self._known = self._known, None
        return self.any(self._wish()) if known is None else known

    def tally(self, work: Callable[[], Sequence[int]], n: int) -> list[int]:
        numbers: Sequence[int] = [0] * n
        failure: Exception | None = None
        try:
            numbers = work()
        except Exception as error:  # the others are told below
            failure = error
        failures, wishes, *sums = self._sums([failure is not None, self._wish(), *numbers])
        self._known = wishes > 0
        if failures:
            self._raise_first(failure)
        return sums

    def _raise_first(self, failure: Exception | None) -> None:
        """Raise the error of the lowest rank that has one. Collective."""
        found = self.gather(None if failure is None else _portable(failure, self.rank))
        for rank, error in enumerate(found):
            if error is not None:
                own = failure if rank == self.rank else None
                if own is not None and not isinstance(own, RlkitError | OSError):
                    raise own  # with its traceback
                raise shared(error) from own

    def sum(self, values: Tensor) -> Tensor:
        total = values.clone()
        with self._reaching():
            self._torch.distributed.all_reduce(total)
        return total

    def average(self, tensors: list[Tensor]) -> list[Tensor]:
        on_cpu = self._control is None  # elsewhere reading the wish would wait for the device
        wish = [tensors[0].new_tensor([float(self._wish())])] if on_cpu else []
        flat = self.sum(self._torch.cat([*(tensor.reshape(-1) for tensor in tensors), *wish])).div_(self.size)
        if on_cpu:
            self._known = bool(flat[-1] > 0)
        parts = flat.split([tensor.numel() for tensor in tensors] + [1] * on_cpu)
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=False)]

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        if not values:
            return {}
        total = self._torch.tensor(list(values.values()), dtype=self._torch.float64)
        with self._reaching():
            self._torch.distributed.all_reduce(total, group=self._control)
        return dict(zip(values, (total / self.size).tolist(), strict=True))

    def rows(self, values: Tensor, most: int) -> Tensor:
        # Messages are of one size: absent rows are zeros, told apart by the last column.
        own = self._torch.zeros(most, values.shape[1] + 1, dtype=self._torch.float64)
        own[: len(values), :-1], own[: len(values), -1] = values, 1
        found = [self._torch.empty_like(own) for _ in range(self.size)]
        with self._reaching():
            self._torch.distributed.all_gather(found, own, group=self._control)
        every = self._torch.cat(found)
        return every[every[:, -1] == 1, :-1].to(values.device)

    def gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        with self._reaching():
            self._torch.distributed.all_gather_object(found, value, group=self._control)
        return found

    def together(self, work: Callable[[], T]) -> list[T]:
        value: T | None = None
        failure: Exception | None = None
        try:
            value = work()
        except Exception as error:  # the others are told below
            failure = error
        found = self.gather((value, failure is not None))
        if any(failed for _, failed in found):
            self._raise_first(failure)
        values: list[Any] = [value for value, _ in found]
        return values

    def from_main(self, make: Callable[[], T], helpers: Mapping[str, Callable[..., Any]] | None = None) -> T:
        if self._leading:
            return make()
        if not self.is_main:
            return self._follow(helpers or {})
        self._leading = True
        try:
            value = make()
        except Exception as error:
            self._leading = False
            self._send(("error", _portable(error, self.rank)))
            raise
        finally:
            self._leading = False
        self._send(("value", value))
        return value

    def _follow(self, helpers: Mapping[str, Callable[..., Any]]) -> Any:
        """Help the main process until it is through."""
        while True:
            kind, content = self._send(None)
            if kind == "error":
                raise shared(content)
            if kind == "value":
                return content
            name, args = content
            with suppress(RlkitError, OSError):  # the main process has the same error, and decides what becomes of it
                helpers[name](*args)

    def _send(self, message: Any) -> Any:
        """The main process's message, in all of them."""
        box = [message]
        with self._reaching():
            self._torch.distributed.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    @contextmanager
    def joined_by(self, helper: str, *args: Any) -> Iterator[None]:
        if not self._leading:
            yield
            return
        self._leading = False
        try:
            self._send(("help", (helper, args)))
            yield
        finally:
            self._leading = True

    def wait(self) -> None:
        with self._reaching():
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


def _portable(error: Exception, rank: int) -> Exception:
    """`error` as any process can raise it, its text naming the process where that is not the main one."""
    known = isinstance(error, RlkitError | OSError)
    text = str(error) if known else f"{type(error).__name__}: {error}"
    kind = type(error) if isinstance(error, RlkitError) else OSError if known else RlkitError
    return kind(text if rank == 0 and known else f"process {rank}: {text}")


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
