"""SIGKILL of language runs in every phase: however often, they end where a run ends that nobody killed."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import as_options, fingerprint, tiny_fields
from lm_zoo import PAIRS, saved_llama

STEPS = 12
FIELDS: dict[str, Any] = {
    "learning_rate": 1e-3, "device": "cpu", "per_device_train_batch_size": 2, "checkpoint_every": 4, "log_every": 3,
    "eval_every": 6, "keep_checkpoints": 1, "tensorboard": False, "eval_fraction": 0.3,
}  # fmt: skip
LETTERS = {"supervised_steps": 8, "n_demonstrations": 64, "n_prompts": 8, "n_eval_prompts": 4, "n_answers": 3}
OWN: dict[str, dict[str, Any]] = {
    "dpo": {"eval_samples": 2, "max_completion_length": 4},
    "sft": {"eval_samples": 2, "max_completion_length": 4},
    "reward_model": {"use_peft": True, "lora_r": 2},
}


class Server:
    """`kill_jobs.py` in a process of its own."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("kill_jobs.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, command: list[str], cache: Path, output: Path, **when: Any) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"command": command, "environment": {"RLKIT_CACHE": str(cache)}, "output": str(output), **when}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return int(json.loads(self.process.stdout.readline())["code"])

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.close()


class Job:
    """A run that is started, killed and resumed, with a cache folder of its own."""

    def __init__(self, server: Server, options: list[str], place: Path) -> None:
        self.server, self.options, self.place = server, options, place
        self.run, self.cache = place / "run", place / "cache"
        place.mkdir(exist_ok=True)

    def go(self, **when: Any) -> int:
        """As a user would: `resume` where there is a run folder, else `train` once more."""
        known = (self.run / "config.yaml").exists()
        command = ["resume", str(self.run)] if known else ["train", *self.options, "--out", str(self.run)]
        return self.server(command, self.cache, self.place / "output", **when)

    def finish(self) -> dict[str, Any]:
        code = self.go()
        assert code == 0, (self.place / "output").read_text()
        assert list((self.run / "checkpoints").glob(".*")) == [], "remains of killed processes"
        assert [p.name for p in self.cache.glob(".*")] == []
        return fingerprint(self.run)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Arguments of `train` for each trainer: on a file and a model folder, and (`embedded …`) on the embedded task."""
    place = tmp_path_factory.mktemp("files")
    model, data = saved_llama(place / "model"), place / "pairs.jsonl"
    # Every pair twice: equal rows of several batches share a value of the reference.
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS * 2), encoding="utf-8")
    found = {}
    for name, own in OWN.items():
        files = {"model": model, "data": str(data), "steps": STEPS, **FIELDS, **own}
        found[name] = [name, *as_options(files)]
        found[f"embedded {name}"] = [
            name,
            "--steps",
            str(STEPS),
            *as_options(tiny_fields(name, letters=LETTERS, **FIELDS, **own)),
        ]
    return found


class Whole(dict[str, Any]):
    """What a run leaves behind that nobody kills, by trainer; computed when first asked for."""

    def __init__(self, server: Server, options: dict[str, list[str]], place: Path) -> None:
        self.server, self.options, self.place = server, options, place
        self.seconds: dict[str, float] = {}

    def __missing__(self, name: str) -> dict[str, Any]:
        began = time.monotonic()
        self[name] = Job(self.server, self.options[name], self.place / name).finish()
        self.seconds[name] = time.monotonic() - began
        return self[name]


@pytest.fixture(scope="module")
def whole(server: Server, options: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(server, options, tmp_path_factory.mktemp("whole"))


WRITING, CACHE = "rlkit/checkpoint.py", "lm/reference_cache.py"
POINTS: dict[str, tuple[str, list[tuple[str, str, str, int]]]] = {
    "the reference is computed, and written to its cache": (
        "dpo",
        [
            (CACHE, "ReferenceCache.__init__", "return execute", 0),
            (CACHE, "ReferenceCache.put", "return executemany", 1),  # inside a transaction
            (CACHE, "ReferenceCache.put", "return", 2),
        ],
    ),
    "the first checkpoint and the records before it are written": (
        "sft",
        [
            ("rlkit/metrics.py", "RunLog.write", "return", 0),
            (WRITING, "_write", "call write", 3),
            (WRITING, "_commit", "call", 0),
        ],
    ),
    "later checkpoints are written, and old ones deleted": (
        "reward_model",
        [
            (WRITING, "_commit", "return", 0),
            (WRITING, "_write", "return", 9),
            ("shutil.py", "rmtree", "call", 1),  # the first is of a temporary folder
        ],
    ),
    "the embedded start is trained and saved, and answers": (
        "embedded dpo",
        [
            ("rlkit/lm/trainer.py", "LMTrainer.update", "return", 3),
            (WRITING, "_write", "return", 5),
            ("envs/letters.py", "label", "call", 4),
        ],
    ),
}


@pytest.mark.parametrize("phase", POINTS)
def test_a_kill_while(phase: str, server: Server, options: Any, whole: Whole, tmp_path: Path) -> None:
    """Each kill hits the run as the ones before left it."""
    name, points = POINTS[phase]
    job = Job(server, options[name], tmp_path)
    for point in points:
        assert job.go(at=point) == -9, f"{point}: {(tmp_path / 'output').read_text()}"
    assert job.finish() == whole[name]


def test_the_cache_that_a_killed_run_leaves_is_used(server: Server, options: Any, whole: Whole, tmp_path: Path) -> None:
    """What its transactions had stored is not computed again; what the torn one had is not there."""
    job = Job(server, options["dpo"], tmp_path)
    assert job.go(at=(CACHE, "ReferenceCache.put", "return executemany", 2)) == -9
    (path,) = job.cache.glob("*.sqlite")
    with sqlite3.connect(path) as db:
        stored = db.execute("SELECT count(*) FROM rows").fetchone()[0]
    assert stored == 4  # two batches, each of one pair that is there twice
    shutil.rmtree(job.run)  # another run of the same model and rows
    assert job.finish() == whole["dpo"]
    assert "reference log-probs of 12 units: 4 from the cache" in (tmp_path / "output").read_text()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", [*OWN, *(f"embedded {name}" for name in OWN)])
def test_kills_at_random_moments(
    name: str, seed: int, server: Server, options: Any, whole: Whole, tmp_path: Path
) -> None:
    """Six a run, each somewhere in the time that the whole run took; those after its end hit nothing."""
    expected, rng = whole[name], random.Random(f"{name} {seed}")
    job = Job(server, options[name], tmp_path)
    codes = [job.go(after=rng.uniform(0, whole.seconds[name])) for _ in range(6)]
    assert set(codes) <= {-9, 0}, (tmp_path / "output").read_text()
    assert job.finish() == expected
