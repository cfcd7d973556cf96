"""PMOE: SAC with a mixture of experts as its policy, whose weights learn how often each expert is the best.

Paper: Ren, Li, Ding, Pan, Dong, Probabilistic Mixture-of-Experts for Efficient Deep Reinforcement Learning,
arXiv:2104.09122. Drawing an expert cannot be differentiated. So of one action from each expert, only the one that the
critics value most is trained by SAC's loss, and the weights are regressed on which one that was (`frequency_loss`).

The policy is pi(a|s) = sum_k w_k(s) pi_k(a|s), with pi_k SAC's squashed Gaussian. All experts share a trunk; the router
that gives w is one linear layer on the trunk's features, without gradient to them. With one expert it is SAC, bit for
bit.

Deviations from the authors' code (rlkit-pmoe): a row draws its expert for itself, where there the weights of the first
row draw for all; evaluation takes the expert of the largest weight (`eval_expert="sampled"` draws it, as there); alpha
is constant in the actor's loss; heads begin as PyTorch's layers do, and not within 1e-3 of zero, which leaves experts
merged; `expert_init_spread` draws them further apart.

`router_grad` has the estimators that the paper compares with, and one more; the forms are this file's:

- `frequency`: the paper's, above.
- `all`: each expert is trained by its own loss, the router as above.
- `exact`: the gradient of sum_k w_k f_k, f_k = min_i Q_i(s, a_k) - alpha log pi(a_k|s); an expert drawn from w trains.
- `score`: of f_k for the drawn expert alone, as the score-function estimator with the batch's mean as a baseline.
- `gumbel`: straight-through Gumbel-softmax weights of the experts' actions.
- `blend`: no mixture, but the one Gaussian of u = sum_k w_k u_k, u_k before squashing.

Shapes: B batch, K experts, D action dimension; see `rlkit.trainers.sac` for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlkit.config import Count, NonNegative, Positive
from rlkit.control import ControlTrainer
from rlkit.nets import MLP, LearnedScalar, Linear
from rlkit.optim import Adam, descend, polyak_
from rlkit.trainer import Batch
from rlkit.trainers.sac import (
    PRESETS,
    Critic,
    SACConfig,
    actor_loss,
    critic_loss,
    dropout_masks,
    due,
    tanh_gaussian,
    tanh_log_det,
    target_entropy,
    target_subset,
    td_target,
    temperature_loss,
    track_networks,
)


@dataclass(frozen=True, kw_only=True)
class PMOEConfig(SACConfig):
    """SAC's fields, and those of the experts."""

    n_experts: Count = 4
    """Gaussians of the policy; one makes it SAC."""
    entropy: Literal["component", "mixture"] = "component"
    """Whose log-probability the entropy bonus has: of the expert that acts (the paper's code), or of the mixture, which
    also rewards the entropy of the choice."""
    router_grad: Literal["frequency", "all", "exact", "score", "gumbel", "blend"] = "frequency"
    """How the weights learn, and which expert does."""
    freq_loss: Literal["mse", "ce"] = "mse"
    """Regression of the weights on the best expert: squared error (the paper's), or cross-entropy, which has the same
    minimum and a gradient where a weight is wrong and near 1."""
    gumbel_temperature: Positive = 1.0
    """Of the softmax in `router_grad: gumbel`."""
    expert_init_spread: NonNegative = 0.0
    """How far apart the experts' means begin, before squashing: +- this for one action dimension, else in random
    directions."""
    eval_expert: Literal["argmax", "sampled"] = "argmax"
    """The expert of deterministic actions: the one of the largest weight, or one drawn by the weights."""


def frequency_loss(log_weights: Tensor, best: Tensor, form: str = "mse") -> Tensor:
    """mean_{B,K} (1[k = best] - w_k)^2, or by `ce` -mean_B log w_best; (B, K) and (B,).

    Both are least where w_k = P(k = best), how often the expert wins.
    """
    if form == "ce":
        return F.nll_loss(log_weights, best)
    return (F.one_hot(best, log_weights.shape[1]) - log_weights.exp()).square().mean()


def exact_loss(log_weights: Tensor, value: Tensor) -> Tensor:
    """-mean_B sum_k w_k f_k: the value of drawing by w, for f (B, K) constant."""
    return -(log_weights.exp() * value.detach()).sum(1).mean()


def score_loss(log_weights: Tensor, value: Tensor, drawn: Tensor) -> Tensor:
    """-mean_B (f_k - b) log w_k for k drawn by w (B,), f_k (B,) constant, b the mean of the batch's other f: in
    expectation it has the gradient of `exact_loss`.
    """
    n = len(value)
    centred = (value - value.mean()) * (n / (n - 1)) if n > 1 else value
    return -(centred.detach() * pick(log_weights, drawn)).mean()


def mixture_logp(u: Tensor, mean: Tensor, log_std: Tensor, log_weights: Tensor) -> Tensor:
    """log sum_k w_k pi_k(tanh(u)|s).

    Args:
        u: (..., D), before squashing.
        mean, log_std: (..., K, D).
        log_weights: (..., K).
    """
    return gaussian_mixture_logp(u, mean, log_std, log_weights) - tanh_log_det(u).sum(-1)


def gaussian_mixture_logp(u: Tensor, mean: Tensor, log_std: Tensor, log_weights: Tensor) -> Tensor:
    """log sum_k w_k N(u; mu_k, sigma_k); shapes as in `mixture_logp`."""
    z = (u.unsqueeze(-2) - mean) * (-log_std).exp()
    log_normal = (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
    return torch.logsumexp(log_weights + log_normal, -1)


def draw(log_weights: Tensor, uniform: Tensor) -> Tensor:
    """An expert for each row by its weights, (B, K) -> (B,), from uniform numbers (B,) in [0, 1)."""
    if log_weights.shape[1] == 1:
        return torch.zeros_like(uniform, dtype=torch.int64)
    below = log_weights.exp().cumsum(1)[:, :-1]  # without the last, which rounding may leave under 1
    return (uniform.unsqueeze(1) >= below).sum(1)


def pick(values: Tensor, expert: Tensor) -> Tensor:
    """Each row's entry of its expert: (B, K, ...) and (B,) -> (B, ...)."""
    index = expert.unsqueeze(1)
    for size in values.shape[2:]:
        index = index.unsqueeze(-1).expand(*index.shape, size)
    return values.gather(1, index).squeeze(1)


class Experts(nn.Module):
    """(B, obs) -> means and clamped log standard deviations (B, K, D) before squashing, log weights (B, K)."""

    def __init__(self, obs_dim: int, action_dim: int, config: PMOEConfig) -> None:
        super().__init__()
        net, k = config.policy_kwargs, config.n_experts
        widths = net.widths("pi")
        width = widths[-1] if widths else obs_dim
        self.trunk = MLP([obs_dim, *widths], net.activation_fn, activate_last=True)
        self.head = Linear(width, k * 2 * action_dim)
        self.router = Linear(width, k) if k > 1 else None
        self.shape, self.bounds = (k, 2 * action_dim), config.log_std_bounds
        self.blend = config.router_grad == "blend"
        if config.expert_init_spread > 0 and k > 1:
            with torch.no_grad():
                self.head.bias.view(self.shape)[:, :action_dim] += config.expert_init_spread * directions(k, action_dim)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.trunk(obs)
        mean, log_std = self.head(features).float().unflatten(-1, self.shape).chunk(2, dim=-1)
        log_std = log_std.clamp(*self.bounds)
        if self.router is None:
            return mean, log_std, torch.zeros_like(mean[..., 0])
        log_weights = F.log_softmax(self.router(features.detach()).float(), dim=-1)
        if self.blend:
            mean, log_std = blended(mean, log_std, log_weights)
            return mean, log_std, torch.zeros_like(mean[..., 0])
        return mean, log_std, log_weights


def directions(k: int, dimensions: int) -> Tensor:
    """(K, D): evenly from -1 to 1 for one dimension, else random unit vectors."""
    if dimensions == 1:
        return torch.linspace(-1, 1, k).unsqueeze(1)
    return F.normalize(torch.randn(k, dimensions), dim=1)


def blended(mean: Tensor, log_std: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K, D), (B, K, D), (B, K) -> mean and log standard deviation (B, 1, D) of sum_k w_k u_k, u_k independent."""
    w = log_weights.exp().unsqueeze(-1)
    variance = (w * log_std.exp()).square().sum(-2, keepdim=True)
    return (w * mean).sum(-2, keepdim=True), 0.5 * variance.log()


class PMOE(ControlTrainer):
    """SAC with a mixture-of-experts policy; see the module's text."""

    Config = PMOEConfig
    name = "pmoe"
    presets = PRESETS
    several_processes = True
    default_task: ClassVar[Mapping[str, Any]] = {
        "env": "Pendulum-v1", "preset": "auto", "steps": 5_000, "log_every": 500, "eval_every": 1_000,
    }  # fmt: skip

    actor: Experts
    critic: Critic
    critic_target: Critic
    log_alpha: LearnedScalar
    actor_optimizer: Adam
    critic_optimizer: Adam
    temperature_optimizer: Adam

    def build(self) -> None:
        config: PMOEConfig = self.config
        track_networks(self, Experts)
        self.learned_temperature = isinstance(config.ent_coef, str)
        self.target_entropy = target_entropy(config, self.action_dim)
        self.experts = 1 if config.router_grad == "blend" else config.n_experts  # as far as acting and losses see
        self._update = self.compilable(self._step)
        self._explore = self.compilable(self._sample)

    def explore(self, obs: Tensor) -> dict[str, Tensor]:
        n = len(obs)
        return {"action": self._explore(obs, self._noise("explore", n), self._uniform("explore_expert", n))}

    def act(self, obs: Tensor, deterministic: bool) -> Tensor:
        if not deterministic:
            return self._sample(obs, self._noise("predict", len(obs)), self._uniform("predict", len(obs)))
        mean, _, log_weights = self.actor(self.normalizer(obs))
        sampled = self.config.eval_expert == "sampled" and self.experts > 1
        expert = draw(log_weights, self._uniform("predict", len(obs))) if sampled else log_weights.argmax(1)
        return torch.tanh(pick(mean, expert))

    def _sample(self, obs: Tensor, noise: Tensor, uniform: Tensor) -> Tensor:
        mean, log_std, log_weights = self.actor(self.normalizer(obs))
        expert = draw(log_weights, uniform)
        return torch.tanh(pick(mean, expert) + pick(log_std, expert).exp() * noise)

    def _noise(self, stream: str, *shape: int) -> Tensor:
        """Standard normal (*shape, D)."""
        return torch.randn(*shape, self.action_dim, generator=self.rng[stream], device=self.device)

    def _uniform(self, stream: str, n: int) -> Tensor:
        """(n,) in [0, 1), drawn only where there is an expert to choose."""
        if self.experts == 1:
            return torch.zeros(n, device=self.device)
        return torch.rand(n, generator=self.rng[stream], device=self.device)

    def update(self, batch: Batch) -> Mapping[str, Tensor]:
        config: PMOEConfig = self.config
        n = batch["reward"].shape[0]
        noise = {"actor": self._noise("noise", n, self.experts), "next": self._noise("noise", n)}
        noise |= {name: self._uniform("expert", n) for name in ("next_expert", "expert")}
        if config.router_grad == "gumbel":
            exponential = torch.empty(n, self.experts, device=self.device).exponential_(generator=self.rng["expert"])
            noise["gumbel"] = -exponential.log()
        self.schedule()
        return self._update(batch, {**noise, **target_subset(self)}, dropout_masks(self, self.critic, n), **due(self))

    def _step(
        self,
        batch: Batch,
        noise: dict[str, Tensor],
        masks: dict[str, list[Tensor]],
        update_actor: bool,
        update_target: bool,
    ) -> dict[str, Tensor]:
        """Critics, actor with router, temperature, targets, in that order: one gradient step each."""
        config: PMOEConfig = self.config
        average = self.processes.average if self.processes.size > 1 else None
        metrics: dict[str, Tensor] = {}
        alpha = self.log_alpha().detach().exp()
        with self.autocast():
            obs, next_obs = self.normalizer(batch["obs"]), self.normalizer(batch["next_obs"])

            with torch.no_grad():
                policy = mean, log_std, log_weights = self.actor(next_obs)
                expert = draw(log_weights, noise["next_expert"])
                mean, log_std = pick(mean, expert), pick(log_std, expert)
                next_action, next_logp = tanh_gaussian(mean, log_std, noise["next"])
                if config.entropy == "mixture" and self.experts > 1:
                    next_logp = mixture_logp(mean + log_std.exp() * noise["next"], *policy)
                next_q = self.critic_target(next_obs, next_action, masks["target"])
                next_q = next_q[noise["subset"]] if "subset" in noise else next_q
                y = td_target(batch["reward"], batch["discount"], batch["terminated"], next_q, next_logp, alpha)

            q = self.critic(obs, batch["action"], masks["critic"])
            loss = critic_loss(q, y)
        metrics["train/critic_grad_norm"] = descend(self.critic_optimizer, loss, average)
        metrics |= {"train/critic_loss": loss.detach(), "train/q_mean": q.detach().mean(), "train/ent_coef": alpha}

        if update_actor:
            with self.autocast():
                loss, logp, about = self._actor_loss(obs, noise, masks["actor"], alpha)
            metrics["train/actor_grad_norm"] = descend(self.actor_optimizer, loss, average)
            metrics |= {"train/entropy": -logp.detach().mean(), **about}
            if self.learned_temperature:
                loss = temperature_loss(self.log_alpha(), logp, self.target_entropy, config.ent_coef_loss)
                descend(self.temperature_optimizer, loss, average)
                metrics["train/ent_coef_loss"] = loss.detach()

        if update_target:
            polyak_(self.critic_target, self.critic, config.tau)
        return metrics

    def _actor_loss(
        self, obs: Tensor, noise: dict[str, Tensor], masks: Sequence[Tensor], alpha: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """-> (loss of experts and router, log-probability (B,) of the action that SAC's temperature sees, metrics)."""
        config: PMOEConfig = self.config
        mean, log_std, log_weights = self.actor(obs)
        actions, logps = tanh_gaussian(mean, log_std, noise["actor"])  # (B, K, D), (B, K)
        if self.experts == 1:
            logp = logps.squeeze(1)
            loss = actor_loss(logp, self._value(obs, actions.squeeze(1), masks), alpha)
            return loss, logp, {"train/actor_loss": loss.detach()}

        u = mean + log_std.exp() * noise["actor"]
        # The weights are constants here: this density trains the experts, the router has a loss of its own.
        mixture = mixture_logp(u, *(x.unsqueeze(1) for x in (mean, log_std, log_weights.detach())))  # (B, K)
        densities = mixture if config.entropy == "mixture" else logps

        if config.router_grad == "gumbel":
            y = straight_through((log_weights + noise["gumbel"]) / config.gumbel_temperature)
            chosen = y.argmax(1)
            action = (y.unsqueeze(-1) * actions).sum(1)
            if config.entropy == "mixture":
                logp = mixture_logp((y.unsqueeze(-1) * u).sum(1), mean, log_std, log_weights)
            else:
                logp = (y * logps).sum(1)
            loss = actor = actor_loss(logp, self._value(obs, action, masks), alpha)
        elif config.router_grad == "all":
            value = self._values(obs, actions)  # (B, K), with gradient
            chosen = value.argmax(1)
            logp = pick(densities, chosen)
            actor = (alpha * densities - value).sum(1).mean()
            loss = actor + frequency_loss(log_weights, chosen, config.freq_loss)
        else:
            if config.router_grad != "score":
                with torch.no_grad():
                    value = self._values(obs, actions)
            chosen = value.argmax(1) if config.router_grad == "frequency" else draw(log_weights, noise["expert"])
            logp = pick(densities, chosen)
            q = self._value(obs, pick(actions, chosen), masks)
            actor = actor_loss(logp, q, alpha)
            if config.router_grad == "frequency":
                loss = actor + frequency_loss(log_weights, chosen, config.freq_loss)
            elif config.router_grad == "exact":
                loss = actor + exact_loss(log_weights, value - alpha * densities)
            else:
                loss = actor + score_loss(log_weights, q - alpha * logp, chosen)
        return loss, logp, self._about(actor, loss, chosen, log_weights, pick(mixture, chosen))

    def _value(self, obs: Tensor, action: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        """Critics' value (B,) of (B, D) for the actor."""
        q = self.critic(obs, action, masks)
        return q.min(0).values if self.config.actor_critics == "min" else q.mean(0)

    def _values(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Critics' value (B, K) of (B, K, D), without dropout."""
        rows = obs.repeat_interleave(self.experts, 0)
        return self._value(rows, actions.flatten(0, 1)).view(-1, self.experts)

    def _about(
        self, actor: Tensor, loss: Tensor, chosen: Tensor, log_weights: Tensor, mixture: Tensor
    ) -> dict[str, Tensor]:
        """What to log of the experts: who trained, and how far the weights are from equal ones."""
        log_weights = log_weights.detach()
        share = F.one_hot(chosen, self.experts).float().mean(0)
        kl = (log_weights.exp() * (log_weights + math.log(self.experts))).sum(1).mean()
        return {
            "train/actor_loss": actor.detach(),
            "train/router_loss": (loss - actor).detach(),
            "train/mixture_entropy": -mixture.detach().mean(),
            "train/router_kl_to_uniform": kl,
            **{f"train/expert_{k}": share[k] for k in range(self.experts)},
        }

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), "train/learning_rate": self.learning_rate}


def straight_through(logits: Tensor) -> Tensor:
    """One-hot at the largest logit with the gradient of the softmax: (B, K) -> (B, K)."""
    soft = logits.softmax(-1)
    hard = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(soft.dtype)
    return hard + soft - soft.detach()
