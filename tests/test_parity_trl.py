"""The same model, rows and settings in TRL's DPOTrainer and here: losses, metrics, gradients and weights agree.

Ten optimiser steps of plain SGD, float32. The two sides differ in how they compute (rlkit shares prompts between chosen
and rejected, packs rows, and reads the reference's log-probs from a column), so they agree to rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_zoo import PAIRS, saved_llama

import rlkit
from rlkit.lm.models import load_model, load_tokenizer
from rlkit.trainers.dpo import DPO

STEPS = 10
RATE = 0.05
Result = tuple[dict[str, torch.Tensor], list[dict[str, float]]]
RATES = {"sppo_hard": 1e-4}  # a sum over tokens, squared: larger steps diverge
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "ipo": {},
    "hinge": {},
    "robust": {"label_smoothing": 0.2},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "sppo_hard": {},
    "sigmoid_norm": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_llama(tmp_path_factory.mktemp("model"))


def with_trl(folder: str, place: Path, rate: float = RATE, **options: Any) -> Result:
    """(weights, a record a step) of TRL after ten steps on all pairs at once."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=str(place), max_steps=STEPS, per_device_train_batch_size=len(PAIRS), learning_rate=rate, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=1e9, bf16=False, use_cpu=True, gradient_checkpointing=False,
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = DPOTrainer(
        load_model(folder), args=config, train_dataset=Dataset.from_list(PAIRS), processing_class=load_tokenizer(folder)
    )
    trainer.train()
    records = [record for record in trainer.state.log_history if "loss" in record]
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}, records


def with_rlkit(folder: str, rate: float = RATE, **options: Any) -> Result:
    """The same here."""
    trainer = rlkit.DPO(
        folder, train_dataset=PAIRS, per_device_train_batch_size=len(PAIRS), learning_rate=rate, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0, eval_fraction=0, log_every=1, device="cpu", **options,
    )  # fmt: skip
    assert isinstance(trainer, DPO)
    trainer.learn(STEPS)
    assert trainer.log is not None
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}, trainer.log.history


def agree(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """The largest difference of a weight, relative to how far the run moved the weights of its matrix."""
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for name in ours:
        moved = (theirs[name] - start[name]).abs().max()
        worst = max(worst, float((ours[name] - theirs[name]).abs().max() / moved))
    return worst


@pytest.mark.parametrize("loss", LOSSES)
def test_ten_steps_of_sgd(loss: str, folder: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"beta": 0.3, "rate": RATES.get(loss, RATE), **LOSSES[loss]}
    theirs, their_records = with_trl(folder, tmp_path, loss_type=[loss], **options)
    ours, our_records = with_rlkit(folder, loss_type=(loss,), **options)
    start = {n: p.detach() for n, p in load_model(folder).named_parameters()}
    assert agree(ours, theirs, start) < 1e-3
    assert len(our_records) == len(their_records) == STEPS
    for mine, other in zip(our_records, their_records, strict=True):
        for key in (
            "loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
            "logps/chosen", "logps/rejected",
        ):  # fmt: skip
            assert mine[key] == pytest.approx(other[key], rel=2e-4, abs=2e-4), f"{key} at step {mine['step']}"


def test_sft_regularised(folder: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"beta": 0.3}
    theirs, _ = with_trl(folder, tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], **options)
    ours, _ = with_rlkit(folder, loss_type=("sigmoid", "sft"), loss_weights=(1.0, 0.5), **options)
    start = {n: p.detach() for n, p in load_model(folder).named_parameters()}
    assert agree(ours, theirs, start) < 1e-3


def test_supervised_fine_tuning(folder: str, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
    config = SFTConfig(
        output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=len(rows), learning_rate=RATE,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=1e9, bf16=False, use_cpu=True, logging_steps=1,
        gradient_checkpointing=False, report_to=[], save_strategy="no", disable_tqdm=True, completion_only_loss=True,
    )  # fmt: skip
    peer = SFTTrainer(
        load_model(folder), args=config, train_dataset=Dataset.from_list(rows), processing_class=load_tokenizer(folder)
    )
    peer.train()
    theirs = {n: p.detach().clone() for n, p in peer.model.named_parameters()}
    trainer: Any = rlkit.SFT(
        folder, train_dataset=rows, per_device_train_batch_size=len(rows), learning_rate=RATE, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0, eval_fraction=0, device="cpu",
    )  # fmt: skip
    trainer.learn(STEPS)
    ours = {n: p.detach() for n, p in trainer.model.named_parameters()}
    start = {n: p.detach() for n, p in load_model(folder).named_parameters()}
    assert agree(ours, theirs, start) < 1e-3
