"""Log lines of the daemons: an event word and key=value facts; JSON where nobody reads them on a terminal."""

from __future__ import annotations

import logging
import sys

import msgspec

LONGEST_MESSAGE = 2048
"""Characters of a line's message; it may hold what anybody has sent."""


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
    handler.addFilter(tame)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells of every request
