"""Recorded experience: files and Minari datasets become checked transitions, episode after episode.

`read(source)` takes `*.npz` and D4RL-style HDF5 files of flat arrays, a mapping of such arrays, and Minari datasets (by
`minari:<id>`, folder or object), and returns a `Dataset`. What differs between them is settled here, once:

- `timeouts` end an episode without making its last state terminal; a recording that stops in mid-episode does so, too.
- Minari's episodes have one observation more than actions; flat files without `next_observations` have not, so that the
  last transition of an episode that did not terminate leads nowhere known and is dropped.
- NaN, infinity and lengths that differ are errors that name the array and row. Whatever is dropped, assumed or not used
  is counted in `Dataset.notes`.

Nothing is unpickled, and no environment is made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Dict, Discrete
from numpy.typing import NDArray

from rlkit.envs.spaces import DTYPES, _show, flat_space, flatten_obs
from rlkit.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import minari

REQUIRED = ("observations", "actions", "rewards", "terminals")
OPTIONAL = ("timeouts", "next_observations")
SUFFIXES = (".npz", ".hdf5", ".h5")
MINARI = "minari:"
METADATA = "metadata.json"  # of a Minari dataset, beside its data
SHOWN = 24  # dimensions with a line of their own in a report
NUMBERS = DTYPES | {"bool"}
REFERENCE_RETURNS: dict[str, tuple[float, float]] = {
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
    "Ant": (-325.6, 3879.7),
}
"""D4RL's returns of a random and of an expert policy (arXiv:2004.07219), whatever the environment's version."""


def reference_returns(env_id: str | None) -> tuple[float, float] | None:
    """Returns of a random and of an expert policy of a gymnasium id, where D4RL has them."""
    return REFERENCE_RETURNS.get((env_id or "").rpartition("-v")[0])


def normalized_score(mean_return: float, reference: tuple[float, float]) -> float:
    """100 (R - random) / (expert - random), as D4RL and Minari report it."""
    random, expert = reference
    return 100.0 * (mean_return - random) / (expert - random)


@dataclass(frozen=True)
class Dataset:
    """Transitions, episode after episode, in the environment's own units.

    Attributes:
        rows: `obs`, `next_obs` (n, obs_dim), flattened as `rlkit.envs.flatten_obs` does, in their own dtype; `action`
            (n, *shape) in the environment's units, or (n,) int64 of discrete ones (counted from the space's `start`);
            `reward` (n,) of floats; `terminated`, `truncated` (n,) bool; `episode` (n,) int64: 0, 1, 2, … in order.
        source: what the user gave, for messages.
        observation_space, action_space: as recorded; None where the source does not say.
        env_id: of the environment, where the source says.
        notes: lines for the user: what was dropped or assumed, with counts.
        cut_off: episodes whose recording stopped before their end; their last transition counts as truncated.
        env_spec: of the environment with its arguments, where the source says.
        reference: returns of a random and of an expert policy, where the source says.
        has_rewards: False where `reward` is zeros in place of what was not recorded.
    """

    rows: dict[str, NDArray[Any]]
    source: str
    observation_space: gym.Space[Any] | None = None
    action_space: gym.Space[Any] | None = None
    env_id: str | None = None
    notes: tuple[str, ...] = ()
    cut_off: frozenset[int] = frozenset()
    env_spec: EnvSpec | None = None
    reference: tuple[float, float] | None = None
    has_rewards: bool = True

    def __len__(self) -> int:
        """Transitions."""
        return len(self.rows["reward"])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(episodes,) int64: transitions of each."""
        return np.bincount(self.rows["episode"]).astype(np.int64)

    @property
    def returns(self) -> NDArray[np.float64]:
        """(episodes,) float64: undiscounted, of the rewards that are here."""
        return np.bincount(self.rows["episode"], weights=self.rows["reward"]).astype(np.float64)

    def take(self, episodes: Iterable[int], note: str | None = None) -> Dataset:
        """The given episodes in the given order, numbered anew; with a further note."""
        chosen = np.asarray(list(episodes), np.int64)
        lengths = self.lengths
        starts = np.cumsum(lengths) - lengths
        taken = lengths[chosen]
        number = np.repeat(np.arange(len(chosen)), taken)
        index = np.arange(len(number)) + (starts[chosen] - (np.cumsum(taken) - taken))[number]
        rows = {name: column[index] for name, column in self.rows.items()} | {"episode": number}
        cut_off = frozenset(i for i, episode in enumerate(chosen.tolist()) if episode in self.cut_off)
        notes = self.notes if note is None else (*self.notes, note)
        return dataclasses.replace(self, rows=rows, notes=notes, cut_off=cut_off)

    def in_band(self, low: float, high: float) -> NDArray[np.bool_]:
        """(episodes,) bool: those from percentile `low` up to `high` of the returns.

        An episode's percentile is 100 (rank + 1/2) / n, ranks from 0 in the order of returns; equal returns keep the
        order of the episodes. `low` itself belongs to the band and `high` does not, so that bands that meet share no
        episode; (0, 100) is everything.

        Raises:
            UserError: not 0 <= low < high <= 100, no episode lies there, or there are no rewards to go by.
        """
        if not 0 <= low < high <= 100:
            raise UserError(f"band: got {low:g} to {high:g}; expected 0 <= low < high <= 100")
        if not self.has_rewards and (low, high) != (0, 100):
            raise UserError(f"{self.source}: has no `rewards`, so no band {low:g} to {high:g} of its returns")
        n = len(self.lengths)
        percentile = np.empty(n)
        percentile[np.argsort(self.returns, kind="stable")] = 100 * (np.arange(n) + 0.5) / n
        inside: NDArray[np.bool_] = (low <= percentile) & (percentile < high)
        if not inside.any():
            steps = "is at percentile 50" if n == 1 else f"are {100 / n:.3g} percentiles apart, from {50 / n:.3g} on"
            raise UserError(
                f"{self.source}: no episode lies in the band {low:g} to {high:g}; its {n:,} {steps}: give a wider band"
            )
        return inside

    def band(self, low: float, high: float) -> Dataset:
        """The episodes that `in_band` names, in their order; a note says how many. (0, 100) is everything.

        Raises:
            UserError: not 0 <= low < high <= 100, or no episode lies there.
        """
        inside = self.in_band(low, high)
        if inside.all():
            return self
        returns = self.returns[inside]
        count = f"{len(returns):,} of {len(inside):,} episodes, returns {returns.min():.6g} to {returns.max():.6g}"
        return self.take(np.flatnonzero(inside), f"band {low:g} to {high:g} of the returns: {count}")

    def fingerprint(self) -> str:
        """Hash of the content: names, dtypes, shapes and bytes of all rows; nothing else counts."""
        digest = hashlib.blake2b(digest_size=16)
        for name, column in sorted(self.rows.items()):
            digest.update(f"{name} {column.dtype.str} {column.shape}\n".encode())
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()


def read(source: str | Path | Mapping[str, Any] | minari.MinariDataset | Dataset, *, rewards: bool = True) -> Dataset:
    """The transitions of `source`.

    Args:
        source: an `.npz` or D4RL-style `.hdf5` or `.h5` file, or a mapping, of flat arrays `observations, actions,
            rewards, terminals`, with `timeouts`, `next_observations` or both; a Minari dataset: `minari:<id>` (local,
            else downloaded), its folder, or the object.
        rewards: whether flat arrays have to have `rewards`; otherwise zeros take the place of missing ones.

    Raises:
        UserError: it is not there, cannot be read, lacks an array, or holds what is no transition: NaN, infinity,
            lengths that differ, images, other numbers of observations than Minari's T + 1.
    """
    if isinstance(source, Dataset):
        return source
    if isinstance(source, Mapping):
        return _from_flat(source, "the mapping", rewards=rewards)
    if isinstance(source, str | Path):
        text = str(source)
        return _from_minari_id(text.removeprefix(MINARI)) if text.startswith(MINARI) else _from_path(text, rewards)
    module = sys.modules.get("minari")  # whoever has such an object has imported it
    if module is not None and isinstance(source, module.MinariDataset):
        return _from_minari(source, f"{MINARI}{source.id}")
    raise UserError(
        f"data: {type(source).__name__} is none of: an .npz or .hdf5 file, a mapping of arrays, `minari:<id>`, the "
        "folder of a Minari dataset, a minari.MinariDataset"
    )


def is_recording(source: str | Path) -> bool:
    """Whether `source` names recorded transitions, there or not, rather than text, a run or a name on the hub."""
    path = Path(source)
    if str(source).startswith(MINARI) or path.suffix.lower() in SUFFIXES:
        return True
    try:
        found = [folder / METADATA for folder in (path, path / "data") if (folder / METADATA).is_file()]
        return any("minari_version" in file.read_text(encoding="utf-8", errors="replace") for file in found)
    except (OSError, ValueError):  # no name that a file can have
        return False


# --- files -------------------------------------------------------------------------------------------------------


def _from_path(text: str, rewards: bool) -> Dataset:
    try:
        path = Path(text).expanduser()
        is_dir, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long for a file name, a NUL, a home that is unknown
        raise UserError(f"data: no file of that name ({len(text)} characters)") from None
    if is_dir:
        return _from_folder(path)
    if not is_file:
        raise UserError(f"data: no file `{text}`{_near(path, text)}")
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return _from_flat(_npz(path), text, rewards=rewards)
    if suffix in SUFFIXES:
        return _from_hdf5(path, rewards)
    raise UserError(f"data: {text} ends in `{suffix}`; expected one of {', '.join(SUFFIXES)}, or `minari:<id>`")


def _near(path: Path, text: str) -> str:
    if text in _local_ids():
        return f"; the Minari dataset of that name is `{MINARI}{text}`"
    if not path.parent.is_dir():
        return f"; the folder `{path.parent}` is not there"
    return did_you_mean(path.name, [p.name for p in path.parent.iterdir() if p.suffix.lower() in SUFFIXES])


def _npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.lib.npyio.NpzFile):
            with file:
                return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        if "pickle" in str(error):
            raise UserError(
                f"{path}: holds pickled objects, which can run code and are refused; save plain arrays of numbers by "
                "np.savez"
            ) from None
        raise UserError(f"{path}: cannot be read as .npz: {error}") from None
    raise UserError(f"{path}: a single array, not an .npz of several; save them by name: np.savez")


def _from_hdf5(path: Path, rewards: bool) -> Dataset:
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if "episode_0" in file:
                if (path.parent / METADATA).is_file():
                    return _from_folder(path.parent)
                raise UserError(
                    f"{path}: episodes of a Minari dataset, but {METADATA} is not beside it: give its folder"
                )
            names: list[str] = []
            file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
            wanted = {name: file[name][()] for name in names if name in (*REQUIRED, *OPTIONAL)}
    except (OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read as HDF5: {error}") from None
    return _from_flat(wanted, str(path), names, rewards=rewards)


def _from_flat(
    arrays: Mapping[str, Any], source: str, names: Iterable[str] | None = None, *, rewards: bool = True
) -> Dataset:
    """Transitions of flat arrays.

    Args:
        names: of all arrays that there are, if `arrays` has only those that are used.
        rewards: whether they have to be there.
    """
    names = list(arrays if names is None else names)
    required = [name for name in REQUIRED if rewards or name != "rewards"]
    missing = [name for name in required if name not in names]
    if missing:
        raise UserError(
            f"{source}: missing {_quoted(missing)}; found {_quoted(names) or 'nothing'}; expected {_quoted(required)}, "
            f"and {_quoted(OPTIONAL)} where the data have them"
        )
    unused = [name for name in names if name not in (*REQUIRED, *OPTIONAL)]
    notes = [f"arrays not used: {', '.join(unused)}"] if unused else []
    values = {name: _array(source, name, arrays[name]) for name in (*REQUIRED, *OPTIONAL) if name in arrays}
    n = len(values["observations"])
    for name, array in values.items():
        if len(array) != n:
            raise UserError(f"{source}: `observations` has {n:,} rows, `{name}` has {len(array):,}; they have to agree")
    if n == 0:
        raise UserError(f"{source}: holds no transitions")
    obs = _flat_observations(source, "observations", values["observations"])
    columns = {"observations": obs, "actions": _actions(source, values["actions"])}
    has_rewards = "rewards" in values
    if has_rewards:
        columns["rewards"] = _rewards(source, values["rewards"])
    else:
        columns["rewards"] = np.zeros(n, np.float32)
        notes.append("no `rewards`: taken as zeros, which nothing is learned from")
    next_obs = None
    if "next_observations" in values:
        next_obs = _flat_observations(source, "next_observations", values["next_observations"])
        if next_obs.shape != obs.shape:
            sizes = f"{obs.shape[1]} and {next_obs.shape[1]} numbers"
            raise UserError(f"{source}: `observations` and `next_observations` have {sizes} a row; they have to agree")
        columns["next_observations"] = next_obs
    for name, column in columns.items():
        _check_finite(source, name, column, lambda row: f"row {row:,}")
    terminated = _flags(source, "terminals", values["terminals"])
    timeouts = _flags(source, "timeouts", values["timeouts"]) if "timeouts" in values else None
    truncated = _timeouts(source, obs, next_obs, terminated, timeouts, notes)
    cut = not (terminated[-1] or truncated[-1])
    truncated[-1] |= cut
    if next_obs is None:
        following = np.concatenate([obs[1:], obs[-1:]])
        following[terminated] = obs[terminated]  # never used; the next row is of another episode
    else:
        following = next_obs.astype(obs.dtype, copy=False)
    rows = {
        "obs": obs,
        "action": columns["actions"],
        "reward": columns["rewards"],
        "next_obs": following,
        "terminated": terminated,
        "truncated": truncated,
        "episode": _number(terminated | truncated),
    }
    cut_off = {int(rows["episode"][-1])} if cut else set()
    if cut:
        notes.append("the last episode stops in the middle: its end counts as truncated")
    dataset = Dataset(rows, source, notes=tuple(notes), cut_off=frozenset(cut_off), has_rewards=has_rewards)
    return dataset if next_obs is not None else _without_lost(dataset)


def _timeouts(
    source: str,
    obs: NDArray[Any],
    next_obs: NDArray[Any] | None,
    terminated: NDArray[np.bool_],
    timeouts: NDArray[np.bool_] | None,
    notes: list[str],
) -> NDArray[np.bool_]:
    """(n,) bool, new: where an episode ends without terminating, by `timeouts` or by where the observations leap."""
    if next_obs is None:
        if timeouts is None:
            raise UserError(
                f"{source}: missing `timeouts` and `next_observations`: nothing says where an episode that did not "
                "terminate ends; add `timeouts`, true where a time limit or a reset ended an episode (all false if "
                "none did), or `next_observations`"
            )
        return timeouts.copy()
    narrow = min(obs.dtype, next_obs.dtype, key=lambda dtype: dtype.itemsize)  # one of them may have been rounded
    ended = terminated if timeouts is None else terminated | timeouts
    leaps = np.zeros(len(obs), np.bool_)
    leaps[:-1] = (next_obs[:-1].astype(narrow, copy=False) != obs[1:].astype(narrow, copy=False)).any(axis=1)
    leaps &= ~ended
    count = int(leaps.sum())
    if timeouts is not None:
        if count:
            notes.append(
                f"{count:,} transitions within episodes have `next_observations` that are not the observations of the "
                "next row"
            )
        return timeouts.copy()
    if count > len(obs) // 2:
        raise UserError(
            f"{source}: missing `timeouts`, and `next_observations` tells no episodes: in {count:,} of {len(obs):,} "
            "rows it is not the observation of the next row (shuffled transitions?); add `timeouts`, true where a time "
            "limit or a reset ended an episode"
        )
    notes.append(
        f"no `timeouts`: {count:,} episodes were taken to end, without terminating, where `next_observations` is not "
        "the observation of the next row"
    )
    return leaps


def _without_lost(dataset: Dataset) -> Dataset:
    """Without the transitions whose next observation nobody recorded: the last of episodes that did not terminate."""
    rows = dataset.rows
    lost = rows["truncated"] & ~rows["terminated"]
    count = int(lost.sum())
    if not count:
        return dataset
    episode, truncated = rows["episode"], rows["truncated"].copy()
    truncated[:-1] |= lost[1:] & (episode[1:] == episode[:-1])
    keep = ~lost
    left = np.unique(episode[keep])
    if not len(left):
        raise UserError(
            f"{dataset.source}: nothing is left: no episode terminates or has two steps, and `next_observations` is "
            "missing"
        )
    gone = int(episode[-1]) + 1 - len(left)
    number = {int(old): new for new, old in enumerate(left.tolist())}
    rows = {name: column[keep] for name, column in (rows | {"truncated": truncated}).items()}
    rows["episode"] = np.searchsorted(left, rows["episode"])
    note = f"no `next_observations`: dropped {count:,} transitions, the last of each episode that did not terminate"
    if gone:
        note += f"; {gone:,} of these episodes had no other"
    cut_off = frozenset(number[i] for i in dataset.cut_off if i in number)
    return dataclasses.replace(dataset, rows=rows, notes=(*dataset.notes, note), cut_off=cut_off)


def _number(ends: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(n,) int64: the episode of each row, from where episodes end."""
    return np.concatenate([[0], np.cumsum(ends[:-1])]).astype(np.int64)


# --- arrays ------------------------------------------------------------------------------------------------------


def _array(source: str, name: str, values: Any) -> NDArray[Any]:
    """(n, …) numbers in the machine's byte order."""
    try:
        array = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{source}: `{name}` is no array: {error}") from None
    if array.dtype.name not in NUMBERS:
        raise UserError(f"{source}: `{name}` has dtype {array.dtype}; expected numbers, such as float32")
    if array.ndim == 0:
        raise UserError(f"{source}: `{name}` is a single number; expected a row for each transition")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _flat_observations(source: str, name: str, values: NDArray[Any]) -> NDArray[Any]:
    """(n, …) -> (n, obs_dim)."""
    if values.ndim > 2 and values.dtype != np.bool_:
        info = np.iinfo(values.dtype) if values.dtype.kind in "iu" else None
        low, high = (-np.inf, np.inf) if info is None else (info.min, info.max)
        flat_space(Box(low, high, values.shape[1:], values.dtype.type), f"{source}: `{name}`")  # refuses images
    return values.reshape(len(values), -1)


def _actions(source: str, values: NDArray[Any], shape: tuple[int, ...] | None = None) -> NDArray[Any]:
    """(n, *shape) of floats as they are; whole numbers, (n,) or (n, 1) -> (n,) int64.

    Args:
        shape: of one action, where it is known; else a row without an axis is a vector of one number.
    """
    if values.dtype.kind == "f":
        return values.reshape(len(values), 1) if values.ndim == 1 and shape is None else values
    if math.prod(values.shape[1:]) != 1:
        raise UserError(
            f"{source}: `actions` are {values.dtype} with shape {values.shape}: several whole numbers an action "
            "(MultiDiscrete) are not supported; if they are continuous, save them as floats"
        )
    return values.reshape(len(values)).astype(np.int64)


def _rewards(source: str, values: NDArray[Any]) -> NDArray[Any]:
    """(n,) or (n, 1) -> (n,) of floats."""
    column = _column(source, "rewards", values)
    return column if column.dtype.kind == "f" else column.astype(np.float64)


def _column(source: str, name: str, values: NDArray[Any]) -> NDArray[Any]:
    if math.prod(values.shape[1:]) != 1:
        raise UserError(
            f"{source}: `{name}` has shape {values.shape}; expected one value a transition, ({len(values)},)"
        )
    return values.reshape(len(values))


def _flags(source: str, name: str, values: NDArray[Any]) -> NDArray[np.bool_]:
    """(n,) bool of booleans, or of zeros and ones."""
    column = _column(source, name, values)
    flags: NDArray[np.bool_] = column.astype(np.bool_)
    wrong = np.flatnonzero(column != flags)
    if len(wrong):
        raise UserError(f"{source}: `{name}` row {wrong[0]:,} is {column[wrong[0]]}; expected booleans, or 0 and 1")
    return flags


def _check_finite(source: str, name: str, values: NDArray[Any], where: Callable[[int], str]) -> None:
    """Refuse NaN and infinity; the square sum is the quick answer, and overflows for very large entries."""
    if values.dtype.kind != "f" or math.isfinite(np.vdot(values, values)) or np.isfinite(values).all():
        return
    flat = values.reshape(len(values), -1)
    row, column = np.argwhere(~np.isfinite(flat))[0].tolist()
    place = f", column {column}" if values.ndim > 1 else ""
    raise UserError(
        f"{source}: `{name}` {where(row)}{place} is {flat[row, column]}; data have to be finite: leave this episode "
        "out, or mend the recording"
    )


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


# --- Minari ------------------------------------------------------------------------------------------------------


def check_id(dataset_id: str) -> str:
    """`dataset_id`, which has to be one that Minari takes.

    Raises:
        UserError: it is not.
    """
    from minari.dataset.minari_dataset import DATASET_ID_RE

    match = DATASET_ID_RE.fullmatch(dataset_id)
    if match is None or match.group("version") is None:
        raise UserError(
            f"`{dataset_id}` is no id of a Minari dataset; expected namespace/name-vN, such as `hopper/medium-v0`, or "
            "name-vN (letters, digits, - and _; at least two of them before a /)"
        )
    return dataset_id


def _local_ids() -> list[str]:
    """Ids of the local Minari datasets."""
    import minari

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of datasets that are not asked for
        return list(minari.list_local_datasets())


def _from_minari_id(dataset_id: str) -> Dataset:
    import minari
    from minari.storage.datasets_root_dir import get_dataset_path

    source = f"{MINARI}{check_id(dataset_id)}"
    data = get_dataset_path(dataset_id) / "data"
    if not data.exists():
        try:
            minari.download_dataset(dataset_id)
        except Exception as error:  # of many kinds: no network, no such dataset, another version of Minari
            reason = str(error).strip().split("\n")[0][:200]
            raise UserError(
                f"{source}: not in {get_dataset_path()}, where Minari keeps datasets (MINARI_DATASETS_PATH), and not "
                f"to be downloaded: {type(error).__name__}: {reason}{did_you_mean(dataset_id, _local_ids())}"
            ) from None
    return _from_data_folder(data, source)


def _from_folder(path: Path) -> Dataset:
    for data in (path, path / "data"):
        if (data / METADATA).is_file():
            return _from_data_folder(data, str(path))
    found = sorted(p.name for p in path.iterdir())[:8]
    inside = ", ".join(found) if found else "nothing"
    raise UserError(
        f"{path}: no Minari dataset, which has data/{METADATA}; found {inside}; give a file or a dataset's folder"
    )


def _from_data_folder(data: Path, source: str) -> Dataset:
    from minari import MinariDataset
    from minari.dataset.minari_storage import MinariStorage

    try:
        raw = MinariStorage.read_raw_metadata(data)
        absent = [name for name in ("observation_space", "action_space") if name not in raw]
        if absent:
            # Minari would make the environment that the file names, and so run what a stranger's file asks for.
            raise UserError(
                f"{source}: {METADATA} lacks {_quoted(absent)}; load it yourself if you trust it, and give the object: "
                "minari.load_dataset(id)"
            )
        dataset = MinariDataset(data)
    except UserError:
        raise
    except Exception as error:  # malformed metadata fail in many ways
        raise UserError(f"{source}: cannot be read as a Minari dataset: {type(error).__name__}: {error}") from None
    return _from_minari(dataset, source)


def _from_minari(dataset: minari.MinariDataset, source: str) -> Dataset:
    raw = dataset.storage.read_raw_metadata(dataset.storage.data_path)
    space = _in_file_order(dataset.observation_space, raw.get("observation_space"))
    flat_space(space, f"{source}: observation")  # refuses images and the like before anything is read
    if not isinstance(dataset.action_space, Box | Discrete):
        raise UserError(f"{source}: actions are `{_show(dataset.action_space)}`; supported are `Box` and `Discrete`")
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in ("obs", "next_obs", *REQUIRED[1:], "truncations")}
    lengths, empty, numbers = [], 0, []
    unused: set[str] = set()
    try:
        for episode in dataset.iterate_episodes():
            if not len(episode.rewards):
                empty += 1
                continue
            observations = _episode_observations(source, space, episode)
            parts["obs"].append(observations[:-1])
            parts["next_obs"].append(observations[1:])
            for name, values in (
                ("actions", episode.actions),
                ("rewards", episode.rewards),
                ("terminals", episode.terminations),
                ("truncations", episode.truncations),
            ):
                parts[name].append(_array(source, name, values))
                if len(values) != len(episode.rewards):
                    raise UserError(
                        f"{source}: episode {episode.id}: {len(episode.rewards):,} rewards, {len(values):,} {name}"
                    )
            unused.update(episode.infos or ())
            lengths.append(len(episode.rewards))
            numbers.append(int(episode.id))
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in many ways
        raise UserError(f"{source}: cannot be read: {type(error).__name__}: {error}") from None
    if not lengths:
        raise UserError(f"{source}: holds no transitions")
    notes = [f"{empty:,} episodes without a step were left out"] if empty else []
    if unused:
        notes.append(f"infos not used: {', '.join(sorted(unused))}")
    columns = {name: np.concatenate(values) for name, values in parts.items()}
    found = _from_episodes(columns, np.array(lengths), numbers, dataset, space, source, notes)
    bounds = raw.get("ref_min_score"), raw.get("ref_max_score")
    known = all(isinstance(bound, int | float) and math.isfinite(bound) for bound in bounds) and bounds[0] != bounds[1]
    return dataclasses.replace(found, reference=(float(bounds[0]), float(bounds[1]))) if known else found


def _episode_observations(source: str, space: gym.Space[Any], episode: Any) -> NDArray[Any]:
    """(T + 1, obs_dim) of one episode."""
    steps = len(episode.rewards)
    try:
        return flatten_obs(space, episode.observations, steps + 1)
    except ValueError as error:
        raise UserError(
            f"{source}: episode {episode.id}: {error}; of {steps:,} steps, {steps + 1:,} observations are expected"
        ) from None
    except KeyError as error:
        raise UserError(f"{source}: episode {episode.id}: no observations {error}, which the space has") from None


def _from_episodes(
    columns: Mapping[str, NDArray[Any]],
    lengths: NDArray[np.int64],
    numbers: list[int],
    dataset: minari.MinariDataset,
    space: gym.Space[Any],
    source: str,
    notes: list[str],
) -> Dataset:
    """Checked transitions of Minari's episodes, one after the other."""
    last = np.cumsum(lengths) - 1

    def where(row: int) -> str:
        i = int(np.searchsorted(last, row))
        return f"episode {numbers[i]}, step {row - int(last[i] - lengths[i] + 1):,}"

    action_space = dataset.action_space
    action = _actions(source, columns["actions"], action_space.shape)
    if action.shape[1:] != action_space.shape or isinstance(action_space, Discrete) != (action.dtype.kind == "i"):
        found = f"{action.dtype} of shape {action.shape[1:]}"
        raise UserError(f"{source}: actions are {found}, their space is recorded as `{_show(action_space)}`")
    checked = {"actions": action, "rewards": _rewards(source, columns["rewards"])}
    for name, column in {"observations": columns["obs"], "observations (next)": columns["next_obs"], **checked}.items():
        _check_finite(source, name, column, where)
    terminated = _flags(source, "terminations", columns["terminals"])
    truncated = _flags(source, "truncations", columns["truncations"]).copy()
    ends = terminated | truncated
    final = np.zeros(len(ends), np.bool_)
    final[last] = True
    inside = int((ends & ~final).sum())
    if inside:
        notes.append(f"{inside:,} episodes end within one of the file, where it says so: each part is an episode")
    cut = final & ~ends
    truncated |= cut
    episode = _number(ends | final)
    if cut.any():
        notes.append(f"{int(cut.sum()):,} episodes stop in the middle: their end counts as truncated")
    rows = {
        "obs": columns["obs"],
        "action": action,
        "reward": checked["rewards"],
        "next_obs": columns["next_obs"],
        "terminated": terminated,
        "truncated": truncated,
        "episode": episode,
    }
    spec: EnvSpec | None = dataset.env_spec
    env_id = None if spec is None else spec.id
    return Dataset(rows, source, space, action_space, env_id, tuple(notes), frozenset(episode[cut].tolist()), spec)


def _in_file_order(space: gym.Space[Any], written: Any) -> gym.Space[Any]:
    """`space` with the keys of a `Dict` as written: Minari's reader sorts them, and they order the numbers."""
    described = json.loads(written) if isinstance(written, str) else written
    if not isinstance(space, Dict) or not isinstance(described, Mapping):
        return space
    return Dict([(key, _in_file_order(space.spaces[key], part)) for key, part in described["subspaces"].items()])


# --- looking -----------------------------------------------------------------------------------------------------


def report(dataset: Dataset) -> list[str]:
    """Lines for people: what is in the data, and the notes."""
    rows, lengths, returns = dataset.rows, dataset.lengths, dataset.returns
    last = np.cumsum(lengths) - 1
    terminated = int(rows["terminated"][last].sum())
    cut = len(dataset.cut_off)
    quartiles = np.percentile(returns, [25, 50, 75])
    repeats = len(lengths) - len(
        {_episode_hash(rows, end - n + 1, end + 1) for end, n in zip(last, lengths, strict=True)}
    )
    lines = [
        f"{dataset.source}: {len(dataset):,} transitions, {len(lengths):,} episodes",
        f"environment: {dataset.env_id or 'not recorded'}",
        f"ends: {terminated:,} terminated, {len(lengths) - terminated - cut:,} timed out, {cut:,} cut off",
        f"lengths: min {lengths.min():,}, median {np.median(lengths):,.6g}, mean {lengths.mean():,.6g}, "
        f"max {lengths.max():,}",
        f"returns: min {returns.min():.6g}, quartiles {' '.join(f'{q:.6g}' for q in quartiles)}, "
        f"max {returns.max():.6g}; mean {returns.mean():.6g}, std {_std(returns):.6g}",
        *_scores(dataset),
        f"rewards: {rows['reward'].min():.6g} to {rows['reward'].max():.6g}, mean {rows['reward'].mean():.6g}",
        *_ranges("observations", rows["obs"], dataset.observation_space),
        *_ranges("actions", rows["action"], dataset.action_space),
        "NaN or infinity: none",
        f"episodes that repeat an earlier one: {repeats:,}",
        f"fingerprint: {dataset.fingerprint()}",
    ]
    return [*lines, *(f"note: {note}" for note in dataset.notes)]


def _scores(dataset: Dataset) -> list[str]:
    reference = dataset.reference or reference_returns(dataset.env_id)
    if reference is None:
        return []
    random, expert = reference
    score = normalized_score(float(dataset.returns.mean()), reference)
    return [f"normalised score of the mean return: {score:.1f} (0 is {random:.6g}, 100 is {expert:.6g})"]


def _std(values: NDArray[np.float64]) -> float:
    """Sample standard deviation; NaN of one value."""
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def _episode_hash(rows: Mapping[str, NDArray[Any]], start: int, stop: int) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name in ("obs", "action", "reward"):
        digest.update(np.ascontiguousarray(rows[name][start:stop]).data)
    return digest.digest()


def _ranges(name: str, values: NDArray[Any], space: gym.Space[Any] | None) -> list[str]:
    """A line, and one for each dimension."""
    recorded = "" if space is None else f", space {_show(space)}"
    if values.ndim == 1 and values.dtype.kind == "i":
        found, counts = np.unique(values, return_counts=True)
        shares = [f"{value}: {count / len(values):.1%}" for value, count in zip(found, counts, strict=True)]
        more = f", and {len(shares) - SHOWN:,} more" if len(shares) > SHOWN else ""
        return [f"{name}: {len(found):,} discrete values ({', '.join(shares[:SHOWN])}{more}){recorded}"]
    flat = values.reshape(len(values), -1)
    low, high, mean, std = flat.min(0), flat.max(0), flat.mean(0, dtype=np.float64), flat.std(0, dtype=np.float64)
    lines = [f"{name}: {flat.shape[1]:,} x {flat.dtype}{recorded}"]
    lines += [
        f"  [{i}] {low[i]:.6g} to {high[i]:.6g}, mean {mean[i]:.6g}, std {std[i]:.6g}"
        for i in range(min(SHOWN, flat.shape[1]))
    ]
    if flat.shape[1] > SHOWN:
        rest = slice(SHOWN, None)
        lines.append(f"  [{SHOWN}] to [{flat.shape[1] - 1}]: {low[rest].min():.6g} to {high[rest].max():.6g}")
    return lines


# --- does it fit an environment? ---------------------------------------------------------------------------------


def check_spaces(dataset: Dataset, observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> None:
    """Refuse data that are not of an environment with these spaces.

    Args:
        observation_space, action_space: of one environment, as it has them.

    Raises:
        UserError: another number of observed values, actions of another kind or shape, discrete actions that do not
            exist there, or recorded spaces with other bounds or keys. The message names both sides.
    """
    source = dataset.source
    theirs, ours = dataset.rows["obs"].shape[1], math.prod(flat_space(observation_space).shape)
    if theirs != ours:
        raise UserError(
            f"{source}: observations have {theirs} numbers, those of the environment {ours}: {_show(observation_space)}"
        )
    action = dataset.rows["action"]
    discrete = action.dtype.kind == "i"
    if discrete != isinstance(action_space, Discrete) or (not discrete and action.shape[1:] != action_space.shape):
        kind = "whole numbers (discrete)" if discrete else f"{action.dtype} vectors of shape {action.shape[1:]}"
        advice = "; save discrete actions as integers" if isinstance(action_space, Discrete) else ""
        raise UserError(f"{source}: actions are {kind}, the environment has `{_show(action_space)}`{advice}")
    if isinstance(action_space, Discrete):
        wrong = np.flatnonzero((action < action_space.start) | (action >= action_space.start + action_space.n))
        if len(wrong):
            raise UserError(
                f"{source}: `actions` row {wrong[0]:,} is {action[wrong[0]]}, which `{_show(action_space)}` of the "
                "environment does not have"
            )
    for name, recorded, own in (
        ("observation", dataset.observation_space, observation_space),
        ("action", dataset.action_space, action_space),
    ):
        _check_same(source, name, recorded, own)


def _check_same(source: str, name: str, recorded: gym.Space[Any] | None, own: gym.Space[Any]) -> None:
    """Refuse a recorded space with other bounds or other keys than the environment's."""
    if recorded is None:
        return
    both = f"recorded was the {name} space `{_show(recorded)}`, the environment has `{_show(own)}`"
    if isinstance(recorded, Dict) and isinstance(own, Dict) and _keys(recorded) != _keys(own):
        raise UserError(f"{source}: {both}: keys or their order differ, {_keys(recorded)} and {_keys(own)}")
    if isinstance(recorded, Discrete) or isinstance(own, Discrete):
        if recorded != own:
            raise UserError(f"{source}: {both}")
        return
    there, here = flat_space(recorded), flat_space(own)
    for side in ("low", "high"):
        left, right = (getattr(space, side).astype(np.float64) for space in (there, here))
        wrong = np.flatnonzero(~np.isclose(left, right, rtol=1e-6, atol=1e-12))
        if len(wrong):
            i = int(wrong[0])
            raise UserError(
                f"{source}: {both}: `{side}` of dimension {i} is {left[i]:.6g} there and {right[i]:.6g} here"
            )


def _keys(space: Dict) -> list[Any]:
    return [(key, _keys(part)) if isinstance(part, Dict) else key for key, part in space.spaces.items()]


CLIPPED = ": clipped, as the environment would"
FAR = 0.5
"""Widths of the bounds outside of which most values of a dimension are taken to be in other units. Policies whose noise
is not bounded, such as TRPO's, were seen with 60 % of a dimension's values outside, but 22 % that far."""


def clip_actions(dataset: Dataset, action_space: gym.Space[Any]) -> Dataset:
    """`dataset` with actions inside a bounded `Box`, as its environment would clip them; a note says how many were not.

    Raises:
        UserError: more than half of the values of a dimension lie outside by more than half the width of its bounds:
            these actions are in other units.
    """
    if not isinstance(action_space, Box):
        return dataset
    action = dataset.rows["action"]
    flat = action.reshape(len(action), -1).astype(np.float64)
    low, high = (side.reshape(-1).astype(np.float64) for side in (action_space.low, action_space.high))
    excess = np.maximum(np.maximum(low - flat, flat - high), 0.0)
    outside = (excess > 0).any(axis=1)
    if not outside.any():
        return dataset
    share = (excess > FAR * (high - low)).mean(axis=0)
    if (share > 0.5).any():
        i = int(share.argmax())
        raise UserError(
            f"{dataset.source}: actions in dimension {i} range from {flat[:, i].min():.6g} to {flat[:, i].max():.6g}, "
            f"and {share[i]:.0%} of them are far outside of the environment's bounds, {low[i]:.6g} to {high[i]:.6g}: "
            "they seem to be in other units; convert them to the environment's and save them again"
        )
    note = (
        f"actions of {int(outside.sum()):,} of {len(action):,} transitions ({outside.mean():.1%}) lie outside of the "
        f"environment's bounds, by {excess.max():.6g} at most{CLIPPED}"
    )
    clipped = np.clip(action, action_space.low, action_space.high).astype(action.dtype, copy=False)
    return dataclasses.replace(dataset, rows={**dataset.rows, "action": clipped}, notes=(*dataset.notes, note))
