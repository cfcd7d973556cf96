"""The command line of language models, from files."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers import fingerprint, rlkit_command, run_rlkit, tiny, wait_for
from lm_zoo import PAIRS, saved_llama

from rlkit.cli import main
from rlkit.metrics import read_jsonl


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(model folder, data file)."""
    place = tmp_path_factory.mktemp("files")
    data = place / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS * 3), encoding="utf-8")
    return saved_llama(place / "model"), str(data)


def options(files: tuple[str, str], out: Path, *more: str) -> list[str]:
    model, data = files
    fixed = "--per_device_train_batch_size 2 --checkpoint_every 3 --log_every 2 --eval_every 10 --eval_samples 2"
    fixed += " --eval_fraction 0.3 --max_completion_length 6 --learning_rate 1e-3 --device cpu"
    return ["dpo", "--model", model, "--data", data, "--out", str(out), *fixed.split(), *more]


def test_train_eval_and_what_is_printed(files: tuple[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = run_rlkit("train", *options(files, run, "--steps", "4"))
    assert done.returncode == 0, done.stderr
    assert "18 rows, 18 kept" in done.stdout
    assert "duplicates: 12 exact, kept" in done.stdout
    assert "tokens of a row: median" in done.stdout
    assert "⟦" in done.stdout
    assert "evaluation before (step 0):" in done.stdout
    first, last = read_jsonl(run / "eval.jsonl")
    assert (first["step"], last["step"]) == (0, 4)
    assert first["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert len(first["samples"]) == 2
    keys = {"loss", "grad_norm", "learning_rate", "epoch", "rewards/chosen", "rewards/margins", "logps/rejected"}
    assert keys <= read_jsonl(run / "metrics.jsonl")[0].keys()
    evaluated = run_rlkit("eval", str(run), "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    record = json.loads(evaluated.stdout.splitlines()[-1])
    assert record["eval_loss"] == pytest.approx(last["eval_loss"], abs=1e-6)


def test_epochs_without_steps(files: tuple[str, str], tmp_path: Path) -> None:
    """Without `--steps`, `num_train_epochs` passes over what is not held out."""
    done = run_rlkit("train", *options(files, tmp_path / "run", "--num_train_epochs", "2"))
    assert done.returncode == 0, done.stderr
    kept = 18 - read_jsonl(tmp_path / "run" / "eval.jsonl")[0]["eval_units"]
    assert read_jsonl(tmp_path / "run" / "eval.jsonl")[-1]["step"] == 2 * -(-kept // 2)


def test_a_killed_run_resumes_exactly(files: tuple[str, str], tmp_path: Path) -> None:
    done = run_rlkit("train", *options(files, tmp_path / "whole", "--steps", "120"))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    with subprocess.Popen(
        rlkit_command("train", *options(files, run, "--steps", "120")),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        wait_for(lambda: len(list((run / "checkpoints").glob("step-*"))) > 0 or process.poll() is not None)
        process.kill()
    resumed = run_rlkit("resume", str(run))
    assert resumed.returncode == 0, resumed.stderr
    assert fingerprint(run) == fingerprint(tmp_path / "whole")


def test_data_inspect(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = files
    assert main(["data", "inspect", data, "--tokenizer", model, "--examples", "2"]) == 0
    shown = capsys.readouterr().out
    assert "18 rows, 18 kept" in shown
    assert "kind: pairs" in shown
    assert "row 0, chosen:\n<bos>Name a colour.⟦ Blue, as the sea.<eos>⟧" in shown
    assert "row 1, rejected:" in shown
    assert "tokens below are bytes" not in shown
    broken = tmp_path / "broken.jsonl"
    rows: list[dict[str, Any]] = [
        *PAIRS,
        {"prompt": "p", "chosen": "c"},
        {"prompt": "p", "chosen": "", "rejected": "r"},
    ]
    broken.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(["data", "inspect", str(broken)]) == 0
    shown = capsys.readouterr().out
    assert "8 rows, 6 kept" in shown
    assert "missing `rejected` (first: row 6)" in shown
    assert "empty `chosen` (first: row 7)" in shown
    assert "tokens below are bytes" in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["data", "inspect", "absent.jsonl"], "no file `absent.jsonl`"),
        (["data", "inspect", "absent.jsonl", "--map", "prompt"], "--map: got 'prompt'; expected OURS=THEIRS"),
        (["data", "mak"], "invalid choice: 'mak'"),
        (["train", "dpo", "--model", "./absent"], "`model`: there is no ./absent"),
        (["train", "dpo", "--data", "absent.jsonl"], "`model`: dpo needs a causal language model"),
    ],
)
def test_wrong_use(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    assert message in capsys.readouterr().err


def test_push_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("sac").learn(20).save(tmp_path / "sac")
    assert main(["push", str(tmp_path / "sac"), "me/model"]) == 2
    assert "was trained by `sac`: the hub takes language models" in capsys.readouterr().err
    tiny("sft").learn(1).save(tmp_path / "sft")  # the tests run with the hub switched off
    assert main(["push", str(tmp_path / "sft"), "me/model"]) == 2
    assert "cannot push to me/model" in capsys.readouterr().err


def test_a_chat_file_and_an_adapter(files: tuple[str, str], tmp_path: Path) -> None:
    """Conversations, with the template of the tokenizer; the run's checkpoint is an adapter that peft loads."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    data = tmp_path / "chat.jsonl"
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in PAIRS
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = tmp_path / "run"
    done = run_rlkit("train", *options((files[0], str(data)), run, "--use_peft", "--lora_r", "2", "--steps", "5"))
    assert done.returncode == 0, done.stderr
    assert "messages" in done.stdout
    assert "<bos><|user|>Name a colour.<eos><|assistant|>⟦ Blue, as the sea.<eos>⟧" in done.stdout
    assert "of them trained" in done.stdout
    place = run / "checkpoints" / "step-0000000005"
    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    inputs = tokenizer.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3).shape[1] <= inputs["input_ids"].shape[1] + 3
    resumed = run_rlkit("resume", str(run), "--steps", "8")
    assert resumed.returncode == 0, resumed.stderr


def test_a_conversation_without_a_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    folder = Path(saved_llama(tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    data = tmp_path / "chat.jsonl"
    row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}
    data.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert main(["train", "sft", "--model", str(folder), "--data", str(data), "--eval_fraction", "0"]) == 2
    assert "`--chat_template FILE`" in capsys.readouterr().err
