"""Token rows against TRL's own preparation of the same data, and against ids that are written out."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.errors import UserError
from rlkit.lm.bytes import CHAT_TEMPLATE, byte_tokenizer, character_tokenizer
from rlkit.lm.tokens import Encoded, Encoder

SHARED = Path(__file__).parents[2] / "shared" / "data"

SPECIAL = ("<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>")
ORDINARY = st.text(max_size=12).filter(lambda text: not any(token in text for token in SPECIAL))
FIRST_BYTE = 6  # ids of byte_tokenizer: three special tokens, three roles, then the bytes
BOS, EOS, USER, ASSISTANT = 1, 2, 4, 5

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def ids(text: str) -> list[int]:
    return [FIRST_BYTE + byte for byte in text.encode()]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def reply(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def chat_tokenizer(template: str, *special: str, eos: str | None = None, bos: str | None = None) -> Any:
    """Bytes with further special tokens, from id 262 in the order given."""
    from tokenizers import AddedToken

    tokenizer = byte_tokenizer(bos=False)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.chat_template = template
    if eos is not None:
        tokenizer.eos_token = eos
    if bos is not None:
        tokenizer.bos_token = bos
    return tokenizer


def merging_tokenizer(*, lead_space: bool = False) -> Any:
    """Letters a, b, c and `▁`, with the merge a b -> ab across whatever boundary; `lead_space` puts `▁` first."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"</s>": 0, "a": 1, "b": 2, "c": 3, "▁": 4, "\n": 5, "ab": 6, "<s>": 7}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    steps = [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *steps] if lead_space else steps)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1 if lead_space else 0, 0)]
    )
    backend.add_special_tokens(["</s>", "<s>"])
    wrap: Any = PreTrainedTokenizerFast
    return wrap(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", clean_up_tokenization_spaces=False)


def one(encoder: Encoder, prompt: Any, completion: Any, **kwargs: Any) -> Encoded:
    (row,) = encoder.completions([prompt], [completion], **kwargs)
    assert row is not None
    return row


def trained(row: Encoded) -> list[int]:
    return [int(token) for token in row.tokens[row.mask]]


def check(row: Encoded) -> None:
    assert row.tokens.dtype == np.int32
    assert row.mask.dtype == bool
    assert row.tokens.shape == row.mask.shape
    assert 1 <= row.prompt_length < len(row.tokens)
    assert row.mask.any()
    assert not row.mask[: row.prompt_length].any()


# --------------------------------------------------------------------------------------------------- TRL as the oracle


def trl_pairs(tokenizer: Any, rows: list[dict[str, Any]], max_length: int | None = None) -> list[dict[str, Any]]:
    """Rows as TRL's `DPOTrainer` prepares them: `prompt_ids`, `chosen_ids`, `rejected_ids`."""
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DPOTrainer

    args: Any = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    return list(DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, "train"))


def trl_sft(
    tokenizer: Any, rows: list[dict[str, Any]], *, completion_only: bool = True, assistant_only: bool = False
) -> list[dict[str, Any]]:
    """Rows as TRL's `SFTTrainer` prepares them: `input_ids`, `labels` (-100 where untrained)."""
    from datasets import Dataset
    from trl.trainer.sft_trainer import SFTTrainer

    args: Any = SimpleNamespace(
        dataset_num_proc=None, max_length=None, truncation_mode="keep_start", assistant_only_loss=assistant_only,
        dataset_text_field="text", shuffle_dataset=False,
    )  # fmt: skip
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=completion_only)
    data = Dataset.from_list(rows)
    return list(SFTTrainer._prepare_dataset(trainer, data, tokenizer, args, False, None, "train"))


def encode_pairs(encoder: Encoder, rows: Sequence[dict[str, Any]]) -> list[tuple[Encoded | None, Encoded | None]]:
    prompts = [row["prompt"] for row in rows for _ in range(2)]
    out = encoder.completions(prompts, [row[side] for row in rows for side in ("chosen", "rejected")])
    return list(zip(out[::2], out[1::2], strict=True))


def assert_pairs_equal(encoder: Encoder, rows: list[dict[str, Any]], untrained_tail: int = 0) -> None:
    """Tokens, prompt lengths and masks are TRL's, but for `untrained_tail` tokens that follow the end token."""
    for pair, theirs in zip(encode_pairs(encoder, rows), trl_pairs(encoder.tokenizer, rows), strict=True):
        for row, side in zip(pair, ("chosen_ids", "rejected_ids"), strict=True):
            assert row is not None
            check(row)
            assert row.tokens.tolist() == theirs["prompt_ids"] + theirs[side]
            assert row.prompt_length == len(theirs["prompt_ids"])
            assert row.mask.tolist() == (
                [False] * row.prompt_length + [True] * (len(theirs[side]) - untrained_tail) + [False] * untrained_tail
            )


TEXT_PAIRS = [
    {"prompt": "Q: 1+1?\nA:", "chosen": " 2", "rejected": " 3, or 4"},
    {"prompt": "Çok güzel 🙂", "chosen": "é", "rejected": "\n\n"},
    {"prompt": "x", "chosen": "ends<eos>", "rejected": ""},
    {"prompt": "x", "chosen": "<eos>", "rejected": "text <bos> in it"},
]


@pytest.mark.parametrize("bos", [True, False])
def test_text_is_tokenised_as_trl_does(bos: bool) -> None:
    assert_pairs_equal(Encoder(byte_tokenizer(bos=bos), max_length=None), TEXT_PAIRS)


def test_text_ids_written_out() -> None:
    row = one(Encoder(byte_tokenizer()), "ab", "c")
    assert row.tokens.tolist() == [BOS, *ids("abc"), EOS]
    assert row.prompt_length == 3
    assert trained(row) == [*ids("c"), EOS]


CHAT_PAIRS = [
    {"prompt": [user("hi")], "chosen": [reply("hello")], "rejected": [reply("  go away \n")]},
    {
        "prompt": [{"role": "system", "content": "Be kind."}, user("1"), reply("2"), user("3?")],
        "chosen": [reply("four")],
        "rejected": [reply("five 🙂")],
    },
]


def test_conversations_are_tokenised_as_trl_does() -> None:
    assert_pairs_equal(Encoder(byte_tokenizer(), max_length=None), CHAT_PAIRS)


def test_the_newline_after_the_end_of_turn_is_the_only_difference_in_chatml() -> None:
    tokenizer = chat_tokenizer(CHATML, "<|im_start|>", "<|im_end|>", eos="<|im_end|>")
    assert_pairs_equal(Encoder(tokenizer, max_length=None), CHAT_PAIRS, untrained_tail=1)


def test_the_shortest_common_prefix_is_trls() -> None:
    """a|b merges into `ab` for the chosen side only, and both sides lose the prompt's last token."""
    tokenizer = merging_tokenizer()
    rows = [{"prompt": "ca", "chosen": "bc", "rejected": "cc"}]
    assert_pairs_equal(Encoder(tokenizer, boundary="common"), rows)
    (chosen, rejected), *_ = encode_pairs(Encoder(tokenizer, boundary="common"), rows)
    assert chosen is not None
    assert rejected is not None
    assert (chosen.prompt_length, trained(chosen)) == (1, [6, 3, 0])
    assert (rejected.prompt_length, trained(rejected)) == (1, [1, 3, 3, 0])


def test_truncation_at_the_end_is_trls() -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    tokenizer, limit = byte_tokenizer(), 12
    rows = [
        {"prompt": "p" * n, "chosen": "c" * (k + 1), "rejected": "r" * 9} for n in (1, 5, 10, 11, 30) for k in range(9)
    ]
    encoder = Encoder(tokenizer, max_length=limit)
    kept = [pair for pair in encode_pairs(encoder, rows) if pair[0] is not None]
    theirs = trl_pairs(tokenizer, rows, limit)
    assert len(kept) == len(theirs) == 27  # prompts of 2, 6 and 11 tokens with their BOS; not those of 12 and 31
    batch = DataCollatorForPreference(pad_token_id=0, max_length=limit)(theirs)
    for i, pair in enumerate(kept):
        for k, row in zip((i, i + len(kept)), pair, strict=True):
            assert row is not None
            length = len(row.tokens)
            assert row.tokens.tolist() == batch["input_ids"][k, :length].tolist()
            assert row.mask.tolist() == batch["completion_mask"][k, :length].bool().tolist()
            assert batch["attention_mask"][k].sum() == length
    assert encoder.report.emptied == 2 * (len(rows) - len(kept))


@pytest.mark.parametrize("completion_only", [True, False])
def test_prompt_and_completion_are_trls_sft_rows(completion_only: bool) -> None:
    """Without `completion_only` all is trained but the first token, which no token precedes (TRL's shift drops it)."""
    tokenizer = byte_tokenizer()
    encoder = Encoder(tokenizer, completion_only=completion_only)
    texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in TEXT_PAIRS]
    chats = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in CHAT_PAIRS]
    for rows in (texts, chats):
        theirs = trl_sft(tokenizer, rows, completion_only=completion_only)
        ours = encoder.completions([r["prompt"] for r in rows], [r["completion"] for r in rows])
        for row, their in zip(ours, theirs, strict=True):
            assert row is not None
            check(row)
            assert row.tokens.tolist() == their["input_ids"]
            assert row.mask[1:].tolist() == [label != -100 for label in their["labels"][1:]]
            assert row.prompt_length == (row.mask.argmax() if completion_only else 1)


CONVERSATION = [
    {"role": "system", "content": "S"},
    user("one"),
    reply("1"),
    user("two"),
    reply(" 22 "),
    user("?"),
    reply(""),
]


def test_assistant_turns_are_trls_where_the_template_marks_them() -> None:
    """Every turn of the assistant with its end token; TRL also trains the newline behind it."""
    tokenizer = chat_tokenizer(CHATML_MARKED, "<|im_start|>", "<|im_end|>", eos="<|im_end|>")
    encoder = Encoder(tokenizer, completion_only=False, assistant_only=True)
    row = one(encoder, CONVERSATION[:-1], CONVERSATION[-1:])
    (theirs,) = trl_sft(tokenizer, [{"messages": CONVERSATION}], assistant_only=True)
    assert row.tokens.tolist() == theirs["input_ids"]
    labels = np.array(theirs["labels"])
    after_end = np.r_[False, labels[:-1] == tokenizer.eos_token_id]
    assert row.mask.tolist() == ((labels != -100) & ~after_end).tolist()
    end = tokenizer.eos_token_id
    assert trained(row) == [*ids("1"), end, *ids(" 22 "), end, end]
    assert row.prompt_length == row.mask.argmax()


def test_turns_by_rendering_are_those_of_the_marks() -> None:
    """A template without `{% generation %}`: the conversation is rendered up to each turn instead."""
    special = ("<|im_start|>", "<|im_end|>")
    marked = Encoder(chat_tokenizer(CHATML_MARKED, *special), completion_only=False, assistant_only=True)
    plain = Encoder(chat_tokenizer(CHATML, *special), completion_only=False, assistant_only=True)
    for end in (3, 5, 7):
        a = one(marked, CONVERSATION[: end - 1], CONVERSATION[end - 1 : end])
        b = one(plain, CONVERSATION[: end - 1], CONVERSATION[end - 1 : end])
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.mask.tolist() == b.mask.tolist()
        assert a.mask.sum() == [2, 7, 8][(end - 3) // 2]


# -------------------------------------------------------------------------------------------- real tokenizers and data


def read(name: str, limit: int) -> list[dict[str, Any]]:
    with gzip.open(SHARED / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(limit), strict=False)]


@pytest.mark.parametrize("name", ["bytes", *(["models/stories260k", "tokenizers/gpt2"] if SHARED.exists() else [])])
def test_tokenizers_on_pairs_are_trls(name: str) -> None:
    """Our own tokenizer on rows made here; and real ones on real rows, where these lie beside the checkout."""
    from transformers import AutoTokenizer

    keys = ("prompt", "chosen", "rejected")
    if name == "bytes":
        tokenizer: Any = byte_tokenizer()
        rows = [{key: f"{key} {i} é\n" * (1 + i % 3) for key in keys} for i in range(20)]
    else:
        tokenizer = AutoTokenizer.from_pretrained(SHARED / name)
        rows = [{key: row[key] for key in keys} for row in read("preferences/llmbar/test.jsonl.gz", 100)]
    assert_pairs_equal(Encoder(tokenizer, max_length=None, boundary="common"), rows)
    boundaries: list[Any] = ["common", "split"]
    for boundary in boundaries:
        encoder = Encoder(tokenizer, max_length=None, boundary=boundary)
        for pair, source in zip(encode_pairs(encoder, rows), rows, strict=True):
            for row, key in zip(pair, keys[1:], strict=True):
                assert row is not None
                text = str(tokenizer.decode(row.tokens, clean_up_tokenization_spaces=False))
                text = text.removeprefix("<s> ").removeprefix("<bos>")
                assert text == source["prompt"] + source[key] + tokenizer.eos_token
                if boundary == "split":
                    prompt = encoder.prompt([source["prompt"]])[0]
                    assert row.tokens[: row.prompt_length].tolist() == prompt.tolist()
    merged = encoder.report.merged
    if name == "tokenizers/gpt2":
        assert merged > 0
        with pytest.raises(UserError, match="rows\\): tokens merge across the end of the prompt"):
            encode_pairs(Encoder(tokenizer, max_length=None), rows)
    else:
        assert merged == 0


TRL_TEMPLATES = {
    "qwen2_5": ("<|im_start|>", "<|im_end|>"),
    "qwen3": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "phi3": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
}


@pytest.mark.parametrize("name", TRL_TEMPLATES)
def test_templates_of_known_models(name: str) -> None:
    """One BOS at most, and one trained end of turn: `<|im_end|>`, `<|eot_id|>`, `<end_of_turn>`, `<|end|>`."""
    import importlib.util

    trl = importlib.util.find_spec("trl")
    assert trl is not None
    assert trl.origin is not None
    template = (Path(trl.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    bos = "<|begin_of_text|>" if name == "llama3" else None
    tokenizer = chat_tokenizer(template, *TRL_TEMPLATES[name], bos=bos)
    encoder = Encoder(tokenizer)
    end = tokenizer.convert_tokens_to_ids(TRL_TEMPLATES[name][-1])
    assert encoder.end_ids() == (EOS, end)
    row = one(encoder, [user("hi")], [reply("hello")])
    check(row)
    whole = tokenizer.apply_chat_template([user("hi"), reply("hello")], return_dict=False)
    assert row.tokens.tolist() == whole
    assert trained(row)[-6:] == [*ids("hello"), end]
    assert (row.tokens == tokenizer.bos_token_id).sum() <= 1
    assert encoder.report.end_appended == 0


# -------------------------------------------------------------------------------------------------- BOS and end tokens


def test_two_bos_tokens_are_an_error() -> None:
    encoder = Encoder(byte_tokenizer())
    with pytest.raises(UserError, match=r"row 1 starts with two BOS tokens \('<bos>'\): the text begins with it"):
        encoder.completions(["a", "<bos>a"], ["b", "b"])
    with pytest.raises(UserError, match="row 7 starts with two BOS"):
        encoder.prompt(["<bos>a"], first_row=7)
    twice = Encoder(byte_tokenizer(), chat_template="{{ bos_token }}" + CHAT_TEMPLATE)
    with pytest.raises(UserError, match=r"row 0 starts with two BOS .* template writes it twice"):
        twice.completions([[user("a")]], [[reply("b")]])


def test_a_template_writes_bos_once_though_the_tokenizer_adds_one() -> None:
    row = one(Encoder(byte_tokenizer()), [user("a")], [reply("b")])
    assert row.tokens.tolist() == [BOS, USER, *ids("a"), EOS, ASSISTANT, *ids("b"), EOS]


def test_only_the_first_of_several_end_tokens_is_trained() -> None:
    encoder = Encoder(byte_tokenizer())
    for completion, end_tokens in (("b", 1), ("b<eos>", 1), ("b<eos><eos>", 2), ("b<eos><eos><eos>", 3)):
        row = one(encoder, "a", completion)
        assert row.tokens.tolist() == [BOS, *ids("ab"), *[EOS] * end_tokens]
        assert trained(row) == [*ids("b"), EOS]
    row = one(encoder, [user("a")], [reply("b<eos>")])
    assert row.tokens[-3:].tolist() == [*ids("b"), EOS, EOS]
    assert trained(row) == [*ids("b"), EOS]


def test_an_empty_completion_trains_its_end() -> None:
    assert trained(one(Encoder(byte_tokenizer()), "a", "")) == [EOS]


def test_the_template_end_of_turn_comes_before_its_eos() -> None:
    """`reply<|end|>\\n<eos>`: a model stops at `<|end|>`, so that is what it learns."""
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt else eos_token }}"
    )
    encoder = Encoder(chat_tokenizer(template, "<|end|>", "<|call|>"))
    row = one(encoder, [user("a")], [reply("b\n")])
    assert row.tokens[-4:].tolist() == [*ids("\n"), 262, *ids("\n"), EOS]
    assert trained(row) == [*ids("b\n"), 262]
    # a special token that the content ends with is content
    assert trained(one(encoder, [user("a")], [reply("b<|call|>")])) == [*ids("b"), 263, 262]
    assert encoder.end_ids() == (EOS, 262)


def test_a_template_without_end_token_gets_eos_once() -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    encoder = Encoder(chat_tokenizer(template + "{% if add_generation_prompt %}assistant: {% endif %}"))
    row = one(encoder, [user("a")], [reply("b")])
    assert row.tokens.tolist() == [*ids("user: a\nassistant: b\n"), EOS]
    assert trained(row) == [*ids("b\n"), EOS]
    assert encoder.report.end_appended == 1
    assert any("1 of 1 completions: the chat template writes no end token" in line for line in encoder.report.lines())
    assert encoder.end_ids() == (EOS,)


def test_an_end_token_outside_the_generation_block_is_trained() -> None:
    template = CHATML_MARKED.replace("+ '<|im_end|>\n' }}{% endgen", "}}{% endgen", 1).replace(
        "{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>\n' }}"
    )
    encoder = Encoder(
        chat_tokenizer(template, "<|im_start|>", "<|im_end|>"), completion_only=False, assistant_only=True
    )
    row = one(encoder, CONVERSATION[:4], CONVERSATION[4:5])
    assert trained(row) == [*ids("1"), 263, *ids(" 22 "), 263]


@pytest.mark.filterwarnings("ignore:This sequence already has </s>")
def test_a_tokenizer_that_adds_eos_does_not_end_the_prompt_with_it() -> None:
    """ByT5 is written in Python, has no BOS, and ends every text with </s>=1; bytes are b + 3."""
    from transformers import ByT5Tokenizer

    encoder = Encoder(ByT5Tokenizer())
    row = one(encoder, "ab", "c")
    assert row.tokens.tolist() == [100, 101, 102, 1]
    assert row.prompt_length == 2
    assert encoder.prompt(["ab", ""])[0].tolist() == [100, 101]
    assert len(encoder.fingerprint()) == 64


def test_an_empty_prompt_has_a_start_token() -> None:
    assert one(Encoder(byte_tokenizer()), "", "a").tokens.tolist() == [BOS, *ids("a"), EOS]
    encoder = Encoder(byte_tokenizer(bos=False))
    row = one(encoder, "", "a")
    assert row.tokens.tolist() == [BOS, *ids("a"), EOS]
    assert row.prompt_length == 1
    assert encoder.prompt([""])[0].tolist() == [BOS]
    assert encoder.report.start_added == 1
    # a text that brings its own is left alone
    assert one(encoder, "", "<bos>a").tokens.tolist() == [BOS, *ids("a"), EOS]


# ----------------------------------------------------------------------------------------------- the end of the prompt


def test_merging_tokens_are_an_error_that_shows_both_sides() -> None:
    encoder = Encoder(merging_tokenizer())
    with pytest.raises(UserError) as caught:
        encoder.completions(["c", "cca", "ca"], ["c", "bc", "b"], first_row=10)
    message = str(caught.value)
    assert "row 11: the tokens of the prompt are not the beginning" in message
    assert "(2 of 3 rows)" in message
    assert "prompt:              'c' | 'c' | 'a'\n" in message
    assert "prompt + completion: 'c' | 'c' | 'ab' | 'c' | '</s>'\n" in message
    assert "newline" in message
    assert "boundary='split'" in message
    assert "boundary='common'" in message
    assert encoder.report.rows == 0


@pytest.mark.parametrize("lead_space", [False, True])
def test_split_keeps_the_prompts_tokens(lead_space: bool) -> None:
    """a + bc: the whole text is `ab c`, the policy sees `a` and goes on with `b c`, without a space in between."""
    encoder = Encoder(merging_tokenizer(lead_space=lead_space), boundary="split")
    lead = [4] * lead_space
    rows = encoder.completions(["ca", "ca", "c"], ["bc", "cc", "abab"])
    assert [row.tokens.tolist() for row in rows if row] == [
        [*lead, 3, 1, 2, 3, 0],
        [*lead, 3, 1, 3, 3, 0],
        [*lead, 3, 6, 6, 0],
    ]
    assert [row.prompt_length for row in rows if row] == [2 + lead_space, 2 + lead_space, 1 + lead_space]
    assert encoder.report.merged == 1


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if think is not false %}{{ '<think>' }}{% endif %}{% endif %}"
)


def test_a_template_that_renders_the_prompt_differently_is_an_error() -> None:
    """The generation prompt opens a thought that the rendered reply does not have, unless an argument turns it off."""
    tokenizer = chat_tokenizer(THINKING, "<|im_start|>", "<|im_end|>", "<think>")
    pair = ([[user("a")]], [[reply("b")]])
    with pytest.raises(UserError, match=r"row 0: .*\(1 of 1 rows\): the chat template renders the prompt differently"):
        Encoder(tokenizer).completions(*pair)
    with pytest.raises(UserError, match="boundary='split' cannot continue the prompt"):
        Encoder(tokenizer, boundary="split").completions(*pair)
    common = one(Encoder(tokenizer, boundary="common"), pair[0][0], pair[1][0])
    assert trained(common) == [*ids("b"), 263]
    chat = [user("a"), reply("b"), user("c")]
    turns: dict[str, Any] = {"completion_only": False, "assistant_only": True}
    with pytest.raises(UserError, match=r"row 0: .* the chat template renders the prompt differently"):
        Encoder(tokenizer, **turns).completions([chat], [[reply("d")]])
    every = one(Encoder(tokenizer, boundary="common", **turns), chat, [reply("d")])
    assert trained(every) == [*ids("b"), 263, *ids("d"), 263]
    quiet = one(Encoder(tokenizer, chat_template_kwargs={"think": False}), pair[0][0], pair[1][0])
    assert quiet.tokens.tolist() == common.tokens.tolist()
    by_row = one(Encoder(tokenizer), pair[0][0], pair[1][0], template_kwargs=[{"think": False}])
    assert by_row.tokens.tolist() == common.tokens.tolist()


def test_split_of_a_rendered_prompt() -> None:
    """The prompt ends with `a`, the reply goes on with `b`; rendered together they are one token."""
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    row = one(Encoder(tokenizer, boundary="split"), [user("ca")], [reply("bc")])
    assert row.tokens.tolist() == [3, 1, 2, 3, 0]
    assert row.prompt_length == 2
    with pytest.raises(UserError, match="'c' \\| 'ab' \\| 'c'"):
        one(Encoder(tokenizer), [user("ca")], [reply("bc")])


# ---------------------------------------------------------------------------------------------------------- truncation


def test_a_row_that_is_cut_trains_no_end_token() -> None:
    encoder = Encoder(byte_tokenizer(), max_length=5)
    row = one(encoder, "ab", "cdef")
    assert row.tokens.tolist() == [BOS, *ids("abcd")]
    assert trained(row) == ids("cd")
    assert one(encoder, "ab", "c").tokens.tolist() == [BOS, *ids("abc"), EOS]
    assert (encoder.report.truncated_completions, encoder.report.emptied, encoder.report.rows) == (1, 0, 2)


def test_a_prompt_as_long_as_max_length_leaves_nothing() -> None:
    encoder = Encoder(byte_tokenizer(), max_length=5)
    out = encoder.completions(["abcd", "abc", "x" * 99], ["e", "e", "e"])
    assert [row is None for row in out] == [True, False, True]
    report = encoder.report
    assert (report.emptied, report.truncated_completions, report.truncated_prompts) == (2, 1, 1)
    assert report.suggested_max_length() == 128  # 1 + 99 + 1 + 1 tokens, in multiples of 64
    assert report.suggested_max_length(0.5) == 64
    last = report.lines()[-1]
    assert "2 of 3 completions: nothing trained is left" in last
    assert "128 all of them" in last


def test_drop_uses_no_row_that_is_too_long() -> None:
    """Limit 6: <bos>ab + cd<eos> fits, one letter more does not, whichever side it is on."""
    encoder = Encoder(byte_tokenizer(), max_length=6, truncation_mode="drop")
    out = encoder.completions(["ab", "ab", "abc"], ["cd", "cde", "cd"])
    assert [None if row is None else row.tokens.tolist() for row in out] == [[BOS, *ids("abcd"), EOS], None, None]
    report = encoder.report
    assert (report.dropped, report.emptied, report.truncated_completions, report.truncated_prompts) == (2, 0, 0, 0)
    assert report.lines()[-1].startswith("2 of 3 completions: too long and not used at max_length=6; 64 holds 99 %")


def test_keep_end_cuts_the_prompt_alike_for_all_its_completions() -> None:
    """Limit 10; prompt <bos>abcdefgh (9), longest completion 4 with its EOS: 6 tokens of prompt stay, BOS first."""
    encoder = Encoder(byte_tokenizer(), max_length=10, truncation_mode="keep_end")
    long, short = encoder.completions(["abcdefgh"] * 2, ["xyz", "x"])
    assert long is not None
    assert short is not None
    assert long.tokens.tolist() == [BOS, *ids("defghxyz"), EOS]
    assert short.tokens.tolist() == [BOS, *ids("defghx"), EOS]
    assert long.prompt_length == short.prompt_length == 6
    assert trained(long) == [*ids("xyz"), EOS]
    # at most half of the prompt's room is taken; the completion's end goes then
    row = one(encoder, "abcdefgh", "0123456789")
    assert row.tokens.tolist() == [BOS, *ids("efgh01234")]
    assert trained(row) == ids("01234")
    assert (encoder.report.truncated_prompts, encoder.report.truncated_completions) == (3, 1)
    assert one(encoder, "ab", "c").tokens.tolist() == [BOS, *ids("abc"), EOS]


def test_keep_end_without_bos_and_with_trained_prompts() -> None:
    cut = Encoder(byte_tokenizer(bos=False), max_length=6, truncation_mode="keep_end")
    assert one(cut, "abcdefgh", "xy").tokens.tolist() == [*ids("fghxy"), EOS]
    whole = Encoder(byte_tokenizer(), max_length=6, truncation_mode="keep_end", completion_only=False)
    row = one(whole, "abcdefgh", "xy")
    assert row.tokens.tolist() == [BOS, *ids("ghxy"), EOS]
    assert trained(row) == [*ids("ghxy"), EOS]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(["", "ab", "abcdefghij", "é🙂"]), ORDINARY), min_size=1, max_size=8),
    st.integers(2, 20),
    st.sampled_from(["keep_start", "keep_end"]),
    st.booleans(),
    st.booleans(),
)
def test_rows_of_any_text(rows: list[tuple[str, str]], limit: int, mode: Any, bos: bool, chat: bool) -> None:
    """Invariants: the limit, the prompt shared by its completions, one end token at most, the counts, and that each
    row is what it would be alone (but for `keep_end`, which looks at the other completions).
    """
    tokenizer = TOKENIZERS[bos]
    prompts: list[Any] = [[user(p)] if chat else p for p, _ in rows]
    completions: list[Any] = [[reply(c)] if chat else c for _, c in rows]
    encoder = Encoder(tokenizer, max_length=limit, truncation_mode=mode)
    out = encoder.completions(prompts, completions)
    whole = Encoder(tokenizer, max_length=None).completions(prompts, completions)
    shared: dict[str, list[int]] = {}
    for (prompt, completion), row, full in zip(rows, out, whole, strict=True):
        assert full is not None
        check(full)
        head = "" if full.tokens[0] != BOS else "<bos>"
        said = f"<|user|>{prompt}<eos><|assistant|>{completion}<eos>" if chat else f"{prompt}{completion}<eos>"
        assert tokenizer.decode(full.tokens) == head + said
        assert trained(full) == [*ids(completion), EOS]
        assert (
            encoder.prompt([[user(prompt)] if chat else prompt])[0].tolist()
            == full.tokens[: full.prompt_length].tolist()
        )
        if row is None:
            assert full.prompt_length >= limit
            assert mode == "keep_start"
            continue
        check(row)
        assert len(row.tokens) <= limit
        assert trained(row) == trained(full)[: row.mask.sum()]
        assert (
            shared.setdefault(prompt, row.tokens[: row.prompt_length].tolist())
            == row.tokens[: row.prompt_length].tolist()
        )
        if mode == "keep_start":
            assert row.tokens.tolist() == full.tokens[:limit].tolist()
    report = encoder.report
    assert (report.rows, report.emptied) == (len(rows), sum(row is None for row in out))
    assert report.trained == sum(int(row.mask.sum()) for row in out if row)
    assert report.prompt_lengths == [full.prompt_length for full in whole if full]
    cut = sum(
        row is not None and full is not None and row.mask.sum() < full.mask.sum()
        for row, full in zip(out, whole, strict=True)
    )
    assert report.truncated_completions == cut


TOKENIZERS = {bos: byte_tokenizer(bos=bos) for bos in (True, False)}


# ------------------------------------------------------------------------------------------ special tokens in the data


def test_special_text_in_the_data_is_counted_or_stays_text() -> None:
    data = (["p", "p", "p"], ["<s>a<eos>b", "plain", "ends<eos>"])
    encoder = Encoder(byte_tokenizer())
    row, _, ended = encoder.completions(*data)
    assert row is not None
    assert ended is not None
    assert trained(row) == [*ids("<s>a"), EOS, *ids("b"), EOS]
    assert encoder.report.special_text == 1
    split = Encoder(byte_tokenizer(), split_special_tokens=True)
    row, _, again = split.completions(*data)
    assert row is not None
    assert again is not None
    assert trained(row) == [*ids("<s>a<eos>b"), EOS]
    assert row.tokens[0] == BOS
    assert again.tokens.tolist() == ended.tokens.tolist()
    assert split.report.special_text == 0


def test_special_text_in_a_conversation() -> None:
    tokenizer = byte_tokenizer()
    chat = [user("x<|assistant|>y"), reply("a<eos>b")]
    encoder = Encoder(tokenizer)
    assert trained(one(encoder, chat[:1], chat[1:])) == [*ids("a"), EOS, *ids("b"), EOS]
    assert encoder.report.special_text == 1
    split = Encoder(tokenizer, split_special_tokens=True)
    row = one(split, chat[:1], chat[1:])
    head = [BOS, USER, *ids("x<|assistant|>y"), EOS, ASSISTANT]
    assert row.tokens.tolist() == [*head, *ids("a<eos>b"), EOS]
    assert row.prompt_length == len(head)
    assert split.prompt([chat[:1]])[0].tolist() == head


# ----------------------------------------------------------------------------------------- several turns and arguments


def test_what_a_tool_says_inside_a_completion_is_not_trained() -> None:
    tools = CHATML.replace("m.content", "(m.content or '')")
    for template in (tools, CHATML_MARKED):
        encoder = Encoder(chat_tokenizer(template, "<|im_start|>", "<|im_end|>"))
        said = [reply("call"), {"role": "tool", "content": "42"}, reply("it is 42")]
        row = one(encoder, [user("?"), reply("earlier"), user("??")], said)
        assert trained(row) == [*ids("call"), 263, *ids("it is 42"), 263]


def test_a_template_that_forgets_earlier_turns_is_an_error() -> None:
    """Thoughts of earlier turns are left out, so the turn that was trained is not in the conversation any more."""
    template = CHATML.replace("m.content +", "(m.content if loop.last else m.content.split('</t>')[-1]) +")
    encoder = Encoder(
        chat_tokenizer(template, "<|im_start|>", "<|im_end|>"), completion_only=False, assistant_only=True
    )
    chat = [user("a"), reply("hm</t>b"), user("c"), reply("hm</t>d")]
    with pytest.raises(
        UserError, match=r"row 0: the chat template renders message 1 .* differently once others follow"
    ):
        encoder.completions([chat[:3]], [chat[3:]])
    shortened = CHATML.replace("m.content +", "(m.content if loop.last else m.content[:1]) +")
    encoder = Encoder(encoder.tokenizer, chat_template=shortened, completion_only=False, assistant_only=True)
    with pytest.raises(UserError, match="differently once others follow"):
        encoder.completions([chat[:3]], [chat[3:]])
    last = Encoder(encoder.tokenizer)
    assert trained(one(last, chat[:3], chat[3:])) == [*ids("hm</t>d"), 263]


def test_arguments_of_the_template_by_row() -> None:
    """Tools and others, as TRL's columns `tools` (also as JSON text) and `chat_template_kwargs`; prompts stay apart."""
    template = "{% for t in tools or [] %}{{ t.name }}{% endfor %}{{ extra }}" + CHATML
    encoder = Encoder(chat_tokenizer(template, "<|im_start|>", "<|im_end|>"), chat_template_kwargs={"extra": "E"})
    kwargs: list[Any] = [{"tools": [{"name": "T"}]}, None, {"tools": '[{"name": "T"}]', "extra": "F"}]
    prompts = encoder.prompt([[user("a")]] * 3, template_kwargs=kwargs)
    texts = [encoder.tokenizer.decode(p) for p in prompts]
    assert [text.split("<")[0] for text in texts] == ["TE", "E", "TF"]
    rows = encoder.completions([[user("a")]] * 3, [[reply("b")]] * 3, template_kwargs=kwargs)
    assert [row.tokens[: row.prompt_length].tolist() for row in rows if row] == [p.tolist() for p in prompts]


def test_keys_that_are_none_are_left_out() -> None:
    """Arrow fills the keys that a message lacks with None, and templates ask whether they are defined."""
    named = CHATML_MARKED.replace("m.content +", "m.content + (m.name if m.name is defined else '') +")
    tokenizer = chat_tokenizer(named, "<|im_start|>", "<|im_end|>")
    for encoder in (Encoder(tokenizer), Encoder(tokenizer, assistant_only=True)):
        a = one(encoder, [{**user("a"), "name": None}], [{**reply("b"), "name": None}])
        assert a.tokens.tolist() == one(encoder, [user("a")], [reply("b")]).tokens.tolist()
        assert trained(one(encoder, [user("a")], [{**reply("b"), "name": "c"}])) == [*ids("bc"), 263]


# ----------------------------------------------------------------------------------------------------------- wrong use


def test_a_missing_template_names_the_option(tmp_path: Path) -> None:
    tokenizer = character_tokenizer("ab")
    with pytest.raises(UserError, match=r"no chat template; .*`--chat_template FILE`"):
        Encoder(tokenizer).completions([[user("a")]], [[reply("b")]])
    with pytest.raises(UserError, match="--chat_template"):
        Encoder(tokenizer).prompt([[user("a")]])
    template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    for given_as in (template, str(tmp_path), str(tmp_path / "chat_template.jinja")):
        row = one(Encoder(tokenizer, chat_template=given_as), [user("a")], [reply("b")])
        assert row.tokens.tolist() == [3, EOS, 4, EOS]
        assert row.prompt_length == 2
    with pytest.raises(UserError, match=r"`chat_template` is 'absent.jinja': neither"):
        Encoder(tokenizer, chat_template="absent.jinja")


def test_a_template_that_fails_names_the_row() -> None:
    encoder = Encoder(byte_tokenizer())
    with pytest.raises(UserError, match="row 4: the chat template failed: unknown role tool"):
        encoder.completions(
            [[user("a")], [{"role": "tool", "content": "a"}]], [[reply("b")], [reply("b")]], first_row=3
        )


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        ("a", [reply("b")], "row 5: the prompt is text and the completion messages"),
        ([user("a")], "b", "row 5: the prompt is messages and the completion text"),
        ([], [reply("b")], "row 5: the prompt is an empty list"),
        (None, "b", "row 5: the prompt is NoneType"),
        ("a", 3, "row 5: the completion is int"),
        ([{"role": "user"}], [reply("b")], "row 5: message 0 of the prompt has role, expected role and content"),
        ([user("a"), "b"], [reply("b")], "row 5: message 1 of the prompt is str"),
    ],
)
def test_malformed_rows(prompt: Any, completion: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Encoder(byte_tokenizer()).completions([prompt], [completion], first_row=5)


def test_options_are_checked() -> None:
    tokenizer = byte_tokenizer()
    for options, message in (
        ({"max_length": 1}, "`max_length` is 1"),
        ({"truncation_mode": "keep"}, "`truncation_mode` is 'keep', expected one of keep_start, keep_end, drop"),
        ({"boundary": "merge"}, "`boundary` is 'merge'"),
    ):
        with pytest.raises(UserError, match=message):
            Encoder(tokenizer, **options)
    with pytest.raises(UserError, match="expected a tokenizer"):
        Encoder("gpt2")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="2 prompts for 1 completions"):
        Encoder(tokenizer).completions(["a", "b"], ["c"])
    with pytest.raises(UserError, match="`assistant_only` needs conversations"):
        Encoder(tokenizer, assistant_only=True).completions(["a"], ["b"])
    with pytest.raises(UserError, match="row 0: no turn of the assistant"):
        Encoder(tokenizer, assistant_only=True, completion_only=False).completions([[user("a")]], [[user("b")]])
    without = byte_tokenizer()
    without.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        Encoder(without)


# ---------------------------------------------------------------------------------- examples, fingerprints, the report


def test_examples_show_what_is_trained() -> None:
    encoder = Encoder(byte_tokenizer())
    assert encoder.decode_example(one(encoder, "Q 🙂", "A é")) == "<bos>Q 🙂⟦A é<eos>⟧"
    cut = Encoder(byte_tokenizer(), max_length=4)
    assert cut.decode_example(one(cut, "Q", "é🙂")) == "<bos>Q⟦é⟧"
    turns = Encoder(byte_tokenizer(), assistant_only=True, completion_only=False)
    shown = turns.decode_example(one(turns, [user("a"), reply("1"), user("b")], [reply("2")]))
    assert shown == "<bos><|user|>a<eos><|assistant|>⟦1<eos>⟧<|user|>b<eos><|assistant|>⟦2<eos>⟧"
    # a mark inside a character goes before it
    half = Encoded(np.array(ids("aé"), np.int32), np.array([False, False, True]), 2)
    assert encoder.decode_example(half) == "a⟦é⟧"


def test_the_fingerprint_covers_what_decides_a_row(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = Encoder(byte_tokenizer()).fingerprint()
    used = Encoder(byte_tokenizer())
    used.completions(["a"], ["b"])
    used.tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)  # leaves its settings in the tokenizer
    byte_tokenizer().save_pretrained(tmp_path)
    assert used.fingerprint() == base == Encoder(AutoTokenizer.from_pretrained(tmp_path)).fingerprint()
    variants = [
        Encoder(byte_tokenizer(bos=False)),
        Encoder(chat_tokenizer(CHAT_TEMPLATE, "<more>")),
        Encoder(chat_tokenizer(CHATML)),
        Encoder(byte_tokenizer(), chat_template=CHATML_MARKED),
        Encoder(byte_tokenizer(), chat_template_kwargs={"think": False}),
        Encoder(byte_tokenizer(), max_length=8),
        Encoder(byte_tokenizer(), truncation_mode="keep_end"),
        Encoder(byte_tokenizer(), boundary="split"),
        Encoder(byte_tokenizer(), completion_only=False),
        Encoder(byte_tokenizer(), assistant_only=True),
        Encoder(byte_tokenizer(), split_special_tokens=True),
        Encoder(character_tokenizer("ab")),
        Encoder(character_tokenizer("ba")),
    ]
    assert len({base, *(encoder.fingerprint() for encoder in variants)}) == len(variants) + 1


def test_the_report_is_json_with_quantiles_of_whole_lengths() -> None:
    encoder = Encoder(byte_tokenizer(), max_length=16)
    assert encoder.report.lines() == []
    assert encoder.report.suggested_max_length() is None
    encoder.completions(["p" * 3] * 100, ["c" * n for n in range(100)])
    summary = json.loads(json.dumps(encoder.report.summary()))
    # prompts have 1 + 3 tokens, completions n + 1; the completion of 12 tokens is the longest that fits
    assert summary["rows"] == 100
    assert summary["truncated_completions"] == 88
    assert summary["lengths"]["prompt"] == [4, 4, 4, 4]
    assert summary["lengths"]["completion"] == [51, 91, 100, 100]
    assert summary["lengths"]["row"] == [55, 95, 104, 104]
    assert summary["suggested_max_length"] == 128
    assert summary["trained"] == sum(min(n + 1, 12) for n in range(100))


# -------------------------------------------------------------------------------------------- tokenizers without files


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=40), st.booleans())
def test_bytes_survive(text: str, bos: bool) -> None:
    tokenizer = TOKENIZERS[bos]
    encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(encoded) == text
    if not any(token in text for token in SPECIAL):
        assert encoded == ids(text)


def test_bytes_keep_what_other_tokenizers_change() -> None:
    tokenizer = TOKENIZERS[True]
    for text in (
        "  a  b \r\n\t",
        "don 't . , !",
        "<pad><eos> <|user|>",
        "\u00a0\u2028\ufffd\x00",
        "é",
        "e\u0301",
        "Ġ Ċ",
    ):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer) == 262
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("", add_special_tokens=True)["input_ids"] == [BOS]


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet="01 +=é\n🙂▁", max_size=30))
def test_characters_survive(text: str) -> None:
    tokenizer = CHARACTERS
    encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoded == [3 + "01 +=é\n🙂▁".index(character) for character in text]
    assert tokenizer.decode(encoded) == text


CHARACTERS = character_tokenizer("01 +=é\n🙂▁")


@pytest.mark.parametrize(
    "make", [byte_tokenizer, lambda: byte_tokenizer(bos=False), lambda: character_tokenizer("a b\né")]
)
def test_saved_tokenizers_are_the_same(make: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = make()
    tokenizer.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded.special_tokens_map == tokenizer.special_tokens_map
        assert loaded.chat_template == tokenizer.chat_template
        for text in ("a b\né", "", "a<eos>b"):
            assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
            bare = loaded(text, add_special_tokens=False)["input_ids"]
            assert loaded.decode(bare) == text


def test_unknown_characters_are_an_error_that_names_them() -> None:
    encoder = Encoder(character_tokenizer("ab"))
    with pytest.raises(UserError, match="row 3: the tokenizer refused the text: it has no token for 'x', 'é'"):
        encoder.completions(["a", "a"], ["b", "éaxé"], first_row=2)
    assert one(encoder, "a", "b").tokens.tolist() == [BOS, 3, 4, EOS]


def test_alphabets_are_checked() -> None:
    with pytest.raises(UserError, match="`alphabet` is empty"):
        character_tokenizer("")
    with pytest.raises(UserError, match="names 'a', 'b' more than once"):
        character_tokenizer("abcab")


def test_the_chat_template_of_bytes() -> None:
    tokenizer = byte_tokenizer()
    chat = [{"role": "system", "content": "s"}, user("u"), reply("a")]
    out: Any = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert out["input_ids"] == [BOS, 3, *ids("s"), EOS, USER, *ids("u"), EOS, ASSISTANT, *ids("a"), EOS]
    assert out["assistant_masks"] == [0] * 8 + [1, 1]
