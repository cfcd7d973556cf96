"""The user's cache folder: what may be deleted at any time, and is made again."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """`RLKIT_CACHE`, else `XDG_CACHE_HOME/rlkit`, else the platform's; the folder may not exist yet."""
    override = os.environ.get("RLKIT_CACHE")
    if override:
        return Path(override).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "rlkit"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "rlkit"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "rlkit" / "Cache"
    return Path.home() / ".cache" / "rlkit"
