"""What is in a file of text data, before anything is trained on it: counts, problems, lengths, examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlkit.envs import preferences
from rlkit.lm import models
from rlkit.lm.bytes import byte_tokenizer
from rlkit.lm.tokens import Encoder


def inspect(
    source: Any,
    *,
    tokenizer: str | None = None,
    mapping: Mapping[str, str] | None = None,
    max_length: int | None = 1024,
    boundary: Any = "split",
    chat_template: str | None = None,
    examples: int = 1,
) -> Iterator[str]:
    """Lines for people: the report of the reader, token lengths, and examples with what is trained between ⟦ and ⟧.

    Bad rows are counted, not refused.

    Args:
        source: as `rlkit.envs.preferences.read`.
        tokenizer: folder or hub name of a model or tokenizer; None counts bytes.
        mapping, max_length, boundary, chat_template: as the fields of a trainer.
        examples: records to show, all their completions.

    Raises:
        UserError: the source cannot be read, or holds nothing but bad rows.
    """
    data = preferences.read(source, mapping=mapping, on_bad_row="drop")
    yield from data.report.lines()
    yield f"kind: {data.kind}" + (f"; other columns: {', '.join(data.columns)}" if data.columns else "")
    yield f"fingerprint: {data.fingerprint}"
    encoder = Encoder(
        byte_tokenizer() if tokenizer is None else models.load_tokenizer(tokenizer),
        max_length=max_length,
        boundary=boundary,
        chat_template=chat_template,
    )
    if tokenizer is None:
        yield "tokens below are bytes; `--tokenizer FOLDER` counts those of a model"
    flat = [(record.prompt, completion, record.row) for record in data.records for completion in record.completions]
    if not flat:
        prompts, numbers = [record.prompt for record in data.records], [record.row for record in data.records]
        lengths = sorted(len(ids) for ids in encoder.prompt(prompts, numbers=numbers, source=data.name))
        yield f"tokens of a prompt: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}"
        return
    prompts, completions, numbers = (list(part) for part in zip(*flat, strict=True))
    encoded = encoder.completions(prompts, completions, numbers=numbers, source=data.name)
    yield from encoder.report.lines()
    rows = iter(encoded)
    for record in data.records[:examples]:
        for number in range(len(record.completions)):
            row = next(rows)
            name = ("chosen", "rejected")[number] if data.kind == "pairs" else f"completion {number}"
            shown = "(nothing left to train on)" if row is None else encoder.decode_example(row)
            yield f"row {record.row}, {name}:\n{shown}"
