"""One job in a child process, seen from the daemon: start, events, the request to stop, and how its end is to be read.

The trainer is the ordinary command `edge-agent train DIR --supervised`, started by exec. It holds two things of the daemon: a pipe on
its standard input, at whose end it stops (edge_agent/supervised.py), and the locks of the agent's trainers and of the GPU, which the
kernel frees when it is gone. So no second trainer can start beside one that has outlived its daemon, or on the GPU of another agent's.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import msgspec

from edge_agent.config import JUDGES_VARIABLE, RAN_VARIABLE, Endpoint, write_judges
from edge_agent.errors import WHOLE_TEXT
from edge_agent.files import write_file
from edge_agent.messages import Artifact, Outcome, Reason, StageDone
from edge_agent.report import Event
from edge_agent.rest import Rests
from edge_agent.supervised import REST, WORK

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerEvent:
    """A line from the trainer of a job."""

    job: str
    event: Event


@dataclass(frozen=True)
class TrainerEnded:
    """The trainer of a job is gone; `code` is negative for a signal."""

    job: str
    code: int


@dataclass(frozen=True)
class Ending:
    """How a trainer's end is to be read. `again` asks for another start from the checkpoint."""

    outcome: Outcome | None
    reason: Reason | None = None
    text: str | None = None
    again: bool = False


class Trainer:
    """A running child process. Its events and its end go to `events`."""

    def __init__(
        self, job: str, directory: Path, lock: IO[str], max_run_s: float, threads: int | None, events: SimpleQueue[Any],
        judges: Mapping[str, Endpoint] | None = None, settings: Mapping[str, str] | None = None, ran_s: float = 0.0, cooled_s: float = 0.0,
        gpu: FileIO | None = None,
    ) -> None:  # fmt: skip
        """Start it. `lock` is the locked file of this agent's trainers, `gpu` that of the GPU's; the child alone holds both from here on.

        `judges` are what its job may ask.

        `settings` are variables of its environment; earlier starts of the job have run for `ran_s` and waited to cool for `cooled_s`.
        """
        self.job, self.max_run_s, self.started = job, max_run_s, time.monotonic()
        self.last_event: Event | None = None
        self.saliency: Artifact | None = None
        """The Saliency Map that it has written last because somebody looks."""
        self.failed: Event | None = None
        self.finished: list[StageDone] = []
        self.heard = self.started
        self.stopping_since: float | None = None
        self.paused_since: float | None = None
        self.rests: Rests | None = None
        """Why it was asked to wait or to stop, where the node rests."""
        self.ended_for: Ending | None = None
        self._earlier_s, self._cooled_s = ran_s, cooled_s
        self._cooling_since: float | None = None
        self._events = events
        self._oom_kills = _oom_kills()
        command = [sys.executable, "-m", "edge_agent", "train", str(directory), "--supervised"]
        with open(directory / "trainer.log", "wb", opener=_private) as errors:
            self._process = subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env=_environment(threads, judges or {}, settings or {}) | {RAN_VARIABLE: str(ran_s)}, start_new_session=True,
                pass_fds=[held.fileno() for held in (lock, gpu) if held is not None],
            )  # fmt: skip
        lock.close()
        if gpu is not None:
            gpu.close()
        threading.Thread(target=self._read, name=f"trainer-{job}", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def record(self, path: Path) -> None:
        """Write down which process it is, for `end_orphan`. Raises DiskFull."""
        write_file(path, f"{self.pid} {start_ticks(self.pid) or 0}\n".encode(), private=True)

    def hear(self, event: Event) -> None:
        """Keep what an event says."""
        self.heard = time.monotonic()
        if event.event == "failed":
            self.failed = event
        elif event.event == "stage_finished" and event.stage:
            self.finished.append(StageDone(event.stage, event.seconds or 0.0, event.memory_bytes or 0))
        if event.event in ("stage_started", "progress"):
            self.last_event = event
        elif event.event == "paused":
            self.paused_since = self.paused_since or self.heard
            self._cool(event.code == "thermal")
        elif event.event == "continued" and self.paused_since is not None:
            self.started, self.paused_since = self.started + self.heard - self.paused_since, None
            self._cool(False)

    def _cool(self, cooling: bool) -> None:
        """Keep since when it has waited to cool."""
        if not cooling:
            self._cooled_s, self._cooling_since = self.cooled_s, None
        elif self._cooling_since is None:
            self._cooling_since = self.heard

    @property
    def ran_s(self) -> float:
        """How long all starts of the job have run, without what they waited."""
        return self._earlier_s + (self.paused_since or time.monotonic()) - self.started

    @property
    def cooled_s(self) -> float:
        """How long all starts of the job have waited for the device to cool."""
        return self._cooled_s + (0.0 if self._cooling_since is None else time.monotonic() - self._cooling_since)

    def rest(self, why: Rests | None) -> None:
        """Ask it to wait in place, with all that it holds; with None to go on."""
        self.rests = why
        if self._process.stdin is not None and self.stopping_since is None:
            with suppress(OSError):  # it has just ended
                os.write(self._process.stdin.fileno(), (WORK if why is None else REST) + b"\n")

    def stop(self, why: Ending | None = None) -> None:
        """Ask it to write a checkpoint and end; `kill` follows if it does not."""
        self.ended_for = self.ended_for or why
        if self.stopping_since is None:
            self.stopping_since = time.monotonic()
            if self._process.stdin is not None:
                self._process.stdin.close()

    def kill(self, why: Ending | None = None) -> None:
        """End it at once; the checkpoint on disk stays."""
        self.ended_for = self.ended_for or why
        self._process.kill()

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; False where it still runs."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _read(self) -> None:
        with self._process.stdout as lines:  # type: ignore[union-attr]
            for line in lines:
                with suppress(msgspec.MsgspecError, UnicodeDecodeError):  # a line that was cut off by a signal
                    self._events.put(TrainerEvent(self.job, msgspec.json.decode(line, type=Event)))
        code = self._process.wait()
        self._process.stdin.close()  # type: ignore[union-attr]
        self._events.put(TrainerEnded(self.job, code))

    def ending(self, code: int) -> Ending:
        """Read the exit status, and what the process has told; its last words may quote a dataset, and stay on the node."""
        if self.ended_for is not None:
            return self.ended_for
        if code == 0:
            return Ending("succeeded")
        if self.failed is not None and code > 0:
            reason = known_reason(self.failed.code)
            return Ending("timed_out" if reason == "timeout_run" else "failed", reason, self.failed.text)
        if self.stopping_since is not None:
            return Ending(None, again=True)
        if code == -signal.SIGKILL and _oom_kills() > self._oom_kills:
            return Ending(None, "oom_host", "the kernel ended the trainer for want of memory", again=True)
        how = f"by signal {_signal_name(-code)}" if code < 0 else f"with exit code {code}"
        return Ending(None, "crash_loop", f"the trainer ended {how}; {WHOLE_TEXT}", again=True)


def _private(path: str, flags: int) -> int:
    """Open a file for its owner alone, also one that was there."""
    opened = os.open(path, flags, 0o600)
    os.fchmod(opened, 0o600)
    return opened


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else str(number)


def known_reason(code: str | None) -> Reason:
    """Return the reason of an error code; `internal` for one that is not in the contract."""
    try:
        return msgspec.convert(code, Reason)  # type: ignore[no-any-return]
    except msgspec.ValidationError:
        return "internal"


def start_ticks(pid: int) -> int | None:
    """Return the start of a process in ticks since the machine's own, which no change of the clock moves; None where there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def end_orphan(record: Path) -> int | None:
    """Kill the trainer of an earlier daemon, known by its id and start ticks, and return its id; None where no such process is left."""
    try:
        pid, started = map(int, record.read_text().split())
    except (OSError, ValueError):
        return None
    if start_ticks(pid) != started:
        return None
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return pid


def _environment(threads: int | None, judges: Mapping[str, Endpoint], settings: Mapping[str, str]) -> dict[str, str]:
    limits = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", JUDGES_VARIABLE: write_judges(judges)}
    return {**os.environ, **fixed, **limits, **settings}


def _oom_kills() -> int:
    """Processes that the kernel has ended for want of memory since it started."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
