"""Statistics of paired runs: differences, Holm's correction, equivalence, number of seeds needed.

Tests and intervals are those of scipy and statsmodels. `verdicts` applies them, `wording` phrases the result.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import integrate, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

LEVEL, ALPHA = 0.95, 0.05  # of the intervals shown; of a family of tests
POWER = 0.8
Pair = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean of `n` values with its 95 % t interval; `half_width` is None for one or for equal values."""

    n: int
    mean: float
    half_width: float | None


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b over `n` common seeds.

    Attributes:
      n, mean: number of common seeds; mean difference.
      sd: standard deviation of the difference over seeds; 0 with one seed.
      low, high: 95 % t interval of this difference alone. None with one seed, and if the difference is the
        same for every seed: a spread of zero does not justify an interval of width zero.
      p_value: of the paired t test. If the difference is the same for every seed, of the sign test, all that
        such data allow: 2 / 2^n. None with one seed, and if all differences are 0.
    """

    n: int
    mean: float
    sd: float
    low: float | None
    high: float | None
    p_value: float | None


@dataclasses.dataclass(frozen=True)
class Decision:
    """Decision of a family of tests about one pair.

    Attributes:
      difference: over the common seeds; None if there are none.
      word: "better", "worse", "no difference" or "cannot tell", see `decide`.
      bound: the largest difference in the interval corrected for the family; None without an interval.
      holm_p: p-value by Holm's method over the family; None without a test.
    """

    difference: PairedDifference | None
    word: str
    bound: float | None
    holm_p: float | None


def mean_and_interval(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Mean of at least one value, with the half width of its t interval."""
    mean, n = float(np.mean(values)), len(values)
    if n == 1 or _equal(values, np.max(np.abs(values))):
        return Estimate(n, mean, None)
    _, high = stats.t.interval(level, n - 1, loc=mean, scale=stats.sem(values))
    return Estimate(n, mean, float(high) - mean)


def standard_deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation (denominator n - 1); None for one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> PairedDifference | None:
    """Paired difference a - b over the common seeds; None if there are none."""
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
    """Adjusts p-values for the whole family by Holm's step-down method (Holm 1979).

    A pair that could not be tested (None) still counts: the family is fixed by the question, not by the
    outcome.
    """
    if not p_values:
        return []
    adjusted = np.asarray(multipletests([1.0 if p is None else p for p in p_values], method="holm")[1])
    return [None if p is None else float(q) for p, q in zip(p_values, adjusted, strict=True)]


def decide(scores: Mapping[str, Mapping[int, float]], pairs: Sequence[Pair], margin: float) -> list[Decision]:
    """Decides every pair of a family.

    Args:
      scores: by point, then by seed; lower is better. A point without scores may be missing.
      pairs: (point, other); the family.
      margin: the smallest difference that matters.

    Returns:
      One decision for each pair, by the first rule that fits:
      "better", "worse": Holm's p-value is below 5 %. In at most 5 % of studies without any true difference is
        one of the pairs called so, if the number of seeds was fixed before: adding seeds until a pair is
        decided, and testing each time, finds more false differences than that.
      "no difference": the t interval at level 1 - 5 % / (number of pairs) lies within the margin on both
        sides. These intervals hold for all pairs at once in 95 % of studies, so that `bound` may be quoted
        even for the pair where it came out smallest. For one pair this is the two one-sided tests (TOST) at
        2.5 % each, stricter than the usual 5 %, so that the interval shown and the verdict agree.
        Also: exactly the same scores in at least two seeds and in all, as when both points solve a task.
        There is no spread, hence no `bound`: this holds for the seeds tried, and for no others.
      "cannot tell": neither.
    """
    differences = [paired_difference(scores.get(a, {}), scores.get(b, {})) for a, b in pairs]
    adjusted = holm([difference and difference.p_value for difference in differences])
    return [
        _decide(difference, p, len(pairs), margin)
        for difference, p in zip(differences, adjusted, strict=True)
    ]


def _decide(difference: PairedDifference | None, p: float | None, tests: int, margin: float) -> Decision:
    if difference is None:
        return Decision(None, "cannot tell", None, None)
    bound = None
    if difference.low is not None:
        scale = difference.sd / math.sqrt(difference.n)
        interval = stats.t.interval(1 - ALPHA / tests, difference.n - 1, difference.mean, scale)
        bound = float(np.max(np.abs(interval)))
    word = "cannot tell"
    if p is not None and p < ALPHA:
        word = "better" if difference.mean < 0 else "worse"
    elif (bound is not None and bound <= margin) or is_same(difference):
        word = "no difference"
    return Decision(difference, word, bound, p)


def is_same(difference: PairedDifference) -> bool:
    """True if there are at least two seeds, and the scores are exactly the same in all of them."""
    return difference.n > 1 and difference.mean == difference.sd == 0


def seeds_needed(difference: PairedDifference, tests: int, margin: float) -> int | None:
    """Estimates the number of seeds that decides an undecided pair with 80 % power.

    Assumes that the true difference and spread are as observed, and corrects the level for all `tests` of the
    family (Bonferroni, slightly stricter than Holm). The pair is decided if the difference is significant or
    if its interval lies within the margin, whichever takes fewer seeds. For the second, both ends must lie
    within the margin, and each gets half of the 20 % probability of failure. The spread is itself uncertain:
    with three seeds, its true value may be half or six times the observed one.

    None with one seed, where the spread is unknown, and where no number of seeds suffices.
    """
    n, level = difference.n, ALPHA / tests
    if n == 1 or is_same(difference):
        return None
    if difference.sd == 0:  # the sign test
        return next(m for m in range(n + 1, 100) if stats.binomtest(m, m).pvalue < level)
    found = _solve(abs(difference.mean) / difference.sd, level, POWER, "two-sided")
    within = _solve((margin - abs(difference.mean)) / difference.sd, level / 2, (1 + POWER) / 2, "larger")
    enough = [m for m in (found, within) if m is not None]
    return max(n + 1, min(enough)) if enough else None


def _solve(effect: float, level: float, power: float, alternative: str) -> int | None:
    if effect < 1e-4:  # hundreds of millions of seeds
        return None
    # The solver fails for effects of many standard deviations; three asks for a few seeds too many.
    seeds = TTestPower().solve_power(min(effect, 3.0), None, level, power, alternative)
    return math.ceil(float(np.squeeze(seeds)))


def half_width(sd: float, seeds: int, pairs: int) -> float:
    """Expected half width of the interval that `power_of_equivalence` is about; infinite with one seed."""
    if seeds < 2:
        return math.inf
    quantile = float(stats.t.ppf(1 - ALPHA / pairs / 2, 2 * (seeds - 1)))
    return quantile * sd * math.sqrt(2 / seeds)


def power_of_equivalence(sd: float, seeds: int, pairs: int, margin: float) -> float:
    """Probability that two equal designs are shown to differ by no more than the margin.

    That is, that the two-sided t interval of their unpaired difference, at level 1 - 5 % / pairs, lies within
    the margin on both sides: the mean difference is normal, and its estimated variance that of a chi-square
    with 2 (seeds - 1) degrees of freedom, over which the probability is integrated.

    Args:
      sd: standard deviation of the metric over seeds, equal in both.
      seeds: of each design.
      pairs: in the family, each of which has such an interval.
      margin: the largest difference that does not matter.
    """
    if seeds < 2:
        return 0.0
    if sd == 0:
        return 1.0
    df, reach = 2 * (seeds - 1), margin / half_width(sd, seeds, pairs)  # largest s / sd that can show it
    scale = sd * math.sqrt(2 / seeds)

    def inside(ratio: float) -> float:
        room = margin * (1 - ratio / reach) / scale
        density = float(stats.chi2.pdf(df * ratio**2, df)) * 2 * df * ratio
        return (2 * float(stats.norm.cdf(room)) - 1) * density

    # Eight standard deviations of s / sd: in a wider range, quad may overlook the peak.
    spread = 8 / math.sqrt(2 * df)
    low, high = max(0.0, 1 - spread), min(reach, 1 + spread)
    return min(1.0, float(integrate.quad(inside, low, high, limit=200)[0])) if low < high else 0.0


def seeds_for_equivalence(sd: float, pairs: int, margin: float) -> int:
    """The smallest number of seeds with which `power_of_equivalence` is at least `POWER`; at most 2^20."""
    low, high = 1, 2
    while power_of_equivalence(sd, high, pairs, margin) < POWER and high < 2**20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = power_of_equivalence(sd, middle, pairs, margin) >= POWER
        low, high = (low, middle) if enough else (middle, high)
    return high
