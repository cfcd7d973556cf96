"""The bandit with two best actions: rewards by hand, sides, gymnasium's own checks."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from rlkit.envs.peaks import ID, TwoPeaks, peaks_reward


def test_gymnasium_accepts_it() -> None:
    check_env(gym.make(ID).unwrapped, skip_render_check=True)


def test_rewards() -> None:
    """At a peak 1 and what the other, eight widths away, adds; a width from it exp(-1/2); in the valley 2 exp(-8)."""
    actions = np.array([[-0.6], [0.6], [0.75], [0.0], [-0.6 + 0.15 * np.sqrt(2 * np.log(2))]])
    expected = [1.0, 1.0, np.exp(-0.5), 2 * np.exp(-8.0), 0.5]
    np.testing.assert_allclose(peaks_reward(actions), expected, atol=1e-9)
    assert peaks_reward(actions[:2], (2.0, 0.5)) == pytest.approx([2.0, 0.5])


@pytest.mark.parametrize(
    ("action", "side"), [(-0.7, -1), (-0.6, -1), (0.5, 1), (0.74, 1), (0.76, 0), (0.0, 0), (1.0, 0)]
)
def test_sides(action: float, side: int) -> None:
    env = TwoPeaks()
    env.reset(seed=0)
    obs, _, terminated, truncated, info = env.step(np.array([action], np.float32))
    assert (info["side"], info["is_success"], env.side) == (side, side != 0, side)
    assert (terminated, truncated, obs.tolist()) == (True, False, [0.0])


def test_heights_come_through_its_name() -> None:
    env = gym.make(ID, heights=(1.0, 0.9))
    env.reset(seed=0)
    assert env.step(np.array([0.6], np.float32))[1] == pytest.approx(0.9)
