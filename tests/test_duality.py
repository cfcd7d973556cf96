"""The duals of tables: conjugates by brute force, strong duality by two independent solvers, the paper's identities."""

from __future__ import annotations

import numpy as np
import pytest

from rlkit.duality import (
    DIVERGENCES,
    TabularMDP,
    divergence_of,
    dual_q,
    dual_v,
    primal_v,
    recoil_dual_q,
    regularised_return,
)
from rlkit.errors import UserError

SMOOTH = [name for name, divergence in DIVERGENCES.items() if divergence.weight is not None]
CASES = [pytest.param(name, seed, id=f"{name}-{seed}") for name in SMOOTH for seed in (0, 1, 2)]


def problem(seed: int, states: int = 3, actions: int = 2, gamma: float = 0.9) -> tuple[TabularMDP, np.ndarray, ...]:
    """A random problem, a policy, and the visitations of two others."""
    rng = np.random.default_rng(seed)
    mdp = TabularMDP(
        rng.dirichlet(np.ones(states), (states, actions)), rng.normal(size=(states, actions)),
        rng.dirichlet(np.ones(states)), gamma,
    )  # fmt: skip
    policies = rng.dirichlet(np.ones(actions), (3, states))
    return mdp, policies[0], mdp.visitation(policies[1]), mdp.visitation(policies[2])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_conjugates_are_the_suprema(name: str) -> None:
    """f* over where f is defined (for chi-square the whole line), f_p* over t >= 0; on a fine grid of t."""
    divergence = DIVERGENCES[name]
    least = -20.0 if name == "chi2" else 0.0 if name in ("reverse_kl", "tv", "hellinger", "jensen_shannon") else 1e-6
    t = np.concatenate([np.linspace(least, 1, 400_001), np.linspace(1, 60, 2_000_001)])
    f = divergence.f(t)
    assert divergence.f(np.array([1.0])) == pytest.approx(0, abs=1e-12)
    for y in (-3.0, -2.0, -0.9, -0.4, 0.0, 0.3, 0.45, 0.6, 2.5):
        if y >= divergence.domain:
            continue
        found = np.array([y])
        assert divergence.positive_conjugate(found)[0] == pytest.approx((t * y - f)[t >= 0].max(), abs=1e-4)
        if name != "tv":
            assert divergence.conjugate(found)[0] == pytest.approx((t * y - f).max(), abs=1e-4)
            best = t[t >= 0][(t * y - f)[t >= 0].argmax()]
            assert divergence.weight(found)[0] == pytest.approx(best, abs=1e-3)  # type: ignore[misc]


def test_conjugates_end_where_the_supremum_is_infinite() -> None:
    assert DIVERGENCES["tv"].positive_conjugate(np.array([0.5, 0.51])).tolist() == [0.5, np.inf]
    assert np.isinf(DIVERGENCES["hellinger"].positive_conjugate(np.array([1.0])))[0]


@pytest.mark.parametrize(("divergence", "seed"), CASES)
def test_dual_v_is_the_primal(divergence: str, seed: int) -> None:
    """BFGS on the dual, sequential quadratic programming on the primal; the dual's weights are the primal's optimum."""
    mdp, _, offline, _ = problem(seed)
    for alpha in (1.0, 0.2):
        value, d = primal_v(mdp, offline, divergence, alpha)
        dual = dual_v(mdp, offline, divergence, alpha)
        assert dual.value == pytest.approx(value, abs=1e-6)
        np.testing.assert_allclose(dual.visitation, d, atol=1e-3)
        assert dual.visitation.sum() == pytest.approx(1, abs=1e-6)
        assert mdp.flow_error(dual.visitation) < 1e-6


def test_a_small_alpha_drops_actions_and_finds_the_optimal_policy() -> None:
    """With little regularisation w* is exactly 0 for bad actions (the positive part of f_p*), and what is left has the
    return of value iteration."""
    mdp, _, offline, _ = problem(3)
    value, _ = primal_v(mdp, offline, "chi2", 1e-3)
    dual = dual_v(mdp, offline, "chi2", 1e-3)
    assert dual.value == pytest.approx(value, abs=1e-6)
    assert (dual.visitation == 0).sum() == 3, "one action a state is left"
    q = np.zeros_like(mdp.rewards)
    for _ in range(500):
        q = mdp.rewards + mdp.gamma * mdp.expected(q.max(1))
    assert (dual.visitation.argmax(1) == q.argmax(1)).all()
    got = (dual.visitation * mdp.rewards).sum()
    assert got == pytest.approx((1 - mdp.gamma) * mdp.start @ q.max(1), abs=1e-6)


@pytest.mark.parametrize(("divergence", "seed"), CASES)
def test_dual_q_is_the_return_of_its_policy(divergence: str, seed: int) -> None:
    mdp, policy, offline, _ = problem(seed)
    d = mdp.visitation(policy)
    dual = dual_q(mdp, policy, offline, divergence, 0.7)
    assert dual.value == pytest.approx(regularised_return(mdp, d, offline, divergence, 0.7), abs=1e-8)
    np.testing.assert_allclose(dual.visitation, d, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_total_variation_by_a_linear_programme(seed: int) -> None:
    """With a large alpha the recorded visitation is best; with a small one the optimal policy is."""
    mdp, _, offline, _ = problem(seed)
    value, d = primal_v(mdp, offline, "tv", 100.0)
    np.testing.assert_allclose(d, offline, atol=1e-8)
    assert value == pytest.approx((offline * mdp.rewards).sum())
    _, d = primal_v(mdp, offline, "tv", 1e-6)
    best = max(
        (mdp.visitation(np.eye(2)[np.array(choice)]) * mdp.rewards).sum() for choice in np.ndindex(2, 2, 2)
    )  # fmt: skip
    assert (d * mdp.rewards).sum() == pytest.approx(best, abs=1e-4)
    assert mdp.flow_error(d) < 1e-8


def test_chi_square_dual_q_is_the_objective_of_cql_and_atac() -> None:
    """E_dO[Q(s, pi)] - E_dO[Q(s, a)] + E_dO[r] + 1/4 E_dO[y^2], for any Q, where d^O starts as d0 does."""
    mdp, policy, offline, _ = problem(4)
    q = np.random.default_rng(0).normal(size=mdp.rewards.shape)
    v = (policy * q).sum(1)
    y = mdp.rewards + mdp.gamma * mdp.expected(v) - q
    dual = (1 - mdp.gamma) * mdp.start @ v + (offline * DIVERGENCES["chi2"].conjugate(y)).sum()
    pessimism = (offline * (v[:, None] - q)).sum()
    assert dual == pytest.approx(pessimism + (offline * mdp.rewards).sum() + 0.25 * (offline * y**2).sum(), abs=1e-12)


@pytest.mark.parametrize("divergence", SMOOTH)
@pytest.mark.parametrize("beta", [0.3, 0.5, 0.9])
def test_recoil_matches_mixtures(divergence: str, beta: float) -> None:
    """min_Q is -D_f(mixture of the policy || mixture of the expert); for the expert itself it is 0."""
    mdp, policy, expert, suboptimal = problem(5)
    mixture = beta * expert + (1 - beta) * suboptimal
    own = beta * mdp.visitation(policy) + (1 - beta) * suboptimal
    dual = recoil_dual_q(mdp, policy, expert, suboptimal, beta, divergence)
    assert dual.value == pytest.approx(-divergence_of(divergence, own, mixture), abs=1e-8)
    np.testing.assert_allclose(dual.visitation, own, atol=1e-6)
    expert_policy = expert / expert.sum(1, keepdims=True)
    assert recoil_dual_q(mdp, expert_policy, expert, suboptimal, beta, divergence).value == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("beta", [0.3, 0.9])
def test_recoil_with_chi_square_is_a_gap_and_a_squared_residual(beta: float) -> None:
    """beta (E_{s~dE}[Q(s, pi)] - E_dE[Q(s, a)]) + 1/4 E_mix[(gamma E Q(s', pi) - Q)^2], for any Q."""
    mdp, policy, expert, suboptimal = problem(6)
    q = np.random.default_rng(1).normal(size=mdp.rewards.shape)
    v = (policy * q).sum(1)
    y = mdp.gamma * mdp.expected(v) - q
    mixture = beta * expert + (1 - beta) * suboptimal
    dual = (
        beta * (1 - mdp.gamma) * mdp.start @ v + (mixture * (y + y**2 / 4)).sum() - (1 - beta) * (suboptimal * y).sum()
    )
    gap = beta * (expert * (v[:, None] - q)).sum()
    assert dual == pytest.approx(gap + 0.25 * (mixture * y**2).sum(), abs=1e-12)


def test_bad_tables() -> None:
    mdp, policy, expert, suboptimal = problem(0)
    with pytest.raises(UserError, match=r"needs transitions \(3, 2, 3\)"):
        TabularMDP(mdp.transitions[:2], mdp.rewards, mdp.start, 0.9)
    with pytest.raises(UserError, match="`transitions`"):
        TabularMDP(2 * mdp.transitions, mdp.rewards, mdp.start, 0.9)
    with pytest.raises(UserError, match="`gamma`"):
        TabularMDP(mdp.transitions, mdp.rewards, mdp.start, 1.0)
    with pytest.raises(UserError, match="`beta`"):
        recoil_dual_q(mdp, policy, expert, suboptimal, 1.0)
    with pytest.raises(UserError, match="kinks"):
        dual_v(mdp, suboptimal, "tv")
