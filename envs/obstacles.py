"""`rlkit/ObstacleReach-v0`: a task with two ways round, on which a policy can be told from one of a single mode.

A point with bounded acceleration and velocity starts in one corner of an arena and has to reach a disc behind three
round obstacles, of which the middle one stands on the straight line. After the task of a script for arXiv:2104.09122.

From its own reward, which pays for speed, learners hardly find the goal: they loiter. `approach` is a reward module
that pays for coming nearer, alike on both sides of the diagonal, so the task is still to choose a side; sums over
several steps help, too: `--reward rlkit.envs.obstacles:approach scale=0.1 --n_steps 5`, as in `rlkit bench pmoe`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

ID = "rlkit/ObstacleReach-v0"
STEP_LIMIT = 250
ARENA, STEP = 5.0, 0.1
START, GOAL, GOAL_RADIUS = np.array([-4.5, -4.5]), np.array([3.0, 3.0]), 0.5
OBSTACLES, RADIUS = np.array([[-2.5, -2.5], [-3.0, -0.5], [-0.5, -3.0]]), 0.6


class ObstacleReach(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """A double integrator in [-5, 5]^2, 0.1 seconds a step; `gymnasium.make("rlkit/ObstacleReach-v0")`.

    Action: acceleration (2,), each axis in [-1, 1]; the velocity is clipped to [-1, 1] an axis.

    Observation (17,): position / 5, velocity, the last acceleration, way to the goal / 5, ways to the obstacles / 5 and
    their radii.

    Reward: 100 in the goal, -100 in an obstacle, -10 outside the arena, each of which ends the episode; otherwise 0.1
    times the speed. `info["is_success"]` says whether an episode ended in the goal, `info["side"]` on which side of the
    middle obstacle the point passed it: -1 below the diagonal, 1 above, 0 not yet.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 20}
    observation_space = gym.spaces.Box(-3.0, 3.0, (17,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.position, self.velocity, self.acceleration = START.copy(), np.zeros(2), np.zeros(2)
        self.side = 0
        self.path: list[NDArray[np.float64]] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self.position, self.velocity, self.acceleration = START.copy(), np.zeros(2), np.zeros(2)
        self.side, self.path = 0, [START.copy()]
        return self._observation(), self._info(False)

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        self.acceleration = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        self.velocity = np.clip(self.velocity + STEP * self.acceleration, -1.0, 1.0)
        self.position = self.position + STEP * self.velocity
        self.path.append(self.position.copy())
        middle = OBSTACLES[0].sum()
        if self.side == 0 and self.position.sum() >= middle:
            self.side = int(np.sign(self.position[1] - self.position[0]))

        reached = bool(np.linalg.norm(self.position - GOAL) < GOAL_RADIUS)
        if reached:
            reward, terminated = 100.0, True
        elif (np.linalg.norm(self.position - OBSTACLES, axis=1) < RADIUS).any():
            reward, terminated = -100.0, True
        elif (np.abs(self.position) > ARENA).any():
            reward, terminated = -10.0, True
        else:
            reward, terminated = 0.1 * float(np.linalg.norm(self.velocity)), False
        return self._observation(), reward, terminated, False, self._info(reached)

    def _info(self, reached: bool) -> dict[str, Any]:
        return {"is_success": reached, "side": self.side}

    def _observation(self) -> NDArray[np.float32]:
        parts = (
            self.position / ARENA,
            self.velocity,
            self.acceleration,
            (GOAL - self.position) / ARENA,
            ((OBSTACLES - self.position) / ARENA).ravel(),
            np.full(len(OBSTACLES), RADIUS),
        )
        return np.concatenate(parts).astype(np.float32)

    def render(self) -> NDArray[np.uint8] | None:
        """A picture (400, 400, 3) of the arena, the obstacles grey, the goal green, the way so far blue."""
        if self.render_mode is None:
            return None
        size = 400
        along = np.linspace(-ARENA, ARENA, size)
        x, y = np.meshgrid(along, along[::-1])
        picture = np.full((size, size, 3), 255, np.uint8)

        def disc(centre: NDArray[np.float64], radius: float, colour: tuple[int, int, int]) -> None:
            picture[(x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2] = colour

        for centre in OBSTACLES:
            disc(centre, RADIUS, (120, 120, 120))
        disc(GOAL, GOAL_RADIUS, (80, 180, 90))
        for place in self.path:
            disc(place, 0.04, (40, 90, 200))
        disc(self.position, 0.12, (40, 90, 200))
        return picture


def approach(
    rewards: NDArray[Any], observations: NDArray[Any], next_observations: NDArray[Any], **_: Any
) -> NDArray[Any]:
    """Reward module: r -> r + 10 (d - d'), with d and d' the distances to the goal before and after the step."""
    before, after = (ARENA * np.linalg.norm(obs[:, 6:8], axis=1) for obs in (observations, next_observations))
    shaped: NDArray[Any] = rewards + 10.0 * (before - after)
    return shaped


gym.register(ID, entry_point=f"{__name__}:ObstacleReach", max_episode_steps=STEP_LIMIT)
