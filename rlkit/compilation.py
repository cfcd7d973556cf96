"""The update of a trainer as one compiled graph: forward and backward passes, optimiser steps and target averaging.

`torch.compile` fuses what lies between the matrix products, and on a CPU calls the whole from C++, so that little of an
update's time is spent between its operations. The first update pays for it with the time of a compiler (tens of
seconds; a few where the result is found in the cache folder), so `auto` compiles where enough updates follow.

An update that can be compiled is a function of tensors and of flags, in static shapes, without a branch on a tensor's
value; its optimisers are `rlkit.optim.Adam`. What is not among its arguments, such as a configuration, is taken for
constant. Compiled and eager updates differ by rounding.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
from torch.torch_version import TorchVersion

from rlkit import processes
from rlkit.cache import cache_folder

PAYS = 20_000
"""Updates from which `auto` compiles on a CPU: more than those after which the time of compiling is won back, which
`rlkit bench sac-speed` measures on large and on small networks."""


def worthwhile(mode: Literal["auto", "on", "off"], device: torch.device, updates: float) -> bool:
    """Whether to compile for that many updates; a function of its arguments and of a compiler being there."""
    if mode != "auto" or device.type == "cuda":
        return mode != "off"
    return updates >= PAYS and compiler() is not None


def compiler() -> str | None:
    """The C++ compiler that torch.compile would use on a CPU, or None."""
    return shutil.which(compiler_name())


def compiler_name() -> str:
    """What it is called; as inductor, PyTorch's compiler, finds it."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


class Compilable:
    """`function`, computed eagerly, or compiled once `compiled` is set.

    A compilation that fails says so in one line, and it goes on eagerly, as do the others of its trainer.

    Args:
        function: takes tensors, or mappings of them, by position, and flags, by name.
        family: all of a trainer's, which this one joins.

    Attributes:
        compiled: whether calls are compiled.
        seconds: spent on compilation so far.
    """

    def __init__(self, function: Callable[..., Any], family: list[Compilable]) -> None:
        self.function, self.family = function, family
        family.append(self)
        self.compiled = False
        self.seconds = 0.0
        self._graphs: dict[tuple[bool, ...], Callable[..., Any]] = {}

    def __call__(self, *args: Any, **flags: bool) -> Any:
        if not self.compiled:
            return self.function(*args, **flags)
        key = tuple(flags.values())
        graph = self._graphs.get(key)
        return graph(*args, **flags) if graph is not None else self._first(key, args, flags)

    def _first(self, key: tuple[bool, ...], args: tuple[Any, ...], flags: dict[str, bool]) -> Any:
        """Compile for these flags, and call.

        What `function` itself raises passes through, except that a RuntimeError or OSError cannot be told from a
        missing compiler and makes the call happen again.
        """
        began = time.perf_counter()
        graph = torch.compile(_copy(self.function), fullgraph=True, dynamic=False, options=_options())
        try:
            with _compiling():
                result = graph(*args, **flags)
        except (torch._dynamo.exc.TorchDynamoException, AttributeError, RuntimeError, OSError) as error:
            for member in self.family:
                member.compiled = False
            reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
            processes.say(f"compile failed, running eagerly: {type(error).__name__}: {reason}")
            return self.function(*args, **flags)
        self._graphs[key] = graph
        seconds = time.perf_counter() - began
        self.seconds += seconds
        processes.say(f"compiled `{self.function.__name__.lstrip('_')}` in {seconds:.1f} s")
        return result


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with code of its own: what is compiled belongs to the code, and constants differ between objects."""
    plain = getattr(function, "__func__", function)
    copied = FunctionType(
        plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
    )
    copied.__kwdefaults__ = plain.__kwdefaults__
    return copied.__get__(function.__self__) if isinstance(function, MethodType) else copied


def _options() -> dict[str, Any]:
    """Options of inductor, PyTorch's compiler."""
    options: dict[str, Any] = {"guard_filter_fn": _of_arguments}
    if TorchVersion(torch.__version__) >= TorchVersion(
        "2.13"
    ):  # where it was seen to work: a mistake in it would end the process
        options["cpp_wrapper"] = True
    return options


def _of_arguments(guards: Sequence[Any]) -> list[bool]:
    """Of what a compiled function would check at every call, keep what depends on its arguments: the rest is constant,
    and checking it takes as long as several layers.
    """
    return [not guard.name.removeprefix("L['").startswith(("self", "G[", "dict(type(self")) for guard in guards]


@contextmanager
def _compiling() -> Iterator[None]:
    """Within, gradients are part of a graph, and compiled code is found in, and goes to, rlkit's cache folder."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    if before is None:
        os.environ[name] = str(cache_folder() / "compiled")
    try:
        with warnings.catch_warnings(), torch._dynamo.config.patch(trace_autograd_ops=True):
            warnings.simplefilter("ignore")
            yield
    finally:
        if before is None:
            del os.environ[name]
