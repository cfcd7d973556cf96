"""Text and conversations -> rows of tokens, rendered once and tokenised once.

Rules, with what differs from TRL's `DPOTrainer` and `SFTTrainer`:

- *Text*: prompt + completion + EOS is tokenised as one text, EOS only where the completion does not end with it. The
  tokenizer puts its own BOS. *Conversations*: the chat template renders the prompt with its generation prompt and
  prompt + completion without; the tokenizer adds nothing to what the template wrote. So far the ids are TRL's.
- The prompt's tokens must be a prefix of the row's tokens, as a policy that generates starts from the prompt's own
  tokens. Where tokens merge across the end of the prompt, `boundary` decides: an `error` that shows both; `split`,
  which keeps the prompt's tokens and tokenises the completion apart in these rows only; or `common`, TRL's reading,
  where the completion begins at the divergence, in a context that does not occur at generation.
- One BOS at most. An empty prompt whose tokenizer adds none starts with the BOS (else EOS) token all the same: a first
  token needs a context to have a probability. TRL leaves that first token untrained.
- One end token is trained. In text it is EOS. In a rendered turn it is the template's end of turn, the first special
  token it writes after the content (`<|end|>` of `<|end|>\\n<|endoftext|>`), or EOS if that comes first; what follows
  stays in the row untrained, where TRL trains it. A template without end token gets EOS appended (TRL: nothing).
- In a completion of several messages only the assistant's are trained, not what a tool or a user says.
- `keep_start` cuts the end, so that a cut row has no trained end token. `keep_end` cuts the beginning of the prompt
  after its BOS, by the same amount for all completions of a prompt (TRL: each by its own, BOS included), but never
  below half of `max_length`; what is still too long is cut at its end. `drop` cuts nothing: a row longer than
  `max_length` is not used (TRL: so in its `RewardTrainer`). A row that is not used, or has no trained token left, is
  None and counted.
- Text of a special token inside the data, such as `</s>` in HTML, becomes that token, as in TRL; such rows are counted.
  With `split_special_tokens` it stays text, in conversations as well, where the template's own tokens stay tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rlkit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Conversation = str | Sequence[Mapping[str, Any]]
"""A text, or messages {role, content}."""
Messages = list[dict[str, Any]]
Kwargs = Mapping[str, Any]
Run = tuple[int, int]

RULES = 1
"""Number of the rules above, part of `Encoder.fingerprint`."""
CHUNK = 1024  # rows of one tokenizer call
PROBE = "rlkit-probe"  # content whose surroundings show what a template writes after it
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One completion in its prompt's context.

    Args:
        tokens: (L,) int32, prompt and completion.
        mask: (L,) bool, True where the token is trained: its log-prob counts. Never before `prompt_length`.
        prompt_length: leading tokens that are the prompt, at least 1; all completions of a prompt share them.
    """

    tokens: np.ndarray
    mask: np.ndarray
    prompt_length: int


@dataclass(slots=True)
class EncodingReport:
    """Counts of what an `Encoder` has made, over all its calls.

    Args:
        max_length: the encoder's.
        rows: completions encoded, those without a trained token included.
        truncated_completions: rows whose completion lost some, but not all, of its trained tokens.
        truncated_prompts: rows whose prompt alone is longer than `max_length`, or was cut (`keep_end`).
        emptied: rows that truncation left without a trained token.
        dropped: rows longer than `max_length` under `drop`.
        end_appended: rows whose chat template writes no end token; EOS was appended.
        start_added: rows whose prompt is empty and whose tokenizer adds no BOS; a start token was put before.
        merged: rows whose tokens merge across the end of the prompt (`boundary` `split` or `common`).
        special_text: rows whose completion contains the text of a special token before its end.
        trained: trained tokens after truncation.
        prompt_lengths, completion_lengths: tokens of each row before truncation.
    """

    max_length: int | None
    rows: int = 0
    truncated_completions: int = 0
    truncated_prompts: int = 0
    emptied: int = 0
    dropped: int = 0
    end_appended: int = 0
    start_added: int = 0
    merged: int = 0
    special_text: int = 0
    trained: int = 0
    prompt_lengths: list[int] = field(default_factory=list, repr=False)
    completion_lengths: list[int] = field(default_factory=list, repr=False)

    def quantiles(self, levels: Sequence[float] = (0.5, 0.9, 0.99, 1.0)) -> dict[str, list[int]]:
        """Lengths in tokens, before truncation, of `prompt`, `completion` and the whole `row` at these levels."""
        prompt, completion = np.array(self.prompt_lengths), np.array(self.completion_lengths)
        named = {"prompt": prompt, "completion": completion, "row": prompt + completion}
        return {
            name: [int(q) for q in np.quantile(lengths, levels, method="higher")] if len(lengths) else []
            for name, lengths in named.items()
        }

    def suggested_max_length(self, share: float = 1.0) -> int | None:
        """The smallest multiple of 64 tokens that holds this share of the rows whole; None before the first row."""
        lengths = self.quantiles((share,))["row"]
        return 64 * math.ceil(lengths[0] / 64) if lengths else None

    def summary(self) -> dict[str, Any]:
        """The counts and quantiles as one JSON object."""
        counts = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("prompt_lengths", "completion_lengths")
        }
        suggested = {"suggested_max_length": self.suggested_max_length(), "quantile_levels": [0.5, 0.9, 0.99, 1.0]}
        return {**counts, **suggested, "lengths": self.quantiles()}

    def lines(self) -> list[str]:
        """The report for people, one fact a line; only the lines that say something."""
        out = []
        for name, (middle, ninety, most, longest) in ((k, v) for k, v in self.quantiles().items() if v):
            out.append(f"tokens of a {name}: median {middle}, 90 % {ninety}, 99 % {most}, longest {longest}")
        held = (
            f"max_length={self.max_length}; {self.suggested_max_length(0.99)} holds 99 % of the rows whole, "
            f"{self.suggested_max_length()} all of them"
        )
        facts = [
            (self.truncated_completions, f"the completion is cut at {held}"),
            (self.truncated_prompts, f"the prompt is longer than max_length={self.max_length} or was cut to fit it"),
            (self.end_appended, "the chat template writes no end token, so EOS was appended"),
            (self.start_added, "the prompt is empty and the tokenizer adds no BOS, so a start token was put before"),
            (self.merged, "tokens merge across the end of the prompt (`boundary`)"),
            (self.special_text, "the completion contains the text of a special token, which becomes that token"),
            (self.dropped, f"too long and not used at {held}"),
            (self.emptied, f"nothing trained is left and the row is not used at {held}"),  # the gravest comes last
        ]
        return out + [f"{n:,} of {self.rows:,} completions: {text}" for n, text in facts if n]


@dataclass(slots=True)
class _Row:
    """A row on its way: what messages call it, what it is made of, and what has become of it."""

    place: str
    prompt: Conversation
    completion: Conversation
    kwargs: Kwargs
    group: str
    text: str = ""
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    runs: list[Run] = field(default_factory=list)  # parts to train, end tokens and what follows them included
    prompt_length: int = 0

    @property
    def chat(self) -> bool:
        return not isinstance(self.prompt, str)

    @property
    def messages(self) -> Messages:
        return [dict(m) for part in (self.prompt, self.completion) for m in part]  # type: ignore[arg-type]


class Encoder:
    """Makes token rows; `report` counts what it has done.

    Args:
        tokenizer: a text tokenizer of transformers, or the like. It is not changed.
        max_length: tokens of prompt and completion together; None cuts nothing.
        truncation_mode: `keep_start`, `keep_end` or `drop`, see the module's rules.
        boundary: `error`, `split` or `common`: what happens where tokens merge across the end of a prompt.
        chat_template: Jinja, as a file, a folder with `chat_template.jinja`, or a text; None takes the tokenizer's.
        chat_template_kwargs: passed to the template, such as `{"enable_thinking": False}`.
        completion_only: train on completions; False trains the prompts as well.
        assistant_only: train on the assistant's turns, of the completion, or of all with `completion_only=False`. Uses
            the template's `{% generation %}` blocks; without them, the conversation is rendered turn by turn.
        split_special_tokens: the text of a special token inside the data stays text.

    Raises:
        UserError: a value out of range, or a template file that does not exist.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = 1024,
        truncation_mode: Literal["keep_start", "keep_end", "drop"] = "keep_start",
        boundary: Literal["error", "split", "common"] = "error",
        chat_template: str | None = None,
        chat_template_kwargs: Kwargs | None = None,
        completion_only: bool = True,
        assistant_only: bool = False,
        split_special_tokens: bool = False,
    ) -> None:
        from transformers import PreTrainedTokenizerBase

        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise UserError(f"`processing_class` is {type(tokenizer).__name__}, expected a tokenizer of text")
        if max_length is not None and max_length < 2:
            raise UserError(
                f"`max_length` is {max_length}; a row needs at least 2 tokens, one of context and one to train"
            )
        for name, value, choices in (
            ("truncation_mode", truncation_mode, ("keep_start", "keep_end", "drop")),
            ("boundary", boundary, ("error", "split", "common")),
        ):
            if value not in choices:
                raise UserError(f"`{name}` is {value!r}, expected one of {', '.join(choices)}")
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token, so completions could not end; set `tokenizer.eos_token`")
        self.tokenizer: Any = tokenizer
        self.max_length, self.truncation_mode, self.boundary = max_length, truncation_mode, boundary
        self.completion_only, self.assistant_only = completion_only, assistant_only
        self.split_special_tokens = split_special_tokens
        self.chat_template = None if chat_template is None else _template(chat_template)
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.report = EncodingReport(max_length)
        self._bos, self._eos = tokenizer.bos_token_id, int(tokenizer.eos_token_id)
        self._suffix: int | None = None

    # ---------------------------------------------------------------- what callers use

    def prompt(
        self,
        prompts: Sequence[Conversation],
        *,
        template_kwargs: Sequence[Kwargs | None] | None = None,
        first_row: int = 0,
        numbers: Sequence[int] | None = None,
        source: str = "",
    ) -> list[np.ndarray]:
        """Prompts to generate from: (L,) int32 each, conversations with their generation prompt, nothing truncated.

        Equal to the first `prompt_length` tokens of the prompt's rows, except under `boundary="common"` and truncation.

        Args:
            prompts: texts or conversations.
            template_kwargs: one mapping a prompt, added to `chat_template_kwargs` (such as `{"tools": [...]}`).
            first_row, numbers, source: as in `completions`.

        Raises:
            UserError: no chat template, one that fails, a malformed conversation, two BOS tokens.
        """
        rows = self._rows(prompts, None, template_kwargs, first_row, numbers, source)
        encoded = self._prompts(rows)
        for row in rows:
            row.tokens = encoded[row.group]
            row.prompt_length = len(row.tokens)
            self._check_bos(row)
        return [row.tokens for row in rows]

    def completions(
        self,
        prompts: Sequence[Conversation],
        completions: Sequence[Conversation],
        *,
        template_kwargs: Sequence[Kwargs | None] | None = None,
        first_row: int = 0,
        numbers: Sequence[int] | None = None,
        source: str = "",
    ) -> list[Encoded | None]:
        """One row for each completion; `prompts[i]` is the prompt of `completions[i]`, and both are of one type.

        Equal prompts are tokenised once, and under `boundary="common"` and `keep_end` their completions are treated
        together, so give all completions of a prompt in one call.

        Args:
            prompts, completions: texts or conversations.
            template_kwargs: one mapping a row, added to `chat_template_kwargs` (such as `{"tools": [...]}`).
            first_row: number of the first row in messages.
            numbers: of each row in messages, where completions of one row follow each other or rows are left out.
            source: what the rows are of, for messages.

        Returns:
            Rows in the order given; None where truncation leaves nothing to train, or drops the row (see `report`).

        Raises:
            UserError: tokens that merge across the end of a prompt (`boundary="error"`), no chat template, one that
                fails or renders an assistant's turn differently once others follow, a malformed conversation, two BOS
                tokens.
        """
        if len(prompts) != len(completions):
            raise UserError(
                f"{len(prompts)} prompts for {len(completions)} completions; expected one prompt a completion"
            )
        rows = self._rows(prompts, completions, template_kwargs, first_row, numbers, source)
        starts = self._tokenise(rows)
        if self.completion_only:
            self._place_boundaries(rows, starts)
        self._place_runs(rows)
        masks = [self._mask(row) for row in rows]
        longest: dict[str, int] = {}  # completion of each prompt
        for row, mask in zip(rows, masks, strict=True):
            before = _common(starts[row.group], row.tokens)
            self.report.prompt_lengths.append(before)
            self.report.completion_lengths.append(len(row.tokens) - before)
            if not self.completion_only:
                row.prompt_length = max(1, int(mask.argmax()))
            self._check_bos(row)
            longest[row.group] = max(longest.get(row.group, 0), len(row.tokens) - row.prompt_length)
        return [self._truncate(row, mask, longest[row.group]) for row, mask in zip(rows, masks, strict=True)]

    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion: EOS, and the end of turn that the chat template writes, if there is one."""
        return tuple(dict.fromkeys((self._eos,) if self._turn_end is None else (self._eos, self._turn_end)))

    def decode_example(self, encoded: Encoded) -> str:
        """The row's text, special tokens included, with its trained parts in ⟦…⟧."""
        tokens, out, position = encoded.tokens, "", 0
        text = self._decode(tokens)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], encoded.mask, [False]]).astype(np.int8)))
        for k, edge in enumerate(edges):
            # Half of a character decodes to U+FFFD, which the whole text does not have; the mark goes before it.
            upto = max(position, len(os.path.commonprefix([self._decode(tokens[:edge]), text])))  # noqa: RUF071
            out += text[position:upto] + "⟦⟧"[k % 2]
            position = upto
        return out + text[position:]

    def fingerprint(self) -> str:
        """SHA-256 of all that decides a row's tokens besides its text: tokenizer, template, lengths and options."""
        tokenizer = self.tokenizer
        if tokenizer.is_fast:
            backend = json.loads(tokenizer.backend_tokenizer.to_str())
            content: Any = {k: v for k, v in backend.items() if k not in ("truncation", "padding")}  # state of calls
        else:
            content = [sorted(tokenizer.get_vocab().items()), repr(tokenizer.init_kwargs)]
        parts = {
            "rules": RULES,
            "tokenizer": content,
            "special": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
            "template": tokenizer.chat_template if self.chat_template is None else self.chat_template,
            "kwargs": _key(self.chat_template_kwargs),
            "options": [
                self.max_length, self.truncation_mode, self.boundary, self.completion_only, self.assistant_only,
                self.split_special_tokens,
            ],
        }  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    # ---------------------------------------------------------------- texts and templates -> ids

    def _rows(
        self,
        prompts: Sequence[Conversation],
        completions: Sequence[Conversation] | None,
        template_kwargs: Sequence[Kwargs | None] | None,
        first_row: int,
        numbers: Sequence[int] | None,
        source: str,
    ) -> list[_Row]:
        if numbers is not None and len(numbers) != len(prompts):
            raise UserError(f"{len(numbers)} `numbers` for {len(prompts)} rows; expected one a row")
        if template_kwargs is not None and len(template_kwargs) != len(prompts):
            raise UserError(f"{len(template_kwargs)} `template_kwargs` for {len(prompts)} rows; expected one a row")
        rows = []
        for i, raw in enumerate(prompts):
            place = f"{source}{': ' if source else ''}row {first_row + i if numbers is None else numbers[i]}"
            prompt = _checked(raw, place, "prompt")
            completion = _checked(completions[i], place, "completion") if completions is not None else type(prompt)()
            if isinstance(prompt, str) != isinstance(completion, str):
                kinds = ["text" if isinstance(x, str) else "messages" for x in (prompt, completion)]
                raise UserError(f"{place}: the prompt is {kinds[0]} and the completion {kinds[1]}; use one type")
            kwargs = {**self.chat_template_kwargs, **((template_kwargs[i] if template_kwargs else None) or {})}
            if isinstance(kwargs.get("tools"), str):  # as files hold them
                kwargs["tools"] = json.loads(kwargs["tools"])
            group = f"text {prompt}" if isinstance(prompt, str) else _key([prompt, kwargs])
            rows.append(_Row(place, prompt, completion, kwargs, group))
        return rows

    def _prompts(self, rows: list[_Row]) -> dict[str, np.ndarray]:
        """Tokens of each distinct prompt, by its group."""
        first: dict[str, _Row] = {}
        for row in rows:
            first.setdefault(row.group, row)
        distinct = list(first.values())
        texts = [row for row in distinct if not row.chat]
        out = dict(zip((r.group for r in texts), self._ids([str(r.prompt) for r in texts], texts), strict=True))
        for row in texts:
            if not len(out[row.group]):
                out[row.group] = np.array([self._start], np.int32)
        chats = [row for row in distinct if row.chat]
        ids = self._chat_ids([(row, list(row.prompt)) for row in chats], generation_prompt=True)  # type: ignore[arg-type]
        return out | dict(zip((row.group for row in chats), ids, strict=True))

    def _tokenise(self, rows: list[_Row]) -> dict[str, np.ndarray]:
        """Fill `text` and `tokens` of the rows; return the tokens of their prompts by group."""
        starts = self._prompts(rows)
        texts = [row for row in rows if not row.chat]
        eos = self.tokenizer.eos_token
        for row in texts:
            completion = str(row.completion)
            body = completion.removesuffix(eos)
            row.text = body if self.split_special_tokens else body + eos  # as text it would be split, too
            self.report.special_text += self._has_special_text([body])
        for row, ids in zip(texts, self._ids([f"{r.prompt}{r.text}" for r in texts], texts), strict=True):
            if not len(ids) or ids[-1] != self._eos:
                ids = np.append(ids, np.int32(self._eos))
            start = starts[row.group]
            if not row.prompt and (start[0] != ids[0] or len(ids) == 1):
                ids = np.concatenate([start, ids])
                self.report.start_added += 1
            row.tokens = ids
        chats = [row for row in rows if row.chat]
        self._mark_turns([row for row in chats if self._is_by_turn(row) and self._marks_turns])
        chats = [row for row in chats if not len(row.tokens)]
        for row, ids in zip(chats, self._chat_ids([(r, r.messages) for r in chats]), strict=True):
            row.tokens = ids
        for row in rows:
            if row.chat:
                self.report.special_text += self._has_special_text(_contents(row.completion))
        return starts

    def _ids(self, texts: list[str], rows: Sequence[_Row], *, plain: bool = True) -> list[np.ndarray]:
        """(L,) int32 of each text: `plain` with the tokenizer's own BOS, otherwise nothing is added."""
        if plain and self._suffix is None:
            self._suffix = self._count_suffix(next((text for text in texts if text), "a"), rows[:1])
        out: list[np.ndarray] = []
        for i in range(0, len(texts), CHUNK):
            out += self._call(texts[i : i + CHUNK], rows[i : i + CHUNK], plain, plain and self.split_special_tokens)
        return [ids[: -self._suffix] for ids in out] if plain and self._suffix else out

    def _call(self, texts: list[str], rows: Sequence[_Row], bos: bool, split: bool, offsets: bool = False) -> list[Any]:
        """Ids of a batch (or pairs of ids and offsets), with what the tokenizer adds (`bos`), special text `split`.

        Raises:
            UserError: the tokenizer refused a text, such as a character outside a fixed alphabet.
        """
        options: dict[str, Any] = {"split_special_tokens": split} if self.tokenizer.is_fast else {}
        if offsets:
            options["return_offsets_mapping"] = True

        def call(batch: list[str]) -> Any:
            return self.tokenizer(
                batch,
                add_special_tokens=bos,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
                **options,
            )

        try:
            encoded = call(texts)
        except Exception:  # the tokenizers library raises plain Exception
            for text, row in zip(texts, rows, strict=False):
                error = _failure(call, text)
                if error is not None:
                    characters = set(text if split or not self._special_texts else self._special_texts.sub("", text))
                    unknown = sorted(character for character in characters if _failure(call, character) is not None)
                    why = f"it has no token for {', '.join(map(repr, unknown))}" if unknown else str(error)
                    raise UserError(f"{row.place}: the tokenizer refused the text: {why}") from error
            raise
        tokens = [np.asarray(ids, np.int32) for ids in encoded["input_ids"]]
        return list(zip(tokens, encoded["offset_mapping"], strict=True)) if offsets else tokens

    def _count_suffix(self, text: str, rows: Sequence[_Row]) -> int:
        """How many special tokens (an EOS, as a rule) the tokenizer itself puts behind a text; they are taken off."""
        try:
            bare, whole = (self._call([text], rows, bos, self.split_special_tokens)[0] for bos in (False, True))
        except UserError:  # the caller's own call then says so, with the row
            return 0
        extra = len(whole) - len(bare)
        before = next((k for k in range(extra, -1, -1) if np.array_equal(whole[k : k + len(bare)], bare)), extra)
        return extra - before

    def _chat_ids(self, chats: list[tuple[_Row, Messages]], *, generation_prompt: bool = False) -> list[np.ndarray]:
        rows = [row for row, _ in chats]
        if not self.split_special_tokens:
            return self._ids(self._render(chats, generation_prompt), rows, plain=False)

        def encode(batch: list[Messages], kwargs: Kwargs) -> list[list[int]]:
            encoded = self.tokenizer.apply_chat_template(
                batch, chat_template=self.chat_template, add_generation_prompt=generation_prompt, return_dict=True,
                sanitize_control_tokens=True, **kwargs,
            )  # fmt: skip
            return encoded["input_ids"]

        return [np.asarray(ids, np.int32) for ids in self._by_kwargs(chats, encode)]

    def _render(self, chats: list[tuple[_Row, Messages]], generation_prompt: bool) -> list[str]:
        def render(batch: list[Messages], kwargs: Kwargs) -> list[str]:
            return self.tokenizer.apply_chat_template(
                batch,
                chat_template=self.chat_template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **kwargs,
            )

        return self._by_kwargs(chats, render)

    def _by_kwargs(
        self, chats: list[tuple[_Row, Messages]], function: Callable[[list[Messages], Kwargs], list[Any]]
    ) -> list[Any]:
        """`function` of all conversations, called once for each distinct set of template arguments.

        Raises:
            UserError: there is no template, or it failed; the message names the row.
        """
        if chats:
            self._require_template()
        batches: dict[str, list[int]] = {}
        for i, (row, _) in enumerate(chats):
            batches.setdefault(_key(row.kwargs) if row.kwargs else "", []).append(i)
        out: list[Any] = [None] * len(chats)
        for members in batches.values():
            kwargs = chats[members[0]][0].kwargs
            try:
                results = function([chats[i][1] for i in members], kwargs)
            except Exception:
                results = []
                for i in members:
                    try:
                        results += function([chats[i][1]], kwargs)
                    except Exception as error:  # whatever a template's author raises
                        raise UserError(f"{chats[i][0].place}: the chat template failed: {error}") from error
            for i, result in zip(members, results, strict=True):
                out[i] = result
        return out

    def _require_template(self) -> str:
        try:
            return self.tokenizer.get_chat_template(self.chat_template)
        except ValueError as error:
            raise UserError(
                "the data are conversations and the tokenizer has no chat template; give the one that the model was "
                "trained with as `--chat_template FILE` (a Jinja file; in Python `chat_template=`, a file or text)"
                + (f" ({error})" if isinstance(self.tokenizer.chat_template, dict) else "")
            ) from None

    # ---------------------------------------------------------------- where the completion begins

    def _place_boundaries(self, rows: list[_Row], starts: Mapping[str, np.ndarray]) -> None:
        """Set `prompt_length`; under `split`, also replace the tokens of rows that merge.

        Raises:
            UserError: a prompt's tokens are no prefix of its row's tokens, and `boundary` does not say what then.
        """
        apart = []
        shortest: dict[str, int] = {}
        for row in rows:
            start = starts[row.group]
            row.prompt_length = common = _common(start, row.tokens)
            if common < len(start):
                apart.append(row)
            shortest[row.group] = min(common, shortest.get(row.group, common))
        if not apart:
            return
        if self.boundary == "error":
            row = apart[0]
            raise self._parted(row, starts[row.group], row.tokens, apart, rows)
        self.report.merged += len(apart)
        if self.boundary == "split":
            for row in apart:
                row.tokens = self._split(row, starts[row.group])
                row.prompt_length = len(starts[row.group])
            return
        for row in rows:
            row.prompt_length = shortest[row.group]
            if not row.prompt_length:
                raise UserError(
                    f"{row.place}: prompt and prompt + completion have no token in common, so no context is left; "
                    "boundary='split' keeps the prompt's tokens"
                )

    def _parted(
        self, row: _Row, prompt: np.ndarray, whole: np.ndarray, apart: Sequence[_Row], rows: Sequence[_Row]
    ) -> UserError:
        count, total = (len({each.place for each in some}) for some in (apart, rows))
        if row.chat:
            cause = "the chat template renders the prompt differently once a reply follows"
            advice = (
                "pass the template arguments that make it consistent (`chat_template_kwargs`, such as "
                "enable_thinking=false), or another `--chat_template`"
            )
        else:
            cause, advice = "tokens merge across the end of the prompt", "end the prompts with a newline"
        return UserError(
            f"{row.place}: the tokens of the prompt are not the beginning of the tokens of prompt + completion "
            f"({count:,} of {total:,} rows): {cause}.{self._tails(prompt, whole)}\n"
            f"Either {advice}; or set boundary='split', which tokenises the completion apart in these rows, so that "
            "the model sees the tokens it sees when it generates; or boundary='common', which lets the completion "
            "begin where they part (as TRL does)."
        )

    def _tails(self, prompt: np.ndarray, whole: np.ndarray) -> str:
        """Up to two tokens before and three after the divergence, each decoded."""
        common = _common(prompt, whole)

        def tail(tokens: np.ndarray) -> str:
            places = range(max(0, common - 2), min(common + 3, len(tokens)))
            shown = " | ".join(repr(self._decode(tokens[i : i + 1])) for i in places)
            return f"{'… ' if common > 2 else ''}{shown}{' …' if common + 3 < len(tokens) else ''}"

        return (
            f" They part after {common} tokens:\n"
            f"  prompt:              {tail(prompt)}\n"
            f"  prompt + completion: {tail(whole)}"
        )

    def _split(self, row: _Row, start: np.ndarray) -> np.ndarray:
        """Tokens of the prompt, then those of the completion alone, which decode to the same text as the whole.

        Raises:
            UserError: no such tokens: the template renders another text, or the tokenizer cannot go on in the middle.
        """
        text, before = row.text, ""
        if row.chat and not self.split_special_tokens and not self._is_by_turn(row):
            text = self._render([(row, row.messages)], False)[0]
            before = self._render([(row, list(row.prompt))], True)[0]  # type: ignore[arg-type]
        end = np.array([] if row.chat or text.endswith(self.tokenizer.eos_token) else [self._eos], np.int32)
        expected, split = self._decode(row.tokens), self.split_special_tokens and not row.chat
        # Tokenizers of the SentencePiece kind put a space before a text; not so behind a newline.
        for lead in ("", "\n") if text.startswith(before) else ():
            whole, first = self._call([lead + text[len(before) :], lead], [row], False, split)
            if _common(first, whole) == len(first):
                tokens = np.concatenate([start, whole[len(first) :], end]).astype(np.int32)
                if self._decode(tokens) == expected:
                    return tokens
        raise UserError(
            f"{row.place}: boundary='split' cannot continue the prompt to the text of prompt + completion."
            f"{self._tails(start, row.tokens)}"
        )

    # ---------------------------------------------------------------- which tokens are trained

    def _is_by_turn(self, row: _Row) -> bool:
        """Whether only the assistant's turns of a conversation are trained, rather than all from some token on."""
        replies = all(message["role"] == "assistant" for message in row.completion)  # type: ignore[index]
        return self.assistant_only or (self.completion_only and not replies)

    def _place_runs(self, rows: list[_Row]) -> None:
        """Set `runs`, the parts of each row that are trained up to their end token."""
        by_turn = []
        for row in rows:
            if not row.chat and self.assistant_only:
                raise UserError(f"{row.place}: `assistant_only` needs conversations, and this row is text")
            if row.chat and self._is_by_turn(row):
                by_turn.append(row)
            else:
                row.runs = [(row.prompt_length if self.completion_only else 0, len(row.tokens))]
        if by_turn and not self._marks_turns:
            self._render_turns(by_turn)
        for row in by_turn:
            if self.completion_only:
                row.runs = [(max(a, row.prompt_length), b) for a, b in row.runs if b > row.prompt_length]
            if not row.runs:
                raise UserError(
                    f"{row.place}: no turn of the assistant to train on"
                    + (" (does the chat template mark it with {% generation %}?)" if self._marks_turns else "")
                )

    @cached_property
    def _marks_turns(self) -> bool:
        """Whether the chat template marks the assistant's turns, and the tokenizer says where its tokens are."""
        usable = self.tokenizer.is_fast and not self.split_special_tokens
        return usable and GENERATION.search(self._require_template()) is not None

    def _mark_turns(self, rows: list[_Row]) -> None:
        """Tokens, and runs from the template's own `{% generation %}` blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        def render(batch: list[Messages], kwargs: Kwargs) -> list[Any]:
            texts_and_spans: Any = render_jinja_template(
                conversations=batch,
                chat_template=self.tokenizer.get_chat_template(self.chat_template, kwargs.get("tools")),
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **kwargs},
            )
            return list(zip(*texts_and_spans, strict=True))

        rendered = self._by_kwargs([(row, row.messages) for row in rows], render)
        for i in range(0, len(rows), CHUNK):
            part, texts = rows[i : i + CHUNK], [text for text, _ in rendered[i : i + CHUNK]]
            encoded = self._call(texts, part, False, False, offsets=True)
            for row, (_, spans), (ids, offsets) in zip(part, rendered[i : i + CHUNK], encoded, strict=True):
                row.tokens = ids
                begins = np.array([begin for begin, _ in offsets])
                for begin, end in spans:
                    inside = np.flatnonzero((begins >= begin) & (begins < end))
                    if len(inside):  # from first to last: offsets of tokens that are all blank may lie outside
                        row.runs.append((int(inside[0]), int(inside[-1]) + 1))

    def _render_turns(self, rows: list[_Row]) -> None:
        """Turns by rendering the conversation up to each of the assistant's messages, without it and with it.

        Raises:
            UserError: the template renders a turn differently once others follow.
        """
        before, after = [], []
        for row in rows:
            messages = row.messages
            for i in range(len(row.prompt) if self.completion_only else 1, len(messages)):
                if messages[i]["role"] == "assistant":
                    before.append((row, messages[:i]))
                    after.append((row, messages[: i + 1]))
        starts = self._chat_ids(before, generation_prompt=True)
        ends = self._chat_ids(after)
        apart = [
            (row, start)
            for (row, _), start in zip(before, starts, strict=True)
            if _common(start, row.tokens) < len(start)
        ]
        if apart and self.boundary != "common":
            row, start = apart[0]
            raise self._parted(row, start, row.tokens, [r for r, _ in apart], rows)
        for (row, messages), start, upto in zip(after, starts, ends, strict=True):
            a, b = _common(start, row.tokens), _common(upto, row.tokens)
            if b <= a or not all(self._is_mark(t) or self._is_blank(t) for t in upto[b:].tolist()):
                raise UserError(
                    f"{row.place}: the chat template renders message {len(messages) - 1} (assistant) differently "
                    "once others follow, so what to train on is unclear; use a template with {% generation %} blocks "
                    "(`--chat_template FILE`), or train on the last turn only"
                )
            row.runs.append((a, b))

    def _mask(self, row: _Row) -> np.ndarray:
        """(L,) bool of the tokens to train; appends EOS to a conversation whose template writes no end token."""
        ids = row.tokens.tolist()
        ends = []
        for k, (a, b) in enumerate(row.runs):
            last = k == len(row.runs) - 1
            end = self._end_of_text(ids, a) if not row.chat else self._end_of_turn(ids, a, b)
            if end is None and last:
                ids.append(self._eos)
                b = end = len(ids) - 1
                self.report.end_appended += 1
            ends.append(b if end is None else end + 1)
        row.tokens = np.asarray(ids, np.int32)
        mask = np.zeros(len(ids), bool)
        for (a, _), end in zip(row.runs, ends, strict=True):
            mask[a:end] = True
        mask[0] = False
        return mask

    def _end_of_text(self, ids: list[int], low: int) -> int:
        """Place of the first of the EOS tokens that end a text."""
        end = len(ids) - 1
        while end > max(low, 1) and ids[end - 1] == self._eos:
            end -= 1
        return end

    def _end_of_turn(self, ids: list[int], low: int, high: int) -> int | None:
        """Place of the token that ends the turn ids[low:high], or None.

        The end is looked for among the special and blank tokens at the end of the turn, and right behind it where a
        `{% generation %}` block leaves it out.
        """
        begin = high
        while begin > low and (self._is_mark(ids[begin - 1]) or self._is_blank(ids[begin - 1])):
            begin -= 1
        marks = [j for j in range(begin, high) if self._is_mark(ids[j])]
        if marks:
            known = [j for j in marks if ids[j] in (self._turn_end, self._eos)]
            return known[0] if known else marks[-1]
        while high < len(ids) and self._is_blank(ids[high]):
            high += 1
        return high if high < len(ids) and ids[high] in (self._turn_end, self._eos) else None

    # ---------------------------------------------------------------- truncation and checks

    def _truncate(self, row: _Row, mask: np.ndarray, longest: int) -> Encoded | None:
        """`longest`: tokens of the longest completion of the same prompt."""
        report, limit = self.report, self.max_length
        tokens, prompt, wanted = row.tokens, row.prompt_length, int(mask.sum())
        report.rows += 1
        if limit is not None and self.truncation_mode == "drop":
            if len(tokens) > limit:
                report.dropped += 1
                return None
        elif limit is not None:
            cut = 0
            if self.truncation_mode == "keep_end" and self.completion_only:
                cut = max(0, prompt - max(limit - longest, limit // 2))
            elif self.truncation_mode == "keep_end":
                cut = max(0, len(tokens) - limit)
            report.truncated_prompts += cut > 0 or prompt > limit
            if cut:
                # The BOS stays in front; without one, the first token that stays has no context and is not trained.
                stays = np.arange(len(tokens)) >= cut + (tokens[0] == self._bos)
                stays[0] = tokens[0] == self._bos
                tokens, mask = tokens[stays], mask[stays]
                mask[0] = False
                prompt = prompt - cut if self.completion_only else max(1, int(mask.argmax()))
            tokens, mask = tokens[:limit], mask[:limit]
        trained = int(mask.sum())
        report.trained += trained
        if not trained:
            report.emptied += 1
            return None
        report.truncated_completions += trained < wanted
        return Encoded(np.ascontiguousarray(tokens), np.ascontiguousarray(mask), prompt)

    def _check_bos(self, row: _Row) -> None:
        bos, tokens = self._bos, row.tokens
        if bos is None or len(tokens) < 2 or not (tokens[0] == tokens[1] == bos):
            return
        if bos != self._eos or row.prompt_length > 1:
            cause = (
                "the chat template writes it twice, or the first message contains it"
                if row.chat
                else "the text begins with it and the tokenizer adds one; take it out of the text"
            )
            raise UserError(f"{row.place} starts with two BOS tokens ({self.tokenizer.bos_token!r}): {cause}")

    # ---------------------------------------------------------------- the tokenizer's vocabulary

    @property
    def _start(self) -> int:
        return self._eos if self._bos is None else int(self._bos)

    def _decode(self, tokens: np.ndarray) -> str:
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder
        return frozenset({*self.tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)})

    @cached_property
    def _special_texts(self) -> re.Pattern[str] | None:
        texts = [text for text in self.tokenizer.convert_ids_to_tokens(sorted(self._special)) if text]
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None

    def _has_special_text(self, texts: Iterable[str]) -> bool:
        pattern = None if self.split_special_tokens else self._special_texts
        return pattern is not None and any(pattern.search(text) for text in texts)

    @cached_property
    def _turn_end(self) -> int | None:
        """The first special or added token that the chat template writes after an assistant's content, if any."""
        if self.chat_template is None and self.tokenizer.chat_template is None:
            return None
        chat = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}]
        try:
            text = self.tokenizer.apply_chat_template(
                chat, chat_template=self.chat_template, tokenize=False, **self.chat_template_kwargs
            )
        except Exception:  # a template that wants other messages; each row then shows its own end
            return None
        _, found, tail = text.rpartition(PROBE)
        if not found or not tail:
            return None
        added = set(self.tokenizer.added_tokens_decoder) | self._special
        ids = self.tokenizer(tail, add_special_tokens=False)["input_ids"]
        return next((i for i in ids if i in added and not self._is_blank(i)), None)

    def _is_mark(self, token: int) -> bool:
        return token in self._special or token == self._turn_end

    def _is_blank(self, token: int) -> bool:
        blank = self._blank.get(token)
        if blank is None:
            text = self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            blank = self._blank[token] = token not in self._special and not text.strip()
        return blank

    @cached_property
    def _blank(self) -> dict[int, bool]:
        return {}


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading tokens that two rows have in common."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n


def _key(value: Any) -> str:
    """A text that is equal for equal values."""
    return json.dumps(value, sort_keys=True, default=repr)


def _failure(call: Callable[[list[str]], Any], text: str) -> Exception | None:
    try:
        call([text])
    except Exception as error:
        return error
    return None


def _checked(value: Any, place: str, name: str) -> Conversation:
    """A text, or a list of messages without the keys that are None.

    Raises:
        UserError: neither, or messages without role or content.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or not value:
        kind = "an empty list" if isinstance(value, Sequence) else type(value).__name__
        raise UserError(f"{place}: the {name} is {kind}, expected text or messages [{{role, content}}]")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise UserError(
                f"{place}: message {i} of the {name} is {type(message).__name__}, expected {{role, content}}"
            )
        present = {k: v for k, v in message.items() if v is not None}
        if not isinstance(present.get("role"), str) or not ("content" in present or "tool_calls" in present):
            raise UserError(f"{place}: message {i} of the {name} has {', '.join(present)}, expected role and content")
        messages.append(present)
    return messages


def _contents(messages: Any) -> Iterable[str]:
    """The texts of messages, those of content in parts included."""
    for message in messages:
        content = message.get("content", "")
        parts = content if isinstance(content, list) else [{"text": content}]
        yield from (str(part.get("text", "")) for part in parts if isinstance(part, Mapping))


def _template(value: str) -> str:
    """A template's text from a file, a folder that has a `chat_template.jinja`, or the text itself.

    Raises:
        UserError: the value looks like a path and no such file exists.
    """
    if "{" in value or "\n" in value:
        return value
    path = Path(value).expanduser()
    path = path / "chat_template.jinja" if path.is_dir() else path
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`chat_template` is {value!r}: neither a Jinja text nor a readable file ({error})") from None
