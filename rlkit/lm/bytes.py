"""Tokenizers that are built in code: bytes for any text, characters for tiny alphabets.

Both are `PreTrainedTokenizerFast` objects without merges, so that a token never spans the end of a prompt, and both
survive `save_pretrained` and `AutoTokenizer.from_pretrained`. `decode(encode(x)) == x` for every text `x` that they
accept: all of Unicode for bytes, the alphabet for characters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlkit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' ~ message['role'] ~ ', expected system, user or assistant') }}"
    "{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] ~ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] ~ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""`<bos>`, then each turn as its role's token, its content and `<eos>`."""


def byte_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """262 tokens: `<pad>`=0, `<bos>`=1, `<eos>`=2, three roles, then byte b at 6 + b; with a chat template.

    Args:
        bos: plain text starts with `<bos>`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = (PAD, BOS, EOS, *ROLES)
    vocabulary = {token: i for i, token in enumerate(special)}
    vocabulary |= {character: len(special) + byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer, bos=bos, chat_template=CHAT_TEMPLATE, extra_special_tokens=list(ROLES))


def character_tokenizer(alphabet: str, *, bos: bool = True) -> PreTrainedTokenizerFast:
    """3 + n tokens: `<pad>`=0, `<bos>`=1, `<eos>`=2, then the n characters of `alphabet` in their order.

    There is no token for unknown characters: encoding one raises (`rlkit.lm.tokens` says which row and character).

    Args:
        alphabet: characters (Unicode code points), each once.
        bos: plain text starts with `<bos>`.

    Raises:
        UserError: an empty alphabet, or one that names a character twice.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    if not alphabet:
        raise UserError("`alphabet` is empty; give the characters that texts may have, such as '0123456789+='")
    twice = sorted({character for character in alphabet if alphabet.count(character) > 1})
    if twice:
        raise UserError(f"`alphabet` names {', '.join(map(repr, twice))} more than once")
    special = (PAD, BOS, EOS)
    vocabulary = {token: i for i, token in enumerate((*special, *alphabet))}
    # The unknown token is named but has no id: the model then refuses a text instead of losing characters.
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, bos=bos)


def _wrap(tokenizer: Any, *, bos: bool, **fields: Any) -> PreTrainedTokenizerFast:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens([PAD, BOS, EOS, *fields.get("extra_special_tokens", [])])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **fields,
    )


def _byte_characters() -> list[str]:
    """The printable stand-in of each byte in GPT-2's byte-level alphabet (Radford et al. 2019): printable Latin-1
    characters stand for themselves, the others for U+0100 onwards in the order of their bytes.
    """
    itself = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256))
    return [chr(byte) if byte in itself else chr(256 + next(others)) for byte in range(256)]
