"""Sorting letters: a text task made in memory, on which every language trainer runs without a file or a network.

A prompt is a few letters and an equals sign, `dbca=`; the right answer is the same letters in alphabetical order,
`abcd`. Demonstrations are of mixed quality: some sort in a wrong order, and letters are dropped, doubled and swapped,
more often the longer the prompt. So a model trained on them samples answers of every quality, and is right more often
on short prompts than on long ones. A judge says which of two answers it prefers; by configuration it likes long answers
too much, is noisy, or prefers in a circle, and the pairs that it labels cover only a part of the answers.

The reward is the truth that judges are compared with: with t the sorted letters of the prompt and d the Levenshtein
distance (insertions, deletions, substitutions),

    reward(prompt, answer) = 1 - d(answer, t) / max(|answer|, |t|),

which is 1 for the sorted letters and for nothing else, and never below 0:

| prompt | answer | d | reward |
|---|---|---|---|
| `dbca=` | `abcd` | 0 | 1 |
| `dbca=` | `abd` (one dropped) | 1 | 3/4 |
| `dbca=` | `abbcd` (one doubled) | 1 | 4/5 |
| `dbca=` | `abdc` (two swapped) | 2 | 1/2 |
| `dbca=` | `dbca` (as given) | 2 | 1/2 |
| `dbca=` | `dcba` (descending) | 4 | 0 |
| `dbca=` | nothing, or `zzzz` | 4 | 0 |
| `dbca=` | `abcdabcd` (twice) | 4 | 1/2 |

What takes no sorting gets little: over the default prompts, copying the prompt 0.38 on average, writing `abcdefghijkl`
whatever the prompt 0.33. Text after or between the right letters always costs.

Everything here deals in texts and is a pure function of its arguments. Train and test prompts share no multiset of
letters, so a sorted answer seen in training is never asked for in the test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Any, Literal

import annotated_types as limits
import numpy as np

from rlkit.config import Count, Fraction, NonNegative, Strict
from rlkit.errors import UserError
from rlkit.rng import derive

LETTERS = "abcdefghijklmnopqrstuvwxyz"
END_OF_PROMPT = "="
ALPHABET = LETTERS + END_OF_PROMPT
"""Every character of prompts and of right answers."""

Style = Literal["ascending", "descending", "odd_even"]
STYLES: tuple[Style, ...] = ("ascending", "descending", "odd_even")
"""Orders of letters: `odd_even` has the first, third, fifth, ... letter of the alphabet before the second, fourth, ...
(a small model learns any fixed order of the alphabet as easily as another, and copying as given hardly at all)."""
ADVANTAGE: dict[tuple[Style, Style], float] = {
    ("ascending", "descending"): 0.40,
    ("descending", "odd_even"): 0.25,
    ("odd_even", "ascending"): 0.20,
}
"""Of the cyclic judge: P(first beats second) - 1/2 for perfect answers of two styles."""

_TEST_SHARE = 5  # one multiset of letters in so many is a test prompt
_ATTEMPTS = 1000  # draws for a prompt of the wanted split before the configuration is called too narrow


@dataclass(frozen=True, kw_only=True)
class Letters(Strict):
    """The task: prompts, demonstrations, judge, and what its preferences cover."""

    alphabet_size: Annotated[int, limits.Interval(ge=2, le=26)] = 12
    """Prompts are made of the first so many letters of the alphabet."""
    min_letters: Count = 2
    """Letters of the shortest prompt."""
    max_letters: Annotated[int, limits.Interval(ge=1, le=16)] = 8
    """Letters of the longest prompt; lengths are equally likely."""
    slip: Fraction = 0.2
    """Probability that a demonstration drops, doubles or swaps a letter, for each letter of a prompt of `max_letters`;
    for a prompt of n letters it is slip (n - 1) / (max_letters - 1)."""
    other_styles: Fraction = 0.5
    """Share of demonstrations in a wrong order, `descending` and `odd_even` half each. At 0 nearly all is right on the
    shortest prompts."""
    judge: Literal["reward", "cyclic"] = "reward"
    """`reward` scores answers by the true reward. `cyclic` prefers ascending to descending, descending to odd_even, and
    odd_even to ascending order, so that no score explains it."""
    length_bias: Annotated[float, limits.Interval(ge=-1, le=1)] = 0.0
    """Added to the judge's score for each character of an answer. For n letters one character too many costs 1/(n+1) of
    true reward: above that the judge prefers too long answers, and optimising it lowers the true reward in the end."""
    temperature: NonNegative = 0.2
    """Of the Bradley-Terry judge: P(a beats b) = sigmoid((score(a) - score(b)) / temperature); at 0 the better score
    always wins."""
    label_noise: Annotated[float, limits.Interval(ge=0, le=0.5)] = 0.0
    """Probability that the label of a pair is turned round after the judge has decided."""
    coverage_reward: Fraction = 1.0
    """Only answers of at most this true reward enter preferences; below 1 the right ones are missing."""
    coverage_length: Count | None = None
    """Only answers of at most so many characters enter preferences; None is no limit."""
    coverage_letters: Count | None = None
    """Only prompts of at most so many letters enter preferences; None is no limit."""

    def __post_init__(self) -> None:
        if self.min_letters > self.max_letters:
            raise UserError(
                f"`min_letters`: {self.min_letters} is more than `max_letters` ({self.max_letters}); lower it or raise "
                f"`max_letters`"
            )


def model_config(vocab_size: int) -> dict[str, Any]:
    """Keywords of `transformers.LlamaConfig` for a model that learns the task from nothing in seconds."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.06,
        "tie_word_embeddings": True,
    }


# Prompts and demonstrations


def prompts(config: Letters, n: int, seed: int, split: Literal["train", "test"] = "train") -> list[str]:
    """`n` prompts: a length, equally likely; letters, independent and equally likely; kept if of the split.

    Which split a multiset of letters belongs to depends on nothing else, the seed included.

    Raises:
        UserError: no prompt of this split turned up, because there are too few different ones.
    """
    if split not in ("train", "test"):
        raise UserError(f"`split`: {split!r} is neither `train` nor `test`")
    rng = np.random.default_rng(derive(seed, "letters", "prompts", split))
    return [_draw_prompt(config, rng, split) for _ in range(n)]


def _draw_prompt(config: Letters, rng: np.random.Generator, split: str) -> str:
    count = int(rng.integers(config.min_letters, config.max_letters + 1))
    for _ in range(_ATTEMPTS):
        letters = "".join(LETTERS[i] for i in rng.integers(config.alphabet_size, size=count))
        if split_of(letters) == split:
            return letters + END_OF_PROMPT
    raise UserError(
        f"`alphabet_size`: {config.alphabet_size} letters make no {split} prompt of length {count}; raise it, or "
        f"`min_letters`"
    )


def split_of(prompt: str) -> Literal["train", "test"]:
    """The split of a prompt, a hash of its multiset of letters; a fifth of them is `test`."""
    return "test" if derive(0, "letters", "split", _right(prompt)) % _TEST_SHARE == 0 else "train"


def demonstrations(config: Letters, n: int, seed: int) -> list[dict[str, str]]:
    """`n` rows of `prompt` (of the train split) and `completion`, with slips and styles as configured."""
    own = derive(seed, "letters", "demonstrations")  # other prompts than `prompts(config, n, seed)`
    rng = np.random.default_rng(own)
    others, rows = config.other_styles, []
    for prompt in prompts(config, n, own):
        style = STYLES[rng.choice(3, p=(1 - others, others / 2, others / 2))]
        answer = answers(prompt)[style]
        rate = config.slip * (len(answer) - 1) / max(config.max_letters - 1, 1)
        rows.append({"prompt": prompt, "completion": _with_slips(answer, rate, rng)})
    return rows


def _with_slips(answer: str, rate: float, rng: np.random.Generator) -> str:
    """`answer`, each letter of which is with probability `rate` dropped, doubled or swapped with the next one."""
    letters, written = list(answer), ""
    slips = np.where(rng.random(len(letters)) < rate, rng.integers(3, size=len(letters)), 3)
    for i, slip in enumerate(slips):
        if slip == 2 and i + 1 < len(letters):
            letters[i], letters[i + 1] = letters[i + 1], letters[i]
        written += letters[i] * (0 if slip == 0 else 2 if slip == 1 else 1)
    return written


def difficulty(prompts: Sequence[str]) -> list[float]:
    """The number of letters of each prompt, which is what answers get worse with."""
    return [float(len(_letters(prompt))) for prompt in prompts]


# Reward


def _letters(prompt: str) -> str:
    return prompt.partition(END_OF_PROMPT)[0]


def _right(prompt: str) -> str:
    return "".join(sorted(_letters(prompt)))


def answers(prompt: str) -> dict[Style, str]:
    """The perfect answer in each style (some coincide for short prompts); the true reward wants the ascending one."""
    right = _right(prompt)
    odd = "".join(letter for letter in right if ord(letter) % 2)  # a is 97
    even = "".join(letter for letter in right if not ord(letter) % 2)
    return {"ascending": right, "descending": right[::-1], "odd_even": odd + even}


def reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """True rewards in [0, 1], in TRL's signature; defined for every text."""
    return [similarity(completion, _right(prompt)) for prompt, completion in zip(prompts, completions, strict=True)]


def similarity(a: str, b: str) -> float:
    """1 - Levenshtein distance / length of the longer text; 1 for equal texts, the empty ones included."""
    return 1.0 if a == b else 1.0 - edit_distance(a, b) / max(len(a), len(b))


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions of a character that turn a into b."""
    row = list(range(len(b) + 1))  # distances of the part of a that was read to every beginning of b
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(diagonal + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


# Preferences


class Judge:
    """Says which of two answers to a prompt is better, as `config` has it.

    The score of an answer is its quality plus `length_bias` for each character. Its quality is the true reward; for the
    cyclic judge it is the similarity to the nearest of the three perfect answers (`answers`), which is the style of the
    answer (the first one of equally near ones). Then

        P(a beats b) = sigmoid((score(a) - score(b)) / temperature + c),

    where c = logit(1/2 + ADVANTAGE) of the styles of a and b for the cyclic judge, and 0 otherwise. At temperature 0
    the better score wins; where scores are equal, it is sigmoid(c). So without length bias three different perfect
    answers beat one another around the circle with 0.90, 0.75 and 0.70, a game whose Nash equilibrium plays ascending,
    descending and odd_even with (0.25, 0.20, 0.40) / 0.85.

    It answers for every text: the `coverage_` fields and `label_noise` belong to `label` and `rank`.
    """

    def __init__(self, config: Letters) -> None:
        self.config = config

    def __call__(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> list[float]:
        """P(a beats b) for each row, before `label_noise`."""
        return [self._probability(*row) for row in zip(prompts, a, b, strict=True)]

    def scores(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """The judge's score of each row: for the reward judge all that it goes by, for the cyclic one a part."""
        return [self._read(*row)[0] for row in zip(prompts, completions, strict=True)]

    def styles(self, prompts: Sequence[str], completions: Sequence[str]) -> list[Style]:
        """The nearest style of each row."""
        return [self._nearest(*row)[1] for row in zip(prompts, completions, strict=True)]

    def _nearest(self, prompt: str, completion: str) -> tuple[float, Style]:
        similarities = {style: similarity(completion, text) for style, text in answers(prompt).items()}
        style = max(STYLES, key=lambda style: similarities[style])  # the first of equal ones
        return similarities[style], style

    def _read(self, prompt: str, completion: str) -> tuple[float, Style]:
        """Score and style; the reward judge knows one style."""
        if self.config.judge == "cyclic":
            quality, style = self._nearest(prompt, completion)
        else:
            quality, style = similarity(completion, _right(prompt)), "ascending"
        return quality + self.config.length_bias * len(completion), style

    def _probability(self, prompt: str, a: str, b: str) -> float:
        (score_a, style_a), (score_b, style_b) = self._read(prompt, a), self._read(prompt, b)
        gap, circle = score_a - score_b, _advantage(style_a, style_b)
        if self.config.temperature == 0 and not math.isclose(score_a, score_b, abs_tol=1e-9):
            return float(gap > 0)
        logit = math.log((0.5 + circle) / (0.5 - circle))
        if self.config.temperature > 0:
            logit += gap / self.config.temperature
        return 0.5 * (1 + math.tanh(0.5 * logit))  # sigmoid that cannot overflow


def _advantage(a: Style, b: Style) -> float:
    return ADVANTAGE.get((a, b), 0.0) - ADVANTAGE.get((b, a), 0.0)


def covered(config: Letters, prompt: str, completion: str) -> bool:
    """Whether preferences may hold this answer, by the `coverage_` fields."""
    return (
        (config.coverage_letters is None or len(_letters(prompt)) <= config.coverage_letters)
        and (config.coverage_length is None or len(completion) <= config.coverage_length)
        and (config.coverage_reward >= 1 or reward([prompt], [completion])[0] <= config.coverage_reward)
    )


def label(config: Letters, prompt: str, completions: Sequence[str], seed: int) -> list[dict[str, str]]:
    """Every pair of different, covered completions of one prompt as a row of `prompt, chosen, rejected`.

    The label is a draw with the judge's probability, turned round with probability `label_noise`. It is a property of
    (seed, prompt, the two texts): it does not depend on their order or on what else is in the list, and asking again
    gives the same answer.
    """
    texts = [text for text in dict.fromkeys(completions) if covered(config, prompt, text)]
    judge, rows = Judge(config), []
    for pair in combinations(texts, 2):
        a, b = sorted(pair)
        draw, flip = np.random.default_rng(derive(seed, "letters", "label", prompt, a, b)).random(2)
        first = (draw < judge([prompt], [a], [b])[0]) != (flip < config.label_noise)
        rows.append({"prompt": prompt, "chosen": a if first else b, "rejected": b if first else a})
    return rows


def rank(config: Letters, prompt: str, completions: Sequence[str], seed: int) -> dict[str, Any] | None:
    """The different, covered completions of one prompt as a row of `prompt, completions, scores`; None for under two.

    The scores of the reward judge are its own plus Gumbel noise times its temperature, so that of any two completions
    the first has the higher score with exactly the judge's probability (Yellott, 1977). The cyclic judge has no scores:
    here they are the mean probabilities of beating the other completions of the row. `label_noise` is for pairs only.
    """
    texts = [text for text in dict.fromkeys(completions) if covered(config, prompt, text)]
    if len(texts) < 2:
        return None
    judge = Judge(config)
    if config.judge == "cyclic":
        table = [judge([prompt] * len(texts), [text] * len(texts), texts) for text in texts]
        scores = [(sum(row) - 0.5) / (len(texts) - 1) for row in table]
    else:
        noise = [np.random.default_rng(derive(seed, "letters", "rank", prompt, text)).gumbel() for text in texts]
        clean = judge.scores([prompt] * len(texts), texts)
        scores = [score + config.temperature * g for score, g in zip(clean, noise, strict=True)]
    return {"prompt": prompt, "completions": texts, "scores": scores}
