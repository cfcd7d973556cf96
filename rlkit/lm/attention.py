"""Attention over rows that hold several completions: who sees whom, and how little of it has to be computed.

A mask says which keys a query sees, and PyTorch's attention computes every pair of a masked row, seen or not. But the
prompt and the first branch of a shared row are a plain causal sequence, for which there is a kernel that leaves out
the half that nobody sees. So attention is taken apart: causal for the places up to where the second branch begins in
any row, masked for the others. The longest branch comes first, so that few are left.

    row     prompt ............ | branch 0 ........ | branch 1 ....
    pairs   causal, s^2 / 2                         | masked, (L - s) L
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rlkit.lm.layout import Part

LEAST_SAVING = 0.1
"""Share of a row's pairs that has to be saved for attention to be taken apart."""


def masks(part: Part, config: Any, dtype: torch.dtype) -> Tensor | dict[str, Tensor] | None:
    """What a model takes as `attention_mask`: None for `plain`, else additive (R, 1, L, L), 0 where a key is seen.

    Where layers of the model differ (`layer_types` of its configuration) it is a dict by layer type. A sliding window
    is counted in positions, not in places. Padding sees itself, so that no row of a softmax is empty.

    Args:
        config: the model's text configuration.
        dtype: of the attention; hidden keys have its lowest finite number, which cannot turn into NaN as -inf does.
    """
    if part.mode == "plain":
        return None
    places = torch.arange(part.tree.shape[1], device=part.tree.device)
    same_tree = part.tree[:, :, None] == part.tree[:, None, :]
    same_branch = part.branch[:, :, None] == part.branch[:, None, :]
    in_prompt = part.branch[:, None, :] < 0
    seen = same_tree & (same_branch | in_prompt) & (places[:, None] >= places)
    seen &= (part.tree >= 0)[:, None, :] | (places[:, None] == places)  # (R, query, key)
    window = _window(config)
    kinds = set(getattr(config, "layer_types", None) or ())
    causal = int(leading(part).min())

    def additive(windowed: bool) -> Tensor:
        visible, prefix = seen, causal
        if windowed and window is not None:
            distance = part.position_ids[:, :, None] - part.position_ids[:, None, :]
            visible, prefix = seen & (distance < window), min(causal, window)
        lowest = torch.finfo(dtype).min
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, lowest)[:, None]
        _mark(mask, prefix)
        return mask

    if len(kinds) > 1:
        return {kind: additive(kind == "sliding_attention") for kind in sorted(kinds)}
    return additive(not kinds or kinds == {"sliding_attention"})


def _window(config: Any) -> int | None:
    window = getattr(config, "sliding_window", None)
    return window if isinstance(window, int) and window > 0 else None


def leading(part: Part) -> Tensor:
    """(R,) places up to which a row is a causal sequence: its prompt and first branch, all of it with one branch."""
    if part.mode == "packed":
        return torch.zeros_like(part.lengths)
    first = ((part.branch <= 0) & (part.tree >= 0)).sum(1)
    return torch.where(first < part.lengths, first, part.branch.shape[1])


def attended(part: Part) -> Tensor:
    """(R,) float64 pairs of tokens that the attention of each row computes, padding left out."""
    length = part.lengths.double()
    return _pairs(leading(part).double().minimum(length), length)


def _pairs(prefix: Any, length: Any) -> Any:
    return prefix**2 / 2 + (length - prefix) * length


def _mark(mask: Tensor, prefix: int) -> None:
    """Note on a mask that its first places see as in a causal sequence; whoever does not know of it may ignore it."""
    length = mask.shape[-1]
    if _pairs(prefix, length) <= (1 - LEAST_SAVING) * length**2:
        _install()
        mask.causal_prefix = prefix  # type: ignore[attr-defined]


@cache
def _install() -> None:
    """Let transformers' `sdpa` attention take marked masks apart; for others it stays as it is."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def sdpa(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """query (R, heads, L, D), key and value (R, key heads, L, D), mask (R, 1, L, L) -> (R, L, heads, D)."""
        prefix = getattr(attention_mask, "causal_prefix", None)
        others = {"position_bias", "cache"} & {name for name, option in options.items() if option is not None}
        if attention_mask is None or prefix is None or others or query.shape[2] != attention_mask.shape[2]:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        rest = query.shape[2] - prefix
        first, last = query.split([prefix, rest], 2)
        options.pop("is_causal", None)
        parts = [
            sdpa_attention_forward(
                module, first, key[:, :, :prefix], value[:, :, :prefix], None, is_causal=True, **options
            )[0]
        ]
        if rest:
            parts.append(sdpa_attention_forward(module, last, key, value, attention_mask[:, :, prefix:], **options)[0])
        return torch.cat(parts, 1), None

    AttentionInterface.register("sdpa", sdpa)
