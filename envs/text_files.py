"""Rows of text data from wherever they are: files, folders, data sets, lists, names on the hub.

`open_rows(source)` gives the rows as they came, with where each stands, so that an error can name file, row and line.
JSON is read with the standard library for that reason; Parquet and data sets by pyarrow and `datasets`.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlkit.errors import UserError, did_you_mean


@dataclass
class Rows:
    """Rows as they came, and where each stands.

    Args:
        files: (first row, name) of each file, for a folder.
        lines: line of each row in its file, where files have lines.
    """

    name: str
    rows: list[Mapping[str, Any]] = field(default_factory=list)
    files: list[tuple[int, str]] = field(default_factory=list)
    lines: list[int] | None = None

    def where(self, i: int) -> str:
        """`row 17 (line 18)`, with the file's name if there are several."""
        named = [name for first, name in self.files if first <= i]
        parts = [named[-1]] if len(self.files) > 1 and named else []
        if self.lines is not None:
            parts.append(f"line {self.lines[i]}")
        return f"row {i}{f' ({chr(32).join(parts)})' if parts else ''}"


def open_rows(source: Any, split: str, limit: int | None) -> Rows:
    """The rows of `source`, at most `limit` of them; see `rlkit.envs.preferences.read` for what it may be.

    Raises:
        UserError: it is not there, cannot be read, or holds something else than objects.
    """
    if isinstance(source, str | Path):
        return _from_name(source, split, limit)
    datasets = sys.modules.get("datasets")  # whoever made a data set has imported it
    if datasets is not None and isinstance(
        source, datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict | datasets.IterableDatasetDict
    ):
        return _from_dataset(source, "the data set", split, limit)
    if isinstance(source, list | tuple):
        given = Rows("the list", list(itertools.islice(source, limit)))
        _check_objects(given)
        return given
    raise UserError(
        f"data: {type(source).__name__} is none of: a file, a folder, a `datasets.Dataset`, a list of dicts, a name"
    )


def _check_objects(given: Rows) -> None:
    for i, row in enumerate(given.rows):
        if not isinstance(row, Mapping):
            raise UserError(
                f"{given.name}: {given.where(i)} is {type_name(row)}, expected an object with named columns"
            )


SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
FOREIGN = re.compile(r"\.(csv|tsv|txt|gz|zip|bz2|xz|zst|tar|arrow|feather|npz?|h5|hdf5|xlsx?|ya?ml|pkl|bin)$", re.I)
"""Suffixes of files, to tell a path from a name on the hub, which may hold dots."""
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def _readable(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and name not in METADATA and not name.startswith(".")


def _from_name(source: str | Path, split: str, limit: int | None) -> Rows:
    text = str(source)
    if not text.strip():
        raise UserError("data: an empty name")
    try:
        path = Path(text).expanduser()
        is_dir, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long for a file name, a NUL, a home that is unknown
        raise UserError(f"data: no file of that name ({len(text)} characters)") from None
    if is_dir:
        return _from_folder(path, split, limit)
    if is_file:
        return _from_files(text, [path], limit)
    if isinstance(source, Path) or _looks_like_path(text):
        if not path.parent.is_dir():
            raise UserError(f"data: no file `{text}`; the folder `{path.parent}` is not there")
        names = [p.name for p in path.parent.iterdir() if p.is_dir() or _readable(p.name)]
        raise UserError(f"data: no file `{text}`{did_you_mean(path.name, names)}")
    return _from_hub(text, split, limit)


def _looks_like_path(text: str) -> bool:
    return (
        text[0] in "./~"
        or "\\" in text
        or text.count("/") > 1
        or text.lower().endswith(SUFFIXES)
        or bool(FOREIGN.search(text))
    )


def _from_folder(path: Path, split: str, limit: int | None) -> Rows:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        import datasets

        try:
            saved = datasets.load_from_disk(str(path))
        except Exception as error:
            raise UserError(f"{path}: not a data set saved by `datasets` ({_short(error)})") from error
        return _from_dataset(saved, str(path), split, limit)
    files = sorted(p for p in path.iterdir() if p.is_file() and _readable(p.name))
    if not files and (path / "data").is_dir():  # where copies of the hub's repositories keep them
        files = sorted(p for p in (path / "data").iterdir() if p.is_file() and _readable(p.name))
    if not files:
        raise UserError(f"data: the folder `{path}` holds no file that ends in {', '.join(SUFFIXES)}")
    own = [p for p in files if p.name.startswith(split)]
    others = sorted({name for p in files for name in SPLITS if p.name.startswith(name)})
    if not own and others:
        raise UserError(f"{path}: no split `{split}`; found files of `{', '.join(others)}`")
    return _from_files(str(path), own or files, limit)


def _from_files(name: str, files: Sequence[Path], limit: int | None) -> Rows:
    given = Rows(name)
    numbers: list[int] = []
    for path in files:
        if limit is not None and len(given.rows) >= limit:
            break
        given.files.append((len(given.rows), path.name))
        for row, line in itertools.islice(_rows_of(path), None if limit is None else limit - len(given.rows)):
            given.rows.append(row)
            numbers.append(line)
    if not any(path.suffix.lower() == ".parquet" for path in files):
        given.lines = numbers
    _check_objects(given)
    return given


def _rows_of(path: Path) -> Iterator[tuple[Any, int]]:
    """(row, line) of a file.

    Raises:
        UserError: an unknown suffix, a damaged file, text that is not JSON or not UTF-8.
    """
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise UserError(f"data: `{path}` does not end in one of {', '.join(SUFFIXES)}")
    try:
        if name.endswith(".parquet"):
            yield from _parquet(path)
            return
        with gzip.open(path) if name.endswith(".gz") else path.open("rb") as file:
            if name.removesuffix(".gz").endswith(".jsonl"):
                yield from _json_lines(file, str(path))
            else:
                yield from _json(_decode(file.read(), str(path), 1), str(path))
    except (OSError, EOFError, zlib.error) as error:
        remedy = "" if isinstance(error, PermissionError) else "; copy or download it again"
        raise UserError(f"{path}: cannot be read ({_short(error)}){remedy}") from error


def _parquet(path: Path) -> Iterator[tuple[Any, int]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield row, 0
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{path}: not a parquet file, or a damaged one ({_short(error)}); copy or download it again, or name it by "
            "what it holds"
        ) from error


def _decode(data: bytes, name: str, line: int) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise UserError(
            f"{name} line {line}: not UTF-8; expected text in UTF-8 (a compressed file's name ends in .gz)"
        ) from None


def _json_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[Any, int]]:
    for number, line in enumerate(lines, 1):
        text = _decode(line, name, number)
        if text.strip():
            value, end = _value(text, _skip(text, 0), name, number)
            if _skip(text, end) != len(text):
                raise UserError(f"{name} line {number}: more than one value in the line")
            yield value, number


def _json(text: str, name: str) -> Iterator[tuple[Any, int]]:
    """Rows of a list, of the list at "data", or of objects one after the other, which many .json files hold."""
    start = _skip(text, 0)
    if start == len(text):
        return
    if text.startswith("{", start):
        first, end = _value(text, start, name)
        if _skip(text, end) < len(text) or not isinstance(first.get("data"), list):
            yield from _values(text, start, name, "")
            return
        yield from _values(text, _member(text, start, "data", name) + 1, name, "]")
        return
    if not text.startswith("[", start):
        raise UserError(f"{name}: expected a list of objects, as in [{{...}}, {{...}}]; found other text")
    yield from _values(text, start + 1, name, "]", whole=True)


def _values(text: str, at: int, name: str, close: str, whole: bool = False) -> Iterator[tuple[Any, int]]:
    """Values up to `close`, with commas between, or up to the end of the text, without.

    Args:
        whole: nothing may follow `close`.
    """
    line, counted = 1, 0
    at = _skip(text, at)
    while at < len(text) and not (close and text.startswith(close, at)):
        line, counted = line + text.count("\n", counted, at), at
        value, at = _value(text, at, name)
        yield value, line
        at = _skip(text, at)
        if close and text.startswith(",", at):
            at = _skip(text, at + 1)
        elif close and at < len(text) and not text.startswith(close, at):
            raise UserError(f"{name} line {line + text.count(chr(10), counted, at)}: not JSON (expected `,` or `]`)")
    if close and at >= len(text):
        raise UserError(f"{name}: the file ends within its list; copy or download it again")
    if close and whole and _skip(text, at + 1) < len(text):
        raise UserError(f"{name}: not JSON (something follows the list)")


def _member(text: str, at: int, wanted: str, name: str) -> int:
    """Where the value of a key starts in an object that is known to be JSON."""
    at = _skip(text, at + 1)
    while True:
        key, at = _value(text, at, name)
        at = _skip(text, _skip(text, at) + 1)
        if key == wanted:
            return at
        _, at = _value(text, at, name)
        at = _skip(text, _skip(text, at) + 1)


DECODER = json.JSONDecoder()
BLANK = re.compile(r"[ \t\r\n]*")


def _skip(text: str, at: int) -> int:
    found = BLANK.match(text, at)
    return found.end() if found else at


def _value(text: str, at: int, name: str, line: int | None = None) -> tuple[Any, int]:
    """The JSON value at a position, and where it ends."""
    try:
        return DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        expected = "JSON" if line is None else "one JSON object a line"
        raise UserError(
            f"{name} line {error.lineno if line is None else line}: not JSON ({error.msg}); expected {expected}: mend "
            "the line, or leave it out"
        ) from None
    except (RecursionError, ValueError) as error:
        at_line = text.count("\n", 0, at) + 1 if line is None else line
        raise UserError(f"{name} line {at_line}: cannot be read ({type(error).__name__})") from None


def _from_dataset(data: Any, name: str, split: str, limit: int | None) -> Rows:
    if hasattr(data, "keys"):  # a dict of splits
        if split not in data:
            raise UserError(f"{name}: no split `{split}`{did_you_mean(split, [str(key) for key in data])}")
        data = data[split]
    rows = data.with_format(None)
    return Rows(name, [dict(row) for row in itertools.islice(rows, limit)])


def _from_hub(name: str, split: str, limit: int | None) -> Rows:
    """A data set by its name on the Hugging Face hub (or any other that `datasets.load_dataset` knows)."""
    import datasets

    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:
        near = did_you_mean(name, [p.name for p in Path().iterdir() if p.is_dir() or _readable(p.name)])
        raise UserError(
            f"data: `{name}` is neither a file nor a folder here, and not a data set that can be loaded "
            f"({_short(error)}){near if 'did you mean' in near else ''}"
        ) from error
    return _from_dataset(data, name, split, limit)


def _short(error: BaseException) -> str:
    """Type and first line of an error of a library; these name files and settings."""
    first = str(error).strip().split("\n")[0][:200]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def type_name(value: Any) -> str:
    """What a value is, in JSON's words."""
    names = {str: "text", dict: "an object", list: "a list", tuple: "a list", bool: "a boolean", type(None): "null"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
