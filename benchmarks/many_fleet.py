"""A fleet for benchmarks and tests: Mosquitto, coordinators that share the work or one alone, and many nodes, on loopback.

Of the nodes only the trainers are simulated (many_nodes.py); the first one has a process of its own.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import paho.mqtt.client as paho
import psutil
from small_fleet import JOB, RECORDS, SERVERS, free_port

from edge_agent.coordinator.client import Answered, Client
from edge_agent.enrolment import Authority
from edge_agent.errors import CoordinatorUnreachable
from edge_agent.job_building import build_job
from edge_agent.messages import new_id

ROOT = Path(__file__).parent.parent
FLEET = "lab"
NODES_OF_PROCESS = 100
INSTANCES = ("main", "second", "third", "fourth")
BROKER_AWAY_S = 2.0
RECORDS_OF_JOB = 40
"""Some 4 KiB, inside of the offer."""
MESSAGE = re.compile(rb'"id":"([0-9a-z]{26})"')


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
        self._roots: list[tuple[int, str]] = []
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
        self._roots.append((pid, part))

    def look(self) -> dict[str, float]:
        """Return the processor seconds of each part since the beginning."""
        with self._lock:
            now: dict[int, tuple[str, float]] = {}
            memory: Counter[str] = Counter()
            pids = [(process.pid, self._of[name]) for name, process in self._processes.items() if process.poll() is None]
            for pid, part in self._roots:
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
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
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
            self.until(f"coordinator {name}", lambda name=name: self.answers(name), 90)
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
            own = f"{self.certificates}/127.0.0.1"
            text += f"cafile {self.certificates}/ca.pem\ncertfile {own}.pem\nkeyfile {own}.key\nrequire_certificate true\n"
            text += "allow_anonymous false\nuse_identity_as_username true\nuse_username_as_clientid true\n"
            text += f"acl_file {self.directory}/acl\n"
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

    def answers(self, instance: str) -> bool:
        """Whether a coordinator answers; raises what says that it does not."""
        return self.listens(instance) and self.clients[instance].jobs(1) is not None

    def listens(self, instance: str) -> bool:
        """Whether there is somebody at a coordinator's socket."""
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.directory / instance / "api.sock")) == 0

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
            command += ["--certificates", str(self.certificates)] if self.certificates else []
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

    def start_of(self, number: int) -> float:
        """When the process of a node had all of its nodes connect, in seconds since 1970."""
        return self.started[number and 1 + (number - 1) // NODES_OF_PROCESS * NODES_OF_PROCESS]

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

    def until(self, what: str, look: Callable[[], bool], deadline_s: float) -> float:
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
        use = {}
        for part in sorted(after):
            cpu_s = after[part] - before.get(part, 0.0)
            use[part] = Use(round(cpu_s, 2), round(cpu_s / seconds, 4), round(self.parts.peaks.get(part, 0.0), 1))
        messages = {kind: round((n - counts[kind]) / seconds, 2) for kind, n in sorted(self.ear.counts.items()) if n > counts[kind]}
        spans[name] = Span(round(seconds, 1), messages, round((self.ear.bytes - size) / 1024 / seconds, 1), use)
        said = ", ".join(f"{part} {u.cores:.2f}" for part, u in use.items())
        print(f"{name}: {seconds:.0f} s, {sum(messages.values()):.0f} messages/s, cores: {said}", file=sys.stderr)


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
                strike = self.kill_broker if number == options.jobs // 4 else self.kill_coordinator
                strikes.append(threading.Thread(target=strike))
                strikes[-1].start()
            time.sleep(max(0.0, began + number / options.rate - time.monotonic()))
            self._hand_in(number)
        for thread in strikes:
            thread.join()

    def _hand_in(self, number: int) -> None:
        """Hand one in, at the next coordinator where one does not answer."""
        instances, node, job = self.fleet.instances, self.fleet.names[number % len(self.fleet.names)], new_id()
        for turn in range(100_000):
            instance = instances[(number + turn) % len(instances)]
            if not self.fleet.listens(instance):
                time.sleep(0.01)
                continue
            client = self.fleet.clients[instance]
            try:
                self.jobs[client.submit(node, self._job, self._files, priority=4, as_id=job).id] = node
                return
            except (CoordinatorUnreachable, Answered) as error:  # it may be there: under its id it is handed in once
                print(f"job {number}: {error}", file=sys.stderr)
                time.sleep(0.2)

    def kill_broker(self) -> None:
        """Kill the broker, start it again, and wait until all nodes are back."""
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

    def kill_coordinator(self) -> None:
        """Kill the coordinator that leads, and start it again a while later."""
        fleet, struck = self.fleet, time.monotonic()
        instance = fleet.leader() or fleet.instances[0]
        fleet.parts.kill(f"coordinator-{instance}")
        if len(fleet.instances) > 1:
            self.taken_over_s = round(fleet.until("another to lead", lambda: fleet.leader() != instance, 60) - struck, 2)
            print(f"coordinator {instance} killed: another leads after {self.taken_over_s} s", file=sys.stderr)
        time.sleep(self.options.away_s if len(fleet.instances) > 1 else 2.0)
        fleet.start_coordinator(instance)
        until = fleet.until(f"coordinator {instance}", lambda: fleet.answers(instance), 120)
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
        twice |= {*found, *at_nodes} - set(self.jobs)
        said = self.fleet.ask("SELECT outcome, reason, min(text), count(*) FROM jobs GROUP BY 1, 2")
        print(f"outcomes: {said}; attempts {Counter(attempts.values())}, nodes {Counter(at_nodes.values())}", file=sys.stderr)
        late = self.fleet.ask("SELECT count(*) FROM history WHERE late = 1")[0][0]
        return len(well & set(self.jobs)), len(set(self.jobs) - well), len(twice), int(late)
