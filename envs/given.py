"""Vector environments of the user's own: gymnasium's in all autoreset modes, and Stable-Baselines3's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from rlkit.envs.spaces import flatten_obs
from rlkit.envs.tracked import Hang, with_deadline
from rlkit.envs.vector import Outcome, VectorAdapter, entry, episode_seed, success_of
from rlkit.envs.workers import lost_worker
from rlkit.errors import EnvError, RlkitError, UserError


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
        rank: int,
    ) -> None:
        super().__init__(venv.num_envs, observation_space, action_space, seed, make_single, rank)
        self._venv, self._timeout, self._resets = venv, timeout, 0

    def _next_seed(self) -> int:
        """Another seed for each whole reset, so that a resumed run does not repeat its first episodes."""
        self._resets += 1
        return episode_seed(self.seed, self.first + self.num_envs, self._resets)

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
            raise EnvError(
                f"environment {self.first + env}: its final observation is not of its space: {error}"
            ) from error

    def _call(self, call: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return with_deadline(self._timeout, partial(getattr(self._venv, call), *args, **kwargs))
        except Hang:
            pipes = getattr(self._venv.unwrapped, "parent_pipes", getattr(self._venv.unwrapped, "remotes", ()))
            silent = [str(i) for i, pipe in enumerate(pipes, self.first) if pipe is not None and not pipe.poll()]
            who = f"environment {', '.join(silent)}" if silent else "the vector environment"
            raise EnvError(
                f"{who} did not return from {call} within {self._timeout:g} s; last actions {self._show_last()}"
            ) from None
        except RlkitError:
            raise
        except Exception as error:
            processes = getattr(self._venv.unwrapped, "processes", None)
            if processes and isinstance(error, (EOFError, OSError)):
                lost = lost_worker(processes, self._last_action, f"in {call}", self.first)
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
            self._resets = entry(state, "resets", int)
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
        rank: int = 0,
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
        super().__init__(
            venv, venv.single_observation_space, venv.single_action_space, seed, timeout, make_single, rank
        )
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
        success = {i: success_of(final_info, i) for i in ended}
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
                f"environment {self.first + i}: the vector environment resets in the same step, but "
                f'info["final_obs"] has no final observation of the episode that ended'
            )
        return self._flat_one(one, i)


class SB3Adapter(_GivenAdapter):
    """A Stable-Baselines3 `VecEnv`, wrappers such as `VecNormalize` included: what it returns is what is stored."""

    kind = "sb3"

    def __init__(self, venv: Any, seed: int = 0, *, timeout: float = 0.0, rank: int = 0) -> None:
        super().__init__(venv, venv.observation_space, venv.action_space, seed, timeout, None, rank)

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
                        f'environment {self.first + i}: info["terminal_observation"] is missing at the end of its '
                        "episode"
                    )
                next_obs[i] = self._flat_one(info["terminal_observation"], i)
                truncated[i] = bool(info.get("TimeLimit.truncated", False))
                success[i] = None if info.get("is_success") is None else bool(info["is_success"])
        return Outcome(next_obs, current, np.array(reward, np.float64), done & ~truncated, truncated, success)
