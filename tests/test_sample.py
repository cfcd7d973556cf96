"""Sampling: enumerated distributions, a teacher-forced pass, and completions that depend on nothing but their keys."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from scipy.stats import chisquare, kstest
from torch import nn

from rlkit.errors import DivergenceError, UserError
from rlkit.lm.logps import evaluating
from rlkit.lm.sample import _DRAW, Samples, Sampling, _GumbelMax, generate, require_full_support

VOCABULARY = 40
PROMPTS = [np.array(p) for p in ([3], [5, 7, 2, 9, 11, 6, 1], [8, 8, 4], range(1, 21), [30, 31], [12, 5, 7, 7, 2])]
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def llama(**settings: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **settings}))


def gpt2(**settings: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, "initializer_range": 0.3, **settings}))


def gemma2() -> Any:
    """Every other layer sees a window of 4 tokens, so that most rows are longer than it."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(2)
    model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, sliding_window=4, query_pre_attn_scalar=8))
    assert set(model.config.layer_types or ()) == {"sliding_attention", "full_attention"}
    return model


def adapted() -> Any:
    """A peft model whose adapter changes the logits."""
    from peft import LoraConfig, get_peft_model

    base = llama()
    torch.manual_seed(3)
    return get_peft_model(
        base,
        LoraConfig(r=4, lora_alpha=64, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama, eager": functools.partial(llama, attn_implementation="eager"),
    "gpt2": gpt2,
    "gemma2": gemma2,
    "peft": adapted,
}


def sample(model: nn.Module, prompts: list[np.ndarray] = PROMPTS, k: int = 3, **arguments: Any) -> Samples:
    arguments = {"seed": 0, "eos_token_ids": [0], "max_new_tokens": 10, **arguments}
    fields = {name: arguments.pop(name) for name in list(arguments) if name in Sampling.__dataclass_fields__}
    samples = generate(model, prompts, k, Sampling(**fields), **arguments)
    assert samples is not None
    return samples


def next_logits(model: nn.Module, prompt: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """(L, V) float64 logits of one unpadded pass without a cache, before each of `tokens`."""
    ids = torch.from_numpy(np.concatenate([prompt, tokens]).astype(np.int64))[None]
    with evaluating(model), torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return np.asarray(logits.double())


def log_softmax(scores: np.ndarray) -> np.ndarray:
    return np.asarray(scipy.special.log_softmax(scores, axis=-1))


def drawn_from(logits: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """(L, V) log-probabilities after temperature, then top-k, then top-p (the smallest set of most probable tokens
    whose probability reaches p, Holtzman et al. 2020, section 3.1), renormalised."""
    out = []
    for row in logits / temperature:
        ranked = np.argsort(-row, kind="stable")
        kept = ranked[:top_k] if top_k else ranked
        probabilities = np.exp(log_softmax(row[kept]))
        before = np.cumsum(probabilities) - probabilities
        kept = kept[before < top_p]
        scores = np.full(len(row), -np.inf)
        scores[kept] = row[kept]
        out.append(log_softmax(scores))
    return np.array(out)


def equal(a: Samples, b: Samples) -> None:
    np.testing.assert_array_equal(a.prompt, b.prompt)
    np.testing.assert_array_equal(a.finished, b.finished)
    assert [t.tolist() for t in a.tokens] == [t.tolist() for t in b.tokens]
    for x, y in zip(a.logp, b.logp, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)


def message(make: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        make()
    return str(caught.value)


# What is drawn


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sequences_come_with_their_enumerated_probability(temperature: float) -> None:
    """Vocabulary of 5, length 2, token 2 ends: 1 + 4 * 5 = 21 sequences a prompt; the prompts have different lengths.

    Pearson's chi-square of 10 000 draws each; with the right distribution p < 1e-4 happens once in 10 000 seeds.
    """
    model, end, n = llama(vocab_size=5, initializer_range=0.09), 2, 10_000
    prompts = [np.array([1]), np.array([2, 0, 3, 3])]
    samples = sample(model, prompts, n, eos_token_ids=[end], max_new_tokens=2, temperature=temperature, batch_size=5000)
    for i, prompt in enumerate(prompts):
        first = np.exp(log_softmax(next_logits(model, prompt, np.array([0])) / temperature))[0]
        expected: dict[tuple[int, ...], float] = {(end,): first[end]}
        for a, b in itertools.product({0, 1, 2, 3, 4} - {end}, range(5)):
            second = np.exp(log_softmax(next_logits(model, prompt, np.array([a, 0])) / temperature))[1]
            expected[a, b] = first[a] * second[b]
        assert sum(expected.values()) == pytest.approx(1)
        assert n * min(expected.values()) > 5  # where the chi-square approximation holds
        counts = Counter(tuple(t.tolist()) for t in itertools.compress(samples.tokens, samples.prompt == i))
        assert counts.keys() <= expected.keys()
        assert chisquare([counts[s] for s in expected], [n * p for p in expected.values()]).pvalue > 1e-4


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 1.5, "top_k": 6, "top_p": 0.8}],
    ids=str,
)
def test_temperature_top_k_and_top_p(settings: dict[str, float]) -> None:
    """One token of a vocabulary of 12: frequencies (chi-square) and log-probabilities of the direct computation."""
    model, n, prompt = llama(vocab_size=12, initializer_range=0.2), 8000, np.array([3, 9, 1])
    expected = drawn_from(next_logits(model, prompt, np.array([0])), **settings)[0]  # type: ignore[arg-type]
    samples = sample(model, [prompt], n, eos_token_ids=[], max_new_tokens=1, batch_size=4000, **settings)
    drawn = np.concatenate(samples.tokens)
    kept = np.flatnonzero(np.isfinite(expected))
    assert len(kept) == 12 if settings == {"temperature": 2.0} else 2 <= len(kept) < 12
    assert n * np.exp(expected[kept]).min() > 5
    assert set(drawn.tolist()) == set(kept.tolist())
    counts = np.bincount(drawn, minlength=12)[kept]
    assert chisquare(counts, n * np.exp(expected[kept])).pvalue > 1e-4
    np.testing.assert_allclose(np.concatenate(samples.logp), expected[drawn], atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.7, "top_k": 20, "top_p": 0.9}], ids=str)
def test_log_probabilities_are_those_of_a_teacher_forced_pass(name: str, settings: dict[str, Any]) -> None:
    """Prompts of 1 to 20 tokens padded into one batch, against single rows without padding or cache, in float32."""
    model = MODELS[name]()
    samples = sample(model, eos_token_ids=[0, 3, 17], max_new_tokens=24, batch_size=len(PROMPTS) * 3, **settings)
    assert {len(t) for t in samples.tokens} > {24}
    for i, tokens, logp in zip(samples.prompt, samples.tokens, samples.logp, strict=True):
        expected = drawn_from(next_logits(model, PROMPTS[i], tokens), **settings)
        np.testing.assert_allclose(logp, expected[np.arange(len(tokens)), tokens], atol=1e-4)


def test_noise_is_gumbel_noise_without_grain() -> None:
    """Kolmogorov-Smirnov against the standard Gumbel distribution; and no value twice in 2**20: of 53 random bits 6e-5
    pairs agree on average, of 24 (float32) 32 768."""
    noise = (_GumbelMax([0])(torch.empty(0), torch.zeros(1, 2**20)) + np.log(2.0**20)).flatten()
    assert kstest(noise.numpy()[: 2**16], "gumbel_r").pvalue > 1e-4
    assert len(set(noise.tolist())) == 2**20


def test_noise_is_never_used_twice() -> None:
    """Not by another row, nor by a later step, although noise is drawn for several steps at once."""
    vocabulary = _DRAW // 4
    draw, scores = _GumbelMax([0, 1, 2]), torch.zeros(3, vocabulary)
    noise = torch.cat([draw(torch.empty(0), scores) for _ in range(16)])
    assert len(set(noise.flatten().tolist())) == 3 * 16 * vocabulary


# What a completion depends on


@pytest.mark.parametrize("name", MODELS)
def test_a_completion_does_not_depend_on_its_batch(name: str) -> None:
    model = MODELS[name]()
    keys = [(1, f"row {i}") for i in range(len(PROMPTS))]
    one = sample(model, batch_size=1, keys=keys)
    assert len({tuple(t.tolist()) for t in one.tokens}) > len(one) // 2  # so that equality says something
    for batch_size in (3, 8, 100):
        equal(one, sample(model, batch_size=batch_size, keys=keys))
    some = [4, 1]
    chosen = sample(model, [PROMPTS[i] for i in some], 2, keys=[keys[i] for i in some], batch_size=3)
    for row, tokens in enumerate(chosen.tokens):
        assert tokens.tolist() == one.tokens[some[row // 2] * 3 + row % 2].tolist()


def test_results_are_in_the_order_of_prompt_and_number() -> None:
    """Whatever the batching: each completion has the log-probabilities of the prompt that it is said to belong to."""
    model = llama()
    samples = sample(model, k=2, batch_size=5)
    assert samples.prompt.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert samples.prompt.dtype == np.int64
    assert len(samples) == 12
    assert all(t.dtype == np.int32 for t in samples.tokens)
    assert all(x.dtype == np.float32 for x in samples.logp)
    assert samples.finished.dtype == bool
    for i, tokens, logp in zip(samples.prompt, samples.tokens, samples.logp, strict=True):
        scores = log_softmax(next_logits(model, PROMPTS[i], tokens))[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(logp, scores, atol=1e-4)


def test_seed_key_and_number_all_count() -> None:
    model = llama()
    same_prompt = [PROMPTS[1]] * 2

    def completions(**arguments: Any) -> list[tuple[int, ...]]:
        return [tuple(t.tolist()) for t in sample(model, same_prompt, 2, **arguments).tokens]

    first = completions()
    assert len(set(first)) == 4
    assert first == completions(keys=[0, 1])
    assert not set(first) & set(completions(seed=1))
    a, b = completions(keys=["a", "b"]), completions(keys=[("b",), ("a",)])
    assert a == b[2:] + b[:2]
    shared = completions(keys=[7, 7])
    assert shared[:2] == shared[2:]


def test_no_global_generator_is_used() -> None:
    model = llama()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = sample(model)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    equal(first, sample(model))


def test_nothing_of_the_models_generation_config_leaks_in() -> None:
    """Each of these changes what `generate` does by default; several are kept even where a configuration is given."""
    from transformers import GenerationConfig

    model = llama()
    expected = sample(model)
    own: Any = GenerationConfig(
        do_sample=True, temperature=0.2, top_k=1, top_p=0.1, min_p=0.5, repetition_penalty=3.0, no_repeat_ngram_size=1,
        suppress_tokens=[1, 2, 3, 4, 5, 6, 7, 8], begin_suppress_tokens=[9, 10, 11], bad_words_ids=[[12], [13]],
        forced_eos_token_id=14, exponential_decay_length_penalty=(1, 2.0), renormalize_logits=True, min_length=40,
        sequence_bias=[[[15], 10.0]], eos_token_id=[16, 17, 18], pad_token_id=19, max_length=22, use_cache=False,
        output_scores=True, return_dict_in_generate=True, max_time=1e-9, num_return_sequences=2, num_beams=2,
    )  # fmt: skip
    model.generation_config = own
    equal(expected, sample(model))
    assert model.generation_config is own

    wrapped = adapted()
    expected = sample(wrapped)
    wrapped.get_base_model().generation_config = own
    equal(expected, sample(wrapped))
    assert wrapped.get_base_model().generation_config is own


# Ends


def test_a_completion_ends_with_any_end_token_and_holds_it_once() -> None:
    ends = [7, 30, 31, 8]  # some of them are in prompts, where they end nothing
    samples = sample(llama(), k=20, eos_token_ids=ends, max_new_tokens=12)
    assert {int(t[-1]) for t in samples.tokens} >= set(ends)
    for tokens, logp, finished in zip(samples.tokens, samples.logp, samples.finished, strict=True):
        assert len(tokens) == len(logp)
        assert not set(tokens[:-1].tolist()) & set(ends)
        assert bool(finished) == (int(tokens[-1]) in ends)
        assert finished or len(tokens) == 12
    assert 0 < samples.finished.sum() < len(samples)
    assert (samples.finished & (np.array([len(t) for t in samples.tokens]) == 12)).any()  # ended by the last token


def test_other_end_tokens_change_nothing_but_the_end() -> None:
    """Of a completion without end tokens, what precedes the first of any end tokens; the padding token is a token."""
    model = llama()
    whole = sample(model, eos_token_ids=[], max_new_tokens=30)
    assert {len(t) for t in whole.tokens} == {30}
    assert not whole.finished.any()
    for ends, pad in (([5, 9], None), ([5], 5), ([5], 9), ([5], 0)):
        cut = sample(model, eos_token_ids=ends, pad_token_id=pad, max_new_tokens=30)
        for long, short, logp, short_logp in zip(whole.tokens, cut.tokens, whole.logp, cut.logp, strict=True):
            found = np.flatnonzero(np.isin(long, ends))
            length = found[0] + 1 if len(found) else 30
            assert short.tolist() == long[:length].tolist()
            np.testing.assert_allclose(short_logp, logp[:length], atol=1e-4)
    assert any(0 in t and 9 in t for t in whole.tokens)


def test_minimum_length() -> None:
    """No end before it, and the log-probabilities are of the distribution without the end token."""
    model, ends = llama(), [7, 30, 31, 8, 2, 3]
    samples = sample(model, k=6, eos_token_ids=ends, min_new_tokens=4, max_new_tokens=10)
    lengths = [len(t) for t in samples.tokens]
    assert min(lengths) == 5
    for i, tokens, logp in zip(samples.prompt, samples.tokens, samples.logp, strict=True):
        scores = next_logits(model, PROMPTS[i], tokens)
        scores[:4, ends] = -np.inf
        np.testing.assert_allclose(logp, log_softmax(scores)[np.arange(len(tokens)), tokens], atol=1e-4)


def test_greedy_is_that_of_transformers() -> None:
    model = gpt2()
    samples = sample(model, k=2, temperature=0, eos_token_ids=[9], batch_size=4)
    for i, tokens, logp in zip(samples.prompt, samples.tokens, samples.logp, strict=True):
        ids = torch.from_numpy(PROMPTS[i])[None]
        with evaluating(model):
            expected = model.generate(input_ids=ids, max_new_tokens=10, eos_token_id=9, pad_token_id=0)
        assert tokens.tolist() == expected[0, ids.shape[1] :].tolist()
        assert logp.tolist() == [0.0] * len(tokens)


# The model and the caller


def test_dropout_and_checkpointing_are_off_and_modes_come_back() -> None:
    model = llama(attention_dropout=0.5)
    expected = sample(model.eval())
    model.train()
    model.gradient_checkpointing_enable()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert set(modes.values()) == {True, False}
    equal(expected, sample(model))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.is_gradient_checkpointing
    assert all(p.grad is None for p in model.parameters())

    class InterruptionError(Exception):
        pass

    def interrupt() -> bool:
        raise InterruptionError

    own = model.generation_config
    with pytest.raises(InterruptionError):
        sample(model, should_stop=interrupt)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.generation_config is own


def test_autocast() -> None:
    """Under bfloat16 the log-probabilities move by its rounding, and only by it."""
    model = llama(initializer_range=0.1)
    plain = sample(model, k=1)
    rounded = sample(model, k=1, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    firsts = [(x[0], y[0]) for x, y, t, u in zip(plain.logp, rounded.logp, plain.tokens, rounded.tokens, strict=True)
              if t[0] == u[0]]  # fmt: skip
    assert len(firsts) >= 4
    assert 0 < max(abs(x - y) for x, y in firsts) < 0.05


def test_a_stop_gives_nothing_back() -> None:
    """Between batches, and within one: asked once before each batch and once after each token."""
    model = llama()
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    for allowed in (0, 1, 5, 25):
        asked: list[int] = []
        passes.clear()

        def should_stop(allowed: int = allowed, asked: list[int] = asked) -> bool:
            asked.append(1)
            return len(asked) > allowed

        sampling = Sampling(max_new_tokens=10)
        done: list[tuple[int, int]] = []
        out = generate(
            model, PROMPTS, 1, sampling, seed=0, eos_token_ids=[], batch_size=2, should_stop=should_stop,
            progress=lambda a, b, done=done: done.append((a, b)),  # type: ignore[misc]
        )  # fmt: skip
        assert out is None
        assert len(asked) == allowed + 1
        assert len(passes) == allowed - allowed // 11  # of 10 tokens and a question before: no pass after a stop
        assert done == [(2, 6), (4, 6)][: allowed // 11]


def test_each_token_is_computed_once() -> None:
    """The first pass reads the prompts, each later one a single token: the keys and values are cached."""
    widths: list[int] = []
    model = llama()
    model.config.use_cache = False  # as gradient checkpointing would have it
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[1]))
    sample(model, eos_token_ids=[], batch_size=100)
    assert widths == [20] + [1] * 9


def test_progress() -> None:
    done: list[tuple[int, int]] = []
    sample(llama(), k=2, batch_size=5, should_stop=lambda: False, progress=lambda a, b: done.append((a, b)))
    assert done == [(5, 12), (10, 12), (12, 12)]


def test_no_prompts() -> None:
    samples = sample(llama(), [])
    assert len(samples) == len(samples.prompt) == len(samples.finished) == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(bad: float, temperature: float) -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[5].fill_(bad)
    with pytest.raises(DivergenceError, match=r"the model's logits are not finite \(prompt 3, completion 0\)"):
        sample(model, temperature=temperature)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_new_tokens": 0}, "`max_completion_length` is 0, allowed: 1 or more"),
        ({"min_new_tokens": 11}, "`min_new_tokens` is 11, allowed: 0 to 10"),
        ({"min_new_tokens": -1}, "`min_new_tokens` is -1, allowed: 0 to 10"),
        ({"temperature": -0.1}, "`temperature` is -0.1, allowed: 0 (greedy) or more"),
        ({"temperature": float("nan")}, "`temperature` is nan, allowed: 0 (greedy) or more"),
        ({"top_k": -1}, "`top_k` is -1, allowed: 0 (off) or more"),
        ({"top_p": 0}, "`top_p` is 0, allowed: above 0, up to 1 (off)"),
        ({"top_p": 1.01}, "`top_p` is 1.01, allowed: above 0, up to 1 (off)"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], expected: str) -> None:
    assert message(lambda: Sampling(**{"max_new_tokens": 10, **settings})) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"k": 0}, "`num_generations` is 0, allowed: 1 or more"),
        ({"batch_size": 0}, "the number of completions a batch is 0, allowed: 1 or more"),
        ({"keys": [1, 2]}, "2 keys for 6 prompts"),
        (
            {"max_new_tokens": 45},
            "prompt 3 has 20 tokens and `max_completion_length` is 45, together more than the model's 64 positions; "
            "shorten one of them",
        ),
        (
            {"prompts": [np.array([1]), np.array([], dtype=np.int64)]},
            "prompt 1 has no tokens; give it text or the tokenizer a BOS token",
        ),
    ],
)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_arguments_that_do_not_fit(make: Callable[[], nn.Module], arguments: dict[str, Any], expected: str) -> None:
    assert message(lambda: sample(make(), **arguments)) == expected


def test_encoder_decoder_models_are_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    assert "needs a decoder-only model" in message(lambda: sample(T5ForConditionalGeneration(config)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_all_positions_can_be_used(name: str) -> None:
    samples = sample(MODELS[name](), [np.arange(20)], 1, max_new_tokens=44, eos_token_ids=[])
    assert len(samples.tokens[0]) == 44


def test_full_support() -> None:
    require_full_support(Sampling(max_new_tokens=5, temperature=0.7), "GRPO")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"top_p": 0.9}, "`top_p` = 0.9 keeps tokens from ever being drawn, and GRPO needs a positive probability for "
         "every token; set `top_p` to 1"),
        ({"top_k": 50}, "set `top_k` to 0"),
        ({"temperature": 0}, "set `temperature` to above 0"),
        ({"min_new_tokens": 2}, "set `min_new_tokens` to 0"),
    ]  # fmt: skip
    for settings, expected in refused:
        found = message(lambda s=settings: require_full_support(Sampling(**{"max_new_tokens": 5, **s}), "GRPO"))  # type: ignore[misc]
        assert found.endswith(expected)
