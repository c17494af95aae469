"""An agent is killed in every phase of a job: the job ends once, and nothing is left. What else is struck is in long_killed.py."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import get_args

import pytest
from fleet import Fleet, wait_for

from edge_agent.coordinator.views import JobView
from edge_agent.job import NlftOptions
from edge_agent.messages import OptionsState, Outcome, Phase

PHASES: tuple[Phase, ...] = get_args(Phase)
ATTEMPTS = dict.fromkeys(PHASES, 1) | {"running": 2, "paused": 2}
"""Starts of the trainer where the agent is killed in a phase: one more where it ran."""
BRIEF = {"method__name": "sft", "evaluation__questions": 0, "sampling__outputs": 0, "schedule__batch": 4, "schedule__updates": 3}


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet() as running:
        yield running
        assert running.trainers_at_once == 1


def submitted(fleet: Fleet, name: str) -> JobView:
    """Submit a brief job with a dataset of its own."""
    return fleet.submit(fleet.data(name, 16, len(name)), **BRIEF)


def check(fleet: Fleet, job: str, attempts: int, outcome: Outcome = "succeeded") -> None:
    """Wait for the end of a job, and see that it has one, and that nothing is left."""
    view = fleet.ended(job)
    assert (view.outcome, view.attempt) == (outcome, attempts), view
    assert outcome != "succeeded" or len(fleet.adapter(job)) > 1000
    assert len({m["id"] for m in fleet.heard("job", job, "result")}) == (outcome != "rejected")
    assert [row.phase for row in fleet.client.history(job) if not row.late].count("ended") == 1
    wait_for("an empty outbox", lambda: _count(fleet, "SELECT count(*) FROM outbox") == 0)
    wait_for("the trainer to end", lambda: not fleet.trainers())
    left = [f for side in ("node", "coordinator") for f in (fleet.directory / side).rglob("*") if f.name.endswith((".part", ".map"))]
    assert left == []


def _count(fleet: Fleet, query: str) -> int:
    with closing(sqlite3.connect(f"file:{fleet.directory}/node/agent.sqlite?mode=ro", uri=True)) as db:
        return int(db.execute(query).fetchone()[0])


def restart(fleet: Fleet, daemon: str, how: str, phase: str) -> Path:
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


@pytest.mark.parametrize(
    "phase", [pytest.param(phase, marks=[] if phase in ("running", "ended") else pytest.mark.slow) for phase in PHASES]
)
def test_agent_killed_in(phase: Phase, fleet: Fleet) -> None:
    """Its next start goes on with the job; the coordinator sees one end."""
    mark = restart(fleet, "agent", "killed", phase)
    job = submitted(fleet, f"killed-{phase}").id
    wait_for("the end of the agent", lambda: not fleet.alive("agent"))
    assert mark.exists()
    fleet.start_agent()
    check(fleet, job, ATTEMPTS[phase])


@pytest.mark.slow
def test_agent_killed_with_options_that_its_trainer_has_not(fleet: Fleet) -> None:
    """They are in its database, and its next start hands them over; the coordinator hears when they are taken."""
    mark = restart(fleet, "agent", "killed", "options")
    job = fleet.submit(fleet.data("options", 16, 7), **BRIEF | {"method__name": "nlft"}).id
    fleet.client.send_options(job, {"correct_threshold": 0.5})
    wait_for("the end of the agent", lambda: not fleet.alive("agent"))
    assert mark.exists()
    assert not (fleet.directory / "node" / "jobs" / job / "options.json").exists()
    fleet.start_agent()
    view = fleet.ended(job)
    result = fleet.client.result(view)
    assert view.outcome == "succeeded"
    assert result is not None
    [change] = result.changes
    assert (change.number, change.method) == (1, NlftOptions(correct_threshold=0.5))
    assert view.options_state == OptionsState(1, 1, change.update)
