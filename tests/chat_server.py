"""A server on loopback that speaks the chat completions protocol, well or badly, and the endpoint that a node configures for it."""

from __future__ import annotations

import hashlib
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

from edge_agent.config import Endpoint

HANG_S = 240
KEY = "sk-test-0123456789"
ANSWERED = {"prompt_tokens": 100, "completion_tokens": 20}
COST = (100 * 1.0 + 20 * 10.0) / 1e6
"""Of an answer, at the prices of `endpoint`."""


def said(text: str | None, usage: dict[str, int] | None = ANSWERED) -> tuple[int, dict[str, str], bytes]:
    """A chat completion that says a text."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    body = {"id": "1", "object": "chat.completion", "choices": [choice]} | ({"usage": usage} if usage else {})
    return 200, {}, json.dumps(body).encode()


class Server:
    """Answers as told by `script`, one entry a request, then with a judgment that depends on the request alone."""

    def __init__(self) -> None:
        self.script: list[Any] = []
        self.requests: list[tuple[str | None, dict[str, Any]]] = []
        self.times: list[float] = []
        self.free = Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.headers["Authorization"], body))
                outer.times.append(time.monotonic())
                reply = outer.script.pop(0) if outer.script else said("Wrong: " + digest(body))
                if reply == "hang":
                    outer.free.wait(HANG_S)
                    self.close_connection = True
                    return
                status, headers, content = reply
                self.send_response(status)
                for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._http.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._thread = Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.free.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(HANG_S)


def digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(body["messages"][-1]["content"].encode()).hexdigest()[:12]


def endpoint(server: Server, key_file: Path | None, **more: Any) -> Endpoint:
    given = {"input_price": 1.0, "output_price": 10.0, "spending_cap": 1.0, "timeout_s": 20.0, "max_tokens": 50, "parallel": 1} | more
    return Endpoint(url=server.url, model="judge-1", key_file=key_file, **given)
