"""Optimiser steps that control trainers share: Adam, one descent, one averaging of targets.

All of it is made of tensor operations, the step count included, so that a whole update, from the batch to the new
weights, can be compiled as one graph (`rlkit.compilation`). `descend` is the only place where a gradient becomes a
step: it never takes a step on a non-finite gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Average = Callable[[list[Tensor]], list[Tensor]]


class Adam:
    """Adam (Kingma and Ba, arXiv:1412.6980, Algorithm 1) on a fixed list of parameters.

    Different from `torch.optim.Adam` in form alone: its state is there from the start, and every number that changes is
    a tensor.

    Attributes:
        parameters: what it optimises.
        exp_avg, exp_avg_sq: the moments m and v, one tensor a parameter.
        step: steps taken, (1,).
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.betas, self.eps = betas, eps
        self.exp_avg = [torch.zeros_like(p) for p in self.parameters]
        self.exp_avg_sq = [torch.zeros_like(p) for p in self.parameters]
        device = self.parameters[0].device
        # (1,) and not (): compiled code forgets what it adds to a float64 scalar on a CPU (PyTorch 2.13).
        self.step = torch.zeros(1, dtype=torch.float64, device=device)
        self._rate = torch.zeros((), device=device)
        # Of the next step t: beta1^t and beta2^t, and 1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t). They are kept,
        # because a compiled loop over weights would compute them anew for every few weights. The powers are running
        # products, so that eager and compiled steps agree on them to the last bit.
        self._betas = torch.tensor(betas, dtype=torch.float64, device=device)
        self._powers = self._betas.clone()
        self._corrections = torch.zeros(2, device=device)
        self.correct_bias()
        self.learning_rate = learning_rate

    @property
    def learning_rate(self) -> float:
        """The step size alpha."""
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._learning_rate = value
        self._rate.fill_(value)

    @torch.no_grad()
    def take_step(self, grads: Sequence[Tensor], finite: Tensor) -> None:
        """One step along `grads`, one a parameter; none, and no change of state, where the scalar `finite` is false."""
        if torch.compiler.is_compiling():
            self._traced_step(grads, finite)
        else:
            self._fused_step(grads, finite)
        self.step.add_(finite)
        self._powers.mul_(torch.where(finite, self._betas, 1.0))
        if torch.compiler.is_compiling():
            self.correct_bias()

    def _fused_step(self, grads: Sequence[Tensor], finite: Tensor) -> None:
        step = (self.step[0] + 1).float()
        grads = [grad.contiguous() for grad in grads]  # the kernel goes through memory as parameters lie there
        beta1, beta2 = self.betas
        torch._fused_adam_(
            self.parameters, grads, self.exp_avg, self.exp_avg_sq, [], [step] * len(grads),
            lr=self._learning_rate, beta1=beta1, beta2=beta2, weight_decay=0.0, eps=self.eps, amsgrad=False,
            maximize=False, found_inf=(~finite).float(),
        )  # fmt: skip

    def _traced_step(self, grads: Sequence[Tensor], finite: Tensor) -> None:
        """The fused kernel's arithmetic, for a compiler to fuse with what is around it."""
        beta1, beta2 = self.betas
        size, root = self._rate * self._corrections[0], self._corrections[1]
        for parameter, grad, m, v in zip(self.parameters, grads, self.exp_avg, self.exp_avg_sq, strict=True):
            new_m = m + (1 - beta1) * (grad - m)
            new_v = beta2 * v + (1 - beta2) * grad * grad
            moved = parameter - size * new_m / (new_v.sqrt() * root + self.eps)
            parameter.copy_(torch.where(finite, moved, parameter))
            m.copy_(torch.where(finite, new_m, m))
            v.copy_(torch.where(finite, new_v, v))

    @torch.no_grad()
    def correct_bias(self) -> None:
        """Make the corrections that a compiled next step needs; to be called where it follows steps of another kind."""
        power1, power2 = self._powers.unbind()
        self._corrections.copy_(torch.stack([1 / (1 - power1), 1 / torch.sqrt(1 - power2)]))

    def state_dict(self) -> dict[str, Any]:
        """Steps, powers of the betas, and the moments by their parameter's number; no learning rate."""
        return {
            "step": self.step,
            "powers": self._powers,
            "exp_avg": {str(i): m for i, m in enumerate(self.exp_avg)},
            "exp_avg_sq": {str(i): v for i, v in enumerate(self.exp_avg_sq)},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the optimiser that `state` was taken from.

        Raises:
            ValueError: it was of other parameters.
        """
        for name in ("exp_avg", "exp_avg_sq"):
            found = [tuple(state[name][key].shape) for key in sorted(state[name], key=int)]
            expected = [tuple(p.shape) for p in self.parameters]
            if found != expected:
                raise ValueError(f"`{name}` is of parameters of the shapes {found}, not {expected}")
            for key, value in state[name].items():
                getattr(self, name)[int(key)].copy_(value)
        self.step.copy_(state["step"])
        self._powers.copy_(state["powers"])
        self.correct_bias()


def descend(
    optimizer: Adam,
    loss: Tensor,
    average: Average | None = None,
    *,
    max_norm: float | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """One step of `optimizer` on the scalar `loss`; returns the gradient's norm, a scalar.

    Args:
        average: makes gradients those of the mean of the losses of all processes; see `Processes.average`.
        max_norm: to which the gradient is cut, as by `torch.nn.utils.clip_grad_norm_`; the norm returned is the whole.
        skip: a scalar; no step is taken where it is true.

    Gradients flow to the optimiser's own parameters alone, so an actor loss that runs through a critic leaves the
    critic without gradients. If the norm is not finite, weights and optimiser state stay as they were, and the caller
    sees the norm.
    """
    grads = list(torch.autograd.grad(loss, optimizer.parameters))
    if average is not None:  # a loss that is not finite has to show in all processes, whatever its gradients are
        grads = average([grads[0] + 0.0 * loss.detach(), *grads[1:]])
    norm = _norm(grads)
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        grads = [grad * scale for grad in grads]
    finite = torch.isfinite(norm)
    optimizer.take_step(grads, finite if skip is None else finite & ~skip)
    return norm


@torch.no_grad()
def _norm(grads: Sequence[Tensor]) -> Tensor:
    """Of all of them as one vector."""
    if torch.compiler.is_compiling():  # the list operation below would interrupt a compiled graph
        return torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads))))


@torch.no_grad()
def polyak_(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source, in place, parameter by parameter."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)
