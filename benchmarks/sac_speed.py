"""Environment steps a second of SAC: rlkit against Stable-Baselines3, sbx (JAX) and RLtools (C++).

All sides run Stable-Baselines3's default hyperparameters, the same networks, batch and number of threads (processor
affinity, so that it holds for each of them); each run is a process of its own, and the sides take turns. A run warms up
first, compilation included, and is then timed for a fixed number of seconds. Steps a second are environment steps;
where the work has other than one update a step, the updates are what costs.

Workloads: HalfCheetah-v5 with one update a step; with 4 and 20; with 2 to 32 environments and one update for each step
of all; and the end where overhead is everything, Pendulum-v1 with two layers of 64 and batches of 100, where each side
has the number of threads that is best for it, one or two.

Sides: `sb3`, `sbx`, `rltools` (on Pendulum-v1 and one environment, to which its Python interface is limited here), and
`rlkit` at float32 and bf16, each as `--compile auto` decides, and (`-eager`, `-compiled`) as it would not.

Where the time goes is measured in runs apart (`-split`), because looking at the clock costs time, too.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

PACKAGES = ("rlkit-trainers", "torch", "stable-baselines3", "sbx-rl", "jax", "rltools", "gymnasium", "mujoco", "numpy")
CHEETAH, PENDULUM = "HalfCheetah-v5", "Pendulum-v1"
REPEATS, SECONDS, QUICK_SECONDS, THREADS = 3, 10.0, 2.0, 2
WARM_UPDATES = 60


@dataclass(frozen=True)
class Workload:
    """One row of the table: how much of what."""

    env: str = CHEETAH
    n_envs: int = 1
    gradient_steps: int = 1
    width: int = 256
    batch: int = 256

    def gflop(self) -> float:
        """Arithmetic of the matrix products of one update, in 10^9 operations; 2 a weight and row.

        Critics: the targets forward, two passes forward, one backward to weights and activations (the first layer needs
        none to its input), one to the actor's action only. Actor: two passes forward, one backward as the critics'.
        """
        obs, action = {CHEETAH: (17, 6), PENDULUM: (3, 1)}[self.env]
        hidden = self.width**2
        critic = [(obs + action) * self.width, hidden, self.width]
        actor = [obs * self.width, hidden, 2 * action * self.width]
        critics = 2 * (3 * sum(critic) + (2 * sum(critic) - critic[0]) + (sum(critic)))
        actors = 2 * sum(actor) + (2 * sum(actor) - actor[0])
        return 2 * self.batch * (critics + actors) / 1e9


MAIN = Workload()
SMALL = Workload(PENDULUM, width=64, batch=100)
WORKLOADS = {
    "1 update a step": MAIN,
    "4 updates a step": Workload(gradient_steps=4),
    "20 updates a step": Workload(gradient_steps=20),
    **{f"{n} environments": Workload(n_envs=n) for n in (2, 4, 8, 16, 32)},
    "Pendulum-v1, 2x64": SMALL,
}
PEERS = ("sb3", "sbx")
OURS = ("rlkit", "rlkit-bf16")


def sides(workload: Workload) -> tuple[str, ...]:
    """Who is measured on it."""
    if workload == MAIN:
        return (*PEERS, "rltools", *(f"{ours}{how}" for ours in OURS for how in ("", "-eager", "-compiled")))
    return (*PEERS, "rltools", *OURS) if workload == SMALL else (*PEERS, *OURS)


# One side, in a process of its own


class Window:
    """Steps and seconds of the timed part: opens after the warm-up, closes `seconds` later."""

    def __init__(self, seconds: float, warm: int) -> None:
        self.seconds, self.warm = seconds, warm
        self.began: tuple[int, float] | None = None
        self.ended: tuple[int, float] | None = None

    def goes_on(self, steps: int) -> bool:
        """To be called with the steps so far after every step; false when the time is up."""
        now = time.perf_counter()
        if self.began is None:
            if steps >= self.warm:
                self.began = steps, now
        elif now - self.began[1] >= self.seconds:
            self.ended = steps, now
            return False
        return True

    def rate(self) -> float:
        assert self.began is not None
        assert self.ended is not None
        return (self.ended[0] - self.began[0]) / (self.ended[1] - self.began[1])


def run_peer(side: str, workload: Workload, window: Window) -> None:
    """Stable-Baselines3, or sbx, which has its interface."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            return window.goes_on(self.num_timesteps)

    fields: dict[str, Any] = {"batch_size": workload.batch, "gradient_steps": workload.gradient_steps, "seed": 0}
    fields["policy_kwargs"] = {"net_arch": [workload.width] * 2}
    env = make_vec_env(workload.env, n_envs=workload.n_envs, seed=0)
    if side == "sbx":
        from sbx import SAC
    else:
        from stable_baselines3 import SAC

        fields["device"] = "cpu"
    SAC("MlpPolicy", env, **fields).learn(10**9, callback=Clock())


def run_rltools(workload: Workload, window: Window) -> None:
    """RLtools compiles a trainer for these sizes at first use; its step is one environment step and one update."""
    import gymnasium as gym
    import rltools
    from gymnasium.wrappers import RescaleAction

    def make() -> Any:
        env = RescaleAction(gym.make(workload.env), -1.0, 1.0)
        env.reset(seed=0)
        return env

    sac = rltools.SAC(
        make, enable_evaluation=False, interface_name=f"{workload.env[:4].lower()}_{workload.width}_{workload.batch}",
        ACTOR_BATCH_SIZE=workload.batch, CRITIC_BATCH_SIZE=workload.batch, ACTOR_HIDDEN_DIM=workload.width,
        CRITIC_HIDDEN_DIM=workload.width, STEP_LIMIT=1_000_000, ALPHA=1.0, OPTIMIZER_ALPHA=3e-4,
    )  # fmt: skip
    state, steps = sac.State(0), 0
    while window.goes_on(steps):
        state.step()
        steps += 1


def rlkit_trainer(side: str, workload: Workload) -> Any:
    import rlkit

    how = {"eager": "off", "compiled": "on"}.get(side.rpartition("-")[2], "auto")
    return rlkit.SAC(
        workload.env, seed=0, n_envs=workload.n_envs, gradient_steps=workload.gradient_steps, device="cpu",
        batch_size=workload.batch, precision="bf16" if "bf16" in side else "float32", compile=how, eval_episodes=0,
        policy_kwargs={"net_arch": [workload.width] * 2}, log_every=10_000_000,
    )  # fmt: skip


def run_rlkit(side: str, workload: Workload, window: Window) -> dict[str, float]:
    trainer = rlkit_trainer(side, workload)
    spent = split(trainer, window) if side.endswith("-split") else {}
    trainer.learn(1_000_000_000, callback=lambda trainer: window.goes_on(trainer.clock))
    return {**spent, "compile_seconds": round(trainer.compile_seconds, 2)}


def split(trainer: Any, window: Window) -> dict[str, float]:
    """Count the seconds of the timed window that pass in parts of `trainer`, into the mapping that is returned."""
    spent: dict[str, float] = defaultdict(float)

    def timed(owner: Any, method: str, part: str) -> None:
        original: Callable[..., Any] = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = original(*args, **kwargs)
            if window.began is not None:
                spent[part] += time.perf_counter() - began
            return result

        setattr(owner, method, call)

    timed(trainer.env, "step", "environment")
    timed(trainer, "store", "buffer")
    timed(trainer, "batch", "buffer")
    timed(trainer, "explore", "acting")
    timed(trainer, "update", "update")
    return spent


def run_one(name: str, side: str, threads: int, seconds: float) -> None:
    """Time one side; prints a JSON object as the last line."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    workload = WORKLOADS[name]
    warm = 100 + workload.n_envs * WARM_UPDATES
    if side == "rltools":
        warm = max(warm, workload.batch + WARM_UPDATES)
    window, found = Window(seconds, warm), {}
    if side in PEERS:
        run_peer(side, workload, window)
    elif side == "rltools":
        run_rltools(workload, window)
    else:
        found = run_rlkit(side, workload, window)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    print(json.dumps({"steps_per_second": window.rate(), "memory": peak, **found}))


def products(precision: str, library: str) -> None:
    """Print the GFLOP/s of large matrix products, the most that this machine could do."""
    import torch

    from rlkit.products import onednn_products

    torch.set_num_threads(THREADS)
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    a, b, times = torch.randn(1024, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype), []

    def measure() -> None:
        for _ in range(30):
            began = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - began)

    if library == "onednn":
        with onednn_products():
            measure()
    else:
        measure()
    print(json.dumps({"gflops": 2 * 1024**3 / median(times) / 1e9}))


if __name__ == "__main__":
    if sys.argv[1] == "products":
        products(*sys.argv[2:])
    else:
        run_one(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
