"""ReCOIL's claim: imitation from a few labelled expert transitions and poor data, against cloning and a discriminator.

Data: `rlkit/Corridor-v0`'s recordings of random walks with a few episodes of its expert, and for HalfCheetah-v5,
Hopper-v5 and Walker2d-v5 random actions with five episodes of the last policy of SAC ("random + few expert"), or
without them; the labelled expert data are one episode more. SAC is trained as in the suite `dual-rl`.

Sides: ReCOIL as the authors' code runs it (least squares) and by the dual with chi-square; SMODICE, whose reward is a
discriminator's, with both of its duals; behaviour cloning of the data, and of the labelled episode alone. All have the
same networks, batches and updates. Scores are the mean return of the last iterate; AUC is how well ReCOIL's Q ranks the
unlabelled expert transitions in the data above the others.

Given are interquartile means over seeds with 95 % bootstrap intervals. Runs have one thread, one at a time.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dual_rl
import numpy as np
from common import RESULTS, append, interquartile, machine, read, runs_of, table

PACKAGES = ("rlkit-trainers", "torch", "gymnasium", "mujoco", "minari", "numpy")
CORRIDOR = "rlkit/Corridor-v0"
FEW = 5
KINDS = {"few": "random + few expert", "none": "random"}
TASKS: dict[str, tuple[str, str]] = {"Corridor, random + few expert": (CORRIDOR, "few")} | {
    f"{env}, {label}": (name, kind) for name, env in dual_rl.ENVS.items() for kind, label in KINDS.items()
}
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "ReCOIL": ("ReCOIL", {}),
    "ReCOIL, chi-square": ("ReCOIL", {"form": "chi2"}),
    "SMODICE, chi-square": ("SMODICE", {"divergence": "chi2", "gradient_penalty": 0.0}),
    "SMODICE, KL": ("SMODICE", {"divergence": "kl", "gradient_penalty": 0.0}),
    "cloning of the data": ("DualRL", {"policy_temperature": 0.0}),
    "cloning of the labelled": ("DualRL", {"policy_temperature": 0.0}),
}
SETTINGS: dict[str, Any] = {
    "batch_size": 256, "learning_rate": 1e-3, "policy_kwargs": {"net_arch": (128, 128)}, "offline_steps": "all",
    "normalize_obs": True,
}  # fmt: skip
OF_CORRIDOR: dict[str, Any] = {"policy_kwargs": {"net_arch": (64, 64)}, "gamma": 0.95, "normalize_obs": False}
OF_SIDE: dict[str, dict[str, Any]] = {
    "ReCOIL": {"gamma": 0.98, "policy_temperature": 1.0},
    "ReCOIL, chi-square": {"beta": 0.8, "value_temperature": 0.1, "policy_temperature": 10.0},
}
"""Changes in the corridor, of each side the best that was found; elsewhere the defaults stand."""
SEEDS, UPDATES = 5, 6_000


def recorded(name: str, kind: str) -> tuple[Any, Any]:
    """(data, labelled expert data) of a task, made where they are not there."""
    if name == CORRIDOR:
        return "rlkit.envs.corridor:mixed_data", "rlkit.envs.corridor:expert_data"
    raw = dual_rl.RAW
    os.environ["MINARI_DATASETS_PATH"] = str(raw / "minari")
    env, few = dual_rl.ENVS[name], str(dual_rl.EPISODES[name][0])
    ids = {"few": f"{name}/random-few-expert-v0", "none": f"{name}/random-v0", "labelled": f"{name}/labelled-v0"}
    for what in (kind, "labelled"):
        if not (raw / "minari" / ids[what]).is_dir():
            last = f"{dual_rl.trained(env)}/checkpoints/step-{dual_rl.SAC_STEPS:010d}"
            sources = {
                "few": [f"random:{env}", last, "--episodes", few, str(FEW)],
                "none": [f"random:{env}", "--episodes", few],
                "labelled": [last, "--episodes", "1", "--seed", "77"],
            }  # fmt: skip
            dual_rl.rlkit("data", "make", *sources[what], "--out", ids[what])
    return f"minari:{ids[kind]}", f"minari:{ids['labelled']}"


def run_one(task: str, side: str, seed: int, updates: int, episodes: int, out: Path) -> None:
    """Train one agent, evaluate it; append a row to `out`."""
    import torch

    import rlkit

    torch.set_num_threads(1)
    name, kind = TASKS[task]
    env = dual_rl.ENVS.get(name, name)
    data, labelled = recorded(name, kind)
    cls, fields = SIDES[side]
    settings = {**SETTINGS, **fields, **({**OF_CORRIDOR, **OF_SIDE.get(side, {})} if name == CORRIDOR else {})}
    if cls == "DualRL":
        settings["data"] = labelled if side.endswith("labelled") else data
    else:
        settings |= {"data": data, "expert_data": labelled}
    agent: Any = getattr(rlkit, cls)(
        env, seed=seed, device="cpu", eval_episodes=0, log_every=max(1, updates // 5),
        compile="on" if updates > 3_000 else "off", **settings,
    )  # fmt: skip
    began = time.perf_counter()
    agent.learn(updates)
    spent = time.perf_counter() - began
    record = agent.evaluate(episodes, seed=seed)
    row = {
        "task": task, "side": side, "seed": seed, "updates": updates, "final": round(record["eval/mean_reward"], 3),
        "success": record.get("eval/success_rate", ""), "auc": "",
        "data": f"{len(agent.data):,} transitions", "seconds": round(spent, 1),
    }  # fmt: skip
    if cls == "ReCOIL":
        row["auc"] = auc(agent, 8 if name == CORRIDOR else FEW, kind)
    append(out, [{**row, **machine(PACKAGES)}])


def auc(agent: Any, experts: int, kind: str) -> Any:
    """Of the least Q of recorded pairs, between the last `experts` episodes and the others; "" without any."""
    import torch
    from scipy.stats import rankdata

    if kind == "none":
        return ""
    data = agent.data
    ends = torch.nonzero(data["terminated"] | data["truncated"]).flatten()
    first = int(ends[-experts - 1]) + 1
    with torch.no_grad():
        q = agent.critic(agent.normalizer(data["obs"]), data["action"]).min(0).values.numpy()
    ranks, n = rankdata(q), len(q) - first
    return round(float((ranks[first:].sum() - n * (n + 1) / 2) / (n * first)), 3)


def planned(quick: bool) -> list[tuple[str, str, int, int, int]]:
    """(task, side, seed, updates, episodes) of all runs."""
    if quick:
        return [("Corridor, random + few expert", side, 0, 100, 3) for side in SIDES]
    corridor, others = (
        tuple(task for task, (name, _) in TASKS.items() if (name == CORRIDOR) == is_it) for is_it in (1, 0)
    )
    order = [(corridor, seed) for seed in range(SEEDS)] + [(others, seed) for seed in range(SEEDS)]
    return [
        (task, side, seed, UPDATES, 100 if tasks == corridor else 5)
        for tasks, seed in order
        for task in tasks
        for side in SIDES
    ]


def main(quick: bool = False) -> str:
    """Run what is missing, then write the table; returns it."""
    name = "recoil-quick" if quick else "recoil"
    raw = RESULTS / f"{name}.csv"
    if quick:
        raw.unlink(missing_ok=True)
    done = {(row["task"], row["side"], int(row["seed"])) for row in read(raw)}
    jobs = planned(quick)
    missing = [job for job in jobs if job[:3] not in done]
    for (task, seed), group in itertools.groupby(missing, key=lambda job: (job[0], job[2])):
        recorded(*TASKS[task])
        subprocess.run([sys.executable, __file__, json.dumps(list(group)), str(raw)], check=True)
        print(f"done: {task}, seed {seed}", flush=True)
    text = report(read(raw), len(jobs))
    (RESULTS / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    return text


def report(rows: list[dict[str, str]], jobs: int) -> str:
    """Final returns by task and side, successes where there are such, and AUC."""
    parts = [f"Unfinished: {len(rows)} of {jobs} runs."] if len(rows) < jobs else []
    lines = []
    for (task, side), runs in runs_of(rows, TASKS, SIDES).items():
        cells = [shown([float(run["final"]) for run in runs])]
        for key in ("success", "auc"):
            values = [float(run[key]) for run in runs if run[key] != ""]
            cells.append(shown(values) if values else "-")
        lines.append([task, side, str(len(runs)), *cells, runs[0]["data"]])
    parts.append(table(["task", "side", "seeds", "final return", "success", "AUC of Q", "data"], lines))
    parts += sorted({f"{r['processor']}, {r['cores']} cores, 1 thread a run; {r['versions']}" for r in rows})
    return "\n\n".join(parts)


def shown(values: list[float]) -> str:
    mean, low, high = interquartile(values)
    digits = ".0f" if abs(mean) >= 100 else ".2f"
    return f"{mean:{digits}}" + ("" if np.isnan(low) else f" [{low:{digits}}, {high:{digits}}]")


if __name__ == "__main__":
    for job in json.loads(sys.argv[1]):
        run_one(*job, Path(sys.argv[2]))
