"""CQN's distributions against hand-worked numbers, and where valuing dimensions one by one leads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_arsq import SMALL, every_action, matrix_game

import rlkit
from rlkit.envs.coordination import parity_data
from rlkit.errors import UserError
from rlkit.trainers.cqn import (
    discounted_returns,
    distribution_loss,
    dominance_penalty,
    mean_margin_penalty,
    of_bin,
    project,
)

FIELDS: dict[str, Any] = {
    **{k: v for k, v in SMALL.items() if k != "zero_action"},
    "policy_kwargs": {"net_arch": [32, 32], "n_critics": 1},
    "exploration_std": 0.0,
}


def learned(data: Any, updates: int, **fields: Any) -> Any:
    kwargs = {"dimensions": np.asarray(data["actions"]).shape[1]}
    return rlkit.CQN("rlkit/ParityBandit-v0", env_kwargs=kwargs, data=data, **{**FIELDS, **fields}).learn(updates)


def test_projection_on_numbers() -> None:
    """Support 0, 1, 2. Mass 1/2 at 0.25 gives 3/8 to 0 and 1/8 to 1; 1/4 at 1 stays; 1/4 at 5 counts as 2."""
    p = torch.tensor([0.5, 0.25, 0.25]).view(1, 1, 1, 1, 3)
    found = project(p, torch.tensor([[0.25, 1.0, 5.0]]), torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(found.flatten(), torch.tensor([0.375, 0.375, 0.25]))


def test_projection_keeps_mass_and_the_mean_inside_the_support() -> None:
    torch.manual_seed(0)
    p = torch.rand(2, 4, 2, 3, 51).softmax(-1)
    values, support = torch.rand(4, 51) * 8 + 1, torch.linspace(0, 10, 51)
    found = project(p, values, support)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, 2, 3))
    torch.testing.assert_close((found * support).sum(-1), torch.einsum("nbldz,bz->nbld", p, values))


def test_losses_on_numbers() -> None:
    """Bins with distribution functions (0.5, 1) and (0.1, 1): the first is dominated by 0.4, the second by nothing.

    Means on the support (0, 1): 0.5 and 0.9; with a margin of 1, bin 0 is short by 1 and by 1.4, bin 1 by 0.6 and 1.
    """
    p = torch.tensor([[0.5, 0.5], [0.1, 0.9]]).view(1, 1, 1, 1, 2, 2)
    first, second = torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1, dtype=torch.int64)
    assert float(dominance_penalty(p, first)) == pytest.approx(0.4 / 2)
    assert float(dominance_penalty(p, second)) == 0.0
    q = (p * torch.tensor([0.0, 1.0])).sum(-1)
    assert float(mean_margin_penalty(q, first, 1.0)) == pytest.approx((1.0 + 1.4) / 2)
    assert float(mean_margin_penalty(q, second, 1.0)) == pytest.approx((0.6 + 1.0) / 2)
    torch.testing.assert_close(of_bin(p, second).flatten(), torch.tensor([0.1, 0.9]))
    half = torch.full((1, 1, 1, 1, 2), 0.5)
    assert float(distribution_loss(half.log(), half)) == pytest.approx(np.log(2))


def test_discounted_returns_stop_at_ends() -> None:
    """Rewards 1, 2, 3 to a terminal state and 4 to a time limit, gamma 0.5: 1 + 1 + 0.75, 2 + 1.5, 3, 4."""
    obs = np.zeros((4, 1), np.float32)
    data = {
        "observations": obs, "next_observations": obs, "actions": np.zeros((4, 2), np.float32),
        "rewards": np.array([1.0, 2.0, 3.0, 4.0]), "terminals": np.array([0, 0, 1, 0], bool),
        "timeouts": np.array([0, 0, 0, 1], bool),
    }  # fmt: skip
    agent = rlkit.CQN("rlkit/ParityBandit-v0", data=data, **{**FIELDS, "gamma": 0.5})
    assert agent.data is not None
    assert discounted_returns(agent.data).tolist() == [2.75, 3.5, 3.0, 4.0]
    # from w / 4 below the least to w above the largest, w = 4 - 2.75
    assert agent.critic.support[[0, -1]].tolist() == pytest.approx([2.75 - 1.25 / 4, 4 + 1.25])
    assert torch.equal(agent.critic.support, agent.critic_target.support)


def test_single_dimensions_of_the_matrix_game_mislead() -> None:
    """Each dimension's values are averages over what the other did: by the frequencies 10, 40, 40 and 10 %

    Q_1 = ((0.1 - 0.4) / 0.5, (0.04 - 0.1) / 0.5) = (-0.6, -0.12) and Q_2 = ((0.1 + 0.04) / 0.5, -1) = (0.28, -1),
    so the greedy action is (1, 0) with a reward of 0.1; the best is (0, 0) with 1.
    """
    agent = learned(matrix_game(), 600, support=(-1.5, 1.5), learning_rate_schedule="linear")
    with torch.no_grad():
        logp = agent.critic.of_action(torch.zeros(1, 1), every_action(1, 2, 2)[:1])
    q = agent.critic.mean(logp.exp())[0, 0, 0]
    torch.testing.assert_close(q, torch.tensor([[-0.6, -0.12], [0.28, -1.0]]), atol=0.06, rtol=0)
    assert agent.predict(np.zeros(1, np.float32), deterministic=True)[0].tolist() == [0.5, -0.5]


def test_parity_is_not_seen_by_single_dimensions() -> None:
    """All four values are 1/2: one sign alone says nothing about the product."""
    agent = learned(parity_data(2, 2_000), 300, learning_rate_schedule="linear")
    with torch.no_grad():
        logp = agent.critic.of_action(torch.zeros(1, 1), every_action(1, 2, 2)[:1])
    torch.testing.assert_close(agent.critic.mean(logp.exp())[0, 0, 0], torch.full((2, 2), 0.5), atol=0.08, rtol=0)


def test_a_terminal_state_ends_the_return_and_a_time_limit_does_not() -> None:
    """Reward 1 in the one state for ever, gamma 0.5: Q = 2, or 1 where every step is terminal."""
    n = 200
    obs = np.zeros((n, 1), np.float32)
    actions = np.random.default_rng(0).uniform(-1, 1, (n, 2)).astype(np.float32)
    for terminal, value in ((False, 2.0), (True, 1.0)):
        data = {
            "observations": obs, "next_observations": obs, "actions": actions, "rewards": np.ones(n),
            "terminals": np.full(n, terminal), "timeouts": np.full(n, not terminal),
        }  # fmt: skip
        agent = learned(data, 500, gamma=0.5, tau=0.3, support=(0.0, 4.0), learning_rate_schedule="linear")
        with torch.no_grad():
            q = agent.critic.mean(agent.critic.of_action(torch.zeros(1, 1), every_action(1, 2, 2)[:1]).exp())
        torch.testing.assert_close(q, torch.full_like(q, value), atol=0.05, rtol=0)


def test_a_support_is_needed_and_has_to_ascend() -> None:
    with pytest.raises(UserError, match="`support`: without `data` to take it from, give the least and the largest"):
        rlkit.CQN("Pendulum-v1")
    with pytest.raises(UserError, match=r"`support`: got 1.0, 0.0; the first must be below the second"):
        rlkit.CQN("Pendulum-v1", support=(1.0, 0.0))
    loaded = rlkit.CQN("Pendulum-v1", support=(-10.0, 0.0), policy_kwargs={"net_arch": [8]}, device="cpu")
    assert loaded.critic.support[[0, -1]].tolist() == [-10.0, 0.0]
