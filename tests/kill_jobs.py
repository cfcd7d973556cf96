"""A process that imports everything once and then runs `rlkit` commands, each in a child that may be killed.

It reads requests from standard input and answers each on standard output, one JSON object a line. A request has
`command` (arguments of `rlkit`), `environment`, `output` (a file) and at most one of

- `at`: (file, function, event, number) - the child sends itself SIGKILL at this event of a function, counted from 0,
  where `event` is `call`, `return`, or `call NAME` or `return NAME` of a function written in C that it calls;
- `after`: seconds after which the child gets SIGKILL, unless it has ended.

The answer is `code`: the exit code, or -9.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any


def killer(file: str, function: str, event: str, number: int) -> Callable[[FrameType, str, Any], None]:
    """A profile function that ends this process without a word at the given event."""
    kind, _, name = event.partition(" ")
    wanted = f"c_{kind}" if name else kind
    left = [number]

    def profile(frame: FrameType, what: str, argument: Any) -> None:
        code = frame.f_code
        if what != wanted or code.co_qualname != function or not code.co_filename.endswith(file):
            return
        if name and getattr(argument, "__name__", "") != name:
            return
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    return profile


def child(command: Sequence[str], output: str, at: Sequence[Any] | None) -> int:
    handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from rlkit.cli import main

    if at:
        sys.setprofile(killer(*at))
    try:
        return main(command)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.environ.update(request["environment"])
            code = child(request["command"], request["output"], request.get("at"))
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            os._exit(code)
    end = time.monotonic() + request.get("after", 300.0)
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.005)


def serve() -> None:
    import peft  # noqa: F401 (what the children would each import)
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification  # noqa: F401

    from rlkit import registry

    torch.set_num_threads(1)
    transformers.AutoTokenizer  # noqa: B018 (imports it)
    for name in ("dpo", "sft", "reward_model"):
        registry.get(name)
    assert threading.active_count() == 1, "a process with threads must not be copied"
    for line in sys.stdin:
        print(json.dumps({"code": run(json.loads(line))}), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    serve()
