"""A trainer under its daemon: neither is left hanging by the other (how the daemon reads its end: test_runner.py)."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil

from edge_agent.report import Event
from edge_agent.supervised import STOPPED

ROOT = Path(__file__).parent.parent
DEADLINE_S = 60.0
GONE_S = 10.0
"""From the end of the pipe until the trainer is gone: what protocol and configuration promise."""

SUPERVISED = """
import os, subprocess, sys, time
from edge_agent.report import Event
from edge_agent.supervised import Supervision

def wait(happened):
    deadline = time.monotonic() + 60
    while not happened():
        if time.monotonic() > deadline:
            os._exit(99)
        time.sleep(0.01)

supervision = Supervision()
supervision.tell(Event(time=1.0, event="progress", done=1))
"""


def _script(code: str) -> list[str]:
    return [sys.executable, "-c", SUPERVISED + code]


def start(command: list[str], **more: Any) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=ROOT, **more)


def _next_event(process: subprocess.Popen[bytes]) -> Event:
    assert process.stdout is not None
    return msgspec.json.decode(process.stdout.readline(), type=Event)


def _until(happened: Callable[[], object], deadline_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + deadline_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether a process has ended; nobody may have collected its exit status yet."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


# the trainer's side


def test_end_of_standard_input_asks_to_stop() -> None:
    """While the pipe is open, also when something is written to it, the run goes on; at its end the flag is set."""
    code = """
time.sleep(0.2)
supervision.tell(Event(time=2.0, event="progress", done=int(supervision.stopping())))
wait(supervision.stopping)
sys.exit(5)
"""
    with start(_script(code)) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"anything\n")
        process.stdin.flush()
        assert _next_event(process).done == 1
        assert _next_event(process).done == 0
        process.stdin.close()
        assert process.wait(GONE_S) == 5
        assert process.stdout.read() == b""


def test_orders_to_wait_and_to_go_on() -> None:
    """Each holds until the other comes, also where two are read at once; the end of the pipe is heard meanwhile."""
    code = """
wait(supervision.resting)
supervision.tell(Event(time=2.0, event="paused"))
wait(lambda: not supervision.resting())
supervision.tell(Event(time=3.0, event="continued"))
wait(lambda: supervision.resting() and supervision.stopping())
sys.exit(5)
"""
    with start(_script(code)) as process:
        assert process.stdin is not None
        _next_event(process)
        for order, event in ((b"rest\n", "paused"), (b"work\n", "continued")):
            process.stdin.write(order)
            process.stdin.flush()
            assert _next_event(process).event == event
        process.stdin.write(b"work\nrest\n")
        process.stdin.close()
        assert process.wait(GONE_S) == 5


def test_native_code_that_never_steps_is_ended() -> None:
    """Nobody asks for the flag, because native code runs: the process is gone in time all the same, as one that was stopped."""
    with start(_script("import ctypes; supervision.tell(Event(time=2.0, event='progress')); ctypes.CDLL(None).sleep(60)")) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        _next_event(process)
        _next_event(process)
        process.stdin.close()
        try:
            assert process.wait(GONE_S) == STOPPED
            assert b"the last checkpoint stays" in process.stderr.read()
        finally:
            process.kill()


PARENT = """
import subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


def test_trainer_does_not_outlive_its_daemon() -> None:
    """A daemon that is killed closes the pipe by that, so its trainer is asked to stop too."""
    with start([sys.executable, "-c", PARENT, *_script("wait(supervision.stopping)")]) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert not gone(child)
        process.kill()
        _until(lambda: gone(child), GONE_S)


def test_other_output_is_no_event() -> None:
    """What libraries, native code and children print to standard output is in the log, and the events arrive whole and alone."""
    code = """
print('printed', flush=True)
os.write(1, b'written\\n')
subprocess.run(['echo', 'a child'], check=True)
for done in (2, 3):
    supervision.tell(Event(time=2.0, event="progress", done=done, text="line\\nbreak"))
print('last'); sys.stdout.flush()
"""
    with start(_script(code)) as process:
        out, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0
    events = [msgspec.json.decode(line, type=Event) for line in out.splitlines()]
    assert [e.done for e in events] == [1, 2, 3]
    assert errors.split(b"\n") == [b"printed", b"written", b"a child", b"last", b""]


def test_daemon_that_reads_no_events_any_more(tmp_path: Path) -> None:
    """With the pipe of events closed, telling raises nothing: it asks the run to stop, which then ends in its own way."""
    code = """
wait(lambda: os.path.exists(sys.argv[1]))
for _ in range(9):
    supervision.tell(Event(time=2.0, event="progress"))
print(supervision.stopping(), file=sys.stderr)
sys.exit(5)
"""
    with start([*_script(code), str(tmp_path / "closed")]) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        _next_event(process)
        process.stdout.close()
        (tmp_path / "closed").touch()
        assert process.wait(DEADLINE_S) == 5
        assert process.stderr.read() == b"True\n"
