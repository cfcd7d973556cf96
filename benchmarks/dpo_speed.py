"""Preference pairs a second of DPO: rlkit against TRL's DPOTrainer.

Both sides train the same model on the same pairs, one epoch, the same batch size, AdamW, no gradient checkpointing
unless the side says so, and the same number of threads; each run is a process of its own, and sides take turns. Time is
that of the epoch with all that the reference costs: the column that rlkit fills, the passes of TRL's default, or TRL's
precomputation. Loading and tokenising are left out on both sides. Before anything is timed, both sides compute the mean
loss of the same pairs under a policy that is not the reference, and it has to be the same.

Sides: `rlkit`, `trl` (its default, reference on the fly), `trl-precomputed`, the first two with gradient checkpointing
(`-ckpt`), rlkit without one technique each (`-plain`: prompts not shared; `-ungrouped`: batches not by length;
`-logits`: the model's own logits instead of ours by blocks; `-blas`: PyTorch's matrix products), and `rlkit-cached`, a
later run of the same model and pairs, whose reference is on disk. The sides after the third run once, at float32.

Precision bf16 is measured on every workload where its matrix products are the faster ones, and elsewhere on the
smallest model with few pairs, which is enough to say that nobody should use it there.

The arithmetic that the work takes at least, where every completion is computed after its prompt and nothing is padded,
is counted as well, so that the table can say which share of the machine's matrix-product rate a side reaches.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
from common import RESULTS, append, machine, read, table

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PACKAGES = ("rlkit-trainers", "torch", "transformers", "trl", "numpy")
MODELS = {"llama-5m-512": 128, "llama-5m-50k": 32, "stories260k": 128}
"""Model -> pairs of an epoch: enough that the first step's costs (memory, set-up) count little on the faster ones."""
DATA = ("hh_harmless_base", "alpacaeval_pairs")
MAIN = ("rlkit", "trl", "trl-precomputed")
LESS = {"plain": "sharing prompts", "ungrouped": "batches by length", "logits": "our log-probs", "blas": "oneDNN"}
SIDES = (*MAIN, "rlkit-ckpt", "trl-ckpt", *(f"rlkit-{less}" for less in LESS), "rlkit-cached")
FEW = 16
BATCH, MAX_LENGTH, REPEATS, THREADS = 8, 512, 3, 2


def build(name: str, folder: Path, seed: int = 0) -> None:
    """A model and its tokenizer in `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if name == "stories260k":
        source = SHARED / "models" / "stories260k"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
        if seed:
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    else:
        tokens = SHARED / "tokenizers" / "gpt2" if name.endswith("50k") else SHARED / "models" / "stories260k"
        tokenizer = AutoTokenizer.from_pretrained(tokens)
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=256, intermediate_size=704, num_hidden_layers=6,
                num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=1024, tie_word_embeddings=True,
            )
        )  # fmt: skip
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rows_of(data: str, pairs: int) -> list[dict[str, str]]:
    """The first pairs of a data set whose prompts leave room for a completion."""
    from rlkit.envs.preferences import read as read_data

    records = read_data(SHARED / "preferences" / data / "train.jsonl.gz").records
    rows = [
        {"prompt": r.prompt, "chosen": r.completions[0], "rejected": r.completions[1]}
        for r in records
        if isinstance(r.prompt, str) and len(r.prompt) < MAX_LENGTH
    ]
    return rows[:pairs]  # type: ignore[return-value]


def rlkit_trainer(folder: str, rows: list[dict[str, str]], precision: str, side: str, **options: Any) -> Any:
    import rlkit

    return rlkit.DPO(
        folder, train_dataset=rows, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
        max_length=MAX_LENGTH, eval_fraction=0, boundary="common", device="cpu", precision=precision,
        reference_cache=side.endswith("-cached"), gradient_checkpointing=side.endswith("-ckpt"),
        batching="plain" if side.endswith("-plain") else "auto", group_by_length=not side.endswith("-ungrouped"),
        matmul="blas" if side.endswith("-blas") else "auto",
        **options,
    )  # fmt: skip


def trl_trainer(folder: str, rows: list[dict[str, str]], precision: str, side: str, place: str, **options: Any) -> Any:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=place, num_train_epochs=1, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
        max_length=MAX_LENGTH, bf16=precision == "bf16", use_cpu=True, gradient_checkpointing=side.endswith("-ckpt"),
        precompute_ref_log_probs=side.endswith("-precomputed"), report_to=[], save_strategy="no", disable_tqdm=True,
        logging_steps=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return DPOTrainer(
        model, args=config, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder), **options,
    )  # fmt: skip


def without_head() -> None:
    """Let rlkit take the model's own logits."""
    import rlkit.lm.trainer

    rlkit.lm.trainer.find_head = lambda *args, **kwargs: None  # type: ignore[assignment]


def arithmetic(trainer: Any) -> dict[str, float]:
    """Tokens of the pairs, and GFLOP of an epoch of DPO on them: 4 forward passes' worth (policy forward, its backward
    twice, reference) of 2 operations a weight and token, 2 a weight of the head and trained token, and 2 a hidden unit,
    layer and pair of tokens of which one sees the other, for queries with keys and for weights with values.
    """
    from rlkit.lm.logps import Head, causal_lm

    lm: Any = causal_lm(trainer.model)
    head = Head.of(lm).module.weight.numel()
    body = sum(p.numel() for p in lm.base_model.parameters()) - lm.get_input_embeddings().weight.numel()
    lengths = trainer.completions.lengths("tokens").double()
    tokens, trained = float(lengths.sum()), float(trainer.completions["trained"].sum())
    seen = float((lengths * (lengths + 1) / 2).sum()) * lm.config.hidden_size * lm.config.num_hidden_layers
    return {"tokens": tokens, "gflop": 4 * (2 * body * tokens + 2 * head * trained + 4 * seen) / 1e9}


def check(model: str, data: str, precision: str) -> None:
    """Print both sides' mean loss of 16 pairs under a policy that is not the reference."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    rows = rows_of(data, 16)
    with tempfile.TemporaryDirectory() as folder:
        places = [str(Path(folder) / str(seed)) for seed in range(2)]
        for seed, place in enumerate(places):
            build(model, Path(place), seed)
        ours = rlkit_trainer(
            places[0], rows, precision, "rlkit", eval_dataset=rows, ref_model=places[1], eval_samples=0
        )
        ours.prepare(lambda: False)
        reference = AutoModelForCausalLM.from_pretrained(places[1], dtype=torch.float32)
        theirs = trl_trainer(
            places[0], rows, precision, "trl", folder, ref_model=reference, eval_dataset=Dataset.from_list(rows)
        )
        a, b = ours.evaluate(len(rows))["eval_loss"], theirs.evaluate()["eval_loss"]
    print(json.dumps({"rlkit": a, "trl": b}))


def count(model: str, data: str, pairs: str) -> None:
    """Print what an epoch takes at least."""
    with tempfile.TemporaryDirectory() as folder:
        build(model, Path(folder))
        print(json.dumps(arithmetic(rlkit_trainer(folder, rows_of(data, int(pairs)), "float32", "rlkit"))))


def run_one(model: str, data: str, side: str, pairs: int, precision: str) -> None:
    """One epoch; prints seconds, of them for the reference, and peak memory."""
    import torch

    torch.set_num_threads(THREADS)
    rows = rows_of(data, pairs)
    with tempfile.TemporaryDirectory() as folder:
        build(model, Path(folder) / "model")
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if side.startswith("rlkit"):
            os.environ["RLKIT_CACHE"] = str(Path(folder) / "cache")
            if side.endswith("-logits"):
                without_head()
            if side.endswith("-cached"):
                rlkit_trainer(str(Path(folder) / "model"), rows, precision, side).prepare(lambda: False)
            trainer = rlkit_trainer(str(Path(folder) / "model"), rows, precision, side)
            count = len(trainer.units)
            began = time.perf_counter()
            trainer.prepare(lambda: False)
            reference = time.perf_counter() - began
            trainer.learn()
            seconds = time.perf_counter() - began
        else:
            from trl import DPOTrainer

            spent = [0.0]
            compute = DPOTrainer._precompute_ref_logps

            def timed(*args: Any, **kwargs: Any) -> Any:
                began = time.perf_counter()
                result = compute(*args, **kwargs)
                spent[0] += time.perf_counter() - began
                return result

            DPOTrainer._precompute_ref_logps = timed
            trainer = trl_trainer(str(Path(folder) / "model"), rows, precision, side, folder)
            count = len(trainer.train_dataset)
            began = time.perf_counter()
            trainer.train()
            reference = spent[0]
            seconds = time.perf_counter() - began + reference
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes on Linux
    print(
        json.dumps(
            {"pairs": count, "seconds": seconds, "reference_seconds": reference, "memory": (peak - base) * unit / 2**20}
        )
    )


def about(model: str, data: str, precision: str, pairs: int) -> dict[str, Any]:
    """Both sides' losses, which have to be equal up to rounding, and what the work takes."""
    found = call("check", model, data, precision)
    # bf16 rounds a token's log-probability by about 0.05, on both sides, and a completion has hundreds of them
    if abs(found["rlkit"] - found["trl"]) > (1e-4 if precision == "float32" else 5e-2) * abs(found["trl"]):
        raise RuntimeError(f"{model} on {data} at {precision}: the losses differ, {found}; nothing is timed")
    return {"loss_rlkit": found["rlkit"], "loss_trl": found["trl"], **call("count", model, data, str(pairs))}


def matmul_rate(precision: str) -> float:
    """GFLOP/s of matrix products here and now: what the machine could do."""
    import torch

    torch.set_num_threads(THREADS)
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    a, times = torch.randn(1024, 1024, dtype=dtype), []
    for _ in range(12 if precision == "float32" else 3):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 2 * 1024**3 / median(times) / 1e9


def call(*args: str) -> dict[str, Any]:
    """Run this file in a process of its own."""
    return common.call(__file__, *args, threads=THREADS, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def main(quick: bool = False) -> str:
    if not SHARED.exists():
        return f"needs the preference data and models under {SHARED}"
    out = RESULTS / ("dpo-speed-quick.csv" if quick else "dpo-speed.csv")
    where = machine(PACKAGES)
    workloads = [(m, d, "float32", 16 if quick else pairs) for m, pairs in MODELS.items() for d in DATA]
    if matmul_rate("bf16") > matmul_rate("float32"):
        workloads += [(m, d, "bf16", pairs) for m, d, _, pairs in workloads]
    else:
        workloads.append(("stories260k", DATA[0], "bf16", FEW))
    facts: dict[tuple[str, str, str], dict[str, Any]] = {}
    done: dict[tuple[str, ...], int] = defaultdict(int)
    for row in read(out):
        done[row["model"], row["data"], row["precision"], row["side"]] += 1
    rounds = [(repeat, MAIN) for repeat in range(1 if quick else REPEATS)]  # all sides see the machine's moods
    for repeat, sides in rounds if quick else [rounds[0], (0, SIDES[len(MAIN) :]), *rounds[1:]]:
        for model, data, precision, pairs in workloads[: 1 if quick else None]:
            for side in sides:
                if done[model, data, precision, side] > repeat or (precision != "float32" and side not in MAIN):
                    continue
                if (model, data, precision) not in facts:
                    facts[model, data, precision] = about(model, data, precision, pairs)
                rate = matmul_rate(precision)
                result = call("run", model, data, side, str(pairs), precision)
                new = {"model": model, "data": data, "precision": precision, "side": side, "repeat": repeat}
                new |= {"pairs_per_second": round(result["pairs"] / result["seconds"], 4), **result}
                new |= {"matmul_gflops": round(rate, 1), **facts[model, data, precision]}
                append(out, [{**new, "threads": THREADS, "batch": BATCH, "max_length": MAX_LENGTH, **where}])
    return report(out)


def report(out: Path) -> str:
    """Medians and ratios as Markdown, also written beside the CSV."""
    found: dict[tuple[str, str, str], dict[str, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    rows = read(out)
    for row in rows:
        found[row["model"], row["data"], row["precision"]][row["side"]].append(row)

    def middle(members: list[dict[str, str]], key: str) -> float:
        return float(np.median([float(r[key]) for r in members])) if members else float("nan")

    def ratio(a: float, b: float) -> str:
        return f"{a / b:.2f}x" if a / b == a / b else "-"

    def figure(value: float, form: str) -> str:
        return format(value, form) if value == value else "-"

    lines, parts = [], []
    for (model, data, precision), sides in found.items():
        speed = {side: middle(sides[side], "pairs_per_second") for side in SIDES}
        memory = {side: middle(sides[side], "memory") for side in SIDES}
        lines.append(
            [
                model, data, precision, figure(speed['rlkit'], ".2f"), figure(speed['trl'], ".2f"),
                figure(speed['trl-precomputed'], ".2f"),
                ratio(speed['rlkit'], speed['trl']), ratio(speed['rlkit'], speed['trl-precomputed']),
                ratio(speed['rlkit-ckpt'], speed['trl-ckpt']),
                " / ".join(figure(memory[side], ".0f") for side in ("rlkit", "trl")),
            ]
        )  # fmt: skip
        share = middle(sides["rlkit"], "reference_seconds") / middle(sides["rlkit"], "seconds")
        reached = {
            side: np.median([float(r["gflop"]) / float(r["seconds"]) / float(r["matmul_gflops"]) for r in sides[side]])
            for side in ("rlkit", "trl") if sides[side]
        }  # fmt: skip
        first = {side: float(sides[side][0]["pairs_per_second"]) for side in SIDES if sides[side]}  # of one repeat
        whole = first.get("rlkit", float("nan"))
        gains = [ratio(whole, first.get(f"rlkit-{less}", float("nan"))) for less in LESS]
        parts.append(
            [
                model, data, precision, *gains, ratio(first.get("rlkit-cached", float("nan")), whole), f"{share:.0%}",
                f"{float(sides['rlkit'][0]['tokens']) / middle(sides['rlkit'], 'seconds'):,.0f}",
                " / ".join(f"{share:.0%}" for share in reached.values()),
            ]
        )  # fmt: skip
    header = (
        "model", "data", "precision", "rlkit pairs/s", "TRL", "TRL precomputed", "rlkit / TRL", "rlkit / precomputed",
        "both checkpointed", "peak MiB, rlkit / TRL",
    )  # fmt: skip
    ablation = (
        "model", "data", "precision", *LESS.values(), "reference from disk", "time in the reference", "tokens/s",
        "share of the matrix-product rate, rlkit / TRL",
    )  # fmt: skip
    counts = sorted({len(members) for sides in found.values() for members in sides.values() if members})
    runs = f"{counts[0]} to {counts[-1]} runs" if len(counts) > 1 else f"{counts[0]} run" + "s" * (counts[0] > 1)
    rates = {
        precision: np.median([float(r["matmul_gflops"]) for r in rows if r["precision"] == precision])
        for precision in sorted({r["precision"] for r in rows})
    }
    rate = " and ".join(f"{value:.3g} GFLOP/s ({precision})" for precision, value in rates.items())
    pairs = " or ".join(sorted({r["pairs"] for r in rows}, key=int))
    text = (
        f"{table(header, lines)}\n\nWhat each technique brings (speed with it over speed without, in the first run), "
        "where the time goes, and how near the arithmetic of unpadded rows comes to the machine's matrix products; "
        "with shared prompts, and with oneDNN beside the BLAS library that is measured, it can pass 100 %.\n\n"
        f"{table(ablation, parts)}\n\nMedians of {runs} of {pairs} pairs; {rows[-1]['threads']} threads on "
        f"{rows[-1]['cores']} cores of {rows[-1]['processor']}, matrix products at {rate}; "
        f"{rows[-1]['versions']}\n"
    )
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    if sys.argv[1] in ("check", "count"):
        {"check": check, "count": count}[sys.argv[1]](*sys.argv[2:])
    else:
        run_one(*sys.argv[2:5], int(sys.argv[5]), *sys.argv[6:])
