"""Environments that are made or wrapped here: stepped in this process or in workers, restored exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from rlkit.envs.tracked import Maker, TrackedEnv
from rlkit.envs.vector import Outcome, VectorAdapter, entry, episode_seed, success_of
from rlkit.envs.workers import REPLAY_CHUNK, Workers
from rlkit.errors import CheckpointError, UserError


class TrackedAdapter(VectorAdapter):
    """n environments, each in a `TrackedEnv`, in this process or in one worker process each.

    Args:
        thunks: make the environments.
        workers: True for worker processes.
        timeout: seconds that a `step` or `reset` of an environment may take; 0 for no limit.
        owned: False if the environments are objects of the user's, which `close` leaves open.
        rank: of this process; see `rlkit.envs.make`.
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
        rank: int = 0,
    ) -> None:
        self._owned = owned
        makers = [Maker(thunk, i, timeout) for i, thunk in enumerate(thunks, start=rank * len(thunks))]
        self._venv: Local | Workers = Workers(makers, timeout) if workers else Local(makers)
        try:
            raw = self._venv.get_attr("raw_observation_space")[0]
            super().__init__(len(makers), raw, self._venv.single_action_space, seed, make_single, rank)
        except BaseException:
            self.close()
            raise

    def _reset(self) -> NDArray[Any]:
        return self._reset_where(np.ones(self.num_envs, np.bool_), self._episode)

    def _reset_where(self, which: NDArray[np.bool_], episode: NDArray[np.int64]) -> NDArray[Any]:
        """Start the given episodes where `which`; returns all observations, a new (n, dim)."""
        seeds = [
            episode_seed(self.seed, self.first + i, int(episode[i])) if chosen else None
            for i, chosen in enumerate(which.tolist())
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
            success = {i: success_of(info, i) for i in np.flatnonzero(done).tolist()}
        return Outcome(next_obs, current, reward, terminated, truncated, success)

    def _save(self) -> dict[str, Any]:
        return {"envs": list(self._venv.get_attr("replay_state")) if self.obs is not None else []}

    def _restore(self, state: Mapping[str, Any]) -> list[str]:
        if state.get("kind") != self.kind:
            return super()._restore(state)
        saved = [_replay_state(s) for s in entry(state, "envs", list)]
        if len(saved) != self.num_envs:
            raise CheckpointError(f"state of the environments: `envs` has {len(saved)} entries, not {self.num_envs}")
        following = [episode_seed(self.seed, self.first + i, int(e) + 1) for i, e in enumerate(self._episode)]
        self._venv.set_attr("replay_state", [{**s, "next_seed": n} for s, n in zip(saved, following, strict=True)])
        while True:
            reports = self._venv.call("continue_replay", REPLAY_CHUNK)
            if all(report is not None for report in reports):
                break
        self._begin(np.array([bool(report["problem"]) for report in reports]))
        self.obs = np.stack([report["obs"] for report in reports])
        self._venv.set_observations(self.obs)
        return [
            f"environment {self.first + i} cannot restore its state and was reset ({report['problem']})"
            for i, report in enumerate(reports)
            if report["problem"]
        ]

    def get_attr(self, name: str) -> list[Any]:
        return list(self._venv.call("inner_attr", name))

    def is_wrapped(self, wrapper_class: type) -> list[bool]:
        return list(self._venv.call("inner_is_wrapped", wrapper_class))

    def set_attr(self, name: str, value: Any, indices: Sequence[int]) -> None:
        self._venv.call("set_inner_attr", name, value, [self.first + i for i in indices])

    def env_method(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], indices: Sequence[int]
    ) -> list[Any]:
        results = self._venv.call("inner_call", name, args, kwargs, [self.first + i for i in indices])
        return [results[i] for i in indices]

    def close(self) -> None:
        if self._owned:
            self._venv.close()


def _replay_state(state: Any) -> Mapping[str, Any]:
    """Check the types of what `TrackedEnv.replay_state` saved; its values are checked by the replay itself."""
    entry(state, "actions", np.ndarray)
    entry(state, "obs", np.ndarray)
    entry(state, "return", float)
    entry(state, "steps", int)
    if state.get("seed") is not None:
        entry(state, "seed", int)
    checked: Mapping[str, Any] = state
    return checked


class Local:
    """The environments in this process, with the interface of `Workers`.

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
