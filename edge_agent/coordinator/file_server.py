"""The coordinator's files by HTTPS: a node, known by its certificate, gets those of its own open jobs and brings those of its own results.

What is brought goes block by block the way of the blocks that come over the broker: only what is awaited from this node, only up to
the size that its result has told, checked by its sha256, and kept over restarts.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from litestar import Litestar, Request, Response, get, head, put
from litestar.datastructures import State
from litestar.exceptions import ClientException, HTTPException, NotFoundException, PermissionDeniedException
from litestar.params import Parameter
from litestar.response import Stream
from uvicorn.protocols.http.h11_impl import H11Protocol

from edge_agent.config import Https
from edge_agent.coordinator.service import NODE_NAME, Service
from edge_agent.enrolment import tell_expiry
from edge_agent.errors import ConfigInvalid, EdgeAgentError
from edge_agent.https import OFFSET
from edge_agent.mqtt import DAY_S
from edge_agent.tls import server_context
from edge_agent.topics import COORDINATOR
from edge_agent.transfer import SHA256, Place

log = logging.getLogger(__name__)

PUT_S = 120.0
"""A request may take as long, however steadily it drips."""
MOST_CONNECTIONS = 256
READ_BYTES = 256 * 1024

Sha256 = Annotated[str, Parameter(pattern=f"^{SHA256.pattern}$")]


@contextmanager
def files_served(service: Service, https: Https | None) -> Iterator[None]:
    """Serve files in a thread of their own, where that is configured. Raises ConfigInvalid where it can never work."""
    if https is None:
        yield
        return
    server, listening = _server(service, https), _listen(https)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="https")
    thread.start()
    log.info("https_listening host=%s port=%d", https.host, https.port)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def _listen(https: Https) -> socket.socket:
    try:
        return socket.create_server((https.host, https.port), family=socket.AF_INET6 if ":" in https.host else socket.AF_INET)
    except OSError as error:
        raise ConfigInvalid(Path("https"), f"it cannot listen on {https.host}, port {https.port}: {error.strerror}") from None


def _server(service: Service, https: Https) -> uvicorn.Server:
    settings = uvicorn.Config(
        make_app(service, frozenset(https.denied)), http=_Protocol, log_config=None, access_log=False, lifespan="off",
        timeout_graceful_shutdown=1, limit_concurrency=MOST_CONNECTIONS,
    )  # fmt: skip
    settings.load()
    settings.ssl = _Certificate(https).context
    return uvicorn.Server(settings)


class _Certificate:
    """That of the server. A new one is taken without a restart, and with a handshake it is told when it expires soon."""

    def __init__(self, https: Https) -> None:
        """Raises ConfigInvalid where a file is not what it should be."""
        self._https, self.context = https, server_context(https)
        self._looked_at, self._changed = time.monotonic(), self._stamp()
        self.context.sni_callback = self._handshake
        tell_expiry(https.certificate_file)

    def _handshake(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        now = time.monotonic()
        if now - self._looked_at >= DAY_S:
            self._looked_at = now
            tell_expiry(self._https.certificate_file)
        with suppress(OSError):
            if (stamp := self._stamp()) != self._changed:
                self._changed = stamp
                self._renew()
        connection.context = self.context

    def _renew(self) -> None:
        try:
            context = server_context(self._https)
        except ConfigInvalid as error:  # such as a key that is not yet there
            log.warning("certificate_not_taken why=%r", str(error))
            return
        self.context, context.sni_callback = context, self._handshake
        tell_expiry(self._https.certificate_file)

    def _stamp(self) -> tuple[int, ...]:
        return tuple(f.stat().st_mtime_ns for f in (self._https.certificate_file, self._https.key_file, self._https.ca_file))


class _Protocol(H11Protocol):
    """Tells the application which node is at the other end: uvicorn by itself tells nothing of a client's certificate."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "node": _named(transport.get_extra_info("peercert"))}


def _named(certificate: dict[str, Any] | None) -> str | None:
    """The node that a certificate, which OpenSSL has verified, is for."""
    names = [value for part in (certificate or {}).get("subject", ()) for key, value in part if key == "commonName"]
    return names[0] if len(names) == 1 and NODE_NAME.search(names[0]) and names[0] != COORDINATOR else None


def make_app(service: Service, denied: frozenset[str]) -> Litestar:
    """Return the application over a running service."""
    return Litestar(
        [look, give, take], state=State({"service": service, "denied": denied}), exception_handlers={EdgeAgentError: _explain},
        logging_config=None, openapi_config=None,
    )  # fmt: skip


def _node(state: State, request: Request[Any, Any, Any]) -> str:
    """Who asks. Raises PermissionDeniedException for whom there is nothing."""
    node: str | None = request.scope["state"].get("node")
    if node is None or node in state.denied:
        raise PermissionDeniedException
    return node


@head("/sha256/{sha256:str}")
async def look(state: State, sha256: Sha256, request: Request[Any, Any, Any]) -> Response[None]:
    """Where to go on with a file that is awaited, as `Upload-Offset`; else the length of one that is here."""
    service, node = state.service, _node(state, request)
    if (place := await _place(service, node, sha256)) is not None:
        return _from(place.offset)
    file = await _file(service, node, sha256)
    return Response(None, headers={"Content-Length": str(file.stat().st_size), "Accept-Ranges": "bytes"})


@get("/sha256/{sha256:str}")
async def give(state: State, sha256: Sha256, request: Request[Any, Any, Any]) -> Stream:
    """A file, or the one range of it that is asked for."""
    file = await _file(state.service, _node(state, request), sha256)
    size = file.stat().st_size
    start, end = 0, size
    if wanted := re.fullmatch(r"bytes=(\d{1,18})-(\d{1,18})?", request.headers.get("Range", "")):
        start, end = int(wanted[1]), min(size, int(wanted[2] or size) + 1)
        if start >= end:
            raise HTTPException(status_code=416, headers={"Content-Range": f"bytes */{size}"})
    headers = {"Content-Length": str(end - start), "Accept-Ranges": "bytes"}
    if wanted:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return Stream(_read(file, start, end), status_code=206 if wanted else 200, headers=headers, media_type="application/octet-stream")


@put("/sha256/{sha256:str}", status_code=204, request_max_body_size=None)
async def take(state: State, sha256: Sha256, request: Request[Any, Any, Any]) -> Response[None]:
    """Keep a part of a file that is awaited, and say where to go on: at its length, once it is here."""
    service, node = state.service, _node(state, request)
    place = await _place(service, node, sha256)
    if place is None:
        raise NotFoundException
    told = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", request.headers.get("Content-Range", ""))
    if told is None or not int(told[1]) <= int(told[2]) < int(told[3]) == place.size_bytes:
        raise ClientException(f"Content-Range does not name a part of {place.size_bytes} bytes")
    try:
        await asyncio.wait_for(_take(service, node, sha256, place, int(told[1]), int(told[2]) + 1, request), PUT_S)
    except asyncio.TimeoutError:
        raise HTTPException(status_code=408) from None
    if (rest := await _place(service, node, sha256)) is not None:
        return _from(rest.offset)
    if not service.files.has(sha256):
        raise NotFoundException
    return _from(place.size_bytes)


async def _take(service: Service, node: str, sha256: str, place: Place, start: int, end: int, request: Request[Any, Any, Any]) -> None:
    """Keep the whole blocks of a part."""
    number = -(-start // place.block_bytes)
    skip, left, come = number * place.block_bytes - start, end - start, bytearray()
    async for chunk in request.stream():
        left -= len(chunk)
        if left < 0:
            raise HTTPException(status_code=413)
        come += chunk
        cut = min(skip, len(come))
        skip -= cut
        del come[:cut]
        while come and len(come) >= (length := min(place.block_bytes, place.size_bytes - number * place.block_bytes)):
            block = bytes(come[:length])
            await asyncio.to_thread(service.call, partial(service.receive_block, node, sha256, number, block))
            del come[:length]
            number += 1


async def _place(service: Service, node: str, sha256: str) -> Place | None:
    return await asyncio.to_thread(service.call, lambda: service.awaited(node, sha256))


async def _file(service: Service, node: str, sha256: str) -> Path:
    if not await asyncio.to_thread(service.call, lambda: service.may_have(node, sha256)):
        raise NotFoundException
    return service.files.path(sha256)


def _from(offset: int) -> Response[None]:
    return Response(None, status_code=204, headers={OFFSET: str(offset)})


def _read(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < end and (piece := file.read(min(READ_BYTES, end - start))):
            start += len(piece)
            yield piece


def _explain(_: Request[Any, Any, Any], error: EdgeAgentError) -> Response[Any]:
    return Response({"error": {"code": error.code, "text": str(error)}}, status_code=409)
