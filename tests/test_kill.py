"""SIGKILL at any moment, SIGTERM in any phase: every resume ends where an uninterrupted run ends."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from helpers import fingerprint, rlkit_command, run_rlkit, wait_for

from rlkit import checkpoint
from rlkit.metrics import read_jsonl

SETTING = [
    "--env", "Pendulum-v1", "--n_envs", "2", "--policy_kwargs.net_arch", "8", "8", "--batch_size", "8",
    "--buffer_size", "2000", "--learning_starts", "20", "--eval_every", "400", "--eval_episodes", "1",
    "--log_every", "100", "--checkpoint_every", "40", "--tensorboard", "false", "--threads", "1",
]  # fmt: skip
ON_POLICY = [
    "--env", "Pendulum-v1", "--n_envs", "2", "--n_steps", "32", "--n_epochs", "2", "--normalize_obs", "true",
    "--reward", "normalize", *SETTING[SETTING.index("--eval_every"):],
]  # fmt: skip
RECORDED = [
    "--env", "rlkit/TwinThrust-v0", "--data", "rlkit.envs.coordination:twin_thrust_data", "--offline_steps", "600",
    *SETTING[SETTING.index("--n_envs"):],
]  # fmt: skip
PLANNED = [
    "--env", "rlkit/SlipperyGrid-v0", "--n_envs", "2", "--uncertainty", "tv_penalty", "--plan_every", "3",
    *SETTING[SETTING.index("--eval_every"):],
]  # fmt: skip
STEPS = 1600


def train(out: Path, *more: str, steps: int = STEPS, name: str = "sac", setting: list[str] = SETTING) -> list[str]:
    return rlkit_command("train", name, "--steps", str(steps), "--out", str(out), *setting, *more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("kill") / "whole"
    subprocess.run(train(out), check=True, capture_output=True)
    return out


def kill_until_finished(run: Path, kills: int, seed: int, command: list[str] | None = None) -> int:
    """Start the run, SIGKILL it at random moments `kills` times, let it finish; returns how many kills hit."""
    command = train(run) if command is None else command
    rng = random.Random(seed)
    hit = 0
    for attempt in range(kills + 1):
        known = (run / "config.yaml").exists()
        process = subprocess.Popen(
            rlkit_command("resume", str(run)) if known else command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        if attempt < kills:
            # Most of a short process is imports: wait for its first sign of work, then for a random part of the rest.
            before = len(read_jsonl(run / "metrics.jsonl")) if (run / "metrics.jsonl").exists() else 0
            end = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < end:
                lines = read_jsonl(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
                if len(lines) != before:
                    break
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 1.0))
            process.kill()
            hit += process.wait() == -signal.SIGKILL
            assert process.stderr is not None
            process.stderr.close()
        else:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors.decode()
    return hit


def test_five_kills_at_random_moments(whole: Path, tmp_path: Path) -> None:
    """A checkpoint every 40 steps makes many of the kills fall into the writing of one."""
    hit = kill_until_finished(tmp_path / "run", kills=5, seed=0)
    assert hit >= 1
    assert fingerprint(tmp_path / "run") == fingerprint(whole)


@pytest.mark.parametrize(
    ("name", "setting"),
    [("pmoe_ppo", ON_POLICY), ("arsq", RECORDED), ("dr_rpo", PLANNED)],
    ids=["rollouts", "recordings, then online", "plans"],
)
def test_kills_of_other_ways_to_collect(name: str, setting: list[str], tmp_path: Path) -> None:
    """In the middle of rollouts and epochs; while learning from recordings, and after; between plans."""
    subprocess.run(train(tmp_path / "whole", name=name, setting=setting), check=True, capture_output=True)
    command = train(tmp_path / "run", name=name, setting=setting)
    assert kill_until_finished(tmp_path / "run", kills=2, seed=0, command=command) >= 1
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 11))
def test_fifty_kills(whole: Path, tmp_path: Path, seed: int) -> None:
    """Ten runs of five kills each."""
    assert kill_until_finished(tmp_path / "run", kills=5, seed=seed) >= 1
    assert fingerprint(tmp_path / "run") == fingerprint(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_exit_code_75(number: signal.Signals, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(train(run), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (run / "metrics.jsonl").exists() and read_jsonl(run / "metrics.jsonl"))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert f"rlkit resume {run}" in errors
    assert "Traceback" not in errors
    finished = run_rlkit("resume", str(run))
    assert finished.returncode == 0, finished.stderr
    assert fingerprint(run) == fingerprint(whole)
    again = run_rlkit("resume", str(run))
    assert again.returncode == 0
    assert "finished" in again.stdout


def test_a_signal_before_the_first_step_is_obeyed_too(tmp_path: Path) -> None:
    """While environments and networks are made: as soon as the run's folder exists, or earlier."""
    run = tmp_path / "run"
    process = subprocess.Popen(train(run), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (run / "config.yaml").exists())
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    newest, _ = checkpoint.newest(run)
    assert newest.name.startswith("step-")


def test_ctrl_c_reaches_the_whole_group_and_leaves_no_process(tmp_path: Path) -> None:
    """A terminal sends SIGINT to worker processes, too: they still answer for the checkpoint, then end."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        train(run, "--vectorization_mode", "async"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: (run / "metrics.jsonl").exists() and read_jsonl(run / "metrics.jsonl"), seconds=120)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
    resumed = run_rlkit("resume", str(run))
    assert resumed.returncode == 0, resumed.stderr
    assert "reset" not in resumed.stderr
    assert checkpoint.newest(run)[0].name == f"step-{STEPS:010d}"


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    """During an endless evaluation step nothing is polled; the second signal does not wait for it."""
    script = tmp_path / "stuck.py"
    script.write_text(
        "import time, gymnasium as gym, rlkit\n"
        "class Slow(gym.Wrapper):\n"
        "    def step(self, action):\n"
        "        print('stepping', flush=True)\n"
        "        end = time.monotonic() + 60\n"
        "        while time.monotonic() < end: time.sleep(0.05)\n"
        "        return self.env.step(action)\n"
        "rlkit.SAC([lambda: Slow(gym.make('Pendulum-v1'))], buffer_size=100).learn(10)\n"
    )
    import sys

    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "stepping"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
    process.stdout.close()
    process.stderr.close()  # type: ignore[union-attr]
