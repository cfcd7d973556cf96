"""What a language trainer starts from: model, adapter and tokenizer, from Python objects or from folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from rlkit.errors import UserError
from rlkit.lm import models

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlkit.lm.trainer import LMTrainer


@dataclass(frozen=True)
class Opened:
    """The model to train, with its adapter, and its tokenizer."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    adapter_is_new: bool
    """The run adds the adapter, so that the model without it is what training starts from."""


def open_model(trainer: LMTrainer, checkpoint: Path | None) -> Opened:
    """The model to train and its tokenizer.

    Args:
        checkpoint: the folder of the checkpoint that is about to be loaded: a model, or an adapter alone.

    Raises:
        UserError: there is no model, it is not one of transformers, or it has no trainable weight.
    """
    config = trainer.config
    model, tokenizer = trainer.given("model"), trainer.given("processing_class")
    adapter = checkpoint if checkpoint is not None and (checkpoint / "adapter_config.json").exists() else None
    start = str(checkpoint) if checkpoint is not None and adapter is None else config.model
    if model is None and start is None and trainer.starts_embedded:
        with trainer.processes.main_first():  # it leaves the model in the cache
            model, made = trainer.embedded_start()
        tokenizer = tokenizer or made
    if model is None and start is None:
        raise UserError(
            f"`model`: {trainer.name} needs a causal language model: --model FOLDER or a name on the hub"
            + (", and --data" if config.data is None else "")
        )
    if model is None:
        model = trainer.load_model(start)
    if not isinstance(model, nn.Module) or not hasattr(models.unwrapped(model), "get_output_embeddings"):
        raise UserError(f"`model`: expected a causal language model of transformers, got {type(model).__name__}")
    if trainer.given("model") is not None and config.attn_implementation is not None:
        models.set_attention(model, config.attn_implementation)
    if tokenizer is None:
        source = config.tokenizer or start or getattr(models.unwrapped(model), "name_or_path", "")
        if not source:
            raise UserError("`tokenizer`: the model names no folder; pass `processing_class=tokenizer`")
        tokenizer = models.load_tokenizer(source)
    adapts = config.use_peft or trainer.given("peft_config") is not None
    adds = adapts or (adapter is not None and not models.is_adapted(model))
    if adds:
        model = _with_adapter(trainer, model, adapter)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("`model`: no weight of it is trainable (requires_grad is false for all)")
    return Opened(model, tokenizer, adds)


def _with_adapter(trainer: LMTrainer, model: Any, saved: Path | None) -> nn.Module:
    """`model` with a new adapter, of the kind in the folder `saved` if there is one."""
    if models.is_adapted(model):
        raise UserError("`use_peft`: the model has an adapter already, which is trained; leave `use_peft` out")
    from peft import LoraConfig, PeftConfig

    config, modules = trainer.config, trainer.config.lora_target_modules
    if trainer.given("peft_config") is not None and config.use_peft:
        raise UserError("`use_peft` makes an adapter of the `lora_` fields; with `peft_config` leave it out")
    if saved is not None:
        lora = PeftConfig.from_pretrained(str(saved))
        lora.inference_mode = False
        return models.add_adapter(model, lora)
    lora = trainer.given("peft_config") or LoraConfig(
        task_type=trainer.task_type,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules=modules[0] if len(modules) == 1 else list(modules),
    )
    return models.add_adapter(model, lora)
