"""What each of several processes does in tests/test_processes.py: `several_jobs.py JOB FOLDER`.

The same cases run in one process, where tests want to compare: `trained(case)`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from helpers import StopAt, fingerprint
from lm_zoo import PAIRS, tiny_llama

import rlkit
from rlkit.errors import RlkitError, Stopped, UserError
from rlkit.lm.models import classifier_of
from rlkit.lm.sharding import whole
from rlkit.processes import join, launched

FIXED: dict[str, Any] = {
    "lr_scheduler_type": "constant", "eval_fraction": 0, "device": "cpu", "reference_cache": False, "beta": 0.5,
    "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0,
}  # fmt: skip
ADAM: dict[str, Any] = {"optim": "adamw", "learning_rate": 1e-3, "max_grad_norm": 0.5}

# Trainer, units of a pass in one process, and fields. A step has 4 units, the last of an epoch less.
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "dpo": ("dpo", 4, {}),
    "accumulated": ("dpo", 2, {"gradient_accumulation_steps": 2}),
    "last step of one": ("dpo", 4, {"rows": 5, "num_train_epochs": 3}),
    "adapter": ("dpo", 4, {"use_peft": True, **ADAM}),
    "recomputed": ("dpo", 4, {"gradient_checkpointing": True, **ADAM}),
    "sft": ("sft", 4, {}),
    "reward_model": ("reward_model", 4, ADAM),
}


def trained(case: str, **fields: Any) -> Any:
    """The trainer of a case after six steps."""
    return made(case, **fields).learn(6)


def made(case: str, **fields: Any) -> Any:
    """The trainer of a case; the units of a step are those of one process, however many there are."""
    name, units, own = CASES[case]
    options = {**FIXED, "per_device_train_batch_size": units // launched(), **own, **fields}
    rows = PAIRS[: options.pop("rows", 6)]
    model, tokenizer = tiny_llama()
    if name != "dpo":
        del options["beta"]
    if name == "reward_model":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = classifier_of(model)
    trainer: Any = getattr(rlkit, {"dpo": "DPO", "sft": "SFT", "reward_model": "RewardModel"}[name])
    return trainer(model, train_dataset=rows, processing_class=tokenizer, **options)


def weights(trainer: Any) -> torch.Tensor:
    """All weights of the model, end to end."""
    return torch.cat([whole(p.detach()).flatten() for p in trainer.model.parameters()])


def digest(trainer: Any) -> dict[str, Any]:
    """What is compared: weights to nine digits, the last record without times, the order, a few samples."""
    record = {k: v for k, v in trainer.log.history[-1].items() if not k.startswith("time/")}
    return {
        "weights": weights(trainer).tolist(),
        "record": record,
        "order": [ids.tolist() for epoch in range(3) for ids in trainer.order(epoch)],
    }


def compute(folder: Path) -> None:
    """Every case with copied and with divided weights."""
    from torch.distributed.tensor import DTensor

    found: dict[str, Any] = {}
    for case in CASES:
        for fsdp in (False, True):
            trainer = trained(case, fsdp=fsdp)
            assert trainer.processes.size == 2
            divided = [isinstance(p, DTensor) for p in trainer.model.parameters()]
            assert all(divided) if fsdp else not any(divided)
            trainer.processes.same("the weights after training", digest(trainer)["weights"])
            found[f"{case}, fsdp={fsdp}"] = digest(trainer)
            if case == "dpo":
                samples = trainer.sample(["Is ice", "2 +", "Say"], 2, max_new_tokens=5)
                again = trained(case, fsdp=fsdp)  # sampling in between leaves no trace in the weights
                trainer.learn(2)
                assert torch.equal(weights(trainer), weights(again.learn(2)))
                found[f"{case}, fsdp={fsdp}"]["samples"] = samples
    if trainer.processes.is_main:
        (folder / "computed.json").write_text(json.dumps(found))


def in_between(folder: Path) -> None:
    """Sampling, of fewer prompts than processes too, saving and evaluating leave no trace in a sharded run."""
    plain = weights(trained("recomputed", fsdp=True))
    trainer = made("recomputed", fsdp=True, eval_fraction=0)
    trainer.sample(["Say"], 1, max_new_tokens=3)
    trainer.save(folder / "early")
    trainer.learn(2)
    one = trainer.sample(["Say"], 2, max_new_tokens=3)
    assert trainer.sample(["Say", "Is ice", "2"], 2, max_new_tokens=3)[0] == one[0]
    trainer.learn(2)
    trainer.save(folder / "late")
    assert torch.equal(weights(trainer.learn(2)), plain)
    given = made("dpo", fsdp=True, ref_model=tiny_llama(1)[0], eval_fraction=0.4, eval_kl=True, eval_samples=2)
    given.learn(2)
    assert given.evaluate() == given.evaluate()  # the reference is opened, and divided, more than once
    early: Any = rlkit.load(folder / "early")
    assert torch.equal(weights(early), weights(made("recomputed", fsdp=True)))
    wrong = made("adapter", fsdp=True)
    assert "alone" in _message(lambda: wrong.save(folder / "merged", merged=True))
    frozen, tokenizer = tiny_llama()
    frozen.unused = torch.nn.Parameter(torch.zeros(1))
    options = {**FIXED, "processing_class": tokenizer, "train_dataset": PAIRS}
    assert "1 trainable weights have no part in the loss (unused)" in _message(
        lambda: rlkit.DPO(frozen, **options).learn(2)
    )


class Alone(rlkit.SAC):
    """A trainer that knows nothing of other processes."""

    name = "alone"
    several_processes = False


def agree(folder: Path) -> None:
    """The questions that processes ask one another, and the errors of those that do not fit together."""
    group = join("cpu")
    assert (group.size, launched()) == (2, 2)
    assert group.any(group.rank == 1)
    assert not group.any(False)
    assert group.sum(torch.tensor([1.0, group.rank])).tolist() == [2.0, 1.0]
    assert group.gather({"rank": group.rank}) == [{"rank": 0}, {"rank": 1}]
    assert group.from_main(lambda: group.rank) == 0
    with group.main_first():
        if group.is_main:
            (folder / "left").write_text("here")
        assert (folder / "left").read_text() == "here"

    def fail() -> None:
        raise UserError("the main one found a mistake")

    said = [_message(lambda: group.from_main(fail))]
    said.append(_message(lambda: group.same("the seed", group.rank)))
    said.append(_message(lambda: Alone("Pendulum-v1")))
    model, tokenizer = tiny_llama(group.rank)
    options = {**FIXED, "processing_class": tokenizer}
    said.append(_message(lambda: rlkit.DPO(model, train_dataset=PAIRS, **options)))
    model, _ = tiny_llama()
    said.append(_message(lambda: rlkit.DPO(model, train_dataset=PAIRS[: 5 + group.rank], **options)))
    said.append(_message(lambda: rlkit.DPO(model, train_dataset=PAIRS, **{**options, "device": "cuda:1"})))
    (folder / f"said{group.rank}.json").write_text(json.dumps(said))


def _message(action: Any) -> str:
    try:
        action()
    except RlkitError as error:
        return str(error)
    return "no error"


def stop_and_resume(folder: Path) -> None:
    """A sharded run in one go, and one that a signal to the second process alone stops, both in run folders."""
    group = join("cpu")
    fields = {
        **FIXED, **ADAM, "fsdp": True, "per_device_train_batch_size": 2, "eval_fraction": 0.4, "eval_every": 4,
        "log_every": 3, "checkpoint_every": 4, "eval_samples": 3, "max_completion_length": 5, "tensorboard": False,
        "model": str(folder / "model"), "data": str(folder / "pairs.jsonl"), "eval_kl": True,
    }  # fmt: skip
    rlkit.DPO(out=folder / "whole", **fields).learn(10)
    run = folder / "run"
    trainer: Any = rlkit.DPO(out=run, **fields)
    try:
        trainer.learn(10, callback=StopAt(5) if group.rank == 1 else None)
    except Stopped as stopped:
        assert stopped.code == 75  # noqa: PT017 (both processes have to get here)
    else:
        raise AssertionError("the signal to process 1 did not stop this process")
    rlkit.resume(run).learn()
    if group.is_main:
        prints = [fingerprint(folder / name) for name in ("whole", "run")]
        (folder / "prints.json").write_text(json.dumps(prints))


if __name__ == "__main__":
    jobs = {"compute": compute, "in_between": in_between, "agree": agree, "stop_and_resume": stop_and_resume}
    jobs[sys.argv[1]](Path(sys.argv[2]))
