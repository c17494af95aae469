"""The longer table of what is struck in every phase of a job, for `make test-all`: `pytest tests/long_killed.py`.

An agent's disk fails, a coordinator is killed, a coordinator's disk fails; agents that are killed are in test_killed.py. And the databases
of both break while they serve.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import get_args

import pytest
from fleet import Fleet, wait_for
from test_killed import BRIEF, PHASES, check, restart, submitted

from edge_agent.coordinator.client import Answered
from edge_agent.errors import CoordinatorUnreachable
from edge_agent.messages import Outcome, Phase

COORDINATOR_PHASES = ("created", "offered", *(p for p in PHASES if p != "paused"))  # no memory is scarce here
ENDS: tuple[Outcome, ...] = tuple(outcome for outcome in get_args(Outcome) if outcome != "succeeded")


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


def _heading_for(outcome: Outcome, fleet: Fleet) -> str:
    """Submit a job that ends in another way than well; return its id."""
    data, brief = fleet.data(f"heading for {outcome}", 16, 3), BRIEF
    if outcome == "rejected":
        return fleet.submit(data, **brief | {"budget_bytes": 2**21}).id
    if outcome == "failed":
        with data.open("a") as file:
            file.write(json.dumps({"question": "How long? " * 3000, "answer": "#### 1"}))  # for the context of the model
        return fleet.submit(data, **brief).id
    if outcome == "timed_out":
        return fleet.submit(data, **brief | {"max_run_s": 0.5}).id
    job = fleet.submit(data, **brief | {"schedule__updates": 5000}).id
    fleet.trained(job, 1)
    with suppress(CoordinatorUnreachable):
        fleet.client.cancel(job)
    return job


@pytest.mark.parametrize("how", ["killed", "error"])
@pytest.mark.parametrize("outcome", ENDS)
def test_agent_struck_at_the_end(outcome: Outcome, how: str, fleet: Fleet) -> None:
    """Where a job is rejected, canceled, fails or runs out of time it has that one end too, whatever befalls its agent there."""
    mark = restart(fleet, "agent", how, outcome)
    job = _heading_for(outcome, fleet)
    if how == "killed":
        wait_for("the end of the agent", lambda: not fleet.alive("agent"))
        fleet.start_agent()
    check(fleet, job, outcome != "rejected", outcome)
    assert mark.exists()


@pytest.mark.parametrize("how", ["killed", "error"])
def test_coordinator_struck_when_it_is_to_cancel(how: str, fleet: Fleet) -> None:
    """Killed, it has kept what was asked; where its disk failed it says so, and nothing is canceled before it is asked again."""
    mark = restart(fleet, "coordinator", how, "canceling")
    job = fleet.submit(fleet.data(f"canceling {how}", 16, 3), **BRIEF | {"schedule__updates": 5000}).id
    fleet.trained(job, 1)
    with pytest.raises(CoordinatorUnreachable if how == "killed" else Answered):
        fleet.client.cancel(job)
    assert mark.exists()
    if how == "killed":
        wait_for("the end of the coordinator", lambda: not fleet.alive("coordinator"))
        fleet.start_coordinator()
    else:
        assert not fleet.client.job(job).cancel
        fleet.client.cancel(job)
    check(fleet, job, 1, "canceled")


# httpcore leaves to the garbage collector a socket of the file system that nobody listens to.
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("phase", COORDINATOR_PHASES)
def test_coordinator_killed_in(phase: str, fleet: Fleet) -> None:
    """A phase that only the node goes through included. Its next start hears what it has missed; who submits while it dies gets one job."""
    fleet.stop("agent")
    fleet.start_agent()
    mark = restart(fleet, "coordinator", "killed", phase)
    known = {view.id for view in fleet.client.jobs(1000)}
    with ThreadPoolExecutor(1) as submitter:
        asked = submitter.submit(submitted, fleet, f"coordinator-{phase}")
        wait_for("the end of the coordinator", lambda: not fleet.alive("coordinator"))
        assert mark.exists()
        fleet.start_coordinator()
        job = asked.result().id
    assert {view.id for view in fleet.client.jobs(1000)} - known == {job}
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


def _damage(path: Path) -> None:
    """Overwrite all pages of a database but the first, as a worn disk might, and have the process that holds it read them again."""
    with closing(sqlite3.connect(path, timeout=30)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        pages, size = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
        db.execute("UPDATE meta SET value = value")
        db.commit()
    with path.open("r+b") as file:
        file.seek(size)
        file.write(b"\xff" * size * (pages - 1))


def test_agent_whose_database_breaks(fleet: Fleet) -> None:
    """It says so, has its trainer write a checkpoint and ends; its next start begins a new database and goes on with the job."""
    job = fleet.submit(fleet.data("broken"), schedule__updates=40).id
    fleet.trained(job, 3)
    _damage(fleet.directory / "node" / "agent.sqlite")
    wait_for("the end of the agent", lambda: not fleet.alive("agent"))
    assert fleet.trainers() == []
    assert fleet.stop("agent") == 1
    assert fleet.log("agent").splitlines()[-1].startswith("error state_damaged: the database in the state directory is damaged: ")
    fleet.start_agent()
    check(fleet, job, 1)
    assert "database_set_aside" in fleet.log("agent")
    [_] = (fleet.directory / "node").glob("agent.sqlite.damaged-*[0-9]")
    result = json.loads((fleet.directory / f"fetched-{job}" / "result.json").read_text())
    assert "train" in [row["stage"] for row in result["stages"] if row["resumed"]]


@pytest.mark.parametrize("seen_by", ["its own work", "a request"])
def test_coordinator_whose_database_breaks(seen_by: str, fleet: Fleet) -> None:
    """It ends, also where only a request finds that, and starts again only over a copy; nothing is lost that came after the copy."""
    place, copy = fleet.directory / "coordinator" / "coordinator.sqlite", fleet.directory / "copy.sqlite"
    job = fleet.submit(fleet.data(f"broken {seen_by}"), schedule__updates=20).id
    with closing(sqlite3.connect(place)) as whole, closing(sqlite3.connect(copy)) as kept:
        whole.backup(kept)
    fleet.trained(job, 3)
    if seen_by == "a request":
        fleet.stop("broker")
        wait_for("the end of the connection", lambda: fleet.log("coordinator").rstrip().splitlines()[-1].count("disconnected"))
    _damage(place)
    if seen_by == "a request":
        with pytest.raises((Answered, CoordinatorUnreachable)):
            fleet.client.jobs(1000)
    wait_for("the end of the coordinator", lambda: not fleet.alive("coordinator"))
    assert fleet.stop("coordinator") == 1
    assert fleet.log("coordinator").rstrip().splitlines()[-1].startswith("error state_damaged: ")
    if seen_by == "a request":
        fleet.start_broker()
    damaged = place.read_bytes()
    fleet.start("coordinator", ("-m", "edge_agent", "coordinator"))
    wait_for("its end", lambda: not fleet.alive("coordinator"))
    assert fleet.stop("coordinator") == 13
    assert "; restore or remove the file" in fleet.log("coordinator").rstrip().splitlines()[-1]
    assert place.read_bytes() == damaged
    for suffix in ("-wal", "-shm"):
        place.with_name(place.name + suffix).unlink(missing_ok=True)
    copy.replace(place)
    fleet.start_coordinator()
    check(fleet, job, 1)
