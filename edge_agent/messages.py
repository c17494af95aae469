"""Every message on the wire: one envelope, one strict type for each kind of data. The source of docs/asyncapi.yaml.

The envelope has the attribute names of CloudEvents 1.0 (JSON format). Blocks of files are the only messages without an envelope.
"""

from __future__ import annotations

import re
import secrets
import time
from datetime import datetime, timezone
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta

from edge_agent.config import Labels, ModelName, Name
from edge_agent.errors import MessageInvalid
from edge_agent.job import Job, NlftOptions, Sha256, Strict
from edge_agent.new_options import MOST_CHANGES, Number
from edge_agent.report import Event, Measured
from profiles.sensors import Resources
from quantization.plan import Plan

ULID_PATTERN = "^[0-7][0-9a-hjkmnp-tv-z]{25}$"
Ulid = Annotated[str, Meta(pattern=ULID_PATTERN, max_length=26)]
Text = Annotated[str, Meta(max_length=1024)]
Characters = Annotated[int, Meta(ge=0, le=2**28)]
Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]

MAX_MESSAGE_BYTES = 256 * 1024
"""A longer message is refused unread."""
MAX_INLINE_BYTES = 64 * 1024
"""Files of an offer that travel inside it, all together; longer ones travel in blocks."""
BLOCK_BYTES = 64 * 1024
WINDOW_BLOCKS = 8
"""Blocks that a receiver asks for at once."""
ORDER_S, LONGEST_ORDER_S = 7 * 24 * 3600.0, 30 * 24 * 3600.0
"""From issue to expiry of an order, if nobody says otherwise and at most."""
ANSWER_S = 30.0
"""The answer to a hello tells the time only so long after it, and then another one is sent."""
HEARTBEAT_IDLE_S, HEARTBEAT_BUSY_S, HEARTBEAT_JITTER = 60.0, 30.0, 0.2
LIVE_S = 60.0
"""Progress of before that is no live view any more."""
MOST_TOLD = 500
"""Jobs and nodes in one message of a coordinator to others."""
LONGEST_WATCH_S = 600
PLAN_S = 10.0
"""Who asks for a plan waits so long."""

Phase = Literal["accepted", "staging", "ready", "running", "paused", "finalizing", "ended"]
Outcome = Literal["succeeded", "failed", "rejected", "canceled", "timed_out"]
Reason = Literal[
    "adapter_mismatch", "audience", "busy", "canceled", "conflict", "crash_loop", "dataset_checksum", "dataset_empty", "dataset_schema",
    "dataset_too_large", "device_missing", "directory", "disk_full", "draining", "expired", "internal", "job_schema", "judge_missing",
    "judge_refused", "model_mismatch", "model_missing", "model_unsafe", "model_unsupported", "no_room", "non_finite_loss", "oom_device",
    "oom_host", "oom_predicted", "quiet_hours", "record_too_long", "replayed", "signature", "thermal", "timeout_run", "timeout_staging",
    "timeout_stall",
]  # fmt: skip
ArtifactName = Literal["result.json", "adapter_config.json", "adapter_model.safetensors", "saliency.json"]


class CoordinatorState(Strict, frozen=True):
    """Retained, and the last will: whether a coordinator is there."""

    online: bool
    epoch: Count
    """Number of the coordinator's start: grows with every one, so an older message is stale."""


class Changed(Strict, frozen=True):
    """Of which jobs and nodes a coordinator has stored something, for others that share its work and have somebody who looks."""

    jobs: Annotated[list[Ulid], Meta(max_length=MOST_TOLD)]
    """Their ids, as those of nodes."""
    nodes: Annotated[list[Name], Meta(max_length=MOST_TOLD)]


class Hello(Strict, frozen=True):
    """Asks for an acknowledgement: proof that messages pass both ways and are stored."""


class NodeState(Strict, frozen=True):
    """Retained, and the last will (`lost`): presence of a node."""

    state: Literal["init", "ready", "draining", "offline", "lost"]
    boot: Count
    """Number of the agent's start: grows with every one."""
    conn: Count
    """Number of the connection since that start; a will of an earlier one is stale."""
    command: Count
    """Number of the last `Drain` or `Resume` that the node has done; 0: none."""


class NodeLimits(Strict, frozen=True):
    """What a node refuses."""

    budget_bytes: Count
    dataset_bytes: Count
    queue: Count


class NodeInfo(Strict, frozen=True):
    """Retained: what a node can do."""

    agent: str
    python: str
    device: str
    device_kind: Literal["cpu", "cuda"]
    memory_bytes: Count | None
    """Of the device; null where it does not tell."""
    models: dict[ModelName, Sha256 | None]
    """Names that jobs may use, each with the fingerprint of its files; null where they are not there."""
    limits: NodeLimits
    versions: dict[str, str]
    labels: Labels = msgspec.field(default_factory=dict)


class Heartbeat(Strict, frozen=True):
    """Resources of a node, and what it works on."""

    resources: Resources
    queue: Count
    """Jobs that wait."""
    job: Ulid | None
    """The job that runs."""


class File(Strict, frozen=True):
    """A file that belongs to a job."""

    sha256: Sha256
    size_bytes: Count


class Addressed(Strict, frozen=True):
    """What a signature stands for. It names its node, and no other does what it says."""

    fleet: Name
    node: Name


class Order(Addressed, frozen=True, kw_only=True):
    """A job for one node: all that it does there, for whom and until when."""

    id: Ulid
    issued: Annotated[datetime, Meta(tz=True)]
    expires: Annotated[datetime, Meta(tz=True)]
    """A node that first sees the order after this, by the clock of the coordinator, rejects it."""
    job: Job
    """`model` is a name of `NodeInfo.models`."""
    model_fingerprint: Sha256 | None = None
    """Of the model's files, as `NodeInfo.models` tells it; a node with another model under that name rejects the order."""
    dataset: File
    evaluation: File | None = None
    priority: Annotated[int, Meta(ge=0, le=9)] = 4

    @property
    def files(self) -> list[File]:
        return [f for f in (self.dataset, self.evaluation) if f is not None]


class Cancel(Addressed, frozen=True):
    """End a job. The answer is its result: `canceled`, or the outcome that was faster."""

    job: Ulid


class Options(Addressed, frozen=True):
    """Go on with other options of NLFT, from the next optimizer update on. The answer is in the job's status."""

    job: Ulid
    number: Number
    """Grows with every `Options` of the job, so an older one is stale."""
    method: NlftOptions


class Forget(Addressed, frozen=True):
    """Delete everything of an ended job. The answer is `Forgotten`."""

    job: Ulid


class Drain(Addressed, frozen=True):
    """Take no new jobs; finish those accepted. The answer is the node's state."""

    number: Count
    """Grows with every `Drain` and `Resume` for the node, so an older one is stale."""


class Resume(Addressed, frozen=True):
    """Take jobs again. The answer is the node's state."""

    number: Count
    """As that of `Drain`."""


class Ack(Addressed, frozen=True):
    """A message of the node has been stored: the node need not keep it any more."""

    message: Ulid
    time: Annotated[datetime, Meta(tz=True)]
    """By the clock of the coordinator, which says by it when orders expire."""
    boot: Count
    """Of the newest start of the node that the coordinator has heard of; 0: of none. A node with a lower one must raise its own."""


class Signature(Strict, frozen=True):
    """Ed25519 over DSSE's encoding of type and payload."""

    sig: Annotated[bytes, Meta(max_length=64)]
    keyid: Annotated[str, Meta(max_length=128)] = ""
    """Fingerprint of the key; a hint only."""


class Envelope(Strict, frozen=True):
    """A DSSE envelope (protocol 1.0.2) around JSON. `payloadType` says what that is. What is not signed has no signatures."""

    payload: bytes
    payload_type: Annotated[str, Meta(max_length=128)] = msgspec.field(name="payloadType")
    signatures: Annotated[tuple[Signature, ...], Meta(max_length=4)] = ()


class Offer(Strict, frozen=True):
    """A job for a node. The same offer comes again until the node has accepted or rejected it."""

    order: Envelope
    contents: Annotated[dict[Sha256, bytes], Meta(max_length=2)] = msgspec.field(default_factory=dict)
    """Files of the order that are small enough, by their sha256; the node asks for the blocks of others."""


class Watch(Strict, frozen=True):
    """Somebody looks: progress at up to 2 per second for this long."""

    ttl_s: Annotated[float, Meta(gt=0, le=LONGEST_WATCH_S)]
    saliency: bool = False
    """Have the trainer of an NLFT job write its Saliency Map as it stands; the progress tells of it."""


class Report(Strict, frozen=True):
    """Asks for the current status of all jobs that have not been acknowledged as ended."""


class Forgotten(Strict, frozen=True):
    """The node has nothing of a job any more. The answer to `Forget`."""


class OptionsState(Strict, frozen=True):
    """What has become of the options that a job was sent."""

    number: Annotated[int, Meta(ge=0, le=MOST_CHANGES)] = 0
    """Of the newest that the node has: it need not come again. 0: none."""
    taken: Annotated[int, Meta(ge=0, le=MOST_CHANGES)] = 0
    """Of those that its trainer goes on with. 0: the job's own."""
    update: Count | None = None
    """Updates that had been made before those."""
    refused: Text | None = None
    """Why the newest are not taken."""


class JobStatus(Strict, frozen=True):
    """Where a job stands."""

    digest: Sha256 | None
    """Of the job document; None where the offer could not be read."""
    phase: Phase
    outcome: Outcome | None = None
    reason: Reason | None = None
    """Of the outcome; or why a job that was interrupted does not go on yet."""
    text: Text | None = None
    refused: Sha256 | None = None
    """Of the message with the offer that is rejected: it may be nobody's, and only who has sent it knows."""
    options: OptionsState | None = None
    """None: it was sent none."""

    def __post_init__(self) -> None:
        if (self.phase == "ended") != (self.outcome is not None):
            raise ValueError("an outcome belongs to the phase `ended`, and to no other")


class StageDone(Strict, frozen=True):
    """A stage that has ended."""

    stage: str
    seconds: float
    peak_bytes: Count


class Artifact(Strict, frozen=True):
    """A file that a job has made."""

    name: ArtifactName
    sha256: Sha256
    size_bytes: Count


class JobProgress(Strict, frozen=True):
    """The last event of the trainer, all stages that have ended, and the node's resources."""

    event: Event
    finished: list[StageDone]
    resources: Resources
    saliency: Artifact | None = None
    """The newest Saliency Map that somebody has asked for; the coordinator may ask for its blocks while the job runs."""


class JobResult(Strict, frozen=True):
    """The end of a job. It is acknowledged when the coordinator has stored every artifact."""

    digest: Sha256 | None
    outcome: Outcome
    reason: Reason | None = None
    text: Text | None = None
    accuracy: Measured | None = None
    seconds: float | None = None
    peak_bytes: Count | None = None
    artifacts: Annotated[tuple[Artifact, ...], Meta(max_length=len(get_args(ArtifactName)))] = ()
    accepted: bool | None = None
    """Whether the adapter passes the job's `accept_if`; then or not, `text` says why. None where nothing was measured."""
    tokens_per_s: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    """Through the model in training."""
    energy_j: Annotated[float, Meta(ge=0, le=1e15)] | None = None
    """What the device took while it ran. None where nothing measures it."""


class Texts(Strict, frozen=True):
    """Of the records of a dataset the longest text of each kind in characters, 0 where none has one."""

    records: Annotated[int, Meta(ge=1, le=2**28)]
    question: Characters
    answer: Characters = 0
    output: Characters = 0
    judgment: Characters = 0


class PlanRequest(Strict, frozen=True):
    """Asks what a job would take that has not been sent. The answer is a `PlanAnswer`."""

    job: Job
    texts: Texts


class PlanAnswer(Strict, frozen=True):
    """What a job would take on the node, or why it would not be taken."""

    plan: Plan | None
    reason: Reason | None = None
    text: Text | None = None


class FileRequest(Strict, frozen=True):
    """Asks the other side for blocks of the file that the topic names by its sha256."""

    block_bytes: Annotated[int, Meta(ge=1024, le=BLOCK_BYTES)]
    blocks: Annotated[list[Count], Meta(min_length=1, max_length=WINDOW_BLOCKS)]
    """Numbers of blocks: block k begins at byte k * block_bytes."""


TYPES: dict[type, str] = {
    CoordinatorState: "edge1.coordinator.state", Changed: "edge1.coordinator.changed", Hello: "edge1.hello",
    NodeState: "edge1.node.state", NodeInfo: "edge1.node.info", Heartbeat: "edge1.node.heartbeat", Offer: "edge1.job.offer",
    Envelope: "edge1.envelope", Watch: "edge1.job.watch",
    JobStatus: "edge1.job.status", JobProgress: "edge1.job.progress", JobResult: "edge1.job.result", Report: "edge1.command.report",
    Forgotten: "edge1.job.forgotten", PlanRequest: "edge1.plan.request", PlanAnswer: "edge1.plan.answer",
    FileRequest: "edge1.file.request",
}  # fmt: skip
"""The `type` attribute of each kind of data."""
LIFE_S: dict[type, float] = {
    Changed: LIVE_S,
    Hello: ANSWER_S,
    Heartbeat: HEARTBEAT_IDLE_S * (1 + HEARTBEAT_JITTER),
    JobProgress: LIVE_S,
    PlanRequest: PLAN_S,
    PlanAnswer: PLAN_S,
}
"""How long a message is of use, for those of which another comes anyway. An offer lives as long as its order, a watch for its `ttl_s`; all
others until they come: delivery depends on them, or whoever comes later reads them as retained."""
PAYLOAD_TYPES: dict[type[Addressed], str] = {
    kind: f"application/vnd.edge1.{kind.__name__.lower()}+json" for kind in (Order, Cancel, Options, Forget, Drain, Resume, Ack)
}
"""The `payloadType` of each kind of payload. It is signed, so none passes for another."""

T = TypeVar("T")
A = TypeVar("A", bound=Addressed)


class Message(Strict, Generic[T], frozen=True, kw_only=True, omit_defaults=True):
    """The envelope."""

    specversion: Literal["1.0"]
    id: Ulid
    source: Annotated[str, Meta(max_length=256)]
    type: str
    time: Annotated[datetime, Meta(tz=True)]
    datacontenttype: Literal["application/json"]
    boot: Count | None = None
    """Number of the sender's start."""
    attempt: Count | None = None
    """Number of the start of the job's trainer."""
    seq: Count | None = None
    """Number of the message among those of its job."""
    data: T


_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


def new_id() -> str:
    """Return a ULID (github.com/ulid/spec) in lower case: 48 bits of milliseconds, 80 random bits; sorts by time."""
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def read_payload(payload: bytes, kind: type[A]) -> A:
    """Read the payload of an envelope strictly. Raises MessageInvalid with the path of what is wrong."""
    try:
        read: A = _PAYLOADS[kind].decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MessageInvalid(str(error)) from None
    return read


def read_order(payload: bytes) -> Order:
    """Read the order of a job, as `read_payload` does."""
    return read_payload(payload, Order)


_PAYLOADS: dict[type, Any] = {kind: msgspec.json.Decoder(kind) for kind in PAYLOAD_TYPES}


def encode(
    data: object, source: str, *, boot: int | None = None, attempt: int | None = None, seq: int | None = None, message_id: str | None = None
) -> bytes:
    """Return a message in its envelope."""
    message = Message(
        specversion="1.0", id=message_id or new_id(), source=source, type=TYPES[type(data)], time=datetime.now(timezone.utc),
        datacontenttype="application/json", boot=boot, attempt=attempt, seq=seq, data=data,
    )  # fmt: skip
    return msgspec.json.encode(message)


def is_ulid(text: str) -> bool:
    """Whether a text may be the id of a job or message."""
    return re.fullmatch(ULID_PATTERN, text) is not None


_DECODERS: dict[type, Any] = {kind: msgspec.json.Decoder(Message[kind]) for kind in TYPES}  # type: ignore[valid-type]


def decode(payload: bytes, kind: type[T]) -> Message[T]:
    """Read a message of one kind strictly. Raises MessageInvalid with the path of what is wrong."""
    if len(payload) > MAX_MESSAGE_BYTES:
        raise MessageInvalid(f"it has {len(payload):,} bytes, over the limit of {MAX_MESSAGE_BYTES:,}")
    try:
        message: Message[T] = _DECODERS[kind].decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MessageInvalid(str(error)) from None
    if message.type != TYPES[kind]:
        raise MessageInvalid(f"its type is {message.type!r}, this topic takes {TYPES[kind]!r}")
    return message
