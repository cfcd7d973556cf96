"""Progress for people: a live bar on a terminal, a line a record in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SHOWN = {
    "rollout/ep_rew_mean": "return",
    "eval/mean_reward": "evaluation",
    "time/fps": "steps/s",
    "train/critic_loss": "critic",
    "train/actor_loss": "actor",
    "train/ent_coef": "alpha",
    "loss": "loss",
    "eval_loss": "held-out loss",
    "eval_accuracy": "accuracy",
    "eval_rewards/accuracies": "accuracy",
    "eval_reward": "reward",
}


class Progress:
    """Shows a run's clock and its newest metrics on standard output.

    Args:
        total: the clock at the end.
        done: the clock now.
        unit: what the clock counts.
    """

    def __init__(self, total: int, done: int, unit: str) -> None:
        self._console = Console(highlight=False)
        self._live = self._console.is_terminal
        self._unit, self._total, self._done = unit.replace("_", " "), total, done
        self._latest: dict[str, str] = {}
        self._bar = Bar(
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn(self._unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=self._console,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("", total=total, completed=done, metrics="")

    def start(self) -> None:
        if self._live:
            self._bar.start()

    def stop(self) -> None:
        if self._live:
            self._bar.update(self._task, completed=self._done)
            self._bar.stop()

    def update(self, clock: int) -> None:
        if clock == self._done:
            return
        self._done = clock
        if self._live:
            self._bar.update(self._task, completed=clock)

    def show(self, clock: int, values: Mapping[str, Any]) -> None:
        """The newest values of a record."""
        news = {SHOWN[k]: f"{v:.4g}" if abs(v) < 1e4 else f"{v:,.0f}" for k, v in values.items() if k in SHOWN}
        self._latest.update(news)
        if self._live:
            text = "  ".join(f"{k} {v}" for k, v in self._latest.items())
            self._bar.update(self._task, metrics=text, completed=clock)
        else:
            text = "  ".join(f"{k} {v}" for k, v in news.items())
            print(f"step {clock:,}/{self._total:,}  {text}", flush=True)

    def say(self, line: str) -> None:
        if self._live:
            self._bar.console.print(line)
        else:
            print(line, file=sys.stderr, flush=True)


class Phase:
    """Lines about a long phase before or beside the updates, one every few seconds: `sampling: 1,280 of 8,000 rows`.

    A phase that is over sooner is not mentioned.

    Args:
        what: the phase.
        unit: what it counts.
        say: takes a line.
        seconds: between lines.
        clock: tells the time in seconds.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        say: Callable[[str], None],
        seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._text, self._say, self._seconds, self._clock = f"{what}: {{:,}} of {{:,}} {unit}", say, seconds, clock
        self._next = clock() + seconds

    def __call__(self, done: int, total: int) -> None:
        if done < total and self._clock() >= self._next:
            self._next = self._clock() + self._seconds
            self._say(self._text.format(done, total))
