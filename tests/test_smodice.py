"""SMODICE: its losses in closed form, its dual against that of tables, one update by PyTorch's own parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import PlainUpdate
from torch.nn import functional as F

import rlkit
from rlkit.duality import TabularMDP, dual_v
from rlkit.envs import corridor
from rlkit.errors import UserError
from rlkit.trainers.smodice import SMODICE, discriminator_loss, slope_penalty, value_loss, visitation_weight

SMALL: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [16]}, "batch_size": 32, "device": "cpu", "eval_episodes": 0, "compile": "off",
    "learning_rate": 1e-2, "gamma": 0.9,
}  # fmt: skip


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    found = corridor.recording(10, 2)
    found["terminals"][::10] = True  # so that what follows a terminal state is told apart
    return found


@pytest.fixture(scope="module")
def expert() -> dict[str, Any]:
    return corridor.expert_data()


def smodice(data: Any, expert: Any, **fields: Any) -> Any:
    return SMODICE(corridor.ID, data=data, expert_data=expert, **{**SMALL, **fields})


# --- losses ------------------------------------------------------------------------------------------------------


def test_the_discriminators_optimum_is_the_log_ratio() -> None:
    """Two points, of the expert with 3/4 and 1/4, of the data with 1/4 and 3/4: log 3 and -log 3, and the loss there is
    2 (3/4 log(4/3) + 1/4 log 4)."""
    odds = torch.tensor([[3.0, 1 / 3]], dtype=torch.float64).log().requires_grad_()
    loss = discriminator_loss(odds[:, [0, 0, 0, 1]], odds[:, [0, 1, 1, 1]])
    assert loss.item() == pytest.approx(2 * (0.75 * np.log(4 / 3) + 0.25 * np.log(4)))
    (slope,) = torch.autograd.grad(loss, odds)
    assert slope.abs().max() < 1e-12
    elsewhere = torch.zeros(1, 2, dtype=torch.float64)
    assert discriminator_loss(elsewhere[:, [0, 0, 0, 1]], elsewhere[:, [0, 1, 1, 1]]) > loss


def test_slope_penalty_by_hand() -> None:
    """mean((5 - 1)^2, (0 - 1)^2) + mean((1 - 1)^2, (3 - 1)^2) = 8.5 + 2."""
    slope = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[0.0, 1.0], [-3.0, 0.0]]], requires_grad=True)
    loss = slope_penalty(slope)
    assert loss.item() == pytest.approx(10.5, abs=1e-4)
    loss.backward()
    assert torch.isfinite(slope.grad).all()  # type: ignore[arg-type]  # also where it is zero


def test_value_loss_and_weights_by_hand() -> None:
    """y = (-4, 0, 2) / 2: f_p* = (-1/2, 0, 3/2) and w = (0, 1, 2); of `kl` exp(y) over its mean."""
    residual, initial = torch.tensor([-4.0, 0.0, 2.0]), torch.tensor([1.0, 3.0])
    assert value_loss(initial, residual, 0.9, "chi2", 2.0).item() == pytest.approx(0.2 + 2 / 3)
    assert visitation_weight(residual, "chi2", 2.0).tolist() == [0.0, 1.0, 2.0]
    powers = np.exp([-2.0, 0.0, 1.0])
    assert value_loss(initial, residual, 0.9, "kl", 2.0).item() == pytest.approx(0.2 + 2 * np.log(powers.mean()))
    np.testing.assert_allclose(visitation_weight(residual, "kl", 2.0), powers / powers.mean(), rtol=1e-6)


@pytest.mark.parametrize("divergence", ["chi2", "kl"])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_the_dual_is_that_of_tables(divergence: Any, alpha: float) -> None:
    """A random problem with the reward log d^E / d^S, d^S and d0 uniform so that means are expectations: the minimum
    over V is that of `rlkit.duality` (there (t - 1)^2 without the half), the weights make d^S a visitation, and of
    `kl`, whose objective is -KL(d || d^E) at alpha = 1, the expert's."""
    rng = np.random.default_rng(4)
    states, actions, gamma = 4, 3, 0.9
    transitions = rng.dirichlet(np.ones(states), (states, actions))
    start, recorded = np.full(states, 1 / states), np.full((states, actions), 1 / (states * actions))
    policy = rng.dirichlet(np.ones(actions), states)
    expert = TabularMDP(transitions, np.zeros((states, actions)), start, gamma).visitation(policy)
    mdp = TabularMDP(transitions, np.log(expert / recorded), start, gamma)

    reward, step = torch.from_numpy(mdp.rewards), torch.from_numpy(transitions)
    v = torch.zeros(states, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [v], max_iter=2_000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def residual() -> torch.Tensor:
        return (reward + gamma * step @ v - v[:, None]).flatten()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = value_loss(v, residual(), gamma, divergence, alpha)
        loss.backward()
        return loss

    optimizer.step(closure)
    exact = dual_v(mdp, recorded, *(("chi2", alpha / 2) if divergence == "chi2" else ("reverse_kl", alpha)))
    assert closure().item() == pytest.approx(exact.value, abs=1e-7)
    visited = recorded * visitation_weight(residual(), divergence, alpha).detach().numpy().reshape(states, actions)
    np.testing.assert_allclose(visited, exact.visitation, atol=1e-5)
    assert mdp.flow_error(visited) < 1e-6
    assert visited.sum() == pytest.approx(1, abs=1e-6)
    if divergence == "kl" and alpha == 1:
        np.testing.assert_allclose(visited, expert, atol=1e-6)


# --- the trainer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"of": "state", "divergence": "kl"},
        {"gradient_penalty": 0.0, "terminal": "absorbing", "policy_temperature": 2.0, "weight_clip": 1.5},
        {"policy_temperature": 0.0},
    ],
    ids=str,
)
def test_one_update(fields: dict[str, Any], data: dict[str, Any], expert: dict[str, Any]) -> None:
    """Discriminator, V, policy, each with the new ones before it, by PyTorch's Adam on copies of the networks."""
    agent = smodice(data, expert, seed=2, policy_schedule="constant", **fields)
    agent.learn(3)
    config, batch = agent.config, agent.batch()
    assert batch["terminated"].any()
    before = agent.rng["mix"].get_state()
    mix = agent.noise(32)["mix"]
    agent.rng["mix"].set_state(before)
    plain = PlainUpdate(agent, ("discriminator", "value", "actor"), ())
    nets, take = plain.nets, plain.take

    obs, action = batch["obs"], batch["action"]
    others, experts = obs, batch["expert_obs"]
    if config.of == "state_action":
        others, experts = torch.cat([obs, action], 1), torch.cat([experts, batch["expert_action"]], 1)
    between = (mix * experts + (1 - mix) * others).requires_grad_()
    loss = torch.zeros(())
    ones, zeros = torch.ones(32), torch.zeros(32)
    for i in range(2):
        loss = loss + F.binary_cross_entropy_with_logits(nets["discriminator"](experts)[i], ones)
        loss = loss + F.binary_cross_entropy_with_logits(nets["discriminator"](others)[i], zeros)
        (slope,) = torch.autograd.grad(nets["discriminator"](between)[i].sum(), between, create_graph=True)
        loss = loss + config.gradient_penalty * (slope.norm(dim=1) - 1).square().mean()
    take("discriminator", loss)

    with torch.no_grad():
        reward = sum(nets["discriminator"](others)) / 2
    alive = torch.ones(32) if config.terminal == "absorbing" else 1 - batch["terminated"].float()
    alpha = 1 / (config.policy_temperature or 1)

    def y() -> torch.Tensor:
        return (reward + 0.9 * alive * nets["value"](batch["next_obs"]) - nets["value"](obs)) / alpha

    if config.divergence == "kl":
        conjugate = y().exp().mean().log()
    else:
        conjugate = torch.where(y() >= -1, y() + y() ** 2 / 2, torch.tensor(-0.5)).mean()
    take("value", 0.1 * nets["value"](batch["initial_obs"]).mean() + alpha * conjugate)

    with torch.no_grad():
        weight = y().exp() / y().exp().mean() if config.divergence == "kl" else torch.relu(1 + y())
        weight = torch.ones(32) if config.policy_temperature == 0 else weight.clamp(max=config.weight_clip)
    mean, log_std = nets["actor"](obs)
    take("actor", -(weight * torch.distributions.Normal(mean, log_std.exp()).log_prob(action).sum(1)).mean())

    agent.update(batch)
    plain.compare()


def test_temperature_zero_is_behaviour_cloning(data: dict[str, Any], expert: dict[str, Any]) -> None:
    """The same policy as ReCOIL's at temperature 0, from the same initial weights and batches."""
    fields = {"policy_temperature": 0.0, "seed": 3, "policy_kwargs": {"net_arch": [16], "ortho_init": False}}
    one = smodice(data, expert, **fields).learn(20)
    other = rlkit.ReCOIL(corridor.ID, data=data, expert_data=expert, **{**SMALL, **fields}).learn(20)
    for a, b in zip(one.actor.parameters(), other.actor.parameters(), strict=True):
        assert torch.equal(a, b)


def test_first_states_are_first_states(data: dict[str, Any], expert: dict[str, Any]) -> None:
    """Rows 0, 1, 11, 21, ... and after time limits: all rows behind the end of an episode."""
    agent = smodice(data, expert, seed=0, batch_size=1_000)
    ends = data["terminals"] | data["timeouts"]
    first = np.concatenate([[True], ends[:-1]])
    starts = {row.tobytes() for row in data["observations"][first]}
    others = {row.tobytes() for row in data["observations"][~first]}
    assert len(starts - others) > 60, "or this would say little"
    assert {row.tobytes() for row in agent.batch()["initial_obs"].numpy()} == starts


@pytest.mark.slow
@pytest.mark.usefixtures("any_compiler")
def test_compiled_and_eager_updates_agree(data: dict[str, Any], expert: dict[str, Any]) -> None:
    """The slope of the log odds is differentiated within the compiled graph, too."""
    agents = [smodice(data, expert, seed=1, compile=mode).learn(5) for mode in ("off", "on")]
    assert agents[1]._update.compiled
    for name in ("actor", "value", "discriminator"):
        for a, b in zip(*(getattr(agent, name).parameters() for agent in agents), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("trainer", ["smodice", "recoil"])
def test_recordings_without_rewards(
    trainer: str, data: dict[str, Any], expert: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """They make the same policy as with them, and the run says that there are none."""
    cls = rlkit.registry.get(trainer)
    bare = [{name: column for name, column in found.items() if name != "rewards"} for found in (data, expert)]
    with_rewards = cls(corridor.ID, data=data, expert_data=expert, seed=0, **SMALL).learn(5)
    assert "no `rewards`" not in capsys.readouterr().err
    without = cls(corridor.ID, data=bare[0], expert_data=bare[1], seed=0, **SMALL).learn(5)
    said = capsys.readouterr().err
    for name in ("data", "expert_data"):
        assert f"{name}: no `rewards`: taken as zeros, which nothing is learned from" in said
    for a, b in zip(with_rewards.actor.parameters(), without.actor.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match=r"has no `rewards`, so no band 50 to 100 of its returns"):
        cls(corridor.ID, data=bare[0], expert_data=bare[1], data_band=(50, 100), **SMALL)
    with pytest.raises(UserError, match="missing `rewards`"):
        rlkit.DualRL(corridor.ID, data=bare[0], **SMALL)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_data": None}, "`expert_data`: smodice needs a recording in `data`, and what to imitate"),
        ({"data": None}, "`data`: smodice needs a recording in `data`"),
        ({"gamma": 1.0}, "values need gamma below 1"),
        ({"reward": ["scale=2"]}, "there are no rewards in imitation"),
        ({"return_range": 10.0}, "there are no rewards in imitation"),
        ({"tau": 0.1}, "unknown key `tau`"),
        ({"max_clip": 5.0}, "unknown key `max_clip`"),
        ({"divergence": "tv"}, "divergence"),
        ({"expert_data": {"observations": np.zeros((3, 2))}}, "missing `actions`, `terminals`"),
    ],
    ids=str,
)
def test_bad_fields(fields: dict[str, Any], message: str, data: dict[str, Any], expert: dict[str, Any]) -> None:
    given = {"data": data, "expert_data": expert, **SMALL, **fields}
    with pytest.raises(UserError) as caught:
        SMODICE(corridor.ID, **{key: value for key, value in given.items() if value is not None})
    assert message in str(caught.value)
