"""The one buffer of the library: named columns that keep the dtype they were declared with, read in three ways.

```python
buf = RolloutBuffer(1_000_000, {"obs": Field((17,), torch.float64), "reward": Field()})  # a ring
buf = RolloutBuffer(None, {"tokens": Ragged(torch.int32), "logp_old": Ragged()})  # growing
ids = buf.add({"tokens": [...], "logp_old": [...]})
buf.sample(256, generator)  # uniform with replacement: off-policy and offline RL
buf.rows(buf.order(seed, epoch)[:8])  # a seeded permutation per epoch: preference pairs, rollouts
buf.groups("prompt_id")  # rows with equal value: group baselines, selection
buf["advantage"] = values  # write a whole column, an existing or a new one
```

A batch is a `dict[str, Tensor]`. Row ids are places in the storage, so they stay valid until a ring overwrites the row
or `clear` is called, and small index buffers can refer to the rows of a large one. Names that the library uses:

| rows | columns |
|---|---|
| transition | `obs, action, reward, next_obs, terminated, truncated, episode` |
| completion | `prompt_id, tokens, mask, logp_old, ref_logp, entropy, reward, advantage, weight, round` |
| pair index | `chosen, rejected, gap, stage, round`; the first two are row ids of a buffer of completions |

The buffer gives none of these names a meaning: returns, advantages and selections are functions of columns elsewhere.

Size is checked before anything is allocated, against what the machine and its control groups leave free: the pages of a
ring are committed only when they are first written, so a process with too large a one would be killed hours into its
run. `RLKIT_MEMORY_LIMIT` (bytes) replaces what was found.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch

from rlkit.errors import CheckpointError, UserError, did_you_mean, differences
from rlkit.processes import here
from rlkit.rng import permutation

Array = npt.NDArray[Any]
Values = Array | torch.Tensor
LENGTH = "_length"  # suffix of the key with which `rows` returns the lengths of a ragged column
SMALLEST = 16  # rows of the first allocation of a growing buffer


@dataclass(frozen=True)
class Field:
    """A dense column: every row has the same `shape`."""

    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return " ".join(filter(None, ("x".join(map(str, self.shape)), _name(self.dtype))))


@dataclass(frozen=True)
class Ragged:
    """A column whose rows are vectors of any length; growing buffers only."""

    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"ragged {_name(self.dtype)}"


class RolloutBuffer:
    """Named columns of equally many rows.

    Args:
        capacity: rows of a preallocated ring that overwrites its oldest rows; None for a buffer that grows.
        fields: column name -> `Field` or `Ragged` (the latter only without capacity).
        device: where the columns live; `add` converts, everything returned is there.
        name: the option that set the capacity, for the error when it does not fit into memory.

    Raises:
        UserError: a bad declaration, or the ring does not fit into memory (nothing was allocated then).
    """

    def __init__(
        self,
        capacity: int | None,
        fields: Mapping[str, Field | Ragged],
        device: str | torch.device = "cpu",
        name: str = "buffer_size",
    ) -> None:
        if capacity is not None and (isinstance(capacity, bool) or not hasattr(capacity, "__index__") or capacity < 1):
            raise UserError(f"`{name}` must be a positive integer, or None for a buffer that grows, found {capacity!r}")
        if not fields:
            raise UserError("a buffer needs at least one column")
        self.capacity = None if capacity is None else operator.index(capacity)
        self.device, self.name = torch.device(device), name
        self._size = 0  # rows filled
        self._next = 0  # where the next row goes: below `_size` only in a ring that is full
        self._declared = {column: _checked(column, field, fields, self.capacity) for column, field in fields.items()}
        self._columns = {column: _column(column, field, self.device) for column, field in self._declared.items()}
        if self.capacity is not None:
            self._reserve(self.capacity)

    def __len__(self) -> int:
        return self._size

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    @property
    def fields(self) -> dict[str, Field | Ragged]:
        """The columns: those declared, and those written whole since the last `clear`."""
        return {name: column.field for name, column in self._columns.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the allocation, filled or not."""
        return sum(store.rows * store.row_bytes for column in self._columns.values() for store in column.stores)

    def describe(self) -> str:
        """One line: `1,000,000 rows x 302 B = 302 MB (obs 17 float64, action 6 float32, ...)`."""
        columns = ", ".join(f"{name} {field}" for name, field in self.fields.items())
        if self.capacity is None:
            return f"{self._size:,} rows, growing, {_size(self.nbytes)} ({columns})"
        return f"{self.capacity:,} rows x {self.nbytes // self.capacity:,} B = {_size(self.nbytes)} ({columns})"

    # Writing

    def add(self, rows: Mapping[str, Any]) -> torch.Tensor:
        """Append rows; a full ring overwrites its oldest ones.

        Args:
            rows: column name -> array or tensor (n, *shape); for a ragged column a list of n one-dimensional ones.
                Every column is required. Types may be narrowed (float64 -> float32, int64 -> int32 if the values fit),
                their kind may not change downwards (float -> int).

        Returns:
            (n,) int64: the ids of the rows. In a ring, of n > capacity rows the last `capacity` remain.

        Raises:
            UserError: columns, shapes, row counts or types are not as declared; nothing was written then.
        """
        columns = self._columns
        if rows.keys() != columns.keys():
            raise UserError(_wrong_columns(rows, columns))
        n = -1
        values = []
        for name, column in columns.items():
            value, count = column.accept(rows[name])
            if count != n:
                if n >= 0:
                    raise UserError(
                        f"column `{name}`: expected {n} rows, as `{next(iter(columns))}` has, found {count}"
                    )
                n = count
            values.append(value)

        start = self._next
        if self.capacity is None or start + n <= self.capacity:
            if self.capacity is None:
                self._reserve(start + n)
                for column, value in zip(columns.values(), values, strict=True):
                    column.reserve(start, value)
            for column, value in zip(columns.values(), values, strict=True):
                column.write(start, value)
            ids = np.arange(start, start + n)
            self._next = 0 if start + n == self.capacity else start + n
            self._size = max(self._size, start + n)
        else:
            ids = np.arange(start, start + n) % self.capacity
            self._write_wrapped(start, n, values)
            self._next = (start + n) % self.capacity
            self._size = self.capacity
        return self._on_device(torch.from_numpy(ids))

    def _write_wrapped(self, start: int, n: int, values: list[Any]) -> None:
        assert self.capacity is not None
        skip = max(0, n - self.capacity)  # rows that later ones of the same call would overwrite
        start = (start + skip) % self.capacity
        tail = skip + self.capacity - start  # the row of `values` that goes to place 0
        for column, value in zip(self._columns.values(), values, strict=True):
            column.write(start, value[skip:tail])
            column.write(0, value[tail:])

    def __setitem__(self, name: str, values: Any) -> None:
        """Write a whole column, one value for each row in storage order.

        A column that does not exist yet is created: a `Ragged` one from a list of one-dimensional arrays or tensors of
        one dtype, else a `Field` with the shape and dtype of `values`. It lasts until `clear`, and until then `add`
        requires it like any other column.

        Raises:
            UserError: as `add`, or `values` has not one value a row; the column is unchanged then.
        """
        column = self._columns.get(name)
        if column is None:
            field = _checked(name, _inferred(name, values), self.fields, self.capacity)
            column = _column(name, field, self.device)
        value, count = column.accept(values)
        if count != self._size:
            raise UserError(f"column `{name}`: expected {self._size} values, one for each row, found {count}")
        if column.stores[0].rows < self._allocated:
            _grow(column.row_stores, 0, self._allocated, name, exact=True)
        column.reserve(0, value)
        column.write(0, value)
        self._columns[name] = column

    def clear(self) -> None:
        """Remove all rows, and the columns that were not declared but written whole; keep the allocation."""
        self._columns = {name: self._columns[name] for name in self._declared}
        self._size = self._next = 0

    # Reading

    def __getitem__(self, name: str) -> Any:
        """A column in storage order: (len, *shape), or a list of vectors if ragged.

        These are views: writing to them writes to the buffer, and a later `add` may change them or leave them behind.
        """
        if name not in self._columns:
            raise UserError(f"the buffer has no column `{name}`{did_you_mean(str(name), self._columns)}")
        return self._columns[name].read(self._size)

    def lengths(self, name: str) -> torch.Tensor:
        """(len,) int64: the lengths of the rows of a ragged column, in storage order; a view."""
        column = self._columns.get(name)
        if not isinstance(column, _Ragged):
            ragged = [n for n, c in self._columns.items() if isinstance(c, _Ragged)]
            raise UserError(f"the buffer has no ragged column `{name}`{did_you_mean(name, ragged)}")
        return column.lengths.tensor[: self._size]

    def sample_ids(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """(n,) int64: row ids, drawn uniformly with replacement."""
        if self._size == 0:
            raise UserError("cannot sample from an empty buffer: add rows first")
        return self._on_device(torch.randint(self._size, (n,), generator=generator, device=generator.device))

    def sample(self, n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """A batch of `n` rows, drawn uniformly with replacement; see `rows`."""
        return self._gather(self.sample_ids(n, generator))

    def order(self, seed: int, epoch: int) -> torch.Tensor:
        """(len,) int64: all row ids, shuffled; a pure function of the arguments and the number of rows."""
        return self._on_device(permutation(seed, epoch, self._size))

    def groups(self, name: str) -> list[torch.Tensor]:
        """Row ids of the rows with equal value in the integer column `name`.

        Groups come in the order of their first row, rows in the order in which they were added (a ring that has wrapped
        starts at its oldest row).
        """
        column = self[name]
        if not isinstance(column, torch.Tensor) or column.ndim != 1 or not _is_integer(column.dtype):
            found = self._columns[name].field
            raise UserError(f"column `{name}`: groups need one integer a row, found {found}")
        # Age of a row = its place behind the oldest one, which `_next` points to in a full ring and which else is 0.
        oldest = self._next if self._size == self.capacity else 0
        values, rows = torch.sort(column.to(torch.int64).roll(-oldest), stable=True)
        sizes = torch.unique_consecutive(values, return_counts=True)[1]
        first = rows[sizes.cumsum(0) - sizes]
        segments = (rows + oldest).remainder_(max(1, self._size)).split(sizes.tolist())
        return [segments[i] for i in first.argsort().tolist()]

    def rows(self, ids: torch.Tensor | Array | Sequence[int]) -> dict[str, torch.Tensor]:
        """The rows `ids` of all columns, as copies.

        Args:
            ids: (B,) row ids, any order, repeats allowed.

        Returns:
            Column name -> (B, *shape). A ragged column is padded on the right with 0 to the longest row of the batch,
            (B, L), and `<name>_length` -> (B,) int64 holds the lengths.

        Raises:
            UserError: `ids` are not integers, or not ids of rows.
        """
        index = torch.as_tensor(ids)
        if index.numel() == 0:
            index = index.to(torch.int64)
        if index.ndim != 1 or not _is_integer(index.dtype):
            raise UserError(f"row ids: expected (B,) integers, found {tuple(index.shape)} {_name(index.dtype)}")
        if index.numel():
            low, high = (int(bound) for bound in index.aminmax())
            if low < 0 or high >= self._size:
                raise UserError(f"row ids: expected 0 to {self._size - 1}, found {low if low < 0 else high}")
        return self._gather(index.to(self.device, torch.int64))

    def _gather(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        batch = {}
        for name, column in self._columns.items():
            if isinstance(column, _Dense):
                batch[name] = column.store.gather(ids)
            else:
                batch[name], batch[name + LENGTH] = column.pad(ids)
        return batch

    # State

    def state_dict(self) -> dict[str, Any]:
        """The filled rows in storage order, and the place of the next one: integers and tensors, nested in dicts.

        `columns` holds those declared and `written` those written whole; of a ragged one all values in a row, with its
        lengths under `lengths`. The tensors are views: save or copy them before the next `add`.
        """
        state: dict[str, Any] = {"capacity": self.capacity or 0, "size": self._size, "position": self._next}
        state |= {"columns": {}, "written": {}, "lengths": {}}
        for name, column in self._columns.items():
            state["columns" if name in self._declared else "written"][name] = column.values(self._size)
            if isinstance(column, _Ragged):
                state["lengths"][name] = column.lengths.tensor[: self._size]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the buffer that `state` was taken from: the same rows at the same ids, the same future.

        Raises:
            CheckpointError: `state` has another capacity or other columns than this buffer was declared with, which the
                message lists, or is damaged; the buffer is unchanged then.
        """
        absent = [key for key in ("capacity", "size", "position", "columns") if key not in state]
        if absent:
            raise CheckpointError(f"the buffer's state lacks {', '.join(f'`{key}`' for key in absent)}")
        size, position = int(state["size"]), int(state["position"])
        lengths = state.get("lengths", {})  # empty groups may have been dropped on the way to a file
        tensors = {**state["columns"], **state.get("written", {})}
        saved, written = (
            {name: _saved_field(tensor, name in lengths) for name, tensor in state.get(group, {}).items()}
            for group in ("columns", "written")
        )
        table = differences(_summary(int(state["capacity"]), saved), _summary(self.capacity or 0, self._declared))
        if table:
            raise CheckpointError(f"the saved buffer is not like this one:\n{table}")
        for name, tensor in tensors.items():
            rows = len(lengths[name]) if name in lengths else len(tensor)
            if rows != size or (name in lengths and int(lengths[name].sum()) != len(tensor)):
                raise CheckpointError(f"the saved buffer is damaged: column `{name}` has not the {size} rows it should")
        full = size == self.capacity
        if size > (self.capacity or size) or not (0 <= position < size if full else position == size):
            raise CheckpointError(f"the saved buffer is damaged: {size} rows, and the next one at {position}")

        self._reserve(size)
        self.clear()
        for name, field in written.items():
            self._columns[name] = _column(name, field, self.device)
            _grow(self._columns[name].row_stores, 0, self._allocated, name, exact=True)
        for name, tensor in tensors.items():
            column = self._columns[name]
            value = column.loaded(tensor, lengths.get(name))
            column.reserve(0, value)
            column.write(0, value)
        self._size, self._next = size, position

    # Memory

    @property
    def _allocated(self) -> int:
        return next(iter(self._columns.values())).stores[0].rows

    def _reserve(self, rows: int) -> None:
        """Make room for `rows` rows in all."""
        if rows > self._allocated:
            stores = [store for column in self._columns.values() for store in column.row_stores]
            _grow(stores, self._size, rows, self.name, exact=self.capacity is not None)

    def _on_device(self, ids: torch.Tensor) -> torch.Tensor:
        return ids if self.device.type == "cpu" else ids.to(self.device)


# Columns


class _Store:
    """Preallocated rows of one tensor; on the CPU with a NumPy view of it, which is cheaper to write and to gather."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.row_bytes = math.prod(shape) * dtype.itemsize
        self._hold(torch.empty(0, *shape, dtype=dtype, device=device))

    def _hold(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.view: Array | None
        try:
            self.view = tensor.numpy()
        except TypeError:  # on another device, or of a dtype that NumPy lacks (bfloat16)
            self.view = None

    def resize(self, rows: int, keep: int) -> None:
        """Allocate `rows` rows, not initialised but for the first `keep`, which are copied."""
        tensor = torch.empty(rows, *self.tensor.shape[1:], dtype=self.tensor.dtype, device=self.tensor.device)
        tensor[:keep] = self.tensor[:keep]
        self._hold(tensor)

    @property
    def rows(self) -> int:
        return len(self.tensor)

    def write(self, start: int, value: Values) -> None:
        if self.view is None:
            self.tensor[start : start + len(value)] = torch.as_tensor(value)
        else:
            self.view[start : start + len(value)] = value

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        if self.view is None:
            return self.tensor.index_select(0, ids)
        return torch.from_numpy(self.view.take(ids.numpy(), 0))


class _Dense:
    """A column of one store."""

    def __init__(self, name: str, field: Field, device: torch.device) -> None:
        self.name, self.field = name, field
        self.shape, self.ndim = field.shape, len(field.shape) + 1
        self.store = _Store(field.shape, field.dtype, device)
        self.stores = self.row_stores = [self.store]
        self.numpy_dtype = None if self.store.view is None else self.store.view.dtype

    def accept(self, value: Any) -> tuple[Any, int]:
        """`value` as `write` takes it, and its number of rows."""
        if not isinstance(value, (np.ndarray, torch.Tensor)):  # a tuple: this is a hot path
            raise self._refusal(type(value).__name__)
        shape = value.shape
        if len(shape) != self.ndim or shape[1:] != self.shape:
            raise self._refusal(f"shape {tuple(shape)}")
        if isinstance(value, torch.Tensor) or value.dtype != self.numpy_dtype:
            value = _cast(self.name, value, self.field.dtype, self.numpy_dtype)
        return value, shape[0]

    def loaded(self, values: torch.Tensor, lengths: torch.Tensor | None) -> Any:
        """What a state holds, as `write` takes it."""
        return self.accept(values)[0]

    def _refusal(self, found: str) -> UserError:
        shape = f"(n, {', '.join(map(str, self.shape))})" if self.shape else "(n,)"
        expected = f"an array or tensor {shape} {_name(self.field.dtype)}"
        return UserError(f"column `{self.name}`: expected {expected}, found {found}")

    def reserve(self, start: int, value: Any) -> None:
        """Nothing to do: its only store has a row for each row."""

    def write(self, start: int, value: Any) -> None:
        self.store.write(start, value)

    def values(self, size: int) -> torch.Tensor:
        return self.store.tensor[:size]

    read = values


class _Ragged:
    """A column of three stores: the values of all rows end to end; where each row starts; how long it is."""

    def __init__(self, name: str, field: Ragged, device: torch.device) -> None:
        self.name, self.field = name, field
        self.flat = _Store((), field.dtype, device)
        self.starts, self.lengths = (_Store((), torch.int64, device) for _ in range(2))
        self.row_stores = [self.starts, self.lengths]
        self.stores = [*self.row_stores, self.flat]
        self.numpy_dtype = None if self.flat.view is None else self.flat.view.dtype

    def accept(self, value: Any) -> tuple[Any, int]:
        """(values end to end, lengths) as `write` takes it, and the number of rows."""
        if not isinstance(value, list | tuple):
            raise self._refusal(type(value).__name__)
        rows: list[Any] = [self._cast(torch.empty(0, dtype=self.field.dtype))]  # the dtype where there are no rows
        for i, row in enumerate(value):
            if not isinstance(row, np.ndarray | torch.Tensor):
                raise self._refusal(f"{type(row).__name__} at place {i} of the list")
            if row.ndim != 1:
                raise self._refusal(f"shape {tuple(row.shape)} at place {i} of the list")
            rows.append(self._cast(row))
        flat = torch.cat(rows) if self.numpy_dtype is None else np.concatenate(rows)
        return (flat, np.array([len(row) for row in value], np.int64)), len(value)

    def loaded(self, values: torch.Tensor, lengths: torch.Tensor | None) -> Any:
        """What a state holds, as `write` takes it."""
        assert lengths is not None
        return self._cast(values), lengths.numpy(force=True)

    def _cast(self, row: Values) -> Values:
        row = _cast(self.name, row, self.field.dtype, self.numpy_dtype)
        return row.to(self.flat.tensor.device) if isinstance(row, torch.Tensor) else row

    def _refusal(self, found: str) -> UserError:
        expected = f"a list of one-dimensional arrays or tensors {_name(self.field.dtype)}"
        return UserError(f"column `{self.name}`: expected {expected}, found {found}")

    def _end(self, size: int) -> int:
        """The number of values in the first `size` rows."""
        return int(self.starts.tensor[size - 1] + self.lengths.tensor[size - 1]) if size else 0

    def reserve(self, start: int, value: Any) -> None:
        """Make room for the values of rows that go to places from `start` on."""
        end = self._end(start)
        if end + len(value[0]) > self.flat.rows:
            _grow([self.flat], end, end + len(value[0]), self.name, unit="values")

    def write(self, start: int, value: Any) -> None:
        flat, lengths = value
        end = self._end(start)
        self.flat.write(end, flat)
        self.starts.write(start, lengths.cumsum() - lengths + end)
        self.lengths.write(start, lengths)

    def values(self, size: int) -> torch.Tensor:
        return self.flat.tensor[: self._end(size)]

    def read(self, size: int) -> list[torch.Tensor]:
        return list(self.values(size).split(self.lengths.tensor[:size].tolist()))

    def pad(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L) rows, padded with 0 on the right, and their (B,) lengths."""
        lengths = self.lengths.gather(ids)
        longest = int(lengths.max()) if len(ids) else 0
        place = torch.arange(longest, device=ids.device)  # (L,)
        beyond = place >= lengths[:, None]  # (B, L)
        places = (self.starts.gather(ids)[:, None] + place).masked_fill_(beyond, 0)
        values = self.flat.gather(places.flatten()).view(places.shape)
        return torch.where(beyond, values.new_zeros(()), values), lengths  # masked_fill lacks uint16


def _column(name: str, field: Field | Ragged, device: torch.device) -> _Dense | _Ragged:
    return _Dense(name, field, device) if isinstance(field, Field) else _Ragged(name, field, device)


def _checked(
    name: str, field: Field | Ragged, fields: Mapping[str, Field | Ragged], capacity: int | None
) -> Field | Ragged:
    """`field`, if a column `name` may be declared so beside `fields`."""
    if not isinstance(name, str) or not name:
        raise UserError(f"column names are non-empty strings, found {name!r}")
    if not isinstance(field, Field | Ragged) or not isinstance(field.dtype, torch.dtype):
        raise UserError(f"column `{name}`: expected a Field or Ragged with a torch dtype (`dtype_of`), found {field!r}")
    if isinstance(field, Field) and not _is_shape(field.shape):
        raise UserError(f"column `{name}`: expected a shape like () or (17,), found {field.shape!r}")
    if isinstance(field, Ragged) and capacity is not None:
        raise UserError(f"column `{name}`: a ragged column needs a buffer that grows, capacity None, not {capacity:,}")
    ragged = name if isinstance(field, Ragged) else name.removesuffix(LENGTH)
    if {ragged, ragged + LENGTH} <= {name, *fields} and isinstance({**fields, name: field}[ragged], Ragged):
        raise UserError(f"column `{ragged}{LENGTH}`: `rows` returns the lengths of `{ragged}` under this name")
    return field


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, tuple) and all(isinstance(n, int) and n >= 0 for n in shape)


def _inferred(name: str, values: Any) -> Field | Ragged:
    """The declaration of a new column that holds `values`."""
    first = values[0] if isinstance(values, list | tuple) and values else values
    if not isinstance(first, np.ndarray | torch.Tensor):
        expected = "an array, a tensor, or a list of one-dimensional ones"
        raise UserError(f"column `{name}` is new: expected {expected}, found {type(values).__name__}")
    dtype = first.dtype if isinstance(first, torch.Tensor) else dtype_of(first.dtype)
    return Field(tuple(values.shape[1:]), dtype) if first is values else Ragged(dtype)


# State


def _saved_field(tensor: torch.Tensor, ragged: bool) -> Field | Ragged:
    return Ragged(tensor.dtype) if ragged else Field(tuple(tensor.shape[1:]), tensor.dtype)


def _summary(capacity: int, fields: Mapping[str, Field | Ragged]) -> dict[str, Any]:
    return {"capacity": capacity or None, **{f"column {name}": field for name, field in fields.items()}}


def _wrong_columns(rows: Mapping[str, Any], columns: Mapping[str, Any]) -> str:
    missing = [name for name in columns if name not in rows]
    unknown = [name for name in rows if name not in columns]
    parts = [f"missing column{'s' * (len(missing) > 1)} {', '.join(f'`{name}`' for name in missing)}"] * bool(missing)
    parts += [f"unknown column `{name}`{did_you_mean(str(name), missing or columns)}" for name in unknown]
    return "rows to add: " + "; ".join(parts)


# Types


@functools.lru_cache
def dtype_of(dtype: npt.DTypeLike) -> torch.dtype:
    """The torch dtype with the values of a NumPy one, e.g. of a space: nothing is narrowed.

    Raises:
        UserError: torch has no such dtype (strings, objects).
    """
    try:
        return torch.from_numpy(np.empty(0, np.dtype(dtype).newbyteorder("="))).dtype
    except TypeError:
        raise UserError(f"dtype {dtype} has no tensor equivalent: use a number or bool type") from None


def _cast(name: str, value: Values, dtype: torch.dtype, numpy_dtype: np.dtype | None) -> Values:
    """`value` as a tensor of `dtype`, or as an array where `numpy_dtype` is given; refused if that changes its kind."""
    found = value.dtype if isinstance(value, torch.Tensor) else dtype_of(value.dtype)
    if found != dtype:
        if not torch.can_cast(found, dtype):
            raise UserError(f"column `{name}`: expected {_name(dtype)}, found {_name(found)}")
        if _is_integer(found) and _is_integer(dtype) and len(value):
            array = value.numpy(force=True) if isinstance(value, torch.Tensor) else value
            for bound in (int(array.min()), int(array.max())):
                if not torch.iinfo(dtype).min <= bound <= torch.iinfo(dtype).max:
                    raise UserError(f"column `{name}`: expected {_name(dtype)}, found {bound}, which is out of range")
    if isinstance(value, torch.Tensor):
        value = value.detach() if found == dtype else value.detach().to(dtype)
        return value if numpy_dtype is None else value.numpy(force=True)
    if numpy_dtype is not None:
        return value.astype(numpy_dtype, copy=False)
    return torch.from_numpy(np.array(value, value.dtype.newbyteorder("="), order="C")).to(dtype)


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Memory


def memory_limit(device: str | torch.device = "cpu", held: int = 0) -> int:
    """Bytes that an allocation on `device` may have: `RLKIT_MEMORY_LIMIT` if set, else what is free there now.

    Of several processes on a machine each may have an equal part of its free memory.

    Args:
        held: bytes that the allocation will give back, and which are therefore added to what is free.
    """
    override = os.environ.get("RLKIT_MEMORY_LIMIT")
    if override is not None:
        if not override.isdecimal():
            raise UserError(f"RLKIT_MEMORY_LIMIT: expected a number of bytes, found {override!r}")
        return int(override)
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) + held
    free = [psutil.virtual_memory().available, *cgroup_free(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    return min(free) // here() + held


def cgroup_free(membership: Path, root: Path) -> list[int]:
    """Bytes that each control group of this process leaves free, of version 1 or 2; none without control groups.

    Args:
        membership: a file with lines `hierarchy:controllers:path`, as /proc/self/cgroup.
        root: where the groups are mounted, as /sys/fs/cgroup.
    """
    free = []
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, files = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / controllers
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Limits hold for all groups below. Inside a container the path can be the host's: then only the root is there.
        group = base / path.strip("/")
        for folder in [group, *group.parents][: len(group.relative_to(base).parts) + 1]:
            with contextlib.suppress(OSError, ValueError):  # no such folder, no limit ("max"), or not ours to read
                limit, used = (int((folder / file).read_text()) for file in files[:2])
                free.append(max(0, limit - used + _reclaimable(folder / "memory.stat", files[2])))
    return free


def _reclaimable(stat: Path, key: str) -> int:
    """Bytes of the page cache that count as used but are given up on demand."""
    return sum(int(line.split()[1]) for line in stat.read_text().splitlines() if line.split()[0] == key)


def check_memory(nbytes: int, rows: int, name: str, limit: int | None = None, unit: str = "rows") -> None:
    """Refuse an allocation of `rows` rows, `nbytes` in all, that is larger than `limit` (default `memory_limit()`).

    Raises:
        UserError: names the option `name` and shows the arithmetic; the largest number that fits is rounded down to
            three digits, as what is free changes from moment to moment.
    """
    limit = memory_limit() if limit is None else limit
    if nbytes <= limit:
        return
    row = -(-nbytes // rows)
    largest = limit // row
    step = 10 ** max(0, len(str(largest)) - 3)
    raise UserError(
        f"`{name}` {rows:,} {unit} x {row:,} B needs {_size(nbytes)}, limit {_size(limit)}; "
        f"largest that fits: {largest // step * step:,}"
    )


def _grow(
    stores: Sequence[_Store], keep: int, needed: int, name: str, *, exact: bool = False, unit: str = "rows"
) -> None:
    """Allocate `needed` rows in all `stores`, or more for later (doubling, as far as it fits) unless `exact`."""
    allocated = stores[0].rows
    row = sum(store.row_bytes for store in stores)
    # Stores are copied one after the other, so all but one copy can use the room of those before.
    held = allocated * (row - max(store.row_bytes for store in stores))
    limit = memory_limit(stores[0].tensor.device, held)
    rows = needed if exact else max(needed, 2 * allocated, SMALLEST)
    if rows * row > limit:
        rows = max(needed, limit // row)
    check_memory(rows * row, rows, name, limit, unit)
    for store in stores:
        store.resize(rows, keep)


def _size(nbytes: int) -> str:
    """Three digits and a decimal unit, so that rows x bytes can be checked at a glance: `302 MB`."""
    size, units = float(nbytes), ["B", "kB", "MB", "GB", "TB", "PB", "EB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"
