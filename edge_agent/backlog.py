"""What waits in memory on either side of the link: it is bounded, whoever sends faster than is handled or asks for more than goes out."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

MOST_COME_BYTES = 32 * 2**20
"""Of messages that have come and are still to be handled; above this, those that may be lost are dropped."""
MOST_OF_SENDER_BYTES = MOST_COME_BYTES // 4
"""Of these, of one sender where there are many: windows of a dozen files that it sends at once. Its flood leaves room for others."""
MOST_OF_SENDER = 16
"""Messages of QoS 1 of one sender that are to be handled: a quarter of what the broker may have on its way here. An agent has 8 at once on
their way, and what says how it is; it sends those that were dropped again, for nobody has acknowledged them to it."""
MOST_GOING_BYTES = 16 * 2**20
"""Of messages that are still to go out; above this, nothing more is published."""
FEW = 64
"""Messages that were given to go out. Where there are twice as many as had not gone the last time, and at least so many, those that have
are forgotten."""
COME_BYTES, GOING_BYTES = 16 * 1024, 1024
"""What a message counts besides its payload: one that has come takes time, up to two commits, and what waits should be done in seconds."""


class Message(Protocol):
    """What counts of a message that has come."""

    @property
    def topic(self) -> str: ...
    @property
    def payload(self) -> bytes: ...
    @property
    def qos(self) -> int: ...


M = TypeVar("M", bound=Message)


@dataclass
class Share(Generic[M]):
    """What one sender has on the way to be handled."""

    messages: int = 0
    """Of QoS 1."""
    bytes: int = 0
    newest: dict[str, M] = field(default_factory=dict)
    """By their topics, retained messages that wait until there is room: each replaces the one before, and none is lost for good."""


class Come(Generic[M]):
    """Messages between the link's thread, which takes them in, and whoever handles them."""

    def __init__(
        self,
        hand_on: Callable[[M], None],
        drop: Callable[[M], None],
        sender: Callable[[str], str] | None = None,
        is_standing: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """`sender` says by a topic who has sent a message, where no sender may crowd out the others.

        `is_standing` says of a topic whether only the newest message counts there, and is not sent again.
        """
        self._hand_on, self._drop, self._sender, self._is_standing = hand_on, drop, sender, is_standing
        self._lock = threading.Lock()
        self._bytes = 0
        self._shares: dict[str, Share[M]] = {}
        self._dropped: Counter[str] = Counter()
        self.dropped = 0
        """Since the start."""

    def take(self, message: M) -> None:
        """Hand a message on where there is room; else it is dropped, or waits in place of an older one of its topic, which is dropped."""
        who = self._sender(message.topic) if self._sender else ""
        with self._lock:
            share = self._shares.setdefault(who, Share())
            has_room, dropped = self._has_room(share, message), None
            if has_room:
                self._count(share, message)
            else:
                dropped = message
                if message.qos and self._is_standing(message.topic):
                    dropped, share.newest[message.topic] = share.newest.get(message.topic), message
                if dropped is not None:
                    self._dropped[who] += 1
                    self.dropped += 1
        if has_room:
            self._hand_on(message)
        elif dropped is not None:
            self._drop(dropped)

    def handled(self, message: M) -> None:
        """Make room for the next."""
        who, next_one = self._sender(message.topic) if self._sender else "", None
        with self._lock:
            size = len(message.payload) + COME_BYTES
            self._bytes = max(0, self._bytes - size)
            share = self._shares.get(who, Share())
            share.bytes, share.messages = max(0, share.bytes - size), max(0, share.messages - (message.qos > 0))
            if share.newest and self._has_room(share, first := next(iter(share.newest.values()))):
                next_one = share.newest.pop(first.topic)
                self._count(share, next_one)
            if not share.bytes:
                self._shares.pop(who, None)
        if next_one is not None:
            self._hand_on(next_one)

    def _has_room(self, share: Share[M], message: M) -> bool:
        """Of QoS 1 the broker sends no more than it may have on their way at once, of one sender with others fewer are taken."""
        size = len(message.payload) + COME_BYTES
        if message.qos == 0 and self._bytes + size > MOST_COME_BYTES:
            return False
        if self._sender is None or not share.bytes:
            return True
        return share.bytes + size <= MOST_OF_SENDER_BYTES and (message.qos == 0 or share.messages < MOST_OF_SENDER)

    def _count(self, share: Share[M], message: M) -> None:
        size = len(message.payload) + COME_BYTES
        self._bytes += size
        share.bytes, share.messages = share.bytes + size, share.messages + (message.qos > 0)

    def take_dropped(self) -> Counter[str]:
        """Return how many were dropped since it was asked last, by their senders."""
        with self._lock:
            dropped, self._dropped = self._dropped, Counter()
        return dropped


class Published(Protocol):
    """What paho knows of a message that it was given."""

    def is_published(self) -> bool: ...


class Going:
    """Messages of one connection between those who publish and the link's thread, which sends them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._given: list[tuple[Published, int]] = []
        self._bytes = 0
        self._look_at = FEW

    def has_room(self, payload: bytes) -> bool:
        size = len(payload) + GOING_BYTES
        with self._lock:
            if self._bytes + size > MOST_GOING_BYTES or len(self._given) >= self._look_at:
                self._given = [(message, taken) for message, taken in self._given if not _gone(message)]
                self._bytes = sum(taken for _, taken in self._given)
                self._look_at = max(FEW, 2 * len(self._given))
            return self._bytes + size <= MOST_GOING_BYTES

    def add(self, message: Published, payload: bytes) -> None:
        size = len(payload) + GOING_BYTES
        with self._lock:
            self._given.append((message, size))
            self._bytes += size


def _gone(message: Published) -> bool:
    try:
        return message.is_published()
    except (RuntimeError, ValueError):  # with its connection
        return True
