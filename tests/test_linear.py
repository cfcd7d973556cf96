"""Linear MDPs: exact robust values against known numbers, other ways to compute them, and simulation."""

from __future__ import annotations

import itertools

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from rlkit.envs.linear import (
    GRID_ID,
    SIMULATED_ID,
    SimulatedLinearMDP,
    SlipperyGrid,
    robust_q,
    robust_value,
    robust_values,
    simulate,
    soft_maximum,
)
from rlkit.errors import UserError


@pytest.mark.parametrize("name", [SIMULATED_ID, GRID_ID])
def test_gymnasium_accepts_them(name: str) -> None:
    check_env(gym.make(name).unwrapped, skip_render_check=True)


@pytest.mark.parametrize("mdp", [SimulatedLinearMDP(), SimulatedLinearMDP(shift=0.4), SlipperyGrid(slip=0.3)], ids=str)
def test_they_are_linear_mdps(mdp: SimulatedLinearMDP) -> None:
    """Features in the simplex, factors and initial states distributions."""
    for rows in (mdp.features, mdp.factors, mdp.dynamics, mdp.initial):
        assert (rows >= 0).all()
        np.testing.assert_allclose(rows.sum(-1), 1, atol=1e-12)


# --- the simulated one -------------------------------------------------------------------------------------------


def first_factor(radius: float) -> np.ndarray:
    """A table with a radius for the jump of step 0 alone."""
    table = np.zeros((3, 4))
    table[0, 3] = radius
    return table


def test_the_nominal_value_by_hand() -> None:
    """u = 0.4 with all signs +: V_2(x3) = u, V_1(x2) = u + u 1 + (1 - u) 0.999 u..., from the end on."""
    u = 0.4
    v2 = np.array([u, u, u, 0, 1])
    v1 = u + (1 - u) * (0.999 * v2[2]) + u * v2[4]
    v0 = (1 - u) * 0.999 * v1 + u * 2.0
    env = SimulatedLinearMDP()
    assert robust_value(env) == pytest.approx(v0)
    assert v0 == pytest.approx(1.423232, abs=1e-6)
    q = robust_q(env, robust_values(env))
    assert env.actions[q[0, 0].argmax()].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("radius", "value"), [(0.1, 1.343232), (0.3, 1.183232), (0.45, 1.063232), (0.5, 1.030976), (0.8, 0.910976)]
)
def test_a_radius_for_the_jump(radius: float, value: float) -> None:
    assert robust_value(gym.make(SIMULATED_ID), "tv_radius", first_factor(radius)) == pytest.approx(value, abs=1e-6)


def test_the_best_action_turns_where_the_jump_is_worth_less_than_the_way() -> None:
    """At 1 - 1.03872 / 2 = 0.48064 a failing jump is worth what the way over x2 is."""
    env = SimulatedLinearMDP()
    for radius, sign in ((0.48, 1), (0.4806, 1), (0.4807, -1), (0.481, -1)):
        table = first_factor(radius)
        q = robust_q(env, robust_values(env, "tv_radius", table), "tv_radius", table)
        assert env.actions[q[0, 0].argmax()].tolist() == [sign] * 4


@pytest.mark.parametrize(
    ("divergence", "level", "hard", "soft"),
    [
        ("tv_radius", 0.1, 1.210325, 1.027670),
        ("tv_radius", 0.3, 0.831551, 0.700692),
        ("tv_radius", 0.5, 0.515496, 0.430680),
        ("tv_penalty", 0.1, 0.099940, 0.099930),
        ("tv_penalty", 0.5, 0.499700, 0.499650),
        ("tv_penalty", 1.0, 0.999400, 0.896809),
        ("tv_penalty", 5.0, 1.423232, 1.212783),
        ("kl_penalty", 0.1, 1.212612, 1.092438),
        ("kl_penalty", 0.5, 1.421687, 1.211791),
        ("kl_penalty", 1.0, 1.422727, 1.212427),
        ("chi2_penalty", 0.1, 1.421469, 1.211454),
        ("chi2_penalty", 0.5, 1.422879, 1.212517),
        ("chi2_penalty", 1.0, 1.423056, 1.212650),
    ],
)
def test_exact_robust_values(divergence: str, level: float, hard: float, soft: float) -> None:
    """All factors; the hard maximum, and with a uniform reference at a temperature of 0.1."""
    env = SimulatedLinearMDP()
    assert robust_value(env, divergence, level) == pytest.approx(hard, abs=1e-6)
    assert robust_value(env, divergence, level, eta=0.1) == pytest.approx(soft, abs=1e-6)


def test_the_soft_maximum_is_the_regularised_optimum() -> None:
    """<pi, q> - eta KL(pi || ref) at pi = ref exp(q / eta) / Z, and less at any other policy."""
    rng = np.random.default_rng(0)
    q, ref = rng.normal(size=5), rng.dirichlet(np.ones(5))

    def worth(pi: np.ndarray) -> float:
        return float(pi @ q - 0.3 * (pi * np.log(pi / ref)).sum())

    best = ref * np.exp(q / 0.3)
    assert soft_maximum(q, ref, 0.3) == pytest.approx(worth(best / best.sum()), abs=1e-12)
    assert all(worth(rng.dirichlet(np.ones(5))) < soft_maximum(q, ref, 0.3) for _ in range(100))
    assert soft_maximum(q, ref, 1e-4) == pytest.approx(q.max(), abs=1e-3)
    assert soft_maximum(q, ref, 1e5) == pytest.approx(ref @ q, abs=1e-3)


def test_the_value_of_a_policy_is_that_of_the_best_one_where_it_is_best() -> None:
    env = SimulatedLinearMDP()
    v = robust_values(env, "tv_radius", 0.3, eta=0.1)
    q = robust_q(env, v, "tv_radius", 0.3)
    policy = np.exp((q - q.max(-1, keepdims=True)) / 0.1)
    policy /= policy.sum(-1, keepdims=True)
    np.testing.assert_allclose(robust_values(env, "tv_radius", 0.3, eta=0.1, policy=policy), v, atol=1e-12)
    uniform = np.full_like(policy, 1 / 16)
    assert robust_value(env, "tv_radius", 0.3, eta=0.1, policy=uniform) < v[0, 0] - 1e-3


@pytest.mark.parametrize("shift", [0.0, 0.3, 0.6, 1.0])
def test_simulated_returns_are_the_exact_ones(shift: float) -> None:
    """The mean of 3,000 episodes within five standard errors, with all signs - or + in step 0, + later. In the target
    + is better below q = 0.48012 and worse above."""
    env = SimulatedLinearMDP(shift=shift)
    exact = []
    for first in (0, 15):
        policy = np.zeros((3, 5, 16))
        policy[0, :, first] = policy[1:, :, 15] = 1
        exact.append(simulate(env, policy))
        env.reset(seed=first)
        returns = []
        for _ in range(3_000):
            env.reset()
            rewards = []
            for h in range(3):
                obs, reward, terminated, over, _ = env.step(first if h == 0 else 15)
                rewards.append(reward)
                assert (terminated, over, obs.tolist()) == (False, h == 2, [env.state, h + 1])
            returns.append(sum(rewards))
        assert np.mean(returns) == pytest.approx(exact[-1], abs=5 * np.std(returns) / 3_000**0.5)
    assert (exact[1] > exact[0]) == (shift < 0.48012)


# --- the grid ----------------------------------------------------------------------------------------------------


def test_the_grid_without_slipping_is_walked_to_both_goals() -> None:
    env = SlipperyGrid(slip=0.0)
    left, down, right, up = range(4)
    for way, rewards in (
        ((right, right, right, left, left), [0, 0, 0, 0.6, 0]),
        ((right, right, down, down, down, right, up, up), [0, 0, 0, 0, 0, 0, 1, 0]),
    ):
        env.reset(seed=0)
        assert [env.step(action)[1] for action in way] == rewards
        assert env.state == 16
    env.reset(seed=0)
    env.step(down)
    env.step(down)  # into the hole
    assert env.state == 8
    assert [(env.step(up)[1], env.state) for _ in range(2)] == [(0.0, 16), (0.0, 16)]


def test_robust_values_of_the_grid_are_value_iteration_with_the_worst_law_of_each_pair() -> None:
    """By hand: a radius of 0.2 takes a fifth of the mass from the best next states to the worst one, pair by pair."""
    env = SlipperyGrid()
    v = np.zeros(17)
    laws = env._laws(env.NOMINAL_SLIP)
    for _ in range(env.horizon):
        q = np.zeros((17, 4))
        for s, a in itertools.product(range(17), range(4)):
            law, left = laws[s, a].copy(), 0.2
            for best in v.argsort()[::-1]:
                moved = min(left, law[best])
                law[best] -= moved
                left -= moved
            law[v.argmin()] += 0.2
            q[s, a] = {3: 0.6, 15: 1.0}.get(s, 0.0) + law @ v
        v = q.max(1)
        v[16] = 0
    assert robust_value(env, "tv_radius", 0.2) == pytest.approx(v[0], abs=1e-12)
    assert v[0] < robust_value(env)


def test_a_robust_policy_of_the_grid_gives_up_some_return_for_a_better_worst_case() -> None:
    env = SlipperyGrid()
    nominal, careful = (
        np.eye(4)[robust_q(env, robust_values(env, "tv_radius", radius), "tv_radius", radius).argmax(-1)]
        for radius in (0.0, 0.1)
    )
    assert simulate(env, nominal) > simulate(env, careful)
    worst = [robust_value(env, "tv_radius", 0.1, policy=policy) for policy in (nominal, careful)]
    assert worst[1] > worst[0]


def test_bad_input() -> None:
    with pytest.raises(UserError, match="`shift`: got 2"):
        SimulatedLinearMDP(shift=2)
    with pytest.raises(UserError, match="`slip`: got -1"):
        SlipperyGrid(slip=-1)
    with pytest.raises(UserError, match="unknown `tv`; known: tv_radius"):
        robust_value(SimulatedLinearMDP(), "tv")
    with pytest.raises(UserError, match=r"one number, or \(3, 4\)"):
        robust_value(SimulatedLinearMDP(), "tv_radius", np.zeros((2, 4)))
