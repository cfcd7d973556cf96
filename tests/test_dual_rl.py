"""f-DVL: implicit maximisers against their closed forms, tables, one update by hand, and learning from mixed data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import PlainUpdate
from torch.nn import functional as F

import rlkit
from rlkit.envs import swing_up
from rlkit.errors import UserError
from rlkit.trainers.dual_rl import (
    MAXIMISERS,
    DualRLConfig,
    cloning_weight,
    critic_loss,
    discounted_value,
    gumbel,
    lam_of,
    normal_logp,
    policy_loss,
)

Loss = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
EXAMPLE = torch.tensor([0.0, 1.0, 3.0, 10.0], dtype=torch.float64)


def minimisers(loss: Loss, q: torch.Tensor, lam: float) -> np.ndarray:
    """argmin_v mean loss(q, v, lam) of a convex loss for each row of q: where the derivative turns, by bisection."""
    low, high = q.min(1).values - 50.0, q.max(1).values + 50.0
    for _ in range(100):
        v = ((low + high) / 2).requires_grad_()
        (slope,) = torch.autograd.grad(loss(q, v[:, None].expand_as(q), lam).sum(), v)
        v = v.detach()
        low, high = torch.where(slope < 0, v, low), torch.where(slope < 0, high, v)
    found: np.ndarray = ((low + high) / 2).numpy()
    return found


def minimiser(loss: Loss, q: torch.Tensor, lam: float) -> float:
    return float(minimisers(loss, q[None], lam)[0])


def unclipped(q: torch.Tensor, v: torch.Tensor, lam: float) -> torch.Tensor:
    """Gumbel's loss with a gradient everywhere, which bisection from afar needs."""
    return gumbel(q, v, lam, math.inf)


# --- implicit maximisers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lam", "literal", "one_sided", "exact"),
    [
        (0.5, 4.000, 4.000, 4.500),
        (0.7, 5.000, 8.571, 8.571),
        (0.9, 5.370, 10.000, 11.111),
        (0.99, 5.640, 10.000, 11.919),
        (0.999, 5.664, 10.000, 11.992),
    ],
)
def test_chi_square_on_four_values(lam: float, literal: float, one_sided: float, exact: float) -> None:
    """Q = 0, 1, 3, 10. By hand at 0.7: one-sided, only 10 is above V, 1/4 (1 + (10 - V)/2) = 3/7, V = 60/7 = 8.571."""
    for name, expected in (("chi2_literal", literal), ("chi2", one_sided), ("chi2_exact", exact)):
        assert minimiser(MAXIMISERS[name], EXAMPLE, lam) == pytest.approx(expected, abs=6e-4), name


@pytest.mark.parametrize("lam", [0.6, 0.8, 0.9])
def test_total_variation_is_a_quantile(lam: float) -> None:
    q = torch.from_numpy(np.random.default_rng(0).normal(size=4_001))
    assert minimiser(MAXIMISERS["tv"], q, lam) == pytest.approx(float(np.quantile(q, 2 - 1 / lam)), abs=1e-3)


@pytest.mark.parametrize("lam", [0.3, 0.5, 0.8])
def test_exact_chi_square_satisfies_its_first_order_condition(lam: float) -> None:
    """E max(0, 1 + (Q - V) / 2) = (1 - lam) / lam; unclipped, V = E Q + 2 (2 lam - 1) / lam."""
    q = torch.from_numpy(np.random.default_rng(1).normal(size=4_000))
    v = minimiser(MAXIMISERS["chi2_exact"], q, lam)
    assert float((1 + (q - v) / 2).clamp(min=0).mean()) == pytest.approx((1 - lam) / lam, abs=1e-6)
    if lam < 0.5:
        assert v == pytest.approx(float(q.mean()) + 2 * (2 * lam - 1) / lam, abs=1e-6)


@pytest.mark.parametrize("beta", [0.5, 2.0, 8.0])
def test_gumbel_is_log_mean_exp(beta: float) -> None:
    expected = beta * float(torch.logsumexp(EXAMPLE / beta, 0) - math.log(4))
    assert minimiser(unclipped, EXAMPLE, beta) == pytest.approx(expected, abs=1e-6)


def test_gumbel_is_its_formula_and_never_overflows() -> None:
    """Times exp(c) it is exp(z) - z - 1; values far above V have a finite loss, and no gradient above the clip."""
    q, v = torch.tensor([0.5, -2.0, 3.0]), torch.zeros(3)
    z = q / 2.0
    torch.testing.assert_close(gumbel(q, v, 2.0) * z.max().exp(), z.exp() - z - 1)
    far = torch.tensor([1e6, -1e6, 0.0])
    v.requires_grad_()
    loss = gumbel(far, v, 1.0).sum()
    (slope,) = torch.autograd.grad(loss, v)
    assert torch.isfinite(loss)
    assert torch.isfinite(slope).all()
    assert slope[0] == 0


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.9])
def test_expectile(tau: float) -> None:
    """tau E (Q - V)+ = (1 - tau) E (V - Q)+; the mean at a half."""
    v = minimiser(MAXIMISERS["expectile"], EXAMPLE, tau)
    above, below = (EXAMPLE - v).clamp(min=0).mean(), (v - EXAMPLE).clamp(min=0).mean()
    assert tau * float(above) == pytest.approx((1 - tau) * float(below), abs=1e-9)
    if tau == 0.5:
        assert v == pytest.approx(3.5)


@pytest.mark.parametrize(
    ("name", "lams"), [("chi2", (0.5, 0.7, 0.99)), ("tv", (0.6, 0.8, 0.99)), ("gumbel", (9, 1, 0.1))]
)
def test_they_rise_to_the_maximum(name: str, lams: tuple[float, ...]) -> None:
    loss = unclipped if name == "gumbel" else MAXIMISERS[name]
    found = [minimiser(loss, EXAMPLE, lam) for lam in lams]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(10, abs=0.2)
    assert max(found) <= 10 + 1e-6


# --- other losses ------------------------------------------------------------------------------------------------


def test_weights_are_cut_and_never_overflow() -> None:
    advantage = torch.tensor([-1.0, 0.0, 0.5, 1e6])
    torch.testing.assert_close(
        cloning_weight(advantage, 3.0, 100.0), torch.tensor([math.exp(-3), 1.0, math.exp(1.5), 100.0])
    )
    assert cloning_weight(advantage, 0.0, 100.0).tolist() == [1.0] * 4
    logp = torch.tensor([1.0, 2.0], requires_grad=True)
    weight = torch.tensor([3.0, 5.0], requires_grad=True)
    loss = policy_loss(logp, weight)
    assert loss.item() == -6.5
    loss.backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == [-1.5, -2.5]
    assert weight.grad is None


def test_values_after_terminal_states() -> None:
    discount, done, value = torch.tensor([0.5, 0.5]), torch.tensor([False, True]), torch.tensor([4.0, 4.0])
    assert discounted_value(discount, done, value).tolist() == [2.0, 0.0]
    assert discounted_value(discount, done, value, -20.0).tolist() == [2.0, -10.0]
    assert discounted_value(discount, None, value).tolist() == [2.0, 2.0]


def test_critic_loss_sums_over_critics() -> None:
    """Squared errors 1 and 9 averaged, twice; Huber of 2: 1/2 of 1, and 2 (3 - 1)."""
    q = torch.tensor([[1.0, 3.0], [1.0, 3.0]])
    assert critic_loss(q, torch.zeros(2)).item() == 10.0
    assert critic_loss(q, torch.zeros(2), 2.0).item() == pytest.approx(2 * (0.5 + 4.0) / 2)


def test_log_probability() -> None:
    action, mean, log_std = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([-1.0, 0.0, 0.3])
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(action).sum(1)
    torch.testing.assert_close(normal_logp(action, mean, log_std), expected)


# --- tables ------------------------------------------------------------------------------------------------------


def chain() -> tuple[np.ndarray, np.ndarray]:
    """Six states in a row, left and right: next states (6, 2), rewards (6, 2); 1 for arriving at the right end."""
    states = np.arange(6)
    after = np.stack([np.maximum(states - 1, 0), np.minimum(states + 1, 5)], 1)
    return after, (after == 5) & (states[:, None] != 5)


def backup(v: np.ndarray) -> np.ndarray:
    """Q(s, a) = r + V(s') / 2: (6, 2)."""
    after, reward = chain()
    return reward + 0.5 * v[after]


def fixed_point(name: str, lam: float, recorded: np.ndarray) -> np.ndarray:
    """V of f-DVL on the chain: V <- argmin over each state's recorded actions of the values that V gives them.

    An action that is not recorded counts as the other one twice.
    """
    v = np.zeros(6)
    for _ in range(25):
        q = backup(v)
        v = minimisers(MAXIMISERS[name], torch.from_numpy(np.where(recorded, q, q[:, ::-1])), lam)
    return v


def optimal(recorded: np.ndarray) -> np.ndarray:
    v = np.zeros(6)
    for _ in range(60):
        v = np.where(recorded, backup(v), -np.inf).max(1)
    return v


@pytest.mark.parametrize(("name", "lams"), [("tv", (0.6, 0.99)), ("chi2", (0.6, 0.99))])
def test_tables_reach_the_optimum_of_recorded_actions(name: str, lams: tuple[float, float]) -> None:
    """With all actions recorded V*, monotone in lam; where `right` is missing in state 3, what is left without it."""
    everything = np.ones((6, 2), bool)
    low, high = (fixed_point(name, lam, everything) for lam in lams)
    np.testing.assert_allclose(high, optimal(everything), atol=1e-5)
    assert (low <= high + 1e-9).all()
    assert low[0] < high[0] - 0.01
    without = everything.copy()
    without[3, 1] = False
    np.testing.assert_allclose(fixed_point(name, 0.99, without), optimal(without), atol=1e-5)
    assert optimal(without)[2] < optimal(everything)[2]


# --- the trainer -------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [16]}, "batch_size": 32, "device": "cpu", "eval_episodes": 0, "compile": "off",
    "learning_rate": 1e-2, "tau": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return swing_up.recording((0.0, 0.9), episodes=2)


@pytest.mark.parametrize("name", MAXIMISERS)
def test_one_update_is_v_then_policy_then_critics_then_targets(name: str, data: dict[str, Any]) -> None:
    """The same step by PyTorch's own Adam and autograd, on copies of the networks."""
    agent = rlkit.DualRL(
        "Pendulum-v1",
        data=data,
        divergence=name,
        huber_delta=2.0,
        return_range=50.0,
        seed=3,
        policy_schedule="constant",
        **SMALL,
    )
    agent.learn(3)  # so that targets differ from critics, and moments from zero
    config, batch = agent.config, agent.batch()
    lam = lam_of(config)
    plain = PlainUpdate(agent, ("value", "actor", "critic"), ("critic_target",))
    nets, take = plain.nets, plain.take
    obs, action, next_obs = batch["obs"], batch["action"], batch["next_obs"]
    with torch.no_grad():
        q_bar = torch.minimum(*nets["critic_target"](obs, action))
    take("value", MAXIMISERS[name](q_bar, nets["value"](obs), lam).mean())
    with torch.no_grad():
        weight = (3.0 * (q_bar - nets["value"](obs))).exp().clamp(max=100)
    mean, log_std = nets["actor"](obs)
    take("actor", -(weight * torch.distributions.Normal(mean, log_std.exp()).log_prob(action).sum(1)).mean())
    with torch.no_grad():
        y = batch["reward"] + 0.99 * ~batch["terminated"].bool() * nets["value"](next_obs)
    q1, q2 = nets["critic"](obs, action)
    take("critic", F.huber_loss(q1, y, delta=2.0) + F.huber_loss(q2, y, delta=2.0))
    plain.average("critic_target", "critic", 0.1)

    agent.update(batch)
    plain.compare()


def test_random_actions_take_part_in_the_loss_of_v_alone(data: dict[str, Any]) -> None:
    """With lam = 1 V stays above values of recorded actions and of uniform ones, so it is at least as high."""
    with_random = rlkit.DualRL("Pendulum-v1", data=data, random_actions=4, seed=0, **SMALL)
    batch = with_random.batch()
    noise = with_random.noise(32)["uniform"]
    assert noise.shape == (4, 32, 1)
    assert noise.min() < -0.9
    assert noise.max() > 0.9
    obs, action = batch["obs"], batch["action"]
    q = [with_random.critic_target(obs, a).min(0).values for a in (action, *noise)]
    expected = torch.stack([MAXIMISERS["chi2"](x, with_random.value(obs), 0.8).mean() for x in q]).mean()
    got = with_random._step(batch, [], {"uniform": noise})
    torch.testing.assert_close(got["train/value_loss"], expected.detach())


def test_no_temperature_is_behaviour_cloning(data: dict[str, Any]) -> None:
    """The policy is the same whatever the rewards are."""
    other = {**data, "rewards": -3 * data["rewards"]}
    agents = [
        rlkit.DualRL("Pendulum-v1", data=d, policy_temperature=0.0, seed=0, **SMALL).learn(20) for d in (data, other)
    ]
    for a, b in zip(agents[0].actor.parameters(), agents[1].actor.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(agents[0].critic.parameters()), next(agents[1].critic.parameters()))


def test_the_policys_learning_rate_falls_as_a_cosine(data: dict[str, Any]) -> None:
    agent = rlkit.DualRL("Pendulum-v1", data=data, seed=0, **SMALL)
    seen: list[tuple[float, float]] = []
    agent.learn(40, callback=lambda t: seen.append((t.actor_optimizer.learning_rate, t.critic_optimizer.learning_rate)))
    rates, others = zip(*seen, strict=True)
    assert set(others) == {1e-2}
    assert list(rates) == sorted(rates, reverse=True)
    assert rates[len(rates) // 2] == pytest.approx(0.5e-2, rel=0.15)
    assert rates[-1] < 1e-3
    constant = rlkit.DualRL("Pendulum-v1", data=data, policy_schedule="constant", seed=0, **SMALL).learn(40)
    assert constant.actor_optimizer.learning_rate == 1e-2


def test_actions_stay_inside_and_the_mode_is_the_mean(data: dict[str, Any]) -> None:
    agent = rlkit.DualRL("Pendulum-v1", data=data, seed=0, **SMALL)
    obs = np.stack([agent.observation_space.sample() for _ in range(200)])
    noisy = agent.predict(obs)[0]
    assert np.abs(noisy).max() == pytest.approx(2.0), "a standard deviation of 1 reaches the bounds"
    mean, _ = agent.actor(torch.from_numpy(obs))
    np.testing.assert_allclose(agent.predict(obs, deterministic=True)[0], 2 * mean.detach().numpy(), rtol=1e-5)


def test_dropout_is_in_the_policys_training_alone(data: dict[str, Any]) -> None:
    kwargs = {**SMALL, "policy_kwargs": {"net_arch": [16], "policy_dropout": 0.5}}
    agent = rlkit.DualRL("Pendulum-v1", data=data, seed=0, **kwargs)
    masks = agent.actor.net.masks(32, agent.rng["dropout"])
    assert masks[0].shape == (1, 32, 16)
    assert set(masks[0].unique().tolist()) == {0.0, 2.0}
    obs = agent.observation_space.sample()
    first, second = (agent.predict(obs, deterministic=True)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_on_it_goes_online(data: dict[str, Any]) -> None:
    agent = rlkit.DualRL(
        "Pendulum-v1", data=data, offline_steps=20, learning_starts=0, buffer_size=100, seed=0, **SMALL
    ).learn(50)
    assert (agent.updates, len(agent.buffer)) == (50, 30)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"divergence": "tv", "lam": 0.5}, "V is the quantile 2 - 1 / lam: give more than 0.5"),
        ({"divergence": "tv", "lam": 1.2}, "it is at most 1"),
        ({"divergence": "expectile", "lam": 1.0}, "it is at most 1, exclusive"),
        ({"lam": 1.0}, "nothing keeps V from growing but `random_actions`"),
        ({"lam": 0.0}, "lam"),
        ({"divergence": "reverse-kl"}, "divergence"),
        ({"policy_temperature": -1.0}, "policy_temperature"),
        ({"offline_steps": 5, "learning_starts": 0, "n_steps": 2}, "n_steps"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str, data: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        rlkit.DualRL("Pendulum-v1", data=data, **{**SMALL, **fields})
    assert message in str(caught.value)


def test_without_data_there_is_nothing_to_learn_from() -> None:
    with pytest.raises(UserError, match="there is no `data` to learn from"):
        rlkit.DualRL("Pendulum-v1", **SMALL)


def test_defaults_of_lam() -> None:
    found = {name: lam_of(DualRLConfig(divergence=name)) for name in MAXIMISERS}
    assert found == {"chi2": 0.8, "chi2_literal": 0.8, "chi2_exact": 0.8, "tv": 0.8, "gumbel": 2.0, "expectile": 0.7}


# --- recordings of a controller ----------------------------------------------------------------------------------


def test_the_recordings_have_the_quality_they_say() -> None:
    """Skill 1 is close to what SAC reaches (about -150), skill 0 is random (about -1200)."""
    returns = [
        swing_up.recording((skill,), episodes=6)["rewards"].reshape(6, 200).sum(1).mean() for skill in (0.0, 0.5, 1.0)
    ]
    assert returns[0] < -950
    assert -950 < returns[1] < -500
    assert returns[2] > -250


def test_recordings_are_episodes_with_time_limits() -> None:
    found = swing_up.recording((0.5,), episodes=2, seed=4)
    assert {name: array.shape for name, array in found.items()} == {
        "observations": (400, 3), "actions": (400, 1), "rewards": (400,), "next_observations": (400, 3),
        "timeouts": (400,), "terminals": (400,),
    }  # fmt: skip
    assert np.flatnonzero(found["timeouts"]).tolist() == [199, 399]
    inside = np.arange(399) != 199
    np.testing.assert_array_equal(found["observations"][1:][inside], found["next_observations"][:-1][inside])
    again = swing_up.recording((0.5,), episodes=2, seed=4)
    np.testing.assert_array_equal(found["actions"], again["actions"])
