"""Text data for language trainers: files, folders and data sets in the common formats -> checked records.

`read(source)` returns a `TextData` of one kind:

| kind | columns | completions of a record |
|---|---|---|
| pairs | `prompt, chosen, rejected`, or `chosen, rejected` that begin with their prompt | (chosen, rejected) |
| ranked | `prompt, completions[], scores[]` | all, with `scores` |
| unpaired | `prompt, completion, label` | (completion,), with `label` |
| completions | `prompt, completion` · `messages` · `text` | (completion,) |
| prompts | `prompt` | () |

Prompts and completions are texts, or lists of {role, content} messages; a file keeps to one of the two. These layouts
are recognised as well: `question` for `prompt` (`answer`, `solution` stay columns); `instruction` (+ `input`, after a
blank line) for `prompt`, with `output` for `completion`; `responses: [{text, score}]`; `output_1, output_2,
preference`; `response_0, response_1` with `better_response_id` or `safer_response_id`; `responses, comparisons` with
votes; UltraFeedback, original (`completions: [{response, overall_score}]`) and binarized (a text prompt beside whole
conversations). `mapping` names columns otherwise.

Rows are numbered from 0 over the whole source, as in `dataset[17]`; lines of a file from 1. Messages and reports hold
column names, row numbers and counts, never text of the data, which may be offensive.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from rlkit.envs.text_files import Rows, open_rows, type_name
from rlkit.errors import UserError, did_you_mean

Kind = Literal["pairs", "ranked", "unpaired", "completions", "prompts"]
Message = dict[str, Any]
Text = str | list[Message]
Row = dict[str, Any]

TIMES = "\N{MULTIPLICATION SIGN}"
DROP_LIMIT = 0.01
"""Share of bad rows that is dropped without being asked to."""


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt with its completions.

    Args:
        row: number of the row in the source; a row with several comparisons gives several records.
        prompt: text or messages; "" for the format `text`.
        completions: of the prompt's type. For pairs the chosen one comes first.
        scores: one a completion, for kind "ranked".
        label: desirable or not, for kind "unpaired".
        columns: every other column, the same names in each record (None where a row has none). `weight` (>= 0) and
            `margin` are finite numbers or None, except for kind "prompts", where they have no meaning here.
    """

    row: int
    prompt: Text
    completions: tuple[Text, ...]
    scores: tuple[float, ...] | None
    label: bool | None
    columns: dict[str, Any]


@dataclass(slots=True)
class Report:
    """Counts of what was read and what was wrong with it.

    Args:
        name: of the source.
        format: the layout found, such as "prompt, chosen, rejected".
        conversational: messages rather than text.
        mapping: our name -> theirs, given and recognised.
        rows: rows read.
        kept: rows that gave at least one record, or that hold only ties.
        records: records made of them.
        dropped: reason -> (rows, first of them).
        duplicates: records equal to an earlier one in all but `columns` (for prompts in these, too); they are kept.
        first_duplicate: the row of the first of them.
        ties: ranked: pairs of completions with equal scores; pairs: comparisons without a winner, which give no
            record, and pairs whose `score_chosen` equals `score_rejected`, which are kept.
        tied_rows: ranked: rows whose scores are all equal.
        prompts: distinct prompts.
        longer_chosen: share of pairs whose chosen completion has more characters; None for other kinds.
        notes: what else was found -> how often.
    """

    name: str
    format: str
    conversational: bool
    mapping: dict[str, str]
    rows: int
    kept: int
    records: int
    dropped: dict[str, tuple[int, int]]
    duplicates: int
    first_duplicate: int | None
    ties: int
    tied_rows: int
    prompts: int
    longer_chosen: float | None
    notes: dict[str, int]

    def lines(self) -> list[str]:
        """The report for people, one fact a line."""
        of = f" ({self.records:,} records)" if self.records != self.kept else ""
        named = ", ".join(f"{ours}={theirs}" for ours, theirs in self.mapping.items())
        out = [
            f"{self.name}: {self.rows:,} rows, {self.kept:,} kept{of}",
            f"format: `{self.format}`, {'messages' if self.conversational else 'text'}{f'; {named}' if named else ''}",
        ]
        out += [f"dropped: {n:,} {TIMES} {reason} (first: row {row})" for reason, (n, row) in self.dropped.items()]
        out.append(f"prompts: {self.prompts:,} distinct")
        if self.duplicates:
            out.append(f"duplicates: {self.duplicates:,} exact, kept (first: row {self.first_duplicate})")
        if self.ties:
            rows = f"; all scores equal in {self.tied_rows:,} rows" if self.tied_rows else ""
            out.append(f"ties: {self.ties:,}{rows}")
        if self.longer_chosen is not None:
            out.append(f"length: the chosen completion is longer in {self.longer_chosen:.1%} of the pairs")
        return out + [f"note: {n:,} {TIMES} {note}" for note, n in self.notes.items()]


@dataclass
class TextData:
    """Checked records of one kind.

    Args:
        kind: what a record's completions are; see the module.
        records: in the order of the source.
        report: counts for the log.
        name: of the source, for messages.
        columns: names of the records' other columns, in the order they were met.
    """

    kind: Kind
    records: list[Record]
    report: Report
    name: str
    columns: list[str]

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def fingerprint(self) -> str:
        """BLAKE2b (16 bytes, hexadecimal) of the kind and the records' canonical JSON.

        Row numbers are left out, so the same rows give the same fingerprint from any kind of file. Values of columns
        that JSON does not know count by their `isoformat()`, `tolist()` or bytes, others by the name of their type.
        """
        digest = hashlib.blake2b(self.kind.encode(), digest_size=16)
        for r in self.records:
            content = [r.prompt, r.completions, r.scores, r.label, r.columns]
            digest.update(b"\n" + _canonical(content).encode("ascii"))
        return digest.hexdigest()


def read(
    source: Any,
    *,
    mapping: Mapping[str, str] | None = None,
    on_bad_row: Literal["error", "drop"] | None = None,
    split: str = "train",
    limit: int | None = None,
) -> TextData:
    """The records of a data source.

    Args:
        source: a file `.json` (a list of objects, or {"data": [...]}), `.jsonl`, either with `.gz`, or `.parquet`; a
            folder of such files, or one saved by `datasets.save_to_disk`; a `datasets.Dataset` (or a dict of them); a
            list of dicts; any other text is a name for `datasets.load_dataset`.
        mapping: our name -> their column. A mapped name hides a column of the same name.
        on_bad_row: "error" raises at the first bad row; "drop" leaves bad rows out and counts them; None drops them
            if they are at most 1 % of the rows, and otherwise raises an error that lists them.
        split: of a data set with several. In a folder, files whose names begin with it are preferred to all others.
        limit: rows to read at most.

    Without `prompt`, the prompt of a pair is what `chosen` and `rejected` share: whole turns of a conversation; of
    texts the longest common prefix, less one space at its end, where TRL's `extract_prompt` cuts. That may be in the
    middle of a word, so an explicit `prompt` is better.

    Raises:
        UserError: no such file, data that cannot be read or are in no known format, bad rows beyond the policy, rows
            of different formats, no rows, or unpaired rows with one label only.
    """
    if on_bad_row not in ("error", "drop", None):
        raise UserError(f"on_bad_row: {on_bad_row!r} is neither `error` nor `drop`")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise UserError(f"limit: {limit!r} is not a positive integer")
    given = open_rows(source, split, limit)
    if not given.rows:
        raise UserError(f"{given.name}: no rows; expected one or more with {EXPECTED}")
    mapping = dict(mapping or {})
    prepared = _renamed(given, mapping)
    layouts = [_layout(row) for row, _ in prepared]
    known = Counter(layout for layout in layouts if layout is not None)
    if not known:
        raise UserError(_no_format(given, prepared[0][0]))
    main = known.most_common(1)[0][0]
    aliases = {**mapping, **prepared[layouts.index(main)][1]}

    collected = _Collected(given, main, policy=on_bad_row)
    for i, (row, _) in enumerate(prepared):
        layout = layouts[i]
        if layout is not None and layout is not main and not layout.needs < main.needs | main.uses:
            first = given.where(layouts.index(main))
            raise UserError(
                f"{given.name}: {given.where(i)} is `{layout.name}`, but {first} is `{main.name}`; one format a source"
            )
        collected.add(i, row, aliases)
    return collected.finish(aliases)


class _BadRow(Exception):  # noqa: N818 - caught here, never seen by users
    """A row that cannot be used: `reason` groups rows in the report, `detail` is added to the first example."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(slots=True)
class _Parsed:
    prompt: Text
    completions: tuple[Text, ...]
    scores: tuple[float, ...] | None = None
    label: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Layout:
    """One way to write a kind: the columns a row needs (and uses up), and how they become records.

    Args:
        uses: columns that are used up where they are there.
    """

    name: str
    kind: Kind
    needs: frozenset[str]
    parse: Callable[[Row, Counter[str]], list[_Parsed]]
    uses: frozenset[str] = frozenset()


TIES = "ties"
TIED_ROWS = "tied_rows"


class _Collected:
    """Records and counts while rows come in."""

    def __init__(self, given: Rows, main: _Layout, policy: str | None) -> None:
        self.given, self.main, self.policy = given, main, policy
        self.parsed: list[tuple[int, _Parsed, Row]] = []
        self.counts: Counter[str] = Counter()
        self.bad: dict[str, list[int]] = {}
        self.examples: dict[str, str] = {}
        self.kept = 0
        self.first: int | None = None  # the row that says whether the data are messages or text
        self.conversational = False

    def add(self, i: int, row: Row, aliases: Mapping[str, str]) -> None:
        """Parse and check row i."""
        counts: Counter[str] = Counter()
        try:
            absent = [f"`{aliases.get(name, name)}`" for name in _ordered(self.main) if row.get(name) is None]
            if absent:
                found = ", ".join(name for name, value in self.given.rows[i].items() if value is not None)
                raise _BadRow(f"missing {', '.join(absent)}", f"found `{found}`" if found else "the row is empty")
            parsed = self.main.parse(row, counts)
            used = self.main.needs | self.main.uses
            columns = {name: value for name, value in row.items() if name not in used}
            if self.main.kind != "prompts":
                for one in parsed:
                    _check_numbers({**columns, **one.extra})
        except _BadRow as bad:
            text = f"{self.given.where(i)}: {bad.reason}{f'; {bad.detail}' if bad.detail else ''}"
            if self.policy == "error":
                raise UserError(f"{self.given.name}: {text}") from None
            self.bad.setdefault(bad.reason, []).append(i)
            self.examples.setdefault(bad.reason, text)
            return
        self.kept += 1
        self.counts += counts
        for one in parsed:
            self._sametype_name(i, isinstance(one.prompt, list))
            self.parsed.append((i, one, columns))

    def _sametype_name(self, i: int, conversational: bool) -> None:
        if self.first is None:
            self.first, self.conversational = i, conversational
        if conversational != self.conversational:
            kinds = ("messages", "text") if conversational else ("text", "messages")
            here, there = self.given.where(i), self.given.where(self.first)
            raise UserError(f"{self.given.name}: {here} holds {kinds[0]}, but {there} {kinds[1]}; one format a source")

    def finish(self, aliases: dict[str, str]) -> TextData:
        """Apply the policy for bad rows, and look at the records as a whole."""
        total, name = len(self.given.rows), self.given.name
        n_bad = total - self.kept
        listing = "\n".join(f"  {len(rows):,} {TIMES} {self.examples[reason]}" for reason, rows in self.bad.items())
        if n_bad > DROP_LIMIT * total and self.policy is None:
            raise UserError(
                f"{name}: {n_bad:,} of {total:,} rows are bad (counts, each with its first example):\n{listing}\n"
                f"mend them, or leave them out with `--on_bad_row drop`"
            )
        if not self.parsed:
            bad = f", bad rows:\n{listing}" if listing else ""
            raise UserError(
                f"{name}: none of {total:,} rows is left; {self.counts[TIES]:,} ties{bad}\nat least one is needed: "
                "mend the rows, or name other columns with `--map`"
            )
        columns = list(dict.fromkeys(key for _, one, row in self.parsed for key in (*row, *one.extra)))
        records = [
            Record(
                i,
                one.prompt,
                one.completions,
                one.scores,
                one.label,
                {key: one.extra.get(key, row.get(key)) for key in columns},
            )
            for i, one, row in self.parsed
        ]
        if self.main.kind == "unpaired":
            check_labels([bool(r.label) for r in records], name)
        return TextData(self.main.kind, records, self._report(records, aliases), name, columns)

    def _report(self, records: list[Record], aliases: dict[str, str]) -> Report:
        prompts, contents = set(), set()
        repeated: list[int] = []
        longer = 0
        for r in records:
            prompt = _key(r.prompt)
            columns = _canonical(r.columns) if self.main.kind == "prompts" else ""
            content = (prompt, tuple(_key(c) for c in r.completions), r.scores, r.label, columns)
            if content in contents:
                repeated.append(r.row)
            prompts.add(prompt)
            contents.add(content)
            if self.main.kind == "pairs":
                longer += _length(r.completions[0]) > _length(r.completions[1])
        return Report(
            name=self.given.name,
            format=self.main.name,
            conversational=self.conversational,
            mapping={ours: theirs for ours, theirs in aliases.items() if ours != theirs},
            rows=len(self.given.rows),
            kept=self.kept,
            records=len(records),
            dropped={reason: (len(rows), rows[0]) for reason, rows in self.bad.items()},
            duplicates=len(repeated),
            first_duplicate=repeated[0] if repeated else None,
            ties=self.counts[TIES],
            tied_rows=self.counts[TIED_ROWS],
            prompts=len(prompts),
            longer_chosen=longer / len(records) if self.main.kind == "pairs" else None,
            notes={note: n for note, n in self.counts.items() if note not in (TIES, TIED_ROWS)},
        )


def check_labels(labels: Sequence[bool], name: str) -> None:
    """Raise UserError unless both labels occur."""
    if all(labels) or not any(labels):
        found = f"{len(labels):,} {TIMES} {str(labels[0]).lower()}" if labels else "no rows"
        raise UserError(f"{name}: needs both labels; found {found}; add rows of the other label")


# Layouts


def _renamed(given: Rows, mapping: Mapping[str, str]) -> list[tuple[Row, dict[str, str]]]:
    """Rows under our names, each with what was recognised by itself (ours -> theirs).

    Raises:
        UserError: the mapping names a column that no row has.
    """
    names = {str(name) for row in given.rows for name in row}
    for ours, theirs in mapping.items():
        if theirs not in names:
            raise UserError(
                f"mapping `{ours}={theirs}`: {given.name} has no column `{theirs}`{did_you_mean(theirs, names)}"
            )
    moved = set(mapping.values())
    out = []
    for source in given.rows:
        row = {name: value for name, value in source.items() if name not in moved}
        row.update({ours: source.get(theirs) for ours, theirs in mapping.items()})
        out.append((row, _recognise(row)))
    return out


def _recognise(row: Row) -> dict[str, str]:
    """Give the usual other names for `prompt` and `completion` our names, in place; returns ours -> theirs."""
    found = {}
    instruction = row.get("instruction")
    if instruction is not None and row.get("output") is not None and row.get("completion") is None:
        row["completion"] = row.pop("output")
        found["completion"] = "output"
    if row.get("prompt") is not None:
        return found
    if row.get("question") is not None:
        row["prompt"] = row.pop("question")
        found["prompt"] = "question"
    elif instruction is not None:
        extra = row.pop("input", None)
        join = isinstance(instruction, str) and isinstance(extra, str) and extra.strip()
        row["prompt"] = f"{row.pop('instruction')}\n\n{extra}" if join else row.pop("instruction")
        found["prompt"] = "instruction"
    return found


def _holds(value: Any, *names: str) -> bool:
    """Whether value is a list of objects, the first of which has these keys."""
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping) and {*names} <= {*value[0]}


def _layout(row: Row) -> _Layout | None:
    """The layout of a row by its columns, the most specific that fits."""
    has = {name for name, value in row.items() if value is not None}
    if ("chosen" in has) != ("rejected" in has):
        return None  # an incomplete pair is no prompt with a column
    if "completions" in has and "scores" not in has and not _holds(row["completions"], "response"):
        return None
    for layout in LAYOUTS:
        if layout.needs <= has and (
            layout not in SHAPES or all(_holds(row[name], *keys) for name, keys in SHAPES[layout].items())
        ):
            return layout
    return None


def _prompt_completion(row: Row, counts: Counter[str]) -> list[_Parsed]:
    return [_parsed(row["prompt"], [("completion", row["completion"])])]


def _unpaired(row: Row, counts: Counter[str]) -> list[_Parsed]:
    label = _plain(row["label"])
    if not isinstance(label, bool | int | float):
        raise _BadRow(f"`label` is {type_name(label)}, expected true or false")
    if label not in (0, 1):
        raise _BadRow("`label` is neither true nor false")
    parsed = _parsed(row["prompt"], [("completion", row["completion"])])
    parsed.label = bool(label)
    return [parsed]


def _prompt_only(row: Row, counts: Counter[str]) -> list[_Parsed]:
    return [_Parsed(_text(row["prompt"], "prompt"), ())]


def _messages(row: Row, counts: Counter[str]) -> list[_Parsed]:
    """The prompt is everything before the final message, which has to be the assistant's."""
    messages = _text(row["messages"], "messages")
    if isinstance(messages, str):
        raise _BadRow("`messages` is text, expected a list of messages")
    if messages[-1]["role"] != "assistant":
        raise _BadRow("`messages` does not end with an `assistant` message")
    if len(messages) == 1:
        raise _BadRow("`messages` has nothing before the `assistant` message")
    return [_Parsed(messages[:-1], (messages[-1:],))]


def _plain_text(row: Row, counts: Counter[str]) -> list[_Parsed]:
    text = _text(row["text"], "text")
    if not isinstance(text, str):
        raise _BadRow("`text` is a list, expected text")
    return [_Parsed("", (text,))]


def _pair(row: Row, counts: Counter[str]) -> list[_Parsed]:
    parsed = _compared(row.get("prompt"), ("chosen", row["chosen"]), ("rejected", row["rejected"]))
    scores = [_plain(row.get(f"score_{side}")) for side in ("chosen", "rejected")]
    if scores[0] is not None and scores[0] == scores[1]:
        counts[TIES] += 1
    prompt, texts = parsed.prompt, parsed.completions
    if isinstance(prompt, str) and all(isinstance(c, str) and c.startswith(prompt) for c in texts):
        counts["`chosen` and `rejected` both begin with the whole `prompt`, which is kept"] += 1
    return [parsed]


def _output_pair(row: Row, counts: Counter[str]) -> list[_Parsed]:
    """`preference` 1 or 2; 0 and 1.5 are ties."""
    return _numbered(row, counts, "preference", ("output_1", "output_2"), {1: 0, 2: 1, 0: None, 1.5: None})


def _response_pair(name: str) -> Callable[[Row, Counter[str]], list[_Parsed]]:
    def parse(row: Row, counts: Counter[str]) -> list[_Parsed]:
        return _numbered(row, counts, name, ("response_0", "response_1"), {0: 0, 1: 1})

    return parse


def _numbered(
    row: Row, counts: Counter[str], name: str, sides: tuple[str, str], winners: Mapping[float, int | None]
) -> list[_Parsed]:
    """A pair whose winner is given by number in column `name`."""
    value = _plain(row[name])
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise _BadRow(f"`{name}` is text, expected a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in winners:
        expected = " or ".join(str(number) for number, winner in winners.items() if winner is not None)
        raise _BadRow(f"`{name}` is not {expected}")
    winner = winners[value]
    if winner is None:
        counts[TIES] += 1
        return []
    chosen, rejected = sides[winner], sides[1 - winner]
    return [_compared(row["prompt"], (chosen, row[chosen]), (rejected, row[rejected]))]


def _ranked(row: Row, counts: Counter[str]) -> list[_Parsed]:
    completions, scores = _plain(row["completions"]), _plain(row["scores"])
    for name, value in (("completions", completions), ("scores", scores)):
        if not isinstance(value, list | tuple):
            raise _BadRow(f"`{name}` is {type_name(value)}, expected a list")
    if len(completions) != len(scores):
        raise _BadRow(
            "`completions` and `scores` differ in length", f"{len(completions)} completions, {len(scores)} scores"
        )
    return [_scored(row["prompt"], "completions", completions, "scores", scores, counts)]


def _responses(row: Row, counts: Counter[str]) -> list[_Parsed]:
    """`responses: [{text, score, ...}]`; other keys become columns `completion_<key>` of lists."""
    responses = _objects(row["responses"], "responses", "text", "score")
    texts, scores = [r["text"] for r in responses], [r["score"] for r in responses]
    parsed = _scored(row["prompt"], "responses", texts, "score", scores, counts)
    parsed.extra.update(_others(responses, "text", "score"))
    return [parsed]


def _ultrafeedback(row: Row, counts: Counter[str]) -> list[_Parsed]:
    """The original release (Cui et al. 2023, arXiv:2310.01377): `completions: [{response, overall_score, ...}]`.

    Early versions hold an `overall_score` of 10 for completions that the aspects rate about 1 (found by Argilla when
    they binarised the data): a 10 whose aspects have a mean of at most 2 (of 5) counts as 1.
    """
    completions = _objects(row["completions"], "completions", "response", "overall_score")
    scores = []
    for completion in completions:
        score, aspects = _plain(completion["overall_score"]), _aspect_mean(completion)
        if score == 10 and aspects is not None and aspects <= 2:
            counts["`overall_score` 10 where the aspects' mean is at most 2: taken as 1"] += 1
            score = 1.0
        scores.append(score)
    parsed = _scored(
        row["prompt"], "completions", [c["response"] for c in completions], "overall_score", scores, counts
    )
    parsed.extra.update(_others(completions, "response", "overall_score"))
    return [parsed]


def _aspect_mean(completion: Mapping[str, Any]) -> float | None:
    """Mean of the aspects' ratings ("N/A" left out), else `fine-grained_score`, which is that mean; None if neither."""
    ratings = []
    annotations = completion.get("annotations")
    for value in (annotations if isinstance(annotations, Mapping) else {}).values():
        entries = value if isinstance(value, list) else [value]
        found = [entry.get("Rating") for entry in entries if isinstance(entry, Mapping)]
        ratings += [number for number in map(_as_number, found) if number is not None]
    if ratings:
        return sum(ratings) / len(ratings)
    return _as_number(completion.get("fine-grained_score"))


def _as_number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _votes(row: Row, counts: Counter[str]) -> list[_Parsed]:
    """`responses: [{text}], comparisons: [{i, j, votes_i, votes_j, votes_tie}]`: one pair a comparison by majority.

    Columns of each: `probability` P(chosen beats rejected) with half a win for a tie, `weight` = 2 P - 1 (1 where all
    agree), and `chosen_<key>`, `rejected_<key>` for other keys of the responses. Comparisons without a majority or with
    an empty or equal text give none.
    """
    responses = _objects(row["responses"], "responses", "text")
    out = []
    for comparison in _objects(row["comparisons"], "comparisons", "i", "j", "votes_i", "votes_j"):
        i, j, votes_i, votes_j, ties = (
            _plain(comparison.get(k) or 0) for k in ("i", "j", "votes_i", "votes_j", "votes_tie")
        )
        for side in (i, j):
            if type(side) is not int or not 0 <= side < len(responses):
                raise _BadRow("`comparisons` names a response that is not there")
        for votes in (votes_i, votes_j, ties):
            _number(votes, "votes", least=0)
        if votes_i == votes_j:
            counts[TIES] += 1
            continue
        (chosen, most), (rejected, least) = sorted(((i, votes_i), (j, votes_j)), key=lambda side: -side[1])
        texts = responses[chosen]["text"], responses[rejected]["text"]
        if any(text == "" or (isinstance(text, str) and not text.strip()) for text in texts):
            counts["comparison with an empty text, left out"] += 1
            continue
        if texts[0] == texts[1]:
            counts["comparison of equal texts, left out"] += 1
            continue
        parsed = _compared(row["prompt"], ("responses", texts[0]), ("responses", texts[1]))
        probability = (most + ties / 2) / (most + least + ties)
        counts["pair with a `weight` by its votes"] += 1
        parsed.extra = {"weight": 2 * probability - 1, "probability": probability}
        for side, number in (("chosen", chosen), ("rejected", rejected)):
            parsed.extra.update({f"{side}_{k}": v for k, v in responses[number].items() if k != "text"})
        out.append(parsed)
    return out


def _define(
    name: str, kind: Kind, parse: Callable[[Row, Counter[str]], list[_Parsed]], uses: Iterable[str] = ()
) -> _Layout:
    return _Layout(name, kind, frozenset(re.sub(r"\[.*?\]", "", name).split(", ")), parse, frozenset(uses))


PREFERENCE_COMPARISONS = _define("prompt, responses[], comparisons[]", "pairs", _votes)
ULTRAFEEDBACK = _define("prompt, completions[response; overall_score]", "ranked", _ultrafeedback)
RESPONSES = _define("prompt, responses[text; score]", "ranked", _responses)
SHAPES: dict[_Layout, dict[str, tuple[str, ...]]] = {
    PREFERENCE_COMPARISONS: {"responses": ("text",), "comparisons": ("i", "j")},
    ULTRAFEEDBACK: {"completions": ("response",)},
    RESPONSES: {"responses": ("text", "score")},
}
LAYOUTS = [  # in order of preference
    _define("prompt, chosen, rejected", "pairs", _pair),
    _define("chosen, rejected", "pairs", _pair, uses=["prompt"]),
    PREFERENCE_COMPARISONS,
    ULTRAFEEDBACK,
    _define("prompt, completions[], scores[]", "ranked", _ranked),
    RESPONSES,
    _define("prompt, output_1, output_2, preference", "pairs", _output_pair),
    _define("prompt, response_0, response_1, better_response_id", "pairs", _response_pair("better_response_id")),
    _define("prompt, response_0, response_1, safer_response_id", "pairs", _response_pair("safer_response_id")),
    _define("prompt, completion, label", "unpaired", _unpaired),
    _define("prompt, completion", "completions", _prompt_completion),
    _define("messages", "completions", _messages, uses=["prompt"]),
    _define("prompt", "prompts", _prompt_only),
    _define("text", "completions", _plain_text, uses=["prompt"]),
]
OURS = {"prompt", "chosen", "rejected", "completion", "label", "completions", "scores", "messages", "text"}
EXPECTED = (
    "prompt, chosen, rejected · chosen, rejected · prompt, completion, label · prompt, completions[], scores[] · "
    "prompt, completion · messages · text · prompt"
)


COLUMNS = 20
"""Names of columns that a message lists at most."""


def _ordered(layout: _Layout) -> list[str]:
    return re.sub(r"\[.*?\]", "", layout.name).split(", ")


def _no_format(given: Rows, row: Row) -> str:
    """The message for columns that fit nothing, by the first row, with a mapping made of what is there."""
    columns = list(dict.fromkeys(str(name) for source in given.rows for name in source))
    has = {name for name, value in row.items() if value is not None}
    free = [name for name in columns if name in row and name not in OURS]
    if has & {"chosen", "rejected"}:
        wanted = ["prompt", "chosen", "rejected"]
    elif "completions" in has:
        wanted = ["prompt", "completions", "scores"]
    else:
        wanted = ["prompt", "completion"] if len(free) < 3 else ["prompt", "chosen", "rejected"]
    absent = [name for name in wanted if name not in has]
    missing = f"missing {', '.join(f'`{name}`' for name in absent)}; " if len(absent) < len(wanted) else ""
    example = ",".join(f"{name}={free[k] if k < len(free) else 'COLUMN'}" for k, name in enumerate(absent))
    found = ", ".join(columns[:COLUMNS]) + (f", … ({len(columns)} in all)" if len(columns) > COLUMNS else "")
    return (
        f"{given.name}: {missing}found `{found}`; expected one of: {EXPECTED}. "
        f"Name the columns with, for example, `--map {example}`"
    )


# Values of a row


def _plain(value: Any) -> Any:
    """Arrays, tensors and their scalars as Python values."""
    return value.tolist() if hasattr(value, "tolist") else value


def _number(value: Any, name: str, least: float = -math.inf) -> float:
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _BadRow(f"`{name}` is {type_name(value)}, expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _BadRow(f"`{name}` is not finite", f"found {number}")
    if number < least:
        raise _BadRow(f"`{name}` is below {least:g}", f"found {number:g}")
    return number


def _check_numbers(columns: Mapping[str, Any]) -> None:
    for name, least in (("weight", 0.0), ("margin", -math.inf)):
        if columns.get(name) is not None:
            _number(columns[name], name, least)


def _objects(value: Any, name: str, *keys: str) -> list[Mapping[str, Any]]:
    """A list of objects that have these keys."""
    value = _plain(value)
    if not isinstance(value, list | tuple):
        raise _BadRow(f"`{name}` is {type_name(value)}, expected a list")
    if not value:
        raise _BadRow(f"empty `{name}`")
    for k, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise _BadRow(f"`{name}` holds {type_name(item)}, expected objects", f"entry {k}")
        for key in keys:
            if item.get(key) is None:
                raise _BadRow(f"`{name}` without `{key}`", f"entry {k}")
    return list(value)


def _others(items: Sequence[Mapping[str, Any]], *used: str) -> dict[str, list[Any]]:
    names = dict.fromkeys(key for item in items for key in item if key not in used)
    return {f"completion_{name}": [item.get(name) for item in items] for name in names}


def _text(value: Any, name: str) -> Text:
    """A text or a list of messages that is not empty."""
    if isinstance(value, str):
        _check_text(value, name)
        return value
    value = _plain(value)
    if isinstance(value, Mapping) and "role" in value:
        value = [value]
    if not isinstance(value, list | tuple):
        raise _BadRow(f"`{name}` is {type_name(value)}, expected text or a list of messages")
    if not value:
        raise _BadRow(f"empty `{name}`")
    return [_message(item, name, k) for k, item in enumerate(value)]


def _check_text(value: str, name: str) -> None:
    if not value.strip():
        raise _BadRow(f"empty `{name}`")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _BadRow(f"`{name}` holds half of a surrogate pair, which no tokenizer takes") from None


def _message(item: Any, name: str, k: int) -> Message:
    """A copy of one message without empty keys, which parquet files have where another row has a value."""
    if not isinstance(item, Mapping):
        raise _BadRow(f"`{name}` holds {type_name(item)}, expected messages with `role` and `content`", f"message {k}")
    message = {key: value for key, value in item.items() if value is not None}
    for key in ("role", "content"):
        if key not in message:
            raise _BadRow(f"`{name}` has a message without `{key}`", f"message {k}")
        if not isinstance(message[key], str):
            raise _BadRow(
                f"`{name}` has a message whose `{key}` is {type_name(message[key])}, expected text", f"message {k}"
            )
    if not message["role"]:
        raise _BadRow(f"`{name}` has a message without `role`", f"message {k}")
    if message["content"] or message["role"] != "system":  # an empty system message says that there is none
        _check_text(message["content"], name)
    return message


def _parsed(prompt: Any, named: Sequence[tuple[str, Any]]) -> _Parsed:
    """A prompt with its completions, all texts or all messages, the completions without the prompt's turns.

    Where one of them is messages the others become messages, too: a text prompt is the user's, a text completion the
    assistant's. Completions that repeat the prompt's turns are cut; beside a text prompt the turns that all of them
    share are the prompt (all but the last turn of a single one), if one of the user's is that text.
    """
    start = _text(prompt, "prompt")
    texts = [(name, _text(value, name)) for name, value in named]
    if isinstance(start, str) and all(isinstance(value, str) for _, value in texts):
        return _Parsed(start, tuple(value for _, value in texts))
    turns = [[{"role": "assistant", "content": v}] if isinstance(v, str) else v for _, v in texts]
    if isinstance(start, str):
        if all(t[0]["role"] == "assistant" for t in turns):
            start = [{"role": "user", "content": start}]
        else:
            shared = turns[0][: _shared(turns)]
            asked = {m["content"].strip() for m in shared if m["role"] == "user"}
            if start.strip() not in asked:
                raise _BadRow("`prompt` is none of the user's turns that the completions begin with")
            start = shared
    if all(len(t) > len(start) and t[: len(start)] == start for t in turns):
        turns = [t[len(start) :] for t in turns]
    _check_answers([name for name, _ in texts], turns)
    return _Parsed(start, tuple(turns))


def _shared(turns: Sequence[Sequence[Any]]) -> int:
    """How many leading items all sequences share, leaving each at least one."""
    least = min(len(t) for t in turns) - 1
    for k in range(least):
        if any(t[k] != turns[0][k] for t in turns):
            return k
    return least


def _check_answers(names: Sequence[str], turns: Sequence[Sequence[Message]]) -> None:
    for name, messages in zip(names, turns, strict=True):
        if messages[0]["role"] != "assistant":
            raise _BadRow(f"`{name}`, without the prompt, does not begin with an `assistant` message")


def _compared(prompt: Any, chosen: tuple[str, Any], rejected: tuple[str, Any]) -> _Parsed:
    """A pair; without a prompt it is the shared beginning."""
    pair = _text(chosen[1], chosen[0]), _text(rejected[1], rejected[0])
    names = chosen[0], rejected[0]
    if pair[0] == pair[1]:
        raise _BadRow(f"`{names[0]}` equals `{names[1]}`" if names[0] != names[1] else f"two equal `{names[0]}`")
    if prompt is not None:
        parsed = _parsed(prompt, list(zip(names, pair, strict=True)))
        if parsed.completions[0] == parsed.completions[1]:  # a text beside the message that holds it
            raise _BadRow(f"`{names[0]}` equals `{names[1]}`")
        return parsed
    if isinstance(pair[0], str) != isinstance(pair[1], str):
        raise _BadRow(f"one of `{names[0]}` and `{names[1]}` is text, the other messages")
    if isinstance(pair[0], str) and isinstance(pair[1], str):
        cut = shared_prefix(pair[0], pair[1])
    else:
        cut = _shared(pair)
    start, answers = pair[0][:cut], (pair[0][cut:], pair[1][cut:])
    if not start or (isinstance(start, str) and not start.strip()):
        raise _BadRow("no `prompt`, and `chosen` and `rejected` begin with nothing in common")
    for name, answer in zip(names, answers, strict=True):
        if isinstance(answer, str) and not answer.strip():
            raise _BadRow(f"empty `{name}` after what `chosen` and `rejected` share")
    if not isinstance(start, str):
        _check_answers(names, [a for a in answers if not isinstance(a, str)])
    return _Parsed(start, answers)


def shared_prefix(a: str, b: str) -> int:
    """Length of the implicit prompt of two texts, the cut of TRL's `extract_prompt`.

    That is their longest common prefix, less a space at its end, which belongs to the completions. If one text begins
    with the other, the shorter keeps its last character.
    """
    least = min(len(a), len(b))
    low, high = 0, least
    while low < high:  # the longest k with a[:k] == b[:k], by bisection
        k = (low + high + 1) // 2
        low, high = (k, high) if a[:k] == b[:k] else (low, k - 1)
    if low == least:
        return max(least - 1, 0)
    return low - 1 if low and a[low - 1] == " " else low


def _scored(
    prompt: Any, name: str, completions: Sequence[Any], score: str, scores: Sequence[Any], counts: Counter[str]
) -> _Parsed:
    if not len(completions):
        raise _BadRow(f"empty `{name}`")
    numbers = tuple(_number(value, score) for value in scores)
    parsed = _parsed(prompt, [(f"{name}[]", value) for value in completions])
    parsed.scores = numbers
    equal = [n for n in Counter(numbers).values() if n > 1]
    counts[TIES] += sum(n * (n - 1) // 2 for n in equal)
    counts[TIED_ROWS] += equal == [len(numbers)]
    repeated = len(parsed.completions) - len({_key(c) for c in parsed.completions})
    if repeated:
        counts["completion equal to another of its prompt"] += repeated
    return parsed


def _key(text: Text) -> str:
    """The same for equal texts or messages, and for them only."""
    return text if isinstance(text, str) else "\0" + _canonical(text)


def _length(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=_jsonable)


def _jsonable(value: Any) -> Any:
    for name in ("isoformat", "tolist"):
        if hasattr(value, name):
            return getattr(value, name)()
    if isinstance(value, bytes | bytearray):
        return value.hex()
    return f"<{type(value).__name__}>"
