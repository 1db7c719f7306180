"""Numbers in, numbers out: paired differences, Holm's correction, equivalence, the seeds that are needed.

Tests and intervals are those of scipy and statsmodels. `verdicts` puts them into words.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

LEVEL, ALPHA = 0.95, 0.05  # of the intervals shown; of a family of tests
POWER = 0.8
Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean of `n` values with its 95 % t interval; `half_width` is None for one value, or for equal values."""

    n: int
    mean: float
    half_width: float | None


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b over `n` common seeds.

    Attributes:
      n, mean: number of common seeds; mean difference.
      sd: standard deviation of the difference over seeds; 0 with one seed.
      low, high: 95 % t interval of this difference alone. None with one seed, and where the difference is the
        same for every seed: a spread of zero is no licence for an interval of width zero.
      p_value: of the paired t test. Where the difference is the same for every seed, of the sign test, which
        is all that such data allow: 2 / 2^n. None with one seed, and where all differences are 0.
    """

    n: int
    mean: float
    sd: float
    low: float | None
    high: float | None
    p_value: float | None


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a family of tests says about one pair.

    Attributes:
      word: "better", "worse", "no difference" or "cannot tell", see `decide`.
      bound: the difference is no larger than this, by the interval corrected for the family; None without one.
      holm_p: p-value by Holm's method over the family; None where there was no test.
    """

    word: str
    bound: float | None
    holm_p: float | None


def mean_and_interval(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Returns the mean of at least one value and half the width of its t interval."""
    mean, n = float(np.mean(values)), len(values)
    if n == 1 or _equal(values, np.max(np.abs(values))):
        return Estimate(n, mean, None)
    _, high = stats.t.interval(level, n - 1, loc=mean, scale=stats.sem(values))
    return Estimate(n, mean, float(high) - mean)


def standard_deviation(values: Sequence[float]) -> float | None:
    """Returns the standard deviation, with n - 1 in the denominator; None of one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> PairedDifference | None:
    """Compares scores by seed, over the seeds that both have; None if there are none. Negative: `a` is lower."""
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    x, y = (np.array([scores[seed] for seed in seeds], dtype=float) for scores in (a, b))
    n, mean = len(seeds), float(np.mean(x - y))
    if n == 1:
        return PairedDifference(n, mean, 0.0, None, None, None)
    if _equal(x - y, np.max(np.abs([x, y]))):
        p = None if _equal([mean, 0.0], np.max(np.abs([x, y]))) else float(stats.binomtest(n, n).pvalue)
        return PairedDifference(n, mean if p is not None else 0.0, 0.0, None, None, p)
    test = stats.ttest_rel(x, y)
    low, high = test.confidence_interval(LEVEL)
    return PairedDifference(
        n, mean, float(np.std(x - y, ddof=1)), float(low), float(high), float(test.pvalue)
    )


def _equal(values: Sequence[float] | np.ndarray, scale: float) -> bool:
    return bool(np.ptp(values) <= 1e-9 * scale)  # float32 losses differ by 1e-7 or not at all


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Returns p-values adjusted for the whole family by Holm's step-down method (Holm 1979).

    A pair that was asked about and could not be tested (None) still counts: the family is fixed by the
    question, not by what came of it.
    """
    if not p_values:
        return []
    adjusted = multipletests([1.0 if p is None else p for p in p_values], method="holm")[1]
    return [None if p is None else float(q) for p, q in zip(p_values, adjusted, strict=True)]
