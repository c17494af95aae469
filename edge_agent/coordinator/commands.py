"""What nodes are told to do, again and again until they have: take a job, go on with other options, end one, delete one, take no more."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

import msgspec

from edge_agent.coordinator.exchange import Exchange
from edge_agent.coordinator.store import CoordinatorStore
from edge_agent.coordinator.views import DueJob, JobView, NodeView
from edge_agent.messages import ORDER_S, Addressed, Cancel, Drain, Envelope, Forget, Options, Order, Report, Resume

RETRY_S, LONGEST_RETRY_S = 5.0, 120.0
LOOK_S = 0.5
"""Between two looks at all open jobs, where nothing has changed: one with every message of a thousand nodes would be most of the work."""
REPORT_PAUSE_S = 10.0
"""A node is asked for its view at most this often."""
SPOKEN_AT_ONCE = 20
"""Nodes that who has just taken the lead of several coordinators sees to between two events."""


@dataclass
class Retry:
    """When something is to be sent next; the pauses grow."""

    due: float = 0.0
    pause_s: float = RETRY_S

    def sent(self, now: float) -> None:
        self.due, self.pause_s = now + self.pause_s, min(2 * self.pause_s, LONGEST_RETRY_S)


class Commands:
    """Those of one coordinator. `send` publishes to a node, `seal` puts into envelopes, `changed` hears of each job that has changed."""

    def __init__(
        self,
        fleet: str,
        store: CoordinatorStore,
        exchange: Exchange,
        send: Callable[..., bool],
        seal: Callable[[Addressed], Envelope],
        changed: Callable[[str], object],
    ) -> None:
        self._fleet, self._store, self._exchange, self._send, self._seal, self._changed = fleet, store, exchange, send, seal, changed
        self._retries: dict[str, Retry] = {}
        self._expiries: dict[str, float] = {}
        """When open jobs expire that no node has taken, in seconds since 1970."""
        self._reports: dict[str, float] = {}
        self._look, self._all_due = 0.0, 0.0
        self._changed_nodes: set[str] = set()
        self._unseen: deque[str] = deque()
        """Nodes of which who has the lead now does not know whether the one before it has seen to them."""

    def link_is_new(self) -> None:
        """All is due again."""
        self._retries.clear()
        self._look, self._all_due = 0.0, time.time()

    def lead(self) -> None:
        """Do from now on what only one of several coordinators is to do."""
        self.link_is_new()
        self._unseen = deque(node.id for node in self._store.nodes() if node.present)

    def at_once(self, node: str, job: str) -> None:
        """What is wanted of a job has changed, or it is new."""
        for of in (job, _of_options(job)):
            self._retries.pop(of, None)
        self._changed_nodes.add(node)

    def tick(self, now: float, leads: bool) -> None:
        """Tell what is due: where something has changed here at once, of all others who `leads` in turn."""
        for name in self._changed_nodes:
            due, node = self._store.due_jobs(name), self._store.node(name)
            self._tell(due, {} if node is None else {name: node}, self._store.waiting_counts(name), now)
        self._changed_nodes.clear()
        if not leads:
            self._retries, self._expiries = {}, {}  # what comes next of these jobs is the leader's
            return
        for _ in range(min(SPOKEN_AT_ONCE, len(self._unseen))):
            self.node_spoke(self._unseen.popleft())
        if now >= self._look:
            self._look = now + LOOK_S
            due, nodes = self._store.due_jobs(), self._store.due_nodes()
            forgotten = self._store.forgotten_jobs()
            known = {job.id for job in due} | {view.id for view in forgotten}
            self._expiries = {job: expires for job, expires in self._expiries.items() if job in known}
            self._retries = {of: retry for of, retry in self._retries.items() if of.partition("/")[0] in known}
            self._tell(due, nodes, self._store.waiting_counts(), now)
            for view in forgotten:
                self._forget(view, nodes.get(view.node), now)

    def _tell(self, due: list[DueJob], nodes: dict[str, NodeView], waiting: Counter[str], now: float) -> None:
        """Tell nodes what is due of jobs. One is offered no more than its queue holds, of which jobs take up what is `waiting`."""
        for job in due:
            node, offers = nodes.get(job.node), job.phase in ("created", "offered")
            if offers and self._expired(job):
                continue
            full = node is not None and node.info is not None and waiting[job.node] >= node.info.limits.queue
            if (offers or job.cancel) and not (job.phase == "created" and full and not job.cancel):
                self._offer(job, node, now)
                waiting[job.node] += job.phase == "created"
            elif job.has_options and (view := self._store.job(job.id)) is not None and view.options_due:
                self._send_options(view, node, now)

    def node_spoke(self, node: str) -> None:
        """A node has said where it stands: what it has to do is due."""
        self.drain(node)
        known = self._store.node(node)
        for view in self._store.open_jobs(node):
            self.at_once(node, view.id)
            # The same offer again: a node that has the job says where it stands, one that has lost its disk takes it anew.
            if known is not None and known.state == "ready" and view.phase not in ("created", "offered") and not view.cancel:
                self._send(node, self._exchange.offer(view, self._renewed(view.order)), "job", view.id, "offer", life_s=ORDER_S)

    def drain(self, node: str) -> None:
        """Tell a node whether it is to take new jobs, unless it says that it has been told that, or something later."""
        view = self._store.node(node)
        if view is None or not view.present or view.told >= view.drain_command:
            return
        kind, name = (Drain, "drain") if view.drain else (Resume, "resume")
        self._send(node, self._seal(kind(self._fleet, node, view.drain_command)), "command", name)

    def cancel(self, view: JobView) -> bool:
        """Ask for the end of a job, once."""
        return self._send(view.node, self._seal(Cancel(self._fleet, view.node, view.id)), "job", view.id, "cancel")

    def report(self, node: str) -> None:
        """Ask a node where its jobs stand."""
        now = time.monotonic()
        if now >= self._reports.get(node, 0.0) and self._send(node, Report(), "command", "report"):
            self._reports[node] = now + REPORT_PAUSE_S

    def _expired(self, job: DueJob) -> bool:
        """End a job that its node has not answered in time; whether it was one."""
        if job.id not in self._expiries:
            view = self._store.job(job.id)
            if view is None:
                return True
            self._expiries[job.id] = view.order.expires.timestamp()
        expired = time.time() > (expires := self._expiries[job.id])
        if expired:
            told = datetime.fromtimestamp(expires, timezone.utc).isoformat()
            if self._store.end(job.id, "expired", "expired", f"no answer from node {job.node} before {told}", job.phase):
                self._changed(job.id)
        return expired

    def _offer(self, job: DueJob, node: NodeView | None, now: float) -> None:
        """Offer a job, or ask for its end, until the node answers."""
        retry = self._retries.get(job.id) or self._retry(job, now)
        if node is None or not node.present or now < retry.due or (view := self._store.job(job.id)) is None:
            return
        left_s = (view.order.expires - datetime.now(timezone.utc)).total_seconds()
        if view.cancel and self.cancel(view):
            retry.sent(now)
        elif not view.cancel and self._send(view.node, self._exchange.offer(view), "job", view.id, "offer", life_s=left_s):
            retry.sent(now)
            if view.phase == "created":
                self._store.offered(view.id)
                self._changed(view.id)

    def _retry(self, job: DueJob, now: float) -> Retry:
        """Begin to count for a job. Another coordinator may have offered it just now."""
        retry = self._retries[job.id] = Retry()
        since_s = time.time() - job.changed
        if self._store.shared and (job.phase == "offered" or job.cancel) and job.changed > self._all_due and 0 <= since_s < RETRY_S:
            retry.due = now + RETRY_S - since_s
        return retry

    def _send_options(self, view: JobView, node: NodeView | None, now: float) -> None:
        """Send a job what it is to go on with until its node says that it has it."""
        retry = self._retries.setdefault(_of_options(view.id), Retry())
        if node is None or not node.present or now < retry.due or view.options is None:
            return
        options = Options(self._fleet, view.node, view.id, view.options.number, view.options.method)
        if self._send(view.node, self._seal(options), "job", view.id, "options"):
            retry.sent(now)

    def _forget(self, view: JobView, node: NodeView | None, now: float) -> None:
        """Ask a node to delete a job until it has."""
        retry = self._retries.setdefault(view.id, Retry())
        if node is None or not node.present or now < retry.due:
            return
        if self._send(view.node, self._seal(Forget(self._fleet, view.node, view.id)), "command", "forget"):
            retry.sent(now)

    def _renewed(self, order: Order) -> Envelope:
        """The order of a job that its node took: whatever time has passed since, and whichever key signed it, it is valid now."""
        now = datetime.now(timezone.utc)
        return self._seal(msgspec.structs.replace(order, issued=now, expires=now + timedelta(seconds=ORDER_S)))


def _of_options(job: str) -> str:
    """The name under which it stands when a job's options are to be sent next."""
    return f"{job}/options"
