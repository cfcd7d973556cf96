"""Recording: policies, random actions, replay buffers and data files become a Minari dataset (`rlkit data make`).

Episodes of policies are those of `rlkit.evaluate`: of the first source, with `deterministic`, the ones that `rlkit
eval` runs with the same number and seed, to the last bit; further sources derive their seed from their place. The same
command makes the same data. A dataset appears whole or not at all, read back and checked before it takes its name.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from rlkit import envs
from rlkit._version import __version__
from rlkit.control import ControlTrainer, OffPolicyConfig
from rlkit.envs import offline
from rlkit.envs.offline import Dataset
from rlkit.envs.spaces import check_action_space, flat_space
from rlkit.errors import UserError
from rlkit.evaluate import Predictor, evaluate
from rlkit.rng import derive
from rlkit.signals import stop
from rlkit.trainer import Trainer, load

if TYPE_CHECKING:
    from minari.data_collector import EpisodeBuffer

RANDOM, REPLAY = "random:", "replay:"
BAND = (0.0, 100.0)

MakeEnv = Callable[[], gym.Env]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Recording:
    """A dataset that was made: where it lies, and what is in it.

    Attributes:
        returns: (episodes,) undiscounted, in order.
        sources: for each source, what was recorded and how many of its episodes are in the dataset.
    """

    id: str
    path: Path
    env_id: str | None
    transitions: int
    returns: list[float]
    sources: list[dict[str, Any]]
    fingerprint: str

    def record(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "id": self.id,
            "path": str(self.path),
            "env": self.env_id,
            "episodes": len(self.returns),
            "transitions": self.transitions,
            "mean": _mean(self.returns),
            "std": _std(self.returns),
            "fingerprint": self.fingerprint,
            "sources": self.sources,
        }


def record(
    sources: Sequence[Any],
    out: str,
    episodes: int | Sequence[int | None] | None = None,
    *,
    seed: int = 0,
    deterministic: bool = False,
    band: tuple[float, float] = BAND,
    env: str | None = None,
    replace: bool = False,
    say: Say = lambda line: None,
) -> Recording:
    """Record episodes of all `sources`, one after the other, into the local Minari dataset `out`.

    Args:
        sources: run folders, checkpoints, saved folders or trainers (their policy); `random:` and an id or a run
            (uniform actions in its environment); `replay:` and a run (the complete episodes in its replay buffer);
            `minari:<id>`, a data file, or whatever else `rlkit.envs.offline.read` takes.
        out: id of the dataset, such as `hopper/medium-v0`.
        episodes: of each source, or one number for all of them. None takes all that a buffer or file has; of these a
            number is drawn without replacement.
        seed: of all that is random.
        deterministic: policies act by their mode instead of samples.
        band: percentiles of the returns of all episodes together; those outside are left out, see `Dataset.in_band`.
        env: id of the environment of data files, which do not say it.
        replace: an existing dataset `out` gives way.
        say: gets a line for each source, and for what was left out.

    Raises:
        UserError: sources that cannot be recorded or are of different environments, numbers that do not fit, a dataset
            that is there already.
        EnvError: an environment raised.
        KeyboardInterrupt: SIGINT or SIGTERM arrived; nothing is left.
    """
    dataset_id = offline.check_id(out.removeprefix(offline.MINARI))
    _check_free(dataset_id, replace)
    numbers = _numbers(sources, episodes)
    with stop:
        opened = [_open(source, deterministic) for source in sources]
        if deterministic and not any(source.facts["kind"] == "policy" for source in opened):
            raise UserError("`--deterministic`: none of the sources is a policy, so nothing here acts by its mode")
        place = _environment(opened, env)
        recorded: list[tuple[Source, EpisodeBuffer]] = []
        for i, (source, number) in enumerate(zip(opened, numbers, strict=True)):
            found = source.collect(number, derive(seed, "source", i) if i else seed, place)
            say(f"{source.name}: {_summary(found)}")
            for note in source.notes:
                say(f"{source.name}: {note}")
            recorded += [(source, episode) for episode in found]
        if stop.requested:
            raise KeyboardInterrupt
        if tuple(band) != BAND:
            inside = _in_band([episode for _, episode in recorded], band)
            say(f"band {band[0]:g} to {band[1]:g} of the returns: {inside.sum():,} of {len(inside):,} episodes")
            recorded = [pair for pair, chosen in zip(recorded, inside, strict=True) if chosen]
        if _storable(place.spec) is None:
            say("the environment has no description that JSON can hold: the dataset does not say which it is")
        facts = [_facts(source, [episode for own, episode in recorded if own is source]) for source in opened]
        episodes_kept = [episode for _, episode in recorded]
        about = {"version": __version__, "seed": seed, "band": list(band), "sources": facts}
        path, dataset = _write(dataset_id, episodes_kept, place, about, replace)
    returns = [_return(episode) for episode in episodes_kept]
    return Recording(dataset_id, path, place.env_id, len(dataset), returns, facts, dataset.fingerprint())


def _numbers(sources: Sequence[Any], episodes: int | Sequence[int | None] | None) -> list[int | None]:
    """For each source, how many episodes, None for all."""
    if not sources:
        raise UserError("nothing to record: give a run, `random:ENV_ID`, `replay:RUN`, `minari:ID` or a data file")
    given = [episodes] if episodes is None or isinstance(episodes, int) else list(episodes)
    if len(given) == 1:
        given *= len(sources)
    if len(given) != len(sources):
        raise UserError(f"`--episodes`: got {len(given)} numbers for {len(sources)} sources; give one, or one for each")
    for number in given:
        if number is not None and number < 1:
            raise UserError(f"`--episodes`: got {number}; at least 1 is needed")
    return given


# --- sources -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """The environment that all sources have in common."""

    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    spec: EnvSpec | None

    @property
    def env_id(self) -> str | None:
        return None if self.spec is None else self.spec.id


@dataclass
class Source:
    """Where episodes come from.

    Attributes:
        collect: (episodes or None for all, seed, common environment) -> episodes.
        place: its environment, where it knows one.
        dataset: of recorded transitions, which may not say their environment.
    """

    name: str
    facts: dict[str, Any]
    collect: Callable[[int | None, int, Place], list[EpisodeBuffer]]
    place: Place | None = None
    dataset: Dataset | None = None
    notes: list[str] = field(default_factory=list)


def _open(source: Any, deterministic: bool) -> Source:
    if isinstance(source, Trainer):
        return _policy(source, f"<{type(source).__name__}>", deterministic)
    text = str(source) if isinstance(source, str | Path) else ""
    if text.startswith(RANDOM):
        return _random(text)
    if text.startswith(REPLAY):
        return _replay(text)
    if not text or offline.is_recording(text):
        dataset = offline.read(source)
        return _recorded(dataset, {"kind": "data", "content": dataset.fingerprint()})
    return _policy(load(text, inference=True), text, deterministic)


def _policy(trainer: Trainer, name: str, deterministic: bool) -> Source:
    """Episodes of a trainer's policy."""
    actor = _acting(trainer, name)
    make_env = _eval_env(actor, name)

    def collect(number: int | None, seed: int, place: Place) -> list[EpisodeBuffer]:
        stream = actor.rng["predict"]
        before = stream.get_state()  # a trainer given in Python goes on as if nothing had been
        stream.manual_seed(derive(seed, "record"))
        actor._set_training(False)
        try:
            return _episodes(actor, make_env, _needed(name, number), seed, deterministic)
        finally:
            actor._set_training(True)
            stream.set_state(before)

    facts = {"kind": "policy", "trainer": actor.name, "step": actor.clock, "deterministic": deterministic}
    return Source(name, facts, collect, _place(make_env))


def _acting(trainer: Trainer, name: str) -> ControlTrainer:
    if not isinstance(trainer, ControlTrainer):
        raise UserError(f"{name}: `{trainer.name}` acts in no environment: there are no episodes to record")
    return trainer


def _eval_env(trainer: ControlTrainer, name: str) -> MakeEnv:
    make_env = trainer.make_eval_env()
    if make_env is None:
        raise UserError(
            f"{name}: trained on an environment given in Python, which no file can hold: record it there, "
            f"rlkit.recording.record([rlkit.load({name!r}, eval_env=make_env)], out=..., episodes=...)"
        )
    return make_env


def _random(text: str) -> Source:
    """Episodes of uniform actions in an environment, or in that of a run."""
    what = text.removeprefix(RANDOM)
    is_run = Path(what).is_dir()
    make_env = _eval_env(_acting(load(what, inference=True), what), what) if is_run else _env_of(what)
    place = _place(make_env)
    check_action_space(place.action_space, ("Box", "Discrete"), f"`{RANDOM}`")

    def collect(number: int | None, seed: int, common: Place) -> list[EpisodeBuffer]:
        policy = Uniform(place.action_space, derive(seed, "random"))
        return _episodes(policy, make_env, _needed(text, number), seed, False)

    return Source(text, {"kind": "random"}, collect, place)


def _needed(name: str, number: int | None) -> int:
    if number is None:
        raise UserError(f"{name}: how many episodes? Give `--episodes N`; `all` is for buffers and data files")
    return number


class Uniform:
    """A policy of uniform actions, drawn from a space with a seed of its own."""

    def __init__(self, space: gym.Space[Any], seed: int) -> None:
        self._space = copy.deepcopy(space)  # with a generator of its own
        self._space.seed(seed)

    def predict(self, observation: Any, *, deterministic: bool = False) -> tuple[np.ndarray, Any]:
        batch = observation
        while isinstance(batch, Mapping):
            batch = next(iter(batch.values()))
        return np.stack([self._space.sample() for _ in range(len(batch))]), None


def _env_of(env_id: str) -> MakeEnv:
    make_env = envs.single(env_id)
    assert make_env is not None  # of an id there is one, or an error
    return make_env


def _place(make_env: MakeEnv) -> Place:
    env = make_env()
    try:
        flat_space(env.observation_space)  # what rlkit could not read again is refused now
        return Place(env.observation_space, env.action_space, env.spec)
    finally:
        env.close()


# --- episodes of environments ------------------------------------------------------------------------------------


def _episodes(policy: Predictor, make_env: MakeEnv, number: int, seed: int, deterministic: bool) -> list[EpisodeBuffer]:
    """Episodes 0 … number - 1 of `seed`, as evaluations run them."""
    finished: dict[int, EpisodeBuffer] = {}

    def keep(index: int, env: gym.Env, observation: Any, action: Any) -> None:
        if action is None:
            assert isinstance(env, Recorder)
            finished[index] = env.episode()

    result = evaluate(
        policy,
        lambda: Recorder(make_env()),
        number,
        seed,
        deterministic=deterministic,
        should_stop=lambda: stop.requested,
        watch=keep,
    )
    if result is None:
        raise KeyboardInterrupt
    return [finished[index] for index in range(number)]


class Recorder(gym.Wrapper):
    """Keeps copies of the running episode, because environments may write into what they returned or were given."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        self._seed = seed
        self._obs, self._actions = [_copied(self.observation_space, obs)], list[NDArray[Any]]()
        self._rewards, self._terminated, self._truncated = list[float](), list[bool](), list[bool]()
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self._actions.append(_copied(self.action_space, action))
        obs, reward, terminated, truncated, info = self.env.step(action)
        self._obs.append(_copied(self.observation_space, obs))
        self._rewards.append(float(reward))
        self._terminated.append(bool(terminated))
        self._truncated.append(bool(truncated))
        return obs, reward, terminated, truncated, info

    def episode(self) -> EpisodeBuffer:
        """The finished episode."""
        from minari.data_collector import EpisodeBuffer

        return EpisodeBuffer(
            seed=self._seed,
            observations=_stacked(self._obs),
            actions=_stacked(self._actions),
            rewards=np.array(self._rewards),
            terminations=np.array(self._terminated),
            truncations=np.array(self._truncated),
        )


def _copied(space: gym.Space[Any], value: Any) -> Any:
    """A copy in the dtype of the space."""
    if isinstance(space, gym.spaces.Dict):
        return {key: _copied(part, value[key]) for key, part in space.spaces.items()}
    return np.array(value, dtype=space.dtype)


def _stacked(values: list[Any]) -> Any:
    """(T, ...) arrays of T values, keys kept."""
    if isinstance(values[0], Mapping):
        return {key: _stacked([value[key] for value in values]) for key in values[0]}
    return np.stack(values)


# --- episodes that were recorded before --------------------------------------------------------------------------


def _recorded(dataset: Dataset, facts: dict[str, Any]) -> Source:
    """All, or some, of the episodes of a dataset."""
    spaces = dataset.observation_space, dataset.action_space
    place = None if spaces[0] is None or spaces[1] is None else Place(*spaces, dataset.env_spec)
    notes = list(dataset.notes)

    def collect(number: int | None, seed: int, common: Place) -> list[EpisodeBuffer]:
        offline.check_spaces(dataset, common.observation_space, common.action_space)
        clipped = offline.clip_actions(dataset, common.action_space)  # refuses other units
        if clipped is not dataset:
            notes.append(f"{clipped.notes[-1].removesuffix(offline.CLIPPED)}; they are kept as they are")
        n = len(dataset.lengths)
        if number is not None and number > n:
            raise UserError(
                f"{dataset.source}: has {n:,} episodes, {number:,} were asked for; `all` takes what there is"
            )
        chosen = np.arange(n)
        if number is not None:
            chosen = np.sort(np.random.default_rng(derive(seed, "episodes")).choice(n, number, replace=False))
        return _buffers(dataset.take(chosen), common.observation_space)

    return Source(dataset.source, facts, collect, place, dataset, notes)


def _buffers(dataset: Dataset, space: gym.Space[Any]) -> list[EpisodeBuffer]:
    """Minari's episodes: T + 1 observations of `space`, T of all else."""
    from minari.data_collector import EpisodeBuffer

    rows = dataset.rows
    stops = np.cumsum(dataset.lengths).tolist()
    inner = rows["episode"][1:] == rows["episode"][:-1]
    leaps = int((inner & (rows["next_obs"][:-1] != rows["obs"][1:]).any(axis=1)).sum())
    if leaps:
        raise UserError(
            f"{dataset.source}: after {leaps:,} transitions the episode goes on from another observation than they led "
            "to; Minari's episodes cannot hold that"
        )
    buffers = []
    for start, stop_ in zip([0, *stops[:-1]], stops, strict=True):
        part = slice(start, stop_)
        buffers.append(
            EpisodeBuffer(
                observations=_unflattened(
                    space, np.concatenate([rows["obs"][part], rows["next_obs"][stop_ - 1 : stop_]])
                ),
                actions=rows["action"][part],
                rewards=rows["reward"][part],
                terminations=rows["terminated"][part],
                truncations=rows["truncated"][part],
            )
        )
    return buffers


def _unflattened(space: gym.Space[Any], rows: NDArray[Any]) -> Any:
    """The inverse of `flatten_obs` for a batch (n, dim)."""
    if not isinstance(space, gym.spaces.Dict):
        return rows.reshape(len(rows), *(space.shape or ())).astype(space.dtype, copy=False)
    sizes = [flat_space(part).shape[0] for part in space.spaces.values()]
    parts = np.split(rows, np.cumsum(sizes)[:-1], axis=1)
    return {key: _unflattened(part, columns) for (key, part), columns in zip(space.spaces.items(), parts, strict=True)}


def _replay(text: str) -> Source:
    """The complete episodes in the replay buffer of a run."""
    run = text.removeprefix(REPLAY)
    trainer = _acting(load(run), run)
    config = trainer.config
    needed = {"obs", "action", "reward", "next_obs", "terminated", "truncated"}
    if not isinstance(config, OffPolicyConfig) or not needed <= trainer.buffer.fields.keys():
        raise UserError(f"{text}: `{trainer.name}` keeps no replay buffer")
    if config.reward:
        raise UserError(
            f"{text}: its rewards were changed by `reward` ({', '.join(config.reward)}) before they were stored, so "
            "the environment's are not there"
        )
    if config.n_steps > 1:
        raise UserError(
            f"{text}: its rewards are sums of {config.n_steps} steps (`n_steps`), single ones are not there"
        )
    if config.env is None:
        raise UserError(f"{text}: trained on an environment given in Python: what its rows are of, no file says")
    if not len(trainer.buffer):
        raise UserError(f"{text}: the replay buffer is empty")
    make_env = _eval_env(trainer, run)
    place = _place(make_env)
    overwritten = len(trainer.buffer) == trainer.buffer.capacity and trainer.clock != len(trainer.buffer)
    rows, notes = _complete(_in_time(trainer), trainer.n_envs, overwritten, text)
    if trainer.scale is not None:
        rows["action"] = trainer.scale.to_env(rows["action"])
    else:
        rows["action"] = rows["action"] + trainer.action_space.start
    dataset = Dataset(
        rows, text, trainer.observation_space, trainer.action_space, config.env, tuple(notes), env_spec=place.spec
    )
    return _recorded(dataset, {"kind": "replay", "trainer": trainer.name, "step": trainer.clock})


def _in_time(trainer: ControlTrainer) -> dict[str, NDArray[Any]]:
    """Columns of the replay buffer from the oldest row to the newest."""
    state = trainer.buffer.state_dict()
    oldest = state["position"] if state["size"] == state["capacity"] else 0
    names = ("obs", "action", "reward", "next_obs", "terminated", "truncated")
    return {name: np.roll(state["columns"][name].numpy(force=True), -oldest, axis=0) for name in names}


def _complete(
    rows: dict[str, NDArray[Any]], n_envs: int, overwritten: bool, source: str
) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """The episodes that are there from reset to end, in the order of their ends, and notes on the others.

    Args:
        rows: in the order of time; every `n_envs`-th is of the same environment, as each steps in every turn.
        overwritten: whether rows before the first one are lost.
    """
    ends = rows["terminated"] | rows["truncated"]
    n = len(ends)
    # An environment that could not be restored was reset, so that its rows do not go on where they led to.
    follows = np.zeros(n, np.bool_)
    follows[:-n_envs] = ~ends[:-n_envs] & (rows["next_obs"][:-n_envs] == rows["obs"][n_envs:]).all(axis=1)
    episodes: list[NDArray[np.int64]] = []
    partial = {"began before the oldest row": 0, "were running or broken off": 0}
    for i in range(min(n_envs, n)):
        own = np.arange(i, n, n_envs)
        borders = np.flatnonzero(~follows[own]) + 1
        for k, part in enumerate(np.split(own, borders[:-1])):
            if k == 0 and overwritten:
                partial["began before the oldest row"] += 1
            elif not ends[part[-1]]:
                partial["were running or broken off"] += 1
            else:
                episodes.append(part)
    if not episodes:
        raise UserError(f"{source}: no complete episode in the {n:,} rows of the replay buffer")
    episodes.sort(key=lambda part: int(part[-1]))
    index = np.concatenate(episodes)
    notes = [f"left out {count:,} episodes that {what}" for what, count in partial.items() if count]
    if n > len(index):
        notes.append(f"{len(index):,} of the {n:,} rows of the replay buffer are of complete episodes")
    number = np.repeat(np.arange(len(episodes)), [len(part) for part in episodes])
    return {**{name: column[index] for name, column in rows.items()}, "episode": number}, notes


# --- one environment for all -------------------------------------------------------------------------------------


def _environment(sources: Sequence[Source], env: str | None) -> Place:
    """The environment that all sources are of.

    Raises:
        UserError: they are of different ones, or none says which.
    """
    known = [(source.name, source.place) for source in sources if source.place is not None]
    if env is not None:
        known.insert(0, (f"`--env {env}`", _place(_env_of(env))))
    if not known:
        raise UserError(f"{sources[0].name} does not say which environment it is of; give `--env ID`")
    first_name, first = known[0]
    spec = first.spec
    for name, place in known[1:]:
        if first.observation_space != place.observation_space or first.action_space != place.action_space:
            raise UserError(
                f"{name} and {first_name} have different spaces: {place.observation_space}, {place.action_space} and "
                f"{first.observation_space}, {first.action_space}"
            )
        if spec is None or place.spec is None:
            spec = spec or place.spec
            continue
        ours, theirs = _described(spec), _described(place.spec)
        for key in {**ours, **theirs}:
            if ours.get(key) != theirs.get(key):
                raise UserError(
                    f"{name} and {first_name} are of different environments: `{key}` is {theirs.get(key)} and "
                    f"{ours.get(key)}; a dataset is of one"
                )
    return dataclasses.replace(first, spec=spec)


def _described(spec: EnvSpec) -> dict[str, Any]:
    """What makes an environment another one, in JSON's types."""
    kwargs = {key: value for key, value in spec.kwargs.items() if key != "render_mode"}
    wrappers = [wrapper.name for wrapper in spec.additional_wrappers]
    values = {"id": spec.id, "max_episode_steps": spec.max_episode_steps, **kwargs, "wrappers": wrappers}
    described: dict[str, Any] = json.loads(json.dumps(values, default=repr))
    return described


# --- writing -----------------------------------------------------------------------------------------------------


def _check_free(dataset_id: str, replace: bool) -> None:
    from minari.storage.datasets_root_dir import get_dataset_path

    path = get_dataset_path(dataset_id)
    if path.exists() and not replace:
        raise UserError(f"the dataset {dataset_id} exists ({path}); choose another version, or give `--replace`")
    if path.exists() and not (path / "data").is_dir():
        raise UserError(f"{path} exists and is no dataset: choose another id")
    for folder in path.relative_to(get_dataset_path()).parents:
        if (get_dataset_path(str(folder)) / "data").is_dir() and str(folder) != ".":
            raise UserError(f"{dataset_id} would lie inside the dataset {folder}: choose another id")


def _write(
    dataset_id: str, buffers: list[EpisodeBuffer], place: Place, about: Mapping[str, Any], replace: bool
) -> tuple[Path, Dataset]:
    """Write a dataset beside its place, read it back, then give it its name."""
    import minari
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.dataset.minari_storage import MinariStorage
    from minari.namespace import create_namespace, list_local_namespaces
    from minari.storage.datasets_root_dir import get_dataset_path

    path = get_dataset_path(dataset_id)
    temp = path.with_name(f".tmp-{os.getpid()}-{path.name}")  # Minari passes over folders that begin with a dot
    try:
        temp.mkdir(parents=True)
        storage = MinariStorage.new(
            temp / "data",
            observation_space=place.observation_space,
            action_space=place.action_space,
            env_spec=_storable(place.spec),
        )
        named = {"dataset_id": dataset_id, "minari_version": minari.__version__}
        storage.update_metadata({**named, **_metadata(about), "requirements": _requirements(place.spec)})
        storage.update_episodes(buffers)
        dataset = offline.read(minari.MinariDataset(temp / "data"))
        _check_free(dataset_id, replace)  # it may have appeared since
        if path.exists():
            old = path.with_name(f".old-{os.getpid()}-{path.name}")
            path.rename(old)
            temp.rename(path)
            shutil.rmtree(old)
        else:
            temp.rename(path)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    namespace = parse_dataset_id(dataset_id)[0]
    if namespace is not None and namespace not in list_local_namespaces():
        create_namespace(namespace)
    return path, dataset


def _storable(spec: EnvSpec | None) -> EnvSpec | None:
    """`spec`, if JSON can hold it and so bring the environment back; without pictures, which nobody asked for."""
    if spec is None:
        return None
    kwargs = {key: value for key, value in spec.kwargs.items() if key != "render_mode"}
    plain = dataclasses.replace(spec, kwargs=kwargs)
    try:
        plain.to_json()
    except (TypeError, ValueError):
        return None
    return plain


def _requirements(spec: EnvSpec | None) -> list[str]:
    """What the environment was run with; Minari compares when it recovers it."""
    names = ["gymnasium"] + ["mujoco"] * (spec is not None and "mujoco" in str(spec.entry_point))
    return [f"{name}=={version(name)}" for name in names]


def _metadata(about: Mapping[str, Any]) -> dict[str, Any]:
    names = [facts.get("trainer", facts["kind"]) for facts in about["sources"]]
    shown = [f"{facts['episodes']:,} episodes of {facts['source']}" for facts in about["sources"]]
    return {
        "algorithm_name": " + ".join(dict.fromkeys(names)),
        "description": f"Made by rlkit {about['version']}, seed {about['seed']}: {'; '.join(shown)}.",
        "rlkit": dict(about),
    }


# --- figures -----------------------------------------------------------------------------------------------------


def _return(buffer: EpisodeBuffer) -> float:
    """Undiscounted, summed in the order of the steps, as evaluations sum it."""
    return float(sum(float(reward) for reward in buffer.rewards))


def _in_band(buffers: Sequence[EpisodeBuffer], band: tuple[float, float]) -> NDArray[np.bool_]:
    returns = np.array([_return(buffer) for buffer in buffers])
    rows = {"reward": returns, "episode": np.arange(len(returns))}  # episodes of one transition
    return Dataset(rows, "the recorded episodes").in_band(*band)


def _facts(source: Source, buffers: Sequence[EpisodeBuffer]) -> dict[str, Any]:
    """Of a source, what went into the dataset."""
    returns = [_return(buffer) for buffer in buffers]
    return {
        "source": source.name,
        **source.facts,
        "episodes": len(buffers),
        "transitions": sum(len(buffer) for buffer in buffers),
        "return_mean": _mean(returns),
        "return_std": _std(returns),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _std(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None of less than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _summary(buffers: Sequence[EpisodeBuffer]) -> str:
    returns = [_return(buffer) for buffer in buffers]
    return described(len(returns), sum(len(buffer) for buffer in buffers), _mean(returns), _std(returns))


def described(episodes: int, transitions: int, mean: float | None, std: float | None) -> str:
    """`100 episodes, 20,000 transitions, return -150.2 ± 80.1`."""
    spread = "" if std is None else f" ± {std:.1f}"
    return f"{episodes:,} episodes, {transitions:,} transitions, return {mean:.1f}{spread}"
