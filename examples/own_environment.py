"""Train on an environment of your own: any `gymnasium.Env` with a Box of actions, handed over as a list of functions.

    python examples/own_environment.py

A class is such a function. From a function rlkit makes further copies, to evaluate on or for worker processes. An
environment that is registered with gymnasium goes by its id, here and on the command line: `my_package:MyEnv-v0`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

import rlkit


class PointMass(gym.Env):
    """A mass in the plane that is pushed towards the origin; the reward is minus its distance from there."""

    observation_space = Box(-10.0, 10.0, (4,), np.float32)  # position, velocity
    action_space = Box(-1.0, 1.0, (2,), np.float32)  # force

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.position, self.velocity = self.np_random.uniform(-1, 1, 2), np.zeros(2)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.velocity = 0.9 * self.velocity + 0.1 * action
        self.position = np.clip(self.position + 0.1 * self.velocity, -5, 5)
        self.steps += 1
        time_is_up = self.steps == 100  # truncated, not terminated: the task would go on
        return self._observe(), -float(np.linalg.norm(self.position)), False, time_is_up, {}

    def _observe(self) -> np.ndarray:
        return np.concatenate([self.position, self.velocity]).astype(np.float32)


def mean_return(agent: Any) -> float:
    return float(agent.evaluate(episodes=10)["eval/mean_reward"])


agent = rlkit.SAC(
    [PointMass], seed=0, threads=1, learning_rate=3e-3, tau=0.02, batch_size=64, policy_kwargs={"net_arch": [32, 32]}
)
before = mean_return(agent)
agent.learn(1_500)
print(f"return before: {before:.1f}, after: {mean_return(agent):.1f}")

with tempfile.TemporaryDirectory() as folder:
    saved = agent.save(Path(folder) / "point-mass")
    loaded = rlkit.load(saved, env=[PointMass])  # without `env` it predicts, but cannot go on learning

right = np.array([1, 0, 0, 0], np.float32)  # the mass is right of the origin, at rest
force, _ = loaded.predict(right, deterministic=True)
same = np.array_equal(force, agent.predict(right, deterministic=True)[0])
print(f"force at {right[:2]}: {force}, the same as before saving: {same}")
