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


TINY, LLAMA, SMOLLM, QWEN, LLAMA_1B, QWEN_1B = "tiny", "llama-100m", "smollm2-135m", "qwen2.5-0.5b", "llama-3.2-1b", "qwen2.5-1.5b"
CASES = (
    Case(TINY, 3, 6, 700, 100, calibrates=True),
    Case(LLAMA, 0, 3, 450, 150, calibrates=True),
    Case(LLAMA, 3, 3, 500, 100, calibrates=True),
    Case(SMOLLM, 3, 2, 600, 200, calibrates=True),
    Case(QWEN, 1, 1, 350, 0, calibrates=True),
    *(Case(TINY, *sizes) for sizes in ((0, 6, 1100, 100), (1, 2, 1600, 0), (3, 10, 700, 200), (4, 6, 1300, 300), (5, 8, 1400, 0))),
    *(Case(LLAMA, *sizes) for sizes in ((0, 3, 550, 0), (0, 6, 420, 260), (0, 10, 240, 0), (1, 1, 1300, 0), (2, 3, 480, 0))),
    *(Case(LLAMA, *sizes) for sizes in ((3, 3, 650, 0), (3, 8, 380, 250), (4, 3, 400, 200), (5, 4, 330, 0))),
    *(Case(SMOLLM, *sizes) for sizes in ((0, 3, 320, 0), (0, 5, 400, 300), (1, 1, 820, 0), (2, 3, 300, 100), (3, 4, 450, 0))),
    *(Case(SMOLLM, *sizes) for sizes in ((3, 6, 360, 200), (4, 2, 430, 0), (5, 2, 370, 150))),
    *(Case(QWEN, *sizes) for sizes in ((0, 2, 260, 0), (1, 1, 600, 0), (2, 3, 280, 180), (3, 2, 500, 0), (3, 4, 400, 280))),
    *(Case(QWEN, *sizes) for sizes in ((4, 1, 420, 0), (5, 2, 240, 60))),
    *(Case(LLAMA_1B, *sizes) for sizes in ((0, 2, 250, 100), (3, 2, 350, 0), (4, 1, 380, 0), (5, 1, 300, 0))),
    *(Case(QWEN_1B, *sizes) for sizes in ((1, 1, 310, 0), (3, 2, 400, 150))),
)
"""Chosen before any of them was measured."""


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
    """The committed results. `errors` are the least and the largest of every phase, calibrating runs left out."""

    date: str
    machine: str
    versions: dict[str, str]
    learned_bytes: dict[str, int]
    plan_s: float
    """Processor seconds of one dry run, the median."""
    combinations: int
    transient_above_1_gib: int
    errors: dict[str, tuple[float, float]]
    outside: dict[str, int]
    """Runs whose error is not within the bounds, of every phase."""
    runs: list[Run]


def plan(case: Case, model: Path) -> dict[str, tuple[int, int]]:
    """Return the (resident, transient) bytes of every phase without the device's overhead, by a dry run."""
    from edge_agent.job import Dataset, Job, Schedule, SftOptions
    from edge_agent.training.methods import METHODS
    from edge_agent.training.rehearsal import Rehearsal
    from profiles.device import device_profile
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
    """Return what each stage of the runs that calibrate takes beyond what is counted: the middle of what would have covered it."""
    found: dict[str, list[int]] = {stage: [] for stage in STAGES.values()}
    for run in runs:
        if run.case.calibrates:
            for stage, beyond in found.items():
                phases = [phase for phase, of in STAGES.items() if of == stage]
                counted_bytes = int(max(sum(run.counted[p]) for p in phases) / MARGIN)
                beyond.append(max(run.peaks[p] for p in phases) - run.peaks["imports"] - counted_bytes)
    return {stage: int(median(beyond)) for stage, beyond in found.items()}


def judged(run: Run, learned_bytes: dict[str, int]) -> Run:
    """Return a run with the errors of its phases and of its peak."""
    imports, phases = run.peaks["imports"], {}
    for phase, stage in STAGES.items():
        resident, transient = run.counted[phase]
        phases[phase] = _phase(resident + transient + learned_bytes[stage], transient, run.peaks[phase] - imports)
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
    found = [run.phases for run in runs if not run.case.calibrates]
    errors = {phase: [phases[phase].error for phases in found] for phase in (*STAGES, "peak")}
    return Report(
        datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(), device_name("cpu"), versions(), learned_bytes, plan_s,
        len(found), sum(phases["peak"].transient_bytes > 2**30 for phases in found),
        {phase: (min(of), max(of)) for phase, of in errors.items()},
        {phase: sum(not WITHIN[0] <= error <= WITHIN[1] for error in of) for phase, of in errors.items()}, runs,
    )  # fmt: skip


def page(report: Report) -> list[str]:
    """Return the table of docs/benchmarks.md."""
    found = [run.phases for run in report.runs if not run.case.calibrates]
    lines = ["| | learned, MiB | least error | largest error | middle | outside of -2 to +8 % |", "|---|---|---|---|---|---|"]
    for phase, (least, largest) in report.errors.items():
        learned_mib = f"{report.learned_bytes[STAGES[phase]] / MIB:.1f}" if phase in STAGES else "-"
        middle = median(phases[phase].error for phases in found)
        errors = " | ".join(f"{100 * error:+.1f} %" for error in (least, largest, middle))
        lines.append(f"| {phase} | {learned_mib} | {errors} | {report.outside[phase]} of {report.combinations} |")
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
