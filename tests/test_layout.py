"""Layouts against each completion alone in its own unpadded row, through the model's own logits."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import V, alone, batch, check_gradients, gradients, row, tiny
from torch import Tensor

from rlkit.errors import UserError
from rlkit.lm import attention
from rlkit.lm import layout as layout_module
from rlkit.lm.attention import masks
from rlkit.lm.layout import (
    MODES,
    TOLERANCE,
    Layout,
    Mode,
    Row,
    Scorer,
    cheapest,
    check_causal,
    choose,
    first_fit_decreasing,
    forward,
    made_up,
    rows_of,
    supports,
    verify,
)
from rlkit.lm.logps import Head

WORKING = [
    "llama", "mistral", "qwen2", "qwen2 sliding", "qwen3", "qwen3 sliding", "gemma2", "gemma3", "cohere2", "gpt2",
    "neox", "phi3", "opt",
]  # fmt: skip


# Gemma 2 caps attention scores, which transformers computes in eager attention only
@pytest.mark.parametrize(
    ("name", "attention"), [(n, a) for n in WORKING for a in ("sdpa", "eager") if (n, a) != ("gemma2", "sdpa")]
)
def test_every_mode_gives_the_numbers_and_gradients_of_completions_alone(name: str, attention: str) -> None:
    model, rows = tiny(name, attention), batch()
    expected = alone(model, rows)
    wanted = gradients(model, expected)
    for mode in MODES:
        layout = Layout.build(rows, mode, max_row=70 if mode == "packed" else None)
        logp = forward(model, layout, Head.of(model)).logp
        torch.testing.assert_close(logp, expected, rtol=0, atol=5e-5)
        check_gradients(gradients(model, logp), wanted, 1e-4)


@pytest.mark.parametrize("name", ["gpt2", "neox", "opt", "llama", "mistral", "gemma3", "qwen2 sliding"])
def test_in_float64_nothing_is_left_but_rounding(name: str) -> None:
    """Modes, chunks of the vocabulary, amounts of padding, the model's own logits: all the same to 1e-10.

    The gradients, too, where the model computes in float64 throughout; RMSNorm of transformers works in float32.
    """
    relative = 1e-10 if name in ("gpt2", "neox", "opt") else 1e-6
    model, rows = tiny(name, dtype=torch.float64), batch(1)
    head, expected = Head.of(model), alone(model, rows)
    wanted = gradients(model, expected)
    for mode, (budget, overhead), pad_id in itertools.product(MODES, ((2**30, 0), (5_000, 2**40)), (0, 7)):
        layout = Layout.build(rows, mode, max_row=None if mode == "plain" else 60, pad_id=pad_id)
        logp = forward(model, layout, head, budget=budget, overhead=overhead).logp
        assert logp.dtype == torch.float64
        assert (logp - expected).abs().max() < 1e-10
        check_gradients(gradients(model, logp), wanted, relative)
    for mode in MODES:
        own = forward(model, Layout.build(rows, mode), None).logp
        assert (own - expected).abs().max() < 1e-10


def test_places_beyond_one_block_of_the_attention_kernel() -> None:
    """Row of 1,300 places: whole blocks of keys are hidden from later trees, and no NaN arises going forth or back."""
    g = np.random.default_rng(3)
    prompts = [g.integers(1, V, n) for n in (230, 180, 120)]
    rows = [row(g, p, n) for p in prompts for n in (20, 15)]
    rows += [row(g, g.integers(1, V, 200), 40), row(g, g.integers(1, V, 200), 30), row(g, prompts[0], 12)]
    model = tiny("neox")
    model.gpt_neox.config.max_position_embeddings = 512
    layout = Layout.build(rows, "packed", max_row=1_300)
    assert layout.input_ids.shape == (1, layout.n_tokens)
    assert layout.n_tokens > 1_024
    expected = alone(model, rows)
    logp = forward(model, layout, Head.of(model)).logp
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-4)
    check_gradients(gradients(model, logp), gradients(model, alone(model, rows)), 1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_makes_no_nan(attention: str, dtype: torch.dtype) -> None:
    """Rows of very different length in one part; autocast besides."""
    model, rows = tiny("llama", attention, dtype), batch()
    for mode in ("shared", "packed"):
        layout = Layout.build(rows, mode, max_row=80)
        assert (layout.tree < 0).any()
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                stats = forward(model, layout, Head.of(model), with_entropy=True, overhead=2**40)
            assert torch.isfinite(stats.logp).all()
            found = gradients(model, stats.logp)
            assert all(torch.isfinite(g).all() for g in found.values())
            assert stats.entropy is not None
            assert ((stats.entropy > 0) & (stats.entropy < np.log(V) + 1e-3)).all()


def test_temperature_and_entropy_are_those_of_the_models_logits() -> None:
    model, rows = tiny("qwen3", dtype=torch.float64), batch(2)
    logits = []
    with torch.no_grad():
        for tokens, mask, _ in rows:
            out = model(input_ids=torch.as_tensor(tokens)[None]).logits[0] / 0.7
            logits += [out[i - 1] for i in np.flatnonzero(mask) if i > 0]
    distribution = torch.distributions.Categorical(logits=torch.stack(logits))
    for mode, head in itertools.product(MODES, (Head.of(model), None)):
        layout = Layout.build(rows, mode)
        with torch.no_grad():
            stats = forward(model, layout, head, temperature=0.7, with_entropy=True)
        torch.testing.assert_close(stats.logp, distribution.log_prob(layout.target), rtol=0, atol=1e-10)
        torch.testing.assert_close(stats.entropy, distribution.entropy(), rtol=0, atol=1e-10)


# What the tensors hold


def test_a_small_layout_by_hand() -> None:
    """prompt 1 2, branches 3 4 and 5 6 7, of which the longer comes first: its last token is a target only."""
    rows = [Row([1, 2, 3, 4], [0, 0, 1, 1], 2), Row([1, 2, 5, 6, 7], [0, 0, 1, 1, 1], 2)]
    shared = Layout.build(rows, "shared")
    assert shared.input_ids.tolist() == [[1, 2, 5, 6, 3]]
    assert shared.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert shared.branch.tolist() == [[-1, -1, 0, 0, 1]]
    assert shared.place.tolist() == [1, 4, 1, 2, 3]  # both first tokens from the prompt's last hidden state
    assert shared.target.tolist() == [3, 4, 5, 6, 7]
    assert shared.completion.tolist() == [0, 0, 1, 1, 1]
    assert shared.offsets.tolist() == [0, 2, 5]
    assert shared.counts().tolist() == [2, 3]
    assert shared.sum_by_completion(torch.tensor([1.0, 2, 4, 8, 16])).tolist() == [3.0, 28.0]
    plain = Layout.build(rows)
    assert plain.input_ids.tolist() == [[1, 2, 5, 6], [1, 2, 3, 0]]  # long rows first
    assert plain.row.tolist() == [1, 1, 0, 0, 0]
    assert plain.place.tolist() == [1, 2, 1, 2, 3]


def test_sharing_computes_every_prompt_once() -> None:
    rows = batch()
    plain, shared = Layout.build(rows), Layout.build(rows, "shared")
    assert shared.n_tokens == plain.n_tokens - 2 * 13 - 2 * 5 - 21  # three branches, three branches, two
    packed = Layout.build(rows, "packed", max_row=64)
    assert packed.n_tokens == shared.n_tokens
    assert packed.input_ids.numel() < shared.input_ids.numel() < plain.input_ids.numel()


tokens_of = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@st.composite
def ragged(draw: Any) -> list[Row]:
    """Rows of few different tokens, so that prompts coincide, overlap and contain each other."""
    rows = []
    for _ in range(draw(st.integers(1, 9))):
        tokens = draw(tokens_of)
        mask = draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
        rows.append(Row(tokens, mask, draw(st.integers(0, len(tokens)))))
    return rows


def paths(layout: Any) -> Iterator[tuple[int, list[int], list[int]]]:
    """For every trained token in order: its slot, and the ids and positions that its hidden state sees."""
    mask = masks(layout, type("Config", (), {})(), torch.float32)
    for r, place, slot in zip(layout.row.tolist(), layout.place.tolist(), layout.slot.tolist(), strict=True):
        if mask is None:
            seen = torch.arange(layout.input_ids.shape[1]) <= place
        else:
            assert isinstance(mask, Tensor)
            seen = mask[r, 0, place] == 0
        yield slot, layout.input_ids[r, seen].tolist(), layout.position_ids[r, seen].tolist()


@settings(max_examples=150, deadline=None)
@given(ragged(), st.sampled_from(MODES), st.one_of(st.none(), st.integers(1, 40)), st.integers(0, 20))
def test_every_trained_token_is_predicted_from_exactly_what_precedes_it(
    rows: list[Row], mode: Mode, max_row: int | None, overhead: int
) -> None:
    layout = Layout.build(rows, mode, max_row)
    wanted = [(r.tokens[:i], r.tokens[i]) for r in rows for i, m in enumerate(r.mask) if m and i > 0]
    assert layout.target.tolist() == [target for _, target in wanted]
    assert layout.counts().tolist() == [sum(r.mask[1:]) for r in rows]
    assert layout.sum_by_completion(torch.ones(len(wanted))).tolist() == [sum(r.mask[1:]) for r in rows]
    for part in (layout, *layout.split(overhead)):
        for slot, ids, positions in paths(part):
            assert ids == wanted[slot][0]
            assert positions == list(range(len(ids)))
    parts = layout.split(overhead)
    assert sorted(torch.cat([part.slot for part in parts]).tolist()) == list(range(len(wanted)))
    assert sum(int(part.lengths.sum()) for part in parts) == layout.n_tokens
    assert layout.lengths.tolist() == sorted(layout.lengths.tolist(), reverse=True)
    assert (layout.tree >= 0).sum() == layout.n_tokens
    if max_row is not None and mode == "packed":
        for r, length in enumerate(layout.lengths.tolist()):
            inside = layout.tree[r][layout.tree[r] >= 0]
            assert length <= max_row or len(inside.unique()) == 1
    again = Layout.build(rows, mode, max_row)
    assert torch.equal(layout.input_ids, again.input_ids)
    assert torch.equal(layout.place, again.place)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=30), st.integers(1, 40))
def test_bins(sizes: list[int], capacity: int) -> None:
    """All are packed once, none overflows unless one item does, and no two bins that fit one are left."""
    bins = first_fit_decreasing(sizes, capacity)
    assert sorted(itertools.chain(*bins)) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in bin_) for bin_ in bins]
    assert all(load <= capacity or len(bin_) == 1 for load, bin_ in zip(loads, bins, strict=True))
    assert all(a + b > capacity for a, b in itertools.combinations(loads, 2))


def test_bins_by_hand() -> None:
    """Decreasing order finds the two full bins that first fit in the given order (2 3, 4 ...) misses."""
    assert first_fit_decreasing([2, 3, 4, 5, 6], 10) == [[4, 2], [3, 1, 0]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=7), st.integers(0, 15), st.integers(5, 40))
def test_the_split_costs_least(lengths: list[int], overhead: int, most: int) -> None:
    """Against all 2^(n-1) divisions of rows sorted from long to short."""
    rows = [Row(np.ones(n + 1), np.arange(n + 1) == n, 0) for n in lengths]
    ordered = sorted(lengths, reverse=True)

    def cost(cuts: tuple[int, ...]) -> float:
        edges = [0, *cuts, len(ordered)]
        total = 0.0
        for a, b in itertools.pairwise(edges):
            places = (b - a) * ordered[a]
            total += places + overhead if places <= most or b - a == 1 else float("inf")
        return total

    inner = range(1, len(ordered))
    best = min(cost(cuts) for k in range(len(ordered)) for cuts in itertools.combinations(inner, k))
    parts = Layout.build(rows).split(overhead, most)
    assert sum(part.input_ids.numel() + overhead for part in parts) == best


def test_a_tree_longer_than_a_row_is_divided() -> None:
    """Prompt 10, six branches of 5 (4 computed), rows of 20: two branches fit after a prompt."""
    g = np.random.default_rng(0)
    prompt = g.integers(1, V, 10)
    layout = Layout.build([row(g, prompt, 5) for _ in range(6)], "shared", max_row=20)
    assert layout.lengths.tolist() == [18, 18, 18]
    assert Layout.build([row(g, prompt, 50)], "shared", max_row=20).lengths.tolist() == [59]


def test_rows_from_a_buffer() -> None:
    from rlkit.buffer import Field, Ragged, RolloutBuffer

    buffer = RolloutBuffer(
        None, {"tokens": Ragged(torch.int32), "mask": Ragged(torch.bool), "prompt_length": Field((), torch.int64)}
    )
    rows = batch()
    buffer.add(
        {
            "tokens": [np.asarray(r.tokens, dtype=np.int32) for r in rows],
            "mask": [np.asarray(r.mask) for r in rows],
            "prompt_length": np.array([r.prompt_length for r in rows]),
        }
    )
    found = rows_of(buffer.rows(torch.tensor([3, 0, 7])))
    for a, b in zip(found, [rows[3], rows[0], rows[7]], strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.mask, b.mask)
        assert a.prompt_length == b.prompt_length


@pytest.mark.parametrize(
    ("rows", "mode", "message"),
    [
        ([], "plain", "no rows"),
        ([Row([1, 2], [0, 1], 1)], "shard", "did you mean `shared`"),
        ([Row([1, 2], [0, 1], 1), Row([], [], 0)], "plain", "row 1: expected a row of token ids"),
        ([Row([1, 2], [1], 1)], "plain", "row 0: `mask` has shape"),
        ([Row([1, 2], [0, 1], 3)], "plain", "row 0: `prompt_length` is 3; expected 0 to 2"),
    ],
)
def test_what_cannot_be_laid_out(rows: list[Row], mode: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Layout.build(rows, mode)


# Which models can, and what notices those that cannot


@pytest.mark.parametrize("name", WORKING)
def test_working_families_are_chosen(name: str) -> None:
    model = tiny(name).train()
    rows = batch()
    assert supports(model) is None
    for mode in ("shared", "packed"):
        assert verify(model, rows, mode) < TOLERANCE / 5
    assert choose(model, rows, "packed") == ("packed", None)
    assert model.training


@pytest.mark.parametrize(
    ("name", "why"),
    [("bloom", "position_ids"), ("falcon alibi", "ALiBi"), ("mamba", "linear_attention")],
)
def test_families_that_fall_back_say_why(name: str, why: str) -> None:
    model, rows = tiny(name, "eager"), batch()
    mode, reason = choose(model, rows, "shared")
    assert mode == "plain"
    assert reason is not None
    assert "`shared` rows are not used" in reason
    assert why in reason
    head = Head.of(model)
    torch.testing.assert_close(forward(model, Layout.build(rows), head).logp, alone(model, rows), rtol=0, atol=5e-5)


def test_a_window_inside_the_model_is_seen_by_measuring() -> None:
    """GPT-Neo counts its window in places, in a buffer of its own; nothing in the mask can change that."""
    model, rows = tiny("gpt_neo", "eager"), batch()
    assert verify(model, rows, "shared") > 10 * TOLERANCE
    mode, reason = choose(model, rows, "shared")
    assert mode == "plain"
    assert reason is not None
    assert "differ" in reason


def test_a_model_that_sees_the_future_is_refused() -> None:
    model = tiny("bert", "eager")
    assert check_causal(model, batch()[0]) > 1e-2
    with pytest.raises(UserError, match="not causal"):
        choose(model, batch(), "plain")
    assert check_causal(tiny("llama"), batch()[0]) < 1e-6


def test_structures_that_cannot_work() -> None:
    model = tiny("llama")
    for field, value, why in (
        ("_attn_implementation_internal", "flash_attention_2", "flash_attention_2"),
        ("is_encoder_decoder", True, "encoder-decoder"),
        ("layer_types", ["full_attention", "chunked_attention"], "chunked_attention"),
        ("attention_chunk_size", 4, "chunked"),
        ("is_causal", False, "not causal"),
    ):
        changed = copy.deepcopy(model)
        setattr(changed.config, field, value)
        reason = supports(changed)
        assert reason is not None, field
        assert why in reason


def test_adapters_with_virtual_tokens_use_plain_rows_and_own_logits() -> None:
    from peft import PromptTuningConfig, get_peft_model

    model: Any = get_peft_model(tiny("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.eval()
    rows = batch()
    mode, reason = choose(model, rows, "shared")
    assert mode == "plain"
    assert reason is not None
    assert "virtual tokens" in reason
    found = forward(model, Layout.build(rows), None).logp
    expected = []
    for tokens, mask, _ in rows:
        ids = torch.as_tensor(tokens)[None]
        logp = model(input_ids=ids, use_cache=False).logits[0, 3:].log_softmax(-1)
        expected += [logp[i - 1, ids[0, i]] for i in np.flatnonzero(mask) if i > 0]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=5e-5)


@pytest.mark.parametrize("bug", ["boolean mask", "one mask for all layers", "window in places", "siblings seen"])
def test_planted_bugs_are_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = layout_module.masks

    def wrong(part: Any, config: Any, dtype: torch.dtype) -> Any:
        mask = right(part, config, dtype)
        if mask is None:
            return None
        if bug == "boolean mask":
            return mask == 0  # type: ignore[comparison-overlap]
        if bug == "one mask for all layers":
            assert isinstance(mask, dict)
            return mask["full_attention"]
        if bug == "window in places":
            places = torch.arange(part.tree.shape[1]).expand_as(part.position_ids)
            return right(copy.copy(part).__class__(**{**vars(part), "position_ids": places}), config, dtype)
        return right(copy.copy(part).__class__(**{**vars(part), "branch": part.branch.clamp(max=0)}), config, dtype)

    model = tiny({"boolean mask": "llama", "window in places": "mistral", "siblings seen": "llama"}.get(bug, "gemma3"),
                 "eager" if bug == "boolean mask" else "sdpa")  # fmt: skip
    assert choose(model, batch(), "shared") == ("shared", None)
    monkeypatch.setattr(layout_module, "masks", wrong)
    assert verify(model, batch(), "shared") > 5 * TOLERANCE
    mode, reason = choose(model, batch(), "shared")
    assert mode == "plain"
    assert reason is not None
    assert "differ by" in reason


def test_short_rows_alone_would_not_show_a_wrong_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of the batch stay within the window of 8; only the made-up rows reach beyond it."""
    g = np.random.default_rng(0)
    prompt = g.integers(1, V, 3)
    rows = [row(g, prompt, 3), row(g, prompt, 4)]
    model = tiny("mistral")
    monkeypatch.setattr(attention, "_window", lambda config: None)
    assert verify(model, rows, "shared") > 5 * TOLERANCE
    monkeypatch.setattr(layout_module, "made_up", lambda *_: [])
    assert verify(model, rows, "shared") < TOLERANCE


def test_made_up_rows_reach_beyond_the_window_and_stay_within_the_models_positions() -> None:
    model, rows = tiny("mistral"), batch()
    for window, longest in ((8, 64), (100, 200), (5_000, 256)):
        model.config.sliding_window = window
        made = made_up(model, rows)
        assert max(len(r.tokens) for r in made) == longest
        assert [len(list(g)) for _, g in itertools.groupby(made, key=lambda r: r.prompt_length)] == [2, 3]


def test_half_precision_weights_are_judged_by_what_batching_changes() -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    assert choose(model, batch(), "shared") == ("shared", None)


# Wrappers


def test_adapters_train_the_same_in_every_mode() -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(
        tiny("qwen2"), LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    )
    rows, results = batch(), []
    for mode in MODES:
        logp = forward(model, Layout.build(rows, mode), Head.of(model)).logp
        results.append((logp.detach(), gradients(model, logp)))
    with model.disable_adapter():
        assert (forward(model, Layout.build(rows), Head.of(model)).logp - results[0][0]).abs().max() > 1e-2
    for logp, found in results[1:]:
        torch.testing.assert_close(logp, results[0][0], rtol=0, atol=5e-5)
        assert all("lora" in name for name in found)
        check_gradients(found, results[0][1], 1e-4)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_distributed_wrappers_hold_a_scorer(how: str) -> None:
    from torch.distributed.fsdp import fully_shard

    rows, model = batch(), tiny("qwen3")
    expected = forward(model, Layout.build(rows), Head.of(model)).logp
    wanted = gradients(model, expected)
    wrapped: Any
    if how == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(Scorer(model, Head.of(model)))
        with pytest.raises(UserError, match="wrap Scorer"):
            forward(torch.nn.parallel.DistributedDataParallel(tiny("qwen3")), Layout.build(rows), Head.of(model))
    else:
        for layer in model.model.layers:
            fully_shard(layer)
        wrapped = fully_shard(Scorer(model, Head.of(model)))
    for mode in MODES:
        wrapped.zero_grad()  # before the forward pass, as a training loop does: FSDP2 swaps parameters in it
        logp = forward(wrapped, Layout.build(rows, mode), None, budget=5_000).logp
        torch.testing.assert_close(logp, expected, rtol=0, atol=5e-5)
        found = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients(model, logp).items()}
        check_gradients(found, wanted, 1e-4)


def test_sharing_is_chosen_where_it_is_cheaper() -> None:
    """A prompt of 200 with branches of 4 tokens spares about half of all tokens, and pairs of tokens, too: 203^2 / 2 +
    3 x 206 against 2 x 203^2 / 2. One of 2 with branches of 200 spares almost nothing, and has two and a half times as
    many pairs, 201^2 / 2 + 199 x 400 against 2 x 201^2 / 2.
    """
    model = tiny("llama")
    rng = np.random.default_rng(0)

    def pair(prompt: int, branch: int) -> list[Row]:
        shared = rng.integers(3, 60, prompt)
        mask = np.arange(prompt + branch) >= prompt
        return [Row(np.concatenate([shared, rng.integers(3, 60, branch)]), mask, prompt) for _ in range(2)]

    assert cheapest(model, pair(200, 4), "shared") == "shared"
    assert cheapest(model, pair(2, 200), "shared") == "plain"
    assert cheapest(model, pair(200, 4), "packed") == "packed"
    assert cheapest(model, pair(200, 4), "plain") == "plain"
