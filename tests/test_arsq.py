"""ARSQ's mathematics against enumerations and closed forms, and what it is for on tasks with known answers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor

import rlkit
from rlkit.envs.coordination import parity_data
from rlkit.errors import UserError
from rlkit.trainers.arsq import (
    ARSQConfig,
    ARSQNetConfig,
    ChoiceNet,
    SoftCritic,
    bc_loss,
    chosen,
    conditioning,
    cql_penalty,
    decode,
    encode,
    margin_penalty,
    soft_advantage,
    soft_q,
    td_loss,
    td_target,
)


def critic(levels: int = 2, d: int = 2, bins: int = 3, temperature: float = 0.3, **fields: Any) -> SoftCritic:
    """Random weights of order 1."""
    torch.manual_seed(0)
    net = ARSQNetConfig(net_arch=(16, 16), ortho_init=False)
    config = ARSQConfig(levels=levels, bins=bins, temperature=temperature, policy_kwargs=net, **fields)
    made = SoftCritic(3, d, config)
    with torch.no_grad():
        made.advantage_net.head *= 5
    return made


def every_action(levels: int, d: int, bins: int) -> Tensor:
    """(bins^(L D), L, D): all of them."""
    return torch.tensor(list(itertools.product(range(bins), repeat=levels * d))).view(-1, levels, d)


# --- actions as bins -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("levels", "bins", "error"), [(1, 41, 0.0244), (2, 7, 0.0204), (3, 5, 0.0080), (1, 2, 0.5)])
def test_bins_are_inverse_to_centres_and_as_fine_as_promised(levels: int, bins: int, error: float) -> None:
    """encode(decode(b)) = b for all b; the largest error of an action is bins^-L, reached at the edges."""
    every = torch.tensor(list(itertools.product(range(bins), repeat=levels))).unsqueeze(-1)
    assert torch.equal(encode(decode(every, levels, bins), levels, bins), every)
    actions = torch.cat([torch.linspace(-1, 1, 20_001), torch.tensor([-1.0, 1.0, -0.0, 1 - 1e-7])]).unsqueeze(-1)
    away = (decode(encode(actions, levels, bins), levels, bins) - actions).abs().max()
    assert float(away) == pytest.approx(bins**-levels, abs=1e-6)
    assert float(away) == pytest.approx(error, abs=5e-5)


def test_the_worked_example_of_two_levels() -> None:
    """0.5 with 3 bins: level 0 has [-1, -1/3, 1/3, 1], bin 2; level 1 divides [1/3, 1] into ninths of 2: bin 0, whose
    interval [1/3, 5/9] has the centre 4/9.
    """
    indices = encode(torch.tensor([[0.5, -1.0]]), 2, 3)
    assert indices.tolist() == [[[2, 0], [0, 0]]]
    torch.testing.assert_close(decode(indices, 2, 3), torch.tensor([[4 / 9, -8 / 9]]))
    # c_p: nothing chosen; dimension 0 in [1/3, 1]; both at level 0; and dimension 0 at level 1.
    expected = torch.tensor([[[0, 0], [2 / 3, 0], [2 / 3, -2 / 3], [4 / 9, -2 / 3]]])
    torch.testing.assert_close(conditioning(indices, 3), expected)
    by_level = torch.tensor([[[0, 0], [0, 0], [2 / 3, -2 / 3], [2 / 3, -2 / 3]]])
    torch.testing.assert_close(conditioning(indices, 3, "level"), by_level)
    assert conditioning(indices, 3, "none").abs().max() == 0


def test_what_is_outside_counts_as_the_edge() -> None:
    assert encode(torch.tensor([[-3.0, 3.0]]), 2, 5).tolist() == [[[0, 4], [0, 4]]]


def test_decode_checks_its_levels() -> None:
    with pytest.raises(UserError, match="2 levels of indices, expected 3"):
        decode(torch.zeros(1, 2, 2, dtype=torch.int64), 3, 5)


# --- the joint value -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["all", "level", "none"])
@pytest.mark.parametrize(("levels", "d", "bins"), [(2, 2, 3), (1, 4, 3), (1, 1, 5), (4, 1, 3)])
def test_the_soft_value_of_all_actions_is_v(levels: int, d: int, bins: int, kind: Any) -> None:
    """alpha log sum_a exp(Q / alpha) = V and sum_a exp((Q - V) / alpha) = 1, by enumeration."""
    made = critic(levels, d, bins, conditioning=kind, zero_action=True)
    actions = every_action(levels, d, bins)
    for obs in torch.randn(4, 3):
        rows = obs.expand(len(actions), -1)
        value, advantage = made.value(rows), made.advantage(rows, actions)
        q = soft_q(value, advantage, actions.flatten(1)).double()
        soft = 0.3 * torch.logsumexp(q / 0.3, 1)
        torch.testing.assert_close(soft, value[:, 0].double(), atol=1e-4, rtol=0)
        torch.testing.assert_close(((q - value) / 0.3).exp().sum(1), torch.ones(2).double(), atol=1e-4, rtol=0)
        assert (q <= value + 1e-5).all()


def test_a_choice_depends_on_those_before_it_and_on_no_other() -> None:
    made = critic(2, 3, 5)
    obs, indices = torch.randn(1, 3), torch.randint(5, (1, 2, 3))
    before = made.advantage(obs, indices)[:, 0]
    for q in range(6):
        changed = indices.flatten(1).clone()
        changed[0, q] = (changed[0, q] + 2) % 5
        after = made.advantage(obs, changed.view(1, 2, 3))[:, 0]
        moved = (after - before).abs().amax(dim=(0, 2)) > 1e-6  # (P,)
        assert moved.tolist() == [p > q for p in range(6)], f"choice {q}"


@pytest.mark.parametrize("kind", ["all", "level", "none"])
def test_acting_and_training_see_the_same_advantages(kind: Any) -> None:
    """Each sampled choice is the largest of A / alpha + noise by the A of the training pass over the whole action."""
    made = critic(3, 2, 3, conditioning=kind)
    obs, noise = torch.randn(64, 3), -torch.empty(64, 6, 3).exponential_().log()
    indices = made.choose(obs, noise)
    preference = made.advantage(obs, indices).min(0).values / made.temperature + noise
    assert torch.equal(preference.argmax(-1), indices.flatten(1))
    greedy = made.choose(obs)
    assert torch.equal(made.advantage(obs, greedy).min(0).values.argmax(-1), greedy.flatten(1))
    assert not torch.equal(greedy, indices)


def test_sampled_actions_have_the_probabilities_of_q() -> None:
    """One critic, 9 actions, 100,000 draws: frequencies within five standard errors of exp((Q - V) / alpha)."""
    torch.manual_seed(0)
    config = ARSQConfig(
        levels=1, bins=3, temperature=0.3, policy_kwargs=ARSQNetConfig(net_arch=(8,), n_critics=1, ortho_init=False)
    )
    made = SoftCritic(3, 2, config)
    obs, actions, n = torch.randn(1, 3), every_action(1, 2, 3), 100_000
    with torch.no_grad():
        drawn = made.choose(obs.expand(n, -1), -torch.empty(n, 2, 3).exponential_().log()).flatten(1)
        advantage = made.advantage(obs.expand(9, -1), actions)
    expected = (chosen(advantage, actions.flatten(1)).sum(-1) / 0.3).exp()[0]
    found = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9) / n
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()


def test_one_pass_with_a_head_a_step_is_the_naive_evaluation_of_all_heads() -> None:
    """The definition: concatenate state and centre, compute every head for every step, keep the step's own.

    Values and gradients of the shared weights agree.
    """
    torch.manual_seed(0)
    n, rows, steps, d, outputs = 2, 5, 6, 3, 4
    net = ChoiceNet(n, 7, d, steps, outputs, (16, 16), "tanh").double()
    obs, centres = torch.randn(rows, 7).double(), torch.rand(rows, steps, d).double() * 2 - 1
    head = torch.randn_like(net.head)
    net.head.data.copy_(head)

    def naive() -> Tensor:
        found = []
        for i in range(n):
            first = torch.cat([net.of_state.weight[i], net.of_centre[i]])
            x = torch.cat([obs.unsqueeze(1).expand(-1, steps, -1), centres], -1)
            h = torch.tanh(x @ first + net.of_state.bias[i])
            layer: Any = net.hidden[0]
            h = torch.tanh(h @ layer.weight[i] + layer.bias[i])
            every = torch.einsum("bsh,tho->bsto", h, net.head[i])  # all heads t for all steps s
            found.append(torch.stack([every[:, p, p] for p in range(steps)], 1) + net.head_bias[i])
        return torch.stack(found)

    fast = net(net.embed(obs), centres)
    torch.testing.assert_close(fast, naive())
    weights = [net.of_state.weight, net.of_centre, net.head]
    a = torch.autograd.grad(fast.square().sum(), weights)
    b = torch.autograd.grad(naive().square().sum(), weights)
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right)
    part = net(net.embed(obs), centres[:, 2:4], 2)
    torch.testing.assert_close(part, fast[:, :, 2:4])


# --- losses ----------------------------------------------------------------------------------------------------------


def test_targets_and_the_consistency_loss_on_numbers() -> None:
    """y = r + gamma (1 - terminated) min_i V_i: 1 + 0.9 * 2 = 2.8 and, terminal, 1. (3 - 2.8)^2 and (0 - 1)^2, mean
    0.52; the second critic (2.8, 2): 0 and 1, mean 0.5; sum 1.02.
    """
    y = td_target(torch.ones(2), torch.full((2,), 0.9), torch.tensor([False, True]), torch.tensor([[2.0, 5], [3, 4]]))
    torch.testing.assert_close(y, torch.tensor([2.8, 1.0]))
    torch.testing.assert_close(td_loss(torch.tensor([[3.0, 0.0], [2.8, 2.0]]), y), torch.tensor(1.02))


def test_behaviour_cloning_on_numbers() -> None:
    """A = (0, -1, -3), demonstrated bin 1 (A_e = -1). The others are ahead by 1 and by -2.

    margin, C = -1: (max(-1, 1) + max(-1, -2)) / 2 = 0; summed 0; with C = -3: (1 - 2) / 2 = -0.5.
    cql, T = 1: log(e^0 + e^-3) + 1 = 1.04859; T = 0.5: 0.5 log(1 + e^-6) + 1 = 1.00124.
    """
    advantage = torch.tensor([0.0, -1.0, -3.0]).view(1, 1, 1, 3)
    e = torch.tensor([[1]])
    assert float(margin_penalty(advantage, e, -1.0)) == pytest.approx(0.0)
    assert float(margin_penalty(advantage, e, -1.0, mean=False)) == pytest.approx(0.0)
    assert float(margin_penalty(advantage, e, -3.0)) == pytest.approx(-0.5)
    assert float(margin_penalty(advantage, e, -3.0, mean=False)) == pytest.approx(-1.0)
    assert float(margin_penalty(advantage, e, 1.5)) == pytest.approx(1.5)
    assert float(cql_penalty(advantage, e, -1.0)) == pytest.approx(1.0 + math.log(1 + math.exp(-3)))
    assert float(cql_penalty(advantage, e, -1.0, 0.5)) == pytest.approx(1.0 + 0.5 * math.log(1 + math.exp(-6)))
    assert float(cql_penalty(advantage, e, 2.0)) == pytest.approx(2.0)


def test_behaviour_cloning_is_of_demonstrations_and_averaged_as_asked() -> None:
    """Two critics, penalties (1, 2, 3, 4) and (5, 6, 7, 8), the first two rows demonstrated: 3 + 11 = 14 in all, by 2
    or by 4 rows; without demonstrations it is 0.
    """
    penalty, demo = torch.arange(1.0, 9.0).view(2, 4), torch.tensor([True, True, False, False])
    assert float(bc_loss(penalty, demo)) == 7.0
    assert float(bc_loss(penalty, demo, over_batch=True)) == 3.5
    assert float(bc_loss(penalty, torch.zeros(4))) == 0.0


def test_a_positive_margin_leaves_a_uniform_policy_alone() -> None:
    """From equal bins, C = +1: only bins more than 1 ahead are pushed, and none is, so the gradient is exactly 0."""
    raw = torch.zeros(1, 2, 2, 5, requires_grad=True)
    e = torch.tensor([[0, 3], [1, 1]])
    penalty = margin_penalty(soft_advantage(raw, 0.1), e, 1.0)
    (grad,) = torch.autograd.grad(penalty.sum(), raw)
    assert torch.equal(grad, torch.zeros_like(raw))
    (grad,) = torch.autograd.grad(margin_penalty(soft_advantage(raw, 0.1), e, -1.0).sum(), raw)
    assert (grad.gather(-1, e.view(1, 2, 2, 1)) < 0).all()


# --- tasks with known answers ----------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "levels": 1,
    "bins": 2,
    "zero_action": False,
    "bc_coef": 0.0,
    "demo_fraction": 0.0,
    "offline_steps": "all",
    "learning_rate": 3e-3,
    "batch_size": 64,
    "tau": 0.1,
    "policy_kwargs": {"net_arch": [32, 32]},
    "device": "cpu",
}


def learned(data: Any, updates: int, env: Any = None, **fields: Any) -> rlkit.ARSQ:
    d = np.asarray(data["actions"]).shape[1]
    given = {"env": "rlkit/ParityBandit-v0", "env_kwargs": {"dimensions": d}} if env is None else {"env": env}
    return rlkit.ARSQ(data=data, **given, **{**SMALL, **fields}).learn(updates)


def q_table(agent: rlkit.ARSQ) -> tuple[Tensor, Tensor]:
    """V and Q of all actions in the one state, the mean of both critics."""
    actions = every_action(agent.config.levels, agent.action_dim, agent.config.bins)
    obs = torch.zeros(len(actions), 1)
    with torch.no_grad():
        value, advantage = agent.critic.value(obs), agent.critic.advantage(obs, actions)
        return value[:, 0].mean(), soft_q(value, advantage, actions.flatten(1)).mean(0)


def matrix_game() -> dict[str, np.ndarray]:
    """r(0,0) = 1, r(0,1) = -1, r(1,0) = 0.1, r(1,1) = -1, seen in 10, 40, 40 and 10 % of the rows."""
    rows = [(0, 0, 1.0)] + 4 * [(0, 1, -1.0)] + 4 * [(1, 0, 0.1)] + [(1, 1, -1.0)]
    table = np.array(rows * 4)
    obs, ends = np.zeros((len(table), 1), np.float32), np.ones(len(table), bool)
    return {
        "observations": obs, "next_observations": obs, "actions": (table[:, :2] - 0.5).astype(np.float32),
        "rewards": table[:, 2], "terminals": ends, "timeouts": ~ends,
    }  # fmt: skip


@pytest.mark.parametrize(("temperature", "value"), [(0.5, 1.0922), (0.1, 1.0000)])
def test_the_matrix_game_is_learned_exactly(temperature: float, value: float) -> None:
    """Q = r for each of the four actions whatever their frequency, V = alpha log sum exp(r / alpha), and the rare best
    action is the greedy one.
    """
    r = torch.tensor([1.0, -1.0, 0.1, -1.0])
    assert float(temperature * torch.logsumexp(r / temperature, 0)) == pytest.approx(value, abs=1e-3)
    agent = learned(matrix_game(), 700, temperature=temperature, learning_rate_schedule="linear")
    v, q = q_table(agent)
    torch.testing.assert_close(q, r, atol=0.003, rtol=0)
    assert float(v) == pytest.approx(value, abs=0.002)
    assert agent.predict(np.zeros(1, np.float32), deterministic=True)[0].tolist() == [-0.5, -0.5]


@pytest.mark.parametrize("d", [2, 3, 4])
def test_parity_is_learned_where_choices_see_each_other(d: int) -> None:
    """Samples of the policy have the right parity; at a temperature of 0.1 the last choice is right with probability
    1 / (1 + e^-10), and V = 1 + 0.1 log 2^(d-1). Without conditioning, half of them are right.
    """
    data = parity_data(d, transitions=2_000)
    agent = learned(data, 700, temperature=0.1, learning_rate_schedule="linear")
    obs = np.zeros((400, 1), np.float32)
    even = np.prod(np.sign(agent.predict(obs)[0]), axis=1) > 0
    assert even.mean() >= 0.98
    assert np.prod(np.sign(agent.predict(obs, deterministic=True)[0]), axis=1).min() > 0
    assert float(q_table(agent)[0]) == pytest.approx(1 + 0.1 * (d - 1) * math.log(2), abs=0.003)
    if d == 2:
        with torch.no_grad():
            advantage = agent.critic.advantage(torch.zeros(1, 1), torch.tensor([[[1, 1]]]))
        torch.testing.assert_close(
            (advantage[:, 0, 1, 1] / 0.1).exp(), torch.full((2,), 1 / (1 + math.exp(-10))), atol=1e-3, rtol=0
        )
    blind = learned(data, 500, temperature=0.1, conditioning="none")
    even = np.prod(np.sign(blind.predict(obs)[0]), axis=1) > 0
    assert 0.35 <= even.mean() <= 0.65


def lasting(terminal: bool) -> dict[str, np.ndarray]:
    """One state for ever (or for one step), reward 1, all four actions."""
    n = 400
    obs = np.zeros((n, 1), np.float32)
    actions = np.random.default_rng(0).uniform(-1, 1, (n, 2)).astype(np.float32)
    ends = np.full(n, terminal)
    return {
        "observations": obs, "next_observations": obs, "actions": actions, "rewards": np.ones(n), "terminals": ends,
        "timeouts": np.arange(n) == n - 1,
    }  # fmt: skip


@pytest.mark.parametrize(("terminal", "value"), [(False, 11.386), (True, 1.1386)])
def test_values_contain_the_entropy_and_stop_at_terminal_states(terminal: bool, value: float) -> None:
    """V = (r + alpha P log bins) / (1 - gamma) for ever, r + alpha P log bins for one step; P = 2, 2 bins."""
    once = 1 + 0.1 * 2 * math.log(2)
    assert value == pytest.approx(once if terminal else once / 0.1, rel=1e-3)
    agent = learned(
        lasting(terminal), 700, temperature=0.1, gamma=0.9, tau=0.3, learning_rate=1e-2,
        learning_rate_schedule="linear",
    )  # fmt: skip
    assert float(q_table(agent)[0]) == pytest.approx(value, rel=0.001)


@pytest.mark.parametrize("bc_type", ["cql", "margin", "margin_sum"])
def test_behaviour_cloning_alone_imitates(bc_type: str) -> None:
    """Every choice of the demonstrated action has a probability above 0.99 once it leads by the margin of 1."""
    n = 64
    obs, ends = np.zeros((n, 1), np.float32), np.ones(n, bool)
    data = {
        "observations": obs, "next_observations": obs, "actions": np.tile(np.float32([0.6, -0.6]), (n, 1)),
        "rewards": np.zeros(n), "terminals": ends, "timeouts": ~ends,
    }  # fmt: skip
    agent = learned(
        data, 500, levels=2, bins=3, zero_action=True, td_coef=0.0, bc_coef=1.0, demo_fraction=1.0, temperature=0.1,
        bc_type=bc_type,
    )  # fmt: skip
    indices = encode(torch.tensor([[0.6, -0.6]]), 2, 3)
    with torch.no_grad():
        advantage = agent.critic.advantage(torch.zeros(1, 1), indices)
    assert ((chosen(advantage, indices.flatten(1)) / 0.1).exp() > 0.99).all()


# --- the trainer -----------------------------------------------------------------------------------------------------


def tiny(**fields: Any) -> rlkit.ARSQ:
    given = {"policy_kwargs": {"net_arch": [8]}, "batch_size": 16, "device": "cpu", **fields}
    return rlkit.ARSQ(given.pop("env", "Pendulum-v1"), **given)


def test_a_batch_has_its_demonstrations_first_and_marked() -> None:
    data = parity_data(2, 200)
    agent = rlkit.ARSQ(
        "rlkit/ParityBandit-v0", data=data, demo_band=(50, 100), demo_fraction=0.25, batch_size=40, device="cpu",
        policy_kwargs={"net_arch": [8]},
    )  # fmt: skip
    batch = agent.batch()
    assert batch["demo"].tolist() == [True] * 10 + [False] * 30
    # Half of uniform actions have reward 1, so the upper half of the returns are rewarded, up to chance.
    rewarded = int((data["rewards"] == 1).sum())
    if rewarded >= 100:
        assert batch["reward"][:10].min() == 1.0
    assert 0 < batch["reward"][10:].mean() < 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bins": 4}, "`bins`: got 4, with which no bin is centred on the action 0; give an odd number, or"),
        ({"bins": 1}, "bins"),
        ({"levels": 0}, "levels"),
        ({"temperature": 0.0}, "temperature"),
        ({"demo_fraction": 1.5}, "demo_fraction"),
        ({"demo_band": (0, 150)}, "demo_band"),
        ({"bc_type": "hinge"}, "bc_type"),
        ({"offline_steps": 10}, "`offline_steps`: got 10, and there is no `data` to learn from"),
        ({"policy_kwargs": {"net_arch": []}}, "net_arch"),
        ({"env": "CartPole-v1"}, "ARSQ needs `Box` actions, got `Discrete(2)`; trainers that fit: "),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        tiny(**fields)
    assert message in str(caught.value)


def test_even_bins_are_taken_where_zero_need_not_be_one_of_them() -> None:
    agent = tiny(bins=4, zero_action=False)
    assert agent.predict(np.zeros(3, np.float32), deterministic=True)[0].shape == (1,)


def test_actions_are_centres_of_bins_in_the_units_of_the_environment() -> None:
    """Pendulum-v1 has [-2, 2]: with one level of 5 bins actions are -1.6, -0.8, 0, 0.8 and 1.6."""
    agent = tiny(levels=1, bins=5, temperature=10.0)
    assert agent.action_space == Box(-2.0, 2.0, (1,), np.float32)
    actions = agent.predict(np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32))[0]
    assert np.unique(actions.round(5)).tolist() == pytest.approx([-1.6, -0.8, 0.0, 0.8, 1.6])


def test_targets_follow_the_online_critics_and_can_act() -> None:
    agent = tiny(act_with="target", tau=1.0).learn(130)
    for a, b in zip(agent.critic.parameters(), agent.critic_target.parameters(), strict=True):
        assert torch.equal(a, b)
    assert agent.policy_parts == ("normalizer", "critic_target")


def test_presets_are_the_released_settings() -> None:
    config = rlkit.ARSQ.make_config({"preset": "auto", "env": "Walker2d-v4"})
    assert (config.levels, config.bins, config.bc_type, config.bc_coef, config.bc_margin) == (1, 41, "cql", 10.0, 0.0)
    config = rlkit.ARSQ.make_config({"preset": "hopper-medium-replay"})
    assert (config.levels, config.bins, config.bc_type, config.bc_coef, config.bc_margin) == (2, 7, "margin", 0.03, 1.0)
    assert config.temperature == 0.01


def test_bf16_keeps_what_is_divided_by_the_temperature_in_float32() -> None:
    agent = tiny(precision="bf16", temperature=0.001).learn(110)
    with agent.autocast():
        advantage = agent.critic.advantage(torch.randn(4, 3), torch.randint(7, (4, 2, 1)))
    assert advantage.dtype == torch.float32
    torch.testing.assert_close((advantage / 0.001).exp().sum(-1), torch.ones(2, 4, 2), atol=1e-3, rtol=0)
