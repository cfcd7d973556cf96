"""Weights & Biases itself, offline: what a run and its resumption leave behind, without a connection to anywhere."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY, as_options, run_rlkit

from rlkit.metrics import read_jsonl

BLOCK = 32768  # bytes of W&B's log format, which is LevelDB's


@pytest.fixture
def callers() -> Iterator[tuple[str, list[Any]]]:
    """An address on this machine, and who has connected to it."""
    seen: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    connection, caller = server.accept()
                except OSError:  # closed
                    return
                seen.append(caller)
                connection.close()

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", seen
        server.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def records(path: Path) -> Iterator[Any]:
    """The protocol buffers in a `.wandb` file: chunks of (checksum, length, type) and content, whole or in parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, content = 7, b""
    while position + 7 <= len(data):
        room = BLOCK - position % BLOCK
        if room < 7:
            position += room
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        content += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(content)
            content = b""


def logged(folder: Path) -> tuple[Any, dict[int, dict[str, Any]]]:
    """(the run's description, step -> values) of an offline folder."""
    (path,) = folder.glob("*.wandb")
    run, history = None, dict[int, dict[str, Any]]()
    for record in records(path):
        if record.WhichOneof("record_type") == "run":
            run = record.run
        elif record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history.setdefault(items.pop("_step"), {}).update(items)
    return run, history


def test_an_offline_run_and_its_resumption(tmp_path: Path, callers: tuple[str, list[Any]]) -> None:
    """Both hold the records of the local files under one id; whatever went to the network would call our address."""
    address, seen = callers
    run = tmp_path / "run"
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), address)
    env = {"WANDB_MODE": "offline", "WANDB_BASE_URL": address, **proxies, "NO_PROXY": "", "no_proxy": ""}
    fields = {**TINY, "env": "Pendulum-v1", "wandb": "my project", "seed": 5, "out": str(run), "steps": 60}
    for command in (["train", "sac", *as_options(fields)], ["resume", str(run), "--steps", "100"]):
        done = run_rlkit(*command, env=env)
        assert done.returncode == 0, done.stderr
        assert "switched off" not in done.stderr
    assert seen == []

    first, second = sorted((run / "wandb").glob("offline-run-*"))
    described, early = logged(first)
    again, late = logged(second)
    identity = json.loads((run / "wandb.json").read_text())["id"]
    assert (described.run_id, again.run_id) == (identity, identity)
    assert (described.project, again.project) == ("my project", "my project")
    config = {item.key: json.loads(item.value_json) for item in described.config.update}
    assert (config["trainer"], config["seed"], config["batch_size"]) == ("sac", 5, 8)
    assert config["policy_kwargs"]["net_arch"] == [8, 8]

    expected: dict[int, dict[str, Any]] = {}
    for name in ("metrics.jsonl", "eval.jsonl"):
        for record in read_jsonl(run / name):
            numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
            expected.setdefault(record["step"], {}).update(numbers)
    assert sorted(early) == [step for step in sorted(expected) if step <= 60]
    assert sorted(late) == [step for step in sorted(expected) if step > 60]
    for step, values in {**early, **late}.items():
        ours = {name: value for name, value in values.items() if not name.startswith("_")}
        assert set(ours) == set(expected[step])
        for name, value in ours.items():
            assert float(value) == pytest.approx(expected[step][name], rel=1e-12, nan_ok=True), (step, name)
