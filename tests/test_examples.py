"""Every example runs as it stands and does what it says; the trainer of own_trainer.py keeps what all trainers keep."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import close, fingerprint, learn_with_stops, tiny

import rlkit
from rlkit import registry
from rlkit.config import options
from rlkit.errors import UserError

EXAMPLES = Path(__file__).parent.parent / "examples"


def numbers(pattern: str, text: str) -> list[float]:
    """The groups of `pattern` in `text` as numbers."""
    found = re.search(pattern, text)
    assert found, text
    return [float(group) for group in found.groups()]


def own_environment(out: str) -> None:
    before, after = numbers(r"return before: (\S+), after: (\S+)", out)
    assert after > before + 40  # 100 steps: 0.4 closer to the origin on average
    assert "the same as before saving: True" in out


def own_reward(out: str) -> None:
    (plain,) = numbers(r"environment's reward: .* (\d+) %", out)
    (shaped,) = numbers(r"with reward modules: .* (\d+) %", out)
    assert plain <= 20 < 80 <= shaped


def own_trainer(out: str) -> None:
    before, after = numbers(r"return before: (\S+), after: (\S+)", out)
    assert after > before + 100
    assert numbers(r"loaded agent: (\S+)", out) == [after]
    assert "stopped at 1000, resumed to 2000: equal to the uninterrupted run: True" in out


def from_recordings(out: str) -> None:
    (recorded,) = numbers(r"recorded: 200 episodes, mean return (\S+)", out)
    learned, successes = numbers(r"learned offline: (\S+), (\d+)% reach", out)
    assert recorded < 0 < 10 < learned
    assert successes >= 90
    (again,) = numbers(r"recorded anew: 10 episodes, mean return (\S+), rlkit/TwinThrust-v0", out)
    (best,) = numbers(r"the better half: 5 episodes, mean return (\S+)", out)
    assert 9 < again < best


def robust_policy(out: str) -> None:
    plain, robust = (numbers(rf"{kind} policy:\s+(\S+) (\S+) (\S+)", out) for kind in ("plain", "robust"))
    assert plain[0] > robust[0] - 0.3  # where it learned, caution costs little or nothing
    assert robust[2] > plain[2] + 1  # at five times the risk


CHECKS: dict[str, Callable[[str], None]] = {
    f.__name__: f for f in (own_environment, own_reward, own_trainer, from_recordings, robust_policy)
}


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_example(name: str, tmp_path: Path) -> None:
    """In an empty folder, as a process; each one needs a check of what it printed."""
    script = EXAMPLES / f"{name}.py"
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    CHECKS[name](done.stdout)
    assert list(tmp_path.iterdir()) == [], "examples leave no files behind"
    assert f"python examples/{name}.py" in script.read_text(encoding="utf-8"), "the docstring says how to run it"


@pytest.fixture
def td3(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as a module; what it registers is forgotten after the test."""
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "own_trainer", raising=False)
    yield importlib.import_module("own_trainer")
    sys.modules.pop("own_trainer", None)


def test_registered_under_its_name(td3: Any) -> None:
    assert registry.get("td3") is rlkit.TD3 is td3.TD3
    assert registry.entries()["td3"].target == "own_trainer:TD3"
    assert re.search(r"arXiv:\d{4}\.\d{5}", td3.__doc__)
    assert "Deviations" in td3.__doc__
    assert [o.path for o in options(td3.TD3Config) if not o.doc] == []


def test_save_and_load_predict_the_same(td3: Any, tmp_path: Path) -> None:
    agent: Any = tiny("td3").learn(40)
    folder = agent.save(tmp_path / "saved")
    obs = np.stack([agent.observation_space.sample() for _ in range(5)])
    for loaded in (rlkit.load(folder), td3.TD3.load(folder), rlkit.load(folder, inference=True)):
        assert loaded.clock == 40
        np.testing.assert_array_equal(agent.predict(obs)[0], loaded.predict(obs)[0])
    with pytest.raises(UserError, match="was saved by `td3`, not by `sac`"):
        rlkit.SAC.load(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {
            "n_envs": 2, "n_steps": 2, "gradient_steps": -1, "normalize_obs": True, "reward": ("normalize",),
            "policy_kwargs": {"net_arch": {"pi": [8], "qf": [8, 8]}, "layer_norm": True, "dropout": 0.1},
            "learning_rate_schedule": "linear", "policy_delay": 3,
        },
    ],
    ids=["defaults", "every option"],
)  # fmt: skip
def test_stop_and_resume_equals_uninterrupted(td3: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    close(tiny("td3", out=str(tmp_path / "whole"), **fields).learn(100))
    learn_with_stops(tiny("td3", out=str(tmp_path / "parts"), **fields), 100, [7, 45, 46, 90])
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")


def test_updates_change_what_they_should(td3: Any) -> None:
    """With a delay of 2, the first update moves the critics alone; the second one the actor and both targets."""
    agent: Any = tiny("td3")
    agent.before_learning()
    while agent.owed < 1:
        agent.clock += agent.collect()
    names = ("actor", "actor_target", "critic", "critic_target")

    def moved() -> list[str]:
        before = {n: [p.detach().clone() for p in getattr(agent, n).parameters()] for n in names}
        metrics = agent.update(agent.batch())
        agent.updates += 1
        assert all(torch.isfinite(value) for value in metrics.values())
        return [n for n in names if not all(map(torch.equal, before[n], getattr(agent, n).parameters()))]

    assert moved() == ["critic"]
    assert moved() == list(names)


def test_losses_by_hand(td3: Any) -> None:
    """Two critics, two transitions: minimum, no bootstrap after a terminal state, the first critic for the actor."""
    reward, discount, terminated = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5]), torch.tensor([False, True])
    y = td3.td_target(reward, discount, terminated, torch.tensor([[4.0, 8.0], [6.0, 2.0]]))
    assert y.tolist() == [1.0 + 0.5 * 4.0, 2.0]
    q = torch.tensor([[3.0, 0.0], [5.0, 2.0]])
    assert td3.critic_loss(q, y).item() == (0 + 4) / 2 + (4 + 0) / 2
    assert td3.actor_loss(q).item() == -1.5
