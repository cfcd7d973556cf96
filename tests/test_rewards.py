"""Reward modules: the calling convention and its errors, the chain, and what the built-in ones compute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlkit import checkpoint
from rlkit.errors import UserError
from rlkit.rewards import Chain, call, name_of, resolve, spec_of
from rlkit.rewards.shaping import Clip, Normalize, Potential, Scale

CONTEXT: dict[str, Any] = {"gamma": 0.9, "n_envs": 2}


def columns(rewards: Sequence[float], **more: Any) -> dict[str, Any]:
    """A vector step of one environment each, nothing ending."""
    n = len(rewards)
    return {
        "rewards": np.array(rewards, dtype=np.float32),
        "observations": np.zeros((n, 3)),
        "actions": np.zeros((n, 1)),
        "next_observations": np.ones((n, 3)),
        "terminated": np.zeros(n, dtype=bool),
        "truncated": np.zeros(n, dtype=bool),
        "env": np.arange(n),
        **more,
    }


def message(make: Any) -> str:
    with pytest.raises(UserError) as caught:
        make()
    return str(caught.value)


# The calling convention


def my_reward(rewards: Any, **_: Any) -> list[float]:
    return [float(r) + 1 for r in rewards]


class Counter:
    """A reward with state: the running number of the row."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, rewards: Any, **_: Any) -> list[float]:
        self.seen += len(rewards)
        return [float(self.seen)] * len(rewards)

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]

    def method(self, rewards: Any, **_: Any) -> Any:
        return rewards


class Picky:
    def __init__(self, needed: int) -> None: ...

    def __call__(self, **_: Any) -> Any: ...


NOT_CALLABLE = 3


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1.0], "reward `fn` returned 1, expected 3 (one value a row)"),
        ([], "reward `fn` returned 0, expected 3 (one value a row)"),
        (np.ones(4), "reward `fn` returned 4, expected 3 (one value a row)"),
        (np.ones((3, 1)), "reward `fn` returned an array of shape (3, 1), expected (3,) (one value a row)"),
        (np.float64(1), "reward `fn` returned np.float64(1.0); expected a list of 3 numbers"),
        (np.array(1.0), "reward `fn` returned array(1.); expected a list of 3 numbers"),
        (1.0, "reward `fn` returned 1.0; expected a list of 3 numbers"),
        (None, "reward `fn` returned None; expected a list of 3 numbers"),
        ([1.0, math.nan, 2.0], "reward `fn` returned nan for row 1; rewards must be finite"),
        ([1.0, 1.0, -math.inf], "reward `fn` returned -inf for row 2; rewards must be finite"),
        (np.array([math.nan, 0, 0]), "reward `fn` returned nan for row 0; rewards must be finite"),
        ([1.0, "x", 2.0], "reward `fn` returned something that is no number: [1.0, 'x', 2.0]"),
        ([1.0, [2.0], 2.0], "reward `fn` returned something that is no number: [1.0, [2.0], 2.0]"),
    ],
)
def test_what_a_reward_must_not_return(value: Any, expected: str) -> None:
    def fn(**_: Any) -> Any:
        return value

    assert message(lambda: call(fn, {}, 3)) == expected


@pytest.mark.parametrize(
    "value",
    [
        [1, 2.5, None],
        (1, 2.5, None),
        [np.float32(1), torch.tensor(2.5), None],
        np.array([1, 2.5, None], dtype=object),
    ],
)
def test_what_a_reward_may_return(value: Any) -> None:
    found = call(lambda **_: value, {}, 3)
    np.testing.assert_array_equal(found, [1, 2.5, math.nan])
    assert found.dtype == np.float64


def test_tensors_and_booleans_are_numbers() -> None:
    assert call(lambda **_: torch.tensor([1.0, 2.0]), {}, 2).tolist() == [1, 2]
    assert call(lambda **_: [True, False], {}, 2).tolist() == [1, 0]
    assert call(lambda **_: np.array([1, 2], dtype=np.int8), {}, 2).tolist() == [1, 2]


def test_a_reward_written_for_trl_works() -> None:
    """`prompts, completions` and the dataset's columns by name, the rest in **kwargs, a list of floats or None."""

    def exact(
        prompts: list[str], completions: list[str], answer: list[str | None], **kwargs: Any
    ) -> list[float | None]:
        assert set(kwargs) == {"difficulty", "completion_ids"}
        assert prompts == ["1+1", "2+2", "x"]
        return [None if a is None else float(c == a) for c, a in zip(completions, answer, strict=True)]

    data = {
        "prompts": ["1+1", "2+2", "x"], "completions": ["2", "5", "?"], "answer": ["2", "4", None],
        "difficulty": [1, 1, 9], "completion_ids": [[1], [2], [3]],
    }  # fmt: skip
    np.testing.assert_array_equal(call(exact, data, 3), [1, 0, math.nan])


def test_names() -> None:
    assert name_of(my_reward) == "my_reward"
    assert name_of(Counter()) == "Counter"
    assert name_of(Potential(my_reward, gamma=1)) == "potential(my_reward)"


# The chain


def test_each_module_sees_the_values_of_the_one_before() -> None:
    """(2, -3) doubled is (4, -6), plus 1 is (5, -5), clipped at +-4.5."""
    data = columns([2, -3])
    chain = Chain([Scale(2), my_reward, Clip(4.5)])
    assert chain(data).tolist() == [4.5, -4.5]
    assert Chain([my_reward, Scale(2)])(data).tolist() == [6, -4]  # another order, other values
    assert data["rewards"].tolist() == [2, -3]


def test_an_empty_chain_passes_rewards_through() -> None:
    found = Chain([])(columns([0.1, -2]))
    assert found.tolist() == np.array([0.1, -2], dtype=np.float32).astype(np.float64).tolist()


def test_modules_see_the_columns_of_control() -> None:
    seen: dict[str, Any] = {}

    def spy(**given: Any) -> Any:
        seen.update(given)
        return given["rewards"]

    data = columns([1, 2])
    Chain([spy])(data)
    assert seen.keys() == data.keys()
    assert all(seen[name] is data[name] for name in data if name != "rewards")


def test_none_in_control_is_an_error() -> None:
    def sparse(rewards: Any, **_: Any) -> list[float | None]:
        return [1.0, None]

    expected = "reward `sparse` returned None for row 1; a transition needs a number"
    assert message(lambda: Chain([Scale(1), sparse])(columns([1, 2]))) == expected


def test_the_state_of_a_chain_is_that_of_its_modules() -> None:
    def make() -> Chain:
        return Chain([Scale(2), Counter(), Normalize(**CONTEXT), my_reward])

    a, b = make(), make()
    a(columns([1, 2]))
    b.load_state_dict(checkpoint.decode(*checkpoint.encode(a.state_dict())))
    for step in ([3, 4], [-1, 0.5]):
        assert a(columns(step)).tolist() == b(columns(step)).tolist()
    assert a.state_dict()["1"] == {"seen": 6}
    assert set(a.state_dict()) == {"1", "2"}


# Scale, clip, normalize


def test_clip_and_scale() -> None:
    rewards = np.array([-3.0, 0.5, 7.0])
    assert Clip(-1, 2)(rewards).tolist() == [-1, 0.5, 2]
    assert Clip(1)(rewards).tolist() == [-1, 0.5, 1]
    assert Scale(-0.5)(rewards).tolist() == [1.5, -0.25, -3.5]
    for low, high in ((1, 1), (2, 1), (math.nan, 1), (-1, None)):
        with pytest.raises(ValueError, match="low < high"):
            Clip(low, high)


STEPS = st.lists(
    st.lists(
        st.tuples(st.floats(-100, 100), st.sampled_from([0, 0, 0, 1, 2])),
        min_size=3,
        max_size=3,
    ),
    min_size=1,
    max_size=15,
)


@given(STEPS, st.sampled_from([0.0, 0.9, 1.0]), st.integers(0, 15))
def test_normalize_divides_by_the_deviation_of_all_discounted_returns(
    steps: list[list[tuple[float, int]]], gamma: float, cut: int
) -> None:
    """Against the definition: G_t of each environment within its episode, and numpy's variance over all of them so
    far; an end counts its own G and starts the next episode at 0. Saved and restored at `cut`.
    """
    module = Normalize(gamma=gamma, n_envs=3)
    seen: list[float] = []
    episodes: list[list[float]] = [[], [], []]
    for i, step in enumerate(steps):
        if i == cut:
            restored = Normalize(gamma=gamma, n_envs=3)
            restored.load_state_dict(checkpoint.decode(*checkpoint.encode(module.state_dict())))
            module = restored
        order = np.array([(i + k) % 3 for k in range(3)])  # rows need not come in the order of the environments
        rewards = np.array([step[env][0] for env in order])
        ends = np.array([step[env][1] for env in order])
        found = module(rewards, terminated=ends == 1, truncated=ends == 2, env=order)
        for env, reward in zip(order, rewards, strict=True):
            episodes[env].append(float(reward))
            rewards_of = episodes[env]
            seen.append(sum(gamma ** (len(rewards_of) - 1 - k) * r for k, r in enumerate(rewards_of)))
        for env, end in zip(order, ends, strict=True):
            if end:
                episodes[env] = []
        expected = np.clip(rewards / np.sqrt(np.var(seen) + 1e-8), -10, 10)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_normalize_by_hand() -> None:
    """gamma 0.5; G: 4, then 4/2 + 1 = 3, the variance of {4, 3} is 1/4, so the second reward 1 becomes 2; after the
    episode's end G = 5, and the variance of {4, 3, 5} is 2/3.
    """
    module = Normalize(gamma=0.5, n_envs=1)

    def step(reward: float, end: bool) -> float:
        data = columns([reward], truncated=np.array([end]))
        return float(module(**data)[0])

    assert step(4, False) == 10  # one value has no variance: clipped
    assert step(1, True) == pytest.approx(2, rel=1e-6)
    assert step(5, False) == pytest.approx(5 / math.sqrt(2 / 3), rel=1e-6)


def test_normalize_with_an_absent_environment() -> None:
    """An environment that makes no transition in a step (an autoreset) keeps its return."""
    a, b = Normalize(gamma=0.9, n_envs=2), Normalize(gamma=0.9, n_envs=2)
    for module, batches in ((a, ([0, 1], [0], [1])), (b, ([0, 1], [0, 1]))):
        for envs in batches:
            module(**columns([2.0 + env for env in envs], env=np.array(envs)))
    np.testing.assert_allclose(a.returns, b.returns)
    np.testing.assert_allclose([a.mean, a.spread, a.count], [b.mean, b.spread, b.count])


def test_a_saved_state_does_not_follow_the_module() -> None:
    module = Normalize(gamma=0.9, n_envs=1)
    module(**columns([1.0]))
    state = module.state_dict()
    module(**columns([5.0]))
    assert state["returns"].tolist() == [1.0]


# Potential-based shaping


def phi(observations: np.ndarray) -> Any:
    """Some potential: 3 x_0 - x_1^2."""
    return 3 * observations[:, 0] - observations[:, 1] ** 2


@given(
    st.lists(st.tuples(*[st.floats(-5, 5)] * 3), min_size=2, max_size=20),
    st.floats(0, 1),
    st.booleans(),
)
def test_shaping_telescopes(states: list[tuple[float, float, float]], gamma: float, terminated: bool) -> None:
    """Ng et al.: the discounted return changes by gamma^T Phi(s_T) - Phi(s_0), without the first term where s_T is
    terminal, whatever lies between; so no policy's rank changes.
    """
    observations = np.array([s[:2] for s in states])
    rewards, n = np.array([s[2] for s in states[:-1]]), len(states) - 1
    ends = np.arange(n) == n - 1
    data = columns(
        [0.0] * n,
        observations=observations[:-1],
        next_observations=observations[1:],
        terminated=ends & terminated,
        truncated=ends & (not terminated),
    )
    shaped = Chain([Potential(phi, gamma=gamma)])({**data, "rewards": rewards})
    discounts = gamma ** np.arange(n)
    last = 0.0 if terminated else gamma**n * phi(observations[-1:])[0]
    expected = last - phi(observations[:1])[0]
    assert (discounts * (shaped - rewards)).sum() == pytest.approx(expected, abs=1e-9)


def test_shaping_by_hand() -> None:
    """Phi(1, 2) = -1, Phi(2, 1) = 5, gamma 0.9: 7 + 4.5 + 1 = 12.5; into a terminal state 7 + 0 + 1 = 8."""
    here, there = np.array([[1.0, 2.0]] * 2), np.array([[2.0, 1.0]] * 2)
    data = columns([7, 7], observations=here, next_observations=there, terminated=np.array([False, True]))
    assert Chain([Potential(phi, gamma=0.9)])(data) == pytest.approx([12.5, 8])


def test_a_potential_of_the_wrong_shape_is_an_error() -> None:
    """(n, 1) would silently broadcast to (n, n)."""
    chain = Chain([Potential(lambda observations: observations[:, :1], gamma=0.9)])
    assert "an array of shape (2, 2), expected (2,)" in message(lambda: chain(columns([1, 2])))


# Names


@pytest.mark.parametrize(
    "spec", ["scale=0.1", "scale=-2", "shift=-1", "clip=-1,1", "clip=3", "normalize", "normalize=5"]
)
def test_built_in_specs_round_trip(spec: str) -> None:
    """A module from a text, and one from the text of that module, do the same."""
    a = resolve(spec, **CONTEXT)
    b = resolve(spec_of(a), **CONTEXT)
    assert type(a) is type(b)
    assert vars(a).keys() == vars(b).keys()
    for data in (columns([0.5, -7]), columns([3.0, 1.0])):
        assert Chain([a])(data).tolist() == Chain([b])(data).tolist()
    assert spec_of(spec) == spec


def test_shift_adds() -> None:
    assert Chain([resolve("shift=-1", **CONTEXT)])(columns([0.0, 1.0])).tolist() == [-1.0, 0.0]


def test_normalize_takes_the_runs_discount() -> None:
    module = resolve("normalize=5", **CONTEXT)
    assert isinstance(module, Normalize)
    assert (module.clip, module.gamma, len(module.returns)) == (5, 0.9, 2)


def test_functions_and_classes_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards_of_a_user.py").write_text(
        "class Twice:\n"
        "    def __call__(self, rewards, **_):\n"
        "        return rewards * 2\n"
        "    @staticmethod\n"
        "    def zero(rewards, **_):\n"
        "        return rewards * 0\n"
        "def one(rewards, **_):\n"
        "    return [1.0] * len(rewards)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for spec, expected in (("one", [1, 1]), ("Twice", [4, 6]), ("Twice.zero", [0, 0])):
        module = resolve(f"rewards_of_a_user:{spec}", **CONTEXT)
        assert Chain([module])(columns([2, 3])).tolist() == expected
    one = resolve("rewards_of_a_user:one")
    assert spec_of(one) == "rewards_of_a_user:one"
    zero = resolve("rewards_of_a_user:Twice.zero")
    assert spec_of(zero) == "rewards_of_a_user:Twice.zero"


def test_a_callable_is_itself_and_a_class_an_instance() -> None:
    counter = Counter()
    assert resolve(my_reward) is my_reward
    assert resolve(counter, **CONTEXT) is counter
    assert isinstance(resolve(Counter), Counter)
    assert isinstance(resolve(spec_of(Counter)), type(resolve(Counter)))


def test_what_has_no_name_is_described() -> None:
    """`spec_of` gives a name only where `resolve` finds the same thing under it."""

    def local(**_: Any) -> Any: ...

    assert spec_of(my_reward) == f"{__name__}:my_reward"
    assert spec_of(local) == "<local>"
    assert spec_of(lambda **_: 0) == "<lambda>"
    assert spec_of(Counter()) == "<Counter>"
    assert spec_of(Counter().method) == "<method>"
    assert spec_of(Potential(phi, gamma=0.9)) == "<potential(phi)>"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("scal=2", "unknown reward `scal=2`, and no `module:function`; did you mean `scale`?"),
        ("zzz", "unknown reward `zzz`, and no `module:function`; known: clip, normalize, scale, shift"),
        ("scale=abc", "reward `scale=abc`: could not convert string to float: 'abc'"),
        ("scale", "reward `scale`: Scale.__init__() missing 1 required positional argument: 'factor'"),
        ("clip=2,1", "reward `clip=2,1`: clip needs low < high, got 2.0 and 1.0"),
        ("no_such_module_:f", "reward `no_such_module_:f`: No module named 'no_such_module_'"),
        ("math:no_such", "reward `math:no_such`: module 'math' has no attribute 'no_such'"),
        (f"{__name__}:NOT_CALLABLE", f"reward `{__name__}:NOT_CALLABLE` is not callable"),
        (":f", "reward `:f`: Empty module name"),
    ],
)
def test_names_that_cannot_be_resolved(spec: str, expected: str) -> None:
    assert message(lambda: resolve(spec, **CONTEXT)) == expected


def test_a_class_that_needs_arguments() -> None:
    assert "missing 1 required positional argument: 'needed'" in message(lambda: resolve(f"{__name__}:Picky"))
