"""What a further use of blocks is worth: the part of the gap to as many blocks that it closes.

A design that applies blocks several times lies between two others of the same blocks: the same number of them
applied once, and as many as it applies layers. With means o, l and d of the metric (once, loop, deep), it
closes (o - l) / (o - d) of the gap.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from mobilellm_jax.analysis.facts import Point, used_once
from mobilellm_jax.analysis.noise import Spread
from mobilellm_jax.analysis.study import Study


@dataclasses.dataclass(frozen=True)
class Gap:
    """One design with repeats, and what it closes.

    Attributes:
      loop, once, deep: labels of the points; `deep` is None where the study has no such design.
      means: of the metric, in this order; NaN without `deep`.
      closed: the part of the gap; None where there is none to close, see `part_closed`.
      interval: 95 %, of `closed`; None where it is not bounded, or there are too few seeds.
      blocks: of how many blocks applied once it has the score, by interpolation over log(blocks); None where
        the study has too few of these designs, or they do not improve in order.
      is_beyond: the score is better or worse than that of all of them; `blocks` is then the nearest.
      exponent: phi where `blocks` = blocks of the loop x uses^phi; None without `blocks`, or where some
        blocks have more uses than others.
    """

    arm: str | None
    loop: str
    once: str
    deep: str | None
    means: tuple[float, float, float]
    closed: float | None
    interval: tuple[float, float] | None
    blocks: float | None
    is_beyond: bool
    exponent: float | None


def gaps(study: Study) -> list[Gap]:
    """All designs with repeats, in the order of the study, whose blocks applied once were run too."""
    found = []
    for label, point in study.points.items():
        depth, layers = len(set(point.layer_plan)), len(point.layer_plan)
        line = _applied_once(point, study.points)
        if layers == depth or depth not in line or not point.scores:
            continue
        once, deep = line[depth], line.get(layers)
        uses, uneven = layers / depth, len(set(collections.Counter(point.layer_plan).values())) > 1
        noise = study.verdict.spread
        of = [noise.points[name] for name in (once, label, deep) if name]
        means = [one.mean for one in of]
        rates = [study.verdict.rate_excess.get(name, 0.0) for name in (once, label, deep) if name]
        closed, interval = part_closed(*of, most_df=noise.df, rate_excess=rates) if deep else (None, None)
        blocks, is_beyond = _as_good_as(means[1], {u: study.points[p] for u, p in line.items()})
        found.append(
            Gap(
                arm=point.arm,
                loop=label,
                once=once,
                deep=deep,
                means=(means[0], means[1], means[2] if deep else math.nan),
                closed=closed,
                interval=interval,
                blocks=blocks,
                is_beyond=is_beyond,
                exponent=None if blocks is None or uneven else math.log(blocks / depth) / math.log(uses),
            )
        )
    return found


def part_closed(
    once: Spread, loop: Spread, deep: Spread, most_df: float, rate_excess: Sequence[float] = (0.0, 0.0, 0.0)
) -> tuple[float | None, tuple[float, float] | None]:
    """(o - l) / (o - d) of the means, and its 95 % interval by Fieller's theorem (1954).

    Runs of the designs are independent, each design with its own, moderated, variance; degrees of freedom
    are Satterthwaite's, but no more than `most_df`. `rate_excess` is what the error of each fitted rate is
    expected to cost, as in `statistics.decide`; the mean square of that cost is added. The part is None
    unless o - d is above 0 by a one-sided test at 5 %: with seeds too few to say so, or no gap, nothing says
    what is divided by. The interval is None where it is not bounded.
    """
    three = (once, loop, deep)
    if min(point.n for point in three) < 2:
        return None, None
    seeds = [point.variance / point.n for point in three]
    over_n = [v + 3 * excess**2 for v, excess in zip(seeds, rate_excess, strict=True)]

    def df(*weights: float) -> float:
        """Of the sum of the means, each times its weight; rates add variance, but no knowledge of it."""
        parts = [w**2 * v for w, v in zip(weights, seeds, strict=True)]
        below = sum(part**2 / point.df for part, point in zip(parts, three, strict=True))
        return min(sum(parts) ** 2 / below if below else math.inf, most_df)

    top, gap = once.mean - loop.mean, once.mean - deep.mean
    if gap <= special.stdtrit(df(1.0, 0.0, 1.0), 0.95) * math.sqrt(over_n[0] + over_n[2]):
        return None, None
    # (top - x gap)^2 = t^2 Var(top - x gap), a quadratic in the part x; t is that at the part found.
    part = top / gap
    t2 = float(special.stdtrit(df(1.0 - part, 1.0, part), 0.975)) ** 2
    a = gap**2 - t2 * (over_n[0] + over_n[2])
    b = top * gap - t2 * over_n[0]
    c = top**2 - t2 * (over_n[0] + over_n[1])
    root = b**2 - a * c
    if a <= 0 or root < 0:
        return part, None
    return part, ((b - math.sqrt(root)) / a, (b + math.sqrt(root)) / a)


def _applied_once(point: Point, points: Mapping[str, Point]) -> dict[int, str]:
    """Labels of designs of the same blocks, each applied once and trained alike, by number of blocks."""
    found = dict[int, str]()
    for other in used_once(point, points.values()):
        if other.scores and _training(other) == _training(point):
            found.setdefault(len(other.layer_plan), other.label)
    return found


def _training(point: Point) -> tuple[Any, ...]:
    train = point.config["train"]
    return train["steps"], train["batch_size"], point.config["data"]["source"]


def _as_good_as(score: float, line: Mapping[int, Point]) -> tuple[float | None, bool]:
    """Number of blocks applied once that have a score, and whether it is outside of all."""
    if len(line) < 3:
        return None, False
    depths = sorted(line)
    means = [float(np.mean(list(line[depth].scores.values()))) for depth in depths]
    if any(b >= a for a, b in itertools.pairwise(means)):
        return None, False
    at = np.interp(-score, -np.array(means), np.log(depths))
    return float(np.exp(at)), not means[-1] <= score <= means[0]
