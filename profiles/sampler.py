"""Samples the device while a run goes on: a thread of the trainer that looks once or more a second and takes under 1 % of its time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

import msgspec
import pynvml

from edge_agent.errors import DiskFull
from edge_agent.files import write_file
from profiles import nvidia
from profiles.device import DeviceProfile
from profiles.host import HERE, Machine
from profiles.recorder import Recorder, StageName
from profiles.sensors import DeviceSensors, Reading

PER_S = 2.0
MOST_SHARE = 0.01
"""Of the processor time of one core: after an expensive sample the next one waits longer."""
MAX_SAMPLES = 4096
"""In the file; where it is full every second one is dropped, and from then on half as many are kept."""


class Sample(msgspec.Struct, frozen=True):
    """One line of `profile.jsonl`."""

    time: float
    """Seconds since 1970."""
    stage: StageName
    memory_bytes: int
    """Held by the trainer, in the memory that the budget limits."""
    free_bytes: Reading
    """Of the device."""
    utilisation_percent: Reading
    temperature_c: Reading
    power_w: Reading


class _Journal:
    """A file of samples that never grows over a bound and always covers the whole run, ever more coarsely.

    What cannot be written is left out: a full disk is for the run to report.
    """

    def __init__(self, file: Path, most: int) -> None:
        self._file, self._most = file, most
        self._offered = self._held = 0
        self._every = 1
        self._write(b"")

    def add(self, sample: Sample) -> None:
        self._offered += 1
        if self._offered % self._every:
            return
        if self._held >= self._most:
            self._thin()
        with suppress(OSError), self._file.open("ab") as file:
            file.write(msgspec.json.encode(sample) + b"\n")
            self._held += 1

    def _thin(self) -> None:
        with suppress(OSError):
            lines = self._file.read_bytes().splitlines(keepends=True)[::2]
            self._write(b"".join(lines))
            self._held, self._every = len(lines), 2 * self._every

    def _write(self, data: bytes) -> None:
        with suppress(OSError, DiskFull):
            write_file(self._file, data)


class Sampler:
    """Writes samples to a file until it is stopped. What it cannot read has a reason; what it cannot write is left out."""

    def __init__(
        self, recorder: Recorder, device: DeviceProfile, file: Path, per_s: float = PER_S, most: int = MAX_SAMPLES, machine: Machine = HERE
    ) -> None:
        self._recorder, self._device, self._machine = recorder, device, machine
        self._journal, self._pause_s = _Journal(file, most), 1 / per_s
        self._ended = Event()
        self._thread = Thread(target=self._run, name="sampler", daemon=True)
        self.cpu_s = 0.0
        """Processor time that its samples have taken."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End it; returns when its last sample is written."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        with ExitStack() as stack:
            if self._device.kind == "discrete":  # opened once: opening NVML for each sample would cost more than the sample
                with suppress(pynvml.NVMLError):
                    stack.enter_context(nvidia.opened())
            self._sample_until_ended()

    def _sample_until_ended(self) -> None:
        sensors, pause_s = DeviceSensors(self._device, self._machine), self._pause_s
        while not self._ended.wait(pause_s):
            before = time.thread_time()
            self._recorder.meter.joules()  # power is added up at this rate
            self._journal.add(self._sample(sensors))
            took = time.thread_time() - before
            self.cpu_s += took
            pause_s = max(self._pause_s, took / MOST_SHARE)

    def _sample(self, sensors: DeviceSensors) -> Sample:
        d = sensors.sample()
        held = self._recorder.memory.current_bytes()
        return Sample(time.time(), self._recorder.current_stage, held, d.free_bytes, d.utilisation_percent, d.temperature_c, d.power_w)


@contextmanager
def sampled(recorder: Recorder, device: DeviceProfile, file: Path) -> Iterator[Sampler]:
    """Sample while a run goes on, to its end or its error."""
    sampler = Sampler(recorder, device, file)
    sampler.start()
    try:
        yield sampler
    finally:
        sampler.stop()
