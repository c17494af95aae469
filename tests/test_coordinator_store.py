"""The coordinator's database, on SQLite and on PostgreSQL: what it heard only moves forward."""

from __future__ import annotations

import random
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import write_lines
from hypothesis import given
from hypothesis import strategies as st
from orders import make_offer, make_order
from postgres import Postgres
from sqlalchemy.exc import DBAPIError

from edge_agent.coordinator.schema import VERSIONS
from edge_agent.coordinator.store import (
    CANCELED_JOBS_OF_ROLLOUT,
    COUNT_JOBS,
    COUNT_OPEN,
    COUNT_ROLLOUT_NODES,
    COUNT_WAITING,
    COUNT_WAITING_OF_NODE,
    DUE_JOBS,
    DUE_JOBS_OF_NODE,
    FILES_OF_JOB,
    FORGOTTEN_JOBS,
    GET_HISTORY,
    GET_JOB,
    GET_SPEEDS,
    JOBS_OF_FILE,
    LIST_JOBS,
    LIST_NODES,
    MOST_HISTORY,
    MOST_TOLD,
    OPEN_JOBS,
    OPEN_JOBS_OF_NODE,
    RESULT_MESSAGE,
    RUNNING_ROLLOUTS,
    WAITING_NODES,
    WHICH_JOBS,
    WHICH_NODES,
    CoordinatorStore,
)
from edge_agent.coordinator.views import Audited, DatasetView, JobFilter, Token
from edge_agent.database import is_damage, open_database
from edge_agent.dataset_check import check
from edge_agent.job import Dataset, Job, NlftOptions
from edge_agent.messages import (
    Artifact,
    Heartbeat,
    JobResult,
    JobStatus,
    Message,
    NodeInfo,
    NodeLimits,
    NodeState,
    OptionsState,
    Order,
    Phase,
    decode,
    encode,
    new_id,
)
from edge_agent.new_options import MOST_CHANGES, NewOptions
from profiles.sensors import Reading, Resources

DIGEST, EMPTY = "d" * 64, "0" * 64
DIGEST_BYTES = bytes(range(32))
NONE = Reading(None, "no sensor")
HEARTBEAT = Heartbeat(Resources(NONE, NONE, 1, 1, 1, None, Reading(3.5), NONE, NONE), 0, None)
SUCCEEDED = JobResult(DIGEST, "succeeded", seconds=1.5, artifacts=(Artifact("result.json", EMPTY, 7),))


class Place:
    """Where a coordinator's state is: a file, or a schema of a server."""

    def __init__(self, directory: Path, postgres: Postgres | None) -> None:
        self.file, self._postgres = directory / "coordinator.sqlite", postgres
        self.server = postgres.schema() if postgres else None

    def open(self, clock: Callable[[], float] = time.monotonic) -> CoordinatorStore:
        return CoordinatorStore(self.file, 3600, clock, self.server)

    def run(self, sql: str) -> list[tuple[object, ...]]:
        """Run a statement beside the coordinator."""
        if self._postgres and self.server:
            return self._postgres.ask(sql, self.server.url.rpartition("%3D")[2])
        with closing(sqlite3.connect(self.file)) as db, db:
            return db.execute(sql).fetchall()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def places(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Place]:
    postgres = request.getfixturevalue("postgres") if request.param == "postgresql" else None
    return lambda: Place(tmp_path_factory.mktemp("state"), postgres)


@pytest.fixture
def place(places: Callable[[], Place]) -> Place:
    return places()


@pytest.fixture
def kept(place: Place) -> Iterator[CoordinatorStore]:
    with closing(place.open()) as store:
        yield store


@pytest.fixture(scope="module")
def one_for_all(places: Callable[[], Place]) -> Iterator[CoordinatorStore]:
    """For examples that are drawn, each with jobs of its own."""
    with closing(places().open()) as store:
        yield store


def _add(store: CoordinatorStore, node: str = "n") -> str:
    document = Job(model="tiny", dataset=Dataset(EMPTY), budget_bytes=2**30)
    order = make_order(document, 0, node=node)
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
def test_any_order_ends_in_the_newest_status(order: list[int], again: list[int], seed: int, one_for_all: CoordinatorStore) -> None:
    """However statuses are reordered and repeated, the job ends where the newest one says, each is in the history once, and the
    number of the job never goes back. A status is reported as in order exactly if it is the next one, or known already."""
    phases: list[Phase] = ["accepted", "staging", "ready", "running", "ready", "running", "paused"]
    messages = {seq: _status(phase, seq) for seq, phase in enumerate(phases, start=1)}
    arriving = [*order, *again]
    random.Random(seed).shuffle(arriving)
    store, heard, highest = one_for_all, set[int](), 0
    job = _add(store)
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


def test_jobs_survive_a_restart_of_the_coordinator(place: Place) -> None:
    """Jobs, history, requests to cancel and nodes are the same after the database is opened again."""
    with closing(place.open()) as store:
        job, other = _add(store), _add(store)
        store.offered(other)
        store.ask_cancel(job)
        _apply(store, job, _status("accepted", 1))
        _conclude(store, job, _result("canceled", 2))
        store.set_state("n", NodeState("ready", 5, 1, 0), retained=False)
        before = store.job(job), store.jobs(9), store.history(job), store.nodes()
    with closing(place.open()) as store:
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
    assert kept._db.execute("SELECT count(*) AS count FROM history") == [{"count": 5 + 1}]


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


def test_jobs_of_a_silent_node_are_lost(kept: CoordinatorStore, place: Place) -> None:
    """What the node has taken, until it speaks itself: its will and what a broker has kept are not its word."""
    waiting, taken = _add(kept), _add(kept)
    _apply(kept, taken, _status("accepted", 1))
    kept.set_state("n", NodeState("ready", 5, 1, 0), retained=False)
    assert [_lost(kept, job) for job in (waiting, taken)] == [False, False]
    place.run("UPDATE nodes SET heard = heard - 3601")
    kept.set_state("n", NodeState("lost", 5, 1, 0), retained=False)
    kept.set_state("n", NodeState("ready", 5, 2, 0), retained=True)
    assert [_lost(kept, job) for job in (waiting, taken)] == [False, True]
    assert [view.id for view in kept.open_jobs() if view.lost] == [taken]
    kept.set_heartbeat("n", HEARTBEAT)
    assert not _lost(kept, taken)


def test_node_is_silent_only_while_the_coordinator_listens(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a clock that jumps nor a coordinator that was away has the jobs of a node lost."""
    with closing(place.open()) as store:
        job = _add(store)
        store.set_state("n", NodeState("ready", 5, 1, 0), retained=False)
        _apply(store, job, _status("accepted", 1))
        monkeypatch.setattr("edge_agent.coordinator.store.time.time", lambda: 4.1e9)
        assert not _lost(store, job)
    now = 7.0
    with closing(place.open(lambda: now)) as store:
        assert not _lost(store, job)
        now += 3601
        assert _lost(store, job)


def test_epoch_grows_with_every_start(place: Place) -> None:
    """Also where the clock has not gone on, or stands in the past."""
    epochs = []
    for _ in range(3):
        with closing(place.open()) as store:
            epochs.append(store.epoch)
    assert epochs == sorted(set(epochs))


def test_status_and_history_are_one_transaction(kept: CoordinatorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the job cannot be changed, the message is not known either: it comes again and counts."""
    job = _add(kept)
    message = _status("accepted", 1)
    with monkeypatch.context() as broken:
        broken.setattr("edge_agent.coordinator.store.SET_STATUS", "UPDATE nowhere SET phase = :phase")
        with pytest.raises((sqlite3.OperationalError, DBAPIError)):
            _apply(kept, job, message)
    assert kept.history(job) == []
    assert _apply(kept, job, message)
    assert [(row.seq, row.late) for row in kept.history(job)] == [(1, False)]


def test_full_disk_keeps_nothing_of_a_transaction(tmp_path: Path) -> None:
    """It is told as sqlite3 tells it; with room again the same message counts."""
    with closing(CoordinatorStore(tmp_path / "coordinator.sqlite", 3600)) as store:
        job = _add(store)
        long = [decode(encode(JobStatus(DIGEST, "running", None, text="x" * 900), "edge1/f/n", seq=seq), JobStatus) for seq in range(1, 99)]
        store._db.execute(f"PRAGMA max_page_count = {store._db.execute('PRAGMA page_count')[0]['page_count'] + 2}")
        with pytest.raises(sqlite3.OperationalError, match="database or disk is full"):
            list(map(partial(_apply, store, job), long))
        view = store.job(job)
        assert view is not None
        stored = view.seq
        assert 0 < stored < len(long)
        assert [row.seq for row in store.history(job)] == [*range(1, stored + 1)]
        store._db.execute("PRAGMA max_page_count = 100000")
        assert _apply(store, job, long[stored])
        assert [row.seq for row in store.history(job)] == [*range(1, stored + 2)]


def test_file_that_breaks_while_it_is_open(tmp_path: Path) -> None:
    """It is told as sqlite3 tells damage, by which the coordinator ends."""
    with closing(CoordinatorStore(tmp_path / "coordinator.sqlite", 3600)) as store:
        for _ in range(50):
            _add(store)
        store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        store._db.execute("PRAGMA cache_size = 1")
        file = tmp_path / "coordinator.sqlite"
        with file.open("r+b") as broken:
            broken.seek(4096)
            broken.write(b"\xff" * (file.stat().st_size - 4096))
        with pytest.raises(sqlite3.DatabaseError, match="malformed") as raised:
            store.jobs(99)
        assert is_damage(raised.value)


def test_lists_have_pages_and_conditions(kept: CoordinatorStore) -> None:
    """Pages end where the next one begins, whatever is asked for; names are sorted by their bytes."""
    jobs = [_add(kept, node) for node in ("b", "a", "b", "b")]
    kept.end(jobs[2], "expired", "expired", None)
    for node in ("ab", "a-b", "a1"):
        kept.set_state(node, NodeState("ready" if node == "a1" else "lost", 1, 1, 0), retained=False)
    assert _pages(lambda after: kept.job_page(JobFilter(), after, 2)) == [[jobs[3], jobs[2]], [jobs[1], jobs[0]]]
    assert _pages(lambda after: kept.job_page(JobFilter(node="b"), after, 2)) == [[jobs[3], jobs[2]], [jobs[0]]]
    assert _pages(lambda after: kept.job_page(JobFilter(node="b", phase="created"), after, 9)) == [[jobs[3], jobs[0]]]
    assert _pages(lambda after: kept.job_page(JobFilter(outcome="expired"), after, 9)) == [[jobs[2]]]
    assert _pages(lambda after: kept.node_page(None, after, 2)) == [["a-b", "a1"], ["ab"]]
    assert _pages(lambda after: kept.node_page("lost", after, 1)) == [["a-b"], ["ab"]]
    assert [view.id for view in kept.open_jobs("b")] == [jobs[0], jobs[3]]
    assert set(kept.due_nodes()) == set()
    kept.set_state("b", NodeState("ready", 1, 1, 0), retained=False)
    assert set(kept.due_nodes()) == {"b"}
    assert kept.counts() == ({"ready": 2, "lost": 2}, {("created", ""): 3, ("ended", "expired"): 1}, 0)


def _pages(page: Callable[[str | None], Any]) -> list[list[str]]:
    found, after = [], None
    while True:
        now = page(after)
        found.append([item.id for item in now.items])
        if now.next is None:
            return found
        after = now.next


def test_tokens_datasets_and_audit_come_back_as_they_were_kept(place: Place) -> None:
    """After the database is opened again; of the requests the last ones, numbered on."""
    token = Token(name="grafana", scope="read", created=1.5, expires=None)
    with closing(place.open()) as store:
        store.add_token(token, DIGEST_BYTES)
        dataset = _dataset(place.file.with_name("data.jsonl"))
        store.keep_dataset(dataset)
        for status in (200, 409):
            store.audit(Audited(time=2.5, who="local", address=None, what="POST /v1/jobs", made=None, status=status))
    with closing(place.open()) as store:
        assert store.token_digests() == {"grafana": (token, DIGEST_BYTES)}
        assert (store.dataset(dataset.sha256), store.dataset_page(None, 9).items) == (dataset, [dataset])
        first = store.audit_page(None, 1)
        assert [[row.status for row in page.items] for page in (first, store.audit_page(first.next, 1))] == [[409], [200]]
        store.delete_token("grafana")
        store.delete_dataset(dataset.sha256)
        assert (store.tokens(), store.dataset(dataset.sha256)) == ([], None)


def _dataset(path: Path) -> DatasetView:
    found, _ = check(write_lines(path, {"question": "How many?", "answer": "7"}))
    return DatasetView(sha256=found.sha256, name=path.name, size_bytes=path.stat().st_size, uploaded=3.5, found=found)


def test_audit_keeps_the_newest(kept: CoordinatorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than so many requests are kept."""
    monkeypatch.setattr("edge_agent.coordinator.store.MOST_AUDITED", 3)
    for status in range(200, 206):
        kept.audit(Audited(time=2.5, who="local", address="::1", what="POST /v1/jobs", made="/v1/jobs/1", status=status))
    assert [row.status for row in kept.audit_page(None, 9).items] == [205, 204, 203]


def test_text_may_hold_any_character(kept: CoordinatorStore) -> None:
    """One of number 0 too, which PostgreSQL has no room for, in what a node says and in what somebody asks for."""
    job = _add(kept)
    text = "odd: \0 \x01 \u2028 \U0001f525 %s :name '\""
    status = JobStatus(DIGEST, "running", None, text=text)
    assert _apply(kept, job, decode(encode(status, "edge1/f/n", seq=1, attempt=1), JobStatus))
    assert [row.text for row in kept.history(job)] == [text.replace("\0", "\u2400")]
    assert kept.job("\0") is None
    assert kept.job_page(JobFilter(node="n\0"), None, 9).items == []
    result = JobResult(DIGEST, "failed", text=text)
    _conclude(kept, job, decode(encode(result, "edge1/f/n", seq=2, attempt=1), JobResult))
    view = kept.job(job)
    assert view is not None
    assert view.result == result


def test_drain_has_a_number_above_all_that_were_told(kept: CoordinatorStore) -> None:
    """Whatever a node says to have done; a number that nobody may reach is not believed."""
    kept.set_state("n", NodeState("ready", 1, 1, 7), retained=False)
    kept.set_drain("n", True)
    node = kept.node("n")
    assert node is not None
    assert (node.drain, node.drain_command, node.told) == (True, 8, 7)
    kept.set_state("n", NodeState("ready", 1, 2, 2**53 - 1), retained=False)
    kept.set_drain("n", False)
    node = kept.node("n")
    assert node is not None
    assert (node.drain, node.drain_command) == (False, MOST_TOLD + 1)
    kept.set_drain("nobody", True)
    assert kept.node("nobody") is None


def test_options_have_a_number_above_all_that_were_told(place: Place) -> None:
    """What a node says of them is kept beside them, by newer statuses only; there are no more than one job may have."""
    options = NlftOptions(correct_threshold=0.5)
    with closing(place.open()) as store:
        job = _add(store)

        def send() -> NewOptions | None:
            view = store.job(job)
            assert view is not None
            return store.send_options(view, options)

        def told(seq: int, state: OptionsState | None) -> None:
            status = JobStatus(DIGEST, "running", options=state)
            _apply(store, job, decode(encode(status, "edge1/f/n", seq=seq, attempt=1), JobStatus))

        assert [send(), send()] == [NewOptions(1, options), NewOptions(2, options)]
        told(1, OptionsState(7, 5, 30, "why not"))
        told(1, OptionsState(1))
        assert send() == NewOptions(8, options)
    with closing(place.open()) as store:
        view = store.job(job)
        assert view is not None
        assert (view.options, view.options_state) == (NewOptions(8, options), OptionsState(7, 5, 30, "why not"))
        assert view.options_due
        told(2, OptionsState(8, 8, 31))
        told(3, None)
        view = store.job(job)
        assert view is not None
        assert (view.options_state, view.options_due) == (None, True)
        told(4, OptionsState(MOST_CHANGES))
        assert send() is None


def test_files_to_delete_are_noted(place: Place) -> None:
    """Once each, with the job that had them, until they are gone; also by the next process."""
    with closing(place.open()) as store:
        job = _add(store)
        store.loosen("a" * 64)
        view = store.job(job)
        assert view is not None
        assert store.delete_job(view, lambda: {"b" * 64}, loosen=True) == {EMPTY}
        store.loosen("b" * 64)
        store.settle("b" * 64)
        store.settle("d" * 64)
    with closing(place.open()) as store:
        assert store.job(job) is None
        assert store.loose_files() == {"a" * 64, EMPTY}


@pytest.mark.parametrize("version", range(1, len(VERSIONS)))
def test_file_of_an_earlier_version_is_taken_over(version: int, place: Place) -> None:
    """By a later file, or by a server that has nothing yet: jobs, history and nodes are what they were, in their order, and go on."""
    orders = _fill_old(place.file, version)
    for _ in range(2):
        with closing(place.open()) as store:
            assert [view.order for view in store.jobs(9)] == orders[::-1]
            view = store.job(orders[0].id)
            assert view is not None
            assert (view.phase, view.cancel, view.retry_of, view.created) == ("running", True, None, 1.25)
            assert store.envelope(orders[1].id) == make_offer(orders[1]).order
            assert store.files_of_jobs() == store.files_of_open_jobs() == {EMPTY}
            assert store.drop_dataset(EMPTY, set, loosen=False) == [orders[1].id, orders[0].id]
            assert [(row.seq, row.late) for row in store.history(view.id)] == [(2, False), (1, True)]
            assert [(node.id, node.boot, node.drain, node.told) for node in store.nodes()] == [("n", 5, True, 0)]
            assert store.epoch > 7
            assert store.clock.now() == pytest.approx(12.5, abs=60)
            assert [token.name for token in store.tokens()] == ["old"] * (version >= 4)
            assert [row.status for row in store.audit_page(None, 9).items] == [204] * (version >= 4)
    with closing(place.open()) as store:
        third = _add(store)
        store.audit(Audited(time=2.5, who="local", address=None, what="POST /v1/jobs", made=None, status=201))
        assert [view.id for view in store.jobs(9)] == [third, orders[1].id, orders[0].id]
        assert store.audit_page(None, 1).items[0].status == 201
    if place.server is not None:
        assert not place.file.exists()
        assert place.file.with_name("coordinator.sqlite.taken-over").exists()


def _fill_old(path: Path, version: int) -> list[Order]:
    """Write a file as the coordinator of an earlier version did; the job that came first is the later one by its id."""
    orders = [make_order(Job(model="tiny", dataset=Dataset(EMPTY), budget_bytes=2**30), 0, node="n", id=new_id()) for _ in range(2)]
    with closing(open_database(path, VERSIONS[:version])) as db:
        for order in orders:
            envelope = msgspec.json.encode(make_offer(order).order)
            columns = "id, node, digest, envelope, created, changed, phase, cancel"
            db.execute(f"INSERT INTO jobs ({columns}) VALUES (?, 'n', ?, ?, 1.25, 1, 'running', 1)", (order.id, DIGEST, envelope))  # noqa: S608
        for seq, late in ((2, 0), (1, 1)):
            row = (new_id(), orders[0].id, seq, late)
            db.execute("INSERT INTO history (message, job, time, seq, phase, late) VALUES (?, ?, 1, ?, 'running', ?)", row)
        db.execute("INSERT INTO nodes (id, state, boot, conn, seen, drain) VALUES ('n', 'ready', 5, 1, 1, 1)")
        db.execute("INSERT INTO meta VALUES ('epoch', 7), ('ran_s', 12.5)")
        if version >= 4:
            db.execute("INSERT INTO tokens VALUES ('old', ?, 'read', 1, NULL)", (DIGEST_BYTES,))
            db.execute("INSERT INTO audit VALUES (41, 1, 'local', NULL, 'POST /v1/jobs', NULL, 204)")
    return orders


def test_lists_take_an_index(place: Place) -> None:
    """No list, nor what is looked for with every message, reads all jobs."""
    asked = [
        (LIST_JOBS.format(which=condition), "jobs") for name, condition in WHICH_JOBS.items() if name != "before"
    ] + [
        (query, "jobs") for query in (
            OPEN_JOBS, OPEN_JOBS_OF_NODE, FORGOTTEN_JOBS, GET_JOB, COUNT_JOBS, COUNT_OPEN, GET_SPEEDS, CANCELED_JOBS_OF_ROLLOUT,
            COUNT_ROLLOUT_NODES, DUE_JOBS, DUE_JOBS_OF_NODE, COUNT_WAITING, COUNT_WAITING_OF_NODE,
        )
    ]  # fmt: skip
    asked += [(WAITING_NODES, "rollout_nodes"), (RUNNING_ROLLOUTS, "rollouts")]
    asked += [(JOBS_OF_FILE, "jobs"), (JOBS_OF_FILE, "job_files"), (FILES_OF_JOB, "job_files")]
    asked += [(LIST_NODES.format(which=WHICH_NODES["state"]), "nodes"), (GET_HISTORY, "history"), (RESULT_MESSAGE, "history")]
    values = {"silent": "0", "limit": "101", "most": "3"}
    place.open().close()
    for query, table in asked:
        sql = re.sub(r":(\w+)", lambda name: values.get(name[1], "'x'"), query)
        if place.server is None:
            plan = [str(row[3]) for row in place.run(f"EXPLAIN QUERY PLAN {sql}")]
            scans = [line for line in plan if line.startswith(f"SCAN {table}") and "INDEX" not in line]
        else:
            plan = [str(row[0]) for row in place.run(f"SET enable_seqscan = off; EXPLAIN {sql}")]
            scans = [line for line in plan if f"Seq Scan on {table}" in line]
        assert scans == [], (query, plan)


def _lost(store: CoordinatorStore, job: str) -> bool:
    view = store.job(job)
    assert view is not None
    return view.lost
