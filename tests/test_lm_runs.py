"""What users do with runs of language trainers afterwards: go on, start from them, evaluate what was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import as_options
from lm_zoo import PAIRS, saved_llama

import rlkit
from rlkit.cli import main
from rlkit.config import load_file
from rlkit.metrics import read_jsonl

FIELDS: dict[str, Any] = {
    "learning_rate": 1e-3, "device": "cpu", "per_device_train_batch_size": 4, "log_every": 1, "checkpoint_every": 3,
    "eval_fraction": 0.3, "tensorboard": False,
}  # fmt: skip


@pytest.fixture
def sft(tmp_path: Path) -> Path:
    """A run of `sft` of six steps, whose checkpoints are at 3 and 6; `tmp_path` is the working folder."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    model, run = saved_llama(tmp_path / "model"), tmp_path / "sft"
    options = as_options({"model": model, "data": str(data), "steps": 6, "out": str(run), **FIELDS, "eval_samples": 0})
    assert main(["train", "sft", *options]) == 0
    return run


@pytest.mark.parametrize("name", ["dpo", "reward_model"])
def test_a_run_is_a_model_to_start_from(name: str, sft: Path, tmp_path: Path) -> None:
    """It stands for its newest checkpoint, which `config.yaml` then names."""
    out = tmp_path / name
    fields = {"model": str(sft), "data": str(tmp_path / "pairs.jsonl"), "steps": 2, "out": str(out), **FIELDS}
    assert main(["train", name, *as_options(fields)]) == 0
    assert load_file(out / "config.yaml")["model"] == str(sft / "checkpoints" / "step-0000000006")
    assert main(["resume", str(out), "--steps", "3"]) == 0


def test_checkpoints_and_saved_folders_are_no_runs(
    sft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = sft / "checkpoints" / "step-0000000006"
    before = sorted(p.name for p in newest.iterdir())
    assert main(["resume", str(newest), "--steps", "9"]) == 2
    assert f"is a checkpoint of the run {sft}; resume that: `rlkit resume {sft}`" in capsys.readouterr().err
    assert sorted(p.name for p in newest.iterdir()) == before
    saved = rlkit.load(sft).save(tmp_path / "saved")
    assert main(["resume", str(saved), "--steps", "9"]) == 2
    assert "saved is a saved folder, not a run" in capsys.readouterr().err
    assert main(["eval", str(saved)]) == 2
    assert "which holds no data: evaluate the run that it was saved from" in capsys.readouterr().err


def test_steps_beyond_a_schedule_that_ended_at_0(sft: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", str(sft), "--steps", "8"]) == 0
    assert "`lr_scheduler_type: linear` ends there at a learning rate of 0" in capsys.readouterr().out
    assert [r["learning_rate"] for r in read_jsonl(sft / "metrics.jsonl")][5:] == [0, 0, 0]
    config = sft / "config.yaml"
    config.write_text(config.read_text().replace("lr_scheduler_type: linear", "lr_scheduler_type: constant"))
    assert main(["resume", str(sft), "--steps", "10", "--allow-changes"]) == 0
    assert [r["learning_rate"] for r in read_jsonl(sft / "metrics.jsonl")][8:] == [1e-3, 1e-3]


def test_changes_that_come_too_late_are_said(sft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.jsonl").write_text(json.dumps(PAIRS[0]) + "\n", encoding="utf-8")
    config = sft / "config.yaml"
    text = config.read_text().replace("pairs.jsonl", "other.jsonl").replace("max_length: auto", "max_length: 64")
    config.write_text(text)
    assert main(["resume", str(sft), "--steps", "7", "--allow-changes"]) == 0
    said = capsys.readouterr().err
    assert "the rows were made when the run began, so a change of `data`, `max_length` has no effect on them" in said


def test_a_reward_that_cannot_be_found_is_said_before_the_reference_is_computed(
    sft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"model": str(sft), "data": str(tmp_path / "pairs.jsonl"), "eval_reward": "absent", "steps": 2, **FIELDS}
    assert main(["train", "dpo", *as_options(fields), "--out", str(tmp_path / "dpo")]) == 2
    said = capsys.readouterr().err
    assert "reward `absent`: expected `module:function` or the folder of a reward model" in said
    assert "reference log-probs" not in said
    assert not (tmp_path / "dpo").exists()


def test_a_merged_adapter_has_a_model_card(sft: Path, tmp_path: Path) -> None:
    trainer: Any = rlkit.SFT(str(sft), train_dataset=str(tmp_path / "pairs.jsonl"), use_peft=True, lora_r=2, **FIELDS)
    merged = trainer.learn(1).save(tmp_path / "merged", merged=True)
    assert "Trained by rlkit `sft`" in (merged / "README.md").read_text(encoding="utf-8")
