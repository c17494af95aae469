"""What a device can do: the declared profile of its kind, and what it has free now. Imports no torch."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

import msgspec
import psutil
import pynvml

from edge_agent.errors import DeviceMissing


class DeviceProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of `profiles/devices/`."""

    kind: Literal["cpu", "cuda"]
    compute_dtype: Literal["float32", "bfloat16"]
    overhead_bytes: int
    """Memory of a trainer that has loaded no model yet."""
    reserve_bytes: int
    """Memory that admission leaves to others."""

    @property
    def activation_bytes(self) -> int:
        """Bytes of one number in the compute type."""
        return 4 if self.compute_dtype == "float32" else 2


def device_profile(kind: str) -> DeviceProfile:
    """Return the declared profile of a kind of device."""
    text = (files("profiles") / "devices" / f"{kind}.toml").read_bytes()
    return msgspec.toml.decode(text, type=DeviceProfile)


def detect_device(wanted: str) -> str:
    """Return the kind of device to use: `auto` is `cuda` where NVML shows a GPU, else `cpu`. Raises DeviceMissing."""
    if wanted == "cpu":
        return wanted
    if _gpu_memory() is not None:
        return "cuda"
    if wanted == "cuda":
        raise DeviceMissing("NVML finds none")
    return "cpu"


def _gpu_memory() -> tuple[int, int] | None:
    """(free, total) bytes of the first GPU, or None without one."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0))
        return int(memory.free), int(memory.total)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def free_bytes(kind: str) -> int:
    """Return the memory that is free for a new trainer on the device."""
    if kind == "cuda" and (gpu := _gpu_memory()) is not None:
        return gpu[0]
    return int(psutil.virtual_memory().available)


def device_name(kind: str) -> str:
    """Return the name of the device for reports."""
    if kind == "cpu":
        for line in _cpuinfo():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {psutil.cpu_count()} cores"
        return f"CPU, {psutil.cpu_count()} cores"
    pynvml.nvmlInit()
    try:
        return str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0)))
    finally:
        pynvml.nvmlShutdown()


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
