"""Changed dynamics: another mass, friction, gravity, damping or length, other actuators, noise on the actions.

Factors of the nominal value, so that 1 changes nothing, of MuJoCo and of gymnasium's classic control:

- `mass`: of all bodies, with their moments of inertia (MuJoCo's `armature`, which is of motors, stays as it is).
- `friction`: sliding, torsional and rolling, of MuJoCo's contacts.
- `gravity`: everywhere but in Acrobot, whose equations hold it as a number.
- `damping`: of MuJoCo's joints.
- `length`: of CartPole's and Pendulum's pole and of Acrobot's links. Moments of inertia follow: mass times its square.
- `force`: what an action does; what the reward charges for the action stays as it is. In MuJoCo, gain, bias and limits
  of the actuators: for motors that is the same as their gear, while the gear of a servo would move its target, too.

In any environment:

- `action_noise`: for `Box` actions the standard deviation of Gaussian noise, in halves of the range of actions and
  clipped to it; for `Discrete` ones the probability that a uniformly drawn action replaces the chosen one. The noise
  is a function of the seed of the episode, and the same draws serve all values.
- a keyword of the constructor whose value is a number, such as `slip` of `rlkit/SlipperyGrid-v0`: the environment,
  which has to be of a gymnasium id, is made again with this value, no factor.
- a name that the environment's own method `perturb(name, value)` takes. Its attribute `perturbations` lists these, so
  that others are changed as above; without the attribute the method gets all.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs import registration
from gymnasium.envs.classic_control import (
    AcrobotEnv,
    CartPoleEnv,
    Continuous_MountainCarEnv,
    MountainCarEnv,
    PendulumEnv,
)
from numpy.typing import NDArray

from rlkit.envs import single
from rlkit.errors import UserError, did_you_mean
from rlkit.rng import derive

NOISE = "action_noise"
MAY_BE_ZERO = ("friction", "gravity", "damping")

Array = NDArray[Any]

CLASSIC: dict[type, dict[str, dict[str, int]]] = {
    CartPoleEnv: {
        "mass": {"masscart": 1, "masspole": 1},
        "gravity": {"gravity": 1},
        "length": {"length": 1},
        "force": {"force_mag": 1},
    },
    PendulumEnv: {
        "mass": {"m": 1},
        "gravity": {"g": 1},
        "length": {"l": 1},
        # Its equations have the mass in u / m alone; more of `max_torque` would also raise the cost of u in the reward.
        "force": {"m": -1},
    },
    AcrobotEnv: {
        "mass": {"LINK_MASS_1": 1, "LINK_MASS_2": 1, "LINK_MOI": 1},
        "length": {"LINK_LENGTH_1": 1, "LINK_LENGTH_2": 1, "LINK_COM_POS_1": 1, "LINK_COM_POS_2": 1, "LINK_MOI": 2},
        "force": {"AVAIL_TORQUE": 1},
    },
    MountainCarEnv: {"gravity": {"gravity": 1}, "force": {"force": 1}},
    Continuous_MountainCarEnv: {"gravity": {}, "force": {"power": 1}},  # gravity: `Slope`
}
"""Class -> parameter -> attributes, each with the power of the factor that multiplies it."""

MUJOCO = {
    "mass": ("body_mass", "body_inertia"),
    "friction": ("geom_friction", "pair_friction"),
    "gravity": ("gravity",),
    "damping": ("dof_damping", "dof_dampingpoly"),
    "force": ("actuator_gainprm", "actuator_biasprm", "actuator_forcerange", "jnt_actfrcrange"),
}
"""Parameter -> arrays of the model that the factor multiplies; some are not in all versions of MuJoCo."""


def parse(text: str) -> tuple[str, NDArray[np.float64]]:
    """`mass=0.5:1.5:11` (from, to, how many), `mass=0.5,1,2` or `mass=0.8` -> (name, values (n,), each once).

    Raises:
        UserError: of another form, or not of finite numbers.
    """
    name, _, rest = text.partition("=")
    parts = rest.split(":")
    try:
        if not name.isidentifier() or len(parts) not in (1, 3):
            raise ValueError
        given = [float(part) for part in (parts[:2] if len(parts) == 3 else rest.split(","))]
        count = int(parts[2]) if len(parts) == 3 else None
    except ValueError:
        raise UserError(
            f"perturbation {text!r}: expected NAME=LOW:HIGH:COUNT, NAME=A,B,... or NAME=A, such as mass=0.5:1.5:11"
        ) from None
    if count is not None and count < 1:
        raise UserError(f"perturbation {text!r}: the count is {count}; at least 1 is needed")
    if not np.isfinite(given).all():
        raise UserError(f"perturbation {text!r}: the values have to be finite")
    found = given if count is None else np.linspace(given[0], given[1], count)
    rounded = [float(f"{value:.12g}") for value in found]  # so that 1 is among 0.8:1.2:5, not 0.9999999999999999
    return name, np.array(list(dict.fromkeys(rounded)))


def parameters(env: gym.Env) -> tuple[str, ...]:
    """The names that `perturbed` can change in `env`; of a method `perturb`, those in `perturbations`."""
    base: Any = env.unwrapped
    own = getattr(base, "perturbations", ()) if _has_own(base) else ()
    noise = (NOISE,) if _may_be_noisy(env.action_space) else ()
    return tuple(dict.fromkeys([*own, *_factors(base), *noise, *_keywords(env)]))


def nominal(env: gym.Env, name: str) -> float | None:
    """The value of the parameter `name` that changes nothing; None where only the environment's `perturb` knows.

    Raises:
        UserError: there is no such parameter.
    """
    kind = _kind(env, name)
    return None if kind == "own" else _keywords(env)[name] if kind == "keyword" else float(kind == "factor")


def perturbed(make_env: Callable[[], gym.Env], name: str, value: float) -> Callable[[], gym.Env]:
    """A function that makes the environment of `make_env` with the parameter `name` at `value`.

    At the nominal value that is `make_env`. Otherwise it is tried at once, so that a value that the environment refuses
    is an error here.

    Args:
        make_env: makes a new environment each time: changes of an old one would add up.

    Raises:
        UserError: there is no such parameter, the value is out of its range, the policy's spaces would change, or
            `make_env` returned an environment in which the parameter is changed already.
    """
    value, env = float(value), make_env()
    usual: Any
    try:
        kind, spec, title = _kind(env, name), env.spec, _title(env)
        _check(kind, name, value, env.action_space)
        usual, spaces = nominal(env, name), (env.observation_space, env.action_space)
    finally:
        env.close()
    if value == usual:
        return make_env
    if kind == "keyword":
        integer = isinstance(usual, int) and value == int(value)
        again = single(spec, {name: int(value) if integer else value})
        assert again is not None  # of a spec
    else:
        again = make_env

    def make() -> gym.Env:
        made = again()
        try:
            changed = made if kind == "keyword" else _changed(made, kind, name, value)
            if (changed.observation_space, changed.action_space) != spaces:
                raise UserError(f"{name}={value:g} changes the spaces of {title}, which its policy was trained for")
        except BaseException:
            made.close()
            raise
        return changed

    make().close()
    return make


def _kind(env: gym.Env, name: str) -> str:
    """Who changes the parameter: own (the environment), factor, noise or keyword."""
    base: Any = env.unwrapped
    if _has_own(base) and name in getattr(base, "perturbations", (name,)):
        return "own"
    if name in _factors(base):
        return "factor"
    if name == NOISE and _may_be_noisy(env.action_space):
        return "noise"
    if name in _keywords(env):
        return "keyword"
    known = parameters(env)
    near = did_you_mean(name, known) if len(known) > 12 else ""  # all are listed anyway
    raise UserError(
        f"{_title(env)} has no parameter `{name}` to change{near}; it has {', '.join(known) if known else 'none'}"
    )


def _check(kind: str, name: str, value: float, space: gym.Space) -> None:
    most = 1.0 if kind == "noise" and isinstance(space, gym.spaces.Discrete) else math.inf
    if not math.isfinite(value):
        raise UserError(f"{name}={value:g}: the value has to be finite")
    if kind == "factor" and (value < 0 or (value == 0 and name not in MAY_BE_ZERO)):
        least = ">= 0" if name in MAY_BE_ZERO else "> 0"
        raise UserError(f"{name}={value:g}: it is a factor of the nominal value and has to be {least}")
    if kind == "noise" and not 0 <= value <= most:
        allowed = "a probability, from 0 to 1" if most == 1 else "a standard deviation >= 0"
        raise UserError(f"{name}={value:g}: expected {allowed}")


def _title(env: gym.Env) -> str:
    return f"`{env.spec.id}`" if env.spec is not None else f"the environment {type(env.unwrapped).__name__}"


def _changed(env: gym.Env, kind: str, name: str, value: float) -> gym.Env:
    """`env` itself, changed, or a wrapper around it."""
    base: Any = env.unwrapped
    done = vars(base).setdefault("_perturbed", set())
    if name in done:
        raise UserError(
            f"`{name}` of {_title(env)} is changed already; give a function that makes a new environment each time"
        )
    done.add(name)
    if kind == "noise":
        return ActionNoise(env, value)
    if kind == "own":
        try:
            base.perturb(name, value)
        except Exception as error:
            raise UserError(
                f"`perturb` of {_title(env)} does not take {name}={value:g}: {type(error).__name__}: {error}"
            ) from error
        return env
    model = _model(base)
    if model is not None:
        _scale_model(model, name, value)
        return env
    if isinstance(base, Continuous_MountainCarEnv) and name == "gravity":
        return Slope(env, value)
    for attribute, power in _classic(base)[name].items():
        old = getattr(base, attribute)
        new = [part * value**power for part in old] if isinstance(old, list) else old * value**power
        setattr(base, attribute, new)  # of the instance: Acrobot's constants are of the class
    if isinstance(base, CartPoleEnv):
        base.total_mass = base.masspole + base.masscart
        base.polemass_length = base.masspole * base.length
    return env


# --- what an environment has -------------------------------------------------------------------------------------


def _has_own(base: Any) -> bool:
    return callable(getattr(base, "perturb", None))


def _factors(base: Any) -> tuple[str, ...]:
    """The factors of an unwrapped environment."""
    model = _model(base)
    if model is None:
        return tuple(_classic(base))
    return tuple(name for name in MUJOCO if _has(model, name))


def _classic(base: Any) -> dict[str, dict[str, int]]:
    return next((found for kind, found in CLASSIC.items() if isinstance(base, kind)), {})


def _keywords(env: gym.Env) -> dict[str, float]:
    """Keywords of the constructor whose values in `env` are numbers, with these values."""
    spec = env.spec
    if spec is None or spec.entry_point is None:
        return {}
    creator = registration.load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
    values = {name: p.default for name, p in inspect.signature(creator).parameters.items()} | spec.kwargs
    return {name: v for name, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _may_be_noisy(space: gym.Space) -> bool:
    if isinstance(space, gym.spaces.Box):
        return bool(np.issubdtype(space.dtype, np.floating) and space.is_bounded())
    return isinstance(space, gym.spaces.Discrete)


# --- MuJoCo ------------------------------------------------------------------------------------------------------


def _model(base: Any) -> Any:
    """The `mjModel` of an unwrapped environment, or None."""
    mujoco = sys.modules.get("mujoco")  # an environment of it exists only where this was imported
    model = getattr(base, "model", None)
    return model if mujoco is not None and isinstance(model, mujoco.MjModel) else None


def _arrays(model: Any, name: str) -> list[Array]:
    """Views of what the factor `name` multiplies."""
    owner = model.opt if name == "gravity" else model
    return [getattr(owner, key) for key in MUJOCO[name] if hasattr(owner, key)]


def _has(model: Any, name: str) -> bool:
    """Whether the factor would change anything, and can be applied to all that it is of."""
    import mujoco

    if name == "force":  # others, such as muscles, compute their force from parameters of many meanings
        gains = (mujoco.mjtGain.mjGAIN_FIXED, mujoco.mjtGain.mjGAIN_AFFINE)
        biases = (mujoco.mjtBias.mjBIAS_NONE, mujoco.mjtBias.mjBIAS_AFFINE)
        if not (np.isin(model.actuator_gaintype, gains).all() and np.isin(model.actuator_biastype, biases).all()):
            return False
    if name == "friction" and not model.geom_contype.any() and model.npair == 0:  # no contacts, as in Swimmer
        return False
    return any(bool(np.any(array)) for array in _arrays(model, name))


def _scale_model(model: Any, name: str, factor: float) -> None:
    import mujoco

    for array in _arrays(model, name):
        array *= factor
    if name == "mass":
        # What MuJoCo derives from masses: of subtrees, and the inverse inertias in which contacts are computed. It
        # works in the data that it is given, so not in the environment's own.
        mujoco.mj_setConst(model, mujoco.MjData(model))


# --- wrappers ----------------------------------------------------------------------------------------------------


class ActionNoise(gym.Wrapper):
    """Noise on actions, from a stream of its own that begins anew at every reset with a seed.

    Args:
        amount: standard deviation in halves of the range (`Box`), or probability of a random action (`Discrete`).
    """

    def __init__(self, env: gym.Env, amount: float) -> None:
        super().__init__(env)
        self.amount, self.noise = amount, _stream(0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.noise = _stream(seed)
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        return super().step(self.noisy(action))

    def noisy(self, action: Any) -> Any:
        """What is done instead of `action`."""
        space = self.action_space
        if isinstance(space, gym.spaces.Discrete):
            # Both numbers are drawn at every step, so that the draws after it are the same for any probability.
            replaced, other = self.noise.random() < self.amount, space.start + self.noise.integers(space.n)
            return other if replaced else action
        assert isinstance(space, gym.spaces.Box)
        low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        moved = action + self.amount * (high - low) / 2 * self.noise.standard_normal(space.shape)
        return np.clip(moved, low, high).astype(space.dtype)


def _stream(seed: int) -> np.random.Generator:
    return np.random.default_rng(derive(seed, NOISE))


class Slope(gym.Wrapper):
    """MountainCarContinuous with `factor` times its gravity, which is a number in its `step`.

    That adds -0.0025 cos(3 position) to the velocity; what it is too little or too much is added before.
    """

    def __init__(self, env: gym.Env, factor: float) -> None:
        super().__init__(env)
        self.factor = factor

    def step(self, action: Any) -> Any:
        base: Any = self.unwrapped
        position, velocity = map(float, base.state)
        push = (self.factor - 1) * -0.0025 * math.cos(3 * position)
        base.state = np.array([position, velocity + push])  # not in place: the last step returned this array
        return super().step(action)
