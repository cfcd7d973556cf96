"""CQN: coarse-to-fine Q-network, which values each dimension of an action for itself; the baseline of ARSQ.

Paper: Seo, Uruç, James, Continuous Control with Coarse-to-fine Reinforcement Learning, arXiv:2407.07787.

As in ARSQ, each dimension's range is divided into bins over some levels. Within a level all dimensions are chosen at
once: each has a distribution of returns for each bin, given the state and the centres after the levels before, and
learns towards the same target by itself. So what one dimension is worth is an average over what the others did.

Deviations from the paper: vectors instead of images, and ARSQ's networks, so that a comparison is one of methods; the
support of the returns is taken from the recorded ones where it is not given (`support`); one optimiser, without weight
decay; ties between bins are not broken at random. A terminal state ends a return, a time limit does not (in the version
that ARSQ's authors compare with on D4RL, nothing does).

Shapes: B batch, N critics, D action dimension, L levels, Z atoms of a distribution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import annotated_types as limits
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlkit.buffer import RolloutBuffer
from rlkit.config import NonNegative
from rlkit.errors import UserError
from rlkit.offline import OfflineTrainer
from rlkit.optim import Adam, descend, polyak_
from rlkit.trainer import Batch
from rlkit.trainers.arsq import (
    ARSQNetConfig,
    BinsConfig,
    ChoiceNet,
    bc_loss,
    conditioning,
    decode,
    encode,
    td_target,
    track_critics,
)


@dataclass(frozen=True, kw_only=True)
class CQNConfig(BinsConfig):
    """The paper's settings, where ARSQ has no such field."""

    atoms: Annotated[int, limits.Ge(2)] = 51
    """Values of a return's distribution."""
    support: tuple[float, float] | Literal["auto"] = "auto"
    """The least and the largest of them; `auto` takes the discounted returns of the recording, of width w, from w / 4
    below to w above them."""
    exploration_std: NonNegative = 0.1
    """Standard deviation of the noise on actions in [-1, 1]."""
    bc_coef: NonNegative = 1.0
    """Weight of behaviour cloning: that a demonstrated bin's distribution dominates the others'."""
    bc_margin: NonNegative = 0.01
    """Lead of its mean that is asked for, besides, in units of reward."""
    policy_kwargs: ARSQNetConfig = field(default_factory=lambda: ARSQNetConfig(n_critics=1))
    """The networks."""


def project(probability: Tensor, values: Tensor, support: Tensor) -> Tensor:
    """A distribution on `values` as one on the evenly spaced `support`, of the same mean inside it.

    Each value's probability is divided between its two neighbours by their distance (Bellemare et al. 2017,
    arXiv:1707.06887, Eq. 7); values outside count as the ends.

    Args:
        probability: (N, B, ..., Z).
        values: (B, Z), the same for all that a row has.
        support: (Z,), ascending.
    """
    step = support[1] - support[0]
    place = (values.clamp(support[0], support[-1]) - support[0]) / step
    # (B, Z, Z): how much of value i belongs to support j
    share = (1 - (place.unsqueeze(-1) - torch.arange(len(support), device=support.device)).abs()).clamp(min=0)
    return torch.einsum("nb...z,bzj->nb...j", probability, share)


def distribution_loss(log_probability: Tensor, target: Tensor) -> Tensor:
    """sum_i mean over rows, levels and dimensions of the cross-entropy of (N, B, L, D, Z) with a target alike."""
    return -(target * log_probability).sum(-1).flatten(1).mean(1).sum()


def dominance_penalty(probability: Tensor, demonstrated: Tensor) -> Tensor:
    """sum_z max(0, F_e(z) - F_b(z)), F the distribution functions, averaged over bins, levels and dimensions: (N, B).

    Zero where the demonstrated bin e stochastically dominates each other b.

    Args:
        probability: (N, B, L, D, bins, Z).
        demonstrated: (B, L, D).
    """
    cdf = probability.cumsum(-1)
    return (of_bin(cdf, demonstrated).unsqueeze(-2) - cdf).clamp(min=0).sum(-1).flatten(2).mean(2)


def mean_margin_penalty(q: Tensor, demonstrated: Tensor, margin: float) -> Tensor:
    """max(0, margin - (Q_e - Q_b)), averaged over bins, levels and dimensions: (N, B); q (N, B, L, D, bins)."""
    lead = of_bin(q.unsqueeze(-1), demonstrated) - q
    return (margin - lead).clamp(min=0).flatten(2).mean(2)


def of_bin(values: Tensor, index: Tensor) -> Tensor:
    """The entries of one bin each: (N, B, L, D, bins, Z), (B, L, D) -> (N, B, L, D, Z)."""
    place = index[None, ..., None, None].expand(*values.shape[:4], 1, values.shape[-1])
    return values.gather(-2, place).squeeze(-2)


class CoarseToFineCritic(nn.Module):
    """N networks for the distributions of returns of each level, dimension and bin."""

    value_net: ChoiceNet
    advantage_net: ChoiceNet
    support: Tensor

    def __init__(self, obs_dim: int, action_dim: int, config: CQNConfig) -> None:
        super().__init__()
        net, self.levels, self.bins = config.policy_kwargs, config.levels, config.bins
        self.shape = (action_dim, config.bins, config.atoms)

        def part(outputs: int, widths: tuple[int, ...]) -> ChoiceNet:
            shape = (net.n_critics, obs_dim, action_dim, config.levels, outputs)
            return ChoiceNet(*shape, widths, net.activation_fn, net.ortho_init)

        self.value_net = part(action_dim * config.atoms, net.widths("v"))
        self.advantage_net = part(action_dim * config.bins * config.atoms, net.widths("a"))
        self.register_buffer("support", torch.zeros(config.atoms))

    def log_probability(self, obs: Tensor, centres: Tensor, start: int = 0) -> Tensor:
        """Of each atom: (B, obs), centres (B, S, D) of S levels from `start` on -> (N, B, S, D, bins, Z)."""
        d, bins, atoms = self.shape
        value = self.value_net(self.value_net.embed(obs), centres, start).unflatten(-1, (d, 1, atoms))
        advantage = self.advantage_net(self.advantage_net.embed(obs), centres, start).unflatten(-1, (d, bins, atoms))
        return F.log_softmax(value + advantage - advantage.mean(-2, keepdim=True), dim=-1)

    def of_action(self, obs: Tensor, indices: Tensor) -> Tensor:
        """The same for all levels, given an action's bins (B, L, D)."""
        return self.log_probability(obs, conditioning(indices, self.bins, "level")[:, :: self.shape[0]])

    def mean(self, probability: Tensor) -> Tensor:
        """Q of (..., Z)."""
        return (probability * self.support).sum(-1)

    def choose(self, obs: Tensor) -> Tensor:
        """Bins (B, L, D): in each level each dimension's best by the least of the critics' means."""
        indices = torch.zeros(obs.shape[0], self.levels, self.shape[0], dtype=torch.int64, device=obs.device)
        taken: list[Tensor] = []
        for level in range(self.levels):
            centres = conditioning(indices, self.bins, "level")[:, level * self.shape[0], None]
            q = self.mean(self.log_probability(obs, centres, level).exp())[:, :, 0]
            taken.append(q.min(0).values.argmax(-1))
            indices = torch.stack([*taken, *indices.unbind(1)[level + 1 :]], 1)
        return indices


class CQN(OfflineTrainer):
    """Coarse-to-fine Q-network; see the module's text."""

    Config = CQNConfig
    name = "cqn"
    chooses = True
    policy_parts = ("normalizer", "critic_target")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {"batch_size": 128, "policy_kwargs": {"net_arch": [128, 128]}}
    }
    default_task: ClassVar[Mapping[str, Any]] = {
        "env": "rlkit/TwinThrust-v0", "data": "rlkit.envs.coordination:twin_thrust_data", "preset": "small",
        "gamma": 0.95, "bc_coef": 0.1, "levels": 2, "bins": 5, "steps": 4_000, "log_every": 500,
        "eval_every": 1_000, "eval_episodes": 20,
    }  # fmt: skip

    critic: CoarseToFineCritic
    critic_target: CoarseToFineCritic
    critic_optimizer: Adam

    def build(self) -> None:
        track_critics(self, CoarseToFineCritic)
        for part in (self.critic, self.critic_target):
            part.support.copy_(self._support())
        self._update = self.compilable(self._step)

    def _support(self) -> Tensor:
        """(Z,) evenly spaced returns; of a loaded trainer they come with the weights."""
        config: CQNConfig = self.config
        if config.support != "auto":
            low, high = config.support
            if low >= high:
                raise UserError(f"`support`: got {low}, {high}; the first must be below the second")
        elif self.data is not None:
            returns = discounted_returns(self.data)
            least, most = float(returns.min()), float(returns.max())
            width = max(most - least, 1e-3)
            low, high = least - width / 4, most + width
        elif config.data is None:
            raise UserError("`support`: without `data` to take it from, give the least and the largest return")
        else:
            low, high = 0.0, 1.0
        return torch.linspace(low, high, config.atoms)

    def explore(self, obs: Tensor) -> dict[str, Tensor]:
        return {"action": self._noisy(obs, "explore")}

    def act(self, obs: Tensor, deterministic: bool) -> Tensor:
        return self._best(obs) if deterministic else self._noisy(obs, "predict")

    def _best(self, obs: Tensor) -> Tensor:
        return decode(self.critic_target.choose(self.normalizer(obs)), self.config.levels, self.config.bins)

    def _noisy(self, obs: Tensor, stream: str) -> Tensor:
        """The best action with noise, at the centre of its bins."""
        action = self._best(obs)
        noise = torch.randn(action.shape, generator=self.rng[stream], device=self.device)
        moved = (action + self.config.exploration_std * noise).clamp(-1.0, 1.0)
        return decode(encode(moved, self.config.levels, self.config.bins), self.config.levels, self.config.bins)

    def batch(self) -> Batch:
        return self.with_demonstrations(self.config.demo_fraction)

    def update(self, batch: Batch) -> Mapping[str, Tensor]:
        self.schedule()
        return self._update(batch)

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step on the distributions and behaviour cloning; then the targets."""
        config: CQNConfig = self.config
        with self.autocast():
            obs, next_obs = self.normalizer(batch["obs"]), self.normalizer(batch["next_obs"])
            with torch.no_grad():
                following = self.critic.choose(next_obs)
                next_p = of_bin(self.critic_target.of_action(next_obs, following).exp(), following)
                support = self.critic.support
                reward, discount, terminated = (batch[k].unsqueeze(1) for k in ("reward", "discount", "terminated"))
                y = td_target(reward, discount, terminated, support.expand(1, 1, -1))  # (B, Z)
                target = project(next_p, y, support)
            indices = encode(batch["action"], config.levels, config.bins)
            logp = self.critic.of_action(obs, indices)
        td = distribution_loss(of_bin(logp, indices), target)
        q = self.critic.mean(logp.exp())
        penalty = dominance_penalty(logp.exp(), indices) + mean_margin_penalty(q, indices, config.bc_margin)
        bc = bc_loss(penalty, batch["demo"])
        loss = config.td_coef * td + config.bc_coef * bc
        norm = descend(self.critic_optimizer, loss)
        polyak_(self.critic_target, self.critic, config.tau)
        return {
            "train/loss": loss.detach(),
            "train/critic_loss": td.detach(),
            "train/bc_loss": bc.detach(),
            "train/grad_norm": norm,
            "train/q_mean": of_bin(q.detach().unsqueeze(-1), indices).mean(),
        }

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), "train/learning_rate": self.learning_rate}


def discounted_returns(data: RolloutBuffer) -> Tensor:
    """(n,) discounted rewards of recorded rows, in their order, to the end of their episodes."""
    ends = (data["terminated"] | data["truncated"]).tolist()
    returns, following = [], 0.0
    columns = (data[name].tolist() for name in ("reward", "discount"))
    for reward, discount, end in reversed(list(zip(*columns, ends, strict=True))):
        following = reward + (0.0 if end else discount * following)
        returns.append(following)
    return torch.tensor(returns[::-1])
