"""What every benchmark shares: the description of machine and versions, CSV files, intervals, Markdown tables."""

from __future__ import annotations

import csv
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The processor's name, as the operating system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def machine(packages: Sequence[str]) -> dict[str, str]:
    """Columns that say where a row was measured: processor, cores, Python and package versions."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "versions": " ".join(f"{name}={version}" for name, version in versions.items()),
    }


def call(file: str, *args: str, threads: int, **environment: str) -> dict[str, Any]:
    """Run a benchmark's `file` in a process of its own; the last line that it prints is the result, in JSON."""
    done = subprocess.run(
        [sys.executable, file, *args], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), **environment},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(args)} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a CSV file, with a header where the file is new."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and both ends of its 95 % Student interval; NaN ends for one value."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return mean, mean - half, mean + half


def interquartile(values: Sequence[float]) -> tuple[float, float, float]:
    """Interquartile mean and both ends of its 95 % bootstrap interval; NaN ends for one value."""
    mean, low, high = differences(values, [0.0])
    return (mean, low, high) if len(values) > 1 else (mean, float("nan"), float("nan"))


def differences(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Interquartile mean of `values` less that of `others`, and its 95 % bootstrap interval: both are resampled."""
    rng = np.random.default_rng(0)
    first, second = resampled(values, rng), resampled(others, rng)
    low, high = np.percentile(first - second, [2.5, 97.5])
    return float(stats.trim_mean(values, 0.25) - stats.trim_mean(others, 0.25)), float(low), float(high)


def ratio(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """The same of the quotient of two positive quantities; NaN ends where a side has one value."""
    quotient = float(stats.trim_mean(values, 0.25) / stats.trim_mean(others, 0.25))
    if min(len(values), len(others)) < 2:
        return quotient, float("nan"), float("nan")
    rng = np.random.default_rng(0)
    first, second = resampled(values, rng), resampled(others, rng)
    low, high = np.percentile(first / second, [2.5, 97.5])
    return quotient, float(low), float(high)


def resampled(values: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """(10,000,) interquartile means of resamples of `values`."""
    drawn = rng.integers(len(values), size=(10_000, len(values)))
    means: np.ndarray = stats.trim_mean(np.asarray(values)[drawn], 0.25, axis=1)
    return means


def runs_of(
    rows: Iterable[Mapping[str, str]], tasks: Iterable[str], sides: Iterable[str]
) -> dict[tuple[str, str], list[Mapping[str, str]]]:
    """(task, side) -> its runs by seed, in the given order of tasks and sides."""
    rows = list(rows)
    found = {}
    for place in itertools.product(tasks, list(sides)):
        runs = [row for row in rows if (row["task"], row["side"]) == place]
        if runs:
            found[place] = sorted(runs, key=lambda run: int(run["seed"]))
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join('---' for _ in header)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
