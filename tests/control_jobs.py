"""What each of several processes does in tests/test_processes_control.py: `control_jobs.py JOB FOLDER`.

Some of it one process does as well, for comparison: `updated(case)`, `stepped()`, `trained()`.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from helpers import NOTHING_DROPPED, StopAt, close, fingerprint

import rlkit
from rlkit import checkpoint
from rlkit.errors import RlkitError, Stopped, UserError
from rlkit.processes import join, launched
from rlkit.rewards.shaping import Normalize

SMALL: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [32, 32]}, "batch_size": 12, "buffer_size": 1200, "learning_starts": 24,
    "device": "cpu", "tensorboard": False,
}  # fmt: skip

CASES: dict[str, dict[str, Any]] = {
    "sac": {},
    "sac, normalised observations": {"normalize_obs": True},
    "redq": {
        "policy_kwargs": {"net_arch": [32, 32], "n_critics": 3}, "target_critics": 2, "actor_critics": "mean",
        "policy_delay": 2,
    },
    "experts": {"trainer": "PMOE", "n_experts": 3, "entropy": "mixture"},
}  # fmt: skip

STEPS = 60  # rows of a normalised reward, in `stepped`


def sac(env: Any = "Pendulum-v1", **fields: Any) -> Any:
    """SAC, or the `trainer` that is named."""
    return getattr(rlkit, fields.pop("trainer", "SAC"))(env, **{**SMALL, **fields})


def weights(agent: Any) -> dict[str, torch.Tensor]:
    """All weights, targets and the temperature included, by name."""
    modules = {name: part for name, part in agent._parts.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value for name, m in modules.items() for key, value in m.state_dict().items()}


def weights_hash(agent: Any) -> str:
    return checkpoint.tensors_hash(weights(agent).items())


def updated(case: str) -> dict[str, Any]:
    """Weights, first moments and means of metrics after six updates on given rows and noise.

    Rows and noise are those of the whole batch, whatever the number of processes: each takes its part.
    """
    agent = sac(**CASES[case])
    group, draw = agent.processes, torch.Generator().manual_seed(0)
    n, critics = agent.config.batch_size, agent.config.policy_kwargs.n_critics
    mine = slice(group.rank * n // group.size, (group.rank + 1) * n // group.size)
    means = []
    for i in range(6):
        batch = {
            "obs": torch.randn(n, 3, generator=draw),
            "action": torch.rand(n, 1, generator=draw) * 2 - 1,
            "reward": torch.randn(n, generator=draw),
            "next_obs": torch.randn(n, 3, generator=draw),
            "terminated": torch.rand(n, generator=draw) < 0.2,
            "discount": torch.full((n,), 0.99),
        }
        noise = {name: torch.randn(n, 1, generator=draw)[mine] for name in ("actor", "next")}
        if hasattr(agent, "experts"):
            noise["actor"] = torch.randn(n, agent.experts, 1, generator=draw)[mine]
            noise |= {name: torch.rand(n, generator=draw)[mine] for name in ("next_expert", "expert")}
        order = torch.randperm(critics, generator=draw)
        if agent.config.target_critics is not None:
            noise["subset"] = order[: agent.config.target_critics]
        part = {name: column[mine] for name, column in batch.items()}
        agent.normalizer.update(group.rows(part["obs"].double(), n))
        delayed = i % agent.config.policy_delay == agent.config.policy_delay - 1
        metrics = agent._step(part, noise, NOTHING_DROPPED, update_actor=delayed, update_target=True)
        means.append(group.mean({name: float(value) for name, value in metrics.items()}))
    optimizers = agent.critic_optimizer, agent.actor_optimizer, agent.temperature_optimizer
    moments = [moment for optimizer in optimizers for moment in optimizer.exp_avg]
    return {
        "weights": {name: value.flatten().tolist() for name, value in weights(agent).items()},
        "moments": torch.cat([moment.flatten() for moment in moments]).tolist(),
        "means": means,
        "hash": weights_hash(agent),
    }


def compute(folder: Path) -> None:
    """Every case; all processes end with the same bits."""
    found = {}
    for case in CASES:
        found[case] = updated(case)
        join("cpu").same("the weights", found[case].pop("hash"))
    stepped_rows, state = stepped()
    found["stepped"] = {"rewards": stepped_rows, "state": state}
    trained(folder)
    if join("cpu").is_main:
        (folder / "computed.json").write_text(json.dumps(found))


def stepped() -> tuple[list[float], dict[str, Any]]:
    """Rewards of four environments scaled by their running variance; a process has its part of them.

    The third one has no row in every fifth step, as if it were being reset.
    """
    group, rng = join("cpu"), np.random.default_rng(0)
    own = 4 // group.size
    module, scaled = Normalize(gamma=0.9, n_envs=own), []
    for step in range(STEPS):
        rewards, ends = rng.normal(size=4), rng.random(4) < 0.1
        taken = np.array([env for env in range(4) if not (env == 2 and step % 5 == 0)])
        mine = taken[taken // own == group.rank]
        values = np.empty(0)
        if len(mine):
            values = module(rewards[mine], ends[mine], np.zeros(len(mine), np.bool_), mine - group.rank * own)
        if group.size > 1:
            module.synchronise(group)
        scaled += [value for part in group.gather(values.tolist()) for value in part]
    state = module.state_dict()
    returns = [value for part in group.gather(state.pop("returns").tolist()) for value in part]
    group.same("the moments", state)
    return scaled, {**state, "returns": returns}


def trained(folder: Path) -> None:
    """A run that counts; what each process saw of it is in `said<rank>.json`."""
    n = 4 // launched()
    agent = sac(n_envs=n, seed=3, normalize_obs=True, train_freq=8, log_every=450, learning_starts=100).learn(900)
    more = sac(n_envs=n, train_freq=3, gradient_steps=-1).learn(50)
    agent.processes.same("the weights", (weights_hash(agent), weights_hash(more)))
    buffer = agent.buffer
    said = {
        "processes": agent.processes.size,
        "clock": [agent.clock, more.clock],
        "updates": [agent.updates, more.updates],
        "capacity": buffer.capacity,
        "rows": {name: buffer[name].tolist() for name in ("obs", "action", "reward")},
        "normalizer": {name: value.tolist() for name, value in agent.normalizer.state_dict().items()},
        "record": {k: v for k, v in agent.log.history[-1].items() if not k.startswith("time/")},
        "evaluation": agent.evaluate(2)["eval/returns"],
        "streams": {name: stream.initial_seed() for name, stream in agent.rng.items()},
    }
    (folder / f"said{agent.processes.rank}.json").write_text(json.dumps(said))


def agree(folder: Path) -> None:
    """The questions that processes ask one another in every step, and errors: of one, and of all at once."""
    group = join("cpu")
    assert (group.size, launched()) == (2, 2)
    assert group.tally(lambda: (group.rank + 1, 5), 2) == [3, 10]
    halves, same = group.average([torch.full((2, 2), float(group.rank)), torch.tensor(3.0)])
    assert halves.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert same.tolist() == 3.0
    assert group.mean({"a": group.rank, "b": 4.0}) == {"a": 0.5, "b": 4.0}
    rows = torch.arange(4.0, dtype=torch.float64).reshape(2, 2)[: 2 - group.rank] + 10 * group.rank
    assert group.rows(rows, 2).tolist() == [[0, 1], [2, 3], [10, 11]]
    group.listen(lambda: group.rank == 1)
    assert group.vote()
    group.tally(lambda: (), 0)
    group.listen(lambda: False)
    assert not group.vote()
    assert group.together(lambda: group.rank) == [0, 1]

    helped: list[str] = []

    def make() -> str:
        with group.joined_by("help", "please"):
            assert group.any(not group.is_main)
        return f"made by {group.from_main(lambda: group.rank)}"

    def help_main(word: str) -> None:
        helped.append(word)
        group.any(True)

    assert group.from_main(make, {"help": help_main}) == "made by 0"
    assert helped == ([] if group.is_main else ["please"])
    said = [
        message(lambda: group.from_main(group.wait)),
        message(lambda: group.together(lambda: fail_in(1, group.rank))),
        message(lambda: group.tally(lambda: (fail_in(1, group.rank),), 1)),
        message(lambda: sac(batch_size=31)),
        message(lambda: sac(buffer_size=1)),
        message(lambda: sac(seed=group.rank).learn(10)),
        message(lambda: sac([lambda: Breaking(gym.make("Pendulum-v1"), group.rank == 1)] * 2).learn(40)),
        message(lambda: sac().learn(40, callback=lambda trainer: fail_in(0, group.rank))),
    ]
    for reward in (float("nan"), 1e23):  # squared, the second one is infinite, and its gradient is not
        agent = sac(out=folder / f"diverged {reward}", eval_episodes=0).learn(60)
        if group.rank == 1:
            agent.buffer["reward"] = torch.full((len(agent.buffer),), reward)
        before = [parameter.detach().clone() for parameter in agent.critic.parameters()]
        said.append(message(lambda agent=agent: agent.learn(60)))
        assert all(map(torch.equal, before, agent.critic.parameters()))
        group.same("the weights", weights_hash(agent))
    stopped = sac(out=folder / "stopped", eval_episodes=0)
    stopped.learn(100, callback=lambda trainer: trainer.clock < 30)
    assert (stopped.clock, stopped.log.history[-1]["step"]) == (30, 30)
    (folder / f"said{group.rank}.json").write_text(json.dumps(said))
    surroundings(folder)


def surroundings(folder: Path) -> None:
    """Callbacks of the main process, environments that are reset at different times, and a disk that refuses what the
    second process writes.
    """
    from stable_baselines3.common.callbacks import CheckpointCallback, StopTrainingOnMaxEpisodes

    group = join("cpu")
    fields = {"eval_every": 20, "eval_episodes": 1, "log_every": 20, "checkpoint_every": 20}
    plain, agent = (sac(out=folder / name, **fields) for name in ("plain", "watched"))
    turns: list[int] = []

    def watch(trainer: Any) -> None:
        turns.append(trainer.evaluate(1)["eval/episodes"])

    plain.learn(60)
    several = [CheckpointCallback(10, str(folder / "zips"), verbose=0), StopTrainingOnMaxEpisodes(1, verbose=0), watch]
    agent.learn(60, callback=several)
    assert turns == ([1] * 30 if group.is_main else [])
    assert weights_hash(agent) == weights_hash(plain)
    saved: Any = rlkit.load(folder / "zips" / "rl_model_40_steps")
    assert (saved.clock, len(saved.buffer)) == (40, 20)

    short = 9 if group.is_main else 23  # steps of an episode; the step after its end is a reset and no transition
    given = gym.vector.SyncVectorEnv([lambda: gym.make("Pendulum-v1", max_episode_steps=short)] * 2)
    uneven = sac(given, n_steps=5, learning_starts=0).learn(200)
    # After 54 vector steps: 2 (54 - 54 // 10) and 2 (54 - 54 // 24).
    assert group.gather(uneven.env.state_dict()["steps"].sum().item()) == [98, 104]
    assert (uneven.clock, uneven.vector_steps) == (202, 54)
    group.same("updates and weights", (uneven.updates, weights_hash(uneven)))

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if group.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # bytes of a file: EFBIG instead of ENOSPC
    try:
        full = sac(out=folder / "full", **fields)
        found = message(lambda: full.learn(30))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    (folder / f"full{group.rank}.json").write_text(json.dumps(found))
    assert not list((folder / "full" / "checkpoints").iterdir())


class Breaking(gym.Wrapper):
    """Raises in its tenth step where told to."""

    def __init__(self, env: gym.Env, breaks: bool) -> None:
        super().__init__(env)
        self.left = 10 if breaks else -1

    def step(self, action: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise ValueError("a broken joint")
        return self.env.step(action)


def fail_in(rank: int, own: int) -> int:
    if own == rank:
        raise UserError("a mistake")
    return 0


def message(action: Any) -> str:
    try:
        action()
    except RlkitError as error:
        return f"{type(error).__name__}, {'of all' if error.shared else 'its own'}: {error}"
    return "no error"


FIELDS: dict[str, dict[str, Any]] = {
    "statistics and sums": {
        "n_envs": 2, "n_steps": 3, "normalize_obs": True, "reward": ("scale=0.1", "normalize"), "train_freq": 2,
        "gradient_steps": 3,
    },
    "dropout and subsets": {
        "policy_kwargs": {"net_arch": [8], "n_critics": 3, "dropout": 0.1, "layer_norm": True}, "target_critics": 2,
        "gradient_steps": -1, "train_freq": 4,
    },
    "worker processes": {"n_envs": 2, "vectorization_mode": "async"},
    "experts": {"trainer": "PMOE", "n_experts": 3, "router_grad": "gumbel"},
}  # fmt: skip


def stop_and_resume(folder: Path) -> None:
    """A run in one go, and one that signals to either process stop, at steps and at any moment."""
    case = (folder / "case").read_text()
    fields = {**FIELDS[case], "eval_every": 150, "eval_episodes": 1, "log_every": 70, "checkpoint_every": 110}
    group = join("cpu")
    close(sac(out=folder / "whole", **fields).learn(480))
    run = folder / "run"
    trainer = sac(out=run, **fields)
    stopped(lambda: trainer.learn(480, callback=StopAt(90)))  # the main process
    close(trainer)
    trainer = rlkit.resume(run)
    if group.rank == 1:
        threading.Thread(target=signal_after, args=(trainer, 200), daemon=True).start()
    stopped(trainer.learn)
    close(trainer)
    close(rlkit.resume(run).learn())
    if group.is_main:
        prints = [fingerprint(folder / name) for name in ("whole", "run")]
        (folder / "prints.json").write_text(json.dumps(prints))


def stopped(learn: Callable[[], Any]) -> None:
    """Learn, to be stopped by a signal."""
    try:
        learn()
        raise AssertionError("the signal did not stop this process")
    except Stopped as error:
        found = (error.code, str(error)[:18])
    assert found == (75, "stopped by SIGTERM")


def signal_after(trainer: Any, step: int) -> None:
    """Send SIGTERM to this process, in the middle of whatever it does, some time after `step`."""
    while trainer.clock < step:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)


def learn(folder: Path) -> None:
    """Pendulum, long enough to be swung up."""
    agent = rlkit.SAC("Pendulum-v1", preset="auto", n_envs=2, gradient_steps=2, out=folder / "run", eval_every=4000)
    agent.learn(16_000)


if __name__ == "__main__":
    jobs = {"compute": compute, "agree": agree, "stop_and_resume": stop_and_resume, "learn": learn}
    jobs[sys.argv[1]](Path(sys.argv[2]))
