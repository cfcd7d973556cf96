"""PMOE: closed forms of its losses, equality with SAC, which gradient reaches whom, and bandits with known ends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rlkit
from rlkit.errors import UserError
from rlkit.optim import Adam, descend
from rlkit.trainers.pmoe import (
    PMOE,
    Experts,
    blended,
    draw,
    exact_loss,
    frequency_loss,
    mixture_logp,
    pick,
    score_loss,
    straight_through,
)
from rlkit.trainers.sac import tanh_gaussian

SMALL: dict[str, Any] = {
    "seed": 1, "policy_kwargs": {"net_arch": [16, 16]}, "batch_size": 16, "learning_starts": 10, "eval_episodes": 0,
    "device": "cpu", "buffer_size": 500,
}  # fmt: skip
ESTIMATORS = ("frequency", "all", "exact", "score", "gumbel", "blend")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def policy(*shape: int, k: int = 3, d: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Random means, log standard deviations, log weights."""
    g = seeded()
    mean, log_std = torch.randn(*shape, k, d, generator=g), torch.randn(*shape, k, d, generator=g) * 0.3
    return mean, log_std, torch.log_softmax(torch.randn(*shape, k, generator=g), -1)


# Densities


def test_the_mixtures_density_is_the_weighted_sum() -> None:
    mean, log_std, log_weights = policy(5)
    u = torch.randn(5, 2, generator=seeded(1))
    density = torch.zeros(5)
    for k in range(3):
        noise = (u - mean[:, k]) / log_std[:, k].exp()
        density += log_weights[:, k].exp() * tanh_gaussian(mean[:, k], log_std[:, k], noise)[1].exp()
    torch.testing.assert_close(mixture_logp(u, mean, log_std, log_weights), density.log(), atol=1e-5, rtol=1e-5)


def test_the_mixtures_density_integrates_to_one() -> None:
    """Over the action a = tanh(u), by the trapezoid rule on 200,001 points."""
    mean, log_std, log_weights = (x.double() for x in policy(k=3, d=1))
    a = torch.linspace(-1, 1, 200_003, dtype=torch.float64)[1:-1]
    density = mixture_logp(torch.atanh(a).unsqueeze(1), mean, log_std, log_weights).exp()
    assert float(torch.trapezoid(density, a)) == pytest.approx(1, abs=1e-4)


def test_many_dimensions_and_far_actions_have_finite_density() -> None:
    """60 dimensions, 20 standard deviations away: exp of the log-densities is 0, their log-sum-exp is not -inf."""
    mean, log_std = torch.zeros(1, 2, 60), torch.zeros(1, 2, 60)
    logp = mixture_logp(torch.full((1, 60), 20.0), mean, log_std, torch.full((1, 2), math.log(0.5)))
    log_normal = 60 * (-200 - 0.5 * math.log(2 * math.pi))
    log_det = 60 * 2 * (math.log(2) - 20)
    assert float(logp) == pytest.approx(log_normal - log_det, rel=1e-5)


def test_component_and_mixture_entropy_differ_by_that_of_the_choice() -> None:
    """Two experts 20 standard deviations apart, equal weights: log pi_i - log pi = log 2 for every sample."""
    mean = torch.tensor([[[-1.0], [1.0]]]).expand(1000, 2, 1)
    log_std, log_weights = torch.full_like(mean, math.log(0.1)), torch.full((1000, 2), math.log(0.5))
    noise = torch.randn(1000, 1, generator=seeded())
    _, component = tanh_gaussian(mean[:, 0], log_std[:, 0], noise)
    gap = component - mixture_logp(mean[:, 0] + log_std[:, 0].exp() * noise, mean, log_std, log_weights)
    torch.testing.assert_close(gap, torch.full((1000,), math.log(2)), atol=1e-5, rtol=0)


def test_a_blend_is_the_weighted_sum_of_gaussians() -> None:
    mean, log_std, log_weights = policy(4)
    w = log_weights.exp().unsqueeze(-1)
    got_mean, got_log_std = blended(mean, log_std, log_weights)
    u = mean + log_std.exp() * torch.randn(200_000, 4, 3, 2, generator=seeded(2))
    samples = (w * u).sum(-2)
    torch.testing.assert_close(samples.mean(0), got_mean.squeeze(1), atol=0.01, rtol=0)
    torch.testing.assert_close(samples.std(0), got_log_std.squeeze(1).exp(), atol=0.01, rtol=0)


# Choosing


def test_drawing_follows_the_weights_row_by_row() -> None:
    weights = torch.tensor([0.5, 0.2, 0.3])
    uniform = (torch.arange(1000) + 0.5) / 1000
    drawn = draw(weights.log().expand(1000, 3), uniform)
    assert drawn.bincount().tolist() == [500, 200, 300]
    below_one = torch.tensor([1 - 2**-24])  # the largest float32 below 1
    for k in (2, 3, 7, 1000):
        log_weights = torch.log_softmax(torch.randn(1, k, generator=seeded(k)), -1)
        assert 0 <= int(draw(log_weights, below_one)) < k
    impossible = torch.tensor([[0.0, -math.inf]])
    assert int(draw(impossible, below_one)) == 0
    assert int(draw(impossible.flip(1), torch.zeros(1))) == 1


def test_picking() -> None:
    values, expert = torch.arange(24.0).view(2, 3, 4), torch.tensor([2, 0])
    assert torch.equal(pick(values, expert), torch.stack([values[0, 2], values[1, 0]]))
    assert pick(values[:, :, 0], expert).tolist() == [8.0, 12.0]


# Losses of the router


def learned_weights(loss: Callable[[Tensor], Tensor], k: int = 2, steps: int = 3000, rate: float = 0.01) -> list[float]:
    """Weights after descending `loss(log_weights (B, k))` on free logits."""
    logits = nn.Parameter(torch.zeros(k))
    optimizer = Adam([logits], rate)
    for _ in range(steps):
        descend(optimizer, loss(torch.log_softmax(logits, -1).expand(256, k)))
    return logits.detach().softmax(-1).tolist()


@pytest.mark.parametrize("form", ["mse", "ce"])
def test_weights_become_the_frequency_of_winning(form: str) -> None:
    """Means 0.2 and 0, both deviations 0.2, the larger wins: w_1 = Phi(0.2 / sqrt(0.08)) = Phi(0.7071) = 0.7602."""
    g = seeded(3)

    def loss(log_weights: Tensor) -> Tensor:
        u = torch.tensor([0.2, 0.0]) + 0.2 * torch.randn(256, 2, generator=g)
        return frequency_loss(log_weights, torch.tanh(u).argmax(1), form)

    expected = 0.5 * (1 + math.erf(0.2 / math.sqrt(0.08) / math.sqrt(2)))
    assert expected == pytest.approx(0.7602, abs=1e-4)
    assert learned_weights(loss)[0] == pytest.approx(expected, abs=0.025)


def test_mse_saturates_where_cross_entropy_does_not() -> None:
    """A router that is wrong by 20 nats: the gradients are of the order e^-20, and 1."""
    for form, low, high in (("mse", 0.0, 1e-6), ("ce", 0.99, 1.01)):
        logits = torch.tensor([[20.0, 0.0]], requires_grad=True)
        loss = frequency_loss(torch.log_softmax(logits, -1), torch.tensor([1]), form)
        (grad,) = torch.autograd.grad(loss, logits)
        assert low <= float(grad.abs().max()) <= high


def test_the_exact_gradient_finds_the_larger_value() -> None:
    value = torch.tensor([1.0, 0.9])
    assert learned_weights(lambda w: exact_loss(w, value.expand_as(w)))[0] > 0.9


def test_the_score_function_has_the_exact_gradient_in_expectation() -> None:
    """By enumeration: all 3^2 draws of a batch of two, each with its probability."""
    logits = torch.randn(2, 3, generator=seeded(), dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 3, generator=seeded(1), dtype=torch.float64)
    log_weights = torch.log_softmax(logits, -1)
    expected = torch.zeros_like(logits)
    for draws in itertools.product(range(3), repeat=2):
        drawn = torch.tensor(draws)
        probability = pick(log_weights, drawn).sum().exp().detach()
        loss = score_loss(log_weights, pick(value, drawn), drawn)
        expected += probability * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    (exact,) = torch.autograd.grad(exact_loss(log_weights, value), logits)
    torch.testing.assert_close(expected, exact)


def test_straight_through_is_one_hot_with_the_gradient_of_the_softmax() -> None:
    logits, direction = torch.randn(4, 3, generator=seeded()), torch.randn(4, 3, generator=seeded(1))
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    y = straight_through(a)
    assert torch.equal(y.detach().round(), nn.functional.one_hot(logits.argmax(1), 3).float())
    (got,) = torch.autograd.grad((y * direction).sum(), a)
    (expected,) = torch.autograd.grad((b.softmax(-1) * direction).sum(), b)
    torch.testing.assert_close(got, expected)


# The trainer


@pytest.mark.parametrize("entropy", ["component", "mixture"])
@pytest.mark.parametrize("router_grad", ESTIMATORS)
def test_one_expert_is_sac_bit_for_bit(router_grad: str, entropy: str) -> None:
    fields = {**SMALL, "target_critics": 2, "policy_kwargs": {"net_arch": [16, 16], "n_critics": 3, "dropout": 0.1}}
    sac = rlkit.SAC("Pendulum-v1", **fields).learn(40)
    if router_grad == "gumbel":  # a stream of its own
        fields["gumbel_temperature"] = 0.5
    one = PMOE("Pendulum-v1", n_experts=1, router_grad=router_grad, entropy=entropy, expert_init_spread=0.7, **fields)
    one.learn(40)
    for name in ("actor", "critic", "critic_target", "log_alpha"):
        ours, theirs = getattr(one, name).state_dict(), getattr(sac, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert torch.equal(one.buffer["action"], sac.buffer["action"])
    obs = one.observation_space.sample()
    assert one.predict(obs, deterministic=True)[0] == sac.predict(obs, deterministic=True)[0]


def gradients(agent: PMOE, n: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the actor's loss on n rows, by parameter; and the metrics."""
    obs, noise = torch.randn(n, 3, generator=seeded()), {"actor": torch.randn(n, agent.experts, 1, generator=seeded(1))}
    noise |= {
        "expert": torch.rand(n, generator=seeded(2)),
        "gumbel": torch.randn(n, agent.experts, generator=seeded(3)),
    }
    loss, _, about = agent._actor_loss(obs, noise, [], torch.tensor(0.2))
    parameters = dict(agent.actor.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: g if g is not None else torch.tensor(0.0) for name, g in zip(parameters, found, strict=True)}, about


def test_gradients_reach_whom_they_should() -> None:
    """The frequency loss trains the router alone, the actor's loss all but it, and of the heads the winner's."""
    fields = {**SMALL, "n_experts": 4, "expert_init_spread": 0.5}
    for entropy in ("component", "mixture"):
        agents = [PMOE("Pendulum-v1", freq_loss=form, entropy=entropy, **fields) for form in ("mse", "ce")]
        (mse, _), (ce, _) = (gradients(agent, 64) for agent in agents)
        for name in mse:
            same = torch.equal(mse[name], ce[name])
            assert same != name.startswith("router"), name
            assert mse[name].abs().max() > 0, name
        log_weights = agents[0].actor(torch.randn(64, 3, generator=seeded()))[2]
        trunk = list(agents[0].actor.trunk.parameters())
        unused = torch.autograd.grad(log_weights.sum(), trunk, allow_unused=True, retain_graph=True)
        assert all(g is None for g in unused)
    agent = PMOE("Pendulum-v1", **fields)
    found, about = gradients(agent, 1)
    (winner,) = [k for k in range(4) if float(about[f"train/expert_{k}"]) == 1]
    rows = found["head.weight"].view(4, 2, -1).abs().sum((1, 2))
    assert [k for k in range(4) if rows[k] > 0] == [winner]


def test_every_estimator_moves_the_router() -> None:
    for router_grad in ESTIMATORS:
        agent = PMOE("Pendulum-v1", router_grad=router_grad, **SMALL)
        found, about = gradients(agent, 64)
        assert float(found["router.weight"].abs().max()) > 0, router_grad
        if router_grad != "blend":
            shares = [float(about[f"train/expert_{k}"]) for k in range(4)]
            assert sum(shares) == pytest.approx(1)


def test_rows_draw_their_experts_for_themselves() -> None:
    """One observation 4,000 times: each expert acts as often as its weight says, to five standard errors."""
    agent = PMOE("Pendulum-v1", n_experts=3, **SMALL)
    with torch.no_grad():
        agent.actor.head.weight.zero_()
        agent.actor.head.bias.copy_(torch.tensor([-1.0, -20.0, 0.0, -20.0, 1.0, -20.0]))  # means; deviations e^-20
        agent.actor.router.weight.zero_()
        agent.actor.router.bias.copy_(torch.tensor([0.2, 0.3, 0.5]).log())
    obs = torch.zeros(4000, 3)
    sampled = agent.explore(obs)["action"]
    frequencies = [(sampled * sign > 0.5).float().mean().item() for sign in (-1.0, 1.0)]
    assert frequencies == pytest.approx([0.2, 0.5], abs=5 * math.sqrt(0.25 / 4000))
    assert agent.act(obs[:5], deterministic=True).squeeze(1).tolist() == pytest.approx([math.tanh(1)] * 5)
    both = PMOE("Pendulum-v1", n_experts=3, eval_expert="sampled", **SMALL)
    both.actor.load_state_dict(agent.actor.state_dict())
    means = both.act(obs, deterministic=True)
    assert {round(a, 4) for a in means.unique().tolist()} == {round(math.tanh(m), 4) for m in (-1, 0, 1)}
    assert (means > 0.5).float().mean().item() == pytest.approx(0.5, abs=5 * math.sqrt(0.25 / 4000))


@pytest.mark.slow
@pytest.mark.parametrize("router_grad", ESTIMATORS)
def test_a_compiled_run_is_the_eager_one_up_to_rounding(router_grad: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Fixed experts far apart, so that rounding does not change which one is the best."""
    fields = {**SMALL, "n_experts": 3, "router_grad": router_grad, "entropy": "mixture", "expert_init_spread": 2.0}
    eager, compiled = (PMOE("Pendulum-v1", compile=how, **fields).learn(40) for how in ("off", "on"))
    said = capfd.readouterr().err
    assert "compiled `step`" in said
    assert "compile failed" not in said
    for name in ("actor", "critic", "critic_target", "log_alpha"):
        for a, b in zip(getattr(eager, name).parameters(), getattr(compiled, name).parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_experts_begin_apart_where_asked() -> None:
    plain, spread = (PMOE("Pendulum-v1", expert_init_spread=s, **SMALL).actor for s in (0.0, 0.5))
    moved = (spread.head.bias - plain.head.bias).detach().view(4, 2)
    torch.testing.assert_close(moved[:, 0], torch.linspace(-0.5, 0.5, 4))
    assert torch.equal(moved[:, 1], torch.zeros(4))
    torch.manual_seed(0)
    many = Experts(3, 5, PMOE.Config(expert_init_spread=2.0, n_experts=6))
    torch.manual_seed(0)
    same = Experts(3, 5, PMOE.Config(n_experts=6))
    moved = (many.head.bias - same.head.bias).detach().view(6, 2, 5)
    torch.testing.assert_close(moved[:, 0].norm(dim=1), torch.full((6,), 2.0))
    assert torch.equal(moved[:, 1], torch.zeros(6, 5))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="n_experts"):
        PMOE("Pendulum-v1", n_experts=0)
    with pytest.raises(UserError, match="Discrete"):
        PMOE("CartPole-v1")
    with pytest.raises(UserError, match="router_grad"):
        PMOE("Pendulum-v1", router_grad="reinforce")


# Bandits: one state, a known value, and where the policy has to end


class Bumps(nn.Module):
    """Q(a) = sum of heights times exp(-(a -+ 0.6)^2 / (2 0.15^2)), as one critic."""

    def __init__(self, left: float, right: float) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, obs: Tensor, action: Tensor, masks: Any = ()) -> Tensor:
        a = action.squeeze(-1)
        return sum(h * torch.exp(-((a - c) ** 2) / 0.045) for h, c in ((self.left, -0.6), (self.right, 0.6)))[None]


def bandit(left: float, right: float, k: int, alpha: float = 0.02, **fields: Any) -> tuple[PMOE, Tensor, Tensor]:
    """Train on the bumps; returns (agent, 2,000 sampled actions, weights)."""
    agent = PMOE("Pendulum-v1", n_experts=k, **{**SMALL, **fields})
    agent.critic = Bumps(left, right)
    with torch.no_grad():
        agent.actor.head.weight.zero_()
        means = torch.linspace(-0.3, 0.3, k) if k > 1 else torch.tensor([0.05])
        agent.actor.head.bias.copy_(torch.stack([means, torch.full((k,), math.log(0.2))], 1).flatten())
        if k > 1:
            agent.actor.router.weight.zero_()
            agent.actor.router.bias.zero_()
    free = [agent.actor.head.bias, *([agent.actor.router.bias] if k > 1 else [])]  # no network in between
    optimizer = Adam(free, 3e-3)
    obs, temperature = torch.zeros(64, 3), torch.tensor(alpha)
    for _ in range(2000):
        noise = {"actor": agent._noise("noise", 64, agent.experts), "expert": agent._uniform("expert", 64)}
        loss, _, _ = agent._actor_loss(obs, noise, [], temperature)
        descend(optimizer, loss)
    with torch.no_grad():
        actions = agent.explore(torch.zeros(2000, 3))["action"].squeeze(1)
        weights = agent.actor(obs[:1])[2].exp()[0]
    return agent, actions, weights


def near(actions: Tensor, mode: float) -> float:
    return float(((actions - mode).abs() < 0.2).float().mean())


def test_two_experts_hold_both_modes_and_one_holds_one() -> None:
    _, actions, weights = bandit(1.0, 1.0, k=2)
    assert min(near(actions, -0.6), near(actions, 0.6)) >= 0.2
    assert near(actions, -0.6) + near(actions, 0.6) > 0.95
    assert all(0.2 < float(w) < 0.8 for w in weights)
    _, actions, _ = bandit(1.0, 1.0, k=1)
    assert max(near(actions, -0.6), near(actions, 0.6)) >= 0.95
    _, actions, _ = bandit(1.0, 1.0, k=2, router_grad="blend")
    assert min(near(actions, -0.6), near(actions, 0.6)) < 0.05


def test_frequency_takes_the_better_mode_and_the_exact_gradient_weighs_them() -> None:
    """Heights 0.9 and 1: the better expert wins nearly always, so its weight is >= 0.95, though the other stays at its
    mode. The optimum of reward plus alpha times the mixture's entropy, alpha 0.2, is w = 1 / (1 + exp(-gap / alpha)),
    about 0.62 for a gap of 0.1.
    """
    agent, _, weights = bandit(0.9, 1.0, k=2)
    assert float(weights[1]) >= 0.95
    mean = torch.tanh(agent.actor(torch.zeros(1, 3))[0][0, :, 0]).tolist()
    assert mean == pytest.approx([-0.6, 0.6], abs=0.1)
    _, _, weights = bandit(0.9, 1.0, k=2, alpha=0.2, router_grad="exact", entropy="mixture")
    assert 0.5 < float(weights[1]) < 0.8
