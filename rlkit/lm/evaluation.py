"""Evaluation of language trainers: the loss's metrics on held-out units, and sampled completions with their rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rlkit.lm.layout import Row
from rlkit.lm.reference import sampled_kl
from rlkit.rewards.text import mean_of

if TYPE_CHECKING:
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
    prompts = _prompts(trainer, config.eval_samples)
    if not prompts:
        return {}
    found = trainer.generate(prompts, 1, seed=seed, should_stop=should_stop)
    if found is None:
        return None
    asked, answered = (
        trainer.tokenizer.batch_decode(tokens, skip_special_tokens=True) for tokens in (prompts, found.tokens)
    )
    record: dict[str, Any] = {"eval_completion_length": float(np.mean([len(t) for t in found.tokens]))}
    if config.eval_reward:
        functions = trainer.eval_rewards
        scores = functions.score(asked, answered)
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


def _prompts(trainer: LMTrainer, count: int) -> list[np.ndarray]:
    """The first `count` different prompts of the held-out units, as tokens."""
    prompts: dict[bytes, np.ndarray] = {}
    for row in trainer.eval_units[trainer.branches[0]].tolist():
        if len(prompts) == count:
            break
        one = trainer.completions.rows([row])
        tokens = one["tokens"][0, : int(one["prompt_length"][0])].cpu().numpy()
        prompts.setdefault(tokens.tobytes(), tokens)
    return list(prompts.values())
