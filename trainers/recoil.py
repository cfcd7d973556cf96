"""ReCOIL: imitation from a few expert transitions and many others, without rewards, discriminator or density ratio.

Paper: Sikchi, Zheng, Zhang, Niekum, Dual RL: Unification and New Methods for Reinforcement and Imitation Learning,
arXiv:2302.08560. `data` is any recording (its rewards are ignored), `expert_data` one of what to imitate. Instead of
the policy's and the expert's visitations, their mixtures with that of `data` are matched, beta d + (1 - beta) d^S
against beta d^E + (1 - beta) d^S; so the expert need not be covered by `data`. The dual has a Q of zero reward that is
high on expert pairs and low elsewhere (`rlkit.duality.recoil_dual_q` solves it for tables), V is its implicit maximum
over recorded actions, and the policy clones `data` by the weight exp(tau (Q - V)).

`form` is how Q is learned:

- `least_squares`: what the authors' code runs. Q of expert pairs is pinned to 2 / (1 - gamma), that of other pairs
  regressed on -2 + gamma V(s'), with -2 / (1 - gamma) after a terminal state.
- `chi2`: the dual with Pearson's chi-square, beta (E_s[V(s)] - E_dE[Q]) + c E_mix[(gamma V(s') - Q)^2].
  `policy_states` names the states s of its first term: the expert's (exact where both recordings start alike), those of
  `data`, or both; c = 1/4 is the derivation's, and 1 what reviews of the paper report.

The formulas are from the authors' released code, reviews of the paper, and the derivation that the tests repeat.
Deviations from that code: constants are derived from gamma (there those of 0.99); `terminal: absorbing` is an option,
because the worst value after every terminal state rewards mere survival.

Shapes: B batch of `data`, and as many rows of `expert_data`; D action dimension, N critics; values (B,) and (N, B).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import annotated_types as limits
import torch
from torch import Tensor

from rlkit.config import NonNegative, Positive
from rlkit.optim import descend, polyak_
from rlkit.trainer import Batch
from rlkit.trainers.dual_rl import CriticConfig, discounted_value, gumbel
from rlkit.trainers.imitation import ImitationConfig, ImitationTrainer

PolicyStates = Literal["expert", "suboptimal", "mixture"]


@dataclass(frozen=True, kw_only=True)
class ReCOILConfig(ImitationConfig, CriticConfig):
    """Defaults are the authors' code's."""

    form: Literal["least_squares", "chi2"] = "least_squares"
    """How Q is learned; see the module's text."""
    beta: Annotated[float, limits.Interval(gt=0, lt=1)] = 0.5
    """Share of the expert (or the policy) in the mixtures of `form: chi2`."""
    policy_states: PolicyStates = "expert"
    """States of the policy's term of `form: chi2`."""
    bellman_coef: NonNegative = 0.25
    """c of `form: chi2`."""
    implied_reward: Positive = 2.0
    """k of `form: least_squares`: the reward of other pairs is -k, Q of the expert k / (1 - gamma), and what follows a
    terminal state -k / (1 - gamma); in `form: chi2` that is 0."""
    value_temperature: Positive = 1.0
    """Of the Gumbel loss that makes V the maximum of Q. Raise it (2.5, 5, 10, 20) where Q diverges."""


def least_squares_loss(q_expert: Tensor, q: Tensor, target: Tensor, expert_value: float) -> Tensor:
    """sum_i [1/2 mean (Q_i - Q_E)^2 over expert pairs + 1/2 mean (Q_i - y)^2 over others]; (N, B), (N, B), (B,)."""
    pinned = (q_expert - expert_value).square().mean(1)
    return 0.5 * (pinned + (q - target).square().mean(1)).sum()


def chi2_loss(
    q_expert: Tensor,
    q: Tensor,
    value: Tensor,
    next_value_expert: Tensor,
    next_value: Tensor,
    beta: float,
    bellman_coef: float,
) -> Tensor:
    """sum_i beta (mean V - mean Q_i(expert)) + c [beta mean (y_E - Q_i)^2 + (1 - beta) mean (y - Q_i)^2].

    Args:
        q_expert, q: (N, B), of expert pairs and of others.
        value: (M,), V of the states of the policy's term; constant for Q.
        next_value_expert, next_value: (B,), y = gamma V(s') of each, constant.
    """
    gap = beta * (value.mean() - q_expert.mean(1))
    residual = beta * (next_value_expert - q_expert).square().mean(1)
    residual = residual + (1 - beta) * (next_value - q).square().mean(1)
    return (gap + bellman_coef * residual).sum()


class ReCOIL(ImitationTrainer):
    """Imitation by matching mixtures; see the module's text."""

    Config = ReCOILConfig
    name = "recoil"
    default_task: ClassVar[Mapping[str, Any]] = {
        "env": "rlkit/Corridor-v0", "data": "rlkit.envs.corridor:mixed_data",
        "expert_data": "rlkit.envs.corridor:expert_data", "preset": "small", "gamma": 0.95, "form": "chi2",
        "beta": 0.8, "value_temperature": 0.1, "policy_temperature": 10.0, "steps": 6_000, "log_every": 500,
        "eval_every": 2_000, "eval_episodes": 50,
    }  # fmt: skip

    def build(self) -> None:
        super().build()
        self.best = self.config.implied_reward / (1 - self.config.gamma)

    def _step(self, batch: Batch, masks: list[Tensor], noise: dict[str, Tensor]) -> dict[str, Tensor]:
        """V, policy, critics, targets, in that order: one gradient step each, each with what is new before it."""
        config: ReCOILConfig = self.config
        with self.autocast():
            columns = ("obs", "next_obs", "expert_obs", "expert_next_obs")
            obs, next_obs, expert_obs, expert_next = (self.normalizer(batch[name]) for name in columns)
            action = batch["action"]
            with torch.no_grad():
                target_q = self.critic_target(obs, action).min(0).values
            v = self.value(obs)
            loss = gumbel(target_q, v, config.value_temperature, config.max_clip).mean()
        metrics = {
            "train/value_loss": loss.detach(),
            "train/value_grad_norm": descend(self.value_optimizer, loss),
            "train/v_mean": v.detach().mean(),
        }
        metrics |= self.clone(obs, action, target_q, masks)
        with self.autocast():
            with torch.no_grad():
                ends = config.terminal == "ends"
                done, expert_done = (batch[k] if ends else None for k in ("terminated", "expert_terminated"))
                next_value = self.value(next_obs)
                if config.form == "chi2":
                    y = discounted_value(batch["discount"], done, next_value)
                    y_expert = discounted_value(batch["expert_discount"], expert_done, self.value(expert_next))
                    of = {"expert": [expert_obs], "suboptimal": [obs], "mixture": [expert_obs, obs]}
                    states = self.value(torch.cat(of[config.policy_states]))
                else:
                    y = discounted_value(batch["discount"], done, next_value, -self.best) - config.implied_reward
            q_expert, q = self.critic(torch.cat([expert_obs, obs]), torch.cat([batch["expert_action"], action])).chunk(
                2, 1
            )
            if config.form == "chi2":
                loss = chi2_loss(q_expert, q, states, y_expert, y, config.beta, config.bellman_coef)
            else:
                loss = least_squares_loss(q_expert, q, y, self.best)
        metrics["train/critic_grad_norm"] = descend(self.critic_optimizer, loss)
        polyak_(self.critic_target, self.critic, config.tau)
        return metrics | {
            "train/critic_loss": loss.detach(),
            "train/q_mean": q.detach().mean(),
            "train/q_expert": q_expert.detach().mean(),
        }
