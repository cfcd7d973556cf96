"""What `learn(callback=...)` takes: functions of the trainer, and Stable-Baselines3's callbacks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rlkit.errors import UserError

if TYPE_CHECKING:
    from rlkit.trainer import Trainer


class Callbacks(Protocol):
    """Whoever has a turn in a run."""

    def start(self) -> None:
        """Before the first step."""

    def step(self) -> bool:
        """The clock has advanced; False ends the run."""

    def end(self) -> None:
        """After the last step, unless an error ended the run."""


class Several:
    """Callbacks in turn; all of them have it, whatever the first ones say."""

    def __init__(self, members: Sequence[Callbacks]) -> None:
        self.members = members

    def start(self) -> None:
        for member in self.members:
            member.start()

    def step(self) -> bool:
        said = [member.step() for member in self.members]
        return all(said)

    def end(self) -> None:
        for member in self.members:
            member.end()


class Function:
    """A function of the trainer."""

    def __init__(self, function: Callable[[Trainer], bool | None], trainer: Trainer) -> None:
        self.function, self.trainer = function, trainer

    def start(self) -> None:
        """Functions have no turn here."""

    def step(self) -> bool:
        return self.function(self.trainer) is not False

    def end(self) -> None:
        """Nor here."""


def as_callbacks(callback: Any, trainer: Trainer) -> Callbacks:
    """One callback, or a list of them, ready for `trainer`.

    Args:
        callback: functions `f(trainer)`, objects like Stable-Baselines3's `BaseCallback`, and its functions
            `f(locals, globals)`; a list may hold all kinds.

    Raises:
        UserError: something else, or one that the trainer has no environments for.
    """
    from rlkit import sb3

    items = list(callback) if isinstance(callback, list | tuple) else [callback]
    members: list[Callbacks] = []
    for item in items:
        if sb3.is_callback(item):
            members.append(sb3.CallbackBridge(item, trainer))
        elif callable(item) and _arguments(item) == 2:
            members.append(sb3.CallbackBridge(sb3.from_function(item), trainer))
        elif callable(item):
            members.append(Function(item, trainer))
        else:
            raise UserError(
                "`callback`: expected a function of the trainer, a callback of Stable-Baselines3, or a list of such, "
                f"got {item!r}"
            )
    return members[0] if len(members) == 1 else Several(members)


def _arguments(function: Callable[..., Any]) -> int:
    """How many positional arguments a function needs."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in ones have none to show
        return 1
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters)
