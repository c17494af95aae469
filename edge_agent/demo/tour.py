"""The one-command tour: a coordinator sends a node domains that the shipped tiny model has not seen; base, SFT and NLFT are compared.

Real processes on loopback do it: broker, coordinator, node. Every job is an ordinary job of `edge-agent submit`; its adapter and
report are fetched into a directory of its own under the output directory.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from edge_agent.console import FleetView, nodes_table, summary
from edge_agent.dataset import Record, write_records
from edge_agent.demo.problems import problems
from edge_agent.demo.processes import MODEL, NODE, Processes
from edge_agent.errors import DemoFailed
from edge_agent.files import write_file
from edge_agent.job_building import build_job
from edge_agent.report import Accuracy, Paired, Result, wilson

QUESTIONS = 300
EVALUATION_SEED = 1000
TINY = Path(__file__).parent / "tiny"
BUDGET = "1GiB"
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
    """Of the first domain, all seeds together."""
    holds: bool
    """On the first domain, for every seed: NLFT is at least 20 points above the base model and the 95 % intervals are disjoint."""
    domains: dict[str, DomainReport]
    job: Result
    """The whole report of the first job: stages, plan, budget, versions, adapter."""


def run_demo(out: Path, seeds: int, domains: Sequence[str], console: Console) -> DemoReport:
    """Run all jobs of the demo, print a comparison, write `report.json`, and return it. Raises DemoFailed."""
    results: dict[tuple[str, int, str], Result] = {}
    with Processes(TINY, BUDGET, out / "logs") as processes:
        console.print(f"broker ({processes.broker}), coordinator and node run on loopback", highlight=False)
        console.print(nodes_table(processes.client.nodes()))
        for domain in domains:
            for seed in range(1, seeds + 1):
                data, questions = _write_domain(out, domain, seed)
                for method in DOMAINS[domain].methods:
                    result = _run_job(processes, out, domain, seed, method, (data, questions), console)
                    if not results:
                        console.print(summary(result, out / f"{domain}-{seed}-{method}"))
                    results[domain, seed, method] = result
    report = _report(results, seeds, domains)
    write_file(out / "report.json", msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    _print(report, out, console)
    return report


def write_files(out: Path, seeds: int, domains: Sequence[str]) -> list[Path]:
    """Write a copy of the shipped model, and the datasets of the demo; return where they are. Nothing runs."""
    shutil.copytree(TINY, out / TINY.name, dirs_exist_ok=True)
    numbers = range(1, seeds + 1)
    return [out / TINY.name, *(file for domain in domains for seed in numbers for file in _write_domain(out, domain, seed))]


def _write_domain(out: Path, domain: str, seed: int) -> tuple[Path, Path]:
    """Write (dataset, held-out questions) of a seed; no question is in both files."""
    held_out = list(islice(problems_of(domain, EVALUATION_SEED + seed), QUESTIONS))
    taken = {r.question for r in held_out}
    records = list(islice((r for r in problems_of(domain, seed) if r.question not in taken), DOMAINS[domain].records))
    files = out / f"{domain}-{seed}.jsonl", out / f"{domain}-{seed}-questions.jsonl"
    for file, rows in zip(files, (records, held_out), strict=True):
        write_file(file, write_records(rows))
    return files


def _run_job(processes: Processes, out: Path, domain: str, seed: int, method: str, files: tuple[Path, Path], console: Console) -> Result:
    """Submit a job, show it until it has ended, fetch what it made. Both methods draw the same outputs: the seed decides them."""
    data, questions = files
    job = build_job(MODEL, data, questions, {"seed": seed, **SETTINGS, **DOMAINS[domain].methods[method]}, [])
    sent = {job.dataset.sha256: data, str(job.dataset.evaluation_sha256): questions}
    client = processes.client
    name = f"{domain}-{seed}-{method}"
    console.print(f"[bold]{name}[/]: {DOMAINS[domain].records} questions of a domain that the model has not seen", highlight=False)
    view = client.submit(NODE, job, sent, priority=4)
    with FleetView(console) as live:
        for item in client.watch(view.id):
            live.tell(item)
            processes.check()
    ended = client.job(view.id)
    result = client.result(ended)
    if ended.outcome != "succeeded" or result is None:
        raise DemoFailed(f"{name} {ended.outcome}: {ended.text or 'no report came'}; see {out / 'logs'}")
    client.fetch(view.id, out / name)
    return result


def problems_of(domain: str, seed: int) -> Iterator[Record]:
    """Yield the problems of a domain as records."""
    return (Record(p.question, p.answer) for p in problems(domain, seed))


def _compare(nlft: Result, sft: Result, seed: int, jobs: dict[str, str]) -> SeedReport:
    before, after, paired = _measured(nlft)
    return SeedReport(seed, Comparison(before, _measured(sft)[1], after), paired, jobs)


def _measured(result: Result) -> tuple[Accuracy, Accuracy, Paired]:
    measured = result.accuracy
    if measured is None or measured.before is None or measured.after is None or measured.paired is None:
        raise DemoFailed(f"a job has no accuracy: {measured.reason if measured else 'nothing was measured'}")
    return measured.before, measured.after, measured.paired


def _report(results: dict[tuple[str, int, str], Result], seeds: int, domains: Sequence[str]) -> DemoReport:
    reports = {}
    for domain in domains:
        contents, rows = DOMAINS[domain], []
        for seed in range(1, seeds + 1):
            names = {method: f"{domain}-{seed}-{method}" for method in contents.methods}
            rows.append(_compare(results[domain, seed, "nlft"], results[domain, seed, "sft"], seed, names))
        pooled = Comparison(*(_pool([getattr(r.accuracy, name) for r in rows]) for name in ("before", "sft", "after")))
        reports[domain] = DomainReport(contents.records, contents.standard_answers, pooled, rows)
    first = reports[domains[0]]
    holds = all(
        r.accuracy.after.value - r.accuracy.before.value >= 0.2 and r.accuracy.after.low > r.accuracy.before.high for r in first.seeds
    )
    return DemoReport(1, first.accuracy, holds, reports, next(iter(results.values())))


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
    first, holds = next(iter(report.domains)), "yes" if report.holds else "NO"
    console.print(f"NLFT at least 20 points above the base model on {first}, intervals disjoint, every seed: {holds}")
    console.print(f"report: {out / 'report.json'}", soft_wrap=True)
