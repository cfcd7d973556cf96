"""Networks that control trainers share.

Initial weights are those of `torch.nn.Linear`. Critics are one batched module (`EnsembleMLP`), so that N critics cost
one batched matrix product a layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator
from torch import Tensor, nn
from torch.nn import functional as F

from rlkit.products import Library, affine

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


class MLP(nn.Module):
    """(..., in) -> (..., out): linear layers with an activation between them.

    Args:
        sizes: widths from input to output.
        activation: a name of `ACTIVATIONS`.
        activate_last: apply the activation after the last layer, too (a trunk under several heads).
    """

    def __init__(self, sizes: Sequence[int], activation: str = "relu", activate_last: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.activation, self.activate_last = ACTIVATIONS[activation], activate_last

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < len(self.layers) - 1 or self.activate_last:
                x = self.activation(x)
        return x


class Linear(nn.Linear):
    """(..., in) -> (..., out); its large products come from `library`."""

    library: Library = "blas"

    def forward(self, x: Tensor) -> Tensor:
        return affine(x, self.weight.mT, self.bias, self.library)


class EnsembleLinear(nn.Module):
    """N independent linear layers in one batched product: (N, B, in) -> (N, B, out)."""

    library: Library = "blas"

    def __init__(self, n: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(inputs)  # torch.nn.Linear's: kaiming_uniform with a = sqrt(5)
        self.weight = nn.Parameter(torch.empty(n, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.shape[-1] == 1:  # what a batched product is slow at
            return (x * self.weight.mT).sum(-1, keepdim=True) + self.bias
        return affine(x, self.weight, self.bias, self.library)


def use_library(module: nn.Module, library: Library) -> None:
    """Let the linear layers of `module` take their large float32 products from `library`."""
    for layer in module.modules():
        if isinstance(layer, Linear | EnsembleLinear):
            layer.library = library


@torch.no_grad()
def orthogonal_(module: nn.Module, gain: float) -> None:
    """Orthogonal weights times `gain`, zero biases, in all linear layers of `module`, member by member."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | EnsembleLinear):
            for weight in layer.weight if layer.weight.dim() == 3 else [layer.weight]:
                nn.init.orthogonal_(weight, gain)
            nn.init.zeros_(layer.bias)


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
    (DroQ, arXiv:2110.02034). The noise of dropout is an input, `masks`; without it nothing is dropped.
    """

    def __init__(
        self,
        n: int,
        sizes: Sequence[int],
        activation: str = "relu",
        layer_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.n, self.activation, self.dropout = n, ACTIVATIONS[activation], dropout
        self.layers = nn.ModuleList(EnsembleLinear(n, a, b) for a, b in itertools.pairwise(sizes))
        self.hidden = tuple(sizes[1:-1])
        self.norms = nn.ModuleList(EnsembleLayerNorm(n, width) for width in self.hidden) if layer_norm else None

    def masks(self, rows: int, generator: torch.Generator) -> list[Tensor]:
        """Noise of dropout for a pass over `rows` rows: (N, rows, width) for each hidden layer, 0 with the probability
        of dropout and otherwise what keeps the mean; an empty list without dropout.
        """
        if self.dropout == 0:
            return []
        keep = 1.0 - self.dropout
        drawn = [torch.empty(self.n, rows, width, device=generator.device) for width in self.hidden]
        return [mask.bernoulli_(keep, generator=generator).div_(keep) for mask in drawn]

    def forward(self, x: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        if x.dim() == 2:
            x = x.expand(self.n, *x.shape)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < last:
                x = x * masks[i].to(x.dtype) if masks else x
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
