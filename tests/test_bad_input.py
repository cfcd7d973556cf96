"""Wrong use -> a message that names what is wrong and what to do, from Python and from the command line.

`test_config.py`, `test_envs.py`, `test_rewards.py` and `test_checkpoint.py` go through the rows of each part; here they
arrive through the doors that users take: the trainer's class and `rlkit ...`, whose exit code says whose fault it was.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from env_zoo import Broken, Spaces, Walk, discrete
from gymnasium.spaces import Box, Discrete
from helpers import TINY, close, fingerprint, run_rlkit

import rlkit
from rlkit.cli import main
from rlkit.errors import CheckpointError, EnvError, RlkitError, UserError
from rlkit.rewards.text import RewardError

SMALL: dict[str, Any] = {**TINY, "eval_episodes": 0}


def sac(env: Any = "Pendulum-v1", *args: Any, **fields: Any) -> Any:
    return rlkit.SAC(env, *args, **{**SMALL, **fields})


# --- Python --------------------------------------------------------------------------------------------------------

IMAGE = Box(0, 255, (96, 96, 3), np.uint8)

PYTHON: dict[str, tuple[Callable[[], Any], str]] = {
    # environments
    "id": (lambda: sac("Pendulm-v1"), "unknown environment `Pendulm-v1`; did you mean `Pendulum-v1`?"),
    "version": (lambda: sac("Pendulum-v9"), "unknown environment `Pendulum-v9`; did you mean `Pendulum-v1`?"),
    "none": (lambda: sac(None), "`env`: sac needs an environment: a gymnasium id such as `Pendulum-v1`, or an object"),
    "number": (lambda: sac(42), "env: expected an id, a gymnasium.Env, a list of thunks, "),
    "function": (lambda: sac(discrete), "got a callable; put it into a list: [make_env]"),
    "discrete actions": (lambda: sac("CartPole-v1"), "SAC needs `Box` actions, got `Discrete(2)`"),
    "discrete actions of an object": (lambda: sac([discrete]), "SAC needs `Box` actions, got `Discrete(3)`"),
    "unbounded actions": (
        lambda: sac([lambda: Spaces(action=Box(-np.inf, np.inf, (2,), np.float32))]),
        "action space is Box(-inf, inf, (2,), float32), unbounded in dimension 0; give it finite bounds: "
        "env = gymnasium.wrappers.TransformAction(",
    ),
    "discrete observations": (
        lambda: sac([lambda: Spaces(observation=Discrete(4))]),
        "observation is Discrete(4); supported are `Box` and (nested) `Dict` of `Box`: wrap the environment with "
        "gymnasium.wrappers.FlattenObservation",
    ),
    "images": (
        lambda: sac([lambda: Spaces(observation=IMAGE)]),
        "observation is an image, Box(0, 255, (96, 96, 3), uint8): images are not supported yet; `Box` vectors and "
        "`Dict`s of them are",
    ),
    "env_kwargs": (
        lambda: sac(env_kwargs={"gravity": 3}),
        "env_kwargs: `Pendulum-v1` has no parameter `gravity`; known: ",
    ),
    "another n_envs than the vector's": (
        lambda: sac(gym.make_vec("Pendulum-v1", num_envs=2), n_envs=3),
        "n_envs: 3 conflicts with the VectorEnv, which has 2; leave n_envs away",
    ),
    "an object in worker processes": (
        lambda: sac(gym.make("Pendulum-v1"), vectorization_mode="async"),
        'an environment object cannot move to a worker process: give a list of thunks for "async"',
    ),
    # the call
    "policy name": (
        lambda: sac("MlpPolicy", "Pendulum-v1"),
        'rlkit trainers take the environment first and no policy name: rlkit.SAC("HalfCheetah-v5", batch_size=256); '
        "networks are set by `policy_kwargs`",
    ),
    "policy name and an object": (lambda: sac("MlpPolicy", Walk()), 'no policy name: rlkit.SAC("HalfCheetah-v5", '),
    "policy name alone": (lambda: sac("MultiInputPolicy"), 'no policy name: rlkit.SAC("HalfCheetah-v5", '),
    "config and fields": (
        lambda: rlkit.SAC("Pendulum-v1", config=rlkit.SAC.make_config({}), gamma=0.9),
        "give either `config` or fields, not both (got gamma)",
    ),
    "another trainer's config": (
        lambda: rlkit.SAC("Pendulum-v1", config={"gamma": 0.9}),
        "`config`: SAC needs a SACConfig, got dict",
    ),
    # fields
    "unknown field": (lambda: sac(learning_ratee=1e-4), "unknown key `learning_ratee`; did you mean `learning_rate`?"),
    "unknown field of a section": (
        lambda: sac(policy_kwargs={"netarch": [64]}),
        "unknown key `netarch` under `policy_kwargs`; did you mean `net_arch`?",
    ),
    "batch_size": (lambda: sac(batch_size=0), "`batch_size`: got 0; allowed: an integer >= 1"),
    "gamma": (lambda: sac(gamma=1.5), "`gamma`: got 1.5; allowed: a number >= 0 and <= 1"),
    "width of a layer": (
        lambda: sac(policy_kwargs={"net_arch": [0]}),
        "`policy_kwargs.net_arch`: got [0]; allowed: a list (each an integer >= 1) or a mapping with pi, qf",
    ),
    "preset": (lambda: sac(preset="droqq"), "`preset`: unknown `droqq`; did you mean `droq`?"),
    "device": (lambda: sac(device="gpu"), "`device`: got 'gpu'; allowed: auto, cpu, cuda, cuda:N"),
    # fields that conflict
    "more target critics than critics": (
        lambda: sac(target_critics=3),
        "`target_critics`: got 3, but `policy_kwargs.n_critics` is 2",
    ),
    "reversed bounds": (
        lambda: sac(log_std_bounds=(2, -20)),
        "`log_std_bounds`: got 2.0, -20.0; the first must be below the second",
    ),
    # rewards
    "reward": (
        lambda: sac(reward=["scal=0.1"]),
        "unknown reward `scal=0.1`, and no `module:function`; did you mean `scale`?",
    ),
    "reward argument": (lambda: sac(reward="clip=5,1"), "reward `clip=5,1`: clip needs low < high, got 5.0 and 1.0"),
    "reward module": (lambda: sac(reward="no_such_module:f"), "No module named 'no_such_module'"),
    "reward returns one value for four rows": (
        lambda: sac(n_envs=4, reward=[only_one]).learn(4),
        "reward `only_one` returned 1, expected 4 (one value a row)",
    ),
    "reward is not a number": (
        lambda: sac(n_envs=2, reward=[second_is_nan]).learn(2),
        "reward `second_is_nan` returned nan for row 1; rewards must be finite",
    ),
    "reward is None": (
        lambda: sac(reward=[lambda rewards, **_: [None]]).learn(1),
        "reward `<lambda>` returned None for row 0; a transition needs a number",
    ),
    # learning, predicting, evaluating
    "no steps": (lambda: sac().learn(0), "`total_timesteps`: got 0; allowed: an integer >= 1"),
    "half steps": (lambda: sac().learn(1.5), "`total_timesteps`: got 1.5; allowed: an integer >= 1"),
    "callback": (
        lambda: sac().learn(1, callback="eval"),
        "`callback`: expected a function of the trainer, a callback of Stable-Baselines3",
    ),
    "observation": (
        lambda: sac().predict(np.zeros(4)),
        "observation: expected shape (3,), or (n, *(3,)) for a batch, got (4,)",
    ),
    "evaluation of an object": (
        lambda: sac(Walk()).evaluate(1),
        "evaluation needs an environment of its own: pass `eval_env=` (a function that makes one)",
    ),
    "episodes": (lambda: sac().evaluate(0), "`episodes`: got 0; at least 1 is needed"),
}


def only_one(rewards: np.ndarray, **columns: Any) -> list[float]:
    return [float(rewards.sum())]


def second_is_nan(rewards: np.ndarray, **columns: Any) -> list[float]:
    return [0.0, float("nan")]


@pytest.mark.parametrize("case", PYTHON)
def test_python(case: str) -> None:
    call, message = PYTHON[case]
    with pytest.raises(UserError) as error:
        call()
    assert message in str(error.value)
    assert isinstance(error.value, ValueError), "what `except ValueError` expects"


def test_a_device_that_is_not_there() -> None:
    """No machine has a hundredth GPU."""
    message = f"`device`: 'cuda:99' is not available: this PyTorch sees {torch.cuda.device_count()} CUDA devices"
    with pytest.raises(UserError, match=re.escape(message)):
        sac(device="cuda:99")


def test_an_absent_extra_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))
    with pytest.raises(UserError, match=re.escape('wandb is not installed; run: pip install "rlkit-trainers[wandb]"')):
        sac(wandb=True).learn(1)


def test_a_buffer_that_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """38 B a transition: obs and next_obs 3 x 4 each, action, reward and discount 4 each, two flags 1 each."""
    with pytest.raises(UserError, match=r"^`buffer_size` 1,000,000,000,000 rows x 38 B needs 38 TB, limit .*B; larg"):
        sac(buffer_size=1e12)
    monkeypatch.setenv("RLKIT_MEMORY_LIMIT", "100000")
    with pytest.raises(UserError, match=r"needs 38 TB, limit 100 kB; largest that fits: 2,630$"):  # 100,000 / 38
        sac(buffer_size=1e12)
    sac(buffer_size=2630)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan_obs", r"env 0, step \d+, obs\[1\] = nan"),
        ("inf_reward", r"env 0, step \d+, reward = -inf"),
        ("raises", r"environment 0.*the robot fell off the table"),
        ("four", r"environment 0: `step` must return"),
    ],
)
def test_what_environments_do_wrong(how: str, message: str) -> None:
    """Nothing of the bad step reaches the buffer."""
    agent = sac([lambda: Broken(how)])
    with pytest.raises(EnvError, match=message):
        agent.learn(10)
    assert len(agent.buffer) == 2


# --- the command line ----------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *args: str, code: int = 2) -> str:
    """The one message of `rlkit ARGS`, which fails with `code` and leaves no file behind."""
    before = sorted(Path.cwd().rglob("*"))
    assert main(args) == code
    assert sorted(Path.cwd().rglob("*")) == before, "files were left behind"
    err = capsys.readouterr().err
    assert err.startswith("error: "), err
    assert err.count("error: ") == 1
    return err.removeprefix("error: ").removesuffix("\n")


TRAIN = ["train", "sac", "--env", "Pendulum-v1", "--steps", "10"]

COMMAND_LINE: dict[str, tuple[list[str], str]] = {
    "command": (["trian", "sac"], "unknown command `trian`; did you mean `train`?"),
    "option of rlkit": (["--versoin"], "unknown option `--versoin`; did you mean `version`? (see `rlkit --help`)"),
    "trainer": (["train", "sacc"], "unknown trainer `sacc`; did you mean `sac`? (`rlkit list` shows all)"),
    "no trainer": (["train", "--env", "Pendulum-v1"], "which trainer? `rlkit train TRAINER ...`; `rlkit list` shows"),
    "option": (
        [*TRAIN, "--learning_ratee", "1e-4"],
        "unknown option `--learning_ratee`; did you mean `learning_rate`? (see `rlkit train sac --help`)",
    ),
    "option with a value": ([*TRAIN, "--gama=0.9"], "unknown option `--gama`; did you mean `gamma`?"),
    "option of a section": (
        [*TRAIN, "--policy_kwargs.netarch", "8"],
        "unknown option `--policy_kwargs.netarch`; did you mean `policy_kwargs.net_arch`?",
    ),
    "an argument too many": (["list", "sac"], "unexpected `sac` (see `rlkit list --help`)"),
    "an option without its value": ([*TRAIN, "--gamma"], "argument --gamma: expected one argument"),
    "no run": (["eval"], "the following arguments are required: RUN (see `rlkit eval --help`)"),
    "environment": ([*TRAIN, "--env", "Pendulm-v1"], "unknown environment `Pendulm-v1`; did you mean `Pendulum-v1`?"),
    "environment's module": (
        [*TRAIN, "--env", "no_such_module:Env-v0"],
        "environment `no_such_module:Env-v0`: cannot import `no_such_module`: No module named 'no_such_module'",
    ),
    "discrete actions": ([*TRAIN, "--env", "CartPole-v1"], "SAC needs `Box` actions, got `Discrete(2)`"),
    "env_kwargs": (
        [*TRAIN, "--env_kwargs", "gravity=3"],
        "env_kwargs: `Pendulum-v1` has no parameter `gravity`; known: ",
    ),
    "buffer_size": ([*TRAIN, "--buffer_size", "1e12"], "rows x 38 B needs 38 TB, limit "),
    "batch_size": ([*TRAIN, "--batch_size", "0"], "`batch_size`: got 0; allowed: an integer >= 1"),
    "gamma": ([*TRAIN, "--gamma", "1.5"], "`gamma`: got 1.5; allowed: a number >= 0 and <= 1"),
    "gamma is a word": ([*TRAIN, "--gamma", "high"], "`gamma`: got 'high'; allowed: a number >= 0 and <= 1"),
    "width of a layer": (
        [*TRAIN, "--policy_kwargs.net_arch", "64", "0"],
        "`policy_kwargs.net_arch`: got [64, 0]; allowed: a list (each an integer >= 1)",
    ),
    "preset": ([*TRAIN, "--preset", "droqq"], "`preset`: unknown `droqq`; did you mean `droq`?"),
    "reward": ([*TRAIN, "--reward", "scal=0.1"], "unknown reward `scal=0.1`, and no `module:function`; did you mean"),
    "conflict": ([*TRAIN, "--target_critics", "3"], "`target_critics`: got 3, but `policy_kwargs.n_critics` is 2"),
    "device": ([*TRAIN, "--device", "gpu"], "`device`: got 'gpu'; allowed: auto, cpu, cuda, cuda:N"),
    **{
        f"steps {steps}": (["train", "sac", "--steps", steps], f"--steps: got {steps!r}; allowed: an integer >= 1")
        for steps in ("0", "-5", "1.5", "abc", "nan", "inf", "1e400", "")
    },
    "eval of nothing": (["eval", "nothing"], "nothing: no such folder; expected a run folder, a checkpoint or a saved"),
    "resume of nothing": (["resume", "nothing"], "nothing is not a run folder: it has no config.yaml"),
    "plot of nothing": (["plot", "nothing"], "nothing is not a run folder: it has no config.yaml"),
    "eval of a folder": (["eval", "."], ".: nothing to load; looked for manifest.json"),
    "episodes": (["eval", ".", "--episodes", "0"], "argument --episodes: got '0'; allowed: an integer >= 1"),
    "seed of an evaluation": (["eval", ".", "--seed", "-1"], "argument --seed: got '-1'; allowed: an integer >= 0"),
    "no file": (["train", "--config", "absent.yaml"], "cannot read the configuration absent.yaml: "),
    "no file's name": (["train", "--config"], "argument --config: expected one argument"),
}


@pytest.mark.parametrize("case", COMMAND_LINE)
def test_command_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    args, message = COMMAND_LINE[case]
    assert message in refused(capsys, *args)


def test_command_line_with_an_absent_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'cuda:99' is not available" in refused(capsys, *TRAIN, "--device", "cuda:99")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_ratee: 1e-4", "{file}: unknown key `learning_ratee`; did you mean `learning_rate`?"),
        ("policy_kwargs: {netarch: [8]}", "{file}: unknown key `netarch` under `policy_kwargs`; did you mean"),
        ("policy_kwargs: {net_arch: [0]}", "{file}: `policy_kwargs.net_arch`: got [0]; allowed: a list (each an int"),
        ("gamma: 1.5", "{file}: `gamma`: got 1.5; allowed: a number >= 0 and <= 1"),
        ("buffer_size: 1e12", "`buffer_size` 1,000,000,000,000 rows x 38 B needs 38 TB, limit "),
        ("trainer: ppo", "{file} is of the trainer `ppo`, not `sac`"),
        ("steps: 0", "{file}: `steps`: got '0'; allowed: an integer >= 1; or give `--steps N`"),
        ("steps: abc", "{file}: `steps`: got 'abc'; allowed: an integer >= 1; or give `--steps N`"),
        ("gamma: [1", "{file} is not valid YAML: "),
        ("- gamma", "{file}: expected a mapping of names to values, such as `learning_rate: 3e-4`"),
        ("gamma: 0.9\ngamma: 0.8", "repeated key `gamma`"),
        ("gamma: !!python/name:os.system", "{file} is not valid YAML: could not determine a constructor"),
        ("env: null", "`env`: sac needs an environment: a gymnasium id such as `Pendulum-v1`, or an object"),
    ],
)
def test_configuration_files(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path("mine.yaml")
    file.write_text(text + "\n")
    assert message.format(file=file) in refused(capsys, "train", "sac", "--config", str(file))


def test_a_file_without_a_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("gamma: 0.9", "trainer: 3", "{}"):
        Path("mine.yaml").write_text(text)
        assert "mine.yaml names no trainer: `rlkit train TRAINER" in refused(capsys, "train", "--config", "mine.yaml")
    Path("mine.yaml").write_text("trainer: sacc")
    assert "unknown trainer `sacc`; did you mean `sac`?" in refused(capsys, "train", "--config", "mine.yaml")


def test_a_run_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    for out in ("file", "file/run"):
        assert f"cannot write the run folder {out}: " in refused(capsys, *TRAIN, "--out", out)


def test_an_environment_that_fails_is_not_the_users_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1. The run folder stays: it holds what was learned before."""
    args = ["train", "sac", "--env", "cli_envs:Broken-v0", "--env_kwargs", "how=inf_reward", "--eval_episodes", "0"]
    assert main([*args, "--steps", "20"]) == 1
    assert re.search(r"^error: env 0, step \d+, reward = -inf", capsys.readouterr().err, re.MULTILINE)


# --- runs and saved folders ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 20 steps; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("bad") / "run"
    close(sac(out=str(folder)).learn(20))
    return folder


@pytest.fixture(scope="module")
def object_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a Python object and a Python reward, which no file can hold."""
    folder = tmp_path_factory.mktemp("bad") / "object"
    close(sac([Walk], reward=[lambda rewards, **_: rewards], out=str(folder)).learn(20))
    return folder


def test_out_of_an_existing_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = f"{run} already holds a run; go on with it by `rlkit resume {run}`, or choose another `--out`"
    with pytest.raises(UserError, match=re.escape(message)):
        sac(out=str(run))
    before = fingerprint(run)
    assert message == refused(capsys, *TRAIN, "--out", str(run))
    assert fingerprint(run) == before


def test_resume_to_a_smaller_total(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps in ("20", "1e1"):
        message = f"--steps {int(float(steps))}: the run is at 20 already; give a larger total"
        assert message == refused(capsys, "resume", str(run), "--steps", steps)
    assert "argument --steps: got '0'" in refused(capsys, "resume", str(run), "--steps", "0")


def test_resume_of_an_edited_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path("copy")
    shutil.copytree(run, copy)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 5"))
    message = refused(capsys, "resume", str(copy), "--steps", "30")
    assert re.search(r"field +saved -> given\n +seed +0 -> 5", message)
    assert re.search("--allow-changes|allow_changes=True", message)
    assert main(["resume", str(copy), "--steps", "30", "--allow-changes"]) == 0
    config.write_text(config.read_text().replace("gamma: ", "gama: "))
    assert "gama" in refused(capsys, "resume", str(copy))
    assert "unknown key `gama`; did you mean `gamma`?" in refused(capsys, "resume", str(copy), "--allow-changes")


def test_pickles_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Stable-Baselines3 archive, a file of `torch.save`, a bare pickle: none is opened."""
    with zipfile.ZipFile(tmp_path / "sac_pendulum.zip", "w") as archive:
        archive.writestr("data", "{}")
        archive.writestr("policy.pth", b"")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "model.pt")
    (tmp_path / "old.pkl").write_bytes(b"(dp0\n.")
    for name in ("sac_pendulum.zip", "model.pt", "old.pkl"):
        message = f"refused: {tmp_path / name} looks like a pickle, and a pickle can run code"
        for load in (rlkit.load, rlkit.SAC.load):
            with pytest.raises(CheckpointError, match=re.escape(message)):
                load(tmp_path / name)
        assert message in refused(capsys, "eval", str(tmp_path / name), code=1)


def test_a_run_on_an_object_from_the_command_line(object_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It cannot be evaluated, resumed or repeated there: the message says what to do, and the run stays as it is."""
    before = fingerprint(object_run)
    message = refused(capsys, "eval", str(object_run))
    assert "trained on an environment given in Python" in message
    assert f"rlkit.load('{object_run}', eval_env=make_env)" in message
    message = refused(capsys, "resume", str(object_run), "--steps", "40")
    assert "pass them again, SAC.load(folder, reward=[...])" in message or "pass it again" in message
    message = refused(capsys, "train", "--config", str(object_run / "config.yaml"))
    assert "`env`: sac needs an environment" in message
    assert fingerprint(object_run) == before


def test_objects_are_asked_for_in_python(object_run: Path) -> None:
    with pytest.raises(UserError, match=re.escape("SAC.load(folder, reward=[...])")):
        rlkit.load(object_run, env=[Walk]).learn(1)
    with pytest.raises(UserError, match=re.escape("SAC.load(folder, env=...)")):
        rlkit.load(object_run, reward=[lambda rewards, **_: rewards]).learn(1)
    with pytest.raises(UserError, match=r"pass `eval_env=`"):
        rlkit.load(object_run).evaluate(1)


def test_every_error_has_its_exit_code() -> None:
    """2 for wrong use; 1 for what failed underneath."""
    codes = {cls.__name__: cls.exit_code for cls in RlkitError.__subclasses__()}
    assert RewardError.__name__ in codes
    assert codes == {"UserError": 2, "EnvError": 1, "CheckpointError": 1, "DivergenceError": 1, "RewardError": 1}


@pytest.mark.parametrize("case", ["trainer", "environment", "device"])
def test_as_a_process(case: str) -> None:
    """No traceback, nothing on standard output but what was said before."""
    args, message = COMMAND_LINE[case]
    done = run_rlkit(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {message}")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
