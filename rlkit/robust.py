"""Worst cases of expectations: the smallest E_mu[V] over distributions mu near a nominal one, by their duals.

`radius` functions bound the distance, `penalty` functions charge for it:

    radius   inf { E_mu V : D(mu, mu0) <= level },      penalty   inf_mu { E_mu V + level D(mu, mu0) },

with D the total variation (half the L1 distance), Kullback-Leibler or chi-square divergence. Total variation may move
mass to any state, the others only within the nominal support.

All take values V (k,), weights (..., k), and return (...). Weights are probabilities of the values, or what stands for
them in an estimate: rows of the ridge regression C = (Phi^T Phi + lam I)^-1 Phi^T, so that `weights @ V` estimates an
expectation for each feature. Such weights may be negative and need not sum to 1; the dual's one-dimensional maximum is
then not concave, and is found exactly by looking at every kink.

Sources: arXiv:2402.15399 (radius, total variation), arXiv:2411.18612 (penalties); Iyengar (2005), Nilim and El Ghaoui
(2005) for the duality.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize
from scipy.special import logsumexp

from rlkit.errors import UserError

Array = NDArray[np.float64]


def tv_radius(
    values: ArrayLike, weights: ArrayLike, level: ArrayLike, low: float | None = None, high: float | None = None
) -> Array:
    """max_{a in [low, high]} E[min(V, a)] - level (a - low): (...).

    Args:
        level: the radius, in [0, 1]; one, or one for each of (...).
        low, high: least and largest value of any state; by default those of `values`. Mass is moved to `low`, so a
            least value that is known (0 of a failed state) should be given.
    """
    v, w, rho = _checked(values, weights, level)
    low, high = _bounds(v, low, high)
    a = np.unique(np.concatenate([np.clip(v, low, high), [low, high]]))
    cut = w @ np.minimum(v[:, None], a)  # (..., kinks): linear between them
    found: Array = (cut - rho[..., None] * (a - low)).max(-1)
    return found


def tv_penalty(values: ArrayLike, weights: ArrayLike, level: ArrayLike, low: float | None = None) -> Array:
    """E[min(V, low + level)]: (...). More than `level` above the worst is not worth its price."""
    v, w, sigma = _checked(values, weights, level)
    low, _ = _bounds(v, low, None)
    found: Array = (w * np.minimum(v, low + sigma[..., None])).sum(-1)
    return found


def kl_penalty(values: ArrayLike, weights: ArrayLike, level: ArrayLike, high: float | None = None) -> Array:
    """-level log E exp(-V / level): (...).

    With weights that do not sum to 1, exp(-V / level) - 1 is estimated and 1 added, so a feature that was never seen
    has the value 0; what is estimated above `high` is `high`. In logarithms, so that small levels do not underflow.
    """
    v, w, sigma = _checked(values, weights, level)
    _, high = _bounds(v, None, high)
    rest = 1 - w.sum(-1, keepdims=True)
    rest = np.where(np.abs(rest) < 1e-12, 0.0, rest)
    exponents = np.concatenate([np.zeros((*w.shape[:-1], 1)), -v / sigma[..., None]], -1)
    logs, signs = logsumexp(exponents, b=np.concatenate([rest, w], -1), axis=-1, return_sign=True)
    found: Array = np.where(signs > 0, np.minimum(-sigma * logs, high), high)
    return found


def chi2_penalty(
    values: ArrayLike, weights: ArrayLike, level: ArrayLike, low: float | None = None, high: float | None = None
) -> Array:
    """max_{a in [low, high]} E[min(V, a)] - Var(min(V, a)) / (4 level): (...).

    Between two kinks a of values it is a quadratic, whose stationary point counts where it lies between them.
    """
    v, w, sigma = _checked(values, weights, level)
    low, high = _bounds(v, low, high)
    kinks = np.unique(np.concatenate([np.clip(v, low, high), [low, high]]))

    def objective(a: Array) -> Array:  # (..., m)
        cut = np.minimum(v[:, None], a[..., None, :]) if a.ndim > 1 else np.minimum(v[:, None], a)
        first, second = (w[..., :, None] * cut).sum(-2), (w[..., :, None] * cut**2).sum(-2)
        return np.asarray(first - (second - first**2) / (4 * sigma[..., None]))

    best = objective(kinks).max(-1)
    start, stop = kinks[:-1], kinks[1:]
    if len(start):
        below = v[:, None] <= start  # values that the cut between two kinks leaves whole
        whole = (w[..., :, None] * np.where(below, v[:, None], 0.0)).sum(-2)  # (..., intervals)
        cut_weight = (w[..., :, None] * ~below).sum(-2)
        # first = whole + b a, second = const + b a^2: the derivative in a is linear.
        slope = 1 + whole / (2 * sigma[..., None])
        curve = (1 - cut_weight) / (2 * sigma[..., None])
        with np.errstate(divide="ignore", invalid="ignore"):
            a = np.where(curve != 0, slope / curve, start)
        best = np.maximum(best, objective(np.clip(a, start, stop)).max(-1))
    return np.asarray(best)


def kl_radius(values: ArrayLike, weights: ArrayLike, level: ArrayLike) -> Array:
    """max_{b > 0} -b log E exp(-V / b) - b level: (...), for probabilities."""
    v, w, rho = _checked(values, weights, level)
    return _each(w, rho, lambda p, r: _kl_radius(v, p, r))


def _kl_radius(v: Array, p: Array, rho: float) -> float:
    inside = p > 0
    v, p = v[inside], p[inside]
    spread = float(v.max() - v.min())
    if spread == 0 or rho == 0:
        return float(p @ v / p.sum())

    def dual(log_b: float) -> float:
        b = np.exp(log_b)
        return float(b * logsumexp(-v / b, b=p) + b * rho)

    found: Any = optimize.minimize_scalar(
        dual, bounds=(np.log(spread) - 20, np.log(spread / rho) + 20), method="bounded", options={"xatol": 1e-10}
    )
    return max(-float(found.fun), float(v.min()))


def chi2_radius(values: ArrayLike, weights: ArrayLike, level: ArrayLike) -> Array:
    """max_a E[min(V, a)] - sqrt(level Var(min(V, a))): (...), for probabilities, where it is concave in a."""
    v, w, rho = _checked(values, weights, level)

    def worst(p: Array, r: float) -> float:
        def dual(a: float) -> float:
            cut = np.minimum(v, a)
            mean = p @ cut
            return float(-(mean - np.sqrt(r * max(float(p @ (cut - mean) ** 2), 0.0))))

        found: Any = optimize.minimize_scalar(
            dual, bounds=(v.min(), v.max()), method="bounded", options={"xatol": 1e-12}
        )
        return -min(float(found.fun), dual(float(v.max())), dual(float(v.min())))

    return _each(w, rho, worst)


DUALS: dict[str, Callable[..., Array]] = {
    "tv_radius": tv_radius,
    "tv_penalty": tv_penalty,
    "kl_penalty": kl_penalty,
    "chi2_penalty": chi2_penalty,
    "kl_radius": kl_radius,
    "chi2_radius": chi2_radius,
}


def _checked(values: ArrayLike, weights: ArrayLike, level: ArrayLike) -> tuple[Array, Array, Array]:
    v, w, given = (np.asarray(x, np.float64) for x in (values, weights, level))
    if v.ndim != 1 or not len(v) or w.ndim < 1 or w.shape[-1] != len(v):
        raise UserError(f"values (k,) and weights (..., k) do not fit each other: {v.shape} and {w.shape}")
    if (given < 0).any():
        raise UserError(f"`level`: got {given.min():g}, expected 0 or more")
    return v, w, np.broadcast_to(given, w.shape[:-1])


def _bounds(v: Array, low: float | None, high: float | None) -> tuple[float, float]:
    low = float(v.min()) if low is None else low
    high = float(v.max()) if high is None else high
    return low, max(low, high)


def _each(w: Array, level: Array, worst: Callable[[Array, float], float]) -> Array:
    rows = w.reshape(-1, w.shape[-1])
    if (rows < 0).any() or not np.allclose(rows.sum(1), 1):
        raise UserError("weights: this worst case is of probabilities, which are positive and sum to 1")
    return np.array([worst(p, float(r)) for p, r in zip(rows, level.ravel(), strict=True)]).reshape(w.shape[:-1])
