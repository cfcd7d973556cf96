"""Evaluation of language trainers: the loss's metrics on held-out units, and sampled completions with their rewards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rlkit.lm.layout import Row
from rlkit.lm.logps import positions
from rlkit.lm.reference import sampled_kl
from rlkit.rewards.text import mean_of

if TYPE_CHECKING:
    from rlkit.envs.preferences import TextData
    from rlkit.lm.trainer import LMTrainer

EXAMPLES = 8  # sampled completions shown in eval.jsonl


def held_out(trainer: LMTrainer, count: int, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
    """Means over the first `count` held-out units, divided among the processes; None if stopped."""
    group = trainer.processes
    ids = torch.arange(count, device=trainer.device)
    order = trainer.unit_lengths(trainer.eval_units)[:count].argsort(stable=True, descending=True)
    by_length = ids[order.to(trainer.device)]
    totals = trainer.totals(trainer.eval_units, ids)
    values: dict[str, list[Tensor]] = {}
    loss = 0.0
    for part, counts in trainer.shares(by_length, trainer.config.per_device_eval_batch_size):
        if group.any(should_stop()):
            return None
        with torch.no_grad():
            share, each = trainer.batch_loss(trainer.columns(trainer.eval_units, part), totals)
        loss += float(share) * counts
        for name, value in each.items():
            values.setdefault(name, []).append(value if counts else value[:0])
    everything = group.gather((loss, {name: torch.cat(value).cpu() for name, value in values.items()}))
    record: dict[str, Any] = {
        f"eval_{name}": float(torch.cat([each[name] for _, each in everything]).mean()) for name in values
    }
    return record | {"eval_loss": sum(share for share, _ in everything), "eval_units": count}


def samples(trainer: LMTrainer, seed: int, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
    """A completion for each of some held-out prompts: a few to read, their rewards, and KL(policy || reference)."""
    config = trainer.config
    found_prompts = _prompts(trainer, config.eval_samples)
    if not found_prompts:
        return {}
    ids, prompts = zip(*found_prompts, strict=True)
    found = trainer.generate(prompts, 1, seed=seed, should_stop=should_stop)
    if found is None:
        return None
    asked, answered = (
        trainer.tokenizer.batch_decode(tokens, skip_special_tokens=True) for tokens in (prompts, found.tokens)
    )
    record: dict[str, Any] = {"eval_completion_length": float(np.mean([len(t) for t in found.tokens]))}
    if config.eval_reward:
        functions = trainer.eval_rewards
        scores = functions.score(
            asked,
            answered,
            _columns(trainer, ids),
            completion_ids=[tokens.tolist() for tokens in found.tokens],
            trainer_state=SimpleNamespace(global_step=trainer.clock, max_steps=trainer.target),
        )
        record["eval_reward"] = mean_of(scores.total)
        if len(functions.names) > 1:
            columns = zip(functions.names, scores.values.T, strict=True)
            record |= {f"eval_rewards/{name}/mean": mean_of(values) for name, values in columns}
    if config.eval_kl:
        rows = [
            Row(np.concatenate([p, y]), np.arange(len(p) + len(y)) >= len(p), len(p))
            for p, y in zip(prompts, found.tokens, strict=True)
        ]
        record["eval_kl"] = sampled_kl(trainer, rows, config.per_device_eval_batch_size * len(trainer.branches))
    shown = zip(asked[:EXAMPLES], answered[:EXAMPLES], strict=True)
    return {**record, "samples": [{"prompt": p, "completion": c} for p, c in shown]}


def columns_of(data: TextData) -> dict[str, dict[str, Any]]:
    """What the records have besides their texts, for reward functions: number of the record -> column -> value.

    Columns whose values JSON cannot hold are left out; so are records without any.
    """
    found = {str(n): {k: v for k, v in r.columns.items() if _is_json(v)} for n, r in enumerate(data.records)}
    return {n: columns for n, columns in found.items() if any(v is not None for v in columns.values())}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _columns(trainer: LMTrainer, ids: Sequence[int]) -> dict[str, list[Any]]:
    """Columns of the held-out records `ids`, None where a record has none."""
    rows = [trainer.held_columns.get(str(n), {}) for n in ids]
    return {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def _prompts(trainer: LMTrainer, count: int) -> list[tuple[int, np.ndarray]]:
    """The first `count` different prompts of the held-out units that leave room for a completion, or, where none does,
    of all: number of the record, tokens."""
    limit = positions(trainer.model)
    room = math.inf if limit is None else limit - trainer.config.max_completion_length
    if not (trainer.completions["prompt_length"][trainer.eval_units[trainer.branches[0]]] <= room).any():
        room = math.inf  # sampling will say why it cannot
    prompts: dict[bytes, tuple[int, np.ndarray]] = {}
    for row in trainer.eval_units[trainer.branches[0]].tolist():
        if len(prompts) == count:
            break
        one = trainer.completions.rows([row])
        tokens = one["tokens"][0, : int(one["prompt_length"][0])].cpu().numpy()
        if len(tokens) <= room:
            prompts.setdefault(tokens.tobytes(), (int(one["prompt_id"][0]), tokens))
    return list(prompts.values())
