"""What a device reports of itself now: memory, utilisation, temperature, power. Null with a reason where a sensor is absent, never 0.

A sensor is a function, in the module of what it reads, and a line in `_sensors`.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import msgspec
import psutil
import pynvml

from profiles import host, jetson, nvidia
from profiles.device import DeviceProfile, free_bytes
from profiles.host import HERE, Absent, Machine, Sensor

SHORTEST_INTERVAL_S = 0.1
FAILURES = (OSError, ValueError, LookupError, ArithmeticError, psutil.Error)
"""What reading a sensor may raise beside Absent and NVML's errors: a file that vanishes, or holds something else."""


class Reading(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One sensor: its value, or why there is none."""

    value: float | None
    reason: str | None = None


class DeviceReadings(msgspec.Struct, frozen=True):
    """One sample of a device."""

    free_bytes: Reading
    total_bytes: Reading
    utilisation_percent: Reading
    temperature_c: Reading
    power_w: Reading


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


class Rate:
    """A sensor of how fast a counter grows, over the time since it was last read."""

    def __init__(self, counter: Sensor, factor: float = 1.0, most: float = math.inf) -> None:
        self._counter, self._factor, self._most = counter, factor, most
        self._before: tuple[float, float] | None = None

    def __call__(self, machine: Machine) -> float:
        value, now = self._counter(machine), time.monotonic()
        if self._before is None:
            self._before = now, value
        then, before = self._before
        if now - then < SHORTEST_INTERVAL_S:  # the counter has hardly moved, and would read 0
            raise Absent("no interval yet")
        self._before = now, value
        return min(self._most, self._factor * (value - before) / (now - then))


def _sensors(device: DeviceProfile) -> dict[str, Sensor]:
    """Return the sensors of a device by the fields of `DeviceReadings`."""
    if device.kind == "discrete":
        return {
            "free_bytes": nvidia.free_bytes,
            "total_bytes": nvidia.total_bytes,
            "utilisation_percent": nvidia.utilisation_percent,
            "temperature_c": nvidia.temperature_c,
            "power_w": nvidia.power_w,
        }
    shared: dict[str, Sensor] = {"free_bytes": lambda machine: free_bytes(device, machine), "total_bytes": host.total_bytes}
    if device.kind == "unified":
        return shared | {
            "utilisation_percent": jetson.utilisation_percent,
            "temperature_c": jetson.temperature_c,
            "power_w": jetson.power_w,
        }
    return shared | {
        "utilisation_percent": Rate(host.busy_core_seconds, 100 / (psutil.cpu_count() or 1), 100),
        "temperature_c": host.temperature_c,
        "power_w": Rate(host.Rapl()),
    }


def read(sensor: Sensor, machine: Machine) -> Reading:
    """Read a sensor; never raises for one that is absent or says nonsense."""
    try:
        return Reading(float(sensor(machine)))
    except Absent as error:
        return Reading(None, str(error))
    except pynvml.NVMLError as error:
        return Reading(None, f"NVML: {error}")
    except FAILURES as error:
        return Reading(None, f"it cannot be read: {type(error).__name__}")


class DeviceSensors:
    """Samples one device. Rates (utilisation and power of a processor) are over the time since the last sample."""

    def __init__(self, device: DeviceProfile, machine: Machine = HERE) -> None:
        self._sensors, self._machine = _sensors(device), machine
        self.sample()

    def sample(self) -> DeviceReadings:
        """Read all sensors once. Takes a few milliseconds."""
        return DeviceReadings(**{name: read(sensor, self._machine) for name, sensor in self._sensors.items()})

    def temperature_c(self) -> float | None:
        """Read the thermometer alone, so that no rate is disturbed; None where there is none."""
        return read(self._sensors["temperature_c"], self._machine).value


class Sensors:
    """Samples a node and its device."""

    def __init__(self, device: DeviceProfile, budget_bytes: int, directory: Path, machine: Machine = HERE) -> None:
        self.device, self._machine = DeviceSensors(device, machine), machine
        self._budget_bytes, self._directory = budget_bytes, directory

    def sample(self, trainer_bytes: int | None) -> Resources:
        """Read all sensors once."""
        d = self.device.sample()
        free, disk = int(psutil.virtual_memory().available), psutil.disk_usage(str(self._directory)).free
        return Resources(
            d.free_bytes, d.total_bytes, free, disk, self._budget_bytes, trainer_bytes, d.utilisation_percent, d.temperature_c, d.power_w
        )
