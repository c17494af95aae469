"""The jobs of a node that no broker reaches: what its timers end, what the kernel ends, and what it has no room for."""

from __future__ import annotations

import hashlib
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import disks
import msgspec
import pytest
from conftest import TINY
from orders import FLEET, NODE, make_offer, make_order

from edge_agent import jobs, runner
from edge_agent.config import AgentConfig, Broker, Size, Timers
from edge_agent.delivery import Uplink
from edge_agent.files import lock_file
from edge_agent.job import Dataset, Job
from edge_agent.jobs import SUSPENDED_S, Jobs
from edge_agent.messages import BLOCK_BYTES, JobResult, JobStatus, Order, decode, encode
from edge_agent.mqtt import Link
from edge_agent.rest import Rest
from edge_agent.runner import TrainerEnded, TrainerEvent
from edge_agent.store import JobRow, Store
from profiles.device import device_profile
from tests.test_runner import DEADLINE_S, LIBRARY, PROGRAM

HOUR_S = 3600.0
DATA = b'{"question": "1 + 1?", "answer": "#### 2"}\n'


class Clock:
    """A clock that the test turns, in the place of the module `time` too."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    monotonic = __call__


class Node:
    """A node's jobs, with its disk and its trainers; its link never comes up."""

    def __init__(self, place: Path, clock: Clock, **more: Any) -> None:
        self.place, self._clock, self._config = place, clock, AgentConfig(NODE, place, Size(2**30), {"tiny": TINY}, device="cpu", **more)
        self.timers = self._config.timers
        self._lock = lock_file(place / "trainer.lock")
        self.start()

    def start(self) -> None:
        """Begin on what is there; trainers wait until `let_train`."""
        self.events = SimpleQueue[Any]()
        self.store = Store(self.place / "agent.sqlite", FLEET, NODE, self._clock)
        uplink = Uplink(Link(Broker(), NODE, [], self.events, lambda: None), FLEET, NODE, self.store)
        rest = Rest(self._config.rest, lambda: None)
        self.jobs = Jobs(self._config, device_profile("cpu"), self.store, uplink, self.events, rest)
        self.jobs.recover()
        self.jobs.take_time(datetime.now(timezone.utc))

    def offer(self, data: bytes = DATA, *, inline: bool = True, **changes: Any) -> str:
        """Offer a job on some data, in the offer or to be fetched; return its id."""
        job = Job(model="tiny", dataset=Dataset(hashlib.sha256(data).hexdigest()), budget_bytes=2**30)
        return self.hear(make_order(job, len(data), **changes), data if inline else None)

    def hear(self, order: Order, data: bytes | None) -> str:
        self.jobs.offer(order.id, encode(make_offer(order, data), "test"))
        return order.id

    def let_train(self, program: str | None = None, job: str = "") -> None:
        """Have jobs start from now on, one of them with a program."""
        if program is not None:
            (self.place / "jobs" / job / "program.py").write_text(LIBRARY + program)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def next(self) -> TrainerEvent | TrainerEnded:
        """Take in what the trainer says next."""
        event = self.events.get(timeout=DEADLINE_S)
        if isinstance(event, TrainerEvent):
            self.jobs.hear(event)
        elif isinstance(event, TrainerEnded):
            self.jobs.trainer_ended(event)
        return event  # type: ignore[no-any-return]

    def row(self, job: str) -> JobRow:
        row = self.store.job(job)
        assert row is not None
        return row

    def results(self, job: str) -> list[JobResult]:
        """The results of a job that wait to be acknowledged."""
        return [decode(m.payload, JobResult).data for m in self._waiting() if m.topic.endswith(f"{job}/result")]

    def phases(self, job: str) -> list[str]:
        """What has been told of a job before its result."""
        return [decode(m.payload, JobStatus).data.phase for m in self._waiting() if m.topic.endswith(f"{job}/status")]

    def _waiting(self) -> list[Any]:
        return [self.store.message(m) for m in self.store.waiting()]

    def left(self, *parts: str) -> set[str]:
        """The files in one of its directories."""
        return {path.name for path in self.place.joinpath(*parts).glob("*")}

    def close(self) -> None:
        if (trainer := self.jobs.trainer) is not None:
            trainer.kill()
            assert trainer.wait(DEADLINE_S)
        self.let_train()
        self.store.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def made(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Node]]:
    """Makes a node where `python -m edge_agent train DIR --supervised` runs the small program in DIR."""
    (tmp_path / "edge_agent").mkdir()
    (tmp_path / "edge_agent" / "__init__.py").touch()
    (tmp_path / "edge_agent" / "__main__.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    nodes: list[Node] = []

    def make(place: Path = tmp_path, **more: Any) -> Node:
        nodes.append(Node(place, clock, **more))
        return nodes[-1]

    yield make
    for node in nodes:
        node.close()


def _check_end(node: Node, job: str, outcome: str, reason: str, text: str) -> None:
    """It has ended for this reason, which is told once, whatever time passes."""
    for _ in range(3):
        node.jobs.tick()
    row, [told] = node.row(job), node.results(job)
    assert (row.phase, row.outcome) == ("ended", outcome)
    assert (told.outcome, told.reason, told.text) == (outcome, reason, text)
    assert row.result is not None
    assert msgspec.json.decode(row.result, type=JobResult) == told


# timers


def test_trainer_that_gives_no_sign_is_killed(made: Callable[..., Node], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `stall_s` from its last word: its job is `timed_out` as `timeout_stall`, its checkpoint stays and the device is free. An hour
    in which the agent itself was suspended does not count."""
    for module in (jobs, runner):
        monkeypatch.setattr(module, "time", clock)
    node = made()
    job = node.offer()
    node.jobs.tick()
    program = "open(sys.argv[2] + '/checkpoint.safetensors', 'w'); say('{\"time\": 1, \"event\": \"progress\"}'); time.sleep(600)"
    node.let_train(program, job)
    node.jobs.tick()
    node.next()
    trainer, kept = node.jobs.trainer, node.left("jobs", job)
    assert trainer is not None
    assert "checkpoint.safetensors" in kept
    clock.now += HOUR_S
    node.jobs.tick()
    for _ in range(int(node.timers.stall_s / SUSPENDED_S)):
        assert trainer.ended_for is None
        clock.now += SUSPENDED_S
        node.jobs.tick()
    assert not trainer.wait(0.01)
    clock.now += 1
    node.jobs.tick()
    assert node.next() == TrainerEnded(job, -signal.SIGKILL)
    _check_end(node, job, "timed_out", "timeout_stall", "the trainer gave no sign for 1,800 s and was killed")
    assert (node.jobs.trainer, node.left("jobs", job)) == (None, kept)
    assert node.phases(job) == ["accepted", "staging", "ready", "running"]
    lock = lock_file(node.place / "trainer.lock")
    assert lock is not None
    lock.close()


def test_word_of_the_trainer_begins_its_time_anew(made: Callable[..., Node], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that says something every half of `stall_s` goes on, as does one that waits for memory and says so."""
    for module in (jobs, runner):
        monkeypatch.setattr(module, "time", clock)
    node = made()
    job = node.offer()
    node.jobs.tick()
    node.let_train("for word in ('progress', 'paused', 'paused'): say('{\"time\": 1, \"event\": \"%s\"}' % word)\ntime.sleep(600)", job)
    node.jobs.tick()
    for _ in range(3):
        node.next()
        for _ in range(int(node.timers.stall_s / SUSPENDED_S / 2) + 1):
            clock.now += SUSPENDED_S
            node.jobs.tick()
    assert node.jobs.trainer is not None
    assert node.jobs.trainer.ended_for is None
    assert node.row(job).phase == "paused"


def test_files_that_do_not_come_end_the_job(made: Callable[..., Node], clock: Clock) -> None:
    """After `staging_s` from its arrival, over starts of the agent and while no broker is there, it is `timed_out` as `timeout_staging`.
    What has come of its file goes with the last job that wants it, and what comes later is not kept."""
    node = made(timers=Timers(staging_s=2 * HOUR_S))
    data = bytes(2 * BLOCK_BYTES)
    sha256 = hashlib.sha256(data).hexdigest()
    first = node.offer(data, inline=False)
    node.jobs.tick()
    node.jobs.receive_block(sha256, 0, data[: node.jobs._incoming[sha256]._block_bytes])
    parts = node.left("files", "incoming")
    assert {Path(name).suffix for name in parts} == {".part", ".map"}
    clock.now += HOUR_S
    node.store.close()
    clock.now += 1000 * HOUR_S  # the agent is off
    node.start()
    second = node.offer(data, inline=False)
    clock.now += HOUR_S
    node.jobs.tick()
    assert (node.row(first).phase, node.results(first)) == ("staging", [])
    clock.now += 1
    node.jobs.tick()
    _check_end(node, first, "timed_out", "timeout_staging", "its files did not come within 7,200 s")
    assert node.row(second).phase == "staging"
    assert node.left("files", "incoming") == parts
    clock.now += HOUR_S
    node.jobs.tick()
    _check_end(node, second, "timed_out", "timeout_staging", "its files did not come within 7,200 s")
    node.jobs.receive_block(sha256, 1, data[:BLOCK_BYTES])
    assert (node.left("files", "incoming"), node.left("files", "sha256"), node.left("jobs")) == (set(), set(), set())
    assert node.phases(first) == ["accepted", "staging"]


def test_job_whose_turn_comes_too_late_has_expired(made: Callable[..., Node], clock: Clock) -> None:
    """It has waited longer than `queue_s` when the device is free, and ends without a trainer as `timed_out`, `expired`; one that had
    already begun goes on, however long it has waited. What the end leaves goes with the job, after its retention."""
    node = made(timers=Timers(queue_s=HOUR_S), retention_s=HOUR_S)
    late, begun = node.offer(priority=9), node.offer()
    node.jobs.tick()
    node.store.move(begun, "running", start=True)
    node.store.move(begun, "ready", crashed=True)
    clock.now += HOUR_S + 1
    assert (node.row(late).phase, node.results(late)) == ("ready", [])
    node.let_train("await_stop(); sys.exit(12)", begun)
    node.jobs.tick()
    assert node.jobs.trainer is None
    _check_end(node, late, "timed_out", "expired", "it waited longer than 3,600 s")
    assert node.row(late).attempt == 0
    assert node.phases(late) == ["accepted", "staging", "ready"]
    assert node.jobs.trainer is not None
    assert (node.jobs.trainer.job, node.row(begun).phase) == (begun, "running")
    assert "trainer.log" not in node.left("jobs", late)
    for message in node.store.waiting():
        node.store.acknowledged(message)
    clock.now += HOUR_S + 1
    node.jobs.tick()
    assert node.left("jobs") == {begun}


# reasons


def test_trainer_that_the_kernel_always_ends_is_oom_host(made: Callable[..., Node], monkeypatch: pytest.MonkeyPatch) -> None:
    """After `max_attempts` starts, each ended for want of memory, its job has failed with that reason, told once. The machine's own count
    of such ends rises only where it lacks memory: here it rises with every look."""
    monkeypatch.setattr(runner, "_oom_kills", count().__next__)
    node = made(max_attempts=3)
    job = node.offer()
    node.jobs.tick()
    node.let_train("os.kill(os.getpid(), signal.SIGKILL)", job)
    for attempt in (1, 2, 3):
        assert node.results(job) == []
        node.jobs.tick()
        assert node.row(job).attempt == attempt
        assert node.next() == TrainerEnded(job, -signal.SIGKILL)
    text = "3 starts ended without a result; the last: the kernel ended the trainer for want of memory"
    _check_end(node, job, "failed", "oom_host", text)
    assert node.phases(job) == ["accepted", "staging", "ready", *("running", "ready") * 2, "running"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MiB."""
    with disks.small_disk(tmp_path / "disk", 4) as place:
        yield place


def test_offer_for_whose_file_there_is_no_room_is_rejected(disk: Path, clock: Clock) -> None:
    """As `disk_full`, with nothing left of it, where the disk has room for that word alone; it is kept, and the same offer does not come in
    when there is room. Another one does."""
    with closing(Node(disk, clock)) as node:
        data = bytes(60_000)
        sha256 = hashlib.sha256(data).hexdigest()
        order = make_order(Job(model="tiny", dataset=Dataset(sha256), budget_bytes=2**30), len(data))
        filler = disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - 48 * 1024))
        for _ in range(2):
            node.hear(order, data)
            status = node.store.closed(order.id)
            assert status is not None
            assert (status.phase, status.outcome, status.reason) == ("ended", "rejected", "disk_full")
            assert f"no space left for {disk}" in (status.text or "")
            assert (node.store.jobs(), node.left("files", "sha256"), node.left("jobs")) == ([], set(), set())
            filler.unlink(missing_ok=True)
        assert node.row(node.offer(data)).phase == "accepted"
        assert node.left("files", "sha256") == {sha256}
