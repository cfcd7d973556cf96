"""Reinforcement learning and imitation as convex programmes over visitations, and their duals, exactly, for tables.

Paper: Sikchi, Zheng, Zhang, Niekum, Dual RL: Unification and New Methods for Reinforcement and Imitation Learning,
arXiv:2302.08560. Regularised by an f-divergence from the visitation d^O of recorded data, the problem is

    max_d  E_d[r] - alpha D_f(d || d^O),   D_f(d || q) = E_q[f(d / q)],

under the flow of one policy (primal-Q) or of any policy (primal-V). Visitations are (1 - gamma) times discounted sums,
so they sum to 1. `dual_q` and `dual_v` minimise the Lagrangian duals over Q(s, a) or V(s), `primal_v` solves the
programme itself, and `recoil_dual_q` the dual of matching mixtures of visitations. `rlkit.trainers.dual_rl` and
`rlkit.trainers.recoil` estimate them from samples, by networks; this module is what they are tested against.

Shapes: S states, A actions; visitations, rewards, policies and Q are (S, A), V and d0 (S,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from rlkit.errors import UserError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Divergence:
    """A convex f with f(1) = 0, and what the duals need of it; all act on arrays, element by element.

    Attributes:
        f: (0, inf) -> R.
        conjugate: f*(y) = sup_t {t y - f(t)} over all t where f is defined.
        weight: (f')^-1(y), the t of that supremum, where it is positive, else 0; None where f is not smooth.
        domain: y below which the conjugate is finite.
    """

    f: Callable[[Array], Array]
    conjugate: Callable[[Array], Array]
    weight: Callable[[Array], Array] | None
    domain: float = np.inf

    def positive_conjugate(self, y: Array) -> Array:
        """f_p*(y) = sup_{t >= 0} {t y - f(t)}."""
        if self.weight is None:  # total variation
            return np.where(y <= self.domain, np.maximum(y, -0.5), np.inf)
        inside = np.where(y < self.domain, y, 0.0)
        w = self.weight(inside)
        return np.where(y < self.domain, inside * w - self.f(w), np.inf)


def _xlogx(t: Array) -> Array:
    return np.where(t > 0, t * np.log(np.maximum(t, 1e-300)), 0.0)


def _log(t: Array) -> Array:
    return np.log(np.maximum(t, 1e-300))


DIVERGENCES: dict[str, Divergence] = {
    "chi2": Divergence(lambda t: (t - 1) ** 2, lambda y: y + y**2 / 4, lambda y: np.maximum(1 + y / 2, 0.0)),
    "tv": Divergence(lambda t: 0.5 * np.abs(t - 1), lambda y: np.where(np.abs(y) <= 0.5, y, np.inf), None, domain=0.5),
    "reverse_kl": Divergence(_xlogx, lambda y: np.exp(y - 1), lambda y: np.exp(y - 1)),
    "forward_kl": Divergence(lambda t: -_log(t), lambda y: -1 - _log(-y), lambda y: -1 / y, domain=0.0),
    "hellinger": Divergence(
        lambda t: (np.sqrt(t) - 1) ** 2, lambda y: y / (1 - y), lambda y: 1 / (1 - y) ** 2, domain=1.0
    ),
    "jensen_shannon": Divergence(
        lambda t: _xlogx(t) - (t + 1) * _log((t + 1) / 2),
        lambda y: -np.log(2 - np.exp(y)),
        lambda y: np.exp(y) / (2 - np.exp(y)),
        domain=float(np.log(2)),
    ),
}
"""By name; `chi2` is Pearson's, `reverse_kl` D_KL(d || d^O), `tv` half the L1 distance."""


@dataclass(frozen=True)
class TabularMDP:
    """A finite discounted problem.

    Args:
        transitions: p(s'|s, a), (S, A, S).
        rewards: (S, A).
        start: d0, (S,).
        gamma: in [0, 1).

    Raises:
        UserError: shapes that do not fit, rows that are no distributions, gamma outside its range.
    """

    transitions: Array
    rewards: Array
    start: Array
    gamma: float

    def __post_init__(self) -> None:
        s, a = self.rewards.shape
        if self.transitions.shape != (s, a, s) or self.start.shape != (s,):
            raise UserError(
                f"a tabular problem with rewards ({s}, {a}) needs transitions ({s}, {a}, {s}) and a start ({s},), got "
                f"{self.transitions.shape} and {self.start.shape}"
            )
        for name, rows in (("transitions", self.transitions), ("start", self.start)):
            if (rows < 0).any() or not np.allclose(rows.sum(-1), 1):
                raise UserError(f"`{name}`: expected distributions over states, which are positive and sum to 1")
        if not 0 <= self.gamma < 1:
            raise UserError(f"`gamma`: got {self.gamma}, expected 0 <= gamma < 1")

    def visitation(self, policy: Array) -> Array:
        """d(s, a) of a policy: the solution of d = pi ((1 - gamma) d0 + gamma P^T d)."""
        step = np.einsum("sa,sat->st", policy, self.transitions)
        states = np.linalg.solve(np.eye(len(self.start)) - self.gamma * step.T, (1 - self.gamma) * self.start)
        visited: Array = states[:, None] * policy
        return visited

    def expected(self, value: Array) -> Array:
        """E V(s') for V (S,): (S, A)."""
        return self.transitions @ value

    def flow_error(self, visitation: Array) -> float:
        """The largest violation of sum_a d(s, a) = (1 - gamma) d0(s) + gamma sum p(s|s', a') d(s', a')."""
        arriving = np.einsum("sa,sat->t", visitation, self.transitions)
        gap = visitation.sum(1) - (1 - self.gamma) * self.start - self.gamma * arriving
        return float(np.abs(gap).max())


@dataclass(frozen=True)
class Solution:
    """A dual's minimum.

    Attributes:
        value: of the objective.
        variable: the minimiser, Q (S, A) or V (S,).
        visitation: w* d^O, the primal's optimum by the dual's residual, (S, A).
    """

    value: float
    variable: Array
    visitation: Array


def divergence_of(name: str, d: Array, reference: Array) -> float:
    """D_f(d || reference) = sum reference f(d / reference), for reference > 0 everywhere."""
    return float((reference * DIVERGENCES[name].f(d / reference)).sum())


def regularised_return(mdp: TabularMDP, d: Array, offline: Array, divergence: str, alpha: float) -> float:
    """The primal objective E_d[r] - alpha D_f(d || d^O)."""
    return float((d * mdp.rewards).sum()) - alpha * divergence_of(divergence, d, offline)


def primal_v(mdp: TabularMDP, offline: Array, divergence: str = "chi2", alpha: float = 1.0) -> tuple[float, Array]:
    """The maximum of the regularised return over all d >= 0 that obey the flow, and d itself (S, A).

    Total variation is a linear programme; the rest is solved by sequential quadratic programming.

    Raises:
        UserError: the solver did not converge.
    """
    shape = mdp.rewards.shape
    s, a = shape
    into = mdp.transitions.reshape(s * a, s).T
    flow = np.repeat(np.eye(s), a, axis=1) - mdp.gamma * into  # (S, S A)
    right = (1 - mdp.gamma) * mdp.start
    q, r = offline.ravel(), mdp.rewards.ravel()
    if divergence == "tv":  # |d - q| = u with u >= +-(d - q)
        n = s * a
        cost = np.concatenate([-r, np.full(n, 0.5 * alpha)])
        bounds_matrix = np.block([[np.eye(n), -np.eye(n)], [-np.eye(n), -np.eye(n)]])
        found: Any = optimize.linprog(
            cost, A_ub=bounds_matrix, b_ub=np.concatenate([q, -q]), A_eq=np.hstack([flow, np.zeros((s, n))]), b_eq=right
        )
        d = None if found.x is None else found.x[:n]
    else:
        slope = _slope_of(divergence)

        def objective(d: Array) -> tuple[float, Array]:
            t = np.maximum(d, 0) / q
            value = -(d @ r) + alpha * (q @ DIVERGENCES[divergence].f(t))
            return float(value), -r + alpha * slope(t)

        found = optimize.minimize(
            objective, q, jac=True, method="SLSQP", bounds=[(1e-12, None)] * len(q),
            constraints={"type": "eq", "fun": lambda d: flow @ d - right, "jac": lambda d: flow},
            options={"ftol": 1e-15, "maxiter": 2_000},
        )  # fmt: skip
        d = found.x
    if not found.success:
        raise UserError(f"the primal with {divergence} was not solved: {found.message}")
    d = np.asarray(d).reshape(shape)
    return regularised_return(mdp, d, offline, divergence, alpha), d


def _slope_of(divergence: str) -> Callable[[Array], Array]:
    """f'(t)."""
    slopes: dict[str, Callable[[Array], Array]] = {
        "chi2": lambda t: 2 * (t - 1),
        "reverse_kl": lambda t: _log(t) + 1,
        "forward_kl": lambda t: -1 / np.maximum(t, 1e-300),
        "hellinger": lambda t: 1 - 1 / np.sqrt(np.maximum(t, 1e-300)),
        "jensen_shannon": lambda t: _log(t) - _log((t + 1) / 2),
    }
    return slopes[divergence]


def dual_v(mdp: TabularMDP, offline: Array, divergence: str = "chi2", alpha: float = 1.0) -> Solution:
    """min_V (1 - gamma) E_d0[V] + alpha E_dO[f_p*((T V - V) / alpha)], T V(s, a) = r + gamma E V(s'). Dual-V.

    Its minimum is the maximum that `primal_v` finds, by strong duality; w*(s, a) = max(0, (f')^-1(y)) times d^O is the
    visitation there.

    Raises:
        UserError: a divergence without a derivative (`tv`).
    """
    weight = _smooth(divergence)

    def residual(v: Array) -> Array:
        return (mdp.rewards + mdp.gamma * mdp.expected(v) - v[:, None]) / alpha

    def objective(v: Array) -> tuple[float, Array]:
        y = residual(v)
        if (y >= DIVERGENCES[divergence].domain).any():
            return np.inf, np.zeros_like(v)
        d = offline * weight(y)
        value = (1 - mdp.gamma) * mdp.start @ v + alpha * (
            offline * DIVERGENCES[divergence].positive_conjugate(y)
        ).sum()
        slope = (1 - mdp.gamma) * mdp.start + mdp.gamma * np.einsum("sa,sat->t", d, mdp.transitions) - d.sum(1)
        return float(value), slope

    # A start inside the conjugate's domain: T V - V = r - (1 - gamma) c for a constant V = c.
    start = np.full(len(mdp.start), (mdp.rewards.max() + alpha) / (1 - mdp.gamma))
    v = _minimise(objective, start)
    return Solution(objective(v)[0], v, offline * weight(residual(v)))


def dual_q(mdp: TabularMDP, policy: Array, offline: Array, divergence: str = "chi2", alpha: float = 1.0) -> Solution:
    """min_Q (1 - gamma) E_{d0, pi}[Q] + alpha E_dO[f*((T_pi Q - Q) / alpha)], T_pi Q = r + gamma E Q(s', pi). Dual-Q.

    For a fixed policy the flow has one solution, so its minimum is that policy's regularised return; there the
    conjugate need not be restricted to positive t.

    Raises:
        UserError: a divergence without a derivative (`tv`).
    """
    shape = mdp.rewards.shape
    table = DIVERGENCES[divergence]
    first = (1 - mdp.gamma) * mdp.start[:, None] * policy
    slope_of_conjugate = _unrestricted(divergence)

    def residual(q: Array) -> Array:
        return (mdp.rewards + mdp.gamma * mdp.expected((policy * q).sum(1)) - q) / alpha

    def objective(flat: Array) -> tuple[float, Array]:
        q = flat.reshape(shape)
        y = residual(q)
        if (y >= table.domain).any():
            return np.inf, np.zeros_like(flat)
        d = offline * slope_of_conjugate(y)
        value = (first * q).sum() + alpha * (offline * table.conjugate(y)).sum()
        arriving = np.einsum("sa,sat->t", d, mdp.transitions)
        slope = first + mdp.gamma * arriving[:, None] * policy - d
        return float(value), slope.ravel()

    start = np.full(shape, (mdp.rewards.max() + alpha) / (1 - mdp.gamma)).ravel()
    q = _minimise(objective, start).reshape(shape)
    return Solution(objective(q.ravel())[0], q, offline * slope_of_conjugate(residual(q)))


def recoil_dual_q(
    mdp: TabularMDP, policy: Array, expert: Array, suboptimal: Array, beta: float = 0.5, divergence: str = "chi2"
) -> Solution:
    """min_Q beta (1 - gamma) E_{d0, pi}[Q] + E_{mix_E}[f*(T0 Q - Q)] - (1 - beta) E_{d^S}[T0 Q - Q]. Theorem 1.

    T0 has no reward, mix_E = beta d^E + (1 - beta) d^S. Its minimum is -D_f(beta d + (1 - beta) d^S || mix_E) with d
    the policy's visitation: imitation by matching mixtures, which needs no reward, no density ratio, and no expert
    inside the suboptimal data. `Solution.visitation` is the policy's mixture.

    Raises:
        UserError: beta outside (0, 1), or a divergence without a derivative (`tv`).
    """
    if not 0 < beta < 1:
        raise UserError(f"`beta`: got {beta}, expected 0 < beta < 1")
    shape = mdp.rewards.shape
    table = DIVERGENCES[divergence]
    mixture = beta * expert + (1 - beta) * suboptimal
    first = beta * (1 - mdp.gamma) * mdp.start[:, None] * policy
    slope_of_conjugate = _unrestricted(divergence)

    def residual(q: Array) -> Array:
        return mdp.gamma * mdp.expected((policy * q).sum(1)) - q

    def objective(flat: Array) -> tuple[float, Array]:
        q = flat.reshape(shape)
        y = residual(q)
        if (y >= table.domain).any():
            return np.inf, np.zeros_like(flat)
        d = mixture * slope_of_conjugate(y) - (1 - beta) * suboptimal
        value = (first * q).sum() + (mixture * table.conjugate(y)).sum() - (1 - beta) * (suboptimal * y).sum()
        arriving = np.einsum("sa,sat->t", d, mdp.transitions)
        return float(value), (first + mdp.gamma * arriving[:, None] * policy - d).ravel()

    start = np.full(shape, 1 / (1 - mdp.gamma)).ravel()
    q = _minimise(objective, start).reshape(shape)
    return Solution(objective(q.ravel())[0], q, mixture * slope_of_conjugate(residual(q)))


def _smooth(divergence: str) -> Callable[[Array], Array]:
    weight = DIVERGENCES[divergence].weight
    if weight is None:
        raise UserError(f"the conjugate of `{divergence}` has kinks; its primal is a linear programme, see `primal_v`")
    return weight


def _unrestricted(divergence: str) -> Callable[[Array], Array]:
    """(f*)'(y): as `Divergence.weight`, which only chi-square's has negative values to cut."""
    return (lambda y: 1 + y / 2) if divergence == "chi2" else _smooth(divergence)


def _minimise(objective: Callable[[Array], tuple[float, Array]], start: Array) -> Array:
    """The minimum of a smooth convex function, which may be infinite in places, by BFGS."""
    found = optimize.minimize(objective, start, jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 10_000})
    x: Array = found.x
    return x
