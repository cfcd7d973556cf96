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
    cut = _Cut(v, w, low, high)
    first, _ = cut.moments(cut.kinks, cut.below)  # (..., kinks): linear between them
    found: Array = (first - rho[..., None] * (cut.kinks - cut.kinks[0])).max(-1)
    return found


def tv_penalty(
    values: ArrayLike, weights: ArrayLike, level: ArrayLike, low: float | None = None, high: float | None = None
) -> Array:
    """E[min(V, low + level)]: (...). More than `level` above the worst is not worth its price. `high` is not needed."""
    v, w, sigma = _checked(values, weights, level)
    low, _ = _bounds(v, low, high)
    if not sigma.size or (sigma == sigma.flat[0]).all():
        return np.asarray(w @ np.minimum(v, low + (sigma.flat[0] if sigma.size else 0.0)))
    found: Array = (w * np.minimum(v, low + sigma[..., None])).sum(-1)
    return found


def kl_penalty(
    values: ArrayLike, weights: ArrayLike, level: ArrayLike, low: float | None = None, high: float | None = None
) -> Array:
    """-level log E exp(-V / level): (...).

    With weights that do not sum to 1, exp(-V / level) - 1 is estimated and 1 added, so a feature that was never seen
    has the value 0; what is estimated above `high` is `high`, and below `low`, where it is given, `low`. In logarithms,
    so that small levels do not underflow.
    """
    v, w, sigma = _checked(values, weights, level)
    least = -np.inf if low is None else low
    _, high = _bounds(v, low, high)
    rest = 1 - w.sum(-1, keepdims=True)
    rest = np.where(np.abs(rest) < 1e-12, 0.0, rest)
    exponents = np.concatenate([np.zeros((*w.shape[:-1], 1)), -v / sigma[..., None]], -1)
    logs, signs = logsumexp(exponents, b=np.concatenate([rest, w], -1), axis=-1, return_sign=True)
    found: Array = np.where(signs > 0, np.clip(-sigma * logs, least, high), high)
    return found


def chi2_penalty(
    values: ArrayLike, weights: ArrayLike, level: ArrayLike, low: float | None = None, high: float | None = None
) -> Array:
    """max_{a in [low, high]} E[min(V, a)] - Var(min(V, a)) / (4 level): (...).

    Between two kinks a of values it is a quadratic, whose stationary point counts where it lies between them.
    """
    v, w, sigma = _checked(values, weights, level)
    cut, sigma = _Cut(v, w, low, high), sigma[..., None]

    def objective(a: Array, below: NDArray[np.int64]) -> Array:
        first, second = cut.moments(a, below)
        return np.asarray(first - (second - first**2) / (4 * sigma))

    best = objective(cut.kinks, cut.below).max(-1)
    if len(cut.kinks) > 1:
        whole, mass, _ = cut.parts
        # first = whole + mass a, second = const + mass a^2: the derivative is mass (1 + whole / 2 sigma - a (1 - mass)
        # / 2 sigma), linear in a.
        with np.errstate(divide="ignore", invalid="ignore"):
            a = np.where(mass != 1, (2 * sigma + whole) / (1 - mass), cut.kinks[:-1])
        best = np.maximum(best, objective(np.clip(a, cut.kinks[:-1], cut.kinks[1:]), cut.below[:-1]).max(-1))
    return np.asarray(best)


def kl_radius(
    values: ArrayLike, weights: ArrayLike, level: ArrayLike, low: float | None = None, high: float | None = None
) -> Array:
    """max_{b > 0} -b log E exp(-V / b) - b level: (...), `kl_penalty` at the best price b less its radius.

    The maximum is concave in b for probabilities, and found to 1e-10 of log b; for other weights it is that near the
    best of a grid of prices.
    """
    v, w, rho = _checked(values, weights, level)
    rows = w.reshape(-1, w.shape[-1])
    found = [_kl_radius(v, p, float(r), low, high) for p, r in zip(rows, rho.ravel(), strict=True)]
    return np.array(found).reshape(w.shape[:-1])


def _kl_radius(v: Array, w: Array, rho: float, low: float | None, high: float | None) -> float:
    inside = w != 0
    v, w = v[inside], w[inside]
    spread = float(np.ptp(v)) if len(v) else 0.0
    if rho == 0 or spread == 0:
        return float(w @ v)
    bottom, _ = _bounds(v, low, high)

    def dual(log_b: float) -> float:
        b = float(np.exp(log_b))
        return float(kl_penalty(v, w, b, low, high)) - b * rho

    # Below the smallest price all mass is at the least value to within rounding, above the largest the radius costs
    # more than the spread.
    grid = np.linspace(np.log(spread) - 20, np.log(spread / rho) + 2, 45)
    heights = [dual(x) for x in grid]
    at = int(np.argmax(heights))
    bounds = grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]
    best: Any = optimize.minimize_scalar(lambda x: -dual(x), bounds=bounds, method="bounded", options={"xatol": 1e-10})
    return max(-float(best.fun), heights[at], bottom)


def chi2_radius(
    values: ArrayLike, weights: ArrayLike, level: ArrayLike, low: float | None = None, high: float | None = None
) -> Array:
    """max_{a in [low, high]} E[min(V, a)] - sqrt(level Var(min(V, a))): (...).

    Between two kinks the variance is a quadratic in a, so stationary points are roots of one, too. A variance that
    ridge weights estimate below 0 is 0.
    """
    v, w, rho = _checked(values, weights, level)
    cut, rho = _Cut(v, w, low, high), rho[..., None]

    def objective(a: Array, below: NDArray[np.int64]) -> Array:
        first, second = cut.moments(a, below)
        return np.asarray(first - np.sqrt(rho * np.maximum(second - first**2, 0.0)))

    best = objective(cut.kinks, cut.below).max(-1)
    if len(cut.kinks) > 1:
        whole, mass, square = cut.parts
        # first = whole + mass a, Var = p + 2 q a + r a^2: mass^2 Var = level (q + r a)^2 where the slope is 0.
        p, q, r = square - whole**2, -whole * mass, mass * (1 - mass)
        two, one, none = r * (mass**2 - rho * r), q * (mass**2 - rho * r), mass**2 * p - rho * q**2
        with np.errstate(divide="ignore", invalid="ignore"):
            root = np.sqrt(np.maximum(one**2 - two * none, 0.0))
            stationary = [np.where(two != 0, (-one + sign * root) / two, cut.kinks[:-1]) for sign in (1, -1)]
            root = np.sqrt(np.maximum(q**2 - p * r, 0.0))  # where the variance reaches 0
            stationary += [np.where(r != 0, (-q + sign * root) / r, cut.kinks[:-1]) for sign in (1, -1)]
        for a in stationary:
            inside = np.clip(np.nan_to_num(a), cut.kinks[:-1], cut.kinks[1:])
            best = np.maximum(best, objective(inside, cut.below[:-1]).max(-1))
    return np.asarray(best)


class _Cut:
    """Moments of min(V, a) for values (k,) and weights (..., k), from sums over sorted values: O(k log k + k ...).

    Attributes:
        kinks: places (m,) between which they are polynomials: the values within [low, high], and these two.
        below: for each, how many values are not above it.
        parts: of each interval between kinks, (..., m - 1): the sum of w V and the sum of w V^2 over values that the
            cut leaves whole, first and last, and between them the weight of the others.
    """

    def __init__(self, v: Array, w: Array, low: float | None, high: float | None) -> None:
        low, high = _bounds(v, low, high)
        order = np.argsort(v, kind="stable")
        v, w = v[order], w[..., order]
        self._sums = [_cumulated(w * v**power) for power in (0, 1, 2)]  # (..., k + 1)
        self.kinks = np.unique(np.concatenate([np.clip(v, low, high), [low, high]]))
        self.below = np.searchsorted(v, self.kinks, "right")

    def moments(self, a: Array, below: NDArray[np.int64]) -> tuple[Array, Array]:
        """E[min(V, a)] and E[min(V, a)^2], (..., m), at places (m,) or (..., m) with `below` (m,) values below."""
        mass, first, second = (sums[..., below] for sums in self._sums)
        rest = self._sums[0][..., -1:] - mass
        return first + rest * a, second + rest * a**2

    @property
    def parts(self) -> tuple[Array, Array, Array]:
        below = self.below[:-1]
        mass, first, second = (sums[..., below] for sums in self._sums)
        return first, self._sums[0][..., -1:] - mass, second


def _cumulated(x: Array) -> Array:
    return np.concatenate([np.zeros((*x.shape[:-1], 1)), np.cumsum(x, -1)], -1)


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
