"""Wrong clocks: a node judges by the coordinator's, is known again after it has lost its number, and says where clocks differ."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from conftest import ROOT

from edge_agent.agent import NEWS_S
from edge_agent.clocks import ToldTime
from edge_agent.messages import ANSWER_S, CoordinatorState, NodeState, encode
from edge_agent.mqtt import Connected
from edge_agent.signing import seal
from edge_agent.topics import coordinator_state, down, up

sys.path.append(str(ROOT / "benchmarks"))
from fuzz import Trial
from fuzz_messages import FIRST, FLEET, KEY, NEW, NODE, Delivery, make_ack, make_offer, make_order


@pytest.fixture
def trial() -> Iterator[Trial]:
    """A node that takes what is signed, and a coordinator; their messages are carried by hand."""
    with Trial(("signed", "coordinator")) as running:
        yield running


def _side(trial: Trial, name: str) -> Any:
    return trial.place.sides[name]  # type: ignore[index]


def _connect(trial: Trial, *, answers: bool = True) -> list[str]:
    """Have the node connect, and the coordinator hear what it says; its answers to that are signed by the trusted key, and heard."""
    node, coordinator = _side(trial, "signed"), _side(trial, "coordinator")
    coordinator.daemon._signing_key = KEY
    node.wire.published.clear()
    coordinator.wire.published.clear()
    node.daemon._handle(Connected("5"))
    for topic, payload in list(node.wire.published):
        coordinator.hear(topic.encode(), payload)
    for topic, payload in list(coordinator.wire.published) if answers else ():
        if "/ack/" in topic:
            node.hear(topic.encode(), payload)
    return [topic.rpartition("/")[2] for topic, _ in node.wire.published]


def _offer(trial: Trial, job: str = NEW, **changes: Any) -> str:
    order = msgspec.structs.replace(make_order(job), **changes)
    offer = encode(make_offer(order, KEY), "test").decode("latin-1")
    return trial.deliver(Delivery("signed", down(FLEET, NODE, "job", job, "offer"), offer))


def test_hello_comes_first(trial: Trial) -> None:
    """So the time is told before the offers that follow the node's state."""
    assert _connect(trial)[:2] == ["hello", "state"]


def test_new_orders_wait_for_the_time(trial: Trial) -> None:
    """They are neither taken nor rejected before it is told, and judged by it then, not by the node's own."""
    agent, now = _side(trial, "signed").daemon, datetime.now(timezone.utc)
    agent._jobs._told_time = ToldTime()
    before, waiting = agent._store.jobs(), f"{NEW[:-1]}7"
    assert _offer(trial) == "offer_waits"
    assert _offer(trial, waiting, id=waiting, issued=now, expires=now + timedelta(days=1)) == "offer_waits"
    assert (agent._store.jobs(), agent._store.closed(NEW)) == (before, None)
    _connect(trial)
    assert agent._store.job(waiting).phase == "accepted"
    assert agent._store.closed(NEW).reason == "expired"  # it is of 2099
    late, early = (now - timedelta(days=2), now - timedelta(days=1)), (now + timedelta(days=1), now + timedelta(days=2))
    for job, (issued, expires) in ((f"{NEW[:-1]}8", late), (f"{NEW[:-1]}9", early)):
        assert _offer(trial, job, id=job, issued=issued, expires=expires) == "job_rejected:expired"


def test_difference_of_the_clocks_is_told_once(trial: Trial, caplog: pytest.LogCaptureFixture) -> None:
    """And again when it has changed: the receivers here begin with a coordinator of 2099."""
    _connect(trial)
    _connect(trial)
    told = [float(behind_s) for behind_s in re.findall(r"clock_differs behind_s=(-?\d+)", caplog.text)]
    assert [behind_s > 1e9 for behind_s in told] == [True, False]


def test_answer_that_was_held_up_tells_no_time(trial: Trial) -> None:
    """Nor one to an earlier hello: who can delay messages cannot set the clock back."""
    agent = _side(trial, "signed").daemon

    def answer(hello: str) -> None:
        payload = encode(seal(make_ack(hello), KEY), "test").decode("latin-1")
        trial.deliver(Delivery("signed", down(FLEET, NODE, "ack", hello), payload))

    agent._jobs._told_time = ToldTime()
    agent._greet(time.monotonic() - ANSWER_S - 1)
    *_, held_up = agent._hellos
    answer(held_up)
    agent._greet(time.monotonic())
    answer(held_up)
    assert agent._jobs._told_time.now() is None
    *_, last = agent._hellos
    answer(last)
    assert agent._jobs._told_time.now() >= FIRST


def test_hellos_that_nobody_answers_become_rare(trial: Trial) -> None:
    """The pauses grow, and are drawn: a coordinator that has too much to do gets less of it. An answer ends that, or a new connection."""
    agent = _side(trial, "signed").daemon
    rounds = []
    for _ in range(3):
        _connect(trial, answers=False)
        now, pauses = 0.0, [agent._hello_at - time.monotonic()]
        for _ in range(4):
            agent._greet(now)
            pauses.append(agent._hello_at - now)
            now = agent._hello_at
        rounds.append(pauses)
    for pauses in rounds:
        for pause, least in zip(pauses, (30, 60, 120, 120, 120), strict=True):
            assert least - 1 < pause <= 1.5 * least
    assert len({pause for pauses in rounds for pause in pauses[1:]}) == 12
    _connect(trial)
    assert 299 < agent._hello_at - time.monotonic() <= 300
    agent._greet(0.0)
    assert 30 <= agent._hello_at <= 45


def test_coordinator_that_was_there_before_is_greeted_once(trial: Trial) -> None:
    """Its retained state comes with every connection, which says hello by itself; of one that is new, not all nodes hear in one moment."""

    def said(node: Any) -> list[str]:
        kinds = [topic.rpartition("/")[2] for topic, _ in node.wire.published]
        return [kind for kind in kinds if kind in ("hello", "heartbeat")]

    node = _side(trial, "signed")
    agent, topic = node.daemon, coordinator_state(FLEET, "second").encode()
    state = encode(CoordinatorState(True, 3), "test")
    _connect(trial)
    agent._speak(time.monotonic())
    node.wire.published.clear()
    node.hear(topic, state, True)
    agent._speak(time.monotonic() + NEWS_S)
    assert said(node) == []
    due = set()
    for _ in range(5):
        node.hear(topic, state)
        due.add(agent._hello_at)
        assert 0 <= agent._hello_at - time.monotonic() + 0.1 <= NEWS_S + 0.1
    assert len(due) == 5
    agent._speak(time.monotonic() + NEWS_S)
    assert sorted(said(node)) == ["heartbeat", "hello"]


def test_node_whose_number_was_lost_is_known_again(trial: Trial) -> None:
    """Its database is gone and its clock in the past: the coordinator takes it for an earlier start and says so; it numbers itself anew."""
    node, coordinator = _side(trial, "signed").daemon, _side(trial, "coordinator")
    known = node._store.boot + 10**9
    coordinator.hear(up(FLEET, NODE, "state").encode(), encode(NodeState("ready", known, 4, 0), "test"))
    _connect(trial, answers=False)
    assert coordinator.daemon.nodes(None, None, 9).items[0].boot == known
    _connect(trial)
    assert node._store.boot == known + 1
    _connect(trial)  # as the link does, whose last will is a new one
    [view] = coordinator.daemon.nodes(None, None, 9).items
    assert (view.boot, view.present) == (known + 1, True)


def test_told_time_goes_on() -> None:
    """By the clock that nobody sets."""
    now = 5.0
    told = ToldTime(lambda: now)
    assert told.now() is None
    told.set(FIRST)
    now += 90
    assert told.now() == FIRST + timedelta(seconds=90)
