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
import math
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
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv
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
    ) -> None:
        self.num_envs, self.seed, self.make_single = num_envs, seed, make_single
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
            unique: number of the episode in its environment * n + `env`; `env` int64.

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
            self.obs = None
            return []
        messages = self._restore(state)
        assert self.obs is not None  # set by `_restore`
        self._check_finite(self.obs, self.obs, np.zeros(n), None)
        return messages

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
            raise DivergenceError(f"the policy's action[{dim}] for environment {env} is {action[env, dim]}")
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
        raise EnvError(f"env {env}, step {step}, {what}; last action {self._show_last(env)}")

    def _show_last(self, env: int | None = None) -> str:
        if self._last_action is None:
            return "none yet"
        return show_action(self._last_action if env is None else self._last_action[env])


def _finite(array: NDArray[Any]) -> bool:
    """Is every entry finite? The square sum is the quick answer; it overflows for very large entries."""
    return math.isfinite(np.vdot(array, array)) or bool(np.isfinite(array).all())


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
        thunks: make the environments.
        workers: True for worker processes.
        timeout: seconds that a `step` or `reset` of an environment may take; 0 for no limit.
        owned: False if the environments are objects of the user's, which `close` leaves open.
    """

    kind = "tracked"

    def __init__(
        self,
        thunks: Sequence[Callable[[], gym.Env]],
        seed: int = 0,
        *,
        workers: bool = False,
        timeout: float = 0.0,
        make_single: Callable[[], gym.Env] | None = None,
        owned: bool = True,
    ) -> None:
        self._owned = owned
        makers = [Maker(thunk, i, timeout) for i, thunk in enumerate(thunks)]
        self._venv: _Local | _Workers = _Workers(makers, timeout) if workers else _Local(makers)
        try:
            raw = self._venv.get_attr("raw_observation_space")[0]
            super().__init__(len(makers), raw, self._venv.single_action_space, seed, make_single)
        except BaseException:
            self.close()
            raise

    def _reset(self) -> NDArray[Any]:
        return self._reset_where(np.ones(self.num_envs, np.bool_), self._episode)

    def _reset_where(self, which: NDArray[np.bool_], episode: NDArray[np.int64]) -> NDArray[Any]:
        """Start the given episodes where `which`; returns all observations, a new (n, dim)."""
        seeds = [
            episode_seed(self.seed, i, int(episode[i])) if chosen else None for i, chosen in enumerate(which.tolist())
        ]
        obs, _ = self._venv.reset(seed=seeds, options={"reset_mask": which})
        return np.array(obs)  # a copy: the vector environment keeps writing into its array

    def _step(self, actions: NDArray[Any]) -> Outcome:
        obs, reward, terminated, truncated, info = self._venv.step(actions)
        next_obs = current = np.array(obs)
        done = terminated | truncated
        success: dict[int, bool | None] = {}
        if np.count_nonzero(done):
            current = self._reset_where(done, self._episode + 1)
            success = {i: _success(info, i) for i in np.flatnonzero(done).tolist()}
        return Outcome(next_obs, current, reward, terminated, truncated, success)

    def _save(self) -> dict[str, Any]:
        return {"envs": list(self._venv.get_attr("replay_state")) if self.obs is not None else []}

    def _restore(self, state: Mapping[str, Any]) -> list[str]:
        if state.get("kind") != self.kind:
            return super()._restore(state)
        saved = [_replay_state(s) for s in _entry(state, "envs", list)]
        if len(saved) != self.num_envs:
            raise CheckpointError(f"state of the environments: `envs` has {len(saved)} entries, not {self.num_envs}")
        following = [episode_seed(self.seed, i, int(e) + 1) for i, e in enumerate(self._episode)]
        self._venv.set_attr("replay_state", [{**s, "next_seed": n} for s, n in zip(saved, following, strict=True)])
        while True:
            reports = self._venv.call("continue_replay", REPLAY_CHUNK)
            if all(report is not None for report in reports):
                break
        self._begin(np.array([bool(report["problem"]) for report in reports]))
        self.obs = np.stack([report["obs"] for report in reports])
        self._venv.set_observations(self.obs)
        return [
            f"environment {i} cannot restore its state and was reset ({report['problem']})"
            for i, report in enumerate(reports)
            if report["problem"]
        ]

    def close(self) -> None:
        if self._owned:
            self._venv.close()


def _replay_state(state: Any) -> Mapping[str, Any]:
    """Check the types of what `TrackedEnv.replay_state` saved; its values are checked by the replay itself."""
    _entry(state, "actions", np.ndarray)
    _entry(state, "obs", np.ndarray)
    _entry(state, "return", float)
    _entry(state, "steps", int)
    if state.get("seed") is not None:
        _entry(state, "seed", int)
    checked: Mapping[str, Any] = state
    return checked


class _Local:
    """The environments in this process, with the interface of `_Workers`.

    A loop of its own: for one environment, `gymnasium.vector.SyncVectorEnv` costs more than stepping Pendulum does.
    """

    def __init__(self, makers: Sequence[Maker]) -> None:
        self.envs: list[TrackedEnv] = []
        try:
            for make in makers:
                self.envs.append(make())  # one by one: those already made are closed if a later one fails
            _check_alike(self.envs)
        except BaseException:
            self.close()
            raise
        self.single_action_space = self.envs[0].action_space
        space = self.envs[0].observation_space
        self._obs = np.zeros((len(self.envs), *space.shape), space.dtype)

    def step(self, actions: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        n = len(self.envs)
        obs, reward, info = self._obs, np.empty(n, np.float64), np.empty(n, object)
        terminated, truncated = np.empty(n, np.bool_), np.empty(n, np.bool_)
        for i, env in enumerate(self.envs):
            obs[i], reward[i], terminated[i], truncated[i], info[i] = env.step(actions[i])
        return obs, reward, terminated, truncated, info

    def reset(self, *, seed: Sequence[int | None], options: Mapping[str, Any]) -> tuple[NDArray[Any], dict[str, Any]]:
        for i in np.flatnonzero(options["reset_mask"]).tolist():
            self._obs[i], _ = self.envs[i].reset(seed=seed[i])
        return self._obs, {}

    def get_attr(self, name: str) -> tuple[Any, ...]:
        return tuple(getattr(env, name) for env in self.envs)

    def set_attr(self, name: str, values: Sequence[Any]) -> None:
        for env, value in zip(self.envs, values, strict=True):
            setattr(env, name, value)

    def call(self, name: str, *args: Any) -> tuple[Any, ...]:
        return tuple(getattr(env, name)(*args) for env in self.envs)

    def set_observations(self, obs: NDArray[Any]) -> None:
        self._obs = obs.copy()

    def close(self) -> None:
        for env in self.envs:
            env.close()


def _check_alike(envs: Sequence[TrackedEnv]) -> None:
    for i, env in enumerate(envs):
        if any(env.unwrapped is other.unwrapped for other in envs[:i]):
            raise UserError(f"environment {i} is the same object as an earlier one; each thunk must make its own")
        for what in ("observation_space", "action_space"):
            first, own = getattr(envs[0], what), getattr(env, what)
            if own != first:
                raise UserError(f"environments 0 and {i} differ in their {what.replace('_', ' ')}s: {first} and {own}")


# --- worker processes --------------------------------------------------------------------------------------------

_running: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register  # before multiprocessing's own exit function, which would wait for workers that ignore SIGTERM
def _close_all() -> None:
    for workers in list(_running):
        workers.close(terminate=True)


class _Workers(AsyncVectorEnv):
    """gymnasium's worker processes with deadlines, and errors that say which worker failed, how, and at which action.

    The worker's own alarm (`TrackedEnv`) is the first to notice a hang and knows best; `MARGIN` later its process is
    taken for dead. Workers ignore SIGTERM, so they are asked to close and then killed.
    """

    def __init__(self, makers: Sequence[Maker], timeout: float) -> None:
        self.processes: list[Any] = []
        self.parent_pipes: list[Any] = []
        self._owner, self._timeout, self._failed = os.getpid(), timeout, False
        self._last: NDArray[Any] | None = None
        methods = multiprocessing.get_all_start_methods()
        # Not "fork": children would inherit threads' locks and the pipes of their siblings.
        context = "forkserver" if "forkserver" in methods else "spawn"
        _running.add(self)
        try:
            super().__init__(
                makers, shared_memory=False, copy=False, context=context, autoreset_mode=AutoresetMode.DISABLED
            )
        except BaseException as error:
            self._failed = True
            cause = self._explain_start(error)
            self._kill(0.0)
            self.closed = True
            if cause is error:
                raise
            raise cause from error

    def _explain_start(self, error: BaseException) -> BaseException:
        if isinstance(error, RlkitError) or not isinstance(error, Exception):
            return error
        if isinstance(error, (EOFError, OSError)):
            return _lost(
                self.processes,
                None,
                "while it made its environment; see its output above. Where that says `bootstrapping phase`, put the "
                'script\'s code under `if __name__ == "__main__":`',
            ) or EnvError(f"a worker process could not be started: {error!r}")
        if isinstance(error, RuntimeError) and "spaces" in str(error):
            return UserError(f"the environments differ in their spaces: {error}")
        if self.processes and self.processes[-1].pid is None:
            return UserError(
                f"environment {len(self.processes) - 1} cannot be sent to a worker process ({type(error).__name__}: "
                f'{error}); use vectorization_mode="sync" or make it from scratch in the thunk'
            )
        return EnvError(f"the worker processes could not be started: {type(error).__name__}: {error}")

    def step(self, actions: Any) -> Any:
        self._last = actions
        return self._watched("step", lambda limit: (self.step_async(actions), self.step_wait(limit))[1])

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        return self._watched("reset", lambda limit: (self.reset_async(seed, options), self.reset_wait(limit))[1])

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        def run(limit: float | None) -> Any:
            self.call_async(name, *args, **kwargs)
            # `continue_replay` works for its chunk, a step, and at worst a reset.
            return self.call_wait(None if limit is None else REPLAY_CHUNK + 2 * limit)

        return self._watched(name, run)

    def set_attr(self, name: str, values: Any) -> None:
        self._watched(name, lambda limit: AsyncVectorEnv.set_attr(self, name, values))

    def set_observations(self, obs: NDArray[Any]) -> None:
        self.observations = obs.copy()

    def _watched(self, call: str, run: Callable[[float | None], Any]) -> Any:
        try:
            return run(self._timeout + MARGIN if self._timeout else None)
        except BaseException as error:
            self._failed = True
            if isinstance(error, RlkitError):
                raise EnvError(str(error)) from None  # it comes from a worker, with the traceback in its text
            if isinstance(error, multiprocessing.TimeoutError):
                silent = [i for i, pipe in enumerate(self.parent_pipes) if pipe is not None and not pipe.poll()]
                raise EnvError(
                    f"environment {', '.join(map(str, silent))} did not return from {call} within {self._timeout:g} s "
                    f"and its worker process does not answer; last action {self._show_last(silent)}"
                ) from None
            if isinstance(error, (EOFError, OSError)):
                lost = _lost(self.processes, self._last, f"in {call}")
                raise lost or EnvError(f"a worker process closed its connection in {call}: {error!r}") from None
            if isinstance(error, Exception):
                raise EnvError(f"the worker processes failed in {call}: {type(error).__name__}: {error}") from error
            raise

    def _show_last(self, which: list[int]) -> str:
        return "none yet" if self._last is None else ", ".join(show_action(self._last[i]) for i in which)

    def _raise_if_errors(self, successes: Any) -> None:
        level, gym.logger.min_level = gym.logger.min_level, gym.logger.ERROR + 1  # we say it ourselves
        try:
            super()._raise_if_errors(successes)
        finally:
            gym.logger.min_level = level

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        if os.getpid() != self._owner:
            return  # a fork of the owner: the workers are not ours
        grace = GRACE if timeout is None else timeout
        self._kill(0.0 if terminate else min(1.0, grace) if self._failed else grace)

    def _kill(self, grace: float) -> None:
        """Ask the workers to close, wait for `grace` seconds, kill the rest."""
        end = time.monotonic() + grace
        for pipe in self.parent_pipes if grace else ():
            try:
                if pipe is not None:
                    pipe.send(("close", None))
            except OSError:
                pass  # it is gone already
        for process in self.processes:
            if process.pid is None:
                continue  # never started
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in self.parent_pipes:
            if pipe is not None:
                pipe.close()
        if hasattr(self, "error_queue"):
            self.error_queue.close()
            self.error_queue.cancel_join_thread()
        _running.discard(self)


def _lost(processes: Sequence[Any], last: NDArray[Any] | None, where: str) -> EnvError | None:
    """The error for a worker process that died, or None if all of them live."""
    multiprocessing.connection.wait([p.sentinel for p in processes if p.pid is not None], timeout=2.0)
    for i, process in enumerate(processes):
        code = process.exitcode if process.pid is not None else None
        if code is None:
            continue
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown signal"
            how = f"was killed (exit code {code}, {name}) {where}"
            if name == "SIGKILL":
                how += " (often by the system, for lack of memory)"
        else:
            how = f"ended (exit code {code}) {where}"
        action = "none yet" if last is None else show_action(last[i])
        return EnvError(f"environment {i}: its worker process {how}; last action {action}")
    return None


# --- vector environments of the user -----------------------------------------------------------------------------


class _GivenAdapter(VectorAdapter):
    """What the two kinds of given vector environments share: their errors, their seeds, no exact state.

    `timeout` covers one call, for all of its environments; `close` leaves the vector environment to its owner.
    """

    def __init__(
        self,
        venv: Any,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        seed: int,
        timeout: float,
        make_single: Callable[[], gym.Env] | None,
    ) -> None:
        super().__init__(venv.num_envs, observation_space, action_space, seed, make_single)
        self._venv, self._timeout, self._resets = venv, timeout, 0

    def _next_seed(self) -> int:
        """Another seed for each whole reset, so that a resumed run does not repeat its first episodes."""
        self._resets += 1
        return episode_seed(self.seed, self.num_envs, self._resets)

    def _flat(self, obs: Any) -> NDArray[Any]:
        try:
            return np.array(flatten_obs(self.raw_observation_space, obs, self.num_envs))
        except (TypeError, ValueError, KeyError) as error:
            raise EnvError(
                f"the vector environment returned observations that are not of its space: {error}"
            ) from error

    def _flat_one(self, obs: Any, env: int) -> NDArray[Any]:
        try:
            return flatten_obs(self.raw_observation_space, obs)
        except (TypeError, ValueError, KeyError) as error:
            raise EnvError(f"environment {env}: its final observation is not of its space: {error}") from error

    def _call(self, call: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return with_deadline(self._timeout, partial(getattr(self._venv, call), *args, **kwargs))
        except Hang:
            pipes = getattr(self._venv.unwrapped, "parent_pipes", getattr(self._venv.unwrapped, "remotes", ()))
            silent = ", ".join(str(i) for i, pipe in enumerate(pipes) if pipe is not None and not pipe.poll())
            who = f"environment {silent}" if silent else "the vector environment"
            raise EnvError(
                f"{who} did not return from {call} within {self._timeout:g} s; last actions {self._show_last()}"
            ) from None
        except RlkitError:
            raise
        except Exception as error:
            processes = getattr(self._venv.unwrapped, "processes", None)
            if processes and isinstance(error, (EOFError, OSError)):
                lost = _lost(processes, self._last_action, f"in {call}")
                if lost is not None:
                    raise lost from None
            raise EnvError(
                f"the vector environment raised {type(error).__name__} in {call}: {error}; "
                f"last actions {self._show_last()}"
            ) from error

    def _save(self) -> dict[str, Any]:
        return {"resets": self._resets}

    def _restore(self, state: Mapping[str, Any]) -> list[str]:
        if state.get("kind") == self.kind:
            self._resets = _entry(state, "resets", int)
        super()._restore(state)
        return [
            f"a given {type(self._venv).__name__} cannot restore its state: all {self.num_envs} environments were reset"
        ]


class GymVectorAdapter(_GivenAdapter):
    """A `gymnasium.vector.VectorEnv`, in the autoreset mode that its metadata declare."""

    kind = "gymnasium"

    def __init__(
        self,
        venv: VectorEnv,
        seed: int = 0,
        *,
        timeout: float = 0.0,
        make_single: Callable[[], gym.Env] | None = None,
    ) -> None:
        declared = (venv.metadata or {}).get("autoreset_mode")
        try:
            self.mode = AutoresetMode(declared)
        except ValueError:
            raise UserError(
                f"{type(venv).__name__} does not say how its environments are reset "
                f'(metadata["autoreset_mode"] is {declared!r}); set it to a gymnasium.vector.AutoresetMode: NEXT_STEP, '
                f"SAME_STEP or DISABLED"
            ) from None
        super().__init__(venv, venv.single_observation_space, venv.single_action_space, seed, timeout, make_single)
        self._resetting = np.zeros(self.num_envs, np.bool_)  # NEXT_STEP: where the next step is only a reset

    def _reset(self) -> NDArray[Any]:
        obs, _ = self._call("reset", seed=self._next_seed())
        self._resetting = np.zeros(self.num_envs, np.bool_)
        return self._flat(obs)

    def _step(self, actions: NDArray[Any]) -> Outcome:
        raw, reward, terminated, truncated, info = self._call("step", actions)
        next_obs = current = self._flat(raw)
        reward = np.array(reward, np.float64)
        terminated, truncated = np.array(terminated, np.bool_), np.array(truncated, np.bool_)
        done = terminated | truncated
        kept = None
        if self.mode is AutoresetMode.NEXT_STEP:
            kept = ~self._resetting if self._resetting.any() else None
            self._resetting = done
        ended = np.flatnonzero(done).tolist()
        final_info = info.get("final_info", info) if self.mode is AutoresetMode.SAME_STEP else info
        success = {i: _success(final_info, i) for i in ended}
        if ended and self.mode is AutoresetMode.SAME_STEP:
            next_obs = current.copy()
            for i in ended:
                next_obs[i] = self._final(info, i)
        elif ended and self.mode is AutoresetMode.DISABLED:
            obs, _ = self._call("reset", options={"reset_mask": done.copy()})
            current = self._flat(obs)
        return Outcome(next_obs, current, reward, terminated, truncated, success, kept)

    def _final(self, info: Mapping[str, Any], i: int) -> NDArray[Any]:
        final, present = info.get("final_obs"), info.get("_final_obs")
        if isinstance(final, Mapping):  # batched by the environment itself
            one: Any = {key: value[i] for key, value in final.items()}
        else:
            one = None if final is None else final[i]
        if one is None or (present is not None and not present[i]):
            raise EnvError(
                f'environment {i}: the vector environment resets in the same step, but info["final_obs"] has no final '
                f"observation of the episode that ended"
            )
        return self._flat_one(one, i)


class SB3Adapter(_GivenAdapter):
    """A Stable-Baselines3 `VecEnv`, wrappers such as `VecNormalize` included: what it returns is what is stored."""

    kind = "sb3"

    def __init__(self, venv: Any, seed: int = 0, *, timeout: float = 0.0) -> None:
        super().__init__(venv, venv.observation_space, venv.action_space, seed, timeout, None)

    def _reset(self) -> NDArray[Any]:
        self._call("seed", self._next_seed())
        return self._flat(self._call("reset"))

    def _step(self, actions: NDArray[Any]) -> Outcome:
        raw, reward, done, infos = self._call("step", actions)
        next_obs = current = self._flat(raw)
        done = np.array(done, np.bool_)
        truncated = np.zeros(self.num_envs, np.bool_)
        success: dict[int, bool | None] = {}
        if done.any():
            next_obs = current.copy()
            for i in np.flatnonzero(done).tolist():
                info = infos[i]
                if "terminal_observation" not in info:
                    raise EnvError(
                        f'environment {i}: info["terminal_observation"] is missing at the end of its episode'
                    )
                next_obs[i] = self._flat_one(info["terminal_observation"], i)
                truncated[i] = bool(info.get("TimeLimit.truncated", False))
                success[i] = None if info.get("is_success") is None else bool(info["is_success"])
        return Outcome(next_obs, current, np.array(reward, np.float64), done & ~truncated, truncated, success)


def _success(info: Any, i: int) -> bool | None:
    """`is_success` of environment `i` in a vector environment's info: a dict of arrays, or an array of dicts."""
    if not isinstance(info, Mapping):
        info, i = {k: [v] for k, v in (info[i] or {}).items()}, 0
    if "is_success" not in info or ("_is_success" in info and not info["_is_success"][i]):
        return None
    return None if info["is_success"][i] is None else bool(info["is_success"][i])
