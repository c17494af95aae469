"""The web pages: two documents and what they load, the same for everybody. What they show comes from the API, with the reader's token."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Annotated, Any

from litestar import Request, Response, get
from litestar.params import PathParameter

from edge_agent import web
from edge_agent.coordinator.access import ANYONE
from edge_agent.errors import Unknown

WEB = Path(web.__file__).parent
KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
"""Of the files that a page may load."""
PAGE_HEADERS = {
    "Cache-Control": "no-cache",  # kept, and asked for again with its ETag: after an update nobody has half of an old page
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""What a page may do: run the coordinator's own scripts, ask the coordinator, and nothing else."""


@get("/", scope=ANYONE, sync_to_thread=False)
def page(request: Request[Any, Any, Any]) -> Response[bytes]:
    """The page."""
    return _answer("pages.html", "text/html", request)


@get("/saliency", scope=ANYONE, sync_to_thread=False)
def saliency_page(request: Request[Any, Any, Any]) -> Response[bytes]:
    """The page of a job's Saliency Map."""
    return _answer("saliency.html", "text/html", request)


@get("/web/{name:str}", scope=ANYONE, sync_to_thread=False)
def page_file(
    name: Annotated[str, PathParameter(pattern=r"^[a-z_]{1,40}\.[a-z]{1,8}$")], request: Request[Any, Any, Any]
) -> Response[bytes]:
    """What it loads."""
    kind = KINDS.get(Path(name).suffix)
    if kind is None or not (WEB / name).is_file():
        raise Unknown(f"there is no {name} here")
    return _answer(name, kind, request)


PAGES = [page, saliency_page, page_file]


def _answer(name: str, kind: str, request: Request[Any, Any, Any]) -> Response[bytes]:
    body, tag = _read(name)
    headers = PAGE_HEADERS | {"ETag": tag}
    if request.headers.get("If-None-Match") == tag:
        return Response(b"", status_code=304, headers=headers, media_type=kind)
    return Response(body, headers=headers, media_type=kind)


@functools.cache
def _read(name: str) -> tuple[bytes, str]:
    body = (WEB / name).read_bytes()
    return body, f'"{hashlib.sha256(body).hexdigest()[:32]}"'
