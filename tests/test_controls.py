"""What a coordinator tells a node besides offers: cancels, `forget`, `drain`, `resume`, acknowledgements. No broker is between them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from conftest import ROOT

from edge_agent.job import NlftOptions
from edge_agent.messages import (
    Addressed,
    Cancel,
    Drain,
    Envelope,
    Forget,
    JobResult,
    JobStatus,
    NodeState,
    Options,
    OptionsState,
    Order,
    decode,
    encode,
    read_payload,
)
from edge_agent.new_options import NewOptions
from edge_agent.signing import seal, seal_bytes
from edge_agent.topics import down, up

sys.path.append(str(ROOT / "benchmarks"))
from fuzz import Trial
from fuzz_messages import DELETED, DONE, FLEET, KEY, NODE, OTHER, SETTLED, STAGING, STRANGER, Delivery, make_ack, make_order

Parts = tuple[str, ...]


@pytest.fixture(scope="module")
def trial() -> Iterator[Trial]:
    """A node that takes what is signed only, with a job whose file is on its way, one whose end is not acknowledged, one whose is."""
    with Trial(("signed",)) as running:
        yield running
        assert running.wrong == []


@pytest.fixture
def fresh() -> Iterator[Trial]:
    """Likewise, for one test alone; and a coordinator with the same jobs."""
    with Trial(("signed", "coordinator")) as running:
        yield running


def _say(trial: Trial, envelope: Envelope, *parts: str) -> str:
    return trial.deliver(Delivery("signed", down(FLEET, NODE, *parts), encode(envelope, "test").decode("latin-1")))


def _report(trial: Trial, data: object, *parts: str, **numbers: Any) -> list[str]:
    """Speak to the coordinator as a node; return the kinds of messages that it answers."""
    trial.deliver(Delivery("coordinator", up(FLEET, NODE, *parts), encode(data, "test", **numbers).decode("latin-1")))
    return [topic.rpartition("/")[2] for topic, _ in trial.place.sides["coordinator"].wire.published if "/ack/" not in topic]


def _store(trial: Trial) -> Any:
    return trial.place.sides["signed"].daemon._store


def _state(trial: Trial) -> Any:
    store = _store(trial)
    return store.jobs(), store.waiting(), store.draining, store.command


def _of_result(trial: Trial) -> str:
    """The id of the message with the result that nobody has acknowledged."""
    store = _store(trial)
    return next(m for m in store.waiting() if f"{DONE}/result" in store.message(m).topic)


CAREFUL = NlftOptions(correct_threshold=0.5)
CONTROLS: dict[str, Callable[[Trial], tuple[Parts, Addressed]]] = {
    "cancel": lambda _: (("job", STAGING, "cancel"), Cancel(FLEET, NODE, STAGING)),
    "options": lambda _: (("job", STAGING, "options"), Options(FLEET, NODE, STAGING, 1, CAREFUL)),
    "forget": lambda _: (("command", "forget"), Forget(FLEET, NODE, SETTLED)),
    "drain": lambda _: (("command", "drain"), Drain(FLEET, NODE, 7)),
    "ack": lambda trial: (("ack", _of_result(trial)), make_ack(_of_result(trial))),
}
FORGED: dict[str, tuple[Callable[[Addressed], Envelope], str]] = {
    "unsigned": (lambda p: seal(p, None), "signature"),
    "signed by another": (lambda p: seal(p, STRANGER), "signature"),
    "signature of another payload": (
        lambda p: msgspec.structs.replace(seal(p, None), signatures=seal(Cancel(FLEET, NODE, DONE), KEY).signatures), "signature",
    ),
    "signature of another kind": (
        lambda p: msgspec.structs.replace(seal(p, None), signatures=seal_bytes(msgspec.json.encode(p), Order, KEY).signatures), "signature",
    ),
    "another kind": (lambda p: seal_bytes(msgspec.json.encode(p), Order, KEY), "job_schema"),
    "for another node": (lambda p: seal(msgspec.structs.replace(p, node=OTHER), KEY), "audience"),
    "for another fleet": (lambda p: seal(msgspec.structs.replace(p, fleet="theirs"), KEY), "audience"),
}  # fmt: skip


@pytest.mark.parametrize("forged", FORGED)
@pytest.mark.parametrize("control", CONTROLS)
def test_what_is_not_signed_for_this_node_is_not_done(control: str, forged: str, trial: Trial) -> None:
    """It is refused with its reason in the log, and stops, deletes and changes nothing."""
    parts, payload = CONTROLS[control](trial)
    make, reason = FORGED[forged]
    before = _state(trial)
    assert _say(trial, make(payload), *parts) == f"envelope_refused:{reason}"
    assert _state(trial) == before


@pytest.mark.parametrize(
    ("parts", "payload"),
    [
        (("job", STAGING, "cancel"), Cancel(FLEET, NODE, DONE)),
        (("job", STAGING, "options"), Options(FLEET, NODE, DONE, 1, CAREFUL)),
        (("ack", DONE), make_ack(SETTLED)),
    ],
    ids=["cancel", "options", "ack"],
)
def test_what_is_signed_for_one_job_is_not_done_to_another(parts: Parts, payload: Addressed, trial: Trial) -> None:
    """What the topic names stands under the signature too."""
    before = _state(trial)
    assert _say(trial, seal(payload, KEY), *parts) == "envelope_refused:audience"
    assert _state(trial) == before


def test_what_is_signed_is_done_once(fresh: Trial) -> None:
    """Whatever is sent again later, in whichever order: ended jobs stay ended, deleted ones deleted, and older commands are refused."""
    signed = {name: (parts, seal(payload, KEY)) for name, make in CONTROLS.items() for parts, payload in [make(fresh)]}
    for parts, envelope in signed.values():
        _say(fresh, envelope, *parts)
    store = _store(fresh)
    assert store.job(STAGING).outcome == "canceled"
    for message in store.waiting():
        if DONE in store.message(message).topic:
            _say(fresh, seal(make_ack(message), KEY), "ack", message)
    done = store.job(DONE)
    assert done.settled is not None
    assert store.job(SETTLED) is None
    assert store.draining
    assert _say(fresh, seal(Drain(FLEET, NODE, 6), KEY), "command", "drain") == "envelope_refused:replayed"
    for parts, envelope in signed.values():
        _say(fresh, envelope, *parts)
    assert [store.job(job).outcome for job in (STAGING, DONE)] == ["canceled", "succeeded"]
    assert (store.job(DONE).settled, store.job(SETTLED), store.draining) == (done.settled, None, True)
    assert store.closed(DELETED) is not None


def test_newest_options_of_a_job_hold(fresh: Trial) -> None:
    """They are stored and told before the broker may forget them, power cut or not; older ones change nothing, whatever they say, and
    what the job cannot go on with is told and changes nothing."""

    def send(number: int, method: NlftOptions) -> tuple[NewOptions | None, OptionsState | None]:
        _say(fresh, seal(Options(FLEET, NODE, STAGING, number, method), KEY), "job", STAGING, "options")
        assert fresh.place.restart() == []
        statuses = [store.message(m) for store in [_store(fresh)] for m in store.waiting()]
        told = [decode(m.payload, JobStatus).data.options for m in statuses if m.topic.endswith(f"{STAGING}/status")]
        return _store(fresh).job(STAGING).new_options, told[-1]

    first = (NewOptions(2, CAREFUL), OptionsState(2))
    assert send(2, CAREFUL) == first
    assert send(1, NlftOptions(correct_threshold=0.9)) == first
    assert send(2, NlftOptions(correct_threshold=0.9)) == first
    kept, state = send(3, NlftOptions(references="live"))
    assert kept == first[0]
    assert state is not None
    assert (state.number, state.taken) == (3, 0)
    assert "method.references: it cannot change while a job runs" in (state.refused or "")
    assert send(4, NlftOptions()) == (NewOptions(4, NlftOptions()), OptionsState(4))
    before = _state(fresh)
    _say(fresh, seal(Options(FLEET, NODE, DONE, 1, CAREFUL), KEY), "job", DONE, "options")
    _say(fresh, seal(Options(FLEET, NODE, DELETED, 1, CAREFUL), KEY), "job", DELETED, "options")
    assert _state(fresh) == before


def test_options_are_sent_until_the_node_has_them(fresh: Trial) -> None:
    """With pauses that grow, and again where the node has lost its disk; a refusal is an answer too."""
    side = fresh.place.sides["coordinator"]
    service: Any = side.daemon
    began, digest = time.monotonic(), make_order(STAGING).job.digest

    def sent(after_s: float) -> list[int]:
        side.wire.published.clear()
        service._tick(began + after_s)
        found = [payload for topic, payload in side.wire.published if topic == down(FLEET, NODE, "job", STAGING, "options")]
        return [read_payload(decode(payload, Envelope).data.payload, Options).number for payload in found]

    def tell(seq: int, boot: int, options: OptionsState | None) -> None:
        _report(fresh, JobStatus(digest, "running", options=options), "job", STAGING, "status", boot=boot, seq=seq)

    assert sent(0) == []
    service.send_options(STAGING, {"correct_threshold": 0.5})
    assert [sent(1), sent(2), sent(7), sent(10), sent(18)] == [[1], [], [1], [], [1]]
    tell(2, 7, OptionsState(1))
    assert sent(100) == []
    assert service.job(STAGING).options_state == OptionsState(1)
    service.send_options(STAGING, {"correct_threshold": 0.6})
    assert sent(101) == [2]
    tell(3, 7, OptionsState(2, refused="it has another version"))
    assert sent(200) == []
    tell(1, 8, None)
    assert sent(300) == [2]
    tell(2, 8, OptionsState(9))  # of a coordinator whose database is lost
    assert sent(400) == []
    assert service.send_options(STAGING, {"correct_threshold": 0.7}).options.number == 10
    assert sent(401) == [10]
    service.cancel(STAGING)
    assert sent(500) == []


def test_keys_that_cannot_be_read_let_nothing_through(fresh: Trial) -> None:
    """Nor lose anything: what was not acknowledged stays, and what was asked for is asked for again."""
    signed = [(parts, seal(payload, KEY)) for make in CONTROLS.values() for parts, payload in [make(fresh)]]
    before = _state(fresh)
    keys = fresh.place.root / "trusted_keys"
    kept = keys.read_text()
    keys.write_text("rubbish")
    outcomes = [_say(fresh, envelope, *parts) for parts, envelope in signed]
    keys.write_text(kept)
    assert outcomes == ["trust_unreadable"] * len(signed)
    assert _state(fresh) == before


def test_end_told_in_the_name_of_a_node_stops_nothing(fresh: Trial) -> None:
    """Who can speak as a node has no cancel signed by that: only what an operator has asked for is canceled where it still runs."""
    service: Any = fresh.place.sides["coordinator"].daemon
    digest = make_order(STAGING).job.digest
    canceled = JobResult(None, "canceled", "canceled")
    _report(fresh, canceled, "job", STAGING, "result", boot=7, seq=2)
    assert service.job(STAGING).phase == "ended"
    assert _report(fresh, JobStatus(digest, "running"), "job", STAGING, "status", boot=7, seq=3) == []
    service.cancel(DONE)
    assert "cancel" in _report(fresh, JobStatus(make_order(DONE).job.digest, "running"), "job", DONE, "status", boot=7, seq=3)


def test_commands_are_numbered_above_what_the_node_has_done(fresh: Trial) -> None:
    """Told until the node says that it has; a later word of somebody else holds; no number that is made up is the last."""
    service: Any = fresh.place.sides["coordinator"].daemon
    wire = fresh.place.sides["coordinator"].wire

    def told(state: NodeState) -> list[str]:
        return [kind for kind in _report(fresh, state, "state") if kind in ("drain", "resume")]

    def number() -> int:
        return int(service.nodes(None, None, 9).items[0].drain_command)

    wire.published.clear()
    service.drain(NODE, True)
    assert (number(), [t.rpartition("/")[2] for t, _ in wire.published]) == (1, ["drain"])
    assert told(NodeState("ready", 7, 3, 0)) == ["drain"]
    assert told(NodeState("draining", 7, 3, 1)) == []
    assert told(NodeState("ready", 8, 1, 0)) == ["drain"]  # it has lost its disk
    assert told(NodeState("ready", 8, 1, 9)) == []
    service.drain(NODE, False)
    assert number() == 10
    assert told(NodeState("ready", 8, 1, 9)) == ["resume"]  # also where it does so already: no earlier command may come after it
    assert told(NodeState("ready", 8, 1, 10)) == []
    told(NodeState("ready", 8, 1, 2**53 - 1))
    for wanted in (2**52 + 1, 2**52 + 2):
        service.drain(NODE, True)
        assert number() == wanted
