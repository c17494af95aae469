"""Clocks that no change of the machine's moves: boards without a battery begin in 1970, or at their last image, until NTP has come."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from datetime import datetime, timedelta

KEEP_S = 600.0
"""Between two writings of how long a daemon has run: what one that is killed forgets at most."""
GET = "SELECT value FROM meta WHERE name = 'ran_s'"
SET = "INSERT INTO meta VALUES ('ran_s', ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"


class Ran:
    """Seconds that a daemon has run, over all its starts. Time in which it was off does not count."""

    def __init__(self, kept_s: float, write: Callable[[float], object], clock: Callable[[], float] = time.monotonic) -> None:
        """`kept_s`: how long earlier starts have run; `write` keeps it for the next."""
        self._write, self._clock = write, clock
        self._kept_s, self._kept_at = kept_s, clock()

    def now(self) -> float:
        return self._kept_s + self._clock() - self._kept_at

    def keep(self) -> float:
        """Write down how long it has run, and return that: what is stored with it lies in the past of every later start."""
        self._kept_s, self._kept_at = self.now(), self._clock()
        self._write(self._kept_s)
        return self._kept_s

    def set(self, ran_s: float) -> None:
        """Take what another daemon has written, which runs too."""
        self._kept_s, self._kept_at = ran_s, self._clock()

    @property
    def age_s(self) -> float:
        """Of what was written or taken last."""
        return self._clock() - self._kept_at

    def tick(self, every_s: float = KEEP_S) -> None:
        """Write it down where that is due."""
        if self.age_s >= every_s:
            self.keep()


class RunningTime(Ran):
    """The same, kept in an SQLite file."""

    def __init__(self, db: sqlite3.Connection, clock: Callable[[], float] = time.monotonic) -> None:
        row = db.execute(GET).fetchone()
        super().__init__(float(row[0]) if row else 0.0, lambda ran_s: db.execute(SET, (ran_s,)), clock)


class ToldTime:
    """The time by the clock of the coordinator, from when it has told it on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: tuple[datetime, float] | None = None

    def set(self, told: datetime) -> None:
        self._told = told, self._clock()

    def now(self) -> datetime | None:
        """Return None where it has not been told yet."""
        if self._told is None:
            return None
        told, at = self._told
        return told + timedelta(seconds=self._clock() - at)
