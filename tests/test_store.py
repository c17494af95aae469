"""The agent's database: what it promised survives any end of its process. And what both databases have in common."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise, product
from pathlib import Path
from queue import SimpleQueue
from typing import Any, get_args

import msgspec
import pytest

from edge_agent.clocks import KEEP_S
from edge_agent.coordinator.store import CoordinatorStore
from edge_agent.database import open_database
from edge_agent.errors import StateDamaged, StateUnusable
from edge_agent.job import NlftOptions
from edge_agent.messages import (
    Artifact,
    JobResult,
    JobStatus,
    Message,
    OptionsState,
    Phase,
    decode,
    encode,
    new_id,
)
from edge_agent.new_options import NewOptions
from edge_agent.serving import serve
from edge_agent.store import CLOSED_S, MOST_CLOSED, TRANSITIONS, VERSIONS, JobRow, Store, Waiting
from edge_agent.topics import up

PHASES: tuple[Phase, ...] = get_args(Phase)
DIGEST, OTHER_DIGEST, EMPTY = "d" * 64, "e" * 64, "0" * 64
DEADLINE_S = 60.0
SUCCEEDED = JobResult(DIGEST, "succeeded", seconds=1.5, artifacts=(Artifact("result.json", EMPTY, 7),))
# How a new job comes to each phase.
WAYS: dict[Phase, tuple[Phase, ...]] = {
    "accepted": (),
    "staging": ("staging",),
    "ready": ("staging", "ready"),
    "running": ("staging", "ready", "running"),
    "paused": ("staging", "ready", "running", "paused"),
    "finalizing": ("staging", "ready", "running", "finalizing"),
    "ended": ("ended",),
}


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _open(path: Path, clock: Callable[[], float] = time.monotonic) -> Store:
    return Store(path, "f", "n", clock)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    with closing(_open(tmp_path / "agent.sqlite", clock)) as store:
        yield store


def _accept(store: Store, priority: int = 4) -> str:
    job = new_id()
    store.accept(job, DIGEST, b"{}", priority)
    return job


def _go(store: Store, job: str, phase: Phase) -> None:
    if phase == "ended":
        store.end(job, SUCCEEDED)
    else:
        store.move(job, phase)


def _at(store: Store, phase: Phase) -> str:
    job = _accept(store)
    for step in WAYS[phase]:
        _go(store, job, step)
    return job


def _row(store: Store, job: str) -> JobRow:
    row = store.job(job)
    assert row is not None
    return row


def _waiting(store: Store) -> list[Waiting]:
    return [found for message in store.waiting() if (found := store.message(message))]


def _told(store: Store, job: str) -> list[Message[Any]]:
    """The messages about a job that wait, the oldest first."""
    topics: dict[str, type] = {up("f", "n", "job", job, kind): data for kind, data in (("status", JobStatus), ("result", JobResult))}
    return [decode(w.payload, topics[w.topic]) for w in _waiting(store) if w.topic in topics]


def _place(message: Message[Any]) -> tuple[str, str | None]:
    """The phase and the outcome that a message tells."""
    return ("ended" if isinstance(message.data, JobResult) else message.data.phase), message.data.outcome


# the agent's phases


def test_every_phase_but_the_last_can_end() -> None:
    """A job can be ended from wherever it is, once; the table knows every phase."""
    assert set(TRANSITIONS) == set(PHASES)
    assert {phase for phase in PHASES if "ended" in TRANSITIONS[phase]} == set(PHASES) - {"ended"}
    assert TRANSITIONS["ended"] == frozenset()


@pytest.mark.parametrize(("before", "after"), [(b, a) for b, a in product(PHASES, PHASES) if a in TRANSITIONS[b]])
def test_transition_that_is_allowed(before: Phase, after: Phase, store: Store) -> None:
    """The job is in the new phase, and exactly one message more waits that tells it."""
    job = _at(store, before)
    count = len(_told(store, job))
    _go(store, job, after)
    assert _row(store, job).phase == after
    told = _told(store, job)
    assert [m.seq for m in told] == list(range(1, count + 2))
    assert _place(told[-1]) == (after, _row(store, job).outcome)


@pytest.mark.parametrize(("before", "after"), [(b, a) for b, a in product(PHASES, PHASES) if a not in TRANSITIONS[b]])
def test_transition_that_is_not_allowed(before: Phase, after: Phase, store: Store) -> None:
    """It raises LookupError, and neither the job nor the messages that wait have changed."""
    job = _at(store, before)
    kept = _row(store, job), _waiting(store)
    with pytest.raises(LookupError, match=f"{job} cannot go from {before} to {after}"):
        _go(store, job, after)
    assert (_row(store, job), _waiting(store)) == kept


@pytest.mark.parametrize("phase", PHASES)
def test_transition_of_an_unknown_job(phase: Phase, store: Store) -> None:
    """Nothing comes into being by being moved."""
    job = new_id()
    with pytest.raises(LookupError, match=job):
        _go(store, job, phase)
    assert store.job(job) is None
    assert _waiting(store) == []


def test_job_is_not_moved_to_its_end(store: Store) -> None:
    """An end has an outcome: without one nothing changes."""
    job = _at(store, "running")
    kept = _row(store, job), _waiting(store)
    with pytest.raises(ValueError, match="an outcome belongs"):
        store.move(job, "ended")
    assert (_row(store, job), _waiting(store)) == kept


def test_start_is_counted_before_it_is_told(store: Store) -> None:
    """The message that a trainer starts carries the number of that start; an interruption is counted as a crash only if it is one."""
    job = _at(store, "ready")
    assert store.move(job, "running", start=True).attempt == 1
    assert store.move(job, "ready").crashes == 0
    store.move(job, "running", start=True)
    row = store.move(job, "ready", crashed=True)
    assert (row.attempt, row.crashes) == (2, 1)
    assert [m.attempt for m in _told(store, job)] == [0, 0, 0, 1, 1, 2, 2]


# the agent's promises


def test_accept_again_changes_nothing(store: Store) -> None:
    """An offer that comes again, also with another document, leaves one job and one message."""
    job = _accept(store)
    kept = _row(store, job), _waiting(store)
    store.accept(job, DIGEST, b"{}", 4)
    store.accept(job, OTHER_DIGEST, b"{1}", 9)
    assert (_row(store, job), _waiting(store)) == kept


def test_closed_job_keeps_its_answer(store: Store, clock: Clock) -> None:
    """What is said to an offer that must not come is kept until its order has expired, and nothing else of the job."""
    job, other = new_id(), new_id()
    status = JobStatus(DIGEST, "ended", "rejected", "busy", "full")
    store.close_job(job, status)
    assert (store.job(job), store.closed(job), store.waiting()) == (None, status, [])
    clock.now += CLOSED_S + 1
    assert store.closed(job) == status
    store.close_job(other, status)
    assert [store.closed(j) for j in (job, other)] == [None, status]


def test_closed_jobs_do_not_fill_the_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sends offers and cancels of jobs that nobody has makes the node forget the oldest of them."""
    assert MOST_CLOSED >= 1000
    monkeypatch.setattr("edge_agent.store.MOST_CLOSED", 10)
    jobs = [new_id() for _ in range(25)]
    for job in jobs:
        store.close_job(job, JobStatus(None, "ended", "rejected", "canceled"))
    assert [store.closed(job) is not None for job in jobs] == [False] * 15 + [True] * 10


def test_end_keeps_the_result(store: Store) -> None:
    """The result is in the job's row and in the message that waits, the same in both."""
    job = _at(store, "finalizing")
    store.end(job, SUCCEEDED)
    row = _row(store, job)
    assert (row.phase, row.outcome) == ("ended", "succeeded")
    assert row.result is not None
    assert msgspec.json.decode(row.result, type=JobResult) == SUCCEEDED == _told(store, job)[-1].data
    assert store.open_jobs() == []


def test_acknowledged_message_is_deleted(store: Store) -> None:
    """Each message waits until its own acknowledgement, in the order of writing; one that is not there changes nothing."""
    job = _at(store, "ready")
    first, second, third = _waiting(store)
    assert store.waiting() == [first.id, second.id, third.id]
    assert store.acknowledged(second.id)
    assert not store.acknowledged(second.id)
    assert not store.acknowledged(new_id())
    assert _waiting(store) == [first, third]
    assert _row(store, job).seq == 3


def test_job_is_unacknowledged_until_its_end_is_known(store: Store) -> None:
    """An ended job counts while any of its messages waits, an open one always."""
    ended, open_one = _at(store, "ended"), _accept(store)
    accepted, end, other = _waiting(store)
    for message in (other, accepted, end):
        assert [row.id for row in store.unacknowledged_jobs()] == [ended, open_one]
        store.acknowledged(message.id)
    assert [row.id for row in store.unacknowledged_jobs()] == [open_one]


def test_tell_again_tells_the_present(store: Store) -> None:
    """The current view is one message more, a status while the job is open and its result afterwards; but none beside one that still
    waits for its acknowledgement."""
    job = _at(store, "running")
    waiting = len(_told(store, job))
    store.tell_again(_row(store, job))
    assert len(_told(store, job)) == waiting
    _acknowledge_all(store)
    store.tell_again(_row(store, job))
    assert [_place(m) for m in _told(store, job)] == [("running", None)]
    store.end(job, SUCCEEDED)
    _acknowledge_all(store)
    store.tell_again(_row(store, job))
    [told] = _told(store, job)
    assert told.data == SUCCEEDED
    assert told.seq == waiting + 3


def _acknowledge_all(store: Store) -> None:
    for message in _waiting(store):
        store.acknowledged(message.id)


def test_options_of_a_job_are_told_with_every_status(tmp_path: Path) -> None:
    """From when they are kept, over a restart; what has become of them is kept apart from them; an ended job takes none."""
    path = tmp_path / "agent.sqlite"
    with closing(_open(path)) as store:
        job = _accept(store)
        assert _row(store, job).sent_options == OptionsState()
        store.set_options(job, OptionsState(1), NewOptions(1, NlftOptions(correct_threshold=0.5)))
        store.set_options(job, OptionsState(1, 1, 40))
    with closing(_open(path)) as store:
        row = _row(store, job)
        assert row.new_options == NewOptions(1, NlftOptions(correct_threshold=0.5))
        assert row.sent_options == OptionsState(1, 1, 40)
        _go(store, job, "staging")
        told = [(message.data.phase, message.data.options) for message in _told(store, job)]
        assert told == [
            ("accepted", None), ("accepted", OptionsState(1)), ("accepted", OptionsState(1, 1, 40)), ("staging", OptionsState(1, 1, 40)),
        ]  # fmt: skip
        _go(store, job, "ended")
        for gone in (job, new_id()):
            with pytest.raises(LookupError):
                store.set_options(gone, OptionsState(2))


def test_open_jobs_by_priority_then_arrival(store: Store) -> None:
    """Higher priority first; of equal ones whoever came first; what has ended is not there."""
    jobs = [(priority, _accept(store, priority)) for priority in (4, 9, 0, 4, 9, 4, 0)]
    store.end(jobs.pop(3)[1], SUCCEEDED)
    wanted = [job for _, job in sorted(jobs, key=lambda pair: -pair[0])]
    assert [row.id for row in store.open_jobs()] == wanted


def test_forgotten_job_leaves_its_answer_alone(store: Store) -> None:
    """It goes with what was still to be said of it; another one stays."""
    job, other = _accept(store), _accept(store)
    store.end(job, SUCCEEDED)
    status = JobStatus(DIGEST, "ended", "rejected", "replayed")
    store.forget(job, status)
    assert (store.job(job), store.closed(job)) == (None, status)
    assert [row.id for row in store.jobs()] == [other]
    assert _told(store, job) == []
    assert len(_told(store, other)) == 1


def test_job_is_settled_when_its_end_is_acknowledged(store: Store, clock: Clock) -> None:
    """Not by its earlier messages, not while another about it waits, and only once: what is said again later changes nothing."""
    job = _at(store, "ended")
    first, last = _waiting(store)
    assert store.acknowledged(last.id)
    clock.now += 61
    assert store.settled_for(60) is None
    assert store.acknowledged(first.id)
    clock.now += 61
    assert store.settled_for(60) == job
    assert store.settled_for(62) is None
    settled = _row(store, job).settled
    store.tell_again(_row(store, job))
    assert store.acknowledged(_waiting(store)[0].id)
    assert _row(store, job).settled == settled
    assert not store.acknowledged(last.id)


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    """A closed and opened store has the same jobs, requests to cancel, messages and answer to whether the node is draining."""
    path = tmp_path / "agent.sqlite"
    with closing(_open(path)) as store:
        assert not store.draining
        assert store.set_draining(True, 3)
        job = _at(store, "running")
        store.ask_cancel(job)
        kept = _row(store, job), _waiting(store)
        assert kept[0].cancel
    with closing(_open(path)) as store:
        assert (_row(store, job), _waiting(store)) == kept
        assert (store.draining, store.command) == (True, 3)
        assert store.set_draining(False, 4)
    with closing(_open(path)) as store:
        assert not store.draining


def test_newest_word_on_draining_holds(store: Store) -> None:
    """An older one changes nothing, whenever it comes; the same again is no other word."""
    for drain, number, taken in (
        (True, 2, True),
        (True, 2, True),
        (False, 2, False),
        (False, 1, False),
        (False, 5, True),
        (True, 4, False),
    ):
        assert store.set_draining(drain, number) == taken
    assert (store.draining, store.command) == (False, 5)


@pytest.mark.parametrize("number", [lambda path: _boot(_open(path)), lambda path: _epoch(path)], ids=["agent", "coordinator"])
def test_number_of_the_start_grows(number: Callable[[Path], int], tmp_path: Path) -> None:
    """Every start has a higher number, also the first one after the file was lost: what was said before is then stale."""
    path = tmp_path / "some.sqlite"
    numbers = [number(path) for _ in range(3)]
    path.unlink()
    deadline = time.monotonic() + DEADLINE_S
    while time.time() < numbers[-1] + 1:  # the number begins at the clock: seconds since 1970
        assert time.monotonic() < deadline
        time.sleep(0.05)
    numbers.append(number(path))
    assert all(later > earlier for earlier, later in pairwise(numbers))


def test_retention_counts_what_the_agent_has_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine's clock says: what was settled in 1970 is not deleted when NTP has come, nor by a clock that runs ahead."""
    path, begun = tmp_path / "agent.sqlite", [0.0, 5e8, 77.0]
    jobs: list[str] = []
    for start, wall in zip(begun, (30.0, 1.8e9, 4.1e9), strict=True):  # 1970, now, 2099; each start with a monotonic clock of its own
        clock = Clock()
        clock.now = start
        monkeypatch.setattr("edge_agent.store.time.time", lambda wall=wall: wall)
        with closing(_open(path, clock)) as store:
            assert store.settled_for(1000) is None
            jobs.append(_at(store, "ended"))
            _acknowledge_all(store)
            clock.now += 300
    with closing(_open(path, clock)) as store:
        assert [row.id for row in store.jobs()] == jobs
        assert store.settled_for(850) == jobs[0]
        clock.now += 101
        assert store.settled_for(1000) == jobs[0]


def test_running_time_of_an_agent_that_is_killed(tmp_path: Path) -> None:
    """It loses ten minutes at most, and never goes behind what was stored by it: jobs stay in their order."""
    path, clock = tmp_path / "agent.sqlite", Clock()
    killed = _open(path, clock)
    clock.now += 10_000
    first = _accept(killed)
    clock.now += KEEP_S - 1
    killed.clock.tick()
    killed._db.close()
    with closing(_open(path, clock)) as store:
        assert store.clock.now() == 10_000
        second = _accept(store)
        assert [row.id for row in store.open_jobs()] == [first, second]
        clock.now += KEEP_S
        store.clock.tick()
        store._db.close()
    with closing(_open(path, clock)) as store:
        assert store.clock.now() == 10_000 + KEEP_S


def test_start_is_numbered_above_what_the_coordinator_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the database was lost and the clock is in the past; the number is kept, and its bound is that of the wire."""
    path = tmp_path / "agent.sqlite"
    monkeypatch.setattr("edge_agent.store.time.time", lambda: 30.0)
    with closing(_open(path)) as store:
        assert store.boot == 30
        store.raise_boot(1_700_000_000)
        assert _boot_told(store) == store.boot == 1_700_000_001
    with closing(_open(path)) as store:
        assert store.boot == 1_700_000_002
        store.raise_boot(2**53 - 1)
    with closing(_open(path)) as store:
        assert _boot_told(store) == 2**53 - 1


def _boot_told(store: Store) -> int | None:
    return _told(store, _accept(store))[0].boot


def _boot(store: Store) -> int:
    with closing(store):
        store.accept(job := new_id(), DIGEST, b"{}", 4)
        assert _told(store, job)[0].boot == store.boot
        return store.boot


def _open_coordinator(path: Path) -> CoordinatorStore:
    return CoordinatorStore(path, 3600)


def _epoch(path: Path) -> int:
    with closing(_open_coordinator(path)) as store:
        return store.epoch


def _break(path: Path, broken: str) -> bytes | None:
    if broken == "directory":
        path.mkdir()
        return None
    if broken == "page":  # the last of a database with some rows
        with closing(_open(path)) as store:
            for _ in range(200):
                _accept(store)
        whole = path.read_bytes()
        path.write_bytes(whole[:-4096] + b"\xff" * 4096)
    else:
        path.write_bytes(b"not a database, but somebody's notes\n" * 100 if broken == "text" else b"SQLite format 3\0" + b"\xff" * 4096)
    return path.read_bytes()


@pytest.mark.parametrize("broken", ["text", "torn", "page", "directory"])
def test_coordinator_refuses_a_file_that_is_no_database(broken: str, tmp_path: Path) -> None:
    """It raises StateUnusable, which names the file and what to do, and the file is left as it was: nobody else has what is in it."""
    path = tmp_path / "some.sqlite"
    before = _break(path, broken)
    with pytest.raises(StateUnusable, match=r"some\.sqlite: .*; restore or remove the file") as raised:
        _open_coordinator(path)
    assert raised.value.exit_code == 13
    assert (path.read_bytes() if path.is_file() else None) == before


@pytest.mark.parametrize("broken", ["text", "torn", "page"])
def test_agent_sets_a_damaged_file_aside(broken: str, tmp_path: Path) -> None:
    """It begins anew, with a higher number of its start than before, and the file is kept under another name."""
    path = tmp_path / "agent.sqlite"
    before = _break(path, broken)
    with closing(_open(path)) as store:
        assert store.jobs() == []
        assert store.boot >= int(time.time()) - 60
        job = _accept(store)
    with closing(_open(path)) as store:
        assert [row.id for row in store.jobs()] == [job]
    [kept] = tmp_path.glob("agent.sqlite.damaged-*")
    assert kept.read_bytes() == before


def test_agent_refuses_what_is_no_file(tmp_path: Path) -> None:
    """That is not damage, but somebody's mistake."""
    _break(tmp_path / "agent.sqlite", "directory")
    with pytest.raises(StateUnusable):
        _open(tmp_path / "agent.sqlite")


@pytest.mark.parametrize("opened", [_open, _open_coordinator], ids=["agent", "coordinator"])
def test_database_without_a_version_is_left_alone(opened: Callable[[Path], Any], tmp_path: Path) -> None:
    """It is of another program."""
    path = tmp_path / "some.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE jobs (x)")
    with pytest.raises(StateUnusable, match="it has tables and no version"):
        opened(path)


@pytest.mark.parametrize("opened", [_open, _open_coordinator], ids=["agent", "coordinator"])
def test_database_of_a_later_version_is_left_alone(opened: Callable[[Path], Any], tmp_path: Path) -> None:
    """An older program does not touch what it does not know."""
    path = tmp_path / "some.sqlite"
    opened(path).close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    before = path.read_bytes()
    with pytest.raises(StateUnusable, match="its format 99 is of a later version"):
        opened(path)
    assert path.read_bytes() == before


def test_database_is_brought_up_version_by_version(tmp_path: Path) -> None:
    """From whichever it has to the last, each in a transaction: one that fails leaves the file at the one before, to be tried again."""
    path, versions = tmp_path / "some.sqlite", ["CREATE TABLE a (x);", "ALTER TABLE a ADD COLUMN y DEFAULT 7;"]
    with closing(open_database(path, versions[:1])) as db:
        db.execute("INSERT INTO a VALUES (1)")
    with pytest.raises(StateUnusable, match="no such table"):
        open_database(path, [*versions, "CREATE TABLE b (x); INSERT INTO nowhere VALUES (1);"])
    for _ in range(2):
        with closing(open_database(path, versions)) as db:
            assert [tuple(row) for row in db.execute("SELECT * FROM a")] == [(1, 7)]
            assert db.execute("PRAGMA user_version").fetchone()[0] == 2
            assert db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'b'").fetchone()[0] == 0


# older versions

REPLAYED = JobStatus(DIGEST, "ended", "rejected", "replayed")
ENDED = JobResult(DIGEST, "failed", "non_finite_loss", "as it was then")

INSERT_OLDER = """INSERT INTO jobs (id, digest, payload, priority, arrived, phase, outcome, result, attempt, crashes, cancel, seq, settled)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""


def _fill_older(path: Path, version: int) -> dict[str, str]:
    """Make a database as an agent of an older version left it; return its jobs, the oldest first, by what they are to show.

    One is acknowledged and settled, one is ended, with its result in the outbox, one runs, one waits; another was deleted.
    """
    names = ("settled", "ended", "running", "ready", "deleted")
    jobs = dict(zip(names, sorted(new_id() for _ in names), strict=True))
    with closing(open_database(path, VERSIONS[:version])) as db:
        result = msgspec.json.encode(ENDED)
        for arrived, (name, phase) in enumerate((("settled", "ended"), ("ended", "ended"), ("running", "running"), ("ready", "ready"))):
            outcome, kept = ("failed", result) if phase == "ended" else (None, None)
            row = (jobs[name], DIGEST, b"{%d}" % arrived, 4, 1.7e9 + arrived, phase, outcome, kept, 2, 1, name == "running", 7)
            db.execute(INSERT_OLDER, (*row, 1.7e9 if name == "settled" else None))
        for name, data in (("ended", ENDED), ("running", JobStatus(DIGEST, "running"))):
            message, kind = new_id(), "result" if data is ENDED else "status"
            payload = encode(data, "edge1/f/n", boot=1_600_000_000, attempt=2, seq=7, message_id=message)
            topic = up("f", "n", "job", jobs[name], kind)
            db.execute("INSERT INTO outbox (id, job, topic, payload) VALUES (?, ?, ?, ?)", (message, jobs[name], topic, payload))
        db.execute("INSERT INTO closed VALUES (?, ?, ?)", (jobs["deleted"], 1.8e9, msgspec.json.encode(REPLAYED)))
        db.executemany("INSERT INTO meta VALUES (?, ?)", [("boot", 4_000_000_000), ("draining", 1), ("command", 3)])
        if version < 5:
            db.execute("UPDATE jobs SET pid = 40, pid_ticks = 2000 WHERE id = ?", (jobs["running"],))
        if version >= 2:
            db.execute("UPDATE jobs SET ran_s = 60, cooled_s = 5 WHERE id = ?", (jobs["running"],))
        if version >= 3:
            db.execute("UPDATE jobs SET arrived = arrived - 1.7e9 + 50, settled = iif(settled IS NULL, NULL, 90)")
            db.execute("INSERT INTO meta VALUES ('ran_s', 100)")
            db.execute("UPDATE closed SET until = 5184100")
    return jobs


@pytest.mark.parametrize("version", range(1, len(VERSIONS) + 1))
def test_database_of_an_older_version_comes_up_with_all_that_is_in_it(version: int, tmp_path: Path, clock: Clock) -> None:
    """Jobs in their phases, in the order of their ids, what waits to be acknowledged byte for byte, who is closed, and numbers; each job
    goes on from there. Times of day have become time that the agent has run, so that nothing is deleted or ended early."""
    path = tmp_path / "agent.sqlite"
    jobs = _fill_older(path, version)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (version,)
        outbox = [Waiting(*row) for row in db.execute("SELECT id, topic, payload FROM outbox ORDER BY number")]
    for boot in (4_000_000_001, 4_000_000_002):
        with closing(_open(path, clock)) as store:
            assert store._db.execute("PRAGMA user_version").fetchone()[0] == len(VERSIONS)
            assert (store.boot, store.draining, store.command) == (boot, True, 3)
            assert _waiting(store) == outbox
            assert [row.id for row in store.jobs()] == [jobs[name] for name in ("settled", "ended", "running", "ready")]
            assert [row.phase for row in store.open_jobs()] == ["running", "ready"]
            assert [(row.attempt, row.crashes, row.seq) for row in store.jobs()] == [(2, 1, 7)] * 4
            assert [row.payload for row in store.jobs()] == [b"{%d}" % n for n in range(4)]
            running = _row(store, jobs["running"])
            assert (running.cancel, running.ran_s, running.cooled_s) == (True, 60.0 * (version > 1), 5.0 * (version > 1))
            assert (running.new_options, running.sent_options) == (None, OptionsState())
            for name in ("settled", "ended"):
                result = _row(store, jobs[name]).result
                assert result is not None
                assert msgspec.json.decode(result, type=JobResult) == ENDED
            assert store.closed(jobs["deleted"]) == REPLAYED
            assert [row.id for row in store.unacknowledged_jobs()] == [jobs[name] for name in ("ended", "running", "ready")]
            assert store.settled_for(60) is None
            now = store.clock.now()
            assert all(row.arrived <= now < row.arrived + 60 for row in store.jobs())
    with closing(_open(path, clock)) as store:
        for message in outbox:
            assert store.acknowledged(message.id)
        clock.now += 61
        assert None not in [_row(store, jobs[name]).settled for name in ("settled", "ended")]
        assert store.settled_for(60) == jobs["settled"]
        store.move(jobs["running"], "paused")
        store.set_options(jobs["ready"], OptionsState(1), NewOptions(1, NlftOptions(correct_threshold=0.5)))
        store.end(jobs["ready"], SUCCEEDED)
        told = [(m.data.outcome, m.seq, m.attempt) for m in _told(store, jobs["ready"])]
        assert told == [(None, 8, 2), ("succeeded", 9, 2)]


def test_damage_while_it_serves_ends_a_daemon() -> None:
    """Nothing that it did then would last; a disk that is full for a time does not end it."""
    events: SimpleQueue[Any] = SimpleQueue()
    said: list[object] = []

    def handle(event: object) -> None:
        said.append(event)
        if len(said) == 1:
            raise sqlite3.OperationalError("database or disk is full")
        raise sqlite3.DatabaseError("database disk image is malformed")

    events.put("an event")
    with pytest.raises(StateDamaged, match="malformed"):
        serve(events, handle, lambda _: None, lambda _: None, 0.01, lambda: None)
    assert said == ["an event", "an event"]


# one transaction

MOVER = """
import random, sys
from pathlib import Path
from edge_agent.messages import JobResult, new_id
from edge_agent.serving import serve
from edge_agent.store import TRANSITIONS, Store

rng = random.Random(int(sys.argv[2]))
store = Store(Path(sys.argv[1]), "f", "n")
while True:
    print("round", flush=True)
    for row in store.open_jobs():
        after = rng.choice(sorted(TRANSITIONS[row.phase]))
        if after == "ended":
            store.end(row.id, JobResult(row.digest, rng.choice(["succeeded", "failed", "canceled"])))
        else:
            store.move(row.id, after, start=after == "running", crashed=after == "ready" and row.phase == "running")
        if rng.random() < 0.2:
            store.tell_again(store.job(row.id))
    while len(store.open_jobs()) < 6:
        store.accept(new_id(), "d" * 64, b"{}", 4)
"""


def test_state_and_message_are_one_transaction(tmp_path: Path) -> None:
    """A process that moves jobs is killed at any moment, twelve times, each time after some rounds of moves. Afterwards each job's messages
    have every number from 1 to the last without a gap, and the last one tells the phase and outcome that the job has."""
    path, rng = tmp_path / "agent.sqlite", random.Random(7)
    for seed in range(12):
        command = [sys.executable, "-c", MOVER, str(path), str(seed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                for _ in range(rng.randint(1, 20)):
                    assert process.stdout.readline() == "round\n"
                time.sleep(rng.uniform(0.0, 0.02))
                assert process.poll() is None
            finally:
                process.kill()
            assert process.wait(DEADLINE_S) == -signal.SIGKILL
    with closing(_open(path)) as store:
        told: dict[str, list[Message[Any]]] = {}
        for waiting in _waiting(store):
            *_, job, kind = waiting.topic.split("/")
            told.setdefault(job, []).append(decode(waiting.payload, JobResult if kind == "result" else JobStatus))
        rows = store.unacknowledged_jobs()
        assert len(rows) > 100
        for row in rows:
            messages = told.pop(row.id)
            assert [m.seq for m in messages] == list(range(1, row.seq + 1))
            assert _place(messages[-1]) == (row.phase, row.outcome)
            assert messages[-1].attempt == row.attempt
        assert told == {}
