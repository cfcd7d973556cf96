"""Reward modules: functions of named columns, the same calling convention for control and for language models.

A reward module is any callable `fn(**columns) -> list[float | None]` (or an array) with one value a row. It takes the
columns that it names and the rest as `**kwargs`. Control passes `rewards, observations, actions, next_observations,
terminated, truncated, env` (arrays with one row a transition; observations flattened to vectors); language passes
`prompts, completions` and the dataset's columns, so a reward function written for TRL works unchanged.

`call` makes one call and checks what comes back. In control the modules of a run form a chain: each sees the previous
one's values in `rewards`, and what the last returns is what the trainer learns from; episode statistics stay in the
environment's own rewards. A module with state (`state_dict`, `load_state_dict`) is saved with the run. Several
processes have a copy each, with the state of its own calls; one that has `synchronise(processes)` can exchange it after
every step.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlkit.errors import UserError, did_you_mean
from rlkit.processes import Processes

RewardModule = Callable[..., Any]


def name_of(module: RewardModule) -> str:
    """The name of a reward module in messages and logs."""
    return getattr(module, "__name__", type(module).__name__)


def call(module: RewardModule, columns: Mapping[str, Any], n: int) -> np.ndarray:
    """(n,) float64 of one module's values; None (not applicable) becomes NaN.

    Raises:
        UserError: it returned another number of values than rows, something that is no number, or NaN or infinity.
    """
    values = module(**columns)
    name = name_of(module)
    if isinstance(values, np.ndarray) and values.ndim > 1:
        raise UserError(f"reward `{name}` returned an array of shape {values.shape}, expected ({n},) (one value a row)")
    try:
        values = list(values)
    except TypeError:
        raise UserError(f"reward `{name}` returned {values!r}; expected a list of {n} numbers") from None
    if len(values) != n:
        raise UserError(f"reward `{name}` returned {len(values)}, expected {n} (one value a row)")
    absent = [value is None for value in values]
    try:
        if any(isinstance(value, str | bytes) for value in values):  # which `float` would read
            raise ValueError
        numbers = np.array([math.nan if a else float(v) for v, a in zip(values, absent, strict=True)])
    except (TypeError, ValueError):
        raise UserError(f"reward `{name}` returned something that is no number: {values!r}") from None
    bad = [i for i in range(n) if not absent[i] and not math.isfinite(numbers[i])]
    if bad:
        raise UserError(f"reward `{name}` returned {numbers[bad[0]]} for row {bad[0]}; rewards must be finite")
    return numbers


class Chain:
    """Control rewards: modules applied in turn, each on the previous one's values.

    Args:
        modules: callables; see `resolve` for how the command line names them.
    """

    def __init__(self, modules: Sequence[RewardModule]) -> None:
        self.modules = list(modules)

    def __call__(self, columns: dict[str, Any]) -> np.ndarray:
        """(n,) float64 rewards to learn from; `columns` holds the environment's own as `rewards`.

        Raises:
            UserError: a module broke the calling convention, or returned None: a control reward has to exist.
        """
        rewards = np.asarray(columns["rewards"], dtype=np.float64)
        for module in self.modules:
            rewards = call(module, {**columns, "rewards": rewards}, len(rewards))
            if np.isnan(rewards).any():
                row = int(np.flatnonzero(np.isnan(rewards))[0])
                raise UserError(f"reward `{name_of(module)}` returned None for row {row}; a transition needs a number")
        return rewards

    def synchronise(self, processes: Processes) -> None:
        """Let the modules of all processes exchange what they learned from the last step. Collective."""
        for module in self.modules:
            if hasattr(module, "synchronise"):
                module.synchronise(processes)

    def state_dict(self) -> dict[str, Any]:
        return {str(i): m.state_dict() for i, m in enumerate(self.modules) if hasattr(m, "state_dict")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for i, value in state.items():
            module: Any = self.modules[int(i)]
            module.load_state_dict(value)


def resolve(spec: str | RewardModule, **context: Any) -> RewardModule:
    """A reward module from its name: `scale=0.1`, `clip=-1,1`, `normalize`, or `module:function` for your own.

    Args:
        spec: the text, or a callable, which is returned as it is; a class is called without arguments.
        context: what built-in modules need from the run, such as `gamma` and `n_envs`.

    Raises:
        UserError: unknown name, wrong argument, or a function that cannot be imported.
    """
    if not isinstance(spec, str):
        return spec() if isinstance(spec, type) else spec
    from rlkit.rewards.shaping import BUILT_IN

    name, _, argument = spec.partition("=")
    if name in BUILT_IN:
        try:
            numbers = [float(a) for a in argument.split(",")] if argument else []
            return BUILT_IN[name](*numbers, **context)
        except (TypeError, ValueError) as error:
            raise UserError(f"reward `{spec}`: {error}") from None
    module, _, attribute = spec.partition(":")
    if not attribute:
        raise UserError(f"unknown reward `{spec}`, and no `module:function`{did_you_mean(name, BUILT_IN)}")
    try:
        found = _attribute(importlib.import_module(module), attribute)
        found = found() if isinstance(found, type) else found
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"reward `{spec}`: {error}") from error
    if not callable(found):
        raise UserError(f"reward `{spec}` is not callable")
    return found


def _attribute(module: Any, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), module)


def spec_of(module: str | RewardModule) -> str:
    """The text that `resolve` turns back into this module, or a description in `<...>` where there is none."""
    if isinstance(module, str):
        return module
    if hasattr(module, "spec"):
        return str(module.spec)
    home, qualified = getattr(module, "__module__", None), getattr(module, "__qualname__", None)
    if home and qualified and home != "__main__":
        try:  # not a method, a local function or something decorated
            if _attribute(sys.modules.get(home), qualified) is module:
                return f"{home}:{qualified}"
        except AttributeError:
            pass
    return f"<{name_of(module).strip('<>')}>"
