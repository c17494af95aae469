"""The link and its broker: when the loss of a connection is told, what waits for whom and how long, and when the link tries again."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import psutil
import pytest
from fleet import free_port, open_broker, wait_for

from edge_agent.config import Broker
from edge_agent.mqtt import (
    LONGEST_RETRY_S,
    RETRY_S,
    SESSION_S,
    STEADY_S,
    WILL_DELAY_S,
    Birth,
    Connected,
    Disconnected,
    Link,
    Pauses,
    Received,
)

KEEPALIVE_S = 5
"""And so the delay of a last will."""
LIFE_S = 2
VERSIONS = ("5", "3.1.1")
# A process with a link and a last will, which says when it is connected.
NODE = """
import sys, queue, edge_agent.mqtt as mqtt, edge_agent.config as config
port, protocol, keepalive_s, name = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
events, broker = queue.SimpleQueue(), config.Broker(port=port, protocol=protocol, keepalive_s=keepalive_s)
mqtt.Link(broker, name, [name + "/down"], events, lambda: mqtt.Birth("/".join(("wills", protocol, name)), b"lost")).start()
print(type(events.get()).__name__, flush=True)
events.get()
"""

Version = Literal["5", "3.1.1"]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A Mosquitto that keeps messages of QoS 0 too for clients that are away, as some brokers do."""
    with open_broker(tmp_path_factory.mktemp("broker"), "queue_qos0_messages true") as port:
        yield port


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def linked(
    port: int, protocol: Version, name: str, topic: str, will: bool = False, keepalive_s: int = KEEPALIVE_S
) -> Iterator[tuple[Link, SimpleQueue[Any]]]:
    """A link that is up, and its events; in the end it is closed in order."""
    events: SimpleQueue[Any] = SimpleQueue()
    broker = Broker(port=port, protocol=protocol, keepalive_s=keepalive_s)
    link = Link(broker, name, [topic], events, lambda: Birth(f"wills/{protocol}/{name}", b"lost") if will else None)
    link.start()
    try:
        wait_for("the connection", lambda: link.connected, 30)  # what the broker has kept comes before that
        yield link, events
    finally:
        link.close()


def cut(link: Link) -> None:
    """End a connection as a network does, without a word of MQTT."""
    client = link.client
    assert client is not None
    with socket.socket(fileno=os.dup(client.socket().fileno())) as same:  # type: ignore[union-attr]
        same.shutdown(socket.SHUT_RDWR)


def heard(link: Link, events: SimpleQueue[Any], last: str) -> list[str]:
    """Return what comes up to a last message, and acknowledge it."""
    found: list[str] = []
    while not found or found[-1] != last:
        event = events.get(timeout=30)
        if isinstance(event, Received):
            link.acknowledge(event)
            found.append(event.payload.decode())
    return found


@pytest.mark.parametrize("protocol", VERSIONS)
def test_lost_connection_is_told_unless_it_is_soon_back(protocol: Version, port: int) -> None:
    """A node that is back within the delay was never away; of one whose process was killed it is told when the delay is over. In 3.1.1,
    which knows no delay, both are told at once."""
    name, command = f"killed-{protocol}", [sys.executable, "-c", NODE, str(port), protocol, str(KEEPALIVE_S)]
    with ExitStack() as stack:
        _, watched = stack.enter_context(linked(port, protocol, f"watch-{protocol}", f"wills/{protocol}/+"))
        back, events = stack.enter_context(linked(port, protocol, f"back-{protocol}", "back", will=True))
        process = stack.enter_context(subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True))
        stack.callback(process.kill)
        assert process.stdout
        assert process.stdout.readline() == "Connected\n"
        assert [type(event) for event in drained(events)] == [Connected]
        cut(back)
        wait_for("the next connection", lambda: any(isinstance(e, Connected) for e in drained(events)))
        killed = time.monotonic()
        process.send_signal(signal.SIGKILL)
        told, times = [], []
        while f"wills/{protocol}/{name}" not in told:
            event = watched.get(timeout=KEEPALIVE_S + 10)
            if isinstance(event, Received):
                told.append(event.topic)
                times.append(time.monotonic() - killed)
        if protocol == "5":
            assert told == [f"wills/{protocol}/{name}"]
            assert KEEPALIVE_S - 1 < times[0] < KEEPALIVE_S + 5  # brokers look once a second
        else:
            assert told == [f"wills/{protocol}/back-{protocol}", f"wills/{protocol}/{name}"]
            assert times[-1] < KEEPALIVE_S - 1


def drained(events: SimpleQueue[Any]) -> list[Any]:
    """Return what is in a queue."""
    return [events.get() for _ in range(events.qsize())]


@pytest.mark.parametrize("protocol", VERSIONS)
def test_what_has_expired_is_not_given_to_who_comes_back(protocol: Version, port: int) -> None:
    """Telemetry and offers of a time that is over are gone for a client that was away; what has no expiry, or a later one, is there, and in
    its order. In 3.1.1 all of it is. Who is there gets everything at once."""
    name, topic = f"away-{protocol}", f"expiry-{protocol}"
    sent: tuple[tuple[str, int, float | None], ...] = (
        ("heartbeat", 0, LIFE_S), ("status", 1, None), ("offer", 1, LIFE_S), ("offer again", 1, 60.0), ("late", 1, -5.0),
        ("result", 1, None),
    )  # fmt: skip
    with linked(port, protocol, f"speaker-{protocol}", "nothing") as (speaker, _):
        with linked(port, protocol, f"there-{protocol}", topic) as (there, events):
            with linked(port, protocol, name, topic):
                pass  # its session stays
            for text, qos, life_s in sent:
                assert speaker.publish(topic, text.encode(), qos, life_s=life_s)
            assert heard(there, events, "result") == [text for text, *_ in sent]
        over = time.monotonic() + LIFE_S + 1
        wait_for("the end of their time", lambda: time.monotonic() > over)
        with linked(port, protocol, name, topic) as (link, events):
            kept = [text for text, _, life_s in sent if protocol == "3.1.1" or life_s is None or life_s > LIFE_S]
            assert heard(link, events, "result") == kept


def test_delay_of_a_will_is_short() -> None:
    """It is over long before the session, with whose end a will is out at once."""
    assert WILL_DELAY_S * 100 < SESSION_S


def longest_s(attempts: int) -> Iterator[float]:
    return (min(RETRY_S * 2**n, LONGEST_RETRY_S) for n in range(1, attempts + 1))


def test_pauses_between_attempts_are_spread() -> None:
    """Of a thousand nodes whose broker is away each waits between half a second and 2, 4, 8 and up to 120 seconds, anywhere in between."""
    nodes = [Pauses(random.Random(seed)) for seed in range(1000)]
    for longest in longest_s(10):
        pauses = sorted(node.after(0.0) for node in nodes)
        assert pauses[0] >= RETRY_S / 2
        assert pauses[-1] <= longest
        width = (longest - RETRY_S / 2) / 10
        tenths = [sum(1 for pause in pauses if n <= (pause - RETRY_S / 2) / width < n + 1) for n in range(10)]
        assert min(tenths) > 50, (longest, tenths)


def test_link_waits_as_its_pauses_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody listens it tries again after each of them, and every attempt is told."""
    asked: list[tuple[float, float]] = []

    class Drawn(random.Random):
        def uniform(self, a: float, b: float) -> float:
            asked.append((a, b))
            return 0.01

    monkeypatch.setattr("edge_agent.mqtt.random.Random", Drawn)
    events: SimpleQueue[Any] = SimpleQueue()
    link = Link(Broker(port=free_port(), protocol="5"), "nobody", [], events, lambda: None)
    link.start()
    try:
        wait_for("ten attempts", lambda: len(asked) >= 10, 30)
    finally:
        link.close()
    assert asked[:10] == [(RETRY_S / 2, longest) for longest in longest_s(10)]
    assert {type(event) for event in drained(events)} == {Disconnected}


def test_nodes_do_not_come_back_in_step() -> None:
    """A thousand nodes that lose one broker in one moment: no two try at one time, and from the fifth attempt on, when each has come to its
    own, no second sees more than one in ten of them."""
    nodes = [Pauses(random.Random(seed)) for seed in range(1000)]
    at = [0.0] * len(nodes)
    for attempt in range(1, 11):
        at = [earlier + node.after(0.0) for earlier, node in zip(at, nodes, strict=True)]
        assert len(set(at)) == len(at)
        if attempt >= 5:
            seconds = [int(moment) for moment in at]
            assert max(seconds.count(second) for second in set(seconds)) < 100, attempt


def test_pauses_are_short_again_after_a_good_connection() -> None:
    """One that has lasted is followed by a pause below a second, one that was lost at once by what its attempts have come to."""
    pauses = Pauses(random.Random(1))
    steps: list[Callable[[], float]] = [lambda: pauses.after(0.0), lambda: pauses.after(STEADY_S - 1)]
    drawn = [step() for _ in range(20) for step in steps]
    assert max(drawn) > 60
    assert all(pauses.after(STEADY_S + 1) <= RETRY_S for _ in range(100))
    assert max(pauses.after(0.0) for _ in range(2)) <= 4 * RETRY_S


def test_no_more_is_on_its_way_than_the_broker_takes(tmp_path: Path) -> None:
    """While a broker that takes two messages at once acknowledges none, two are sent; the others come when it does."""
    with open_broker(tmp_path, "max_inflight_messages 2") as port, ExitStack() as stack:
        there, events = stack.enter_context(linked(port, "5", "there", "many"))
        here, _ = stack.enter_context(linked(port, "5", "here", "none"))
        [broker] = [child for child in psutil.Process().children() if str(tmp_path) in " ".join(child.cmdline())]
        assert here.client is not None
        sent: list[str] = []
        here.client.on_log = lambda _c, _u, _level, text: sent.append(text) if text.startswith("Sending PUBLISH") else None
        broker.suspend()
        try:
            assert all(here.publish("many", b"%d" % number, qos=1) for number in range(6))
            assert len(sent) == 2
        finally:
            broker.resume()
        assert heard(there, events, "5") == [str(number) for number in range(6)]
        assert len(sent) == 6
