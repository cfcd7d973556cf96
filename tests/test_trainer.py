"""The loop with a trainer that has no environment: epochs over a fixed dataset, counted in updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import StopAt, fingerprint
from torch import Tensor

import rlkit
from rlkit import checkpoint, registry
from rlkit.buffer import Field, RolloutBuffer
from rlkit.config import Count, Positive, RunConfig
from rlkit.errors import DivergenceError, RlkitError, Stopped, UserError
from rlkit.nets import MLP
from rlkit.optim import Adam, descend
from rlkit.trainer import Batch, Trainer


@dataclass(frozen=True, kw_only=True)
class RegressionConfig(RunConfig):
    """Least squares."""

    learning_rate: Positive = 1e-2
    """Step size."""
    batch_size: Count = 8
    """Rows of an update."""


class Regression(Trainer):
    """y = 2 x - 1 from 64 rows; `collect` starts an epoch and owes its mini-batches, as offline trainers do."""

    Config = RegressionConfig
    config: RegressionConfig
    name = "regression"
    counts = "updates"
    buffer: RolloutBuffer
    net: MLP
    optimizer: Adam

    def build(self) -> None:
        self.track(net=MLP([1, 1]), buffer=RolloutBuffer(None, {"x": Field((1,)), "y": Field((1,))}, self.device))
        self.track(optimizer=Adam(self.net.parameters(), self.config.learning_rate))
        x = torch.rand(64, 1, generator=self.rng["data"]) * 2 - 1
        self.buffer.add({"x": x, "y": 2 * x - 1})

    @property
    def batches(self) -> int:
        return len(self.buffer) // self.config.batch_size

    def collect(self) -> int:
        self.owed += self.batches
        return 0

    def batch(self) -> Batch:
        epoch, index = divmod(self.updates, self.batches)
        order = self.buffer.order(self.config.seed, epoch)
        return self.buffer.rows(order[index * self.config.batch_size :][: self.config.batch_size])

    def update(self, batch: Batch) -> Mapping[str, Tensor]:
        loss = (self.net(batch["x"]) - batch["y"]).square().mean()
        return {"loss": loss.detach(), "grad_norm": descend(self.optimizer, loss)}


def make(**fields: Any) -> Regression:
    defaults = {"log_every": 10, "checkpoint_every": 25, "tensorboard": False}
    return Regression(Regression.make_config({**defaults, **fields}))


@pytest.fixture(autouse=True)
def registered() -> Any:
    registry.register(Regression)
    yield
    registry._registered.pop("regression", None)


def test_learns_the_line_and_counts_updates() -> None:
    agent = make(learning_rate=0.03).learn(600)
    assert (agent.clock, agent.updates) == (600, 600)
    (layer,) = agent.net.layers
    assert float(layer.weight.detach()) == pytest.approx(2, abs=0.01)
    assert float(layer.bias.detach()) == pytest.approx(-1, abs=0.01)


def test_records_are_in_memory_without_a_folder() -> None:
    agent = make(log_every=64).learn(192)  # eight epochs a record
    assert agent.log is not None
    assert [record["step"] for record in agent.log.history] == [64, 128, 192]
    losses = [record["loss"] for record in agent.log.history]
    assert losses == sorted(losses, reverse=True)


def test_every_epoch_has_every_row_once() -> None:
    agent = make(batch_size=16)
    seen: list[list[float]] = []
    update = agent.update
    agent.update = lambda batch: seen.append(batch["x"].squeeze(1).tolist()) or update(batch)  # type: ignore[func-returns-value]
    agent.learn(8)
    rows = sorted(agent.buffer["x"].squeeze(1).tolist())
    first, second = (sorted(x for batch in seen[e * 4 : e * 4 + 4] for x in batch) for e in range(2))
    assert first == rows == second
    assert seen[:4] != seen[4:], "each epoch has an order of its own"


def test_resumes_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """64 rows in batches of 8: update 43 is the fourth of its epoch, with five more owed."""
    make(out=str(tmp_path / "whole")).learn(100)
    agent = make(out=str(tmp_path / "parts"))
    counted = agent.update

    def update(batch: Batch) -> Mapping[str, Tensor]:
        if agent.updates == 42:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)
        return counted(batch)

    agent.update = update  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        agent.learn(100)
    assert agent.clock == 43
    resumed = rlkit.resume(tmp_path / "parts")
    assert resumed.owed == 5
    resumed.learn()
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")


def test_a_full_disk_loses_a_periodic_checkpoint_but_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ENOSPC at a periodic save warns and goes on; at the last one it is an error, and the older one is intact."""
    agent = make(out=str(tmp_path / "run"))
    save, full = checkpoint.save, [50]

    def failing(folder: Path, *args: Any, **kwargs: Any) -> Path:
        if int(folder.name.removeprefix("step-")) in full:
            raise OSError(28, "No space left on device")
        return save(folder, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", failing)
    agent.learn(60)
    assert "step 50" in capsys.readouterr().err
    assert checkpoint.newest(tmp_path / "run")[0].name == "step-0000000060"
    full.append(70)
    agent.target = 70
    with pytest.raises(RlkitError, match=r"last checkpoint.*No space left"):
        agent.learn()
    assert checkpoint.newest(tmp_path / "run")[0].name == "step-0000000060"


def test_a_nan_row_stops_the_run_and_the_weights_stay() -> None:
    agent = make().learn(5)
    before = [p.detach().clone() for p in agent.net.parameters()]
    agent.buffer["y"] = torch.full((64, 1), float("nan"))
    with pytest.raises(DivergenceError, match=r"loss is nan at update 6 \(step 5\)"):
        agent.learn(5)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.net.parameters(), strict=True))


def test_records_and_checkpoints_come_at_multiples(tmp_path: Path) -> None:
    from rlkit.metrics import read_jsonl

    make(out=str(tmp_path / "run"), keep_checkpoints=10).learn(60)
    assert [r["step"] for r in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [10, 20, 30, 40, 50, 60]
    steps = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps == [f"step-{s:010d}" for s in (25, 50, 60)]


def test_old_checkpoints_are_pruned(tmp_path: Path) -> None:
    make(out=str(tmp_path / "run"), keep_checkpoints=2, checkpoint_every=10).learn(55)
    steps = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert steps == ["step-0000000050", "step-0000000055"]


def test_a_callback_can_end_a_run() -> None:
    calls: list[int] = []

    def callback(trainer: Trainer) -> bool:
        calls.append(trainer.updates)
        return len(calls) < 3

    agent = make().learn(1000, callback=callback)
    assert calls == [1, 2, 3], "it is called whenever the clock has advanced: here, after each update"
    assert agent.updates == 3
    with pytest.raises(UserError, match="callback"):
        agent.learn(1, callback="no function")  # type: ignore[arg-type]


@pytest.mark.parametrize("total", [0, -5, 1.5, "100", float("nan"), float("inf"), None])
def test_wrong_totals(total: Any) -> None:
    with pytest.raises(UserError, match="total_timesteps"):
        make().learn(total)


def test_signals_are_ignored_outside_the_main_thread() -> None:
    """Learning in a thread works; Python allows no handlers there, so none are installed."""
    import threading

    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(make().learn(20).clock))
    thread.start()
    thread.join(60)
    assert done == [20]


def test_stop_without_a_folder_says_that_nothing_was_saved() -> None:
    with pytest.raises(Stopped, match="nothing saved") as stopped:
        make().learn(1000, callback=StopAt(0))
    assert stopped.value.code == 75
