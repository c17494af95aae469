"""A database breaks while its daemon serves, for `make test-all`: `pytest tests/long_damaged.py`."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from fleet import Fleet, wait_for
from test_killed import BRIEF, check


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with Fleet() as running:
        yield running
        assert running.trainers_at_once == 1


def damage(path: Path) -> None:
    """Overwrite all pages of a database but the first, as a worn disk would, and have whoever has it open read them again."""
    with closing(sqlite3.connect(path, timeout=30)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        pages, size = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
        db.execute("UPDATE meta SET value = value")
    with path.open("r+b") as file:
        file.seek(size)
        file.write(b"\xff" * size * (pages - 1))


def test_agent_whose_database_breaks(fleet: Fleet) -> None:
    job = fleet.submit(fleet.data(), schedule__updates=12)
    fleet.trained(job.id, 3)
    damage(fleet.directory / "node" / "agent.sqlite")
    wait_for("the end of the agent", lambda: not fleet.alive("agent"))
    print("CODE", fleet.stop("agent"))
    print(fleet.log("agent"))
    fleet.start_agent()
    view = fleet.ended(job.id)
    print(view.outcome, view.attempt)
    print(fleet.log("agent"))
    print(fleet.log("coordinator"))


def test_coordinator_whose_database_breaks(fleet: Fleet) -> None:
    job = fleet.submit(fleet.data(), schedule__updates=12)
    fleet.trained(job.id, 3)
    damage(fleet.directory / "coordinator" / "coordinator.sqlite")
    wait_for("the end of the agent", lambda: not fleet.alive("coordinator"))
    print("CODE", fleet.stop("coordinator"))
    print(fleet.log("coordinator"))
