"""A message that is missing: the coordinator asks the node where its jobs stand, seldom, and the answer closes the gap."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

from edge_agent.coordinator import commands
from edge_agent.coordinator.commands import REPORT_PAUSE_S
from edge_agent.messages import JobStatus, Phase, Report, decode, encode
from edge_agent.topics import down, up

sys.path.append(str(ROOT / "benchmarks"))
from fuzz import Trial
from fuzz_messages import FLEET, NEW, NODE, OTHER, OTHERS, make_offer, make_order


class Line:
    """A node that has taken a job and has its files, and the coordinator of that job; between them messages are carried by hand."""

    def __init__(self, trial: Trial) -> None:
        self.node: Any = trial.place.sides["open"]
        self.coordinator: Any = trial.place.sides["coordinator"]
        self.node.hear(down(FLEET, NODE, "job", NEW, "offer").encode(), encode(make_offer(make_order(NEW)), "test"))
        self.node.daemon._tick(time.monotonic())
        self.coordinator.wire.published.clear()

    def waiting(self) -> list[Any]:
        """What the node has to say of the job."""
        store = self.node.daemon._store
        return [m for m in map(store.message, store.waiting()) if f"/{NEW}/" in m.topic]

    def bring(self, message: Any) -> None:
        """Have the coordinator hear a message, and the node its acknowledgement."""
        self.coordinator.hear(message.topic.encode(), message.payload)
        for topic, payload in self.coordinator.wire.published:
            if topic.endswith(f"/ack/{message.id}"):
                self.node.hear(topic.encode(), payload)

    def lose(self, message: Any) -> None:
        """Have neither remember a message: a coordinator whose disk was set back has acknowledged it all the same."""
        self.node.daemon._store.acknowledged(message.id)

    def says(self, phase: Phase, seq: int, node: str = NODE, job: str = NEW) -> None:
        """Have the coordinator hear a status by its number."""
        status = JobStatus(make_order(job).job.digest, phase)
        boot = self.node.daemon._store.boot
        self.coordinator.hear(up(FLEET, node, "job", job, "status").encode(), encode(status, "test", boot=boot, seq=seq, attempt=1))

    def asked(self) -> list[str]:
        """Which nodes the coordinator has asked where their jobs stand, since the last look."""
        reports = [(topic, payload) for topic, payload in self.coordinator.wire.published if topic.endswith("/command/report")]
        for _, payload in reports:
            assert decode(payload, Report).data == Report()
        self.coordinator.wire.published.clear()
        return [topic.split("/")[2] for topic, _ in reports]

    def place(self) -> tuple[str, int]:
        """Phase and number of the job as the coordinator knows them."""
        view = self.coordinator.daemon.job(NEW)
        return view.phase, view.seq


@pytest.fixture
def line() -> Iterator[Line]:
    with Trial(("open", "coordinator")) as trial:
        yield Line(trial)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """That of the coordinator's commands."""
    clock = SimpleNamespace(now=5000.0, time=time.time)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(commands, "time", clock)
    return clock  # type: ignore[return-value]


def test_gap_is_closed_by_what_the_node_answers(line: Line, clock: SimpleNamespace) -> None:
    """It is asked once, answers with its current view under the next number, and what it says then is no gap any more."""
    accepted, staging, ready = line.waiting()
    line.bring(accepted)
    assert (line.asked(), line.place()) == ([], ("accepted", 1))
    line.lose(staging)
    line.bring(ready)
    assert (line.asked(), line.place()) == ([NODE], ("ready", 3))
    assert line.waiting() == []
    line.node.hear(down(FLEET, NODE, "command", "report").encode(), encode(Report(), "test"))
    [answer] = line.waiting()
    clock.now += REPORT_PAUSE_S
    line.bring(answer)
    assert (line.asked(), line.place(), line.waiting()) == ([], ("ready", 4), [])
    line.node.daemon._store.move(NEW, "running", start=True)
    [running] = line.waiting()
    line.bring(running)
    assert (line.asked(), line.place()) == ([], ("running", 5))


def test_node_that_still_has_what_is_missing_says_no_more(line: Line, clock: SimpleNamespace) -> None:
    """What was held up on its way comes again by itself, late, and is acknowledged: the report adds nothing to it."""
    accepted, staging, ready = line.waiting()
    line.bring(ready)
    assert line.asked() == [NODE]
    line.node.hear(down(FLEET, NODE, "command", "report").encode(), encode(Report(), "test"))
    assert line.waiting() == [accepted, staging]
    clock.now += REPORT_PAUSE_S / 2
    for message in (staging, accepted):
        line.bring(message)
    assert (line.asked(), line.place(), line.waiting()) == ([], ("ready", 3), [])


def test_gaps_are_asked_about_seldom(line: Line, clock: SimpleNamespace) -> None:
    """However many there are, once in `REPORT_PAUSE_S` for each node; the gap of another one does not wait for it."""
    gaps = iter(range(2, 1000, 2))
    for _ in range(50):
        line.says("running", next(gaps))
    assert line.asked() == [NODE]
    line.says("running", 2, OTHER, OTHERS)
    assert line.asked() == [OTHER]
    clock.now += REPORT_PAUSE_S - 0.1
    line.says("running", next(gaps))
    assert line.asked() == []
    clock.now += 0.1
    for _ in range(50):
        line.says("running", next(gaps))
    assert line.asked() == [NODE]
    assert line.place() == ("running", next(gaps) - 2)


def test_question_that_could_not_be_sent_is_asked_again(line: Line, clock: SimpleNamespace) -> None:
    """Without a connection nobody was asked: the next gap does not wait for the pause."""
    line.coordinator.daemon._link._subscribed = False
    line.says("running", 2)
    line.coordinator.daemon._link._subscribed = True
    assert line.asked() == []
    clock.now += 1
    line.says("running", 4)
    assert line.asked() == [NODE]
