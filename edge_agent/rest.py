"""When a node runs no trainer although a job is ready: in its quiet hours, and while its device is too hot."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import NamedTuple

from edge_agent.config import DAYS, RestLimits
from edge_agent.messages import Reason

LOOK_S = 5.0
"""Between two looks at the thermometer."""


class Rests(NamedTuple):
    """Why a node rests."""

    reason: Reason
    text: str


class Rest:
    """Asked at every tick of the agent. `temperature` reads the device's in degrees Celsius; None where it does not tell."""

    def __init__(
        self, limits: RestLimits, temperature: Callable[[], float | None], now: Callable[[], datetime] = datetime.now,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._limits, self._temperature, self._now, self._clock = limits, temperature, now, clock
        self._looked_at = -LOOK_S
        self._hot: float | None = None

    def due(self) -> Rests | None:
        """Return why no trainer should run now; None where one may."""
        now = self._now()
        for hours in self._limits.quiet_hours:
            if is_within(hours, now):
                return Rests("quiet_hours", f"the node is quiet {hours}, its local time; the job goes on then")
        highest = self._limits.max_temperature_c
        if highest is not None and (clock := self._clock()) - self._looked_at >= LOOK_S:
            self._looked_at = clock
            found = self._temperature()
            too_hot = found is not None and found > highest - (0.0 if self._hot is None else self._limits.cool_by_c)
            self._hot = found if too_hot else None
        if self._hot is not None:
            lower = (highest or 0.0) - self._limits.cool_by_c
            return Rests("thermal", f"the device is at {self._hot:.0f} °C, its limit is {highest:.0f}; the job goes on at {lower:.0f}")
        return None


def is_within(hours: str, now: datetime) -> bool:
    """Whether a time lies in hours such as `22:00-06:00` or `mon-fri 08:00-18:00`, whose days are those on which they begin."""
    *days, times = hours.split(" ")
    begin, end = times.split("-")
    clock = f"{now:%H:%M}"
    if begin < end:
        return begin <= clock < end and _on(days, now)
    return (clock >= begin and _on(days, now)) or (clock < end and _on(days, now - timedelta(days=1)))


def _on(days: list[str], day: datetime) -> bool:
    if not days:
        return True
    first, _, last = days[0].partition("-")
    begin, end = DAYS.index(first), DAYS.index(last or first)
    return (day.weekday() - begin) % 7 <= (end - begin) % 7
