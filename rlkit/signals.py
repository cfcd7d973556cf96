"""SIGINT and SIGTERM as a request: finish what is atomic, write a checkpoint, stop.

The first signal only sets a flag that every long phase reads; a second one ends the process at once. A launcher of
several processes passes on what its processes may have received already (Ctrl-C reaches the whole group), so under one
a repetition within a few seconds counts as the same signal.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from rlkit.processes import launched

HANDLED = (signal.SIGINT, signal.SIGTERM)
ECHO = 3.0  # seconds


class StopRequest:
    """Context manager that listens for SIGINT and SIGTERM; nested uses share the outermost one's handlers.

    Outside the main thread Python allows no handlers; there it listens to nothing and `requested` stays False.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._depth = 0
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if launched() > 1 and time.monotonic() - self._since < ECHO:
                return
            os._exit(128 + number)
        self.signal, self._since = signal.Signals(number), time.monotonic()
        line = f"{self.signal.name}: stopping after this step (once more: at once)\n"
        with suppress(OSError):  # not `print`: the signal may have come in the middle of one
            os.write(2, line.encode())

    def __enter__(self) -> StopRequest:
        self._depth += 1
        if self._depth == 1:
            self.signal = None
            if threading.current_thread() is threading.main_thread():
                self._previous = {number: signal.signal(number, self._handle) for number in HANDLED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._previous.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python
            self._previous = {}


stop = StopRequest()
"""The process's one request; the command line enters it before anything slow, `Trainer.learn` again."""
