"""The coordinator's database: what it heard only moves forward."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orders import make_offer, make_order

from edge_agent.coordinator.store import MOST_HISTORY, VERSIONS, CoordinatorStore
from edge_agent.database import open_database
from edge_agent.job import Dataset, Job
from edge_agent.messages import (
    Artifact,
    Heartbeat,
    JobResult,
    JobStatus,
    Message,
    NodeInfo,
    NodeLimits,
    NodeState,
    Phase,
    decode,
    encode,
)
from profiles.sensors import Reading, Resources

DIGEST, EMPTY = "d" * 64, "0" * 64
NONE = Reading(None, "no sensor")
HEARTBEAT = Heartbeat(Resources(NONE, NONE, 1, 1, 1, None, Reading(3.5), NONE, NONE), 0, None)
SUCCEEDED = JobResult(DIGEST, "succeeded", seconds=1.5, artifacts=(Artifact("result.json", EMPTY, 7),))


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[CoordinatorStore]:
    with closing(CoordinatorStore(tmp_path / "coordinator.sqlite", 3600)) as store:
        yield store


def _add(store: CoordinatorStore) -> str:
    document = Job(model="tiny", dataset=Dataset(EMPTY), budget_bytes=2**30)
    order = make_order(document, 0, node="n")
    store.add_job(order, make_offer(order).order)
    return order.id


def _status(phase: Phase, seq: int | None, *, attempt: int | None = 1) -> Message[JobStatus]:
    status = JobStatus(DIGEST, phase, "rejected" if phase == "ended" else None)
    return decode(encode(status, "edge1/f/n", seq=seq, attempt=attempt), JobStatus)


def _result(outcome: Any, seq: int | None) -> Message[JobResult]:
    return decode(encode(JobResult(DIGEST, outcome), "edge1/f/n", seq=seq, attempt=1), JobResult)


def _apply(store: CoordinatorStore, job: str, message: Message[JobStatus]) -> bool:
    view = store.job(job)
    assert view is not None
    return store.apply_status(view, message)


def _conclude(store: CoordinatorStore, job: str, message: Message[JobResult]) -> None:
    view = store.job(job)
    assert view is not None
    store.apply_result(view, message)


def test_repeated_message_is_kept_once(kept: CoordinatorStore) -> None:
    """The same message again, as MQTT delivers it, adds nothing to the history, changes nothing and is no gap."""
    job = _add(kept)
    first, second = _status("accepted", 1), _status("staging", 2)
    assert _apply(kept, job, first)
    assert _apply(kept, job, second)
    before = kept.job(job), kept.history(job)
    for message in (second, first, second):
        assert _apply(kept, job, message)
    assert (kept.job(job), kept.history(job)) == before
    assert [(row.seq, row.phase, row.late) for row in kept.history(job)] == [(1, "accepted", False), (2, "staging", False)]


def test_repeated_result_is_kept_once(kept: CoordinatorStore) -> None:
    """Only the first result counts; it waits in `finalizing` until its files are there, and others are kept as late."""
    job = _add(kept)
    result = _result("succeeded", 1)
    for message in (result, result, _result("failed", 2)):
        _conclude(kept, job, message)
    view = kept.job(job)
    assert view is not None
    assert (view.phase, view.outcome, view.result) == ("finalizing", None, result.data)
    assert sorted((row.seq, row.outcome, row.late) for row in kept.history(job)) == [(1, "succeeded", False), (2, "failed", True)]


def test_late_status_changes_nothing(kept: CoordinatorStore) -> None:
    """A gap is reported and the newer status taken; the older one that comes then is kept as late and the job stays where it is."""
    job = _add(kept)
    assert _apply(kept, job, _status("accepted", 1))
    assert not _apply(kept, job, _status("running", 4, attempt=2))
    view = kept.job(job)
    assert not _apply(kept, job, _status("staging", 2))
    assert not _apply(kept, job, _status("ready", 3))
    assert kept.job(job) == view
    assert view is not None
    assert (view.phase, view.seq, view.attempt) == ("running", 4, 2)
    assert sorted((row.seq, row.late) for row in kept.history(job)) == [(1, False), (2, True), (3, True), (4, False)]
    assert _apply(kept, job, _status("paused", 5, attempt=2))


def test_first_status_that_is_missing_is_a_gap(kept: CoordinatorStore) -> None:
    """The first message about a job has number 1; if another one comes first, something was lost."""
    assert not _apply(kept, _add(kept), _status("staging", 2))


@given(order=st.permutations(range(1, 8)), again=st.lists(st.integers(1, 7), max_size=6), seed=st.integers(0, 99))
def test_any_order_ends_in_the_newest_status(order: list[int], again: list[int], seed: int) -> None:
    """However statuses are reordered and repeated, the job ends where the newest one says, each is in the history once, and the
    number of the job never goes back. A status is reported as in order exactly if it is the next one, or known already."""
    phases: list[Phase] = ["accepted", "staging", "ready", "running", "ready", "running", "paused"]
    messages = {seq: _status(phase, seq) for seq, phase in enumerate(phases, start=1)}
    arriving = [*order, *again]
    random.Random(seed).shuffle(arriving)
    with TemporaryDirectory() as directory, closing(CoordinatorStore(Path(directory) / "c.sqlite", 3600)) as store:
        job = _add(store)
        heard: set[int] = set()
        highest = 0
        for seq in arriving:
            assert _apply(store, job, messages[seq]) == (seq in heard or seq == highest + 1)
            heard.add(seq)
            highest = max(highest, seq)
            view = store.job(job)
            assert view is not None
            assert (view.seq, view.phase) == (highest, phases[highest - 1])
        assert sorted(row.seq or 0 for row in store.history(job)) == list(range(1, 8))


def test_ended_job_never_changes(kept: CoordinatorStore) -> None:
    """Neither a newer status nor a result moves a job that has ended; both are kept as late."""
    job = _add(kept)
    _apply(kept, job, _status("accepted", 1))
    kept.end(job, "expired", "expired", "no answer")
    before = kept.job(job)
    _apply(kept, job, _status("running", 2))
    _apply(kept, job, _status("ended", None, attempt=None))
    _conclude(kept, job, _result("succeeded", 3))
    assert kept.job(job) == before
    assert before is not None
    assert (before.phase, before.outcome, before.result) == ("ended", "expired", None)
    assert [row.late for row in kept.history(job)] == [False, True, True, True]
    assert kept.open_jobs() == []


def test_jobs_survive_a_restart_of_the_coordinator(tmp_path: Path) -> None:
    """Jobs, history, requests to cancel and nodes are the same after the file is opened again."""
    path = tmp_path / "coordinator.sqlite"
    with closing(CoordinatorStore(path, 3600)) as store:
        job, other = _add(store), _add(store)
        store.offered(other)
        store.ask_cancel(job)
        _apply(store, job, _status("accepted", 1))
        _conclude(store, job, _result("canceled", 2))
        store.set_state("n", NodeState("ready", 5, 1, 0), retained=False)
        before = store.job(job), store.jobs(9), store.history(job), store.nodes()
    with closing(CoordinatorStore(path, 3600)) as store:
        assert (store.job(job), store.jobs(9), store.history(job), store.nodes()) == before
        assert [view.id for view in store.jobs(9)] == [other, job]
        assert [(view.id, view.phase, view.cancel) for view in store.open_jobs()] == [(job, "finalizing", True), (other, "offered", False)]


@pytest.mark.parametrize(
    ("state", "taken"),
    [
        (NodeState("lost", 4, 9, 0), False),
        (NodeState("lost", 5, 1, 0), False),
        (NodeState("lost", 5, 2, 0), True),
        (NodeState("draining", 5, 3, 0), True),
        (NodeState("ready", 6, 1, 0), True),
    ],
)
def test_state_of_an_earlier_connection_is_ignored(state: NodeState, taken: bool, kept: CoordinatorStore) -> None:
    """The last will of a connection that a newer one has replaced says nothing about the node."""
    assert kept.set_state("n", NodeState("ready", 5, 2, 0), retained=False)
    before = kept.node("n")
    assert kept.set_state("n", state, retained=False) == taken
    after = kept.node("n")
    assert before is not None
    assert after is not None
    if taken:
        assert (after.state, after.boot, after.conn) == (state.state, state.boot, state.conn)
    else:
        assert after == before


def test_no_number_of_a_start_is_the_last(kept: CoordinatorStore) -> None:
    """Whoever speaks in a node's name tells the highest that is believed: the node, which hears of it, still comes above it."""
    for boot, taken in ((2**53 - 1, False), (2**40 + 1, False), (1_800_000_000, True), (2**53 - 1, False), (2**40, True), (2**41, False)):
        assert kept.set_state("n", NodeState("ready", boot, 2**53 - 1, 0), retained=False) == taken
    assert not kept.set_state("n", NodeState("ready", 1_800_000_001, 1, 0), retained=False)
    assert kept.set_state("n", NodeState("ready", 2**40 + 1, 1, 0), retained=False)


def test_history_is_bounded(kept: CoordinatorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that speaks of a job for ever, also of one that has ended, does not fill the disk; another job's history stays."""
    assert MOST_HISTORY >= 100
    monkeypatch.setattr("edge_agent.coordinator.store.MOST_HISTORY", 5)
    job, other = _add(kept), _add(kept)
    assert _apply(kept, other, _status("accepted", 1))
    for seq in range(1, 10):
        _apply(kept, job, _status("staging", seq))
    kept.end(job, "failed", "internal", None)
    _conclude(kept, job, _result("failed", 10))
    assert [row.seq for row in kept.history(job)] == [6, 7, 8, 9, 10]
    assert kept._db.execute("SELECT count(*) FROM history").fetchone()[0] == 5 + 1


def test_node_before_its_first_state(kept: CoordinatorStore) -> None:
    """What a node can do may come before its presence, which then counts whatever its numbers; it is not present until then."""
    limits = NodeLimits(2**30, 2**20, 16)
    info = NodeInfo("0.1.0", "3.11", "some device", "cpu", None, {"tiny": None}, limits, {})
    kept.set_info("n", info)
    node = kept.node("n")
    assert node is not None
    assert (node.state, node.present, node.info) == ("init", False, info)
    assert kept.set_state("n", NodeState("ready", 1, 1, 0), retained=False)
    kept.set_heartbeat("n", HEARTBEAT)
    node = kept.node("n")
    assert node is not None
    assert (node.present, node.info, node.heartbeat) == (True, info, HEARTBEAT)


def test_jobs_of_a_silent_node_are_lost(kept: CoordinatorStore, tmp_path: Path) -> None:
    """What the node has taken, until it speaks itself: its will and what a broker has kept are not its word."""
    waiting, taken = _add(kept), _add(kept)
    _apply(kept, taken, _status("accepted", 1))
    kept.set_state("n", NodeState("ready", 5, 1, 0), retained=False)
    assert [_lost(kept, job) for job in (waiting, taken)] == [False, False]
    with closing(sqlite3.connect(tmp_path / "coordinator.sqlite")) as db, db:
        db.execute("UPDATE nodes SET heard = heard - 3601")
    kept.set_state("n", NodeState("lost", 5, 1, 0), retained=False)
    kept.set_state("n", NodeState("ready", 5, 2, 0), retained=True)
    assert [_lost(kept, job) for job in (waiting, taken)] == [False, True]
    assert [view.id for view in kept.open_jobs() if view.lost] == [taken]
    kept.set_heartbeat("n", HEARTBEAT)
    assert not _lost(kept, taken)


def test_node_is_silent_only_while_the_coordinator_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a clock that jumps nor a coordinator that was away has the jobs of a node lost."""
    path = tmp_path / "coordinator.sqlite"
    with closing(CoordinatorStore(path, 3600)) as store:
        job = _add(store)
        store.set_state("n", NodeState("ready", 5, 1, 0), retained=False)
        _apply(store, job, _status("accepted", 1))
        monkeypatch.setattr("edge_agent.coordinator.store.time.time", lambda: 4.1e9)
        assert not _lost(store, job)
    now = 7.0
    with closing(CoordinatorStore(path, 3600, lambda: now)) as store:
        assert not _lost(store, job)
        now += 3601
        assert _lost(store, job)


def test_file_of_the_first_version_is_brought_up(tmp_path: Path) -> None:
    """A database from before there were tokens and datasets keeps its jobs, and has them from then on."""
    path = tmp_path / "coordinator.sqlite"
    order = make_order(Job(model="tiny", dataset=Dataset(EMPTY), budget_bytes=2**30), 0, node="n")
    with closing(open_database(path, VERSIONS[:1])) as db:
        envelope = msgspec.json.encode(make_offer(order).order)
        columns = "id, node, digest, envelope, created, changed, phase"
        db.execute(f"INSERT INTO jobs ({columns}) VALUES (?, 'n', ?, ?, 1, 1, 'created')", (order.id, DIGEST, envelope))  # noqa: S608
    with closing(CoordinatorStore(path, 3600)) as store:
        view = store.job(order.id)
        assert view is not None
        assert (view.order, view.retry_of, store.envelope(order.id)) == (order, None, make_offer(order).order)
        assert (store.tokens(), store.dataset_page(None, 9).items, store.audit_page(None, 9).items) == ([], [], [])


def _lost(store: CoordinatorStore, job: str) -> bool:
    view = store.job(job)
    assert view is not None
    return view.lost
