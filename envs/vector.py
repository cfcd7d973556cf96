"""Vector environments of every kind as one: `step(actions)` returns complete transitions.

A row holds the observation acted on, the action, what it led to (the true final observation at the end of an episode)
and how the episode ended, whatever the source does about resets:

| adapter | source | state |
|---|---|---|
| `TrackedAdapter` | environments that are made or wrapped here, in this process or in workers | restored exactly |
| `GymVectorAdapter` | a `gymnasium.vector.VectorEnv` in any of the three autoreset modes | reset |
| `SB3Adapter` | a Stable-Baselines3 `VecEnv` | reset |

Returns and lengths of episodes are counted here, in float64; NaN and infinity are refused before a row exists.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from rlkit.envs.spaces import ActionScale, flat_space, flatten_obs
from rlkit.envs.tracked import Hang, Maker, TrackedEnv, show_action, with_deadline
from rlkit.errors import CheckpointError, DivergenceError, EnvError, RlkitError, UserError

MARGIN = 5.0  # seconds that a worker gets to report its own timeout before it is taken for dead
GRACE = 5.0  # seconds that workers get to close their environments before they are killed
REPLAY_CHUNK = 5.0  # seconds of replay between two signs of life

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

    next_obs (n, dim): where each action led to. obs (n, dim): what to act on next; the same object if nothing was reset.
    reward (n,) float64; terminated, truncated (n,) bool; success: of finished episodes, by index.
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
        observation_space: flat `Box` (dim,); `raw_observation_space` is the environments' own.
        action_space: of one environment, `Box` or `Discrete`.
        scale: maps [-1, 1] to a `Box` of actions; None for `Discrete`.
        obs: (n, dim) observations to act on. A new array at each step: keep it, but do not write into it.
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
    ) -> None:
        self.num_envs, self.seed, self.make_single = num_envs, seed, make_single
        self.raw_observation_space, self.action_space = observation_space, action_space
        self.observation_space = flat_space(observation_space)
        if not isinstance(action_space, (Box, Discrete)):
            raise UserError(f"actions must be `Box` or `Discrete`, got `{action_space}`")
        self.scale = ActionScale(action_space) if isinstance(action_space, Box) else None
        self.episodes: list[EpisodeRecord] = []
        self._obs: NDArray[Any] | None = None
        self._index = np.arange(num_envs, dtype=np.int64)
        self._episode = np.full(num_envs, -1, np.int64)  # number of the running episode of each environment
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
        """Set `self._obs` and return messages; the counters are already restored."""
        self._begin(np.ones(self.num_envs, np.bool_))
        self._obs = self._reset()
        return ["the environments cannot restore their state and were reset"]

    def close(self) -> None:
        """Close what was made here; environment objects of the user stay open."""

    # - the interface -

    @property
    def obs(self) -> NDArray[Any]:
        if self._obs is None:
            raise UserError("the environments were not reset: call `reset()` first")
        return self._obs

    def reset(self) -> NDArray[Any]:
        """Start a new episode everywhere; returns `obs`."""
        self._begin(np.ones(self.num_envs, np.bool_))
        obs = self._reset()
        self._check_finite(obs, obs, np.zeros(self.num_envs), None)
        self._obs = obs
        return obs

    def step(self, actions: Any) -> Rows:
        """One step everywhere.

        Args:
            actions: (n, action_dim) in [-1, 1] for `Box`; (n,) integers 0 … n_actions - 1 for `Discrete`.

        Returns:
            A row per finished transition, at most n: `obs, next_obs` (dim,) in the dtype of the space; `action`,
            float32 as given (not clipped) or int64; `reward` float32; `terminated, truncated` bool; `episode` int64,
            unique: number of the episode in its environment * n + `env`; `env` int64.

        Raises:
            EnvError: an environment failed or produced NaN or infinity; nothing of this step is returned.
            DivergenceError: an action is not finite.
        """
        before = self.obs
        action, env_action = self._convert(actions)
        self._last_action = env_action
        outcome = self._step(env_action)
        with np.errstate(over="ignore"):
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
        if done.any():
            for i in np.flatnonzero(done).tolist():
                record = EpisodeRecord(float(self._return[i]), int(self._length[i]), i, outcome.success.get(i))
                self.episodes.append(record)
            self._begin(done)
        self._obs = outcome.obs
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
            "started": self._obs is not None,
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
        if (saved := _entry(state, "num_envs", int)) != n:
            raise CheckpointError(f"the checkpoint has {saved} environments, this run has {n}; give the same `n_envs`")
        self._episode = _column(state, "episode", np.int64, n)
        self._steps = _column(state, "steps", np.int64, n)
        self._length = _column(state, "length", np.int64, n)
        self._return = _column(state, "return", np.float64, n)
        finished = _entry(state, "finished", Mapping)
        count = len(_entry(finished, "return", np.ndarray))
        types: tuple[tuple[str, type], ...] = (
            ("return", np.float64),
            ("length", np.int64),
            ("env", np.int64),
            ("success", np.int8),
        )
        columns = [_column(finished, name, dtype, count).tolist() for name, dtype in types]
        self.episodes = [EpisodeRecord(r, k, i, None if s < 0 else s > 0) for r, k, i, s in zip(*columns, strict=True)]
        if not _entry(state, "started", bool):
            self._obs = None
            return []
        return self._restore(state)

    # - shared parts -

    def _begin(self, which: NDArray[np.bool_]) -> None:
        """Count a new episode where `which`."""
        self._episode = self._episode + which
        self._return[which] = 0.0
        self._length[which] = 0

    _last_action: NDArray[Any] | None = None

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
        if not np.isfinite(action).all():
            env, dim = np.argwhere(~np.isfinite(action))[0].tolist()
            raise DivergenceError(f"the policy's action[{dim}] for environment {env} is {action[env, dim]}")
        return action, self.scale.to_env(action)

    def _check_finite(
        self, next_obs: NDArray[Any], obs: NDArray[Any], reward: NDArray[Any], outcome: Outcome | None
    ) -> None:
        kept = None if outcome is None else outcome.kept
        if np.isfinite(next_obs).all() and (obs is next_obs or np.isfinite(obs).all()):
            if np.isfinite(reward).all() or (kept is not None and np.isfinite(reward[kept]).all()):
                return
            env = int(np.flatnonzero(~np.isfinite(reward) if kept is None else ~np.isfinite(reward) & kept)[0])
            value = reward[env] if outcome is None else outcome.reward[env]
            note = " (too large for float32)" if np.isfinite(value) else ""
            what, step = f"reward = {value}{note}", int(self._steps[env]) + 1
        else:
            wrong = next_obs if not np.isfinite(next_obs).all() else obs
            env, dim = np.argwhere(~np.isfinite(wrong))[0].tolist()
            after = "" if wrong is next_obs and outcome is not None else " after reset"
            what, step = f"obs[{dim}] = {wrong[env, dim]}{after}", int(self._steps[env]) + (outcome is not None)
        raise EnvError(f"env {env}, step {step}, {what}; last action {self._show_last(env)}")

    def _show_last(self, env: int | None = None) -> str:
        if self._last_action is None:
            return "none yet"
        return show_action(self._last_action if env is None else self._last_action[env])


def _entry(state: Mapping[str, Any], key: str, kind: type) -> Any:
    if not isinstance(state, Mapping) or not isinstance(state.get(key), kind):
        raise CheckpointError(f"state of the environments: `{key}` is missing or not a {kind.__name__}")
    return state[key]


def _column(state: Mapping[str, Any], key: str, dtype: type, n: int) -> NDArray[Any]:
    value = _entry(state, key, np.ndarray)
    if value.shape != (n,) or value.dtype != dtype:
        raise CheckpointError(
            f"state of the environments: `{key}` is {value.dtype}{value.shape}, expected {np.dtype(dtype)}({n},)"
        )
    return value.copy()


# --- environments of ours ----------------------------------------------------------------------------------------


class TrackedAdapter(VectorAdapter):
    """n environments, each in a `TrackedEnv`, in this process or in one worker process each.

    Args:
        thunks: make the environments; or `envs`, made already (they are not closed by `close`).
        workers: True for worker processes.
        timeout: seconds that a `step` or `reset` of an environment may take; 0 for no limit.
    """

    kind = "tracked"

    def __init__(
        self,
        thunks: Sequence[Callable[[], gym.Env]],
        seed: int,
        *,
        workers: bool = False,
        timeout: float = 0.0,
        make_single: Callable[[], gym.Env] | None = None,
        owned: bool = True,
    ) -> None:
        self._timeout, self._owned, self._closed = timeout, owned, False
        makers = [Maker(thunk, i, timeout) for i, thunk in enumerate(thunks)]
        self._workers: _Workers | None = _Workers(makers) if workers else None
        self._venv: VectorEnv = self._workers or _in_process(makers)
        try:
            raw = self._call("get_attr", "raw_observation_space")[0]
            super().__init__(len(makers), raw, self._venv.single_action_space, seed, make_single)
        except BaseException:
            self.close()
            raise

    def _reset(self) -> NDArray[Any]:
        return self._reset_where(np.ones(self.num_envs, np.bool_), self._episode)

    def _reset_where(self, which: NDArray[np.bool_], episode: NDArray[np.int64]) -> NDArray[Any]:
        seeds = [
            episode_seed(self.seed, i, int(episode[i])) if chosen else None for i, chosen in enumerate(which.tolist())
        ]
        obs, _ = self._call("reset", seed=seeds, options={"reset_mask": which.copy()})
        return np.array(obs)

    def _step(self, actions: NDArray[Any]) -> Outcome:
        obs, reward, terminated, truncated, info = self._call("step", actions)
        next_obs = current = np.array(obs)  # the vector environment writes into the same array at the next call
        done = terminated | truncated
        success: dict[int, bool | None] = {}
        if done.any():
            current = self._reset_where(done, self._episode + 1)
            if "is_success" in info:
                success = {i: bool(info["is_success"][i]) for i in np.flatnonzero(info["_is_success"]).tolist()}
        return Outcome(next_obs, current, reward, terminated, truncated, success)

    def _save(self) -> dict[str, Any]:
        return {"envs": list(self._call("get_attr", "replay_state")) if self._obs is not None else []}

    def _restore(self, state: Mapping[str, Any]) -> list[str]:
        if state.get("kind") != self.kind:
            return super()._restore(state)
        saved = [_replay_state(s) for s in _entry(state, "envs", list)]
        if len(saved) != self.num_envs:
            raise CheckpointError(f"state of the environments: {len(saved)} of {self.num_envs} environments")
        following = [episode_seed(self.seed, i, int(e) + 1) for i, e in enumerate(self._episode)]
        self._call("set_attr", "replay_state", [{**s, "next_seed": n} for s, n in zip(saved, following, strict=True)])
        reports: list[dict[str, Any] | None] = [None] * self.num_envs
        while None in reports:
            news = self._call("call", "continue_replay", REPLAY_CHUNK, waiting=list(reports))
            reports = [old or new for old, new in zip(reports, news, strict=True)]
        done = [report for report in reports if report is not None]
        failed = np.array([bool(report["problem"]) for report in done])
        self._begin(failed)
        self._obs = np.stack([report["obs"] for report in done])
        return [
            f"environment {i} cannot restore its state and was reset ({report['problem']})"
            for i, report in enumerate(done)
            if report["problem"]
        ]

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._workers is not None or self._owned:
            self._venv.close()
