"""Environment adapters: anything that can be stepped -> complete transitions.

`make(spec)` takes a gymnasium id, an environment, a list of thunks, a `gymnasium.vector.VectorEnv` or a
Stable-Baselines3 `VecEnv`, and returns a `VectorAdapter`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
from gymnasium.envs import registration
from gymnasium.envs.registration import EnvSpec

import rlkit.envs.coordination
import rlkit.envs.corridor
import rlkit.envs.finite
import rlkit.envs.linear
import rlkit.envs.obstacles
import rlkit.envs.peaks  # noqa: F401 (all of them register their tasks with gymnasium)
from rlkit.envs.given import GymVectorAdapter, SB3Adapter
from rlkit.envs.own import TrackedAdapter
from rlkit.envs.spaces import (
    ActionScale,
    check_action_space,
    flat_space,
    flatten_obs,
    space_from_json,
    space_to_json,
)
from rlkit.envs.vector import EpisodeRecord, VectorAdapter, episode_seed
from rlkit.errors import UserError, did_you_mean

__all__ = [
    "ActionScale",
    "EpisodeRecord",
    "VectorAdapter",
    "check_action_space",
    "episode_seed",
    "flat_space",
    "flatten_obs",
    "make",
    "single",
    "space_from_json",
    "space_to_json",
]


def make(
    spec: Any,
    *,
    n_envs: int = 1,
    seed: int = 0,
    vectorization_mode: str = "sync",
    env_kwargs: Mapping[str, Any] | None = None,
    timeout: float | None = 60.0,
    rank: int = 0,
) -> VectorAdapter:
    """The adapter for `spec`.

    Args:
        spec: a gymnasium id (`module:Name-v0` imports the module first) or `EnvSpec`, a `gymnasium.Env`, a list of
            thunks, a `gymnasium.vector.VectorEnv`, or a Stable-Baselines3 `VecEnv`.
        n_envs: copies of an id; for what has a number already, that number or 1.
        seed: of all episodes, with `episode_seed`.
        vectorization_mode: "sync", or "async" for a worker process per environment (ids and thunks).
        env_kwargs: keywords for `gymnasium.make` (ids only).
        timeout: seconds that a step or reset may take, None or 0 for no limit.
        rank: of this process among those that step as many environments each; its own are numbered, and seeded, from
            `rank` times their number on.

    Raises:
        UserError: an unknown id or keyword, a space that is not supported, options that conflict.
        EnvError: an environment could not be made.
    """
    if type(n_envs) is not int or n_envs < 1:
        raise UserError(f"n_envs: {n_envs!r} is not a positive integer")
    if vectorization_mode not in ("sync", "async"):
        raise UserError(f"vectorization_mode: `{vectorization_mode}` is neither `sync` nor `async`")
    seconds, workers = float(timeout or 0.0), vectorization_mode == "async"
    if seconds < 0:
        raise UserError(f"timeout: {timeout} is negative; 0 or None is no limit")
    if isinstance(spec, (str, EnvSpec)):
        thunk = _thunk(spec, env_kwargs)
        return TrackedAdapter([thunk] * n_envs, seed, workers=workers, timeout=seconds, make_single=thunk, rank=rank)
    if env_kwargs:
        raise UserError("env_kwargs are for environments given by id; this one is already made or made by its thunk")
    if _is_sb3(spec):
        _check_number(n_envs, spec.num_envs, "the VecEnv")
        return SB3Adapter(spec, seed, timeout=seconds, rank=rank)
    if isinstance(spec, gym.vector.VectorEnv):
        _check_number(n_envs, spec.num_envs, "the VectorEnv")
        return GymVectorAdapter(spec, seed, timeout=seconds, make_single=single(spec), rank=rank)
    if isinstance(spec, gym.Env):
        _check_number(n_envs, 1, "an environment object")
        if workers:
            raise UserError('an environment object cannot move to a worker process: give a list of thunks for "async"')
        return TrackedAdapter([lambda: spec], seed, timeout=seconds, owned=False, rank=rank)
    if isinstance(spec, Sequence) and spec and all(callable(thunk) for thunk in spec):
        _check_number(n_envs, len(spec), "the list of thunks")
        return TrackedAdapter(list(spec), seed, workers=workers, timeout=seconds, make_single=single(spec), rank=rank)
    raise UserError(_not_an_env(spec))


def single(spec: Any, env_kwargs: Mapping[str, Any] | None = None) -> Callable[[], gym.Env] | None:
    """Makes one environment of the kind of `spec`, for evaluation, without making the vector; None if unknown.

    Raises:
        UserError: an unknown id.
    """
    if isinstance(spec, (str, EnvSpec)):
        return _thunk(spec, env_kwargs)
    if isinstance(spec, gym.vector.VectorEnv):
        return _single_of(spec)
    if isinstance(spec, Sequence) and spec and callable(spec[0]):
        first: Callable[[], gym.Env] = spec[0]
        return first
    return None


def _thunk(spec: str | EnvSpec, env_kwargs: Mapping[str, Any] | None) -> Callable[[], gym.Env]:
    return partial(_make_one, find_spec(spec) if isinstance(spec, str) else spec, dict(env_kwargs or {}))


def _check_number(n_envs: int, own: int, what: str) -> None:
    if n_envs not in (1, own):
        raise UserError(f"n_envs: {n_envs} conflicts with {what}, which has {own}; leave n_envs away")


def _not_an_env(spec: Any) -> str:
    expected = "an id, a gymnasium.Env, a list of thunks, a gymnasium.vector.VectorEnv or a Stable-Baselines3 VecEnv"
    got = f"{type(spec).__module__}.{type(spec).__qualname__}"
    if isinstance(spec, Sequence):
        return f"env: expected {expected}, got " + (
            "an empty list" if not spec else "a list with items that are not callable"
        )
    if callable(spec):
        return f"env: expected {expected}, got a callable; put it into a list: [make_env]"
    if any(base.__module__.partition(".")[0] == "gym" for base in type(spec).__mro__):
        return f"env: {got} is of the old `gym` package; rlkit needs gymnasium (the package shimmy converts)"
    return f"env: expected {expected}, got {got}"


def _is_sb3(spec: Any) -> bool:
    module = sys.modules.get("stable_baselines3.common.vec_env")  # a VecEnv exists only where this was imported
    return module is not None and isinstance(spec, module.VecEnv)


# --- ids ---------------------------------------------------------------------------------------------------------


def find_spec(env_id: str) -> EnvSpec:
    """The registered `EnvSpec` of an id; without a version, the newest.

    Raises:
        UserError: unknown, with the nearest known id.
    """
    name = env_id
    if ":" in env_id:
        module, _, name = env_id.partition(":")
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"environment `{env_id}`: cannot import `{module}`: {error}") from error
    if name in gym.registry:
        return gym.registry[name]
    versions = {
        s.version: s for s in gym.registry.values() if s.version is not None and name == s.id.rpartition("-v")[0]
    }
    if versions:
        return versions[max(versions)]
    base = name.rpartition("-v")[0] or name
    others = [s for s in gym.registry.values() if s.id.rpartition("-v")[0] == base and s.version is not None]
    if others:
        raise UserError(
            f"unknown environment `{env_id}`; did you mean `{max(others, key=lambda s: s.version or 0).id}`?"
        )
    hint = did_you_mean(name, gym.registry) or "; is the package that registers it installed and imported?"
    raise UserError(f"unknown environment `{env_id}`{hint}")


def _make_one(spec: EnvSpec, kwargs: Mapping[str, Any]) -> gym.Env:
    """`gymnasium.make` whose errors are the user's to mend."""
    if "mujoco" in str(spec.entry_point):
        _warn_once()
    try:
        return gym.make(spec, **kwargs)
    except gym.error.DependencyNotInstalled as error:
        raise UserError(f"environment `{spec.id}`: {error}") from error
    except Exception as error:
        unknown = [key for key in kwargs if f"unexpected keyword argument '{key}'" in str(error)]
        if unknown:
            near = did_you_mean(unknown[0], _parameters(spec))
            raise UserError(f"env_kwargs: `{spec.id}` has no parameter `{unknown[0]}`{near}") from error
        given = f" with env_kwargs {dict(kwargs)}" if kwargs else ""
        raise UserError(f"environment `{spec.id}` cannot be made{given}: {type(error).__name__}: {error}") from error


_warned: set[str] = set()


def _warn_once() -> None:
    """MuJoCo's warnings once each, on standard error; it would repeat them and write MUJOCO_LOG.TXT where we stand."""
    try:
        import mujoco
    except ImportError:
        return  # `gymnasium.make` says how to install it

    def show(message: str) -> None:
        kind = message.split("Time =")[0]  # the same instability at another time is no news
        if kind not in _warned:
            _warned.add(kind)
            print(f"MuJoCo: {message.strip()}", file=sys.stderr)

    if mujoco.get_mju_user_warning() is None:
        mujoco.set_mju_user_warning(show)


def _parameters(spec: EnvSpec) -> list[str]:
    creator = registration.load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
    known = [] if creator is None else [p for p in inspect.signature(creator).parameters if p not in ("self", "kwargs")]
    return [*known, "max_episode_steps", "render_mode", "disable_env_checker"]


def _single_of(venv: gym.vector.VectorEnv) -> Callable[[], gym.Env] | None:
    """One environment of the kind that `gymnasium.make_vec` put into `venv`, if it says so.

    None for a wrapped vector environment, whose wrappers a single one would lack.
    """
    spec = venv.spec
    if spec is None or spec.entry_point is None or isinstance(venv, gym.vector.VectorWrapper):
        return None
    kwargs = dict(spec.kwargs)
    wrappers = kwargs.pop("wrappers", None) or ()
    for key in ("num_envs", "vectorization_mode", "vector_kwargs"):
        kwargs.pop(key, None)
    plain = dataclasses.replace(spec, kwargs={})

    def make_single() -> gym.Env:
        env = _make_one(plain, kwargs)
        for wrapper in wrappers:
            env = wrapper(env)
        return env

    return make_single
