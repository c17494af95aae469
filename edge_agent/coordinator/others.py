"""What a coordinator tells others that share its work of what it has stored, for who looks there: which jobs and nodes, once a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from edge_agent.messages import MOST_TOLD, Changed

TELL_S = 1.0
"""Between two messages: what all coordinators hear grows with their number, not with that of nodes and jobs."""


class Others:
    """Those beside one coordinator. `send` publishes to all of them; what is not sent is lost, as all that is told live."""

    def __init__(self, send: Callable[[Changed], object]) -> None:
        self._send, self._due = send, 0.0
        self._changed: dict[tuple[Literal["job", "node"], str], None] = {}
        """Each once, in the order of the first change."""

    def add(self, kind: Literal["job", "node"], subject: str) -> None:
        """Something is stored which the others have not heard of themselves."""
        self._changed[kind, subject] = None

    def tick(self, now: float) -> None:
        """Tell what has changed, at once where nothing was told within the last second."""
        if not self._changed or now < self._due:
            return
        self._due = now + TELL_S
        changed, self._changed = [*self._changed], {}
        for first in range(0, len(changed), MOST_TOLD):
            told = changed[first : first + MOST_TOLD]
            self._send(Changed([i for kind, i in told if kind == "job"], [i for kind, i in told if kind == "node"]))
