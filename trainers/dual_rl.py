"""f-DVL: offline reinforcement learning by an implicit maximum over recorded actions, from a dual of the problem.

Paper: Sikchi, Zheng, Zhang, Niekum, Dual RL: Unification and New Methods for Reinforcement and Imitation Learning,
arXiv:2302.08560. Regularised by an f-divergence from the recorded visitation, reinforcement learning has a dual in V(s)
alone (`rlkit.duality` solves it for tables). Its sampled form is one loss of the residual y = Qbar(s, a) - V(s),

    L_V = mean_B [(1 - lam) V(s) + lam fbar(Qbar(s, a) - V(s))],

which makes V(s) a maximum over the actions that were recorded, without evaluating others. `MAXIMISERS` has the forms of
fbar; Q is regressed on r + gamma V(s'), and the policy clones actions by the weight exp(tau (Qbar - V)):

- `chi2`: (y + y^2/4) where y > 0. Reaches max Q at a finite lam; the default.
- `chi2_literal`: max(y + y^2/4, 0), as in the authors' code. That is positive again below y = -4, so where the values
  of a state spread further it pulls V back, and is no maximum.
- `chi2_exact`: the conjugate itself; overshoots max Q.
- `tv`: max(y, 0), total variation. V is the quantile of Q at 2 - 1 / lam, so lam is above 1/2.
- `gumbel`: XQL's (arXiv:2301.02328), V = lam log E exp(Q / lam). Here `lam` is that temperature.
- `expectile`: IQL's (arXiv:2110.06169), the expectile at lam.

So `divergence: gumbel` is XQL and `divergence: expectile` IQL, with the same networks; `policy_temperature: 0` weighs
all actions alike, which is behaviour cloning.

The formulas are from the authors' released code and reviews of the paper. Deviations from that code: the critics' loss
is the paper's squared error (`huber_delta: 20` is the code's); the default maximiser is one-sided (see above).

With `offline_steps` less than the budget, the run goes on online, and learns from recorded and own transitions alike.

Shapes: B batch, D action dimension, N critics; values are (B,) and (N, B).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import annotated_types as limits
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlkit.buffer import RolloutBuffer
from rlkit.config import Count, Fraction, NonNegative, Positive, Strict, Whole
from rlkit.errors import UserError
from rlkit.nets import ActivationName, EnsembleMLP, RunningNorm, ToFloat32, orthogonal_
from rlkit.offline import OfflineConfig, OfflineTrainer
from rlkit.optim import Adam, descend, polyak_
from rlkit.trainer import Batch

Divergence = Literal["chi2", "chi2_literal", "chi2_exact", "tv", "gumbel", "expectile"]
LOG_STD = (-5.0, 2.0)
"""Bounds of the policy's log standard deviation."""


# Implicit maximisers: (B,) values of recorded actions, (B,) V of their states, lam -> (B,) losses of V


def chi2(q: Tensor, v: Tensor, lam: float) -> Tensor:
    """lam (y + y^2/4) 1[y > 0] - (1 - lam) y, y = q - v; the one-sided Pearson chi-square."""
    y = q - v
    return lam * torch.where(y > 0, y + y.square() / 4, 0.0) - (1 - lam) * y


def chi2_literal(q: Tensor, v: Tensor, lam: float) -> Tensor:
    """lam max(y + y^2/4, 0) - (1 - lam) y, which grows on both sides."""
    y = q - v
    return lam * (y + y.square() / 4).clamp(min=0) - (1 - lam) * y


def chi2_exact(q: Tensor, v: Tensor, lam: float) -> Tensor:
    """lam f_p*(y) - (1 - lam) y, f_p*(y) = y + y^2/4 for y >= -2, else -1."""
    y = q - v
    return lam * torch.where(y >= -2, y + y.square() / 4, -1.0) - (1 - lam) * y


def tv(q: Tensor, v: Tensor, lam: float) -> Tensor:
    """lam max(y, 0) - (1 - lam) y: the pinball loss of the quantile 2 - 1 / lam, times lam."""
    y = q - v
    return lam * y.clamp(min=0) - (1 - lam) * y


def gumbel(q: Tensor, v: Tensor, lam: float, max_clip: float = 7.0) -> Tensor:
    """exp(z) - z - 1, z = min((q - v) / lam, max_clip), divided by exp(c), c = max(max_B z, -1) constant.

    The division bounds the largest term and leaves the minimum over a batch where it is.
    """
    z = ((q - v) / lam).clamp(max=max_clip)
    c = z.detach().max().clamp(min=-1.0)
    return (z - c).exp() - (z + 1) * (-c).exp()


def expectile(q: Tensor, v: Tensor, lam: float) -> Tensor:
    """|lam - 1[y < 0]| y^2, y = q - v."""
    y = q - v
    return (lam - (y < 0).to(y.dtype)).abs() * y.square()


MAXIMISERS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "chi2": chi2,
    "chi2_literal": chi2_literal,
    "chi2_exact": chi2_exact,
    "tv": tv,
    "gumbel": gumbel,
    "expectile": expectile,
}
LAMS: dict[str, float] = {"gumbel": 2.0, "expectile": 0.7}
"""Defaults of `lam` other than 0.8: XQL's and IQL's for MuJoCo."""


# The other losses


def cloning_weight(advantage: Tensor, temperature: float, most: float) -> Tensor:
    """min(exp(tau A), most) for A = Qbar - V; (B,) -> (B,). The exponent is cut first, so nothing overflows."""
    return (temperature * advantage).clamp(max=math.log(most)).exp()


def policy_loss(logp: Tensor, weight: Tensor) -> Tensor:
    """-mean_B w log pi(a|s); (B,) each, w constant."""
    return -(weight.detach() * logp).mean()


def discounted_value(discount: Tensor, terminated: Tensor | None, next_value: Tensor, after: float = 0.0) -> Tensor:
    """gamma V(s'), (B,) each, with `after` for V of a terminal state; without `terminated` all states go on.

    A time limit does not stop the bootstrap.
    """
    if terminated is None:
        return discount * next_value
    done = terminated.to(next_value.dtype)
    return discount * ((1 - done) * next_value + done * after)


def critic_loss(q: Tensor, target: Tensor, huber_delta: float | None = None) -> Tensor:
    """sum_i mean_B (Q_i - y)^2, or Huber's loss of that; q (N, B), target (B,)."""
    target = target.expand_as(q)
    if huber_delta is None:
        return F.mse_loss(q, target, reduction="none").mean(1).sum()
    return F.huber_loss(q, target, reduction="none", delta=huber_delta).mean(1).sum()


def normal_logp(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log N(a; mean, std) of actions as they are, without squashing: (B, D), (B, D), (D,) -> (B,)."""
    z = (action - mean) * (-log_std).exp()
    return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


# Configuration


@dataclass(frozen=True, kw_only=True)
class DualRLNetConfig(Strict):
    """`policy_kwargs`: the networks."""

    net_arch: tuple[Count, ...] | dict[Literal["pi", "qf", "vf"], tuple[Count, ...]] = (256, 256)
    """Hidden widths: one list, or a mapping with `pi` (policy), `qf` (critics) and `vf` (state values)."""
    activation_fn: ActivationName = "relu"
    """Activation of hidden layers."""
    n_critics: Count = 2
    """Critics, of which the least counts."""
    value_layer_norm: bool = True
    """Layer normalisation in the network of state values."""
    policy_dropout: Annotated[float, limits.Interval(ge=0, lt=1)] = 0.0
    """Dropout probability in the policy, while it trains."""
    ortho_init: bool = True
    """Orthogonal initial weights of gain sqrt(2), zero biases."""

    def widths(self, net: Literal["pi", "qf", "vf"]) -> tuple[int, ...]:
        """Hidden widths of the policy (`pi`), the critics (`qf`) or the state values (`vf`)."""
        return self.net_arch.get(net, ()) if isinstance(self.net_arch, dict) else self.net_arch


@dataclass(frozen=True, kw_only=True)
class CloningConfig(OfflineConfig):
    """What trainers share that weigh recorded actions by their advantage."""

    offline_steps: Whole | Literal["all"] = "all"
    """Updates from the data alone before the first step of the environments; part of the budget. `all`: the
    environments serve evaluation only, and `--steps` counts updates."""
    batch_size: Count = 1024
    """Transitions of an update."""
    policy_temperature: NonNegative = 3.0
    """tau of the policy's weights exp(tau (Q - V)), in 1 / units of reward; 0 is behaviour cloning."""
    weight_clip: Positive = 100.0
    """The largest weight."""
    policy_schedule: Literal["constant", "cosine"] = "cosine"
    """Of the policy's learning rate over the first budget; `cosine` falls to zero."""
    policy_kwargs: DualRLNetConfig = field(default_factory=DualRLNetConfig)
    """The networks."""


@dataclass(frozen=True, kw_only=True)
class CriticConfig(CloningConfig):
    """Of those whose V is an implicit maximum of critics."""

    tau: Fraction = 0.005
    """Averaging rate of the target critics."""
    max_clip: Positive = 7.0
    """Where the exponent of the Gumbel loss ends."""


@dataclass(frozen=True, kw_only=True)
class DualRLConfig(CriticConfig):
    """Defaults are the authors' code's for MuJoCo, but for what the module's text says."""

    divergence: Divergence = "chi2"
    """The implicit maximiser; see the module's text."""
    lam: Positive | None = None
    """How close V is to the maximum, below 1 (chi-square also 1, with `random_actions`); of `gumbel` its temperature.
    None takes 0.8, of `gumbel` 2 and of `expectile` 0.7."""
    huber_delta: Positive | None = None
    """Where the critics' squared error becomes linear; None keeps it squared."""
    random_actions: Whole = 0
    """Uniform actions beside each recorded one in the loss of V."""


def lam_of(config: DualRLConfig) -> float:
    """`lam`, or the divergence's default.

    Raises:
        UserError: a value at which the loss has no minimum.
    """
    name, lam = config.divergence, config.lam
    if lam is None:
        return LAMS.get(name, 0.8)
    closed = name.startswith("chi2") or name == "tv"
    if name != "gumbel" and (lam > 1 or (lam == 1 and not closed)):
        raise UserError(
            f"`lam`: got {lam}; with `divergence: {name}` it is at most 1" + ("" if closed else ", exclusive")
        )
    if name == "tv" and lam <= 0.5:
        raise UserError(f"`lam`: got {lam}; with `divergence: tv`, V is the quantile 2 - 1 / lam: give more than 0.5")
    if lam == 1 and config.random_actions == 0:
        raise UserError("`lam`: at 1 nothing keeps V from growing but `random_actions`; give some, or a smaller `lam`")
    return lam


# Networks


class GaussianPolicy(nn.Module):
    """(B, obs) -> means (B, D) in (-1, 1) and log standard deviations (D,), which no state changes."""

    def __init__(self, obs_dim: int, action_dim: int, net: DualRLNetConfig) -> None:
        super().__init__()
        sizes = [obs_dim, *net.widths("pi"), action_dim]
        self.net = EnsembleMLP(1, sizes, net.activation_fn, dropout=net.policy_dropout)
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def forward(self, obs: Tensor, masks: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.net(obs, masks)[0].float()), self.log_std.clamp(*LOG_STD)


class StateValue(nn.Module):
    """V(s): (B, obs) -> (B,)."""

    def __init__(self, obs_dim: int, net: DualRLNetConfig) -> None:
        super().__init__()
        sizes = [obs_dim, *net.widths("vf"), 1]
        self.net = EnsembleMLP(1, sizes, net.activation_fn, layer_norm=net.value_layer_norm)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs)[0].squeeze(-1).float()


class ActionValue(nn.Module):
    """N values Q_i(s, a): (B, obs), (B, D) -> (N, B)."""

    def __init__(self, obs_dim: int, action_dim: int, net: DualRLNetConfig) -> None:
        super().__init__()
        self.net = EnsembleMLP(net.n_critics, [obs_dim + action_dim, *net.widths("qf"), 1], net.activation_fn)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat([obs, action], dim=-1)).squeeze(-1).float()


class CloningTrainer(OfflineTrainer):
    """Base of trainers of V, critics and a policy that clones recorded actions by weight; acting is settled here.

    A subclass has `_step(batch, masks, noise)`, which makes one update of all parts; one with other networks has its
    `networks`, too.
    """

    Config: ClassVar[type[CloningConfig]] = CloningConfig
    normalizer: RunningNorm | ToFloat32
    actor: GaussianPolicy
    value: StateValue
    critic: ActionValue
    critic_target: ActionValue
    actor_optimizer: Adam
    value_optimizer: Adam
    critic_optimizer: Adam

    def build(self) -> None:
        config: CloningConfig = self.config
        trained, targets = self.networks()
        if config.policy_kwargs.ortho_init:
            for module in trained.values():
                orthogonal_(module, math.sqrt(2))
        for name, module in targets.items():
            module.requires_grad_(False).load_state_dict(trained[name].state_dict())
        self.track(normalizer=RunningNorm(self.obs_dim) if config.normalize_obs else ToFloat32(), **trained)
        self.track(**{f"{name}_target": module for name, module in targets.items()})
        for name, module in trained.items():
            self.track(**{f"{name}_optimizer": Adam(module.parameters(), config.learning_rate)})
        # An offline run never fills it.
        size = 1 if config.offline_steps == "all" else config.buffer_size
        self.track(buffer=RolloutBuffer(size, self.transition_fields(), self.device, name="buffer_size"))
        self.open_data()
        self._update = self.compilable(self._step)
        self._explore = self.compilable(self._sample)

    def networks(self) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        """What is trained, and the targets of some of it, by name."""
        net, shape = self.config.policy_kwargs, (self.obs_dim, self.action_dim)
        trained: dict[str, nn.Module] = {
            "actor": GaussianPolicy(*shape, net), "value": StateValue(self.obs_dim, net),
            "critic": ActionValue(*shape, net),
        }  # fmt: skip
        return trained, {"critic": ActionValue(*shape, net)}

    # Acting

    def explore(self, obs: Tensor) -> dict[str, Tensor]:
        return {"action": self._explore(obs, self._noise("explore", len(obs)))}

    def act(self, obs: Tensor, deterministic: bool) -> Tensor:
        if deterministic:
            return self.actor(self.normalizer(obs))[0]
        return self._sample(obs, self._noise("predict", len(obs)))

    def _sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        mean, log_std = self.actor(self.normalizer(obs))
        return (mean + log_std.exp() * noise).clamp(-1.0, 1.0)

    def _noise(self, stream: str, n: int) -> Tensor:
        """Standard normal (n, D)."""
        return torch.randn(n, self.action_dim, generator=self.rng[stream], device=self.device)

    # Learning

    def batch(self) -> Batch:
        return self.experience(self.config.batch_size, self.rng["sample"])

    def update(self, batch: Batch) -> Mapping[str, Tensor]:
        self.schedule()
        n = batch["reward"].shape[0]
        return self._update(batch, self.actor.net.masks(n, self.rng["dropout"]), self.noise(n))

    def noise(self, n: int) -> dict[str, Tensor]:
        """What else `_step` needs that is drawn at random."""
        return {}

    def _step(self, batch: Batch, masks: list[Tensor], noise: dict[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError

    def schedule(self) -> None:
        super().schedule()
        if self.config.policy_schedule == "cosine":
            self.actor_optimizer.learning_rate = self.learning_rate * 0.5 * (1 + math.cos(math.pi * self.progress))

    def clone(self, obs: Tensor, action: Tensor, q: Tensor, masks: list[Tensor]) -> dict[str, Tensor]:
        """One step of the policy towards `action` (B, D) by the weights of `q` (B,) over the present V."""
        config: CloningConfig = self.config
        with self.autocast():
            with torch.no_grad():
                weight = cloning_weight(q - self.value(obs), config.policy_temperature, config.weight_clip)
            logp = normal_logp(action, *self.actor(obs, masks))
            loss = policy_loss(logp, weight)
        norm = descend(self.actor_optimizer, loss)
        return {
            "train/actor_loss": loss.detach(),
            "train/actor_grad_norm": norm,
            "train/entropy": -logp.detach().mean(),
            "train/weight_mean": weight.mean(),
            "train/weight_clipped": (weight >= 0.999 * config.weight_clip).float().mean(),
        }

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), "train/learning_rate": self.learning_rate}


# Settings of the released code; the name of an environment stands for its domain.
_LOCOMOTION: dict[str, Any] = {"return_range": 1000.0, "huber_delta": 20.0}
PRESETS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5"), _LOCOMOTION),
    "antmaze": {
        "divergence": "tv", "lam": 0.8, "policy_temperature": 10.0, "policy_schedule": "constant", "huber_delta": 20.0,
        "reward": ["shift=-1"],
    },
    "kitchen": {"policy_temperature": 0.5, "policy_kwargs": {"policy_dropout": 0.1}, "huber_delta": 20.0},
    "adroit": {"policy_temperature": 0.5, "policy_kwargs": {"policy_dropout": 0.1}, "huber_delta": 20.0},
    # Small networks and batches, for a CPU and tasks of low dimension.
    "small": {"batch_size": 256, "learning_rate": 1e-3, "policy_kwargs": {"net_arch": [64, 64]}},
}  # fmt: skip


class DualRL(CloningTrainer):
    """f-DVL; see the module's text."""

    Config = DualRLConfig
    name = "dual_rl"
    presets = PRESETS
    default_task: ClassVar[Mapping[str, Any]] = {
        "env": "Pendulum-v1", "data": "rlkit.envs.swing_up:mixed_data", "preset": "small", "return_range": 100.0,
        "steps": 6_000, "log_every": 500, "eval_every": 2_000, "eval_episodes": 20,
    }  # fmt: skip

    def build(self) -> None:
        config: DualRLConfig = self.config
        lam = lam_of(config)
        if config.divergence == "gumbel":
            self.maximiser = lambda q, v: gumbel(q, v, lam, config.max_clip)
        else:
            self.maximiser = lambda q, v: MAXIMISERS[config.divergence](q, v, lam)
        super().build()

    def noise(self, n: int) -> dict[str, Tensor]:
        shape = (self.config.random_actions, n, self.action_dim)
        if not shape[0]:
            return {}
        return {"uniform": torch.rand(shape, generator=self.rng["actions"], device=self.device) * 2 - 1}

    def _step(self, batch: Batch, masks: list[Tensor], noise: dict[str, Tensor]) -> dict[str, Tensor]:
        """V, policy, critics, targets, in that order: one gradient step each, each with what is new before it."""
        config: DualRLConfig = self.config
        with self.autocast():
            obs, next_obs = self.normalizer(batch["obs"]), self.normalizer(batch["next_obs"])
            action = batch["action"]
            with torch.no_grad():
                target_q = self.critic_target(obs, action).min(0).values
            v = self.value(obs)
            if "uniform" not in noise:
                loss = self.maximiser(target_q, v).mean()
            else:
                uniform = noise["uniform"]
                with torch.no_grad():
                    rows = obs.expand(len(uniform), *obs.shape).flatten(0, 1)
                    q_random = self.critic_target(rows, uniform.flatten(0, 1)).min(0).values
                every = torch.cat([target_q, q_random]), torch.cat([v, v.repeat(len(uniform))])
                loss = self.maximiser(*every).mean()
        metrics = {
            "train/value_loss": loss.detach(),
            "train/value_grad_norm": descend(self.value_optimizer, loss),
            "train/v_mean": v.detach().mean(),
            "train/advantage_mean": (target_q - v.detach()).mean(),
        }
        metrics |= self.clone(obs, action, target_q, masks)
        with self.autocast():
            with torch.no_grad():
                y = batch["reward"] + discounted_value(batch["discount"], batch["terminated"], self.value(next_obs))
            q = self.critic(obs, action)
            loss = critic_loss(q, y, config.huber_delta)
        metrics["train/critic_grad_norm"] = descend(self.critic_optimizer, loss)
        polyak_(self.critic_target, self.critic, config.tau)
        return metrics | {"train/critic_loss": loss.detach(), "train/q_mean": q.detach().mean()}
