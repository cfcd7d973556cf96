"""Change what is learned without touching the environment: reward modules, applied in turn.

    python examples/own_reward.py

The task pays 1 for reaching a distant flag and nothing on the way, which exploration hardly ever finds. Potential-based
shaping (Ng, Harada and Russell, 1999) shows the way and leaves the optimal policy as it is. Evaluations stay in the
environment's own rewards, so that the two runs can be compared.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

import rlkit
from rlkit.rewards.shaping import Potential


class Flag(gym.Env):
    """A point on a line starts at 0 and is worth 1 where it gets to 3 within 60 steps of at most 0.1."""

    observation_space = Box(-10.0, 10.0, (1,), np.float32)
    action_space = Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.x, self.steps = float(self.np_random.normal(0, 0.1)), 0
        return np.array([self.x], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.x, self.steps = max(-5.0, self.x + 0.1 * float(action[0])), self.steps + 1
        reached = self.x >= 3
        return np.array([self.x], np.float32), float(reached), reached, self.steps == 60, {}


def effort(rewards: np.ndarray, actions: np.ndarray, **columns: Any) -> np.ndarray:
    """A module of one's own: takes the columns it names, one row a transition, and returns one number a row."""
    return rewards - 0.001 * (actions**2).sum(axis=1)


def nearness(observations: np.ndarray) -> np.ndarray:
    """The potential: minus the distance to the flag, (n, 1) -> (n,)."""
    return -np.abs(3 - observations[:, 0])


gamma = 0.99
modules = [effort, "scale=10", Potential(nearness, gamma=gamma)]  # each sees the rewards that the one before returned
settings = {
    "seed": 0, "threads": 1, "gamma": gamma, "learning_rate": 3e-3, "tau": 0.02, "ent_coef": 0.01, "batch_size": 64,
    "policy_kwargs": {"net_arch": [32, 32]},
}  # fmt: skip
for name, reward in (("the environment's reward", []), ("with reward modules", modules)):
    agent = rlkit.SAC([Flag], reward=reward, **settings).learn(1_000)
    result = agent.evaluate(episodes=10)
    print(f"{name}: the flag is reached in {100 * result['eval/mean_reward']:.0f} % of episodes")
