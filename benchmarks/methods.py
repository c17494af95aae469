"""Compares NLFT with SFT, DFT, CUT and ReFT on the three domains that the tiny model has not seen.

    python benchmarks/methods.py run [tune table sizes ablation reft] [--workers 2] [--out build/methods]
    python benchmarks/methods.py render [--out build/methods]

Every cell (row of the table, domain, number of questions, seed) is an ordinary job of the trainer, in NF4, on a thread of its own.
All rows of a domain and seed train on the same questions and the same sampled outputs for the same number of updates, and answer the
same 500 held-out questions. Learning rates are chosen per row on development seeds ("tune"), which the ablation uses too and no other
reported figure does; a control takes the rate of the row that it controls. A run that was ended goes on where it was; `render`
writes the parts that are finished to benchmarks/results/methods.json, docs/benchmarks.md and its plot.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import msgspec
import torch

sys.path.insert(0, str(Path(__file__).parent))
import methods_controls as controls

from edge_agent.answers import Answer
from edge_agent.dataset import Record, read_records, write_records
from edge_agent.demo.problems import problems
from edge_agent.files import write_file
from edge_agent.job import NlftOptions
from edge_agent.job_building import BuildOptions, build_job
from edge_agent.job_directory import JobDirectory
from edge_agent.training import run as trainer
from edge_agent.training.build import build_dataset
from edge_agent.training.methods import METHODS
from edge_agent.training.run import run_job
from quantization.model_files import find_model

TINY = Path(__file__).parent.parent / "edge_agent" / "demo" / "tiny"
DOMAINS = ("chain", "distractor", "reversed")
SEEDS, MORE_SEEDS, TUNING_SEEDS, REFT_SEEDS = (1, 2, 3, 4, 5), (6, 7, 8, 9, 10), (101, 102), (1, 2, 3)
QUESTIONS, TUNING_QUESTIONS = 500, 200
RATES = (7e-4, 1.5e-3, 3e-3)
SIZES = (10, 25, 100, 200)
TABLE = 50
COMMON = {"budget_bytes": 2**30, "evaluation.max_new_tokens": 120, "schedule.updates": 60, "schedule.checkpoint_s": 3600}
HELD_OUT_SEED = 50_000
"""Added to a cell's seed for its held-out questions."""


@dataclass(frozen=True)
class Row:
    """A row of the table: the fields of its job, its data, and what a control replaces in the method."""

    fields: dict[str, Any]
    data: str = "critic"
    """Who judged the sampled outputs; or "random repairs"."""
    control: type | None = None
    tuned_as: str | None = None
    """The row whose learning rate it takes; None: tuned itself."""
    float32: bool = False
    beyond: tuple[float, ...] = ()
    """Learning rates that are tried beside RATES, whose best was the lowest or the highest."""


def nlft(**options: Any) -> dict[str, Any]:
    return {f"method.{name}": value for name, value in {"name": "nlft", **options}.items()}


RELEASED = {name: value for name, value in msgspec.to_builtins(NlftOptions.released()).items() if name != "name"}
TOKENS = {"standard_answers": False, "repair": False}
"""NLFT without standard answers and repairs: by the weights of tokens alone."""

ROWS: dict[str, Row] = {
    "SFT, standard answers": Row({"method.name": "sft", "method.targets": "answers"}),
    "SFT, correct outputs": Row({"method.name": "sft", "method.targets": "outputs"}, beyond=(6e-3,)),
    "SFT, both": Row({"method.name": "sft", "method.targets": "both"}),
    "DFT, standard answers": Row({"method.name": "dft", "method.targets": "answers"}),
    "CUT": Row({"method.name": "cut"}, beyond=(3.5e-4,)),
    "CUT, and standard answers": Row({"method.name": "cut", "method.standard_answers": True}, beyond=(6e-3,)),
    "NLFT released": Row(nlft(**RELEASED)),
    "NLFT released, and standard answers": Row(nlft(**RELEASED | {"standard_answers": True})),
    "NLFT": Row(nlft()),
    "NLFT without standard answers": Row(nlft(standard_answers=False)),
    "NLFT, token weights only, without standard answers": Row(nlft(**TOKENS)),
    "control: all weights 1": Row(nlft(), control=controls.AllOnes, tuned_as="NLFT"),
    "control: all weights 1, without standard answers": Row(
        nlft(standard_answers=False), control=controls.AllOnes, tuned_as="NLFT without standard answers"
    ),
    "control: no wrong outputs": Row(nlft(repair=False), control=controls.NoWrongOutputs, tuned_as="NLFT"),
    "control: no wrong outputs, no standard answers": Row(
        nlft(**TOKENS), control=controls.NoWrongOutputs, tuned_as="NLFT without standard answers"
    ),
    "control: repaired at random tokens": Row(nlft(**TOKENS), "random repairs", tuned_as="NLFT without standard answers"),
    "control: random unlikelihood tokens": Row(
        nlft(**TOKENS), control=controls.RandomTokens, tuned_as="NLFT, token weights only, without standard answers"
    ),
    "judged by the model itself": Row(nlft(**TOKENS), "model", tuned_as="NLFT, token weights only, without standard answers"),
    "judged by an oracle": Row(nlft(**TOKENS), "oracle", tuned_as="NLFT, token weights only, without standard answers"),
    "NLFT in float32": Row(nlft(), tuned_as="NLFT", float32=True),
}
SIZE_ROWS = ("SFT, standard answers", "SFT, both", "NLFT", "NLFT without standard answers")
SCARCE, SCARCE_ROWS = 25, ("SFT, correct outputs", "control: random unlikelihood tokens")
"""Where correct outputs are scarce, rows that train on outputs only are measured at this size too; they and WITHOUT, at this size and at
TABLE, with MORE_SEEDS, added when SEEDS alone had not told WITHOUT from the first of them on every domain."""
DEFAULT, WITHOUT = "NLFT", "NLFT without standard answers"
REFT = {"ReFT": Row({"method.name": "reft"}, beyond=(6e-3,))}
"""Samples while it trains: a part of its own, in turn with the default on three seeds; tuned on the first development seed alone."""
ABLATION: dict[str, Row] = {
    "released": Row(nlft(**RELEASED)),
    "A1: plus -log of the output in the judge context": Row(nlft(**RELEASED), control=controls.JudgeLikelihood),
    "A2, A3: like neighbours, running mean": Row(nlft(**RELEASED | {"cluster": "like", "cluster_max_span": 32})),
    "A2: no clusters": Row(nlft(**RELEASED | {"cluster": "none"})),
    "A4: wrong outputs train flagged tokens only": Row(nlft(**RELEASED | {"imitate_incorrect": False})),
    "A6: j/b > 1.1": Row(nlft(**RELEASED | {"judge_base_ratio": 1.1})),
    "A6: no j/b test": Row(nlft(**RELEASED | {"judge_base_ratio": 0.0})),
    "A7: references once": Row(nlft(**RELEASED | {"references": "once"})),
    "A2: no clusters, and (c/tau)^2 for correct tokens below tau": Row(nlft(**RELEASED | {"cluster": "none", "correct_other_power": 2.0})),
    "repairs": Row(nlft(**RELEASED | {"repair": True})),
    "repairs, turning ratio 0.01": Row(nlft(**RELEASED | {"repair": True, "turning_ratio": 0.01})),
    "repairs, turning ratio 0.5": Row(nlft(**RELEASED | {"repair": True, "turning_ratio": 0.5})),
    "all (default), without standard answers": Row(nlft(standard_answers=False)),
    "all (default)": Row(nlft()),
    "all (default), references live": Row(nlft(references="live")),
    "all (default), references per epoch": Row(nlft(references="epoch")),
}
ABLATION_RATE = 1.5e-3


@dataclass(frozen=True)
class Cell:
    """One job of the benchmark."""

    part: str
    row: str
    domain: str
    records: int
    seed: int
    rate: float
    questions: int = QUESTIONS

    @property
    def key(self) -> str:
        return f"{self.part}/{self.row}/{self.domain}/{self.records}/{self.seed}/{self.rate:g}"

    @property
    def spec(self) -> Row:
        return ABLATION[self.row] if self.part == "ablation" else (ROWS | REFT)[self.row]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a cell measured; `correct` has a character for every held-out question."""

    key: str
    part: str
    row: str
    domain: str
    records: int
    seed: int
    rate: float
    correct: str
    base: str = ""
    seconds: dict[str, float]
    """By stage; "data" is the sampling and judging that its dataset took."""
    tokens: int
    peak_bytes: int
    samples: int
    flagged_share: float


def cells(part: str, done: dict[str, Outcome]) -> Iterator[Cell]:
    """Yield the cells of a part. All but tuning and ablation need the tuned rates."""
    if part == "tune":
        tuned = [name for name, row in ROWS.items() if row.tuned_as is None]
        pairs = [(r, s) for s in TUNING_SEEDS for r in tuned] + [(r, TUNING_SEEDS[0]) for r in REFT]
        for domain, (row, seed) in ((d, pair) for pair in pairs for d in DOMAINS):
            yield from (Cell(part, row, domain, TABLE, seed, rate, TUNING_QUESTIONS) for rate in (*RATES, *(ROWS | REFT)[row].beyond))
    elif part == "ablation":
        yield from (Cell(part, r, d, TABLE, s, ABLATION_RATE, TUNING_QUESTIONS) for s in TUNING_SEEDS for d in DOMAINS for r in ABLATION)
    else:
        rates = tuned_rates(done)
        blocks: dict[str, list[tuple[tuple[int, ...], tuple[int, ...], tuple[str, ...]]]] = {
            "table": [(SEEDS, (TABLE,), tuple(ROWS))],
            "sizes": [(SEEDS, SIZES, SIZE_ROWS), (SEEDS, (SCARCE,), SCARCE_ROWS), (MORE_SEEDS, (SCARCE, TABLE), (WITHOUT, *SCARCE_ROWS))],
            "reft": [(REFT_SEEDS, (TABLE,), (*REFT, DEFAULT))],
        }
        for seeds, sizes, rows in blocks[part]:
            for seed, size, domain, row in itertools.product(seeds, sizes, DOMAINS, rows):
                yield Cell(part, row, domain, size, seed, rates[(ROWS | REFT)[row].tuned_as or row])


def tuned_rates(done: dict[str, Outcome]) -> dict[str, float]:
    """Return the learning rate with the best mean accuracy over domains and tuning seeds, of each tuned row."""
    shares: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for o in done.values():
        if o.part == "tune":
            shares[o.row][o.rate].append(o.correct.count("1") / len(o.correct))
    return {row: max(rates, key=lambda rate: sum(rates[rate]) / len(rates[rate])) for row, rates in shares.items()}


# Data ---------------------------------------------------------------------------------------------------------------


def held_out(cell: Cell) -> list[Record]:
    drawn = islice(problems(cell.domain, HELD_OUT_SEED + cell.seed), QUESTIONS)
    return [Record(p.question, p.answer) for p in drawn][: cell.questions]


def dataset(cell: Cell, out: Path) -> tuple[Path, float, int]:
    """Return the dataset of a cell with judged outputs, and the seconds and tokens that sampling and judging took."""
    folder = out / "data" / f"{cell.domain}-{cell.seed}-{cell.records}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{cell.spec.data.replace(' ', '-')}.jsonl"
    if not file.with_suffix(".cost").exists():
        questions = folder / "questions.jsonl"
        taken = {r.question for r in held_out(replace(cell, questions=QUESTIONS))}
        fresh = (p for p in problems(cell.domain, cell.seed) if p.question not in taken)
        chosen = {p.question: p for p in islice(fresh, cell.records)}
        write_file(questions, write_records(Record(p.question, p.answer, id=f"q{n}") for n, p in enumerate(chosen.values())))
        source = cell.spec.data if cell.spec.data == "model" else "critic"
        options = msgspec.convert({"seed": cell.seed, "evaluation": {"max_new_tokens": 120}, "judging": {"source": source}}, BuildOptions)
        built_file = folder / f"{source}.jsonl"
        cost = built_file.with_suffix(".cost")
        if not cost.exists():  # what an interrupted build had done would not count
            built_file.unlink(missing_ok=True)
            shutil.rmtree(folder / f"{built_file.name}.build", ignore_errors=True)
            built = build_dataset(str(TINY), questions, built_file, options, lambda event: None, {})
            write_file(cost, json.dumps([built.seconds, built.tokens]).encode())
        if cell.spec.data == "oracle":
            write_file(file, write_records(controls.judged_by_oracle(read_records(built_file), chosen)))
        elif cell.spec.data == "random repairs":
            write_file(file, write_records(controls.repaired_at_random(TINY, read_records(built_file), cell.seed, folder)))
        if file != built_file:
            shutil.copy(cost, file.with_suffix(".cost"))
    seconds, tokens = json.loads(file.with_suffix(".cost").read_bytes())
    return file, seconds, tokens


# Cells --------------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell, out: Path) -> Outcome:
    """Run one job in a directory of its own and return what it measured."""
    row = cell.spec
    data, seconds, tokens = dataset(cell, out)
    questions = data.parent / f"held-out-{cell.questions}.jsonl"
    if not questions.exists():
        write_file(questions, write_records(held_out(cell)))
    fields = {**COMMON, "seed": cell.seed, "evaluation.questions": cell.questions, "schedule.learning_rate": cell.rate, **row.fields}
    job = build_job(str(TINY), data, questions, fields, [])
    directory = JobDirectory(out / "jobs" / str(os.getpid()))
    shutil.rmtree(directory.path, ignore_errors=True)
    directory.create(job, data, questions)
    method, loader = METHODS[type(job.method)], trainer.load_model  # type: ignore[attr-defined]
    try:
        if row.control:
            METHODS[type(job.method)] = row.control
        if row.float32:
            trainer.load_model = controls.load_float32  # type: ignore[attr-defined]
        known = out / "base" / f"{cell.domain}-{cell.seed}-{cell.questions}-{row.float32}.jsonl"
        if known.exists():
            directory.begin(f"{job.digest} {find_model(str(TINY)).fingerprint}")
            shutil.copy(known, directory.path / "before.jsonl")
        result = run_job(directory, lambda event: None)
    finally:
        METHODS[type(job.method)], trainer.load_model = method, loader  # type: ignore[attr-defined]
    before, after = (directory.read_rows(name, Answer) or [] for name in ("before.jsonl", "after.jsonl"))
    if not known.exists():
        write_file(known, (directory.path / "before.jsonl").read_bytes())
    spent: dict[str, float] = defaultdict(float)
    for stage in result.stages:
        spent[stage.stage] += stage.seconds
    uses_outputs = row.fields.get("method.targets") != "answers" and row.fields["method.name"] != "reft"
    if uses_outputs:
        spent["data"] = seconds
    return Outcome(
        key=cell.key, part=cell.part, row=cell.row, domain=cell.domain, records=cell.records, seed=cell.seed, rate=cell.rate,
        correct=verdicts(after), base=verdicts(before), seconds={k: round(v, 2) for k, v in spent.items()},
        tokens=sum(s.tokens for s in result.stages if s.stage not in ("evaluate", "encode")) + (tokens if uses_outputs else 0),
        peak_bytes=max(s.peak_bytes for s in result.stages if s.stage == "train"),
        samples=result.data.samples if result.data else 0, flagged_share=result.data.flagged_share if result.data else 0.0,
    )  # fmt: skip


def verdicts(answers: list[Answer]) -> str:
    return "".join("1" if a.share == 1 else "0" for a in answers)


def read_outcomes(out: Path) -> dict[str, Outcome]:
    file = out / "cells.jsonl"
    rows = msgspec.json.Decoder(Outcome).decode_lines(file.read_bytes()) if file.exists() else []
    return {row.key: row for row in rows}


def _work(job: tuple[Cell, Path]) -> Outcome:
    torch.set_num_threads(1)
    return run_cell(*job)


def run(parts: list[str], workers: int, out: Path) -> None:
    """Run the cells that are not done yet, and say how long the rest will take."""
    for name in ("base", "jobs", "data"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for part in parts:
        done = read_outcomes(out)
        open_ = [c for c in cells(part, done) if c.key not in done]
        # Cells of one dataset are neighbours: without this, two workers would make it at once.
        for cell in {(c.domain, c.seed, c.records, c.spec.data): c for c in open_}.values():
            dataset(cell, out)
        started = time.monotonic()
        with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=40) as pool:
            for count, outcome in enumerate(pool.imap_unordered(_work, [(c, out) for c in open_]), start=1):
                with (out / "cells.jsonl").open("ab") as file:
                    file.write(msgspec.json.encode(outcome) + b"\n")
                left = (time.monotonic() - started) / count * (len(open_) - count)
                share = 100 * outcome.correct.count("1") / len(outcome.correct)
                print(f"{count}/{len(open_)} {outcome.key}: {share:.1f} %, {left / 60:.0f} min left", flush=True)


def finished(parts: list[str], done: dict[str, Outcome]) -> list[Outcome]:
    """Return the outcomes of the parts that are measured to their end."""
    found: list[Outcome] = []
    for part in parts:
        wanted = [c.key for c in cells(part, done)]
        if done.keys() >= {*wanted}:
            found += [done[key] for key in wanted]
        else:
            print(f"{part} is left out: {sum(key in done for key in wanted)} of {len(wanted)} cells are measured")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="run the cells that are not done yet")
    parts = ["tune", "table", "sizes", "ablation", "reft"]
    runs.add_argument("parts", nargs="*", default=[], help=f"of {', '.join(parts)}; all, in this order, without any")
    runs.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, each on one thread")
    renders = commands.add_parser("render", help="write the results file, the page and the plot")
    for command in (runs, renders):
        command.add_argument("--out", type=Path, default=Path("build/methods"), help="cells and datasets")
    args = parser.parse_args()
    if args.command == "run":
        run(args.parts or parts, args.workers, args.out)
    else:
        from methods_page import render

        render(finished(parts, read_outcomes(args.out)))


if __name__ == "__main__":
    main()
