"""What trainers of language models share: batches, order, reference, adapters, folders, data errors, resumption."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sqlite3
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import StopAt, fingerprint, learn_with_stops, run_rlkit
from lm_zoo import PAIRS, saved_llama, tiny_llama

import rlkit
from rlkit.errors import CheckpointError, RlkitError, Stopped, UserError
from rlkit.lm import reference
from rlkit.lm.bytes import CHAT_TEMPLATE, byte_tokenizer
from rlkit.lm.models import classifier_of, load_model, weights_hash
from rlkit.lm.reference_cache import ReferenceCache, row_key
from rlkit.metrics import read_jsonl

SGD: dict[str, Any] = {
    "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0, "eval_fraction": 0,
    "device": "cpu", "beta": 0.5, "reference_cache": False,
}  # fmt: skip


def dpo(**fields: Any) -> Any:
    """DPO of a tiny Llama on six pairs."""
    model, tokenizer = tiny_llama(fields.pop("model_seed", 0))
    return rlkit.DPO(model, train_dataset=PAIRS, processing_class=tokenizer, **{**SGD, **fields})


def weights(trainer: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor], atol: float = 2e-6) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=1e-4)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return saved_llama(tmp_path / "model")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    return str(path)


# Batches


def test_how_a_step_is_cut_changes_nothing() -> None:
    """6 x 1 = 3 x 2 = 1 x 6, for a loss over pairs and one over tokens, after three steps of SGD."""
    for loss in (("sigmoid",), ("sigmoid", "sft"), ("ipo",)):
        whole = weights(dpo(per_device_train_batch_size=6, loss_type=loss).learn(3))
        for size in (3, 1):
            parts = dpo(per_device_train_batch_size=size, gradient_accumulation_steps=6 // size, loss_type=loss)
            same(weights(parts.learn(3)), whole)


@pytest.mark.parametrize(
    "other",
    [
        {"batching": "shared"},
        {"batching": "auto"},
        {"batching": "packed", "packing_length": 96},
        {"logits_memory": 0.01},
        {"gradient_checkpointing": True},
        {"attn_implementation": "eager"},
    ],
)
def test_speed_options_change_nothing(other: dict[str, Any], folder: str) -> None:
    options = {**SGD, "train_dataset": PAIRS, "per_device_train_batch_size": 6, "batching": "plain"}
    plain: Any = rlkit.DPO(folder, **options).learn(3)
    fast: Any = rlkit.DPO(folder, **{**options, **other})
    fast.learn(3)
    assert fast.batching == {"auto": "shared"}.get(name := other.get("batching", "plain"), name)
    assert fast.model.config._attn_implementation == other.get("attn_implementation", "sdpa")
    assert fast.model.model.layers[0].gradient_checkpointing == other.get("gradient_checkpointing", False)
    same(weights(fast), weights(plain))


@pytest.mark.parametrize("name", ["SFT", "RewardModel"])
def test_how_a_step_is_cut_changes_nothing_elsewhere(name: str, tmp_path: Path) -> None:
    """6 x 1 = 3 x 2 = 1 x 6: the gradient of every weight, to 1e-5 of its largest entry."""
    model, tokenizer = tiny_llama()
    if name == "RewardModel":  # a folder, because another head would be drawn each time
        rlkit.RewardModel(classifier_of(model), train_dataset=PAIRS, processing_class=tokenizer).save(
            tmp_path / "start"
        )
    else:
        model.save_pretrained(tmp_path / "start")
        tokenizer.save_pretrained(tmp_path / "start")
    options = {k: v for k, v in SGD.items() if k != "beta"} | {"learning_rate": 0.0}
    found = []
    for size in (6, 3, 1):
        trainer: Any = getattr(rlkit, name)(
            str(tmp_path / "start"), train_dataset=PAIRS, per_device_train_batch_size=size,
            gradient_accumulation_steps=6 // size, **options,
        )  # fmt: skip
        trainer.learn(1)
        found.append({n: p.grad for n, p in trainer.model.named_parameters()})
    for other in found[1:]:
        for key, gradient in found[0].items():
            assert float(gradient.abs().max()) > 1e-4, key
            assert float((other[key] - gradient).abs().max() / gradient.abs().max()) < 1e-5, key


def test_order_is_a_function_of_seed_and_epoch() -> None:
    trainer = dpo(per_device_train_batch_size=2)
    for epoch in (1, 2):
        order = [ids.tolist() for ids in trainer.order(epoch)]
        assert sorted(i for ids in order for i in ids) == list(range(6)), "each unit once"
        assert order == [ids.tolist() for ids in dpo(per_device_train_batch_size=2).order(epoch)]
    assert [i.tolist() for i in trainer.order(1)] != [i.tolist() for i in trainer.order(2)]
    assert [i.tolist() for i in trainer.order(1)] != [i.tolist() for i in dpo(seed=1).order(1)]


def test_batches_hold_units_of_similar_length() -> None:
    model, tokenizer = tiny_llama()
    data = [{"prompt": "p" * n, "chosen": "a", "rejected": "b"} for n in range(1, 65)]
    options = {**SGD, "per_device_train_batch_size": 8}
    grouped: Any = rlkit.DPO(model, train_dataset=data, processing_class=tokenizer, **options)
    mixed: Any = rlkit.DPO(model, train_dataset=data, processing_class=tokenizer, group_by_length=False, **options)

    def padding(trainer: Any) -> int:
        lengths = trainer.unit_lengths(trainer.units)
        return sum(int(lengths[ids].max()) * len(ids) - int(lengths[ids].sum()) for ids in trainer.order(1))

    assert padding(grouped) == 8 * sum(range(8))  # each batch of eight neighbours pads 0 + 1 + ... + 7
    assert padding(mixed) > 3 * padding(grouped)


def test_an_epoch_is_every_unit_once() -> None:
    trainer = dpo(per_device_train_batch_size=4)
    assert trainer.default_target() == 2
    trainer.learn()
    assert (trainer.clock, trainer.updates, trainer.epoch) == (2, 2, 1)
    assert dpo(per_device_train_batch_size=4, num_train_epochs=2.5).default_target() == 5


def test_learning_rate_follows_the_schedule_of_transformers() -> None:
    """Linear with warm-up of 2 of 8 steps: 0, 1/2, 1, 5/6, ..., 1/6 of the peak."""
    trainer = dpo(learning_rate=0.6, lr_scheduler_type="linear", warmup_steps=2, per_device_train_batch_size=6)
    seen: list[float] = []
    trainer.learn(8, callback=lambda t: seen.append(t.optimizer.param_groups[0]["lr"]))
    assert seen == pytest.approx([0.0, 0.3, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_gradients_are_clipped() -> None:
    """With clipping to c, plain SGD moves the weights by exactly rate * c where the norm is larger."""
    trainer = dpo(max_grad_norm=0.01, learning_rate=1.0, per_device_train_batch_size=6)
    before = weights(trainer)
    trainer.learn(1)
    moved = torch.sqrt(sum((a - b).square().sum() for a, b in zip(weights(trainer), before, strict=True)))
    assert float(moved) == pytest.approx(0.01, rel=1e-3)


# The reference


def test_the_reference_is_the_start_and_stays() -> None:
    trainer = dpo(per_device_train_batch_size=6, log_every=1)
    trainer.learn(1)
    start = trainer.log.history[0]
    assert start["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert start["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    column = [row.clone() for row in trainer.completions["ref_logp"]]
    trainer.learn(3)
    assert all(torch.equal(a, b) for a, b in zip(column, trainer.completions["ref_logp"], strict=True))
    assert abs(trainer.log.history[-1]["rewards/margins"]) > 0.01


def test_at_the_start_policy_and_reference_are_one(folder: str, rows: str, tmp_path: Path) -> None:
    """Before the first update: loss log 2, rewards 0 and KL 0 on held-out pairs and their samples; and not after it."""
    fields = {**SGD, "eval_fraction": 0.5, "eval_kl": True, "max_completion_length": 8, "learning_rate": 0.5}
    rlkit.DPO(folder, train_dataset=rows, out=str(tmp_path / "run"), **fields).learn(2)
    before, after = read_jsonl(tmp_path / "run" / "eval.jsonl")
    assert (before["step"], after["step"]) == (0, 2)
    assert before["eval_loss"] == pytest.approx(np.log(2), abs=1e-5)
    for name in ("eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins", "eval_kl"):
        assert before[name] == pytest.approx(0, abs=1e-4), name
        assert abs(after[name]) > 0.01, name


@pytest.mark.parametrize(
    "fields", [{}, {"use_peft": True}, {"use_peft": True, "gradient_checkpointing": True}], ids=lambda f: "+".join(f)
)
def test_the_first_update_changes_what_is_trained(fields: dict[str, Any], folder: str) -> None:
    """All weights; of an adapter B, which is 0 at first, so that A has no gradient yet; and nothing else."""
    trainer: Any = rlkit.DPO(folder, train_dataset=PAIRS, **SGD, **fields)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.learn(1)
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if not fields or ".lora_B." in name}


def test_the_reference_of_a_trained_adapter_is_that_adapter(folder: str, rows: str, tmp_path: Path) -> None:
    """Where training goes on with an adapter it starts from, the reference has it, too: not silently the base model."""
    fields = {**SGD, "optim": "adamw", "learning_rate": 1e-2}
    first: Any = rlkit.DPO(folder, train_dataset=rows, use_peft=True, lora_r=2, **fields)
    start = str(first.learn(4).save(tmp_path / "adapter"))
    second: Any = rlkit.DPO(start, train_dataset=rows, out=str(tmp_path / "run"), log_every=1, **fields)
    assert second.identity["start"] == weights_hash(load_model(start))
    second.learn(2)
    assert second.log.history[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert abs(second.log.history[1]["rewards/margins"]) > 0.01
    assert second.identity["reference"] == weights_hash(load_model(start)) != weights_hash(load_model(folder))
    resumed: Any = rlkit.resume(tmp_path / "run")
    assert reference_is_kept(resumed)


def reference_is_kept(trainer: Any) -> bool:
    """Whether the reference gives the log-probs in its column, and the policy, which was trained, others."""
    columns = trainer.columns(trainer.units, torch.arange(len(trainer.units)))
    with torch.no_grad(), trainer.reference() as model:
        theirs = trainer.score(columns, model=model).logp
    own = trainer.score(columns).logp
    return bool((theirs - columns["ref_logp"]).abs().max() < 1e-4 < 1e-3 < (own - columns["ref_logp"]).abs().max())


@pytest.mark.parametrize("given", ["model", "ref_model", "adapter"])
def test_a_resumed_run_keeps_its_reference(given: str, folder: str, rows: str, tmp_path: Path) -> None:
    """Never the policy as it is at resume, nor what has taken the place of the reference's files meanwhile."""
    fields: dict[str, Any] = {**SGD, "learning_rate": 0.5, "use_peft": given == "adapter"}
    if given == "ref_model":
        fields["ref_model"] = saved_llama(tmp_path / "other", seed=1)
    source = Path(fields.get("ref_model", folder))
    run = tmp_path / "run"
    rlkit.DPO(folder, train_dataset=rows, out=str(run), **fields).learn(3)
    resumed: Any = rlkit.resume(run)
    assert reference_is_kept(resumed)
    saved_llama(source, seed=2)
    resumed = rlkit.resume(run, allow_changes=True)
    words = "the reference is not the one that the run began with .* restore the model's folder, or start a new run"
    with pytest.raises(RlkitError, match=words), resumed.reference():
        pass


def test_the_reference_of_a_model_given_in_python_is_asked_for(tmp_path: Path) -> None:
    dpo(out=str(tmp_path / "run")).learn(3)
    resumed: Any = rlkit.resume(tmp_path / "run")
    with pytest.raises(UserError, match="pass it again as `ref_model=`"), resumed.reference():
        pass
    resumed = rlkit.resume(tmp_path / "run", ref_model=tiny_llama(1)[0])
    with pytest.raises(RlkitError, match="the reference is not the one"), resumed.reference():
        pass
    resumed = rlkit.resume(tmp_path / "run", ref_model=tiny_llama()[0])
    assert reference_is_kept(resumed)


def test_another_reference(folder: str, tmp_path: Path) -> None:
    """Given as a folder or as a model, it is the same, and not the start."""
    other = saved_llama(tmp_path / "other", seed=1)
    by_folder = dpo(ref_model=other, per_device_train_batch_size=6).learn(2)
    by_model = dpo(ref_model=load_model(other), per_device_train_batch_size=6).learn(2)
    same(weights(by_folder), weights(by_model), atol=0)
    assert by_folder.identity["reference"] == weights_hash(load_model(other)) != by_folder.identity["start"]


CACHED: list[tuple[dict[str, Any], int]] = [  # fields, and how many of the six units are in the cache by then
    ({}, 0),
    ({}, 6),
    ({"seed": 3, "beta": 0.1, "loss_type": ("ipo",), "learning_rate": 1e-3}, 6),
    ({"model_seed": 1}, 0),
    ({"batching": "plain"}, 0),
    ({"max_length": 40}, 0),
    ({"precision": "bf16"}, 0),
    ({"logits_memory": 1}, 0),
    ({"attention": "eager"}, 0),
    ({"data": "chats"}, 0),
    ({"data": "chats"}, 6),
    ({"data": "chats", "chat_template": "mine"}, 0),
    ({"bos": False}, 0),
    ({"ref_model": "seed 1"}, 6),
    ({"ref_model": "seed 2"}, 0),
    ({}, 6),
]


def test_the_cache_serves_equal_models_and_rows_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On disk without being asked to; runs and losses share what model, tokenizer, template, length, precision and
    rows decide, and the numbers are those of a run without a cache.
    """
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    chats = [
        {name: [{"role": "user" if name == "prompt" else "assistant", "content": row[name]}] for name in row}
        for row in PAIRS
    ]
    found = []
    for given, _ in CACHED:
        fields = {**SGD, "per_device_train_batch_size": 6, **given}
        data = chats if fields.pop("data", "") == "chats" else PAIRS
        seed, attention = fields.pop("model_seed", 0), fields.pop("attention", "sdpa")
        start, again = (tiny_llama(seed, attn_implementation=attention)[0] for _ in range(2))
        fields["processing_class"] = byte_tokenizer(bos=fields.pop("bos", True))
        if "chat_template" in fields:
            fields["chat_template"] = CHAT_TEMPLATE.replace("bos_token", "bos_token ~ '!'")
        if "ref_model" in fields:
            fields["ref_model"] = tiny_llama(int(fields["ref_model"][-1]))[0]
        del fields["reference_cache"]
        trainer: Any = rlkit.DPO(start, train_dataset=data, **fields)
        trainer.learn(1)
        line = next(text for text in capsys.readouterr().err.splitlines() if text.startswith("reference"))
        found.append(int(line.split(": ")[1].split()[0]))
        fresh: Any = rlkit.DPO(again, train_dataset=data, reference_cache=False, **fields)
        fresh.learn(1)
        capsys.readouterr()
        same(weights(trainer), weights(fresh), atol=0)
    assert found == [count for _, count in CACHED]


def test_a_broken_cache_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identity, key = {"weights": "w"}, row_key(np.arange(4, dtype=np.int32), np.array([0, 0, 1, 1], bool))
    with ReferenceCache(identity, tmp_path) as cache:
        cache.put([(key, np.array([-1.0, -2.0], np.float32))])
    with ReferenceCache(identity, tmp_path) as cache:
        (value,) = cache.get([key], [2])
        assert value is not None
        assert value.tolist() == [-1.0, -2.0]
        assert cache.get([key], [3]) == [None], "a row of another length is another row"
        others = [row_key(np.arange(4, dtype=np.int32), np.array(m, bool)) for m in ([0, 1, 0, 1], [0, 1, 1, 0])]
        assert cache.get(others, [2, 2]) == [None, None], "as is one whose trained tokens are others"
    with ReferenceCache({"weights": "x"}, tmp_path) as cache:
        assert cache.get([key], [2]) == [None]
    (path,) = [p for p in tmp_path.glob("*.sqlite") if _rows(p)]
    path.write_bytes(b"no database" * 500)
    with ReferenceCache(identity, tmp_path) as cache:
        cache.put([(key, np.array([-1.0, -2.0], np.float32))])
        assert cache.get([key], [2]) == [None]
    assert "reference cache switched off" in capsys.readouterr().err


def _rows(path: Path) -> int:
    with sqlite3.connect(path) as db:
        return int(db.execute("SELECT count(*) FROM rows").fetchone()[0])


def test_a_reference_that_is_not_the_start_is_noticed() -> None:
    """Log-probs of another arithmetic in the column: here, shifted by hand."""
    trainer = dpo(per_device_train_batch_size=6)
    trainer.prepare(lambda: False)
    trainer.completions["ref_logp"] = [row + 0.1 for row in trainer.completions["ref_logp"]]
    with pytest.raises(RlkitError, match="log-probs of a completion differ by"):
        reference.check_start(trainer)


def test_dropout_is_off_unless_asked_for() -> None:
    model, tokenizer = tiny_llama(attention_dropout=0.3)
    options = {**SGD, "train_dataset": PAIRS, "processing_class": tokenizer}
    rlkit.DPO(model, **options).learn(1)
    model, tokenizer = tiny_llama(attention_dropout=0.3)
    with pytest.raises(RlkitError, match="Dropout in the model is the usual cause"):
        rlkit.DPO(model, disable_dropout=False, **options).learn(1)


# Adapters and folders


def test_an_adapter_trains_alone_and_its_reference_is_the_model_without_it(folder: str, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    trainer: Any = rlkit.DPO(folder, train_dataset=PAIRS, use_peft=True, lora_r=4, out=str(tmp_path / "run"), **SGD)
    trainer.learn(3)
    base = load_model(folder)
    assert trainer.identity["reference"] == weights_hash(base)
    named = dict(trainer.model.get_base_model().named_parameters())
    for name, parameter in base.named_parameters():
        stem, _, leaf = name.rpartition(".")
        kept = named.get(f"{stem}.base_layer.{leaf}", named.get(name))
        assert kept is not None
        assert torch.equal(kept, parameter), name
    saved = trainer.save(tmp_path / "adapter")
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= {
        p.name for p in saved.iterdir()
    }
    assert not (saved / "model.safetensors").exists()
    merged = trainer.save(tmp_path / "merged", merged=True)
    ids = torch.arange(3, 20)[None]
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(ids).logits
        torch.testing.assert_close(AutoPeftModelForCausalLM.from_pretrained(saved).eval()(ids).logits, expected)
        torch.testing.assert_close(load_model(str(merged)).eval()(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_run_with_an_adapter_resumes_exactly(folder: str, rows: str, tmp_path: Path) -> None:
    def run(out: str) -> Any:
        fields = {**SGD, "optim": "adamw", "learning_rate": 1e-3, "checkpoint_every": 3, "eval_fraction": 0.3}
        return rlkit.DPO(folder, train_dataset=rows, use_peft=True, lora_r=4, out=str(tmp_path / out), **fields)

    run("whole").learn(12)
    learn_with_stops(run("parts"), 12, [2, 5, 11])
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")


def test_the_folder_of_an_adapter_does_not_depend_on_the_order_of_a_set(folder: str, rows: str, tmp_path: Path) -> None:
    trainer: Any = rlkit.DPO(folder, train_dataset=rows, use_peft=True, **SGD)
    place = trainer.save(tmp_path / "saved")
    names = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))["target_modules"]
    assert names == sorted(names)
    assert len(names) == 14


def test_an_adapter_of_virtual_tokens_comes_back(folder: str, rows: str, tmp_path: Path) -> None:
    """What peft saves of it is computed, not one of the model's tensors."""
    from peft import PromptTuningConfig

    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    options = {**SGD, "reference_cache": False, "disable_dropout": True}
    del options["beta"]
    trainer: Any = rlkit.SFT(folder, train_dataset=rows, peft_config=tuning, **options)
    place = trainer.learn(4).save(tmp_path / "saved")
    loaded: Any = rlkit.load(place)
    assert [torch.equal(a, b) for a, b in zip(weights(trainer), weights(loaded), strict=True)].count(False) == 0


def test_a_saved_folder_is_one_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = dpo(per_device_train_batch_size=6, eval_samples=0).learn(2)
    for place in (trainer.save(tmp_path / "saved"), trainer.write_checkpoint(tmp_path / "whole")):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
        same([p.detach() for p in model.parameters()], weights(trainer), atol=0)
        inputs = tokenizer("Name a colour.", return_tensors="pt")
        assert model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 4
        card = (place / "README.md").read_text(encoding="utf-8")
        assert trainer.identity["data"] in card
    assert not (tmp_path / "saved" / "buffer.safetensors").exists()
    assert {p.suffix for p in (tmp_path / "saved").iterdir()} <= {".safetensors", ".json", ".yaml", ".md", ".jinja"}


def test_rewards_of_evaluations_get_the_columns_of_the_data(folder: str, tmp_path: Path) -> None:
    """`answer` of each held-out prompt, as TRL passes it; also in a run that was resumed."""
    asked: list[dict[str, Any]] = []

    def right(prompts: list[str], completions: list[str], answer: list[Any], **columns: Any) -> list[float]:
        asked.append({"prompts": prompts, "answer": answer, **columns})
        assert len(completions) == len(answer)
        return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]

    rows = [{**pair, "answer": pair["chosen"].strip(), "source": {"page": n}} for n, pair in enumerate(PAIRS)]
    rows[1].pop("answer")
    options: dict[str, Any] = {"eval_samples": 4, "max_completion_length": 3, "eval_reward": ("columns_reward:right",)}
    module = types.ModuleType("columns_reward")
    module.right = right  # type: ignore[attr-defined]
    sys.modules["columns_reward"] = module
    try:
        trainer: Any = rlkit.DPO(
            folder, train_dataset=PAIRS, eval_dataset=rows, out=str(tmp_path / "run"), per_device_train_batch_size=2,
            device="cpu", **options,
        )  # fmt: skip
        trainer.learn(1)
        again: Any = rlkit.resume(tmp_path / "run")
        again.evaluate()
    finally:
        del sys.modules["columns_reward"]
    assert len(asked) == 3  # before, after, and resumed
    for one, step in zip(asked, (0, 1, 1), strict=True):
        numbers = [next(n for n, pair in enumerate(PAIRS) if pair["prompt"] == prompt) for prompt in one["prompts"]]
        assert numbers == [0, 1, 2, 3]
        assert one["answer"] == ["Blue, as the sea.", None, "4", "Good morning to you!"]
        assert one["source"] == [{"page": n} for n in numbers]
        assert all(isinstance(i, int) for ids in one["completion_ids"] for i in ids)
        assert one["trainer_state"].global_step == step


def test_rows_are_cut_to_the_models_positions(folder: str) -> None:
    """256 of them: longer rows are cut and said to be; samples are of prompts that leave room; else, TRL's 1024."""
    long = [{"prompt": "p" * n, "chosen": " yes, very much so", "rejected": " no"} for n in (100, 240, 250, 130)]
    options: dict[str, Any] = {"max_completion_length": 100, "eval_samples": 4, "device": "cpu"}
    trainer: Any = rlkit.DPO(folder, train_dataset=long, eval_dataset=long, **options)
    assert (trainer.max_length, trainer.config.max_length) == (256, "auto")
    assert trainer.completions.lengths("tokens").max() == 256
    assert any("at max_length=256" in note for note in trainer.notes)
    assert trainer.notes[-1].endswith("; 256 are the positions of the model")
    found = trainer.evaluate()  # before any update: the policy is the reference
    assert found["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [len(one["prompt"]) for one in found["samples"]] == [100, 130]
    short: Any = rlkit.DPO(folder, train_dataset=PAIRS, eval_fraction=0, device="cpu")
    assert not any("max_length" in note for note in short.notes)
    with pytest.raises(UserError, match="together more than the model's 256 positions"):
        rlkit.DPO(folder, train_dataset=long, eval_dataset=long, **{**options, "max_completion_length": 250}).evaluate()
    roomy, tokenizer = tiny_llama(max_position_embeddings=4096)
    assert rlkit.DPO(roomy, train_dataset=PAIRS, processing_class=tokenizer, eval_fraction=0).max_length == 1024


# Data and errors


def test_what_cannot_start_says_why(folder: str, rows: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    def message(**fields: Any) -> str:
        with pytest.raises(UserError) as caught:
            rlkit.DPO(**{"model": folder, "train_dataset": rows, **fields})
        return str(caught.value)

    assert "`data`: dpo needs data: --data FILE" in message(train_dataset=None)
    assert "`model`: dpo needs a causal language model" in message(model=None)
    near = message(model=str(Path(folder).parent / "modle"))
    assert "there is no" in near
    assert "did you mean `model`?" in near
    assert "cannot load" in message(model=str(tmp_path))
    assert "did you mean `pairs.jsonl`?" in message(train_dataset=str(Path(rows).with_name("pair.jsonl")))
    assert "unknown key `bta`; did you mean `beta`?" in message(bta=0.1)
    assert "take their settings as keywords" in message(args=object())
    lora = LoraConfig(task_type="CAUSAL_LM")
    frozen = load_model(folder).requires_grad_(False)
    assert "no weight of it is trainable" in message(model=frozen)
    assert "expected a causal language model of transformers" in message(model=torch.nn.Linear(2, 2))
    assert "no row of" in message(max_length=4)
    assert "`peft_config`" in message(use_peft=True, lora_target_modules=("nothing_of_that_name",))
    assert "`lora_r` has no effect without `--use_peft`" in message(lora_r=4)
    assert "`packing_length` has no effect without `--batching packed`" in message(packing_length=64)
    assert "`weight_decay` has no effect without `--optim adamw`" in message(optim="sgd", weight_decay=0.1)
    assert "with `peft_config` leave it out" in message(use_peft=True, peft_config=lora)


def test_rows_of_wrong_kinds(folder: str) -> None:
    def message(data: list[dict[str, Any]]) -> str:
        with pytest.raises(UserError) as caught:
            rlkit.DPO(folder, train_dataset=data)
        return str(caught.value)

    broken = [*PAIRS * 20, {"prompt": "p", "chosen": "c"}, {"prompt": "p", "chosen": "c"}]
    assert "row 120: missing `rejected`; found `prompt, chosen`" in message(broken)
    same_text = [{"prompt": "p", "chosen": "c", "rejected": "c"}]
    assert "row 0: `chosen` equals `rejected`" in message(same_text)
    labels = [{"prompt": "p", "completion": f"c{i}", "label": True} for i in range(5)]
    assert "needs both labels; found 5 \N{MULTIPLICATION SIGN} true" in message(labels)


PREFERENCES = [("2 + 2 =", " four", " 5 or so"), ("Name a colour.", " Blue, as the sea.", " Dog."), ("p", " a", " b")]
LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "explicit": [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PREFERENCES],
    "shared prefix": [{"chosen": p + c, "rejected": p + r} for p, c, r in PREFERENCES],
    "ranked": [{"prompt": p, "completions": [r, c], "scores": [-1, 2]} for p, c, r in PREFERENCES],
    "labels": [
        {"prompt": p, "completion": text, "label": label}
        for p, c, r in PREFERENCES
        for text, label in ((c, True), (r, False))
    ],
    "responses": [
        {"question": p, "responses": [{"text": c, "score": 9}, {"text": r, "score": 1}]} for p, c, r in PREFERENCES
    ],
    "numbered": [{"instruction": p, "output_1": r, "output_2": c, "preference": 2} for p, c, r in PREFERENCES],
}


def turn(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


CHATS: dict[str, list[dict[str, Any]]] = {
    "explicit": [
        {"prompt": turn("user", p), "chosen": turn("assistant", c), "rejected": turn("assistant", r)}
        for p, c, r in PREFERENCES
    ],
    "shared turns": [
        {"chosen": turn("user", p) + turn("assistant", c), "rejected": turn("user", p) + turn("assistant", r)}
        for p, c, r in PREFERENCES
    ],
    "ranked": [
        {"prompt": turn("user", p), "completions": [turn("assistant", r), turn("assistant", c)], "scores": [-1, 2]}
        for p, c, r in PREFERENCES
    ],
    "labels": [
        {"prompt": turn("user", p), "completion": turn("assistant", text), "label": label}
        for p, c, r in PREFERENCES
        for text, label in ((c, True), (r, False))
    ],
    "text beside conversations": [
        {
            "prompt": p,
            "chosen": turn("user", p) + turn("assistant", c),
            "rejected": turn("user", p) + turn("assistant", r),
        }
        for p, c, r in PREFERENCES
    ],
}


@pytest.mark.parametrize(("layouts", "marks"), [(LAYOUTS, "{}{}"), (CHATS, "<|user|>{}<eos><|assistant|>{}")])
def test_every_layout_of_a_preference_gives_the_same_pairs(layouts: dict[str, Any], marks: str) -> None:
    """The text of each side with one BOS in front and one EOS behind, which is trained with the completion."""
    model, tokenizer = tiny_llama()
    for layout, data in layouts.items():
        trainer: Any = rlkit.DPO(model, train_dataset=data, processing_class=tokenizer, **SGD)
        seen = []
        for side in ("chosen", "rejected"):
            one = trainer.completions.rows(trainer.units[side])
            for i, length in enumerate(one["tokens_length"].tolist()):
                tokens, mask = one["tokens"][i, :length], one["mask"][i, :length]
                seen.append((side, tokenizer.decode(tokens), tokenizer.decode(tokens[mask])))
        assert sorted(seen) == sorted(
            (side, f"<bos>{marks.format(p, text)}<eos>", f"{text}<eos>")
            for p, c, r in PREFERENCES
            for side, text in (("chosen", c), ("rejected", r))
        ), layout


def test_a_misread_ten_of_ultrafeedback_is_not_chosen() -> None:
    """An `overall_score` of 10 whose aspects say 1 counts as 1, so the other one is preferred; and it is said."""
    model, tokenizer = tiny_llama()
    low = {name: {"Rating": "1"} for name in ("helpfulness", "honesty", "instruction_following", "truthfulness")}
    row = {
        "instruction": "p",
        "completions": [
            {"response": "bad", "overall_score": 10, "annotations": low},
            {"response": "good", "overall_score": 6},
        ],
    }
    trainer: Any = rlkit.DPO(model, train_dataset=[row], processing_class=tokenizer, **SGD)
    one = trainer.completions.rows(trainer.units["chosen"])
    assert tokenizer.decode(one["tokens"][0]) == "<bos>pgood<eos>"
    assert "1 \N{MULTIPLICATION SIGN} `overall_score` 10 where the aspects' mean is at most 2: taken as 1" in (
        trainer.describe()
    )


def test_a_pair_that_truncation_empties_is_not_trained_on(folder: str) -> None:
    """Limit 8 with its BOS: prompts of 7 bytes leave nothing, of 6 one token; which is counted, with what would do."""
    data = [{"prompt": "p" * n, "chosen": "yes", "rejected": "no"} for n in (3, 6, 7, 20)]
    trainer: Any = rlkit.DPO(folder, train_dataset=data, max_length=8, **SGD)
    rows = trainer.completions.rows(torch.cat([trainer.units["chosen"], trainer.units["rejected"]]))
    assert len(trainer.units) == 2
    assert rows["trained"].tolist() == [4, 1, 3, 1]
    said = trainer.describe()
    assert (
        "4 of 8 completions: nothing trained is left and the row is not used at max_length=8; 64 holds 99 % of" in said
    )
    assert "2 of 8 completions: the completion is cut at max_length=8; 64 holds" in said
    trainer.learn(2)
    whole: Any = rlkit.DPO(folder, train_dataset=data[:2], max_length=8, **SGD).learn(2)
    same(weights(trainer), weights(whole), atol=0)


def test_held_out_prompts_are_not_trained_on(folder: str) -> None:
    data = [{"prompt": f"prompt {i // 2}", "chosen": "yes", "rejected": f"no {i}"} for i in range(200)]
    trainer: Any = rlkit.DPO(folder, train_dataset=data, eval_fraction=0.2)

    def prompts(units: Any) -> set[str]:
        found = set()
        for row in units["chosen"].tolist():
            one = trainer.completions.rows([row])
            found.add(one["tokens"][0, : int(one["prompt_length"][0])].numpy().tobytes())
        return found

    held, trained = prompts(trainer.eval_units), prompts(trainer.units)
    assert not held & trained
    assert len(held) + len(trained) == 100
    assert 8 <= len(held) <= 34  # 0.2 of 100 prompts, 3.5 standard deviations of a binomial either way


def test_a_changed_data_file_is_noticed_at_resume(folder: str, rows: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    rlkit.DPO(folder, train_dataset=rows, out=str(run), **SGD).learn(2)
    Path(rows).write_text(Path(rows).read_text(encoding="utf-8").replace("Dog", "Cat"), encoding="utf-8")
    with pytest.raises(UserError, match="data files") as caught:
        rlkit.resume(run)
    assert "--allow-changes" in str(caught.value)
    resumed: Any = rlkit.resume(run, allow_changes=True)
    resumed.learn(2)
    assert resumed.clock == 4


def test_a_stop_while_the_reference_is_computed(folder: str, rows: str, tmp_path: Path) -> None:
    """The run is saved, and goes on where it was: the end is that of a run without a stop."""
    fields = {**SGD, "per_device_train_batch_size": 2}
    whole: Any = rlkit.DPO(folder, train_dataset=rows, out=str(tmp_path / "whole"), **fields)
    whole.learn(4)
    run: Any = rlkit.DPO(folder, train_dataset=rows, out=str(tmp_path / "run"), **fields)
    passes = []
    score = run.score

    def stopping(*args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        if len(passes) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(*args, **kwargs)

    run.score = stopping
    with pytest.raises(Stopped):
        run.learn(4)
    assert len(passes) < 4
    resumed: Any = rlkit.resume(tmp_path / "run")
    assert resumed.clock == 0
    resumed.learn()
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_damaged_weights_are_not_loaded(folder: str, rows: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    rlkit.DPO(folder, train_dataset=rows, out=str(run), checkpoint_every=2, **SGD).learn(4)
    newest = run / "checkpoints" / "step-0000000004" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    assert rlkit.load(run, inference=True).clock == 2
    shutil.rmtree(run / "checkpoints" / "step-0000000002")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        rlkit.load(run)


def test_a_divergent_step_is_not_taken() -> None:
    trainer = dpo(learning_rate=1e38, per_device_train_batch_size=6)
    with pytest.raises(RlkitError, match=r"(grad_norm|loss) is (nan|inf)"):
        trainer.learn(20)


def test_stop_and_resume_of_a_run_from_files(folder: str, rows: str, tmp_path: Path) -> None:
    fields = {**SGD, "optim": "adamw", "per_device_train_batch_size": 2, "checkpoint_every": 2, "eval_fraction": 0.3}
    rlkit.DPO(folder, train_dataset=rows, out=str(tmp_path / "whole"), **fields).learn(9)
    run: Any = rlkit.DPO(folder, train_dataset=rows, out=str(tmp_path / "run"), **fields)
    with pytest.raises(Stopped):
        run.learn(9, callback=StopAt(5))
    done = run_rlkit("resume", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_an_update_that_would_change_nothing_is_an_error() -> None:
    """What is trainable takes no part in the loss, or passes no gradient on."""
    model, tokenizer = tiny_llama()
    model.requires_grad_(False)
    model.model.norm.unused = torch.nn.Parameter(torch.ones(2))
    trainer: Any = rlkit.DPO(model, train_dataset=PAIRS, processing_class=tokenizer, **SGD)
    with pytest.raises(UserError, match="the loss depends on no weight that is trainable"):
        trainer.learn(1)
    trainer = dpo()
    for layer in trainer.model.modules():
        if hasattr(layer, "weight"):
            layer.weight.register_hook(torch.zeros_like)
    with pytest.raises(UserError, match="the first update would change nothing"):
        trainer.learn(1)


def test_attention_of_a_model_given_in_python() -> None:
    assert dpo(attn_implementation="eager").model.config._attn_implementation == "eager"
    with pytest.raises(UserError, match="`attn_implementation`: nonsense is not possible with this model"):
        dpo(attn_implementation="nonsense")
