"""The outbox of a node: a few messages at a time, each again with growing pauses, new ones first, until each has been acknowledged."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import msgspec
import pytest
from conftest import ROOT
from orders import FLEET, NODE

from edge_agent import delivery
from edge_agent.config import Broker, Size
from edge_agent.delivery import IN_FLIGHT, LONGEST_RETRY_S, RETRY_S, Outbox
from edge_agent.messages import JobResult, new_id
from edge_agent.mqtt import Link
from edge_agent.store import Store

sys.path.append(str(ROOT / "benchmarks"))
from fuzz_place import Wire

HOUR_S = 3600.0
DIGEST = "d" * 64


class Node:
    """What a node has to say, on its disk, and a link whose other end is a list; its clock stands until the test turns it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self._path = 5000.0, path
        monkeypatch.setattr(delivery, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.sent: list[tuple[float, str]] = []
        """When a message went out, and its id."""
        self.times: dict[str, list[float]] = {}
        """When each went out, by its id."""
        self.link = Link(Broker(packet_limit=Size(1600)), NODE, [], SimpleQueue(), lambda: None)
        self.connect()
        self.start()

    def connect(self, connected: bool = True) -> None:
        self._wire = Wire()
        self.link._client, self.link._subscribed = self._wire, connected

    def start(self) -> None:
        """Begin on what is there."""
        self.store = Store(self._path, FLEET, NODE)
        self.outbox = Outbox(self.store, self.link)

    def write(self, count: int = 1) -> list[str]:
        """Keep messages, each about a new job; return their ids, the oldest first."""
        for _ in range(count):
            self.store.accept(new_id(), DIGEST, b"{}", 4)
        return self.store.waiting()[-count:]

    def tick(self) -> list[str]:
        """Send what is due; return that, by ids."""
        self._wire.published.clear()
        self.outbox.tick()
        told = [msgspec.json.decode(payload)["id"] for _, payload in self._wire.published]
        for message in told:
            self.sent.append((self.now, message))
            self.times.setdefault(message, []).append(self.now)
        return told

    def turn(self, seconds: float, step_s: float = 1.0, heard: Callable[[str], object] = lambda _: None) -> None:
        """Let time pass; who hears a message may acknowledge it."""
        until = self.now + seconds
        while self.now < until:
            self.now += step_s
            for message in self.tick():
                heard(message)

    def check_rate(self) -> None:
        """Where nobody has acknowledged anything, there were never more than a few on their way."""
        times = [at for at, _ in self.sent]
        assert all(later - earlier >= RETRY_S for earlier, later in zip(times, times[IN_FLIGHT:], strict=False))


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    node = Node(tmp_path / "agent.sqlite", monkeypatch)
    yield node
    node.store.close()


def test_few_messages_are_on_their_way_at_once(node: Node) -> None:
    """Eight, the oldest first; an acknowledgement makes room for one more, and so does the time in which none has come."""
    messages = node.write(20)
    assert node.tick() == messages[:8]
    assert node.tick() == []
    for message in (messages[1], messages[5], messages[6]):
        node.outbox.acknowledged(message)
    assert node.tick() == messages[8:11]
    node.now += RETRY_S - 0.1
    assert node.tick() == []
    node.now += 0.1
    assert node.tick() == messages[11:19]


def test_pauses_grow_up_to_two_minutes(node: Node) -> None:
    """Without an answer a message goes out again after 5, 10, 20, 40, 80 and then every 120 seconds."""
    [message] = node.write()
    node.turn(900)
    pauses = [later - earlier for earlier, later in pairwise(node.times[message])]
    assert pauses == [5.0, 10.0, 20.0, 40.0, 80.0] + [120.0] * 6
    assert (pauses[0], pauses[-1]) == (RETRY_S, LONGEST_RETRY_S)
    node.outbox.send_again()
    node.turn(16)
    assert [later - earlier for earlier, later in pairwise(node.times[message][-3:])] == [5.0, 10.0]


def test_new_messages_do_not_wait_for_old_ones(node: Node) -> None:
    """Of those that nobody acknowledges many are due; what was never sent goes first, in its order, then whatever is overdue longest."""
    old = node.write(10)
    node.turn(60)
    node.now += LONGEST_RETRY_S
    new = node.write(3)
    last = {message: node.times[message][-1] for message in old}
    told = node.tick()
    assert told[:3] == new
    assert [last[message] for message in told[3:]] == sorted(last[message] for message in told[3:])
    assert set(told[3:]) < set(old)
    assert len(told) == IN_FLIGHT


def test_coordinator_that_is_down_for_hours(node: Node) -> None:
    """Nothing is acknowledged, and more comes meanwhile: never too much at once, nobody starves, no pause is cut short. Then all is, once,
    and there is nothing more to say."""
    messages = node.write(100)
    for _ in range(8):
        node.turn(HOUR_S / 4, 5.0)
        messages += node.write()
        assert node.tick()[:1] in ([], messages[-1:])
    node.turn(RETRY_S)
    node.check_rate()
    for message in messages:
        pauses = [later - earlier for earlier, later in pairwise([*node.times[message], node.now])]
        assert max(pauses) < 2 * LONGEST_RETRY_S
        assert all(pause >= min(RETRY_S * 2**n, LONGEST_RETRY_S) for n, pause in enumerate(pauses[:-1]))
    assert node.store.waiting() == messages
    heard: list[str] = []

    def hear(message: str) -> None:
        heard.append(message)
        node.outbox.acknowledged(message)

    node.turn(LONGEST_RETRY_S * 2, 2.5, hear)
    assert sorted(heard) == sorted(messages)
    assert (node.store.waiting(), node.outbox._tries) == ([], {})
    node.turn(HOUR_S, 60.0, hear)
    assert len(heard) == len(messages)


@pytest.mark.parametrize("restarts", [False, True], ids=["suspended", "off"])
def test_node_that_is_away_for_days(restarts: bool, node: Node) -> None:
    """It comes back with all that it had to say, a few at a time, the oldest first, whether it begins anew or its clock has jumped."""
    messages = node.write(30)
    node.turn(20)
    sent = len(node.sent)
    if restarts:
        node.store.close()
        node.start()
    node.now += 5 * 24 * HOUR_S
    node.turn(60, 1.0, node.outbox.acknowledged)
    told = [message for _, message in node.sent[sent:]]
    assert sorted(told) == sorted(messages)
    if restarts:
        assert told == messages
    assert max(Counter(at for at, _ in node.sent).values()) == IN_FLIGHT
    assert node.store.waiting() == []


def test_what_did_not_go_out_was_not_sent(node: Node) -> None:
    """Without a link nothing is tried, and no pause begins; with a new one all is due at once."""
    messages = node.write(3)
    node.connect(False)
    node.turn(600)
    assert node.sent == []
    node.connect()
    assert node.tick() == messages
    node.connect()
    node.outbox.send_again()
    assert node.tick() == messages


def test_acknowledgement_counts_once(node: Node) -> None:
    """That of a message which was sent again, or of none of this node's, changes nothing more."""
    first, second = node.write(2)
    node.turn(6)
    for message in (first, first, new_id()):
        node.outbox.acknowledged(message)
    assert node.store.waiting() == [second]
    node.turn(RETRY_S * 2)
    assert node.times[first] == node.times[second][:2]


def test_message_that_the_broker_would_refuse_holds_up_no_other(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    """One longer than its packets is kept, tried with growing pauses, and told each time; those after it go out."""
    long, *later = [new_id() for _ in range(12)]
    node.store.accept(long, DIGEST, b"{}", 4)
    [accepted] = node.tick()
    node.outbox.acknowledged(accepted)
    node.store.end(long, JobResult(DIGEST, "failed", "internal", "x" * 1024))
    messages = node.write(len(later))
    node.turn(60, 1.0, node.outbox.acknowledged)
    assert [message for _, message in node.sent[1:]] == messages
    assert len(node.store.waiting()) == 1
    assert 3 <= caplog.text.count("message_too_long") <= 6
