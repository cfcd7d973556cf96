"""The trainers of this package: one line each; the class is imported at first use (see rlkit/registry.py)."""

from __future__ import annotations

from rlkit.registry import Entry

TRAINERS: dict[str, Entry] = {
    "sac": Entry(
        target="rlkit.trainers.sac:SAC",
        paper="Soft Actor-Critic Algorithms and Applications, arXiv:1812.05905",
        status="reproduced",
        data="Box-action environments, online",
        actions=("Box",),
    ),
}
