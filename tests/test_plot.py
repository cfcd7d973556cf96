"""Learning curves from hand-made run folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlkit.errors import UserError
from rlkit.plot import curve, group, mean_interval, plot

PNG = b"\x89PNG\r\n\x1a\n"


def make_run(
    folder: Path,
    evaluations: list[tuple[int, float]] | None = None,
    training: list[tuple[int, float]] | None = None,
    **config: Any,
) -> Path:
    folder.mkdir(parents=True)
    lines = [f"{key}: {value}" for key, value in {"trainer": "sac", "env": "Pendulum-v1", **config}.items()]
    (folder / "config.yaml").write_text("\n".join(lines), encoding="utf-8")
    for name, key, points in (
        ("eval.jsonl", "eval/mean_reward", evaluations),
        ("metrics.jsonl", "rollout/ep_rew_mean", training),
    ):
        if points is not None:
            records = [json.dumps({"step": step, key: value, "other": 1}) for step, value in points]
            (folder / name).write_text("".join(f"{record}\n" for record in records), encoding="utf-8")
    return folder


def size_of(image: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its header."""
    data = image.read_bytes()
    assert data[:8] == PNG
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_a_figure_has_one_panel_an_environment(tmp_path: Path) -> None:
    points = [(0, -1000.0), (500, -200.0)]
    runs = [make_run(tmp_path / str(seed), points, seed=seed) for seed in range(3)]
    runs.append(make_run(tmp_path / "droq", points, preset="droq"))
    other = make_run(tmp_path / "other µ", [(0, 1.0), (10, 2.0)], env="Hopper-v5")
    one = plot(runs, tmp_path / "one.png")
    two = plot([*runs, other], tmp_path / "two.png")
    assert one == tmp_path / "one.png"
    width, height = size_of(one)
    assert size_of(two) == (2 * width, height)


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    """No figure of ours stays open in, and no backend is chosen for, the user's session."""
    before = sys.modules.get("matplotlib.pyplot")
    plot([make_run(tmp_path / "a", [(0, 1.0), (1, 2.0)])], tmp_path / "a.png")
    assert sys.modules.get("matplotlib.pyplot") is before


def test_other_formats_by_suffix(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", [(0, 1.0), (1, 2.0)])
    assert plot([run], tmp_path / "a.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_evaluations_come_before_training_returns(tmp_path: Path) -> None:
    both = make_run(tmp_path / "both", [(0, 1.0), (5, 2.0)], [(1, 7.0), (2, 8.0), (3, 9.0)])
    axis, kind, (steps, values) = curve(both)
    assert (axis, kind, steps.tolist(), values.tolist()) == ("return", "evaluation", [0, 5], [1, 2])
    young = make_run(tmp_path / "young", [(0, 1.0)], [(1, 7.0), (2, 8.0)])
    axis, kind, (steps, values) = curve(young)
    assert (axis, kind, steps.tolist(), values.tolist()) == ("return", "training return", [1, 2], [7, 8])


def test_records_without_the_key_are_passed_over(tmp_path: Path) -> None:
    """Before the first episode ends there is no return."""
    run = make_run(tmp_path / "a", training=[(10, 1.0), (20, 2.0)])
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text('{"step": 5, "train/actor_loss": 0.1}\n' + text)
    assert curve(run)[2][0].tolist() == [10, 20]


def test_groups(tmp_path: Path) -> None:
    assert group(make_run(tmp_path / "a")) == ("Pendulum-v1", "sac")
    assert group(make_run(tmp_path / "b", preset="auto")) == ("Pendulum-v1", "sac")
    assert group(make_run(tmp_path / "c", preset="droq")) == ("Pendulum-v1", "sac (droq)")
    assert group(make_run(tmp_path / "d", env="null")) == ("task", "sac")


def curve_of(*points: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    steps, values = np.array(points, dtype=float).T
    return steps, values


def test_mean_and_interval_by_hand() -> None:
    """At step 10 values 1, 3: mean 2, deviation sqrt(2), t(0.975, 1) = 12.7062, half width 12.7062 sqrt(2)/sqrt(2).
    At step 30 values 5, 5: half width 0. Steps 0 and 20 are of one run only.
    """
    steps, mean, low, high = mean_interval(
        [curve_of((0, 9), (10, 1), (30, 5)), curve_of((30, 5), (10, 3), (20, 9))],
    )
    assert steps.tolist() == [10, 30]
    assert mean.tolist() == [2, 5]
    assert low == pytest.approx([2 - 12.7062, 5], abs=1e-3)
    assert high == pytest.approx([2 + 12.7062, 5], abs=1e-3)


def test_three_runs_against_scipy() -> None:
    from scipy import stats

    values = [2.0, 3.5, 11.0]
    _, mean, low, high = mean_interval([curve_of((0, v), (1, 0)) for v in values])
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean[0], low[0], high[0]) == pytest.approx((np.mean(values), expected.low, expected.high))


def test_one_run_has_no_interval() -> None:
    steps, mean, low, high = mean_interval([curve_of((0, 1), (5, 2))])
    assert (steps.tolist(), mean.tolist()) == ([0, 5], [1, 2])
    assert np.isnan(low).all()
    assert np.isnan(high).all()


def test_errors(tmp_path: Path) -> None:
    def message(*runs: Path, out: str = "x.png") -> str:
        with pytest.raises(UserError) as caught:
            plot(runs, tmp_path / out)
        assert not (tmp_path / out).exists()
        return str(caught.value)

    good = make_run(tmp_path / "good", [(0, 1.0), (5, 2.0)])
    assert message() == "no runs to draw"
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        assert message(good, tmp_path / name) == f"{tmp_path / name} is not a run folder: it has no config.yaml"
    young = make_run(tmp_path / "young", [(0, 1.0)], [])
    assert message(young).startswith(f"{young} has nothing to draw yet")
    fresh = make_run(tmp_path / "fresh")
    assert message(fresh).startswith(f"{fresh} has nothing to draw yet")
    shifted = make_run(tmp_path / "shifted", [(1, 1.0), (6, 2.0)])
    assert message(good, shifted) == "the runs have no evaluation step in common; give them the same `eval_every`"
    training = make_run(tmp_path / "training", None, [(0, 1.0), (5, 2.0)])
    assert message(good, training).startswith("some runs of sac have evaluations and others only training records")
    assert message(good, out="no/such/folder.png").startswith("cannot write ")
    assert message(good, out="x.nonsense").startswith("cannot write ")
