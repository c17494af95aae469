"""What waits for the coordinator: nodes are served in turn, one message each, so that none waits for all that another has said."""

from __future__ import annotations

import threading
from collections import deque
from queue import SimpleQueue
from typing import Any

from edge_agent.mqtt import Received
from edge_agent.topics import split

STANDING = (["up", "state"], ["up", "info"])
"""What a node says once, retained: everything else of QoS 1 it says again until the coordinator acknowledges it, or is asked again."""


class Turns(SimpleQueue[Any]):
    """A queue in which every node has its turn, and so have the coordinator's own events, all together. Any thread may put and get."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[Any]] = {}
        """By whose they are, in the order of their turns."""

    def put(self, event: object, block: bool = True, timeout: float | None = None) -> None:
        whose = sender_of(event.topic) if isinstance(event, Received) else ""
        with self._lock:
            self._waiting.setdefault(whose, deque()).append(event)
        super().put(None)  # counts what waits

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        super().get(block, timeout)
        with self._lock:
            whose = next(iter(self._waiting))
            own = self._waiting.pop(whose)
            event = own.popleft()
            if own:
                self._waiting[whose] = own
        return event


def sender_of(topic: str) -> str:
    """Return the node that writes a topic."""
    return split(topic)[0]


def is_standing(topic: str) -> bool:
    return split(topic)[1] in STANDING
