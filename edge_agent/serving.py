"""The loop of both daemons: one thread that decides everything; links, children and requests only put events on its queue."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from edge_agent.database import is_damage
from edge_agent.errors import DatabaseAway, DiskFull, StateDamaged, StateUnusable

log = logging.getLogger(__name__)

END = None
"""The event that ends the loop."""
_NOTHING = object()
PAUSE_S = 1.0
"""Between two attempts where nothing can be stored."""


def serve(
    events: SimpleQueue[Any],
    handle: Callable[[object], None],
    tick: Callable[[float], None],
    drop: Callable[[object], None],
    tick_s: float,
    turned: Callable[[], None],
) -> None:
    """Handle events until END; after each one, and `tick_s` seconds after the last, do what is due by `tick(now)`.

    `turned` is called before each, whatever goes wrong, at least every two seconds: it shows that the loop is not stuck.

    Where the disk is full or fails, an event is handled again a second later: `handle` may be called twice with it. Where the database
    is away, so is each, in the order in which they came. Where one fails for a defect of ours, `drop` gets it, so that one message
    cannot end the daemon or come back to it for ever. Raises StateDamaged where the database is broken, StateUnusable where another
    has it: nothing that is done then would last.
    """
    held: deque[object] = deque()
    while True:
        turned()
        event = _next(events, held, tick_s)
        if event is END:
            return
        try:
            if event is not _NOTHING:
                handle(event)
                event = _NOTHING
            tick(time.monotonic())
        except DatabaseAway:
            if _ended_while_away(event, events, held):
                return
        except (StateDamaged, StateUnusable):
            raise
        except (OSError, sqlite3.Error, DiskFull) as error:
            _try_again(event, events, error)
        except Exception:
            log.exception("event_failed event=%s", type(event).__name__)
            if event is not _NOTHING:
                drop(event)


def _next(events: SimpleQueue[Any], held: deque[object], tick_s: float) -> object:
    with suppress(Empty):
        return held.popleft() if held else events.get(timeout=tick_s)
    return _NOTHING


def _try_again(event: object, events: SimpleQueue[Any], error: OSError | sqlite3.Error | DiskFull) -> None:
    if isinstance(error, sqlite3.Error) and is_damage(error):
        raise StateDamaged(str(error)) from error
    log.error("storage_error error=%r", error)
    if event is not _NOTHING:
        events.put(event)
    time.sleep(PAUSE_S)


def _ended_while_away(event: object, events: SimpleQueue[Any], held: deque[object]) -> bool:
    """Keep an event, and take in, for a pause, what comes while the database is away; whether it was END."""
    if event is not _NOTHING:
        held.appendleft(event)
    until = time.monotonic() + PAUSE_S
    while (left_s := until - time.monotonic()) > 0:
        with suppress(Empty):
            held.append(events.get(timeout=left_s))
            if held[-1] is END:
                return True
    return False
