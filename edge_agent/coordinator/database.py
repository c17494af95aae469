"""The coordinator's database by SQLAlchemy: an SQLite file, or PostgreSQL, which may go away and come back."""

from __future__ import annotations

import logging
import secrets
import socket
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, TextClause, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool

from edge_agent import config
from edge_agent.coordinator.schema import ALL_NAMES, FIRST_OF_POSTGRESQL, LATER, NAMES, NUMBERED, TABLES, VERSIONS, postgresql
from edge_agent.database import open_database
from edge_agent.errors import ConfigInvalid, DatabaseAway, DatabaseUnusable, PackageMissing, StateDamaged

if TYPE_CHECKING:
    import psycopg

log = logging.getLogger(__name__)

START_S = 30.0
"""That a server is awaited when the coordinator starts; then it ends, for its supervisor to start it again."""
SAY_S = 60.0
"""Between two lines of the log that say that it is still away."""
LOCKED_S = 3.0
"""That a session which has just died may hold its lock."""
CONNECT_S = 5
STATEMENT_S = 30
LEAD_S = 0.5
"""Between two attempts of one of several coordinators to take the lead."""
BATCH = 500
"""Rows that go from a file to a server at once."""

SETTINGS = f"""
SELECT set_config('statement_timeout', '{STATEMENT_S}s', false), set_config('tcp_keepalives_idle', '15', false),
    set_config('tcp_keepalives_interval', '5', false), set_config('tcp_keepalives_count', '3', false),
    CASE current_setting('synchronous_commit') WHEN 'off' THEN set_config('synchronous_commit', 'on', false) END
"""
"""What is committed is on disk, and a session whose coordinator has lost its power or network ends within half a minute."""
LOCK = "hashtext('edge-agent coordinator'), hashtext(coalesce(current_schema(), ''))"
TAKE_LOCK = f"SELECT pg_try_advisory_lock({LOCK})"
"""Held as long as the session lives: nobody else writes to these tables meanwhile,"""
TAKE_SHARED_LOCK = f"SELECT pg_try_advisory_lock_shared({LOCK})"
"""or only others that share the work"""
TAKE_NAME = "SELECT pg_try_advisory_lock(hashtext('edge-agent coordinator'), hashtext(coalesce(current_schema(), '') || %s))"
"""under other names."""
FREE_LOCK = f"SELECT pg_advisory_unlock({LOCK})"
LEAD = "hashtext('edge-agent lead'), hashtext(coalesce(current_schema(), ''))"
TAKE_LEAD, LEAVE_LEAD = f"SELECT pg_try_advisory_lock({LEAD}) AS taken", f"SELECT pg_advisory_unlock({LEAD})"
"""What only one of several coordinators is to do, that one does whose session has this. It writes in the same session: one that has lost it
writes nothing."""
TAKE_CLAIM = "SELECT pg_try_advisory_lock(hashtextextended(coalesce(current_schema(), '') || :subject, 1)) AS taken"
LEAVE_CLAIM = "SELECT pg_advisory_unlock(hashtextextended(coalesce(current_schema(), '') || :subject, 1))"
ONE_BY_ONE = "SELECT pg_advisory_xact_lock(hashtextextended(coalesce(current_schema(), '') || :subject, 0))"
"""Transactions of one subject follow on one another, so that what one has read is still so when it writes."""
TABLES_LOCK = "SELECT pg_advisory_xact_lock(hashtext('edge-agent tables'), hashtext(coalesce(current_schema(), '')))"
END_OWN = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s AND pid != pg_backend_pid()"""
HOLDER = """
SELECT application_name, backend_start FROM pg_locks JOIN pg_stat_activity USING (pid)
WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
AND classid = (SELECT hashtext('edge-agent coordinator')::bigint & 4294967295)::oid
AND objid = (SELECT hashtext(current_schema())::bigint & 4294967295)::oid
"""
TABLES_THERE = "SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p', 'v', 'm')"
GET_FORMAT = "SELECT value FROM meta WHERE name = 'format'"
SET_FORMAT = "INSERT INTO meta VALUES ('format', :format) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
SET_NEXT = "SELECT setval(pg_get_serial_sequence('{table}', 'number'), max(number)) FROM {table} HAVING count(*) > 0"

AWAY = ("08", "53", "57", "58", "25006", "40001", "40P01")
"""SQLSTATEs, or their classes, of what passes: no connection, no room, a server that ends or starts, its disk, a standby, a deadlock."""
DAMAGE = ("XX001", "XX002")
UNREACHABLE = ("OperationalError", "ConnectionTimeout")
"""What psycopg raises where there is no answer that has an SQLSTATE."""


class Database:
    """Runs statements, each alone or several in one transaction. One thread uses it; `away` may be read by any.

    Raises what sqlite3 raises of a file; of a server DatabaseAway, StateDamaged, DatabaseUnusable.
    """

    def __init__(self, engine: Engine, where: str, sessions: Sessions | None = None) -> None:
        """`sessions`: those with a server."""
        self._engine, self._where, self._sessions = engine, where, sessions
        self.shared = sessions is not None and sessions.instance is not None
        """Whether other coordinators write here too."""
        self._leading: int | None = None
        """The session that has the lead."""
        self._lead_at = 0.0
        # An SQLite connection of ours is in autocommit by itself.
        self._alone = engine if engine.dialect.name == "sqlite" else engine.execution_options(isolation_level="AUTOCOMMIT")
        self._transaction: Connection | None = None
        self.away: DatabaseAway | None = None
        self._away_since = self._said = 0.0

    def execute(self, sql: str, **values: object) -> list[dict[str, Any]]:
        """Run a statement, with its `:name`s in place, and return its rows; outside of a transaction it is on disk then."""
        with self._explained():
            if self._transaction is not None:
                return _run(self._transaction, sql, values)
            with self._alone.connect() as connection:
                return _run(connection, sql, values)

    def execute_many(self, sql: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Run a statement for each of some rows, within a transaction."""
        if self._transaction is None:
            raise RuntimeError("many rows are written in one transaction")
        self._transaction.execute(_statement(sql), [_storable(row) for row in rows])

    @contextmanager
    def transaction(self, subject: str | None = None) -> Iterator[None]:
        """All that is written inside, or nothing of it; it is on disk at the end.

        What others have stored in transactions of the same subject is seen inside, and no other is under way meanwhile.
        """
        with self._explained(), self._engine.connect() as connection, connection.begin():
            if self._engine.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            self._transaction = connection
            try:
                if self.shared and subject is not None:
                    _run(connection, ONE_BY_ONE, {"subject": subject})
                yield
            finally:
                self._transaction = None

    def leads(self, wanted: bool) -> bool:
        """Whether what only one of several coordinators is to do is for this one, which is asked whether it could."""
        if not self.shared or self._sessions is None:
            return True
        if self._leading != self._sessions.count:
            self._leading = None
        if wanted and self._leading is None and (now := time.monotonic()) >= self._lead_at:
            self._lead_at = now + LEAD_S
            taken = self.execute(TAKE_LEAD)[0]["taken"]  # it may be the first statement of a new session
            self._leading = self._sessions.count if taken else None
        elif not wanted and self._leading is not None:
            self.execute(LEAVE_LEAD)
            self._leading = None
        return self._leading is not None

    def claim(self, subject: str) -> bool:
        """Whether no other coordinator has a subject; none takes it from this one until `leave`, or the end of the session."""
        return not self.shared or bool(self.execute(TAKE_CLAIM, subject=subject)[0]["taken"])

    def leave(self, subject: str) -> None:
        if self.shared:
            self.execute(LEAVE_CLAIM, subject=subject)

    def look(self) -> None:
        """See whether a server that was away is back. Raises DatabaseAway where it is not."""
        if self.away is not None:
            self.execute("SELECT 1")

    def close(self) -> None:
        self._engine.dispose()

    def brought_up(self, where: str, before: Path) -> bool:
        """Bring a server's tables to the last version; False where it is away."""
        try:
            with self._explained():
                _bring_up(self._engine, where, before, shared=self.shared)
        except DatabaseAway:
            return False
        except DBAPIError as error:
            raise DatabaseUnusable(where, f"{' '.join(str(error.orig).split())}; see docs/fleet.md") from error
        return True

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say what errors mean; note when a server goes and comes."""
        try:
            yield
        except DBAPIError as error:
            raise self._meaning(error) from error
        except ConfigInvalid as error:  # its password cannot be read
            raise self._gone(str(error)) from None
        if self.away is not None:
            log.info("database_back where=%s away_s=%.1f", self._where, time.monotonic() - self._away_since)
            self.away = None

    def _meaning(self, error: DBAPIError) -> Exception:
        cause = error.orig
        if isinstance(cause, sqlite3.Error):
            return cause
        state = getattr(cause, "sqlstate", None) or ""
        said = " ".join(str(cause).split())
        if state in DAMAGE:
            return StateDamaged(said)
        if error.connection_invalidated or state.startswith(AWAY) or (not state and type(cause).__name__ in UNREACHABLE):
            return self._gone(said)
        return error

    def _gone(self, said: str) -> DatabaseAway:
        now = time.monotonic()
        if self.away is None:
            self._away_since, self._said = now, now - SAY_S
        self.away = DatabaseAway(self._where, said)
        if now - self._said >= SAY_S:
            self._said = now
            log.error("database_away error=%s", self.away)
        return self.away


def open_file(path: Path) -> Database:
    """Open or make an SQLite file. Raises StateUnusable, DiskFull."""

    def connect() -> sqlite3.Connection:
        db = open_database(path, VERSIONS)
        db.row_factory = None
        return db

    database = Database(create_engine("sqlite://", creator=connect, poolclass=QueuePool, pool_size=1, max_overflow=0), str(path))
    database.execute("SELECT 1")
    return database


def open_server(server: config.Database, before: Path, instance: str | None = None) -> Database:
    """Open the database of a server, and make its tables where it has none, with what is in the file `before` if that exists.

    `instance`: the name of this coordinator among others that work there too; None where there is to be none.
    Raises DatabaseUnusable where another coordinator works in it or it is of another program, DatabaseAway where it does not answer.
    """
    if find_spec("psycopg") is None:
        raise PackageMissing("psycopg", "postgresql")
    _ = server.password  # ConfigInvalid now, not every second
    sessions = Sessions(server, instance)
    engine = create_engine("postgresql+psycopg://", creator=sessions.connect, pool_size=1, max_overflow=0, use_native_hstore=False)
    database, until = Database(engine, server.where, sessions), time.monotonic() + START_S
    try:
        while not database.brought_up(server.where, before):
            if time.monotonic() > until and database.away is not None:
                raise database.away
            time.sleep(1.0)
    except BaseException:
        database.close()
        raise
    return database


class Sessions:
    """Opens the sessions of one coordinator with its server, one after the other."""

    def __init__(self, server: config.Database, instance: str | None) -> None:
        """`instance`: as of `open_server`."""
        self._server, self.instance = server, instance
        self._name = f"edge-agent {secrets.token_hex(4)} on {socket.gethostname()}"[:63]
        self.count = 0

    def connect(self) -> psycopg.Connection:
        """Open a session that has the lock."""
        import psycopg

        # Nothing is prepared on the server: a pooler in between would give the next statement to another session.
        session = psycopg.connect(
            self._server.address, application_name=self._name, autocommit=True, prepare_threshold=None, connect_timeout=CONNECT_S,
            keepalives_idle=15, keepalives_interval=5, keepalives_count=3, tcp_user_timeout=30_000, password=self._server.password,
            client_encoding="UTF8",
        )  # fmt: skip
        try:
            session.execute(SETTINGS)
            self._take_lock(session)
            session.autocommit = False
        except BaseException:
            session.close()
            raise
        self.count += 1
        return session

    def _take_lock(self, session: psycopg.Connection) -> None:
        until = time.monotonic() + LOCKED_S
        while True:
            session.execute(END_OWN, (self._name,))  # a session of ours whose connection was cut lives on until the server notices
            locked = session.execute(TAKE_LOCK if self.instance is None else TAKE_SHARED_LOCK).fetchone() == (True,)
            if locked and (self.instance is None or session.execute(TAKE_NAME, (self.instance,)).fetchone() == (True,)):
                return
            if time.monotonic() > until:
                break
            time.sleep(0.1)
        if locked:
            raise DatabaseUnusable(
                self._server.where, f"another coordinator with the `instance` {self.instance!r} works in it; give each a name of its own"
            )
        holder = session.execute(HOLDER).fetchone()
        who = f"{holder[0]!r}, since {holder[1]:%Y-%m-%d %H:%M}" if holder else "it has just ended"
        raise DatabaseUnusable(
            self._server.where,
            f"another coordinator works in it ({who}); stop that one, or give this one a database or schema of its own, or have both say "
            "`shared = true`",
        )


def _bring_up(engine: Engine, where: str, before: Path, *, shared: bool) -> None:
    """Bring the tables to the last version, in one transaction."""
    last = len(VERSIONS)
    with engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        connection.exec_driver_sql(TABLES_LOCK)
        if (encoding := connection.exec_driver_sql("SHOW server_encoding").scalar_one()) != "UTF8":
            raise DatabaseUnusable(
                where, f"its encoding is {encoding}, which cannot hold every text; make one with `createdb --encoding UTF8`"
            )
        tables = {row[0] for row in connection.exec_driver_sql(TABLES_THERE)}
        if tables and not tables.issuperset(NAMES):
            raise DatabaseUnusable(where, "it has tables of another program; give the coordinator a database or schema of its own")
        found = int(connection.exec_driver_sql(GET_FORMAT).scalar_one()) if tables else 0
        if found > last:
            raise DatabaseUnusable(where, f"its format {found} is of a later version of edge-agent, this one knows {last}; update it")
        if shared and tables and found < last:
            _be_alone(connection, where)
        if not tables:
            _script(connection, TABLES)
        for script in LATER[max(found - FIRST_OF_POSTGRESQL, 0) :]:
            _script(connection, script)
        copied = _copy(connection, before) if not tables and before.exists() else None
        connection.execute(text(SET_FORMAT), {"format": last})
    if copied is not None:
        kept = before.with_name(f"{before.name}.taken-over")
        before.rename(kept)
        log.info("database_taken_over path=%s kept=%s rows=%d", before, kept.name, copied)
    elif before.exists():
        log.warning("database_file_unused path=%s", before)


def _be_alone(connection: Connection, where: str) -> None:
    """Raise DatabaseUnusable where others work with the tables, which are about to change."""
    if not connection.exec_driver_sql(TAKE_LOCK).scalar_one():
        raise DatabaseUnusable(where, "other coordinators work with its tables of an earlier version; stop all, then start this one first")
    connection.exec_driver_sql(FREE_LOCK)


def _script(connection: Connection, script: str) -> None:
    connection.exec_driver_sql(postgresql(script), execution_options={"no_parameters": True})  # several statements at once


def _copy(connection: Connection, before: Path) -> int:
    """Copy all rows of a file; return how many."""
    copied = 0
    with closing(open_database(before, VERSIONS)) as file:
        for table in ALL_NAMES:
            rows = file.execute(f"SELECT * FROM {table}")  # noqa: S608
            names = [column[0] for column in rows.description]
            insert = text(f"INSERT INTO {table} ({', '.join(names)}) VALUES (:{', :'.join(names)})")  # noqa: S608
            while batch := rows.fetchmany(BATCH):
                connection.execute(insert, [_storable(dict(row)) for row in batch])
                copied += len(batch)
            if table in NUMBERED:
                connection.exec_driver_sql(SET_NEXT.format(table=table))
    return copied


def _run(connection: Connection, sql: str, values: Mapping[str, object]) -> list[dict[str, Any]]:
    found = connection.execute(_statement(sql), _storable(values))
    if not found.returns_rows:
        return []
    names = tuple(found.keys())
    return [dict(zip(names, row, strict=True)) for row in found.all()]


@cache
def _statement(sql: str) -> TextClause:
    return text(sql)


def _storable(values: Mapping[str, object]) -> dict[str, object]:
    """PostgreSQL has no text with a character of number 0, which nodes and requests may send; the sign for it takes its place in both."""
    return {name: value.replace("\0", "\u2400") if isinstance(value, str) else value for name, value in values.items()}
