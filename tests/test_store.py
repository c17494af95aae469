"""The agent's database: what it promised survives any end of its process. And what both databases have in common."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise, product
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from edge_agent.coordinator.store import CoordinatorStore
from edge_agent.errors import StateUnusable
from edge_agent.messages import (
    Artifact,
    JobResult,
    JobStatus,
    Message,
    Phase,
    decode,
    new_id,
)
from edge_agent.store import TRANSITIONS, JobRow, Store
from edge_agent.topics import up

PHASES: tuple[Phase, ...] = get_args(Phase)
DIGEST, OTHER_DIGEST, EMPTY = "d" * 64, "e" * 64, "0" * 64
ALL = 1_000_000
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


def _open(path: Path) -> Store:
    return Store(path, "f", "n")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(_open(tmp_path / "agent.sqlite")) as store:
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


def _told(store: Store, job: str) -> list[Message[Any]]:
    """The messages about a job that wait, the oldest first."""
    topics: dict[str, type] = {up("f", "n", "job", job, kind): data for kind, data in (("status", JobStatus), ("result", JobResult))}
    return [decode(w.payload, topics[w.topic]) for w in store.waiting(ALL) if w.topic in topics]


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
    kept = _row(store, job), store.waiting(ALL)
    with pytest.raises(LookupError, match=f"{job} cannot go from {before} to {after}"):
        _go(store, job, after)
    assert (_row(store, job), store.waiting(ALL)) == kept


@pytest.mark.parametrize("phase", PHASES)
def test_transition_of_an_unknown_job(phase: Phase, store: Store) -> None:
    """Nothing comes into being by being moved."""
    job = new_id()
    with pytest.raises(LookupError, match=job):
        _go(store, job, phase)
    assert store.job(job) is None
    assert store.waiting(ALL) == []


def test_job_is_not_moved_to_its_end(store: Store) -> None:
    """An end has an outcome: without one nothing changes."""
    job = _at(store, "running")
    kept = _row(store, job), store.waiting(ALL)
    with pytest.raises(ValueError, match="an outcome belongs"):
        store.move(job, "ended")
    assert (_row(store, job), store.waiting(ALL)) == kept


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
    kept = _row(store, job), store.waiting(ALL)
    store.accept(job, DIGEST, b"{}", 4)
    store.accept(job, OTHER_DIGEST, b"{1}", 9)
    assert (_row(store, job), store.waiting(ALL)) == kept


def test_reject_keeps_no_job(store: Store) -> None:
    """A rejected offer leaves its answer and nothing else, so a later offer of the same job can be taken. A long text is cut."""
    job = new_id()
    store.reject(job, None, "job_schema", "x" * 5000)
    assert store.job(job) is None
    [answer] = _told(store, job)
    assert answer.data == JobStatus(None, "ended", "rejected", "job_schema", "x" * 1024)
    assert (answer.seq, answer.attempt) == (None, None)
    store.accept(job, DIGEST, b"{}", 4)
    assert _row(store, job).phase == "accepted"


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
    first, second, third = store.waiting(ALL)
    assert store.waiting(2) == [first, second]
    assert store.acknowledged(second.id)
    assert not store.acknowledged(second.id)
    assert not store.acknowledged(new_id())
    assert store.waiting(ALL) == [first, third]
    assert _row(store, job).seq == 3


def test_job_is_unacknowledged_until_its_end_is_known(store: Store) -> None:
    """An ended job counts while any of its messages waits, an open one always."""
    ended, open_one = _at(store, "ended"), _accept(store)
    accepted, end, other = store.waiting(ALL)
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
    for message in store.waiting(100):
        store.acknowledged(message.id)


def test_open_jobs_by_priority_then_arrival(store: Store) -> None:
    """Higher priority first; of equal ones whoever came first; what has ended is not there."""
    jobs = [(priority, _accept(store, priority)) for priority in (4, 9, 0, 4, 9, 4, 0)]
    store.end(jobs.pop(3)[1], SUCCEEDED)
    wanted = [job for _, job in sorted(jobs, key=lambda pair: -pair[0])]
    assert [row.id for row in store.open_jobs()] == wanted


def test_cancel_of_an_unknown_job(store: Store) -> None:
    """A cancel that came before its offer is answered at once, and the late offer starts nothing."""
    job = new_id()
    store.cancel_unknown(job)
    kept = _row(store, job), store.waiting(ALL)
    assert kept[0].outcome == "canceled"
    [answer] = _told(store, job)
    assert (answer.data.outcome, answer.data.digest, answer.seq) == ("canceled", None, 1)
    store.accept(job, DIGEST, b"{}", 4)
    assert (_row(store, job), store.waiting(ALL)) == kept
    assert store.open_jobs() == []


def test_forget_only_what_has_ended(store: Store) -> None:
    """A job that is open, or unknown, is not forgotten; one that has ended goes with what was still to be said of it."""
    job, other = _accept(store), _accept(store)
    kept = store.waiting(ALL)
    assert not store.forget(job)
    assert not store.forget(new_id())
    assert store.waiting(ALL) == kept
    store.end(job, SUCCEEDED)
    assert [row.id for row in store.jobs()] == [job, other]
    assert store.forget(job)
    assert store.job(job) is None
    assert [row.id for row in store.jobs()] == [other]
    assert _told(store, job) == []
    assert len(_told(store, other)) == 1


def test_last_trainer_is_the_one_that_started_last(store: Store) -> None:
    """The process to look for after a crash is the one that was recorded last, whichever job it served."""
    assert store.last_trainer() is None
    first, second = _at(store, "running"), _at(store, "running")
    store.set_trainer(second, 40, 2000)
    store.set_trainer(first, 41, 1000)
    assert store.last_trainer() == (41, 1000)


def test_everything_survives_a_restart(tmp_path: Path) -> None:
    """A closed and opened store has the same jobs, requests to cancel, messages and answer to whether the node is draining."""
    path = tmp_path / "agent.sqlite"
    with closing(_open(path)) as store:
        assert not store.draining
        store.draining = True
        job = _at(store, "running")
        store.ask_cancel(job)
        kept = _row(store, job), store.waiting(ALL)
        assert kept[0].cancel
    with closing(_open(path)) as store:
        assert (_row(store, job), store.waiting(ALL)) == kept
        assert store.draining
        store.draining = False
    with closing(_open(path)) as store:
        assert not store.draining


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


def _boot(store: Store) -> int:
    with closing(store):
        store.accept(job := new_id(), DIGEST, b"{}", 4)
        assert _told(store, job)[0].boot == store.boot
        return store.boot


def _epoch(path: Path) -> int:
    with closing(CoordinatorStore(path)) as store:
        return store.epoch


@pytest.mark.parametrize("opened", [_open, CoordinatorStore], ids=["agent", "coordinator"])
@pytest.mark.parametrize("broken", ["text", "torn", "directory"])
def test_file_that_is_no_database(opened: Callable[[Path], Any], broken: str, tmp_path: Path) -> None:
    """It raises StateUnusable, which names the file and what to do, and the file is left as it was."""
    path = tmp_path / "some.sqlite"
    if broken == "directory":
        path.mkdir()
    else:
        path.write_bytes(b"not a database, but somebody's notes\n" * 100 if broken == "text" else b"SQLite format 3\0" + b"\xff" * 4096)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(StateUnusable, match=r"some\.sqlite: .*; restore or remove the file") as raised:
        opened(path)
    assert raised.value.exit_code == 13
    assert (path.read_bytes() if path.is_file() else None) == before


# one transaction

MOVER = """
import random, sys
from pathlib import Path
from edge_agent.messages import JobResult, new_id
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
    store.cancel_unknown(new_id())
    store.reject(new_id(), None, "busy", "full")
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
        for waiting in store.waiting(ALL):
            *_, job, kind = waiting.topic.split("/")
            told.setdefault(job, []).append(decode(waiting.payload, JobResult if kind == "result" else JobStatus))
        rows = store.unacknowledged_jobs()
        assert len(rows) > 100
        for row in rows:
            messages = told.pop(row.id)
            assert [m.seq for m in messages] == list(range(1, row.seq + 1))
            assert _place(messages[-1]) == (row.phase, row.outcome)
            assert messages[-1].attempt == row.attempt
        assert {_place(m) for messages in told.values() for m in messages} == {("ended", "rejected")}
