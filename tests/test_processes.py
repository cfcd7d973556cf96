"""Several processes: they agree, compute what one process computes, stop together, and go on from a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from helpers import fingerprint, finish, torchrun, wait_for
from lm_zoo import PAIRS, saved_llama
from several_jobs import CASES, digest, trained

import rlkit
from rlkit.errors import UserError
from rlkit.lm.sample import Samples
from rlkit.metrics import read_jsonl

JOBS = Path(__file__).parent / "several_jobs.py"


def job(name: str, folder: Path) -> None:
    """Run a job of `several_jobs.py` in two processes."""
    finish(torchrun(2, str(JOBS), name, str(folder)))


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("computed")
    job("compute", folder)
    return json.loads((folder / "computed.json").read_text())


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does_with_twice_the_batch(computed: Any, case: str, fsdp: bool) -> None:
    """Six steps: with plain SGD, weights to 1e-6, and every logged mean to 1e-5 of its size."""
    trainer = trained(case)
    alone, found = digest(trainer), computed[f"{case}, fsdp={fsdp}"]
    tolerance = 1e-6 if trainer.config.optim == "sgd" else 2e-5  # AdamW divides rounding by tiny gradients
    np.testing.assert_allclose(found["weights"], alone["weights"], rtol=0, atol=tolerance)
    assert found["order"] == alone["order"]
    assert found["record"].keys() == alone["record"].keys()
    for name, value in alone["record"].items():
        assert found["record"][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    if "samples" in found:
        assert found["samples"] == trainer.sample(["Is ice", "2 +", "Say"], 2, max_new_tokens=5)


def test_what_comes_between_the_steps_of_a_sharded_run_leaves_no_trace(tmp_path: Path) -> None:
    job("in_between", tmp_path)


def test_processes_agree_and_notice_what_does_not_fit(tmp_path: Path) -> None:
    job("agree", tmp_path)
    main, other = (json.loads((tmp_path / f"said{rank}.json").read_text()) for rank in (0, 1))
    for said in (main, other):
        assert said[0] == "the main one found a mistake"
        assert said[1].startswith("the seed: process 1 has 1, process 0 has 0; all of them have to see")
        assert said[2] == "`alone` runs in one process, and 2 were started"
        assert said[3].startswith("the model: process 1 has ")
        assert said[4].startswith("the data: process 1 has ")
        assert said[5] == "`device`: got 'cuda:1'; several processes take auto, cpu or cuda: each gets its own"


def test_a_sharded_run_stops_together_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    saved_llama(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS * 2), encoding="utf-8")
    job("stop_and_resume", tmp_path)
    whole, run = json.loads((tmp_path / "prints.json").read_text())
    assert run == whole

    from transformers import AutoModelForCausalLM

    last = tmp_path / "run" / "checkpoints" / whole["checkpoint"]
    model = AutoModelForCausalLM.from_pretrained(last)
    alone: Any = rlkit.load(tmp_path / "run")  # by one process: weights, optimiser, and the size of a step
    own = dict(model.named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in alone.model.named_parameters())
    assert alone.units_per_step == 4
    assert len(alone.optimizer.state) == len(list(alone.model.parameters()))
    record = alone.evaluate()
    logged = read_jsonl(tmp_path / "run" / "eval.jsonl")[-1]
    assert record["samples"] == logged["samples"]
    assert record["eval_loss"] == pytest.approx(logged["eval_loss"], rel=1e-5)
    assert record["eval_kl"] == pytest.approx(logged["eval_kl"], abs=1e-4)
    assert torch.isfinite(torch.tensor(alone.learn(3).log.history[-1]["loss"]))


def test_sharding_needs_processes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`fsdp` divides the model among processes: start several"):
        rlkit.DPO(saved_llama(tmp_path / "model"), train_dataset=PAIRS, fsdp=True)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, str], Path]:
    """A command that trains in two processes, its environment, and the folder of a run that nothing stopped."""
    place = tmp_path_factory.mktemp("launched")
    model, data = saved_llama(place / "model"), place / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS * 3), encoding="utf-8")
    options = ["--model", model, "--data", str(data), "--per_device_train_batch_size", "1", "--checkpoint_every", "4"]
    options += ["--eval_samples", "0", "--learning_rate", "1e-3", "--device", "cpu", "--tensorboard", "false"]
    command = torchrun(2, "-m", "rlkit", "train", "dpo", *options, "--steps", "60")
    environment = {"RLKIT_CACHE": str(place / "cache")}
    finish([*command, "--out", str(place / "whole")], environment)
    return command, environment, place / "whole"


@pytest.mark.parametrize("how", ["ctrl-c", "kill -9 of one"])
def test_the_command_line_under_a_launcher(
    launched: tuple[list[str], dict[str, str], Path], tmp_path: Path, how: str
) -> None:
    """One folder, one voice; a signal leaves a checkpoint, a kill the one before; both go on to the same end.

    Ctrl-C reaches the launcher, too, which passes it on: every process gets it twice.
    """
    command, environment, whole = launched
    run = tmp_path / "run"
    with subprocess.Popen(
        [*command, "--out", str(run)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, start_new_session=True,
    ) as process:  # fmt: skip
        wait_for(lambda: len(list((run / "checkpoints").glob("step-*"))) > 0 or process.poll() is not None)
        assert process.poll() is None, process.communicate()[0]
        if how == "ctrl-c":
            os.killpg(process.pid, signal.SIGINT)
        else:
            workers = [p.pid for p in psutil.Process(process.pid).children()]
            os.kill(workers[-1], signal.SIGKILL)
        said, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert said.count("dpo: device cpu, float32, seed 0") == 1
    assert said.count("stopped by SIGINT at step") == (how == "ctrl-c")
    finish(torchrun(2, "-m", "rlkit", "resume", str(run)), environment)
    assert fingerprint(run) == fingerprint(whole)


def test_samples_come_back_in_the_order_of_the_prompts() -> None:
    """Five prompts dealt to two processes, two completions each."""

    def part(numbers: list[int]) -> Samples:
        tokens = [np.array([10 * n + j], dtype=np.int32) for n in numbers for j in range(2)]
        logp = [np.array([float(n)], dtype=np.float32) for n in numbers for _ in range(2)]
        finished = np.array([n % 2 == 0 for n in numbers for _ in range(2)])
        return Samples(np.repeat(np.arange(len(numbers)), 2), tokens, logp, finished)

    found = Samples.dealt([part([0, 2, 4]), part([1, 3])])
    assert found is not None
    assert found.prompt.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [int(t[0]) for t in found.tokens] == [0, 1, 10, 11, 20, 21, 30, 31, 40, 41]
    assert [int(v[0]) for v in found.logp] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert found.finished.tolist() == [True, True, False, False, True, True, False, False, True, True]
    assert Samples.dealt([part([0]), None]) is None
