"""DPO: a causal language model fitted to pairwise preferences by a logistic loss, without reward model or sampling.

Paper: Rafailov et al., Direct Preference Optimization, arXiv:2305.18290. Equation numbers are its own unless another
paper is named. For a completion y of prompt x, h = log pi(y|x) - log pi_ref(y|x), sums over the completion's tokens;
the implicit reward is beta h. All losses here are functions of h of the chosen and of the rejected completion.

Deviations from the paper: AdamW with TRL's learning rate (1e-6) and linear decay instead of RMSprop with warm-up and a
constant rate (`optim: rmsprop`, `lr_scheduler_type: constant_with_warmup`, `warmup_steps: 150` give those).
Deviations from the authors' code: IPO averages log-probs over tokens, as its authors confirmed to TRL's; the summed
form of the code is `loss_type: ipo_sum`. The reference's log-probs are computed once, before training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import annotated_types as limits
import torch
from torch import Tensor
from torch.nn import functional as F

from rlkit.config import NonNegative, Positive
from rlkit.errors import UserError
from rlkit.lm.config import PairConfig
from rlkit.lm.pair_trainer import PairTrainer
from rlkit.lm.trainer import Columns, Scored, Totals

LossType = Literal[
    "sigmoid", "hinge", "ipo", "ipo_sum", "robust", "exo_pair", "nca_pair", "sppo_hard", "sigmoid_norm", "sft"
]


@dataclass(frozen=True, kw_only=True)
class DPOConfig(PairConfig):
    """Defaults are TRL's."""

    beta: Positive = 0.1
    """Strength of the pull towards the reference; the scale of the implicit reward."""
    loss_type: tuple[LossType, ...] = ("sigmoid",)
    """Pair losses, added up; see `pair_loss`. `sft` is the mean negative log-prob of the chosen tokens."""
    loss_weights: tuple[NonNegative, ...] = ()
    """Factors of the losses, one each; all 1 if not given."""
    label_smoothing: Annotated[float, limits.Interval(ge=0, lt=0.5)] = 0.0
    """Probability that a label is wrong, for sigmoid (conservative DPO), robust and exo_pair."""


def pair_loss(
    h_chosen: Tensor,
    h_rejected: Tensor,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    len_chosen: Tensor | None = None,
    len_rejected: Tensor | None = None,
) -> Tensor:
    """Loss of each pair, (B,), from log-ratios h (B,); D = h_chosen - h_rejected, s = sigmoid, e = label_smoothing.

    | loss_type | formula | source |
    |---|---|---|
    | sigmoid | -(1-e) log s(beta D) - e log s(-beta D) | Eq. 7; e > 0: Mitchell's note on conservative DPO |
    | hinge | max(0, 1 - beta D) | SLiC, arXiv:2305.10425, on log-ratios: RSO, arXiv:2309.06657 |
    | ipo | (D - 1 / (2 beta))^2, h divided by the completion's length | arXiv:2310.12036, Eq. 17 |
    | ipo_sum | (D - 1 / (2 beta))^2 | the same with sums |
    | robust | (-(1-e) log s(beta D) + e log s(-beta D)) / (1 - 2e) | arXiv:2403.00409; not bounded below |
    | exo_pair | KL of (s(beta D), s(-beta D)) from (1-e, e), e > 0 | arXiv:2402.00856, Eq. 16 |
    | nca_pair | -log s(r_w) - 1/2 log s(-r_w) - 1/2 log s(-r_l), r = beta h | arXiv:2402.05369 |
    | sppo_hard | (h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2 | arXiv:2405.00675, Eq. 4.7, P in {0, 1} |
    | sigmoid_norm | -log s(beta D), h divided by the completion's length | TRL |

    Args:
        len_chosen, len_rejected: (B,) trained tokens of each completion; for the losses that divide by them.
    """
    if loss_type in ("ipo", "sigmoid_norm"):
        if len_chosen is None or len_rejected is None:
            raise ValueError(f"{loss_type} needs the completions' lengths")
        h_chosen, h_rejected = h_chosen / len_chosen, h_rejected / len_rejected
    x = beta * (h_chosen - h_rejected)
    smooth = label_smoothing
    if loss_type in ("sigmoid", "sigmoid_norm"):
        return -(1 - smooth) * F.logsigmoid(x) - smooth * F.logsigmoid(-x)
    if loss_type == "hinge":
        return torch.relu(1 - x)
    if loss_type in ("ipo", "ipo_sum"):
        return (h_chosen - h_rejected - 1 / (2 * beta)).square()
    if loss_type == "robust":
        return (-(1 - smooth) * F.logsigmoid(x) + smooth * F.logsigmoid(-x)) / (1 - 2 * smooth)
    if loss_type == "exo_pair":
        log_p, log_q = F.logsigmoid(x), F.logsigmoid(-x)
        return log_p.exp() * (log_p - math.log1p(-smooth)) + log_q.exp() * (log_q - math.log(smooth))
    if loss_type == "nca_pair":
        r_chosen, r_rejected = beta * h_chosen, beta * h_rejected
        return -F.logsigmoid(r_chosen) - 0.5 * F.logsigmoid(-r_chosen) - 0.5 * F.logsigmoid(-r_rejected)
    if loss_type == "sppo_hard":
        return (h_chosen - 0.5 / beta).square() + (h_rejected + 0.5 / beta).square()
    raise ValueError(f"unknown loss_type {loss_type!r}")


class DPO(PairTrainer):
    """Direct preference optimisation; see the module's text."""

    Config = DPOConfig
    name = "dpo"
    default_task: ClassVar[Mapping[str, Any]] = {
        "data": "letters", "steps": 150, "beta": 0.5, "learning_rate": 3e-4, "per_device_train_batch_size": 64,
        "log_every": 25, "eval_every": 75, "eval_samples": 128, "eval_reward": ["rlkit.envs.letters:reward"],
        "eval_kl": True, "max_completion_length": 24,
    }  # fmt: skip

    def check(self) -> None:
        super().check()
        config: DPOConfig = self.config
        if config.loss_weights and len(config.loss_weights) != len(config.loss_type):
            raise UserError(
                f"`loss_weights`: got {len(config.loss_weights)}, but `loss_type` names {len(config.loss_type)} losses"
            )
        if not config.loss_type or len(set(config.loss_type)) < len(config.loss_type):
            raise UserError(f"`loss_type`: got {', '.join(config.loss_type) or 'none'}; name each loss once")
        smoothed = {"sigmoid", "robust", "exo_pair", "sigmoid_norm"} & set(config.loss_type)
        if config.label_smoothing > 0 and not smoothed:
            raise UserError(
                f"`label_smoothing`: {', '.join(config.loss_type)} has none; sigmoid, sigmoid_norm, robust and "
                "exo_pair have"
            )
        if "exo_pair" in config.loss_type and config.label_smoothing == 0:
            raise UserError(
                "`label_smoothing`: exo_pair needs more than 0, such as 1e-3 (its Eq. 16 takes its logarithm)"
            )

    def loss(self, out: Scored, batch: Columns, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        config: DPOConfig = self.config
        logp_chosen, logp_rejected = self.branch(out.sums(out.logp))
        h_chosen, h_rejected = self.branch(out.sums(out.logp - batch["ref_logp"]))
        len_chosen, len_rejected = self.branch(out.lengths)
        each = torch.zeros_like(h_chosen)
        loss = torch.zeros((), device=each.device)
        for kind, factor in zip(config.loss_type, config.loss_weights or [1.0] * len(config.loss_type), strict=True):
            if kind == "sft":  # mean over all chosen tokens of the step, so that batches may be split at will
                each = each + factor * (-logp_chosen) * (totals.units / totals.tokens[0])
            else:
                each = each + factor * batch["weight"] * pair_loss(
                    h_chosen, h_rejected, config.beta, kind, config.label_smoothing, len_chosen, len_rejected
                )
        loss = each.sum() / totals.units
        reward_chosen, reward_rejected = config.beta * h_chosen.detach(), config.beta * h_rejected.detach()
        return loss, {
            "loss": each.detach(),
            "rewards/chosen": reward_chosen,
            "rewards/rejected": reward_rejected,
            "rewards/accuracies": (reward_chosen > reward_rejected).float(),
            "rewards/margins": reward_chosen - reward_rejected,
            "logps/chosen": logp_chosen.detach(),
            "logps/rejected": logp_rejected.detach(),
        }
