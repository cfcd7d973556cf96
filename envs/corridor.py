"""`rlkit/Corridor-v0`: a way through narrow corridors, with recordings of one expert episode and of many random ones.

A point has to get from one of three dead ends to a goal, by steps of more than half a corridor's width, so that a
single action matters. For imitation from a few labelled transitions and many others (ReCOIL, arXiv:2302.08560): the
labelled episode shows the way from one start, and it never turns left, as the ways from the others do. So who clones
the recording walks without aim, and who clones the episode knows one way of three. What is left is to find out, from
the recording, how to come to where the expert was.
"""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

ID = "rlkit/Corridor-v0"
STEP_LIMIT = 50
MAP = (
    "###S##S",
    "###.##.",
    "#......",
    "#.#####",
    "#.#####",
    "S.....G",
)
"""`#` is wall, `S` a start, `G` the goal; one cell is the unit of length."""
STEP, NOISE, PARTS = 0.6, 0.05, 4

Array = NDArray[Any]

FREE = np.array([[cell != "#" for cell in row] for row in MAP[::-1]]).T  # [x, y], y upwards
STARTS, GOALS = (np.argwhere(np.array([[cell == kind for cell in row] for row in MAP[::-1]]).T) for kind in "SG")
GOAL = GOALS[0]
SIZE = np.array(FREE.shape)


def _distances() -> NDArray[np.int64]:
    """(7, 6): steps from cell to cell to the goal, -1 of walls."""
    found = np.full(FREE.shape, -1)
    found[tuple(GOAL)] = 0
    reached = [GOAL]
    for cell in reached:
        for way in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            beside = cell + way
            inside = ((beside >= 0) & (beside < SIZE)).all()
            if inside and FREE[tuple(beside)] and found[tuple(beside)] < 0:
                found[tuple(beside)] = found[tuple(cell)] + 1
                reached.append(beside)
    return found


DISTANCE = _distances()


def free(position: Array) -> NDArray[np.bool_]:
    """(n, 2) positions -> (n,): whether each is in a corridor, not in a wall or outside."""
    cell = np.floor(position).astype(np.int64)
    inside = ((cell >= 0) & (cell < SIZE)).all(1)
    x, y = np.clip(cell, 0, SIZE - 1).T
    return inside & FREE[x, y]


def move(position: Array, way: Array) -> NDArray[np.float64]:
    """Where (n, 2) positions come to by displacements (n, 2): in four parts, along the walls that they meet."""
    place = np.array(position, np.float64)
    for _ in range(PARTS):
        for axis in (0, 1):
            tried = place.copy()
            tried[:, axis] += way[:, axis] / PARTS
            place = np.where(free(tried)[:, None], tried, place)
    return place


def observe(position: Array) -> NDArray[np.float32]:
    """(n, 2) positions -> (n, 2) observations: distances from the middle of the map, in cells."""
    return (position - SIZE / 2).astype(np.float32)


def at_goal(position: Array) -> NDArray[np.bool_]:
    """(n, 2) positions -> (n,): whether each is in the goal's cell."""
    return (np.floor(position) == GOAL).all(1)


class Corridor(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """A point in the corridors of `MAP`, 7 by 6 cells; `gymnasium.make("rlkit/Corridor-v0")`.

    Action (2,) in [-1, 1]: moves the point by 0.6 cells each, and normal noise of 0.05; walls stop the axis that runs
    into them. From the starts it is about 10, 19 and 24 steps to the goal.

    Observation (2,): the position from the middle of the map, in cells. It starts anywhere in the cell of one of the
    three starts.

    Reward: 1 for each step that ends in the goal's cell. Nothing terminates; a time limit of 50 steps truncates.
    `info["is_success"]` says whether the point is in the goal.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(np.float32(-SIZE / 2), np.float32(SIZE / 2))
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.position = STARTS[:1] + 0.5
        self.path: list[NDArray[np.float64]] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self.position = starts(1, self.np_random)
        self.path = [self.position[0]]
        return observe(self.position)[0], {"is_success": False}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        self.position = walk(self.position, np.asarray(action, np.float64)[None], self.np_random)
        self.path.append(self.position[0])
        reached = bool(at_goal(self.position)[0])
        return observe(self.position)[0], float(reached), False, False, {"is_success": reached}

    def render(self) -> NDArray[np.uint8] | None:
        """A picture (240, 280, 3): walls grey, the goal green, the way so far blue."""
        if self.render_mode is None:
            return None
        scale = 40
        picture = np.full((*FREE.T.shape, 3), 255, np.uint8)
        picture[~FREE.T] = (120, 120, 120)
        picture[GOAL[1], GOAL[0]] = (80, 180, 90)
        picture = picture.repeat(scale, 0).repeat(scale, 1)
        x, y = ((np.arange(scale * n) + 0.5) / scale for n in SIZE)
        for place, radius in (*((place, 0.05) for place in self.path), (self.position[0], 0.15)):
            picture[(y[:, None] - place[1]) ** 2 + (x - place[0]) ** 2 < radius**2] = (40, 90, 200)
        return picture[::-1].copy()


def starts(n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(n, 2) positions, uniform over the cells of the starts."""
    return STARTS[rng.integers(len(STARTS), size=n)] + rng.uniform(0.05, 0.95, (n, 2))


def anywhere(n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(n, 2) positions, uniform over the corridors."""
    cells = np.argwhere(FREE)
    return cells[rng.integers(len(cells), size=n)] + rng.uniform(0.05, 0.95, (n, 2))


def walk(position: Array, action: Array, rng: np.random.Generator) -> NDArray[np.float64]:
    """One step of the task from (n, 2) positions by (n, 2) actions."""
    return move(position, STEP * np.clip(action, -1.0, 1.0) + rng.normal(0.0, NOISE, action.shape))


def guide(position: Array) -> NDArray[np.float64]:
    """(n, 2) positions -> (n, 2) actions that lead to the middle of the next cell on the way, and stay at the goal."""
    here = np.floor(position).astype(np.int64)
    target = here.copy()
    for way in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        beside = np.clip(here + way, 0, SIZE - 1)
        nearer = (DISTANCE[tuple(beside.T)] >= 0) & (DISTANCE[tuple(beside.T)] < DISTANCE[tuple(here.T)])
        target[nearer] = beside[nearer]
    return np.clip((target + 0.5 - position) / STEP, -1.0, 1.0)


def recording(random: int, guided: int, seed: int = 0, start: int | None = None) -> dict[str, Array]:
    """Episodes of 50 steps, under the names of `rlkit.envs.offline.read`.

    Args:
        random: this many start anywhere and walk in directions and at speeds that are drawn anew every few steps.
        guided: this many start where the task does and go to the goal, with a little noise; they are the last.
        seed: of all that is drawn.
        start: which of the starts guided ones begin at, 0 the one at the bottom; None takes any.
    """
    rng = np.random.default_rng(seed)
    n = random + guided
    begin = starts(guided, rng) if start is None else STARTS[start] + rng.uniform(0.05, 0.95, (guided, 2))
    position = np.concatenate([anywhere(random, rng), begin])
    drift = rng.uniform(-1.0, 1.0, (random, 2))
    columns: dict[str, list[Array]] = {name: [] for name in ("observations", "actions", "rewards", "next_observations")}
    for _ in range(STEP_LIMIT):
        drift = np.where(rng.random((random, 1)) < 0.3, rng.uniform(-1.0, 1.0, (random, 2)), drift)
        wish = np.concatenate([drift, guide(position[random:])])
        action = np.clip(wish + rng.normal(0.0, 0.05, (n, 2)), -1.0, 1.0).astype(np.float32)
        following = walk(position, action, rng)
        reward = at_goal(following).astype(np.float32)
        for name, values in zip(columns, (observe(position), action, reward, observe(following)), strict=True):
            columns[name].append(values)
        position = following
    # (steps, episodes, ...) -> episode after episode
    arrays = {
        name: np.stack(values, 1).reshape(n * STEP_LIMIT, *values[0].shape[1:]) for name, values in columns.items()
    }
    timeouts = np.tile(np.arange(STEP_LIMIT) == STEP_LIMIT - 1, n)
    return {**arrays, "terminals": np.zeros(len(timeouts), bool), "timeouts": timeouts}


def mixed_data() -> dict[str, Array]:
    """300 episodes without aim and 8 to the goal, 15,400 transitions."""
    return recording(300, 8)


def expert_data() -> dict[str, Array]:
    """50 transitions: one episode from the start at the bottom, from another seed than `mixed_data`."""
    return recording(0, 1, seed=7, start=0)


gym.register(ID, entry_point=f"{__name__}:Corridor", max_episode_steps=STEP_LIMIT)
