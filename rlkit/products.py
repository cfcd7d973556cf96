"""Float32 matrix products on a CPU through oneDNN instead of PyTorch's BLAS library.

PyTorch multiplies float32 matrices with Intel's MKL, which does not use the AVX-512 units of AMD processors; oneDNN,
which PyTorch brings along for other precisions, does (`rlkit bench dpo-speed` measures both). They differ by rounding,
so a run is repeated bit for bit only by the one that it was made with.

    with onednn_products():
        loss = loss_of(model)
    loss.backward()

That context looks at every call of PyTorch, which a large model does not notice and a small network does: the layers of
`rlkit.nets` call `affine` instead.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rlkit.errors import UserError

Library = Literal["blas", "onednn"]

SMALLEST = 2**23
"""Multiplications from which oneDNN is used: below, its set-up costs more than it saves."""


@cache
def preferred() -> Library:
    """The faster library for this processor; a function of its kind alone, so that a run can be repeated."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "blas"
    info = Path("/proc/cpuinfo")
    described = info.read_text() if info.exists() else platform.processor()
    return "onednn" if "AuthenticAMD" in described else "blas"


def library(wanted: Literal["auto", "blas", "onednn"], device: torch.device) -> Library:
    """Which library a configuration means on this machine.

    Raises:
        UserError: oneDNN is asked for where it cannot work.
    """
    if wanted == "onednn" and (device.type != "cpu" or not torch.backends.mkldnn.is_available()):
        raise UserError(f"`matmul`: onednn needs a CPU and a PyTorch built with it; the device is {device}")
    if wanted == "auto":
        return preferred() if device.type == "cpu" else "blas"
    return wanted


def affine(x: Tensor, weight: Tensor, bias: Tensor, library: Library) -> Tensor:
    """x weight + bias, by `library` where it is float32 and large enough.

    Args:
        x: (..., K) for one matrix, (N, B, K) for N of them.
        weight, bias: (K, M) and (M,), or (N, K, M) and (N, 1, M).

    Returns:
        (..., M), or (N, B, M).
    """
    if library == "onednn" and _large(x, weight):
        if weight.dim() == 2:
            return _Product.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1) + bias
        return torch.stack([_Product.apply(rows, one) for rows, one in zip(x, weight, strict=True)]) + bias
    if torch.compiler.is_compiling():  # it adds the bias together with what follows; the libraries copy it first
        product = torch.matmul(x, weight)
        return product + bias.to(product.dtype)
    return F.linear(x, weight.mT, bias) if weight.dim() == 2 else torch.baddbmm(bias, x, weight)


def _large(x: Tensor, weight: Tensor) -> bool:
    """Whether each product is one for oneDNN; no exported policy's is, whose number of rows is open."""
    if torch.compiler.is_exporting():
        return False
    if x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    rows = x.numel() // x.shape[-1] if weight.dim() == 2 else x.shape[-2]
    return rows * weight.shape[-2] * weight.shape[-1] >= SMALLEST


@contextmanager
def onednn_products(*, anew: bool = False) -> Iterator[None]:
    """Within, large float32 products on the CPU are oneDNN's, and so are those of their derivatives wherever these are
    computed. What a backward pass computes anew does not see the context of its caller: see `recomputing`.

    Args:
        anew: enter also where this thread seems to be within already.
    """
    outside = not getattr(_thread, "inside", False)
    if not (outside or anew):
        yield
        return
    _thread.inside = True
    try:
        with _Products():
            yield
    finally:
        _thread.inside = not outside


def recomputing() -> Callable[[], AbstractContextManager[None]]:
    """Makes the context in which a backward pass computes as it would be done here and now."""
    return partial(onednn_products, anew=True) if getattr(_thread, "inside", False) else nullcontext


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of `torch.utils.checkpoint`: activations are recomputed by the library that computed them."""
    return nullcontext(), recomputing()()


_thread = threading.local()


class _Products(TorchFunctionMode):
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        ours = _OURS.get(func)
        if ours is not None and not kwargs and not torch.compiler.is_compiling():
            found = ours(*args)
            if found is not NotImplemented:
                return found
        return func(*args, **kwargs)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """x (..., K), weight (N, K), bias (N,) -> (..., N)."""
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return NotImplemented
    return _affine(x, weight.t(), bias)


def _addmm(bias: Any, x: Any, weight: Any) -> Any:
    """bias (N,), x (M, K), weight (K, N) -> (M, N)."""
    return _affine(x, weight, bias)


def _affine(x: Any, weight: Any, bias: Any = None) -> Any:
    """x (..., K), weight (K, N), bias (N,) -> (..., N), or NotImplemented."""
    if not (_plain(x) and _plain(weight) and weight.dim() == 2 and x.dim() >= 2 and x.shape[-1] == weight.shape[0]):
        return NotImplemented
    if x.numel() * weight.shape[1] < SMALLEST or torch.is_autocast_enabled("cpu"):
        return NotImplemented
    if bias is not None and not (_plain(bias) and bias.dim() == 1):
        return NotImplemented
    out: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), weight)
    if bias is not None:
        out = out + bias
    return out.view(*x.shape[:-1], weight.shape[1])


def _plain(x: Any) -> bool:
    """A float32 tensor of the CPU without a product of its own."""
    if type(x) not in (Tensor, nn.Parameter):
        return False
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.layout == torch.strided


_OURS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.mm: _affine,
    torch.matmul: _affine,
    Tensor.mm: _affine,
    Tensor.matmul: _affine,
    Tensor.__matmul__: _affine,
}


class _Product(torch.autograd.Function):
    """a (M, K), b (K, N) -> (M, N)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _product(a, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        by_a, by_b = ctx.needs_input_grad
        return _Product.apply(g, b.t()) if by_a else None, _Product.apply(a.t(), g) if by_b else None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """By oneDNN, in the order of the operands that suits it: of a transposed left side, the shorter one first."""
    transposed = a.stride(0) == 1 and a.stride(1) > 1
    if transposed and a.shape[0] > b.shape[1]:
        return _multiply(b.t(), a).t()
    return _multiply(a, b.t())


def _multiply(x: Tensor, w: Tensor) -> Tensor:
    """x (M, K), w (N, K) -> x w^T."""
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.rlkit.product(x.contiguous(), w)
        return out
    return _onednn(x, w)


def _onednn(x: Tensor, w: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return out


# A compiled graph calls it by a name of its own: inductor takes the operation's for one of its weights' formats.
torch.library.define("rlkit::product", "(Tensor x, Tensor w) -> Tensor")
torch.library.impl("rlkit::product", "CPU")(_onednn)
torch.library.register_fake("rlkit::product")(lambda x, w: x.new_empty(x.shape[0], w.shape[0]))
