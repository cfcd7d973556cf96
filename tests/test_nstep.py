"""n-step rows against the definition, applied to whole episodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit import checkpoint
from rlkit.nstep import NStep

Step = tuple[int, float, bool, bool]  # environment, reward, terminated, truncated


def rows_of(batch: list[Step], start: int) -> dict[str, np.ndarray]:
    """One vector step; observations are the running number of the transition, so that none can be mistaken."""
    numbers = np.arange(start, start + len(batch), dtype=np.float32)
    return {
        "env": np.array([env for env, *_ in batch]),
        "obs": np.stack([numbers, -numbers], axis=1),
        "action": numbers[:, None] / 10,
        "reward": np.array([r for _, r, _, _ in batch], dtype=np.float32),
        "next_obs": np.stack([numbers + 0.5, -numbers - 0.5], axis=1),
        "terminated": np.array([t for _, _, t, _ in batch]),
        "truncated": np.array([t for _, _, _, t in batch]),
    }


def oracle(batches: list[list[Step]], n: int, gamma: float) -> dict[int, tuple[int, float, bool, bool, float]]:
    """First transition's number -> (last transition's number, reward, terminated, truncated, discount), of the
    transitions whose n-step row is complete.
    """
    by_env: dict[int, list[tuple[int, float, bool, bool]]] = {}
    number = 0
    for batch in batches:
        for env, reward, terminated, truncated in batch:
            by_env.setdefault(env, []).append((number, reward, terminated, truncated))
            number += 1
    found = {}
    for steps in by_env.values():
        for t in range(len(steps)):
            window = []
            for step in steps[t : t + n]:
                window.append(step)
                if step[2] or step[3]:
                    break
            last, _, terminated, truncated = window[-1]
            if len(window) == n or terminated or truncated:
                reward = sum(gamma**k * r for k, (_, r, _, _) in enumerate(window))
                found[steps[t][0]] = (last, reward, terminated, truncated, gamma ** len(window))
    return found


def feed(n_step: NStep, batches: list[list[Step]], start: int = 0) -> list[dict[str, Any]]:
    """Rows that came out, one dict each."""
    out: list[dict[str, Any]] = []
    for batch in batches:
        result = n_step(rows_of(batch, start))
        start += len(batch)
        if result is not None:
            count = len(result["reward"])
            assert all(len(column) == count for column in result.values())
            out += [{name: column[i] for name, column in result.items()} for i in range(count)]
    return out


def check(out: list[dict[str, Any]], expected: dict[int, tuple[int, float, bool, bool, float]]) -> None:
    assert {int(row["obs"][0]) for row in out} == expected.keys()
    assert len(out) == len(expected)
    for row in out:
        number = int(row["obs"][0])
        last, reward, terminated, truncated, discount = expected[number]
        np.testing.assert_array_equal(row["obs"], [number, -number])
        np.testing.assert_array_equal(row["next_obs"], [last + 0.5, -last - 0.5])
        assert row["action"] == pytest.approx([number / 10])
        assert row["reward"] == pytest.approx(reward, rel=1e-6, abs=1e-6)
        assert row["discount"] == pytest.approx(discount, rel=1e-6)
        assert (bool(row["terminated"]), bool(row["truncated"])) == (terminated, truncated)


ENVS = 3
EPISODES = st.lists(
    st.lists(st.integers(0, ENVS - 1), min_size=1, max_size=ENVS, unique=True).flatmap(
        lambda envs: st.tuples(
            *(
                st.tuples(
                    st.just(env),
                    st.floats(-10, 10, width=32),
                    st.sampled_from([False, False, False, True]),
                    st.sampled_from([False, False, False, True]),
                )
                for env in envs
            )
        ).map(list)
    ),
    max_size=25,
)


@given(EPISODES, st.integers(1, 5), st.sampled_from([0.0, 0.5, 0.99, 1.0]))
def test_rows_are_those_of_the_definition(batches: list[list[Step]], n: int, gamma: float) -> None:
    """Environments in any order, some absent from a step (an autoreset), episodes that end anywhere."""
    check(feed(NStep(n, gamma, ENVS), batches), oracle(batches, n, gamma))


@given(EPISODES, st.integers(1, 5), st.integers(0, 25))
def test_a_restored_state_goes_on(batches: list[list[Step]], n: int, cut: int) -> None:
    """Saved and read back anywhere, mid-episode included: the rows that follow are the same, bit for bit."""
    whole = NStep(n, 0.9, ENVS)
    feed(whole, batches[:cut])
    state = checkpoint.decode(*checkpoint.encode(whole.state_dict()))
    restored = NStep(n, 0.9, ENVS)
    restored.load_state_dict(state)
    start = sum(map(len, batches[:cut]))
    expected, found = feed(whole, batches[cut:], start), feed(restored, batches[cut:], start)
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], strict=True)


def test_numbers_by_hand() -> None:
    """n = 3, gamma = 0.5, rewards 1, 2, 4, 8, then a time limit:
    1 + 2/2 + 4/4 = 3; 2 + 4/2 + 8/4 = 6; 4 + 8/2 = 8 with discount 1/4; 8 with discount 1/2.
    """
    batches = [[(0, r, False, r == 8)] for r in (1.0, 2.0, 4.0, 8.0)]
    out = feed(NStep(3, 0.5, 1), batches)
    assert [float(row["reward"]) for row in out] == [3, 6, 8, 8]
    assert [float(row["discount"]) for row in out] == [0.125, 0.125, 0.25, 0.5]
    assert [bool(row["truncated"]) for row in out] == [False, True, True, True]
    assert not any(row["terminated"] for row in out)
    assert [float(row["next_obs"][0]) for row in out] == [2.5, 3.5, 3.5, 3.5]


def test_one_step_is_the_identity() -> None:
    rows = rows_of([(0, 1.0, False, False), (2, -3.0, True, False), (1, 0.5, False, True)], 4)
    out = NStep(1, 0.9, 3)(rows)
    assert out is not None
    for name, values in rows.items():
        np.testing.assert_array_equal(out[name], values, strict=True)
    np.testing.assert_array_equal(out["discount"], np.full(3, 0.9, dtype=np.float32), strict=True)


@pytest.mark.parametrize("n", [1, 3])
def test_columns_keep_their_dtypes(n: int) -> None:
    batches: list[list[Step]] = [[(0, 1.0, False, False)], [(0, 1.0, True, False)]]
    n_step = NStep(n, 0.9, 1)
    outs = [out for i, batch in enumerate(batches) if (out := n_step(rows_of(batch, i))) is not None]
    source = rows_of(batches[0], 0)
    for out in outs:
        assert {name: out[name].dtype for name in source} == {name: source[name].dtype for name in source}
        assert out["discount"].dtype == np.float32


def test_arrays_that_the_caller_reuses_do_no_harm() -> None:
    n_step = NStep(2, 1.0, 1)
    rows = rows_of([(0, 1.0, False, False)], 0)
    assert n_step(rows) is None
    for i in range(len(rows["obs"])):
        rows["obs"][i], rows["reward"][i], rows["next_obs"][i] = 7.0, 2.0, 8.0
    out = n_step(rows)
    assert out is not None
    assert out["obs"].tolist() == [[0, 0]]
    assert out["reward"].tolist() == [3]
    assert out["next_obs"].tolist() == [[8, 8]]


def test_nothing_crosses_an_episode_or_an_environment() -> None:
    """A terminal row is its own target end: the reward of the next episode is not in it."""
    out = feed(NStep(4, 1.0, 2), [[(0, 1.0, True, False), (1, 10.0, False, False)], [(0, 100.0, False, False)]])
    assert len(out) == 1
    assert float(out[0]["reward"]) == 1


def test_clear_forgets_one_environment() -> None:
    n_step = NStep(3, 1.0, 2)
    feed(n_step, [[(0, 1.0, False, False), (1, 10.0, False, False)]])
    n_step.clear(0)
    out = feed(n_step, [[(0, 2.0, True, False), (1, 20.0, True, False)]], start=2)
    assert [float(row["reward"]) for row in out] == [2, 30, 20]
