"""Evaluation: each episode a pure function of (seed, index), whatever runs beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from scipy import stats

import rlkit.evaluate as module
from rlkit.errors import EnvError, UserError
from rlkit.evaluate import Evaluation, evaluate
from rlkit.rng import derive


class Walk(gym.Env):
    """Episodes of 1 to 30 steps; observations, rewards and the length depend on the seed of the reset alone."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float64)

    def __init__(self) -> None:
        self.closed = False
        self.seeds: list[int] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        assert seed is not None
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.left = int(self.np_random.integers(1, 31))
        self.state = self.np_random.normal(size=2)
        return self.state, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.state += self.np_random.normal(size=2) * action  # in place: whoever keeps an observation must copy it
        self.left -= 1
        success = {"is_success": bool(self.state[0] > 0)} if self.left == 0 else {}
        return self.state, float(self.state.sum()), self.left == 0, False, success

    def close(self) -> None:
        self.closed = True


class Sine:
    """A deterministic policy whose rows do not depend on their batch; remembers what it was asked."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.deterministic: set[bool] = set()

    def predict(self, observation: np.ndarray, *, deterministic: bool = False) -> tuple[np.ndarray, None]:
        self.batches.append(len(observation))
        self.deterministic.add(deterministic)
        return np.sin(observation[:, :1]), None


def run(policy: Any, make_env: Callable[[], gym.Env], episodes: int, seed: int = 0, **kwargs: Any) -> Evaluation:
    result = evaluate(policy, make_env, episodes, seed, **kwargs)
    assert result is not None
    return result


@pytest.mark.parametrize("parallel", [2, 3, 10, 50])
def test_the_result_does_not_depend_on_parallelism(parallel: int) -> None:
    alone = run(Sine(), Walk, 20, seed=3, parallel=1)
    assert len(set(alone.lengths)) > 5
    assert run(Sine(), Walk, 20, seed=3, parallel=parallel) == alone


def test_an_episode_depends_on_seed_and_index_alone() -> None:
    """The first 5 of 20 episodes are the 5 of 5; another seed gives other ones."""
    few, many = run(Sine(), Walk, 5), run(Sine(), Walk, 20)
    assert many.returns[:5] == few.returns
    assert not set(few.returns) & set(run(Sine(), Walk, 5, seed=1).returns)


def test_an_episode_is_what_a_plain_loop_gives() -> None:
    result = run(Sine(), Walk, 4, seed=9, parallel=3)
    for index in range(4):
        env = Walk()
        obs, _ = env.reset(seed=derive(9, "eval", index) & 0x7FFF_FFFF)
        total, length, ended, info = 0.0, 0, False, dict[str, Any]()
        while not ended:
            obs, reward, ended, _, info = env.step(np.sin(obs[:1]))
            total, length = total + reward, length + 1
        assert (result.returns[index], result.lengths[index]) == (total, length)
        assert result.successes[index] == info["is_success"]


def test_environments_are_seeded_within_31_bits_and_closed() -> None:
    """Many environments hand their seed to generators that take no more."""
    envs: list[Walk] = []

    def make() -> Walk:
        envs.append(Walk())
        return envs[-1]

    policy = Sine()
    run(policy, make, 8, parallel=3)
    assert len(envs) == 3
    assert all(env.closed for env in envs)
    seeds = [seed for env in envs for seed in env.seeds]
    assert len(set(seeds)) == 8
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert max(policy.batches) == 3
    assert policy.deterministic == {True}
    run(policy, make, 1, deterministic=False)
    assert policy.deterministic == {True, False}


class Count(gym.Env):
    """Counts to `n`: reward k at step k, so that the return is n (n + 1) / 2; ends by the time limit where asked."""

    observation_space = gym.spaces.Discrete(100)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, n: int = 4, truncate: bool = False) -> None:
        self.n, self.truncate = n, truncate

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        self.k = 0
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.k += 1
        end = self.k == self.n
        return self.k, float(self.k), end and not self.truncate, end and self.truncate, {}


class Zero:
    def predict(self, observation: Any, *, deterministic: bool = False) -> tuple[np.ndarray, None]:
        return np.zeros(len(observation), dtype=np.int64), None


@pytest.mark.parametrize("truncate", [False, True])
def test_known_returns(truncate: bool) -> None:
    """1 + 2 + 3 + 4 = 10 in 4 steps, whichever way the episode ends."""
    result = run(Zero(), lambda: Count(4, truncate), 3)
    assert result == Evaluation([10.0] * 3, [4] * 3, [])
    assert (result.mean, result.std) == (10, 0)
    assert "eval/success_rate" not in result.record()


def test_statistics_against_scipy() -> None:
    returns = [3.0, -1.0, 4.0, 1.5, 9.25]
    result = Evaluation(returns, [1, 2, 3, 4, 5], [True, False, True, True])
    assert result.mean == pytest.approx(np.mean(returns))
    assert result.std == pytest.approx(stats.tstd(returns))
    expected = stats.ttest_1samp(returns, 0).confidence_interval(0.95)
    assert result.ci95 == pytest.approx([expected.low, expected.high])
    assert result.record() == {
        "eval/mean_reward": result.mean,
        "eval/std_reward": result.std,
        "eval/ci95_low": result.ci95[0],
        "eval/ci95_high": result.ci95[1],
        "eval/mean_ep_length": 3.0,
        "eval/episodes": 5,
        "eval/success_rate": 0.75,
    }
    assert all(type(value) in (float, int) for value in result.record().values())
    assert str(result) == f"{result.mean:.1f} ± {result.std:.1f} (5 episodes)"


def test_interval_by_hand() -> None:
    """Returns 1, 3: mean 2, deviation sqrt(2), t(0.975, 1) = 12.7062, half width 12.7062 sqrt(2) / sqrt(2)."""
    assert Evaluation([1.0, 3.0], [1, 1], []).ci95 == pytest.approx([2 - 12.7062, 2 + 12.7062], abs=1e-3)


def test_one_episode_has_no_interval() -> None:
    result = run(Zero(), Count, 1)
    assert result.mean == 10
    assert math.isnan(result.std)
    assert all(math.isnan(end) for end in result.ci95)
    assert str(result) == "10.0 (n=1, no interval)"


def test_success_is_counted_where_it_is_reported() -> None:
    result = run(Sine(), Walk, 20)
    assert result.record()["eval/success_rate"] == np.mean(result.successes)
    assert 0 < sum(result.successes) < 20


class Tree(gym.Env):
    """Dict observations with a nested Dict, an image and an integer; the reward is what the policy read."""

    observation_space = gym.spaces.Dict(
        {
            "inner": gym.spaces.Dict({"x": gym.spaces.Box(-9, 9, (2,))}),
            "image": gym.spaces.Box(0, 255, (2, 2, 1), np.uint8),
            "n": gym.spaces.Discrete(50),
        }
    )
    action_space = gym.spaces.Box(-100, 100, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.k = 0
        return self.look(), {}

    def look(self) -> Any:
        self.last = self.observation_space.sample()
        return self.last

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        seen = float(self.last["inner"]["x"][1] + self.last["image"][1, 0, 0] + self.last["n"])
        self.k += 1
        return self.look(), abs(float(action[0]) - seen), self.k == 3, False, {}


class Reader:
    def predict(self, observation: Any, *, deterministic: bool = False) -> tuple[np.ndarray, None]:
        assert observation["image"].dtype == np.uint8
        total = observation["inner"]["x"][:, 1] + observation["image"][:, 1, 0, 0] + observation["n"]
        return total[:, None], None


def test_dict_observations_are_batched_leaf_by_leaf() -> None:
    """Each action answers its own environment's observation: the sum of distances is 0."""
    result = run(Reader(), Tree, 5, parallel=3)
    assert result.lengths == [3] * 5
    assert result.returns == pytest.approx([0] * 5, abs=1e-3)


# Stopping and failing


class Tracked(Count):
    """Remembers which instances are open."""

    opened: list[Tracked]

    def __init__(self, n: int = 4, fail_reset: bool = False, fail_step: int = 0) -> None:
        super().__init__(n)
        self.fail_reset, self.fail_step, self.closed = fail_reset, fail_step, False
        Tracked.opened.append(self)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        if self.fail_reset:
            raise ValueError("no map")
        return super().reset(seed=seed)

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        if self.k + 1 == self.fail_step:
            raise RuntimeError("the simulation exploded")
        return super().step(action)

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def _nothing_opened() -> None:
    Tracked.opened = []


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_stop_gives_none_and_closes(after: int) -> None:
    answers = iter([False] * after + [True] * 100)
    assert evaluate(Zero(), Tracked, 10, parallel=2, should_stop=lambda: next(answers)) is None
    assert len(Tracked.opened) == 2
    assert all(env.closed for env in Tracked.opened)


def test_a_step_that_raises_names_episode_step_and_action() -> None:
    with pytest.raises(EnvError, match=r"episode 0, step 2: the simulation exploded \(action 0\)") as caught:
        evaluate(Zero(), lambda: Tracked(fail_step=3), 4)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert all(env.closed for env in Tracked.opened)


def test_the_failing_episode_is_the_one_named() -> None:
    """The second environment fails at its first episode, which is episode 1."""
    made = iter([Tracked(n=9), Tracked(n=9, fail_step=4), Tracked(n=9)])
    with pytest.raises(EnvError, match="evaluation episode 1, step 3"):
        evaluate(Zero(), lambda: next(made), 3)


def test_a_reset_that_raises_names_the_episode() -> None:
    with pytest.raises(EnvError, match="evaluation episode 0, reset: no map"):
        evaluate(Zero(), lambda: Tracked(fail_reset=True), 2)
    assert all(env.closed for env in Tracked.opened)


def test_an_environment_that_cannot_be_made_closes_the_others() -> None:
    def make() -> gym.Env:
        if len(Tracked.opened) == 2:
            raise OSError("no display")
        return Tracked()

    with pytest.raises(OSError, match="no display"):
        evaluate(Zero(), make, 3)
    assert [env.closed for env in Tracked.opened] == [True, True]


def test_an_episode_without_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEP_LIMIT", 50)
    with pytest.raises(EnvError, match="episode 0 did not end within 50 steps; give the environment a time limit"):
        evaluate(Zero(), lambda: Tracked(n=51), 2)
    assert all(env.closed for env in Tracked.opened)
    assert run(Zero(), lambda: Tracked(n=50), 2).lengths == [50, 50]


@pytest.mark.parametrize(("episodes", "parallel"), [(0, 10), (-1, 10), (5, 0)])
def test_nothing_to_do_is_an_error(episodes: int, parallel: int) -> None:
    with pytest.raises(UserError, match="at least 1 is needed"):
        evaluate(Zero(), Tracked, episodes, parallel=parallel)
    assert Tracked.opened == []
