"""DR-RPO: formulas against closed forms, plans against a plain computation, what it learns against exact values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import Tensor

import rlkit
from rlkit.envs.features import (
    FeatureMap,
    KernelFeatures,
    PutFeatures,
    TableFeatures,
    check_simplex,
    kernel_features,
)
from rlkit.envs.finite import FINITE_ID, Finite
from rlkit.envs.linear import (
    GRID_ID,
    PUT_ID,
    SIMULATED_ID,
    AmericanPut,
    SimulatedLinearMDP,
    SlipperyGrid,
    robust_q,
    robust_value,
    robust_values,
    simulate,
)
from rlkit.errors import UserError
from rlkit.robust import DUALS
from rlkit.trainers import dr_rpo
from rlkit.trainers.dr_rpo import bonus, mirror_step, optimistic_q, regularised_value, soft_policy, soft_value

JUMP = tuple(tuple(row) for row in np.array([[0, 0, 0, 0.6], [0.0] * 4, [0.0] * 4]).tolist())
"""A radius for the jump of step 0 alone."""


def agent(env: Any = SIMULATED_ID, **fields: Any) -> Any:
    return rlkit.DRRPO(env, device="cpu", **{"eval_episodes": 0, "seed": 0, **fields})


def laws(rows: int, actions: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Q, log reference and log policy at random."""
    draw = torch.Generator().manual_seed(seed)
    numbers = (torch.randn(rows, actions, generator=draw, dtype=torch.float64) for _ in range(3))
    q, reference, policy = numbers
    return q, torch.log_softmax(reference, -1), torch.log_softmax(policy, -1)


def planned_value(trainer: Any) -> float:
    """V_0 of the first state."""
    return float(trainer._about_plan()["train/planned_value"].detach())


# --- formulas ----------------------------------------------------------------------------------------------------


def test_mirror_descent_ends_where_the_closed_form_is() -> None:
    """pi_ref exp(Q / eta) / Z is its fixed point to 1e-10, reached from anywhere, and at once with an endless step."""
    q, reference, start = laws(5, 4)
    best = soft_policy(q, reference, 0.3)
    torch.testing.assert_close(mirror_step(best, q, reference, 0.3, 2.0), best, atol=1e-10, rtol=0)
    policy = start
    for _ in range(200):
        policy = mirror_step(policy, q, reference, 0.3, 2.0)
    torch.testing.assert_close(policy, best, atol=1e-10, rtol=0)
    torch.testing.assert_close(mirror_step(start, q, reference, 0.3, 1e12), best, atol=1e-8, rtol=0)


def test_a_mirror_step_is_the_largest_of_what_it_maximises() -> None:
    q, reference, policy = laws(1, 4, seed=1)
    step = mirror_step(policy, q, reference, 0.5, 0.7)

    def objective(log_pi: Tensor) -> float:
        kl = (log_pi.exp() * (log_pi - policy)).sum(-1)
        return float(regularised_value(log_pi, q, reference, 0.5) - kl / 0.7)

    for seed in range(50):
        assert objective(laws(1, 4, seed)[2]) < objective(step)
        assert objective(torch.log_softmax(step + 1e-3 * laws(1, 4, seed)[0], -1)) < objective(step)


def test_the_soft_value_is_that_of_the_soft_policy() -> None:
    q, reference, _ = laws(6, 3)
    torch.testing.assert_close(
        soft_value(q, reference, 0.2), regularised_value(soft_policy(q, reference, 0.2), q, reference, 0.2)
    )
    torch.testing.assert_close(soft_value(q, reference, 0.0), q.max(1).values)
    torch.testing.assert_close(soft_policy(q, reference, 0.0).exp().argmax(1), q.argmax(1))
    torch.testing.assert_close(soft_policy(q, reference, 1e9), reference, atol=1e-8, rtol=0)
    assert soft_policy(1e6 * q, reference, 1e-3).exp().sum(1).tolist() == pytest.approx([1.0] * 6)


def test_bonuses_by_hand() -> None:
    """phi = (1/2, 1/2), Lambda^-1 = [[4, 1], [1, 1]]: (2 + 1) / 2, sqrt(5) / 2, sqrt(7) / 2."""
    phi = torch.full((1, 1, 2), 0.5, dtype=torch.float64)
    inverse = torch.tensor([[[4.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    found = [float(bonus(phi, inverse, form)) for form in ("sum", "norm", "elliptical", "none")]
    assert found == pytest.approx([1.5, 5**0.5 / 2, 7**0.5 / 2, 0.0])
    draw = torch.Generator().manual_seed(0)
    phi = torch.rand(20, 3, 4, generator=draw, dtype=torch.float64)
    root = torch.randn(20, 4, 4, generator=draw, dtype=torch.float64)
    assert (bonus(phi, root @ root.mT, "norm") <= bonus(phi, root @ root.mT, "sum")).all()


def test_q_is_cut_to_what_rewards_can_sum_to() -> None:
    two = [torch.tensor([[a, b]]) for a, b in ((0.5, 0.5), (1.0, -2.0), (1.0, 0.1))]
    found = optimistic_q(*two, torch.tensor([[0.0]]), torch.tensor([[2.0]]))
    assert found.tolist() == [[2.0, 0.0]]


# --- plans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uncertainty", [*DUALS, "none"])
def test_a_plan_is_the_plain_computation(uncertainty: str) -> None:
    """With every transition a row of its own, matrices inverted anew, and no torch."""
    trainer = agent(uncertainty=uncertainty, radius=0.2, sigma=0.7, beta=0.2, eta=0.1, ridge=0.3).learn(90)
    mdp, rows = SimulatedLinearMDP(), trainer.buffer.rows(np.arange(90))
    obs, action, after = (rows[name].numpy() for name in ("obs", "action", "next_obs"))
    v = np.zeros((4, 5))
    for h in (2, 1, 0):
        here = obs[:, 1] == h
        phi = mdp.features[obs[here, 0].astype(int), action[here]]
        inverse = np.linalg.inv(0.3 * np.eye(4) + phi.T @ phi)
        nu = np.zeros(4)
        if h < 2:
            y, weights = v[h + 1, after[here, 0].astype(int)], inverse @ phi.T
            level = 0.2 if uncertainty.endswith("radius") else 0.7
            bounds = {"low": 0.0, "high": float(2 - h)}
            nu = weights @ y if uncertainty == "none" else DUALS[uncertainty](y, weights, level, **bounds)
        np.testing.assert_allclose(trainer.policy.weights[h].detach(), nu, atol=2e-6)
        width = np.sqrt((mdp.features**2 * np.diag(inverse)).sum(-1))
        q = np.clip(mdp.rewards[h] + mdp.features @ nu + 0.2 * width, 0, 3 - h)
        q[3] = 0
        v[h] = 0.1 * np.log(np.exp(q / 0.1).mean(-1))
        policy = np.exp(q / 0.1) / np.exp(q / 0.1).sum(-1, keepdims=True)
        np.testing.assert_allclose(trainer.table()[h], policy, atol=1e-4)
    assert planned_value(trainer) == pytest.approx(v[0, 0], abs=1e-5)


def test_the_inverse_is_one_after_thousands_of_rows() -> None:
    rng = np.random.default_rng(0)
    ridge = dr_rpo.Ridge(6, 1, 0.1)
    phi = rng.dirichlet(np.ones(6), 2_500)
    for row in phi:
        ridge.add(row, 0.0, np.zeros(1), b"", False)
    np.testing.assert_allclose(ridge.inverse @ (0.1 * np.eye(6) + phi.T @ phi), np.eye(6), atol=1e-9)
    np.testing.assert_allclose(ridge.weights[:, 0], ridge.inverse @ phi.sum(0))


def test_mirror_descent_without_new_data_becomes_the_closed_form() -> None:
    closed = agent(radius=0.2).learn(60)
    trainer = agent(radius=0.2, alpha=5.0)
    trainer.buffer.add(closed.buffer.rows(np.arange(60)))
    for _ in range(60):
        trainer.update(trainer.batch())
    np.testing.assert_allclose(trainer.table()[:, :3], closed.table()[:, :3], atol=1e-6)


# --- what is learned ---------------------------------------------------------------------------------------------


def test_it_becomes_the_robust_policy_and_the_value_based_one_does_not() -> None:
    """With a radius of 0.6 for the jump the way over x2 is better (beyond 0.48064). In targets whose jump fails with
    probability q that pays above q = 0.48 and costs below.
    """
    robust = agent(radius=JUMP, eta=0.01, beta=0.1).learn(900)
    nominal = agent(uncertainty="none", bonus="elliptical", eta=0.0).learn(600)  # LSVI-UCB
    mdp = SimulatedLinearMDP()
    best = robust_value(mdp, "tv_radius", JUMP)
    assert robust_value(mdp, "tv_radius", JUMP, policy=robust.table()) > best - 0.02
    assert simulate(mdp, nominal.table()) > robust_value(mdp) - 0.02
    targets = {q: SimulatedLinearMDP(shift=q) for q in (0.0, 0.3, 0.7, 1.0)}
    gains = {q: simulate(env, robust.table()) - simulate(env, nominal.table()) for q, env in targets.items()}
    assert gains[0.0] < gains[0.3] < 0 < gains[0.7] < gains[1.0]


def test_optimism() -> None:
    """With a bonus of the theory's size what is planned is above the exact optimum in nine of ten episodes."""
    mdp = SimulatedLinearMDP()
    exact = robust_value(mdp, "tv_penalty", 1.0, eta=0.1)
    trainer, planned = agent(uncertainty="tv_penalty", beta=1.0, log_every=3), []
    trainer.learn(180, callback=lambda t: planned.append(planned_value(t)))
    assert np.mean(np.array(planned) >= exact) >= 0.9


def test_temperatures_lead_from_the_reference_to_the_best_action() -> None:
    reference = tuple((np.arange(1, 17) / 136).tolist())
    far, none = (agent(radius=0.1, eta=eta, reference=reference).learn(300).table() for eta in (1e6, 0.0))
    np.testing.assert_allclose(far, np.broadcast_to(reference, far.shape), atol=1e-5)
    assert set(np.unique(none)) == {0.0, 1.0}
    small = agent(radius=0.1, eta=1e-4, reference=reference).learn(300).table()
    mdp = SimulatedLinearMDP()
    assert simulate(mdp, small) == pytest.approx(simulate(mdp, none), abs=0.05)


def test_another_run_is_the_reference(tmp_path: Path) -> None:
    first = agent(uncertainty="none", eta=0.05, out=str(tmp_path / "run")).learn(120)
    near = agent(radius=JUMP, eta=1e6, reference=str(tmp_path / "run")).learn(30)
    np.testing.assert_allclose(near.table(), first.table(), atol=1e-4)
    near.save(tmp_path / "near")
    first.save(tmp_path / "run2")
    loaded: Any = rlkit.load(tmp_path / "near", inference=True)
    np.testing.assert_array_equal(loaded.table(), near.table())
    greedy = agent(eta=0.0, out=str(tmp_path / "greedy")).learn(30)
    assert greedy.clock == 30
    for place, words in (("greedy", "never takes some actions"), ("nowhere", "nowhere")):
        with pytest.raises(UserError, match=words):
            agent(reference=str(tmp_path / place))
    with pytest.raises(UserError, match="shape"):
        agent(GRID_ID, reference=str(tmp_path / "run"))


def test_a_grid_by_pooled_regressions_and_in_the_target() -> None:
    """400 episodes of the embedded task's settings; steps one by one would take more."""
    trainer = agent(GRID_ID, uncertainty="kl_penalty", sigma=0.3, eta=0.01, beta=0.05, eval_env_kwargs={"slip": 0.4})
    trainer.learn(4_800)
    grid, target = SlipperyGrid(), SlipperyGrid(slip=0.4)
    assert robust_value(grid, "kl_penalty", 0.3, policy=trainer.table()) > 0.95 * robust_value(grid, "kl_penalty", 0.3)
    nominal = np.eye(4)[robust_q(grid, robust_values(grid)).argmax(-1)]
    assert simulate(target, trainer.table()) > simulate(target, nominal)
    mean = trainer.evaluate(300)["eval/mean_reward"]
    greedy = np.eye(4)[trainer.table().argmax(-1)]
    assert mean == pytest.approx(simulate(target, greedy), abs=5 * 0.5 / 300**0.5)
    lines = trainer.exact()
    assert f"the best of the source: exact return in the source {simulate(grid, nominal):.3f}" in lines[1]
    assert f"in the evaluation's {simulate(target, trainer.table()):.3f}" in lines[0]
    assert agent(GRID_ID, pooled=False).policy.inverse.shape[0] == 12


# --- the option --------------------------------------------------------------------------------------------------


def test_the_option_by_its_tree() -> None:
    """The lattice's optimum is the recursion over prices; a radius takes the best outcome's mass to the worst."""

    def worth(price: float, left: int, radius: float) -> float:
        now = max(0.0, 100 - price) / 25
        if left == 0:
            return 0.0
        up, down = (worth(price * factor, left - 1, radius) for factor in (1.02, 0.98))
        best, worst = max(up, down), 0.0  # mass moves to the least value of any price, that of an expired option
        moved = min(radius, 0.5)
        rest = min(up, down)
        held = (0.5 - moved) * best + (0.5 - (radius - moved)) * rest + radius * worst
        return max(now, held)

    for radius in (0.0, 0.1):
        found = robust_value(AmericanPut().lattice(100.0), "tv_radius", radius)
        assert found == pytest.approx(worth(100.0, 10, radius), abs=1e-12)
    nominal = robust_values(AmericanPut().lattice(98.0))
    assert nominal[0, 0] == pytest.approx(worth(98.0, 10, 0.0), abs=1e-12)


def test_the_option_is_learned() -> None:
    """300 episodes from any first price; the exact optimum from 100 is 0.098, exercising at once pays nothing."""
    trainer = agent(PUT_ID, uncertainty="none", eta=0.001, beta=0.01).learn(3_000)
    lattice = AmericanPut().lattice(100.0)
    assert simulate(lattice, trainer.table(lattice)) > 0.8 * robust_value(lattice)
    with pytest.raises(UserError, match="not finitely many"):
        trainer.table()


def test_the_option_as_an_environment() -> None:
    check_env(gym.make(PUT_ID).unwrapped, skip_render_check=True)
    env = AmericanPut(p_up=1.0, price=90.0)
    obs, _ = env.reset(seed=0)
    assert obs.tolist() == [90, 0]
    obs, reward, over, _, _ = env.step(0)
    assert (obs.tolist(), reward, over) == ([pytest.approx(91.8), 1.0], 0.0, False)
    _, reward, over, late, _ = env.step(1)
    assert (reward, over, late) == (pytest.approx((100 - 91.8) / 25), True, False)
    for wrong in ({"p_up": 1.5}, {"price": 0.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            AmericanPut(**wrong)


def test_hats() -> None:
    hats = PutFeatures(np.array([80.0, 90.0, 100.0]), 10, 100.0, 25.0)
    phi = hats(torch.tensor([[85.0, 0.0], [100.0, 0.0], [70.0, 0.0]]))
    assert phi[:, 0].tolist() == [[0.5, 0.5, 0], [0, 0, 1], [1, 0, 0]]
    assert (phi[:, 1] == 0).all()
    check_simplex(phi)


# --- features of other environments ------------------------------------------------------------------------------


def test_any_finite_environment() -> None:
    """FrozenLake without slipping, from which the way of six steps is learned; its rewards are estimated."""
    kwargs = {"env_id": "FrozenLake-v1", "horizon": 12, "is_slippery": False}
    trainer = agent(FINITE_ID, env_kwargs=kwargs, radius=0.02, eta=0.002, beta=0.3).learn(3_600)
    assert trainer.evaluate(3)["eval/mean_reward"] == 1.0
    wrapped = Finite(gym.make("FrozenLake-v1"), horizon=5)
    check_env(wrapped, skip_render_check=True)
    assert wrapped.reset(seed=0)[0].tolist() == [0, 0]
    assert [wrapped.step(0)[3] for _ in range(5)] == [False] * 4 + [True]
    for wrong, words in (({}, "env_id"), ({"env_id": "CartPole-v1"}, "Discrete")):
        with pytest.raises(UserError, match=words):
            Finite(**wrong)


def test_kernels_are_normalised_gaussians() -> None:
    features = KernelFeatures(np.array([[0.0], [1.0]]), np.array([0.5]), actions=2, horizon=3)
    phi = features(torch.tensor([[0.25]]))[0]
    k = np.exp(-0.5 * np.array([0.25, 0.75]) ** 2 / 0.25)
    np.testing.assert_allclose(phi, [[*(k / k.sum()), 0, 0], [0, 0, *(k / k.sum())]])
    with gym.make("CartPole-v1") as env:
        made = kernel_features(env, 20, seed=1)
        assert (made.size, len(torch.unique(made.centres, dim=0))) == (40, 20)
        check_simplex(made(torch.randn(50, 4)))
    with gym.make("Pendulum-v1") as env, pytest.raises(UserError, match="Discrete"):
        kernel_features(env)
    with gym.make("CartPole-v1") as env, pytest.raises(UserError, match="different observations"):
        kernel_features(gym.wrappers.TransformObservation(env, np.zeros_like, env.observation_space), 20)


def test_cartpole_with_kernels() -> None:
    """1,000 transitions of a pole that at random falls after some 20 steps."""
    trainer = agent("CartPole-v1", preset="auto", n_features=60, horizon=30, plan_growth=0.2).learn(1_000)
    assert trainer.evaluate(10)["eval/mean_reward"] > 60
    assert len(trainer.plans) < 30
    assert trainer.plans[-1] <= 1_000


# --- bad input ---------------------------------------------------------------------------------------------------


class Off(FeatureMap):
    """Features that sum to 2."""

    def __init__(self, env: Any) -> None:
        super().__init__()
        self.size, self.actions, self.horizon = 2, 16, 3

    def forward(self, obs: Tensor) -> Tensor:
        return torch.ones(len(obs), 16, 2, dtype=torch.float64)


class FewActions(Off):
    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.actions = 3


def nothing(env: Any) -> None:
    """No features."""


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"uncertainty": "tv"}, "tv_radius"),
        ({"radius": 1.5}, "`radius`: got 1.5; total variation is at most 1"),
        ({"radius": -0.1}, "radius"),
        ({"radius": ((0.1, 0.2),)}, r"shape \(1, 2\); expected one number, or \(3, 4\)"),
        ({"sigma": 0}, "sigma"),
        ({"reference": (0.5, 0.5)}, "expected 16 positive probabilities"),
        ({"reference": (2.0, *[-1 / 15] * 15)}, "reference"),
        ({"normalize_obs": True}, "normalize_obs"),
        ({"reward": ("scale=2",)}, "known to its features"),
        ({"features": "table"}, "auto, kernel, module:function"),
        ({"features": "no_such_module:f"}, "no_such_module"),
        ({"features": f"{__name__}:nothing"}, "gave NoneType"),
        ({"features": f"{__name__}:FewActions"}, "of 3 actions, and the environment has 16"),
        ({"env": "CartPole-v1", "features": "kernel", "n_features": 9, "alpha": 1.0}, "finitely many"),
        ({"env": "CartPole-v1", "features": "kernel", "n_features": 9, "pooled": False}, "`pooled`"),
        ({"env": "Pendulum-v1"}, "Discrete"),
        ({"env": "FrozenLake-v1"}, "`rlkit/Finite-v0`"),
        ({"env": "CartPole-v1"}, "has none of its own"),
    ],
)  # fmt: skip
def test_bad_fields(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        agent(fields.pop("env", SIMULATED_ID), **fields)


def test_bad_experience() -> None:
    with pytest.raises(UserError, match="row 0 sums to 2"):
        agent(features=f"{__name__}:Off").learn(9)
    with pytest.raises(UserError, match=r"row 1 sums to 0\.5"):
        TableFeatures(np.array([[[1.0, 0.0], [0.5, 0.0]]]), np.zeros((2, 1, 2)))
    with pytest.raises(UserError, match="`buffer_size`: 50"):
        agent(buffer_size=50).learn(60)
    with pytest.raises(UserError, match="a reward of -1 is outside"):
        agent(FINITE_ID, env_kwargs={"env_id": "CliffWalking-v1", "horizon": 5}).learn(20)
    with pytest.raises(UserError, match="`eval_env_kwargs`"):
        agent(SimulatedLinearMDP(), eval_env_kwargs={"shift": 0.5}).evaluate(1)
