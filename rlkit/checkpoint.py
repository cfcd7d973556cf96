"""Checkpoints: folders of safetensors + JSON with a hashed manifest; a kill or a full disk loses nothing.

Nothing here writes or reads a pickle. A folder holds one or two files a part, any text files, and `manifest.json`:

| file | content |
|---|---|
| `policy.safetensors` | the tensors and arrays of part `policy`, under dotted names; absent when there are none |
| `policy.json` | the rest of its state, with references to the tensors (see `encode`) |
| `config.yaml` | a text part, as it is |
| `manifest.json` | size and SHA-256 of each file, free metadata (`about`), and a hash of the manifest itself |

**Several processes.** The main one writes the parts above. What others have for themselves is in parts named after
their rank, `buffer-1` and `state-1`, each written by its owner; see `rlkit.trainer`.

**Writing.** All files go to a hidden sibling folder and are fsynced, the manifest last; then the folder is renamed. A
folder of the same name is moved aside first (`.old-NAME-1`) and deleted afterwards; between the two renames, and only
there, the old one is found under that name by `newest` and `resolve`.

**Reading.** A folder may come from anyone: names in the manifest are plain file names, only regular files are opened,
sizes are compared before anything is read, hashes before anything is parsed, and whatever is malformed ends in a
`CheckpointError` that names the file. The hashes find damage; they do not say who wrote the folder.

Equal states give equal bytes: `content_hash` is equal for two runs exactly when everything they saved is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors import SafetensorError, safe_open

from rlkit.errors import CheckpointError, UserError
from rlkit.processes import Processes

MANIFEST = "manifest.json"
FORMAT = "rlkit checkpoint"
VERSION = 1

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,127}")
_STEP = re.compile(r"step-(\d+)")
_OLD_STEP = re.compile(r"\.old-(step-(\d+))-(\d+)")
_TEMP = re.compile(r"\.tmp-.*-(\d+)")
_PICKLED = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".zip")
_MANIFEST_LIMIT = 16 << 20  # bytes: a manifest is not covered by a declared size
_DEPTH = 100  # levels of nesting in a state


# --- state <-> tensors and a JSON skeleton -------------------------------------------------------------------------

# The names that the safetensors format gives to types; complex128 is stored as pairs of float64.
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def encode(state: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Split `state` into named tensors and a skeleton of plain JSON values; `decode` puts them together, bit for bit.

    `state` nests mappings, lists and tuples of tensors (dense, any dtype of safetensors or complex128, any device),
    numpy arrays and scalars, None, bool, int of any size, float (NaN bits included) and str. Mappings keep their
    order and may have keys that are not strings; they come back as `dict`, tensors on the CPU. The returned tensors
    share memory with `state`.

    Raises:
        TypeError: for anything else, naming where it is.
    """
    tensors: dict[str, torch.Tensor] = {}
    return tensors, _encode(state, (), tensors)


def _encode(value: Any, path: tuple[str, ...], tensors: dict[str, torch.Tensor]) -> Any:
    if len(path) > _DEPTH:
        raise TypeError(f"{'.'.join(path[:4])}…: state is nested deeper than {_DEPTH} levels, or contains itself")
    if isinstance(value, Mapping):
        return _encode_mapping(value, path, tensors)
    if isinstance(value, (list, tuple)):
        items = [_encode(item, (*path, str(i)), tensors) for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if type(value) in (torch.Tensor, torch.nn.Parameter):  # exact: a sharded or lazy subclass holds other bytes
        return _reference("$tensor", value, path, tensors)
    if type(value) in (np.ndarray, np.memmap):
        return _encode_array(value, path, tensors)
    return _encode_scalar(value, path)


def _encode_scalar(value: Any, path: tuple[str, ...]) -> Any:
    """Exact types only: a subclass (an enum, say) would come back as something else."""
    if value is None or type(value) is bool:
        return value
    if type(value) is int:  # JSON readers and Python's own limit on digits both end somewhere; hexadecimal does not
        return value if -(2**63) <= value < 2**64 else {"$int": hex(value)}
    if type(value) is float:  # JSON has no NaN and no infinity
        return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
    if type(value) is str:  # lone surrogates (undecodable file names) do not survive JSON
        return value if _is_unicode(value) else {"$str": value.encode("utf-8", "surrogatepass").hex()}
    if isinstance(value, np.generic) and value.dtype.kind in "biufcSUmM":
        return {"$scalar": value.dtype.str, "hex": value.tobytes().hex()}
    raise TypeError(f"{_place(path)}: cannot save a {type(value).__module__}.{type(value).__qualname__}")


def _encode_mapping(value: Mapping[Any, Any], path: tuple[str, ...], tensors: dict[str, torch.Tensor]) -> Any:
    items = [(key, _encode(item, (*path, str(key)), tensors)) for key, item in value.items()]
    if all(type(key) is str and not key.startswith("$") and _is_unicode(key) for key, _ in items):
        return dict(items)
    return {"$dict": [[_encode_key(key, path), item] for key, item in items]}


def _encode_key(key: Any, path: tuple[str, ...]) -> Any:
    if isinstance(key, tuple):
        return {"$tuple": [_encode_key(item, path) for item in key]}
    return _encode_scalar(key, (*path, "key"))


def _encode_array(value: np.ndarray, path: tuple[str, ...], tensors: dict[str, torch.Tensor]) -> Any:
    if value.dtype.kind not in "biufcSUmM":
        raise TypeError(f"{_place(path)}: cannot save a numpy array of dtype {value.dtype}")
    array = np.array(value, order="C", copy=None, subok=False)  # keeps 0-dim, which ascontiguousarray does not
    if not array.flags.writeable:  # torch has no read-only tensors
        array = array.copy()
    try:
        return _reference("$array", torch.from_numpy(array), path, tensors)
    except (TypeError, ValueError):  # text, times, foreign byte order, long double: their bytes
        raw = torch.from_numpy(np.frombuffer(bytearray(array.tobytes()), np.uint8))
        return {**_reference("$array", raw, path, tensors), "dtype": array.dtype.str, "shape": list(array.shape)}


def _reference(tag: str, value: torch.Tensor, path: tuple[str, ...], tensors: dict[str, torch.Tensor]) -> Any:
    """Register `value` under a free name made of `path`; -> the skeleton's node."""
    tensor, node = value.detach(), {}
    known = tensor.dtype in _CODES or tensor.dtype == torch.complex128
    if not known or tensor.layout != torch.strided or tensor.device.type == "meta":
        raise TypeError(f"{_place(path)}: cannot save a {tensor.layout} {tensor.dtype} tensor on {tensor.device}")
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.dtype == torch.complex128:
        tensor, node = torch.view_as_real(tensor), {"complex": True}
    name = ".".join(path).encode("utf-8", "backslashreplace").decode() or "value"
    while name in tensors or name == "__metadata__":  # {"a.b": …, "a": {"b": …}}, or the format's own key
        name += "_"
    tensors[name] = tensor
    return {tag: name, **node}


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def _place(path: tuple[str, ...]) -> str:
    return f"state `{'.'.join(path)}`" if path else "state"


def decode(tensors: Mapping[str, torch.Tensor], skeleton: Any) -> Any:
    """The state that `encode` split; every tensor is used once.

    Raises:
        CheckpointError: the skeleton is malformed or names a tensor that is not there.
    """
    left = dict(tensors)
    try:
        return _decode(skeleton, left)
    except KeyError as error:
        raise CheckpointError(f"malformed state: it refers to {error}, which is not there") from error
    except (ValueError, TypeError, AttributeError, RuntimeError, OverflowError, struct.error) as error:
        raise CheckpointError(f"malformed state: {type(error).__name__}: {error}") from error


def _decode(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    tag = next(iter(node), "")
    if tag.startswith("$"):
        return _DECODERS[tag](node, tensors)
    return {key: _decode(item, tensors) for key, item in node.items()}


def _decode_tensor(tag: str, node: dict[str, Any], tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    tensor = tensors.pop(node[tag])
    return torch.view_as_complex(tensor) if node.get("complex") else tensor


def _decode_array(node: dict[str, Any], tensors: dict[str, torch.Tensor]) -> np.ndarray:
    array = _decode_tensor("$array", node, tensors).numpy()
    return array.view(_dtype(node["dtype"])).reshape(node["shape"]) if "dtype" in node else array


def _decode_numpy_scalar(node: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    dtype, raw = _dtype(node["$scalar"]), bytes.fromhex(node["hex"])
    return np.frombuffer(raw, dtype)[0] if dtype.itemsize else dtype.type()  # the empty text is a `<U0`


def _dtype(text: str) -> np.dtype:
    """A numpy type of fixed size: never objects, never fields."""
    if not re.fullmatch(r"[<>|][biufcSUmM]\d{1,9}(\[\w+\])?", text):
        raise ValueError(f"numpy dtype {text!r}")
    return np.dtype(text)


_DECODERS: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]] = {
    "$tensor": lambda node, tensors: _decode_tensor("$tensor", node, tensors),
    "$array": _decode_array,
    "$scalar": _decode_numpy_scalar,
    "$tuple": lambda node, tensors: tuple(_decode(item, tensors) for item in node["$tuple"]),
    "$dict": lambda node, tensors: {_decode(key, tensors): _decode(item, tensors) for key, item in node["$dict"]},
    "$int": lambda node, _: int(node["$int"], 16),
    "$float": lambda node, _: struct.unpack(">d", bytes.fromhex(node["$float"]))[0],
    "$str": lambda node, _: bytes.fromhex(node["$str"]).decode("utf-8", "surrogatepass"),
}


# --- writing -------------------------------------------------------------------------------------------------------


def save(
    folder: str | Path, parts: Mapping[str, Any], *, about: Mapping[str, Any], processes: Processes | None = None
) -> Path:
    """Write `parts` to `folder` so that it either appears complete or not at all; a checkpoint there is replaced.

    Args:
        folder: the folder to make; its parents are made too.
        parts: name -> state (see `encode`), or file name with a suffix -> text that is written as it is.
        about: JSON metadata (step, versions, time); read back by `load`, but not part of `content_hash`.
        processes: who write it together, each the parts that it gives, under names of their own; the main one does the
            rest. They have to see the same folder. Collective.

    Raises:
        TypeError, ValueError: a state or name that cannot be saved; nothing has been touched.
        UserError: `folder` exists and holds something else than a checkpoint.
        OSError: the disk is full or failed; what was there before is intact and the temporary folder is gone.
    """
    group = Processes() if processes is None else processes
    files: list[tuple[str, str, Iterable[Any]]] = []
    group.together(lambda: files.extend(_contents(parts)))
    about = json.loads(json.dumps(about))  # as it will be read: string keys, lists
    place = Path(folder).resolve()
    temp = group.from_main(lambda: _begin(place))
    try:
        written = group.together(lambda: {n: {**_write(temp / n, chunks), "part": part} for n, part, chunks in files})
        group.from_main(lambda: _finish(temp, place, {n: e for entries in written for n, e in entries.items()}, about))
    except BaseException:
        if group.is_main:
            shutil.rmtree(temp, ignore_errors=True)
        raise
    return Path(folder)


def _begin(place: Path) -> Path:
    """An empty temporary folder beside `place`."""
    _refuse_to_replace_foreign(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    temp = place.with_name(f".tmp-{place.name}-{os.getpid()}")
    if temp.exists():  # of a killed process with the same number
        shutil.rmtree(temp)
    temp.mkdir()
    return temp


def _finish(temp: Path, place: Path, entries: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """The manifest of the files in `temp`, which then get their place."""
    manifest = _manifest_bytes({"files": entries, "about": about})
    if len(manifest) > _MANIFEST_LIMIT:
        raise ValueError(f"`about` is too large for a manifest: {len(manifest):,} bytes")
    _write(temp / MANIFEST, [manifest])
    _sync_folder(temp)
    _commit(temp, place)


def _contents(parts: Mapping[str, Any]) -> list[tuple[str, str, Iterable[Any]]]:
    """(file name, part, chunks of bytes) of each file; all states are encoded before the first byte is written."""
    files: list[tuple[str, str, Iterable[Any]]] = []
    for part, value in parts.items():
        if isinstance(value, str) and Path(part).suffix:
            files.append((part, part, [value.encode()]))
            continue
        if Path(part).suffix:
            raise ValueError(f"part {part!r}: a name with a suffix is for text, got a {type(value).__name__}")
        try:
            tensors, skeleton = encode(value)
        except TypeError as error:
            raise TypeError(f"part {part!r}: {error}") from None
        files.append((f"{part}.json", part, [json.dumps(skeleton, allow_nan=False).encode()]))
        if tensors:
            files.append((f"{part}.safetensors", part, _safetensors(tensors)))
    names = [name for name, _, _ in files]
    for name in names:
        if not _NAME.fullmatch(name) or name == MANIFEST or names.count(name) > 1 or name.endswith(_PICKLED):
            raise ValueError(f"{name!r} cannot be the name of a file in a checkpoint, or two parts would share it")
    return files


def _safetensors(tensors: Mapping[str, torch.Tensor]) -> Iterator[Any]:
    """The bytes of a safetensors file, tensor by tensor.

    Written here (and read by the safetensors package) because this way the bytes are hashed while they are written,
    a device's tensors are copied one at a time, memory shared by two names is no error, and a full disk is an
    `OSError`.
    """
    # Widest types first: every tensor starts at a multiple of its own element's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        tensor = tensors[name].cpu().contiguous()
        flat = tensor.as_strided((tensor.numel(),), (1,))  # `view` minds the stride even of a single element
        yield flat.view(torch.uint8).numpy().data


def _write(path: Path, chunks: Iterable[Any]) -> dict[str, Any]:
    """Write a new file and wait until the disk has it; -> `bytes` and `sha256`."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _manifest_bytes(content: Mapping[str, Any]) -> bytes:
    """The only bytes that a manifest of this content may have, so that a changed bit anywhere in it shows."""
    document = {"format": FORMAT, "version": VERSION, "about": content["about"], "files": content["files"]}
    check = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    return json.dumps({**document, "check": check}, sort_keys=True, indent=1).encode() + b"\n"


def _sync_folder(folder: Path) -> None:
    """Make new names in `folder` durable, where the system can."""
    if os.name == "nt":  # no handles of folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network and FUSE file systems
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(handle)


def _commit(temp: Path, place: Path) -> None:
    """Give `temp` its name. At every moment `place` or the newest of `_set_aside(place)` is complete."""
    old = None
    if place.exists():
        taken = [int(p.name.rpartition("-")[2]) for p in _set_aside(place)]
        old = place.with_name(f".old-{place.name}-{max(taken, default=0) + 1}")
        place.replace(old)
    try:
        temp.replace(place)
    except OSError:
        if old is not None:
            old.replace(place)
        raise
    _sync_folder(place.parent)
    for stale in _set_aside(place):
        shutil.rmtree(stale, ignore_errors=True)


def _set_aside(place: Path) -> list[Path]:
    """What was moved aside to replace `place` and not deleted yet, latest first."""
    pattern = re.compile(rf"\.old-{re.escape(place.name)}-(\d+)")
    found = [(int(m[1]), p) for p in place.parent.iterdir() if (m := pattern.fullmatch(p.name))]
    return [p for _, p in sorted(found, reverse=True)]


def _refuse_to_replace_foreign(place: Path) -> None:
    """Replacing deletes: never a folder that holds anything which a checkpoint did not bring."""
    if not place.exists() or (place.parent.name == "checkpoints" and _STEP.fullmatch(place.name)):
        return
    if not place.is_dir():
        raise UserError(f"cannot save to {place}: a file of that name exists")
    present = {p.name for p in place.iterdir()}
    if not present:
        return
    try:
        foreign = present - {MANIFEST, *_read_manifest(place)["files"]}
    except CheckpointError:
        raise UserError(f"cannot save to {place}: it exists and is not a checkpoint; choose another folder") from None
    if foreign:
        raise UserError(
            f"cannot save to {place}: besides a checkpoint it holds {', '.join(sorted(foreign)[:5])}, "
            "which would be deleted; choose another folder"
        )


# --- reading -------------------------------------------------------------------------------------------------------


def load(folder: str | Path, only: Collection[str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """-> (parts, about) as given to `save`, or only the parts named in `only`; checks each file that it reads.

    Raises:
        CheckpointError: no checkpoint, a damaged one, one of a newer version, or a pickle; names the file.
    """
    place = Path(folder)
    _refuse_pickle(place)
    manifest = _read_manifest(place)
    files: dict[str, dict[str, Any]] = manifest["files"]
    known = {entry["part"] for entry in files.values()}
    wanted = known if only is None else set(only)
    if missing := sorted(wanted - known):
        raise CheckpointError(f"{place} has no part {missing[0]!r}; it has: {', '.join(sorted(known))}")
    for name, entry in files.items():
        if entry["part"] in wanted and (reason := _damage(place, name, entry)):
            raise CheckpointError(f"checkpoint {place} incomplete ({reason})")
    return {part: _read_part(place, part, files) for part in sorted(wanted)}, manifest["about"]


def parts(folder: str | Path) -> set[str]:
    """The parts of a checkpoint, by its manifest.

    Raises:
        CheckpointError: as `load`.
    """
    place = Path(folder)
    _refuse_pickle(place)
    return {entry["part"] for entry in _read_manifest(place)["files"].values()}


def _read_part(place: Path, part: str, files: Mapping[str, Any]) -> Any:
    if part in files:
        try:
            return (place / part).read_bytes().decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{place / part}: not UTF-8 text ({error})") from error
    source = place / f"{part}.json"
    if source.name not in files:
        raise CheckpointError(f"{place / MANIFEST}: part {part!r} lists no {source.name}")
    try:
        skeleton = json.loads(source.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: not JSON ({error})") from error
    tensors = _read_tensors(source.with_suffix(".safetensors")) if f"{part}.safetensors" in files else {}
    try:
        return decode(tensors, skeleton)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error.__cause__


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            # A copy: these tensors are views of the file, which may be replaced or truncated later.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from error


def _read_manifest(place: Path) -> dict[str, Any]:
    """The manifest, checked; CheckpointError with the reason otherwise."""
    path = place / MANIFEST
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MANIFEST_LIMIT:
            raise CheckpointError(f"{path} is not a regular file, or larger than {_MANIFEST_LIMIT >> 20} MiB")
        raw = path.read_bytes()
        manifest = json.loads(raw)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a manifest of rlkit")
    version = manifest.get("version")
    if type(version) is int and version > VERSION:
        raise CheckpointError(f"{path}: format version {version} is newer than this rlkit reads ({VERSION}); update it")
    files, about = manifest.get("files"), manifest.get("about")
    if not isinstance(files, dict) or not isinstance(about, dict):
        raise CheckpointError(f"{path}: lists no files")
    for name, entry in files.items():
        _check_entry(path, name, entry)
    try:
        intact = raw == _manifest_bytes(manifest)
    except RecursionError:
        intact = False
    if not intact:
        raise CheckpointError(f"hash mismatch in {path}")
    return manifest


def _check_entry(path: Path, name: str, entry: Any) -> None:
    if not _NAME.fullmatch(name) or name == MANIFEST:  # no separator, no "..", no drive
        raise CheckpointError(f"{path}: refused: {name!r} is not a plain file name")
    if name.endswith(_PICKLED):
        raise CheckpointError(
            f"{path}: refused: {name!r}: a pickle can run code; only folders written by `save` are read"
        )
    if (
        not isinstance(entry, dict)
        or type(entry.get("bytes")) is not int
        or not all(isinstance(entry.get(key), str) for key in ("sha256", "part"))
        or name not in (entry["part"], f"{entry['part']}.json", f"{entry['part']}.safetensors")
    ):
        raise CheckpointError(f"{path}: malformed entry {name!r}")


def _damage(place: Path, name: str, entry: Mapping[str, Any]) -> str | None:
    """Why the file is not the one of the manifest; None if it is."""
    path = place / name
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):  # a link could lead out of the folder, a pipe would hang
            return f"{name} is not a regular file"
        if status.st_size != entry["bytes"]:
            return f"hash mismatch in {name}: {status.st_size} bytes instead of {entry['bytes']}"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error}"
    return None if digest == entry["sha256"] else f"hash mismatch in {name}"


def _refuse_pickle(path: Path) -> None:
    if not path.is_file():
        return
    with path.open("rb") as file:
        head = file.read(2)
    if path.suffix.lower() in _PICKLED or head == b"PK" or head[:1] == b"\x80":
        zipped = f"; of Stable-Baselines3's SAC `rlkit convert {path}` makes such a folder" if head == b"PK" else ""
        raise CheckpointError(
            f"refused: {path} looks like a pickle, and a pickle can run code; only folders written by `save` are "
            f"read{zipped}"
        )
    raise CheckpointError(f"{path} is a file; give the folder that holds {MANIFEST}")


def verify(folder: str | Path) -> str | None:
    """None if all files are there and as written, else the reason: `hash mismatch in policy.safetensors`."""
    place = Path(folder)
    try:
        files = _read_manifest(place)["files"]
    except CheckpointError as error:
        return str(error).replace(f"{place}{os.sep}", "")
    return next((reason for name, entry in files.items() if (reason := _damage(place, name, entry))), None)


def content_hash(folder: str | Path) -> str:
    """One SHA-256 over the names and hashes of all files (`about` left out), as the manifest has them; see `verify`."""
    files = _read_manifest(Path(folder))["files"]
    lines = "".join(f"{files[name]['sha256']}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def tensors_hash(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """32 hexadecimal digits: equal exactly when names, shapes, types and values of all tensors are, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        array = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- the checkpoints of a run --------------------------------------------------------------------------------------


def checkpoint_folder(run: str | Path, step: int) -> Path:
    """`run/checkpoints/step-0000010000`."""
    return Path(run) / "checkpoints" / f"step-{step:010d}"


def _candidates(run: Path) -> list[tuple[int, Path]]:
    """(step, folder), newest first; of one step first its own folder, then those that were moved aside."""
    found: list[tuple[int, int, Path]] = []
    parent = run / "checkpoints"
    for path in parent.iterdir() if parent.is_dir() else ():
        if match := _STEP.fullmatch(path.name):
            found.append((int(match[1]), 1 << 62, path))
        elif match := _OLD_STEP.fullmatch(path.name):
            found.append((int(match[2]), int(match[3]), path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def has_checkpoints(run: str | Path) -> bool:
    """Whether the run has written a checkpoint, complete or not; temporary folders of a first one do not count."""
    return bool(_candidates(Path(run)))


def newest(run: str | Path) -> tuple[Path, list[str]]:
    """-> (newest complete checkpoint of a run, a message for each newer one that was skipped).

    Raises:
        CheckpointError: there is none.
    """
    skipped: list[str] = []
    for _, folder in _candidates(Path(run)):
        reason = verify(folder)
        if reason is None:
            messages = [f"{text}; using {folder.name}" for text in skipped]
            if (match := _OLD_STEP.fullmatch(folder.name)) and not folder.with_name(match[1]).exists():
                messages.append(f"checkpoint {match[1]} was being replaced; using {folder.name}, its content before")
            return folder, messages
        skipped.append(f"checkpoint {folder.name} incomplete ({reason})")
    raise CheckpointError(f"no complete checkpoint in {Path(run) / 'checkpoints'}" + "".join(f"; {s}" for s in skipped))


def prune(run: str | Path, keep: int) -> str | None:
    """Delete what is older than the newest `keep` checkpoints (all are kept if `keep` < 1), and what kills left behind.

    Complete means here: the manifest is intact and all sizes agree. Hashes are not computed.

    Returns:
        a warning if something could not be deleted; it never raises `OSError`.
    """
    try:
        kept: set[int] = set()
        doomed: list[Path] = []
        for step, folder in _candidates(Path(run)):
            if step in kept or (keep > 0 and len(kept) >= keep):  # so never before a complete one was seen
                doomed.append(folder)
            elif _looks_complete(folder):
                kept.add(step)
        doomed += abandoned(Path(run) / "checkpoints")
    except OSError as error:
        return f"could not look for old checkpoints: {error}"
    failures = []
    for folder in reversed(doomed):
        try:
            shutil.rmtree(folder)
        except OSError as error:
            failures.append(f"could not delete {folder}: {error}")
    return "; ".join(failures) or None


def abandoned(parent: Path, name: str = "*") -> list[Path]:
    """Temporary folders of checkpoints called `name` (a glob) in `parent`, which processes that are gone left there.

    Those of this process count, too: it is not in the middle of writing one.
    """
    found = [(path, _TEMP.fullmatch(path.name)) for path in sorted(parent.glob(f".tmp-{name}-*"))]
    return [p for p, m in found if m and (int(m[1]) == os.getpid() or not psutil.pid_exists(int(m[1])))]


def _looks_complete(folder: Path) -> bool:
    try:
        files = _read_manifest(folder)["files"]
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (CheckpointError, FileNotFoundError):
        return False


def resolve(path: str | Path) -> tuple[Path, Path | None, list[str]]:
    """Find the checkpoint that `path` means: a run folder, its `checkpoints`, one of those, or a saved folder.

    Returns:
        (checkpoint, run folder or None, messages to show). The newest complete one of a run; one that is named
        itself is not verified here (`load` does it).

    Raises:
        UserError: nothing is there, or a run that has written no checkpoint yet (see `has_checkpoints`).
        CheckpointError: a pickle, or a run of which no checkpoint is complete.
    """
    place = Path(path)
    if place.is_file() and place.name == MANIFEST:
        place = place.parent
    _refuse_pickle(place)
    if not place.exists() and place.parent.is_dir() and (aside := _set_aside(place.absolute())):
        note = f"{place} was being replaced; using {aside[0].name}, its content before"
        return place.with_name(aside[0].name), _run_of(place), [note]
    if not place.is_dir():
        raise UserError(f"{place}: no such folder; expected a run folder, a checkpoint or a saved folder")
    if (place / MANIFEST).exists() or _run_of(place):
        return place, _run_of(place), []
    run = place.resolve().parent if place.resolve().name == "checkpoints" else place
    if has_checkpoints(run):
        folder, messages = newest(run)
        return folder, run, messages
    if (run / "config.yaml").is_file():
        raise UserError(
            f"run {run} has no checkpoint yet: it ended before its first one; `rlkit resume` starts it afresh"
        )
    raise UserError(
        f"{place}: nothing to load; looked for {MANIFEST} (a checkpoint or saved folder), "
        "checkpoints/step-* and config.yaml (a run folder)"
    )


def _run_of(place: Path) -> Path | None:
    """The run folder, if `place` is one of its checkpoints."""
    full = place.resolve()
    return full.parent.parent if full.parent.name == "checkpoints" and _STEP.fullmatch(full.name) else None
