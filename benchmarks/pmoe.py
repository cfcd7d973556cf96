"""PMOE's claims: learning and modes against SAC, PPO and other ways to train a router.

Every run is a process of its own with one thread, two at a time; all sides have the same hyperparameters but for what
their name says. The curve's area is the mean of the evaluations' mean returns over steps (deterministic policies, ten
episodes each), so it has the unit of a return.

Modes: after training, 100 episodes of the policy with its noise in `rlkit/ObstacleReach-v0`, which has two ways round
an obstacle. Reported are the share of episodes that reach the goal, and among these the share of the rarer side: 0.5 is
both ways equally often, 0 one way only.

Speed: seconds of an update of PMOE with four experts as a multiple of SAC's, in turns in one process each.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
from common import RESULTS, append, interval, machine, read, table

PACKAGES = ("rlkit-trainers", "torch", "gymnasium", "mujoco", "numpy")
OBSTACLES = "rlkit/ObstacleReach-v0"
SEEDS, EPISODES = 5, 100
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "SAC": ("sac", {}),
    "PMOE": ("pmoe", {}),
    "PMOE, apart at first": ("pmoe", {"expert_init_spread": 0.5}),
    "cross-entropy": ("pmoe", {"freq_loss": "ce"}),
    "all experts": ("pmoe", {"router_grad": "all"}),
    "exact sum": ("pmoe", {"router_grad": "exact", "entropy": "mixture"}),
    "score function": ("pmoe", {"router_grad": "score", "entropy": "mixture"}),
    "Gumbel-softmax": ("pmoe", {"router_grad": "gumbel", "entropy": "mixture"}),
    "blend": ("pmoe", {"router_grad": "blend"}),
    "PPO": ("pmoe_ppo", {"n_experts": 1}),
    "PMOE-PPO": ("pmoe_ppo", {"n_experts": 4}),
}
ON_POLICY = ("PPO", "PMOE-PPO")
TASKS: dict[str, dict[str, Any]] = {
    OBSTACLES: {"steps": 50_000, "on_policy": 200_000, "sides": tuple(SIDES), "learning_starts": 2_000},
    "HalfCheetah-v5": {"steps": 50_000, "on_policy": 200_000, "sides": ("SAC", "PMOE", *ON_POLICY)},
    "Hopper-v5": {"steps": 50_000, "on_policy": 200_000, "sides": ("SAC", "PMOE", *ON_POLICY)},
}
POINTS = 10


def agent_of(side: str, task: str, seed: int, compile: str) -> Any:
    import rlkit

    name, fields = SIDES[side]
    fields = {**fields, "seed": seed, "device": "cpu", "eval_episodes": 0}
    if name == "pmoe_ppo":
        return rlkit.PMOEPPO(task, normalize_obs=True, reward="normalize", compile="off", **fields)
    cls = rlkit.SAC if name == "sac" else rlkit.PMOE
    return cls(task, learning_starts=TASKS[task].get("learning_starts", 100), compile=compile, **fields)


def run_one(task: str, side: str, seed: int, steps: int, out: Path) -> None:
    """Train one agent, evaluating it on the way; append a row to `out`."""
    import gymnasium as gym
    import torch

    from rlkit.evaluate import evaluate

    torch.set_num_threads(1)
    agent, returns, began = agent_of(side, task, seed, "on" if steps > 20_000 else "off"), [], time.perf_counter()
    for _ in range(POINTS):
        agent.learn(steps // POINTS)
        result = evaluate(agent, lambda: gym.make(task), 10, seed=seed)
        assert result is not None
        returns.append(round(result.mean, 3))
    row: dict[str, Any] = {"task": task, "side": side, "seed": seed, "steps": steps}
    row |= {"returns": " ".join(map(str, returns)), "area": round(float(np.mean(returns)), 3), "final": returns[-1]}
    below, above = modes(agent, seed) if task == OBSTACLES else (-1, -1)
    append(
        out,
        [{**row, "below": below, "above": above, "seconds": round(time.perf_counter() - began), **machine(PACKAGES)}],
    )


def modes(agent: Any, seed: int) -> tuple[int, int]:
    """Of `EPISODES` noisy episodes, those that reached the goal on either side of the obstacle."""
    import gymnasium as gym

    env = gym.make(OBSTACLES)
    sides: list[int] = []
    for episode in range(EPISODES):
        obs, info = env.reset(seed=seed * EPISODES + episode)
        over = False
        while not over:
            obs, _, terminated, truncated, info = env.step(agent.predict(obs)[0])
            over = terminated or truncated
        sides += [info["side"]] * bool(info["is_success"])
    return sides.count(-1), sides.count(1)


def update_seconds(side: str) -> None:
    """Print the median seconds of 100 updates on HalfCheetah-v5 as JSON."""
    import torch

    torch.set_num_threads(1)
    agent = agent_of(side, "HalfCheetah-v5", 0, "off").learn(300)
    times = []
    for _ in range(100):
        batch = agent.batch()
        began = time.perf_counter()
        agent.update(batch)
        times.append(time.perf_counter() - began)
    print(json.dumps({"seconds": median(times)}))


def main(quick: bool = False) -> str:
    """Run what is missing, then write the figure and the table; returns the table."""
    name = "pmoe-quick" if quick else "pmoe"
    raw = RESULTS / f"{name}.csv"
    if quick:
        raw.unlink(missing_ok=True)
    done = {(row["task"], row["side"], int(row["seed"])) for row in read(raw)}
    jobs = [
        (task, side, seed, setting["on_policy" if side in ON_POLICY else "steps"] if not quick else 1_000)
        for seed in range(1 if quick else SEEDS)
        for task, setting in TASKS.items()
        for side in (setting["sides"] if not quick else ("SAC", "PMOE"))
        if (task, side, seed) not in done and (not quick or task == OBSTACLES)
    ]

    def start(job: tuple[Any, ...]) -> None:
        subprocess.run([sys.executable, __file__, *map(str, job), str(raw)], check=True)
        print(f"done: {job[0]} {job[1]} seed {job[2]}", flush=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(start, jobs))
    rows = read(raw)
    text = report(rows, speed(1 if quick else 5))
    (RESULTS / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    figure(rows, RESULTS / f"{name}.png")
    return text


def speed(repeats: int) -> str:
    """A sentence about the time of an update."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        for side in ("SAC", "PMOE", "all experts"):
            seconds[side].append(common.call(__file__, "update", side, threads=1)["seconds"])
    ratios = {side: median(a / b for a, b in zip(seconds[side], seconds["SAC"], strict=True)) for side in seconds}
    return (
        f"An update of PMOE with four experts takes {ratios['PMOE']:.2f} times as long as SAC's on HalfCheetah-v5; "
        f"where all experts are trained, {ratios['all experts']:.2f} times (medians of {repeats}, one thread, eager)."
    )


def report(rows: list[dict[str, str]], sentence: str) -> str:
    """Area, final return and modes by task and side."""
    found: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        found[row["task"], row["side"]].append(row)
    lines = []
    for (task, side), runs in sorted(
        found.items(), key=lambda item: (list(TASKS).index(item[0][0]), list(SIDES).index(item[0][1]))
    ):
        figures = [spread([float(run[key]) for run in runs]) for key in ("area", "final")]
        counts = np.array([[int(run["below"]), int(run["above"])] for run in runs], float)
        if task == OBSTACLES:
            reached = counts.sum(1)
            rarer = np.divide(counts.min(1), reached, out=np.zeros(len(runs)), where=reached > 0)
            figures += [f"{reached.mean() / EPISODES:.0%}", " ".join(f"{share:.2f}" for share in rarer)]
        else:
            figures += ["-", "-"]
        lines.append([task, side, f"{int(runs[0]['steps']):,}", str(len(runs)), *figures])
    header = [
        "task",
        "side",
        "steps",
        "seeds",
        "area",
        "final return",
        "reach the goal",
        "share of the rarer side, by seed",
    ]
    where = sorted(
        {f"{r['processor']}, {r['cores']} cores, 1 thread a run, two runs at a time; {r['versions']}" for r in rows}
    )
    return "\n\n".join([table(header, lines), sentence, *where])


def spread(values: list[float]) -> str:
    """Mean and 95 % interval."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return "{:.1f} [{:.1f}, {:.1f}]".format(*interval(values))


def figure(rows: list[dict[str, str]], path: Path) -> None:
    """Mean returns over seeds against steps, one panel a task and family."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted(
        {(row["task"], row["side"] in ON_POLICY) for row in rows}, key=lambda p: (p[1], list(TASKS).index(p[0]))
    )
    canvas, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.8), squeeze=False)
    for axis, (task, on_policy) in zip(axes[0], panels, strict=True):
        for side in SIDES:
            runs = [
                row for row in rows if row["task"] == task and row["side"] == side and (side in ON_POLICY) == on_policy
            ]
            if not runs:
                continue
            curves = np.array([[float(value) for value in run["returns"].split()] for run in runs])
            steps = np.arange(1, curves.shape[1] + 1) * int(runs[0]["steps"]) / curves.shape[1]
            mean, low, high = np.array([interval(column) for column in curves.T]).T
            (line,) = axis.plot(steps, mean, label=side)
            if not np.isnan(low).any() and side in ("SAC", "PMOE", *ON_POLICY):
                axis.fill_between(steps, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        axis.set(title=task, xlabel="environment steps", ylabel="return, 10 episodes")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=7)
    canvas.suptitle("mean over seeds, 95 % interval", fontsize=10)
    canvas.tight_layout()
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


if __name__ == "__main__":
    if sys.argv[1] == "update":
        update_seconds(sys.argv[2])
    else:
        task, side, seed, steps, out = sys.argv[1:]
        run_one(task, side, int(seed), int(steps), Path(out))
