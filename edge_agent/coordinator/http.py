"""The coordinator's HTTP API: one definition, on a Unix socket that only its owner can open, and on a port for whoever has a token.

The command line is its client.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import os
import signal
import socket
import sqlite3
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from weakref import WeakSet

import msgspec
from litestar import Litestar, Request, Response, Router, delete, get, post, put
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.exceptions import HTTPException, ValidationException
from litestar.handlers import BaseRouteHandler
from litestar.params import FromPath, FromQuery, HeaderParameter, JSONBody, PathParameter, QueryParameter
from litestar.response import ServerSentEvent
from litestar.response.sse import ServerSentEventMessage
from litestar.types import ControllerRouterHandler, Message
from msgspec import Meta

from edge_agent.config import Api, Name
from edge_agent.coordinator.access import ANYONE, Caller, Identify, NewToken, Scope, allow, local
from edge_agent.coordinator.audience import Happening, ProgressPoint
from edge_agent.coordinator.client import PROBLEM, SOCKET, VERSION, Problem
from edge_agent.coordinator.limits import Limits, network
from edge_agent.coordinator.listening import MOST_CONNECTIONS, Certificate, Server, served, settings_of
from edge_agent.coordinator.pages import PAGES
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
from edge_agent.coordinator.store import (
    Audited,
    AuditPage,
    CoordinatorOutcome,
    CoordinatorPhase,
    DatasetPage,
    DatasetView,
    HistoryRow,
    JobFilter,
    JobPage,
    JobView,
    NodePage,
    NodeView,
    RolloutNodePage,
    Token,
)
from edge_agent.dataset import check_sha256
from edge_agent.dataset_check import Check, check
from edge_agent.errors import (
    DatabaseAway,
    DatabaseUnusable,
    DatasetChecksum,
    DatasetEmpty,
    DatasetSchema,
    DatasetTooLarge,
    DiskFull,
    EdgeAgentError,
    FilesAway,
    Forbidden,
    Refused,
    StateDamaged,
    StateUnusable,
    TooManyRequests,
    Unauthorized,
    Unknown,
    human_bytes,
)
from edge_agent.job import Job, Strict
from edge_agent.json_items import MAX_FILE_BYTES
from edge_agent.messages import ORDER_S, PLAN_S, ArtifactName, PlanAnswer, new_id
from edge_agent.transfer import SHA256

log = logging.getLogger(__name__)
J = TypeVar("J", JobView, SubmittedJob)

LONGEST_SOCKET_PATH = 107
"""Of the kernel, in bytes."""
MAX_BODY_BYTES = 1024 * 1024
"""Of a request that brings no file."""
PING_S = 5.0
MOST_STREAMS = 64
"""Of events, of one token: a quarter of all connections."""
MOST_UNHEARD = 1024
"""Events that wait for one reader."""
STATUSES: dict[type[EdgeAgentError], int] = {
    Unauthorized: 401, Forbidden: 403, Unknown: 404, DatasetTooLarge: 413, DatasetEmpty: 422, DatasetSchema: 422, DatasetChecksum: 422,
    TooManyRequests: 429, DatabaseAway: 503, DatabaseUnusable: 503, FilesAway: 503, StateDamaged: 503,
}  # fmt: skip
"""Of answers with an error; any other has 409."""
HEADERS = {
    "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}  # fmt: skip
"""Of every answer: it is for nobody to keep, and for no browser to run."""


READING = frozenset({"GET", "HEAD", "OPTIONS"})
METHODS = READING | {"POST", "PUT", "PATCH", "DELETE"}
LONGEST_AUDITED = 300
"""Characters of a path."""
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


@dataclass(frozen=True)
class Door:
    """How requests come in: who asks, and how often they may."""

    identify: Identify = local
    by_token: Limits | None = None
    """null: as often as they like."""
    by_address: Limits | None = None
    ears: WeakSet[Ear] = field(default_factory=WeakSet)
    """Streams of events that are open. Only the server's own thread looks."""


def make_app(service: Service, door: Door) -> Litestar:
    """Return the application over a running service."""
    return Litestar(
        [*routes(), *PAGES],
        state=State({"service": service, "door": door}),
        guards=[check_scope, check_parameters, check_body],
        before_send=[_account],
        exception_handlers={
            EdgeAgentError: _explain, HTTPException: _explain_http,
            **dict.fromkeys((sqlite3.Error, OSError, DiskFull), _explain_disk),
            RecursionError: _explain_form, UnicodeError: _explain_form, concurrent.futures.TimeoutError: _explain_delay,
            500: _explain_defect,
        },
        response_headers=HEADERS,
        request_max_body_size=MAX_BODY_BYTES,
        logging_config=None,
        openapi_config=None,
    )  # fmt: skip


def check_scope(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Let a request through whose caller has the scope of its route. A route without one is for nobody; the pages are for anyone."""
    door: Door = connection.app.state.door
    if door.by_address is not None:
        door.by_address.take(network(connection.client.host if connection.client else ""))
    if handler.opt.get("scope") == ANYONE:
        return
    caller = door.identify(connection.headers.get("authorization"))
    connection.scope["state"]["caller"] = caller
    if door.by_token is not None:
        door.by_token.take(caller.name)
    needed: Scope | None = handler.opt.get("scope")
    if needed is None:
        raise Forbidden(caller.scope, "do what no token may")
    allow(caller, needed)


def check_parameters(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Refuse what a route does not read: a filter that is misspelled would let everything through."""
    kinds = ((name, parameter.kwarg_definition) for name, parameter in handler.parsed_fn_signature.parameters.items())
    known = {kind.name or name for name, kind in kinds if isinstance(kind, QueryParameter)}
    if unknown := sorted(set(connection.query_params) - known):
        raise ValidationException(f"there is no parameter {unknown[0][:80]!r} here; there is: {', '.join(sorted(known)) or 'none'}")


async def check_body(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Refuse a body that is not of its route's type as it stands: the framework would take 0 for false, and "1" for 1."""
    body = handler.parsed_fn_signature.parameters.get("data")
    if body is None or not isinstance(connection, Request):
        return
    try:
        msgspec.json.decode(await connection.body(), type=body.annotation)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValidationException(str(error)) from None


async def _account(message: Message, scope: Any) -> None:
    """Count an answer; keep a request that was to change something, but for those that came too often: they would fill the disk."""
    if message["type"] != "http.response.start":
        return
    service: Service = scope["litestar_app"].state.service
    method, status = scope["method"], message["status"]
    known = method in METHODS
    service.metrics.requests.labels(method if known else "other", scope.get("path_template") or "none", status).inc()
    caller: Caller | None = scope["state"].get("caller")
    route = scope.get("route_handler")
    only_asks = scope["path"] == f"{VERSION}/rollouts" and scope["query_string"] == b"dry_run=true"
    only_asks = only_asks or (route is not None and route.opt.get("scope") == "read")
    if caller is None or method in READING or status == STATUSES[TooManyRequests] or only_asks:
        return
    client, made = scope.get("client"), dict(message["headers"]).get(b"location")
    request = Audited(
        time=time.time(), who=caller.name, address=client[0] if client else None, what=f"{method} {scope['path'][:LONGEST_AUDITED]}",
        made=made.decode("latin-1") if made else None, status=status,
    )  # fmt: skip
    service.call_later(lambda: service.audit(request))


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
    """Keep a job for a node, or for the best one; it is offered to it until that answers."""
    service: Service = state.service
    selector = data.selector or Selector()
    return _made(service.call(lambda: service.hand_in(data.node, selector, data.job, data.priority, data.expires_s)))


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
    return ServerSentEvent(_events(service, job_id, Ear(request), last_event_id))


@get("/events", scope="read")
async def events(state: State, request: Request[Any, Any, Any], last_event_id: LastEventId = None) -> ServerSentEvent:
    """What happens in the fleet, as server-sent events: jobs, their progress, nodes. The first says whether some of it is lost."""
    return ServerSentEvent(_events(state.service, None, Ear(request), last_event_id))


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


def _problem(status: int, code: str, text: str, headers: Mapping[str, str] | None = None, found: Check | None = None) -> Response[Problem]:
    """Return the answer to a request that failed (RFC 9457)."""
    problem = Problem(title=HTTPStatus(status).phrase, status=status, detail=text, code=code, found=found)
    return Response(problem, status_code=status, media_type=PROBLEM, headers=HEADERS | dict(headers or {}))


def _explain(_: Request[Any, Any, Any], error: EdgeAgentError) -> Response[Problem]:
    status = 422 if isinstance(error, DatasetWrong) else STATUSES.get(type(error), 409)
    found = error.found if isinstance(error, DatasetWrong) else None
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    if isinstance(error, TooManyRequests):
        headers["Retry-After"] = str(math.ceil(error.wait_s))
    return _problem(status, error.code, str(error), headers, found)


def _explain_disk(_: Request[Any, Any, Any], error: OSError | sqlite3.Error | DiskFull) -> Response[Problem]:
    """The log names the file; where it lies is nothing to who asks."""
    log.error("storage_error error=%r", f"{type(error).__name__}: {error}")
    why = "no space is left" if isinstance(error, DiskFull) else getattr(error, "strerror", None) or type(error).__name__
    return _problem(503, "state", f"the coordinator cannot use its disk: {why}; look whether it is full, and try again")


def _explain_delay(_: Request[Any, Any, Any], error: concurrent.futures.TimeoutError) -> Response[Problem]:
    return _problem(503, "state", "the coordinator did not get to it in a minute; look at its log, and try again")


def _explain_form(_: Request[Any, Any, Any], error: Exception) -> Response[Problem]:
    return _problem(400, "job_schema", f"the request cannot be read: {error}")


def _explain_http(_: Request[Any, Any, Any], error: HTTPException) -> Response[Problem]:
    texts = [error.detail]
    if isinstance(error, ValidationException):
        texts = [": ".join(str(e[k]) for k in ("key", "message") if e.get(k)) for e in error.extra or [] if isinstance(e, dict)] or texts
    code = "job_schema" if error.status_code == 400 else "refused"
    return _problem(error.status_code, code, "; ".join(texts), error.headers)


def _explain_defect(_: Request[Any, Any, Any], error: Exception) -> Response[Problem]:
    log.error("request_failed", exc_info=error)
    return _problem(500, EdgeAgentError.code, "a defect of the coordinator; its log has the traceback")


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


class Ear:
    """Hears for one connection, from the coordinator's thread, and keeps little of what has not gone out: who is slower is cut off."""

    def __init__(self, request: Request[Any, Any, Any]) -> None:
        """Raises TooManyRequests where a token has `MOST_STREAMS` of them."""
        self._loop, self.heard = asyncio.get_running_loop(), asyncio.Queue[Happening](MOST_UNHEARD)
        self._transport: asyncio.Transport = request.scope["state"]["transport"]
        self._door: Door = request.app.state.door
        self._authorization = request.headers.get("authorization")
        self.name = request.scope["state"]["caller"].name
        if self._door.by_token is not None and sum(ear.name == self.name for ear in self._door.ears) >= MOST_STREAMS:
            raise TooManyRequests(PING_S)
        self._door.ears.add(self)

    def may_hear(self) -> bool:
        """Whether the token is good that has opened it: it may have expired since, or was revoked."""
        try:
            self._door.identify(self._authorization)
        except Unauthorized:
            return False
        return True

    def __call__(self, happening: Happening) -> None:
        with suppress(RuntimeError):  # the server has ended
            self._loop.call_soon_threadsafe(self._put, happening)

    def _put(self, happening: Happening) -> None:
        if self.heard.full():
            self._transport.abort()
        else:
            self.heard.put_nowait(happening)


async def _events(service: Service, job: str | None, ear: Ear, heard: str | None) -> AsyncIterator[ServerSentEventMessage]:
    """Yield what an ear hears, up to the end of its job, and a comment where it hears nothing."""
    try:
        if job is not None:
            await asyncio.to_thread(service.call, lambda: service.listen(job, ear, heard))
        else:
            start, lost = await asyncio.to_thread(service.call, lambda: service.listen_to_all(ear, heard))
            yield ServerSentEventMessage(event="start", id=start, data=msgspec.json.encode({"lost": lost}).decode())
        while ear.may_hear():
            try:
                happening = await asyncio.wait_for(ear.heard.get(), PING_S)
            except asyncio.TimeoutError:
                yield ServerSentEventMessage(data=None, comment="still here")
                continue
            if not ear.may_hear():
                return
            yield ServerSentEventMessage(event=happening.kind, id=happening.id, data=_told(happening, job).decode())
            if job is not None and happening.ended:
                return
    finally:
        service.call_later(lambda: service.stop_listening(job, ear))


def _told(happening: Happening, job: str | None) -> bytes:
    """Return the data of an event. Jobs and nodes have their names in them; a progress has not, so the fleet's stream says whose it is."""
    if job is None and happening.kind == "progress":
        return msgspec.json.encode({"job": happening.subject, "progress": msgspec.Raw(happening.data)})
    return happening.data


def serve(service: Service, directory: Path) -> None:
    """Serve the API on its socket until SIGTERM or SIGINT. Raises StateUnusable where its path is too long for the kernel."""
    path = directory / SOCKET
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        raise StateUnusable(directory, f"the path of its socket is longer than {LONGEST_SOCKET_PATH} bytes; give a shorter one")
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        mask = os.umask(0o177)
        try:
            listening.bind(str(path))
        finally:
            os.umask(mask)
        # uvicorn ends on these, and then raises them again for whoever handled them before.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        Server(settings_of(make_app(service, Door())), service.ready).run(sockets=[listening])
    path.unlink(missing_ok=True)


@contextmanager
def api_served(service: Service, api: Api | None) -> Iterator[None]:
    """Serve the API on a port too, where that is configured. Raises ConfigInvalid where it can never work."""
    if api is None:
        yield
        return
    context = None
    if api.certificate_file is not None and api.key_file is not None:
        context = Certificate(api.certificate_file, api.key_file, None, "api").context
    door = Door(service.access.caller, Limits(api.token_limit), Limits(api.address_limit))
    settings = settings_of(make_app(service, door), limit_concurrency=MOST_CONNECTIONS)
    with served(settings, context, api.host, api.port, "api"):
        yield
