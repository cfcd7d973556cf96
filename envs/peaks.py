"""`rlkit/TwoPeaks-v0`: a bandit whose best actions are two, apart from each other.

A policy of a single Gaussian that is as wide as its entropy bonus wants it covers both peaks from the valley between
them, where most of its actions are worth little; a mixture can have both. After the fixed bimodal critic on which
arXiv:2104.09122's policy is told from a Gaussian one, with the critic left to be learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

ID = "rlkit/TwoPeaks-v0"
PLACES, WIDTH = np.array([-0.6, 0.6]), 0.15

Array = NDArray[Any]


class TwoPeaks(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """One step; the observation is a constant, the reward that of `peaks_reward`.

    Action (1,) in [-1, 1]. `info["side"]` is -1 or 1 for an action within a width (0.15) of the peak there, else 0;
    `info["is_success"]` says whether it is not 0.

    Args:
        heights: of the peaks at -0.6 and 0.6.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}
    observation_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, heights: Sequence[float] = (1.0, 1.0)) -> None:
        self.heights, self.side = tuple(map(float, heights)), 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self.side = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        a = np.asarray(action, np.float64).reshape(1, 1)
        near = np.abs(a[0, 0] - PLACES) < WIDTH
        self.side = int(np.sign(PLACES[near]).sum())
        info = {"is_success": bool(near.any()), "side": self.side}
        return np.zeros(1, np.float32), float(peaks_reward(a, self.heights)[0]), True, False, info


def peaks_reward(action: Array, heights: Sequence[float] = (1.0, 1.0)) -> NDArray[np.float64]:
    """(n, 1) actions -> (n,): sum_k h_k exp(-(a - m_k)^2 / (2 * 0.15^2)) with m = (-0.6, 0.6)."""
    return np.exp(-np.square(np.asarray(action, np.float64) - PLACES) / (2 * WIDTH**2)) @ np.asarray(heights)


gym.register(ID, entry_point=f"{__name__}:TwoPeaks")
