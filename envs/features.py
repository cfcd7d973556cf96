"""Features phi(s, a) in the simplex, for learners that are linear in them: of tables, of kernels, and of your own.

A `FeatureMap` says what `rlkit.trainers.dr_rpo` has to know of an environment with discrete actions: features, the
number H of steps to plan, the step that an observation is of, and what is known of rewards. It comes from

- the environment: a method `feature_map()`, as those of `rlkit.envs.linear` have, returns one;
- `rlkit/Finite-v0`, which makes any environment whose observations are `Discrete` one with a table: `env_kwargs` are
  `env_id`, `horizon`, and those of that environment;
- `kernel_features`, for `Box` observations;
- a function of your own, `module:function`, which gets an environment and returns one.

Shapes: n observations, A actions, d features, S states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlkit.errors import UserError

SIMPLEX_TOLERANCE = 1e-6

Array = NDArray[np.float64]


class FeatureMap(nn.Module):
    """Features of observations and actions; a subclass sets the attributes and defines `forward`.

    Attributes:
        size: d.
        actions: A.
        horizon: H, the steps that are planned for.
        timed: whether the last component of an observation is the step. Without it the policy is the one of the first
            of H steps, again and again.
        pooled: whether the dynamics of all steps are the same, so that what was seen in any of them is one set of data.
        finite: S where observations are of so many states, else None.
        reward_range: the least and the largest reward of a step.
        total: the most that an episode can pay; None for H times the largest reward.
    """

    size: int
    actions: int
    horizon: int
    timed: bool = True
    pooled: bool = False
    finite: int | None = None
    reward_range: tuple[float, float] = (0.0, 1.0)
    total: float | None = None

    def forward(self, obs: Tensor) -> Tensor:
        """phi, (n, A, d) float64, of observations (n, obs_dim) float64."""
        raise NotImplementedError

    def step(self, obs: Tensor) -> Tensor:
        """The step of the episode in [0, H), (n,) int64."""
        if not self.timed:
            return torch.zeros(len(obs), dtype=torch.int64, device=obs.device)
        return obs[:, -1].round().long().clamp(0, self.horizon - 1)

    def rewards(self, obs: Tensor, h: Tensor | int) -> Tensor | None:
        """(n, A) of steps h, (n,) or one for all, where rewards are known; None to have them estimated."""
        return None

    def without_step(self, obs: NDArray[Any]) -> NDArray[Any]:
        """What of observations (n, obs_dim) is the state."""
        return obs[:, :-1] if self.timed else obs

    def over(self, obs: Tensor) -> Tensor:
        """(n,): whether nothing is to be had any more, as in a failed state; `terminated` says so besides."""
        return torch.zeros(len(obs), dtype=torch.bool, device=obs.device)

    def state(self, obs: Tensor) -> Tensor:
        """(n,) int64, the state's number; of `finite` maps."""
        raise NotImplementedError

    def bounds(self, h: int) -> tuple[float, float]:
        """The least and the largest sum of rewards from step h on."""
        left = self.horizon - h
        low, high = (bound * left for bound in self.reward_range)
        return min(low, 0.0), max(high, 0.0) if self.total is None else min(max(high, 0.0), self.total)

    def recipe(self) -> dict[str, Any] | None:
        """What `rebuilt` makes an empty map of this shape from, whose weights a checkpoint has; None: it takes the
        environment.
        """
        return None


class TableFeatures(FeatureMap):
    """A table for states that are observed as [number, step].

    Args:
        table: (S, A, d), rows in the simplex, or zero where nothing follows.
        rewards: (H, S, A), known.
        failed: an absorbing state without reward.
        pooled: see `FeatureMap`.

    Raises:
        UserError: a row that is neither.
    """

    def __init__(self, table: Array, rewards: Array, failed: int | None = None, pooled: bool = False) -> None:
        super().__init__()
        self.finite, self.actions, self.size = table.shape
        self.horizon, self.failed, self.pooled = len(rewards), failed, pooled
        found = torch.tensor(np.ascontiguousarray(table), dtype=torch.float64)
        check_simplex(found)
        self.register_buffer("table", found)
        self.register_buffer("known", torch.tensor(np.ascontiguousarray(rewards), dtype=torch.float64))
        self.reward_range = float(rewards.min(initial=0.0)), float(rewards.max(initial=0.0))

    table: Tensor
    known: Tensor

    def state(self, obs: Tensor) -> Tensor:
        assert self.finite is not None
        return obs[:, 0].round().long().clamp(0, self.finite - 1)

    def forward(self, obs: Tensor) -> Tensor:
        return self.table[self.state(obs)]

    def rewards(self, obs: Tensor, h: Tensor | int) -> Tensor | None:
        return self.known[h, self.state(obs)]

    def over(self, obs: Tensor) -> Tensor:
        return super().over(obs) if self.failed is None else self.state(obs) == self.failed

    def recipe(self) -> dict[str, Any]:
        sizes = [self.finite, self.actions, self.size, self.horizon]
        about = {"failed": self.failed, "pooled": self.pooled, "range": list(self.reward_range)}
        return {"kind": "table", "sizes": sizes, **about}

    @classmethod
    def empty(cls, of: Mapping[str, Any]) -> TableFeatures:
        states, actions, size, horizon = of["sizes"]
        made = cls(np.zeros((states, actions, size)), np.zeros((horizon, states, actions)), of["failed"], of["pooled"])
        made.reward_range = (of["range"][0], of["range"][1])
        return made


class OneHot(FeatureMap):
    """A feature for each pair of a state and an action, of states observed as [number, step]; rewards are estimated.

    The worst case is then one for each pair: (s, a)-rectangular. Dynamics are pooled.
    """

    def __init__(self, states: int, actions: int, horizon: int, reward_range: tuple[float, float] = (0.0, 1.0)) -> None:
        super().__init__()
        self.finite, self.actions, self.horizon, self.size = states, actions, horizon, states * actions
        self.pooled = True
        self.reward_range = reward_range

    def state(self, obs: Tensor) -> Tensor:
        assert self.finite is not None
        return obs[:, 0].round().long().clamp(0, self.finite - 1)

    def forward(self, obs: Tensor) -> Tensor:
        pairs = self.state(obs)[:, None] * self.actions + torch.arange(self.actions, device=obs.device)
        return nn.functional.one_hot(pairs, self.size).double()

    def recipe(self) -> dict[str, Any]:
        sizes = [self.finite, self.actions, self.horizon]
        return {"kind": "one_hot", "sizes": sizes, "range": list(self.reward_range)}

    @classmethod
    def empty(cls, of: Mapping[str, Any]) -> OneHot:
        states, actions, horizon = of["sizes"]
        return cls(states, actions, horizon, (of["range"][0], of["range"][1]))


class KernelFeatures(FeatureMap):
    """Gaussian kernels at centres, normalised, for each action: d = A m.

    phi(s, a) has k_i(s) = exp(-|(s - c_i) / width|^2 / 2), divided by their sum, in the places of action a. Such
    features average over what was seen nearby. Dynamics are pooled, and observations do not say the step.

    Args:
        centres: (m, obs_dim).
        width: (obs_dim,), of each component.
        actions: A.
        horizon: H.
    """

    centres: Tensor
    width: Tensor

    def __init__(
        self,
        centres: Array,
        width: Array,
        actions: int,
        horizon: int,
        reward_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        self.timed, self.pooled = False, True
        self.actions, self.horizon, self.size = actions, horizon, actions * len(centres)
        self.reward_range = reward_range
        self.register_buffer("centres", torch.tensor(centres, dtype=torch.float64))
        self.register_buffer("width", torch.tensor(width, dtype=torch.float64))

    def forward(self, obs: Tensor) -> Tensor:
        apart = (obs.double().unsqueeze(1) - self.centres) / self.width
        kernels = torch.softmax(-0.5 * apart.square().sum(-1), -1)  # (n, m), the normalised Gaussians
        chosen = torch.eye(self.actions, dtype=kernels.dtype, device=obs.device)
        return (chosen[:, :, None] * kernels[:, None, None, :]).flatten(2)

    def recipe(self) -> dict[str, Any]:
        return {
            "kind": "kernel", "sizes": list(self.centres.shape), "actions": self.actions, "horizon": self.horizon,
            "range": list(self.reward_range),
        }  # fmt: skip

    @classmethod
    def empty(cls, of: Mapping[str, Any]) -> KernelFeatures:
        m, dim = of["sizes"]
        return cls(np.zeros((m, dim)), np.ones(dim), of["actions"], of["horizon"], (of["range"][0], of["range"][1]))


class PutFeatures(FeatureMap):
    """Of `rlkit.envs.linear.AmericanPut`, observed as [price, step]: hats of holding, nothing of exercising.

    Args:
        anchors: (d,) prices, ascending; hat i is 1 at its own and 0 at the others, and linear between them.
        horizon, strike, unit: of the option.
    """

    anchors: Tensor
    pooled = True
    total = 1.0

    def __init__(self, anchors: Array, horizon: int, strike: float, unit: float) -> None:
        super().__init__()
        self.size, self.actions, self.horizon, self.strike, self.unit = len(anchors), 2, horizon, strike, unit
        self.register_buffer("anchors", torch.tensor(anchors, dtype=torch.float64))

    def forward(self, obs: Tensor) -> Tensor:
        place = (obs[:, :1].double() - self.anchors[0]) / (self.anchors[1] - self.anchors[0])
        place = place.clamp(0, self.size - 1)
        hats = (1 - (place - torch.arange(self.size, device=obs.device)).abs()).clamp(min=0)
        return torch.stack([hats, torch.zeros_like(hats)], 1)

    def rewards(self, obs: Tensor, h: Tensor | int) -> Tensor | None:
        payoff = (self.strike - obs[:, 0].double()).clamp(min=0) / self.unit
        return torch.stack([torch.zeros_like(payoff), payoff], 1)

    def recipe(self) -> dict[str, Any]:
        about = {"sizes": [self.size, self.horizon], "strike": self.strike, "unit": self.unit}
        return {"kind": "put", **about}

    @classmethod
    def empty(cls, of: Mapping[str, Any]) -> PutFeatures:
        size, horizon = of["sizes"]
        return cls(np.arange(float(size)), horizon, of["strike"], of["unit"])


KINDS: dict[str, Any] = {
    "table": TableFeatures, "one_hot": OneHot, "kernel": KernelFeatures, "put": PutFeatures,
}  # fmt: skip


def rebuilt(recipe: Mapping[str, Any]) -> FeatureMap:
    """A map of the shape that `FeatureMap.recipe` says, whose weights are to be loaded."""
    made: FeatureMap = KINDS[recipe["kind"]].empty(recipe)
    return made


def check_simplex(phi: Tensor) -> None:
    """Features of (..., d) are in the simplex or zero.

    Raises:
        UserError: the first row that is not.
    """
    rows = phi.reshape(-1, phi.shape[-1])
    sums, least = rows.sum(1), rows.min(1).values
    fits = ((sums - 1).abs() < SIMPLEX_TOLERANCE) | (sums.abs() < SIMPLEX_TOLERANCE)
    wrong = torch.nonzero(~(fits & (least > -SIMPLEX_TOLERANCE)))  # NaN is wrong, too
    if len(wrong):
        row = int(wrong[0, 0])
        raise UserError(
            f"features: row {row} sums to {float(sums[row]):g} and has a least entry of {float(least[row]):g}; "
            "phi(s, a) has to be 0 or more and sum to 1 (or be zero where nothing follows)"
        )


def kernel_features(
    env: gym.Env[Any, Any],
    n_features: int = 100,
    bandwidth: float = 1.0,
    horizon: int = 50,
    *,
    seed: int = 0,
    reward_range: tuple[float, float] = (0.0, 1.0),
) -> KernelFeatures:
    """Kernels at observations that uniform actions lead to, far from one another.

    The first centre is the observation nearest to the mean, each further one that which is farthest from all before it,
    in units of the standard deviations. `env` is stepped for this, 20 times as often as there are centres.

    Args:
        n_features: m, centres; d is as many for each action.
        bandwidth: of the kernels, in units of the mean distance of a centre to the nearest other one.

    Raises:
        UserError: observations that are no vectors, actions that are not discrete, or too few different observations.
    """
    space, actions = env.observation_space, env.action_space
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1 or not isinstance(actions, gym.spaces.Discrete):
        raise UserError(
            f"`features: kernel` needs `Box` observations that are vectors and `Discrete` actions, got {space} and "
            f"{actions}"
        )
    rng, seen = np.random.default_rng(seed), []
    obs, _ = env.reset(seed=int(rng.integers(2**31)))
    for _ in range(20 * n_features):
        seen.append(np.asarray(obs, np.float64))
        obs, _, terminated, truncated, _ = env.step(int(actions.start + rng.integers(actions.n)))
        if terminated or truncated:
            obs, _ = env.reset()
    found = np.unique(np.array(seen), axis=0)
    if len(found) <= n_features:
        raise UserError(f"`n_features`: got {n_features}; only {len(found)} different observations were seen")
    scale = np.maximum(found.std(0), 1e-8)
    places = (found - found.mean(0)) / scale
    chosen = [int(np.square(places).sum(1).argmin())]
    nearest = np.square(places - places[chosen[0]]).sum(1)
    while len(chosen) < n_features:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.square(places - places[chosen[-1]]).sum(1))
    apart = np.sqrt(np.square(places[chosen][:, None] - places[chosen]).sum(-1))
    np.fill_diagonal(apart, np.inf)
    width = bandwidth * apart.min(1).mean() * scale
    return KernelFeatures(found[chosen], width, int(actions.n), horizon, reward_range)
