"""How fast a coordinator answers when it knows many: `python benchmarks/api.py` writes results/api.json.

A Mosquitto, a coordinator with its HTTP API on loopback, and simulated nodes that say what real ones do: presence, what they can do,
and of each of their jobs that it was accepted, runs, and has ended, one in a hundred not yet. A rollout to every node has begun. Then one
reader asks for each list, each thing by its name and each file of the pages in turn, while all nodes send a heartbeat every half minute.
Exits with 1 where the 95th percentile of any is 100 ms or more.

1,000 nodes and 10,000 jobs take some minutes on two cores. Does not cover TLS, uploads, several readers and PostgreSQL. Needs Mosquitto.
"""

from __future__ import annotations

import argparse
import datetime
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles

import httpx
import msgspec
import paho.mqtt.client as paho
from page import RESULTS
from rich.console import Console
from rich.table import Table
from small_fleet import JOB, SmallFleet, free_port, until

from edge_agent.coordinator.rollout import Rate, RolloutPlan
from edge_agent.coordinator.views import JobView
from edge_agent.job_building import build_job
from edge_agent.messages import Heartbeat, JobResult, JobStatus, NodeInfo, NodeLimits, NodeState, encode
from edge_agent.report import Measured, wilson
from edge_agent.topics import up
from edge_agent.training.outcome import versions
from profiles.device import device_name
from profiles.sensors import Reading, Resources

FLEET, MODEL_SHA256 = "default", "0" * 64
BEAT_S, AT_ONCE = 30.0, 500
MOST_S = 0.1
"""Of the 95th percentile."""
OUTCOMES = ("succeeded", "succeeded", "succeeded", "succeeded", "failed", "canceled")
SETTINGS = "[api]\nport = {port}\ntoken_limit = 1000000\naddress_limit = 1000000\n"
INFO = NodeInfo(
    "0.1.0", "3.11", "NVIDIA GeForce RTX 4060", "cuda", 8 * 2**30, {"tiny": MODEL_SHA256}, NodeLimits(6 * 2**30, 2**30, 64),
    {"torch": "2.13.0", "transformers": "5.23.0"}, {"site": "north", "rack": "r1"},
)  # fmt: skip


class Row(msgspec.Struct):
    """What one kind of request took."""

    path: str
    requests: int
    size_bytes: int
    median_s: float
    p95_s: float
    longest_s: float


class Report(msgspec.Struct):
    """The committed results."""

    date: str
    machine: str
    versions: dict[str, str]
    nodes: int
    jobs: int
    filled_s: float
    rows: list[Row]


class Nodes:
    """Simulated nodes behind one connection to the broker."""

    def __init__(self, fleet: SmallFleet, http: httpx.Client, count: int) -> None:
        self.names = [f"node-{number:04}" for number in range(count)]
        self._http = http
        self._said = 0
        self._mqtt = paho.Client(paho.CallbackAPIVersion.VERSION2, "nodes")
        self._mqtt.connect("127.0.0.1", fleet.port)
        self._mqtt.loop_start()

    def say(self, node: str, data: object, *parts: str, seq: int | None = None) -> None:
        """Publish what a node says."""
        self._mqtt.publish(up(FLEET, node, *parts), encode(data, node, boot=1, attempt=1, seq=seq), qos=1)
        self._said += 1
        if self._said % AT_ONCE == 0:
            self.heard()

    def heard(self) -> None:
        """Wait until the coordinator has taken in all that was said: the broker and it let only some messages wait."""
        until("the coordinator to hear", lambda: _received(self._http) >= self._said, 600)

    def come(self) -> None:
        """Be there."""
        for node in self.names:
            self.say(node, NodeState("ready", 1, 1, 0), "state")
            self.say(node, INFO, "info")
        self.heard()

    def beat(self, node: str) -> None:
        """Send a heartbeat."""
        free = Reading(float(6 * 2**30), None)
        resources = Resources(
            free, Reading(float(8 * 2**30), None), 2**33, 2**36, 6 * 2**30, None, Reading(12.0, None), Reading(54.0, None),
            Reading(None, "no sensor"),
        )  # fmt: skip
        self.say(node, Heartbeat(resources, 0, None), "heartbeat")

    @contextmanager
    def beating(self) -> Iterator[None]:
        """All send a heartbeat in every `BEAT_S`."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.is_set():
                for node in self.names:
                    if ended.wait(BEAT_S / len(self.names)):
                        return
                    self.beat(node)

        thread = threading.Thread(target=beat)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def close(self) -> None:
        self._mqtt.disconnect()
        self._mqtt.loop_stop()


def _received(http: httpx.Client) -> float:
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("edge_agent_messages_received_total{"))


def fill(fleet: SmallFleet, nodes: Nodes, jobs: int) -> list[JobView]:
    """Give every node jobs, and let it say what becomes of them; return all."""
    job = build_job("tiny", fleet.data, None, JOB, [])
    files, made = {job.dataset.sha256: fleet.data}, []
    nodes.come()
    while len(made) < jobs:
        turn = [fleet.client.submit(node, job, files, priority=4) for node in nodes.names[: jobs - len(made)]]
        for phase in ("accepted", "running"):
            for view in turn:
                nodes.say(view.node, JobStatus(view.digest, phase), "job", view.id, "status", seq=1 + (phase == "running"))
            nodes.heard()
        for number, view in enumerate(turn, len(made)):
            if number % 100:
                nodes.say(view.node, _result(view, number), "job", view.id, "result", seq=3)
        nodes.heard()
        made += turn
    fleet.client.roll_out(RolloutPlan(job=job, rate=Rate(maximum_per_minute=1)), files, False)
    return made


def _result(view: JobView, number: int) -> JobResult:
    outcome = OUTCOMES[number % len(OUTCOMES)]
    measured = Measured(wilson(20, 100), wilson(30 + number % 30, 100)) if outcome == "succeeded" else None
    return JobResult(
        view.digest, outcome, "oom_device" if outcome == "failed" else None, None, measured, 600.0 + number, 5 * 2**30,
        tokens_per_s=900.0, energy_j=50_000.0,
    )  # fmt: skip


def places(http: httpx.Client, jobs: list[JobView], names: list[str]) -> list[str]:
    """Return what is asked for: lists of the length that pages have and of the longest, things by their names, and the pages' files."""
    middle, last, node = jobs[len(jobs) // 2].id, jobs[-1].id, names[len(names) // 2]
    rollout = http.get("/v1/rollouts").json()["items"][0]["id"]
    old = http.get(f"/v1/jobs?limit={min(1000, len(jobs) // 2)}").json()["next"]
    first = sorted(set(re.findall(r'(?:src|href)="(/[^"]+)"', http.get("/").text)))
    return [
        "/", *first, "/v1/me", "/v1/nodes?limit=100", "/v1/nodes?limit=1000", "/v1/nodes?state=ready&limit=100",
        f"/v1/nodes?after={node}&limit=100", "/v1/jobs?limit=100", "/v1/jobs?limit=1000", f"/v1/jobs?after={old}&limit=100",
        "/v1/jobs?phase=running&limit=100", "/v1/jobs?outcome=failed&limit=100", f"/v1/jobs?node={node}&limit=100",
        f"/v1/jobs?rollout={rollout}&limit=100", f"/v1/jobs/{middle}", f"/v1/jobs/{last}/history", f"/v1/jobs/{last}/progress",
        "/v1/rollouts", f"/v1/rollouts/{rollout}", f"/v1/rollouts/{rollout}/nodes?limit=1000", "/v1/datasets", "/v1/audit?limit=1000",
        "/v1/tokens", "/metrics",
    ]  # fmt: skip


def measure(http: httpx.Client, places: list[str], requests: int) -> list[Row]:
    """Ask for all in turn, so often; every answer has to be a good one."""
    took: dict[str, list[float]] = {place: [] for place in places}
    sizes = {}
    for _ in range(requests):
        for place in places:
            began = time.perf_counter()
            answer = http.get(place)
            took[place].append(time.perf_counter() - began)
            if answer.status_code != 200:
                raise SystemExit(f"{place}: {answer.status_code} {answer.text[:300]}")
            sizes[place] = len(answer.content)
    return [
        Row(
            _shown(place),
            requests,
            sizes[place],
            *(round(s, 5) for s in (median(times), quantiles(times, n=20, method="inclusive")[-1], max(times))),
        )
        for place, times in took.items()
    ]


def _shown(place: str) -> str:
    """Return a path without the names of one run."""
    return re.sub(r"after=[^&]+", "after=…", re.sub(r"[0-7][0-9a-hjkmnp-tv-z]{25}", "ID", place))


def table(report: Report) -> Table:
    title = f"{report.nodes:,} nodes and {report.jobs:,} jobs, each path asked {report.rows[0].requests} times"
    view = Table("path", "median ms", "95 % ms", "longest ms", "KiB", title=title)
    for r in report.rows:
        view.add_row(r.path, *(f"{1000 * s:.1f}" for s in (r.median_s, r.p95_s, r.longest_s)), f"{r.size_bytes / 1024:,.1f}")
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=100, help="of each path")
    parser.add_argument("--out", type=Path, default=RESULTS / "api.json")
    options = parser.parse_args()
    port, began = free_port(), time.monotonic()
    fleet = SmallFleet(agent=None, coordinator_settings=SETTINGS.format(port=port))
    try:
        bearer = {"Authorization": f"Bearer {fleet.client.new_token('reader', 'admin', None).secret}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=bearer, timeout=60) as http:
            nodes = Nodes(fleet, http, options.nodes)
            jobs = fill(fleet, nodes, options.jobs)
            filled_s = time.monotonic() - began
            with nodes.beating():
                rows = measure(http, places(http, jobs, nodes.names), options.requests)
            nodes.close()
    finally:
        fleet.close()
        shutil.rmtree(fleet.directory)
    today = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    report = Report(today, device_name("cpu"), versions(), options.nodes, options.jobs, round(filled_s, 1), rows)
    options.out.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    Console(width=max(Console().width, 100)).print(table(report))
    if slow := [row.path for row in rows if row.p95_s >= MOST_S]:
        print(f"too slow: {', '.join(slow)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
