"""ARSQ's claims: choices that see each other, against dimensions valued one by one; from poor data, and in MuJoCo.

Coordination: tasks in which the dimensions of an action have to fit together (`rlkit.envs.coordination`), learned from
recordings of mixed quality. Sides are ARSQ; the same blind, no choice seeing any other (with one level of bins this is
the same as a level's choices not seeing each other); CQN, which values dimensions one by one, with terminal states and
a support from the data; and behaviour cloning, ARSQ without its consistency. Bandits score the mean reward of 200
actions of the policy with its noise, so a policy that cannot choose has 0.5; the point of `rlkit/TwinThrust-v0` scores
the mean return of 30 deterministic episodes.

MuJoCo: the suite trains SAC, records the episodes in its replay buffer (from random to mediocre), and lets ARSQ and CQN
learn from them, first offline, then online. Both have the same networks and batches. Scores are mean returns of
five deterministic episodes.

Given are interquartile means over seeds with 95 % bootstrap intervals. Every run is a process with one thread, one run
at a time.

Speed: an update and one action of ARSQ against the naive evaluation, in which every choice's input is concatenated with
the state and goes through the heads of all choices, all of it again for each choice of an action; medians of repeats in
turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
from common import RESULTS, append, differences, interquartile, machine, ratio, read, runs_of, table

PACKAGES = ("rlkit-trainers", "torch", "gymnasium", "mujoco", "minari", "numpy")
RAW = RESULTS / "raw" / "arsq"
PARITY, THRUST = "rlkit/ParityBandit-v0", "rlkit/TwinThrust-v0"
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "ARSQ": ("arsq", {}),
    "ARSQ, blind": ("arsq", {"conditioning": "none"}),
    "CQN": ("cqn", {}),
    "cloning": ("arsq", {"td_coef": 0.0, "bc_coef": 1.0, "demo_fraction": 1.0}),
}
SMALL: dict[str, Any] = {"batch_size": 128, "learning_rate": 1e-3, "policy_kwargs": {"net_arch": (64, 64)}}
BANDIT: dict[str, Any] = {
    **SMALL, "env": PARITY, "levels": 1, "bins": 2, "temperature": 0.1, "bc_coef": 0.0, "offline_steps": "all",
    "learning_rate": 3e-3,
}  # fmt: skip
POINT: dict[str, Any] = {**SMALL, "env": THRUST, "gamma": 0.95, "bc_coef": 0.1, "levels": 1, "bins": 15}
MUJOCO: dict[str, Any] = {
    "batch_size": 128, "policy_kwargs": {"net_arch": (128, 128)}, "offline_steps": 5_000, "learning_starts": 0,
}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "matrix game": {"data": "matrix", "fields": BANDIT, "steps": 1_000},
    "parity, 2 dimensions": {"data": 2, "fields": BANDIT, "steps": 1_000},
    "parity, 3 dimensions": {"data": 3, "fields": BANDIT, "steps": 1_000},
    "parity, 4 dimensions": {"data": 4, "fields": BANDIT, "steps": 1_000},
    "TwinThrust, offline": {"data": "thrust", "fields": {**POINT, "offline_steps": "all"}, "steps": 3_000},
    "TwinThrust, to online": {"data": "thrust", "fields": {**POINT, "offline_steps": 1_500}, "steps": 3_000},
    "Hopper-v5, to online": {"sac": "Hopper-v5", "fields": MUJOCO, "steps": 15_000},
    "HalfCheetah-v5, to online": {"sac": "HalfCheetah-v5", "fields": MUJOCO, "steps": 15_000},
}
SEEDS, POINTS, SAC_STEPS = 5, 5, 60_000
COMPARED = ("ARSQ", "CQN")
"""Sides in MuJoCo."""
FIELDS_OF: dict[str, dict[str, Any]] = {
    "Hopper-v5": {"arsq": {"preset": "hopper-medium-replay"}, "cqn": {"levels": 2, "bins": 7}},
    "HalfCheetah-v5": {"arsq": {"preset": "halfcheetah-medium-replay"}, "cqn": {"levels": 2, "bins": 7}},
}
"""ARSQ's released settings for the kind of data (2 x 7 and 1 x 41 bins), and CQN from coarse to fine in 2 x 7: with a
distribution for each of 41 bins in one level a run took half an hour and more."""


def sides_of(task: str) -> tuple[str, ...]:
    if "sac" in TASKS[task]:
        return COMPARED
    return tuple(SIDES) if TASKS[task]["data"] == "thrust" else ("ARSQ", "ARSQ, blind", "CQN")


def data_of(task: str, seed: int) -> Any:
    """Recorded transitions, drawn anew for every seed but for MuJoCo's."""
    from rlkit.envs.coordination import parity_data, twin_thrust_data

    kind = TASKS[task].get("data")
    if kind == "matrix":
        return matrix_game()
    if kind == "thrust":
        return twin_thrust_data(seed=seed)
    if isinstance(kind, int):
        return parity_data(kind, seed=seed)
    return recorded(TASKS[task]["sac"])


def matrix_game() -> dict[str, Any]:
    """Two dimensions of two actions: r = 1, -1, 0.1, -1 of (0,0), (0,1), (1,0), (1,1) in 10, 40, 40, 10 % of 100 rows;
    dimension by dimension (1,0) looks best.
    """
    rows = np.array([(0, 0, 1.0)] * 10 + [(0, 1, -1.0)] * 40 + [(1, 0, 0.1)] * 40 + [(1, 1, -1.0)] * 10)
    obs, ends = np.zeros((len(rows), 1), np.float32), np.ones(len(rows), bool)
    return {
        "observations": obs, "next_observations": obs, "actions": (rows[:, :2] - 0.5).astype(np.float32),
        "rewards": rows[:, 2], "terminals": ends, "timeouts": ~ends,
    }  # fmt: skip


def recorded(env: str) -> str:
    """The replay buffer of an SAC run as a Minari dataset, made by rlkit's commands where it is not there."""
    name = f"{env.rpartition('-v')[0].lower()}/replay-v0"
    os.environ["MINARI_DATASETS_PATH"] = str(RAW / "minari")
    if not (RAW / "minari" / name).is_dir():
        run = RAW / f"sac-{env}"
        RAW.mkdir(parents=True, exist_ok=True)
        rlkit = [sys.executable, "-m", "rlkit"]
        if not (run / "config.yaml").exists():
            options = [
                "--learning_starts",
                "5000",
                "--seed",
                "0",
                "--threads",
                "1",
                "--device",
                "cpu",
                "--compile",
                "on",
            ]
            command = ["train", "sac", "--env", env, "--steps", str(SAC_STEPS), "--eval_every", "20000", *options]
            subprocess.run([*rlkit, *command, "--tensorboard", "false", "--out", str(run)], check=True, cwd=RAW)
        else:
            subprocess.run([*rlkit, "resume", str(run)], check=True, cwd=RAW)
        subprocess.run([*rlkit, "data", "make", f"replay:{run}", "--out", name], check=True, cwd=RAW)
    return f"minari:{name}"


def run_one(task: str, side: str, seed: int, steps: int, out: Path) -> None:
    """Train one agent, evaluating it on the way; append a row to `out`."""
    import torch

    import rlkit

    torch.set_num_threads(1)
    name, changes = SIDES[side]
    fields = dict(TASKS[task]["fields"])
    data = data_of(task, seed)
    env = TASKS[task].get("sac") or fields.pop("env")
    bandit = env == PARITY
    if bandit:
        fields["env_kwargs"] = {"dimensions": data["actions"].shape[1]}
    fields |= FIELDS_OF.get(env, {}).get(name, {})
    fields |= changes
    if name == "arsq":
        fields["zero_action"] = not bandit
    else:
        fields.pop("temperature", None)
        fields["bc_coef"] = fields.get("bc_coef", 1.0)
    agent = getattr(rlkit, name.upper())(
        env, data=data, seed=seed, device="cpu", compile="on" if steps > 10_000 else "off", eval_episodes=0, **fields
    )
    scores, spent = [], 0.0
    for _ in range(POINTS):
        began = time.perf_counter()
        agent.learn(steps // POINTS)
        spent += time.perf_counter() - began
        scores.append(round(score(agent, bandit, 5 if "sac" in TASKS[task] else 30, seed), 3))
    row: dict[str, Any] = {
        "task": task,
        "side": side,
        "seed": seed,
        "steps": steps,
        "scores": " ".join(map(str, scores)),
    }
    row |= {"area": round(float(np.mean(scores)), 3), "final": scores[-1], "training_seconds": round(spent, 1)}
    if "sac" in TASKS[task]:
        found = agent.data
        row["data"] = f"{len(found):,} transitions, mean return {mean_return(found):.0f}"
    else:
        row["data"] = ""
    append(out, [{**row, **machine(PACKAGES)}])


def mean_return(data: Any) -> float:
    ends = int((data["terminated"] | data["truncated"]).sum())
    return float(data["reward"].sum()) / max(ends, 1)


def score(agent: Any, bandit: bool, episodes: int, seed: int) -> float:
    if not bandit:
        return float(agent.evaluate(episodes, seed=seed)["eval/mean_reward"])
    from rlkit.envs.coordination import parity_reward

    actions = agent.predict(np.zeros((200, 1), np.float32))[0]
    if len(agent.data) != 100:
        return float(parity_reward(actions).mean())
    chosen = (actions > 0).astype(int)
    return float(np.array([[1.0, -1.0], [0.1, -1.0]])[chosen[:, 0], chosen[:, 1]].mean())


# --- speed -----------------------------------------------------------------------------------------------------------


def clock_one(levels: int, d: int, bins: int) -> None:
    """Print seconds of an update and of an action by both evaluations as JSON."""
    import torch

    import rlkit
    from rlkit.trainers import arsq

    torch.set_num_threads(1)

    class Naive(arsq.ChoiceNet):
        """Every choice's input is concatenated with the state, and goes through all heads."""

        def embed(self, obs: torch.Tensor) -> torch.Tensor:
            return obs

        def forward(self, embedded: torch.Tensor, centres: torch.Tensor, start: int = 0) -> torch.Tensor:
            rows, steps, _ = centres.shape
            x = torch.cat([embedded.unsqueeze(1).expand(-1, steps, -1), centres], -1).flatten(0, 1)
            weight = torch.cat([self.of_state.weight, self.of_centre], 1)
            h = self.activation(torch.matmul(x, weight) + self.of_state.bias)
            for layer in self.hidden:
                h = self.activation(layer(h))
            every = (
                torch.einsum("nbsh,ntho->nbsto", h.unflatten(1, (rows, steps)), self.head) + self.head_bias[:, :, None]
            )
            own = torch.arange(start, start + steps)
            return every[:, :, torch.arange(steps), own]

    @torch.no_grad()
    def naive_action(agent: Any, obs: torch.Tensor, deterministic: bool) -> torch.Tensor:
        """All advantages of the action so far, for each choice."""
        indices = torch.zeros(len(obs), levels, d, dtype=torch.int64)
        for p in range(levels * d):
            advantage = agent.critic.advantage(agent.normalizer(obs), indices).min(0).values
            indices.flatten(1)[:, p] = advantage[:, p].argmax(1)
        return arsq.decode(indices, levels, bins)

    obs_dim = 17
    data = made_up(512, obs_dim, d)
    env = still(obs_dim, d)
    seconds: dict[str, list[float]] = defaultdict(list)
    agents: dict[str, Any] = {}
    for kind, cls in (("one head a choice", arsq.ChoiceNet), ("naive", Naive)):
        arsq.ChoiceNet, kept = cls, arsq.ChoiceNet  # type: ignore[misc]
        fields = {"levels": levels, "bins": bins, "batch_size": 256, "policy_kwargs": {"net_arch": (256, 256, 256)}}
        agents[kind] = rlkit.ARSQ(env, data=data, device="cpu", compile="off", matmul="blas", seed=0, **fields)
        arsq.ChoiceNet = kept  # type: ignore[misc]
    for _ in range(12):
        for kind, agent in agents.items():
            batch, obs = agent.batch(), torch.zeros(1, obs_dim)
            seconds[f"{kind}: update"].append(timed(lambda agent=agent, batch=batch: agent.update(batch)))
            act = naive_action if kind == "naive" else arsq.ARSQ.act
            seconds[f"{kind}: action"].append(timed(lambda act=act, agent=agent, obs=obs: act(agent, obs, True)))
    print(json.dumps({key: median(values[2:]) for key, values in seconds.items()}))


def made_up(n: int, obs_dim: int, d: int) -> dict[str, Any]:
    """`n` random transitions in episodes of 64."""
    rng = np.random.default_rng(0)
    return {
        "observations": rng.normal(size=(n, obs_dim)).astype(np.float32),
        "next_observations": rng.normal(size=(n, obs_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, d)).astype(np.float32), "rewards": rng.normal(size=n),
        "terminals": np.zeros(n, bool), "timeouts": np.arange(n) % 64 == 63,
    }  # fmt: skip


def still(obs_dim: int, d: int) -> Any:
    """An environment in which nothing happens."""
    import gymnasium as gym

    class Still(gym.Env):  # type: ignore[type-arg]
        observation_space = gym.spaces.Box(-10.0, 10.0, (obs_dim,), np.float32)
        action_space = gym.spaces.Box(-1.0, 1.0, (d,), np.float32)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            return np.zeros(obs_dim, np.float32), {}

        def step(self, action: Any) -> Any:
            return np.zeros(obs_dim, np.float32), 0.0, False, False, {}

    return Still()


def timed(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def speed(repeats: int) -> list[dict[str, Any]]:
    shapes = {
        "2 levels of 7 bins, 3 dimensions": (2, 3, 7),
        "1 level of 41 bins, 6 dimensions": (1, 6, 41),
        "3 levels of 5 bins, 6 dimensions": (3, 6, 5),
    }
    rows = []
    for repeat in range(repeats):
        for shape, sizes in shapes.items():
            found = common.call(__file__, "clock", *map(str, sizes), threads=1)
            rows += [
                {"shape": shape, "what": key, "repeat": repeat, "seconds": s, **machine(PACKAGES)}
                for key, s in found.items()
            ]
    return rows


# --- the suite -------------------------------------------------------------------------------------------------------


def main(quick: bool = False) -> str:
    """Run what is missing, then write the figure and the table; returns the table."""
    name = "arsq-quick" if quick else "arsq"
    raw, clocked = RESULTS / f"{name}.csv", RESULTS / f"{name}-speed.csv"
    if quick:
        raw.unlink(missing_ok=True)
        clocked.unlink(missing_ok=True)
    done = {(row["task"], row["side"], int(row["seed"])) for row in read(raw)}
    tasks = ("parity, 2 dimensions",) if quick else tuple(TASKS)
    for task in tasks:
        steps = 300 if quick else TASKS[task]["steps"]
        for seed in range(1 if quick else SEEDS):
            for side in sides_of(task):
                if (task, side, seed) not in done:
                    if "sac" in TASKS[task]:
                        recorded(TASKS[task]["sac"])
                    job = (task, side, str(seed), str(steps), str(raw))
                    subprocess.run([sys.executable, __file__, *job], check=True)
                    print(f"done: {task}, {side}, seed {seed}", flush=True)
    if not clocked.exists() and (quick or len(read(raw)) == sum(SEEDS * len(sides_of(task)) for task in TASKS)):
        append(clocked, speed(1 if quick else 5))
    rows = read(raw)
    text = report(rows, read(clocked))
    (RESULTS / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    figure(rows, RESULTS / f"{name}.png")
    return text


def report(rows: list[dict[str, str]], clocked: list[dict[str, str]]) -> str:
    """Final scores and areas by task and side, ARSQ over CQN, and the time of both evaluations."""
    found = runs_of(rows, TASKS, SIDES)
    lines = []
    for (task, side), runs in found.items():
        figures = [shown(interquartile([float(run[key]) for run in runs])) for key in ("final", "area")]
        lines.append([task, side, f"{int(runs[0]['steps']):,}", str(len(runs)), *figures, runs[0]["data"]])
    parts = [table(["task", "side", "steps", "seeds", "final score", "mean of five scores", "data"], lines)]
    planned = sum(SEEDS * len(sides_of(task)) for task in TASKS)
    if len(rows) < planned:
        parts.append(f"Unfinished: {len(rows)} of {planned} runs; one seed has no interval.")
    compared = []
    for task in TASKS:
        if (task, "ARSQ") in found and (task, "CQN") in found and "sac" in TASKS[task]:
            for key in ("final", "area"):
                ours, theirs = ([float(run[key]) for run in found[task, side]] for side in COMPARED)
                positive = min(ours + theirs) > 0
                what = {"final": "final score", "area": "mean of five scores"}[key]
                quotient = shown(ratio(ours, theirs)) if positive else "-"
                compared.append([task, what, shown(differences(ours, theirs)), quotient])
    if compared:
        parts.append(
            "ARSQ less CQN, and as a multiple of it where all scores are positive; interquartile means, both "
            "resampled:\n\n" + table(["task", "score", "difference", "ratio"], compared)
        )
    parts.append(timing(clocked))
    parts += sorted({f"{r['processor']}, {r['cores']} cores, 1 thread a run; {r['versions']}" for r in rows})
    return "\n\n".join(parts)


def timing(clocked: list[dict[str, str]]) -> str:
    """The naive evaluation's time as a multiple of ARSQ's."""
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in clocked):
        for what in ("update", "action"):
            seconds = {
                kind: [float(r["seconds"]) for r in clocked if r["shape"] == shape and r["what"] == f"{kind}: {what}"]
                for kind in ("one head a choice", "naive")
            }
            ours = seconds["one head a choice"]
            factor = median(b / a for a, b in zip(ours, seconds["naive"], strict=True))
            lines.append([shape, what, f"{1e3 * median(ours):.1f} ms", f"{factor:.2f}"])
    return "Time of one head a choice, and the naive evaluation as a multiple of it:\n\n" + table(
        ["shape", "what", "time", "naive"], lines
    )


def shown(values: tuple[float, float, float]) -> str:
    mean, low, high = values
    text = f"{mean:.2f}" if abs(mean) < 100 else f"{mean:.0f}"
    digits = ".2f" if abs(mean) < 100 else ".0f"
    return text if np.isnan(low) else f"{text} [{low:{digits}}, {high:{digits}}]"


def figure(rows: list[dict[str, str]], path: Path) -> None:
    """Scores by side as points with intervals, a panel a task; in MuJoCo against steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    found = runs_of(rows, TASKS, SIDES)
    tasks = list(dict.fromkeys(task for task, _ in found))
    columns = min(4, len(tasks))
    shape = (-(-len(tasks) // columns), columns)
    canvas, axes = plt.subplots(*shape, figsize=(3.6 * shape[1], 3.0 * shape[0]), squeeze=False)
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    for axis, task in zip(axes.flat, tasks, strict=False):
        for number, side in enumerate(SIDES):
            runs = found.get((task, side), [])
            if not runs:
                continue
            curves = np.array([[float(score) for score in run["scores"].split()] for run in runs])
            steps = np.arange(1, POINTS + 1) * int(runs[0]["steps"]) / POINTS
            values = np.array([interquartile(list(column)) for column in curves.T])
            axis.plot(steps, values[:, 0], color=f"C{number}", label=side)
            if len(runs) > 1:
                axis.fill_between(steps, values[:, 1], values[:, 2], color=f"C{number}", alpha=0.2, linewidth=0)
        offline = TASKS[task]["fields"].get("offline_steps")
        if isinstance(offline, int):
            axis.axvline(offline, color="grey", linewidth=0.8, linestyle=":")
        axis.set_title(task, fontsize=9)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=7)
    handles = [mpl.lines.Line2D([], [], color=f"C{number}", label=side) for number, side in enumerate(SIDES)]
    axes.flat[0].legend(handles=handles, frameon=False, fontsize=7)
    canvas.suptitle(
        "score against steps: interquartile mean over seeds, 95 % interval; dotted: online from here", fontsize=9
    )
    canvas.tight_layout()
    canvas.savefig(path, dpi=90)
    plt.close(canvas)


if __name__ == "__main__":
    if sys.argv[1] == "clock":
        clock_one(*map(int, sys.argv[2:]))
    else:
        task, side, seed, steps, out = sys.argv[1:]
        run_one(task, side, int(seed), int(steps), Path(out))
