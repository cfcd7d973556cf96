"""How a policy fares when the dynamics change: evaluations over values of parameters of its environment.

All values have the episodes of the same seeds, so that differences between them are paired; at the unperturbed value
they are those of `rlkit eval`. `rlkit.envs.perturb` says which parameters there are.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from rlkit.control import ControlTrainer
from rlkit.envs.perturb import nominal, parse, perturbed
from rlkit.errors import UserError
from rlkit.evaluate import Evaluation, evaluate
from rlkit.files import default_place, replacing
from rlkit.plot import plot_sweep
from rlkit.trainer import Trainer

Points = list[tuple[float, Evaluation]]


def sweep(
    trainer: Trainer,
    name: str,
    values: Sequence[float] | np.ndarray,
    episodes: int = 10,
    seed: int | None = None,
    watch: Callable[[float, Evaluation], None] = lambda value, result: None,
) -> Points:
    """(value, evaluation) for each of `values` of the parameter `name`, in their order.

    Collective, as `evaluate` of a trainer. Actions are deterministic; nothing changes in the trainer.

    Args:
        trainer: one that acts in environments.
        seed: of the episodes, the same for every value; None takes the trainer's.
        watch: sees every result when it is there, in the main process.

    Raises:
        UserError: a parameter that the environment does not have, a value out of its range, a trainer without
            environments to evaluate in; all of them before the first episode.
        EnvError: an environment raised.
    """
    return Plan(trainer, name, values).carry_out(episodes, seed, watch)


class Plan:
    """A sweep whose values are known to be possible; see `sweep`."""

    def __init__(self, trainer: Trainer, name: str, values: Sequence[float] | np.ndarray) -> None:
        self.trainer, self.name, make_env = trainer, name, _make_env(trainer)
        self.makers = [(float(value), perturbed(make_env, name, value)) for value in values]
        if not self.makers:
            raise UserError(f"`{name}`: no values to evaluate at")
        env = make_env()
        self.nominal = nominal(env, name)
        env.close()

    def carry_out(self, episodes: int, seed: int | None, watch: Callable[[float, Evaluation], None]) -> Points:
        """Evaluate; the arguments are those of `sweep`."""
        trainer: Any = self.trainer
        chosen = trainer.config.seed if seed is None else seed

        def run() -> Points:
            points = []
            trainer._set_training(False)
            try:
                for value, make_env in self.makers:
                    result = evaluate(trainer, make_env, episodes, chosen)
                    assert result is not None  # nothing stops it here
                    watch(value, result)
                    points.append((value, result))
            finally:
                trainer._set_training(True)
            return points

        found: Points = trainer.processes.from_main(run)
        return found


def _make_env(trainer: Trainer) -> Callable[[], gym.Env]:
    if not isinstance(trainer, ControlTrainer):
        raise UserError(
            f"`{trainer.name}` acts in no environment: there are no dynamics to change (`--perturb` is for control "
            "trainers)"
        )
    make_env = trainer.make_eval_env()
    if make_env is None:
        raise UserError("evaluation needs an environment of its own: pass `eval_env=` (a function that makes one)")
    return make_env


# --- of the command line -----------------------------------------------------------------------------------------


def plans(trainer: Trainer, texts: Sequence[str]) -> list[Plan]:
    """A plan for each text such as `mass=0.5:1.5:11`.

    Raises:
        UserError: as of `parse` and `sweep`; a parameter given twice.
    """
    found = [parse(text) for text in texts]
    for name in (names := [name for name, _ in found]):
        if names.count(name) > 1:
            raise UserError(f"`{name}` is given twice; give all of its values at once, such as {name}=0.5,1,2")
    return [Plan(trainer, name, values) for name, values in found]


def report(plan: Plan, run: str, episodes: int, seed: int | None, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Carry out a plan, print its table, write its figure and its returns to where files of `run` go; -> for JSON."""
    table = Table(plan, say)
    trainer: Any = plan.trainer
    points = plan.carry_out(episodes, seed, table.add)
    png, rows = (default_place(run, f"perturb-{plan.name}{suffix}") for suffix in (".png", ".csv"))
    title = f"{trainer.config.env or 'the environment'}, {trainer.name}, step {trainer.clock:,}"

    def write() -> None:
        with replacing(rows) as temp, temp.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["value", "episode", "return"])
            writer.writerows((value, k, r) for value, result in points for k, r in enumerate(result.returns))
        with replacing(png) as temp:
            curve = [(value, result.mean, result.ci95[0], result.ci95[1]) for value, result in points]
            plot_sweep(plan.name, curve, temp, title=title, episodes=episodes, nominal=plan.nominal)

    trainer.processes.from_main(write)
    say(f"figure: {png}\nreturns: {rows}")
    return [_json(value, result) for value, result in points]


def _json(value: float, result: Evaluation) -> dict[str, Any]:
    rate = {"success_rate": float(np.mean(result.successes))} if result.successes else {}
    figures = {"mean": result.mean, "std": result.std, "ci95": result.ci95, "episodes": len(result.returns)}
    return {"value": value, **figures, **rate, "returns": result.returns}


@dataclass
class Table:
    """A table whose rows are printed as they come; the first result decides whether there is a success rate."""

    plan: Plan
    say: Callable[[str], None]
    begun: bool = False

    def add(self, value: float, result: Evaluation) -> None:
        if not self.begun:
            self._row(self.plan.name, "return", "95 % interval", "episodes", "success" if result.successes else "")
            self.begun = True
        digits = ".1f" if abs(result.mean) >= 10 else ".3f"
        n, (low, high) = len(result.returns), result.ci95
        spread = f" ± {result.std:{digits}}" if n > 1 else ""
        interval = f"{low:{digits}} to {high:{digits}}" if n > 1 else "none (n=1)"
        rate = f"{100 * np.mean(result.successes):.0f} %" if result.successes else ""
        mark = "unperturbed" if value == self.plan.nominal else ""
        self._row(f"{value:g}", f"{result.mean:{digits}}{spread}", interval, f"{n}", rate, mark)

    def _row(self, value: str, mean: str, interval: str, episodes: str, rate: str, mark: str = "") -> None:
        width = max(8, len(self.plan.name))
        self.say(f"{value:<{width}}  {mean:<20}  {interval:<22}  {episodes:<8}  {rate:<7}  {mark}".rstrip())
