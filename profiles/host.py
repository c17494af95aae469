"""What the kernel tells of the host: memory, the limits of its control groups, processor time, temperature, energy of the processor."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Machine:
    """Where the kernel tells of a machine; a recorded one has trees of its own."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    dev: Path = Path("/dev")


HERE = Machine()
Sensor = Callable[[Machine], float]
"""One sensor: its value now. Raises Absent, or whatever reading it raises."""


class Absent(Exception):
    """A sensor has no value; the text says why."""


def memory_bytes(machine: Machine, field: str) -> int:
    """Return a field of /proc/meminfo, such as `MemAvailable`, which counts the page cache as free."""
    for line in (machine.proc / "meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise Absent(f"/proc/meminfo has no {field}")


def total_bytes(machine: Machine) -> float:
    """Memory of the host."""
    return memory_bytes(machine, "MemTotal")


def available_bytes(machine: Machine) -> int:
    """Memory of the host that a new process can have, within the limits of its control groups (cgroup v2)."""
    return int(max(0, min(memory_bytes(machine, "MemAvailable"), *_rooms_bytes(machine))))


def _rooms_bytes(machine: Machine) -> list[float]:
    """What the control group of this process and each above it leave free: limit minus use, with what is reclaimed on demand."""
    root = machine.sys / "fs" / "cgroup"
    try:
        lines = (machine.proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    own = root / next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    groups = [own, *(parent for parent in own.parents if parent.is_relative_to(root))]
    return [math.inf, *map(_room_bytes, groups)]


def _room_bytes(group: Path) -> float:
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        reclaimable = sum(int(stat.get(name, 0)) for name in ("active_file", "inactive_file", "slab_reclaimable"))
        return math.inf if limit == "max" else int(limit) - int(used) + reclaimable
    except (OSError, ValueError):
        return math.inf  # the root group has no such files


def busy_core_seconds(machine: Machine) -> float:
    """Time that the cores have worked since the machine started, all together."""
    ticks = [int(n) for n in (machine.proc / "stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]]
    idle, waiting = ticks[3:5]
    return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def temperature_c(machine: Machine) -> float:
    """Hottest sensor of the host."""
    try:
        groups = psutil.sensors_temperatures()
    except AttributeError:
        groups = {}
    hottest = max((entry.current for group in groups.values() for entry in group), default=None)
    if hottest is None:
        raise Absent("no temperature sensor")
    return float(hottest)


class Rapl:
    """Energy counters of the processor packages, which start again at 0 when they are full. Without DRAM, disk and power supply."""

    def __init__(self) -> None:
        self._before_uj: dict[Path, int] = {}
        self._total_uj = 0

    def __call__(self, machine: Machine) -> float:
        """Joules of all packages since the first call."""
        packages = [d for d in sorted(machine.sys.glob("class/powercap/intel-rapl:*")) if _is_package(d)]
        if not packages:
            raise Absent("no RAPL counter")
        for package in packages:
            now_uj = int((package / "energy_uj").read_text())
            used_uj = now_uj - self._before_uj.get(package, now_uj)
            if used_uj < 0:
                used_uj += int((package / "max_energy_range_uj").read_text())
            self._before_uj[package] = now_uj
            self._total_uj += used_uj
        return self._total_uj / 1e6


def _is_package(domain: Path) -> bool:
    """Domains beside packages are parts of them, or of the whole board."""
    return (domain / "name").read_text(encoding="utf-8").startswith("package")
