"""Saliency Maps of jobs that run, fetched from their nodes because somebody looks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge_agent.coordinator.store import CoordinatorStore
from edge_agent.coordinator.views import JobView
from edge_agent.errors import DatasetChecksum, DiskFull, Refused, human_bytes
from edge_agent.job import NlftOptions
from edge_agent.messages import Artifact, FileRequest, Watch
from edge_agent.mqtt import Link
from edge_agent.transfer import FileStore, Incoming

log = logging.getLogger(__name__)

MOST_BYTES = 64 * 2**20
"""Of one map, which has some 25 MiB where it has all tokens that it may have."""
ASKED_S = 15.0
"""Until a map has been told of, it is asked for so often."""


@dataclass
class LiveMap:
    """That of one job: the newest that its node has told of, on its way here, and the newest that is here."""

    node: str
    again_at: float | None = None
    """When to ask again, because somebody waits and none has been told of."""
    too_large: int | None = None
    """Bytes of one that is not fetched."""
    told: Artifact | None = None
    incoming: Incoming | None = None
    here: Artifact | None = None


class LiveMaps:
    """Those of one coordinator, in a directory of their own: the result of some job may be the same file, and stays.

    `send` publishes a message to a node, `shown` hears of each map that has come.
    """

    def __init__(
        self,
        store: CoordinatorStore,
        directory: Path,
        link: Link,
        limit_bytes: int,
        send: Callable[..., bool],
        shown: Callable[[str, Artifact], None],
    ) -> None:
        self._store, self._files, self._link, self._send, self._shown = store, FileStore(directory), link, send, shown
        self._limit_bytes = min(MOST_BYTES, limit_bytes)
        self._maps: dict[str, LiveMap] = {}
        self._files.sweep(())
        self._files.remove_old((), 0.0)

    def ask(self, view: JobView) -> None:
        """Have the trainer of a job write its map as it stands; the progress of the job tells of it. Raises Refused where there is none."""
        if not isinstance(method := view.order.job.method, NlftOptions):
            raise Refused(f"job {view.id} trains by {method.__struct_config__.tag}; only nlft has a Saliency Map")
        if view.phase not in ("running", "paused"):
            raise Refused(f"job {view.id} is {view.phase}: a Saliency Map is made while its trainer runs, and comes with its result")
        live = self._maps.setdefault(view.id, LiveMap(view.node))
        if live.too_large is not None:
            raise Refused(
                f"the Saliency Map of job {view.id} has {human_bytes(live.too_large)}, and {human_bytes(self._limit_bytes)} are fetched; "
                "look at it on its node"
            )
        if live.incoming is None:  # what is on its way is shown when it has come, to all who wait
            self._ask(view.id, live)

    def told(self, job: str, told: Artifact) -> None:
        """Begin to fetch a map that its node tells of, where it was asked for. The one before it comes no more."""
        live = self._maps.get(job)
        if live is None:
            return
        if told.size_bytes > self._limit_bytes:
            if live.too_large is None:
                log.warning("map_left_on_node job=%s bytes=%d", job, told.size_bytes)
            live.too_large, live.again_at = told.size_bytes, None
            return
        if told == live.told:
            if live.again_at is not None and told == live.here:  # nothing has changed since
                self._show(job, live, told)
            return
        if live.incoming is not None:
            live.incoming.discard()
        live.told, live.incoming, live.again_at = told, None, None
        with self._trying(job, live):
            live.incoming = self._incoming(live.node, told)
        self._advance(job, live)

    def here(self, job: str) -> tuple[str, Path] | None:
        """Return the sha256 and the place of the newest map of a running job that has come."""
        live = self._maps.get(job)
        return (live.here.sha256, self._files.path(live.here.sha256)) if live is not None and live.here is not None else None

    def awaited(self, node: str, sha256: str) -> Incoming | None:
        """A map that is awaited from a node."""
        found = (live.incoming for live in self._maps.values() if live.node == node)
        return next((incoming for incoming in found if incoming is not None and incoming.sha256 == sha256), None)

    def receive_block(self, node: str, sha256: str, number: int, block: bytes) -> None:
        for job, live in self._maps.items():
            if live.node == node and live.incoming is not None and live.incoming.sha256 == sha256:
                with self._trying(job, live):
                    live.incoming.receive(number, block)
                self._advance(job, live)

    def tick(self) -> None:
        """Ask for what is missing. With the end of its job a map goes: the result has its own."""
        for job, live in list(self._maps.items()):
            view = self._store.job(job)
            if view is not None and view.phase != "ended":
                self._advance(job, live)
                if live.again_at is not None and time.monotonic() > live.again_at:
                    self._ask(job, live)
                continue
            del self._maps[job]
            if live.incoming is not None:
                live.incoming.discard()
            self._remove(live.here)

    def link_is_new(self) -> None:
        for live in self._maps.values():
            if live.incoming is not None:
                live.incoming.ask_again()

    def _remove(self, gone: Artifact | None) -> None:
        """Delete a map that none of the jobs here has any more."""
        if gone is not None and all(live.here is None or live.here.sha256 != gone.sha256 for live in self._maps.values()):
            self._files.remove(gone.sha256)

    def _ask(self, job: str, live: LiveMap) -> None:
        live.again_at = time.monotonic() + ASKED_S
        self._send(live.node, Watch(ASKED_S, saliency=True), "job", job, "watch", qos=0, life_s=ASKED_S)

    @contextmanager
    def _trying(self, job: str, live: LiveMap) -> Iterator[None]:
        """Give a map up that is another one by now, and ask anew; or that cannot be written: then until somebody asks again."""
        try:
            yield
        except DatasetChecksum as error:  # the trainer has written the next one meanwhile
            log.info("map_changed job=%s error=%s", job, error)
            live.told = live.incoming = None
            self._ask(job, live)
        except (DiskFull, OSError) as error:
            log.error("map_given_up job=%s error=%s", job, error)
            live.told = live.incoming = None

    def _advance(self, job: str, live: LiveMap) -> None:
        """Ask for what is missing of a map; show one that has come."""
        come = False
        with self._trying(job, live):
            come = live.incoming is not None and live.incoming.tick()
        if come and live.told is not None:
            before, live.here, live.incoming = live.here, live.told, None
            self._remove(before)
            self._show(job, live, live.told)

    def _show(self, job: str, live: LiveMap, here: Artifact) -> None:
        live.again_at = None
        self._shown(job, here)

    def _incoming(self, node: str, told: Artifact) -> Incoming:
        def ask(request: FileRequest) -> bool:
            return self._send(node, request, "file", told.sha256, "request", qos=0)

        return Incoming(self._files, told.sha256, told.size_bytes, self._link.payload_limit, ask)
