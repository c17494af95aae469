"""A server of files on loopback with TLS and Range, which can do it badly in every way."""

from __future__ import annotations

import ssl
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

from edge_agent.enrolment import Authority


class TlsServer:
    """Serves `data` for every path; `fault` says how, and `faults` for how many requests, then it is good."""

    def __init__(self, directory: Path, data: bytes) -> None:
        self.data, self.fault, self.faults = data, "", 0
        self.requests: list[tuple[str, str, str | None]] = []
        """Path, Range and Authorization of each."""
        self.authority = Authority(directory / "authority")
        issued = self.authority.issue("broker", "127.0.0.1", directory)
        self._free = Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.requests.append((self.path, self.headers.get("Range", ""), self.headers.get("Authorization")))
                fault = outer.fault if outer.faults > 0 else ""
                outer.faults -= 1
                with suppress(OSError):
                    outer._answer(self, fault)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(issued.certificate_file, issued.key_file)
        self._http.socket = context.wrap_socket(self._http.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"https://127.0.0.1:{self._http.server_port}/files"
        self._thread = Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def contents(self, path: str) -> bytes | None:
        """Return what is at a path; None where nothing is."""
        return self.data

    def _answer(self, handler: BaseHTTPRequestHandler, fault: str) -> None:
        start, end = (int(part) for part in handler.headers["Range"].removeprefix("bytes=").split("-"))
        data = self.contents(handler.path)
        if data is None:
            fault, data = "404", b""
        body, size = data[start : end + 1], len(data)
        place, half = {"Content-Range": f"bytes {start}-{end}/{size}"}, len(body) // 2
        if fault == "silence":
            self._free.wait(30)
            return
        if fault == "no http":
            handler.wfile.write(bytes(100))
            handler.close_connection = True
            return
        status, headers, body, length = {
            "401": (401, {}, b"{}", 2), "404": (404, {}, b"{}", 2), "503": (503, {}, b"{}", 2),
            "redirect": (302, {"Location": f"{self.url}/elsewhere"}, b"", 0),
            "range ignored": (200, {}, data, size),
            "another range": (206, {"Content-Range": f"bytes {start + 1}-{end + 1}/{size}"}, body, len(body)),
            "another size": (206, {"Content-Range": f"bytes {start}-{end}/{size + 1}"}, body, len(body)),
            "wrong bytes": (206, place, bytes(byte ^ 1 for byte in body), len(body)),
            "more": (206, place, body + b"more", len(body) + 4),
            "cut off": (206, place, body[:half], len(body)),
            "less": (206, place, body[:half], half),
        }.get(fault, (206, place, body, len(body)))  # fmt: skip
        handler.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            handler.send_header(name, value)
        if fault == "dripping headers":
            handler.flush_headers()
            self._drip(handler, b"x" * 1000)
            return
        handler.end_headers()
        if fault == "dripping body":
            self._drip(handler, body)
            return
        handler.wfile.write(body)
        handler.close_connection = fault == "cut off"

    def _drip(self, handler: BaseHTTPRequestHandler, data: bytes) -> None:
        for byte in data:
            if self._free.is_set():
                break
            handler.wfile.write(bytes([byte]))
            time.sleep(0.1)
        handler.close_connection = True

    def close(self) -> None:
        self._free.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(30)
