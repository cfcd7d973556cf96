"""Randomness with names: every random number of a run comes from a named stream of one seed.

A stream is a `torch.Generator` whose seed is a hash of (run seed, name), so that adding a stream never shifts another
one, and all of them are saved and restored with the run. Seeds for environments and orders of data are pure functions
of their arguments: nothing has to be replayed to resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch


def derive(seed: int, *path: int | str) -> int:
    """A 63-bit seed that is a pure function of `seed` and `path`, e.g. `derive(0, "env", 3, episode)`."""
    text = repr((int(seed), *(p if isinstance(p, str) else int(p) for p in path)))  # different for different paths
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def permutation(seed: int, epoch: int, n: int) -> torch.Tensor:
    """(n,) int64: the order of `n` rows in `epoch`, the same for any number of workers or processes."""
    return torch.from_numpy(np.random.default_rng(derive(seed, "order", epoch)).permutation(n))


class Streams(Mapping[str, torch.Generator]):
    """Named generators of one seed; `streams["sample"]` creates the stream at its first use.

    Args:
        seed: the run's seed.
        device: where the generators live; noise for a CUDA update has to be drawn there.
        rank: of the process; streams of different ones are independent, but for those asked for by `common`.
    """

    def __init__(self, seed: int, device: str | torch.device = "cpu", rank: int = 0) -> None:
        self.seed, self.device, self.rank = seed, torch.device(device), rank
        self._streams: dict[str, torch.Generator] = {}
        self._common: set[str] = set()

    def __getitem__(self, name: str) -> torch.Generator:
        if name not in self._streams:
            self._streams[name] = self._seeded(torch.Generator(self.device), name)
        return self._streams[name]

    def common(self, name: str) -> torch.Generator:
        """The stream `name`, the same in all processes, for what they have to draw alike."""
        self._common.add(name)
        return self[name]

    def _seeded(self, stream: torch.Generator, name: str) -> torch.Generator:
        own = () if self.rank == 0 or name in self._common else (self.rank,)
        return stream.manual_seed(derive(self.seed, "stream", name, *own))

    def __contains__(self, name: object) -> bool:
        return name in self._streams

    def __iter__(self) -> Iterator[str]:
        return iter(self._streams)

    def __len__(self) -> int:
        return len(self._streams)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: self._streams[name].get_state() for name in sorted(self._streams)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set every stream in place, because parts may hold on to theirs; absent ones begin anew."""
        for name, stream in self._streams.items():
            if name not in state:
                self._seeded(stream, name)
        for name, value in state.items():
            self[name].set_state(value)
