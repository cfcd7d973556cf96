"""LMTrainer: what every trainer of a causal language model shares.

A *unit* is what a loss averages over: a pair for preference losses, a completion for supervised fine-tuning. Units are
rows of integers that refer to completions, which are tokenised once and stored once, with the reference's log-probs as
one of their columns. An optimiser step takes `per_device_train_batch_size * gradient_accumulation_steps` units and
normalises by the counts of the whole step, so that how it is cut into passes, padded or packed changes no number beyond
rounding. The order of units is a pure function of (seed, epoch).

An algorithm defines `loss`; one with rounds overrides `fill`, which prepares rows before each epoch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from rlkit.buffer import LENGTH, Field, Ragged, RolloutBuffer
from rlkit.config import dump_yaml, to_dict, validate
from rlkit.envs import preferences
from rlkit.errors import RlkitError, UserError, differences
from rlkit.lm import embedded, models
from rlkit.lm.config import LMConfig, PairConfig
from rlkit.lm.layout import Layout, Mode, Row, cheapest, choose, forward, rows_of
from rlkit.lm.logps import Head, find_head
from rlkit.lm.pairs import pairs_of
from rlkit.lm.reference import ReferenceCache, cache_folder, row_key
from rlkit.lm.sample import Samples, Sampling, generate
from rlkit.lm.tokens import Encoded, Encoder
from rlkit.rewards.text import TextRewards
from rlkit.rng import derive, permutation
from rlkit.run import refuse_foreign
from rlkit.signals import stop
from rlkit.trainer import Batch, Trainer, versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Columns = dict[str, Tensor]
EMBEDDED = "letters"
WINDOW = 32  # batches whose units are sorted by length together
EXAMPLES = 8  # sampled completions shown in eval.jsonl


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
        ref_model: the reference, where it is not the model that training starts from.
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
        self.check()
        self.model, self.tokenizer = self.open_model()
        if config.disable_dropout:
            models.without_dropout(self.model)
        if config.gradient_checkpointing:
            models.checkpoint_activations(self.model)
        models.own_memory(self.model)
        self.model.to(self.device).train()
        self.track(optimizer=self._make_optimizer())
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
        self.epoch = 0
        self.batching: Mode = "plain"
        self.head_checked = False
        self.identity: dict[str, Any] = {}
        if self._saved is None:
            self.identity = {"start": models.weights_hash(self.model), **self._sources()}
            if self._adapter_is_new:
                self.identity["adapter"] = "new"
            self._load_data()
            self.choose_batching()

    def check(self) -> None:
        """Refuse options that conflict."""

    def unit_fields(self) -> dict[str, Field | Ragged]:
        """Columns of a unit: one row id of a completion for each branch, and what the loss needs besides."""
        return {name: Field(dtype=torch.int64) for name in self.branches}

    def open_model(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """The model to train, with its adapter, and its tokenizer.

        Raises:
            UserError: there is no model, it is not one of transformers, or it has no trainable weight.
        """
        config, given, place = self.config, self._given, self._place
        model, tokenizer = given.get("model"), given.get("processing_class")
        adapter = place if place is not None and (place / "adapter_config.json").exists() else None
        # A checkpoint is a folder with the model, or one with its adapter alone.
        start = str(place) if place is not None and adapter is None else config.model
        if model is None and start is None and config.data == EMBEDDED:
            model, made = self.embedded_start()
            tokenizer = tokenizer or made
        if model is None and start is None:
            raise UserError(
                f"`model`: {self.name} needs a causal language model: --model FOLDER or a name on the hub"
                + (", and --data" if config.data is None else "")
            )
        if model is None:
            model = self.load_model(start)
        if not isinstance(model, nn.Module) or not hasattr(models.unwrapped(model), "get_output_embeddings"):
            raise UserError(f"`model`: expected a causal language model of transformers, got {type(model).__name__}")
        if tokenizer is None:
            source = config.tokenizer or start or getattr(models.unwrapped(model), "name_or_path", "")
            if not source:
                raise UserError("`tokenizer`: the model names no folder; pass `processing_class=tokenizer`")
            tokenizer = models.load_tokenizer(source)
        if config.use_peft or "peft_config" in given or (adapter is not None and not models.is_adapted(model)):
            model = self._with_adapter(model, adapter)
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError("`model`: no weight of it is trainable (requires_grad is false for all)")
        return model, tokenizer

    def load_model(self, source: str) -> nn.Module:
        """The model in a folder, or under a hub name."""
        return models.load_model(source, attn_implementation=self.config.attn_implementation)

    def _with_adapter(self, model: nn.Module, saved: Path | None) -> nn.Module:
        """`model` with a new adapter, of the kind in the folder `saved` if there is one."""
        if models.is_adapted(model):
            raise UserError("`use_peft`: the model has an adapter already, which is trained; leave `use_peft` out")
        from peft import LoraConfig, PeftConfig

        config, modules = self.config, self.config.lora_target_modules
        self._adapter_is_new = True
        if saved is not None:
            lora = PeftConfig.from_pretrained(str(saved))
            lora.inference_mode = False
            return models.add_adapter(model, lora)
        lora = self._given.get("peft_config") or LoraConfig(
            task_type=self.task_type,
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            target_modules=modules[0] if len(modules) == 1 else list(modules),
        )
        return models.add_adapter(model, lora)

    _adapter_is_new = False

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if config.optim == "sgd":
            return torch.optim.SGD(parameters, lr=config.learning_rate)
        if config.optim == "rmsprop":
            return torch.optim.RMSprop(parameters, lr=config.learning_rate)
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )

    @property
    def encoder(self) -> Encoder:
        """Text to tokens, with the run's template and truncation."""
        if not hasattr(self, "_encoder"):
            config = self.config
            self._encoder = Encoder(
                self.tokenizer,
                max_length=config.max_length,
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
            if held.records:
                self.notes.append(
                    f"held out for evaluation: {len(held.records):,} rows with {config.eval_fraction:.0%} of the "
                    "prompts (`eval_fraction`)"
                )
        self.add_units(self.units, data)
        if not len(self.units):
            raise UserError(f"`data`: no row of {data.name} can be trained on; {self.encoder.report.lines()[-1]}")
        if held is not None and held.records:
            self.add_units(self.eval_units, held)
        self.notes += self.encoder.report.lines()

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
        self, prompts: Sequence[Any], completions: Sequence[Any], prompt_ids: Sequence[int]
    ) -> list[int | None]:
        """Tokenise and store completions; -> their row ids, None where truncation left nothing to train on."""
        encoded = self.encoder.completions(list(prompts), list(completions))
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
        }
        return {name: models.files_hash(Path(path)) for name, path in named.items() if path and Path(path).exists()}

    # The loop

    def steps_per_epoch(self) -> int:
        """Optimiser steps of one pass over the units."""
        return math.ceil(len(self.units) / self.units_per_step)

    @property
    def units_per_step(self) -> int:
        """Units of an optimiser step, all processes together."""
        return self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps

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
        model = self.model if model is None else model
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
        self.head_checked = (
            find_head(self.model, torch.as_tensor(rows[0].tokens)[None].to(self.device).long()) is not None
        )
        self.batching, reason = choose(self.model, rows, wanted, Head.of(self.model) if self.head_checked else None)
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

    def update(self, batch: Batch) -> Mapping[str, Tensor]:
        config, ids = self.config, batch["unit"]
        totals = self.totals(self.units, ids)
        self.optimizer.zero_grad(set_to_none=True)
        values: dict[str, list[Tensor]] = {}
        loss_sum = torch.zeros((), device=self.device)
        for part in ids.split(config.per_device_train_batch_size):
            columns = self.columns(self.units, part)
            loss, each = self.batch_loss(columns, totals)
            loss.backward()
            loss_sum += loss.detach()
            for name, value in each.items():
                values.setdefault(name, []).append(value)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        if torch.isfinite(norm):
            self.optimizer.step()
        metrics = {name: torch.cat(value).mean() for name, value in values.items()}
        return {"loss": loss_sum, "grad_norm": norm.detach(), **metrics}

    @property
    def learning_rate(self) -> float:
        """The optimiser's step size for the coming update, under the schedule of transformers."""
        horizon = self.horizon or self.default_target()
        if self._schedule is None or self._schedule[0] != horizon:
            from transformers import get_scheduler

            config = self.config
            warmup = config.warmup_steps * (horizon if config.warmup_steps < 1 else 1)
            dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
            schedule: Any = get_scheduler(config.lr_scheduler_type, dummy, math.ceil(warmup), horizon)
            self._schedule = (horizon, schedule.lr_lambdas[0])
        return self.config.learning_rate * float(self._schedule[1](min(self.updates, horizon)))

    _schedule: tuple[int, Callable[[int], float]] | None = None

    def metrics(self) -> dict[str, float]:
        values = super().metrics()
        if values:
            values |= {"learning_rate": self.learning_rate, "epoch": self.updates / self.steps_per_epoch()}
        return values

    # The reference

    def prepare(self, should_stop: Callable[[], bool]) -> None:
        if self.uses_reference and "ref_logp" not in self.completions and self._fill_reference(should_stop):
            self._check_reference()

    def _fill_reference(self, should_stop: Callable[[], bool]) -> bool:
        """Write the column `ref_logp`: from the disk cache, or by the reference; False if stopped before the end."""
        began, found = time.monotonic(), 0
        tokens, masks = self.completions["tokens"], self.completions["mask"]
        keys = [row_key(t.cpu().numpy(), m.cpu().numpy()) for t, m in zip(tokens, masks, strict=True)]
        values: list[Any] = [None] * len(keys)
        known: dict[bytes, Any] = {}
        with self.reference() as model, self._reference_cache() as cache:
            for units, ids in self._reference_batches():
                if should_stop():
                    return False
                rows = torch.stack([units[name][ids] for name in self.branches], dim=1).flatten()
                lengths = self.completions["trained"][rows].tolist()
                cached = cache.get([keys[row] for row in rows.tolist()], lengths)
                logps = [logp for logp in cached if logp is not None]
                found += len(ids) if len(logps) == len(cached) else 0
                if len(logps) < len(cached):  # a whole batch anew, so that a second run computes the same bits
                    with torch.no_grad():
                        out = self.score(self.columns(units, ids), model=model)
                    computed = [logp.numpy(force=True) for logp in out.logp.split(lengths)]
                    # Equal rows of several batches keep the first value, which is also the one in the cache.
                    logps = [
                        known.setdefault(keys[row], new if old is None else old)
                        for row, new, old in zip(rows.tolist(), computed, cached, strict=True)
                    ]
                    cache.put((keys[row], logp) for row, logp in zip(rows.tolist(), logps, strict=True))
                for row, logp in zip(rows.tolist(), logps, strict=True):
                    values[row] = logp
        empty = np.zeros(0, np.float32)  # completions that no unit names
        self.completions["ref_logp"] = [empty if value is None else value for value in values]
        count = len(self.units) + len(self.eval_units)
        self.say(f"reference log-probs of {count:,} units: {found:,} from the cache, {time.monotonic() - began:.1f} s")
        return True

    def _reference_batches(self) -> Iterator[tuple[RolloutBuffer, Tensor]]:
        """Units of similar length together; the composition depends on the data alone."""
        for units in (self.units, self.eval_units):
            if len(units):
                lengths = self.unit_lengths(units)
                for ids in lengths.argsort(stable=True, descending=True).split(self.config.per_device_train_batch_size):
                    yield units, ids.to(self.device)

    def _reference_cache(self) -> ReferenceCache:
        identity = {
            "weights": self.identity["reference"],
            "precision": self.config.precision,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "attention": models.unwrapped(self.model).config._attn_implementation,
            "batching": f"{self.config.batching}, {self.batching}",
            "logits_memory": self.config.logits_memory,
            **versions(),
        }
        return ReferenceCache(identity, cache_folder() if self.config.reference_cache else None)

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The reference model, for a while: the given one, the model without its adapter, or the model that training
        starts from.

        Raises:
            RlkitError: it is not the model that the run began with.
        """
        given = self._given.get("ref_model") or getattr(self.config, "ref_model", None)
        adapter_off = given is None and models.is_adapted(self.model) and self.identity.get("adapter") == "new"
        if isinstance(given, str):
            model: nn.Module = self.load_model(given)
        elif given is not None:
            model = given
        elif adapter_off or self.clock == 0:
            model = self.model
        elif self.config.model is None and self.config.data == EMBEDDED and "model" not in self._given:
            model = self.embedded_start()[0]
        elif self.config.model is not None:
            model = self.load_model(self.config.model)
        else:
            raise UserError("`ref_model`: the run began with a model given in Python: pass it again as `ref_model=`")
        with models.adapter_off(model) if adapter_off else nullcontext():
            found = models.weights_hash(model, adapter=not adapter_off)
            known = self.identity.setdefault("reference", found)
            if found != known:
                raise RlkitError(
                    f"the reference is not the one that the run began with (weights {found[:12]}, not {known[:12]}); "
                    "restore the model's folder, or start a new run"
                )
            if model is not self.model:
                models.without_dropout(model)
                model.to(self.device)
            training = model.training
            model.eval()
            try:
                yield model
            finally:
                model.train(training)

    def _check_reference(self) -> None:
        """Where the reference is the start, log-ratios have to be 0 before the first update.

        Raises:
            RlkitError: they are not, so the two passes differ by more than rounding.
        """
        if self.updates or "ref_model" in self._given or getattr(self.config, "ref_model", None):
            return
        ids = torch.arange(min(len(self.units), self.config.per_device_train_batch_size), device=self.device)
        columns = self.columns(self.units, ids)
        with torch.no_grad():
            out = self.score(columns)
        ratios = out.sums(out.logp - columns["ref_logp"]).abs()
        tolerance = 1e-3 if self.config.precision == "float32" else 0.05 * math.sqrt(float(out.lengths.max()))
        if float(ratios.max()) > tolerance:
            raise RlkitError(
                f"policy and reference are the same weights, but their log-probs of a completion differ by "
                f"{float(ratios.max()):.2g} (allowed: {tolerance:.2g}). Dropout in the model is the usual cause; "
                "`--batching plain --reference_cache false` rules out two others"
            )

    # Evaluation

    def can_evaluate(self) -> bool:
        return len(self.eval_units) > 0

    def why_no_evaluation(self, run: str) -> str:
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
        ids = torch.arange(count, device=self.device)
        by_length = self.unit_lengths(self.eval_units)[:count].argsort(stable=True, descending=True).to(self.device)
        totals = self.totals(self.eval_units, ids)
        values: dict[str, list[Tensor]] = {}
        loss = 0.0
        self.model.eval()
        try:
            for part in by_length.split(self.config.per_device_eval_batch_size):
                if should_stop():
                    return None
                columns = self.columns(self.eval_units, ids[part])
                with torch.no_grad():
                    share, each = self.batch_loss(columns, totals)
                loss += float(share)
                for name, value in each.items():
                    values.setdefault(name, []).append(value)
            record: dict[str, Any] = {f"eval_{name}": float(torch.cat(value).mean()) for name, value in values.items()}
            record |= {"eval_loss": loss, "eval_units": count}
            sampled = self._evaluate_samples(self.config.seed if seed is None else seed, should_stop)
        finally:
            self.model.train()
        return None if sampled is None else {**record, **sampled}

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
        """`k` completions of each tokenised prompt under the present model; a pure function of seed and prompt."""
        return generate(
            self.model,
            prompts,
            k,
            Sampling(temperature=temperature, max_new_tokens=max_new_tokens or self.config.max_completion_length),
            seed=derive(self.config.seed if seed is None else seed, "sample"),
            eos_token_ids=self.encoder.end_ids(),
            pad_token_id=self.tokenizer.pad_token_id,
            device=self.device,
            autocast=self.autocast,
            should_stop=should_stop,
        )

    def _evaluate_samples(self, seed: int, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
        """A completion for each of some held-out prompts: a few to read, their rewards, and KL(policy || reference)."""
        prompts: dict[bytes, np.ndarray] = {}
        for row in self.eval_units[self.branches[0]].tolist():
            if len(prompts) == self.config.eval_samples:
                break
            one = self.completions.rows([row])
            tokens = one["tokens"][0, : int(one["prompt_length"][0])].cpu().numpy()
            prompts.setdefault(tokens.tobytes(), tokens)
        if not prompts:
            return {}
        found = self.generate(list(prompts.values()), 1, seed=seed, should_stop=should_stop)
        if found is None:
            return None
        asked, answered = (
            self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for tokens in (list(prompts.values()), found.tokens)
        )
        record: dict[str, Any] = {"eval_completion_length": float(np.mean([len(t) for t in found.tokens]))}
        if self.config.eval_reward:
            functions = TextRewards(self.config.eval_reward)
            scores = functions.score(asked, answered)
            record["eval_reward"] = float(np.nanmean(scores.total))
            if len(functions.names) > 1:
                means = np.nanmean(scores.values, axis=0)
                record |= {f"eval_rewards/{n}/mean": float(m) for n, m in zip(functions.names, means, strict=True)}
        if self.config.eval_kl:
            record["eval_kl"] = self._sampled_kl(list(prompts.values()), found)
        shown = zip(asked[:EXAMPLES], answered[:EXAMPLES], strict=True)
        return {**record, "samples": [{"prompt": p, "completion": c} for p, c in shown]}

    def _sampled_kl(self, prompts: Sequence[np.ndarray], samples: Samples) -> float:
        """Mean of log pi(y|x) - log pi_ref(y|x) over sampled completions y."""
        rows = [
            Row(np.concatenate([p, y]), np.arange(len(p) + len(y)) >= len(p), len(p))
            for p, y in zip(prompts, samples.tokens, strict=True)
        ]
        total, size = 0.0, self.config.per_device_eval_batch_size * len(self.branches)
        with self.reference() as reference, torch.no_grad():
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                total += float(self.score_rows(part).logp.sum() - self.score_rows(part, model=reference).logp.sum())
        return total / len(rows)

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
        print(line, file=sys.stderr, flush=True)

    def describe(self) -> str:
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.model.parameters())
        source = self.config.model or self._given.get("model", self.model).__class__.__name__
        lines = [
            super().describe(),
            f"model: {source}, {total:,} parameters" + (f", {trained:,} of them trained" if trained < total else ""),
            *self.notes,
            f"steps: {self.units_per_step} units each, {self.steps_per_epoch():,} an epoch; batching {self.batching}",
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
        if models.is_adapted(self.model):
            files["adapter_model"] = models.adapter_weights(self.model)
        else:
            files["model"] = models.named_weights(self.model)
        files["state"] |= {
            "language": {
                "epoch": self.epoch,
                "batching": self.batching,
                "head_checked": self.head_checked,
                "identity": dict(self.identity),
            },
            "notes": list(self.notes),
        }
        return {name: part for name, part in files.items() if part or name == "state"}

    def load_state(self, files: Mapping[str, Any]) -> None:
        super().load_state(files)
        if "adapter_model" in files:
            models.set_adapter_weights(self.model, files["adapter_model"])
        elif "model" in files:
            models.set_weights(self.model, files["model"])
        state = files["state"]["language"]
        self.epoch, self.batching, self.head_checked = state["epoch"], state["batching"], state["head_checked"]
        self.identity = dict(state["identity"])
        self.notes = list(files["state"]["notes"])
        self._order = None

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
        path = refuse_foreign(Path(str(folder).removesuffix(".zip")))
        if merged and models.is_adapted(self.model):
            models.save_merged(self.model, self.tokenizer, path)
            return path
        return self.write_checkpoint(path, self.inference_parts - {"buffer"})

    @classmethod
    def _restored(cls, config: Any, files: Mapping[str, Any], path: Path, objects: Mapping[str, Any]) -> Self:
        return cls(config=config, saved=files["state"], place=path, **objects)

    @classmethod
    def _from_checkpoint(
        cls, path: Path, *, inference: bool = False, allow_changes: bool = False, **given: Any
    ) -> Self:
        self = super()._from_checkpoint(path, inference=inference, allow_changes=allow_changes, **given)
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
    paths = {f: Path(getattr(config, f)).expanduser() for f in fields}
    return dataclasses.replace(config, **{f: str(p.resolve()) for f, p in paths.items() if p.exists()})


def _hold_out(data: preferences.TextData, fraction: float) -> tuple[preferences.TextData, preferences.TextData]:
    """Split by prompt: a prompt is held out or not whatever the seed, the trainer and the other rows."""

    def held(record: preferences.Record) -> bool:
        return derive(0, "held out", json.dumps(record.prompt, sort_keys=True)) < fraction * 2**63

    parts = [[r for r in data.records if held(r) is side] for side in (False, True)]
    train, rest = (dataclasses.replace(data, records=records) for records in parts)
    return train, rest


def _unpadded(values: Tensor, lengths: Tensor) -> Tensor:
    """(C, L) rows padded on the right -> their values end to end."""
    return values[torch.arange(values.shape[1], device=values.device) < lengths[:, None]]


_OPTIONS = {
    "model": "model", "train_dataset": "data", "eval_dataset": "eval_data", "processing_class": "tokenizer",
    "ref_model": "ref_model",
}  # fmt: skip
"""Arguments that a configuration can hold where they are texts, and the fields they are then."""


class PairTrainer(LMTrainer):
    """Base of trainers that learn from pairs; the two branches of a unit are `chosen` and `rejected`."""

    Config: ClassVar[type[LMConfig]] = PairConfig
    branches = ("chosen", "rejected")
    uses_reference = True

    def embedded_data(self) -> tuple[Any, Any]:
        return embedded.preference_rows(self, self.config.letters, self.config.seed)

    def unit_fields(self) -> dict[str, Field | Ragged]:
        return {**super().unit_fields(), "weight": Field(), "margin": Field(), "gap": Field()}

    def add_units(self, units: RolloutBuffer, data: preferences.TextData) -> None:
        pairs = pairs_of(data, self.config.pairing, self.config.pairing_margin)
        needed = sorted({(p.record, p.chosen) for p in pairs} | {(p.rejected_record, p.rejected) for p in pairs})
        rows = dict(
            zip(
                needed,
                self.add_completions(
                    [data.records[r].prompt for r, _ in needed],
                    [data.records[r].completions[k] for r, k in needed],
                    [r for r, _ in needed],
                ),
                strict=True,
            )
        )
        ids = [(rows[p.record, p.chosen], rows[p.rejected_record, p.rejected], p) for p in pairs]
        kept = [(chosen, rejected, p) for chosen, rejected, p in ids if chosen is not None and rejected is not None]
        units.add(
            {
                "chosen": torch.tensor([chosen for chosen, _, _ in kept], dtype=torch.int64),
                "rejected": torch.tensor([rejected for _, rejected, _ in kept], dtype=torch.int64),
                "weight": torch.tensor([p.weight for _, _, p in kept], dtype=torch.float32),
                "margin": torch.tensor(
                    [data.records[p.record].columns.get("margin") or 0.0 for _, _, p in kept], dtype=torch.float32
                ),
                "gap": torch.tensor([p.gap for _, _, p in kept], dtype=torch.float32),
            }
        )
