"""Masks of rows that hold several completions, and attention that computes only a part of them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from model_families import WINDOW, V, alone, batch, check_gradients, gradients, row, tiny
from torch import Tensor

from rlkit.lm import attention, layout, models
from rlkit.lm.attention import attended, leading, masks
from rlkit.lm.layout import Layout, Row, forward
from rlkit.lm.logps import Head, text_config

PAIR = [Row([1, 2, 3, 4], [0, 0, 1, 1], 2), Row([1, 2, 5, 6, 7], [0, 0, 1, 1, 1], 2)]
"""As a row: 1 2, then 5 6, then 3."""


def long_pairs(count: int = 5, seed: int = 0) -> list[Row]:
    """Pairs with prompts of about 40 and completions of about 12 tokens."""
    import numpy as np

    g = np.random.default_rng(seed)
    prompts = [g.integers(1, V, int(g.integers(35, 45))) for _ in range(count)]
    return [row(g, prompt, int(g.integers(3, 20))) for prompt in prompts for _ in range(2)]


def mask_of(rows: list[Row], name: str = "llama", mode: Any = "shared") -> Any:
    return masks(Layout.build(rows, mode), text_config(tiny(name)), torch.float32)


# Masks


def test_a_branch_sees_the_prompt_and_itself() -> None:
    mask = mask_of(PAIR)
    seen = (mask[0, 0] == 0).int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert mask_of(PAIR, mode="plain") is None


def test_windows_are_counted_in_positions() -> None:
    """Window 2: 6 (position 3) sees 5 and itself; 3 (position 2) sees the prompt's 2, not 6."""
    model = tiny("gemma3")
    model.config.sliding_window = 2
    found = masks(Layout.build(PAIR, "shared"), text_config(model), torch.float32)
    assert isinstance(found, dict)
    assert found.keys() == {"full_attention", "sliding_attention"}
    seen = (found["sliding_attention"][0, 0] == 0).int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 1]]
    assert (found["full_attention"][0, 0] == 0).int().tolist()[3] == [1, 1, 1, 1, 0]


def test_hidden_places_have_the_lowest_finite_number_of_the_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        mask = masks(Layout.build(batch(), "shared"), text_config(tiny("llama")), dtype)
        assert isinstance(mask, Tensor)
        assert mask.dtype == dtype
        assert mask.unique().tolist() == [torch.finfo(dtype).min, 0.0]
        assert (mask == 0).any(-1).all()  # every query, padding too, sees something


# What is causal


def test_the_causal_part_by_hand() -> None:
    """Row 1 2 5 6 | 3 is causal for 4 places; a row with one branch is so to its end and beyond, where padding is."""
    one = Row([8, 9, 10, 11], [0, 1, 1, 1], 1)
    shared = Layout.build([*PAIR, one], "shared")
    assert shared.input_ids.tolist() == [[1, 2, 5, 6, 3], [8, 9, 10, 0, 0]]
    assert leading(shared).tolist() == [4, 5]
    assert attended(shared).tolist() == [4**2 / 2 + 1 * 5, 3**2 / 2]
    assert attended(Layout.build(PAIR)).tolist() == [4**2 / 2, 3**2 / 2]
    assert attended(Layout.build(PAIR, "packed")).tolist() == [5**2]  # a row may hold several trees


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_marked_places_see_exactly_what_precedes_them(name: str) -> None:
    marked = 0
    for seed, rows in itertools.product(range(5), (batch, long_pairs)):
        built = Layout.build(rows(seed=seed), "shared")
        for part in built.split(4):
            found = masks(part, text_config(tiny(name)), torch.float32)
            for mask in found.values() if isinstance(found, dict) else [found]:
                prefix = getattr(mask, "causal_prefix", None)
                if prefix is None:
                    continue
                marked += 1
                for r, length in enumerate(part.lengths.tolist()):
                    n = min(prefix, length)
                    assert (mask[r, 0, :n] == 0).equal(torch.ones(n, mask.shape[-1]).tril() > 0)
    assert marked >= 5


def test_a_window_ends_the_causal_part() -> None:
    found = mask_of(long_pairs(), "gemma3")
    assert found["full_attention"].causal_prefix >= 35
    short = mask_of([r for r in long_pairs() if len(r.tokens) < 60], "gemma3")["sliding_attention"]
    assert getattr(short, "causal_prefix", WINDOW) == WINDOW


# Taken apart


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma3", "opt"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_taken_apart_is_the_whole(name: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64: log-probabilities and gradients of completions alone, with two calls in layers that may have them."""
    model, rows, seen = tiny(name, dtype=torch.float64), long_pairs(), []
    if checkpointed:
        models.checkpoint_activations(model)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for probability in ("dropout", "attention_dropout", "activation_dropout"):
                if isinstance(getattr(module, probability, None), float):
                    setattr(module, probability, 0.0)
    expected = alone(model, rows)
    wanted = gradients(model, expected)
    scaled = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append((args[0].shape[2], args[1].shape[2], kwargs.get("is_causal")))
        return scaled(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    found = forward(model, Layout.build(rows, "shared"), Head.of(model), overhead=10_000).logp
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    exact = name in ("gpt2", "neox", "opt")  # RMSNorm of transformers works in float32
    check_gradients(gradients(model, found), wanted, 1e-10 if exact else 1e-6)
    firsts = [(q, k) for q, k, causal in seen if causal]
    lasts = [(q, k) for q, k, causal in seen if not causal]
    assert firsts
    assert all(q == k for q, k in firsts)
    assert all(q < k for q, k in lasts) or name == "gemma3"  # windows of 8 are too short to be worth it


def test_a_wrong_mark_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: three places more, and second branches see first ones."""
    model, rows = tiny("llama"), long_pairs()
    expected = alone(model, rows)
    right = attention.leading
    monkeypatch.setattr(attention, "leading", lambda part: right(part) + 3)
    found = forward(model, Layout.build(rows, "shared"), Head.of(model), overhead=10_000).logp
    assert (found - expected).abs().max() > 1e-2
    assert layout.verify(model, rows, "shared") > 5 * layout.TOLERANCE


def test_other_masks_are_left_alone() -> None:
    """transformers' own batches, with padding and with none, and generation, after ours is installed."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model = tiny("llama")
    ids = torch.arange(1, 25).view(2, 12)
    ones = torch.ones_like(ids)
    ones[0, :4] = 0
    attention._install()
    found = [model(input_ids=ids, attention_mask=a).logits for a in (None, ones)]
    text = model.generate(ids, attention_mask=ones, max_new_tokens=5, do_sample=False)
    ours = AttentionInterface._global_mapping["sdpa"]
    try:
        AttentionInterface.register("sdpa", sdpa_attention_forward)
        expected = [model(input_ids=ids, attention_mask=a).logits for a in (None, ones)]
        assert text.equal(model.generate(ids, attention_mask=ones, max_new_tokens=5, do_sample=False))
    finally:
        AttentionInterface.register("sdpa", ours)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
