"""Hostile and damaged messages: each is refused with its reason, acknowledged, and leaves nothing behind."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import ROOT

from edge_agent.asyncapi import CHANNELS
from edge_agent.logs import KINDS, LONGEST_MESSAGE, Spared, tame
from edge_agent.messages import MAX_MESSAGE_BYTES, encode
from edge_agent.topics import coordinator_state, down, up

sys.path.append(str(ROOT / "benchmarks"))
from fuzz import Kept, Trial, corpus, fuzz, replay
from fuzz_messages import DONE, FLEET, KEY, NEW, NODE, OTHER, OTHERS, STAGING, Delivery, label, make_offer, make_order, seeds

KEPT = corpus()
NEVER_MADE = {"disk_full", "busy", "draining", "replayed"}
"""Reasons of a rejection that need a full disk (test_jobs.py) or more than one message."""


def _refusal(delivery: Delivery) -> str:
    """Deliver to receivers that have just begun; return what became of it, and fail where anything is not as it should be."""
    outcome, wrong = replay(delivery)
    assert wrong == []
    return outcome


def _offer(change: Any) -> Delivery:
    """Return the offer of a new job with its order changed as JSON or as text, not signed, to the node that takes orders from anyone."""
    whole = next(
        d for d in seeds() if d.to == "open" and d.topic == down(FLEET, NODE, "job", NEW, "offer") and '"signatures":[]' in d.payload
    )
    message = json.loads(whole.payload)
    order = json.loads(base64.b64decode(message["data"]["order"]["payload"])) | {"node": NODE}
    changed = change(order)
    text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
    message["data"]["order"]["payload"] = base64.b64encode(text).decode()
    return msgspec.structs.replace(whole, payload=json.dumps(message))


@pytest.mark.parametrize("number", range(0, len(KEPT), 20))
def test_kept_messages_lead_where_they_did(number: int) -> None:
    """Every line of the corpus, delivered to daemons that have just begun, has the outcome that is written beside it."""
    kept = KEPT[number : number + 20]
    assert [Kept(line.of, _refusal(line.delivery), line.delivery) for line in kept] == kept


def test_corpus_has_every_topic_and_reason() -> None:
    """All topics that the daemons subscribe to, and every reason for which an offer is rejected."""
    topics = {channel.address.removeprefix("edge1/{fleet}/") for channel in CHANNELS.values()}
    assert {label(delivery).partition(" ")[2] for delivery in seeds()} == topics
    assert {label(delivery) for delivery in seeds()} <= {line.of for line in KEPT}
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", (ROOT / "docs" / "fleet.md").read_text(encoding="utf-8"), re.MULTILINE)
    rejected = {reason for reason, outcomes in rows if "`rejected`" in outcomes}
    assert rejected - {line.outcome.partition(":")[2] for line in KEPT if line.outcome.startswith("job_rejected:")} <= NEVER_MADE
    assert "answered:replayed" in {line.outcome for line in KEPT}


@pytest.mark.parametrize("seed", [1, 2])
def test_damaged_messages_do_no_harm(seed: int) -> None:
    """A few thousand of them: no exception, all acknowledged, no job, file, process or connection that should not be."""
    found, _, _ = fuzz(2000, seed)
    assert found.wrong == []
    assert sum(sum(outcomes.values()) for outcomes in found.outcomes.values()) == 2000


def test_trial_sees_what_should_not_be(tmp_path: Path) -> None:
    """A file outside of the state directories, a process, and a job that the signed node has taken are found."""
    with Trial(("signed",)) as trial:
        assert trial.deliver(next(d for d in seeds() if d.to == "signed"))
        (tmp_path / "file").write_bytes(b"")
        trial.examine([])
        subprocess.run(["true"], check=True)
        trial.examine([])
        offer = encode(make_offer(make_order(NEW), KEY), "test").decode("latin-1")
        assert trial.deliver(Delivery("signed", down(FLEET, NODE, "job", NEW, "offer"), offer)) == "job_accepted"
        trial.examine([])
        assert trial.wrong[0] == f"after a batch: open {tmp_path}/file"[: len(trial.wrong[0])]
        assert "subprocess.Popen" in trial.wrong[1]
        assert trial.wrong[2:] == [f"signed has jobs {{{NEW!r}}}"]


def test_trial_tells_whose_words_changed_a_job() -> None:
    """A job of another node changes by what that node says on its own topic; a change without such words is found."""
    own = up(FLEET, OTHER, "job", OTHERS, "status")
    said = next(d for d in seeds() if d.topic == up(FLEET, NODE, "job", OTHERS, "status"))
    with Trial(("coordinator",)) as trial:
        assert trial.deliver(said) == "job_unknown"
        trial.examine([])
        assert trial.deliver(msgspec.structs.replace(said, topic=own)) == "answered"
        trial.examine([])
        assert trial.wrong == []
    with Trial(("coordinator",)) as trial:
        trial.place.sides["coordinator"].hear(own.encode(), said.payload.encode())
        trial.examine([])
        assert trial.wrong == [f"coordinator: {OTHERS} has changed"]


@pytest.mark.parametrize(
    "name",
    ["../../../../etc/passwd", "/etc/passwd", "..", "", "\0", "tiny\0", "tiny\n", "TINY", "t\u0456ny", "\u202eynit", "\U0001f600",
     "n" * 10_000],
)  # fmt: skip
def test_nasty_names_are_refused(name: str) -> None:
    """As the model of a job, as node, fleet and id of an order, as a digest, and in topics."""
    assert _refusal(_offer(lambda o: o | {"job": o["job"] | {"model": name}})) in ("job_rejected:model_missing", "job_rejected:job_schema")
    for key in ("node", "fleet", "id"):
        assert _refusal(_offer(lambda o, key=key: o | {key: name})) == "job_rejected:job_schema"
    assert _refusal(_offer(lambda o: o | {"dataset": o["dataset"] | {"sha256": name}})) == "job_rejected:job_schema"
    with Trial() as trial:
        for parts in (("job", name, "offer"), ("file", name, "request"), ("file", name, "block", "0"), ("ack", name), ("command", name)):
            topic = down(FLEET, NODE, *parts).encode().decode("latin-1")
            assert trial.deliver(Delivery("signed", topic, "{}")) in ("topic_unknown", "message_invalid", "command_unknown", "nothing")
        for topic in (up(FLEET, name, "hello"), up(FLEET, NODE, "job", name, "status"), up(FLEET, NODE, "file", name, "block", "0"), name):
            trial.deliver(Delivery("coordinator", topic.encode().decode("latin-1"), "{}"))
        trial.examine([])
        assert trial.wrong == []


def test_nodes_that_drain_or_are_full_take_nothing() -> None:
    """Valid offers are accepted up to the length of the queue; the next one is `busy`, and `draining` once that was asked for."""
    with Trial(("open",)) as trial:

        def say(topic: str, payload: str) -> str:
            return trial.deliver(Delivery("open", topic, payload))

        offers = [_offer(lambda o, n=n: o | {"id": f"{NEW[:-1]}{n}"}).payload for n in range(5)]
        topics = [down(FLEET, NODE, "job", f"{NEW[:-1]}{n}", "offer") for n in range(5)]
        assert [say(*said) for said in zip(topics, offers, strict=True)] == ["job_accepted"] * 4 + ["job_rejected:busy"]
        drain = next(d for d in seeds() if d.topic == down(FLEET, NODE, "command", "drain"))
        assert say(drain.topic, drain.payload) == "answered"
        assert say(down(FLEET, NODE, "job", f"{NEW[:-1]}9", "offer"), _offer(lambda o: o | {"id": f"{NEW[:-1]}9"}).payload) == (
            "job_rejected:draining"
        )
        assert trial.wrong == []


BOMBS = {
    "deep": '{"data": ' + "[" * 100_000,
    "long": " " * (MAX_MESSAGE_BYTES + 1),
    "digits": '{"specversion": ' + "9" * 100_000,
    "compressed": "\x1f\x8b\x08" + "\0" * 1000,
    "keys": json.dumps({str(n): n for n in range(20_000)}),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused(bomb: str) -> None:
    """Nothing is unpacked, and depth and length are bounded: at every topic that takes JSON, and inside an order."""
    with Trial() as trial:
        for whole in {label(d): d for d in seeds() if "block" not in d.topic}.values():
            outcome = trial.deliver(msgspec.structs.replace(whole, payload=BOMBS[bomb]))
            assert outcome in ("message_invalid", "job_rejected:job_schema", "offer_ignored"), whole.topic
        trial.examine([])
        assert trial.wrong == []
    if bomb != "long":
        assert _refusal(_offer(lambda _: BOMBS[bomb].encode("latin-1"))) == "job_rejected:job_schema"


def test_pattern_that_grows_is_refused() -> None:
    """A pattern of a job that would take much memory or time is no valid one."""
    pattern = {"name": "regex", "pattern": "((a{900}){900}){900}"}
    assert _refusal(_offer(lambda o: o | {"job": o["job"] | {"evaluation": {"verifier": pattern}}})) == "job_rejected:job_schema"


def test_result_with_many_files_is_refused() -> None:
    """A job makes three files; a result with thousands would keep the coordinator busy for minutes."""
    whole = next(d for d in seeds() if d.topic == up(FLEET, NODE, "job", STAGING, "result"))
    message = json.loads(whole.payload)
    names = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(1000)]
    message["data"]["artifacts"] = [{"name": "result.json", "sha256": name, "size_bytes": 2**20} for name in names]
    assert _refusal(msgspec.structs.replace(whole, payload=json.dumps(message))) == "message_invalid"


@pytest.mark.parametrize("to", ["signed", "coordinator"])
def test_topic_that_is_no_text_is_dropped(to: Any) -> None:
    """Bytes that are no UTF-8, which a broker should not let through, are acknowledged and not handled: they would end every connection."""
    topic = down(FLEET, NODE, "job", DONE, "cancel") if to == "signed" else up(FLEET, NODE, "hello")
    assert _refusal(Delivery(to, topic + "\xff", "{}")) == "message_invalid"


def test_topic_that_is_too_short_is_unknown() -> None:
    """One that nobody has subscribed to, from a broker that is broken."""
    assert _refusal(Delivery("signed", "edge1", "{}")) == "topic_unknown"
    assert _refusal(Delivery("coordinator", "", "{}")) == "message_invalid"
    assert _refusal(Delivery("signed", coordinator_state("", ""), "{}")) == "message_invalid"


def test_log_line_is_cut_and_holds_no_control_characters() -> None:
    """What somebody has sent can neither fill the log, nor begin a line of it, nor steer the terminal that shows it."""
    record = logging.LogRecord("edge_agent", logging.INFO, "", 0, "topic_unknown topic=%s", ("é\n\x1b[31m\u202e" + "x" * 10_000,), None)
    assert tame(record)
    assert record.getMessage().startswith("topic_unknown topic=é\\n\\x1b[31m\\u202ex")
    assert len(record.getMessage()) < LONGEST_MESSAGE + 100


def test_flood_of_warnings_leaves_the_log_readable() -> None:
    """A hundred of a kind at once, then one a second, which says how many were left out; others, and what is no warning, come as before."""
    clock = [0.0]
    spared = Spared(lambda: clock[0])

    def told(event: str, level: int = logging.WARNING) -> str | None:
        record = logging.LogRecord("edge_agent", level, "", 0, f"{event} topic=%s", ("a",), None)
        return record.getMessage() if spared(record) else None

    assert [told("message_invalid") for _ in range(500)] == ["message_invalid topic=a"] * 100 + [None] * 400
    assert told("storage_error", logging.ERROR) == "storage_error topic=a"
    assert [told("message_invalid", logging.INFO) for _ in range(500)] == ["message_invalid topic=a"] * 500
    clock[0] = 1.0
    assert [told("message_invalid") for _ in range(3)] == ["message_invalid topic=a left_out=400", None, None]
    clock[0] = 3600.0
    assert told("message_invalid") == "message_invalid topic=a left_out=2"
    assert [told("message_invalid") for _ in range(99)] == ["message_invalid topic=a"] * 99


def test_kinds_of_warnings_that_are_counted_are_bounded() -> None:
    """Of those that name something new every time the oldest are forgotten."""
    spared = Spared(lambda: 0.0)
    for number in range(3 * KINDS):
        assert spared(logging.LogRecord("other", logging.WARNING, "", 0, f"kind{number}", (), None))
    assert len(spared._kinds) == KINDS
