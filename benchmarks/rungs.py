"""What the rungs of the ladder hold and what they cost: `python benchmarks/rungs.py` writes benchmarks/results/rungs.json.

Budgets: for every rung that the planner chooses at some budget, a job is trained by the command line with the budget in the middle of those
at which it is chosen. Held against the budget is the kernel's peak of the process, looked at from outside twenty times a second. Which
budgets these are the planner says itself before.

Accuracy: rungs 4 and 5 quantise the optimizer's moments and the vocabulary. Jobs of the shipped model train on the same questions and
outputs as in benchmarks/methods.py, on rung 0, with 8-bit Adam (4), and with head and embedding in NF4 as well (5); differences are taken
within each seed, and told with their 95 % interval (Student's t). The adapter's rank is 32: moments of less than 4,096 numbers stay in
32 bits. The other rungs train the same adapter to 1e-3, as tests/test_rungs.py shows.

About 10 and 30 minutes on two cores; `--only` measures one of both. Does not cover GPUs, and so not rung 7.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import islice, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import msgspec
import torch
from methods import COMMON, TABLE, TINY, Cell, dataset, held_out
from methods_page import Interval, interval
from rich.console import Console
from shapes import NAMES, write_model

from edge_agent.answers import Answer
from edge_agent.dataset import Record, read_records, write_records
from edge_agent.demo.problems import problems
from edge_agent.files import write_file
from edge_agent.job import Job
from edge_agent.job_building import build_job
from edge_agent.job_directory import JobDirectory
from edge_agent.training.outcome import versions
from edge_agent.training.prepare import Prepared, prepare_files
from edge_agent.training.run import run_job
from profiles.device import device_name

RESULTS = Path(__file__).parent / "results" / "rungs.json"
MIB = 2**20
RECORDS, QUESTIONS, LOOK_S = 8, 500, 0.05
SHORT = {"schedule.updates": 2, "schedule.batch": 8, "evaluation.questions": 0, "evaluation.verifier": "exact", "method.name": "sft"}
DOMAINS, SEEDS, RATE = ("chain", "reversed"), (1, 2, 3, 4, 5), 1.5e-3
QUANTISED: dict[int, dict[str, bool]] = {0: {}, 4: {"adam_8bit": True}, 5: {"adam_8bit": True, "quantized_head": True}}


class Budget(msgspec.Struct, frozen=True):
    """One job with the budget in the middle of those for its rung."""

    shape: str
    number: int
    rung: str
    budget_bytes: int
    planned_bytes: int
    measured_bytes: int
    misses: int


class Trained(msgspec.Struct, frozen=True):
    """One job of the shipped model on a rung that quantises, or on rung 0; accuracies in %, loss of the last update."""

    number: int
    domain: str
    seed: int
    before: float
    after: float
    loss: float


class Circumstances(msgspec.Struct, frozen=True):
    """When and where something was measured."""

    date: str
    machine: str
    versions: dict[str, str]


class Report(msgspec.Struct, frozen=True):
    """The committed results."""

    budgets_of: Circumstances
    budgets: list[Budget]
    trained_of: Circumstances
    trained: list[Trained]


# Budgets ------------------------------------------------------------------------------------------------------------


def questions(directory: Path) -> Path:
    """Write records whose tokens are many enough for rungs to differ: several problems in one."""
    drawn, file = problems("chain", 1), directory / "records.jsonl"
    groups = [list(islice(drawn, 6)) for _ in range(RECORDS)]
    write_file(file, write_records(Record("\n".join(p.question for p in g), "\n".join(p.answer for p in g)) for g in groups))
    return file


def job_of(model: Path, data: Path, budget_bytes: int) -> Job:
    return build_job(str(model), data, None, {**SHORT, "budget_bytes": budget_bytes}, [])


def middles(work: Prepared) -> Iterator[tuple[int, int]]:
    """Yield every rung's number with the middle of the widest range of budgets at which one of its settings is chosen."""
    rehearsal, least = work.rehearsal(), 2**62
    widest: dict[int, tuple[int, int]] = {}
    for rung in rehearsal.rungs:
        peak = max(stage.peak_bytes for stage in rehearsal.stages(rung, 1)) + work.device.spare_bytes
        above = peak + 256 * MIB if least == 2**62 else least
        if peak < least:
            low, high = widest.get(rung.number, (0, 0))
            if above - peak > high - low:
                widest[rung.number] = (peak, above)
            least = peak
    yield from ((number, (low + high) // 2) for number, (low, high) in sorted(widest.items()))


def train(shape: str, model: Path, data: Path, budget_bytes: int, out: Path) -> Budget:
    """Run a job by the command line in a process of its own."""
    directory = JobDirectory(out)
    directory.create(job_of(model, data, budget_bytes), data, None)
    command = [sys.executable, "-m", "edge_agent", "train", str(out)]
    log, peak_bytes = out.with_suffix(".log"), 0
    environment = os.environ | {"EDGE_AGENT_CACHE_LIMIT": "0"}
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as child:  # noqa: S603
        status = Path(f"/proc/{child.pid}/status")
        while child.poll() is None:
            with suppress(OSError, StopIteration):
                line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
                peak_bytes = max(peak_bytes, int(line.split()[1]) * 1024)
            time.sleep(LOOK_S)
    result = directory.read_result()
    if result is None or result.plan is None:
        raise SystemExit(f"with {budget_bytes / MIB:.0f} MiB: {log.read_text()[-2000:]}")
    plan = result.plan
    return Budget(shape, plan.number, plan.rung, budget_bytes, plan.peak_bytes, peak_bytes, len(result.misses))


def budgets(shape: str) -> list[Budget]:
    """Train on every rung of a shape."""
    found = []
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_STATE_HOME"] = f"{place}/state"  # each as a node that has not learned yet
        model, data = write_model(Path(place) / "model", shape), questions(Path(place))
        work = prepare_files(job_of(model, data, 2**50), read_records(data), None)
        for number, budget_bytes in middles(work):
            os.environ["XDG_STATE_HOME"] = f"{place}/state-{number}"
            found.append(train(shape, model, data, budget_bytes, Path(place) / f"rung-{number}"))
            Console(stderr=True).print(found[-1])
    return found


def _held(shapes: list[str]) -> list[Budget]:
    return [budget for shape in shapes for budget in budgets(shape)]


# Accuracy -----------------------------------------------------------------------------------------------------------


def quality(number: int, domain: str, seed: int, out: Path) -> Trained:
    """Train the shipped model on a rung, whatever the budget, and measure it on held-out questions."""
    torch.set_num_threads(1)
    cell = Cell("table", "NLFT", domain, TABLE, seed, RATE, QUESTIONS)
    data, _, _ = dataset(cell, out)
    evaluation = out / f"held-out-{domain}-{seed}-{number}.jsonl"
    write_file(evaluation, write_records(held_out(cell)))
    fields = {**COMMON, "seed": seed, "evaluation.questions": QUESTIONS, "schedule.learning_rate": RATE, "lora.rank": 32}
    job = build_job(str(TINY), data, evaluation, fields, [])
    directory = JobDirectory(out / f"{domain}-{seed}-{number}")
    directory.create(job, data, evaluation)
    work = prepare_files(job, *directory.read_dataset(job))
    plan = msgspec.structs.replace(work.plan(), number=number, **QUANTISED[number])
    directory.begin(work.key)  # a job goes on with the plan that it began with
    directory.write_plan(plan)
    result = run_job(directory, lambda event: None)
    before, after = (_share(directory.read_rows(name, Answer) or []) for name in ("before.jsonl", "after.jsonl"))
    return Trained(number, domain, seed, before, after, round(result.losses[-1], 4))


def _share(answers: list[Answer]) -> float:
    return 100 * sum(a.share == 1 for a in answers) / len(answers)


def qualities(workers: int) -> list[Trained]:
    """Train on all rungs, domains and seeds; datasets are made first, because two workers would make one at once."""
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_STATE_HOME"], out = f"{place}/state", Path(place)
        for domain, seed in product(DOMAINS, SEEDS):
            dataset(Cell("table", "NLFT", domain, TABLE, seed, RATE, QUESTIONS), out)
        cases = list(product(QUANTISED, DOMAINS, SEEDS))
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            return list(pool.map(quality, *zip(*cases, strict=True), [out] * len(cases)))


# Page ---------------------------------------------------------------------------------------------------------------


def page(report: Report) -> dict[str, list[str]]:
    """Return the tables of docs/benchmarks.md by their names."""
    held = ["| shape | rung | settings | budget, MiB | planned | measured | of the budget |", "|---|---|---|---|---|---|---|"]
    for b in report.budgets:
        sizes = " | ".join(f"{n / MIB:,.0f}" for n in (b.budget_bytes, b.planned_bytes, b.measured_bytes))
        held.append(f"| {b.shape} | {b.number} | {b.rung} | {sizes} | {100 * b.measured_bytes / b.budget_bytes:.0f} % |")
    cost = ["| domain | rung | before, % | after, % | after, to rung 0 | last loss | to rung 0 |", "|---|---|---|---|---|---|---|"]
    for domain, number in product(DOMAINS, QUANTISED):
        rows = {t.seed: t for t in report.trained if (t.domain, t.number) == (domain, number)}
        exact = {t.seed: t for t in report.trained if (t.domain, t.number) == (domain, 0)}
        cells = [interval([t.before for t in rows.values()]), interval([t.after for t in rows.values()])]
        accuracy, loss = (_difference(rows, exact, name) for name in ("after", "loss"))
        last = interval([t.loss for t in rows.values()])
        compared = [str(accuracy), f"{last.value:.3f} ± {last.half:.3f}", f"{loss.value:+.3f} ± {loss.half:.3f}"]
        if not number:
            compared[::2] = "", ""
        cost.append(f"| {domain} | {number} | {' | '.join([*map(str, cells), *compared])} |")
    return {"budgets": held, "quantised": cost}


def _difference(rows: dict[int, Trained], exact: dict[int, Trained], name: str) -> Interval:
    return interval([getattr(row, name) - getattr(exact[seed], name) for seed, row in rows.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=NAMES, nargs="+", default=["llama-100m"])
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that train at once where accuracy is measured")
    parser.add_argument("--only", choices=("budgets", "accuracy"), help="measure this part; the other stays as it is in the results")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options: Any = parser.parse_args()
    now = Circumstances(datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(), device_name("cpu"), versions())
    earlier = msgspec.json.decode(RESULTS.read_bytes(), type=Report) if options.only else None
    report = Report(
        *((earlier.budgets_of, earlier.budgets) if earlier and options.only != "budgets" else (now, _held(options.shape))),
        *((earlier.trained_of, earlier.trained) if earlier and options.only != "accuracy" else (now, qualities(options.workers))),
    )
    write_file(options.out, msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    for lines in page(report).values():
        Console().print("\n".join(lines), markup=False)


if __name__ == "__main__":
    main()
