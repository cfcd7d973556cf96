"""Configuration: one frozen dataclass per trainer, read from Python keywords, a YAML file or the command line.

The three sources share one strict reader, so that they give the same values and the same errors: unknown keys are
refused with the nearest valid name, values out of range with the range. Ranges stand in the annotations
(`Annotated[float, Interval(ge=0, le=1)]`, checked by pydantic), documentation in the string under each field, which is
also the text of `--help`. A file is data only: YAML's safe subset, no code, no object tags.

Precedence: default < preset < file < command line.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import math
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import annotated_types as limits
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

    __pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


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
    """Compile the update with torch.compile. `auto` compiles on CUDA only."""
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
        for field, text in zip(body, body[1:], strict=False):
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
            words.append(f"a list, each {allowed(typing.get_args(member)[0])}")
        elif origin is dict or member is dict:
            words.append("a mapping")
        elif isinstance(member, type) and dataclasses.is_dataclass(member):
            words.append(f"a section with {', '.join(f.name for f in dataclasses.fields(member))}")
        else:
            text = " ".join(filter(None, [names.get(member, str(member)), _range(metadata)]))
            words += [pattern for m in metadata if (pattern := getattr(m, "pattern", None))] or [text]
    return " or ".join(dict.fromkeys(words))


def validate(cls: type[T], values: Mapping[str, Any], source: str = "") -> T:
    """`cls(**values)` with types coerced and ranges checked.

    Raises:
        UserError: naming every wrong field with its path, its value and what is allowed; `source` (a file) leads.
    """
    unsafe = [k for k, v in values.items() if isinstance(v, float) and math.isnan(v)]
    if unsafe:
        raise UserError(f"{_lead(source)}`{unsafe[0]}`: got nan; a number is needed")
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        messages: dict[str, str] = {}
        for problem in error.errors():
            path, annotation, section = _locate(cls, problem["loc"])
            if problem["type"] == "unexpected_keyword_argument":
                under = f" under `{'.'.join(path[:-1])}`" if len(path) > 1 else ""
                near = did_you_mean(path[-1], [f.name for f in dataclasses.fields(section)])
                messages[".".join(path)] = f"unknown key `{path[-1]}`{under}{near}"
            else:
                value = _value_at(values, path)
                messages[".".join(path)] = f"`{'.'.join(path)}`: got {value!r}; allowed: {allowed(annotation)}"
        raise UserError(_lead(source) + "\n".join(messages.values())) from None


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
    """A configuration as plain data: nested dicts, lists, numbers, texts."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-4` is a number, as in YAML 1.2 and in every programming language."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def parse_value(text: str) -> Any:
    """The value that `text` would have in a configuration file."""
    try:
        return yaml.load(text, Loader=_Loader)
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
        data = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(data, dict) or not all(isinstance(k, str) for k in data):
        raise UserError(f"{path}: expected a mapping of names to values, such as `learning_rate: 3e-4`")
    return data


def dump_yaml(data: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)


def add_arguments(parser: argparse.ArgumentParser, cls: type) -> None:
    """One `--option` for each leaf of `cls`; nothing is parsed into a value yet (see `read_arguments`)."""
    for option in options(cls):
        flags = dict.fromkeys([f"--{option.path}", f"--{option.path.replace('_', '-')}"])
        members = _members(option.annotation)
        text = f"{option.doc} [{allowed(option.annotation)}; default: {_shown(option.default)}]".replace("%", "%%")
        kwargs: dict[str, Any] = {"dest": option.path, "default": argparse.SUPPRESS, "help": text}
        if bool in members:
            parser.add_argument(*flags, nargs="?", const="true", metavar="BOOL", **kwargs)
            kwargs["help"] = argparse.SUPPRESS
            parser.add_argument(
                *(f"--no{'-' if '-' in flag[2:] else '_'}{flag[2:]}" for flag in flags),
                f"--no-{option.path.replace('_', '-')}",
                action="store_const",
                const="false",
                **kwargs,
            )
        elif any(typing.get_origin(m) in (tuple, list, dict) or m is dict for m in members):
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
        members = [typing.get_args(m)[0] if typing.get_origin(m) is Annotated else m for m in _members(option.annotation)]
        if isinstance(raw, list):
            value: Any = _listed(raw, mapping=any(m is dict or typing.get_origin(m) is dict for m in members))
        elif set(members) <= {str, types.NoneType}:
            value = None if raw.lower() in ("none", "null") and types.NoneType in members else raw
        else:
            value = parse_value(raw)
        section = values
        *parents, leaf = option.path.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    return values


def _listed(raw: list[str], mapping: bool) -> Any:
    """`64 64`, `[64, 64]` and `64,64` as a list; `a=1 b=2` and `{a: 1}` as a mapping where one is accepted."""
    if mapping and raw and all("=" in item and not item.startswith("{") for item in raw):
        return {key: parse_value(text) for key, text in (item.split("=", 1) for item in raw)}
    if len(raw) == 1:
        value = parse_value(raw[0])
        if isinstance(value, list | dict):
            return value
        if isinstance(value, str) and re.fullmatch(r"[\d.eE+-]+(,[\d.eE+-]+)+", value):
            return [parse_value(item) for item in value.split(",")]
    return [parse_value(item) for item in raw]


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers over earlier ones, section by section."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = merge(merged[key], value) if both else value
    return merged
