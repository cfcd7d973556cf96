"""rlkit: pluggable trainers for reinforcement learning and preference optimisation that resume exactly.

`rlkit.SAC("HalfCheetah-v5").learn(100_000)` in Python, `rlkit train sac --env HalfCheetah-v5` in a shell. Importing the
package is quick: torch, gymnasium and the trainers are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlkit._version import __version__

if TYPE_CHECKING:
    from rlkit.buffer import Field, Ragged, RolloutBuffer
    from rlkit.control import ControlTrainer
    from rlkit.registry import register
    from rlkit.trainer import Trainer, load, resume
    from rlkit.trainers.sac import SAC

__all__ = [
    "SAC",
    "ControlTrainer",
    "Field",
    "Ragged",
    "RolloutBuffer",
    "Trainer",
    "__version__",
    "load",
    "register",
    "resume",
]

_HOMES = {
    "Field": "rlkit.buffer",
    "Ragged": "rlkit.buffer",
    "RolloutBuffer": "rlkit.buffer",
    "ControlTrainer": "rlkit.control",
    "register": "rlkit.registry",
    "Trainer": "rlkit.trainer",
    "load": "rlkit.trainer",
    "resume": "rlkit.trainer",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name.startswith("__"):
        raise AttributeError(name)
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    registry = importlib.import_module("rlkit.registry")  # `from rlkit import` would come back here
    names = registry.class_names()
    if name in names:
        return registry.get(names[name])
    raise AttributeError(f"module `rlkit` has no `{name}`")
