"""Randomness with names: every random number of a run comes from a named stream of one seed.

A stream is a `torch.Generator` whose seed is a hash of (run seed, name), so that adding a stream never shifts another
one, and all of them are saved and restored with the run. Seeds for environments and orders of data are pure functions
of their arguments: nothing has to be replayed to resume.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def derive(seed: int, *path: int | str) -> int:
    """A 63-bit seed that is a pure function of `seed` and `path`, e.g. `derive(0, "env", 3, episode)`."""
    words = [seed, *(zlib.crc32(p.encode()) if isinstance(p, str) else p for p in path)]
    state = np.random.SeedSequence([w & 0xFFFFFFFF for w in words] + [w >> 32 for w in words]).generate_state(2)
    return (int(state[0]) << 31) ^ int(state[1])


def permutation(seed: int, epoch: int, n: int) -> torch.Tensor:
    """(n,) int64: the order of `n` rows in `epoch`, the same for any number of workers or processes."""
    return torch.from_numpy(np.random.default_rng(derive(seed, "order", epoch)).permutation(n))


class Streams(Mapping[str, torch.Generator]):
    """Named generators of one seed; `streams["sample"]` creates the stream at its first use.

    Args:
        seed: the run's seed.
        device: where the generators live; noise for a CUDA update has to be drawn there.
    """

    def __init__(self, seed: int, device: str | torch.device = "cpu") -> None:
        self.seed, self.device = seed, torch.device(device)
        self._streams: dict[str, torch.Generator] = {}

    def __getitem__(self, name: str) -> torch.Generator:
        if name not in self._streams:
            self._streams[name] = torch.Generator(self.device).manual_seed(derive(self.seed, "stream", name))
        return self._streams[name]

    def __iter__(self) -> Any:
        return iter(self._streams)

    def __len__(self) -> int:
        return len(self._streams)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: stream.get_state() for name, stream in self._streams.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self._streams = {name: torch.Generator(self.device) for name in state}
        for name, value in state.items():
            self._streams[name].set_state(value)
