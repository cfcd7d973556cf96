"""An environment of your own with finitely many states, a robust policy for it, and its returns in changed dynamics.

A worn machine may break, more often than its data sheet says. Repairing costs a step of production.

    python examples/robust_policy.py
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym

import rlkit
from rlkit.envs.finite import Finite
from rlkit.perturbation import sweep


class Machine(gym.Env[Any, Any]):
    """States 0 (new) to 3 (worn), 4 is broken. Action 0 produces, which pays 1, wears and may break it; 1 repairs."""

    observation_space = gym.spaces.Discrete(5)
    action_space = gym.spaces.Discrete(2)
    perturbations = ("risk",)

    def __init__(self, risk: float = 0.02) -> None:
        self.risk, self.state = risk, 0

    def perturb(self, name: str, value: float) -> None:
        """What `rlkit eval RUN --perturb risk=0.02:0.2:5` would call."""
        setattr(self, name, value)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = 0
        return self.state, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        if action == 1:
            self.state = max(self.state - 2, 0)
            return self.state, 0.0, False, False, {}
        broken = self.np_random.random() < self.risk * self.state
        worn = min(self.state + int(self.np_random.random() < 0.5), 3)
        self.state = 4 if broken else worn
        return self.state, float(not broken), bool(broken), False, {}


class Plant(Finite):
    """The machine for 20 steps, observed as [state, step]."""

    perturbations = Machine.perturbations

    def __init__(self) -> None:
        super().__init__(Machine(), horizon=20)

    def perturb(self, name: str, value: float) -> None:
        """Pass it on to the machine."""
        self.inner.unwrapped.perturb(name, value)  # type: ignore[attr-defined]


RISKS = (0.02, 0.06, 0.1)


def learn(**options: Any) -> list[float]:
    """Mean returns, for each risk, of what was learned with that of the data sheet alone."""
    agent = rlkit.DRRPO([Plant], eta=0.01, beta=0.5, seed=0, **options).learn(4_000)
    return [result.mean for _, result in sweep(agent, "risk", RISKS, episodes=200)]


print("risk:             ", *(f"{risk:.2f}" for risk in RISKS))
print("plain policy:     ", *(f"{mean:.2f}" for mean in learn(uncertainty="none")))
print("robust policy:    ", *(f"{mean:.2f}" for mean in learn(uncertainty="kl_penalty", sigma=3.0)))
