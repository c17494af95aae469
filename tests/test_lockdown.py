"""A trainer under an agent is locked down: no network, no privileges, no file but its own; and what does not hold is said."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from chat_server import Server, endpoint
from conftest import DEADLINE_S, ROOT, TINY, write_domain

from edge_agent.config import CACHE_VARIABLE, AgentConfig, Endpoint, Size
from edge_agent.doctor import CHECKS
from edge_agent.job_building import build_job
from edge_agent.job_directory import JobDirectory
from edge_agent.lockdown import describe, judge_ports
from edge_agent.report import Event
from edge_agent.runner import _environment

SETTINGS: dict[str, Any] = {
    "budget_bytes": 2**31, "device": "cpu", "method.name": "nlft", "evaluation.questions": 2, "evaluation.max_new_tokens": 60,
    "sampling.outputs": 2, "schedule.batch": 4, "schedule.updates": 2,
}  # fmt: skip
FREE = {"AF_UNIX", "inside", "temporary", "device", "own memory"}
"""What a trainer needs; a program that it starts is not the process whose memory it may look at."""


class Outside:
    """What a trainer must not reach: a file beside its job, and a port where somebody listens, as a broker does."""

    def __init__(self, place: Path, server: Server) -> None:
        self.directory, self.server = place / "outside", server
        self.directory.mkdir()
        (self.directory / "kept").write_text("as it was")

    def run(self, place: Path, events: str, broker: Server, judges: dict[str, Endpoint], *settings: str) -> list[Event]:
        """Run a whole job that tries to get out at some events; return all that it tells."""
        job = build_job(str(TINY), write_domain(place / "data.jsonl", "chain", 10, 3), None, SETTINGS, list(settings))
        directory = JobDirectory(place / "job")
        directory.create(job, place / "data.jsonl", None)
        ports = f"{broker.port},{self.server.port}"
        command = [sys.executable, str(ROOT / "tests" / "prying.py"), str(self.directory), ports, events, "train", str(directory.path)]
        environment = _environment(1, judges, {CACHE_VARIABLE: str(place / "cache"), "PYTHONPATH": str(ROOT)})
        pipe = subprocess.PIPE
        with subprocess.Popen([*command, "--supervised"], stdin=pipe, stdout=pipe, stderr=pipe, env=environment) as process:
            late = threading.Timer(DEADLINE_S, process.kill)
            late.start()
            assert process.stdout is not None
            assert process.stderr is not None
            told = [msgspec.json.decode(line, type=Event) for line in process.stdout]
            said = process.stderr.read().decode()
            late.cancel()
        assert process.returncode == 0, said
        assert (self.directory / "kept").read_text() == "as it was"
        assert [f.name for f in self.directory.iterdir()] == ["kept"]
        return told


@pytest.fixture
def broker() -> Any:
    listening = Server()
    yield listening
    listening.close()


@pytest.fixture
def outside(tmp_path: Path, server: Server) -> Outside:
    return Outside(tmp_path, server)


def _found(place: Path) -> dict[str, list[dict[str, str | None]]]:
    """What came of the attempts, by event: in the thread of the run, in a new one, in another program."""
    found: dict[str, list[dict[str, str | None]]] = {}
    for line in (place / "job" / "prying.jsonl").read_text().splitlines():
        at, attempts = json.loads(line)
        found.setdefault(at, []).append(attempts)
    return found


def _needs_all(told: list[Event]) -> None:
    """Skip, in words, where this machine cannot lock down a process."""
    if told[0].done != told[0].total:
        pytest.skip(f"NOT LOCKED DOWN HERE: {told[0].text}")


def test_trainer_cannot_get_out(tmp_path: Path, outside: Outside, broker: Server) -> None:
    """From its first stage to its last: no socket of a network, nothing written elsewhere, no privilege and no other process, also by what
    it starts; it says so before its first stage, and does its work."""
    events = ("stage_started/plan", "stage_started/train", "stage_started/save")
    told = outside.run(tmp_path, ",".join(events), broker, {})
    assert (told[0].event, told[-1].event) == ("locked_down", "finished")
    _needs_all(told)
    assert told[0].text == "holds: limits, privileges, files, network"
    found = _found(tmp_path)
    assert list(found) == list(events)
    for in_run, in_thread, in_program in found.values():
        for attempts, free in ((in_run, FREE), (in_thread, FREE), (in_program, FREE - {"own memory"})):
            assert {name for name, error in attempts.items() if error is None} == free, attempts
            assert set(attempts.values()) <= {None, "EACCES", "EPERM", "EXDEV"}
            assert {attempts[name] for name in ("AF_INET", "AF_INET6", "AF_PACKET", "port 0", "port 1", "listen")} == {"EACCES"}
    assert stat.S_IMODE((tmp_path / "job" / "pried").stat().st_mode) == 0o600


@pytest.mark.slow
def test_judged_job_has_the_network_of_its_judge_only_and_no_longer(
    tmp_path: Path, outside: Outside, server: Server, broker: Server, key_file: Path
) -> None:
    """It reaches the port of its endpoint and no other, and after the judging none; the job is judged and ends well."""
    judging = "stage_started/judge", "stage_started/encode"
    settings = ("judging.source=endpoint", "judging.endpoint=stub", "method.repair=false")
    told = outside.run(tmp_path, ",".join(judging), broker, {"stub": endpoint(server, key_file)}, *settings)
    assert server.requests
    _needs_all(told)
    locked = [(e.done, e.total, e.text) for e in told if e.event == "locked_down"]
    assert locked == [(4, 4, "holds: limits, privileges, files, network"), (1, 1, "holds: network")]
    before, after = (_found(tmp_path)[at] for at in judging)
    for attempts in before:
        assert (attempts["port 0"], attempts["port 1"], attempts["listen"], attempts["AF_PACKET"]) == ("EACCES", None, "EACCES", "EACCES")
    for attempts in after:
        assert (attempts["port 0"], attempts["port 1"], attempts["AF_INET"], attempts["AF_NETLINK"]) == ("EACCES",) * 4


def test_platform_that_lacks_something_says_what_and_why() -> None:
    """Elsewhere the parts that can be had are taken, and each of the others has its reason."""
    steps = "import json, platform", "platform.machine = lambda: 'vax'", "from edge_agent import lockdown"
    code = "\n".join((*steps, "print(json.dumps(lockdown.lock_down([])))"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60, cwd=ROOT)
    parts = json.loads(done.stdout)
    assert parts["limits"] is None
    assert parts["network"] == parts["privileges"] == "the system calls of vax are not known here"
    assert describe({"limits": None, "files": "no Landlock"}) == "holds: limits; missing: files (no Landlock)"
    assert describe({"limits": "why"}) == "holds: nothing; missing: limits (why)"


def test_ports_of_judges_are_those_of_their_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named, or usual for the scheme; a proxy that requests go through is one of them."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    assert judge_ports(["https://a.example/v1", "http://b.example:8000/v1", "http://c.example"]) == {443, 8000, 80}
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    assert judge_ports(["https://a.example/v1"]) == {443, 3128}


def test_doctor_says_how_far_a_trainer_is_locked_down(server: Server, tmp_path: Path) -> None:
    """By having a process do it and try to get out; with endpoints, also what holds while they may be asked."""
    config = AgentConfig("n", tmp_path, Size(2**30), {})
    alone = CHECKS["trainer"](config)
    assert alone.startswith("locked down, holds: limits, privileges")
    judged = CHECKS["trainer"](msgspec.structs.replace(config, judges={"stub": endpoint(server, None)}))
    assert judged.startswith(f"{alone}; where an endpoint judges, until it has, holds: limits, privileges")
