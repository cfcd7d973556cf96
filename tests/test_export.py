"""Exported policies: the same actions without rlkit, in the environment's units, or no file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import env_zoo
import gymnasium as gym
import numpy as np
import onnxruntime
import pytest
import torch
from helpers import as_options
from lm_zoo import PAIRS, saved_llama
from torch import Tensor

import rlkit
from rlkit import export
from rlkit.cli import main
from rlkit.envs.spaces import flatten_obs, space_from_json
from rlkit.errors import RlkitError, UserError
from rlkit.export import TOLERANCE, Comparison, _compare, export_policy

SMALL: dict[str, Any] = {
    "policy_kwargs": {"net_arch": [16, 16]}, "buffer_size": 400, "learning_starts": 40, "batch_size": 16,
}  # fmt: skip
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}


def sac(env: Any, **fields: Any) -> Any:
    return rlkit.SAC(env, **{**SMALL, **fields})


def read(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The policy in a file, without the reader that the export itself uses."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(str(path))
        return lambda observations: session.run(["action"], {"observation": observations})[0]
    module = torch.export.load(path).module()
    return lambda observations: module(torch.from_numpy(observations)).numpy()


def about(path: Path) -> dict[str, str]:
    if path.suffix == ".onnx":
        return dict(onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map)
    files = {"about.json": ""}
    torch.export.load(path, extra_files=files)
    return json.loads(files["about.json"])


# --- the same actions ----------------------------------------------------------------------------------------------


def drive(env: gym.Env, act: Callable[[np.ndarray], np.ndarray]) -> tuple[float, int]:
    """Return and length of an episode."""
    observation, _ = env.reset(seed=3)
    total, length, ended = 0.0, 0, False
    while not ended:
        observation, reward, terminated, truncated, _ = env.step(act(observation))
        total, length, ended = total + float(reward), length + 1, terminated or truncated
    return total, length


@pytest.mark.parametrize("normalize_obs", [False, True])
def test_onnx_runtime_drives_a_whole_episode_of_half_cheetah(normalize_obs: bool, tmp_path: Path) -> None:
    """Normalisation is inside: the driver gives raw observations, and gets what `predict` gets."""
    agent = sac("HalfCheetah-v5", normalize_obs=normalize_obs).learn(60)
    comparison = export_policy(agent, tmp_path / "policy.onnx", "onnx")
    assert (comparison.sampled, comparison.seen, comparison.note) == (1000, 1000, "")
    assert 0 <= comparison.difference <= TOLERANCE
    assert comparison.rounding <= TOLERANCE
    policy = read(tmp_path / "policy.onnx")
    env = gym.make("HalfCheetah-v5")
    total, length = drive(env, lambda x: agent.predict(x, deterministic=True)[0])
    exported, exported_length = drive(env, lambda x: policy(x[None].astype(np.float32))[0])
    assert (length, exported_length) == (1000, 1000)
    assert exported == pytest.approx(total, abs=1e-3)
    assert abs(total - drive(env, lambda x: np.zeros(6, np.float32))[0]) > 0.01, "the policy does something"


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_actions_are_in_the_units_of_the_environment(kind: str, tmp_path: Path) -> None:
    """Nested `Dict` observations in the order of their keys; bounds [-2, 2] and [0, 10]; any batch."""
    agent = sac([env_zoo.DictCounter], normalize_obs=True).learn(60)
    path = tmp_path / f"policy{SUFFIXES[kind]}"
    comparison = export_policy(agent, path, kind)
    assert comparison.difference <= TOLERANCE
    assert comparison.seen > 0
    policy = read(path)
    for n in (1, 3, 50):
        agent.observation_space.seed(n)
        samples = [agent.observation_space.sample() for _ in range(n)]
        flat = np.stack([flatten_obs(agent.observation_space, sample) for sample in samples])
        expected = np.stack([agent.predict(sample, deterministic=True)[0] for sample in samples])
        got = policy(flat.astype(np.float32))
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
        assert np.all(got >= [-2, 0])
        assert np.all(got <= [2, 10])


class Grid(gym.Env):
    """Actions are a 2 x 3 matrix of float64 between unlike bounds, one of which is a point."""

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-1, 1, (2, 2), np.float64)
        low = np.array([[-3.0, 0, 1], [5, -1e-3, 7]])
        self.action_space = gym.spaces.Box(low, np.array([[1.0, 8, 2], [6, 1e-3, 7]]), dtype=np.float64)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, (2, 2)), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self.np_random.uniform(-1, 1, (2, 2)), 0.0, False, False, {}


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_shapes_and_types_of_actions(kind: str, tmp_path: Path) -> None:
    agent = sac(Grid())
    path = tmp_path / f"policy{SUFFIXES[kind]}"
    comparison = export_policy(agent, path, kind)
    assert (comparison.seen, comparison.note) == (0, "its environment was given in Python")
    assert next(comparison.lines()).endswith(
        "(1,000 observations of the space, none of an episode (its environment was given in Python))"
    )
    observations = np.random.default_rng(0).uniform(-1, 1, (7, 2, 2)).astype(np.float32)
    got = read(path)(observations.reshape(7, 4))
    assert (got.shape, got.dtype) == ((7, 2, 3), np.float64)
    expected, _ = agent.predict(observations.astype(np.float64), deterministic=True)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    assert np.all(got[:, 1, 2] == 7)
    assert np.abs(got[:, 1, 1]).max() <= 1e-3


def test_files_work_where_rlkit_is_not(tmp_path: Path) -> None:
    """In another process that cannot import it, bit for bit for PyTorch's program."""
    agent = sac("Pendulum-v1", normalize_obs=True).learn(60)
    observations = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    np.save(tmp_path / "observations.npy", observations)
    for kind, suffix in SUFFIXES.items():
        export_policy(agent, tmp_path / f"policy{suffix}", kind)
    code = """
import sys
sys.modules["rlkit"] = None
try:
    import rlkit
except ImportError:
    import numpy as np, onnxruntime, torch
    observations = np.load("observations.npy")
    print(torch.export.load("policy.pt2").module()(torch.from_numpy(observations)).tolist())
    print(onnxruntime.InferenceSession("policy.onnx").run(None, {"observation": observations})[0].tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    by_torch, by_onnx = (np.array(json.loads(line)) for line in done.stdout.splitlines())
    expected, _ = agent.predict(observations, deterministic=True)
    np.testing.assert_array_equal(by_torch, expected)
    np.testing.assert_allclose(by_onnx, expected, rtol=0, atol=2e-5)


def test_what_a_file_says_of_itself(tmp_path: Path) -> None:
    agent = sac("Pendulum-v1").learn(50)
    for kind, suffix in SUFFIXES.items():
        export_policy(agent, tmp_path / f"policy{suffix}", kind)
        facts = about(tmp_path / f"policy{suffix}")
        assert (facts["trainer"], facts["step"], facts["env"]) == ("sac", "50", "Pendulum-v1")
        assert space_from_json(json.loads(facts["observation_space"])) == agent.observation_space
        assert space_from_json(json.loads(facts["action_space"])) == agent.action_space
    session = onnxruntime.InferenceSession(str(tmp_path / "policy.onnx"))
    (given,), (out,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape, given.type) == ("observation", ["batch", 3], "tensor(float)")
    assert (out.name, out.shape, out.type) == ("action", ["batch", 1], "tensor(float)")


def test_a_file_holds_the_policy_alone(tmp_path: Path) -> None:
    """Weights of 3 -> 16 -> 16 -> 2 in float32 are 1.5 kB; the critics of the same trainer have 400 kB."""
    agent = sac("Pendulum-v1", policy_kwargs={"net_arch": {"pi": [16, 16], "qf": [160, 160]}})
    export_policy(agent, tmp_path / "policy.onnx", "onnx")
    assert (tmp_path / "policy.onnx").stat().st_size < 20_000
    export_policy(agent, tmp_path / "policy.pt2", "torch")
    assert (tmp_path / "policy.pt2").stat().st_size < 60_000


def test_exporting_changes_nothing_in_the_trainer(tmp_path: Path) -> None:
    """Modes, gradients and random streams: it goes on learning as one that was not exported."""
    finals = []
    for exported in (False, True):
        agent = sac("Pendulum-v1").learn(60)
        if exported:
            export_policy(agent, tmp_path / "policy.pt2", "torch")
        agent.learn(20)
        finals.append([p.detach().clone() for p in agent.actor.parameters()])
        assert agent.actor.training
    assert all(map(torch.equal, *finals))


# --- differences ---------------------------------------------------------------------------------------------------


class Still(gym.Env):
    """One feature stands at 100.1, which float32 does not have; normalised, its rounding counts."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.k = 0
        return np.array([100.1, self.np_random.normal()]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.k += 1
        return np.array([100.1, self.np_random.normal()]), 0.0, False, self.k == 50, {}


def test_what_rounding_to_float32_changes_is_said(tmp_path: Path) -> None:
    """float32(100.1) is off by 1.5e-6, and the deviation of a constant is sqrt(1e-8): 0.015 standard deviations."""
    agent = sac([Still], normalize_obs=True).learn(60)
    comparison = export_policy(agent, tmp_path / "policy.pt2", "torch")
    assert comparison.difference <= TOLERANCE
    assert comparison.rounding > TOLERANCE
    line = list(comparison.lines())[1]
    assert line.startswith(f"observations rounded to float32 change actions by up to {comparison.rounding:.1e}")


class Moody(rlkit.SAC):
    """Acts a little otherwise every time that it is asked, which no file can."""

    asked = 0

    def act(self, obs: Tensor, deterministic: bool) -> Tensor:
        self.asked += 1
        return super().act(obs, deterministic) * (1 - 1e-4 * self.asked)


class Branching(rlkit.SAC):
    """Decides in Python by what it observes."""

    def act(self, obs: Tensor, deterministic: bool) -> Tensor:
        action = super().act(obs, deterministic)
        return -action if float(obs.sum()) > 0 else action


class Misnamed(rlkit.SAC):
    policy_parts = ("normalizer", "pi")


@pytest.mark.parametrize("kind", ["onnx", "torch"])
@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Moody, r"the exported policy of `sac` differs from `predict` by \d.\de-04 .*; no file was written"),
        (Branching, "the policy of `sac` cannot be exported: torch.export does not follow its `act`: "),
        (Misnamed, "`sac` has no module `pi`: its `policy_parts` have to name"),
    ],
)
def test_a_policy_that_would_act_otherwise_is_not_written(cls: Any, message: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"policy{SUFFIXES[kind]}"
    path.write_bytes(b"before")
    agent = cls("Pendulum-v1", **SMALL)
    with torch.no_grad():
        agent.actor.head.bias.fill_(0.5)
    with pytest.raises(RlkitError, match=message):
        export_policy(agent, path, kind)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"before"


def test_nan_is_a_difference(tmp_path: Path) -> None:
    agent = sac("Pendulum-v1")
    with torch.no_grad():
        agent.actor.head.bias.fill_(np.nan)
    with pytest.raises(RlkitError, match="differs from `predict` by nan"):
        export_policy(agent, tmp_path / "policy.pt2", "torch")
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = sac("Pendulum-v1")
    with pytest.raises(UserError, match=r"`--out`: got .*policy\.pt; expected a file name that ends in \.pt2"):
        export_policy(agent, tmp_path / "policy.pt", "torch")
    with pytest.raises(UserError, match=r"cannot write .*absent"):
        export_policy(agent, tmp_path / "absent" / "policy.pt2", "torch")
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    with pytest.raises(UserError, match=r'onnxscript is not installed; run: pip install "rlkit-trainers\[onnx\]"'):
        export_policy(agent, tmp_path / "policy.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_environment_that_is_not_there_any_more(tmp_path: Path) -> None:
    """The policy needs none; the comparison says what it lacked."""
    gym.register("Gone-v0", Still)
    sac("Gone-v0").save(tmp_path / "agent")
    del gym.registry["Gone-v0"]
    loaded: Any = rlkit.load(tmp_path / "agent", inference=True)
    comparison = export_policy(loaded, tmp_path / "policy.pt2", "torch")
    assert (comparison.sampled, comparison.seen) == (1000, 0)
    assert comparison.note.startswith("unknown environment `Gone-v0`")


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    agent = sac("Pendulum-v1", out=str(run), tensorboard=False, eval_episodes=0).learn(50)
    agent.save(tmp_path / "agent")
    for kind, suffix in SUFFIXES.items():
        for source, place in (
            (run, run / f"policy{suffix}"),
            (run / "checkpoints" / "step-0000000050", run / f"step-0000000050-policy{suffix}"),
            (tmp_path / "agent", tmp_path / f"agent-policy{suffix}"),
        ):
            assert main(["export", str(source), "--format", kind]) == 0
            line, last = capsys.readouterr().out.splitlines()
            assert last == str(place)
            assert line.startswith("largest difference to `predict`, of half the action range: ")
            assert line.endswith("(1,000 observations of the space, 200 of an episode)")
            observations = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
            expected, _ = agent.predict(observations, deterministic=True)
            np.testing.assert_allclose(read(place)(observations), expected, rtol=0, atol=2e-5)
    for wrong, message in (
        (["--format", "hf"], f"{run} was trained by `sac`, which is no language model: `--format onnx` or `torch`"),
        (["--format", "torch", "--merged"], "`--merged` is for adapters of language models"),
        (["--format", "tflite"], "argument --format: invalid choice: 'tflite'"),
        ([], "the following arguments are required: --format"),
    ):
        assert main(["export", str(run), *wrong]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="`--format`: got 'tflite'; allowed: onnx, torch, hf"):
        export.export(str(run), "tflite")
    assert main(["export", str(tmp_path / "absent"), "--format", "torch"]) == 2
    assert "absent: no such folder" in capsys.readouterr().err


def test_language_models_are_model_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`hf` is what `from_pretrained` reads; there is no policy to export and nothing to film."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    fields = {"model": saved_llama(tmp_path / "model"), "data": str(data), "steps": 1, "out": str(run), "device": "cpu"}
    assert main(["train", "sft", *as_options({**fields, "eval_episodes": 0, "tensorboard": False})]) == 0
    capsys.readouterr()
    assert main(["export", str(run), "--format", "hf"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "hf")
    model = AutoModelForCausalLM.from_pretrained(run / "hf")
    trained: Any = rlkit.load(run, inference=True)
    for (name, a), b in zip(model.named_parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert AutoTokenizer.from_pretrained(run / "hf").vocab_size == trained.tokenizer.vocab_size
    assert main(["export", str(run), "--format", "onnx"]) == 2
    assert f"{run} was trained by `sft`, a language model: `--format hf`" in capsys.readouterr().err
    assert main(["video", str(run)]) == 2
    assert "`sft` acts in no environment: there is nothing to film" in capsys.readouterr().err
    assert not (run / "video.mp4").exists()


def test_lines_for_people() -> None:
    assert list(Comparison(1000, 40, 1.234e-7, 0.0).lines()) == [
        "largest difference to `predict`, of half the action range: 1.2e-07 (1,000 observations of the space, "
        "40 of an episode)"
    ]


def test_turned_ties_of_a_choosing_policy_are_counted_up_to_one_in_a_hundred() -> None:
    """Of 1,000 observations 10 may differ, 11 may not; where nothing is chosen, not one may, and NaN never."""
    agent = rlkit.ARSQ("Pendulum-v1", policy_kwargs={"net_arch": [8]}, device="cpu")

    def turned(n: int, value: float = 5.0) -> Callable[[np.ndarray], np.ndarray]:
        def actions(observations: np.ndarray) -> np.ndarray:
            found = agent.predict(observations, deterministic=True)[0].copy()
            found[:n] = value
            return found

        return actions

    found = _compare(agent, turned(10), [], "")
    assert (found.ties, found.difference) == (10, 0.0)
    assert "in 10 of them a choice between nearly equal alternatives fell otherwise" in list(found.lines())
    for actions in (turned(11), turned(1, np.nan)):
        with pytest.raises(RlkitError, match="differs from `predict`"):
            _compare(agent, actions, [], "")
    agent.chooses = False
    with pytest.raises(RlkitError, match="differs from `predict`"):
        _compare(agent, turned(1), [], "")
