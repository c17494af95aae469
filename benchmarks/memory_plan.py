"""Holds the planned memory against the measured: `python benchmarks/memory_plan.py` writes results/memory_plan.json.

Models of real shapes with random weights, and the shipped one, load, score, train for one update, save, resume and generate, each case in
a process of its own, on rungs 0 to 5 of the ladder. The error of a phase is (planned - measured) / (measured - imports), with the resident
set after the imports as baseline: what a plan can get wrong. Below 0 a run takes more than was planned, above 0 the plan is wasteful.

Measured is the kernel's peak of the resident set, forgotten before every phase; nothing of the planner is in that process. What a stage
takes beyond what can be counted is learned from the cases marked `calibrates`, as a node learns it from finished jobs
(profiles/calibration.py), and no error of theirs is counted.

`--shapes tiny` runs some shapes only, `--out FILE` writes elsewhere, `--measured FILE` plans the cases of an earlier run again and
measures nothing. All of it takes about 30 minutes on two cores, 10 GiB of memory and 8 GiB of temporary disk. Does not cover GPUs,
rungs 6 and 7, nor wall time: others may use the machine.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from memory_run import NEW_TOKENS, Case
from rich.console import Console
from rich.table import Table

from profiles import calibration
from profiles.device import device_profile
from profiles.memory import MMAP_THRESHOLD_BYTES, OWN_BLOCK_BYTES
from quantization.estimate import MARGIN

RESULTS = Path(__file__).parent / "results" / "memory_plan.json"
MIB = 2**20
AT_ONCE = 2
STAGES = {
    "load": "load", "score": "score", "forward": "train", "backward": "train", "optimizer": "train", "checkpoint": "train",
    "resume": "train", "save": "save", "evaluate": "evaluate",
}  # fmt: skip
"""Of every phase that is measured the stage that it belongs to."""
WITHIN = (-0.02, 0.08)
"""What the error of a phase should lie between."""


TINY, LLAMA, SMOLLM, SMOLLM_360M = "tiny", "llama-100m", "smollm2-135m", "smollm2-360m"
QWEN, QWEN3, LLAMA_1B, QWEN_1B = "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "qwen2.5-1.5b"
CASES = (
    Case(TINY, 3, 6, 700, 100, calibrates=True),
    Case(LLAMA, 0, 3, 450, 150, calibrates=True),
    Case(LLAMA, 3, 3, 500, 100, calibrates=True),
    Case(SMOLLM, 3, 2, 600, 200, calibrates=True),
    Case(QWEN, 1, 1, 350, 0, calibrates=True),
    *(Case(TINY, *sizes) for sizes in ((0, 5, 1200, 200), (1, 3, 1500, 0), (3, 8, 800, 0), (5, 7, 1300, 400))),
    *(Case(LLAMA, *sizes) for sizes in ((0, 4, 410, 0), (0, 7, 360, 220), (0, 9, 260, 60), (1, 2, 640, 0), (2, 4, 390, 0))),
    *(Case(LLAMA, *sizes) for sizes in ((3, 4, 560, 0), (3, 7, 420, 300), (4, 2, 520, 100), (5, 3, 440, 0))),
    *(Case(SMOLLM, *sizes) for sizes in ((0, 4, 260, 0), (0, 4, 460, 340), (1, 1, 700, 0), (2, 2, 420, 120), (3, 5, 400, 0))),
    *(Case(SMOLLM, *sizes) for sizes in ((3, 8, 300, 180), (4, 3, 340, 0), (5, 3, 280, 90))),
    *(Case(SMOLLM_360M, *sizes) for sizes in ((0, 2, 240, 0), (1, 1, 520, 0), (3, 3, 380, 120), (4, 2, 300, 0), (5, 1, 450, 0))),
    *(Case(QWEN, *sizes) for sizes in ((0, 2, 310, 90), (2, 2, 380, 0), (3, 3, 440, 0), (5, 3, 200, 80))),
    *(Case(QWEN3, *sizes) for sizes in ((0, 1, 420, 0), (3, 3, 320, 140), (4, 2, 260, 0), (5, 1, 380, 0))),
    *(Case(LLAMA_1B, *sizes) for sizes in ((1, 1, 340, 0), (3, 3, 280, 120))),
    *(Case(QWEN_1B, *sizes) for sizes in ((0, 1, 260, 0), (3, 1, 520, 0))),
)
"""Chosen before any of them was measured, those that calibrate apart. The phases of the shipped model take so little that they are told
apart, in bytes."""


class Phase(msgspec.Struct, frozen=True):
    """One phase of one run, beyond the resident set after the imports."""

    planned_bytes: int
    transient_bytes: int
    """Planned: what comes and goes."""
    measured_bytes: int
    error: float


class Run(msgspec.Struct, frozen=True):
    """One case, in bytes: what is held and what comes and goes as a dry run counts it, the measured peaks, and what comes of both."""

    case: Case
    counted: dict[str, tuple[int, int]]
    peaks: dict[str, int]
    phases: dict[str, Phase] = {}


class Report(msgspec.Struct):
    """The committed results. `errors` are the least and the largest of every phase; calibrating runs and the shipped model are left out."""

    date: str
    machine: str
    threads: int
    malloc_bytes: dict[str, int]
    """From which size on a block is given back when it is freed, while a model is loaded and then."""
    versions: dict[str, str]
    learned_bytes: dict[str, int]
    """Of every stage, imports included."""
    imports_bytes: int
    """The median."""
    plan_s: float
    """Processor seconds of one dry run, the median."""
    combinations: int
    transient_above_1_gib: int
    errors: dict[str, tuple[float, float]]
    outside: dict[str, int]
    """Runs whose error is not within the bounds, of every phase."""
    shipped_bytes: dict[str, tuple[int, int]]
    """Planned less measured of the shipped model, the least and the largest."""
    runs: list[Run]


def plan(case: Case, model: Path) -> dict[str, tuple[int, int]]:
    """Return the (resident, transient) bytes of every phase without the device's overhead, by a dry run."""
    from edge_agent.job import Dataset, Job, Schedule, SftOptions
    from edge_agent.training.methods import METHODS
    from edge_agent.training.rehearsal import Rehearsal
    from quantization.estimate import Lengths
    from quantization.ladder import Rows
    from quantization.model_files import find_model
    from quantization.shape import read_shape

    def rows(count: int) -> Rows:
        return Rows((case.tokens - 1,) * count, (case.answer,) * count, case.shared)

    files, options = find_model(str(model)), SftOptions()
    job = Job(model=str(model), dataset=Dataset("0" * 64), budget_bytes=2**50, method=options, schedule=Schedule(batch=case.micro_batch))
    lengths = Lengths(rows(case.micro_batch), rows(2 * case.micro_batch), (case.tokens - case.answer, NEW_TOKENS), asked=case.shared)
    device = msgspec.structs.replace(device_profile("cpu"), overhead_bytes=0)
    rehearsal = Rehearsal(files, read_shape(files), job, lengths, device, METHODS[SftOptions](options))
    stages = {
        s.phase or s.stage: (s.resident_bytes, s.transient_bytes)
        for s in rehearsal.stages(case.settings, case.micro_batch) if s.phase != "score"
    }  # fmt: skip
    return {phase: stages[phase] for phase in STAGES}


def _in_a_process(case: Case, model: Path) -> dict[str, int]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "THP_MEM_ALLOC_ENABLE": "1"}  # as the command line has it
    command = [sys.executable, str(Path(__file__).parent / "memory_run.py"), str(model), msgspec.json.encode(case).decode()]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)  # noqa: S603
    Console(stderr=True).print(f"{case.shape}: rung {case.rung}, {case.micro_batch} rows of {case.tokens} tokens, {case.shared} shared")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=dict[str, int])


def learn(runs: list[Run]) -> dict[str, int]:
    """Return what a node would have learned of each stage from the runs that calibrate, imports included."""
    device = device_profile("cpu")
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "calibration.json"
        for run in runs:
            if run.case.calibrates:
                found: dict[str, int] = {}
                for stage in STAGES.values():
                    phases = [phase for phase, of in STAGES.items() if of == stage]
                    counted_bytes = int(max(sum(run.counted[p]) for p in phases) / MARGIN)
                    found[stage] = max(run.peaks[p] for p in phases) - counted_bytes
                calibration.learn(device, found, file)
        return calibration.calibrated(device, file).learned_bytes


def judged(run: Run, learned_bytes: dict[str, int]) -> Run:
    """Return a run with the errors of its phases and of its peak."""
    imports, phases = run.peaks["imports"], {}
    for phase, stage in STAGES.items():
        resident, transient = run.counted[phase]
        phases[phase] = _phase(resident + transient + learned_bytes[stage] - imports, transient, run.peaks[phase] - imports)
    binding = max(phases.values(), key=lambda phase: phase.planned_bytes)
    phases["peak"] = _phase(binding.planned_bytes, binding.transient_bytes, max(phase.measured_bytes for phase in phases.values()))
    return msgspec.structs.replace(run, phases=phases)


def _phase(planned_bytes: int, transient_bytes: int, measured_bytes: int) -> Phase:
    return Phase(planned_bytes, transient_bytes, measured_bytes, round(planned_bytes / measured_bytes - 1, 4))


def report_of(runs: list[Run], plan_s: float) -> Report:
    from edge_agent.training.outcome import versions
    from profiles.device import device_name

    learned_bytes = learn(runs)
    runs = [judged(run, learned_bytes) for run in runs]
    found, shipped = [run.phases for run in held_against(runs)], [run.phases for run in runs if _is_judged(run) and run.case.shape == TINY]
    errors = {phase: [phases[phase].error for phases in found] for phase in (*STAGES, "peak")}
    beyond = {phase: [of[phase].planned_bytes - of[phase].measured_bytes for of in shipped] for phase in (*STAGES, "peak")}
    return Report(
        datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(), device_name("cpu"), 1,
        {"load": OWN_BLOCK_BYTES, "run": MMAP_THRESHOLD_BYTES}, versions(), learned_bytes,
        int(median(run.peaks["imports"] for run in runs)), plan_s,
        len(found), sum(phases["peak"].transient_bytes > 2**30 for phases in found),
        {phase: (min(of), max(of)) for phase, of in errors.items()},
        {phase: sum(not WITHIN[0] <= error <= WITHIN[1] for error in of) for phase, of in errors.items()},
        {phase: (min(of), max(of)) for phase, of in beyond.items()}, runs,
    )  # fmt: skip


def held_against(runs: list[Run]) -> list[Run]:
    """Return the runs whose errors are to lie within the bounds."""
    return [run for run in runs if _is_judged(run) and run.case.shape != TINY]


def _is_judged(run: Run) -> bool:
    return not run.case.calibrates


def page(report: Report) -> list[str]:
    """Return the table of docs/benchmarks.md."""
    found = [run.phases for run in held_against(report.runs)]
    lines = [
        "| | learned, MiB | least error | largest error | middle | outside of -2 to +8 % | shipped model, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for phase, (least, largest) in report.errors.items():
        learned_mib = f"{(report.learned_bytes[STAGES[phase]] - report.imports_bytes) / MIB:.1f}" if phase in STAGES else "-"
        middle = median(phases[phase].error for phases in found)
        errors = " | ".join(f"{100 * error:+.1f} %" for error in (least, largest, middle))
        shipped = " to ".join(f"{of / MIB:+.1f}" for of in report.shipped_bytes[phase])
        lines.append(f"| {phase} | {learned_mib} | {errors} | {report.outside[phase]} of {report.combinations} | {shipped} |")
    return lines


def table(runs: list[Run]) -> Table:
    view = Table("shape", "rung", "rows", "tokens", "shared", "peak MiB", *(f"{phase} %" for phase in (*STAGES, "peak")))
    for run in runs:
        case, cells = run.case, (f"{100 * phase.error:+.1f}" for phase in run.phases.values())
        sizes = (case.rung, case.micro_batch, case.tokens, case.shared, run.phases["peak"].measured_bytes // MIB)
        view.add_row(case.shape, *map(str, sizes), *cells, style="dim" if case.calibrates else None)
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", default=sorted({case.shape for case in CASES}))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measured", type=Path)
    options: Any = parser.parse_args()
    from shapes import write_model

    earlier = msgspec.json.decode(options.measured.read_bytes(), type=Report).runs if options.measured else []
    cases = [run.case for run in earlier] or [case for case in CASES if case.shape in options.shapes]
    with tempfile.TemporaryDirectory() as directory:
        models = {name: write_model(Path(directory) / name, name) for name in sorted({case.shape for case in cases})}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            peaks = [run.peaks for run in earlier] or list(pool.map(lambda case: _in_a_process(case, models[case.shape]), cases))
        runs, seconds = [], []
        for case, of_case in zip(cases, peaks, strict=True):
            began = time.process_time()
            runs.append(Run(case, plan(case, models[case.shape]), of_case))
            seconds.append(time.process_time() - began)
    report = report_of(runs, round(median(seconds), 2))
    options.out.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    Console(width=max(Console().width, 140)).print(table(report.runs))
    Console().print("\n".join(page(report)), markup=False)


if __name__ == "__main__":
    main()
