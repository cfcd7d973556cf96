"""SAC learns: a bandit with a known optimum in seconds, Pendulum to a threshold (slow)."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import rlkit


class Bandit(gym.Env):
    """One step: reward -(a - target)^2 with the target in the observation; bounds [-2, 2]."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.target = self.np_random.choice([-1.0, 1.0])
        return np.array([self.target], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.array([self.target], np.float32), -float((action[0] - self.target) ** 2), True, False, {}


SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [32, 32]}, "batch_size": 64, "learning_rate": 3e-3}


@pytest.mark.parametrize("n_envs", [1, 4])
def test_finds_the_best_action_of_each_context(n_envs: int) -> None:
    """The best actions are the targets -1 and 1, in environment units; a random policy loses 2.33 on average."""
    agent = rlkit.SAC([Bandit] * n_envs, buffer_size=2000, gradient_steps=-1, **SMALL).learn(1200)
    actions, _ = agent.predict(np.array([[-1.0], [1.0]], np.float32), deterministic=True)
    np.testing.assert_allclose(actions, [[-1.0], [1.0]], atol=0.15)
    assert agent.log_alpha().exp().item() < 0.5


def test_dict_observations_learn_like_flat_ones() -> None:
    """The same bandit with its observation under two keys: the same columns, so the same weights bit for bit."""

    class AsDict(gym.ObservationWrapper):
        def __init__(self) -> None:
            super().__init__(Bandit())
            box = self.env.observation_space
            self.observation_space = gym.spaces.Dict({"target": box})

        def observation(self, observation: np.ndarray) -> dict[str, np.ndarray]:
            return {"target": observation}

    flat, mapped = (rlkit.SAC([make], buffer_size=300, **SMALL).learn(200) for make in (Bandit, AsDict))
    a, _ = flat.predict(np.array([1.0], np.float32), deterministic=True)
    b, _ = mapped.predict({"target": np.array([1.0], np.float32)}, deterministic=True)
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pendulum_to_minus_250_in_ten_thousand_steps(seed: int) -> None:
    """A random policy gets about -1200, the best about -150."""
    agent = rlkit.SAC("Pendulum-v1", seed=seed, preset="auto").learn(10_000)
    record = agent.evaluate(20, seed=100 + seed)
    assert record["eval/mean_reward"] > -250
    assert agent.log_alpha().exp().item() < 0.5
