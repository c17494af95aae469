"""Measures what the daemon costs and how fast it reacts: `python benchmarks/daemon.py` writes benchmarks/results/daemon.json.

A real Mosquitto on loopback with TLS, user name and password, the daemon as `python -m edge_agent run`, and a coordinator's part played
by this program: it publishes offers and acknowledges what the daemon says. Every start of the daemon gives its time to be connected (as
another client of the broker sees it, and by the daemon's own log), its memory some time after, and its share of a core while it is idle;
the last one then gets offers, each of which is canceled as soon as its trainer exists. About 9 minutes; `--quick` takes less than one.
Does not cover networks, GPUs, and what the trainer does after its process exists.
"""

from __future__ import annotations

import argparse
import datetime
import getpass
import hashlib
import ipaddress
import os
import platform
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from queue import Empty, SimpleQueue
from statistics import median
from threading import Thread
from typing import Any

import msgspec
import paho.mqtt.client as paho
import psutil
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from paho.mqtt.enums import CallbackAPIVersion
from rich.console import Console
from rich.table import Table

from edge_agent.job import Dataset, Job
from edge_agent.messages import Ack, Cancel, File, Hello, JobResult, JobStatus, Message, NodeState, Offer, Order, decode, encode, new_id
from edge_agent.signing import seal
from edge_agent.topics import coordinator_subscriptions, down, split
from profiles.device import device_name

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "daemon.json"
MODEL = ROOT / "edge_agent" / "demo" / "tiny"
FLEET, NODE, SOURCE = "bench", "node", "edge1/bench/coordinator/bench"
SERVERS = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
DEADLINE_S = 120.0
POLL_S = 0.001
RECORDS = b"".join(b'{"question": "What is %d + %d?", "answer": "%d"}\n' % (n, n + 1, 2 * n + 1) for n in range(100))
KINDS: dict[str, type] = {"hello": Hello, "state": NodeState, "status": JobStatus, "result": JobResult}


@dataclass(frozen=True)
class Measure:
    """What is measured, in which unit, and the target it is held against: (value, whether the interpreter's own start comes on top)."""

    text: str
    unit: str
    target: float | None = None
    plus_interpreter: bool = False
    digits: int = 1


MEASURES = {
    "rss_mib": Measure("memory of the idle daemon, resident (RSS)", "MiB", 45),
    "pss_mib": Measure("memory of the idle daemon, shared pages counted in part (PSS)", "MiB", 45),
    "idle_cpu_percent": Measure("processor time of the idle daemon, of one core", "%", 0.5, digits=3),
    "connected_s": Measure("from exec until the broker's other client sees it ready", "s", 1, digits=3),
    "connected_by_log_s": Measure("from exec until its log says connected", "s", 1, digits=3),
    "trainer_ms": Measure("from publishing an offer until the trainer's process exists", "ms", 200, plus_interpreter=True),
    "running_told_ms": Measure("from publishing an offer until the status `running` is heard", "ms"),
    "interpreter_ms": Measure("`python -c pass`, for comparison", "ms"),
}


@dataclass
class Values:
    """What was measured, by the names of MEASURES."""

    lists: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in MEASURES})

    def add(self, name: str, value: float) -> None:
        self.lists[name].append(round(value, 4))


# the broker


def write_certificates(directory: Path) -> None:
    """Write ca.pem, and server.pem with server.key for 127.0.0.1, valid for a day."""
    now = datetime.datetime.now(tz=datetime.timezone.utc)
    ca_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name, server_name = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("benchmark CA", "localhost"))

    def certificate(name: x509.Name, key: ec.EllipticCurvePrivateKey, *extensions: tuple[x509.ExtensionType, bool]) -> x509.Certificate:
        builder = x509.CertificateBuilder(
            ca_name, name, key.public_key(), x509.random_serial_number(),
            now - datetime.timedelta(hours=1), now + datetime.timedelta(days=1),
        )  # fmt: skip
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
        for extension, critical in (*extensions, (authority, False), (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)):
            builder = builder.add_extension(extension, critical)
        return builder.sign(ca_key, SHA256())

    use = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign", "encipher_only", "decipher_only"),
        False,
    )
    may_sign = x509.KeyUsage(digital_signature=False, key_cert_sign=True, **use)
    ca = certificate(ca_name, ca_key, (x509.BasicConstraints(ca=True, path_length=0), True), (may_sign, True))
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")])
    server = certificate(server_name, server_key, (x509.BasicConstraints(ca=False, path_length=None), True), (here, False))
    (directory / "ca.pem").write_bytes(ca.public_bytes(Encoding.PEM))
    (directory / "server.pem").write_bytes(server.public_bytes(Encoding.PEM))
    (directory / "server.key").write_bytes(server_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def program(name: str) -> str:
    found = shutil.which(name, path=SERVERS)
    if found is None:
        sys.exit(f"{name} is not installed; install the package mosquitto")
    return found


@contextmanager
def broker(directory: Path) -> Iterator[int]:
    """A Mosquitto with TLS that knows the users `node` and `coordinator`; yields its port."""
    write_certificates(directory)
    passwords = directory / "passwords"
    passwords.write_text("".join(f"{user}:secret of {user}\n" for user in ("node", "coordinator")))
    passwords.chmod(0o600)
    subprocess.run([program("mosquitto_passwd"), "-U", str(passwords)], check=True, timeout=DEADLINE_S)  # noqa: S603
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = directory / "mosquitto.conf"
    settings.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous false\npassword_file {passwords}\ncertfile {directory / 'server.pem'}\n"
        f"keyfile {directory / 'server.key'}\npersistence false\nuser {getpass.getuser()}\n"
    )
    with subprocess.Popen([program("mosquitto"), "-c", str(settings)], stderr=subprocess.DEVNULL) as process:  # noqa: S603
        try:
            until("the broker", lambda: answers(port))
            yield port
        finally:
            process.terminate()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(what: str, happened: Callable[[], Any], pause_s: float = 0.01) -> Any:
    """Return the first true answer. Ends the benchmark at the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := happened()):
        if time.monotonic() > deadline:
            sys.exit(f"waited {DEADLINE_S:.0f} s in vain for {what}")
        time.sleep(pause_s)
    return found


# the coordinator's part


@dataclass(frozen=True)
class Heard:
    """A message of the node, and when it arrived, on the clock of time.monotonic."""

    at: float
    job: str | None
    data: object


class StandIn:
    """Hears the node and acknowledges, as a coordinator that stores everything at once would."""

    def __init__(self, port: int, ca_file: Path) -> None:
        self._heard: SimpleQueue[Heard] = SimpleQueue()
        self._subscribed = False
        self._client = paho.Client(CallbackAPIVersion.VERSION2, "coordinator-bench", protocol=paho.MQTTv5)
        self._client.tls_set_context(ssl.create_default_context(cafile=ca_file))
        self._client.username_pw_set("coordinator", "secret of coordinator")
        self._client.on_connect = lambda client, *_: client.subscribe([(topic, 1) for topic in coordinator_subscriptions(FLEET)])
        self._client.on_subscribe = self._granted
        self._client.on_message = self._message
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        until("the subscription", lambda: self._subscribed)

    def _granted(self, *_: object) -> None:
        self._subscribed = True

    def _message(self, _c: paho.Client, _u: object, message: paho.MQTTMessage) -> None:
        at = time.monotonic()
        _, parts = split(message.topic)
        kind = KINDS.get(parts[-1])
        if kind is None or not message.payload:
            return
        decoded: Message[Any] = decode(bytes(message.payload), kind)
        if kind is not NodeState:
            self.publish(seal(Ack(FLEET, NODE, decoded.id, datetime.datetime.now(datetime.timezone.utc), 0), None), "ack", decoded.id)
        self._heard.put(Heard(at, parts[2] if parts[1] == "job" else None, decoded.data))

    def publish(self, data: object, *parts: object) -> None:
        self._client.publish(down(FLEET, NODE, *parts), encode(data, SOURCE), qos=1)

    def await_message(self, what: str, wanted: Callable[[Heard], bool]) -> Heard:
        """Return the first message that is wanted, passing over those before it."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                heard = self._heard.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                sys.exit(f"waited {DEADLINE_S:.0f} s in vain for {what}")
            if wanted(heard):
                return heard

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


# the daemon


def write_config(directory: Path, port: int) -> Path:
    password = directory / "node.password"
    password.write_text("secret of node\n")
    password.chmod(0o600)
    config = directory / "agent.toml"
    config.write_text(
        f'node = "{NODE}"\nfleet = "{FLEET}"\nstate_directory = "state"\nbudget = "1GiB"\ndevice = "cpu"\nthreads = 1\n'
        f'models = {{ tiny = "{MODEL}" }}\n[broker]\nport = {port}\nusername = "node"\npassword_file = "node.password"\n'
        '[broker.tls]\nca_file = "ca.pem"\n'
    )
    return config


@contextmanager
def daemon(config: Path, stand_in: StandIn, values: Values) -> Iterator[int]:
    """Start the daemon and time it until it is connected; yields its process id."""
    command = [sys.executable, "-m", "edge_agent", "run", "--config", str(config)]
    logged: SimpleQueue[float] = SimpleQueue()
    started = time.monotonic()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603

        def read() -> None:
            for line in process.stderr or ():
                if '"connected ' in line:
                    logged.put(time.monotonic())

        reader = Thread(target=read)
        reader.start()
        try:
            ready = stand_in.await_message("the daemon", lambda heard: isinstance(heard.data, NodeState) and heard.data.state == "ready")
            values.add("connected_s", ready.at - started)
            values.add("connected_by_log_s", logged.get(timeout=DEADLINE_S) - started)
            yield process.pid
            process.send_signal(signal.SIGTERM)
            process.wait(DEADLINE_S)
        finally:
            process.kill()
            reader.join(DEADLINE_S)


def memory_mib(pid: int) -> tuple[float, float]:
    """Return the resident set of a process, and its proportional one, in which a page of n processes counts for 1/n."""
    resident = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    proportional = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    if resident is None or proportional is None:
        sys.exit("the kernel does not tell the memory of a process")
    return int(resident[1]) / 1024, int(proportional[1]) / 1024


def processor_s(pid: int) -> float:
    """Return the processor time that a process has taken, in user mode and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_idle(pid: int, settle_s: float, idle_s: float, values: Values) -> None:
    time.sleep(settle_s)
    resident, proportional = memory_mib(pid)
    values.add("rss_mib", resident)
    values.add("pss_mib", proportional)
    before, since = processor_s(pid), time.monotonic()
    time.sleep(idle_s)
    values.add("idle_cpu_percent", 100 * (processor_s(pid) - before) / (time.monotonic() - since))


def trainer_of(job: str) -> int | None:
    """Return the process id of a job's trainer, by its command line."""
    for pid in psutil.pids():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"train" in command and any(part.endswith(job.encode()) for part in command):
            return int(pid)
    return None


def measure_offer(stand_in: StandIn, number: int, values: Values) -> None:
    """Offer a new job, cancel it as soon as its trainer exists, and wait for the end of both."""
    file = File(hashlib.sha256(RECORDS).hexdigest(), len(RECORDS))
    document = Job(model="tiny", dataset=Dataset(file.sha256), budget_bytes=2**30, seed=number)
    job, now = new_id(), datetime.datetime.now(datetime.timezone.utc)
    until_then = now + datetime.timedelta(hours=1)
    order = Order(id=job, fleet=FLEET, node=NODE, issued=now, expires=until_then, job=document, dataset=file)
    published = time.monotonic()
    stand_in.publish(Offer(seal(order, None), {file.sha256: RECORDS}), "job", job, "offer")
    pid = until("the trainer", lambda: trainer_of(job), POLL_S)
    values.add("trainer_ms", 1000 * (time.monotonic() - published))
    stand_in.publish(seal(Cancel(FLEET, NODE, job), None), "job", job, "cancel")
    running = stand_in.await_message(
        "the status", lambda heard: heard.job == job and isinstance(heard.data, JobStatus) and heard.data.phase == "running"
    )
    values.add("running_told_ms", 1000 * (running.at - published))
    result = stand_in.await_message("the result", lambda heard: heard.job == job and isinstance(heard.data, JobResult)).data
    if not isinstance(result, JobResult) or result.outcome != "canceled":
        sys.exit(f"the job was to be canceled: {result}")
    until("the trainer's end", lambda: not Path(f"/proc/{pid}").exists())


def measure_interpreter(repetitions: int, values: Values) -> None:
    for _ in range(repetitions):
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", "pass"], check=True, timeout=DEADLINE_S)
        values.add("interpreter_ms", 1000 * (time.monotonic() - started))


# the report


def summary(values: Values) -> dict[str, dict[str, Any]]:
    """Return for each measure its median, extremes, single values and target, and whether the median holds it."""
    interpreter_ms = median(values.lists["interpreter_ms"])
    rows: dict[str, dict[str, Any]] = {}
    for name, measure in MEASURES.items():
        found = values.lists[name]
        row: dict[str, Any] = {"what": measure.text, "unit": measure.unit, "median": median(found), "min": min(found), "max": max(found)}
        if measure.target is not None:
            row["target"] = round(measure.target + (interpreter_ms if measure.plus_interpreter else 0.0), 4)
            row["holds"] = row["median"] < row["target"]
        rows[name] = row | {"values": found}
    return rows


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    table = Table("what", "median", "min", "max", "target", "holds")
    for name, row in rows.items():
        digits, unit = MEASURES[name].digits, row["unit"]
        median_, low, high = (f"{row[key]:.{digits}f} {unit}" for key in ("median", "min", "max"))
        target = f"below {row['target']:g} {unit}" if "target" in row else ""
        table.add_row(row["what"], median_, low, high, target, {None: "", True: "yes", False: "NO"}[row.get("holds")])
    Console(width=140).print(table)


def versions() -> dict[str, str]:
    told = subprocess.run([program("mosquitto"), "-h"], capture_output=True, text=True, timeout=DEADLINE_S, check=False).stdout  # noqa: S603
    packages = {name: version(name) for name in ("edge-agent", "paho-mqtt", "msgspec", "psutil")}
    return {"python": platform.python_version()} | packages | {"mosquitto": told.split()[2], "openssl": ssl.OPENSSL_VERSION.split()[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the daemon.")
    parser.add_argument("--starts", type=int, default=5, help="starts of the daemon, each with memory and idle time (5)")
    parser.add_argument("--offers", type=int, default=10, help="offers (10)")
    parser.add_argument("--settle", type=float, default=30.0, help="seconds from connecting to the measurement of memory (30)")
    parser.add_argument("--idle", type=float, default=60.0, help="seconds of idle time over which processor time is counted (60)")
    parser.add_argument("--quick", action="store_true", help="2 starts, 3 offers, 3 s to settle, 5 s idle")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file to write")
    given = parser.parse_args()
    if given.quick:
        given.starts, given.offers, given.settle, given.idle = 2, 3, 3.0, 5.0
    values = Values()
    measure_interpreter(10, values)
    with tempfile.TemporaryDirectory() as name, broker(Path(name)) as port:
        config = write_config(Path(name), port)
        stand_in = StandIn(port, Path(name) / "ca.pem")
        for start in range(given.starts):
            with daemon(config, stand_in, values) as pid:
                measure_idle(pid, given.settle, given.idle, values)
                for number in range(given.offers if start == given.starts - 1 else 0):
                    measure_offer(stand_in, number, values)
        stand_in.close()
    rows = summary(values)
    report = {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "machine": device_name("cpu"),
        "versions": versions(),
        "broker": "mosquitto on loopback, TLS, user name and password",
        "starts": given.starts, "offers": given.offers, "settle_s": given.settle, "idle_s": given.idle,
        "measured": rows,
    }  # fmt: skip
    given.out.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    print_table(rows)


if __name__ == "__main__":
    main()
