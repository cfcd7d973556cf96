"""Linear Markov decision processes: features known, factors of the dynamics unknown, and what is robust in them.

In a d-rectangular linear MDP with H steps, phi(s, a) lies in the simplex of R^d, the reward is phi(s, a)^T theta_h, and
the next state is drawn from sum_i phi_i(s, a) mu_{h,i}. An adversary may change each factor mu_{h,i} by itself, so
worst cases are linear in phi, too, and `robust_values` finds them by dynamic programming with the duals of
`rlkit.robust`.

Registered with gymnasium, each with the nominal dynamics (the source) and perturbed ones (a target) by keywords:

- `rlkit/SimulatedLinear-v0` (`shift=q`): five states, sixteen actions, three steps (arXiv:2402.15399).
- `rlkit/SlipperyGrid-v0` (`slip=p`): a 4 x 4 grid with holes and one-hot features.
- `rlkit/AmericanPut-v0` (`p_up=p`): when to exercise an option; prices are continuous, and the features an
  approximation (arXiv:2402.15399).

`rlkit.envs.features` has the features that a learner gets, and those for environments of your own.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlkit.errors import UserError
from rlkit.robust import DUALS

if TYPE_CHECKING:
    from rlkit.envs.features import FeatureMap

SIMULATED_ID, GRID_ID, PUT_ID = "rlkit/SimulatedLinear-v0", "rlkit/SlipperyGrid-v0", "rlkit/AmericanPut-v0"

Array = NDArray[np.float64]


class LinearMDP(gym.Env[Any, Any]):
    """A finite linear MDP as an environment: observations [state, step], actions by number.

    A subclass gives the arrays. Policies depend on the step h, so observations have it. An episode has H steps and ends
    by truncation, never by termination, so it has the length that the values below are of.

    Attributes:
        features: phi, (S, A, d), rows in the simplex, or zero where nothing follows (value 0).
        theta: rewards, (H, d).
        factors: mu, (H, d, S), distributions of the nominal dynamics, whatever the environment's own are.
        dynamics: those of this environment, (H, d, S).
        initial: distribution of the first state, (S,).
        rewards: (H, S, A), what a step pays: phi theta, and what is known besides.
        failed: number of an absorbing state without reward, whose value 0 is the least; None without one.
        same_dynamics: whether those of all steps are the same.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}
    features: Array
    theta: Array
    factors: Array
    dynamics: Array
    initial: Array
    rewards: Array
    failed: int | None = None
    same_dynamics: bool = False

    def _declare(self) -> None:
        states, actions, _ = self.features.shape
        self.horizon = len(self.theta)
        most = np.array([states - 1, self.horizon], np.float32)
        self.observation_space = gym.spaces.Box(np.zeros(2, np.float32), most)
        self.action_space = gym.spaces.Discrete(actions)
        self.state, self.step_number = 0, 0

    def observation(self, state: int, h: int) -> NDArray[np.float32]:
        """What is observed in a state in step h: (2,)."""
        return np.array([state, h], np.float32)

    def feature_map(self) -> FeatureMap:
        """The features phi and the rewards, which are known, for a learner."""
        from rlkit.envs.features import TableFeatures

        return TableFeatures(self.features, self.rewards, self.failed, self.same_dynamics)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self.state, self.step_number = int(self.np_random.choice(len(self.initial), p=self.initial)), 0
        return self.observation(self.state, 0), {}

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        h, a = self.step_number, int(action)
        reward = float(self.rewards[h, self.state, a])
        law = self.features[self.state, a] @ self.dynamics[h]
        if law.sum() > 0:
            self.state = int(self.np_random.choice(len(law), p=law / law.sum()))
        elif self.failed is not None:  # without features nothing follows
            self.state = self.failed
        self.step_number += 1
        over = self.step_number == self.horizon
        return self.observation(self.state, self.step_number), reward, False, over, {}


def robust_value(
    env: LinearMDP | gym.Env[Any, Any], divergence: str = "tv_radius", radius: ArrayLike = 0.0, **options: Any
) -> float:
    """The mean of `robust_values` in step 0 over the initial states. Arguments and errors are the same."""
    mdp: Any = env.unwrapped
    return float(mdp.initial @ robust_values(env, divergence, radius, **options)[0])


def robust_values(
    env: LinearMDP | gym.Env[Any, Any],
    divergence: str = "tv_radius",
    radius: ArrayLike = 0.0,
    *,
    eta: float = 0.0,
    reference: Array | None = None,
    policy: Array | None = None,
) -> Array:
    """V_h(s) of the best policy against the worst dynamics near the nominal ones: (H + 1, S), exactly.

    Args:
        env: a `LinearMDP`, or an environment around one.
        divergence: a name of `rlkit.robust.DUALS`.
        radius: the level, one for all factors or a table (H, d).
        eta: temperature of KL(pi || reference), which is charged for at each step; 0 is the hard maximum.
        reference: (A,), (S, A) or (H, S, A); uniform by default.
        policy: (H, S, A), to value this policy instead of the best one.

    Raises:
        UserError: an unknown divergence, a table of another shape.
    """
    mdp: Any = env.unwrapped
    (states, actions, _), horizon = mdp.features.shape, mdp.horizon
    levels = _levels(mdp, divergence, radius)
    ref = np.full((horizon, states, actions), 1 / actions) if reference is None else np.asarray(reference, np.float64)
    ref = np.broadcast_to(ref, (horizon, states, actions))
    v = np.zeros((horizon + 1, states))
    for h in reversed(range(horizon)):
        q = _q(mdp, h, v[h + 1], divergence, levels[h])
        if policy is not None:
            charge = np.where(policy[h] > 0, policy[h] * np.log(np.maximum(policy[h], 1e-300) / ref[h]), 0.0)
            v[h] = (policy[h] * q - eta * charge).sum(-1)
        else:
            v[h] = soft_maximum(q, ref[h], eta) if eta > 0 else q.max(-1)
        if mdp.failed is not None:
            v[h, mdp.failed] = 0.0
    return v


def robust_q(
    env: LinearMDP | gym.Env[Any, Any], values: Array, divergence: str = "tv_radius", radius: ArrayLike = 0.0
) -> Array:
    """Q_h(s, a) = r_h + phi^T nu_h against the worst factors, for V (H + 1, S) of the next steps: (H, S, A).

    Arguments and errors of `robust_values`.
    """
    mdp: Any = env.unwrapped
    levels = _levels(mdp, divergence, radius)
    return np.array([_q(mdp, h, values[h + 1], divergence, levels[h]) for h in range(mdp.horizon)])


def _levels(mdp: LinearMDP, divergence: str, radius: ArrayLike) -> Array:
    """The level of each factor, (H, d)."""
    if divergence not in DUALS:
        raise UserError(f"`divergence`: unknown `{divergence}`; known: {', '.join(DUALS)}")
    shape, levels = (mdp.horizon, mdp.features.shape[-1]), np.asarray(radius, np.float64)
    if levels.shape not in ((), shape):
        raise UserError(f"`radius`: a table of shape {levels.shape}; expected one number, or {shape}")
    return np.broadcast_to(levels, shape)


def _q(mdp: LinearMDP, h: int, next_value: Array, divergence: str, levels: Array) -> Array:
    """r_h + phi^T nu_h, nu_h the worst expectations of V_{h+1} (S,): (S, A)."""
    q: Array = mdp.rewards[h] + mdp.features @ DUALS[divergence](next_value, mdp.factors[h], levels)
    return q


def soft_maximum(q: Array, reference: Array, eta: float) -> Array:
    """eta log sum_a ref(a) exp(q(a) / eta), the largest of <pi, q> - eta KL(pi || ref): (..., A) -> (...)."""
    top = q.max(-1, keepdims=True)
    found: Array = top[..., 0] + eta * np.log((reference * np.exp((q - top) / eta)).sum(-1))
    return found


def simulate(env: LinearMDP | gym.Env[Any, Any], policy: Array, dynamics: Array | None = None) -> float:
    """The exact expected return of a policy (H, S, A) in the environment's own dynamics, or in given ones (H, d, S)."""
    mdp: Any = env.unwrapped
    law = mdp.dynamics if dynamics is None else dynamics
    v = np.zeros(len(mdp.initial))
    for h in reversed(range(mdp.horizon)):
        v = (policy[h] * (mdp.rewards[h] + mdp.features @ (law[h] @ v))).sum(-1)
    return float(mdp.initial @ v)


class SimulatedLinearMDP(LinearMDP):
    """Five states, 16 actions, 3 steps: reward by way of x1, x2, x3, or by a jump to x5 that the target may break.

    From x1, action a in {-1, 1}^4 jumps to x5 with probability u(a) = delta + <xi, a>, else goes on to x2; so it does
    from x2, to x3. x5 pays 1 in steps 1 and 2, x4 nothing, and both are absorbing; from x3 the jump pays u(a) at once.

    Args:
        shift: q: in this target environment the jump of step 0 fails, into x4, with probability q, and the other way
            of that step never does.
        delta: the probability of a jump without the action's part.
        xi: L1 norm of the action's part, the same for all four of its components.
    """

    failed = 3

    def __init__(self, shift: float = 0.0, delta: float = 0.3, xi: float = 0.1) -> None:
        if not 0 <= shift <= 1:
            raise UserError(f"`shift`: got {shift}, expected a probability")
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=4)))
        u = delta + signs @ np.full(4, xi / 4)
        zero = np.zeros_like(u)
        self.actions = signs
        self.features = np.stack(
            [
                np.stack([1 - u, zero, zero, u], -1),
                np.stack([zero, 1 - u, zero, u], -1),
                np.stack([zero, zero, 1 - u, u], -1),
                np.tile([0.0, 0.0, 1.0, 0.0], (16, 1)),
                np.tile([0.0, 0.0, 0.0, 1.0], (16, 1)),
            ]
        )
        self.theta = np.array([[0.0] * 4, [0, 0, 0, 1.0], [0, 0, 0, 1.0]])
        self.rewards = np.einsum("sad,hd->hsa", self.features, self.theta)
        self.factors = np.zeros((3, 4, 5))
        self.factors[:, 2, 3] = self.factors[:, 3, 4] = 1.0  # absorbing: factor 3 fails, factor 4 pays
        for h, (factor, state) in enumerate(((0, 1), (1, 2))):
            self.factors[h, factor, [state, 3]] = 0.999, 0.001
        self.factors[0, 1, 2] = self.factors[1, 0, 1] = 1.0  # not reached in these steps
        self.factors[2, 0, 1] = self.factors[2, 1, 2] = 1.0
        self.dynamics = self.factors.copy()
        if shift:
            self.dynamics[0, 3] = [0, 0, 0, shift, 1 - shift]
            self.dynamics[0, 0] = [0, 1.0, 0, 0, 0]
        self.initial = np.eye(5)[0]
        self._declare()


class SlipperyGrid(LinearMDP):
    """A 4 x 4 grid with a small goal at the end of a safe way, and a large one behind a bridge between holes.

    Actions: left, down, right, up. A move goes where it is meant to with probability 1 - slip, and to each of its two
    sides with slip / 2; walls hold it where it is. Leaving the goals g and G pays 0.6 and 1; they and the holes lead to
    state 16, which is over. With little slipping the bridge is worth its risk, with much it is not. Features are
    one-hot in state and action, so each pair is a factor of its own: (s, a)-rectangular.

    Args:
        slip: of this environment; the nominal dynamics are those of `NOMINAL_SLIP`.
        horizon: steps of an episode.
    """

    NOMINAL_SLIP = 0.1
    MAP = ("S..g", "...O", "OO.O", "OO.G")
    failed, same_dynamics = 16, True

    def __init__(self, slip: float = NOMINAL_SLIP, horizon: int = 12) -> None:
        if not 0 <= slip <= 1:
            raise UserError(f"`slip`: got {slip}, expected a probability")
        d = 17 * 4
        self.features = np.eye(d).reshape(17, 4, d)
        nominal, own = (self._laws(p).reshape(d, 17) for p in (self.NOMINAL_SLIP, slip))
        self.factors = np.broadcast_to(nominal, (horizon, d, 17))
        self.dynamics = np.broadcast_to(own, (horizon, d, 17))
        pays = np.zeros((17, 4))
        for state, cell in enumerate("".join(self.MAP)):
            pays[state] = {"g": 0.6, "G": 1.0}.get(cell, 0.0)
        self.theta = np.broadcast_to(pays.ravel(), (horizon, d))
        self.rewards = np.broadcast_to(pays, (horizon, 17, 4))
        self.initial = np.eye(17)["".join(self.MAP).index("S")]
        self._declare()

    @classmethod
    def _laws(cls, slip: float) -> Array:
        """P(s'|s, a): (17, 4, 17)."""
        moves = ((0, -1), (1, 0), (0, 1), (-1, 0))
        laws = np.zeros((17, 4, 17))
        for row, column in itertools.product(range(4), range(4)):
            for action in range(4):
                law = laws[4 * row + column, action]
                if cls.MAP[row][column] in "OgG":
                    law[16] = 1.0
                    continue
                for turn, share in ((0, 1 - slip), (1, slip / 2), (3, slip / 2)):
                    down, right = moves[(action + turn) % 4]
                    to = 4 * min(max(row + down, 0), 3) + min(max(column + right, 0), 3)
                    law[to] += share
        laws[16, :, 16] = 1.0
        return laws


class AmericanPut(gym.Env[Any, Any]):
    """An American put option: each step, hold it, or sell at the strike what is worth the price of now.

    The price goes up by the factor 1.02 with probability p_up, else down by 0.98. Observations [price, step]; action 0
    holds, action 1 exercises: the reward is max(0, 100 - price) / 25, which stays below 1, and the episode is over.
    After 10 steps the option is worth nothing.

    Features are of holding alone (what exercising pays is known): piecewise linear hats at d prices, which sum to 1.
    The price's own law is not linear in them, so what is learned is an approximation; `lattice` has the exact values.

    Args:
        p_up: of this environment; the nominal dynamics are those of `NOMINAL`.
        price: of the first step; None draws it from 95 to 105.
        anchors: d.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}
    NOMINAL, STRIKE, UNIT, UP, DOWN, HORIZON = 0.5, 100.0, 25.0, 1.02, 0.98, 10

    def __init__(self, p_up: float = NOMINAL, price: float | None = None, anchors: int = 20) -> None:
        if not 0 <= p_up <= 1:
            raise UserError(f"`p_up`: got {p_up}, expected a probability")
        if price is not None and not 50 <= price <= 200:
            raise UserError(f"`price`: got {price}, expected 50 to 200, or None to draw it")
        self.p_up, self.first, self.anchors = p_up, price, anchors
        self.least, self.most = (
            (price or default) * factor**self.HORIZON for default, factor in ((95, self.DOWN), (105, self.UP))
        )
        low, high = np.array([self.least, 0]), np.array([self.most, self.HORIZON])
        self.observation_space = gym.spaces.Box(low.astype(np.float32), high.astype(np.float32))
        self.action_space = gym.spaces.Discrete(2)
        self.price, self.step_number = 0.0, 0

    @classmethod
    def payoff(cls, price: Any) -> Any:
        return np.maximum(0.0, cls.STRIKE - price) / cls.UNIT

    def feature_map(self) -> FeatureMap:
        from rlkit.envs.features import PutFeatures

        return PutFeatures(np.linspace(self.least, self.most, self.anchors), self.HORIZON, self.STRIKE, self.UNIT)

    def lattice(self, price: float = 100.0) -> LinearMDP:
        """The same option from one first price as a finite linear MDP with a factor for each price: exact."""
        return _Lattice(price, self.p_up)

    def _observation(self) -> NDArray[np.float32]:
        return np.array([self.price, self.step_number], np.float32).clip(
            self.observation_space.low, self.observation_space.high
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self.price, self.step_number = float(self.first or self.np_random.uniform(95, 105)), 0
        return self._observation(), {}

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        exercised = int(action) == 1
        reward = float(self.payoff(self.price)) if exercised else 0.0
        self.price *= self.UP if self.np_random.random() < self.p_up else self.DOWN
        self.step_number += 1
        return self._observation(), reward, exercised, self.step_number == self.HORIZON, {}


class _Lattice(LinearMDP):
    """State u of step h: the price after u steps up of h; state 11 is after exercising."""

    failed = AmericanPut.HORIZON + 1

    def __init__(self, price: float, p_up: float) -> None:
        horizon, states = AmericanPut.HORIZON, AmericanPut.HORIZON + 2
        self.first = price
        self.features = np.zeros((states, 2, states))
        self.features[:, 0] = np.eye(states)
        self.theta = np.zeros((horizon, states))
        self.rewards = np.zeros((horizon, states, 2))
        for h in range(horizon):
            self.rewards[h, :-1, 1] = [AmericanPut.payoff(self.price(u, h)) for u in range(states - 1)]
        self.factors, self.dynamics = (np.zeros((horizon, states, states)) for _ in range(2))
        for mu, p in ((self.factors, AmericanPut.NOMINAL), (self.dynamics, p_up)):
            for u in range(states - 1):
                mu[:, u, u] += 1 - p
                mu[:, u, min(u + 1, horizon)] += p
            mu[:, -1, -1] = 1.0
        self.initial = np.eye(states)[0]
        self._declare()
        self.observation_space = gym.spaces.Box(0.0, np.inf, (2,), np.float32)

    def price(self, ups: int, h: int) -> float:
        return float(self.first * AmericanPut.UP**ups * AmericanPut.DOWN ** (h - ups))

    def observation(self, state: int, h: int) -> NDArray[np.float32]:
        return np.array([self.price(min(state, h), h), h], np.float32)


gym.register(SIMULATED_ID, entry_point=f"{__name__}:SimulatedLinearMDP")
gym.register(GRID_ID, entry_point=f"{__name__}:SlipperyGrid")
gym.register(PUT_ID, entry_point=f"{__name__}:AmericanPut")
