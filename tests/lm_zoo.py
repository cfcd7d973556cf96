"""Tiny language models and preference rows for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlkit.lm.bytes import byte_tokenizer

PAIRS = [
    {"prompt": "Name a colour.", "chosen": " Blue, as the sea.", "rejected": " Dog."},
    {"prompt": "Name an animal that flies.", "chosen": " A swallow.", "rejected": " A stone, maybe two."},
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5 or so"},
    {"prompt": "Say hello politely, please.", "chosen": " Good morning to you!", "rejected": " Hey"},
    {"prompt": "Is ice cold?", "chosen": " Yes.", "rejected": " Ice is a word of three letters."},
    {"prompt": "Where does the sun rise?", "chosen": " In the east.", "rejected": " It does not."},
]
"""Six pairs of different lengths."""


def tiny_llama(seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """A Llama of two layers over bytes, with noticeable weights, and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **{"max_position_embeddings": 256, **options},
        )
        return LlamaForCausalLM(config), tokenizer


def tiny_classifier(seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """A sequence classifier with one label on the body of `tiny_llama`, its head as noticeable, and its tokenizer."""
    from transformers import LlamaForSequenceClassification

    language, tokenizer = tiny_llama(seed, num_labels=1, **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        model = LlamaForSequenceClassification(language.config)
    model.model.load_state_dict(language.model.state_dict())
    return model, tokenizer


def saved_classifier(folder: Path, seed: int = 0, **options: Any) -> str:
    """The folder of `tiny_classifier`."""
    model, tokenizer = tiny_classifier(seed, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def saved_llama(folder: Path, seed: int = 0, **options: Any) -> str:
    """The folder of `tiny_llama`."""
    model, tokenizer = tiny_llama(seed, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
