"""SMODICE: imitation from mixed recordings by a discriminator's density ratio; the baseline of ReCOIL.

Paper: Ma, Shen, Jayaraman, Bastani, Versatile Offline Imitation from Observations and Examples via Regularized
State-Occupancy Matching, arXiv:2202.02433. Like ReCOIL it has a recording of anything (`data`) and one of what to
imitate (`expert_data`), and no rewards. Here a discriminator c tells the two apart, and its log odds are a reward,

    R = log c / (1 - c), at the optimum log d^E / d^S,

which is large only where `expert_data` lies; elsewhere it is as low as the discriminator is sure of itself. Of the
problem with that reward, regularised by a divergence from the recorded visitation, V minimises the dual

    L_V = (1 - gamma) E_d0[V(s)] + alpha E_data[f_p*((R + gamma V(s') - V(s)) / alpha)],

over recorded transitions and the first states d0 of their episodes, and the policy clones `data` by the weights
w = max(0, (f')^-1(...)) of the residuals, which make `data` the visitation of the best policy. `divergence` is

- `chi2`: f(t) = (t - 1)^2 / 2, so f_p*(y) = y + y^2/2 for y >= -1, else -1/2, and w = max(0, 1 + y). The default:
  with the other one, few of a batch's transitions carry nearly all of its gradient.
- `kl`: the Kullback-Leibler divergence, alpha log E exp(y), and w proportional to exp(y).

The gradient of L_V is the whole one, through V(s') as through V(s). 1 / alpha is `policy_temperature`.

Equations are numbered as in the comments of the authors' released code. Deviations from that code: the discriminator
learns along with V and the policy instead of before them, is an ensemble whose mean log odds count, and by default
tells pairs of state and action apart (`of: state`, the paper's setting of imitation from observations, is an option);
f_p* is the conjugate over t >= 0 (there y + y^2/2 for all y, though w is cut); the weights of `kl` are normalised over
the batch; V has no weight decay, the policy no bonus for its entropy, and no absorbing state is added to the data
(`terminal`). Networks and the policy's loss are those of ReCOIL, so that a comparison is one of methods.

Shapes: B batch of `data`, and as many rows of `expert_data` and of first states; N discriminators; values (B,), log
odds (N, B).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlkit.config import NonNegative
from rlkit.nets import EnsembleMLP
from rlkit.optim import Adam, descend
from rlkit.trainer import Batch
from rlkit.trainers.dual_rl import (
    DualRLNetConfig,
    GaussianPolicy,
    StateValue,
    discounted_value,
    normal_logp,
    policy_loss,
)
from rlkit.trainers.imitation import ImitationConfig, ImitationTrainer

Divergence = Literal["chi2", "kl"]


@dataclass(frozen=True, kw_only=True)
class SMODICEConfig(ImitationConfig):
    """Defaults are ReCOIL's, and the authors' code's of what that lacks, but for what the module's text says."""

    of: Literal["state_action", "state"] = "state_action"
    """What the discriminator sees."""
    divergence: Divergence = "chi2"
    """From the recorded visitation; see the module's text."""
    gradient_penalty: NonNegative = 10.0
    """Weight of the penalty (|slope of the log odds| - 1)^2 between the two recordings, which keeps a discriminator of
    few expert transitions from learning them by heart; 0 is the plain density ratio."""
    policy_temperature: NonNegative = 1.0
    """1 / alpha: how far the weights may leave those of the data; 0 is behaviour cloning (V is then that of 1)."""


def discriminator_loss(expert: Tensor, other: Tensor) -> Tensor:
    """sum_i [mean -log c_i(expert pairs) + mean -log(1 - c_i(other pairs))] of log odds (N, B) each.

    The minimum over all functions is the log of the ratio of the two densities.
    """
    return (F.softplus(-expert).mean(1) + F.softplus(other).mean(1)).sum()


def slope_penalty(slope: Tensor) -> Tensor:
    """sum_i mean (|slope_i| - 1)^2 of gradients (N, B, inputs); WGAN-GP's, arXiv:1704.00028."""
    # The square root has no derivative at zero, where a network of dead units can be.
    return ((slope.square().sum(2) + 1e-12).sqrt() - 1).square().mean(1).sum()


def value_loss(initial: Tensor, residual: Tensor, gamma: float, divergence: Divergence, alpha: float = 1.0) -> Tensor:
    """(1 - gamma) mean V(s_0) + alpha mean f_p*(y), or alpha log mean exp(y) of `kl`; Eq. 20.

    Args:
        initial: (M,), V of first states.
        residual: (B,), R + gamma V(s') - V(s), which is alpha y.
    """
    y = residual / alpha
    if divergence == "kl":
        conjugate = torch.logsumexp(y, 0) - math.log(len(y))
    else:
        conjugate = torch.where(y >= -1, y + y.square() / 2, -0.5).mean()
    return (1 - gamma) * initial.mean() + alpha * conjugate


def visitation_weight(residual: Tensor, divergence: Divergence, alpha: float = 1.0) -> Tensor:
    """d*(s, a) / d^S(s, a) of residuals (B,): max(0, 1 + y), or exp(y) / mean_B exp(y) of `kl`; Eq. 21."""
    y = residual / alpha
    return torch.softmax(y, 0) * len(y) if divergence == "kl" else (1 + y).clamp(min=0)


class Discriminator(nn.Module):
    """(B, inputs), pairs of state and action or states -> (N, B) log odds that they are the expert's.

    (N, B, inputs) gives each of the N its own.
    """

    def __init__(self, inputs: int, net: DualRLNetConfig) -> None:
        super().__init__()
        self.net = EnsembleMLP(net.n_critics, [inputs, *net.widths("qf"), 1], net.activation_fn)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1).float()


class SMODICE(ImitationTrainer):
    """Imitation by a discriminator's reward and the dual of its problem; see the module's text."""

    Config = SMODICEConfig
    name = "smodice"
    default_task: ClassVar[Mapping[str, Any]] = {
        "env": "rlkit/Corridor-v0", "data": "rlkit.envs.corridor:mixed_data",
        "expert_data": "rlkit.envs.corridor:expert_data", "preset": "small", "gamma": 0.95,
        "gradient_penalty": 0.0, "steps": 6_000, "log_every": 500, "eval_every": 2_000, "eval_episodes": 50,
    }  # fmt: skip

    discriminator: Discriminator
    discriminator_optimizer: Adam

    def build(self) -> None:
        temperature = self.config.policy_temperature
        self.alpha = 1.0 if temperature == 0 else 1 / temperature
        super().build()

    def networks(self) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
        net = self.config.policy_kwargs
        inputs = self.obs_dim + (self.action_dim if self.config.of == "state_action" else 0)
        trained: dict[str, nn.Module] = {
            "actor": GaussianPolicy(self.obs_dim, self.action_dim, net), "value": StateValue(self.obs_dim, net),
            "discriminator": Discriminator(inputs, net),
        }  # fmt: skip
        return trained, {}

    def _load_data(self) -> None:
        super()._load_data()
        recorded = self.recorded["data"]
        ends = (recorded["terminated"] | recorded["truncated"])[:-1]
        self._first = torch.cat([ends.new_ones(1), ends]).nonzero().squeeze(1)

    def batch(self) -> Batch:
        """`batch_size` rows of `data` (and own ones), as many of the expert's, and as many first states of episodes."""
        size = self.config.batch_size
        chosen = torch.randint(len(self._first), (size,), generator=self.rng["initial"], device=self.device)
        return super().batch() | {"initial_obs": self.recorded["data"]["obs"][self._first[chosen]]}

    def noise(self, n: int) -> dict[str, Tensor]:
        """Where between an expert pair and another one the slope of the log odds is taken."""
        return {"mix": torch.rand(n, 1, generator=self.rng["mix"], device=self.device)}

    def _step(self, batch: Batch, masks: list[Tensor], noise: dict[str, Tensor]) -> dict[str, Tensor]:
        """Discriminator, V, policy, in that order: one gradient step each, each with what is new before it."""
        config: SMODICEConfig = self.config
        with self.autocast():
            columns = ("obs", "next_obs", "expert_obs", "initial_obs")
            obs, next_obs, expert_obs, initial = (self.normalizer(batch[name]) for name in columns)
            action = batch["action"]
            with_action = config.of == "state_action"
            others = torch.cat([obs, action], 1) if with_action else obs
            experts = torch.cat([expert_obs, batch["expert_action"]], 1) if with_action else expert_obs
            log_odds, expert_log_odds = self.discriminator(torch.cat([others, experts])).chunk(2, 1)
            loss = discriminator_loss(expert_log_odds, log_odds)
            accuracy = 0.5 * ((expert_log_odds > 0).float().mean() + (log_odds < 0).float().mean())
            if config.gradient_penalty > 0:
                # A copy a discriminator, so that each has its own gradient.
                mixed = (noise["mix"] * experts + (1 - noise["mix"]) * others).detach()
                mixed = mixed.expand(config.policy_kwargs.n_critics, *mixed.shape).clone().requires_grad_()
                (slope,) = torch.autograd.grad(self.discriminator(mixed).sum(), mixed, create_graph=True)
                loss = loss + config.gradient_penalty * slope_penalty(slope)
        metrics = {
            "train/discriminator_loss": loss.detach(),
            "train/discriminator_grad_norm": descend(self.discriminator_optimizer, loss),
            "train/discriminator_accuracy": accuracy,
        }
        with self.autocast():
            with torch.no_grad():
                reward = self.discriminator(others).mean(0)
            terminated = batch["terminated"] if config.terminal == "ends" else None
            v, next_v, first_v = self.value(torch.cat([obs, next_obs, initial])).chunk(3)
            residual = reward + discounted_value(batch["discount"], terminated, next_v) - v
            loss = value_loss(first_v, residual, config.gamma, config.divergence, self.alpha)
        metrics |= {
            "train/reward_mean": reward.mean(),
            "train/value_loss": loss.detach(),
            "train/value_grad_norm": descend(self.value_optimizer, loss),
            "train/v_mean": v.detach().mean(),
        }
        with self.autocast():
            with torch.no_grad():
                v, next_v = self.value(torch.cat([obs, next_obs])).chunk(2)
                residual = reward + discounted_value(batch["discount"], terminated, next_v) - v
                weight = visitation_weight(residual, config.divergence, self.alpha).clamp(max=config.weight_clip)
                if config.policy_temperature == 0:
                    weight = torch.ones_like(weight)
            logp = normal_logp(action, *self.actor(obs, masks))
            loss = policy_loss(logp, weight)
        return metrics | {
            "train/actor_loss": loss.detach(),
            "train/actor_grad_norm": descend(self.actor_optimizer, loss),
            "train/entropy": -logp.detach().mean(),
            "train/weight_mean": weight.mean(),
            "train/weight_zero": (weight == 0).float().mean(),
        }
