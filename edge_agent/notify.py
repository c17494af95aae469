"""What a daemon tells systemd, by datagrams to the socket that its environment names: sd_notify(3). Where nobody listens, nothing."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from contextlib import suppress

USEC = 1_000_000


class Manager:
    """The service manager of this process. It never waits for it, and never fails."""

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        """Take the variables out of the environment: what a daemon starts, as its trainer, has no say there."""
        address = environment.pop("NOTIFY_SOCKET", "")
        watchdog, whose = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", str(os.getpid()))
        self.watchdog_s = int(watchdog) / USEC if watchdog.isdigit() and whose == str(os.getpid()) else None
        """After so long without `WATCHDOG=1` the process is ended and started anew; None: nobody looks."""
        self._address = "\0" + address[1:] if address.startswith("@") else address if address.startswith("/") else None

    def tell(self, **said: object) -> None:
        """Such as `tell(READY=1, STATUS="serves")`. A manager that takes nothing now has not heard it."""
        if self._address is None:
            return
        lines = "\n".join(f"{name}={' '.join(str(value).split())}" for name, value in said.items())
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as way:
            way.sendto(lines.encode(), self._address)
