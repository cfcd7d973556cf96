"""DR-RPO's claims: returns in changed dynamics against non-robust and value-based learners, and its sub-optimality.

Perturbations: every side learns in the nominal environment alone, and its policy is then valued in targets: exactly, by
the target's dynamics, in `rlkit/SimulatedLinear-v0` (the jump fails with probability q), `rlkit/SlipperyGrid-v0` (slip)
and `rlkit/AmericanPut-v0` (the price's probability to rise; the mean over five first prices); in CartPole-v1, with
kernel features, by 20 episodes for each value of pole length, mass and force. Sides: DR-RPO with each uncertainty;
DR-LSVI-UCB, the same without a temperature; LSVI-UCB, without robustness, either. All have the same features, size of
the bonus and episodes.

Sub-optimality: in `rlkit/SimulatedLinear-v0`, the exact robust and regularised value of the optimum less that of the
policy of each episode, averaged over the episodes so far, and the slope of its logarithm against that of the episodes.
Reference and temperature: the exact worst case of what is learned for several of each.

Speed: the time of a plan as data grow, where next states recur (its cost is that of their number) and where they do not
(linear in the transitions).

Given are means over seeds with 95 % Student intervals. One thread.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import RESULTS, append, interval, machine, read, table

PACKAGES = ("rlkit-trainers", "torch", "gymnasium", "numpy", "scipy")
SEEDS, CARTPOLE_SEEDS = 10, 5
JUMP = [[0.0, 0.0, 0.0, 0.6], [0.0] * 4, [0.0] * 4]
TASKS: dict[str, dict[str, Any]] = {
    "SimulatedLinear": {
        "env": "rlkit/SimulatedLinear-v0", "parameter": "shift",
        "values": [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1],
        "nominal": 0.0, "steps": 3 * 300, "fields": {"eta": 0.02, "beta": 0.5},
        "levels": {"tv_radius": JUMP, "tv_penalty": 1.0, "kl_penalty": 0.1, "chi2_penalty": 0.1},
    },
    "SlipperyGrid": {
        "env": "rlkit/SlipperyGrid-v0", "parameter": "slip", "values": [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
        "nominal": 0.1, "steps": 12 * 1_000, "fields": {"eta": 0.01, "beta": 0.3, "plan_growth": 0.02},
        "levels": {"tv_radius": 0.1, "tv_penalty": 0.7, "kl_penalty": 0.3, "chi2_penalty": 0.3},
    },
    "AmericanPut": {
        "env": "rlkit/AmericanPut-v0", "parameter": "p_up", "values": [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8],
        "nominal": 0.5, "steps": 10 * 300, "fields": {"eta": 0.002, "beta": 0.02},
        "levels": {"tv_radius": 0.1, "tv_penalty": 0.3, "kl_penalty": 0.1, "chi2_penalty": 0.1},
    },
}  # fmt: skip
UNCERTAINTIES = ("tv_radius", "tv_penalty", "kl_penalty", "chi2_penalty")
SIDES = (*(f"DR-RPO, {name}" for name in UNCERTAINTIES), "RPO, not robust", "DR-LSVI-UCB", "LSVI-UCB")
CARTPOLE: dict[str, tuple[float, ...]] = {
    "length": (0.5, 0.75, 1.0, 1.5, 2.0, 3.0), "mass": (0.3, 0.6, 1.0, 1.5, 2.0, 3.0),
    "force": (0.3, 0.6, 1.0, 1.5, 2.0, 3.0),
}  # fmt: skip
CARTPOLE_SIDES = {"DR-RPO, tv_penalty": {}, "RPO, not robust": {"uncertainty": "none"}}
CARTPOLE_STEPS = 6_000
REGRET = {"tv_radius": JUMP, "tv_penalty": 1.0, "kl_penalty": 0.5}
EPISODES = 1_000
EMPTY = {"value": "", "found": ""}
ETAS = (0.01, 0.05, 0.2, 1.0, 5.0)


def agent(env: str, seed: int, **fields: Any) -> Any:
    import torch

    import rlkit

    torch.set_num_threads(1)
    return rlkit.DRRPO(env, seed=seed, device="cpu", eval_episodes=0, log_every=1_000_000, **fields)


def levels_of(task: dict[str, Any], uncertainty: str) -> dict[str, Any]:
    level = task["levels"][uncertainty]
    key = "radius" if uncertainty.endswith("radius") else "sigma"
    return {"uncertainty": uncertainty, key: tuple(map(tuple, level)) if isinstance(level, list) else level}


def side_fields(task: dict[str, Any], side: str) -> dict[str, Any]:
    if side.startswith("DR-RPO"):
        return {**task["fields"], **levels_of(task, side.split(", ")[1])}
    if side == "DR-LSVI-UCB":
        return {**task["fields"], **levels_of(task, "tv_radius"), "eta": 0.0}
    if side == "LSVI-UCB":
        return {**task["fields"], "uncertainty": "none", "eta": 0.0, "bonus": "elliptical"}
    return {**task["fields"], "uncertainty": "none"}


def target(name: str, value: float) -> list[Any]:
    """The linear MDPs that a policy is valued in: of the put one for each first price."""
    from rlkit.envs.linear import AmericanPut, SimulatedLinearMDP, SlipperyGrid

    if name == "AmericanPut":
        return [AmericanPut(p_up=value).lattice(price) for price in (95.0, 97.5, 100.0, 102.5, 105.0)]
    return [SimulatedLinearMDP(shift=value) if name == "SimulatedLinear" else SlipperyGrid(slip=value)]


def perturbations(name: str, seed: int, steps: int) -> list[dict[str, Any]]:
    """A row for each side and value."""
    from rlkit.envs.linear import simulate

    task, rows = TASKS[name], []
    for side in SIDES:
        began = time.perf_counter()
        trained = agent(task["env"], seed, **side_fields(task, side)).learn(steps)
        spent = time.perf_counter() - began
        for value in task["values"]:
            mdps = target(name, value)
            found = float(np.mean([simulate(mdp, trained.table(mdp)) for mdp in mdps]))
            rows.append(row(name, side, seed, task["parameter"], value, found, steps=steps, seconds=round(spent, 1)))
    return rows


def row(task: str, side: str, seed: int, parameter: str, value: float, found: float, **more: Any) -> dict[str, Any]:
    base = {"task": task, "side": side, "seed": seed, "parameter": parameter, "value": value, "found": round(found, 5)}
    return {**base, "steps": "", "seconds": "", **more, **machine(PACKAGES)}


def packed(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as they are kept: those that differ in `value` and `found` alone are one, with both as lists."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in rows:
        kept = found.setdefault(tuple(v for k, v in one.items() if k not in ("value", "found")), {**one, **EMPTY})
        for key in EMPTY:
            kept[key] = f"{kept[key]} {one[key]}".strip()
    return list(found.values())


def unpacked(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The inverse of `packed`."""
    return [
        {**one, "value": value, "found": found}
        for one in rows
        for value, found in zip(one["value"].split(), one["found"].split(), strict=True)
    ]


def cartpole(seed: int, steps: int) -> list[dict[str, Any]]:
    from rlkit.perturbation import sweep

    rows = []
    for side, fields in CARTPOLE_SIDES.items():
        began = time.perf_counter()
        trained = agent("CartPole-v1", seed, preset="auto", **fields).learn(steps)
        spent = time.perf_counter() - began
        for parameter, values in CARTPOLE.items():
            rows += [
                row("CartPole", side, seed, parameter, value, of.mean, steps=steps, seconds=round(spent, 1))
                for value, of in sweep(trained, parameter, values, episodes=20, seed=0)
            ]
    return rows


def regret(seed: int, episodes: int) -> list[dict[str, Any]]:
    """Average sub-optimality after each of ten numbers of episodes."""
    from rlkit.envs.linear import SimulatedLinearMDP, robust_value

    mdp, rows = SimulatedLinearMDP(), []
    for uncertainty, level in REGRET.items():
        best = robust_value(mdp, uncertainty, level, eta=0.1)
        gaps: list[float] = []

        def see(
            trainer: Any, gaps: list[float] = gaps, of: tuple[str, Any, float] = (uncertainty, level, best)
        ) -> None:
            if trainer.clock % 3 == 1:  # the policy of this episode
                gaps.append(of[2] - robust_value(mdp, *of[:2], eta=0.1, policy=trainer.table()))

        fields = levels_of({"levels": REGRET}, uncertainty)
        agent("rlkit/SimulatedLinear-v0", seed, eta=0.1, beta=0.5, **fields).learn(3 * episodes, callback=see)
        average = np.cumsum(gaps) / np.arange(1, len(gaps) + 1)
        rows += [
            row("average sub-optimality", f"DR-RPO, {uncertainty}", seed, "episodes", k, average[k - 1])
            for k in np.unique(np.geomspace(10, episodes, 12).astype(int)).tolist()
        ]
    return rows


def references(seed: int, steps: int) -> list[dict[str, Any]]:
    """Exact worst case, without the charge, of policies learned with temperatures and references."""
    from rlkit.envs.linear import SlipperyGrid, robust_value

    task, grid, rows = TASKS["SlipperyGrid"], SlipperyGrid(), []
    with tempfile.TemporaryDirectory() as folder:
        run = str(Path(folder) / "nominal")
        nominal = {**task["fields"], "uncertainty": "none", "eta": 0.05}
        agent(task["env"], seed, out=run, tensorboard=False, **nominal).learn(steps)
        for label, reference in (("uniform", None), ("the policy learned without robustness", run)):
            for eta in ETAS:
                fields = {**task["fields"], **levels_of(task, "kl_penalty"), "eta": eta, "reference": reference}
                policy = agent(task["env"], seed, **fields).learn(steps).table()
                worst = robust_value(grid, "kl_penalty", task["levels"]["kl_penalty"], policy=policy)
                rows.append(row("reference", label, seed, "eta", eta, worst, steps=steps))
    return rows


def speed(repeat: int, quick: bool) -> list[dict[str, Any]]:
    """Seconds of a plan, after numbers of transitions."""
    rows = []
    for name, env, fields, sizes in (
        ("next states recur", "rlkit/SimulatedLinear-v0", {}, (300, 1_200, 4_800)),
        ("next states recur", "rlkit/SlipperyGrid-v0", {"beta": 0.05}, (300, 1_200, 4_800)),
        ("next states differ", "CartPole-v1", {"preset": "auto"}, (1_000, 2_000, 4_000)),
    ):
        trained = agent(env, repeat, **fields)
        for size in sizes[: 1 if quick else 3]:
            trained.learn(size - trained.clock)
            seconds = []
            for _ in range(5):
                began = time.perf_counter()
                trained.update(trained.batch())  # of no new transitions
                seconds.append(time.perf_counter() - began)
            m = sum(len(ridge.next_obs) for ridge in trained.ridges)
            rows.append(row(f"speed: {name}", env, repeat, "transitions", size, median(seconds), steps=m))
    return rows


PARTS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "cartpole": cartpole, "regret": regret, "references": references, "speed": speed,
}  # fmt: skip


def planned(quick: bool) -> list[tuple[str, list[Any]]]:
    """(part, arguments) of all runs."""
    if quick:
        return [("SimulatedLinear", [0, 90]), ("regret", [0, 20]), ("speed", [0, True])]
    jobs: list[tuple[str, list[Any]]] = [
        (name, [seed, task["steps"]]) for seed in range(SEEDS) for name, task in TASKS.items()
    ]
    jobs += [("regret", [seed, EPISODES]) for seed in range(SEEDS)]
    jobs += [("references", [seed, TASKS["SlipperyGrid"]["steps"]]) for seed in range(CARTPOLE_SEEDS)]
    jobs += [("cartpole", [seed, CARTPOLE_STEPS]) for seed in range(CARTPOLE_SEEDS)]
    return jobs + [("speed", [repeat, False]) for repeat in range(3)]


def part_of(row: dict[str, str]) -> str:
    names = {"CartPole": "cartpole", "average sub-optimality": "regret", "reference": "references"}
    return names.get(row["task"], "speed" if row["task"].startswith("speed") else row["task"])


def main(quick: bool = False) -> str:
    """Run what is missing, then write the figure and the table; returns the table."""
    name = "dr-rpo-quick" if quick else "dr-rpo"
    raw = RESULTS / f"{name}.csv"
    if quick:
        raw.unlink(missing_ok=True)
    done = {(part_of(row), int(row["seed"])) for row in read(raw)}
    jobs = planned(quick)
    for part, arguments in jobs:
        if (part, arguments[0]) not in done:
            subprocess.run([sys.executable, __file__, part, json.dumps(arguments), str(raw)], check=True)
            print(f"done: {part}, seed {arguments[0]}", flush=True)
    rows = unpacked(read(raw))
    text = report(rows, len({(part_of(r), r["seed"]) for r in rows}), len(jobs))
    (RESULTS / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    figure(rows, RESULTS / f"{name}.png")
    return text


def by(rows: Iterable[dict[str, str]], *keys: str) -> dict[tuple[str, ...], list[float]]:
    """Values of `found` by what rows have in common."""
    found: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for one in rows:
        found[tuple(one[key] for key in keys)].append(float(one["found"]))
    return found


def shown(values: list[float], digits: int = 3) -> str:
    mean, low, high = interval(values)
    return f"{mean:.{digits}f}" + ("" if np.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]")


def slopes(rows: list[dict[str, str]], side: str, start: int = 100) -> list[float]:
    """Of log average sub-optimality against log episodes from `start` on, for each seed."""
    found = []
    for seed in sorted({r["seed"] for r in rows}):
        own = [r for r in rows if (r["side"], r["seed"]) == (side, seed) and float(r["value"]) >= start]
        if len(own) > 2:
            k, gap = (np.log([float(r[key]) for r in own]) for key in ("value", "found"))
            found.append(float(np.polyfit(k, gap, 1)[0]))
    return found


def report(rows: list[dict[str, str]], made: int, jobs: int) -> str:
    """Returns against the parameter by side, the worst of them, slopes, references, and seconds of a plan."""
    parts = [f"Unfinished: {made} of {jobs} runs."] if made < jobs else []
    for name in dict.fromkeys(r["task"] for r in rows if r["task"] in (*TASKS, "CartPole")):
        for parameter in dict.fromkeys(r["parameter"] for r in rows if r["task"] == name):
            own = [r for r in rows if (r["task"], r["parameter"]) == (name, parameter)]
            values = list(dict.fromkeys(r["value"] for r in own))
            digits = 0 if name == "CartPole" else 3
            found = by(own, "side", "value")
            lines = [
                [side, *(shown(found[side, value], digits) for value in values)]
                for side in dict.fromkeys(r["side"] for r in own)
            ]
            seeds = len({r["seed"] for r in own})
            parts.append(
                f"{name}, {int(float(own[0]['steps'])):,} steps, {seeds} seeds: return against `{parameter}`"
                + ("" if name == "CartPole" else f" (nominal {TASKS[name]['nominal']:g})")
                + "\n\n" + table(["side", *(f"{float(v):g}" for v in values)], lines)
            )  # fmt: skip
    gaps = [r for r in rows if r["task"] == "average sub-optimality"]
    if gaps:
        found, ks = by(gaps, "side", "value"), list(dict.fromkeys(r["value"] for r in gaps))
        lines = []
        for side in dict.fromkeys(r["side"] for r in gaps):
            slope = slopes(gaps, side)
            lines.append([side, *(shown(found[side, k], 4) for k in ks[::3]), shown(slope, 2) if slope else "-"])
        parts.append(
            "Average sub-optimality by episodes, and the slope of logarithms from 100 on:\n\n"
            + table(["side", *ks[::3], "slope"], lines)
        )
    refs = [r for r in rows if r["task"] == "reference"]
    if refs:
        found = by(refs, "side", "value")
        etas = list(dict.fromkeys(r["value"] for r in refs))
        lines = [[side, *(shown(found[side, eta]) for eta in etas)] for side in dict.fromkeys(r["side"] for r in refs)]
        parts.append(
            "SlipperyGrid, Kullback-Leibler penalty: exact worst case by reference policy and temperature:\n\n"
            + table(["reference", *etas], lines)
        )
    clocked = [r for r in rows if r["task"].startswith("speed")]
    lines = []
    for (task, side, size), seconds in by(clocked, "task", "side", "value").items():
        states = median(int(r["steps"]) for r in clocked if (r["task"], r["side"], r["value"]) == (task, side, size))
        lines.append(
            [side, task.removeprefix("speed: "), f"{int(size):,}", f"{states:,.0f}", f"{1e3 * median(seconds):.1f} ms"]
        )
    if lines:
        parts.append("A plan:\n\n" + table(["environment", "", "transitions", "different next states", "time"], lines))
    parts += sorted({f"{r['processor']}, {r['cores']} cores, 1 thread; {r['versions']}" for r in rows})
    return "\n\n".join(parts)


def figure(rows: list[dict[str, str]], path: Path) -> None:
    """Returns against the parameter, a panel a task and parameter, and the average sub-optimality."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(
        dict.fromkeys((r["task"], r["parameter"]) for r in rows if not r["task"].startswith(("speed", "ref")))
    )
    canvas, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.4), squeeze=False)
    for axis, (task, parameter) in zip(axes.flat, panels, strict=True):
        own = [r for r in rows if (r["task"], r["parameter"]) == (task, parameter)]
        found = by(own, "side", "value")
        for number, side in enumerate(SIDES):
            values = [v for v in dict.fromkeys(r["value"] for r in own) if found.get((side, v))]
            if not values:
                continue
            points = np.array([interval(found[side, v]) for v in values])
            x = [float(v) for v in values]
            dashed = "--" if not side.startswith("DR-RPO") else "-"
            axis.plot(x, points[:, 0], dashed, color=f"C{number}", label=side, marker="o", markersize=2)
            if not np.isnan(points[0, 1]):
                axis.fill_between(x, points[:, 1], points[:, 2], color=f"C{number}", alpha=0.15, linewidth=0)
        if parameter == "episodes":
            axis.set_xscale("log")
            axis.set_yscale("log")
        axis.set_title(task, fontsize=9)
        axis.set_xlabel(parameter, fontsize=8)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=7)
    axes.flat[0].legend(frameon=False, fontsize=6)
    canvas.tight_layout()
    canvas.savefig(path, dpi=90)
    plt.close(canvas)


if __name__ == "__main__":
    part, arguments, out = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    append(out, packed(PARTS[part](*arguments) if part in PARTS else perturbations(part, *arguments)))
