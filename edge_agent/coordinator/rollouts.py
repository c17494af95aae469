"""Rollouts on their way: makes their jobs when those are due, and ends them when nothing is left to do, or too much has failed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import msgspec

from edge_agent.coordinator.rollout import (
    Candidate,
    Choice,
    Counts,
    RolloutMade,
    RolloutPage,
    RolloutPlan,
    RolloutView,
    Selector,
    best,
    choose,
    due,
    pause_s,
    why_abort,
)
from edge_agent.coordinator.store import CoordinatorStore
from edge_agent.coordinator.views import KeptRollout, RolloutNodePage
from edge_agent.errors import Refused, Unknown
from edge_agent.job import Job
from edge_agent.messages import new_id

log = logging.getLogger(__name__)

LOOK_S = 0.5
"""Between two looks at the rollouts that run, where nothing has changed."""
MOST_REASONS = 5
"""Nodes of which an error says why they are not chosen."""


class Rollouts:
    """Those of one coordinator. `submit` makes a job of a plan for a node and a rollout, `cancel` asks for the end of one.

    What is due when is kept in memory: a coordinator that starts again goes on after one pause, and makes up for nothing.
    """

    def __init__(
        self,
        store: CoordinatorStore,
        submit: Callable[[str, RolloutPlan, str], object],
        cancel: Callable[[str], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._submit, self._cancel, self._clock = store, submit, cancel, clock
        self._last: dict[str, float] = {}
        """When the last job of each was due."""
        self._look = 0.0

    def files(self) -> set[str]:
        """Files that jobs which are still to be made bring, by their sha256."""
        return {sha256 for kept in self._store.running_rollouts() for sha256 in _plan(kept).files}

    def best(self, job: Job, selector: Selector) -> Candidate:
        """Return the best node for one job. Raises Refused where a selector finds none."""
        return _some(best(self._store.nodes(), job, selector, self._store.open_counts(), self._store.speeds(job.model))).chosen[0]

    def choose(self, plan: RolloutPlan) -> Choice:
        """Return the nodes that a rollout would have now, and why it would not have the others."""
        return choose(self._store.nodes(), plan.job, plan.selector)

    def add(self, plan: RolloutPlan, choice: Choice) -> RolloutMade:
        """Keep a rollout for the nodes that were chosen. Raises Refused where there is none, or one that was named is not among them."""
        if plan.selector.nodes and choice.others:
            raise Refused(f"not all of the nodes that are named can have the job: {_reasons(choice)}")
        rollout, nodes = new_id(), [candidate.node for candidate in _some(choice).chosen]
        self._store.add_rollout(rollout, msgspec.json.encode(plan), nodes, plan.files)
        self._last[rollout] = self._clock() - pause_s(plan.rate, 0)  # the first one is due
        self._look = 0.0
        log.info("rollout_created rollout=%s nodes=%d model=%s", rollout, len(nodes), plan.job.model)
        return RolloutMade(rollout=self.view(rollout), choice=choice)

    def view(self, rollout: str) -> RolloutView:
        """Return a rollout. Raises Unknown."""
        return self._view(self._kept(rollout))

    def page(self, state: str | None, after: str | None, limit: int) -> RolloutPage:
        """The newest first."""
        kept = self._store.rollouts(state, after, limit)
        return RolloutPage(items=[*map(self._view, kept[:limit])], next=str(kept[limit - 1].number) if len(kept) > limit else None)

    def nodes(self, rollout: str, after: str | None, limit: int) -> RolloutNodePage:
        """Raises Unknown."""
        return self._store.rollout_nodes(self._kept(rollout).id, after, limit)

    def cancel(self, rollout: str, force: bool) -> RolloutView:
        """End a rollout: no more jobs are made, and those that no trainer has begun are canceled, with `force` all. Raises Unknown."""
        kept = self._kept(rollout)
        if kept.state == "running":
            self._end(rollout, "canceled", "it was canceled", force=force)
        elif force:
            self._end(rollout, kept.state, kept.text, force=True)
        return self.view(rollout)

    def tick(self, now: float) -> None:
        """Make the jobs that are due."""
        if now < self._look:
            return
        self._look = now + LOOK_S
        for kept in self._store.running_rollouts():
            self._advance(kept.id, _plan(kept), now)

    def _advance(self, rollout: str, plan: RolloutPlan, now: float) -> None:
        counts = self._counts(rollout)
        if (why := why_abort(plan.abort, counts)) is not None:
            self._end(rollout, "aborted", why)
        elif counts.waiting + counts.open == 0:
            self._end(rollout, "completed", None)
        elif counts.waiting:
            none = counts.waiting == sum(msgspec.structs.astuple(counts))  # the first is due, whichever coordinator has been asked
            last = self._last.setdefault(rollout, now - pause_s(plan.rate, 0) if none else now)
            count, self._last[rollout] = due(plan.rate, counts.succeeded, last, now)
            for place, node in self._store.waiting_nodes(rollout, count):
                self._make(rollout, plan, place, node)

    def _make(self, rollout: str, plan: RolloutPlan, place: int, node: str) -> None:
        """Make the job of a node; one that cannot have it any more has failed."""
        try:
            self._submit(node, msgspec.structs.replace(plan, job=plan.job_of(place)), rollout)
        except Refused as error:
            log.warning("rollout_node_left_out rollout=%s node=%s error=%s", rollout, node, error)
            self._store.leave_out(rollout, node, str(error))

    def _end(self, rollout: str, state: str, text: str | None, *, force: bool = False) -> None:
        for job in self._store.end_rollout(rollout, state, text, force=force):
            self._cancel(job.id)
        self._last.pop(rollout, None)
        log.info("rollout_ended rollout=%s state=%s text=%r", rollout, state, text)

    def _kept(self, rollout: str) -> KeptRollout:
        kept = self._store.rollout(rollout)
        if kept is None:
            raise Unknown(f"there is no rollout {rollout[:80]!r}; `edge-agent rollout list` shows them")
        return kept

    def _counts(self, rollout: str) -> Counts:
        return msgspec.convert(self._store.rollout_counts(rollout), Counts)

    def _view(self, kept: KeptRollout) -> RolloutView:
        counts, plan = self._counts(kept.id), _plan(kept)
        coming = None
        if kept.state == "running" and counts.waiting:
            now = self._clock()
            coming = time.time() + max(0.0, self._last.get(kept.id, now) + pause_s(plan.rate, counts.succeeded) - now)
        return RolloutView(
            id=kept.id, state=kept.state, text=kept.text, created=kept.created, changed=kept.changed,
            nodes=sum(msgspec.structs.astuple(counts)), counts=counts, next=coming, plan=plan,
        )  # fmt: skip


def _plan(kept: KeptRollout) -> RolloutPlan:
    return msgspec.json.decode(kept.plan, type=RolloutPlan)


def _some(choice: Choice) -> Choice:
    """Raise Refused where a choice has no node."""
    if not choice.chosen:
        raise Refused(f"no node can have the job: {_reasons(choice)}")
    return choice


def _reasons(choice: Choice) -> str:
    others = choice.others
    said = "; ".join(f"{other.node}: {other.why}" for other in others[:MOST_REASONS])
    return f"{said}, and {len(others) - MOST_REASONS:,} more" if len(others) > MOST_REASONS else said or "no node has ever been seen"
