"""The valid messages that benchmarks/fuzz.py begins with, of every topic, and how they are damaged."""

from __future__ import annotations

import base64
import copy
import datetime
import hashlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_agent.asyncapi import channel_of
from edge_agent.job import Dataset, Job, Judging, NlftOptions
from edge_agent.messages import (
    Ack,
    Addressed,
    Artifact,
    Cancel,
    Changed,
    CoordinatorState,
    Drain,
    Envelope,
    File,
    FileRequest,
    Forget,
    Forgotten,
    Heartbeat,
    Hello,
    JobProgress,
    JobResult,
    JobStatus,
    NodeInfo,
    NodeLimits,
    NodeState,
    Offer,
    Options,
    OptionsState,
    Order,
    PlanAnswer,
    PlanRequest,
    Report,
    Resume,
    StageDone,
    Texts,
    Watch,
    encode,
)
from edge_agent.report import Event, Measured, mcnemar, wilson
from edge_agent.signing import PublicKey, seal, seal_bytes
from edge_agent.topics import coordinator_changed, coordinator_state, down, up
from profiles.sensors import Reading, Resources

ROOT = Path(__file__).parent.parent
FLEET, NODE, OTHER = "default", "node-1", "another-node"
BLOCK_BYTES = 13_107
"""What a packet limit of 16 KiB leaves."""
KEY, STRANGER = (Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name).digest()) for name in (b"trusted", b"stranger"))
DATA, LARGE_DATA = b'{"question": "1 + 1?", "answer": "2"}\n', b"x" * 20_000
SHA256, LARGE_SHA256, EMPTY = (hashlib.sha256(data).hexdigest() for data in (DATA, LARGE_DATA, b""))
STAGING, DONE, SETTLED, DELETED, NEW, OTHERS = (f"01k5g3v8qy7m2x9d4c6b1n0pz{letter}" for letter in "abcdef")
"""Jobs: whose file is on its way, whose result is not acknowledged, is, is deleted, is unknown, is another node's."""
Receiver = Literal["open", "signed", "coordinator"]
RECEIVERS: tuple[Receiver, ...] = get_args(Receiver)


class Delivery(msgspec.Struct, frozen=True):
    """A message as a broker hands it over, its bytes as characters of ISO 8859-1."""

    to: Receiver
    topic: str
    payload: str
    retained: bool = False


# valid


FIRST = datetime.datetime(2099, 12, 1, tzinfo=datetime.timezone.utc)
"""When orders are issued, by the clock of the coordinator."""


def make_ack(message: str) -> Ack:
    return Ack(FLEET, NODE, message, FIRST, 0)


def make_order(job: str, **changes: Any) -> Order:
    document = {"model": "tiny", "dataset": Dataset(SHA256), "budget_bytes": 2**30}
    document |= {name: changes.pop(name) for name in list(changes) if name in Job.__struct_fields__ and name != "dataset"}
    fields = {"id": job, "fleet": FLEET, "node": NODE, "issued": FIRST, "expires": FIRST + datetime.timedelta(days=30)}
    return Order(**fields | {"job": Job(**document), "dataset": File(SHA256, len(DATA))} | changes)  # type: ignore[arg-type]


def make_offer(order: Order, key: Ed25519PrivateKey | None = None, contents: bytes | None = DATA) -> Offer:
    return Offer(seal(order, key), {} if contents is None else {hashlib.sha256(contents).hexdigest(): contents})


def make_large(job: str) -> Order:
    return msgspec.structs.replace(
        make_order(job),
        job=Job(model="tiny", dataset=Dataset(LARGE_SHA256), budget_bytes=2**30),
        dataset=File(LARGE_SHA256, len(LARGE_DATA)),
    )


RESOURCES = Resources(Reading(6e9), Reading(8e9), 10**9, 10**10, 6 * 2**30, None, Reading(12.5), Reading(41.0), Reading(None, "no counter"))
INFO = NodeInfo("0.1.0", "3.11.7", "a GPU", "cuda", 8 * 2**30, {"tiny": EMPTY}, NodeLimits(2**30, 2**28, 3), {"torch": "2.9.0"})
RESULT = JobResult(
    make_order(DONE).job.digest, "succeeded", accuracy=Measured(wilson(3, 9), wilson(8, 9), mcnemar([False], [True])), seconds=60.0,
    peak_bytes=10**9, artifacts=(Artifact("result.json", LARGE_SHA256, len(LARGE_DATA)), Artifact("adapter_config.json", SHA256, 2**30)),
    accepted=True,
)  # fmt: skip
PROGRESS = JobProgress(Event(time=1.5, event="progress", stage="train", loss=0.5), [StageDone("load", 2.0, 1)], RESOURCES)
REQUEST = FileRequest(BLOCK_BYTES, [0, 1, 2])
PLAN = PlanRequest(make_order(NEW).job, Texts(24, 175, 125))


def _refused_orders() -> Iterator[Order]:
    """Yield orders of a new job that no node takes, each for another reason."""
    past = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
    for changes in (
        {"node": OTHER}, {"fleet": "another"}, {"issued": past, "expires": past + datetime.timedelta(days=1)}, {"issued": past},
        {"budget_bytes": 2**40}, {"budget_bytes": 2**20}, {"device": "cuda"}, {"judging": Judging("endpoint", "judge")},
        {"model_fingerprint": EMPTY}, {"dataset": File(EMPTY, 0)}, {"dataset": File(SHA256, 2**40)}, {"evaluation": File(EMPTY, 0)},
        {"model": "unsafe"}, {"model": "broken"}, {"model": "gone"}, {"model": "../../etc/passwd"}, {"model": "\0"}, {"model": "m" * 4096},
    ):  # fmt: skip
        yield make_order(NEW, **changes)


def _refused_offers() -> Iterator[Offer]:
    """Yield offers of a new job that no node takes, although their order may be one."""
    yield make_offer(make_order(NEW), contents=b"a file that nobody asked for")
    yield Offer(make_offer(make_order(NEW)).order, {SHA256: b"another file under that name"})
    yield Offer(make_offer(make_large(NEW)).order, {LARGE_SHA256: b"x" * 100_000})
    yield msgspec.structs.replace(
        make_offer(make_order(NEW)), order=msgspec.structs.replace(make_offer(make_order(NEW)).order, payload_type="text/plain")
    )
    yield msgspec.structs.replace(make_offer(make_order(NEW)), order=seal_bytes(b"no order", Order, None))


def _controls() -> Iterator[tuple[tuple[str, ...], Addressed]]:
    """Yield what a node is told besides offers, by topic; where it is signed it stops and deletes nothing."""
    yield from ((("job", job, "cancel"), Cancel(FLEET, NODE, job)) for job in (DONE, NEW))
    yield from ((("job", job, "options"), Options(FLEET, NODE, job, 1, NlftOptions(correct_threshold=0.5))) for job in (DONE, NEW, STAGING))
    yield ("job", STAGING, "options"), Options(FLEET, NODE, STAGING, 2, NlftOptions(references="live"))
    yield ("job", STAGING, "options"), Options(FLEET, NODE, DONE, 3, NlftOptions())
    yield ("command", "forget"), Forget(FLEET, NODE, STAGING)  # it has not ended
    yield ("command", "drain"), Drain(FLEET, NODE, 7)
    yield ("command", "resume"), Resume(FLEET, NODE, 8)
    yield ("command", "resume"), Resume(FLEET, NODE, 0)
    yield ("ack", DONE), make_ack(DONE)
    yield ("job", DONE, "cancel"), Drain(FLEET, NODE, 9)
    yield ("job", STAGING, "cancel"), Cancel(FLEET, NODE, DONE)
    yield ("job", STAGING, "cancel"), Cancel(FLEET, OTHER, STAGING)
    yield ("command", "drain"), Drain("another", NODE, 9)


def _harmful() -> Iterator[tuple[tuple[str, ...], Envelope]]:
    """Yield what stops a job and deletes one, without a signature."""
    yield ("job", STAGING, "cancel"), seal(Cancel(FLEET, NODE, STAGING), None)
    yield ("command", "forget"), seal(Forget(FLEET, NODE, SETTLED), None)


def _refused_controls() -> Iterator[tuple[tuple[str, ...], Envelope]]:
    """Yield what a node that asks for signatures does not do: unsigned, signed by another, with the signature of something else."""
    for parts, unsigned in _harmful():
        yield parts, unsigned
        yield parts, msgspec.structs.replace(unsigned, signatures=seal_bytes(unsigned.payload, Order, STRANGER).signatures)
        yield parts, msgspec.structs.replace(unsigned, signatures=seal_bytes(unsigned.payload, Order, KEY).signatures)
    yield ("job", STAGING, "options"), seal(Options(FLEET, NODE, STAGING, 1, NlftOptions(correct_threshold=0.5)), None)
    for name, kind in (("drain", Drain), ("resume", Resume)):
        yield ("command", name), seal(kind(FLEET, NODE, 10), None)
    yield ("ack", DONE), seal(make_ack(DONE), None)


def seeds() -> list[Delivery]:
    """Return valid messages of every topic; of offers also those that are refused, each for another reason."""
    said: list[tuple[Receiver, str, object]] = []
    for to in ("open", "signed"):
        key = KEY if to == "signed" else None
        offers = [(job, make_offer(make_order(job), key)) for job in (DONE, SETTLED, DELETED)] + [
            (STAGING, make_offer(make_large(STAGING), key, None))
        ]
        offers.append((DONE, make_offer(make_order(DONE, seed=1), key)))
        offers += [(NEW, make_offer(order, key)) for order in _refused_orders()]
        if to == "signed":  # no valid one: whatever is damaged on the way, it must not be accepted
            offers += [(NEW, make_offer(make_order(NEW), other)) for other in (None, STRANGER)]
        else:
            offers += [(NEW, offer) for offer in (*_refused_offers(), make_offer(make_order(NEW)))]
        said += [(to, down(FLEET, NODE, "job", job, "offer"), offer) for job, offer in offers]
        said += [(to, down(FLEET, NODE, *parts), seal(payload, key)) for parts, payload in _controls()]
        said += [(to, down(FLEET, NODE, *parts), envelope) for parts, envelope in (_harmful() if key is None else _refused_controls())]
        said += [(to, down(FLEET, NODE, *parts), data) for parts, data in (
            (("job", STAGING, "watch"), Watch(10.0)), (("command", "report"), Report()), (("plan", NEW, "request"), PLAN),
            (("file", hashlib.sha256(b"{}").hexdigest(), "request"), REQUEST), (("file", LARGE_SHA256, "request"), REQUEST),
            (("file", LARGE_SHA256, "block", 0), LARGE_DATA[:BLOCK_BYTES]), (("file", LARGE_SHA256, "block", 1), LARGE_DATA[BLOCK_BYTES:]),
        )]  # fmt: skip
        said.append((to, coordinator_state(FLEET, "main"), CoordinatorState(True, 3)))
    digest = make_order(STAGING).job.digest
    said += [("coordinator", up(FLEET, NODE, *parts), data) for parts, data in (
        (("hello",), Hello()), (("state",), NodeState("ready", 7, 3, 1)), (("state",), NodeState("lost", 7, 2, 0)), (("info",), INFO),
        (("heartbeat",), Heartbeat(RESOURCES, 0, STAGING)), (("job", STAGING, "status"), JobStatus(digest, "running")),
        (("job", STAGING, "status"), JobStatus(digest, "ended", "rejected", "busy", "16 jobs wait already")),
        (("job", STAGING, "status"), JobStatus(digest, "running", options=OptionsState(2, 1, 40, "why not"))),
        (("job", SETTLED, "status"), JobStatus(digest, "running")), (("job", OTHERS, "status"), JobStatus(digest, "running")),
        (("job", STAGING, "progress"), PROGRESS),
        (("plan", NEW, "answer"), PlanAnswer(None, "oom_predicted", "it does not fit")),
        (("job", DONE, "result"), RESULT), (("job", STAGING, "result"), RESULT), (("job", DELETED, "forgotten"), Forgotten()),
        (("job", STAGING, "forgotten"), Forgotten()), (("file", SHA256, "request"), REQUEST),
        (("file", LARGE_SHA256, "block", 0), LARGE_DATA[:BLOCK_BYTES]), (("file", LARGE_SHA256, "block", 1), LARGE_DATA[BLOCK_BYTES:]),
    )]  # fmt: skip
    said += [("coordinator", coordinator_changed(FLEET, instance), changed) for instance, changed in (
        ("second", Changed([DONE], [])), ("second", Changed([NEW], [])), ("second", Changed([], [NODE])),
        ("second", Changed([DONE], ["nobody"])), ("main", Changed([DONE], [])),
    )]  # fmt: skip
    numbers: dict[str, Any] = {"boot": 7, "seq": 2, "attempt": 1}
    return [
        Delivery(to, topic, (data if isinstance(data, bytes) else encode(data, "fuzz", **numbers)).decode("latin-1"))
        for to, topic, data in said
    ]


def label(delivery: Delivery) -> str:
    """Return whom a valid message is for, and its topic without ids."""
    return f"{delivery.to} {channel_of(delivery.topic).address.removeprefix('edge1/{fleet}/')}"


# damage

NASTY: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**31, 2**53, 2**63, 2**64, 10**30, -(10**30), 1.5, 1e308, 5e-324, -0.0, float("nan"), float("inf"),
    "", "\0", "a\0b", "a\nb", "../" * 8 + "etc/passwd", "/etc/passwd", "..", ".", "~", "C:\\", "%2e%2e%2f", "$(reboot)", "{0.__class__}",
    "%s%n", "#", "+", "'; DROP TABLE jobs; --", "\u202e\ufeff", "e\u0301", "\U0001d54f", "\u0661" * 64, "A" * 64, "x" * 10_000,
    "\U0001f600" * 2_000, "(a*)*$", "((a{100}){100}){100}", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59",
    STAGING, DONE, SETTLED, DELETED, NEW, OTHERS, SHA256, LARGE_SHA256, NODE, OTHER, "tiny", "ended", "succeeded",
    [], {}, [[]], {"": {}}, "@digits", "@deep", "@surrogate", "@zeros", "@keys",
)  # fmt: skip
RAW = {
    '"@zeros"': json.dumps([0] * 5_000), '"@keys"': json.dumps({str(n): n for n in range(500)}), '"@digits"': "9" * 5_000,
    '"@deep"': "[" * 20_000 + "]" * 20_000, '"@surrogate"': '"\\ud800"',
}  # fmt: skip
"""What no value of Python is written as."""


class Damage:
    """Damages messages, the same for the same seed."""

    def __init__(self, deliveries: list[Delivery], seed: int) -> None:
        self._all, self._rng = deliveries, random.Random(seed)
        self._values = [value for d in deliveries if d.payload.startswith("{") for _, _, value in _places(json.loads(d.payload))]

    def __call__(self) -> tuple[Delivery, Delivery]:
        """Return a valid message and what became of it."""
        rng = self._rng
        whole = rng.choice(self._all)
        topic, payload = self._fresh(whole)
        if rng.random() < 0.95:
            if payload.startswith(b"{") and rng.random() < 0.7:
                payload = self._json(payload)
            if rng.random() < 0.35:
                payload = self._bytes(payload)
        if rng.random() < 0.1:
            topic = self._topic(topic)
        return whole, Delivery(whole.to, topic.decode("latin-1"), payload.decode("latin-1"), rng.random() < 0.05)

    def _ulid(self) -> str:
        return "0" + "".join(self._rng.choices("0123456789abcdefghjkmnpqrstvwxyz", k=25))

    def _fresh(self, whole: Delivery) -> tuple[bytes, bytes]:
        """Return topic and payload; an offer of a new job gets another id, because the second of a job that is refused is not looked at."""
        topic, payload = whole.topic.encode("latin-1"), whole.payload.encode("latin-1")
        if not whole.topic.endswith(f"{NEW}/offer") or self._rng.random() < 0.1:
            return topic, payload
        job, message = self._ulid().encode(), json.loads(payload)
        order = message["data"]["order"]
        text = base64.b64decode(order["payload"]).replace(NEW.encode(), job)
        order["payload"] = base64.b64encode(text).decode()
        if order["signatures"] and order["signatures"][0]["keyid"] == PublicKey(KEY.public_key()).fingerprint:
            order["signatures"] = msgspec.to_builtins(seal_bytes(text, Order, KEY).signatures)
        return topic.replace(NEW.encode(), job), json.dumps(message).encode()

    def _topic(self, topic: bytes) -> bytes:
        rng, parts = self._rng, topic.split(b"/")
        place = rng.randrange(len(parts))
        match rng.randrange(5):
            case 0:
                return self._bytes(topic)[:65_535]
            case 1:
                parts[place] = str(rng.choice(NASTY)).encode()
            case 2:
                del parts[place]
            case 3:
                parts.insert(place, rng.choice(parts))
            case _:
                parts[place] = rng.choice(rng.choice(self._all).topic.encode().split(b"/"))
        return b"/".join(parts)[:65_535]

    def _bytes(self, data: bytes) -> bytes:
        rng, found = self._rng, bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            start = rng.randrange(len(found) + 1)
            end = min(len(found), start + rng.choice((0, 1, 4, 64)))
            match rng.randrange(6):
                case 0 if start < len(found):
                    found[start] ^= 1 << rng.randrange(8)
                case 1:
                    found[start:start] = rng.randbytes(rng.choice((1, 2, 16)))
                case 2:
                    del found[start:end]
                case 3:
                    other = rng.choice(self._all).payload[:70_000].encode("latin-1")
                    found[start:end] = other[(cut := rng.randrange(len(other) + 1)) : cut + 200]
                case 4:
                    del found[start:]
                case _:
                    found[start:start] = found[start:end] * rng.choice((1, 2, 50))
        if rng.random() < 0.002:
            found += b" " * 300_000
        return bytes(found)

    def _json(self, payload: bytes) -> bytes:
        rng, message = self._rng, json.loads(payload)
        if rng.random() < 0.8:  # not known yet
            message["id"] = self._ulid()
            message["seq"], message["boot"] = rng.choice(((2, 7), (3, 7), (rng.randrange(50), rng.randrange(20))))
        envelope = message["data"].get("order") or ("payload" in message["data"] and message["data"])
        if envelope and rng.random() < 0.6:
            inner = base64.b64decode(envelope["payload"])
            inner = self._changed(json.loads(inner)) if inner.startswith(b"{") else self._bytes(inner)
            envelope["payload"] = base64.b64encode(inner).decode()
            return json.dumps(message).encode()
        return self._changed(message)

    def _place(self, part: Any) -> tuple[Any, Any, Any]:
        """Return some (container, key or index, value) of a JSON document."""
        while True:
            key = self._rng.choice(list(part)) if isinstance(part, dict) else self._rng.randrange(len(part))
            value = part[key]
            if not value or not isinstance(value, dict | list) or self._rng.random() < 0.2:
                return part, key, value
            part = value

    def _changed(self, message: dict[str, Any]) -> bytes:
        rng = self._rng
        for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
            holder, key, value = self._place(message)
            match rng.randrange(6):
                case 0:
                    del holder[key]
                case 1 if isinstance(holder, dict):
                    holder[str(rng.choice(NASTY))] = value
                case 2:
                    holder[key] = copy.deepcopy(rng.choice(self._values))
                case 3 | 4:
                    holder[key] = self._other(value)
                case _:
                    holder[key] = copy.deepcopy(rng.choice(NASTY))
            if not message:
                break
        changed = json.dumps(message, ensure_ascii=rng.random() < 0.5)
        if '"@' in changed:
            for mark, raw in RAW.items():
                changed = changed.replace(mark, raw)
        return changed.encode()

    def _other(self, value: Any) -> Any:
        """Return a value of the same type."""
        rng = self._rng
        match value:
            case str():
                return self._bytes(value.encode()).decode(errors="replace")
            case [_, *_]:
                one = json.dumps(rng.choice(value))
                return [json.loads(re.sub("[0-9a-f]{64}", lambda _: rng.randbytes(32).hex(), one)) for _ in range(1000)]
            case int() | float():
                return rng.choice((value + 1, -value, value * 1000, value / 3))
        return copy.deepcopy(rng.choice(NASTY))


def _places(part: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield every (container, key or index, value) of a JSON document."""
    for key, value in list(part.items() if isinstance(part, dict) else enumerate(part)):
        yield part, key, value
        if isinstance(value, dict | list):
            yield from _places(value)
