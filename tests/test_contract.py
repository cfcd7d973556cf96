"""What every registered trainer has to keep; a new one is tested here without a line of its own."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY_LANGUAGE, as_options, close, fingerprint, learn_with_stops, run_rlkit, tiny, tiny_fields

import rlkit
from rlkit import registry
from rlkit.config import dump_yaml, load_file, options, to_dict, validate
from rlkit.errors import UserError
from rlkit.export import export
from rlkit.trainers import TRAINERS

NAMES = sorted(TRAINERS)
README = Path(__file__).parent.parent / "README.md"


def to_first_update(trainer: Any) -> None:
    """Gather until an update is owed."""
    trainer.before_learning()
    trainer.prepare(lambda: False)
    while trainer.owed < 1:
        trainer.clock += trainer.collect()


@pytest.mark.parametrize("name", NAMES)
def test_defaults_build_the_embedded_task(name: str) -> None:
    cls = registry.get(name)
    task = {k: v for k, v in cls.default_task.items() if k != "steps"}
    if "letters" in tiny_fields(name):
        task["letters"] = TINY_LANGUAGE["letters"]
    trainer = cls(config=cls.make_config(task))
    assert trainer.name == name
    assert cls.default_task["steps"] >= 1
    close(trainer)


@pytest.mark.parametrize("name", NAMES)
def test_three_updates_change_every_parameter_and_report_finite_scalars(name: str) -> None:
    trainer = tiny(name)
    to_first_update(trainer)
    modules = {k: part for k, part in trainer._parts.items() if isinstance(part, torch.nn.Module)}
    modules |= {"model": trainer.model} if hasattr(trainer, "model") else {}
    named = {(k, n): p for k, m in modules.items() for n, p in m.named_parameters()}
    before = {key: p.detach().clone() for key, p in named.items() if p.requires_grad}
    assert before
    for _ in range(3):
        metrics = trainer.update(trainer.batch())
        trainer.updates += 1
        for key, value in metrics.items():
            assert isinstance(value, torch.Tensor), f"{key}: metrics are tensors, so that nothing waits for the device"
            assert value.ndim == 0, key
            assert not value.requires_grad, key
            assert torch.isfinite(value), key
    still = [key for key, old in before.items() if torch.equal(old, named[key])]
    assert still == [], "parameters without a gradient"
    close(trainer)


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load_predict_the_same(name: str, tmp_path: Path) -> None:
    trainer = tiny(name).learn(40)
    folder = trainer.save(tmp_path / "saved.zip")
    assert folder == tmp_path / "saved"
    kinds = {path.suffix for path in folder.iterdir()}
    assert kinds <= {".safetensors", ".json", ".yaml", ".md", ".jinja"}
    names = [path.name for path in folder.glob("*.safetensors")]
    assert any("policy" in n or "model" in n for n in names)
    for loaded in (rlkit.load(folder), type(trainer).load(folder), rlkit.load(folder, inference=True)):
        assert loaded.clock == trainer.clock
        if hasattr(trainer, "model"):
            assert str(trainer.model.dtype) == "torch.float32"
            for (key, a), b in zip(trainer.model.named_parameters(), loaded.model.parameters(), strict=True):
                assert torch.equal(a, b), key
            if hasattr(trainer.model, "generate"):
                asked = {"prompts": ["dbca=", "ab="], "k": 3, "max_new_tokens": 6}
                assert loaded.sample(**asked) == trainer.sample(**asked)
        if hasattr(trainer, "predict"):
            batch = np.stack([trainer.observation_space.sample() for _ in range(5)])
            np.testing.assert_array_equal(
                trainer.predict(batch, deterministic=True)[0], loaded.predict(batch, deterministic=True)[0]
            )
        close(loaded)
    close(trainer)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_trained_can_be_exported(name: str, tmp_path: Path) -> None:
    """A policy as ONNX and as PyTorch's program, which are compared with `predict`; a language model as its folder."""
    trainer = tiny(name)
    saved = str(trainer.save(tmp_path / "saved"))
    kinds = ("onnx", "torch") if hasattr(trainer, "predict") else ("hf",)
    for kind in kinds:
        assert export(saved, kind, say=lambda line: None).exists()
    close(trainer)


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_trainer_goes_on_as_if_never_saved(name: str, tmp_path: Path) -> None:
    trainer = tiny(name).learn(33)
    loaded = rlkit.load(trainer.write_checkpoint(tmp_path / "saved"))
    for agent, folder in ((trainer, "a"), (loaded, "b")):
        agent.learn(20)
        agent.write_checkpoint(tmp_path / folder)
        close(agent)
    assert rlkit.checkpoint.content_hash(tmp_path / "a") == rlkit.checkpoint.content_hash(tmp_path / "b")


@pytest.mark.parametrize("name", NAMES)
def test_stop_and_resume_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    close(tiny(name, out=str(tmp_path / "whole")).learn(100))
    learn_with_stops(tiny(name, out=str(tmp_path / "parts")), 100, [7, 45, 46, 90])
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_run_other_seed_other_run(name: str, tmp_path: Path) -> None:
    hashes = []
    for i, seed in enumerate((0, 0, 1)):
        trainer = tiny(name, seed=seed).learn(40)
        trainer.save(tmp_path / str(i))
        close(trainer)
        hashes.append(rlkit.checkpoint.content_hash(tmp_path / str(i)))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("name", NAMES)
def test_configuration_round_trips_and_is_strict(name: str, tmp_path: Path) -> None:
    cls = registry.get(name)
    config = cls.make_config({})
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(to_dict(config)), encoding="utf-8")
    assert validate(cls.Config, load_file(path)) == config
    field = dataclasses.fields(cls.Config)[-1].name
    with pytest.raises(UserError, match=f"unknown key `{field}x`; did you mean `{field}`"):
        cls.make_config({f"{field}x": 1})
    assert [o.path for o in options(cls.Config) if not o.doc] == [], "every field has its line of documentation"


@pytest.mark.parametrize("name", NAMES)
def test_wrong_kinds_of_input_are_user_errors(name: str) -> None:
    cls = registry.get(name)
    for wrong in (
        {"seed": "many"},
        {"seed": -1},
        {"precision": "float8"},
        {"checkpoint_every": 0},
        {"device": "abacus"},
    ):
        (key,) = wrong
        with pytest.raises(UserError, match=key):
            tiny(name, **wrong)
    with pytest.raises(UserError):
        cls(config=object())


@pytest.mark.parametrize("name", NAMES)
def test_documentation(name: str) -> None:
    """A paper in the module's text, a row in README's table that agrees with `rlkit list`, help for every field."""
    entry, cls = TRAINERS[name], registry.get(name)
    doc = sys.modules[cls.__module__].__doc__ or ""
    assert re.search(r"arXiv:\d{4}\.\d{4,5}", doc)
    assert "Deviations" in doc
    row = next((line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}`")), "")
    for fact in (entry.status, entry.data, entry.paper):
        assert fact in row, f"README's row of `{name}` lacks: {fact}"
    shown = run_rlkit("train", name, "--help")
    assert shown.returncode == 0
    missing = [o.path for o in options(cls.Config) if f"--{o.path}" not in shown.stdout]
    assert missing == []


@pytest.mark.parametrize("name", NAMES)
def test_command_line_end_to_end(name: str, tmp_path: Path) -> None:
    """train -> eval -> plot -> resume to a larger total, each needing only the run folder."""
    run = str(tmp_path / "run")
    trained = run_rlkit("train", name, "--steps", "60", "--out", run, *as_options(tiny_fields(name)))
    assert trained.returncode == 0, trained.stderr
    assert "evaluation before" in trained.stdout
    assert "evaluation after" in trained.stdout
    evaluated = run_rlkit("eval", run, "--episodes", "2", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    plotted = run_rlkit("plot", run)
    assert plotted.returncode == 0, plotted.stderr
    assert (tmp_path / "run" / "learning-curve.png").stat().st_size > 1000
    resumed = run_rlkit("resume", run, "--steps", "80")
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "run" / "checkpoints" / "step-0000000080").is_dir()
