"""The sorting task: reward by worked examples and an oracle, judge by closed forms, data by counting."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from rlkit.config import validate
from rlkit.envs import letters
from rlkit.envs.letters import ALPHABET, STYLES, Judge, Letters, answers, label, prompts, rank, reward
from rlkit.errors import UserError
from rlkit.rewards import call, resolve

TEXT = st.text(max_size=12)
WORD = st.text("abc=", max_size=8)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# Reward


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("dbca=", "abcd", 1),
        ("dbca=", "abd", 3 / 4),
        ("dbca=", "abbcd", 4 / 5),
        ("dbca=", "abdc", 1 / 2),
        ("dbca=", "dbca", 1 / 2),
        ("dbca=", "dcba", 0),
        ("dbca=", "", 0),
        ("dbca=", "zzzz", 0),
        ("dbca=", "abcdabcd", 1 / 2),
        ("bab=", "abb", 1),
        ("bab=", "ab", 2 / 3),  # letters given twice are wanted twice
        ("dbca", "abcd", 1),  # a prompt cut short
        ("", "", 1),
        ("", "a", 0),
    ],
)
def test_worked_examples(prompt: str, answer: str, expected: float) -> None:
    assert reward([prompt], [answer]) == [pytest.approx(expected, abs=1e-12)]


@cache
def distance(a: str, b: str) -> int:
    """Levenshtein distance by its recursive definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


@given(WORD, WORD)
def test_edit_distance_is_that_of_the_definition(a: str, b: str) -> None:
    assert letters.edit_distance(a, b) == distance(a, b)


@given(st.text("abcdef", min_size=1, max_size=8), TEXT)
def test_the_sorted_letters_are_the_only_optimum(given_letters: str, answer: str) -> None:
    """For every text, whatever it is: a finite number in [0, 1], and 1 for one answer."""
    right = "".join(sorted(given_letters))
    (value,) = reward([given_letters + "="], [answer], trainer_state=None)
    assert 0 <= value <= 1
    assert (value == 1) == (answer == right)
    assert reward([given_letters + "="], [right]) == [1]


@given(st.lists(st.tuples(TEXT, TEXT), max_size=5))
def test_no_text_raises(rows: list[tuple[str, str]]) -> None:
    asked, given_answers = [p for p, _ in rows], [a for _, a in rows]
    for values in (reward(asked, given_answers), letters.difficulty(asked)):
        assert len(values) == len(rows)
        assert np.isfinite(values).all()
    judge: Any
    for judge in ("reward", "cyclic"):
        chances = Judge(Letters(judge=judge))(asked, given_answers, asked)
        assert all(0 <= p <= 1 for p in chances)


def test_more_text_than_needed_always_costs() -> None:
    right = "abcdef"
    values = reward(["fedcba="] * 7, [right + "f" * k for k in range(7)])
    assert values == pytest.approx([6 / (6 + k) for k in range(7)])


def test_answers_without_sorting() -> None:
    """The averages that the docstring of the module promises."""
    asked = prompts(Letters(), 4000, 0)
    assert np.mean(reward(asked, [p[:-1] for p in asked])) == pytest.approx(0.38, abs=0.01)
    assert np.mean(reward(asked, ["abcdefghijkl"] * len(asked))) == pytest.approx(0.33, abs=0.01)
    for letter_run in ("abcdefgh", "acegik", "cfi", "aaaa"):
        assert np.mean(reward(asked, [letter_run] * len(asked))) < 0.33


def test_it_is_a_reward_module() -> None:
    module = resolve("rlkit.envs.letters:reward")
    columns = {"prompts": ["ba=", "ba="], "completions": ["ab", "ba"], "completion_ids": [[1], [2]], "extra": [0, 0]}
    np.testing.assert_array_equal(call(module, columns, 2), [1, 0])


# Prompts and demonstrations

CONFIGS = [Letters(), Letters(alphabet_size=3, min_letters=3, max_letters=6), Letters(alphabet_size=26, max_letters=16)]


@pytest.mark.parametrize("config", CONFIGS)
def test_prompts_are_what_the_configuration_says(config: Letters) -> None:
    split: Any
    for split in ("train", "test"):
        found = prompts(config, 3000, 1, split)
        assert len(found) == 3000
        assert {p[-1] for p in found} == {"="}
        lengths = Counter(len(p) - 1 for p in found)
        kinds = range(config.min_letters, config.max_letters + 1)
        assert set(lengths) == set(kinds)
        share = 1 / len(kinds)  # five standard errors
        assert all(abs(n / 3000 - share) < 5 * math.sqrt(share * (1 - share) / 3000) for n in lengths.values())
        assert set("".join(found)) <= set(ALPHABET[: config.alphabet_size] + "=")
    used = Counter("".join(prompts(config, 3000, 1)))
    assert len(used) == config.alphabet_size + 1


@pytest.mark.parametrize("config", CONFIGS)
def test_train_and_test_share_no_multiset(config: Letters) -> None:
    """Of any seeds; demonstrations are of the train side."""
    train = {tuple(sorted(p)) for seed in range(3) for p in prompts(config, 2000, seed)}
    train |= {tuple(sorted(row["prompt"])) for row in letters.demonstrations(config, 2000, 5)}
    test = {tuple(sorted(p)) for seed in range(3) for p in prompts(config, 2000, seed, "test")}
    assert train
    assert test
    assert not train & test


@given(st.permutations(list("abbcde")))
def test_the_split_depends_on_the_multiset_only(shuffled: list[str]) -> None:
    assert letters.split_of("".join(shuffled) + "=") == letters.split_of("abbcde=")


def test_a_fifth_of_the_multisets_is_test() -> None:
    """All 4368 multisets of five of twelve letters: a binomial count, five standard deviations."""
    found = [letters.split_of("".join(m)) for m in itertools.combinations_with_replacement(ALPHABET[:12], 5)]
    assert len(found) == math.comb(16, 5)
    assert abs(found.count("test") - 0.2 * 4368) < 5 * math.sqrt(4368 * 0.2 * 0.8)


def test_data_are_pure_functions_of_the_seed() -> None:
    config, state = Letters(), repr(np.random.get_state())  # noqa: NPY002
    for make in (prompts, letters.demonstrations):
        assert make(config, 50, 3) == make(config, 50, 3)
        assert make(config, 50, 3) != make(config, 50, 4)
        assert make(config, 80, 3)[:50] == make(config, 50, 3)  # more are the same and then others
    assert prompts(config, 50, 3) != prompts(config, 50, 3, "test")
    assert prompts(config, 50, 3) != [row["prompt"] for row in letters.demonstrations(config, 50, 3)]
    assert prompts(config, 0, 0) == letters.demonstrations(config, 0, 0) == []
    assert repr(np.random.get_state()) == state  # noqa: NPY002
    assert prompts(config, 3, 0) == ["bhgiljh=", "bfbih=", "djk="]  # in every process


def test_careful_demonstrations_are_right() -> None:
    rows = letters.demonstrations(Letters(slip=0, other_styles=0), 300, 0)
    assert reward([r["prompt"] for r in rows], [r["completion"] for r in rows]) == [1] * 300


def test_shares_of_styles() -> None:
    """Without slips each demonstration is a perfect answer of some style, in the configured shares."""
    config = Letters(slip=0, other_styles=0.6, min_letters=8)
    found: Counter[str] = Counter()
    for row in letters.demonstrations(config, 3000, 0):
        texts = answers(row["prompt"])
        assert row["completion"] in texts.values()
        found.update(style for style in STYLES if texts[style] == row["completion"] and len(set(texts.values())) == 3)
    total = sum(found.values())
    assert total > 2800
    for style, share in zip(STYLES, (0.4, 0.3, 0.3), strict=True):
        assert abs(found[style] / total - share) < 5 * math.sqrt(share * (1 - share) / total)


def test_rate_of_slips() -> None:
    """Of n different letters, all survive untouched with (1 - rate)^n, rate = slip (n - 1) / (max - 1); a swap of the
    last letter has no next one and does nothing, so its rate is 2/3 of that.
    """
    config = Letters(slip=0.5, other_styles=0, alphabet_size=26, min_letters=1, max_letters=4)
    rows = [r for r in letters.demonstrations(config, 12_000, 0) if len(set(r["prompt"])) == len(r["prompt"])]
    for n in range(1, 5):
        mine = [r for r in rows if len(r["prompt"]) == n + 1]
        rate = 0.5 * (n - 1) / 3
        expected = (1 - rate) ** (n - 1) * (1 - 2 / 3 * rate)
        right = np.mean([r["completion"] == "".join(sorted(r["prompt"][:-1])) for r in mine])
        assert len(mine) > 1500
        # Two swaps in a row never restore the order, so nothing else is right; a drop beside a doubling neither.
        assert abs(right - expected) < 5 * math.sqrt(max(expected * (1 - expected), 1e-12) / len(mine)) + 1e-12


def test_slips_drop_double_and_swap() -> None:
    rng = np.random.default_rng(0)
    written = {letters._with_slips("ab", 1.0, rng) for _ in range(200)}
    # a: drop, double, swap (then b is before a, and the slip of the second place falls on a)
    assert written == {"", "bb", "b", "aa", "aabb", "aab", "baa", "ba"}
    assert letters._with_slips("abc", 0.0, rng) == "abc"


def test_demonstrations_get_worse_with_letters() -> None:
    rows = letters.demonstrations(Letters(), 6000, 0)
    hard = np.array(letters.difficulty([r["prompt"] for r in rows]))
    right = np.array(reward([r["prompt"] for r in rows], [r["completion"] for r in rows])) == 1
    shares = [right[hard == n].mean() for n in range(2, 9)]
    assert shares[0] > 0.5
    assert shares[-1] < 0.2
    assert shares == sorted(shares, reverse=True)


def test_too_narrow_a_task_is_refused() -> None:
    """`a` and `b`, the only prompts of one of two letters, are both of the train split."""
    config = Letters(alphabet_size=2, min_letters=1, max_letters=1)
    assert {letters.split_of("a="), letters.split_of("b=")} == {"train"}
    assert set(prompts(config, 20, 0)) == {"a=", "b="}
    with pytest.raises(UserError, match="`alphabet_size`: 2 letters make no test prompt of length 1; raise it, or"):
        prompts(config, 1, 0, "test")


def test_wrong_configurations() -> None:
    with pytest.raises(UserError, match="`min_letters`: 9 is more than `max_letters` \\(8\\)"):
        Letters(min_letters=9)
    with pytest.raises(UserError, match="`min_letters`: 9 is more than `max_letters` \\(8\\)"):
        validate(Letters, {"min_letters": 9})
    with pytest.raises(UserError, match=r"`alphabet_size`: got 27; allowed: an integer >= 2 and <= 26"):
        validate(Letters, {"alphabet_size": 27})
    with pytest.raises(UserError, match=r"unknown key `lenght_bias`; did you mean `length_bias`"):
        validate(Letters, {"lenght_bias": 1})
    with pytest.raises(UserError, match=r"`label_noise`: got 0\.6"):
        validate(Letters, {"label_noise": 0.6})
    unknown: Any = "valid"
    with pytest.raises(UserError, match="`split`: 'valid' is neither `train` nor `test`"):
        prompts(Letters(), 1, 0, unknown)


# The judge


def test_bradley_terry_in_closed_form() -> None:
    """Rewards 1 and 3/4: sigmoid(0.25 / 0.2) at temperature 0.2; a bias of 0.1 takes 0.1 off for the shorter answer."""
    row = (["dbca="], ["abcd"], ["abd"])
    assert Judge(Letters(temperature=0.2))(*row) == [pytest.approx(sigmoid(1.25))]
    assert Judge(Letters(temperature=0.2, length_bias=0.1))(*row) == [pytest.approx(sigmoid((0.25 + 0.1) / 0.2))]
    assert Judge(Letters(temperature=1, length_bias=-0.3))(*row) == [pytest.approx(sigmoid(0.25 - 0.3))]
    assert Judge(Letters(temperature=0))(*row) == [1]
    assert Judge(Letters(temperature=0))(row[0], row[2], row[1]) == [0]
    assert Judge(Letters(temperature=1e-300))(*row) == [1]
    assert Judge(Letters(label_noise=0.5, temperature=0))(*row) == [1]  # the noise is not the judge's


def test_ties_are_even() -> None:
    for temperature in (0, 0.2):
        config = Letters(temperature=temperature)
        assert Judge(config)(["dbca="] * 2, ["abcx", "abcd"], ["xbcd", "abcd"]) == [0.5, 0.5]
    # 1 + 7 b = 7/10 + 10 b at b = 0.1; in floating point the first is the larger one
    judge = Judge(Letters(temperature=0, length_bias=0.1))
    right, longer = judge.scores(["gfedcba="] * 2, ["abcdefg", "abcdefgggg"])
    assert right > longer
    assert judge(["gfedcba="], ["abcdefg"], ["abcdefgggg"]) == [0.5]


def test_scores_of_the_proxy() -> None:
    """True reward plus the bias for each character: 1 + 4 b for the right answer and 1/2 + 8 b for it written twice,
    which wins above b = 1/8.
    """
    for bias, winner in ((0.12, "abcd"), (0.13, "abcdabcd")):
        judge = Judge(Letters(length_bias=bias))
        assert judge.scores(["dbca="] * 2, ["abcd", "abcdabcd"]) == pytest.approx([1 + 4 * bias, 0.5 + 8 * bias])
        (p,) = judge(["dbca="], ["abcd"], ["abcdabcd"])
        assert (p > 0.5) == (winner == "abcd")


@given(
    st.text("abcd", min_size=1, max_size=5),
    st.text("abcd", max_size=6),
    st.text("abcd", max_size=6),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.sampled_from([0.0, 0.3]),
)
def test_chances_add_up(prompt: str, a: str, b: str, temperature: float, bias: float) -> None:
    kind: Any
    for kind in ("reward", "cyclic"):
        judge = Judge(Letters(judge=kind, temperature=temperature, length_bias=bias))
        forth, back = judge([prompt] * 2, [a, b], [b, a])
        assert forth + back == pytest.approx(1)


def test_styles() -> None:
    assert answers("edabc=") == {"ascending": "abcde", "descending": "edcba", "odd_even": "acebd"}
    assert answers("bdbac=")["odd_even"] == "acbbd"
    judge = Judge(Letters(judge="cyclic"))
    texts = ["abcde", "abde", "edcba", "edccba", "acebd", "aceb", "", "zzzz"]
    expected = ["ascending"] * 2 + ["descending"] * 2 + ["odd_even"] * 2 + ["ascending"] * 2  # the first where all tie
    assert judge.styles(["edabc="] * 8, texts) == expected


CIRCLE = np.array([[0.5, 0.9, 0.3], [0.1, 0.5, 0.75], [0.7, 0.25, 0.5]])  # P(row beats column), in the order of STYLES


def table(judge: Judge, prompt: str, texts: list[str]) -> np.ndarray:
    return np.array([judge([prompt] * len(texts), [a] * len(texts), texts) for a in texts])


@pytest.mark.parametrize("temperature", [0.0, 0.2, 3.0])
def test_the_circle(temperature: float) -> None:
    """Perfect answers beat one another as ADVANTAGE has it, at any temperature."""
    judge = Judge(Letters(judge="cyclic", temperature=temperature))
    for prompt in ("edabc=", "abcdefgh=", "hbca="):
        np.testing.assert_allclose(table(judge, prompt, list(answers(prompt).values())), CIRCLE, atol=1e-12)


def test_no_score_explains_the_circle() -> None:
    """None of the 13 weak orders of three answers, hence no scalar reward whatever, predicts every majority; the reward
    judge's table is predicted by one. The logits around the circle do not add up to 0 either, as Bradley-Terry's do.
    """
    texts = list(answers("edabc=").values())

    def explaining(matrix: np.ndarray) -> int:
        orders = {s for s in itertools.product(range(3), repeat=3) if set(s) == set(range(max(s) + 1))}
        assert len(orders) == 13
        pairs = list(itertools.combinations(range(3), 2))
        return sum(all(np.sign(s[i] - s[j]) == np.sign(matrix[i, j] - 0.5) for i, j in pairs) for s in orders)

    def around(matrix: np.ndarray) -> float:
        return float(sum(np.log(matrix[i, j] / matrix[j, i]) for i, j in ((0, 1), (1, 2), (2, 0))))

    cyclic = table(Judge(Letters(judge="cyclic")), "edabc=", texts)
    plain = table(Judge(Letters()), "edabc=", texts)
    assert explaining(cyclic) == 0
    assert explaining(plain) == 1
    assert around(cyclic) == pytest.approx(math.log(9 * 3 * 7 / 3))
    assert around(plain) == pytest.approx(0, abs=1e-9)


def test_nash_equilibrium_of_the_circle() -> None:
    """A linear programme: the mixture whose worst chance is largest; it is (.25, .20, .40) / .85 and worth 1/2."""
    judge = Judge(Letters(judge="cyclic"))
    matrix = table(judge, "edabc=", list(answers("edabc=").values()))
    result = linprog(
        [0, 0, 0, -1],
        A_ub=np.hstack([-matrix.T, np.ones((3, 1))]), b_ub=np.zeros(3),
        A_eq=[[1, 1, 1, 0]], b_eq=[1], bounds=[(0, 1)] * 3 + [(None, None)],
    )  # fmt: skip
    np.testing.assert_allclose(result.x, [0.25 / 0.85, 0.20 / 0.85, 0.40 / 0.85, 0.5], atol=1e-8)


def test_quality_counts_in_the_circle() -> None:
    """`abde` is 1/5 worse than `abcde`: the odds of 9 fall by exp(0.2 / 0.2); at temperature 0 the better one wins."""
    row = (["edabc="], ["abde"], ["edcba"])
    assert Judge(Letters(judge="cyclic", temperature=0.2))(*row) == [pytest.approx(sigmoid(math.log(9) - 1))]
    assert Judge(Letters(judge="cyclic", temperature=0))(*row) == [0]


# Labels


def split_pairs(config: Letters, n: int) -> list[dict[str, str]]:
    """Rows of `n` seeds of one pair of texts."""
    return [row for seed in range(n) for row in label(config, "dbca=", ["abcd", "abd"], seed)]


def test_labels_follow_the_judge_and_the_noise() -> None:
    """The rate is (1 - e) P + e (1 - P), within five standard errors."""
    n, p = 3000, sigmoid(1.25)
    for noise in (0.0, 0.1, 0.5):
        rows = split_pairs(Letters(temperature=0.2, label_noise=noise), n)
        rate, expected = np.mean([row["chosen"] == "abcd" for row in rows]), (1 - noise) * p + noise * (1 - p)
        assert len(rows) == n
        assert abs(rate - expected) < 5 * math.sqrt(expected * (1 - expected) / n)
    flipped = [row["chosen"] == "abd" for row in split_pairs(Letters(temperature=0, label_noise=0.1), n)]
    assert abs(np.mean(flipped) - 0.1) < 5 * math.sqrt(0.09 / n)
    assert all(row["chosen"] == "abcd" for row in split_pairs(Letters(temperature=0), 200))


def test_every_pair_of_different_texts_once() -> None:
    texts = ["abcd", "abd", "abcd", "dbca", ""]
    rows = label(Letters(), "dbca=", texts, 0)
    assert [{row["chosen"], row["rejected"]} for row in rows] == [
        {"abcd", "abd"}, {"abcd", "dbca"}, {"abcd", ""}, {"abd", "dbca"}, {"abd", ""}, {"dbca", ""},
    ]  # fmt: skip
    assert {row["prompt"] for row in rows} == {"dbca="}
    assert label(Letters(), "dbca=", ["abcd", "abcd"], 0) == label(Letters(), "dbca=", [], 0) == []


@given(st.permutations(["abcd", "abd", "abdc", "dcba"]), st.integers(0, 50))
def test_a_label_is_a_property_of_the_texts(shuffled: list[str], seed: int) -> None:
    def key(rows: list[dict[str, str]]) -> set[tuple[str, str]]:
        return {(row["chosen"], row["rejected"]) for row in rows}

    config = Letters(temperature=0.5, label_noise=0.2)
    whole = key(label(config, "dbca=", ["abcd", "abd", "abdc", "dcba"], seed))
    assert key(label(config, "dbca=", shuffled, seed)) == whole
    assert key(label(config, "dbca=", shuffled[:2], seed)) <= whole


def test_labels_of_different_pairs_and_prompts_are_independent() -> None:
    """Even chances (nearly, at temperature 1000): two pairs of one prompt, and one pair of two prompts, have the same
    winner by alphabet in half of 2000 seeds, within five standard errors.
    """
    config, n = Letters(temperature=1000), 2000

    def first_wins(prompt: str, pair: list[str], seed: int) -> bool:
        return label(config, prompt, pair, seed)[0]["chosen"] == min(pair)

    for other in (("dbca=", ["abdc", "dcba"]), ("cdba=", ["abcd", "abd"])):
        same = [first_wins("dbca=", ["abcd", "abd"], seed) == first_wins(*other, seed) for seed in range(n)]
        assert abs(np.mean(same) - 0.5) < 5 * math.sqrt(0.25 / n)


COVERED: dict[str, Any] = {
    "coverage_reward": (0.75, lambda p, c: reward([p], [c])[0] <= 0.75),
    "coverage_length": (3, lambda p, c: len(c) <= 3),
    "coverage_letters": (4, lambda p, c: len(p) - 1 <= 4),
}


@pytest.mark.parametrize("field", COVERED)
def test_coverage(field: str) -> None:
    """Preferences hold the texts that the field allows, all of them, and nothing else; the judge sees everything."""
    limit, allowed = COVERED[field]
    config = dataclasses.replace(Letters(), **{field: limit})
    texts = ["abcd", "abd", "abcde", "dbca", "ab", "abc", ""]
    for prompt in ("dbca=", "edbca="):
        expected = {text for text in texts if allowed(prompt, text)}
        rows, ranked = label(config, prompt, texts, 0), rank(config, prompt, texts, 0)
        assert {row[side] for row in rows for side in ("chosen", "rejected")} == expected
        assert len(rows) == math.comb(len(expected), 2)
        assert set(ranked["completions"] if ranked else []) == expected
        assert Judge(config)([prompt], ["abcd"], ["dbca"]) == Judge(Letters())([prompt], ["abcd"], ["dbca"])
    hidden = {"coverage_reward": "abcd", "coverage_length": "dbca"}.get(field)
    assert hidden is None or not letters.covered(config, "dbca=", hidden)


def test_rankings_agree_with_the_judge() -> None:
    """Gumbel noise of scale T makes P(score a > score b) = sigmoid((s_a - s_b) / T), here within 5 standard errors."""
    config, n = Letters(temperature=0.2, length_bias=0.05), 3000
    wins = 0
    for seed in range(n):
        row = rank(config, "dbca=", ["abd", "abcd", "abd"], seed)
        assert row is not None
        assert row["prompt"] == "dbca="
        assert row["completions"] == ["abd", "abcd"]
        wins += row["scores"][1] > row["scores"][0]
    expected = sigmoid((0.25 + 0.05) / 0.2)
    assert abs(wins / n - expected) < 5 * math.sqrt(expected * (1 - expected) / n)
    assert rank(config, "dbca=", ["abd", "abcd"], 7) == rank(config, "dbca=", ["abd", "abcd"], 7)
    exact = rank(Letters(temperature=0), "dbca=", ["abd", "abcd"], 0)
    assert exact is not None
    assert exact["scores"] == [0.75, 1]
    assert rank(config, "dbca=", ["abd", "abd"], 0) is None


def test_rankings_of_the_circle_are_mean_chances() -> None:
    texts = list(answers("edabc=").values())
    row = rank(Letters(judge="cyclic"), "edabc=", texts, 0)
    assert row is not None
    assert row["scores"] == pytest.approx([(0.9 + 0.3) / 2, (0.1 + 0.75) / 2, (0.7 + 0.25) / 2])


# The model


def test_the_model_is_small_and_holds_the_longest_row() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**letters.model_config(vocab_size=len(ALPHABET) + 3))
    model = transformers.LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) < 200_000
    longest = 16 + 1 + 2 * 16 + 2  # letters, `=`, every letter doubled, start and end
    assert config.max_position_embeddings >= longest
    assert {*letters.model_config(30)} <= {*config.to_dict()}  # no keyword that transformers would only store
