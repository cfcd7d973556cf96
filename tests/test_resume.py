"""Stop and resume equals uninterrupted, bit for bit: everything a checkpoint holds, and the metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import StopAt, close, fingerprint, learn_with_stops, tiny

import rlkit
from rlkit import checkpoint
from rlkit.errors import CheckpointError, Stopped, UserError

SMALL: dict[str, Any] = {"eval_every": 1000, "eval_episodes": 0, "log_every": 50, "checkpoint_every": 70}


def random_stops(seed: int, steps: int, count: int) -> list[int]:
    return sorted(int(s) for s in np.random.default_rng(seed).choice(np.arange(1, steps), count, replace=False))


SETTINGS: dict[str, dict[str, Any]] = {
    "hopper, short episodes": {"env": "Hopper-v5"},
    "ant, contact forces in the observation": {"env": "Ant-v5"},
    "humanoid": {"env": "Humanoid-v5", "steps": 60},
    "reacher, three environments": {"env": "Reacher-v5", "n_envs": 3},
    "four pendulums, n-step, all reward modules": {
        "env": "Pendulum-v1", "n_envs": 4, "n_steps": 3, "reward": ("scale=0.1", "normalize", "clip=5"),
        "gradient_steps": -1, "train_freq": 2, "normalize_obs": True, "steps": 1200,
    },
    "two worker processes": {"env": "Pendulum-v1", "n_envs": 2, "vectorization_mode": "async", "steps": 420},
    "droq: dropout masks": {"preset": "droq", "env": "Pendulum-v1", "gradient_steps": 2, "policy_delay": 2},
    "redq: random subsets": {
        "preset": "redq", "env": "Pendulum-v1", "gradient_steps": 2,
        "policy_kwargs": {"net_arch": [8], "n_critics": 4},
    },
    "linear schedule": {"env": "Pendulum-v1", "learning_rate_schedule": "linear"},
    "bf16": {"env": "Pendulum-v1", "precision": "bf16"},
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_sac_resumes_exactly(setting: str, tmp_path: Path) -> None:
    """Three stops at random points, in the middle of episodes and of owed updates."""
    fields = {**SMALL, **SETTINGS[setting]}
    steps = fields.pop("steps", 260)
    close(tiny("sac", out=str(tmp_path / "whole"), **fields).learn(steps))
    stops = random_stops(len(setting), steps, 3)
    learn_with_stops(tiny("sac", out=str(tmp_path / "parts"), **fields), steps, stops)
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("env", ["Hopper-v5", "Ant-v5", "Humanoid-v5", "Reacher-v5", "HalfCheetah-v5"])
def test_sac_resumes_exactly_at_many_points(env: str, seed: int, tmp_path: Path) -> None:
    fields = {**SMALL, "env": env, "n_envs": 1 + seed % 3, "seed": seed}
    close(tiny("sac", out=str(tmp_path / "whole"), **fields).learn(300))
    learn_with_stops(tiny("sac", out=str(tmp_path / "parts"), **fields), 300, random_stops(seed, 300, 4))
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")


def test_a_signal_during_evaluation_is_obeyed_and_the_evaluation_done_at_resume(tmp_path: Path) -> None:
    """The evaluation's environment raises the signal in its third step; the records end up as in a run without it."""
    import gymnasium as gym

    from rlkit.signals import stop

    close(tiny("sac", out=str(tmp_path / "whole")).learn(50))
    agent = tiny("sac", out=str(tmp_path / "parts"))

    class Interrupting(gym.Wrapper):
        count = 0

        def step(self, action: Any) -> Any:
            Interrupting.count += 1
            if Interrupting.count == 3:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGINT)
            return self.env.step(action)

    agent._eval_env = lambda: Interrupting(gym.make("Pendulum-v1"))
    with pytest.raises(Stopped) as stopped:
        agent.learn(50)
    assert "SIGINT" in str(stopped.value)
    assert not stop.requested or stop._depth == 0
    assert Interrupting.count < 10
    close(agent)
    close(rlkit.resume(tmp_path / "parts").learn())
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")


@pytest.mark.parametrize("gradient_steps", [1, 5, -1])
def test_the_last_evaluation_is_of_the_final_policy(gradient_steps: int, tmp_path: Path) -> None:
    """Evaluations wait for the updates owed: the last record is what the saved agent gets on the same episodes."""
    from rlkit.metrics import read_jsonl

    agent = tiny("sac", out=str(tmp_path / "run"), gradient_steps=gradient_steps).learn(80)
    last = read_jsonl(tmp_path / "run" / "eval.jsonl")[-1]
    assert last["step"] == 80
    assert rlkit.load(tmp_path / "run", inference=True).evaluate(1)["eval/returns"] == last["eval/returns"]
    assert agent.evaluate(1)["eval/returns"] == last["eval/returns"]
    close(agent)


def test_predicting_imports_no_reward_of_the_folder(tmp_path: Path) -> None:
    """A folder may name any module as its reward; it is imported to go on learning, not to load and predict."""
    folder = tiny("sac").learn(20).save(tmp_path / "agent")
    config = folder / "config.yaml"
    parts, about = checkpoint.load(folder)
    parts["config.yaml"] = config.read_text().replace("reward: []", "reward: ['antigravity_of_a_stranger:fly']")
    checkpoint.save(folder, parts, about=about)
    loaded = rlkit.load(folder)
    assert loaded.predict(np.zeros(3, np.float32))[0].shape == (1,)
    with pytest.raises(UserError, match="antigravity_of_a_stranger"):
        loaded.learn(1)


def test_a_run_without_checkpoint_starts_afresh_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    close(tiny("sac", out=str(tmp_path / "whole")).learn(50))
    agent = tiny("sac", out=str(tmp_path / "parts"))
    with pytest.raises(Stopped):
        agent.learn(50, callback=StopAt(20))
    close(agent)
    shutil.rmtree(tmp_path / "parts" / "checkpoints")
    resumed = rlkit.resume(tmp_path / "parts")
    assert "starting afresh" in capsys.readouterr().err
    close(resumed.learn())
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")


def test_going_on_to_a_larger_total(tmp_path: Path) -> None:
    """The records of 60 steps followed by 60 more are those of 120, apart from the extra end at 60."""
    close(tiny("sac", out=str(tmp_path / "whole")).learn(120))
    close(tiny("sac", out=str(tmp_path / "parts")).learn(60))
    agent = rlkit.resume(tmp_path / "parts")
    agent.target = 120
    agent.learn()
    whole = rlkit.load(tmp_path / "whole")
    for a, b in zip(agent.actor.parameters(), whole.actor.parameters(), strict=True):
        assert torch.equal(a, b)
    assert agent.horizon == 60
    close(agent)


def test_damaged_checkpoints_are_passed_over_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Truncation and flipped bits: the older checkpoint is used, the newer one named, and the end is the same."""
    close(tiny("sac", out=str(tmp_path / "whole")).learn(100))
    run = tmp_path / "run"
    close(tiny("sac", out=str(run)).learn(100))
    newest, _ = checkpoint.newest(run)
    victim = newest / "policy.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    resumed = rlkit.resume(run)
    said = capsys.readouterr().err
    assert newest.name in said
    assert "policy.safetensors" in said
    assert resumed.clock < 100
    close(resumed.learn())
    assert fingerprint(run) == fingerprint(tmp_path / "whole")
    for folder in (run / "checkpoints").iterdir():
        (folder / "state.json").write_bytes((folder / "state.json").read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"state\.json"):
        rlkit.resume(run)


def test_edited_configuration_is_refused_with_a_table(tmp_path: Path) -> None:
    run = tmp_path / "run"
    close(tiny("sac", out=str(run)).learn(40))
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("gamma: 0.99", "gamma: 0.9").replace("seed: 0", "seed: 5"))
    with pytest.raises(UserError, match=r"(?s)seed +0 -> 5.*gamma +0\.99 -> 0\.9|gamma +0\.99 -> 0\.9.*seed +0 -> 5"):
        rlkit.resume(run)
    changed = rlkit.resume(run, allow_changes=True)
    assert changed.config.gamma == 0.9
    close(changed)


def test_nothing_is_unpickled_on_the_way_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resuming, saving, loading and evaluating with every unpickler of Python, NumPy and PyTorch broken."""
    import _pickle
    import pickle  # noqa: TID251

    run = tmp_path / "run"
    close(tiny("sac", out=str(run)).learn(40))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a pickle was read")

    for module, names in (
        (pickle, ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads")),
        (_pickle, ("load", "loads", "Unpickler")),
        (torch, ("load",)),
        (np, ("load",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    agent = rlkit.resume(run)
    agent.target = 60
    agent.learn()
    close(agent)
    loaded = rlkit.load(agent.save(tmp_path / "saved"), inference=True)
    assert loaded.evaluate(1) is not None


def test_environment_objects_have_to_be_given_again(tmp_path: Path) -> None:
    """A run on Python objects: predicts without them, says what is missing, and goes on exactly with them."""
    import gymnasium as gym

    thunks = [lambda: gym.make("Pendulum-v1") for _ in range(2)]
    tiny_fields = {"policy_kwargs": {"net_arch": [8]}, "batch_size": 8, "buffer_size": 100, "learning_starts": 10}
    agent = rlkit.SAC(thunks, n_steps=3, reward=["normalize"], **tiny_fields).learn(30)
    assert agent.config.n_envs == 2
    folder = agent.save(tmp_path / "agent")
    alone = rlkit.load(folder)
    assert alone.predict(np.zeros(3, np.float32))[0].shape == (1,)
    with pytest.raises(UserError, match=r"pass it again, SAC\.load\(folder, env="):
        alone.learn(10)
    again = rlkit.SAC.load(folder, env=thunks)
    agent.learn(20)
    again.learn(20)
    for a, b in zip(agent.critic.parameters(), again.critic.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_environment_that_cannot_be_restored_is_reset_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import gymnasium as gym

    venv = gym.make_vec("Pendulum-v1", num_envs=2)
    fields = {"policy_kwargs": {"net_arch": [8]}, "batch_size": 8, "buffer_size": 100, "learning_starts": 10}
    folder = rlkit.SAC(venv, n_steps=5, **fields).learn(30).save(tmp_path / "agent")
    agent = rlkit.SAC.load(folder, env=gym.make_vec("Pendulum-v1", num_envs=2)).learn(2)
    assert "reset" in capsys.readouterr().err
    assert [len(rows) for rows in agent.n_step._waiting] == [1, 1], "no sum spans the reset"


def test_other_spaces_at_load_are_refused(tmp_path: Path) -> None:
    folder = tiny("sac").learn(20).save(tmp_path / "agent")
    import gymnasium as gym

    with pytest.raises(UserError, match="spaces"):
        rlkit.SAC.load(folder, env=[lambda: gym.make("MountainCarContinuous-v0")]).learn(10)


def test_divergence_stops_before_harm_and_keeps_the_batch(tmp_path: Path) -> None:
    """An infinite reward in the buffer makes the critic's loss infinite: no weight moves, the batch is on disk."""
    from rlkit.errors import DivergenceError

    run = tmp_path / "run"
    agent = tiny("sac", out=str(run), eval_episodes=0)

    def poison(trainer: Any) -> None:
        if trainer.clock == 40:
            trainer.buffer["reward"] = torch.full((len(trainer.buffer),), float("inf"))
            trainer.before = [p.detach().clone() for p in trainer.critic.parameters()]

    with pytest.raises(DivergenceError, match=r"critic.*update.*step 40.*diverged-step"):
        agent.learn(100, callback=poison)
    for old, new in zip(agent.before, agent.critic.parameters(), strict=True):
        assert torch.equal(old, new)
    (dump,) = run.glob("diverged-*")
    parts, _ = checkpoint.load(dump)
    assert torch.isinf(parts["batch"]["reward"]).all()
    newest, _ = checkpoint.newest(run)
    assert newest.name == "step-0000000030"
    close(agent)
