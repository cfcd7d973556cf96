"""Stable-Baselines3's own callback classes in `learn(callback=...)`, unchanged."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import tiny
from stable_baselines3 import SAC as SB3SAC
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

import rlkit
from rlkit.errors import UserError
from rlkit.metrics import read_jsonl

TINY: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [8]}, "batch_size": 16, "buffer_size": 1000, "learning_starts": 20, "device": "cpu",
}  # fmt: skip


def sac(env: Any = "Pendulum-v1", **fields: Any) -> Any:
    return rlkit.SAC(env, **{**TINY, **fields})


class Spy(BaseCallback):
    """Notes every call, and what it could see."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.events: list[str] = []
        self.seen: list[dict[str, Any]] = []
        self.stop_at = stop_at

    def _init_callback(self) -> None:
        self.events.append("init")

    def _on_training_start(self) -> None:
        self.events.append("start")

    def _on_rollout_start(self) -> None:
        self.events.append("rollout")

    def _on_step(self) -> bool:
        self.events.append("step")
        self.seen.append({k: self.locals[k] for k in ("actions", "new_obs", "rewards", "dones", "infos", "self")})
        return self.stop_at is None or self.num_timesteps < self.stop_at

    def _on_rollout_end(self) -> None:
        self.events.append("updates")

    def _on_training_end(self) -> None:
        self.events.append("end")


@pytest.mark.parametrize("train_freq", [1, 4])
def test_the_order_of_calls_is_that_of_stable_baselines3(train_freq: int) -> None:
    """The same class in both libraries, event by event, from the first update on."""
    ours, theirs = Spy(), Spy()
    sac(train_freq=train_freq, learning_starts=4).learn(32, callback=ours)
    options: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "batch_size": 16, "buffer_size": 1000}
    SB3SAC("MlpPolicy", "Pendulum-v1", train_freq=train_freq, learning_starts=4, **options).learn(32, callback=theirs)
    assert ours.events[:3] == theirs.events[:3] == ["init", "start", "rollout"]
    assert ours.events.count("step") == theirs.events.count("step") == 32
    assert ours.events[-1] == theirs.events[-1] == "end"
    tail = ours.events[-12:]
    assert tail == theirs.events[-12:]


def test_what_a_callback_sees_of_a_step() -> None:
    """The transitions are the environment's: the last observation, the raw reward, an episode's end and sum."""
    spy = Spy()
    trainer = sac(n_envs=2, reward=("scale=0.5",))
    trainer.learn(2 * 201, callback=spy)
    assert len(spy.seen) == 201
    space = trainer.action_space
    total = np.zeros(2)
    for step in spy.seen[:200]:
        assert step["self"] is trainer
        assert step["actions"].shape == (2, 1)
        assert (step["actions"] >= space.low).all()
        assert (step["actions"] <= space.high).all()
        assert step["new_obs"].shape == (2, 3)
        total += step["rewards"]
    assert [step["dones"].tolist() for step in spy.seen[198:]] == [[False] * 2, [True] * 2, [False] * 2]
    for i, info in enumerate(spy.seen[199]["infos"]):
        assert info["episode"]["l"] == 200
        assert info["episode"]["r"] == pytest.approx(total[i], rel=1e-5)
        assert info["TimeLimit.truncated"] is True
        assert info["terminal_observation"].shape == (3,)
        assert not np.array_equal(info["terminal_observation"], spy.seen[199]["new_obs"][i])
    assert [e["l"] for e in trainer.ep_info_buffer] == [200, 200]


def test_eval_callback_finds_the_best_and_writes_its_files(tmp_path: Path) -> None:
    """Its evaluations, the best model as a folder of ours, records in the run, and a stop at a threshold."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also of environments that are said to be of different types
        stop = StopTrainingOnRewardThreshold(reward_threshold=-3000.0, verbose=0)
        callback = EvalCallback(
            make_vec_env("Pendulum-v1", n_envs=2, seed=0), best_model_save_path=str(tmp_path / "best"),
            log_path=str(tmp_path / "log"), eval_freq=50, n_eval_episodes=2, deterministic=True, verbose=0,
            callback_on_new_best=stop,
        )  # fmt: skip
        trainer = sac(out=str(tmp_path / "run"), eval_episodes=0, log_every=20)
        trainer.learn(400, callback=callback)
    assert trainer.num_timesteps == 50  # every return of Pendulum is above -3000
    saved = np.load(tmp_path / "log" / "evaluations.npz")
    assert saved["timesteps"].tolist() == [50]
    best = rlkit.SAC.load(tmp_path / "best" / "best_model")
    obs = np.array([1.0, 0.0, 0.0], dtype=np.float32)
    assert best.predict(obs, deterministic=True)[0] == trainer.predict(obs, deterministic=True)[0]
    records = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "eval/mean_reward" in r]
    assert [r["eval/mean_reward"] for r in records] == [pytest.approx(saved["results"].mean())]
    assert records[0]["time/total_timesteps"] == 50


def test_checkpoints_lists_and_every_n_steps(tmp_path: Path) -> None:
    spy, count = Spy(), []

    class Count(BaseCallback):
        def _on_step(self) -> bool:
            count.append(self.num_timesteps)
            return True

    checkpoints = CheckpointCallback(save_freq=30, save_path=str(tmp_path), name_prefix="sac")
    trainer = sac(n_envs=2)
    trainer.learn(120, callback=CallbackList([checkpoints, EveryNTimesteps(40, Count()), spy]))
    assert count == [40, 80, 120]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sac_120_steps", "sac_60_steps"]  # folders, without `.zip`
    assert rlkit.load(tmp_path / "sac_120_steps").num_timesteps == 120
    assert spy.events.count("step") == 60


def test_the_buffer_is_in_the_runs_own_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the checkpoints of a run folder hold the buffer"):
        sac().learn(20, callback=CheckpointCallback(10, str(tmp_path), save_replay_buffer=True))


def test_callbacks_that_stop(tmp_path: Path) -> None:
    trainer = sac()
    trainer.learn(1000, callback=StopTrainingOnMaxEpisodes(max_episodes=2))
    assert trainer.num_timesteps == 400
    spy = Spy(stop_at=30)
    assert sac().learn(100, callback=spy).num_timesteps == 30
    assert spy.events[-2:] == ["updates", "end"]
    seen: list[int] = []
    both = sac().learn(100, callback=[Spy(stop_at=25), lambda trainer: seen.append(trainer.num_timesteps)])
    assert both.num_timesteps == 25 == seen[-1]
    no_better = StopTrainingOnNoModelImprovement(max_no_improvement_evals=1, min_evals=1)
    evaluation = EvalCallback(Monitor(gym.make("Pendulum-v1")), eval_freq=20, n_eval_episodes=1,
                              callback_after_eval=no_better, verbose=0)  # fmt: skip
    assert sac(learning_rate=1e-12).learn(500, callback=evaluation).num_timesteps < 500


def test_functions_of_both_kinds() -> None:
    """Ours takes the trainer, Stable-Baselines3's takes locals and globals."""
    ours: list[int] = []
    theirs: list[int] = []

    def old(locals_: dict[str, Any], globals_: dict[str, Any]) -> bool:
        theirs.append(locals_["self"].num_timesteps)
        return len(theirs) < 10

    trainer = sac().learn(50, callback=[lambda trainer: ours.append(trainer.clock), old])
    assert trainer.num_timesteps == 10
    assert ours == theirs == list(range(1, 11))


def test_values_that_a_callback_records_are_in_the_run(tmp_path: Path) -> None:
    class Records(BaseCallback):
        def _on_step(self) -> bool:
            self.logger.record("mine/value", self.num_timesteps * 2)
            if self.num_timesteps % 25 == 0:
                self.logger.dump(self.num_timesteps)
            return True

    trainer = sac(out=str(tmp_path / "run"), eval_episodes=0, log_every=20)
    trainer.learn(50, callback=Records())
    found = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [r["mine/value"] for r in found if "mine/value" in r] == [50.0, 100.0]
    resumed = rlkit.resume(tmp_path / "run")
    resumed.learn(25, callback=Records())
    found = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [r["mine/value"] for r in found if "mine/value" in r] == [50.0, 100.0, 150.0]


@pytest.mark.parametrize("workers", ["sync", "async"])
def test_the_environments_can_be_reached(workers: str) -> None:
    """A curriculum that changes an attribute, as users write it; stepping them stays the trainer's."""

    class Heavier(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 5:
                self.training_env.set_attr("m", 2.0, indices=[1])
                assert self.training_env.get_attr("m") == [1.0, 2.0]
                assert self.training_env.env_method("get_wrapper_attr", "m", indices=1) == [2.0]
                assert self.training_env.num_envs == 2
                assert self.training_env.env_is_wrapped(gym.wrappers.TimeLimit) == [True, True]
                assert self.training_env.env_is_wrapped(gym.wrappers.ClipAction, indices=0) == [False]
                with pytest.raises(UserError, match="the trainer steps them"):
                    self.training_env.reset()
            return True

    trainer = sac(n_envs=2, vectorization_mode=workers)
    try:
        trainer.learn(20, callback=Heavier())
    finally:
        trainer.close()


def test_a_given_vec_env_is_the_training_env_and_its_normalisation_is_found(tmp_path: Path) -> None:
    venv = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2, seed=0))
    trainer = sac(venv)
    evaluation = VecNormalize(make_vec_env("Pendulum-v1", n_envs=1, seed=1), training=False, norm_reward=False)
    trainer.learn(60, callback=EvalCallback(evaluation, eval_freq=15, n_eval_episodes=1, verbose=0))
    assert trainer.get_env() is venv
    assert trainer.get_vec_normalize_env() is venv
    assert np.array_equal(evaluation.obs_rms.mean, venv.obs_rms.mean)
    trainer.learn(4, callback=CheckpointCallback(1, str(tmp_path), save_vecnormalize=True))
    assert any("vecnormalize" in p.name for p in tmp_path.iterdir())
    assert sac("Pendulum-v1").get_vec_normalize_env() is None


def test_vec_monitor_s_episodes_are_the_trainer_s(tmp_path: Path) -> None:
    venv = VecMonitor(make_vec_env("Pendulum-v1", n_envs=2, seed=0), str(tmp_path / "monitor"))
    trainer = sac(venv).learn(900)
    written = [float(line.split(",")[0]) for line in (tmp_path / "monitor.monitor.csv").read_text().splitlines()[2:]]
    assert len(written) == 4
    assert [episode["r"] for episode in trainer.ep_info_buffer] == pytest.approx(written, abs=1e-3)


def test_a_script_of_stable_baselines3_runs_when_its_import_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same lines for both, but for the policy's name."""

    def script(make: Callable[..., Any], log: Path) -> tuple[Any, list[str]]:
        model = make(
            "Pendulum-v1", learning_rate=1e-3, learning_starts=20, batch_size=16, train_freq=(1, "step"),
            action_noise=None, policy_kwargs={"net_arch": [8, 8], "activation_fn": torch.nn.ReLU}, use_sde=False,
            optimize_memory_usage=False, verbose=0, seed=0, device="cpu", tensorboard_log=None,
        )  # fmt: skip
        evaluation = EvalCallback(
            Monitor(gym.make("Pendulum-v1")), eval_freq=25, n_eval_episodes=1, log_path=str(log), verbose=0,
            best_model_save_path=str(log),
        )  # fmt: skip
        model.learn(total_timesteps=50, callback=evaluation, log_interval=4, reset_num_timesteps=True)
        assert model.num_timesteps == 50
        model.learn(total_timesteps=10, reset_num_timesteps=False, progress_bar=False)
        action, _ = model.predict(model.get_env().observation_space.sample(), deterministic=True)
        assert action.shape == (1,)
        return model, sorted(path.name.removesuffix(".zip") for path in log.iterdir())

    theirs, saved = script(functools.partial(SB3SAC, "MlpPolicy"), tmp_path / "theirs")
    ours, also = script(rlkit.SAC, tmp_path / "ours")
    assert saved == also == ["best_model", "evaluations.npz"]
    assert ours.num_timesteps == theirs.num_timesteps == 60
    assert "records come every 1,000 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"tensorboard_log": "tb"}, "`tensorboard_log`: 'tb' is not possible: give `out=FOLDER`"),
        ({"use_sde": True}, "`use_sde`: True is not possible"),
        ({"train_freq": (1, "episode")}, "updates come after a number of steps"),
        ({"stats_window_size": 10}, "of the last 100 episodes"),
    ],
)
def test_what_stable_baselines3_has_and_rlkit_has_not_is_said(given: dict[str, Any], advice: str) -> None:
    with pytest.raises(UserError, match=re.escape(advice)):
        rlkit.SAC("Pendulum-v1", **given)
    trainer = sac().learn(5)
    with pytest.raises(UserError, match="make a new one"):
        trainer.learn(5, reset_num_timesteps=True)


def test_evaluate_policy_takes_a_trainer() -> None:
    trainer = sac().learn(30)
    returns, lengths = evaluate_policy(
        trainer, Monitor(gym.make("Pendulum-v1")), n_eval_episodes=2, return_episode_rewards=True
    )
    assert lengths == [200, 200]
    assert all(r < 0 for r in returns)


def test_what_is_no_callback() -> None:
    with pytest.raises(UserError, match="expected a function of the trainer, a callback of Stable-Baselines3"):
        sac().learn(10, callback=3)
    with pytest.raises(UserError, match="sft has no environments"):
        tiny("sft").learn(1, callback=Spy())
