"""Lines about long phases."""

from __future__ import annotations

from rlkit.progress import Phase


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
