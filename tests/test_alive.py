"""Whether a daemon lives is said by what it does: real daemons that work, hang, die and end in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Cli
from fleet import free_port, wait_for

from edge_agent import alive
from edge_agent.alive import Sign, look
from edge_agent.errors import NotAlive


@contextmanager
def _daemon(directory: Path, command: str, config: str) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon whose broker is away, and its state in `state/`."""
    file = directory / "daemon.toml"
    file.write_text(f'state_directory = "state"\n{config}\n[broker]\nport = {free_port()}\n')
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "edge_agent", command, "--config", str(file)], stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _sign(directory: Path) -> Sign | None:
    try:
        return look(directory)
    except NotAlive:
        return None


def test_agent_that_works_hangs_and_dies(tmp_path: Path, cold_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives without a broker; not when its loop stands still, nor when it is dead, and its last sign is fresh."""
    state = tmp_path / "state"
    health = "health", "node", "--config", str(tmp_path / "daemon.toml")
    with _daemon(tmp_path, "run", 'node = "bench-3"\nbudget = "1GiB"\n[models]') as process:
        sign = wait_for("a sign of life", lambda: _sign(state))
        assert (sign.process, sign.connected) == (process.pid, False)
        ran = cold_cli(*health)
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.endswith("; no connection to the broker\n")
        process.send_signal(signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr(alive, "STALE_S", 1.0)
            wait_for("it to be told that it hangs", lambda: _sign(state) is None)
            with pytest.raises(NotAlive, match=rf"the loop of its agent, process {process.pid}, last turned \d+ s ago"):
                look(state)
        process.kill()
        process.wait()
        ran = cold_cli(*health)
        assert (ran.code, ran.out) == (1, "")
        assert ran.err.startswith(f"error not_alive: state directory {state}: its agent, process {process.pid}, has died;")


def test_agent_that_ends_in_order_takes_its_sign_away(tmp_path: Path) -> None:
    """Nobody takes a stopped agent for one that hangs."""
    with _daemon(tmp_path, "run", 'node = "bench-3"\nbudget = "1GiB"\n[models]') as process:
        wait_for("a sign of life", lambda: _sign(tmp_path / "state"))
        process.terminate()
        assert process.wait(30) == 0
    with pytest.raises(NotAlive, match="no agent works in it"):
        look(tmp_path / "state")


@pytest.mark.parametrize(
    "left", [b"", b"12 ", b"one two three\n", f"{os.getpid():10d} {1e12:10.0f} 1\n".encode()], ids=["empty", "cut", "words", "future"]
)
def test_sign_that_is_none(left: bytes, tmp_path: Path) -> None:
    """A sign that is cut, that is no sign, or that is of another start of the machine, is no life."""
    (tmp_path / alive.SIGN).write_bytes(left)
    with pytest.raises(NotAlive):
        look(tmp_path)


def test_coordinator_that_works_and_is_gone(tmp_path: Path, cold_cli: Cli) -> None:
    """It answers on its socket, also where its broker is away; once it has died, nobody does."""
    health = "health", "coordinator", "--config", str(tmp_path / "daemon.toml")
    with _daemon(tmp_path, "coordinator", "") as process:
        wait_for("the coordinator's socket", (tmp_path / "state" / "api.sock").is_socket)
        ran = cold_cli(*health)
        assert (ran.code, ran.out, ran.err) == (0, "it answers\n", "")
        process.kill()
        process.wait()
        ran = cold_cli(*health)
        assert (ran.code, ran.out) == (14, "")
        assert ran.err.startswith("error coordinator: no coordinator answers at ")
