"""Estimates with 95 % intervals: paired proportions, means by bootstrap, and pass@k. Pure Python; all seeds are fixed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)
RESAMPLES = 2000


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Return Wilson's score interval of a share of n."""
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def newcombe_interval(both: int, gained: int, lost: int, neither: int) -> tuple[float, float]:
    """Return the interval of (gained - lost) / n, the difference of two shares of the same n questions.

    Squares and adds the Wilson limits of both shares, corrected for their correlation (Newcombe 1998, Statistics in Medicine 17,
    2635-2650, method 10).
    """
    n = both + gained + lost + neither
    after, before = (both + gained) / n, (both + lost) / n
    (low_after, high_after), (low_before, high_before) = wilson_interval(after, n), wilson_interval(before, n)
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    product = float(both * neither - gained * lost)
    if product > 0:
        product = max(product - n / 2, 0.0)
    phi = product / math.sqrt(margins) if margins else 0.0

    def distance(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    difference = (gained - lost) / n
    low = difference - distance(after - low_after, high_before - before)
    return max(-1.0, low), min(1.0, difference + distance(high_after - after, before - low_before))


def bootstrap_interval(sums: Sequence[float], counts: Sequence[float] | None = None) -> tuple[float, float]:
    """Return the expanded percentile bootstrap interval of sum(sums) / sum(counts), resampled over n >= 2 elements; counts default to 1.

    The distances of its ends from the estimate grow by what the percentile interval lacks for small n: Student's quantile instead of the
    normal one, and the variance's n / (n - 1) (Hesterberg 2015, The American Statistician 69, 371-386, section 3.3).
    """
    rng = random.Random(0)
    n, pairs = len(sums), list(zip(sums, counts or [1.0] * len(sums), strict=True))
    draws = (rng.choices(pairs, k=n) for _ in range(RESAMPLES))
    values = sorted(sum(s for s, _ in drawn) / sum(c for _, c in drawn) for drawn in draws)
    tail = round(0.025 * RESAMPLES)
    estimate = sum(s for s, _ in pairs) / sum(c for _, c in pairs)
    factor = student_quantile(n - 1) / Z * math.sqrt(n / (n - 1))
    return estimate + factor * (values[tail - 1] - estimate), estimate + factor * (values[-tail] - estimate)


def mean_interval(values: Sequence[float], least: float, most: float) -> tuple[float, float]:
    """Return the interval of the mean of values that lie between `least` and `most`, by bootstrap.

    Where all are equal, resampling says nothing: then others that would be seen among n with a chance of 97.5 % may be as far away as the
    bounds.
    """
    first, n = values[0], len(values)
    if any(v != first for v in values):
        low, high = bootstrap_interval(values)
        return max(least, low), min(most, high)
    unseen = 1 - 0.025 ** (1 / n)
    return first - unseen * (first - least), first + unseen * (most - first)


def student_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t: exact for 1 and 2 degrees of freedom, else by series to 0.2 % (Abramowitz and Stegun
    26.7.5).
    """
    if freedom == 1:
        return math.tan(0.475 * math.pi)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    series: tuple[float, ...] = (
        Z,
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
        (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(series))


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the chance that one of k answers is correct, estimated without bias from n answers (arXiv 2107.03374, section 2.1)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)
