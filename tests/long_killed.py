"""The longer table of what is struck in every phase of a job, for `make test-all`: `pytest tests/long_killed.py`.

An agent's disk fails, a coordinator is killed, a coordinator's disk fails; agents that are killed are in test_killed.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
from fleet import Fleet, wait_for
from test_killed import PHASES, check, restart, submitted

from edge_agent.coordinator.client import Answered
from edge_agent.errors import CoordinatorUnreachable
from edge_agent.messages import Phase

COORDINATOR_PHASES = ("created", "offered", *(p for p in PHASES if p != "paused"))  # no memory is scarce here


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet() as running:
        yield running
        assert running.trainers_at_once == 1


@pytest.mark.parametrize("phase", PHASES)
def test_agent_whose_disk_fails_at(phase: Phase, fleet: Fleet) -> None:
    """It says `storage_error` once, tries again, and the job goes its way."""
    before = fleet.log("agent").count("storage_error")
    mark = restart(fleet, "agent", "error", phase)
    job = submitted(fleet, f"error-{phase}").id
    check(fleet, job, 1)
    assert mark.exists()
    assert fleet.log("agent").count("storage_error") == before + 1


@pytest.mark.parametrize("phase", COORDINATOR_PHASES)
def test_coordinator_killed_in(phase: str, fleet: Fleet) -> None:
    """A phase that only the node goes through included. Its next start hears what it has missed; who submits while it dies is told so."""
    fleet.stop("agent")
    fleet.start_agent()
    mark = restart(fleet, "coordinator", "killed", phase)
    known = {view.id for view in fleet.client.jobs(1000)}
    with pytest.raises(CoordinatorUnreachable) if phase == "created" else suppress(CoordinatorUnreachable):
        submitted(fleet, f"coordinator-{phase}")
    wait_for("the end of the coordinator", lambda: not fleet.alive("coordinator"))
    assert mark.exists()
    fleet.start_coordinator()
    [job] = {view.id for view in fleet.client.jobs(1000)} - known
    check(fleet, job, 1)


@pytest.mark.parametrize("phase", COORDINATOR_PHASES)
def test_coordinator_whose_disk_fails_at(phase: str, fleet: Fleet) -> None:
    """It tries again, and the job goes its way; who submits meanwhile is told so, and nothing of it is kept."""
    mark = restart(fleet, "coordinator", "error", phase)
    if phase == "created":
        with pytest.raises(Answered, match="disk I/O error"):
            submitted(fleet, "coordinator-error")
        assert mark.exists()
    check(fleet, submitted(fleet, f"coordinator-error-{phase}").id, 1)
    assert mark.exists()
