"""What a run did: its stages, its energy against known curves of power, the sampler that ends with it, and the trace."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import psutil
import pytest
from conftest import Cli, write_domain
from hypothesis import given
from hypothesis import strategies as st
from machines import orin_nano, server, write

from edge_agent.errors import NonFiniteLoss
from edge_agent.job_directory import JobDirectory
from edge_agent.report import Energy, Result
from edge_agent.training.outcome import describe_energy
from edge_agent.training.trace import UPDATES, traced
from profiles import jetson
from profiles.device import device_profile
from profiles.energy import Counter, Integral, Meter, NoMeter, find_meter
from profiles.host import HERE, Absent, Machine
from profiles.memory import HostMemory
from profiles.recorder import SHORTEST_ENERGY_S, STAGES, Recorder, StageRow
from profiles.sampler import MAX_SAMPLES, MOST_SHARE, Sample, Sampler, sampled
from profiles.sensors import Reading

NANO = device_profile("jetson-orin-nano-8gb")
DEADLINE_S = 60


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _recorder(meter: Meter) -> Recorder:
    return Recorder(HostMemory(), lambda: None, lambda row, finished: None, meter)


def _set_power(machine: Machine, watts: float) -> None:
    """Let the input of an Orin Nano's module draw so much, as its monitor shows it: at 5 V, in whole milliamperes."""
    write(machine.sys / "class/hwmon/hwmon1", {"in1_input": 5000, "curr1_input": round(watts * 200)})


@pytest.mark.parametrize(
    ("power_w", "joules"),
    [(lambda t: 12.0, 120.0), (lambda t: 2 * t, 100.0), (lambda t: 5.0 if t < 5 else 15.0, 100.0), (lambda t: 10 - t, 50.0)],
    ids=["constant", "rising", "step", "falling"],
)
def test_energy_is_the_integral_of_power(tmp_path: Path, power_w: Callable[[float], float], joules: float) -> None:
    """Ten seconds of a known curve, twice a second, through the files of an INA3221: within half an interval of the step, else exact."""
    machine, clock = orin_nano(tmp_path), Clock()
    _set_power(machine, power_w(0))
    meter = Integral("ina3221", jetson.power_w, machine, clock)
    for tick in range(21):
        clock.now = tick / 2
        _set_power(machine, power_w(clock.now))
        reading = meter.joules()
    assert reading.value == pytest.approx(joules, abs=2.51)


@given(st.lists(st.tuples(st.floats(0.01, 2), st.floats(0, 100)), min_size=2, max_size=30))
def test_energy_of_power_that_is_linear_between_looks_is_exact(steps: list[tuple[float, float]]) -> None:
    """However unevenly it is looked at."""
    clock, watts = Clock(), iter([p for _, p in steps])
    meter = Integral("nvml_power", lambda machine: next(watts), HERE, clock)
    wanted = 0.0
    for place, (pause, power) in enumerate(steps):
        if place:
            clock.now += pause
            wanted += pause * (power + steps[place - 1][1]) / 2
        reading = meter.joules()
    assert reading.value == pytest.approx(wanted)


def test_reading_that_fails_is_bridged(tmp_path: Path) -> None:
    """In the middle it costs accuracy only; where the energy is asked for it is null with its reason."""
    machine, clock = orin_nano(tmp_path), Clock()
    meter = Integral("ina3221", jetson.power_w, machine, clock)
    _set_power(machine, 10)
    assert meter.joules() == Reading(0.0)
    clock.now = 1
    write(machine.sys / "class/hwmon/hwmon1", {"curr1_input": "busy"})
    assert meter.joules() == Reading(None, "it cannot be read: ValueError")
    clock.now = 2
    _set_power(machine, 10)
    assert meter.joules() == Reading(20.0)


def test_device_without_a_meter_says_why(tmp_path: Path) -> None:
    """Its source is `none`, and its energy null with a reason: of the sensor that was tried last."""
    machine = server(tmp_path)
    meters = {name: find_meter(device_profile(name), machine) for name in ("cpu", "jetson")}
    assert {name: (meter.source, meter.joules()) for name, meter in meters.items()} == {
        "cpu": ("none", Reading(None, "no RAPL counter")),
        "jetson": ("none", Reading(None, "no INA3221 monitor that can be read")),
    }


def test_device_with_a_meter_has_it_as_its_source(tmp_path: Path) -> None:
    """A Jetson the monitors of its module, a processor its counter."""
    assert find_meter(NANO, orin_nano(tmp_path / "nano")).source == "ina3221"
    machine = server(tmp_path)
    write(machine.sys / "class/powercap/intel-rapl:0", {"name": "package-0", "energy_uj": 7, "max_energy_range_uj": 9})
    meter = find_meter(device_profile("cpu"), machine)
    write(machine.sys / "class/powercap/intel-rapl:0", {"energy_uj": 2_000_007, "max_energy_range_uj": 9})
    assert (meter.source, meter.joules()) == ("rapl", Reading(2.0))


def test_stage_has_its_energy_and_peaks() -> None:
    """What the meter gained between both ends; a processor has no peaks of a GPU, and its peak is that of its resident set."""
    joules = iter([100.0, 130.5, 130.5])
    recorder = _recorder(Counter("rapl", lambda machine: next(joules)))
    with recorder.stage("train") as row:
        time.sleep(1.5 * SHORTEST_ENERGY_S)
    assert (row.energy_j, row.energy_source, row.energy_reason) == (30.5, "rapl", None)
    assert (row.peak_allocated_bytes, row.peak_reserved_bytes) == (None, None)
    assert 0 < row.peak_resident_bytes == row.peak_bytes <= psutil.virtual_memory().total


def test_peak_of_a_stage_is_its_own() -> None:
    """What was held and freed in a stage is in its peak, and not in that of the next."""
    recorder, size = _recorder(NoMeter("none")), 200 * 2**20
    with recorder.stage("load") as load:
        block = bytearray(size)
        block[::4096] = b"\1" * len(block[::4096])
        del block
    with recorder.stage("train") as train:
        pass
    assert load.peak_resident_bytes >= train.peak_resident_bytes + 0.9 * size


def test_energy_that_cannot_be_told_has_a_reason() -> None:
    """A stage too short for the sensor, and one at whose end the sensor failed; also where the stage itself fails."""
    answers = iter([1.0, 1.0, 2.0])

    def sensor(machine: Machine) -> float:
        try:
            return next(answers)
        except StopIteration:
            raise Absent("the sensor is gone") from None

    recorder = _recorder(Counter("rapl", sensor))
    with recorder.stage("encode"):
        pass
    with suppress(KeyError), recorder.stage("train"):
        time.sleep(1.5 * SHORTEST_ENERGY_S)
        raise KeyError
    short, failed = recorder.rows
    assert (short.energy_j, short.energy_reason) == (None, "shorter than 0.1 s")
    assert (failed.energy_j, failed.energy_reason) == (None, "the sensor is gone")
    assert failed.seconds > 0 < failed.peak_resident_bytes


def _row(energy_j: float | None, seconds: float = 1.0, resumed: bool = False) -> StageRow:
    return StageRow(stage="train", seconds=seconds, energy_j=energy_j, energy_reason=None if energy_j else "broken", resumed=resumed)


@pytest.mark.parametrize(
    ("rows", "records", "energy"),
    [
        ([_row(30.0), _row(10.0), _row(None, seconds=0.01)], 8, Energy("rapl", 40.0, 5.0)),
        ([_row(30.0), _row(None)], 8, Energy("rapl", reason="broken")),
        ([_row(30.0, resumed=True)], 8, Energy("rapl", 30.0, reason="an earlier run did a part of the work")),
        ([_row(30.0)], 0, Energy("rapl", 30.0, reason="the job failed")),
        ([_row(None, seconds=0.01)], 8, Energy("rapl", reason="no stage was long enough")),
    ],
    ids=["whole", "broken", "resumed", "failed", "short"],
)
def test_energy_of_a_run_is_whole_or_has_a_reason(rows: list[StageRow], records: int, energy: Energy) -> None:
    """The sum of the stages and the share of a record; what would be only a part of it is null."""
    assert describe_energy(rows, "rapl", records) == energy


def _samples(file: Path) -> list[Sample]:
    return msgspec.json.Decoder(Sample).decode_lines(file.read_bytes())


def _wait(condition: Callable[[], bool]) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < DEADLINE_S
        time.sleep(0.01)


def _sampler(recorder: Recorder, file: Path, machine: Machine, **options: Any) -> Sampler:
    sampler = Sampler(recorder, NANO, file, machine=machine, **options)
    sampler.start()
    return sampler


def test_sampler_writes_what_the_device_does_in_each_stage(tmp_path: Path) -> None:
    """Each line has its stage, memory and the readings of that moment, and energy is added up between the ends of a stage."""
    machine, file = orin_nano(tmp_path), tmp_path / "profile.jsonl"
    recorder = _recorder(find_meter(NANO, machine))
    sampler = _sampler(recorder, file, machine, per_s=50)
    for stage, watts in (("score", 4.0), ("train", 8.0)):
        _set_power(machine, watts)
        with recorder.stage(stage):  # type: ignore[arg-type]
            _wait(lambda stage=stage: sum(s.stage == stage for s in _samples(file)) > 2)  # type: ignore[misc]
    sampler.stop()
    powers = {stage: [s.power_w.value for s in _samples(file) if s.stage == stage][-1] for stage in ("score", "train")}
    assert powers == {"score": pytest.approx(4.0), "train": pytest.approx(8.0)}
    assert all(s.memory_bytes > 0 and s.temperature_c.value == 46.312 and s.free_bytes.value for s in _samples(file))
    train = recorder.rows[1]
    assert train.energy_j is None or train.energy_j == pytest.approx(8.0 * train.seconds, rel=0.5)


def test_sampler_ends_with_the_run(tmp_path: Path) -> None:
    """After a run and after an error there is no thread of it left, and its file holds whole lines."""
    device, file = device_profile("cpu"), tmp_path / "profile.jsonl"
    with sampled(_recorder(NoMeter("none")), device, file):
        assert "sampler" in {thread.name for thread in threading.enumerate()}
    with pytest.raises(ZeroDivisionError), sampled(_recorder(NoMeter("none")), device, file):
        raise ZeroDivisionError
    assert "sampler" not in {thread.name for thread in threading.enumerate()}
    assert _samples(file) == []


def test_sampler_takes_its_share_and_no_more(tmp_path: Path) -> None:
    """Sensors that take 20 ms of processor time are looked at so seldom that this is 1 % of the time, however often they were to be."""
    machine = orin_nano(tmp_path)

    def slow(_: Machine) -> float:
        started = time.thread_time()
        while time.thread_time() - started < 0.02:
            pass
        return 1.0

    recorder, started = _recorder(Counter("rapl", slow)), time.monotonic()
    sampler = _sampler(recorder, tmp_path / "profile.jsonl", machine, per_s=100)
    _wait(lambda: sampler.cpu_s > 0.03)
    sampler.stop()
    assert time.monotonic() - started >= 0.02 / MOST_SHARE  # between the first sample and the second


@pytest.mark.parametrize("breakage", ["sensors", "file"])
def test_sampler_never_fails_the_run(tmp_path: Path, breakage: str) -> None:
    """Sensors that vanish are null with a reason, and a file that cannot be written is left out."""
    machine, file = orin_nano(tmp_path), tmp_path / "gone" / "profile.jsonl"
    if breakage == "sensors":
        file.parent.mkdir()
        (machine.proc / "meminfo").unlink()
        (machine.sys / "class/hwmon/hwmon1/in1_input").unlink()
    sampler = _sampler(_recorder(find_meter(NANO, machine)), file, machine, per_s=50)
    _wait(lambda: sampler.cpu_s > 0)
    sampler.stop()
    assert file.exists() == (breakage == "sensors")
    for sample in _samples(file) if file.exists() else []:
        assert sample.free_bytes.reason == sample.power_w.reason == "it cannot be read: FileNotFoundError"


def test_file_of_samples_is_bounded_and_covers_the_run(tmp_path: Path) -> None:
    """Where it is full it becomes coarser: never more lines than its bound, from the start of the run to its end."""
    machine, file = orin_nano(tmp_path), tmp_path / "profile.jsonl"
    recorder, most = _recorder(NoMeter("none")), 8
    looks = SimpleNamespace(count=0)

    def counted(row: Machine) -> float:
        looks.count += 1
        assert not file.exists() or len(file.read_bytes().splitlines()) <= most
        return 1.0

    recorder.meter = Counter("rapl", counted)
    started = time.time()
    sampler = _sampler(recorder, file, machine, per_s=1000, most=most)
    _wait(lambda: looks.count > 4 * most)
    sampler.stop()
    times = [s.time for s in _samples(file)]
    middle = (started + times[-1]) / 2
    assert len(times) <= most < MAX_SAMPLES
    assert times == sorted(times)
    assert times[0] < middle < times[-1]


@pytest.fixture(scope="module")
def traced_job(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, cli: Cli) -> Path:
    """A job with five updates that was run with --trace."""
    base = tmp_path_factory.mktemp("traced")
    data = write_domain(base / "chain.jsonl", "chain", 12, 1)
    settings = ("schedule.updates=5", "evaluation.max_new_tokens=40", "sampling.outputs=1", "method.repair=false")
    options = [option for setting in settings for option in ("--set", setting)]
    ran = cli(
        "train", "--model", tiny_model, "--data", data, "--budget", "1GiB", "--out", base / "job", "--questions", 2, "--trace", *options,
        "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.json["state"] == "succeeded"
    return base / "job"


@pytest.mark.slow
def test_trace_opens_and_names_the_stage(traced_job: Path) -> None:
    """It is JSON in Chrome's format, with a span for each of the first three updates and operations in them; no CUDA, no snapshot."""
    events = json.loads((traced_job / "trace.json").read_text())["traceEvents"]
    spans = {e["name"]: e for e in events if e.get("name", "").startswith("train: update") and e.get("ph") == "X"}
    assert sorted(spans) == [f"train: update {n}" for n in (1, 2, 3)]
    for span in spans.values():
        inside = [e for e in events if e.get("cat") == "cpu_op" and span["ts"] <= e["ts"] < span["ts"] + span["dur"]]
        assert len(inside) > 100
    assert not (traced_job / "memory_snapshot.pickle").exists()
    assert not list(traced_job.glob(".*.part"))


def test_trace_that_cannot_be_written_hides_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A training that fails ends with its own error, and one that succeeds goes on; what became of the trace is a line in the log."""
    directory = JobDirectory(tmp_path)
    directory.trace.mkdir()
    with pytest.raises(NonFiniteLoss), traced(directory, lambda *_: None):
        raise NonFiniteLoss(1, "a")
    assert caplog.text.count("trace_unwritten") == 1
    with traced(directory, lambda *_: None) as progress:
        for update in range(UPDATES + 1):
            progress(update, UPDATES + 1, 0, None, None)
    assert caplog.text.count("trace_unwritten") == 2
    assert [*tmp_path.iterdir()] == [directory.trace]


def test_run_is_profiled_from_start_to_end(traced_job: Path) -> None:
    """Every sample has a stage of the vocabulary, and every stage energy with its source or a reason."""
    result = msgspec.json.decode((traced_job / "result.json").read_bytes(), type=Result)
    samples = _samples(traced_job / "profile.jsonl")
    assert samples
    assert {s.stage for s in samples} <= set(STAGES)
    assert all(s.memory_bytes > 0 for s in samples)
    for row in result.stages:
        assert (row.energy_j is None) != (row.energy_reason is None)
        assert row.energy_j is None or row.energy_j > 0
        assert row.peak_resident_bytes > 0
    assert (result.energy.total_j is None) == (result.energy.per_record_j is None)
    assert (result.energy.total_j is None) == (result.energy.reason is not None)


HOLES = """
import ctypes
from profiles.memory import close_holes, fix_malloc, keep_freed
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.sbrk.restype, libc.free.argtypes = ctypes.c_void_p, ctypes.c_void_p, [ctypes.c_void_p]

def in_a_hole():
    block = libc.malloc(2 * 2**20)
    found = block < libc.sbrk(0)
    libc.free(block)
    return found

fix_malloc()
blocks = [libc.malloc(256 * 2**10) for _ in range(64)]
for number, block in enumerate(blocks):
    if number % 16 != 15:
        libc.free(block)
print(in_a_hole())
for _ in range(2):
    close_holes()
    print(in_a_hole())
keep_freed()
print(in_a_hole())
"""


def test_large_blocks_stay_out_of_the_holes_of_the_heap() -> None:
    """A block of 2 MiB is put between blocks of 256 KiB where there is room; after `close_holes` it has pages of its own."""
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    assert done.stdout.split() == ["True", "False", "False", "True"]
