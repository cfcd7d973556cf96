"""ControlTrainer: what every trainer that acts in environments shares.

It steps environments into the buffer, owes updates, applies reward modules, predicts, evaluates, and saves what acting
needs. Collection follows Stable-Baselines3's off-policy scheme and names: uniform random actions for `learning_starts`
steps, then `gradient_steps` updates after every `train_freq` steps of all environments together. An on-policy or an
offline trainer overrides `collect`.

Several processes are to one what several environments are to one: each steps `n_envs` of its own into its own part of
the buffer, and takes its part of every batch from there. What they exchange is counts after every step of the
environments, running statistics, and the gradients; so all have the same weights and the same clock.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

import annotated_types as limits
import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rlkit import envs, processes, registry, rewards, sb3
from rlkit.buffer import Field, RolloutBuffer, dtype_of
from rlkit.config import Count, Fraction, Positive, RunConfig, Strict, Whole, merge, to_dict, validate
from rlkit.envs.spaces import ActionScale, check_action_space, flat_space, flatten_obs, space_from_json, space_to_json
from rlkit.envs.vector import VectorAdapter
from rlkit.errors import CheckpointError, UserError, did_you_mean
from rlkit.evaluate import Watch, evaluate
from rlkit.nets import ActivationName, RunningNorm, ToFloat32, use_library
from rlkit.nstep import NStep
from rlkit.optim import Adam
from rlkit.products import library
from rlkit.trainer import Batch, Trainer

WINDOW = 100  # episodes behind rollout/ep_rew_mean, as in Stable-Baselines3


@dataclass(frozen=True, kw_only=True)
class ControlConfig(RunConfig):
    """Environments, and what every control trainer does with them."""

    env: str | None = None
    """Gymnasium id, such as `HalfCheetah-v5` or `my_package:MyEnv-v0`; None for an object given in Python."""
    n_envs: Count = 1
    """Copies of the environment in each process, stepped together."""
    vectorization_mode: Literal["sync", "async"] = "sync"
    """`async` runs each copy in a worker process of its own."""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `gymnasium.make`, as `name=value` pairs."""
    env_timeout: Positive = 60.0
    """Seconds after which a `step` or `reset` that has not returned is reported as hanging."""
    reward: tuple[str, ...] = ()
    """Reward modules, applied in turn: `scale=0.1`, `shift=-1`, `clip=-1,1`, `normalize`, `module:function`."""
    gamma: Fraction = 0.99
    """Discount factor."""
    normalize_obs: bool = False
    """Standardise observations by running moments, which are saved with the policy and frozen when it predicts. They
    are of the observations of all processes."""
    preset: str | None = None
    """Documented hyperparameters under the given fields: a name, or `auto` for those of the environment."""


@dataclass(frozen=True, kw_only=True)
class OffPolicyConfig(ControlConfig):
    """Replay and updates, under Stable-Baselines3's names."""

    learning_rate: Positive = 3e-4
    """Adam's step size, of all networks."""
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    """`linear` falls to zero at the end of the first budget."""
    buffer_size: Count = 1_000_000
    """Transitions kept, by all processes together, an equal part each."""
    learning_starts: Whole = 100
    """Steps of uniform random actions before the first update."""
    batch_size: Count = 256
    """Transitions of an update, of all processes together, an equal part each."""
    n_steps: Count = 1
    """Rewards summed before the value of a later state stands in."""
    train_freq: Count = 1
    """Steps of all environments together between updates."""
    gradient_steps: Annotated[int, limits.Ge(-1)] = 1
    """Updates each time; -1 makes as many as transitions were gathered, by all processes."""


@dataclass(frozen=True, kw_only=True)
class NetConfig(Strict):
    """`policy_kwargs`: the networks."""

    net_arch: tuple[Count, ...] | dict[Literal["pi", "qf"], tuple[Count, ...]] = (256, 256)
    """Hidden widths: one list, or a mapping with `pi` (actor) and `qf` (critics)."""
    activation_fn: ActivationName = "relu"
    """Activation of hidden layers."""
    n_critics: Count = 2
    """Critics; REDQ (arXiv:2101.05982) uses 10."""
    layer_norm: bool = False
    """Layer normalisation in the critics (DroQ, arXiv:2110.02034)."""
    dropout: Annotated[float, limits.Interval(ge=0, lt=1)] = 0.0
    """Dropout probability in the critics (DroQ uses 0.01)."""

    def widths(self, net: Literal["pi", "qf"]) -> tuple[int, ...]:
        """Hidden widths of the actor (`pi`) or the critics (`qf`)."""
        return self.net_arch.get(net, ()) if isinstance(self.net_arch, dict) else self.net_arch


class ControlTrainer(Trainer):
    """Base of trainers that act in environments.

    Args:
        env: gymnasium id, Env, list of functions that make an Env, gymnasium VectorEnv, or Stable-Baselines3 VecEnv.
        config: a whole configuration, instead of `fields`.
        eval_env: function that makes an environment for evaluations; needed where `env` is an object that rlkit
            cannot make again (an Env or a VectorEnv).
        reward: reward modules (callables or their names), applied in turn.
        fields: fields of `Config`, such as `seed=0, batch_size=256`; `verbose`, and arguments of Stable-Baselines3 that
            say what is so anyway, such as `action_noise=None`, are taken, too.

    Raises:
        UserError: an unknown field, a value out of range, an environment this trainer does not support.
    """

    Config: ClassVar[type[ControlConfig]] = OffPolicyConfig
    config: Any
    action_spaces: ClassVar[tuple[str, ...]] = ("Box",)
    """Names of the gymnasium spaces whose actions the policy can produce."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Environment id, or a name, -> fields."""
    own = frozenset({"buffer", "rng", "meter", "env", "reward", "n_step", "window"})
    divided: ClassVar[tuple[str, ...]] = ("batch_size", "buffer_size")
    """Fields, where there are such, that say how much all processes have together; see `share`."""
    chooses: ClassVar[bool] = False
    """Whether the policy chooses among alternatives, so that rounding may turn near ties."""
    policy_parts: ClassVar[tuple[str, ...]] = ("normalizer", "actor")
    """Tracked modules that `act` reads, whose weights an exported policy holds."""

    buffer: RolloutBuffer
    normalizer: RunningNorm | ToFloat32

    def __init__(
        self,
        env: Any = None,
        *args: Any,
        config: Any = None,
        eval_env: Callable[[], gym.Env] | None = None,
        reward: Sequence[str | rewards.RewardModule] | None = None,
        saved: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        self._verbose = bool(fields.pop("verbose", False))  # as Stable-Baselines3's: what `learn` shows by default
        fields = sb3.without_idle(fields)
        self._check_call(env, args, config, fields)
        modules = None if reward is None else [reward] if isinstance(reward, str) or callable(reward) else list(reward)
        if modules is not None and config is None:
            fields["reward"] = tuple(rewards.spec_of(m) for m in modules)
        if isinstance(env, str):
            fields["env"] = env
        config = self.config = self.make_config(fields) if config is None else validate(self.Config, to_dict(config))
        self.processes = self.join(config)
        self._spec = env if env is not None and not isinstance(env, str) else config.env
        self._eval_env = eval_env
        self._adapter: VectorAdapter | None = None
        self._env_view: Any = None
        self._last_step: tuple[Any, ...] = ()
        self._pending_env_state: Mapping[str, Any] | None = None
        if saved is not None and "spaces" in saved:
            self.observation_space = space_from_json(saved["spaces"]["observation"])
            self.action_space = space_from_json(saved["spaces"]["action"])
        elif self._spec is None:
            raise UserError(
                f"`env`: {self.name} needs an environment: a gymnasium id such as `Pendulum-v1`, or an object"
            )
        else:
            self.observation_space = self.env.raw_observation_space
            self.action_space = self.env.action_space
            # What a given object has is what the saved configuration says.
            config = self.config = dataclasses.replace(config, n_envs=self.env.num_envs)
        self.n_envs: int = config.n_envs
        kind = type(self.action_space).__name__
        fitting = [name for name, entry in registry.entries().items() if kind in entry.actions]
        check_action_space(self.action_space, self.action_spaces, type(self).__name__, fitting)
        self.flat_observation_space = flat_space(self.observation_space)
        self.scale = ActionScale(self.action_space) if isinstance(self.action_space, gym.spaces.Box) else None
        self._reward_specs: Sequence[str | rewards.RewardModule] = config.reward if modules is None else modules
        self._reward: rewards.Chain | None = None
        self._pending_reward_state: Mapping[str, Any] | None = None
        if saved is None:
            self._open_reward()  # a wrong name is an error at once; of a loaded trainer, at its first use
        self.processes.from_main(lambda: [self.share(name) for name in self.divided if hasattr(config, name)])
        # A part of the last episodes of all processes.
        self.window: deque[tuple[float, int, bool | None]] = deque(maxlen=max(1, WINDOW // self.processes.size))
        self.n_step = NStep(config.n_steps if isinstance(config, OffPolicyConfig) else 1, config.gamma, self.n_envs)
        self.vector_steps, self.since_update = 0, 0
        super().__init__(config)

    @classmethod
    def _check_call(cls, env: Any, args: tuple[Any, ...], config: Any, fields: Mapping[str, Any]) -> None:
        if args or (isinstance(env, str) and env.endswith("Policy")):
            raise UserError(
                f"rlkit trainers take the environment first and no policy name: "
                f'rlkit.{cls.__name__}("HalfCheetah-v5", batch_size=256); networks are set by `policy_kwargs`'
            )
        if config is not None and fields:
            raise UserError(f"give either `config` or fields, not both (got {', '.join(fields)})")
        if config is not None and not isinstance(config, cls.Config):
            raise UserError(f"`config`: {cls.__name__} needs a {cls.Config.__name__}, got {type(config).__name__}")

    @classmethod
    def make_config(cls, fields: Mapping[str, Any], source: str = "") -> Any:
        """`fields` over the preset that they name, over the defaults."""
        preset = fields.get("preset")
        if preset is None:
            return super().make_config(fields, source)
        return super().make_config(merge(cls.preset_fields(preset, fields.get("env")), fields), source)

    @classmethod
    def preset_fields(cls, preset: str, env: str | None) -> Mapping[str, Any]:
        """The fields of a preset; `auto` means the environment's own, whatever its version.

        Raises:
            UserError: no such preset.
        """
        if preset != "auto":
            if preset not in cls.presets:
                raise UserError(f"`preset`: unknown `{preset}`{did_you_mean(preset, [*cls.presets, 'auto'])}")
            return cls.presets[preset]
        if env is not None and env in cls.presets:
            return cls.presets[env]
        family = {name.rpartition("-v")[0]: values for name, values in cls.presets.items() if "-v" in name}
        base = (env or "").rpartition("-v")[0]
        if base not in family:
            processes.say(f"no preset for {env}: using the defaults")
        return family.get(base, {})

    @classmethod
    def is_object(cls, key: str, value: Any) -> bool:
        if key == "reward" and value is not None:
            return callable(value) or any(callable(item) for item in value if not isinstance(item, str))
        return key == "eval_env" or (key == "env" and value is not None and not isinstance(value, str))

    # Environments

    @property
    def env(self) -> VectorAdapter:
        """The environments, opened at first use; a loaded trainer restores their state then.

        Raises:
            UserError: the run's environment was a Python object and none was given to `load`.
        """
        if self._adapter is None:
            config = self.config
            if self._spec is None:
                raise UserError(
                    f"this run's environment was a Python object: pass it again, "
                    f"{type(self).__name__}.load(folder, env=...), to go on learning"
                )
            self._adapter = envs.make(
                self._spec,
                n_envs=config.n_envs,
                seed=config.seed,
                vectorization_mode=config.vectorization_mode,
                env_kwargs=config.env_kwargs,
                timeout=config.env_timeout,
                rank=self.processes.rank,
            )
            if self._pending_env_state is not None:
                self._restore_env(self._adapter, self._pending_env_state)
                self._pending_env_state = None
        return self._adapter

    def _restore_env(self, adapter: VectorAdapter, state: Mapping[str, Any]) -> None:
        saved = (self.observation_space, self.action_space)
        given = (adapter.raw_observation_space, adapter.action_space)
        if given != saved:
            raise UserError(f"the environment's spaces differ from the checkpoint's: {given} instead of {saved}")
        for message in adapter.load_state_dict(state):
            print(message, file=sys.stderr)
        for env in np.flatnonzero(adapter.state_dict()["episode"] != state["episode"]).tolist():
            self.n_step.clear(env)  # it had to be reset: its unfinished sums would span two episodes

    @property
    def reward(self) -> rewards.Chain:
        """The reward modules. Those of a loaded trainer are imported at first use: never just to predict."""
        return self._reward if self._reward is not None else self._open_reward()

    def _open_reward(self) -> rewards.Chain:
        lost = [spec for spec in self._reward_specs if isinstance(spec, str) and spec.startswith("<")]
        if lost:
            raise UserError(
                f"this run learned from the Python rewards {', '.join(lost)}: pass them again, "
                f"{type(self).__name__}.load(folder, reward=[...])"
            )
        context = {"gamma": self.config.gamma, "n_envs": self.n_envs}
        self._reward = rewards.Chain([rewards.resolve(spec, **context) for spec in self._reward_specs])
        if self._pending_reward_state is not None:
            self._reward.load_state_dict(self._pending_reward_state)
        return self._reward

    def close(self) -> None:
        """Close environments and worker processes; also done when the trainer is deleted."""
        if self._adapter is not None:
            self._adapter.close()

    def learn(
        self,
        total_timesteps: int | None = None,
        callback: Any = None,
        log_interval: int | None = None,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = False,
        progress_bar: bool | None = None,
    ) -> Self:
        """Train for `total_timesteps` more environment steps; see `Trainer.learn`.

        Args:
            callback: a function, called as `callback(trainer)`, or Stable-Baselines3's callbacks, one or a list.
            log_interval, tb_log_name: of Stable-Baselines3's scripts; what they would set is said.
            reset_num_timesteps: True is possible before the first step alone, because steps go on counting.
            progress_bar: show progress on standard output; None is what `verbose=` of the constructor says.
        """
        if log_interval is not None:
            processes.say(
                f"`log_interval` counts episodes; records come every {self.config.log_every:,} steps (log_every)"
            )
        if tb_log_name is not None:
            processes.say(f"`tb_log_name` has no effect: records are in the run folder, `out` ({self.folder})")
        if reset_num_timesteps and self.clock:
            raise UserError(
                f"`reset_num_timesteps`: the trainer is at step {self.clock:,} and goes on from there; to begin anew, "
                "make a new one"
            )
        return super().learn(
            total_timesteps, callback, progress_bar=self._verbose if progress_bar is None else progress_bar
        )

    def before_learning(self) -> None:
        if self._reward is None:
            self._open_reward()
        if self.env.obs is None:
            self.env.reset()

    # Collection

    def track(self, **parts: Any) -> None:
        super().track(**parts)
        for part in parts.values():
            if isinstance(part, torch.nn.Module):
                use_library(part, library(self.config.matmul, self.device))

    @property
    def obs_dim(self) -> int:
        return int(self.flat_observation_space.shape[0])

    @property
    def action_dim(self) -> int:
        return int(np.prod(self.action_space.shape or (1,)))

    def transition_fields(self) -> dict[str, Field]:
        """Columns of a transition: the observation in its own dtype, the action in [-1, 1], or a number from 0."""
        obs = Field((self.obs_dim,), dtype_of(self.flat_observation_space.dtype))
        return {
            "obs": obs,
            "action": Field((self.action_dim,)) if self.scale is not None else Field(dtype=torch.int64),
            "reward": Field(),
            "next_obs": obs,
            "terminated": Field(dtype=torch.bool),
            "truncated": Field(dtype=torch.bool),
            "discount": Field(),
        }

    def explore(self, obs: Tensor) -> dict[str, Tensor]:
        """(n, obs_dim) observations -> columns to store, at least `action`: (n, action_dim) in [-1, 1], or (n,) numbers
        from 0 of discrete ones.
        """
        raise NotImplementedError

    def act(self, obs: Tensor, deterministic: bool) -> Tensor:
        """(n, obs_dim) float observations -> actions as `explore` has them; noise from the stream `predict`."""
        raise NotImplementedError

    def share(self, field: str) -> int:
        """This process's part of what the configuration gives all of them together.

        Raises:
            UserError: it cannot be divided equally.
        """
        whole, size = getattr(self.config, field), self.processes.size
        if whole % size:
            below = whole - whole % size
            near = f"{below:,} or {below + size:,}" if below else f"{size:,}"
            raise UserError(f"`{field}`: {whole:,} cannot be divided equally among {size} processes; give {near}")
        return int(whole // size)

    def collect(self) -> int:
        """One step of every environment of all processes; returns how many transitions that made (autoreset steps make
        none).
        """
        config = self.config
        taken, unready = self.processes.tally(self._step_environments, 2)
        if taken == 0:
            return 0
        if config.normalize_obs:
            self.normalizer.update(self.processes.rows(self._observed(), self.n_envs).to(self.device))
        if self.processes.size > 1:
            self.reward.synchronise(self.processes)
        self.vector_steps += 1
        self.since_update += taken
        due = self.clock + taken > config.learning_starts and self.vector_steps % config.train_freq == 0
        if due and not unready:
            self.owed += self.since_update if config.gradient_steps < 0 else config.gradient_steps
            self.since_update = 0
        return taken

    def _observed(self) -> Tensor:
        """(n, obs_dim) observations of the last step's transitions."""
        return torch.from_numpy(self._last_step[0]["obs"]).double()

    @torch.no_grad()
    def _step_environments(self) -> tuple[int, bool]:
        """Step this process's environments; returns how many transitions that made, and whether none is stored yet."""
        config, adapter = self.config, self.env
        if isinstance(config, OffPolicyConfig) and self.clock < config.learning_starts:
            shape = (adapter.num_envs, self.action_dim)
            columns = {"action": torch.rand(shape, generator=self.rng["warmup"], device=self.device) * 2 - 1}
        else:
            columns = self.explore(torch.from_numpy(adapter.obs).to(self.device))
        numpy_columns = {name: value.float().cpu().numpy() for name, value in columns.items()}
        rows = adapter.step(numpy_columns.pop("action"))
        taken = len(rows["reward"])
        episodes = adapter.pop_episodes()
        self._last_step = rows, rows["reward"], episodes  # the reward before modules change it
        if taken:
            self.store({**rows, **{name: value[rows["env"]] for name, value in numpy_columns.items()}})
            self.window.extend((e.return_, e.length, e.success) for e in episodes)
        return taken, not len(self.buffer)

    def store(self, rows: dict[str, Any]) -> None:
        """Reward modules, n-step sums, then the buffer."""
        rows["reward"] = self.shaped(rows)
        complete = self.n_step(rows)
        if complete is not None:
            self.buffer.add({name: complete[name] for name in self.buffer.fields})

    def shaped(self, rows: Mapping[str, Any]) -> np.ndarray:
        """Rewards of the environments' transitions as they are learned from: after the reward modules; (n,)."""
        if not self.reward.modules:
            rewards: np.ndarray = rows["reward"]
            return rewards
        columns = {
            "rewards": rows["reward"],
            "observations": rows["obs"],
            "actions": rows["action"],
            "next_observations": rows["next_obs"],
            **{name: rows[name] for name in ("terminated", "truncated", "env")},
        }
        return self.reward(columns).astype(np.float32)

    def batch(self) -> Batch:
        return self.buffer.sample(self.share("batch_size"), self.rng["sample"])

    @property
    def learning_rate(self) -> float:
        """Adam's step size now, under the schedule."""
        fraction = 1.0 - self.progress if self.config.learning_rate_schedule == "linear" else 1.0
        return self.config.learning_rate * fraction

    def schedule(self) -> None:
        """Set the scheduled learning rate of all optimisers."""
        if self.config.learning_rate_schedule != "constant":
            for part in self._parts.values():
                if isinstance(part, Adam):
                    part.learning_rate = self.learning_rate

    def planned_updates(self) -> float:
        return self.planned_online(self.config.learning_starts)

    def planned_online(self, start: int) -> float:
        """Updates for the steps of the environments from `start` on."""
        config, steps = self.config, max(0, self.target - max(self.clock, start))
        if config.gradient_steps < 0:
            return steps
        return steps / (self.n_envs * self.processes.size * config.train_freq) * config.gradient_steps

    # Names that Stable-Baselines3's callbacks know; see `rlkit.sb3`

    @property
    def num_timesteps(self) -> int:
        """Environment steps so far."""
        return self.clock

    @cached_property
    def logger(self) -> Any:
        """Stable-Baselines3's logger: `record(key, value)`, and `dump(step)` writes the run's records."""
        return sb3.make_logger(self)

    @property
    def ep_info_buffer(self) -> deque[dict[str, float]]:
        """Return `r` and length `l` of the last finished episodes of this process."""
        return deque(({"r": r, "l": n} for r, n, _ in self.window), maxlen=WINDOW)

    def get_env(self) -> Any:
        """The training environments as Stable-Baselines3's `VecEnv`: the given one, or a view that does not step."""
        if self._env_view is None:
            self._env_view = sb3.training_env(self, self._spec)
        return self._env_view

    def get_vec_normalize_env(self) -> Any:
        """The `VecNormalize` around a given `VecEnv`, or None."""
        return sb3.vec_normalize(self._spec)

    def last_step(self) -> dict[str, Any]:
        """The last step of all environments under Stable-Baselines3's names, for callbacks.

        `actions` in the environments' units, `new_obs`, `rewards` and `dones`, a row each, and `infos`, which hold
        `episode`, `terminal_observation`, `TimeLimit.truncated` and `is_success` at the end of an episode.
        """
        return sb3.last_step(self.env, *self._last_step) if self._last_step else sb3.no_step(self.env)

    @property
    def replay_buffer(self) -> RolloutBuffer:
        """The buffer."""
        return self.buffer

    def save_replay_buffer(self, path: str) -> None:
        """Refused: the checkpoints of a run hold the buffer.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"`save_replay_buffer` (to {path}): the checkpoints of a run folder hold the buffer; give the trainer "
            "`out=` and `checkpoint_every=` instead"
        )

    def dump_logs(self) -> None:
        """Write what `logger.record` was given."""
        self.logger.dump(self.clock)

    # Acting

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, Any]:
        """Actions of the policy, in the environment's own units; Stable-Baselines3's signature.

        Args:
            observation: one observation, or a batch with a leading axis (a mapping of such for Dict spaces).
            state: passed through; the policies here have none.
            episode_start: ignored for the same reason.
            deterministic: the mode of the policy instead of a sample; samples come from a stream of their own, so
                predicting does not disturb training.

        Returns:
            (action, state); the action has a leading axis if the observation had one.

        Raises:
            UserError: the observation does not fit the space.
        """
        single = not _is_batched(self.observation_space, observation)
        n = None if single else len(_leaf(self.observation_space, observation)[0])
        flat = np.atleast_2d(flatten_obs(self.observation_space, _as_arrays(observation), n))
        with torch.no_grad():
            action = self.act(torch.from_numpy(np.ascontiguousarray(flat)).to(self.device), deterministic).cpu()
        if self.scale is not None:
            actions = self.scale.to_env(action.float().numpy())
        else:
            actions = action.numpy() + self.action_space.start
        return (actions[0] if single else actions), state

    def make_eval_env(self) -> Callable[[], gym.Env] | None:
        """A function that makes an evaluation environment, or None."""
        if self._eval_env is not None:
            return self._eval_env
        if self._adapter is not None:
            return self._adapter.make_single
        return envs.single(self._spec, self.config.env_kwargs) if isinstance(self._spec, str) else None

    def can_evaluate(self) -> bool:
        return self.make_eval_env() is not None

    def why_no_evaluation(self, run: str) -> str:
        return (
            "trained on an environment given in Python, which no file can hold: evaluate it there, "
            f"rlkit.load({run!r}, eval_env=make_env).evaluate(10)"
        )

    def evaluate(
        self,
        episodes: int = 10,
        *,
        seed: int | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        watch: Watch = lambda index, env, observation, action: None,
    ) -> dict[str, Any] | None:
        """A record of whole episodes, which the main one of several processes runs; None when `should_stop` said so.

        Collective, except in a callback.

        Args:
            episodes: how many.
            seed: of the episodes; by default the run's.
            watch: sees every step; see `rlkit.evaluate`.

        Raises:
            UserError: there is no environment to evaluate in.
        """
        return self.processes.from_main(lambda: self._evaluate(episodes, seed, should_stop, watch))

    def _evaluate(
        self, episodes: int, seed: int | None, should_stop: Callable[[], bool], watch: Watch
    ) -> dict[str, Any] | None:
        make_env = self.make_eval_env()
        if make_env is None:
            raise UserError("evaluation needs an environment of its own: pass `eval_env=` (a function that makes one)")
        self._set_training(False)
        chosen = self.config.seed if seed is None else seed
        result = evaluate(self, make_env, episodes, chosen, should_stop=should_stop, watch=watch)
        self._set_training(True)
        return None if result is None else {**result.record(), "eval/returns": result.returns}

    def describe(self) -> str:
        source = self.config.env or "an environment object"
        sizes = f"observations {self.obs_dim}, actions {self.action_dim}"
        n, each = self.processes.size, ", each" if self.processes.size > 1 else ""
        lines = [super().describe(), f"environment: {self.n_envs} x {source}, {sizes}{each}"]
        if n > 1:
            parts = [f"{self.share(name):,} of `{name}`" for name in self.divided if hasattr(self.config, name)]
            lines.append(f"processes: {n}, each has {' and '.join(parts)}")
        if hasattr(self, "buffer"):
            lines.append(f"buffer: {self.buffer.describe()}{each}")
        return "\n".join(lines)

    def describe_evaluation(self, record: Mapping[str, Any]) -> str:
        n, mean = record["eval/episodes"], record["eval/mean_reward"]
        digits = ".1f" if abs(mean) >= 10 else ".3f"
        success = record.get("eval/success_rate")
        rate = "" if success is None else f", success {100 * success:.0f} %"
        if n == 1:
            return f"return {mean:{digits}} (n=1, no interval){rate}"
        low, high = (record[f"eval/ci95_{side}"] for side in ("low", "high"))
        interval = f"95 % interval {low:{digits}} to {high:{digits}}"
        return f"return {mean:{digits}} ± {record['eval/std_reward']:{digits}} (n={n}, {interval}){rate}"

    def evaluation_json(self, record: Mapping[str, Any]) -> dict[str, Any]:
        values = {k.removeprefix("eval/"): v for k, v in record.items()}
        return {
            "mean": values["mean_reward"],
            "std": values["std_reward"],
            "ci95": [values["ci95_low"], values["ci95_high"]],
            "episodes": values["episodes"],
            "returns": values["returns"],
        }

    def _set_training(self, training: bool) -> None:
        for part in self._parts.values():
            if isinstance(part, torch.nn.Module):
                part.train(training)

    def metrics(self) -> dict[str, float]:
        values = super().metrics()
        window = [episode for part in self.processes.gather(list(self.window)) for episode in part]
        if window:
            values["rollout/ep_rew_mean"] = float(np.mean([r for r, _, _ in window]))
            values["rollout/ep_len_mean"] = float(np.mean([n for _, n, _ in window]))
            successes = [s for _, _, s in window if s is not None]
            if successes:
                values["rollout/success_rate"] = float(np.mean(successes))
        values["train/n_updates"] = self.updates
        return values

    # State

    def state(self) -> dict[str, Any]:
        files = super().state()
        adapter_state = self._adapter.state_dict() if self._adapter is not None else self._pending_env_state
        files["state"] |= {
            "spaces": {
                "observation": space_to_json(self.observation_space),
                "action": space_to_json(self.action_space),
            },
            "env": adapter_state,
            "reward": self._pending_reward_state if self._reward is None else self._reward.state_dict(),
            "n_step": self.n_step.state_dict(),
            "window": [list(episode) for episode in self.window],
            "collect": {"vector_steps": self.vector_steps, "since_update": self.since_update},
        }
        return files

    def load_state(self, files: Mapping[str, Any]) -> None:
        super().load_state(files)
        state = files["state"]
        try:
            self._pending_reward_state = state["reward"]
            if self._reward is not None:
                self._reward.load_state_dict(state["reward"])
            self.n_step.load_state_dict(state["n_step"])
            self.window = deque((tuple(episode) for episode in state["window"]), self.window.maxlen)
            self.vector_steps, self.since_update = state["collect"]["vector_steps"], state["collect"]["since_update"]
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint's state does not fit: {error!r}") from error
        self._pending_env_state = state["env"]
        if self._adapter is not None and self._pending_env_state is not None:
            self._restore_env(self._adapter, self._pending_env_state)
            self._pending_env_state = None


def _as_arrays(observation: Any) -> Any:
    if isinstance(observation, Mapping):
        return {key: _as_arrays(value) for key, value in observation.items()}
    return np.asarray(observation)


def _leaf(space: gym.Space, observation: Any) -> tuple[np.ndarray, tuple[int, ...]]:
    """The first array of an observation, with the shape that its space gives one of them.

    Raises:
        UserError: a Dict observation without the space's keys.
    """
    while isinstance(space, gym.spaces.Dict):
        key = next(iter(space.spaces))
        if not isinstance(observation, Mapping) or key not in observation:
            raise UserError(
                f"observation: expected a mapping with {', '.join(space.spaces)}, got {type(observation).__name__}"
            )
        space, observation = space.spaces[key], observation[key]
    return np.asarray(observation), tuple(space.shape or ())


def _is_batched(space: gym.Space, observation: Any) -> bool:
    leaf, shape = _leaf(space, observation)
    if leaf.shape == shape:
        return False
    if leaf.shape[1:] == shape and leaf.ndim == len(shape) + 1:
        return True
    raise UserError(f"observation: expected shape {shape}, or (n, *{shape}) for a batch, got {leaf.shape}")
