"""Compiled updates: the numbers of eager ones, exact resumption, and what happens where a compiler fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rlkit
from rlkit import checkpoint
from rlkit.compilation import PAYS, Compilable, worthwhile

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY: dict[str, Any] = {
    "seed": 3, "policy_kwargs": {"net_arch": [16, 16]}, "batch_size": 32, "learning_starts": 40, "eval_episodes": 0,
    "device": "cpu",
}  # fmt: skip


def test_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkit.compilation.shutil.which", lambda name: f"/usr/bin/{name}")
    assert [worthwhile("auto", CPU, n) for n in (PAYS - 1, PAYS)] == [False, True]
    assert worthwhile("auto", CUDA, 1)
    assert worthwhile("on", CPU, 1)
    assert not worthwhile("off", CUDA, 1e9)
    monkeypatch.setattr("rlkit.compilation.shutil.which", lambda name: None)
    assert not worthwhile("auto", CPU, PAYS)


@pytest.mark.parametrize(
    ("fields", "steps", "updates"),
    [
        ({}, 1_040, 1_000),
        ({"train_freq": 4, "gradient_steps": 2}, 1_040, 500),
        ({"n_envs": 2, "gradient_steps": -1}, 1_040, 1_000),
        ({"n_envs": 2}, 1_040, 500),
    ],
)
def test_how_many_updates_a_budget_means(fields: dict[str, Any], steps: int, updates: int) -> None:
    agent = rlkit.SAC("Pendulum-v1", **TINY, **fields)
    agent.target = steps
    assert agent.planned_updates() == updates


def test_the_decision_is_made_once_and_outlives_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkit.trainer.worthwhile", lambda mode, device, updates: updates > 100)
    agent = rlkit.SAC("Pendulum-v1", **TINY)
    assert agent.compiled is None
    agent.learn(60)
    assert agent.compiled is False
    agent.learn(200)  # would be worth it alone
    assert agent.compiled is False
    folder = agent.save(tmp_path / "agent")
    assert rlkit.load(folder).compiled is False
    monkeypatch.setattr("rlkit.trainer.worthwhile", lambda mode, device, updates: mode == "on")
    other = rlkit.load(folder, compile="on", allow_changes=True)
    other._decide_compilation()
    assert other.compiled is True


def test_a_failing_compiler_means_one_line_and_an_eager_run(tmp_path: Path) -> None:
    """In a process of its own, because PyTorch looks for a compiler once."""
    script = "import rlkit; rlkit.SAC('Pendulum-v1', compile='on', batch_size=8, device='cpu').learn(110)"
    nowhere = {**os.environ, "CXX": "/no/such/compiler", "RLKIT_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=nowhere, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if "running eagerly" in line]
    assert len(lines) == 1
    assert lines[0].startswith("compile failed, running eagerly: ")
    assert "No working C++ compiler" in lines[0]


def test_errors_of_the_function_pass_through(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> None:
        raise ValueError("wrong")

    update = Compilable(wrong, [])
    with pytest.raises(ValueError, match="wrong"):
        update()
    update.compiled = True
    with pytest.raises(ValueError, match="wrong"):
        update()


@pytest.mark.usefixtures("any_compiler")
@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_compiled_run_is_the_eager_one_up_to_rounding_and_resumes_bit_for_bit(
    precision: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fields = {**TINY, "precision": precision, "policy_delay": 2, "learning_rate_schedule": "linear"}
    net = {"n_critics": 3, "layer_norm": True, "dropout": 0.1}  # all that noise and networks can have
    fields |= {"target_critics": 2, "policy_kwargs": {**TINY["policy_kwargs"], **net}}
    eager = rlkit.SAC("Pendulum-v1", compile="off", **fields).learn(100)
    agent = rlkit.SAC("Pendulum-v1", compile="on", **fields).learn(100)
    assert agent.compiled
    said = capfd.readouterr().err
    assert said.count("compiled `step` in") == 2  # with and without the actor's part
    assert said.count("compiled `sample` in") == 1
    assert agent.compile_seconds > 0
    rounding = 1e-4 if precision == "float32" else 2e-2
    for name in ("actor", "critic", "critic_target", "log_alpha"):
        for a, b in zip(getattr(agent, name).parameters(), getattr(eager, name).parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=rounding, atol=rounding)

    other = rlkit.load(agent.save(tmp_path / "half"), env="Pendulum-v1", allow_changes=True)
    assert other.compiled
    folders = [trainer.learn(40).save(tmp_path / str(i)) for i, trainer in enumerate((agent, other))]
    assert "compile failed" not in capfd.readouterr().err
    assert checkpoint.content_hash(folders[0]) == checkpoint.content_hash(folders[1])


@pytest.mark.usefixtures("any_compiler")
def test_a_compiled_update_takes_no_step_on_a_non_finite_gradient() -> None:
    agent = rlkit.SAC("Pendulum-v1", compile="on", **TINY, n_steps=1).learn(50)
    before = {name: value.clone() for name, value in agent.critic.state_dict().items()}
    moments = [m.clone() for m in agent.critic_optimizer.exp_avg]
    batch = agent.batch()
    batch["reward"][3] = float("nan")
    metrics = agent.update(batch)
    assert metrics["train/critic_grad_norm"].isnan()
    assert all(value.equal(before[name]) for name, value in agent.critic.state_dict().items())
    assert all(a.equal(b) for a, b in zip(moments, agent.critic_optimizer.exp_avg, strict=True))
    assert float(agent.critic_optimizer.step) == 10
