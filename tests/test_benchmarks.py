"""What the page of the methods' benchmark shows is what the committed results say."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import engine_page
import memory_plan
import methods
import methods_page
from page import shown


@pytest.fixture(scope="module")
def results() -> Any:
    return msgspec.json.decode(methods_page.RESULTS.read_bytes(), type=methods_page.Results)


def test_page_shows_the_committed_results(results: Any) -> None:
    """Every table, to the character."""
    for name, lines in (methods_page.tables(results) | engine_page.parts()).items():
        assert shown(name) == lines, name


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


def test_errors_of_the_memory_plan_follow_from_what_was_measured() -> None:
    """Every run of the cases that the benchmark names; those that calibrate are not judged."""
    report = msgspec.json.decode(memory_plan.RESULTS.read_bytes(), type=memory_plan.Report)
    assert report.learned_bytes == memory_plan.learn(report.runs)
    assert [memory_plan.judged(run, report.learned_bytes) for run in report.runs] == report.runs
    assert [run.case for run in report.runs] == list(memory_plan.CASES)
