"""The coordinator at work: offers jobs to their nodes until they are taken, keeps what nodes say, fetches what jobs have made.

One thread decides everything, as in the agent; requests of the HTTP API are calls that it runs in between.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import os
import re
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TypeVar

from edge_agent.config import NAME_PATTERN, CoordinatorConfig
from edge_agent.coordinator.access import Access
from edge_agent.coordinator.audience import Audience, Listener, ProgressPoint
from edge_agent.coordinator.commands import Commands
from edge_agent.coordinator.exchange import Exchange
from edge_agent.coordinator.live_maps import LiveMaps
from edge_agent.coordinator.metrics import Metrics, Standing
from edge_agent.coordinator.others import Others
from edge_agent.coordinator.plans import Plans
from edge_agent.coordinator.remote_files import RemoteFiles
from edge_agent.coordinator.rollout import RolloutMade, RolloutPage, RolloutPlan, RolloutView, Selector, SubmittedJob, unfit
from edge_agent.coordinator.rollouts import Rollouts
from edge_agent.coordinator.store import MOST_BOOT, CoordinatorStore
from edge_agent.coordinator.turns import Turns, is_standing, sender_of
from edge_agent.coordinator.views import (
    MANY,
    Audited,
    AuditPage,
    DatasetPage,
    DatasetView,
    HistoryRow,
    JobFilter,
    JobPage,
    JobView,
    NodePage,
    NodeView,
    RolloutNodePage,
    Token,
)
from edge_agent.database import is_damage
from edge_agent.errors import (
    DatabaseAway,
    FilesAway,
    JobConflict,
    MessageInvalid,
    Refused,
    StateDamaged,
    StateUnusable,
    Unknown,
    human_bytes,
)
from edge_agent.files import lock_state
from edge_agent.job import Job, NlftOptions
from edge_agent.messages import (
    Ack,
    Addressed,
    Changed,
    CoordinatorState,
    Envelope,
    File,
    FileRequest,
    Forgotten,
    Heartbeat,
    Hello,
    JobProgress,
    JobResult,
    JobStatus,
    NodeInfo,
    NodeState,
    Offer,
    Order,
    PlanAnswer,
    Watch,
    decode,
    encode,
    is_ulid,
    new_id,
    read_order,
)
from edge_agent.mqtt import Birth, Connected, Disconnected, Link, Received
from edge_agent.new_options import MOST_CHANGES, change, check_change
from edge_agent.serving import END, serve
from edge_agent.signing import read_private_key, seal
from edge_agent.topics import (
    COORDINATOR,
    block_number,
    coordinator_changed,
    coordinator_state,
    coordinator_subscriptions,
    down,
    shared_subscriptions,
    split,
)
from edge_agent.transfer import FileStore, Place
from edge_agent.watchdog import Heart

log = logging.getLogger(__name__)

TICK_S = 0.5
FILES_S = 0.2
"""Between two looks at all files that are awaited; what comes is looked at when it comes."""
REFRESH_S = 1.0
"""Between two looks of one of several coordinators at the tokens that others have made and revoked."""
TIDY_S = 600.0
"""Between two looks of who leads at files of the object store that nothing has."""
SEEN_S = 900.0
"""How long one of several coordinators believes that an object which it has seen is there: far less than `UPLOAD_S`, after which
another one deletes what nothing has."""
UPLOAD_S = 24 * 3600.0
"""A file that is no dataset and of no job, as an end in between may leave one, is deleted at the first start that long after."""
NODE_NAME = re.compile(NAME_PATTERN)

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """A request from another thread."""

    run: Callable[[], Any]
    future: Future[Any]

    def answer(self) -> None:
        """Run it, and hand over what it returns or raises. Raises too what says that the database is broken, or another's."""
        try:
            self.future.set_result(self.run())
        except Exception as error:
            self.future.set_exception(error)
            if isinstance(error, StateDamaged | StateUnusable) or (isinstance(error, sqlite3.Error) and is_damage(error)):
                raise


class Service:
    """One coordinator instance."""

    def __init__(self, config: CoordinatorConfig) -> None:
        """Open the state. Raises an EdgeAgentError where a coordinator with this configuration can never work."""
        self._config, self._heart = config, Heart()
        self._signing_key = read_private_key(config.signing_key_file) if config.signing_key_file else None
        self._events = Turns()
        self._lock = lock_state(config.state_directory)
        instance = config.instance if config.shared else None
        file = config.state_directory / "coordinator.sqlite"
        self._store = CoordinatorStore(file, config.lease_s, server=config.database, instance=instance)
        self.access, self.metrics = Access(self._store), Metrics()
        self.looking = threading.Lock()
        """Held by who looks into a dataset."""
        root = config.state_directory / "files"
        trust_s = SEEN_S if config.shared else math.inf
        self._remote = RemoteFiles(root, config.files, self._deleted, trust_s) if config.files is not None else None
        self.files = self._remote or FileStore(root)
        self.files.sweep(self._store.files_of_open_jobs())
        needed = self._store.files_of_jobs() | {view.sha256 for view in self._store.dataset_page(None, MANY).items}
        self.files.remove_old(needed, UPLOAD_S)
        if self._remote is not None:
            loose = set() if config.shared else self._store.loose_files()
            for sha256 in loose & needed:
                self._store.settle(sha256)
            self._remote.go_on(needed, loose - needed)
        self._source = f"edge1/{config.fleet}/coordinator/{config.instance}"
        self._link = Link(
            config.broker,
            f"coordinator/{config.fleet}/{config.instance}",
            shared_subscriptions(config.fleet) if config.shared else coordinator_subscriptions(config.fleet),
            self._events,
            self._birth,
            sender_of,
            is_standing,
            # What would wait for one that is gone the others do not get; nodes say it again, to them.
            keeps=not config.shared,
        )
        self._leads = not config.shared
        self._look_at_files = self._tidy_at = self._refresh_at = 0.0
        self._audience = Audience(self._ask_progress, self._store.epoch)
        self._exchange = Exchange(self._store, self.files, self._link, config.fleet, config.artifact_limit, self._send, self._collected)
        self._maps = LiveMaps(
            self._store, config.state_directory / "maps", self._link, config.artifact_limit, self._send, self._audience.saliency
        )
        self._commands = Commands(config.fleet, self._store, self._exchange, self._send, self._seal, self._changed)
        self._rollouts = Rollouts(self._store, self._submit_of_rollout, self.cancel)
        self.metrics.watch(lambda: self.call(self._standing))
        self._plans = Plans(self._store, self._send)
        self._others = Others(self._tell_others)
        self._failed: StateDamaged | StateUnusable | None = None
        self._thread = threading.Thread(target=self._serve, name="coordinator")

    def start(self) -> None:
        if self._remote is not None:
            self._remote.start()
        self._link.start()
        self._thread.start()
        log.info("coordinator_started fleet=%s instance=%s epoch=%d", self._config.fleet, self._config.instance, self._store.epoch)

    def ready(self) -> None:
        """Requests are answered now."""
        self._heart.ready()

    def stop(self) -> None:
        """End the thread, tell the fleet, and close. Raises StateDamaged or StateUnusable where that has ended the thread."""
        self._heart.stopping()
        self._events.put(END)
        self._thread.join()
        topic = coordinator_state(self._config.fleet, self._config.instance)
        self._link.close((topic, self._message(CoordinatorState(False, self._store.epoch))))
        if self._remote is not None:
            self._remote.stop()
        self._store.close()
        self._lock.close()
        log.info("coordinator_stopped")
        if self._failed is not None:
            raise self._failed

    def call(self, run: Callable[[], T]) -> T:
        """Run a request in the coordinator's thread and return what it returns or raises. Raises DatabaseAway at once where it is."""
        if (away := self._store.away) is not None:
            raise DatabaseAway(away.where, away.problem)
        future: Future[T] = Future()
        self._events.put(Call(run, future))
        return future.result(timeout=60)

    def call_later(self, run: Callable[[], Any]) -> None:
        """Run a request some time later; nobody waits for it."""
        self._events.put(Call(run, Future()))

    def _serve(self) -> None:
        try:
            serve(self._events, self._handle, self._tick, self._drop, TICK_S, lambda: self._heart.beat(self._link))
        except (StateDamaged, StateUnusable) as error:
            self._failed = error
            os.kill(os.getpid(), signal.SIGTERM)  # ends the API, whose end ends this

    def _drop(self, event: object) -> None:
        if isinstance(event, Received):
            self._link.acknowledge(event)

    def _handle(self, event: object) -> None:
        match event:
            case Received():
                self._receive(event)
            case Call():
                event.answer()
            case Connected(protocol):
                log.info("connected host=%s port=%d protocol=%s", self._config.broker.host, self._config.broker.port, protocol)
                topic = coordinator_state(self._config.fleet, self._config.instance)
                self._link.publish(topic, self._message(CoordinatorState(True, self._store.epoch)), qos=1, retain=True)
                self._commands.link_is_new()
                self._exchange.link_is_new()
                self._maps.link_is_new()
                if self._config.shared:
                    self._audience.part()  # what others have told meanwhile
            case Disconnected(why):
                log.warning("disconnected why=%r", why)
                if self._config.shared:
                    self._exchange.link_is_gone()

    # the link

    def _birth(self) -> Birth:
        topic = coordinator_state(self._config.fleet, self._config.instance)
        return Birth(topic, self._message(CoordinatorState(False, self._store.epoch)))

    def _message(self, data: object) -> bytes:
        return encode(data, self._source, boot=self._store.epoch)

    def _send(self, node: str, data: object, *parts: object, qos: int = 1, life_s: float | None = None) -> bool:
        message = self._message(data)
        if isinstance(data, Offer):
            self._store.offers(str(parts[1]), hashlib.sha256(message).hexdigest())
        return self._link.publish(down(self._config.fleet, node, *parts), message, qos, life_s=life_s)

    def _seal(self, payload: Addressed) -> Envelope:
        return seal(payload, self._signing_key)

    def _acknowledge(self, node: str, message: str) -> None:
        """Tell a node that a message of its is stored."""
        ack = Ack(self._config.fleet, node, message, datetime.now(timezone.utc), self._store.boot(node))
        self._send(node, self._seal(ack), "ack", message)

    def _receive(self, message: Received) -> None:
        """Act on a message, then acknowledge it to the broker."""
        node, parts = split(message.topic)
        try:
            if node == COORDINATOR and self._config.shared:
                self._receive_of_other(parts, message.payload)
            elif NODE_NAME.search(node) is None or node == COORDINATOR:
                raise MessageInvalid(f"{node[:80]!r} can be no node's name")
            else:
                self._receive_up(node, parts[1:], message.payload, message.retained)
        except MessageInvalid as error:
            self.metrics.refused.inc()
            log.warning("message_invalid topic=%s error=%s", message.topic, error)
        self._link.acknowledge(message)

    def _receive_up(self, node: str, parts: Sequence[str], payload: bytes, retained: bool) -> None:
        match parts:
            case ["hello"]:
                self._acknowledge(node, decode(payload, Hello).id)
            case ["state"]:
                self._node_state(node, decode(payload, NodeState).data, retained)
            case ["info"]:
                info = decode(payload, NodeInfo)
                self._store.set_info(node, info.data, MOST_BOOT if info.boot is None else info.boot)
                self._heard_of(node)
            case ["heartbeat"]:
                self._store.set_heartbeat(node, decode(payload, Heartbeat).data)
                self._heard_of(node)
                self._others.add("node", node)
            case ["job", job, kind] if is_ulid(job):
                self._receive_of_job(node, job, kind, payload)
            case ["plan", request, "answer"]:
                self._plans.answered(node, request, decode(payload, PlanAnswer).data)
            case ["file", sha256, "request"]:
                self._exchange.send_blocks(node, sha256, decode(payload, FileRequest).data)
            case ["file", sha256, "block", text] if (number := block_number(text)) is not None:
                self.receive_block(node, sha256, number, payload)
            case _:
                log.warning("topic_unknown node=%s topic=%s", node, "/".join(parts))
                return
        self.metrics.received.labels(parts[0]).inc()

    def _receive_of_other(self, parts: Sequence[str], payload: bytes) -> None:
        """Another coordinator has stored something: who looks here hears of it."""
        match parts:
            case [instance, "changed"] if instance == self._config.instance:
                return
            case [_, "changed"]:
                changed = decode(payload, Changed).data
            case _:
                return
        for job in changed.jobs:
            self._look_at(job)
        for node in changed.nodes:
            self._heard_of(node)

    def _tell_others(self, changed: Changed) -> None:
        if self._config.shared:
            self._link.publish(coordinator_changed(self._config.fleet, self._config.instance), self._message(changed))

    def _receive_of_job(self, node: str, job: str, kind: str, payload: bytes) -> None:
        match kind:
            case "status":
                self._status(node, job, payload)
            case "progress":
                self._progress(node, job, decode(payload, JobProgress).data)
            case "result":
                self._result(node, job, payload)
            case "forgotten":
                decode(payload, Forgotten)
                self._forgotten(node, job)
            case _:
                log.warning("topic_unknown node=%s topic=job/%s/%s", node, job, kind)

    def _node_state(self, node: str, state: NodeState, retained: bool) -> None:
        if not self._store.set_state(node, state, retained=retained):
            log.info("stale_state_ignored node=%s boot=%d conn=%d", node, state.boot, state.conn)
            return
        log.info("node_state node=%s state=%s boot=%d conn=%d", node, state.state, state.boot, state.conn)
        self._heard_of(node)
        if self._leads:  # all coordinators hear of it
            self._commands.node_spoke(node)

    def _own(self, node: str, job: str) -> JobView | None:
        """The job, if it is this node's: no node speaks of another's. What is not stored here is not acknowledged either."""
        view = self._store.job(job)
        if view is None or view.node != node:
            log.warning("job_unknown node=%s job=%s", node, job)
            return None
        return view

    def _status(self, node: str, job: str, payload: bytes) -> None:
        message = decode(payload, JobStatus)
        view = self._own(node, job)
        if view is None:
            return
        told = message.data
        if told.outcome == "rejected" and told.digest is None and not self._store.has_offered(job, told.refused):
            log.warning("rejection_ignored node=%s job=%s reason=%s text=%r", node, job, told.reason, told.text)
        elif told.digest in (None, view.digest):
            if told.reason == "replayed":
                self._store.conclude(job, "its node has deleted what had not come yet")
            if not self._store.apply_status(view, message):
                self.metrics.gaps.inc()
                if not self._config.shared:  # several are seldom in step; what is missing is on its way to another one, or comes again
                    self._commands.report(node)
            # It took an offer that had been given up, or was lost. An end that was told in its name stops nothing: anyone may have told it.
            if view.phase == "ended" and told.phase != "ended" and (view.cancel or view.outcome == "expired"):
                self._commands.cancel(view)
            self._changed(job)
        self._acknowledge(node, message.id)

    def _progress(self, node: str, job: str, progress: JobProgress) -> None:
        view = self._store.job(job)
        if view is not None and view.node == node and view.phase != "ended":
            self._audience.progress(job, progress)
            if progress.saliency is not None:
                self._maps.told(job, progress.saliency)

    def _result(self, node: str, job: str, payload: bytes) -> None:
        message = decode(payload, JobResult)
        view = self._own(node, job)
        if view is None:
            return
        self._store.apply_result(view, message)
        self._changed(job)
        self._exchange.collect(self._store.job(job) or view, message.id)

    def _collected(self, view: JobView, message: str) -> None:
        """All artifacts of a job are here: it has ended, and its node may know."""
        result = view.result
        if result is not None and self._store.end(view.id, result.outcome, result.reason, result.text, "finalizing"):
            self.metrics.ended(result)
            log.info("job_ended job=%s node=%s outcome=%s reason=%s", view.id, view.node, result.outcome, result.reason)
        self._acknowledge(view.node, message)
        self._changed(view.id)

    def _tick(self, now: float) -> None:
        self._link.supervise()
        self._store.look()
        self._lead(now)
        if not self._link.connected:
            return
        if self._leads:
            self._rollouts.tick(now)
        self._commands.tick(now, self._leads)
        self._audience.tick(now)
        self._others.tick(now)
        if now >= self._look_at_files:
            self._look_at_files = now + FILES_S
            self._exchange.tick()
            self._maps.tick()

    def _lead(self, now: float) -> None:
        """Take what only one of several coordinators is to do, or leave it to those that the broker hears."""
        led, self._leads = self._leads, self._store.leads(self._link.connected or not self._config.shared)
        if not self._config.shared:
            return
        if led and not self._leads and self._remote is not None:
            self._remote.leave_deletions()
        if self._leads and not led:
            log.info("lead_taken instance=%s", self._config.instance)
            self._commands.lead()
            self._tidy_at = now
        if now >= self._refresh_at:
            self._refresh_at = now + REFRESH_S
            self.access.refresh()
        if self._leads and now >= self._tidy_at and self._remote is not None:
            self._tidy_at = now + TIDY_S
            for sha256 in self._store.doom(time.time() - UPLOAD_S, self._rollouts.files):
                self._remote.delete(sha256)

    def _forgotten(self, node: str, job: str) -> None:
        """The node has nothing of a job any more; where somebody has asked for that, neither has the coordinator."""
        view = self._store.job(job)
        if view is None or view.node != node or not view.forget:
            return
        unneeded = self._store.delete_job(view, self._rollouts.files, loosen=self._remote is not None)
        self._audience.forget(job)
        for sha256 in unneeded:
            self._remove(sha256)
        log.info("job_forgotten job=%s", job)

    def _remove(self, sha256: str) -> None:
        """Delete a file that nothing needs, here and in the object store; of several coordinators one does that there, some time later."""
        self.files.remove(sha256)
        if self._remote is not None and not self._config.shared:
            self._remote.delete(sha256)

    def _deleted(self, sha256: str) -> None:
        """An object is gone; said in another thread."""
        self.call_later(lambda: self._store.settle(sha256))

    # requests; `call` runs them in the coordinator's thread

    def hand_in(
        self, node: str | None, selector: Selector, job: Job, priority: int, expires_s: float, as_id: str | None = None
    ) -> SubmittedJob:
        """Keep a job for a node, or for the best one of a selector, and return it; one that is there under that id, return as it is.

        Raises Refused as `submit`, and where there is no node, JobConflict.
        """
        view, placed = self._store.job(as_id) if as_id is not None else None, None
        if view is None:
            placed = self._rollouts.best(job, selector) if node is None else None
            view = self.submit(placed.node if placed else str(node), job, priority, expires_s, as_id=as_id)
        if as_id is not None:
            _check_same(view, node, job, priority, expires_s)
        return SubmittedJob(**{name: getattr(view, name) for name in view.__struct_fields__}, placed=placed)

    def submit(
        self,
        node: str,
        job: Job,
        priority: int,
        expires_s: float,
        *,
        retry_of: str | None = None,
        rollout: str | None = None,
        fingerprint: str | None = None,
        as_id: str | None = None,
    ) -> JobView:
        """Keep a job and return it; where one has its id, return that.

        Raises Refused where its node is unknown or does not take it, or a file is missing.
        """
        order, envelope = self._order(node, job, priority, expires_s, fingerprint, as_id)
        if not self._store.add_job(order, envelope, retry_of, rollout):  # by another coordinator, in this moment
            return self.job(order.id)
        self._commands.at_once(node, order.id)
        log.info("job_created job=%s node=%s model=%s", order.id, node, job.model)
        self._changed(order.id)
        return self.job(order.id)

    def _order(
        self, node: str, job: Job, priority: int, expires_s: float, fingerprint: str | None, as_id: str | None = None
    ) -> tuple[Order, Envelope]:
        """Return the order of a job, and the envelope that it is in. Raises Refused as `submit`."""
        known = self._store.node(node)
        if known is None:
            names = ", ".join(n.id for n in self._store.nodes()) or "none"
            raise Refused(f"node {node!r} has never been seen; known nodes: {names}")
        if (why := unfit(known, job, fingerprint)) is not None:
            raise Refused(why)
        issued, evaluation = datetime.now(timezone.utc), job.dataset.evaluation_sha256
        order = Order(
            id=as_id or new_id(), fleet=self._config.fleet, node=node, issued=issued, expires=issued + timedelta(seconds=expires_s),
            job=job,
            model_fingerprint=known.info.models[job.model] if known.info is not None else None,
            dataset=self._file(job.dataset.sha256), evaluation=self._file(evaluation) if evaluation else None, priority=priority,
        )  # fmt: skip
        envelope = self._seal(order)
        read_order(envelope.payload)  # what could not be read back must not be stored
        if (size := len(self._message(Offer(envelope)))) > self._link.payload_limit // 4:
            raise Refused(
                f"the job document has {size:,} bytes, at most {self._link.payload_limit // 4:,} can be sent; shorten its prompts"
            )
        return order, envelope

    def _submit_of_rollout(self, node: str, plan: RolloutPlan, rollout: str) -> JobView:
        fingerprint = plan.selector.model_fingerprint
        return self.submit(node, plan.job, plan.priority, plan.expires_s, rollout=rollout, fingerprint=fingerprint)

    def ask_plan(self, node: str, job: Job) -> Future[PlanAnswer]:
        """Ask a node what a job would take; the answer may stay away. Raises Refused where it cannot be asked, Unknown."""
        return self._plans.ask(node, job)

    def roll_out(self, plan: RolloutPlan, dry_run: bool) -> RolloutMade:
        """Begin a rollout, or say which nodes it would have. Raises Refused where it would have none, or no job of it could be made."""
        choice = self._rollouts.choose(plan)
        if dry_run:
            return RolloutMade(rollout=None, choice=choice)
        if choice.chosen:
            self._order(choice.chosen[0].node, plan.job, plan.priority, plan.expires_s, plan.selector.model_fingerprint)
        return self._rollouts.add(plan, choice)

    def rollouts(self, state: str | None, after: str | None, limit: int) -> RolloutPage:
        return self._rollouts.page(state, after, limit)

    def rollout(self, rollout: str) -> RolloutView:
        """Return a rollout. Raises Unknown."""
        return self._rollouts.view(rollout)

    def rollout_nodes(self, rollout: str, after: str | None, limit: int) -> RolloutNodePage:
        """Return the nodes of a rollout. Raises Unknown."""
        return self._rollouts.nodes(rollout, after, limit)

    def cancel_rollout(self, rollout: str, force: bool) -> RolloutView:
        """End a rollout, and its jobs that no trainer has begun, or all. Raises Unknown."""
        return self._rollouts.cancel(rollout, force)

    def retry(self, job: str) -> JobView:
        """Hand in the document of an ended job again, as a new job for the same node. Raises Refused, Unknown."""
        view = self.job(job)
        if view.phase != "ended":
            raise Refused(f"job {job} has not ended ({view.phase}); what has not ended is not run again")
        order = view.order
        return self.submit(view.node, order.job, order.priority, (order.expires - order.issued).total_seconds(), retry_of=view.id)

    def may_have(self, node: str, sha256: str) -> bool:
        """Whether a file is one that a node may fetch."""
        return self._exchange.may_have(node, sha256)

    def awaited(self, node: str, sha256: str) -> Place | None:
        """How far a file is that is awaited from a node."""
        incoming = self._exchange.awaited(node, sha256) or self._maps.awaited(node, sha256)
        if incoming is None and self._config.shared:
            incoming = self._exchange.join(node, sha256)
        return incoming.place if incoming is not None else None

    def receive_block(self, node: str, sha256: str, number: int, block: bytes) -> None:
        self._exchange.receive_block(node, sha256, number, block)
        self._maps.receive_block(node, sha256, number, block)

    def _file(self, sha256: str) -> File:
        if self._remote is not None and (dataset := self._store.dataset(sha256)) is not None:  # its object is there, its copy may not be
            return File(sha256, dataset.size_bytes)
        if self._config.shared or not self.files.has(sha256):
            raise Refused(f"file {sha256} has not been uploaded")
        return File(sha256, self.files.path(sha256).stat().st_size)

    def job(self, job: str) -> JobView:
        """Return a job. Raises Unknown."""
        view = self._store.job(job)
        if view is None:
            raise Unknown(f"there is no job {job!r}; `edge-agent jobs` lists them")
        return view

    def jobs(self, which: JobFilter, after: str | None, limit: int) -> JobPage:
        return self._store.job_page(which, after, limit)

    def artifact(self, job: str, name: str) -> tuple[str, Path | None]:
        """Return the sha256 of a file that a job has made, or that and the place of its newest Saliency Map while it trains.

        Raises Unknown where there is none.
        """
        made = next((a.sha256 for a in self.job(job).artifacts if a.name == name), None)
        if made is not None:
            return made, None
        if name == "saliency.json" and (here := self._maps.here(job)) is not None:
            return here
        raise Unknown(f"job {job} has no {name} here")

    def ask_saliency(self, job: str) -> JobView:
        """Have the Saliency Map of a running job come as it stands. Raises Unknown, Refused where there is none."""
        view = self.job(job)
        self._maps.ask(view)
        return view

    def history(self, job: str) -> list[HistoryRow]:
        return self._store.history(self.job(job).id)

    def progress_of(self, job: str) -> list[ProgressPoint]:
        """Return what was told of the progress of a job since the coordinator's start. Raises Unknown."""
        return self._audience.track(self.job(job).id)

    def nodes(self, state: str | None, after: str | None, limit: int) -> NodePage:
        return self._store.node_page(state, after, limit)

    def datasets(self, after: str | None, limit: int) -> DatasetPage:
        return self._store.dataset_page(after, limit)

    def dataset(self, sha256: str) -> DatasetView:
        """Return a dataset. Raises Unknown."""
        view = self._store.dataset(sha256)
        if view is None:
            raise Unknown(f"there is no dataset {sha256[:80]!r}; `edge-agent datasets list` shows them")
        return view

    def check_room(self, sha256: str, size_bytes: int) -> None:
        """Raise Refused where there is no room for one more dataset."""
        limit, held = int(self._config.datasets_limit), self._store.datasets_bytes(sha256)
        if held + size_bytes > limit:
            raise Refused(
                f"the datasets here have {human_bytes(held)}, with this one of {human_bytes(size_bytes)} they would pass the limit of "
                f"{human_bytes(limit)} (`datasets_limit`); `edge-agent datasets remove` deletes what no job has"
            )

    async def file(self, sha256: str) -> Path | None:
        """Return the place of a file, fetched from the object store if need be; None where there is none. Raises FilesAway.

        This and `keep_file` are for the threads of the API: they wait for the object store, the coordinator's thread never does.
        """
        if self._remote is not None:
            return await self._remote.bring(sha256)
        return self.files.path(sha256) if self.files.has(sha256) else None

    async def keep_file(self, part: Path, sha256: str) -> None:
        """Take a file that was uploaded, and return when it lasts. Raises FilesAway where the object store does not take it now."""
        await asyncio.to_thread(self.files.take, part, sha256)
        if self._remote is not None:
            # Should an end of the process come before its dataset.
            if not await asyncio.to_thread(self.call, lambda: self._store.loosen(sha256)):
                raise self._being_deleted()
            await self._remote.secure(sha256)

    def keep_dataset(self, view: DatasetView) -> DatasetView:
        """Keep what is known of a dataset whose file is here. Raises FilesAway where the object store does not have it."""
        if self._remote is not None:
            self._remote.check(view.sha256)
        if not self._store.keep_dataset(view):
            raise self._being_deleted()
        if self._remote is not None:
            self._store.settle(view.sha256)
        return view

    def _being_deleted(self) -> FilesAway:
        return FilesAway(self._config.files.where if self._config.files else "", "the file is just being deleted; try again in a minute")

    def remove_dataset(self, sha256: str) -> DatasetView:
        """Delete a dataset. Raises Refused where a job has it, Unknown."""
        view = self.dataset(sha256)
        users = self._store.drop_dataset(sha256, self._rollouts.files, loosen=self._remote is not None)
        if users:
            more = f" and {len(users) - 1:,} more" if len(users) > 1 else ""
            raise Refused(f"dataset {sha256} is that of job {users[0]}{more}; `edge-agent forget` deletes it with its last job")
        if users is not None:
            raise Refused(f"dataset {sha256} is that of a rollout that goes on; `edge-agent rollout list` shows it")
        self._remove(sha256)
        return view

    def _standing(self) -> Standing:
        nodes, jobs, unanswered = self._store.counts()
        rollouts = self._store.rollout_states()
        files = self._remote.waiting if self._remote is not None else 0
        return Standing(
            nodes, jobs, unanswered, self._audience.size, self._store.late, self._link.dropped, self._link.connected, rollouts, files
        )

    def audit(self, request: Audited) -> None:
        """Keep a request that was to change something."""
        self._store.audit(request)

    def audited(self, after: str | None, limit: int) -> AuditPage:
        return self._store.audit_page(after, limit)

    def tokens(self) -> list[Token]:
        return self._store.tokens()

    def cancel(self, job: str) -> JobView:
        """Ask for the end of a job. One that no node has heard of, or whose node is lost, ends at once."""
        view = self.job(job)
        if view.phase == "ended":
            return view
        self._store.ask_cancel(job)
        text = "it was canceled before it was offered"
        if view.phase != "created" or not self._store.end(job, "canceled", "canceled", text, "created"):
            self._cancel_offered(view)
        self._changed(job)
        return self.job(job)

    def _cancel_offered(self, view: JobView) -> None:
        """End a job that its node may have heard of, or have it ended."""
        if view.result is not None:
            self._store.conclude(view.id, "it was canceled while its files came")
        elif view.lost:  # should the node come back with it, it is told to end it
            text = f"node {view.node} had been silent for more than {self._config.lease_s:.0f} s"
            self._store.end(view.id, "canceled", "canceled", text)
        else:
            self._commands.at_once(view.node, view.id)

    def send_options(self, job: str, fields: Mapping[str, object]) -> JobView:
        """Have a job go on with other values of some options, those that it was sent before included.

        Raises Refused, JobSchema where it cannot, Unknown.
        """
        view = self.job(job)
        if view.phase == "ended" or view.result is not None:
            raise Refused(f"job {job} has ended; `edge-agent submit` runs one with other options")
        own = view.order.job.method
        if not isinstance(own, NlftOptions):
            tag = own.__struct_config__.tag
            raise Refused(f"job {job} trains by {tag}; only options of nlft can change while a job runs")
        method = change(view.options.method if view.options else own, fields)
        check_change(own, method)
        if view.options is not None and view.options.method == method:
            return view
        sent = self._store.send_options(view, method)
        if sent is None:
            raise Refused(f"job {job} was sent {MOST_CHANGES} options, the most of one job; submit a new one")
        log.info("options_sent job=%s number=%d", job, sent.number)
        self._commands.at_once(view.node, job)
        self._changed(job)
        return self.job(job)

    def forget(self, job: str) -> JobView:
        """Ask for the deletion of an ended job here and on its node. Raises Refused where it has not ended, Unknown."""
        view = self.job(job)
        if view.phase != "ended":
            raise Refused(f"job {job} has not ended ({view.phase}); `edge-agent cancel {job}` ends it")
        self._store.ask_forget(job)
        self._commands.at_once(view.node, job)
        return self.job(job)

    def drain(self, node: str, drain: bool) -> NodeView:
        """Have a node take no new jobs, or take them again, now or when it is back. Raises Unknown."""
        if self._store.node(node) is None:
            raise Unknown(f"node {node!r} has never been seen; `edge-agent nodes` lists those that have")
        self._store.set_drain(node, drain)
        self._commands.drain(node)
        return self._store.node(node)  # type: ignore[return-value]

    def listen(self, job: str, listener: Listener, heard: str | None = None) -> None:
        """Hear of a job from where it stands, or from the id `heard` on; its node tells progress more often while somebody does."""
        self._audience.join(self.job(job), listener, heard)

    def listen_to_all(self, listener: Listener, heard: str | None) -> tuple[str, bool]:
        """Hear of all jobs and nodes; see Audience.join_all."""
        return self._audience.join_all(listener, heard)

    def stop_listening(self, job: str | None, listener: Listener) -> None:
        self._audience.leave(job, listener)

    def _ask_progress(self, job: str, watch: Watch) -> None:
        view = self._store.job(job)
        if view is not None and view.phase != "ended":
            self._send(view.node, watch, "job", job, "watch", qos=0, life_s=watch.ttl_s)

    def _changed(self, job: str) -> None:
        """Tell who looks, here and elsewhere, where a job stands now."""
        self._look_at(job)
        self._others.add("job", job)

    def _look_at(self, job: str) -> None:
        if self._audience.alone:
            self._audience.skip()
        elif (view := self._store.job(job)) is not None:
            self._audience.changed(view)

    def _heard_of(self, node: str) -> None:
        if self._audience.alone:
            self._audience.skip()
        elif (view := self._store.node(node)) is not None:
            self._audience.node(view)


def _check_same(view: JobView, node: str | None, job: Job, priority: int, expires_s: float) -> None:
    """Raise JobConflict where a job is not the one that is handed in. Which nodes could have had it is kept nowhere."""
    order = view.order
    said = {
        "document": order.job == job, "node": node in (None, view.node), "priority": order.priority == priority,
        "time to expire": order.expires - order.issued == timedelta(seconds=expires_s),
    }  # fmt: skip
    for what, same in said.items():
        if not same:
            raise JobConflict(view.id, what)
