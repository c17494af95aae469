"""Interruptions that take longer: like test_interruptions.py, and part of `make test-all`."""

# ruff: noqa: F811  (fixtures that are imported)
from __future__ import annotations

import shutil
import signal
import sqlite3
import time
from contextlib import closing

import pytest
from conftest import Cli
from fleet import Fleet, wait_for
from test_interruptions import check_end, fleet, outbox, undisturbed  # noqa: F401

OUTAGE_S = 30.0


def test_broker_stopped_for_30_seconds(fleet: Fleet, undisturbed: bytes) -> None:
    """The job runs on and ends while there is no broker; its result is handed in when there is one again."""
    job = fleet.submit(fleet.data()).id
    fleet.trained(job, 1)
    fleet.stop("broker", signal.SIGKILL)
    stopped = time.monotonic()
    wait_for("the trainer to end", lambda: not fleet.trainers())
    wait_for("the end of the outage", lambda: time.monotonic() - stopped > OUTAGE_S)
    assert fleet.client.job(job).phase != "ended"
    fleet.start_broker()
    check_end(fleet, job, undisturbed)


@pytest.mark.parametrize("database", ["kept", "lost"])
def test_a_stuck_child_of_a_killed_agent_is_killed(database: str, fleet: Fleet, undisturbed: bytes) -> None:
    """A child that cannot end by itself (it is stopped by a signal) is killed by the next agent before another one starts, also where
    the agent's database is gone."""
    job = fleet.submit(fleet.data()).id
    fleet.trained(job, 2)
    stuck = fleet.trainers()[0]
    stuck.suspend()
    fleet.stop("agent", signal.SIGKILL)
    if database == "lost":
        for file in (fleet.directory / "node").glob("agent.sqlite*"):
            file.unlink()
    fleet.start_agent()
    wait_for("the orphan's end", lambda: not stuck.is_running())
    check_end(fleet, job, undisturbed)


def test_a_node_that_lost_its_disk_runs_its_jobs_anew(fleet: Fleet, undisturbed: bytes) -> None:
    """The state directory of the node is deleted in mid-job: the job is offered again, runs from its start, and ends once."""
    job = fleet.submit(fleet.data()).id
    fleet.trained(job, 2)
    fleet.stop("agent", signal.SIGKILL)
    wait_for("the child to end", lambda: not fleet.trainers())
    shutil.rmtree(fleet.directory / "node")
    fleet.start_agent()
    check_end(fleet, job, undisturbed)
    result = fleet.client.result(fleet.client.job(job))
    assert result is not None
    assert not result.resumed


def test_a_lost_job_is_canceled_at_once_and_ends_at_its_node_when_that_is_back(fleet: Fleet, cli: Cli) -> None:
    """The node has been silent for longer than the lease: `jobs` says so, and nobody waits for its answer."""
    job = fleet.submit(fleet.data()).id
    fleet.trained(job, 1)
    fleet.stop("agent", signal.SIGKILL)
    fleet.stop("coordinator")
    with closing(sqlite3.connect(fleet.directory / "coordinator" / "coordinator.sqlite")) as db, db:
        db.execute("UPDATE nodes SET heard = heard - 90000")
    fleet.start_coordinator()
    config = ("--config", fleet.config("coordinator"))
    assert "running lost" in cli("jobs", *config).out
    assert cli("cancel", job, *config).code == 0
    view = fleet.client.job(job)
    assert (view.phase, view.outcome, view.lost) == ("ended", "canceled", False)
    fleet.start_agent()
    wait_for("the end at the node", lambda: '"job_ended' in fleet.log("agent"))
    wait_for("an empty outbox", lambda: outbox(fleet) == 0)
    assert fleet.client.job(job).outcome == "canceled"
    assert not fleet.trainers()


def test_agent_killed_in_mid_job(fleet: Fleet, undisturbed: bytes) -> None:
    """kill -9 of the agent: its child is gone within 10 s; the next agent goes on from the checkpoint. Twice, the second time the agent
    comes back at once, beside a child that has not ended yet."""
    job = fleet.submit(fleet.data()).id
    fleet.trained(job, 2)
    fleet.stop("agent", signal.SIGKILL)
    wait_for("the child to end", lambda: not fleet.trainers(), deadline_s=10)
    wait_for("the last will", lambda: fleet.client.nodes()[0].state == "lost")
    fleet.start_agent()
    fleet.trained(job, 5)
    fleet.stop("agent", signal.SIGKILL)
    fleet.start_agent()
    check_end(fleet, job, undisturbed)
    result = fleet.client.result(fleet.client.job(job))
    assert result is not None
    assert result.resumed
    assert fleet.client.job(job).attempt == 3


def test_agent_stopped_in_order(fleet: Fleet, undisturbed: bytes) -> None:
    """SIGTERM: the child writes a checkpoint and ends, the agent says that it is offline and exits with 0; the next one goes on."""
    job = fleet.submit(fleet.data()).id
    fleet.trained(job, 2)
    assert fleet.stop("agent") == 0
    assert not fleet.trainers()
    wait_for("offline", lambda: fleet.client.nodes()[0].state == "offline")
    fleet.start_agent()
    check_end(fleet, job, undisturbed)
