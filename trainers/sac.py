"""SAC: off-policy maximum-entropy actor-critic for continuous actions, with automatic temperature.

Paper: Haarnoja et al., Soft Actor-Critic Algorithms and Applications, arXiv:1812.05905. Equation numbers are its own.

Deviations from the paper: the defaults are Stable-Baselines3's (learning starts after 100 steps instead of 10,000; log
standard deviations are clamped to [-20, 2]), and so is the loss of the temperature, log(alpha) times the entropy gap,
because its gradient does not vanish with alpha; `ent_coef_loss="alpha"` is the paper's Eq. 18.
Deviations from the authors' code (softlearning): its later versions put the mean of the critics into the actor's loss;
here it is the minimum, as in the paper and in the target (`actor_critics="mean"` is the other reading, and REDQ's).

Options that turn SAC into its descendants by configuration alone: `policy_kwargs.n_critics`, `target_critics`,
`actor_critics`, `policy_delay` (REDQ, arXiv:2101.05982), `policy_kwargs.layer_norm`, `policy_kwargs.dropout` (DroQ,
arXiv:2110.02034), `n_steps`, `normalize_obs`; the presets `redq` and `droq` set them.

Shapes: B batch, D action dimension, N critics. Log-probabilities, values and rewards are (B,) and (N, B), never (B, 1),
so no broadcast can silently make a (B, B) target. Actions live in [-1, 1]^D; the map to the environment's bounds is
outside the log-probability.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import StringConstraints
from torch import Tensor, nn
from torch.nn import functional as F

from rlkit.buffer import RolloutBuffer
from rlkit.config import Count, Fraction, NonNegative
from rlkit.control import ControlTrainer, NetConfig, OffPolicyConfig
from rlkit.errors import UserError
from rlkit.nets import MLP, EnsembleMLP, LearnedScalar, Linear, RunningNorm, ToFloat32
from rlkit.optim import Adam, descend, polyak_
from rlkit.trainer import Batch


@dataclass(frozen=True, kw_only=True)
class SACConfig(OffPolicyConfig):
    """Defaults are Stable-Baselines3's."""

    tau: Fraction = 0.005
    """Averaging rate of the target critics."""
    target_update_interval: Count = 1
    """Updates between steps of the target critics."""
    ent_coef: NonNegative | Annotated[str, StringConstraints(pattern=r"^auto(_\d+(\.\d*)?)?$")] = "auto"
    """Temperature alpha: `auto` learns it from 1.0, `auto_0.1` from 0.1; a number fixes it."""
    target_entropy: float | Literal["auto"] = "auto"
    """Entropy (nats, of actions in [-1, 1]^D) that the learned temperature holds; `auto` is -D."""
    ent_coef_loss: Literal["log_alpha", "alpha"] = "log_alpha"
    """What the entropy gap multiplies in the temperature's loss; `alpha` is the paper's Eq. 18."""
    log_std_bounds: tuple[float, float] = (-20.0, 2.0)
    """Clamp of the policy's log standard deviation, before squashing."""
    target_critics: Count | None = None
    """Random critics whose minimum is the target (REDQ uses 2 of 10); None takes all."""
    actor_critics: Literal["min", "mean"] = "min"
    """How the critics combine in the actor's loss."""
    policy_delay: Count = 1
    """Critic updates for each update of actor and temperature."""
    policy_kwargs: NetConfig = field(default_factory=NetConfig)
    """The networks."""


def tanh_gaussian(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Reparameterised sample a = tanh(u), u = mean + std noise, and its log-probability (Appendix C, Eq. 26).

    Args:
        mean, log_std, noise: (..., D); noise is standard normal.

    Returns:
        action (..., D) in (-1, 1), log-probability (...).
    """
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_det = tanh_log_det(u)
    return torch.tanh(u), (log_normal - log_det).sum(-1)


def tanh_log_det(u: Tensor) -> Tensor:
    """log(1 - tanh(u)^2) as 2 (log 2 - u - softplus(-2u)), exact where 1 - tanh(u)^2 rounds to zero; same shape."""
    return 2 * (math.log(2) - u - F.softplus(-2 * u))


def td_target(
    reward: Tensor, discount: Tensor, terminated: Tensor, next_q: Tensor, next_logp: Tensor, alpha: Tensor
) -> Tensor:
    """y = r + gamma (1 - terminated) (min_i Qbar_i(s', a') - alpha log pi(a'|s')): (B,). Eqs. 3 and 5.

    Args:
        reward, discount, terminated, next_logp: (B,); only a terminal state stops the bootstrap, a time limit does not.
        next_q: (N, B), target critics at a' ~ pi(.|s').
    """
    soft_value = next_q.min(0).values - alpha * next_logp
    return reward + discount * (1.0 - terminated.to(reward.dtype)) * soft_value


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """sum_i 1/2 mean_B (Q_i(s, a) - y)^2 for q (N, B), target (B,). Eq. 5."""
    return 0.5 * (q - target).square().mean(1).sum()


def actor_loss(logp: Tensor, q: Tensor, alpha: Tensor) -> Tensor:
    """mean_B (alpha log pi(a|s) - Q(s, a)) for a reparameterised action; logp, q (B,), alpha constant. Eqs. 7 and 9."""
    return (alpha * logp - q).mean()


def temperature_loss(log_alpha: Tensor, logp: Tensor, target_entropy: float, form: str = "log_alpha") -> Tensor:
    """-mean_B c (log pi(a|s) + target entropy), logp (B,) constant; c = log alpha, or alpha as in Eq. 18."""
    c = log_alpha if form == "log_alpha" else log_alpha.exp()
    return -(c * (logp + target_entropy).detach()).mean()


class Actor(nn.Module):
    """(B, obs) -> mean and clamped log standard deviation of the Gaussian before squashing, (B, D) each."""

    def __init__(self, obs_dim: int, action_dim: int, config: SACConfig) -> None:
        super().__init__()
        net = config.policy_kwargs
        widths = net.widths("pi")
        self.trunk = MLP([obs_dim, *widths], net.activation_fn, activate_last=True)
        self.head = Linear(widths[-1] if widths else obs_dim, 2 * action_dim)
        self.bounds = config.log_std_bounds

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.head(self.trunk(obs)).float().chunk(2, dim=-1)
        return mean, log_std.clamp(*self.bounds)

    def sample(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Action (B, D) and log-probability (B,) for standard normal noise (B, D)."""
        mean, log_std = self(obs)
        return tanh_gaussian(mean, log_std, noise)


class Critic(nn.Module):
    """N action values as one batched network: (B, obs), (B, D) and masks of dropout -> (N, B)."""

    def __init__(self, obs_dim: int, action_dim: int, config: SACConfig) -> None:
        super().__init__()
        net = config.policy_kwargs
        sizes = [obs_dim + action_dim, *net.widths("qf"), 1]
        self.net = EnsembleMLP(net.n_critics, sizes, net.activation_fn, net.layer_norm, net.dropout)

    def forward(self, obs: Tensor, action: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        return self.net(torch.cat([obs, action], dim=-1), masks).squeeze(-1).float()


def target_entropy(config: SACConfig, action_dim: int) -> float:
    """In nats: the configuration's, or -D."""
    return -float(action_dim) if config.target_entropy == "auto" else config.target_entropy


def track_networks(trainer: ControlTrainer, actor: type[nn.Module]) -> None:
    """Make and track what SAC has in common with trainers that change its policy: the networks, of which an
    `actor(obs_dim, action_dim, config)` is the policy's, the temperature, all optimisers, and the buffer.

    Raises:
        UserError: fields that do not fit each other.
    """
    config: SACConfig = trainer.config
    _check(config, trainer.action_dim)
    learned = isinstance(config.ent_coef, str)
    initial = float(str(config.ent_coef).removeprefix("auto").removeprefix("_") or 1.0)
    shape = (trainer.obs_dim, trainer.action_dim, config)
    policy, critic, target = actor(*shape), Critic(*shape), Critic(*shape).requires_grad_(False)
    target.load_state_dict(critic.state_dict())
    log_alpha = LearnedScalar(math.log(initial) if initial > 0 else -math.inf).requires_grad_(learned)
    normalizer = RunningNorm(trainer.obs_dim) if config.normalize_obs else ToFloat32()
    trainer.track(normalizer=normalizer, actor=policy, critic=critic, critic_target=target, log_alpha=log_alpha)
    optimised = {"actor": policy, "critic": critic} | ({"temperature": log_alpha} if learned else {})
    for name, module in optimised.items():
        trainer.track(**{f"{name}_optimizer": Adam(module.parameters(), config.learning_rate)})
    size = trainer.share("buffer_size")
    trainer.track(buffer=RolloutBuffer(size, trainer.transition_fields(), trainer.device, name="buffer_size"))


def _check(config: SACConfig, action_dim: int) -> None:
    most = action_dim * math.log(2)
    if config.target_entropy != "auto" and config.target_entropy >= most:
        raise UserError(
            f"`target_entropy`: got {config.target_entropy}; a policy on [-1, 1]^{action_dim} has less than "
            f"{most:.3f} nats, so the temperature would grow without bound"
        )
    low, high = config.log_std_bounds
    if low >= high:
        raise UserError(f"`log_std_bounds`: got {low}, {high}; the first must be below the second")
    if config.target_critics is not None and config.target_critics > config.policy_kwargs.n_critics:
        raise UserError(
            f"`target_critics`: got {config.target_critics}, but `policy_kwargs.n_critics` is "
            f"{config.policy_kwargs.n_critics}"
        )


def due(trainer: ControlTrainer) -> dict[str, bool]:
    """What the next update updates besides the critics, by the intervals of the configuration."""
    config, number = trainer.config, trainer.updates + 1
    return {
        "update_actor": number % config.policy_delay == 0,
        "update_target": number % config.target_update_interval == 0,
    }


def target_subset(trainer: ControlTrainer) -> dict[str, Tensor]:
    """`subset`: numbers of the random critics of this update's target, where not all are (REDQ, Algorithm 1)."""
    config: SACConfig = trainer.config
    if config.target_critics is None:
        return {}
    generator = trainer.rng.common("subset")
    order = torch.randperm(config.policy_kwargs.n_critics, generator=generator, device=trainer.device)
    return {"subset": order[: config.target_critics]}


def dropout_masks(trainer: ControlTrainer, critic: Critic, n: int) -> dict[str, list[Tensor]]:
    """Noise of dropout for the passes through the critics that the next update makes over n rows."""
    passes = ["target", "critic", *["actor"] * due(trainer)["update_actor"]]
    return {name: critic.net.masks(n, trainer.rng["dropout"]) for name in passes}


# Fields of RL Baselines3 Zoo (hyperparams/sac.yml), as far as SAC without state-dependent exploration has them, and the
# settings of two descendants' papers.
PRESETS: dict[str, dict[str, Any]] = {
    "Pendulum-v1": {"learning_rate": 1e-3},
    "MountainCarContinuous-v0": {
        "ent_coef": 0.1, "gamma": 0.9999, "tau": 0.01, "buffer_size": 50_000, "batch_size": 512, "train_freq": 32,
        "gradient_steps": 32, "policy_kwargs": {"net_arch": [64, 64]},
    },
    "HalfCheetah-v5": {"learning_starts": 10_000},
    "Ant-v5": {"learning_starts": 10_000},
    "Hopper-v5": {"learning_starts": 10_000},
    "Walker2d-v5": {"learning_starts": 10_000},
    "Humanoid-v5": {"learning_starts": 10_000},
    "Swimmer-v5": {"learning_starts": 10_000, "gamma": 0.9999},
    "droq": {
        "policy_kwargs": {"layer_norm": True, "dropout": 0.01}, "gradient_steps": 20, "policy_delay": 20,
    },
    "redq": {
        "policy_kwargs": {"n_critics": 10}, "target_critics": 2, "actor_critics": "mean", "gradient_steps": 20,
        "policy_delay": 20,
    },
}  # fmt: skip


class SAC(ControlTrainer):
    """Soft actor-critic; see the module's text."""

    Config = SACConfig
    name = "sac"
    presets = PRESETS
    several_processes = True
    default_task: ClassVar[Mapping[str, Any]] = {
        "env": "Pendulum-v1", "preset": "auto", "steps": 6_000, "log_every": 500, "eval_every": 1_000,
    }  # fmt: skip

    actor: Actor
    critic: Critic
    critic_target: Critic
    log_alpha: LearnedScalar
    actor_optimizer: Adam
    critic_optimizer: Adam
    temperature_optimizer: Adam

    def build(self) -> None:
        track_networks(self, Actor)
        self.target_entropy = target_entropy(self.config, self.action_dim)
        self.learned_temperature = isinstance(self.config.ent_coef, str)
        self._update = self.compilable(self._step)
        self._explore = self.compilable(self._sample)

    def explore(self, obs: Tensor) -> dict[str, Tensor]:
        return {"action": self._explore(obs, self._noise(len(obs), self.rng["explore"]))}

    def act(self, obs: Tensor, deterministic: bool) -> Tensor:
        if deterministic:
            return torch.tanh(self.actor(self.normalizer(obs))[0])
        return self._sample(obs, self._noise(len(obs), self.rng["predict"]))

    def _sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        mean, log_std = self.actor(self.normalizer(obs))
        return torch.tanh(mean + log_std.exp() * noise)

    def _noise(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, self.action_dim, generator=generator, device=self.device)

    def update(self, batch: Batch) -> Mapping[str, Tensor]:
        n = batch["reward"].shape[0]
        noise = {"actor": self._noise(n, self.rng["noise"]), "next": self._noise(n, self.rng["noise"])}
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
        """Critics, actor, temperature, targets, in that order: one gradient step each (Algorithm 1)."""
        config: SACConfig = self.config
        average = self.processes.average if self.processes.size > 1 else None
        metrics: dict[str, Tensor] = {}
        alpha = self.log_alpha().detach().exp()
        with self.autocast():
            obs, next_obs = self.normalizer(batch["obs"]), self.normalizer(batch["next_obs"])

            with torch.no_grad():
                next_action, next_logp = self.actor.sample(next_obs, noise["next"])
                next_q = self.critic_target(next_obs, next_action, masks["target"])
                next_q = next_q[noise["subset"]] if "subset" in noise else next_q
                y = td_target(batch["reward"], batch["discount"], batch["terminated"], next_q, next_logp, alpha)

            q = self.critic(obs, batch["action"], masks["critic"])
            loss = critic_loss(q, y)
        metrics["train/critic_grad_norm"] = descend(self.critic_optimizer, loss, average)
        metrics |= {"train/critic_loss": loss.detach(), "train/q_mean": q.detach().mean(), "train/ent_coef": alpha}

        if update_actor:
            with self.autocast():
                action, logp = self.actor.sample(obs, noise["actor"])
                q = self.critic(obs, action, masks["actor"])
                loss = actor_loss(logp, q.min(0).values if config.actor_critics == "min" else q.mean(0), alpha)
            metrics["train/actor_grad_norm"] = descend(self.actor_optimizer, loss, average)
            metrics |= {"train/actor_loss": loss.detach(), "train/entropy": -logp.detach().mean()}
            if self.learned_temperature:
                loss = temperature_loss(self.log_alpha(), logp, self.target_entropy, config.ent_coef_loss)
                descend(self.temperature_optimizer, loss, average)
                metrics["train/ent_coef_loss"] = loss.detach()

        if update_target:
            polyak_(self.critic_target, self.critic, config.tau)
        return metrics

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), "train/learning_rate": self.learning_rate}
