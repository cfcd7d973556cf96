"""Trainers by name: `sac` -> `rlkit.trainers.sac:SAC`, imported at first use.

This package's own trainers are the table `TRAINERS` of trainers/__init__.py. Another package adds one with an entry
point, and it then works in every command:

    [project.entry-points."rlkit.trainers"]
    mine = "my_package.mine:Mine"

A script may also register a class for its own process with `register(Mine)`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlkit.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from rlkit.trainer import Trainer

GROUP = "rlkit.trainers"


@dataclass(frozen=True)
class Entry:
    """A row of `rlkit list`: where the class is, and what it is without importing it."""

    target: str
    """`module:Class`."""
    paper: str = ""
    status: str = "third party"
    """reproduced, reconstructed or variant; see the module's docstring."""
    data: str = ""
    """What it trains on."""
    actions: tuple[str, ...] = ()
    """Kinds of gymnasium action spaces that it can act in; empty for trainers without environments."""


_registered: dict[str, type[Trainer]] = {}


def entries() -> dict[str, Entry]:
    """Name -> entry of every trainer that is installed or registered; imports no trainer."""
    table: dict[str, Entry] = dict(importlib.import_module("rlkit.trainers").TRAINERS)
    for point in importlib.metadata.entry_points(group=GROUP):
        table.setdefault(point.name, Entry(point.value, paper=f"({point.dist.name})" if point.dist else ""))
    for name, cls in _registered.items():
        table.setdefault(name, Entry(f"{cls.__module__}:{cls.__qualname__}"))
    return table


def register(cls: type[Trainer]) -> type[Trainer]:
    """Make `cls` known under `cls.name` in this process (usable as a decorator).

    Raises:
        UserError: the name is taken by another class.
    """
    known = entries().get(cls.name)
    if known is not None and known.target != f"{cls.__module__}:{cls.__qualname__}":
        raise UserError(f"the trainer name `{cls.name}` is taken by {known.target}; choose another `name`")
    _registered[cls.name] = cls
    return cls


def get(name: str) -> type[Trainer]:
    """The trainer class called `name`.

    Raises:
        UserError: no such trainer, or its package cannot be imported.
    """
    if name in _registered:
        return _registered[name]
    table = entries()
    if name not in table:
        raise UserError(f"unknown trainer `{name}`{did_you_mean(name, table)} (`rlkit list` shows all)")
    module, _, attribute = table[name].target.partition(":")
    try:
        return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))  # type: ignore[return-value]
    except (ImportError, AttributeError) as error:
        raise UserError(f"trainer `{name}`: cannot import {table[name].target}: {error}") from error


def class_names() -> dict[str, str]:
    """Class name -> trainer name, for `rlkit.SAC`."""
    return {entry.target.partition(":")[2]: name for name, entry in entries().items()}
