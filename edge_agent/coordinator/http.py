"""The coordinator's HTTP API, on a Unix socket that only its owner can open. The command line is its client."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import uvicorn
from litestar import Litestar, Request, Response, get, post, put
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.params import Parameter
from litestar.response import File, ServerSentEvent
from litestar.response.sse import ServerSentEventMessage
from msgspec import Meta

from edge_agent.coordinator.client import SOCKET
from edge_agent.coordinator.service import Service
from edge_agent.coordinator.store import HistoryRow, JobView, NodeView
from edge_agent.errors import EdgeAgentError, Refused, StateUnusable, human_bytes
from edge_agent.job import Job, Strict
from edge_agent.json_items import MAX_FILE_BYTES
from edge_agent.messages import LONGEST_ORDER_S, ORDER_S, JobProgress

log = logging.getLogger(__name__)

LONGEST_SOCKET_PATH = 107
"""Of the kernel, in bytes."""
PING_S = 5.0


class Submission(Strict, frozen=True):
    """A job for a node. Its files have been uploaded before."""

    node: str
    job: Job
    priority: Annotated[int, Meta(ge=0, le=9)] = 4
    expires_s: Annotated[float, Meta(gt=0, le=LONGEST_ORDER_S)] = ORDER_S
    """Until the node has answered; its order is worth nothing then."""


def make_app(service: Service) -> Litestar:
    """Return the application over a running service."""
    return Litestar(
        [nodes, drain, resume, jobs, submit, job, history, cancel, forget, events, upload, download],
        state=State({"service": service}),
        exception_handlers={EdgeAgentError: _explain, HTTPException: _explain_http, sqlite3.Error: _explain_disk, OSError: _explain_disk},
        logging_config=None,
        openapi_config=None,
    )


@get("/nodes", sync_to_thread=True)
def nodes(state: State) -> list[NodeView]:
    """All nodes that have ever been seen."""
    service: Service = state.service
    return service.call(service.nodes)


@post("/nodes/{node_id:str}/drain", sync_to_thread=True)
def drain(state: State, node_id: str) -> NodeView:
    """Have a node take no new jobs."""
    service: Service = state.service
    return service.call(lambda: service.drain(node_id, True))


@post("/nodes/{node_id:str}/resume", sync_to_thread=True)
def resume(state: State, node_id: str) -> NodeView:
    """Have a node take jobs again."""
    service: Service = state.service
    return service.call(lambda: service.drain(node_id, False))


@get("/jobs", sync_to_thread=True)
def jobs(state: State, limit: Annotated[int, Parameter(ge=1, le=10_000)] = 100) -> list[JobView]:
    """The newest jobs first."""
    service: Service = state.service
    return service.call(lambda: service.jobs(limit))


@post("/jobs", sync_to_thread=True)
def submit(state: State, data: Submission) -> JobView:
    """Keep a job; it is offered to its node until that answers."""
    service: Service = state.service
    return service.call(lambda: service.submit(data.node, data.job, data.priority, data.expires_s))


@get("/jobs/{job_id:str}", sync_to_thread=True)
def job(state: State, job_id: str) -> JobView:
    """One job."""
    service: Service = state.service
    return service.call(lambda: service.job(job_id))


@get("/jobs/{job_id:str}/history", sync_to_thread=True)
def history(state: State, job_id: str) -> list[HistoryRow]:
    """What the node has said of a job, the oldest first."""
    service: Service = state.service
    return service.call(lambda: service.history(job_id))


@post("/jobs/{job_id:str}/cancel", sync_to_thread=True)
def cancel(state: State, job_id: str) -> JobView:
    """Ask for the end of a job."""
    service: Service = state.service
    return service.call(lambda: service.cancel(job_id))


@post("/jobs/{job_id:str}/forget", sync_to_thread=True)
def forget(state: State, job_id: str) -> JobView:
    """Ask for the deletion of an ended job."""
    service: Service = state.service
    return service.call(lambda: service.forget(job_id))


@get("/jobs/{job_id:str}/events")
async def events(state: State, job_id: str) -> ServerSentEvent:
    """The job and its progress, as server-sent events, until it has ended."""
    service: Service = state.service
    await asyncio.to_thread(service.call, lambda: service.job(job_id))
    return ServerSentEvent(_events(service, job_id))


@put("/files/{sha256:str}", request_max_body_size=None)
async def upload(state: State, sha256: str, request: Request[Any, Any, Any]) -> None:
    """Keep a file under its sha256."""
    await _receive_file(state.service, sha256, request)


@get("/files/{sha256:str}", sync_to_thread=True)
def download(state: State, sha256: str) -> File:
    """A file of a job."""
    service: Service = state.service
    if not service.files.has(sha256):
        raise Refused(f"there is no file {sha256}")
    return File(service.files.path(sha256), filename=sha256)


def _explain(_: Request[Any, Any, Any], error: EdgeAgentError) -> Response[Any]:
    return Response({"error": {"code": error.code, "text": str(error)}}, status_code=409)


def _explain_disk(_: Request[Any, Any, Any], error: OSError | sqlite3.Error) -> Response[Any]:
    log.error("storage_error error=%r", error)
    text = f"the coordinator cannot use its disk: {error}; look whether it is full, and try again"
    return Response({"error": {"code": "state", "text": text}}, status_code=503)


def _explain_http(_: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    text = "; ".join([error.detail, *(str(e) for e in error.extra or [])])
    return Response(
        {"error": {"code": "job_schema" if error.status_code == 400 else "refused", "text": text}}, status_code=error.status_code
    )


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
    """Serve the API until SIGTERM or SIGINT. Raises StateUnusable where the socket's path is too long for the kernel."""
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
        settings = uvicorn.Config(make_app(service), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
        uvicorn.Server(settings).run(sockets=[listening])
    path.unlink(missing_ok=True)
