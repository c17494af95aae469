"""What the HTTP API is asked: its routes, each with the scope that it takes."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from litestar import Request, Response, Router, delete, get, post, put
from litestar.datastructures import State
from litestar.params import FromPath, FromQuery, HeaderParameter, JSONBody, PathParameter, QueryParameter
from litestar.response import ServerSentEvent
from litestar.types import ControllerRouterHandler
from msgspec import Meta

from edge_agent.config import Name
from edge_agent.coordinator.access import Caller
from edge_agent.coordinator.audience import ProgressPoint
from edge_agent.coordinator.client import VERSION
from edge_agent.coordinator.door import Ear, events_for
from edge_agent.coordinator.ranges import ranged
from edge_agent.coordinator.rollout import (
    Expiry,
    Priority,
    RolloutMade,
    RolloutPage,
    RolloutPlan,
    RolloutState,
    RolloutView,
    Selector,
    SubmittedJob,
)
from edge_agent.coordinator.service import Service
from edge_agent.coordinator.views import (
    AuditPage,
    CoordinatorOutcome,
    CoordinatorPhase,
    DatasetPage,
    DatasetView,
    HistoryRow,
    JobFilter,
    JobPage,
    JobView,
    NewToken,
    NodePage,
    NodeView,
    RolloutNodePage,
    Scope,
    Token,
)
from edge_agent.dataset import check_sha256
from edge_agent.dataset_check import Check, check
from edge_agent.errors import (
    DatasetTooLarge,
    EdgeAgentError,
    Refused,
    Unknown,
    human_bytes,
)
from edge_agent.job import Job, Strict
from edge_agent.json_items import MAX_FILE_BYTES
from edge_agent.messages import ORDER_S, PLAN_S, ArtifactName, PlanAnswer, Ulid, new_id
from edge_agent.transfer import SHA256

J = TypeVar("J", JobView, SubmittedJob)
METRICS = "text/plain; version=1.0.0; charset=utf-8"
MOST_ITEMS = 1000
"""Of one page of a list."""
Limit = Annotated[int, QueryParameter(ge=1, le=MOST_ITEMS, description="Items at most.")]
After = Annotated[str | None, QueryParameter(max_length=64, description="The `next` of the page before.")]
Number = Annotated[str | None, QueryParameter(pattern="^[0-9]{1,18}$", description="The `next` of the page before.")]
FileName = Annotated[str | None, QueryParameter(pattern=r"^[^/\x00-\x1f\x7f]{1,255}$", max_length=255)]
Sha256InPath = Annotated[str, PathParameter(pattern=f"^{SHA256.pattern}$", max_length=64)]
LastEventId = Annotated[str | None, HeaderParameter(name="Last-Event-ID", max_length=64, description="Of the last event that was heard.")]
Word = Annotated[str, Meta(max_length=64)]
Whole = Annotated[int, Meta(ge=-(2**53), le=2**53)]
Presence = Literal["init", "ready", "draining", "offline", "lost"]


class Submission(Strict, frozen=True):
    """A job for a node, or for the best of those that a selector finds. Its files have been uploaded before."""

    job: Job
    node: str | None = None
    """null: the best one."""
    selector: Selector | None = None
    """null: of all nodes that can have the job."""
    priority: Priority = 4
    expires_s: Expiry = ORDER_S
    """Until the node has answered; its order is worth nothing then."""
    id: Ulid | None = None
    """Of the job: who does not hear the answer sends the same again, and gets the job that is there. null: a new one."""

    def __post_init__(self) -> None:
        if self.node is not None and self.selector is not None:
            raise ValueError("a job is for a `node` or has a `selector`, not both")


class PlanWanted(Strict, frozen=True):
    """A job that has not been handed in, and the node that may get it. Its files have been uploaded before."""

    job: Job
    node: str


class OptionsRequest(Strict, frozen=True):
    """What is to change while a job runs: a part of its document."""

    method: Annotated[dict[Word, bool | Whole | float | Word | None], Meta(min_length=1, max_length=32)]
    """Fields of NLFT's options; those that are not named stay as they are."""


class TokenRequest(Strict, frozen=True):
    """A token to make."""

    name: Name
    scope: Scope
    expires_s: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    """null: it does not expire."""


@get("/me", scope="read", sync_to_thread=False)
def me(request: Request[Any, Any, Any]) -> Caller:
    """Who asks, and what they may do."""
    caller: Caller = request.scope["state"]["caller"]
    return caller


@get("/nodes", scope="read", sync_to_thread=True)
def nodes(
    state: State, node_state: Annotated[Presence | None, QueryParameter(name="state")] = None, after: After = None, limit: Limit = 100
) -> NodePage:
    """Nodes that have ever been seen, by their names."""
    service: Service = state.service
    return service.call(lambda: service.nodes(node_state, after, limit))


@post("/nodes/{node_id:str}/drain", scope="admin", status_code=200, sync_to_thread=True)
def drain(state: State, node_id: FromPath[str]) -> NodeView:
    """Have a node take no new jobs."""
    service: Service = state.service
    return service.call(lambda: service.drain(node_id, True))


@post("/nodes/{node_id:str}/resume", scope="admin", status_code=200, sync_to_thread=True)
def resume(state: State, node_id: FromPath[str]) -> NodeView:
    """Have a node take jobs again."""
    service: Service = state.service
    return service.call(lambda: service.drain(node_id, False))


@get("/jobs", scope="read", sync_to_thread=True)
def jobs(
    state: State,
    phase: FromQuery[CoordinatorPhase | None] = None,
    outcome: FromQuery[CoordinatorOutcome | None] = None,
    node: FromQuery[str | None] = None,
    rollout: FromQuery[str | None] = None,
    after: Number = None,
    limit: Limit = 100,
) -> JobPage:
    """Jobs, the newest first: all, or those of a phase, an outcome, a node or a rollout."""
    service: Service = state.service
    return service.call(lambda: service.jobs(JobFilter(phase=phase, outcome=outcome, node=node, rollout=rollout), after, limit))


@post("/jobs", scope="submit", sync_to_thread=True)
def submit(state: State, data: JSONBody[Submission]) -> Response[SubmittedJob]:
    """Keep a job for a node, or for the best one; it is offered to it until that answers. The same again, by its `id`, changes nothing."""
    service: Service = state.service
    selector = data.selector or Selector()
    return _made(service.call(lambda: service.hand_in(data.node, selector, data.job, data.priority, data.expires_s, data.id)))


@post("/plans", scope="read", status_code=200)
async def plan(state: State, data: JSONBody[PlanWanted]) -> PlanAnswer:
    """What a job would take on a node, about: in closed form, as the node answers at once, whatever it works on. Nothing is handed in."""
    service: Service = state.service
    asked = await asyncio.to_thread(service.call, lambda: service.ask_plan(data.node, data.job))
    try:
        return await asyncio.wait_for(asyncio.wrap_future(asked), PLAN_S)
    except asyncio.TimeoutError:
        raise Refused(f"node {data.node!r} has not answered within {PLAN_S:.0f} s; the job can be handed in nevertheless") from None


@get("/jobs/{job_id:str}", scope="read", sync_to_thread=True)
def job(state: State, job_id: FromPath[str]) -> JobView:
    """One job."""
    service: Service = state.service
    return service.call(lambda: service.job(job_id))


@get("/jobs/{job_id:str}/history", scope="read", sync_to_thread=True)
def history(state: State, job_id: FromPath[str]) -> list[HistoryRow]:
    """What the node has said of a job, the oldest first."""
    service: Service = state.service
    return service.call(lambda: service.history(job_id))


@get("/jobs/{job_id:str}/progress", scope="read", sync_to_thread=True)
def progress(state: State, job_id: FromPath[str]) -> list[ProgressPoint]:
    """What was told of a job's progress since the coordinator's start, thinned, the oldest first."""
    service: Service = state.service
    return service.call(lambda: service.progress_of(job_id))


@post("/jobs/{job_id:str}/cancel", scope="submit", status_code=200, sync_to_thread=True)
def cancel(state: State, job_id: FromPath[str]) -> JobView:
    """Ask for the end of a job."""
    service: Service = state.service
    return service.call(lambda: service.cancel(job_id))


@post("/jobs/{job_id:str}/options", scope="submit", status_code=200, sync_to_thread=True)
def options(state: State, job_id: FromPath[str], data: JSONBody[OptionsRequest]) -> JobView:
    """Have an NLFT job go on with other values of some options, from the next update on; each request has a number."""
    service: Service = state.service
    return service.call(lambda: service.send_options(job_id, data.method))


@post("/jobs/{job_id:str}/saliency", scope="read", status_code=202, sync_to_thread=True)
def saliency(state: State, job_id: FromPath[str]) -> JobView:
    """Have the trainer of a running NLFT job write its Saliency Map as it stands; the event `saliency` says when it has come.

    Until the job has ended it is the artifact `saliency.json`.
    """
    service: Service = state.service
    return service.call(lambda: service.ask_saliency(job_id))


@post("/jobs/{job_id:str}/retry", scope="submit", sync_to_thread=True)
def retry(state: State, job_id: FromPath[str]) -> Response[JobView]:
    """Hand in an ended job again, as a new job for the same node; `retry_of` says from which it came."""
    service: Service = state.service
    return _made(service.call(lambda: service.retry(job_id)))


def _made(job: J) -> Response[J]:
    return Response(job, headers={"Location": f"{VERSION}/jobs/{job.id}"})


@post("/jobs/{job_id:str}/forget", scope="admin", status_code=200, sync_to_thread=True)
def forget(state: State, job_id: FromPath[str]) -> JobView:
    """Ask for the deletion of an ended job."""
    service: Service = state.service
    return service.call(lambda: service.forget(job_id))


@get("/jobs/{job_id:str}/events", scope="read")
async def job_events(
    state: State, job_id: FromPath[str], request: Request[Any, Any, Any], last_event_id: LastEventId = None
) -> ServerSentEvent:
    """The job and its progress, as server-sent events, until it has ended."""
    service: Service = state.service
    await asyncio.to_thread(service.call, lambda: service.job(job_id))
    return ServerSentEvent(events_for(service, job_id, Ear(request), last_event_id))


@get("/events", scope="read")
async def events(state: State, request: Request[Any, Any, Any], last_event_id: LastEventId = None) -> ServerSentEvent:
    """What happens in the fleet, as server-sent events: jobs, their progress, nodes. The first says whether some of it is lost."""
    return ServerSentEvent(events_for(state.service, None, Ear(request), last_event_id))


@get("/jobs/{job_id:str}/artifacts/{name:str}", scope="read", statuses=(206, 304, 400, 416))
async def artifact(state: State, job_id: FromPath[str], name: FromPath[ArtifactName], request: Request[Any, Any, Any]) -> Response[bytes]:
    """A file that a job has made, or a range of it; its ETag is its sha256."""
    service: Service = state.service
    sha256, path = await asyncio.to_thread(service.call, lambda: service.artifact(job_id, name))
    path = path or await service.file(sha256)
    if path is None or not path.exists():  # a map that another has taken the place of
        raise Unknown(f"job {job_id} has no {name} here")
    return ranged(path, sha256, request.headers, name)


@get("/rollouts", scope="read", sync_to_thread=True)
def rollouts(
    state: State,
    rollout_state: Annotated[RolloutState | None, QueryParameter(name="state")] = None,
    after: Number = None,
    limit: Limit = 100,
) -> RolloutPage:
    """Rollouts, the newest first."""
    service: Service = state.service
    return service.call(lambda: service.rollouts(rollout_state, after, limit))


@post("/rollouts", scope="submit", status_code=200, sync_to_thread=True)
def roll_out(state: State, data: JSONBody[RolloutPlan], dry_run: FromQuery[bool] = False) -> Response[RolloutMade]:
    """Give one job to all nodes that a selector finds now, one after the other; with `dry_run`, say which those are and make nothing."""
    service: Service = state.service
    made = service.call(lambda: service.roll_out(data, dry_run))
    return Response(made, headers={"Location": f"{VERSION}/rollouts/{made.rollout.id}"} if made.rollout else {})


@get("/rollouts/{rollout_id:str}", scope="read", sync_to_thread=True)
def rollout(state: State, rollout_id: FromPath[str]) -> RolloutView:
    """One rollout."""
    service: Service = state.service
    return service.call(lambda: service.rollout(rollout_id))


@get("/rollouts/{rollout_id:str}/nodes", scope="read", sync_to_thread=True)
def rollout_nodes(state: State, rollout_id: FromPath[str], after: Number = None, limit: Limit = 100) -> RolloutNodePage:
    """The nodes of a rollout and what has become of their jobs, in the order in which they get them."""
    service: Service = state.service
    return service.call(lambda: service.rollout_nodes(rollout_id, after, limit))


@post("/rollouts/{rollout_id:str}/cancel", scope="submit", status_code=200, sync_to_thread=True)
def cancel_rollout(state: State, rollout_id: FromPath[str], force: FromQuery[bool] = False) -> RolloutView:
    """End a rollout: its jobs that no trainer has begun are canceled, with `force` all that have not ended."""
    service: Service = state.service
    return service.call(lambda: service.cancel_rollout(rollout_id, force))


@get("/datasets", scope="read", sync_to_thread=True)
def datasets(state: State, after: After = None, limit: Limit = 100) -> DatasetPage:
    """Datasets by their sha256."""
    service: Service = state.service
    return service.call(lambda: service.datasets(after, limit))


@put("/datasets/{sha256:str}", scope="submit", request_max_body_size=None, statuses=(422,))
async def upload(state: State, sha256: Sha256InPath, request: Request[Any, Any, Any], name: FileName = None) -> DatasetView:
    """Keep a dataset, sent as it is, under its sha256, and say what is in it. One with a wrong line is not kept."""
    service: Service = state.service
    part = service.files.incoming / f"{sha256}.upload-{new_id()}"
    try:
        await _receive_file(part, request)
        size = part.stat().st_size
        await asyncio.to_thread(service.call, lambda: service.check_room(sha256, size))
        found = await asyncio.to_thread(_look_into, service, part, sha256, name or sha256[:12])
        view = DatasetView(
            sha256=sha256, name=name or sha256[:12], size_bytes=size, uploaded=time.time(),
            found=found,
        )  # fmt: skip
        await service.keep_file(part, sha256)
        return await asyncio.to_thread(service.call, lambda: service.keep_dataset(view))
    finally:
        part.unlink(missing_ok=True)


@get("/datasets/{sha256:str}", scope="read", sync_to_thread=True)
def dataset(state: State, sha256: FromPath[str]) -> DatasetView:
    """What is in a dataset."""
    service: Service = state.service
    return service.call(lambda: service.dataset(sha256))


@delete("/datasets/{sha256:str}", scope="submit", status_code=200, sync_to_thread=True)
def remove_dataset(state: State, sha256: FromPath[str]) -> DatasetView:
    """Delete a dataset that no job has."""
    service: Service = state.service
    return service.call(lambda: service.remove_dataset(sha256))


@get("/audit", scope="admin", sync_to_thread=True)
def audit(state: State, after: Number = None, limit: Limit = 100) -> AuditPage:
    """Requests that were to change something, the newest first."""
    service: Service = state.service
    return service.call(lambda: service.audited(after, limit))


@get("/metrics", scope="read", sync_to_thread=True, media_type=METRICS)
def metrics(state: State) -> bytes:
    """What the coordinator counts and measures, in Prometheus' text format."""
    service: Service = state.service
    return service.metrics.text()


@get("/tokens", scope="admin", sync_to_thread=True)
def tokens(state: State) -> list[Token]:
    """All tokens, without their secrets."""
    service: Service = state.service
    return service.call(service.tokens)


@post("/tokens", scope="admin", sync_to_thread=True)
def new_token(state: State, data: JSONBody[TokenRequest]) -> NewToken:
    """Make a token. Its secret is in this answer alone."""
    service: Service = state.service
    return service.call(lambda: service.access.new(data.name, data.scope, data.expires_s))


@delete("/tokens/{name:str}", scope="admin", status_code=200, sync_to_thread=True)
def revoke_token(state: State, name: FromPath[str]) -> Token:
    """End a token at once."""
    service: Service = state.service
    return service.call(lambda: service.access.revoke(name))


ROUTES = [
    me, nodes, drain, resume, plan, jobs, submit, job, history, progress, cancel, options, saliency, retry, forget,
    job_events, events, artifact,
    rollouts, roll_out, rollout, rollout_nodes, cancel_rollout,
    datasets, upload, dataset, remove_dataset, audit, tokens, new_token, revoke_token,
]  # fmt: skip
"""All that can be asked, but for the metrics, which Prometheus looks for elsewhere. Each says what scope that takes."""


def routes() -> list[ControllerRouterHandler]:
    """Return the routes of an application."""
    return [Router(VERSION, route_handlers=ROUTES), metrics]


class DatasetWrong(EdgeAgentError):
    """An uploaded dataset has wrong lines; the answer holds its check."""

    code = "dataset_schema"
    exit_code = 3

    def __init__(self, found: Check, why: str) -> None:
        super().__init__(why)
        self.found = found


async def _receive_file(part: Path, request: Request[Any, Any, Any]) -> None:
    """Write a body. Raises DatasetTooLarge."""
    size = 0
    with part.open("wb") as file:
        async for chunk in request.stream():
            size += len(chunk)
            if size > MAX_FILE_BYTES:
                raise DatasetTooLarge("the file", f"{size:,} bytes", human_bytes(MAX_FILE_BYTES))
            await asyncio.to_thread(file.write, chunk)


def _look_into(service: Service, part: Path, sha256: str, name: str) -> Check:
    """Return what is in an uploaded dataset. Raises a DatasetError where it is another one, or one that is wrong."""
    check_sha256(part, sha256)
    with service.looking:  # one after the other: a check holds the whole file
        found, _ = check(part)
    found = msgspec.structs.replace(found, file=name)
    if found.error is not None:
        raise DatasetWrong(found, found.error.text.replace(part.name, name))
    return found
