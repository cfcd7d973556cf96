"""SIGINT and SIGTERM in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from rlkit.signals import StopRequest, stop

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals that a process can handle")


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` after imports; a process that hangs fails the test."""
    head = "import os, signal, sys, threading, time\nfrom rlkit.signals import StopRequest, stop\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_first_signal_only_sets_the_flag(name: str) -> None:
    result = python(
        f"""
        with stop:
            print(stop.requested, stop.signal)
            os.kill(os.getpid(), signal.{name})
            print(stop.requested, stop.signal.name, flush=True)
        print("done")
        """
    )
    assert result.stdout.split("\n")[:3] == ["False None", f"True {name}", "done"]
    assert result.stderr == f"{name}: stopping after this step (once more: at once)\n"
    assert result.returncode == 0


@pytest.mark.parametrize(
    ("first", "second", "code"), [("SIGTERM", "SIGTERM", 143), ("SIGINT", "SIGINT", 130), ("SIGINT", "SIGTERM", 143)]
)
def test_the_second_signal_ends_the_process_at_once(first: str, second: str, code: int) -> None:
    """Without `finally` blocks and exit handlers, which may be what hangs."""
    result = python(
        f"""
        try:
            with stop:
                os.kill(os.getpid(), signal.{first})
                os.kill(os.getpid(), signal.{second})
                time.sleep(50)
        finally:
            print("finally", flush=True)
        """
    )
    assert result.returncode == code
    assert result.stdout == ""


def test_a_blocking_call_is_not_needed_to_notice() -> None:
    """A signal from outside arrives in the middle of Python's work."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from rlkit.signals import stop\n"
            "with stop:\n"
            "    print('ready', flush=True)\n"
            "    while not stop.requested: pass\n"
            "    print('stopped', flush=True)\n",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (out, process.returncode) == ("stopped\n", 0)
    assert "SIGTERM" in err


def test_handlers_come_back() -> None:
    """Those of before, be they Python's, ignored, default or a function; after the block a signal acts as ever."""
    result = python(
        """
        def mine(number, frame): print("mine", flush=True)
        signal.signal(signal.SIGTERM, mine)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with stop:
                assert signal.getsignal(signal.SIGTERM) is not mine
                raise KeyError
        except KeyError:
            pass
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with stop: pass
        os.kill(os.getpid(), signal.SIGTERM)
        print("not reached")
        """
    )
    assert result.stdout == "mine\n"
    assert result.returncode == -signal.SIGTERM


def test_nested_uses_share_the_outermost_request() -> None:
    """The command line listens from its start, `learn` again inside: a signal that came between is not forgotten."""
    result = python(
        """
        outer = signal.getsignal(signal.SIGTERM)
        with stop:
            handler = signal.getsignal(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            with stop:
                assert stop.requested
            assert stop.requested
            assert signal.getsignal(signal.SIGTERM) == handler
        assert signal.getsignal(signal.SIGTERM) is outer
        with stop:
            assert not stop.requested, "a later use begins anew"
            assert signal.getsignal(signal.SIGTERM) == handler
        print("ok")
        """
    )
    assert (result.stdout, result.returncode) == ("ok\n", 0), result.stderr


def test_a_signal_in_the_middle_of_a_print_is_no_error() -> None:
    """The handler writes past Python's buffers, which are not reentrant."""
    result = python(
        """
        class Loud:
            def __str__(self):
                os.kill(os.getpid(), signal.SIGTERM)
                return "printed"
        with stop:
            print(Loud(), file=sys.stderr, flush=True)
        os.close(2)
        with stop:
            os.kill(os.getpid(), signal.SIGTERM)
            print(stop.requested, flush=True)
        """
    )
    assert result.stderr == "SIGTERM: stopping after this step (once more: at once)\nprinted\n"
    assert result.stdout == "True\n"


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    request, seen = StopRequest(), []

    def work() -> None:
        with request:
            seen.append((request.requested, {number: signal.getsignal(number) for number in before}))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
    assert {number: signal.getsignal(number) for number in before} == before


def test_the_process_has_one_request(tmp_path: Path) -> None:
    assert isinstance(stop, StopRequest)
    assert not stop.requested
