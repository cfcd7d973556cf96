"""The embedded language task: a model that learned to sort letters from flawed demonstrations, and preferences.

Everything is made here from a seed: the tokenizer, the supervised start (a small transformer, trained from nothing in
seconds), and preference pairs, which a judge makes of the start's own samples. The task itself is `rlkit.envs.letters`.
A start that was trained once is kept in the cache folder, with the settings that made it in its name.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import annotated_types as limits
import torch

from rlkit import checkpoint, processes, registry
from rlkit.cache import cache_folder
from rlkit.config import Count, to_dict
from rlkit.envs.letters import ALPHABET, Letters, answers, demonstrations, label, model_config, prompts
from rlkit.errors import RlkitError, Stopped, UserError
from rlkit.lm import models
from rlkit.lm.bytes import character_tokenizer
from rlkit.rng import derive
from rlkit.signals import stop

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlkit.lm.trainer import LMTrainer

SUPERVISED: dict[str, Any] = {
    "per_device_train_batch_size": 128, "learning_rate": 5e-3, "warmup_steps": 0.05, "weight_decay": 0.01,
}  # fmt: skip
STARTED_BY = (
    "alphabet_size", "min_letters", "max_letters", "slip", "other_styles", "supervised_steps",
    "n_demonstrations",
)  # fmt: skip
"""Fields of the task that the supervised start depends on."""


@dataclass(frozen=True, kw_only=True)
class Task(Letters):
    """The letters task, and how well the model that training starts from has learned it."""

    supervised_steps: Count = 250
    """Optimiser steps on demonstrations that make the start of every trainer but `sft`."""
    n_demonstrations: Count = 20_000
    """Demonstrations to learn from."""
    n_prompts: Count = 2_000
    """Prompts whose sampled answers are compared."""
    n_eval_prompts: Count = 200
    """Held-out prompts."""
    n_answers: Annotated[int, limits.Ge(2)] = 4
    """Answers sampled for each prompt; every two different ones make a pair."""


def fresh_model(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The task's model with random weights, and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = character_tokenizer(ALPHABET)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "letters", "weights"))
        config = LlamaConfig(
            **model_config(len(tokenizer)),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return LlamaForCausalLM(config), tokenizer


def start_model(task: Task, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model after supervised learning from demonstrations, and its tokenizer."""
    made_by = {name: value for name, value in to_dict(task).items() if name in STARTED_BY}
    key = repr((made_by, seed, SUPERVISED, model_config(0), torch.__version__))
    folder = cache_folder() / f"letters-{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}"
    if checkpoint.verify(folder) is None:
        try:
            return _nameless(models.load_model(str(folder))), models.load_tokenizer(str(folder))
        except UserError:  # another process has just replaced it
            pass
    model, tokenizer = fresh_model(seed)
    sft: Any = registry.get("sft")
    with processes.alone():
        trainer = sft(
            model,
            processing_class=tokenizer,
            train_dataset=demonstration_rows(task, seed)[0],
            seed=seed,
            eval_fraction=0.0,
            **SUPERVISED,
        )
        try:
            trainer.learn(task.supervised_steps)
        except Stopped as stopped:
            name = stop.signal.name if stop.signal else "a signal"
            raise Stopped(
                f"stopped by {name} while the embedded task's start was trained: nothing of the run is lost; give the "
                "same command again"
            ) from stopped
    try:
        if checkpoint.verify(folder) is not None:  # nobody else was faster
            for path in (folder, *checkpoint.abandoned(folder.parent, folder.name)):
                shutil.rmtree(path, ignore_errors=True)
            trainer.save(folder)
    except (OSError, RlkitError):  # a cache that cannot be written
        pass
    return trainer.model, tokenizer


def _nameless(model: PreTrainedModel) -> PreTrainedModel:
    """`model` as if made in memory: an adapter of it names no folder of the cache, whether there was one or not."""
    model.name_or_path = model.config.name_or_path = ""
    return model


def preference_rows(trainer: LMTrainer, task: Task, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training, held-out) rows of `prompt, chosen, rejected`: the judge's labels of the model's own answers."""
    found = []
    splits: tuple[tuple[Literal["train", "test"], int], ...]
    splits = (("train", task.n_prompts), ("test", task.n_eval_prompts))
    for split, count in splits:
        asked = list(dict.fromkeys(prompts(task, count, seed, split)))
        sampled = trainer.sample(asked, task.n_answers, seed=derive(seed, "letters", split), max_new_tokens=24)
        assert sampled is not None  # nothing stops it
        found.append(
            [
                row
                for prompt, texts in zip(asked, sampled, strict=True)
                for row in label(task, prompt, [text for text in texts if text], seed)
            ]
        )
    return found[0], found[1]


def demonstration_rows(task: Task, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training, held-out) demonstrations; the held-out prompts are of the test split, with right answers."""
    asked = prompts(task, task.n_eval_prompts, seed, "test")
    held_out = [{"prompt": prompt, "completion": answers(prompt)["ascending"]} for prompt in asked]
    return [row for row in demonstrations(task, task.n_demonstrations, seed) if row["completion"]], held_out
