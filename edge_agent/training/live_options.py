"""New options that come while a run trains: a file in its directory, looked at between updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edge_agent.errors import JobSchema
from edge_agent.job_directory import JobDirectory
from edge_agent.new_options import NewOptions, check_change
from edge_agent.report import Change

LONGEST_TEXT = 1024


class LiveOptions:
    """The file of one run. `own` is the method of its job; `emit` tells events."""

    def __init__(self, directory: JobDirectory, own: object, emit: Callable[..., Any]) -> None:
        self._directory, self._own, self._emit = directory, own, emit
        self._seen: tuple[int, int, int] | None = None

    def newer(self, number: int) -> NewOptions | None:
        """Return options with a higher number; None where there are none. What the job cannot go on with is refused, once."""
        try:
            status = self._directory.options_file.stat()
        except FileNotFoundError:
            return None
        seen = (status.st_ino, status.st_mtime_ns, status.st_size)
        if seen == self._seen:
            return None
        self._seen = seen
        new: NewOptions | None = None
        try:
            new = self._directory.read_options()
            check_change(self._own, new.method)
        except JobSchema as error:
            known = None if new is None else new.number
            self._emit("options_refused", stage="train", number=known, text=str(error)[:LONGEST_TEXT])
            return None
        return new if new.number > number else None

    def taken(self, change: Change) -> None:
        """Tell that the run goes on with options, or has before it was interrupted."""
        self._emit("options_taken", stage="train", number=change.number, done=change.update)
