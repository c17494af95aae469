"""Records jobs where they are not recorded yet, once or for as long as jobs end. Keeps nothing itself: each place is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import msgspec

from edge_agent.coordinator.client import Answered, Client
from edge_agent.coordinator.views import JobView
from edge_agent.errors import CoordinatorUnreachable, DatabaseAway, EdgeAgentError, StateUnusable, TooManyRequests, TrackerAway
from edge_agent.job_directory import JobDirectory
from edge_agent.tracking.recording import Recording, Tracker, id_of_directory, recording_of_directory, recording_of_job

PASSING = frozenset(kind.code for kind in (CoordinatorUnreachable, DatabaseAway, StateUnusable, TooManyRequests, TrackerAway))
"""Codes of errors that may be gone when the same is tried again."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


class Recorded(msgspec.Struct, frozen=True):
    """Where a job is recorded now."""

    job: str
    recorded: list[str]
    """Trackers that did not have it."""
    present: list[str]
    """Those that did."""


def record_directory(directory: JobDirectory, trackers: Sequence[Tracker]) -> Recorded:
    """Record a local job that has ended. Raises JobSchema, and what trackers raise."""
    return _record(id_of_directory(directory), lambda: recording_of_directory(directory), trackers)


def record_job(client: Client, view: JobView, trackers: Sequence[Tracker]) -> Recorded:
    """Record a job of a coordinator. Raises Answered where it has not ended, and what clients and trackers raise."""
    if view.phase != "ended":
        raise Answered("refused", f"job {view.id} has not ended ({view.phase}); `edge-agent watch {view.id}` waits for it")
    return _record(view.id, lambda: recording_of_job(view, client.result(view)), trackers)


def _record(job: str, recording: Callable[[], Recording], trackers: Sequence[Tracker]) -> Recorded:
    made: Recording | None = None
    recorded, present = [], []
    for tracker in trackers:  # one after the other, so that one that is away keeps no job from those before it
        if tracker.has(job):
            present.append(tracker.name)
            continue
        made = made or recording()
        tracker.record(made)
        recorded.append(tracker.name)
    return Recorded(job, recorded, present)


def record_all(
    client: Client,
    views: Iterable[JobView],
    trackers: Sequence[Tracker],
    tell: Callable[[Recorded], None],
    warn: Callable[[str, EdgeAgentError], None],
    wait: bool,
) -> None:
    """Record jobs as they come. One whose report is gone or unreadable is left out with a warning.

    Where a server is away the error is raised, or with `wait` the same job is tried until it is back.
    """
    done: set[str] = set()
    for view in views:
        pause_s = FIRST_PAUSE_S
        while view.id not in done:
            try:
                tell(record_job(client, view, trackers))
            except EdgeAgentError as error:
                passing = error.code in PASSING
                if (passing and not wait) or not (passing or isinstance(error, Answered)):
                    raise
                warn(f"job {view.id}", error)
                if passing:
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                    continue
            done.add(view.id)
