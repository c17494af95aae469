"""A fleet for tests, of real processes on loopback: a broker with TLS and passwords, a coordinator, a node, and ears on everything.

Every message that passes the broker is held against docs/asyncapi.yaml, and at no moment may two trainers of a node run.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import paho.mqtt.client as paho
import psutil
from conftest import TINY, write_domain
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jsonschema import Draft202012Validator
from orders import NODE
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edge_agent.asyncapi import channel_of, schema_of
from edge_agent.coordinator.client import Client
from edge_agent.coordinator.views import JobView
from edge_agent.job_building import build_job
from edge_agent.messages import Ack, Addressed, encode
from edge_agent.signing import make_key, read_private_key, seal
from edge_agent.topics import down

DEADLINE_S = 120.0
BUDGET = 2 * 2**30
"""So much that a job runs as asked with PyTorch's CUDA build too, and whatever the jobs before it have taught the node."""
PROTOCOL = os.environ.get("EDGE_AGENT_TEST_PROTOCOL", "auto")
"""Of MQTT, where a test does not say."""
MOSQUITTO = shutil.which("mosquitto", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"]))
# Some 10 seconds of work, with dropout, a checkpoint after every update.
QUICK = {
    "evaluation.questions": 10, "evaluation.max_new_tokens": 60, "schedule.learning_rate": 0.002, "schedule.batch": 12,
    "schedule.updates": 8, "schedule.checkpoint_s": 0, "lora.dropout": 0.05, "sampling.outputs": 2,
}  # fmt: skip

T = TypeVar("T")


def wait_for(what: str, look: Callable[[], T | None], deadline_s: float = DEADLINE_S) -> T:
    """Return the first true value of `look`; fails the test at the deadline."""
    deadline = time.monotonic() + deadline_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited {deadline_s:.0f} s in vain for: {what}"
        time.sleep(0.05)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def open_broker(directory: Path, *settings: str) -> Iterator[int]:
    """Run a Mosquitto that lets everybody in; yield its port on loopback."""
    assert MOSQUITTO, "mosquitto is not installed; .ci/run installs it"
    port, log = free_port(), directory / "broker.log"
    lines = (f"listener {port} 127.0.0.1", "user root", "allow_anonymous true", *settings)
    (directory / "mosquitto.conf").write_text("".join(f"{line}\n" for line in lines))
    with log.open("wb") as out, subprocess.Popen([MOSQUITTO, "-c", str(directory / "mosquitto.conf")], stdout=out, stderr=out) as broker:
        try:
            wait_for("the broker", lambda: "running" in log.read_text())
            yield port
        finally:
            broker.terminate()


class Fleet:
    """Owns the processes. `secure`: TLS, passwords, signed orders; `amqtt`: a broker of MQTT 3.1.1 only, the agent's within a WebSocket."""

    def __init__(
        self, *, secure: bool = False, amqtt: bool = False, agent: str = "", protocol: str = PROTOCOL, coordinator: str = ""
    ) -> None:
        # Sockets have short paths; those of pytest are long.
        self.directory = Path(tempfile.mkdtemp(prefix="ea-"))
        self.port, self._websocket_port = free_port(), free_port()
        self._secure, self._amqtt, self._five = secure, amqtt, protocol != "3.1.1" and not amqtt
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._spoken: set[bytes] = set()
        self.messages: list[tuple[float, str, bytes]] = []
        self._lives: list[tuple[str, bytes, int | None]] = []
        """Topic and payload of every message, and after how many seconds it was to expire."""
        self.trainers_at_once = 0
        self._closing = threading.Event()
        if secure:
            write_certificates(self.directory)
            for user in ("agent", "coordinator", "ear"):
                secret = self.directory / f"{user}.password"
                secret.write_text(f"secret of {user}\n")
                secret.chmod(0o600)
            (self.directory / "trusted_keys").write_text(make_key(self.directory / "signing.key", "the tests").line + "\n")
            agent += '[trust]\nkeys_file = "trusted_keys"\n'
        signing = 'signing_key_file = "signing.key"\n' if secure else ""
        for name, text in (("agent", self._agent_toml(agent)), ("coordinator", f'state_directory = "coordinator"\n{signing}{coordinator}')):
            (self.directory / f"{name}.toml").write_text(text + self._broker_toml(name, protocol))
        self.client = Client.local(self.directory / "coordinator")

    @staticmethod
    def _agent_toml(more: str) -> str:
        own = f'node = "{NODE}"\nlabels = {{ site = "bench" }}\nstate_directory = "node"\nbudget = "{BUDGET}"\nthreads = 1\n'
        return f'{own}{more}\n[models]\ntiny = "{TINY}"\n'

    def _broker_toml(self, user: str, protocol: str) -> str:
        websocket = self._amqtt and user == "agent"
        text = f'[broker]\nport = {self._websocket_port if websocket else self.port}\nprotocol = "{protocol}"\nkeepalive_s = 10\n'
        if websocket:
            text += 'websocket_path = "/mqtt"\n'
        if self._secure:
            text += f'username = "{user}"\npassword_file = "{user}.password"\n[broker.tls]\nca_file = "ca.pem"\n'
        return text

    def __enter__(self) -> Fleet:
        self.start_broker()
        self._listen()
        threading.Thread(target=self._count_trainers, daemon=True).start()
        self.start_coordinator()
        self.start_agent()
        wait_for("the node at the coordinator", self.present)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self.ear.disconnect()
        self.ear.loop_stop()
        for name in ("agent", "coordinator", "broker"):
            self.stop(name)
        self.client.__exit__()
        shutil.rmtree(self.directory)

    # processes

    def start_broker(self) -> None:
        settings = self.directory / "mosquitto.conf"
        if self._amqtt:
            command = [sys.executable, str(Path(__file__).parent / "websocket_broker.py"), str(self.port), str(self._websocket_port)]
        else:
            assert MOSQUITTO, "mosquitto is not installed; .ci/run installs it"
            text = f"listener {self.port} 127.0.0.1\nuser root\n"
            if self._secure:
                passwords = "".join(f"{user}:secret of {user}\n" for user in ("agent", "coordinator", "ear"))
                (self.directory / "passwords").write_text(passwords)
                (self.directory / "passwords").chmod(0o600)
                subprocess.run(["mosquitto_passwd", "-U", str(self.directory / "passwords")], check=True, timeout=30)
                files = {"password_file": "passwords", "certfile": "server.pem", "keyfile": "server.key"}
                text += "".join(f"{name} {self.directory / file}\n" for name, file in files.items())
            else:
                text += "allow_anonymous true\n"
            settings.write_text(text)
            command = [MOSQUITTO, "-c", str(settings)]
        self._start("broker", command)
        wait_for("the broker", self._broker_answers)

    def _broker_answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return True
        except OSError:
            return False

    def start_coordinator(self, command: Sequence[str] = ("-m", "edge_agent", "coordinator")) -> None:
        """Start the coordinator; with a command of Python, that instead."""
        self.start("coordinator", command)
        wait_for("the coordinator's socket", self._coordinator_answers)

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a daemon, and wait for nothing."""
        self._start(name, [sys.executable, *command, "--config", str(self.config(name))])

    def _coordinator_answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:  # httpx leaves a socket open where nobody listens
            return probe.connect_ex(str(self.directory / "coordinator" / "api.sock")) == 0

    def start_agent(self, command: Sequence[str] = ("-m", "edge_agent", "run")) -> None:
        """Start the agent; with a command of Python, that instead."""
        self.start("agent", command)

    @property
    def key(self) -> Ed25519PrivateKey:
        """What signs the orders of a secure fleet."""
        return read_private_key(self.directory / "signing.key")

    def present(self) -> bool:
        return any(node.id == NODE and node.present for node in self.client.nodes())

    def config(self, name: str) -> Path:
        return self.directory / f"{name}.toml"

    def _start(self, name: str, command: list[str]) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def stop(self, name: str, number: int = signal.SIGTERM) -> int:
        """End a process by a signal and return its exit code."""
        process = self._processes.pop(name, None)
        if process is None:
            return 0
        process.send_signal(number)
        try:
            return process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise

    def alive(self, name: str) -> bool:
        return self._processes[name].poll() is None

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    # jobs

    def submit(self, data: Path, questions: Path | None = None, **fields: Any) -> JobView:
        """Submit a quick job on this fleet's node."""
        chosen = {"budget_bytes": BUDGET, "method.name": "nlft"} | QUICK | {k.replace("__", "."): v for k, v in fields.items()}
        job = build_job("tiny", data, questions, chosen, [])
        files = {job.dataset.sha256: data}
        if questions is not None:
            files[str(job.dataset.evaluation_sha256)] = questions
        return self.client.submit(NODE, job, files, priority=4)

    def data(self, name: str = "data", count: int = 24, seed: int = 5) -> Path:
        return write_domain(self.directory / f"{name}.jsonl", "chain", count, seed)

    def ended(self, job: str, deadline_s: float = DEADLINE_S) -> JobView:
        """Wait for the end of a job."""

        def look() -> JobView | None:
            view = self.client.job(job)
            return view if view.phase == "ended" else None

        return wait_for(f"the end of {job}\n{self.log('agent')[-2000:]}", look, deadline_s)

    def trained(self, job: str, updates: int) -> None:
        """Wait until the trainer of a job has done some updates."""
        events = self.directory / "node" / "jobs" / job / "events.jsonl"

        def look() -> bool:
            lines = events.read_text().rpartition("\n")[0].splitlines() if events.exists() else []
            return any(e["event"] == "progress" and e["stage"] == "train" and e["done"] >= updates for e in map(json.loads, lines))

        wait_for(f"update {updates} of {job}", look)

    def adapter(self, job: str) -> bytes:
        """Fetch a job's adapter."""
        out = self.directory / f"fetched-{job}"
        self.client.fetch(job, out)
        return (out / "adapter" / "adapter_model.safetensors").read_bytes()

    def trainers(self) -> list[psutil.Process]:
        """The trainers of this fleet's node that run now."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, psutil.NoSuchProcess):
                line = (place / "cmdline").read_bytes()
                if b"\0train\0" in line and str(self.directory).encode() in line:
                    found.append(psutil.Process(int(place.name)))
        return found

    def _count_trainers(self) -> None:
        while not self._closing.wait(0.2):
            self.trainers_at_once = max(self.trainers_at_once, len(self.trainers()))

    # messages

    def _listen(self) -> None:
        version = MQTTProtocolVersion.MQTTv311 if self._amqtt else MQTTProtocolVersion.MQTTv5
        self.ear = paho.Client(CallbackAPIVersion.VERSION2, "ear", protocol=version)
        self.ear.max_inflight_messages_set(100)
        if self._secure:
            self.ear.tls_set(ca_certs=str(self.directory / "ca.pem"), cert_reqs=ssl.CERT_REQUIRED)
            self.ear.username_pw_set("ear", "secret of ear")
        self.ear.on_message = self._hear
        self.ear.on_connect = lambda client, *_: client.subscribe("edge1/#", 1)
        self.ear.reconnect_delay_set(1, 1)
        self.ear.connect("127.0.0.1", self.port)
        self.ear.loop_start()
        wait_for("the ear", self.ear.is_connected)

    def _hear(self, _c: paho.Client, _u: object, message: paho.MQTTMessage) -> None:
        topic, payload = message.topic, bytes(message.payload)
        self._lives.append((topic, payload, getattr(message.properties, "MessageExpiryInterval", None)))
        self.messages.append((time.monotonic(), topic, payload))

    def publish(self, data: object, *parts: object) -> None:
        """Speak as a coordinator would."""
        self.speak(down("default", NODE, *parts), data if isinstance(data, bytes) else encode(data, "test"))

    def control(self, payload: Addressed, *parts: object) -> None:
        """Likewise, signed where the node asks for that."""
        self.publish(seal(payload, self.key if self._secure else None), *parts)

    def speak(self, topic: str, payload: bytes, retain: bool = False) -> None:
        """Publish anything anywhere; it is not held against the contract."""
        self._spoken.add(payload)
        self.ear.publish(topic, payload, 1, retain).wait_for_publish(10)

    def acknowledge(self, job: str) -> None:
        """Acknowledge all that the node has said of a job, as the coordinator does for its own jobs."""
        for kind in ("status", "result"):
            for message in {m["id"] for m in self.heard("job", job, kind)}:
                self.control(Ack("default", NODE, message, datetime.datetime.now(datetime.timezone.utc), 0), "ack", message)

    def heard(self, *parts: str) -> list[Any]:
        """Messages of the node whose topic ends with these parts, decoded."""
        tail = "/".join(("", NODE, "up", *parts))
        return [json.loads(payload) for _, topic, payload in list(self.messages) if topic.endswith(tail)]

    def check_messages(self) -> int:
        """Hold every message but those of the test itself against the contract; return how many there were."""
        validators: dict[str, Draft202012Validator] = {}
        for _, topic, payload in list(self.messages):
            if payload in self._spoken or not payload:
                continue
            schema = schema_of(topic)
            if schema is not None:
                key = json.dumps(schema, sort_keys=True)
                validators.setdefault(key, Draft202012Validator(schema)).validate(json.loads(payload))
        for topic, payload, life_s in list(self._lives):
            if payload not in self._spoken:
                life = channel_of(topic).life if self._five else None
                longest_s = life["maximum"] if isinstance(life, dict) else life
                assert (life_s is None) == (longest_s is None), (topic, life_s, life)
                assert life_s is None or longest_s is None or 0 < life_s <= longest_s, (topic, life_s, life)
        return len(self.messages)


def write_certificates(directory: Path) -> None:
    """Write ca.pem, and server.pem with server.key for 127.0.0.1."""
    now = datetime.datetime.now(datetime.timezone.utc)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test authority")])

    def builder(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder().subject_name(subject).issuer_name(ca_name).public_key(public)
            .serial_number(x509.random_serial_number()).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
        )  # fmt: skip

    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    ca = builder(ca_name, ca_key.public_key()).add_extension(x509.BasicConstraints(True, 0), True).add_extension(usage, True)
    identifier = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    ca_certificate = ca.add_extension(identifier, False).sign(ca_key, hashes.SHA256())
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")])
    server = builder(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")]), key.public_key()).add_extension(names, False)
    authority = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
    server_certificate = server.add_extension(authority, False).sign(ca_key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    (directory / "ca.pem").write_bytes(ca_certificate.public_bytes(pem))
    (directory / "server.pem").write_bytes(server_certificate.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (directory / "server.key").write_bytes(private)
    (directory / "server.key").chmod(0o600)
