"""Rollouts, one job for many nodes, and the best node for one job: what is asked for, and every decision. Nothing here reads or writes.

The terms are those of AWS IoT Jobs: a rollout rate, constant or exponential, and an abort where too many executions fail.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge_agent.config import Labels, Name
from edge_agent.coordinator.views import JobView, NodeView
from edge_agent.errors import human_bytes
from edge_agent.job import Job, Sha256, Strict
from edge_agent.messages import LONGEST_ORDER_S, ORDER_S

MOST_NODES = 10_000
"""That a selector may name."""
MOST_MODELS = 20
"""Of a node that a reason names."""
MOST_STEPS = 100
"""Increments of a rate: with the least factor it has passed every maximum by then."""
CATCH_UP_S = 1.0
"""How much of what was due is made up for: after a longer pause a rollout goes on, and does not burst."""
FAILED = ("failed", "rejected", "timed_out", "expired")
"""Outcomes that count as failures. One that was canceled is neither that nor an end: somebody has asked for it."""

PerMinute = Annotated[int, Meta(ge=1, le=1000)]
Jobs = Annotated[int, Meta(ge=1, le=1_000_000)]
Priority = Annotated[int, Meta(ge=0, le=9)]
Expiry = Annotated[float, Meta(gt=0, le=LONGEST_ORDER_S)]
RolloutState = Literal["running", "completed", "canceled", "aborted"]


class Selector(Strict, frozen=True, kw_only=True):
    """Which nodes: those that are ready, have the job's model and lend its budget, and of these what is asked for here."""

    labels: Labels = msgspec.field(default_factory=dict)
    """A node has all of them, with the same texts."""
    nodes: Annotated[tuple[Name, ...], Meta(max_length=MOST_NODES)] = ()
    """Instead of labels: these, in this order."""
    model_fingerprint: Sha256 | None = None
    """Of the model's files; null: whichever model a node has under the job's name for it."""

    def __post_init__(self) -> None:
        if self.labels and self.nodes:
            raise ValueError("a selector has `labels` or `nodes`, not both")
        if len(set(self.nodes)) < len(self.nodes):
            raise ValueError("a selector names each of its `nodes` once")


class Exponential(Strict, frozen=True, kw_only=True):
    """A rate that grows with success."""

    base_per_minute: PerMinute
    """At the beginning."""
    increment_factor: Annotated[float, Meta(ge=1.1, le=5)] = 2.0
    """By which the rate is multiplied"""
    succeeded: Jobs
    """whenever so many more jobs have succeeded."""


class Rate(Strict, frozen=True, kw_only=True):
    """How many jobs are made in a minute, evenly spaced."""

    maximum_per_minute: PerMinute = 60
    exponential: Exponential | None = None
    """null: the maximum from the beginning."""

    def __post_init__(self) -> None:
        if self.exponential is not None and self.exponential.base_per_minute > self.maximum_per_minute:
            raise ValueError("`base_per_minute` is at most `maximum_per_minute`")


class Abort(Strict, frozen=True, kw_only=True):
    """When a rollout is given up."""

    minimum_ended: Jobs
    """Jobs that have ended before that is asked at all, and"""
    threshold: Annotated[float, Meta(ge=0, lt=1)]
    """the share of failures among them that is too much once it is passed."""


class RolloutPlan(Strict, frozen=True, kw_only=True):
    """A rollout as it was asked for."""

    job: Job
    selector: Selector = msgspec.field(default_factory=Selector)
    rate: Rate = Rate()
    abort: Abort | None = None
    """null: it goes on whatever fails."""
    seeds: Literal["same", "each"] = "same"
    """`each`: the job of the n-th node has the plan's seed plus n - 1, so that every node draws questions, outputs and adapter anew."""
    priority: Priority = 4
    expires_s: Expiry = ORDER_S
    """Of each job, from when it is made until its node has answered."""

    def job_of(self, place: int) -> Job:
        """Return the job of a node, whose places are counted from 0."""
        seed = (self.job.seed + place) % 2**32 if self.seeds == "each" else self.job.seed
        return msgspec.structs.replace(self.job, seed=seed)

    @property
    def files(self) -> set[str]:
        """What all its jobs bring, by its sha256."""
        return {sha256 for sha256 in (self.job.dataset.sha256, self.job.dataset.evaluation_sha256) if sha256 is not None}


class Candidate(msgspec.Struct, frozen=True):
    """A node, and why it is chosen or is not."""

    node: str
    why: str


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What a selector finds."""

    chosen: list[Candidate]
    """In their order: that in which they get their jobs, or the best first."""
    others: list[Candidate]


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """The nodes of a rollout, by what has become of its jobs."""

    waiting: int = 0
    """No job has been made for them yet."""
    open: int = 0
    """Their jobs have not ended."""
    succeeded: int = 0
    failed: int = 0
    rejected: int = 0
    """By the node, or by the coordinator where a node lacked the model when its turn came."""
    timed_out: int = 0
    expired: int = 0
    canceled: int = 0
    """Those for which no job was made because the rollout ended before are among them."""


class RolloutView(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout as the coordinator knows it. Its nodes were chosen when it was made, and are those ever since."""

    id: str
    state: RolloutState
    text: str | None
    """Why it was aborted or canceled."""
    created: float
    changed: float
    nodes: int
    counts: Counts
    next: float | None
    """When the next job is made, in seconds since 1970; null: there is none to make."""
    plan: RolloutPlan


class RolloutPage(msgspec.Struct, frozen=True, kw_only=True):
    """Rollouts, the newest first."""

    items: list[RolloutView]
    next: str | None
    """As of jobs."""


class RolloutMade(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to who asks for a rollout."""

    rollout: RolloutView | None
    """null: it was asked for what would be chosen only."""
    choice: Choice


class SubmittedJob(JobView, frozen=True, kw_only=True):
    """The answer to who submits a job."""

    placed: Candidate | None = None
    """Why it is for this node; null: that was asked for."""


def unfit(node: NodeView, job: Job, fingerprint: str | None = None) -> str | None:
    """Say why a node cannot run a job, by what it has told of itself; None where nothing speaks against it."""
    info = node.info
    if info is None:
        return None
    if job.model not in info.models:
        return f"model {job.model!r} is not on node {node.id}; it has: {_names(info.models)}"
    if fingerprint is not None and info.models[job.model] != fingerprint:
        return f"model {job.model!r} on node {node.id} has the fingerprint {info.models[job.model]}, not {fingerprint}"
    if job.budget_bytes > info.limits.budget_bytes:
        return f"node {node.id} lends {human_bytes(info.limits.budget_bytes)}, the job's budget is {human_bytes(job.budget_bytes)}"
    return None


def why_not(node: NodeView, job: Job, selector: Selector) -> str | None:
    """Say why a selector does not choose a node for a job; None where it does."""
    info = node.info
    if node.state != "ready":
        return f"it is {node.state}"
    if node.drain:
        return "it is to take no new jobs"
    if info is None:
        return "it has not said yet what it can do"
    for name, value in selector.labels.items():
        if info.labels.get(name) != value:
            return f"its label {name} is {info.labels[name]!r}" if name in info.labels else f"it has no label {name}"
    if (why := unfit(node, job, selector.model_fingerprint)) is not None:
        return why
    return f"the files of model {job.model!r} are not there" if info.models[job.model] is None else None


def choose(nodes: Sequence[NodeView], job: Job, selector: Selector) -> Choice:
    """Return the nodes of a selector: in the order in which it names them, else by their names."""
    known = {node.id: node for node in nodes}
    choice = Choice(chosen=[], others=[])
    for name in selector.nodes or sorted(known):
        why = why_not(known[name], job, selector) if name in known else "it has never been seen"
        if why is None:
            choice.chosen.append(Candidate(name, f"it is ready and lends {human_bytes(_lent(known[name]))}"))
        else:
            choice.others.append(Candidate(name, why))
    return choice


def best(nodes: Sequence[NodeView], job: Job, selector: Selector, open_jobs: Mapping[str, int], speeds: Mapping[str, float]) -> Choice:
    """Return the nodes of a selector, the best for one job first.

    That is the one with the fewest jobs, of these the one with the most free memory up to the job's budget, then the fastest, then the
    first by name. `open_jobs` and `speeds` (tokens/s of the last jobs with this model) are by node. What a node does not tell counts as 0.
    """
    known, choice = {node.id: node for node in nodes}, choose(nodes, job, selector)
    ranked: list[tuple[tuple[float, float, float, str], str]] = []
    for name in (candidate.node for candidate in choice.chosen):
        jobs, free, speed = _jobs_of(known[name], open_jobs.get(name, 0)), _free(known[name]), speeds.get(name)
        key = (jobs, -min(1.0, (free or 0.0) / job.budget_bytes), -(speed or 0.0), name)
        ranked.append((key, _standing(jobs, free, speed)))
    return msgspec.structs.replace(choice, chosen=[Candidate(key[-1], why) for key, why in sorted(ranked)])


def _names(models: Mapping[str, object]) -> str:
    more = f" and {len(models) - MOST_MODELS:,} more" if len(models) > MOST_MODELS else ""
    return f"{', '.join([*models][:MOST_MODELS])}{more}" if models else "none"


def _lent(node: NodeView) -> int:
    return node.info.limits.budget_bytes if node.info else 0


def _jobs_of(node: NodeView, here: int) -> int:
    """How many jobs a node has: as the coordinator knows, or as the node has said, which may have some of another one."""
    beat = node.heartbeat
    return max(here, beat.queue + (beat.job is not None) if beat else 0)


def _free(node: NodeView) -> float | None:
    return node.heartbeat.resources.device_free_bytes.value if node.heartbeat else None


def _standing(jobs: int, free: float | None, speed: float | None) -> str:
    return ", ".join(
        (
            f"jobs there: {jobs}" if jobs else "no job there",
            "free memory not told" if free is None else f"{human_bytes(int(free))} free",
            "speed with this model not known" if speed is None else f"{speed:,.0f} tokens/s in its last jobs with this model",
        )
    )


def per_minute(rate: Rate, succeeded: int) -> float:
    """Return how many jobs are made in a minute when so many have succeeded."""
    if (grown := rate.exponential) is None:
        return rate.maximum_per_minute
    steps = min(succeeded // grown.succeeded, MOST_STEPS)
    return min(rate.maximum_per_minute, grown.base_per_minute * grown.increment_factor**steps)


def pause_s(rate: Rate, succeeded: int) -> float:
    """Return the seconds between two jobs."""
    return 60.0 / per_minute(rate, succeeded)


def due(rate: Rate, succeeded: int, last: float, now: float) -> tuple[int, float]:
    """Return how many jobs are due, and when the last of them was, since one was due `last`, in seconds of any clock."""
    pause = pause_s(rate, succeeded)
    since = max(last, now - pause - CATCH_UP_S)
    count = math.floor((now - since) / pause + 1e-6)  # of a pause that is over by all but a rounding error
    return count, since + count * pause


def why_abort(abort: Abort | None, counts: Counts) -> str | None:
    """Say why a rollout is to be aborted; None where it goes on."""
    failed = sum(getattr(counts, outcome) for outcome in FAILED)
    ended = failed + counts.succeeded
    if abort is None or ended < abort.minimum_ended or failed <= abort.threshold * ended:
        return None
    return f"{failed:,} of {ended:,} jobs that ended have failed: more than {100 * abort.threshold:.4g} %"
