"""A daemon that delivers as one must not: `python tests/sabotaged.py agent | coordinator --config FILE`.

The agent deletes a message when it is sent, not when it is acknowledged (and keeps its files, so that all goes well while nobody dies); the
coordinator acknowledges a result before it has stored the end of the job.
"""

from __future__ import annotations

import sys
import time

from edge_agent import jobs
from edge_agent.coordinator.service import Service
from edge_agent.coordinator.store import JobView
from edge_agent.delivery import Outbox
from edge_agent.jobs import Jobs
from edge_agent.messages import Ack


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
    keep = Service._collected

    def collected(self: Service, view: JobView, message: str) -> None:
        self._send(view.node, Ack(), "ack", message)
        time.sleep(1.0)
        keep(self, view, message)

    Service._collected = collected  # type: ignore[method-assign]


if __name__ == "__main__":
    if sys.argv[1] == "agent":
        from edge_agent.agent import main

        forgetful_agent()
        sys.exit(main(sys.argv[2:]))
    from edge_agent.cli import app

    hasty_coordinator()
    app(["coordinator", *sys.argv[2:]])
