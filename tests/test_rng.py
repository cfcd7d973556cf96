"""Named randomness: pure functions, no collisions, streams that do not disturb one another."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlkit import checkpoint
from rlkit.rng import Streams, derive, permutation


def test_derive_is_the_same_in_every_process() -> None:
    """No state, and nothing of Python's salted `hash`."""
    paths: list[Any] = [(0,), (0, "env", 3, 17), (2**62, "weights"), (7, "µ", -1)]
    here = [derive(*path) for path in paths]
    assert here == [derive(*path) for path in paths]
    command = f"from rlkit.rng import derive; print([derive(*p) for p in {paths!r}])"
    there = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str(here)


def test_derive_does_not_collide() -> None:
    """100,000 draws of 63 bits: a collision has probability 1e10 / 2^64 = 5e-10."""
    paths: list[Any] = [
        (seed, "env", index, episode) for seed in range(10) for index in range(10) for episode in range(500)
    ]
    paths += [(seed, "eval", episode) for seed in range(100) for episode in range(500)]
    assert len(paths) == 100_000
    assert len({derive(*path) for path in paths}) == len(paths)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((0,), (0, 0)),
        ((0, 0), (0, 0, 0)),
        ((5,), (5, 0)),
        ((3 + (4 << 32),), (3, 4)),
        ((1, 2), (2, 1)),
        ((1, "2"), (1, 2)),
        ((1, "ab", "c"), (1, "a", "bc")),
        ((1, "a', 'b"), (1, "a", "b")),
        ((0,), (2**32,)),
        ((0,), (2**64,)),
    ],
)
def test_similar_paths_give_different_seeds(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    assert derive(*a) != derive(*b)


@given(st.integers(0), st.lists(st.integers() | st.text(max_size=5), max_size=4))
def test_derived_seeds_are_accepted_by_whoever_takes_them(seed: int, path: list[int | str]) -> None:
    value = derive(seed, *path)
    assert 0 <= value < 2**63
    torch.Generator().manual_seed(value)
    np.random.default_rng(value)
    assert gym.utils.seeding.np_random(value)[1] == value


def test_derived_bits_are_balanced() -> None:
    """Each of 63 bits is set in half of 4,000 draws: 2000 +- 6 standard deviations of sqrt(4000)/2 = 31.6."""
    values = np.array([derive(0, "x", i) for i in range(4000)])
    for bit in range(63):
        assert abs(int((values >> bit & 1).sum()) - 2000) < 190


def test_numpy_integers_are_integers() -> None:
    assert derive(int(np.int64(3)), "env", np.int32(4)) == derive(3, "env", 4)  # type: ignore[arg-type]


@given(st.integers(0, 2**40), st.integers(0, 1000), st.integers(0, 200))
def test_permutation_holds_every_row_once(seed: int, epoch: int, n: int) -> None:
    order = permutation(seed, epoch, n)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(n))
    assert torch.equal(order, permutation(seed, epoch, n))


def test_permutation_depends_on_seed_and_epoch() -> None:
    orders = {tuple(permutation(seed, epoch, 50).tolist()) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400


def test_permutation_is_uniform() -> None:
    """Row 0 comes first in 1/5 of 2,000 orders of 5: 400 +- 6 standard deviations of sqrt(2000 x 0.2 x 0.8) = 17.9."""
    first = sum(int(permutation(0, epoch, 5)[0]) == 0 for epoch in range(2000))
    assert abs(first - 400) < 108


def draw(streams: Streams, name: str, n: int = 5) -> list[float]:
    return torch.rand(n, generator=streams[name]).tolist()


def test_a_stream_depends_on_its_seed_and_name_alone() -> None:
    a, b = Streams(0), Streams(0)
    draw(b, "first")
    draw(b, "second")
    torch.manual_seed(123)
    torch.rand(10)
    assert draw(a, "sample") == draw(b, "sample")
    assert draw(a, "sample") == draw(b, "sample")  # and goes on
    assert draw(Streams(0), "sample") != draw(Streams(1), "sample")
    assert draw(Streams(0), "sample") != draw(Streams(0), "noise")


def test_streams_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    draw(Streams(0), "sample")
    assert torch.equal(before, torch.random.get_rng_state())


def test_asking_for_a_name_makes_no_stream() -> None:
    streams = Streams(0)
    assert "sample" not in streams
    assert len(streams) == 0
    draw(streams, "sample")
    assert "sample" in streams
    assert list(streams) == ["sample"]


def test_state_round_trip() -> None:
    streams = Streams(3)
    draw(streams, "b")
    draw(streams, "a", 7)
    saved = checkpoint.decode(*checkpoint.encode(streams.state_dict()))
    expected = {name: draw(streams, name) for name in ("a", "b", "later")}
    fresh = Streams(3)
    fresh.load_state_dict(saved)
    assert {name: draw(fresh, name) for name in ("later", "b", "a")} == expected


def test_a_generator_that_a_module_holds_is_restored_in_place() -> None:
    """Dropout keeps the generator it was built with, so loading must not replace it."""
    streams = Streams(3)
    draw(streams, "dropout", 4)
    saved, expected = streams.state_dict(), draw(streams, "dropout")
    fresh = Streams(3)
    held = fresh["dropout"]
    fresh.load_state_dict(saved)
    assert torch.rand(5, generator=held).tolist() == expected


def test_loading_resets_streams_that_the_state_does_not_have() -> None:
    """A stream that did not exist yet starts from its beginning, also where it was used before loading."""
    state = Streams(3).state_dict()
    used = Streams(3)
    first = draw(used, "late")
    used.load_state_dict(state)
    assert draw(used, "late") == first


def test_the_order_of_first_use_leaves_no_trace_in_the_state() -> None:
    """Equal states give equal files, whichever stream was asked for first."""
    a, b = Streams(0), Streams(0)
    for streams, names in ((a, "xy"), (b, "yx")):
        for name in names:
            draw(streams, name)
    assert list(a.state_dict()) == list(b.state_dict())
    assert all(torch.equal(a.state_dict()[name], b.state_dict()[name]) for name in "xy")


def test_processes_draw_apart_but_for_what_they_draw_together() -> None:
    """Three ranks: the first is a run of one process; a stream that was never used begins anew after loading."""
    ranks = [Streams(0, rank=rank) for rank in range(3)]
    drawn = [draw(streams, "noise") for streams in ranks]
    assert drawn[0] == draw(Streams(0), "noise")
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
    common = [torch.rand(3, generator=streams.common("subset")).tolist() for streams in ranks]
    assert common[0] == common[1] == common[2]
    for streams, noise in zip(ranks, drawn, strict=True):
        streams.load_state_dict({})
        assert draw(streams, "noise") == noise
        assert torch.rand(3, generator=streams.common("subset")).tolist() == common[0]
