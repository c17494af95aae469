"""What a node says: messages that may be lost, sent at once, and messages that may not, sent until they are acknowledged."""

from __future__ import annotations

import time
from dataclasses import dataclass

from edge_agent.messages import LIFE_S, encode
from edge_agent.mqtt import Link
from edge_agent.store import Store
from edge_agent.topics import up

IN_FLIGHT = 8
RETRY_S, LONGEST_RETRY_S = 5.0, 120.0


class Uplink:
    """The topics that a node writes, and the envelope around everything but blocks."""

    def __init__(self, link: Link, fleet: str, node: str, store: Store) -> None:
        self._link, self._fleet, self._node, self._store = link, fleet, node, store

    def topic(self, *parts: object) -> str:
        return up(self._fleet, self._node, *parts)

    def message(self, data: object, message_id: str | None = None) -> bytes:
        return encode(data, f"edge1/{self._fleet}/{self._node}", boot=self._store.boot, message_id=message_id)

    def send(self, data: object, *parts: object) -> bool:
        """Send a message that may be lost; False where it was not sent at all."""
        return self._link.publish(self.topic(*parts), self.message(data), life_s=LIFE_S.get(type(data)))

    def ask(self, data: object, *parts: object, message_id: str | None = None) -> bool:
        """Send a message that the broker hands on at least once, if the link holds."""
        return self._link.publish(self.topic(*parts), self.message(data, message_id), qos=1, life_s=LIFE_S.get(type(data)))

    def keep(self, data: object, *parts: object) -> bool:
        """Send a message that the broker keeps for whoever comes later."""
        return self._link.publish(self.topic(*parts), self.message(data), qos=1, retain=True)

    def send_block(self, sha256: str, number: int, block: bytes) -> bool:
        return self._link.publish(self.topic("file", sha256, "block", number), block)

    @property
    def payload_limit(self) -> int:
        return self._link.payload_limit


@dataclass(frozen=True)
class Try:
    """When a message was sent last, and how long its acknowledgement is awaited before it is sent again."""

    sent_at: float
    pause_s: float


class Outbox:
    """Sends the stored messages, a few at a time, each again with growing pauses until it is acknowledged."""

    def __init__(self, store: Store, link: Link) -> None:
        self._store, self._link = store, link
        self._tries: dict[str, Try] = {}

    def tick(self) -> None:
        """Send what is due: what was never sent first, so that messages that nobody ever acknowledges hold up no others.

        Nor does one that is too long for this broker: it is tried again as if it had been sent.
        """
        now = time.monotonic()
        room = IN_FLIGHT - sum(now - t.sent_at < RETRY_S for t in self._tries.values())
        if room <= 0:
            return
        waiting = self._store.waiting()
        due = [m for m in waiting if m not in self._tries]
        due += sorted((m for m in waiting if m in self._tries and self._due_at(m) <= now), key=self._due_at)
        for message in due[:room]:
            found, earlier = self._store.message(message), self._tries.get(message)
            if found is None:
                return
            if not self._link.publish(found.topic, found.payload, qos=1) and len(found.payload) <= self._link.payload_limit:
                return
            self._tries[message] = Try(now, min(2 * earlier.pause_s, LONGEST_RETRY_S) if earlier else RETRY_S)

    def _due_at(self, message: str) -> float:
        return self._tries[message].sent_at + self._tries[message].pause_s

    def acknowledged(self, message: str) -> None:
        """The coordinator has stored a message."""
        self._store.acknowledged(message)
        self._tries.pop(message, None)

    def send_again(self) -> None:
        """The link or the coordinator is new: nothing that was sent before counts."""
        self._tries.clear()
