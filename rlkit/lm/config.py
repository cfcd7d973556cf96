"""Configuration of trainers of language models, under TRL's names where it has the field."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import annotated_types as limits

from rlkit.config import Count, NonNegative, Positive, RunConfig, Whole
from rlkit.errors import UserError
from rlkit.lm import embedded


@dataclass(frozen=True, kw_only=True)
class LMConfig(RunConfig):
    """Model, data and optimisation, under TRL's names."""

    model: str | None = None
    """Folder or hub name of a causal language model (safetensors); None for an object given in Python."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; None takes the model's."""
    chat_template: str | None = None
    """Jinja template, as a file or a text, for conversations where the tokenizer brings none."""
    data: str | None = None
    """Training data: JSON, JSONL (also .gz) or Parquet file, folder, hub name; `letters` is the embedded task, which
    brings its own model."""
    eval_data: str | None = None
    """Held-out data; without it, `eval_fraction` of the prompts is held out."""
    eval_fraction: Annotated[float, limits.Interval(ge=0, lt=1)] = 0.05
    """Share of the prompts held out for evaluation where there is no `eval_data`."""
    map: dict[str, str] = field(default_factory=dict)
    """Columns of the data by our names, as `prompt=question` pairs."""
    on_bad_row: Literal["error", "drop"] | None = None
    """What bad rows do; by default they are dropped and counted up to 1 %, and beyond that an error."""
    max_length: Count | Literal["auto"] | None = "auto"
    """Tokens of prompt and completion together; longer ones are cut. `auto` is 1024, or the model's positions where
    these are fewer; None cuts nothing."""
    truncation_mode: Literal["keep_start", "keep_end", "drop"] = "keep_start"
    """Which end of a long row stays; `drop` leaves long rows out."""
    boundary: Literal["error", "split", "common"] = "error"
    """What happens where tokens merge across the end of a prompt: an error, the completion tokenised apart, or (TRL's
    reading) a completion that begins where the tokens diverge."""
    completion_only: bool = True
    """Train on completions; false trains the prompts as well (supervised fine-tuning)."""
    assistant_only: bool = False
    """Of conversations, train on the assistant's turns only."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Passed to the chat template, such as `enable_thinking=false`."""
    split_special_tokens: bool = False
    """Let the text of a special token inside the data stay text."""
    per_device_train_batch_size: Count = 8
    """Units (pairs, completions) of a forward pass."""
    gradient_accumulation_steps: Count = 1
    """Forward passes of an optimiser step."""
    per_device_eval_batch_size: Count = 8
    """Units of a forward pass in evaluations."""
    num_train_epochs: Positive = 1.0
    """Passes over the data where `steps` is not given."""
    learning_rate: NonNegative = 1e-6
    """Step size of the optimiser at its height."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Schedule of the learning rate, as transformers has it; `linear` and `cosine` end at zero."""
    warmup_steps: NonNegative = 0.0
    """Optimiser steps in which the learning rate rises; below 1, a fraction of all."""
    optim: Literal["adamw", "rmsprop", "sgd"] = "adamw"
    """Optimiser, with PyTorch's defaults but for what follows."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of matrices, not of biases and norms (adamw)."""
    adam_beta1: Annotated[float, limits.Interval(ge=0, lt=1)] = 0.9
    """Decay of the first moment (adamw)."""
    adam_beta2: Annotated[float, limits.Interval(ge=0, lt=1)] = 0.999
    """Decay of the second moment (adamw)."""
    adam_epsilon: Positive = 1e-8
    """Added to the denominator (adamw)."""
    max_grad_norm: NonNegative = 1.0
    """Norm to which gradients are clipped; 0 does not clip."""
    disable_dropout: bool = True
    """Turn dropout off, as log-ratios need it."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    fsdp: bool = False
    """Divide weights, gradients and optimiser among the processes (PyTorch's FSDP2) instead of copying them."""
    attn_implementation: str | None = None
    """Attention of transformers: `sdpa`, `eager`, …; None takes the model's choice."""
    use_peft: bool = False
    """Train a LoRA adapter instead of all weights; the reference is then the model without it."""
    lora_r: Count = 16
    """Rank of the adapter."""
    lora_alpha: Positive = 32.0
    """The adapter's output is scaled by `lora_alpha / lora_r`."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Modules that get an adapter, by name."""
    batching: Literal["auto", "packed", "shared", "plain"] = "auto"
    """`shared` computes a prompt once for its completions, `packed` also puts several prompts into a row, `plain` does
    neither. `auto` is `shared` in passes where that is cheaper, else `plain`. Whatever is not `plain` is verified on
    this model before it is used."""
    packing_length: Count = 512
    """Tokens up to which a packed row is filled."""
    group_by_length: bool = True
    """Make batches of units of similar length; the order stays a function of seed and epoch."""
    logits_memory: Positive = 256.0
    """MiB of logits that exist at once."""
    reference_cache: bool = True
    """Keep the reference's log-probs on disk, for later runs of the same model and rows."""
    checkpoint_every: Count = 500
    """Steps between checkpoints; a run always ends with one."""
    log_every: Count = 10
    """Steps between records of metrics."""
    eval_every: Count = 200
    """Steps between evaluations; there is one before training and one after."""
    eval_episodes: Whole = 256
    """Held-out units of an evaluation; 0 turns evaluation off."""
    eval_samples: Whole = 4
    """Held-out prompts with a sampled completion at each evaluation, of those that leave the model room for one;
    `eval.jsonl` shows the first ones as `samples`."""
    max_completion_length: Count = 128
    """Tokens of a sampled completion."""
    eval_reward: tuple[str, ...] = ()
    """Reward functions, `module:function`, that score the sampled completions of evaluations."""
    eval_kl: bool = False
    """Estimate KL(policy || reference) on the sampled completions of evaluations."""
    letters: embedded.Task = field(default_factory=embedded.Task)
    """The embedded task, for `data: letters`."""


def refuse_idle(config: LMConfig) -> None:
    """Refuse options that would do nothing beside the others.

    Raises:
        UserError: naming the option and the one that it needs.
    """
    if config.compile == "on":
        raise UserError("`compile`: language trainers are not compiled; leave `on` out")
    lora, adam = ("use_peft", config.use_peft), ("optim adamw", config.optim == "adamw")
    needs = {
        **dict.fromkeys(("lora_r", "lora_alpha", "lora_target_modules"), lora),
        **dict.fromkeys(("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"), adam),
        "packing_length": ("batching packed", config.batching == "packed"),
    }
    defaults = {one.name: one.default for one in dataclasses.fields(LMConfig)}
    for name, (needed, given) in needs.items():
        if not given and getattr(config, name) != defaults[name]:
            raise UserError(f"`{name}` has no effect without `--{needed}`; add that, or leave `{name}` out")


@dataclass(frozen=True, kw_only=True)
class PairConfig(LMConfig):
    """Preference pairs."""

    ref_model: str | None = None
    """Folder or hub name of the reference; None takes the model that training starts from."""
    pairing: Literal["best_vs_worst", "best_vs_rest", "adjacent", "all"] = "best_vs_worst"
    """Which pairs are made of ranked completions."""
    pairing_margin: NonNegative = 0.0
    """Score difference up to which two completions make no pair."""
