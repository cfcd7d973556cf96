"""Tiny models of many families, rows for them, and the oracle: every completion by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlkit.lm.layout import Row

V, WINDOW = 61, 8


def tiny(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model of a family with random weights, large enough that attention matters, in evaluation mode."""
    import transformers as t

    common = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    llama = {**common, "num_key_value_heads": 2, "intermediate_size": 40, "head_dim": 8, "max_position_embeddings": 256}
    sliding = {"sliding_window": WINDOW}
    mixed = {**sliding, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    configs: dict[str, Any] = {
        "llama": lambda: t.LlamaConfig(**llama),
        "mistral": lambda: t.MistralConfig(**llama, **sliding),
        "qwen2": lambda: t.Qwen2Config(**llama),
        "qwen2 sliding": lambda: t.Qwen2Config(**llama, **sliding, use_sliding_window=True, max_window_layers=1),
        "qwen3": lambda: t.Qwen3Config(**llama),
        "qwen3 sliding": lambda: t.Qwen3Config(**llama, **sliding, use_sliding_window=True, max_window_layers=1),
        "gemma2": lambda: t.Gemma2Config(**llama, **mixed, query_pre_attn_scalar=8),
        "gemma3": lambda: t.Gemma3TextConfig(**llama, **mixed, query_pre_attn_scalar=8),
        "cohere2": lambda: t.Cohere2Config(**llama, **mixed),
        "gpt2": lambda: t.GPT2Config(vocab_size=V, n_embd=32, n_layer=3, n_head=4, n_positions=256),
        "neox": lambda: t.GPTNeoXConfig(**common, intermediate_size=40, max_position_embeddings=256),
        "phi3": lambda: t.Phi3Config(**llama, **sliding, pad_token_id=0),
        "opt": lambda: t.OPTConfig(**common, ffn_dim=40, word_embed_proj_dim=32, max_position_embeddings=256),
        "bloom": lambda: t.BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4),
        "falcon alibi": lambda: t.FalconConfig(**common, alibi=True),
        "mamba": lambda: t.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4),
        "gpt_neo": lambda: t.GPTNeoConfig(
            vocab_size=V, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["local", "global"], 1]],
            window_size=WINDOW, max_position_embeddings=256,
        ),
        "bert": lambda: t.BertConfig(**common, intermediate_size=40, is_decoder=False),
    }  # fmt: skip
    config = configs[name]()
    config.attn_implementation = attention if name != "gemma2" else "eager"
    torch.manual_seed(seed)
    model = t.AutoModelForCausalLM.from_config(config, attn_implementation=config.attn_implementation)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    return model.to(dtype).eval()


def row(generator: np.random.Generator, prompt: np.ndarray, length: int, holes: bool = False) -> Row:
    tokens = np.concatenate([prompt, generator.integers(1, V, length)])
    mask = np.arange(len(tokens)) >= len(prompt)
    if holes:
        mask &= generator.random(len(tokens)) < 0.6
    return Row(tokens, mask, len(prompt))


def batch(seed: int = 0) -> list[Row]:
    """Trees of two, three and one branches, interleaved, paths longer than the window; holes; no prompt; one token."""
    g = np.random.default_rng(seed)
    a, b, c = (g.integers(1, V, n) for n in (13, 5, 21))
    return [
        row(g, a, 9), row(g, b, 14), row(g, a, 4), row(g, c, 1), row(g, b, 7, holes=True), row(g, c, 11),
        row(g, b, 3), row(g, g.integers(1, V, 0), 12), row(g, g.integers(1, V, 17), 6, holes=True),
        Row(a, np.zeros(13, dtype=bool), 13), Row(g.integers(1, V, 1), np.ones(1, dtype=bool), 0),
    ]  # fmt: skip


def alone(model: Any, rows: list[Row]) -> Tensor:
    """The oracle: every completion by itself, no padding, no mask, positions or layout of ours."""
    found = []
    for tokens, mask, _ in rows:
        ids = torch.as_tensor(tokens)[None]
        logp = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        found += [logp[i - 1, ids[0, i]] for i in np.flatnonzero(mask) if i > 0]
    return torch.stack(found)


def gradients(model: Any, logp: Tensor) -> dict[str, Tensor]:
    """Of a fixed weighting of the log-probabilities by every parameter."""
    model.zero_grad()
    (logp * torch.linspace(-1.0, 2.0, len(logp), dtype=logp.dtype)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Differences relative to the whole gradient: a few parameters (key biases) have gradient 0 but for rounding."""
    assert found.keys() == expected.keys()
    scale = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * max(gradient.norm(), 1e-2 * scale), name
