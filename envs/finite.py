"""`rlkit/Finite-v0`: any environment with `Discrete` observations, for learners of tables.

Policies of such learners depend on the step of the episode, so observations become [state, step]. Features are
`rlkit.envs.features.OneHot`, one for each pair of a state and an action.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from rlkit.errors import UserError

if TYPE_CHECKING:
    from rlkit.envs.features import FeatureMap

FINITE_ID = "rlkit/Finite-v0"


class Finite(gym.Env[Any, Any]):
    """An environment with `Discrete` observations as one with a table: observations [state, step].

    Episodes end by truncation after `horizon` steps.

    Args:
        env: the environment, or `env_id`, the id of one that is made with the other keywords.
        horizon: H.
        reward_range: the least and the largest reward of a step.

    Raises:
        UserError: neither of the two, or spaces that are not `Discrete`.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(
        self,
        env: gym.Env[Any, Any] | None = None,
        *,
        env_id: str | None = None,
        horizon: int = 50,
        reward_range: tuple[float, float] = (0.0, 1.0),
        **kwargs: Any,
    ) -> None:
        if env is None and env_id is None:
            raise UserError("`env_id`: of which environment? give its id (or, in Python, the environment itself)")
        self.inner: gym.Env[Any, Any] = gym.make(str(env_id), **kwargs) if env is None else env
        observations, actions = self.inner.observation_space, self.inner.action_space
        if not isinstance(observations, gym.spaces.Discrete) or not isinstance(actions, gym.spaces.Discrete):
            raise UserError(f"a table needs `Discrete` observations and actions, got {observations} and {actions}")
        self.horizon, self.rewards_within, self.taken = int(horizon), reward_range, 0
        self.states, self.first = int(observations.n), int(observations.start)
        most = np.array([self.states - 1, self.horizon], np.float32)
        self.observation_space, self.action_space = gym.spaces.Box(np.zeros(2, np.float32), most), actions

    def feature_map(self) -> FeatureMap:
        from rlkit.envs.features import OneHot

        actions: Any = self.action_space
        return OneHot(self.states, int(actions.n), self.horizon, self.rewards_within)

    def _observation(self, state: Any) -> NDArray[np.float32]:
        return np.array([int(state) - self.first, self.taken], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.taken = 0
        state, info = self.inner.reset(seed=seed, options=options)
        return self._observation(state), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.taken += 1
        state, reward, terminated, truncated, info = self.inner.step(action)
        return self._observation(state), float(reward), terminated, truncated or self.taken >= self.horizon, info

    def close(self) -> None:
        self.inner.close()


gym.register(FINITE_ID, entry_point=f"{__name__}:Finite")
