"""Plans of jobs that have not been sent: asked of their nodes, which alone know their models and devices."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from edge_agent.coordinator.store import CoordinatorStore
from edge_agent.coordinator.views import DatasetView
from edge_agent.errors import Refused, Unknown
from edge_agent.job import Job
from edge_agent.messages import PLAN_S, PlanAnswer, PlanRequest, Texts, new_id

MOST_OF_NODE = 4
"""Plans that one node is asked for at once: each takes time of the thread that does everything there."""


@dataclass(frozen=True)
class Asked:
    """A plan that somebody waits for."""

    node: str
    answer: Future[PlanAnswer]
    until: float


class Plans:
    """Those of one coordinator. `send` publishes a message to a node."""

    def __init__(self, store: CoordinatorStore, send: Callable[..., bool]) -> None:
        self._store, self._send = store, send
        self._asked: dict[str, Asked] = {}

    def ask(self, node: str, job: Job) -> Future[PlanAnswer]:
        """Ask a node what a job would take; the answer may stay away. Raises Refused where it cannot be asked, Unknown."""
        view = self._store.node(node)
        if view is None or not view.present:
            raise Refused(f"node {node!r} is not there to be asked; a job for it waits until it is")
        texts = self._texts(job)
        request, now, answer = new_id(), time.monotonic(), Future[PlanAnswer]()
        self._asked = {other: asked for other, asked in self._asked.items() if now < asked.until}
        if sum(asked.node == node for asked in self._asked.values()) >= MOST_OF_NODE:
            raise Refused(f"node {node!r} is asked for {MOST_OF_NODE} plans already; ask again when it has answered")
        answer.set_running_or_notify_cancel()  # who waits no more cannot make it one that takes no answer
        if not self._send(node, PlanRequest(job, texts), "plan", request, "request", qos=0, life_s=PLAN_S):
            raise Refused(f"node {node!r} cannot be asked now, or the job document is too long for a message")
        self._asked[request] = Asked(node, answer, now + PLAN_S)
        return answer

    def answered(self, node: str, request: str, answer: PlanAnswer) -> None:
        """Hand over what a node says, where it was asked."""
        asked = self._asked.get(request)
        if asked is not None and asked.node == node:
            del self._asked[request]
            asked.answer.set_result(answer)

    def _texts(self, job: Job) -> Texts:
        """Return the longest texts of a job's files; those of questions to measure on are only read."""
        found = self._dataset(job.dataset.sha256).found
        given = (found.characters.answer, found.characters.output, found.characters.judgment)
        longest = [0 if spread is None else spread.max for spread in given]
        questions = [found.characters.question]
        if job.dataset.evaluation_sha256 is not None:
            questions.append(self._dataset(job.dataset.evaluation_sha256).found.characters.question)
        return Texts(max(1, found.records), max(spread.max for spread in questions if spread), *longest)

    def _dataset(self, sha256: str) -> DatasetView:
        view = self._store.dataset(sha256)
        if view is None:
            raise Unknown(f"there is no dataset {sha256}; upload it first")
        return view
