"""Metrics: means over a log interval without waiting for the device, and the files that keep them.

`Meter` collects what updates return, `RunLog` writes it down. Of a run folder it owns:

| file | content |
|---|---|
| `metrics.jsonl` | one object a log step, `step` first, then keys as SB3's or TRL's; the source of truth |
| `metrics.csv` | the same as a table (empty cell: not recorded at that step) |
| `eval.jsonl` | one object an evaluation |
| `tb/` | TensorBoard events, where asked for |
| `wandb.json` | which W&B run this is, where asked for |

What is not finite stays so: `NaN`, `Infinity` and `-Infinity` in JSONL (as Python's `json` reads and writes them),
`nan` and `inf` in CSV. An error while writing these files is raised. TensorBoard and W&B only ever follow: they run in
a thread of their own, and one that raises, hangs or falls behind is reported once and left alone.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import io
import json
import netrc
import os
import queue
import secrets
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import torch
from torch import Tensor

from rlkit.errors import UserError

HISTORY = 10_000  # records kept in memory
_BACKLOG = 10_000  # records that a slow tracker may be behind
_PATIENCE = 30.0  # seconds that `close` waits for a tracker


class Meter:
    """Means of named values over a log interval.

    Scalar tensors are summed on their device, in float64 (float32 on MPS, which has nothing wider), and copied at
    `means` only, all at once. A NaN makes its mean NaN.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        # Tensors that arrive together are summed as one vector: names -> [(n,) sums, count].
        self._sums: dict[tuple[str, ...], tuple[Tensor, int]] = {}
        self._numbers: dict[str, tuple[float, int]] = {}
        self._last: dict[str, Tensor | float] = {}
        self._order: dict[str, None] = {}

    def accumulate(self, values: Mapping[str, Tensor | float]) -> None:
        """Add one value of each name; tensors have one element.

        Raises:
            UserError: a tensor with more elements.
        """
        by_device: dict[torch.device, dict[str, Tensor]] = {}
        for name, value in values.items():
            self._order.setdefault(name)
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise UserError(f"metric {name!r} must be one number, got a tensor of shape {tuple(value.shape)}")
                by_device.setdefault(value.device, {})[name] = value
            else:
                total, count = self._numbers.get(name, (0.0, 0))
                self._numbers[name] = (total + float(value), count + 1)
        for device, tensors in by_device.items():
            self._add(device, tensors)

    @torch.no_grad()
    def _add(self, device: torch.device, tensors: Mapping[str, Tensor]) -> None:
        # `stack` copies: a compiled update may overwrite its outputs at the next call.
        row = torch.stack([value if value.ndim == 0 else value.reshape(()) for value in tensors.values()])
        dtype = torch.float32 if device.type == "mps" else torch.float64
        names = tuple(tensors)
        if names in self._sums:
            sums, count = self._sums[names]
            self._sums[names] = (sums.to(device, dtype).add_(row), count + 1)
        else:
            self._sums[names] = (row.to(dtype), 1)

    def last(self, name: str, value: Tensor | float) -> None:
        """Record a value of which the last one counts, such as a learning rate or a counter."""
        self._order.setdefault(name)
        self._last[name] = value.detach().clone() if isinstance(value, Tensor) else value

    def means(self) -> dict[str, float]:
        """The means (and last values) since the last call, in order of first appearance; then starts anew."""
        totals, counts = self._totals()
        values = {name: totals[name] / counts[name] for name in totals}
        values.update((name, v.item() if isinstance(v, Tensor) else v) for name, v in self._last.items())
        ordered = {name: values[name] for name in self._order}
        self._reset()
        return ordered

    def _totals(self) -> tuple[dict[str, float], dict[str, int]]:
        totals = {name: total for name, (total, _) in self._numbers.items()}
        counts = {name: count for name, (_, count) in self._numbers.items()}
        for names, (sums, count) in self._sums.items():
            for name, total in zip(names, sums.tolist(), strict=True):
                totals[name] = totals.get(name, 0.0) + total
                counts[name] = counts.get(name, 0) + count
        return totals, counts

    def state_dict(self) -> dict[str, Any]:
        """The interval so far: a resumed run logs the same means, to the last bit."""
        return {
            "sums": [[list(names), sums.cpu().clone(), count] for names, (sums, count) in self._sums.items()],
            "numbers": {name: list(pair) for name, pair in self._numbers.items()},
            "last": {name: v.cpu() if isinstance(v, Tensor) else v for name, v in self._last.items()},
            "order": list(self._order),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = {tuple(names): (sums.clone(), count) for names, sums, count in state["sums"]}
        self._numbers = {name: (total, count) for name, (total, count) in state["numbers"].items()}
        self._last = dict(state["last"])
        self._order = dict.fromkeys(state["order"])


class RunLog:
    """The metric files of a run, and its trackers.

    Args:
        folder: the run folder; None keeps records in memory only (`history`), and TensorBoard is not written.
        tensorboard: write `folder/tb`.
        wandb: log to Weights & Biases, under this project name if it is a text. Without an API key, or with
            `WANDB_MODE=offline`, it logs offline; it never asks for a login.
        config: the run's configuration, for W&B.
        resume_records: records of `metrics.jsonl` to keep; the rest was written after the checkpoint that is resumed
            from. None keeps all of them.
        resume_eval_records: the same for `eval.jsonl`.
        resume_step: the step of that checkpoint; TensorBoard hides what it has after it.

    Raises:
        UserError: W&B is not installed, or a line of a metrics file is not JSON.
        OSError: the files cannot be written; also from `write` and `write_eval`.
    """

    def __init__(
        self,
        folder: Path | None,
        tensorboard: bool = False,
        wandb: bool | str = False,
        config: Mapping[str, Any] | None = None,
        resume_records: int | None = None,
        resume_eval_records: int | None = None,
        resume_step: int | None = None,
    ) -> None:
        self._history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self._eval_history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self._trackers: list[_Tracker] = []
        self._columns: list[str] = ["step"]
        self._csv: BinaryIO | None = None
        self._metrics = self._evals = None
        self.records = self.eval_records = 0
        self.folder = folder
        if wandb:  # first: it may not be installed
            project = wandb if isinstance(wandb, str) else "rlkit"
            self._trackers.append(_Tracker("W&B", "wandb", _wandb(folder, project, dict(config or {}))))
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics, self.records = _reopen(folder / "metrics.jsonl", resume_records, self._history)
        self._evals, self.eval_records = _reopen(folder / "eval.jsonl", resume_eval_records, self._eval_history)
        self._rewrite_csv()
        if tensorboard:
            fresh = self.records == self.eval_records == 0
            purge = None if resume_step is None else 0 if fresh else resume_step + 1
            open_it = _tensorboard(folder / "tb", purge)
            self._trackers.append(_Tracker("TensorBoard", "torch.utils.tensorboard", open_it))

    @property
    def history(self) -> list[dict[str, Any]]:
        """The last 10,000 records of `write`, oldest first."""
        return list(self._history)

    @property
    def eval_history(self) -> list[dict[str, Any]]:
        """The last 10,000 records of `write_eval`, oldest first."""
        return list(self._eval_history)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a record to `metrics.jsonl` and `metrics.csv`; it is handed to the system before this returns."""
        record = _record(step, values)
        if self._metrics is not None:
            _append(self._metrics, _line(record))
            if any(key not in self._columns for key in record):
                self._rewrite_csv()  # the header grows
            elif self._csv is not None:
                _append(self._csv, _row([_cell(record.get(key)) for key in self._columns]))
        self.records += 1
        self._history.append(record)
        self._track(step, record)

    def write_eval(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a record to `eval.jsonl`; values may be lists too. Trackers get the numbers."""
        record = _record(step, values)
        if self._evals is not None:
            _append(self._evals, _line(record))
        self.eval_records += 1
        self._eval_history.append(record)
        self._track(step, record)

    def _track(self, step: int, record: Mapping[str, Any]) -> None:
        if self._trackers:
            scalars = {k: v for k, v in record.items() if k != "step" and isinstance(v, (int, float))}
            for tracker in self._trackers:
                tracker.put(step, scalars)

    def _rewrite_csv(self) -> None:
        """Make `metrics.csv` anew from `metrics.jsonl`: columns in order of first appearance, replaced in one go."""
        if self.folder is None:
            return
        path = self.folder / "metrics.csv"
        columns: dict[str, None] = {"step": None}
        for _, record in _lines(self.folder / "metrics.jsonl"):
            columns.update(dict.fromkeys(record))
        self._columns = list(columns)
        if self._csv is not None:
            self._csv.close()
        temp = path.with_name("metrics.csv.tmp")
        with temp.open("wb") as file:
            file.write(_row(self._columns))
            for _, record in _lines(self.folder / "metrics.jsonl"):
                file.write(_row([_cell(record.get(key)) for key in self._columns]))
        temp.replace(path)
        self._csv = path.open("ab", buffering=0)

    def sync(self) -> None:
        """Wait until the disk has the records; before a checkpoint that counts them, for the sake of power cuts."""
        for file in (self._metrics, self._evals):
            if file is not None:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Close files and trackers; waits a limited time for the latter. May be called twice."""
        for file in (self._metrics, self._evals, self._csv):
            if file is not None:
                file.close()
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []


# --- files ---------------------------------------------------------------------------------------------------------


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; a last line that a kill cut short is left out.

    Raises:
        UserError: another line is not a JSON object.
    """
    return [record for _, record in _lines(Path(path))]


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(end in bytes, record) of each whole record."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            end += len(line)
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                if not line.endswith(b"\n"):  # only the last one can be without
                    return
                raise UserError(f"{path}, line {number}: not a JSON object ({error}); repair or remove it") from None
            yield end, record


def _reopen(path: Path, keep: int | None, history: deque[dict[str, Any]]) -> tuple[BinaryIO, int]:
    """Cut the file back to `keep` records, put them into `history`; -> (file to append to, records)."""
    path.touch()
    end = count = 0
    for end, record in islice(_lines(path), keep):  # noqa: B007 (`end` is used below)
        count += 1
        history.append(record)
    if keep is not None and count < keep:
        print(f"{path} has {count} of the {keep} records that the checkpoint knows of; going on", file=sys.stderr)
    file = path.open("r+b", buffering=0)
    file.truncate(end)
    if end:
        file.seek(end - 1)
        if file.read(1) != b"\n":  # a last record that lost its end of line
            _append(file, b"\n")
    return file, count


def _append(file: BinaryIO, data: bytes) -> None:
    """Write to the end of an unbuffered file: all of `data`, or nothing and an OSError."""
    start = file.seek(0, os.SEEK_END)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        with suppress(OSError):
            file.truncate(start)
        raise


def _record(step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as JSON values, `step` first."""
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
    return {"step": int(step), **{name: value for name, value in plain.items() if name != "step"}}


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _row(cells: list[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


# --- trackers ------------------------------------------------------------------------------------------------------

Log = Callable[[int, dict[str, float]], None]
Close = Callable[[], None]


class _Tracker:
    """Feeds a tracker from a thread. Whatever goes wrong there is said once, and ends it.

    Args:
        module: imported before the thread starts, because two threads that import at once can see half of a module.
        open_it: called in the thread; returns (log, close).
    """

    def __init__(self, name: str, module: str, open_it: Callable[[], tuple[Log, Close]]) -> None:
        self.name, self._module, self._open = name, module, open_it
        self._queue: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(_BACKLOG)
        self._off = False
        self._thread = threading.Thread(target=self._run, name=f"rlkit {name}", daemon=True)
        self._started = False

    def put(self, step: int, values: dict[str, float]) -> None:
        """Hand over a record; never waits."""
        if self._off:
            return
        try:
            if not self._started:
                importlib.import_module(self._module)
                self._thread.start()
                self._started = True
            self._queue.put_nowait((step, values))
        except queue.Full:
            self._switch_off(f"it is {_BACKLOG:,} records behind")
        except Exception as error:
            self._switch_off(f"{type(error).__name__}: {error}")

    def _run(self) -> None:
        try:
            log, close = self._open()
            while (item := self._queue.get()) is not None and not self._off:
                log(*item)
            close()
        except BaseException as error:  # SystemExit too: no tracker ends a run
            self._switch_off(f"{type(error).__name__}: {error}")

    def _switch_off(self, why: str) -> None:
        if not self._off:
            self._off = True
            print(f"{self.name} is switched off for this run ({why}); the local files are complete", file=sys.stderr)

    def close(self) -> None:
        if not self._started:
            return
        with suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(0.0 if self._off else _PATIENCE)
        if self._thread.is_alive():
            self._switch_off(f"it did not finish within {_PATIENCE:.0f} s")


def _tensorboard(folder: Path, purge_step: int | None) -> Callable[[], tuple[Log, Close]]:
    def open_it() -> tuple[Log, Close]:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder), purge_step=purge_step if folder.exists() else None)

        def log(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        return log, writer.close

    return open_it


def require_wandb() -> None:
    """Raise UserError, with the install command, where the extra `wandb` is absent."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError('wandb is not installed; run: pip install "rlkit-trainers[wandb]"')


def _wandb(folder: Path | None, project: str, config: dict[str, Any]) -> Callable[[], tuple[Log, Close]]:
    require_wandb()
    run = {"id": secrets.token_hex(4), "project": project}  # not from the run's random streams
    if folder is not None:
        path = folder / "wandb.json"
        if path.exists():  # a resumed run goes on in the same W&B run
            run = {**run, **json.loads(path.read_text())}
        else:
            folder.mkdir(parents=True, exist_ok=True)
            temp = path.with_name("wandb.json.tmp")
            temp.write_text(json.dumps(run) + "\n")
            temp.replace(path)

    def open_it() -> tuple[Log, Close]:
        import wandb

        mode = _wandb_mode()
        session = wandb.init(
            id=run["id"],
            project=run["project"],
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=None if folder is None else str(folder),
            name=None if folder is None else folder.name,
            config=config,
            settings=wandb.Settings(console="off"),  # leave the standard streams alone
        )
        return lambda step, values: session.log(values, step=step), session.finish

    return open_it


def _wandb_mode() -> Any:
    """`WANDB_MODE`, or online where a key is there, so that W&B never asks for one."""
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "disabled", "dryrun"):
        return "offline" if mode == "dryrun" else mode
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return "online"
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    for place in [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]:
        with suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            if netrc.netrc(Path(place).expanduser()).authenticators(host):
                return "online"
    print("W&B: no API key found, logging offline (`wandb sync` uploads it later)", file=sys.stderr)
    return "offline"
