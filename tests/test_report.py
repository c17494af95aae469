"""The statistics of the report, against an independent library."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from edge_agent.report import mcnemar, wilson


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_equals_an_independent_one(case: tuple[int, int]) -> None:
    """Value and both ends, for every share from none to all."""
    correct, n = case
    ours = wilson(correct, n)
    theirs = binomtest(correct, n).proportion_ci(method="wilson")
    assert ours is not None
    assert (ours.value, ours.n) == (correct / n, n)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@settings(max_examples=30)
@given(st.integers(0, 1500), st.integers(0, 1500), st.integers(0, 50))
def test_mcnemar_equals_an_independent_binomial_test(gained: int, lost: int, same: int) -> None:
    """Counts and two-sided p-value, far beyond the size at which floats overflow."""
    before = [False] * gained + [True] * (lost + same)
    after = [True] * gained + [False] * lost + [True] * same
    ours = mcnemar(before, after)
    assert (ours.gained, ours.lost) == (gained, lost)
    wanted = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert ours.p_value == pytest.approx(wanted, rel=1e-6, abs=1e-12)


def test_nothing_held_out_has_no_accuracy() -> None:
    """None, not 0 of 0."""
    assert wilson(0, 0) is None
