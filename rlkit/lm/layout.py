"""How completions are laid out in the rows of a model: one a row, prompts shared, several trees packed.

A *tree* is a prompt and the completions (*branches*) that follow it; a *row* of the model holds one or more trees:

| mode | rows | what it saves |
|---|---|---|
| `plain` | one completion each, padded on the right | – |
| `shared` | one tree each: `prompt + chosen + rejected` | every prompt is computed once |
| `packed` | trees up to `max_row` tokens together | padding, too |

Positions of a branch continue from the prompt's end, and a token sees its own tree only: the prompt and its own
branch, up to itself. So every branch is computed as if it stood alone after the prompt, and the numbers of the modes
differ by rounding. `verify` measures that on the model at hand, `choose` falls back to `plain` where it does not hold.

Right padding needs no mask in a causal model, because no token sees what comes after it; `plain` therefore passes
none, which leaves attention its fast causal path. A branch's last trained token is a target only and is not computed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rlkit.errors import UserError, did_you_mean
from rlkit.lm.attention import attended, masks
from rlkit.lm.logps import (
    BUDGET,
    Head,
    TokenStats,
    backbone,
    causal_lm,
    completion_logps,
    entropy,
    evaluating,
    last_hidden,
    positions,
    prompt_learning,
    text_config,
    token_logps,
    wrappers,
)
from rlkit.lm.sharding import is_sharded
from rlkit.rng import derive

Mode = Literal["plain", "shared", "packed"]
MODES: tuple[Mode, ...] = ("plain", "shared", "packed")

TOLERANCE = 1e-3
"""Largest difference of a token's log-probability between modes in float32; rounding makes about 1e-5."""
TOLERANCE_HALF = 0.1
"""The same for weights in half precision, or three times what batching alone changes, whichever is larger."""
ATTENTION = 3.0
"""Price of an operation in attention, in operations of a matrix product; measured on CPUs with heads of 8 to 64."""
LONGEST_CHECK = 2048
"""Tokens of the longest made-up row that `verify` runs."""


class Row(NamedTuple):
    """One completion after its prompt.

    Args:
        tokens: (T,) ids of prompt and completion.
        mask: (T,) bool, true where the token is trained; holes are fine. The first token of a row has no predecessor,
            so it is never predicted, and a true there counts as false.
        prompt_length: tokens of the prompt, 0 or more.
    """

    tokens: Any
    mask: Any
    prompt_length: int


def rows_of(columns: Mapping[str, Any]) -> list[Row]:
    """Rows from what `RolloutBuffer.rows` returns: `tokens`, `tokens_length`, `mask`, `prompt_length`."""
    lengths = columns["tokens_length"].tolist()
    prompts = columns["prompt_length"].tolist()
    tokens, mask = columns["tokens"].cpu().numpy(), columns["mask"].cpu().numpy()
    return [Row(tokens[i, :n], mask[i, :n], int(p)) for i, (n, p) in enumerate(zip(lengths, prompts, strict=True))]


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of a model and the N trained tokens in them; all int64.

    Args:
        mode: how the rows were made.
        input_ids: (R, L) token ids, padded on the right.
        position_ids: (R, L) positions within prompt and branch; 0 in padding.
        tree: (R, L) number of the token's tree, -1 in padding.
        branch: (R, L) number of the token's branch within its tree, -1 in the prompt and in padding.
        lengths: (R,) tokens that are no padding, from long to short.
        row: (N,) row of the hidden state that predicts the token.
        place: (N,) its place in the row: for a branch's first token, the prompt's last one.
        target: (N,) the token's id.
        slot: (N,) the token's place among the trained tokens of the layout.
    """

    mode: Mode
    input_ids: Tensor
    position_ids: Tensor
    tree: Tensor
    branch: Tensor
    lengths: Tensor
    row: Tensor
    place: Tensor
    target: Tensor
    slot: Tensor

    def to(self, device: torch.device | str) -> Any:
        """The same on another device."""
        tensors: dict[str, Any] = {
            f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **tensors)


@dataclass(frozen=True, eq=False)
class Layout(Part):
    """A batch of completions as rows of a model; trained tokens are in the caller's order.

    Args:
        completion: (N,) index of the token's completion, ascending.
        offsets: (C + 1,) where each completion's trained tokens begin, and N.
    """

    completion: Tensor
    offsets: Tensor

    @classmethod
    def build(cls, rows: Sequence[Row], mode: Mode = "plain", max_row: int | None = None, pad_id: int = 0) -> Layout:
        """Arrange completions; the same arguments give the same layout.

        Args:
            rows: completions in the caller's order. Those whose prompts are equal token by token share a tree, except
                in `plain` and where there is no prompt.
            mode: one of `MODES`.
            max_row: tokens of a row. A tree that is longer is divided, its prompt repeated; one branch that is longer
                has a row of its own. None: no limit for `shared`, the longest tree for `packed`.
            pad_id: id in padding; any id of the vocabulary will do.

        Raises:
            UserError: no rows, an unknown mode, an empty row, a mask or prompt length that does not fit its tokens.
        """
        if mode not in MODES:
            raise UserError(f"`mode` is {mode!r}{did_you_mean(str(mode), MODES)}")
        if not rows:
            raise UserError("no rows to lay out")
        items = [_Completion.of(i, row) for i, row in enumerate(rows)]
        trees = [
            tree for group in _groups(items, mode) for tree in _divided(group, None if mode == "plain" else max_row)
        ]
        sizes = [_size(tree) for tree in trees]
        bins = [[i] for i in range(len(trees))]
        if mode == "packed":
            bins = first_fit_decreasing(sizes, max(sizes) if max_row is None else max_row)
        bins.sort(key=lambda bin_: -sum(sizes[i] for i in bin_))  # stable: equal lengths stay in order
        return _filled(cls, mode, items, [[trees[i] for i in bin_] for bin_ in bins], pad_id)

    @property
    def n_completions(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        """Tokens that a model computes, padding left out."""
        return int(self.lengths.sum())

    def sum_by_completion(self, values: Tensor) -> Tensor:
        """(N,) -> (C,): sums over each completion's trained tokens, 0 where there are none."""
        zeros = values.new_zeros(self.n_completions)
        return zeros.index_add(0, self.completion.to(values.device), values)

    def counts(self) -> Tensor:
        """(C,) int64 trained tokens of each completion."""
        return self.offsets.diff()

    def split(self, overhead: int, max_places: int | None = None) -> list[Part]:
        """Rows of similar length together, so that little padding is computed; each part is trimmed to its rows.

        The division with the least sum of `rows x longest row + overhead`, found by dynamic programming.

        Args:
            overhead: what a call of the model costs, in tokens; large values leave everything in one part.
            max_places: most places (padding counts) of a part; a single row may exceed it.
        """
        lengths = self.lengths.cpu().numpy()
        starts = _least_cost(np.maximum(lengths, 1), overhead, max_places)
        return [self._part(a, b) for a, b in zip(starts, [*starts[1:], len(lengths)], strict=True)]

    def _part(self, start: int, end: int) -> Part:
        longest = max(1, int(self.lengths[start]))
        inside = ((self.row >= start) & (self.row < end)).nonzero().squeeze(-1)
        return Part(
            mode=self.mode,
            input_ids=self.input_ids[start:end, :longest],
            position_ids=self.position_ids[start:end, :longest],
            tree=self.tree[start:end, :longest],
            branch=self.branch[start:end, :longest],
            lengths=self.lengths[start:end],
            row=self.row[inside] - start,
            place=self.place[inside],
            target=self.target[inside],
            slot=self.slot[inside],
        )


class _Completion(NamedTuple):
    which: int
    tokens: np.ndarray
    trained: np.ndarray  # (n,) places of trained tokens, 1 or more each
    prompt: int

    @property
    def branch(self) -> int:
        """Tokens of the branch that a model has to compute: up to the last trained one, which is a target only."""
        return max(0, int(self.trained[-1]) - self.prompt) if len(self.trained) else 0

    @classmethod
    def of(cls, index: int, row: Row) -> _Completion:
        tokens = np.asarray(row.tokens, dtype=np.int64)
        mask = np.asarray(row.mask, dtype=bool)
        prompt = int(row.prompt_length)
        if tokens.ndim != 1 or not len(tokens):
            raise UserError(f"row {index}: expected a row of token ids, got shape {tokens.shape}")
        if mask.shape != tokens.shape:
            raise UserError(f"row {index}: `mask` has shape {mask.shape}, its tokens have {tokens.shape}")
        if not 0 <= prompt <= len(tokens):
            raise UserError(f"row {index}: `prompt_length` is {prompt}; expected 0 to {len(tokens)}, its tokens")
        trained = np.flatnonzero(mask)
        return cls(index, tokens, trained[trained > 0], prompt)


_Tree = list[_Completion]


def _size(tree: _Tree) -> int:
    return tree[0].prompt + sum(item.branch for item in tree)


def _groups(items: list[_Completion], mode: Mode) -> list[_Tree]:
    """Completions with equal prompts, in order of first appearance."""
    groups: dict[Any, _Tree] = {}
    for item in items:
        shares = mode != "plain" and item.prompt > 0
        groups.setdefault(item.tokens[: item.prompt].tobytes() if shares else item.which, []).append(item)
    return list(groups.values())


def _divided(tree: _Tree, max_row: int | None) -> list[_Tree]:
    if max_row is None or _size(tree) <= max_row:
        return [tree]
    bins = first_fit_decreasing([item.branch for item in tree], max_row - tree[0].prompt)
    return [[tree[i] for i in sorted(bin_)] for bin_ in bins]


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices whose sizes sum to at most `capacity`; what is larger has a bin of its own.

    Items from large to small (equal ones in order), each into the first bin with room: at most 11/9 of the fewest
    bins, plus 2/3 (Dosa 2007).
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        found = next((b for b, free in enumerate(room) if free >= sizes[i]), None)
        if found is None:
            bins.append([])
            room.append(capacity)
            found = len(bins) - 1
        bins[found].append(i)
        room[found] -= sizes[i]
    return bins


def _filled(cls: type[Layout], mode: Mode, items: list[_Completion], rows: list[list[_Tree]], pad_id: int) -> Layout:
    """The tensors of a layout from trees in rows."""
    lengths = np.array([sum(_size(tree) for tree in trees) for trees in rows])
    shape = len(rows), max(1, int(lengths.max()))
    ids, positions = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    tree_of, branch_of = np.full(shape, -1, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
    where: dict[int, tuple[int, np.ndarray]] = {}  # completion -> row, places of the hidden states that predict
    number = 0
    for r, trees in enumerate(rows):
        at = 0
        for tree in trees:
            start, prompt = at, tree[0].prompt
            end = start + prompt
            ids[r, start:end], positions[r, start:end] = tree[0].tokens[:prompt], np.arange(prompt)
            for b, item in enumerate(sorted(tree, key=lambda item: -item.branch)):  # see `attention`
                here = slice(end, end + item.branch)
                ids[r, here] = item.tokens[prompt : prompt + item.branch]
                positions[r, here] = np.arange(prompt, prompt + item.branch)
                branch_of[r, here] = b
                before = item.trained - 1
                where[item.which] = r, np.where(before < prompt, start + before, end + before - prompt)
                end += item.branch
            tree_of[r, start:end] = number
            at, number = end, number + 1
    counts = [len(item.trained) for item in items]
    n = sum(counts)

    def joined(parts: Iterable[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *parts]))

    return cls(
        mode=mode,
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        tree=torch.from_numpy(tree_of),
        branch=torch.from_numpy(branch_of),
        lengths=torch.from_numpy(lengths),
        row=joined(np.full(counts[i], where[i][0]) for i in range(len(items))),
        place=joined(where[i][1] for i in range(len(items))),
        target=joined(item.tokens[item.trained] for item in items),
        slot=torch.arange(n),
        completion=joined(np.full(count, i) for i, count in enumerate(counts)),
        offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])),
    )


def _least_cost(lengths: np.ndarray, overhead: int, max_places: int | None) -> list[int]:
    """Where parts of rows sorted from long to short begin; cost of rows a..b-1: (b - a) lengths[a] + overhead."""
    n, window = len(lengths), 1024  # rows that a part may have at most
    best, after = np.zeros(n + 1), np.zeros(n, dtype=np.int64)
    for a in range(n - 1, -1, -1):
        rows = np.arange(1, min(window, n - a) + 1)
        places = rows * int(lengths[a])
        cost = places + overhead + best[a + rows]
        if max_places is not None:
            cost[1:][places[1:] > max_places] = math.inf
        choice = int(cost.argmin())
        best[a], after[a] = cost[choice], a + choice + 1
    starts, a = [], 0
    while a < n:
        starts.append(a)
        a = int(after[a])
    return starts


# Running a model


def inputs(part: Part, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Keywords of a call of the model."""
    if part.mode == "plain":  # positions 0, 1, ... are every model's own
        return {"input_ids": part.input_ids}
    return {
        "input_ids": part.input_ids,
        "position_ids": part.position_ids,
        "attention_mask": masks(part, config, dtype),
    }


def forward(
    model: nn.Module,
    layout: Layout,
    head: Head | None,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    entropy_grad: bool = False,
    budget: int = BUDGET,
    overhead: int | None = None,
) -> TokenStats:
    """Statistics of the layout's trained tokens in the caller's order: the one way of training, reference, evaluation.

    Args:
        model: a causal language model, or a `Scorer`, possibly wrapped. A wrapper with duties of its own in the
            forward pass (DistributedDataParallel, a sharded root) has to hold a `Scorer`.
        layout: on the model's device.
        head: from `rlkit.lm.logps.find_head`; None takes the model's own logits, which are then materialised.
        temperature, with_entropy, entropy_grad, budget: as in `completion_logps`.
        overhead: as in `Layout.split`; None: 64 tokens on a CPU, 4096 elsewhere, one part in a sharded model.

    Raises:
        UserError: a distributed wrapper around a bare model.
    """
    options: dict[str, Any] = {"temperature": temperature, "with_entropy": with_entropy, "entropy_grad": entropy_grad}
    chain = list(wrappers(model))
    if any(isinstance(wrapper, Scorer) for wrapper in chain):
        stats: TokenStats = model(layout, **options, budget=budget, overhead=overhead)
        return stats
    if torch.is_grad_enabled() and isinstance(model, nn.parallel.DistributedDataParallel):
        raise UserError("gradients would not be synchronised: wrap Scorer(model, head), not the model itself")
    lm, base = chain[-1], backbone(model)
    config = text_config(model)
    device = layout.input_ids.device
    if overhead is None:
        overhead = _one_part(layout) if is_sharded(lm) else (64 if device.type == "cpu" else 4096)
    parts = layout.split(overhead)
    dtype = _attention_dtype(lm, device)
    order = torch.cat([part.slot for part in parts])
    if head is None or base is None:
        found = [_own_stats(model, part, config, dtype, options) for part in parts]
        logp = torch.cat([stats.logp for stats in found])
        entropies = torch.cat([s.entropy for s in found if s.entropy is not None]) if with_entropy else None
    else:
        hidden = [last_hidden(base, inputs(part, config, dtype))[part.row, part.place] for part in parts]
        targets = torch.cat([part.target for part in parts])
        logp, entropies = completion_logps(head, torch.cat(hidden), targets, **options, budget=budget)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
    return TokenStats(logp[back], None if entropies is None else entropies[back])


class Scorer(nn.Module):
    """A causal language model whose call is `forward`: what distributed wrappers wrap, so that their duties are done.

    Args:
        model: a causal language model, adapters included.
        head: from `rlkit.lm.logps.find_head`.
    """

    def __init__(self, model: nn.Module, head: Head | None) -> None:
        super().__init__()
        self.scored, self.head = model, head

    def forward(self, layout: Layout, **options: Any) -> TokenStats:
        return forward(self.scored, layout, self.head, **options)


def _own_stats(model: nn.Module, part: Part, config: Any, dtype: torch.dtype, options: Mapping[str, Any]) -> TokenStats:
    """By the model's own logits, at the places that predict where it can leave out the others."""
    arguments = inputs(part, config, dtype)
    virtual = prompt_learning(model)
    places, column = part.place.unique(return_inverse=True)
    if not virtual and "logits_to_keep" in inspect.signature(causal_lm(model).forward).parameters:
        arguments["logits_to_keep"] = places
    logits = model(**arguments, use_cache=False).logits
    if virtual:
        logits = logits[:, -part.input_ids.shape[1] :]  # virtual tokens come first
    kept = logits.shape[1] == len(places)
    chosen = logits[part.row, column if kept else part.place]
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32)) / options["temperature"]
    if not options["with_entropy"]:
        return TokenStats(token_logps(chosen, part.target))
    entropies = entropy(chosen if options["entropy_grad"] else chosen.detach())
    return TokenStats(token_logps(chosen, part.target), entropies)


def _one_part(layout: Layout) -> int:
    return int(layout.input_ids.numel()) + 1


def _attention_dtype(model: nn.Module, device: torch.device) -> torch.dtype:
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return _weight_dtype(model)


def _weight_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


# Whether a model can


def supports(model: nn.Module) -> str | None:
    """Why `shared` and `packed` cannot work for the model, as far as its structure tells, or None."""
    config: Any = text_config(model)
    base = backbone(model)
    attention = str(getattr(config, "_attn_implementation", None))
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    recurrent = [n for n in ("layers_block_type", "block_types", "ssm_cfg", "state_size") if getattr(config, n, None)]
    if prompt_learning(model):
        return "its adapter adds virtual tokens"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if base is None:
        return "its last hidden state cannot be had apart from its logits"
    if attention not in ("sdpa", "eager"):
        return f"`{attention}` attention takes no mask of ours; load the model with attn_implementation='sdpa'"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    if kinds:
        return f"it has layers of type {', '.join(sorted(kinds))}"
    if recurrent:
        return f"it has layers with a recurrent state (`{recurrent[0]}`)"
    if getattr(config, "attention_chunk_size", None):
        return "its attention is chunked"
    if getattr(config, "alibi", False):
        return "its ALiBi positions are places in a row"
    lacking = {"position_ids", "attention_mask"} - set(inspect.signature(base.forward).parameters)
    return f"it takes no `{min(lacking)}`" if lacking else None


def check_causal(model: nn.Module, row: Row) -> float:
    """Largest change of a log-probability distribution before the row's last token when that token changes: 0 but for
    rounding in a causal model.
    """
    tokens = torch.as_tensor(np.asarray(row.tokens, dtype=np.int64)[:256])[None].to(_device(model))
    if tokens.shape[1] < 2:
        return 0.0
    other, n = tokens.clone(), tokens.shape[1]
    other[0, -1] = (tokens[0, -1] + 1) % _vocabulary(model)
    called = model if prompt_learning(model) else causal_lm(model)
    with evaluating(model):
        a, b = (called(input_ids=ids, use_cache=False).logits[0, -n:-1].float() for ids in (tokens, other))
    return float((a.log_softmax(-1) - b.log_softmax(-1)).abs().max())


def cheapest(model: nn.Module, rows: Sequence[Row], mode: Mode) -> Mode:
    """`mode`, or `plain` where sharing these rows' prompts costs more than it saves.

    Sharing spares matrix products for the repeated prompt, but its attention computes pairs of tokens that do not see
    each other, of a branch with another one. So it pays for long prompts with short completions. The estimate counts 2
    operations a weight and token, and 4 a hidden unit, layer and pair of tokens, these at ATTENTION times the price.
    """
    if mode == "plain":
        return mode
    config = text_config(model)
    layers, hidden = int(config.num_hidden_layers), int(config.hidden_size)
    embedding: nn.Module = causal_lm(model).get_input_embeddings()  # type: ignore[operator]
    weights = sum(p.numel() for p in causal_lm(model).parameters()) - sum(p.numel() for p in embedding.parameters())

    def cost(which: Mode) -> float:
        layout = Layout.build(rows, which)
        tokens, pairs = float(layout.lengths.sum()), float(attended(layout).sum())
        return 2 * weights * tokens + ATTENTION * 4 * hidden * layers * pairs

    return mode if cost("shared") <= cost("plain") else "plain"


def verify(model: nn.Module, rows: Sequence[Row], mode: Mode, head: Head | None = None) -> float:
    """Largest difference of a token's log-probability between `plain` and `mode`, in evaluation mode, autocast off.

    Made-up rows are checked besides `rows`: a tree of two branches and a tree of three whose branches are longer than
    any sliding window, as far as `LONGEST_CHECK` and the model's positions allow, with ids from `rows`.

    Args:
        rows: completions in the caller's order; a few with shared prompts are enough.
        head: as in `forward`; None: `Head.of`, since the same head on both sides is enough to compare.
    """
    return _difference(model, [*rows, *made_up(model, rows)], mode, head)


def choose(model: nn.Module, rows: Sequence[Row], wanted: Mode, head: Head | None = None) -> tuple[Mode, str | None]:
    """The mode to use, and why it is not `wanted`.

    Raises:
        UserError: the model is not causal, so that its log-probabilities would see what they predict.
    """
    half = _weight_dtype(model) in (torch.float16, torch.bfloat16)
    leak = check_causal(model, rows[0])
    if not leak <= (TOLERANCE_HALF if half else TOLERANCE):
        name = type(causal_lm(model)).__name__
        raise UserError(f"`model`: {name} is not causal: a token changes log-probabilities before it by {leak:.1e}")
    if wanted == "plain":
        return wanted, None
    reason = supports(model)
    if reason is not None:
        return "plain", f"`{wanted}` rows are not used: {reason}"
    everything = [*rows, *made_up(model, rows)]
    tolerance = max(TOLERANCE_HALF, 3 * _noise(model, everything, head)) if half else TOLERANCE
    reason = None
    for mode in [m for m in ("packed", "shared") if m == wanted or wanted == "packed"]:
        try:
            difference = _difference(model, everything, mode, head)
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
            reason = reason or f"`{mode}` rows are not used: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        if difference <= tolerance:
            return mode, reason
        reason = reason or f"`{mode}` rows are not used: log-probabilities differ by {difference:.1e} > {tolerance:.0e}"
    return "plain", reason


def _difference(model: nn.Module, rows: Sequence[Row], mode: Mode, head: Head | None) -> float:
    if head is None and backbone(model) is not None:
        head = Head.of(model)
    longest = max(len(np.asarray(row.tokens)) for row in rows)
    layouts = Layout.build(rows), Layout.build(rows, mode, max_row=4 * longest if mode == "packed" else None)
    return _largest(*(_quiet(model, layout, head) for layout in layouts))


def _noise(model: nn.Module, rows: Sequence[Row], head: Head | None) -> float:
    """What batching alone changes: rows together, padded, against each row by itself."""
    together = _quiet(model, Layout.build(rows), head, overhead=2**62)
    return _largest(together, torch.cat([_quiet(model, Layout.build([row]), head) for row in rows]))


def _largest(a: Tensor, b: Tensor) -> float:
    if not len(a):
        return 0.0
    difference = float((a - b).abs().max())
    return difference if math.isfinite(difference) else math.inf


def _quiet(model: nn.Module, layout: Layout, head: Head | None, **options: Any) -> Tensor:
    device = _device(model)
    with evaluating(model), torch.autocast(device.type, enabled=False):
        return forward(model, layout.to(device), head, **options).logp


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _vocabulary(model: nn.Module) -> int:
    return int(text_config(model).vocab_size)


def made_up(model: nn.Module, rows: Sequence[Row]) -> list[Row]:
    """Two trees, of two and of three branches, that reach beyond any window; a pure function of its arguments."""
    config: Any = text_config(model)
    names = ("sliding_window", "window_size", "attention_window_size", "sliding_window_size", "attention_chunk_size")
    windows = [w for name in names if isinstance(w := getattr(config, name, None), int)]
    length = min(LONGEST_CHECK, max([64, *(2 * w for w in windows)]), positions(model) or LONGEST_CHECK)
    ids = np.unique(np.concatenate([np.asarray(row.tokens, dtype=np.int64) for row in rows]))
    generator = np.random.default_rng(derive(0, "layout", length))
    made = []
    for branches, share in ((2, 0.5), (3, 0.2)):
        prompt = generator.choice(ids, max(1, int(share * length)))
        for b in range(branches):
            branch = generator.choice(ids, max(1, length - len(prompt) - b))
            tokens = np.concatenate([prompt, branch])
            made.append(Row(tokens, np.arange(len(tokens)) >= len(prompt), len(prompt)))
    return made
