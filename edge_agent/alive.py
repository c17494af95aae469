"""Whether an agent lives, for whoever is no systemd, such as the runtime of containers: while it would feed a watchdog (watchdog.py), it
leaves a sign in the state directory, and who asks looks whether that is fresh.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edge_agent.config import AGENT_CONFIG, AgentConfig, read_config
from edge_agent.errors import EdgeAgentError, NotAlive

SIGN = "alive"
"""In the state directory: process, seconds of the machine's clock that never jumps, and whether there was a connection. 24 bytes."""
EVERY_S = 10.0
STALE_S = 120.0
"""Older than this, something holds the loop up: one event, such as taking the fingerprint of a model, takes seconds."""


@dataclass(frozen=True)
class Sign:
    """What a loop has left."""

    process: int
    age_s: float
    connected: bool


class Signs:
    """Leaves them, at most one in `EVERY_S`; they are never flushed to disk: who looks is on the same machine."""

    def __init__(self, directory: Path) -> None:
        self._path, self._next_s = directory / SIGN, 0.0

    def leave(self, connected: bool) -> None:
        """To be called whenever the loop turns and all is well. What cannot be written is no sign."""
        if (now := time.monotonic()) < self._next_s:
            return
        self._next_s = now + EVERY_S
        with suppress(OSError):
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.pwrite(file, f"{os.getpid():10d} {now:10.0f} {connected:d}\n".encode(), 0)  # of one length: nobody reads half of two
            finally:
                os.close(file)

    def take_away(self) -> None:
        """The loop has ended in order."""
        with suppress(OSError):
            self._path.unlink()


def look(directory: Path) -> Sign:
    """Return the sign of the agent that works in a state directory. Raises NotAlive."""
    try:
        process, at_s, connected = map(int, (directory / SIGN).read_bytes().split())
    except FileNotFoundError:
        raise NotAlive(directory, "no agent works in it") from None
    except (OSError, ValueError) as error:
        raise NotAlive(directory, f"its sign of life cannot be read: {error}") from None
    sign = Sign(process, time.monotonic() - at_s, bool(connected))
    if not Path(f"/proc/{process}").exists():
        raise NotAlive(directory, f"its agent, process {process}, has died")
    if not -EVERY_S <= sign.age_s <= STALE_S:  # the machine may have started anew since
        raise NotAlive(directory, f"the loop of its agent, process {process}, last turned {sign.age_s:.0f} s ago")
    return sign


def main(arguments: Sequence[str]) -> int:
    """Run `edge-agent health node` and return its exit code. Asked every minute, it takes a tenth of a second."""
    parser = argparse.ArgumentParser(prog="edge-agent health node", add_help=False)
    parser.add_argument("--config", type=Path, default=AGENT_CONFIG)
    try:
        sign = look(read_config(parser.parse_args(arguments).config, AgentConfig).state_directory)
    except EdgeAgentError as error:
        sys.stderr.write(f"error {error.code}: {error}\n")
        return error.exit_code
    link = "connected" if sign.connected else "no connection to the broker"
    sys.stdout.write(f"process {sign.process} lives: its loop turned {max(sign.age_s, 0):.0f} s ago; {link}\n")
    return 0
