"""Dual-RL's claims: f-DVL against XQL, IQL and cloning from recordings, and where its value loss diverges.

Data: SAC is trained on HalfCheetah-v5, Hopper-v5 and Walker2d-v5, and `rlkit data make` records random actions, the
policy of a third of the way (medium), what its replay buffer held by then (medium-replay), and medium episodes with
those of the last policy (medium-expert); besides, the expert recordings that lie beside the checkout, in
`../shared/data/offline_rl`. Every run has the same networks, batches and number of updates, evaluates its last iterate
only, and is scored as D4RL does.

Sides: f-DVL with chi-square (lam 0.8) and total variation (0.8), XQL (temperature 2), IQL (expectile 0.7) and behaviour
cloning, all of them this project's `dual_rl`, with a policy temperature of 3 and returns scaled to a range of 1000.

Stability: on the medium-replay data, a sweep over lam, or over XQL's temperature. A run counts as diverged where it
stopped for a loss or gradient that is not finite, or where the mean of V is outside of what the data's rewards can sum
to, +- max |r| / (1 - gamma).

The unification: on random tables, each method's dual, solved, against the primal; and an update's time against the
same update written with PyTorch's modules and its own Adam.

Given are interquartile means over seeds with 95 % bootstrap intervals. Runs have one thread, one at a time.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import arsq
import common
import numpy as np
from common import RESULTS, append, interquartile, machine, read, table

PACKAGES = ("rlkit-trainers", "torch", "gymnasium", "mujoco", "minari", "numpy")
RAW = RESULTS / "raw" / "offline"
EXPERTS = Path(__file__).parents[2] / "shared" / "data" / "offline_rl"
ENVS = {"halfcheetah": "HalfCheetah-v5", "hopper": "Hopper-v5", "walker2d": "Walker2d-v5"}
SAC_STEPS, MEDIUM = 120_000, 45_000
EPISODES = {"halfcheetah": (30, 30), "hopper": (1_000, 100), "walker2d": (1_000, 100)}
"""Of random actions, and of a policy: about 20,000 to 30,000 transitions each."""
QUALITIES = ("random", "medium", "medium-replay", "medium-expert")
SHARED = {"hopper-expert": "Hopper-v5", "halfcheetah-expert": "HalfCheetah-v5", "pendulum-expert": "Pendulum-v1"}
FILES = {
    "hopper-expert": "hopper_v4_expert.npz", "halfcheetah-expert": "halfcheetah_v4_expert.npz",
    "pendulum-expert": "pendulum_v1_expert.npz",
}  # fmt: skip
TASKS = {**{f"{name}-{quality}": env for name, env in ENVS.items() for quality in QUALITIES}, **SHARED}
SIDES: dict[str, dict[str, Any]] = {
    "f-DVL, chi-square": {"divergence": "chi2", "lam": 0.8},
    "f-DVL, total variation": {"divergence": "tv", "lam": 0.8},
    "XQL": {"divergence": "gumbel", "lam": 2.0},
    "IQL": {"divergence": "expectile", "lam": 0.7},
    "cloning": {"policy_temperature": 0.0},
}
SWEEP: dict[str, tuple[float, ...]] = {
    "gumbel": (0.1, 0.3, 1.0, 3.0), "chi2": (0.5, 0.7, 0.9, 0.99), "tv": (0.6, 0.7, 0.9, 0.99),
    "expectile": (0.5, 0.7, 0.9, 0.99),
}  # fmt: skip
SWEPT = tuple(f"{name}-medium-replay" for name in ENVS)
SETTINGS: dict[str, Any] = {
    "batch_size": 256, "learning_rate": 1e-3, "policy_kwargs": {"net_arch": (128, 128)}, "policy_temperature": 3.0,
    "return_range": 1000.0, "offline_steps": "all", "normalize_obs": True,
}  # fmt: skip
SEEDS, UPDATES, SWEEP_UPDATES = 5, 6_000, 1_500


def rlkit(*args: str) -> None:
    """An rlkit command in `RAW`."""
    subprocess.run([sys.executable, "-m", "rlkit", *args], check=True, cwd=RAW, stdout=subprocess.DEVNULL)


def recorded(task: str) -> str:
    """The name of a task's data, which is made where it is not there."""
    if task in FILES:
        return str(EXPERTS / FILES[task])
    name, _, quality = task.partition("-")
    dataset = f"{name}/{quality}-v0"
    os.environ["MINARI_DATASETS_PATH"] = str(RAW / "minari")
    if not (RAW / "minari" / dataset).is_dir():
        run = trained(ENVS[name])
        half, last = (f"{run}/checkpoints/step-{step:010d}" for step in (MEDIUM, SAC_STEPS))
        few, many = map(str, EPISODES[name])
        sources = {
            "random": [f"random:{ENVS[name]}", "--episodes", few], "medium": [half, "--episodes", many],
            "medium-replay": [f"replay:{half}"], "medium-expert": [half, last, "--episodes", many, many],
        }  # fmt: skip
        rlkit("data", "make", *sources[quality], "--out", dataset)
    return f"minari:{dataset}"


def trained(env: str) -> Path:
    """The run folder of SAC, trained where it is not there."""
    run = RAW / f"sac-{env}"
    RAW.mkdir(parents=True, exist_ok=True)
    if not (run / "config.yaml").exists():
        options = {
            "env": env, "steps": SAC_STEPS, "learning_starts": 5000, "seed": 0, "threads": 1, "device": "cpu",
            "compile": "on", "checkpoint_every": 15_000, "keep_checkpoints": 8, "eval_every": 15_000,
            "tensorboard": "false", "out": run,
        }  # fmt: skip
        rlkit("train", "sac", *(text for name, value in options.items() for text in (f"--{name}", str(value))))
    else:
        rlkit("resume", str(run))
    return run


def run_one(task: str, side: str, fields: dict[str, Any], seed: int, updates: int, episodes: int, out: Path) -> None:
    """Train one agent, evaluate it; append a row to `out`."""
    import torch

    import rlkit
    from rlkit.errors import DivergenceError

    torch.set_num_threads(1)
    agent = rlkit.DualRL(
        TASKS[task], data=recorded(task), seed=seed, device="cpu",
        compile="on" if updates > 5_000 else "off", eval_episodes=0, log_every=max(1, updates // 10),
        **{**SETTINGS, **fields},
    )  # fmt: skip
    began, stopped = time.perf_counter(), ""
    try:
        agent.learn(updates)
    except DivergenceError as error:
        stopped = str(error).split(" is ")[0]
    spent = time.perf_counter() - began
    data = agent.data
    assert data is not None
    with torch.no_grad():
        rows = data.rows(torch.arange(min(len(data), 10_000)))
        v = float(agent.value(agent.normalizer(rows["obs"])).mean())
    most = float(data["reward"].abs().max()) / (1 - agent.config.gamma)
    record: dict[str, Any] = {}
    if episodes and not stopped:
        record = dict(agent.evaluate(episodes, seed=seed) or {})
    row = {
        "task": task, "side": side, "lam": fields.get("lam", ""), "seed": seed, "updates": updates,
        "final": round(float(record.get("eval/mean_reward", np.nan)), 2),
        "score": round(float(record.get("eval/normalized_score", np.nan)), 2), "v_mean": round(v, 3),
        "v_most": round(most, 1), "stopped": stopped, "diverged": int(bool(stopped) or not abs(v) <= most),
        "updates_per_second": round(agent.updates / spent, 1), "data": about(data),
    }  # fmt: skip
    append(out, [{**row, **machine(PACKAGES)}])


def about(data: Any) -> str:
    ends = int((data["terminated"] | data["truncated"]).sum())
    return f"{len(data):,} transitions, {ends:,} episodes"


# --- the unification -------------------------------------------------------------------------------------------------


def unification(seeds: int = 20) -> list[dict[str, Any]]:
    """Largest difference, over random tables, between each method's dual and what it is the dual of."""
    from rlkit.duality import (
        DIVERGENCES,
        TabularMDP,
        divergence_of,
        dual_q,
        dual_v,
        primal_v,
        recoil_dual_q,
        regularised_return,
    )

    found: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        mdp = TabularMDP(rng.dirichlet(np.ones(3), (3, 2)), rng.uniform(0, 1, (3, 2)), rng.dirichlet(np.ones(3)), 0.9)
        policy = rng.dirichlet(np.ones(2), 3)
        offline, expert = (mdp.visitation(rng.dirichlet(2 * np.ones(2), 3)) for _ in range(2))
        own = mdp.visitation(policy)
        still = TabularMDP(mdp.transitions, np.zeros_like(mdp.rewards), mdp.start, mdp.gamma)
        for method, divergence in (("AlgaeDICE", "reverse_kl"), ("AlgaeDICE", "chi2"), ("CQL, ATAC", "chi2")):
            value = dual_q(mdp, policy, offline, divergence).value
            primal = regularised_return(mdp, own, offline, divergence, 1.0)
            found[method, "Q", divergence, "return of pi - D(d^pi, d^O)"].append(abs(value - primal))
        q = rng.normal(size=(3, 2))
        v = (policy * q).sum(1)
        y = mdp.rewards + mdp.gamma * mdp.expected(v) - q
        dual = (1 - mdp.gamma) * mdp.start @ v + (offline * DIVERGENCES["chi2"].conjugate(y)).sum()
        cql = (offline * (v[:, None] - q)).sum() + (offline * mdp.rewards).sum() + 0.25 * (offline * y**2).sum()
        found["CQL, ATAC", "Q", "chi2", "pessimism gap + squared Bellman error, any Q"].append(abs(dual - cql))
        for method, divergence in (
            ("XQL", "reverse_kl"), ("OptiDICE, f-DVL", "chi2"), ("OptiDICE", "hellinger"),
            ("OptiDICE", "jensen_shannon"),
        ):  # fmt: skip
            solution = dual_v(mdp, offline, divergence)
            primal, _ = primal_v(mdp, offline, divergence)
            found[method, "V", divergence, "largest return - D(d, d^O)"].append(abs(solution.value - primal))
            found[method, "V", divergence, "flow of w d^O"].append(mdp.flow_error(solution.visitation))
        value = dual_q(still, policy, expert, "chi2").value
        match = -divergence_of("chi2", own, expert)
        found["IQ-Learn", "Q, r = 0", "chi2", "- D(d^pi, d^E)"].append(abs(value - match))
        with np.errstate(divide="ignore"):
            pseudo = np.log(expert / offline)
        ratio = TabularMDP(mdp.transitions, pseudo, mdp.start, mdp.gamma)
        solution = dual_v(ratio, offline, "reverse_kl")
        primal, _ = primal_v(ratio, offline, "reverse_kl")
        found["SMODICE", "V, r = log d^E / d^O", "reverse_kl", "largest - D(d, d^E)"].append(
            abs(solution.value - primal)
        )
        for divergence in ("chi2", "reverse_kl"):
            value = recoil_dual_q(mdp, policy, expert, offline, 0.5, divergence).value
            mixtures = 0.5 * own + 0.5 * offline, 0.5 * expert + 0.5 * offline
            found["ReCOIL", "Q, mixtures", divergence, "- D(mix(d^pi), mix(d^E))"].append(
                abs(value + divergence_of(divergence, *mixtures))
            )
    return [
        {"method": method, "dual": dual, "divergence": divergence, "equals": what, "tables": len(errors),
         "largest_difference": f"{max(errors):.1e}", **machine(PACKAGES)}
        for (method, dual, divergence, what), errors in found.items()
    ]  # fmt: skip


# --- speed -----------------------------------------------------------------------------------------------------------


def clock_one(kind: str) -> None:  # noqa: C901 (the plain update stands in one place)
    """Print seconds of an update of `dual_rl` or `recoil`, eager and compiled, and of a plain one, as JSON."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    import rlkit
    from rlkit.trainers.dual_rl import chi2

    torch.set_num_threads(1)
    obs_dim, d, batch = 17, 6, 256
    data = arsq.made_up(5_000, obs_dim, d)
    fields: dict[str, Any] = {
        "batch_size": batch, "offline_steps": "all", "policy_kwargs": {"net_arch": (256, 256)}, "eval_episodes": 0,
        "policy_schedule": "constant",
    }  # fmt: skip
    if kind == "recoil":
        fields["expert_data"] = data
    cls = rlkit.ReCOIL if kind == "recoil" else rlkit.DualRL
    agents = {
        mode: cls(arsq.still(obs_dim, d), data=data, device="cpu", seed=0, compile=mode, **fields)
        for mode in ("off", "on")
    }
    for agent in agents.values():
        agent.learn(3)

    def net(inputs: int, outputs: int, norm: bool = False) -> nn.Sequential:
        layers: list[nn.Module] = []
        for width in (256, 256):
            layers += [nn.Linear(inputs, width), *([nn.LayerNorm(width)] if norm else []), nn.ReLU()]
            inputs = width
        return nn.Sequential(*layers, nn.Linear(inputs, outputs))

    value, actor, critics = net(obs_dim, 1, norm=True), net(obs_dim, d), [net(obs_dim + d, 1) for _ in range(2)]
    targets = [net(obs_dim + d, 1) for _ in range(2)]
    log_std = nn.Parameter(torch.zeros(d))
    adams = {
        "value": torch.optim.Adam(value.parameters(), 3e-4),
        "actor": torch.optim.Adam([*actor.parameters(), log_std], 3e-4),
        "critic": torch.optim.Adam([p for critic in critics for p in critic.parameters()], 3e-4),
    }

    def take(name: str, loss: torch.Tensor) -> None:
        adams[name].zero_grad()
        loss.backward()
        adams[name].step()

    def gumbel(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        z = (q - v).clamp(max=7.0)
        top = z.detach().max().clamp(min=-1.0)
        return ((z - top).exp() - (z + 1) * (-top).exp()).mean()

    def plain(batch: dict[str, torch.Tensor]) -> None:
        obs, action, next_obs = batch["obs"], batch["action"], batch["next_obs"]
        pair = torch.cat([obs, action], 1)
        with torch.no_grad():
            q = torch.min(*(target(pair) for target in targets)).squeeze(1)
        v = value(obs).squeeze(1)
        take("value", gumbel(q, v) if kind == "recoil" else chi2(q, v, 0.8).mean())
        with torch.no_grad():
            advantage = q - value(obs).squeeze(1)
            weight = (3.0 * advantage).clamp(max=float(np.log(100.0))).exp()
        law = torch.distributions.Normal(torch.tanh(actor(obs)), log_std.clamp(-5, 2).exp())
        take("actor", -(weight * law.log_prob(action).sum(1)).mean())
        with torch.no_grad():
            following, done = value(next_obs).squeeze(1), batch["terminated"].float()
            if kind == "recoil":
                y = -2 + batch["discount"] * ((1 - done) * following - done * 200.0)
            else:
                y = batch["reward"] + batch["discount"] * (1 - done) * following
        if kind == "recoil":
            expert = torch.cat([batch["expert_obs"], batch["expert_action"]], 1)
            both = torch.cat([expert, pair])
            halves = [critic(both).squeeze(1).chunk(2) for critic in critics]
            loss = sum(0.5 * (F.mse_loss(e, torch.full_like(e, 200.0)) + F.mse_loss(x, y)) for e, x in halves)
        else:
            loss = sum(F.mse_loss(critic(pair).squeeze(1), y) for critic in critics)
        assert isinstance(loss, torch.Tensor)
        take("critic", loss)
        with torch.no_grad():
            for target, critic in zip(targets, critics, strict=True):
                for t, s in zip(target.parameters(), critic.parameters(), strict=True):
                    t.lerp_(s, 0.005)

    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(60):
        rows = agents["off"].batch()
        seconds["plain PyTorch"].append(arsq.timed(lambda rows=rows: plain(rows)))
        for mode, name in (("off", "rlkit, eager"), ("on", "rlkit, compiled")):
            seconds[name].append(arsq.timed(lambda agent=agents[mode], rows=rows: agent.update(rows)))
    print(json.dumps({key: median(values[10:]) for key, values in seconds.items()}))


def speed(repeats: int) -> list[dict[str, Any]]:
    rows = []
    for repeat in range(repeats):
        for kind in ("dual_rl", "recoil"):
            found = common.call(__file__, "clock", kind, threads=1)
            rows += [
                {"trainer": kind, "side": side, "repeat": repeat, "seconds": s, **machine(PACKAGES)}
                for side, s in found.items()
            ]
    return rows


# --- the suite -------------------------------------------------------------------------------------------------------


def planned(quick: bool) -> list[tuple[str, str, dict[str, Any], int, int, int]]:
    """(task, side, fields, seed, updates, episodes) of all runs: seed by seed, so that all sides grow together."""
    if quick:
        return [("pendulum-expert", side, fields, 0, 200, 2) for side, fields in SIDES.items()]
    jobs = []
    for seed in range(SEEDS):
        for task, env in TASKS.items():
            episodes = 20 if env == "Pendulum-v1" else 5
            jobs += [(task, side, fields, seed, UPDATES, episodes) for side, fields in SIDES.items()]
        for task in SWEPT:
            for divergence, levels in SWEEP.items():
                jobs += [
                    (task, f"sweep: {divergence}", {"divergence": divergence, "lam": lam}, seed, SWEEP_UPDATES, 0)
                    for lam in levels
                ]
    return jobs


def main(quick: bool = False) -> str:
    """Run what is missing, then write the figure and the table; returns the table."""
    name = "dual-rl-quick" if quick else "dual-rl"
    raw, tables, clocked = (RESULTS / f"{name}{part}.csv" for part in ("", "-unification", "-speed"))
    if quick:
        for path in (raw, tables, clocked):
            path.unlink(missing_ok=True)
    done = {(row["task"], row["side"], row["lam"], int(row["seed"])) for row in read(raw)}
    jobs = planned(quick)
    missing = [job for job in jobs if (job[0], job[1], str(job[2].get("lam", "")), job[3]) not in done]
    for (task, seed), group in itertools.groupby(missing, key=lambda job: (job[0], job[3])):
        recorded(task)
        subprocess.run([sys.executable, __file__, json.dumps(list(group)), str(raw)], check=True)
        print(f"done: {task}, seed {seed}", flush=True)
    if not tables.exists():
        append(tables, unification(3 if quick else 20))
    if not clocked.exists():
        append(clocked, speed(1 if quick else 5))
    text = report(read(raw), read(tables), read(clocked), len(jobs))
    (RESULTS / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    figure(read(raw), RESULTS / f"{name}.png")
    return text


def report(
    rows: list[dict[str, str]], tables: list[dict[str, str]], clocked: list[dict[str, str]], planned: int
) -> str:
    """Scores by task and side, shares of diverged runs, the unification, and the time of an update."""
    parts = []
    if len(rows) < planned:
        parts.append(f"Unfinished: {len(rows)} of {planned} runs.")
    lines = []
    for task in TASKS:
        runs = {side: [row for row in rows if (row["task"], row["side"]) == (task, side)] for side in SIDES}
        if any(runs.values()):
            first = next(row for found in runs.values() for row in found)
            lines.append([task, *(scored(found) for found in runs.values()), first["data"]])
    parts.append(
        "D4RL's normalised score of the last iterate (mean return of Pendulum-v1), interquartile mean over seeds:\n\n"
        + table(["task", *SIDES, "data"], lines)
    )
    lines = []
    for divergence, levels in SWEEP.items():
        swept = [row for row in rows if row["side"] == f"sweep: {divergence}"]
        if swept:
            of = {lam: [int(row["diverged"]) for row in swept if float(row["lam"]) == lam] for lam in levels}
            cells = [f"{lam:g}: {sum(found)} of {len(found)}" for lam, found in of.items() if found]
            total = [int(row["diverged"]) for row in swept]
            lines.append([divergence, f"{sum(total)} of {len(total)} ({100 * np.mean(total):.0f} %)", "; ".join(cells)])
    parts.append("Runs that diverged, by lam or temperature:\n\n" + table(["value loss", "all", "each"], lines))
    header = ["method", "dual", "divergence", "equals", "tables", "largest_difference"]
    parts.append(
        "Duals of random tables against what they are duals of, alpha = 1:\n\n"
        + table([name.replace("_", " ") for name in header], [[row[name] for name in header] for row in tables])
    )
    lines = []
    for kind in dict.fromkeys(row["trainer"] for row in clocked):
        of = {
            side: [float(row["seconds"]) for row in clocked if (row["trainer"], row["side"]) == (kind, side)]
            for side in dict.fromkeys(row["side"] for row in clocked)
        }
        plain = of["plain PyTorch"]
        for side, seconds in of.items():
            factor = median(p / s for p, s in zip(plain, seconds, strict=True))
            lines.append([kind, side, f"{1e3 * median(seconds):.2f} ms", f"{factor:.2f}"])
    parts.append(
        "An update, 256 transitions, 2 x 256 hidden units; updates a second as a multiple of the plain one's:\n\n"
        + table(["trainer", "side", "time", "multiple"], lines)
    )
    parts += sorted({f"{r['processor']}, {r['cores']} cores, 1 thread a run; {r['versions']}" for r in rows})
    return "\n\n".join(parts)


def scored(runs: list[dict[str, str]]) -> str:
    """Interquartile mean of scores, of returns where there is no reference, with the runs that diverged."""
    key = "final" if runs and runs[0]["score"] == "nan" else "score"
    values = [float(run[key]) for run in runs if run["stopped"] == ""]
    if not values:
        return "-"
    mean, low, high = interquartile(values)
    text = f"{mean:.1f}" + ("" if np.isnan(low) else f" [{low:.1f}, {high:.1f}]")
    wrong = sum(int(run["diverged"]) for run in runs)
    return text + (f", {wrong} of {len(runs)} diverged" if wrong else "")


def figure(rows: list[dict[str, str]], path: Path) -> None:
    """The mean of V as a share of the most it can be against lam, a panel a data set; one line a value loss."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    canvas, axes = plt.subplots(1, len(SWEPT), figsize=(4 * len(SWEPT), 3.2), squeeze=False)
    for axis, task in zip(axes.flat, SWEPT, strict=True):
        for number, (divergence, levels) in enumerate(SWEEP.items()):
            runs = [row for row in rows if (row["task"], row["side"]) == (task, f"sweep: {divergence}")]
            if runs:
                shares = {
                    lam: [abs(float(r["v_mean"])) / float(r["v_most"]) for r in runs if float(r["lam"]) == lam]
                    for lam in levels
                }
                places = [i for i, lam in enumerate(levels) if shares[lam]]
                finite = [np.nan_to_num(shares[levels[i]], nan=1e6, posinf=1e6) for i in places]
                axis.plot(places, [np.median(found) for found in finite], "o-", color=f"C{number}", label=divergence)
        axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
        axis.set_yscale("log")
        axis.set_title(task, fontsize=9)
        axis.set_xlabel("lam or temperature, from the first of the sweep to the last", fontsize=7)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=7)
    axes.flat[0].set_ylabel("|mean V| / max |r| (1 - gamma)", fontsize=7)
    if axes.flat[0].lines[1:]:
        axes.flat[0].legend(frameon=False, fontsize=7)
    canvas.suptitle("value of the data's states after training; above the dotted line none can be", fontsize=9)
    canvas.tight_layout()
    canvas.savefig(path, dpi=90)
    plt.close(canvas)


if __name__ == "__main__":
    if sys.argv[1] == "clock":
        clock_one(sys.argv[2])
    else:
        for job in json.loads(sys.argv[1]):
            run_one(*job, Path(sys.argv[2]))
