"""How both daemons open their SQLite file: what a call has written is on disk when it returns."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_agent.errors import DiskFull, StateUnusable


def open_database(path: Path, schema: str) -> sqlite3.Connection:
    """Open or make a database (WAL, synchronous=FULL, no implicit transactions). Raises StateUnusable."""
    try:
        # Opened by the thread that starts the daemon, used by the one that serves.
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.executescript(schema)
    except sqlite3.Error as error:
        if "is full" in str(error):
            raise DiskFull(str(path)) from None
        raise StateUnusable(path, f"{error}; restore or remove the file") from None
    db.row_factory = sqlite3.Row
    return db


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All that is written inside, or nothing of it."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")
