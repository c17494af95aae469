"""The loop of both daemons: one thread that decides everything; links, children and requests only put events on its queue."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from edge_agent.database import is_damage
from edge_agent.errors import DiskFull, StateDamaged

log = logging.getLogger(__name__)

END = None
"""The event that ends the loop."""
_NOTHING = object()


def serve(
    events: SimpleQueue[Any],
    handle: Callable[[object], None],
    tick: Callable[[float], None],
    drop: Callable[[object], None],
    tick_s: float,
) -> None:
    """Handle events until END; after each one, and `tick_s` seconds after the last, do what is due by `tick(now)`.

    Where the disk is full or fails, an event is handled again a second later: `handle` may be called twice with it. Where it
    fails for a defect of ours, `drop` gets it, so that one message cannot end the daemon or come back to it for ever. Raises StateDamaged
    where the database is broken: nothing that is done then would last.
    """
    while True:
        event: object = _NOTHING
        with suppress(Empty):
            event = events.get(timeout=tick_s)
        if event is END:
            return
        try:
            if event is not _NOTHING:
                handle(event)
                event = _NOTHING
            tick(time.monotonic())
        except (OSError, sqlite3.Error, DiskFull) as error:
            if isinstance(error, sqlite3.Error) and is_damage(error):
                raise StateDamaged(str(error)) from error
            log.error("storage_error error=%r", error)
            if event is not _NOTHING:
                events.put(event)
            time.sleep(1.0)
        except Exception:
            log.exception("event_failed event=%s", type(event).__name__)
            if event is not _NOTHING:
                drop(event)
