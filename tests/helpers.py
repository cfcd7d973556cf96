"""What several test files need: tiny settings of any trainer, and runs compared bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlkit import checkpoint, registry
from rlkit.errors import Stopped
from rlkit.metrics import read_jsonl
from rlkit.trainer import Trainer

TINY: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [8, 8]},
    "batch_size": 8,
    "buffer_size": 300,
    "learning_starts": 10,
    "eval_episodes": 1,
    "eval_every": 40,
    "log_every": 15,
    "checkpoint_every": 30,
    "tensorboard": False,
}
"""Fields for runs of a second of control trainers; those that one does not have are left out."""

NOTHING_DROPPED: dict[str, list[Any]] = {"target": [], "critic": [], "actor": []}
"""Masks of an update of `SAC` without dropout."""

TINY_LANGUAGE: dict[str, Any] = {
    "letters": {
        "supervised_steps": 20,
        "n_demonstrations": 64,
        "n_prompts": 16,
        "n_eval_prompts": 6,
        "n_answers": 3,
    },
    "per_device_train_batch_size": 4,
    "eval_samples": 2,
}
"""The same, besides, for trainers of language models."""


def tiny_fields(name: str, **fields: Any) -> dict[str, Any]:
    """The embedded task of the trainer `name` with tiny settings."""
    cls = registry.get(name)
    known = {field.name for field in dataclasses.fields(cls.Config)}
    task = {k: v for k, v in cls.default_task.items() if k != "steps"}
    values = {**task, "preset": None, **TINY, **TINY_LANGUAGE}
    if "n_epochs" in known:  # of rollouts
        values |= {"n_steps": 12, "n_epochs": 2, "n_envs": 1, "policy_kwargs": {"net_arch": [8, 8]}}
    if getattr(cls, "task_type", None) == "SEQ_CLS":
        del values["eval_samples"]  # a classifier samples nothing, and refuses to be asked
    return {k: v for k, v in {**values, **fields}.items() if k in known}


def tiny(name: str, **fields: Any) -> Trainer:
    """The trainer `name` on its embedded task with tiny settings."""
    cls = registry.get(name)
    return cls(config=cls.make_config(tiny_fields(name, **fields)))


def as_options(fields: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Fields as options of the command line."""
    options: list[str] = []
    for name, value in fields.items():
        if name.endswith("env_kwargs"):
            options += [f"--{name}", *(f"{key}={item}" for key, item in value.items())]
        elif isinstance(value, Mapping):
            options += as_options(value, f"{prefix}{name}.")
        elif value is not None:
            texts = [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]
            options += [f"--{prefix}{name}", *texts]
    return options


class StopAt:
    """A callback that sends SIGTERM to this process once the clock has reached `step`."""

    def __init__(self, step: int) -> None:
        self.step, self.sent = step, False

    def __call__(self, trainer: Trainer) -> None:
        if trainer.clock >= self.step and not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)


def learn_with_stops(trainer: Trainer, steps: int, stops: list[int]) -> Trainer:
    """Learn in a run folder, stopped by a signal at each of `stops` and resumed from the folder alone."""
    from rlkit import resume

    folder = trainer.folder
    assert folder is not None
    total: int | None = steps
    for stop in stops:
        try:
            trainer.learn(total, callback=StopAt(stop))
        except Stopped as error:
            assert error.code == 75  # noqa: PT017 (the test goes on after it)
        else:
            raise AssertionError(f"the signal at step {stop} did not stop the run")
        close(trainer)
        trainer, total = resume(folder), None
    trainer.learn(total)
    close(trainer)
    return trainer


def close(trainer: Any) -> None:
    if hasattr(trainer, "close"):
        trainer.close()


def without_time(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without the wall clock's keys, the only ones that may differ between equal runs."""
    return [{k: v for k, v in record.items() if not k.startswith("time/")} for record in records]


def fingerprint(run: Path) -> dict[str, Any]:
    """All that a run left behind that has to be equal: the last checkpoint's hash, metrics, evaluations."""
    newest, messages = checkpoint.newest(run)
    assert messages == []
    return {
        "checkpoint": newest.name,
        "hash": checkpoint.content_hash(newest),
        "metrics": repr(without_time(read_jsonl(run / "metrics.jsonl"))),  # repr: NaN equals itself
        "evaluations": repr(without_time(read_jsonl(run / "eval.jsonl"))),
    }


def rlkit_command(*args: str) -> list[str]:
    return [sys.executable, "-m", "rlkit", *args]


def run_rlkit(*args: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: float = 300) -> Any:
    """`rlkit ARGS` as a process; its exit code and output."""
    return subprocess.run(
        rlkit_command(*args), capture_output=True, text=True, timeout=timeout, check=False, cwd=cwd,
        env={**os.environ, **(env or {})},
    )  # fmt: skip


def torchrun(n: int, *args: str) -> list[str]:
    """The command `torchrun` for `n` processes on this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), *args]


def finish(command: list[str], env: Mapping[str, str] | None = None) -> str:
    """Run `command`, each of its processes on one thread, to its good end; -> what it said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    """Poll until `condition()`.

    Raises:
        AssertionError: it did not come true in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("condition did not come true")
        time.sleep(0.02)


class PlainUpdate:
    """Copies of an agent's networks and of its optimisers' state, to make its next update with PyTorch's own Adam.

    Args:
        agent: a control trainer with an optimiser `NAME_optimizer` for each of `trained`, at a constant learning rate.
        trained: names of networks.
        others: names of networks without an optimiser, such as targets.
    """

    def __init__(self, agent: Any, trained: Sequence[str], others: Sequence[str]) -> None:
        self.agent = agent
        self.nets = {name: copy.deepcopy(getattr(agent, name)) for name in (*trained, *others)}
        self.steps = {}
        for name in trained:
            mine = getattr(agent, f"{name}_optimizer")
            theirs = torch.optim.Adam(self.nets[name].parameters(), lr=agent.config.learning_rate)
            for parameter, m, v in zip(self.nets[name].parameters(), mine.exp_avg, mine.exp_avg_sq, strict=True):
                step = mine.step[0].float().clone()
                theirs.state[parameter] = {"step": step, "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
            self.steps[name] = theirs

    def take(self, name: str, loss: torch.Tensor) -> None:
        """One step of the network `name`."""
        self.steps[name].zero_grad()
        loss.backward()
        self.steps[name].step()

    def average(self, target: str, source: str, tau: float) -> None:
        for t, s in zip(self.nets[target].parameters(), self.nets[source].parameters(), strict=True):
            t.data = (1 - tau) * t.data + tau * s.data

    def compare(self) -> None:
        """All parameters are those of the agent, which has made its update."""
        for key, net in self.nets.items():
            for (label, mine), theirs in zip(
                getattr(self.agent, key).named_parameters(), net.parameters(), strict=True
            ):
                torch.testing.assert_close(
                    mine, theirs, atol=2e-5, rtol=1e-4, msg=lambda m, k=key, n=label: f"{k}.{n}: {m}"
                )
