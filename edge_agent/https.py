"""Files by HTTPS: from a node's file servers, and to the one that is its coordinator. Whatever fails there goes over the broker instead.

A server is named by the node's configuration and a file by its sha256 alone: no address comes from the network, and no redirect is
followed. Each file has a thread and a connection for as long as it travels; all that they do is put events on the agent's queue.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from edge_agent.config import FileServer
from edge_agent.errors import EdgeAgentError
from edge_agent.messages import File, FileRequest
from edge_agent.proxy import with_way
from edge_agent.tls import client_context

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

PIECE_BYTES, PIECE_S = 2**20, 60.0
"""Of one request, and how long it may take from connecting to its last byte, however steadily they drip."""
MOST_AT_ONCE = 4
"""Files on their way; others go over the broker meanwhile."""
MOST_WAITING = 64
"""Events on the agent's queue above which nothing more is read."""
REST_S, LONGEST_REST_S = 60.0, 3600.0
"""After a failure a server is not asked for that file."""
CROSSED_S = 1.0
"""A request for blocks of a file that comes so soon after all of it was brought has crossed it on the way. Where the file is lost, the
coordinator asks again."""
OFFSET = "Upload-Offset"
"""Header of a coordinator's answer: the first byte of a file that it still awaits."""


@dataclass(frozen=True)
class Fetched:
    """A block that a file server has sent."""

    sha256: str
    number: int
    block: bytes


@dataclass(frozen=True)
class Carried:
    """The way of a file by HTTPS has ended; `why` not to its end."""

    alias: str
    sha256: str
    why: str | None
    request: FileRequest | None
    """Of the coordinator, for which a file was brought there; None for one that was fetched."""


class Misbehaved(Exception):
    """A server answered other than it should."""


class Courier:
    """Files on their way by HTTPS. The agent's one thread calls it, and hands it every `Carried` that comes on its queue."""

    def __init__(self, servers: Mapping[str, FileServer], events: SimpleQueue[Any]) -> None:
        self._servers, self._events = servers, events
        self._threads: dict[str, threading.Thread] = {}
        self._rests: dict[tuple[str, str], tuple[float, float]] = {}
        self._brought: dict[str, float] = {}

    def fetch(self, file: File, missing: FileRequest) -> bool:
        """Have blocks of a file come; False where no server is to be asked for it now."""

        async def carry(client: httpx.AsyncClient) -> None:
            for blocks in _runs(missing):
                while self._events.qsize() > MOST_WAITING:
                    await asyncio.sleep(0.02)
                await asyncio.wait_for(self._fetch_run(client, file, missing.block_bytes, blocks), PIECE_S)

        return self._begin(file.sha256, carry, None)

    def send(self, path: Path, sha256: str, request: FileRequest) -> bool:
        """Have a file brought to the coordinator, which has asked for it; False where that is no way now."""
        if time.monotonic() < self._brought.get(sha256, 0.0):
            return True

        async def carry(client: httpx.AsyncClient) -> None:
            size, sent = path.stat().st_size, -1
            offset = await asyncio.wait_for(_answer(client, "HEAD", sha256), PIECE_S)
            with path.open("rb") as file:
                while sent < offset < size:
                    sent = file.seek(offset)
                    piece = file.read(PIECE_BYTES)
                    place = {"Content-Range": f"bytes {offset}-{offset + len(piece) - 1}/{size}"}
                    offset = await asyncio.wait_for(_answer(client, "PUT", sha256, content=piece, headers=place), PIECE_S)
            if offset != size:
                raise Misbehaved(f"of {size:,} bytes it awaits those from {offset:,} on, after those from {sent:,} on")

        return self._begin(sha256, carry, request)

    def ended(self, carried: Carried) -> None:
        """Take in the end of a way. A server that failed, or that may have lost what was brought, is given a rest."""
        key, now = (carried.alias, carried.sha256), time.monotonic()
        self._threads.pop(carried.sha256, None)
        self._rests = {k: (due, pause) for k, (due, pause) in self._rests.items() if now < due + LONGEST_REST_S}
        _, pause = self._rests.pop(key, (0.0, REST_S / 2))
        if carried.why is not None or carried.request is not None:
            pause = min(2 * pause, LONGEST_REST_S)
            self._rests[key] = (now + pause, pause)
        self._brought = {sha256: until for sha256, until in self._brought.items() if now < until}
        if carried.why is None and carried.request is not None:
            self._brought[carried.sha256] = now + CROSSED_S
        if carried.why is None:
            log.info("file_carried alias=%s sha256=%s", *key)
        else:
            log.warning("file_server_failed alias=%s sha256=%s why=%r", *key, carried.why)

    def _begin(self, sha256: str, carry: Callable[[httpx.AsyncClient], Awaitable[None]], request: FileRequest | None) -> bool:
        if sha256 in self._threads:
            return True
        now = time.monotonic()
        alias = next((a for a in self._servers if now >= self._rests.get((a, sha256), (0.0, 0.0))[0]), None)
        if alias is None or len(self._threads) >= MOST_AT_ONCE:
            return False
        thread = threading.Thread(target=self._run, args=(alias, sha256, carry, request), name=f"https-{alias}", daemon=True)
        thread.start()
        self._threads[sha256] = thread
        return True

    def _run(self, alias: str, sha256: str, carry: Callable[[httpx.AsyncClient], Awaitable[None]], request: FileRequest | None) -> None:
        import httpx  # takes megabytes of an agent that has no file for it

        why: str | None = "a defect, with its traceback on standard error"
        server = self._servers[alias]
        try:
            asyncio.run(_with_client(alias, server, carry))
            why = None
        except asyncio.TimeoutError:
            why = with_way(f"{PIECE_S:.0f} s were not enough for {PIECE_BYTES:,} bytes", server.proxy)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, EdgeAgentError, Misbehaved) as error:
            why = with_way(str(error)[:400] or type(error).__name__, server.proxy)
        finally:
            self._events.put(Carried(alias, sha256, why, request))

    async def _fetch_run(self, client: httpx.AsyncClient, file: File, block_bytes: int, blocks: range) -> None:
        """Fetch blocks that follow on one another; those that are whole count, whatever comes after them."""
        start, end = blocks[0] * block_bytes, min((blocks[-1] + 1) * block_bytes, file.size_bytes)
        place = f"{start}-{end - 1}"
        async with client.stream("GET", f"sha256/{file.sha256}", headers={"Range": f"bytes={place}"}) as response:
            if response.status_code != 206 or response.headers.get("Content-Range") != f"bytes {place}/{file.size_bytes}":
                raise Misbehaved(f"asked for bytes {place} of {file.size_bytes}, it answers {_told(response)}")
            number, come = blocks[0], bytearray()
            async for chunk in response.aiter_raw():
                come += chunk
                while come and len(come) >= (length := min(block_bytes, end - number * block_bytes)):
                    if number not in blocks:
                        raise Misbehaved(f"it sends more than bytes {place}")
                    self._events.put(Fetched(file.sha256, number, bytes(come[:length])))
                    del come[:length]
                    number += 1
        if number in blocks:
            raise Misbehaved(f"it sends less than bytes {place}")


async def _with_client(alias: str, server: FileServer, carry: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async with open_client(alias, server) as client:
        await carry(client)


def open_client(alias: str, server: FileServer) -> httpx.AsyncClient:
    """Return a client of a file server that goes nowhere else. Raises ConfigInvalid for a file that cannot be read."""
    import httpx

    token, proxy = server.token, server.proxy
    return httpx.AsyncClient(
        base_url=server.url, verify=client_context(server.tls, f"file_servers.{alias}.tls"), timeout=server.timeout_s,
        follow_redirects=False, trust_env=False, proxy=httpx.Proxy(proxy.url, auth=proxy.login) if proxy else None,
        headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {}),
    )  # fmt: skip


async def _answer(client: httpx.AsyncClient, method: str, sha256: str, **request: Any) -> int:
    """Return the offset that a coordinator's answer names."""
    async with client.stream(method, f"sha256/{sha256}", **request) as response:
        offset = response.headers.get(OFFSET, "")
        if response.status_code != 204 or not (offset.isascii() and offset.isdecimal() and len(offset) < 20):
            raise Misbehaved(f"to {method} it answers {_told(response)}, and awaits nothing")
        async for _ in response.aiter_raw():  # the connection is used again only after the end of an answer
            pass
        return int(offset)


def _told(response: httpx.Response) -> str:
    return f"{response.status_code}, Content-Range {response.headers.get('Content-Range', 'none')[:100]!r}"


def _runs(missing: FileRequest) -> Iterator[range]:
    """Yield the blocks that are missing as runs without holes, of `PIECE_BYTES` at most."""
    run = range(0)
    for number in missing.blocks:
        if number != run.stop or not run or len(run) * missing.block_bytes >= PIECE_BYTES:
            if run:
                yield run
            run = range(number, number)
        run = range(run.start, number + 1)
    if run:
        yield run
