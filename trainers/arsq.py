"""ARSQ: a soft Q-network for continuous actions that chooses one bin of one dimension after the other.

Paper: Liu, Gao, Liao, Yu, Wang, Learning from Suboptimal Data in Continuous Control via Auto-Regressive Soft Q-Network,
arXiv:2502.00288. The paper's text could not be read; this is from its released code and from summaries of it.

Every dimension of an action is an interval that is divided into bins, and the chosen bin again, over some levels. The
choices are made in turn, all dimensions of a level before the next level, and each is valued given those before it:

    Q(s, a) = V(s) + sum_p A_p(s, c_p, b_p),    sum_b exp(A_p(s, c_p, b) / alpha) = 1,

where b_p is the p-th choice and c_p the centre of what the choices before it have left of the action's range. As every
A_p is normalised, alpha log sum_a exp(Q(s, a) / alpha) = V(s) whatever the weights, the policy exp((Q - V) / alpha) is
normalised, and a one-step soft consistency V(s) + alpha log pi(a|s) = r + gamma V(s') is enough to learn from: no next
action, no maximum and no actor. Dimensions are valued together without enumerating bins^(levels dimensions) actions.

It learns from demonstrations (`data`) of any quality, from the environment, or from both. Half of a batch are
demonstrations, on which a term of behaviour cloning ranks the demonstrated bin above others (`bc_type`); the other half
is drawn from all transitions, recorded and own.

Deviations from the paper as far as known: one update follows each step, not a whole episode's after the episode.
Deviations from the released code: recorded transitions are never overwritten by own ones (there, the last million of
all, sorted by return, remain, so that large datasets lose their worst part); the demonstrated band of returns is chosen
by `demo_band` alone; one function says what a choice is conditioned on, in training and in acting. Where its two parts
differ, in how behaviour cloning is averaged, there is an option (`bc_average`); `bc_type: margin_sum` is the form that
a summary ascribes to the paper.

Reading the numbers: A, `bc_margin` and `temperature` are in units of reward, so a margin of 1 at a temperature of 0.01
asks for odds of e^100. V holds the entropy's bonus: a uniform policy earns temperature * P * log(bins) a step. Where
few actions were seen, V + A(a) = y has many solutions; only behaviour cloning or wide data settle V.

Shapes: B batch, N critics, D action dimension, L levels, P = L D choices, a choice's number is p = l D + d.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import annotated_types as limits
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlkit.buffer import RolloutBuffer
from rlkit.config import Count, Fraction, NonNegative, Positive, Strict
from rlkit.errors import UserError
from rlkit.nets import ACTIVATIONS, ActivationName, EnsembleLinear, EnsembleMLP, RunningNorm, ToFloat32, orthogonal_
from rlkit.offline import Band, OfflineConfig, OfflineTrainer
from rlkit.optim import Adam, descend, polyak_
from rlkit.trainer import Batch

Conditioning = Literal["all", "level", "none"]


@dataclass(frozen=True, kw_only=True)
class ARSQNetConfig(Strict):
    """`policy_kwargs`: the networks."""

    net_arch: tuple[Count, ...] | dict[Literal["v", "a"], tuple[Count, ...]] = (512, 512, 512)
    """Hidden widths: one list, or a mapping with `v` (state values) and `a` (advantages)."""
    activation_fn: ActivationName = "tanh"
    """Activation of hidden layers."""
    n_critics: Count = 2
    """Pairs of both."""
    ortho_init: bool = True
    """Orthogonal initial weights, zero biases, and outputs near zero."""

    def widths(self, net: Literal["v", "a"]) -> tuple[int, ...]:
        """Hidden widths of the state values (`v`) or the advantages (`a`)."""
        return self.net_arch.get(net, ()) if isinstance(self.net_arch, dict) else self.net_arch


@dataclass(frozen=True, kw_only=True)
class BinsConfig(OfflineConfig):
    """What trainers share whose actions are bins, and which learn from demonstrations."""

    batch_size: Count = 512
    """Transitions of an update, demonstrations included."""
    tau: Fraction = 0.005
    """Averaging rate of the target critics."""
    levels: Count = 2
    """Times that a dimension's range is divided."""
    bins: Annotated[int, limits.Ge(2)] = 7
    """Parts into which it is divided each time."""
    td_coef: NonNegative = 1.0
    """Weight of the loss of values."""
    demo_fraction: Fraction = 0.5
    """Part of a batch that is demonstrations, where there is `data`; the rest is drawn from all transitions."""
    demo_band: Band = (0.0, 100.0)
    """Which recorded episodes are demonstrations: percentiles of their returns, such as 70 100 for the best 30 %."""
    bc_coef: NonNegative = 0.5
    """Weight of behaviour cloning."""


@dataclass(frozen=True, kw_only=True)
class ARSQConfig(BinsConfig):
    """Defaults are the released code's for D4RL, of its settings for Hopper where these differ by dataset."""

    zero_action: bool = True
    """Insist on a bin that is centred on 0, the action of doing nothing; it takes an odd number of `bins`."""
    temperature: Positive = 0.01
    """Alpha, in units of reward: of the advantages' normalisation, of the policy that explores, and of the entropy that
    values contain."""
    bc_type: Literal["cql", "margin", "margin_sum"] = "cql"
    """Behaviour cloning: against the log-sum-exp of the other bins, or a hinge on each of them, averaged (`margin`) or
    summed (`margin_sum`) over bins."""
    bc_margin: float = -1.0
    """Where its penalty ends: a demonstrated bin that leads by -`bc_margin` is not pushed further. In units of reward;
    a positive one leaves alone even what is behind by less."""
    bc_temperature: Positive = 1.0
    """Of the log-sum-exp in `bc_type: cql`."""
    bc_average: Literal["demonstrations", "batch"] = "demonstrations"
    """What its sum over demonstrations is divided by: their number, or the batch's."""
    conditioning: Conditioning = "all"
    """What a choice is conditioned on: `all` choices before it; those of the levels before (`level`), so that a level's
    dimensions are independent; or `none`. The last two are ablations."""
    act_with: Literal["online", "target"] = "online"
    """Critics that choose actions."""
    policy_kwargs: ARSQNetConfig = field(default_factory=ARSQNetConfig)
    """The networks."""


# Actions as choices of bins


def encode(actions: Tensor, levels: int, bins: int) -> Tensor:
    """Bins of actions in [-1, 1]: (..., D) -> (..., L, D) int64 from 0 to bins - 1; what is outside counts as the edge.

    In each level the interval that is left is divided into `bins` equal ones.
    """
    low, width, chosen = -torch.ones_like(actions), 2.0, []
    for _ in range(levels):
        width /= bins
        index = ((actions - low) / width).floor().clamp(0, bins - 1)
        low = low + width * index
        chosen.append(index.long())
    return torch.stack(chosen, dim=-2)


def decode(indices: Tensor, levels: int, bins: int) -> Tensor:
    """Actions at the centres of the last intervals: (..., L, D) -> (..., D); at most bins^-L from what was encoded."""
    if indices.shape[-2] != levels:
        raise UserError(f"decode: {indices.shape[-2]} levels of indices, expected {levels}")
    return _moves(indices, bins).sum(-2)


def _moves(indices: Tensor, bins: int) -> Tensor:
    """How far each choice moves its interval's centre: (..., L, D) -> the same, (2 b + 1 - bins) / bins^(l+1)."""
    levels = indices.shape[-2]
    sizes = torch.tensor([float(bins) ** -(level + 1) for level in range(levels)], device=indices.device)
    return (2 * indices + 1 - bins) * sizes.unsqueeze(-1)


def conditioning(indices: Tensor, bins: int, kind: Conditioning = "all") -> Tensor:
    """What each choice is conditioned on: (B, L, D) bins -> (B, P, D).

    c_p has the centre of every dimension's interval after the choices 0 to p - 1, so c_0 = 0; it does not depend on the
    choices from p on, which may hold anything. `level` has the centres after the levels before p's, `none` zeros.
    """
    moves = _moves(indices, bins)
    after = moves.cumsum(1)  # (B, L, D): centres when a level is complete
    before = F.pad(after[:, :-1], (0, 0, 1, 0))
    d = moves.shape[2]
    earlier = torch.ones(d, d, dtype=torch.bool, device=moves.device).tril(-1)  # [d, d']: d' is chosen before d
    if kind != "all":
        earlier = torch.zeros_like(earlier)
    centres = torch.where(earlier, after.unsqueeze(2), before.unsqueeze(2)).flatten(1, 2)
    return torch.zeros_like(centres) if kind == "none" else centres


# Values and losses


def soft_advantage(raw: Tensor, temperature: float) -> Tensor:
    """A = f - alpha log sum_b exp(f / alpha) over the last axis, so that sum_b exp(A / alpha) = 1; same shape."""
    return temperature * F.log_softmax(raw / temperature, dim=-1)


def soft_q(value: Tensor, advantage: Tensor, choices: Tensor) -> Tensor:
    """Q(s, a) = V(s) + sum_p A_p(b_p): (N, B).

    Args:
        value: (N, B).
        advantage: (N, B, P, bins), each conditioned on the choices before.
        choices: (B, P), the action's bins.
    """
    return value + chosen(advantage, choices).sum(-1)


def chosen(advantage: Tensor, choices: Tensor) -> Tensor:
    """A_p(b_p): (N, B, P, bins), (B, P) -> (N, B, P)."""
    index = choices.unsqueeze(-1).expand(advantage.shape[0], *choices.shape, 1)
    return advantage.gather(-1, index).squeeze(-1)


def td_target(reward: Tensor, discount: Tensor, terminated: Tensor, next_value: Tensor) -> Tensor:
    """y = r + gamma (1 - terminated) min_i Vbar_i(s'): (B,), for (B,) three times and (N, B).

    A time limit does not stop the bootstrap.
    """
    return reward + discount * (1.0 - terminated.to(reward.dtype)) * next_value.min(0).values


def td_loss(q: Tensor, target: Tensor) -> Tensor:
    """sum_i mean_B (Q_i(s, a) - y)^2, the soft consistency V + alpha log pi = r + gamma V'; q (N, B), target (B,)."""
    return (q - target).square().mean(1).sum()


def cql_penalty(advantage: Tensor, demonstrated: Tensor, margin: float, temperature: float = 1.0) -> Tensor:
    """sum_p max(C, T log sum_{b != e} exp(A_p(b) / T) - A_p(e)): (N, B).

    Args:
        advantage: (N, B, P, bins).
        demonstrated: (B, P), the bins e.
        margin: C.
    """
    index = demonstrated.unsqueeze(-1).expand(advantage.shape[0], *demonstrated.shape, 1)
    others = advantage.scatter(-1, index, -math.inf)
    lead = temperature * torch.logsumexp(others / temperature, -1) - chosen(advantage, demonstrated)
    return lead.clamp(min=margin).sum(-1)


def margin_penalty(advantage: Tensor, demonstrated: Tensor, margin: float, mean: bool = True) -> Tensor:
    """sum_p of the mean (or the sum) over b != e of max(C, A_p(b) - A_p(e)): (N, B); arguments of `cql_penalty`."""
    bins = advantage.shape[-1]
    ahead = (advantage - chosen(advantage, demonstrated).unsqueeze(-1)).clamp(min=margin)
    # The demonstrated bin's own term, max(C, 0), is taken out again.
    total = ahead.sum(-1) - max(margin, 0.0)
    return (total / (bins - 1) if mean else total).sum(-1)


def bc_loss(penalty: Tensor, demo: Tensor, over_batch: bool = False) -> Tensor:
    """sum_i of the mean of a penalty (N, B) over the rows with demo (B,) = 1, or over the whole batch."""
    weight = demo.to(penalty.dtype)
    rows = float(len(demo)) if over_batch else weight.sum().clamp(min=1.0)
    return (penalty * weight).sum() / rows


# Networks


class ChoiceNet(nn.Module):
    """N networks f(s, c) with one trunk and a head of its own for each step: (N, B, S, outputs).

    A step's head sees only that step's input, so S steps cost S heads and not S^2, and what the trunk's first layer
    makes of the state is computed once for all of them.
    """

    def __init__(
        self, n: int, obs_dim: int, action_dim: int, steps: int, outputs: int, widths: Sequence[int], activation: str,
        ortho_init: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if not widths:
            raise UserError("`policy_kwargs.net_arch`: the advantages need at least one hidden layer")
        self.activation = ACTIVATIONS[activation]
        first = EnsembleLinear(n, obs_dim + action_dim, widths[0])
        self.hidden = nn.ModuleList(EnsembleLinear(n, a, b) for a, b in itertools.pairwise(widths))
        bound = 1.0 / math.sqrt(widths[-1])
        self.head = nn.Parameter(torch.empty(n, steps, widths[-1], outputs).uniform_(-bound, bound))
        self.head_bias = nn.Parameter(torch.empty(n, 1, steps, outputs).uniform_(-bound, bound))
        if ortho_init:
            orthogonal_(first, math.sqrt(2))
            orthogonal_(self.hidden, math.sqrt(2))
            with torch.no_grad():
                for matrix in self.head.flatten(0, 1):
                    nn.init.orthogonal_(matrix, 0.01)
                self.head_bias.zero_()
        self.of_state = EnsembleLinear(n, obs_dim, widths[0])
        with torch.no_grad():
            self.of_state.weight.copy_(first.weight[:, :obs_dim])
            self.of_state.bias.copy_(first.bias)
        self.of_centre = nn.Parameter(first.weight[:, obs_dim:].detach().clone())

    def embed(self, obs: Tensor) -> Tensor:
        """The first layer's part of the state: (B, obs) -> (N, B, width)."""
        return self.of_state(obs.expand(self.of_centre.shape[0], *obs.shape))

    def forward(self, embedded: Tensor, centres: Tensor, start: int = 0) -> Tensor:
        """Outputs of the steps `start`, start + 1, ...: (N, B, width) of `embed`, (B, S, D) -> (N, B, S, outputs)."""
        rows, steps, d = centres.shape
        h = torch.matmul(centres.reshape(-1, d), self.of_centre).unflatten(1, (rows, steps))
        h = self.activation(h + embedded.unsqueeze(2)).flatten(1, 2)
        for layer in self.hidden:
            h = self.activation(layer(h))
        with torch.autocast(h.device.type, enabled=False):  # what is divided by a small temperature stays in float32
            h = h.to(self.head.dtype).unflatten(1, (rows, steps))
            out = torch.einsum("nbsh,nsho->nbso", h, self.head[:, start : start + steps])
            return out + self.head_bias[:, :, start : start + steps]


class SoftCritic(nn.Module):
    """N pairs of V(s) and of the advantages' networks."""

    def __init__(self, obs_dim: int, action_dim: int, config: ARSQConfig) -> None:
        super().__init__()
        net, self.levels, self.bins = config.policy_kwargs, config.levels, config.bins
        self.temperature, self.kind = config.temperature, config.conditioning
        self.choices = config.levels * action_dim
        self.value_net = EnsembleMLP(net.n_critics, [obs_dim, *net.widths("v"), 1], net.activation_fn)
        if net.ortho_init:
            orthogonal_(self.value_net, math.sqrt(2))
            orthogonal_(self.value_net.layers[-1], 0.01)
        self.advantage_net = ChoiceNet(
            net.n_critics, obs_dim, action_dim, self.choices, config.bins, net.widths("a"), net.activation_fn,
            net.ortho_init,
        )  # fmt: skip
        self.action_dim = action_dim

    def value(self, obs: Tensor) -> Tensor:
        """V(s): (B, obs) -> (N, B)."""
        return self.value_net(obs).squeeze(-1).float()

    def advantage(self, obs: Tensor, indices: Tensor) -> Tensor:
        """A_p(s, c_p, .) of all choices, given the bins (B, L, D) of an action: (N, B, P, bins)."""
        centres = conditioning(indices, self.bins, self.kind)
        return soft_advantage(self.advantage_net(self.advantage_net.embed(obs), centres), self.temperature)

    def choose(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """Bins (B, L, D), one choice after the other by min_i A_p^i: the best one, or one drawn by exp(A / alpha).

        Args:
            noise: standard Gumbel (B, P, bins); the largest of A / alpha + noise is such a draw.
        """
        embedded = self.advantage_net.embed(obs)
        taken: list[Tensor] = []
        for p in range(self.choices):
            open_ = [torch.zeros_like(obs[:, 0], dtype=torch.int64)] * (self.choices - p)
            indices = torch.stack([*taken, *open_], 1).unflatten(1, (self.levels, self.action_dim))
            centre = conditioning(indices, self.bins, self.kind)[:, p : p + 1]
            raw = self.advantage_net(embedded, centre, p)
            preference = soft_advantage(raw, self.temperature).min(0).values[:, 0]
            if noise is not None:
                preference = preference / self.temperature + noise[:, p]
            taken.append(preference.argmax(1))
        return torch.stack(taken, 1).unflatten(1, (self.levels, self.action_dim))


def track_critics(trainer: OfflineTrainer, critic: Callable[[int, int, Any], nn.Module]) -> None:
    """Make and track what ARSQ and CQN have in common: critics and their targets, made by `critic(obs_dim, action_dim,
    config)`, their optimiser, the normaliser of observations, the buffer of own transitions; and open the recording.
    """
    config: BinsConfig = trainer.config
    online, target = (critic(trainer.obs_dim, trainer.action_dim, config) for _ in range(2))
    target.requires_grad_(False).load_state_dict(online.state_dict())
    normalizer = RunningNorm(trainer.obs_dim) if config.normalize_obs else ToFloat32()
    trainer.track(normalizer=normalizer, critic=online, critic_target=target)
    buffer = RolloutBuffer(config.buffer_size, trainer.transition_fields(), trainer.device, name="buffer_size")
    trainer.track(critic_optimizer=Adam(online.parameters(), config.learning_rate), buffer=buffer)
    trainer.open_data({"demonstrations": config.demo_band})


# Settings of the released code for the datasets of D4RL; the name of an environment stands for `medium`.
_MARGIN: dict[str, Any] = {"bc_type": "margin", "bc_coef": 0.1}
_FINE: dict[str, Any] = {"levels": 1, "bins": 41}
PRESETS: dict[str, dict[str, Any]] = {
    "halfcheetah-medium-replay": {**_FINE, **_MARGIN},
    "halfcheetah-medium": {**_FINE, "bc_coef": 1.0},
    "halfcheetah-medium-expert": {**_FINE, **_MARGIN},
    "hopper-medium-replay": {**_MARGIN, "bc_coef": 0.03, "bc_margin": 1.0},
    "hopper-medium": {"bc_coef": 0.5},
    "hopper-medium-expert": {"bc_coef": 2.0},
    "walker2d-medium-replay": {**_FINE, **_MARGIN},
    "walker2d-medium": {**_FINE, "bc_coef": 10.0, "bc_margin": 0.0},
    "walker2d-medium-expert": {**_FINE, "bc_coef": 10.0, "bc_margin": 0.0},
}
PRESETS |= {
    "HalfCheetah-v5": PRESETS["halfcheetah-medium"],
    "Hopper-v5": PRESETS["hopper-medium"],
    "Walker2d-v5": PRESETS["walker2d-medium"],
    # Small networks and batches, for a CPU and tasks of low dimension.
    "small": {"batch_size": 128, "policy_kwargs": {"net_arch": [128, 128]}},
}


class ARSQ(OfflineTrainer):
    """Auto-regressive soft Q-network; see the module's text."""

    Config = ARSQConfig
    name = "arsq"
    chooses = True
    presets = PRESETS
    policy_parts = ("normalizer", "critic")
    default_task: ClassVar[Mapping[str, Any]] = {
        "env": "rlkit/TwinThrust-v0", "data": "rlkit.envs.coordination:twin_thrust_data", "preset": "small",
        "gamma": 0.95, "bc_coef": 0.1, "levels": 1, "bins": 15, "steps": 4_000, "log_every": 500,
        "eval_every": 1_000, "eval_episodes": 20,
    }  # fmt: skip

    critic: SoftCritic
    critic_target: SoftCritic
    critic_optimizer: Adam

    def build(self) -> None:
        config: ARSQConfig = self.config
        if config.zero_action and config.bins % 2 == 0:
            raise UserError(
                f"`bins`: got {config.bins}, with which no bin is centred on the action 0; give an odd number, or "
                "`zero_action=False`"
            )
        track_critics(self, SoftCritic)
        if config.act_with == "target":
            self.policy_parts = ("normalizer", "critic_target")  # type: ignore[misc]
        self._update = self.compilable(self._step)
        self._explore = self.compilable(self._choose)

    # Acting

    def explore(self, obs: Tensor) -> dict[str, Tensor]:
        return {"action": self._explore(obs, self._gumbel(len(obs), "explore"))}

    def act(self, obs: Tensor, deterministic: bool) -> Tensor:
        return self._choose(obs, None if deterministic else self._gumbel(len(obs), "predict"))

    def _choose(self, obs: Tensor, noise: Tensor | None) -> Tensor:
        """Actions (n, D) at the centres of the chosen bins."""
        config: ARSQConfig = self.config
        critic = self.critic if config.act_with == "online" else self.critic_target
        return decode(critic.choose(self.normalizer(obs), noise), config.levels, config.bins)

    def _gumbel(self, n: int, stream: str) -> Tensor:
        """Standard Gumbel noise (n, P, bins)."""
        config: ARSQConfig = self.config
        shape = (n, config.levels * self.action_dim, config.bins)
        exponential = torch.empty(shape, device=self.device).exponential_(generator=self.rng[stream])
        return -exponential.log()

    # Learning

    def batch(self) -> Batch:
        return self.with_demonstrations(self.config.demo_fraction)

    def update(self, batch: Batch) -> Mapping[str, Tensor]:
        self.schedule()
        return self._update(batch)

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient step of V and A on the soft consistency and behaviour cloning; then the targets."""
        config: ARSQConfig = self.config
        with self.autocast():
            obs, next_obs = self.normalizer(batch["obs"]), self.normalizer(batch["next_obs"])
            with torch.no_grad():
                next_value = self.critic_target.value(next_obs)
                y = td_target(batch["reward"], batch["discount"], batch["terminated"], next_value)
            indices = encode(batch["action"], config.levels, config.bins)
            choices = indices.flatten(1)
            value, advantage = self.critic.value(obs), self.critic.advantage(obs, indices)
        q = soft_q(value, advantage, choices)
        td = td_loss(q, y)
        bc = bc_loss(self._penalty(advantage, choices), batch["demo"], config.bc_average == "batch")
        loss = config.td_coef * td + config.bc_coef * bc
        norm = descend(self.critic_optimizer, loss)
        polyak_(self.critic_target, self.critic, config.tau)
        with torch.no_grad():
            agree = (advantage[0].argmax(-1) == choices).float().mean(1) * batch["demo"]
            entropy = -(advantage[0] / config.temperature * (advantage[0] / config.temperature).exp()).sum(-1)
        return {
            "train/loss": loss.detach(),
            "train/critic_loss": td.detach(),
            "train/bc_loss": bc.detach(),
            "train/grad_norm": norm,
            "train/q_mean": q.detach().mean(),
            "train/v_mean": value.detach().mean(),
            "train/entropy": entropy.sum(-1).mean(),
            "train/demo_agreement": agree.sum() / batch["demo"].sum().clamp(min=1),
        }

    def _penalty(self, advantage: Tensor, choices: Tensor) -> Tensor:
        config: ARSQConfig = self.config
        if config.bc_type == "cql":
            return cql_penalty(advantage, choices, config.bc_margin, config.bc_temperature)
        return margin_penalty(advantage, choices, config.bc_margin, config.bc_type == "margin")

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), "train/learning_rate": self.learning_rate}
