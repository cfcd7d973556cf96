"""Several processes of a control trainer: one agent, whose environments, buffer and batches they divide."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from control_jobs import CASES, FIELDS, stepped, trained, updated
from helpers import fingerprint, finish, run_rlkit, torchrun, wait_for

import rlkit
from rlkit import checkpoint
from rlkit.errors import UserError
from rlkit.metrics import read_jsonl

JOBS = Path(__file__).parent / "control_jobs.py"


def job(name: str, folder: Path, n: int = 2) -> Path:
    """Run a job of `control_jobs.py` in `n` processes."""
    finish(torchrun(n, str(JOBS), name, str(folder)))
    return folder


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def computed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder of the job `compute`, and the number of its processes."""
    return job("compute", tmp_path_factory.mktemp("computed"), request.param), request.param


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process with four environments sees of the same run."""
    folder = tmp_path_factory.mktemp("alone")
    trained(folder)
    return json.loads((folder / "said0.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_of_one_process_on_the_whole_batch(computed: tuple[Path, int], case: str) -> None:
    """Six updates of critics, actor, temperature and targets, rows and noise given: equal up to float32 rounding."""
    one, found = updated(case), json.loads((computed[0] / "computed.json").read_text())[case]
    assert found["weights"].keys() == one["weights"].keys()
    for name, values in one["weights"].items():
        np.testing.assert_allclose(found["weights"][name], values, rtol=0, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(found["moments"], one["moments"], rtol=0, atol=1e-6)
    assert np.abs(one["moments"]).max() > 0.1
    for theirs, ours in zip(found["means"], one["means"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5, abs=1e-6)


def test_a_normalised_reward_has_the_variance_of_all_environments(computed: tuple[Path, int]) -> None:
    """Its running moments are to the last bit those of one process; only a step's own values may be missing in it."""
    rewards, state = stepped()
    found = json.loads((computed[0] / "computed.json").read_text())["stepped"]
    assert found["state"] == state
    assert state["count"] == 60 * 4 - 12
    late = slice(len(rewards) // 2, None)
    np.testing.assert_allclose(found["rewards"][late], rewards[late], rtol=0.05)


def test_the_clock_counts_all_and_each_has_its_own_part(computed: tuple[Path, int], alone: dict[str, Any]) -> None:
    """Budget, warm-up and owed updates go by all steps; environments are those of one process, draws are not shared."""
    folder, n = computed
    said = [json.loads((folder / f"said{rank}.json").read_text()) for rank in range(n)]
    for one in said:
        assert one["processes"] == n
        assert (one["clock"], one["updates"]) == (alone["clock"], alone["updates"])
        assert one["capacity"] == 1200 // n
        assert len(one["rows"]["obs"]) == 900 // n
    own = 4 // n
    first = [row for one in said for row in one["rows"]["obs"][:own]]
    assert first == alone["rows"]["obs"][:4], "environments are numbered, and seeded, through all processes"
    actions = [one["rows"]["action"] for one in said]
    assert all(actions[i] != actions[j] for i in range(n) for j in range(i))
    assert said[0]["streams"] == alone["streams"]
    for name in ("warmup", "explore", "sample", "noise"):
        assert len({one["streams"][name] for one in said}) == n, name


def test_statistics_are_of_all_rows(computed: tuple[Path, int]) -> None:
    """Moments of observations, episodes of the log, evaluations: the same in all processes, made of what each has."""
    folder, n = computed
    said = [json.loads((folder / f"said{rank}.json").read_text()) for rank in range(n)]
    for key in ("normalizer", "record", "evaluation"):
        assert all(one[key] == said[0][key] for one in said), key
    rows = np.concatenate([one["rows"]["obs"] for one in said])
    statistics = said[0]["normalizer"]
    assert statistics["count"] == 900
    np.testing.assert_allclose(statistics["mean"], rows.mean(0), rtol=1e-9)
    np.testing.assert_allclose(statistics["var"], rows.var(0), rtol=1e-9)
    own = 4 // n  # rows come environment by environment; each has ended one episode of 200 steps
    returns = [sum(one["rows"]["reward"][env : 200 * own : own]) for one in said for env in range(own)]
    assert said[0]["record"]["rollout/ep_rew_mean"] == pytest.approx(np.mean(returns), rel=1e-6)
    assert said[0]["record"]["rollout/ep_len_mean"] == 200


def test_processes_agree_on_counts_errors_and_callbacks(tmp_path: Path) -> None:
    """An error of one ends all, with its text; one that all have is said by the main one alone."""
    job("agree", tmp_path)
    main, other = (json.loads((tmp_path / f"said{rank}.json").read_text()) for rank in (0, 1))
    texts = [said.partition(": ")[2] for said in main]
    assert texts[0].startswith("all processes have to take part in this, and the main one alone")
    assert texts[1] == texts[2] == "process 1: a mistake"
    assert texts[3] == "`batch_size`: 31 cannot be divided equally among 2 processes; give 30 or 32"
    assert texts[4] == "`buffer_size`: 1 cannot be divided equally among 2 processes; give 2"
    assert texts[5].startswith("`seed`: process 1 has 1, process 0 has 0")
    assert texts[6].startswith("process 1: environment 2 raised ValueError in step, step 10 of its episode")
    assert "a broken joint" in texts[6]
    assert texts[7] == "a mistake"
    for text, value in zip(texts[8:], ("nan", "inf"), strict=True):
        assert text.startswith(f"train/critic_loss is {value} at update 19 (step 62) in process 1; the optimiser step")
    assert [said.partition(": ")[2] for said in other] == texts
    assert all(", of all: " in said for said in other), "the second process has nothing of its own to say"
    for name in ("diverged nan", "diverged 1e+23"):
        (dump,) = (tmp_path / name).glob("diverged-*")
        assert checkpoint.load(dump)[0]["batch"]["reward"].shape == (6,)
    full = json.loads((tmp_path / "full0.json").read_text())
    assert "cannot write the last checkpoint" in full
    assert "process 1: [Errno 27] File too large" in full


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if i == 0 else pytest.mark.slow) for i, name in enumerate(FIELDS)]
)
def test_runs_stop_together_and_resume_bit_for_bit(tmp_path: Path, case: str) -> None:
    """After signals to the main process and to the other one; and what one process can do with the run's folder."""
    (tmp_path / "case").write_text(case)
    job("stop_and_resume", tmp_path)
    whole, run = json.loads((tmp_path / "prints.json").read_text())
    assert run == whole

    folder = tmp_path / "run"
    with pytest.raises(
        UserError, match=r"(?s)is of 2 processes.*this is one process.*torchrun --nproc_per_node 2 -m rlkit"
    ):
        rlkit.resume(folder)
    last = read_jsonl(folder / "eval.jsonl")[-1]
    agent: Any = rlkit.load(folder, inference=True)
    assert agent.evaluate(1)["eval/returns"] == last["eval/returns"]
    if case == next(iter(FIELDS)):
        assert run_rlkit("eval", str(folder), "--episodes", "1").returncode == 0
        assert run_rlkit("plot", str(folder)).returncode == 0


def train(out: Path) -> list[str]:
    options = {
        "env": "Pendulum-v1", "n_envs": 2, "policy_kwargs.net_arch": 8, "batch_size": 8, "buffer_size": 2000,
        "learning_starts": 20, "eval_every": 400, "eval_episodes": 1, "log_every": 100, "checkpoint_every": 40,
        "tensorboard": "false", "compile": "on", "steps": 1200, "out": out,
    }  # fmt: skip
    return torchrun(2, "-m", "rlkit", "train", "sac", *(t for k, v in options.items() for t in (f"--{k}", str(v))))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    said = finish(train(out))
    assert said.count("`compile`: updates of several processes, which exchange gradients, run eagerly") == 1
    assert said.count("sac: device cpu, float32, seed 0") == 1
    assert "processes: 2, each has 4 of `batch_size` and 1,000 of `buffer_size`" in said
    return out


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_kill_of_one_process_ends_all_and_costs_what_came_after_the_checkpoint(
    whole: Path, tmp_path: Path, rank: int
) -> None:
    """The other process notices at once, says so and ends; the resumed run ends as one that was never killed."""
    run = tmp_path / "run"
    with subprocess.Popen(
        train(run), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        wait_for(lambda: len(list((run / "checkpoints").glob("step-*"))) > 0 or process.poll() is not None)
        assert process.poll() is None, process.communicate()[0]
        workers = sorted(psutil.Process(process.pid).children(), key=lambda p: int(p.environ()["RANK"]))
        assert len(workers) == 2
        workers[rank].kill()
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.count("lost touch with the other processes: one of them has ended") == 1
    assert not any(worker.is_running() for worker in workers)
    newest, _ = checkpoint.newest(run)
    assert checkpoint.verify(newest) is None
    assert {"buffer-1.safetensors", "state-1.json"} <= {path.name for path in newest.iterdir()}
    finish(torchrun(2, "-m", "rlkit", "resume", str(run)))
    assert fingerprint(run) == fingerprint(whole)


@pytest.mark.slow
def test_two_processes_learn_the_pendulum(tmp_path: Path) -> None:
    """From falling about to swinging up and holding."""
    job("learn", tmp_path)
    returns = [record["eval/mean_reward"] for record in read_jsonl(tmp_path / "run" / "eval.jsonl")]
    assert returns[0] < -900
    assert returns[-1] > -300
