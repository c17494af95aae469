"""A fleet of a thousand nodes: `python benchmarks/fleet.py` writes results/fleet.json.

A Mosquitto that keeps nothing on disk, two coordinators that share the work through PostgreSQL, and nodes that are real agents but for
their trainers (many_nodes.py). The nodes start as after a power cut, are idle for a time, and then get jobs at a steady rate. A quarter
through these the broker is killed and started again; halfway through the coordinator that has the lead is killed, and started again a
while later. Then every job is looked for in the database and in the nodes' own files: one that has no result is lost, one that has two
or was run twice is double. An ear at the broker tells when messages pass.

Exits with 1 where a job is lost or double, a node takes more than 10 s above the start jitter to connect, or the 95th percentile from an
offer to its acceptance is 500 ms or more.

Nodes, ear and what is measured share the machine: its cores are what limits. `--coordinators 1 --database sqlite` measures one coordinator
with a file, `--tls` certificates and access rules as in deploy/. Does not cover long networks, large files, and many days. Needs Mosquitto,
and PostgreSQL's initdb.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import msgspec
from fleet_page import Report, Times
from many_fleet import NODES_OF_PROCESS, BigFleet, Span, Work
from page import RESULTS
from small_fleet import SERVERS

from edge_agent.mqtt import FRESH_BOOT_S
from edge_agent.training.outcome import versions
from profiles.device import device_name

MOST_CONNECT_S, MOST_ACCEPT_S = 10.0, 0.5


def times(found: list[float]) -> Times:
    """Return what there is to say of some times."""
    if len(found) < 2:
        return Times(len(found), 0.0, 0.0, 0.0, 0.0)
    parts = quantiles(found, n=100, method="inclusive")
    return Times(len(found), *(round(s, 4) for s in (median(found), parts[94], parts[98], max(found))))


def run(options: Any, ends: ExitStack) -> Report:
    fleet, spans = BigFleet(options, ends), dict[str, Span]()
    work = Work(fleet)
    with fleet.span(spans, "empty"):
        time.sleep(options.idle_s / 2)
    with fleet.span(spans, "start"):
        fleet.start_nodes()
        fleet.until("all nodes", lambda: fleet.up == options.nodes, 600)
        ready = "SELECT count(*) FROM nodes WHERE state = 'ready' AND info IS NOT NULL"
        known = fleet.until("the coordinators to know all nodes", lambda: fleet.ask(ready) == [(options.nodes,)], 300)
    known_s = time.time() - (time.monotonic() - known) - max(fleet.started.values())
    connect = times([fleet.ups[name][0][0] - fleet.start_of(number) for number, name in enumerate(fleet.names)])
    time.sleep(10)
    with fleet.span(spans, "idle"):
        time.sleep(options.idle_s)
    before = Counter(fleet.ear.counts)
    with fleet.span(spans, "jobs"):
        work.submit()
        work.wait()
    counts = sorted(fleet.ear.counts.items())
    made = {kind: round((n - before[kind]) / options.jobs, 2) for kind, n in counts if n > before[kind]}
    time.sleep(5)
    ended, lost, double, late = work.count()
    ear = fleet.ear
    both = {job: (at, ear.accepted[job] - at) for job, at in ear.offered.items() if job in ear.accepted}
    calm = [took for at, took in both.values() if not any(since < at < until for since, until in work.away)]
    acknowledged = [ear.acknowledged[message] - at for message, at in ear.told.items() if message in ear.acknowledged]
    return Report(
        datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(), device_name("cpu"),
        "nodes, ear and what is measured share the cores" + (f"; {options.note}" if options.note else ""), versions(),
        _version_of_broker(), "sqlite" if fleet.postgres is None else f"postgresql {fleet.ask('SHOW server_version')[0][0]}", options.tls,
        options.coordinators, options.nodes, options.jobs, options.rate,
        f"trainers: a run takes {options.run_s[0]:g} to {options.run_s[1]:g} s, drawn evenly, and leaves {options.adapter_bytes} random "
        f"bytes; {NODES_OF_PROCESS} agents share a process, and its disk{': memory' if options.nodes_directory == '/dev/shm' else ''}",  # noqa: S108
        FRESH_BOOT_S if options.fresh else 0.0, connect, round(known_s, 1), times([took for _, took in both.values()]), times(calm),
        times(acknowledged), round(work.broker_back_s, 1), work.taken_over_s, made, ended, lost, double, late, spans,
    )  # fmt: skip


def _version_of_broker() -> str:
    said = subprocess.run([shutil.which("mosquitto", path=SERVERS) or "mosquitto", "-h"], capture_output=True, text=True, check=False)  # noqa: S603
    return said.stdout.splitlines()[0] if said.stdout else "mosquitto"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=5000)
    parser.add_argument("--rate", type=float, default=10.0, help="jobs a second")
    parser.add_argument("--coordinators", type=int, default=2)
    parser.add_argument("--database", choices=["postgresql", "sqlite"], default="postgresql")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--run-s", type=float, nargs=2, default=(5.0, 25.0), help="a run takes at least and at most")
    parser.add_argument("--adapter-bytes", type=int, default=16 * 1024)
    parser.add_argument("--idle-s", type=float, default=60.0)
    parser.add_argument("--away-s", type=float, default=30.0, help="until the coordinator that was killed is started again")
    parser.add_argument("--no-strikes", dest="strikes", action="store_false")
    parser.add_argument("--not-fresh", dest="fresh", action="store_false", help="nodes connect at once, without the start jitter")
    parser.add_argument("--nodes-directory", help="where the nodes' directories are made")
    parser.add_argument("--keep", action="store_true", help="leave logs and databases in the temporary directory")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--note", default="", help="what is to be known of the machine")
    parser.add_argument("--out", type=Path, default=RESULTS / "fleet.json")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # and what it has started with it
    with ExitStack() as ends:
        report = run(options, ends)
    options.out.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    last = report.connect_s.longest_s
    wrong = [
        text for text, bad in (
            (f"{report.lost} jobs lost", report.lost), (f"{report.double} jobs double", report.double),
            (f"the last node was connected after {last:.1f} s", last > report.start_jitter_s + MOST_CONNECT_S),
            (f"95 % of offers accepted within {report.accepted_s.p95_s:.3f} s", report.accepted_s.p95_s >= MOST_ACCEPT_S),
        ) if bad
    ]  # fmt: skip
    print(msgspec.json.format(msgspec.json.encode(report)).decode())
    if wrong:
        raise SystemExit("; ".join(wrong))


if __name__ == "__main__":
    main()
