"""A PostgreSQL server of the tests' own, on a Unix socket: Debian's, made by initdb, with passwords, ended with the tests."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg
from lacking import lack

from edge_agent.config import Database

USER, PASSWORD = "edge-agent", "secret of the state"
ADMINISTRATOR, ITS_PASSWORD = "postgres", "secret of the server"
DEADLINE_S = 60
SETTINGS = {
    "listen_addresses": "''", "fsync": "off", "max_connections": "20", "shared_buffers": "16MB", "log_min_messages": "fatal",
}  # fmt: skip
"""No network; what the tests strike is the server, not the machine below it."""


def programs() -> Path | None:
    """Return where the newest PostgreSQL of Debian is, or that on PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda file: int(file.parts[-3]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


class Postgres:
    """A cluster. Each test has a schema of its own."""

    def __init__(self, bin_directory: Path) -> None:
        self._bin = bin_directory
        # Sockets have short paths; those of pytest are long.
        self.directory = Path(tempfile.mkdtemp(prefix="ea-pg-"))
        self.password_file = self.directory / "password"
        self.password_file.touch(mode=0o600)
        self.password_file.write_text(f"{PASSWORD}\n")
        # PostgreSQL refuses to run as root.
        self._user = None if os.geteuid() else next(name for name in ("postgres", "nobody") if name in {u.pw_name for u in pwd.getpwall()})
        administrators = self.directory / "administrator"
        administrators.touch(mode=0o600)
        administrators.write_text(f"{ITS_PASSWORD}\n")
        for path in (self.directory, administrators):
            shutil.chown(path, self._user or os.geteuid())
        self._names = count()
        options = ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync"]
        self._has_icu = bin_directory.parent.name >= "15"
        if self._has_icu:  # sorted as people do, which is not how SQLite does
            options += ["--locale-provider=icu", "--icu-locale=en"]
        self._run("initdb", f"--pgdata={self.data}", f"--username={ADMINISTRATOR}", f"--pwfile={administrators}", *options)
        self.start()
        self.ask(f"CREATE ROLE \"{USER}\" LOGIN PASSWORD '{PASSWORD}'")  # an ordinary one

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def start(self) -> None:
        settings = " ".join(f"-c {name}={value}" for name, value in SETTINGS.items())
        options = f"-k {self.directory} {settings}"
        self._run("pg_ctl", "start", "--wait", f"--pgdata={self.data}", f"--log={self.directory}/server.log", f"--options={options}")

    def stop(self, mode: str = "fast") -> None:
        """Stop it in order, or `immediate`ly, as a crash does."""
        self._run("pg_ctl", "stop", "--wait", f"--pgdata={self.data}", f"--mode={mode}")

    def close(self) -> None:
        self.stop("immediate")
        shutil.rmtree(self.directory)

    def schema(self) -> Database:
        """Return an empty place for a coordinator's state."""
        name = f"s{next(self._names)}"
        self.ask(f'CREATE SCHEMA {name} AUTHORIZATION "{USER}"')
        return self.database(name)

    def of_ascii(self) -> Database:
        """Return an empty database of the encoding that a server has where nobody has chosen a locale."""
        provider = "LOCALE_PROVIDER libc" if self._has_icu else ""
        self.ask(f"CREATE DATABASE narrow OWNER \"{USER}\" TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C' {provider}")
        return Database(url=f"postgresql+psycopg://{USER}@/narrow?host={self.directory}", password_file=self.password_file)

    def database(self, schema: str, **more: str) -> Database:
        query = "&".join(f"{k}={v}" for k, v in {"host": str(self.directory), "options": f"-csearch_path%3D{schema}", **more}.items())
        return Database(url=f"postgresql+psycopg://{USER}@/postgres?{query}", password_file=self.password_file)

    def ask(self, sql: str, schema: str = "public") -> list[tuple[object, ...]]:
        """Run a statement beside the coordinator, as somebody who may do anything."""
        place = {"host": str(self.directory), "user": ADMINISTRATOR, "password": ITS_PASSWORD, "dbname": "postgres"}
        with psycopg.connect(**place, options=f"-csearch_path={schema}", autocommit=True) as session:  # type: ignore[arg-type]
            found = session.execute(sql.encode())
            return found.fetchall() if found.description else []

    def _run(self, program: str, *arguments: str) -> None:
        out = self.directory / "commands.log"
        with out.open("ab") as log:
            done = subprocess.run(
                [self._bin / program, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", user=self._user,
                timeout=DEADLINE_S, check=False,
            )  # fmt: skip
        assert done.returncode == 0, out.read_text()[-2000:]


@contextmanager
def running() -> Iterator[Postgres]:
    """A cluster that runs; skips the test where PostgreSQL is not installed."""
    found = programs()
    if found is None:
        lack("POSTGRESQL ABSENT: there is no initdb, so nothing was tested against PostgreSQL; .ci/run installs it")
    cluster = Postgres(found)
    try:
        yield cluster
    finally:
        cluster.close()
