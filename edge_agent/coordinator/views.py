"""What a coordinator tells of jobs, nodes, rollouts, datasets, tokens and requests: the types of its store and its API."""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from edge_agent.dataset_check import Check
from edge_agent.messages import (
    Artifact,
    Heartbeat,
    JobResult,
    NodeInfo,
    OptionsState,
    Order,
    Outcome,
    Phase,
    Reason,
)
from edge_agent.new_options import NewOptions

MANY = 2**31
"""As a limit: all."""

Scope = Literal["read", "submit", "admin"]
"""What a token lets its bearer do; each may do what those before it may."""

CoordinatorPhase = Literal["created", "offered"] | Phase
CoordinatorOutcome = Outcome | Literal["expired"]


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job as the coordinator knows it."""

    id: str
    node: str
    digest: str
    order: Order
    created: float
    changed: float
    phase: CoordinatorPhase
    outcome: CoordinatorOutcome | None
    reason: Reason | None
    text: str | None
    attempt: int
    boot: int
    seq: int
    cancel: bool
    forget: bool
    lost: bool
    """Whether it is at a node that has been silent for longer than the lease: it may be lost, and may come back."""
    result: JobResult | None
    retry_of: str | None = None
    """The job that it is run again for."""
    rollout: str | None = None
    """That which it is of."""
    options: NewOptions | None = None
    """What it was sent last to go on with while it runs."""
    options_state: OptionsState | None = None
    """What its node says has become of that."""

    @property
    def options_due(self) -> bool:
        """Whether its node has it, and does not have the options that it was sent last."""
        known = self.options_state.number if self.options_state else 0
        at_node = self.phase not in ("created", "offered", "ended") and self.result is None
        return at_node and self.options is not None and self.options.number > known

    @property
    def files(self) -> set[str]:
        """The files that the job brought and made, by their sha256."""
        return {file.sha256 for file in self.order.files} | {artifact.sha256 for artifact in self.artifacts}

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        return self.result.artifacts if self.result else ()


class JobFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which jobs a list has; null: whatever they have."""

    phase: CoordinatorPhase | None = None
    outcome: CoordinatorOutcome | None = None
    node: str | None = None
    rollout: str | None = None


class JobPage(msgspec.Struct, frozen=True, kw_only=True):
    """Jobs, the newest first."""

    items: list[JobView]
    next: str | None
    """What `after` is to be for the page that follows; null: there is none."""


class DueJob(NamedTuple):
    """A job of which its node may have to be told something."""

    id: str
    node: str
    phase: str
    changed: float
    cancel: bool
    has_options: bool


class HistoryRow(msgspec.Struct, frozen=True, kw_only=True):
    """One message that a node sent about a job."""

    time: float
    seq: int | None
    attempt: int | None
    phase: Phase
    outcome: Outcome | None
    reason: Reason | None
    text: str | None
    late: bool


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """A node as the coordinator knows it."""

    id: str
    state: Literal["init", "ready", "draining", "offline", "lost"]
    boot: int
    conn: int
    seen: float
    info: NodeInfo | None
    heartbeat: Heartbeat | None
    drain: bool | None
    drain_command: int
    """The number under which it is told so."""
    told: int
    """That of the last one that it has done, as it says."""

    @property
    def present(self) -> bool:
        return self.state in ("ready", "draining")


class NodePage(msgspec.Struct, frozen=True, kw_only=True):
    """Nodes by their names."""

    items: list[NodeView]
    next: str | None
    """As of jobs."""


class KeptRollout(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout as it is kept."""

    number: int
    id: str
    plan: bytes
    """JSON of what was asked for."""
    created: float
    changed: float
    state: Literal["running", "completed", "canceled", "aborted"]
    text: str | None


class RolloutNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node of a rollout, and what has become of its job."""

    node: str
    job: str | None
    """null: none was made, yet or at all."""
    phase: CoordinatorPhase | None
    """null: there is no job, or none any more."""
    outcome: CoordinatorOutcome | None
    text: str | None


class RolloutNodePage(msgspec.Struct, frozen=True, kw_only=True):
    """The nodes of a rollout, in the order in which they get their jobs."""

    items: list[RolloutNode]
    next: str | None
    """As of jobs."""


class DatasetView(msgspec.Struct, frozen=True, kw_only=True):
    """A dataset that was uploaded."""

    sha256: str
    name: str
    size_bytes: int
    uploaded: float
    found: Check
    """What is in it."""


class DatasetPage(msgspec.Struct, frozen=True, kw_only=True):
    """Datasets by their sha256."""

    items: list[DatasetView]
    next: str | None
    """As of jobs."""


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """What is told of a token; nobody can tell its secret."""

    name: str
    scope: Scope
    created: float
    expires: float | None


class NewToken(msgspec.Struct, frozen=True, kw_only=True):
    """A token that has just been made: the only time that it is told."""

    token: Token
    secret: str
    """What stands in `Authorization: Bearer`."""


class Audited(msgspec.Struct, frozen=True, kw_only=True):
    """A request that was to change something."""

    time: float
    who: str
    """Name of the token, or `local`."""
    address: str | None
    """null: on the socket."""
    what: str
    """Method and path."""
    made: str | None
    """Path of what it has made."""
    status: int


class AuditPage(msgspec.Struct, frozen=True, kw_only=True):
    """Requests, the newest first."""

    items: list[Audited]
    next: str | None
    """As of jobs."""
