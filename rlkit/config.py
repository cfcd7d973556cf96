"""Configuration: one frozen dataclass per trainer, read from Python keywords, a YAML file or the command line.

The three sources share one strict reader, so that they give the same values and the same errors: unknown keys are
refused with the nearest valid name, values out of range with the range. Ranges stand in the annotations
(`Annotated[float, Interval(ge=0, le=1)]`, checked by pydantic), documentation in the string under each field, which is
also the text of `--help`. Numbers are finite. A file is data only: YAML's safe subset, no code, no object tags.

Precedence: default < preset < file < command line.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeVar

import annotated_types as limits
import numpy as np
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from rlkit.errors import UserError, did_you_mean

Count = Annotated[int, limits.Ge(1)]
Whole = Annotated[int, limits.Ge(0)]
Positive = Annotated[float, limits.Gt(0)]
NonNegative = Annotated[float, limits.Ge(0)]
Fraction = Annotated[float, limits.Interval(ge=0, le=1)]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strict:
    """Base of all configuration dataclasses: unknown keys are errors."""

    __pydantic_config__ = ConfigDict(
        extra="forbid", arbitrary_types_allowed=False, allow_inf_nan=False, revalidate_instances="always"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Strict):
    """Run options, the same for every trainer."""

    out: str | None = None
    """Run folder. The command line makes a new one under `runs/` by default; in Python, None writes no files."""
    seed: Whole = 0
    """Seed of every random stream of the run."""
    device: str = "auto"
    """`auto` (CUDA if present, else CPU), `cpu`, `cuda` or `cuda:N`."""
    precision: Literal["float32", "bf16"] = "float32"
    """Arithmetic of the forward and backward passes; weights and optimiser stay in float32."""
    threads: Count | None = None
    """CPU threads of PyTorch; None leaves PyTorch's choice. Exact resumption needs the same number."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the update with torch.compile. `auto` compiles on CUDA, and on a CPU where the first `learn` asks for so
    many updates that the time of compiling is won back. Several processes update eagerly."""
    matmul: Literal["auto", "blas", "onednn"] = "auto"
    """Library of float32 matrix products on a CPU: PyTorch's `blas`, or `onednn`, which `auto` takes on AMD processors
    with AVX-512. Exact resumption needs the same one."""
    checkpoint_every: Count = 10_000
    """Steps between checkpoints; a run always ends with one."""
    keep_checkpoints: Count = 2
    """How many of the newest checkpoints to keep."""
    log_every: Count = 1_000
    """Steps between records of metrics."""
    eval_every: Count = 5_000
    """Steps between evaluations; there is one before training and one after."""
    eval_episodes: Whole = 10
    """Episodes of an evaluation; 0 turns evaluation off."""
    tensorboard: bool = True
    """Write TensorBoard files to `RUN/tb`, beside the JSONL and CSV files that are always written."""
    wandb: bool | str = False
    """Report to Weights & Biases: true, or the name of the project."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One leaf of a configuration: its dotted path, annotation, default and documentation."""

    path: str
    annotation: Any
    default: Any
    doc: str


def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass and of its bases (read from the source)."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # no source: a frozen application or an interactive session
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                docs[field.target.id] = " ".join(str(text.value.value).split())
    return docs


def options(cls: type, prefix: str = "") -> Iterator[Option]:
    """Every leaf of a configuration dataclass, nested sections as dotted paths."""
    docs, hints = field_docs(cls), typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        annotation = hints[field.name]
        if dataclasses.is_dataclass(annotation):
            yield from options(typing.cast(type, annotation), f"{prefix}{field.name}.")
            continue
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield Option(prefix + field.name, annotation, default, docs.get(field.name, ""))


def _members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the annotation itself."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _types(annotation: Any) -> list[Any]:
    """The alternatives without their ranges: `Count | None` -> [int, NoneType]."""
    if typing.get_origin(annotation) is Annotated:
        return _types(typing.get_args(annotation)[0])
    members = _members(annotation)
    return [t for m in members for t in _types(m)] if len(members) > 1 else list(members)


def _is_mapping(kind: Any) -> bool:
    return kind is dict or typing.get_origin(kind) is dict


def _range(metadata: Sequence[Any]) -> str:
    low: str | None = None
    high: str | None = None
    for m in metadata:
        if getattr(m, "ge", None) is not None:
            low = f">= {m.ge}"
        if getattr(m, "gt", None) is not None:
            low = f"> {m.gt}"
        if getattr(m, "le", None) is not None:
            high = f"<= {m.le}"
        if getattr(m, "lt", None) is not None:
            high = f"< {m.lt}"
    return " and ".join(bound for bound in (low, high) if bound)


def allowed(annotation: Any) -> str:
    """What a field accepts, in words: `a number >= 0 and <= 1`, `'auto' or a number >= 0`."""
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", types.NoneType: "none"}
    words = []
    for member in _members(annotation):
        metadata: Sequence[Any] = ()
        if typing.get_origin(member) is Annotated:
            member, *metadata = typing.get_args(member)
        origin = typing.get_origin(member)
        if origin is Literal:
            words += [repr(v) for v in typing.get_args(member)]
        elif origin in (tuple, list):
            items = typing.get_args(member)
            size = f" of {len(items)}" if origin is tuple and items[-1] is not Ellipsis else ""
            words.append(f"a list{size} (each {allowed(items[0])})")
        elif _is_mapping(member):
            keys = [str(k) for arg in typing.get_args(member)[:1] for k in typing.get_args(arg)]
            words.append(f"a mapping with {', '.join(keys)}" if keys else "a mapping")
        elif isinstance(member, type) and dataclasses.is_dataclass(member):
            words.append(f"a section with {', '.join(f.name for f in dataclasses.fields(member))}")
        else:
            text = " ".join(filter(None, [names.get(member, str(member)), _range(metadata)]))
            words += [f"a text of the form {p}" for m in metadata if (p := getattr(m, "pattern", None))] or [text]
    return " or ".join(dict.fromkeys(words))


def validate(cls: type[T], values: Mapping[str, Any], source: str = "") -> T:
    """`cls(**values)` with types coerced and ranges checked; what it returns can be written to a file.

    Raises:
        UserError: naming every wrong field with its path, its value and what is allowed; `source` (a file) leads.
    """
    try:
        config = TypeAdapter(cls).validate_python(_words(cls, values))
        to_dict(config)
        return config
    except ValidationError as error:
        raise UserError(_lead(source) + "\n".join(_explain(cls, values, error))) from None
    except UserError as error:  # of to_dict
        raise UserError(f"{_lead(source)}{error}") from None
    except RecursionError:
        raise UserError(f"{_lead(source)}the configuration is nested too deeply, or contains itself") from None


_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _words(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with what pydantic is too lenient or too strict about: `none` and `no` are None and false wherever these
    are accepted, true and false mean `on` and `off` where those are the choices, and otherwise they are no numbers; a
    path is its text.
    """
    prepared = dict(values)
    hints = typing.get_type_hints(cls, include_extras=True)
    for key, value in values.items():
        kinds = _types(hints.get(key, Any))
        if isinstance(value, Mapping) and dataclasses.is_dataclass(kinds[0]):
            prepared[key] = _words(kinds[0], value)
        elif isinstance(value, PurePath) and str in kinds:
            prepared[key] = str(value)
        elif isinstance(value, str):
            if types.NoneType in kinds and value.lower() in ("none", "null"):
                prepared[key] = None
            elif bool in kinds:
                prepared[key] = _TRUTH.get(value.lower(), value)
        elif isinstance(value, bool) and bool not in kinds and Any not in kinds:
            word = "on" if value else "off"
            named = any(word in typing.get_args(k) for k in kinds if typing.get_origin(k) is Literal)
            prepared[key] = word if named else ...  # the ellipsis is refused by every type
    return prepared


def _explain(cls: Any, values: Mapping[str, Any], error: ValidationError) -> list[str]:
    """A line for each wrong field."""
    messages: dict[str, str] = {}
    infinite = {".".join(_locate(cls, p["loc"])[0]) for p in error.errors() if p["type"] == "finite_number"}
    for problem in error.errors():
        path, annotation, section = _locate(cls, problem["loc"])
        name, kind = ".".join(path), problem["type"]
        if not path or kind == "value_error":  # raised by a check of the configuration's own
            messages[name] = f"`{name}`: {problem['msg'].removeprefix('Value error, ')}".removeprefix("``: ")
        elif kind in ("unexpected_keyword_argument", "invalid_key") and len(path) == len(problem["loc"]):
            under = f" under `{'.'.join(path[:-1])}`" if len(path) > 1 else ""
            near = did_you_mean(path[-1], [f.name for f in dataclasses.fields(section)])
            messages[name] = f"unknown key `{path[-1]}`{under}{near}"
        elif kind == "missing":
            messages[name] = f"`{name}` is missing; allowed: {allowed(annotation)}"
        else:
            finite = ", finite" if name in infinite else ""
            messages[name] = f"`{name}`: got {_value_at(values, path)!r}; allowed: {allowed(annotation)}{finite}"
    return list(messages.values())


def _lead(source: str) -> str:
    return f"{source}: " if source else ""


def _value_at(values: Any, path: Sequence[str]) -> Any:
    for key in path:
        values = values[key] if isinstance(values, Mapping) else getattr(values, key)
    return values


def _locate(cls: Any, loc: tuple[int | str, ...]) -> tuple[list[str], Any, Any]:
    """The field path of a pydantic location, without the labels of union branches; its annotation and its section."""
    path: list[str] = []
    annotation, section = cls, cls
    for part in loc:
        if not dataclasses.is_dataclass(annotation):
            break
        section = annotation
        path.append(str(part))
        annotation = typing.get_type_hints(section, include_extras=True).get(str(part))
    return path, annotation, section


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain data: nested dicts, lists, numbers, texts.

    Raises:
        UserError: a value that no file can hold, such as a function in `env_kwargs`.
    """
    return _plain(config, ())


def _plain(value: Any, path: tuple[str, ...]) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name), (*path, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {str(k): _plain(v, (*path, k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, (*path, str(i))) for i, v in enumerate(value)]
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biufU":
        return value.tolist()
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise UserError(f"`{'.'.join(path)}`: a {type(value).__name__} is no plain data, which a configuration is made of")


# The scalars of YAML 1.2 (YAML 1.1, PyYAML's own, reads `on` as true, `1:30` as 90 and `1e-4` as a text), and `1_000`.
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][\d_]*)|0x[\da-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*([eE][-+]?\d+)?|\.(inf|Inf|INF))"
        r"|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    "merge": ("<<", ["<"]),
}


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars above and without repeated keys, of which all but the last would be lost."""

    yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        repeated = [key for key in keys if keys.count(key) > 1]
        if repeated:
            raise yaml.constructor.ConstructorError(None, None, f"repeated key `{repeated[0]}`", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else."""


for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _read_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:  # `!!int x`, `!!bool x`, …
        raise yaml.YAMLError(str(error)) from error


def parse_value(text: str) -> Any:
    """The value that `text` would have in a configuration file."""
    try:
        return _read_yaml(text)
    except yaml.YAMLError:
        return text


def load_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: the file is absent, not YAML, or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}") from None
    try:
        data = _read_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict) or not all(isinstance(k, str) for k in data):
        raise UserError(f"{path}: expected a mapping of names to values, such as `learning_rate: 3e-4`")
    return data


def dump_yaml(data: Mapping[str, Any]) -> str:
    """`data` as the text of a file that `load_file` reads back."""
    return str(yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def add_arguments(parser: argparse.ArgumentParser, cls: type) -> None:
    """One `--option` for each leaf of `cls`; nothing is parsed into a value yet (see `read_arguments`)."""
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # as from Python 3.14 on: `-1e-3` and `-20,2` are values
    for option in options(cls):
        dashed = option.path.replace("_", "-")
        flags = dict.fromkeys([f"--{option.path}", f"--{dashed}"])
        kinds = _types(option.annotation)
        text = f"{option.doc} [{allowed(option.annotation)}; default: {_shown(option.default)}]".replace("%", "%%")
        kwargs: dict[str, Any] = {"dest": option.path, "default": argparse.SUPPRESS, "help": text}
        if bool in kinds:
            parser.add_argument(*flags, nargs="?", const="true", metavar="BOOL", **kwargs)
            kwargs["help"] = argparse.SUPPRESS
            negative = dict.fromkeys([f"--no-{option.path}", f"--no-{dashed}", f"--no_{option.path}"])
            parser.add_argument(*negative, action="store_const", const="false", **kwargs)
        elif any(typing.get_origin(k) in (tuple, list) or _is_mapping(k) for k in kinds):
            parser.add_argument(*flags, nargs="*", metavar="V", **kwargs)
        else:
            parser.add_argument(*flags, metavar="V", **kwargs)


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None or value == {} else str(value)


def read_arguments(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Parsed command-line options (path -> text or texts) as a nested mapping for `validate`."""
    values: dict[str, Any] = {}
    for option in options(cls):
        if option.path not in given:
            continue
        raw = given[option.path]
        kinds = _types(option.annotation)
        if isinstance(raw, list):
            value: Any = _listed(raw, kinds)
        else:
            value = parse_value(raw) if any(k in (int, float, Any) for k in kinds) else raw
        section = values
        *parents, leaf = option.path.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    return values


def _listed(raw: list[str], kinds: Sequence[Any]) -> Any:
    """`64 64`, `[64, 64]` and `64,64` as a list; `a=1 b=2` and `{a: 1}` as a mapping where one is accepted."""
    lists = [k for k in kinds if typing.get_origin(k) in (tuple, list)]
    mapping = any(map(_is_mapping, kinds))
    if mapping and (raw or not lists) and all("=" in item and not item.startswith("{") for item in raw):
        return {key: _split(text) for key, text in (item.split("=", 1) for item in raw)}
    if len(raw) == 1:
        value = _split(raw[0])
        if isinstance(value, list | dict):
            return value
    if any(typing.get_args(k)[0] is str for k in lists):
        return raw
    return [parse_value(item) for item in raw]


def _split(text: str) -> Any:
    """`64,64` as a list, everything else as in a file."""
    if re.fullmatch(r"[\d.eE+-]+(,[\d.eE+-]+)+", text):
        return [parse_value(item) for item in text.split(",")]
    return parse_value(text)


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers over earlier ones, section by section."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = merge(merged[key], value) if both else value
    return merged
