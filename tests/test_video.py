"""Films: the episodes of an evaluation, picture by picture, and never half a file."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import pytest

import rlkit
from rlkit import rendering
from rlkit.cli import main
from rlkit.errors import EnvError, UserError
from rlkit.evaluate import Evaluation, evaluate
from rlkit.files import default_place
from rlkit.rng import derive
from rlkit.video import film

SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [8]}, "buffer_size": 100, "eval_episodes": 2}


def sac(env: Any, **fields: Any) -> Any:
    return rlkit.SAC(env, **SMALL, **fields)


def pendulum(**fields: Any) -> Any:
    return sac("Pendulum-v1", env_kwargs={"max_episode_steps": 15}, **fields)


def pictures(path: Path) -> np.ndarray:
    """(frames, H, W, 3)."""
    return iio.imread(path, plugin="FFMPEG")


def frames_per_second(path: Path) -> float:
    return float(iio.immeta(path, plugin="FFMPEG")["fps"])


class Blocks(gym.Env):
    """Draws its step as a row of bright pixels; `wrong` says what is wrong with it."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 7}  # noqa: RUF012 (gymnasium's own form)

    def __init__(self, render_mode: str | None = None, wrong: str = "", size: tuple[int, int] = (34, 21)) -> None:
        self.render_mode, self.wrong, self.size = render_mode, wrong, size
        self.observation_space = gym.spaces.Box(-1, 1, (2,), np.float64)
        self.action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.k = 0
        return self.np_random.uniform(-1, 1, 2), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = float(action[0]) + (os.urandom(1)[0] if self.wrong == "random" else 0)
        action *= 0  # as some environments do
        self.k += 1
        long = 5 if self.wrong == "longer" and self.render_mode else 0
        return self.np_random.uniform(-1, 1, 2), reward, self.k == 6 + long, False, {}

    def render(self) -> Any:
        if self.wrong.startswith("SIG") and self.k == 3:
            signal.raise_signal(signal.Signals[self.wrong])
        if self.wrong == "raises":
            raise OSError("no colours left\nmore")
        if self.wrong == "none":
            return None
        if self.wrong == "float":
            return np.zeros((4, 4, 3))
        picture = np.zeros((*self.size, 3), np.uint8)
        picture[: 4 * self.k] = 255
        return picture[:20] if self.wrong == "shrinks" and self.k == 3 else picture


class Plain(Blocks):
    """An environment of before render modes."""

    def __init__(self) -> None:
        super().__init__()


gym.register("Blocks-v0", Blocks)
gym.register("Plain-v0", Plain)


# --- what is filmed ------------------------------------------------------------------------------------------------


def test_the_command_films_the_evaluated_episodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "Lauf ä"
    pendulum(out=str(run), tensorboard=False).learn(20)
    assert main(["video", str(run), "--episodes", "2", "--seed", "3"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == str(run / "video.mp4")
    assert main(["eval", str(run), "--episodes", "2", "--seed", "3", "--json"]) == 0
    returns = json.loads(capsys.readouterr().out.splitlines()[-1])["returns"]
    assert lines == [f"episode {k + 1}: return {returns[k]:.1f}, 15 steps" for k in range(2)]
    seen = pictures(run / "video.mp4")
    assert seen.shape == (2 * 16, 500, 500, 3)  # an episode has a picture of its beginning and one a step
    assert frames_per_second(run / "video.mp4") == 30
    assert [p.name for p in run.iterdir() if p.name.startswith(".tmp")] == []


def test_pictures_are_those_of_the_environment_in_order(tmp_path: Path) -> None:
    """Against a plain loop over gymnasium's own pictures; the codec loses a little."""
    agent = pendulum()
    film(agent, tmp_path / "a.mp4", episodes=2, seed=5)
    seen = pictures(tmp_path / "a.mp4").astype(float)
    env, expected = gym.make("Pendulum-v1", render_mode="rgb_array", max_episode_steps=15), []
    for index in range(2):
        obs, _ = env.reset(seed=derive(5, "eval", index) & 0x7FFF_FFFF)
        expected.append(env.render())
        ended = False
        while not ended:
            obs, _, _, ended, _ = env.step(agent.predict(obs, deterministic=True)[0])
            expected.append(env.render())
    errors = [np.abs(a - b).mean() for a, b in zip(seen, expected, strict=True)]
    changes = [np.abs(a - b).mean() for a, b in zip(seen[16:], seen[:16], strict=True)]
    assert max(errors) < 0.5
    assert min(changes) > 1.5, "the two episodes look different"


def test_half_cheetah(tmp_path: Path) -> None:
    """Three episodes side by side in the evaluation, one after the other in the film: equal returns, bit for bit.

    A machine on which MuJoCo cannot draw says so, and leaves no file.
    """
    rendering.prepare()  # as the command does before anything imports MuJoCo; other tests may have
    agent = sac("HalfCheetah-v5", env_kwargs={"max_episode_steps": 12}, normalize_obs=True, learning_starts=10)
    agent.learn(20)
    if not rendering.has_display() and not any(rendering.works(name) for name in rendering.LIBRARIES):
        with pytest.raises(UserError, match="`HalfCheetah-v5` cannot be drawn on this machine"):
            film(agent, tmp_path / "a.mp4")
        assert list(tmp_path.iterdir()) == []
        return
    shown = film(agent, tmp_path / "a.mp4", episodes=3, seed=8)
    assert shown.returns == agent.evaluate(3, seed=8)["eval/returns"]
    assert shown.lengths == [12] * 3
    seen = pictures(tmp_path / "a.mp4")
    assert seen.shape == (3 * 13, 480, 480, 3)
    assert frames_per_second(tmp_path / "a.mp4") == 20
    assert np.abs(seen[12].astype(float) - seen[0]).mean() > 0.5


def test_odd_sides_get_a_black_line_and_the_rate_is_the_environments(tmp_path: Path) -> None:
    """Blocks is 34 x 21 and has 7 pictures an episode: the k-th with 4 k bright rows."""
    lines: list[str] = []
    film(sac("Blocks-v0"), str(tmp_path / "a.mp4"), episodes=2, say=lines.append)
    seen = pictures(tmp_path / "a.mp4")
    assert seen.shape == (14, 34, 22, 3)
    assert frames_per_second(tmp_path / "a.mp4") == 7
    bright = [int(np.round((picture[:, 10].mean(-1) / 255).sum())) for picture in seen]
    assert bright == [4 * k for k in range(7)] * 2
    assert seen[:, :, -1].max() < 60
    assert [line.split(":")[0] for line in lines] == ["episode 1", "episode 2"]


def test_an_environment_given_in_python(tmp_path: Path) -> None:
    agent = sac(Blocks(), eval_env=lambda: Blocks("rgb_array"))
    film(agent, tmp_path / "a.mp4")
    assert len(pictures(tmp_path / "a.mp4")) == 7


def test_where_films_go(tmp_path: Path) -> None:
    """Into a run; beside a saved folder, which would refuse to be saved again otherwise."""
    run = tmp_path / "run"
    agent = pendulum(out=str(run), tensorboard=False)
    agent.learn(3)
    step = "step-0000000003"
    assert default_place(run, "video.mp4") == run / "video.mp4"
    assert default_place(run / "checkpoints", "video.mp4") == run / "video.mp4"
    assert default_place(run / "checkpoints" / step, "video.mp4") == run / f"{step}-video.mp4"
    agent.save(tmp_path / "agent")
    assert default_place(tmp_path / "agent", "video.mp4") == tmp_path / "agent-video.mp4"


# --- the hook of evaluations ---------------------------------------------------------------------------------------


class Sine:
    def predict(self, observation: np.ndarray, *, deterministic: bool = False) -> tuple[np.ndarray, None]:
        return np.sin(observation[:, :1]), None


@pytest.mark.parametrize("parallel", [1, 2, 10])
def test_a_watcher_sees_every_step_and_changes_nothing(parallel: int) -> None:
    """What the policy saw and did, before the environment could write into it, then the end."""
    seen: dict[int, list[tuple[float, float | None]]] = {k: [] for k in range(3)}

    def watch(index: int, env: gym.Env, observation: Any, action: Any) -> None:
        assert isinstance(env, Blocks)
        seen[index].append((float(observation[0]), None if action is None else float(action[0])))

    watched = evaluate(Sine(), Blocks, 3, parallel=parallel, watch=watch)
    assert isinstance(watched, Evaluation)
    assert watched == evaluate(Sine(), Blocks, 3, parallel=1)
    for index, steps in seen.items():
        *during, (_, end) = steps
        assert end is None
        assert len(during) == 6
        assert [action for _, action in during] == pytest.approx([np.sin(x) for x, _ in during])
        assert sum(np.float64(action) for _, action in during) == pytest.approx(watched.returns[index])


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "wrong", "message"),
    [
        ("Plain-v0", "", r"`Plain-v0` cannot be filmed: env_kwargs: `Plain-v0` has no parameter `render_mode`"),
        ("Blocks-v0", "raises", r"`Blocks-v0` cannot be drawn on this machine: OSError: no colours left; `rlkit"),
        ("Blocks-v0", "none", r"`render\(\)` has to return a uint8 array \(H, W, 3\), got NoneType"),
        ("Blocks-v0", "float", r"got float64 \(4, 4, 3\)"),
        ("Blocks-v0", "shrinks", r"change their size, from \(34, 21, 3\) to \(20, 21, 3\)"),
        ("Blocks-v0", "random", "does not repeat an episode"),
        ("Blocks-v0", "longer", "does not repeat an episode"),
    ],
)
def test_what_cannot_be_filmed_leaves_no_file(env: str, wrong: str, message: str, tmp_path: Path) -> None:
    agent = sac(env, **({"env_kwargs": {"wrong": wrong}} if wrong else {}))
    old = b"the film before"
    (tmp_path / "a.mp4").write_bytes(old)
    with pytest.raises(EnvError if wrong in ("random", "longer") else UserError, match=message):
        film(agent, tmp_path / "a.mp4")
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == old


def test_environments_of_python_need_a_function_that_draws(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"given in Python, .* film it there, rlkit.video.film"):
        film(sac(Blocks()), tmp_path / "a.mp4")
    with pytest.raises(UserError, match=r'Blocks cannot be filmed: it has to be made with `render_mode="rgb_array"`'):
        film(sac([Blocks]), tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def test_where_no_film_can_be_written(tmp_path: Path) -> None:
    agent = sac("Blocks-v0")
    (tmp_path / "folder.mp4").mkdir()
    for name, message in (
        ("a.avi", r"`--out`: got .*a\.avi; expected a file name that ends in \.mp4"),
        ("absent/a.mp4", "cannot write .*a.mp4: .*No such file or directory"),
        ("folder.mp4", "cannot write .*folder.mp4: it is a folder"),
    ):
        with pytest.raises(UserError, match=message):
            film(agent, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.mp4"]


def test_a_full_disk(tmp_path: Path) -> None:
    """The encoder may write 1000 bytes, which is less than a film."""
    resource = pytest.importorskip("resource")
    agent = sac("Blocks-v0", env_kwargs={"size": (200, 200)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(UserError, match=r"cannot write the film: .*is the disk full\?"):
            film(agent, tmp_path / "a.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_leaves_no_half_film(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It comes while the fourth picture is drawn, when three are written."""
    saved = sac("Blocks-v0", env_kwargs={"wrong": name}).save(tmp_path / "agent")
    assert main(["video", str(saved), "--out", str(tmp_path / "a.mp4")]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "interrupted"
    assert [p.name for p in tmp_path.iterdir()] == ["agent"]


# --- without a display ---------------------------------------------------------------------------------------------


def test_a_display_and_the_users_choice_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)

    def chosen() -> tuple[str | None, str | None]:
        rendering.prepare()
        return os.environ.get("MUJOCO_GL"), os.environ.get("SDL_VIDEODRIVER")

    if not sys.platform.startswith("linux"):  # where windows are drawn without our help
        assert chosen() == (None, None)
        return
    monkeypatch.setenv("DISPLAY", ":0")
    assert chosen() == (None, None)
    monkeypatch.delenv("DISPLAY")
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    monkeypatch.setenv("SDL_VIDEODRIVER", "x11")
    assert chosen() == ("glfw", "x11")
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.delenv("SDL_VIDEODRIVER")
    library = next((name for name in rendering.LIBRARIES if rendering.works(name)), None)
    assert chosen() == (library, "dummy")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delenv("SDL_VIDEODRIVER")


def test_a_library_that_does_not_exist_does_not_work() -> None:
    assert not rendering.works("nonsense")
