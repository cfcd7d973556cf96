"""Restored environments go on bit for bit: observations, rewards, ends of episodes and their returns."""

import copy
import json
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from env_zoo import Counter, Walk, discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import rlkit.envs as envs
from rlkit.envs import tracked
from rlkit.errors import CheckpointError

TASKS = [
    *(
        f"{name}-v5"
        for name in (
            "Ant",
            "HalfCheetah",
            "Hopper",
            "Humanoid",
            "InvertedDoublePendulum",
            "InvertedPendulum",
            "Pusher",
            "Reacher",
            "Swimmer",
            "Walker2d",
        )
    ),
    "Pendulum-v1",
    "MountainCarContinuous-v0",
    "CartPole-v1",
    "Acrobot-v1",
]


def actions_for(adapter, steps, seed=0):
    rng = np.random.default_rng(seed)
    shape = (steps, adapter.num_envs)
    if adapter.scale is None:
        return rng.integers(adapter.action_space.n, size=shape)
    return rng.uniform(-1, 1, (*shape, adapter.scale.dim)).astype(np.float32)


def plain(state):
    """The state after a file: nothing but containers, scalars and arrays is allowed, and no memory is shared."""
    if isinstance(state, dict):
        assert all(type(key) is str for key in state)
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, list):
        return [plain(value) for value in state]
    if isinstance(state, np.ndarray):
        assert state.dtype.kind in "fiub"
        return state.copy()
    assert state is None or type(state) in (int, float, str, bool), type(state)
    return json.loads(json.dumps(state))


def trace(adapter, actions):
    """Everything that a run sees, as bytes."""
    seen = [adapter.obs.tobytes()]
    for action in actions:
        rows = adapter.step(action)
        seen += [(name, column.dtype, column.tobytes()) for name, column in rows.items()]
        seen.append(adapter.obs.tobytes())
    return seen, adapter.pop_episodes()


def check_exact(make, before, after=50):
    """A run of before + after steps is the same with a save, a new adapter and a load in the middle."""
    straight = make()
    actions = actions_for(straight, before + after)
    straight.reset()
    trace(straight, actions[:before])
    expected = trace(straight, actions[before:])

    first = make()
    first.reset()
    trace(first, actions[:before])
    state = plain(first.state_dict())
    first.close()
    second = make()
    assert second.load_state_dict(state) == []
    np.testing.assert_equal(plain(second.state_dict()), state)  # saving again changes nothing
    assert trace(second, actions[before:]) == expected
    # Further on too, through the ends of episodes: the new episodes' seeds continue as they would have.
    more = actions_for(straight, 30, seed=1)
    assert trace(second, more) == trace(straight, more)
    second.close()
    straight.close()


# Before: right after the first reset; early in an episode; late in it or in the next ones, whichever the task has.
@pytest.mark.parametrize("before", [0, 7, 120])
@pytest.mark.parametrize("task", TASKS)
def test_tasks_are_restored_exactly(task, before):
    check_exact(partial(envs.make, task, seed=3), before)


@pytest.mark.parametrize("task", ["HalfCheetah-v5", "Reacher-v5", "Hopper-v5", "CartPole-v1"])
def test_three_environments_are_restored_exactly(task):
    check_exact(partial(envs.make, task, n_envs=3, seed=5), 61)


@pytest.mark.parametrize("thunks", [[Walk] * 3, [partial(Walk, 9)] * 2, [partial(discrete, 4)] * 2])
def test_own_environments_are_restored_exactly(thunks):
    """Noise from the reset's seed, observations that share one array, actions that are overwritten."""
    for before in (0, 1, 33):
        check_exact(partial(envs.make, thunks, seed=1), before)


def test_restored_at_the_step_that_ends_an_episode():
    for before in range(8, 12):
        check_exact(partial(envs.make, [partial(Walk, 10)], seed=2), before)


def test_dict_observations_are_restored_exactly():
    def walk():
        space = gym.spaces.Dict(x=gym.spaces.Box(-np.inf, np.inf, (2,), np.float64))
        return gym.wrappers.TransformObservation(Walk(), lambda obs: {"x": obs.copy()}, space)

    check_exact(partial(envs.make, [walk] * 2), 25)


def test_worker_processes_are_restored_exactly(monkeypatch):
    monkeypatch.setattr("rlkit.envs.own.REPLAY_CHUNK", 0.0)  # the longest conversation: one step a call
    check_exact(partial(envs.make, "Hopper-v5", n_envs=2, seed=4, vectorization_mode="async"), 47)


def test_a_state_moves_between_process_and_workers():
    inside, workers = envs.make([Walk] * 2), envs.make([Walk] * 2, vectorization_mode="async")
    actions = actions_for(inside, 40)
    inside.reset()
    trace(inside, actions[:20])
    assert workers.load_state_dict(plain(inside.state_dict())) == []
    assert trace(workers, actions[20:]) == trace(inside, actions[20:])
    workers.close()


def test_loading_into_a_used_adapter():
    adapter = envs.make([Walk] * 2, seed=1)
    actions = actions_for(adapter, 60)
    adapter.reset()
    trace(adapter, actions[:20])
    state = plain(adapter.state_dict())
    expected = trace(adapter, actions[20:])
    assert adapter.load_state_dict(state) == []
    assert trace(adapter, actions[20:]) == expected


def test_episodes_are_pure_functions_of_their_names():
    """Episode 2 of environment 1 is the same whatever was done in the episodes before it, and by the others."""
    firsts = []
    for length in (5, 8):
        adapter = envs.make([partial(Walk, 10), partial(Walk, length)], seed=9)
        adapter.reset()
        seen = {}
        for action in actions_for(adapter, 30, seed=length):
            rows = adapter.step(action)
            for obs, episode in zip(rows["obs"], rows["episode"], strict=True):
                seen.setdefault(int(episode), obs.tolist())
        firsts.append(seen[2 * 2 + 1])
    assert firsts[0] == firsts[1]
    own = Walk()
    assert own.reset(seed=envs.episode_seed(9, 1, 2))[0].tolist() == firsts[0]


def test_seeds_differ_by_run_environment_and_episode():
    seeds = {envs.episode_seed(s, i, e) for s in range(5) for i in range(8) for e in range(50)}
    assert len(seeds) == 5 * 8 * 50
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert envs.episode_seed(2**62, 0, 0) >= 0


def test_hidden_randomness_is_found_and_reset():
    thunks = [Walk, partial(Walk, hidden=True), Walk]
    adapter = envs.make(thunks)
    actions = actions_for(adapter, 40)
    adapter.reset()
    trace(adapter, actions[:20])
    state = plain(adapter.state_dict())
    expected = [adapter.step(action) for action in actions[20:30]]
    other = envs.make(thunks)
    messages = other.load_state_dict(state)
    assert messages == ["environment 1 cannot restore its state and was reset (the replayed observation differs)"]
    # It begins its next episode, with that one's seed, and the others go on exactly.
    assert other.obs[1].tolist() == Walk().reset(seed=envs.episode_seed(0, 1, 1))[0].tolist()
    for action, rows in zip(actions[20:30], expected, strict=True):
        ours = other.step(action)
        for i in (0, 2):
            for name in rows:
                assert ours[name][i].tobytes() == rows[name][i].tobytes()
        assert ours["episode"][1] == 1 * 3 + 1
    saved = other.state_dict()
    assert saved["length"][1] == 10
    assert saved["steps"].tolist() == [30, 30, 30]


def test_rewards_that_differ_are_found():
    class Bonus(Walk):
        given = 0.0

        def step(self, action):
            obs, reward, *rest = super().step(action)
            return obs, reward + self.given, *rest

    adapter = envs.make([Bonus])
    adapter.reset()
    trace(adapter, actions_for(adapter, 5))
    state = adapter.state_dict()
    Bonus.given = 1e-9
    (message,) = envs.make([Bonus]).load_state_dict(state)
    assert "the replayed rewards differ" in message


@pytest.mark.parametrize("wrapper", [gym.wrappers.NormalizeObservation, gym.wrappers.NormalizeReward])
def test_wrappers_with_statistics_over_episodes_are_not_called_exact(wrapper):
    def make():
        return envs.make([lambda: gym.wrappers.TimeLimit(wrapper(Walk()), 50)])

    adapter = make()
    adapter.reset()
    (message,) = make().load_state_dict(adapter.state_dict())
    assert f"{wrapper.__name__} carries statistics from episode to episode" in message


@pytest.mark.parametrize("workers", ["sync", "async"])
def test_environments_that_fail_in_the_replay_are_reset(workers):
    adapter = envs.make([Walk] * 2)
    adapter.reset()
    trace(adapter, actions_for(adapter, 6))
    other = envs.make([Walk, partial(FailsEarly, 4)], vectorization_mode=workers)
    (message,) = other.load_state_dict(adapter.state_dict())
    assert message.startswith("environment 1 cannot restore its state and was reset (replaying its episode raised: ")
    assert "no more" in message
    trace(other, actions_for(other, 6))
    other.close()


class FailsEarly(Walk):
    """Fails at step `at` of its first episode only."""

    def __init__(self, at):
        super().__init__()
        self.at, self.resets = at, 0

    def reset(self, **kwargs):
        self.resets += 1
        return super().reset(**kwargs)

    def step(self, action):
        if self.resets == 1 and self.t + 1 == self.at:
            raise RuntimeError("no more")
        return super().step(action)


def test_counters_over_episodes_are_found():
    """Counter shows how often it was reset, which a replay of its last episode cannot know."""
    adapter = envs.make([Counter])
    adapter.reset()
    trace(adapter, actions_for(adapter, 5))
    (message,) = envs.make([Counter]).load_state_dict(adapter.state_dict())
    assert "cannot restore" in message


def test_very_long_episodes_are_not_recorded_forever(monkeypatch):
    monkeypatch.setattr(tracked, "MAX_REPLAY", 100)
    adapter = envs.make([Endless])
    actions = actions_for(adapter, 150)
    adapter.reset()
    trace(adapter, actions[:100])
    assert envs.make([Endless]).load_state_dict(plain(adapter.state_dict())) == []
    trace(adapter, actions[100:])
    state = plain(adapter.state_dict())
    assert len(state["envs"][0]["actions"]) == 0
    (message,) = envs.make([Endless]).load_state_dict(state)
    assert "more than 100 steps" in message


class Endless(Walk):
    def step(self, action):
        obs, reward, *_ = super().step(action)
        return obs, reward, False, False, {}


def given(kind):
    if kind == "sb3":
        from stable_baselines3.common.vec_env import DummyVecEnv

        return DummyVecEnv([Walk] * 2)
    return SyncVectorEnv([Walk] * 2, autoreset_mode=kind)


@pytest.mark.parametrize("kind", [*AutoresetMode, "sb3"])
def test_given_vector_envs_are_reset_and_say_so(kind):
    adapter = envs.make(given(kind))
    actions = actions_for(adapter, 30)
    first = adapter.reset()
    trace(adapter, actions)
    state = plain(adapter.state_dict())
    other = envs.make(given(kind))
    (message,) = other.load_state_dict(state)
    assert "cannot restore its state: all 2 environments were reset" in message
    assert not np.array_equal(other.obs, first)  # not the first episode once more
    rows = other.step(actions[0])
    assert len(rows["env"]) == 2
    assert (rows["episode"] // 2 > state["episode"]).all()
    assert other.state_dict()["steps"].tolist() == (state["steps"] + 1).tolist()
    assert other.state_dict()["length"].tolist() == [1, 1]
    # What such a state says is enough for environments of ours to begin, and the other way round.
    assert envs.make([Walk] * 2).load_state_dict(state) == [
        "the environments cannot restore their state and were reset"
    ]


def test_finished_episodes_that_nobody_popped_are_kept():
    adapter = envs.make([partial(Walk, 4)] * 2)
    adapter.reset()
    for action in actions_for(adapter, 9):
        adapter.step(action)
    other = envs.make([partial(Walk, 4)] * 2)
    other.load_state_dict(plain(adapter.state_dict()))
    assert other.pop_episodes() == adapter.pop_episodes() != []


def test_a_state_from_before_the_first_reset():
    adapter = envs.make([Walk])
    other = envs.make([Walk])
    assert other.load_state_dict(plain(adapter.state_dict())) == []
    assert other.obs is None
    assert other.reset().tolist() == adapter.reset().tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(num_envs=3), "has 3 environments, this run has 2"),
        (lambda s: s.pop("steps"), "`steps` is missing"),
        (lambda s: s.update(steps=[1, 2]), "`steps` is missing or not a ndarray"),
        (lambda s: s.update(episode=np.zeros(3, np.int64)), r"`episode` is int64\(3,\), expected int64\(2,\)"),
        (lambda s: s.update({"return": np.zeros(2, np.float32)}), "`return` is float32"),
        (lambda s: s["finished"].pop("env"), "`env` is missing"),
        (lambda s: s["envs"].pop(), "`envs` has 1 entries"),
        (lambda s: s["envs"][0].pop("actions"), "`actions` is missing"),
        (lambda s: s["envs"][0].update(seed="x"), "`seed` is missing or not a int"),
        (lambda s: s.update(envs=None), "`envs` is missing"),
    ],
)
def test_malformed_states_give_typed_errors(change, message):
    adapter = envs.make([Walk] * 2)
    adapter.reset()
    state = copy.deepcopy(adapter.state_dict())
    change(state)
    with pytest.raises(CheckpointError, match=message):
        envs.make([Walk] * 2).load_state_dict(state)


def test_actions_of_another_shape_are_reset_not_replayed():
    adapter = envs.make([Walk])
    adapter.reset()
    trace(adapter, actions_for(adapter, 5))
    state = adapter.state_dict()
    state["envs"][0]["actions"] = np.zeros((5, 7), np.float32)
    (message,) = envs.make([Walk]).load_state_dict(state)
    assert "cannot restore its state" in message
