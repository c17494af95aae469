"""A fleet of a thousand nodes: `python benchmarks/fleet.py` writes results/fleet.json.

A Mosquitto that keeps nothing on disk, two coordinators that share the work through PostgreSQL, and nodes that are real agents but for
their trainers (many_nodes.py). The nodes start as after a power cut, are idle for a time, and then get jobs at a steady rate. A quarter
through these the broker is killed and started again; halfway through the coordinator that has the lead is killed, and started again a
while later. Then every job is looked for in the database and in the nodes' own files: one that has no result is lost, one that has two
or was run twice is double. An ear at the broker tells when messages pass.

Exits with 1 where a job is lost or double, a node takes more than 10 s above the start jitter to connect, or the 95th percentile from an
offer to its acceptance is 500 ms or more.

Nodes, ear and what is measured share the machine: its cores are what limits. `--coordinators 1 --database sqlite` measures one coordinator
with a file, `--tls` certificates and access rules as in deploy/. Does not cover long networks, large files, and many days. Needs Mosquitto, and PostgreSQL's initdb.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import msgspec
import paho.mqtt.client as paho
import psutil
from page import RESULTS
from small_fleet import JOB, RECORDS, SERVERS, free_port

from edge_agent.coordinator.client import Answered, Client
from edge_agent.enrolment import Authority
from edge_agent.errors import CoordinatorUnreachable
from edge_agent.job_building import build_job
from edge_agent.mqtt import FRESH_BOOT_S
from edge_agent.training.outcome import versions
from profiles.device import device_name

ROOT = Path(__file__).parent.parent
FLEET = "lab"
NODES_OF_PROCESS = 100
INSTANCES = ("main", "second", "third", "fourth")
BROKER_AWAY_S, COORDINATOR_AWAY_S = 2.0, 30.0
MOST_CONNECT_S, MOST_ACCEPT_S = 10.0, 0.5
RECORDS_OF_JOB = 40
"""Some 4 KiB, inside of the offer."""
NODES = {"10,000": 10_000, "100,000": 100_000}
JOBS_A_DAY = 24
"""Of a node, in the extrapolation."""
MESSAGE = re.compile(rb'"id":"([0-9a-z]{26})"')


class Times(msgspec.Struct):
    """Of events, in seconds."""

    count: int
    median_s: float
    p95_s: float
    p99_s: float
    longest_s: float


class Use(msgspec.Struct):
    """What a part took over a span of time."""

    cpu_s: float
    cores: float
    peak_mib: float


class Span(msgspec.Struct):
    """A part of the run."""

    seconds: float
    messages_per_s: dict[str, float]
    """At the broker, by topic."""
    kib_per_s: float
    use: dict[str, Use]
    """By part: `nodes` are all of them, `one daemon` is one in a process of its own."""


class Cost(msgspec.Struct):
    """What a part takes: cores = base + per_node * nodes + per_job * jobs a second."""

    base: float
    per_node: float
    per_job: float


class Report(msgspec.Struct):
    """The committed results."""

    date: str
    machine: str
    note: str
    versions: dict[str, str]
    broker: str
    database: str
    tls: bool
    coordinators: int
    nodes: int
    jobs: int
    jobs_per_s: float
    simulated: str
    start_jitter_s: float
    connect_s: Times
    """From the start of a node, with the jitter."""
    known_s: float
    """From the start of the last node until the coordinators knew all."""
    accepted_s: Times
    """From an offer to its acceptance, at the broker."""
    accepted_undisturbed_s: Times
    """The same, without offers of when the broker or a coordinator was away."""
    acknowledged_s: Times
    """From a status or result to its acknowledgement."""
    broker_back_s: float
    """From the start of the broker after it was killed until all nodes were connected again."""
    taken_over_s: float | None
    """From the end of the coordinator that led until another did."""
    messages_of_job: dict[str, float]
    ended: int
    lost: int
    double: int
    late: int
    spans: dict[str, Span]
    cost: dict[str, Cost]
    cores: dict[str, dict[str, float]]
    """By nodes and part, at so many jobs a day of each node."""
    jobs_a_day: int


class Ear:
    """Hears everything at the broker."""

    def __init__(self, port: int, certificates: Path | None) -> None:
        self.counts: Counter[str] = Counter()
        self.bytes = 0
        self.offered: dict[str, float] = {}
        self.accepted: dict[str, float] = {}
        self.told: dict[bytes, float] = {}
        self.acknowledged: dict[bytes, float] = {}
        self._mqtt = paho.Client(paho.CallbackAPIVersion.VERSION2, "ear", protocol=paho.MQTTv5)
        if certificates is not None:
            self._mqtt.tls_set(*(str(certificates / name) for name in ("ca.pem", "ear.pem", "ear.key")))
        self._mqtt.on_connect = lambda client, *_: client.subscribe("edge1/#", 0)
        self._mqtt.on_message = self._hear
        self._mqtt.reconnect_delay_set(0.2, 0.5)  # type: ignore[arg-type]
        self._mqtt.connect("127.0.0.1", port)
        self._mqtt.loop_start()

    def _hear(self, _c: Any, _u: Any, message: paho.MQTTMessage) -> None:
        now, parts = time.monotonic(), message.topic.split("/")[3:]
        kind = "/".join(part for part in parts if re.fullmatch("[a-z]{2,12}", part))
        self.counts[kind] += 1
        self.bytes += len(message.payload)
        if kind == "down/job/offer":
            self.offered.setdefault(parts[2], now)
        elif kind in ("up/job/status", "up/job/result"):
            if b'"phase":"accepted"' in message.payload:
                self.accepted.setdefault(parts[2], now)
            if found := MESSAGE.search(message.payload):
                self.told.setdefault(found[1], now)
        elif kind == "down/ack":
            self.acknowledged.setdefault(parts[2].encode(), now)

    def close(self) -> None:
        self._mqtt.disconnect()
        self._mqtt.loop_stop()


class Parts:
    """The processes, and what they take."""

    def __init__(self) -> None:
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._of: dict[str, str] = {}
        self._ended: Counter[str] = Counter()
        self._last: dict[int, tuple[str, float]] = {}
        self.peaks: dict[str, float] = {}
        self._closing = threading.Event()
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def start(self, name: str, part: str, command: list[str], directory: Path, out: Any = None) -> subprocess.Popen[bytes]:
        """Start a process as one of a part."""
        with (directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.DEVNULL, stdout=out or log, stderr=log, start_new_session=True, cwd=ROOT
            )
        with self._lock:
            self._processes[name], self._of[name] = process, part
        return process

    def kill(self, name: str) -> None:
        process = self._processes[name]
        process.kill()
        process.wait()

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def _watch(self) -> None:
        while not self._closing.wait(1.0):
            self.look()

    def add_pid(self, pid: int, part: str) -> None:
        """Count a process and its children, started elsewhere, as a part."""
        self._roots = (*getattr(self, "_roots", ()), (pid, part))

    def look(self) -> dict[str, float]:
        """Return the processor seconds of each part since the beginning."""
        with self._lock:
            now: dict[int, tuple[str, float]] = {}
            memory: Counter[str] = Counter()
            pids = [(process.pid, self._of[name]) for name, process in self._processes.items() if process.poll() is None]
            for pid, part in getattr(self, "_roots", ()):
                with suppress(psutil.Error):
                    pids += [(p.pid, part) for p in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]
            for pid, part in pids:
                with suppress(psutil.Error):
                    process = psutil.Process(pid)
                    times = process.cpu_times()
                    now[pid] = (part, times.user + times.system)
                    memory[part] += process.memory_full_info().uss if part == "database" else process.memory_info().rss
            for pid, (part, seconds) in self._last.items():
                if pid not in now:
                    self._ended[part] += seconds
            self._last = now
            for part, held in memory.items():
                self.peaks[part] = max(self.peaks.get(part, 0), held / 2**20)
            total = Counter(self._ended)
            for part, seconds in now.values():
                total[part] += seconds
            return dict(total)

    def close(self) -> None:
        self._closing.set()
        for name in reversed(self._processes):
            process = self._processes[name]
            if process.poll() is None:
                process.terminate()
        for process in self._processes.values():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class BigFleet:
    """Broker, database, coordinators and nodes."""

    def __init__(self, options: Any, ends: ExitStack) -> None:
        self.options, self.parts, self._ends = options, Parts(), ends
        self.directory = Path(tempfile.mkdtemp(prefix="ea-fleet-"))
        self.nodes_directory = Path(tempfile.mkdtemp(prefix="ea-nodes-", dir=options.nodes_directory))
        for directory in (self.directory, self.nodes_directory) if not options.keep else ():
            ends.callback(shutil.rmtree, directory, ignore_errors=True)
        ends.callback(self.parts.close)
        self.port, self.instances = free_port(), INSTANCES[: options.coordinators]
        self.certificates = self.directory / "certificates" if options.tls else None
        self.names = [f"node-{number:05}" for number in range(options.nodes)]
        if self.certificates is not None:
            self._issue(self.certificates)
        self.postgres: Any = None
        self._database = self._start_database()
        self._write_broker()
        self.start_broker()
        self.ups: dict[str, list[tuple[float, bool]]] = defaultdict(list)
        self.started: dict[int, float] = {}
        for instance in self.instances:
            self._write_coordinator(instance)
            self.start_coordinator(instance)
        self.clients = {name: ends.enter_context(Client.local(self.directory / name)) for name in self.instances}
        for name in self.instances:
            self.until(f"coordinator {name}", lambda name=name: self.clients[name].jobs(1) is not None, 90)
        self.ear = Ear(self.port, self.certificates)
        ends.callback(self.ear.close)

    def _issue(self, directory: Path) -> None:
        authority = Authority(directory)
        authority.issue("broker", "127.0.0.1", directory)
        for name in (*(f"coordinator.{instance}" for instance in self.instances), *self.names, "ear"):
            authority.issue("node", name, directory)

    def _start_database(self) -> str:
        if self.options.database == "sqlite":
            return ""
        sys.path.append(str(ROOT / "tests"))
        import postgres

        postgres.SETTINGS |= {"fsync": "on", "shared_buffers": "128MB"}  # what is committed is on disk
        self.postgres = self._ends.enter_context(postgres.running())
        self.parts.add_pid(int((self.postgres.data / "postmaster.pid").read_text().splitlines()[0]), "database")
        self.schema = self.postgres.schema()
        return f'[database]\nurl = "{self.schema.url}"\npassword_file = "{self.schema.password_file}"\n'

    def _write_broker(self) -> None:
        text = f"listener {self.port} 127.0.0.1\nuser root\npersistence false\nmax_queued_messages 10000\n"
        if self.certificates is None:
            text += "allow_anonymous true\n"
        else:
            rules = (ROOT / "deploy" / "mosquitto" / "acl").read_text()
            part = re.search(r"user coordinator\.main\n(?:topic .*\n)+", rules)
            if part is None:
                raise SystemExit("deploy/mosquitto/acl has no part for a coordinator")
            for instance in self.instances[1:]:
                rules += "\n" + part[0].replace(".main", f".{instance}").replace("/main/", f"/{instance}/")
            (self.directory / "acl").write_text(rules + "\nuser ear\ntopic read edge1/#\n")
            (self.directory / "acl").chmod(0o600)
            text += (
                f"cafile {self.certificates}/ca.pem\ncertfile {self.certificates}/127.0.0.1.pem\nkeyfile {self.certificates}/127.0.0.1.key\n"
                f"require_certificate true\nallow_anonymous false\nuse_identity_as_username true\nuse_username_as_clientid true\n"
                f"acl_file {self.directory}/acl\n"
            )
        (self.directory / "mosquitto.conf").write_text(text)

    def _write_coordinator(self, instance: str) -> None:
        shared = len(self.instances) > 1
        text = f'state_directory = "{instance}"\nfleet = "{FLEET}"\ninstance = "{instance}"\nshared = {str(shared).lower()}\n'
        text += f"[broker]\nport = {self.port}\nkeepalive_s = 10\n"
        if self.certificates is not None:
            own = self.certificates / f"coordinator.{instance}"
            text += f'[broker.tls]\nca_file = "{self.certificates}/ca.pem"\ncertificate_file = "{own}.pem"\nkey_file = "{own}.key"\n'
        text += self._database
        if shared:
            (self.directory / "store").mkdir(exist_ok=True)
            text += f'[files]\nurl = "file://{self.directory}/store"\n'
        (self.directory / f"{instance}.toml").write_text(text)

    def start_broker(self) -> None:
        mosquitto = shutil.which("mosquitto", path=SERVERS)
        if mosquitto is None:
            raise SystemExit("mosquitto is not installed")
        self.parts.start("broker", "broker", [mosquitto, "-c", str(self.directory / "mosquitto.conf")], self.directory)
        self.until("the broker", self._answers, 30)

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def start_coordinator(self, instance: str) -> None:
        command = [sys.executable, "-m", "edge_agent", "coordinator", "--config", str(self.directory / f"{instance}.toml")]
        self.parts.start(f"coordinator-{instance}", "coordinators", command, self.directory)

    def start_nodes(self) -> None:
        """Start all nodes; the first one has a process of its own."""
        first = 0
        while first < len(self.names):
            count = min(NODES_OF_PROCESS, len(self.names) - first) if first else 1
            command = [
                sys.executable, str(ROOT / "benchmarks" / "many_nodes.py"), "--directory", str(self.nodes_directory), "--first", str(first),
                "--count", str(count), "--port", str(self.port), "--fleet", FLEET, "--run-s", *map(str, self.options.run_s),
                "--seed", str(self.options.seed), "--adapter-bytes", str(self.options.adapter_bytes),
            ]  # fmt: skip
            command += ["--certificates", str(self.certificates)] * (self.certificates is not None) if self.certificates else []
            command += ["--fresh"] * self.options.fresh
            part = "nodes" if first else "one daemon"
            process = self.parts.start(f"nodes-{first}", part, command, self.directory, subprocess.PIPE)
            threading.Thread(target=self._read, args=(first, process), daemon=True).start()
            first += count

    def _read(self, first: int, process: subprocess.Popen[bytes]) -> None:
        for line in process.stdout or ():
            with suppress(ValueError, KeyError):
                said = json.loads(line)
                if "started" in said:
                    self.started[first] = said["started"]
                else:
                    self.ups[said["node"]].append((said["at"], said["up"]))

    @property
    def up(self) -> int:
        """How many nodes are connected."""
        return sum(bool(ups) and ups[-1][1] for ups in list(self.ups.values()))

    def ask(self, sql: str) -> list[tuple[Any, ...]]:
        """Run a statement beside the coordinators."""
        if self.postgres is not None:
            return list(self.postgres.ask(sql, self.schema.url.rpartition("%3D")[2]))
        with closing(sqlite3.connect(f"file:{self.directory}/{self.instances[0]}/coordinator.sqlite?mode=ro", uri=True)) as db:
            return db.execute(sql).fetchall()

    def until(self, what: str, look: Any, deadline_s: float) -> float:
        """Wait for a true answer and return when it came; ends the benchmark at the deadline."""
        deadline = time.monotonic() + deadline_s
        while True:
            with suppress(CoordinatorUnreachable, Answered, OSError):
                if look():
                    return time.monotonic()
            if time.monotonic() > deadline:
                raise SystemExit(f"waited {deadline_s:.0f} s in vain for {what}; the logs are in {self.directory}")
            time.sleep(0.1)

    def leader(self) -> str | None:
        """The coordinator that has taken the lead last, by the logs."""
        led = {}
        for instance in self.instances:
            log = self.directory / f"coordinator-{instance}.log"
            for line in log.read_text(errors="replace").splitlines():
                if "lead_taken" in line:
                    led[instance] = json.loads(line)["time"]
        return max(led, key=led.__getitem__) if led else None

    @contextmanager
    def span(self, spans: dict[str, Span], name: str) -> Iterator[None]:
        """Measure what is done inside."""
        before, counts, size, began = self.parts.look(), Counter(self.ear.counts), self.ear.bytes, time.monotonic()
        self.parts.peaks.clear()
        yield
        seconds, after = time.monotonic() - began, self.parts.look()
        use = {
            part: Use(
                round(cpu := after[part] - before.get(part, 0.0), 2), round(cpu / seconds, 4), round(self.parts.peaks.get(part, 0.0), 1)
            )
            for part in sorted(after)
        }
        messages = {kind: round((n - counts[kind]) / seconds, 2) for kind, n in sorted(self.ear.counts.items()) if n > counts[kind]}
        spans[name] = Span(round(seconds, 1), messages, round((self.ear.bytes - size) / 1024 / seconds, 1), use)
        print(f"{name}: {seconds:.0f} s, {sum(messages.values()):.0f} messages/s, {use}", file=sys.stderr)


class Work:
    """Jobs, and the strikes meanwhile."""

    def __init__(self, fleet: BigFleet) -> None:
        self.fleet, self.options = fleet, fleet.options
        self.jobs: dict[str, str] = {}
        self.away: list[tuple[float, float]] = []
        """When something was away."""
        self.broker_back_s = 0.0
        self.taken_over_s: float | None = None
        data = fleet.directory / "data.jsonl"
        data.write_text("".join(RECORDS.splitlines(keepends=True)[:RECORDS_OF_JOB]))
        self._job = build_job("tiny", data, None, JOB, [])
        self._files = {self._job.dataset.sha256: data}

    def submit(self) -> None:
        """Hand in all jobs at a steady rate, at the coordinators in turn."""
        options, began, strikes = self.options, time.monotonic(), []
        for number in range(options.jobs):
            if options.strikes and number in (options.jobs // 4, options.jobs // 2):
                strike = self._kill_broker if number == options.jobs // 4 else self._kill_coordinator
                strikes.append(threading.Thread(target=strike))
                strikes[-1].start()
            time.sleep(max(0.0, began + number / options.rate - time.monotonic()))
            self._hand_in(number)
        for thread in strikes:
            thread.join()

    def _hand_in(self, number: int) -> None:
        """Hand one in, at the next coordinator where one does not answer."""
        instances, node = self.fleet.instances, self.fleet.names[number % len(self.fleet.names)]
        for turn in range(100_000):
            client = self.fleet.clients[instances[(number + turn) % len(instances)]]
            try:
                self.jobs[client.submit(node, self._job, self._files, priority=4).id] = node
                return
            except (CoordinatorUnreachable, Answered) as error:  # not handed in twice: it is known by its answer only
                print(f"job {number}: {error}", file=sys.stderr)
                time.sleep(0.2)

    def _kill_broker(self) -> None:
        struck = time.monotonic()
        self.fleet.parts.kill("broker")
        time.sleep(BROKER_AWAY_S)
        began = time.time()
        self.fleet.start_broker()
        until = self.fleet.until("all nodes to be back", lambda: self._back_since(began), 300)
        self.broker_back_s = until - struck - BROKER_AWAY_S
        self.away.append((struck - 5, until + 5))
        print(f"broker killed: all nodes back after {self.broker_back_s:.1f} s", file=sys.stderr)

    def _back_since(self, began: float) -> bool:
        return all(ups and ups[-1][1] and ups[-1][0] > began for ups in (self.fleet.ups[name] for name in self.fleet.names))

    def _kill_coordinator(self) -> None:
        fleet, struck = self.fleet, time.monotonic()
        instance = fleet.leader() or fleet.instances[0]
        fleet.parts.kill(f"coordinator-{instance}")
        if len(fleet.instances) > 1:
            self.taken_over_s = round(fleet.until("another to lead", lambda: fleet.leader() != instance, 60) - struck, 2)
            print(f"coordinator {instance} killed: another leads after {self.taken_over_s} s", file=sys.stderr)
        time.sleep(COORDINATOR_AWAY_S if len(fleet.instances) > 1 else 2.0)
        fleet.start_coordinator(instance)
        until = fleet.until(f"coordinator {instance}", lambda: fleet.clients[instance].jobs(1), 120)
        self.away.append((struck - 5, until + 5))

    def wait(self) -> None:
        """Wait until all have ended."""
        open_jobs = "SELECT count(*) FROM jobs WHERE phase != 'ended'"
        self.fleet.until("the last job", lambda: self.fleet.ask(open_jobs) == [(0,)], 1800)

    def count(self) -> tuple[int, int, int, int]:
        """Return how many jobs have ended well, were lost, were double, and how many messages came late.

        Double: in the coordinators' database with two results that count, at two nodes, run twice by one, or never handed in.
        """
        found = dict(self.fleet.ask("SELECT id, outcome FROM jobs"))
        results = Counter(row[0] for row in self.fleet.ask("SELECT job FROM history WHERE phase = 'ended' AND late = 0"))
        at_nodes: Counter[str] = Counter()
        attempts: Counter[str] = Counter()
        ended_at_nodes = set()
        for name in self.fleet.names:
            with closing(sqlite3.connect(f"file:{self.fleet.nodes_directory}/{name}/agent.sqlite?mode=ro", uri=True)) as db:
                for job, phase, attempt, result in db.execute("SELECT id, phase, attempt, result FROM jobs"):
                    at_nodes[job] += 1
                    attempts[job] += attempt
                    if phase == "ended" and json.loads(result)["outcome"] == "succeeded" and self.jobs.get(job, name) == name:
                        ended_at_nodes.add(job)
        well = {job for job, outcome in found.items() if outcome == "succeeded" and results[job] >= 1 and job in ended_at_nodes}
        twice = {job for job in {*found, *at_nodes} if results[job] > 1 or at_nodes[job] > 1 or attempts[job] > 1}
        said = self.fleet.ask("SELECT outcome, reason, min(text), count(*) FROM jobs GROUP BY 1, 2")
        print(f"outcomes: {said}; attempts {Counter(attempts.values())}, nodes {Counter(at_nodes.values())}", file=sys.stderr)
        late = self.fleet.ask("SELECT count(*) FROM history WHERE late = 1")[0][0]
        return len(well & set(self.jobs)), len(set(self.jobs) - well), len(twice), int(late)


def times(found: list[float]) -> Times:
    """Return what there is to say of some times."""
    if len(found) < 2:
        return Times(len(found), 0.0, 0.0, 0.0, 0.0)
    parts = quantiles(found, n=100, method="inclusive")
    return Times(len(found), *(round(s, 4) for s in (median(found), parts[94], parts[98], max(found))))


def cost(spans: dict[str, Span], report: dict[str, Any]) -> dict[str, Cost]:
    """Return what each part takes, by the spans that were empty, idle and busy."""
    found, work = {}, spans["jobs"]
    for part in ("broker", "coordinators", "database", "nodes"):
        empty, idle = (spans[name].use[part].cores if part in spans[name].use else 0.0 for name in ("empty", "idle"))
        busy = work.use[part].cores if part in work.use else 0.0
        per_node = max(0.0, idle - empty) / report["nodes"]
        per_job = max(0.0, busy - idle) * work.seconds / report["jobs"]
        found[part] = Cost(round(empty, 4), round(per_node, 8), round(per_job, 6))
    return found


def extrapolate(costs: dict[str, Cost]) -> dict[str, dict[str, float]]:
    """Return the cores that fleets take, without their nodes."""
    rate = JOBS_A_DAY / 86_400
    return {
        name: {
            part: round(c.base + nodes * (c.per_node + rate * c.per_job), 2) for part, c in costs.items() if part != "nodes"
        }
        for name, nodes in NODES.items()
    }  # fmt: skip


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
    owner = {
        name: fleet.started[0 if number == 0 else 1 + (number - 1) // NODES_OF_PROCESS * NODES_OF_PROCESS]
        for number, name in enumerate(fleet.names)
    }
    connect = times([fleet.ups[name][0][0] - owner[name] for name in fleet.names])
    time.sleep(10)
    with fleet.span(spans, "idle"):
        time.sleep(options.idle_s)
    before = Counter(fleet.ear.counts)
    with fleet.span(spans, "jobs"):
        work.submit()
        work.wait()
    made = {
        kind: round((n - before[kind]) / options.jobs, 2) for kind, n in sorted(fleet.ear.counts.items()) if "job" in kind or "ack" in kind
    }
    time.sleep(5)
    ended, lost, double, late = work.count()
    ear = fleet.ear
    both = {job: (at, ear.accepted[job] - at) for job, at in ear.offered.items() if job in ear.accepted}
    calm = [took for at, took in both.values() if not any(since < at < until for since, until in work.away)]
    acknowledged = [ear.acknowledged[message] - at for message, at in ear.told.items() if message in ear.acknowledged]
    report = {"nodes": options.nodes, "jobs": options.jobs}
    costs = cost(spans, report)
    return Report(
        datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(), f"{device_name('cpu')}, {os.cpu_count()} cores",
        "nodes, ear and what is measured share the cores" + (f"; {options.note}" if options.note else ""), versions(),
        _version_of_broker(), "sqlite" if fleet.postgres is None else f"postgresql {fleet.ask('SHOW server_version')[0][0]}", options.tls,
        options.coordinators, options.nodes, options.jobs, options.rate,
        f"trainers: a run takes {options.run_s[0]:g} to {options.run_s[1]:g} s, drawn evenly, and leaves {options.adapter_bytes} random bytes; "
        f"{NODES_OF_PROCESS} agents share a process; their databases are in {options.nodes_directory or 'the temporary directory'}",
        FRESH_BOOT_S if options.fresh else 0.0, connect, round(known_s, 1), times([took for _, took in both.values()]), times(calm),
        times(acknowledged), round(work.broker_back_s, 1), work.taken_over_s, made, ended, lost, double, late, spans, costs,
        extrapolate(costs), JOBS_A_DAY,
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
    parser.add_argument("--no-strikes", dest="strikes", action="store_false")
    parser.add_argument("--not-fresh", dest="fresh", action="store_false", help="nodes connect at once, without the start jitter")
    parser.add_argument("--nodes-directory", help="where the nodes' directories are made")
    parser.add_argument("--keep", action="store_true", help="leave logs and databases in the temporary directory")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--note", default="", help="what is to be known of the machine")
    parser.add_argument("--out", type=Path, default=RESULTS / "fleet.json")
    options = parser.parse_args()
    with ExitStack() as ends:
        report = run(options, ends)
    options.out.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    wrong = [
        text for text, bad in (
            (f"{report.lost} jobs lost", report.lost), (f"{report.double} jobs double", report.double),
            (f"the last node was connected after {report.connect_s.longest_s:.1f} s", report.connect_s.longest_s > report.start_jitter_s + MOST_CONNECT_S),
            (f"95 % of offers accepted within {report.accepted_s.p95_s:.3f} s", report.accepted_s.p95_s >= MOST_ACCEPT_S),
        ) if bad
    ]  # fmt: skip
    print(msgspec.json.format(msgspec.json.encode(report)).decode())
    if wrong:
        raise SystemExit("; ".join(wrong))


if __name__ == "__main__":
    main()
