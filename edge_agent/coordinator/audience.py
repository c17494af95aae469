"""Who looks at a job or at the whole fleet: their ears, nodes' leave to tell progress faster meanwhile, and what was told before."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgspec

from edge_agent.coordinator.views import JobView, NodeView
from edge_agent.messages import Artifact, JobProgress, Watch
from profiles.recorder import StageName

WATCH_TTL_S = 10.0
KEPT = 256
"""Of what has happened, for who comes back and says how far they had heard."""
GONE_S = 60.0
"""Who comes back later than that has to look anew."""
MOST_POINTS = 128
"""Of the progress of one job, for who begins to look when it runs already."""
MOST_TRACKS = 1000
"""Jobs of which that is kept; those that nothing was told of for longest go first."""


HappeningKind = Literal["job", "progress", "saliency", "node", "missed"]


@dataclass(frozen=True)
class Happening:
    """Something that has happened. Later ones of one start of the coordinator have higher numbers."""

    epoch: int
    number: int
    kind: HappeningKind
    subject: str
    """The job or node."""
    data: bytes
    """JSON of the job, its progress, its Saliency Map as an artifact, or the node; of what was `missed`, nothing."""
    ended: bool = False
    """Whether it is the end of a job."""

    @property
    def id(self) -> str:
        return f"{self.epoch}-{self.number}"


class ProgressPoint(msgspec.Struct, frozen=True, kw_only=True):
    """What a trainer and its device told at one moment; null: it said nothing of that."""

    time: float
    """Seconds since 1970, by the clock of the node."""
    stage: StageName | None
    done: int | None
    total: int | None
    loss: float | None
    tokens_per_s: float | None
    memory_bytes: int | None
    power_w: float | None
    temperature_c: float | None


class Track:
    """The progress of one job from its beginning on: where it has become much, every second point goes, and fewer are kept from then on."""

    def __init__(self) -> None:
        self.points: list[ProgressPoint] = []
        self._told, self._every, self._loose = 0, 1, False

    def add(self, point: ProgressPoint) -> None:
        """Add a point. The newest is always there; it is loose where it goes as soon as there is a newer one."""
        if self.points and point.time <= self.points[-1].time:
            return
        if self._loose:
            self.points.pop()
        self.points.append(point)
        self._loose = self._told % self._every != 0
        self._told += 1
        if len(self.points) > MOST_POINTS:
            self.points, self._every = self.points[::2], 2 * self._every


Listener = Callable[[Happening], None]


class Audience:
    """Listeners by job; those of None hear everything. `ask` sends a node the request to tell a job's progress faster."""

    def __init__(self, ask: Callable[[str, Watch], None], epoch: int) -> None:
        self._ask, self._epoch = ask, epoch
        self._listeners: dict[str | None, list[Listener]] = {}
        self._left_at = -GONE_S
        self._due: dict[str, float] = {}
        self._last: dict[str, Happening] = {}
        self._kept: deque[Happening] = deque(maxlen=KEPT)
        self._number = 0
        self._tracks: OrderedDict[str, Track] = OrderedDict()

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

    @property
    def alone(self) -> bool:
        """Whether nobody listens, nor has just gone and may come back."""
        return not self._listeners and time.monotonic() - self._left_at > GONE_S

    def leave(self, job: str | None, listener: Listener) -> None:
        self._left_at = time.monotonic()
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
        self._tracks[job] = track = self._tracks.pop(job, None) or Track()
        track.add(_point(progress))
        if len(self._tracks) > MOST_TRACKS:
            gone, _ = self._tracks.popitem(last=False)
            self._last.pop(gone, None)
        self._last[job] = self._tell(self._happening("progress", job, progress))

    def skip(self) -> None:
        """Something has happened that nobody hears: who comes back has to look anew."""
        self._number += 1
        self._kept.clear()

    def part(self) -> None:
        """Something may have happened anywhere that was not heard here: have all who listen come back, and look anew."""
        self.skip()
        for listeners in list(self._listeners.values()):
            for listener in list(listeners):
                listener(Happening(self._epoch, self._number, "missed", "", b""))

    def saliency(self, job: str, artifact: Artifact) -> None:
        """The Saliency Map of a job that runs has come."""
        self._tell(self._happening("saliency", job, artifact))

    def track(self, job: str) -> list[ProgressPoint]:
        """Return what was told of the progress of a job, thinned, the oldest first."""
        return [*self._tracks[job].points] if job in self._tracks else []

    def forget(self, job: str) -> None:
        self._tracks.pop(job, None)

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

    def _happening(self, kind: HappeningKind, subject: str, data: object, ended: bool = False) -> Happening:
        """Return something as it is now."""
        return Happening(self._epoch, self._number, kind, subject, msgspec.json.encode(data), ended)

    def _tell(self, now: Happening) -> Happening:
        self._number += 1
        happening = Happening(self._epoch, self._number, now.kind, now.subject, now.data, now.ended)
        self._kept.append(happening)
        for listener in (*self._listeners.get(happening.subject, ()), *self._listeners.get(None, ())):
            listener(happening)
        return happening


def _point(progress: JobProgress) -> ProgressPoint:
    event, resources = progress.event, progress.resources
    return ProgressPoint(
        time=event.time, stage=event.stage, done=event.done, total=event.total, loss=event.loss, tokens_per_s=event.tokens_per_s,
        memory_bytes=resources.trainer_bytes if event.memory_bytes is None else event.memory_bytes,
        power_w=resources.power_w.value, temperature_c=resources.temperature_c.value,
    )  # fmt: skip
