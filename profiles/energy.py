"""The energy that a device has taken: from a counter where it has one, else by adding up its power over time.

What is measured depends on the source: `nvml_counter` and `nvml_power` the GPU's board, `ina3221` a Jetson's module, `rapl` the
processor packages; all of it, whoever used it. Does not cover the rest of the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock
from typing import Literal, Protocol

from profiles import jetson, nvidia
from profiles.device import DeviceProfile
from profiles.host import HERE, Machine, Rapl, Sensor
from profiles.sensors import Reading, read

EnergySource = Literal["nvml_counter", "nvml_power", "ina3221", "rapl", "none"]


class Meter(Protocol):
    """What a recorder asks at both ends of a stage, and a sampler in between."""

    source: EnergySource

    def joules(self) -> Reading:
        """Energy since some moment, the same for all calls."""


class Counter:
    """A device that counts by itself."""

    def __init__(self, source: EnergySource, sensor: Sensor, machine: Machine = HERE) -> None:
        self.source: EnergySource = source
        self._sensor, self._machine, self._lock = sensor, machine, Lock()

    def joules(self) -> Reading:
        with self._lock:  # a recorder and a sampler ask from two threads
            return read(self._sensor, self._machine)


class Integral:
    """Power over time, by the trapezoidal rule between the moments at which it is asked. A reading that fails is bridged by the next."""

    def __init__(self, source: EnergySource, power: Sensor, machine: Machine = HERE, clock: Callable[[], float] = time.monotonic) -> None:
        self.source: EnergySource = source
        self._power, self._machine, self._clock, self._lock = power, machine, clock, Lock()
        self._before: tuple[float, float] | None = None
        self._joules = 0.0

    def joules(self) -> Reading:
        with self._lock:
            watts, now = read(self._power, self._machine), self._clock()
            if watts.value is None:
                return watts
            if self._before is not None:
                then, before = self._before
                self._joules += (now - then) * (watts.value + before) / 2
            self._before = now, watts.value
            return Reading(self._joules)


class NoMeter:
    """A device without any."""

    source: EnergySource = "none"

    def __init__(self, reason: str) -> None:
        self._reading = Reading(None, reason)

    def joules(self) -> Reading:
        return self._reading


def find_meter(device: DeviceProfile, machine: Machine = HERE) -> Meter:
    """Return the best meter that a device has; of one without, why."""
    meters: dict[str, tuple[Meter, ...]] = {
        "cpu": (Counter("rapl", Rapl(), machine),),
        "discrete": (Counter("nvml_counter", nvidia.energy_j, machine), Integral("nvml_power", nvidia.power_w, machine)),
        "unified": (Integral("ina3221", jetson.power_w, machine),),
    }
    reason = ""
    for meter in meters[device.kind]:
        found = meter.joules()
        if found.value is not None:
            return meter
        reason = found.reason or reason
    return NoMeter(reason)
