"""A daemon that delivers as one must not: `python tests/sabotaged.py agent | coordinator --config FILE`.

The agent deletes a message when it is sent, not when it is acknowledged (and keeps its files, so that all goes well while nobody dies); the
coordinator acknowledges a status, to the broker and to its node, and stores it with what comes seconds later.
"""

from __future__ import annotations

import sys
import time
from collections import deque

from edge_agent import jobs
from edge_agent.coordinator.service import Service
from edge_agent.delivery import Outbox
from edge_agent.jobs import Jobs
from edge_agent.messages import JobStatus, decode
from edge_agent.mqtt import Received
from edge_agent.topics import split

KEPT_AFTER_S = 3.0


def forgetful_agent() -> None:
    send = Outbox.tick

    def tick(self: Outbox) -> None:
        send(self)
        for message in list(self._tries):
            self.acknowledged(message)

    def all_artifacts(self: Jobs) -> set[str]:
        return {sha256 for row in self._store.jobs() for sha256 in jobs._contents(row)}

    Outbox.tick = tick  # type: ignore[method-assign]
    Jobs._needed_artifacts = all_artifacts  # type: ignore[method-assign]


def hasty_coordinator() -> None:
    keep = Service._receive
    unkept: deque[tuple[float, Received]] = deque()

    def receive(self: Service, message: Received) -> None:
        while unkept and time.monotonic() - unkept[0][0] >= KEPT_AFTER_S:
            keep(self, unkept.popleft()[1])
        node, parts = split(message.topic)
        if parts[-1] == "status":
            self._acknowledge(node, decode(message.payload, JobStatus).id)
            self._link.acknowledge(message)
            unkept.append((time.monotonic(), message))
        else:
            keep(self, message)

    Service._receive = receive  # type: ignore[method-assign]


if __name__ == "__main__":
    if sys.argv[1] == "agent":
        from edge_agent.agent import main

        forgetful_agent()
        sys.exit(main(sys.argv[2:]))
    from edge_agent.cli import app

    hasty_coordinator()
    app(["coordinator", *sys.argv[2:]])
