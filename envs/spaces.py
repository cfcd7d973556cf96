"""Spaces: observations as flat vectors, actions as [-1, 1], and both as JSON.

A trainer sees one vector per observation and, for `Box` actions, one vector in [-1, 1] per action. What a space cannot
offer (images, discrete observations, actions without bounds) is refused here, with the wrapper that helps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Space
from numpy.typing import NDArray

from rlkit.errors import CheckpointError, UserError

MAX_DEPTH = 8  # of nested `Dict` spaces in a file
DTYPES = frozenset(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)) | {
    f"float{bits}" for bits in (16, 32, 64)
}


def flat_space(space: Space[Any], name: str = "observation") -> Box:
    """The 1-D `Box` of `flatten_obs`: bounds and dtype kept, a `Dict` concatenated in the order of its keys.

    Args:
        space: a `Box` of any shape, or a (nested) `Dict` of such boxes; mixed dtypes become `np.result_type`.
        name: how an error calls the space.

    Raises:
        UserError: an image, or a space that is neither `Box` nor `Dict`.
    """
    if isinstance(space, Box):
        if _is_image(space):
            raise UserError(
                f"{name} is an image, {_show(space)}: images are not supported yet; `Box` vectors and `Dict`s of them "
                f"are (encode the image in a wrapper, or use gymnasium.wrappers.FlattenObservation if it is tiny)"
            )
        return Box(space.low.reshape(-1), space.high.reshape(-1), dtype=space.dtype.type)
    if isinstance(space, Dict):
        if not space.spaces:
            raise UserError(f"{name} is an empty `Dict` space: there is nothing to observe")
        parts = [flat_space(part, f"{name} `{key}`") for key, part in space.spaces.items()]
        dtype = np.result_type(*(part.dtype for part in parts))
        low, high = (np.concatenate([getattr(p, side).astype(dtype) for p in parts]) for side in ("low", "high"))
        return Box(low, high, dtype=dtype.type)
    tables = ", or, for learners of tables, with rlkit.envs.finite.Finite (`rlkit/Finite-v0`)"
    raise UserError(
        f"{name} is {_show(space)}; supported are `Box` and (nested) `Dict` of `Box`: wrap the environment with "
        f"gymnasium.wrappers.FlattenObservation{tables if isinstance(space, Discrete) else ''}"
    )


def flatten_obs(space: Space[Any], obs: Any, n: int | None = None) -> NDArray[Any]:
    """One observation of `space` -> (dim,), or with `n` a batch of them (n, ...) -> (n, dim); dtype of `flat_space`.

    The result may share memory with `obs`.

    Raises:
        ValueError: the shape is not the one that `space` declares.
        KeyError: a key of a `Dict` is missing.
    """
    if isinstance(space, Dict):
        parts = [flatten_obs(part, obs[key], n) for key, part in space.spaces.items()]
        dtype = np.result_type(*(part.dtype for part in parts))
        return np.concatenate(parts, axis=-1, dtype=dtype, casting="unsafe")
    array = np.asarray(obs, dtype=space.dtype)
    expected = space.shape if n is None else (n, *space.shape)
    if array.shape != expected:
        raise ValueError(f"the observation has shape {array.shape}, its space declares {expected}")
    if len(space.shape) == 1:
        return array
    return array.reshape(-1) if n is None else array.reshape(n, -1)


def check_action_space(
    space: Space[Any], supported: tuple[str, ...], trainer_name: str, alternatives: Sequence[str] = ()
) -> None:
    """Refuse an action space that a trainer cannot use.

    Args:
        space: of one environment.
        supported: class names of spaces, e.g. `("Box",)`.
        trainer_name: e.g. `"SAC"`, for the message.
        alternatives: names of trainers that do fit.

    Raises:
        UserError: another kind of space, or a `Box` that is unbounded or not of floats.
    """
    if type(space).__name__ not in supported:
        needed = " or ".join(f"`{kind}`" for kind in supported)
        fit = f"; trainers that fit: {', '.join(alternatives)}" if alternatives else ""
        raise UserError(f"{trainer_name} needs {needed} actions, got `{_show(space)}`{fit}")
    if isinstance(space, Box):
        _check_box_actions(space, f"{trainer_name} needs bounded `Box` actions of floats; this action space")


class ActionScale:
    """The affine map between [-1, 1]^dim, where policies act, and a bounded `Box`.

    Attributes:
        dim: number of action dimensions, flattened.
        low, high: (dim,) bounds in the dtype of the space.
        middle, half: (dim,) float64, centre and half width of the box.

    Raises:
        UserError: the box is unbounded or not of floats.
    """

    def __init__(self, space: Box) -> None:
        _check_box_actions(space, "the action space")
        self.space = space
        self.dim = math.prod(space.shape)
        self.low, self.high = space.low.reshape(-1), space.high.reshape(-1)
        # In float64: high - low of a float32 box may overflow, and middle - half would miss low between unlike bounds.
        low, high = self.low.astype(np.float64), self.high.astype(np.float64)
        self.middle, self.half = low / 2 + high / 2, high / 2 - low / 2
        self._vector = len(space.shape) == 1
        self._identity = bool(np.all(self.middle == 0) and np.all(self.half == 1))

    def to_env(self, action: NDArray[Any]) -> NDArray[Any]:
        """([n,] dim) in [-1, 1] -> new array ([n,] *space.shape) in the dtype of the space, clipped to its bounds."""
        if not self._identity:
            action = action * self.half
            action += self.middle
        scaled: NDArray[Any] = action.astype(self.space.dtype)
        # The sum above may round to just outside of the bounds, and many environments check them.
        np.maximum(scaled, self.low, out=scaled)
        np.minimum(scaled, self.high, out=scaled)
        return scaled if self._vector else scaled.reshape(*action.shape[:-1], *self.space.shape)

    def from_env(self, action: NDArray[Any]) -> NDArray[np.float32]:
        """([n,] *space.shape) -> ([n,] dim) float32 in [-1, 1]; 0 where the bounds coincide."""
        batch = action.shape[: action.ndim - len(self.space.shape)]
        flat = action.reshape(*batch, self.dim).astype(np.float64)
        unit = np.divide(flat - self.middle, self.half, out=np.zeros_like(flat), where=self.half > 0)
        result: NDArray[np.float32] = np.clip(unit, -1.0, 1.0).astype(np.float32)
        return result


def _check_box_actions(space: Box, subject: str) -> None:
    if space.dtype.kind != "f":
        raise UserError(f"{subject} is {_show(space)}, which has no float dtype; declare it as float32")
    finite = np.isfinite(space.low.reshape(-1)) & np.isfinite(space.high.reshape(-1))
    if not finite.all():
        raise UserError(
            f"{subject} is {_show(space)}, unbounded in dimension {int(np.argmin(finite))}; give it finite bounds: "
            f"env = gymnasium.wrappers.TransformAction(env, lambda action: action, gymnasium.spaces.Box(low, high))"
        )


def _is_image(space: Box) -> bool:
    shape = space.shape
    if space.dtype == np.uint8 and len(shape) >= 2:
        return True
    # A float image has 1, 3 or 4 channels, first or last, beside two sides that are longer than a small matrix.
    last, first = shape[-1:] + shape[:-1], shape
    return len(shape) == 3 and any(s[0] in (1, 3, 4) and min(s[1:]) >= 8 for s in (first, last))


def _show(space: Space[Any]) -> str:
    """One line of a space: its repr, without the bounds of a large box."""
    text = " ".join(repr(space).split())
    if len(text) > 120:
        text = f"Box(shape={space.shape}, dtype={space.dtype})" if isinstance(space, Box) else text[:117] + "..."
    return text


def space_to_json(space: Space[Any]) -> dict[str, Any]:
    """Pure JSON for a `Box`, `Discrete` or (nested) `Dict`; infinite bounds are the strings `"inf"` and `"-inf"`.

    Raises:
        UserError: another kind of space.
    """
    if isinstance(space, Box):
        return {
            "type": "Box",
            "shape": list(space.shape),
            "dtype": space.dtype.name,
            "low": [_number_to_json(v) for v in space.low.reshape(-1).tolist()],
            "high": [_number_to_json(v) for v in space.high.reshape(-1).tolist()],
        }
    if isinstance(space, Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": space.dtype.name}
    if isinstance(space, Dict):  # pairs, since the order of the keys is the order of the flat observation
        return {"type": "Dict", "spaces": [[key, space_to_json(part)] for key, part in space.spaces.items()]}
    raise UserError(f"cannot save the space {_show(space)}; supported are `Box`, `Discrete` and `Dict`")


def space_from_json(data: Any) -> Space[Any]:
    """The space that `space_to_json` described.

    Raises:
        CheckpointError: malformed data; the message names the field.
    """
    return _from_json(data, "space", 0)


def _number_to_json(value: float | int) -> float | int | str:
    return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")


def _from_json(data: Any, path: str, depth: int) -> Space[Any]:
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{path}: nested deeper than {MAX_DEPTH} spaces")
    kind = _field(data, path, "type", str)
    if kind == "Box":
        return _box_from_json(data, path)
    if kind == "Discrete":
        dtype = _dtype(data, path, "iu")
        n, start = _field(data, path, "n", int), _field(data, path, "start", int)
        info = np.iinfo(dtype)
        if not (1 <= n <= info.max and info.min <= start <= info.max):
            raise CheckpointError(f"{path}: n = {n}, start = {start} are out of range for {dtype}")
        return Discrete(n, start=start, dtype=dtype.type)
    if kind == "Dict":
        pairs = _field(data, path, "spaces", list)
        spaces: dict[str, Space[Any]] = {}
        for pair in pairs:
            if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
                raise CheckpointError(f"{path}.spaces: expected pairs of a name and a space, got {str(pair)[:60]}")
            spaces[pair[0]] = _from_json(pair[1], f"{path}.{pair[0]}", depth + 1)
        # A sequence of pairs keeps the order; a mapping would be sorted.
        return Dict(list(spaces.items()))
    raise CheckpointError(f"{path}.type: `{kind[:60]}` is not one of `Box`, `Discrete`, `Dict`")


def _box_from_json(data: Mapping[str, Any], path: str) -> Box:
    dtype = _dtype(data, path, "fiu")
    shape = _field(data, path, "shape", list)
    if not all(type(s) is int and s >= 0 for s in shape):
        raise CheckpointError(f"{path}.shape: expected non-negative integers, got {str(shape)[:60]}")
    bounds = []
    for side in ("low", "high"):
        values = _field(data, path, side, list)
        if len(values) != math.prod(shape):
            raise CheckpointError(f"{path}.{side}: {len(values)} values for shape {shape}")
        try:
            numbers = [float(v) if v in ("inf", "-inf") else v for v in values]
            if not all(type(v) in (int, float) and not math.isnan(v) for v in numbers):
                raise TypeError("not a number")
            bounds.append(np.array(numbers, dtype=dtype).reshape(shape))
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{path}.{side}: not numbers of {dtype}: {error}") from None
    if np.any(bounds[0] > bounds[1]):
        raise CheckpointError(f"{path}: low is above high")
    return Box(bounds[0], bounds[1], dtype=dtype.type)


def _dtype(data: Any, path: str, kinds: str) -> np.dtype[Any]:
    name = _field(data, path, "dtype", str)
    if name not in DTYPES or np.dtype(name).kind not in kinds:
        raise CheckpointError(f"{path}.dtype: `{name[:60]}` is not a dtype of this space")
    dtype: np.dtype[Any] = np.dtype(name)
    return dtype


def _field(data: Any, path: str, key: str, kind: type) -> Any:
    if not isinstance(data, Mapping) or key not in data:
        raise CheckpointError(f"{path}: `{key}` is missing")
    if not isinstance(data[key], kind) or isinstance(data[key], bool):
        raise CheckpointError(f"{path}.{key}: expected {kind.__name__}, got {type(data[key]).__name__}")
    return data[key]
