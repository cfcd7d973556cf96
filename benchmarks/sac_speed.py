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

import importlib.util
import json
import math
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import common
from common import RESULTS, append, machine, read, table

PACKAGES = ("rlkit-trainers", "torch", "stable-baselines3", "sbx-rl", "jax", "rltools", "gymnasium", "mujoco", "numpy")
CHEETAH, PENDULUM = "HalfCheetah-v5", "Pendulum-v1"
REPEATS, SECONDS, QUICK_SECONDS, THREADS = 3, 6.0, 3.0, 2
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
HOW = ("eager", "compiled")
FIRST, *_, LAST, OVERHEAD = WORKLOADS
SPLIT = (FIRST, LAST)
PARTS = ("environment", "acting", "buffer", "update")
LIBRARIES = ("blas", "onednn")
MEASURED = ("steps_per_second", "seconds", "memory", "compile_seconds", *PARTS)


def sides(workload: Workload) -> tuple[str, ...]:
    """Who is measured on it."""
    if workload in (MAIN, SMALL):
        return (*PEERS, "rltools", *OURS, *(f"{ours}-{how}" for ours in OURS for how in HOW))
    return (*PEERS, *OURS)


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

    def passed(self) -> float:
        """Seconds timed."""
        assert self.began is not None
        assert self.ended is not None
        return self.ended[1] - self.began[1]

    def rate(self) -> float:
        """Steps a second."""
        assert self.began is not None
        assert self.ended is not None
        return (self.ended[0] - self.began[0]) / self.passed()


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
    if side == "rltools":  # it learns from its first full batch on
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
    print(json.dumps({"steps_per_second": window.rate(), "seconds": window.passed(), "memory": peak, **found}))


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


# All of them

Found = dict[str, dict[str, list[dict[str, str]]]]
"""Runs by side and number of threads."""


def call(*args: str, threads: int = THREADS) -> dict[str, Any]:
    """Run this file in a process of its own."""
    return common.call(__file__, *args, threads=threads)


def plan(quick: bool) -> Iterator[tuple[int, str, str, int]]:
    """(repeat, workload, side, threads) of every run; a repeat goes through all, so that sides meet the same moods of
    the machine."""
    for repeat in range(1 if quick else REPEATS):
        for name in [FIRST] if quick else WORKLOADS:
            workload = WORKLOADS[name]
            for side in ("sb3", "sbx", "rlkit") if quick else sides(workload):
                for threads in (1, THREADS) if workload == SMALL and not quick else (THREADS,):
                    yield repeat, name, side, threads
        if not quick:
            yield from ((repeat, name, f"{side}-split", THREADS) for name in SPLIT for side in OURS)


def available(side: str) -> bool:
    package = {"sbx": "sbx", "rltools": "rltools"}.get(side)
    return package is None or importlib.util.find_spec(package) is not None


def main(quick: bool = False) -> str:
    out = RESULTS / ("sac-speed-quick.csv" if quick else "sac-speed.csv")
    if quick:
        out.unlink(missing_ok=True)
    where = machine(PACKAGES)
    done = {(row["repeat"], row["workload"], row["side"], row["threads"]) for row in read(out)}
    for repeat, name, side, threads in plan(quick):
        if (str(repeat), name, side, str(threads)) in done or not available(side):
            continue
        rates = dict.fromkeys(("float32", "bf16"), 0.0)
        if WORKLOADS[name] == MAIN:
            for precision in rates:
                rates[precision] = max(call("products", precision, library)["gflops"] for library in LIBRARIES)
        result = call(name, side, str(threads), str(QUICK_SECONDS if quick else SECONDS), threads=threads)
        row = {"repeat": repeat, "workload": name, "side": side, "threads": threads}
        row |= {key: round(float(result.get(key, 0)), 4) for key in MEASURED}
        row |= {f"gflops_{precision}": round(rate, 1) for precision, rate in rates.items()}
        append(out, [{**row, "gflop_an_update": round(WORKLOADS[name].gflop(), 5), **where}])
        print(f"{name}: {side}, {threads} threads: {row['steps_per_second']:.0f} steps/s", flush=True)
    return report(out)


def report(out: Path) -> str:
    """Medians and ratios as Markdown, also written beside the CSV."""
    rows = read(out)
    found: dict[str, Found] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        found[row["workload"]][row["side"]].setdefault(row["threads"], []).append(row)

    def best(name: str, side: str, key: str = "steps_per_second") -> float:
        """The median of `key`, at the number of threads that is best for the side."""
        return median_of(at_best(found[name], side), key)

    def figure(value: float, form: str = ",.0f", unit: str = "") -> str:
        return "-" if math.isnan(value) else format(value, form) + unit

    def ratios(name: str, side: str, peers: Sequence[str]) -> str:
        return " · ".join(figure(best(name, side) / best(name, peer), ".2f", "x") for peer in peers)

    lines = [
        [
            name, *(figure(best(name, side)) for side in (*PEERS, *OURS)),
            *(ratios(name, side, PEERS) for side in OURS),
            " / ".join(figure(best(name, side, "memory")) for side in (*PEERS, *OURS)),
        ]
        for name in found
    ]  # fmt: skip
    parts = [table(["steps/s", *PEERS, *OURS, "rlkit / SB3 · sbx", "rlkit bf16 / SB3 · sbx", "peak MiB"], lines)]
    if "rltools" in found[OVERHEAD]:
        ways = ", ".join(f"{side} {figure(best(OVERHEAD, side))}" for side in ("rltools", *PEERS, *OURS))
        parts.append(f"{OVERHEAD}, batches of 100, each side at its best thread count: {ways} steps/s; "
                     f"rlkit / RLtools (C++): {ratios(OVERHEAD, 'rlkit', ['rltools'])}.")  # fmt: skip
    if "rltools" in found[FIRST]:
        parts.append(f"{FIRST}: RLtools {figure(best(FIRST, 'rltools'))} steps/s.")
    compiled = [
        [f"{name}, {side}", *compilation(found[name], side), *(
            figure(best(name, f"{side}-{how}") * share(rows, side) if name == FIRST else math.nan, ".0%") for how in HOW
        )]
        for name in (FIRST, OVERHEAD) for side in OURS if f"{side}-compiled" in found[name]
    ]  # fmt: skip
    if compiled:
        header = [*HOW, "compiling, seconds; found in the cache", "won back after updates"]
        parts.append(
            table(["steps/s", *header, *(f"share of the matrix-product rate, {how}" for how in HOW)], compiled)
        )
    divided = [
        [f"{name}, {side}", *(f"{part:.0%}" for part in shares(found[name][f"{side}-split"]))]
        for name in SPLIT
        for side in OURS
        if f"{side}-split" in found[name]
    ]
    if divided:
        parts.append(table(["time of a step", *PARTS, "rest"], divided))
    about = rows[-1]
    counts = sorted(
        {len(group) for sides in found.values() for threads in sides.values() for group in threads.values()}
    )
    parts.append(
        f"Medians of {counts[0]}{f' to {counts[-1]}' if len(counts) > 1 else ''} runs; {THREADS} threads unless said "
        f"otherwise, on {about['cores']} cores of {about['processor']}; {about['versions']}"
    )
    text = "\n\n".join(parts) + "\n"
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def at_best(sides_found: Found, side: str) -> list[dict[str, str]]:
    """Runs of a side with the number of threads that is best for it."""
    return max(sides_found.get(side, {}).values(), key=median_of, default=[])


def median_of(runs: Sequence[Mapping[str, str]], key: str = "steps_per_second") -> float:
    return median(float(row[key]) for row in runs) if runs else math.nan


def compilation(sides_found: Found, side: str) -> list[str]:
    """Steps/s eager and compiled, seconds of compiling from nothing and from the cache, and updates after which the
    former are won back; for workloads of one update a step.
    """
    speeds = [median_of(at_best(sides_found, f"{side}-{how}")) for how in HOW]
    groups = [runs for name in (side, f"{side}-compiled") for runs in sides_found[name].values()]
    seconds = [float(row["compile_seconds"]) for runs in groups for row in runs]
    saved = 1 / speeds[0] - 1 / speeds[1]
    back = f"{max(seconds) / saved:,.0f}" if saved > 0 else "never"
    return [*(f"{speed:,.0f}" for speed in speeds), f"{max(seconds):.0f}; {min(seconds):.0f}", back]


def share(rows: Sequence[Mapping[str, str]], side: str) -> float:
    """Share of the matrix-product rate for each step a second, with one update a step."""
    precision = "bf16" if "bf16" in side else "float32"
    rates = [float(row[f"gflops_{precision}"]) for row in rows if float(row[f"gflops_{precision}"]) > 0]
    return MAIN.gflop() / median(rates) if rates else math.nan


def shares(groups: Mapping[str, list[dict[str, str]]]) -> list[float]:
    """Median share of the time that passes in each part, and what is left."""
    group = next(iter(groups.values()))
    parts = [median(float(row[part]) / float(row["seconds"]) for row in group) for part in PARTS]
    return [*parts, 1 - sum(parts)]


if __name__ == "__main__":
    if sys.argv[1] == "products":
        products(*sys.argv[2:])
    else:
        run_one(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
