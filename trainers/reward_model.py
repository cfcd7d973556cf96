"""RewardModel: a scalar reward of completions fitted to preference pairs by the Bradley-Terry likelihood.

Paper: Ouyang et al., Training language models to follow instructions with human feedback, arXiv:2203.02155, Eq. 1; the
centring term is Eq. 2 of arXiv:2312.09244, the margin that of Llama 2, arXiv:2307.09288, Eq. 2.
Deviations from the paper: one pair counts once, whatever the number of answers that its prompt had; AdamW with TRL's
learning rate (1e-4) and linear decay. The model is a transformers sequence classifier with one label: the last hidden
state at the completion's last token, through a linear layer. `rlkit.rewards.text.ModelReward` and TRL take the folder
as a reward function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlkit.config import NonNegative, Whole
from rlkit.lm import models
from rlkit.lm.config import PairConfig
from rlkit.lm.pair_trainer import PairTrainer
from rlkit.lm.trainer import Columns, Totals


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(PairConfig):
    """Defaults are TRL's."""

    learning_rate: NonNegative = 1e-4
    """Step size of the optimiser at its height."""
    center_rewards_coefficient: NonNegative = 0.0
    """Weight of the squared sum of a pair's rewards, which fixes the constant that pairs leave open."""
    eval_samples: Whole = 0
    """A reward model samples nothing."""


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(r_w - r_l - margin) of each pair: (B,), (B,) -> (B,). Eq. 1."""
    return -F.logsigmoid(chosen - rejected - margin)


class Judge(nn.Module):
    """A sequence classifier whose call gives the reward of each row, (C, L) tokens and (C,) lengths -> (C,)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.scored = model

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        base, head = models.classifier_parts(self.scored)
        attention = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        hidden = base(input_ids=tokens, attention_mask=attention.long(), use_cache=False).last_hidden_state
        rewards: Tensor = head(hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1])
        return rewards.squeeze(-1).float()


class RewardModel(PairTrainer):
    """Bradley-Terry reward model; see the module's text."""

    Config = RewardModelConfig
    name = "reward_model"
    task_type = "SEQ_CLS"
    uses_reference = False
    default_task: ClassVar[Mapping[str, Any]] = {
        "data": "letters", "steps": 150, "learning_rate": 1e-3, "per_device_train_batch_size": 32, "log_every": 25,
        "eval_every": 75,
    }  # fmt: skip

    def load_model(self, source: str) -> nn.Module:
        return models.load_classifier(source, attn_implementation=self.config.attn_implementation)

    def embedded_start(self) -> tuple[nn.Module, Any]:
        model, tokenizer = super().embedded_start()
        return models.classifier_of(model), tokenizer

    def embedded_data(self) -> tuple[Any, Any]:
        """The answers are those of the supervised model, not of the classifier made of it."""
        classifier = self.model
        self.model = super().embedded_start()[0].to(self.device)
        try:
            return super().embedded_data()
        finally:
            self.model = classifier

    def choose_batching(self) -> None:
        self.batching = "plain"

    def scorer(self, model: nn.Module) -> nn.Module:
        return Judge(model)

    def rewards(self, batch: Columns) -> Tensor:
        """(C,) rewards of the completions in `batch`, read at their last tokens."""
        with self.autocast():
            rewards: Tensor = self.called(batch["tokens"].long(), batch["tokens_length"])
        return rewards

    def batch_loss(self, batch: Columns, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = self.branch(self.rewards(batch))
        each = batch["weight"] * bradley_terry_loss(chosen, rejected, batch["margin"])
        each = each + self.config.center_rewards_coefficient * (chosen + rejected).square()
        return each.sum() / totals.units, {
            "loss": each.detach(),
            "accuracy": (chosen > rejected).float(),
            "margin": (chosen - rejected).detach(),
            "mean_reward": ((chosen + rejected) / 2).detach(),
        }

    def evaluate_samples(self, seed: int, should_stop: Callable[[], bool]) -> dict[str, Any]:
        return {}
