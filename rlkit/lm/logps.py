"""Per-token log-probabilities and entropies: the only implementation in the library.

`Head` is what a causal language model does to its last hidden state; `completion_logps` applies it to the positions
that matter and never holds more than `budget` bytes of vocabulary-wide tensors, in the forward pass and in the
backward pass. Three ways lead to the same numbers:

- a plain linear head that is trained: the gradient of logit j is g (1[j = target] - p_j), formed in place. What fits
  the budget is kept for the backward pass, the rest is recomputed block by block: one matrix product more, but fewer
  passes over memory than autograd makes, so that it costs less than `torch.utils.checkpoint`.
- a plain linear head that is frozen (adapters elsewhere): d logp / d hidden = (1[target] - p) W does not depend on the
  loss, so the forward pass computes it at once, (N, H), and the backward pass only scales it.
- any other head (an adapter on it, hooks, a quantised layer): the module itself, under `torch.utils.checkpoint`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rlkit.errors import UserError
from rlkit.products import checkpoint_contexts, recomputing

BUDGET = 2**28
"""Default bytes of vocabulary-wide tensors alive at once."""


class TokenStats(NamedTuple):
    """What is known of N tokens: `logp` (N,), natural logarithm, and `entropy` (N,) of the distributions, in nats."""

    logp: Tensor
    entropy: Tensor | None = None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)  # float64 stays: tests pin tiny differences


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """(N, V), (N,) int64 -> (N,): logit of the target minus logsumexp, in float32 (float64 stays float64)."""
    return F.log_softmax(logits.to(_wide(logits.dtype)), dim=-1).gather(-1, targets[:, None]).squeeze(-1)


def entropy(logits: Tensor) -> Tensor:
    """(N, V) -> (N,): -sum p ln p in nats, in float32 (float64 stays float64); a logit of -inf adds nothing."""
    return _entropy(F.log_softmax(logits.to(_wide(logits.dtype)), dim=-1))


def _entropy(logp: Tensor) -> Tensor:
    return -(logp.exp() * logp.clamp_min(torch.finfo(logp.dtype).min)).sum(-1)


@dataclass(frozen=True)
class Tail:
    """What follows the output projection: u -> multiply u / divide -> cap tanh(. / cap) -> / temperature."""

    multiply: float = 1.0
    divide: float = 1.0
    cap: float | None = None
    temperature: float = 1.0

    @property
    def is_identity(self) -> bool:
        return self == Tail()

    def __call__(self, logits: Tensor) -> Tensor:
        if self.multiply != 1.0:
            logits = logits * self.multiply
        if self.divide != 1.0:
            logits = logits / self.divide
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits if self.temperature == 1.0 else logits / self.temperature

    def in_place(self, logits: Tensor) -> Tensor:
        """The same on a tensor that nobody else holds."""
        if self.multiply != 1.0:
            logits.mul_(self.multiply)
        if self.divide != 1.0:
            logits.div_(self.divide)
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)

    def backward_in_place(self, gradient: Tensor, logp: Tensor, logsumexp: Tensor) -> Tensor:
        """Gradient by the projection's output from that by the final logits, `logp + logsumexp`; both are overwritten.

        d cap tanh(v / cap) / dv = 1 - tanh(v / cap)^2, and the tanh is the final logit times temperature / cap.
        """
        if self.cap is not None:
            tanh = logp.add_(logsumexp[:, None]).mul_(self.temperature / self.cap)
            gradient.mul_(tanh.square_().neg_().add_(1.0))
        scale = self.multiply / self.divide / self.temperature
        return gradient if scale == 1.0 else gradient.mul_(scale)


# Where transformers 5.23 keeps what its causal language models do to the logits of their last layer.
_MULTIPLY = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere; Falcon-H1; Muse
_DIVIDE = ("logits_scaling",)  # Granite; HyperCLOVA X multiplies by it
_CAP = ("final_logit_softcapping", "logits_soft_cap")  # Gemma; RecurrentGemma


class Head:
    """A causal language model's output projection and what follows it: (N, H) -> (N, V).

    The module itself is called, so tied weights, a bias or an adapter on it count; it is not registered as a part of
    anything. `check_head` compares it with the model's own logits.

    Args:
        module: the projection.
        tail: what follows it.
    """

    def __init__(self, module: nn.Module, tail: Tail | None = None) -> None:
        self.module, self.tail = module, tail or Tail()

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """The head of a causal language model, possibly wrapped.

        Raises:
            UserError: the model has no output projection over a vocabulary.
        """
        lm: Any = causal_lm(model)
        module = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
        if module is None:
            raise UserError(f"`model`: {type(lm).__name__} has no output projection; expected a causal language model")
        config: Any = text_config(lm)
        multiply, divide = _number(config, _MULTIPLY), _number(config, _DIVIDE)
        if divide is not None and str(getattr(config, "model_type", "")).startswith("hyperclovax"):
            multiply, divide = divide, None
        return cls(module, Tail(multiply or 1.0, divide or 1.0, _number(config, _CAP)))

    def __call__(self, hidden: Tensor) -> Tensor:
        """(N, H) -> (N, V) logits in float32 (float64 stays float64)."""
        logits = self.module(hidden)
        return self.tail(logits.to(_wide(logits.dtype)))

    @property
    def linear(self) -> nn.Linear | None:
        """The projection where it is nothing but a linear layer, whose product can be taken apart."""
        module = self.module
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        plain = (
            type(module) is nn.Linear
            and "forward" not in vars(module)  # accelerate and others replace the method of the instance
            and not any(getattr(module, name) for name in hooks)
            and type(module.weight) in (nn.Parameter, Tensor)  # a distributed or quantised one knows its own product
        )
        return module if plain and isinstance(module, nn.Linear) else None


def _number(config: Any, names: tuple[str, ...]) -> float | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


def completion_logps(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    entropy_grad: bool = False,
    budget: int = BUDGET,
) -> TokenStats:
    """Log-probabilities of `targets` and, where asked for, entropies of the distributions they were drawn from.

    Args:
        head: from `Head.of`.
        hidden: (N, H) last hidden states at the positions that predict.
        targets: (N,) int64 token ids.
        temperature: logits are divided by it.
        with_entropy: compute entropies.
        entropy_grad: let gradients flow through the entropies.
        budget: bytes of (., V) tensors alive at once, in the forward pass and in the backward pass; at least one
            position is worked on at a time. Gradients of the projection's weight are not counted.

    Raises:
        UserError: a temperature that is not above 0.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UserError(f"`temperature` is {temperature}; expected a number above 0")
    tail = Tail(head.tail.multiply, head.tail.divide, head.tail.cap, float(temperature))
    linear = head.linear
    if linear is None:
        return _any_head(head, tail, hidden, targets, with_entropy, entropy_grad, budget)
    weight, bias = linear.weight, linear.bias
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    grad = torch.is_grad_enabled()
    train_head = grad and (weight.requires_grad or (bias is not None and bias.requires_grad))
    train_hidden = grad and hidden.requires_grad
    with_grad = with_entropy and entropy_grad
    n, row = len(hidden), weight.shape[0] * _bytes(dtype, tail, with_grad)
    keep = train_head and n * row <= budget
    job = _Job(
        tail,
        dtype,
        max(1, n if keep else budget // row),
        keep,
        ahead=train_hidden and not train_head and not with_grad,
        with_entropy=with_entropy,
        entropy_grad=with_grad,
    )
    logp, entropies = _LinearLogps.apply(hidden, weight, bias, targets, job)
    return TokenStats(logp, entropies if with_entropy else None)


def _bytes(dtype: torch.dtype, tail: Tail, entropy_grad: bool) -> int:
    """Bytes that one logit takes at the worst moment of a block: log-probability and gradient (or logit), what a cap
    and the gradient of an entropy need besides, and the half-precision result or argument of a matrix product.
    """
    wide = _wide(dtype)
    tensors = 2 + (tail.cap is not None) + entropy_grad
    return wide.itemsize * tensors + (dtype.itemsize if dtype != wide else 0)


@dataclass(frozen=True)
class _Job:
    tail: Tail
    dtype: torch.dtype  # of the matrix products
    rows: int  # positions of a block
    keep: bool  # all log-probabilities for the backward pass; then there is one block
    ahead: bool  # d logp / d hidden in the forward pass
    with_entropy: bool
    entropy_grad: bool

    def blocks(self, n: int) -> Iterator[slice]:
        return (slice(i, min(i + self.rows, n)) for i in range(0, n, self.rows))


class _LinearLogps(torch.autograd.Function):
    """(hidden (N, H), weight (V, H), bias (V,) or None, targets (N,), job) -> logp (N,), entropy (N,) or (0,)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, job: _Job
    ) -> tuple[Tensor, Tensor]:
        n, wide = len(hidden), _wide(job.dtype)
        logp = hidden.new_empty(n, dtype=wide)
        logsumexp, entropies = torch.empty_like(logp), logp.new_empty(n if job.with_entropy else 0)
        slope = torch.empty_like(hidden) if job.ahead else None
        kept = None
        with torch.autocast(hidden.device.type, enabled=False):
            x, w, b = _cast(job.dtype, hidden, weight, bias)
            for block in job.blocks(n):
                target = targets[block, None]
                row = _log_softmax(x[block], w, b, job.tail, logsumexp[block], target)
                logp[block] = row.gather(-1, target).squeeze(-1)
                if job.with_entropy:
                    row.clamp_(min=torch.finfo(wide).min)  # 0 ln 0 = 0
                    entropies[block] = row.exp().mul_(row).sum(-1).neg_()
                if slope is not None:
                    one = torch.ones_like(logp[block])
                    gradient = _logit_gradient(row, target, one, None, None, logsumexp[block], job.tail, own=True)
                    slope[block] = gradient.to(job.dtype) @ w
                    del gradient
                if job.keep:
                    kept = row
                del row  # before the next block's is made
        ctx.job, ctx.shape, ctx.recomputing = job, hidden.shape, recomputing()
        saved = (slope,) if job.ahead else (hidden, weight, bias, targets, logsumexp, entropies, kept)
        ctx.save_for_backward(*saved)
        if not job.entropy_grad:
            ctx.mark_non_differentiable(entropies)
        ctx.set_materialize_grads(False)
        return logp, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, g_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        job: _Job = ctx.job
        if g is None and g_entropy is None:
            return None, None, None, None, None
        if job.ahead:
            (slope,) = ctx.saved_tensors
            return (slope * g[:, None].to(slope.dtype) if g is not None else None), None, None, None, None
        hidden, weight, bias, targets, logsumexp, entropies, kept = ctx.saved_tensors
        if g is None:
            g = torch.zeros_like(logsumexp)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = _wide(job.dtype)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight: Tensor | None = None
        d_bias = torch.zeros_like(bias, dtype=wide) if need_bias else None
        with torch.autocast(hidden.device.type, enabled=False), ctx.recomputing():
            x, w, b = _cast(job.dtype, hidden, weight, bias)
            for block in job.blocks(len(hidden)):
                target = targets[block, None]
                row = kept if job.keep else _log_softmax(x[block], w, b, job.tail, None, target)
                g_e, e = (None, None) if g_entropy is None else (g_entropy[block], entropies[block])
                gradient = _logit_gradient(row, target, g[block], g_e, e, logsumexp[block], job.tail, own=not job.keep)
                del row
                if d_bias is not None:
                    d_bias += gradient.sum(0)
                gradient = gradient.to(job.dtype)
                if d_hidden is not None:
                    d_hidden[block] = gradient @ w
                if need_weight:
                    d_weight = _add_product(d_weight, gradient, x[block], _wide(weight.dtype))
                del gradient
        if need_weight:
            d_weight = torch.zeros_like(weight) if d_weight is None else d_weight.to(weight.dtype)
        if d_bias is not None:
            d_bias = d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None


def _cast(dtype: torch.dtype, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Any]:
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _log_softmax(
    x: Tensor, w: Tensor, b: Tensor | None, tail: Tail, logsumexp: Tensor | None, target: Tensor
) -> Tensor:
    """(n, H) -> (n, V) log-probabilities; their logsumexp (n,) goes where `logsumexp` says."""
    logits = F.linear(x, w, b)
    logits = tail.in_place(logits.to(_wide(logits.dtype)))
    logp = F.log_softmax(logits, dim=-1)
    if logsumexp is not None:
        logsumexp.copy_((logits.gather(-1, target) - logp.gather(-1, target)).squeeze(-1))
    return logp


def _logit_gradient(
    logp: Tensor,
    target: Tensor,
    g: Tensor,
    g_entropy: Tensor | None,
    entropies: Tensor | None,
    logsumexp: Tensor,
    tail: Tail,
    *,
    own: bool,
) -> Tensor:
    """(n, V) gradient by the projection's output of sum_i g_i logp_i[target_i] + g_entropy_i H_i.

    d logp[t] / dz_j = 1[j = t] - p_j and dH / dz_j = -p_j (ln p_j + H).

    Args:
        own: `logp` may be overwritten.
    """
    spare = None if own and tail.cap is None else logp
    if tail.cap is not None and not own:
        spare = logp.clone()
    gradient = logp.exp_() if own and tail.cap is None and g_entropy is None else logp.exp()
    if g_entropy is None or entropies is None:
        gradient.mul_(-g[:, None])
    else:
        finite = logp.clamp_min(torch.finfo(logp.dtype).min)
        gradient.mul_(finite.add_(entropies[:, None]).mul_(g_entropy[:, None]).add_(g[:, None]).neg_())
    gradient.scatter_add_(-1, target, g[:, None].to(gradient.dtype))
    return tail.backward_in_place(gradient, spare if spare is not None else gradient, logsumexp)


def _add_product(total: Tensor | None, gradient: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """total (V, H) + gradient (n, V)^T x (n, H); the sum over blocks is kept in `dtype`."""
    if total is None:
        return (gradient.t() @ x).to(dtype)
    if total.dtype == gradient.dtype:
        return total.addmm_(gradient.t(), x)
    return total.add_(gradient.t() @ x)


def _any_head(
    head: Head, tail: Tail, hidden: Tensor, targets: Tensor, with_entropy: bool, entropy_grad: bool, budget: int
) -> TokenStats:
    """By calling the module, on blocks of positions that the backward pass recomputes where there are several."""
    full = Head(head.module, tail)

    def block(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        logp = F.log_softmax(full(hidden), dim=-1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_grad):
            entropies = _entropy(logp) if with_entropy else None
        return logp.gather(-1, targets[:, None]).squeeze(-1), entropies

    # autograd holds logits and log-probabilities and makes two gradients of that size; a cap and an entropy add theirs
    tensors = 4 + 2 * (tail.cap is not None) + 3 * (with_entropy and entropy_grad)
    n, row = len(hidden), tensors * _vocabulary(head.module, hidden) * _wide(hidden.dtype).itemsize
    rows = max(1, budget // row)
    if n <= rows:
        return TokenStats(*block(hidden, targets))
    parts = []
    for i in range(0, n, rows):
        arguments = hidden[i : i + rows], targets[i : i + rows]
        if torch.is_grad_enabled():
            parts.append(checkpoint(block, *arguments, use_reentrant=False, context_fn=checkpoint_contexts))
        else:
            parts.append(block(*arguments))
    logp = torch.cat([part[0] for part in parts])
    return TokenStats(logp, torch.cat([part[1] for part in parts]) if with_entropy else None)


def _vocabulary(module: nn.Module, hidden: Tensor) -> int:
    """Entries of the projection's output."""
    for name in ("out_features", "num_embeddings"):
        size = getattr(module, name, None)
        if isinstance(size, int):
            return size
    with torch.no_grad():
        return int(module(hidden[:1]).shape[-1])


# The model around the head


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """The model and what it wraps, from the outside to the causal language model: compiled, distributed, scoring
    (`rlkit.lm.layout.Scorer`) and adapter wrappers.
    """
    while True:
        yield model
        parts = vars(model).get("_modules", {})
        inner = next((parts[name] for name in ("_orig_mod", "module", "scored") if name in parts), None)
        if inner is None and hasattr(model, "get_base_model"):  # peft
            inner = model.get_base_model()  # type: ignore[operator]
        if not isinstance(inner, nn.Module):
            return
        model = inner


def causal_lm(model: nn.Module) -> nn.Module:
    """The causal language model inside its wrappers."""
    return list(wrappers(model))[-1]


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model, of the text part where there are several."""
    config: Any = getattr(causal_lm(model), "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length")


def positions(model: nn.Module) -> int | None:
    """Tokens of the longest row that the model's configuration allows, None where it names no limit."""
    config = text_config(model)
    found = [p for name in _POSITIONS if isinstance(p := getattr(config, name, None), int) and p > 0]
    return min(found, default=None)


def prompt_learning(model: nn.Module) -> bool:
    """Whether an adapter puts virtual tokens before the row (prompt or prefix tuning), which only its own call does."""
    configs = (getattr(wrapper, "active_peft_config", None) for wrapper in wrappers(model))
    return any(getattr(config, "is_prompt_learning", False) for config in configs)


def backbone(model: nn.Module) -> nn.Module | None:
    """The module that yields the last hidden state, or None where none can be called apart from the head.

    Adapters inside it count. Calling it passes by what hangs on the wrappers themselves (gradient synchronisation of
    DistributedDataParallel, a sharded root): wrap a `rlkit.lm.layout.Scorer` instead, whose call contains this one.
    """
    if prompt_learning(model):
        return None
    lm = causal_lm(model)
    base = getattr(lm, "base_model", None)
    return base if isinstance(base, nn.Module) and base is not lm else None


def last_hidden(module: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """(R, L, H) from a backbone; no cache is kept."""
    return module(**inputs, use_cache=False).last_hidden_state


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode comes back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def check_head(model: nn.Module, input_ids: Tensor) -> float:
    """Largest absolute difference between the model's logits and those of `Head` on its backbone; inf where one of
    them does not exist or their shapes differ.

    Args:
        input_ids: (R, L) int64 real tokens, no padding.
    """
    return _compare(model, input_ids)[0]


def find_head(model: nn.Module, input_ids: Tensor) -> Head | None:
    """The model's head where it gives the model's own logits, else None: `forward` then takes the logits themselves.

    Equal means up to rounding of the largest logit: 1e-5 of it in float32, 2e-2 in half precision.
    """
    difference, largest, dtype = _compare(model, input_ids)
    tolerance = max(1.0, largest) * (1e-5 if dtype == _wide(dtype) else 2e-2)
    return Head.of(model) if difference <= tolerance else None


def _compare(model: nn.Module, input_ids: Tensor) -> tuple[float, float, torch.dtype]:
    """Largest difference, largest logit of the model, dtype of its logits."""
    nothing = math.inf, 1.0, torch.float32
    base = backbone(model)
    if base is None:
        return nothing
    try:
        head = Head.of(model)
    except UserError:
        return nothing
    with evaluating(model):
        own = causal_lm(model)(input_ids=input_ids, use_cache=False).logits
        hidden = last_hidden(base, {"input_ids": input_ids})
        ours = head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        if ours.shape != own.shape:
            return nothing
        difference = (ours - own.to(ours.dtype)).abs().max().item()
    return difference if math.isfinite(difference) else math.inf, own.abs().max().item(), own.dtype
