"""What every vector environment becomes: `step(actions)` returns complete transitions.

A row holds the observation acted on, the action, what it led to (the true final observation at the end of an episode)
and how the episode ended, whatever the source does about resets:

| adapter | source | state | file |
|---|---|---|---|
| `TrackedAdapter` | environments made or wrapped here, in this process or in workers | restored exactly | own.py |
| `GymVectorAdapter` | a `gymnasium.vector.VectorEnv` in any of the three autoreset modes | reset | given.py |
| `SB3Adapter` | a Stable-Baselines3 `VecEnv` | reset | given.py |

Returns and lengths of episodes are counted here, in float64; NaN and infinity are refused before a row exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray

from rlkit.envs.spaces import ActionScale, flat_space
from rlkit.envs.tracked import show_action
from rlkit.errors import CheckpointError, DivergenceError, EnvError, UserError

Rows = dict[str, NDArray[Any]]


def episode_seed(seed: int, index: int, episode: int) -> int:
    """The seed of a reset, a pure function of its arguments; 31 bits, since some simulators take no more."""
    from rlkit.rng import derive  # here: it imports torch, which worker processes have no use for

    return derive(seed, "env", index, episode) & 0x7FFF_FFFF


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """A finished episode: undiscounted return, steps, environment index, and `is_success` where it is reported."""

    return_: float
    length: int
    env: int
    success: bool | None = None


@dataclass(slots=True)
class Outcome:
    """What a source reports of one vector step, arrays owned by the receiver.

    next_obs (n, dim): where each action led to. obs (n, dim): what to act on next, the same object if nothing was
    reset. reward (n,) float64; terminated, truncated (n,) bool; success: of finished episodes, by index.
    kept (n,) bool or None for all: which environments took a step at all.
    """

    next_obs: NDArray[Any]
    obs: NDArray[Any]
    reward: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    success: Mapping[int, bool | None]
    kept: NDArray[np.bool_] | None = None


class VectorAdapter:
    """Base of the adapters: action scaling, checks, episode accounting and state.

    Attributes:
        num_envs: n.
        first: number of the first environment among those of all processes; messages and seeds go by that number.
        observation_space: flat `Box` (dim,); `raw_observation_space` is the environments' own.
        action_space: of one environment, `Box` or `Discrete`.
        scale: maps [-1, 1] to a `Box` of actions; None for `Discrete`.
        obs: (n, dim) observations to act on, None before the first reset. A new array at each step: keep it, but do
            not write into it.
        episodes: episodes that finished since `pop_episodes()`.
        make_single: makes one more environment of the same kind, unwrapped, for evaluation; None if unknown.
    """

    kind = ""

    def __init__(
        self,
        num_envs: int,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        seed: int,
        make_single: Callable[[], gym.Env] | None,
        rank: int = 0,
    ) -> None:
        self.num_envs, self.seed, self.make_single = num_envs, seed, make_single
        self.first = rank * num_envs
        self.raw_observation_space, self.action_space = observation_space, action_space
        self.observation_space = flat_space(observation_space)
        if not isinstance(action_space, (Box, Discrete)):
            raise UserError(f"actions must be `Box` or `Discrete`, got `{action_space}`")
        self.scale = ActionScale(action_space) if isinstance(action_space, Box) else None
        self.episodes: list[EpisodeRecord] = []
        self.obs: NDArray[Any] | None = None
        self._index = np.arange(num_envs, dtype=np.int64)
        self._episode = np.full(num_envs, -1, np.int64)  # number of the running episode of each environment
        self._last_action: NDArray[Any] | None = None  # (n, *shape), as the environments get it
        self._steps, self._length = np.zeros((2, num_envs), np.int64)
        self._return = np.zeros(num_envs, np.float64)

    # - for subclasses -

    def _reset(self) -> NDArray[Any]:
        """Start an episode everywhere; `self._episode` is already counted. Returns new (n, dim)."""
        raise NotImplementedError

    def _step(self, actions: NDArray[Any]) -> Outcome:
        """Step with actions of the environments' own space, (n, *shape)."""
        raise NotImplementedError

    def _save(self) -> dict[str, Any]:
        """What a source adds to the state."""
        return {}

    def _restore(self, state: Mapping[str, Any]) -> list[str]:
        """Set `self.obs` and return messages; the counters are already restored."""
        self._begin(np.ones(self.num_envs, np.bool_))
        self.obs = self._reset()
        return ["the environments cannot restore their state and were reset"]

    def close(self) -> None:
        """Close what was made here; environment objects of the user stay open."""

    def get_attr(self, name: str) -> list[Any]:
        """An attribute of every environment, of a wrapper around it if that has it.

        An environment whose attributes or methods change how it goes on cannot be restored exactly in mid-episode.
        """
        raise self._closed_to(name)

    def is_wrapped(self, wrapper_class: type) -> list[bool]:
        """Whether each environment has a wrapper of this class around it."""
        raise self._closed_to(wrapper_class.__name__)

    def set_attr(self, name: str, value: Any, indices: Sequence[int]) -> None:
        """Set an attribute of some environments."""
        raise self._closed_to(name)

    def env_method(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], indices: Sequence[int]
    ) -> list[Any]:
        """Call a method of some environments; -> what each returned."""
        raise self._closed_to(name)

    def _closed_to(self, name: str) -> UserError:
        return UserError(f"`{name}`: the environments of a given vector environment are reached through that object")

    # - the interface -

    def reset(self) -> NDArray[Any]:
        """Start a new episode everywhere; returns `obs`."""
        self._begin(np.ones(self.num_envs, np.bool_))
        obs = self._reset()
        self._check_finite(obs, obs, np.zeros(self.num_envs), None)
        self.obs = obs
        return obs

    def step(self, actions: Any) -> Rows:
        """One step everywhere.

        Args:
            actions: (n, action_dim) in [-1, 1] for `Box`; (n,) integers 0 … n_actions - 1 for `Discrete`.

        Returns:
            A row per finished transition, at most n: `obs, next_obs` (dim,) in the dtype of the space; `action`,
            float32 as given (not clipped) or int64; `reward` float32; `terminated, truncated` bool; `episode` int64,
            unique here: number of the episode in its environment * n + `env`; `env` int64, 0 … n - 1.

        Raises:
            EnvError: an environment failed or produced NaN or infinity; nothing of this step is returned.
            DivergenceError: an action is not finite.
        """
        before = self.obs
        if before is None:
            raise UserError("the environments were not reset: call `reset()` first")
        action, env_action = self._convert(actions)
        self._last_action = env_action
        outcome = self._step(env_action)
        reward = outcome.reward.astype(np.float32)
        self._check_finite(outcome.next_obs, outcome.obs, reward, outcome)
        done = outcome.terminated | outcome.truncated
        rows: Rows = {
            "obs": before,
            "action": action,
            "reward": reward,
            "next_obs": outcome.next_obs,
            "terminated": outcome.terminated,
            "truncated": outcome.truncated,
            "episode": self._episode * self.num_envs + self._index,
            "env": self._index.copy(),
        }
        if outcome.kept is None:
            self._steps += 1
            self._length += 1
            self._return += outcome.reward
        else:
            done &= outcome.kept
            rows = {name: column[outcome.kept] for name, column in rows.items()}
            self._steps += outcome.kept
            self._length += outcome.kept
            self._return += np.where(outcome.kept, outcome.reward, 0.0)
        if np.count_nonzero(done):
            for i in np.flatnonzero(done).tolist():
                record = EpisodeRecord(float(self._return[i]), int(self._length[i]), i, outcome.success.get(i))
                self.episodes.append(record)
            self._begin(done)
        self.obs = outcome.obs
        return rows

    def pop_episodes(self) -> list[EpisodeRecord]:
        """The episodes that finished since the last call, in order of time."""
        finished, self.episodes = self.episodes, []
        return finished

    def state_dict(self) -> dict[str, Any]:
        """Counters and, where they can be restored, the environments; scalars, lists, dicts and arrays only."""
        successes = [-1 if e.success is None else int(e.success) for e in self.episodes]
        return {
            "kind": self.kind,
            "num_envs": self.num_envs,
            "started": self.obs is not None,
            "episode": self._episode.copy(),
            "steps": self._steps.copy(),
            "length": self._length.copy(),
            "return": self._return.copy(),
            "finished": {
                "return": np.array([e.return_ for e in self.episodes], np.float64),
                "length": np.array([e.length for e in self.episodes], np.int64),
                "env": np.array([e.env for e in self.episodes], np.int64),
                "success": np.array(successes, np.int8),
            },
            **self._save(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Continue from `state_dict()`.

        Returns:
            A message for each environment that could not be restored and began a new episode.

        Raises:
            CheckpointError: the state is malformed or of another number of environments.
        """
        n = self.num_envs
        if (saved := entry(state, "num_envs", int)) != n:
            raise CheckpointError(f"the checkpoint has {saved} environments, this run has {n}; give the same `n_envs`")
        self._episode = column(state, "episode", np.int64, n)
        self._steps = column(state, "steps", np.int64, n)
        self._length = column(state, "length", np.int64, n)
        self._return = column(state, "return", np.float64, n)
        finished = entry(state, "finished", Mapping)
        count = len(entry(finished, "return", np.ndarray))
        types: tuple[tuple[str, type], ...] = (
            ("return", np.float64),
            ("length", np.int64),
            ("env", np.int64),
            ("success", np.int8),
        )
        columns = [column(finished, name, dtype, count).tolist() for name, dtype in types]
        self.episodes = [EpisodeRecord(r, k, i, None if s < 0 else s > 0) for r, k, i, s in zip(*columns, strict=True)]
        if not entry(state, "started", bool):
            self.obs = None
            return []
        messages = self._restore(state)
        assert self.obs is not None  # set by `_restore`
        self._check_finite(self.obs, self.obs, np.zeros(n), None)
        return messages

    @property
    def last_action(self) -> NDArray[Any] | None:
        """(n, *shape) of the last step, as the environments got it."""
        return self._last_action

    # - shared parts -

    def _begin(self, which: NDArray[np.bool_]) -> None:
        """Count a new episode where `which`."""
        self._episode = self._episode + which
        self._return[which] = 0.0
        self._length[which] = 0

    def _convert(self, actions: Any) -> tuple[NDArray[Any], NDArray[Any]]:
        """(row actions, actions for the environments), both new arrays."""
        if self.scale is None:
            action = np.array(actions, dtype=np.int64)
            if action.shape != (self.num_envs,):
                raise UserError(f"actions have shape {action.shape}, expected ({self.num_envs},)")
            return action, action + self.action_space.start
        action = np.array(actions, dtype=np.float32)
        if action.shape != (self.num_envs, self.scale.dim):
            raise UserError(f"actions have shape {action.shape}, expected ({self.num_envs}, {self.scale.dim})")
        if not _finite(action):
            env, dim = np.argwhere(~np.isfinite(action))[0].tolist()
            place = f"action[{dim}] for environment {self.first + env}"
            raise DivergenceError(f"the policy's {place} is {action[env, dim]}")
        return action, self.scale.to_env(action)

    def _check_finite(
        self, next_obs: NDArray[Any], obs: NDArray[Any], reward: NDArray[Any], outcome: Outcome | None
    ) -> None:
        kept = None if outcome is None else outcome.kept
        if _finite(next_obs) and (obs is next_obs or _finite(obs)):
            if _finite(reward) or (kept is not None and _finite(reward[kept])):
                return
            env = int(np.flatnonzero(~np.isfinite(reward) if kept is None else ~np.isfinite(reward) & kept)[0])
            value = reward[env] if outcome is None else outcome.reward[env]
            note = " (too large for float32)" if np.isfinite(value) else ""
            what, step = f"reward = {value}{note}", int(self._steps[env]) + 1
        else:
            wrong = obs if _finite(next_obs) else next_obs
            env, dim = np.argwhere(~np.isfinite(wrong))[0].tolist()
            after = "" if wrong is next_obs and outcome is not None else " after reset"
            what, step = f"obs[{dim}] = {wrong[env, dim]}{after}", int(self._steps[env]) + (outcome is not None)
        raise EnvError(f"env {self.first + env}, step {step}, {what}; last action {self._show_last(env)}")

    def _show_last(self, env: int | None = None) -> str:
        if self._last_action is None:
            return "none yet"
        return show_action(self._last_action if env is None else self._last_action[env])


def _finite(array: NDArray[Any]) -> bool:
    """Is every entry finite? The square sum is the quick answer; it overflows for very large entries."""
    return math.isfinite(np.vdot(array, array)) or bool(np.isfinite(array).all())


def entry(state: Mapping[str, Any], key: str, kind: type) -> Any:
    if not isinstance(state, Mapping) or not isinstance(state.get(key), kind):
        raise CheckpointError(f"state of the environments: `{key}` is missing or not a {kind.__name__}")
    return state[key]


def column(state: Mapping[str, Any], key: str, dtype: type, n: int) -> NDArray[Any]:
    value = entry(state, key, np.ndarray)
    if value.shape != (n,) or value.dtype != dtype:
        raise CheckpointError(
            f"state of the environments: `{key}` is {value.dtype}{value.shape}, expected {np.dtype(dtype)}({n},)"
        )
    return value.copy()


def success_of(info: Any, i: int) -> bool | None:
    """`is_success` of environment `i` in a vector environment's info: a dict of arrays, or an array of dicts."""
    if not isinstance(info, Mapping):
        info, i = {k: [v] for k, v in (info[i] or {}).items()}, 0
    if "is_success" not in info or ("_is_success" in info and not info["_is_success"][i]):
        return None
    return None if info["is_success"][i] is None else bool(info["is_success"][i])
