"""A budget holds whatever the plan has missed, and a run gives its memory back where others need it; neither loses anything."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from conftest import DEADLINE_S, Cli, write_domain
from machines import MEMINFO, server, write
from safetensors.torch import load_file

from edge_agent.errors import NoRoom, OutOfMemory, Stopped, TimedOut
from edge_agent.job import Job
from edge_agent.job_building import build_job
from edge_agent.job_directory import JobDirectory
from edge_agent.report import Event
from edge_agent.training.enforce import persevere
from edge_agent.training.prepare import learn_overhead
from edge_agent.training.reporter import Reporter
from edge_agent.training.run import run_job
from profiles import nvidia
from profiles.calibration import LEAST_SPREAD_BYTES, calibrated
from profiles.device import device_profile
from profiles.host import Machine
from profiles.memory import HostCap, lacks_memory
from profiles.pressure import CHECK_S, HOST_RESERVE_BYTES, TIMES, Pressure
from profiles.recorder import StageName, StageRow
from quantization.estimate import MARGIN
from quantization.plan import Plan, StagePlan

MIB = 2**20
SETTINGS: dict[str, Any] = {
    "schedule.batch": 32, "schedule.updates": 8, "schedule.checkpoint_s": 0, "schedule.learning_rate": 0.002, "evaluation.questions": 5,
    "evaluation.max_new_tokens": 60, "sampling.outputs": 2, "device": "cpu",
}  # fmt: skip


def _adapter(job: Path) -> torch.Tensor:
    weights = load_file(job / "adapter" / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.", True),
        ("NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_lack_of_memory_is_known_by_its_text(text: str, lacks: bool) -> None:
    """PyTorch says it in an error of no type of its own where its allocator was not asked."""
    assert lacks_memory(RuntimeError(text)) == lacks


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_domain(tmp_path_factory.mktemp("enforce") / "chain.jsonl", "chain", 24, 5)


@pytest.fixture(scope="module")
def whole(data: Path, tiny_model: Path, cold_cli: Cli) -> Any:
    """The report of a run with all the memory that it asks for, and too little beyond to keep what it frees."""
    return _train(cold_cli, data, tiny_model, data.parent / "whole", device_profile("cpu").overhead_bytes + 414 * MIB)


def _train(run: Cli, data: Path, model: Path, out: Path, budget_bytes: int, state: Path | None = None) -> Any:
    options = [f"--set={name}={value}" for name, value in SETTINGS.items()]
    ran = run("train", "--model", model, "--data", data, "--out", out, "--budget", budget_bytes, "--json", *options, state=state)
    assert ran.code == 0, ran.out + ran.err
    return ran.json


@pytest.mark.slow
def test_a_run_that_lacks_memory_goes_on_one_rung_lower(data: Path, whole: Any, tiny_model: Path, cold_cli: Cli, tmp_path: Path) -> None:
    """Under a plan that is far too low the cap ends a stage; the run itself goes on with smaller settings, to the same adapter."""
    peaks = {row["stage"]: row["peak_bytes"] for row in whole["stages"]}
    train_bytes = peaks.pop("train")
    budget_bytes = train_bytes - (train_bytes - max(peaks.values())) // 4
    planned = max(stage["resident_bytes"] + stage["transient_bytes"] for stage in whole["plan"]["stages"])
    device = device_profile("cpu")
    spare_bytes = device.spare_bytes + LEAST_SPREAD_BYTES
    wrong = {device.title: {"train": [device.overhead_bytes - (planned - budget_bytes) - spare_bytes - MIB]}}
    write(tmp_path, {"edge-agent/calibration.json": json.dumps(wrong)})
    result = _train(cold_cli, data, tiny_model, tmp_path / "job", budget_bytes, tmp_path)
    assert result["state"] == "succeeded"
    assert result["misses"][0]["rung"] == "as asked"
    assert all(miss["planned_bytes"] <= budget_bytes and "memory" in miss["text"] for miss in result["misses"])
    assert result["plan"]["number"] > 0
    trained = [row for row in result["stages"] if row["stage"] == "train"][-1]
    assert result["tokens_per_s"] == pytest.approx(trained["tokens"] / trained["seconds"])
    assert result["peak_bytes"] <= budget_bytes
    wanted, found = _adapter(data.parent / "whole"), _adapter(tmp_path / "job")
    assert (found - wanted).norm() <= 1e-3 * wanted.norm()
    events = [json.loads(line) for line in (tmp_path / "job" / "events.jsonl").read_text().splitlines()]
    assert [e["stage"] for e in events if e["event"] == "out_of_memory"] == [miss["stage"] for miss in result["misses"]]


def test_a_cap_on_the_host_fails_the_allocation_that_would_pass_it() -> None:
    """What fits is allocated, what does not raises, and afterwards there is no cap."""
    torch.ones(2**20).exp_()
    resident = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")) * 1024
    cap = HostCap(resident + 256 * MIB)
    cap.renew()
    try:
        torch.ones(128 * MIB // 4)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            torch.ones(512 * MIB // 4)
    finally:
        cap.lift()
    torch.ones(512 * MIB // 4)


def _free(machine: Machine, free_bytes: int) -> None:
    write(machine.proc, {"part": MEMINFO.format(total=32_000_000, available=free_bytes // 1024)})
    (machine.proc / "part").replace(machine.proc / "meminfo")


def test_pressure_is_what_lasts(tmp_path: Path) -> None:
    """Memory that is short once is no reason to pause; short several times in a row it is, and so are stalls."""
    device, machine, now = device_profile("cpu"), server(tmp_path), [0.0]
    pressure = Pressure(device, machine, lambda: now[0])

    def looks(count: int) -> list[bool]:
        found = []
        for _ in range(count):
            now[0] += CHECK_S
            found.append(pressure.crowded())
        return found

    assert looks(2) == [False, False]
    _free(machine, device.reserve_bytes // 4)
    assert looks(TIMES) == [False] * (TIMES - 1) + [True]
    assert not pressure.has_room(device.reserve_bytes)
    _free(machine, 3 * device.reserve_bytes)
    assert pressure.has_room(device.reserve_bytes)
    assert looks(1) == [False]
    write(
        machine.proc,
        {"pressure/memory": "some avg10=40.00 avg60=9.00 avg300=0.00 total=9\nfull avg10=31.50 avg60=7.00 avg300=0.00 total=7"},
    )
    assert looks(TIMES)[-1]
    assert not pressure.has_room(0)


def test_a_run_on_a_card_leaves_the_host_some_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card may be as free as it likes: its run pauses where the host lacks memory, and the other way round."""
    device, machine, now = device_profile("rtx-3060-12gb"), server(tmp_path), [0.0]
    on_card = [2**33]
    monkeypatch.setattr(nvidia, "free_bytes", lambda _: on_card[0])
    pressure = Pressure(device, machine, lambda: now[0])

    def crowded() -> bool:
        for _ in range(TIMES - 1):
            now[0] += CHECK_S
            pressure.crowded()
        now[0] += CHECK_S
        return pressure.crowded()

    assert not crowded()
    assert pressure.has_room(2**32)
    _free(machine, HOST_RESERVE_BYTES // 4)
    assert crowded()
    assert not pressure.has_room(0)
    _free(machine, HOST_RESERVE_BYTES)
    assert not crowded()
    assert pressure.has_room(2**32)
    on_card[0] = device.reserve_bytes // 4
    assert crowded()
    assert not pressure.has_room(0)


def _job(data: Path, model: Path, out: Path) -> JobDirectory:
    job: Job = build_job(str(model), data, None, {**SETTINGS, "budget_bytes": 2048 * MIB}, [])
    directory = JobDirectory(out)
    directory.create(job, data, None)
    return directory


@pytest.mark.slow
def test_a_run_pauses_while_others_need_the_memory(data: Path, whole: Any, tiny_model: Path, tmp_path: Path) -> None:
    """It gives its model back in the middle of training, goes on from its checkpoint when there is room, and its adapter is the same."""
    directory, machine = _job(data, tiny_model, tmp_path / "job"), server(tmp_path / "machine")
    events: list[Event] = []
    paused = threading.Event()

    def listen(event: Event) -> None:
        events.append(event)
        if event.event == "progress" and event.stage == "train" and not paused.is_set():
            _free(machine, MIB)
            time.sleep(CHECK_S)  # so that each of the next updates looks again
        if event.event == "paused":
            paused.set()
            threading.Timer(1.0, _free, (machine, 2**34)).start()

    deadline = time.monotonic() + DEADLINE_S
    result = run_job(directory, listen, stopping=lambda: time.monotonic() > deadline, machine=machine)
    kinds = [e.event for e in events]
    assert kinds.count("paused") == kinds.count("continued") == 1
    assert result.state == "succeeded"
    assert result.resumed
    wanted, found = _adapter(data.parent / "whole"), _adapter(tmp_path / "job")
    assert (found - wanted).norm() <= 1e-3 * wanted.norm()


@pytest.mark.slow
def test_a_run_that_waits_for_memory_can_be_stopped(data: Path, tiny_model: Path, tmp_path: Path) -> None:
    """On request it ends while it waits, and what is done is kept."""
    directory, machine = _job(data, tiny_model, tmp_path / "job"), server(tmp_path / "machine")
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        if event.stage == "load":
            _free(machine, MIB)

    with pytest.raises(Stopped):
        run_job(directory, listen, stopping=lambda: any(e.event == "paused" for e in events), machine=machine)
    assert events[-1].event == "stopped"
    assert msgspec.json.decode(directory.events.read_bytes().splitlines()[-1], type=Event).event == "stopped"


@pytest.mark.slow
def test_a_run_on_a_device_that_gets_hot_in_every_stage_comes_to_its_end(data: Path, whole: Any, tiny_model: Path, tmp_path: Path) -> None:
    """It waits in place, so that no stage is begun again, and its adapter is the same; the time is neither the run's nor the stage's."""
    directory, hot, waits = _job(data, tiny_model, tmp_path / "job"), [0], [0.0]
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        if event.event == "stage_started":
            hot[0] = 3
        waits[0] += event.seconds or 0.0 if event.event == "continued" else 0.0

    def resting() -> bool:
        hot[0] -= hot[0] > 0
        return hot[0] > 0

    deadline = time.monotonic() + DEADLINE_S
    result = run_job(directory, listen, stopping=lambda: time.monotonic() > deadline, resting=resting)
    begun = [e.stage for e in events if e.event == "stage_started"]
    assert begun.count("evaluate") == 2
    assert len(begun) == len(set(begun)) + 1
    paused = [e for e in events if e.event == "paused"]
    assert {"evaluate", "sample", "score", "train"} <= {e.stage for e in paused}
    assert {e.code for e in paused} == {"thermal"}
    assert waits[0] >= 0.5 * len(paused)
    assert sum(row.seconds for row in result.stages) <= result.seconds - waits[0]
    assert not result.resumed
    wanted, found = _adapter(data.parent / "whole"), _adapter(tmp_path / "job")
    assert (found - wanted).norm() <= 1e-3 * wanted.norm()


@pytest.mark.slow
def test_a_run_that_cools_can_be_stopped_and_gives_way(data: Path, tiny_model: Path, tmp_path: Path) -> None:
    """On request it ends while it waits; what it holds it gives back where others need the memory meanwhile."""
    directory, machine = _job(data, tiny_model, tmp_path / "job"), server(tmp_path / "machine")
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        if event.event == "paused" and event.code == "thermal":
            _free(machine, MIB)

    def stopping() -> bool:
        return any(e.event == "paused" and e.code is None for e in events)

    with pytest.raises(Stopped):
        run_job(directory, listen, stopping=stopping, machine=machine, resting=lambda: True)
    assert [(e.event, e.code) for e in events[-3:]] == [("paused", "thermal"), ("paused", None), ("stopped", None)]


def test_time_of_earlier_starts_counts_towards_the_limit(data: Path, tiny_model: Path, tmp_path: Path) -> None:
    """What is left of `max_run_s` may be nothing: then the run ends at its first step."""
    directory = _job(data, tiny_model, tmp_path / "job")
    with pytest.raises(TimedOut):
        run_job(directory, lambda _: None, ran_s=directory.read_job().max_run_s)


@pytest.mark.slow
def test_a_run_that_has_begun_waits_for_room(data: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Where there is no room at its start a new job is refused; one that has work to lose waits, and goes on."""
    directory, machine = _job(data, tiny_model, tmp_path / "job"), server(tmp_path / "machine")
    _free(machine, MIB)
    with pytest.raises(NoRoom, match="device memory"):
        run_job(directory, lambda _: None, machine=machine)
    _free(machine, 2**34)
    scored: list[Event] = []
    with pytest.raises(Stopped):
        run_job(directory, scored.append, stopping=lambda: bool(scored) and scored[-1].stage == "train", machine=machine)
    _free(machine, MIB)
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        if event.event == "paused":
            _free(machine, 2**34)

    result = run_job(directory, listen, machine=machine)
    assert [e.event for e in events[:3]] == ["stage_started", "paused", "continued"]
    assert result.state == "succeeded"
    score = next(row for row in result.stages if row.stage == "score")
    assert (score.resumed, score.tokens) == (True, 0)


def test_a_lack_that_no_plan_would_change_ends_the_run(tmp_path: Path) -> None:
    """A stage that is not planned would lack memory again and again."""
    directory, reporter = JobDirectory(tmp_path / "job"), Reporter(device_profile("cpu"), lambda _: None, lambda: False)
    reporter.plan = Plan("as asked", 1, 256, False, 1, MIB, (StagePlan("load", 1, 1),))
    runs = []

    def run() -> None:
        runs.append(1)
        with reporter.stage("encode"):
            raise MemoryError

    with pytest.raises(OutOfMemory, match="encode"):
        persevere(run, directory, reporter, Pressure(device_profile("cpu")))
    assert len(runs) == 1


def test_misses_belong_to_a_job_and_model(tmp_path: Path) -> None:
    """What lacked memory once is no reason for another model in the same directory."""
    directory = JobDirectory(tmp_path)
    directory.begin("one")
    directory.write_plan(Plan("as asked", 1, 256, False, 1, MIB, (StagePlan("load", 1, 1),)))
    directory.add_miss("load", "no memory")
    assert [miss.stage for miss in directory.read_misses("one")] == ["load"]
    assert not directory.read_misses("two")
    directory.begin("two")
    assert not directory.read_misses("two")


def test_only_what_was_done_teaches_the_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage without work teaches nothing, one with less than the most no less than loading; the plan says what it had added."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    device = device_profile("cpu")
    counted, beyond = 200 * MIB, 500 * MIB
    stages = tuple(StagePlan(name, int(counted * MARGIN) + beyond, 0, beyond_bytes=beyond) for name in ("load", "score", "train", "sample"))
    plan = Plan("as asked", 1, 256, False, 1, 2**30, stages)
    peaks: dict[StageName, tuple[int, int]] = {
        "load": (640, 0),
        "score": (660, 9),
        "train": (630, 9),
        "sample": (450, 0),
        "encode": (700, 9),
    }
    rows = [
        StageRow(stage=name, peak_bytes=peak * MIB, tokens=tokens, planned_bytes=plan.planned_bytes(name))
        for name, (peak, tokens) in peaks.items()
    ]
    learn_overhead(device, plan, rows)
    assert {stage: round(size / MIB) for stage, size in calibrated(device).learned_bytes.items()} == {
        "load": 440,
        "score": 460,
        "train": 440,
    }
