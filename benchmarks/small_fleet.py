"""A fleet for benchmarks: a Mosquitto that keeps nothing on disk, a coordinator and a node, as real processes on loopback.

Its jobs are short, a real trainer of the tiny model for three updates: most of a job is its interpreter's start. Their dataset and their
adapters travel in blocks.
"""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path

import msgspec
import psutil

from edge_agent.coordinator.client import Answered, Client
from edge_agent.errors import CoordinatorUnreachable
from edge_agent.job_building import build_job

MODEL = Path(__file__).parent.parent / "edge_agent" / "demo" / "tiny"
NODE = "node-1"
JOB = {
    "budget_bytes": 2**30, "method.name": "sft", "evaluation.questions": 0, "sampling.outputs": 0, "schedule.batch": 4,
    "schedule.updates": 3, "schedule.checkpoint_s": 0, "device": "cpu", "dataset.limit": 12,
}  # fmt: skip
RECORDS = "".join(
    msgspec.json.encode(
        {"id": f"q{n}", "question": f"What is {n} + {n + 1}?", "answer": f"{n} + {n + 1} = {2 * n + 1}\n#### {2 * n + 1}"}
    ).decode()
    + "\n"
    for n in range(1200)
)
AGENT, COORDINATOR = ("-m", "edge_agent", "run"), ("-m", "edge_agent", "coordinator")
SERVERS = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])


class Cable:
    """A TCP connection from clients to the broker that can be cut."""

    def __init__(self, port: int) -> None:
        self._broker = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._cut = threading.Event()
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, seconds: float) -> None:
        """End all connections, and take none for a time."""
        self._cut.set()
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        time.sleep(seconds)
        self._cut.clear()

    def _accept(self) -> None:
        while True:
            with suppress(OSError):
                client, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            if self._cut.is_set():
                return
            with suppress(OSError), socket.create_connection(("127.0.0.1", self._broker), timeout=5) as broker:
                broker.settimeout(None)
                self._open |= {client, broker}
                back = threading.Thread(target=self._pass, args=(broker, client), daemon=True)
                back.start()
                self._pass(client, broker)
                back.join()
                self._open -= {client, broker}

    @staticmethod
    def _pass(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class SmallFleet:
    """The processes."""

    def __init__(
        self, agent: Sequence[str] | None = AGENT, coordinator: Sequence[str] = COORDINATOR, settings: str = "",
        coordinator_settings: str = "", protocol: str = "auto",
    ) -> None:  # fmt: skip
        """`agent` and `coordinator` are the commands of Python that are these, the settings more lines of their configurations.

        Without an agent there is no node. `protocol` is the version of MQTT that they speak.
        """
        self.directory = Path(tempfile.mkdtemp(prefix="ea-fleet-"))
        self.data = self.directory / "data.jsonl"
        self.data.write_text(RECORDS)
        self._commands = {"coordinator": coordinator} | ({"agent": agent} if agent else {})
        self._broker_port = free_port()
        self.cable = Cable(self._broker_port)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.most_trainers = 0
        link = f'[broker]\nport = {self.cable.port}\nkeepalive_s = 10\nprotocol = "{protocol}"\n'
        (self.directory / "agent.toml").write_text(
            f'node = "{NODE}"\nstate_directory = "node"\nbudget = "1GiB"\nthreads = 1\nmax_attempts = 1000\ndevice = "cpu"\n{settings}'
            f'[models]\ntiny = "{MODEL}"\n{link}'
        )
        (self.directory / "coordinator.toml").write_text(f'state_directory = "coordinator"\n{link}{coordinator_settings}')
        (self.directory / "mosquitto.conf").write_text(
            f"listener {self._broker_port} 127.0.0.1\nuser root\nallow_anonymous true\npersistence false\n"
        )
        self.client = Client.local(self.directory / "coordinator")
        for name in ("broker", *self._commands):
            self.start(name)
        self.port = self._broker_port
        if agent:
            until("the node", lambda: any(node.present for node in self.client.nodes()), 60)
        else:
            until("the coordinator", lambda: not self.client.nodes(), 60)

    def submit(self, seed: int) -> str:
        """Hand in a short job."""
        job = build_job("tiny", self.data, None, JOB | {"seed": seed}, [])
        return self.client.submit(NODE, job, {job.dataset.sha256: self.data}, priority=4).id

    def start(self, name: str) -> None:
        mosquitto = shutil.which("mosquitto", path=SERVERS)
        if mosquitto is None:
            raise SystemExit("mosquitto is not installed")
        if name == "broker":
            command = [mosquitto, "-c", str(self.directory / "mosquitto.conf")]
        else:
            command = [sys.executable, *self._commands[name], "--config", str(self.directory / f"{name}.toml")]
        with (self.directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self, name: str) -> None:
        process = self._processes[name]
        process.kill()
        process.wait()

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def alive(self, name: str) -> bool:
        return self._processes[name].poll() is None

    def trainers(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                line = process.cmdline()
                if "train" in line and any(part.startswith(str(self.directory)) for part in line):
                    found.append(process)
        self.most_trainers = max(self.most_trainers, len(found))
        return found

    def outbox(self) -> int:
        with closing(sqlite3.connect(f"file:{self.directory}/node/agent.sqlite?mode=ro", uri=True)) as db:
            return int(db.execute("SELECT count(*) FROM outbox").fetchone()[0])

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text(errors="replace")

    def close(self) -> None:
        for process in reversed(self._processes.values()):
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.client.__exit__()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(what: str, look: Callable[[], bool], deadline_s: float) -> None:
    """Wait for a true answer, also of a coordinator that is not there; ends the benchmark at the deadline."""
    deadline = time.monotonic() + deadline_s
    while True:
        with suppress(CoordinatorUnreachable, Answered):
            if look():
                return
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {deadline_s:.0f} s in vain for {what}")
        time.sleep(0.1)
