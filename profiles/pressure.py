"""Whether others need the memory that a run holds. Imports no torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from profiles.device import DeviceProfile, free_bytes
from profiles.host import HERE, Absent, Machine, available_bytes

CHECK_S, TIMES = 1.0, 3
"""Seconds between looks, and how many in a row have to show a lack: what is over in a moment is none."""
LEFT = 0.5
"""Share of the device's reserve that has to be free still; admission left the whole."""
HOST_RESERVE_BYTES = 256 * 2**20
"""What others are left of the host's memory beside a GPU with memory of its own: it is in no plan, but a run takes some of it as well."""
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
        """Whether a run that takes so much of the device would leave the reserve to others, there and on the host."""
        self._seen = 0
        (free, reserve_bytes), *host = self._free()
        rooms = [(free - needed_bytes, reserve_bytes), *host]
        return self._stalled() < STALLED_PERCENT and all(left >= reserve_bytes for left, reserve_bytes in rooms)

    def _lacks(self) -> bool:
        return any(free < LEFT * reserve_bytes for free, reserve_bytes in self._free()) or self._stalled() >= STALLED_PERCENT

    def _free(self) -> list[tuple[float, int]]:
        """What is free, and the reserve of it: of the device, and of the host where that is another memory."""
        device = _told(lambda: free_bytes(self._device, self._machine)), self._device.reserve_bytes
        host = _told(lambda: available_bytes(self._machine)), HOST_RESERVE_BYTES
        return [device, host] if self._device.kind == "discrete" else [device]

    def _stalled(self) -> float:
        """Percent of the last ten seconds; 0 where the kernel does not count it."""
        try:
            lines = (self._machine.proc / "pressure" / "memory").read_text(encoding="utf-8").splitlines()
            full = next(line for line in lines if line.startswith("full"))
            return float(full.partition("avg10=")[2].split()[0])
        except (OSError, ValueError, IndexError, StopIteration):
            return 0.0


def _told(free: Callable[[], float]) -> float:
    """Where nothing tells what is free, there is no reason to wait."""
    try:
        return free()
    except (OSError, Absent):
        return math.inf
