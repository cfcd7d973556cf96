"""TD3 as a trainer of your own, in one file: twin delayed deep deterministic policy gradient.

    python examples/own_trainer.py

Paper: Fujimoto et al., Addressing Function Approximation Error in Actor-Critic Methods, arXiv:1802.09477 (Algorithm 1).
Deviations: hidden layers of 256 and 256, batches of 256 and 100 random steps at first, where the paper has 400 and 300,
100, and 1,000 to 10,000; the number of critics is free, and the target is their minimum.

What makes it a trainer: a frozen `Config` whose fields have a line of documentation each, `build`, `explore`, `act` and
`update`. Collection, n-step sums, reward modules, evaluation, logs, checkpoints and exact resumption come with
`ControlTrainer`. Two rules keep a resumed run equal to an uninterrupted one, bit for bit: state lives in parts that are
`track`ed, and randomness comes from the named streams `self.rng[...]`.

`rlkit.register` makes the name known in this process. For `rlkit train td3`, list the class as an entry point of a
package (see rlkit/registry.py), or in trainers/__init__.py if it is to become one of rlkit's own.

Shapes: B batch, D action dimension, N critics; values and rewards are (B,) and (N, B), actions in [-1, 1]^D.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import rlkit
from rlkit.buffer import RolloutBuffer
from rlkit.config import Count, Fraction, NonNegative
from rlkit.control import ControlTrainer, NetConfig, OffPolicyConfig
from rlkit.nets import MLP, EnsembleMLP, RunningNorm, ToFloat32
from rlkit.optim import Adam, descend, polyak_
from rlkit.trainer import Batch


@dataclass(frozen=True, kw_only=True)
class TD3Config(OffPolicyConfig):
    """What TD3 adds to the fields of every off-policy trainer."""

    tau: Fraction = 0.005
    """Averaging rate of the target networks."""
    policy_delay: Count = 2
    """Critic updates for each update of actor and targets."""
    exploration_noise: NonNegative = 0.1
    """Standard deviation of the noise on actions while collecting."""
    target_noise: NonNegative = 0.2
    """Standard deviation of the noise on target actions; 0 turns smoothing off."""
    target_noise_clip: NonNegative = 0.5
    """Bound of that noise."""
    policy_kwargs: NetConfig = field(default_factory=NetConfig)
    """The networks."""


def td_target(reward: Tensor, discount: Tensor, terminated: Tensor, next_q: Tensor) -> Tensor:
    """y = r + gamma (1 - terminated) min_i Q'_i(s', a'): (B,), from (B,), (B,), (B,) and (N, B)."""
    return reward + discount * (1.0 - terminated.to(reward.dtype)) * next_q.min(0).values


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """sum_i mean_B (Q_i(s, a) - y)^2, from (N, B) and (B,)."""
    return (q - target).square().mean(1).sum()


def actor_loss(q: Tensor) -> Tensor:
    """-mean_B Q_1(s, pi(s)), from (N, B): ascends the first critic, as Algorithm 1 does."""
    return -q[0].mean()


@rlkit.register
class TD3(ControlTrainer):
    """Twin delayed DDPG; see the module's text."""

    Config = TD3Config
    name = "td3"
    default_task: ClassVar[Mapping[str, Any]] = {"env": "Pendulum-v1", "learning_rate": 1e-3, "steps": 5_000}

    actor: MLP
    actor_target: MLP
    critic: EnsembleMLP
    critic_target: EnsembleMLP
    actor_optimizer: Adam
    critic_optimizer: Adam

    def build(self) -> None:
        config: TD3Config = self.config
        net = config.policy_kwargs
        actor = [self.obs_dim, *net.widths("pi"), self.action_dim]
        critic = [self.obs_dim + self.action_dim, *net.widths("qf"), 1]
        more = (net.activation_fn, net.layer_norm, net.dropout)
        self.track(
            normalizer=RunningNorm(self.obs_dim) if config.normalize_obs else ToFloat32(),
            actor=MLP(actor, net.activation_fn),
            actor_target=MLP(actor, net.activation_fn).requires_grad_(False),
            critic=EnsembleMLP(net.n_critics, critic, *more),
            critic_target=EnsembleMLP(net.n_critics, critic, *more).requires_grad_(False),
        )
        self.actor_target.load_state_dict(self.actor.state_dict())
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.track(
            actor_optimizer=Adam(self.actor.parameters(), config.learning_rate),
            critic_optimizer=Adam(self.critic.parameters(), config.learning_rate),
            buffer=RolloutBuffer(config.buffer_size, self.transition_fields(), self.device, name="buffer_size"),
        )
        self._update = self.compilable(self._step)

    def explore(self, obs: Tensor) -> dict[str, Tensor]:
        noise = self.config.exploration_noise * self._noise(obs.shape[0], "explore")
        return {"action": (self.act(obs, deterministic=True) + noise).clamp(-1, 1)}

    def act(self, obs: Tensor, deterministic: bool) -> Tensor:
        return torch.tanh(self.actor(self.normalizer(obs)))  # the policy has no randomness of its own

    def update(self, batch: Batch) -> Mapping[str, Tensor]:
        self.schedule()
        n = batch["reward"].shape[0]
        noise = self.config.target_noise * self._noise(n, "target")
        noise = noise.clamp(-self.config.target_noise_clip, self.config.target_noise_clip)
        masks = [self.critic.masks(n, self.rng["dropout"]) for _ in range(3)]
        return self._update(batch, noise, masks, delayed=(self.updates + 1) % self.config.policy_delay == 0)

    def _noise(self, n: int, stream: str) -> Tensor:
        return torch.randn(n, self.action_dim, generator=self.rng[stream], device=self.device)

    def _q(self, critic: EnsembleMLP, obs: Tensor, action: Tensor, masks: list[Tensor]) -> Tensor:
        """Values (N, B) of (B, obs_dim), (B, D) and masks of dropout."""
        q: Tensor = critic(torch.cat([obs, action], dim=-1), masks)
        return q.squeeze(-1).float()

    def _step(self, batch: Batch, noise: Tensor, masks: list[list[Tensor]], delayed: bool) -> dict[str, Tensor]:
        """Critics, then with `delayed` the actor and all targets: one gradient step each (Algorithm 1)."""
        with self.autocast():
            obs, next_obs = self.normalizer(batch["obs"]), self.normalizer(batch["next_obs"])
            with torch.no_grad():
                next_action = (torch.tanh(self.actor_target(next_obs)) + noise).clamp(-1, 1)
                next_q = self._q(self.critic_target, next_obs, next_action, masks[0])
                y = td_target(batch["reward"], batch["discount"], batch["terminated"], next_q)
            loss = critic_loss(self._q(self.critic, obs, batch["action"], masks[1]), y)
        norm = descend(self.critic_optimizer, loss)
        metrics = {"train/critic_loss": loss.detach(), "train/critic_grad_norm": norm}
        if delayed:
            with self.autocast():
                loss = actor_loss(self._q(self.critic, obs, torch.tanh(self.actor(obs)), masks[2]))
            metrics |= {"train/actor_grad_norm": descend(self.actor_optimizer, loss), "train/actor_loss": loss.detach()}
            polyak_(self.actor_target, self.actor, self.config.tau)
            polyak_(self.critic_target, self.critic, self.config.tau)
        return metrics


def mean_return(agent: Any) -> float:
    """Over ten episodes."""
    return float(agent.evaluate(10)["eval/mean_reward"])


def main() -> None:
    """Train by name, save, load; then stop another run on its way, resume it, and compare."""
    settings = {
        "seed": 0, "threads": 1, "learning_rate": 3e-3, "gamma": 0.95, "tau": 0.02, "batch_size": 128,
        "learning_starts": 500, "exploration_noise": 0.2, "policy_kwargs": {"net_arch": [64, 64]},
    }  # fmt: skip
    agent = rlkit.TD3("Pendulum-v1", **settings)
    before = mean_return(agent)
    agent.learn(2_000)
    print(f"return before: {before:.0f}, after: {mean_return(agent):.0f}")
    with tempfile.TemporaryDirectory() as folder:
        loaded = rlkit.load(agent.save(Path(folder) / "saved"))  # finds the class by its name
        print(f"return of the loaded agent: {mean_return(loaded):.0f}")
        run = Path(folder) / "run"
        stopped = rlkit.TD3("Pendulum-v1", out=str(run), eval_episodes=0, **settings)
        stopped.learn(2_000, callback=lambda trainer: trainer.clock < 1_000)
        resumed: Any = rlkit.resume(run).learn()
        equal = all(map(torch.equal, agent.critic.parameters(), resumed.critic.parameters()))
        print(f"stopped at {stopped.clock}, resumed to {resumed.clock}: equal to the uninterrupted run: {equal}")


if __name__ == "__main__":
    main()
