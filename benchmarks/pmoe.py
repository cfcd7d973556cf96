"""PMOE's claims: learning and modes against SAC, PPO and other ways to train a router.

Every run is a process of its own with one thread, one at a time. All sides of a family (SAC's, PPO's) have the same
hyperparameters but for what their name says; networks and batches are small, so that five seeds fit into two hours.

Area: the mean over the run of ten evaluations' mean returns, so it has the unit of a return. Given are interquartile
means over seeds with 95 % bootstrap intervals (percentiles of 10,000 resamples of the seeds). Evaluations are of
deterministic policies (PMOE's takes the mean of the expert of the largest weight), five episodes each; in the bimodal
tasks, where those would be one episode five times, of the policies with their noise.

Bimodal tasks: `rlkit/TwoPeaks-v0`, a bandit with two best actions (once with SAC's own temperature, once "cool", with a
fixed one of 0.02), and `rlkit/ObstacleReach-v0`, with two ways round an obstacle. After training, many episodes of the
policy with its noise are counted: the share that succeeds (at a peak; in the goal), and the share of all that succeeds
on the rarer side. A policy holds both solutions where this is a fifth or more; 0.5 is both equally often, 0 one only.
All sides learn ObstacleReach with the reward module that pays for coming nearer to the goal
(`rlkit.envs.obstacles.approach`), and SAC's family by sums over five steps; without these none reaches the goal.
Returns are in the task's own reward. "Mixture entropy" tells how much of what the sums, the scores and Gumbel-softmax
gain is due to their entropy bonus, which is the mixture's, and how much to the way they train the router.

Speed: seconds of an update of PMOE with four experts as a multiple of SAC's, with SAC's default networks and batch, in
turns in a process each.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
from common import RESULTS, append, differences, interquartile, machine, read, runs_of, table

PACKAGES = ("rlkit-trainers", "torch", "gymnasium", "mujoco", "numpy")
OBSTACLES, CHEETAH, HOPPER = "rlkit/ObstacleReach-v0", "HalfCheetah-v5", "Hopper-v5"
PEAKS, COOL = "rlkit/TwoPeaks-v0", "rlkit/TwoPeaks-v0, cool"
SEEDS, POINTS = 5, 10
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "SAC": ("sac", {}),
    "PMOE": ("pmoe", {}),
    "PMOE, apart at first": ("pmoe", {"expert_init_spread": 1.0}),
    "PMOE, mixture entropy": ("pmoe", {"entropy": "mixture"}),
    "all experts": ("pmoe", {"router_grad": "all"}),
    "exact sum": ("pmoe", {"router_grad": "exact", "entropy": "mixture"}),
    "score function": ("pmoe", {"router_grad": "score", "entropy": "mixture"}),
    "Gumbel-softmax": ("pmoe", {"router_grad": "gumbel", "entropy": "mixture"}),
    "blend": ("pmoe", {"router_grad": "blend"}),
    "PPO": ("pmoe_ppo", {"n_experts": 1}),
    "PMOE-PPO": ("pmoe_ppo", {"n_experts": 4}),
}
ON_POLICY = ("PPO", "PMOE-PPO")
MAIN = ("SAC", "PMOE", "PMOE, apart at first", *ON_POLICY)
DRAWN = MAIN[:3]
"""Sides whose ways are drawn."""
BANDIT: dict[str, Any] = {
    "env": PEAKS, "steps": 3_000, "on_policy": 20_480, "net": (64, 64), "learning_starts": 500, "learning_rate": 1e-3,
    "episodes": 200, "counted": 1_000,
}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    PEAKS: BANDIT,
    COOL: {**BANDIT, "ent_coef": 0.02},
    OBSTACLES: {
        "steps": 30_000, "on_policy": 100_000, "net": (64, 64), "learning_starts": 2_000, "n_steps": 5,
        "reward": ("rlkit.envs.obstacles:approach", "scale=0.1"), "episodes": 10, "counted": 100,
    },
    CHEETAH: {"steps": 40_000, "on_policy": 60_000, "net": (128, 128), "learning_starts": 1_000},
    HOPPER: {"steps": 20_000, "on_policy": 60_000, "net": (128, 128), "learning_starts": 1_000},
}  # fmt: skip
BIMODAL = tuple(task for task, setting in TASKS.items() if "counted" in setting)
BOTH = 0.2
"""Least share of episodes on the rarer side of a policy that holds both solutions."""
PHASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (OBSTACLES, ("SAC", "PMOE", *ON_POLICY)),
    (HOPPER, ("SAC", "PMOE", *ON_POLICY)),
    (OBSTACLES, ("PMOE, apart at first",)),
    (CHEETAH, ("SAC", "PMOE", *ON_POLICY)),
    (OBSTACLES, tuple(side for side in SIDES if side not in (*MAIN, "PMOE, mixture entropy"))),
    (PEAKS, tuple(SIDES)),
    (COOL, tuple(side for side in SIDES if side not in ON_POLICY)),
)
"""A task and sides, in the order in which they run, each with all seeds."""


def agent_of(side: str, task: str, seed: int, compile: str) -> Any:
    import rlkit

    name, fields = SIDES[side]
    setting = TASKS[task]
    env = setting.get("env", task)
    fields = {**fields, "seed": seed, "device": "cpu", "eval_episodes": 0}
    if name == "pmoe_ppo":
        reward = (*setting.get("reward", ())[:1], "normalize")
        fields |= {"n_envs": 4, "n_steps": 512, "normalize_obs": True, "reward": reward, "compile": compile}
        return rlkit.PMOEPPO(env, **fields)
    shared = ("learning_starts", "n_steps", "reward", "learning_rate", "ent_coef")
    fields |= {key: setting[key] for key in shared if key in setting}
    fields |= {"policy_kwargs": {"net_arch": setting["net"]}, "batch_size": 128, "compile": compile}
    return (rlkit.SAC if name == "sac" else rlkit.PMOE)(env, **fields)


def run_one(task: str, side: str, seed: int, steps: int, out: Path) -> None:
    """Train one agent, evaluating it on the way; append a row to `out`, and of some sides their ways beside it."""
    import gymnasium as gym
    import torch

    from rlkit.evaluate import evaluate

    torch.set_num_threads(1)
    agent = agent_of(side, task, seed, "on" if steps > 10_000 else "off")
    noisy, env, episodes = task in BIMODAL, TASKS[task].get("env", task), TASKS[task].get("episodes", 5)
    returns, spent = [], 0.0
    for _ in range(POINTS):
        began = time.perf_counter()
        agent.learn(steps // POINTS)
        spent += time.perf_counter() - began
        result = evaluate(agent, lambda: gym.make(env), episodes, seed=seed, deterministic=not noisy)
        assert result is not None
        returns.append(round(result.mean, 3))
    row: dict[str, Any] = {"task": task, "side": side, "seed": seed, "steps": steps}
    row |= {"returns": " ".join(map(str, returns)), "area": round(float(np.mean(returns)), 3), "final": returns[-1]}
    row["below"], row["above"] = modes(agent, task, seed) if noisy else (-1, -1)
    if task == OBSTACLES and side in DRAWN:
        append(out.with_name(out.name.replace("pmoe", "pmoe-trajectories")), ways(agent, side, seed))
    append(out, [{**row, "training_seconds": round(spent, 1), **machine(PACKAGES)}])


def modes(agent: Any, task: str, seed: int) -> tuple[int, int]:
    """Of a bimodal task's noisy episodes, those that succeeded on either side."""
    import gymnasium as gym

    from rlkit.evaluate import evaluate

    episodes = TASKS[task]["counted"]
    sides = [0] * episodes

    def watch(index: int, env: gym.Env, obs: Any, action: Any) -> None:
        if action is None:
            sides[index] = env.unwrapped.side

    env = TASKS[task].get("env", task)
    result = evaluate(
        agent, lambda: gym.make(env), episodes, seed=seed, deterministic=False, parallel=episodes, watch=watch
    )
    assert result is not None
    reached = [side for side, success in zip(sides, result.successes, strict=True) if success]
    return reached.count(-1), reached.count(1)


def ways(agent: Any, side: str, seed: int, episodes: int = 10) -> list[dict[str, Any]]:
    """Places of noisy episodes at every second step, and which expert acted there (0 where there is only one)."""
    import gymnasium as gym
    import torch

    import rlkit
    from rlkit.trainers.pmoe import draw, pick

    env, generator = gym.make(OBSTACLES), torch.Generator().manual_seed(seed)
    rows = []
    for episode in range(episodes):
        obs, info = env.reset(seed=episode)
        places, experts, over = [], [], False
        while not over:
            if isinstance(agent, rlkit.PMOE):  # as `predict` does, which does not tell the expert
                with torch.no_grad():
                    mean, log_std, log_weights = agent.actor(agent.normalizer(torch.from_numpy(obs)[None]))
                    expert = draw(log_weights, torch.rand(1, generator=generator))
                    noise = torch.randn(1, 2, generator=generator)
                    action = torch.tanh(pick(mean, expert) + pick(log_std, expert).exp() * noise)[0].numpy()
                experts.append(int(expert))
            else:
                action, _ = agent.predict(obs)
                experts.append(0)
            places.append(env.unwrapped.position)
            obs, _, terminated, truncated, info = env.step(action)
            over = terminated or truncated
        x, y = np.round(np.array([*places[::2], env.unwrapped.position]), 2).T
        row = {"side": side, "seed": seed, "episode": episode, "passed": info["side"], "reached": info["is_success"]}
        rows.append(
            {**row, **{key: " ".join(map(str, v)) for key, v in (("x", x), ("y", y), ("expert", experts[::2]))}}
        )
    return rows


def update_seconds(side: str, compile: str) -> None:
    """Print the median seconds of 100 updates on HalfCheetah-v5 with SAC's default networks and batch, as JSON."""
    import torch

    import rlkit

    torch.set_num_threads(1)
    name, fields = SIDES[side]
    cls = rlkit.SAC if name == "sac" else rlkit.PMOE
    agent = cls(CHEETAH, seed=0, device="cpu", eval_episodes=0, compile=compile, learning_starts=290, **fields)
    agent.learn(300)
    times = []
    for _ in range(100):
        batch = agent.batch()
        began = time.perf_counter()
        agent.update(batch)
        times.append(time.perf_counter() - began)
    print(json.dumps({"seconds": median(times)}))


def planned() -> list[tuple[str, str, int, int]]:
    """(task, side, seed, steps) of all runs in their order."""
    return [
        (task, side, seed, TASKS[task]["on_policy" if side in ON_POLICY else "steps"])
        for task, sides in PHASES
        for seed in range(SEEDS)
        for side in sides
    ]


def main(quick: bool = False) -> str:
    """Run what is missing, then write the figures and the table; returns the table."""
    ending = "-quick" if quick else ""
    raw, drawn, clocked = (RESULTS / f"pmoe{what}{ending}.csv" for what in ("", "-trajectories", "-speed"))
    if quick:
        for path in (raw, drawn, clocked):
            path.unlink(missing_ok=True)
    done = {(row["task"], row["side"], int(row["seed"])) for row in read(raw)}
    jobs = planned()
    if quick:
        jobs = [(OBSTACLES, side, 0, 1_000) for side in ("SAC", "PMOE")]
    for job in jobs:
        if job[:3] not in done:
            subprocess.run([sys.executable, __file__, *map(str, job), str(raw)], check=True)
            print(f"{time.strftime('%H:%M:%S')} done: {job[0]} {job[1]} seed {job[2]}", flush=True)
    if not clocked.exists():
        append(clocked, speed(1 if quick else 3, ("off",) if quick else ("off", "on")))
    rows = read(raw)
    text = report(rows, read(clocked), drawn)
    raw.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    figure(rows, raw.with_suffix(".png"))
    draw_ways(read(drawn), drawn.with_suffix(".png"))
    return text


def speed(repeats: int, compiled: Sequence[str]) -> list[dict[str, Any]]:
    """Seconds of an update of three sides in turns."""
    return [
        {"side": side, "compile": compile, "repeat": repeat}
        | common.call(__file__, "update", side, compile, threads=1)
        | machine(PACKAGES)
        for compile in compiled
        for repeat in range(repeats)
        for side in ("SAC", "PMOE", "all experts")
    ]


def rarer(run: dict[str, str]) -> float:
    """Share of a run's counted episodes that succeeded on the rarer side."""
    return min(int(run["below"]), int(run["above"])) / int(TASKS[run["task"]]["counted"])


def report(rows: list[dict[str, str]], clocked: list[dict[str, str]], drawn: Path) -> str:
    """Area, final return and modes by task and side, and what they say about the claims."""
    found = runs_of(rows, TASKS, SIDES)
    lines = []
    for (task, side), runs in found.items():
        figures = [shown(interquartile([float(run[key]) for run in runs])) for key in ("area", "final")]
        if task in BIMODAL:
            reached = np.mean([int(run["below"]) + int(run["above"]) for run in runs]) / TASKS[task]["counted"]
            figures += [f"{reached:.0%}", " ".join(f"{rarer(run):.2f}" for run in runs)]
        else:
            figures += ["", ""]
        lines.append([task, side, f"{int(runs[0]['steps']):,}", str(len(runs)), *figures])
    header = ["task", "side", "steps", "seeds", "area", "final return", "succeed", "on the rarer side"]
    about = (
        "Interquartile means over seeds with 95 % bootstrap intervals; the share of all episodes that succeed on the "
        f"rarer side is given seed by seed. From {BOTH} on, a policy counts as one that holds both solutions."
    )
    ways = (
        f"![Ways in ObstacleReach, coloured by the expert that acted]({drawn.stem}.png)\n\nTen episodes a "
        "seed, coloured by the expert that acted. " + used(read(drawn))
    )
    where = sorted({f"{r['processor']}, {r['cores']} cores, 1 thread a run; {r['versions']}" for r in rows})
    if len(rows) < len(planned()):
        about += (
            f" Unfinished: {len(rows)} of {len(planned())} runs; only what has all {SEEDS} seeds is compared below."
        )
    return "\n\n".join([table(header, lines), about, claims(found), timing(clocked), ways, *where])


def claims(found: dict[tuple[str, str], list[dict[str, str]]]) -> str:
    """Does the area of PMOE lie above its baseline's, and does it hold both solutions where the baseline does not?"""
    lines = []
    for task in TASKS:
        for side in SIDES:
            baseline = "PPO" if side in ON_POLICY else "SAC"
            if side == baseline or (task, side) not in found or (task, baseline) not in found:
                continue
            a, b = ([float(run["area"]) for run in found[task, name]] for name in (side, baseline))
            if min(len(a), len(b)) < SEEDS:
                continue
            mean, low, high = differences(a, b)
            verdict = "more" if low > 0 else "less" if high < 0 else "no difference shows"
            lines.append(
                f"- {task}: the area of {side} less that of {baseline} is {shown((mean, low, high))}: {verdict}."
            )
    for task in BIMODAL:
        counts = [
            f"{side} {sum(rarer(run) >= BOTH for run in found[task, side])} of {len(found[task, side])}"
            for side in SIDES
            if (task, side) in found
        ]
        if counts:
            lines.append(f"- {task}: runs that hold both solutions: {', '.join(counts)}.")
    return "\n".join(lines)


def used(drawn: list[dict[str, str]]) -> str:
    """How evenly the experts act in the episodes that are drawn."""
    sentences = []
    for side in [side for side in DRAWN if side != "SAC"]:
        steps: dict[str, Counter[str]] = defaultdict(Counter)
        for row in drawn:
            if row["side"] == side:
                steps[row["seed"]].update(row["expert"].split())
        shares = [max(counts.values()) / counts.total() for _, counts in sorted(steps.items())]
        if shares:
            sentences.append(f"of {side}: {' '.join(f'{share:.2f}' for share in shares)}")
    return "Share of the steps of the most used expert, seed by seed, " + "; ".join(sentences) + "."


def timing(clocked: list[dict[str, str]]) -> str:
    """A sentence about the time of an update."""
    sentences = []
    for compile, word in (("off", "eager"), ("on", "compiled")):
        seconds: dict[str, list[float]] = defaultdict(list)
        for row in clocked:
            if row["compile"] == compile:
                seconds[row["side"]].append(float(row["seconds"]))
        if not seconds:
            continue
        ratio = {side: median(a / b for a, b in zip(seconds[side], seconds["SAC"], strict=True)) for side in seconds}
        sentences.append(
            f"{ratio['PMOE']:.2f} times as long as SAC's, or {ratio['all experts']:.2f} times where all experts are "
            f"trained ({word}; SAC's: {1000 * median(seconds['SAC']):.1f} ms)"
        )
    return (
        "An update of PMOE with four experts takes " + "; ".join(sentences) + ". HalfCheetah-v5, two layers of 256, "
        f"batches of 256, one thread, medians of {len(clocked) // 3 // len(sentences)}."
    )


def shown(values: tuple[float, float, float]) -> str:
    mean, low, high = values
    digits = 2 if max(map(abs, values)) < 10 else 1
    interval = "" if np.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{mean:.{digits}f}{interval}"


def figure(rows: list[dict[str, str]], path: Path) -> None:
    """Interquartile means of returns over seeds against steps: a column a task, a row SAC's family and PPO's."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    found = runs_of(rows, TASKS, SIDES)
    tasks = [task for task in TASKS if any(key[0] == task for key in found)]
    families = [f for f in (False, True) if any((side in ON_POLICY) == f for _, side in found)]
    size = (3.6 * len(tasks), 3.1 * len(families))
    canvas, axes = plt.subplots(len(families), len(tasks), figsize=size, squeeze=False)
    for row, on_policy in zip(axes, families, strict=True):
        for axis, task in zip(row, tasks, strict=True):
            for side in [s for s in SIDES if (task, s) in found and (s in ON_POLICY) == on_policy]:
                runs = found[task, side]
                curves = np.array([[float(value) for value in run["returns"].split()] for run in runs])
                steps = np.arange(1, curves.shape[1] + 1) * int(runs[0]["steps"]) / curves.shape[1] / 1000
                mean, low, high = np.array([interquartile(column) for column in curves.T]).T
                colour = f"C{list(SIDES).index(side)}"  # the same in all panels
                axis.plot(steps, mean, label=side, color=colour, linewidth=1.6 if side in MAIN else 0.8)
                if not np.isnan(low).any() and side in MAIN:
                    axis.fill_between(steps, low, high, alpha=0.2, color=colour, linewidth=0)
            axis.set_title(task, fontsize=9)
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(frameon=False, fontsize=6)
            else:
                axis.set_visible(False)
        row[0].set_ylabel("return")
    for axis in axes[-1]:
        axis.set_xlabel("thousand environment steps")
    seeds = " to ".join(map(str, sorted({f([len(runs) for runs in found.values()]) for f in (min, max)})))
    canvas.suptitle(f"interquartile mean over {seeds} seeds, 95 % bootstrap interval", fontsize=9)
    canvas.tight_layout()
    canvas.savefig(path, dpi=90)
    plt.close(canvas)


def draw_ways(rows: list[dict[str, str]], path: Path) -> None:
    """Noisy episodes in the arena, a row a side and a column a seed; colours are the experts that acted."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.collections import LineCollection

    from rlkit.envs.obstacles import ARENA, GOAL, GOAL_RADIUS, OBSTACLES, RADIUS

    sides = [side for side in DRAWN if any(row["side"] == side for row in rows)]
    seeds = sorted({int(row["seed"]) for row in rows})
    size = (1.9 * len(seeds) + 0.3, 1.95 * len(sides) + 0.3)
    canvas, axes = plt.subplots(len(sides), len(seeds), figsize=size, squeeze=False)
    colours = np.array(["tab:blue", "tab:orange", "tab:green", "tab:red"])
    for number, (line, side) in enumerate(zip(axes, sides, strict=True)):
        for axis, seed in zip(line, seeds, strict=True):
            for centre in OBSTACLES:
                axis.add_patch(plt.Circle(centre, RADIUS, color="0.6"))
            axis.add_patch(plt.Circle(GOAL, GOAL_RADIUS, color="0.85"))
            for row in rows:
                if row["side"] == side and int(row["seed"]) == seed:
                    places = np.array([row["x"].split(), row["y"].split()], float).T
                    segments = np.stack([places[:-1], places[1:]], axis=1)
                    experts = np.array(row["expert"].split(), int)
                    lines = LineCollection(list(segments), colors=list(colours[experts]), linewidths=0.9)
                    axis.add_collection(lines)
            axis.set(xlim=(-ARENA, ARENA), ylim=(-ARENA, ARENA), aspect="equal", xticks=[], yticks=[])
            if number == 0:
                axis.set_title(f"seed {seed}", fontsize=8)
        line[0].set_ylabel(side, fontsize=8)
    canvas.tight_layout(pad=0.4)
    canvas.savefig(path, dpi=80)
    plt.close(canvas)


if __name__ == "__main__":
    if sys.argv[1] == "update":
        update_seconds(*sys.argv[2:])
    else:
        task, side, seed, steps, out = sys.argv[1:]
        run_one(task, side, int(seed), int(steps), Path(out))
