"""How the coordinator listens on the network: a port, a certificate that may change while it serves, and a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from edge_agent.enrolment import tell_expiry
from edge_agent.errors import ConfigInvalid
from edge_agent.mqtt import DAY_S
from edge_agent.tls import server_context

log = logging.getLogger(__name__)

MOST_CONNECTIONS = 256
MOST_OPEN = 320
"""Connections of one server, those included that have not come to an end of their handshake. More would take the files that the process may
have open, with which it stores, and the numbers of files below 1024, without which paho cannot connect."""
HEAD_S = 30.0
"""From a connection to the end of the head of its first request."""


@contextmanager
def served(settings: uvicorn.Config, context: ssl.SSLContext | None, host: str, port: int, table: str) -> Iterator[None]:
    """Serve in a thread. `table` is that of the configuration. Raises ConfigInvalid where nothing can listen there."""
    settings.load()
    settings.ssl = context
    server = uvicorn.Server(settings)
    try:
        bound = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigInvalid(Path(table), f"it cannot listen on {host}, port {port}: {error.strerror}") from None
    listening = Listening(fileno=bound.detach())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name=table)
    thread.start()
    log.info("listening table=%s host=%s port=%d", table, host, port)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


class Server(uvicorn.Server):
    """Says when it answers."""

    def __init__(self, settings: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(settings)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


class Listening(socket.socket):
    """Takes up to `MOST_OPEN` connections, and closes what comes above that: whoever reaches a port may open some and say nothing."""

    def __init__(self, *, fileno: int) -> None:
        super().__init__(fileno=fileno)
        self._taken: WeakSet[socket.socket] = WeakSet()

    def accept(self) -> tuple[socket.socket, Any]:
        connection, address = super().accept()
        self._taken = WeakSet(taken for taken in self._taken if taken.fileno() >= 0)
        if len(self._taken) >= MOST_OPEN:
            connection.close()
            raise BlockingIOError
        self._taken.add(connection)
        return connection, address


class Protocol(H11Protocol):
    """Hands the application the connection, of which uvicorn by itself tells nothing, and ends one that asks for nothing."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}
        self.loop.call_later(HEAD_S, self._end_idle)

    def _end_idle(self) -> None:
        if self.cycle is None:
            self.transport.abort()


def settings_of(app: Any, **more: Any) -> uvicorn.Config:
    """Return what all servers of the coordinator have in common."""
    return uvicorn.Config(
        app, http=Protocol, loop="asyncio", log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1,
        server_header=False,
        proxy_headers=False,  # whoever is at the other end could say that he is another
        **more,
    )  # fmt: skip


class Certificate:
    """That of a server. A new one is taken without a restart, and with a handshake it is told when it expires soon."""

    def __init__(self, certificate_file: Path, key_file: Path, ca_file: Path | None, table: str) -> None:
        """Raises ConfigInvalid where a file is not what it should be."""
        self._files, self._table = (certificate_file, key_file, ca_file), table
        self.context = server_context(*self._files, table)
        self._looked_at, self._changed = time.monotonic(), self._stamp()
        self.context.sni_callback = self._handshake
        tell_expiry(certificate_file)

    def _handshake(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        now = time.monotonic()
        if now - self._looked_at >= DAY_S:
            self._looked_at = now
            tell_expiry(self._files[0])
        with suppress(OSError):
            if (stamp := self._stamp()) != self._changed:
                self._changed = stamp
                self._renew()
        connection.context = self.context

    def _renew(self) -> None:
        try:
            context = server_context(*self._files, self._table)
        except ConfigInvalid as error:  # such as a key that is not yet there
            log.warning("certificate_not_taken why=%r", str(error))
            return
        self.context, context.sni_callback = context, self._handshake
        tell_expiry(self._files[0])

    def _stamp(self) -> tuple[int, ...]:
        return tuple(f.stat().st_mtime_ns for f in self._files if f is not None)
