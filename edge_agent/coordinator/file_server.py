"""The coordinator's files by HTTPS: a node, known by its certificate, gets those of its own open jobs and brings those of its own results.

What is brought goes block by block the way of the blocks that come over the broker: only what is awaited from this node, only up to
the size that its result has told, checked by its sha256, and kept over restarts.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from litestar import Litestar, Request, Response, get, head, put
from litestar.datastructures import State
from litestar.exceptions import ClientException, HTTPException, NotFoundException, PermissionDeniedException
from litestar.params import Parameter

from edge_agent.config import Https
from edge_agent.coordinator.listening import MOST_CONNECTIONS, Certificate, served, settings_of
from edge_agent.coordinator.ranges import ranged
from edge_agent.coordinator.service import NODE_NAME, Service
from edge_agent.errors import EdgeAgentError, FilesAway
from edge_agent.https import OFFSET
from edge_agent.topics import COORDINATOR
from edge_agent.transfer import SHA256, Place

PUT_S = 120.0
"""A request may take as long, however steadily it drips."""

Sha256 = Annotated[str, Parameter(pattern=f"^{SHA256.pattern}$")]


@contextmanager
def files_served(service: Service, https: Https | None) -> Iterator[None]:
    """Serve files in a thread of their own, where that is configured. Raises ConfigInvalid where it can never work."""
    if https is None:
        yield
        return
    certificate = Certificate(https.certificate_file, https.key_file, https.ca_file, "https")
    settings = settings_of(make_app(service, frozenset(https.denied)), limit_concurrency=MOST_CONNECTIONS)
    with served(settings, certificate.context, https.host, https.port, "https"):
        yield


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
    node = _named(request.scope["state"]["transport"].get_extra_info("peercert"))
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
async def give(state: State, sha256: Sha256, request: Request[Any, Any, Any]) -> Response[Any]:
    """A file, or the one range of it that is asked for."""
    return ranged(await _file(state.service, _node(state, request), sha256), sha256, request.headers)


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
    if (path := await service.file(sha256)) is None:
        raise NotFoundException
    return path


def _from(offset: int) -> Response[None]:
    return Response(None, status_code=204, headers={OFFSET: str(offset)})


def _explain(_: Request[Any, Any, Any], error: EdgeAgentError) -> Response[Any]:
    status = 503 if isinstance(error, FilesAway) else 409
    return Response({"error": {"code": error.code, "text": str(error)}}, status_code=status)
