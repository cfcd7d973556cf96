"""Optimiser and learning-rate schedule of language trainers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rlkit.lm.config import LMConfig


def make_optimizer(model: nn.Module, config: LMConfig) -> torch.optim.Optimizer:
    """`config.optim` over the trainable parameters of `model`; weight decay is for matrices alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optim == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate)
    if config.optim == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=config.learning_rate)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def schedule(config: LMConfig, horizon: int) -> Callable[[int], float]:
    """The learning rate before each update, as a function of the updates made; `horizon` of them in all.

    The shapes are those of transformers.
    """
    from transformers import get_scheduler

    warmup = config.warmup_steps * (horizon if config.warmup_steps < 1 else 1)
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    made: Any = get_scheduler(config.lr_scheduler_type, dummy, math.ceil(warmup), horizon)
    factor = made.lr_lambdas[0]
    return lambda updates: config.learning_rate * float(factor(min(updates, horizon)))
