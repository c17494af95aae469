"""The services under a systemd that has booted: a Debian of its own in a container, the wheel installed there, a real job, and what systemd
does with daemons that stand still, are stopped or killed. Beside it what of the watchdog takes long.

Needs root, `debootstrap` and `systemd-nspawn` (Debian's `debootstrap` and `systemd-container`), and a mirror (`EDGE_AGENT_TEST_MIRROR`).
The container computes with the packages of this environment, so its Python is of the same version: 3.11 is Debian 12, 3.13 Debian 13.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, write_domain
from fleet import wait_for as wait_until
from lacking import lack
from test_systemd import Host, host, report, wedged  # noqa: F401 - `host` is a fixture

from edge_agent.doctor import BROKER_CHECKS, CHECKS

SUITE = {(3, 11): "bookworm", (3, 13): "trixie"}.get(sys.version_info[:2])
MIRROR = os.environ.get("EDGE_AGENT_TEST_MIRROR", "http://deb.debian.org/debian")
KEPT = os.environ.get("EDGE_AGENT_TEST_DEBIAN")
"""A directory where the Debian is kept between runs."""
PACKAGES_OF_DEBIAN = ("systemd", "systemd-sysv", "dbus", "python3", "python3-venv", "mosquitto", "procps")
PROGRAMS = ("debootstrap", "systemd-nspawn", "nsenter")
LACKS = (
    [name for name in PROGRAMS if shutil.which(name) is None]
    + ["root"] * (os.geteuid() != 0)
    + ["a Debian of this Python"] * (SUITE is None)
)
INSTALLED = "/opt/edge-agent"
PACKAGES = f"{INSTALLED}/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
AGENT_TOML = f"""
node = "bench-3"
state_directory = "/var/lib/edge-agent"
budget = "1GiB"
threads = 1
[models]
tiny = "{PACKAGES}/edge_agent/demo/tiny"
[broker]
username = "bench-3"
password_file = "keys/password"
"""
QUICK = (
    "evaluation.questions=8",
    "evaluation.max_new_tokens=60",
    "schedule.learning_rate=0.002",
    "schedule.batch=12",
    "sampling.outputs=2",
)
WATCHDOG_S = 10
DEADLINE_S = 900.0
pytestmark = pytest.mark.timeout(3600)  # the first one makes a Debian


wait_for = partial(wait_until, deadline_s=DEADLINE_S)


def test_watchdog_starves_for_a_link_that_is_stuck(host: Host) -> None:  # noqa: F811
    """Its thread never returns from taking in a message, and the connection stands."""
    ear = wedged(host, "thread")
    report(host)
    ear.wait(STATUS="by a thread that does not move")
    assert "watchdog_starves" in host.fleet.log("agent")
    assert ear.fed() == 0


def test_watchdog_starves_for_a_connection_that_does_not_end(host: Host) -> None:  # noqa: F811
    """The broker answers nothing, and the link does not connect anew though it was told to."""
    ear = wedged(host, "stubborn")
    host.freeze("broker")
    ear.wait(STATUS="it is tried anew", WATCHDOG="1")
    ear.wait(STATUS="the connection does not end")
    assert "watchdog_starves" in host.fleet.log("agent")


class Machine:
    """A Debian that systemd has booted, seen from outside."""

    def __init__(self, root: Path) -> None:
        self.root = root
        shared = sysconfig.get_path("purelib")
        with (root / "nspawn.log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "systemd-nspawn", "--register=no", "--keep-unit", "--boot", "--private-network", "--quiet", "-D", str(root),
                    f"--bind-ro={shared}:/shared",
                    # which it refuses by itself, and a machine does not
                    "--system-call-filter=seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self",
                ],
                env=os.environ | {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            self._init = wait_for("its first process", self._find_init)
            wait_for("the end of its boot", lambda: self.try_("systemctl", "is-active", "multi-user.target") == "active\n")
        except BaseException:
            sys.stderr.write((root / "nspawn.log").read_text(errors="replace")[-4000:])
            self.end()
            raise

    def _find_init(self) -> int | None:
        children = psutil.Process(self._process.pid).children()  # its own helpers come first, and go
        return next((child.pid for child in children if child.name() == "systemd"), None)

    def try_(self, *command: str) -> str:
        """Run a command inside as root, and return what it says."""
        done = self._inside(command)
        return done.stdout

    def run(self, *command: str) -> str:
        """Likewise; it has to succeed."""
        done = self._inside(command)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def _inside(self, command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        inside = ["nsenter", "-t", str(self._init), "-m", "-u", "-i", "-n", "-p", "-C", "env", "-i", "HOME=/root"]
        path = f"PATH={INSTALLED}/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return subprocess.run([*inside, path, *command], capture_output=True, text=True, timeout=DEADLINE_S, check=False)

    def shown(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "-P", name, unit).strip()

    def kill(self, unit: str, number: signal.Signals) -> None:
        """Send a signal to the main process of a unit alone."""
        self.run("systemctl", "kill", "--kill-who=main", f"--signal={number.name}", unit)

    def end(self) -> None:
        self._process.send_signal(signal.SIGTERM)  # powers it off
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _make_debian(root: Path) -> None:
    """Make one with systemd, a broker and Python, or copy the one that is kept for this."""
    made = root if KEPT is None else Path(KEPT)
    if KEPT is None or not made.exists():
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES_OF_DEBIAN)}", str(SUITE), str(made), MIRROR]
        subprocess.run(command, check=True, timeout=1200)
    if made != root:
        subprocess.run(["cp", "-a", "--reflink=auto", f"{made}/.", str(root)], check=True, timeout=600)
    (root / "etc" / "machine-id").write_text(f"{uuid.uuid4().hex}\n")  # it is no first boot, which may ask for things


def _build(root: Path) -> None:
    """Make a Debian with this package installed in it from its wheel."""
    _make_debian(root)
    subprocess.run(["chroot", str(root), "python3", "-m", "venv", "--without-pip", INSTALLED], check=True, timeout=120)
    with tempfile.TemporaryDirectory() as wheels:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, str(ROOT)], check=True, timeout=600)
        wheel = next(Path(wheels).glob("*.whl"))
        subprocess.run([*pip, "install", "--no-deps", "--target", f"{root}{PACKAGES}", str(wheel)], check=True, timeout=120)
    (root / PACKAGES[1:] / "shared.pth").write_text("/shared\n")
    script = root / INSTALLED[1:] / "bin" / "edge-agent"
    script.write_text(f"#!{INSTALLED}/bin/python\nimport sys\nfrom edge_agent.__main__ import main\nsys.exit(main())\n")
    script.chmod(0o755)
    keys = root / "etc" / "edge-agent" / "keys"
    keys.mkdir(mode=0o700, parents=True)
    keys.parent.chmod(0o755)
    (keys / "password").write_text("any\n")
    (keys / "password").chmod(0o600)
    (keys.parent / "agent.toml").write_text(AGENT_TOML)
    (keys.parent / "coordinator.toml").write_text('state_directory = "/var/lib/edge-agent-coordinator"\n')
    write_domain(root / "root" / "data.jsonl", "chain", 24, 5)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """It is built and booted once, and the services are installed by the command."""
    if LACKS:
        lack(f"NOT BOOTED: there is no {', no '.join(LACKS)}, so the services were not tried under a systemd that runs")
    with tempfile.TemporaryDirectory(prefix="ea-machine-", ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o755)
        _build(Path(directory))
        machine = Machine(Path(directory))
        try:
            yield machine
        finally:
            machine.end()


def submit(machine: Machine, updates: int) -> str:
    """Hand in a job, and return its id."""
    settings = [part for setting in (*QUICK, f"schedule.updates={updates}") for part in ("--set", setting)]
    said = machine.run(
        "edge-agent", "submit", "--node", "bench-3", "--model", "tiny", "--data", "/root/data.jsonl", "--budget", "1GiB", *settings
    )
    return said.split()[-1]


def trainer(machine: Machine, job: str) -> str | None:
    """Return the trainer of a job, if it trains already."""
    events = machine.try_("cat", f"/var/lib/edge-agent/jobs/{job}/events.jsonl")
    if '"stage":"train"' not in events.replace(" ", ""):
        return None
    return machine.try_("pgrep", "-f", "edge_agent train").strip() or None


def test_services_are_installed_and_train(machine: Machine) -> None:
    """Users, directories and units come by the command; systemd starts them, and hears that they serve; a job runs in what they may do, its
    trainer locked down altogether."""
    said = machine.run("edge-agent", "install-service")
    assert "made the user edge-agent\n" in said
    assert "gave /etc/edge-agent/keys/password to edge-agent\n" in said
    assert said.endswith("next: systemctl enable --now edge-agent\n")
    machine.run("edge-agent", "install-service", "--coordinator")
    assert "is as it should be" in machine.run("edge-agent", "install-service")
    for unit in ("edge-agent", "edge-agent-coordinator"):
        places = f"/etc/systemd/system/{unit}.service.d"
        machine.run("mkdir", places)
        (machine.root / places[1:] / "quick.conf").write_text(f"[Service]\nWatchdogSec={WATCHDOG_S}\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "enable", "--now", "edge-agent", "edge-agent-coordinator")
    wait_for("the connection", lambda: "connected to 127.0.0.1:1883" in machine.shown("edge-agent", "StatusText"))
    job = submit(machine, updates=4)
    machine.run("edge-agent", "watch", job)
    log = machine.run("journalctl", "-u", "edge-agent", "-o", "cat", "--no-pager")
    assert "trainer_not_locked_down" not in log
    assert machine.run("stat", "-c", "%U %a", "/var/lib/edge-agent", "/var/lib/edge-agent-coordinator").split() == [
        "edge-agent", "700", "edge-agent-coordinator", "700",
    ]  # fmt: skip


def test_what_stands_still_is_started_anew_and_what_waits_is_not(machine: Machine) -> None:
    """A broker that is away for several times the watchdog's limit is no reason; a process that stands still is."""
    units = ("edge-agent", "edge-agent-coordinator")
    machine.run("systemctl", "stop", "mosquitto")
    before = {unit: machine.shown(unit, "MainPID") for unit in units}
    wait_for("the loss of the connection", lambda: all("no connection" in machine.shown(unit, "StatusText") for unit in units))
    machine.run("sleep", str(3 * WATCHDOG_S))
    assert {unit: machine.shown(unit, "MainPID") for unit in units} == before
    for unit in units:
        machine.kill(unit, signal.SIGSTOP)
    wait_for("new processes", lambda: all(machine.shown(unit, "MainPID") not in ("0", before[unit]) for unit in units))
    log = machine.run("journalctl", "-o", "cat", "--no-pager", *(f"--unit={unit}" for unit in units))
    assert all(f"{unit}.service: Failed with result 'watchdog'" in log for unit in units)
    machine.run("systemctl", "start", "mosquitto")
    wait_for("the connections", lambda: all("connected to" in machine.shown(unit, "StatusText") for unit in units))


@pytest.mark.parametrize("how", ["restarted", "killed"])
def test_job_goes_on_when_its_agent_is(how: str, machine: Machine) -> None:
    """No trainer is left behind by either, and the job ends well, once."""
    job = submit(machine, updates=400)
    first = wait_for("the trainer", lambda: trainer(machine, job))
    if how == "restarted":
        machine.run("systemctl", "restart", "edge-agent")
    else:
        machine.kill("edge-agent", signal.SIGKILL)
    wait_for("its end", lambda: first not in machine.try_("pgrep", "-f", "edge_agent train").split())
    wait_for("the next one", lambda: machine.try_("pgrep", "-f", "edge_agent train").strip())
    machine.run("edge-agent", "options", job)  # the coordinator answers
    machine.run("edge-agent", "cancel", job)
    wait_for("the end of the job", lambda: "canceled" in machine.run("edge-agent", "jobs"))


def test_user_of_the_service_passes_the_doctor(machine: Machine) -> None:
    """All that a node needs is there for the user that the command has made: every check is made, passes, and the command ends with 0. The
    clock's is against the coordinator's here, for a container knows of no NTP."""
    said = machine.run("systemd-run", "--quiet", "--pipe", "--uid=edge-agent", f"{INSTALLED}/bin/edge-agent", "doctor", "--json")
    checks = json.loads(said)
    assert [check["name"] for check in checks] == ["configuration", *CHECKS, *BROKER_CHECKS]
    assert [check for check in checks if check["passed"] is not True] == []


def test_services_are_removed(machine: Machine) -> None:
    """They stop; configuration, state and users stay."""
    for options in ((), ("--coordinator",)):
        machine.run("edge-agent", "install-service", "--remove", *options)
    assert "edge-agent" not in machine.run("systemctl", "list-units", "--no-legend", "edge-agent*")
    assert (machine.root / "var" / "lib" / "edge-agent" / "agent.sqlite").exists()
    machine.run("id", "edge-agent")
