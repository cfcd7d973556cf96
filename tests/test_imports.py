"""What may import what, what starts fast, and what is packaged."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rlkit

ROOT = Path(__file__).parent.parent
FOLDERS = {"rlkit": ROOT / "rlkit", "rlkit.envs": ROOT / "envs", "rlkit.trainers": ROOT / "trainers"}
PRODUCT = sorted((name, path) for name, folder in FOLDERS.items() for path in folder.rglob("*.py"))
CODE = [path for _, path in PRODUCT] + sorted(
    path for folder in ("tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
HEAVY = ("torch", "gymnasium", "pydantic", "matplotlib", "scipy", "stable_baselines3", "tensorboard", "mujoco", "rich")


def imports(path: Path, top_level: bool = False) -> Iterator[tuple[str, int]]:
    """(module, level of a relative import) of each import statement in a file.

    Args:
        top_level: leave out what runs later, in functions, or never, under `if TYPE_CHECKING`.
    """

    def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from statements(node.orelse)
                continue
            yield node
            for name in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body)

    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in statements(tree.body) if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield module, node.level
            yield from ((f"{module}.{alias.name}", node.level) for alias in node.names)


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_rules_see_imports(tmp_path: Path) -> None:
    """The reader of these tests finds what it should, so that an empty answer means something."""
    path = tmp_path / "sample.py"
    path.write_text(
        "from __future__ import annotations\nimport a.b as c\n"
        "if TYPE_CHECKING:\n    import never\nelse:\n    import other\n"
        "try:\n    import tried\nexcept ImportError:\n    import instead\n"
        "class X:\n    import inside\n    def f(self):\n        from d import e\n"
        "from . import f\n"
    )
    everything = {module for module, _ in imports(path)}
    assert {"a.b", "never", "other", "tried", "instead", "inside", "d", "d.e", ".f"} <= everything
    at_once = {module for module, _ in imports(path, top_level=True)}
    assert at_once == everything - {"never", "d", "d.e"}
    assert ("", 1) in set(imports(path))
    assert len(PRODUCT) > 20
    assert Path(__file__) in CODE


@pytest.mark.parametrize("path", CODE, ids=shown)
def test_no_relative_imports_and_no_second_copies(path: Path) -> None:
    """`envs` and `trainers` would import, from a checkout, as modules of their own beside rlkit.envs."""
    for module, level in imports(path):
        assert level == 0, f"{shown(path)} imports {'.' * level}{module}"
        assert not within(module, "envs", "trainers"), f"{shown(path)} imports {module}"


@pytest.mark.parametrize("path", [path for _, path in PRODUCT], ids=shown)
def test_no_pickle(path: Path) -> None:
    """Neither the modules nor the functions of others that read or write one; other libraries' weights are converted by
    PyTorch's restricted reader."""
    for module, _ in imports(path):
        assert not within(
            module, "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "copyreg"
        ), f"{shown(path)} imports {module}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            restricted = name == "torch.load" and path.name == "convert.py" and keywords.get("weights_only") == "True"
            banned = not restricted and name in ("torch.load", "torch.save", "eval", "exec")
            assert not banned, f"{shown(path)}:{node.lineno}: {name}"
            assert keywords.get("allow_pickle", "False") == "False", f"{shown(path)}:{node.lineno}: allow_pickle"


@pytest.mark.parametrize("path", [path for name, path in PRODUCT if name == "rlkit"], ids=shown)
def test_the_core_does_not_import_trainers(path: Path) -> None:
    """It finds them by name when they are asked for."""
    found = [module for module, _ in imports(path, top_level=True) if within(module, "rlkit.trainers")]
    assert found == []


@pytest.mark.parametrize("path", [path for name, path in PRODUCT if name == "rlkit.envs"], ids=shown)
def test_environments_know_little_of_the_rest(path: Path) -> None:
    """Adapters are below trainers: they may use the buffer, errors, randomness, rewards and worst cases."""
    allowed = tuple(f"rlkit.{name}" for name in ("envs", "buffer", "config", "errors", "rng", "rewards", "robust"))
    for module, _ in imports(path):
        if within(module, "rlkit"):
            assert module == "rlkit" or within(module, *allowed), f"{shown(path)} imports {module}"


@pytest.mark.parametrize("path", [path for name, path in PRODUCT if name == "rlkit.trainers"], ids=shown)
def test_trainers_do_not_import_what_runs_them(path: Path) -> None:
    for module, _ in imports(path):
        assert not within(module, "rlkit.cli", "rlkit.run", "rlkit.doctor"), f"{shown(path)} imports {module}"


# Starting fast


def loaded_after(*code: str) -> tuple[set[str], subprocess.CompletedProcess[str]]:
    """Top-level packages in `sys.modules` after running `code` in a fresh process."""
    lines = "\n".join(code)
    script = f"import json, sys\n{lines}\nprint('\\n' + json.dumps(sorted(m.split('.')[0] for m in sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1])), result


def test_importing_the_package_loads_nothing_heavy() -> None:
    modules, _ = loaded_after("import rlkit", "rlkit.__version__", "import rlkit.cli")
    assert "rlkit" in modules
    assert not modules & {*HEAVY, "numpy", "yaml"}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--help"], "commands:"),
        (["--version"], f"rlkit {rlkit.__version__}"),
        (["list"], "arXiv:1812.05905"),
        ([], "commands:"),
        (["train", "--help"], "rlkit train TRAINER"),
        (["resume", "--help"], "--allow-changes"),
        (["eval", "--help"], "--episodes"),
        (["plot", "--help"], "--out"),
        (["video", "--help"], "--episodes"),
        (["export", "--help"], "--format"),
    ],
)
def test_help_and_lists_load_nothing_heavy(args: list[str], expected: str) -> None:
    modules, result = loaded_after(
        "from rlkit.cli import main", "try:", f"    main({args!r})", "except SystemExit as e:", "    assert not e.code"
    )
    assert expected in result.stdout
    assert not modules & set(HEAVY)


def test_every_public_name_is_there() -> None:
    assert len(set(rlkit.__all__)) == len(rlkit.__all__)
    for name in rlkit.__all__:
        assert getattr(rlkit, name) is not None
    assert rlkit.SAC.__module__ == "rlkit.trainers.sac"  # not `trainers.sac`
    assert rlkit.RolloutBuffer.__module__ == "rlkit.buffer"


# Packaging


def pyproject() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_packaged() -> None:
    """setuptools is told the packages by hand, so a new folder has to be added."""
    folders = set()
    for name, folder in FOLDERS.items():
        for init in folder.rglob("__init__.py"):
            folders.add(".".join([name, *init.parent.relative_to(folder).parts]))
    assert set(pyproject()["tool"]["setuptools"]["packages"]) == folders
    mapping = pyproject()["tool"]["setuptools"]["package-dir"]
    assert mapping == {name: str(folder.relative_to(ROOT)) for name, folder in FOLDERS.items()}
    without_init = {path.parent for folder in FOLDERS.values() for path in folder.rglob("*.py")} - {
        init.parent for folder in FOLDERS.values() for init in folder.rglob("__init__.py")
    }
    assert without_init == set()


def test_the_package_is_typed_and_its_command_exists() -> None:
    assert (ROOT / "rlkit" / "py.typed").exists()
    target = str(pyproject()["project"]["scripts"]["rlkit"])
    module, _, function = target.partition(":")
    assert (module, function) == ("rlkit.cli", "main")


@pytest.mark.parametrize("name", sorted({path.stem for _, path in PRODUCT if not path.stem.startswith("__")}))
def test_no_module_shadows_the_standard_library(name: str) -> None:
    """From a checkout, `rlkit/` may stand on sys.path: `python rlkit/cli.py` or a debugger put it there."""
    assert name not in sys.stdlib_module_names


def test_dependencies_cover_the_imports() -> None:
    """Everything that the product imports, at its top or later, is a dependency or an extra."""
    project = pyproject()["project"]
    extras = project["optional-dependencies"].values()
    listed = {
        re.split(r"[\[<>=!~; ]", str(requirement))[0].lower()
        for group in [project["dependencies"], *extras]
        for requirement in group
    }
    distributions = {"yaml": "pyyaml", "annotated_types": "annotated-types", "stable_baselines3": "stable-baselines3"}
    distributions["imageio_ffmpeg"] = "imageio-ffmpeg"
    used = {module.partition(".")[0] for _, path in PRODUCT for module, _ in imports(path)}
    foreign = used - set(sys.stdlib_module_names) - {"rlkit", ""}
    assert {distributions.get(name, name) for name in foreign} <= listed
