"""Learning curves from run folders, and returns over a parameter of the environment.

Of learning curves one panel a task; in it one curve for each group of runs of the same trainer and preset. A group of
one run shows its evaluations; several runs show their mean with the 95 % Student interval over runs, at the steps that
all of them evaluated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from rlkit.config import load_file
from rlkit.errors import UserError
from rlkit.run import records

Curve = tuple[np.ndarray, np.ndarray]

SOURCES = (
    ("eval.jsonl", "eval/mean_reward", "return", "evaluation"),
    ("metrics.jsonl", "rollout/ep_rew_mean", "return", "training return"),
    ("eval.jsonl", "eval_reward", "reward of sampled completions", "evaluation"),
    ("eval.jsonl", "eval_rewards/accuracies", "accuracy on held-out pairs", "evaluation"),
    ("eval.jsonl", "eval_accuracy", "accuracy on held-out pairs", "evaluation"),
    ("eval.jsonl", "eval_loss", "loss", "evaluation"),
    ("metrics.jsonl", "loss", "loss", "training loss"),
)
"""(file, key, axis, kind) of what is drawn: the first of them that a run has two records of."""


def curve(run: Path) -> tuple[str, str, Curve]:
    """Axis, kind and (steps, values) of a run: evaluations if there are two or more, else what training recorded.

    Raises:
        UserError: the run has nothing to draw yet.
    """
    for name, key, axis, kind in SOURCES:
        points = [(r["step"], r[key]) for r in records(run, name) if key in r]
        if len(points) >= 2:
            steps, values = np.array(points, dtype=float).T
            return axis, kind, (steps, values)
    keys = ", ".join(key for _, key, _, _ in SOURCES)
    raise UserError(f"{run} has nothing to draw yet: no two records with any of {keys}")


def mean_interval(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Common steps, mean, and both ends of the 95 % Student interval over runs (NaN for one run)."""
    steps = sorted(set.intersection(*(set(s.tolist()) for s, _ in curves)))
    if not steps:
        raise UserError("the runs have no evaluation step in common; give them the same `eval_every`")
    table = np.array([[dict(zip(s.tolist(), v.tolist(), strict=True))[t] for t in steps] for s, v in curves])
    n, mean = len(curves), table.mean(0)
    half = stats.t.ppf(0.975, n - 1) * table.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.full(len(steps), np.nan)
    return np.array(steps), mean, mean - half, mean + half


def group(run: Path) -> tuple[str, str]:
    """(task, label) that decide the panel and the curve of a run.

    Raises:
        UserError: the folder holds no run.
    """
    if not (run / "config.yaml").exists():
        raise UserError(f"{run} is not a run folder: it has no config.yaml")
    config = load_file(run / "config.yaml")
    label = str(config.get("trainer", "?"))
    if config.get("preset") not in (None, "auto"):
        label += f" ({config['preset']})"
    return str(config.get("env") or Path(str(config.get("data") or "task")).name), label


def plot(runs: Sequence[Path], out: Path) -> Path:
    """Draw the learning curves of `runs` into the image `out`.

    Raises:
        UserError: no runs, runs that cannot be drawn together, or an image that cannot be written.
    """
    if not runs:
        raise UserError("no runs to draw")
    panels: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        task, label = group(run)
        panels[task][label].append(run)
    figure = Figure(figsize=(6.4 * len(panels), 4.2))
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (task, groups) in zip(axes[0], panels.items(), strict=True):
        curves = {label: [curve(run) for run in members] for label, members in groups.items()}
        labels = {what for members in curves.values() for what, _, _ in members}
        if len(labels) > 1:
            raise UserError(
                f"the runs on {task} have no figure in common ({', '.join(sorted(labels))}); draw them apart"
            )
        for label, members in curves.items():
            _draw(axis, label, [(kind, values) for _, kind, values in members])
        axis.set(title=task, xlabel="environment steps" if labels == {"return"} else "steps", ylabel=labels.pop())
        axis.grid(alpha=0.3)
        axis.legend(loc="best", frameon=False)
    return _save(figure, out)


def plot_sweep(
    name: str,
    points: Sequence[tuple[float, float, float, float]],
    out: Path,
    *,
    title: str,
    episodes: int,
    nominal: float | None = None,
) -> Path:
    """Draw mean returns with their 95 % intervals against a parameter into the image `out`.

    Args:
        name: of the parameter, the horizontal axis.
        points: value, mean, both ends of the interval (NaN for one episode).
        nominal: where the dynamics are unperturbed, a vertical line; None draws none.

    Raises:
        UserError: an image that cannot be written.
    """
    figure = Figure(figsize=(6.4, 4.2))
    axis = figure.subplots()
    values, mean, low, high = np.array(sorted(points), dtype=float).T
    what = f"mean of {episodes} episodes, 95 % interval" if episodes > 1 else "one episode (n=1)"
    axis.errorbar(values, mean, [mean - low, high - mean], marker="o", markersize=3, capsize=3, label=what)
    if nominal is not None and values[0] <= nominal <= values[-1]:
        axis.axvline(nominal, color="gray", linestyle=":", label="unperturbed")
    axis.set(title=title, xlabel=name, ylabel="return")
    axis.grid(alpha=0.3)
    axis.legend(loc="best", frameon=False)
    return _save(figure, out)


def _save(figure: Figure, out: Path) -> Path:
    figure.tight_layout()
    try:
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {out}: {error}") from None
    return out


def _draw(axis: Any, label: str, labelled: Sequence[tuple[str, Curve]]) -> None:
    curves = [values for _, values in labelled]
    kinds = {kind for kind, _ in labelled}
    if len(kinds) > 1:
        raise UserError(f"some runs of {label} have evaluations and others only training records; draw them apart")
    (what,) = kinds
    steps, mean, low, high = mean_interval(curves)
    n = len(curves)
    name = f"{label}, {what}" + (f", mean of {n} runs, 95 % interval" if n > 1 else " (n=1)")
    (line,) = axis.plot(steps, mean, marker="o" if n == 1 else None, markersize=3, label=name)
    if n > 1:
        axis.fill_between(steps, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
