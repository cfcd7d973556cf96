"""Films of evaluation episodes.

The episodes are those of `rlkit eval` with the same number and seed, to the last bit of their returns. They run first
as evaluations do, side by side and without pictures; then their actions are repeated, one episode after the other, in
an environment that draws. (A policy asked for one action at a time may round otherwise than one asked for ten.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import gymnasium as gym
import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np

from rlkit import envs, rendering
from rlkit.control import ControlTrainer
from rlkit.errors import EnvError, RlkitError, UserError
from rlkit.evaluate import Evaluation, evaluate
from rlkit.files import check_suffix, replacing
from rlkit.signals import stop
from rlkit.trainer import Trainer

FPS = 30  # of an environment that does not say


def film(
    trainer: Trainer,
    out: str | Path,
    episodes: int = 1,
    seed: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Film deterministic evaluation episodes into the mp4 `out`, which is replaced if it is there.

    Args:
        trainer: one that acts in environments; its own is made again with `render_mode="rgb_array"`. An environment
            given in Python has to come from `eval_env=` with that render mode.
        seed: as of `evaluate`; None takes the trainer's.
        say: gets a line whenever an episode is filmed.

    Raises:
        UserError: nothing to film, an environment that cannot be drawn, or a file that cannot be written.
        EnvError: an environment raised, or does not repeat an episode from its seed and actions.
        KeyboardInterrupt: SIGINT or SIGTERM arrived; no file is left.
    """
    if not isinstance(trainer, ControlTrainer):
        raise UserError(f"`{trainer.name}` acts in no environment: there is nothing to film")
    place = check_suffix(Path(out), ".mp4")
    seed = trainer.config.seed if seed is None else seed
    rendering.prepare()
    make_env = _drawing_env(trainer)
    actions: list[list[Any]] = [[] for _ in range(episodes)]

    def keep(index: int, env: gym.Env, observation: Any, action: Any) -> None:
        if action is not None:
            actions[index].append(np.copy(action))

    with stop, replacing(place) as temp, Film(temp) as reel:
        record = trainer.evaluate(episodes, seed=seed, should_stop=lambda: stop.requested, watch=keep)
        if record is None:
            raise KeyboardInterrupt
        returns = record["eval/returns"]

        def draw(index: int, env: gym.Env, observation: Any, action: Any) -> None:
            reel.add(env)
            if action is None:
                say(f"episode {index + 1}: return {returns[index]:.1f}, {len(actions[index]):,} steps")

        shown = evaluate(
            Repeat(actions), make_env, episodes, seed, parallel=1, should_stop=lambda: stop.requested, watch=draw
        )
        if shown is None:
            raise KeyboardInterrupt
        if shown.returns != returns:
            raise EnvError(_NOT_REPEATED)
    return shown


_NOT_REPEATED = (
    "the environment does not repeat an episode from its seed and actions, so the evaluated ones cannot be filmed; all "
    "of its randomness has to come from `self.np_random`"
)


class Repeat:
    """A policy that gives recorded actions again, episode after episode."""

    def __init__(self, actions: Iterable[Iterable[Any]]) -> None:
        self._actions = itertools.chain.from_iterable(actions)

    def predict(self, observation: Any, *, deterministic: bool = False) -> tuple[np.ndarray, Any]:
        action = next(self._actions, None)
        if action is None:
            raise EnvError(_NOT_REPEATED)
        return action[None], None


class Film:
    """An mp4 to which pictures are added one by one; none of them stays in memory.

    Raises:
        UserError: an environment that cannot be drawn, or a file that cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.frames = path, 0
        self._shape: tuple[int, ...] = ()
        self._writer: Any = None

    def add(self, env: gym.Env) -> None:
        """The picture of `env` as it is now."""
        picture = _picture(env)
        if self._writer is None:
            self._shape = picture.shape
            fps = env.metadata.get("render_fps")
            self._writer = imageio.get_writer(
                self.path,
                format="FFMPEG",
                fps=float(fps) if isinstance(fps, int | float) and fps > 0 else float(FPS),
                codec="libx264",
                macro_block_size=1,  # no scaling; players need even sides, so an odd one gets a black line
                output_params=["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2"],
                ffmpeg_log_level="error",
            )
        if picture.shape != self._shape:
            raise UserError(f"the pictures change their size, from {self._shape} to {picture.shape}")
        try:
            self._writer.append_data(picture)
        except OSError as error:
            raise UserError(f"cannot write the film: {str(error).splitlines()[0]} (is the disk full?)") from None
        self.frames += 1

    def __enter__(self) -> Film:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
        if kind is None:
            self._check()

    def _check(self) -> None:
        """The writer does not say how it ended."""
        try:
            written, _ = imageio_ffmpeg.count_frames_and_secs(str(self.path))
        except RuntimeError:  # no film at all
            written = 0
        if written != self.frames or written == 0:
            raise UserError(
                f"cannot write the film: it holds {written:,} of {self.frames:,} pictures (is the disk full?)"
            )


def _picture(env: gym.Env) -> np.ndarray:
    """(H, W, 3) uint8."""
    try:
        picture: Any = env.render()
    except Exception as error:  # of many kinds, such as an absent OpenGL
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{_name(env)} cannot be drawn on this machine: {type(error).__name__}: {reason}; `rlkit doctor` says what "
            "MuJoCo can draw with here, and MUJOCO_GL (egl, osmesa, glfw) chooses it"
        ) from error
    if not (isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.shape[2:] == (3,)):
        what = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
        raise UserError(f"{_name(env)} cannot be filmed: `render()` has to return a uint8 array (H, W, 3), got {what}")
    return picture


def _drawing_env(trainer: ControlTrainer) -> Callable[[], gym.Env]:
    """Makes the environment of the trainer with pictures as arrays."""
    config = trainer.config
    if config.env is None:
        make = trainer.make_eval_env()
        if make is None:
            raise UserError(
                "trained on an environment given in Python, which no file can hold: film it there, "
                'rlkit.video.film(rlkit.load(folder, eval_env=make_env), "video.mp4")'
            )
    else:
        make = envs.single(config.env, {**config.env_kwargs, "render_mode": "rgb_array"})
        assert make is not None  # of an id

    def make_env() -> gym.Env:
        try:
            env = make()
        except RlkitError as error:  # no parameter `render_mode`
            raise UserError(f"`{config.env}` cannot be filmed: {error}") from error
        if env.render_mode != "rgb_array":
            name = _name(env)
            env.close()
            raise UserError(f'{name} cannot be filmed: it has to be made with `render_mode="rgb_array"`')
        return env

    return make_env


def _name(env: gym.Env) -> str:
    return f"`{env.spec.id}`" if env.spec is not None else f"the environment {type(env.unwrapped).__name__}"
