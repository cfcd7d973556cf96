"""Recorded experience: every source gives the same transitions, what is dropped is counted, bad data are refused.

Numbers here are written out or follow from the arrays below by hand; gymnasium steps its own environments.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from minari.data_collector import EpisodeBuffer

from rlkit.envs import flatten_obs, offline
from rlkit.errors import UserError

SHARED = Path(__file__).parent.parent.parent / "shared" / "data" / "offline_rl"
COLUMNS = ("obs", "action", "reward", "next_obs", "terminated", "truncated", "episode")

Episode = dict[str, np.ndarray]


def cartpole(lengths_limit: int = 12, n: int = 5) -> list[Episode]:
    """Episodes of random actions in CartPole, some of which end by the limit and some by the pole."""
    env = gym.make("CartPole-v1", max_episode_steps=lengths_limit)
    env.action_space.seed(0)
    episodes = []
    for i in range(n):
        obs, _ = env.reset(seed=i)
        columns: dict[str, list[Any]] = {name: [] for name in ("obs", "action", "reward", "terminated", "truncated")}
        columns["obs"].append(obs)
        done = False
        while not done:
            action = 0 if i == 1 else env.action_space.sample()  # always to the left falls within ten steps
            obs, reward, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
            for name, value in zip(columns, (obs, action, reward, terminated, truncated), strict=True):
                columns[name].append(value)
        episodes.append({name: np.array(values) for name, values in columns.items()})
    return episodes


EPISODES = cartpole()
LENGTHS = [len(episode["reward"]) for episode in EPISODES]


def flat(episodes: list[Episode], following: bool = True) -> dict[str, np.ndarray]:
    """The arrays of a D4RL-style file."""
    arrays = {
        "observations": np.concatenate([e["obs"][:-1] for e in episodes]),
        "actions": np.concatenate([e["action"] for e in episodes]),
        "rewards": np.concatenate([e["reward"] for e in episodes]),
        "terminals": np.concatenate([e["terminated"] for e in episodes]),
        "timeouts": np.concatenate([e["truncated"] for e in episodes]),
    }
    if following:
        arrays["next_observations"] = np.concatenate([e["obs"][1:] for e in episodes])
    return arrays


def small(**changes: Any) -> dict[str, Any]:
    """Six transitions in three episodes: one terminates after 2 steps, one times out after 3, one is cut off."""
    obs = np.arange(6.0)[:, None] * [1, 10]
    arrays = {
        "observations": obs,
        "actions": np.linspace(-1, 1, 6)[:, None],
        "rewards": np.array([1.0, 2, 3, 4, 5, 6]),
        "terminals": np.array([0, 1, 0, 0, 0, 0]),
        "timeouts": np.array([0, 0, 0, 0, 1, 0]),
        "next_observations": obs + np.array([1, 10]),
    }
    arrays |= changes
    return {name: value for name, value in arrays.items() if value is not None}


def write_hdf5(path: Path, arrays: dict[str, Any]) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
    return path


def buffers(episodes: list[Episode]) -> list[EpisodeBuffer]:
    return [
        EpisodeBuffer(
            observations=e["obs"],
            actions=e["action"],
            rewards=e["reward"],
            terminations=e["terminated"],
            truncations=e["truncated"],
        )
        for e in episodes
    ]


def write_minari(dataset_id: str, episodes: list[EpisodeBuffer], **options: Any) -> minari.MinariDataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for authors and the like
        return minari.create_dataset_from_buffers(dataset_id, episodes, **{"env": "CartPole-v1", **options})


@pytest.fixture(autouse=True)
def _minari_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


def check(dataset: offline.Dataset, episodes: list[Episode]) -> None:
    """All rows are those of `episodes`, dtypes included."""
    expected = flat(episodes)
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    for name, column in zip(COLUMNS[:-1], names, strict=True):
        np.testing.assert_array_equal(dataset.rows[name], expected[column], strict=True)
    number = np.repeat(np.arange(len(episodes)), [len(e["reward"]) for e in episodes])
    np.testing.assert_array_equal(dataset.rows["episode"], number, strict=True)
    assert set(dataset.rows) == set(COLUMNS)


# --- sources -----------------------------------------------------------------------------------------------------


def test_reference_returns_of_a_minari_dataset_are_read_and_reported() -> None:
    """As Minari's own `get_normalized_score`, times 100; D4RL's by the environment where there are none."""
    episodes = cartpole()
    dataset = write_minari("some/ref-v0", buffers(episodes), ref_min_score=-1.0, ref_max_score=9.0)
    found = offline.read(dataset)
    assert found.reference == (-1.0, 9.0)
    assert found.band(50, 100).reference == (-1.0, 9.0)
    mean = float(found.returns.mean())
    score = 100 * float(minari.get_normalized_score(dataset, np.array([mean]))[0])
    assert offline.normalized_score(mean, found.reference) == pytest.approx(score)
    line = f"normalised score of the mean return: {score:.1f} (0 is -1, 100 is 9)"
    assert line in offline.report(found)
    plain = offline.read(write_minari("some/plain-v0", buffers(episodes)))
    assert plain.reference is None
    assert not any("normalised" in line for line in offline.report(plain))
    assert offline.reference_returns("Hopper-v4") == offline.reference_returns("Hopper-v5") == (-20.272305, 3234.3)
    assert offline.reference_returns("CartPole-v1") is None
    assert offline.reference_returns(None) is None


def test_the_episodes_of_these_tests_end_both_ways() -> None:
    assert LENGTHS[1] < 12
    assert EPISODES[1]["terminated"][-1]
    assert not EPISODES[1]["truncated"][-1]
    assert any(e["truncated"][-1] and not e["terminated"][-1] for e in EPISODES)


def test_every_source_gives_the_same_transitions(tmp_path: Path) -> None:
    arrays = flat(EPISODES)
    np.savez(tmp_path / "data.npz", **arrays)
    np.savez_compressed(tmp_path / "small.npz", **arrays)
    made = write_minari("cartpole/random-v0", buffers(EPISODES))
    sources: list[Any] = [
        arrays,
        tmp_path / "data.npz",
        str(tmp_path / "small.npz"),
        write_hdf5(tmp_path / "data.hdf5", arrays),
        write_hdf5(tmp_path / "data.h5", {k: v.astype(">f8") if k == "rewards" else v for k, v in arrays.items()}),
        "minari:cartpole/random-v0",
        made,
        minari.load_dataset("cartpole/random-v0"),
        tmp_path / "minari" / "cartpole" / "random-v0",
        str(tmp_path / "minari" / "cartpole" / "random-v0" / "data"),
        tmp_path / "minari" / "cartpole" / "random-v0" / "data" / "main_data.hdf5",
    ]
    prints = set()
    for source in sources:
        dataset = offline.read(source)
        check(dataset, EPISODES)
        assert dataset.lengths.tolist() == LENGTHS
        assert dataset.returns.tolist() == [float(n) for n in LENGTHS]  # CartPole's reward is 1
        assert dataset.notes == ()
        prints.add(dataset.fingerprint())
    assert len(prints) == 1
    dataset = offline.read("minari:cartpole/random-v0")
    env = gym.make("CartPole-v1")
    assert (dataset.env_id, dataset.observation_space, dataset.action_space) == (
        "CartPole-v1", env.observation_space, env.action_space,
    )  # fmt: skip
    assert dataset.source == "minari:cartpole/random-v0"
    assert offline.read(arrays).observation_space is None
    assert offline.read(dataset) is dataset


def test_minari_in_arrow_format(tmp_path: Path) -> None:
    write_minari("cartpole/arrow-v0", buffers(EPISODES), data_format="arrow")
    check(offline.read("minari:cartpole/arrow-v0"), EPISODES)


def test_timeouts_are_not_terminals() -> None:
    rows = offline.read(small()).rows
    assert rows["terminated"].tolist() == [False, True, False, False, False, False]
    assert rows["truncated"].tolist() == [False, False, False, False, True, True]
    assert rows["episode"].tolist() == [0, 0, 1, 1, 1, 2]


def test_a_recording_that_stops_is_truncated_and_said() -> None:
    dataset = offline.read(small())
    assert dataset.cut_off == {2}
    assert dataset.notes == ("the last episode stops in the middle: its end counts as truncated",)
    assert "ends: 1 terminated, 1 timed out, 1 cut off" in offline.report(dataset)
    whole = offline.read(small(timeouts=[0, 0, 0, 0, 1, 1]))
    assert (whole.cut_off, whole.notes) == (frozenset(), ())
    assert whole.fingerprint() == dataset.fingerprint()


def test_without_next_observations_exactly_the_unknown_ones_are_dropped() -> None:
    dataset = offline.read(small(next_observations=None))
    rows = dataset.rows
    # Row 4 (timed out) and row 5 (cut off, the whole of its episode) lead nowhere known; row 1 terminates and stays.
    assert rows["reward"].tolist() == [1, 2, 3, 4]
    assert rows["obs"][:, 0].tolist() == [0, 1, 2, 3]
    assert rows["next_obs"][[0, 2, 3], 0].tolist() == [1, 3, 4]
    assert rows["terminated"].tolist() == [False, True, False, False]
    assert rows["truncated"].tolist() == [False, False, False, True]
    assert rows["episode"].tolist() == [0, 0, 1, 1]
    assert dataset.cut_off == frozenset()
    assert dataset.notes[1] == (
        "no `next_observations`: dropped 2 transitions, the last of each episode that did not terminate; 1 of these "
        "episodes had no other"
    )


def test_a_cut_off_episode_stays_one_after_its_last_transition_was_dropped() -> None:
    dataset = offline.read(small(next_observations=None, timeouts=[0] * 6))
    assert dataset.lengths.tolist() == [2, 3]
    assert dataset.cut_off == {1}
    assert dataset.rows["truncated"].tolist() == [False, False, False, False, True]


def test_without_next_observations_the_rest_is_as_with_them() -> None:
    with_them, without = offline.read(flat(EPISODES)), offline.read(flat(EPISODES, following=False))
    lost = with_them.rows["truncated"] & ~with_them.rows["terminated"]
    assert 0 < lost.sum() == len(with_them) - len(without)
    for name in ("obs", "action", "reward", "terminated", "episode"):
        np.testing.assert_array_equal(without.rows[name], with_them.rows[name][~lost], strict=True)
    used = ~without.rows["terminated"]
    np.testing.assert_array_equal(without.rows["next_obs"][used], with_them.rows["next_obs"][~lost][used])


def test_without_timeouts_episodes_end_where_the_observations_leap() -> None:
    arrays = flat(EPISODES)
    timeouts = arrays.pop("timeouts")
    dataset = offline.read(arrays)
    np.testing.assert_array_equal(dataset.rows["truncated"], timeouts)
    assert dataset.lengths.tolist() == LENGTHS
    ended = sum(1 for e in EPISODES[:-1] if not e["terminated"][-1])
    assert dataset.notes[0].startswith(
        f"no `timeouts`: {ended} episodes were taken to end, without terminating, where "
    )


def test_next_observations_of_less_precision_still_chain() -> None:
    """Velocities of MuJoCo are float64; files with a float32 copy of the next ones exist."""
    obs = np.random.default_rng(0).normal(size=(6, 2))
    arrays = small(observations=obs, next_observations=np.roll(obs, -1, 0).astype(np.float32), timeouts=None)
    dataset = offline.read(arrays)
    assert dataset.lengths.tolist() == [2, 4]
    assert dataset.rows["next_obs"].dtype == np.float64


def test_leaps_within_an_episode_are_told() -> None:
    following = small()["next_observations"].copy()
    following[2] += 0.5
    assert offline.read(small(next_observations=following)).notes[0] == (
        "1 transitions within episodes have `next_observations` that are not the observations of the next row"
    )


def test_shapes_that_mean_the_same() -> None:
    """(n, 1) rewards and flags, (n,) observations and actions, matrices of observations, whole numbers as actions."""
    plain = offline.read(small())
    columns = {name: np.asarray(small()[name])[:, None] for name in ("rewards", "terminals", "timeouts")}
    again = offline.read(small(**columns, actions=small()["actions"][:, 0]))
    assert again.fingerprint() == plain.fingerprint()
    matrices = np.arange(24.0).reshape(6, 2, 2)
    assert offline.read(small(observations=matrices, next_observations=None)).rows["obs"].shape == (4, 4)
    assert offline.read(small(actions=np.arange(6, dtype=np.uint8)[:, None])).rows["action"].tolist() == [*range(6)]
    single = offline.read(small(observations=np.arange(6), next_observations=None))
    assert (single.rows["obs"].shape, single.rows["obs"].dtype) == ((4, 1), np.int64)


def test_what_is_not_used_is_named(tmp_path: Path) -> None:
    path = write_hdf5(tmp_path / "d.hdf5", {**small(), "infos/qpos": np.zeros(6), "metadata/algorithm": b"TRPO"})
    assert offline.read(path).notes[0] == "arrays not used: infos/qpos, metadata/algorithm"
    assert offline.read({**small(), "weights": [1]}).notes[0] == "arrays not used: weights"
    write_minari(
        "odd/infos-v0", [EpisodeBuffer(**{**vars(b), "infos": {"a": np.zeros(len(b) + 1)}}) for b in buffers(EPISODES)]
    )
    assert offline.read("minari:odd/infos-v0").notes == ("infos not used: a",)


# --- Minari ------------------------------------------------------------------------------------------------------


class TwoParts(gym.ObservationWrapper):
    """CartPole with a `Dict` of observations whose keys are not in the order of the alphabet."""

    def __init__(self) -> None:
        super().__init__(gym.make("CartPole-v1", max_episode_steps=5))
        pole, cart = Box(-9, 9, (2, 1), np.float32), Box(-np.inf, np.inf, (2,), np.float64)
        self.observation_space = Dict([("pole", pole), ("cart", cart)])

    def observation(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        return {"cart": observation[:2].astype(np.float64), "pole": observation[2:, None]}


def test_dict_observations_are_flattened_as_environments_flatten_them() -> None:
    env = TwoParts()
    steps = [env.reset(seed=3)[0], *(env.step(1)[0] for _ in range(5))]
    episode = EpisodeBuffer(
        observations={key: np.stack([step[key] for step in steps]) for key in ("cart", "pole")},
        actions=np.ones(5, np.int64),
        rewards=np.ones(5),
        terminations=np.zeros(5, bool),
        truncations=np.arange(5) == 4,
    )
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    write_minari("cart/parts-v0", [episode], env=None, **spaces)
    dataset = offline.read("minari:cart/parts-v0")
    expected = np.stack([flatten_obs(env.observation_space, step) for step in steps])
    np.testing.assert_array_equal(dataset.rows["obs"], expected[:-1], strict=True)
    np.testing.assert_array_equal(dataset.rows["next_obs"], expected[1:], strict=True)
    assert list(dataset.observation_space.spaces) == ["pole", "cart"]
    assert dataset.env_id is None
    offline.check_spaces(dataset, env.observation_space, env.action_space)
    other = Dict([("cart", env.observation_space["cart"]), ("pole", env.observation_space["pole"])])
    with pytest.raises(UserError, match=re.escape("keys or their order differ, ['pole', 'cart'] and ['cart', 'pole']")):
        offline.check_spaces(dataset, other, env.action_space)


def minari_episode(**changes: Any) -> EpisodeBuffer:
    """Four steps that time out, without the need for an environment."""
    values = {
        "observations": np.arange(20, dtype=np.float32).reshape(5, 4) / 20,
        "actions": np.array([0, 1, 1, 0]),
        "rewards": np.ones(4),
        "terminations": np.zeros(4, bool),
        "truncations": np.arange(4) == 3,
    }
    return EpisodeBuffer(**{**values, **changes})


def test_minari_episodes_that_stop_or_end_within() -> None:
    stops = minari_episode(truncations=np.zeros(4, bool))
    within = minari_episode(terminations=np.arange(4) == 1)
    write_minari("odd/odd-v0", [minari_episode(), stops, within])
    dataset = offline.read("minari:odd/odd-v0")
    assert dataset.lengths.tolist() == [4, 4, 2, 2]
    assert dataset.cut_off == {1}
    assert dataset.rows["truncated"].nonzero()[0].tolist() == [3, 7, 11]
    assert dataset.rows["terminated"].nonzero()[0].tolist() == [9]
    assert dataset.notes == (
        "1 episodes end within one of the file, where it says so: each part is an episode",
        "1 episodes stop in the middle: their end counts as truncated",
    )


def test_bad_minari_episodes() -> None:
    nan = np.zeros((5, 4), np.float32)
    nan[3, 2] = np.nan
    cases = {
        "short": (
            {"observations": np.zeros((4, 4), np.float32)},
            "episode 1: the observation has shape (4, 4), its space declares (5, 4); of 4 steps, 5 observations are",
        ),
        "nan": ({"observations": nan}, "`observations` episode 1, step 3, column 2 is nan"),
        "rewards": ({"rewards": np.array([0, 1, np.inf, 0])}, "`rewards` episode 1, step 2 is inf"),
        "actions": ({"actions": np.zeros(3, np.int64)}, "episode 1: 4 rewards, 3 actions"),
        "floats": ({"actions": np.zeros((4, 2))}, "actions are float64 of shape (2,), their space is recorded as"),
    }  # fmt: skip
    for name, (changes, message) in cases.items():
        first = minari_episode(actions=np.zeros((4, 2))) if name == "floats" else minari_episode()
        write_minari(f"bad/{name}-v0", [first, minari_episode(**changes)])
        with pytest.raises(UserError, match=re.escape(message)):
            offline.read(f"minari:bad/{name}-v0")


def test_the_last_observation_of_an_episode_is_checked_too() -> None:
    nan = np.zeros((5, 4), np.float32)
    nan[4, 1] = np.nan
    write_minari("bad/last-v0", [minari_episode(observations=nan)])
    with pytest.raises(UserError, match=re.escape("`observations (next)` episode 0, step 3, column 1 is nan")):
        offline.read("minari:bad/last-v0")


def test_spaces_that_no_trainer_takes_are_refused_before_reading() -> None:
    image, several = Box(0, 255, (40, 40, 3), np.uint8), gym.spaces.MultiDiscrete([2, 2])
    plain = gym.make("CartPole-v1")
    write_minari(
        "odd/image-v0", [minari_episode(observations=np.zeros((5, 40, 40, 3), np.uint8))], env=None,
        observation_space=image, action_space=plain.action_space,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"odd/image-v0: observation is an image, .* images are not supported yet"):
        offline.read("minari:odd/image-v0")
    write_minari(
        "odd/several-v0", [minari_episode(actions=np.zeros((4, 2), np.int64))], env=None,
        observation_space=plain.observation_space, action_space=several,
    )  # fmt: skip
    with pytest.raises(UserError, match=re.escape("actions are `MultiDiscrete([2 2])`; supported are `Box` and")):
        offline.read("minari:odd/several-v0")


def test_a_folder_makes_no_environment(tmp_path: Path) -> None:
    """Metadata without spaces would make Minari import what they name."""
    write_minari("odd/a-v0", [minari_episode()])
    path = tmp_path / "minari" / "odd" / "a-v0" / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    del metadata["observation_space"]
    path.write_text(json.dumps(metadata))
    with pytest.raises(UserError, match=r"metadata.json lacks `observation_space`; load it yourself if you trust it"):
        offline.read("minari:odd/a-v0")
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read as a Minari dataset: JSONDecodeError"):
        offline.read("minari:odd/a-v0")


def test_a_minari_dataset_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_minari("hopper/medium-v0", [minari_episode()])
    with pytest.raises(UserError) as caught:
        offline.read("minari:hopper/medum-v0")
    text = str(caught.value)
    assert text.startswith(f"minari:hopper/medum-v0: not in {tmp_path / 'minari'}, where Minari keeps datasets")
    assert "and not to be downloaded: " in text
    assert text.endswith("; did you mean `hopper/medium-v0`?")
    with pytest.raises(UserError, match="`hopper/medium` is no id of a Minari dataset; expected "):
        offline.read("minari:hopper/medium")
    with pytest.raises(
        UserError, match="no file `hopper/medium-v0`; the Minari dataset of that name is `minari:hopper/"
    ):
        offline.read("hopper/medium-v0")


# --- bad input ---------------------------------------------------------------------------------------------------


def changed(name: str, index: Any, value: Any) -> dict[str, Any]:
    array = np.array(small()[name], dtype=np.float64)
    array[index] = value
    return small(**{name: array})


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "missing": (
        lambda: {"obs": [1], **small(actions=None, rewards=None)},
        "the mapping: missing `actions`, `rewards`; found `obs`, `observations`, `terminals`, `timeouts`, "
        "`next_observations`; expected `observations`, `actions`, `rewards`, `terminals`, and `timeouts`, "
        "`next_observations` where the data have them",
    ),
    "nothing": (dict, "missing `observations`, `actions`, `rewards`, `terminals`; found nothing"),
    "lengths": (
        lambda: small(rewards=np.ones(5)),
        "`observations` has 6 rows, `rewards` has 5; they have to agree",
    ),
    "no rows": (lambda: {name: np.zeros((0, 1)) for name in small()}, "the mapping: holds no transitions"),
    "nan": (lambda: changed("observations", (3, 1), np.nan), "`observations` row 3, column 1 is nan; data have to be"),
    "inf": (lambda: changed("actions", (5, 0), -np.inf), "`actions` row 5, column 0 is -inf"),
    "nan reward": (lambda: changed("rewards", 2, np.nan), "`rewards` row 2 is nan"),
    "nan next": (lambda: changed("next_observations", (0, 0), np.nan), "`next_observations` row 0, column 0 is nan"),
    "objects": (
        lambda: small(observations=np.array([[{}]] * 6, dtype=object)),
        "`observations` has dtype object; expected numbers, such as float32",
    ),
    "strings": (lambda: small(observations=["a"] * 6), "`observations` has dtype <U1; expected numbers"),
    "complex": (lambda: small(rewards=np.ones(6, complex)), "`rewards` has dtype complex128; expected numbers"),
    "ragged": (lambda: small(observations=[[1], [1, 2], [1], [1], [1], [1]]), "`observations` is no array: "),
    "a number": (lambda: small(rewards=1.0), "`rewards` is a single number; expected a row for each transition"),
    "images": (
        lambda: small(observations=np.zeros((6, 32, 32, 3), np.uint8)),
        "the mapping: `observations` is an image, Box(0, 255, (32, 32, 3), uint8): images are not supported yet",
    ),
    "sizes": (
        lambda: small(next_observations=np.zeros((6, 3))),
        "`observations` and `next_observations` have 2 and 3 numbers a row",
    ),
    "several discrete actions": (
        lambda: small(actions=np.zeros((6, 2), np.int64)),
        "`actions` are int64 with shape (6, 2): several whole numbers an action (MultiDiscrete) are not supported",
    ),
    "flags": (lambda: small(terminals=[0, 1, 2, 0, 0, 0]), "`terminals` row 2 is 2; expected booleans, or 0 and 1"),
    "flags of two columns": (
        lambda: small(timeouts=np.zeros((6, 2))),
        "`timeouts` has shape (6, 2); expected one value a transition, (6,)",
    ),
    "no ends": (
        lambda: small(timeouts=None, next_observations=None),
        "missing `timeouts` and `next_observations`: nothing says where an episode that did not terminate ends; add ",
    ),
    "shuffled": (
        lambda: small(timeouts=None, next_observations=np.zeros((6, 2))),
        "missing `timeouts`, and `next_observations` tells no episodes: in 4 of 6 rows it is not the observation of "
        "the next row (shuffled transitions?)",
    ),
    "nothing left": (
        lambda: small(terminals=[0] * 6, timeouts=[1] * 6, next_observations=None),
        "nothing is left: no episode terminates or has two steps, and `next_observations` is missing",
    ),
    "a list": (lambda: [1, 2], "data: list is none of: an .npz or .hdf5 file, a mapping of arrays, `minari:<id>`, "),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(UserError, match=re.escape(message)):
        offline.read(make())


def test_bad_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "pickled.npz", **small(observations=np.array([{}] * 6, dtype=object)))
    np.save(tmp_path / "single.npy", np.ones(3))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    np.savez(tmp_path / "good.npz", **small())
    (tmp_path / "half.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:700])
    (tmp_path / "text.npz").write_text("no zip")
    (tmp_path / "text.h5").write_text("no hdf5")
    (tmp_path / "data.csv").write_text("1,2")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "lacks.npz", observations=np.ones(3))
    (tmp_path / "alone").mkdir()
    write_hdf5(tmp_path / "alone" / "main_data.hdf5", {"episode_0/rewards": np.ones(3)})
    cases = {
        "pickled.npz": "holds pickled objects, which can run code and are refused; save plain arrays of numbers by np",
        "single.npz": "a single array, not an .npz of several",
        "half.npz": "half.npz: cannot be read as .npz: ",
        "text.npz": "pickled objects",  # NumPy takes for a pickle whatever is none of its files
        "text.h5": "text.h5: cannot be read as HDF5: ",
        "data.csv": "ends in `.csv`; expected one of .npz, .hdf5, .h5, or `minari:<id>`",
        "empty": "no Minari dataset, which has data/metadata.json; found nothing; give a file or a dataset's folder",
        "goood.npz": "goood.npz`; did you mean `good.npz`?",
        "away/x.npz": f"; the folder `{tmp_path / 'away'}` is not there",
        "lacks.npz": "missing `actions`, `rewards`, `terminals`; found `observations`",
        "alone/main_data.hdf5": "episodes of a Minari dataset, but metadata.json is not beside it: give its folder",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            offline.read(tmp_path / name)
        assert str(tmp_path) in str(caught.value)


# --- bands -------------------------------------------------------------------------------------------------------


def with_returns(*returns: float) -> offline.Dataset:
    """Episodes of two transitions each with these returns, that terminate."""
    n = len(returns)
    obs = np.arange(2.0 * n)
    return offline.read(
        {
            "observations": obs,
            "actions": np.zeros((2 * n, 1)),
            "rewards": np.stack([np.array(returns) - 1, np.ones(n)], 1).reshape(-1),
            "terminals": np.arange(2 * n) % 2 == 1,
            "timeouts": np.zeros(2 * n),
            "next_observations": obs + 1,
        }
    )


def test_bands_by_hand() -> None:
    """Ten episodes at percentiles 5, 15, ..., 95; of the three with return 7, the first ranks lowest."""
    dataset = with_returns(7, 1, 9, 7, 3, 7, 0, 8, 2, 5)
    assert dataset.returns.tolist() == [7, 1, 9, 7, 3, 7, 0, 8, 2, 5]
    assert dataset.band(0, 30).returns.tolist() == [1, 0, 2]
    middle = dataset.band(30, 70)
    assert middle.returns.tolist() == [7, 7, 3, 5]
    assert middle.rows["obs"][:, 0].tolist() == [0, 1, 6, 7, 8, 9, 18, 19]  # the first two of the three with return 7
    assert middle.rows["episode"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert dataset.band(70, 100).returns.tolist() == [9, 7, 8]
    assert dataset.band(0, 100) is dataset
    assert dataset.in_band(30, 70).tolist() == [True, False, False, True, True, False, False, False, False, True]
    five = with_returns(0, 1, 2, 3, 4)  # at 10, 30, 50, 70, 90: the lower border belongs to a band, the upper one not
    assert five.band(30, 70).returns.tolist() == [1, 2]
    assert middle.notes[-1] == "band 30 to 70 of the returns: 4 of 10 episodes, returns 3 to 7"


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 40])
def test_bands_that_meet_share_no_episode_and_lose_none(n: int) -> None:
    returns = np.random.default_rng(n).integers(0, 4, n)  # many ties
    dataset = with_returns(*returns)
    for borders in ([0, 30, 70, 100], [0, 25, 50, 75, 100], [0, 50, 100], [0, 100 / 3, 200 / 3, 100]):
        found: list[float] = []
        for low, high in itertools.pairwise(borders):
            try:
                found += dataset.band(low, high).rows["obs"][::2, 0].tolist()
            except UserError as error:
                assert "no episode lies in the band" in str(error)  # noqa: PT017 (few episodes leave bands empty)
        assert sorted(found) == (2.0 * np.arange(n)).tolist()


def test_rewards_can_be_missing_where_they_are_not_needed(tmp_path: Path) -> None:
    """Zeros, a note, and no bands; the rest as with them, in each flat form."""
    bare = small(rewards=None)
    np.savez(tmp_path / "data.npz", **bare)
    for source in (bare, tmp_path / "data.npz", write_hdf5(tmp_path / "data.h5", bare)):
        with pytest.raises(UserError, match="missing `rewards`"):
            offline.read(source)
        found, whole = offline.read(source, rewards=False), offline.read(small(), rewards=False)
        assert (found.has_rewards, whole.has_rewards) == (False, True)
        assert found.rows["reward"].tolist() == [0.0] * 6
        for name in found.rows.keys() - {"reward"}:
            np.testing.assert_array_equal(found.rows[name], whole.rows[name])
        assert set(found.notes) - set(whole.notes) == {"no `rewards`: taken as zeros, which nothing is learned from"}
        assert found.band(0, 100) is found
        with pytest.raises(UserError, match="has no `rewards`, so no band 0 to 50 of its returns"):
            found.band(0, 50)


def test_a_band_keeps_which_episodes_were_cut_off() -> None:
    dataset = offline.read(small())  # returns 3, 12, 6; the last is cut off
    assert dataset.returns.tolist() == [3, 12, 6]
    assert dataset.band(0, 70).cut_off == {1}
    assert dataset.band(70, 100).cut_off == frozenset()


@pytest.mark.parametrize(
    ("band", "message"),
    [
        ((30, 30), "band: got 30 to 30; expected 0 <= low < high <= 100"),
        ((70, 30), "band: got 70 to 30; expected 0 <= low < high <= 100"),
        ((-1, 30), "band: got -1 to 30; expected 0 <= low < high <= 100"),
        ((0, 101), "band: got 0 to 101; expected 0 <= low < high <= 100"),
        ((float("nan"), 30), "band: got nan to 30; expected 0 <= low < high <= 100"),
        (
            (20, 30),
            "the mapping: no episode lies in the band 20 to 30; its 3 are 33.3 percentiles apart, from 16.7 on: give a "
            "wider band",
        ),
    ],
)
def test_bad_bands(band: tuple[float, float], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        offline.read(small()).band(*band)


def test_taking_episodes_in_another_order() -> None:
    dataset = offline.read(small())
    taken = dataset.take([2, 0], "a note")
    assert taken.rows["reward"].tolist() == [6, 1, 2]
    assert taken.rows["episode"].tolist() == [0, 1, 1]
    assert (taken.cut_off, taken.notes[-1]) == ({0}, "a note")


def test_the_fingerprint_is_of_the_content() -> None:
    base = offline.read(small()).fingerprint()
    assert offline.read({**small(), "unused": [1]}).fingerprint() == base
    assert offline.read(changed("rewards", 3, 4.5)).fingerprint() != base
    assert offline.read(small(rewards=small()["rewards"].astype(np.float32))).fingerprint() != base
    assert offline.read(small(timeouts=[0, 0, 1, 0, 1, 0])).fingerprint() != base
    numbers = [np.arange(12, dtype=dtype).reshape(6, 2) for dtype in (np.int64, np.uint64)]  # the same bytes
    prints = [offline.read(small(observations=n, next_observations=n)).fingerprint() for n in numbers]
    assert prints[0] != prints[1]


# --- fitting an environment --------------------------------------------------------------------------------------

TWO = Box(-np.inf, np.inf, (2,), np.float64)
UNIT = Box(-1, 1, (1,), np.float32)


def recorded(observation: Any = None, action: Any = None, **changes: Any) -> offline.Dataset:
    dataset = offline.read(small(**changes))
    return offline.Dataset(dataset.rows, "data.npz", observation, action)


def test_data_that_fit() -> None:
    offline.check_spaces(recorded(), TWO, UNIT)
    offline.check_spaces(recorded(TWO, UNIT), TWO, UNIT)
    offline.check_spaces(recorded(), Box(-9, 9, (2, 1), np.float32), UNIT)
    offline.check_spaces(recorded(Box(-np.inf, np.inf, (2,), np.float32), Box(-1, 1, (1,), np.float64)), TWO, UNIT)
    offline.check_spaces(recorded(actions=[2, 3, 4, 2, 3, 4]), TWO, Discrete(3, start=2))


@pytest.mark.parametrize(
    ("dataset", "spaces", "message"),
    [
        (
            recorded(),
            (Box(-1, 1, (3,)), UNIT),
            "observations have 2 numbers, those of the environment 3: Box(-1.0, 1.0",
        ),
        (
            recorded(),
            (TWO, Box(-1, 1, (2,))),
            "actions are float64 vectors of shape (1,), the environment has `Box(-1.0",
        ),
        (
            recorded(actions=np.array([0.0, 1, 0, 1, 0, 1])),
            (TWO, Discrete(2)),
            "actions are float64 vectors of shape (1,), the environment has `Discrete(2)`; save discrete actions as "
            "integers",
        ),
        (recorded(actions=[0] * 6), (TWO, UNIT), "actions are whole numbers (discrete), the environment has `Box(-1.0"),
        (
            recorded(actions=[0, 1, 2, 0, 0, 0]),
            (TWO, Discrete(2)),
            "`actions` row 2 is 2, which `Discrete(2)` of the environment does not have",
        ),
        (
            recorded(action=Box(-2, 2, (1,))),
            (TWO, UNIT),
            "recorded was the action space `Box(-2.0, 2.0, (1,), float32)`, the environment has `Box(-1.0, 1.0, (1,), "
            "float32)`: `low` of dimension 0 is -2 there and -1 here",
        ),
        (recorded(Box(-1, 1, (2,))), (TWO, UNIT), "`low` of dimension 0 is -1 there and -inf here"),
        (
            recorded(action=Discrete(3), actions=[0] * 6),
            (TWO, Discrete(2)),
            "recorded was the action space `Discrete(3)`, the environment has `Discrete(2)`",
        ),
    ],
)
def test_data_that_do_not_fit(dataset: offline.Dataset, spaces: tuple[Any, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        offline.check_spaces(dataset, *spaces)
    assert str(caught.value).startswith("data.npz: ")


def test_actions_are_clipped_as_the_environment_would() -> None:
    actions = np.array([[-1.5], [0.5], [1.0], [1.25], [0.0], [-1.0]], np.float32)
    dataset = recorded(actions=actions)
    clipped = offline.clip_actions(dataset, UNIT)
    assert clipped.rows["action"][:, 0].tolist() == [-1, 0.5, 1, 1, 0, -1]
    assert clipped.rows["action"].dtype == np.float32
    assert clipped.notes[-1] == (
        "actions of 2 of 6 transitions (33.3%) lie outside of the environment's bounds, by 0.5 at most: clipped, as "
        "the environment would"
    )
    assert dataset.rows["action"][0, 0] == -1.5  # the given one is as it was
    assert offline.clip_actions(clipped, UNIT) is clipped
    discrete = recorded(actions=[0] * 6)
    assert offline.clip_actions(discrete, Discrete(2)) is discrete


def test_actions_in_other_units_are_refused() -> None:
    box = Box(np.array([-1, 0], np.float32), np.array([1, 10], np.float32))
    degrees = np.stack([np.linspace(-1, 1, 6), np.array([-180.0, 180, 90, 170, 5, 60])], 1)
    with pytest.raises(UserError) as caught:
        offline.clip_actions(recorded(actions=degrees), box)
    assert str(caught.value) == (
        "data.npz: actions in dimension 1 range from -180 to 180, and 83% of them are far outside of the environment's "
        "bounds, 0 to 10: they seem to be in other units; convert them to the environment's and save them again"
    )
    noisy = np.where(np.arange(6)[:, None] < 4, [1.9, 14.0], [0.0, 5.0])  # four of six, by less than half the width
    assert offline.clip_actions(recorded(actions=noisy), box).rows["action"][:4].tolist() == [[1, 10]] * 4
    half = degrees.copy()
    half[:3, 1] = 5  # half of them are inside: no reason to refuse
    assert offline.clip_actions(recorded(actions=half), box).rows["action"][:, 1].max() == 10


@pytest.mark.parametrize("task", ["halfcheetah", "hopper", "walker2d", "pendulum", "cartpole"])
def test_expert_data_of_unclipped_policies_are_accepted(task: str) -> None:
    ids = {
        "halfcheetah": "HalfCheetah-v5", "hopper": "Hopper-v5", "walker2d": "Walker2d-v5", "pendulum": "Pendulum-v1",
        "cartpole": "CartPole-v1",
    }  # fmt: skip
    version = "v1" if task in ("pendulum", "cartpole") else "v4"
    path = SHARED / f"{task}_{version}_expert.npz"
    if not path.exists():
        pytest.skip(f"no recorded expert data beside the checkout ({path.name})")
    dataset = offline.read(path)
    env = gym.make(ids[task])
    offline.check_spaces(dataset, env.observation_space, env.action_space)
    clipped = offline.clip_actions(dataset, env.action_space)
    assert dataset.lengths.sum() == len(dataset) == len(clipped)
    if version == "v4":  # figures of the data's own table
        returns = {"halfcheetah": [4068, 4002], "hopper": [3717, 3718], "walker2d": [5329, 5437]}[task]
        assert np.round(dataset.returns).tolist() == returns
        assert dataset.lengths.tolist() == [1000, 1000]
        assert not dataset.rows["terminated"].any()
        assert np.abs(clipped.rows["action"]).max() == 1 < np.abs(dataset.rows["action"]).max()
    else:
        assert env.action_space.contains(dataset.rows["action"][0])


# --- the report --------------------------------------------------------------------------------------------------


def test_the_report_by_hand() -> None:
    arrays = {name: np.concatenate([values[:2], values]) for name, values in small().items()}  # the first one twice
    lines = offline.report(offline.read(arrays))
    assert lines[:6] == [
        "the mapping: 8 transitions, 4 episodes",
        "environment: not recorded",
        "ends: 2 terminated, 1 timed out, 1 cut off",
        "lengths: min 1, median 2, mean 2, max 3",
        "returns: min 3, quartiles 3 4.5 7.5, max 12; mean 6, std 4.24264",
        "rewards: 1 to 6, mean 3",
    ]
    assert lines[6:8] == ["observations: 2 x float64", "  [0] 0 to 5, mean 2, std 1.73205"]
    assert "episodes that repeat an earlier one: 1" in lines
    assert lines[-1] == "note: the last episode stops in the middle: its end counts as truncated"
    wide = offline.report(offline.read(small(observations=np.ones((6, 30)), next_observations=None)))
    assert "  [24] to [29]: 1 to 1" in wide
    discrete = offline.report(offline.read(small(actions=[3, 3, 3, 1, 1, 0])))
    assert "actions: 3 discrete values (0: 16.7%, 1: 33.3%, 3: 50.0%)" in discrete


def test_what_is_a_recording(tmp_path: Path) -> None:
    write_minari("odd/a-v0", [minari_episode()])
    folder = tmp_path / "minari" / "odd" / "a-v0"
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "metadata.json").write_text('{"licence": "MIT"}')
    for source in ("minari:hopper/medium-v0", "absent.npz", "a.HDF5", Path("b.h5"), folder, folder / "data"):
        assert offline.is_recording(source)
    for source in ("pairs.jsonl", "user/name", tmp_path / "text", tmp_path, "x" * 5000, "a\0b", ""):
        assert not offline.is_recording(source)


def test_reading_imports_only_what_it_needs() -> None:
    import subprocess

    code = (
        "import sys; from rlkit.envs import offline; offline.read({'observations': [1.0, 2], 'actions': [0, 1], "
        "'rewards': [1, 1], 'terminals': [0, 1], 'timeouts': [0, 0]}); "
        "print([m for m in ('h5py', 'minari', 'torch', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "h5py" not in done.stdout
    assert "minari" not in done.stdout
