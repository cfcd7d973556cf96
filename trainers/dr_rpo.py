"""DR-RPO: distributionally robust policy optimisation with linear features, near a reference policy.

Paper: Gu, He, Liu, Xu, Policy Regularized Distributionally Robust Markov Decision Processes with Linear Function
Approximation, arXiv:2510.14246. This is a RECONSTRUCTION: of the paper the abstract alone was at hand (softmax
policies, regularised towards a reference policy and, or, in their transitions; d-rectangular linear MDPs; upper
confidence bounds). The rest is assembled from the same group's value-based methods, arXiv:2402.15399 (DR-LSVI-UCB) and
arXiv:2411.18612 (R2PVI), and from the duality that `rlkit.robust` computes and tests; that the regularisation is a
Kullback-Leibler divergence, and which update of the policy the paper makes, is not confirmed.

Learning goes on in the source environment. The policy is to be good in the worst dynamics near it: an adversary changes
each factor mu_i of P(s'|s, a) = sum_i phi_i(s, a) mu_i(s'), within a radius, or at a price (`uncertainty`). Before each
episode, from the last step h to the first,

    nu_i = worst case of the regression of V_{h+1}(s') on phi, factor i                      (`rlkit.robust`)
    Q_h(s, a) = clip(r + gamma phi^T nu + bonus, least, largest sum of rewards from h on)
    pi_h(.|s) = argmax_pi <pi, Q_h> - eta KL(pi || pi_ref)  ~  pi_ref exp(Q_h / eta)
    V_h(s) = eta log sum_a pi_ref(a|s) exp(Q_h(s, a) / eta)

`alpha` adds - KL(pi || pi of the plan before) / alpha to the third line: a step of mirror descent.

Special cases, the methods it is compared with: `eta: 0` chooses the best action, DR-LSVI-UCB; with `uncertainty: none`
and `bonus: elliptical` besides it is LSVI-UCB (arXiv:1907.05388).

Deviations from the released code of the predecessors: the maximum of each dual is found exactly, at the kinks, instead
of by a local search; the Kullback-Leibler transform estimates exp(-V/sigma) - 1, so what was never seen is worth 0
instead of the most; the chi-square dual is maximised (there, in one copy, minimised); the least value is known where
the environment has a failed state.

Features come from the environment or from `features`; see `rlkit.envs.features`. The inverse of the regression's matrix
is kept and updated row by row; next states that are equal are one row, so in a finite environment a plan's time does
not grow with the episodes.

Shapes: n observations, A actions, d features, H steps, m different next states of a step.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlkit import envs
from rlkit.buffer import RolloutBuffer
from rlkit.config import Count, Fraction, NonNegative, Positive
from rlkit.control import ControlConfig, ControlTrainer
from rlkit.envs.features import FeatureMap, check_simplex, kernel_features, rebuilt
from rlkit.envs.linear import LinearMDP, robust_q, robust_value, robust_values, simulate
from rlkit.errors import UserError
from rlkit.nets import ToFloat32
from rlkit.robust import DUALS, chi2_penalty, chi2_radius, kl_penalty, kl_radius, tv_penalty, tv_radius
from rlkit.trainer import Batch, load
from rlkit.trainers.pmoe import draw

__all__ = [
    "DRRPO", "DRRPOConfig", "bonus", "chi2_penalty", "chi2_radius", "kl_penalty", "kl_radius", "mirror_step",
    "optimistic_q", "regularised_value", "soft_policy", "soft_value", "tv_penalty", "tv_radius",
]  # fmt: skip

Uncertainty = Literal["tv_radius", "tv_penalty", "kl_penalty", "chi2_penalty", "kl_radius", "chi2_radius", "none"]
BonusForm = Literal["norm", "sum", "elliptical", "none"]
Table = tuple[tuple[NonNegative, ...], ...]

REFRESH = 1_000
"""Rows after which the inverse is computed anew, so that rounding does not add up."""


@dataclass(frozen=True, kw_only=True)
class DRRPOConfig(ControlConfig):
    """`beta` and `ridge` are those of the predecessors' experiments; they suit rewards in [0, 1]."""

    uncertainty: Uncertainty = "tv_radius"
    """What the adversary may do to each factor: move it within a radius, or at a price (`penalty`). Kullback-Leibler
    and chi-square cannot move mass to states that never follow; total variation can."""
    radius: NonNegative | Table = 0.1
    """Of `tv_radius` (at most 1), `kl_radius` and `chi2_radius`: one number, or a table of rows by step, of a number
    for each factor."""
    sigma: Positive = 1.0
    """Price of a unit of divergence, of the penalties; smaller is more cautious."""
    eta: NonNegative = 0.1
    """Temperature: weight of the divergence from the reference policy. 0 chooses the best action."""
    alpha: Positive | None = None
    """Step size of mirror descent, in environments of finitely many states. None goes to the optimum at once."""
    reference: str | tuple[NonNegative, ...] | None = None
    """Reference policy: probabilities of the actions, or the run folder of a policy that was trained by `dr_rpo` in
    such an environment. None is uniform."""
    bonus: BonusForm = "norm"
    """Upper confidence bound, times `beta`: `norm` sqrt(sum_i phi_i^2 / Lambda_ii) and `sum` sum_i phi_i /
    sqrt(Lambda_ii), 1/Lambda_ii being the diagonal of the inverse, for adversaries of single factors; `elliptical`
    sqrt(phi^T Lambda^-1 phi) without one."""
    beta: NonNegative = 1.0
    """Size of the bonus. Smaller ones learn faster where the first policies see enough by themselves."""
    ridge: Positive = 0.1
    """lambda in Lambda = lambda I + sum phi phi^T."""
    pooled: bool | None = None
    """Regress on the transitions of all steps together, which is right where their dynamics are the same, instead of
    step by step. None does what the features say."""
    gamma: Fraction = 1.0
    """Discount factor; planning is over finitely many steps, so 1 is fine."""
    features: str = "auto"
    """`auto`: the environment's own, from its method `feature_map()`. `kernel`: Gaussian kernels, for vectors. Or
    `module:function`, which gets an environment and returns an `rlkit.envs.features.FeatureMap`."""
    horizon: Count = 50
    """Steps to plan, of `features: kernel`; others have their own."""
    n_features: Count = 100
    """Centres, of `features: kernel`."""
    bandwidth: Positive = 1.0
    """Of `features: kernel`, in units of the mean distance between neighbouring centres."""
    plan_every: Count = 1
    """Episodes between plans."""
    plan_growth: NonNegative = 0.0
    """A new plan also waits until the transitions have grown by this fraction; 0.1 is as good and much faster where
    next states hardly ever recur."""
    buffer_size: Count = 100_000
    """Transitions kept. All are learned from, so this bounds the budget."""
    eval_env_kwargs: dict[str, Any] = field(default_factory=dict)
    """Evaluations use these besides `env_kwargs`: the target environment."""


# The formulas


def bonus(phi: Tensor, inverse: Tensor, form: BonusForm) -> Tensor:
    """Width of the confidence bound for beta = 1, see `DRRPOConfig.bonus`: (n, A, d), (n or 1, d, d) -> (n, A)."""
    diagonal = inverse.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    if form == "sum":
        return (phi * diagonal.sqrt()).sum(-1)
    if form == "norm":
        return (phi.square() * diagonal).sum(-1).sqrt()
    if form == "elliptical":
        return ((phi @ inverse) * phi).sum(-1).clamp(min=0).sqrt()
    return torch.zeros_like(phi[..., 0])


def optimistic_q(reward: Tensor, continuation: Tensor, width: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """clip(r + gamma phi^T nu + beta b, low, high); (n, A) each, bounds (n, 1)."""
    return torch.minimum(torch.maximum(reward + continuation + width, low), high)


def soft_policy(q: Tensor, log_reference: Tensor, eta: float) -> Tensor:
    """log pi, pi ~ pi_ref exp(Q / eta); at eta = 0 the best action, the first of equal ones. (n, A) -> (n, A)."""
    if eta == 0:
        best = nn.functional.one_hot(q.argmax(-1), q.shape[-1]).to(q.dtype)
        return best.log()
    return torch.log_softmax(log_reference + q / eta, -1)


def soft_value(q: Tensor, log_reference: Tensor, eta: float) -> Tensor:
    """eta log sum_a pi_ref exp(Q / eta), at eta = 0 the maximum; (n, A) -> (n,)."""
    if eta == 0:
        return q.max(-1).values
    return eta * torch.logsumexp(log_reference + q / eta, -1)


def mirror_step(log_policy: Tensor, q: Tensor, log_reference: Tensor, eta: float, alpha: float) -> Tensor:
    """log of argmax_pi <pi, Q> - eta KL(pi || pi_ref) - KL(pi || pi_k) / alpha; (..., A) each.

    It is pi_ref^{eta alpha / (1 + eta alpha)} pi_k^{1 / (1 + eta alpha)} exp(alpha Q / (1 + eta alpha)) over its sum,
    whose fixed point is that of `soft_policy`.
    """
    share = 1 / (1 + eta * alpha)
    return torch.log_softmax((1 - share) * log_reference + share * log_policy + share * alpha * q, -1)


def regularised_value(log_policy: Tensor, q: Tensor, log_reference: Tensor, eta: float) -> Tensor:
    """<pi, Q> - eta KL(pi || pi_ref); (..., A) -> (...)."""
    pi = log_policy.exp()
    charge = torch.where(pi > 0, pi * (log_policy - log_reference), 0.0)
    return (pi * q).sum(-1) - eta * charge.sum(-1)


# What was seen, and the policy


class Ridge:
    """Sums of the regressions on phi of one step, or of all steps where they are pooled.

    Attributes:
        inverse: (d, d) of Lambda = ridge I + sum phi phi^T.
        sums: (m, d), for each different next state, the sum of phi that led there; so `weights @ y`, for values y (m,)
            of them, is the regression.
        rewards: (d,), sum of phi r.
        next_obs: (m, obs_dim) with `ended` (m,), whether the episode terminated there.
    """

    def __init__(self, size: int, obs_dim: int, ridge: float) -> None:
        self.ridge, self.rows = ridge, 0
        self.inverse: NDArray[Any] = np.eye(size) / ridge
        self.gram = ridge * np.eye(size)
        self.rewards = np.zeros(size)
        self._sums = np.zeros((16, size))
        self._next = np.zeros((16, obs_dim))
        self._ended = np.zeros(16, bool)
        self._places: dict[bytes, int] = {}

    def add(self, phi: NDArray[Any], reward: float, next_obs: NDArray[Any], state: bytes, ended: bool) -> None:
        """A transition: phi (d,); `state` are the bytes of `next_obs` without the step."""
        key = state + bytes([ended])
        place = self._places.setdefault(key, len(self._places))
        if place == len(self._sums):
            self._sums, self._next, self._ended = (
                np.concatenate([a, np.zeros_like(a)]) for a in (self._sums, self._next, self._ended)
            )
        self._next[place], self._ended[place] = next_obs, ended
        self._sums[place] += phi
        self.rewards += phi * reward
        self.gram += np.outer(phi, phi)
        self.rows += 1
        if self.rows % REFRESH == 0:
            self.inverse = np.linalg.inv(self.gram)
        else:  # Sherman and Morrison
            along = self.inverse @ phi
            self.inverse -= np.outer(along, along / (1 + phi @ along))

    @property
    def next_obs(self) -> NDArray[Any]:
        return self._next[: len(self._places)]

    @property
    def ended(self) -> NDArray[Any]:
        return self._ended[: len(self._places)]

    @property
    def weights(self) -> NDArray[Any]:
        """(d, m), with the weights of equal next states added up."""
        return self.inverse @ self._sums[: len(self._places)].T


class Seen(NamedTuple):
    """Observations (n, obs_dim) with phi (n, A, d), the bonus (n, A), and whether nothing follows (n,)."""

    obs: Tensor
    phi: Tensor
    width: Tensor
    over: Tensor


class SoftLinearPolicy(nn.Module):
    """log pi_h(.|s) of the last plan: (n, obs_dim) -> (n, A).

    Attributes:
        weights: (H, d), what phi is multiplied by: nu, and theta where rewards are estimated.
        inverse: (G, d, d), G = H, or 1 where steps are pooled; as it was when the plan was made.
        log_reference: (A,), or (H, S, A).
        log_policy: (H, S, A) with `alpha`; else empty.
    """

    inverse: Tensor
    log_reference: Tensor
    log_policy: Tensor

    def __init__(self, features: FeatureMap, config: DRRPOConfig, log_reference: Tensor) -> None:
        super().__init__()
        d, h = features.size, features.horizon
        self.features, self.form = features, config.bonus
        self.beta, self.eta, self.alpha, self.gamma = config.beta, config.eta, config.alpha, config.gamma
        self.weights = nn.Parameter(torch.zeros(h, d, dtype=torch.float64))
        self.pooled = features.pooled if config.pooled is None else config.pooled
        groups = 1 if self.pooled else h
        eye = torch.eye(d, dtype=torch.float64) / config.ridge
        self.register_buffer("inverse", eye.expand(groups, d, d).clone())
        self.register_buffer("log_reference", log_reference)
        shape = (h, features.finite or 0, features.actions) if config.alpha is not None else (0,)
        self.register_buffer("log_policy", log_reference.expand(shape).clone() if config.alpha else torch.zeros(shape))
        bounds = torch.tensor([features.bounds(step) for step in range(h)], dtype=torch.float64)
        self.register_buffer("low", bounds[:, :1].clone())
        self.register_buffer("high", bounds[:, 1:].clone())

    low: Tensor
    high: Tensor

    def seen(self, obs: Tensor, h: Tensor | int) -> Seen:
        """What Q of observations (n, obs_dim) in steps h, (n,) or one for all, is made from, besides the weights."""
        phi = self.features(obs)
        group = self.inverse[:1] if self.pooled else self.inverse[h]
        width = self.beta * bonus(phi, group, self.form)
        return Seen(obs, phi, width, self.features.over(obs))

    def q(self, of: Seen, h: Tensor | int) -> Tensor:
        """Q_h (n, A) in steps h, (n,) or one for all."""
        known = self.features.rewards(of.obs, h)
        continuation = (of.phi @ self.weights[h].unsqueeze(-1)).squeeze(-1)
        # What is known of rewards stands beside the regression, what is not is in `weights`.
        reward = torch.zeros_like(continuation) if known is None else known
        q = optimistic_q(reward, continuation, of.width, self.low[h], self.high[h])
        return torch.where(of.over.unsqueeze(-1), 0.0, q)

    def reference(self, obs: Tensor, h: Tensor | int) -> Tensor:
        """log pi_ref (n, A), or (A,)."""
        return self.log_reference if self.log_reference.ndim == 1 else self.log_reference[h, self.features.state(obs)]

    def forward(self, obs: Tensor) -> Tensor:
        obs = obs.double()
        h = self.features.step(obs)
        if self.alpha is not None:
            return self.log_policy[h, self.features.state(obs)]
        return soft_policy(self.q(self.seen(obs, h), h), self.reference(obs, h), self.eta)


class DRRPO(ControlTrainer):
    """Robust policy optimisation; see the module's text."""

    Config = DRRPOConfig
    name = "dr_rpo"
    action_spaces = ("Discrete",)
    chooses = True
    policy_parts = ("policy",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "CartPole-v1": {
            "features": "kernel", "n_features": 100, "bandwidth": 1.5, "ridge": 1e-3, "bonus": "none", "horizon": 60,
            "gamma": 0.97, "uncertainty": "tv_penalty", "sigma": 15.0, "eta": 0.02, "plan_growth": 0.1,
        },
    }  # fmt: skip
    default_task: ClassVar[Mapping[str, Any]] = {
        "env": "rlkit/SlipperyGrid-v0", "uncertainty": "kl_penalty", "sigma": 0.3, "eta": 0.01, "beta": 0.05,
        "steps": 6_000, "log_every": 600, "eval_every": 1_500, "eval_episodes": 500, "eval_env_kwargs": {"slip": 0.4},
    }  # fmt: skip

    policy: SoftLinearPolicy
    normalizer: ToFloat32

    def __init__(self, env: Any = None, *args: Any, saved: Mapping[str, Any] | None = None, **given: Any) -> None:
        self._recipe = None if saved is None else saved.get("features")
        self._fresh = saved is None
        super().__init__(env, *args, saved=saved, **given)

    def build(self) -> None:
        config: DRRPOConfig = self.config
        if config.normalize_obs:
            raise UserError("`normalize_obs`: features are of observations as they are; leave it out")
        if config.uncertainty == "tv_radius" and np.max(np.asarray(config.radius)) > 1:
            raise UserError(f"`radius`: got {np.max(np.asarray(config.radius)):g}; total variation is at most 1")
        features = self._features()
        actions: Any = self.action_space
        if features.actions != actions.n:
            raise UserError(f"`features`: they are of {features.actions} actions, and the environment has {actions.n}")
        if config.alpha is not None and features.finite is None:
            raise UserError("`alpha`: mirror descent needs an environment of finitely many states; leave it out")
        if config.pooled is False and not features.timed:
            raise UserError("`pooled`: observations do not say the step, so there is one set of data; leave it out")
        self.known = features.rewards(torch.zeros(1, self.obs_dim), torch.zeros(1, dtype=torch.int64)) is not None
        if config.reward and self.known:
            raise UserError("`reward`: the rewards of this environment are known to its features; leave it out")
        self.levels = self._levels(features)
        self.track(
            policy=SoftLinearPolicy(features, config, self._log_reference(features)),
            normalizer=ToFloat32(),
            buffer=RolloutBuffer(config.buffer_size, self.transition_fields(), self.device),
        )
        groups = len(self.policy.inverse)
        self.ridges = [Ridge(features.size, self.obs_dim, config.ridge) for _ in range(groups)]
        self.plans: list[int] = []  # rows that each plan so far was made from
        self.episodes = 0  # that have ended since the last plan

    def _features(self) -> FeatureMap:
        config: DRRPOConfig = self.config
        if self._recipe is not None:
            return rebuilt(self._recipe)
        # Of the source: evaluations may be in another environment.
        own = envs.single(self._spec, config.env_kwargs) if isinstance(self._spec, str) else super().make_eval_env()
        env: Any = self._spec if isinstance(self._spec, gym.Env) else None if own is None else own()
        if env is None:
            raise UserError("`features`: they are made from an environment: give an id, an object, or `eval_env`")
        try:
            found = self._made_features(env)
        finally:
            if env is not self._spec:
                env.close()
        if not isinstance(found, FeatureMap):
            raise UserError(f"`features`: {config.features} gave {type(found).__name__}, not a FeatureMap")
        return found

    def _made_features(self, env: Any) -> Any:
        config: DRRPOConfig = self.config
        if config.features == "auto":
            if not hasattr(env.unwrapped, "feature_map"):
                raise UserError(
                    f"`features`: {config.env or type(env.unwrapped).__name__} has none of its own: take `kernel` for "
                    "vectors, `rlkit/Finite-v0` around an environment of finitely many states, or `module:function`"
                )
            return env.unwrapped.feature_map()
        if config.features == "kernel":
            if env is self._spec:
                raise UserError("`features: kernel` steps an environment of its own: give `eval_env`, or an id")
            return kernel_features(env, config.n_features, config.bandwidth, config.horizon, seed=config.seed)
        module, _, function = config.features.partition(":")
        if not function:
            raise UserError(f"`features`: got {config.features!r}; allowed: auto, kernel, module:function")
        try:
            return getattr(importlib.import_module(module), function)(env)
        except (ImportError, AttributeError) as error:
            raise UserError(f"`features`: {config.features}: {error}") from error

    @property
    def _level(self) -> NDArray[Any]:
        """The radius, or the price, as it was given."""
        config: DRRPOConfig = self.config
        return np.asarray(config.radius if config.uncertainty.endswith("radius") else config.sigma, np.float64)

    def _levels(self, features: FeatureMap) -> NDArray[Any]:
        """The radius, or the price, of each factor in each step: (H, d)."""
        shape, given = (features.horizon, features.size), self._level
        if given.ndim and given.shape != shape:
            raise UserError(f"`radius`: a table of shape {given.shape}; expected one number, or {shape}")
        return np.broadcast_to(given, shape)

    def _log_reference(self, features: FeatureMap) -> Tensor:
        """(A,), or (H, S, A) of a run; one of a checkpoint is loaded over it."""
        given, n = self.config.reference, features.actions
        if isinstance(given, str):
            shape = (features.horizon, features.finite or 0, n)
            if not self._fresh:
                return torch.zeros(shape, dtype=torch.float64)
            other = load(given, inference=True)
            if not isinstance(other, DRRPO) or features.finite is None or other.features.finite is None:
                raise UserError(f"`reference`: {given} is no run of dr_rpo in an environment of finitely many states")
            found = torch.from_numpy(other.table()).log()
            if found.shape != shape:
                raise UserError(f"`reference`: {given} has a policy of shape {tuple(found.shape)}, expected {shape}")
            if found.isinf().any():
                raise UserError(f"`reference`: {given} never takes some actions (`eta: 0`); its divergence is infinite")
            return found
        if given is None:
            return torch.full((n,), -math.log(n), dtype=torch.float64)
        if len(given) != n or abs(sum(given) - 1) > 1e-6 or min(given) <= 0:
            raise UserError(f"`reference`: got {given}; expected {n} positive probabilities that sum to 1")
        return torch.tensor(given, dtype=torch.float64).log()

    @property
    def features(self) -> FeatureMap:
        return self.policy.features

    def make_eval_env(self) -> Callable[[], gym.Env] | None:
        config: DRRPOConfig = self.config
        if not config.eval_env_kwargs or self._eval_env is not None:
            return super().make_eval_env()
        if not isinstance(self._spec, str):
            raise UserError("`eval_env_kwargs`: they are of environments given by id; give `eval_env` instead")
        return envs.single(self._spec, {**config.env_kwargs, **config.eval_env_kwargs})

    # Experience

    def before_learning(self) -> None:
        super().before_learning()
        config: DRRPOConfig = self.config
        if self.target > config.buffer_size:
            raise UserError(
                f"`buffer_size`: {config.buffer_size:,} transitions are kept, and {self.target:,} steps are to be "
                "learned from; raise it"
            )

    def collect(self) -> int:
        """A step of every environment; a plan is owed once `plan_every` episodes have ended and data have grown."""
        config: DRRPOConfig = self.config
        taken, _ = self._step_environments()
        self.vector_steps += taken > 0
        self.episodes += len(self._last_step[2])
        grown = len(self.buffer) >= (1 + config.plan_growth) * (self.plans[-1] if self.plans else 0)
        if self.episodes >= config.plan_every and grown:
            self.owed += 1
            self.episodes = 0
        return taken

    def explore(self, obs: Tensor) -> dict[str, Tensor]:
        return {"action": draw(self.policy(obs), self._uniform("explore", len(obs)))}

    def act(self, obs: Tensor, deterministic: bool) -> Tensor:
        logp = self.policy(obs)
        return logp.argmax(-1) if deterministic else draw(logp, self._uniform("predict", len(obs)))

    def _uniform(self, stream: str, n: int) -> Tensor:
        return torch.rand(n, generator=self.rng[stream], device=self.device)

    def planned_updates(self) -> float:
        return max(0, self.target - self.clock) / (self.features.horizon * self.config.plan_every)

    # Plans

    def batch(self) -> Batch:
        """The transitions since the last plan."""
        return self.buffer.rows(torch.arange(self.plans[-1] if self.plans else 0, len(self.buffer)))

    @torch.no_grad()
    def update(self, batch: Batch) -> Mapping[str, Tensor]:
        """Add transitions to the regressions, and plan anew."""
        self._add(batch)
        self.plans.append((self.plans[-1] if self.plans else 0) + len(batch["reward"]))
        return self._plan()

    def _add(self, batch: Batch) -> None:
        n = len(batch["reward"])
        if n == 0:
            return
        obs, rewards = batch["obs"].double(), batch["reward"].double().cpu().numpy()
        low, high = self.features.reward_range
        outside = np.flatnonzero(~((rewards >= low - 1e-6) & (rewards <= high + 1e-6)))
        if len(outside):
            raise UserError(
                f"a reward of {rewards[outside[0]]:g} is outside of the features' `reward_range`, {low:g} to {high:g}, "
                "which values are bounded by: scale rewards (`--reward scale=...`), or give features with another range"
            )
        phi = self.features(obs)[torch.arange(n), batch["action"]]
        check_simplex(phi)
        step = self.features.step(obs) if len(self.ridges) > 1 else torch.zeros(n, dtype=torch.int64)
        following = batch["next_obs"].double().cpu().numpy()
        states = [state.tobytes() for state in np.ascontiguousarray(self.features.without_step(following))]
        rows = phi.cpu().numpy(), rewards, following, states, batch["terminated"].tolist()
        for h, *row in zip(step.tolist(), *rows, strict=True):
            self.ridges[h].add(*row)

    def _plan(self) -> dict[str, Tensor]:
        """Backward over the steps; see the module's text."""
        config: DRRPOConfig = self.config
        policy, features = self.policy, self.features
        for group, ridge in enumerate(self.ridges):
            policy.inverse[group] = torch.from_numpy(ridge.inverse)
        weights = [ridge.weights for ridge in self.ridges]
        following: list[Seen] = []
        for group, ridge in enumerate(self.ridges):
            obs = torch.from_numpy(ridge.next_obs.copy()).to(self.device)
            following.append(policy.seen(obs, min(group + 1, features.horizon - 1)))
        for h in reversed(range(features.horizon)):
            group = 0 if policy.pooled else h
            ridge = self.ridges[group]
            nu = np.zeros(features.size)
            if h < features.horizon - 1 and ridge.rows:
                y = self._values(following[group], h + 1).cpu().numpy()
                y[ridge.ended] = 0.0
                nu = config.gamma * self._worst(y, weights[group], h)
            if not self.known:
                nu = nu + ridge.inverse @ ridge.rewards
            policy.weights[h] = torch.from_numpy(nu)
            if config.alpha is not None:
                self._mirror(h, config.alpha)
        return self._about_plan()

    def _values(self, of: Seen, h: int) -> Tensor:
        """V_h (m,) of observations."""
        policy, eta = self.policy, self.config.eta
        q, reference = policy.q(of, h), policy.reference(of.obs, h)
        if self.config.alpha is not None:
            return regularised_value(policy.log_policy[h, self.features.state(of.obs)], q, reference, eta)
        return soft_value(q, reference, eta)

    def _worst(self, y: NDArray[Any], weights: NDArray[Any], h: int) -> NDArray[Any]:
        """nu_h (d,)."""
        if self.config.uncertainty == "none":
            return weights @ y
        low, high = self.features.bounds(h + 1)
        low, high = min(low, float(y.min())), max(high, float(y.max()))
        return DUALS[self.config.uncertainty](y, weights, self.levels[h], low=low, high=high)

    def _mirror(self, h: int, alpha: float) -> None:
        """A step of the policy in all states."""
        policy = self.policy
        obs = self._states(h)
        q, reference = policy.q(policy.seen(obs, h), h), policy.reference(obs, h)
        policy.log_policy[h] = mirror_step(policy.log_policy[h], q, reference, self.config.eta, alpha)

    def _states(self, h: int) -> Tensor:
        """Observations (S, 2) of all states in step h."""
        states = torch.arange(self.features.finite or 0, dtype=torch.float64, device=self.device)
        return torch.stack([states, torch.full_like(states, h)], 1)

    def _about_plan(self) -> dict[str, Tensor]:
        """What is planned where episodes begin: of the last hundred."""
        obs = self.buffer["obs"][-100 * self.features.horizon :].double()
        first = obs[self.features.step(obs) == 0][-100:]
        if not len(first):
            return {}
        seen, logp = self.policy.seen(first, 0), self.policy(first)
        return {
            "train/planned_value": self._values(seen, 0).mean(),
            "train/bonus": seen.width.mean(),
            "train/kl_to_reference": -regularised_value(
                logp, torch.zeros_like(logp), self.policy.reference(first, 0), 1.0
            ).mean(),
            "train/next_states": torch.tensor(float(sum(len(ridge.next_obs) for ridge in self.ridges))),
        }

    @torch.no_grad()
    def table(self, mdp: LinearMDP | None = None) -> NDArray[Any]:
        """pi_h(a|s), (H, S, A), of an environment of finitely many states.

        Args:
            mdp: whose observations are asked for; by default [state, step].
        """
        if mdp is None:
            if self.features.finite is None:
                raise UserError("`table`: the states are not finitely many; give the `LinearMDP` that is meant")
            obs = torch.stack([self._states(h) for h in range(self.features.horizon)])
        else:
            states = range(len(mdp.initial))
            obs = torch.tensor(np.array([[mdp.observation(s, h) for s in states] for h in range(mdp.horizon)]))
        flat = self.policy(obs.flatten(0, 1).to(self.device)).exp()
        found: NDArray[Any] = flat.unflatten(0, obs.shape[:2]).cpu().numpy()
        return found

    # Reports

    def summary(self) -> list[str]:
        return [*super().summary(), *self.exact()]

    def exact(self) -> list[str]:
        """Of an environment whose dynamics are known: exact returns of the policy and of the best ones. Lines."""
        make = self.make_eval_env()
        env: Any = None if make is None else make().unwrapped
        if not isinstance(env, LinearMDP) or not np.isfinite(self.table(env)).all():
            return []
        kind, level = self.config.uncertainty, self._level
        if kind == "none":
            kind, level = "tv_radius", np.zeros(())

        def greedy(divergence: str, at: Any) -> NDArray[Any]:
            q = robust_q(env, robust_values(env, divergence, at), divergence, at)
            return np.asarray(np.eye(q.shape[-1])[q.argmax(-1)])

        lines = []
        shown = {
            "this policy": self.table(env), "the best of the source": greedy("tv_radius", 0.0),
            "the best against the worst": greedy(kind, level),
        }  # fmt: skip
        for what, policy in shown.items():
            worst = robust_value(env, kind, level, policy=policy)
            source, target = simulate(env, policy, env.factors), simulate(env, policy)
            lines.append(
                f"{what}: exact return in the source {source:.3f}, in the evaluation's {target:.3f}, against the worst "
                f"dynamics near the source {worst:.3f}"
            )
        return lines

    def describe(self) -> str:
        f = self.features
        kind = "one regression for all steps" if self.policy.pooled else "a regression for each step"
        return f"{super().describe()}\nfeatures: {f.size}, {f.horizon} steps, {kind}"

    # State

    def state(self) -> dict[str, Any]:
        files = super().state()
        files["state"] |= {"features": self.features.recipe(), "plans": self.plans, "episodes": self.episodes}
        return files

    def load_state(self, files: Mapping[str, Any]) -> None:
        super().load_state(files)
        self.plans, self.episodes = list(files["state"]["plans"]), files["state"]["episodes"]
        if "buffer" in files:  # sums are those of the rows, added plan by plan as they were
            for start, stop in zip([0, *self.plans], self.plans, strict=False):
                self._add(self.buffer.rows(torch.arange(start, stop)))
