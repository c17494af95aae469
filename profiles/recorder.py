"""Measures a run stage by stage: seconds, tokens, peak memory against plan and budget. One vocabulary from log to report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import msgspec

from profiles.energy import EnergySource, Meter, NoMeter
from profiles.memory import Memory
from profiles.sensors import Reading

StageName = Literal["plan", "load", "evaluate", "sample", "repair", "judge", "encode", "score", "train", "save"]
STAGES: tuple[str, ...] = get_args(StageName)
SHORTEST_ENERGY_S = 0.1
"""Sensors of energy and power are renewed up to this far apart."""
UNMETERED = NoMeter("nobody asked for it")


class StageRow(msgspec.Struct, kw_only=True):
    """One stage of a run as it was measured. A stage that ran twice (evaluate) has two rows."""

    stage: StageName
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens: int = 0
    peak_bytes: int = 0
    """In the memory that the budget limits."""
    planned_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    """Of tensors on the GPU; None on a processor, as the next."""
    peak_reserved_bytes: int | None = None
    """What the allocator had taken from the GPU for them."""
    peak_resident_bytes: int = 0
    """Resident set of the process on the host."""
    energy_j: float | None = None
    """Of the device, whoever used it."""
    energy_source: EnergySource = "none"
    energy_reason: str | None = None
    """Why there is no energy."""
    resumed: bool = False
    """True where a stage was taken, in whole or in part, from an earlier run in the same directory."""

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.seconds if self.tokens and self.seconds else None


class Recorder:
    """Keeps the rows of a run.

    `memory` says what counts against the budget, `synchronize` waits for the device at both ends of a stage, `on_stage` hears
    of each stage when it begins (seconds 0) and when it has ended, `meter` measures energy.
    """

    def __init__(
        self, memory: Memory, synchronize: Callable[[], None], on_stage: Callable[[StageRow, bool], None], meter: Meter = UNMETERED
    ) -> None:
        self.memory, self.meter = memory, meter
        self.rows: list[StageRow] = []
        self._synchronize = synchronize
        self._on_stage = on_stage
        self._left_out_s = 0.0

    @contextmanager
    def stage(self, name: StageName, planned_bytes: int | None = None) -> Iterator[StageRow]:
        """Measure a stage; the caller sets the row's `tokens` and `resumed`."""
        row = StageRow(stage=name, planned_bytes=planned_bytes, energy_source=self.meter.source)
        self.rows.append(row)
        self._synchronize()
        self.memory.release()
        self._on_stage(row, False)  # after what is free has been given back: a cap is set to what is left
        self._left_out_s = 0.0
        energy, wall, cpu = self.meter.joules(), time.monotonic(), time.process_time()
        try:
            yield row
        finally:
            self._synchronize()
            row.seconds, row.cpu_seconds = time.monotonic() - wall - self._left_out_s, time.process_time() - cpu
            row.energy_j, row.energy_reason = _energy(energy, self.meter.joules(), row.seconds)
            row.peak_bytes, row.peak_resident_bytes = self.memory.peaks_bytes()
            row.peak_allocated_bytes, row.peak_reserved_bytes = self.memory.peak_on_gpu_bytes()
        self._on_stage(row, True)

    def leave_out(self, seconds: float) -> None:
        """Do not count a time in which the running stage waited; its energy stays that of the whole."""
        self._left_out_s += seconds

    @property
    def current_stage(self) -> StageName:
        """Name of the stage that runs or ran last."""
        return self.rows[-1].stage if self.rows else "plan"


def _energy(start: Reading, end: Reading, seconds: float) -> tuple[float | None, str | None]:
    """Return (joules, None), or None with the reason."""
    if start.value is None or end.value is None:
        return None, start.reason or end.reason
    if seconds < SHORTEST_ENERGY_S:
        return None, f"shorter than {SHORTEST_ENERGY_S} s"
    return end.value - start.value, None
