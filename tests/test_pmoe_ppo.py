"""PMOE-PPO: advantages in closed form, one expert against Stable-Baselines3's PPO on the same tensors, rollouts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from rlkit.errors import UserError
from rlkit.trainers.pmoe import frequency_loss
from rlkit.trainers.pmoe_ppo import (
    PMOEPPO,
    Categorical,
    GaussianExperts,
    approximate_kl,
    gae,
    policy_loss,
    value_loss,
)

SMALL: dict[str, Any] = {
    "seed": 1, "policy_kwargs": {"net_arch": [16, 16]}, "n_steps": 20, "batch_size": 8, "n_epochs": 2,
    "eval_episodes": 0, "device": "cpu",
}  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Functions


def test_advantages_are_the_discounted_sums_of_residuals() -> None:
    """Against the double sum of Eq. 16, where the last step terminates and where it does not."""
    rng = np.random.default_rng(0)
    reward, value, next_value = rng.normal(size=(3, 7))
    for ends in (0.0, 1.0):
        terminated = np.zeros(7)
        terminated[-1] = ends
        delta = reward + 0.9 * (1 - terminated) * next_value - value
        expected = [sum((0.9 * 0.8) ** (j - i) * delta[j] for j in range(i, 7)) for i in range(7)]
        np.testing.assert_allclose(gae(reward, value, next_value, terminated, 0.9, 0.8), expected, rtol=1e-12)
        np.testing.assert_allclose(gae(reward, value, next_value, terminated, 0.9, 0.0), delta, rtol=1e-12)


def test_advantages_with_lambda_one_are_returns_less_values() -> None:
    reward, value = np.array([1.0, 2.0, 4.0]), np.array([0.3, -0.2, 0.5])
    next_value = np.array([-0.2, 0.5, 99.0])  # the last does not count: it terminated
    got = gae(reward, value, next_value, np.array([0.0, 0.0, 1.0]), 0.5, 1.0)
    np.testing.assert_allclose(got, np.array([1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4]) - value)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "moves"),
    [(1.5, 1.0, -1.2, False), (1.5, -1.0, 1.5, True), (0.5, 1.0, -0.5, True), (0.5, -1.0, 0.8, False)],
)
def test_the_ratio_is_clipped_where_it_would_pay(ratio: float, advantage: float, loss: float, moves: bool) -> None:
    """The four cases of the paper's Figure 1, epsilon 0.2."""
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    found = policy_loss(logp, torch.zeros(1), torch.tensor([advantage]), 0.2)
    assert float(found.detach()) == pytest.approx(loss)
    found.backward()
    assert (float(logp.grad) != 0) == moves


def test_the_value_is_clipped_to_the_old_one() -> None:
    value, old, returns = torch.tensor([3.0, 0.1]), torch.zeros(2), torch.tensor([1.0, 1.0])
    assert float(value_loss(value, old, returns, None)) == pytest.approx((4 + 0.81) / 2)
    assert float(value_loss(value, old, returns, 0.2)) == pytest.approx((0.64 + 0.81) / 2)


def test_the_divergence_is_estimated_from_samples() -> None:
    """Of N(0, 1) from N(0.1, 1): KL = 0.1^2 / 2 = 0.005."""
    x = torch.randn(200_000, generator=seeded(), dtype=torch.float64)
    old, new = -0.5 * x**2, -0.5 * (x - 0.1) ** 2
    assert float(approximate_kl(new, old)) == pytest.approx(0.005, rel=0.05)
    assert float(approximate_kl(old, old)) == 0


# Policies


def test_the_mixtures_density_is_pytorchs() -> None:
    torch.manual_seed(0)
    actor = GaussianExperts(3, 2, PMOEPPO.Config(n_experts=3, expert_init_spread=0.8))
    actor.log_std.data.normal_()
    obs, noise, uniform = torch.randn(50, 3), torch.randn(50, 2), torch.rand(50)
    mean, log_std, log_weights = actor(obs)
    each = torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
    peer = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=log_weights), each)
    action, logp = actor.sample(obs, noise, uniform)
    torch.testing.assert_close(logp, peer.log_prob(action))
    got, entropy = actor.evaluate(obs, action)
    torch.testing.assert_close(got, logp)
    choice = torch.distributions.Categorical(logits=log_weights)
    torch.testing.assert_close(entropy, choice.entropy() + (log_weights.exp() * each.entropy()).sum(1))


def test_samples_have_the_mixtures_moments() -> None:
    actor = GaussianExperts(1, 1, PMOEPPO.Config(n_experts=2))
    with torch.no_grad():
        actor.head.weight.zero_()
        actor.head.bias.copy_(torch.tensor([-1.0, 2.0]))
        actor.log_std.copy_(torch.tensor([[0.1], [0.5]]).log())
        actor.router.weight.zero_()
        actor.router.bias.copy_(torch.tensor([0.3, 0.7]).log())
        n = 100_000
        action, _ = actor.sample(
            torch.zeros(n, 1), torch.randn(n, 1, generator=seeded()), torch.rand(n, generator=seeded(1))
        )
    mean = 0.3 * -1 + 0.7 * 2
    variance = 0.3 * (0.01 + 1) + 0.7 * (0.25 + 4) - mean**2
    assert float(action.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / n))
    assert float(action.var()) == pytest.approx(variance, rel=0.02)


def test_discrete_actions_follow_their_probabilities() -> None:
    actor = Categorical(1, 3, PMOEPPO.Config(n_experts=1))
    probabilities = torch.tensor([0.2, 0.5, 0.3])
    with torch.no_grad():
        actor.head.weight.zero_()
        actor.head.bias.copy_(probabilities.log())
        uniform = (torch.arange(1000) + 0.5) / 1000
        action, logp = actor.sample(torch.zeros(1000, 1), torch.empty(0), uniform)
    assert action.bincount().tolist() == [200, 500, 300]
    torch.testing.assert_close(logp, probabilities.log()[action])
    _, entropy = actor.evaluate(torch.zeros(1, 1), action[:1])
    assert float(entropy.detach()) == pytest.approx(-float((probabilities * probabilities.log()).sum()))


# Against Stable-Baselines3


class Stop(BaseCallback):
    def _on_step(self) -> bool:
        return True


def collected(env: str, **fields: Any) -> PPO:
    """Stable-Baselines3's PPO with a rollout that it has not yet learned from."""
    peer = PPO("MlpPolicy", env, device="cpu", seed=0, **fields)
    total, callback = peer._setup_learn(peer.n_steps, Stop())
    assert total == peer.n_steps
    assert peer.collect_rollouts(peer.env, callback, peer.rollout_buffer, peer.n_steps)
    return peer


def with_weights_of(peer: PPO, agent: PMOEPPO) -> None:
    net = peer.policy
    pairs = [
        (agent.actor.trunk.layers, [m for m in net.mlp_extractor.policy_net if hasattr(m, "weight")]),
        ([agent.actor.head], [net.action_net]),
        (agent.value.layers, [*[m for m in net.mlp_extractor.value_net if hasattr(m, "weight")], net.value_net]),
    ]
    with torch.no_grad():
        for ours, theirs in pairs:
            for a, b in zip(ours, theirs, strict=True):
                a.weight.copy_(b.weight)
                a.bias.copy_(b.bias)
        if hasattr(net, "log_std"):
            agent.actor.log_std[0].copy_(net.log_std)


def weights(peer: PPO) -> list[Tensor]:
    net = peer.policy
    layers = [*net.mlp_extractor.policy_net, net.action_net, *net.mlp_extractor.value_net, net.value_net]
    found = [layer.weight for layer in layers if hasattr(layer, "weight")]
    return [*found, net.log_std] if hasattr(net, "log_std") else found


def our_weights(agent: PMOEPPO) -> list[Tensor]:
    found = [layer.weight for layer in (*agent.actor.trunk.layers, agent.actor.head, *agent.value.layers)]
    return [*found, agent.actor.log_std[0]] if hasattr(agent.actor, "log_std") else found


@pytest.mark.parametrize(
    "fields",
    [{}, {"ent_coef": 0.01, "clip_range_vf": 0.1, "clip_range": 0.05}, {"normalize_advantage": False, "vf_coef": 0.3}],
)
@pytest.mark.parametrize("env", ["Pendulum-v1", "CartPole-v1"])
def test_updates_are_those_of_stable_baselines3(env: str, fields: dict[str, Any]) -> None:
    """Five passes over one rollout of 256 steps: the same advantages, losses, and weights."""
    peer = collected(env, n_steps=256, batch_size=256, n_epochs=5, learning_rate=1e-3, **fields)
    agent = PMOEPPO(env, n_experts=1, n_steps=256, batch_size=256, learning_rate=1e-3, device="cpu", **fields)
    with_weights_of(peer, agent)
    data = next(peer.rollout_buffer.get(256))
    batch = {
        "obs": data.observations, "logp_old": data.old_log_prob, "value": data.old_values.flatten(),
        "advantage": data.advantages, "returns": data.returns, "reward": data.returns,
        "action": data.actions.long().flatten() if agent.discrete else data.actions,
    }  # fmt: skip
    before = [w.detach().clone() for w in weights(peer)]
    peer.train()
    metrics = [agent.update(batch) for _ in range(5)]
    for a, b, old in zip(our_weights(agent), weights(peer), before, strict=True):
        assert not torch.equal(b, old)
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)
    names = ("policy_gradient_loss", "value_loss", "entropy_loss", "approx_kl", "clip_fraction")
    for name in names:
        of = metrics[-1:] if name == "approx_kl" else metrics  # theirs is of the last epoch
        mean = float(torch.stack([m[f"train/{name}"] for m in of]).mean())
        assert mean == pytest.approx(float(peer.logger.name_to_value[f"train/{name}"]), rel=1e-3, abs=1e-6), name
    assert float(metrics[-1]["train/loss"]) == pytest.approx(peer.logger.name_to_value["train/loss"], rel=1e-4)


def test_advantages_are_those_of_stable_baselines3() -> None:
    """Episode by episode, on a rollout of CartPole with many ends; their rewards hold the time limits' bootstraps."""
    peer = collected("CartPole-v1", n_steps=256)
    buffer = peer.rollout_buffer
    starts = [*np.flatnonzero(buffer.episode_starts[:, 0]).tolist(), 256]
    assert len(starts) > 5
    last = peer.policy.predict_values(torch.as_tensor(peer._last_obs)).item()
    value = buffer.values[:, 0]
    for begin, end in itertools.pairwise(starts):
        part = slice(begin, end)
        terminated = np.zeros(end - begin)
        terminated[-1] = 1.0 if end < 256 else float(peer._last_episode_starts[0])
        next_value = np.append(value[begin + 1 : end], last)
        got = gae(buffer.rewards[part, 0], value[part], next_value, terminated, peer.gamma, peer.gae_lambda)
        np.testing.assert_allclose(got, buffer.advantages[part, 0], atol=1e-4)


# The trainer


class Steady(gym.Env):
    """Reward 1 a step, an observation that counts, ends after five steps as told."""

    observation_space = gym.spaces.Box(-10, 10, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, terminates: bool) -> None:
        self.terminates, self.t = terminates, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        over = self.t == 5
        return np.full(1, self.t, np.float32), 1.0, over and self.terminates, over and not self.terminates, {}


@pytest.mark.parametrize("terminates", [False, True])
def test_a_time_limit_bootstraps_and_an_end_does_not(terminates: bool) -> None:
    """Rollouts of 12 steps end in mid-episode. With lambda 0 the return is r + gamma V(s'), V(s') that of the true next
    observation, which at a time limit is 5, never the 0 after the reset.
    """
    fields = {**SMALL, "n_steps": 12, "gae_lambda": 0.0, "gamma": 0.5, "n_experts": 2}
    agent = PMOEPPO([lambda: Steady(terminates)], **fields)
    agent.before_learning()
    for _ in range(12):
        agent.clock += agent.collect()
    values = agent.value(torch.arange(6.0).unsqueeze(1)).squeeze(1).detach()
    for t in range(12):
        bootstrap = 0.0 if terminates and t % 5 == 4 else 0.5 * float(values[t % 5 + 1])
        assert float(agent.buffer["returns"][t]) == pytest.approx(1 + bootstrap, abs=1e-5)
        advantage = float(agent.buffer["returns"][t]) - float(values[t % 5])
        assert float(agent.buffer["advantage"][t]) == pytest.approx(advantage, abs=1e-5)


def test_an_epoch_sees_every_step_once() -> None:
    """20 steps of 3 environments, minibatches of 8: 60 rows in 8 minibatches, in another order in each epoch."""
    agent = PMOEPPO("Pendulum-v1", n_envs=3, **SMALL)
    agent.before_learning()
    for rollout in range(2):
        for _ in range(20):
            agent.clock += agent.collect()
        assert len(agent.buffer) == 60
        assert agent.owed == 2 * 8
        everything = sorted(map(tuple, agent.buffer["obs"].tolist()))
        orders = []
        for _ in range(2):
            seen: list[tuple[float, ...]] = []
            for size in [8] * 7 + [4]:
                batch = agent.batch()
                assert len(batch["reward"]) == size
                seen += map(tuple, batch["obs"].tolist())
                agent.update(batch)
                agent.owed -= 1
            assert sorted(seen) == everything
            orders.append(seen)
        assert orders[0] != orders[1], rollout
    assert agent.clock == 120


def test_old_and_new_log_probabilities_see_the_same_observations() -> None:
    """With normalised observations, in the third rollout: the first minibatch's ratios are 1."""
    agent = PMOEPPO("Pendulum-v1", normalize_obs=True, **SMALL).learn(40)
    for _ in range(20):
        agent.clock += agent.collect()
    assert agent.normalizer.count == 40  # of the rollouts before
    metrics = agent.update(agent.batch())
    assert float(metrics["train/approx_kl"]) == pytest.approx(0, abs=1e-6)
    assert float(metrics["train/clip_fraction"]) == 0


def test_a_divergence_too_large_ends_the_updates_without_a_step() -> None:
    agent = PMOEPPO("Pendulum-v1", target_kl=1e-9, learning_rate=0.01, **SMALL)
    agent.before_learning()
    for _ in range(20):
        agent.clock += agent.collect()
    agent.update(agent.batch())  # the ratios are 1 as yet
    assert agent.owed == 6
    agent.owed -= 1
    before = [p.detach().clone() for p in agent.actor.parameters()]
    agent.update(agent.batch())
    assert agent.owed == 1
    assert all(map(torch.equal, before, agent.actor.parameters()))
    agent.owed -= 1
    agent.clock += agent.collect()
    assert len(agent.buffer) == 1


def test_gradients_are_cut() -> None:
    """Adam's first moment after one step is 0.1 g: its norm is 0.1 max_grad_norm where the gradient's is above."""
    agent = PMOEPPO("Pendulum-v1", max_grad_norm=0.01, **SMALL)
    agent.before_learning()
    for _ in range(20):
        agent.clock += agent.collect()
    norm = float(agent.update(agent.batch())["train/grad_norm"])
    assert norm > 0.01
    moment = torch.cat([m.flatten() for m in agent.optimizer.exp_avg]).norm()
    assert float(moment) == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_the_router_learns_which_expert_q_values_most() -> None:
    """Q = -(a - 0.5)^2 by hand, experts at -0.5 and 0.5: the frequency loss alone makes the weight of the second 1."""
    fields = {**SMALL, "n_experts": 2, "learning_rate": 0.05}
    agent = PMOEPPO("Pendulum-v1", **fields)

    class Parabola(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -((x[:, -1:] - 0.5) ** 2)

    agent.q = Parabola()
    with torch.no_grad():
        agent.actor.head.weight.zero_()
        agent.actor.head.bias.copy_(torch.tensor([-0.5, 0.5]))
        agent.actor.log_std.fill_(math.log(0.05))
    obs = torch.randn(64, 3, generator=seeded())
    router = list(agent.actor.router.parameters())
    for i in range(200):
        loss, about = agent._router_loss(obs, torch.randn(64, 2, 1, generator=seeded(i)))
        rest = [p for name, p in agent.actor.named_parameters() if not name.startswith("router")]
        assert all(g is None for g in torch.autograd.grad(loss, rest, retain_graph=True, allow_unused=True))
        for p, g in zip(router, torch.autograd.grad(loss, router), strict=True):
            p.data -= 0.5 * g
    assert float(about["train/expert_1"]) == 1
    log_weights = agent.actor(obs)[2]
    assert float(log_weights.exp()[:, 1].mean().detach()) > 0.9
    assert float(frequency_loss(log_weights.detach(), torch.ones(64, dtype=torch.int64))) < 0.01


def test_discrete_actions_count_from_where_the_space_does() -> None:
    env = gym.make("CartPole-v1")
    shifted = gym.wrappers.TransformAction(env, lambda a: a - 3, gym.spaces.Discrete(2, start=3))
    agent = PMOEPPO([lambda: shifted], n_experts=1, **SMALL).learn(45)
    assert set(agent.buffer["action"].tolist()) <= {0, 1}
    assert agent.buffer["action"].dtype == torch.int64
    action, _ = agent.predict(np.zeros(4, np.float32), deterministic=True)
    assert shifted.action_space.contains(np.int64(action))
    actions, _ = agent.predict(np.zeros((5, 4), np.float32))
    assert actions.shape == (5,)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"`n_experts`: a mixture of 4 needs continuous actions.*n_experts=1"):
        PMOEPPO("CartPole-v1")
    with pytest.raises(UserError, match="n_experts"):
        PMOEPPO("Pendulum-v1", n_experts=0)
    with pytest.raises(UserError, match="clip_range"):
        PMOEPPO("Pendulum-v1", clip_range=0.0)


@pytest.mark.slow
def test_one_expert_solves_cartpole() -> None:
    agent = PMOEPPO("CartPole-v1", preset="auto", seed=0, eval_episodes=0, device="cpu").learn(60_000)
    assert agent.evaluate(20)["eval/mean_reward"] >= 475  # the task's own mark
