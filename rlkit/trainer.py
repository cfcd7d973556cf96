"""The loop that every trainer shares, and its state.

An algorithm is a subclass with `build`, `collect` and `update`; the loop alternates between gathering experience and
the updates owed for it. Its whole state is two numbers (`clock`, `owed`), the named random streams and the parts
registered by `track`. Checkpoints walk that registry, so a run that stops and resumes computes what an uninterrupted
one does, bit for bit on a CPU, and no algorithm writes saving code.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import yaml
from torch import Tensor, nn

from rlkit import checkpoint, processes, registry
from rlkit.buffer import RolloutBuffer
from rlkit.callbacks import as_callbacks
from rlkit.compilation import Compilable, worthwhile
from rlkit.config import RunConfig, dump_yaml, load_file, merge, to_dict, validate
from rlkit.errors import CheckpointError, DivergenceError, UserError, differences
from rlkit.metrics import Meter, RunLog, require_wandb
from rlkit.optim import Adam
from rlkit.processes import Processes
from rlkit.rng import Streams, derive
from rlkit.run import Run, open_folder, records, refuse_foreign, refuse_run

Batch = dict[str, Tensor]

PACKAGES = ("rlkit-trainers", "torch", "numpy", "gymnasium", "mujoco")


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def resolve_device(name: str) -> torch.device:
    """The torch device of `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UserError: another kind (Apple's MPS has no float64, which observations may be), or not on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"`device`: got {name!r}; allowed: auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(
            f"`device`: {name!r} is not available: this PyTorch sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


class Trainer:
    """Base of all trainers. A subclass sets the class attributes and defines `build`, `collect` and `update`.

    Attributes:
        config: the resolved, frozen configuration.
        clock: experience consumed so far, in units of `counts`.
        owed: gradient updates due for it before more is gathered.
        updates: gradient updates made.
        processes: the processes of the run, of which this is one. Gradients become those of all of them by
            `descend(…, self.processes.average)`.
        compiled: whether updates are compiled; None until the first `learn` decides, for good.
        log: of the present or last `learn`: `log.history` and `log.eval_history` hold its records, folder or not.
        rng: named random streams (`rng["sample"]`, …); an update receives its noise from them as an argument.
    """

    Config: ClassVar[type[RunConfig]] = RunConfig
    name: ClassVar[str] = "trainer"
    counts: ClassVar[Literal["env_steps", "updates"]] = "env_steps"
    default_task: ClassVar[Mapping[str, Any]] = {}
    """Fields, and `steps`, of the embedded task that `rlkit train NAME` runs without further arguments."""
    default_steps: ClassVar[int | None] = 100_000
    """Budget of `rlkit train NAME` for a task without `--steps`; None: what `default_target` says."""
    task_fields: ClassVar[tuple[str, ...]] = ("env",)
    """Fields that name a task: without any of them, the embedded one is meant."""
    modules_part: ClassVar[str] = "policy"
    """Part of a checkpoint that holds the tracked modules."""
    several_processes: ClassVar[bool] = False
    """Whether a run can have several processes, which divide the work among themselves. Whatever is drawn, chosen or
    counted differently in them must not decide what they do together.
    """
    own: ClassVar[frozenset[str]] = frozenset()
    """Files of the state, and keys of its file `state`, that each of them has for itself; the rest is equal in all."""
    inference_parts: ClassVar[frozenset[str]] = frozenset({"policy", "state", "config.yaml"})
    """Parts of a checkpoint that `load(inference=True)` reads, where they are there."""

    def __init__(self, config: RunConfig, *, saved: Mapping[str, Any] | None = None) -> None:
        """`saved`: the part `state` of a checkpoint that is about to be loaded."""
        self.config = config
        self.folder = Path(config.out) if config.out is not None else None
        if self.folder is not None:
            refuse_run(self.folder)
        if config.wandb:
            require_wandb()
        self.processes = self.join(config)
        self.device = self.processes.device or resolve_device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.rng = Streams(config.seed, self.device, self.processes.rank if self.own else 0)
        self.meter = Meter()
        self.log: RunLog | None = None
        self.clock, self.owed, self.updates = 0, 0.0, 0
        self.target, self.horizon = 0, 0
        self.seconds = 0.0
        self.marks = {
            "log": 0, "eval": -1, "checkpoint": 0, "records": 0, "eval_records": 0, "logged_at": 0, "evaluated_at": -1,
        }  # fmt: skip
        self._parts: dict[str, Any] = {}
        self._compilable: list[Compilable] = []
        self.compiled: bool | None = None
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derive(config.seed, "weights"))
            self.build()

    @classmethod
    def join(cls, config: RunConfig) -> Processes:
        """The processes that this one was started with.

        Raises:
            UserError: there are several, and this trainer runs in one.
        """
        if not cls.several_processes and processes.launched() > 1:
            raise UserError(f"`{cls.name}` runs in one process, and {processes.launched()} were started")
        return processes.join(config.device)

    # What an algorithm defines

    def build(self) -> None:
        """Make networks, optimisers and buffer, and `track` them."""
        raise NotImplementedError

    def collect(self) -> int:
        """Make experience available, add the updates due for it to `owed`; returns the experience consumed, by all
        processes together.
        """
        raise NotImplementedError

    def batch(self) -> Batch:
        """The data of the next update."""
        raise NotImplementedError

    def update(self, batch: Batch) -> Mapping[str, Tensor]:
        """One gradient update; returns metrics as detached scalar tensors, so that nothing waits for the device.

        Entries named `…loss` or `…grad_norm` are guarded: a non-finite one stops the run.
        """
        raise NotImplementedError

    def track(self, **parts: Any) -> None:
        """Register parts of the state; they are also attributes. A part is a module, an optimiser, a buffer, or
        anything with `state_dict` and `load_state_dict`.
        """
        for name, part in parts.items():
            if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
                raise TypeError(f"{name}: a tracked part needs state_dict and load_state_dict")
            if isinstance(part, nn.Module):
                part.to(self.device)
            self._parts[name] = part
            setattr(self, name, part)

    def compilable(self, function: Callable[..., Any]) -> Compilable:
        """`function` such that it is compiled where the configuration asks for it; see `rlkit.compilation`."""
        return Compilable(function, self._compilable)

    def planned_updates(self) -> float:
        """Updates until the target, as far as they can be foretold."""
        return self.target - self.clock

    def _decide_compilation(self) -> None:
        """`auto` decides once in a run's life, because eager and compiled updates differ by rounding."""
        if self.compiled is None or self.config.compile != "auto":
            self.compiled = worthwhile(self.config.compile, self.device, self.planned_updates())
            if self.compiled and self._compilable and self.processes.size > 1:
                self.compiled = False
                processes.say("`compile`: updates of several processes, which exchange gradients, run eagerly")
        for part in self._parts.values():
            if isinstance(part, Adam):
                part.correct_bias()  # for compiled steps, which may follow eager ones
        for function in self._compilable:
            function.compiled = self.compiled

    @property
    def compile_seconds(self) -> float:
        """Time spent on compilation so far."""
        return sum(function.seconds for function in self._compilable)

    # Learning

    def learn(
        self,
        total_timesteps: int | None = None,
        callback: Any = None,
        *,
        progress_bar: bool = False,
    ) -> Self:
        """Train for `total_timesteps` more units of `counts`; without it, until the target of a resumed run.

        With several environments the last vector step may pass the target by up to n_envs - 1 steps, n_envs those of
        all processes.

        Args:
            callback: a function, called as `callback(trainer)` whenever the clock has advanced, or
                Stable-Baselines3's callbacks, one or a list; False ends the run. Of several processes of a control
                trainer the main one alone calls it, and `trainer` has its environments and its part of the buffer.
            progress_bar: show progress on standard output.

        Raises:
            Stopped: SIGINT or SIGTERM arrived; the state is saved when the trainer has a run folder.
            DivergenceError: a loss or gradient is not finite; the step was not taken.
        """
        callbacks = None if callback is None else as_callbacks(callback, self)
        if total_timesteps is not None:
            self.target = self.clock + _whole(total_timesteps)
        elif self.target == 0:
            self.target = self.default_target()
        self.horizon = self.horizon or self.target
        self._decide_compilation()
        self.processes.together(self.before_learning)  # and all have read what is there
        self._compare()
        if self.folder is not None:
            folder, text = self.folder, dump_yaml(self.saved_config())
            self.processes.from_main(lambda: open_folder(folder, text))
        with Run(self, self.folder, progress=progress_bar, callbacks=callbacks) as run:
            while not run.stopping and not self._done:
                if self.owed < 1:
                    self.clock += self.collect()
                    if self.counts == "env_steps":
                        run.advanced()
                else:
                    batch = self.batch()
                    metrics = self.update(batch)
                    self.owed -= 1
                    self.updates += 1
                    self.meter.accumulate(metrics)
                    if self.device.type == "cpu":  # elsewhere reading a value would wait for the device
                        self._guard(metrics, batch)
                    if self.counts == "updates":
                        self.clock += 1
                        run.advanced()
                run.tick()
        return self

    def _compare(self) -> None:
        """Make sure that all processes are about to compute the same."""
        if self.processes.size > 1:
            fields = {**to_dict(self.config), "total_timesteps": self.target}
            modules = [part for part in self._parts.values() if isinstance(part, nn.Module)]
            weights = checkpoint.tensors_hash(pair for module in modules for pair in module.state_dict().items())
            self.processes.alike({**{f"`{name}`": value for name, value in fields.items()}, "the weights": weights})

    def default_target(self) -> int:
        """The budget where none is given.

        Raises:
            UserError: this trainer has none of its own.
        """
        raise UserError("`total_timesteps`: how many? `learn(100_000)`; only a resumed run knows by itself")

    @property
    def _done(self) -> bool:
        """The budget is used up; one of environment steps includes the updates owed for them."""
        return self.clock >= self.target and (self.counts == "updates" or self.owed < 1)

    def before_learning(self) -> None:
        """Whatever has to be open before the loop, such as environments."""

    def prepare(self, should_stop: Callable[[], bool]) -> None:
        """Long work before the first evaluation and update, inside the run: it ends early when `should_stop`."""

    @property
    def progress(self) -> float:
        """Fraction of the horizon behind us, in [0, 1]; the horizon is the first target and outlives extensions."""
        return min(1.0, self.clock / self.horizon) if self.horizon else 0.0

    def record(self, values: Mapping[str, float], step: int) -> None:
        """Add a record to the run's `metrics.jsonl`, CSV and boards; outside `learn` there is none to add to."""
        if self.log is not None and values:
            self.log.write(step, dict(values))
            self.marks["records"] = self.log.records

    def metrics(self) -> dict[str, float]:
        """Means since the last record, over all processes, for the log. Collective."""
        values = self.processes.mean(self.meter.means())
        self._guard(values, {})
        return values

    def _guard(self, metrics: Mapping[str, Tensor | float], batch: Batch) -> None:
        wrong = [n for n, v in metrics.items() if n.endswith(("loss", "grad_norm")) and not math.isfinite(v)]
        # A loss is this process's own. Where one is not finite, gradients are not either, in any of them.
        if not wrong or (self.processes.size > 1 and batch and not any(n.endswith("grad_norm") for n in wrong)):
            return
        losses = [n for n in wrong if n.endswith("loss")]
        found = self.processes.gather(bool(losses))
        source = found.index(True) if True in found else 0
        name = (losses or wrong)[0] if self.processes.size > 1 else wrong[0]
        own = self.processes.rank == source
        told = self.processes.together(lambda: self._divergence(name, float(metrics[name]), batch) if own else "")
        raise processes.shared(DivergenceError(told[source]))

    def _divergence(self, name: str, value: float, batch: Batch) -> str:
        """What went wrong in this process; its batch is written into the run's folder."""
        where = ""
        if self.folder is not None and batch:
            dump = self.folder / f"diverged-step-{self.clock:010d}"
            checkpoint.save(dump, {"batch": dict(batch)}, about={"metric": name})
            where = f"; the batch is in {dump}"
        process = f" in process {self.processes.rank}" if self.processes.size > 1 else ""
        return (
            f"{name} is {value} at update {self.updates:,} (step {self.clock:,}){process}; the optimiser step was not "
            f"taken{where}. A smaller `learning_rate` or rewards of order 1 usually help."
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of forward passes under the configured precision."""
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def describe(self) -> str:
        """A line for the user before learning: what runs where."""
        return (
            f"{self.name}: device {self.device}, {self.config.precision}, seed {self.config.seed}, folder {self.folder}"
        )

    def summary(self) -> list[str]:
        """Lines for the user after learning: the evaluation before and after, and where the results are."""
        lines = []
        if self.folder is not None:
            evaluations = records(self.folder, "eval.jsonl")
            for label, record in zip(("before", "after"), (evaluations[:1], evaluations[-1:]), strict=True):
                lines += [f"evaluation {label} (step {r['step']:,}): {self.describe_evaluation(r)}" for r in record]
            lines.append(f"run folder: {self.folder}")
        return lines

    def describe_evaluation(self, record: Mapping[str, Any]) -> str:
        """An evaluation's record in words."""
        return ", ".join(f"{k} {v:.4g}" for k, v in record.items() if isinstance(v, float))

    def evaluation_json(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """An evaluation's record as `rlkit eval --json` prints it."""
        return dict(record)

    @property
    def finished(self) -> bool:
        """Whether a resumed run has nothing left to do."""
        evaluated = self.marks["evaluated_at"] == self.clock or self.config.eval_episodes == 0
        return self._done and (evaluated or not self.can_evaluate())

    # Evaluation

    def can_evaluate(self) -> bool:
        """Whether `evaluate` has what it needs."""
        return False

    def why_no_evaluation(self, run: str) -> str:
        """What to do where `can_evaluate` is false; `run` is the folder this trainer was loaded from."""
        return f"`{self.name}` has no evaluation"

    def evaluate(
        self, episodes: int, *, seed: int | None = None, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Any] | None:
        """A record for `eval.jsonl`; None when `should_stop` interrupted it. Changes nothing in the trainer."""
        raise NotImplementedError

    # State

    def saved_config(self) -> dict[str, Any]:
        """What `config.yaml` holds: it re-runs the run. The folder itself is left out, so that a run can be moved."""
        fields = to_dict(self.config)
        fields.pop("out")
        return {"trainer": self.name, "steps": self.target, **fields}

    def state(self) -> dict[str, Any]:
        """The whole state by file: modules in `policy`, optimisers in `optimizer`, the buffer in `buffer`, the rest in
        `state`.
        """
        loop = {k: getattr(self, k) for k in ("clock", "owed", "updates", "target", "horizon", "compiled")}
        files: dict[str, Any] = {
            self.modules_part: {},
            "optimizer": {},
            "buffer": {},
            "state": {
                "loop": loop,
                "marks": dict(self.marks),
                "rng": self.rng.state_dict(),
                "meter": self.meter.state_dict(),
            },
        }
        for name, part in self._parts.items():
            files[self._file_of(part)][name] = part.state_dict()
        return files

    def documents(self) -> dict[str, str]:
        """File name -> text of what else belongs into a checkpoint."""
        return {}

    def _file_of(self, part: Any) -> str:
        if isinstance(part, nn.Module):
            return self.modules_part
        if isinstance(part, Adam | torch.optim.Optimizer):
            return "optimizer"
        return "buffer" if isinstance(part, RolloutBuffer) else "state"

    def load_state(self, files: Mapping[str, Any]) -> None:
        """The inverse of `state`; files that are absent (a load for inference) leave their parts as they are."""
        for name, part in self._parts.items():
            file = self._file_of(part)
            if file not in files:
                continue
            if name not in files[file]:
                raise CheckpointError(f"the checkpoint has no `{name}` in its file `{file}`")
            try:
                part.load_state_dict(files[file][name])
            except (RuntimeError, KeyError, ValueError, TypeError) as error:
                raise CheckpointError(f"`{name}` of the checkpoint does not fit: {error}") from error
        state = files["state"]
        for key, value in state["loop"].items():
            setattr(self, key, value)
        self.marks = dict(state["marks"])
        self.rng.load_state_dict(state["rng"])
        self.meter.load_state_dict(state["meter"])

    def write_checkpoint(self, folder: Path, only: Collection[str] | None = None) -> Path:
        """The state and the configuration as a checkpoint folder; of the state's files those named in `only`.

        Of several processes the main one writes the state that is equal in all and its own, the others theirs.
        Collective.
        """
        about = {
            "trainer": self.name,
            "step": self.clock,
            "seconds": self.seconds,
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "saved": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        files = {name: part for name, part in self.state().items() if only is None or name in only}
        if not self.processes.is_main:
            files = self._own_files(files)
        else:
            files["config.yaml"] = dump_yaml(self.saved_config())
        self.processes.together(lambda: files.update(self.documents() if self.processes.is_main else {}))
        checkpoint.save(folder, files, about=about, processes=self.processes)
        return Path(folder)

    def _own_files(self, files: Mapping[str, Any]) -> dict[str, Any]:
        """What this process, which is not the main one, adds to the files of the state."""
        own = {name: part for name, part in files.items() if name in self.own}
        if self.own:
            own["state"] = {key: value for key, value in files["state"].items() if key in self.own}
        return {_of_rank(name, self.processes.rank): part for name, part in own.items()}

    def save(self, folder: str | Path) -> Path:
        """Write everything needed to predict or to go on learning into `folder` (a trailing `.zip` is dropped).

        Collective, except in a callback of the main process: the others are told.

        Raises:
            UserError: the folder holds something else.
        """
        path = Path(str(folder).removesuffix(".zip"))
        with self.processes.joined_by("save", str(folder)):
            return self.write_checkpoint(self.processes.from_main(lambda: refuse_foreign(path)))

    @classmethod
    def make_config(cls, fields: Mapping[str, Any], source: str = "") -> Any:
        """The configuration of explicit `fields` over the defaults (and over presets, where a family has them)."""
        return validate(cls.Config, fields, source)

    @classmethod
    def preset_fields(cls, preset: str, env: str | None) -> Mapping[str, Any]:
        """The fields of a preset; families that have presets override this."""
        raise UserError(f"`{cls.name}` has no presets")

    @classmethod
    def load(cls, folder: str | Path, *, inference: bool = False, allow_changes: bool = False, **given: Any) -> Self:
        """A trainer from a run folder, a checkpoint or a saved folder.

        Args:
            inference: load what `predict` and `evaluate` need, without buffer and optimisers.
            allow_changes: let `given` fields differ from the saved ones.
            given: fields to use instead of the saved ones, and objects such as `env` that no file can hold.

        Raises:
            UserError: another trainer's folder, or fields that differ.
            CheckpointError: nothing complete to load.
        """
        path, _, messages = checkpoint.resolve(Path(folder))
        for message in messages:
            processes.say(message)
        return cls._from_checkpoint(path, inference=inference, allow_changes=allow_changes, **given)

    @classmethod
    def _from_checkpoint(
        cls, path: Path, *, inference: bool = False, allow_changes: bool = False, **given: Any
    ) -> Self:
        files, about = cls._read(path, inference)
        saved = yaml.safe_load(files["config.yaml"])
        saved.pop("steps", None)
        trainer = saved.pop("trainer", None)
        if trainer != cls.name:
            raise UserError(f"{path} was saved by `{trainer}`, not by `{cls.name}`; rlkit.load finds the class itself")
        objects = {k: given.pop(k) for k in list(given) if cls.is_object(k, given[k])}
        out = given.pop("out", None)
        changed = differences({k: saved.get(k) for k in given}, to_dict_values(given))
        if changed and not allow_changes:
            raise UserError(
                f"these differ from {path}:\n{changed}\n"
                "Use `allow_changes=True` (`--allow-changes`) to go on with the given ones."
            )
        config = cls.make_config({**merge(saved, given), "out": None}, source=str(path / "config.yaml"))
        self = cls._restored(config, files, path, objects)
        self.load_state(files)
        self.processes.same("the checkpoint's step", (self.clock, self.updates))
        self.seconds = float(about.get("seconds", 0.0))
        self.folder = Path(out) if out is not None else None
        if not inference:
            _tell_versions(about)
        return self

    @classmethod
    def _read(cls, path: Path, inference: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """-> (files of the state as this process needs them, metadata) of the checkpoint at `path`.

        Raises:
            UserError: it is of another number of processes, which have parts of the state for themselves.
        """
        parts = checkpoint.parts(path)
        if inference or not cls.own:
            return checkpoint.load(path, parts & cls.inference_parts if inference else parts)
        rank, size = processes.expected()
        wrote = 1 + max((int(match[1]) for part in parts if (match := _OF_RANK.fullmatch(part))), default=0)
        if wrote != size:
            launcher = f"torchrun --nproc_per_node {wrote} -m " if wrote > 1 else ""
            raise processes.shared(
                UserError(
                    f"{path} is of {_processes(wrote)} with environments and a part of the buffer each, and this is "
                    f"{_processes(size)}. Go on with as many: `{launcher}rlkit resume RUN`. To predict or to evaluate, "
                    f"any number will do: `rlkit eval`, or rlkit.load({str(path)!r}, inference=True)"
                )
            )
        own = {name for name in (*cls.own, "state") if _of_rank(name, rank) in parts} if rank else set()
        common = {part for part in parts if not _OF_RANK.fullmatch(part)} - (own - {"state"})
        files, about = checkpoint.load(path, common | {_of_rank(name, rank) for name in own})
        for name in own - {"state"}:
            files[name] = files.pop(_of_rank(name, rank))
        files["state"] |= files.pop(_of_rank("state", rank)) if rank else {}
        return files, about

    @classmethod
    def _restored(cls, config: Any, files: Mapping[str, Any], path: Path, objects: Mapping[str, Any]) -> Self:
        """A trainer into which the state of the checkpoint at `path` can be loaded."""
        return cls(config=config, saved=files["state"], **objects)

    @classmethod
    def is_object(cls, key: str, value: Any) -> bool:
        """Whether a keyword is a Python object that belongs to the constructor rather than to the configuration."""
        return False


_OF_RANK = re.compile(r"\w+-(\d+)")


def _of_rank(part: str, rank: int) -> str:
    """The name, in a checkpoint, of a part that the process `rank` has for itself."""
    return f"{part}-{rank}" if rank else part


def _processes(n: int) -> str:
    return "one process" if n == 1 else f"{n} processes"


def _whole(total: Any) -> int:
    """`total` as an int.

    Raises:
        UserError: it is no whole number of at least 1.
    """
    try:
        whole = int(total)
    except (TypeError, ValueError, OverflowError):
        whole = 0
    if whole < 1 or whole != total:
        raise UserError(f"`total_timesteps`: got {total!r}; allowed: an integer >= 1")
    return whole


def to_dict_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Given fields as they would stand in a file: tuples as lists, dataclasses as mappings."""
    return yaml.safe_load(yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}))


def _tell_versions(about: Mapping[str, Any]) -> None:
    changed = differences(about.get("versions", {}), versions())
    if changed:
        processes.say(f"versions differ from the checkpoint's, so equal numbers are not promised:\n{changed}")
    elif about.get("threads") not in (None, torch.get_num_threads()):
        processes.say(
            f"the checkpoint was made with {about['threads']} threads, this run has {torch.get_num_threads()}: equal "
            "numbers are not promised (set `threads`)"
        )


def load(folder: str | Path, **given: Any) -> Trainer:
    """`Trainer.load` of the class that the folder names (one that `rlkit list` shows)."""
    path, _, messages = checkpoint.resolve(Path(folder))
    for message in messages:
        processes.say(message)
    return registry.get(trainer_name(path))._from_checkpoint(path, **given)


def trainer_name(folder: Path) -> str:
    """The registry name in a run's or checkpoint's `config.yaml`."""
    name = load_file(folder / "config.yaml").get("trainer")
    if not isinstance(name, str):
        raise CheckpointError(f"{folder / 'config.yaml'} names no trainer")
    return name


def resume(run: str | Path, *, allow_changes: bool = False, **given: Any) -> Trainer:
    """The trainer of an interrupted run, attached to its folder: `resume(run).learn()` finishes it.

    A run without a complete checkpoint starts afresh, and says so.

    Raises:
        UserError: no run there, or its `config.yaml` or `given` fields differ from the checkpoint's.
    """
    folder = Path(run)
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml")
    if (folder / checkpoint.MANIFEST).exists():
        place = checkpoint.resolve(folder)[1]
        raise UserError(
            f"{folder} is a checkpoint of the run {place}; resume that: `rlkit resume {place}`"
            if place
            else f"{folder} is a saved folder, not a run: it has nothing to go on from; resume the run that it is of"
        )
    cls = registry.get(trainer_name(folder))
    edited = load_file(folder / "config.yaml")
    steps = edited.pop("steps", 0)
    edited.pop("trainer")
    cls.make_config(edited, source=str(folder / "config.yaml"))
    if not checkpoint.has_checkpoints(folder):
        processes.say(f"{folder} has no checkpoint yet: starting afresh")
        return _afresh(cls, folder, edited, steps, given)
    path, messages = checkpoint.newest(folder)
    for message in messages:
        processes.say(message)
    trainer = cls._from_checkpoint(path, allow_changes=allow_changes, out=folder, **{**edited, **given})
    trainer.target = steps or trainer.target  # a raised total may be younger than the checkpoint
    return trainer


def _afresh(cls: type[Trainer], folder: Path, fields: dict[str, Any], steps: int, given: dict[str, Any]) -> Trainer:
    objects = {k: given.pop(k) for k in list(given) if cls.is_object(k, given[k])}
    trainer = cls(config=cls.make_config({**fields, **given, "out": None}), **objects)
    trainer.folder, trainer.target = folder, steps
    return trainer
