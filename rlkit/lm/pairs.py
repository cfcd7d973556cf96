"""Pairs to train on from scored completions: best against worst, best against the rest, neighbours, or all.

Pairs are indices, so that a completion that several pairs share is tokenised and scored by the reference once. Ties
carry no preference and give no pair. Everything here is a pure function with a deterministic order: by score from the
best, equal scores by index.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from rlkit.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from rlkit.envs.preferences import Record, TextData

Strategy = Literal["best_vs_worst", "best_vs_rest", "adjacent", "all"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference between two completions of a `TextData`.

    Args:
        record: index in `records` of the chosen completion's record.
        chosen: index of the chosen completion in its record.
        rejected: index of the rejected completion in its record.
        gap: how much better the chosen one is, in units of the scores.
        weight: of the pair in a loss; 1 where the data give none.
        rejected_record: index of the rejected completion's record; another than `record` only for unpaired rows.
    """

    record: int
    chosen: int
    rejected: int
    gap: float
    weight: float
    rejected_record: int


def from_ranked(
    scores: Sequence[float], strategy: Strategy = "best_vs_worst", margin: float = 0.0
) -> list[tuple[int, int, float]]:
    """(chosen, rejected, gap) of K scored completions of one prompt, each with gap = score difference > margin.

    Args:
        scores: K finite numbers, higher is better.
        strategy: "best_vs_worst", one pair; "best_vs_rest", the best against each other one (up to K - 1); "adjacent",
            neighbours in the order of scores (up to K - 1); "all", K (K - 1) / 2 at most.
        margin: gaps up to and including this give no pair.

    Raises:
        UserError: an unknown strategy, a negative margin, a score that is not finite.
    """
    _check(strategy, margin)
    values = [float(score) for score in scores]
    for i, value in enumerate(values):
        if not math.isfinite(value):
            raise UserError(f"scores: {value} at {i} is not finite")
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    if strategy == "all":
        candidates = list(itertools.combinations(order, 2))
    elif strategy == "adjacent":
        candidates = list(itertools.pairwise(order))
    else:
        candidates = [(order[0], i) for i in order[1:]]
        if strategy == "best_vs_worst" and candidates:
            worst = min(range(len(values)), key=lambda i: (values[i], i))
            candidates = [(order[0], worst)]
    found = [(i, j, values[i] - values[j]) for i, j in candidates]
    return [pair for pair in found if pair[2] > margin]


def from_matrix(p: Any, margin: float = 0.0) -> list[tuple[int, int, float]]:
    """(winner, loser, gap) of every two of K completions by a judge's preferences, which may be intransitive.

    Args:
        p: (K, K) array or nested lists, `p[i][j]` = P(i beats j) with `p[i][j] + p[j][i]` = 1; the diagonal is not
            read.
        margin: gaps up to and including this give no pair.

    Returns:
        Pairs in the order (0, 1), (0, 2), ..., (K-2, K-1), each with gap = p[winner][loser] - p[loser][winner] in
        (margin, 1]. For a judge whose preferences are logistic in scores this orders pairs as score gaps do.

    Raises:
        UserError: not square, a value outside [0, 1], entries that do not add up to 1, a negative margin.
    """
    _check("all", margin)
    rows = [[float(value) for value in row] for row in p]
    size = len(rows)
    if any(len(row) != size for row in rows):
        raise UserError(f"preference matrix: rows of {sorted({len(row) for row in rows})} entries, expected {size}")
    out = []
    for i, j in itertools.combinations(range(size), 2):
        if not (0.0 <= rows[i][j] <= 1.0 and 0.0 <= rows[j][i] <= 1.0):
            raise UserError(f"preference matrix: [{i}][{j}] or [{j}][{i}] is no probability")
        if abs(rows[i][j] + rows[j][i] - 1.0) > 1e-6:
            raise UserError(f"preference matrix: [{i}][{j}] + [{j}][{i}] = {rows[i][j] + rows[j][i]:g}, expected 1")
        gap = rows[i][j] - rows[j][i]
        if abs(gap) > margin:
            out.append((i, j, gap) if gap > 0 else (j, i, -gap))
    return out


def from_labels(labels: Sequence[bool]) -> list[tuple[int, int, float]]:
    """(true, false, 1.0) for every true against every false completion of one prompt, by index."""
    good = [i for i, label in enumerate(labels) if label]
    bad = [i for i, label in enumerate(labels) if not label]
    return [(i, j, 1.0) for i in good for j in bad]


def pairs_of(data: TextData, strategy: Strategy = "best_vs_worst", margin: float = 0.0) -> list[Pair]:
    """The pairs of a data set, in the order of its records.

    - "pairs": one a record, whatever the strategy. Its gap is the column `margin`, else `score_chosen` -
      `score_rejected`, else 1. A pair that the data state is kept at any gap unless `margin` is above 0.
    - "ranked": `from_ranked` of each record.
    - "unpaired": rows with the same prompt are completions with the scores 1 (true) and 0 (false), to which the
      strategy applies ("all": `from_labels`). Groups stand where their first row does; a pair's weight is the product
      of its rows'.

    Raises:
        UserError: a kind without preferences, one label only, weights that are all 0, or nothing left.
    """
    _check(strategy, margin)
    if data.kind == "pairs":
        found = _stated(data.records, margin)
    elif data.kind == "ranked":
        found = [
            Pair(n, i, j, gap, _weight(record), n)
            for n, record in enumerate(data.records)
            for i, j, gap in from_ranked(record.scores or (), strategy, margin)
        ]
    elif data.kind == "unpaired":
        found = _grouped(data, strategy, margin)
    else:
        raise UserError(
            f"{data.name}: no pairs in `{data.report.format}`; needs `prompt, chosen, rejected`, "
            "`prompt, completions[], scores[]` or `prompt, completion, label` (name other columns with `--map`)"
        )
    if not found:
        raise UserError(
            f"{data.name}: no pairs; in {len(data.records):,} records no gap is above {margin:g}: pairs need "
            "completions of different scores" + (" (or a smaller `pairing_margin`)" if margin else "")
        )
    if not any(pair.weight for pair in found):
        raise UserError(
            f"{data.name}: the `weight` of all {len(found):,} pairs is 0, so nothing would be learned; give positive "
            "ones, or none"
        )
    return found


def _stated(records: Sequence[Record], margin: float) -> list[Pair]:
    found = [Pair(n, 0, 1, _gap(record), _weight(record), n) for n, record in enumerate(records)]
    return [pair for pair in found if margin == 0 or pair.gap > margin]


def _gap(record: Record) -> float:
    columns = record.columns
    if columns.get("margin") is not None:
        return float(columns["margin"])
    scores = [columns.get("score_chosen"), columns.get("score_rejected")]
    if all(isinstance(s, int | float) and not isinstance(s, bool) and math.isfinite(s) for s in scores):
        return float(columns["score_chosen"]) - float(columns["score_rejected"])
    return 1.0


def _grouped(data: TextData, strategy: Strategy, margin: float) -> list[Pair]:
    from rlkit.envs.preferences import check_labels

    labels = [bool(record.label) for record in data.records]
    check_labels(labels, data.name)
    groups: dict[str, list[int]] = {}
    for n, record in enumerate(data.records):
        groups.setdefault(json.dumps(record.prompt, sort_keys=True, default=repr), []).append(n)
    out = []
    for rows in groups.values():
        for i, j, gap in from_ranked([float(labels[n]) for n in rows], strategy, margin):
            chosen, rejected = rows[i], rows[j]
            weight = _weight(data.records[chosen]) * _weight(data.records[rejected])
            out.append(Pair(chosen, 0, 0, gap, weight, rejected))
    if not out:
        raise UserError(
            f"{data.name}: no pairs; none of {len(groups):,} prompts has completions of both labels"
            f"{f' with a gap above {margin:g}' if margin else ''}; a pair needs one true and one false of a prompt"
        )
    return out


def _weight(record: Record) -> float:
    value = record.columns.get("weight")
    return 1.0 if value is None else float(value)


def _check(strategy: str, margin: float) -> None:
    if strategy not in STRATEGIES:
        raise UserError(f"strategy: unknown `{strategy}`{did_you_mean(strategy, STRATEGIES)}")
    if not margin >= 0 or math.isinf(margin):
        raise UserError(f"margin: {margin} is not a number >= 0")
