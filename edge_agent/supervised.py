"""A trainer under a daemon, seen from the trainer: events as lines on standard output, orders as lines on standard input, its end as the
order to stop.

A daemon that dies closes the pipe too, so a trainer never outlives it by more than `STOP_S`: at the end of the pipe the run writes
a checkpoint at its next step and ends; if no step comes, a thread ends the process. The thread works while native code runs.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import TextIO

import msgspec

from edge_agent.report import Event

STOP_S = 8.0
"""From the end of the pipe to the end of the process, at the latest."""
REST, WORK = b"rest", b"work"
"""Orders: wait in place, with all that the run holds, and go on."""
STOPPED = 12
"""Exit code of errors.Stopped."""


class Supervision:
    """Watches the pipe from the moment it is made."""

    def __init__(self) -> None:
        self._stop, self._rest = threading.Event(), threading.Event()
        self._events: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)  # whatever else prints to standard output must not look like an event
        threading.Thread(target=self._watch, name="supervision", daemon=True).start()

    def stopping(self) -> bool:
        """Whether the daemon has asked for the end, or is gone."""
        return self._stop.is_set()

    def resting(self) -> bool:
        """Whether the daemon has asked to wait."""
        return self._rest.is_set()

    def tell(self, event: Event) -> None:
        """Write one event. A daemon that is gone does not disturb the run's own end."""
        try:
            self._events.write(msgspec.json.encode(event).decode() + "\n")
        except (BrokenPipeError, ValueError):
            self._stop.set()

    def _watch(self) -> None:
        while orders := os.read(0, 4096):
            for order in orders.split():
                if order == REST:
                    self._rest.set()
                elif order == WORK:
                    self._rest.clear()
        self._stop.set()
        threading.Event().wait(STOP_S)
        sys.stderr.write("no step came within the time to stop; the last checkpoint stays\n")
        os._exit(STOPPED)
