"""A run: what surrounds the loop. Its folder, schedules of logging, evaluation and checkpoints, signals, progress.

With several processes every one of them goes through here; the main one alone writes and speaks.

The schedules are functions of the trainer's clock and of `trainer.marks`, which is saved with the run, so a resumed run
logs, evaluates and saves at the same steps as one that was never stopped.

Folder: `config.yaml`, `metrics.jsonl`, `metrics.csv`, `eval.jsonl`, `tb/`, `checkpoints/step-…/`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from rlkit import checkpoint, processes
from rlkit.callbacks import Callbacks
from rlkit.errors import RlkitError, Stopped, UserError
from rlkit.metrics import RunLog
from rlkit.progress import Progress
from rlkit.signals import stop

if TYPE_CHECKING:
    from rlkit.trainer import Trainer


def is_run(folder: Path) -> bool:
    """Whether `folder` holds a run."""
    return any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl", "checkpoints", "manifest.json"))


def refuse_run(folder: Path) -> None:
    """Raise UserError where `folder` already holds a run."""
    if is_run(folder):
        raise UserError(
            f"{folder} already holds a run; go on with it by `rlkit resume {folder}`, or choose another `--out`"
        )


def refuse_foreign(path: Path) -> Path:
    """`path`, unless something else than a checkpoint is there, which saving would replace.

    Raises:
        UserError: there is.
    """
    if path.exists() and not (path / "manifest.json").exists() and (path.is_file() or any(path.iterdir())):
        raise UserError(f"{path} holds something else; choose a new folder")
    return path


def open_folder(folder: Path, config: str) -> None:
    """Make the run folder and write `config.yaml`.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(config, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the run folder {folder}: {error}") from None


class Run:
    """Context manager around one `learn`: use `tick()` after every iteration of the loop.

    Args:
        trainer: its clock, marks and configuration drive the schedules.
        folder: where files go; None keeps records in memory and skips evaluations and checkpoints.
        progress: show a progress bar (a terminal) or lines (a pipe).
        callbacks: have their turn whenever the clock has advanced; False ends the run (from any process). Where
            processes have parts of the state for themselves, those of the main one alone have it.
    """

    def __init__(
        self, trainer: Trainer, folder: Path | None, *, progress: bool = False, callbacks: Callbacks | None = None
    ) -> None:
        self.trainer, self.folder, self.callbacks = trainer, folder, callbacks
        self.processes = trainer.processes
        self.config = trainer.config
        self.finished_by_callback = False
        self._ending = False  # all processes know that this is the end
        shown = progress and self.processes.is_main
        self._progress = Progress(trainer.target, trainer.clock, trainer.counts) if shown else None
        self._saved_at: tuple[int, float] | None = None

    @property
    def stopping(self) -> bool:
        return self._ending or self.processes.vote()

    @property
    def interrupted(self) -> bool:
        """Whether a signal has reached any of the processes."""
        return self.processes.any(stop.requested)

    def __enter__(self) -> Run:
        trainer = self.trainer
        with ExitStack() as undo:  # in the reverse order, if anything below fails
            stop.__enter__()
            undo.callback(stop.__exit__, None, None, None)
            self.processes.listen(lambda: stop.requested or self.finished_by_callback)
            self.processes.together(self._open_log)
            undo.callback(self.log.close)
            self._has_callbacks = self.processes.any(self.callbacks is not None)
            self._began, self._began_at = time.monotonic(), trainer.clock
            if self._progress:
                self._progress.start()
                undo.callback(self._progress.stop)
            trainer.prepare(lambda: stop.requested)
            if trainer.marks["eval"] < 0:
                self._evaluate()
            else:  # a signal may have cut an evaluation short: it belongs to the step that the run was saved at
                self.tick()
            self._turn("start")
            undo.pop_all()
        return self

    def _open_log(self) -> None:
        """The main process's files; others keep records in memory."""
        trainer, main = self.trainer, self.processes.is_main
        self.log = trainer.log = RunLog(
            self.folder if main else None,
            tensorboard=self.config.tensorboard and self.folder is not None and main,
            wandb=self.config.wandb if main else False,
            config=trainer.saved_config(),
            resume_records=trainer.marks["records"],
            resume_eval_records=trainer.marks["eval_records"],
            resume_step=trainer.clock,
        )

    def advanced(self) -> None:
        """Give the callbacks their turn: the clock has moved on."""
        if not self._turn("step"):
            self.finished_by_callback = True
            self._ending = bool(self.trainer.own)

    def _turn(self, what: Literal["start", "step", "end"]) -> bool:
        """Whether the callbacks, where there are any, want to go on."""
        if not self._has_callbacks:
            return True

        def turn() -> bool:
            return self.callbacks is None or getattr(self.callbacks, what)() is not False

        return self.processes.from_main(turn, {"save": self.trainer.save}) if self.trainer.own else turn()

    def tick(self) -> None:
        """Whatever is due at the trainer's clock, once the updates owed for it are made.

        Where updates are the clock, every one of them is a step of its own.
        """
        if self.trainer.owed >= 1 and self.trainer.counts == "env_steps":
            return
        if self._due("log", self.config.log_every):
            self._write_metrics()
        if self._due("eval", self.config.eval_every):
            self._evaluate()
        if self._due("checkpoint", self.config.checkpoint_every) and self.folder is not None:
            self._checkpoint(last=False)
        if self._progress:
            self._progress.update(self.trainer.clock)

    def _due(self, what: str, every: int) -> bool:
        """True once in each multiple of `every` that the clock has reached."""
        mark = self.trainer.clock // every
        due = mark > self.trainer.marks[what]
        if due:
            self.trainer.marks[what] = mark
        return due

    def _write_metrics(self) -> None:
        trainer = self.trainer
        values = trainer.metrics()
        if not values:
            return
        seconds = time.monotonic() - self._began
        done = trainer.clock - self._began_at
        values["time/fps"] = done / seconds if seconds > 0 else 0.0
        values["time/time_elapsed"] = trainer.seconds + seconds
        values["time/total_timesteps"] = trainer.clock
        self.processes.together(lambda: self.log.write(trainer.clock, values))
        trainer.marks["records"] = self.log.records
        trainer.marks["logged_at"] = trainer.clock
        self._saved_at = None  # a checkpoint of this step, written before, is of a run without this record
        if self._progress:
            self._progress.show(trainer.clock, values)

    def _evaluate(self) -> None:
        """Evaluate and record; an evaluation cut short by a signal leaves its mark unset and is done at resume."""
        trainer = self.trainer
        wanted = self.folder is not None and self.config.eval_episodes > 0
        if not wanted or not self.processes.from_main(trainer.can_evaluate):
            trainer.marks["eval"] = max(trainer.marks["eval"], trainer.clock // self.config.eval_every)
            return
        result = trainer.evaluate(self.config.eval_episodes, should_stop=lambda: stop.requested)
        if result is None:
            trainer.marks["eval"] = min(trainer.marks["eval"], trainer.clock // self.config.eval_every - 1)
            self._ending = True  # at this very step, which the evaluation belongs to
            return
        trainer.marks["eval"] = trainer.clock // self.config.eval_every
        trainer.marks["evaluated_at"] = trainer.clock
        record = dict(result)
        self.processes.together(lambda: self.log.write_eval(trainer.clock, record))
        trainer.marks["eval_records"] = self.log.eval_records
        self._saved_at = None
        if self._progress:
            self._progress.show(trainer.clock, {k: v for k, v in result.items() if not isinstance(v, list)})

    def _checkpoint(self, last: bool) -> None:
        """Write a checkpoint; a full disk ends a run only where it would lose the last one."""
        assert self.folder is not None
        trainer = self.trainer
        if self._saved_at == (trainer.clock, trainer.owed):
            return
        trainer.seconds += time.monotonic() - self._began
        self._began, self._began_at = time.monotonic(), trainer.clock
        error = _failure(self.log.sync)
        if not self.processes.any(error is not None):
            place = checkpoint.checkpoint_folder(self.folder, trainer.clock)
            error = _failure(lambda: trainer.write_checkpoint(place))
        failures = [text for text in self.processes.gather(error and str(error)) if text is not None]
        if failures:
            if last:
                raise processes.shared(
                    RlkitError(f"cannot write the last checkpoint of {self.folder}: {failures[0]}")
                ) from error
            self.say(f"cannot write a checkpoint at step {trainer.clock:,} ({failures[0]}); training goes on")
            return
        self._saved_at = (trainer.clock, trainer.owed)
        warning = checkpoint.prune(self.folder, self.config.keep_checkpoints) if self.processes.is_main else None
        if warning:
            self.say(warning)

    def say(self, line: str) -> None:
        """A line for the user, above the progress display where there is one."""
        if self._progress:
            self._progress.say(line)
        else:
            processes.say(line)

    def _finish(self) -> None:
        """The records and the checkpoint of the end, or of a stop by a signal."""
        trainer = self.trainer
        if not self.interrupted:
            if trainer.marks["logged_at"] < trainer.clock:
                self._write_metrics()
            if trainer.marks["evaluated_at"] < trainer.clock:
                self._evaluate()
        if self.folder is not None:
            self._checkpoint(last=True)
        signals = self.processes.gather(stop.signal.name if stop.signal else "")
        if any(signals):
            name = next(filter(None, signals))
            where = (
                f"checkpoint written; go on with `rlkit resume {self.folder}`"
                if self.folder
                else "no run folder, nothing saved"
            )
            raise Stopped(f"stopped by {name} at step {trainer.clock:,}: {where}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._turn("end")
                self._finish()
        finally:
            if self._progress:
                self._progress.stop()
            self.log.close()
            self.processes.listen(lambda: False)
            stop.__exit__(None, None, None)


def _failure(action: Callable[[], Any]) -> OSError | None:
    """What the disk had against `action`."""
    try:
        action()
    except OSError as error:
        return error
    return None


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl` or `eval.jsonl` of a run."""
    from rlkit.metrics import read_jsonl

    path = folder / name
    return read_jsonl(path) if path.exists() else []
