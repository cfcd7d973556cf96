"""Trainers by name: this package's, other packages', a script's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import rlkit
from rlkit import registry
from rlkit.errors import UserError
from rlkit.trainer import Trainer
from rlkit.trainers import TRAINERS


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = dict(registry._registered)
    yield
    registry._registered.clear()
    registry._registered.update(before)


class Mine(Trainer):
    name = "mine"


class Imposter(Trainer):
    name = "sac"


class Another(Trainer):
    name = "mine"


def install(folder: Path, entry_points: str, code: str = "") -> None:
    """What `pip install` of a package with trainers leaves in a folder of `sys.path`."""
    info = folder / "plugin_of_a_user-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-a-user\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[rlkit.trainers]\n{entry_points}\n")
    (folder / "plugin_of_a_user.py").write_text(code)


def test_every_listed_trainer_is_what_its_row_says() -> None:
    for name, entry in TRAINERS.items():
        cls = registry.get(name)
        assert issubclass(cls, Trainer)
        assert cls.name == name
        assert f"{cls.__module__}:{cls.__qualname__}" == entry.target
        assert getattr(rlkit, cls.__name__) is cls
        assert entry.status in ("reproduced", "reconstructed", "variant")
        assert entry.paper
        assert entry.data


@pytest.mark.parametrize(("name", "near"), [("sacc", "sac"), ("SAC", None), ("zzz", None)])
def test_an_unknown_name(name: str, near: str | None) -> None:
    with pytest.raises(UserError, match=f"unknown trainer `{name}`") as caught:
        registry.get(name)
    if near:
        assert f"did you mean `{near}`?" in str(caught.value)
    assert "rlkit list" in str(caught.value)


def test_unknown_attributes_of_the_package() -> None:
    with pytest.raises(AttributeError, match="`rlkit` has no `SACC`"):
        _ = rlkit.SACC
    with pytest.raises(ImportError):
        exec("from rlkit import no_such_name")
    assert not hasattr(rlkit, "__wrapped__")


def test_register() -> None:
    assert registry.register(Mine) is Mine
    assert registry.get("mine") is Mine
    assert rlkit.Mine is Mine
    assert registry.entries()["mine"].target == f"{__name__}:Mine"
    assert registry.register(Mine) is Mine  # a notebook's cell that runs again


def test_a_name_belongs_to_one_class() -> None:
    with pytest.raises(UserError, match=r"the trainer name `sac` is taken by rlkit\.trainers\.sac:SAC"):
        registry.register(Imposter)
    registry.register(Mine)
    with pytest.raises(UserError, match=f"the trainer name `mine` is taken by {__name__}:Mine"):
        registry.register(Another)
    assert registry.get("mine") is Mine


def test_this_packages_own_trainer_may_be_registered_again() -> None:
    assert registry.register(registry.get("sac")) is registry.get("sac")


CODE = """
from rlkit.trainer import Trainer

class Theirs(Trainer):
    name = "theirs"

    class Nested(Trainer):
        name = "nested"
"""


def test_entry_points_are_discovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "theirs = plugin_of_a_user:Theirs\nnested = plugin_of_a_user:Theirs.Nested", CODE)
    monkeypatch.syspath_prepend(tmp_path)
    entry = registry.entries()["theirs"]
    assert (entry.target, entry.paper, entry.status) == (
        "plugin_of_a_user:Theirs",
        "(plugin-of-a-user)",
        "third party",
    )
    assert registry.get("theirs").name == "theirs"
    assert registry.get("nested").name == "nested"
    assert rlkit.Theirs is registry.get("theirs")
    assert registry.get("sac").name == "sac"


def test_an_entry_point_cannot_replace_a_trainer_of_this_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "sac = plugin_of_a_user:Theirs", CODE)
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.get("sac").__module__ == "rlkit.trainers.sac"


@pytest.mark.parametrize(
    ("target", "reason"),
    [("no_such_package_:X", "No module named 'no_such_package_'"), ("plugin_of_a_user:X", "has no attribute 'X'")],
)
def test_an_entry_point_that_cannot_be_imported(
    target: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It breaks neither the list nor the other trainers, and the error says what is missing."""
    install(tmp_path, f"theirs = {target}")
    monkeypatch.syspath_prepend(tmp_path)
    assert "theirs" in registry.entries()
    assert registry.get("sac").name == "sac"
    with pytest.raises(UserError, match="trainer `theirs`: cannot import") as caught:
        registry.get("theirs")
    assert reason in str(caught.value)
