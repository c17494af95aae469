"""The routes of a hub that its client asks for, on loopback: what is in a revision, and files, those of weights on another path."""

from __future__ import annotations

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "5" * 40


class HubServer:
    """Has one model, `OWNER/NAME`, with the files of a directory and what a test adds; `main` and `v1` are its one commit."""

    def __init__(self, model: str, directory: Path) -> None:
        self.model = model
        self.files = {file.name: file.read_bytes() for file in directory.iterdir()}
        self.cut_off_after: int | None = None
        """Bytes of the weights after which the connection ends, once."""
        self.requests: list[tuple[str, str, str]] = []
        """Method, path and Range of each."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                outer._answer(self)

            def do_GET(self) -> None:
                outer._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def asked_for(self, name: str) -> list[str]:
        """Return the ranges of all requests for the contents of a file."""
        return [place for method, path, place in self.requests if method == "GET" and path.endswith(f"/{name}")]

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        self.requests.append((handler.command, path, handler.headers.get("Range", "")))
        revision = re.fullmatch(f"/api/models/{self.model}/revision/(.+)|/api/models/{self.model}", path)
        file = re.fullmatch(f"/(?:{self.model}/resolve/(?:main|{COMMIT})|weights)/([^/]+)", path)
        if revision and revision[1] in (None, "main", "v1", COMMIT):
            self._send(handler, 200, {"Content-Type": "application/json"}, json.dumps(self._info()).encode())
        elif file and file[1] in self.files:
            self._send_file(handler, file[1], redirects=not path.startswith("/weights"))
        else:
            code = "RevisionNotFound" if revision else "RepoNotFound"
            self._send(handler, 404, {"X-Error-Code": code, "X-Error-Message": "there is none"}, b"")

    def _info(self) -> dict[str, object]:
        siblings = [
            {"rfilename": name, "size": len(data), "blobId": "0" * 40} | ({"lfs": self._lfs(data)} if _is_large(name) else {})
            for name, data in self.files.items()
        ]  # fmt: skip
        return {"id": self.model, "sha": COMMIT, "siblings": siblings}

    def _lfs(self, data: bytes) -> dict[str, object]:
        return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 100}

    def _send_file(self, handler: BaseHTTPRequestHandler, name: str, redirects: bool) -> None:
        data = self.files[name]
        sha256 = hashlib.sha256(data).hexdigest()
        about = {"ETag": f'"{sha256}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if redirects and _is_large(name):
            linked = {"Location": f"{self.url}/weights/{name}", "X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
            self._send(handler, 302, about | linked, b"")
            return
        start = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        place = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if "Range" in handler.headers else {}
        cut_off = None
        if handler.command == "GET" and _is_large(name):
            cut_off, self.cut_off_after = self.cut_off_after, None
        self._send(handler, 206 if place else 200, about | place, data[start:], cut_off)

    def _send(
        self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes, cut_off: int | None = None
    ) -> None:  # fmt: skip
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body[:cut_off])
        handler.close_connection = cut_off is not None

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(30)


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))
