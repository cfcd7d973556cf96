"""Shared by all tests: one PyTorch thread (tiny networks gain nothing from two), no network, no progress colours."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited by the processes that tests start
os.environ.setdefault("MKL_NUM_THREADS", "1")
_CACHE = tempfile.TemporaryDirectory(prefix="rlkit-cache-")  # deleted when the session ends
os.environ["RLKIT_CACHE"] = _CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"

if not (Path(__import__("rlkit").__file__).parent.parent / "envs").is_dir():
    pytest.exit("tests need an editable install of this checkout: pip install -e '.[dev]'", returncode=2)

import torch  # noqa: E402 (after the thread settings)

torch.set_num_threads(1)
sys.path.insert(0, str(ROOT / "tests"))


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that forget `--out` write into a temporary folder, never into the checkout."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture
def any_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no C++ compiler is found, the captured graph is computed operation by operation."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        original = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, options, **rest: original(f, backend="aot_eager", **rest))
