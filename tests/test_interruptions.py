"""Plugs are pulled in mid-job: the job ends once, with one result, and the adapter is that of an undisturbed run, bit for bit."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import paho.mqtt.client as paho
import psutil
import pytest
from conftest import Cli, write_domain
from fleet import BUDGET, MOSQUITTO, PROTOCOL, QUICK, Fleet, free_port, wait_for
from orders import NODE
from paho.mqtt.enums import CallbackAPIVersion
from websockets import Subprotocol
from websockets.sync.server import ServerConnection, serve

from edge_agent.config import Broker, Size
from edge_agent.job_building import build_job
from edge_agent.messages import Cancel, encode, new_id
from edge_agent.mqtt import Connected, Link
from edge_agent.signing import seal
from edge_agent.topics import down
from profiles.device import device_profile


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cli: Cli, tiny_model: Path) -> bytes:
    """The adapter of the same job, trained by hand without any interruption."""
    base = tmp_path_factory.mktemp("undisturbed")
    settings = [part for name, value in QUICK.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    data = write_domain(base / "data.jsonl", "chain", 24, 5)
    ran = cli("train", "--model", tiny_model, "--data", data, "--budget", BUDGET, "--out", base / "job", *settings, "--json")
    assert ran.code == 0, ran.out + ran.err
    return (base / "job" / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    """A fleet of its own for each test."""
    with Fleet() as running:
        yield running
        running.check_messages()


def check_end(fleet: Fleet, job: str, undisturbed: bytes) -> None:
    """One end, one result, the same adapter; never two trainers; nothing left to say."""
    view = fleet.ended(job)
    assert view.outcome == "succeeded", view
    assert fleet.adapter(job) == undisturbed
    assert fleet.trainers_at_once == 1
    results = fleet.heard("job", job, "result")
    assert len({m["id"] for m in results}) == 1
    history = [row.phase for row in fleet.client.history(job) if not row.late]
    assert history.count("ended") == 1
    wait_for("an empty outbox", lambda: outbox(fleet) == 0)


def outbox(fleet: Fleet) -> int:
    with sqlite3.connect(f"file:{fleet.directory}/node/agent.sqlite?mode=ro", uri=True) as db:
        count = int(db.execute("SELECT count(*) FROM outbox").fetchone()[0])
    db.close()
    return count


@pytest.mark.slow
def test_trainer_killed(fleet: Fleet, undisturbed: bytes) -> None:
    """kill -9 of the child alone: the agent starts it again from the checkpoint."""
    job = fleet.submit(fleet.data()).id
    fleet.trained(job, 2)
    fleet.trainers()[0].kill()
    check_end(fleet, job, undisturbed)
    assert fleet.client.job(job).attempt == 2


@pytest.mark.slow
def test_a_trainer_that_the_kernel_ends_goes_on_one_rung_lower(fleet: Fleet, tmp_path: Path) -> None:
    """The miss stands in the report, and the plan of the next start takes less in the stage that lacked memory."""
    fleet.stop("agent")
    kills = tmp_path / "kills"
    kills.write_text("0")
    fleet.start_agent((str(Path(__file__).parent / "counted_agent.py"), str(kills)))
    job = fleet.submit(fleet.data(), budget_bytes=device_profile("cpu").overhead_bytes + 400 * 2**20).id
    fleet.trained(job, 2)
    first = json.loads((fleet.directory / "node" / "jobs" / job / "plan.json").read_text())
    kills.write_text("1")
    fleet.trainers()[0].kill()
    assert fleet.ended(job).outcome == "succeeded"
    fleet.adapter(job)
    result = json.loads((fleet.directory / f"fetched-{job}" / "result.json").read_text())
    assert [(miss["stage"], miss["rung"]) for miss in result["misses"]] == [("train", first["rung"])]
    assert "kernel" in result["misses"][0]["text"]
    assert result["plan"]["number"] > first["number"]


@pytest.mark.slow
def test_a_trainer_that_always_dies_ends_as_crash_loop() -> None:
    """After `max_attempts` starts without a result the job has failed, and the next job runs."""
    with Fleet(agent="max_attempts = 2\n") as fleet:
        job = fleet.submit(fleet.data(), schedule__updates=500).id
        for attempt in (1, 2):
            wait_for("the trainer", lambda attempt=attempt: fleet.client.job(job).attempt == attempt)  # type: ignore[misc]
            wait_for("the child", fleet.trainers)[0].kill()
        view = fleet.ended(job)
        assert (view.outcome, view.reason) == ("failed", "crash_loop")
        assert "SIGKILL" in (view.text or "")
        assert fleet.ended(fleet.submit(fleet.data("next", 20, 7), schedule__updates=2).id).outcome == "succeeded"
        fleet.check_messages()


def test_orders_of_the_past_are_ignored(fleet: Fleet) -> None:
    """A retained cancel that a node finds when it comes to a broker for the first time is not obeyed."""
    fleet.stop("agent")
    fleet.stop("broker")
    fleet.start_broker()  # it remembers no session
    wait_for("the ear", fleet.ear.is_connected)
    job = new_id()
    fleet.speak(down("default", NODE, "job", job, "cancel"), encode(seal(Cancel("default", NODE, job), None), "test"), retain=True)
    fleet.start_agent()
    wait_for("the retained order", lambda: f"retained_ignored topic=edge1/default/{NODE}/down/job/{job}/cancel" in fleet.log("agent"))
    wait_for("the node", lambda: fleet.client.nodes()[0].heartbeat is not None)
    assert fleet.heard("job", job, "result") == []


def test_an_offer_that_expires_while_its_node_is_away_is_not_given(fleet: Fleet) -> None:
    """A killed node counts as present until its will is out, in MQTT 5, so it is offered a job. It is back when that has expired, never
    sees the offer, and for the coordinator was not away. In 3.1.1 that is told at once, and there is no offer."""
    fleet.stop("agent", signal.SIGKILL)
    killed = time.monotonic()
    if PROTOCOL == "3.1.1":
        wait_for("the last will", lambda: not fleet.present())
    data = fleet.data()
    document = build_job("tiny", data, None, {"budget_bytes": BUDGET, "method.name": "nlft"} | QUICK, [])
    job = fleet.client.submit(NODE, document, {document.dataset.sha256: data}, priority=4, expires_s=2).id
    assert fleet.ended(job).outcome == "expired"
    offered = [topic for _, topic, _ in fleet.messages if topic.endswith(f"{job}/offer")]
    assert len(offered) == (0 if PROTOCOL == "3.1.1" else 1)
    fleet.start_agent()
    wait_for("the next start", lambda: fleet.log("agent").count('"connected ') == 2)
    fleet.publish(b"{}", "command", "last")
    wait_for("what came after it", lambda: "command_unknown name=last" in fleet.log("agent"))
    assert "job_rejected" not in fleet.log("agent")
    assert "offer_waits" not in fleet.log("agent")
    lost = "state=lost" in fleet.log("coordinator")
    assert lost if PROTOCOL == "3.1.1" else not lost or time.monotonic() - killed > 9  # the keepalive, and so the delay, is 10 s


@pytest.mark.slow
def test_a_trainer_that_stands_still_costs_no_connection() -> None:
    """It is stopped in mid-job, as by native code that lets nothing else run, for longer than it takes until a last will is told where the
    agent itself is stopped: that one stays connected, and no will is told. The job goes on."""
    fleet = Fleet(protocol="3.1.1")  # which knows no delay of a will
    config = fleet.config("agent")
    config.write_text(config.read_text().replace("keepalive_s = 10", "keepalive_s = 5"))

    def states() -> list[str]:
        return [state["data"]["state"] for state in fleet.heard("state")]

    with fleet:
        job = fleet.submit(fleet.data(), schedule__updates=5000).id
        fleet.trained(job, 1)
        agent, [trainer] = psutil.Process(fleet.pid("agent")), fleet.trainers()
        agent.suspend()
        stopped = time.monotonic()
        wait_for("the last will", lambda: states()[-1] == "lost")
        took_s = time.monotonic() - stopped
        agent.resume()
        wait_for("the node", lambda: states()[-1] == "ready" and fleet.present())
        said = states()
        trainer.suspend()
        over = time.monotonic() + 1.5 * took_s
        wait_for("the end of that time", lambda: time.monotonic() > over)
        assert trainer.status() == psutil.STATUS_STOPPED
        assert (states(), fleet.present()) == (said, True)
        trainer.resume()
        fleet.client.cancel(job)
        view = fleet.ended(job)
        assert (view.outcome, view.attempt) == ("canceled", 1)
        fleet.check_messages()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_link_whose_thread_has_died_is_started_again(fleet: Fleet) -> None:
    """A defect that ends the thread of a connection (here in what it asks for its last will) does not leave the process mute."""
    asked: list[int] = []

    def birth() -> None:
        asked.append(1)
        if len(asked) == 1:
            raise TypeError("a defect")

    events: SimpleQueue[object] = SimpleQueue()
    link = Link(Broker(port=fleet.port), "mended", ["edge1/#"], events, birth)
    link.start()
    wait_for("the death of the thread", lambda: asked and not [t for t in threading.enumerate() if t.name == "mqtt"])
    link.supervise()
    wait_for("the connection", lambda: link.connected)
    link.supervise()
    assert len(asked) == 2
    link.close()


@pytest.mark.slow
def test_a_node_whose_id_is_taken_comes_back(fleet: Fleet, undisturbed: bytes) -> None:
    """Another client comes under its name in mid-job, and is gone again; the job ends as if nothing had been."""
    job = fleet.submit(fleet.data()).id
    fleet.trained(job, 1)
    other = paho.Client(CallbackAPIVersion.VERSION2, NODE, protocol=paho.MQTTv5)
    other.connect("127.0.0.1", fleet.port)
    other.loop_start()
    wait_for("the end of its connection", lambda: '"disconnected ' in fleet.log("agent"))
    other.disconnect()
    other.loop_stop()
    wait_for("the next one", lambda: fleet.log("agent").count('"connected ') > 1)
    check_end(fleet, job, undisturbed)


def test_a_link_tells_that_its_id_was_taken(caplog: pytest.LogCaptureFixture) -> None:
    """By what a broker of MQTT 5 says (reason 0x8E); the Mosquitto of Debian 12 only closes the connection."""
    with socket.create_server(("127.0.0.1", 0)) as broker:
        events: SimpleQueue[object] = SimpleQueue()
        link = Link(Broker(port=broker.getsockname()[1]), "taken", ["edge1/#"], events, lambda: None)
        link.start()
        client, _ = broker.accept()
        with client:
            client.recv(1000)
            client.sendall(b"\x20\x03\0\0\0")  # CONNACK
            client.recv(1000)
            client.sendall(b"\x90\x04\0\x01\0\x01\xe0\x02\x8e\0")  # SUBACK, DISCONNECT
            wait_for("word of it", lambda: "id_taken_over client=taken" in caplog.text)
        link.close()


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_link_keeps_to_the_packets_that_its_broker_takes(protocol: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As it says in MQTT 5, else as configured: what is longer is refused and told, and the connection, which it would end, goes on."""
    port, limit = free_port(), 20_000
    (tmp_path / "mosquitto.conf").write_text(f"listener {port} 127.0.0.1\nuser root\nallow_anonymous true\nmax_packet_size {limit}\n")
    assert MOSQUITTO
    events: SimpleQueue[Any] = SimpleQueue()
    said = {} if protocol == "5" else {"packet_limit": Size(limit)}
    link = Link(Broker(port=port, protocol=protocol, **said), "brief", ["edge1/#"], events, lambda: None)  # type: ignore[arg-type]
    with subprocess.Popen([MOSQUITTO, "-c", str(tmp_path / "mosquitto.conf")], stderr=subprocess.DEVNULL) as broker:
        try:
            link.start()
            while not isinstance(events.get(timeout=30), Connected):
                pass
            assert link.payload_limit == 16_000
            assert not link.publish("edge1/long", bytes(16_001), qos=1)
            assert not link.publish("edge1/long", bytes(200_000))
            assert link.publish("edge1/short", bytes(16_000), qos=1)
            came = events.get(timeout=10)
            assert (came.topic, len(came.payload)) == ("edge1/short", 16_000)
            assert caplog.text.count("message_too_long topic=edge1/long") == 2
            assert events.empty()
        finally:
            link.close()
            broker.terminate()


def test_a_websocket_stands_the_pings_of_its_server() -> None:
    """A strict server, as that of the package websockets, which pings every 20 seconds by itself."""
    told: SimpleQueue[bool] = SimpleQueue()

    def speak(connection: ServerConnection) -> None:
        connection.recv()
        connection.send(b"\x20\x03\0\0\0")  # CONNACK
        connection.recv()
        connection.send(b"\x90\x04\0\x01\0\x01")  # SUBACK
        told.put(connection.ping().wait(10))
        connection.send(b"\xe0\x02\0\0")  # DISCONNECT

    with serve(speak, "127.0.0.1", 0, subprotocols=[Subprotocol("mqtt")]) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        broker = Broker(port=server.socket.getsockname()[1], websocket_path="/mqtt")
        link = Link(broker, "ponging", ["edge1/#"], SimpleQueue(), lambda: None)
        link.start()
        assert told.get(timeout=90)
        link.close()


def test_coordinator_killed_in_mid_job(fleet: Fleet, undisturbed: bytes) -> None:
    """kill -9 of the coordinator: the job runs on and ends; the result is handed in to the next coordinator."""
    job = fleet.submit(fleet.data()).id
    fleet.trained(job, 2)
    fleet.stop("coordinator", signal.SIGKILL)
    wait_for("the trainer to end", lambda: not fleet.trainers())
    fleet.start_coordinator()
    check_end(fleet, job, undisturbed)
