"""SACs that Stable-Baselines3 saved act, value and go on learning as rlkit's; nothing in their files is run."""

from __future__ import annotations

import base64
import json
import pickle  # noqa: TID251 - to plant one
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import run_rlkit
from stable_baselines3 import PPO as SB3PPO
from stable_baselines3 import SAC as SB3SAC

import rlkit
from rlkit.convert import from_sb3
from rlkit.errors import CheckpointError, UserError

NETWORKS: dict[str, dict[str, Any]] = {
    "default": {},
    "tanh, other widths, three critics": {
        "policy_kwargs": {
            "net_arch": {"pi": [12, 10], "qf": [9]}, "activation_fn": torch.nn.Tanh, "n_critics": 3,
        },
    },
    "fixed temperature": {"policy_kwargs": {"net_arch": [16]}, "ent_coef": 0.3},
    "learned from 0.1": {"policy_kwargs": {"net_arch": [16, 16, 16]}, "ent_coef": "auto_0.1", "gamma": 0.9},
}  # fmt: skip


def saved(folder: Path, env: str = "Pendulum-v1", **options: Any) -> tuple[Any, Path]:
    model = SB3SAC("MlpPolicy", env, seed=0, learning_starts=20, batch_size=16, buffer_size=1000, **options)
    model.learn(60)
    model.save(folder / "model.zip")
    return model, folder / "model.zip"


@pytest.mark.parametrize("name", NETWORKS)
def test_actions_values_and_temperature_are_the_same(name: str, tmp_path: Path) -> None:
    theirs, file = saved(tmp_path, **NETWORKS[name])
    ours, _ = from_sb3(file, "Pendulum-v1", device="cpu")
    generator = np.random.default_rng(0)
    obs = generator.uniform(-1, 1, (1000, 3)).astype(np.float32) * np.float32([1, 1, 8])
    np.testing.assert_allclose(
        ours.predict(obs, deterministic=True)[0], theirs.predict(obs, deterministic=True)[0], rtol=0, atol=1e-5
    )
    tensor, action = torch.as_tensor(obs), torch.as_tensor(generator.uniform(-1, 1, (1000, 1)).astype(np.float32))
    with torch.no_grad():
        mean, log_std, _ = theirs.actor.get_action_dist_params(tensor)
        torch.testing.assert_close(ours.actor(tensor)[0], mean)
        torch.testing.assert_close(ours.actor(tensor)[1], log_std)
        for mine, other in ((ours.critic, theirs.critic), (ours.critic_target, theirs.critic_target)):
            torch.testing.assert_close(mine(tensor, action), torch.cat(other(tensor, action), 1).t())
    wanted = theirs.log_ent_coef.exp() if theirs.ent_coef_optimizer is not None else theirs.ent_coef_tensor
    assert float(ours.log_alpha().exp()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    for field in ("gamma", "tau", "batch_size", "buffer_size", "learning_rate", "ent_coef", "target_entropy"):
        assert getattr(ours.config, field) == getattr(theirs, field)
    assert (ours.num_timesteps, ours.updates) == (60, theirs._n_updates)


def test_a_mujoco_task_with_float64_observations(tmp_path: Path) -> None:
    theirs, file = saved(tmp_path, "Hopper-v5", policy_kwargs={"net_arch": [16]})
    ours, _ = from_sb3(file)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    obs = np.random.default_rng(0).normal(size=(100, 11))
    np.testing.assert_allclose(
        ours.predict(obs, deterministic=True)[0], theirs.predict(obs, deterministic=True)[0], rtol=0, atol=1e-5
    )


def test_it_is_saved_evaluated_and_goes_on_learning(tmp_path: Path) -> None:
    theirs, file = saved(tmp_path, policy_kwargs={"net_arch": [16]})
    with pytest.raises(CheckpointError, match=f"`rlkit convert {file}` makes such a folder"):
        rlkit.load(file)
    refused = run_rlkit("convert", str(file), "--env", "Pendulum-v1")
    assert refused.returncode == 2
    assert "--trust" in refused.stderr
    done = run_rlkit("convert", str(file), "--trust", "--env", "Pendulum-v1", "--out", str(tmp_path / "ours"))
    assert done.returncode == 0, done.stderr
    assert "`train_freq` cannot be read without unpickling" in done.stdout
    again = run_rlkit("convert", str(file), "--trust", "--out", str(tmp_path / "ours"))
    assert again.returncode == 2
    assert "exists" in again.stderr
    ours: Any = rlkit.load(tmp_path / "ours")
    obs = np.array([0.5, 0.5, 1.0], dtype=np.float32)
    np.testing.assert_allclose(ours.predict(obs, deterministic=True)[0], theirs.predict(obs, deterministic=True)[0],
                               atol=1e-5)  # fmt: skip
    before = ours.actor.head.weight.clone()
    ours.learn(30)
    assert ours.num_timesteps == 90
    assert not torch.equal(before, ours.actor.head.weight)
    assert ours.evaluate(1)["eval/mean_reward"] < 0


def rewritten(file: Path, to: Path, **members: bytes) -> Path:
    """The zip with some members replaced; None removes one."""
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(to, "w") as target:
        for name in source.namelist():
            content = members.get(name.partition(".")[0], source.read(name))
            if content:
                target.writestr(name, content)
    return to


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "boom")


def test_what_cannot_be_converted_says_why_and_nothing_is_run(tmp_path: Path) -> None:
    _, file = saved(tmp_path, policy_kwargs={"net_arch": [8]})
    with zipfile.ZipFile(file) as archive:
        data = json.loads(archive.read("data"))

    def message(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            from_sb3(path)
        return str(caught.value)

    def changed(**values: Any) -> str:
        return message(rewritten(file, tmp_path / "changed.zip", data=json.dumps({**data, **values}).encode()))

    boom = tmp_path / "boom"
    serialized = base64.b64encode(pickle.dumps(Bomb(boom))).decode()
    for value in data.values():
        if isinstance(value, dict) and ":serialized:" in value:
            value[":serialized:"] = serialized
    harmless = rewritten(file, tmp_path / "bomb.zip", data=json.dumps(data).encode())
    from_sb3(harmless)
    assert "cannot be read without running code" in message(
        rewritten(file, tmp_path / "weights.zip", policy=pickle.dumps(Bomb(boom)))
    )
    assert not boom.exists()
    pickle.loads(pickle.dumps(Bomb(boom)))  # it would have gone off
    assert boom.exists()

    assert "there is no" in message(tmp_path / "absent.zip")
    (tmp_path / "text.zip").write_text("no zip")
    assert "is no zip file" in message(tmp_path / "text.zip")
    assert "was not saved by Stable-Baselines3" in message(rewritten(file, tmp_path / "part.zip", policy=b""))
    assert "use_sde" in changed(use_sde=True)
    space = {**data["observation_space"], ":type:": "<class 'gymnasium.spaces.dict.Dict'>"}
    assert "its observation space is <class 'gymnasium.spaces.dict.Dict'>" in changed(observation_space=space)
    assert "its activation is" in changed(policy_kwargs={"activation_fn": "<class 'mine.Swish'>"})
    ppo = SB3PPO("MlpPolicy", "Pendulum-v1", n_steps=64, batch_size=64)
    ppo.save(tmp_path / "ppo.zip")
    assert "rlkit converts Stable-Baselines3's SAC" in message(tmp_path / "ppo.zip")
