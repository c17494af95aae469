"""Machines as their kernels show them in /proc and /sys: the files that the sensors read, with names, units and quirks of real ones."""

from __future__ import annotations

from pathlib import Path

from profiles.host import Machine

MEMINFO = "MemTotal:       {total} kB\nMemFree:          312044 kB\nMemAvailable:   {available} kB\nBuffers:           86520 kB\n"
NANO_RAILS = {"hwmon1": {1: ("VDD_IN", 5064, 1160), 2: ("VDD_CPU_GPU_CV", 5064, 288), 3: ("VDD_SOC", 5056, 264)}}
"""Orin Nano and NX: the first rail is the input of the module, the others are behind it."""
AGX_RAILS = {
    "hwmon3": {1: ("VDD_GPU_SOC", 19816, 160), 2: ("VDD_CPU_CV", 19824, 48), 3: ("VIN_SYS_5V0", 4968, 712)},
    "hwmon4": {1: ("NC", 0, 0), 2: ("VDDQ_VDD2_1V8AO", 4968, 80), 3: ("NC", 0, 0)},
}
"""AGX Orin: two monitors, not all of whose channels are connected."""


def write(root: Path, files: dict[str, str | int]) -> None:
    """Write files of one line below a root."""
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n", encoding="utf-8")


def server(root: Path, total_kb: int = 32_000_000, available_kb: int = 16_000_000) -> Machine:
    """A machine with nothing but memory and a processor."""
    machine = Machine(root / "proc", root / "sys")
    write(machine.proc, {"meminfo": MEMINFO.format(total=total_kb, available=available_kb), "stat": "cpu  100 0 50 800 10 0 5 0 0 0"})
    return machine


def jetson(root: Path, model: str, load: str, rails: dict[str, dict[int, tuple[str, int, int]]], available_kb: int = 5_893_120) -> Machine:
    """A Jetson of the Orin series; `load` is the file with the load of its GPU, where its release has it."""
    machine = server(root, 7_802_392, available_kb)
    model_file = machine.proc / "device-tree" / "model"
    model_file.parent.mkdir(parents=True)
    model_file.write_text(f"{model}\0", encoding="utf-8")  # a device tree's texts end like C's
    zones = {"cpu-thermal": 48_093, "gpu-thermal": 46_312, "tj-thermal": 48_093}
    for number, (zone, temperature) in enumerate(zones.items()):
        write(machine.sys / "class/thermal" / f"thermal_zone{number}", {"type": zone, "temp": temperature})
    write(machine.sys, {load: 437, "class/hwmon/hwmon0/name": "pwmfan"})
    for monitor, channels in rails.items():
        write(machine.sys / "class/hwmon" / monitor, {"name": "ina3221", "in7_label": "sum of shunt voltages", "in7_input": 40})
        for channel, (label, millivolts, milliamperes) in channels.items():
            names = (f"in{channel}_label", f"in{channel}_input", f"curr{channel}_input")
            write(machine.sys / "class/hwmon" / monitor, dict(zip(names, (label, millivolts, milliamperes), strict=True)))
    return machine


def orin_nano(root: Path) -> Machine:
    """An Orin Nano with JetPack 6."""
    model = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    return jetson(root, model, "devices/platform/bus@0/17000000.gpu/load", NANO_RAILS)


def agx_orin(root: Path) -> Machine:
    """An AGX Orin with JetPack 5."""
    return jetson(root, "Jetson AGX Orin Developer Kit", "devices/platform/17000000.ga10b/load", AGX_RAILS, 58_000_000)
