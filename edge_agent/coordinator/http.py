"""The coordinator's HTTP API: one definition, on a Unix socket that only its owner can open, and on a port for whoever has a token.

The command line is its client.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import signal
import socket
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import msgspec
import uvicorn
from litestar import Litestar, Request, Response, Router, delete, get, post, put
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.exceptions import HTTPException, ValidationException
from litestar.handlers import BaseRouteHandler
from litestar.params import FromPath, JSONBody, QueryParameter
from litestar.response import File, ServerSentEvent
from litestar.response.sse import ServerSentEventMessage
from msgspec import Meta

from edge_agent.config import Api, Name
from edge_agent.coordinator.access import Caller, Identify, NewToken, Scope, check, local
from edge_agent.coordinator.client import PROBLEM, SOCKET, VERSION, Problem
from edge_agent.coordinator.listening import MOST_CONNECTIONS, Certificate, served, settings_of
from edge_agent.coordinator.service import Service
from edge_agent.coordinator.store import HistoryRow, JobView, NodeView, Token
from edge_agent.errors import EdgeAgentError, Forbidden, Refused, StateUnusable, Unauthorized, Unknown, human_bytes
from edge_agent.job import Job, Strict
from edge_agent.json_items import MAX_FILE_BYTES
from edge_agent.messages import LONGEST_ORDER_S, ORDER_S, JobProgress

log = logging.getLogger(__name__)

LONGEST_SOCKET_PATH = 107
"""Of the kernel, in bytes."""
MAX_BODY_BYTES = 1024 * 1024
"""Of a request that brings no file."""
PING_S = 5.0
STATUSES: dict[type[EdgeAgentError], int] = {Unauthorized: 401, Forbidden: 403, Unknown: 404}
"""Of answers with an error; any other has 409."""
HEADERS = {
    "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}  # fmt: skip
"""Of every answer: it is for nobody to keep, and for no browser to run."""


class Submission(Strict, frozen=True):
    """A job for a node. Its files have been uploaded before."""

    node: str
    job: Job
    priority: Annotated[int, Meta(ge=0, le=9)] = 4
    expires_s: Annotated[float, Meta(gt=0, le=LONGEST_ORDER_S)] = ORDER_S
    """Until the node has answered; its order is worth nothing then."""


class TokenRequest(Strict, frozen=True):
    """A token to make."""

    name: Name
    scope: Scope
    expires_s: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    """null: it does not expire."""


def make_app(service: Service, identify: Identify) -> Litestar:
    """Return the application over a running service; `identify` tells who asks."""
    return Litestar(
        [Router(VERSION, route_handlers=ROUTES)],
        state=State({"service": service, "identify": identify}),
        guards=[check_scope],
        exception_handlers={
            EdgeAgentError: _explain, HTTPException: _explain_http, sqlite3.Error: _explain_disk, OSError: _explain_disk,
            RecursionError: _explain_form, UnicodeError: _explain_form, concurrent.futures.TimeoutError: _explain_delay,
            500: _explain_defect,
        },
        response_headers=HEADERS,
        request_max_body_size=MAX_BODY_BYTES,
        logging_config=None,
        openapi_config=None,
    )  # fmt: skip


def check_scope(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Let a request through whose caller has the scope of its route. A route without one is for nobody."""
    caller: Caller = connection.app.state.identify(connection.headers.get("authorization"))
    needed: Scope | None = handler.opt.get("scope")
    if needed is None:
        raise Forbidden(caller.scope, "do what no token may")
    check(caller, needed)
    connection.scope["state"]["caller"] = caller


@get("/nodes", scope="read", sync_to_thread=True)
def nodes(state: State) -> list[NodeView]:
    """All nodes that have ever been seen."""
    service: Service = state.service
    return service.call(service.nodes)


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
def jobs(state: State, limit: Annotated[int, QueryParameter(ge=1, le=10_000)] = 100) -> list[JobView]:
    """The newest jobs first."""
    service: Service = state.service
    return service.call(lambda: service.jobs(limit))


@post("/jobs", scope="submit", sync_to_thread=True)
def submit(state: State, data: JSONBody[Submission]) -> JobView:
    """Keep a job; it is offered to its node until that answers."""
    service: Service = state.service
    return service.call(lambda: service.submit(data.node, data.job, data.priority, data.expires_s))


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


@post("/jobs/{job_id:str}/cancel", scope="submit", status_code=200, sync_to_thread=True)
def cancel(state: State, job_id: FromPath[str]) -> JobView:
    """Ask for the end of a job."""
    service: Service = state.service
    return service.call(lambda: service.cancel(job_id))


@post("/jobs/{job_id:str}/forget", scope="admin", status_code=200, sync_to_thread=True)
def forget(state: State, job_id: FromPath[str]) -> JobView:
    """Ask for the deletion of an ended job."""
    service: Service = state.service
    return service.call(lambda: service.forget(job_id))


@get("/jobs/{job_id:str}/events", scope="read")
async def events(state: State, job_id: FromPath[str]) -> ServerSentEvent:
    """The job and its progress, as server-sent events, until it has ended."""
    service: Service = state.service
    await asyncio.to_thread(service.call, lambda: service.job(job_id))
    return ServerSentEvent(_events(service, job_id))


@put("/files/{sha256:str}", scope="submit", request_max_body_size=None)
async def upload(state: State, sha256: FromPath[str], request: Request[Any, Any, Any]) -> None:
    """Keep a file under its sha256."""
    await _receive_file(state.service, sha256, request)


@get("/files/{sha256:str}", scope="read", sync_to_thread=True)
def download(state: State, sha256: FromPath[str]) -> File:
    """A file of a job."""
    service: Service = state.service
    if not service.files.has(sha256):
        raise Unknown(f"there is no file {sha256}")
    return File(service.files.path(sha256), filename=sha256)


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
    nodes, drain, resume, jobs, submit, job, history, cancel, forget, events, upload, download, tokens, new_token, revoke_token,
]  # fmt: skip
"""All that can be asked. Each says what scope that takes."""


def _problem(status: int, code: str, text: str, **headers: str) -> Response[Problem]:
    """Return the answer to a request that failed (RFC 9457)."""
    problem = Problem(title=HTTPStatus(status).phrase, status=status, detail=text, code=code)
    return Response(problem, status_code=status, media_type=PROBLEM, headers=HEADERS | headers)


def _explain(_: Request[Any, Any, Any], error: EdgeAgentError) -> Response[Problem]:
    status = STATUSES.get(type(error), 409)
    return _problem(status, error.code, str(error), **({"WWW-Authenticate": "Bearer"} if status == 401 else {}))


def _explain_disk(_: Request[Any, Any, Any], error: OSError | sqlite3.Error) -> Response[Problem]:
    log.error("storage_error error=%r", error)
    return _problem(503, "state", f"the coordinator cannot use its disk: {error}; look whether it is full, and try again")


def _explain_delay(_: Request[Any, Any, Any], error: concurrent.futures.TimeoutError) -> Response[Problem]:
    return _problem(503, "state", "the coordinator did not get to it in a minute; look at its log, and try again")


def _explain_form(_: Request[Any, Any, Any], error: Exception) -> Response[Problem]:
    return _problem(400, "job_schema", f"the request cannot be read: {error}")


def _explain_http(_: Request[Any, Any, Any], error: HTTPException) -> Response[Problem]:
    texts = [error.detail]
    if isinstance(error, ValidationException):
        texts = [": ".join(str(e[k]) for k in ("key", "message") if e.get(k)) for e in error.extra or [] if isinstance(e, dict)] or texts
    code = "job_schema" if error.status_code == 400 else "refused"
    return _problem(error.status_code, code, "; ".join(texts), **(error.headers or {}))


def _explain_defect(_: Request[Any, Any, Any], error: Exception) -> Response[Problem]:
    log.error("request_failed", exc_info=error)
    return _problem(500, EdgeAgentError.code, "a defect of the coordinator; its log has the traceback")


async def _receive_file(service: Service, sha256: str, request: Request[Any, Any, Any]) -> None:
    """Keep an uploaded file under its sha256. Raises Refused where it is too long or another one."""
    part = service.files.incoming / f"upload-{os.getpid()}-{id(request)}"
    service.files.path(sha256)
    try:
        size = 0
        with part.open("wb") as file:
            async for chunk in request.stream():
                size += len(chunk)
                if size > MAX_FILE_BYTES:
                    raise Refused(f"the file is over the limit of {human_bytes(MAX_FILE_BYTES)}")
                file.write(chunk)
        if not await asyncio.to_thread(service.files.take, part, sha256):
            raise Refused(f"the uploaded file does not have the sha256 {sha256}; upload it again")
    finally:
        part.unlink(missing_ok=True)


async def _events(service: Service, job: str) -> AsyncIterator[ServerSentEventMessage]:
    """Yield `job` with the job's view at the start and after each change, `progress` as it comes; ends with the job."""
    loop, heard = asyncio.get_running_loop(), asyncio.Queue[JobProgress | None]()

    def listener(progress: JobProgress | None) -> None:
        loop.call_soon_threadsafe(heard.put_nowait, progress)

    await asyncio.to_thread(service.call, lambda: service.listen(job, listener))
    heard.put_nowait(None)
    try:
        while True:
            try:
                progress = await asyncio.wait_for(heard.get(), PING_S)
            except asyncio.TimeoutError:
                yield ServerSentEventMessage(comment="still here")
                continue
            if progress is not None:
                yield ServerSentEventMessage(event="progress", data=msgspec.json.encode(progress).decode())
                continue
            view = await asyncio.to_thread(service.call, lambda: service.job(job))
            yield ServerSentEventMessage(event="job", data=msgspec.json.encode(view).decode())
            if view.phase == "ended":
                return
    finally:
        service.call_later(lambda: service.stop_listening(job, listener))


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
        uvicorn.Server(settings_of(make_app(service, local))).run(sockets=[listening])
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
    settings = settings_of(make_app(service, service.access.caller), limit_concurrency=MOST_CONNECTIONS)
    with served(settings, context, api.host, api.port, "api"):
        yield
