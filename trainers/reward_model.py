"""RewardModel: a scalar reward of completions fitted to preference pairs by the Bradley-Terry likelihood.

Paper: Ouyang et al., Training language models to follow instructions with human feedback, arXiv:2203.02155, Eq. 1; the
centring term is Eq. 2 of arXiv:2312.09244, the margin that of Llama 2, arXiv:2307.09288, Eq. 2.
Deviations from the paper: one pair counts once, whatever the number of answers that its prompt had; AdamW with TRL's
learning rate (1e-4) and linear decay.

The model is a transformers sequence classifier with one label, and the reward is its logit as transformers computes it:
for a decoder, a linear layer on the last hidden state at the last token that is no padding. Rows are TRL's: prompt,
completion and end token as one text, or the chat template's rendering; a pair with a row longer than `max_length` is
left out. So `rlkit.rewards.text.ModelReward`, TRL and transformers read the same number from the saved folder. Where
the padding token is the end token (also where there is none of its own, as TRL has it), that is the logit before the
end token. Different from TRL's rows: a template that writes no end token gets one, and an empty prompt a start token
(see `rlkit.lm.tokens`). Different from TRL's metrics: the smallest and largest reward are those of the optimiser step,
or of the whole evaluation, and not means over its passes, so they do not depend on how it is cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlkit.config import NonNegative, Whole
from rlkit.errors import UserError
from rlkit.lm import models
from rlkit.lm.config import PairConfig
from rlkit.lm.opening import Opened
from rlkit.lm.pair_trainer import PairTrainer
from rlkit.lm.trainer import Columns, Totals
from rlkit.trainer import Batch

MEANINGLESS = {
    "completion_only": "rows are read whole",
    "assistant_only": "rows are read whole",
    "ref_model": "there is no reference",
    "eval_samples": "a classifier samples nothing",
    "eval_reward": "a classifier samples nothing",
    "eval_kl": "a classifier samples nothing",
}
"""Fields of the family that a reward model cannot obey, and why; another value than the default is refused."""


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(PairConfig):
    """Defaults are TRL's."""

    learning_rate: NonNegative = 1e-4
    """Step size of the optimiser at its height."""
    center_rewards_coefficient: NonNegative = 0.0
    """Weight of the squared sum of a pair's rewards, which fixes the constant that pairs leave open."""
    truncation_mode: Literal["keep_end", "drop"] = "drop"
    """`drop` leaves out pairs with a row longer than `max_length`; `keep_end` cuts the beginning of long rows. A row
    without its end has no reward."""
    completion_only: bool = False
    """Rows are read whole."""
    eval_samples: Whole = 0
    """A reward model samples nothing."""


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(r_w - r_l - margin) of each pair: (B,), (B,) -> (B,). Eq. 1."""
    return -F.logsigmoid(chosen - rejected - margin)


class Judge(nn.Module):
    """A sequence classifier whose call gives the reward of each row, (C, L) tokens and (C,) lengths -> (C,) float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.scored = model

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        attention = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        tokens = tokens.masked_fill(~attention, models.unwrapped(self.scored).config.get_text_config().pad_token_id)
        out: Tensor = self.scored(input_ids=tokens, attention_mask=attention.long(), use_cache=False).logits
        return out[:, 0].float()


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

    def check(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self.Config)}
        for name, why in MEANINGLESS.items():
            if getattr(self.config, name) != defaults[name]:
                raise UserError(f"`{name}`: reward_model has no use for it, {why}; leave it out")
        if "ref_model" in self._given:
            raise UserError("`ref_model`: reward_model has no use for it, there is no reference; leave it out")
        if self.config.batching not in ("auto", "plain"):
            raise UserError(f"`batching`: got {self.config.batching}; reward_model computes `plain` rows only")
        task = getattr(self._given.get("peft_config"), "task_type", None)
        if task not in (None, self.task_type):
            raise UserError(f"`peft_config`: its task_type is {task}; a reward model needs {self.task_type}")

    def open_model(self, checkpoint: Path | None) -> Opened:
        """A classifier with one label, which pads as its tokenizer does.

        Raises:
            UserError: the model is none, or an adapter leaves its new head at random weights.
        """
        opened = super().open_model(checkpoint)
        model, tokenizer = opened.model, opened.tokenizer
        inner = models.unwrapped(model)
        kind = type(inner).__name__
        if not any("ForSequenceClassification" in base.__name__ for base in type(inner).__mro__):
            raise UserError(
                f"`model`: {kind} gives no reward; give its folder, whose model gets a head, or "
                "`AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)`"
            )
        if inner.config.num_labels != 1:
            raise UserError(f"`model`: the {kind} has {inner.config.num_labels} labels; a reward model has one")
        head = [(n, p) for n, p in inner.named_parameters() if not n.startswith(f"{inner.base_model_prefix}.")]
        if head and not any(p.requires_grad for _, p in head):
            names = ", ".join(sorted({name.split(".")[0] for name, _ in head}))
            if self._new:
                raise UserError(
                    f"`peft_config`: the head `{names}` is new, and would stay at its random weights; set "
                    f'`task_type="{self.task_type}"` or `modules_to_save=["{names}"]`'
                )
            self.notes.append(f"the head `{names}` is not trained")
        if self._new:
            self.notes.append(f"new weights, drawn by the seed: {', '.join(self._new)}")
        models.pad_as(model, tokenizer)
        if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
            self.notes.append(
                f"the padding token is the end token {tokenizer.eos_token}: rewards are read before it, as "
                "transformers and TRL do; a padding token of its own lets the end count"
            )
        return opened

    def load_model(self, source: str, what: str = "model") -> nn.Module:
        attention = self.config.attn_implementation
        model, self._new = models.load_classifier(source, attn_implementation=attention, what=what)
        return model

    _new: Sequence[str] = ()
    """Names of weights that no file had."""
    _seen: list[Tensor]
    """Rewards of the passes of the present update or evaluation."""

    def embedded_start(self) -> tuple[nn.Module, Any]:
        model, tokenizer = super().embedded_start()
        self._new = ["score.weight"]
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
        """(C,) rewards of the completions in `batch`."""
        with self.autocast():
            rewards: Tensor = self.called(batch["tokens"].long(), batch["tokens_length"])
        return rewards

    def batch_loss(self, batch: Columns, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        rewards = self.rewards(batch)
        self._seen.append(rewards.detach())
        chosen, rejected = self.branch(rewards)
        each = bradley_terry_loss(chosen, rejected, batch["margin"])
        each = batch["weight"] * (each + self.config.center_rewards_coefficient * (chosen + rejected).square())
        return each.sum() / totals.units, {
            "loss": each.detach(),
            "accuracy": (chosen > rejected).float(),
            "margin": (chosen - rejected).detach(),
            "mean_reward": ((chosen + rejected) / 2).detach(),
        }

    def update(self, batch: Batch) -> Mapping[str, Tensor]:
        self._seen = []
        metrics = super().update(batch)
        return {**metrics, **self._extremes()}

    def evaluate(
        self, episodes: int | None = None, *, seed: int | None = None, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Any] | None:
        self._seen = []
        record = super().evaluate(episodes, seed=seed, should_stop=should_stop)
        if record is None:
            return None
        return {**record, **{f"eval_{name}": float(value) for name, value in self._extremes().items()}}

    def _extremes(self) -> dict[str, Tensor]:
        """Of all processes: each puts its own into a place of its own, which are then added up."""
        seen, group = torch.cat(self._seen), self.processes
        found = seen.new_zeros(2, group.size)
        found[:, group.rank] = torch.stack([seen.amin(), seen.amax()])
        found = group.sum(found)
        return {"min_reward": found[0].amin(), "max_reward": found[1].amax()}

    def evaluate_samples(self, seed: int, should_stop: Callable[[], bool]) -> dict[str, Any]:
        return {}
