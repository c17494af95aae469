"""`edge-agent train --trace`: some updates as PyTorch's own profiler and allocator see them, in files that their viewers open."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from edge_agent.job_directory import JobDirectory
from edge_agent.training.reporter import OnProgress
from profiles.recorder import StageName

log = logging.getLogger(__name__)

UPDATES = 3
MOST_S = 10.0
"""A trace ends with the update in which it has become this long: its size grows with what runs in it, some MB a second."""
MOST_ALLOCATIONS = 100_000
"""Of the memory snapshot: the last ones before it was taken."""


class _Trace:
    """Records from its making to the end of some updates. Each is a span `train: update N`."""

    def __init__(self, directory: JobDirectory, progress: OnProgress) -> None:
        self._directory, self._progress = directory, progress
        self._on_gpu = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)
        self._profile, self._updates, self._started = profile(activities=activities), 0, time.monotonic()
        self._profile.start()
        self._open = True
        self._begin_update()

    def progress(self, done: int, total: int, tokens: int, loss: float | None, doing: StageName | None) -> None:
        """Stand in for the progress of the training: an update has ended where it does not say what it is doing."""
        if self._open and doing is None:
            self._span.__exit__(None, None, None)
            self._updates += 1
            if self._updates == UPDATES or time.monotonic() - self._started > MOST_S:
                self._write()
            else:
                self._begin_update()
        self._progress(done, total, tokens, loss, doing)

    def close(self) -> None:
        """Write what there is of a training that has ended sooner."""
        if self._open:
            self._span.__exit__(None, None, None)
            self._write()

    def _begin_update(self) -> None:
        self._span = record_function(f"train: update {self._updates + 1}")
        self._span.__enter__()

    def _write(self) -> None:
        """Write what was recorded; where that fails it is a line in the log, and the training goes on or ends as it would have."""
        self._open = False
        part = self._directory.trace.with_name(f".{self._directory.trace.name}.part")
        try:
            self._profile.stop()
            self._profile.export_chrome_trace(str(part))
            part.replace(self._directory.trace)
            if self._on_gpu:
                torch.cuda.memory._dump_snapshot(str(self._directory.memory_snapshot))
        except (MemoryError, OSError, RuntimeError) as error:  # PyTorch's own are of the last kind
            log.warning("trace_unwritten file=%s error=%s", self._directory.trace, error)
            part.unlink(missing_ok=True)
        finally:
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)


@contextmanager
def traced(directory: JobDirectory, progress: OnProgress) -> Iterator[OnProgress]:
    """Trace the first updates of a training that tells its progress to what is yielded, and write them into the job's directory."""
    trace = _Trace(directory, progress)
    try:
        yield trace.progress
    finally:
        trace.close()
