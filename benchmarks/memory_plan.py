"""Holds the planned memory against the measured: `python benchmarks/memory_plan.py` writes results/memory_plan.json.

Models of real shapes with random weights, and the shipped one, load, score, train for one update and generate, each in a process of its
own, on rungs 0 to 5 of the ladder. The error of a phase is (planned - measured) / (measured - imports), with the resident set after the
imports as baseline: what a plan can get wrong. Below 0 a run takes more than was planned, above 0 the plan is wasteful.

Measured is the kernel's peak of the resident set, forgotten before every phase; nothing of the planner is in that process. What a stage
takes beyond what can be counted is learned from the cases marked `calibrates`, as a node learns it from finished jobs
(profiles/calibration.py), and no error of theirs is counted.

`--shapes tiny` runs some shapes only, `--out FILE` writes elsewhere, `--measured FILE` plans the cases of an earlier run again and
measures nothing. All of it takes about 20 minutes on two cores, 8 GiB of memory and 2 GiB of temporary disk. Does not cover GPUs,
rungs 6 and 7, nor wall time: others may use the machine.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from quantization.ladder import Rung

RESULTS = Path(__file__).parent / "results" / "memory_plan.json"
MIB = 2**20
NEW_TOKENS = 24
AT_ONCE = 2
STAGES = {"load": "load", "score": "score", "forward": "train", "backward": "train", "optimizer": "train", "evaluate": "evaluate"}
"""Of every phase that is measured the stage that it belongs to."""
WITHIN = (-0.02, 0.08)
"""What the error of a phase should lie between."""


class Case(msgspec.Struct, frozen=True, omit_defaults=True):
    """One run: rows of `tokens` that begin with the same `shared` ones and end in answers of a quarter of them."""

    shape: str
    rung: int
    micro_batch: int
    tokens: int
    shared: int
    calibrates: bool = False

    @property
    def answer(self) -> int:
        return self.tokens // 4

    @property
    def settings(self) -> Rung:
        """Each rung with the measures that it is named for and none of those before it, so that each is measured alone."""
        return Rung(
            self.rung, self.micro_batch, 32 if self.rung == 2 else 256, self.rung == 3, adam_8bit=self.rung >= 4,
            quantized_head=self.rung >= 5,
        )  # fmt: skip


TINY, LLAMA, SMOLLM, QWEN = "tiny", "llama-100m", "smollm2-135m", "qwen2.5-0.5b"
CASES = (
    *(Case(TINY, *sizes, calibrates=True) for sizes in ((0, 8, 400, 100), (3, 2, 800, 100))),
    Case(LLAMA, 0, 2, 600, 100, calibrates=True),
    Case(SMOLLM, 3, 2, 500, 100, calibrates=True),
    *(Case(TINY, *sizes) for sizes in ((0, 8, 1000, 0), (0, 16, 1200, 200), (0, 24, 900, 0), (1, 4, 1800, 600), (2, 8, 1900, 0))),
    *(Case(TINY, *sizes) for sizes in ((3, 16, 1000, 400), (3, 8, 500, 300), (4, 8, 900, 300), (4, 4, 500, 100))),
    *(Case(TINY, *sizes) for sizes in ((5, 8, 900, 0), (5, 4, 600, 200))),
    *(Case(TINY, *sizes) for sizes in ((0, 12, 1500, 0), (4, 12, 1500, 0), (5, 20, 950, 0))),
    *(Case(SMOLLM, *sizes) for sizes in ((0, 2, 450, 0), (1, 1, 900, 0))),
    Case(LLAMA, 0, 5, 350, 0),
    *(Case(LLAMA, *sizes) for sizes in ((0, 4, 700, 500), (0, 4, 350, 0), (1, 1, 900, 0), (2, 2, 700, 0), (3, 2, 500, 0))),
    *(Case(LLAMA, *sizes) for sizes in ((3, 4, 400, 300), (4, 2, 400, 100), (4, 1, 700, 0), (5, 2, 300, 0))),
    *(Case(SMOLLM, *sizes) for sizes in ((0, 2, 380, 0), (0, 4, 350, 250), (1, 1, 750, 0), (2, 2, 400, 50), (3, 2, 400, 0))),
    *(Case(SMOLLM, *sizes) for sizes in ((3, 2, 700, 500), (4, 2, 300, 0), (5, 1, 500, 0))),
    *(Case(QWEN, *sizes) for sizes in ((1, 1, 450, 0), (2, 2, 300, 150), (3, 1, 400, 0), (5, 1, 300, 0))),
)


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


def measure(case: Case, model: Path) -> dict[str, int]:
    """Return the peaks of the resident set of every phase, and the set after the imports."""
    import torch

    from edge_agent.job import Lora, Schedule
    from edge_agent.training.generate import generate
    from edge_agent.training.head import answer_logp, weighted_loss
    from edge_agent.training.loop import trained
    from edge_agent.training.optimizer import make_optimizer
    from edge_agent.training.packing import answer_hidden, pack
    from profiles.device import device_profile
    from profiles.memory import fix_malloc
    from quantization.adapter import attach_adapter, checkpoint_activations
    from quantization.load import load_model, load_tokenizer
    from quantization.model_files import find_model

    fix_malloc()
    torch.manual_seed(0)
    rung = case.settings
    tokenizer = load_tokenizer(find_model(str(model)))
    peaks = {"imports": _status("VmRSS")}

    def phase(name: str, work: Callable[[], Any]) -> Any:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        found = work()
        peaks[name] = _status("VmHWM")
        return found

    loaded = phase("load", lambda: load_model(
        find_model(str(model)), device_profile("cpu"), quantized_head=rung.quantized_head
    ))  # fmt: skip
    beginning = torch.randint(2, 700, (case.shared,)).tolist()

    def rows(count: int) -> list[tuple[list[int], list[int]]]:
        ids = [[*beginning, *torch.randint(2, 700, (case.tokens - case.shared,)).tolist()] for _ in range(count)]
        return [(row[: -case.answer], row[-case.answer :]) for row in ids]

    adapted = attach_adapter(loaded, Lora(), 0, "model")

    @torch.no_grad()
    def score() -> None:
        packed = pack(adapted, rows(2 * case.micro_batch), 1)
        answer_logp(adapted, answer_hidden(adapted, packed), packed.target_ids_N, rung.head_chunk).cpu()

    phase("score", score)
    parameters = list(trained(adapted).values())
    optimizer = make_optimizer(parameters, Schedule(), rung.adam_8bit)
    if rung.checkpointing:
        checkpoint_activations(adapted)
    adapted.train()

    def forward(pairs: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        packed = pack(adapted, pairs, 1)
        hidden_ND = answer_hidden(adapted, packed)
        ones_N = torch.ones(len(packed.target_ids_N))
        return weighted_loss(adapted, hidden_ND, packed.target_ids_N, ones_N, 0 * ones_N, rung.head_chunk)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    forward([([2, 3], [4, 5])]).backward()  # so that the moments are there, as in all updates but the first
    update()
    loss = phase("forward", lambda: forward(rows(case.micro_batch)))
    phase("backward", loss.backward)
    del loss
    phase("optimizer", update)
    optimizer.state.clear()
    prompts = [prompt for prompt, _ in rows(case.micro_batch)]
    phase("evaluate", lambda: generate(
        adapted, tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch=len(prompts), progress=lambda *_: None
    ))  # fmt: skip
    return peaks


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _in_a_process(case: Case, model: Path) -> dict[str, int]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "THP_MEM_ALLOC_ENABLE": "1"}  # as the command line has it
    command = [sys.executable, __file__, "--model", str(model), "--case", msgspec.json.encode(case).decode()]
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
                beyond.append(max(run.peaks[p] for p in phases) - run.peaks["imports"] - max(sum(run.counted[p]) for p in phases))
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
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options: Any = parser.parse_args()
    if options.case:
        of_case = measure(msgspec.json.decode(options.case, type=Case), options.model)
        sys.stdout.write("\n" + msgspec.json.encode(of_case).decode() + "\n")
        return
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
