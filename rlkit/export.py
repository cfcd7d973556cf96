"""A trained policy as one file that needs no rlkit: raw observations in, actions in the environment's own units out.

| format | what | read by |
|---|---|---|
| `onnx` | `policy.onnx` | ONNX Runtime and whatever else knows ONNX; written with the extra `onnx` |
| `torch` | `policy.pt2` | `torch.export.load("policy.pt2").module()(observations)` |
| `hf` | a folder; of language models only | `from_pretrained`, vLLM |

A policy's input `observation` is (batch, obs_dim) float32: observations as the environment gives them, those of a
`Dict` space flattened and concatenated in the order of its keys. Normalisation is inside and computes in float64, as in
training. The output `action`, (batch, *shape), is what the policy does without noise, scaled to the action space.
Either file also says where it comes from: trainer, step, environment, both spaces.

What was written is read again and compared with `trainer.predict(deterministic=True)` before the file appears. Of a
trainer that `chooses` among alternatives, a few observations may be left out in which rounding turned a near tie.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector.utils import concatenate, create_empty_array
from torch import Tensor, nn

from rlkit._version import __version__
from rlkit.control import ControlTrainer
from rlkit.envs.spaces import flatten_obs, space_to_json
from rlkit.errors import RlkitError, UserError
from rlkit.files import check_suffix, default_place, replacing
from rlkit.trainer import load

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
TOLERANCE = 1e-5
"""Largest difference to `predict` that is let through, in units of half the action range."""
TIES = 0.01
"""Share of observations in which the policy of a trainer that `chooses` may act otherwise: a near tie, which rounding
turns."""
SAMPLES = 1_000
"""Observations drawn from the space, and at most of an episode, that are compared."""

Actions = Callable[[np.ndarray], np.ndarray]
"""(batch, obs_dim) float32 -> (batch, *shape)."""


class Policy(nn.Module):
    """(batch, obs_dim) float32 observations -> (batch, *shape) actions of the environment, without noise.

    It calls the trainer's own `act`, so that there is no second reading of the policy; the weights that go along are
    those of the modules that the trainer names in `policy_parts`.
    """

    factor: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, trainer: ControlTrainer) -> None:
        super().__init__()
        self._act, self.scale = trainer.act, trainer.scale
        absent = [name for name in trainer.policy_parts if not isinstance(getattr(trainer, name, None), nn.Module)]
        if absent:
            raise RlkitError(
                f"`{trainer.name}` has no module `{absent[0]}`: its `policy_parts` have to name the tracked modules "
                "that `act` reads"
            )
        self.parts = nn.ModuleDict({name: getattr(trainer, name) for name in trainer.policy_parts})
        if self.scale is not None:
            of = self.scale
            for name, values in {"factor": of.half, "offset": of.middle, "low": of.low, "high": of.high}.items():
                self.register_buffer(name, torch.from_numpy(values).to(trainer.device))

    def forward(self, observation: Tensor) -> Tensor:
        action = self._act(observation, True).detach().float()
        if self.scale is None:
            return action
        action = (action * self.factor + self.offset).to(self.low.dtype)  # in float64, as `ActionScale.to_env` does
        action = action.clamp(self.low, self.high)
        shape = self.scale.space.shape
        return action if len(shape) == 1 else action.reshape(-1, *shape)


@dataclass(frozen=True)
class Comparison:
    """What an exported policy was compared with, and how much it differs, in units of half the action range."""

    sampled: int
    """Observations drawn from the space."""
    seen: int
    """Observations of an episode."""
    difference: float
    """The largest."""
    rounding: float
    """What observations as float32, instead of in the environment's own type, change in the episode's actions."""
    note: str = ""
    """Why no episode could be run."""
    ties: int = 0
    """Observations that the figures leave out: a choice among alternatives fell otherwise."""

    def lines(self) -> Iterator[str]:
        """For people."""
        episode = f"{self.seen:,} of an episode" if self.seen else f"none of an episode ({self.note})"
        yield (
            f"largest difference to `predict`, of half the action range: {self.difference:.1e} "
            f"({self.sampled:,} observations of the space, {episode})"
        )
        if self.ties:
            yield f"in {self.ties:,} of them a choice between nearly equal alternatives fell otherwise"
        if self.rounding > TOLERANCE:
            yield (
                f"observations rounded to float32 change actions by up to {self.rounding:.1e} of half the action range "
                "(a feature that hardly varied in training?)"
            )


def export(
    run: str, kind: str, out: str | Path | None = None, *, merged: bool = False, say: Callable[[str], None] = print
) -> Path:
    """Export the newest checkpoint of `run`; -> where to.

    Args:
        run: run folder, checkpoint or saved folder.
        kind: `onnx`, `torch` or `hf`.
        out: the file (a folder for `hf`); by default in the run folder.
        merged: merge an adapter into its model; of `hf` only.
        say: gets lines about the comparison with `predict`.

    Raises:
        UserError: a format that this trainer does not have, an absent extra, a file that cannot be written.
        RlkitError: the policy cannot be exported, or what was written acts otherwise; no file is left.
    """
    place = Path(out) if out is not None else None
    if kind == "hf":
        return _save_model(run, place or default_place(run, "hf"), merged)
    if kind not in SUFFIXES:
        raise UserError(f"`--format`: got {kind!r}; allowed: {', '.join(SUFFIXES)}, hf")
    if merged:
        raise UserError("`--merged` is for adapters of language models, `--format hf`")
    suffix = SUFFIXES[kind]
    place = place or default_place(run, f"policy{suffix}")
    trainer = load(run, inference=True)
    if not isinstance(trainer, ControlTrainer):
        raise UserError(f"{run} was trained by `{trainer.name}`, a language model: `--format hf`")
    if trainer.device.type != "cpu":  # the file is to work everywhere
        trainer = load(run, inference=True, device="cpu", allow_changes=True)
        assert isinstance(trainer, ControlTrainer)
    for line in export_policy(trainer, place, kind).lines():
        say(line)
    return place


def _save_model(run: str, place: Path, merged: bool) -> Path:
    from rlkit.lm.trainer import LMTrainer

    trainer = load(run, inference=True)
    if not isinstance(trainer, LMTrainer):
        raise UserError(
            f"{run} was trained by `{trainer.name}`, which is no language model: `--format onnx` or `torch`"
        )
    return trainer.save(place, merged=merged)


def export_policy(trainer: ControlTrainer, out: str | Path, kind: str) -> Comparison:
    """Write the policy of `trainer`, as it is now, to `out`, which is replaced if it is there.

    Raises:
        UserError, RlkitError: as `export`.
    """
    place = check_suffix(Path(out), SUFFIXES[kind])
    if kind == "onnx":
        _require_onnx()
    with replacing(place) as temp:
        seen, note = _episode(trainer)
        policy = Policy(trainer).eval()
        try:
            write, read = (_write_onnx, _read_onnx) if kind == "onnx" else (_write_torch, _read_torch)
            with _quiet():
                write(_program(trainer, policy), temp, about(trainer))
                actions = read(temp)
            return _compare(trainer, actions, seen, note)
        finally:
            policy.train()


def about(trainer: ControlTrainer) -> dict[str, str]:
    """What the file says of itself; spaces as JSON."""
    return {
        "trainer": trainer.name,
        "step": str(trainer.clock),
        "env": str(trainer.config.env or ""),
        "observation_space": json.dumps(space_to_json(trainer.observation_space)),
        "action_space": json.dumps(space_to_json(trainer.action_space)),
        "rlkit": __version__,
        "torch": str(torch.__version__),
    }


# --- the two formats -----------------------------------------------------------------------------------------------


def _program(trainer: ControlTrainer, policy: Policy) -> torch.export.ExportedProgram:
    example = torch.zeros(2, trainer.obs_dim, device=trainer.device)
    shapes = {"observation": {0: torch.export.Dim("batch")}}
    try:
        return torch.export.export(policy, (example,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # of many kinds, whatever in `act` the tracer does not follow
        reason = str(error).strip().split("\n")[0]
        raise RlkitError(
            f"the policy of `{trainer.name}` cannot be exported: torch.export does not follow its `act`: "
            f"{type(error).__name__}: {reason}"
        ) from error


def _write_torch(program: torch.export.ExportedProgram, path: Path, texts: Mapping[str, str]) -> None:
    torch.export.save(program, path, extra_files={"about.json": json.dumps(texts)})


def _read_torch(path: Path) -> Actions:
    module = torch.export.load(path).module()
    return lambda observations: module(torch.from_numpy(observations)).numpy()


def _write_onnx(program: torch.export.ExportedProgram, path: Path, texts: Mapping[str, str]) -> None:
    graph = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["observation"],
        output_names=["action"],
        dynamic_shapes={"observation": {0: "batch"}},
        external_data=False,
        verbose=False,
    )
    assert graph is not None  # it is with `dynamo`
    graph.model.metadata_props.update(texts)
    graph.save(path, external_data=False)


def _read_onnx(path: Path) -> Actions:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda observations: session.run(None, {"observation": observations})[0]


def _require_onnx() -> None:
    """Raise UserError, with the install command, where a part of the extra `onnx` is absent."""
    absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(
            f'{", ".join(absent)} is not installed; run: pip install "rlkit-trainers[onnx]", or take `--format torch`'
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks about packages that nothing here uses."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# --- the comparison ------------------------------------------------------------------------------------------------


def _compare(trainer: ControlTrainer, actions: Actions, seen: list[Any], note: str) -> Comparison:
    """`actions` against `predict`, on observations that float32 can hold.

    Raises:
        RlkitError: a difference above `TOLERANCE`.
    """
    space = trainer.observation_space
    differences = [_differences(trainer, actions, _sample(space, np.random.default_rng(0)), SAMPLES)]
    rounding = np.zeros(1)
    if seen:
        batch = concatenate(space, seen, create_empty_array(space, len(seen)))
        differences.append(_differences(trainer, actions, _rounded(batch), len(seen)))
        rounding = _differences(trainer, actions, batch, len(seen))
    each = np.concatenate(differences)
    ties = each > TOLERANCE
    if not trainer.chooses or ties.mean() > TIES:
        ties[:] = False
    else:
        rounding = rounding[rounding <= TOLERANCE]
    largest = np.max(each[~ties])
    if not largest <= TOLERANCE:  # nor NaN
        raise RlkitError(
            f"the exported policy of `{trainer.name}` differs from `predict` by {largest:.1e} of half the action "
            f"range, more than {TOLERANCE:.0e}; no file was written"
        )
    return Comparison(SAMPLES, len(seen), float(largest), float(np.max(rounding, initial=0.0)), note, int(ties.sum()))


def _differences(trainer: ControlTrainer, actions: Actions, batch: Any, n: int) -> np.ndarray:
    """(n,): the largest of each of `n` observations, in units of half the action range; NaN if there is one."""
    expected, _ = trainer.predict(batch, deterministic=True)
    got = actions(np.ascontiguousarray(flatten_obs(trainer.observation_space, batch, n), np.float32))
    if got.shape != expected.shape:
        raise RlkitError(f"the exported policy gives actions of shape {got.shape} instead of {expected.shape}")
    difference = np.abs(got.astype(np.float64) - expected).reshape(n, -1)
    half = 1.0 if trainer.scale is None else np.where(trainer.scale.half > 0, trainer.scale.half, 1.0)
    largest: np.ndarray = np.max(difference / half, axis=1)
    return largest


def _sample(space: gym.Space, rng: np.random.Generator) -> Any:
    """`SAMPLES` observations: uniform between bounds, and normal where there are none to speak of."""
    if isinstance(space, gym.spaces.Dict):
        return {key: _sample(part, rng) for key, part in space.spaces.items()}
    assert isinstance(space, gym.spaces.Box)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    bounded = (low > -1e6) & (high < 1e6)
    shape = (SAMPLES, *space.shape)
    uniform = rng.uniform(np.where(bounded, low, 0.0), np.where(bounded, high, 1.0), shape)
    values = np.where(bounded, uniform, np.clip(rng.normal(size=shape), low, high))
    return values.astype(np.float32).astype(space.dtype)


def _rounded(batch: Any) -> Any:
    """`batch` with the values that float32 has, in its own types."""
    if isinstance(batch, Mapping):
        return {key: _rounded(part) for key, part in batch.items()}
    return batch.astype(np.float32).astype(batch.dtype)


def _episode(trainer: ControlTrainer) -> tuple[list[Any], str]:
    """(up to `SAMPLES` observations of a deterministic episode, why there are none)."""
    seen: list[Any] = []

    def keep(index: int, env: gym.Env, observation: Any, action: Any) -> None:
        if action is not None:
            seen.append(_copy(observation))

    try:
        if not trainer.can_evaluate():
            return [], "its environment was given in Python"
        trainer.evaluate(1, should_stop=lambda: len(seen) >= SAMPLES, watch=keep)
    except RlkitError as error:
        return [], str(error)
    return seen, ""


def _copy(observation: Any) -> Any:
    if isinstance(observation, Mapping):
        return {key: _copy(part) for key, part in observation.items()}
    return np.copy(observation)
