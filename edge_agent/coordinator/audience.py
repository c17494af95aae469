"""Who looks at a job or at the whole fleet: their ears, and the nodes' leave to tell progress faster while somebody looks at a job."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgspec

from edge_agent.coordinator.store import JobView, NodeView
from edge_agent.messages import JobProgress, Watch

WATCH_TTL_S = 10.0
KEPT = 256
"""Of what has happened, for who comes back and says how far they had heard."""


@dataclass(frozen=True)
class Happening:
    """Something that has happened. Later ones of one start of the coordinator have higher numbers."""

    epoch: int
    number: int
    kind: Literal["job", "progress", "node"]
    subject: str
    """The job or node."""
    data: bytes
    """JSON of the job, its progress, or the node."""
    ended: bool = False
    """Whether it is the end of a job."""

    @property
    def id(self) -> str:
        return f"{self.epoch}-{self.number}"


Listener = Callable[[Happening], None]


class Audience:
    """Listeners by job; those of None hear everything. `ask` sends a node the request to tell a job's progress faster."""

    def __init__(self, ask: Callable[[str, Watch], None], epoch: int) -> None:
        self._ask, self._epoch = ask, epoch
        self._listeners: dict[str | None, list[Listener]] = {}
        self._due: dict[str, float] = {}
        self._last: dict[str, Happening] = {}
        self._kept: deque[Happening] = deque(maxlen=KEPT)
        self._number = 0

    def join(self, job: JobView, listener: Listener, heard: str | None) -> None:
        """Have a listener hear of a job: what it has missed since `heard`, if that is kept, where the job stands now, and what follows."""
        for happening in self.missed(heard) or []:
            if happening.subject == job.id:
                listener(happening)
        listener(self._happening("job", job.id, job, job.phase == "ended"))
        if job.id in self._last:
            listener(self._last[job.id])
        self._listeners.setdefault(job.id, []).append(listener)
        self._due.setdefault(job.id, 0.0)

    def join_all(self, listener: Listener, heard: str | None) -> tuple[str, bool]:
        """Have a listener hear of everything; return from which id on that is, and whether something since `heard` is lost."""
        missed = self.missed(heard)
        for happening in missed or []:
            listener(happening)
        self._listeners.setdefault(None, []).append(listener)
        return f"{self._epoch}-{self._number}", heard is not None and missed is None

    @property
    def size(self) -> int:
        return sum(map(len, self._listeners.values()))

    def leave(self, job: str | None, listener: Listener) -> None:
        listeners = self._listeners.get(job, [])
        if listener in listeners:
            listeners.remove(listener)
        if not listeners:
            self._listeners.pop(job, None)
            if job is not None:
                self._due.pop(job, None)

    def missed(self, heard: str | None) -> list[Happening] | None:
        """Return what has happened since an id; None where that is not known any more, or never was."""
        epoch, _, number = (heard or "").partition("-")
        if not (epoch == str(self._epoch) and number.isascii() and number.isdecimal() and len(number) < 19):
            return None
        oldest = self._number - len(self._kept)
        return [h for h in self._kept if h.number > int(number)] if oldest <= int(number) <= self._number else None

    def progress(self, job: str, progress: JobProgress) -> None:
        self._last[job] = self._tell(self._happening("progress", job, progress))

    def changed(self, job: JobView) -> None:
        ended = job.phase == "ended"
        self._tell(self._happening("job", job.id, job, ended))
        if ended:
            self._last.pop(job.id, None)
            self._due.pop(job.id, None)

    def node(self, node: NodeView) -> None:
        self._tell(self._happening("node", node.id, node))

    def tick(self, now: float) -> None:
        for job, due in self._due.items():
            if now >= due:
                self._due[job] = now + WATCH_TTL_S / 2
                self._ask(job, Watch(WATCH_TTL_S))

    def _happening(self, kind: Literal["job", "progress", "node"], subject: str, data: object, ended: bool = False) -> Happening:
        """Return something as it is now."""
        return Happening(self._epoch, self._number, kind, subject, msgspec.json.encode(data), ended)

    def _tell(self, now: Happening) -> Happening:
        self._number += 1
        happening = Happening(self._epoch, self._number, now.kind, now.subject, now.data, now.ended)
        self._kept.append(happening)
        for listener in (*self._listeners.get(happening.subject, ()), *self._listeners.get(None, ())):
            listener(happening)
        return happening
