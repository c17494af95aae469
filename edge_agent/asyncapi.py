"""The wire as an AsyncAPI 3.0 document, made from the message types. docs/asyncapi.yaml is what `python -m edge_agent.asyncapi` prints."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from edge_agent.messages import (
    LIFE_S,
    LONGEST_ORDER_S,
    LONGEST_WATCH_S,
    MAX_MESSAGE_BYTES,
    PAYLOAD_TYPES,
    TYPES,
    ULID_PATTERN,
    Ack,
    Addressed,
    Cancel,
    Changed,
    CoordinatorState,
    Drain,
    Envelope,
    FileRequest,
    Forget,
    Forgotten,
    Heartbeat,
    Hello,
    JobProgress,
    JobResult,
    JobStatus,
    Message,
    NodeInfo,
    NodeState,
    Offer,
    Options,
    Order,
    PlanAnswer,
    PlanRequest,
    Report,
    Resume,
    Watch,
)
from edge_agent.topics import COORDINATOR, coordinator_changed, coordinator_state, down, up

Schema = dict[str, Any]

PARAMETERS = {
    "fleet": ("^[a-z0-9-]{1,64}$", "Nodes and coordinators that know each other."),
    "node": (f"^(?!{COORDINATOR}$)[a-z0-9-]{{1,64}}$", "A node of the fleet."),
    "instance": ("^[a-z0-9-]{1,64}$", "A coordinator of the fleet."),
    "job": (ULID_PATTERN, "A job: a ULID in lower case."),
    "message": (ULID_PATTERN, "The `id` of the message that is acknowledged."),
    "request": (ULID_PATTERN, "Somebody who asks: a ULID in lower case."),
    "sha256": ("^[0-9a-f]{64}$", "A file, by its contents."),
    "number": ("^(0|[1-9][0-9]*)$", "A block of the file: the one that begins at byte `number` * `block_bytes` of the request."),
}
"""What stands between braces in an address: its pattern and its meaning."""


@dataclass(frozen=True)
class Channel:
    """A topic of the contract, and how its messages are sent."""

    address: str
    kind: type | None
    """Type of the data; None: a block of a file, without an envelope."""
    qos: Literal[0, 1]
    retain: bool = False
    payload: type[Addressed] | None = None
    """Of the envelope in it."""
    longest_life_s: float | None = None
    """Where a message says itself how long it is of use: at most so long."""

    @property
    def life(self) -> int | Schema | None:
        """After how many seconds the broker may drop it; None: never."""
        if self.longest_life_s is not None:
            return {"type": "integer", "minimum": 1, "maximum": int(self.longest_life_s)}
        return int(LIFE_S[self.kind]) if self.kind in LIFE_S else None

    @property
    def action(self) -> Literal["send", "receive"]:
        """What a node does with it; a coordinator does the other."""
        return "send" if self.address.startswith(_up()) else "receive"

    @property
    def message(self) -> str:
        """Name of its message in the document."""
        return self.kind.__name__ if self.kind else "Block"


def _up(*parts: str) -> str:
    return up("{fleet}", "{node}", *parts)


def _down(*parts: str) -> str:
    return down("{fleet}", "{node}", *parts)


CHANNELS = {
    "coordinatorState": Channel(coordinator_state("{fleet}", "{instance}"), CoordinatorState, 1, retain=True),
    "coordinatorChanged": Channel(coordinator_changed("{fleet}", "{instance}"), Changed, 0),
    "hello": Channel(_up("hello"), Hello, 1),
    "nodeState": Channel(_up("state"), NodeState, 1, retain=True),
    "nodeInfo": Channel(_up("info"), NodeInfo, 1, retain=True),
    "heartbeat": Channel(_up("heartbeat"), Heartbeat, 0),
    "jobStatus": Channel(_up("job", "{job}", "status"), JobStatus, 1),
    "jobProgress": Channel(_up("job", "{job}", "progress"), JobProgress, 0),
    "jobResult": Channel(_up("job", "{job}", "result"), JobResult, 1),
    "jobForgotten": Channel(_up("job", "{job}", "forgotten"), Forgotten, 1),
    "upFileRequest": Channel(_up("file", "{sha256}", "request"), FileRequest, 0),
    "upFileBlock": Channel(_up("file", "{sha256}", "block", "{number}"), None, 0),
    "jobOffer": Channel(_down("job", "{job}", "offer"), Offer, 1, payload=Order, longest_life_s=LONGEST_ORDER_S),
    "jobCancel": Channel(_down("job", "{job}", "cancel"), Envelope, 1, payload=Cancel),
    "jobOptions": Channel(_down("job", "{job}", "options"), Envelope, 1, payload=Options),
    "jobWatch": Channel(_down("job", "{job}", "watch"), Watch, 0, longest_life_s=LONGEST_WATCH_S),
    "planRequest": Channel(_down("plan", "{request}", "request"), PlanRequest, 0),
    "planAnswer": Channel(_up("plan", "{request}", "answer"), PlanAnswer, 0),
    "ack": Channel(_down("ack", "{message}"), Envelope, 1, payload=Ack),
    "commandReport": Channel(_down("command", "report"), Report, 1),
    "commandDrain": Channel(_down("command", "drain"), Envelope, 1, payload=Drain),
    "commandResume": Channel(_down("command", "resume"), Envelope, 1, payload=Resume),
    "commandForget": Channel(_down("command", "forget"), Envelope, 1, payload=Forget),
    "downFileRequest": Channel(_down("file", "{sha256}", "request"), FileRequest, 0),
    "downFileBlock": Channel(_down("file", "{sha256}", "block", "{number}"), None, 0),
}
"""All topics of the contract."""


def channel_of(topic: str) -> Channel:
    """Return the channel of a concrete topic. Raises LookupError for one outside the contract."""
    parts = topic.split("/")
    for channel in CHANNELS.values():
        wanted = channel.address.split("/")
        if len(wanted) == len(parts) and all(map(_fits, wanted, parts)):
            return channel
    raise LookupError(f"no topic of the contract is like {topic!r}")


def _fits(wanted: str, part: str) -> bool:
    return re.fullmatch(PARAMETERS[wanted[1:-1]][0], part) is not None if wanted.startswith("{") else wanted == part


def schema_of(topic: str) -> Schema | None:
    """Return the JSON schema, complete in itself, of the messages of a concrete topic; None where they are blocks of a file.

    Raises LookupError for a topic outside the contract.
    """
    kind = channel_of(topic).kind
    if kind is None:
        return None
    payloads, schemas = _schemas([kind], "#/$defs/{name}")
    return payloads[kind] | {"$defs": schemas}


def document() -> Schema:
    """Return the AsyncAPI document. Operations are those of a node."""
    reference = "#/components/schemas/{name}"
    payloads, schemas = _schemas(TYPES, reference)
    schemas |= _without_discriminators(msgspec.json.schema_components(PAYLOAD_TYPES, ref_template=reference)[1])
    messages: Schema = {
        kind.__name__: {"name": name, "summary": kind.__doc__, "contentType": "application/json", "payload": payloads[kind]}
        for kind, name in TYPES.items()
    }
    messages["Block"] = {"summary": "A block of a file, without an envelope.", "contentType": "application/octet-stream"}
    info = {
        "title": "Edge agent over MQTT",
        "version": "1",
        "description": "What nodes and coordinators say to each other. The operations are those of a node; a coordinator has their "
        "opposites. A JSON message is an envelope with the attribute names of CloudEvents 1.0 around its `data`. A message that does "
        f"not follow its schema, or has more than {MAX_MESSAGE_BYTES:,} bytes, is refused.",
        "license": {"name": "Apache-2.0"},
    }
    return {
        "asyncapi": "3.0.0",
        "info": info,
        "defaultContentType": "application/json",
        "channels": {name: _channel(channel) for name, channel in CHANNELS.items()},
        "operations": {name: _operation(name, channel) for name, channel in CHANNELS.items()},
        "components": {
            "messages": messages,
            "parameters": {name: {"description": f"{meaning} Matches `{pattern}`."} for name, (pattern, meaning) in PARAMETERS.items()},
            "schemas": schemas,
        },
    }


def _channel(channel: Channel) -> Schema:
    parameters = re.findall(r"\{(\w+)\}", channel.address)
    payload = channel.payload
    sealed = {"description": f"Its envelope holds {payload.__name__}, as `{PAYLOAD_TYPES[payload]}`."} if payload else {}
    return {
        "address": channel.address,
        **sealed,
        "messages": {channel.message: {"$ref": f"#/components/messages/{channel.message}"}},
        "parameters": {name: {"$ref": f"#/components/parameters/{name}"} for name in parameters},
    }


def _operation(name: str, channel: Channel) -> Schema:
    lasting = {} if channel.life is None else {"messageExpiryInterval": channel.life}
    return {
        "action": channel.action,
        "channel": {"$ref": f"#/channels/{name}"},
        "messages": [{"$ref": f"#/channels/{name}/messages/{channel.message}"}],
        "bindings": {"mqtt": {"qos": channel.qos, "retain": channel.retain, **lasting, "bindingVersion": "0.2.0"}},
    }


def _schemas(kinds: Iterable[type], reference: str) -> tuple[dict[type, Schema], dict[str, Schema]]:
    """Return the schema of the whole message for each kind of data, and the schemas of the structs that they refer to."""
    kinds = list(kinds)
    messages, schemas = msgspec.json.schema_components([Message[kind] for kind in kinds], ref_template=reference)  # type: ignore[valid-type]
    schemas = _without_discriminators(schemas)
    payloads = {}
    for kind, message in zip(kinds, messages, strict=True):
        payload = schemas.pop(message["$ref"].rpartition("/")[2])
        payload["properties"]["type"] = {"const": TYPES[kind]}
        payloads[kind] = {name: value for name, value in payload.items() if name not in ("title", "description")}
    return payloads, schemas


def _without_discriminators(schema: Any) -> Any:
    """Drop what msgspec says in OpenAPI's words; AsyncAPI means something else by them, and the alternatives exclude each other."""
    if isinstance(schema, list):
        return [_without_discriminators(item) for item in schema]
    if isinstance(schema, dict):
        return {name: _without_discriminators(value) for name, value in schema.items() if name != "discriminator"}
    return schema


def main() -> None:
    """Print the document as YAML."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise SystemExit("the document is written with PyYAML; install it: pip install 'edge-agent[dev]'") from None
    copied = msgspec.json.decode(msgspec.json.encode(document()))  # nothing in it is shared, so YAML writes no anchors
    sys.stdout.write(yaml.safe_dump(copied, sort_keys=False, allow_unicode=True, width=140))


if __name__ == "__main__":
    main()
