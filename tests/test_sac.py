"""SAC against known answers: quadrature, fixed points, finite and infinite horizons, isolation of gradients."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from scipy import integrate

import rlkit
from rlkit.errors import UserError
from rlkit.trainers.sac import SAC, actor_loss, critic_loss, tanh_gaussian, td_target, temperature_loss

SMALL = {"policy_kwargs": {"net_arch": [16, 16]}, "batch_size": 8, "learning_starts": 10, "buffer_size": 500}


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.3), (-1.5, 0.8), (0.0, 3.0)])
def test_log_prob_is_a_density(mean: float, std: float) -> None:
    """exp(log pi(a)) integrates to 1 over (-1, 1): wrong log-determinants and wrong axes fail."""

    def density(u: float) -> float:
        # Integrate over u: a = tanh(u), da = (1 - a^2) du, so that the narrow ends are resolved.
        noise = torch.tensor([(u - mean) / std], dtype=torch.float64)
        _, logp = tanh_gaussian(torch.tensor([mean]).double(), torch.tensor([math.log(std)]).double(), noise)
        return math.exp(float(logp)) * (1 - math.tanh(u) ** 2)

    total, _ = integrate.quad(density, mean - 8 * std, mean + 8 * std, limit=200)
    assert total == pytest.approx(1, abs=1e-6)


def test_log_det_where_tanh_saturates() -> None:
    """At u = 9, log(1 - tanh(u)^2) = -16.6137 (2 (log 2 - 9) to 1e-7); float32 log(1 - a^2 + 1e-6) says -13.8."""
    _, logp = tanh_gaussian(torch.tensor([9.0]), torch.tensor([0.0]), torch.tensor([0.0]))
    assert float(logp) == pytest.approx(-0.5 * math.log(2 * math.pi) + 16.6137, abs=1e-3)


def test_log_prob_sums_over_dimensions() -> None:
    mean, log_std, noise = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0)).unbind(0)
    action, logp = tanh_gaussian(mean, log_std, noise)
    parts = [tanh_gaussian(mean[:, i : i + 1], log_std[:, i : i + 1], noise[:, i : i + 1])[1] for i in range(2)]
    assert action.shape == (5, 2)
    torch.testing.assert_close(logp, parts[0] + parts[1])


def test_target_uses_the_minimum_and_keeps_its_shape() -> None:
    """With Qbar_1 = Qbar_2 + 1 everywhere, y = r + 0.9 (Qbar_2 - 0.2 logp), and no (B, B) broadcast."""
    q2 = torch.tensor([1.0, -2.0, 3.0])
    reward, logp = torch.tensor([0.5, 0.0, -1.0]), torch.tensor([-1.0, 0.5, 2.0])
    terminated = torch.tensor([False, False, True])
    y = td_target(reward, torch.full((3,), 0.9), terminated, torch.stack([q2 + 1, q2]), logp, torch.tensor(0.2))
    expected = [0.5 + 0.9 * (1.0 + 0.2), 0.9 * (-2.0 - 0.1), -1.0]
    torch.testing.assert_close(y, torch.tensor(expected))


def test_losses_by_hand() -> None:
    q, y = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([2.0, 2.0])
    assert float(critic_loss(q, y)) == pytest.approx(0.5 * (1 / 2) + 0.5 * ((4 + 4) / 2))
    logp, value = torch.tensor([-1.0, 1.0]), torch.tensor([2.0, 4.0])
    assert float(actor_loss(logp, value, torch.tensor(0.5))) == pytest.approx(-3.0)
    log_alpha = torch.tensor(math.log(0.2), requires_grad=True)
    for form, factor in (("log_alpha", 1.0), ("alpha", 0.2)):
        (grad,) = torch.autograd.grad(temperature_loss(log_alpha, logp, -1.5, form), log_alpha)
        assert float(grad) == pytest.approx(1.5 * factor)  # -(mean logp - 1.5) c'


@pytest.mark.parametrize("form", ["log_alpha", "alpha"])
def test_temperature_fixed_point(form: str) -> None:
    """Q(a) = -k a^2 / 2 with k = 10 and target entropy -1 in one dimension: mean 0, std 0.0897, alpha 0.0793.

    Derivation: at the optimum pi(a) is proportional to exp(Q / alpha), a Gaussian of variance alpha / k inside (-1, 1);
    its entropy 1/2 log(2 pi e s^2) = -1 gives s = e^-1 / sqrt(2 pi e) = 0.0890 for a plain Gaussian (0.0897 before the
    tanh, by quadrature) and alpha = 0.00793 k.
    """
    noise = torch.special.ndtri((torch.arange(512) + 0.5) / 512).double().unsqueeze(1)  # quantiles: no sampling error
    mean = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    log_alpha = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    fast, slow = torch.optim.Adam([mean, log_std], lr=0.02), torch.optim.Adam([log_alpha], lr=0.02)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.999) for o in (fast, slow)]
    for _ in range(4000):
        action, logp = tanh_gaussian(mean.expand(512, 1), log_std.expand(512, 1), noise)
        loss = actor_loss(logp, -5 * action.squeeze(1) ** 2, log_alpha.detach().exp())
        for optimizer, parameters, value in (
            (fast, [mean, log_std], loss),
            (slow, [log_alpha], temperature_loss(log_alpha, logp, -1.0, form)),
        ):
            for parameter, grad in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
                parameter.grad = grad
            optimizer.step()
        for schedule in schedules:
            schedule.step()
    assert float(mean.detach()) == pytest.approx(0.0, abs=1e-3)
    assert float(log_std.detach().exp()) == pytest.approx(0.0897, abs=5e-4)
    assert float(log_alpha.detach().exp()) == pytest.approx(0.0793, abs=1e-3)


class Clock(gym.Env):
    """One action dimension, reward 1 a step, observation = step; ends after 5 steps by a limit or by termination."""

    observation_space = gym.spaces.Box(0.0, 5.0, (1,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, terminates: bool, visible: bool) -> None:
        self.terminates, self.visible, self.t = terminates, visible, 0

    def _obs(self) -> np.ndarray:
        return np.array([self.t if self.visible else 0.0], np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        over = self.t == 5
        return self._obs(), 1.0, over and self.terminates, over and not self.terminates, {}


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("terminates", [False, True])
def test_value_of_one_state(n_steps: int, terminates: bool) -> None:
    """r = 1, gamma = 0.9, alpha = 0.2, entropy -1: Q = (r + gamma alpha H) / (1 - gamma) = 8.2.

    A time limit of 5 changes nothing. With termination, Q(s_t) = sum of the remaining rewards, where each but the last
    is followed by the discounted entropy bonus: Q_4 = 1, Q_t = 1 + 0.9 (Q_{t+1} - 0.2). The rows come from the real
    collection and buffer, the values from iterating the real target on a table over them.

    n-step targets leave out the bonuses inside the sum (as Stable-Baselines3's do), so for n > 1 the fixed point has
    one bonus every n steps: Q = (sum_{k<n} gamma^k - gamma^n 0.2) / (1 - gamma^n).
    """
    agent = SAC(lambda_env(terminates), **{**SMALL, "gamma": 0.9, "n_steps": n_steps, "learning_starts": 400})
    agent.learn(400)
    rows = agent.buffer.rows(torch.arange(len(agent.buffer)))
    alpha, logp, gamma = torch.tensor(0.2), torch.tensor(1.0), 0.9
    table = torch.zeros(6)
    state, following = rows["obs"].long().squeeze(1), rows["next_obs"].long().squeeze(1)
    for _ in range(300):
        y = td_target(
            rows["reward"],
            rows["discount"],
            rows["terminated"],
            table[following].expand(2, -1),
            logp.expand(len(state)),
            alpha,
        )
        totals, counts = torch.zeros(6).index_add(0, state, y), torch.zeros(6).index_add(0, state, torch.ones_like(y))
        table = torch.where(counts > 0, totals / counts.clamp(min=1), table)
    if terminates:
        expected = [0.0] * 6
        for t in reversed(range(5)):
            m = min(n_steps, 5 - t)
            bootstrap = 0.0 if t + m == 5 else gamma**m * (expected[t + m] - 0.2)
            expected[t] = sum(gamma**k for k in range(m)) + bootstrap
        torch.testing.assert_close(table[:5], torch.tensor(expected[:5]), atol=1e-4, rtol=0)
    elif n_steps == 1:
        assert float(table[0]) == pytest.approx(8.2, abs=1e-3)  # sums of 400 float32 values
    else:
        # One state, but rows near the limit sum fewer rewards: solve the linear fixed point of the five kinds of rows.
        sums = [(sum(gamma**k for k in range(m)), gamma**m) for m in (3, 3, 3, 2, 1)]
        a, b = sum(s - d * 0.2 for s, d in sums) / 5, sum(d for _, d in sums) / 5
        share = len(agent.buffer) / 400
        assert float(table[0]) == pytest.approx(a / (1 - b), abs=0.02)
        assert share > 0.99


def lambda_env(terminates: bool) -> list:
    return [lambda: Clock(terminates=terminates, visible=terminates)]


def parameters(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def test_gradients_stay_where_they_belong() -> None:
    """The critic's step is the same with and without the actor's and temperature's, and leaves theirs alone."""
    both, critic_only = (SAC("Pendulum-v1", policy_delay=d, **SMALL) for d in (1, 1000))
    for agent in (both, critic_only):
        agent.learn(10)
        agent.before = parameters(agent.actor), parameters(agent.critic), agent.log_alpha().item()
        agent.update(agent.batch())
    for a, b in zip(parameters(both.critic), parameters(critic_only.critic), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(critic_only.before[0], parameters(critic_only.actor), strict=True))
    assert critic_only.before[2] == critic_only.log_alpha().item()
    assert not any(torch.equal(a, b) for a, b in zip(both.before[0], parameters(both.actor), strict=True))
    assert both.before[2] != both.log_alpha().item()


class Scaled(gym.ActionWrapper):
    """Pendulum whose action bounds are `factor` times as wide, with the same physics."""

    def __init__(self, factor: float) -> None:
        super().__init__(gym.make("Pendulum-v1"))
        self.factor = factor
        self.action_space = gym.spaces.Box(-2.0 * factor, 2.0 * factor, (1,), np.float32)

    def action(self, action: np.ndarray) -> np.ndarray:
        return action / np.float32(self.factor)


def test_action_bounds_do_not_change_learning() -> None:
    """Twice as wide bounds on the same physics: the same policy, temperature and log-probabilities, bit for bit."""
    one, two = (SAC([lambda f=f: Scaled(f)], **SMALL).learn(60) for f in (1.0, 2.0))
    assert one.log_alpha().item() == two.log_alpha().item()
    for a, b in zip(parameters(one.actor), parameters(two.actor), strict=True):
        assert torch.equal(a, b)
    obs = np.zeros((4, 3), np.float32)
    np.testing.assert_allclose(2 * one.predict(obs, deterministic=True)[0], two.predict(obs, deterministic=True)[0])


def test_target_networks_follow() -> None:
    """tau = 1 copies the critics; target_update_interval = 2 leaves every other update's targets alone."""
    agent = SAC("Pendulum-v1", tau=1.0, target_update_interval=2, **SMALL)
    agent.learn(11)  # one update
    before = parameters(agent.critic_target)
    assert not torch.equal(before[0], parameters(agent.critic)[0])
    agent.learn(1)
    for a, b in zip(parameters(agent.critic_target), parameters(agent.critic), strict=True):
        assert torch.equal(a, b)


def test_redq_and_droq_are_configurations() -> None:
    redq = SAC("Pendulum-v1", preset="redq", **{**SMALL, "policy_kwargs": {"net_arch": [16, 16]}})
    assert redq.config.policy_kwargs.n_critics == 10
    assert redq.config.target_critics == 2
    assert redq.critic(torch.zeros(7, 3), torch.zeros(7, 1)).shape == (10, 7)
    redq.learn(12)
    assert redq.updates == 2 * 20
    droq = SAC("Pendulum-v1", preset="droq", **SMALL)
    assert droq.config.policy_kwargs.layer_norm
    droq.learn(12)
    names = [name for name, _ in droq.critic.named_parameters()]
    assert any("norms" in name for name in names)


def test_dropout_acts_in_all_three_passes() -> None:
    """Targets, critics and the actor's critics (DroQ, Algorithm 1): masks of one are no dropout, and each pass's masks
    move what depends on it, by the gradient norms, and nothing that came before it.
    """
    fields = {**SMALL, "policy_kwargs": {"net_arch": [16, 16], "layer_norm": True, "dropout": 0.5}}

    def norms(*passes: str) -> tuple[float, float]:
        agent = SAC("Pendulum-v1", **fields).learn(10)
        batch = agent.batch()
        n = len(batch["reward"])
        noise = {name: agent._noise(n, agent.rng["noise"]) for name in ("actor", "next")}
        drawn = {name: agent.critic.net.masks(n, agent.rng["dropout"]) for name in ("target", "critic", "actor")}
        masks = {name: drawn[name] if name in passes else [mask * 0 + 1 for mask in drawn[name]] for name in drawn}
        metrics = agent._step(batch, noise, masks, update_actor=True, update_target=True)
        return float(metrics["train/critic_grad_norm"]), float(metrics["train/actor_grad_norm"])

    critic, actor = norms()
    fields["policy_kwargs"]["dropout"] = 0.0
    assert norms() == (critic, actor)
    fields["policy_kwargs"]["dropout"] = 0.5
    assert norms("target")[0] != critic
    assert norms("critic")[0] != critic
    assert norms("actor")[0] == critic
    assert norms("actor")[1] != actor


def test_fixed_temperature_stays() -> None:
    agent = SAC("Pendulum-v1", ent_coef=0.2, **SMALL).learn(15)
    assert agent.log_alpha().exp().item() == pytest.approx(0.2)
    assert SAC("Pendulum-v1", ent_coef="auto_0.1", **SMALL).log_alpha().exp().item() == pytest.approx(0.1)
    assert SAC("Pendulum-v1", ent_coef=0.0, **SMALL).learn(15).log_alpha().exp().item() == 0.0


def test_unreachable_entropy_is_refused_and_would_diverge() -> None:
    """A policy on [-1, 1] has less than log 2 nats: the gap for target 5 never closes, so log alpha only grows."""
    with pytest.raises(UserError, match=r"target_entropy.*0\.693 nats"):
        SAC("Pendulum-v1", target_entropy=5.0, **SMALL)
    log_alpha = torch.tensor(0.0, requires_grad=True)
    uniform_logp = torch.tensor([-math.log(2.0)])
    (grad,) = torch.autograd.grad(temperature_loss(log_alpha, uniform_logp, 5.0), log_alpha)
    assert float(grad) < 0


def test_linear_schedule_and_its_horizon() -> None:
    agent = SAC("Pendulum-v1", learning_rate_schedule="linear", learning_rate=1e-3, **SMALL).learn(20)
    assert agent.learning_rate == 0.0
    assert agent.horizon == 20
    rates = []
    fresh = SAC("Pendulum-v1", learning_rate_schedule="linear", learning_rate=1e-3, **SMALL)
    fresh.learn(20, callback=lambda t: rates.append(t.learning_rate))
    assert rates == pytest.approx([1e-3 * (1 - k / 20) for k in range(1, 21)])


@pytest.mark.parametrize("n_envs", [1, 3])
def test_updates_follow_the_ratio(n_envs: int) -> None:
    """learning_starts 10, train_freq 2, gradient_steps 3: after 30 vector steps, 3 updates for every second vector step
    that ends past 10 transitions; with gradient_steps -1, one update a transition gathered since the last ones.
    """
    agent = SAC("Pendulum-v1", n_envs=n_envs, train_freq=2, gradient_steps=3, **SMALL).learn(30 * n_envs)
    expected = sum(3 for v in range(1, 31) if v * n_envs > 10 and v % 2 == 0)
    assert agent.updates == expected
    every = SAC("Pendulum-v1", n_envs=n_envs, train_freq=2, gradient_steps=-1, **SMALL).learn(30 * n_envs)
    first = min(v for v in range(1, 31) if v * n_envs > 10 and v % 2 == 0)
    assert every.updates == 30 * n_envs, "transitions before the first update count for it"
    assert first > 0


def test_normalised_observations_travel_with_the_policy(tmp_path) -> None:
    agent = SAC("Pendulum-v1", normalize_obs=True, **SMALL).learn(40)
    seen = agent.buffer["obs"].double()
    torch.testing.assert_close(agent.normalizer.mean, seen.mean(0))
    torch.testing.assert_close(agent.normalizer.var, seen.var(0, unbiased=False))
    loaded = rlkit.load(agent.save(tmp_path / "agent"), inference=True)
    obs = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    np.testing.assert_array_equal(agent.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    assert loaded.normalizer.count.item() == 40


def test_bf16_runs_and_stays_near_float32() -> None:
    """One update in bf16 moves the critic's loss by rounding only: 8 mantissa bits, so within 5 %."""
    losses = []
    for precision in ("float32", "bf16"):
        agent = SAC("Pendulum-v1", precision=precision, **SMALL).learn(10)
        losses.append(float(agent.update(agent.batch())["train/critic_loss"]))
        assert next(agent.actor.parameters()).dtype == torch.float32
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[0] != losses[1]
