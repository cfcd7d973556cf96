"""Recordings of mixed quality of `Pendulum-v1`, made by a controller that knows the task, for trainers of recordings.

The controller swings the pendulum up by its energy and catches it by feedback (Astrom and Furuta 2000). Its skill is
how often it acts; otherwise the torque is random, for some steps on end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

ID = "Pendulum-v1"
GRAVITY, MOST = 10.0, 2.0  # of the task: m = l = 1, torque at most 2

Array = NDArray[Any]


def controller(obs: Array) -> NDArray[np.float64]:
    """Torque (n, 1) for observations (n, 3): cos, sin of the angle from upright, angular velocity."""
    cos, sin, speed = np.asarray(obs, np.float64).T
    angle = np.arctan2(sin, cos)
    # Of the task's dynamics, speed' = 15 sin(angle) + 3 torque: the energy that upright and at rest is 0.
    energy = 0.5 * speed**2 + 1.5 * GRAVITY * (cos - 1.0)
    swing = -np.where(speed >= 0, 1.0, -1.0) * np.clip(energy, -1.0, 1.0) * MOST
    catch = -10.0 * angle - 2.0 * speed
    near = (np.abs(angle) < 0.5) & (np.abs(speed) < 3.0)
    return np.clip(np.where(near, catch, swing), -MOST, MOST)[:, None]


def recording(skills: Sequence[float], episodes: int = 10, seed: int = 0) -> dict[str, Array]:
    """Episodes of the controller, under the names of `rlkit.envs.offline.read`.

    Args:
        skills: for each, `episodes` episodes in which it acts in this share of the time.
        episodes: of each skill.
        seed: of starts and of random torques.
    """
    env, rng = gym.make(ID), np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {name: [] for name in ("observations", "actions", "rewards", "next_observations")}
    timeouts = []
    for number, skill in enumerate(skill for skill in skills for _ in range(episodes)):
        obs, _ = env.reset(seed=seed * 100_003 + number)
        over, left = False, 0
        while not over:
            if left == 0:  # who acts for the next steps, and with which torque where it is nobody
                left, skilled, torque = int(rng.integers(1, 10)), rng.random() < skill, rng.uniform(-MOST, MOST, 1)
            left -= 1
            action = (controller(obs[None])[0] + rng.normal(0, 0.1, 1) if skilled else torque).clip(-MOST, MOST)
            after, reward, _, over, _ = env.step(action.astype(np.float32))
            for name, value in zip(rows, (obs, action, reward, after), strict=True):
                rows[name].append(value)
            timeouts.append(over)
            obs = after
    arrays = {name: np.asarray(values, np.float32) for name, values in rows.items()}
    return {**arrays, "timeouts": np.array(timeouts), "terminals": np.zeros(len(timeouts), bool)}


def mixed_data() -> dict[str, Array]:
    """100 episodes, 20,000 transitions, from random torques to a controller that acts most of the time."""
    return recording((0.0, 0.25, 0.5, 0.75, 0.9), episodes=20)
