"""The corridors: moves by hand, gymnasium's own checks, recordings of the stated quality."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from rlkit.envs import corridor, offline
from rlkit.envs.corridor import DISTANCE, FREE, GOAL, ID, MAP, NOISE, STARTS, STEP_LIMIT, Corridor, guide, move


def test_gymnasium_accepts_it() -> None:
    check_env(gym.make(ID).unwrapped)


def test_the_map() -> None:
    """Cells are counted from the lower left; every free one leads to the goal, starts by the ways that text says."""
    assert FREE.shape == (len(MAP[0]), len(MAP)) == (7, 6)
    assert STARTS.tolist() == [[0, 0], [3, 5], [6, 5]]
    assert GOAL.tolist() == [6, 0]
    assert [int(DISTANCE[x, y]) for x, y in STARTS] == [6, 12, 15]
    assert ((DISTANCE >= 0) == FREE).all()


@pytest.mark.parametrize(
    ("place", "way", "expected"),
    [
        ((1.5, 0.5), (0.6, 0.0), (2.1, 0.5)),
        ((1.5, 0.5), (0.4, 0.4), (1.9, 0.9)),
        ((2.5, 0.5), (0.4, 0.6), (2.9, 0.95)),  # a wall above: three of four parts upwards, along it all four
        ((0.2, 0.5), (-0.6, 0.0), (0.05, 0.5)),  # the map's edge, after one part
        ((1.5, 2.5), (-0.8, -0.6), (1.1, 1.9)),  # walls on the left, free below
        ((2.9, 0.9), (0.0, 0.6), (2.9, 0.9)),
    ],
)
def test_walls_stop_an_axis(place: tuple[float, float], way: tuple[float, float], expected: tuple[float, ...]) -> None:
    np.testing.assert_allclose(move(np.array([place]), np.array([way])), [expected], atol=1e-12)


def test_steps_have_the_stated_length_and_noise() -> None:
    """From the middle of the lower lane by half a step to the right: mean 0.3, standard deviation 0.05 an axis."""
    rng = np.random.default_rng(0)
    n = 10_000
    begin = np.tile([[2.5, 0.5]], (n, 1))
    went = corridor.walk(begin, np.tile([[0.5, 0.0]], (n, 1)), rng) - begin
    np.testing.assert_allclose(went.mean(0), [0.3, 0.0], atol=5 * NOISE / n**0.5)  # five standard errors
    np.testing.assert_allclose(went.std(0), NOISE, rtol=5 / (2 * n) ** 0.5)


def test_rewards_and_time_limit() -> None:
    """From a cell before the goal two steps to the right: 0, then 1 for each step in the goal."""
    env = gym.make(ID)
    obs, info = env.reset(seed=0)
    plain = env.unwrapped
    assert isinstance(plain, Corridor)
    assert info["is_success"] is False
    plain.position = np.array([[5.1, 0.5]])
    found = [env.step(np.float32([1, 0])) for _ in range(2)]
    obs, reward, terminated, truncated, info = found[0]
    assert (reward, terminated, truncated, info["is_success"]) == (0.0, False, False, False)
    np.testing.assert_allclose(obs, [5.7 - 3.5, 0.5 - 3.0], atol=6 * NOISE)
    assert found[1][1:] == (1.0, False, False, {"is_success": True})
    rest = [env.step(np.float32([0, 0])) for _ in range(STEP_LIMIT - 2)]
    assert [step[3] for step in rest] == [False] * (STEP_LIMIT - 3) + [True]
    assert not any(step[2] for step in rest)


def test_it_starts_in_each_dead_end() -> None:
    env = Corridor()
    positions = np.array([env.reset(seed=seed)[0] for seed in range(300)]) + corridor.SIZE / 2
    cells = np.floor(positions).astype(int).tolist()
    counts = [cells.count(start) for start in STARTS.tolist()]
    assert sum(counts) == 300
    assert min(counts) > 70


def test_the_guide_gets_there_from_everywhere() -> None:
    rng = np.random.default_rng(0)
    place = corridor.anywhere(500, rng)
    for _ in range(STEP_LIMIT):
        place = corridor.walk(place, guide(place), rng)
    assert corridor.at_goal(place).all()


def test_recordings_hold_what_they_say() -> None:
    """Guided episodes end in the goal, each of them, random ones hardly ever; labelled is a way from one start."""
    dataset = offline.read(corridor.mixed_data())
    assert len(dataset) == 308 * STEP_LIMIT
    assert dataset.lengths.tolist() == [STEP_LIMIT] * 308
    assert dataset.notes == ()
    ends = dataset.rows["reward"].reshape(308, STEP_LIMIT)[:, -1]
    assert (ends[-8:] == 1).all()
    assert ends[:-8].mean() < 0.15
    assert dataset.returns[-8:].min() > 20
    assert np.abs(dataset.rows["action"]).max() <= 1
    cells = np.floor(dataset.rows["obs"] + corridor.SIZE / 2).astype(int)
    assert {tuple(cell) for cell in cells.tolist()} == {tuple(cell) for cell in np.argwhere(FREE).tolist()}

    expert = offline.read(corridor.expert_data())
    assert len(expert) == STEP_LIMIT
    assert expert.rows["reward"][-1] == 1
    assert np.floor(expert.rows["obs"][0] + corridor.SIZE / 2).tolist() == STARTS[0].tolist()
    assert (expert.rows["obs"][:, 1] + 3 < 1).all(), "it stays in the lowest corridor"

    assert offline.read(corridor.mixed_data()).fingerprint() == dataset.fingerprint()
    assert offline.read(corridor.recording(300, 8, seed=1)).fingerprint() != dataset.fingerprint()


def test_it_can_be_drawn() -> None:
    """Walls, free cells and the goal at their places, the first row uppermost, and the point."""
    env = Corridor(render_mode="rgb_array")
    env.reset(seed=0)
    env.position = STARTS[:1] + 0.5
    picture = env.render()
    assert picture is not None
    assert picture.shape == (240, 280, 3)
    assert picture[-20, 20].tolist() == [40, 90, 200]
    assert picture[-5, -5].tolist() == [80, 180, 90]
    assert picture[5, 5].tolist() == [120, 120, 120]
    assert Corridor().render() is None
