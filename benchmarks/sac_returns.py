"""Returns of SAC at equal environment steps: rlkit against Stable-Baselines3.

Both sides run Stable-Baselines3's default hyperparameters (Pendulum-v1: learning rate 1e-3, as in RL Baselines3 Zoo) on
the same tasks and seeds, one PyTorch thread each, two runs at a time, and are evaluated by the same function: ten
episodes with the same seeds, deterministic policies. A run that is in the CSV already is not repeated.

Question: is rlkit's return at the last step within the 95 % Student interval of Stable-Baselines3's over seeds? And is
it where matrix products are bf16 and the update is compiled (side `rlkit-bf16-compiled`, on the MuJoCo tasks)?
"""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, append, interval, machine, read, table

PACKAGES = ("rlkit-trainers", "torch", "stable-baselines3", "gymnasium", "mujoco", "numpy")
TASKS: dict[str, dict[str, Any]] = {
    "Pendulum-v1": {"steps": 10_000, "every": 1_000, "fields": {"learning_rate": 1e-3}},
    "HalfCheetah-v5": {"steps": 50_000, "every": 5_000, "fields": {}},
    "Hopper-v5": {"steps": 50_000, "every": 5_000, "fields": {}},
}
SEEDS = 3
SIDES = {
    "rlkit": {"compile": "off"},
    "sb3": {},
    "rlkit-bf16-compiled": {"compile": "on", "precision": "bf16"},
}
LABELS = {"sb3": "Stable-Baselines3 SAC", "rlkit": "rlkit SAC", "rlkit-bf16-compiled": "rlkit SAC, bf16, compiled"}


def run_one(task: str, side: str, seed: int, steps: int, every: int, out: Path) -> None:
    """Train one agent, evaluating every `every` steps; append its rows to `out`."""
    import gymnasium as gym
    import torch

    import rlkit
    from rlkit.evaluate import evaluate

    torch.set_num_threads(1)
    fields = TASKS[task]["fields"]
    rows: list[dict[str, Any]] = []
    where = machine(PACKAGES)

    def record(agent: Any, step: int) -> None:
        result = evaluate(agent, lambda: gym.make(task), 10, seed=seed)
        assert result is not None
        row = {"task": task, "side": side, "seed": seed, "step": step, "mean_return": round(result.mean, 3)}
        rows.append({**row, "returns": " ".join(f"{r:.2f}" for r in result.returns), "threads": 1, **where})

    if side != "sb3":
        agent = rlkit.SAC(task, seed=seed, device="cpu", **fields, **SIDES[side])
        record(agent, 0)
        for step in range(every, steps + 1, every):
            agent.learn(every)
            record(agent, step)
    else:
        from stable_baselines3 import SAC
        from stable_baselines3.common.callbacks import BaseCallback

        class Record(BaseCallback):
            def _on_step(self) -> bool:
                # The callback runs before the updates of its step, so the evaluation is one update younger.
                if self.num_timesteps % every == 0:
                    record(self.model, self.num_timesteps)
                return True

        model = SAC("MlpPolicy", task, seed=seed, device="cpu", **fields)
        record(model, 0)
        model.learn(steps, callback=Record())
    append(out, rows)


def main(quick: bool = False) -> str:
    """Run what is missing, then write the figure and the table; returns the table."""
    name = "sac-returns-quick" if quick else "sac-returns"
    raw = RESULTS / f"{name}.csv"
    if quick:
        raw.unlink(missing_ok=True)
    tasks = {"Pendulum-v1": {**TASKS["Pendulum-v1"], "steps": 1_500, "every": 500}} if quick else TASKS
    done = {(r["task"], r["side"], int(r["seed"])) for r in read(raw)}
    jobs = [
        (task, side, seed, setting["steps"], setting["every"])
        for task, setting in tasks.items()
        for seed in range(1 if quick else SEEDS)
        for side in SIDES
        if (task, side, seed) not in done and (side in ("rlkit", "sb3") or task != "Pendulum-v1")
    ]

    def start(job: tuple[Any, ...]) -> None:
        command = [sys.executable, __file__, *map(str, job), str(raw)]
        subprocess.run(command, check=True)
        print(f"done: {job[0]} {job[1]} seed {job[2]}", flush=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(start, jobs))
    rows = read(raw)
    figure(rows, RESULTS / f"{name}.png")
    text = report(rows)
    (RESULTS / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    return text


def curves(rows: list[dict[str, str]]) -> dict[str, dict[str, dict[int, list[float]]]]:
    """task -> side -> step -> mean returns of the seeds."""
    found: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        found[row["task"]][row["side"]][int(row["step"])].append(float(row["mean_return"]))
    return found


def report(rows: list[dict[str, str]]) -> str:
    """Final returns of both sides as a Markdown table."""
    last = {task: max(sides["sb3"]) for task, sides in curves(rows).items()}
    lines = []
    for task, sides in curves(rows).items():
        theirs = sides["sb3"][last[task]]
        _, low, high = interval(theirs)
        for side in SIDES:
            values = sides.get(side, {}).get(last[task])
            if not values:
                continue
            mean = interval(values)[0]
            inside = (
                "-"
                if side == "sb3"
                else "n=1, no interval"
                if len(theirs) < 2
                else "yes"
                if low <= mean <= high
                else "no"
            )
            text = f"{mean:.0f}" if len(values) < 2 else "{:.0f} [{:.0f}, {:.0f}]".format(*interval(values))
            lines.append([task, f"{last[task]:,}", LABELS[side], str(len(values)), text, inside])
    header = ["task", "steps", "side", "seeds", "mean return [95 %]", "inside Stable-Baselines3's interval"]
    where = {f"{r['processor']}, {r['cores']} cores, 1 thread a run, two runs at a time; {r['versions']}" for r in rows}
    return table(header, lines) + "\n\n" + "\n".join(sorted(where))


def figure(rows: list[dict[str, str]], path: Path) -> None:
    """Mean and 95 % interval over seeds against environment steps, one panel a task."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    tasks = curves(rows)
    canvas, axes = plt.subplots(1, len(tasks), figsize=(4.6 * len(tasks), 3.6), squeeze=False)
    for axis, (task, sides) in zip(axes[0], tasks.items(), strict=True):
        for side, label in LABELS.items():
            if side not in sides:
                continue
            steps = sorted(sides[side])
            mean, low, high = np.array([interval(sides[side][s]) for s in steps]).T
            (line,) = axis.plot(steps, mean, label=label)
            if not np.isnan(low).any():
                axis.fill_between(steps, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        seeds = min(len(values) for side in sides.values() for values in side.values())
        label = f"{task}, {seeds} seeds" if seeds > 1 else f"{task}, n=1, no interval"
        axis.set(title=label, xlabel="environment steps", ylabel="return, 10 episodes")
        axis.grid(alpha=0.3)
    max(axes[0], key=lambda axis: len(axis.lines)).legend(frameon=False)  # the panel with all sides
    canvas.suptitle("mean over seeds, 95 % interval", fontsize=10)
    canvas.tight_layout()
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


if __name__ == "__main__":
    task, side, seed, steps, every, out = sys.argv[1:]
    run_one(task, side, int(seed), int(steps), int(every), Path(out))
