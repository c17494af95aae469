"""Serves one document to the browser of this machine: on loopback only, under a path that nobody can guess."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOST = "127.0.0.1"
IDLE_S = 30.0
"""A connection may say nothing for as long."""


class Loopback(ThreadingHTTPServer):
    """`url` leads to what `render` returns, a document and its content security policy, made anew for each request."""

    daemon_threads = True

    def __init__(self, render: Callable[[], tuple[bytes, str]]) -> None:
        self.render = render
        self.path = f"/{secrets.token_urlsafe(32)}/"
        super().__init__((HOST, 0), _Handler)
        self.host = f"{HOST}:{self.server_port}"
        self.url = f"http://{self.host}{self.path}"


class _Handler(BaseHTTPRequestHandler):
    server: Loopback
    timeout = IDLE_S

    def do_GET(self) -> None:
        # Another name for this address, as a page of elsewhere could have it resolved, is no way in.
        known = self.headers.get("Host") == self.server.host
        if not known or not secrets.compare_digest(self.path.encode(), self.server.path.encode()):
            self._answer(HTTPStatus.NOT_FOUND, b"There is nothing here.\n", "text/plain; charset=utf-8", "default-src 'none'")
            return
        body, policy = self.server.render()
        self._answer(HTTPStatus.OK, body, "text/html; charset=utf-8", policy)

    def _answer(self, status: HTTPStatus, body: bytes, kind: str, policy: str) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store"),
            ("Content-Security-Policy", f"{policy}; frame-ancestors 'none'"), ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"), ("Cross-Origin-Opener-Policy", "same-origin"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
        ):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "edge-agent"

    def log_message(self, *_: object) -> None:
        """Keep the path off the terminal."""
