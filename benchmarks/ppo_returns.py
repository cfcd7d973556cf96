"""Returns of PPO at equal environment steps: `pmoe_ppo` with one expert against Stable-Baselines3's PPO.

Both sides run the same hyperparameters on the same tasks and seeds, one PyTorch thread each, one run at a time, and are
evaluated by the same function: ten episodes with the same seeds, deterministic policies, after the same rollouts. The
hyperparameters are those of RL Baselines3 Zoo without its schedules and without state-dependent exploration
(CartPole-v1, Pendulum-v1), and Stable-Baselines3's defaults (Hopper-v5). Both act in [-1, 1]: in Stable-Baselines3
actions are in the environment's units, so there `gymnasium.wrappers.RescaleAction` makes them the same.

Questions: is rlkit's return at the last step within the 95 % Student interval of Stable-Baselines3's over seeds? And is
the mean difference of runs of one seed, which are evaluated from the same starts, different from 0?
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, append, interval, machine, read, table

PACKAGES = ("rlkit-trainers", "torch", "stable-baselines3", "gymnasium", "mujoco", "numpy")
# `every` is a multiple of n_envs times n_steps, so that no rollout is cut by an evaluation.
TASKS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {
        "seeds": 10, "steps": 25_600, "every": 2_560, "n_envs": 8,
        "fields": {
            "n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20, "learning_rate": 1e-3,
        },
    },
    "Pendulum-v1": {
        "seeds": 10, "steps": 81_920, "every": 8_192, "n_envs": 4,
        "fields": {"n_steps": 1024, "gamma": 0.9, "learning_rate": 1e-3},
    },
    "Hopper-v5": {"seeds": 5, "steps": 49_152, "every": 6_144, "n_envs": 1, "fields": {}},
}  # fmt: skip
LABELS = {"sb3": "Stable-Baselines3 PPO", "rlkit": "rlkit PMOEPPO, one expert"}


def maker(task: str) -> Callable[[], Any]:
    """Makes the task with actions in [-1, 1] where they are continuous."""
    import gymnasium as gym

    def make() -> gym.Env:
        env = gym.make(task)
        if isinstance(env.action_space, gym.spaces.Box):
            env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
        return env

    return make


def run_one(task: str, side: str, seed: int, steps: int, every: int, out: Path) -> None:
    """Train one agent, evaluating every `every` steps; append its rows to `out`."""
    import torch

    import rlkit
    from rlkit.evaluate import evaluate

    torch.set_num_threads(1)
    setting, make = TASKS[task], maker(task)
    agent: Any
    if side == "rlkit":
        envs = [make] * setting["n_envs"]
        agent = rlkit.PMOEPPO(
            envs, n_experts=1, seed=seed, device="cpu", compile="off", eval_episodes=0, **setting["fields"]
        )
    else:
        from stable_baselines3 import PPO
        from stable_baselines3.common.env_util import make_vec_env

        envs = make_vec_env(make, setting["n_envs"], seed=seed)
        agent = PPO("MlpPolicy", envs, seed=seed, device="cpu", **setting["fields"])
    rows: list[dict[str, Any]] = []
    where, spent = machine(PACKAGES), 0.0
    for step in range(0, steps + 1, every):
        if step:
            began = time.perf_counter()
            agent.learn(every, **({} if side == "rlkit" else {"reset_num_timesteps": False}))
            spent += time.perf_counter() - began
        done = agent.clock if side == "rlkit" else agent.num_timesteps
        assert done == step, f"{side} took {done} steps, not {step}"
        result = evaluate(agent, make, 10, seed=seed)
        assert result is not None
        row = {"task": task, "side": side, "seed": seed, "step": step, "mean_return": round(result.mean, 3)}
        row |= {"returns": " ".join(f"{r:.2f}" for r in result.returns), "training_seconds": round(spent, 1)}
        rows.append({**row, "threads": 1, **where})
    append(out, rows)


def main(quick: bool = False) -> str:
    """Run what is missing, then write the figure and the table; returns the table."""
    name = "ppo-returns-quick" if quick else "ppo-returns"
    raw = RESULTS / f"{name}.csv"
    if quick:
        raw.unlink(missing_ok=True)
    tasks = {"CartPole-v1": {**TASKS["CartPole-v1"], "steps": 10_240}} if quick else TASKS
    done = {(r["task"], r["side"], int(r["seed"])) for r in read(raw)}
    for task, setting in tasks.items():
        for seed in range(1 if quick else setting["seeds"]):
            for side in LABELS:
                if (task, side, seed) not in done:
                    job = (task, side, seed, setting["steps"], setting["every"], raw)
                    subprocess.run([sys.executable, __file__, *map(str, job)], check=True)
                    print(f"{time.strftime('%H:%M:%S')} done: {task} {side} seed {seed}", flush=True)
    rows = read(raw)
    figure(rows, RESULTS / f"{name}.png")
    text = report(rows)
    (RESULTS / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    return text


def curves(rows: list[dict[str, str]]) -> dict[str, dict[str, dict[int, list[float]]]]:
    """task -> side -> step -> mean returns in the order of the seeds."""
    found: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        found[row["task"]][row["side"]][int(row["step"])].append(float(row["mean_return"]))
    return found


def report(rows: list[dict[str, str]]) -> str:
    """Final returns of both sides as a Markdown table."""
    lines = []
    for task, sides in curves(rows).items():
        last = max(step for side in sides.values() for step in side)
        theirs = interval(sides["sb3"][last])
        for side, label in LABELS.items():
            values = sides[side][last]
            mean, low, high = interval(values)
            text = f"{mean:.0f}" if np.isnan(low) else f"{mean:.0f} [{low:.0f}, {high:.0f}]"
            inside = "" if side == "sb3" else "n=1, no interval" if np.isnan(theirs[1]) else None
            if inside is None:
                inside = "yes" if theirs[1] <= mean <= theirs[2] else "above" if mean > theirs[2] else "below"
            pairs = interval([a - b for a, b in zip(values, sides["sb3"][last], strict=True)])
            less = "" if side == "sb3" or np.isnan(pairs[1]) else "{:.0f} [{:.0f}, {:.0f}]".format(*pairs)
            lines.append([task, f"{last:,}", label, str(len(values)), text, inside, less])
    header = [
        "task",
        "steps",
        "side",
        "seeds",
        "mean return [95 %]",
        "inside Stable-Baselines3's interval",
        "difference",
    ]
    where = {f"{r['processor']}, {r['cores']} cores, 1 thread a run; {r['versions']}" for r in rows}
    return table(header, lines) + "\n\n" + "\n".join(sorted(where))


def figure(rows: list[dict[str, str]], path: Path) -> None:
    """Mean and 95 % interval over seeds against environment steps, one panel a task."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    tasks = curves(rows)
    canvas, axes = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 3.4), squeeze=False)
    for axis, (task, sides) in zip(axes[0], tasks.items(), strict=True):
        for side, label in LABELS.items():
            steps = sorted(sides[side])
            mean, low, high = np.array([interval(sides[side][s]) for s in steps]).T
            (line,) = axis.plot(steps, mean, label=label)
            if not np.isnan(low).any():
                axis.fill_between(steps, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        seeds = min(len(values) for side in sides.values() for values in side.values())
        label = f"{task}, {seeds} seeds" if seeds > 1 else f"{task}, n=1, no interval"
        axis.set(title=label, xlabel="environment steps", ylabel="return, 10 episodes")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False)
    canvas.suptitle("mean over seeds, 95 % interval", fontsize=10)
    canvas.tight_layout()
    canvas.savefig(path, dpi=90)
    plt.close(canvas)


if __name__ == "__main__":
    task, side, seed, steps, every, out = sys.argv[1:]
    run_one(task, side, int(seed), int(steps), int(every), Path(out))
