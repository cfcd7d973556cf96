"""Reward modules for control: scale, shift, clip, running normalisation, potential-based shaping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rlkit.processes import Processes


class Scale:
    """r -> factor r."""

    def __init__(self, factor: float, **_: Any) -> None:
        self.factor = factor
        self.spec = f"scale={factor!r}"

    def __call__(self, rewards: np.ndarray, **_: Any) -> np.ndarray:
        return rewards * self.factor


class Shift:
    """r -> r + amount, such as -1 where a goal pays 1 and everything else 0."""

    def __init__(self, amount: float, **_: Any) -> None:
        self.amount = amount
        self.spec = f"shift={amount!r}"

    def __call__(self, rewards: np.ndarray, **_: Any) -> np.ndarray:
        return rewards + self.amount


class Clip:
    """r -> min(max(r, low), high); with one argument, low = -high."""

    def __init__(self, low: float, high: float | None = None, **_: Any) -> None:
        self.low, self.high = (-low, low) if high is None else (low, high)
        if not self.low < self.high:
            raise ValueError(f"clip needs low < high, got {self.low} and {self.high}")
        self.spec = f"clip={self.low!r},{self.high!r}"

    def __call__(self, rewards: np.ndarray, **_: Any) -> np.ndarray:
        return np.clip(rewards, self.low, self.high)


class Normalize:
    """r -> r / std of the running discounted return, clipped to +-`clip` (as OpenAI Baselines' VecNormalize).

    For each environment G <- gamma G + r, started at 0 in each episode; the variance is over all values of G so far,
    those of the present step included. Rewards are scaled when they are collected: what is in the buffer keeps the
    scale of its time. Several processes share one variance; a step's values of the others count from the next one on.

    Args:
        clip: bound of the scaled reward.
        gamma: discount of the running return; the run's own.
        n_envs: environments of this process.
    """

    def __init__(self, clip: float = 10.0, *, gamma: float = 0.99, n_envs: int = 1, epsilon: float = 1e-8) -> None:
        self.clip, self.gamma, self.epsilon = clip, gamma, epsilon
        self.spec = f"normalize={clip!r}"
        self.returns = np.zeros(n_envs)
        self.count, self.mean, self.spread = 0, 0.0, 0.0  # spread: sum of squared distances from the mean
        self._fresh: list[float] = []  # values of the last step, until they are exchanged, and the moments before it
        self._before = (self.count, self.mean, self.spread)

    def __call__(
        self, rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, env: np.ndarray, **_: Any
    ) -> np.ndarray:
        self.returns[env] = self.gamma * self.returns[env] + rewards
        self._before = (self.count, self.mean, self.spread)
        self._fresh = self.returns[env].tolist()
        self._count(self._fresh)
        self.returns[env[terminated | truncated]] = 0.0
        scaled = rewards / np.sqrt(self.spread / self.count + self.epsilon)
        return np.clip(scaled, -self.clip, self.clip)

    def _count(self, values: Sequence[float]) -> None:
        for value in values:  # Welford (1962)
            self.count += 1
            delta = value - self.mean
            self.mean += delta / self.count
            self.spread += delta * (value - self.mean)

    def synchronise(self, processes: Processes) -> None:
        """Count the last step's values of all processes, in order of rank, as one with all environments would."""
        fresh = torch.tensor(self._fresh, dtype=torch.float64)[:, None]
        every = processes.rows(fresh, most=len(self.returns))
        if self._fresh:
            self.count, self.mean, self.spread = self._before
        self._count(every.flatten().tolist())
        self._fresh = []

    def state_dict(self) -> dict[str, Any]:
        return {"returns": self.returns.copy(), "count": self.count, "mean": self.mean, "spread": self.spread}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.returns = np.array(state["returns"])
        self.count, self.mean, self.spread = int(state["count"]), float(state["mean"]), float(state["spread"])


class Potential:
    """r -> r + gamma Phi(s') - Phi(s), Phi of a terminal state 0: leaves the optimal policy as it is.

    Ng, Harada and Russell (1999), Theorem 1. A time limit is no terminal state, so there Phi(s') counts.

    Args:
        potential: (n, obs_dim) observations -> (n,) potentials.
        gamma: the run's discount; another value would change the optimal policy.
    """

    def __init__(self, potential: Callable[[np.ndarray], Any], *, gamma: float) -> None:
        self.potential, self.gamma = potential, gamma
        self.__name__ = f"potential({getattr(potential, '__name__', 'Phi')})"

    def __call__(
        self,
        rewards: np.ndarray,
        observations: np.ndarray,
        next_observations: np.ndarray,
        terminated: np.ndarray,
        **_: Any,
    ) -> np.ndarray:
        here = np.asarray(self.potential(observations), dtype=np.float64)
        there = np.where(terminated, 0.0, np.asarray(self.potential(next_observations), dtype=np.float64))
        return rewards + self.gamma * there - here


BUILT_IN: dict[str, Callable[..., Any]] = {"scale": Scale, "shift": Shift, "clip": Clip, "normalize": Normalize}
