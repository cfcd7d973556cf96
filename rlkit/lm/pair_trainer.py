"""PairTrainer: what trainers that learn from pairs of completions share."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from rlkit.buffer import Field, Ragged, RolloutBuffer
from rlkit.envs import preferences
from rlkit.lm import embedded
from rlkit.lm.config import LMConfig, PairConfig
from rlkit.lm.pairs import pairs_of
from rlkit.lm.trainer import LMTrainer


class PairTrainer(LMTrainer):
    """Base of trainers that learn from pairs; the two branches of a unit are `chosen` and `rejected`."""

    Config: ClassVar[type[LMConfig]] = PairConfig
    branches = ("chosen", "rejected")
    uses_reference = True

    def embedded_data(self) -> tuple[Any, Any]:
        return embedded.preference_rows(self, self.config.letters, self.config.seed)

    def unit_fields(self) -> dict[str, Field | Ragged]:
        return {**super().unit_fields(), "weight": Field(), "margin": Field(), "gap": Field()}

    def add_units(self, units: RolloutBuffer, data: preferences.TextData) -> None:
        pairs = pairs_of(data, self.config.pairing, self.config.pairing_margin)
        needed = sorted({(p.record, p.chosen) for p in pairs} | {(p.rejected_record, p.rejected) for p in pairs})
        rows = dict(
            zip(
                needed,
                self.add_completions(
                    [data.records[r].prompt for r, _ in needed],
                    [data.records[r].completions[k] for r, k in needed],
                    [r for r, _ in needed],
                    [data.records[r].row for r, _ in needed],
                    data.name,
                ),
                strict=True,
            )
        )
        ids = [(rows[p.record, p.chosen], rows[p.rejected_record, p.rejected], p) for p in pairs]
        kept = [(chosen, rejected, p) for chosen, rejected, p in ids if chosen is not None and rejected is not None]
        units.add(
            {
                "chosen": torch.tensor([chosen for chosen, _, _ in kept], dtype=torch.int64),
                "rejected": torch.tensor([rejected for _, rejected, _ in kept], dtype=torch.int64),
                "weight": torch.tensor([p.weight for _, _, p in kept], dtype=torch.float32),
                "margin": torch.tensor(
                    [data.records[p.record].columns.get("margin") or 0.0 for _, _, p in kept], dtype=torch.float32
                ),
                "gap": torch.tensor([p.gap for _, _, p in kept], dtype=torch.float32),
            }
        )
