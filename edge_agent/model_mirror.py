"""Models of an HTTPS server, by ranges, so that a download goes on where it was: any server of static files will do.

The files are those of `SHA256SUMS`, as `sha256sum` writes it, where there is one beside them; else those of the usual names that are there.
The server is the one that the command names: no redirect is followed, and no answer names another place.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import urlsplit

import httpx
import msgspec
from msgspec.structs import replace

from edge_agent.config import AgentConfig, FileServer
from edge_agent.errors import ModelSource, human_bytes
from edge_agent.https import Misbehaved, open_client
from edge_agent.model_sources import INDEX, SINGLE, TEXTS, Advance, Listed, Listing, is_wanted
from edge_agent.models import Source
from edge_agent.proxy import with_way

SUMS = "SHA256SUMS"
PIECE_BYTES, PIECE_S = 16 * 2**20, 600.0
"""Of one request, and how long it may take from connecting to its last byte, however steadily they drip."""
MOST_LIST_BYTES = 16 * 2**20
"""Of `SHA256SUMS`, and of the index of the weights."""
PAUSES_S = (1.0, 4.0, 15.0)
"""Before a request is tried again."""
ABSENT = (403, 404)
"""What servers say of files that are not there; object stores whose lists are private say 403."""
_PLACE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})")
_SUM = re.compile(r"([0-9a-f]{64}) [ *](?:\./)?(\S+)")
_URL = re.compile(r"https://[^/?#@\s]+(/[^?#\s]*)?")
T = TypeVar("T")


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class _Away(Exception):
    """The server has no good answer now, and may have one later."""


class Mirror:
    """A model at a URL."""

    def __init__(self, url: str, revision: str | None, config: AgentConfig) -> None:
        """List it. `revision` is the sha256 that its `SHA256SUMS` must have. Raises ModelSource, ConfigInvalid."""
        if _URL.fullmatch(url) is None:
            raise ModelSource(url, "the address of a model is like https://HOST/PATH, without login, query and fragment")
        self._url = url
        self._alias, self._server = _server_of(url, config)
        self.listing = asyncio.run(self._with_client(lambda client: self._list(client, revision)))

    def fetch(self, file: Listed, directory: Path, advance: Advance) -> None:
        part = directory / f"{file.name}.part"
        with part.open("ab") as out:
            if out.tell() > file.size_bytes:
                out.truncate(0)
            advance(out.tell())
            asyncio.run(self._with_client(lambda client: self._fetch(client, file, out, advance)))
        part.replace(directory / file.name)

    async def _with_client(self, use: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
        async with open_client(self._alias, self._server) as client:
            return await use(client)

    async def _list(self, client: httpx.AsyncClient, revision: str | None) -> Listing:
        sums = await self._text(client, SUMS)
        found = None if sums is None else hashlib.sha256(sums).hexdigest()
        if revision not in (None, found):
            raise ModelSource(self._url, f"its {SUMS} has sha256 {found}, not {revision}" if found else f"it has no {SUMS}, so no revision")
        digests = await self._usual_names(client) if sums is None else _digests(sums)
        files = {}
        for name, sha256 in digests.items():
            size_bytes = await self._tried(lambda name=name: _size(client, name))  # type: ignore[misc]
            if size_bytes is not None:
                files[name] = Listed(name, size_bytes, sha256)
            elif sha256 is not None:
                raise ModelSource(self._url, f"{name} is in its {SUMS}, and not there")
        if sums is None and "config.json" not in files:
            raise ModelSource(self._url, f"it has neither {SUMS} nor config.json; look at the address, and at who may read there")
        return Listing(Source("https", self._url, found), files)

    async def _usual_names(self, client: httpx.AsyncClient) -> dict[str, None]:
        """Return the names that files may have where no list says it; those of weights from their index, if there is one."""
        index = await self._text(client, INDEX)
        if index is None:
            return dict.fromkeys([*TEXTS, SINGLE])
        try:
            weights = set(msgspec.json.decode(index, type=_Index).weight_map.values())
        except msgspec.MsgspecError as error:
            raise ModelSource(self._url, f"its {INDEX} is broken: {error}") from None
        return dict.fromkeys([*TEXTS, *sorted(filter(is_wanted, weights))])

    async def _text(self, client: httpx.AsyncClient, name: str) -> bytes | None:
        """Return a small file; None where there is none."""
        size_bytes = await self._tried(lambda: _size(client, name))
        if size_bytes is None:
            return None
        if size_bytes > MOST_LIST_BYTES:
            raise ModelSource(self._url, f"its {name} has {human_bytes(size_bytes)}, which is no list")
        come = bytearray()
        await self._tried(lambda: _piece(client, name, (len(come), size_bytes), size_bytes, come.extend))
        return bytes(come)

    async def _fetch(self, client: httpx.AsyncClient, file: Listed, out: IO[bytes], advance: Advance) -> None:
        def keep(chunk: bytes) -> None:
            out.write(chunk)
            advance(len(chunk))

        async def next_piece() -> None:
            place = out.tell(), min(out.tell() + PIECE_BYTES, file.size_bytes)
            await _piece(client, file.name, place, file.size_bytes, keep)

        while out.tell() < file.size_bytes:
            await self._tried(next_piece)

    async def _tried(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask, and again after a pause where the server is away or busy. Raises ModelSource with the last reason."""
        why = ""
        for pause_s in (*PAUSES_S, None):
            try:
                return await asyncio.wait_for(ask(), PIECE_S)
            except asyncio.TimeoutError:
                why = f"{PIECE_S:.0f} s were not enough for {PIECE_BYTES:,} bytes"
            except (httpx.HTTPError, _Away) as error:
                why = str(error)[:400] or type(error).__name__
            except (httpx.InvalidURL, Misbehaved) as error:
                raise ModelSource(self._url, str(error)[:400]) from None
            if pause_s is not None:
                await asyncio.sleep(pause_s)
        raise ModelSource(self._url, with_way(why, self._server.proxy))


async def _size(client: httpx.AsyncClient, name: str) -> int | None:
    """Return the bytes of a file by asking for the first of them; None where there is no such file."""
    async with client.stream("GET", name, headers={"Range": "bytes=0-0"}) as response:
        if response.status_code in ABSENT:
            return None
        return _place(response, name, (0, 1))[2]


async def _piece(client: httpx.AsyncClient, name: str, place: tuple[int, int], size_bytes: int, keep: Callable[[bytes], object]) -> None:
    """Hand on the bytes of a file from one offset up to another as they come. Raises Misbehaved for any others."""
    start, end = place
    if start == end:
        return
    async with client.stream("GET", name, headers={"Range": f"bytes={start}-{end - 1}"}) as response:
        if (told := _place(response, name, place)[2]) != size_bytes:
            raise Misbehaved(f"{name} had {size_bytes:,} bytes, and has {told:,} now")
        left = end - start
        async for chunk in response.aiter_raw():
            if len(chunk) > left:
                raise Misbehaved(f"of {name} it sends more than bytes {start}-{end - 1}")
            keep(chunk)
            left -= len(chunk)
    if left:
        raise _Away(f"of {name} it sends {left:,} bytes less than bytes {start}-{end - 1}")


def _place(response: httpx.Response, name: str, wanted: tuple[int, int]) -> tuple[int, int, int]:
    """Return start, end and size that an answer to a range states. Raises Misbehaved where they are not those that were asked for."""
    status, told = response.status_code, response.headers.get("Content-Range", "none")[:100]
    if status == 429 or status >= 500:
        raise _Away(f"asked for {name}, it answers {status}")
    match = _PLACE.fullmatch(told)
    place = (int(match[1]), int(match[2]) + 1, int(match[3])) if match else None
    if status != 206 or place is None or place[:2] != wanted:
        raise Misbehaved(f"asked for bytes {wanted[0]}-{wanted[1] - 1} of {name}, it answers {status}, Content-Range {told!r}")
    return place


def _digests(sums: bytes) -> dict[str, str]:
    """Return the sha256 of the files of a model in a list of `sha256sum`; other lines are of no use."""
    lines = (_SUM.fullmatch(line) for line in sums.decode("utf-8", "replace").splitlines())
    return {line[2]: line[1] for line in lines if line and is_wanted(line[2])}


def _server_of(url: str, config: AgentConfig) -> tuple[str, FileServer]:
    """Return how a server is spoken to: as the configuration says of file servers at the same host and port, else as it stands."""
    for alias, server in config.file_servers.items():
        if _origin(server.url) == _origin(url):
            return alias, replace(server, url=url)
    return "mirror", FileServer(url=url)


def _origin(url: str) -> tuple[str | None, int]:
    parts = urlsplit(url)
    return parts.hostname, parts.port or 443
