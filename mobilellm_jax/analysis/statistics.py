"""Statistics of a family of pairs: simultaneous intervals, their decisions, equivalence, seeds needed.

`noise` has the variances of the points, `simultaneous` the distributions of whole families; `verdicts`
applies them, and `wording` phrases the result.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import integrate, special, stats

from mobilellm_jax.analysis import simultaneous
from mobilellm_jax.analysis.noise import Noise, equal, noise_of
from mobilellm_jax.analysis.simultaneous import DRAWS, Contrast

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
class Difference:
    """Difference of the means of two points, a - b.

    Attributes:
      seeds: number of runs of a and of b; of common seeds, twice, if only these say anything.
      mean, se, df: difference, its standard error with that of the rates, degrees of freedom; `se` is 0 and
        `df` None where there is no interval.
      low, high: 95 % interval that holds for all pairs of the family at once. None with one seed; if the
        difference is the same for every seed, as a spread of zero does not justify an interval of width zero;
        and while a confidence sequence has none yet.
      p_value: adjusted for the family by the same distribution: below 5 % where the interval excludes 0, and
        nowhere else. If the difference is the same for every seed, of the sign test, all that such data
        allow: 2 / 2^n, by Bonferroni. None with one seed, and if all differences are 0.
    """

    seeds: tuple[int, int]
    mean: float
    se: float
    df: float | None
    low: float | None
    high: float | None
    p_value: float | None

    @property
    def n(self) -> int:
        """Number of seeds of the point that has fewer."""
        return min(self.seeds)


@dataclasses.dataclass(frozen=True)
class Decision:
    """Decision about one pair of a family.

    Attributes:
      difference: None if a point has no runs.
      word: "better", "worse", "no difference" or "cannot tell", see `decide`.
      bound: the largest difference in the interval; None without an interval.
    """

    difference: Difference | None
    word: str
    bound: float | None


def mean_and_interval(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Mean of at least one value, with the half width of its t interval."""
    mean, n = float(np.mean(values)), len(values)
    if n == 1 or equal(values, np.max(np.abs(values))):
        return Estimate(n, mean, None)
    _, high = stats.t.interval(level, n - 1, loc=mean, scale=stats.sem(values))
    return Estimate(n, mean, float(high) - mean)


def standard_deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation (denominator n - 1); None for one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def decide(
    scores: Mapping[str, Mapping[int, float]],
    pairs: Sequence[Pair],
    margin: float,
    *,
    noise: Noise | None = None,
    rate_excess: Mapping[str, float] | None = None,
    planned: int | None = None,
    draws: int = DRAWS,
) -> list[Decision]:
    """Decides every pair of a family.

    Args:
      scores: by point, then by seed; lower is better. A point without scores may be missing.
      pairs: (point, other); the family. A pair that cannot be tested still counts: the family is fixed by the
        question, not by the outcome.
      margin: the smallest difference that matters.
      noise: of the study, which may have more points than the family; by default, of `scores`.
      rate_excess: by point, what the error of its fitted learning rate is expected to cost in the metric,
        curvature x se^2. The variance of that cost, 2 excess^2, is added to that of the point; so is the
        square of the difference in expected cost, without a shift of the mean.
      planned: seeds planned, where a point has more than these: the intervals are a confidence sequence,
        which holds at all numbers of seeds at once, Bonferroni over the pairs. None: the number of seeds was
        fixed, and intervals are those of the largest |t| of the family (single step, min-p).
      draws: log2 of the size of that simulation.

    Returns:
      One decision for each pair, by its simultaneous interval, which covers the true differences of all pairs
      in 95 % of studies:
      "better", "worse": it excludes 0.
      "no difference": it lies within the margin on both sides. For one pair this is the two one-sided tests
        (TOST) at 2.5 % each, stricter than the usual 5 %.
        Also: exactly the same scores in at least two seeds and in all, as when both points solve a task.
        There is no spread, hence no `bound`: this holds for the seeds tried, and for no others.
      "cannot tell": neither.
    """
    noise = noise_of(scores) if noise is None else noise
    excess = rate_excess or {}
    contrasts = {
        pair: _contrast(noise, pair, excess)
        for pair in pairs
        if all(label in noise.points and noise.points[label].n > 1 for label in pair)
        and _constant(scores, pair) is None
    }
    contrasts = {pair: c for pair, c in contrasts.items() if sum(c.variances) > 0}
    tests = len(pairs)
    lowest = None
    if planned is None and len(contrasts) > 1:
        lowest = simultaneous.smallest_p([*contrasts.values()], draws)
    found = []
    for pair in pairs:
        difference = _constant(scores, pair, tests)
        if pair in contrasts:
            family = _Family(lowest, tests, len(contrasts), planned)
            difference = _difference(noise, pair, contrasts[pair], family)
        elif difference is None and all(label in noise.points for label in pair):
            a, b = (noise.points[label] for label in pair)
            difference = Difference((a.n, b.n), a.mean - b.mean, 0.0, None, None, None, None)
        found.append(_decide(difference, margin))
    return found


@dataclasses.dataclass(frozen=True)
class _Family:
    lowest: np.ndarray | None
    tests: int
    tested: int
    planned: int | None

    def adjusted(self, p: float) -> float:
        """The p-value of the family; at least `p`, at most Bonferroni's."""
        share = self.tests / self.tested
        count = 0 if self.lowest is None else int(np.searchsorted(self.lowest, p, side="right"))
        simulated = p if self.lowest is None else (count + 1) / (len(self.lowest) + 1)
        return float(np.clip(simulated * share, p, min(1.0, p * self.tests)))

    @property
    def level(self) -> float:
        """The p-value below which `adjusted` is below 5 %."""
        level = ALPHA * self.tested / self.tests
        if self.lowest is not None:
            level = float(self.lowest[math.ceil(level * (len(self.lowest) + 1) - 1) - 1])
        return float(np.clip(level, ALPHA / self.tests, ALPHA))


def _contrast(noise: Noise, pair: Pair, excess: Mapping[str, float]) -> Contrast:
    names = list(noise.points)
    a, b = (noise.points[label] for label in pair)
    va, vb = a.variance / a.n, b.variance / b.n
    # Satterthwaite's; the rates add variance, but no knowledge of it.
    df = (va + vb) ** 2 / (va**2 / a.df + vb**2 / b.df) if va + vb else a.df
    df = min(df, noise.df)
    costs = [excess.get(label, 0.0) for label in pair]
    extra = 2 * costs[0] ** 2 + 2 * costs[1] ** 2 + (costs[0] - costs[1]) ** 2
    d0, own = noise.prior_df, (a.own_df + b.own_df) / 2
    shared = 1.0 if math.isinf(d0) else d0 / (d0 + own)
    index = (names.index(pair[0]), names.index(pair[1]))
    return Contrast(index, (va, vb), extra, df, (a.df, b.df), shared)


def _difference(noise: Noise, pair: Pair, c: Contrast, family: _Family) -> Difference:
    a, b = (noise.points[label] for label in pair)
    mean, se = a.mean - b.mean, math.sqrt(sum(c.variances) + c.extra)
    t = abs(mean) / se
    if family.planned is None:
        p = family.adjusted(2 * float(special.stdtr(c.df, -t)))
        critical = -float(special.stdtrit(c.df, family.level / 2))
    else:
        level, size = ALPHA / family.tests, a.n * b.n / (a.n + b.n)
        first = max(2, family.planned)
        weight = simultaneous.mixture_weight(level, 2.0 * first - 2, first / 2)
        p = min(1.0, family.tests * simultaneous.mixture_p(t, c.df, size, weight))
        critical = simultaneous.mixture_t(level, c.df, size, weight)
    if math.isinf(critical):
        return Difference((a.n, b.n), mean, se, c.df, None, None, p)
    return Difference((a.n, b.n), mean, se, c.df, mean - critical * se, mean + critical * se, p)


def _constant(scores: Mapping[str, Mapping[int, float]], pair: Pair, tests: int = 1) -> Difference | None:
    """The difference if it is the same in all of at least two common seeds; else None."""
    a, b = (scores.get(label, {}) for label in pair)
    seeds = sorted(a.keys() & b.keys())
    x, y = (np.array([of[seed] for seed in seeds], dtype=float) for of in (a, b))
    n = len(seeds)
    if n < 2 or not equal(x - y, np.max(np.abs([x, y]))):
        return None
    if equal([float(np.mean(x - y)), 0.0], np.max(np.abs([x, y]))):
        return Difference((n, n), 0.0, 0.0, None, None, None, None)
    p = min(1.0, tests * float(stats.binomtest(n, n).pvalue))
    return Difference((n, n), float(np.mean(x - y)), 0.0, None, None, None, p)


def _decide(difference: Difference | None, margin: float) -> Decision:
    if difference is None:
        return Decision(None, "cannot tell", None)
    low, high = difference.low, difference.high
    if low is None or high is None:
        found = difference.se == 0 and difference.p_value is not None and difference.p_value < ALPHA
        word = "better" if difference.mean < 0 else "worse"
        return Decision(
            difference, "no difference" if is_same(difference) else word if found else "cannot tell", None
        )
    bound = max(abs(low), abs(high))
    word = "better" if high < 0 else "worse" if low > 0 else "cannot tell"
    if word == "cannot tell" and bound <= margin:
        word = "no difference"
    return Decision(difference, word, bound)


def is_same(difference: Difference) -> bool:
    """True if there are at least two seeds, and the scores are exactly the same in all of them."""
    return difference.n > 1 and difference.mean == difference.se == 0


def not_worse(difference: Difference | None, margin: float) -> bool | None:
    """Non-inferiority: True if the interval lies below +margin, False if above, None if neither is shown."""
    if difference is None or difference.low is None or difference.high is None:
        return True if difference and is_same(difference) else None
    return True if difference.high < margin else False if difference.low > margin else None


def seeds_for_equality(noise: Noise, tests: int, margin: float) -> tuple[int, int, int] | None:
    """Seeds with which two equal designs are shown to lie within the margin, with 80 % power.

    From the pooled standard deviation, and the ends of its 95 % interval: (seeds, fewest, most). The interval
    is Bonferroni's over `tests` pairs, its degrees of freedom grow with the seeds as those of `noise` did.
    None without noise or margin. Never from the observed difference: such a number restates its p-value
    (Hoenig and Heisey 2001, doi:10.1198/000313001300339897).
    """
    if not noise.sd or margin <= 0:
        return None
    per_seed = noise.df / sum(spread.n - 1 for spread in noise.points.values())
    points = sum(spread.n > 1 for spread in noise.points.values())
    df_per_seed = per_seed * points if math.isinf(noise.prior_df) else 2 * per_seed
    found = [_seeds(sd, tests, margin, df_per_seed) for sd in (noise.sd, *interval_of_sd(noise.sd, noise.df))]
    return found[0], found[1], found[2]


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


def interval_of_sd(sd: float, df: float) -> tuple[float, float]:
    """95 % interval of a standard deviation with `df` degrees of freedom, from chi-squared."""
    low, high = (float(sd * math.sqrt(df / stats.chi2.ppf(q, df))) for q in (0.975, 0.025))
    return low, high


def interval_of_share(count: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Clopper and Pearson)."""
    found = stats.binomtest(count, total).proportion_ci(LEVEL)
    return float(found.low), float(found.high)


def _seeds(sd: float, tests: int, margin: float, df_per_seed: float) -> int:
    def fails(n: int) -> bool:
        se, df = sd * math.sqrt(2 / n), df_per_seed * (n - 1)
        critical = -float(special.stdtrit(df, ALPHA / tests / 2))
        return 2 * float(special.ndtr(margin / se - critical)) - 1 < POWER

    n = 2
    while fails(n):
        n = n + 1 if n < 100 else 1 + n * 11 // 10
    return n
