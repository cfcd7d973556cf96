"""Networks and optimiser steps that control trainers share.

Initial weights are those of `torch.nn.Linear`. Critics are one batched module (`EnsembleMLP`), so that N critics cost
one batched matrix product a layer. `descend` is the only place where a gradient becomes a step: it never takes a step
on a non-finite gradient.
"""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BeforeValidator
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
}


def _activation_name(value: Any) -> Any:
    """`torch.nn.ReLU`, as scripts written for Stable-Baselines3 pass it, as `relu`."""
    if value is nn.LeakyReLU:
        return "leaky_relu"
    return value.__name__.lower() if isinstance(value, type) else value


ActivationName = Annotated[
    Literal["relu", "tanh", "elu", "gelu", "silu", "leaky_relu"], BeforeValidator(_activation_name)
]

F_ = TypeVar("F_", bound=Callable[..., Any])
Average = Callable[[list[Tensor]], list[Tensor]]


class Dropout(nn.Module):
    """Dropout whose masks come from a named stream instead of PyTorch's global one."""

    def __init__(self, probability: float, generator: torch.Generator) -> None:
        super().__init__()
        self.probability, self.generator = probability, generator

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1.0 - self.probability
        return x * torch.empty_like(x).bernoulli_(keep, generator=self.generator) / keep


class MLP(nn.Module):
    """(..., in) -> (..., out): linear layers with an activation between them.

    Args:
        sizes: widths from input to output.
        activation: a name of `ACTIVATIONS`.
        activate_last: apply the activation after the last layer, too (a trunk under several heads).
    """

    def __init__(self, sizes: Sequence[int], activation: str = "relu", activate_last: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.activation, self.activate_last = ACTIVATIONS[activation], activate_last

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < len(self.layers) - 1 or self.activate_last:
                x = self.activation(x)
        return x


class EnsembleLinear(nn.Module):
    """N independent linear layers in one batched product: (N, B, in) -> (N, B, out)."""

    def __init__(self, n: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(inputs)  # torch.nn.Linear's: kaiming_uniform with a = sqrt(5)
        self.weight = nn.Parameter(torch.empty(n, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class EnsembleLayerNorm(nn.Module):
    """Layer normalisation with separate scale and shift for each of N members: (N, B, width) -> same."""

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n, 1, width))
        self.bias = nn.Parameter(torch.zeros(n, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:]), self.weight)


class EnsembleMLP(nn.Module):
    """N multi-layer perceptrons evaluated together: (B, in) or (N, B, in) -> (N, B, out).

    With `layer_norm` and `dropout`, each hidden layer is linear, dropout, layer normalisation, activation
    (DroQ, arXiv:2110.02034).
    """

    def __init__(
        self,
        n: int,
        sizes: Sequence[int],
        activation: str = "relu",
        layer_norm: bool = False,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if dropout > 0 and generator is None:
            raise ValueError("dropout needs a generator")
        self.n, self.activation = n, ACTIVATIONS[activation]
        self.layers = nn.ModuleList(EnsembleLinear(n, a, b) for a, b in itertools.pairwise(sizes))
        hidden = sizes[1:-1]
        self.norms = nn.ModuleList(EnsembleLayerNorm(n, width) for width in hidden) if layer_norm else None
        self.dropout = Dropout(dropout, generator) if dropout > 0 and generator is not None else None

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            x = x.expand(self.n, *x.shape)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < last:
                x = self.dropout(x) if self.dropout is not None else x
                x = self.norms[i](x) if self.norms is not None else x
                x = self.activation(x)
        return x


class LearnedScalar(nn.Module):
    """One learned number, such as the logarithm of SAC's temperature."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value)))

    def forward(self) -> Tensor:
        return self.value


class RunningNorm(nn.Module):
    """Running mean and variance of vectors, stored with the policy and frozen outside `update`.

    Moments are float64 and merged batch by batch with the parallel algorithm of Chan et al. (1979), so they are those
    of all rows seen, whatever the batch sizes. Before any row it only clips.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, width: int, clip: float = 10.0, epsilon: float = 1e-8) -> None:
        super().__init__()
        self.clip, self.epsilon = clip, epsilon
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("var", torch.ones(width, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Merge (B, width) rows into the statistics."""
        if not len(rows):
            return
        rows = rows.to(self.mean)
        n, mean, var = rows.shape[0], rows.mean(0), rows.var(0, unbiased=False)
        total = self.count + n
        delta = mean - self.mean
        spread = self.var * self.count + var * n + delta**2 * (self.count * n / total)
        self.mean.add_(delta * (n / total))
        self.var.copy_(spread / total)
        self.count.copy_(total)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) of any float dtype -> float32, clipped to +-clip standard deviations."""
        scaled = (x - self.mean) / torch.sqrt(self.var + self.epsilon)
        return scaled.clamp(-self.clip, self.clip).float()


class ToFloat32(nn.Module):
    """The identity in float32, where no normalisation is asked for."""

    def update(self, rows: Tensor) -> None:
        """Nothing to learn."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def adam(parameters: Iterable[nn.Parameter], learning_rate: float, **kwargs: Any) -> torch.optim.Adam:
    """Adam in one fused kernel (CPU and CUDA); everything but the learning rate as in PyTorch."""
    return torch.optim.Adam(list(parameters), lr=learning_rate, fused=True, **kwargs)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, average: Average | None = None) -> Tensor:
    """One step of a fused `optimizer` on the scalar `loss`; returns the gradient's norm, a scalar.

    `average` replaces the gradients by their means over processes, which are those of the mean of the losses.

    Gradients flow to the optimiser's own parameters alone, so an actor loss that runs through a critic leaves the
    critic without gradients. If the norm is not finite, the fused kernel skips the step (as under a gradient scaler):
    weights and optimiser state stay as they were, and the caller sees the norm.

    Raises:
        TypeError: the optimiser is not fused, so that it would take the step.
    """
    if not all(group.get("fused") for group in optimizer.param_groups):
        raise TypeError("descend needs a fused optimiser, such as `adam` makes")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grads = list(torch.autograd.grad(loss, parameters))
    if average is not None:  # a loss that is not finite has to show in all processes, whatever its gradients are
        grads = average([grads[0] + 0.0 * loss.detach(), *grads[1:]])
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
    optimizer.step()
    return norm


@torch.no_grad()
def polyak_(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source, in place, parameter by parameter."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def compile_or_eager(function: F_, mode: str, device: torch.device) -> F_:
    """`function` compiled where `mode` (auto, on, off) asks for it; a failure prints one line and goes on eagerly.

    What `function` itself raises passes through, except that a RuntimeError or OSError of the first call cannot be told
    from a missing compiler and makes the call happen again.
    """
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return function
    compiled: Callable[..., Any] | None = None
    failed = worked = False

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled, failed, worked
        if failed:
            return function(*args, **kwargs)
        try:
            if compiled is None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    compiled = torch.compile(function)
            result = compiled(*args, **kwargs)
            worked = True
            return result
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError, OSError) as error:
            if worked and not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            failed = True
            reason = str(error).strip().split("\n")[0]
            print(f"compile failed, running eagerly: {type(error).__name__}: {reason}", file=sys.stderr)
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]
