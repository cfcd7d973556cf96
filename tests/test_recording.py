"""`rlkit data make`: what is recorded is what happened, the same command makes the same data, bad use is refused."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
from helpers import TINY, run_rlkit, tiny

import rlkit
from rlkit.cli import main
from rlkit.envs import episode_seed, offline
from rlkit.envs.spaces import flatten_obs
from rlkit.errors import EnvError, UserError
from rlkit.recording import record
from rlkit.rng import derive

LIMIT = 20  # steps of an episode of the pendulum here
SHORT = {"max_episode_steps": LIMIT}
FIELDS: dict[str, Any] = {**TINY, "eval_episodes": 0, "checkpoint_every": 1000, "env_kwargs": SHORT}

gym.register("RlkitTestParts-v0", entry_point="env_zoo:DictCounter")
gym.register("RlkitTestWalk-v0", entry_point="env_zoo:Walk", kwargs={"length": 10})
gym.register("RlkitTestBroken-v0", entry_point="env_zoo:Broken", kwargs={"how": "raise", "at": 30})


def sac(folder: Path | None = None, steps: int = 110, env: Any = "Pendulum-v1", **fields: Any) -> Any:
    trainer = rlkit.SAC(env, out=None if folder is None else str(folder), **{**FIELDS, **fields})
    trainer.learn(steps)
    trainer.close()
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 110 steps of the pendulum: five whole episodes of 20 steps, and ten steps of another."""
    folder = tmp_path_factory.mktemp("recording") / "run"
    sac(folder)
    return folder


@pytest.fixture(autouse=True)
def _minari_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def replayed(dataset: minari.MinariDataset) -> int:
    """Step the environment that the dataset names with the recorded seeds and actions; all has to come out again."""
    env = dataset.recover_environment()
    for episode, about in zip(dataset, dataset.storage.get_episode_metadata(range(len(dataset))), strict=True):
        obs, _ = env.reset(seed=about["seed"])
        np.testing.assert_array_equal(episode.observations[0], obs, strict=True)
        for t in range(len(episode)):
            obs, reward, terminated, truncated, _ = env.step(episode.actions[t].copy())
            np.testing.assert_array_equal(episode.observations[t + 1], obs, strict=True)
            assert (episode.rewards[t], episode.terminations[t], episode.truncations[t]) == (
                float(reward), terminated, truncated,
            )  # fmt: skip
        assert terminated or truncated
    env.close()
    return len(dataset)


# --- policies ----------------------------------------------------------------------------------------------------


def test_recorded_episodes_replay_exactly_in_the_environment(run: Path) -> None:
    fields = {"n_steps": 8, "eval_episodes": 0, "tensorboard": False, "policy_kwargs": {"net_arch": [8]}}
    discrete = rlkit.registry.get("pmoe_ppo")("CartPole-v1", n_experts=1, **fields).learn(16)
    for out, source, options in (
        ("pendulum/mode-v0", run, {"deterministic": True}),
        ("pendulum/sampled-v0", run, {}),
        ("cart/ppo-v0", discrete, {}),
        ("cart/random-v0", "random:CartPole-v1", {}),
        ("walk/random-v0", "random:RlkitTestWalk-v0", {}),  # writes into its observations and into its actions
    ):
        made = record([source], out, 12, **options)
        dataset = minari.load_dataset(out)
        assert replayed(dataset) == 12 == len(made.returns)
        assert dataset.total_steps == made.transitions
        assert [float(e.rewards.sum()) for e in dataset] == pytest.approx(made.returns, abs=1e-9)


def test_deterministic_episodes_are_those_of_the_evaluation(run: Path) -> None:
    made = record([run], "pendulum/mode-v0", 12, seed=7, deterministic=True)
    record_ = rlkit.load(run, inference=True).evaluate(12, seed=7)
    assert made.returns == record_["eval/returns"]
    assert offline.read("minari:pendulum/mode-v0").returns.tolist() == record_["eval/returns"]


def test_episodes_are_seeded_by_seed_and_number() -> None:
    record(["random:CartPole-v1", "random:CartPole-v1"], "cart/random-v0", 2, seed=5)
    storage = minari.load_dataset("cart/random-v0").storage
    second = derive(5, "source", 1)
    expected = [derive(s, "eval", k) & 0x7FFF_FFFF for s in (5, second) for k in (0, 1)]
    assert [about["seed"] for about in storage.get_episode_metadata(range(4))] == expected


def test_the_same_command_makes_the_same_data(run: Path) -> None:
    sources = [run, "random:" + str(run), f"replay:{run}"]
    prints = {
        (seed, i): record(sources, f"pendulum/mix{seed}-v{i}", [3, 2, 2], seed=seed, band=(10, 90)).fingerprint
        for seed in (0, 1)
        for i in (0, 1)
    }
    assert prints[0, 0] == prints[0, 1] != prints[1, 0] == prints[1, 1]
    assert offline.read("minari:pendulum/mix0-v0").fingerprint() == prints[0, 0]


def test_samples_differ_from_modes(run: Path) -> None:
    prints = {record([run], f"pendulum/a-v{i}", 2, deterministic=bool(i)).fingerprint for i in (0, 1)}
    assert len(prints) == 2


def test_a_trainer_in_python_goes_on_as_if_nothing_had_been() -> None:
    agent = sac(steps=20)
    agent.predict(np.zeros(3, np.float32))
    before = agent.rng["predict"].get_state()
    first = record([agent], "pendulum/a-v0", 3)
    assert (agent.rng["predict"].get_state() == before).all()
    agent.predict(np.zeros(3, np.float32))  # samples of a recording do not depend on those before it
    assert record([agent], "pendulum/a-v1", 3).fingerprint == first.fingerprint
    assert first.sources[0]["source"] == "<SAC>"


def test_the_dataset_says_where_it_comes_from(run: Path) -> None:
    made = record([run], "pendulum/medium-v0", 3, seed=2)
    metadata = minari.load_dataset("pendulum/medium-v0").storage.metadata
    assert metadata["algorithm_name"] == "sac"
    assert metadata["rlkit"] == {
        "version": rlkit.__version__,
        "seed": 2,
        "band": [0.0, 100.0],
        "sources": [
            {
                "source": str(run), "kind": "policy", "trainer": "sac", "step": 110, "deterministic": False,
                "episodes": 3, "transitions": 60, "return_mean": float(np.mean(made.returns)),
                "return_std": float(np.std(made.returns, ddof=1)),
            }
        ],
    }  # fmt: skip
    assert metadata["requirements"] == [f"gymnasium=={gym.__version__}"]
    assert metadata["description"] == f"Made by rlkit {rlkit.__version__}, seed 2: 3 episodes of {run}."
    assert "pendulum/medium-v0" in minari.list_local_datasets()
    spec = minari.load_dataset("pendulum/medium-v0").env_spec
    assert (spec.id, spec.max_episode_steps) == ("Pendulum-v1", LIMIT)


def test_a_checkpoint_and_a_saved_folder(run: Path, tmp_path: Path) -> None:
    first = record([run], "pendulum/a-v0", 2).fingerprint
    (newest,) = (run / "checkpoints").iterdir()
    assert record([newest], "pendulum/a-v1", 2).fingerprint == first
    rlkit.load(run).save(tmp_path / "agent")
    assert record([tmp_path / "agent"], "pendulum/a-v2", 2).fingerprint == first
    replays = {record([f"replay:{folder}"], f"pendulum/{name}-v0").fingerprint
               for name, folder in (("run", run), ("checkpoint", newest), ("saved", tmp_path / "agent"))}  # fmt: skip
    assert len(replays) == 1


def test_dict_observations_round_trip() -> None:
    """Flattened again, they are what the environment's own observations flatten to, in the order of its keys."""
    record(["random:RlkitTestParts-v0"], "parts/random-v0", 3)
    dataset = offline.read("minari:parts/random-v0")
    env = gym.make("RlkitTestParts-v0")
    offline.check_spaces(dataset, env.observation_space, env.action_space)
    assert list(dataset.observation_space.spaces) == ["where", "index"]  # not in the order of the alphabet
    obs, _ = env.reset()
    assert dataset.rows["obs"][0].tolist() == flatten_obs(env.observation_space, obs).tolist()
    assert dataset.rows["next_obs"][:, 0].tolist() == [1, 2, 3] * 3  # time; each is its environment's first
    again = record(["minari:parts/random-v0"], "parts/copy-v0")
    assert again.fingerprint == dataset.fingerprint()


def test_random_actions_are_uniform_in_the_environments_bounds() -> None:
    record(["random:Pendulum-v1"], "pendulum/random-v0", 10)
    actions = offline.read("minari:pendulum/random-v0").rows["action"]
    assert actions.shape == (2000, 1)
    assert -2 <= actions.min() < -1.98
    assert 1.98 < actions.max() <= 2
    counts = np.histogram(actions, bins=10, range=(-2, 2))[0]
    assert ((counts - 200.0) ** 2 / 200).sum() < 27.9  # chi-squared with 9 degrees of freedom, p = 0.001
    record(["random:CartPole-v1"], "cart/random-v0", 20)
    values, counts = np.unique(offline.read("minari:cart/random-v0").rows["action"], return_counts=True)
    assert values.tolist() == [0, 1]
    assert abs(counts[0] / counts.sum() - 0.5) < 0.1


# --- replay buffers ----------------------------------------------------------------------------------------------


def check_replay(folder: Path, seed: int, expected: list[tuple[int, int]], n_envs: int = 1) -> list[str]:
    """The recorded episodes are those that the run's environments went through, (environment, episode) by number.

    Each is stepped again from the seed that the run's environments were reset with, with the recorded actions.
    """
    lines: list[str] = []
    record([f"replay:{folder}"], "pendulum/replay-v0", say=lines.append)
    dataset = minari.load_dataset("pendulum/replay-v0")
    assert len(dataset) == len(expected)
    env = dataset.recover_environment()
    for episode, (i, k) in zip(dataset, expected, strict=True):
        obs, _ = env.reset(seed=episode_seed(seed, i, k))
        np.testing.assert_array_equal(episode.observations[0], obs)
        for t in range(LIMIT):
            obs, reward, *_ = env.step(episode.actions[t])
            np.testing.assert_array_equal(episode.observations[t + 1], obs)
            assert episode.rewards[t] == np.float32(reward)
        assert not episode.terminations.any()
        assert episode.truncations.nonzero()[0].tolist() == [LIMIT - 1]
    return lines


def test_the_replay_buffer_is_what_the_trainer_stored(run: Path) -> None:
    lines = check_replay(run, 0, [(0, k) for k in range(5)])
    assert lines[0].startswith(f"replay:{run}: 5 episodes, 100 transitions, return -")
    assert lines[1:] == [
        f"replay:{run}: left out 1 episodes that were running or broken off",
        f"replay:{run}: 100 of the 110 rows of the replay buffer are of complete episodes",
    ]
    rows, buffer = offline.read("minari:pendulum/replay-v0").rows, rlkit.load(run).buffer
    for name in ("obs", "next_obs", "reward", "terminated", "truncated"):
        np.testing.assert_array_equal(rows[name], buffer[name][:100].numpy())
    np.testing.assert_allclose(rows["action"], 2 * buffer["action"][:100].numpy(), rtol=1e-6)


def test_a_full_ring_has_lost_the_beginning_of_an_episode(tmp_path: Path) -> None:
    """Of 110 rows, 55 are left: 5 of episode 2, episodes 3 and 4, and 10 of episode 5."""
    sac(tmp_path / "run", buffer_size=55, seed=4)
    lines = check_replay(tmp_path / "run", 4, [(0, 3), (0, 4)])
    assert lines[1:] == [
        f"replay:{tmp_path / 'run'}: left out 1 episodes that began before the oldest row",
        f"replay:{tmp_path / 'run'}: left out 1 episodes that were running or broken off",
        f"replay:{tmp_path / 'run'}: 40 of the 55 rows of the replay buffer are of complete episodes",
    ]


def test_several_environments_are_told_apart(tmp_path: Path) -> None:
    """Three environments, 50 steps each, in a ring of 100 rows: the oldest is the third's row of step 16."""
    sac(tmp_path / "all", 150, n_envs=3)
    check_replay(tmp_path / "all", 0, [(i, k) for k in range(2) for i in range(3)])
    sac(tmp_path / "ring", 150, n_envs=3, buffer_size=100)
    (tmp_path / "minari" / "pendulum" / "replay-v0").rename(tmp_path / "aside")
    check_replay(tmp_path / "ring", 0, [(i, 1) for i in range(3)])


def test_an_environment_that_had_to_be_reset_breaks_an_episode(run: Path) -> None:
    """Its rows do not go on where they led to."""
    from rlkit.recording import _complete

    obs = np.array([0.0, 1, 2, 7, 8, 9, 4])[:, None]
    rows = {
        "obs": obs,
        "next_obs": np.array([1.0, 2, 3, 8, 9, 10, 5])[:, None],
        "reward": np.arange(7.0),
        "terminated": np.arange(7) == 5,
        "truncated": np.zeros(7, bool),
    }
    kept, notes = _complete(rows, 1, False, "run")
    assert kept["reward"].tolist() == [3, 4, 5]
    assert kept["episode"].tolist() == [0, 0, 0]
    assert notes[0] == "left out 2 episodes that were running or broken off"


def test_replay_buffers_that_do_not_hold_single_steps(run: Path, tmp_path: Path) -> None:
    sac(tmp_path / "scaled", 15, reward=["scale=0.1"])
    sac(tmp_path / "steps", 15, n_steps=3)
    sac(tmp_path / "early", 15)
    rlkit.SAC("Pendulum-v1", **FIELDS).save(tmp_path / "untrained")
    ppo = rlkit.registry.get("pmoe_ppo")("Pendulum-v1", n_steps=8, eval_episodes=0, tensorboard=False,
                                          policy_kwargs={"net_arch": [8]}, out=str(tmp_path / "ppo"))  # fmt: skip
    ppo.learn(8)
    ppo.close()
    cases = {
        "scaled": "its rewards were changed by `reward` (scale=0.1) before they were stored",
        "steps": "its rewards are sums of 3 steps (`n_steps`), single ones are not there",
        "early": "no complete episode in the 15 rows of the replay buffer",
        "untrained": "the replay buffer is empty",
        "ppo": "`pmoe_ppo` keeps no replay buffer",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=re.escape(message)):
            record([f"replay:{tmp_path / name}"], "pendulum/a-v0")


# --- data files and mixtures -------------------------------------------------------------------------------------


def npz(path: Path, n: int = 6, **changes: Any) -> Path:
    """`n` episodes of three transitions of the pendulum; the reward is the number of the episode."""
    number = np.repeat(np.arange(n), 3)
    obs = np.stack([np.cos(number), np.sin(number), np.arange(3 * n) / 20], 1).astype(np.float32)
    following = obs.copy()
    following[:, 2] += np.float32(0.05)
    following[:-1][number[1:] == number[:-1]] = obs[1:][number[1:] == number[:-1]]
    arrays = {
        "observations": obs,
        "actions": np.full((3 * n, 1), 0.5, np.float32),
        "rewards": number.astype(np.float64),
        "terminals": np.zeros(3 * n, bool),
        "timeouts": np.arange(3 * n) % 3 == 2,
        "next_observations": following,
    }
    np.savez(path, **{**arrays, **changes})
    return path


def test_episodes_of_a_file_are_drawn_without_replacement(tmp_path: Path) -> None:
    path = npz(tmp_path / "data.npz")
    whole = record([path], "pendulum/all-v0", env="Pendulum-v1")
    assert whole.fingerprint == offline.read(path).fingerprint()
    assert whole.returns == [0, 3, 6, 9, 12, 15]
    draws = [record([path], f"pendulum/some-v{seed}", 4, seed=seed, env="Pendulum-v1").returns for seed in range(4)]
    assert all(len(set(returns)) == 4 and returns == sorted(returns) for returns in draws)
    assert len({tuple(returns) for returns in draws}) > 1
    again = record(["minari:pendulum/all-v0"], "pendulum/again-v0", 4, seed=2)
    assert again.returns == draws[2]  # which ones is a matter of the seed and their number
    objects = [offline.read(path), dict(np.load(path)), minari.load_dataset("pendulum/all-v0")]
    mixed = record(objects, "pendulum/objects-v0", [1, None, 2])
    assert [facts["source"] for facts in mixed.sources] == [str(path), "the mapping", "minari:pendulum/all-v0"]
    assert [facts["episodes"] for facts in mixed.sources] == [1, 6, 2]


def test_a_mixture_holds_what_was_asked_for(run: Path, tmp_path: Path) -> None:
    npz(tmp_path / "data.npz")
    sources = [run, f"random:{run}", f"replay:{run}", tmp_path / "data.npz"]
    lines: list[str] = []
    made = record(sources, "pendulum/mix-v0", [4, 3, 2, None], say=lines.append)
    assert [facts["episodes"] for facts in made.sources] == [4, 3, 2, 6]
    assert [facts["transitions"] for facts in made.sources] == [80, 60, 40, 18]
    assert [facts["kind"] for facts in made.sources] == ["policy", "random", "replay", "data"]
    dataset = offline.read("minari:pendulum/mix-v0")
    assert dataset.lengths.tolist() == [LIMIT] * 9 + [3] * 6
    assert dataset.returns[9:].tolist() == [0, 3, 6, 9, 12, 15]
    assert [line.partition(":")[0] for line in lines if "transitions, return" in line] == [
        str(run), "random", "replay", str(tmp_path / "data.npz"),
    ]  # fmt: skip
    one = record([run, f"random:{run}"], "pendulum/two-v0", 2)
    assert [facts["episodes"] for facts in one.sources] == [2, 2]


def test_a_band_is_of_all_episodes_together(run: Path) -> None:
    sources = [run, f"random:{run}"]
    whole = record(sources, "pendulum/all-v0", 5)
    lines: list[str] = []
    bands = [record(sources, f"pendulum/band{low}-v0", 5, band=(low, high), say=lines.append)
             for low, high in ((0, 30), (30, 70), (70, 100))]  # fmt: skip
    assert [len(band.returns) for band in bands] == [3, 4, 3]
    assert sorted(value for band in bands for value in band.returns) == sorted(whole.returns)
    assert max(bands[0].returns) <= min(bands[1].returns) <= max(bands[1].returns) <= min(bands[2].returns)
    assert lines[2] == "band 0 to 30 of the returns: 3 of 10 episodes"
    assert bands[1].fingerprint == offline.read("minari:pendulum/all-v0").band(30, 70).fingerprint()
    assert sum(facts["episodes"] for facts in bands[1].sources) == 4


def test_notes_of_files_are_passed_on(tmp_path: Path) -> None:
    lines: list[str] = []
    path = npz(tmp_path / "a.npz", actions=np.linspace(-2.25, 2, 18)[:, None], extra=np.ones(3))
    record([path], "pendulum/a-v0", env="Pendulum-v1", say=lines.append)
    assert lines[1:] == [
        f"{path}: arrays not used: extra",
        f"{path}: actions of 1 of 18 transitions (5.6%) lie outside of the environment's bounds, by 0.25 at most; they "
        "are kept as they are",
    ]
    assert offline.read("minari:pendulum/a-v0").rows["action"].min() == -2.25


# --- wrong use ---------------------------------------------------------------------------------------------------


def refused(message: str, *args: Any, **options: Any) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        record(*args, **options)


def test_sources_of_different_environments(run: Path, tmp_path: Path) -> None:
    refused(
        f"random:Pendulum-v1 and {run} are of different environments: `max_episode_steps` is 200 and 20; a dataset is "
        "of one",
        [run, "random:Pendulum-v1"], "pendulum/a-v0", 2,
    )  # fmt: skip
    refused("have different spaces: ", [run, "random:CartPole-v1"], "pendulum/a-v0", 2)
    path = npz(tmp_path / "data.npz")
    refused(f"{path} does not say which environment it is of; give `--env ID`", [path], "pendulum/a-v0")
    refused("observations have 3 numbers, those of the environment 4", [path], "pendulum/a-v0", env="CartPole-v1")
    refused("unknown environment `Pendulm-v1`; did you mean", [path], "pendulum/a-v0", env="Pendulm-v1")
    refused("unknown environment `Pendulm-v1`; did you mean", ["random:Pendulm-v1"], "pendulum/a-v0", 2)
    with_gravity = sac(steps=12, env_kwargs={**SHORT, "g": 5.0})
    refused(
        "<SAC> and random:" + str(run) + " are of different environments: `g` is 5.0 and None",
        [f"random:{run}", with_gravity], "pendulum/a-v0", 2,
    )  # fmt: skip


def test_numbers_that_do_not_fit(run: Path, tmp_path: Path) -> None:
    path = npz(tmp_path / "data.npz")
    refused("nothing to record: give a run, `random:ENV_ID`, ", [], "pendulum/a-v0", 2)
    refused("`--episodes`: got 2 numbers for 3 sources; give one, or one for each", [run] * 3, "pendulum/a-v0", [1, 2])
    refused("`--episodes`: got 0; at least 1 is needed", [run], "pendulum/a-v0", 0)
    refused(f"{run}: how many episodes? Give `--episodes N`; `all` is for buffers and ", [run], "pendulum/a-v0")
    refused(
        "has 6 episodes, 7 were asked for; `all` takes what there is", [path], "pendulum/a-v0", 7, env="Pendulum-v1"
    )
    refused("has 5 episodes, 6 were asked for; `all` takes what there is", [f"replay:{run}"], "pendulum/a-v0", 6)
    refused("band: got 70 to 30; expected 0 <= low < high <= 100", [run], "pendulum/a-v0", 2, band=(70, 30))
    refused("no episode lies in the band 30 to 60; its 2 are 50", [run], "pendulum/a-v0", 2, band=(30, 60))
    refused(
        "`--deterministic`: none of the sources is a policy", [f"replay:{run}"], "pendulum/a-v0", deterministic=True
    )


def test_sources_that_hold_no_episodes_of_an_environment(tmp_path: Path) -> None:
    refused("acts in no environment: there are no episodes to record", [tiny("sft")], "pendulum/a-v0", 2)
    refused("data: int is none of: an .npz or .hdf5 file, ", [42], "pendulum/a-v0", 2)
    refused("no such folder; expected a run folder, a checkpoint or a saved folder", ["runs/no"], "pendulum/a-v0", 2)
    sac(tmp_path / "object", 12, [lambda: gym.make("Pendulum-v1", **SHORT)], env_kwargs={})
    message = "trained on an environment given in Python, which no file can hold: record it there, rlkit.recording."
    refused(message, [tmp_path / "object"], "pendulum/a-v0", 2)
    refused("trained on an environment given in Python", [f"replay:{tmp_path / 'object'}"], "pendulum/a-v0")
    agent = rlkit.load(tmp_path / "object", eval_env=lambda: gym.make("Pendulum-v1", **SHORT))
    assert len(record([agent], "pendulum/a-v0", 2).returns) == 2


def test_data_that_no_environment_can_have_made(tmp_path: Path) -> None:
    leap = np.zeros((18, 3), np.float32)
    path = npz(tmp_path / "leap.npz", next_observations=leap)
    refused("after 12 transitions the episode goes on from another observation than", [path], "pendulum/a-v0",
            env="Pendulum-v1")  # fmt: skip
    path = npz(tmp_path / "degrees.npz", actions=np.linspace(-180, 180, 18)[:, None])
    refused("they seem to be in other units", [path], "pendulum/a-v0", env="Pendulum-v1")


@pytest.mark.parametrize("out", ["medium", "hopper/medium", "a/b-v0", "../x-v0", "/tmp/x-v0", "hopper/medium-v", ""])
def test_ids_that_minari_does_not_take(out: str, run: Path) -> None:
    refused("is no id of a Minari dataset; expected namespace/name-vN, such as", [run], out, 2)


def test_a_dataset_is_never_overwritten_unasked(run: Path, tmp_path: Path) -> None:
    first = record([run], "minari:pendulum/a-v0", 2)  # the prefix does no harm
    lines: list[str] = []
    refused("the dataset pendulum/a-v0 exists (", [run], "pendulum/a-v0", 3, say=lines.append)
    assert lines == []  # before any work was done
    assert offline.read("minari:pendulum/a-v0").fingerprint() == first.fingerprint
    second = record([run], "pendulum/a-v0", 3, replace=True)
    assert len(second.returns) == 3
    assert offline.read("minari:pendulum/a-v0").fingerprint() == second.fingerprint
    # A dataset may be made from the one that it replaces.
    third = record(["minari:pendulum/a-v0"], "pendulum/a-v0", 1, replace=True)
    assert third.returns[0] in second.returns
    refused("pendulum/a-v0/b-v0 would lie inside the dataset pendulum/a-v0", [run], "pendulum/a-v0/b-v0", 2)
    (tmp_path / "minari" / "other-v0").mkdir()
    refused("is no dataset: choose another id", [run], "other-v0", 2, replace=True)
    assert sorted(p.name for p in (tmp_path / "minari" / "pendulum").iterdir()) == ["a-v0", "namespace_metadata.json"]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    with pytest.raises(EnvError, match="evaluation episode 0, step 29: "):
        record(["random:RlkitTestBroken-v0"], "broken/a-v0", 2)
    assert list((tmp_path / "minari").rglob("*")) == []

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minari.dataset._storages.hdf5_storage.HDF5Storage.update_episodes", full)
    with pytest.raises(OSError, match="No space left"):
        record([run], "pendulum/a-v0", 2)
    assert [p.name for p in (tmp_path / "minari").rglob("*")] == ["pendulum"]


def test_a_signal_leaves_nothing(tmp_path: Path, run: Path) -> None:
    for sources in ([run, run], [f"replay:{run}"]):
        lines: list[str] = []

        def interrupt(line: str, lines: list[str] = lines) -> None:
            lines.append(line)
            if len(lines) == 1:  # a second signal would end the process at once
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            record(sources, "pendulum/a-v0", 2, say=interrupt)
    assert list((tmp_path / "minari").rglob("*")) == []


def test_environments_that_json_cannot_hold() -> None:
    lines: list[str] = []
    gym.register("RlkitTestLambda-v0", entry_point=lambda: gym.make("Pendulum-v1", **SHORT).unwrapped,
                 max_episode_steps=5)  # fmt: skip
    made = record(["random:RlkitTestLambda-v0"], "pendulum/lambda-v0", 1, say=lines.append)
    assert lines[-1] == "the environment has no description that JSON can hold: the dataset does not say which it is"
    assert made.transitions == 5
    assert offline.read("minari:pendulum/lambda-v0").env_id is None


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a run folder to a dataset that is inspected and read, with the evaluation's numbers."""
    env = {"MINARI_DATASETS_PATH": str(tmp_path / "minari")}
    done = run_rlkit("data", "make", str(run), "--episodes", "4", "--out", "pendulum/medium-v0", "--seed", "3",
                     "--deterministic", "--json", env=env)  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    assert main(["eval", str(run), "--episodes", "4", "--seed", "3", "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (made["mean"], made["std"]) == (evaluated["mean"], evaluated["std"])
    assert (made["id"], made["env"], made["episodes"], made["transitions"]) == (
        "pendulum/medium-v0", "Pendulum-v1", 4, 4 * LIMIT,
    )  # fmt: skip
    assert made["path"] == str(tmp_path / "minari" / "pendulum" / "medium-v0")
    figures = f"4 episodes, 80 transitions, return {made['mean']:.1f} ± {made['std']:.1f}"
    assert done.stdout.splitlines()[:-1] == [
        f"{run}: {figures}",
        f"pendulum/medium-v0: {figures}",
        f"in {made['path']}",
        "train on it: rlkit train TRAINER --data minari:pendulum/medium-v0",
    ]
    dataset = offline.read("minari:pendulum/medium-v0")
    assert dataset.returns.tolist() == evaluated["returns"]
    assert dataset.fingerprint() == made["fingerprint"]
    for source in ("minari:pendulum/medium-v0", made["path"]):
        assert main(["data", "inspect", source]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"{source}: 80 transitions, 4 episodes"
        assert lines[1] == "environment: Pendulum-v1"
        assert lines[2] == "ends: 0 terminated, 4 timed out, 0 cut off"
        assert f"fingerprint: {made['fingerprint']}" in lines


def test_mixtures_and_bands_on_the_command_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(npz(tmp_path / "data.npz"))
    args = ["data", "make", str(run), f"replay:{run}", path, "--episodes", "2", "all", "3", "--out", "pendulum/mix-v0"]
    assert main([*args, "--band", "50", "100", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    made = json.loads(out[-1])
    assert made["episodes"] == 5
    assert [facts["kind"] for facts in made["sources"]] == ["policy", "replay", "data"]
    assert "band 50 to 100 of the returns: 5 of 10 episodes" in out
    assert main([*args, "--json"]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*args, "--replace", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["episodes"] == 10
    single = ["data", "make", path, "--env", "Pendulum-v1", "--episodes", "1", "--out", "pendulum/one-v0", "--json"]
    assert main(single) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["std"] is None  # of one episode there is none
    assert main(["data", "inspect", path]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: 18 transitions, 6 episodes\nenvironment: not recorded\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["make"], "the following arguments are required: SOURCE, --out (see `rlkit data make --help`)"),
        (["make", "run"], "the following arguments are required: --out"),
        (["make", "run", "--out", "a-v0", "--episodes", "0"], "got '0'; allowed: an integer >= 1"),
        (["make", "run", "--out", "a-v0", "--epsiodes", "3"], "unknown option `--epsiodes`; did you mean `episodes`?"),
        (["make", "run", "--out", "a-v0", "--band", "3"], "--band: expected 2 arguments"),
        (["make", "run", "--out", "a", "--episodes", "3"], "`a` is no id of a Minari dataset"),
        (
            ["make", "run", "--out", "a-v0", "--episodes", "3"],
            "run: no such folder; expected a run folder, a checkpoint",
        ),
        (["make", "minari:a", "--out", "a-v0"], "`a` is no id of a Minari dataset"),
        (["mak"], "invalid choice: 'mak' (choose from "),
        ([], "the following arguments are required: ACTION (see `rlkit data --help`)"),
        (["inspect", "absent.npz"], "data: no file `absent.npz`"),
        (["inspect", "a.hdf5", "--tokenizer", "x"], "`--tokenizer` is of text data; a.hdf5 holds transitions"),
        (
            ["inspect", "minari:a-v0", "--max-length", "3"],
            "`--max_length` is of text data; minari:a-v0 holds transitions",
        ),
    ],
)
def test_wrong_use_of_the_command(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *args]) == 2
    assert message in capsys.readouterr().err


def test_help_shows_both_actions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["data", "--help"])
    out = capsys.readouterr().out
    assert re.search(r"^  inspect +SOURCE: ", out, re.MULTILINE)
    assert re.search(r"^  make +SOURCE \[SOURCE ...\] --episodes N --out ID: ", out, re.MULTILINE)
    for action, option in (("make", "--band LOW HIGH"), ("inspect", "--tokenizer M")):
        with pytest.raises(SystemExit, match="0"):
            main(["data", action, "--help"])
        assert option in capsys.readouterr().out
