"""Rewards of completions: the convention, parity with TRL, errors and timeouts, judges and reward models."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlkit.errors import UserError
from rlkit.rewards.text import ModelReward, RewardError, TextRewards, judge_from_scores

PROMPTS = ["1 + 1 =", "2 + 2 =", "name a colour", "3 + 3 ="]
COMPLETIONS = ["2", "five", "blue", "6"]
COLUMNS: dict[str, list[Any]] = {"answer": ["2", "4", None, "6"], "level": [1, 2, 3, 4]}
CHAT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"


def right(completions: list[str], answer: list[str | None], **_: Any) -> list[float | None]:
    """1 for the answer, 0 for another, None where there is none."""
    return [None if a is None else float(c == a) for c, a in zip(completions, answer, strict=True)]


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(c)) for c in completions]


async def doubled(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(0)
    return [2.0 * len(c) for c in completions]


class Level:
    """A reward with state."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, level: list[int], **_: Any) -> np.ndarray:
        self.seen += len(level)
        return np.array(level, dtype=np.float32)

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


class AsyncLevel:
    async def __call__(self, level: list[int], **_: Any) -> list[int]:
        return level


def broken(completions: list[str], **_: Any) -> list[float]:
    """A parser that fails on a completion."""
    return [float(int(c)) if c != "blue" else 0.0 for c in completions]


def message(make: Callable[[], object], kind: type[Exception] = UserError) -> str:
    with pytest.raises(kind) as caught:
        make()
    return str(caught.value)


def score(functions: Any, **settings: Any) -> Any:
    return TextRewards(functions, **settings).score(PROMPTS, COMPLETIONS, COLUMNS)


# Values and their sum


def test_values_weights_and_the_sum_over_what_applies() -> None:
    """right = 1, 0, None, 1 with weight 10; length = 1, 4, 4, 1 with weight 0.5."""
    rewards = TextRewards([right, length], weights=[10, 0.5])
    scores = rewards.score(PROMPTS, COMPLETIONS, COLUMNS)
    assert scores.names == ["right", "length"]
    np.testing.assert_array_equal(scores.values, [[1, 1], [0, 4], [math.nan, 4], [1, 1]])
    np.testing.assert_array_equal(scores.total, [10.5, 2, 2, 10.5])
    assert scores.unscored.tolist() == []
    assert scores.latency.keys() == {"right", "length"}
    assert min(scores.latency.values()) > 0
    assert score(right).total[[0, 1, 3]].tolist() == [1, 0, 1]


def test_a_row_to_which_nothing_applies_is_nan_and_reported() -> None:
    rewards = TextRewards([right, lambda completions, **_: [None, 5, None, None]])
    scores = rewards.score(PROMPTS, COMPLETIONS, COLUMNS)
    np.testing.assert_array_equal(scores.total, [1, 5, math.nan, 1])
    assert scores.unscored.tolist() == [2]
    metrics = rewards.metrics()
    assert metrics["rewards/unscored"] == 0.25
    assert metrics["reward"] == pytest.approx(7 / 3)
    assert metrics["rewards/right/none"] == 0.25
    assert metrics["rewards/lambda/none"] == 0.75
    assert math.isnan(metrics["rewards/lambda/std"])  # of one value there is none


def test_names_are_unique_and_readable() -> None:
    def length_2(**_: Any) -> list[float]:
        return [0.0] * 4

    partial = functools.partial(functools.partial(length), unused=1)
    functions = [length, length_2, length, partial, Level(), lambda **_: [0] * 4, lambda **_: [1] * 4]
    expected = ["length", "length_2", "length_3", "length_4", "Level", "lambda", "lambda_2"]
    assert score(functions).names == expected


def test_functions_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def short(completions, **kwargs):\n    return [-float(len(c)) for c in completions]\n"
        "class Constant:\n    def __call__(self, completions, **kwargs):\n        return [3] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    scores = score(["my_rewards:short", "my_rewards:Constant", length])
    assert scores.names == ["short", "Constant", "length"]
    np.testing.assert_array_equal(scores.total, [3, 3, 3, 3])


def test_what_functions_are_given() -> None:
    """TRL's arguments: lists of the prompts, completions, their ids and the other columns; state and loggers."""
    seen: dict[str, Any] = {}
    chat = [[{"role": "user", "content": p}] for p in PROMPTS]
    answers = [[{"role": "assistant", "content": c}] for c in COMPLETIONS]

    def spy(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        kwargs["log_metric"]("calls", 1 if "level" in kwargs else 10)
        kwargs["log_metric"]("calls", 4 if "level" in kwargs else 10)
        kwargs["log_extra"]("parsed", [len(c[0]["content"]) for c in kwargs["completions"]])
        return [0.0] * 4

    rewards, state = TextRewards(spy), SimpleNamespace(global_step=7)
    ids = [[1], [2, 3], [4], [5]]
    columns: dict[str, Any] = {
        "answer": ("2", "4", None, "6"),
        "prompt": chat,
        "completion": PROMPTS,
        "level": np.arange(4),
    }
    scores = rewards.score(chat, answers, columns, completion_ids=ids, trainer_state=state)
    assert seen.keys() == {
        "prompts", "completions", "completion_ids", "answer", "level", "trainer_state", "log_extra", "log_metric"
    }  # fmt: skip
    assert seen["prompts"] == chat
    assert seen["completions"] == answers
    assert seen["completion_ids"] == ids
    assert seen["answer"] == ["2", "4", None, "6"]
    assert seen["level"] == [0, 1, 2, 3]
    assert seen["trainer_state"] is state
    assert scores.extra == {"parsed": [1, 4, 4, 1]}
    assert rewards.metrics()["calls"] == 2.5
    rewards.score(chat, answers)
    assert rewards.metrics()["calls"] == 10  # of this call alone


def test_asynchronous_functions_run_at_the_same_time() -> None:
    """Each waits until all three have started, which happens only if they overlap; and all in one living loop."""
    started: list[str] = []
    loops: set[int] = set()

    def meets(name: str) -> Any:
        async def waits(completions: list[str], **_: Any) -> list[float]:
            loops.add(id(asyncio.get_running_loop()))
            started.append(name)
            while len(started) % 3:
                await asyncio.sleep(0.001)
            return [float(len(started))] * len(completions)

        return waits

    rewards = TextRewards([meets("a"), length, meets("b"), AsyncLevel(), meets("c"), functools.partial(doubled)])
    try:
        for total in (3, 6):
            scores = rewards.score(PROMPTS, COMPLETIONS, COLUMNS)
            assert scores.names == ["waits", "length", "waits_2", "AsyncLevel", "waits_3", "doubled"]
            np.testing.assert_array_equal(scores.values[0], [total, 1, total, 1, total, 2])
            np.testing.assert_array_equal(scores.values[3], [total, 1, total, 4, total, 2])
        assert len(loops) == 1
    finally:
        rewards.close()

    async def from_a_running_loop() -> Any:  # a notebook
        return score([doubled])

    np.testing.assert_array_equal(asyncio.run(from_a_running_loop()).total, [2, 8, 8, 2])


def test_state_of_functions() -> None:
    rewards = TextRewards([length, Level(), Level()])
    rewards.score(PROMPTS, COMPLETIONS, COLUMNS)
    assert rewards.state_dict() == {"Level": {"seen": 4}, "Level_2": {"seen": 4}}
    other = Level()
    TextRewards([other]).load_state_dict(json.loads(json.dumps(rewards.state_dict())))
    assert other.seen == 4


def test_no_completions() -> None:
    rewards = TextRewards([length])
    scores = rewards.score([], [], {"answer": []})
    assert scores.total.shape == (0,)
    assert scores.values.shape == (0, 1)
    assert math.isnan(rewards.metrics()["reward"])


# Metrics


def test_metrics_are_over_all_calls_since_the_last() -> None:
    """right: 1, 0, -, 1 and 0, 0, -, 0: mean 1/3, sample variance (2 (2/3)^2 + 4 (1/3)^2) / 5 = 4/15."""
    rewards = TextRewards([right, length])
    assert rewards.metrics() == {}
    rewards.score(PROMPTS, COMPLETIONS, COLUMNS)
    rewards.score(PROMPTS, ["?"] * 4, COLUMNS)
    metrics = rewards.metrics()
    assert metrics["rewards/right/mean"] == pytest.approx(1 / 3)
    assert metrics["rewards/right/std"] == pytest.approx(math.sqrt(4 / 15))
    assert metrics["rewards/length/mean"] == pytest.approx((1 + 4 + 4 + 1 + 4) / 8)
    totals = [2, 4, 4, 2, 1, 1, 1, 1]
    assert metrics["reward"] == pytest.approx(np.mean(totals))
    assert metrics["reward_std"] == pytest.approx(np.std(totals, ddof=1))
    for name, none in (("right", 0.25), ("length", 0.0)):
        assert metrics[f"rewards/{name}/none"] == none
        assert metrics[f"rewards/{name}/errors"] == metrics[f"rewards/{name}/timeouts"] == 0
        p50, p95, longest = (metrics[f"rewards/{name}/latency_{q}"] for q in ("p50", "p95", "max"))
        assert 0 < p50 <= p95 <= longest < 10
    assert rewards.metrics() == {}


# Parity with TRL


def test_values_are_those_of_trl() -> None:
    """The reward step of TRL's GRPOTrainer on the same functions, and the statistics that it logs."""
    from trl.rewards.format_rewards import think_format_reward
    from trl.rewards.other_rewards import get_soft_overlong_punishment
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.utils import get_callable_name, is_async_callable, nanstd

    overlong = get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2)
    functions: list[Any] = [lambda answer, **_: [None if a is None else float(a) for a in answer], overlong, doubled]
    functions += [Level(), AsyncLevel(), functools.partial(length), think_format_reward]
    completions = [[{"role": "assistant", "content": c}] for c in ["2", "<think>\na\n</think>\nb", "", "6"]]
    ids, prompts = [[1] * n for n in (1, 3, 4, 9)], [[{"role": "user", "content": p}] for p in PROMPTS]
    inputs = [
        {"prompt": prompts[i], "completion": "x", "answer": a, "level": i} for i, a in enumerate(COLUMNS["answer"])
    ]

    rewards = TextRewards(functions)
    columns = {name: [row[name] for row in inputs] for name in inputs[0]}
    found = rewards.score(prompts, completions, columns, completion_ids=ids)

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    peer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=True), state=SimpleNamespace(global_step=0),
        environments=None, reward_funcs=functions, reward_processing_classes=[None] * len(functions), async_loop=loop,
        args=SimpleNamespace(report_to=[]),
        reward_func_names=[get_callable_name(f) for f in functions], _log_completion_extra=None, _log_metric=None,
    )  # fmt: skip
    expected = GRPOTrainer._calculate_rewards(peer, inputs, prompts, completions, ids)
    loop.call_soon_threadsafe(loop.stop)
    assert [is_async_callable(f) for f in functions] == [f.is_async for f in rewards._functions]
    np.testing.assert_allclose(found.values, expected.numpy())
    assert found.values[:, 1].tolist() == [0, -0.5, -1, -1]  # so that the comparison is of something
    assert found.values[:, -1].tolist() == [0, 1, 0, 0]

    metrics = rewards.metrics()
    for i, name in enumerate(found.names):
        assert metrics[f"rewards/{name}/mean"] == pytest.approx(torch.nanmean(expected[:, i]).item())
        assert metrics[f"rewards/{name}/std"] == pytest.approx(nanstd(expected[:, i]).item())
    total = expected.nansum(dim=1)
    assert metrics["reward"] == pytest.approx(total.mean().item())
    assert metrics["reward_std"] == pytest.approx(nanstd(total).item())


# What goes wrong


def test_an_exception_names_the_function_and_the_row() -> None:
    """`five` is no number, and it is in row 1."""
    expected = (
        "reward `broken` raised ValueError for row 1: invalid literal for int() with base 10: 'five'; "
        "`reward_on_error` `skip` or `zero` goes on without its values"
    )

    async def broken_later(completions: list[str], **_: Any) -> list[float]:
        return broken(completions)

    for timeout in (None, 30.0):
        with pytest.raises(RewardError) as caught:
            score([length, broken], timeout=timeout)
        assert str(caught.value) == expected
        assert isinstance(caught.value.__cause__, ValueError)
        assert message(lambda t=timeout: score(broken_later, timeout=t), RewardError) == expected.replace(  # type: ignore[misc]
            "`broken`", "`broken_later`"
        )
    assert caught.value.exit_code == 1


def test_a_row_is_named_only_if_it_fails_alone() -> None:
    def needs_groups(completions: list[str], **_: Any) -> list[float]:
        if len(completions) == 4:
            raise KeyError
        return [0.0] * len(completions)

    def counts(completions: list[str], **_: Any) -> list[float]:
        raise ValueError(f"{len(completions)} rows")

    end = "; `reward_on_error` `skip` or `zero` goes on without its values"
    assert message(lambda: score(needs_groups), RewardError) == "reward `needs_groups` raised KeyError" + end
    assert message(lambda: score(counts), RewardError) == "reward `counts` raised ValueError: 4 rows" + end


def test_errors_can_be_skipped_or_count_zero() -> None:
    rewards = TextRewards([length, broken], weights=[1, 2], on_error="skip")
    scores = rewards.score(PROMPTS, COMPLETIONS, COLUMNS)
    np.testing.assert_array_equal(scores.values[:, 1], [math.nan] * 4)
    np.testing.assert_array_equal(scores.total, [1, 4, 4, 1])
    scores = rewards.score(PROMPTS, ["1", "2", "blue", "3"], COLUMNS)
    np.testing.assert_array_equal(scores.total, [3, 5, 4, 7])
    metrics = rewards.metrics()
    assert metrics["rewards/broken/errors"] == 0.5
    assert metrics["rewards/broken/none"] == metrics["rewards/broken/timeouts"] == metrics["rewards/length/errors"] == 0
    assert metrics["rewards/broken/mean"] == 1.5

    rewards = TextRewards([length, broken], on_error="zero")
    scores = rewards.score(PROMPTS, COMPLETIONS, COLUMNS)
    np.testing.assert_array_equal(scores.values[:, 1], np.zeros(4))
    np.testing.assert_array_equal(scores.total, [1, 4, 4, 1])
    assert rewards.metrics()["rewards/broken/errors"] == 1

    scores = score([broken], on_error="skip")
    assert scores.unscored.tolist() == [0, 1, 2, 3]


def test_a_timeout_is_no_error_of_the_function() -> None:
    """The first call hangs until released; while it does, the next one does not start; then all is well again."""
    release = threading.Event()
    calls: list[int] = []

    def hangs(completions: list[str], **_: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 1:
            release.wait(60)
        return [7.0] * len(completions)

    rewards = TextRewards([hangs, length], on_error="skip", timeout=0.05)
    for _ in range(2):
        np.testing.assert_array_equal(rewards.score(PROMPTS, COMPLETIONS, COLUMNS).total, [1, 4, 4, 1])
    assert len(calls) == 1
    metrics = rewards.metrics()
    assert metrics["rewards/hangs/timeouts"] == 1
    assert metrics["rewards/hangs/errors"] == metrics["rewards/length/timeouts"] == 0
    release.set()
    rewards.timeout = 60
    np.testing.assert_array_equal(rewards.score(PROMPTS, COMPLETIONS, COLUMNS).total, [8, 11, 11, 8])
    assert rewards.metrics()["rewards/hangs/timeouts"] == 0


def test_timeouts_raise_by_default() -> None:
    cancelled = threading.Event()

    async def endless(completions: list[str], **_: Any) -> list[float]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return []

    async def own(**_: Any) -> list[float]:
        raise TimeoutError("the service did not answer")

    def hangs(completions: list[str], **_: Any) -> list[float]:
        time.sleep(1)
        return [0.0] * len(completions)

    end = "; `reward_on_error` `skip` or `zero` goes on without its values"
    for function in (endless, hangs):
        found = message(lambda f=function: score(f, timeout=0.02), RewardError)  # type: ignore[misc]
        assert found == f"reward `{function.__name__}` took longer than 0.02 s for 4 completions" + end
    assert cancelled.wait(10)
    found = message(lambda: score(own, timeout=60), RewardError)
    assert found == "reward `own` raised TimeoutError for row 0: the service did not answer" + end


def test_a_function_that_ends_its_thread() -> None:
    def leaves(**_: Any) -> list[float]:
        raise SystemExit(3)

    assert "raised RuntimeError for row 0: it called sys.exit" in message(
        lambda: score(leaves, timeout=60), RewardError
    )
    with pytest.raises(SystemExit):
        score(leaves)


@pytest.mark.parametrize("on_error", ["raise", "skip", "zero"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1.0], "reward `fn_2` returned 1, expected 4 (one value a row)"),
        ([1.0, math.nan, 2.0, 3.0], "reward `fn_2` returned nan for row 1; rewards must be finite"),
        ([1.0, 2.0, 3.0, -math.inf], "reward `fn_2` returned -inf for row 3; rewards must be finite"),
        (["a", 2.0, 3.0, 4.0], "reward `fn_2` returned something that is no number: ['a', 2.0, 3.0, 4.0]"),
        ([1.0, "2", 3.0, 4.0], "reward `fn_2` returned something that is no number: [1.0, '2', 3.0, 4.0]"),
        (None, "reward `fn_2` returned None; expected a list of 4 numbers"),
    ],
)
def test_wrong_values_are_an_error_whatever_the_policy(value: Any, expected: str, on_error: Any) -> None:
    def make(returned: Any) -> Any:
        def fn(**_: Any) -> Any:
            return returned

        async def fn_(**_: Any) -> Any:
            return returned

        fn_.__name__ = "fn"
        return fn, fn_

    good, _ = make([0] * 4)
    for bad in make(value):
        assert message(lambda b=bad: score([good, b], on_error=on_error)) == expected  # type: ignore[misc]


def test_functions_that_do_not_take_their_arguments() -> None:
    def closed(prompts: Any, completions: Any) -> list[float]:
        return [0.0] * len(completions)

    def wants_more(completions: Any, solution: Any, **_: Any) -> list[float]:
        return [0.0] * len(completions)

    for on_error in ("raise", "skip"):
        found = message(lambda p=on_error: score(closed, on_error=p))  # type: ignore[misc]
        assert found.startswith(
            "reward `closed`: got an unexpected keyword argument 'answer'; it is called with prompts, "
        )
        assert "`**kwargs`" in found
        found = message(lambda p=on_error: score(wants_more, on_error=p))  # type: ignore[misc]
        assert (
            "missing a required argument: 'solution'; it is called with prompts, completions, answer, level," in found
        )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"functions": []}, "`reward_funcs` is empty; give at least one function"),
        ({"weights": [1]}, "`reward_weights` has 1 values for 2 reward functions"),
        ({"weights": [1, math.inf]}, "`reward_weights` holds a value that is not finite: [1.0, inf]"),
        ({"on_error": "skipp"}, "`reward_on_error` is `skipp`; did you mean `skip`?"),
        ({"timeout": 0}, "`reward_timeout` is 0, allowed: above 0 (seconds)"),
        ({"functions": "nowhere"}, "reward `nowhere`: expected `module:function` or the folder of a reward model"),
        ({"functions": "no_such_module:f"}, "reward `no_such_module:f`: No module named 'no_such_module'"),
        ({"functions": [3]}, "reward 3 is not callable"),
        (
            {"functions": [torch.nn.Linear(1, 1)]},
            "reward `Linear` is a module; wrap it: ModelReward(model, tokenizer)",
        ),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], expected: str) -> None:
    assert message(lambda: TextRewards(**{"functions": [right, length], **settings})) == expected


def test_columns_that_do_not_fit() -> None:
    rewards = TextRewards(length)
    assert message(lambda: rewards.score(PROMPTS, COMPLETIONS[:3])) == "3 values of `completions` for 4 prompts"
    assert message(lambda: rewards.score(PROMPTS, COMPLETIONS, {"a": [1]})) == "1 values of `a` for 4 prompts"
    found = message(lambda: rewards.score(PROMPTS, COMPLETIONS, completion_ids=[[1]]))
    assert found == "1 values of `completion_ids` for 4 prompts"
    found = message(lambda: rewards.score(PROMPTS, COMPLETIONS, {"completions": COMPLETIONS}))
    assert found == "the dataset has a column `completions`, an argument that reward functions get; rename it"

    def logs(log_extra: Any, **_: Any) -> list[float]:
        log_extra("parsed", [1])
        return [0.0] * 4

    assert message(lambda: score(logs)) == "`log_extra` got 1 values of `parsed`, expected 4 (one value a row)"


# Judges


def test_judge_from_scores() -> None:
    """P = 1/2 at a tie, e / (1 + e) one scale apart, log odds are the difference, both orders sum to 1."""
    assert judge_from_scores(2.0, 2.0).item() == 0.5
    assert judge_from_scores(5.0, 2.0, scale=3.0).item() == pytest.approx(math.e / (1 + math.e))
    scores = np.array([0.0, 0.3, -2.0, 7.0])
    matrix = judge_from_scores(scores[:, None], scores[None], scale=0.5)
    assert matrix.shape == (4, 4)
    np.testing.assert_allclose(matrix + matrix.T, 1)
    np.testing.assert_allclose(np.log(matrix / (1 - matrix)), (scores[:, None] - scores) / 0.5, atol=1e-6)
    np.testing.assert_array_equal(judge_from_scores([1e6, -1e6], 0.0), [1, 0])  # no overflow
    assert np.isnan(judge_from_scores([1.0, math.nan], [math.nan, 1.0])).all()
    for scale in (0.0, -1.0, math.inf, math.nan):
        assert message(lambda s=scale: judge_from_scores(1, 2, s)).startswith("`scale` is ")  # type: ignore[misc]


# Reward models


WORDS = ["[PAD]", "</s>", "<s>", "<user>", "<assistant>", *"abcdefg"]


def tokenizer(**settings: Any) -> Any:
    """One token a word; `<s>` is its only special token put before a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[PAD]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    given = {"pad_token": "[PAD]", "eos_token": "</s>", "chat_template": CHAT, **settings}
    return PreTrainedTokenizerFast(tokenizer_object=words, **given)


def reward_model(seed: int = 0, **settings: Any) -> Any:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    positions = {"max_position_embeddings": 16, "vocab_size": len(WORDS), "num_labels": 1, "initializer_range": 0.3}
    config = LlamaConfig(**{**sizes, **positions, **settings})
    return LlamaForSequenceClassification(config)


def logit(model: Any, words: str) -> float:
    """One row without padding: the head on the last hidden state."""
    ids = torch.tensor([[WORDS.index(w) for w in words.split()]])
    with torch.no_grad():
        return float(model.score(model.eval().model(input_ids=ids).last_hidden_state[0, -1]))


TEXTS = (["a b ", "c ", "a ", "d e f g a "], ["c d e", "b", "", "b"])


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_model_as_a_reward(batch_size: int) -> None:
    model = reward_model(attention_dropout=0.5)
    expected = [logit(model, p + c) for p, c in zip(*TEXTS, strict=True)]
    assert max(expected) - min(expected) > 0.1
    model.train()
    reward = ModelReward(model, tokenizer(), batch_size=batch_size)
    assert reward(*TEXTS, answer=[1] * 4) == pytest.approx(expected, abs=1e-5)
    assert model.training
    assert all(module.training for module in model.modules())
    assert model.config.pad_token_id == 0


def test_conversations_go_through_the_template() -> None:
    model, words = reward_model(), tokenizer()
    prompts = [[{"role": "user", "content": "a b"}], [{"role": "user", "content": "c"}]]
    completions = [[{"role": "assistant", "content": "d"}], [{"role": "assistant", "content": "e f g"}]]
    texts = ["<user> a b </s> <assistant> d </s>", "<user> c </s> <assistant> e f g </s>"]
    expected = [logit(model, text) for text in texts]
    assert ModelReward(model, words)(prompts, completions) == pytest.approx(expected, abs=1e-5)
    assert ModelReward(model, words, special_tokens=True)(prompts, completions) == pytest.approx(expected, abs=1e-5)


def test_rewards_are_those_of_trl() -> None:
    """Rendered and scored as TRL's GRPOTrainer does it with a reward model: its calls, on one padded batch."""
    from trl.data_utils import apply_chat_template

    model, words = reward_model(pad_token_id=0), tokenizer()
    prompts = [[{"role": "user", "content": "a b"}], [{"role": "user", "content": "c"}]]
    completions = [[{"role": "assistant", "content": "d"}], [{"role": "assistant", "content": "e f g"}]]
    chats = [{"messages": p + c} for p, c in zip(prompts, completions, strict=True)]
    for texts, found in (
        ([apply_chat_template(chat, words)["text"] for chat in chats], ModelReward(model, words)(prompts, completions)),
        ([p + c for p, c in zip(*TEXTS, strict=True)], ModelReward(model, words)(*TEXTS)),
    ):
        inputs = words(text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            expected = model.eval()(**inputs).logits[:, 0]
        assert found == pytest.approx(expected.tolist(), abs=1e-5)


def test_an_encoder_as_a_reward() -> None:
    """Every token sees every other, so padding must not be attended to."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    expected = []
    for text in (p + c for p, c in zip(*TEXTS, strict=True)):
        with torch.no_grad():
            expected.append(model(input_ids=torch.tensor([[WORDS.index(w) for w in text.split()]])).logits.item())
    assert ModelReward(model, tokenizer())(*TEXTS) == pytest.approx(expected, abs=1e-5)


def test_special_tokens() -> None:
    """As TRL's RewardTrainer trains on texts: the tokenizer's special tokens, and one end token."""
    model = reward_model()
    found = ModelReward(model, tokenizer(), special_tokens=True)(["a ", "a "], ["b", "b </s>"])
    assert found == pytest.approx([logit(model, "<s> a b </s>")] * 2, abs=1e-5)


def test_a_folder_is_a_reward(tmp_path: Path) -> None:
    model, words = reward_model(), tokenizer()
    folder = tmp_path / "my-reward-model"
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    scores = TextRewards([str(folder), length]).score(*TEXTS)
    assert scores.names == ["my-reward-model", "length"]
    expected = [logit(model, p + c) for p, c in zip(*TEXTS, strict=True)]
    np.testing.assert_allclose(scores.values[:, 0], expected, atol=1e-5)
    assert ModelReward(folder, words)(*TEXTS) == pytest.approx(expected, abs=1e-5)


def test_an_end_token_pads_where_no_other_does() -> None:
    model = reward_model()
    found = ModelReward(model, tokenizer(pad_token=None))(*TEXTS)
    assert model.config.pad_token_id == 1
    assert found == pytest.approx([logit(model, p + c) for p, c in zip(*TEXTS, strict=True)], abs=1e-5)
    trained = reward_model(pad_token_id=3)
    ModelReward(trained, tokenizer())
    assert trained.config.pad_token_id == 3  # what it was trained with


def test_models_that_are_no_reward_models(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    two = reward_model(num_labels=2)
    end = " has 2 labels; a reward model has one (a sequence-classification model with `num_labels=1`)"
    assert message(lambda: ModelReward(two, tokenizer())) == "LlamaForSequenceClassification" + end
    two.save_pretrained(tmp_path / "two")
    assert f"{tmp_path / 'two'} is a classifier with 2 labels" in message(lambda: ModelReward(tmp_path / "two"))

    language = LlamaForCausalLM(reward_model().config)
    language.save_pretrained(tmp_path / "language")
    found = message(lambda: ModelReward(tmp_path / "language"))
    assert found == f"{tmp_path / 'language'} is no trained reward model: it lacks score.weight"
    (tmp_path / "empty").mkdir()
    found = message(lambda: TextRewards(str(tmp_path / "empty")))
    assert found == (
        f"`reward`: cannot load {tmp_path / 'empty'}: it has no config.json; expected a folder "
        "that `save_pretrained` wrote"
    )


def test_what_a_reward_model_cannot_score() -> None:
    model, words = reward_model(), tokenizer()
    reward = ModelReward(model, words)
    name = "LlamaForSequenceClassification"
    assert message(lambda: reward(["a", ""], ["b", ""])) == (
        f"row 1: prompt and completion have no tokens that reward model `{name}` could see"
    )
    assert message(lambda: reward(["a ", "a "], ["b", "b " * 16])) == (
        f"row 1 has 17 tokens, more than the 16 positions of reward model `{name}`; shorten the prompt or "
        "`max_completion_length`"
    )
    assert message(lambda: reward(["a"], [[{"role": "assistant", "content": "b"}]])) == (
        "row 0: prompt and completion have to be both texts, or both lists of messages"
    )
    plain = ModelReward(model, tokenizer(chat_template=None))
    chat = [[{"role": "user", "content": "a"}]]
    assert message(lambda: plain(chat, chat)) == (
        f"the tokenizer of reward model `{name}` has no chat template; set `chat_template`"
    )
    assert message(lambda: ModelReward(model)) == (
        "a reward model that is given as a module needs its tokenizer: ModelReward(model, tokenizer)"
    )
    assert message(lambda: ModelReward(model, words, batch_size=0)) == (
        "the number of rows a batch is 0, allowed: 1 or more"
    )
    bare = tokenizer(pad_token=None, eos_token=None)
    assert message(lambda: ModelReward(reward_model(), bare)) == (
        "the reward model's tokenizer has neither a padding nor an end token; set one of them"
    )
    with torch.no_grad():
        model.score.weight.fill_(math.nan)
    found = message(lambda: TextRewards(reward).score(["a"], [" b"]))
    assert found == f"reward `{name}` returned nan for row 0; rewards must be finite"
