"""What the page of the methods' benchmark shows is what the committed results say."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory_plan
import methods
import methods_page


@pytest.fixture(scope="module")
def results() -> Any:
    return msgspec.json.decode(methods_page.RESULTS.read_bytes(), type=methods_page.Results)


def test_page_shows_the_committed_results(results: Any) -> None:
    """Every table, to the character."""
    page = methods_page.PAGE.read_text(encoding="utf-8")
    for name, lines in methods_page.tables(results).items():
        shown = page.partition(f"<!-- {name} -->")[2].partition(f"<!-- end of {name} -->")[0]
        assert shown.strip().split("\n") == lines, name


def test_cells_of_a_seed_are_held_against_the_same_questions(results: Any) -> None:
    """As many verdicts as questions in every cell, and every row of a table has all its seeds and domains."""
    found: dict[tuple[str, str, int], set[tuple[str, int]]] = {}
    for cell in results.cells:
        assert len(cell.correct) == (500 if cell.part in ("table", "sizes", "reft") else 200)
        found.setdefault((cell.part, cell.row, cell.records), set()).add((cell.domain, cell.seed))
    for (part, row, size), cells in found.items():
        scarce = size == methods.SCARCE and row in (methods.WITHOUT, *methods.SCARCE_ROWS)
        seeds = {"table": 5, "sizes": 10 if scarce else 5, "ablation": 2, "tune": 1 if row == "ReFT" else 2, "reft": 3}[part]
        assert len(cells) == 3 * seeds, (part, row)


def test_page_shows_the_committed_overhead() -> None:
    """Both clocks, with their intervals."""
    report = msgspec.json.decode((ROOT / "benchmarks" / "results" / "overhead.json").read_bytes())
    page = methods_page.PAGE.read_text(encoding="utf-8")
    for clock, found in report["overhead"].items():
        running, once = found["running_percent"], found["once_s"]
        cells = (
            f"{running['value']:.2f} [{running['low']:.2f}, {running['high']:.2f}]",
            f"{once['value']:.3f} [{once['low']:.3f}, {once['high']:.3f}]",
        )
        assert f"| `{clock}` | {found['epoch_s']} | {' | '.join(cells)} |" in page


def test_page_shows_the_committed_memory_plan() -> None:
    """Every line of the table, which is made of what was counted and measured; the runs that calibrate are not judged."""
    report = msgspec.json.decode(memory_plan.RESULTS.read_bytes(), type=memory_plan.Report)
    page = methods_page.PAGE.read_text(encoding="utf-8")
    shown = page.partition("<!-- memory plan -->")[2].partition("<!-- end of memory plan -->")[0]
    assert shown.strip().split("\n") == memory_plan.page(report)
    assert report.learned_bytes == memory_plan.learn(report.runs)
    assert [memory_plan.judged(run, report.learned_bytes) for run in report.runs] == report.runs
    assert [run.case for run in report.runs] == list(memory_plan.CASES)
