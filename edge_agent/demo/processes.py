"""The processes of the demo, on loopback: a broker, a coordinator and a node. All of them end with the demo, however it ends."""

from __future__ import annotations

import ctypes
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from edge_agent.coordinator.client import Client
from edge_agent.coordinator.views import NodeView
from edge_agent.demo.broker import broker_command
from edge_agent.errors import CoordinatorUnreachable, DemoFailed

NODE = "demo-node"
MODEL = "tiny"
START_S, STOP_S = 60.0, 20.0
_PR_SET_PDEATHSIG = 1


class Processes:
    """Context manager: everything runs inside it, nothing after it. `logs` is where the processes write."""

    def __init__(self, model: Path, budget: str, logs: Path) -> None:
        self._model, self._budget, self._logs = model, budget, logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._stack = ExitStack()
        self.broker = ""

    def __enter__(self) -> Processes:
        with self._stack:
            self._directory = Path(tempfile.mkdtemp(prefix="edge-agent-demo-"))
            self._stack.callback(shutil.rmtree, self._directory, ignore_errors=True)
            self._logs.mkdir(parents=True, exist_ok=True)
            self._start_all()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _start_all(self) -> None:
        port = _free_port()
        self.broker, command = broker_command(self._directory, port)
        link = f'[broker]\nport = {port}\nprotocol = "{"auto" if self.broker == "mosquitto" else "3.1.1"}"\n'
        coordinator = f'state_directory = "coordinator"\n{link}'
        agent = (
            f'node = "{NODE}"\nstate_directory = "node"\nbudget = "{self._budget}"\ndevice = "cpu"\n'
            f"threads = 1  # a model this small is slower on more, and on GPUs\n[models]\n{MODEL} = {str(self._model)!r}\n{link}"
        )
        for name, text in (("coordinator", coordinator), ("agent", agent)):
            (self._directory / f"{name}.toml").write_text(text, encoding="utf-8")
        self._start("broker", command)
        self._wait("broker", lambda: _answers(port))
        this = [sys.executable, "-m", "edge_agent"]
        self._start("coordinator", [*this, "coordinator", "--config", str(self._directory / "coordinator.toml")])
        self._start("agent", [*this, "run", "--config", str(self._directory / "agent.toml")])
        self.client = self._stack.enter_context(Client.local(self._directory / "coordinator"))
        self._wait("coordinator", lambda: self._nodes() is not None)
        self._wait("agent", lambda: any(n.id == NODE and n.present for n in self._nodes() or []))

    def _nodes(self) -> list[NodeView] | None:
        try:
            return self.client.nodes()
        except CoordinatorUnreachable:
            return None

    def _start(self, name: str, command: list[str]) -> None:
        with (self._logs / f"{name}.log").open("wb") as log:
            # A session of its own: Ctrl-C reaches the demo alone, which ends the others in order.
            process = subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=_die_with_parent
            )  # fmt: skip
        self._running[name] = process
        self._stack.callback(_end, process)

    def _wait(self, name: str, ready: object) -> None:
        deadline = time.monotonic() + START_S
        while not ready():  # type: ignore[operator]
            if self._running[name].poll() is not None or time.monotonic() > deadline:
                words = (self._logs / f"{name}.log").read_text(encoding="utf-8", errors="replace")
                raise DemoFailed(f"the {name} did not start; {self._logs / name}.log ends with: {words[-600:].strip()}")
            time.sleep(0.05)

    def check(self) -> None:
        """Raise DemoFailed where a process has ended."""
        for name, process in self._running.items():
            if process.poll() is not None:
                raise DemoFailed(f"the {name} ended with code {process.returncode}; see {self._logs / name}.log")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def _die_with_parent() -> None:
    """Runs in the child before its program: the kernel ends it if the demo is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
