"""A narrow way on loopback: carries TCP connections to a port, only so many bytes a second, and counts them."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

PIECE_BYTES = 16 * 1024


class Narrow:
    """Listens on `port` and carries to another; `rate_bytes` a second in each direction of each connection, None: as fast as it goes."""

    def __init__(self, to: int, rate_bytes: int | None) -> None:
        self.rate_bytes, self.to = rate_bytes, to
        self.up_bytes = self.down_bytes = 0
        """What has gone to the port, and what has come back from it."""
        self._ends: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.cut()

    def cut(self) -> None:
        """End all connections, and what is on its way in them: the kernel sends on what a killed process has written."""
        for end in list(self._ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + 10
        while self._ends and time.monotonic() < deadline:
            time.sleep(0.01)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.to), timeout=10)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                self._ends |= {near, far}
                for source, sink, name in ((near, far, "up_bytes"), (far, near, "down_bytes")):
                    threading.Thread(target=self._carry, args=(source, sink, name), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, name: str) -> None:
        """Until either end is gone: then both are."""
        with suppress(OSError):
            while piece := source.recv(PIECE_BYTES):
                sink.sendall(piece)
                setattr(self, name, getattr(self, name) + len(piece))
                if self.rate_bytes is not None:
                    time.sleep(len(piece) / self.rate_bytes)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()
        self._ends.discard(source)
