"""Worst cases by their duals against the problems themselves, solved as programmes, and on values known by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import optimize

from rlkit.errors import UserError
from rlkit.robust import DUALS, chi2_penalty, kl_penalty, tv_penalty, tv_radius

SEEDS = range(6)


def instance(seed: int, n: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 3, n), rng.dirichlet(np.ones(n))


def by_linear_programme(v: np.ndarray, p: np.ndarray, level: float, penalty: bool) -> float:
    """Variables mu and u >= |mu - p|; half the sum of u is the distance, bounded or charged for."""
    n = len(v)
    eye = np.eye(n)
    rows, right = np.block([[eye, -eye], [-eye, -eye]]), np.concatenate([p, -p])
    if not penalty:
        rows, right = np.vstack([rows, np.r_[np.zeros(n), np.full(n, 0.5)]]), np.r_[right, level]
    cost = np.r_[v, np.full(n, 0.5 * level if penalty else 0.0)]
    found = optimize.linprog(cost, rows, right, np.r_[np.ones(n), np.zeros(n)][None], [1.0])
    assert found.success
    return float(found.fun)


def by_programme(v: np.ndarray, p: np.ndarray, level: float, name: str) -> float:
    """The primal of a smooth divergence on mu, by sequential quadratic programming."""

    def distance(mu: np.ndarray) -> float:
        return float(
            ((mu - p) ** 2 / p).sum() if name.startswith("chi2") else (mu * np.log(np.maximum(mu, 1e-300) / p)).sum()
        )

    sums = {"type": "eq", "fun": lambda mu: mu.sum() - 1}
    if name.endswith("penalty"):
        cost, limits = (lambda mu: v @ mu + level * distance(mu)), [sums]
    else:
        cost, limits = (lambda mu: v @ mu), [sums, {"type": "ineq", "fun": lambda mu: level - distance(mu)}]
    starts = [p, 0.5 * p + 0.5 / len(p)]
    found = [
        optimize.minimize(
            cost, s, bounds=[(1e-12, 1)] * len(p), constraints=limits, options={"ftol": 1e-13, "maxiter": 999}
        )
        for s in starts
    ]
    return min(float(f.fun) for f in found if f.success)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("level", [0.05, 0.3, 0.8])
def test_total_variation_is_its_linear_programme(seed: int, level: float) -> None:
    v, p = instance(seed)
    assert tv_radius(v, p, level) == pytest.approx(by_linear_programme(v, p, level, penalty=False), abs=1e-8)
    assert tv_penalty(v, p, level) == pytest.approx(by_linear_programme(v, p, level, penalty=True), abs=1e-8)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["kl_penalty", "chi2_penalty", "kl_radius", "chi2_radius"])
@pytest.mark.parametrize("level", [0.1, 0.5, 2.0])
def test_the_others_are_their_programmes(seed: int, name: str, level: float) -> None:
    v, p = instance(seed)
    assert DUALS[name](v, p, level) == pytest.approx(by_programme(v, p, level, name), abs=2e-4)


@pytest.mark.parametrize("name", DUALS)
def test_limits_and_order(name: str) -> None:
    """No radius, or an infinite price, is the mean; a large radius, or no price, the worst value; monotone between."""
    v, p = instance(7)
    levels = [1e-9, 0.05, 0.2, 0.6, 1.0, 30.0] if name.endswith("radius") else [1e9, 5.0, 1.0, 0.3, 0.05, 1e-6]
    if name == "tv_radius":
        levels[-1] = 1.0
    found = [float(DUALS[name](v, p, level)) for level in levels]
    assert found[0] == pytest.approx(p @ v, abs=2e-4)
    assert found[-1] == pytest.approx(v.min(), abs=2e-4)
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(found))


def test_by_hand() -> None:
    """V = 0, 1, 2 evenly. Radius 0.2: a fifth from 2 to 0, 1 - 0.4. Price 1 of variation: min(V, 1), 2/3. The
    logarithm of (1 + e^-1 + e^-2) / 3."""
    v, p = np.array([0.0, 1.0, 2.0]), np.full(3, 1 / 3)
    assert tv_radius(v, p, 0.2) == pytest.approx(0.6)
    assert tv_penalty(v, p, 1.0) == pytest.approx(2 / 3)
    assert kl_penalty(v, p, 1.0) == pytest.approx(-np.log((1 + np.exp(-1) + np.exp(-2)) / 3))
    # At a = 2 nothing is cut: 1 - (2/3) / (4 sigma); for sigma = 1 the best a, and so the value, is this one.
    assert chi2_penalty(v, p, 1.0) == pytest.approx(1 - (2 / 3) / 4)


def test_a_known_worst_value_draws_mass_that_no_sample_shows() -> None:
    v, p = np.array([1.0, 2.0]), np.array([0.5, 0.5])
    assert tv_radius(v, p, 0.5) == pytest.approx(1.0)
    assert tv_radius(v, p, 0.5, low=0.0) == pytest.approx(0.5)
    assert tv_penalty(v, p, 0.5, low=0.0) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["tv_radius", "chi2_penalty", "chi2_radius", "kl_radius"])
@pytest.mark.parametrize("seed", SEEDS)
def test_estimated_weights_have_their_maximum_found_exactly(name: str, seed: int) -> None:
    """Ridge weights, some negative, where the objective is not concave: as high as a dense grid, never below a local
    search from the middle, and reached."""
    rng = np.random.default_rng(seed)
    features, v = rng.dirichlet(np.ones(4), 25), rng.uniform(0, 3, 25)
    weights = np.linalg.solve(0.1 * np.eye(4) + features.T @ features, features.T)
    assert (weights < 0).any()
    level, grid = np.full(4, 0.4), np.linspace(0, 3, 30_001)
    cut = np.minimum(v[:, None], grid)
    variance = weights @ cut**2 - (weights @ cut) ** 2
    if name == "tv_radius":
        objective = weights @ cut - 0.4 * grid
    elif name == "chi2_penalty":
        objective = weights @ cut - variance / 1.6
    elif name == "chi2_radius":
        objective = weights @ cut - np.sqrt(0.4 * np.maximum(variance, 0))
    else:
        prices = np.exp(np.linspace(-12, 6, 3_001))
        z = 1 + weights @ (np.exp(-v[:, None] / prices) - 1)
        objective = np.where(z > 0, np.minimum(-prices * np.log(np.maximum(z, 1e-300)), 3.0), 3.0) - 0.4 * prices
    found = DUALS[name](v, weights, level, low=0.0, high=3.0)
    assert (found >= objective.max(1) - 1e-9).all()
    np.testing.assert_allclose(found, np.maximum(objective.max(1), 0.0 if name == "kl_radius" else -9), atol=1e-3)


def test_a_feature_never_seen_has_no_value() -> None:
    """Weights of zero: 0, and not the largest value, which a logarithm of zero would be."""
    v = np.array([0.5, 2.0])
    for name in DUALS:
        assert DUALS[name](v, np.zeros((2, 2)), 0.3, low=0.0, high=3.0).tolist() == [0.0, 0.0], name


def test_small_prices_do_not_underflow() -> None:
    v, p = np.array([700.0, 800.0, 900.0]), np.array([0.2, 0.3, 0.5])
    assert kl_penalty(v, p, 1e-3) == pytest.approx(700.0, abs=0.01)
    assert np.isfinite(kl_penalty(v, [0.2, 0.3, 0.4], 0.1, high=1000.0))


def test_levels_of_their_own_and_shapes() -> None:
    v, p = instance(1)
    both = tv_radius(v, np.stack([p, p]), [0.1, 0.4])
    assert both.tolist() == pytest.approx([float(tv_radius(v, p, 0.1)), float(tv_radius(v, p, 0.4))])
    for name in DUALS:
        assert DUALS[name](v, np.tile(p, (2, 3, 1)), 0.3).shape == (2, 3)


@pytest.mark.parametrize("name", DUALS)
def test_bad_input(name: str) -> None:
    with pytest.raises(UserError, match="do not fit"):
        DUALS[name](np.ones(3), np.ones(2) / 2, 0.1)
    with pytest.raises(UserError, match="`level`: got -1"):
        DUALS[name](np.ones(2), np.ones(2) / 2, -1)
