"""Holds the planned memory against the measured: `python benchmarks/memory_plan.py` writes results/memory_plan.json.

Models of real shapes with random weights, and the shipped one, load, score, train for one update and generate, each in a process of its
own, on rungs 0 to 3 of the ladder. The error of a phase is (planned - measured) / (measured - imports), with the resident set after the
imports as baseline: what a plan can get wrong. Below 0 a run takes more than was planned, above 0 the plan is wasteful.

Measured is the kernel's peak of the resident set, forgotten before every phase; nothing of the planner is in that process. What a device
takes beyond the tensors is learned from the cases marked `calibrates` (profiles/calibration.py), and no error of theirs is counted.

`--shapes tiny` runs some shapes only, `--out FILE` writes elsewhere. All of it takes about 15 minutes on two cores, 8 GiB of memory and
2 GiB of temporary disk. Does not cover GPUs, nor wall time: others may use the machine.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "memory_plan.json"
MIB = 2**20
NEW_TOKENS = 24
PHASES = ("load", "score", "forward", "backward", "optimizer", "evaluate")


class Case(msgspec.Struct, frozen=True):
    """One run: rows of `tokens` that begin with the same `shared` ones and end in answers of a quarter of them."""

    shape: str
    micro_batch: int
    tokens: int
    shared: int
    checkpointing: bool = False
    head_chunk: int = 256
    calibrates: bool = False

    @property
    def answer(self) -> int:
        return self.tokens // 4

    @property
    def rung(self) -> str:
        checkpointing = ", checkpointing" if self.checkpointing else ""
        return f"micro-batch {self.micro_batch}, head chunks of {self.head_chunk}{checkpointing}"


CASES = (
    *(Case("tiny", m, t, 100, c, calibrates=True) for m, t, c in ((8, 400, False), (2, 800, True))),
    Case("llama-100m", 2, 600, 100, calibrates=True),
    Case("smollm2-135m", 2, 500, 100, checkpointing=True, calibrates=True),
    *(Case("tiny", m, t, s) for m, t, s in ((8, 1000, 0), (8, 1600, 600))),
    *(Case("llama-100m", m, t, s) for m, t, s in ((1, 1200, 0), (4, 400, 100), (8, 300, 0), (4, 800, 500), (8, 700, 500))),
    *(Case("llama-100m", m, t, s, True) for m, t, s in ((1, 1200, 0), (8, 400, 100), (8, 700, 500), (4, 1500, 0))),
    *(Case("llama-100m", m, t, s, c, 32) for m, t, s, c in ((1, 500, 0, False), (8, 600, 500, True), (2, 1000, 200, False))),
    *(Case("smollm2-135m", m, t, s) for m, t, s in ((1, 700, 0), (4, 300, 100), (8, 600, 500), (2, 900, 0))),
    *(Case("smollm2-135m", m, t, s, True) for m, t, s in ((4, 800, 500), (8, 300, 0), (1, 1600, 0))),
    *(Case("smollm2-135m", m, t, s, c, 32) for m, t, s, c in ((1, 600, 0, False), (4, 600, 400, True))),
    *(Case("qwen2.5-0.5b", m, t, s) for m, t, s in ((1, 500, 0), (2, 400, 200), (4, 550, 500))),
    *(Case("qwen2.5-0.5b", m, t, s, True) for m, t, s in ((1, 1000, 0), (4, 400, 100))),
    *(Case("qwen2.5-0.5b", m, t, s, c, 32) for m, t, s, c in ((1, 400, 0, False), (4, 600, 500, True))),
)


class Row(msgspec.Struct):
    """One phase of one run, in MiB above the resident set after the imports."""

    shape: str
    rung: str
    tokens: int
    shared: int
    calibrates: bool
    phase: str
    planned_mib: float
    measured_mib: float
    transient_mib: float
    """Planned: what comes and goes."""
    error: float


def plan(case: Case, model: Path) -> dict[str, tuple[int, int]]:
    """Return the (resident, transient) bytes of every phase without the device's overhead, by a dry run."""
    from edge_agent.job import Dataset, Job, Schedule, SftOptions
    from edge_agent.training.methods import METHODS
    from edge_agent.training.rehearsal import Rehearsal
    from profiles.device import device_profile
    from quantization.estimate import Lengths
    from quantization.ladder import Rows, Rung
    from quantization.model_files import find_model
    from quantization.shape import read_shape

    def rows(count: int) -> Rows:
        return Rows((case.tokens - 1,) * count, (case.answer,) * count, case.shared)

    files, options = find_model(str(model)), SftOptions()
    job = Job(model=str(model), dataset=Dataset("0" * 64), budget_bytes=2**50, method=options, schedule=Schedule(batch=case.micro_batch))
    lengths = Lengths(rows(case.micro_batch), rows(2 * case.micro_batch), (case.tokens - case.answer, NEW_TOKENS), asked=case.shared)
    device = msgspec.structs.replace(device_profile("cpu"), overhead_bytes=0)
    rehearsal = Rehearsal(files, read_shape(files), job, lengths, device, METHODS[SftOptions](options))
    rung = Rung(0, case.micro_batch, case.head_chunk, case.checkpointing)
    stages = {
        s.phase or s.stage: (s.resident_bytes, s.transient_bytes) for s in rehearsal.stages(rung, case.micro_batch) if s.phase != "score"
    }
    return {phase: stages[phase] for phase in PHASES}


def measure(case: Case, model: Path) -> dict[str, int]:
    """Return the peaks of the resident set of every phase, and the set after the imports."""
    import torch

    from edge_agent.job import Lora
    from edge_agent.training.generate import generate
    from edge_agent.training.head import answer_logp, weighted_loss
    from edge_agent.training.loop import trained
    from edge_agent.training.packing import answer_hidden, pack
    from profiles.device import device_profile
    from profiles.memory import fix_malloc
    from quantization.adapter import attach_adapter, checkpoint_activations
    from quantization.load import load_model, load_tokenizer
    from quantization.model_files import find_model

    fix_malloc()
    torch.manual_seed(0)
    tokenizer = load_tokenizer(find_model(str(model)))
    peaks = {"imports": _status("VmRSS")}

    def phase(name: str, work: Callable[[], Any]) -> Any:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        found = work()
        peaks[name] = _status("VmHWM")
        return found

    loaded = phase("load", lambda: load_model(find_model(str(model)), device_profile("cpu")))
    beginning = torch.randint(2, 700, (case.shared,)).tolist()

    def rows(count: int) -> list[tuple[list[int], list[int]]]:
        ids = [[*beginning, *torch.randint(2, 700, (case.tokens - case.shared,)).tolist()] for _ in range(count)]
        return [(row[: -case.answer], row[-case.answer :]) for row in ids]

    adapted = attach_adapter(loaded, Lora(), 0, "model")

    @torch.no_grad()
    def score() -> None:
        packed = pack(adapted, rows(2 * case.micro_batch), 1)
        answer_logp(adapted, answer_hidden(adapted, packed), packed.target_ids_N, case.head_chunk).cpu()

    phase("score", score)
    parameters = list(trained(adapted).values())
    optimizer = torch.optim.AdamW(parameters)
    if case.checkpointing:
        checkpoint_activations(adapted)
    adapted.train()

    def forward(pairs: list[tuple[list[int], list[int]]]) -> torch.Tensor:
        packed = pack(adapted, pairs, 1)
        hidden_ND = answer_hidden(adapted, packed)
        ones_N = torch.ones(len(packed.target_ids_N))
        return weighted_loss(adapted, hidden_ND, packed.target_ids_N, ones_N, 0 * ones_N, case.head_chunk)

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


def _in_a_process(task: str, case: Case, model: Path) -> Any:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "THP_MEM_ALLOC_ENABLE": "1"}  # as the command line has it
    command = [sys.executable, __file__, "--task", task, "--model", str(model), "--case", msgspec.json.encode(case).decode()]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)  # noqa: S603
    return msgspec.json.decode(done.stdout.splitlines()[-1])


def rows_of(case: Case, planned: dict[str, list[int]], peaks: dict[str, int], overhead_bytes: float) -> list[Row]:
    """Return the phases of a case; `overhead_bytes` is what is planned beyond tensors and imports."""
    found = []
    for phase in (*PHASES, "peak"):
        if phase == "peak":
            resident, transient = max(planned.values(), key=sum)
            measured = max(peaks[p] for p in PHASES)
        else:
            (resident, transient), measured = planned[phase], peaks[phase]
        total, above = resident + transient + overhead_bytes, measured - peaks["imports"]
        found.append(Row(
            case.shape, case.rung, case.tokens, case.shared, case.calibrates, phase, round(total / MIB, 1), round(above / MIB, 1),
            round(transient / MIB, 1), round(total / above - 1, 4),
        ))  # fmt: skip
    return found


def learned(results: list[tuple[Case, dict[str, list[int]], dict[str, int]]]) -> float:
    """Return what the cases that calibrate take beyond tensors and imports: the middle of what would have covered each of them."""
    return median(max(peaks[p] - peaks["imports"] - sum(planned[p]) for p in PHASES) for case, planned, peaks in results if case.calibrates)


def extremes(errors: list[float]) -> tuple[float, float]:
    return min(errors, default=0.0), max(errors, default=0.0)


def table(found: list[Row]) -> Table:
    view = Table("shape", "rung", "tokens", "shared", "phase", "planned MiB", "measured MiB", "error %")
    for row in found:
        style = "dim" if row.calibrates else None if -0.02 <= row.error <= 0.08 else "red"
        cells = (f"{row.planned_mib:,.0f}", f"{row.measured_mib:,.0f}", f"{100 * row.error:+.1f}")
        view.add_row(row.shape, row.rung, str(row.tokens), str(row.shared), row.phase, *cells, style=style, end_section=row.phase == "peak")
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", default=sorted({case.shape for case in CASES}))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--task", choices=("plan", "measure"), help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options: Any = parser.parse_args()
    if options.task:
        case = msgspec.json.decode(options.case, type=Case)
        work: Any = plan if options.task == "plan" else measure
        sys.stdout.write("\n" + msgspec.json.encode(work(case, options.model)).decode() + "\n")
        return
    from shapes import write_model

    from edge_agent.training.outcome import versions
    from profiles.device import device_name

    results = []
    with tempfile.TemporaryDirectory() as directory:
        models = {name: write_model(Path(directory) / name, name) for name in options.shapes}
        for case in CASES:
            if case.shape in models:
                results.append((case, *(_in_a_process(task, case, models[case.shape]) for task in ("plan", "measure"))))
                Console(stderr=True).print(f"{case.shape}: {case.rung}, {case.tokens} tokens, {case.shared} shared")
    overhead_bytes = learned(results)
    found = [row for case, planned, peaks in results for row in rows_of(case, planned, peaks, overhead_bytes)]
    counted = [row for row in found if not row.calibrates]
    report = {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "machine": device_name("cpu"),
        "versions": versions(),
        "overhead_mib": round(overhead_bytes / MIB, 1),
        "combinations": len(counted) // (len(PHASES) + 1),
        "transient_above_1_gib": sum(row.phase == "peak" and row.transient_mib > 1024 for row in counted),
        "errors": {
            p: [min(r.error for r in counted if r.phase == p), max(r.error for r in counted if r.phase == p)] for p in (*PHASES, "peak")
        },
        "rows": found,
    }
    options.out.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    Console(width=max(Console().width, 120)).print(table(found))
    Console().print(report["errors"])


if __name__ == "__main__":
    main()
