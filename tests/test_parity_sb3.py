"""SAC against Stable-Baselines3's on the same tensors: target, three losses, and one whole update."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest
import torch
from helpers import NOTHING_DROPPED
from stable_baselines3 import SAC as SB3SAC
from stable_baselines3.common.buffers import ReplayBufferSamples
from stable_baselines3.common.evaluation import evaluate_policy
from torch import nn

from rlkit.trainers.sac import SAC, td_target

B = 64


class GradientDescent:
    """Plain steps, which show a gradient as it is: Adam's first one shows little more than its sign."""

    def __init__(self, parameters: Any, learning_rate: float) -> None:
        self.parameters, self.learning_rate = list(parameters), learning_rate

    @torch.no_grad()
    def take_step(self, grads: Any, finite: Any) -> None:
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter -= self.learning_rate * grad


def copy_linear(source: nn.Linear, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Weights of one linear layer into a member of an ensemble."""
    weight.copy_(source.weight.T)
    bias.copy_(source.bias.unsqueeze(0))


@torch.no_grad()
def copy_weights(theirs: SB3SAC, ours: SAC) -> None:
    trunk = [m for m in theirs.actor.latent_pi if isinstance(m, nn.Linear)]
    for mine, layer in zip(ours.actor.trunk.layers, trunk, strict=True):
        mine.load_state_dict(layer.state_dict())
    ours.actor.head.weight.copy_(torch.cat([theirs.actor.mu.weight, theirs.actor.log_std.weight]))
    ours.actor.head.bias.copy_(torch.cat([theirs.actor.mu.bias, theirs.actor.log_std.bias]))
    for mine, critic in ((ours.critic, theirs.critic), (ours.critic_target, theirs.critic_target)):
        for i, q_net in enumerate(critic.q_networks):
            linear = [m for m in q_net if isinstance(m, nn.Linear)]
            for layer, source in zip(mine.net.layers, linear, strict=True):
                copy_linear(source, layer.weight[i], layer.bias[i])


def theirs_as_ours(theirs: SB3SAC) -> SAC:
    ours = SAC("Pendulum-v1", buffer_size=10)
    copy_weights(theirs, ours)
    return ours


@pytest.fixture
def pair() -> tuple[SB3SAC, SAC, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Both with the same weights and plain gradient descent (so that a step is the gradient), a batch and its noise.

    SB3 adds 1e-6 inside its log-determinant; without it both are the same function of the same numbers.
    """
    torch.manual_seed(0)
    theirs = SB3SAC("MlpPolicy", "Pendulum-v1", seed=0, device="cpu")
    theirs.set_logger(__import__("stable_baselines3.common.logger", fromlist=["configure"]).configure(None, []))
    theirs.actor.action_dist.epsilon = 0.0
    with torch.no_grad():  # targets that differ from the critics, a temperature that is not 1
        for p in theirs.critic_target.parameters():
            p.add_(0.01 * torch.randn_like(p))
        theirs.log_ent_coef.fill_(-0.7)
    ours = theirs_as_ours(theirs)
    with torch.no_grad():
        ours.log_alpha.value.fill_(-0.7)
    rate = 1e-2
    theirs.actor.optimizer = torch.optim.SGD(theirs.actor.parameters(), lr=rate)
    theirs.critic.optimizer = torch.optim.SGD(theirs.critic.parameters(), lr=rate)
    theirs.ent_coef_optimizer = torch.optim.SGD([theirs.log_ent_coef], lr=rate)
    theirs.lr_schedule = lambda _: rate
    ours.actor_optimizer = GradientDescent(ours.actor.parameters(), rate)
    ours.critic_optimizer = GradientDescent(ours.critic.parameters(), rate)
    ours.temperature_optimizer = GradientDescent(ours.log_alpha.parameters(), rate)
    batch = {
        "obs": torch.randn(B, 3),
        "next_obs": torch.randn(B, 3),
        "action": torch.rand(B, 1) * 2 - 1,
        "reward": torch.randn(B),
        "terminated": torch.rand(B) < 0.3,
        "truncated": torch.zeros(B, dtype=torch.bool),
        "discount": torch.full((B,), theirs.gamma),
    }
    torch.manual_seed(7)  # what SB3 will draw: the actor's noise, then the next action's
    noise = {"actor": torch.normal(torch.zeros(B, 1), torch.ones(B, 1))}
    noise["next"] = torch.normal(torch.zeros(B, 1), torch.ones(B, 1))
    return theirs, ours, batch, noise


def sb3_update(theirs: SB3SAC, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    column = {k: batch[k].float().unsqueeze(1) for k in ("terminated", "reward")}
    samples = ReplayBufferSamples(
        batch["obs"], batch["action"], batch["next_obs"], column["terminated"], column["reward"]
    )
    theirs.replay_buffer.sample = lambda *args, **kwargs: samples
    torch.manual_seed(7)
    theirs.train(1, B)
    return dict(theirs.logger.name_to_value)


def test_losses_and_one_update_equal_sb3s(pair) -> None:
    theirs, ours, batch, noise = pair
    metrics = ours._step(batch, noise, NOTHING_DROPPED, update_actor=True, update_target=True)
    logged = sb3_update(theirs, batch)
    for name in ("critic_loss", "actor_loss", "ent_coef_loss", "ent_coef"):
        assert float(metrics[f"train/{name}"]) == pytest.approx(logged[f"train/{name}"], rel=2e-5), name
    expected = theirs_as_ours(theirs)
    for part in ("actor", "critic", "critic_target"):
        for (name, a), b in zip(
            getattr(ours, part).named_parameters(), getattr(expected, part).parameters(), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-7, msg=f"{part}.{name}")
    assert ours.log_alpha().item() == pytest.approx(theirs.log_ent_coef.item(), abs=1e-6)


def test_the_update_moved_everything(pair) -> None:
    """The comparison above is not of two standing stills: each network moves far beyond its tolerance."""
    _, ours, batch, noise = pair
    before = {
        part: [p.clone() for p in getattr(ours, part).parameters()] for part in ("actor", "critic", "critic_target")
    }
    ours._step(batch, noise, NOTHING_DROPPED, update_actor=True, update_target=True)
    for part, old in before.items():
        moved = max(
            float((a - b).detach().abs().max()) for a, b in zip(old, getattr(ours, part).parameters(), strict=True)
        )
        assert moved > 2e-5, part


def test_target_equals_sb3s(pair) -> None:
    theirs, ours, batch, _ = pair
    with torch.no_grad():
        torch.manual_seed(3)
        next_actions, next_logp = theirs.actor.action_log_prob(batch["next_obs"])
        q = torch.cat(theirs.critic_target(batch["next_obs"], next_actions), dim=1).min(1, keepdim=True).values
        q = q - 0.5 * next_logp.reshape(-1, 1)
        expected = batch["reward"].unsqueeze(1) + (1 - batch["terminated"].float().unsqueeze(1)) * theirs.gamma * q
        torch.manual_seed(3)
        drawn = torch.normal(torch.zeros(B, 1), torch.ones(B, 1))
        action, logp = ours.actor.sample(batch["next_obs"], drawn)
        rows = (batch[name] for name in ("reward", "discount", "terminated"))
        mine = td_target(*rows, ours.critic_target(batch["next_obs"], action), logp, torch.tensor(0.5))
    torch.testing.assert_close(mine, expected.squeeze(1), rtol=1e-5, atol=1e-5)


def test_sb3s_evaluate_policy_accepts_a_trainer() -> None:
    agent = SAC("Pendulum-v1", buffer_size=100)
    mean, _ = evaluate_policy(agent, gym.make("Pendulum-v1"), n_eval_episodes=2, warn=False)
    assert -2500 < mean < 0


def test_same_actions_as_sb3_in_environment_units() -> None:
    theirs = SB3SAC("MlpPolicy", "Pendulum-v1", seed=0, device="cpu")
    ours = theirs_as_ours(theirs)
    obs = torch.randn(20, 3).numpy()
    mine, _ = ours.predict(obs, deterministic=True)
    expected, _ = theirs.predict(obs, deterministic=True)
    assert mine.dtype == expected.dtype
    assert mine.shape == expected.shape
    assert abs(mine - expected).max() < 1e-5
