"""Figures of README.md and docs/adapters.md are those of the committed results, computed anew from what was measured; needs no PyTorch."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from statistics import mean, median, stdev
from typing import Any

import pytest
from conftest import ROOT

from edge_agent.intervals import student_quantile

DOMAINS = ("chain", "distractor", "reversed")
NLFT, IMITATED, CORRECT = "NLFT without standard answers", "SFT, standard answers", "SFT, correct outputs"
QUESTIONS = 50
OWN_STAGES = ("data", "repair", "judge", "score", "train")


def _results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def _page(name: str) -> str:
    """A page in one line of single blanks."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def _percent(verdicts: str) -> float:
    return 100 * verdicts.count("1") / len(verdicts)


def _interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval over seeds, by Student's t."""
    return mean(values), student_quantile(len(values) - 1) * stdev(values) / len(values) ** 0.5


def _table(page: str, after: str) -> list[list[str]]:
    """The cells of the first table below some words, by row, without its head."""
    lines = (ROOT / page).read_text(encoding="utf-8").partition(after)[2].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_daemon_of_the_readme_is_the_measured_one() -> None:
    """Each row of the table: the median, rounded as it stands there, and the bound that the benchmark holds it to."""
    results = _results("daemon")
    measured = results["measured"]
    start_ms = measured["interpreter_ms"]["median"]
    assert _table("README.md", "## The daemon") == [
        ["Resident memory, idle", f"{measured['rss_mib']['median']:.1f} MiB", f"{measured['rss_mib']['target']:.0f} MiB"],
        [
            "Processor time, idle",
            f"{measured['idle_cpu_percent']['median']:.2f} % of a core",
            f"{measured['idle_cpu_percent']['target']:.1f} %",
        ],
        ["From `edge-agent run` to connected", f"{measured['connected_s']['median']:.2f} s", f"{measured['connected_s']['target']:.0f} s"],
        [
            "From an offer to the trainer's process",
            f"{measured['trainer_ms']['median']:.0f} ms",
            f"{measured['trainer_ms']['target'] - start_ms:.0f} ms + the interpreter's start",
        ],
    ]
    assert f"medians of {results['starts']} starts and {results['offers']} offers" in _page("README.md")
    assert all(figure.get("holds", True) for figure in measured.values())


@pytest.fixture(scope="module")
def cells() -> dict[tuple[str, str], dict[int, Any]]:
    """Cells of 50 questions by row, domain and seed."""
    found: dict[tuple[str, str], dict[int, Any]] = defaultdict(dict)
    for cell in _results("methods")["cells"]:
        if cell["records"] == QUESTIONS and cell["part"] in ("table", "sizes"):
            found[cell["row"], cell["domain"]][cell["seed"]] = cell
    return found


Cells = dict[tuple[str, str], dict[int, Any]]


def _means(cells: Cells, row: str, seeds: list[int] | None = None) -> list[str]:
    """Accuracy of a row in every domain, over all of its seeds or some."""
    return [
        f"{mean(_percent(c['correct']) for seed, c in cells[row, domain].items() if seeds is None or seed in seeds):.1f}"
        for domain in DOMAINS
    ]


def _series(figures: list[str], unit: str = "") -> str:
    return f"{figures[0]}, {figures[1]} and {figures[2]}{unit}"


def test_figures_of_nlft_in_the_readme_are_of_the_seeds_that_it_names(cells: Cells) -> None:
    """Means over all seeds of a row, and where rows are compared over those that both have: NLFT has ten, imitation five."""
    page = _page("README.md")
    seeds = {row: sorted(cells[row, DOMAINS[0]]) for row in (NLFT, IMITATED, CORRECT)}
    assert {row: len(of) for row, of in seeds.items()} == {NLFT: 10, IMITATED: 5, CORRECT: 10}
    assert all(sorted(cells[row, domain]) == of for row, of in seeds.items() for domain in DOMAINS)
    assert f"NLFT reaches {_series(_means(cells, NLFT), ' %')}" in page
    assert f"SFT on the model's correct outputs {_series(_means(cells, CORRECT))}, over ten seeds" in page
    both = seeds[IMITATED]
    assert f"reaches {_series(_means(cells, IMITATED))} over five of these seeds" in page
    assert f"NLFT has {_series(_means(cells, NLFT, both))} there" in page
    ahead = [
        _interval([_percent(cells[NLFT, d][s]["correct"]) - _percent(cells[IMITATED, d][s]["correct"]) for s in both]) for d in DOMAINS
    ]
    assert f"ahead by {ahead[0][0]:.1f} ± {ahead[0][1]:.1f} points on the first domain" in page
    assert [abs(value) > half for value, half in ahead] == [True, False, False]
    seconds = [
        median(sum(c["seconds"].get(stage, 0.0) for stage in OWN_STAGES) for d in DOMAINS for c in cells[row, d].values())
        for row in (NLFT, IMITATED)
    ]
    assert f"for {seconds[0] / seconds[1]:.1f} times its time" in page


def test_page_of_the_benchmarks_says_which_seeds_it_compares(cells: Cells) -> None:
    """Where its text sets a mean of ten seeds beside one of five, it says what NLFT has on those five."""
    both = sorted(cells[IMITATED, DOMAINS[0]])
    assert f"has {_series(_means(cells, NLFT, both))} on them" in _page("docs/benchmarks.md")


def test_strikes_of_the_readme_are_the_measured_ones() -> None:
    """As many jobs and strikes as the run had, of which nothing was wrong."""
    results = _results("chaos")
    assert results["wrong"] == []
    strikes = f"{sum(results['strikes'].values()):,} such strikes"
    assert f"Of {results['jobs']} jobs under [{strikes}](benchmarks/results/chaos.json) none was lost" in _page("README.md")


COLUMNS = ("split/reversed", "split/chain", "one seed/reversed", "domains/all")
OF_NODES: dict[str, Callable[[list[float]], float]] = {"mean of the nodes": mean, "best of the nodes": max}


def test_table_of_merges_follows_from_what_was_answered() -> None:
    """Every cell, from the verdicts of every model: a seed counts once, with its mean over the domains; differences are within seeds."""
    results = _results("merge")
    shares: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in results["rows"]:
        assert len(row["correct"]) == results["held_out"]
        shares[f"{row['part']}/{row['home']}", row["model"]][row["seed"]].append(_percent(row["correct"]))
    accuracy: dict[tuple[str, str], dict[int, float]] = {
        key: {seed: mean(values) for seed, values in seeds.items()} for key, seeds in shares.items()
    }
    nodes = [f"node {number + 1}" for number in range(results["nodes"])]
    for column in COLUMNS:
        for name, of in OF_NODES.items():
            accuracy[column, name] = {seed: of([accuracy[column, node][seed] for node in nodes]) for seed in accuracy[column, "base"]}

    def cell(column: str, model: str) -> str:
        if (column, model) not in accuracy:
            return "-"
        seeds = accuracy[column, model]
        told = "{:.1f} ± {:.1f}".format(*_interval([*seeds.values()]))
        if model in ("base", "mean of the nodes"):
            return told
        ahead = _interval([value - accuracy[column, "mean of the nodes"][seed] for seed, value in seeds.items()])
        return told + " ({:+.1f} ± {:.1f})".format(*ahead)

    shown = _table("docs/adapters.md", "<!-- merge -->")
    assert {row[0] for row in shown} == {model for _, model in accuracy} - set(nodes)
    assert shown == [[row[0], *(cell(column, row[0]) for column in COLUMNS)] for row in shown]
    assert re.search(r"mean of three seeds", _page("docs/adapters.md"))
    assert {len(seeds) for seeds in accuracy.values()} == {3}
