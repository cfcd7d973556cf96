"""The command line: thin, with no logic of its own. Everything heavy is imported inside the commands.

Exit codes: 0 done, 1 failed, 2 wrong use, 75 stopped by a signal with a resumable checkpoint.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rlkit import processes, registry
from rlkit._version import __version__
from rlkit.errors import RlkitError, Stopped, UserError, did_you_mean

if TYPE_CHECKING:
    from rlkit.trainer import Trainer


class Parser(argparse.ArgumentParser):
    """An argument parser that reports mistakes as `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def parse(parser: argparse.ArgumentParser, args: Sequence[str]) -> argparse.Namespace:
    """Parse all of `args`; an unknown option is an error that names the nearest one."""
    namespace, unknown = parser.parse_known_args(args)
    if unknown:
        known = {flag.lstrip("-") for action in parser._actions for flag in action.option_strings}
        option = next((u for u in unknown if u.startswith("-")), None)
        if option is None:
            raise UserError(f"unexpected `{unknown[0]}` (see `{parser.prog} --help`)")
        name = option.lstrip("-").split("=")[0]
        raise UserError(f"unknown option `--{name}`{did_you_mean(name, known)} (see `{parser.prog} --help`)")
    return namespace


def count(text: str) -> int:
    """A positive whole number; `1e6` and `10_000` are fine."""
    return _integer(text, 1)


def whole(text: str) -> int:
    """A whole number from 0 on."""
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    try:
        value: float = int(text)
    except ValueError:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
    if not (least <= value < math.inf and value == int(value)):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: an integer >= {least}")
    return int(value)


# Commands


def list_trainers(args: Sequence[str]) -> int:
    parse(Parser(prog="rlkit list", description="The trainers: name, status, what they train on, paper."), args)
    rows = [("NAME", "STATUS", "TRAINS ON", "PAPER")]
    rows += [(name, e.status, e.data, e.paper) for name, e in registry.entries().items()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        print("  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[3]]).rstrip())
    return 0


def train(args: Sequence[str]) -> int:
    name = args[0] if args and not args[0].startswith("-") else None
    rest = list(args[1:] if name else args)
    first = Parser(prog="rlkit train", add_help=False, allow_abbrev=False)
    first.add_argument("--config")  # the file may decide which trainer's fields the rest are
    path = first.parse_known_args(rest)[0].config
    if name is None and path is None:
        if rest and rest[0] in ("-h", "--help"):
            print("usage: rlkit train TRAINER [--env ID] [--steps N] [--config FILE] [--FIELD V ...]\n")
            print("`rlkit train TRAINER --help` lists a trainer's fields; without arguments it runs an embedded task.")
            return list_trainers([])
        raise UserError("which trainer? `rlkit train TRAINER ...`; `rlkit list` shows them")
    from rlkit.config import add_arguments, load_file, merge, read_arguments

    file = {} if path is None else load_file(path)
    of_file = file.pop("trainer", None)
    if name and of_file not in (None, name):
        raise UserError(f"{path} is of the trainer `{of_file}`, not `{name}`")
    name = name or of_file
    if not isinstance(name, str):
        raise UserError(f"{path} names no trainer: `rlkit train TRAINER --config {path}`")
    cls = registry.get(name)
    doc = sys.modules[cls.__module__].__doc__ or ""
    parser = Parser(
        prog=f"rlkit train {name}",
        description=doc.strip().split("\n")[0],
        epilog=f"Without {' and '.join(f'--{field}' for field in cls.task_fields)}, or with no argument at all: "
        f"{_task(cls)}. Fields of the file and of the command line go by the same names.",
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=count, metavar="N", help=f"budget in {cls.counts.replace('_', ' ')}")
    parser.add_argument("--config", metavar="FILE", help="YAML file of fields, such as a run's config.yaml")
    add_arguments(parser, cls.Config)
    given = vars(parse(parser, rest))
    options = read_arguments(cls.Config, given)
    if path is not None:
        cls.make_config({k: v for k, v in file.items() if k != "steps"}, path)  # so that errors name where they are
        if isinstance(options.get("preset"), str):  # asked for here, it goes over the file
            options = merge(cls.preset_fields(options["preset"], {**file, **options}.get("env")), options)
    fields = merge(file, options)
    embedded = {} if any(field in fields for field in cls.task_fields) else cls.default_task
    fields = merge(embedded, fields)
    in_file = fields.pop("steps", None)
    steps = given["steps"] or (cls.default_steps if in_file is None else _count_in(path, in_file))
    if embedded:
        _say(f"no task given: the embedded one, {_task(cls, steps)}")
    if fields.get("out") is None:
        folder = _new_folder(name, fields)  # of the main process's clock
        fields["out"] = processes.join(fields.get("device", "auto")).from_main(lambda: str(folder))
    from rlkit.signals import stop

    with stop:
        trainer = cls(config=cls.make_config(fields))
        return _learn(trainer, steps)


def _task(cls: type[Trainer], steps: int | None = None) -> str:
    task = cls.default_task
    what = next((task[field] for field in cls.task_fields if field in task), "nothing")
    return f"{what} for {steps or task.get('steps', cls.default_steps):,} steps"


def _count_in(path: str, steps: Any) -> int:
    """`steps` of the file `path`."""
    try:
        return count(str(steps))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{path}: `steps`: {error}; or give `--steps N`") from None


def _new_folder(name: str, fields: dict[str, Any]) -> Path:
    """A folder under `runs/` that does not exist yet."""
    what = str(fields.get("env") or Path(str(fields.get("data") or "run")).name.split(".")[0])
    task = what.replace("/", "_").replace(":", "_")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    base = Path("runs") / f"{name}-{task}-seed{fields.get('seed', 0)}-{stamp}"
    folder, number = base, 2
    while folder.exists():
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    return folder


def _learn(trainer: Trainer, steps: int | None) -> int:
    """Learn with progress, then print what changed."""
    _say(trainer.describe())
    trainer.learn(steps, progress_bar=True)
    for line in trainer.summary():
        _say(line)
    return 0


def _say(line: str) -> None:
    """Print, in the main one of several processes."""
    if processes.is_main():
        print(line, flush=True)


def resume(args: Sequence[str]) -> int:
    parser = Parser(prog="rlkit resume", description="Finish an interrupted run, or go on to a larger total.")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--steps", type=count, metavar="N", help="new total, larger than the present one")
    edited = ("--allow-changes", "--allow_changes")
    parser.add_argument(*edited, action="store_true", help="go on although config.yaml was edited")
    given = parse(parser, args)
    from rlkit.signals import stop
    from rlkit.trainer import resume as resume_run

    with stop:
        trainer = resume_run(given.run, allow_changes=given.allow_changes)
        if given.steps is not None:
            if given.steps <= trainer.clock:
                raise UserError(
                    f"--steps {given.steps:,}: the run is at {trainer.clock:,} already; give a larger total"
                )
            trainer.target = given.steps
            if trainer.horizon and given.steps > trainer.horizon:
                _say(f"schedules keep the horizon they started with, {trainer.horizon:,} steps")
                kind = getattr(trainer.config, "lr_scheduler_type", "constant")
                if kind in ("linear", "cosine"):
                    _say(
                        f"`lr_scheduler_type: {kind}` ends there at a learning rate of 0, so further steps change "
                        f"nothing; to learn on, set `constant` in {given.run}/config.yaml and give `--allow-changes`"
                    )
        elif trainer.finished:
            _say(f"{given.run} is finished: step {trainer.clock:,}. `--steps N` goes on to a larger total.")
            return 0
        return _learn(trainer, None)


def evaluate(args: Sequence[str]) -> int:
    parser = Parser(prog="rlkit eval", description="Evaluate the newest checkpoint of a run, deterministically.")
    parser.add_argument("run", metavar="RUN", help="run folder, checkpoint or saved folder")
    parser.add_argument("--episodes", type=count, metavar="N", help="episodes, or rows [default: the run's own]")
    parser.add_argument("--seed", type=whole, metavar="S", help="episode k is reset with a seed derived from (S, k)")
    parser.add_argument(
        "--perturb",
        action="append",
        default=[],
        metavar="NAME=VALUES",
        help="then evaluate under changed dynamics, each parameter by itself; may be given several times. VALUES: "
        "LOW:HIGH:COUNT, A,B,... or A; NAME: mass, friction, gravity, damping, length or force, as factors (1 is "
        "unperturbed), action_noise, or a numerical keyword of the environment. Table, figure, CSV",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    given = parse(parser, args)
    from rlkit.trainer import load

    trainer = load(given.run, inference=True)
    if not trainer.can_evaluate():
        raise UserError(f"{given.run}: {trainer.why_no_evaluation(given.run)}")
    episodes, plans = given.episodes or trainer.config.eval_episodes or 10, []
    if given.perturb:
        from rlkit import perturbation

        plans = perturbation.plans(trainer, given.perturb)  # so that mistakes are found before the first episode
    record = trainer.evaluate(episodes, seed=given.seed)
    assert record is not None  # nothing stops it here
    _say(trainer.describe_evaluation(record))
    values = trainer.evaluation_json(record)
    if plans:
        swept = {plan.name: perturbation.report(plan, given.run, episodes, given.seed, _say) for plan in plans}
        values = {**values, "perturb": swept}
    if given.json:
        _say(json.dumps(_no_nan(values)))
    return 0


def _no_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for a figure that does not exist, such as the deviation of one episode."""
    if isinstance(value, dict):
        return {k: _no_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_no_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot(args: Sequence[str]) -> int:
    parser = Parser(prog="rlkit plot", description="Learning curves; runs of one trainer become a mean with interval.")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", metavar="FILE.png")
    given = parse(parser, args)
    from rlkit.plot import plot as draw

    runs = [Path(run) for run in given.runs]
    default = runs[0] / "learning-curve.png" if len(runs) == 1 else Path("learning-curves.png")
    print(draw(runs, Path(given.out) if given.out else default))
    return 0


def video(args: Sequence[str]) -> int:
    parser = Parser(prog="rlkit video", description="Film deterministic evaluation episodes: those of `rlkit eval`.")
    parser.add_argument("run", metavar="RUN", help="run folder, checkpoint or saved folder")
    parser.add_argument("--out", metavar="FILE.mp4", help="replaced if it is there [default: RUN/video.mp4]")
    parser.add_argument("--episodes", type=count, default=1, metavar="N", help="[default: 1]")
    parser.add_argument("--seed", type=whole, metavar="S", help="episode k is reset with a seed derived from (S, k)")
    given = parse(parser, args)
    from rlkit.files import default_place
    from rlkit.trainer import load
    from rlkit.video import film

    out = Path(given.out) if given.out else default_place(given.run, "video.mp4")
    film(load(given.run, inference=True), out, given.episodes, given.seed, say=_say)
    print(out)
    return 0


def bench(args: Sequence[str]) -> int:
    parser = Parser(prog="rlkit bench", description="Run a benchmark suite of a checkout: CSV, figures, a table.")
    parser.add_argument("suite", metavar="SUITE", nargs="?")
    parser.add_argument("--quick", action="store_true", help="at most two minutes, to see that it runs")
    given = parse(parser, args)
    import rlkit

    root = Path(rlkit.__file__).parent.parent
    script = root / "benchmarks" / "run.py"
    if not script.exists():
        raise UserError("benchmarks are part of a checkout, and this is an installed copy: clone the repository")
    import subprocess

    command = [
        sys.executable,
        str(script),
        *([given.suite] if given.suite else []),
        *(["--quick"] if given.quick else []),
    ]
    return subprocess.run(command, check=False, cwd=root).returncode


def data(args: Sequence[str]) -> int:
    if args and args[0] in DATA:
        return DATA[args[0]][0](args[1:])
    parser = Parser(
        prog="rlkit data",
        description="Look at data before training on them, or record episodes to train on.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="actions:\n" + "\n".join(f"  {name:<8} {text}" for name, (_, text) in DATA.items()),
    )
    parser.add_argument("action", choices=list(DATA), metavar="ACTION", help="`rlkit data ACTION --help` says more")
    parse(parser, args)
    raise AssertionError("the action was not among those known")


def data_inspect(args: Sequence[str]) -> int:
    parser = Parser(prog="rlkit data inspect", description="What is in a file or data set, and what is wrong with it.")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="text: a file, folder, or name on the hub; transitions: an .npz or HDF5 file, minari:ID or its folder",
    )
    text = parser.add_argument_group("of text data")
    text.add_argument("--tokenizer", "--model", metavar="M", help="folder or hub name whose tokens are counted")
    text.add_argument("--map", nargs="*", default=[], metavar="OURS=THEIRS", help="such as prompt=question")
    text.add_argument("--max_length", "--max-length", type=count, default=1024, metavar="N", help="[default: 1024]")
    text.add_argument("--boundary", choices=["error", "split", "common"], default="split", help="[default: split]")
    text.add_argument("--chat_template", "--chat-template", metavar="FILE")
    text.add_argument("--examples", type=count, default=1, metavar="N", help="records to show [default: 1]")
    given = parse(parser, args)
    wrong = [item for item in given.map if "=" not in item]
    if wrong:
        raise UserError(f"--map: got {wrong[0]!r}; expected OURS=THEIRS, such as prompt=question")
    from rlkit.envs import offline

    if offline.is_recording(given.source):
        options = {k: v for k, v in vars(given).items() if k != "source" and v != parser.get_default(k)}
        if options:
            raise UserError(f"`--{next(iter(options))}` is of text data; {given.source} holds transitions")
        for line in offline.report(offline.read(given.source)):
            print(line)
        return 0
    from rlkit.lm.inspection import inspect

    for line in inspect(
        given.source,
        tokenizer=given.tokenizer,
        mapping=dict(item.split("=", 1) for item in given.map) or None,
        max_length=given.max_length,
        boundary=given.boundary,
        chat_template=given.chat_template,
        examples=given.examples,
    ):
        print(line)
    return 0


def data_make(args: Sequence[str]) -> int:
    parser = Parser(prog="rlkit data make", description="Record episodes into a local Minari dataset.")
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="run folder, checkpoint or saved folder (its policy), random:ENV_ID or random:RUN (uniform actions), "
        "replay:RUN (the complete episodes in its replay buffer), minari:ID or a data file; several make a mixture",
    )
    parser.add_argument("--out", required=True, metavar="ID", help="such as hopper/medium-v0")
    parser.add_argument(
        "--episodes",
        nargs="+",
        type=_episodes,
        default=["all"],
        metavar="N",
        help="of each source, one number or one for each; `all` of a buffer or file [default: all]",
    )
    parser.add_argument("--seed", type=whole, default=0, metavar="S", help="of all that is random [default: 0]")
    parser.add_argument("--deterministic", action="store_true", help="the modes of policies instead of samples")
    parser.add_argument(
        "--band",
        nargs=2,
        type=float,
        default=[0.0, 100.0],
        metavar=("LOW", "HIGH"),
        help="keep the episodes between these percentiles of all returns",
    )
    parser.add_argument("--env", metavar="ENV_ID", help="of data files, which do not say it")
    parser.add_argument("--replace", action="store_true", help="if there is such a dataset, the new one replaces it")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    given = parse(parser, args)
    from rlkit.recording import described, record

    made = record(
        given.sources,
        given.out,
        [None if number == "all" else number for number in given.episodes],
        seed=given.seed,
        deterministic=given.deterministic,
        band=tuple(given.band),
        env=given.env,
        replace=given.replace,
        say=_say,
    )
    values = made.record()
    figures = described(values["episodes"], values["transitions"], values["mean"], values["std"])
    print(f"{made.id}: {figures}\nin {made.path}\ntrain on it: rlkit train TRAINER --data minari:{made.id}")
    if given.json:
        print(json.dumps(_no_nan(values)))
    return 0


def _episodes(text: str) -> int | str:
    return text if text == "all" else count(text)


DATA: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "inspect": (data_inspect, "SOURCE: counts, problems, lengths, examples; of transitions, returns and ranges"),
    "make": (data_make, "SOURCE [SOURCE ...] --episodes N --out ID: policies' episodes as a Minari dataset"),
}


def push(args: Sequence[str]) -> int:
    parser = Parser(prog="rlkit push", description="Upload a language model to the Hugging Face hub.")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("repo", metavar="REPO", help="user/name; made if it is not there")
    parser.add_argument("--public", action="store_true", help="a new repository is private otherwise")
    parser.add_argument("--merged", action="store_true", help="merge an adapter into its model")
    given = parse(parser, args)
    from rlkit.lm.publish import push as upload

    print(upload(given.run, given.repo, private=not given.public, merged=given.merged))
    return 0


def convert(args: Sequence[str]) -> int:
    parser = Parser(prog="rlkit convert", description="Turn an SAC that Stable-Baselines3 saved into rlkit's.")
    parser.add_argument("file", metavar="SB3_ZIP")
    parser.add_argument("--trust", action="store_true", help="the file comes from someone you trust")
    parser.add_argument("--env", metavar="ID", help="its environment, which the file does not name")
    parser.add_argument("--out", metavar="FOLDER", help="[default: the file's name without .zip]")
    given = parse(parser, args)
    if not given.trust:
        raise UserError(
            f"{given.file}: such files hold pickles. None of them is run, and weights are read by PyTorch's restricted "
            "reader; convert files from people you trust nevertheless, and say so by `--trust`"
        )
    from rlkit.convert import from_sb3

    out = Path(given.out or given.file.removesuffix(".zip"))
    if out.exists():
        raise UserError(f"{out} exists; choose another folder, `--out FOLDER`")
    trainer, notes = from_sb3(given.file, given.env)
    for note in notes:
        _say(note)
    print(trainer.save(out))
    return 0


def export(args: Sequence[str]) -> int:
    parser = Parser(prog="rlkit export", description="A policy as one file, or a language model as a model folder.")
    parser.add_argument("run", metavar="RUN", help="run folder, checkpoint or saved folder")
    parser.add_argument("--format", required=True, choices=["onnx", "torch", "hf"], help="hf: language models")
    parser.add_argument("--out", metavar="FILE", help="[default: RUN/policy.onnx, RUN/policy.pt2, RUN/hf]")
    parser.add_argument("--merged", action="store_true", help="hf: merge an adapter into its model")
    given = parse(parser, args)
    from rlkit.export import export as write

    print(write(given.run, given.format, given.out, merged=given.merged, say=_say))
    return 0


def doctor(args: Sequence[str]) -> int:
    parser = Parser(prog="rlkit doctor", description="Versions, devices, and what is installed.")
    parser.add_argument("--determinism", action="store_true", help="run a tiny job twice and compare hashes")
    given = parse(parser, args)
    from rlkit import doctor

    for line in doctor.report():
        print(line)
    if given.determinism:
        same, line = doctor.determinism()
        print(line)
        return 0 if same else 1
    return 0


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "list": (list_trainers, "trainers: name, status, what they train on, paper"),
    "train": (train, "train; without further arguments, a trainer's embedded task"),
    "resume": (resume, "finish an interrupted run, or go on to a larger total"),
    "eval": (evaluate, "evaluate the newest checkpoint of a run"),
    "plot": (plot, "learning curves of one or several runs"),
    "video": (video, "film deterministic evaluation episodes of a run"),
    "data": (data, "`data inspect FILE`: what is in it; `data make RUN --episodes N --out ID`: record a policy"),
    "convert": (convert, "turn an SAC that Stable-Baselines3 saved into rlkit's"),
    "export": (export, "a policy as ONNX or PyTorch program, a language model as model folder"),
    "push": (push, "upload a language model to the Hugging Face hub"),
    "bench": (bench, "run a benchmark suite of a checkout"),
    "doctor": (doctor, "versions, devices and extras"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    here = str(Path.cwd())
    if here not in sys.path:  # for `module:function` and `module:EnvId`; last, so that it shadows nothing
        sys.path.append(here)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where the locale lacks `±`, or a letter of a path
    try:
        if args and args[0] in COMMANDS:
            code = COMMANDS[args[0]][0](args[1:])
            sys.stdout.flush()  # a broken pipe shows here, not at exit
            return code
        if args and not args[0].startswith("-"):
            raise UserError(f"unknown command `{args[0]}`{did_you_mean(args[0], COMMANDS)}")
        parser = Parser(
            prog="rlkit",
            description="Trainers for reinforcement learning and preference optimisation that resume exactly.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="commands:\n" + "\n".join(f"  {name:<8} {text}" for name, (_, text) in COMMANDS.items()),
        )
        parser.add_argument("--version", action="version", version=f"rlkit {__version__}")
        parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of the commands below")
        parse(parser, args)
        parser.print_help()
        return 0 if not args else 2
    except RlkitError as error:
        _say_error(error)
        return error.exit_code
    except argparse.ArgumentTypeError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.exit_code
    except Stopped as stopped:
        processes.say(stopped.message)
        return int(stopped.code or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `rlkit list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes nowhere
        return 1
    except OSError as error:  # a full disk, a folder without permission
        _say_error(error)
        return 1


def _say_error(error: Exception) -> None:
    """Print an error; one that all processes have, from the main one alone."""
    if processes.is_main():
        print(f"error: {error}", file=sys.stderr)
    elif not getattr(error, "shared", False):
        print(f"process {os.environ['RANK']}: error: {error}", file=sys.stderr)
