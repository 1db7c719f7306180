"""Errors of a whole family of pairs: the smallest p-value under the null, and confidence sequences."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from scipy import special
from scipy.stats import qmc

DRAWS = 15  # 2^15 quasi-random studies: adjusted p-values near 0.05 are right to 0.0025, mostly to 0.001


@dataclasses.dataclass(frozen=True)
class Contrast:
    """One difference of two points, as its joint distribution with others needs it.

    Attributes:
      points: indices of the two points.
      variances: of their means, by run-to-run noise.
      extra: variance of the difference beside these.
      df: degrees of freedom of its t statistic.
      dfs: those of the two variances.
      shared: share of the information on the variance that all points of the study have in common.
    """

    points: tuple[int, int]
    variances: tuple[float, float]
    extra: float
    df: float
    dfs: tuple[float, float]
    shared: float


def smallest_p(contrasts: Sequence[Contrast], draws: int = DRAWS) -> np.ndarray:
    """Smallest p-value of a family in 2^draws studies without any true difference, ascending.

    Pairs with a point in common are correlated through its mean and through its variance. Each p-value alone
    is uniform. With one common variance (`shared` = 1), the statistics are multivariate t, as in Dunnett's
    and Tukey's tests and in R's multcomp; otherwise a normal copula ties their chi-squared denominators.
    """
    places = sorted({point for c in contrasts for point in c.points})
    normal = _normal(2 * len(places) + 1, draws)  # [means and variances of points, what is shared; draw]
    means, spreads, common = normal[: len(places)], normal[len(places) : -1], normal[-1]
    lowest = np.zeros(len(common))  # logarithms
    scores, sizes = np.linspace(-6, 6, 241), np.linspace(-9, 12, 841)  # of a normal score; of log |t|
    for c in contrasts:
        a, b = (places.index(point) for point in c.points)
        (va, vb), (na, nb) = c.variances, c.dfs
        z = (math.sqrt(va) * means[a] - math.sqrt(vb) * means[b]) / math.sqrt(va + vb)
        wa, wb = va / math.sqrt(na), vb / math.sqrt(nb)
        own = (wa * spreads[a] + wb * spreads[b]) / math.hypot(wa, wb)
        score = math.sqrt(c.shared) * common + math.sqrt(1 - c.shared) * own
        log_scale = 0.5 * np.log(special.chdtri(c.df, special.ndtr(-scores)) / c.df)
        log_p = np.log(np.maximum(2 * special.stdtr(c.df, -np.exp(sizes)), 1e-300))
        log_t = np.log(np.maximum(np.abs(z), 1e-4)) - _interpolate(score, scores, log_scale)
        lowest = np.minimum(lowest, _interpolate(log_t, sizes, log_p))
    return np.sort(np.exp(lowest))


def _interpolate(x: np.ndarray, grid: np.ndarray, values: np.ndarray) -> np.ndarray:
    """np.interp for a grid of equal steps, ten times as fast."""
    place = np.clip((x - grid[0]) / (grid[1] - grid[0]), 0, len(grid) - 1.000001)
    left = place.astype(np.int32)
    return values[left] + (place - left) * (values[left + 1] - values[left])


@functools.lru_cache(maxsize=8)
def _normal(dimensions: int, draws: int) -> np.ndarray:
    uniform = qmc.Sobol(dimensions, rng=0).random_base2(draws)
    return special.ndtri(np.clip(np.ascontiguousarray(uniform.T), 1e-9, 1 - 1e-9))


def mixture_p(t: float, df: float, size: float, weight: float) -> float:
    """Anytime-valid p-value, the inverse of a mixture t statistic (Lindon et al. 2022, section on t tests).

    Args:
      t, df: t statistic of the difference so far, and its degrees of freedom.
      size: effective number of runs, n_a n_b / (n_a + n_b).
      weight: precision of the normal mixture over effects, in runs; the same at every look.
    """
    ratio, x = weight / (weight + size), t * t / df
    log_e = 0.5 * math.log(ratio) - (df + 1) / 2 * (math.log1p(ratio * x) - math.log1p(x))
    return min(1.0, math.exp(-min(log_e, 700.0)))


def mixture_t(level: float, df: float, size: float, weight: float) -> float:
    """The t at which `mixture_p` equals `level`; infinite if no t is large enough yet."""
    ratio = weight / (weight + size)
    growth = (1 / (level * math.sqrt(ratio))) ** (2 / (df + 1))
    return math.sqrt(df * (growth - 1) / (1 - growth * ratio)) if growth * ratio < 1 else math.inf


@functools.lru_cache(maxsize=256)
def mixture_weight(level: float, df: float, size: float) -> float:
    """The weight with the narrowest interval at this size, that of the plan."""
    weights = np.geomspace(1e-5, 1e3, 400)
    return float(min(weights, key=lambda weight: mixture_t(level, df, size, weight)))
