"""Files between the coordinator and nodes: datasets inside an offer or in blocks, and the artifacts of jobs that have ended."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_agent.coordinator.store import CoordinatorStore
from edge_agent.coordinator.views import JobView
from edge_agent.errors import DatasetChecksum
from edge_agent.messages import MAX_INLINE_BYTES, Artifact, Envelope, FileRequest, Offer
from edge_agent.mqtt import Link
from edge_agent.topics import down
from edge_agent.transfer import FileStore, Incoming

log = logging.getLogger(__name__)


@dataclass
class Awaited:
    """A result whose artifacts are on their way; its message is acknowledged when they are here for good."""

    node: str
    message: str
    incoming: dict[str, Incoming] = field(default_factory=dict)
    given_up: set[str] = field(default_factory=set)
    claimed: bool = False
    """Whether it is this one of several coordinators that fetches them."""


class Exchange:
    """Transfers of one coordinator. `send` publishes a message to a node, `collected` hears of each job whose artifacts are here."""

    def __init__(
        self,
        store: CoordinatorStore,
        files: FileStore,
        link: Link,
        fleet: str,
        artifact_limit: int,
        send: Callable[..., bool],
        collected: Callable[[JobView, str], None],
    ) -> None:
        self._store, self._files, self._link, self._fleet = store, files, link, fleet
        self._artifact_limit, self._send, self._collected = artifact_limit, send, collected
        self._awaited: dict[str, Awaited] = {}

    def offer(self, view: JobView, envelope: Envelope | None = None) -> Offer:
        """Return a job's offer, with those files inside that are small enough; with another envelope, that around the order."""
        room = min(MAX_INLINE_BYTES, self._link.payload_limit // 2)  # as base64 they take a third more, beside the job
        contents: dict[str, bytes] = {}
        for file in view.order.files:
            if file.size_bytes <= room and self._files.has(file.sha256):
                contents[file.sha256] = self._files.path(file.sha256).read_bytes()
                room -= file.size_bytes
        return Offer(envelope or self._store.envelope(view.id), contents)

    def may_have(self, node: str, sha256: str) -> bool:
        """Whether one of the node's open jobs needs a file; no other file goes to it."""
        return any(sha256 == file.sha256 for view in self._store.open_jobs(node) for file in view.order.files)

    def awaited(self, node: str, sha256: str) -> Incoming | None:
        """A file that is awaited from a node."""
        found = (awaited.incoming.get(sha256) for awaited in self._awaited.values() if awaited.node == node)
        return next((incoming for incoming in found if incoming is not None), None)

    def send_blocks(self, node: str, sha256: str, request: FileRequest) -> None:
        """Send blocks of a file that a node may have."""
        if self.may_have(node, sha256):
            for number, block in self._files.read_blocks(sha256, request):
                self._link.publish(down(self._fleet, node, "file", sha256, "block", number), block)

    def collect(self, view: JobView, message: str) -> None:
        """Begin, or go on, to fetch the artifacts of a job's result, which came in a message.

        Where another coordinator does that, nothing: it acknowledges the message too, which is the same however often it comes.
        """
        if view.id not in self._awaited:
            claimed = bool(view.artifacts) and self._store.claim(view.id)
            if view.artifacts and not claimed:
                return
            self._awaited[view.id] = Awaited(view.node, message, claimed=claimed)
        self._awaited[view.id].message = message
        self._advance(view.id)

    def join(self, node: str, sha256: str) -> Incoming | None:
        """Await an artifact that another coordinator awaits, for a node brings it here; None where nobody does."""
        for view in self._store.open_jobs(node):
            if any(a.sha256 == sha256 for a in view.artifacts) and (message := self._store.result_message(view.id)) is not None:
                self._awaited.setdefault(view.id, Awaited(node, message))
                self._advance(view.id)
        return self.awaited(node, sha256)

    def receive_block(self, node: str, sha256: str, number: int, block: bytes) -> None:
        """Keep a block that was asked for; blocks that nobody awaits from this node are dropped."""
        for job, awaited in list(self._awaited.items()):
            if awaited.node == node and (incoming := awaited.incoming.get(sha256)) and incoming.receive(number, block):
                self._advance(job)

    def tick(self) -> None:
        for job in list(self._awaited):
            self._advance(job)

    def link_is_gone(self) -> None:
        """Leave to other coordinators what was on its way here: nodes say their results again, to one that they reach."""
        for job in [job for job, awaited in self._awaited.items() if awaited.claimed]:
            self._store.leave(job)
            del self._awaited[job]

    def link_is_new(self) -> None:
        for awaited in self._awaited.values():
            for incoming in awaited.incoming.values():
                incoming.ask_again()

    def _advance(self, job: str) -> None:
        """Ask for what is missing; when the last artifact is here for good the job is collected."""
        view, awaited = self._store.job(job), self._awaited[job]
        artifacts = view.artifacts if view is not None and view.phase != "ended" else ()
        wanted = [a for a in artifacts if not self._files.lasts(a.sha256) and not self._files.has(a.sha256)]
        for sha256 in set(awaited.incoming) - {a.sha256 for a in wanted}:  # of a result that another has replaced
            awaited.incoming.pop(sha256).discard()
        for artifact in wanted:
            if artifact.sha256 in awaited.incoming or artifact.sha256 in awaited.given_up:
                continue
            if artifact.size_bytes > self._artifact_limit:
                log.error("artifact_left_on_node job=%s name=%s bytes=%d", job, artifact.name, artifact.size_bytes)
                awaited.given_up.add(artifact.sha256)
            else:
                awaited.incoming[artifact.sha256] = self._incoming(awaited.node, artifact)
        for sha256 in list(awaited.incoming):
            self._ask(job, awaited, sha256)
        if not awaited.incoming and all(a.sha256 in awaited.given_up or self._lasts(a.sha256) for a in artifacts):
            del self._awaited[job]
            if awaited.claimed:
                self._store.leave(job)
            if view is not None:
                self._collected(view, awaited.message)

    def _lasts(self, sha256: str) -> bool:
        """Whether an artifact is here for good, and no other coordinator is about to delete what it was before."""
        if not self._files.lasts(sha256):
            return False
        if doomed := self._store.doomed(sha256):
            self._files.doubt(sha256)
        return not doomed

    def _ask(self, job: str, awaited: Awaited, sha256: str) -> None:
        """Go on with one transfer; one that has come or can never come is awaited no more."""
        try:
            if awaited.incoming[sha256].tick():
                del awaited.incoming[sha256]
        except DatasetChecksum as error:
            log.error("artifact_broken job=%s error=%s", job, error)
            del awaited.incoming[sha256]
            awaited.given_up.add(sha256)

    def _incoming(self, node: str, artifact: Artifact) -> Incoming:
        def ask(request: FileRequest) -> bool:
            return self._send(node, request, "file", artifact.sha256, "request", qos=0)

        return Incoming(self._files, artifact.sha256, artifact.size_bytes, self._link.payload_limit, ask)
