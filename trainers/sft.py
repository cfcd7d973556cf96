"""SFT: a causal language model fitted to demonstrations by maximum likelihood; where preference methods start from.

Paper: Ouyang et al., Training language models to follow instructions with human feedback, arXiv:2203.02155, section
3.5, step 1. Data: prompts with completions, conversations, or plain text.
Deviations from the paper: AdamW with TRL's learning rate (2e-5) and linear decay instead of a cosine schedule over 16
epochs; no dropout. The loss is the mean over all trained tokens of an optimiser step, so it does not depend on how the
step is cut into passes; of a conversation or a prompt with completion, only the completion is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rlkit.config import NonNegative
from rlkit.envs import preferences
from rlkit.errors import UserError
from rlkit.lm import embedded
from rlkit.lm.config import LMConfig
from rlkit.lm.trainer import Columns, LMTrainer, Scored, Totals


@dataclass(frozen=True, kw_only=True)
class SFTConfig(LMConfig):
    """Defaults are TRL's."""

    learning_rate: NonNegative = 2e-5
    """Step size of the optimiser at its height."""


def token_loss(logp: Tensor, tokens: int) -> Tensor:
    """-(1 / tokens) sum_i log p_i for the log-probs (N,) of trained tokens, `tokens` of them in the whole step."""
    return -logp.sum() / tokens


class SFT(LMTrainer):
    """Supervised fine-tuning; see the module's text."""

    Config = SFTConfig
    name = "sft"
    default_task: ClassVar[Mapping[str, Any]] = {
        "data": "letters", "steps": 250, "log_every": 25, "eval_every": 125, "eval_samples": 128,
        "eval_reward": ["rlkit.envs.letters:reward"], "max_completion_length": 24, **embedded.SUPERVISED,
    }  # fmt: skip

    def embedded_start(self) -> tuple[nn.Module, Any]:
        return embedded.fresh_model(self.config.seed)

    def embedded_data(self) -> tuple[Any, Any]:
        return embedded.demonstration_rows(self.config.letters, self.config.seed)

    def add_units(self, units: Any, data: preferences.TextData) -> None:
        if data.kind == "prompts":
            raise UserError(f"{data.name} holds prompts only; sft needs completions, or texts")
        # Of ranked and unpaired rows, and of pairs, the preferred completion is the demonstration.
        wanted = [r for r, record in enumerate(data.records) if record.label is not False]
        rows = self.add_completions(
            [data.records[r].prompt for r in wanted],
            [data.records[r].completions[_best(data.records[r])] for r in wanted],
            wanted,
            [data.records[r].row for r in wanted],
            data.name,
        )
        units.add({"completion": torch.tensor([row for row in rows if row is not None], dtype=torch.int64)})

    def loss(self, out: Scored, batch: Columns, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        share = totals.units / totals.tokens[0]  # so that the mean over units is the mean over tokens
        return token_loss(out.logp, totals.tokens[0]), {"loss": -out.sums(out.logp).detach() * share}


def _best(record: preferences.Record) -> int:
    """The index of the demonstration among a record's completions."""
    return 0 if record.scores is None else max(range(len(record.scores)), key=record.scores.__getitem__)
