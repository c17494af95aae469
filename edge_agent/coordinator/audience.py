"""Who looks at a job: their ears, and the nodes' leave to tell progress faster while somebody does."""

from __future__ import annotations

from collections.abc import Callable

from edge_agent.messages import JobProgress, Watch

WATCH_TTL_S = 10.0

Listener = Callable[[JobProgress | None], None]
"""Hears the progress of a job; None: the job has changed."""


class Audience:
    """Listeners by job. `ask` sends a node the request to tell a job's progress faster."""

    def __init__(self, ask: Callable[[str, Watch], None]) -> None:
        self._ask = ask
        self._listeners: dict[str, list[Listener]] = {}
        self._due: dict[str, float] = {}
        self._last: dict[str, JobProgress] = {}

    def join(self, job: str, listener: Listener) -> None:
        self._listeners.setdefault(job, []).append(listener)
        self._due.setdefault(job, 0.0)
        if job in self._last:
            listener(self._last[job])

    def leave(self, job: str, listener: Listener) -> None:
        listeners = self._listeners.get(job, [])
        if listener in listeners:
            listeners.remove(listener)
        if not listeners:
            self._listeners.pop(job, None)
            self._due.pop(job, None)

    def progress(self, job: str, progress: JobProgress) -> None:
        self._last[job] = progress
        for listener in self._listeners.get(job, []):
            listener(progress)

    def changed(self, job: str, ended: bool) -> None:
        for listener in self._listeners.get(job, []):
            listener(None)
        if ended:
            self._last.pop(job, None)
            self._due.pop(job, None)

    def tick(self, now: float) -> None:
        for job, due in self._due.items():
            if now >= due:
                self._due[job] = now + WATCH_TTL_S / 2
                self._ask(job, Watch(WATCH_TTL_S))
