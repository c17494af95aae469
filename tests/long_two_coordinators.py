"""Forty nodes, 400 jobs, and the broker and a coordinator killed in their midst; benchmarks/fleet.py does so with a thousand."""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from many_fleet import BigFleet, Work


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # httpx leaves a socket open where nobody listens
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("coordinators", "database"), [(2, "postgresql"), (3, "postgresql"), (1, "sqlite")])
def test_no_job_is_lost_or_double(coordinators: int, database: str, tmp_path: Path) -> None:
    """Each has one result, at its node and in the database, and was run once."""
    options = Namespace(
        nodes=40, jobs=400, rate=5.0, coordinators=coordinators, database=database, tls=True, run_s=(1.0, 5.0), adapter_bytes=200_000,
        strikes=True, fresh=False, nodes_directory=str(tmp_path), keep=False, seed=2, away_s=10.0,
    )  # fmt: skip
    with ExitStack() as ends:
        fleet = BigFleet(options, ends)
        fleet.start_nodes()
        fleet.until("the nodes", lambda: fleet.up == options.nodes, 120)
        work = Work(fleet)
        work.submit()
        work.wait()
        ended, lost, double, _ = work.count()
        assert (ended, lost, double) == (options.jobs, 0, 0)
