"""What trainers share that imitate an expert from its recording and one of anything else, without rewards.

`recoil` (arXiv:2302.08560) and its baseline `smodice` (arXiv:2202.02433) take `data` and `expert_data`, and clone
actions of `data` by weights that they find in their own ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rlkit.errors import UserError
from rlkit.trainer import Batch
from rlkit.trainers.dual_rl import CloningConfig, CloningTrainer


@dataclass(frozen=True, kw_only=True)
class ImitationConfig(CloningConfig):
    """Recordings of anything, and of what to imitate."""

    expert_data: str | None = None
    """Recorded transitions to imitate, named as `data` is. Rewards are ignored in both."""
    terminal: Literal["ends", "absorbing"] = "ends"
    """What follows a terminal state: nothing, whose value is the trainer's (0, or the least there is); or V of that
    state, as if it went on, which suits tasks that end on success."""


class ImitationTrainer(CloningTrainer):
    """Base of trainers that imitate `expert_data`; a batch has its rows, drawn uniformly, as `expert_obs` and so on."""

    Config: ClassVar[type[ImitationConfig]] = ImitationConfig
    task_fields = ("env", "data", "expert_data")
    recordings = ("data", "expert_data")
    needs_rewards = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "small": {"batch_size": 256, "learning_rate": 1e-3, "policy_kwargs": {"net_arch": [64, 64]}},
    }  # fmt: skip

    def build(self) -> None:
        config: ImitationConfig = self.config
        if config.gamma >= 1:
            raise UserError(f"`gamma`: got {config.gamma}; without rewards, values need gamma below 1")
        if config.return_range is not None or config.reward:
            raise UserError("`reward` and `return_range`: there are no rewards in imitation; leave them out")
        if config.data is None or config.expert_data is None:
            missing = "data" if config.data is None else "expert_data"
            raise UserError(
                f"`{missing}`: {self.name} needs a recording in `data`, and what to imitate in `expert_data`"
            )
        super().build()

    def batch(self) -> Batch:
        """`batch_size` rows of `data` (and own ones), and as many of the expert's."""
        size = self.config.batch_size
        batch = self.experience(size, self.rng["sample"])
        expert = self.recorded["expert_data"].sample(size, self.rng["expert"])
        names = ("obs", "action", "next_obs", "discount", "terminated")
        return batch | {f"expert_{name}": expert[name] for name in names}
