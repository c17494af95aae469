"""docs/tutorial.md, word for word, on a Debian that has nothing else and boots its own systemd: `pytest tests/long_tutorial.py`.

For `make test-all`. Takes root, debootstrap and systemd-nspawn.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from clean_root import CACHE, copy_checkout, debian, give_pip, need, run
from conftest import ROOT
from fleet import wait_for

BOOT = "systemd-sysv dbus"
"""What every installed Debian has, and a minimal root does not."""
HOME = "/root/edge-agent"
ENVIRONMENT = (
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME=/root",
    "LANG=C.UTF-8",
    "COLUMNS=140",
    "OMP_NUM_THREADS=1",
)
HARDENED = {"NoNewPrivs": "1", "CapEff": "0000000000000000", "CapBnd": "0000000000000000", "Seccomp": "2"}
LONGEST_S = 3600


class Machine:
    """A booted Debian, and commands of its root."""

    def __init__(self, root: Path, seen: dict[Path, Path]) -> None:
        self._root, self.log = root, root.with_name("boot.log")
        bound = [f"--bind-ro={here}:{there}" for here, there in seen.items()]
        command = ["systemd-nspawn", "--boot", "--register=no", "--keep-unit", "--console=pipe", "--resolv-conf=copy-host", *bound]
        with self.log.open("wb") as log:
            self._nspawn = subprocess.Popen([*command, f"--directory={root}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def wait_until_it_is_up(self) -> None:
        wait_for("the machine", lambda: self._leader and self.said("systemctl is-system-running").strip() in ("running", "degraded"))

    @property
    def _leader(self) -> int | None:
        """Its first process, as it is seen from here."""
        found = [child.pid for child in psutil.Process(self._nspawn.pid).children() if child.name() == "systemd"]
        return found[0] if found else None

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a script as a shell of root does, in the checkout; what it says is in `said.log` meanwhile. It ends with what fails."""
        enter = ["nsenter", f"--target={self._leader}", "--mount", "--uts", "--ipc", "--pid", "--root", f"--wd={self._root}{HOME}"]
        shell = ["env", "--ignore-environment", *ENVIRONMENT, "bash", "-euo", "pipefail", "-c", f"cd {HOME}\n{script}"]
        with self.log.with_name("said.log").open("w+") as said:
            command, inputs = [*enter, *shell], subprocess.DEVNULL
            done = subprocess.run(command, stdin=inputs, stdout=said, stderr=subprocess.STDOUT, timeout=LONGEST_S, check=False)
            said.seek(0)
            return subprocess.CompletedProcess(command, done.returncode, said.read())

    def said(self, script: str) -> str:
        return self.run(script).stdout

    def stop(self) -> None:
        if self._leader is not None:
            self.run("systemctl poweroff --force")
        try:
            self._nspawn.wait(60)
        except subprocess.TimeoutExpired:
            self._nspawn.kill()
            self._nspawn.wait()


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    need("debootstrap", "systemd-nspawn", "nsenter")
    place = CACHE / "tutorial"
    shutil.rmtree(place, ignore_errors=True)
    root = place / "root"
    root.mkdir(parents=True)
    run("tar", "--extract", "--file", debian(), "--directory", root)
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost ip6-localhost\n")  # as the installer of Debian does
    install = f"apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends {BOOT}"
    run("chroot", root, "sh", "-c", install)
    copy_checkout(root / HOME.lstrip("/"))
    booted = Machine(root, give_pip(place))
    try:
        booted.wait_until_it_is_up()
        yield booted
    finally:
        booted.stop()
        shutil.rmtree(root)


def blocks() -> list[str]:
    """The commands of the tutorial, in their order."""
    return re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_tutorial_ends_with_a_job_that_a_node_has_finished(machine: Machine) -> None:
    """Every block is run as it stands there; then the job has succeeded, under the settings of the units, and all is removed again."""
    *before, removal = blocks()
    ran = machine.run("\n".join(before))
    (machine.log.with_name("tutorial.log")).write_text(ran.stdout)
    assert ran.returncode == 0, f"{ran.stdout[-6000:]}\n{machine.said('journalctl --no-pager --lines 60')}"
    [job] = json.loads(machine.said("edge-agent jobs --json"))
    assert (job["node"], job["phase"], job["outcome"]) == ("bench-1", "ended", "succeeded")
    assert job["result"]["accepted"] is True
    accuracy = json.loads(machine.said("cat first/result.json"))["accuracy"]
    assert accuracy["after"]["value"] > accuracy["before"]["value"] + 0.2
    assert machine.said("cat first/map.html").startswith("<!doctype html>")
    for unit in ("edge-agent", "edge-agent-coordinator"):
        check_unit(machine, unit)
    assert machine.run(removal).returncode == 0
    assert machine.run("systemctl cat edge-agent").returncode != 0


def check_unit(machine: Machine, unit: str) -> None:
    """The process of a unit is its user's, ready by its own word, and has given up what the unit takes from it."""
    asked = machine.said(f"systemctl show {unit} --property User,MainPID,ActiveState,StatusText,Type,NRestarts")
    shown = dict(line.split("=", 1) for line in asked.splitlines())
    assert (shown["User"], shown["ActiveState"], shown["Type"], shown["NRestarts"]) == (unit, "active", "notify", "0")
    status = dict(re.findall(r"^(\w+):\s*(.*)$", machine.said(f"cat /proc/{shown['MainPID']}/status"), re.MULTILINE))
    assert {name: status[name] for name in HARDENED} == HARDENED
    assert status["Uid"].split()[0] == machine.said(f"id --user {unit}").strip()
    kind = "coordinator" if unit.endswith("coordinator") else "node"
    assert machine.run(f"edge-agent health {kind}").returncode == 0
    inside = f"nsenter --target {shown['MainPID']} --mount"
    assert machine.run(f"{inside} touch /etc/edge-agent/written").returncode != 0
    machine_log = machine.said(f"journalctl --unit {unit} --no-pager --output cat")
    assert '"level":"error"' not in machine_log.replace(" ", ""), machine_log
