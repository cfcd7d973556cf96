"""At home among Stable-Baselines3's objects: its callbacks in `learn`, its logger, a view of the environments.

Nothing here imports Stable-Baselines3 before one of its objects is met.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlkit.errors import UserError

if TYPE_CHECKING:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.vec_env import VecEnv

    from rlkit.control import ControlTrainer
    from rlkit.envs.vector import EpisodeRecord, VectorAdapter
    from rlkit.trainer import Trainer


IDLE: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_sde": ((False,), "state-dependent exploration is not supported"),
    "sde_sample_freq": ((-1,), "state-dependent exploration is not supported"),
    "use_sde_at_warmup": ((False,), "state-dependent exploration is not supported"),
    "action_noise": ((None,), "the policy explores by itself; wrap the environment to disturb its actions"),
    "replay_buffer_class": ((None,), "there is one buffer, `rlkit.buffer.RolloutBuffer`"),
    "replay_buffer_kwargs": ((None, {}), "there is one buffer; its size is `buffer_size`"),
    "optimize_memory_usage": ((False,), "the buffer holds every next observation"),
    "monitor_wrapper": ((True,), "returns and lengths of episodes are always recorded"),
    "stats_window_size": ((100,), "`rollout/ep_rew_mean` is of the last 100 episodes"),
    "tensorboard_log": ((None,), "give `out=FOLDER`, a run folder, which has TensorBoard files in `tb`"),
    "_init_setup_model": ((True,), "networks are always made"),
    "supported_action_spaces": ((None,), "a trainer knows its own"),
}
"""Arguments of Stable-Baselines3's off-policy algorithms that have no field here: the values that say nothing new, and
what to do instead of another."""


def without_idle(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` without those of Stable-Baselines3 that say what is so anyway, and `train_freq` as a number.

    Raises:
        UserError: one of them asks for something else.
    """
    rest = dict(fields)
    for name, (same, advice) in IDLE.items():
        if name in rest and not any(rest.pop(name) == value for value in same):
            raise UserError(f"`{name}`: {fields[name]!r} is not possible: {advice}")
    frequency = rest.get("train_freq")
    if isinstance(frequency, tuple | list) and len(frequency) == 2:
        if frequency[1] != "step":
            raise UserError(f"`train_freq`: got {frequency!r}; updates come after a number of steps: `train_freq=4`")
        rest["train_freq"] = frequency[0]
    return rest


def is_callback(value: Any) -> bool:
    """Whether `value` is an object like Stable-Baselines3's `BaseCallback`."""
    return all(hasattr(value, name) for name in ("init_callback", "on_training_start", "on_step"))


class CallbackBridge:
    """Calls a `BaseCallback` when Stable-Baselines3's off-policy algorithms do.

    After every step of all environments: `update_locals`, then `on_step`, whose False ends the run. Around the steps
    between updates: `on_rollout_start` and `on_rollout_end`. Its `locals` hold `self, total_timesteps, tb_log_name,
    callback`, and of the last step `actions, new_obs, rewards, dones, infos, num_collected_steps`.

    Args:
        callback: the object.
        trainer: becomes its `model`.

    Raises:
        UserError: the trainer has no environments.
    """

    def __init__(self, callback: BaseCallback, trainer: Trainer) -> None:
        from rlkit.control import ControlTrainer

        if not isinstance(trainer, ControlTrainer):
            raise UserError(
                f"`callback`: {trainer.name} has no environments, which Stable-Baselines3's callbacks need; "
                "give a function of the trainer"
            )
        self.callback, self.trainer = callback, trainer
        self._rolling = False
        self.locals: dict[str, Any] = {}

    def start(self) -> None:
        """Before the first step."""
        self.callback.init_callback(self.trainer)
        self.locals = {
            "self": self.trainer,
            "callback": self.callback,
            "total_timesteps": self.trainer.target,
            "tb_log_name": self.trainer.name,
            "num_collected_steps": 0,
        }
        self.callback.on_training_start(self.locals, globals())

    def step(self) -> bool:
        """After a step of all environments; False ends the run."""
        if not self._rolling:
            self._rolling = True
            self.locals["num_collected_steps"] = 0
            self.callback.on_rollout_start()
        self.locals["num_collected_steps"] += 1
        self.callback.update_locals({**self.locals, **self.trainer.last_step()})
        goes_on = self.callback.on_step()
        if self.trainer.owed >= 1 or not goes_on:
            self._rolling = False
            self.callback.on_rollout_end()
        return goes_on

    def end(self) -> None:
        """After the last step, also of a run that a callback or a signal ended."""
        self.callback.on_training_end()


def from_function(function: Callable[[dict[str, Any], dict[str, Any]], bool]) -> BaseCallback:
    """A function `f(locals, globals)` as a callback."""
    from stable_baselines3.common.callbacks import ConvertCallback

    return ConvertCallback(function)


def make_logger(trainer: Trainer) -> Logger:
    """Stable-Baselines3's logger; what it dumps is written to the run's records at the step given."""
    from stable_baselines3.common.logger import KVWriter
    from stable_baselines3.common.logger import Logger as SB3Logger

    class Records(KVWriter):
        def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
            numbers = {k: float(v) for k, v in key_values.items() if isinstance(v, int | float | np.number)}
            trainer.record(numbers, step)

        def close(self) -> None:
            """The run closes its files."""

    return SB3Logger(folder=None if trainer.folder is None else str(trainer.folder), output_formats=[Records()])


def vec_normalize(given: Any) -> Any:
    """The `VecNormalize` around a `VecEnv`, or None."""
    from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

    return unwrap_vec_normalize(given) if isinstance(given, VecEnv) else None


def last_step(
    adapter: VectorAdapter, rows: Mapping[str, Any], rewards: np.ndarray, episodes: Sequence[EpisodeRecord]
) -> dict[str, Any]:
    """The last step of `adapter` under the names of Stable-Baselines3's `collect_rollouts`."""
    n, took = adapter.num_envs, rows["env"]  # without the environments that were only reset
    reward, dones = np.zeros(n, np.float32), np.zeros(n, np.bool_)
    reward[took], dones[took] = rewards, rows["terminated"] | rows["truncated"]
    infos: list[dict[str, Any]] = [{} for _ in range(n)]
    for row in np.flatnonzero(rows["terminated"] | rows["truncated"]).tolist():
        infos[int(took[row])] = {
            "terminal_observation": rows["next_obs"][row],
            "TimeLimit.truncated": bool(rows["truncated"][row] and not rows["terminated"][row]),
        }
    for episode in episodes:
        infos[episode.env]["episode"] = {"r": episode.return_, "l": episode.length}
        if episode.success is not None:
            infos[episode.env]["is_success"] = episode.success
    return {"actions": adapter.last_action, "new_obs": adapter.obs, "rewards": reward, "dones": dones, "infos": infos}


def no_step(adapter: VectorAdapter) -> dict[str, Any]:
    """The same where no environment was stepped, as while a trainer learns from recordings."""
    n = adapter.num_envs
    infos: list[dict[str, Any]] = [{} for _ in range(n)]
    return {"new_obs": adapter.obs, "rewards": np.zeros(n, np.float32), "dones": np.zeros(n, np.bool_), "infos": infos}


def training_env(trainer: ControlTrainer, given: Any) -> VecEnv:
    """The environments of `trainer` as a `VecEnv`: attributes and methods can be used, steps are the trainer's.

    Args:
        given: what the trainer was given as its environment.
    """
    from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

    if isinstance(given, VecEnv):
        return given
    adapter = trainer.env

    def refused(what: str) -> UserError:
        return UserError(f"`{what}` of the training environments: the trainer steps them; make others to step yourself")

    class TrainingEnv(DummyVecEnv):
        def __init__(self) -> None:
            VecEnv.__init__(self, adapter.num_envs, adapter.raw_observation_space, adapter.action_space)

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            values = adapter.get_attr(attr_name)
            return [values[i] for i in self._get_indices(indices)]

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            adapter.set_attr(attr_name, value, list(self._get_indices(indices)))

        def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
            return adapter.env_method(method_name, args, kwargs, list(self._get_indices(indices)))

        def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
            found = adapter.is_wrapped(wrapper_class)
            return [found[i] for i in self._get_indices(indices)]

        def reset(self) -> Any:
            raise refused("reset")

        def step_async(self, actions: np.ndarray) -> None:
            raise refused("step")

        def close(self) -> None:
            raise refused("close")

        def seed(self, seed: int | None = None) -> Sequence[int | None]:
            raise refused("seed")

    return TrainingEnv()
