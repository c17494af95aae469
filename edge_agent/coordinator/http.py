"""The coordinator's HTTP API: one definition, on a Unix socket that only its owner can open, and on a port for whoever has a token.

The command line is its client.
"""

from __future__ import annotations

import concurrent.futures
import logging
import math
import os
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import msgspec
from litestar import Litestar, Request, Response
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.exceptions import HTTPException, ValidationException
from litestar.handlers import BaseRouteHandler
from litestar.params import QueryParameter
from litestar.types import Message

from edge_agent.config import Api
from edge_agent.coordinator.access import ANYONE, Caller, allow
from edge_agent.coordinator.client import PROBLEM, SOCKET, VERSION, Problem
from edge_agent.coordinator.door import Door
from edge_agent.coordinator.limits import Limits, network
from edge_agent.coordinator.listening import MOST_CONNECTIONS, Certificate, Server, served, settings_of
from edge_agent.coordinator.pages import PAGES
from edge_agent.coordinator.routes import DatasetWrong, routes
from edge_agent.coordinator.service import Service
from edge_agent.coordinator.views import Audited, Scope
from edge_agent.dataset_check import Check
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
    StateDamaged,
    StateUnusable,
    TooManyRequests,
    Unauthorized,
    Unknown,
)
from edge_agent.hints import explain

log = logging.getLogger(__name__)
LONGEST_SOCKET_PATH = 107
"""Of the kernel, in bytes."""
MAX_BODY_BYTES = 1024 * 1024
"""Of a request that brings no file."""
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
        raise ValidationException(explain(error, body.annotation)) from None


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
    """The log names the file; where it lies is nothing to who asks. What SQLite says names none."""
    log.error("storage_error error=%r", f"{type(error).__name__}: {error}")
    if isinstance(error, DiskFull):
        why = "no space is left"
    else:
        why = str(error) if isinstance(error, sqlite3.Error) else error.strerror or type(error).__name__
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
