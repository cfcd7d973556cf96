"""The tasks of coordination: rewards by hand, gymnasium's own checks, recordings of the stated quality."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from rlkit.envs import offline
from rlkit.envs.coordination import (
    PARITY_ID,
    STEP_LIMIT,
    THRUST_ID,
    TwinThrust,
    parity_data,
    parity_reward,
    thrust,
    twin_thrust_data,
)


@pytest.mark.parametrize("name", [PARITY_ID, THRUST_ID])
def test_gymnasium_accepts_them(name: str) -> None:
    check_env(gym.make(name).unwrapped, skip_render_check=name == PARITY_ID)


def test_parity() -> None:
    actions = np.array([[1, 1, 1], [-0.1, -0.2, 0.3], [-1, 1, 1], [-1, -1, -1], [0, 1, 1]])
    assert parity_reward(actions).tolist() == [1, 1, 0, 0, 0]
    env = gym.make(PARITY_ID, dimensions=3)
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step(np.float32([-0.1, -0.2, 0.3]))
    assert (reward, terminated, info["is_success"]) == (1.0, True, True)
    data = parity_data(3, 5_000)
    assert data["rewards"].mean() == pytest.approx(0.5, abs=5 * 0.5 / 5_000**0.5)  # five standard errors


@pytest.mark.parametrize(
    ("action", "way"),
    [
        ((1.0, -1.0, 0.0), (0.1, 0.0)),
        ((-1.0, 1.0, 0.0), (0.1, 0.0)),  # the other way round, the same way
        ((1.0, -1.0, 0.5), (0.0, 0.1)),
        ((1.0, 1.0, 0.0), (0.0, 0.0)),
        ((0.5, -0.5, 0.0), (0.05, 0.0)),
        ((0.4, 0.0, 0.0), (0.1 * 0.2 * np.exp(-1), 0.0)),  # 0.4 too much: a factor of 1 / e
    ],
)
def test_the_thrusters_have_to_be_opposite(action: tuple[float, ...], way: tuple[float, float]) -> None:
    np.testing.assert_allclose(thrust(np.array(action)), way, atol=1e-12)


def test_rewards_and_the_end_of_an_episode() -> None:
    """From (0.25, 0) straight to the origin at full thrust: 1 - 0.2, then into the goal, 1 - 0.2 + 5."""
    env = TwinThrust()
    env.reset(seed=0)
    env.position = np.array([0.25, 0.0])
    _, reward, terminated, _, _ = env.step(np.float32([1, -1, 1]))
    assert (reward, terminated) == (pytest.approx(0.8), False)
    obs, reward, terminated, truncated, info = env.step(np.float32([-1, 1, -1]))
    assert (reward, terminated, truncated, info["is_success"]) == (pytest.approx(5.8), True, False, True)
    np.testing.assert_allclose(obs, [0.05, 0.0], atol=1e-6)


def test_start_and_time_limit() -> None:
    env = gym.make(THRUST_ID)
    distances = [np.linalg.norm(env.reset(seed=seed)[0]) for seed in range(200)]
    assert 0.5 <= min(distances) < 0.6
    assert 1.4 < max(distances) <= 1.5
    steps, over = 0, False
    while not over:
        _, _, terminated, truncated, _ = env.step(np.float32([1, 1, 0]))
        steps, over = steps + 1, terminated or truncated
    assert (steps, terminated) == (STEP_LIMIT, False)


def test_recordings_hold_what_they_say() -> None:
    """20 of 200 episodes are good: they reach the goal and have the best returns but for a lucky poor one."""
    dataset = offline.read(twin_thrust_data())
    assert len(dataset.lengths) == 200
    good = np.arange(200) % 10 == 9
    ends = np.cumsum(dataset.lengths) - 1
    assert dataset.rows["terminated"][ends][good].all()
    assert dataset.returns[good].mean() > dataset.returns[~good].mean() + 10
    assert dataset.rows["terminated"][ends][~good].mean() < 0.3
    both = dataset.rows["action"][good[dataset.rows["episode"]]]
    assert 0.4 < (both[:, 0] > 0).mean() < 0.6  # either way round
    again = offline.read(twin_thrust_data())
    assert again.fingerprint() == dataset.fingerprint()
    assert offline.read(twin_thrust_data(seed=1)).fingerprint() != dataset.fingerprint()


def test_it_can_be_drawn() -> None:
    env = TwinThrust(render_mode="rgb_array")
    env.reset(seed=0)
    picture = env.render()
    assert picture is not None
    assert picture.shape == (300, 300, 3)
    assert (picture == (80, 180, 90)).all(2).any()
    assert (picture == (40, 90, 200)).all(2).any()
