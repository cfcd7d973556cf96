"""Rewards of completions: functions in TRL's calling convention, combined, timed and guarded; and reward models.

A reward function is called once for all completions, `fn(prompts, completions, completion_ids, **columns)`, where the
columns are the dataset's and what else TRL's GRPOTrainer passes: `trainer_state`, `log_extra(column, values)` and
`log_metric(name, value)`. It returns a number or None (not applicable) for each completion. It may be `async`; all
asynchronous functions of a call run at the same time. Prompts and completions are texts, or lists of messages
(`{"role": …, "content": …}`) where the data is conversational.

Text from a model is data: nothing here evaluates it. A verifier that parses it should run in a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import math
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rlkit.errors import RlkitError, UserError, did_you_mean
from rlkit.rewards import RewardModule, call, name_of, resolve

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

OnError = Literal["raise", "skip", "zero"]
ON_ERROR: tuple[OnError, ...] = ("raise", "skip", "zero")

_GIVEN = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")  # no column may have such a name
_LEFT_OUT = ("prompt", "completion", "completion_ids")  # columns that TRL leaves out: the arguments hold them
_CHEAP = 1.0  # seconds: a function that failed sooner is called once more for each row, to name the row


class RewardError(RlkitError, RuntimeError):
    """A reward function raised, or took too long: the message names it and, where it can be found, the row."""


@dataclass
class Scores:
    """What the functions say of n completions.

    Attributes:
        names: F names, each once.
        values: (n, F) float64, NaN where a function does not apply or was skipped after an error.
        total: (n,) float64, weighted sum over the functions that apply; NaN where none does.
        latency: seconds of each function's call.
        unscored: (M,) int64, rows to which no function applies.
        extra: what functions gave to `log_extra`, one value a row.
    """

    names: list[str]
    values: np.ndarray
    total: np.ndarray
    latency: dict[str, float]
    unscored: np.ndarray
    extra: dict[str, list[Any]]


class TextRewards:
    """Several reward functions as one.

    Args:
        functions: callables, `module:function` texts or folders of reward models; or one of these.
        weights: one for each function, by default 1.
        on_error: what an exception or a timeout inside a function does: `raise` ends the run, `skip` gives its rows of
            this call no value, `zero` gives them 0. What a function returns wrongly is always an error.
        timeout: seconds that a call may take. A synchronous function then runs in a thread (where `signal` does not
            work), which cannot be ended from outside: it is left behind, and until it is done the function's next calls
            time out too. An asynchronous one is cancelled at its next `await`.

    Raises:
        UserError: no function, one that cannot be found, or weights that do not fit.
    """

    def __init__(
        self,
        functions: RewardModule | str | Sequence[RewardModule | str],
        weights: Sequence[float] | None = None,
        on_error: OnError = "raise",
        timeout: float | None = None,
    ) -> None:
        specs: list[Any] = list(functions) if isinstance(functions, list | tuple) else [functions]
        if not specs:
            raise UserError("`reward_funcs` is empty; give at least one function")
        if weights is not None and len(weights) != len(specs):
            raise UserError(f"`reward_weights` has {len(weights)} values for {len(specs)} reward functions")
        if on_error not in ON_ERROR:
            raise UserError(f"`reward_on_error` is `{on_error}`{did_you_mean(str(on_error), ON_ERROR)}")
        if timeout is not None and not timeout > 0:
            raise UserError(f"`reward_timeout` is {timeout}, allowed: above 0 (seconds)")
        self.weights = np.ones(len(specs)) if weights is None else np.array([float(w) for w in weights])
        if not np.isfinite(self.weights).all():
            raise UserError(f"`reward_weights` holds a value that is not finite: {list(map(float, self.weights))}")
        found = [_found(spec) for spec in specs]
        self._functions = [_Function(fn, name) for fn, name in zip(found, _unique(map(_name, found)), strict=True)]
        self.names = [f.name for f in self._functions]
        self.on_error, self.timeout = on_error, timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._totals: list[np.ndarray] = []
        self._logged: defaultdict[str, list[float]] = defaultdict(list)

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]] | None = None,
        *,
        completion_ids: Sequence[Sequence[int]] | None = None,
        trainer_state: Any = None,
    ) -> Scores:
        """Rewards of n completions.

        Args:
            prompts: n prompts, texts or lists of messages.
            completions: n completions, likewise.
            columns: further columns of n values, such as `answer`.
            completion_ids: n lists of token ids.
            trainer_state: what functions may read the progress from (`global_step`, `max_steps`).

        Raises:
            UserError: a column that does not fit, or a function that does not take its arguments, or that returned
                another number of values than n, something that is no number, or NaN or infinity.
            RewardError: a function raised, or took too long, and `on_error` is `raise`.
        """
        n = len(prompts)
        rows = _columns(n, completions, columns or {}, completion_ids)
        arguments = {"prompts": list(prompts), **rows, "trainer_state": trainer_state}
        extra: dict[str, list[Any]] = {}

        def log_extra(column: str, values: Sequence[Any]) -> None:
            if len(values) != n:
                raise UserError(f"`log_extra` got {len(values)} values of `{column}`, expected {n} (one value a row)")
            extra[column] = list(values)

        def log_metric(name: str, value: float) -> None:
            self._logged[name].append(float(value))

        loggers = {"log_extra": log_extra, "log_metric": log_metric}
        for function in self._functions:
            function.check(arguments | loggers)
        values, latency = np.empty((n, len(self.names))), dict.fromkeys(self.names, 0.0)
        for function, outcome in self._outcomes(arguments | loggers):
            values[:, self.names.index(function.name)] = self._values(function, outcome, arguments, n)
            latency[function.name] = outcome.seconds
        applies = ~np.isnan(values)
        total = np.where(applies.any(axis=1), np.where(applies, values * self.weights, 0).sum(axis=1), math.nan)
        self._totals.append(total)
        return Scores(list(self.names), values, total, latency, np.flatnonzero(np.isnan(total)), extra)

    def metrics(self) -> dict[str, float]:
        """What happened since the last call, under TRL's names; {} when nothing was scored.

        `reward`, `reward_std` and, for each function, `rewards/<name>/mean` and `std`: over completions with a value,
        the sample standard deviation. Fractions of completions: `none` (the function returned None), `errors` (its call
        raised), `timeouts`, and `rewards/unscored` (no function applied). `latency_p50`, `latency_p95` and
        `latency_max` are seconds a call. Then what functions gave to `log_metric`, averaged.
        """
        if not self._totals:
            return {}
        totals = np.concatenate(self._totals)
        out = {"reward": mean_of(totals), "reward_std": _std(totals)}
        for function in self._functions:
            out |= {f"rewards/{function.name}/{key}": value for key, value in function.record.metrics().items()}
            function.record = _Record()
        out["rewards/unscored"] = float(np.isnan(totals).mean()) if len(totals) else math.nan
        out |= {name: mean_of(np.array(values)) for name, values in self._logged.items()}
        self._totals = []
        self._logged.clear()
        return out

    def state_dict(self) -> dict[str, Any]:
        """The state of the functions that have one."""
        return {f.name: f.fn.state_dict() for f in self._functions if hasattr(f.fn, "state_dict")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for function in self._functions:
            if function.name in state:
                function.fn.load_state_dict(state[function.name])

    def close(self) -> None:
        """End the thread of the asynchronous functions."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    def _outcomes(self, arguments: dict[str, Any]) -> Iterator[tuple[_Function, _Outcome]]:
        """Synchronous functions in turn, then all asynchronous ones at the same time, as TRL does."""
        for function in self._functions:
            if not function.is_async:
                yield function, function.run(arguments, self.timeout)
        waiting = [f for f in self._functions if f.is_async]
        if waiting:

            async def all_of_them() -> list[_Outcome]:
                return await asyncio.gather(*(f.run_async(arguments, self.timeout) for f in waiting))

            yield from zip(waiting, self._wait(all_of_them()), strict=True)

    def _wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run it in a loop that lives on between calls, because clients keep connections that belong to one loop."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="rlkit-rewards", daemon=True).start()
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _values(self, function: _Function, outcome: _Outcome, arguments: dict[str, Any], n: int) -> np.ndarray:
        """(n,) float64: checked values, or what `on_error` puts in their place."""
        record, error = function.record, outcome.error
        record.latency.append(outcome.seconds)
        if error is None:

            def returned(**_: Any) -> Any:
                return outcome.values

            returned.__name__ = function.name
            values = call(returned, {}, n)
            record.none += int(np.isnan(values).sum())
        elif isinstance(error, UserError):
            raise error
        elif self.on_error == "raise":
            cause = None if isinstance(error, _Late) else error
            raise RewardError(self._explain(function, outcome, arguments, n)) from cause
        else:
            record.timeouts += n if isinstance(error, _Late) else 0
            record.errors += 0 if isinstance(error, _Late) else n
            values = np.full(n, math.nan if self.on_error == "skip" else 0.0)
        record.values.append(values)
        return values

    def _explain(self, function: _Function, outcome: _Outcome, arguments: dict[str, Any], n: int) -> str:
        error, instead = outcome.error, "`reward_on_error` `skip` or `zero` goes on without its values"
        if isinstance(error, _Late):
            return f"reward `{function.name}` took longer than {self.timeout} s for {n} completions; {instead}"
        row = self._failing_row(function, outcome, arguments, n)
        where = "" if row is None else f" for row {row}"
        text = f": {error}" if str(error) else ""
        return f"reward `{function.name}` raised {type(error).__name__}{where}{text}; {instead}"

    def _failing_row(self, function: _Function, outcome: _Outcome, arguments: dict[str, Any], n: int) -> int | None:
        """The first row that fails in the same way alone, if trying is cheap."""
        if n == 1 or outcome.seconds > _CHEAP:
            return 0 if n == 1 else None
        end = time.monotonic() + 10 * _CHEAP
        for row in range(n):
            one = {name: [value[row]] if name != "trainer_state" else value for name, value in arguments.items()}
            one |= {"log_extra": lambda *_: None, "log_metric": lambda *_: None}
            run = function.run_async if function.is_async else function.run
            again: Any = run(one, self.timeout)
            again = self._wait(again) if function.is_async else again
            if type(again.error) is type(outcome.error) and str(again.error) == str(outcome.error):
                return row
            if time.monotonic() > end:
                break
        return None


def judge_from_scores(a: Any, b: Any, scale: float = 1.0) -> np.ndarray:
    """P(a beats b) = 1 / (1 + exp(-(a - b) / scale)): a scorer as a pairwise judge (Bradley and Terry 1952).

    Args:
        a: scores, any shape that broadcasts with `b`; NaN (no score) stays NaN.
        b: scores.
        scale: the difference of scores at which the better one wins with probability 0.73.

    Raises:
        UserError: `scale` is not positive.
    """
    from scipy.special import expit

    if not 0 < scale < math.inf:
        raise UserError(f"`scale` is {scale}, allowed: above 0")
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return np.asarray(expit(difference / scale))


class ModelReward:
    """A sequence-classification model with one label as a reward function: its logit is the reward.

    A row is rendered as TRL's GRPOTrainer renders it: a conversation through the tokenizer's chat template, a text as
    prompt + completion without special tokens. What rlkit's `reward_model` trained (a run, a checkpoint, a saved
    folder, also with an adapter) gets the tokens that it was trained on, so its rewards are the trainer's.

    Args:
        model: a folder that `save_pretrained` or rlkit wrote (or a name on the hub), or a module. A module that has no
            padding token gets the tokenizer's.
        tokenizer: by default the folder's.
        batch_size: rows a forward pass; rows of similar length go together.
        special_tokens: True gives texts the tokenizer's special tokens and an end token, as TRL's RewardTrainer trains
            them, False gives them none; None does as said above.
        device: where to put the model; by default it stays where it is.
        autocast: makes the context for each batch.

    Raises:
        UserError: more than one label, weights that were never trained, or no tokenizer.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = 16,
        special_tokens: bool | None = None,
        device: torch.device | str | None = None,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        settings = None
        self.model: Any
        if isinstance(model, str | Path):
            self.model, tokenizer, settings = _load(str(model), tokenizer)
        else:
            self.model = model
            _one_label(self.model.config, name_of(model))
        if tokenizer is None:
            raise UserError(
                "a reward model that is given as a module needs its tokenizer: ModelReward(model, tokenizer)"
            )
        if batch_size < 1:
            raise UserError(f"the number of rows a batch is {batch_size}, allowed: 1 or more")
        if device is not None:
            self.model.to(device)
        config = self.model.config.get_text_config()
        if config.pad_token_id is None or settings is not None:  # an adapter's base model may have another
            config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if config.pad_token_id is None:
            raise UserError("the reward model's tokenizer has neither a padding nor an end token; set one of them")
        self.tokenizer, self.batch_size, self.special_tokens = tokenizer, batch_size, bool(special_tokens)
        self.autocast = autocast
        place = model if isinstance(model, str | Path) else getattr(self.model.config, "_name_or_path", "")
        self.__name__ = Path(str(place)).name or type(self.model).__name__
        self._encoder: Any = None
        if settings is not None and special_tokens is None:
            from rlkit.lm.tokens import Encoder

            self._encoder = Encoder(tokenizer, max_length=None, completion_only=False, **settings)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """n rewards.

        Raises:
            UserError: a row without tokens or longer than the model's positions, or no chat template for conversations.
        """
        import torch

        from rlkit.lm.logps import evaluating

        if self._encoder is not None:
            rows = [row.tokens.tolist() for row in self._encoder.completions(prompts, completions)]
        else:
            rows = [self._tokens(i, p, c) for i, (p, c) in enumerate(zip(prompts, completions, strict=True))]
        for i, row in enumerate(rows):
            self._check(i, len(row))
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        device = next(self.model.parameters()).device
        pad = self.model.config.get_text_config().pad_token_id
        rewards = [math.nan] * len(rows)
        with evaluating(self.model), torch.inference_mode():
            for start in range(0, len(rows), self.batch_size):
                batch = order[start : start + self.batch_size]
                ids = torch.full((len(batch), len(rows[batch[0]])), pad, dtype=torch.long)
                attended = torch.zeros_like(ids)
                for b, i in enumerate(batch):
                    ids[b, : len(rows[i])] = torch.tensor(rows[i])
                    attended[b, : len(rows[i])] = 1
                with self.autocast():
                    logits = self.model(input_ids=ids.to(device), attention_mask=attended.to(device)).logits  # (B, 1)
                for i, reward in zip(batch, logits[:, 0].tolist(), strict=True):
                    rewards[i] = reward
        return rewards

    def _tokens(self, row: int, prompt: Any, completion: Any) -> list[int]:
        tokenizer: Any = self.tokenizer
        if isinstance(prompt, str) != isinstance(completion, str):
            raise UserError(f"row {row}: prompt and completion have to be both texts, or both lists of messages")
        if isinstance(prompt, str):
            text = prompt + completion
            if self.special_tokens and tokenizer.eos_token and not text.endswith(tokenizer.eos_token):
                text += tokenizer.eos_token
        elif tokenizer.chat_template is None:
            raise UserError(
                f"the tokenizer of reward model `{self.__name__}` has no chat template; set `chat_template`"
            )
        else:
            text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        ids: list[int] = tokenizer(text, add_special_tokens=self.special_tokens and isinstance(prompt, str))[
            "input_ids"
        ]
        return ids

    def _check(self, row: int, length: int) -> None:
        from rlkit.lm.logps import positions

        limit = positions(self.model)
        if not length:
            raise UserError(
                f"row {row}: prompt and completion have no tokens that reward model `{self.__name__}` could see"
            )
        if limit is not None and limit < length:
            raise UserError(
                f"row {row} has {length} tokens, more than the {limit} positions of reward model `{self.__name__}`; "
                "shorten the prompt or `max_completion_length`"
            )


def _load(source: str, tokenizer: Any) -> tuple[Any, Any, dict[str, Any] | None]:
    """A trained reward model, its tokenizer, and how rlkit's trainer made tokens of its rows, where it was that.

    Raises:
        UserError: it cannot be loaded, is no reward model, or was never trained as one.
    """
    from rlkit import checkpoint
    from rlkit.lm import models

    path = models.path_of(source)
    if not (path / "config.json").exists() and checkpoint.has_checkpoints(path):  # a run
        path, messages = checkpoint.newest(path)
        for message in messages:
            print(message, file=sys.stderr)
    place = str(path) if path.exists() else source
    # A whole model as its files have it; an adapter in float32, as it was trained, whatever its base's files hold.
    precision: Any = {} if models.is_adapter_folder(place) else {"dtype": "auto"}
    model, missing = models.load_classifier(place, what="reward", **precision)
    if missing:
        raise UserError(f"{source} is no trained reward model: it lacks {', '.join(missing)}")
    return model.eval(), models.load_tokenizer(place) if tokenizer is None else tokenizer, _settings(path)


def _settings(place: Path) -> dict[str, Any] | None:
    """What of `rlkit.lm.tokens.Encoder` the folder's `config.yaml` sets; None where rlkit trained no reward model."""
    from rlkit.config import load_file

    if not (place / "config.yaml").exists():
        return None
    config = load_file(place / "config.yaml")
    if config.get("trainer") != "reward_model":
        return None
    # The template itself is saved as the tokenizer's.
    names = ("chat_template_kwargs", "split_special_tokens")
    return {name: config[name] for name in names if name in config}


def _one_label(config: Any, source: str) -> None:
    if config.num_labels != 1:
        raise UserError(
            f"{source} has {config.num_labels} labels; a reward model has one (a sequence-classification model with "
            "`num_labels=1`)"
        )


class _Late(Exception):  # noqa: N818 (never seen outside)
    """A call took longer than it may."""


@dataclass
class _Outcome:
    values: Any
    error: Exception | None
    seconds: float


class _Record:
    """What a function did since the last metrics."""

    def __init__(self) -> None:
        self.values: list[np.ndarray] = []
        self.latency: list[float] = []
        self.none = self.errors = self.timeouts = 0

    def metrics(self) -> dict[str, float]:
        values = np.concatenate(self.values)
        n = len(values) or math.nan
        p50, p95, longest = np.percentile(self.latency, [50, 95, 100])
        return {
            "mean": mean_of(values),
            "std": _std(values),
            "none": self.none / n,
            "errors": self.errors / n,
            "timeouts": self.timeouts / n,
            "latency_p50": float(p50),
            "latency_p95": float(p95),
            "latency_max": float(longest),
        }


class _Function:
    """A reward function under its name in logs."""

    def __init__(self, fn: RewardModule, name: str) -> None:
        self.fn: Any = fn
        self.name = name
        self.is_async = _is_async(fn)
        self.record = _Record()
        self._thread: threading.Thread | None = None

    def check(self, arguments: dict[str, Any]) -> None:
        """See that the function takes what it will be given.

        Raises:
            UserError: it does not.
        """
        try:
            signature = inspect.signature(self.fn)
        except (TypeError, ValueError):  # some callables in C have none
            return
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise UserError(
                f"reward `{self.name}`: {error}; it is called with {', '.join(arguments)} (put `**kwargs` last, for "
                "those that it does not need)"
            ) from None

    def run(self, arguments: dict[str, Any], timeout: float | None) -> _Outcome:
        start = time.perf_counter()
        if timeout is None:
            values, error = self._call(arguments)
        else:
            values, error = self._call_within(arguments, timeout)
        return _Outcome(values, error, time.perf_counter() - start)

    async def run_async(self, arguments: dict[str, Any], timeout: float | None) -> _Outcome:
        start = time.perf_counter()
        values, found = None, None
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                values = await self.fn(**arguments)
        except Exception as error:
            found = _Late() if limit.expired() else error
        return _Outcome(values, found, time.perf_counter() - start)

    def _call(self, arguments: dict[str, Any]) -> tuple[Any, Exception | None]:
        try:
            return self.fn(**arguments), None
        except Exception as error:
            return None, error

    def _call_within(self, arguments: dict[str, Any], timeout: float) -> tuple[Any, Exception | None]:
        """Call it in a thread and wait for `timeout` seconds, before that for a call that was left behind."""
        end = time.monotonic() + timeout
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                return None, _Late()
        done: list[tuple[Any, Exception | None]] = []

        def work() -> None:
            try:
                done.append(self._call(arguments))
            except SystemExit:  # would end the thread without a word
                done.append((None, RuntimeError("it called sys.exit")))

        self._thread = threading.Thread(target=work, name=self.name, daemon=True)
        self._thread.start()
        self._thread.join(max(end - time.monotonic(), 0))
        return done[0] if done else (None, _Late())


def _found(spec: RewardModule | str) -> RewardModule:
    """A function from its text.

    Raises:
        UserError: there is none.
    """
    if isinstance(spec, str):
        if Path(spec).expanduser().is_dir():
            return ModelReward(spec)
        if ":" not in spec:
            raise UserError(f"reward `{spec}`: expected `module:function` or the folder of a reward model")
    found = resolve(spec)
    if not callable(found):
        raise UserError(f"reward {found!r} is not callable")
    if hasattr(found, "forward") and hasattr(found, "parameters"):  # a torch module, without importing torch
        raise UserError(f"reward `{name_of(found)}` is a module; wrap it: ModelReward(model, tokenizer)")
    return found


def _bare(fn: RewardModule) -> RewardModule:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn


def _name(fn: RewardModule) -> str:
    return name_of(_bare(fn)).strip("<>")


def _is_async(fn: RewardModule) -> bool:
    bare: Any = _bare(fn)
    return inspect.iscoroutinefunction(bare) or inspect.iscoroutinefunction(bare.__call__)


def _unique(names: Any) -> list[str]:
    """`name`, `name_2`, `name_3` where functions share a name."""
    out: list[str] = []
    for name in names:
        candidate, number = name, 2
        while candidate in out:
            candidate, number = f"{name}_{number}", number + 1
        out.append(candidate)
    return out


def _columns(
    n: int, completions: Sequence[Any], columns: Mapping[str, Sequence[Any]], completion_ids: Any
) -> dict[str, list[Any]]:
    """What is given to the functions row by row, besides the prompts.

    Raises:
        UserError: another number of values than prompts, or a name that is taken.
    """
    taken = [name for name in columns if name in _GIVEN]
    if taken:
        raise UserError(f"the dataset has a column `{taken[0]}`, an argument that reward functions get; rename it")
    given = {"completions": completions}
    if completion_ids is not None:
        given["completion_ids"] = completion_ids
    given |= {name: values for name, values in columns.items() if name not in _LEFT_OUT}
    for name, values in given.items():
        if len(values) != n:
            raise UserError(f"{len(values)} values of `{name}` for {n} prompts")
    return {name: list(values) for name, values in given.items()}


def mean_of(values: np.ndarray) -> float:
    """Mean of (n,) values without the NaN among them; NaN where nothing is left."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def _std(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan
