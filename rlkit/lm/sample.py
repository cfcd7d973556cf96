"""Completions from a causal language model: K for each prompt, each with noise of its own.

transformers' `generate` decodes; this module prepares its batches and adds one logits processor that draws. The draw is
the Gumbel-max trick (Maddison, Tarlow and Minka 2014, "A* Sampling"): argmax_v (log p_v + G_v) with independent
G_v = -log(-log U_v) is a sample of p. The noise of a completion comes from a generator that is seeded by the prompt's
key and the completion's number alone, so a completion depends neither on its batch nor on the other prompts, up to the
rounding of the model's logits; and where logits differ by rounding only, the argmax rarely does.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rlkit.errors import DivergenceError, UserError
from rlkit.lm.logps import evaluating, positions
from rlkit.rng import derive

if TYPE_CHECKING:
    from transformers import LogitsProcessorList

Key = int | str | tuple[int | str, ...]

_DRAW = 1024  # random numbers a row and call: steps are drawn together where the vocabulary is small


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; transformers applies these in the order of the fields.

    Attributes:
        min_new_tokens: no end token before this many tokens.
        temperature: logits are divided by it; 0 takes the most probable token (greedy).
        top_k: only the k most probable tokens; 0 is off.
        top_p: only the most probable tokens that reach this probability together; 1 is off.
        max_new_tokens: a completion is cut at this many tokens (TRL: `max_completion_length`).
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: one is out of its range.
        """
        longest = self.max_new_tokens
        for name, value, fits, allowed in (
            ("max_completion_length", longest, longest >= 1, "1 or more"),
            (
                "min_new_tokens",
                self.min_new_tokens,
                0 <= self.min_new_tokens <= longest,
                f"0 to {longest}",
            ),
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, up to 1 (off)"),
        ):
            if not fits:
                raise UserError(f"`{name}` is {value}, allowed: {allowed}")


def require_full_support(sampling: Sampling, what: str) -> None:
    """Refuse settings under which some tokens are never drawn: a ratio of probabilities needs all of them.

    Args:
        what: who asks, for the message, e.g. "importance sampling".

    Raises:
        UserError: a setting removes tokens.
    """
    removes = {
        "temperature": (sampling.temperature == 0, "above 0"),
        "top_k": (sampling.top_k > 0, "0"),
        "top_p": (sampling.top_p < 1, "1"),
        "min_new_tokens": (sampling.min_new_tokens > 0, "0"),
    }
    for name, (removed, instead) in removes.items():
        if removed:
            raise UserError(
                f"`{name}` = {getattr(sampling, name)} keeps tokens from ever being drawn, and {what} needs a positive "
                f"probability for every token; set `{name}` to {instead}"
            )


@dataclass
class Samples:
    """N completions, in the order of (prompt, number).

    Attributes:
        prompt: (N,) int64, which prompt.
        tokens: (L_i,) int32 each, with the end token where one was drawn.
        logp: (L_i,) float32 each, log-probabilities under the distribution that was drawn from: after temperature,
            top-k and top-p. Greedy draws with certainty: 0.
        finished: (N,) bool; False was cut at `max_new_tokens`.
    """

    prompt: np.ndarray
    tokens: list[np.ndarray]
    logp: list[np.ndarray]
    finished: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def dealt(parts: Sequence[Samples | None]) -> Samples | None:
        """The samples of prompts 0, 1, … that were dealt in turn to n parts, which all have k for each prompt.

        None where a part is missing.
        """
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return None
        if len(parts) == 1:
            return found[0]
        numbered = [part.prompt * len(parts) + r for r, part in enumerate(found)]
        prompt = np.concatenate(numbered)
        order = prompt.argsort(kind="stable").tolist()
        tokens, logp = ([row for part in found for row in getattr(part, name)] for name in ("tokens", "logp"))
        finished = np.concatenate([part.finished for part in found])
        return Samples(prompt[order], [tokens[i] for i in order], [logp[i] for i in order], finished[order])


def generate(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    k: int,
    sampling: Sampling,
    *,
    seed: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int | None = None,
    keys: Sequence[Key] | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Samples | None:
    """`k` completions of each prompt, or None when a stop was asked for before all were done.

    Prompts go longest first, so that memory runs out at once or never. Nothing in the model's own `generation_config`
    has an effect. The model is in evaluation mode meanwhile (no dropout, no gradient checkpointing).

    Args:
        model: a decoder-only transformers model, or a peft model around one.
        prompts: (P_i,) token ids each, not padded.
        seed: with a prompt's key and the completion's number it determines the completion.
        eos_token_ids: any of these ends a completion; none: all are cut at `max_new_tokens`.
        pad_token_id: fills the shorter prompts' rows, not attended to. None: 0, which every vocabulary has.
        keys: one for each prompt, by default its index. Prompts with the same key get the same noise.
        batch_size: completions a batch.
        device: where the inputs go, by default the model's device.
        autocast: makes the context for each batch.
        progress: called with (completions done, completions in all) after each batch.
        should_stop: asked before each batch and after each token.

    Raises:
        UserError: an empty prompt, one too long for the model, or arguments that do not fit.
        DivergenceError: the model's logits are not finite.
    """
    _check(model, prompts, k, sampling, keys, batch_size)
    device = torch.device(device) if device is not None else next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    rows = [(i, j) for i in order for j in range(k)]
    tokens: list[np.ndarray] = [np.empty(0, dtype=np.int32)] * len(rows)
    logps: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(rows)
    finished = np.zeros(len(rows), dtype=bool)
    stop = _Stop(should_stop)
    with evaluating(model), _without_generation_config(model):
        for start in range(0, len(rows), batch_size):
            if stop.asked():
                return None
            batch = rows[start : start + batch_size]
            seeds = [derive(seed, "completion", *_path(keys[i] if keys is not None else i), j) for i, j in batch]
            with autocast():
                ids, logp = _decode(
                    model,
                    [prompts[i] for i, _ in batch],
                    sampling,
                    seeds,
                    eos_token_ids,
                    pad_token_id or 0,
                    device,
                    stop,
                )
            if stop.requested:
                return None
            ends = np.isin(ids, np.asarray(eos_token_ids, dtype=np.int64))  # (B, T)
            lengths = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, ids.shape[1])
            for b, (i, j) in enumerate(batch):
                row, length = i * k + j, lengths[b]
                tokens[row], logps[row] = ids[b, :length].astype(np.int32), logp[b, :length].copy()
                finished[row] = ends[b].any()
                if not np.isfinite(logps[row]).all():
                    raise DivergenceError(f"sampling: the model's logits are not finite (prompt {i}, completion {j})")
            if progress is not None:
                progress(start + len(batch), len(rows))
    return Samples(np.repeat(np.arange(len(prompts), dtype=np.int64), k), tokens, logps, finished)


@contextlib.contextmanager
def _without_generation_config(model: nn.Module) -> Iterator[None]:
    """`generate` fills what a given configuration leaves open from the model's own one: an empty one meanwhile."""
    from transformers import GenerationConfig

    owners: list[Any] = [module for module in model.modules() if "generation_config" in vars(module)]
    saved = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for owner, config in zip(owners, saved, strict=True):
            owner.generation_config = config


def _check(
    model: Any, prompts: Sequence[np.ndarray], k: int, sampling: Sampling, keys: Sequence[Key] | None, batch_size: int
) -> None:
    if k < 1:
        raise UserError(f"`num_generations` is {k}, allowed: 1 or more")
    if batch_size < 1:
        raise UserError(f"the number of completions a batch is {batch_size}, allowed: 1 or more")
    if keys is not None and len(keys) != len(prompts):
        raise UserError(f"{len(keys)} keys for {len(prompts)} prompts")
    if model.config.is_encoder_decoder:
        raise UserError("the model has an encoder and a decoder; sampling needs a decoder-only model")
    limit = positions(model)
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {i} has no tokens; give it text or the tokenizer a BOS token")
        if limit is not None and limit < len(prompt) + sampling.max_new_tokens:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens and `max_completion_length` is {sampling.max_new_tokens}, "
                f"together more than the model's {limit} positions; shorten one of them"
            )


def _path(key: Key) -> tuple[int | str, ...]:
    return key if isinstance(key, tuple) else (key,)


def _decode(
    model: Any,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    seeds: Sequence[int],
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    device: torch.device,
    stop: _Stop,
) -> tuple[np.ndarray, np.ndarray]:
    """One batch: ids (B, T) int64, their log-probabilities (B, T) float32; what follows an end token means nothing."""
    from transformers import GenerationConfig, StoppingCriteriaList

    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)
    attended = torch.zeros_like(ids)
    for b, prompt in enumerate(prompts):
        ids[b, width - len(prompt) :] = torch.as_tensor(np.asarray(prompt, dtype=np.int64))
        attended[b, width - len(prompt) :] = 1
    draw = _Greedy() if sampling.temperature == 0 else _GumbelMax(seeds)
    config = GenerationConfig(
        do_sample=False,  # the last processor draws; `generate` takes the argmax of what it returns
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens or None,
        eos_token_id=list(eos_token_ids) or None,
        pad_token_id=pad_token_id,
        use_cache=True,
    )
    out: Tensor = model.generate(
        input_ids=ids.to(device),
        attention_mask=attended.to(device),  # position ids follow from it
        generation_config=config,
        logits_processor=_processors(sampling, draw),
        stopping_criteria=StoppingCriteriaList([stop]),
        synced_gpus=False,  # sharded weights have been gathered; processes need not go token by token together
    )
    return out[:, width:].cpu().numpy(), torch.stack(draw.logp, dim=1).cpu().numpy()


def _processors(sampling: Sampling, draw: _Greedy | _GumbelMax) -> LogitsProcessorList:
    """What `generate` would apply when it samples, in its order, then the draw. It puts `min_new_tokens` before."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    found: list[Any] = []
    if sampling.temperature not in (0, 1):
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList([*found, draw])


class _Greedy:
    """A logits processor that leaves the argmax alone."""

    def __init__(self) -> None:
        self.logp: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logp.append(scores.amax(dim=-1) * 0)  # log 1; NaN where a logit is NaN or infinite
        return scores


class _GumbelMax:
    """A logits processor whose result has its argmax at a token drawn from softmax(scores).

    Args:
        seeds: one for each row. A row's noise is a function of its seed, the step and the vocabulary's size alone.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.logp: list[Tensor] = []
        self._seeds = seeds
        self._generators: list[torch.Generator] = []
        self._noise = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logp = scores.log_softmax(dim=-1)  # (B, V)
        perturbed = logp + self._next(scores)
        self.logp.append(logp.gather(1, perturbed.argmax(dim=-1, keepdim=True))[:, 0])
        return perturbed

    def _next(self, scores: Tensor) -> Tensor:
        """(B, V) standard Gumbel noise.

        In float64 where there is such a type: 24 random bits cannot give the noise that makes a token of probability
        1e-8 win, and a large vocabulary holds many of these.
        """
        rows, vocabulary = scores.shape
        steps = max(1, _DRAW // vocabulary)
        step = len(self.logp) % steps
        if step == 0:
            if not self._generators:
                self._generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self._seeds]
                dtype = torch.float32 if scores.device.type == "mps" else torch.float64
                self._noise = torch.empty((rows, steps, vocabulary), dtype=dtype, device=scores.device)
            for row, generator in zip(self._noise, self._generators, strict=True):
                row.uniform_(generator=generator)  # in [0, 1): -log(-log 0) = -inf loses every argmax
            self._noise.log_().neg_().log_().neg_()
        return self._noise[:, step]


class _Stop:
    """A stopping criterion that ends the batch once a stop is asked for."""

    def __init__(self, should_stop: Callable[[], bool] | None) -> None:
        self._should_stop = should_stop
        self.requested = False

    def asked(self) -> bool:
        self.requested = self.requested or (self._should_stop is not None and self._should_stop())
        return self.requested

    def __call__(self, input_ids: Tensor, scores: Any) -> Tensor:
        return torch.full((len(input_ids),), self.asked(), device=input_ids.device)
