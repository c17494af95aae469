"""Log lines of the daemons: an event word and key=value facts; JSON where nobody reads them on a terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable

import msgspec

LONGEST_MESSAGE = 2048
"""Characters of a line's message; it may hold what anybody has sent."""

WARNINGS_AT_ONCE = 100
"""Of one kind; more are told at one a second."""
KINDS = 256
"""Of warnings that are counted; the one that was seen least lately is forgotten."""


class Spared:
    """Leaves out warnings and errors of a kind, which is their event word, where they come faster than anybody reads and a disk holds.

    The next one that is told says how many were `left_out` before it.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._kinds: OrderedDict[str, tuple[float, float, int]] = OrderedDict()
        """Lines that may come at once, when that was so, and how many were left out since the last."""

    def __call__(self, record: logging.LogRecord) -> bool:
        """Return whether a record is told."""
        if record.levelno < logging.WARNING:
            return True
        kind, now = str(record.msg).split(" ", 1)[0][:60], self._now()
        room, at, left_out = self._kinds.pop(kind, (float(WARNINGS_AT_ONCE), now, 0))
        room = min(room + now - at, float(WARNINGS_AT_ONCE))
        told = room >= 1
        self._kinds[kind] = (room - 1, now, 0) if told else (room, now, left_out + 1)
        if len(self._kinds) > KINDS:
            self._kinds.popitem(last=False)
        if told and left_out:
            record.msg = f"{record.msg} left_out={left_out}"
        return told


def tame(record: logging.LogRecord) -> bool:
    """Cut a message to its length, and escape in it what could begin a line or steer a terminal. Keeps every record."""
    text = record.getMessage()
    cut = text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}... ({len(text):,} characters)"
    record.msg, record.args = cut if cut.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut), None
    return True


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, and the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname.lower(), "logger": record.name,
            "message": record.getMessage(),
        }  # fmt: skip
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def set_up() -> None:
    """Send the log to standard error."""
    handler = logging.StreamHandler()
    terminal = sys.stderr.isatty()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S") if terminal else JsonFormatter())
    handler.addFilter(Spared())
    handler.addFilter(tame)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
