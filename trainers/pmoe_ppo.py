"""PMOE-PPO: proximal policy optimisation with a mixture of experts as its policy; with one expert it is plain PPO.

Papers: Ren, Li, Ding, Pan, Dong, Probabilistic Mixture-of-Experts for Efficient Deep Reinforcement Learning,
arXiv:2104.09122; Schulman, Wolski, Dhariwal, Radford, Klimov, Proximal Policy Optimization Algorithms, arXiv:1707.06347
(equation numbers are this one's); Schulman et al., High-Dimensional Continuous Control Using Generalized Advantage
Estimation, arXiv:1506.02438.

The policy is pi(a|s) = sum_k w_k(s) N(a; mu_k(s), sigma_k), not squashed; its log-density is that of the mixture. An
auxiliary Q network is regressed on the returns, and values one fresh action of each expert; the weights are regressed
on which of them is the best (`rlkit.trainers.pmoe.frequency_loss`), and receive the gradient of PPO's ratio besides.

Deviations: defaults are Stable-Baselines3's, and so is the clipping of the value (to the old one +- clip, without the
maximum of both losses). Means and deviations are of actions in [-1, 1], which are scaled to the environment's bounds
and clipped there; in Stable-Baselines3 they are in the environment's units. A time limit bootstraps from the true final
observation, here and there. Observations are normalised by moments of the rollouts before the present one
(`normalize_obs`), so that old and new log-probabilities see the same inputs; rewards by `reward="normalize"`.
Deviations from the authors' other code (pmoe_ppo.py of Popular-RL-Algorithms): the router sees the features of the
actor's trunk, without gradient to them, and log-densities are summed by log-sum-exp.

Shapes: B minibatch, T steps of one episode, K experts, D action dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.signal import lfilter
from torch import Tensor, nn
from torch.nn import functional as F

from rlkit.buffer import Field, RolloutBuffer
from rlkit.config import Count, Fraction, NonNegative, Positive, Strict
from rlkit.control import ControlConfig, ControlTrainer
from rlkit.errors import UserError
from rlkit.nets import MLP, ActivationName, Linear, RunningNorm, ToFloat32, orthogonal_
from rlkit.optim import Adam, descend
from rlkit.trainer import Batch
from rlkit.trainers.pmoe import directions, draw, frequency_loss, gaussian_mixture_logp, pick


@dataclass(frozen=True, kw_only=True)
class PPONetConfig(Strict):
    """`policy_kwargs`: the networks."""

    net_arch: tuple[Count, ...] | dict[Literal["pi", "vf"], tuple[Count, ...]] = (64, 64)
    """Hidden widths: one list, or a mapping with `pi` (actor) and `vf` (value)."""
    q_arch: tuple[Count, ...] = (64, 64, 64)
    """Hidden widths of the Q network that judges experts; its activation is ReLU."""
    activation_fn: ActivationName = "tanh"
    """Activation of hidden layers."""
    ortho_init: bool = True
    """Orthogonal initial weights, zero biases."""
    log_std_init: float = 0.0
    """Initial log standard deviation."""

    def widths(self, net: Literal["pi", "vf"]) -> tuple[int, ...]:
        """Hidden widths of the actor (`pi`) or the value (`vf`)."""
        return self.net_arch.get(net, ()) if isinstance(self.net_arch, dict) else self.net_arch


@dataclass(frozen=True, kw_only=True)
class PMOEPPOConfig(ControlConfig):
    """PPO's fields, under Stable-Baselines3's names and with its defaults, and those of the experts."""

    learning_rate: Positive = 3e-4
    """Adam's step size."""
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    """`linear` falls to zero at the end of the first budget."""
    n_steps: Count = 2048
    """Steps of each environment between updates."""
    batch_size: Count = 64
    """Transitions of a minibatch; the last one of an epoch may have fewer."""
    n_epochs: Count = 10
    """Passes over the transitions of a rollout."""
    gae_lambda: Fraction = 0.95
    """Decay of later residuals in the advantages."""
    clip_range: Positive = 0.2
    """Bound epsilon of the ratio's distance from 1."""
    clip_range_vf: Positive | None = None
    """Bound of the value's distance from the old one; None for no bound."""
    normalize_advantage: bool = True
    """Standardise the advantages of each minibatch."""
    ent_coef: NonNegative = 0.0
    """Weight of the entropy bonus. Of several experts it is of H(w) + sum_k w_k H_k, which is the mixture's entropy
    where they do not overlap, and above it where they do."""
    vf_coef: NonNegative = 0.5
    """Weight of the value's loss."""
    max_grad_norm: Positive = 0.5
    """Norm to which gradients are cut."""
    target_kl: Positive | None = None
    """Estimated KL divergence, 1.5 times of which ends the updates of a rollout."""
    n_experts: Count = 4
    """Gaussians of the policy; one is plain PPO."""
    freq_loss: Literal["mse", "ce"] = "mse"
    """Regression of the weights on the best expert: squared error (the paper's), or cross-entropy."""
    freq_coef: NonNegative = 1.0
    """Weight of that loss."""
    q_coef: NonNegative = 1.0
    """Weight of the Q network's loss."""
    expert_init_spread: NonNegative = 0.0
    """How far apart the experts' means begin: +- this for one action dimension, else in random directions."""
    eval_expert: Literal["argmax", "sampled"] = "argmax"
    """The expert of deterministic actions: the one of the largest weight, or one drawn by the weights."""
    policy_kwargs: PPONetConfig = field(default_factory=PPONetConfig)
    """The networks."""


def gae(
    reward: NDArray[Any], value: NDArray[Any], next_value: NDArray[Any], terminated: NDArray[Any],
    gamma: float, lam: float,
) -> NDArray[np.float64]:  # fmt: skip
    """Advantages (T,) of successive steps of one episode (arXiv:1506.02438, Eq. 16).

    A_t = sum_l (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t).
    """
    delta = reward + gamma * (1.0 - terminated) * next_value - value
    backwards: NDArray[np.float64] = lfilter([1.0], [1.0, -gamma * lam], delta[::-1].astype(np.float64))
    return backwards[::-1]


def policy_loss(logp: Tensor, logp_old: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """-mean_B min(r A, clip(r, 1 - epsilon, 1 + epsilon) A), r = exp(logp - logp_old); all (B,). Eq. 7."""
    ratio = (logp - logp_old).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage).mean()


def value_loss(value: Tensor, value_old: Tensor, returns: Tensor, clip_range: float | None) -> Tensor:
    """mean_B (V - R)^2, V within +- `clip_range` of the old one if that is given; all (B,)."""
    if clip_range is not None:
        value = value_old + (value - value_old).clamp(-clip_range, clip_range)
    return F.mse_loss(value, returns)


def approximate_kl(logp: Tensor, logp_old: Tensor) -> Tensor:
    """mean_B (r - 1 - log r), an estimate of KL(old || new) from samples of old that is never negative."""
    log_ratio = logp - logp_old
    return (log_ratio.exp() - 1 - log_ratio).mean()


class GaussianExperts(nn.Module):
    """(B, obs) -> means (B, K, D), log standard deviations (K, D), log weights (B, K)."""

    def __init__(self, obs_dim: int, action_dim: int, config: PMOEPPOConfig) -> None:
        super().__init__()
        net, k = config.policy_kwargs, config.n_experts
        widths = net.widths("pi")
        width = widths[-1] if widths else obs_dim
        self.trunk = MLP([obs_dim, *widths], net.activation_fn, activate_last=True)
        self.head = Linear(width, k * action_dim)
        self.log_std = nn.Parameter(torch.full((k, action_dim), net.log_std_init))
        self.router = Linear(width, k) if k > 1 else None
        self.shape = (k, action_dim)
        if net.ortho_init:
            orthogonal_(self.trunk, math.sqrt(2))
            orthogonal_(self.head, 0.01)
        if config.expert_init_spread > 0 and k > 1:
            with torch.no_grad():
                self.head.bias.view(self.shape).add_(config.expert_init_spread * directions(k, action_dim))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.trunk(obs)
        mean = self.head(features).float().unflatten(-1, self.shape)
        if self.router is None:
            return mean, self.log_std, torch.zeros_like(mean[..., 0])
        return mean, self.log_std, F.log_softmax(self.router(features.detach()).float(), dim=-1)

    def sample(self, obs: Tensor, noise: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Action (B, D) and log-probability (B,), for normal noise (B, D), and uniform numbers (B,) to draw experts."""
        mean, log_std, log_weights = self(obs)
        expert = draw(log_weights, uniform)
        action = pick(mean, expert) + log_std.exp()[expert] * noise
        return action, gaussian_mixture_logp(action, mean, log_std, log_weights)

    def evaluate(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability (B,) of actions (B, D), and entropy (B,); of several experts as `ent_coef` has it."""
        mean, log_std, log_weights = self(obs)
        each = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
        entropy = (log_weights.exp() * (each - log_weights)).sum(-1)
        return gaussian_mixture_logp(action, mean, log_std, log_weights), entropy

    def mode(self, obs: Tensor, uniform: Tensor | None) -> Tensor:
        """Mean (B, D) of the expert of the largest weight, or of one drawn by `uniform`."""
        mean, _, log_weights = self(obs)
        return pick(mean, log_weights.argmax(1) if uniform is None else draw(log_weights, uniform))


class Categorical(nn.Module):
    """(B, obs) -> log-probabilities (B, n) of n actions."""

    def __init__(self, obs_dim: int, n_actions: int, config: PMOEPPOConfig) -> None:
        super().__init__()
        net = config.policy_kwargs
        widths = net.widths("pi")
        self.trunk = MLP([obs_dim, *widths], net.activation_fn, activate_last=True)
        self.head = Linear(widths[-1] if widths else obs_dim, n_actions)
        if net.ortho_init:
            orthogonal_(self.trunk, math.sqrt(2))
            orthogonal_(self.head, 0.01)

    def forward(self, obs: Tensor) -> Tensor:
        return F.log_softmax(self.head(self.trunk(obs)).float(), dim=-1)

    def sample(self, obs: Tensor, noise: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Action (B,) and log-probability (B,), for uniform numbers (B,)."""
        logp = self(obs)
        action = draw(logp, uniform)
        return action, pick(logp, action)

    def evaluate(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability (B,) of actions (B,), and entropy (B,)."""
        logp = self(obs)
        return pick(logp, action), -(logp.exp() * logp).sum(-1)

    def mode(self, obs: Tensor, uniform: Tensor | None) -> Tensor:
        """The likeliest action (B,)."""
        return self(obs).argmax(1)


class PMOEPPO(ControlTrainer):
    """PPO with a mixture-of-experts policy; see the module's text."""

    Config = PMOEPPOConfig
    name = "pmoe_ppo"
    action_spaces = ("Box", "Discrete")
    default_task: ClassVar[Mapping[str, Any]] = {
        "env": "Pendulum-v1", "n_experts": 2, "gamma": 0.9, "learning_rate": 1e-3, "n_envs": 4, "n_steps": 1024,
        "steps": 100_000,
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "Pendulum-v1": {"n_experts": 2, "n_envs": 4, "n_steps": 1024, "gamma": 0.9, "learning_rate": 1e-3},
        "CartPole-v1": {
            "n_experts": 1, "n_envs": 8, "n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98,
            "n_epochs": 20, "learning_rate": 1e-3, "learning_rate_schedule": "linear",
        },
    }  # fmt: skip

    actor: GaussianExperts | Categorical
    value: nn.Module
    q: nn.Module
    optimizer: Adam

    def build(self) -> None:
        config: PMOEPPOConfig = self.config
        net = config.policy_kwargs
        self.discrete = isinstance(self.action_space, gym.spaces.Discrete)
        if self.discrete and config.n_experts > 1:
            raise UserError(
                f"`n_experts`: a mixture of {config.n_experts} needs continuous actions, and these are "
                f"{self.action_space}; with `n_experts=1` it is plain PPO"
            )
        actor: type[nn.Module] = Categorical if self.discrete else GaussianExperts
        actions = int(self.action_space.n) if self.discrete else self.action_dim
        value = MLP([self.obs_dim, *net.widths("vf"), 1], net.activation_fn)
        if net.ortho_init:
            orthogonal_(value, math.sqrt(2))
            orthogonal_(value.layers[-1], 1.0)
        self.track(
            normalizer=RunningNorm(self.obs_dim) if config.normalize_obs else ToFloat32(),
            actor=actor(self.obs_dim, actions, config),
            value=value,
        )
        parameters = [*self.actor.parameters(), *self.value.parameters()]
        if config.n_experts > 1:
            self.track(q=MLP([self.obs_dim + self.action_dim, *net.q_arch, 1]))
            parameters += self.q.parameters()
        rows = config.n_steps * self.n_envs
        self.track(
            optimizer=Adam(parameters, config.learning_rate, eps=1e-5),
            buffer=RolloutBuffer(rows, self.transition_fields(), self.device, name="n_steps"),
        )
        self._update = self.compilable(self._step)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))  # of an epoch, which it is cached for

    def transition_fields(self) -> dict[str, Field]:
        fields = super().transition_fields()
        del fields["discount"]
        episode = Field(dtype=torch.int64)
        return {**fields, "episode": episode, "logp_old": Field(), "value": Field()}

    # Rollouts

    def collect(self) -> int:
        config: PMOEPPOConfig = self.config
        if len(self.buffer) and self.vector_steps % config.n_steps == 0:  # of the rollout that was learned from
            if config.normalize_obs:
                self.normalizer.update(self.buffer["obs"].double())
            self.buffer.clear()
        taken, _ = self._step_environments()
        if taken == 0:
            return 0
        self.vector_steps += 1
        if self.vector_steps % config.n_steps == 0:
            self._add_advantages()
            self.owed += config.n_epochs * self._minibatches()
        return taken

    def explore(self, obs: Tensor) -> dict[str, Tensor]:
        obs, noise = self.normalizer(obs), self._noise("explore", len(obs))
        uniform = self._uniform("explore_expert", len(obs))
        with self.autocast():
            action, logp = self.actor.sample(obs, noise, uniform)
            value = self.value(obs).squeeze(1).float()
        return {"action": action, "logp_old": logp, "value": value}

    @torch.no_grad()
    def _add_advantages(self) -> None:
        """Write the columns `advantage` and `returns`, episode by episode."""
        buffer, config = self.buffer, self.config
        with self.autocast():
            next_value = self.value(self.normalizer(buffer["next_obs"])).squeeze(1).float()
        columns = (buffer["reward"], buffer["value"], next_value, buffer["terminated"])
        reward, value, next_value, terminated = (column.double().cpu().numpy() for column in columns)
        advantage = np.zeros_like(reward)
        for rows in buffer.groups("episode"):
            i = rows.cpu().numpy()
            advantage[i] = gae(reward[i], value[i], next_value[i], terminated[i], config.gamma, config.gae_lambda)
        buffer["advantage"] = advantage.astype(np.float32)
        buffer["returns"] = (advantage + value).astype(np.float32)
        spread = float(np.var(advantage + value))
        if spread > 0:
            explained = torch.tensor(1 - float(np.var(advantage)) / spread)
            self.meter.accumulate({"train/explained_variance": explained})

    def _minibatches(self) -> int:
        return math.ceil(len(self.buffer) / self.config.batch_size)

    def batch(self) -> Batch:
        config, each = self.config, self._minibatches()
        number = config.n_epochs * each - math.ceil(self.owed)  # of this update among those of the rollout
        epoch = (self.vector_steps // config.n_steps - 1) * config.n_epochs + number // each
        if self._order[0] != epoch:
            self._order = epoch, self.buffer.order(config.seed, epoch)
        start = number % each * config.batch_size
        return self.buffer.rows(self._order[1][start : start + config.batch_size])

    def planned_updates(self) -> float:
        config, steps = self.config, self.target - self.clock
        each = math.ceil(config.n_steps * self.n_envs / config.batch_size)
        return steps / (config.n_steps * self.n_envs) * config.n_epochs * each

    # Updates

    def update(self, batch: Batch) -> Mapping[str, Tensor]:
        config: PMOEPPOConfig = self.config
        self.schedule()
        noise = {}
        if config.n_experts > 1:
            shape = (len(batch["reward"]), config.n_experts, self.action_dim)
            noise["experts"] = torch.randn(*shape, generator=self.rng["noise"], device=self.device)
        metrics = self._update(batch, noise)
        if config.target_kl is not None and float(metrics["train/approx_kl"]) > 1.5 * config.target_kl:
            self.owed = 1.0  # this one was the last, and no step was taken
        return metrics

    def _step(self, batch: Batch, noise: dict[str, Tensor]) -> dict[str, Tensor]:
        """One descent on L_clip + c_v L_V - c_e H, and of several experts + c_q L_Q + c_f L_freq. Eq. 9."""
        config: PMOEPPOConfig = self.config
        advantage, returns = batch["advantage"], batch["returns"]
        if config.normalize_advantage and len(advantage) > 1:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        with self.autocast():
            obs = self.normalizer(batch["obs"])
            logp, entropy = self.actor.evaluate(obs, batch["action"])
            value = self.value(obs).squeeze(1).float()
            losses = {
                "policy_gradient": policy_loss(logp, batch["logp_old"], advantage, config.clip_range),
                "value": value_loss(value, batch["value"], returns, config.clip_range_vf),
                "entropy": -entropy.mean(),
            }
            loss = losses["policy_gradient"] + config.vf_coef * losses["value"] + config.ent_coef * losses["entropy"]
            about: dict[str, Tensor] = {}
            if config.n_experts > 1:
                q = self._q(obs, batch["action"])
                losses["q"] = F.mse_loss(q, returns)
                losses["router"], about = self._router_loss(obs, noise["experts"])
                loss = loss + config.q_coef * losses["q"] + config.freq_coef * losses["router"]
        kl = approximate_kl(logp.detach(), batch["logp_old"])
        stop = None if config.target_kl is None else kl > 1.5 * config.target_kl
        norm = descend(self.optimizer, loss, max_norm=config.max_grad_norm, skip=stop)
        ratio = (logp.detach() - batch["logp_old"]).exp()
        return {
            "train/loss": loss.detach(),
            **{f"train/{name}_loss": part.detach() for name, part in losses.items()},
            "train/grad_norm": norm,
            "train/approx_kl": kl,
            "train/clip_fraction": ((ratio - 1).abs() > config.clip_range).float().mean(),
            **about,
        }

    def _router_loss(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """-> (frequency loss of which expert's fresh action Q values most, metrics of the experts)."""
        mean, log_std, log_weights = self.actor(obs)
        k = mean.shape[1]
        with torch.no_grad():
            actions = mean + log_std.exp() * noise
            best = self._q(obs.repeat_interleave(k, 0), actions.flatten(0, 1)).view(-1, k).argmax(1)
        share = F.one_hot(best, k).float().mean(0)
        kl = (log_weights.detach().exp() * (log_weights.detach() + math.log(k))).sum(1).mean()
        about = {"train/router_kl_to_uniform": kl, **{f"train/expert_{i}": share[i] for i in range(k)}}
        return frequency_loss(log_weights, best, self.config.freq_loss), about

    def _q(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B,) values of actions (B, D), which come as the environment gets them."""
        values: Tensor = self.q(torch.cat([obs, action.clamp(-1.0, 1.0)], dim=-1))
        return values.squeeze(1).float()

    def act(self, obs: Tensor, deterministic: bool) -> Tensor:
        obs = self.normalizer(obs)
        if deterministic:
            sampled = self.config.n_experts > 1 and self.config.eval_expert == "sampled"
            return self.actor.mode(obs, self._uniform("predict", len(obs)) if sampled else None)
        return self.actor.sample(obs, self._noise("predict", len(obs)), self._uniform("predict", len(obs)))[0]

    def _noise(self, stream: str, n: int) -> Tensor:
        """Standard normal (n, D)."""
        return torch.randn(n, self.action_dim, generator=self.rng[stream], device=self.device)

    def _uniform(self, stream: str, n: int) -> Tensor:
        """(n,) in [0, 1)."""
        return torch.rand(n, generator=self.rng[stream], device=self.device)

    def metrics(self) -> dict[str, float]:
        values = {**super().metrics(), "train/learning_rate": self.learning_rate}
        if isinstance(self.actor, GaussianExperts):
            values["train/std"] = float(self.actor.log_std.detach().exp().mean())
        return values
