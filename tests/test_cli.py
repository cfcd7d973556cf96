"""The command line: every command on one small run, in this process where a process of its own would show no more."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import fingerprint, rlkit_command, run_rlkit
from scipy import stats

import rlkit
from rlkit import doctor, rendering
from rlkit.cli import main
from rlkit.config import load_file
from rlkit.metrics import read_jsonl

STEPS = 210  # one episode of Pendulum and a little
QUICK = ["--policy_kwargs.net_arch", "8", "8", "--batch_size", "8", "--learning_starts", "150", "--buffer_size", "300"]
QUIET = [*QUICK, "--eval_episodes", "0", "--tensorboard", "false"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run of the embedded task in a folder with a space and letters beyond ASCII, and what the process printed."""
    folder = tmp_path_factory.mktemp("cli") / "erster Lauf ä"
    every = ["--log_every", "70", "--checkpoint_every", "70", "--eval_every", "105", "--eval_episodes", "1"]
    done = run_rlkit("train", "sac", "--steps", str(STEPS), "--out", str(folder), *QUICK, *every)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture
def run(trained: tuple[Path, Any]) -> Path:
    return trained[0]


# --- without torch -------------------------------------------------------------------------------------------------


def test_help_version_list_and_mistakes_import_nothing_heavy() -> None:
    """They answer at once because torch, gymnasium and numpy stay unloaded."""
    code = """
import sys
from rlkit.cli import main
codes = []
for args in (["--help"], ["--version"], ["list"], ["trian"], ["eval"], ["train"], ["train", "--help"], []):
    try:
        codes.append(main(args))
    except SystemExit as end:
        codes.append(end.code or 0)
print(codes, [m for m in ("torch", "gymnasium", "numpy", "pydantic", "matplotlib") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 2, 2, 2, 0, 0] []"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"rlkit {rlkit.__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    for command in ("list", "train", "resume", "eval", "plot", "video", "export", "bench", "doctor"):
        assert re.search(rf"^  {command} +\w", out, re.MULTILINE)
        with contextlib.suppress(SystemExit):
            main([command, "--help"])
        assert f"usage: rlkit {command}" in capsys.readouterr().out


def test_list_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAME", "STATUS", "TRAINS", "ON", "PAPER"]
    (sac,) = (row for row in rows if row.startswith("sac "))
    assert sac[head.index("STATUS") :].startswith("reproduced ")
    assert sac[head.index("TRAINS") :].startswith("Box-action environments, online ")
    assert sac[head.index("PAPER") :].endswith("arXiv:1812.05905")


@pytest.mark.skipif(sys.platform == "win32", reason="no broken pipes")
def test_a_reader_that_goes_away_is_no_error() -> None:
    """`rlkit list | head -1`."""
    process = subprocess.Popen(rlkit_command("list"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, b"")


def test_the_installed_command_is_the_same() -> None:
    script = Path(sys.executable).with_name("rlkit")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"rlkit {rlkit.__version__}\n")


# --- train ---------------------------------------------------------------------------------------------------------


def test_training_in_a_pipe_prints_plain_lines(trained: tuple[Path, Any]) -> None:
    """First the task, the device, the environment and the memory planned; then progress; then before and after."""
    folder, done = trained
    lines = done.stdout.splitlines()
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    assert lines[0] == "no task given: the embedded one, Pendulum-v1 for 210 steps"
    assert lines[1] == f"sac: device cpu, float32, seed 0, folder {folder}"
    assert lines[2] == "environment: 1 x Pendulum-v1, observations 3, actions 1"
    assert lines[3].startswith("buffer: 300 rows x 38 B = 11.4 kB (obs 3 float32, action 1 float32, ")
    assert [line.split()[1] for line in lines[4:-3] if "evaluation" not in line] == ["70/210", "140/210", "210/210"]
    assert [line.split()[1] for line in lines[4:-3] if "evaluation" in line] == ["0/210", "105/210", "210/210"]
    assert re.fullmatch(r"evaluation before \(step 0\): return -\d+\.\d \(n=1, no interval\)", lines[-3])
    assert re.fullmatch(r"evaluation after \(step 210\): return -\d+\.\d \(n=1, no interval\)", lines[-2])
    assert lines[-1] == f"run folder: {folder}"


def test_what_a_run_folder_holds(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "metrics.csv", "eval.jsonl", "tb", "checkpoints"}
    assert [path.name for path in (run / "tb").iterdir() if "tfevents" in path.name]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-0000000140", "step-0000000210"]

    metrics = read_jsonl(run / "metrics.jsonl")
    assert [record["step"] for record in metrics] == [70, 140, 210]
    assert all({"time/fps", "time/time_elapsed", "time/total_timesteps"} <= set(record) for record in metrics)
    last = metrics[-1]
    assert last["time/total_timesteps"] == 210
    assert last["rollout/ep_len_mean"] == 200
    assert -2000 < last["rollout/ep_rew_mean"] < 0
    assert last["train/learning_rate"] == 1e-3
    assert last["train/n_updates"] == pytest.approx(60, abs=1)  # of steps 151 to 210; the last may follow the record
    names = {"train/actor_loss", "train/critic_loss", "train/ent_coef", "train/ent_coef_loss"}
    assert all(math.isfinite(last[name]) for name in names)

    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["70", "140", "210"]
    assert set(rows[0]) == {name for record in metrics for name in record}
    assert [float(rows[-1][name]) for name in sorted(names)] == [last[name] for name in sorted(names)]
    assert rows[0]["train/actor_loss"] == "", "nothing was recorded then"

    evaluations = read_jsonl(run / "eval.jsonl")
    assert [record["step"] for record in evaluations] == [0, 105, 210]
    assert all(record["eval/mean_reward"] == record["eval/returns"][0] for record in evaluations)


def test_a_run_is_reproduced_by_its_configuration(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`train --config RUN/config.yaml` needs nothing else, and the numbers are the same bit for bit."""
    again = tmp_path / "again"
    assert main(["train", "--config", str(run / "config.yaml"), "--out", str(again)]) == 0
    assert fingerprint(again) == fingerprint(run)
    assert (again / "config.yaml").read_bytes() == (run / "config.yaml").read_bytes()

    assert main(["plot", str(run), str(again), "--out", str(tmp_path / "both.png")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "both.png")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("spelling", [["--config", "{}"], ["--config={}"]], ids=["separate", "with ="])
def test_default_preset_file_command_line(spelling: list[str], tmp_path: Path) -> None:
    """Each over the one before, section by section; the file names the trainer and the steps, too."""
    file = tmp_path / "mine.yaml"
    file.write_text(
        "trainer: sac\nenv: Pendulum-v1\npreset: auto\nsteps: 1e1\ngamma: 0.9\nbatch_size: 16\nent_coef: 0.2\n"
        "policy_kwargs: {net_arch: [4], activation_fn: tanh}\n"
    )
    config = [text.format(file) for text in spelling]
    more = ["--batch_size", "32", "--policy_kwargs.net_arch", "8", "--eval_episodes", "0", "--no-tensorboard"]
    assert main(["train", *config, *more, "--out", str(tmp_path / "run")]) == 0
    written = load_file(tmp_path / "run" / "config.yaml")
    assert written["tau"] == 0.005  # default
    assert written["learning_rate"] == 1e-3  # preset of Pendulum-v1
    assert written["gamma"] == 0.9  # file
    assert written["ent_coef"] == 0.2
    assert written["steps"] == 10
    assert written["batch_size"] == 32  # command line over file
    assert written["policy_kwargs"] == {
        "net_arch": [8], "activation_fn": "tanh", "n_critics": 2, "layer_norm": False, "dropout": 0.0,
    }  # fmt: skip

    other = ["--steps", "12", "--learning_rate", "0.01", "--seed", "5", "--out", str(tmp_path / "other")]
    assert main(["train", "sac", *config, *more, *other]) == 0
    written = load_file(tmp_path / "other" / "config.yaml")
    assert (written["steps"], written["seed"], written["learning_rate"]) == (12, 5, 0.01)


def test_presets(capsys: pytest.CaptureFixture[str]) -> None:
    """`auto` takes the fields of the environment, also of another version of it; without any it says so."""
    make: Any = rlkit.SAC.make_config
    assert make({"env": "HalfCheetah-v5", "preset": "auto"}).learning_starts == 10_000
    assert make({"env": "HalfCheetah-v4", "preset": "auto"}).learning_starts == 10_000
    assert make({"env": "HalfCheetah-v5", "preset": "auto", "learning_starts": 7}).learning_starts == 7
    redq = make({"env": "Hopper-v5", "preset": "redq", "policy_kwargs": {"layer_norm": True}})
    assert (redq.target_critics, redq.policy_kwargs.n_critics, redq.policy_kwargs.layer_norm) == (2, 10, True)
    assert capsys.readouterr().err == ""
    assert dataclasses.replace(make({"env": "Reacher-v5", "preset": "auto"}), preset=None) == make(
        {"env": "Reacher-v5"}
    )
    assert "no preset for Reacher-v5: using the defaults" in capsys.readouterr().err


def test_without_out_every_run_gets_a_folder_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for _ in range(2):
        assert main(["train", "sac", "--env", "Pendulum-v1", "--seed", "3", "--steps", "5", *QUIET]) == 0
        said.append(capsys.readouterr().out.splitlines()[-1])
    folders = sorted(Path("runs").iterdir())
    assert sorted(said) == [f"run folder: {folder}" for folder in folders]
    assert all(re.match(r"sac-Pendulum-v1-seed3-\d{8}-\d{6}", folder.name) for folder in folders)
    assert len(folders) == 2


def test_an_environment_of_another_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`module:Id` imports the module, which registers it; observations are a nested Dict, flattened: 1 + 1 + 1."""
    run = str(tmp_path / "run")
    assert main(["train", "sac", "--env", "cli_envs:DictCounter-v0", "--steps", "30", "--out", run, *QUIET]) == 0
    assert "1 x cli_envs:DictCounter-v0, observations 3, actions 2" in capsys.readouterr().out
    assert load_file(tmp_path / "run" / "config.yaml")["env"] == "cli_envs:DictCounter-v0"
    assert main(["eval", run, "--episodes", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["returns"]) == 3


# --- the other commands --------------------------------------------------------------------------------------------


def evaluation(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[str, dict[str, Any]]:
    """The line for people and the object of `rlkit eval ARGS --json`."""
    assert main(["eval", *args, "--json"]) == 0
    *_, line, last = capsys.readouterr().out.splitlines()
    return line, json.loads(last, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_eval(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, result = evaluation(capsys, str(run), "--episodes", "4", "--seed", "7")
    assert set(result) == {"mean", "std", "ci95", "episodes", "returns"}
    returns = result["returns"]
    assert (len(returns), result["episodes"]) == (4, 4)
    mean, std = statistics.mean(returns), statistics.stdev(returns)
    assert result["mean"] == pytest.approx(mean)
    assert result["std"] == pytest.approx(std)
    low, high = stats.t.interval(0.95, 3, loc=mean, scale=std / 2)
    assert result["ci95"] == pytest.approx([low, high])
    assert line == f"return {mean:.1f} ± {std:.1f} (n=4, 95 % interval {low:.1f} to {high:.1f})"

    checkpoint = run / "checkpoints" / "step-0000000210"
    assert evaluation(capsys, str(checkpoint), "--episodes", "4", "--seed", "7") == (line, result)
    _, other = evaluation(capsys, str(run), "--episodes", "4", "--seed", "8")
    assert other["returns"] != returns


def test_eval_of_one_episode_has_no_interval(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, result = evaluation(capsys, str(run), "--episodes", "1")
    assert (result["std"], result["ci95"], result["episodes"]) == (None, [None, None], 1)
    assert result["returns"] == [result["mean"]]
    assert line == f"return {result['mean']:.1f} (n=1, no interval)"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no POSIX locale")
def test_a_locale_without_unicode(run: Path) -> None:
    """The figure with its `±`, of a run whose path is no ASCII."""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_rlkit("eval", str(run), "--episodes", "2", env=plain)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"return -\d+\.\d \\xb1 \d+\.\d \(n=2, .*\)\n", done.stdout)


def test_resume_finishes_or_extends(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert main(["resume", str(copy)]) == 0
    assert capsys.readouterr().out == f"{copy} is finished: step 210. `--steps N` goes on to a larger total.\n"
    assert fingerprint(copy) == fingerprint(run)

    assert main(["resume", str(copy), "--steps", "2.2e2"]) == 0
    assert "schedules keep the horizon they started with, 210 steps" in capsys.readouterr().out
    assert load_file(copy / "config.yaml")["steps"] == 220
    assert [record["step"] for record in read_jsonl(copy / "eval.jsonl")] == [0, 105, 210, 220]


def test_plot_draws_into_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'learning-curve.png'}\n"
    assert (run / "learning-curve.png").read_bytes().startswith(b"\x89PNG")


def test_bench_of_a_checkout_lists_its_suites(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    assert re.search(r"^sac-returns +\w", capfd.readouterr().out, re.MULTILINE)


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--determinism"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"rlkit {rlkit.__version__}, Python {sys.version.split()[0]}, ")
    for fact in ("packages: torch ", "gymnasium ", "mujoco ", "processor: ", "cuda", "optional wandb: "):
        assert fact in out
    assert "absent" not in next(line for line in out.splitlines() if line.startswith("packages: "))
    assert re.search(r"determinism: two runs of 300 SAC steps are the same, bit for bit \((\w{12}), \1\)", out)
    lines = {line.split(":")[0]: line for line in out.splitlines()}
    assert lines["threads"].startswith("threads: PyTorch uses 1, ")
    measured = re.search(r"products at float32 (\d+), bf16 (\d+) GFLOP/s: (.*)", lines["bf16"])
    assert measured is not None
    assert int(measured[1]) > 1
    advised = "--precision bf16" if int(measured[2]) > 1.2 * int(measured[1]) else "--precision float32"
    assert advised in measured[3] or int(measured[2]) == pytest.approx(1.2 * int(measured[1]), rel=0.05)
    assert lines["rendering"] == f"rendering: {rendering.describe()}"
    for package in ("wandb", "onnx", "onnxscript", "onnxruntime", "pytest"):
        assert re.search(rf"^optional {package}: \d", out, re.MULTILINE), "part of the extra `dev`"


def test_doctor_knows_the_compiler_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "my-c++"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert doctor.cxx() == f"compiler: {compiler}"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert doctor.cxx() == "compiler: no no-such-compiler, which `--compile on` needs on a CPU"
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (
        doctor.cxx()
        == f"compiler: no {'clang++' if sys.platform == 'darwin' else 'g++'}, which `--compile on` needs on a CPU"
    )
