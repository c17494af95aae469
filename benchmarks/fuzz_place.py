"""The receivers of benchmarks/fuzz.py: real daemons with jobs in all states, and what watches them."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import paho.mqtt.client as paho
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fuzz_messages import (
    DELETED,
    DONE,
    FLEET,
    INFO,
    KEY,
    NEW,
    NODE,
    OTHER,
    OTHERS,
    RECEIVERS,
    RESULT,
    SETTLED,
    STAGING,
    Delivery,
    Receiver,
    make_ack,
    make_large,
    make_offer,
    make_order,
)
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from edge_agent.agent import Agent
from edge_agent.config import AgentConfig, Broker, CoordinatorConfig, RestLimits, Size, Trust
from edge_agent.coordinator.database import Database
from edge_agent.coordinator.service import Service
from edge_agent.coordinator.views import JobFilter
from edge_agent.logs import JsonFormatter, tame
from edge_agent.messages import (
    Artifact,
    Cancel,
    Forget,
    JobResult,
    JobStatus,
    NodeState,
    encode,
    read_order,
)
from edge_agent.mqtt import _Connection
from edge_agent.signing import PublicKey, seal
from edge_agent.topics import down, up

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "edge_agent" / "demo" / "tiny"
OTHERS_OWN = up(FLEET, OTHER, "job", OTHERS)
PACKET_LIMIT = Size(16 * 2**10)
"""Of the broker: blocks are as long as it lets them."""


class Wire(paho.Client):
    """A connection without another end: counts acknowledgements, keeps what is published."""

    def __init__(self) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, manual_ack=True)
        self.acknowledged, self.published = 0, list[tuple[str, bytes]]()

    def ack(self, _mid: int, _qos: int) -> MQTTErrorCode:
        self.acknowledged += 1
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def publish(self, topic: str, payload: Any = None, *_: Any, **__: Any) -> paho.MQTTMessageInfo:
        self.published.append((topic, payload))
        info = paho.MQTTMessageInfo(0)
        info.rc, info._published = MQTTErrorCode.MQTT_ERR_SUCCESS, True
        return info


class Lines(logging.Handler):
    """The log, as the daemons write it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.longest = list[str](), 0
        self._json = JsonFormatter()
        self.addFilter(tame)

    def emit(self, record: logging.LogRecord) -> None:
        line = self._json.format(record)
        self.longest = max(self.longest, len(line))
        self.words.append(":".join(re.findall(r"^\w+|(?<= reason=)\w+", record.getMessage())))


class Guard:
    """Hears of every file that this interpreter writes, and of processes and connections; for good, so one is enough."""

    WRITES = frozenset({"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"})
    FORBIDDEN = frozenset({"subprocess.Popen", "os.fork", "os.exec", "os.posix_spawn", "os.system", "socket.connect", "socket.getaddrinfo"})

    def __init__(self) -> None:
        self.root: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.root is None:
            return
        if event in self.FORBIDDEN:
            self.seen.append(f"{event} {args!r}"[:200])
        elif event in self.WRITES or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            paths = [os.fsdecode(path) for path in args[: 1 if event == "open" else 2] if isinstance(path, str | bytes | os.PathLike)]
            self.seen += [f"{event} {path[:200]}" for path in paths if not Path(path).resolve().is_relative_to(self.root)]


class Side:
    """A receiver with the edge at which its messages come."""

    def __init__(self, daemon: Agent | Service) -> None:
        self.daemon, self.wire = daemon, Wire()
        self._connection = _Connection(Broker(), "fuzz", [], "5", lambda _: None, daemon._link._come.take)
        daemon._link._client, daemon._link._subscribed = self.wire, True
        self._number = 0

    def hear(self, topic: bytes, payload: bytes, retained: bool = False) -> None:
        """Hand over a message with QoS 1, as paho does, and let the daemon handle it."""
        self._number += 1
        message = paho.MQTTMessage(self._number, topic)
        message.payload, message.qos, message.retain = payload, 1, retained
        self._connection.client.on_message(self.wire, None, message)  # type: ignore[misc]
        while not self.daemon._events.empty():
            self.daemon._handle(self.daemon._events.get())

    def close(self) -> None:
        self.daemon._store.close()
        self.daemon._lock.close()


class Place:
    """Receivers in a directory of their own, with jobs in all states."""

    def __init__(self, root: Path, receivers: Sequence[Receiver] = RECEIVERS) -> None:
        self.root, self._receivers = root, receivers
        (root / "trusted_keys").write_text(PublicKey(KEY.public_key()).line + "\n")
        for name, files in {"unsafe": {"pytorch_model.bin": b""}, "broken": {"model.safetensors": b"?"}}.items():
            (root / name).mkdir()
            for file, data in (files | {"config.json": b"{}"}).items():
                (root / name / file).write_bytes(data)
        self.sides = self.start()
        for name, side in self.sides.items():
            if name == "coordinator":
                _load_coordinator(side)
            else:
                _load_node(side, KEY if name == "signed" else None)
        self.jobs = self._jobs()

    def start(self) -> dict[str, Side]:
        """Start the daemons on what is there, and tell the nodes the time."""
        sides: dict[str, Side] = {name: Side(self._daemon(name)) for name in self._receivers}
        for name, side in sides.items():
            if name != "coordinator":
                _tell_time(side, KEY if name == "signed" else None)
        return sides

    def _daemon(self, name: Receiver) -> Agent | Service:
        if name == "coordinator":
            return Service(CoordinatorConfig(self.root / name, broker=Broker(packet_limit=PACKET_LIMIT), artifact_limit=Size(2**20)))
        agent = Agent(self._agent(name, Trust(self.root / "trusted_keys") if name == "signed" else None))
        agent._jobs.recover()
        return agent

    def _agent(self, name: str, trust: Trust | None) -> AgentConfig:
        models = {"tiny": MODEL} | {other: self.root / other for other in ("unsafe", "broken", "gone")}
        always = RestLimits(("00:00-12:00", "12:00-00:00"))  # no trainer is ever started, whatever is accepted
        return AgentConfig(
            NODE, self.root / name, Size(2**30), models, device="cpu", trust=trust, rest=always, queue=5, dataset_limit=Size(2**20),
            retention_s=float("inf"), broker=Broker(packet_limit=PACKET_LIMIT),
        )  # fmt: skip

    def settle(self) -> list[str]:
        """Let every daemon do what is due, look, and end what the open node has taken, so that it takes more."""
        for side in self.sides.values():
            side.daemon._tick(time.monotonic())
        wrong = self.examine()
        for name, side in self.sides.items():
            for row in side.daemon._store.open_jobs() if name == "open" else ():
                if row.id != STAGING:
                    _say(side, down(FLEET, NODE, "job", row.id, "cancel"), seal(Cancel(FLEET, NODE, row.id), None))
        return wrong

    def restart(self) -> list[str]:
        """End the daemons as a power cut would, start them again, and look."""
        for side in self.sides.values():
            side.close()
        self.sides = self.start()
        return self.settle()

    def hear(self, delivery: Delivery) -> None:
        """Have a receiver hear a message. What comes on the other node's own topic may change that node's job."""
        side = self.sides[delivery.to]
        side.hear(delivery.topic.encode("latin-1"), delivery.payload.encode("latin-1"), delivery.retained)
        if delivery.to == "coordinator" and delivery.topic.startswith(OTHERS_OWN):
            self.jobs["coordinator"][OTHERS] = self._jobs()["coordinator"][OTHERS]

    def close(self) -> None:
        for side in self.sides.values():
            side.close()
        shutil.rmtree(self.root)

    def changes(self) -> int:
        """Rows that were ever written."""
        return sum(_written(side.daemon._store._db) for side in self.sides.values())

    def _jobs(self) -> dict[str, dict[str, Any]]:
        return {
            name: {row.id: row for row in side.daemon._store.jobs(*[2**31] * (name == "coordinator"))} for name, side in self.sides.items()
        }

    def examine(self) -> list[str]:
        """Return what is not as it should be."""
        wrong = []
        for name, now in self._jobs().items():
            before = self.jobs[name]
            if name != "open" and (new := set(now) - set(before)):
                wrong.append(f"{name} has jobs {new}")
            if name == "signed":  # nothing that is damaged is signed
                wrong += [f"signed: {job} was deleted" for job in set(before) - set(now)]
                wrong += [f"signed: {job} was canceled" for job in now if now[job].outcome == "canceled" != before[job].outcome]
            if name == "coordinator":
                wrong += self._examine_coordinator(now, before)
                continue
            wrong += [f"{name} has {job}, an order for another" for job, row in now.items() if not _is_ours(job, row.payload)]
            wrong += [f"{name}: {job} has changed" for job in set(now) & set(before) if now[job].payload != before[job].payload]
            own = {f"jobs/{job}" for job in now}
            wrong += [f"{name} has {path}" for path in _listed(self.root / name) if not (FILES.fullmatch(path) or path[:31] in own)]
        return wrong

    def _examine_coordinator(self, now: dict[str, Any], before: dict[str, Any]) -> list[str]:
        service: Any = self.sides["coordinator"].daemon
        listed = [service.nodes(None, None, 2**31), service.jobs(JobFilter(), None, 2**31)]
        msgspec.json.encode([*listed, *(service.history(job) for job in now)])  # what the HTTP API reads
        lost = [f"coordinator: {job} was lost" for job in set(before) - set(now) - {DELETED}]
        return lost + [f"coordinator: {job} has changed" for job in (OTHERS, SETTLED) if now[job] != before[job]]


FILES = re.compile(r"agent\.sqlite(-wal|-shm)?|process\.lock|files/sha256/[0-9a-f]{64}|files/incoming/[0-9a-f]{64}\.\d+\.(part|map)")


def _listed(root: Path) -> Iterator[str]:
    return (str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


def _written(db: sqlite3.Connection | Database) -> int:
    """Rows that a daemon has written since it opened its file."""
    if isinstance(db, sqlite3.Connection):
        return db.total_changes
    with closing(db._engine.raw_connection()) as connection:
        return int(connection.driver_connection.total_changes)  # type: ignore[union-attr]


def _is_ours(job: str, payload: bytes) -> bool:
    order = read_order(payload)
    return (order.id, order.fleet, order.node) == (job, FLEET, NODE)


def _say(side: Side, topic: str, data: object, **numbers: Any) -> None:
    side.hear(topic.encode(), encode(data, "fuzz", **numbers))


def _tell_time(side: Side, key: Ed25519PrivateKey | None) -> None:
    agent: Any = side.daemon
    agent._greet(time.monotonic())
    [hello] = agent._hellos
    _say(side, down(FLEET, NODE, "ack", hello), seal(make_ack(hello), key))


def _load_node(side: Side, key: Ed25519PrivateKey | None) -> None:
    agent: Any = side.daemon
    for job in (SETTLED, DELETED, DONE):
        _say(side, down(FLEET, NODE, "job", job, "offer"), make_offer(make_order(job), key))
        if job != DONE:
            _say(side, down(FLEET, NODE, "job", job, "cancel"), seal(Cancel(FLEET, NODE, job), key))
            for message in agent._store.waiting():
                _say(side, down(FLEET, NODE, "ack", message), seal(make_ack(message), key))
    _say(side, down(FLEET, NODE, "command", "forget"), seal(Forget(FLEET, NODE, DELETED), key))
    report = hashlib.sha256(b"{}").hexdigest()
    agent._jobs._files.put(b"{}", report)
    agent._store.end(DONE, JobResult(make_order(DONE).job.digest, "succeeded", artifacts=(Artifact("result.json", report, 2),)))
    _say(side, down(FLEET, NODE, "job", STAGING, "offer"), make_offer(make_large(STAGING), key, None))
    agent._tick(time.monotonic())


def _load_coordinator(side: Side) -> None:
    service: Any = side.daemon
    for job in (STAGING, DONE, SETTLED, DELETED, NEW, OTHERS):
        order = make_order(job, node=OTHER if job == OTHERS else NODE)
        service._store.add_job(order, make_offer(order).order)
    for data, kind in ((NodeState("ready", 7, 2, 0), "state"), (INFO, "info")):
        _say(side, up(FLEET, NODE, kind), data)
    service._tick(time.monotonic())
    for job, seq in ((STAGING, 1), (DONE, 1), (SETTLED, 1), (DELETED, 1)):
        _say(side, up(FLEET, NODE, "job", job, "status"), JobStatus(make_order(job).job.digest, "accepted"), boot=7, seq=seq, attempt=0)
    _say(side, up(FLEET, NODE, "job", DONE, "result"), RESULT, boot=7, seq=2, attempt=1)
    for job in (SETTLED, DELETED):
        _say(side, up(FLEET, NODE, "job", job, "result"), JobResult(make_order(job).job.digest, "canceled", "canceled"), boot=7, seq=2)
    service.forget(DELETED)
    service.listen(STAGING, lambda _: None)
