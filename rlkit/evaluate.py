"""Evaluation: whole episodes of a fixed policy, each a pure function of (seed, episode index).

Episodes run side by side so that one forward pass serves several, yet each result belongs to its own index: no bias
towards short episodes. A deterministic policy gives the same numbers for any degree of parallelism, as far as its
actions do not depend on what else is in the batch (matrix products of another size may round differently).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import concatenate, create_empty_array
from scipy import stats

from rlkit.errors import EnvError, UserError
from rlkit.rng import derive

STEP_LIMIT = 100_000
"""Steps after which an episode that never ends is an error (an environment without a time limit)."""

Watch = Callable[[int, gym.Env, Any, Any], None]
"""`watch(index, env, observation, action)`: called before every step of an episode, and once it is over with None for
the action. What it keeps of the arrays it has to copy: environments may write into them."""


class Predictor(Protocol):
    """Anything with Stable-Baselines3's `predict`."""

    def predict(self, observation: Any, *, deterministic: bool = False) -> tuple[np.ndarray, Any]: ...


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted returns and lengths of episodes, in the order of their indices."""

    returns: list[float]
    lengths: list[int]
    successes: list[bool]

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """Sample standard deviation over episodes; NaN for one."""
        return float(np.std(self.returns, ddof=1)) if len(self.returns) > 1 else math.nan

    @property
    def ci95(self) -> list[float]:
        """95 % Student interval of the mean over episodes; NaN for one."""
        n = len(self.returns)
        half = float(stats.t.ppf(0.975, n - 1)) * self.std / math.sqrt(n) if n > 1 else math.nan
        return [self.mean - half, self.mean + half]

    def record(self) -> dict[str, Any]:
        """The evaluation under Stable-Baselines3's names, as written to `eval.jsonl`."""
        values: dict[str, Any] = {
            "eval/mean_reward": self.mean,
            "eval/std_reward": self.std,
            "eval/ci95_low": self.ci95[0],
            "eval/ci95_high": self.ci95[1],
            "eval/mean_ep_length": float(np.mean(self.lengths)),
            "eval/episodes": len(self.returns),
        }
        if self.successes:
            values["eval/success_rate"] = float(np.mean(self.successes))
        return values

    def __str__(self) -> str:
        if len(self.returns) == 1:
            return f"{self.mean:.1f} (n=1, no interval)"
        return f"{self.mean:.1f} ± {self.std:.1f} ({len(self.returns)} episodes)"


def evaluate(
    policy: Predictor,
    make_env: Callable[[], gym.Env],
    episodes: int = 10,
    seed: int = 0,
    *,
    deterministic: bool = True,
    parallel: int = 10,
    should_stop: Callable[[], bool] = lambda: False,
    watch: Watch = lambda index, env, observation, action: None,
) -> Evaluation | None:
    """Run `episodes` episodes; None when `should_stop` said so in between.

    Args:
        policy: `predict(batch of observations, deterministic=...)` -> (batch of actions, state).
        make_env: a fresh environment; up to `parallel` (>= 1) of them are stepped in turn and closed at the end.
        seed: episode k is reset with a seed derived from (seed, k).
        watch: sees every step; see `Watch`.

    Raises:
        UserError: no episode asked for.
        EnvError: an environment raised, or an episode did not end within `STEP_LIMIT` steps.
    """
    if episodes < 1:
        raise UserError(f"`episodes`: got {episodes}; at least 1 is needed")
    if parallel < 1:
        raise UserError(f"`parallel`: got {parallel}; at least 1 is needed")
    envs: list[gym.Env] = []
    try:
        for _ in range(min(parallel, episodes)):
            envs.append(make_env())  # noqa: PERF401 (what was opened is closed if a later one fails)
        return _run(policy, envs, episodes, seed, deterministic, should_stop, watch)
    finally:
        for env in envs:
            env.close()


def _run(
    policy: Predictor,
    envs: Sequence[gym.Env],
    episodes: int,
    seed: int,
    deterministic: bool,
    should_stop: Callable[[], bool],
    watch: Watch,
) -> Evaluation | None:
    returns, lengths = [0.0] * episodes, [0] * episodes
    successes: dict[int, bool] = {}
    waiting = iter(range(episodes))
    space = envs[0].observation_space

    def start(env: gym.Env) -> tuple[int, gym.Env, Any] | None:
        index = next(waiting, None)
        if index is None:
            return None
        try:
            obs, _ = env.reset(seed=derive(seed, "eval", index) & 0x7FFF_FFFF)  # 31 bits: what any environment accepts
        except Exception as error:
            raise EnvError(f"evaluation episode {index}, reset: {error}") from error
        return index, env, obs

    running = [begun for env in envs if (begun := start(env)) is not None]
    while running:
        if should_stop():
            return None
        batch = concatenate(space, [obs for _, _, obs in running], create_empty_array(space, len(running)))
        actions, _ = policy.predict(batch, deterministic=deterministic)
        following = []
        for (index, env, before), action in zip(running, actions, strict=True):
            watch(index, env, before, action)
            try:
                obs, reward, terminated, truncated, info = env.step(action)
            except Exception as error:
                where = f"evaluation episode {index}, step {lengths[index]}"
                raise EnvError(f"{where}: {error} (action {action})") from error
            returns[index] += float(reward)
            lengths[index] += 1
            slot: tuple[int, gym.Env, Any] | None = (index, env, obs)
            if terminated or truncated:
                watch(index, env, obs, None)
                if "is_success" in info:
                    successes[index] = bool(info["is_success"])
                slot = start(env)
            elif lengths[index] >= STEP_LIMIT:
                raise EnvError(
                    f"evaluation episode {index} did not end within {STEP_LIMIT:,} steps; give the environment a time "
                    "limit (gymnasium.wrappers.TimeLimit)"
                )
            if slot is not None:
                following.append(slot)
        running = following
    return Evaluation(returns, lengths, [successes[i] for i in sorted(successes)])
