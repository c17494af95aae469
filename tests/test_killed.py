"""A daemon is killed in every phase of a job, and its disk fails at every change of phase: the job ends once, and nothing is left."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import get_args

import pytest
from fleet import Fleet, wait_for

from edge_agent.coordinator.client import Answered
from edge_agent.coordinator.store import JobView
from edge_agent.errors import CoordinatorUnreachable
from edge_agent.messages import Phase

PHASES: tuple[Phase, ...] = get_args(Phase)
COORDINATOR_PHASES = ("created", "offered", *(p for p in PHASES if p != "paused"))  # no memory is scarce here
ATTEMPTS = dict.fromkeys(PHASES, 1) | {"running": 2, "paused": 2}
"""Starts of the trainer where the agent is killed in a phase: one more where it ran."""
BRIEF = {"method__name": "sft", "evaluation__questions": 0, "sampling__outputs": 0, "schedule__batch": 4, "schedule__updates": 3}


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet() as running:
        yield running
        assert running.trainers_at_once == 1


def _submitted(fleet: Fleet, name: str) -> JobView:
    return fleet.submit(fleet.data(name, 16, len(name)), **BRIEF)


def _check(fleet: Fleet, job: str, attempts: int) -> None:
    view = fleet.ended(job)
    assert (view.outcome, view.attempt) == ("succeeded", attempts), view
    assert len(fleet.adapter(job)) > 1000
    assert len({m["id"] for m in fleet.heard("job", job, "result")}) == 1
    assert [row.phase for row in fleet.client.history(job) if not row.late].count("ended") == 1
    wait_for("an empty outbox", lambda: _count(fleet, "SELECT count(*) FROM outbox") == 0)
    wait_for("the trainer to end", lambda: not fleet.trainers())
    left = [f for side in ("node", "coordinator") for f in (fleet.directory / side).rglob("*") if f.name.endswith((".part", ".map"))]
    assert left == []


def _count(fleet: Fleet, query: str) -> int:
    with closing(sqlite3.connect(f"file:{fleet.directory}/node/agent.sqlite?mode=ro", uri=True)) as db:
        return int(db.execute(query).fetchone()[0])


def _restart(fleet: Fleet, daemon: str, how: str, phase: str) -> Path:
    """Start a daemon that is struck once; return the mark that says when."""
    mark = fleet.directory / f"{daemon}-{how}-{phase}"
    fleet.stop(daemon)
    dying = (str(Path(__file__).parent / "dying.py"), daemon, how, phase, str(mark))
    if daemon == "agent":
        fleet.start_agent(dying)
        wait_for("the node at the coordinator", fleet.present)
    else:
        fleet.start_coordinator(dying)
    return mark


@pytest.mark.parametrize("phase", PHASES)
def test_agent_killed_in(phase: Phase, fleet: Fleet) -> None:
    """Its next start goes on with the job; the coordinator sees one end."""
    mark = _restart(fleet, "agent", "killed", phase)
    job = _submitted(fleet, f"killed-{phase}").id
    wait_for("the end of the agent", lambda: not fleet.alive("agent"))
    assert mark.exists()
    fleet.start_agent()
    _check(fleet, job, ATTEMPTS[phase])


@pytest.mark.parametrize("phase", PHASES)
def test_agent_whose_disk_fails_at(phase: Phase, fleet: Fleet) -> None:
    """It says `storage_error` once, tries again, and the job goes its way."""
    before = fleet.log("agent").count("storage_error")
    mark = _restart(fleet, "agent", "error", phase)
    job = _submitted(fleet, f"error-{phase}").id
    _check(fleet, job, 1)
    assert mark.exists()
    assert fleet.log("agent").count("storage_error") == before + 1


@pytest.mark.parametrize("phase", COORDINATOR_PHASES)
def test_coordinator_killed_in(phase: str, fleet: Fleet) -> None:
    """A phase that only the node goes through included. Its next start hears what it has missed; who submits while it dies is told so."""
    fleet.stop("agent")
    fleet.start_agent()
    mark = _restart(fleet, "coordinator", "killed", phase)
    known = {view.id for view in fleet.client.jobs(1000)}
    with pytest.raises(CoordinatorUnreachable) if phase == "created" else suppress(CoordinatorUnreachable):
        _submitted(fleet, f"coordinator-{phase}")
    wait_for("the end of the coordinator", lambda: not fleet.alive("coordinator"))
    assert mark.exists()
    fleet.start_coordinator()
    [job] = {view.id for view in fleet.client.jobs(1000)} - known
    _check(fleet, job, 1)


@pytest.mark.parametrize("phase", COORDINATOR_PHASES)
def test_coordinator_whose_disk_fails_at(phase: str, fleet: Fleet) -> None:
    """It tries again, and the job goes its way; who submits meanwhile is told so, and nothing of it is kept."""
    mark = _restart(fleet, "coordinator", "error", phase)
    if phase == "created":
        with pytest.raises(Answered, match="disk I/O error"):
            _submitted(fleet, "coordinator-error")
        assert mark.exists()
    _check(fleet, _submitted(fleet, f"coordinator-error-{phase}").id, 1)
    assert mark.exists()
