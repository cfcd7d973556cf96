"""Lines about long phases."""

from __future__ import annotations

import pytest

from rlkit.progress import Phase, Progress


def test_a_line_of_an_evaluation_says_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    """In a pipe; what has no name there is left out."""
    progress = Progress(10, 0, "updates")
    progress.show(4, {"eval_loss": 0.51234, "eval_rewards/accuracies": 0.75, "eval_units": 3, "eval_kl": 0.1})
    assert capsys.readouterr().out == "step 4/10  held-out loss 0.5123  accuracy 0.75\n"


def test_a_long_phase_is_mentioned_every_few_seconds_and_a_short_one_never() -> None:
    now, said = [0.0], []
    phase = Phase("sampling", "completions", said.append, seconds=10, clock=lambda: now[0])
    for second in range(1, 26):
        now[0] = second
        phase(second * 100, 2500)
    assert said == ["sampling: 1,000 of 2,500 completions", "sampling: 2,000 of 2,500 completions"]
    now[0] = 100.0
    phase(2500, 2500)  # its end is said otherwise
    assert len(said) == 2
