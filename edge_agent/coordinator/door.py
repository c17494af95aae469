"""Who comes to the HTTP API: by the socket or with a token, how often, and the streams of events that they hold open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import msgspec
from litestar import Request
from litestar.response.sse import ServerSentEventMessage

from edge_agent.coordinator.access import Identify, local
from edge_agent.coordinator.audience import Happening
from edge_agent.coordinator.limits import Limits
from edge_agent.coordinator.service import Service
from edge_agent.errors import TooManyRequests, Unauthorized

PING_S = 5.0
MOST_STREAMS = 64
"""Of events, of one token: a quarter of all connections."""
MOST_UNHEARD = 1024
"""Events that wait for one reader."""


@dataclass(frozen=True)
class Door:
    """How requests come in: who asks, and how often they may."""

    identify: Identify = local
    by_token: Limits | None = None
    """null: as often as they like."""
    by_address: Limits | None = None
    ears: WeakSet[Ear] = field(default_factory=WeakSet)
    """Streams of events that are open. Only the server's own thread looks."""


class Ear:
    """Hears for one connection, from the coordinator's thread, and keeps little of what has not gone out: who is slower is cut off."""

    def __init__(self, request: Request[Any, Any, Any]) -> None:
        """Raises TooManyRequests where a token has `MOST_STREAMS` of them."""
        self._loop, self.heard = asyncio.get_running_loop(), asyncio.Queue[Happening](MOST_UNHEARD)
        self._transport: asyncio.Transport = request.scope["state"]["transport"]
        self._door: Door = request.app.state.door
        self._authorization = request.headers.get("authorization")
        self.name = request.scope["state"]["caller"].name
        if self._door.by_token is not None and sum(ear.name == self.name for ear in self._door.ears) >= MOST_STREAMS:
            raise TooManyRequests(PING_S)
        self._door.ears.add(self)

    def may_hear(self) -> bool:
        """Whether the token is good that has opened it: it may have expired since, or was revoked."""
        try:
            self._door.identify(self._authorization)
        except Unauthorized:
            return False
        return True

    def __call__(self, happening: Happening) -> None:
        with suppress(RuntimeError):  # the server has ended
            self._loop.call_soon_threadsafe(self._put, happening)

    def _put(self, happening: Happening) -> None:
        if self.heard.full():
            self._transport.abort()
        else:
            self.heard.put_nowait(happening)


async def events_for(service: Service, job: str | None, ear: Ear, heard: str | None) -> AsyncIterator[ServerSentEventMessage]:
    """Yield what an ear hears, up to the end of its job, and a comment where it hears nothing."""
    try:
        if job is not None:
            await asyncio.to_thread(service.call, lambda: service.listen(job, ear, heard))
        else:
            start, lost = await asyncio.to_thread(service.call, lambda: service.listen_to_all(ear, heard))
            yield ServerSentEventMessage(event="start", id=start, data=msgspec.json.encode({"lost": lost}).decode())
        while ear.may_hear():
            try:
                happening = await asyncio.wait_for(ear.heard.get(), PING_S)
            except asyncio.TimeoutError:
                yield ServerSentEventMessage(data=None, comment="still here")
                continue
            if happening.kind == "missed" or not ear.may_hear():
                return
            yield ServerSentEventMessage(event=happening.kind, id=happening.id, data=_told(happening, job).decode())
            if job is not None and happening.ended:
                return
    finally:
        service.call_later(lambda: service.stop_listening(job, ear))


def _told(happening: Happening, job: str | None) -> bytes:
    """Return the data of an event. Jobs and nodes have their names in them; a progress has not, so the fleet's stream says whose it is."""
    if job is None and happening.kind == "progress":
        return msgspec.json.encode({"job": happening.subject, "progress": msgspec.Raw(happening.data)})
    return happening.data
