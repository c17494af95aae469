"""The wire: every message is decoded strictly, topics fit the brokers, and docs/asyncapi.yaml says what the code does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from itertools import product
from typing import Any, get_args

import jsonschema
import msgspec
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from edge_agent import topics
from edge_agent.asyncapi import CHANNELS, PARAMETERS, channel_of, document, schema_of
from edge_agent.errors import EdgeAgentError, MessageInvalid, Stopped, exit_code_of
from edge_agent.job import Dataset, Job
from edge_agent.messages import (
    BLOCK_BYTES,
    MAX_MESSAGE_BYTES,
    TYPES,
    WINDOW_BLOCKS,
    Artifact,
    Changed,
    CoordinatorState,
    Envelope,
    FileRequest,
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
    OptionsState,
    Phase,
    PlanAnswer,
    PlanRequest,
    Reason,
    Report,
    Signature,
    StageDone,
    Texts,
    Watch,
    decode,
    encode,
    is_ulid,
    new_id,
)
from edge_agent.report import Event, Measured, mcnemar, wilson
from edge_agent.runner import known_reason
from edge_agent.store import TRANSITIONS
from edge_agent.supervised import STOPPED
from profiles.sensors import Reading, Resources

SHA256, JOB = "0123456789abcdef" * 4, "01k5g3v8qy7m2x9d4c6b1n0pzw"
RESOURCES = Resources(
    Reading(6e9), Reading(8e9), 10**9, 10**10, 6 * 2**30, None, Reading(12.5), Reading(41.0), Reading(None, "no RAPL counter")
)
ENVELOPE = Envelope(b"{}", "application/vnd.edge1.order+json", (Signature(bytes(64), "SHA256:abc"),))
SAMPLES: dict[type, Any] = {
    type(data): data
    for data in (
        CoordinatorState(True, 3), Changed([JOB], ["node-1"]), Hello(),
        NodeState("ready", 7, 2, 1), Heartbeat(RESOURCES, 0, JOB), Watch(10.0), Report(),
        NodeInfo("0.1.0", "3.11.7", "a GPU", "cuda", 8 * 2**30, {"tiny": SHA256}, NodeLimits(6 * 2**30, 2**28, 16), {"torch": "2.9.0"}),
        Offer(ENVELOPE, {SHA256: b"{}"}), ENVELOPE, JobStatus(SHA256, "running", options=OptionsState(3, 2, 40, "why not")),
        Forgotten(), FileRequest(65536, [0, 7]),
        PlanRequest(Job(model="tiny", dataset=Dataset(SHA256), budget_bytes=2**30), Texts(24, 175, 125)),
        PlanAnswer(None, "oom_predicted", "the plan needs 2 GiB"),
        JobProgress(Event(time=1.5, event="progress", stage="train", loss=0.5), [StageDone("load", 2.0, 10**9)], RESOURCES),
        JobResult(
            SHA256, "succeeded", accuracy=Measured(wilson(3, 9), wilson(8, 9), mcnemar([False], [True])), seconds=60.0, peak_bytes=10**9,
            artifacts=(Artifact("result.json", SHA256, 900),), accepted=True,
        ),
    )
}  # fmt: skip
"""One message of every kind."""
LONGEST = {
    "fleet": "f" * 64,
    "node": "n" * 64,
    "instance": "i" * 64,
    "job": JOB,
    "request": JOB,
    "message": JOB,
    "sha256": SHA256,
    "number": "9" * 19,
}
"""The longest ids, and the number of a block in the largest file that a 64-bit size can name."""
CODES_OF_PROCESSES = {
    "database_away",
    "files_away",
    "tracker_away",
    "model_needed",
    "model_source",
    "models_limit",
    "answers",
    "package_missing",
    "config",
    "coordinator",
    "not_alive",
    "profile_unknown",
    "refused",
    "saliency",
    "service",
    "state",
    "state_damaged",
    "stopped",
    "unauthorized",
    "forbidden",
    "too_many_requests",
}
"""Errors of a command or daemon itself: no job ends with them."""
REASONS_OF_NODES = {
    "audience", "canceled", "crash_loop", "draining", "expired", "model_mismatch", "oom_host", "quiet_hours", "replayed", "signature",
    "thermal", "timeout_staging", "timeout_stall",
}  # fmt: skip
"""What only a node or coordinator can say of a job: a local run never ends so."""

KINDS = pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=5,
)  # fmt: skip


def _topic(kind: type | None) -> str:
    """Return a topic that takes messages of a kind."""
    return next(channel.address.format_map(LONGEST) for channel in CHANNELS.values() if channel.kind is kind)


def _sent(kind: type) -> dict[str, Any]:
    """Return a message of a kind as its reader finds it, before it is decoded."""
    return json.loads(encode(SAMPLES[kind], "edge1/f/n", boot=1, attempt=2, seq=3))  # type: ignore[no-any-return]


def _refused(message: object, kind: type) -> str:
    """Return why a message is not accepted."""
    with pytest.raises(MessageInvalid) as caught:
        decode(json.dumps(message).encode(), kind)
    return str(caught.value)


# the document


def test_asyncapi_document_is_the_generated_one() -> None:
    """docs/asyncapi.yaml is what the code generates: `python -m edge_agent.asyncapi > docs/asyncapi.yaml` writes it."""
    command = [sys.executable, "-m", "edge_agent.asyncapi"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert (ROOT / "docs" / "asyncapi.yaml").read_text(encoding="utf-8") == made


@pytest.mark.parametrize("kind", [c.payload or c.kind for c in CHANNELS.values() if "/down/" in c.address and (c.payload or c.kind)])
def test_every_number_that_a_node_is_told_has_bounds(kind: Any) -> None:
    """Below and above, whether it is whole or not: no order takes a node beyond what was thought of."""

    def numbers(part: Any, name: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(part, dict) and part.get("type") in ("integer", "number") and "enum" not in part:
            yield name, part
        for key, value in part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ():
            yield from numbers(value, f"{name}/{key}")

    _, schemas = msgspec.json.schema_components([kind])
    for name, number in numbers(schemas):
        assert number.keys() & {"minimum", "exclusiveMinimum"}, name
        assert number.keys() & {"maximum", "exclusiveMaximum"}, name


def test_references_of_the_document_lead_somewhere() -> None:
    """Every `$ref` of the document names a part of it."""
    made = document()

    def references(part: Any) -> Iterator[str]:
        for key, value in part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ():
            yield from [value] if key == "$ref" else references(value)

    for reference in set(references(made)):
        part = made
        for name in reference.removeprefix("#/").split("/"):
            part = part[name]


def test_channels_are_the_topics_of_the_grammar() -> None:
    """The grammar at the head of topics.py and the channels of the document name the same topics."""
    lines = [line.split()[0] for line in (topics.__doc__ or "").splitlines() if line.startswith(topics.ROOT)]
    alternatives = [[part.split(",") for part in re.split(r"[{}]", line)] for line in lines]
    written = {"".join(parts) for line in alternatives for parts in product(*line)}
    assert written == {channel.address.replace("{", "<").replace("}", ">") for channel in CHANNELS.values()}


@pytest.mark.parametrize("channel", CHANNELS.values(), ids=CHANNELS)
def test_topic_fits_every_broker_with_the_longest_ids(channel: Any) -> None:
    """A topic has at most 7 slashes and 256 bytes, as AWS IoT Core demands, and the longest one is of its own channel."""
    topic = channel.address.format_map(LONGEST)
    assert topic.count("/") <= 7
    assert len(topic.encode()) <= 256
    assert channel_of(topic) is channel


@pytest.mark.parametrize(
    "topic",
    ["", "edge1", "edge1/f/n/up", "edge1/f/n/up/hello/", "edge2/f/n/up/hello", "edge1/f/N/up/hello", "edge1/f/coordinator/up/hello",
     "edge1/f/n/down/hello", "edge1/f/n/up/job/1/status", f"edge1/f/n/up/file/{SHA256}/block/01", f"edge1/{'f' * 65}/n/up/hello"],
)  # fmt: skip
def test_topic_outside_the_contract_has_no_schema(topic: str) -> None:
    """A topic that the grammar does not make is a LookupError, so nothing on a broker passes as documented by accident."""
    with pytest.raises(LookupError):
        schema_of(topic)


def test_blocks_have_no_schema() -> None:
    """Blocks of files are bytes."""
    assert schema_of(_topic(None)) is None


def test_every_kind_of_message_has_a_channel_and_a_sample() -> None:
    """No message type is left out of the document, nor of the tests here."""
    assert {channel.kind for channel in CHANNELS.values()} - {None} == set(TYPES) == set(SAMPLES)
    assert len(set(TYPES.values())) == len(TYPES)


@KINDS
def test_message_is_valid_under_the_schema_of_its_topic(kind: type) -> None:
    """What `encode` writes is what the document says."""
    schema = schema_of(_topic(kind))
    assert schema is not None
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(_sent(kind))


# decoding


@KINDS
def test_message_comes_back_as_it_was(kind: type) -> None:
    """Encoding and decoding lose nothing of the data or of the envelope."""
    message_id = new_id()
    message = decode(encode(SAMPLES[kind], "edge1/f/n", boot=1, attempt=2, seq=3, message_id=message_id), kind)
    assert message.data == SAMPLES[kind]
    assert (message.id, message.source, message.type, message.boot, message.attempt, message.seq) == (
        message_id, "edge1/f/n", TYPES[kind], 1, 2, 3,
    )  # fmt: skip
    assert abs((datetime.now(timezone.utc) - message.time).total_seconds()) < 60


@KINDS
def test_unknown_field_is_named(kind: type) -> None:
    """A field that the contract does not know is refused, in the envelope and in the data, and the text names it."""
    message = _sent(kind)
    assert "unknown field `surprise`" in _refused(message | {"surprise": 1}, kind)
    text = _refused(message | {"data": message["data"] | {"surprise": 1}}, kind)
    assert "unknown field `surprise` - at `$.data`" in text


@KINDS
def test_missing_field_is_named(kind: type) -> None:
    """A required field that is missing is refused, and the text names it and its place."""
    message = _sent(kind)
    for field in ("specversion", "id", "source", "type", "time", "datacontenttype", "data"):
        assert f"missing required field `{field}`" in _refused({k: v for k, v in message.items() if k != field}, kind)
    for field in (f.encode_name for f in msgspec.structs.fields(kind) if f.required):
        without = message | {"data": {k: v for k, v in message["data"].items() if k != field}}
        assert f"missing required field `{field}` - at `$.data`" in _refused(without, kind)


@KINDS
def test_wrong_type_is_named(kind: type) -> None:
    """A value of a wrong type is refused, and the text names its path."""
    message = _sent(kind)
    for field in message:
        assert f"at `$.{field}" in _refused(message | {field: [[]]}, kind)
    for field in msgspec.structs.fields(kind):
        assert f"at `$.data.{field.encode_name}" in _refused(message | {"data": message["data"] | {field.encode_name: [[]]}}, kind)


@KINDS
def test_message_of_another_type_is_refused(kind: type) -> None:
    """A message whose `type` is not that of its topic is refused, also where its data would fit."""
    other = next(name for name in TYPES.values() if name != TYPES[kind])
    text = _refused(_sent(kind) | {"type": other}, kind)
    assert repr(other) in text
    assert repr(TYPES[kind]) in text


def test_long_message_is_refused_unread() -> None:
    """A message over the limit is refused, whatever is in it, and the text names the limit; one at the limit is read."""
    message = encode(Hello(), "edge1/f/n")
    assert decode(message.ljust(MAX_MESSAGE_BYTES), Hello).data == Hello()
    with pytest.raises(MessageInvalid, match=f"{MAX_MESSAGE_BYTES:,}"):
        decode(message.ljust(MAX_MESSAGE_BYTES + 1), Hello)


def test_request_for_longer_blocks_is_refused() -> None:
    """Nobody is sent more at once than a window of the contract's blocks."""
    whole = FileRequest(BLOCK_BYTES, list(range(WINDOW_BLOCKS)))
    assert decode(encode(whole, "edge1/f/n"), FileRequest).data == whole
    for data in (FileRequest(BLOCK_BYTES + 1, [0]), FileRequest(BLOCK_BYTES, list(range(WINDOW_BLOCKS + 1)))):
        with pytest.raises(MessageInvalid):
            decode(encode(data, "edge1/f/n"), FileRequest)


@given(payload=st.binary(max_size=300), kind=st.sampled_from(list(TYPES)))
def test_arbitrary_bytes_are_refused(payload: bytes, kind: type) -> None:
    """No payload raises anything but MessageInvalid."""
    with pytest.raises(MessageInvalid):
        decode(payload, kind)


@given(kind=st.sampled_from(list(TYPES)), data=st.data())
def test_damaged_message_is_refused_or_valid(kind: type, data: st.DataObject) -> None:
    """A message with bytes replaced, inserted or cut off raises MessageInvalid, or still is a message of its kind."""
    payload = bytearray(json.dumps(_sent(kind)).encode())
    start = data.draw(st.integers(0, len(payload)), label="start")
    end = data.draw(st.integers(start, min(start + 40, len(payload))), label="end")
    payload[start:end] = data.draw(st.binary(max_size=40), label="instead")
    try:
        message = decode(bytes(payload), kind)
    except MessageInvalid:
        return
    assert isinstance(message.data, kind)


VALIDATORS = {kind: jsonschema.Draft202012Validator(schema_of(_topic(kind)) or {}) for kind in TYPES}


@given(kind=st.sampled_from(list(TYPES)), data=st.data())
def test_changed_message_is_refused_or_follows_the_schema(kind: type, data: st.DataObject) -> None:
    """A message with values replaced or left out raises MessageInvalid, or is valid under the document's schema too."""
    message = _sent(kind)
    for _ in range(data.draw(st.integers(1, 3), label="changes")):
        holder, key = data.draw(st.sampled_from(list(_places(message))), label="place")
        if isinstance(holder, dict) and data.draw(st.booleans(), label="left out"):
            holder.pop(key, None)
        else:
            holder[key] = data.draw(JSON, label="instead")
    try:
        decode(json.dumps(message).encode(), kind)
    except MessageInvalid:
        return
    VALIDATORS[kind].validate(message)


def _places(part: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (container, key or index) of a JSON document; an empty object has a key that is new."""
    yield from [(part, "surprise")] if part == {} else []
    for key, value in part.items() if isinstance(part, dict) else enumerate(part):
        yield part, key
        if isinstance(value, dict | list):
            yield from _places(value)


# ids, codes and phases


def test_ids_are_ulids_that_sort_by_time() -> None:
    """An id matches the pattern of the contract, tells when it was made, and sorts after those of earlier milliseconds."""
    made = []
    for _ in range(20):
        before, new, after = time.time_ns() // 10**6, new_id(), time.time_ns() // 10**6
        assert is_ulid(new)
        assert re.fullmatch(PARAMETERS["message"][0], new)
        assert before <= _milliseconds(new) <= after
        made.append(new)
        time.sleep(0.002)
    assert made == sorted(made)
    assert len({new_id() for _ in range(1000)}) == 1000


def _milliseconds(ulid: str) -> int:
    """Read the time of a ULID by its specification: ten digits of Crockford's base 32."""
    value = 0
    for letter in ulid[:10]:
        value = 32 * value + "0123456789ABCDEFGHJKMNPQRSTVWXYZ".index(letter.upper())
    return value


@pytest.mark.parametrize(
    "text", ["", "01k5g3v8qy7m2x9d4c6b1n0pz", "01K5G3V8QY7M2X9D4C6B1N0PZW", "81k5g3v8qy7m2x9d4c6b1n0pzw", f"{JOB}\n", "../" + JOB[3:]]
)
def test_other_ids_are_no_ulids(text: str) -> None:
    """Too short, upper case, beyond 48 bits of time, or with what could leave a directory: no id of a job or message."""
    assert not is_ulid(text)


def _codes() -> dict[str, set[int]]:
    """Return the codes of the error tree of errors.py, with the exit codes of their classes."""
    found: dict[str, set[int]] = {}
    classes: list[type[EdgeAgentError]] = [EdgeAgentError]
    while classes:
        kind = classes.pop()
        found.setdefault(kind.code, set()).add(kind.exit_code)
        classes += [c for c in kind.__subclasses__() if c.__module__ == EdgeAgentError.__module__]
    return found


def test_every_error_of_a_run_is_a_reason_on_the_wire() -> None:
    """A code that a trainer can end with reaches the coordinator as it is; those of a process itself become `internal`."""
    codes, reasons = set(_codes()), set(get_args(Reason))
    assert codes - reasons == CODES_OF_PROCESSES
    assert reasons - codes == REASONS_OF_NODES
    assert {code: known_reason(code) for code in reasons} == {code: code for code in reasons}
    assert {known_reason(code) for code in (*CODES_OF_PROCESSES, "", "new", None)} == {"internal"}


def test_code_has_one_exit_code() -> None:
    """Classes with one code have one exit code, so a command that hears only the code can exit like the error itself."""
    assert {code: {exit_code_of(code)} for code in _codes()} == _codes()
    assert {exit_code_of(code) for code in REASONS_OF_NODES} == {EdgeAgentError.exit_code}
    assert Stopped.exit_code == STOPPED


def test_phases_lead_to_the_end() -> None:
    """Every phase has its transitions, is reached from `accepted`, and may end; `ended` is final."""
    assert set(TRANSITIONS) == set(get_args(Phase))
    assert TRANSITIONS["ended"] == set()
    assert all("ended" in following for phase, following in TRANSITIONS.items() if phase != "ended")
    reached, new = set(), {"accepted"}
    while new:
        reached |= new
        new = set().union(*(TRANSITIONS[phase] for phase in new)) - reached  # type: ignore[index]
    assert reached == set(TRANSITIONS)
