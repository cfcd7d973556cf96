"""The same model, rows and settings in TRL's trainers and here: losses, metrics, gradients and weights agree.

Ten optimiser steps of plain SGD, float32. In DPO the two sides differ in how they compute (rlkit shares prompts between
chosen and rejected, packs rows, and reads the reference's log-probs from a column); in all they order a step's rows
differently. So they agree to rounding, which ten steps amplify.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_zoo import PAIRS, saved_classifier, saved_llama
from test_tokens import CHAT_PAIRS, CHATML, chat_tokenizer, merging_tokenizer

import rlkit
from rlkit.lm.bytes import byte_tokenizer
from rlkit.lm.models import load_classifier, load_model, load_tokenizer
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
            if key == "rewards/accuracies" and mine["step"] == 1:
                continue  # policy and reference are the same model: all rewards are 0 up to rounding, which decides
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


# Reward model

REWARD_LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "centred": {"center_rewards_coefficient": 0.05},
    "margins": {"margins": [0.5, 0.0, 1.0, 2.0, 0.1, 0.3]},
    "all at once": {"center_rewards_coefficient": 0.01, "margins": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]},
}
REWARD_METRICS = ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_classifier(tmp_path_factory.mktemp("classifier"))


def reward_rows(margins: list[float] | None) -> list[dict[str, Any]]:
    return PAIRS if margins is None else [{**row, "margin": m} for row, m in zip(PAIRS, margins, strict=True)]


def reward_with_trl(folder: str, place: Path, tokenizer: Any = None, **options: Any) -> Any:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = reward_rows(options.pop("margins", None))
    config = RewardConfig(
        output_dir=str(place), max_steps=STEPS, per_device_train_batch_size=len(rows), learning_rate=RATE, optim="sgd",
        per_device_eval_batch_size=len(rows), lr_scheduler_type="constant", max_grad_norm=1e9, bf16=False, use_cpu=True,
        gradient_checkpointing=False, logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    data = Dataset.from_list(rows)
    # The model as an object: of a folder's name TRL prints a report of its loading.
    return RewardTrainer(
        load_classifier(folder)[0], args=config, train_dataset=data, eval_dataset=data,
        processing_class=tokenizer or load_tokenizer(folder),
    )  # fmt: skip


def reward_with_rlkit(folder: str, **options: Any) -> Any:
    rows = reward_rows(options.pop("margins", None))
    return rlkit.RewardModel(
        folder, train_dataset=rows, eval_dataset=rows, per_device_train_batch_size=len(rows), learning_rate=RATE,
        optim="sgd", per_device_eval_batch_size=len(rows), lr_scheduler_type="constant", max_grad_norm=0, log_every=1,
        device="cpu", **options,
    )  # fmt: skip


@pytest.mark.parametrize("loss", REWARD_LOSSES)
def test_gradients_of_the_reward_model(loss: str, classifier: str, tmp_path: Path) -> None:
    """One loss on all pairs, differentiated: each weight's gradient to 1e-5 of the largest in its matrix."""
    peer = reward_with_trl(classifier, tmp_path, **REWARD_LOSSES[loss])
    their_loss = peer.compute_loss(peer.model, peer.data_collator(list(peer.train_dataset)))
    their_loss.backward()
    trainer = reward_with_rlkit(classifier, **REWARD_LOSSES[loss])
    ids = torch.arange(len(PAIRS))
    trainer._seen = []
    our_loss, _ = trainer.batch_loss(trainer.columns(trainer.units, ids), trainer.totals(trainer.units, ids))
    our_loss.backward()
    assert our_loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
    ours, theirs = dict(trainer.model.named_parameters()), dict(peer.model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert weight.grad is not None
        gradient = ours[name].grad
        assert gradient is not None
        assert float((gradient - weight.grad).abs().max()) < 1e-5 * float(weight.grad.abs().max()), name


@pytest.mark.parametrize("loss", REWARD_LOSSES)
def test_ten_steps_of_the_reward_model(loss: str, classifier: str, tmp_path: Path) -> None:
    """Weights to 1e-4 of how far they moved; metrics under TRL's names to 5e-6 at the first step and 1e-4 afterwards
    (rewards are of order 1, and their mean may cancel); and an evaluation of the end.
    """
    peer = reward_with_trl(classifier, tmp_path, **REWARD_LOSSES[loss])
    peer.train()
    their_records = [record for record in peer.state.log_history if "loss" in record]
    trainer = reward_with_rlkit(classifier, **REWARD_LOSSES[loss]).learn(STEPS)
    start = {n: p.detach() for n, p in load_classifier(classifier)[0].named_parameters()}
    ours, theirs = ({n: p.detach() for n, p in m.named_parameters()} for m in (trainer.model, peer.model))
    assert agree(ours, theirs, start) < 1e-4
    assert len(trainer.log.history) == len(their_records) == STEPS
    for mine, other in zip(trainer.log.history, their_records, strict=True):
        for key in (*REWARD_METRICS, "grad_norm", "learning_rate", "epoch"):
            bounds = {"rel": 5e-6, "abs": 5e-7} if mine["step"] == 1 else {"rel": 1e-4, "abs": 1e-5}
            assert mine[key] == pytest.approx(other[key], **bounds), f"{key} at step {mine['step']}"
    evaluated, expected = trainer.evaluate(), peer.evaluate()
    for key in REWARD_METRICS:
        assert evaluated[f"eval_{key}"] == pytest.approx(expected[f"eval_{key}"], rel=1e-4, abs=1e-5), key


def test_a_padding_token_that_is_the_end_token(classifier: str, tmp_path: Path) -> None:
    """transformers, and so TRL, then reads the reward before the end token; a tokenizer without padding is the same."""
    rewards = []
    for padding in ("<pad>", "<eos>", None):
        tokenizer = load_tokenizer(classifier)
        tokenizer.pad_token = padding
        peer = reward_with_trl(classifier, tmp_path, tokenizer=tokenizer)
        with torch.no_grad():
            expected = peer.model(**peer.data_collator(list(peer.train_dataset))).logits[:, 0]
        tokenizer = load_tokenizer(classifier)  # TRL sets a padding token
        tokenizer.pad_token = padding
        trainer = reward_with_rlkit(classifier, processing_class=tokenizer)
        with torch.no_grad():
            found = trainer.rewards(trainer.columns(trainer.units, torch.arange(len(PAIRS))))
        torch.testing.assert_close(torch.cat(trainer.branch(found)), expected, atol=1e-6, rtol=1e-5)
        assert any("rewards are read before it" in note for note in trainer.notes) is (padding != "<pad>")
        rewards.append(found)
    torch.testing.assert_close(rewards[1], rewards[2], atol=0, rtol=0)
    assert float((rewards[0] - rewards[1]).abs().min()) > 1e-3


def implicit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]


TEXTS = [
    {"prompt": "Çok güzel 🙂", "chosen": "é", "rejected": "ends<eos>"},
    {"prompt": "x", "chosen": "<eos>", "rejected": "text <bos> in it\n"},
]
TOKEN_ROWS: dict[str, tuple[Any, list[dict[str, Any]], int | None]] = {
    "texts": (byte_tokenizer, TEXTS, None),
    "texts without BOS": (lambda: byte_tokenizer(bos=False), TEXTS, None),
    "texts with their prompts inside": (byte_tokenizer, implicit(PAIRS), None),
    "longer than max_length": (byte_tokenizer, PAIRS, 48),
    "tokens that merge across the end of the prompt": (
        merging_tokenizer,
        [{"prompt": "ca", "chosen": "bc", "rejected": "cc"}, {"prompt": "a", "chosen": "b", "rejected": "c"}],
        None,
    ),
    "conversations": (byte_tokenizer, CHAT_PAIRS, None),
    "conversations with their prompts inside": (byte_tokenizer, implicit(CHAT_PAIRS), None),
    "conversations in ChatML": (
        lambda: chat_tokenizer(CHATML, "<|im_start|>", "<|im_end|>", eos="<|im_end|>"),
        CHAT_PAIRS,
        None,
    ),
}


@pytest.mark.parametrize("kind", TOKEN_ROWS)
def test_rows_of_the_reward_model_are_trls(kind: str, classifier: str) -> None:
    """One end token after texts, none added to what a template writes; pairs with a long row are left out."""
    from datasets import Dataset
    from trl import RewardTrainer

    make, rows, max_length = TOKEN_ROWS[kind]
    args: Any = SimpleNamespace(dataset_num_proc=None, max_length=max_length)
    data = Dataset.from_list(rows)
    theirs = list(RewardTrainer._prepare_dataset(SimpleNamespace(), data, make(), args, "train"))  # type: ignore[arg-type]
    model: Any = load_classifier(classifier)[0]
    model.resize_token_embeddings(len(make()))
    trainer: Any = rlkit.RewardModel(
        model, train_dataset=rows, processing_class=make(), max_length=max_length, eval_fraction=0
    )
    tokens = trainer.completions["tokens"]
    for side in trainer.branches:
        assert [tokens[row].tolist() for row in trainer.units[side].tolist()] == [r[f"{side}_ids"] for r in theirs]
    left_out = len(rows) - len(theirs)
    assert left_out == (1 if max_length else 0)  # one row of 50 tokens
    assert any("too long and not used at max_length=48" in note for note in trainer.notes) is bool(left_out)
