"""Whether others need the memory that a run holds. Imports no torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from profiles.device import DeviceProfile, free_bytes
from profiles.host import HERE, Absent, Machine

CHECK_S, TIMES = 1.0, 3
"""Seconds between looks, and how many in a row have to show a lack: what is over in a moment is none."""
LEFT = 0.5
"""Share of the device's reserve that has to be free still; admission left the whole."""
STALLED_PERCENT = 20.0
"""Share of the last ten seconds in which nothing on the machine could go on for want of memory (pressure stall information)."""


class Pressure:
    """Watches what is free on a device while a run holds memory of it, and when it may have its memory back."""

    def __init__(self, device: DeviceProfile, machine: Machine = HERE, clock: Callable[[], float] = time.monotonic) -> None:
        self._device, self._machine, self._clock = device, machine, clock
        self._looked_at, self._seen = -CHECK_S, 0

    def crowded(self) -> bool:
        """Whether others need memory. Cheap enough to be asked at every step."""
        now = self._clock()
        if now - self._looked_at < CHECK_S:
            return False
        self._looked_at = now
        lacking = self._lacks()
        self._seen = self._seen + 1 if lacking else 0
        return self._seen >= TIMES

    def has_room(self, needed_bytes: int) -> bool:
        """Whether a run that takes so much would leave the device's reserve to others."""
        self._seen = 0
        return self._stalled() < STALLED_PERCENT and self._free() >= needed_bytes + self._device.reserve_bytes

    def _lacks(self) -> bool:
        return self._free() < LEFT * self._device.reserve_bytes or self._stalled() >= STALLED_PERCENT

    def _free(self) -> float:
        """What is free; where nothing tells it, there is no reason to wait."""
        try:
            return free_bytes(self._device, self._machine)
        except (OSError, Absent):
            return math.inf

    def _stalled(self) -> float:
        """Percent of the last ten seconds; 0 where the kernel does not count it."""
        try:
            lines = (self._machine.proc / "pressure" / "memory").read_text(encoding="utf-8").splitlines()
            full = next(line for line in lines if line.startswith("full"))
            return float(full.partition("avg10=")[2].split()[0])
        except (OSError, ValueError, IndexError, StopIteration):
            return 0.0
