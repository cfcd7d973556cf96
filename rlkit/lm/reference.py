"""The reference of a language trainer: which model it is, and its log-probs as a column of the completions.

The column is computed once, before the first update, by all processes together; what is on disk already
(`rlkit.lm.reference_cache`) is read instead. The reference's identity, a hash of its weights, is part of the run's
state and verified whenever the reference is opened again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rlkit.buffer import RolloutBuffer
from rlkit.cache import cache_folder
from rlkit.errors import RlkitError, UserError
from rlkit.lm import models
from rlkit.lm.reference_cache import Floats, ReferenceCache, row_key
from rlkit.progress import Phase
from rlkit.trainer import versions

if TYPE_CHECKING:
    from rlkit.lm.trainer import LMTrainer


def fill(trainer: LMTrainer, should_stop: Callable[[], bool]) -> bool:
    """Write the column `ref_logp`: from the disk cache, or by the reference; False if stopped before the end."""
    began, found = time.monotonic(), 0
    group, completions = trainer.processes, trainer.completions
    keys = [
        row_key(tokens.cpu().numpy(), mask.cpu().numpy())
        for tokens, mask in zip(completions["tokens"], completions["mask"], strict=True)
    ]
    values: list[Floats | None] = [None] * len(keys)
    known: dict[bytes, Floats] = {}
    batches = list(_batches(trainer))
    count = len(trainer.units) + len(trainer.eval_units)
    phase, done = Phase("reference log-probs", "units", trainer.say), 0
    with trainer.reference() as model, _cache(trainer) as cache:
        for start in range(0, len(batches), group.size):
            if group.any(should_stop()):
                return False
            at_once = batches[start : start + group.size]  # one batch for each process
            rows = [torch.stack([units[b][ids] for b in trainer.branches], dim=1).flatten() for units, ids in at_once]
            lengths = [completions["trained"][row].tolist() for row in rows]
            cached = group.from_main(lambda: [  # the main process's disk decides
                cache.get([keys[row] for row in r.tolist()], n) for r, n in zip(rows, lengths, strict=True)  # noqa: B023
            ])  # fmt: skip
            missing = [any(logp is None for logp in logps) for logps in cached]
            found += sum(len(ids) for (_, ids), absent in zip(at_once, missing, strict=True) if not absent)
            if any(missing):
                # A whole batch anew, so that a second run computes the same bits; a process that has none of its own
                # repeats the last, because a sharded model takes all processes to call it.
                mine = min(group.rank, len(at_once) - 1)
                units, ids = at_once[mine]
                new: list[Floats] = []
                if missing[mine] or group.size > 1:
                    with torch.no_grad():
                        out = trainer.score(trainer.columns(units, ids), model=model)
                    new = [logp.numpy(force=True) for logp in out.logp.split(lengths[mine])]
                computed = group.gather(new)
            for b, absent in enumerate(missing):
                names = [keys[row] for row in rows[b].tolist()]
                logps = [logp for logp in cached[b] if logp is not None]
                if absent:
                    # Equal rows of several batches keep the first value, which is also the one in the cache.
                    logps = [
                        known.setdefault(name, value if old is None else old)
                        for name, value, old in zip(names, computed[b], cached[b], strict=True)
                    ]
                    if group.is_main:
                        cache.put(zip(names, logps, strict=True))
                for row, logp in zip(rows[b].tolist(), logps, strict=True):
                    values[row] = logp
            done += sum(len(ids) for _, ids in at_once)
            phase(done, count)
    empty = np.zeros(0, np.float32)  # completions that no unit names
    completions["ref_logp"] = [empty if value is None else value for value in values]
    trainer.say(f"reference log-probs of {count:,} units: {found:,} from the cache, {time.monotonic() - began:.1f} s")
    return True


def _batches(trainer: LMTrainer) -> Iterator[tuple[RolloutBuffer, Tensor]]:
    """Units of similar length together; the composition depends on the data alone."""
    for units in (trainer.units, trainer.eval_units):
        if len(units):
            order = trainer.unit_lengths(units).argsort(stable=True, descending=True)
            for ids in order.split(trainer.config.per_device_train_batch_size):
                yield units, ids.to(trainer.device)


def _cache(trainer: LMTrainer) -> ReferenceCache:
    config = trainer.config
    identity = {
        "weights": trainer.identity["reference"],
        "precision": config.precision,
        "device": trainer.device.type,
        "threads": torch.get_num_threads(),
        "matmul": trainer.matmul,
        "attention": models.unwrapped(trainer.model).config._attn_implementation,
        "batching": f"{config.batching}, {trainer.batching}",
        "logits_memory": config.logits_memory,
        "sharded": trainer.sharded,
        **versions(),
    }
    return ReferenceCache(identity, cache_folder() if config.reference_cache and trainer.processes.is_main else None)


@contextmanager
def reference_model(trainer: LMTrainer) -> Iterator[nn.Module]:
    """The reference, for a while: the given one, the model without its adapter, or the model that training starts from.

    Raises:
        UserError: the run began with a model that only Python has.
        RlkitError: it is not the model that the run began with.
    """
    config, given = trainer.config, trainer.given("ref_model") or getattr(trainer.config, "ref_model", None)
    adapter_off = given is None and models.is_adapted(trainer.model) and trainer.identity.get("adapter") == "new"
    if isinstance(given, str):
        model: nn.Module = trainer.load_model(given, "ref_model")
        models.check_same_tokens("ref_model", given, trainer.tokenizer)
    elif given is not None:
        model = given
    elif adapter_off or trainer.clock == 0:
        model = trainer.model
    elif trainer.starts_embedded:
        model = trainer.embedded_start()[0]
    elif config.model is not None:
        model = trainer.load_model(config.model)
    else:
        raise UserError("`ref_model`: the run began with a model given in Python: pass it again as `ref_model=`")
    own = model is trainer.model
    if not own:
        models.check_fits(model, "ref_model", *trainer.extent())
    with models.adapter_off(model) if adapter_off else nullcontext():
        found = models.weights_hash(model, adapter=not adapter_off)
        known = trainer.identity.setdefault("reference", found)
        if found != known:
            raise RlkitError(
                f"the reference is not the one that the run began with (weights {found[:12]}, not {known[:12]}); "
                "restore the model's folder, or start a new run"
            )
        if not own:
            models.without_dropout(model)
            model.to(trainer.device)
        training = model.training
        model.eval()
        try:
            yield trainer.called if own else _scorer(trainer, model)
        finally:
            model.train(training)


def _scorer(trainer: LMTrainer, model: nn.Module) -> nn.Module:
    """What is called for a reference of its own; an object given in Python is divided only once."""
    if model is not trainer.given("ref_model"):
        return trainer.distributed(model, trains=False)
    if trainer.given_reference is None:
        trainer.given_reference = trainer.distributed(model, trains=False)
    return trainer.given_reference


def check_start(trainer: LMTrainer) -> None:
    """Where the reference is the start, log-ratios have to be 0 before the first update.

    Raises:
        RlkitError: they are not, so the two passes differ by more than rounding.
    """
    config = trainer.config
    if trainer.updates or trainer.given("ref_model") or getattr(config, "ref_model", None):
        return
    ids = torch.arange(min(len(trainer.units), config.per_device_train_batch_size), device=trainer.device)
    columns = trainer.columns(trainer.units, ids)
    with torch.no_grad():
        out = trainer.score(columns)
    ratios = out.sums(out.logp - columns["ref_logp"]).abs()
    tolerance = 1e-3 if config.precision == "float32" else 0.05 * math.sqrt(float(out.lengths.max()))
    if float(ratios.max()) > tolerance:
        raise RlkitError(
            f"policy and reference are the same weights, but their log-probs of a completion differ by "
            f"{float(ratios.max()):.2g} (allowed: {tolerance:.2g}). Dropout in the model is the usual cause; "
            "`--batching plain --reference_cache false` rules out two others"
        )


def sampled_kl(trainer: LMTrainer, rows: Any, size: int) -> float:
    """Mean of log pi(y|x) - log pi_ref(y|x) over sampled completions y, `size` rows a pass."""
    total = 0.0
    with reference_model(trainer) as reference, torch.no_grad():
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            own, theirs = trainer.score_rows(part), trainer.score_rows(part, model=reference)
            total += float(own.logp.sum() - theirs.logp.sum())
    return total / len(rows)
