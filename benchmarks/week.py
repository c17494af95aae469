"""A week in miniature, one job after another through one node: `python benchmarks/week.py --jobs 1000` writes results/week.json.

The fleet is that of small_fleet.py; what a job leaves on the node is deleted half a minute after its end is acknowledged. Every twenty
jobs it looks at both daemons: resident memory, open files, threads, database (with its log) and directory. From the second quarter of the
run to the last, medians of each, the node must stay as it is, and the coordinator's process; what a coordinator keeps for good grows and is
told by the job. A node remembers the id of a deleted job until its order has expired, so its database may grow by a row a job. Exits with 1
where anything grows beyond its bound.

1,000 jobs take 80 to 145 minutes on two cores: 5 to 9 seconds a job, most of it the interpreter's start and what a trainer imports.
Does not cover graphics cards and other brokers. Needs Mosquitto.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import psutil
from page import RESULTS
from rich.console import Console
from rich.table import Table
from small_fleet import SmallFleet

from edge_agent.training.outcome import versions
from profiles.device import device_name

DAEMONS = {"agent": "node", "coordinator": "coordinator"}
"""With the names of their directories."""
OPEN_JOBS, EVERY = 4, 20
SEEDS = 10
"""Jobs of one seed make the same adapter, which a coordinator keeps once."""
LONGEST_JOB_S = 120.0
MIB = 2**20
MOST = {
    "agent resident": 2 * MIB, "agent files": 2, "agent threads": 0,
    "coordinator resident": 4 * MIB, "coordinator files": 2, "coordinator threads": 0,
}  # fmt: skip
"""How much more each may be at the end."""
MOST_A_JOB = {"agent database": 1024, "agent directory": 1024}
"""Likewise, for every job between."""


class Change(msgspec.Struct):
    """One figure: its medians in the second quarter of the run and in the last."""

    before: float
    after: float
    most: float | None
    """What it may be at the end; none for what is kept for good."""

    @property
    def holds(self) -> bool:
        return self.most is None or self.after <= self.most


class Outcome(msgspec.Struct):
    """What was seen."""

    date: str
    machine: str
    versions: dict[str, str]
    seconds: float
    jobs: int
    outcomes: dict[str, int]
    changes: dict[str, Change]
    samples: list[dict[str, int]]
    wrong: list[str]


def sample(fleet: SmallFleet, jobs: int) -> dict[str, int]:
    """Look at both daemons, in bytes and counts."""
    found = {"jobs": jobs}
    for daemon, place in DAEMONS.items():
        process, directory = psutil.Process(fleet.pid(daemon)), fleet.directory / place
        figures = {
            "resident": process.memory_info().rss, "files": process.num_fds(), "threads": process.num_threads(),
            "database": held(directory, f"{daemon}.sqlite*"), "directory": held(directory, "*"),
        }  # fmt: skip
        found |= {f"{daemon} {name}": figure for name, figure in figures.items()}
    return found


def held(directory: Path, pattern: str) -> int:
    """Return the bytes of the files in a directory, of those that go meanwhile none."""
    total = 0
    for file in directory.rglob(pattern):
        with suppress(FileNotFoundError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def run(jobs: int, fleet: SmallFleet, tell: Callable[[str], None]) -> tuple[list[dict[str, int]], dict[str, int]]:
    """Put the jobs through; return what was seen, and how they ended."""
    handed: list[str] = []
    samples: list[dict[str, int]] = []
    ended, last = 0, time.monotonic()
    while ended < jobs:
        while len(handed) < min(jobs, ended + OPEN_JOBS):
            handed.append(fleet.submit(len(handed) % SEEDS))
        time.sleep(0.2)
        if fleet.client.job(handed[ended]).phase != "ended":
            if time.monotonic() - last > LONGEST_JOB_S:
                raise SystemExit(f"job {handed[ended]} does not end; state and logs: {fleet.directory}")
            continue
        ended, last = ended + 1, time.monotonic()
        if ended % EVERY == 0:
            samples.append(sample(fleet, ended))
            tell(f"{ended} jobs, agent {samples[-1]['agent resident'] / MIB:.1f} MiB")
    outcomes: dict[str, int] = {}
    for job in handed:
        outcome = fleet.client.job(job).outcome or "none"
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return samples, outcomes


def changes(samples: list[dict[str, int]]) -> dict[str, Change]:
    """Hold the end of the run against its second quarter."""
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    more_jobs = median(s["jobs"] for s in late) - median(s["jobs"] for s in early)
    found = {}
    for name in samples[0].keys() - {"jobs"}:
        before, after = (median(s[name] for s in part) for part in (early, late))
        more = more_jobs * MOST_A_JOB[name] if name in MOST_A_JOB else MOST.get(name)
        found[name] = Change(before, after, None if more is None else before + more)
    return dict(sorted(found.items()))


def table(outcome: Outcome) -> Table:
    view = Table("figure", "second quarter", "last quarter", "at most", "holds")
    for name, change in outcome.changes.items():
        cells = (f"{value:,.0f}" if value is not None else "" for value in (change.before, change.after, change.most))
        view.add_row(name, *cells, "" if change.most is None else "yes" if change.holds else "NO")
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1000, help=f"at least {8 * EVERY}")
    parser.add_argument("--out", type=Path, default=RESULTS / "week.json")
    options: Any = parser.parse_args()
    if options.jobs < 8 * EVERY:
        parser.error(f"--jobs is at least {8 * EVERY}: quarters of two looks")
    console, began = Console(stderr=True), time.monotonic()
    fleet = SmallFleet(settings="retention_s = 30\n")
    try:
        samples, outcomes = run(options.jobs, fleet, console.print)
    finally:
        fleet.close()
    found = changes(samples)
    wrong = [f"{name} has grown from {change.before:,.0f} to {change.after:,.0f}" for name, change in found.items() if not change.holds]
    wrong += [f"{count} jobs ended {outcome}" for outcome, count in outcomes.items() if outcome != "succeeded"]
    today = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    seconds = round(time.monotonic() - began, 1)
    outcome = Outcome(today, device_name("cpu"), versions(), seconds, options.jobs, outcomes, found, samples, wrong)
    options.out.write_bytes(msgspec.json.format(msgspec.json.encode(outcome)) + b"\n")
    Console(width=120).print(table(outcome))
    Console().print(*wrong, sep="\n", markup=False)
    if wrong:
        sys.stderr.write(f"state and logs: {fleet.directory}\n")
    else:
        shutil.rmtree(fleet.directory)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()
