"""Language trainers learn what they are for, on the embedded task and on real text. Minutes: marked slow."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_zoo import saved_llama

import rlkit
from rlkit.rng import derive

SHARED = Path(__file__).parents[2] / "shared" / "data"
pytestmark = pytest.mark.slow


def first_and_last(trainer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return trainer.log.eval_history[0], trainer.log.eval_history[-1]


@pytest.mark.parametrize("seed", range(3))
def test_dpo_raises_the_true_reward_of_the_embedded_task(seed: int, tmp_path: Path) -> None:
    """The defaults of `rlkit train dpo`: from about 0.6 to about 0.85, by preferences alone."""
    task = {k: v for k, v in rlkit.DPO.default_task.items() if k != "steps"}  # type: ignore[attr-defined]
    trainer: Any = rlkit.DPO(seed=seed, out=str(tmp_path / "run"), **task)
    trainer.learn(150)
    before, after = first_and_last(trainer)
    assert 0.5 < before["eval_reward"] < 0.72
    assert after["eval_reward"] > before["eval_reward"] + 0.12
    assert before["eval_kl"] == pytest.approx(0, abs=1e-4)
    assert 0.1 < after["eval_kl"] < 10
    assert after["eval_rewards/accuracies"] > 0.65


def shuffled_endings(split: str, count: int) -> list[dict[str, str]]:
    """Stories: the beginning, its real ending, and the ending with its words shuffled."""
    path = SHARED / "text" / "tinystories" / f"{split}.jsonl.gz"
    rows = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file):
            words = json.loads(line)["text"].split()
            if len(words) < 90 or len(rows) == count:
                continue
            ending = words[50:90]
            order = np.random.default_rng(derive(0, "endings", split, number)).permutation(len(ending))
            rows.append(
                {
                    "prompt": " ".join(words[:50]),
                    "chosen": " " + " ".join(ending),
                    "rejected": " " + " ".join(ending[i] for i in order),
                }
            )
    return rows


def alphabets(split: str, count: int) -> list[dict[str, str]]:
    """Eight letters in their order, continued in order or shuffled."""
    rng = np.random.default_rng(derive(0, "alphabets", split))
    letters = "abcdefghijklmnopqrstuvwxyz"
    starts = rng.integers(0, 10, count).tolist()
    orders = [rng.permutation(8).tolist() for _ in range(count)]
    return [
        {
            "prompt": letters[start : start + 8],
            "chosen": letters[start + 8 : start + 16],
            "rejected": "".join(letters[start + 8 + i] for i in order),
        }
        for start, order in zip(starts, orders, strict=True)
        if order != sorted(order)
    ]


@pytest.mark.parametrize("text", ["alphabets", *(["stories"] if SHARED.exists() else [])])
def test_dpo_tells_endings_in_order_from_shuffled_ones(text: str, tmp_path: Path) -> None:
    """Held-out rows. Stories, where they lie beside the checkout: real endings, and a pretrained model of 260,000
    parameters, on which TRL's DPO reaches an accuracy of 1.00, too. Else letters, and a model with random weights.
    """
    rows = shuffled_endings if text == "stories" else alphabets
    model = str(SHARED / "models" / "stories260k") if text == "stories" else saved_llama(tmp_path / "model")
    trainer: Any = rlkit.DPO(
        model, train_dataset=rows("train", 400), eval_dataset=rows("test", 60), eval_samples=0,
        learning_rate=3e-4 if text == "stories" else 3e-3, out=str(tmp_path / "run"),
    )  # fmt: skip
    trainer.learn(100)
    before, after = first_and_last(trainer)
    assert before["eval_loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert after["eval_rewards/accuracies"] >= 0.95
    assert after["eval_loss"] < 0.3
