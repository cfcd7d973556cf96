"""Adapters: complete rows in every autoreset mode, scaling, refusals, and errors that name the environment."""

import math
import operator
import os
import signal
import subprocess
import sys
import time
from functools import partial, reduce
from pathlib import Path

import gymnasium as gym
import numpy as np
import psutil
import pytest
from env_zoo import SCHEDULE, Broken, Counter, DictCounter, Imports, Spaces, Walk, discrete, fails_in_workers
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Tuple
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

import rlkit.envs as envs
from rlkit.envs.spaces import ActionScale, check_action_space, flat_space, flatten_obs, space_from_json, space_to_json
from rlkit.envs.tracked import with_deadline
from rlkit.errors import CheckpointError, DivergenceError, EnvError, UserError

MODES = list(AutoresetMode)
COLUMNS = ["obs", "action", "reward", "next_obs", "terminated", "truncated", "episode", "env"]


# --- the autoreset oracle ----------------------------------------------------------------------------------------


def policy(obs):
    """(n, 3) -> (n, 2) in [-1, 1], a pure function: each environment gets the same actions in every mode."""
    return np.sin(obs @ np.array([[1.0, 5.0], [2.0, 0.3], [3.0, 1.1]])).astype(np.float32)


def scalar_loop(env, index, n, rows, act=policy, flat=lambda obs: obs):
    """What a plain loop over one environment stores: tuples in the order of COLUMNS; (return, length) by episode."""
    scale = ActionScale(env.action_space)
    stored, finished, episode = [], [], 0
    obs, total, length = env.reset()[0], 0.0, 0
    while len(stored) < rows:
        action = act(flat(obs)[None])[0]
        next_obs, reward, terminated, truncated, _ = env.step(scale.to_env(action))
        stored.append(
            (flat(obs), action, np.float32(reward), flat(next_obs), terminated, truncated, episode * n + index, index)
        )
        total, length, obs = total + reward, length + 1, next_obs
        if terminated or truncated:
            finished.append((total, length))
            obs, total, length, episode = env.reset()[0], 0.0, 0, episode + 1
    return stored, finished


def collect(adapter, count, act=policy):
    """Rows by environment, in the order of time."""
    by_env = [[] for _ in range(adapter.num_envs)]
    adapter.reset()
    for _ in range(count):
        acted_on = adapter.obs
        rows = adapter.step(act(adapter.obs))
        assert list(rows) == COLUMNS
        np.testing.assert_array_equal(rows["obs"], acted_on[rows["env"]])
        for i, env in enumerate(rows["env"]):
            by_env[env].append(tuple(rows[name][i] for name in COLUMNS))
    return by_env


def assert_same_rows(ours, expected):
    assert len(ours) > 0
    for row, (mine, theirs) in enumerate(zip(ours, expected, strict=False)):
        for name, a, b in zip(COLUMNS, mine, theirs, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"row {row}, {name}", strict=name in ("obs", "next_obs"))


def counters(n, make=Counter):
    return [partial(make, i) for i in range(n)]


def as_vector(mode):
    return lambda thunks: SyncVectorEnv(thunks, autoreset_mode=mode)


def as_async_vector(mode):
    return lambda thunks: AsyncVectorEnv(thunks, autoreset_mode=mode, context="forkserver")


def as_shared_buffer(mode):
    return lambda thunks: SyncVectorEnv(thunks, autoreset_mode=mode, copy=False)


def as_sb3(thunks):
    from stable_baselines3.common.vec_env import DummyVecEnv

    return DummyVecEnv(thunks)


SOURCES = {
    "thunks": lambda thunks: thunks,
    **{f"sync {mode.value}": as_vector(mode) for mode in MODES},
    **{f"shared {mode.value}": as_shared_buffer(mode) for mode in MODES},
    "sb3": as_sb3,
}


def check_source(source, n, **options):
    adapter = envs.make(source, **options)
    by_env = collect(adapter, 40)
    finished = adapter.pop_episodes()
    assert adapter.pop_episodes() == []
    for i, rows in enumerate(by_env):
        expected, episodes = scalar_loop(Counter(i), i, n, 40)
        if adapter.kind == "sb3":  # its interface has no episode that ends both ways
            expected = [(*row[:5], row[5] and not row[4], *row[6:]) for row in expected]
        assert_same_rows(rows, expected)
        records = [e for e in finished if e.env == i]
        # Float64 sums in the same order: equal, not close. SB3 hands out float32 rewards.
        tolerance = 1e-6 if adapter.kind == "sb3" else 0
        done = sum(bool(r[4] or r[5]) for r in rows)
        assert len(records) == done > 5
        for episode, (record, (total, length)) in enumerate(zip(records, episodes, strict=False)):
            assert record.length == length
            assert record.return_ == pytest.approx(total, rel=tolerance, abs=0)
            assert record.success is (episode % 2 == 0)
    adapter.close()
    return by_env


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("source", SOURCES)
def test_rows_equal_a_scalar_loop(source, n):
    by_env = check_source(SOURCES[source](counters(n)), n)
    for i, rows in enumerate(by_env):
        if "NextStep" not in source:
            assert len(rows) == 40
            continue
        # One step of 40 is lost per finished episode: lengths and ends by the schedule.
        taken, clock, episode = 0, 0, 0
        while True:
            length = SCHEDULE[(i + episode) % len(SCHEDULE)][0]
            if clock + length >= 40:
                taken += 40 - clock
                break
            taken, clock, episode = taken + length, clock + length + 1, episode + 1
        assert len(rows) == taken


def test_rows_from_worker_processes():
    check_source(counters(3), 3, vectorization_mode="async")


@pytest.mark.parametrize("mode", MODES)
def test_rows_from_a_given_async_vector_env(mode):
    venv = as_async_vector(mode)(counters(3))
    check_source(venv, 3)
    venv.close()


def test_termination_and_truncation_are_both_kept():
    ends = {"terminated": (True, False), "truncated": (False, True), "both": (True, True)}
    rows = collect(envs.make(counters(1)), 11)[0]
    assert [(bool(r[4]), bool(r[5])) for r in rows if r[4] or r[5]] == [ends[end] for _, end in SCHEDULE]


def test_sb3_wrappers_are_stored_as_they_come():
    from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

    adapter = envs.make(VecNormalize(VecMonitor(DummyVecEnv(counters(2))), clip_obs=5.0, clip_reward=3.0))
    rows = reduce(operator.iadd, collect(adapter, 30), [])
    # Raw steps exceed 5 nowhere but indices and rewards do: what is stored went through the normaliser.
    assert max(np.abs(r[0]).max() for r in rows) <= 5
    assert max(np.abs(r[3]).max() for r in rows) <= 5
    assert max(abs(r[2]) for r in rows) <= 3
    # The end of an episode of one step was normalised too, and is not the first observation of the next episode.
    ends = [r for r in rows if r[4] or r[5]]
    assert ends
    assert all(not np.array_equal(r[3], np.round(r[3])) for r in ends)


def flat_where(obs):
    return np.array([obs["where"]["time"][0, 0], obs["where"]["episode"][0], obs["index"]], np.float64)


@pytest.mark.parametrize("source", [name for name in SOURCES if name != "sb3"])
def test_nested_dict_observations_are_flattened_in_the_order_of_their_keys(source):
    adapter = envs.make(SOURCES[source](counters(3, DictCounter)))
    assert adapter.observation_space.shape == (3,)
    assert adapter.observation_space.dtype == np.float64  # of int32 and float32
    for i, rows in enumerate(collect(adapter, 25)):
        assert_same_rows(rows, scalar_loop(DictCounter(i), i, 3, 25, flat=flat_where)[0])


def test_dict_observations_from_sb3():
    def make(i):
        env = Counter(i)
        parts = Dict([("z", Box(-1, 1e6, (2,), np.float64)), ("a", Box(-1, 1e6, (1,), np.float64))])
        return gym.wrappers.TransformObservation(env, lambda obs: {"z": obs[:2], "a": obs[2:]}, parts)

    for i, rows in enumerate(collect(envs.make(as_sb3(counters(3, make))), 25)):
        expected = scalar_loop(Counter(i), i, 3, 25)[0]
        assert_same_rows(rows, [(*row[:5], row[5] and not row[4], *row[6:]) for row in expected])


def test_reset_starts_fresh_episodes_everywhere():
    for source in SOURCES.values():
        adapter = envs.make(source(counters(2)))
        adapter.reset()
        adapter.step(policy(adapter.obs))
        first = adapter.reset()
        np.testing.assert_array_equal(first[:, 2], 0)  # step
        rows = adapter.step(policy(first))
        assert len(rows["env"]) == 2
        assert all(e.length == 1 for e in adapter.pop_episodes())


def test_episode_ids_are_unique():
    rows = reduce(operator.iadd, collect(envs.make(counters(3)), 30), [])
    assert len({(int(r[6]), int(r[7])) for r in rows}) == len({int(r[6]) for r in rows})
    assert all(r[6] % 3 == r[7] for r in rows)


def test_step_before_reset_is_refused():
    adapter = envs.make(counters(1))
    assert adapter.obs is None
    with pytest.raises(UserError, match="call `reset"):
        adapter.step(np.zeros((1, 2)))


# --- actions and dtypes ------------------------------------------------------------------------------------------


def test_action_scale_maps_ends_exactly_and_inverts():
    low, high = np.float32([[-2.0, 0.1], [0.3, -7.7]]), np.float32([[2.0, 0.7], [0.3, 1e6]])
    scale = ActionScale(Box(low, high))
    assert scale.dim == 4
    ends = scale.to_env(np.float32([[-1] * 4, [1] * 4]))
    assert ends.shape == (2, 2, 2)
    assert ends.dtype == np.float32
    np.testing.assert_allclose(ends, [low, high], rtol=1e-6)
    assert (ends >= low).all()
    assert (ends <= high).all()
    np.testing.assert_array_equal(scale.to_env(np.float32([3, 3, 3, 3])), high)  # clipped
    # The middle of [-2, 2] is 0; by hand, 0.5 in [0.1, 0.7] is 0.4 + 0.5 * 0.3 = 0.55.
    np.testing.assert_allclose(scale.to_env(np.float32([0, 0.5, 0, 0]))[0], [0.0, 0.55], rtol=1e-6)
    actions = np.random.default_rng(0).uniform(-1, 1, (100, 4)).astype(np.float32)
    expected = actions * np.float32([1, 1, 0, 1])  # one dimension has a single value
    np.testing.assert_allclose(scale.from_env(scale.to_env(actions)), expected, atol=2e-6)


def test_action_scale_is_the_identity_on_the_unit_box():
    tiny = np.float32([[1e-30, -1.0, 1.0]])
    np.testing.assert_array_equal(ActionScale(Box(-1, 1, (3,))).to_env(tiny), tiny)


def test_actions_stay_within_bounds_whatever_the_rounding():
    rng = np.random.default_rng(1)
    for _ in range(200):
        low, high = np.sort(rng.normal(size=(2, 5)).astype(np.float32), axis=0)
        space = Box(low, high)
        scale = ActionScale(space)
        for value in (-1, 1, *rng.uniform(-1, 1, 3)):
            assert space.contains(scale.to_env(np.full(5, value, np.float32)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.uint8])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_observations_keep_the_dtype_of_their_space(dtype, mode):
    if mode == "async" and dtype not in (np.float16, np.float64):
        pytest.skip("the same path")
    space = Box(0, 5, (4,), dtype)
    adapter = envs.make([partial(Spaces, space)] * 2, vectorization_mode=mode)
    assert adapter.reset().dtype == dtype
    rows = adapter.step(np.zeros((2, 1)))
    assert rows["obs"].dtype == rows["next_obs"].dtype == adapter.observation_space.dtype == dtype
    types = {"action": "float32", "reward": "float32", "terminated": "bool", "truncated": "bool", "episode": "int64"}
    assert {name: str(rows[name].dtype) for name in types} == types
    adapter.close()


def test_observations_of_any_shape_are_flattened():
    adapter = envs.make([partial(Spaces, Box(-1.0, 1.0, shape)) for shape in [(2, 3)]])
    assert adapter.reset().shape == (1, 6)
    assert envs.make([partial(Spaces, Box(-1.0, 1.0, ()))]).reset().shape == (1, 1)


@pytest.mark.parametrize("start", [0, -2])
def test_discrete_actions_are_counted_from_zero(start):
    adapter = envs.make([partial(discrete, start)] * 2)
    assert adapter.scale is None
    adapter.reset()
    rows = adapter.step(np.array([0, 2]))
    np.testing.assert_array_equal(rows["action"], np.array([0, 2]), strict=True)
    np.testing.assert_array_equal(rows["reward"], [start, start + 2])


def test_rows_do_not_change_afterwards():
    adapter = envs.make([Walk] * 2)
    adapter.reset()
    action = np.full((2, 2), 0.5, np.float32)
    rows = adapter.step(action)
    copies = {name: column.copy() for name, column in rows.items()}
    action[:] = 0
    for _ in range(5):
        adapter.step(action)
    for name, column in rows.items():
        np.testing.assert_array_equal(column, copies[name])
    assert (rows["action"] == 0.5).all()  # though Walk zeroes the array that it gets


# --- spaces ------------------------------------------------------------------------------------------------------


def test_flat_space_keeps_bounds():
    space = Dict([("b", Box(np.float32([-1, -2]), np.float32([1, np.inf]))), ("a", Box(0, 9, (1, 2), np.int64))])
    flat = flat_space(space)
    np.testing.assert_array_equal(flat.low, [-1, -2, 0, 0])
    np.testing.assert_array_equal(flat.high, [1, np.inf, 9, 9])
    obs = {"b": np.float32([0.5, 1e9]), "a": np.array([[3, 4]])}
    np.testing.assert_array_equal(flatten_obs(space, obs), [0.5, 1e9, 3, 4])
    batch = {name: np.stack([value] * 3) for name, value in obs.items()}
    assert flatten_obs(space, batch, 3).shape == (3, 4)
    assert flatten_obs(space, batch, 3).dtype == flat.dtype


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (Box(0, 255, (8, 8, 3), np.uint8), "image"),
        (Box(0, 255, (84, 84), np.uint8), "image"),
        (Box(0, 1, (3, 64, 64)), "image"),
        (Dict(camera=Box(0, 255, (8, 8, 3), np.uint8)), "`camera` is an image"),
        (Discrete(16), r"Discrete\(16\).*FlattenObservation"),
        (MultiBinary(3), "FlattenObservation"),
        (Tuple([Discrete(2), Box(0, 1)]), "FlattenObservation"),
        (Dict(inner=Dict(card=Discrete(2))), "`inner` `card` is Discrete"),
        (Dict(), "empty"),
    ],
)
def test_observation_spaces_that_are_refused(space, message):
    with pytest.raises(UserError, match=message):
        envs.make([partial(Spaces, space)])


def test_small_matrices_are_not_images():
    assert flat_space(Box(-1, 1, (3, 3, 3))).shape == (27,)
    assert flat_space(Box(-1, 1, (10, 4))).shape == (40,)


def test_action_spaces_that_are_refused():
    with pytest.raises(UserError, match=r"SAC needs `Box` actions, got `Discrete\(2\)`; trainers that fit: PPO, DQN$"):
        check_action_space(Discrete(2), ("Box",), "SAC", ["PPO", "DQN"])
    with pytest.raises(UserError, match=r"PPO needs `Box` or `Discrete` actions, got `MultiBinary\(2\)`$"):
        check_action_space(MultiBinary(2), ("Box", "Discrete"), "PPO")
    check_action_space(Discrete(2), ("Box", "Discrete"), "PPO")
    unbounded = Box(np.float32([-1, 0, -np.inf]), np.float32([1, 1, 1]))
    for call in (
        lambda: check_action_space(unbounded, ("Box",), "SAC"),
        lambda: envs.make([partial(Spaces, None, unbounded)]),
    ):
        with pytest.raises(UserError, match=r"unbounded in dimension 2; .*TransformAction"):
            call()
    with pytest.raises(UserError, match="float32"):
        check_action_space(Box(0, 3, (2,), np.int64), ("Box",), "SAC")
    with pytest.raises(UserError, match=r"environment 0: actions must be `Box` or `Discrete`, got `MultiBinary\(2\)`"):
        envs.make([partial(Spaces, None, MultiBinary(2))])


def test_the_advice_for_unbounded_actions_works():
    unbounded = Spaces(None, Box(-np.inf, np.inf, (1,)))
    box = Box(-3.0, 3.0, (1,))
    env = gym.wrappers.TransformAction(unbounded, lambda action: action, box)
    adapter = envs.make(env)
    adapter.reset()
    assert adapter.step([[1.0]])["reward"] == 3


@pytest.mark.parametrize(
    "space",
    [
        Box(np.float32([-np.inf, -0.1]), np.float32([0.3, np.inf])),
        Box(-1e300, 1e300, (2, 3), np.float64),
        Box(0, 2**63 - 1, (1,), np.int64),
        Box(-1, 1, ()),
        Discrete(5, start=-3),
        Dict([("z", Box(0, 1, (2,))), ("a", Dict(x=Discrete(3)))]),
    ],
)
def test_spaces_survive_json(space):
    import json

    data = json.loads(json.dumps(space_to_json(space), allow_nan=False))
    back = space_from_json(data)
    assert back == space
    if isinstance(space, Dict):
        assert list(back) == list(space)  # the order of the flat observation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Tuple"}, "Tuple"),
        ({"type": 3}, "space.type: expected str"),
        ({"low": [0.0]}, "space.low: 1 values"),
        ({"low": ["nan", 0.0]}, "space.low"),
        ({"low": [None, 0.0]}, "space.low"),
        ({"low": [3.0, 0.0]}, "low is above high"),
        ({"shape": [-1, -2]}, "space.shape"),
        ({"shape": [10**12]}, "values for shape"),
        ({"dtype": "object"}, "space.dtype"),
        ({"high": "inf"}, "space.high: expected list"),
    ],
)
def test_malformed_spaces_give_typed_errors(change, message):
    good = space_to_json(Box(-1, 1, (2,)))
    with pytest.raises(CheckpointError, match=message):
        space_from_json({**good, **change})


def test_nested_malformed_spaces():
    deep = {"type": "Discrete", "n": 2, "start": 0, "dtype": "int64"}
    for _ in range(50):
        deep = {"type": "Dict", "spaces": [["a", deep]]}
    with pytest.raises(CheckpointError, match="nested"):
        space_from_json(deep)
    for bad in (None, [], "Box", {"type": "Dict", "spaces": [["a"]]}, {"type": "Discrete", "n": 0, "start": 0}):
        with pytest.raises(CheckpointError):
            space_from_json(bad)


# --- what cannot be made -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("Pendulm-v1", r"unknown environment `Pendulm-v1`; did you mean `Pendulum-v1`\?"),
        ("HalfCheetah-v99", r"unknown environment `HalfCheetah-v99`; did you mean `HalfCheetah-v5`\?"),
        ("Pendulum-v0", r"did you mean `Pendulum-v1`\?"),
        ("qwertyuiop-v3", "unknown environment `qwertyuiop-v3`; is the package"),
        ("no_such_module_:Pendulum-v1", "cannot import `no_such_module_`"),
        ("gymnasium:Pendulm-v1", "unknown environment `gymnasium:Pendulm-v1`; did you mean `Pendulum-v1`"),
        ("HalfCheetah-v2", "HalfCheetah-v2` cannot be made.*gymnasium-robotics"),
        ("FrozenLake-v1", r"Discrete\(16\)"),
        ("", "unknown environment ``"),
        (3, "expected an id, .* got builtins.int"),
        ([], "an empty list"),
        ([3], "not callable"),
        (Walk, r"put it into a list: \[make_env\]"),
    ],
)
def test_what_is_not_an_environment(spec, message):
    with pytest.raises(UserError, match=message):
        envs.make(spec)


def test_a_missing_dependency_names_its_install_command():
    gym.register("rlkit/NeedsMore-v0", entry_point=_needs_more)
    with pytest.raises(UserError, match=r'rlkit/NeedsMore-v0.*pip install "gymnasium\[more\]"'):
        envs.make("rlkit/NeedsMore-v0")


def _needs_more():
    raise gym.error.DependencyNotInstalled('more is not installed, run `pip install "gymnasium[more]"`')


def test_ids_with_module_or_without_version():
    assert envs.make("gymnasium.envs.classic_control:Pendulum-v1").observation_space.shape == (3,)
    assert envs.make("CartPole").make_single().spec.id == "CartPole-v1"


def test_env_kwargs():
    adapter = envs.make("Pendulum-v1", env_kwargs={"g": 1.5, "max_episode_steps": 3})
    assert adapter.make_single().unwrapped.g == 1.5
    adapter.reset()
    ends = [bool(adapter.step([[0.0]])["truncated"][0]) for _ in range(6)]
    assert ends == [False, False, True] * 2
    with pytest.raises(UserError, match=r"env_kwargs: `Pendulum-v1` has no parameter `gg`; .*g"):
        envs.make("Pendulum-v1", env_kwargs={"gg": 1})
    with pytest.raises(UserError, match="env_kwargs are for environments given by id"):
        envs.make([Walk], env_kwargs={"length": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_envs": 0}, "n_envs"),
        ({"n_envs": 1.5}, "n_envs"),
        ({"vectorization_mode": "parallel"}, "vectorization_mode"),
        ({"timeout": -1.0}, "timeout"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        envs.make("Pendulum-v1", **options)


def test_numbers_that_conflict():
    for source, n in ((Walk(), 2), ([Walk] * 3, 2), (as_vector(MODES[0])([Walk] * 3), 2), (as_sb3([Walk] * 3), 4)):
        with pytest.raises(UserError, match=f"n_envs: {n} conflicts"):
            envs.make(source, n_envs=n)
    assert envs.make([Walk] * 3, n_envs=3).num_envs == 3
    with pytest.raises(UserError, match="cannot move to a worker process"):
        envs.make(Walk(), vectorization_mode="async")


def test_autoreset_mode_is_not_guessed():
    venv = as_vector(AutoresetMode.SAME_STEP)([Walk])
    venv.metadata = {}
    with pytest.raises(UserError, match="NEXT_STEP, SAME_STEP or DISABLED"):
        envs.make(venv)
    venv.metadata = {"autoreset_mode": "SameStep"}
    assert envs.make(venv).mode is AutoresetMode.SAME_STEP


def test_thunks_must_make_environments_of_one_kind():
    env = Walk()
    with pytest.raises(UserError, match="environment 1 is the same object"):
        envs.make([lambda: env, lambda: env])
    with pytest.raises(UserError, match="environments 0 and 1 differ in their observation spaces"):
        envs.make([Walk, Counter])
    with pytest.raises(UserError, match="environments 0 and 1 differ in their action spaces"):
        envs.make([Spaces, discrete])
    with pytest.raises(UserError, match=r"environment 1: expected a gymnasium.Env, got builtins.dict"):
        envs.make([Walk, dict])
    with pytest.raises(EnvError, match="environment 1 could not be made: KeyError: 'x'"):
        envs.make([Walk, lambda: {}["x"]])


def test_making_a_single_environment():
    assert isinstance(envs.make([partial(Counter, 4), Counter]).make_single(), Counter)
    assert envs.make(Walk()).make_single is None
    venv = gym.make_vec("Pendulum-v1", num_envs=2, vectorization_mode="sync", g=2.5)
    assert envs.make(venv).make_single().unwrapped.g == 2.5
    assert envs.make(as_vector(MODES[0])([Walk])).make_single is None
    assert envs.single("Pendulum-v1", {"g": 3.5})().unwrapped.g == 3.5
    assert envs.single(Walk()) is None
    with pytest.raises(UserError, match="did you mean"):
        envs.single("Pendulm-v1")


def test_environment_objects_stay_open():
    class Closing(Walk):
        closed = False

        def close(self):
            self.closed = True

    env = Closing()
    envs.make(env).close()
    assert not env.closed
    made = []
    adapter = envs.make([lambda: made.append(Closing()) or made[-1]])
    adapter.close()
    assert made[0].closed


# --- errors of environments --------------------------------------------------------------------------------------


def steps(adapter, count, action, stored=None):
    for _ in range(count):
        rows = adapter.step(action)
        if stored is not None:
            stored.extend(rows["env"])


def run_until_error(adapter):
    """The error, and how many rows came before it."""
    adapter.reset()
    stored = []
    with pytest.raises(EnvError) as caught:
        steps(adapter, 20, np.full((adapter.num_envs, 1), 0.5, np.float32), stored)
    return caught, len(stored)


def broken(how, n=3, which=1, **options):
    return envs.make(
        [partial(Broken, how if i == which else "raises", 3 if i == which else 999) for i in range(n)], **options
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan_obs", r"^env 1, step 3, obs\[1\] = nan; last action \[1\.\]$"),
        ("inf_reward", r"^env 1, step 3, reward = -inf; last action \[1\.\]$"),
        ("huge_reward", r"^env 1, step 3, reward = 1e\+39 \(too large for float32\); last action \[1\.\]$"),
        ("text_reward", r"environment 1, step 3: the reward must be a real number, got 'much'; last action \[1\.\]"),
        ("int_flags", r"environment 1, step 3: `terminated` and `truncated` must be bools, got 0 and 0"),
        ("four", r"environment 1: `step` must return .* got 4 values; four values are the interface before gymnasium"),
        ("wrong_shape", r"environment 1, step 3: `step` returned an observation .* shape \(3,\)"),
        (
            "raises",
            r"environment 1 raised ZeroDivisionError in step, step 3 .* fell off the table; last action \[1\.\]",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_bad_steps_are_named_and_nothing_is_stored(how, message):
    caught, stored = run_until_error(broken(how))
    caught.match(message)
    assert stored == 2 * 3  # the two good steps; nothing of the third


def test_bad_resets_are_named():
    with pytest.raises(EnvError, match="environment 1: `reset` must return a pair"):
        broken("old_reset").reset()
    with pytest.raises(EnvError, match=r"env 1, step 0, obs\[1\] = nan after reset; last action none yet"):
        broken("nan_reset").reset()


def test_bad_resets_of_later_episodes_are_named():
    class Later(Walk):
        resets = 0

        def reset(self, **kwargs):
            obs, info = super().reset(**kwargs)
            self.resets += 1
            return (obs * np.nan if self.resets == 3 else obs), info

    for spec in ([Walk, partial(Later, 2)], as_vector(AutoresetMode.NEXT_STEP)([Walk, partial(Later, 2)])):
        adapter = envs.make(spec)
        adapter.reset()
        with pytest.raises(EnvError, match=r"^env 1, step \d, obs\[0\] = nan"):
            steps(adapter, 8, np.zeros((2, 2)))


def test_the_step_number_counts_the_whole_run():
    class Late(Walk):
        def step(self, action):
            obs, *rest = super().step(action)
            Late.count += 1
            return (obs * np.nan if Late.count == 57 else obs), *rest

    Late.count = 0
    adapter = envs.make([partial(Late, 10)])
    adapter.reset()
    with pytest.raises(EnvError, match=r"^env 0, step 57, obs\[0\] = nan"):
        steps(adapter, 60, np.zeros((1, 2)))


def test_nan_from_given_vector_envs():
    for wrap in (as_vector(AutoresetMode.SAME_STEP), as_vector(AutoresetMode.NEXT_STEP), as_sb3):
        adapter = envs.make(
            wrap([partial(Broken, "nan_obs" if i == 2 else "raises", 3 + 99 * (i != 2)) for i in range(3)])
        )
        caught, stored = run_until_error(adapter)
        caught.match(r"^env 2, step 3, obs\[1\] = nan; last action \[1\.\]$")
        assert stored == 6


def test_original_exception_is_chained_and_in_the_text():
    caught, _ = run_until_error(broken("raises"))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "env_zoo.py" in str(caught.value)
    assert "in raises" in str(caught.value)


def test_non_finite_actions_are_refused():
    adapter = envs.make([Walk] * 2)
    adapter.reset()
    with pytest.raises(DivergenceError, match=r"action\[1\] for environment 0 is nan"):
        adapter.step(np.array([[0.0, math.nan], [0, 0]]))
    with pytest.raises(UserError, match=r"actions have shape \(2, 1\), expected \(2, 2\)"):
        adapter.step(np.zeros((2, 1)))


def test_very_large_observations_are_finite():
    big = Box(-np.inf, np.inf, (2,), np.float32)
    adapter = envs.make(gym.wrappers.TransformObservation(Spaces(big), lambda obs: np.float32([3e38, -3e38]), big))
    adapter.reset()
    np.testing.assert_array_equal(adapter.step([[0.0]])["next_obs"], np.float32([[3e38, -3e38]]))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")
def test_hang_in_process():
    start = time.monotonic()
    caught, stored = run_until_error(broken("sleeps", timeout=1.0))
    caught.match(r"environment 1 did not return from step within 1 s \(step 3\); last action \[1\.\]")
    assert stored == 6
    assert time.monotonic() - start < 30


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")
def test_deadline_leaves_other_alarms_alone():
    rings = []
    before = signal.signal(signal.SIGALRM, lambda *_: rings.append(time.monotonic()))
    outer = signal.setitimer(signal.ITIMER_REAL, 50.0)
    try:
        for _ in range(20):  # a later alarm is set again after each call, with the time that passed taken off
            with_deadline(10.0, time.sleep, 0.005)
        assert 40 < signal.getitimer(signal.ITIMER_REAL)[0] < 50 - 20 * 0.005
        # An earlier one rings inside of the call, and is not mistaken for our deadline.
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        assert with_deadline(60.0, lambda: (time.sleep(0.4), len(rings))[1]) == 1
        # The handler is still theirs where we set no deadline.
        signal.raise_signal(signal.SIGALRM)
        assert len(rings) == 2
        assert with_deadline(60.0, lambda: 7) == 7
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)
        signal.signal(signal.SIGALRM, before)


# --- worker processes --------------------------------------------------------------------------------------------


def worker_pids(adapter):
    return [process.pid for process in adapter._venv.processes]


def gone(pids, seconds=20.0):
    """Did all processes end? Zombies that nobody reaped have ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        alive = [p for p in pids if psutil.pid_exists(p) and _status(p) != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.05)
    return False


def _status(pid):
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "raises",
            r"environment 1 raised ZeroDivisionError in step, .*last action \[1\.\]\n\nTraceback[\s\S]*in raises",
        ),
        ("killed", r"environment 1: its worker process was killed \(exit code -9, SIGKILL\).*last action \[1\.\]"),
        ("exits", r"environment 1: its worker process ended \(exit code 3\) in step; last action \[1\.\]"),
        ("sleeps", r"environment 1 did not return from step within 1 s \(step 3\); last action \[1\.\]"),
        ("deaf", r"environment 1 did not return from step within 1 s and its worker .* last action \[1\.\]"),
    ],
)
def test_failures_in_workers(how, message, recwarn):
    adapter = broken(how, vectorization_mode="async", timeout=1.0)
    pids = worker_pids(adapter)
    caught, stored = run_until_error(adapter)
    caught.match(message)
    assert stored == 6
    start = time.monotonic()
    adapter.close()
    adapter.close()
    assert time.monotonic() - start < 15
    assert gone(pids)
    assert not [w for w in recwarn if "Worker" in str(w.message)]  # gymnasium's own noise


def test_workers_ignore_signals_and_close_in_order():
    adapter = envs.make([Walk] * 2, vectorization_mode="async")
    pids = worker_pids(adapter)
    first = adapter.reset()
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    time.sleep(0.1)
    rows = adapter.step(np.zeros((2, 2)))
    np.testing.assert_array_equal(rows["obs"], first)
    assert len(adapter.state_dict()["envs"]) == 2
    adapter.close()
    assert gone(pids)
    assert [p.exitcode for p in adapter._venv.processes] == [0, 0]


def test_workers_do_not_import_torch():
    """A second or two and 200 MB each."""
    adapter = envs.make([Imports], vectorization_mode="async")
    adapter.reset()
    assert adapter.step([[0.0]])["reward"] == 0
    adapter.close()


def test_failures_while_workers_start():
    with pytest.raises(UserError, match="environments differ in their spaces"):
        envs.make([Walk, Counter], vectorization_mode="async")
    with pytest.raises(EnvError, match=r"environment 0: its worker process ended \(exit code 1\) while it made"):
        envs.make([partial(fails_in_workers, os.getpid())], vectorization_mode="async")
    with pytest.raises(UserError, match="environment 0: observation is Discrete"):
        envs.make([partial(Spaces, Discrete(3))], vectorization_mode="async")
    import threading

    lock = threading.Lock()
    with pytest.raises(UserError, match=r'environment 0 cannot be sent to a worker process.*"sync"'):
        envs.make([lambda: (lock, Walk())[1]], vectorization_mode="async")


SCRIPT = """
import sys, time
import rlkit.envs as envs
from env_zoo import Broken, Walk
from functools import partial
if __name__ == "__main__":
    thunks = [partial(Broken, "sleeps", 1)] * 2 if "stuck" in sys.argv else [Walk, Walk]
    adapter = envs.make(thunks, vectorization_mode="async")
    adapter.reset()
    print(*[p.pid for p in adapter._venv.processes], flush=True)
    if "stuck" in sys.argv:
        adapter.step([[0.0], [0.0]])
    if "wait" in sys.argv:
        time.sleep(60)
    if "raise" in sys.argv:
        raise SystemExit(7)
"""


def start_script(tmp_path, *args):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    process = subprocess.Popen(
        [sys.executable, str(script), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    pids = [int(word) for word in process.stdout.readline().split()]
    return process, pids


@pytest.mark.parametrize("doing", ["wait", "stuck"])
def test_no_orphans_when_the_parent_is_killed(tmp_path, doing):
    process, pids = start_script(tmp_path, doing)
    family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert len(pids) == 2
    assert set(pids) <= set(family)
    time.sleep(0.2)  # "stuck": the workers are in their steps
    process.kill()
    process.wait()
    assert gone(family)


@pytest.mark.parametrize(("how", "code"), [("end", 0), ("raise", 7)])
def test_a_script_that_does_not_close_ends_all_the_same(tmp_path, how, code):
    process, pids = start_script(tmp_path, how)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()  # where it waits for ever, it shall not outlive the test
    assert process.returncode == code, errors
    assert len(pids) == 2
    assert gone(pids)


def test_a_killed_worker_of_a_given_vector_env_is_named():
    venv = as_async_vector(AutoresetMode.SAME_STEP)([partial(Broken, "raises", 999)] * 2)
    adapter = envs.make(venv)
    adapter.reset()
    os.kill(venv.processes[1].pid, signal.SIGKILL)
    with pytest.raises(EnvError, match=r"environment 1: its worker process was killed \(exit code -9, SIGKILL\)"):
        steps(adapter, 3, np.zeros((2, 1)))
    venv.close(terminate=True)


def test_mujoco_warns_once_and_writes_no_file(tmp_path: Path) -> None:
    """Hopper's model uses a deprecated attribute: one line for four environments, and no MUJOCO_LOG.TXT."""
    script = "from rlkit import envs; [envs.make('Hopper-v5', n_envs=2).reset() for _ in range(2)]"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.count("settotalmass") <= 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
