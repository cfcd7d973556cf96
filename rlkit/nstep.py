"""n-step transitions: rewards of up to n steps summed before a transition enters the buffer."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

Row = dict[str, Any]


class NStep:
    """One-step rows in, n-step rows out, in order, for several environments.

    A row that starts at time t leaves as (obs_t, action_t, sum_k gamma^k r_{t+k}, next_obs_{t+m-1}, terminated_{t+m-1},
    truncated_{t+m-1}) with `discount` = gamma^m, where m = n, or fewer where the episode ends before. So the target is
    reward + discount (1 - terminated) V(next_obs): time limits bootstrap from the true final observation.

    Args:
        n: steps, 1 or more.
        gamma: discount factor of one step.
        n_envs: environments whose rows arrive with their index in column `env`.
    """

    def __init__(self, n: int, gamma: float, n_envs: int) -> None:
        self.n, self.gamma = n, gamma
        self._waiting: list[deque[Row]] = [deque() for _ in range(n_envs)]

    def __call__(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
        """Complete n-step rows (with `discount`), or None when none is complete yet."""
        count = len(rows["reward"])
        if self.n == 1:
            return {**rows, "discount": np.full(count, self.gamma, dtype=np.float32)}
        out: list[Row] = []
        for i in range(count):
            row = {name: values[i].copy() for name, values in rows.items()}  # the caller may reuse its arrays
            waiting = self._waiting[int(row["env"])]
            waiting.append(row)
            if row["terminated"] or row["truncated"]:
                while waiting:
                    out.append(self._merge(waiting))
                    waiting.popleft()
            elif len(waiting) == self.n:
                out.append(self._merge(waiting))
                waiting.popleft()
        if not out:
            return None
        return {name: np.stack([row[name] for row in out]) for name in out[0]}

    def _merge(self, waiting: deque[Row]) -> Row:
        first, last = waiting[0], waiting[-1]
        reward = sum(self.gamma**k * float(row["reward"]) for k, row in enumerate(waiting))
        end = {name: last[name] for name in ("next_obs", "terminated", "truncated")}
        return {**first, **end, "reward": np.float32(reward), "discount": np.float32(self.gamma ** len(waiting))}

    def state_dict(self) -> dict[str, Any]:
        return {"waiting": [[dict(row) for row in waiting] for waiting in self._waiting]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._waiting = [deque(dict(row) for row in rows) for rows in state["waiting"]]

    def clear(self, env: int) -> None:
        """Forget the unfinished rows of an environment that had to be reset."""
        self._waiting[env].clear()
