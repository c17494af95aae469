"""What waits in memory on either side of the link: it is bounded, whoever sends faster than is handled or asks for more than goes out."""

from __future__ import annotations

import threading
from typing import Protocol

MOST_COME_BYTES = 32 * 2**20
"""Of messages that have come and are still to be handled; above this, those that may be lost are dropped."""
MOST_GOING_BYTES = 16 * 2**20
"""Of messages that are still to go out; above this, nothing more is published."""
COME_BYTES, GOING_BYTES = 16 * 1024, 1024
"""What a message counts besides its payload: one that has come takes time, up to two commits, and what waits should be done in seconds."""


class Come:
    """Messages between the link's thread, which takes them in, and whoever handles them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = self._dropped = 0

    def take(self, payload: bytes, qos: int) -> bool:
        """Count a message; False where it is to be dropped. The broker sends no more of QoS 1 than it may have on their way at once."""
        size = len(payload) + COME_BYTES
        with self._lock:
            if qos == 0 and self._bytes + size > MOST_COME_BYTES:
                self._dropped += 1
                return False
            self._bytes += size
            return True

    def handled(self, payload: bytes) -> None:
        with self._lock:
            self._bytes = max(0, self._bytes - len(payload) - COME_BYTES)

    def take_dropped(self) -> int:
        """Return how many were dropped since it was asked last."""
        with self._lock:
            dropped, self._dropped = self._dropped, 0
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

    def has_room(self, payload: bytes) -> bool:
        size = len(payload) + GOING_BYTES
        with self._lock:
            if self._bytes + size > MOST_GOING_BYTES:
                self._given = [(message, taken) for message, taken in self._given if not _gone(message)]
                self._bytes = sum(taken for _, taken in self._given)
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
