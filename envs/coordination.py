"""Tasks in which the dimensions of an action have to fit together, and recordings of mixed quality for them.

`rlkit/ParityBandit-v0` is a bandit whose reward is the parity of the action's signs: each dimension alone says nothing.
`rlkit/TwinThrust-v0` is a point that moves only as far as two thrusters push against each other, whichever way round.
A value of single dimensions, averaged over what the others did, sees two equally good halves in both, and has no reason
to choose halves that fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

PARITY_ID = "rlkit/ParityBandit-v0"
THRUST_ID = "rlkit/TwinThrust-v0"
STEP_LIMIT = 60
SPEED, RADIUS, TOLERANCE = 0.1, 0.1, 0.4

Array = NDArray[Any]


class ParityBandit(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """One step; the observation is a constant, the reward 1 where prod_d sign(a_d) > 0, else 0.

    Args:
        dimensions: of the action, in [-1, 1]^dimensions.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}
    observation_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, dimensions: int = 2) -> None:
        self.action_space = gym.spaces.Box(-1.0, 1.0, (dimensions,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        reward = float(parity_reward(np.asarray(action)[None])[0])
        return np.zeros(1, np.float32), reward, True, False, {"is_success": reward > 0}


def parity_reward(action: Array) -> NDArray[np.float64]:
    """(n, D) actions -> (n,): 1 where an even number of dimensions is negative and none is zero, else 0."""
    return (np.prod(np.sign(action), axis=1) > 0).astype(np.float64)


def parity_data(dimensions: int = 2, transitions: int = 4_000, seed: int = 0) -> dict[str, Array]:
    """Uniform actions in `ParityBandit`, an episode each, under the names of `rlkit.envs.offline.read`."""
    action = np.random.default_rng(seed).uniform(-1.0, 1.0, (transitions, dimensions)).astype(np.float32)
    obs = np.zeros((transitions, 1), np.float32)
    ends = np.ones(transitions, bool)
    return {
        "observations": obs, "actions": action, "rewards": parity_reward(action), "next_observations": obs,
        "terminals": ends, "timeouts": ~ends,
    }  # fmt: skip


class TwinThrust(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """A point in the plane that has to reach the origin; `gymnasium.make("rlkit/TwinThrust-v0")`.

    Action (3,) in [-1, 1]: two thrusts and a heading (angle / pi). The point moves by 0.1 |a_1 - a_2| / 2 times
    exp(-((a_1 + a_2) / 0.4)^2) along the heading: fully where the thrusts are opposite and full, in either order, and
    hardly where they are not opposite.

    Observation (2,): the position. It starts at a distance of 0.5 to 1.5.

    Reward: what the distance to the origin shrank, times 10, minus 0.2 a step; 5 within 0.1 of it, which ends the
    episode (`info["is_success"]`). A time limit of 60 steps truncates.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 20}
    observation_space = gym.spaces.Box(-10.0, 10.0, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.position = np.ones(2)
        self.path: list[NDArray[np.float64]] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        angle, distance = self.np_random.uniform(-np.pi, np.pi), self.np_random.uniform(0.5, 1.5)
        self.position = distance * np.array([np.cos(angle), np.sin(angle)])
        self.path = [self.position]
        return self.position.astype(np.float32), {"is_success": False}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        before = float(np.linalg.norm(self.position))
        self.position = self.position + thrust(np.clip(np.asarray(action, np.float64), -1.0, 1.0))
        self.path.append(self.position)
        distance = float(np.linalg.norm(self.position))
        reached = distance < RADIUS
        reward = 10.0 * (before - distance) - 0.2 + 5.0 * reached
        return self.position.astype(np.float32), reward, reached, False, {"is_success": reached}

    def render(self) -> NDArray[np.uint8] | None:
        """A picture (300, 300, 3) of [-2, 2]^2: the goal green, the way so far blue."""
        if self.render_mode is None:
            return None
        size = 300
        along = np.linspace(-2.0, 2.0, size)
        x, y = np.meshgrid(along, along[::-1])
        picture = np.full((size, size, 3), 255, np.uint8)
        for centre, radius, colour in (
            (np.zeros(2), RADIUS, (80, 180, 90)),
            *((place, 0.02, (40, 90, 200)) for place in self.path),
            (self.position, 0.05, (40, 90, 200)),
        ):
            picture[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2] = colour
        return picture


def thrust(action: NDArray[np.float64]) -> NDArray[np.float64]:
    """The way (2,) that an action (3,) moves the point of `TwinThrust`."""
    first, second, heading = action
    size = SPEED * abs(first - second) / 2 * np.exp(-(((first + second) / TOLERANCE) ** 2))
    return size * np.array([np.cos(np.pi * heading), np.sin(np.pi * heading)])


def twin_thrust_data(episodes: int = 200, good: float = 0.1, seed: int = 0) -> dict[str, Array]:
    """Episodes of `TwinThrust` by two scripted hands, under the names of `rlkit.envs.offline.read`.

    A good one heads for the origin with opposite thrusts, in an order that it draws anew for each step; a poor one
    heads there within a radian or so, with independent uniform thrusts.

    Args:
        good: the share of good episodes, spread evenly among the others.
    """
    rng = np.random.default_rng(seed)
    columns: Mapping[str, list[Any]] = {
        name: [] for name in ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    }
    env = TwinThrust()
    for episode in range(episodes):
        is_good = int((episode + 1) * good) > int(episode * good)
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        for step in range(STEP_LIMIT):
            towards = np.arctan2(-env.position[1], -env.position[0])
            if is_good:
                size, order = rng.uniform(0.8, 1.0), rng.choice([-1.0, 1.0])
                thrusts = size * order * np.array([1.0, -1.0]) + rng.normal(0.0, 0.05, 2)
            else:
                towards += rng.normal(0.0, 1.0)
                thrusts = rng.uniform(-1.0, 1.0, 2)
            heading = (towards / np.pi + 1.0) % 2.0 - 1.0
            action = np.clip([*thrusts, heading], -1.0, 1.0).astype(np.float32)
            following, reward, reached, _, _ = env.step(action)
            row = (obs, action, reward, following, reached, not reached and step + 1 == STEP_LIMIT)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
            obs = following
            if reached:
                break
    return {name: np.array(values) for name, values in columns.items()}


gym.register(PARITY_ID, entry_point=f"{__name__}:ParityBandit")
gym.register(THRUST_ID, entry_point=f"{__name__}:TwinThrust", max_episode_steps=STEP_LIMIT)
