"""Changed dynamics against equations of motion, and the command that evaluates under them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.envs.classic_control import AcrobotEnv
from helpers import tiny

import rlkit
from rlkit import envs
from rlkit.cli import main
from rlkit.envs.perturb import ActionNoise, nominal, parameters, parse, perturbed
from rlkit.errors import EnvError, UserError
from rlkit.perturbation import plans, sweep
from rlkit.plot import plot_sweep

Make = Callable[[], gym.Env]


def made(spec: str, name: str, value: float, **kwargs: Any) -> Any:
    """An environment of the id `spec` with a changed parameter, reset."""
    make = envs.single(spec, kwargs)
    assert make is not None
    env = perturbed(make, name, value)()
    env.reset(seed=0)
    return env


# --- what is asked for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("mass=0.5:1.5:5", "mass", [0.5, 0.75, 1, 1.25, 1.5]),
        ("mass=0.8:1.2:5", "mass", [0.8, 0.9, 1, 1.1, 1.2]),  # 0.8 + 2 * (0.4 / 4) is not 1 in floating point
        ("mass=0.5:1.5:1", "mass", [0.5]),
        ("p_up=1:0:3", "p_up", [1, 0.5, 0]),
        ("friction=0.8", "friction", [0.8]),
        ("g=10,-2.5,1e1,3", "g", [10, -2.5, 3]),  # each once
    ],
)
def test_forms(text: str, name: str, values: list[float]) -> None:
    found, numbers = parse(text)
    assert (found, numbers.tolist()) == (name, values)


@pytest.mark.parametrize(
    "text", ["mass", "mass=", "=1", "mass=1:2", "mass=1:2:3:4", "mass=a", "mass=1:2:2.5", "mass=1,,2", "../x=1"]
)
def test_wrong_forms(text: str) -> None:
    with pytest.raises(
        UserError, match=r"expected NAME=LOW:HIGH:COUNT, NAME=A,B,... or NAME=A, such as mass="
    ) as found:
        parse(text)
    assert repr(text) in str(found.value)


def test_wrong_numbers() -> None:
    with pytest.raises(UserError, match=r"'mass=1:2:0': the count is 0; at least 1 is needed"):
        parse("mass=1:2:0")
    for text in ("mass=nan", "mass=1,inf", "mass=0:inf:3"):
        with pytest.raises(UserError, match="have to be finite"):
            parse(text)


# --- classic control ---------------------------------------------------------------------------------------------


def cartpole(
    state: np.ndarray, force: float, *, cart: float = 1.0, pole: float = 0.1, half: float = 0.5, g: float = 9.8
) -> np.ndarray:
    """One Euler step of 0.02 s of a cart with a uniform pole (Florian 2007, equations 23 and 24 without friction).

    half: of the pole's length.
    """
    _, v, angle, turn = state
    total, sin, cos = cart + pole, math.sin(angle), math.cos(angle)
    push = (-force - pole * half * turn**2 * sin) / total
    bend = (g * sin + cos * push) / (half * (4 / 3 - pole * cos**2 / total))
    pull = (force + pole * half * (turn**2 * sin - bend * cos)) / total
    return state + 0.02 * np.array([v, pull, turn, bend])


@pytest.mark.parametrize(
    ("name", "factor", "changed"),
    [
        ("mass", 2.0, {"cart": 2.0, "pole": 0.2}),
        ("length", 2.0, {"half": 1.0}),
        ("gravity", 0.5, {"g": 4.9}),
        ("gravity", 0.0, {"g": 0.0}),
        ("force", 3.0, {"force": 30.0}),
        ("force", 1.0, {}),
    ],
)
def test_one_step_of_cartpole(name: str, factor: float, changed: dict[str, float]) -> None:
    env = made("CartPole-v1", name, factor)
    state = np.array([0.1, -0.4, 0.15, 0.8])
    env.unwrapped.state = state.copy()
    env.step(1)
    values = {"force": 10.0, **changed}
    np.testing.assert_allclose(env.unwrapped.state, cartpole(state, values.pop("force"), **values), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "factor", "g", "mass", "length", "torque"),
    [("mass", 2, 10, 2, 1, 1), ("length", 2, 10, 1, 2, 1), ("gravity", 0.5, 5, 1, 1, 1), ("force", 3, 10, 1, 1, 3)],
)
def test_one_step_of_pendulum(name: str, factor: float, g: float, mass: float, length: float, torque: float) -> None:
    """A rod: m l^2 / 3 times its acceleration = m g l sin / 2 + torque, so 3 g / (2 l) sin + 3 torque / (m l^2).

    The action stays in [-2, 2], and its cost is that of the action: force = 3 charges 0.001 * 2^2, not 0.001 * 6^2.
    """
    env = made("Pendulum-v1", name, factor)
    assert env.action_space == gym.make("Pendulum-v1").action_space
    angle, speed, action = 0.3, -0.5, 2.0
    env.unwrapped.state = np.array([angle, speed])
    _, reward, *_ = env.step(np.array([action], np.float32))
    after = speed + 0.05 * (3 * g / (2 * length) * math.sin(angle) + 3 * torque * action / (mass * length**2))
    assert env.unwrapped.state == pytest.approx([angle + 0.05 * after, after], rel=1e-12)
    assert reward == pytest.approx(-(angle**2 + 0.1 * speed**2 + 0.001 * action**2))


@pytest.mark.parametrize(("name", "factor", "ratio"), [("mass", 2, 1 / 2), ("length", 2, 1 / 4), ("force", 3, 3)])
def test_acrobot_from_rest(name: str, factor: float, ratio: float) -> None:
    """Hanging at rest gravity does nothing, and M acceleration = (0, torque): twice the mass doubles M, and twice the
    length, as all terms of M are a mass times a length squared, quadruples it. After 1 ms speeds are acceleration * t.
    """
    constants = {k: v for k, v in vars(AcrobotEnv).items() if k.isupper()}

    def speeds(env: Any) -> np.ndarray:
        env.unwrapped.dt, env.unwrapped.state = 1e-3, np.zeros(4)
        env.step(2)
        return np.asarray(env.unwrapped.state[2:])

    usual = gym.make("Acrobot-v1")
    usual.reset(seed=0)
    changed = made("Acrobot-v1", name, factor)
    np.testing.assert_allclose(speeds(changed), ratio * speeds(usual), rtol=1e-4)
    # By hand: d1 = 0.25 + (1 + 0.25 + 1) + 2 = 4.5, d2 = 0.25 + 0.5 + 1 = 1.75, and the second link's acceleration is
    # 1 / (1.25 - d2^2 / d1), the first one's -d2 / d1 times that.
    second = 1 / (1.25 - 1.75**2 / 4.5)
    np.testing.assert_allclose(speeds(usual), [-1.75 / 4.5 * second * 1e-3, second * 1e-3], rtol=1e-4)
    assert {k: v for k, v in vars(AcrobotEnv).items() if k.isupper()} == constants, "of the class: other instances"


@pytest.mark.parametrize(
    ("name", "factor", "gravity", "force"), [("gravity", 2, 0.005, 0.001), ("force", 3, 0.0025, 0.003)]
)
def test_mountain_car(name: str, factor: float, gravity: float, force: float) -> None:
    """velocity += force * (action - 1) - gravity * cos(3 position), then position += velocity."""
    env = made("MountainCar-v0", name, factor)
    env.unwrapped.state = (-0.5, 0.01)
    env.step(2)
    velocity = 0.01 + force - gravity * math.cos(-1.5)
    assert env.unwrapped.state == pytest.approx((-0.5 + velocity, velocity), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "factor", "gravity", "power"), [("gravity", 2, 0.005, 0.0015), ("force", 3, 0.0025, 0.0045)]
)
def test_mountain_car_continuous(name: str, factor: float, gravity: float, power: float) -> None:
    """The same with power * action. Two steps: the first one's observation is not written into by the second."""
    env = made("MountainCarContinuous-v0", name, factor)
    position, velocity = -0.5, 0.01
    env.unwrapped.state = np.array([position, velocity])
    seen = []
    for _ in range(2):
        velocity += power * 0.5 - gravity * math.cos(3 * position)
        position += velocity
        obs, reward, *_ = env.step(np.array([0.5], np.float32))
        seen.append((obs, obs.copy()))
        assert obs == pytest.approx([position, velocity], rel=1e-5)
        assert reward == pytest.approx(-0.1 * 0.25)
    assert all((obs == copy).all() for obs, copy in seen)


# --- MuJoCo ------------------------------------------------------------------------------------------------------


class Lab(gym.Env):
    """Four bodies apart from each other: a cart with a motor, one with a servo, a braked one, and a sliding box."""

    XML = """
    <mujoco><option timestep="0.001" integrator="implicit" cone="elliptic" impratio="10"/>
      <worldbody>
        <geom type="plane" size="50 50 1" friction="0.1 0.005 0.0001"/>
        <body pos="0 0 5"><joint name="pushed" type="slide" axis="1 0 0"/>
          <geom type="sphere" size="0.1" mass="2"/>
          <body pos="0 0 1"><geom type="sphere" size="0.1" mass="1"/></body></body>
        <body pos="0 5 5"><joint name="held" type="slide" axis="1 0 0"/><geom type="sphere" size="0.1" mass="2"/></body>
        <body pos="0 10 5"><joint name="braked" type="slide" axis="1 0 0" damping="4"/>
          <geom type="sphere" size="0.1" mass="2"/></body>
        <body pos="0 15 0.1"><joint name="box" type="slide" axis="1 0 0"/><joint name="up" type="slide" axis="0 0 1"/>
          <geom type="box" size="0.5 0.5 0.1" mass="1" friction="0.3 0.005 0.0001"/></body>
      </worldbody>
      <actuator>
        <motor joint="pushed" gear="6" ctrlrange="-1 1" ctrllimited="true" forcerange="-0.5 0.5" forcelimited="true"/>
        <position joint="held" kp="10"/>
      </actuator></mujoco>"""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float64)

    def __init__(self) -> None:
        self.model = mujoco.MjModel.from_xml_string(self.XML)
        self.data = mujoco.MjData(self.model)

    def go(self, seconds: float, ctrl: tuple[float, float] = (0, 0), **speeds: float) -> dict[str, float]:
        """Speeds along x of the four bodies, after some time from the given ones; before, the box comes to rest."""
        mujoco.mj_resetData(self.model, self.data)
        for _ in range(500):
            mujoco.mj_step(self.model, self.data)
        for name, speed in speeds.items():
            self.data.joint(name).qvel[0] = speed
        self.data.ctrl[:] = ctrl
        for _ in range(round(seconds / 0.001)):
            mujoco.mj_step(self.model, self.data)
        return {name: float(self.data.joint(name).qvel[0]) for name in ("pushed", "held", "braked", "box")}


def lab(name: str, factor: float) -> Any:
    return perturbed(Lab, name, factor)()


@pytest.mark.parametrize(
    ("name", "factor", "acceleration"),
    [("mass", 1, 1.0), ("mass", 2, 0.5), ("force", 2, 2.0), ("force", 0.5, 0.5), ("damping", 3, 1.0)],
)
def test_acceleration_by_a_motor(name: str, factor: float, acceleration: float) -> None:
    """A motor of gear 6 whose force is limited to 0.5: 3 N on 3 kg. The limit is a part of its strength."""
    assert lab(name, factor).go(0.5, (1, 0))["pushed"] == pytest.approx(0.5 * acceleration, rel=1e-6)


@pytest.mark.parametrize(("factor", "stiffness"), [(1, 10.0), (4, 40.0)])
def test_a_stronger_servo_has_the_same_target(factor: float, stiffness: float) -> None:
    """m x'' = k (target - x): x = target (1 - cos(w t)), w = sqrt(k / 2 kg); more gear would also halve the target."""
    env = lab("force", factor)
    speed = env.go(0.3, (0, 0.7))["held"]
    rate = math.sqrt(stiffness / 2)
    assert speed == pytest.approx(0.7 * rate * math.sin(rate * 0.3), rel=5e-3)
    assert env.data.joint("held").qpos[0] == pytest.approx(0.7 * (1 - math.cos(rate * 0.3)), rel=5e-3)


@pytest.mark.parametrize(
    ("name", "factor", "rate"), [("damping", 1, 2), ("damping", 0.5, 1), ("damping", 0, 0), ("mass", 2, 1)]
)
def test_damping(name: str, factor: float, rate: float) -> None:
    """2 kg and 4 N s / m: the speed decays as exp(-2 t)."""
    assert lab(name, factor).go(0.5, braked=1)["braked"] == pytest.approx(math.exp(-rate * 0.5), rel=2e-3)


@pytest.mark.parametrize(
    ("name", "factor", "friction", "g"),
    [
        ("friction", 1, 0.3, 9.81),
        ("friction", 2, 0.6, 9.81),
        ("friction", 0, 0, 9.81),
        ("gravity", 0.5, 0.3, 4.905),
        ("mass", 3, 0.3, 9.81),
    ],
)
def test_sliding(name: str, factor: float, friction: float, g: float) -> None:
    """Whatever the mass: a box that slides is slowed by friction times the impulse from below, over the mass; that is
    g t and its speed upwards, as soft contacts let it bounce a little. (MuJoCo's least friction is 1e-5.)
    """
    env = lab(name, factor)
    slowed = 3 - env.go(0.3, box=3)["box"]
    assert slowed == pytest.approx(friction * (g * 0.3 + env.data.joint("up").qvel[0]), rel=1e-6, abs=1e-4)


def test_what_mujoco_derives_from_masses_follows() -> None:
    """3 kg on the first joint, in two bodies; without mj_setConst the sums would be the old ones."""
    usual, heavy = Lab(), lab("mass", 2)
    assert usual.model.body_subtreemass[:3] == pytest.approx([8, 3, 1])
    assert heavy.model.body_subtreemass[:3] == pytest.approx([16, 6, 2])
    assert heavy.model.body_invweight0[1:] == pytest.approx(usual.model.body_invweight0[1:] / 2)
    assert heavy.model.dof_invweight0 == pytest.approx(usual.model.dof_invweight0 / 2)
    assert heavy.model.body_inertia == pytest.approx(usual.model.body_inertia * 2)
    assert usual.model.geom_friction[0].tolist() == [0.1, 0.005, 0.0001]
    assert lab("friction", 3).model.geom_friction[0] == pytest.approx([0.3, 0.015, 0.0003])


def mass_matrix(env: Any) -> np.ndarray:
    model, matrix = env.unwrapped.model, np.zeros((env.unwrapped.model.nv,) * 2)
    if tuple(map(int, mujoco.__version__.split(".")[:2])) >= (3, 10):
        mujoco.mj_fullM(model, env.unwrapped.data, matrix)
    else:
        mujoco.mj_fullM(model, matrix, env.unwrapped.data.qM)
    return matrix - np.diag(model.dof_armature)


def test_hopper() -> None:
    """All of the mass matrix but the rotors' inertia doubles, in the data of the environment after its reset."""
    usual, heavy = gym.make("Hopper-v5"), made("Hopper-v5", "mass", 2)
    usual.reset(seed=0)
    np.testing.assert_allclose(mass_matrix(heavy), 2 * mass_matrix(usual), rtol=1e-9, atol=1e-12)
    model: Any = usual.unwrapped
    assert heavy.unwrapped.model.body_mass.sum() == pytest.approx(2 * model.model.body_mass.sum())
    assert heavy.unwrapped.model.dof_armature.tolist() == model.model.dof_armature.tolist()
    strong = made("Hopper-v5", "force", 0.5)
    assert strong.action_space == usual.action_space
    strong.step(np.array([1.0, -1.0, 0.5], np.float32))
    # The gear is 200.
    assert strong.unwrapped.data.qfrc_actuator == pytest.approx([0, 0, 0, 100, -100, 50])


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 2.0])
def test_hopper_falls(factor: float) -> None:
    """Lifted by 5 m at rest, without actuators: it falls as one, by -9.81 * factor * t, until it touches the ground."""
    base = made("Hopper-v5", "gravity", factor).unwrapped
    qpos = base.init_qpos.copy()
    qpos[1] += 5
    base.set_state(qpos, np.zeros(6))
    base.do_simulation(np.zeros(3), 10)
    expected = np.zeros(6)
    expected[1] = -9.81 * factor * 10 * base.model.opt.timestep
    assert base.data.qvel == pytest.approx(expected, abs=1e-9)


def returns_of(make: Make, steps: int = 30) -> list[float]:
    """Rewards under fixed actions from a fixed seed."""
    env = make()
    env.reset(seed=3)
    rng = np.random.default_rng(0)
    actions = [rng.uniform(-1, 1, env.action_space.shape or ()) for _ in range(steps)]
    found = [float(env.step(action.astype(np.float32))[1]) for action in actions]
    env.close()
    return found


@pytest.mark.parametrize("name", ["mass", "friction", "gravity", "damping", "force"])
def test_a_factor_near_one_changes_little(name: str) -> None:
    """The nominal value makes the environment of `make_env` itself; one near it differs by rounding, not by more."""
    make = partial(gym.make, "HalfCheetah-v5")
    assert perturbed(make, name, 1) is make
    usual = returns_of(make)
    assert returns_of(perturbed(make, name, 1 + 1e-12)) == pytest.approx(usual, abs=1e-6)
    assert np.abs(np.subtract(returns_of(perturbed(make, name, 1.5)), usual)).max() > 1e-3
    assert returns_of(make) == usual, "other environments stay as they are"


# --- noise -------------------------------------------------------------------------------------------------------


class Arms(gym.Env):
    """Remembers its actions; ranges of different sizes."""

    observation_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, action_space: gym.Space | None = None) -> None:
        self.action_space = action_space or gym.spaces.Box(np.array([-1, 0], np.float32), np.array([1, 10], np.float32))
        self.done: list[Any] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.done.append(np.copy(action))
        return np.zeros(1, np.float32), 0.0, False, False, {}


def actions_of(make: Make, action: Any, steps: int, seed: int = 0) -> np.ndarray:
    env = make()
    env.reset(seed=seed)
    for _ in range(steps):
        env.step(action)
    base: Any = env.unwrapped
    return np.array(base.done)


def test_gaussian_noise() -> None:
    """Standard deviation 0.1 in halves of the ranges, 1 and 5: 0.1 and 0.5. The middle is 10 deviations from the
    bounds. Of n = 4000 the mean is within 4 s / sqrt(n), the deviation within 4 s / sqrt(2 n), of the true one.
    """
    n, middle = 4000, np.array([0.0, 5.0], np.float32)
    found = actions_of(perturbed(Arms, "action_noise", 0.1), middle, n)
    assert found.dtype == np.float32
    for column, centre, s in zip(found.T, (0, 5), (0.1, 0.5), strict=True):
        assert column.mean() == pytest.approx(centre, abs=4 * s / math.sqrt(n))
        assert column.std() == pytest.approx(s, abs=4 * s / math.sqrt(2 * n))
    assert abs(np.corrcoef(found.T)[0, 1]) < 4 / math.sqrt(n)
    # The same draws for another deviation, so that differences between values are paired.
    twice = actions_of(perturbed(Arms, "action_noise", 0.2), middle, n)
    np.testing.assert_allclose(twice - middle, 2 * (found - middle), atol=1e-5)


def test_noise_is_clipped_to_the_space() -> None:
    """At the bound half of the draws would leave it."""
    n = 2000
    found = actions_of(perturbed(Arms, "action_noise", 0.1), np.array([1.0, 0.0], np.float32), n)
    assert found.min(0)[1] == 0
    assert found.max(0)[0] == 1
    for share in ((found[:, 0] == 1).mean(), (found[:, 1] == 0).mean()):
        assert share == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(n))


@pytest.mark.parametrize("probability", [0.3, 1.0])
def test_random_actions(probability: float) -> None:
    """Of 4 actions from 2 on, the chosen 3 is done with probability 1 - p + p / 4, each other one with p / 4."""
    n, make = 4000, partial(Arms, gym.spaces.Discrete(4, start=2))
    found = actions_of(perturbed(make, "action_noise", probability), 3, n)
    for action in range(2, 6):
        p = probability / 4 + (action == 3) * (1 - probability)
        assert (found == action).mean() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))
    assert set(found.tolist()) == {2, 3, 4, 5}


def test_noise_is_of_the_seed_of_the_episode() -> None:
    make = perturbed(Arms, "action_noise", 0.5)
    start = np.array([0.0, 5.0], np.float32)
    once, other = actions_of(make, start, 5, seed=1), actions_of(make, start, 5, seed=2)
    assert not np.isin(once, other).any()
    env = make()
    assert isinstance(env, ActionNoise)
    for seed in (2, 1):  # whatever episodes were before
        env.reset(seed=seed)
        for _ in range(5):
            env.step(start)
    env.reset()  # without a seed the stream goes on
    env.step(start)
    base: Any = env.unwrapped
    done = np.array(base.done)
    assert (done[:5] == other).all()
    assert (done[5:10] == once).all()
    assert not np.isin(done[10], once).any()


# --- keywords and own methods ------------------------------------------------------------------------------------


def test_a_keyword_of_the_constructor() -> None:
    make = envs.single("rlkit/SlipperyGrid-v0", {"slip": 0.2})
    assert make is not None
    env = make()
    assert parameters(env) == ("action_noise", "slip", "horizon")
    assert [nominal(env, name) for name in parameters(env)] == [0, 0.2, 12]
    assert perturbed(make, "slip", 0.2) is make
    changed = perturbed(make, "slip", 0.5)()
    expected = gym.make("rlkit/SlipperyGrid-v0", slip=0.5)
    a: Any
    b: Any
    a, b = changed.unwrapped, expected.unwrapped
    np.testing.assert_array_equal(a.dynamics, b.dynamics)
    with pytest.raises(UserError, match=r"`slip`: got 1.5, expected a probability"):
        perturbed(make, "slip", 1.5)


class Windy(Lab):
    """Has a method of its own for wind alone."""

    perturbations = ("wind",)
    wind = 0.0

    def perturb(self, name: str, value: float) -> None:
        if value > 9:
            raise ValueError("a storm")
        assert name == "wind"
        self.wind = value


class Own(Windy):
    """Takes every name, as its method says nothing else."""

    perturbations: Any

    def __getattribute__(self, name: str) -> Any:
        if name == "perturbations":
            raise AttributeError(name)
        return super().__getattribute__(name)

    def perturb(self, name: str, value: float) -> None:
        self.asked = (name, value)


def test_an_environment_with_a_method_of_its_own() -> None:
    changed: Any = perturbed(Windy, "wind", 3)()
    assert changed.wind == 3
    assert Windy.wind == 0
    assert nominal(changed, "wind") is None
    assert parameters(changed) == ("wind", "mass", "friction", "gravity", "damping", "force", "action_noise")
    heavy: Any = perturbed(Windy, "mass", 2)()
    assert heavy.model.body_mass.sum() == pytest.approx(16)
    with pytest.raises(
        UserError, match=r"`perturb` of the environment Windy does not take wind=10: ValueError: a storm"
    ):
        perturbed(Windy, "wind", 10)
    asked: Any = perturbed(Own, "mass", 2)()
    assert asked.asked == ("mass", 2)
    assert asked.model.body_mass.sum() == pytest.approx(8)


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "name", "value", "message"),
    [
        ("CartPole-v1", "friction", 2, "`CartPole-v1` has no parameter `friction` to change; it has mass, gravity, "
         "length, force, action_noise"),
        ("Acrobot-v1", "gravity", 2, "it has mass, length, force, action_noise"),
        ("Swimmer-v5", "friction", 2, "it has mass, gravity, force, action_noise, frame_skip, "),
        ("CartPole-v1", "sutton_barto_reward", 1, "it has mass, gravity, length, force, action_noise"),
        ("CartPole-v1", "mass", -0.5, "mass=-0.5: it is a factor of the nominal value and has to be > 0"),
        ("CartPole-v1", "length", 0, "length=0: it is a factor of the nominal value and has to be > 0"),
        ("CartPole-v1", "gravity", -1, "gravity=-1: it is a factor of the nominal value and has to be >= 0"),
        ("CartPole-v1", "mass", math.nan, "mass=nan: the value has to be finite"),
        ("CartPole-v1", "action_noise", 1.1, "action_noise=1.1: expected a probability, from 0 to 1"),
        ("Pendulum-v1", "action_noise", -1, "action_noise=-1: expected a standard deviation >= 0"),
        ("rlkit/SlipperyGrid-v0", "horizon", 20, "horizon=20 changes the spaces of `rlkit/SlipperyGrid-v0`"),
    ],
)  # fmt: skip
def test_errors(spec: str, name: str, value: float, message: str) -> None:
    make = envs.single(spec)
    assert make is not None
    with pytest.raises(UserError) as found:
        perturbed(make, name, value)
    assert message in str(found.value)


def test_changes_do_not_add_up() -> None:
    """A function that returns one environment again and again would double its mass each time."""
    env = gym.make("CartPole-v1")
    with pytest.raises(
        UserError, match=r"`mass` of `CartPole-v1` is changed already; give a function that makes a new"
    ):
        perturbed(lambda: env, "mass", 2)()
    base: Any = env.unwrapped
    assert base.masscart == 2
    both: Any = perturbed(perturbed(partial(gym.make, "CartPole-v1"), "mass", 2), "length", 3)().unwrapped
    assert (both.total_mass, both.polemass_length) == pytest.approx((2.2, 0.2 * 1.5))


def test_spaces_without_noise() -> None:
    """There is no half of an infinite range, nor a uniformly drawn action in it."""
    for space in (gym.spaces.Box(-np.inf, np.inf, (2,)), gym.spaces.MultiDiscrete([2, 3])):
        assert parameters(Arms(space)) == ()
        with pytest.raises(UserError, match="has no parameter `action_noise` to change; it has none"):
            perturbed(partial(Arms, space), "action_noise", 0.1)


# --- sweeps and the command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of SAC on Pendulum-v1."""
    folder = tmp_path_factory.mktemp("perturb") / "run"
    tiny("sac", out=str(folder), checkpoint_every=20).learn(20)
    return folder


def evaluation(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[list[str], dict[str, Any]]:
    """The lines for people and the object of `rlkit eval ARGS --json`."""
    assert main(["eval", *args, "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def test_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Table, figure, CSV and JSON of two parameters; at 1 the returns are those of `rlkit eval`, to the last bit."""
    fixed = [str(run), "--episodes", "3", "--seed", "5"]
    plain_lines, plain = evaluation(capsys, *fixed)
    lines, found = evaluation(capsys, *fixed, "--perturb", "mass=0.5:1.5:3", "--perturb", "action_noise=0.2")
    assert lines[0] == plain_lines[0]
    assert {k: v for k, v in found.items() if k != "perturb"} == plain
    assert list(found["perturb"]) == ["mass", "action_noise"]
    swept = found["perturb"]["mass"]
    assert [point["value"] for point in swept] == [0.5, 1, 1.5]
    assert {k: v for k, v in swept[1].items() if k != "value"} == plain
    assert len({tuple(point["returns"]) for point in swept}) == 3
    (noisy,) = found["perturb"]["action_noise"]
    assert noisy["returns"] != plain["returns"]

    assert lines[1].split() == ["mass", "return", "95", "%", "interval", "episodes"]
    for line, point in zip(lines[2:5], swept, strict=True):
        low, high = point["ci95"]
        interval = [f"{low:.1f}", "to", f"{high:.1f}", "3"]
        mark = ["unperturbed"] if point["value"] == 1 else []
        assert line.split() == [
            f"{point['value']:g}",
            f"{point['mean']:.1f}",
            "±",
            f"{point['std']:.1f}",
            *interval,
            *mark,
        ]
    png, rows = run / "perturb-mass.png", run / "perturb-mass.csv"
    assert lines[5:7] == [f"figure: {png}", f"returns: {rows}"]
    assert png.read_bytes().startswith(b"\x89PNG")
    with rows.open(encoding="utf-8", newline="") as file:
        read = [(float(r["value"]), int(r["episode"]), float(r["return"])) for r in csv.DictReader(file)]
    assert read == [(point["value"], k, r) for point in swept for k, r in enumerate(point["returns"])]
    assert {path.name for path in run.glob("perturb-*")} == {
        "perturb-mass.png", "perturb-mass.csv", "perturb-action_noise.png", "perturb-action_noise.csv"
    }  # fmt: skip
    assert not list(run.glob(".tmp-*"))


def test_of_a_checkpoint_one_episode(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its files go beside those of the run, with the step in their names; one episode has no interval."""
    checkpoint = run / "checkpoints" / "step-0000000020"
    lines, found = evaluation(capsys, str(checkpoint), "--episodes", "1", "--perturb", "gravity=0")
    (point,) = found["perturb"]["gravity"]
    assert (point["std"], point["ci95"]) == (None, [None, None])
    assert lines[2].split()[2:] == ["none", "(n=1)", "1"]
    assert lines[3] == f"figure: {run / 'step-0000000020-perturb-gravity.png'}"
    assert (run / "step-0000000020-perturb-gravity.csv").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["mass=1:2"], "expected NAME=LOW:HIGH:COUNT"),
        (["mass=0.5,-1"], "mass=-1: it is a factor"),
        (
            ["mass=2", "masss=2"],
            "has no parameter `masss` to change; it has mass, gravity, length, force, action_noise, g",
        ),
        (["mass=2", "mass=3"], "`mass` is given twice; give all of its values at once"),
    ],
)
def test_mistakes_are_found_before_the_first_episode(
    run: Path, given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run), *(part for text in given for part in ("--perturb", text))]) == 2
    out = capsys.readouterr()
    assert message in out.err
    assert out.out == ""


def test_successes_and_a_saved_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside a saved folder, as it could not be saved again if it held anything else."""
    agent = tiny("sac", env="rlkit/TwoPeaks-v0")
    agent.save(tmp_path / "agent")
    lines, found = evaluation(capsys, str(tmp_path / "agent"), "--episodes", "40", "--perturb", "action_noise=0,1")
    assert lines[1].split()[-1] == "success"
    for line, point in zip(lines[2:4], found["perturb"]["action_noise"], strict=True):
        assert f"  {100 * point['success_rate']:.0f} %" in line
    # Noise as wide as half of the range: some of 40 actions are near a peak, and some are not.
    assert 0 < point["success_rate"] < 1
    assert lines[2].endswith("unperturbed")
    assert (tmp_path / "agent-perturb-action_noise.png").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "agent-perturb-action_noise.csv", "agent-perturb-action_noise.png"
    ]  # fmt: skip


def test_a_keyword_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The evaluation's own slip is marked, and each value is what an environment made with it gives."""
    agent: Any = tiny("pmoe_ppo", env="rlkit/SlipperyGrid-v0", env_kwargs={"slip": 0.2}, n_experts=1)
    agent.save(tmp_path / "agent")
    lines, found = evaluation(capsys, str(tmp_path / "agent"), "--episodes", "20", "--perturb", "slip=0:0.4:3")
    assert [line.endswith("unperturbed") for line in lines[2:5]] == [False, True, False]
    for point in found["perturb"]["slip"]:
        other = rlkit.load(tmp_path / "agent", eval_env=partial(gym.make, "rlkit/SlipperyGrid-v0", slip=point["value"]))
        assert other.evaluate(20)["eval/returns"] == point["returns"]  # type: ignore[index]


def test_a_language_model() -> None:
    with pytest.raises(UserError, match=r"`sft` acts in no environment: .*`--perturb` is for control trainers"):
        plans(tiny("sft"), ["mass=1"])


def test_environments_given_in_python() -> None:
    """`eval_env` makes what is changed; an object cannot be made again."""
    agent: Any = rlkit.SAC(gym.make("Pendulum-v1"), policy_kwargs={"net_arch": [8]}, buffer_size=100)
    with pytest.raises(UserError, match="pass `eval_env=`"):
        sweep(agent, "mass", [2.0])
    agent = rlkit.SAC(
        gym.make("Pendulum-v1"),
        policy_kwargs={"net_arch": [8]},
        buffer_size=100,
        eval_env=partial(gym.make, "Pendulum-v1", max_episode_steps=20),
    )
    seen: list[float] = []
    points = sweep(agent, "mass", np.array([2.0, 1.0]), 2, watch=lambda value, result: seen.append(value))
    assert [value for value, _ in points] == seen == [2, 1]
    assert all(result.lengths == [20, 20] for _, result in points)
    assert points[1][1].returns == agent.evaluate(2)["eval/returns"]
    assert points[0][1].returns != points[1][1].returns
    with pytest.raises(UserError, match="`mass`: no values"):
        sweep(agent, "mass", [])


class Fragile(Arms):
    """Fails at its first step."""

    def step(self, action: Any) -> Any:
        raise RuntimeError("it broke")


def test_an_environment_that_fails_leaves_the_trainer_as_it_was() -> None:
    agent: Any = rlkit.SAC(Arms(), policy_kwargs={"net_arch": [8]}, buffer_size=100, eval_env=Fragile)
    with pytest.raises(EnvError, match="episode 0, step 0: it broke"):
        sweep(agent, "action_noise", [0.1], 1)
    assert agent.actor.training


def test_a_figure_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        plot_sweep("mass", [(1, 2, 1, 3)], tmp_path / "no" / "x.png", title="", episodes=2)
