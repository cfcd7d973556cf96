"""OfflineTrainer: what control trainers share that learn from recorded transitions, alone or beside an environment.

`data` names a recording (see `rlkit.envs.offline`), or a function that makes one. It is read once, checked against the
environment, and stays beside the replay buffer: own transitions never overwrite recorded ones, and checkpoints hold a
fingerprint of it instead of a copy, which a resumed run compares. A trainer may have more than one (`recordings`).

The budget is one clock. Its first `offline_steps` are updates from the data alone; the others are steps of the
environments, with the updates due for them. `offline_steps: all` never steps an environment: offline learning.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import annotated_types as limits
import numpy as np
import torch
from torch import Tensor

from rlkit import processes
from rlkit.buffer import RolloutBuffer
from rlkit.config import Positive, Whole
from rlkit.control import ControlTrainer, OffPolicyConfig
from rlkit.envs import offline
from rlkit.envs.offline import Dataset
from rlkit.errors import UserError
from rlkit.trainer import Batch

Percentile = Annotated[float, limits.Interval(ge=0, le=100)]
Band = tuple[Percentile, Percentile]
"""Percentiles of the returns of recorded episodes, (0, 100) for all of them."""


@dataclass(frozen=True, kw_only=True)
class OfflineConfig(OffPolicyConfig):
    """Recorded transitions, and what is done with them."""

    data: str | None = None
    """Recorded transitions: `.npz`, HDF5 in D4RL's form, a Minari folder, `minari:ID`, or `module:function`, which
    returns one of them or arrays. None learns from the environment alone."""
    data_band: Band = (0.0, 100.0)
    """Which recorded episodes are learned from at all: percentiles of their returns."""
    return_range: Positive | None = None
    """Scale rewards by this over the difference between the largest and the least return of a recorded episode; own
    transitions by the same factor. None leaves them as they are."""
    offline_steps: Whole | Literal["all"] = 0
    """Updates from the data alone before the first step of the environments; part of the budget. `all`: the
    environments serve evaluation only, and `--steps` counts updates."""


class OfflineTrainer(ControlTrainer):
    """Base of control trainers that can learn from a recording.

    Args:
        env: as of `ControlTrainer`; without one, the environment that the recording names.
        data: what the field `data` can name, or arrays by name, a Minari dataset, or a `Dataset`.

    A subclass calls `open_data` at the end of `build`.
    """

    Config: ClassVar[type[OfflineConfig]] = OfflineConfig
    task_fields: ClassVar[tuple[str, ...]] = ("env", "data")
    recordings: ClassVar[tuple[str, ...]] = ("data",)
    """Fields that name recordings; the first is the one that bands and ranges of returns are of."""
    needs_rewards: ClassVar[bool] = True
    """Whether recordings have to have rewards; where they are ignored, zeros stand for those that are missing."""

    data: RolloutBuffer | None
    """Recorded transitions, in the columns of `buffer`; None without `data`, and in a trainer loaded to predict."""
    recorded: dict[str, RolloutBuffer]
    """The recordings that are loaded, by field; `data` is one of them."""

    def __init__(
        self,
        env: Any = None,
        *args: Any,
        data: Any = None,
        config: Any = None,
        saved: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        given = {"data": data} | {name: fields.pop(name, None) for name in self.recordings[1:]}
        self._given: dict[str, Any] = {}
        for name, source in given.items():
            named = source is None or isinstance(source, str | Path)
            if source is not None and config is None:
                fields[name] = str(source) if named else f"<{type(source).__name__}>"
            if not named:
                self._given[name] = source
        self._opened: dict[str, Dataset] = {}
        self._fresh = saved is None
        self._saved_data: dict[str, Mapping[str, Any]] = {}
        self._any_data = False
        self._about_data: dict[str, str] = {}
        self._reward_factor = 1.0
        config = self._absolute(config) if isinstance(config, self.Config) else config
        source = fields.get("data") if config is None else getattr(config, "data", None)
        env_given = env is not None or (fields.get("env") if config is None else getattr(config, "env", None))
        if self._fresh and source is not None and not env_given:
            self._opened["data"] = self._recording("data", source)
            env_id = self._opened["data"].env_id
            if env_id is None:
                raise UserError(f"`env`: {source} does not say which environment it is of; give one")
            if config is None:
                fields["env"] = env_id
            else:
                config = replace(config, env=env_id)
        super().__init__(env, *args, config=config, saved=saved, **fields)

    @classmethod
    def make_config(cls, fields: Mapping[str, Any], source: str = "") -> Any:
        return cls._absolute(super().make_config(fields, source))

    @classmethod
    def _absolute(cls, config: Any) -> Any:
        """`config` with local paths made absolute, so that the run can be resumed from any folder."""
        for name in cls.recordings:
            source = getattr(config, name)
            place = Path(source).expanduser() if source else None
            if place is not None and place.exists():
                config = replace(config, **{name: str(place.resolve())})
        return config

    @classmethod
    def is_object(cls, key: str, value: Any) -> bool:
        if key in cls.recordings:
            return value is not None and not isinstance(value, str | Path)
        return super().is_object(key, value)

    @classmethod
    def _from_checkpoint(cls, path: Path, *, allow_changes: bool = False, **given: Any) -> Self:
        self = super()._from_checkpoint(path, allow_changes=allow_changes, **given)
        self._any_data = allow_changes
        return self

    # Reading

    def open_data(self, bands: Mapping[str, Band] | None = None) -> None:
        """Read the recordings now, or, of a loaded trainer, before it learns on.

        Args:
            bands: name -> percentiles of returns, among the episodes of `data_band`; see `band`.

        Raises:
            UserError: it cannot be read, does not fit the environment, or options that do not fit each other.
        """
        config: OfflineConfig = self.config
        self.data, self.recorded, self._bands = None, {}, dict(bands or {})
        self._rows: dict[str, Tensor] = {}
        if config.data is None:
            if config.offline_steps != 0:
                raise UserError(f"`offline_steps`: got {config.offline_steps}, and there is no `data` to learn from")
            return
        if config.n_steps > 1:
            raise UserError(f"`n_steps`: got {config.n_steps}; of recorded transitions there are single steps alone")
        if self._fresh:
            self._load_data()

    def _recording(self, name: str, source: str) -> Dataset:
        if name in self._given:
            given = self._given[name]
            return given if isinstance(given, Dataset) else offline.read(given, rewards=self.needs_rewards)
        if source.startswith("<"):
            raise UserError(
                f"this run learned from Python data, {source}: pass it again, "
                f"{type(self).__name__}.load(folder, {name}=...)"
            )
        module, _, function = source.partition(":")
        if not function or offline.is_recording(source) or Path(source).exists():
            return offline.read(source, rewards=self.needs_rewards)
        try:
            made = getattr(importlib.import_module(module), function)()
        except (ImportError, AttributeError) as error:
            raise UserError(f"`{name}`: {source}: {error}") from error
        if isinstance(made, Dataset):
            return made
        return replace(offline.read(made, rewards=self.needs_rewards), source=source)

    def _load_data(self) -> None:
        for name in self.recordings:
            if getattr(self.config, name) is not None:
                self._load(name)
        self.data = self.recorded.get("data")

    def _load(self, name: str) -> None:
        config: OfflineConfig = self.config
        source, main = str(getattr(config, name)), name == self.recordings[0]
        dataset = self._opened.pop(name, None) or self._recording(name, source)
        offline.check_spaces(dataset, self.observation_space, self.action_space)
        reference = None if dataset.reference is None else list(dataset.reference)
        found = {"fingerprint": dataset.fingerprint(), "transitions": len(dataset), "reference": reference}
        saved = self._saved_data.get(name)
        if saved is not None and saved != found and not self._any_data:
            raise UserError(
                f"`{name}`: {source} is not what this run has learned from so far: {len(dataset):,} transitions, "
                f"fingerprint {found['fingerprint']}, and before {saved['transitions']:,}, {saved['fingerprint']}. "
                "Use `allow_changes=True` (`--allow-changes`) to go on with it."
            )
        self._saved_data[name] = found
        dataset = offline.clip_actions(dataset, self.action_space)
        dataset = dataset.band(*config.data_band) if main else dataset
        if self._fresh:
            for note in dataset.notes:
                processes.say(f"{name}: {note}")
        rows = dataset.rows
        n = len(dataset)
        columns = {name: rows[name] for name in ("obs", "next_obs", "terminated", "truncated")}
        columns["action"] = rows["action"] if self.scale is None else self.scale.from_env(rows["action"])
        reward = self._rewarded(rows, columns["action"])
        if main:
            self._reward_factor = self._factor(np.bincount(rows["episode"], weights=reward))
        columns["reward"] = (self._reward_factor * reward).astype(np.float32)
        columns["discount"] = np.full(n, config.gamma, np.float32)
        fields = self.transition_fields()
        self.recorded[name] = RolloutBuffer(n, fields, self.device, name=name)
        self.recorded[name].add({column: columns[column] for column in fields})
        if config.normalize_obs and self._fresh:
            self.normalizer.update(self.recorded[name]["obs"])
        self._describe_band(name, dataset)
        for part, band in self._bands.items() if main else ():
            inside = dataset.in_band(*band)
            ids = np.flatnonzero(inside[rows["episode"]])
            self._rows[part] = torch.from_numpy(ids).to(self.device)
            self._describe_band(part, dataset, inside)

    def _rewarded(self, rows: Mapping[str, Any], action: Any) -> Any:
        """Rewards of recorded transitions after the run's reward modules."""
        if not self.reward.modules:
            return rows["reward"]
        stateful = [
            spec for spec, m in zip(self._reward_specs, self.reward.modules, strict=True) if hasattr(m, "state_dict")
        ]
        if stateful:
            raise UserError(
                f"`reward`: {stateful[0]} depends on what was collected before, so recorded rewards would have another "
                "scale; use one without a memory, such as `scale=0.1`"
            )
        return self.reward(
            {
                "rewards": rows["reward"], "observations": rows["obs"], "actions": action,
                "next_observations": rows["next_obs"], "terminated": rows["terminated"],
                "truncated": rows["truncated"], "env": np.zeros(len(rows["reward"]), np.int64),
            }
        )  # fmt: skip

    def _factor(self, returns: Any) -> float:
        """What rewards are multiplied by, given the recorded returns."""
        config: OfflineConfig = self.config
        if config.return_range is None:
            return 1.0
        spread = float(returns.max() - returns.min())
        if spread == 0:
            raise UserError(
                f"`return_range`: got {config.return_range:g}, but all {len(returns):,} recorded returns are "
                f"{returns[0]:g}; use `--reward scale=...` instead"
            )
        return config.return_range / spread

    def shaped(self, rows: Mapping[str, Any]) -> Any:
        rewards = super().shaped(rows)
        return rewards if self._reward_factor == 1.0 else (self._reward_factor * rewards).astype(np.float32)

    def _describe_band(self, name: str, dataset: Dataset, inside: Any = slice(None)) -> None:
        returns, lengths = dataset.returns[inside], dataset.lengths[inside]
        self._about_data[name] = (
            f"{name}: {int(lengths.sum()):,} transitions of {len(returns):,} episodes, returns "
            f"{returns.min():.1f} to {returns.max():.1f}, mean {returns.mean():.1f}"
        )

    def before_learning(self) -> None:
        super().before_learning()
        if self.data is None and self.config.data is not None:
            self._load_data()

    # Evaluating

    def _evaluate(self, *args: Any) -> dict[str, Any] | None:
        record = super()._evaluate(*args)
        recorded = self._saved_data.get("data", {}).get("reference")
        reference = tuple(recorded) if recorded else offline.reference_returns(self.config.env)
        if record is not None and reference is not None:
            record["eval/normalized_score"] = offline.normalized_score(record["eval/mean_reward"], reference)
        return record

    def describe_evaluation(self, record: Mapping[str, Any]) -> str:
        text, score = super().describe_evaluation(record), record.get("eval/normalized_score")
        return text if score is None else f"{text}, normalised score {score:.1f}"

    def evaluation_json(self, record: Mapping[str, Any]) -> dict[str, Any]:
        score = record.get("eval/normalized_score")
        return super().evaluation_json(record) | ({} if score is None else {"normalized_score": score})

    # Learning

    def collect(self) -> int:
        if self.offline:
            self.owed += 1
            return 1
        return super().collect()

    @property
    def offline(self) -> bool:
        """Whether the next step of the clock is an update from the data alone."""
        steps = self.config.offline_steps
        return steps == "all" or self.clock < steps

    def planned_updates(self) -> float:
        steps = self.target if self.config.offline_steps == "all" else min(self.config.offline_steps, self.target)
        return max(0, steps - self.clock) + self.planned_online(max(steps, self.config.learning_starts))

    def experience(self, n: int, generator: torch.Generator) -> Batch:
        """`n` rows, drawn uniformly with replacement from recorded and own transitions together."""
        if self.data is None:
            return self.buffer.sample(n, generator)
        ids = torch.randint(len(self.data) + len(self.buffer), (n,), generator=generator, device=self.device)
        recorded = ids < len(self.data)
        parts = self.data.rows(ids[recorded]), self.buffer.rows(ids[~recorded] - len(self.data))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def band(self, name: str, n: int, generator: torch.Generator) -> Batch:
        """`n` recorded rows of the band `name`, drawn uniformly with replacement."""
        assert self.data is not None
        ids = self._rows[name]
        return self.data.rows(ids[torch.randint(len(ids), (n,), generator=generator, device=self.device)])

    def with_demonstrations(self, fraction: float) -> Batch:
        """`batch_size` rows, `fraction` of them of the band `demonstrations`, with `demo` True, and those first."""
        size = self.config.batch_size
        n = round(size * fraction) if self.data is not None else 0
        parts = [self.band("demonstrations", n, self.rng["demonstrations"])] if n else []
        parts += [self.experience(size - n, self.rng["sample"])] if n < size else []
        batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {**batch, "demo": torch.arange(size, device=self.device) < n}

    def describe(self) -> str:
        return "\n".join([super().describe(), *self._about_data.values()])

    # State

    def state(self) -> dict[str, Any]:
        files = super().state()
        files["state"]["recordings"] = self._saved_data
        return files

    def load_state(self, files: Mapping[str, Any]) -> None:
        super().load_state(files)
        self._saved_data = dict(files["state"]["recordings"])
