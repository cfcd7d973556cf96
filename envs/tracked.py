"""One environment made exact, replayable and accountable.

`TrackedEnv` wraps a single environment, in this process or in a worker. An episode is a pure function of the seed of
its reset and of its actions, so both are recorded: to restore the environment is to reset it with that seed, replay
the actions and compare the observation and the return bit for bit. Physics state alone would not do: simulators keep
caches (warm starts, contact forces) that change the next step in its last digits.

Everything that goes wrong inside the environment becomes an `EnvError` that names its index and its last action: an
exception, a wrong return value, and, where the system has interval timers, a call that does not return.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found, unused-ignore]
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from rlkit.envs.spaces import flat_space, flatten_obs
from rlkit.errors import EnvError, RlkitError, UserError

MAX_REPLAY = 1_000_000  # steps; an episode that is longer is not recorded any more and cannot be restored
T = TypeVar("T")


# --- deadlines ---------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """A call passed its deadline. Not an `Exception`, so that the environment's own handlers let it through."""


_armed = False
_outer_handler: Any = None
_ALARM = int(getattr(signal, "SIGALRM", 0))  # plain ints and `_signal`: the enums of `signal` cost more than the alarm


def with_deadline(seconds: float, function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, interrupted by `Hang` after `seconds` (0: never).

    Works in the main thread of a process on systems with interval timers; elsewhere the call is made without deadline.
    An alarm that was set before is set again afterwards, and one that is due earlier stays in charge.
    """
    global _armed, _outer_handler
    if not seconds or not _ALARM or threading.get_ident() != threading.main_thread().ident:
        return function(*args)
    handler = _signal.getsignal(_ALARM)
    if handler is not _on_alarm:
        _outer_handler = handler
        signal.signal(_ALARM, _on_alarm)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    if 0 < remaining <= seconds:
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)
        return function(*args)
    start = time.monotonic() if remaining else 0.0
    outer, _armed = _armed, True
    try:
        return function(*args)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _armed = outer
        if remaining:
            signal.setitimer(signal.ITIMER_REAL, max(remaining - (time.monotonic() - start), 1e-6), interval)


def _on_alarm(signum: int, frame: Any) -> None:
    global _armed
    if _armed:
        _armed = False
        raise Hang
    # The alarm is somebody else's: do what would have happened without us.
    if callable(_outer_handler):
        _outer_handler(signum, frame)
    elif _outer_handler == signal.SIG_DFL:
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)


# --- one environment ---------------------------------------------------------------------------------------------


def show_action(action: Any) -> str:
    """A short text of an action, for messages."""
    return np.array2string(np.asarray(action), precision=4, separator=", ", threshold=12).replace("\n", "")


def is_bool(value: Any) -> bool:
    return value is True or value is False or isinstance(value, np.bool_)


class TrackedEnv(gym.Wrapper):
    """The outermost wrapper of one environment: flat observations, recorded episodes, errors with a place.

    Observations are the vectors of `spaces.flatten_obs`. `info` is empty but for `is_success` at an episode's end.

    Args:
        env: a gymnasium environment with `Box` or `Dict` observations.
        index: its number in the vector environment, for messages.
        timeout: seconds that `step` or `reset` may take; 0 for no limit.
    """

    def __init__(self, env: gym.Env, index: int = 0, timeout: float = 0.0) -> None:
        super().__init__(env)
        self.index, self.timeout = index, timeout
        self.raw_observation_space = env.observation_space
        self.observation_space = flat_space(env.observation_space, f"environment {index}: observation")
        self.steps = 0  # of the whole run
        self._actions: NDArray[Any] = np.empty((64, *self.action_space.shape), self.action_space.dtype)
        self._pending: Mapping[str, Any] | None = None
        self._report: dict[str, Any] | None = None
        self._replayed = 0
        self._last: Any = None
        self._start(None)

    def _start(self, seed: int | None) -> None:
        self._seed, self._length, self._return = seed, 0, 0.0
        self._obs: NDArray[Any] | None = None

    # - the environment's interface -

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Start an episode; it can be replayed only if `seed` is given."""
        self._start(seed)
        try:
            result = with_deadline(self.timeout, self._reset_env, seed, options)
        except Hang:
            raise EnvError(self._hung("reset")) from None
        except Exception as error:
            raise self._raised("reset", error) from error
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
            raise EnvError(
                f"environment {self.index}: `reset` must return a pair (observation, info), got "
                f"{_shape_of(result)}; this looks like the interface before gymnasium 0.26"
            )
        self._obs = self._flat(result[0], "reset")
        return self._obs, {}

    def step(self, action: Any) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        """One step. The reward is a Python float, the flags are Python bools."""
        if self._length < MAX_REPLAY:
            if self._length == len(self._actions):
                self._actions = np.concatenate([self._actions, np.empty_like(self._actions)])
            self._actions[self._length] = action  # before the step, which may change the array
        self._last = action
        try:
            result = with_deadline(self.timeout, self.env.step, action)
        except Hang:
            raise EnvError(self._hung("step")) from None
        except Exception as error:
            raise self._raised("step", error) from error
        if not (isinstance(result, tuple) and len(result) == 5):
            raise EnvError(
                f"environment {self.index}: `step` must return (observation, reward, terminated, truncated, info), got "
                f"{_shape_of(result)}; four values are the interface before gymnasium 0.26"
            )
        raw, reward, terminated, truncated, info = result
        self._obs = self._flat(raw, "step")
        try:
            reward = float(reward)
        except (TypeError, ValueError):
            raise EnvError(self._place(f"the reward must be a real number, got {reward!r}")) from None
        if not (is_bool(terminated) and is_bool(truncated)):
            raise EnvError(
                self._place(f"`terminated` and `truncated` must be bools, got {terminated!r} and {truncated!r}")
            )
        self._length += 1
        self.steps += 1
        self._return += reward
        if (terminated or truncated) and isinstance(info, Mapping) and info.get("is_success") is not None:
            return self._obs, reward, bool(terminated), bool(truncated), {"is_success": bool(info["is_success"])}
        return self._obs, reward, bool(terminated), bool(truncated), {}

    # - what others see of the environment within -

    def inner_attr(self, name: str) -> Any:
        """An attribute of the environment or of a wrapper around it."""
        return self.env.get_wrapper_attr(name)

    def inner_is_wrapped(self, wrapper_class: type) -> bool:
        """Whether the environment has a wrapper of this class around it."""
        env = self.env
        while isinstance(env, gym.Wrapper):
            if isinstance(env, wrapper_class):
                return True
            env = env.env
        return False

    def set_inner_attr(self, name: str, value: Any, indices: Sequence[int]) -> None:
        """Set an attribute where it is, or of the outermost wrapper, if this is one of `indices`."""
        if self.index in indices:
            self.env.set_wrapper_attr(name, value)

    def inner_call(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], indices: Sequence[int]) -> Any:
        """Call a method of the environment or of a wrapper around it, if this is one of `indices`."""
        return self.env.get_wrapper_attr(name)(*args, **kwargs) if self.index in indices else None

    def close(self) -> None:
        self.env.close()
        parent = multiprocessing.parent_process()
        if _in_worker and parent is not None and not parent.is_alive():
            os._exit(1)  # nobody is left to report to

    def _reset_env(self, seed: int | None, options: dict[str, Any] | None) -> Any:
        return self.env.reset(seed=seed, options=options)

    # - replay -

    @property
    def replay_state(self) -> dict[str, Any]:
        """What restores this environment: the seed and the actions of the running episode, and what they led to."""
        recorded = self._obs is not None and self._seed is not None and self._length <= MAX_REPLAY
        return {
            "seed": self._seed if recorded else None,
            "actions": self._actions[: self._length if recorded else 0].copy(),
            "obs": None if self._obs is None else self._obs.copy(),
            "return": self._return,
            "steps": self.steps,
        }

    @replay_state.setter
    def replay_state(self, state: Mapping[str, Any]) -> None:
        """Begin to restore; `state` is a `replay_state` with `next_seed`, for the episode to begin if that fails."""
        self._pending, self._report, self._replayed = state, None, -1

    def continue_replay(self, seconds: float) -> dict[str, Any] | None:
        """Go on restoring for about `seconds`; None while there is more to do.

        Returns:
            `{"obs": (dim,), "problem": str}`: the observation to act on, and why the episode could not be restored
            (empty if it was, bit for bit; otherwise a new episode has begun).
        """
        if self._pending is None:
            return self._report
        state, end = self._pending, time.monotonic() + seconds
        try:
            problem = self._replay(state, end)
        except Exception as error:
            problem = f"replaying its episode raised: {str(error).partition(chr(10))[0] or repr(error)}"
        if problem is None:
            return None
        if problem:
            self.reset(seed=state["next_seed"])
        self._pending, self.steps = None, int(state["steps"])
        self._report = {"obs": self._obs, "problem": problem}
        return self._report

    def _replay(self, state: Mapping[str, Any], end: float) -> str | None:
        if state["seed"] is None:
            return f"its episode has more than {MAX_REPLAY} steps or was not seeded"
        wrapper = self.env
        while isinstance(wrapper, gym.Wrapper):
            if isinstance(wrapper, (gym.wrappers.NormalizeObservation, gym.wrappers.NormalizeReward)):
                # The first steps would even agree: its statistics come from all episodes before this one.
                return f"{type(wrapper).__name__} carries statistics from episode to episode"
            wrapper = wrapper.env
        actions = state["actions"]
        if self._replayed < 0:
            self.reset(seed=state["seed"])
            self._replayed = 0
        while self._replayed < len(actions):
            action = actions[self._replayed]
            self._replayed += 1
            _, _, terminated, truncated, _ = self.step(action.copy() if action.ndim else action)
            if terminated or truncated:
                return "the replayed episode ended early"
            if time.monotonic() > end and self._replayed < len(actions):
                return None
        obs = state["obs"]
        if self._obs is None or self._obs.dtype != obs.dtype or self._obs.tobytes() != obs.tobytes():
            return "the replayed observation differs"
        if np.float64(self._return).tobytes() != np.float64(state["return"]).tobytes():
            return "the replayed rewards differ"
        return ""

    # - messages -

    def _flat(self, raw: Any, call: str) -> NDArray[Any]:
        try:
            return np.array(flatten_obs(self.raw_observation_space, raw))  # a copy: environments reuse their arrays
        except (TypeError, ValueError, KeyError) as error:
            raise EnvError(
                self._place(f"`{call}` returned an observation that is not of its space: {error!r}")
            ) from error

    def _place(self, text: str) -> str:
        return f"environment {self.index}, step {self.steps + 1}: {text}; last action {show_action(self._last)}"

    def _hung(self, call: str) -> str:
        return (
            f"environment {self.index} did not return from {call} within {self.timeout:g} s "
            f"(step {self.steps + 1}); last action {show_action(self._last)}"
        )

    def _raised(self, call: str, error: Exception) -> EnvError:
        hint = ""
        if isinstance(error, ValueError) and "expected 5, got 4" in str(error):
            hint = " (four values are the interface before gymnasium 0.26)"
        trace = "".join(traceback.format_exception(error))
        return EnvError(
            f"environment {self.index} raised {type(error).__name__} in {call}{hint}, step {self._length + 1} of its "
            f"episode, step {self.steps + 1} of the run: {error}; last action {show_action(self._last)}\n\n{trace}"
        )


def _shape_of(result: Any) -> str:
    return f"{len(result)} values" if isinstance(result, tuple) else f"a {type(result).__name__}"


# --- making one, here or in a worker -----------------------------------------------------------------------------

_in_worker = False


@dataclass
class Maker:
    """A picklable thunk that makes a `TrackedEnv`; in another process it first arranges how that process ends."""

    thunk: Callable[[], gym.Env]
    index: int
    timeout: float
    owner: int = field(default_factory=os.getpid)

    def __call__(self) -> TrackedEnv:
        if os.getpid() != self.owner:
            _become_worker()
        try:
            env = self.thunk()
        except RlkitError:
            raise
        except Exception as error:
            raise EnvError(f"environment {self.index} could not be made: {type(error).__name__}: {error}") from error
        if not isinstance(env, gym.Env):
            raise UserError(
                f"environment {self.index}: expected a gymnasium.Env, got {type(env).__module__}.{type(env).__name__}"
            )
        if not isinstance(env.action_space, (gym.spaces.Box, gym.spaces.Discrete)):
            raise UserError(
                f"environment {self.index}: actions must be `Box` or `Discrete`, got `{env.action_space}`; "
                f"gymnasium.wrappers.TransformAction can map them"
            )
        return TrackedEnv(env, self.index, self.timeout)


def _become_worker() -> None:
    """Leave signals to the parent, which still asks for states while it shuts down; and end whenever it is gone."""
    global _in_worker
    _in_worker = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
