"""The one-command tour: the shipped tiny model learns two domains it has not seen, and base, SFT and NLFT are compared.

Every run is an ordinary job in a directory of its own under the output directory, and can be run again by hand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from edge_agent.console import LiveView, summary
from edge_agent.dataset import Record, write_records
from edge_agent.demo.problems import problems
from edge_agent.errors import EdgeAgentError
from edge_agent.files import write_file
from edge_agent.job_building import build_job
from edge_agent.job_directory import JobDirectory
from edge_agent.report import Accuracy, Paired, Result, wilson

QUESTIONS = 300
EVALUATION_SEED = 1000
MODEL = Path(__file__).parent / "tiny"
SETTINGS = {
    "budget_bytes": 2**30, "evaluation.questions": QUESTIONS, "evaluation.max_new_tokens": 120, "schedule.updates": 60,
    "schedule.learning_rate": 2e-3,
}  # fmt: skip


class Domain(msgspec.Struct, frozen=True):
    """What a domain trains on, and the job fields of each method over identical records."""

    records: int
    standard_answers: bool
    methods: dict[str, dict[str, object]]


DOMAINS = {
    "chain": Domain(50, True, {"nlft": {"method.name": "nlft"}, "sft": {"method.name": "sft", "method.targets": "both"}}),
    "distractor": Domain(
        25,
        False,
        {
            "nlft": {"method.name": "nlft", "method.standard_answers": False},
            "sft": {"method.name": "sft", "method.targets": "outputs"},
        },
    ),
}
"""SFT has weight 1 on every token of what is correct in the records: the standard answers where NLFT has them, and correct outputs."""


class Comparison(msgspec.Struct, frozen=True):
    """The same questions before training, after SFT, and after NLFT."""

    before: Accuracy
    sft: Accuracy
    after: Accuracy


class SeedReport(msgspec.Struct, frozen=True):
    seed: int
    accuracy: Comparison
    paired: Paired
    """NLFT against the base model."""
    jobs: dict[str, str]
    """Job directory of each method, inside the output directory."""


class DomainReport(msgspec.Struct, frozen=True):
    records: int
    standard_answers: bool
    """Whether standard answers were trained on."""
    accuracy: Comparison
    """All seeds together; every seed has questions of its own."""
    seeds: list[SeedReport]


class DemoReport(msgspec.Struct, frozen=True):
    """`build/demo/report.json`."""

    version: int
    accuracy: Comparison
    """Of the domain "chain", all seeds together."""
    holds: bool
    """On "chain", for every seed: NLFT is at least 20 points above the base model and the 95 % intervals are disjoint."""
    domains: dict[str, DomainReport]
    job: Result
    """The whole report of the first job: stages, plan, budget, versions, adapter."""


class DemoFailed(EdgeAgentError):
    """A job of the demo ended with an error."""

    def __init__(self, directory: Path, output: str) -> None:
        super().__init__(f"the job in {directory} failed; run `edge-agent train {directory}` to see why. It said: {output[-600:].strip()}")


def run_demo(out: Path, seeds: int, console: Console) -> DemoReport:
    """Run all jobs of the demo, print a comparison, write `report.json`, and return it."""
    out.mkdir(parents=True, exist_ok=True)
    runs = [(domain, seed) for domain in DOMAINS for seed in range(1, seeds + 1)]
    for domain, seed in runs:
        _lay_out(out, domain, seed)
    first = _directory(out, "chain", 1, "nlft")
    _run_in_foreground(first, console)
    workers = max(1, min(os.cpu_count() or 1, 8))
    with ThreadPoolExecutor(workers) as pool, console.status(f"the other jobs, {workers} at a time …"):
        for future in as_completed([pool.submit(_run_domain, out, domain, seed) for domain, seed in runs]):
            domain, seed, lines = future.result()
            console.print(f"[green]✓[/] {domain}, seed {seed}: {lines}", highlight=False, soft_wrap=True)
    report = _report(out, seeds)
    write_file(out / "report.json", msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    _print(report, out, console)
    return report


def _directory(out: Path, domain: str, seed: int, method: str) -> Path:
    return out / f"{domain}-{seed}-{method}"


def _lay_out(out: Path, domain: str, seed: int) -> None:
    """Write the dataset, the questions and the NLFT job of a seed; no question is in both files."""
    questions = _write(out / f"{domain}-{seed}-questions.jsonl", islice(problems_of(domain, EVALUATION_SEED + seed), QUESTIONS))
    taken = {r.question for r in questions}
    fresh = (r for r in problems_of(domain, seed) if r.question not in taken)
    _write(out / f"{domain}-{seed}.jsonl", islice(fresh, DOMAINS[domain].records))
    _create(out, domain, seed, "nlft", out / f"{domain}-{seed}.jsonl")


def problems_of(domain: str, seed: int) -> Iterator[Record]:
    """Yield the problems of a domain as records."""
    return (Record(p.question, p.answer) for p in problems(domain, seed))


def _write(path: Path, records: Iterator[Record]) -> list[Record]:
    rows = list(records)
    write_file(path, write_records(rows))
    return rows


def _create(out: Path, domain: str, seed: int, method: str, data: Path) -> None:
    questions = out / f"{domain}-{seed}-questions.jsonl"
    job = build_job(str(MODEL), data, questions, {"seed": seed, **SETTINGS, **DOMAINS[domain].methods[method]}, [])
    JobDirectory(_directory(out, domain, seed, method)).create(job, data, questions)


def _run_in_foreground(directory: Path, console: Console) -> None:
    import torch

    from edge_agent.training.run import run_job

    torch.set_num_threads(1)  # a model this small is slower on more threads
    console.print(
        f"[bold]{directory.name}[/]: {DOMAINS['chain'].records} questions of a domain that the model has not seen", highlight=False
    )
    with LiveView(console) as view:
        result = run_job(JobDirectory(directory), view)
    console.print(summary(result, directory))


def _run_domain(out: Path, domain: str, seed: int) -> tuple[str, int, str]:
    """Run NLFT and then SFT on the records that NLFT completed; return a line for the console."""
    _run_child(_directory(out, domain, seed, "nlft"))
    _create(out, domain, seed, "sft", _directory(out, domain, seed, "nlft") / "records.jsonl")
    _run_child(_directory(out, domain, seed, "sft"))
    a = _compare(out, domain, seed).accuracy
    return domain, seed, f"base {_percent(a.before)}, SFT {_percent(a.sft)}, NLFT {_percent(a.after)}"


def _run_child(directory: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "edge_agent", "train", str(directory), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise DemoFailed(directory, done.stdout or done.stderr)


def _compare(out: Path, domain: str, seed: int) -> SeedReport:
    names = {method: _directory(out, domain, seed, method) for method in ("nlft", "sft")}
    nlft, sft = (_measured(names[method]) for method in ("nlft", "sft"))
    accuracy = Comparison(nlft[0], sft[1], nlft[1])
    return SeedReport(seed, accuracy, nlft[2], {method: path.name for method, path in names.items()})


def _measured(directory: Path) -> tuple[Accuracy, Accuracy, Paired]:
    result = JobDirectory(directory).read_result()
    measured = result.accuracy if result else None
    if measured is None or measured.before is None or measured.after is None or measured.paired is None:
        raise DemoFailed(directory, "it has no accuracy")
    return measured.before, measured.after, measured.paired


def _report(out: Path, seeds: int) -> DemoReport:
    domains = {}
    for domain, contents in DOMAINS.items():
        rows = [_compare(out, domain, seed) for seed in range(1, seeds + 1)]
        pooled = Comparison(*(_pool([getattr(r.accuracy, name) for r in rows]) for name in ("before", "sft", "after")))
        domains[domain] = DomainReport(contents.records, contents.standard_answers, pooled, rows)
    chain = domains["chain"]
    holds = all(
        r.accuracy.after.value - r.accuracy.before.value >= 0.2 and r.accuracy.after.low > r.accuracy.before.high for r in chain.seeds
    )
    first = JobDirectory(_directory(out, "chain", 1, "nlft")).read_result()
    if first is None:
        raise DemoFailed(out, "the first job has no result")
    return DemoReport(1, chain.accuracy, holds, domains, first)


def _pool(parts: list[Accuracy]) -> Accuracy:
    return wilson(sum(round(a.value * a.n) for a in parts), sum(a.n for a in parts)) or parts[0]


def _percent(a: Accuracy) -> str:
    return f"{100 * a.value:.1f} [{100 * a.low:.1f}, {100 * a.high:.1f}]"


def _print(report: DemoReport, out: Path, console: Console) -> None:
    table = Table(title="Held-out accuracy in %, 95 % Wilson intervals", title_justify="left", title_style="bold")
    for name in ("domain", "seed", "base", "SFT, same records", "NLFT"):
        table.add_column(name)
    for name, domain in report.domains.items():
        label = f"{name}, {domain.records} questions" + ("" if domain.standard_answers else ", no standard answers")
        for row in domain.seeds:
            table.add_row(label, str(row.seed), *map(_percent, (row.accuracy.before, row.accuracy.sft, row.accuracy.after)))
        a = domain.accuracy
        table.add_row(label, "all", *map(_percent, (a.before, a.sft, a.after)), style="bold", end_section=True)
    console.print(table)
    console.print(
        f"NLFT at least 20 points above the base model on chain, intervals disjoint, every seed: {'yes' if report.holds else 'NO'}"
    )
    console.print(f"report: {out / 'report.json'}", soft_wrap=True)
