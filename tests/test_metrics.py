"""Metrics: means that keep NaN, files that agree with each other, resumes that cut back, trackers that may fail."""

from __future__ import annotations

import csv
import json
import math
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlkit import checkpoint, metrics
from rlkit.errors import UserError
from rlkit.metrics import Meter, RunLog, read_jsonl

# --- Meter ---------------------------------------------------------------------------------------------------------


def test_means_over_the_interval_and_a_fresh_start() -> None:
    meter = Meter()
    for i in range(1, 5):
        meter.accumulate({"loss": torch.tensor(float(i)), "entropy": i * 10.0})
    meter.accumulate({"loss": torch.tensor([10.0]), "rare": torch.tensor(3, dtype=torch.int64)})
    meter.last("train/learning_rate", 3e-4)
    meter.last("train/learning_rate", 2e-4)
    meter.last("train/n_updates", 5)
    means = meter.means()
    # loss: (1 + 2 + 3 + 4 + 10) / 5; entropy: 100 / 4; each over the times it was seen
    assert means == {"loss": 4.0, "entropy": 25.0, "rare": 3.0, "train/learning_rate": 2e-4, "train/n_updates": 5}
    assert list(means) == ["loss", "entropy", "rare", "train/learning_rate", "train/n_updates"]
    assert type(means["train/n_updates"]) is int
    assert meter.means() == {}


def test_nan_and_infinity_are_not_averaged_away() -> None:
    meter = Meter()
    for value in (1.0, math.nan, 2.0):
        meter.accumulate({"tensor": torch.tensor(value), "number": value, "fine": torch.tensor(1.0)})
    meter.accumulate({"inf": torch.tensor(math.inf)})
    meter.accumulate({"inf": torch.tensor(1.0)})
    means = meter.means()
    assert math.isnan(means["tensor"])
    assert math.isnan(means["number"])
    assert means["fine"] == 1.0
    assert means["inf"] == math.inf


def test_sums_are_float64_and_keep_no_graph() -> None:
    meter = Meter()
    weight = torch.ones((), requires_grad=True)
    for _ in range(3000):
        meter.accumulate({"x": weight * 0.1 + 1e4, "half": torch.tensor(0.1, dtype=torch.bfloat16)})
    # float32 sums of 3000 values of 1e4 would be wrong in the third decimal; the mean of equal values is the value
    means = meter.means()
    assert means["x"] == pytest.approx(float(torch.tensor(1e4 + 0.1)), rel=1e-12)
    assert means["half"] == pytest.approx(float(torch.tensor(0.1, dtype=torch.bfloat16)), rel=1e-12)
    assert weight.grad is None


def test_values_are_copied_when_they_arrive() -> None:
    meter, reused = Meter(), torch.zeros((), dtype=torch.float64)
    meter.last("last", reused)
    for i in range(4):
        reused.fill_(i)  # as a compiled update does with its outputs
        meter.accumulate({"x": reused})
    assert meter.means() == {"last": 0.0, "x": 1.5}


def test_a_metric_is_one_number() -> None:
    with pytest.raises(UserError, match=r"metric 'loss' must be one number, got a tensor of shape \(2,\)"):
        Meter().accumulate({"loss": torch.zeros(2)})


def test_a_meter_resumes_in_the_middle_of_an_interval(tmp_path: Path) -> None:
    values = torch.rand(20, generator=torch.Generator().manual_seed(0)).tolist()
    whole, first, second = Meter(), Meter(), Meter()
    for i, value in enumerate(values):
        given = {"a": torch.tensor(value), "b": value, **({"c": torch.tensor(value)} if i % 3 else {})}
        whole.accumulate(given)
        whole.last("lr", torch.tensor(value))
        (first if i < 11 else second).accumulate(given)
        (first if i < 11 else second).last("lr", torch.tensor(value))
        if i == 10:
            checkpoint.save(tmp_path / "c", {"meter": first.state_dict()}, about={})
            second.load_state_dict(checkpoint.load(tmp_path / "c")[0]["meter"])
            assert first.means()["a"] == pytest.approx(sum(values[:11]) / 11)
    assert list(second.means().items()) == list(whole.means().items())  # to the last bit


# --- RunLog --------------------------------------------------------------------------------------------------------


def table(folder: Path) -> list[dict[str, float]]:
    """The CSV as records, empty cells left out."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]


def agree(a: list[dict[str, float]], b: list[dict[str, float]]) -> bool:
    return json.dumps(a) == json.dumps([{k: float(v) for k, v in record.items()} for record in b])


def write_some(log: RunLog, first: int, last: int) -> None:
    for i in range(first, last):
        values: dict[str, Any] = {"train/loss": 1 / (i + 1), "time/total_timesteps": 10 * i}
        if i >= 2:  # a column that comes later
            values["rollout/ep_rew_mean"] = torch.tensor(i / 3)
        if i == 3:
            values["train/loss"] = math.nan
        log.write(10 * i, values)
        if i % 2 == 0:
            log.write_eval(10 * i, {"eval/mean_reward": np.float64(i), "returns": [1.0, float(i)]})


def test_jsonl_and_csv_hold_the_same_records(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run")
    for i in range(1, 6):
        write_some(log, i - 1, i)
        assert agree(table(tmp_path / "run"), read_jsonl(tmp_path / "run" / "metrics.jsonl"))  # at all times
    log.close()
    log.close()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == '{"step": 0, "train/loss": 1.0, "time/total_timesteps": 0}'
    assert '"train/loss": NaN' in lines[3]
    header, *rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert header == "step,train/loss,time/total_timesteps,rollout/ep_rew_mean"
    assert rows[0] == "0,1.0,0,"
    assert rows[3] == "30,nan,30,1.0"
    assert read_jsonl(tmp_path / "run" / "eval.jsonl")[1] == {
        "step": 20,
        "eval/mean_reward": 2.0,
        "returns": [1.0, 2.0],
    }
    assert log.history == read_jsonl(tmp_path / "run" / "metrics.jsonl") or math.isnan(log.history[3]["train/loss"])
    assert (log.records, log.eval_records) == (5, 3)


def contents(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in ("metrics.jsonl", "metrics.csv", "eval.jsonl")}


@pytest.mark.parametrize("tail", [b"", b'{"step": 70, "tra', b'{"step": 70}', b"\0\0\0\0", b"garbage\n{}\n"])
def test_a_resumed_run_has_the_files_of_an_uninterrupted_one(tmp_path: Path, tail: bytes) -> None:
    whole = RunLog(tmp_path / "whole")
    write_some(whole, 0, 9)
    whole.close()
    part = RunLog(tmp_path / "part")
    write_some(part, 0, 4)
    counts = part.records, part.eval_records  # in the checkpoint
    write_some(part, 4, 7)  # after it, and then killed in the middle of a line
    for name in ("metrics.jsonl", "eval.jsonl"):
        with (tmp_path / "part" / name).open("ab") as file:
            file.write(tail)
    part = RunLog(tmp_path / "part", resume_records=counts[0], resume_eval_records=counts[1], resume_step=30)
    assert (part.records, part.eval_records) == counts == (4, 2)
    assert [r["step"] for r in part.history] == [0, 10, 20, 30]
    write_some(part, 4, 9)
    part.close()
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")
    assert (part.records, part.eval_records) == (whole.records, whole.eval_records)


def test_without_a_count_everything_whole_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "a": 2}\n{"step": 2, "a": 3}')  # whole, but without its end of line
    with (tmp_path / "eval.jsonl").open("wb") as file:
        file.write(b'{"step": 1}\n{"st')
    log = RunLog(tmp_path)
    log.write(3, {"a": 4})
    log.write_eval(3, {})
    log.sync()
    log.close()
    assert [r["step"] for r in read_jsonl(path)] == [1, 2, 3]
    assert read_jsonl(tmp_path / "eval.jsonl") == [{"step": 1}, {"step": 3}]
    assert agree(table(tmp_path), read_jsonl(path))


def test_fewer_records_than_the_checkpoint_knows_of_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunLog(tmp_path, resume_records=3, resume_eval_records=0).close()
    assert "metrics.jsonl has 0 of the 3 records" in capsys.readouterr().err


def test_reading_names_a_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not a JSON object"):
        read_jsonl(path)
    path.write_text('{"step": 1}\n7\n')
    with pytest.raises(UserError, match="line 2"):
        read_jsonl(path)


KILLED = """
import os, signal, sys
from pathlib import Path
from rlkit.metrics import RunLog
log = RunLog(Path(sys.argv[1]))
for i in range(5):
    log.write(i, {"x": i / 7, f"column {i}": i})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_records_outlive_a_kill(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run")], check=False)
    assert result.returncode == -signal.SIGKILL
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [r["x"] for r in records] == [i / 7 for i in range(5)]
    assert agree(table(tmp_path / "run"), records)


def test_without_a_folder_records_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = RunLog(None, tensorboard=True, resume_records=0)
    for step in range(metrics.HISTORY + 5):
        log.write(step, {"x": torch.tensor(step)})
    log.write_eval(7, {"y": 1.0})
    log.sync()
    log.close()
    assert len(log.history) == 10_000
    assert log.history[0] == {"step": 5, "x": 5}
    assert log.eval_history == [{"step": 7, "y": 1.0}]
    assert (log.records, log.eval_records) == (10_005, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_raised_and_leaves_no_torn_line(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    log = RunLog(tmp_path)
    log.write_eval(0, {"x": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "eval.jsonl").stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, hard))  # room for a part of the next line
        with pytest.raises(OSError, match="File too large"):
            log.write_eval(1, {"x": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.eval_records == 1
    assert (tmp_path / "eval.jsonl").read_bytes() == b'{"step": 0, "x": 1}\n'
    log.write_eval(2, {"x": 3})  # there is room again
    log.close()
    assert [r["x"] for r in read_jsonl(tmp_path / "eval.jsonl")] == [1, 3]


# --- trackers ------------------------------------------------------------------------------------------------------


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_continues_the_curve(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tensorboard=True)
    for step in (0, 10, 20, 30):
        log.write(step, {"x": float(step)})
    log.write_eval(0, {"eval/y": 0.5, "returns": [1.0]})
    log.close()
    log = RunLog(tmp_path, tensorboard=True, resume_records=3, resume_eval_records=1, resume_step=20)
    for step in (30, 40):
        log.write(step, {"x": float(step + 1)})
    log.close()
    assert scalars(tmp_path, "x") == [(0, 0.0), (10, 10.0), (20, 20.0), (30, 31.0), (40, 41.0)]
    assert scalars(tmp_path, "eval/y") == [(0, 0.5)]


def test_tensorboard_that_fails_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tb").write_text("a file where the folder should be")
    log = RunLog(tmp_path, tensorboard=True)
    for step in range(20):
        log.write(step, {"x": 1.0})
    log.close()
    error = capsys.readouterr().err
    assert error.count("TensorBoard is switched off for this run") == 1
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 20


def test_a_tracker_that_hangs_holds_nothing_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_PATIENCE", 0.05)
    for hang_at in ("open", "log"):
        release = threading.Event()
        monkeypatch.setattr(metrics, "_BACKLOG", 5)

        def open_it(hang_at: str = hang_at, release: threading.Event = release) -> Any:
            if hang_at == "open":
                release.wait()
            return (lambda step, values: release.wait()), (lambda: None)

        tracker = metrics._Tracker("Hung", "json", open_it)
        for step in range(50):  # would never end if it waited
            tracker.put(step, {})
        tracker.close()
        release.set()
        tracker._thread.join()
        error = capsys.readouterr().err
        assert error.count("Hung is switched off for this run") == 1
        assert "records behind" in error


def test_a_tracker_that_cannot_be_imported_or_exits_is_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    def leave() -> Any:
        raise SystemExit(1)

    for module, open_it in (("no_such_module", leave), ("json", leave)):
        tracker = metrics._Tracker("It", module, open_it)
        tracker.put(0, {})
        tracker.close()
        tracker.put(1, {})
    assert capsys.readouterr().err.count("It is switched off") == 2


# Stands for the wandb package, which tests must not need: writes down how it is called.
WANDB = """
import json, os
calls = []
class Settings(dict): pass
class Run:
    def log(self, values, step=None):
        if step == 99:
            raise ConnectionError("outage")
        calls.append(["log", step, values])
    def finish(self): calls.append(["finish"])
def init(**kwargs):
    calls.append(["init", kwargs])
    if os.environ.get("WANDB_FAILS"):
        raise ConnectionError("no network")
    return Run()
"""


@pytest.fixture
def wandb_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    import wandb

    yield wandb.calls
    sys.modules.pop("wandb")


def test_wandb_absent_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r'pip install "rlkit-trainers\[wandb\]"'):
        RunLog(tmp_path / "run", wandb=True)


def test_wandb_goes_on_in_the_same_run_and_never_asks_for_a_login(
    tmp_path: Path, wandb_calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in range(2):
        log = RunLog(tmp_path / "run", wandb="my project", config={"seed": 3}, resume_records=part)
        log.write(part, {"x": math.nan})
        log.write_eval(part, {"eval/y": 1, "returns": [2]})
        log.close()
    inits = [call[1] for call in wandb_calls if call[0] == "init"]
    stored = json.loads((tmp_path / "run" / "wandb.json").read_text())
    assert [i["id"] for i in inits] == [stored["id"]] * 2
    assert all(i["project"] == "my project" and i["config"] == {"seed": 3} and i["mode"] == "offline" for i in inits)
    logged = [(call[1], list(call[2])) for call in wandb_calls if call[0] == "log"]
    assert logged == [(0, ["x"]), (0, ["eval/y"]), (1, ["x"]), (1, ["eval/y"])]
    assert wandb_calls[-1] == ["finish"]
    wandb_calls.clear()
    for setting, mode in ((("WANDB_API_KEY", "k"), "online"), (("WANDB_MODE", "disabled"), "disabled")):
        monkeypatch.setenv(*setting)
        log = RunLog(None, wandb=True)
        log.write(0, {})
        log.close()
        assert wandb_calls[-3][1]["mode"] == mode
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY")
    assert metrics._wandb_mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k\n")
    (tmp_path / "netrc").chmod(0o600)
    assert metrics._wandb_mode() == "online"


def test_a_wandb_outage_stops_nothing(
    tmp_path: Path, wandb_calls: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path / "run", wandb=True)
    for step in (98, 99, 100):
        log.write(step, {"x": 1.0})
    log.close()
    assert "W&B is switched off for this run (ConnectionError: outage)" in capsys.readouterr().err
    assert [call[1] for call in wandb_calls if call[0] == "log"] == [98]
    monkeypatch.setenv("WANDB_FAILS", "1")
    log = RunLog(tmp_path / "run", wandb=True)
    log.write(101, {"x": 1.0})
    log.close()
    assert capsys.readouterr().err.count("W&B is switched off for this run (ConnectionError: no network)") == 1
    assert [r["step"] for r in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [98, 99, 100, 101]
