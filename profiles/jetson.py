"""What a Jetson's kernel tells of board and GPU in sysfs, in the layouts of JetPack 5 and 6."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from profiles.host import Absent, Machine

LOADS = (
    "devices/platform/gpu.0/load",
    "devices/gpu.0/load",
    "devices/platform/bus@0/17000000.gpu/load",  # JetPack 6
    "devices/platform/17000000.ga10b/load",  # JetPack 5
)
"""Load of the GPU, in thousandths; the first two are links that not every release has."""
ZONES = ("gpu-thermal", "GPU-therm", "tj-thermal")
"""Thermal zones in the order in which they are asked: the GPU's under its names, then the hottest of the chip.

Zones of parts that a board does not have can block whoever reads them: no other zone is touched.
"""
INPUT_RAIL = "VDD_IN"
"""Input of the whole module, on Orin Nano and NX. AGX Orin has none: there the rails that feed the chip are added up."""
INNER_RAILS = ("VDDQ_VDD2_1V8AO",)
"""Rails behind another one that is measured too."""
CHANNELS = (1, 2, 3)


def board(machine: Machine) -> str:
    """Return the model of the device tree, or an empty text on a machine without one."""
    try:
        return (machine.proc / "device-tree" / "model").read_text(encoding="utf-8", errors="replace").rstrip("\0\n")
    except OSError:
        return ""


def utilisation_percent(machine: Machine) -> float:
    """Load of the GPU."""
    for load in LOADS:
        if (file := machine.sys / load).exists():
            return int(file.read_text()) / 10
    raise Absent("no load of a GPU in /sys/devices")


def temperature_c(machine: Machine) -> float:
    """Of the GPU, or where its zone is asleep of the hottest part of the chip."""
    zones = {_line(zone / "type"): zone for zone in machine.sys.glob("class/thermal/thermal_zone*")}
    reason = "no thermal zone of a GPU"
    for name in ZONES:
        if name in zones:
            try:
                return int(_line(zones[name] / "temp")) / 1000
            except OSError as error:
                reason = f"thermal zone {name}: {error.strerror}"
    raise Absent(reason)


def power_w(machine: Machine) -> float:
    """Of the module, by its INA3221 monitors: of its input where that is measured, else the sum of its rails."""
    rails = dict(_rails_w(machine))
    if not rails:
        raise Absent("no INA3221 monitor that can be read")
    return rails.get(INPUT_RAIL, sum(watts for name, watts in rails.items() if name not in INNER_RAILS))


def _rails_w(machine: Machine) -> Iterator[tuple[str, float]]:
    """Yield each rail that is connected, with its watts; the kernel gives millivolts and milliamperes."""
    for monitor in sorted(machine.sys.glob("class/hwmon/hwmon*")):
        if not (monitor / "name").exists() or _line(monitor / "name") != "ina3221":
            continue
        for channel in CHANNELS:
            label = monitor / f"in{channel}_label"
            if label.exists() and _line(label) not in ("", "NC"):
                volts, amperes = (int(_line(monitor / f"{kind}{channel}_input")) / 1000 for kind in ("in", "curr"))
                yield _line(label), volts * amperes


def _line(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip()
