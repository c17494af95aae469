"""A daemon that is struck once, at one change of a job's state: `python tests/dying.py agent killed STATE MARK --config FILE`.

The state is a phase, an outcome other than `succeeded` for `ended`, or what is asked of a job: `options` and `canceling`.
`killed`: by SIGKILL, right after the state is on disk; `error`: its disk fails once instead of storing it. A mark in a file says
that it has happened. In `paused` there is the word of the trainer that it waits for memory, which the test cannot make scarce.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.coordinator.store import CoordinatorStore
from edge_agent.jobs import Jobs
from edge_agent.runner import TrainerEvent
from edge_agent.store import Store

AGENT: dict[str, Callable[..., str]] = {
    "accept": lambda *_: "accepted",
    "move": lambda job, phase, **_: phase,
    "end": lambda job, result: "ended" if result.outcome == "succeeded" else result.outcome,
    "close_job": lambda job, status: status.outcome,
    "set_options": lambda *_: "options",
}
COORDINATOR: dict[str, Callable[..., str]] = {
    "add_job": lambda *_: "created",
    "offered": lambda *_: "offered",
    "apply_status": lambda view, message: message.data.phase,
    "apply_result": lambda *_: "finalizing",
    "end": lambda *_: "ended",
    "ask_cancel": lambda *_: "canceling",
}
"""The methods that store a state, and which one it is by their arguments."""


def strike(store: type, methods: dict[str, Callable[..., str]], how: str, state: str, mark: Path) -> None:
    """Have the methods of a store do what this module says."""
    for name, reached in methods.items():
        setattr(store, name, _struck(getattr(store, name), reached, how, state, mark))


def _struck(keep: Callable[..., Any], reached: Callable[..., str], how: str, state: str, mark: Path) -> Callable[..., Any]:
    def struck(self: Any, *arguments: Any, **options: Any) -> Any:
        due = reached(*arguments, **options) == state and not mark.exists()
        if due and how == "error":
            mark.touch()
            raise sqlite3.OperationalError("disk I/O error")
        found = keep(self, *arguments, **options)
        if due:
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return struck


def pause_once(jobs: type[Jobs]) -> None:
    """After its first step the trainer is heard to wait."""
    hear = jobs.hear

    def heard(self: Jobs, told: TrainerEvent) -> None:
        hear(self, told)
        if told.event.event == "progress":
            hear(self, TrainerEvent(told.job, msgspec.structs.replace(told.event, event="paused")))

    jobs.hear = heard  # type: ignore[method-assign]


def main() -> None:
    daemon, how, state, mark, *rest = sys.argv[1:]
    if daemon == "agent":
        from edge_agent.agent import main as run

        strike(Store, AGENT, how, state, Path(mark))
        if state == "paused":
            pause_once(Jobs)
        sys.exit(run(rest))
    from edge_agent.cli import app

    strike(CoordinatorStore, COORDINATOR, how, state, Path(mark))
    app(["coordinator", *rest])


if __name__ == "__main__":
    main()
