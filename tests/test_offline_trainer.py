"""Trainers that learn from recordings: what is read, refused, drawn, saved and compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import close, fingerprint, learn_with_stops, run_rlkit
from stable_baselines3.common.callbacks import EvalCallback

import rlkit
from rlkit import checkpoint
from rlkit.envs import offline
from rlkit.envs.coordination import parity_data, twin_thrust_data
from rlkit.errors import UserError

TINY: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [8]},
    "batch_size": 8,
    "learning_starts": 0,
    "buffer_size": 500,
    "eval_episodes": 1,
    "eval_every": 40,
    "log_every": 20,
    "checkpoint_every": 30,
    "tensorboard": False,
    "device": "cpu",
}
THRUST = "rlkit/TwinThrust-v0"
RECORDED = "rlkit.envs.coordination:twin_thrust_data"


def arsq(data: Any = RECORDED, env: Any = THRUST, **fields: Any) -> Any:
    return rlkit.ARSQ(env, data=data, **{**TINY, **fields})


def parity(**fields: Any) -> Any:
    return arsq(parity_data(2, 100), "rlkit/ParityBandit-v0", **fields)


# --- phases ------------------------------------------------------------------------------------------------------


def test_offline_never_steps_an_environment_and_counts_updates() -> None:
    agent = arsq(offline_steps="all").learn(30)
    assert (agent.clock, agent.updates, len(agent.buffer)) == (30, 30, 0)


def test_offline_first_then_online_on_one_clock() -> None:
    agent = arsq(offline_steps=20, gradient_steps=2).learn(25)
    assert (agent.clock, agent.updates, len(agent.buffer)) == (25, 20 + 2 * 5, 5)
    assert agent.planned_updates() == 0
    agent.target = 35
    assert agent.planned_updates() == 20


def test_planned_updates_are_those_made() -> None:
    for fields, made in (
        ({"offline_steps": "all"}, 60),
        ({"offline_steps": 40}, 60),
        ({"offline_steps": 40, "learning_starts": 50}, 50),
        ({"learning_starts": 10}, 50),
        ({"offline_steps": 100}, 60),
    ):
        agent = arsq(**fields)
        agent.target = 60
        assert agent.planned_updates() == made
        assert agent.learn(60).updates == made


def test_demonstrations_help_before_the_environment_is_known() -> None:
    """With learning_starts 0 the first online step is followed by an update, from data and one own transition."""
    agent = arsq().learn(1)
    assert (agent.updates, len(agent.buffer)) == (1, 1)


def test_callbacks_of_stable_baselines3_run_in_both_phases() -> None:
    evaluation = EvalCallback(gym.make(THRUST), n_eval_episodes=1, eval_freq=10, verbose=0)
    agent = arsq(offline_steps=15, eval_episodes=0).learn(30, callback=evaluation)
    assert agent.clock == 30
    assert evaluation.n_calls == 30
    assert np.isfinite(evaluation.best_mean_reward)


# --- what is drawn -----------------------------------------------------------------------------------------------


def test_recorded_and_own_transitions_are_drawn_alike_and_none_is_lost() -> None:
    """100 recorded and 25 own ones: a fifth of 20,000 draws is own, within five standard errors; own ones fill a ring
    of 25 over and over, the recorded ones stay.
    """
    agent = parity(buffer_size=25, batch_size=8, demo_fraction=0.0).learn(60)
    assert (len(agent.data), len(agent.buffer)) == (100, 25)
    recorded = torch.from_numpy(parity_data(2, 100)["actions"])
    torch.testing.assert_close(agent.data["action"], recorded)
    drawn = agent.experience(20_000, torch.Generator().manual_seed(0))["action"]
    own = ~(drawn[:, None] == recorded).all(-1).any(1)
    assert float(own.float().mean()) == pytest.approx(0.2, abs=5 * (0.2 * 0.8 / 20_000) ** 0.5)


def test_bands_say_what_is_learned_from() -> None:
    """100 episodes of a bandit with reward 0 or 1: the data are the upper 60 percentiles, the demonstrations the best
    half of these.
    """
    rewards = np.sort(parity_data(2, 100)["rewards"])
    agent = parity(data_band=(40, 100), demo_band=(50, 100))
    assert sorted(agent.data["reward"].tolist()) == rewards[40:].tolist()
    assert sorted(agent.data["reward"][agent._rows["demonstrations"]].tolist()) == rewards[70:].tolist()
    told = agent.describe()
    assert "data: 60 transitions of 60 episodes" in told
    assert "demonstrations: 30 transitions of 30 episodes" in told


def test_columns_are_those_of_own_transitions() -> None:
    """Actions of [-2, 2] come as [-1, 1], rewards go through the reward modules, gamma is the discount."""
    n = 10
    rng = np.random.default_rng(0)
    data = {
        "observations": rng.uniform(-1, 1, (n, 3)).astype(np.float32),
        "next_observations": rng.uniform(-1, 1, (n, 3)).astype(np.float32),
        "actions": rng.uniform(-2, 2, (n, 1)).astype(np.float32), "rewards": rng.normal(size=n),
        "terminals": np.zeros(n, bool), "timeouts": np.ones(n, bool),
    }  # fmt: skip
    agent = arsq(data, "Pendulum-v1", reward=["scale=0.1", "clip=-0.05,0.05"], gamma=0.9)
    torch.testing.assert_close(agent.data["action"], torch.from_numpy(data["actions"] / 2))
    expected = torch.from_numpy(np.clip(data["rewards"] * 0.1, -0.05, 0.05)).float()
    torch.testing.assert_close(agent.data["reward"], expected)
    assert agent.data["discount"].tolist() == pytest.approx([0.9] * n)
    assert set(agent.data.fields) == set(agent.buffer.fields)


def two_episodes(first: float, second: float) -> dict[str, Any]:
    """Of the pendulum, three steps each, with these rewards."""
    ends = np.array([False, False, True] * 2)
    return {
        "observations": np.zeros((6, 3), np.float32), "next_observations": np.zeros((6, 3), np.float32),
        "actions": np.zeros((6, 1), np.float32), "rewards": np.repeat([first, second], 3), "terminals": ~ends & ends,
        "timeouts": ends,
    }  # fmt: skip


def test_a_range_of_returns_scales_recorded_and_own_rewards(tmp_path: Path) -> None:
    """Returns of -3 and -9, halved by a module, differ by 3: a range of 30 multiplies by another 10. Own rewards, too,
    and those after a resumption; the statistics of episodes stay in the task's units."""
    fields = {"reward": ["scale=0.5"], "return_range": 30.0, "offline_steps": 0, "out": str(tmp_path / "run")}
    agent = arsq(two_episodes(-1, -3), "Pendulum-v1", **fields)
    torch.testing.assert_close(agent.data["reward"], torch.tensor([-5.0] * 3 + [-15.0] * 3))
    seen: list[tuple[float, float]] = []

    def watch(trainer: Any) -> None:
        own = trainer.buffer.rows(torch.tensor([len(trainer.buffer) - 1]))["reward"]
        seen.append((float(own), float(trainer._last_step[1][0])))

    agent.learn(20, callback=watch)
    loaded = rlkit.load(tmp_path / "run", data=two_episodes(-1, -3)).learn(5, callback=watch)
    close(loaded)
    assert len(seen) == 25
    ours, raw = np.array(seen).T
    np.testing.assert_allclose(ours, 5 * raw, rtol=1e-5)
    with pytest.raises(UserError, match="all 2 recorded returns are -3"):
        arsq(two_episodes(-1, -1), "Pendulum-v1", return_range=1.0)


def test_evaluations_have_a_normalised_score_where_there_is_a_reference(tmp_path: Path) -> None:
    """D4RL's by the environment; what the recording says goes before it, and is saved; elsewhere there is none."""
    data = {
        "observations": np.zeros((4, 11)), "next_observations": np.zeros((4, 11)), "rewards": np.ones(4),
        "actions": np.zeros((4, 3), np.float32), "terminals": np.arange(4) == 3, "timeouts": np.zeros(4, bool),
    }  # fmt: skip
    record = arsq(data, "Hopper-v5").evaluate(1)
    assert record["eval/normalized_score"] == pytest.approx((record["eval/mean_reward"] + 20.272305) / 32.54572305)
    given = replace(offline.read(data), reference=(10.0, 30.0))
    agent = arsq(given, "Hopper-v5", offline_steps="all").learn(2)
    again = rlkit.load(agent.save(tmp_path / "saved"))
    for trainer in (agent, again):
        record = trainer.evaluate(1)
        score = (record["eval/mean_reward"] - 10) * 5
        assert record["eval/normalized_score"] == pytest.approx(score)
        assert f"normalised score {score:.1f}" in trainer.describe_evaluation(record)
        assert trainer.evaluation_json(record)["normalized_score"] == pytest.approx(score)
    assert "eval/normalized_score" not in parity().evaluate(1)


def test_normalisation_starts_with_the_moments_of_the_data() -> None:
    agent = arsq(normalize_obs=True, offline_steps="all")
    obs = twin_thrust_data()["observations"].astype(np.float64)
    np.testing.assert_allclose(agent.normalizer.mean.numpy(), obs.mean(0), atol=1e-9)
    np.testing.assert_allclose(agent.normalizer.var.numpy(), obs.var(0), atol=1e-9)


# --- saving ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"offline_steps": "all"}, {"offline_steps": 50, "normalize_obs": True}])
def test_stops_in_both_phases_change_nothing(fields: dict[str, Any], tmp_path: Path) -> None:
    close(arsq(out=str(tmp_path / "whole"), **fields).learn(100))
    learn_with_stops(arsq(out=str(tmp_path / "parts"), **fields), 100, [7, 45, 51, 90])
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")


def test_checkpoints_hold_a_fingerprint_and_no_copy_of_the_data(tmp_path: Path) -> None:
    agent = arsq(offline_steps="all", out=str(tmp_path / "run")).learn(10)
    newest, _ = checkpoint.newest(tmp_path / "run")
    size = sum(path.stat().st_size for path in newest.iterdir())
    recorded = sum(column.nbytes for column in twin_thrust_data().values())
    assert recorded > 4 * size
    assert agent.state()["state"]["recordings"]["data"]["transitions"] == len(agent.data)
    loaded = rlkit.load(tmp_path / "run", inference=True)
    assert loaded.data is None
    assert loaded.predict(np.zeros(2, np.float32))[0].shape == (3,)


def test_other_data_at_resume_is_refused_unless_allowed(tmp_path: Path) -> None:
    file = tmp_path / "data.npz"
    np.savez(file, **parity_data(2, 100))
    run = tmp_path / "run"
    close(arsq(str(file), "rlkit/ParityBandit-v0", out=str(run)).learn(20))
    np.savez(file, **parity_data(2, 100, seed=1))
    with pytest.raises(UserError, match=r"data.npz is not what this run has learned from so far: 100 transitions"):
        rlkit.resume(run).learn(10)
    assert rlkit.resume(run, allow_changes=True).learn(10).clock == 30
    file.unlink()
    with pytest.raises(UserError, match="no file"):
        rlkit.resume(run).learn(10)
    assert rlkit.load(run, inference=True).evaluate(1)["eval/episodes"] == 1


def test_a_run_finds_its_data_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "data.npz", **parity_data(2, 100))
    monkeypatch.chdir(tmp_path)
    close(arsq("data.npz", "rlkit/ParityBandit-v0", out="run").learn(20))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert rlkit.resume("../run").learn(10).clock == 30


def test_python_data_has_to_be_given_again(tmp_path: Path) -> None:
    data = parity_data(2, 100)
    saved = arsq(data, "rlkit/ParityBandit-v0").learn(10).save(tmp_path / "saved")
    assert "data: <dict>" in (saved / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"this run learned from Python data, <dict>: pass it again, ARSQ.load\(folder"):
        rlkit.load(saved).learn(5)
    assert rlkit.load(saved, data=data).learn(5).clock == 15
    with pytest.raises(UserError, match="is not what this run has learned from"):
        rlkit.load(saved, data=parity_data(2, 100, seed=1)).learn(5)


# --- what is refused ---------------------------------------------------------------------------------------------


def bad(**columns: Any) -> dict[str, Any]:
    return {**parity_data(2, 50), **columns}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": "nowhere.npz"}, "no file `nowhere.npz`"),
        ({"data": "rlkit.envs.coordination:absent"}, "rlkit.envs.coordination:absent: module"),
        ({"data": "no_such_module:f"}, "No module named 'no_such_module'"),
        ({"data": 3}, "data: int is none of"),
        ({"data": {"observations": np.zeros((3, 1))}}, "missing `actions`"),
        ({"data": bad(observations=np.zeros((50, 4), np.float32), next_observations=np.zeros((50, 4)))}, "4 numbers"),
        ({"data": bad(actions=np.zeros((50, 3), np.float32))}, "shape (3,)"),
        ({"data": bad(actions=np.zeros(50, np.int64))}, "whole numbers (discrete)"),
        ({"data": bad(actions=np.full((50, 2), 30, np.float32))}, "they seem to be in other units"),
        ({"data": bad(rewards=np.full(50, np.nan))}, "rewards"),
        ({"demo_band": (99.9, 100)}, "no episode lies in the band 99.9 to 100"),
        ({"demo_band": (60, 40)}, "expected 0 <= low < high <= 100"),
        ({"n_steps": 3}, "`n_steps`: got 3; of recorded transitions there are single steps alone"),
        ({"reward": ["normalize"]}, "`reward`: normalize depends on what was collected before"),
        ({"offline_steps": -1}, "offline_steps"),
    ],
)
def test_bad_data_and_fields_are_refused(given: dict[str, Any], message: str) -> None:
    fields = {"data": parity_data(2, 50), "env": "rlkit/ParityBandit-v0", **given}
    with pytest.raises(UserError) as caught:
        arsq(**fields)
    assert message in str(caught.value)


def test_without_an_environment_the_data_have_to_name_it() -> None:
    with pytest.raises(UserError, match=r"`env`: rlkit\.envs\.coordination:twin_thrust_data does not say which"):
        rlkit.ARSQ(data=RECORDED, **TINY)
    with pytest.raises(UserError, match="`env`: arsq needs an environment"):
        rlkit.ARSQ(**TINY)


def test_the_command_line_reads_data(tmp_path: Path) -> None:
    file = tmp_path / "some data.npz"
    np.savez(file, **parity_data(2, 100))
    run = str(tmp_path / "run")
    options = ["--policy_kwargs.net_arch", "8", "--batch_size", "8", "--eval_episodes", "1", "--out", run]
    done = run_rlkit(
        "train", "arsq", "--env", "rlkit/ParityBandit-v0", "--data", str(file), "--demo_band", "50", "100",
        "--offline_steps", "all", "--steps", "20", *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "demonstrations: 50 transitions of 50 episodes" in done.stdout
    refused = run_rlkit("train", "arsq", "--env", "Pendulum-v1", "--data", str(file), "--out", str(tmp_path / "other"))
    assert refused.returncode == 2
    assert "observations have 1 numbers, those of the environment 3" in refused.stderr
