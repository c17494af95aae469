"""Renders the cells of benchmarks/methods.py: the committed results, the page docs/benchmarks.md and its plot."""

from __future__ import annotations

import datetime
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median, stdev

import msgspec
from methods import ABLATION, DEFAULT, DOMAINS, QUESTIONS, REFT, ROWS, SCARCE_ROWS, SIZE_ROWS, TABLE, TUNING_SEEDS, WITHOUT, Outcome
from page import drawn, write_parts
from scipy.stats import t as student

from edge_agent.files import write_file
from edge_agent.training.outcome import versions
from profiles.device import device_name

RESULTS = Path(__file__).parent / "results" / "methods.json"
NEVER_SEE_ANSWERS = (
    "SFT, correct outputs", "CUT", "NLFT released", "NLFT, token weights only, without standard answers",
    "control: all weights 1, without standard answers", "control: no wrong outputs, no standard answers",
    "control: repaired at random tokens", "control: random unlikelihood tokens",
)  # fmt: skip
"""The rows whose targets are outputs only."""
COSTS = ("data", "repair", "judge", "score", "train")
"""The stages of a job that are a method's own; "data" is the sampling of outputs."""


class Results(msgspec.Struct, frozen=True):
    """benchmarks/results/methods.json: every cell as it was measured."""

    date: str
    machine: str
    versions: dict[str, str]
    bases: dict[str, str]
    """The verdicts on the model before training, by domain, seed and number of questions; left out of the cells."""
    cells: list[Outcome]


class Interval(msgspec.Struct, frozen=True):
    """A mean over seeds with its 95 % interval (Student's t)."""

    value: float
    half: float

    def __str__(self) -> str:
        return f"{self.value:.1f} ± {self.half:.1f}"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of values of independent seeds; with one seed the interval is unbounded."""
    if len(values) < 2:
        return Interval(mean(values), math.inf)
    return Interval(mean(values), float(student.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values)))


def share(verdicts: str) -> float:
    return 100 * verdicts.count("1") / len(verdicts)


def render(cells: list[Outcome]) -> None:
    """Write results, page and plot."""
    today = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    bases = {f"{c.domain}/{c.seed}/{len(c.base)}": c.base for c in cells if "float32" not in c.row}
    bare = sorted((msgspec.structs.replace(c, base="") for c in cells), key=lambda c: c.key)
    results = Results(today, device_name("cpu"), versions(), bases, bare)
    write_file(RESULTS, msgspec.json.encode(results).replace(b'{"key":', b'\n{"key":') + b"\n")
    write_parts(tables(results))
    plot(cells)


def tables(results: Results) -> dict[str, list[str]]:
    """Return every table of the page by its place."""
    parts: dict[str, list[Outcome]] = defaultdict(list)
    for cell in results.cells:
        parts[cell.part].append(cell)
    table = parts["table"] + [c for c in parts["sizes"] if c.records == TABLE] + [c for c in parts["reft"] if c.row in REFT]
    sizes = parts["sizes"] + parts["table"]
    bases = {
        d: [share(v) for key, v in results.bases.items() if key.startswith(f"{d}/") and key.endswith(f"/{QUESTIONS}")] for d in DOMAINS
    }
    return {
        "table": accuracy_table(table, bases),
        "differences": difference_table(table, DEFAULT, rows_of(table)),
        "without": difference_table(table, WITHOUT, (*NEVER_SEE_ANSWERS, "SFT, standard answers")),
        "cost": cost_table(table),
        "reft": reft_table(parts["reft"]),
        "sizes": size_table(sizes),
        "ablation": ablation_table(parts["ablation"]),
        "rates": rate_table(parts["tune"]),
    }


def by_seed(cells: Iterable[Outcome], row: str, domain: str) -> dict[int, Outcome]:
    return {c.seed: c for c in cells if c.row == row and c.domain == domain}


def rows_of(cells: Iterable[Outcome]) -> list[str]:
    """Rows in the order in which the benchmark lists them."""
    there = {c.row for c in cells}
    return [name for name in (*ROWS, *REFT, *ABLATION) if name in there]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(row)} |" for row in rows)]


def accuracy_table(cells: list[Outcome], bases: dict[str, list[float]]) -> list[str]:
    body = [[row, *(accuracy(by_seed(cells, row, d)) for d in DOMAINS)] for row in rows_of(cells)]
    return markdown(("", *DOMAINS), [["base model", *(str(interval(bases[d])) for d in DOMAINS)], *body])


def accuracy(seeds: dict[int, Outcome]) -> str:
    """Return the mean over seeds; blank where nothing was measured."""
    return str(interval([share(c.correct) for c in seeds.values()])) if seeds else ""


def ablation_table(cells: list[Outcome]) -> list[str]:
    """Means only: an interval over two seeds says nothing. Cost is that of the second seed, whose jobs had the machine to themselves."""
    body = []
    for row in rows_of(cells):
        accuracies = [f"{mean(share(c.correct) for c in by_seed(cells, row, d).values()):.1f}" for d in DOMAINS]
        second = [c for c in cells if c.row == row and c.seed == TUNING_SEEDS[-1]]
        body.append([row, *accuracies, f"{median(map(own_seconds, second)):.1f}", f"{median(c.tokens for c in second):,.0f}"])
    return markdown(("", *DOMAINS, "seconds", "tokens"), body)


def difference(cells: list[Outcome], ours: str, theirs: str, domain: str) -> str:
    """Return one row minus another, in points, over the seeds that both have, on the same questions; blank where there is none."""
    a, b = by_seed(cells, ours, domain), by_seed(cells, theirs, domain)
    shared = sorted(a.keys() & b.keys())
    if not shared:
        return ""
    found = interval([share(a[s].correct) - share(b[s].correct) for s in shared])
    return f"{found}{_mark(found)}"


def difference_table(cells: list[Outcome], ours: str, rows: Iterable[str]) -> list[str]:
    body = [[row, *(difference(cells, ours, row, d) for d in DOMAINS)] for row in rows if row != ours]
    return markdown((f"{ours} minus", *DOMAINS), body)


def _mark(d: Interval) -> str:
    return " **ahead**" if d.value > d.half else " **behind**" if d.value < -d.half else ""


def cost_table(cells: list[Outcome]) -> list[str]:
    body = []
    for row in rows_of(cells):
        mine = [c for c in cells if c.row == row]
        seconds = [median(c.seconds.get(stage, 0.0) for c in mine) for stage in COSTS]
        tokens, peak = median(c.tokens for c in mine), median(c.peak_bytes for c in mine)
        body.append([row, *(f"{s:.1f}" for s in seconds), f"{sum(seconds):.1f}", f"{tokens:,.0f}", f"{peak / 2**20:,.0f}"])
    return markdown(("", *COSTS, "seconds in all", "tokens", "peak of training, MiB"), body)


def own_seconds(cell: Outcome) -> float:
    return sum(cell.seconds.get(stage, 0.0) for stage in COSTS)


def reft_table(cells: list[Outcome]) -> list[str]:
    """The default's seconds and peak as shares of ReFT's, of jobs that ran in turn on the same seeds."""
    body = []
    for domain in DOMAINS:
        ours, theirs = by_seed(cells, DEFAULT, domain), by_seed(cells, "ReFT", domain)
        time = [own_seconds(ours[s]) / own_seconds(theirs[s]) for s in sorted(theirs)]
        space = [ours[s].peak_bytes / theirs[s].peak_bytes for s in sorted(theirs)]
        body.append([domain, *(f"{100 * (1 - mean(r)):.1f} ({', '.join(f'{100 * (1 - x):.1f}' for x in r)})" for r in (time, space) if r)])
    return markdown(("", "less time than ReFT, % (each seed)", "less peak memory than ReFT, % (each seed)"), body)


def size_table(cells: list[Outcome]) -> list[str]:
    at = {n: [c for c in cells if c.records == n] for n in sorted({c.records for c in cells})}
    body = []
    for domain in DOMAINS:
        body += [[domain, row, *(accuracy(by_seed(there, row, domain)) for there in at.values())] for row in SIZE_ROWS + SCARCE_ROWS]
        pairs = [(DEFAULT, row) for row in SIZE_ROWS if row != DEFAULT] + [(WITHOUT, row) for row in SCARCE_ROWS]
        body += [[domain, f"{a} minus {b}", *(difference(there, a, b, domain) for there in at.values())] for a, b in pairs]
    return markdown(("domain", "", *(f"{n} questions" for n in at)), body)


def rate_table(cells: list[Outcome]) -> list[str]:
    rates = sorted({c.rate for c in cells})
    body = []
    for row in rows_of(cells):
        shares = {rate: [share(c.correct) for c in cells if c.row == row and c.rate == rate] for rate in rates}
        best = max(mean(s) for s in shares.values() if s)
        body.append([row, *((f"**{mean(s):.1f}**" if mean(s) == best else f"{mean(s):.1f}") if s else "" for s in shares.values())])
    return markdown(("", *(f"{rate:g}" for rate in rates)), body)


def plot(cells: list[Outcome]) -> None:
    """Draw accuracy over the number of questions, a panel for each domain."""
    with drawn("benchmarks.svg", 1, len(DOMAINS), figsize=(12, 4), sharey=True) as axes:
        for axis, domain in zip(axes[0], DOMAINS, strict=True):
            for row, beside in zip(SIZE_ROWS, (0.94, 0.98, 1.02, 1.06), strict=True):  # side by side: intervals would hide one another
                found: dict[int, list[float]] = defaultdict(list)
                for c in cells:
                    if c.part in ("table", "sizes") and c.row == row and c.domain == domain:
                        found[c.records].append(share(c.correct))
                points = [(n, interval(values)) for n, values in sorted(found.items())]
                axis.errorbar(
                    [n * beside for n, _ in points], [i.value for _, i in points], [i.half for _, i in points], label=row, capsize=3
                )
            axis.set(
                title=domain, xscale="log", xlabel="questions", xticks=[10, 25, 50, 100, 200], xticklabels=["10", "25", "50", "100", "200"]
            )
        axes[0][0].set_ylabel("accuracy in %")
        axes[0][-1].legend(fontsize="small")
