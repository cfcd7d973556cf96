"""Environments in worker processes, with deadlines and errors that name the worker."""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from numpy.typing import NDArray

from rlkit.envs.tracked import Maker, show_action
from rlkit.errors import EnvError, RlkitError, UserError

MARGIN = 5.0  # seconds that a worker gets to report its own timeout before it is taken for dead
GRACE = 5.0  # seconds that workers get to close their environments before they are killed
REPLAY_CHUNK = 5.0  # seconds of replay between two signs of life

_running: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register  # before multiprocessing's own exit function, which would wait for workers that ignore SIGTERM
def _close_all() -> None:
    for workers in list(_running):
        workers.close(terminate=True)


class Workers(AsyncVectorEnv):
    """gymnasium's worker processes with deadlines, and errors that say which worker failed, how, and at which action.

    The worker's own alarm (`TrackedEnv`) is the first to notice a hang and knows best; `MARGIN` later its process is
    taken for dead. Workers ignore SIGTERM, so they are asked to close and then killed.
    """

    def __init__(self, makers: Sequence[Maker], timeout: float) -> None:
        self.processes: list[Any] = []
        self.parent_pipes: list[Any] = []
        self._owner, self._timeout, self._failed = os.getpid(), timeout, False
        self._last: NDArray[Any] | None = None
        self._first = makers[0].index
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
            return lost_worker(
                self.processes,
                None,
                "while it made its environment; see its output above. Where that says `bootstrapping phase`, put the "
                'script\'s code under `if __name__ == "__main__":`',
                self._first,
            ) or EnvError(f"a worker process could not be started: {error!r}")
        if isinstance(error, RuntimeError) and "spaces" in str(error):
            return UserError(f"the environments differ in their spaces: {error}")
        if self.processes and self.processes[-1].pid is None:
            last = self._first + len(self.processes) - 1
            return UserError(
                f"environment {last} cannot be sent to a worker process ({type(error).__name__}: "
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
                who = ", ".join(str(self._first + i) for i in silent)
                raise EnvError(
                    f"environment {who} did not return from {call} within {self._timeout:g} s "
                    f"and its worker process does not answer; last action {self._show_last(silent)}"
                ) from None
            if isinstance(error, (EOFError, OSError)):
                lost = lost_worker(self.processes, self._last, f"in {call}", self._first)
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


def lost_worker(processes: Sequence[Any], last: NDArray[Any] | None, where: str, first: int) -> EnvError | None:
    """The error for a worker process that died, or None if all of them live; `first` is the first one's number."""
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
        return EnvError(f"environment {first + i}: its worker process {how}; last action {action}")
    return None
