"""SIGTERM and SIGINT while a language trainer evaluates: exit code 75, a checkpoint, and the same end afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers import as_options, fingerprint, rlkit_command, tiny, wait_for
from lm_zoo import PAIRS, saved_llama

import rlkit
from rlkit import checkpoint, registry
from rlkit.errors import Stopped
from rlkit.lm.models import unwrapped
from rlkit.metrics import read_jsonl

STEPS = 10
EVALUATED = (0, 4, 8, 10)  # the last one by the end of the run
FIELDS: dict[str, Any] = {
    "learning_rate": 1e-3, "device": "cpu", "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2,
    "eval_every": 4, "log_every": 3, "checkpoint_every": 5, "tensorboard": False,
}  # fmt: skip
SAMPLED: dict[str, Any] = {"eval_samples": 3, "max_completion_length": 5}
OWN: dict[str, dict[str, Any]] = {"dpo": {**SAMPLED, "eval_kl": True}, "sft": SAMPLED, "reward_model": {}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(model folder, data file)."""
    place = tmp_path_factory.mktemp("files")
    data = place / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    return saved_llama(place / "model"), str(data)


def make(name: str, files: tuple[str, str], out: Path) -> Any:
    model, data = files
    return registry.get(name)(model, train_dataset=data, eval_dataset=data, out=str(out), **FIELDS, **OWN[name])


class Passes:
    """Counts the model's passes in evaluations, by the step they belong to; sends a signal in one of them."""

    def __init__(self, trainer: Any, step: int | None = None, number: int = 0, sent: int = signal.SIGTERM) -> None:
        self.count: dict[int, int] = {}
        self.at, self.sent, self.trainer = (step, number), sent, trainer
        unwrapped(trainer.model).base_model.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        trainer, step = self.trainer, self.trainer.clock
        referring = trainer.uses_reference and "ref_logp" not in trainer.completions
        if trainer.model.training or referring:
            return
        if (step, self.count.setdefault(step, 0)) == self.at:
            os.kill(os.getpid(), self.sent)
        self.count[step] += 1


@pytest.fixture(scope="module")
def whole(files: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[int, int]]]:
    """For each trainer, the run that nothing stopped, and the passes of its evaluations."""
    found = {}
    for name in OWN:
        out = tmp_path_factory.mktemp(name) / "whole"
        trainer = make(name, files, out)
        passes = Passes(trainer)
        trainer.learn(STEPS)
        assert tuple(passes.count) == EVALUATED
        found[name] = out, passes.count
    return found


@pytest.mark.parametrize(
    ("step", "moment"),
    [(0, "middle"), (4, "first pass"), (4, "middle"), (4, "last pass"), (10, "first pass"), (10, "last pass")],
)
@pytest.mark.parametrize("name", OWN)
def test_a_signal_in_an_evaluation(
    step: int, moment: str, name: str, files: tuple[str, str], whole: Any, tmp_path: Path
) -> None:
    """Before the first step, between two steps, and at the end. The middle and the last pass of DPO's and SFT's are
    those of sampling, or of the divergence from the reference.
    """
    expected, passes = whole[name]
    number = {"first pass": 0, "middle": passes[step] // 2, "last pass": passes[step] - 1}[moment]
    trainer = make(name, files, tmp_path / "run")
    Passes(trainer, step, number, signal.SIGINT if moment == "middle" else signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        trainer.learn(STEPS)
    assert stopped.value.code == 75
    newest, messages = checkpoint.newest(tmp_path / "run")
    assert (newest.name, messages) == (f"step-{step:010d}", [])
    done = [record["step"] for record in read_jsonl(tmp_path / "run" / "eval.jsonl")]
    assert done in ([s for s in EVALUATED if s < step], [s for s in EVALUATED if s <= step])
    rlkit.resume(tmp_path / "run").learn()
    assert fingerprint(tmp_path / "run") == fingerprint(expected)


def test_every_evaluation_is_stopped_once(files: tuple[str, str], whole: Any, tmp_path: Path) -> None:
    """Four signals in one run, each in the middle of another evaluation."""
    expected, passes = whole["dpo"]
    trainer = make("dpo", files, tmp_path / "run")
    total: int | None = STEPS
    for step in EVALUATED:
        Passes(trainer, step, passes[step] // 2)
        with pytest.raises(Stopped):
            trainer.learn(total)
        trainer, total = rlkit.resume(tmp_path / "run"), None
    trainer.learn()
    assert fingerprint(tmp_path / "run") == fingerprint(expected)


def test_a_signal_while_the_embedded_start_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no run yet: exit code 75, no folder, and the same command begins anew."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    steps: list[Any] = []

    def interrupt(*_: Any) -> None:
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_optimizer_step_post_hook(interrupt)
    try:
        with pytest.raises(Stopped) as stopped:
            tiny("dpo", out=str(tmp_path / "run"))
    finally:
        hook.remove()
    assert (stopped.value.code, len(steps)) == (75, 3)
    assert "stopped by SIGTERM while the embedded task's start was trained" in str(stopped.value)
    assert not (tmp_path / "run").exists()
    tiny("dpo", out=str(tmp_path / "run")).learn(3)
    assert checkpoint.newest(tmp_path / "run")[0].name == "step-0000000003"


def test_a_signal_from_outside_while_completions_are_scored(
    files: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line: a reward that waits holds the evaluation at step 4 open."""
    (tmp_path / "slow_reward.py").write_text(
        "import os, time\n"
        "calls = []\n"
        "def reward(prompts, completions, **columns):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2 and 'MARK' in os.environ:\n"
        "        open(os.environ['MARK'], 'w').close()\n"
        "        time.sleep(1)\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(OWN, "dpo", {**SAMPLED, "eval_reward": ("slow_reward:reward",)})
    make("dpo", files, tmp_path / "whole").learn(STEPS)
    model, data = files
    run, mark = tmp_path / "run", tmp_path / "mark"
    options = as_options({"model": model, "data": data, "eval_data": data, "steps": STEPS, **FIELDS, **OWN["dpo"]})
    process = subprocess.Popen(
        rlkit_command("train", "dpo", *options, "--out", str(run)), cwd=tmp_path,
        env={**os.environ, "MARK": str(mark)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: mark.exists() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert f"stopped by SIGINT at step 4: checkpoint written; go on with `rlkit resume {run}`" in errors
    assert "Traceback" not in errors
    rlkit.resume(run).learn()
    assert fingerprint(run) == fingerprint(tmp_path / "whole")
