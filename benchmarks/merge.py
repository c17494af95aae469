"""Measures what merging adapters of three nodes gives, on the domains that the tiny model has not seen.

    python benchmarks/merge.py run [--seeds 3] [--out build/merge]
    python benchmarks/merge.py render [--out build/merge]

Three nodes train on ten questions each, as ordinary jobs of the default method with the learning rate of docs/benchmarks.md, and their
adapters are merged by every method. Beside them stands one job on all thirty questions, which a node could train on only if the data came
to it. Parts of the benchmark:

    split      ten questions of one domain ("reversed", "chain") for each node, with a seed of its own, so that its A begins as its own
    one seed   the same with one seed for all nodes, so that A begins as one (domain "reversed" only)
    domains    a domain for each node; the merge is measured on all three

Every model answers the same 200 held-out questions of a seed and domain. A run that was ended goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import date
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any, get_args

os.environ.setdefault("OMP_NUM_THREADS", "1")

import msgspec
import torch

sys.path.insert(0, str(Path(__file__).parent))
from page import write_parts

from edge_agent.adapters import merge as merging
from edge_agent.adapters.report import Method
from edge_agent.adapters.source import Source, find_source
from edge_agent.dataset import Record, write_records
from edge_agent.demo.problems import problems
from edge_agent.files import write_file
from edge_agent.intervals import student_quantile
from edge_agent.job import Evaluation
from edge_agent.job_building import build_job
from edge_agent.job_directory import JobDirectory
from edge_agent.prompts import PROMPTS
from edge_agent.training.evaluate import evaluate
from edge_agent.training.outcome import versions
from edge_agent.training.run import run_job
from quantization.load import load_tokenizer

TINY = Path(__file__).parent.parent / "edge_agent" / "demo" / "tiny"
DOCS = Path(__file__).parent.parent / "docs" / "adapters.md"
RESULTS = Path(__file__).parent / "results" / "merge.json"
DOMAINS = ("chain", "distractor", "reversed")
NODES, EACH, QUESTIONS = 3, 10, 200
DRAWN = 300
"""Questions of a seed and domain that no node trains on; the first of them are asked."""
HELD_OUT_SEED = 70_000
"""Added to a seed for its held-out questions."""
FIELDS = {
    "budget_bytes": 2**30, "evaluation.max_new_tokens": 120, "evaluation.questions": 1, "schedule.updates": 60,
    "schedule.checkpoint_s": 3600, "schedule.learning_rate": 1.5e-3,
}  # fmt: skip
EVALUATION = Evaluation(questions=QUESTIONS, max_new_tokens=120, batch=100)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One model on one domain."""

    part: str
    seed: int
    home: str
    """The domain of the parts, `all` where each node has its own."""
    model: str
    domain: str
    """Of the questions."""
    correct: str
    """A character for every question."""
    seconds: float | None = None
    """That the merge itself took."""


def held_out(domain: str, seed: int) -> list[Record]:
    return [Record(p.question, p.answer) for p in islice(problems(domain, HELD_OUT_SEED + seed), DRAWN)]


def training(domain: str, seed: int) -> list[Record]:
    """Return the questions of all nodes, none of them held out."""
    taken = {r.question for r in held_out(domain, seed)}
    fresh = {p.question: p for p in islice((p for p in problems(domain, seed) if p.question not in taken), 3 * NODES * EACH)}
    return [Record(p.question, p.answer, id=f"q{n}") for n, p in enumerate(fresh.values())][: NODES * EACH]


def train(records: list[Record], domain: str, job_seed: int, seed: int, place: Path) -> Source:
    """Return the adapter of a job, from an earlier run where it was made."""
    if not (place / "result.json").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        data, questions = place.with_suffix(".jsonl"), place.with_suffix(".questions.jsonl")
        write_file(data, write_records(records))
        write_file(questions, write_records(held_out(domain, seed)[:1]))
        directory = JobDirectory(place)
        directory.create(build_job(str(TINY), data, questions, FIELDS | {"seed": job_seed}, []), data, questions)
        run_job(directory, lambda event: None)
    return find_source(place, place.name)


def groups(seeds: int) -> Iterator[tuple[str, int, str]]:
    """Yield (part, seed, home) of every merge."""
    for seed in range(1, seeds + 1):
        for domain in ("reversed", "chain"):
            yield "split", seed, domain
        yield "one seed", seed, "reversed"
        yield "domains", seed, "all"


def sources(part: str, seed: int, home: str, out: Path) -> dict[str, Source]:
    """Return the adapters of the nodes, and where it can be had that of all data together."""
    folder = out / "jobs" / f"{part}-{seed}-{home}".replace(" ", "-")
    found = {}
    for node in range(NODES):
        domain = DOMAINS[node] if home == "all" else home
        records = training(domain, seed)[:EACH] if home == "all" else training(home, seed)[node * EACH :][:EACH]
        if part == "one seed" and node == 0:
            folder = out / "jobs" / f"split-{seed}-{home}"  # it is the same job
        elif part == "one seed":
            folder = out / "jobs" / f"one-seed-{seed}-{home}"
        job_seed = 1000 * seed if part == "one seed" else 1000 * seed + node
        found[f"node {node + 1}"] = train(records, domain, job_seed, seed, folder / f"node-{node + 1}")
    if part != "one seed":
        pooled = [r for d in DOMAINS for r in training(d, seed)[:EACH]] if home == "all" else training(home, seed)
        unique = [Record(r.question, r.answer, id=f"p{n}") for n, r in enumerate(pooled)]
        found["all data"] = train(unique, DOMAINS[0] if home == "all" else home, 1000 * seed, seed, folder / "all-data")
    return found


def measure(part: str, seed: int, home: str, out: Path) -> Iterator[Row]:
    """Train the adapters of a group, and yield what every model answers."""
    known = sources(part, seed, home, out)
    parts, pooled = [known[f"node {n + 1}"] for n in range(NODES)], known.get("all data")
    files = merging.check(parts, str(TINY), merging.Options())
    tokenizer = load_tokenizer(files)
    domains = DOMAINS if home == "all" else (home,)

    def answer(model: Any, name: str, seconds: float | None = None) -> Iterator[Row]:
        for domain in domains:
            answers = evaluate(
                model, tokenizer, held_out(domain, seed)[:QUESTIONS], PROMPTS["worked"], EVALUATION, batch=EVALUATION.batch,
                context_tokens=files.context_tokens, progress=lambda *_: None,
            )  # fmt: skip
            correct = "".join("1" if a.share == 1 else "0" for a in answers)
            yield Row(part=part, seed=seed, home=home, model=name, domain=domain, correct=correct, seconds=seconds)

    model = merging.load_parts(files, [*parts, *([pooled] if pooled else [])], "cpu")
    with model.disable_adapter():
        yield from answer(model, "base")
    for number, name in enumerate([*(f"node {n + 1}" for n in range(NODES)), *(["all data"] if pooled else [])], start=1):
        model.set_adapter(f"part-{number}")
        yield from answer(model, name)
    for method in get_args(Method):
        began = time.monotonic()
        merging.combine(model, [1 / NODES] * NODES, merging.Options(method=method, seed=seed), method)
        yield from answer(model, method, time.monotonic() - began)


def read_rows(out: Path) -> list[Row]:
    file = out / "rows.jsonl"
    return msgspec.json.Decoder(Row).decode_lines(file.read_bytes()) if file.exists() else []


def run(seeds: int, out: Path) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    for group in groups(seeds):
        if group in {(r.part, r.seed, r.home) for r in read_rows(out)}:
            continue
        rows = list(measure(*group, out))
        with (out / "rows.jsonl").open("ab") as file:
            file.write(msgspec.json.Encoder().encode_lines(rows))
        shares = {f"{r.model}/{r.domain}": round(100 * r.correct.count("1") / QUESTIONS, 1) for r in rows}
        print(*group, json.dumps(shares), flush=True)


def interval(values: list[float]) -> list[float]:
    """Return mean and half the width of its 95 % interval over seeds, by Student's t."""
    return [mean(values), student_quantile(len(values) - 1) * stdev(values) / len(values) ** 0.5]


COLUMNS = {
    "split/reversed": "reversed, split", "split/chain": "chain, split", "one seed/reversed": "reversed, split, one seed",
    "domains/all": "a domain for each node",
}  # fmt: skip
MEAN, BEST = "mean of the nodes", "best of the nodes"


def table(rows: list[Row]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return of every column and model the accuracy, and how far it is ahead of the mean of the nodes, each with its half interval.

    A seed counts as one: of a domain for each node its mean over the domains.
    """
    by_domain: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for r in rows:
        by_domain[f"{r.part}/{r.home}", r.model, r.seed].append(r.correct.count("1") / len(r.correct))
    shares: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for (column, model, seed), values in by_domain.items():
        shares[column][model][seed] = mean(values)
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for column in (c for c in COLUMNS if c in shares):
        models = shares[column]
        nodes = {seed: [models[f"node {n + 1}"][seed] for n in range(NODES)] for seed in models["base"]}
        models[MEAN], models[BEST] = ({seed: of(values) for seed, values in nodes.items()} for of in (mean, max))
        found[column] = {
            model: {
                "accuracy": interval([*by_seed.values()]),
                "ahead": interval([share - models[MEAN][seed] for seed, share in by_seed.items()]),
            }
            for model, by_seed in models.items()
        }
    return found


def lines(tables: dict[str, dict[str, dict[str, list[float]]]]) -> list[str]:
    """Return the table of docs/adapters.md."""
    models = ["base", MEAN, BEST, *get_args(Method), "all data"]
    head = [f"| | {' | '.join(COLUMNS[c] for c in tables)} |", "|---" * (1 + len(tables)) + "|"]

    def cell(figures: dict[str, list[float]] | None, model: str) -> str:
        if figures is None:
            return "-"
        ahead = "" if model in ("base", MEAN) else " ({:+.1f} ± {:.1f})".format(*(100 * x for x in figures["ahead"]))
        return "{:.1f} ± {:.1f}".format(*(100 * x for x in figures["accuracy"])) + ahead

    return head + [f"| {model} | {' | '.join(cell(tables[c].get(model), model) for c in tables)} |" for model in models]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="run the groups that are not done yet")
    runs.add_argument("--seeds", type=int, default=3)
    renders = commands.add_parser("render", help="write the results file and the table of docs/adapters.md")
    for command in (runs, renders):
        command.add_argument("--out", type=Path, default=Path("build/merge"), help="jobs and answers")
    args = parser.parse_args()
    if args.command == "run":
        run(args.seeds, args.out)
        return
    rows = read_rows(args.out)
    tables = table(rows)
    write_parts({"merge": lines(tables)}, DOCS)
    about = {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {os.cpu_count()} cores", "versions": versions()}
    document = about | {"nodes": NODES, "questions_each": EACH, "held_out": QUESTIONS, "tables": tables, "rows": rows}
    write_file(RESULTS, msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")


if __name__ == "__main__":
    main()
