# ruff: noqa: RUF001 - messages hold a multiplication sign
"""Pairs from scores, matrices and labels against enumeration, and from data sets by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.envs.preferences import Record, read
from rlkit.errors import UserError
from rlkit.lm.pairs import STRATEGIES, Pair, from_labels, from_matrix, from_ranked, pairs_of

SCORES = st.lists(st.one_of(st.integers(0, 4).map(float), st.floats(-1e6, 1e6)), max_size=7)
MARGINS = st.one_of(st.just(0.0), st.floats(0, 3))


def beats(scores: list[float], margin: float) -> set[tuple[int, int]]:
    return {(i, j) for i, j in itertools.permutations(range(len(scores)), 2) if scores[i] - scores[j] > margin}


@given(SCORES, MARGINS)
def test_all_is_the_enumeration(scores: list[float], margin: float) -> None:
    found = from_ranked(scores, "all", margin)
    assert len(found) == len({(i, j) for i, j, _ in found})
    assert {(i, j) for i, j, _ in found} == beats(scores, margin)
    assert all(gap == scores[i] - scores[j] > margin for i, j, gap in found)


@given(SCORES, MARGINS)
def test_the_other_strategies_choose_from_all(scores: list[float], margin: float) -> None:
    everything = set(from_ranked(scores, "all", margin))
    for strategy in STRATEGIES:
        assert set(from_ranked(scores, strategy, margin)) <= everything  # type: ignore[arg-type]

    worst = from_ranked(scores, "best_vs_worst", margin)
    assert len(worst) == (len(scores) > 1 and max(scores) - min(scores) > margin)
    for i, j, _ in worst:
        assert (scores[i], scores[j]) == (max(scores), min(scores))

    rest = from_ranked(scores, "best_vs_rest", margin)
    best = scores.index(max(scores)) if scores else 0
    assert {(i, j) for i, j, _ in rest} == {(i, j) for i, j in beats(scores, margin) if i == best}

    adjacent = from_ranked(scores, "adjacent", margin)
    order = sorted(scores, reverse=True)
    assert sorted(gap for *_, gap in adjacent) == sorted(a - b for a, b in itertools.pairwise(order) if a - b > margin)
    for i, j, _ in adjacent:
        assert not any(scores[i] > score > scores[j] for score in scores)


@given(SCORES, st.randoms(use_true_random=False))
def test_gaps_do_not_depend_on_the_order_of_completions(scores: list[float], random: Any) -> None:
    shuffled = list(scores)
    random.shuffle(shuffled)
    for strategy in STRATEGIES:
        gaps = [[gap for *_, gap in from_ranked(s, strategy)] for s in (scores, shuffled)]  # type: ignore[arg-type]
        assert gaps[0] == gaps[1]


def test_ranked_by_hand() -> None:
    """Scores 5, 4, 4, 2 of four completions: the ties 1 and 2 are never a pair, and go by index."""
    scores = [4, 5, 2, 4]
    assert from_ranked(scores) == [(1, 2, 3.0)]
    assert from_ranked(scores, "best_vs_rest") == [(1, 0, 1.0), (1, 3, 1.0), (1, 2, 3.0)]
    assert from_ranked(scores, "adjacent") == [(1, 0, 1.0), (3, 2, 2.0)]
    assert from_ranked(scores, "all") == [(1, 0, 1.0), (1, 3, 1.0), (1, 2, 3.0), (0, 2, 2.0), (3, 2, 2.0)]
    assert from_ranked(scores, "all", margin=1) == [(1, 2, 3.0), (0, 2, 2.0), (3, 2, 2.0)]
    assert from_ranked([2, 2, 1, 1]) == [(0, 2, 1.0)]
    assert from_ranked(np.array([0.0, 1.0])) == [(1, 0, 1.0)]
    assert from_ranked([1, 1], "all") == from_ranked([1], "all") == from_ranked([], "best_vs_rest") == []


@given(SCORES, st.floats(0, 0.9))
def test_a_matrix_of_scores_agrees_with_the_scores(scores: list[float], margin: float) -> None:
    """P = 1/2 + tanh(difference / 2) / 2, the logistic function: the gap is tanh(difference / 2)."""
    s = np.array(scores)
    found = from_matrix(0.5 + 0.5 * np.tanh((s[:, None] - s[None, :]) / 2), margin)
    expected = {
        (i, j): math.tanh((scores[i] - scores[j]) / 2)
        for i, j in itertools.permutations(range(len(scores)), 2)
        if abs(math.tanh((scores[i] - scores[j]) / 2) - margin) > 1e-12  # rounding decides the rest
        and math.tanh((scores[i] - scores[j]) / 2) > margin
    }
    pairs = {(i, j): gap for i, j, gap in found}
    assert expected.keys() <= pairs.keys()
    assert all(gap > margin for gap in pairs.values())
    for key, gap in expected.items():
        assert pairs[key] == pytest.approx(gap, abs=1e-12)
    assert len(pairs.keys() - expected.keys()) <= sum(
        abs(math.tanh(abs(a - b) / 2) - margin) <= 1e-12 for a, b in itertools.combinations(scores, 2)
    )


def test_a_cycle_gives_a_pair_for_each_of_its_sides() -> None:
    """Rock, paper, scissors: no scores have these preferences, but each two have one. The diagonal is not read."""
    p = [[0.5, 0.0, 0.75], [1.0, math.nan, 0.5], [0.25, 0.5, 9.0]]
    assert from_matrix(p) == [(1, 0, 1.0), (0, 2, 0.5)]
    assert from_matrix(p, margin=0.5) == [(1, 0, 1.0)]
    cycle = [[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]]
    assert from_matrix(cycle) == [(0, 1, 1.0), (2, 0, 1.0), (1, 2, 1.0)]
    assert from_matrix([]) == from_matrix([[0.5]]) == []


@given(st.lists(st.booleans(), max_size=8))
def test_labels_are_scores_of_one_and_zero(labels: list[bool]) -> None:
    found = from_labels(labels)
    assert found == sorted(found)
    assert len(found) == sum(labels) * (len(labels) - sum(labels))
    assert found == sorted(from_ranked([float(label) for label in labels], "all"))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: from_ranked([1, 2], "best_vs_wrost"), "did you mean `best_vs_worst`?"),  # type: ignore[arg-type]
        (lambda: from_ranked([1, 2], margin=-1), "margin: -1 is not a number >= 0"),
        (lambda: from_ranked([1, 2], margin=math.nan), "margin: nan"),
        (lambda: from_ranked([1, math.nan]), "scores: nan at 1 is not finite"),
        (lambda: from_matrix([[0.5, 0.5]]), "rows of [2] entries, expected 1"),
        (lambda: from_matrix([[0.5, 1.2], [-0.2, 0.5]]), "[0][1] or [1][0] is no probability"),
        (lambda: from_matrix([[0.5, math.nan], [0.5, 0.5]]), "[0][1] or [1][0] is no probability"),
        (lambda: from_matrix([[0.5, 0.6], [0.6, 0.5]]), "[0][1] + [1][0] = 1.2, expected 1"),
    ],
)
def test_wrong_arguments(call: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert words in str(caught.value)


# Data sets


def test_pairs_are_taken_as_they_are() -> None:
    """The gap is the margin, else the difference of the scores, else 1; weights are 1 where none are given."""
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 0.5, "score_chosen": 9, "score_rejected": 1},
        {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 3, "score_rejected": 1, "weight": 0.25},
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 0},
    ]
    expected = [
        Pair(0, 0, 1, 1.0, 1.0, 0),
        Pair(1, 0, 1, 0.5, 1.0, 1),
        Pair(2, 0, 1, 2.0, 0.25, 2),
        Pair(3, 0, 1, 0.0, 1.0, 3),
    ]
    for strategy in STRATEGIES:
        assert pairs_of(read(rows), strategy) == expected  # type: ignore[arg-type]
    assert pairs_of(read(rows), margin=0.75) == [expected[0], expected[2]]


def test_ranked_rows() -> None:
    rows = [
        {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 3, 2], "weight": 2},
        {"prompt": "q", "completions": ["a", "b"], "scores": [1, 1], "weight": None},
        {"prompt": "r", "completions": ["a", "b"], "scores": [4, 3], "weight": None},
    ]
    data = read(rows)
    assert pairs_of(data) == [Pair(0, 1, 0, 2.0, 2.0, 0), Pair(2, 0, 1, 1.0, 1.0, 2)]
    assert pairs_of(data, "adjacent") == [
        Pair(0, 1, 2, 1.0, 2.0, 0),
        Pair(0, 2, 0, 1.0, 2.0, 0),
        Pair(2, 0, 1, 1.0, 1.0, 2),
    ]
    with pytest.raises(UserError, match="no pairs; in 3 records no gap is above 5"):
        pairs_of(data, margin=5)


@given(st.lists(st.tuples(st.sampled_from("pqr"), st.booleans()), min_size=1, max_size=12))
def test_unpaired_rows_are_grouped_by_prompt(rows: list[tuple[str, bool]]) -> None:
    both = {label for _, label in rows} == {True, False}
    given_rows = [{"prompt": p, "completion": f"c{i}", "label": label} for i, (p, label) in enumerate(rows)]
    expected = {
        (i, j) for i, (p, good) in enumerate(rows) for j, (q, other) in enumerate(rows) if p == q and good and not other
    }
    if not expected:
        with pytest.raises(UserError, match="no pairs; none of" if both else "needs both labels; found"):
            pairs_of(read(given_rows), "all")
        return
    found = pairs_of(read(given_rows), "all")
    assert {(pair.record, pair.rejected_record) for pair in found} == expected
    assert all((pair.chosen, pair.rejected, pair.gap, pair.weight) == (0, 0, 1.0, 1.0) for pair in found)
    assert len(found) == len(expected)


def test_unpaired_by_hand() -> None:
    """Prompts as messages are grouped by what they say; weights multiply; one pair a prompt unless all are wanted."""
    prompt = [{"role": "user", "content": "p"}]
    labels = [(True, 0.5), (False, 0.5), (False, None), (True, None)]
    answer = {"role": "assistant", "content": "a"}
    rows = [{"prompt": prompt, "completion": [answer], "label": label, "weight": weight} for label, weight in labels]
    same = [{"content": "p", "role": "user"}]  # other order of keys
    rows[3]["prompt"] = same
    data = read(rows)
    assert pairs_of(data) == [Pair(0, 0, 0, 1.0, 0.25, 1)]
    assert pairs_of(data, "all") == [
        Pair(0, 0, 0, 1.0, 0.25, 1),
        Pair(0, 0, 0, 1.0, 0.5, 2),
        Pair(3, 0, 0, 1.0, 0.5, 1),
        Pair(3, 0, 0, 1.0, 1.0, 2),
    ]


def test_one_label_only() -> None:
    """Also for records that did not come from a file."""
    data = read([{"prompt": "p", "completion": "a", "label": label} for label in (True, False)])
    data.records = [Record(i, "p", ("a",), None, True, {}) for i in range(10_000)]
    with pytest.raises(UserError, match="needs both labels; found 10,000 × true"):
        pairs_of(data)


@pytest.mark.parametrize("row", [{"prompt": "p"}, {"text": "x"}, {"prompt": "p", "completion": "a"}])
def test_kinds_without_preferences(row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"the list: no pairs in `.*`; needs `prompt, chosen, rejected`"):
        pairs_of(read([row]))
