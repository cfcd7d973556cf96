"""Tiny environments for tests: each one is exact, broken or awkward in one way. Picklable, for worker processes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete

# (length, how it ends) of the episodes of an environment, in turn; environment i begins with entry i.
SCHEDULE = [(3, "terminated"), (1, "truncated"), (2, "both"), (1, "terminated"), (4, "truncated")]


class Counter(gym.Env):
    """Observes (index, episode, step); the reward names the transition and its action; episodes end by `SCHEDULE`."""

    def __init__(self, index: int = 0) -> None:
        self.index, self.episode, self.t = index, -1, 0
        self.observation_space = Box(-1.0, 1e6, (3,), np.float64)
        self.action_space = Box(np.float32([-2.0, 0.0]), np.float32([2.0, 10.0]))

    def _obs(self) -> np.ndarray:
        return np.array([self.index, self.episode, self.t], np.float64)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.episode += 1
        self.t = 0
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        assert self.action_space.contains(action), action
        self.t += 1
        length, end = SCHEDULE[(self.index + self.episode) % len(SCHEDULE)]
        over = self.t >= length
        reward = 1000.0 * self.index + 10.0 * self.episode + self.t + float(action[0]) / 7 + float(action[1]) / 77
        terminated, truncated = over and end != "truncated", over and end != "terminated"
        return self._obs(), reward, terminated, truncated, {"is_success": self.episode % 2 == 0, "noise": "text"}


class DictCounter(Counter):
    """The same, as a nested `Dict` whose keys are not in alphabetical order."""

    def __init__(self, index: int = 0) -> None:
        super().__init__(index)
        # A sequence of pairs keeps its order.
        inner = Dict([("time", Box(0, 1e6, (1, 1), np.float32)), ("episode", Box(0, 1000, (1,), np.int32))])
        self.observation_space = Dict([("where", inner), ("index", Box(0, 100, (), np.float32))])

    def _obs(self) -> Any:
        where = {"episode": np.array([self.episode], np.int32), "time": np.array([[self.t]], np.float32)}
        return {"index": np.array(self.index, np.float32), "where": where}


class Walk(gym.Env):
    """A random walk: noise at every step from the reset's seed. `hidden` adds noise from elsewhere."""

    def __init__(self, length: int = 200, hidden: bool = False) -> None:
        self.length, self.hidden, self.t = length, hidden, 0
        self.x = np.zeros(2)
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t, self.x = 0, self.np_random.normal(size=2)
        return self.x, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        self.x += 0.1 * action + self.np_random.normal(size=2)  # in place: observations share this array
        if self.hidden:
            self.x += os.urandom(1)[0] / 256 + 1e-9
        action *= 0  # unkind, and seen in the wild
        return self.x, float(np.sin(self.x).sum()), bool(self.np_random.random() < 0.01), self.t >= self.length, {}


class Broken(gym.Env):
    """Fails in one way at step `at`; `how` is an attribute of this class."""

    def __init__(self, how: str, at: int = 3) -> None:
        self.how, self.at, self.t = how, at, 0
        self.observation_space = Box(-10.0, 10.0, (2,), np.float32)
        self.action_space = Box(-2.0, 2.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
        super().reset(seed=seed)
        if self.how == "old_reset":
            return np.zeros(2, np.float32)
        if self.how == "nan_reset":
            return np.array([0.0, np.nan], np.float32), {}
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        self.t += 1
        good = np.zeros(2, np.float32), 0.0, False, False, {}
        if self.t < self.at:
            return good
        return getattr(self, self.how)(good)

    def raises(self, good: Any) -> Any:
        raise ZeroDivisionError("the robot fell off the table")

    def killed(self, good: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def exits(self, good: Any) -> Any:
        os._exit(3)

    def sleeps(self, good: Any) -> Any:
        with contextlib.suppress(Exception):
            time.sleep(60)
        return good

    def deaf(self, good: Any) -> Any:
        """Hangs where no alarm can reach it, as native code may."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(60)
        return good

    def nan_obs(self, good: Any) -> Any:
        return np.array([0.0, np.nan], np.float32), *good[1:]

    def inf_reward(self, good: Any) -> Any:
        return good[0], -np.inf, *good[2:]

    def huge_reward(self, good: Any) -> Any:
        return good[0], 1e39, *good[2:]

    def text_reward(self, good: Any) -> Any:
        return good[0], "much", *good[2:]

    def int_flags(self, good: Any) -> Any:
        return good[0], 0.0, 0, 0, {}

    def four(self, good: Any) -> Any:
        return good[0], 0.0, False, {}

    def wrong_shape(self, good: Any) -> Any:
        return np.zeros(3, np.float32), *good[1:]

    def old_reset(self, good: Any) -> Any:
        return good

    nan_reset = old_reset


class Spaces(gym.Env):
    """Only spaces."""

    def __init__(self, observation: gym.Space | None = None, action: gym.Space | None = None) -> None:
        self.observation_space = observation if observation is not None else Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = action if action is not None else Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), action
        return self.observation_space.sample(), float(np.sum(action)), False, False, {}


class Imports(Spaces):
    """The reward says whether this process imported torch."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        return self.observation_space.sample(), float("torch" in sys.modules), False, False, {}


def discrete(start: int = 0) -> Spaces:
    return Spaces(action=Discrete(3, start=start))


def fails_in_workers(owner: int) -> gym.Env:
    """Can be made in the process `owner` only."""
    if os.getpid() != owner:
        raise OSError("no licence for this process")
    return Spaces()
