"""Daemons on a real file system that is full, or read only, for `make test-all`: `pytest tests/long_disks.py`."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import disks
import pytest
from fleet import Fleet, wait_for
from test_killed import check, submitted

from edge_agent.coordinator.client import Answered

SIDES = {"agent": "node", "coordinator": "coordinator"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 48 MiB."""
    with disks.small_disk(tmp_path / "disk", 48) as place:
        yield place


def _fill(place: Path) -> Path:
    """Take all room, until nothing comes free any more."""
    filler = place / "filler"
    with filler.open("ab", buffering=0) as file:
        while free := shutil.disk_usage(place).free:
            file.write(bytes(free))
    return filler


def test_node_whose_disk_is_full(disk: Path) -> None:
    """Its job fails with the reason, which is told when there is room to write it down; the agent lives, and takes the next job."""
    fleet = Fleet()
    (fleet.directory / "node").symlink_to(disk)
    with fleet:
        job = fleet.submit(fleet.data("full"), schedule__updates=5000).id
        fleet.trained(job, 2)
        filler = _fill(disk)
        wait_for("the end of the trainer", lambda: _fill(disk) and not fleet.trainers())
        assert fleet.alive("agent")
        filler.unlink()
        view = fleet.ended(job)
        assert (view.outcome, view.reason) == ("failed", "disk_full")
        check(fleet, submitted(fleet, "room").id, 1)
        assert "event_failed" not in fleet.log("agent")


def test_coordinator_whose_disk_is_full(disk: Path) -> None:
    """Who submits is told so and nothing of it is kept; what a node says meanwhile is acknowledged when there is room, and the job ends."""
    fleet = Fleet()
    (fleet.directory / "coordinator").symlink_to(disk)
    with fleet:
        job = submitted(fleet, "before").id
        wait_for("the job at its node", lambda: fleet.client.job(job).phase not in ("created", "offered"))
        filler = _fill(disk)
        with pytest.raises(Answered) as told:
            submitted(fleet, "refused")
        assert re.search("full|No space", str(told.value)), told.value
        wait_for("the end at the node", lambda: _fill(disk) and f"job_ended job={job}" in fleet.log("agent"))
        assert fleet.alive("coordinator")
        filler.unlink()
        check(fleet, job, 1)
        assert [view.id for view in fleet.client.jobs(1000)] == [job]
        assert "event_failed" not in fleet.log("coordinator")


@pytest.mark.parametrize("side", list(SIDES))
def test_daemon_on_a_disk_that_is_read_only(side: str, disk: Path) -> None:
    """It does not start, and says why."""
    fleet = Fleet()
    (fleet.directory / SIDES[side]).symlink_to(disk)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    fleet.start(side, ("-m", "edge_agent", "run" if side == "agent" else "coordinator"))
    try:
        wait_for("its end", lambda: not fleet.alive(side))
        assert fleet.stop(side) == 13
        assert "error state: " in fleet.log(side)
        assert "Read-only file system" in fleet.log(side)
    finally:
        fleet.stop(side)
        fleet.client.__exit__()
        shutil.rmtree(fleet.directory)
