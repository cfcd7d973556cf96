"""The task with two ways round: its physics, its ends, its pictures."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import rlkit
import rlkit.envs.obstacles as task
from rlkit.envs.obstacles import ObstacleReach


def test_it_is_an_environment_of_gymnasium() -> None:
    env = gym.make(task.ID)
    assert env.spec is not None
    assert env.spec.max_episode_steps == 250
    check_env(gym.make(task.ID, render_mode="rgb_array").unwrapped)


def test_acceleration_becomes_velocity_becomes_way() -> None:
    """Half acceleration along x for 30 steps: v = 0.05 t up to its bound of 1, x = sum of 0.1 v, by hand."""
    env = ObstacleReach()
    obs, _ = env.reset(seed=0)
    assert obs.shape == (17,)
    np.testing.assert_allclose(obs[:2] * 5, [-4.5, -4.5])
    x, v = -4.5, 0.0
    for _ in range(30):
        obs, reward, terminated, truncated, _ = env.step(np.array([0.5, 0.0], np.float32))
        v = min(1.0, v + 0.05)
        x += 0.1 * v
        assert reward == pytest.approx(0.1 * v)
        assert not terminated
        assert not truncated
    np.testing.assert_allclose(obs[:6], [x / 5, -0.9, 1.0, 0.0, 0.5, 0.0], atol=1e-6)
    np.testing.assert_allclose(obs[6:8] * 5, [3 - x, 7.5], atol=1e-5)
    np.testing.assert_allclose(obs[8:14].reshape(3, 2) * 5, task.OBSTACLES - [x, -4.5], atol=1e-5)
    np.testing.assert_allclose(obs[14:], 0.6)


def test_actions_are_bounded() -> None:
    a, b = ObstacleReach(), ObstacleReach()
    a.reset()
    b.reset()
    np.testing.assert_array_equal(a.step(np.array([9.0, -9.0]))[0], b.step(np.array([1.0, -1.0]))[0])


@pytest.mark.parametrize(
    ("position", "reward", "success"),
    [
        ((3.0, 2.6), 100.0, True),
        ((-2.5, -2.0), -100.0, False),
        ((-0.5, -3.0), -100.0, False),
        ((5.01, 0.0), -10.0, False),
    ],
)
def test_what_ends_an_episode(position: tuple[float, float], reward: float, success: bool) -> None:
    env = ObstacleReach()
    env.reset()
    env.position = np.array(position)
    _, got, terminated, _, info = env.step(np.zeros(2))
    assert (got, terminated, info["is_success"]) == (reward, True, success)


def walk(*legs: tuple[float, float, int]) -> tuple[ObstacleReach, float, dict]:
    """Legs of (velocity x, velocity y, steps), each begun at once."""
    env = ObstacleReach()
    env.reset()
    total, info = 0.0, {}
    for x, y, steps in legs:
        env.velocity = np.array([x, y])
        for _ in range(steps):
            _, reward, terminated, _, info = env.step(np.zeros(2))
            total += reward
            if terminated:
                return env, total, info
    return env, total, info


def test_both_ways_lead_to_the_goal_and_the_straight_one_does_not() -> None:
    """Along the edge and then up, or its mirror image: the same return, the other side."""
    below, above = walk((1.0, 0.0, 75), (0.0, 1.0, 80)), walk((0.0, 1.0, 75), (1.0, 0.0, 80))
    assert below[2] == {"is_success": True, "side": -1}
    assert above[2] == {"is_success": True, "side": 1}
    assert below[1] == pytest.approx(above[1])
    assert below[1] > 100
    straight = walk((1.0, 1.0, 80))
    assert straight[2]["is_success"] is False
    assert straight[1] < -90


def test_the_reward_for_approaching_telescopes_and_is_alike_on_both_sides() -> None:
    """Along an episode it adds ten times the way from the first distance to the last one; mirrored, the same."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (40, 2))
    totals = []
    for mirror in (1, -1):
        env = ObstacleReach()
        observations = [env.reset()[0], *(env.step(action[::mirror])[0] for action in actions)]
        observations = np.array(observations)
        rewards = np.arange(40.0)
        more = task.approach(rewards=rewards, observations=observations[:-1], next_observations=observations[1:])
        first, last = (np.linalg.norm(place - task.GOAL) for place in (task.START, env.position))
        assert (more - rewards).sum() == pytest.approx(10 * (first - last), abs=1e-4)
        totals.append(more)
    np.testing.assert_allclose(totals[0], totals[1], atol=1e-4)


def test_a_run_finds_the_reward_for_approaching_by_its_name() -> None:
    agent = rlkit.SAC(
        task.ID, reward=("rlkit.envs.obstacles:approach", "scale=0.1"), policy_kwargs={"net_arch": [8]}, seed=0,
        device="cpu", learning_starts=100, eval_episodes=0,
    )  # fmt: skip
    agent.learn(50)
    rows = agent.buffer.rows(torch.arange(50))
    before, after = (5 * rows[key][:, 6:8].norm(dim=1) for key in ("obs", "next_obs"))
    own = 0.1 * rows["next_obs"][:, 2:4].norm(dim=1)
    running = ~rows["terminated"].bool()
    torch.testing.assert_close(rows["reward"][running], (0.1 * own + before - after)[running], atol=1e-4, rtol=0)


def test_pictures() -> None:
    env = gym.make(task.ID, render_mode="rgb_array")
    env.reset(seed=0)
    first = np.asarray(env.render())
    assert first.shape == (400, 400, 3)
    assert first.dtype == np.uint8
    env.step(np.ones(2, np.float32))
    moved = np.asarray(env.render())
    assert not np.array_equal(first, moved)
    row, column = np.argwhere((first == (40, 90, 200)).all(2)).mean(0)
    assert row > 350, "the point starts below"
    assert column < 50, "on the left"
    goal = np.argwhere((first == (80, 180, 90)).all(2)).mean(0)
    np.testing.assert_allclose(goal, [399 * 0.2, 399 * 0.8], atol=2)
