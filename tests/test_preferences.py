# ruff: noqa: RUF001 - messages hold a multiplication sign
"""Reading text data: every format and source, what is refused and in which words, and the counts of the report."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.envs.preferences import Record, TextData, read, shared_prefix
from rlkit.errors import UserError

SHARED = Path(__file__).parents[2] / "shared" / "data"
Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def bot(text: str) -> Row:
    return {"role": "assistant", "content": text}


def pair(i: int, **changes: Any) -> Row:
    row = {"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}", **changes}
    return {name: value for name, value in row.items() if value is not ...}


def write_jsonl(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def only(data: TextData) -> Record:
    assert len(data) == 1
    return data.records[0]


def refused(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(*args, **kwargs)
    return str(caught.value)


def reason(row: Row) -> str:
    """What is said of one bad row."""
    message = refused([row], on_bad_row="error")
    prefix = "the list: row 0: "
    assert message.startswith(prefix)
    return message.removeprefix(prefix)


# Formats

FORMATS: dict[str, tuple[Row, str, Any, tuple[Any, ...]]] = {
    "pair": ({"prompt": "p", "chosen": "a", "rejected": "b"}, "pairs", "p", ("a", "b")),
    "pair of messages": (
        {"prompt": [user("p")], "chosen": [bot("a")], "rejected": [bot("b")]},
        "pairs",
        [user("p")],
        ([bot("a")], [bot("b")]),
    ),
    "implicit prompt": ({"chosen": "Q: x A: yes", "rejected": "Q: x A: no"}, "pairs", "Q: x A:", (" yes", " no")),
    "implicit prompt of messages": (
        {"chosen": [user("p"), bot("a")], "rejected": [user("p"), bot("b"), user("?"), bot("c")]},
        "pairs",
        [user("p")],
        ([bot("a")], [bot("b"), user("?"), bot("c")]),
    ),
    "implicit prompt of several turns": (
        {
            "chosen": [user("p"), bot("same"), user("q"), bot("a")],
            "rejected": [user("p"), bot("same"), user("q"), bot("b")],
        },
        "pairs",
        [user("p"), bot("same"), user("q")],
        ([bot("a")], [bot("b")]),
    ),
    "UltraFeedback binarized": (
        {"prompt": "p", "chosen": [user("p"), bot("a")], "rejected": [user("p"), bot("b")]},
        "pairs",
        [user("p")],
        ([bot("a")], [bot("b")]),
    ),
    "prompt text beside system and user turns": (
        {
            "prompt": "p",
            "chosen": [{"role": "system", "content": ""}, user(" p"), bot("a")],
            "rejected": [{"role": "system", "content": ""}, user(" p"), bot("b")],
        },
        "pairs",
        [{"role": "system", "content": ""}, user(" p")],
        ([bot("a")], [bot("b")]),
    ),
    "prompt text beside answers as messages": (
        {"prompt": "p", "chosen": [bot("a")], "rejected": [bot("b")]},
        "pairs",
        [user("p")],
        ([bot("a")], [bot("b")]),
    ),
    "prompt messages repeated in the answers": (
        {"prompt": [user("p")], "chosen": [user("p"), bot("a")], "rejected": [user("p"), bot("b")]},
        "pairs",
        [user("p")],
        ([bot("a")], [bot("b")]),
    ),
    "prompt messages and answers as text": (
        {"prompt": [user("p")], "chosen": "a", "rejected": "b"},
        "pairs",
        [user("p")],
        ([bot("a")], [bot("b")]),
    ),
    "answers as single messages": (
        {"prompt": [user("p")], "chosen": bot("a"), "rejected": bot("b")},
        "pairs",
        [user("p")],
        ([bot("a")], [bot("b")]),
    ),
    "AlpacaFarm 1": (
        {"instruction": "p", "input": "", "output_1": "a", "output_2": "b", "preference": 1},
        "pairs",
        "p",
        ("a", "b"),
    ),
    "AlpacaFarm 2": (
        {"instruction": "p", "input": "x", "output_1": "a", "output_2": "b", "preference": "2"},
        "pairs",
        "p\n\nx",
        ("b", "a"),
    ),
    "better response": (
        {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0},
        "pairs",
        "p",
        ("b", "a"),
    ),
    "safer response": (
        {"instruction": "p", "response_0": "a", "response_1": "b", "safer_response_id": 0},
        "pairs",
        "p",
        ("a", "b"),
    ),
    "ranked": (
        {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 2.5, -1]},
        "ranked",
        "p",
        ("a", "b", "c"),
    ),
    "ranked messages": (
        {"prompt": [user("p")], "completions": [[bot("a")], [bot("b")]], "scores": [1, 2]},
        "ranked",
        [user("p")],
        ([bot("a")], [bot("b")]),
    ),
    "responses": (
        {"prompt": "p", "responses": [{"text": "a", "score": 2, "model": "m"}, {"text": "b", "score": 1}]},
        "ranked",
        "p",
        ("a", "b"),
    ),
    "unpaired": ({"prompt": "p", "completion": "a", "label": True}, "unpaired", "p", ("a",)),
    "completion": ({"prompt": "p", "completion": "a"}, "completions", "p", ("a",)),
    "completion as messages": (
        {"prompt": "p", "completion": [user("p"), bot("a")]},
        "completions",
        [user("p")],
        ([bot("a")],),
    ),
    "Alpaca": ({"instruction": "p", "input": "x", "output": "a", "text": "all"}, "completions", "p\n\nx", ("a",)),
    "text": ({"text": " once upon a time\n"}, "completions", "", (" once upon a time\n",)),
    "messages": (
        {"prompt": "p", "messages": [user("p"), bot("a"), user("q"), bot("b")]},
        "completions",
        [user("p"), bot("a"), user("q")],
        ([bot("b")],),
    ),
    "prompt": ({"prompt": "p"}, "prompts", "p", ()),
    "prompt messages": ({"prompt": [user("p")]}, "prompts", [user("p")], ()),
    "question": ({"question": "p", "solution": "s", "answer": "4"}, "prompts", "p", ()),
    "responses without scores": ({"prompt": "p", "responses": [{"text": "a"}, {"text": "b"}]}, "prompts", "p", ()),
}


def rows_for(row: Row) -> list[Row]:
    """The row, and where a label needs its opposite one with that."""
    return [row, {**row, "label": not row["label"]}] if "label" in row else [row]


@pytest.mark.parametrize("case", FORMATS)
def test_formats(case: str) -> None:
    row, kind, prompt, completions = FORMATS[case]
    before = json.dumps(row)
    data = read(rows_for(row), on_bad_row="error")
    record = data.records[0]
    assert (data.kind, record.row, record.prompt, record.completions) == (kind, 0, prompt, completions)
    assert (record.scores is not None) == (kind == "ranked")
    assert (record.label is not None) == (kind == "unpaired")
    assert json.dumps(row) == before, "the source was changed"


@pytest.mark.parametrize("case", FORMATS)
def test_formats_from_parquet(case: str, tmp_path: Path) -> None:
    """Arrow gives every row all columns and messages all keys, null where there are none; that changes nothing."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    row = FORMATS[case][0]
    rows = [{**r, "id": i} for i, r in enumerate(rows_for(row))]
    table = pa.Table.from_pylist(rows)
    for name in ("prompt", "label", "messages", "scores", "text"):
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(len(rows), pa.string()))
    pq.write_table(table, tmp_path / "a.parquet")
    data, expected = read(tmp_path / "a.parquet"), read(rows)
    assert data.kind == expected.kind
    for r, e in zip(data.records, expected.records, strict=True):
        assert (r.prompt, r.completions, r.scores, r.label) == (e.prompt, e.completions, e.scores, e.label)


def test_scores_labels_and_columns() -> None:
    record = only(read([{"prompt": "p", "completions": ["a", "b"], "scores": [np.float32(0.5), 2], "id": 7}]))
    assert record.scores == (0.5, 2.0)
    assert record.columns == {"id": 7}
    labels = [True, False, 1, 0, np.bool_(True), 0.0]
    data = read([{"prompt": "p", "completion": "a", "label": label} for label in labels])
    assert [r.label for r in data.records] == [True, False, True, False, True, False]
    assert all(type(r.label) is bool for r in data.records)


def test_every_record_has_every_column() -> None:
    data = read([pair(0, a=1), pair(1, b=None), pair(2, weight=0.5, margin=-1)])
    assert data.columns == ["a", "b", "weight", "margin"]
    assert [r.columns for r in data.records] == [
        {"a": 1, "b": None, "weight": None, "margin": None},
        {"a": None, "b": None, "weight": None, "margin": None},
        {"a": None, "b": None, "weight": 0.5, "margin": -1},
    ]


def test_answers_stay_columns() -> None:
    assert only(read([FORMATS["question"][0]])).columns == {"solution": "s", "answer": "4"}


def test_keys_of_responses_become_columns() -> None:
    record = only(read([FORMATS["responses"][0]]))
    assert record.scores == (2.0, 1.0)
    assert record.columns == {"completion_model": ["m", None]}


def test_better_response_by_another_column() -> None:
    row = FORMATS["better response"][0]
    assert only(read([row])).completions == ("b", "a")
    mapped = read([row], mapping={"better_response_id": "safer_response_id"})
    assert only(mapped).completions == ("a", "b")
    assert mapped.columns == []


@pytest.mark.parametrize("value", [0, 1.5, "0"])
def test_a_tied_preference_gives_no_pair(value: Any) -> None:
    tied = {"instruction": "p", "output_1": "a", "output_2": "b", "preference": value}
    data = read([tied, {**tied, "preference": 2}])
    assert (only(data).row, only(data).completions) == (1, ("b", "a"))
    assert (data.report.ties, data.report.kept, data.report.records) == (1, 2, 1)
    assert "1 ties" in refused([tied])


def test_votes() -> None:
    """2:1 of 3 is P = 2/3 and weight 1/3; 1:0 with two ties is P = (1 + 1) / 3 as well; 0:3 is P = 1."""

    def votes(i: int, j: int, *n: int) -> Row:
        return {"i": i, "j": j, "votes_i": n[0], "votes_j": n[1], "votes_tie": n[2]}

    row = {
        "prompt": "p",
        "responses": [{"text": t, "model": m} for t, m in (("a", "A"), ("b", "B"), (" ", "C"), ("a", "D"))],
        "comparisons": [
            votes(0, 1, 2, 1, 0),
            votes(0, 1, 1, 0, 2),
            votes(1, 3, 0, 3, 0),
            votes(0, 1, 1, 1, 1),
            votes(0, 2, 3, 0, 0),
            votes(0, 3, 3, 0, 0),
        ],
    }
    data = read([row])
    assert [(r.row, r.completions) for r in data.records] == [(0, ("a", "b"))] * 3
    assert [r.columns["probability"] for r in data.records] == pytest.approx([2 / 3, 2 / 3, 1])
    assert [r.columns["weight"] for r in data.records] == pytest.approx([1 / 3, 1 / 3, 1])
    assert [(r.columns["chosen_model"], r.columns["rejected_model"]) for r in data.records] == [
        ("A", "B"),
        ("A", "B"),
        ("D", "B"),
    ]
    assert data.report.ties == 1
    assert data.report.notes == {
        "pair with a `weight` by its votes": 3,
        "comparison with an empty text, left out": 1,
        "comparison of equal texts, left out": 1,
    }
    assert reason({**row, "comparisons": [votes(0, 4, 3, 0, 0)]}) == "`comparisons` names a response that is not there"
    assert reason({**row, "comparisons": [votes(0, 1, -1, 0, 0)]}) == "`votes` is below 0; found -1"


def ratings(*values: Any, listed: bool = False) -> Row:
    names = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    entries = [{"Rating": value, "Rationale": "..."} for value in values]
    return {name: [entry] if listed else entry for name, entry in zip(names, entries, strict=True)}


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ({"overall_score": 10, "annotations": ratings("1", "1", "2", "1")}, 1),  # mean 1.25
        ({"overall_score": 10, "annotations": ratings("2", "2", "2", "2", listed=True)}, 1),  # mean 2, the limit
        ({"overall_score": 10, "annotations": ratings("1", "N/A", "4", "N/A")}, 10),  # mean 2.5 of two
        ({"overall_score": 10, "annotations": ratings("1", "N/A", "3", None)}, 1),  # mean 2 of two
        ({"overall_score": 10, "fine-grained_score": 1.5}, 1),
        ({"overall_score": 10, "fine-grained_score": 4.75}, 10),
        ({"overall_score": 10.0}, 10),
        ({"overall_score": 9, "annotations": ratings("1", "1", "1", "1")}, 9),
    ],
)
def test_ultrafeedback_scores_are_checked(completion: Row, score: float) -> None:
    other = {"response": "b", "overall_score": 5.5, "model": "m"}
    data = read([{"instruction": "p", "completions": [{"response": "a", **completion}, other], "source": "s"}])
    assert (data.kind, only(data).completions, only(data).scores) == ("ranked", ("a", "b"), (score, 5.5))
    assert only(data).columns["completion_model"] == [None, "m"]
    assert only(data).columns["source"] == "s"
    assert sum(data.report.notes.values()) == (completion["overall_score"] != score)


# The implicit prompt


@settings(deadline=None)  # the first example imports TRL
@given(st.text("ab \n", max_size=6), st.text("ab \n", max_size=6), st.text("ab \n", max_size=6))
def test_the_shared_prefix_is_cut_where_trl_cuts(start: str, a: str, b: str) -> None:
    """Except where the first characters differ: there TRL looks at the last one and may cut that off."""
    from trl.data_utils import extract_prompt

    chosen, rejected = start + a, start + b
    k = shared_prefix(chosen, rejected)
    assert chosen[:k] == rejected[:k]
    if chosen and rejected and chosen[0] == rejected[0]:
        expected = extract_prompt({"chosen": chosen, "rejected": rejected})
        assert chosen[:k] == expected["prompt"]
    else:
        assert k == 0


def test_the_shared_prefix_by_hand() -> None:
    assert shared_prefix("x yes", "x no") == 1  # the space belongs to the answers
    assert shared_prefix("x  yes", "x  no") == 2  # one space only
    assert shared_prefix("x yes", "x yesterday") == 4  # one text begins with the other: one character is left
    assert shared_prefix("", "x") == 0


MESSAGE = st.builds(
    lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "assistant"]), st.sampled_from("ab")
)


@settings(deadline=None)
@given(st.lists(MESSAGE, min_size=1, max_size=5), st.lists(MESSAGE, min_size=1, max_size=5))
def test_shared_turns_are_those_of_trl(chosen: list[Row], rejected: list[Row]) -> None:
    from trl.data_utils import extract_prompt

    try:
        record = only(read([{"chosen": chosen, "rejected": rejected}], on_bad_row="error"))
    except UserError:
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        answers = {chosen[shared]["role"], rejected[shared]["role"]}
        assert chosen == rejected or shared == 0 or "user" in answers
        return
    expected = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert record.prompt == expected["prompt"]
    assert record.completions == (expected["chosen"], expected["rejected"])


# Bad rows

BAD: dict[str, tuple[Row, str]] = {
    "missing": (pair(0, rejected=...), "missing `rejected`; found `prompt, chosen`"),
    "null": (pair(0, rejected=None), "missing `rejected`; found `prompt, chosen`"),
    "two missing": ({"id": 3, "prompt": "x"}, "missing `chosen`, `rejected`; found `id, prompt`"),
    "nothing": ({}, "missing `prompt`, `chosen`, `rejected`; the row is empty"),
    "number": (pair(0, chosen=5), "`chosen` is a number, expected text or a list of messages"),
    "object": (pair(0, prompt={"a": 1}), "`prompt` is an object, expected text or a list of messages"),
    "empty text": (pair(0, chosen=""), "empty `chosen`"),
    "blank text": (pair(0, prompt=" \n"), "empty `prompt`"),
    "no messages": (pair(0, rejected=[]), "empty `rejected`"),
    "strings as messages": (
        pair(0, prompt=["x"]),
        "`prompt` holds text, expected messages with `role` and `content`; message 0",
    ),
    "no role": (pair(0, prompt=[{"content": "x"}]), "`prompt` has a message without `role`; message 0"),
    "no content": (
        pair(0, prompt=[user("x"), {"role": "assistant"}]),
        "`prompt` has a message without `content`; message 1",
    ),
    "content of parts": (
        pair(0, prompt=[{"role": "user", "content": [{"type": "image"}]}]),
        "`prompt` has a message whose `content` is a list, expected text; message 0",
    ),
    "empty content": (pair(0, chosen=[bot(" ")]), "empty `chosen`"),
    "ShareGPT": (pair(0, prompt=[{"from": "human", "value": "x"}]), "`prompt` has a message without `role`; message 0"),
    "identical": (pair(0, chosen="same", rejected="same"), "`chosen` equals `rejected`"),
    "identical as text and message": (
        pair(0, chosen="same", rejected=[bot("same")]),
        "`chosen` equals `rejected`",
    ),
    "surrogate": (pair(0, chosen="x\ud800"), "`chosen` holds half of a surrogate pair, which no tokenizer takes"),
    "weight": (pair(0, weight=-0.5), "`weight` is below 0; found -0.5"),
    "weight as text": (pair(0, weight="1"), "`weight` is text, expected a number"),
    "weight not finite": (pair(0, weight=math.inf), "`weight` is not finite; found inf"),
    "margin": (pair(0, margin=math.nan), "`margin` is not finite; found nan"),
    "margin true": (pair(0, margin=True), "`margin` is a boolean, expected a number"),
    "user's turn as answer": (
        pair(0, prompt=[user("x")], chosen=[user("y"), bot("a")]),
        "`chosen`, without the prompt, does not begin with an `assistant` message",
    ),
    "other prompt": (
        pair(0, prompt="p", chosen=[user("q"), bot("a")], rejected=[user("q"), bot("b")]),
        "`prompt` is none of the user's turns that the completions begin with",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pairs(case: str) -> None:
    """Each alone is refused with its row and words, under `drop` counted, and one of 100 is dropped unasked."""
    row, words = BAD[case]
    good = [pair(i) for i in range(1, 100)]
    rows = [*good[:17], row, *good[17:]]
    assert refused(rows, on_bad_row="error") == f"the list: row 17: {words}"
    for policy in ("drop", None):
        data = read(rows, on_bad_row=policy)
        assert [r.row for r in data.records] == [i for i in range(100) if i != 17]
        assert list(data.report.dropped.values()) == [(1, 17)]
        assert words.startswith(next(iter(data.report.dropped)))
    message = refused([*rows, row])  # 2 of 101
    assert "2 of 101 rows are bad" in message
    assert f"2 × row 17: {words}" in message
    assert "--on_bad_row drop" in message


OTHER_BAD: dict[str, tuple[Row, str]] = {
    "implicit: one text, one list": (
        {"chosen": "a", "rejected": [bot("b")]},
        "one of `chosen` and `rejected` is text, the other messages",
    ),
    "implicit: nothing shared": (
        {"chosen": "yes ", "rejected": "no "},
        "no `prompt`, and `chosen` and `rejected` begin with nothing in common",
    ),
    "implicit: a space shared": (
        {"chosen": "  a", "rejected": "  b"},
        "no `prompt`, and `chosen` and `rejected` begin with nothing in common",
    ),
    "implicit: no turn shared": (
        {"chosen": [user("p"), bot("a")], "rejected": [user("q"), bot("b")]},
        "no `prompt`, and `chosen` and `rejected` begin with nothing in common",
    ),
    "implicit: nothing left": (
        {"chosen": "x y ", "rejected": "x y z"},
        "empty `chosen` after what `chosen` and `rejected` share",
    ),
    "implicit: users differ": (
        {"chosen": [user("p"), bot("a"), user("q"), bot("b")], "rejected": [user("p"), bot("a"), user("r"), bot("b")]},
        "`chosen`, without the prompt, does not begin with an `assistant` message",
    ),
    "implicit: identical": ({"chosen": "x y", "rejected": "x y"}, "`chosen` equals `rejected`"),
    "lengths": (
        {"prompt": "p", "completions": ["a", "b"], "scores": [1]},
        "`completions` and `scores` differ in length; 2 completions, 1 scores",
    ),
    "scores": ({"prompt": "p", "completions": ["a"], "scores": 1}, "`scores` is a number, expected a list"),
    "no completions": ({"prompt": "p", "completions": [], "scores": []}, "empty `completions`"),
    "empty completion": ({"prompt": "p", "completions": ["a", ""], "scores": [1, 2]}, "empty `completions[]`"),
    "score not finite": (
        {"prompt": "p", "completions": ["a", "b"], "scores": [1, math.nan]},
        "`scores` is not finite; found nan",
    ),
    "score beyond floats": (
        {"prompt": "p", "completions": ["a"], "scores": [10**400]},
        "`scores` is not finite; found inf",
    ),
    "score as text": ({"prompt": "p", "completions": ["a"], "scores": ["1"]}, "`scores` is text, expected a number"),
    "response without score": (
        {"prompt": "p", "responses": [{"text": "a", "score": 1}, {"text": "b"}]},
        "`responses` without `score`; entry 1",
    ),
    "response as text": (
        {"prompt": "p", "responses": [{"text": "a", "score": 1}, "b"]},
        "`responses` holds text, expected objects; entry 1",
    ),
    "label as text": ({"prompt": "p", "completion": "a", "label": "yes"}, "`label` is text, expected true or false"),
    "label 2": ({"prompt": "p", "completion": "a", "label": 2}, "`label` is neither true nor false"),
    "messages as text": ({"messages": "x"}, "`messages` is text, expected a list of messages"),
    "no answer": ({"messages": [user("x")]}, "`messages` does not end with an `assistant` message"),
    "answer only": ({"messages": [bot("x")]}, "`messages` has nothing before the `assistant` message"),
    "text as messages": ({"text": [user("x")]}, "`text` is a list, expected text"),
    "preference": (
        {"prompt": "p", "output_1": "a", "output_2": "b", "preference": 3},
        "`preference` is not 1 or 2",
    ),
    "preference as text": (
        {"prompt": "p", "output_1": "a", "output_2": "b", "preference": "first"},
        "`preference` is text, expected a number",
    ),
    "better response": (
        {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 2},
        "`better_response_id` is not 0 or 1",
    ),
    "equal outputs": (
        {"prompt": "p", "output_1": "a", "output_2": "a", "preference": 1},
        "`output_1` equals `output_2`",
    ),
}


@pytest.mark.parametrize("case", OTHER_BAD)
def test_other_bad_rows(case: str) -> None:
    row, words = OTHER_BAD[case]
    assert reason(row) == words


def test_names_of_missing_columns_are_theirs() -> None:
    rows = [{"query": "p", "good": "a", "bad": "b"}] * 2 + [{"query": "p", "good": "a"}]
    mapping = {"prompt": "query", "chosen": "good", "rejected": "bad"}
    assert refused(rows, mapping=mapping, on_bad_row="error") == "the list: row 2: missing `bad`; found `query, good`"


def test_the_limit_is_one_percent() -> None:
    """1 of 100 is dropped, 1 of 99 and 1 of 50 are errors, 2 of 200 are dropped."""
    bad = pair(0, rejected=...)
    assert read([bad] + [pair(i) for i in range(99)]).report.kept == 99
    assert read([bad, bad] + [pair(i) for i in range(198)]).report.kept == 198
    for n in (98, 49, 1):
        assert f"1 of {n + 1} rows are bad" in refused([bad] + [pair(i) for i in range(n)])


def test_reasons_are_counted_apart() -> None:
    rows = [pair(0), pair(1, rejected=...), pair(2, chosen=""), pair(3, rejected=...)]
    message = refused(rows)
    assert "2 × row 1: missing `rejected`; found `prompt, chosen`" in message
    assert "1 × row 2: empty `chosen`" in message
    assert read(rows, on_bad_row="drop").report.dropped == {"missing `rejected`": (2, 1), "empty `chosen`": (1, 2)}
    assert "none of 1 rows is left" in refused([pair(0, chosen="x", rejected="x")], on_bad_row="drop")


SECRET = "unspeakable"


@pytest.mark.parametrize("case", [*BAD, *OTHER_BAD])
def test_messages_hold_no_text_of_the_data(case: str) -> None:
    def stained(value: Any) -> Any:
        if isinstance(value, str) and value.strip() and value not in ("user", "assistant", "system"):
            return value + SECRET
        if isinstance(value, list):
            return [stained(v) for v in value]
        return {k: stained(v) for k, v in value.items()} if isinstance(value, dict) else value

    row = stained({**BAD, **OTHER_BAD}[case][0])
    good = pair(1) if case in BAD else None
    for policy in ("error", "drop", None):
        rows = [row] if good is None else [stained(good), row]
        try:
            lines = read(rows, on_bad_row=policy).report.lines()
        except UserError as error:
            lines = [str(error)]
        assert SECRET not in "\n".join(lines)


# Whole sources that are refused


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ["no rows"]),
        (
            [{"query": "p", "good": "a", "bad": "b"}],
            ["found `query, good, bad`", "prompt, chosen, rejected", "--map prompt=query,chosen=good,rejected=bad"],
        ),
        ([{"query": "p", "reply": "a"}], ["found `query, reply`", "--map prompt=query,completion=reply"]),
        (
            [{"prompt": "p", "chosen": "a", "worse": "b"}],
            ["missing `rejected`; found `prompt, chosen, worse`", "--map rejected=worse"],
        ),
        ([{"prompt": "p", "chosen": "a"}], ["missing `rejected`; found `prompt, chosen`", "rejected=COLUMN"]),
        ([{"question": "p", "chosen": "a"}], ["missing `rejected`; found `question, chosen`"]),
        ([{"prompt": "p", "completions": ["a"]}], ["missing `scores`"]),
        ([{"completion": "a"}], ["missing `prompt`; found `completion`"]),
        ([{}], ["found ``"]),
        ([pair(0), {"text": "x"}], ["row 1 is `text`, but row 0 is `prompt, chosen, rejected`"]),
        (
            [{"prompt": "p", "completion": "a"}] * 3 + [{"prompt": "p", "completion": "a", "label": True}],
            ["row 3 is `prompt, completion, label`, but row 0 is `prompt, completion`"],
        ),
        ([{"text": "x"}, pair(1), pair(2)], ["row 0 is `text`, but row 1 is `prompt, chosen, rejected`"]),
        (
            [pair(0), pair(1, prompt=[user("p")])],
            ["row 1 holds messages, but row 0 text"],
        ),
        ([{"prompt": "p", "completion": "a", "label": True}] * 3, ["needs both labels; found 3 × true"]),
        ([{"prompt": "p", "completion": "a", "label": 0}] * 10_000, ["needs both labels; found 10,000 × false"]),
        ([pair(0), "text"], ["row 1 is text, expected an object"]),
        (7, ["int is none of"]),
    ],
)
def test_refused(rows: Any, words: list[str]) -> None:
    for policy in (None, "drop"):  # none of these is a matter of single rows
        message = refused(rows, on_bad_row=policy)
        for part in words:
            assert part in message


def test_arguments_are_checked() -> None:
    assert "on_bad_row" in refused([pair(0)], on_bad_row="skip")
    for limit in (0, -1, 1.5, True):
        assert "limit" in refused([pair(0)], limit=limit)


# Mapping


def test_mapping() -> None:
    rows = [{"prompt": "hidden", "q": "p", "best": "a", "worst": "b", "n": 1}]
    data = read(rows, mapping={"prompt": "q", "chosen": "best", "rejected": "worst", "n": "n"})
    record = only(data)
    assert (record.prompt, record.completions, record.columns) == ("p", ("a", "b"), {"n": 1})
    assert data.report.mapping == {"prompt": "q", "chosen": "best", "rejected": "worst"}
    swapped = read([pair(0)], mapping={"chosen": "rejected", "rejected": "chosen"})
    assert only(swapped).completions == ("bad 0", "good 0")
    assert "no column `promt`; did you mean `prompt`?" in refused([pair(0)], mapping={"x": "promt"})


def test_mapping_turns_columns_into_another_kind() -> None:
    row = {"question": "p", "solution": "s", "answer": "4"}
    data = read([row], mapping={"completion": "solution"})
    assert (data.kind, only(data).prompt, only(data).completions) == ("completions", "p", ("s",))
    assert only(data).columns == {"answer": "4"}


# Sources

ROWS = [pair(i, id=i) for i in range(5)]


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")


def write_data(path: Path) -> None:
    path.write_text(json.dumps({"version": [1, {"data": 2}], "data": ROWS, "more": {}}, indent=2), encoding="utf-8")


def write_lines_as_json(path: Path) -> None:
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")


def write_bom(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, ROWS)).encode())


def write_gz(path: Path) -> None:
    path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))


def write_jsonl_gz(path: Path) -> None:
    path.write_bytes(gzip.compress("\n\n".join(map(json.dumps, ROWS)).encode()))


def write_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.json", write_json),
        ("a.json", write_data),
        ("a.json", write_lines_as_json),
        ("a.jsonl", write_lines_as_json),
        ("a.jsonl", write_bom),
        ("a.json", write_bom),
        ("a.json.gz", write_gz),
        ("a.jsonl.gz", write_jsonl_gz),
        ("a.JSONL.GZ", write_jsonl_gz),
        ("ä b.parquet", write_parquet),
    ],
)
def test_files(name: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / name
    write(path)
    expected = read(ROWS)
    for source in (path, str(path)):
        data = read(source)
        assert data.records == expected.records
        assert data.fingerprint == expected.fingerprint
        assert data.name == str(path)
    assert read(path, limit=3).records == expected.records[:3]


def test_a_bad_row_names_its_line(tmp_path: Path) -> None:
    """Row 17 is on line 18, or further down where blank lines stand above or a row takes several."""
    rows = [pair(i) for i in range(17)] + [pair(17, rejected=...)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert refused(path, on_bad_row="error") == (
        f"{path}: row 17 (line 18): missing `rejected`; found `prompt, chosen`"
    )
    path.write_text("\n\n" + path.read_text())
    assert "row 17 (line 20): missing" in refused(path, on_bad_row="error")
    array = tmp_path / "a.json"
    array.write_text(json.dumps({"about": "x\ny", "data": rows}, indent=2))
    line = array.read_text().split('"prompt": "question 17"')[0].count("\n")  # 0-based, so that of the line before: `{`
    assert f"row 17 (line {line}): missing" in refused(array, on_bad_row="error")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', "a.jsonl line 2: not JSON (Expecting value)"),
        ("a.jsonl", b'{"prompt": "x"} {"prompt": "y"}\n', "a.jsonl line 1: more than one value"),
        ("a.jsonl", b'{"prompt": "x"}\n\n{"prompt": "\xff"}\n', "a.jsonl line 3: not UTF-8"),
        ("a.jsonl", b'[{"prompt": "x"}]', "row 0 (line 1) is a list, expected an object"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000, "a.jsonl line 1: cannot be read (RecursionError)"),
        ("a.jsonl", b"", "no rows"),
        ("a.json", b"", "a.json: no rows; expected one or more with prompt, chosen, rejected"),
        ("a.json", b"[]", "no rows"),
        ("a.json", b'[\n{"prompt": "x"},\n{"prompt": }]', "a.json line 3: not JSON"),
        ("a.json", b'[\n{"prompt": "x"}\n{"prompt": "y"}]', "a.json line 3: not JSON"),
        ("a.json", b'[{"prompt": "x"}', "ends within its list"),
        ("a.json", b'[{"prompt": "x"}] 1', "something follows"),
        ("a.json", b'[{"prompt": "x"}, 3]', "row 1 (line 1) is a number"),
        ("a.json", b'\n\n"text"', "expected a list of objects"),
        ("a.json", b'{"data": [{"prompt": "x"}, \n{"prompt"}]}', "a.json line 2: not JSON"),
        ("a.json", b'{"rows": [1, 2]}', "found `rows`"),
        ("a.json", b"[\n\xff]", "a.json line 2: not UTF-8"),
        ("a.jsonl.gz", b"not gzip", "cannot be read (BadGzipFile"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n' * 9, mtime=0)[:-12], "cannot be read (EOFError"),
        ("a.parquet", b"PAR1 nothing", "not a parquet file"),
        ("a.csv", b"prompt,chosen\n", "does not end in one of"),
    ],
)
def test_damaged_files(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path / name)
    assert words in message
    assert name in message


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    for source in ("pair.jsonl", "./pair", str(tmp_path / "pair"), Path("pair"), "pairs.json", "pairs.csv"):
        assert "no file `" in refused(source)
        assert "`pairs.jsonl`?" in refused(source) or refused(source).endswith("; known: pairs.jsonl")
    assert "the folder `absent` is not there" in refused("absent/pairs.jsonl")
    assert "an empty name" in refused("")
    assert "no file of that name" in refused("x" * 5000)
    assert read("pairs.jsonl").name == "pairs.jsonl"


def test_a_folder_is_read_in_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", ROWS[2:4])
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(ROWS[:2]).encode()))
    write_jsonl(tmp_path / "c.jsonl", [*ROWS[4:], pair(5, chosen=1)])
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / ".hidden.jsonl").write_text("no data")
    data = read(tmp_path, on_bad_row="drop")
    assert data.records == read(ROWS).records
    assert read(tmp_path, limit=3).records == read(ROWS[:3]).records
    assert ": row 5 (c.jsonl line 2): `chosen` is a number" in refused(tmp_path, on_bad_row="error")


def test_splits_of_a_folder(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00001.parquet")
    write_jsonl(tmp_path / "test.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "extra.jsonl", ROWS[:2])
    assert [len(read(tmp_path)), len(read(tmp_path, split="test"))] == [5, 1]
    assert "no split `validation`; found files of `test, train`" in refused(tmp_path, split="validation")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no file that ends in" in refused(empty)
    (empty / "data").mkdir()
    write_jsonl(empty / "data" / "train-0.jsonl", ROWS)
    assert len(read(empty)) == 5


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The library, with its cache in a folder of the test and no way to the network."""
    module = pytest.importorskip("datasets")
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(module.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    module.disable_progress_bars()
    yield module
    module.enable_progress_bars()


def test_data_sets(datasets: Any, tmp_path: Path) -> None:
    expected = read(ROWS)
    data = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict(train=data, test=data.select([0]))
    splits.save_to_disk(tmp_path / "splits")
    data.save_to_disk(tmp_path / "saved")
    for source in (
        data,
        data.with_format("numpy"),
        data.to_iterable_dataset(),
        splits,
        tmp_path / "splits",
        tmp_path / "saved",
    ):
        found = read(source)
        assert found.records == expected.records
        assert found.fingerprint == expected.fingerprint
        assert read(source, limit=2).records == expected.records[:2]
    assert len(read(splits, split="test")) == 1
    assert "no split `tset`; did you mean `test`?" in refused(tmp_path / "splits", split="tset")
    messages = [{"prompt": [user("p")], "chosen": [bot("a")], "rejected": [bot("b"), {**user("c"), "name": "x"}]}]
    assert read(datasets.Dataset.from_list(messages)).records == read(messages).records
    (tmp_path / "saved" / "state.json").write_text("{")
    assert "not a data set saved by `datasets`" in refused(tmp_path / "saved")


def test_names_of_the_hub(datasets: Any, tmp_path: Path) -> None:
    """`load_dataset` as for a name on the hub, here of a folder; an unknown name says what was tried."""
    from rlkit.envs.text_files import _from_hub

    folder = tmp_path / "repository"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)
    assert _from_hub(str(folder), "train", 2).rows == ROWS[:2]
    with pytest.raises(UserError, match="not a data set that can be loaded"):
        _from_hub(str(folder), "test", None)
    message = refused("nobody-at-all/nothing-v1.5-data")
    assert "`nobody-at-all/nothing-v1.5-data` is neither a file nor a folder here" in message


def test_names_near_a_folder(datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "preferences.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert "did you mean `preferences.jsonl`?" in refused("preference")


# The report and the fingerprint


def test_report() -> None:
    """Longer chosen: rows 0 and 4 of the 4 kept, 50 %; row 3 equals row 1; prompts p, q and r."""
    rows = [
        {"prompt": "p", "chosen": "longer", "rejected": "short", "id": 0},
        {"prompt": "q", "chosen": "abc", "rejected": "abd", "id": 1},
        {"prompt": "q", "chosen": "", "rejected": "abd", "id": 2},
        {"prompt": "q", "chosen": "abc", "rejected": "abd", "id": 3},
        {"prompt": "r p", "chosen": "r p xyz", "rejected": "r p", "id": 4, "score_chosen": 2, "score_rejected": 2.0},
    ]
    report = read(rows, on_bad_row="drop").report
    assert (report.rows, report.kept, report.records) == (5, 4, 4)
    assert (report.duplicates, report.first_duplicate, report.prompts, report.ties) == (1, 3, 3, 1)
    assert report.longer_chosen == 0.5
    assert report.lines() == [
        "the list: 5 rows, 4 kept",
        "format: `prompt, chosen, rejected`, text",
        "dropped: 1 × empty `chosen` (first: row 2)",
        "prompts: 3 distinct",
        "duplicates: 1 exact, kept (first: row 3)",
        "ties: 1",
        "length: the chosen completion is longer in 50.0% of the pairs",
        "note: 1 × `chosen` and `rejected` both begin with the whole `prompt`, which is kept",
    ]


def test_report_of_ranked_rows() -> None:
    """Scores 2, 2, 2, 1 hold 3 tied pairs, 1, 1 one."""
    rows = [
        {"question": "p", "completions": ["a", "b", "c", "d"], "scores": [2, 2.0, 2, 1]},
        {"question": "q", "completions": ["a", "a"], "scores": [1, 1]},
        {"question": "q", "completions": ["a"], "scores": [1]},
    ]
    report = read(rows).report
    assert (report.ties, report.tied_rows, report.longer_chosen) == (4, 1, None)
    assert report.notes == {"completion equal to another of its prompt": 1}
    assert "format: `prompt, completions[], scores[]`, text; prompt=question" in report.lines()
    assert "ties: 4; all scores equal in 1 rows" in report.lines()


def test_prompts_with_different_columns_are_no_duplicates() -> None:
    report = read(
        [{"prompt": "p", "answer": "1"}, {"prompt": "p", "answer": "2"}, {"prompt": "p", "answer": "1"}]
    ).report
    assert (report.prompts, report.duplicates, report.first_duplicate) == (1, 1, 2)


CHANGES: dict[str, list[Row]] = {
    "order": [pair(1), pair(0)],
    "fewer": [pair(0)],
    "prompt": [pair(0), pair(1, prompt="other")],
    "swap": [pair(0), pair(1, chosen="bad 1", rejected="good 1")],
    "column": [pair(0), pair(1, id=1)],
}


@pytest.mark.parametrize("case", CHANGES)
def test_the_fingerprint_tells_content_apart(case: str) -> None:
    whole = [pair(0), pair(1)]
    assert read(CHANGES[case]).fingerprint != read(whole).fingerprint
    assert read(json.loads(json.dumps(whole))).fingerprint == read(whole).fingerprint


def test_the_fingerprint_is_the_same_in_another_process(tmp_path: Path) -> None:
    """No hash seeds, memory addresses or row numbers in it."""
    rows = [{"prompt": "é\u2028", "completions": ["a", "b"], "scores": [0.1, 2], "meta": {"b": 1, "a": [None, "x"]}}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    code = f"from rlkit.envs.preferences import read; print(read({str(path)!r}).fingerprint)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == read(rows).fingerprint
    assert read([pair(0, x=np.array([1.5]))]).fingerprint == read([pair(0, x=[1.5])]).fingerprint
    assert read([pair(0, x={"a": 1, "b": 2})]).fingerprint == read([pair(0, x={"b": 2, "a": 1})]).fingerprint
    assert read([pair(0, x=object())]).fingerprint == read([pair(0, x=object())]).fingerprint


# Real data

COUNTS = {  # rows of the files, by the list that comes with them; the kind; records where a row gives several
    "preferences/alpacaeval_pairs": (500, 5000, "pairs"),
    "preferences/alpacaeval_ranked": (85, 560, "ranked"),
    "preferences/alpacaeval_triads": (65, 312, "prompts"),
    "preferences/hh_harmless_base": (250, 1558, "pairs"),
    "preferences/llmbar": (209, 0, "pairs"),
    "preferences/pandalm_human": (14, 124, "pairs"),
    "reasoning/gsm8k": (659, 7473, "prompts"),
    "reasoning/math500": (300, 0, "prompts"),
    "reasoning/svamp": (100, 700, "prompts"),
    "text/tinystories": (100, 736, "completions"),
}


MADE = {"made/pairs": (3, 40, "pairs"), "made/reasoning": (2, 0, "prompts")}
"""The same of folders that the test writes, so that it runs without the real ones, too."""


def made_folder(folder: Path, name: str) -> Path:
    for split, rows in zip(("test", "train"), MADE[name][:2], strict=True):
        if rows:
            numbers = range(rows) if split == "train" else range(100, 100 + rows)
            made = [pair(i) if name == "made/pairs" else {"question": f"q{i}", "answer": f"{i}"} for i in numbers]
            (folder / f"{split}.jsonl.gz").write_bytes(
                gzip.compress("".join(f"{json.dumps(r)}\n" for r in made).encode())
            )
    return folder


@pytest.mark.parametrize("name", [*MADE, *(COUNTS if SHARED.exists() else ())])
def test_folders_of_data(name: str, tmp_path: Path) -> None:
    *counts, kind = {**COUNTS, **MADE}[name]
    folder = made_folder(tmp_path, name) if name in MADE else SHARED / name
    for split, rows in zip(("test", "train"), counts, strict=True):
        if not rows:
            assert f"no split `{split}`" in refused(folder, split=split)
            continue
        data = read(folder, split=split)
        assert (data.kind, data.report.rows, data.report.kept) == (kind, rows, rows)
        assert data.report.dropped == {}
        if name.endswith("pandalm_human"):
            check_votes(folder / f"{split}.jsonl.gz", data)
        else:
            assert len(data) == rows
        if name.endswith("alpacaeval_pairs"):  # the list says: about 71 % and 75 %
            assert data.report.longer_chosen == pytest.approx({"train": 0.71, "test": 0.75}[split], abs=0.005)
        if "reasoning" in name:
            assert "answer" in data.columns


def check_votes(path: Path, data: TextData) -> None:
    """As many pairs as comparisons with a majority and two texts."""
    expected = 0
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            texts = [r["text"].strip() for r in row["responses"]]
            expected += sum(
                c["votes_i"] != c["votes_j"] and all((texts[c["i"]], texts[c["j"]])) for c in row["comparisons"]
            )
    assert len(data) == expected
