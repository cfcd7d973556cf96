"""Files that are made of a run: where they go, and how they appear."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlkit.checkpoint import MANIFEST
from rlkit.errors import UserError


def default_place(run: str | Path, name: str) -> Path:
    """Where the file `name` made of `run` goes by default.

    Into the run folder; what is made of one of its checkpoints has the step in its name (`step-0000010000-video.mp4`).
    Beside a saved folder (`agent-video.mp4`): it could not be saved again if it held anything else.
    """
    given = Path(run)
    given = given if given.name not in ("", "..") else given.resolve()
    if given.name == "checkpoints":
        return given.parent / name
    if given.parent.name == "checkpoints":
        return given.parent.parent / f"{given.name}-{name}"
    return given.with_name(f"{given.name}-{name}") if (given / MANIFEST).exists() else given / name


def check_suffix(out: Path, suffix: str) -> Path:
    """`out`, which has to end in `suffix`.

    Raises:
        UserError: it does not.
    """
    if out.suffix.lower() != suffix:
        raise UserError(f"`--out`: got {out}; expected a file name that ends in {suffix}")
    return out


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Write to the path that this gives: `out` appears, or is replaced, once all is written, and not at all otherwise.

    Raises:
        UserError: there is no such folder, or it cannot be written.
    """
    temp = out.with_name(f".tmp-{os.getpid()}-{out.name}")
    try:
        if out.is_dir():
            raise IsADirectoryError(f"it is a folder: {out}")
        temp.touch()
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from None
    try:
        yield temp
        temp.replace(out)
    finally:
        temp.unlink(missing_ok=True)
