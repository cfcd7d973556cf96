"""The buffer against a list of rows, and its errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rlkit.buffer import (
    Field,
    Ragged,
    RolloutBuffer,
    cgroup_free,
    check_memory,
    dtype_of,
    memory_limit,
)
from rlkit.errors import CheckpointError, UserError
from rlkit.rng import permutation

# bfloat16 has no NumPy view, so it takes the path of tensors, as every column on another device does.
DENSE = {
    "obs": Field((2,), torch.float64),
    "image": Field((2, 1), torch.uint8),
    "half": Field((), torch.bfloat16),
    "terminated": Field((), torch.bool),
    "episode": Field((), torch.int64),
}
MIXED = {
    "prompt_id": Field((), torch.int32),
    "tokens": Ragged(torch.int32),
    "logp_old": Ragged(torch.float32),
    "half": Ragged(torch.bfloat16),
}
TORCH = torch.Generator  # a fresh generator has a fixed default seed


def values(field: Field | Ragged, n: int, rng: np.random.Generator) -> Any:
    """`n` rows for `field`: tensors or arrays, by chance."""
    if isinstance(field, Ragged):
        return [values(Field((int(rng.integers(4)),), field.dtype), 1, rng)[0] for _ in range(n)]
    tensor = torch.from_numpy(rng.integers(-9, 9, (n, *field.shape))).to(field.dtype)
    if field.dtype.is_floating_point:
        tensor = tensor / 7
    return tensor if field.dtype == torch.bfloat16 or rng.random() < 0.5 else tensor.numpy()


def equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found, expected)


class Model:
    """What the buffer should be: a list of rows, with a hand on the oldest one if it is a ring."""

    def __init__(self, capacity: int | None, fields: dict[str, Field | Ragged]) -> None:
        self.capacity, self.fields, self.declared = capacity, dict(fields), dict(fields)
        self.rows: list[dict[str, torch.Tensor]] = []
        self.next = 0

    def add(self, rows: dict[str, Any], n: int) -> list[int]:
        ids = []
        for i in range(n):
            row = {name: torch.as_tensor(rows[name][i]) for name in self.fields}
            ids.append(self.next)
            self.rows[self.next : self.next + 1] = [row]
            self.next = (self.next + 1) % (self.capacity or 10**9)
        return ids

    def write(self, name: str, field: Field | Ragged, column: Any) -> None:
        self.fields[name] = field
        for row, value in zip(self.rows, column, strict=True):
            row[name] = torch.as_tensor(value)

    def clear(self) -> None:
        self.rows, self.next, self.fields = [], 0, dict(self.declared)

    def pad(self, name: str, ids: list[int]) -> torch.Tensor:
        rows = [self.rows[i][name] for i in ids]
        longest = max((len(row) for row in rows), default=0)
        padded = torch.zeros(len(ids), longest, dtype=self.fields[name].dtype)
        for line, row in zip(padded, rows, strict=True):
            line[: len(row)] = row
        return padded

    def check_batch(self, batch: dict[str, torch.Tensor], ids: list[int]) -> None:
        ragged = [name for name, field in self.fields.items() if isinstance(field, Ragged)]
        assert batch.keys() == self.fields.keys() | {f"{name}_length" for name in ragged}
        for name, field in self.fields.items():
            if isinstance(field, Ragged):
                assert equal(batch[name], self.pad(name, ids))
                assert batch[f"{name}_length"].tolist() == [len(self.rows[i][name]) for i in ids]
                assert batch[f"{name}_length"].dtype == torch.int64
            else:
                expected = torch.empty(len(ids), *field.shape, dtype=field.dtype)
                for place, i in enumerate(ids):
                    expected[place] = self.rows[i][name]
                assert equal(batch[name], expected)

    def check(self, buf: RolloutBuffer) -> None:
        every = list(range(len(self.rows)))
        assert len(buf) == len(self.rows)
        assert buf.fields == self.fields
        self.check_batch(buf.rows(every), every)
        for name, field in self.fields.items():
            found = buf[name]
            assert len(found) == len(every)
            assert isinstance(found, list) == isinstance(field, Ragged)
            for row, column in zip(self.rows, found, strict=True):
                assert equal(column, row[name])
        if every:
            ids = buf.sample_ids(5, TORCH()).tolist()
            self.check_batch(buf.sample(5, TORCH()), ids)


def stored(state: Any, folder: Path) -> Any:
    """`state` through JSON and safetensors, which sorts the names."""
    tensors = {f"{group}.{name}": t for group in ("columns", "written", "lengths") for name, t in state[group].items()}
    save_file(tensors, folder / "buffer.safetensors")
    loaded = json.loads(json.dumps({key: state[key] for key in ("capacity", "size", "position")}))
    for name, tensor in load_file(folder / "buffer.safetensors").items():
        group, column = name.split(".", 1)
        loaded.setdefault(group, {})[column] = tensor  # an empty group is lost on the way
    return loaded


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["add", "add", "add", "write", "new", "clear", "state"]), st.integers(0, 40)), max_size=12
)


def run(operations: list[tuple[str, int]], seed: int, capacity: int | None, fields: Any, folder: Path) -> None:
    """Do the same to a buffer and to the model of it, and compare after each operation."""
    rng = np.random.default_rng(seed)
    buf, model = RolloutBuffer(capacity, fields), Model(capacity, fields)
    extra: dict[str, Field | Ragged] = {"advantage": Field(), "demo": Field((3,), torch.int16)}
    if capacity is None:
        extra["weight"] = Ragged(torch.float64)
    for operation, number in operations:
        if operation == "add":
            rows = {name: values(field, number, rng) for name, field in model.fields.items()}
            ids = buf.add(rows)
            assert ids.dtype == torch.int64
            assert ids.tolist() == model.add(rows, number)
        elif operation == "clear":
            buf.clear()
            model.clear()
        elif operation == "state":
            draws = buf.sample(7, TORCH()) if len(buf) else {}
            other = RolloutBuffer(capacity, fields)
            other.add({name: values(field, 3, rng) for name, field in fields.items()})
            other.load_state_dict(stored(buf.state_dict(), folder))
            for name, tensor in draws.items():
                assert equal(other.sample(7, TORCH())[name], tensor)
            buf = other  # what follows is done to the restored buffer
        else:
            name = list(model.fields if operation == "write" else extra)[number % len(extra)]
            field = extra.get(name) or model.fields[name]
            if isinstance(field, Ragged) and not model.rows and name not in model.fields:
                continue  # an empty list has no dtype: an error, tested below
            column = values(field, len(model.rows), rng)
            buf[name] = column
            model.write(name, field, column)
        model.check(buf)


@settings(max_examples=60, deadline=None)
@given(OPERATIONS, st.integers(0, 99), st.integers(1, 30))
def test_ring_against_a_list(tmp_path_factory, operations, seed, capacity):
    run(operations, seed, capacity, DENSE, tmp_path_factory.getbasetemp())


@settings(max_examples=60, deadline=None)
@given(OPERATIONS, st.integers(0, 99), st.sampled_from([DENSE, MIXED]))
def test_growing_against_a_list(tmp_path_factory, operations, seed, fields):
    run(operations, seed, None, fields, tmp_path_factory.getbasetemp())


def test_ring_keeps_the_last_rows_where_single_adds_would_put_them():
    one, many = (RolloutBuffer(5, {"x": Field((), torch.int64)}) for _ in range(2))
    ids = [int(one.add({"x": torch.tensor([i])})) for i in range(3 + 13)]
    many.add({"x": torch.arange(3)})
    assert many.add({"x": torch.arange(3, 16)}).tolist() == ids[3:]
    assert one["x"].tolist() == many["x"].tolist() == [15, 11, 12, 13, 14]  # 15 at 15 mod 5 = 0


@pytest.mark.parametrize("capacity", [10, 16, 20])
def test_rings_of_one_state_stay_the_same(capacity):
    """After 16 rows, wrapped, just full or not yet: later rows get the same ids, and later draws are the same."""
    rng = np.random.default_rng(0)
    a, b = (RolloutBuffer(capacity, {"obs": Field((3,), torch.float64), "n": Field((), torch.int32)}) for _ in range(2))
    rows = [{"obs": rng.normal(size=(4, 3)), "n": np.arange(4)} for _ in range(8)]
    for part in rows[:4]:
        a.add(part)
    b.load_state_dict(a.state_dict())
    generators = TORCH(), TORCH()
    for part in rows[4:]:
        assert torch.equal(a.add(part), b.add(part))
        batches = a.sample(6, generators[0]), b.sample(6, generators[1])
        assert all(equal(batches[1][name], tensor) for name, tensor in batches[0].items())
        assert torch.equal(a.order(1, 2), b.order(1, 2))


def test_sampling_is_uniform_with_replacement():
    """Chi-square over 20 rows: 19 degrees of freedom, whose 0.1 % and 99.9 % points are 5.4 and 43.8."""
    buf = RolloutBuffer(20, {"x": Field((), torch.int64)})
    buf.add({"x": np.arange(27)})  # wrapped: x is 20 to 26, then 7 to 19
    ids = buf.sample_ids(20_000, torch.Generator().manual_seed(3))
    counts = torch.bincount(ids, minlength=20).double()
    assert 5.4 < float(((counts - 1000) ** 2 / 1000).sum()) < 43.8
    batch = buf.sample(1000, torch.Generator().manual_seed(3))["x"]
    assert set(batch.tolist()) == set(range(7, 27))
    assert not torch.equal(batch[:500], batch[500:])


def test_half_full_ring_samples_only_filled_rows():
    buf = RolloutBuffer(1000, {"x": Field()})
    buf.add({"x": np.full(3, 7.0)})
    assert set(buf.sample_ids(200, TORCH()).tolist()) == {0, 1, 2}
    assert buf.sample(200, TORCH())["x"].unique().tolist() == [7.0]


def test_order_is_a_pure_permutation():
    a, b = (RolloutBuffer(None, {"x": Field((), torch.int64)}) for _ in range(2))
    a.add({"x": np.arange(50)})
    b.add({"x": np.zeros(20, int)})
    b.add({"x": np.zeros(30, int)})
    a.sample(3, TORCH())
    assert torch.equal(a.order(5, 1), b.order(5, 1))
    assert torch.equal(a.order(5, 1), permutation(5, 1, 50))
    assert sorted(a.order(5, 1).tolist()) == list(range(50))
    assert not torch.equal(a.order(5, 1), a.order(5, 2))
    assert not torch.equal(a.order(5, 1), a.order(6, 1))
    assert torch.equal(a.rows(a.order(5, 1))["x"], a.order(5, 1))


def test_groups_in_order_of_first_appearance():
    buf = RolloutBuffer(None, {"prompt_id": Field((), torch.int32)})
    assert buf.groups("prompt_id") == []
    buf.add({"prompt_id": np.array([7, 3, 7, -1, 3, 7])})
    assert [ids.tolist() for ids in buf.groups("prompt_id")] == [[0, 2, 5], [1, 4], [3]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize("added", [0, 1, 17, 30, 41])
def test_groups_against_a_loop(dtype, added):
    """In a ring of 30 the rows of a group come in the order they were added."""
    buf = RolloutBuffer(30, {"episode": Field((), dtype), "t": Field((), torch.int64)})
    episode = np.random.default_rng(added).integers(0, 6, added)
    ids = buf.add({"episode": episode, "t": np.arange(added)}).tolist()
    expected: dict[int, list[int]] = {}
    for t in range(max(0, added - 30), added):
        expected.setdefault(int(episode[t]), []).append(ids[t])
    assert [group.tolist() for group in buf.groups("episode")] == list(expected.values())
    for group in buf.groups("episode"):
        assert (buf["t"][group].diff() > 0).all()


def test_ragged_rows_are_padded_to_the_longest_of_the_batch():
    buf = RolloutBuffer(None, {"tokens": Ragged(torch.int32), "mask": Ragged(torch.bool)})
    tokens = [np.array([1, 2, 3]), torch.tensor([], dtype=torch.int32), torch.tensor([4, 5], dtype=torch.int32)]
    buf.add({"tokens": tokens, "mask": [np.ones(len(row), bool) for row in tokens]})
    batch = buf.rows([2, 1, 2])
    assert batch["tokens"].tolist() == [[4, 5], [0, 0], [4, 5]]
    assert batch["tokens_length"].tolist() == [2, 0, 2]
    assert batch["mask"].tolist() == [[True, True], [False, False], [True, True]]
    assert batch["tokens"].dtype == torch.int32
    assert buf.rows(np.array([1]))["tokens"].shape == (1, 0)
    assert buf.rows([])["tokens"].shape == (0, 0)
    assert [row.tolist() for row in buf["tokens"]] == [[1, 2, 3], [], [4, 5]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int64, np.float16, np.float32, np.float64, bool])
def test_dtypes_are_kept(dtype):
    expected = dtype_of(np.dtype(dtype))
    for field in (Field((2,), expected), Ragged(expected)):
        buf = RolloutBuffer(None, {"x": field})
        rows = np.array([[0, 1], [2, 3]]).astype(dtype)
        buf.add({"x": list(rows) if isinstance(field, Ragged) else rows})
        assert buf.sample(3, TORCH())["x"].dtype == expected
        assert equal(buf.rows([1, 0])["x"], torch.from_numpy(rows[::-1].copy()))


def test_the_space_decides_the_dtype():
    space = gym.make("HalfCheetah-v5").observation_space
    buf = RolloutBuffer(4, {"obs": Field(space.shape, dtype_of(space.dtype))})
    obs = space.sample()[None]
    buf.add({"obs": obs})
    assert buf["obs"].dtype == torch.float64
    assert np.array_equal(buf.sample(1, TORCH())["obs"].numpy(), obs)  # bitwise: not narrowed on the way
    assert dtype_of(">f4") == torch.float32
    with pytest.raises(UserError, match="dtype object has no tensor equivalent"):
        dtype_of(np.dtype(object))


def test_types_may_be_narrowed_but_keep_their_kind():
    fields = {"reward": Field(), "token": Field((), torch.int16), "half": Field((), torch.bfloat16)}
    buf = RolloutBuffer(4, fields)
    buf.add({"reward": np.array([0.1]), "token": torch.tensor([-5]), "half": np.array([1.5], ">f8")[::-1]})
    assert buf["reward"].tolist() == [np.float32(0.1)]
    assert buf["token"].tolist() == [-5]
    assert buf["half"].tolist() == [1.5]
    good = {"reward": np.ones(1), "token": np.ones(1, int), "half": torch.ones(1)}
    buf.add({**good, "reward": np.array([True])})
    for name, value, message in [
        ("token", np.ones(1), "column `token`: expected int16, found float64"),
        ("token", torch.ones(1), "column `token`: expected int16, found float32"),
        ("token", np.array([40_000]), "column `token`: expected int16, found 40000, which is out of range"),
        ("half", np.ones(1, complex), "column `half`: expected bfloat16, found complex128"),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            buf.add({**good, name: value})
    assert len(buf) == 2


def test_tensors_with_history_are_stored_without_it():
    weight = torch.ones(2, requires_grad=True)
    buf = RolloutBuffer(2, {"logp": Field(), "half": Field((), torch.bfloat16)})
    buf.add({"logp": weight * 2, "half": (weight * 3).bfloat16()})
    assert not any(tensor.requires_grad for tensor in buf.sample(2, TORCH()).values())
    assert buf["logp"].tolist() == [2, 2]
    weight.data.zero_()
    assert buf["half"].tolist() == [3, 3]


def test_rows_are_copied_in_and_out():
    buf = RolloutBuffer(None, {"x": Field((), torch.int64)})
    given = np.array([1, 2])
    buf.add({"x": given})
    given[:] = 9
    buf.rows([0, 1])["x"].zero_()
    assert buf["x"].tolist() == [1, 2]
    buf["x"][0] = 5  # a view: writing through it is meant
    assert buf.rows([0])["x"].tolist() == [5]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"obs": np.ones((1, 2))}, "rows to add: missing column `reward`"),
        ({}, "missing columns `obs`, `reward`"),
        (
            {"obs": np.ones((1, 2)), "rewards": np.ones(1)},
            "missing column `reward`; unknown column `rewards`; did you mean `reward`?",
        ),
        (
            {"obs": np.ones((1, 3)), "reward": np.ones(1)},
            "column `obs`: expected an array or tensor (n, 2) float64, found shape (1, 3)",
        ),
        (
            {"obs": np.ones((1, 2)), "reward": np.ones((1, 1))},
            "column `reward`: expected an array or tensor (n,) float32, found shape (1, 1)",
        ),
        ({"obs": np.ones((1, 2)), "reward": torch.tensor(1.0)}, "`reward`: expected an array or tensor (n,) float32"),
        ({"obs": np.ones((1, 2)), "reward": [1.0]}, "expected an array or tensor (n,) float32, found list"),
        ({"obs": np.ones((2, 2)), "reward": np.ones(3)}, "column `reward`: expected 2 rows, as `obs` has, found 3"),
    ],
)
@pytest.mark.parametrize("capacity", [3, None])
def test_add_refuses(rows, message, capacity):
    buf = RolloutBuffer(capacity, {"obs": Field((2,), torch.float64), "reward": Field()})
    buf.add({"obs": np.zeros((1, 2)), "reward": np.zeros(1)})
    with pytest.raises(UserError, match=re.escape(message)):
        buf.add(rows)
    assert len(buf) == 1  # nothing was written
    assert buf["obs"].tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        (np.ones((1, 2), int), "found ndarray"),
        ([[1, 2]], "found list at place 0 of the list"),
        ([np.ones(2, int), np.ones((1, 2), int)], "found shape (1, 2) at place 1 of the list"),
    ],
)
def test_add_refuses_ragged(tokens, found):
    buf = RolloutBuffer(None, {"tokens": Ragged(torch.int32)})
    message = f"column `tokens`: expected a list of one-dimensional arrays or tensors int32, {found}"
    with pytest.raises(UserError, match=re.escape(message)):
        buf.add({"tokens": tokens})
    with pytest.raises(UserError, match="column `tokens`: expected int32, found float64"):
        buf.add({"tokens": [np.ones(1)]})


def test_a_written_column_is_required_until_clear():
    buf = RolloutBuffer(None, {"x": Field()})
    buf.add({"x": np.zeros(2)})
    buf["advantage"] = torch.tensor([1.0, 2.0])
    assert "advantage" in buf
    with pytest.raises(UserError, match="missing column `advantage`"):
        buf.add({"x": np.zeros(1)})
    buf.add({"x": np.zeros(40), "advantage": np.full(40, 3.0)})
    assert buf["advantage"].tolist() == [1, 2] + [3] * 40
    buf.clear()
    assert "advantage" not in buf
    assert len(buf) == 0
    assert buf.add({"x": np.zeros(1)}).tolist() == [0]


def test_whole_columns_refuse():
    buf = RolloutBuffer(None, {"x": Field(), "tokens": Ragged(torch.int32)})
    buf.add({"x": np.zeros(2), "tokens": [np.ones(1, int), np.ones(2, int)]})
    for name, column, message in [
        ("x", np.zeros(3), "column `x`: expected 2 values, one for each row, found 3"),
        ("x", np.zeros((2, 1)), "column `x`: expected an array or tensor (n,) float32, found shape (2, 1)"),
        ("tokens", [np.ones(1, int)], "column `tokens`: expected 2 values"),
        ("new", np.zeros(3), "column `new`: expected 2 values"),
        ("new", [1.0, 2.0], "column `new` is new: expected an array, a tensor, or a list of one-dimensional ones"),
        ("new", [], "column `new` is new"),
        (
            "tokens_length",
            np.zeros(2),
            "column `tokens_length`: `rows` returns the lengths of `tokens` under this name",
        ),
    ]:
        with pytest.raises(UserError, match=re.escape(message)):
            buf[name] = column
    assert set(buf.fields) == {"x", "tokens"}
    with pytest.raises(UserError, match="a ragged column needs a buffer that grows"):
        RolloutBuffer(3, {"x": Field()})["new"] = [np.zeros(1)]


def test_reading_refuses():
    buf = RolloutBuffer(4, {"reward": Field(), "pair": Field((2,), torch.int64)})
    with pytest.raises(UserError, match="cannot sample from an empty buffer"):
        buf.sample(1, TORCH())
    buf.add({"reward": np.zeros(2), "pair": np.zeros((2, 2), int)})
    with pytest.raises(UserError, match="no column `rewards`; did you mean `reward`"):
        buf["rewards"]
    with pytest.raises(UserError, match="row ids: expected 0 to 1, found 2"):
        buf.rows([0, 2])  # within the ring, but not filled yet
    with pytest.raises(UserError, match="row ids: expected 0 to 1, found -1"):
        buf.rows([-1])
    with pytest.raises(UserError, match=re.escape("row ids: expected (B,) integers, found (2,) bool")):
        buf.rows(torch.tensor([True, False]))
    with pytest.raises(UserError, match="column `reward`: groups need one integer a row, found float32"):
        buf.groups("reward")
    with pytest.raises(UserError, match="column `pair`: groups need one integer a row, found 2 int64"):
        buf.groups("pair")


@pytest.mark.parametrize(
    ("capacity", "fields", "message"),
    [
        (0, {"x": Field()}, "`buffer_size` must be a positive integer, or None for a buffer that grows, found 0"),
        (1e6, {"x": Field()}, "found 1000000.0"),
        (None, {}, "at least one column"),
        (3, {"x": Ragged()}, "column `x`: a ragged column needs a buffer that grows, capacity None, not 3"),
        (3, {"x": torch.float32}, "column `x`: expected a Field or Ragged"),
        (3, {"x": Field((), np.float32)}, "column `x`: expected a Field or Ragged with a torch dtype"),
        (3, {"x": Field((-1,))}, "column `x`: expected a shape like () or (17,), found (-1,)"),
        (3, {"x": Field(17)}, "column `x`: expected a shape like () or (17,), found 17"),
        (3, {"": Field()}, "column names are non-empty strings"),
        (None, {"x_length": Field(), "x": Ragged()}, "column `x_length`: `rows` returns the lengths of `x`"),
    ],
)
def test_declarations_are_checked(capacity, fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        RolloutBuffer(capacity, fields)


# State


def test_state_of_another_buffer_is_refused():
    a = RolloutBuffer(4, {"obs": Field((3,)), "reward": Field()})
    a.add({"obs": np.ones((2, 3)), "reward": np.ones(2)})
    b = RolloutBuffer(5, {"obs": Field((3,), torch.float64), "reward": Field(), "demo": Field()})
    with pytest.raises(CheckpointError, match="the saved buffer is not like this one") as error:
        b.load_state_dict(a.state_dict())
    lines = [line.split() for line in str(error.value).splitlines()]
    assert ["capacity", "4", "->", "5"] in lines
    assert any(line[:2] == ["column", "obs"] and "dtype=torch.float64)" in line for line in lines)
    assert any(line[:3] == ["column", "demo", "'(absent)'"] for line in lines)
    assert not any("reward" in line for line in lines)
    assert len(b) == 0


def test_damaged_state_is_refused():
    a = RolloutBuffer(None, {"x": Field(), "tokens": Ragged()})
    a.add({"x": np.ones(2), "tokens": [np.ones(1), np.ones(2)]})
    state = a.state_dict()
    for change, message in [
        ({"size": 3}, "column `x` has not the 3 rows it should"),
        ({"lengths": {"tokens": torch.tensor([1, 1])}}, "column `tokens` has not the 2 rows"),
        ({"position": 1}, "2 rows, and the next one at 1"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            a.load_state_dict({**state, **change})
    with pytest.raises(CheckpointError, match="the buffer's state lacks `size`"):
        a.load_state_dict({key: value for key, value in state.items() if key != "size"})
    assert a["x"].tolist() == [1, 1]


def test_state_restores_written_columns(tmp_path):
    """A column computed once (reference log-probs) need not be declared to come back."""
    fields = {"tokens": Ragged(torch.int32)}
    a, b = RolloutBuffer(None, fields), RolloutBuffer(None, fields)
    a.add({"tokens": [np.array([1, 2]), np.array([3])]})
    a["ref_logp"] = [torch.tensor([0.1, 0.2]), torch.tensor([0.3])]
    a["weight"] = np.array([1.0, 0.5])
    b.add({"tokens": [np.array([9])] * 5})
    b["other"] = np.zeros(5)
    b.load_state_dict(stored(a.state_dict(), tmp_path))
    assert b.fields.keys() == {"tokens", "ref_logp", "weight"}
    assert equal(b["ref_logp"][0], torch.tensor([0.1, 0.2]))
    assert equal(b["weight"], torch.tensor([1.0, 0.5], dtype=torch.float64))
    b.clear()
    assert b.fields == fields


def test_state_holds_only_the_filled_rows():
    buf = RolloutBuffer(1000, {"x": Field((2,))})
    buf.add({"x": np.ones((3, 2))})
    assert buf.state_dict()["columns"]["x"].shape == (3, 2)


# Memory


def test_size_is_counted_and_described():
    fields = {
        "obs": Field((17,), torch.float64),
        "next_obs": Field((17,), torch.float64),
        "action": Field((6,)),
        "reward": Field(),
        "terminated": Field((), torch.bool),
        "truncated": Field((), torch.bool),
    }
    buf = RolloutBuffer(1_000_000, fields)
    assert buf.nbytes == 1_000_000 * (2 * 17 * 8 + 6 * 4 + 4 + 1 + 1)
    assert buf.describe() == (
        "1,000,000 rows x 302 B = 302 MB (obs 17 float64, next_obs 17 float64, action 6 float32, reward float32, "
        "terminated bool, truncated bool)"
    )
    growing = RolloutBuffer(None, {"image": Field((3, 4), torch.uint8), "tokens": Ragged(torch.int32)})
    assert growing.nbytes == 0
    growing.add({"image": np.zeros((100, 3, 4), np.uint8), "tokens": [np.zeros(7, int)] * 100})
    assert growing.nbytes == 100 * (12 + 2 * 8) + 700 * 4  # a ragged row has its start and its length, 8 B each
    assert growing.describe() == "100 rows, growing, 5.6 kB (image 3x4 uint8, tokens ragged int32)"


def test_memory_is_checked_before_allocation(monkeypatch):
    monkeypatch.setenv("RLKIT_MEMORY_LIMIT", str(26 * 10**9))
    assert memory_limit() == 26 * 10**9
    message = (  # 26e9 / 184 = 141,304,347
        "`buffer_size` 1,000,000,000,000 rows x 184 B needs 184 TB, limit 26 GB; largest that fits: 141,000,000"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        RolloutBuffer(10**12, {"obs": Field((22,), torch.float64), "n": Field((), torch.int64)})
    with pytest.raises(UserError, match=re.escape(message)):
        check_memory(184 * 10**12, 10**12, "buffer_size")
    check_memory(26 * 10**9, 1, "buffer_size")
    monkeypatch.setenv("RLKIT_MEMORY_LIMIT", "1000")
    with pytest.raises(
        UserError, match=re.escape("`n` 126 rows x 8 B needs 1.01 kB, limit 1 kB; largest that fits: 125")
    ):
        RolloutBuffer(126, {"x": Field((), torch.float64)}, name="n")
    RolloutBuffer(125, {"x": Field((), torch.float64)})
    monkeypatch.setenv("RLKIT_MEMORY_LIMIT", "2GB")
    with pytest.raises(UserError, match="RLKIT_MEMORY_LIMIT: expected a number of bytes, found '2GB'"):
        memory_limit()


def test_an_impossible_ring_is_refused_on_this_machine(monkeypatch):
    monkeypatch.delenv("RLKIT_MEMORY_LIMIT", raising=False)
    assert 0 < memory_limit() < 10**15
    free = memory_limit()
    monkeypatch.setenv("WORLD_SIZE", "16")  # of which 8 are on this machine
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert memory_limit() == pytest.approx(free / 8, rel=0.2)
    with pytest.raises(UserError, match=r"`buffer_size` 1,000,000,000,000 rows x 8,000 B needs 8 PB, limit"):
        RolloutBuffer(10**12, {"x": Field((1000,), torch.float64)})


def test_growth_falls_back_to_what_fits(monkeypatch):
    monkeypatch.setenv("RLKIT_MEMORY_LIMIT", "1000")
    buf = RolloutBuffer(None, {"x": Field((), torch.float64)}, name="transitions")
    buf.add({"x": np.zeros(100)})
    buf.add({"x": np.ones(10)})  # doubling would take 1,600 B
    assert buf.nbytes == 1000
    with pytest.raises(UserError, match=r"`transitions` 126 rows x 8 B needs 1\.01 kB, limit 1 kB"):
        buf.add({"x": np.ones(16)})
    buf.add({"x": np.ones(15)})
    assert buf["x"].tolist() == [0] * 100 + [1] * 25

    tokens = RolloutBuffer(None, {"tokens": Ragged(torch.int64)})
    with pytest.raises(
        UserError, match=r"`tokens` 126 values x 8 B needs 1\.01 kB, limit 1 kB; largest that fits: 125"
    ):
        tokens.add({"tokens": [np.zeros(126, int)]})
    assert len(tokens) == 0
    tokens.add({"tokens": [np.zeros(125, int)]})


def test_growth_counts_the_room_of_the_columns_it_replaces(monkeypatch):
    """1,000 B are free beside 60 rows of two columns of 8 B. Growing to R rows needs, at its peak, both new columns and
    one old one: 16 R - 60 * 8 <= 1,000, so R = 92."""
    monkeypatch.delenv("RLKIT_MEMORY_LIMIT", raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    buf = RolloutBuffer(None, {"a": Field((), torch.float64), "b": Field((), torch.int64)})
    buf.add({"a": np.zeros(60), "b": np.zeros(60, int)})
    buf.add({"a": np.zeros(1), "b": np.zeros(1, int)})
    assert buf.nbytes == 92 * 16


def test_growth_is_geometric():
    """10,000 single rows cost ten allocations (16, 32, ..., 16,384), not 10,000."""
    buf = RolloutBuffer(None, {"x": Field((), torch.int64)})
    sizes = set()
    for i in range(10_000):
        buf.add({"x": np.array([i])})
        sizes.add(buf.nbytes // 8)
    assert sorted(sizes) == [16 * 2**k for k in range(11)]
    assert torch.equal(buf["x"], torch.arange(10_000))


def test_control_groups_of_both_versions(tmp_path):
    """What a group leaves free is its limit less its use, of which the inactive page cache is not counted."""
    two = tmp_path / "v2"
    (two / "user" / "job").mkdir(parents=True)
    for folder, limit, used, cache in [("user", "5000", "3000", "500"), ("user/job", "max", "3000", "500")]:
        (two / folder / "memory.max").write_text(limit + "\n")
        (two / folder / "memory.current").write_text(used + "\n")
        (two / folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\nactive_file 7\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/user/job\n")
    assert cgroup_free(membership, two) == [5000 - 3000 + 500]

    one = tmp_path / "v1"
    (one / "memory").mkdir(parents=True)  # in a container: the host's path is not there, the group is the root
    (one / "memory" / "memory.limit_in_bytes").write_text("9000")
    (one / "memory" / "memory.usage_in_bytes").write_text("9500")
    (one / "memory" / "memory.stat").write_text("total_inactive_file 100")
    membership.write_text("3:cpu:/docker/1\n4:memory:/docker/1\n0::/docker/1\n")
    assert cgroup_free(membership, one) == [0]
    assert cgroup_free(tmp_path / "none", one) == []
