# ruff: noqa: RUF001 - messages hold a multiplication sign
"""Data, models and rewards of language trainers that are not what they should be -> what is said, through `rlkit ...`.

A table of each kind: what is wrong, and the words that have to name the file, row or field and the remedy. Exit code 2
is wrong use, found before anything was written; 1 is what failed underneath. The rules for single rows are tested in
`test_preferences.py`, those for tokens in `test_tokens.py`.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import rlkit_command
from lm_zoo import PAIRS, saved_llama, tiny_llama
from safetensors.torch import load_file, save_file

import rlkit
from rlkit.cli import main
from rlkit.errors import Stopped, UserError
from rlkit.lm import models
from rlkit.lm.bytes import byte_tokenizer, character_tokenizer

Row = dict[str, Any]


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def ranked(*scores: Any) -> Row:
    return {"prompt": "p", "completions": [f"c{i}" for i in range(2)], "scores": list(scores)}


def labelled(i: int, label: bool) -> Row:
    return {"prompt": f"p{i}", "completion": "c", "label": label}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder; tests leave it as it is."""
    return Path(saved_llama(tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(lines(*PAIRS))
    return path


def refused(capsys: pytest.CaptureFixture[str], *args: str | Path, code: int = 2) -> str:
    """The one message of `rlkit ARGS`, which fails with `code`; with code 2 it leaves no file behind."""
    before = sorted(Path.cwd().rglob("*"))
    capsys.readouterr()
    assert main([str(a) for a in args]) == code
    if code == 2:
        assert sorted(Path.cwd().rglob("*")) == before, "files were left behind"
    err = capsys.readouterr().err
    assert err.count("error: ") == 1, err
    assert "Traceback" not in err
    return err[err.index("error: ") :].removeprefix("error: ").removesuffix("\n")


def train(trainer: str = "dpo") -> list[str]:
    return ["train", trainer, "--steps", "1", "--device", "cpu", "--eval_fraction", "0"]


# --- data files ----------------------------------------------------------------------------------------------------

DROP = "mend them, or leave them out with `--on_bad_row drop`"
AGAIN = "copy or download it again"
FORMATS = "prompt, chosen, rejected · chosen, rejected · prompt, completion, label"

FILES: dict[str, tuple[str, bytes, list[str]]] = {
    # files
    "wrong columns": (
        "a.jsonl",
        lines({"q": "p", "good": "a", "bad": "b"}),
        ["{file}: found `q, good, bad`; expected one of: ", FORMATS, "--map prompt=q,chosen=good,rejected=bad"],
    ),
    "many columns": (
        "a.jsonl",
        lines({f"column_{i}": "p" for i in range(99)}),
        ["{file}: found `column_0, ", "column_19, … (99 in all)`; expected one of: "],
    ),
    "empty": ("a.jsonl", b"", ["{file}: no rows; expected one or more with prompt, chosen, rejected"]),
    "blank": ("a.jsonl", b"\n \n", ["{file}: no rows; expected one or more with "]),
    "empty .json": ("a.json", b"", ["{file}: no rows; expected one or more with "]),
    "empty list": ("a.json", b"[]", ["{file}: no rows; expected one or more with "]),
    "empty .gz": ("a.jsonl.gz", gzip.compress(b""), ["{file}: no rows; expected one or more with "]),
    "not JSON": ("a.jsonl", b"prompt,chosen\n", ["{file} line 1: not JSON", "expected one JSON object a line: mend"]),
    "not JSON either": ("a.json", b"prompt: p\n", ["{file}: expected a list of objects"]),
    "a broken line": (
        "a.jsonl",
        lines(*PAIRS) + b'{"prompt": "p", "cho\n' + lines(*PAIRS),
        ["{file} line 7: not JSON", "mend the line, or leave it out"],
    ),
    "a list on a line": ("a.jsonl", lines(list(PAIRS)), ["{file}: row 0 (line 1) is a list, expected an object"]),
    "cut off .json": ("a.json", json.dumps(PAIRS).encode()[:-1], ["{file}: the file ends within its list; " + AGAIN]),
    "cut off .gz": ("a.jsonl.gz", gzip.compress(lines(*PAIRS))[:-12], ["{file}: cannot be read (EOFError", AGAIN]),
    "no .gz": ("a.jsonl.gz", lines(*PAIRS), ["{file}: cannot be read (BadGzipFile", AGAIN]),
    "compressed without .gz": ("a.jsonl", gzip.compress(lines(*PAIRS)), ["{file} line 1: not UTF-8", "ends in .gz"]),
    "binary": ("a.jsonl", bytes(range(128, 256)), ["{file} line 1: not UTF-8; expected text in UTF-8"]),
    "another kind": ("a.csv", b"prompt,chosen\n", ["`{file}` does not end in one of .json, .jsonl, "]),
    "no parquet": ("a.parquet", b"PAR1 nothing PAR1", ["{file}: not a parquet file, or a damaged one", AGAIN]),
    # rows
    "without rejected": (
        "a.jsonl",
        lines(*PAIRS, {"prompt": "p", "chosen": "c"}),
        ["{file}: 1 of 7 rows", "1 × row 6 (line 7): missing `rejected`; found `prompt, chosen`", DROP],
    ),
    "prompt is a number": (
        "a.jsonl",
        lines({"prompt": 3, "chosen": "a", "rejected": "b"}),
        ["{file}: 1 of 1", "row 0 (line 1): `prompt` is a number, expected text or a list of messages", DROP],
    ),
    "message without role": (
        "a.jsonl",
        lines({"prompt": [{"content": "p"}], "chosen": "a", "rejected": "b"}),
        ["{file}: 1 of 1", "row 0 (line 1): `prompt` has a message without `role`; message 0", DROP],
    ),
    "message without content": (
        "a.jsonl",
        lines({"prompt": [user("p"), {"role": "user"}], "chosen": "a", "rejected": "b"}),
        ["{file}: 1 of 1", "row 0 (line 1): `prompt` has a message without `content`; message 1", DROP],
    ),
    "chosen equals rejected": (
        "a.jsonl",
        lines(*PAIRS, {"prompt": "p", "chosen": "c", "rejected": "c"}),
        ["{file}: 1 of 7", "row 6 (line 7): `chosen` equals `rejected`", DROP],
    ),
    "empty completion": (
        "a.jsonl",
        lines(*PAIRS, {"prompt": "p", "chosen": " ", "rejected": "c"}),
        ["{file}: 1 of 7", "row 6 (line 7): empty `chosen`", DROP],
    ),
    "as many scores as completions": (
        "a.jsonl",
        lines(ranked(1, 2), ranked(1)),
        [
            "{file}: 1 of 2",
            "row 1 (line 2): `completions` and `scores` differ in length; 2 completions, 1 scores",
            DROP,
        ],
    ),
    "NaN as a score": (
        "a.jsonl",
        lines(ranked(1, 2), ranked(1, float("nan"))),
        ["{file}: 1 of 2", "row 1 (line 2): `scores` is not finite; found nan", DROP],
    ),
    "negative weight": (
        "a.jsonl",
        lines(*PAIRS, {**PAIRS[0], "weight": -1}),
        ["{file}: 1 of 7", "row 6 (line 7): `weight` is below 0; found -1", DROP],
    ),
    "two formats": (
        "a.jsonl",
        lines(*PAIRS, {"text": "t"}),
        ["{file}: row 6 (line 7) is `text`, but row 0 (line 1) is `prompt, chosen, rejected`; one format a source"],
    ),
    "two types": (
        "a.jsonl",
        lines(*PAIRS, {"prompt": [user("p")], "chosen": "a", "rejected": "b"}),
        ["{file}: row 6 (line 7) holds messages, but row 0 (line 1) text; one format a source"],
    ),
    # the whole
    "one label": (
        "a.jsonl",
        lines(*(labelled(i, True) for i in range(5))),
        ["{file}: needs both labels; found 5 × true; add rows of the other label"],
    ),
    "labels of different prompts": (
        "a.jsonl",
        lines(*(labelled(i, i < 2) for i in range(5))),
        ["{file}: no pairs; none of 5 prompts has completions of both labels; a pair needs one true and one false of"],
    ),
    "ties": ("a.jsonl", lines(ranked(1, 1)), ["{file}: no pairs; in 1 records no gap is above 0: pairs need "]),
    "no weight at all": (
        "a.jsonl",
        lines(*({**row, "weight": 0} for row in PAIRS)),
        ["{file}: the `weight` of all 6 pairs is 0, so nothing would be learned; give positive ones, or none"],
    ),
    "prompts": (
        "a.jsonl",
        lines({"prompt": "p"}),
        ["{file}: no pairs in `prompt`; needs `prompt, chosen, rejected`, ", "(name other columns with `--map`)"],
    ),
    "demonstrations": (
        "a.jsonl",
        lines({"prompt": "p", "completion": "c"}),
        ["{file}: no pairs in `prompt, completion`; needs `prompt, chosen, rejected`, "],
    ),
    # tokens
    "two BOS": (
        "a.jsonl",
        lines({"prompt": "<bos>p", "chosen": "a", "rejected": "b"}),
        ["{file}: row 0 starts with two BOS tokens ('<bos>'): the text begins with it", "take it out of the text"],
    ),
    "another role": (
        "a.jsonl",
        lines({"prompt": [{"role": "wizard", "content": "p"}], "chosen": "a", "rejected": "b"}),
        ["{file}: row 0: the chat template failed: unknown role wizard, expected system, user or assistant"],
    ),
    "too long": (
        "a.jsonl",
        lines({"prompt": "p" * 1100, "chosen": "a", "rejected": "b"}),
        [
            "`data`: no row of {file} can be trained on; 2 of 2 completions: nothing trained is left",
            "max_length=256; 1152 holds 99 % of the rows whole, 1152 all of them; 256 are the positions of the model",
        ],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_data_files(case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, content, words = FILES[case]
    file = tmp_path / name
    file.write_bytes(content)
    message = refused(capsys, *train(), "--model", model, "--data", file)
    for part in words:
        assert part.replace("{file}", str(file)) in message


@pytest.mark.parametrize("case", ["a broken line", "cut off .gz", "no parquet", "wrong columns", "empty"])
def test_data_files_of_other_commands(
    case: str, model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`data inspect`, held-out data and the other trainers read with the same eyes."""
    name, content, words = FILES[case]
    file = tmp_path / name
    file.write_bytes(content)
    for args in (
        ["data", "inspect", file],
        [*train("sft"), "--model", model, "--data", file],
        [*train("reward_model"), "--model", model, "--data", file],
        [*train(), "--model", model, "--data", pairs, "--eval_data", file],
    ):
        message = refused(capsys, *args)
        for part in words:
            assert part.replace("{file}", str(file)) in message


def test_data_that_are_not_there(model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for data, message in (
        (pairs.with_name("pair.jsonl"), "did you mean `pairs.jsonl`?"),
        (tmp_path / "absent" / "pairs.jsonl", f"the folder `{tmp_path / 'absent'}` is not there"),
        (empty, f"the folder `{empty}` holds no file that ends in .json, .jsonl, "),
    ):
        assert message in refused(capsys, *train(), "--model", model, "--data", data)
    assert "`data`: dpo needs data: --data FILE" in refused(capsys, *train(), "--model", model)


def test_up_to_one_row_in_a_hundred_is_dropped_and_said(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """1 of 100 goes unasked; 2 of 101 are an error, which `--on_bad_row drop` allows; `error` allows none."""
    file, bad = tmp_path / "a.jsonl", {"prompt": "p", "chosen": "c"}
    good = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(99)]
    file.write_bytes(lines(*good, bad))
    options = [*train(), "--model", model, "--data", file]
    assert main([*map(str, options), "--out", "first"]) == 0
    shown = capsys.readouterr().out
    assert f"{file}: 100 rows, 99 kept" in shown
    assert "dropped: 1 × missing `rejected` (first: row 99)" in shown
    message = refused(capsys, *options, "--on_bad_row", "error")
    assert message == f"{file}: row 99 (line 100): missing `rejected`; found `prompt, chosen`"
    file.write_bytes(lines(*good, bad, bad))
    assert "2 of 101 rows are bad" in refused(capsys, *options)
    assert main([*map(str, options), "--on_bad_row", "drop", "--out", "second"]) == 0
    assert "dropped: 2 × missing `rejected` (first: row 99)" in capsys.readouterr().out
    assert "`on_bad_row`: got 'skip'" in refused(capsys, *options, "--on_bad_row", "skip")


# --- models and tokenizers -----------------------------------------------------------------------------------------

WEIGHT = "model.layers.1.mlp.up_proj.weight"


def cut(length: int) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:length])

    return edit


def reweighed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Change the tensors of a folder's file in place."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def configured(**fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return edit


def without(*names: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return edit


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_llama()[0].state_dict(), folder / "pytorch_model.bin")


def as_adapter(*, pickle: bool = False, base: Any = None, lack: bool = False) -> Callable[[Path], None]:
    """Put an adapter in place of the model, whose folder `base` then is."""

    def edit(folder: Path) -> None:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2)
        adapted: Any = get_peft_model(tiny_llama()[0], lora)
        adapted.peft_config["default"].base_model_name_or_path = base
        adapted.save_pretrained(folder, safe_serialization=True)
        tensors = load_file(folder / "adapter_model.safetensors")
        if pickle:
            (folder / "adapter_model.safetensors").unlink()
            torch.save(tensors, folder / "adapter_model.bin")
        if lack:
            kept = {name: t for name, t in tensors.items() if "layers.1" not in name}
            save_file(kept, folder / "adapter_model.safetensors")

    return edit


SAVED = "expected a folder that `save_pretrained` wrote"

MODELS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "weights cut off": (cut(-100), ["`model`: {file}/model.safetensors is damaged or incomplete (", AGAIN]),
    "weights cut off in their header": (cut(5), ["{file}/model.safetensors is damaged or incomplete (", AGAIN]),
    "empty weights": (cut(0), ["`model`: {file}/model.safetensors is damaged or incomplete (", AGAIN]),
    "no weights": (without("model.safetensors"), ["`model`: cannot load {file}: it holds no weights (*.safetensors)"]),
    "pickled weights": (
        pickled,
        [
            "`model`: cannot load {file}: refused: pytorch_model.bin is a pickle, and a pickle can run code",
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)",
        ],
    ),
    "a layer is absent": (
        reweighed(lambda t: [t.pop(name) for name in list(t) if "layers.1" in name]),
        [
            "cannot load {file}: its files lack model.layers.1.",
            " and 6 more: it is a model of another kind, or incomplete",
            AGAIN,
        ],
    ),
    "another shape": (
        reweighed(lambda t: t.update({WEIGHT: t[WEIGHT][:, :5].contiguous()})),
        [f"{{file}}: {WEIGHT} is (64, 5), config.json makes it (64, 32); weights and configuration do not belong tog"],
    ),
    "NaN": (
        reweighed(lambda t: t[WEIGHT][3].fill_(float("nan"))),
        [f"`model`: {{file}}: `{WEIGHT}` holds NaN or infinity", "take an earlier checkpoint"],
    ),
    "no config.json": (without("config.json"), ["`model`: cannot load {file}: it has no config.json; " + SAVED]),
    "config.json is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        ["`model`: cannot load {file}: ", "config.json' is not a valid JSON file"],
    ),
    "config.json of nonsense": (configured(hidden_size="wide"), ["`model`: cannot load {file}: ", SAVED]),
    "unknown architecture": (
        configured(model_type="martian"),
        ["`model`: cannot load {file}: ", "model type `martian`", SAVED],
    ),
    "an adapter as a pickle": (
        as_adapter(pickle=True, base="{model}"),
        ["`model`: cannot load {file}: refused: adapter_model.bin is a pickle, and a pickle can run code"],
    ),
    "an adapter that lacks a layer": (
        as_adapter(lack=True, base="{model}"),
        ["`model`: cannot load {file}: Found missing adapter keys", "layers.1"],
    ),
    "an adapter without a base": (as_adapter(), ["adapter_config.json of {file} names no base model", "name it there"]),
    "an adapter whose base is gone": (
        as_adapter(base="/no/such/model"),
        ["the base model of the adapter in {file} is gone: there is no /no/such/model", "name the new place"],
    ),
    "no tokenizer": (
        without("tokenizer.json", "tokenizer_config.json"),
        ["`tokenizer`: {file} holds no tokenizer (tokenizer.json or the like)", "`--tokenizer FOLDER`"],
    ),
    "tokenizer.json is no JSON": (
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        ["`tokenizer`: cannot load {file}: ", SAVED],
    ),
    "a tokenizer without end token": (
        lambda folder: _without_end(folder),
        ["the tokenizer has no EOS token, so completions could not end; set `tokenizer.eos_token`"],
    ),
}


def _without_end(folder: Path) -> None:
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in fields.items() if k != "eos_token"}))


@pytest.mark.parametrize("case", MODELS)
def test_models(case: str, model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit, words = MODELS[case]
    folder = tmp_path / "mine"
    if case.startswith("an adapter"):
        folder.mkdir()
        edit(folder)
        file = folder / "adapter_config.json"
        file.write_text(file.read_text().replace("{model}", str(model)))
    else:
        shutil.copytree(model, folder)
        edit(folder)
    message = refused(capsys, *train(), "--model", folder, "--data", pairs)
    for part in words:
        assert part.replace("{file}", str(folder)) in message


@pytest.mark.parametrize(
    ("case", "of_a_judge"),
    [
        ("weights cut off", "`reward`: {file}/model.safetensors is damaged or incomplete ("),
        ("pickled weights", "`reward`: cannot load {file}: refused: pytorch_model.bin is a pickle"),
        ("a layer is absent", "`reward`: cannot load {file}: its files lack model.layers.1."),
        ("another shape", f"{{file}}: {WEIGHT} is (64, 5), config.json makes it (64, 32)"),
        ("NaN", f"`reward`: {{file}}: `{WEIGHT}` holds NaN or infinity"),
    ],
)
def test_models_of_other_kinds(
    case: str, of_a_judge: str, model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reward model, which is made of the body of a causal one, and a trained one as a reward function."""
    edit, words = MODELS[case]
    folder = tmp_path / "mine"
    shutil.copytree(model, folder)
    edit(folder)
    message = refused(capsys, *train("reward_model"), "--model", folder, "--data", pairs)
    for part in words:
        assert part.replace("{file}", str(folder)) in message
    options = [*train("reward_model"), "--model", str(model), "--data", str(pairs), "--out", "judge"]
    assert main(options) == 0
    judge = Path("judge") / "checkpoints" / "step-0000000001"
    edit(judge)
    if case == "pickled weights":
        for name in ("buffer", "optimizer"):
            (judge / f"{name}.safetensors").unlink()
    with pytest.raises(UserError) as caught:
        rlkit.rewards.text.ModelReward(judge)
    assert of_a_judge.replace("{file}", str(judge)) in str(caught.value)


def test_a_reward_model_takes_the_body_of_a_causal_one_and_all_of_a_classifier(
    model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new head is drawn for the first only: a classifier whose head is absent is damaged."""
    options = [*train("reward_model"), "--data", str(pairs), "--out"]
    assert main([*options, "first", "--model", str(model)]) == 0
    judge = tmp_path / "judge"
    shutil.copytree(Path("first") / "checkpoints" / "step-0000000001", judge)
    (judge / "manifest.json").unlink()
    assert main([*options, "second", "--model", str(judge)]) == 0
    reweighed(lambda t: t.pop("score.weight"))(judge)
    message = refused(capsys, *train("reward_model"), "--data", pairs, "--model", judge)
    assert f"cannot load {judge}: its files lack score.weight; {AGAIN}" in message


def test_models_that_are_not_there(
    model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path.cwd() / "my-model").mkdir()
    near = model.with_name("modle")
    for option, value, message in (
        ("model", "./absent", "`model`: there is no ./absent"),
        ("model", near, f"`model`: there is no {near}; did you mean `model`?"),
        ("model", "my-modle", "`model`: cannot load my-modle (no folder here; did you mean `my-model`?): "),
        ("model", "nobody-at-all/nothing", "`model`: cannot load nobody-at-all/nothing (no folder here): "),
        ("model", pairs, f"`model`: {pairs} is a file; {SAVED}"),
        ("tokenizer", "./absent", "`tokenizer`: there is no ./absent"),
        ("tokenizer", tmp_path, f"`tokenizer`: {tmp_path} holds no tokenizer"),
        ("tokenizer", "nobody-at-all/nothing", "`tokenizer`: cannot load nobody-at-all/nothing (no folder here): "),
    ):
        given = {"model": model, "data": pairs, option: value}
        options = [part for name, where in given.items() for part in (f"--{name}", where)]
        assert message in refused(capsys, *train(), *options)
    with pytest.raises(UserError, match="`model`: there is no ~nobody-at-all/model"):
        models.load_model("~nobody-at-all/model")


def test_code_of_a_repository_is_neither_run_nor_asked_about(model: Path, pairs: Path, tmp_path: Path) -> None:
    """Not even where somebody, or a pipe, would answer yes."""
    folder, mark = tmp_path / "mine", tmp_path / "ran"
    shutil.copytree(model, folder)
    configured(model_type="martian", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"})(folder)
    (folder / "c.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\nclass M: pass\n")
    done = subprocess.run(
        rlkit_command(*train(), "--model", str(folder), "--data", str(pairs)),
        input="y\n" * 9, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"error: `model`: cannot load {folder}: " in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    assert not mark.exists()


def test_an_adapter_in_a_folder_is_loaded_with_its_base(model: Path, pairs: Path, tmp_path: Path) -> None:
    """The counterpart of those that are refused: the weights that the files hold, trainable."""
    as_adapter(base=str(model))(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.lora_B.weight"))
    tensors[name] += 0.5
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    loaded: Any = models.load_model(str(tmp_path))
    own = dict(loaded.named_parameters())
    assert torch.equal(own[name.replace(".weight", ".default.weight")], tensors[name])
    assert {n for n, p in own.items() if p.requires_grad} == {n for n in own if "lora_" in n}
    base = dict(models.load_model(str(model)).named_parameters())
    assert torch.equal(own["base_model.model.model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_rows_that_a_model_cannot_take(model: Path) -> None:
    """262 tokens and 256 positions: the first that are too many, and the last that are not."""
    tiny = models.load_model(str(model))
    models.check_fits(tiny, "model", 261, 256)
    with pytest.raises(UserError) as caught:
        models.check_fits(tiny, "ref_model", 262, 1)
    assert "`ref_model`: the tokenizer makes token 262 of the data, and the model has 262 (0 to" in str(caught.value)
    assert "`--tokenizer FOLDER`, or another `--ref_model`" in str(caught.value)
    with pytest.raises(UserError) as caught:
        models.check_fits(tiny, "model", 0, 257)
    assert "the longest row has 257 tokens, the model 256 positions; cut rows with `--max_length 256`" in str(
        caught.value
    )


def test_a_reference_has_the_tokens_of_the_model(model: Path, tmp_path: Path) -> None:
    """More tokens than the model's are no harm, others of the same numbers are; a folder without any says nothing."""
    tokenizer: Any = byte_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(tmp_path / "more")
    character_tokenizer("abc").save_pretrained(tmp_path / "other")
    for place in (model, tmp_path / "more", tmp_path, "nobody-at-all/nothing"):
        models.check_same_tokens("ref_model", str(place), byte_tokenizer())
    with pytest.raises(UserError) as caught:
        models.check_same_tokens("ref_model", str(tmp_path / "other"), byte_tokenizer())
    assert str(caught.value) == (
        f"`ref_model`: {tmp_path / 'other'} has another tokenizer than the model: 3 tokens differ, such as token 3, "
        "'a' there and '<|system|>' here; take a reference with the model's tokens"
    )


def test_attention_that_a_model_lacks() -> None:
    tiny = tiny_llama()[0]
    models.set_attention(tiny, "eager")
    assert tiny.config._attn_implementation == "eager"
    with pytest.raises(UserError, match="`attn_implementation`: nonsense is not possible with this model: "):
        models.set_attention(tiny, "nonsense")


# --- templates and boundaries --------------------------------------------------------------------------------------


def test_conversations_without_a_template(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """None is invented: with the option that is named, the same data train."""
    bare = byte_tokenizer()
    template, bare.chat_template = bare.chat_template, None
    bare.save_pretrained(tmp_path / "bare")
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines({"prompt": [user("p")], "chosen": "a", "rejected": "b"}))
    options = [*train(), "--model", model, "--data", file, "--tokenizer", tmp_path / "bare"]
    message = refused(capsys, *options)
    assert "the data are conversations and the tokenizer has no chat template" in message
    assert "`--chat_template FILE` (a Jinja file" in message
    for value, words in (
        ("absent.jinja", "`chat_template` is 'absent.jinja': neither a Jinja text nor a readable file"),
        ("{% for %}", "row 0: the chat template failed: "),
    ):
        assert words in refused(capsys, *options, "--chat_template", value)
    (tmp_path / "mine.jinja").write_text(str(template))
    assert main([*map(str, options), "--chat_template", str(tmp_path / "mine.jinja")]) == 0
    assert "<bos><|user|>p<eos><|assistant|>⟦a<eos>⟧" in capsys.readouterr().out


def test_a_prompt_that_is_no_prefix(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`a` + `b` is the token `ab`: both token tails, and what to do; with each of the two options it trains."""
    from tokenizers import Tokenizer, decoders
    from tokenizers import models as backends
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"</s>": 0, "a": 1, "b": 2, "c": 3, "ab": 4}
    backend = Tokenizer(backends.BPE(vocab=vocabulary, merges=[("a", "b")]))
    backend.decoder = decoders.Fuse()
    wrap: Any = PreTrainedTokenizerFast
    wrap(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path / "merges")
    file = tmp_path / "a.jsonl"
    rows = [{"prompt": "c", "chosen": "a", "rejected": "c"}, {"prompt": "ca", "chosen": "bc", "rejected": "cc"}]
    file.write_bytes(lines({"prompt": "c", "chosen": "c"}, *rows))
    options = ["--model", model, "--data", file, "--tokenizer", tmp_path / "merges", "--on_bad_row", "drop"]
    inspected = ["data", "inspect", file, "--tokenizer", tmp_path / "merges", "--boundary", "error"]
    for args in ([*train(), *options], [*train("sft"), *options], inspected):
        message = refused(capsys, *args)
        assert ": the tokens of the prompt are not the beginning of the tokens of prompt + completion" in message
        assert "  prompt:              'c' | 'a'\n" in message
        assert "  prompt + completion: 'c' | 'ab' | 'c' | '</s>'\n" in message
        assert "Either end the prompts with a newline; or set boundary='split'" in message
        assert "or boundary='common'" in message
    assert message.startswith(f"{file}: row 2: the tokens of the prompt are not")
    assert "(1 of 2 rows)" in message
    for boundary in ("split", "common"):
        done = [*map(str, [*train(), *options]), "--boundary", boundary, "--out", boundary]
        assert main(done) == 0
        assert "1 of 4 completions: tokens merge across the end of the prompt" in capsys.readouterr().out


# --- rewards -------------------------------------------------------------------------------------------------------

REWARDS = """
def one(prompts, completions, **columns): return [1.0]
def nan(prompts, completions, **columns): return [1.0, float("nan"), 2.0]
def words(prompts, completions, **columns): return ["1"] * len(prompts)
def raises(prompts, completions, **columns): raise KeyError("answer")
def alone(prompts): return [1.0] * len(prompts)
number = 3
"""


@pytest.mark.parametrize(
    ("reward", "code", "words"),
    [
        ("bad_text_rewards:one", 2, "reward `one` returned 1, expected 3 (one value a row)"),
        ("bad_text_rewards:nan", 2, "reward `nan` returned nan for row 1; rewards must be finite"),
        ("bad_text_rewards:words", 2, "reward `words` returned something that is no number: ['1', '1', '1']"),
        ("bad_text_rewards:raises", 1, "reward `raises` raised KeyError for row 0: 'answer'"),
        ("bad_text_rewards:alone", 2, "(put `**kwargs` last, for those that it does not need)"),
        ("bad_text_rewards:number", 2, "reward `bad_text_rewards:number` is not callable"),
        ("bad_text_rewards:absent", 2, "reward `bad_text_rewards:absent`: module 'bad_text_rewards' has no attribute"),
        ("no_such_module:f", 2, "reward `no_such_module:f`: No module named 'no_such_module'"),
        ("length", 2, "reward `length`: expected `module:function` or the folder of a reward model"),
    ],
)
def test_rewards(
    reward: str,
    code: int,
    words: str,
    model: Path,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A function for evaluations says one value for three completions, and so on; the run's folder then exists."""
    (tmp_path / "bad_text_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--model", str(model), "--data", str(pairs), "--eval_data", str(pairs), "--eval_samples", "3"]
    assert main([*train(), *options, "--max_completion_length", "3", "--eval_reward", reward]) == code
    err = capsys.readouterr().err
    assert err.count("error: ") == 1
    assert words in err
    assert "Traceback" not in err


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(model: Path, pairs: Path, tmp_path: Path) -> Path:
    """A run of two steps with a checkpoint after each, on files of its own."""
    shutil.copytree(model, tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--data", str(pairs), "--out", str(tmp_path / "run")]
    assert main([*train(), *options, "--steps", "2", "--checkpoint_every", "1"]) == 0
    return tmp_path / "run"


def test_a_damaged_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one before it is used, and it is said; without another one it is the run's fault (1), not the command's."""
    newest = run / "checkpoints" / "step-0000000002"
    cut(-9)(newest)
    size = (newest / "model.safetensors").stat().st_size
    said = "checkpoint step-0000000002 incomplete (hash mismatch in model.safetensors: "
    said += f"{size} bytes instead of {size + 9})"
    capsys.readouterr()
    copy = shutil.copytree(run, run.with_name("copy"))
    assert main(["resume", str(copy)]) == 0
    assert f"{said}; using step-0000000001\n" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints" / "step-0000000001")
    for args in (["resume", run], ["eval", run]):
        assert refused(capsys, *args, code=1) == f"no complete checkpoint in {run / 'checkpoints'}; {said}"


def edited(old: str, new: str) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        text = (run / "config.yaml").read_text()
        assert old in text
        (run / "config.yaml").write_text(text.replace(old, new))

    return edit


CHANGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "seed": (edited("seed: 0", "seed: 7"), [r"field +saved -> given\n +seed +0 -> 7"]),
    "beta": (edited("beta: 0.1", "beta: 0.5"), [r"field +saved -> given\n +beta +0\.1 -> 0\.5"]),
    "loss": (edited("- sigmoid", "- hinge"), [r"loss_type +\['sigmoid'\] -> \['hinge'\]"]),
    "data": (
        lambda run: (run.parent / "pairs.jsonl").write_bytes(lines(*PAIRS[::-1])),
        [r"field +saved -> given\n +data files +'\w{32}' -> '\w{32}'"],
    ),
    "weights": (
        lambda run: reweighed(lambda t: t[WEIGHT].add_(0.1))(run.parent / "model"),
        [r"field +saved -> given\n +model files +'\w{32}' -> '\w{32}'"],
    ),
    "tokenizer": (
        lambda run: byte_tokenizer(bos=False).save_pretrained(run.parent / "model"),
        [r"field +saved -> given\n +model files +'\w{32}' -> '\w{32}'"],
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_resume_with_something_else(case: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, patterns = CHANGES[case]
    change(run)
    message = refused(capsys, "resume", run, "--steps", "3")
    assert message.startswith("these differ from ")
    for pattern in patterns:
        assert re.search(pattern, message)
    assert "`--allow-changes`" in message
    assert main(["resume", str(run), "--steps", "3", "--allow-changes"]) == 0


def test_a_reference_that_has_changed_before_it_was_read(
    model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stop while its log-probs are computed leaves it to be read at resume: by then it has to be the same."""
    other = saved_llama(tmp_path / "other", seed=1)
    trainer: Any = rlkit.DPO(
        str(model), ref_model=other, train_dataset=str(pairs), eval_fraction=0, reference_cache=False, device="cpu",
        per_device_train_batch_size=2, out=str(tmp_path / "run"),
    )  # fmt: skip
    score = trainer.score

    def stopping(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return score(*args, **kwargs)

    trainer.score = stopping
    with pytest.raises(Stopped):
        trainer.learn(2)
    saved_llama(tmp_path / "other", seed=2)
    message = refused(capsys, "resume", tmp_path / "run", "--allow-changes", code=1)
    assert "the reference is not the one that the run began with (weights " in message
    assert message.endswith("restore the model's folder, or start a new run")
    saved_llama(tmp_path / "other", seed=1)
    assert main(["resume", str(tmp_path / "run")]) == 0


def test_what_is_held_out(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything, all that has a preference, or rows that are all too long: which part it is, and what to change."""
    file = tmp_path / "a.jsonl"
    options = ["--model", model, "--data", file, "--eval_fraction"]
    file.write_bytes(lines(*({"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(3))))
    for trainer in ("dpo", "sft"):
        message = refused(capsys, *train(trainer), *options, "0.99")
        assert message.startswith("`eval_fraction`: 0.99 holds out all 3 rows, so none of ")
        assert message.endswith("give a smaller one, or 0")
    scores = [{**ranked(1, 1 + (i == 0)), "prompt": f"p{i}"} for i in range(30)]
    file.write_bytes(lines(*scores))
    assert f"{file}, less what `eval_fraction` holds out: no pairs; in " in refused(capsys, *train(), *options, "0.2")
    held = tmp_path / "held.jsonl"
    held.write_bytes(lines({"prompt": "p" * 99, "chosen": "a", "rejected": "b"}))
    message = refused(capsys, *train(), *options[:-1], "--max_length", "16", "--data", held, "--eval_data", file)
    assert f"no row of {held} can be trained on; " in message
    file.write_bytes(lines(*PAIRS))
    message = refused(capsys, *train(), *options[:-1], "--max_length", "64", "--eval_data", held)
    assert message.startswith(f"`eval_data`: no row of {held} can be evaluated; 2 of ")
    assert "nothing trained is left and the row is not used at max_length=64; " in message


def test_rows_and_models_that_do_not_fit(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, big, small, other = tmp_path / "a.jsonl", tmp_path / "big", tmp_path / "small", tmp_path / "other"
    tokenizer: Any = byte_tokenizer()
    tokenizer.add_tokens(["uncommonword"])
    tokenizer.save_pretrained(big)
    bare, _ = tiny_llama()
    bare.resize_token_embeddings(100)
    bare.save_pretrained(small)
    shutil.copytree(model, other)
    character_tokenizer("abcdefg").save_pretrained(other)
    common = ["--model", model, "--data", file]
    file.write_bytes(lines({"prompt": "p", "chosen": "uncommonword", "rejected": "b"}))
    message = refused(capsys, *train(), *common, "--tokenizer", big)
    assert "`model`: the tokenizer makes token 262 of the data, and the model has 262 (0 to 261)" in message
    file.write_bytes(lines({"prompt": "p" * 300, "chosen": "a", "rejected": "b"}))
    message = refused(capsys, *train(), *common, "--max_length", "1024")
    assert "the longest row has 303 tokens, the model 256 positions; cut rows with `--max_length 256`" in message
    file.write_bytes(lines(*PAIRS))
    assert "`ref_model`: there is no ./absent" in refused(capsys, *train(), *common, "--ref_model", "./absent")
    for reference, words in (
        (small, "error: `ref_model`: the tokenizer makes token 127 of the data, and the model has 100 (0 to 99): "),
        (
            other,
            f"error: `ref_model`: {other} has another tokenizer than the model: 7 tokens differ, such as token 3, ",
        ),
    ):
        capsys.readouterr()
        assert main([*map(str, [*train(), *common]), "--ref_model", str(reference)]) == 2
        assert words in capsys.readouterr().err


def test_a_reward_that_never_applies(model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None for every completion is no value, and no warning of numpy's."""
    (tmp_path / "no_text_rewards.py").write_text("def none(prompts, **columns): return [None] * len(prompts)\n")
    monkeypatch.syspath_prepend(tmp_path)
    trainer: Any = rlkit.DPO(
        str(model), train_dataset=str(pairs), eval_dataset=str(pairs), eval_reward=("no_text_rewards:none",),
        max_completion_length=3, device="cpu",
    )  # fmt: skip
    trainer.prepare(lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(trainer.evaluate()["eval_reward"])


@pytest.mark.parametrize("trainer", ["dpo", "sft", "reward_model"])
def test_sharding_takes_several_processes(
    trainer: str, model: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, *train(trainer), "--model", model, "--data", pairs, "--fsdp")
    assert "`fsdp` divides the model among processes: start several, `torchrun --nproc_per_node N " in message


@pytest.mark.parametrize("option", ["tokenizer", "ref_model"])
def test_resume_with_another_of(
    option: str, model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "other")
    options = ["--model", str(model), "--data", str(pairs), f"--{option}", str(tmp_path / "other"), "--out", "run"]
    assert main([*train(), *options]) == 0
    if option == "tokenizer":
        byte_tokenizer(bos=False).save_pretrained(tmp_path / "other")
    else:
        saved_llama(tmp_path / "other", seed=2)
    message = refused(capsys, "resume", "run", "--steps", "3")
    assert re.search(rf"field +saved -> given\n +{option} files +'\w{{32}}' -> '\w{{32}}'", message)
