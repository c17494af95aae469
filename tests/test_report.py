"""The statistics of the report, against an independent library, published examples and exact enumeration."""

from __future__ import annotations

from itertools import combinations, product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import binomtest

from edge_agent.intervals import bootstrap_interval, mean_interval, newcombe_interval, pass_at_k, student_quantile
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
@given(st.integers(0, 1500), st.integers(0, 1500), st.integers(1, 50))
def test_mcnemar_equals_an_independent_binomial_test(gained: int, lost: int, same: int) -> None:
    """Counts, difference and two-sided p-value, far beyond the size at which floats overflow."""
    before = [False] * gained + [True] * (lost + same)
    after = [True] * gained + [False] * lost + [True] * same
    ours = mcnemar(before, after)
    assert (ours.gained, ours.lost) == (gained, lost)
    wanted = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert ours.p_value == pytest.approx(wanted, rel=1e-6, abs=1e-12)
    assert ours.difference == pytest.approx(np.mean(after) - np.mean(before))
    assert -1 <= ours.low <= ours.difference <= ours.high <= 1


@pytest.mark.parametrize(("table", "interval"), [((1, 1, 7, 12), (-0.507, -0.026)), ((36, 12, 2, 0), (0.0569, 0.3404))])
def test_paired_interval_equals_published_ones(table: tuple[int, int, int, int], interval: tuple[float, float]) -> None:
    """Newcombe's interval of two tables of the literature, as printed there."""
    assert newcombe_interval(*table) == pytest.approx(interval, abs=5e-4)


@pytest.mark.parametrize(
    "shares", [(0.4, 0.1, 0.1), (0.4, 0.2, 0.05), (0.1, 0.3, 0.02), (0.05, 0.5, 0.05), (0.0, 0.3, 0.3), (0.8, 0.05, 0.05)]
)
def test_paired_interval_covers_the_true_difference(shares: tuple[float, float, float]) -> None:
    """Over all tables of 20 questions, weighted by their probability, it holds the true difference at least 94 % of the time."""
    n, (both, gained, lost) = 20, shares
    covered = total = 0.0
    for g, s, b in product(range(n + 1), repeat=3):
        if (neither := n - g - s - b) < 0:
            continue
        ways = comb(n, g) * comb(n - g, s) * comb(n - g - s, b)
        chance = ways * gained**g * lost**s * both**b * (1 - both - gained - lost) ** neither
        low, high = newcombe_interval(b, g, s, neither)
        total += chance
        covered += chance * (low - 1e-12 <= gained - lost <= high + 1e-12)
    assert total == pytest.approx(1)
    assert covered >= 0.94


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300), st.integers(1, 300))
def test_paired_interval_turns_with_the_sides(both: int, gained: int, lost: int, neither: int) -> None:
    """Before and after exchanged, the interval changes its sign only."""
    low, high = newcombe_interval(both, gained, lost, neither)
    assert newcombe_interval(both, lost, gained, neither) == pytest.approx((-high, -low))


def test_bootstrap_interval_agrees_with_an_independent_one() -> None:
    """Of a mean, and of a ratio of sums such as nats per token; the same call gives the same interval."""
    rng = np.random.default_rng(1)
    sums, counts = rng.normal(3, 2, 80), rng.integers(5, 60, 80).astype(float)
    mean = stats.bootstrap((sums,), np.mean, method="percentile", n_resamples=4000, rng=rng).confidence_interval
    ratio = stats.bootstrap(
        (sums, counts), lambda s, c, axis: s.sum(axis) / c.sum(axis), paired=True, method="percentile", n_resamples=4000, rng=rng
    ).confidence_interval
    width = mean.high - mean.low
    assert bootstrap_interval(list(sums)) == pytest.approx((mean.low, mean.high), abs=0.1 * width)
    width = ratio.high - ratio.low
    assert bootstrap_interval(list(sums), list(counts)) == pytest.approx((ratio.low, ratio.high), abs=0.1 * width)
    assert bootstrap_interval(list(sums)) == bootstrap_interval(list(sums))


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 30, 1000])
def test_student_quantile_is_that_of_scipy(freedom: int) -> None:
    assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-3)


@pytest.mark.parametrize(("count", "covers"), [(2, 0.8), (3, 0.88), (5, 0.9), (20, 0.92)])
def test_interval_of_few_values_is_wide_enough(count: int, covers: float) -> None:
    """At least so many intervals hold the mean that was drawn from; the plain percentile interval of two values holds it half the time."""
    rng = np.random.default_rng(count)
    intervals = [bootstrap_interval(rng.normal(0, 1, count).tolist()) for _ in range(200)]
    assert sum(low <= 0 <= high for low, high in intervals) / 200 >= covers


@given(st.integers(1, 6), st.sampled_from([-0.5, 0.0, 0.25, 0.5]))
def test_equal_values_do_not_make_a_certain_mean(count: int, value: float) -> None:
    """What has been seen once or a few times, always the same, has an interval with room for what has not been seen."""
    low, high = mean_interval([value] * count, -1, 1)
    assert -1 <= low < 0 < high <= 1
    assert low < value < high


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_mean_over_all_choices(case: tuple[int, int, int]) -> None:
    """Of n answers every choice of k is tried: the share of choices with a correct one."""
    n, correct, k = case
    choices = list(combinations([True] * correct + [False] * (n - correct), k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_nothing_held_out_has_no_accuracy() -> None:
    """None, not 0 of 0."""
    assert wilson(0, 0) is None
