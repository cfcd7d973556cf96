"""LMTrainer: what every trainer of a causal language model shares.

A *unit* is what a loss averages over: a pair for preference losses, a completion for supervised fine-tuning. Units are
rows of integers that refer to completions, which are tokenised once and stored once, with the reference's log-probs as
one of their columns. An optimiser step takes `per_device_train_batch_size * gradient_accumulation_steps` units for each
process and normalises by the counts of the whole step, so that how it is divided among processes, cut into passes,
padded or packed changes no number beyond rounding. The order of units is a pure function of (seed, epoch).

An algorithm defines `loss`; one with rounds overrides `fill`, which prepares rows before each epoch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from rlkit import checkpoint, processes
from rlkit.buffer import LENGTH, Field, Ragged, RolloutBuffer
from rlkit.config import dump_yaml, load_file, to_dict, validate
from rlkit.envs import preferences
from rlkit.errors import RlkitError, UserError, differences
from rlkit.lm import embedded, evaluation, models, reference, sharding
from rlkit.lm.config import LMConfig, refuse_idle
from rlkit.lm.layout import Layout, Mode, Row, Scorer, cheapest, choose, forward, rows_of
from rlkit.lm.logps import Head, find_head, positions
from rlkit.lm.opening import Opened, open_model
from rlkit.lm.optimisation import make_optimizer, schedule
from rlkit.lm.sample import Samples, Sampling, generate
from rlkit.lm.tokens import Encoded, Encoder
from rlkit.products import library, onednn_products
from rlkit.progress import Phase
from rlkit.rewards.text import TextRewards
from rlkit.rng import derive, permutation
from rlkit.run import refuse_foreign
from rlkit.signals import stop
from rlkit.trainer import Batch, Trainer, to_dict_values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_MADE_BY = (
    "data", "eval_data", "eval_fraction", "map", "on_bad_row", "max_length", "truncation_mode", "boundary",
    "completion_only", "assistant_only", "chat_template", "chat_template_kwargs", "split_special_tokens", "pairing",
    "pairing_margin", "letters",
)  # fmt: skip
"""Fields that decide what is stored of the data when a run begins."""
Columns = dict[str, Tensor]
EMBEDDED = "letters"
MAX_LENGTH = 1024  # tokens of a row under `max_length: auto`, as in TRL
WINDOW = 32  # batches whose units are sorted by length together


@dataclass(frozen=True)
class Totals:
    """Counts of a whole optimiser step, over all passes and processes: what losses divide by."""

    units: int
    tokens: tuple[int, ...]
    """Trained tokens of each branch: chosen and rejected, or the completion."""


@dataclass(frozen=True)
class Scored:
    """Log-probs of the trained tokens of C completions, end to end in their order."""

    logp: Tensor
    """(N,) float32."""
    entropy: Tensor | None
    """(N,) float32 in nats, without gradient, where asked for."""
    completion: Tensor
    """(N,) int64: which completion each token belongs to."""
    lengths: Tensor
    """(C,) int64: trained tokens of each completion."""

    def sums(self, values: Tensor) -> Tensor:
        """(N,) values of tokens -> (C,) sums over completions."""
        return values.new_zeros(len(self.lengths)).index_add(0, self.completion, values)


class LMTrainer(Trainer):
    """Base of trainers of causal language models.

    Args:
        model: folder, hub name, or a transformers (or peft) model.
        train_dataset: file, folder, hub name, `datasets.Dataset`, or list of rows.
        eval_dataset: the same, held out.
        processing_class: the tokenizer, where it is not the model's own.
        peft_config: a configuration of peft, instead of `use_peft`.
        ref_model: the reference, where it is not the model that training starts from; with `fsdp` it is divided, too.
        config: a whole configuration, instead of `fields`.
        fields: fields of `Config`, such as `seed=0, beta=0.1`.

    Raises:
        UserError: an unknown field, a value out of range, data or a model that does not fit.
    """

    Config: ClassVar[type[LMConfig]] = LMConfig
    config: Any
    counts = "updates"
    default_steps = None
    task_fields = ("model", "data")
    several_processes = True
    modules_part = "modules"
    inference_parts = frozenset({"model", "adapter_model", "modules", "buffer", "state", "config.yaml"})
    branches: ClassVar[tuple[str, ...]] = ("completion",)
    """Columns of a unit that are row ids of completions; they share their prompt."""
    task_type: ClassVar[str] = "CAUSAL_LM"
    """peft's name of what the model does."""
    uses_reference: ClassVar[bool] = False
    """Whether the loss reads the column `ref_logp`."""
    objects: ClassVar[tuple[str, ...]] = (
        "model", "train_dataset", "eval_dataset", "processing_class", "peft_config", "ref_model",
    )  # fmt: skip

    model: nn.Module
    """The model itself; sharded weights are in place."""
    called: nn.Module
    """What is called to score completions: `scorer` around the model, in what synchronises processes."""
    tokenizer: PreTrainedTokenizerBase
    completions: RolloutBuffer
    units: RolloutBuffer
    eval_units: RolloutBuffer
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        model: Any = None,
        *args: Any,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        ref_model: Any = None,
        config: Any = None,
        saved: Mapping[str, Any] | None = None,
        place: Path | None = None,
        **fields: Any,
    ) -> None:
        """`saved` and `place`: the part `state` and the folder of a checkpoint that is about to be loaded."""
        if args or "args" in fields:
            raise UserError(
                f"rlkit trainers take their settings as keywords: rlkit.{type(self).__name__}(model, train_dataset=…, "
                "processing_class=tokenizer, learning_rate=1e-6)"
            )
        given = {
            "model": model, "train_dataset": train_dataset, "eval_dataset": eval_dataset,
            "processing_class": processing_class, "peft_config": peft_config, "ref_model": ref_model,
        }  # fmt: skip
        for name, option in _OPTIONS.items():
            if isinstance(given[name], str | Path):
                fields[option] = str(given.pop(name))
        self._given = {name: value for name, value in given.items() if value is not None}
        if config is not None and fields:
            raise UserError(f"give either `config` or fields, not both (got {', '.join(fields)})")
        if config is not None and not isinstance(config, self.Config):
            raise UserError(
                f"`config`: {type(self).__name__} needs a {self.Config.__name__}, got {type(config).__name__}"
            )
        config = self.make_config(fields) if config is None else validate(self.Config, to_dict(config))
        self._saved, self._place = saved, place
        self.notes: list[str] = []
        super().__init__(_absolute(config))

    @classmethod
    def is_object(cls, key: str, value: Any) -> bool:
        return key in cls.objects and value is not None and not isinstance(value, str | Path)

    # Building

    def build(self) -> None:
        config = self.config
        refuse_idle(config)
        self.check()
        if config.fsdp and not self.sharded and self._saved is None:
            raise UserError("`fsdp` divides the model among processes: start several, `torchrun --nproc_per_node N …`")
        self.matmul = library(config.matmul, self.device)
        opened = self.open_model(self._place)
        self.model, self.tokenizer = opened.model, opened.tokenizer
        if config.disable_dropout:
            models.without_dropout(self.model)
        if config.gradient_checkpointing:
            models.checkpoint_activations(self.model)
        models.own_memory(self.model)
        self.model.to(self.device).train()
        self.track(
            completions=RolloutBuffer(
                None,
                {
                    "prompt_id": Field(dtype=torch.int64),
                    "prompt_length": Field(dtype=torch.int64),
                    "trained": Field(dtype=torch.int64),
                    "tokens": Ragged(torch.int32),
                    "mask": Ragged(torch.bool),
                },
                self.device,
            ),
            units=RolloutBuffer(None, self.unit_fields(), self.device),
            eval_units=RolloutBuffer(None, self.unit_fields(), self.device),
        )
        self.called = self.model  # until the data have said how it may be called
        self.epoch = 0
        self.batching: Mode = "plain"
        self.head_checked = False
        self.identity: dict[str, Any] = {}
        self.held_columns: dict[str, dict[str, Any]] = {}
        self.units_per_step = (
            config.per_device_train_batch_size * config.gradient_accumulation_steps * self.processes.size
        )
        if self._saved is None:
            if getattr(config, "ref_model", None):
                models.folder_of("ref_model", config.ref_model, "config.json", "adapter_config.json")
            self.identity = {"start": models.weights_hash(self.model), **self._sources()}
            if opened.adapter_is_new:
                self.identity["adapter"] = "new"
            self._load_data()
            self.choose_batching()
            for what in ("start", "data"):
                self.processes.same("the model" if what == "start" else "the data", self.identity[what])
        else:
            self._restore(self._saved["language"])
        self.called = self.distributed(self.model)
        self.track(optimizer=make_optimizer(self.model, config))

    @property
    def sharded(self) -> bool:
        """Whether the weights are divided among processes; a checkpoint of such a run can be loaded by one alone."""
        return self.config.fsdp and self.processes.size > 1

    def scorer(self, model: nn.Module) -> nn.Module:
        """`model` as a module whose call does what a loss needs, so that processes can be synchronised around it."""
        return Scorer(model, Head.of(model) if self.head_checked else None)

    def distributed(self, model: nn.Module, *, trains: bool = True) -> nn.Module:
        """The scorer of `model`, made for several processes where there are some; sharding divides `model` in place."""
        if self.sharded:
            return sharding.shard(self.scorer(model), self.device)
        scorer = self.scorer(model)
        return self.processes.wrapped(scorer) if trains else scorer

    def check(self) -> None:
        """Refuse options that conflict."""

    def open_model(self, checkpoint: Path | None) -> Opened:
        """The model to train and its tokenizer; see `rlkit.lm.opening`."""
        return open_model(self, checkpoint)

    def unit_fields(self) -> dict[str, Field | Ragged]:
        """Columns of a unit: one row id of a completion for each branch, and what the loss needs besides."""
        return {name: Field(dtype=torch.int64) for name in self.branches}

    def load_model(self, source: str, what: str = "model") -> nn.Module:
        """The model in a folder, or under a hub name; `what` is the field that names it."""
        return models.load_model(source, attn_implementation=self.config.attn_implementation, what=what)

    def given(self, name: str) -> Any:
        """An object that the constructor got under this name, or None."""
        return self._given.get(name)

    @property
    def starts_embedded(self) -> bool:
        """Whether training starts from the embedded task's model."""
        return self.config.model is None and self.config.data == EMBEDDED and "model" not in self._given

    @property
    def max_length(self) -> int | None:
        """Tokens to which rows are cut."""
        wanted: int | Literal["auto"] | None = self.config.max_length
        return min(MAX_LENGTH, positions(self.model) or MAX_LENGTH) if wanted == "auto" else wanted

    @property
    def encoder(self) -> Encoder:
        """Text to tokens, with the run's template and truncation."""
        if not hasattr(self, "_encoder"):
            config = self.config
            self._encoder = Encoder(
                self.tokenizer,
                max_length=self.max_length,
                truncation_mode=config.truncation_mode,
                boundary=config.boundary,
                chat_template=config.chat_template,
                chat_template_kwargs=config.chat_template_kwargs,
                completion_only=config.completion_only,
                assistant_only=config.assistant_only,
                split_special_tokens=config.split_special_tokens,
            )
        return self._encoder

    # Data

    def _load_data(self) -> None:
        """Read, validate, tokenise and store the training data and the held-out data."""
        config = self.config
        source = self._given.get("train_dataset", config.data)
        if source is None:
            raise UserError(f"`data`: {self.name} needs data: --data FILE, or train_dataset=… in Python")
        held_source = self._given.get("eval_dataset", config.eval_data)
        if isinstance(source, str) and source == EMBEDDED:
            source, held_source = self.embedded_data()
        options: dict[str, Any] = {"mapping": config.map or None, "on_bad_row": config.on_bad_row}
        data = preferences.read(source, **options)
        held = None if held_source is None else preferences.read(held_source, **options)
        self.notes += data.report.lines()
        self.identity["data"] = data.fingerprint
        if held is None and config.eval_fraction > 0:
            data, held = _hold_out(data, config.eval_fraction)
            if not data.records:
                raise UserError(
                    f"`eval_fraction`: {config.eval_fraction:g} holds out all {len(held.records):,} rows, so none of "
                    f"{data.name} is left to train on; give a smaller one, or 0"
                )
            if held.records:
                self.notes.append(
                    f"held out for evaluation: {len(held.records):,} rows with {config.eval_fraction:.0%} of the "
                    "prompts (`eval_fraction`)"
                )
        self.add_units(self.units, data)
        if not len(self.units):
            raise UserError(f"`data`: no row of {data.name} can be trained on; {self._why_empty()}")
        if held is not None and held.records:
            self.add_units(self.eval_units, held)
            if not len(self.eval_units):
                raise UserError(f"`eval_data`: no row of {held.name} can be evaluated; {self._why_empty()}")
            self.held_columns = evaluation.columns_of(held)
        models.check_fits(self.model, "model", *self.extent())
        self.notes += self._encoding()

    def _encoding(self) -> list[str]:
        """What became of the rows as tokens."""
        report = self.encoder.report
        lines = report.lines()
        too_long = report.truncated_completions or report.truncated_prompts or report.dropped
        if too_long and self.config.max_length == "auto" and self.max_length != MAX_LENGTH:
            lines[-1] += f"; {self.max_length} are the positions of the model"
        return lines

    def _why_empty(self) -> str:
        return (self._encoding() or ["it has no completion to learn"])[-1]

    def extent(self) -> tuple[int, int]:
        """The largest token id of all completions, and the tokens of the longest one, prompt included."""
        return max(int(row.max()) for row in self.completions["tokens"]), int(self.completions.lengths("tokens").max())

    def embedded_start(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """The model that the embedded task starts from."""
        return embedded.start_model(self.config.letters, self.config.seed)

    def embedded_data(self) -> tuple[Any, Any]:
        """Rows of the embedded task, and held-out ones."""
        raise UserError(f"`data`: {self.name} has no embedded task; give --data FILE")

    def add_units(self, units: RolloutBuffer, data: preferences.TextData) -> None:
        """Tokenise the completions of `data`, store them, and store the units made of them."""
        raise NotImplementedError

    def add_completions(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        prompt_ids: Sequence[int],
        numbers: Sequence[int] | None = None,
        source: str = "",
    ) -> list[int | None]:
        """Tokenise and store completions; -> their row ids, None where truncation left nothing to train on.

        Args:
            numbers, source: rows of the data and its name, for messages; see `Encoder.completions`.
        """
        encoded = self.encoder.completions(list(prompts), list(completions), numbers=numbers, source=source)
        kept = [(i, e) for i, e in enumerate(encoded) if e is not None]
        ids = self.completions.add(
            {
                "prompt_id": torch.tensor([prompt_ids[i] for i, _ in kept], dtype=torch.int64),
                "prompt_length": torch.tensor([e.prompt_length for _, e in kept], dtype=torch.int64),
                "trained": torch.tensor([int(e.mask.sum()) for _, e in kept], dtype=torch.int64),
                "tokens": [e.tokens for _, e in kept],
                "mask": [e.mask for _, e in kept],
            }
        ).tolist()
        rows: list[int | None] = [None] * len(encoded)
        for (i, _), row in zip(kept, ids, strict=True):
            rows[i] = row
        return rows

    def _sources(self) -> dict[str, str]:
        """Hashes of the local files that the run starts from."""
        named = {
            "model files": self.config.model,
            "data files": self.config.data,
            "eval_data files": self.config.eval_data,
            "tokenizer files": self.config.tokenizer,
            "ref_model files": getattr(self.config, "ref_model", None),
        }
        return {name: models.files_hash(Path(path)) for name, path in named.items() if path and Path(path).exists()}

    # The loop

    def steps_per_epoch(self) -> int:
        """Optimiser steps of one pass over the units; a step takes `units_per_step`, all processes together."""
        return math.ceil(len(self.units) / self.units_per_step)

    def default_target(self) -> int:
        return math.ceil(self.config.num_train_epochs * self.steps_per_epoch())

    def fill(self, should_stop: Callable[[], bool]) -> bool:
        """Prepare the rows of the coming epoch; False if `should_stop` ended it early."""
        return True

    def collect(self) -> int:
        if self.fill(lambda: stop.requested):
            self.epoch += 1
            self.owed += self.steps_per_epoch()
        return 0

    def order(self, epoch: int) -> list[Tensor]:
        """Unit ids of each optimiser step of an epoch: a pure function of seed, epoch and the units' lengths."""
        config, n, size = self.config, len(self.units), self.units_per_step
        order = permutation(config.seed, epoch, n)
        if not config.group_by_length:
            return list(order.split(size))
        lengths = self.unit_lengths(self.units)
        batches: list[Tensor] = []
        for window in order.split(WINDOW * size):
            # Stable, so that units of equal length keep their random order.
            batches += window[lengths[window].argsort(stable=True, descending=True)].split(size)
        shuffled = permutation(derive(config.seed, "batches"), epoch, len(batches))
        return [batches[i] for i in shuffled.tolist()]

    def unit_lengths(self, units: RolloutBuffer) -> Tensor:
        """(units,) tokens of each unit's longest completion, prompt included, on the CPU."""
        lengths = self.completions.lengths("tokens")
        return torch.stack([lengths[units[name]] for name in self.branches]).amax(0).cpu()

    def batch(self) -> Batch:
        if self._order is None or self._order[0] != self.epoch:
            self._order = (self.epoch, self.order(self.epoch))
        steps = self._order[1]
        return {"unit": steps[len(steps) - int(self.owed)]}

    _order: tuple[int, list[Tensor]] | None = None

    def columns(self, units: RolloutBuffer, ids: Tensor) -> Columns:
        """The columns of some units and of their completions; these unit by unit, branch by branch.

        Values of trained tokens, such as `ref_logp`, come end to end, (N,), in the order of `Scored.logp`.
        """
        batch = units.rows(ids)
        rows = torch.stack([batch[name] for name in self.branches], dim=1).flatten()  # (B * branches,)
        batch |= self.completions.rows(rows)
        if "ref_logp" in batch:
            batch["ref_logp"] = _unpadded(batch["ref_logp"], batch["ref_logp" + LENGTH])
        return batch

    def branch(self, values: Tensor) -> tuple[Tensor, ...]:
        """(C,) values of completions -> one (B,) tensor for each branch."""
        return values.view(-1, len(self.branches)).unbind(1)

    def totals(self, units: RolloutBuffer, ids: Tensor) -> Totals:
        """Counts of an optimiser step."""
        trained, ids = self.completions["trained"], ids.to(units.device)
        return Totals(len(ids), tuple(int(trained[units[name][ids]].sum()) for name in self.branches))

    def score(self, batch: Columns, *, model: nn.Module | None = None, with_entropy: bool = False) -> Scored:
        """Log-probs of the completions in `batch`, under the model as it is or another of its kind."""
        return self.score_rows(rows_of(batch), model=model, with_entropy=with_entropy)

    def score_rows(self, rows: Sequence[Row], *, model: nn.Module | None = None, with_entropy: bool = False) -> Scored:
        """Log-probs of completions that need not be stored."""
        config = self.config
        model = self.called if model is None else model
        mode = cheapest(model, rows, self.batching) if config.batching == "auto" else self.batching
        limit = config.packing_length if mode == "packed" else None
        layout = Layout.build(rows, mode, max_row=limit).to(self.device)
        with self.autocast():
            stats = forward(
                model,
                layout,
                Head.of(model) if self.head_checked else None,
                with_entropy=with_entropy,
                budget=int(config.logits_memory * 2**20),
            )
        return Scored(stats.logp, stats.entropy, layout.completion, layout.counts())

    def choose_batching(self) -> None:
        """Find out how this model's log-probs may be computed, on rows of the data."""
        wanted: Mode = "shared" if self.config.batching == "auto" else self.config.batching
        count = min(len(self.units), 4)
        ids = torch.arange(count, device=self.device)
        rows = rows_of(self.columns(self.units, ids))
        with self.products():
            ids = torch.as_tensor(rows[0].tokens, device=self.device)[None].long()
            head = Head.of(self.model) if find_head(self.model, ids) is not None else None
            self.batching, reason = choose(self.model, rows, wanted, head)
        self.head_checked = head is not None
        if reason is not None:
            self.notes.append(reason)

    def loss(self, out: Scored, batch: Columns, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        """The part of the step's loss that these units are, and (B,) values of each unit for the log.

        Summed over the passes of a step it is the loss; so divide by `totals`, not by the units at hand.
        """
        raise NotImplementedError

    def batch_loss(self, batch: Columns, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        """`loss` of the log-probs of `batch`; a model that gives something else overrides this."""
        return self.loss(self.score(batch), batch, totals)

    def shares(self, ids: Tensor, size: int) -> Iterator[tuple[Tensor, bool]]:
        """This process's part of `ids`, up to `size` at a time, in as many passes as any other process makes.

        A process that has none left gets some that another one has; they come with False and must not count.
        """
        group = self.processes
        mine = ids[group.rank :: group.size]
        for start in range(0, math.ceil(len(ids) / group.size), size):
            part = mine[start : start + size]
            yield (part, True) if len(part) else (ids[:1], False)

    def products(self) -> AbstractContextManager[Any]:
        """The context of forward passes under the configured library of matrix products."""
        return onednn_products() if self.matmul == "onednn" else nullcontext()

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The context of forward passes under the configured precision and library of matrix products."""
        with super().autocast(), self.products():
            yield

    def update(self, batch: Batch) -> Mapping[str, Tensor]:
        config, ids = self.config, batch["unit"]
        totals = self.totals(self.units, ids)
        self.optimizer.zero_grad(set_to_none=True)
        values: dict[str, list[Tensor]] = {}
        loss_sum = torch.zeros((), device=self.device)
        parts = list(self.shares(ids, config.per_device_train_batch_size))
        for i, (part, counts) in enumerate(parts):
            columns = self.columns(self.units, part)
            with self._dropout_noise(i), self._unsynchronised(last=i == len(parts) - 1):
                loss, each = self.batch_loss(columns, totals)
                if not loss.requires_grad:
                    raise UserError("`model`: the loss depends on no weight that is trainable; see `requires_grad`")
                (loss * (self.processes.size * counts)).backward()  # gradients are averaged over processes
            loss_sum += loss.detach() * counts
            for name, value in each.items():
                values.setdefault(name, []).append(value if counts else value[:0])
        if self.updates == 0 and self.processes.size > 1:
            self._refuse_unused()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
        norm = sharding.whole(norm.detach())
        if self.updates == 0 and not norm and loss_sum:
            raise UserError("`model`: the first update would change nothing: no trainable weight has a gradient")
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        if torch.isfinite(norm):
            self.optimizer.step()
        means = self._means(loss_sum, values)
        return {"loss": means.pop("loss"), "grad_norm": norm, **means}

    def _refuse_unused(self) -> None:
        """Weights without a gradient leave processes waiting for one."""
        unused = [name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        if unused:
            raise UserError(
                f"`model`: {len(unused)} trainable weights have no part in the loss ({', '.join(unused[:3])}); with "
                "several processes freeze them: `parameter.requires_grad_(False)`"
            )

    def _means(self, loss: Tensor, values: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        """The step's loss, and the means of its units' values, over all processes."""
        each = {name: torch.cat(list(value)) for name, value in values.items()}
        if self.processes.size == 1:
            return {"loss": loss, **{name: value.mean() for name, value in each.items()}}
        counts = [torch.tensor(float(len(value)), device=self.device) for value in each.values()]
        sums = self.processes.sum(torch.stack([loss, *(value.sum() for value in each.values()), *counts]))
        means = sums[1 : 1 + len(each)] / sums[1 + len(each) :]
        return {"loss": sums[0], **dict(zip(each, means.unbind(), strict=True))}

    def _unsynchronised(self, *, last: bool) -> AbstractContextManager[Any]:
        """Gradients of passes before the last stay in the process."""
        if last or not isinstance(self.called, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.called.no_sync()

    @contextmanager
    def _dropout_noise(self, number: int) -> Iterator[None]:
        """Noise of dropout, where it is on: a function of seed, update, pass and process, so that it can be resumed."""
        if self.config.disable_dropout:
            yield
            return
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derive(self.config.seed, "dropout", self.updates, number, self.processes.rank))
            yield

    @property
    def learning_rate(self) -> float:
        """The optimiser's step size for the coming update."""
        horizon = self.horizon or self.default_target()
        if self._schedule is None or self._schedule[0] != horizon:
            self._schedule = (horizon, schedule(self.config, horizon))
        return self._schedule[1](self.updates)

    _schedule: tuple[int, Callable[[int], float]] | None = None

    def metrics(self) -> dict[str, float]:
        values = super().metrics()
        if values:
            values |= {"learning_rate": self.learning_rate, "epoch": self.updates / self.steps_per_epoch()}
        return values

    # The reference

    def prepare(self, should_stop: Callable[[], bool]) -> None:
        needed = self.uses_reference and "ref_logp" not in self.completions
        if needed and reference.fill(self, should_stop):
            reference.check_start(self)

    given_reference: nn.Module | None = None
    """The scorer of a reference that was given as an object."""

    def reference(self) -> AbstractContextManager[nn.Module]:
        """The reference, for a while, as `score(model=…)` takes it: see `rlkit.lm.reference`."""
        return reference.reference_model(self)

    # Evaluation

    def before_learning(self) -> None:
        if self.config.eval_reward and self.config.eval_samples and self.can_evaluate():
            _ = self.eval_rewards  # what cannot be found is said before the long phases

    @cached_property
    def eval_rewards(self) -> TextRewards:
        """The functions of `eval_reward`, loaded once."""
        return TextRewards(self.config.eval_reward)

    def can_evaluate(self) -> bool:
        return len(self.eval_units) > 0

    def why_no_evaluation(self, run: str) -> str:
        if not len(self.units):
            return "it is a saved folder, which holds no data: evaluate the run that it was saved from"
        return "it has no held-out data: train with `--eval_data FILE` or `--eval_fraction 0.05`"

    def evaluate(
        self, episodes: int | None = None, *, seed: int | None = None, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, Any] | None:
        """Means over the first `episodes` held-out units, under TRL's names, and a few sampled completions.

        Args:
            episodes: units; by default `eval_episodes`.
            seed: of the sampled completions.
        """
        count = min(len(self.eval_units), episodes or self.config.eval_episodes)
        self.prepare(should_stop)  # before any `learn` there may be no reference column yet
        if self.processes.any(should_stop()):
            return None
        self.model.eval()
        try:
            record = evaluation.held_out(self, count, should_stop)
            if record is None:
                return None
            sampled = self.evaluate_samples(self.config.seed if seed is None else seed, should_stop)
        finally:
            self.model.train()
        return None if sampled is None else {**record, **sampled}

    def evaluate_samples(self, seed: int, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
        """What evaluations say of sampled completions; None if stopped."""
        return evaluation.samples(self, seed, should_stop)

    def sample(
        self,
        prompts: Sequence[Any],
        k: int = 1,
        *,
        temperature: float = 1.0,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[list[str]] | None:
        """`k` completions of each prompt (text or messages), decoded; None if `should_stop` said so."""
        tokens = self.encoder.prompt(list(prompts))
        samples = self.generate(tokens, k, temperature, max_new_tokens, seed, should_stop)
        if samples is None:
            return None
        texts = self.tokenizer.batch_decode(samples.tokens, skip_special_tokens=True)
        return [texts[i * k : (i + 1) * k] for i in range(len(prompts))]

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        k: int,
        temperature: float = 1.0,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Samples | None:
        """`k` completions of each tokenised prompt under the present model; a pure function of seed and prompt.

        Processes divide the prompts among themselves, and all get all completions.
        """
        group = self.processes
        mine = list(range(group.rank, len(prompts), group.size))
        idle = not mine and len(prompts) > 0
        found: Samples | None = None
        error: RlkitError | None = None
        try:
            with sharding.gathered(self.called):
                found = generate(
                    self.model,
                    # A sharded model that one process alone did not call would gather in another order afterwards.
                    [prompts[i] for i in mine] or list(prompts[:1]),
                    k,
                    Sampling(
                        temperature=temperature, max_new_tokens=max_new_tokens or self.config.max_completion_length
                    ),
                    seed=derive(self.config.seed if seed is None else seed, "sample"),
                    eos_token_ids=self.encoder.end_ids(),
                    pad_token_id=self.tokenizer.pad_token_id,
                    keys=mine or list(range(len(prompts[:1]))),
                    device=self.device,
                    autocast=self.autocast,
                    progress=Phase("sampling", "completions", self.say),
                    should_stop=should_stop,
                )
        except RlkitError as raised:
            error = raised
        for failed in group.gather(error):
            if failed is not None:
                raise failed
        if idle and found is not None:
            found = Samples(found.prompt[:0], [], [], found.finished[:0])
        return Samples.dealt(group.gather(found))

    # Words for the user

    def describe_evaluation(self, record: Mapping[str, Any]) -> str:
        named = {
            "eval_reward": "true reward of samples", "eval_kl": "KL to the reference",
            "eval_rewards/accuracies": "accuracy", "eval_accuracy": "accuracy", "eval_loss": "loss",
            "eval_completion_length": "tokens of a sample",
        }  # fmt: skip
        facts = [f"{label} {record[key]:.4g}" for key, label in named.items() if key in record]
        return f"{', '.join(facts)} (n={record['eval_units']})"

    def say(self, line: str) -> None:
        """A line for the user, on standard error."""
        processes.say(line)

    def describe(self) -> str:
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.model.parameters())
        source = self.config.model or self._given.get("model", self.model).__class__.__name__
        lines = [
            super().describe(),
            f"model: {source}, {total:,} parameters" + (f", {trained:,} of them trained" if trained < total else ""),
            *self.notes,
            f"steps: {self.units_per_step} units each, {self.steps_per_epoch():,} an epoch; batching {self.batching}"
            + (f"; {self.processes.size} processes" if self.processes.size > 1 else ""),
        ]
        if len(self.units):
            one = self.completions.rows([int(self.units[self.branches[0]][0])])
            lines.append("first completion (what is trained is between ⟦ and ⟧):")
            encoded = Encoded(
                one["tokens"][0].cpu().numpy(), one["mask"][0].cpu().numpy(), int(one["prompt_length"][0])
            )
            lines.append(self.encoder.decode_example(encoded))
        return "\n".join(lines)

    # State

    def state(self) -> dict[str, Any]:
        files = super().state()
        weights = None
        if self.sharded:
            weights = sharding.model_state(self.model)
            files["optimizer"]["optimizer"] = sharding.optimizer_state(self.model, self.optimizer)
        if models.is_adapted(self.model):
            files["adapter_model"] = models.adapter_weights(self.model, weights)
        else:
            files["model"] = models.named_weights(self.model, weights)
        files["state"] |= {
            "language": {
                "epoch": self.epoch,
                "batching": self.batching,
                "head_checked": self.head_checked,
                "identity": dict(self.identity),
                "held_columns": dict(self.held_columns),
                "units_per_step": self.units_per_step,
                "batch": self._batch_fields(),
            },
            "notes": list(self.notes),
        }
        return {name: part for name, part in files.items() if part or name == "state"}

    def load_state(self, files: Mapping[str, Any]) -> None:
        if self.sharded and "optimizer" in files:
            sharding.set_optimizer_state(self.model, self.optimizer, files["optimizer"]["optimizer"])
            files = {name: part for name, part in files.items() if name != "optimizer"}
        super().load_state(files)
        if "adapter_model" in files:
            models.set_adapter_weights(self.model, files["adapter_model"])
        elif "model" in files:
            models.set_weights(self.model, files["model"])
        self.notes = list(files["state"]["notes"])
        self._order = None

    def _restore(self, state: Mapping[str, Any]) -> None:
        """What building needs to know of the saved state."""
        self.epoch, self.batching, self.head_checked = state["epoch"], state["batching"], state["head_checked"]
        self.identity, self.held_columns = dict(state["identity"]), dict(state["held_columns"])
        if state.get("batch") == self._batch_fields():  # other processes than before divide the same steps
            self.units_per_step = state["units_per_step"]

    def _batch_fields(self) -> list[int]:
        return [self.config.per_device_train_batch_size, self.config.gradient_accumulation_steps]

    def documents(self) -> dict[str, str]:
        if self._documents is None:
            if self.encoder.chat_template is not None:
                self.tokenizer.chat_template = self.encoder.chat_template
            self._documents = models.documents(self.model, self.tokenizer)
        facts = {
            "trainer": self.name,
            "step": self.clock,
            "base model": self.config.model or "an object given in Python",
            "data": self.config.data or "an object given in Python",
            **{key: value for key, value in self.identity.items() if value},
            "seed": self.config.seed,
        }
        last = self.log.eval_history[-1] if self.log is not None and self.log.eval_history else {}
        facts |= {key: value for key, value in last.items() if isinstance(value, float)}
        paper = (sys.modules[type(self).__module__].__doc__ or "").split("\n")[0]
        readme = models.card(self.name, paper, facts, dump_yaml(self.saved_config()))
        return {**self._documents, "README.md": readme}

    _documents: dict[str, str] | None = None

    def save(self, folder: str | Path, *, merged: bool = False) -> Path:
        """A Hugging Face model folder that `from_pretrained` and `rlkit.load` read: weights, tokenizer, model card.

        Unlike a run's checkpoints it holds no data and no optimiser, so training does not go on from it.

        Args:
            merged: write an adapter merged into its model instead of apart from it.

        Raises:
            UserError: the folder holds something else.
        """
        path = Path(str(folder).removesuffix(".zip"))
        self.processes.from_main(lambda: refuse_foreign(path))
        if merged and models.is_adapted(self.model):
            if self.sharded:
                raise UserError("`merged`: save without it, then `rlkit.load(folder).save(other, merged=True)` alone")
            self.processes.from_main(lambda: self._save_merged(path))
            return path
        return self.write_checkpoint(path, self.inference_parts - {"buffer"})

    def _save_merged(self, path: Path) -> None:
        models.save_merged(self.model, self.tokenizer, path)
        (path / "README.md").write_text(self.documents()["README.md"], encoding="utf-8")

    @classmethod
    def _restored(cls, config: Any, files: Mapping[str, Any], path: Path, objects: Mapping[str, Any]) -> Self:
        return cls(config=config, saved=files["state"], place=path, **objects)

    @classmethod
    def _from_checkpoint(
        cls, path: Path, *, inference: bool = False, allow_changes: bool = False, **given: Any
    ) -> Self:
        self = super()._from_checkpoint(path, inference=inference, allow_changes=allow_changes, **given)
        if not inference and allow_changes:
            saved = load_file(path / "config.yaml")
            made = {k: v for k, v in given.items() if k in ROWS_MADE_BY}
            names = [k for k, v in to_dict_values(made).items() if saved.get(k) != v]
            if names:
                listed = ", ".join(f"`{name}`" for name in names)
                processes.say(
                    f"the rows were made when the run began, so a change of {listed} has no effect on them; for other "
                    "rows start a new run from a checkpoint of this one"
                )
        if not inference and not allow_changes:
            known = {key: value for key, value in self.identity.items() if key.endswith("files")}
            changed = differences({k: v for k, v in known.items() if k in self._sources()}, self._sources())
            if changed:
                raise UserError(
                    f"these differ from what {path} began with:\n{changed}\n"
                    "Use `allow_changes=True` (`--allow-changes`) to go on nevertheless."
                )
        return self


def _absolute(config: Any) -> Any:
    """`config` with local paths made absolute, so that the run can be resumed from any folder."""
    fields = [f for f in ("model", "tokenizer", "data", "eval_data", "ref_model") if getattr(config, f, None)]
    paths = {f: models.path_of(getattr(config, f)) for f in fields}
    places = {f: p.resolve() for f, p in paths.items() if p.exists()}
    for field in {"model", "tokenizer", "ref_model"} & places.keys():  # a run stands for its newest checkpoint
        if not (places[field] / "config.json").exists() and checkpoint.has_checkpoints(places[field]):
            places[field] = checkpoint.newest(places[field])[0]
    return dataclasses.replace(config, **{field: str(place) for field, place in places.items()})


def _hold_out(data: preferences.TextData, fraction: float) -> tuple[preferences.TextData, preferences.TextData]:
    """Split by prompt: a prompt is held out or not whatever the seed, the trainer and the other rows."""

    def held(record: preferences.Record) -> bool:
        return derive(0, "held out", json.dumps(record.prompt, sort_keys=True)) < fraction * 2**63

    parts = [[r for r in data.records if held(r) is side] for side in (False, True)]
    names = f"{data.name}, less what `eval_fraction` holds out", f"{data.name}, the part that `eval_fraction` holds out"
    train, rest = (dataclasses.replace(data, records=r, name=n) for r, n in zip(parts, names, strict=True))
    return train, rest


def _unpadded(values: Tensor, lengths: Tensor) -> Tensor:
    """(C, L) rows padded on the right -> their values end to end."""
    return values[torch.arange(values.shape[1], device=values.device) < lengths[:, None]]


_OPTIONS = {
    "model": "model", "train_dataset": "data", "eval_dataset": "eval_data", "processing_class": "tokenizer",
    "ref_model": "ref_model",
}  # fmt: skip
"""Arguments that a configuration can hold where they are texts, and the fields they are then."""
