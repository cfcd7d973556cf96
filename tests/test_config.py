"""Configuration: Python keywords, a YAML file and the command line give the same values and the same errors."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types as limits
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import StringConstraints

from rlkit.config import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    RunConfig,
    Strict,
    Whole,
    add_arguments,
    allowed,
    dump_yaml,
    field_docs,
    load_file,
    merge,
    options,
    parse_value,
    read_arguments,
    to_dict,
    validate,
)
from rlkit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Net(Strict):
    """A nested section."""

    net_arch: tuple[Count, ...] | dict[Literal["pi", "qf"], tuple[Count, ...]] = (256, 256)
    """Hidden widths."""
    layer_norm: bool = False
    dropout: Annotated[float, limits.Interval(ge=0, lt=1)] = 0.0


@dataclass(frozen=True, kw_only=True)
class Sample(Strict):
    """One field of each kind."""

    env: str | None = None
    """Gymnasium id,
    such as `Pendulum-v1`."""
    seed: Whole = 0
    """Seed."""
    threads: Count | None = None
    batch_size: Count = 256
    learning_rate: Positive = 3e-4
    gamma: Fraction = 0.99
    margin: float = 0.0
    tensorboard: bool = True
    wandb: bool | str = False
    compile: Literal["auto", "on", "off"] = "auto"
    ent_coef: NonNegative | Annotated[str, StringConstraints(pattern=r"^auto(_\d+(\.\d*)?)?$")] = "auto"
    bounds: tuple[float, float] = (-20.0, 2.0)
    reward: tuple[str, ...] = ()
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    policy_kwargs: Net = field(default_factory=Net)
    """The networks."""


def sac_config() -> Any:
    from rlkit.trainers.sac import SACConfig

    return SACConfig


def from_python(cls: type, values: Mapping[str, Any]) -> Any:
    return validate(cls, values)


def from_text(cls: type, text: str, folder: Path) -> Any:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return validate(cls, load_file(path))


def arguments(cls: type, *args: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    add_arguments(parser, cls)
    return read_arguments(cls, vars(parser.parse_args(args)))


def from_arguments(cls: type, *args: str) -> Any:
    return validate(cls, arguments(cls, *args))


def message(make: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        make()
    return str(caught.value)


# The same values

# (Python keywords, the text of a file, arguments): all three mean the first.
SAME: list[tuple[dict[str, Any], str, list[str]]] = [
    ({}, "{}", []),
    ({"seed": 7}, "seed: 7", ["--seed", "7"]),
    ({"batch_size": 1_000_000}, "batch_size: 1e6", ["--batch_size", "1e6"]),
    ({"batch_size": 1_000_000}, "batch_size: 1_000_000", ["--batch-size", "1_000_000"]),
    ({"learning_rate": 1e-4}, "learning_rate: 1e-4", ["--learning_rate", "1e-4"]),
    ({"learning_rate": 0.5}, "learning_rate: .5", ["--learning-rate", ".5"]),
    ({"gamma": 1}, "gamma: 1", ["--gamma", "1"]),
    ({"margin": -0.002}, "margin: -2e-3", ["--margin", "-2e-3"]),
    ({"margin": -0.5}, "margin: -.5", ["--margin", "-.5"]),
    ({"threads": None}, "threads: null", ["--threads", "null"]),
    ({"threads": None}, "threads: none", ["--threads", "None"]),
    ({"env": None}, "env: none", ["--env", "none"]),
    ({"env": "123"}, "env: '123'", ["--env", "123"]),
    ({"env": "1e-4"}, "env: '1e-4'", ["--env", "1e-4"]),
    ({"env": "yes"}, "env: yes", ["--env", "yes"]),
    ({"env": "2024-13-45"}, "env: 2024-13-45", ["--env", "2024-13-45"]),
    ({"env": "12:30"}, "env: 12:30", ["--env", "12:30"]),
    ({"env": "my_package:My Env-v0 µ"}, "env: my_package:My Env-v0 µ", ["--env", "my_package:My Env-v0 µ"]),
    ({"tensorboard": False}, "tensorboard: false", ["--no-tensorboard"]),
    ({"tensorboard": False}, "tensorboard: off", ["--tensorboard", "false"]),
    ({"tensorboard": "no"}, "tensorboard: no", ["--no_tensorboard"]),
    ({"tensorboard": True}, "tensorboard: yes", ["--tensorboard"]),
    ({"wandb": True}, "wandb: true", ["--wandb"]),
    ({"wandb": "off"}, "wandb: off", ["--wandb", "off"]),
    ({"wandb": "my project"}, "wandb: my project", ["--wandb", "my project"]),
    ({"wandb": "2024"}, "wandb: '2024'", ["--wandb", "2024"]),
    ({"compile": "on"}, "compile: on", ["--compile", "on"]),
    ({"compile": False}, "compile: false", ["--compile", "off"]),
    ({"ent_coef": 0.1}, "ent_coef: 0.1", ["--ent_coef", "0.1"]),
    ({"ent_coef": "auto_0.1"}, "ent_coef: auto_0.1", ["--ent-coef", "auto_0.1"]),
    ({"bounds": (-5, 2)}, "bounds: [-5, 2]", ["--bounds", "-5", "2"]),
    ({"bounds": [-5e-1, 2]}, "bounds: [-5e-1, 2]", ["--bounds", "-5e-1,2"]),
    ({"reward": ["clip=-1,1"]}, "reward: ['clip=-1,1']", ["--reward", "clip=-1,1"]),
    ({"reward": ("scale=0.1", "m:f")}, "reward: [scale=0.1, 'm:f']", ["--reward", "scale=0.1", "m:f"]),
    ({"reward": ("scale=0.1", "m:f")}, "reward: [scale=0.1, m:f]", ["--reward", "[scale=0.1, m:f]"]),
    ({"reward": ("123", "true")}, "reward: ['123', 'true']", ["--reward", "123", "true"]),
    ({"reward": ()}, "reward: []", ["--reward"]),
    ({"env_kwargs": {"a": 1, "b": "x"}}, "env_kwargs: {a: 1, b: x}", ["--env_kwargs", "a=1", "b=x"]),
    ({"env_kwargs": {"a": [1, 2.5]}}, "env_kwargs: {a: [1, 2.5]}", ["--env-kwargs", "a=1,2.5"]),
    ({"env_kwargs": {"a": {"b": True}}}, "env_kwargs: {a: {b: true}}", ["--env_kwargs", "{a: {b: true}}"]),
    ({"env_kwargs": {"a": "b=c"}}, "env_kwargs: {a: b=c}", ["--env_kwargs", "a=b=c"]),
    ({"env_kwargs": {}}, "env_kwargs: {}", ["--env_kwargs"]),
    (
        {"policy_kwargs": {"net_arch": (64, 32)}},
        "policy_kwargs:\n  net_arch: [64, 32]",
        ["--policy_kwargs.net_arch", "64", "32"],
    ),
    (
        {"policy_kwargs": {"net_arch": [64, 32]}},
        "policy_kwargs: {net_arch: [6.4e1, 32]}",
        ["--policy-kwargs.net-arch", "64,32"],
    ),
    ({"policy_kwargs": {"net_arch": [64]}}, "policy_kwargs: {net_arch: [64]}", ["--policy_kwargs.net_arch", "[64]"]),
    ({"policy_kwargs": {"net_arch": []}}, "policy_kwargs: {net_arch: []}", ["--policy_kwargs.net_arch"]),
    (
        {"policy_kwargs": {"net_arch": {"pi": [64, 64], "qf": [32]}}},
        "policy_kwargs:\n  net_arch:\n    pi: [64, 64]\n    qf: [32]",
        ["--policy_kwargs.net_arch", "pi=64,64", "qf=[32]"],
    ),
    (
        {"policy_kwargs": {"layer_norm": True, "dropout": 0.01}},
        "policy_kwargs: {layer_norm: yes, dropout: 1e-2}",
        ["--policy_kwargs.layer_norm", "--policy_kwargs.dropout=1e-2"],
    ),
    (
        {"policy_kwargs": {"layer_norm": False}},
        "policy_kwargs: {layer_norm: False}",
        ["--no-policy_kwargs.layer_norm"],
    ),
]


@pytest.mark.parametrize(("keywords", "text", "args"), SAME)
def test_three_sources_give_the_same_values(
    keywords: dict[str, Any], text: str, args: list[str], tmp_path: Path
) -> None:
    expected = from_python(Sample, keywords)
    assert from_text(Sample, text, tmp_path) == expected
    assert from_arguments(Sample, *args) == expected


def test_values_arrive_with_their_types() -> None:
    """1e6 is an int where a count is asked for, text stays text, lists become tuples; untouched fields are defaults."""
    config = from_arguments(
        Sample, "--batch_size", "1e6", "--env", "007", "--reward", "1", "--gamma", "1", "--wandb", "true"
    )
    assert (config.batch_size, type(config.batch_size)) == (1_000_000, int)
    assert (config.gamma, type(config.gamma)) == (1.0, float)
    assert (config.env, config.reward, config.wandb) == ("007", ("1",), True)
    changed = {"batch_size": 1_000_000, "env": "007", "reward": ("1",), "gamma": 1.0, "wandb": True}
    assert config == Sample(**changed)  # type: ignore[arg-type]
    assert from_python(Sample, {"tensorboard": "no"}).tensorboard is False
    assert from_python(Sample, {"wandb": "off"}).wandb is False
    assert from_python(Sample, {"compile": True}).compile == "on"


@pytest.mark.parametrize(
    "flag", ["--no-policy_kwargs.layer_norm", "--no_policy_kwargs.layer_norm", "--no-policy-kwargs.layer-norm"]
)
def test_a_boolean_can_be_turned_off_in_any_spelling(flag: str) -> None:
    on = ["--policy-kwargs.layer-norm", "true"]
    assert from_arguments(Sample, *on).policy_kwargs.layer_norm is True
    assert from_arguments(Sample, *on, flag).policy_kwargs.layer_norm is False


def test_numpy_numbers_are_numbers() -> None:
    config = from_python(
        Sample,
        {"batch_size": np.int64(32), "gamma": np.float64(0.5), "env_kwargs": {"a": np.int32(3), "b": np.ones(2)}},
    )
    assert to_dict(config)["env_kwargs"] == {"a": 3, "b": [1.0, 1.0]}
    assert validate(Sample, merge(to_dict(config))).batch_size == 32


# The same errors

# (Python keywords, the text of a file, arguments, message), for values that all three can express.
WRONG: list[tuple[dict[str, Any], str, list[str], str]] = [
    (
        {"gamma": 1.5},
        "gamma: 1.5",
        ["--gamma", "1.5"],
        "`gamma`: got 1.5; allowed: a number >= 0 and <= 1",
    ),
    (
        {"batch_size": 0},
        "batch_size: 0",
        ["--batch_size", "0"],
        "`batch_size`: got 0; allowed: an integer >= 1",
    ),
    (
        {"batch_size": 2.5},
        "batch_size: 2.5",
        ["--batch_size", "2.5"],
        "`batch_size`: got 2.5; allowed: an integer >= 1",
    ),
    (
        {"learning_rate": -1},
        "learning_rate: -1",
        ["--learning_rate", "-1"],
        "`learning_rate`: got -1; allowed: a number > 0",
    ),
    (
        {"learning_rate": math.inf},
        "learning_rate: .inf",
        ["--learning_rate", ".inf"],
        "`learning_rate`: got inf; allowed: a number > 0, finite",
    ),
    (
        {"learning_rate": math.inf},
        "learning_rate: 1e400",
        ["--learning_rate", "1e400"],
        "`learning_rate`: got inf; allowed: a number > 0, finite",
    ),
    (
        {"margin": math.nan},
        "margin: .nan",
        ["--margin", ".nan"],
        "`margin`: got nan; allowed: a number, finite",
    ),
    ({"margin": "nan"}, "margin: nan", ["--margin", "nan"], "`margin`: got 'nan'; allowed: a number, finite"),
    (
        {"batch_size": math.inf},
        "batch_size: .inf",
        ["--batch_size", ".inf"],
        "`batch_size`: got inf; allowed: an integer >= 1, finite",
    ),
    (
        {"bounds": [math.nan, 2]},
        "bounds: [.nan, 2]",
        ["--bounds", ".nan", "2"],
        "`bounds`: got [nan, 2]; allowed: a list of 2 (each a number), finite",
    ),
    (
        {"bounds": [1, 2, 3]},
        "bounds: [1, 2, 3]",
        ["--bounds", "1,2,3"],
        "`bounds`: got [1, 2, 3]; allowed: a list of 2 (each a number)",
    ),
    (
        {"threads": "all"},
        "threads: all",
        ["--threads", "all"],
        "`threads`: got 'all'; allowed: an integer >= 1 or none",
    ),
    (
        {"ent_coef": "autoo"},
        "ent_coef: autoo",
        ["--ent_coef", "autoo"],
        "`ent_coef`: got 'autoo'; allowed: a number >= 0 or a text of the form ^auto(_\\d+(\\.\\d*)?)?$",
    ),
    (
        {"compile": "maybe"},
        "compile: maybe",
        ["--compile", "maybe"],
        "`compile`: got 'maybe'; allowed: 'auto' or 'on' or 'off'",
    ),
    (
        {"tensorboard": "maybe"},
        "tensorboard: maybe",
        ["--tensorboard", "maybe"],
        "`tensorboard`: got 'maybe'; allowed: true or false",
    ),
    (
        {"env_kwargs": ["x"]},
        "env_kwargs: [x]",
        ["--env_kwargs", "x"],
        "`env_kwargs`: got ['x']; allowed: a mapping",
    ),
    (
        {"policy_kwargs": {"net_arch": [64, 0]}},
        "policy_kwargs: {net_arch: [64, 0]}",
        ["--policy_kwargs.net_arch", "64", "0"],
        "`policy_kwargs.net_arch`: got [64, 0]; allowed: a list (each an integer >= 1) or a mapping with pi, qf",
    ),
    (
        {"policy_kwargs": {"net_arch": {"vf": [64]}}},
        "policy_kwargs: {net_arch: {vf: [64]}}",
        ["--policy_kwargs.net_arch", "vf=[64]"],
        "`policy_kwargs.net_arch`: got {'vf': [64]}; allowed: a list (each an integer >= 1) or a mapping with pi, qf",
    ),
    (
        {"policy_kwargs": {"dropout": 1}},
        "policy_kwargs: {dropout: 1}",
        ["--policy_kwargs.dropout", "1"],
        "`policy_kwargs.dropout`: got 1; allowed: a number >= 0 and < 1",
    ),
    (
        {"gamma": -1, "batch_size": 0},
        "gamma: -1\nbatch_size: 0",
        ["--gamma", "-1", "--batch_size", "0"],
        "`batch_size`: got 0; allowed: an integer >= 1\n`gamma`: got -1; allowed: a number >= 0 and <= 1",
    ),
]


@pytest.mark.parametrize(("keywords", "text", "args", "expected"), WRONG)
def test_three_sources_give_the_same_errors(
    keywords: dict[str, Any], text: str, args: list[str], expected: str, tmp_path: Path
) -> None:
    def lines(text: str) -> list[str]:
        return sorted(text.split("\n"))

    wanted = lines(expected)
    assert lines(message(lambda: from_python(Sample, keywords))) == wanted
    assert lines(message(lambda: from_text(Sample, text, tmp_path))) == wanted
    assert lines(message(lambda: from_arguments(Sample, *args))) == wanted


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"gama": 0.9}, "unknown key `gama`; did you mean `gamma`?"),
        ({"policy_kwargs": {"netarch": [1]}}, "unknown key `netarch` under `policy_kwargs`; did you mean `net_arch`?"),
        (
            {"policy_kwargs": {"zzz": 1}},
            "unknown key `zzz` under `policy_kwargs`; known: dropout, layer_norm, net_arch",
        ),
        ({"zzz": 1}, "unknown key `zzz`"),
        ({1: 2}, "unknown key `1`"),
        (
            {"policy_kwargs": 3},
            "`policy_kwargs`: got 3; allowed: a section with net_arch, layer_norm, dropout",
        ),
        ({"seed": True}, "`seed`: got True; allowed: an integer >= 0"),
        ({"gamma": False}, "`gamma`: got False; allowed: a number >= 0 and <= 1"),
        (
            {"ent_coef": True},
            "`ent_coef`: got True; allowed: a number >= 0 or a text of the form ^auto(_\\d+(\\.\\d*)?)?$",
        ),
        ({"env": 3}, "`env`: got 3; allowed: a text or none"),
        ({"env": True}, "`env`: got True; allowed: a text or none"),
        ({"env_kwargs": {1: 2}}, "`env_kwargs`: got {1: 2}; allowed: a mapping"),
        (
            {"env_kwargs": {"f": {"g": print}}},
            "`env_kwargs.f.g`: a builtin_function_or_method is no plain data, which a configuration is made of",
        ),
        (
            {"env_kwargs": {"s": {1, 2}}},
            "`env_kwargs.s`: a set is no plain data, which a configuration is made of",
        ),
    ],
)
def test_what_a_field_cannot_hold(values: dict[Any, Any], expected: str) -> None:
    assert message(lambda: validate(Sample, values)) == expected
    assert message(lambda: validate(Sample, values, "my.yaml")) == f"my.yaml: {expected}"


def test_an_instance_of_a_section_is_checked_too() -> None:
    assert validate(Sample, {"policy_kwargs": Net(dropout=0.5)}).policy_kwargs == Net(dropout=0.5)
    expected = "`policy_kwargs.dropout`: got 5; allowed: a number >= 0 and < 1"
    assert message(lambda: validate(Sample, {"policy_kwargs": Net(dropout=5)})) == expected


@dataclass(frozen=True, kw_only=True)
class Stage(Strict):
    steps: Count = 1


@dataclass(frozen=True, kw_only=True)
class Checked(Strict):
    data: str
    low: float = 0.0
    high: float = 1.0
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError("low must be below high")


def test_required_fields_checks_and_lists_of_sections() -> None:
    """What a configuration of another package may have: no default, a check of its own, sections in a list."""
    assert message(lambda: validate(Checked, {})) == "`data` is missing; allowed: a text"
    assert message(lambda: validate(Checked, {"data": "x", "low": 2})) == "low must be below high"
    found = message(lambda: validate(Checked, {"data": "x", "stages": [{"steps": 1}, {"stepps": 1}]}))
    assert found.startswith("`stages`: got [{'steps': 1}, {'stepps': 1}]; allowed: a list")
    assert to_dict(validate(Checked, {"data": "x", "stages": [{"steps": 3}]}))["stages"] == [{"steps": 3}]


def test_an_alias_to_itself_is_an_error(tmp_path: Path) -> None:
    assert "contains itself" in message(lambda: from_text(Sample, "env_kwargs: &a {a: *a}", tmp_path))


# Files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- 1\n- 2", "expected a mapping"),
        ("just text", "expected a mapping"),
        ("", "expected a mapping"),
        ("1: 2", "expected a mapping"),
        ("a: [1", "not valid YAML"),
        ("gamma: 0.9\ngamma: 0.8", "repeated key `gamma`"),
        ("policy_kwargs:\n  dropout: 0.1\n  dropout: 0.2", "repeated key `dropout`"),
        ("env: !!python/object/apply:os.system [echo x]", "could not determine a constructor for the tag"),
        ("env: !!python/name:os.system", "could not determine a constructor for the tag"),
        ("env: !mine x", "could not determine a constructor for the tag"),
        ("seed: !!int x", "not valid YAML"),
        ("tensorboard: !!bool x", "not valid YAML"),
        ("env: !!timestamp x", "not valid YAML"),
        ("a: {[1]: 2}", "not valid YAML"),
        ("[" * 5_000, "not valid YAML"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_files_that_are_refused(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    found = message(lambda: load_file(path))
    assert expected in found
    assert str(path) in found


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "absent.yaml" in message(lambda: load_file(tmp_path / "absent.yaml"))
    assert str(tmp_path) in message(lambda: load_file(tmp_path))
    (tmp_path / "latin.yaml").write_bytes("env: caf\xe9".encode("latin-1"))
    assert "latin.yaml" in message(lambda: load_file(tmp_path / "latin.yaml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e6", 1e6), ("1E6", 1e6), ("+1e3", 1000.0), ("-.5", -0.5), ("1.", 1.0), ("1.5e-3", 0.0015), ("0", 0),
        ("-20", -20), ("1_000", 1000), ("0x10", 16), (".inf", math.inf), ("-.inf", -math.inf), ("null", None),
        ("~", None), ("", None), ("true", True), ("False", False), ("[1, a]", [1, "a"]), ("{a: 1}", {"a": 1}),
        ("'1'", "1"), ("yes", "yes"), ("off", "off"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("inf", "inf"),
        ("1.5.2", "1.5.2"), ("010", "010"), ("1e", "1e"), ("e5", "e5"), (".", "."), ("-", [None]), ("auto", "auto"),
        ("[1", "[1"), ("!!python/name:os.system", "!!python/name:os.system"), ("!!int x", "!!int x"), ("*a", "*a"),
        ("=", "="), ("a: b: c", "a: b: c"), ("clip=-1,1", "clip=-1,1"), ("m:f", "m:f"),
    ],
)  # fmt: skip
def test_parse_value(text: str, value: Any) -> None:
    found = parse_value(text)
    assert (found, type(found)) == (value, type(value))


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8) | st.sampled_from(
    ["1e-4", "1e6", "on", "No", "null", "~", "1:30", "2024-01-01", "0o17", "010", "0x1F", ".5", ".inf", "nan", "<<",
     "=", "- a", "a: b", "#", "'", '"', "!!int", "*a", "&a", "true", "", " ", "1_000", "%", "@", "`", "a #b"]
)  # fmt: skip
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "env": TEXTS.filter(lambda text: text.lower() not in ("none", "null")),
            "seed": st.integers(0),
            "threads": st.none() | st.integers(1),
            "learning_rate": st.floats(1e-300, 1e300),
            "gamma": st.floats(0, 1),
            "margin": NUMBERS,
            "tensorboard": st.booleans(),
            "wandb": st.booleans() | TEXTS,
            "compile": st.sampled_from(["auto", "on", "off"]),
            "ent_coef": st.floats(0, 1e9) | st.sampled_from(["auto", "auto_1", "auto_0.5"]),
            "bounds": st.tuples(NUMBERS, NUMBERS),
            "reward": st.lists(TEXTS, max_size=3),
            "env_kwargs": st.dictionaries(TEXTS, DATA, max_size=3),
            "policy_kwargs": st.fixed_dictionaries(
                {},
                optional={
                    "net_arch": st.lists(st.integers(1, 9), max_size=3)
                    | st.dictionaries(st.sampled_from(["pi", "qf"]), st.lists(st.integers(1, 9), max_size=2)),
                    "layer_norm": st.booleans(),
                },
            ),
        },
    )
)
def test_what_is_written_is_read_back(values: dict[str, Any]) -> None:
    """validate -> to_dict -> YAML -> validate is the identity, for this reader and for a reader of YAML 1.1."""
    import yaml

    config = validate(Sample, values)
    text = dump_yaml(to_dict(config))
    assert parse_value(text) == to_dict(config)
    assert yaml.safe_load(text) == to_dict(config)
    assert validate(Sample, parse_value(text)) == config


# Documentation and help


@dataclass(frozen=True, kw_only=True)
class Derived(Sample):
    """Overrides one default without a text of its own, and one text."""

    env: str | None = "Pendulum-v1"
    seed: Whole = 5
    """Another seed."""
    added: int = 1
    """Added %."""


def test_docs_come_from_all_bases() -> None:
    docs = field_docs(Derived)
    assert docs == {
        "env": "Gymnasium id, such as `Pendulum-v1`.",
        "seed": "Another seed.",
        "policy_kwargs": "The networks.",
        "added": "Added %.",
    }
    assert set(field_docs(RunConfig)) == {f.name for f in dataclasses.fields(RunConfig)}


def test_options_are_leaves_with_dotted_paths() -> None:
    found = {option.path: option for option in options(Derived)}
    sections = {"policy_kwargs"}
    leaves = {f.name for f in dataclasses.fields(Derived)} - sections
    assert set(found) == leaves | {f"policy_kwargs.{f.name}" for f in dataclasses.fields(Net)}
    assert found["env"].default == "Pendulum-v1"
    assert found["policy_kwargs.net_arch"].default == (256, 256)
    assert found["policy_kwargs.net_arch"].doc == "Hidden widths."
    assert found["env_kwargs"].default == {}


def test_a_path_is_its_text(tmp_path: Path) -> None:
    assert validate(RunConfig, {"out": tmp_path / "run"}).out == str(tmp_path / "run")
    with pytest.raises(UserError, match=r"`seed`: got \w+Path"):
        validate(RunConfig, {"seed": tmp_path})


def test_help_shows_texts_ranges_and_defaults() -> None:
    parser = argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=1000))
    add_arguments(parser, Derived)
    text = parser.format_help()
    assert "Another seed. [an integer >= 0; default: 5]" in text
    assert "Added %. [an integer; default: 1]" in text
    assert "default: 256 256]" in text
    assert "--no-tensorboard" not in text  # accepted, not shown


def test_allowed_in_words() -> None:
    assert allowed(Annotated[float, limits.Interval(gt=0, lt=1)]) == "a number > 0 and < 1"
    assert allowed(Count | None) == "an integer >= 1 or none"
    assert allowed(float | Literal["auto"]) == "a number or 'auto'"
    assert allowed(list[str]) == "a list (each a text)"
    assert allowed(bool | str) == "true or false or a text"


def test_every_field_of_sac_is_documented_and_has_an_option() -> None:
    cls = sac_config()
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser, cls)
    for option in options(cls):
        assert option.doc, f"{option.path} has no documentation"
        assert f"--{option.path}" in parser._option_string_actions


def test_sac_from_three_sources(tmp_path: Path) -> None:
    cls = sac_config()
    keywords = {
        "env": "HalfCheetah-v5", "buffer_size": 10**6, "learning_rate": 1e-3, "target_entropy": -3,
        "log_std_bounds": (-5, 2), "reward": ("clip=-1,1",), "env_kwargs": {"forward_reward_weight": 2.0},
        "policy_kwargs": {"net_arch": {"pi": [64], "qf": [64, 64]}, "activation_fn": "tanh"},
    }  # fmt: skip
    text = """
        env: HalfCheetah-v5
        buffer_size: 1e6
        learning_rate: 1e-3
        target_entropy: -3
        log_std_bounds: [-5, 2]
        reward: ["clip=-1,1"]
        env_kwargs: {forward_reward_weight: 2.0}
        policy_kwargs:
          net_arch: {pi: [64], qf: [64, 64]}
          activation_fn: tanh
    """
    args = (
        "--env HalfCheetah-v5 --buffer-size 1e6 --learning_rate 1e-3 --target_entropy -3 --log_std_bounds -5,2 "
        "--reward clip=-1,1 --env_kwargs forward_reward_weight=2.0 --policy_kwargs.net_arch pi=[64] qf=64,64 "
        "--policy-kwargs.activation-fn tanh"
    )
    expected = validate(cls, keywords)
    assert from_text(cls, text, tmp_path) == expected
    assert from_arguments(cls, *args.split()) == expected
    assert validate(cls, parse_value(dump_yaml(to_dict(expected)))) == expected
    assert message(lambda: validate(cls, {"learning_ratee": 1})) == (
        "unknown key `learning_ratee`; did you mean `learning_rate`?"
    )


def test_activation_classes_as_stable_baselines3_takes_them() -> None:
    from torch import nn

    cls = sac_config()
    for value, name in ((nn.ReLU, "relu"), (nn.LeakyReLU, "leaky_relu"), (nn.SiLU, "silu"), ("gelu", "gelu")):
        assert validate(cls, {"policy_kwargs": {"activation_fn": value}}).policy_kwargs.activation_fn == name
    assert "`policy_kwargs.activation_fn`: got" in message(
        lambda: validate(cls, {"policy_kwargs": {"activation_fn": nn.Linear}})
    )


# Precedence


def test_merge() -> None:
    """Later layers win key by key; sections merge, lists and scalars are replaced; the inputs stay as they are."""
    preset = {"gamma": 0.9, "policy_kwargs": {"net_arch": [64], "layer_norm": True}, "reward": ["a", "b"]}
    file = {"gamma": 0.8, "policy_kwargs": {"net_arch": {"pi": [1]}}}
    line = {"reward": ["c"], "policy_kwargs": {"dropout": 0.5}}
    assert merge(preset, file, line) == {
        "gamma": 0.8,
        "policy_kwargs": {"net_arch": {"pi": [1]}, "layer_norm": True, "dropout": 0.5},
        "reward": ["c"],
    }
    assert preset == {"gamma": 0.9, "policy_kwargs": {"net_arch": [64], "layer_norm": True}, "reward": ["a", "b"]}
    assert merge() == {}


def test_only_given_options_override(tmp_path: Path) -> None:
    """Default < file < command line: what the line does not name leaves the file's value, and so on."""
    path = tmp_path / "a.yaml"
    path.write_text("gamma: 0.5\nseed: 3\npolicy_kwargs: {dropout: 0.1}")
    config = validate(Sample, merge(load_file(path), arguments(Sample, "--seed", "4", "--policy_kwargs.layer_norm")))
    assert config == Sample(gamma=0.5, seed=4, policy_kwargs=Net(dropout=0.1, layer_norm=True))
