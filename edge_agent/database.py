"""How both daemons open their SQLite file: what a call has written is on disk when it returns."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from edge_agent.errors import DiskFull, StateUnusable

log = logging.getLogger(__name__)


def open_database(path: Path, versions: Sequence[str], *, replace_damaged: bool = False) -> sqlite3.Connection:
    """Open or make a database (WAL, synchronous=FULL, no implicit transactions) of the last of the versions.

    Each version is the SQL that leads to it from the one before; the file's `user_version` says which it has. With `replace_damaged` a
    file that SQLite finds damaged is set aside, and a new one begun. Raises StateUnusable, DiskFull.
    """
    try:
        db = _connect(path)
        try:
            _check(db)
        except sqlite3.DatabaseError as error:
            db.close()
            if not (replace_damaged and is_damage(error)):
                raise
            _set_aside(path, error)
            db = _connect(path)
            _check(db)
        _bring_up(db, path, versions)
    except sqlite3.Error as error:
        if "is full" in str(error):
            raise DiskFull(str(path)) from None
        raise StateUnusable(path, f"{error}; restore or remove the file") from None
    db.row_factory = sqlite3.Row
    return db


def is_damage(error: sqlite3.Error) -> bool:
    """Whether an error says that the file is broken; a full disk, a lock or a defect of ours are of other types."""
    return type(error) is sqlite3.DatabaseError


def _connect(path: Path) -> sqlite3.Connection:
    # Opened by the thread that starts the daemon, used by the one that serves.
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False)


def _check(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    with closing(db.execute("PRAGMA integrity_check(1)")) as found:
        if (said := found.fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(said.replace("\n", " "))


def _set_aside(path: Path, error: sqlite3.Error) -> None:
    """Rename a damaged file and its log, so that somebody can look at them."""
    kept = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    for suffix in ("-wal", "-shm", ""):
        if (file := path.with_name(path.name + suffix)).exists():
            file.rename(kept.with_name(kept.name + suffix))
    log.error("database_set_aside path=%s kept=%s error=%r", path, kept.name, str(error))


def _bring_up(db: sqlite3.Connection, path: Path, versions: Sequence[str]) -> None:
    found = db.execute("PRAGMA user_version").fetchone()[0]
    if found == 0 and db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
        raise StateUnusable(
            path, "it has tables and no version: it is of another program, or of this one before it had versions; keep it elsewhere"
        )
    if found > len(versions):
        raise StateUnusable(path, f"its format {found} is of a later version of edge-agent, this one knows {len(versions)}; update it")
    steps = (f"BEGIN IMMEDIATE;\n{script}\nPRAGMA user_version = {n};\nCOMMIT;" for n, script in enumerate(versions[found:], found + 1))
    try:
        for step in steps:
            db.executescript(step)
    except sqlite3.Error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


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
