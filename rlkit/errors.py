"""Errors that users see, and the two helpers that make them useful: near names and tables of differences.

Every error that a user can cause derives from `RlkitError`, carries a message that names the field, environment, row
or file and what to do, and an exit code for the command line:

| class | exit code | meaning |
|---|---|---|
| `UserError` | 2 | wrong use: an unknown name, a value out of range, options that conflict |
| `EnvError` | 1 | an environment raised, hung, died or produced NaN |
| `CheckpointError` | 1 | a checkpoint is missing, incomplete, damaged or refused |
| `DivergenceError` | 1 | a loss, gradient or parameter became non-finite |
| `RewardError` (rlkit.rewards.text) | 1 | a reward function raised |
| `Stopped` | 75 | a signal stopped the run; where it has a folder, a resumable checkpoint was written |
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later


class RlkitError(Exception):
    """Base of all errors of this package; `exit_code` is what the command line returns."""

    exit_code = 1
    shared = False
    """Whether all processes of a run raise it, so that the main one alone says it."""


class UserError(RlkitError, ValueError):
    """Wrong use, found before any work was lost."""

    exit_code = 2


class EnvError(RlkitError, RuntimeError):
    """An environment failed: the message names its index and the last action."""


class CheckpointError(RlkitError, RuntimeError):
    """No usable checkpoint, or one that was refused: the message names the file."""


class DivergenceError(RlkitError, ArithmeticError):
    """A loss, gradient or parameter is not finite: the message names it and the update."""


class Stopped(SystemExit):
    """Raised by `learn` after a signal, once the checkpoint is written; ends a script with exit code 75."""

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_STOPPED)
        self.message = message

    def __str__(self) -> str:
        return self.message


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """`"; did you mean `near`?"` for the nearest of `choices`, or a short list of them, or nothing."""
    names = sorted(set(choices))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean `{near[0]}`?"
    if names and len(names) <= 12:
        return f"; known: {', '.join(names)}"
    return ""


def differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """A table of the keys whose values differ, one a line, for errors at resume; empty when all agree."""
    absent = "(absent)"
    keys = [k for k in {**saved, **given} if saved.get(k, absent) != given.get(k, absent)]
    if not keys:
        return ""
    width = max(len("field"), *(len(k) for k in keys))
    rows = [f"  {'field':<{width}}  saved -> given"]
    rows += [f"  {k:<{width}}  {saved.get(k, absent)!r} -> {given.get(k, absent)!r}" for k in keys]
    return "\n".join(rows)
