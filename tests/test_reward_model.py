"""The reward model: its loss, what it can start from, adapters whose head is trained and kept, its folder as a reward.

Its agreement with TRL's RewardTrainer is in test_parity_trl.py.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fingerprint, learn_with_stops
from lm_zoo import PAIRS, saved_classifier, saved_llama, tiny_classifier, tiny_llama

import rlkit
from rlkit import checkpoint
from rlkit.errors import UserError
from rlkit.lm.bytes import byte_tokenizer
from rlkit.lm.models import load_classifier, load_model, load_tokenizer
from rlkit.rewards.text import ModelReward, TextRewards
from rlkit.trainers.reward_model import bradley_terry_loss

SGD: dict[str, Any] = {
    "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0, "eval_fraction": 0,
    "device": "cpu", "per_device_train_batch_size": 6,
}  # fmt: skip
HEAD = "base_model.model.score.modules_to_save.default.weight"


def reward_model(**fields: Any) -> Any:
    """A reward model of a tiny classifier on six pairs."""
    model, tokenizer = tiny_classifier()
    given = {"model": model, "processing_class": tokenizer, "train_dataset": PAIRS}
    return rlkit.RewardModel(**{**given, **SGD, **fields})


def message(**fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        reward_model(**fields)
    return str(caught.value)


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def own_rewards(trainer: Any) -> list[float]:
    """Of the training pairs: chosen, rejected, chosen, ..."""
    trainer.model.eval()
    with torch.no_grad():
        rewards = trainer.rewards(trainer.columns(trainer.units, torch.arange(len(trainer.units))))
    trainer.model.train()
    return [float(reward) for reward in rewards]


def texts(rows: list[dict[str, Any]]) -> tuple[list[Any], list[Any]]:
    """(prompts, completions) in the order of `own_rewards`."""
    sides = ("chosen", "rejected")
    return [row["prompt"] for row in rows for _ in sides], [row[side] for row in rows for side in sides]


@pytest.fixture
def language(tmp_path: Path) -> str:
    """Folder of a causal language model."""
    return saved_llama(tmp_path / "language")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    return str(path)


# Loss and metrics


def test_loss_values() -> None:
    """-log s(x) = log(1 + e^-x) at x = r_w - r_l - margin."""
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 3.0, 2.0])
    expected = [math.log1p(math.exp(-x)) for x in (1.0, -3.0, 0.0)]
    assert bradley_terry_loss(chosen, rejected).tolist() == pytest.approx(expected)
    expected = [math.log1p(math.exp(-x)) for x in (0.5, -3.5, -0.5)]
    assert bradley_terry_loss(chosen, rejected, 0.5).tolist() == pytest.approx(expected)


def test_a_head_of_zeros_costs_log_two_and_rates_all_alike() -> None:
    model, tokenizer = tiny_classifier()
    torch.nn.init.zeros_(model.score.weight)
    trainer = reward_model(model=model, processing_class=tokenizer, eval_dataset=PAIRS, center_rewards_coefficient=0.3)
    record = trainer.evaluate()
    assert record["eval_loss"] == pytest.approx(math.log(2))
    for name in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
        assert record[f"eval_{name}"] == 0


def test_a_weight_of_two_is_the_pair_twice() -> None:
    """Of both terms of the loss. It is divided by the number of rows, so the learning rates are as 2 to 3."""
    fields = {"center_rewards_coefficient": 0.1, "log_every": 1}
    first, second = ({**row, "weight": w} for row, w in zip(PAIRS, (2.0, 1.0), strict=False))
    weighted = reward_model(train_dataset=[first, second], **{**fields, "learning_rate": 0.02}).learn(1)
    repeated = reward_model(train_dataset=[*PAIRS[:1] * 2, PAIRS[1]], **{**fields, "learning_rate": 0.03}).learn(1)
    for (name, a), b in zip(weights(weighted).items(), weights(repeated).values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5, msg=name)


def test_how_a_step_is_cut_changes_nothing() -> None:
    """6 x 1 = 3 x 2 = 1 x 6 after three steps: the weights, and every metric, the extremes included."""
    fields = {"log_every": 1, "center_rewards_coefficient": 0.05}
    whole = reward_model(**fields).learn(3)
    for size in (3, 1):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 6 // size}
        parts = reward_model(**fields, **cut).learn(3)
        for (name, a), b in zip(weights(parts).items(), weights(whole).values(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4, msg=name)
        for a, b in zip(parts.log.history, whole.log.history, strict=True):
            for key in ("loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key


def test_evaluation_does_not_depend_on_its_batches() -> None:
    records = [reward_model(eval_dataset=PAIRS, per_device_eval_batch_size=size).evaluate() for size in (1, 4, 8)]
    rewards = own_rewards(reward_model())
    for record in records:
        assert record["eval_min_reward"] == pytest.approx(min(rewards), abs=1e-6)
        assert record["eval_max_reward"] == pytest.approx(max(rewards), abs=1e-6)
        assert record["eval_mean_reward"] == pytest.approx(sum(rewards) / 12, abs=1e-6)


def test_an_encoder_is_computed_by_its_own_forward_pass(tmp_path: Path) -> None:
    """BERT reads its first token through a pooler; the saved folder gives the trainer's rewards."""
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.3, pad_token_id=0, **sizes)
    trainer = reward_model(model=BertForSequenceClassification(config), processing_class=tokenizer).learn(2)
    saved = BertForSequenceClassification.from_pretrained(trainer.save(tmp_path / "saved")).eval()
    for row, reward in zip(trainer.completions["tokens"], own_rewards(trainer), strict=True):
        with torch.no_grad():
            assert saved(row[None].long()).logits.item() == pytest.approx(reward, abs=1e-5)


def test_long_rows_lose_their_beginning_where_asked() -> None:
    """`keep_end`, limit 40: every row is kept, and ends as it did."""
    whole, cut = reward_model(), reward_model(max_length=40, truncation_mode="keep_end")
    assert len(cut.units) == 6
    assert max(len(row) for row in whole.completions["tokens"]) > 40
    for a, b in zip(whole.completions["tokens"], cut.completions["tokens"], strict=True):
        assert len(b) == min(len(a), 40)
        assert b[0] == a[0]
        assert b[1:].tolist() == a[len(a) - len(b) + 1 :].tolist()


# What it starts from


def test_a_language_model_gets_a_head_that_the_seed_decides(language: str) -> None:
    heads = []
    for seed in (0, 0, 1):
        trainer = reward_model(model=language, processing_class=None, seed=seed)
        assert "new weights, drawn by the seed: score.weight" in trainer.notes
        heads.append(trainer.model.score.weight.detach())
        body = load_model(language)
        for name, weight in trainer.model.model.named_parameters():
            assert torch.equal(weight, body.model.get_parameter(name)), name
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert not any("new weights" in note for note in reward_model().notes)


def test_models_that_are_no_reward_models(language: str, tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification, LlamaModel, MambaConfig, MambaForCausalLM

    two, tokenizer = tiny_classifier()
    two = LlamaForSequenceClassification(type(two.config)(**{**two.config.to_dict(), "num_labels": 2}))
    assert message(model=two) == "`model`: the LlamaForSequenceClassification has 2 labels; a reward model has one"
    two.save_pretrained(tmp_path / "two")
    tokenizer.save_pretrained(tmp_path / "two")
    assert "two is a classifier with 2 labels; a reward model has one" in message(model=str(tmp_path / "two"))
    assert "`model`: LlamaForCausalLM gives no reward; give its folder" in message(model=tiny_llama()[0])
    assert "`model`: LlamaModel gives no reward" in message(model=LlamaModel(two.config))
    assert "expected a causal language model of transformers, got Linear" in message(model=torch.nn.Linear(2, 2))
    # transformers has no classifier of this kind
    headless = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=2))
    headless.save_pretrained(tmp_path / "headless")
    assert "cannot load" in message(model=str(tmp_path / "headless"))
    # a file that lacks a part of the body, and one whose head has another shape
    from safetensors.torch import load_file, save_file

    for name, change in (("body", {}), ("head", {"score.weight": torch.zeros(3, 32)})):
        folder = tmp_path / name
        shutil.copytree(saved_classifier(tmp_path / "source"), folder, dirs_exist_ok=True)
        tensors = load_file(folder / "model.safetensors") | change
        if name == "body":
            del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        missing = {"body": "model.layers.1.mlp.up_proj.weight", "head": "score.weight is (3, 32)"}[name]
        assert missing in message(model=str(folder))


def test_a_reward_model_is_no_language_model(tmp_path: Path) -> None:
    """transformers would give it random output weights, and training would run."""
    folder = saved_classifier(tmp_path / "classifier")
    with pytest.raises(UserError, match=r"its files lack lm_head\.weight"):
        load_model(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eval_samples", 2),
        ("eval_kl", True),
        ("eval_reward", ("rlkit.envs.letters:reward",)),
        ("completion_only", True),
        ("assistant_only", True),
        ("ref_model", "somewhere"),
        ("ref_model", torch.nn.Linear(1, 1)),
        ("batching", "shared"),
        ("truncation_mode", "keep_start"),
    ],
)
def test_fields_without_a_meaning_are_refused(field: str, value: Any) -> None:
    assert message(**{field: value}).startswith(f"`{field}`: ")


def test_too_long_for_all_rows() -> None:
    assert (
        "no row of the list can be trained on; 12 of 12 completions: too long and not used at max_length=8"
        in message(max_length=8)
    )


# Adapters


def adapted(language: str, rows: str, out: Path | None, use_peft: bool = True, **fields: Any) -> Any:
    given = {"optim": "adamw", "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    given |= {"use_peft": True, "lora_r": 2} if use_peft else {}
    return rlkit.RewardModel(
        language, train_dataset=rows, out=None if out is None else str(out), **{**SGD, **given, **fields}
    )


def test_an_adapter_trains_the_head_and_keeps_it_bit_for_bit(language: str, rows: str, tmp_path: Path) -> None:
    trainer = adapted(language, rows, tmp_path / "run")
    before = weights(trainer)
    trainer.learn(6)
    after = weights(trainer)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert HEAD in trained
    assert all("lora_" in name for name in trained - {HEAD})
    for name, old in before.items():
        assert torch.equal(old, after[name]) is (name not in trained), name
    expected = own_rewards(trainer)
    places = (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-0000000006", trainer.save(tmp_path / "saved"))
    for place in places:
        loaded = rlkit.load(place, inference=True)
        for name, weight in weights(loaded).items():
            assert torch.equal(weight, after[name]), f"{place}: {name}"
    assert own_rewards(rlkit.load(tmp_path / "run")) == expected
    # once more saved, not a byte is different: peft adds the head's names again whenever it loads an adapter
    again = rlkit.load(tmp_path / "saved", inference=True).save(tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
        assert (again / name).read_bytes() == (tmp_path / "saved" / name).read_bytes(), name


def test_a_run_with_an_adapter_resumes_exactly(language: str, rows: str, tmp_path: Path) -> None:
    fields = {"checkpoint_every": 3, "eval_fraction": 0.3, "log_every": 2}
    adapted(language, rows, tmp_path / "whole", **fields).learn(12)
    learn_with_stops(adapted(language, rows, tmp_path / "parts", **fields), 12, [2, 5, 11])
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")


def test_the_embedded_task_with_an_adapter_is_the_same_with_and_without_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start is trained in the first run and read from the cache folder in the second."""
    from helpers import tiny

    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    hashes = []
    for name in ("cold", "warm"):
        tiny("reward_model", out=str(tmp_path / name), use_peft=True, lora_r=2).learn(5)
        hashes.append(fingerprint(tmp_path / name))
    assert hashes[0] == hashes[1]
    with pytest.raises(UserError, match="names no base model"):
        ModelReward(tmp_path / "warm")


def test_training_goes_on_from_an_adapter(language: str, rows: str, tmp_path: Path) -> None:
    """Given as a folder, or as a model of peft: adapter and head as they were left."""
    first = adapted(language, rows, None).learn(4)
    saved = str(first.save(tmp_path / "saved"))
    expected = own_rewards(first)
    fields = {**SGD, "train_dataset": rows}
    from_folder: Any = rlkit.RewardModel(saved, out=str(tmp_path / "run"), checkpoint_every=2, **fields)
    from_object: Any = rlkit.RewardModel(load_classifier(saved)[0], processing_class=load_tokenizer(saved), **fields)
    for trainer in (from_folder, from_object):
        assert own_rewards(trainer) == expected
        assert not any("new weights" in note for note in trainer.notes)
        trainer.learn(4)
    for (name, a), b in zip(weights(from_folder).items(), weights(from_object).values(), strict=True):
        # the head that the adapter's stands in for is in no file, and drawn anew
        assert torch.equal(a, b) or name == HEAD.replace("modules_to_save.default", "original_module"), name
    loaded = rlkit.load(tmp_path / "run")
    assert own_rewards(loaded) == own_rewards(from_folder)


def test_adapters_that_do_not_fit(language: str, rows: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    causal = LoraConfig(r=2, task_type="CAUSAL_LM")
    assert "its task_type is CAUSAL_LM; a reward model needs SEQ_CLS" in message(peft_config=causal)

    # without a task type peft trains no head
    def plain() -> Any:
        return LoraConfig(r=2, target_modules=["q_proj"])

    with pytest.raises(UserError, match="the head `score` is new, and would stay at its random weights"):
        rlkit.RewardModel(language, train_dataset=rows, peft_config=plain())
    assert "the head `score` is not trained" in reward_model(peft_config=plain()).notes
    asked = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"])
    trainer: Any = rlkit.RewardModel(language, train_dataset=rows, peft_config=asked, **SGD)
    assert HEAD in {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    # an adapter of a language model; one without its base; one in a pickle
    supervised: Any = rlkit.SFT(language, train_dataset=rows, use_peft=True, lora_r=2, **SGD)
    supervised.save(tmp_path / "sft")
    assert "is for CAUSAL_LM; expected one for SEQ_CLS: merge it" in message(model=str(tmp_path / "sft"))
    saved = adapted(language, rows, None).save(tmp_path / "saved")
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    assert "refused: adapter_model.bin is a pickle" in message(model=str(saved))
    (saved / "adapter_model.bin").rename(saved / "adapter_model.safetensors")
    Path(language).rename(tmp_path / "elsewhere")
    assert f"the base model of the adapter in {saved} is gone: there is no {language}" in message(model=str(saved))
    with pytest.raises(UserError, match="is gone"):
        ModelReward(saved)


# The folder as a reward


CONVERSATIONS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in PAIRS
]
NO_END = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"  # nor a generation prompt


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("kind", ["texts", "no padding token", "conversations", "no end of turn"])
def test_a_folder_as_a_reward_gives_the_trainers_numbers(
    kind: str, adapter: bool, language: str, rows: str, tmp_path: Path
) -> None:
    """A run, its checkpoint, a saved folder: tokens, padding and weights are those of the training, to rounding."""
    tokenizer = load_tokenizer(language)
    if kind == "no padding token":
        tokenizer.pad_token = None
        tokenizer.save_pretrained(language)
    data = CONVERSATIONS if kind in ("conversations", "no end of turn") else PAIRS
    Path(rows).write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
    fields = {"chat_template": NO_END} if kind == "no end of turn" else {}
    trainer = adapted(language, rows, tmp_path / "run", use_peft=adapter, **fields).learn(4)
    expected = own_rewards(trainer)
    assert max(expected) - min(expected) > 0.1
    step = tmp_path / "run" / "checkpoints" / "step-0000000004"
    for place in (tmp_path / "run", step, trainer.save(tmp_path / "saved")):
        assert ModelReward(place, batch_size=5)(*texts(data)) == pytest.approx(expected, abs=5e-6)
    assert TextRewards(str(tmp_path / "run")).names == ["run"]
    # asked for, the tokens are those that TRL's GRPOTrainer makes: no special tokens around texts
    assert (ModelReward(step, special_tokens=False)(*texts(data)) == pytest.approx(expected, abs=1e-4)) is (
        kind == "conversations"
    )


@pytest.mark.parametrize("adapter", [False, True])
def test_a_folder_is_one_of_transformers(adapter: bool, language: str, rows: str, tmp_path: Path) -> None:
    """`AutoModelForSequenceClassification`, as TRL's GRPOTrainer takes a reward model; also merged."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    trainer = adapted(language, rows, None, use_peft=adapter).learn(4)
    places = [trainer.save(tmp_path / "saved")]
    if adapter:
        places.append(trainer.save(tmp_path / "merged", merged=True))
    prompts, completions = texts(PAIRS)
    for place in places:
        model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=1, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(place)
        asked = [p + c + tokenizer.eos_token for p, c in zip(prompts, completions, strict=True)]
        inputs = tokenizer(asked, padding=True, padding_side="right", return_tensors="pt")
        with torch.no_grad():
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        assert logits[:, 0].tolist() == pytest.approx(own_rewards(trainer), abs=1e-5)
    assert checkpoint.verify(places[0]) is None
