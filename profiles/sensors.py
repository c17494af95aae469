"""What a device reports of itself now: memory, utilisation, temperature, power. Null with a reason where a sensor is absent, never 0."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pynvml

SHORTEST_INTERVAL_S = 0.1
RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


class Reading(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One sensor: its value, or why there is none."""

    value: float | None
    reason: str | None = None


class Resources(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One sample of a node."""

    device_free_bytes: Reading
    device_total_bytes: Reading
    host_free_bytes: int
    disk_free_bytes: int
    """Of the file system of the agent's state."""
    budget_bytes: int
    """What the node lends to a job."""
    trainer_bytes: int | None
    """Memory that the running job takes, in the memory that its budget limits; null: no job runs."""
    utilisation_percent: Reading
    temperature_c: Reading
    power_w: Reading


class Sensors:
    """Samples one device. Rates (utilisation, power from an energy counter) are over the time since the last sample."""

    def __init__(self, kind: str, budget_bytes: int, directory: Path) -> None:
        self._read = _read_gpu if kind == "cuda" else _Host().read
        self._budget_bytes, self._directory = budget_bytes, directory

    def sample(self, trainer_bytes: int | None) -> Resources:
        """Read all sensors once. Takes a few milliseconds and never raises for a sensor that is absent."""
        free, total, utilisation, temperature, power = self._read()
        host, disk = int(psutil.virtual_memory().available), psutil.disk_usage(str(self._directory)).free
        return Resources(free, total, host, disk, self._budget_bytes, trainer_bytes, utilisation, temperature, power)


_Readings = tuple[Reading, Reading, Reading, Reading, Reading]


class _Host:
    """A machine whose processor is the device."""

    def __init__(self) -> None:
        psutil.cpu_percent(None)
        self._asked_at = time.monotonic()
        self._energy: tuple[float, int] | None = None

    def read(self) -> _Readings:
        memory = psutil.virtual_memory()
        return Reading(memory.available), Reading(memory.total), self._utilisation(), _host_temperature(), self._power()

    def _utilisation(self) -> Reading:
        """Share of all cores since the last sample; shorter than a few ticks of the kernel's clock it would read 0."""
        now = time.monotonic()
        if now - self._asked_at < SHORTEST_INTERVAL_S:
            return Reading(None, "no interval yet")
        self._asked_at = now
        return Reading(psutil.cpu_percent(None))

    def _power(self) -> Reading:
        """Mean watts of the first package since the last sample, from its RAPL counter."""
        try:
            now = time.monotonic(), int(RAPL.read_text())
        except FileNotFoundError:
            return Reading(None, "no RAPL counter")
        except (OSError, ValueError) as error:
            return Reading(None, f"the RAPL counter cannot be read: {type(error).__name__}")
        before, self._energy = self._energy, now
        if before is None or now[0] - before[0] < SHORTEST_INTERVAL_S or now[1] < before[1]:
            return Reading(None, "no interval yet")
        return Reading((now[1] - before[1]) / 1e6 / (now[0] - before[0]))


def _host_temperature() -> Reading:
    try:
        groups = psutil.sensors_temperatures()
    except (AttributeError, OSError):
        groups = {}
    hottest = max((entry.current for group in groups.values() for entry in group), default=None)
    return Reading(None, "no temperature sensor") if hottest is None else Reading(float(hottest))


def _read_gpu() -> _Readings:
    """Ask NVML for the first GPU, one question at a time: it may know the answers to some of them only."""
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    except pynvml.NVMLError as error:
        none = Reading(None, f"NVML: {error}")
        return none, none, none, none, none
    try:
        return (
            _ask(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).free),
            _ask(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            _ask(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            _ask(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
            _ask(lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000),
        )
    finally:
        pynvml.nvmlShutdown()


def _ask(question: Callable[[], float]) -> Reading:
    try:
        return Reading(float(question()))
    except pynvml.NVMLError as error:
        return Reading(None, f"NVML: {error}")
