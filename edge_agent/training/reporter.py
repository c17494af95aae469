"""Tells the outside what a run does: events, stage measurements, and the run's time limit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from edge_agent.errors import OutOfMemory, Stopped, TimedOut
from edge_agent.report import Event, EventKind
from profiles.device import DeviceProfile
from profiles.energy import Meter
from profiles.memory import CudaMemory, HostMemory, Memory, lacks_memory
from profiles.recorder import UNMETERED, Recorder, StageName, StageRow
from quantization.plan import Plan

PROGRESS_INTERVAL_S = 0.5
LOOK_S, TELL_S = 0.5, 60.0
"""While a run waits: seconds between looks, and between the events that say that it waits."""
Listener = Callable[[Event], None]
OnProgress = Callable[[int, int, int, float | None, StageName | None], None]
"""`Reporter.progress` as the training calls it: (done, total, tokens, loss, doing)."""
Stopping = Callable[[], bool]
"""Asked at every step whether the run should stop."""


class Crowded(Exception):
    """Others need the memory of this run, which goes on later."""


class Reporter:
    """One run's events. `progress` is called often and passes on at most two events a second."""

    def __init__(
        self, device: DeviceProfile, listen: Listener, stopping: Stopping, max_run_s: float = math.inf, budget_bytes: int | None = None,
        meter: Meter = UNMETERED, crowded: Callable[[], bool] = lambda: False, resting: Callable[[], bool] = lambda: False,
        ran_s: float = 0.0,
    ) -> None:  # fmt: skip
        """`crowded` says whether others need the memory, `resting` whether to wait; earlier starts have run for `ran_s`."""
        on_gpu = device.torch_device == "cuda"
        memory: Memory = CudaMemory(device.unseen_bytes, device.kind == "unified") if on_gpu else HostMemory()
        synchronize = torch.cuda.synchronize if on_gpu else lambda: None
        self.recorder = Recorder(memory, synchronize, self._on_stage, meter)
        self.started = time.monotonic()
        self.plan: Plan | None = None
        self._listen, self._stopping, self._max_run_s, self._budget_bytes = listen, stopping, max_run_s, budget_bytes
        self._crowded, self._resting, self._waited_s, self._shown = crowded, resting, -ran_s, 0.0
        self.look: Callable[[StageName], None] = lambda _: None
        """Called with every stage at its beginning, and with its progress."""

    def stage(self, name: StageName) -> AbstractContextManager[StageRow]:
        """Measure a stage against the plan, if there is one yet."""
        return self.recorder.stage(name, self.plan.planned_bytes(name) if self.plan else None)

    def emit(self, kind: EventKind, **fields: Any) -> None:
        """Tell one event, of the fields of `Event`."""
        self._listen(Event(time=time.time(), event=kind, **fields))

    def progress(self, done: int, total: int, tokens: int, loss: float | None = None, doing: StageName | None = None) -> None:
        """Count tokens into the running stage and pass progress on.

        Raises TimedOut past `max_run_s`, Stopped on request, Crowded where others need the memory.

        `doing` names the work where it is not the stage's own: scores are renewed inside the train stage.
        """
        row = self.recorder.rows[-1]
        row.tokens += tokens
        self.check_stop()
        if self._resting() and (tokens or row.stage != "judge"):  # without any there it waits for answers, which would be lost
            self._rest()
        self.check_time()
        if self._crowded():
            raise Crowded
        now = time.monotonic()
        if now - self._shown < PROGRESS_INTERVAL_S and done < total:
            return
        self._shown = now
        self.look(row.stage)
        rate = row.tokens / max(now - self.stage_started, 1e-9)
        memory = self.recorder.memory.current_bytes()
        self.emit(
            "progress",
            stage=doing or row.stage,
            done=done,
            total=total,
            loss=loss,
            tokens_per_s=rate,
            memory_bytes=memory,
            budget_bytes=self._budget_bytes,
        )

    def check_stop(self) -> None:
        """Raise Stopped on request."""
        if self._stopping():
            raise Stopped

    def check_time(self) -> None:
        """Raise TimedOut past `max_run_s`, waiting left out."""
        if time.monotonic() - self.started - self._waited_s > self._max_run_s:
            raise TimedOut(self._max_run_s)

    def check(self) -> None:
        """Raise Stopped on request, TimedOut past `max_run_s`."""
        self.check_stop()
        self.check_time()

    def waited(self, seconds: float) -> None:
        """Leave out of the run's time what it waited."""
        self._waited_s += seconds

    def _rest(self) -> None:
        """Wait in place, and leave the time out of the stage. Raises Stopped, and Crowded where others need the memory meanwhile."""
        began, told = time.monotonic(), -math.inf
        try:
            while self._resting():
                if time.monotonic() - told > TELL_S:
                    told = time.monotonic()
                    self.emit("paused", stage=self.recorder.current_stage, code="thermal")
                self.check_stop()
                if self._crowded():
                    raise Crowded
                time.sleep(LOOK_S)
        finally:
            seconds = time.monotonic() - began
            self.waited(seconds)
            self.recorder.leave_out(seconds)
            self.stage_started += seconds
        self.emit("continued", seconds=seconds)

    def _on_stage(self, row: StageRow, finished: bool) -> None:
        self.stage_started = time.monotonic()
        if finished:
            self.emit("stage_finished", stage=row.stage, seconds=row.seconds, memory_bytes=row.peak_bytes)
        else:
            self.emit("stage_started", stage=row.stage)
            self.look(row.stage)


def out_of_memory(stage: str, error: BaseException) -> OutOfMemory | None:
    """Return what a lack of memory is reported as; None for another error."""
    if isinstance(error, OutOfMemory):
        return error
    if lacks_memory(error):
        own = isinstance(error, MemoryError | OSError | RuntimeError)  # of others the text may quote a dataset
        return OutOfMemory(stage, str(error).splitlines()[0][:200] if own and str(error) else type(error).__name__)
    return None


@contextmanager
def memory_explained(stage: Callable[[], str]) -> Iterator[None]:
    """Raise OutOfMemory, which says what to do, for a lack of memory in the stage that then runs."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:  # PyTorch's own are of the last kind
        if lack := out_of_memory(stage(), error):
            raise lack from error
        raise
