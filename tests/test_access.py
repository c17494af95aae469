"""A broker with the sample configuration lets everyone in the fleet say what is theirs, and nothing else: certificates, rules, sessions."""

from __future__ import annotations

import hashlib
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from types import SimpleNamespace
from typing import Any

import paho.mqtt.client as paho
import pytest
from api_server import INFO
from conftest import ROOT, Cli
from cryptography import x509
from fleet import MOSQUITTO, free_port, wait_for
from orders import NODE
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edge_agent import backlog
from edge_agent.backlog import MOST_OF_SENDER
from edge_agent.config import AgentConfig, Broker, CoordinatorConfig, Size, Tls
from edge_agent.coordinator.service import Service
from edge_agent.coordinator.turns import Turns, is_standing, sender_of
from edge_agent.delivery import Outbox, Uplink
from edge_agent.doctor import CHECKS, _Wrong
from edge_agent.enrolment import Authority, days_left
from edge_agent.errors import ConfigInvalid
from edge_agent.job import Dataset, Job
from edge_agent.messages import JobResult, NodeState, encode
from edge_agent.mqtt import Birth, Connected, Link
from edge_agent.store import Store
from edge_agent.topics import coordinator_state, coordinator_subscriptions, down, node_subscriptions, up

FLEET, OTHER, STOLEN = "lab", "node-2", "node-3"
SAMPLES = ROOT / "deploy" / "mosquitto"


class Place:
    """A Mosquitto with the sample files, and clients with certificates of its authority."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.port = directory, free_port()
        self.authority = Authority(directory / "authority")
        self.authority.issue("broker", "127.0.0.1", directory)
        for name in (NODE, OTHER, STOLEN):
            self.authority.issue("node", name, directory)
        self.authority.issue("coordinator", "coordinator.main", directory)
        self._clients: list[paho.Client] = []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        text = (SAMPLES / "mosquitto.conf").read_text()
        for old, new in (
            ("listener 8883", f"listener {self.port} 127.0.0.1\nuser root"), ("/etc/mosquitto/edge-agent", str(self.directory)),
            ("broker.example.org", "127.0.0.1"), ("/var/lib/mosquitto/", f"{self.directory}/"),
        ):  # fmt: skip
            assert old in text
            text = text.replace(old, new)
        (self.directory / "mosquitto.conf").write_text(text)
        (self.directory / "acl").write_text((SAMPLES / "acl").read_text() + f"\nuser {STOLEN}\ntopic deny #\n")
        (self.directory / "acl").chmod(0o600)
        assert MOSQUITTO, "mosquitto is not installed; .ci/run installs it"
        with (self.directory / "broker.log").open("wb") as log:
            return subprocess.Popen([MOSQUITTO, "-c", str(self.directory / "mosquitto.conf")], stdout=log, stderr=log)

    def client(self, certificate: str, client_id: str, heard: SimpleQueue[Any], *topics: str, version: str = "5") -> Any:
        """Connect; what becomes of that, and all that comes, is heard."""
        protocol = MQTTProtocolVersion.MQTTv5 if version == "5" else MQTTProtocolVersion.MQTTv311
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id, protocol=protocol)
        own = [str(self.directory / f"{certificate}.{end}") for end in ("pem", "key")]
        client.tls_set(str(self.directory / "ca.pem"), *own, cert_reqs=ssl.CERT_REQUIRED)
        client.on_connect = lambda c, u, f, reason, p: (heard.put(("connected", str(reason))), [c.subscribe(t, 1) for t in topics])
        client.on_subscribe = lambda c, u, m, reasons, p: heard.put(("granted", [str(r) for r in reasons]))
        client.on_message = lambda c, u, m: heard.put((m.topic, m.payload))
        client.on_publish = lambda c, u, m, reason, p: heard.put(("published", str(reason)))
        client.on_disconnect = lambda c, u, f, reason, p: heard.put(("disconnected", str(reason)))
        client.reconnect_delay_set(60, 60)
        self._clients.append(client)
        client.connect("127.0.0.1", self.port)
        client.loop_start()
        return client

    def config(self, name: str, node: str = NODE) -> AgentConfig:
        return AgentConfig(node, self.directory / "state", Size(2**30), {}, FLEET, broker=self.broker(name))

    def broker(self, name: str) -> Broker:
        files = Tls(self.directory / "ca.pem", self.directory / f"{name}.pem", self.directory / f"{name}.key")
        return Broker("127.0.0.1", self.port, tls=files)

    def close(self) -> None:
        for client in self._clients:
            client.disconnect()
            client.loop_stop()
        self._clients.clear()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("access"))
    process = place.process = place.start()
    wait_for("the broker", lambda: f"listen socket on port {place.port}" in (place.directory / "broker.log").read_text())
    yield place
    process.terminate()
    process.wait(10)


@pytest.fixture
def place(broker: Place) -> Iterator[Place]:
    yield broker
    broker.close()


def _next(heard: SimpleQueue[Any], wanted: str, deadline_s: float = 10.0) -> Any:
    """The next thing heard of a kind; None where nothing of it comes."""
    until = time.monotonic() + deadline_s
    try:
        while True:
            kind, value = heard.get(timeout=max(0.01, until - time.monotonic()))
            if kind == wanted:
                return value
    except Empty:
        return None


def _joined(place: Place, name: str, *topics: str) -> tuple[paho.Client, SimpleQueue[Any]]:
    heard: SimpleQueue[Any] = SimpleQueue()
    client = place.client(name, name, heard, *topics)
    assert _next(heard, "connected") == "Success"
    for _ in topics:
        assert _next(heard, "granted") is not None
    return client, heard


def _up_to(hears: SimpleQueue[Any], boss: paho.Client, node: str) -> list[Any]:
    """What a client hears up to a message to a node whose topics it may read, which the coordinator says now."""
    boss.publish(down(FLEET, node, "ack", "end"), b"the end", 1)
    heard = [hears.get(timeout=10)[1]]
    while heard[-1] != b"the end":
        heard.append(hears.get(timeout=10)[1])
    return heard


def test_own_topics_are_open(place: Place) -> None:
    """A node and the coordinator hear each other, and a node sees which coordinators there are."""
    node, node_hears = _joined(place, NODE, *node_subscriptions(FLEET, NODE))
    boss, boss_hears = _joined(place, "coordinator.main", *coordinator_subscriptions(FLEET))
    for speaker, hears, topic in (
        (node, boss_hears, up(FLEET, NODE, "hello")),
        (boss, node_hears, down(FLEET, NODE, "ack", "x")),
        (boss, node_hears, coordinator_state(FLEET, "main")),
    ):
        speaker.publish(topic, b"hello", 1)
        assert _next(hears, topic) == b"hello"


@pytest.mark.parametrize(
    "topic",
    [
        up(FLEET, NODE, "hello"), up(FLEET, NODE, "state"), down(FLEET, NODE, "job", "j", "offer"), down(FLEET, OTHER, "job", "j", "offer"),
        coordinator_state(FLEET, "main"), up("other", OTHER, "hello"), "edge1/lab", "$SYS/broker",
    ],
)  # fmt: skip
def test_node_cannot_speak_as_another(topic: str, place: Place) -> None:
    """Neither as another node nor as a coordinator, which orders jobs: who listens there hears nothing of it."""
    _, boss_hears = _joined(place, "coordinator.main", *coordinator_subscriptions(FLEET))
    _, node_hears = _joined(place, NODE, *node_subscriptions(FLEET, NODE))
    other, other_hears = _joined(place, OTHER, *node_subscriptions(FLEET, OTHER))
    other.publish(topic, b"forged", 1)
    assert _next(other_hears, "published") == "Not authorized"
    other.publish(up(FLEET, OTHER, "state"), b"own", 1)
    said = [boss_hears.get(timeout=10)]
    while said[-1][1] != b"own":
        said.append(boss_hears.get(timeout=10))
    for hears in (node_hears, other_hears):
        while not hears.empty():
            said.append(hears.get())
    assert b"forged" not in [payload for _, payload in said]


@pytest.mark.parametrize(
    "topics", [f"edge1/{FLEET}/{NODE}/down/#", f"edge1/{FLEET}/#", "#", f"edge1/{FLEET}/+/down/#", up(FLEET, NODE, "#")]
)
def test_node_cannot_read_what_is_for_another(topics: str, place: Place) -> None:
    """Whatever it subscribes to, and whatever the broker says to that."""
    _, spy_hears = _joined(place, OTHER, topics, *node_subscriptions(FLEET, OTHER))
    boss, boss_hears = _joined(place, "coordinator.main", *coordinator_subscriptions(FLEET))
    node, _ = _joined(place, NODE)
    node.publish(up(FLEET, NODE, "hello"), b"of node-1", 1)
    assert _next(boss_hears, up(FLEET, NODE, "hello")) == b"of node-1"
    boss.publish(down(FLEET, NODE, "job", "j", "offer"), b"for node-1", 1)
    heard = _up_to(spy_hears, boss, OTHER)
    assert not {b"for node-1", b"of node-1"} & set(heard)


def test_node_that_is_shut_out_says_and_hears_nothing(place: Place) -> None:
    """A deny in the rules comes before what all nodes may."""
    heard: SimpleQueue[Any] = SimpleQueue()
    stolen = place.client(STOLEN, STOLEN, heard, *node_subscriptions(FLEET, STOLEN))
    assert _next(heard, "connected") == "Success"
    _, boss_hears = _joined(place, "coordinator.main", *coordinator_subscriptions(FLEET))
    stolen.publish(up(FLEET, STOLEN, "hello"), b"stolen", 1)
    assert _next(heard, "published") == "Not authorized"
    assert boss_hears.empty()


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_node_cannot_take_over_the_session_of_another(version: str, place: Place) -> None:
    """Its client id is the name in its certificate, whatever it asks for: the other's connection and queue stay."""
    _, node_hears = _joined(place, NODE, *node_subscriptions(FLEET, NODE))
    thief_hears: SimpleQueue[Any] = SimpleQueue()
    topics = [topic for node in (NODE, OTHER) for topic in node_subscriptions(FLEET, node)]
    place.client(OTHER, NODE, thief_hears, *topics, version=version)
    assert _next(thief_hears, "connected") == "Success"
    for _ in topics:
        assert _next(thief_hears, "granted") is not None
    boss, _ = _joined(place, "coordinator.main")
    boss.publish(down(FLEET, NODE, "job", "j", "offer"), b"for node-1", 1)
    assert b"for node-1" not in _up_to(thief_hears, boss, OTHER)
    assert _next(node_hears, down(FLEET, NODE, "job", "j", "offer")) == b"for node-1"
    assert _up_to(node_hears, boss, NODE) == [b"the end"]


def _foreign(place: Place, name: str) -> Path:
    """The directory of a certificate of the same name, by an authority of the same name."""
    directory = place.directory / f"foreign-{name}"
    Authority(directory / "authority").issue("node", name, directory)
    return directory


def _connect_packet(version: str) -> bytes:
    """The CONNECT of a node."""
    level, properties = (b"\5", b"\0") if version == "5" else (b"\4", b"")
    body = b"\0\4MQTT" + level + b"\2\0\x3c" + properties + len(NODE).to_bytes(2, "big") + NODE.encode()
    return bytes((0x10, len(body))) + body


def _answer(connection: socket.socket, packet: bytes) -> bytes:
    """What the broker says to a packet before it ends the connection."""
    answer = b""
    with suppress(ssl.SSLError, ConnectionError):
        connection.sendall(packet)
        while part := connection.recv(4096):
            answer += part
    return answer


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@pytest.mark.parametrize(("who", "alert"), [("nobody", "certificate.required"), ("a foreigner", "unknown.ca")])
def test_without_a_certificate_of_the_fleet_there_is_nothing(who: str, alert: str, version: str, place: Place) -> None:
    """The broker ends the connection for its certificate, before a message; it lives, and others connect."""
    context = ssl.create_default_context(cafile=place.directory / "ca.pem")
    if who == "a foreigner":
        context.load_cert_chain(*(_foreign(place, NODE) / f"{NODE}.{end}" for end in ("pem", "key")))

    def reach() -> ssl.SSLSocket:
        return context.wrap_socket(socket.create_connection(("127.0.0.1", place.port), 10), server_hostname="127.0.0.1")

    with pytest.raises(ssl.SSLError, match=re.compile(alert, re.IGNORECASE)), reach() as connection:
        connection.recv(1)
    with reach() as connection:
        assert _answer(connection, _connect_packet(version)) == b""
    _joined(place, NODE)


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_without_encryption_there_is_nothing(version: str, place: Place) -> None:
    """Whoever speaks plain MQTT to the broker is cut off with an alert of TLS at most; it lives, and others connect."""
    with socket.create_connection(("127.0.0.1", place.port), 10) as connection:
        answer = _answer(connection, _connect_packet(version))
    assert answer[:1] in (b"", b"\x15")
    assert len(answer) <= 7
    _joined(place, NODE)


def test_agent_and_coordinator_speak_over_it(place: Place) -> None:
    """With the link of the agent itself: subscriptions granted, messages both ways, the last will under its own name."""
    events: dict[str, SimpleQueue[Any]] = {name: SimpleQueue() for name in (NODE, "coordinator.main")}
    will = Birth(up(FLEET, NODE, "state"), b"lost")
    links = [
        Link(place.broker(NODE), NODE, node_subscriptions(FLEET, NODE), events[NODE], lambda: will),
        Link(place.broker("coordinator.main"), "coordinator/lab/main", coordinator_subscriptions(FLEET), events["coordinator.main"],
             lambda: None),
    ]  # fmt: skip
    try:
        for link in links:
            link.start()
        for queue in events.values():
            assert isinstance(queue.get(timeout=10), Connected)
        links[0].publish(up(FLEET, NODE, "hello"), b"hello", 1)
        assert events["coordinator.main"].get(timeout=10).payload == b"hello"
        links[1].publish(down(FLEET, NODE, "ack", "x"), b"hello to you", 1)
        assert events[NODE].get(timeout=10).payload == b"hello to you"
    finally:
        for link in links:
            link.close()


@pytest.fixture
def link(place: Place) -> Iterator[tuple[Link, SimpleQueue[Any]]]:
    """The coordinator's, up, and its events."""
    events: SimpleQueue[Any] = SimpleQueue()
    link = Link(place.broker("coordinator.main"), "coordinator/lab/main", coordinator_subscriptions(FLEET), events, lambda: None)
    link.start()
    while not isinstance(event := events.get(timeout=10), Connected):  # of an earlier connection
        link.acknowledge(event)
    yield link, events
    link.close()


def test_node_that_floods_does_not_fill_the_memory(
    link: tuple[Link, SimpleQueue[Any]], place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What may be lost is dropped while too much waits to be handled, and that is told; what may not be lost comes, and all comes later."""
    monkeypatch.setattr(backlog, "MOST_COME_BYTES", 2**20)
    up_link, events = link
    flooder, _ = _joined(place, OTHER)
    for _ in range(200):
        flooder.publish(up(FLEET, OTHER, "heartbeat"), bytes(64 * 1024), 0)
    flooder.publish(up(FLEET, OTHER, "hello"), b"last", 1)
    come = [events.get(timeout=10)]
    while come[-1].payload != b"last":
        come.append(events.get(timeout=10))
    assert 0 < sum(len(message.payload) == 64 * 1024 for message in come) <= 2**20 // (64 * 1024)
    up_link.supervise()
    assert "messages_dropped" in caplog.text
    for message in come:
        up_link.acknowledge(message)
    flooder.publish(up(FLEET, OTHER, "heartbeat"), b"later", 0)
    assert events.get(timeout=10).payload == b"later"


@pytest.fixture
def coordinator(place: Place, tmp_path: Path) -> Iterator[Service]:
    service = Service(CoordinatorConfig(tmp_path / "coordinator", FLEET, broker=place.broker("coordinator.main")))
    service.start()
    wait_for("the coordinator", lambda: service._link.connected)
    yield service
    service.stop()


def test_flood_of_one_node_keeps_no_other_waiting(place: Place) -> None:
    """Of one that floods only a few messages wait, and it is served in turn; its newest state and all that others say come."""
    events = Turns()
    link = Link(
        place.broker("coordinator.main"),
        "coordinator/lab/main",
        coordinator_subscriptions(FLEET),
        events,
        lambda: None,
        sender_of,
        is_standing,
    )
    link.start()
    try:
        while not isinstance(event := events.get(timeout=10), Connected):
            link.acknowledge(event)
        flooder, _ = _joined(place, OTHER)
        for number in range(500):
            flooder.publish(up(FLEET, OTHER, "hello"), b"%d" % number, 1)
            last = flooder.publish(up(FLEET, OTHER, "state"), b"%d" % number, 1)
        last.wait_for_publish(30)
        node, _ = _joined(place, NODE)
        for number in range(10):
            node.publish(up(FLEET, NODE, "hello"), b"%d" % number, 1)
        wait_for("all messages", lambda: link.dropped + events.qsize() == 1009, 10)
        come = [events.get(timeout=10) for _ in range(22)]
        assert [m.payload for m in come if sender_of(m.topic) == NODE] == [b"%d" % number for number in range(10)]
        assert link.dropped == 1000 - MOST_OF_SENDER - 1, "one state waits"
        while come:
            link.acknowledge(come.pop())
            while not events.empty():
                come.append(event := events.get())
        assert (event.topic, event.payload) == (up(FLEET, OTHER, "state"), b"499")
        assert not link._come._shares
    finally:
        link.close()


def test_job_goes_its_way_while_another_node_floods(place: Place, coordinator: Service, tmp_path: Path) -> None:
    """It is offered, accepted and reported, with all that its node has to tell, before what the other had said earlier is handled."""
    flooder, _ = _joined(place, OTHER)
    said, ended = count(1), threading.Event()

    def flood() -> None:
        while not ended.is_set():
            told = [flooder.publish(up(FLEET, OTHER, "state"), encode(NodeState("ready", 1, next(said), 0), "test"), 1) for _ in range(500)]
            told[-1].wait_for_publish(30)

    store, events = Store(tmp_path / "node.sqlite", FLEET, NODE), SimpleQueue[Any]()
    link = Link(place.broker(NODE), NODE, node_subscriptions(FLEET, NODE), events, lambda: None)
    uplink, outbox = Uplink(link, FLEET, NODE, store), Outbox(store, link)
    thread = threading.Thread(target=flood)
    try:
        link.start()
        while not isinstance(events.get(timeout=10), Connected):
            pass
        thread.start()
        wait_for("the flood", lambda: coordinator._link.dropped > 500, 30)
        uplink.keep(NodeState("ready", store.boot, 1, 0), "state")
        uplink.keep(INFO, "info")
        wait_for("the node", lambda: any(n.id == NODE and n.info for n in coordinator.call(coordinator._store.nodes)))
        data = b'{"question": "How many?", "answer": "#### 1"}'
        job = Job(model="tiny", dataset=Dataset(hashlib.sha256(data).hexdigest()), budget_bytes=2**29)
        coordinator.files.put(data, job.dataset.sha256)
        made = coordinator.call(lambda: coordinator.submit(NODE, job, 4, 3600.0))
        _next_topic(link, events, down(FLEET, NODE, "job", made.id, "offer"))
        store.accept(made.id, job.digest, b"{}", 4)
        for phase in ("staging", "ready", *("running", "paused") * 10):
            store.move(made.id, phase)
        store.end(made.id, JobResult(job.digest, "failed", "internal", "as the test wants it"))
        wanted = len(store.waiting())
        while store.waiting():
            outbox.tick()
            topic = _next_topic(link, events, down(FLEET, NODE, "ack"))
            outbox.acknowledged(topic.rpartition("/")[2])
        view, history = coordinator.call(lambda: (coordinator.job(made.id), coordinator.history(made.id)))
        flood_handled = coordinator.metrics.received.labels("state")._value.get()
        assert (view.phase, view.outcome) == ("ended", "failed")
        assert sorted(row.seq for row in history) == list(range(1, wanted + 1))
        assert flood_handled < next(said) / 2
    finally:
        ended.set()
        thread.join()
        link.close()
        store.close()
    dropped = coordinator._link.dropped
    told = re.search(r"^edge_agent_messages_dropped_total (\d+)\.", coordinator.metrics.text().decode(), re.MULTILINE)
    assert told
    assert int(told[1]) >= dropped, "what the broker still had comes meanwhile"


def _next_topic(link: Link, events: SimpleQueue[Any], begin: str) -> str:
    """Take in what a node hears until something comes on a topic; returns that."""
    while True:
        event = events.get(timeout=30)
        link.acknowledge(event)
        if event.topic.startswith(begin):
            return str(event.topic)


def test_connection_that_is_too_slow_does_not_fill_the_memory(
    link: tuple[Link, SimpleQueue[Any]], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks for more blocks than go out does not get them; when the broker takes messages again, they go."""
    monkeypatch.setattr(backlog, "MOST_GOING_BYTES", 2**20)
    up_link, _ = link
    assert place.process
    topic = down(FLEET, NODE, "file", "0" * 64, "block", 0)
    place.process.send_signal(signal.SIGSTOP)
    try:
        taken = sum(up_link.publish(topic, bytes(64 * 1024)) for _ in range(1000))
        assert 0 < taken < 200, "what the kernel takes, and a mebibyte"
    finally:
        place.process.send_signal(signal.SIGCONT)
    wait_for("the way to be free", lambda: up_link.publish(topic, b"again"), 10)


def test_messages_that_have_gone_are_forgotten() -> None:
    """However long a connection lasts: of ten thousand messages little is held, and of those that have not gone nothing is lost."""
    gone, waiting = SimpleNamespace(is_published=lambda: True), SimpleNamespace(is_published=lambda: False)
    going = backlog.Going()
    for n in range(10_000):
        assert going.has_room(b"x")
        going.add(waiting if n % 100 == 0 else gone, b"x")
    held = [message for message, _ in going._given]
    assert held.count(waiting) == 100
    assert len(held) <= 300


# certificates


def test_commands_enroll(cli: Cli, tmp_path: Path) -> None:
    """The first makes the authority, the others use it; OpenSSL finds every certificate valid for what it is, and the same fingerprint."""
    authority = ("--authority", tmp_path / "authority")
    for kind, name in (("broker", "broker.example.org"), ("coordinator", "main"), ("node", "bench-3")):
        made = cli("enroll", kind, name, *authority, "--out", tmp_path / kind, "--days", 30, "--json").json
        purpose = "sslserver" if kind == "broker" else "sslclient"
        files = [str(tmp_path / "authority" / "ca.pem"), made["certificate_file"]]
        verified = subprocess.run(
            ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", *files], capture_output=True, text=True
        )
        assert verified.returncode == 0, verified.stderr
        told = subprocess.run(
            ["openssl", "x509", "-noout", "-fingerprint", "-sha256", "-in", files[1]], capture_output=True, text=True
        ).stdout
        assert made["fingerprint"] in told
        assert Path(made["key_file"]).stat().st_mode & 0o777 == 0o600
        assert 29 < days_left(Path(made["certificate_file"])) <= 30
        assert (tmp_path / kind / "ca.pem").read_bytes() == (tmp_path / "authority" / "ca.pem").read_bytes()
    shown = cli("enroll", "node", "bench-3", *authority, "--out", tmp_path / "node")
    assert "SHA256" in shown.out
    assert "expires" in shown.out
    assert "PRIVATE" not in shown.out


@pytest.mark.parametrize("name", ["coordinator", "../etc", "a/b", "", "Bench", "n" * 65, "node.1", "a b", "ä"])
def test_name_that_is_none_is_refused(name: str, cli: Cli, tmp_path: Path) -> None:
    """It would become a file's, and a user's in the rules of the broker; a node with a dot could pass for a coordinator."""
    refused = cli("enroll", "node", name, "--authority", tmp_path / "authority", "--json")
    assert (refused.code, refused.json["error"]["code"]) == (14, "refused")
    assert not (tmp_path / "authority").exists()


def test_authority_that_others_can_read_signs_nothing(tmp_path: Path) -> None:
    """Its key is the fleet."""
    Authority(tmp_path)
    (tmp_path / "ca.key").chmod(0o644)
    with pytest.raises(ConfigInvalid, match="others can read it"):
        Authority(tmp_path)


def test_authority_is_never_made_over_another(tmp_path: Path) -> None:
    """A directory with one of its two files is a mistake, not a place for a new one."""
    Authority(tmp_path)
    before = (tmp_path / "ca.pem").read_bytes()
    (tmp_path / "ca.key").unlink()
    with pytest.raises(ConfigInvalid):
        Authority(tmp_path)
    assert (tmp_path / "ca.pem").read_bytes() == before


@pytest.mark.parametrize(("days", "says"), [(365, None), (10, "expires in 10 days")])
def test_expiry_that_is_near_is_told(days: int, says: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By `doctor`, and by the running agent once a day."""
    issued = Authority(tmp_path).issue("node", NODE, tmp_path, days)
    assert issued.expires - datetime.now(timezone.utc) > timedelta(days=days - 1)
    tls = Tls(tmp_path / "ca.pem", issued.certificate_file, issued.key_file)
    config = AgentConfig(NODE, tmp_path, Size(2**30), {}, broker=Broker(tls=tls))
    link = Link(config.broker, NODE, [], SimpleQueue(), lambda: None)
    link.supervise()
    link.supervise()
    assert caplog.text.count("certificate_expires") == (says is not None)
    if says is None:
        assert "valid for" in CHECKS["certificate"](config)
    else:
        with pytest.raises(_Wrong, match=says):
            CHECKS["certificate"](config)


def test_new_certificate_is_taken_with_the_next_connection(place: Place) -> None:
    """A node whose files are replaced need not be started again."""
    events: SimpleQueue[Any] = SimpleQueue()
    link = Link(place.broker(NODE), NODE, node_subscriptions(FLEET, NODE), events, lambda: None)
    files = [place.directory / f"{NODE}.{end}" for end in ("pem", "key")]
    kept = [file.read_bytes() for file in files]
    try:
        foreign = _foreign(place, NODE)
        for file in files:
            file.write_bytes((foreign / file.name).read_bytes())
        link.start()
        assert not isinstance(events.get(timeout=10), Connected)
        place.authority.issue("node", NODE, place.directory)
        wait_for("the connection", lambda: isinstance(events.get(timeout=30), Connected))
        [certificate] = x509.load_pem_x509_certificates(files[0].read_bytes())
        assert certificate.subject.rfc4514_string() == f"CN={NODE}"
    finally:
        link.close()
        for file, data in zip(files, kept, strict=True):
            file.write_bytes(data)
