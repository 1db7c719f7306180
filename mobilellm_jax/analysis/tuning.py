"""Learning rates: a coarse grid, extended while the best is at its edge, then refined; and a fit of it."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import special

from mobilellm_jax.analysis.facts import Point
from mobilellm_jax.analysis.records import Record

# Octaves on both sides of a point's best rate that a parabola is fitted to. Measured on the committed records
# of 16 studies: 288 trials within an octave of the best, each left out, are predicted with an error (rms) of
# 0.099 nats, and of 0.131 with 1 octave. The optimum lies 0.11 octaves lower: losses rise faster above it.
WINDOW = 2.0


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The learning-rate search of one point.

    Attributes:
      curve: (learning rate, mean final loss) in ascending order; None if a run diverged or failed.
      chosen: the rate of the point's comparison runs; before there are any, `fitted` or else `best`; NaN if
        none finished.
      at_edge: on one side of `best`, no rate was worse (diverged counts as worse).
      sensitivity: mean increase of the loss from `best` to its neighbours in the grid; infinite if one
        diverged, None without neighbours.
      best: the rate tried with the lowest loss, of equal ones preferably `chosen`; None if none finished.
      fitted: the rate at the minimum of the point's parabola, see `fit_rates`. None where it has none within
        the rates tried; `se` and `curvature` then are None too. Older studies ran at `best` instead.
      se: standard error of log2(fitted) in octaves; None without degrees of freedom.
      excess: what that error is expected to cost, in the metric of the study: its curvature over the rates
        tried, common to the arm, x se^2; without `fitted`, x the square of the step to the next rate tried.
        None where neither is known.
      curvature: of the parabolas of the arm, in loss per octave^2.
    """

    curve: list[tuple[float, float | None]]
    chosen: float
    at_edge: bool
    sensitivity: float | None
    best: float | None
    fitted: float | None = None
    se: float | None = None
    excess: float | None = None
    curvature: float | None = None


def tuning_searches(points: Mapping[str, Point]) -> dict[str, Tuning]:
    """Summarises the learning-rate search of every point that has tuning runs."""
    found = {}
    arms, scores = (dict[str | None, dict[str, dict[float, list[float]]]]() for _ in range(2))
    for label, point in points.items():
        trials: dict[float, list[Record]] = {}
        for run in point.tuning:
            trials.setdefault(run.learning_rate, []).append(run)
        chosen = point.comparison[0].learning_rate if point.comparison else None
        if trials:
            found[label] = _search(trials, chosen)
            losses = {rate: losses_of(runs) for rate, runs in trials.items()}
            if usable := {rate: values for rate, values in losses.items() if values}:
                arms.setdefault(point.arm, {})[label] = usable
                of_label = {rate: losses_of(trials[rate], "score") for rate in usable}
                scores.setdefault(point.arm, {})[label] = of_label
    for arm, of_arm in arms.items():
        fit = fit_rates(of_arm)
        of_metric = fit if scores[arm] == of_arm else fit_rates(scores[arm])
        cost = max(of_metric.curvature or 0.0, 0.0)
        for label, optimum in fit.optima.items():
            if optimum.interior:
                is_chosen = not points[label].comparison and points[label].tuning[0].tuning == "fitted"
                found[label] = dataclasses.replace(
                    found[label],
                    chosen=optimum.rate if is_chosen else found[label].chosen,
                    fitted=optimum.rate,
                    se=optimum.se,
                    excess=None if optimum.se is None else cost * optimum.se**2,
                    curvature=fit.curvature,
                )
            else:  # the best rate may lie a step of the grid away
                step = _step(of_arm[label], optimum.rate)
                found[label] = dataclasses.replace(found[label], excess=step and cost * step**2)
    return found


@dataclasses.dataclass(frozen=True)
class Drift:
    """How the fitted optimum moves along one line of a study's figure.

    Attributes:
      label: what is on the x axis; series: the line, "" where there is one.
      octaves, low, high: change of log2(rate) for each doubling of x, with a 95 % interval.
      span: the smallest and largest x.
    """

    label: str
    series: str
    octaves: float
    low: float
    high: float
    span: tuple[float, float]

    @property
    def total(self) -> float:
        """Octaves from the smallest x to the largest."""
        return self.octaves * math.log2(self.span[1] / self.span[0])


def drifts(points: Mapping[str, Point], searches: Mapping[str, Tuning]) -> list[Drift]:
    """Fits log2(rate) = a + b log2(x), weighted by the errors of the optima; lines with 3 or more of them.

    The standard error of b counts how far the optima lie from the line, where that is more than their own
    errors; its interval has n - 2 degrees of freedom.
    """
    lines: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for label, search in searches.items():
        x, se = points[label].x, search.se
        if x and x["value"] > 0 and search.fitted and se:
            line = lines.setdefault((x["label"], x.get("series", "")), [])
            line.append((math.log2(x["value"]), math.log2(search.fitted), se))
    found = []
    for (label, series), optima in lines.items():
        x, rate, se = np.array(optima).T
        if len(set(x)) > 2:
            design, weights = np.vander(x, 2), 1 / se
            b, a = np.linalg.lstsq(design * weights[:, None], rate * weights, rcond=None)[0]
            misfit = float(np.sum(((rate - a - b * x) * weights) ** 2)) / (len(x) - 2)
            unit = np.linalg.inv((design * weights[:, None] ** 2).T @ design)[0, 0]
            half = float(special.stdtrit(len(x) - 2, 0.975)) * math.sqrt(unit * max(1.0, misfit))
            span = (2.0 ** min(x), 2.0 ** max(x))
            found.append(Drift(label, series, float(b), float(b - half), float(b + half), span))
    return found


def losses_of(runs: Sequence[Record], value: str = "loss") -> list[float]:
    """Final losses of tuning runs, or another value of them, infinite where they diverged.

    A failed run tells nothing of its rate.
    """
    return [
        getattr(run, value) if run.status == "finished" else math.inf
        for run in runs
        if run.status != "failed"
    ]


def _search(trials: Mapping[float, Sequence[Record]], chosen: float | None) -> Tuning:
    curve: list[tuple[float, float | None]] = []
    seen: list[tuple[float, float]] = []  # infinite: diverged; failed runs carry no information on the rate
    for rate, runs in trials.items():
        finished = all(run.status == "finished" for run in runs)
        value = float(np.mean([run.loss for run in runs])) if finished else None
        curve.append((rate, value))
        if value is not None or any(run.status == "diverged" for run in runs):
            seen.append((rate, math.inf if value is None else value))
    lowest = min((value for _, value in seen), default=math.inf)
    if lowest == math.inf:
        return Tuning(curve, math.nan if chosen is None else chosen, True, None, None)
    equal = [i for i, (_, value) in enumerate(seen) if value == lowest]
    best = next((i for i in equal if seen[i][0] == chosen), equal[0])
    below, above = seen[:best], seen[best + 1 :]
    increase = [value - lowest for _, value in below[-1:] + above[:1]]
    return Tuning(
        curve=curve,
        chosen=seen[best][0] if chosen is None else chosen,
        at_edge=not all(any(v > lowest for _, v in side) for side in (below, above)),
        sensitivity=float(np.mean(increase)) if increase else None,
        best=seen[best][0],
    )


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The learning rate of one point, from `fit_rates`.

    Attributes:
      rate: at the vertex of the point's parabola; the best rate tried where that is not `interior`.
      interior: the parabolas open upwards, and the vertex lies within the rates that it was fitted to.
      se: standard error of log2(rate), octaves. None where not `interior`, or without degrees of freedom.
    """

    rate: float
    interior: bool
    se: float | None


@dataclasses.dataclass(frozen=True)
class RateFit:
    """Parabolas of one curvature through the tuning losses of the points of an arm.

    Attributes:
      optima: by point, as given.
      curvature: c, in loss per octave^2; None where no point has three rates to fit.
      curvature_se: its standard error; None without degrees of freedom.
      sd: of the residuals, the noise of one run; None likewise.
      df: residual degrees of freedom.
    """

    optima: dict[str, Optimum]
    curvature: float | None
    curvature_se: float | None
    sd: float | None
    df: int


def fit_rates(trials: Mapping[str, Mapping[float, Sequence[float]]], window: float = WINDOW) -> RateFit:
    """Fits the best learning rates of all points of an arm together, by linear least squares.

    The final loss of point i is a_i + c (log2(rate) - m_i)^2 with one c for all points: as
    a_i' + b_i x + c x^2 it is linear, and m_i = -b_i / 2c has a standard error by the delta method, from the
    pooled variance of the residuals.

    Args:
      trials: by point, then by rate: final losses, infinite where training diverged.
      window: octaves on both sides of a point's best rate; rates further away are left out.
    """
    near = {point: _near_best(tried, window) for point, tried in trials.items()}
    used = [point for point, found in near.items() if len(found[0]) > 1]
    if not any(len(near[point][0]) > 2 for point in used):
        return RateFit({point: _best_tried(tried) for point, tried in trials.items()}, None, None, None, 0)
    rows, losses = [], []
    for place, point in enumerate(used):
        for x, of_rate in near[point][0].items():
            for loss in of_rate:
                row = np.zeros(2 * len(used) + 1)
                row[2 * place : 2 * place + 2], row[-1] = (1, x), x * x
                rows.append(row)
                losses.append(loss)
    design, measured = np.array(rows), np.array(losses)
    solution = np.linalg.lstsq(design, measured, rcond=None)[0]
    df = len(losses) - len(solution)
    spread = float(np.sum((measured - design @ solution) ** 2))
    covariance = np.linalg.inv(design.T @ design) * spread / df if df else None
    c = float(solution[-1])
    optima = {point: _best_tried(tried) for point, tried in trials.items()}
    for place, point in enumerate(used):
        octaves, best = near[point]
        slope = solution[2 * place + 1]
        vertex = -slope / (2 * c) if c > 0 else math.inf
        if min(octaves) <= vertex <= max(octaves):
            se = None
            if covariance is not None:
                gradient, both = np.array([-1, slope / c]) / (2 * c), [2 * place + 1, -1]
                se = math.sqrt(gradient @ covariance[np.ix_(both, both)] @ gradient)
            optima[point] = Optimum(best * 2**vertex, True, se)
    c_se, sd = (None, None) if covariance is None else (math.sqrt(covariance[-1, -1]), math.sqrt(spread / df))
    return RateFit(optima, c, c_se, sd, df)


def _step(tried: Iterable[float], rate: float) -> float | None:
    """Octaves from a rate to the nearest other one that was tried; None if there is no other."""
    return min((abs(math.log2(other / rate)) for other in tried if other != rate), default=None)


def _near_best(
    tried: Mapping[float, Sequence[float]], window: float
) -> tuple[dict[float, Sequence[float]], float]:
    """Finite losses by octaves above the best rate, within the window, and that rate."""
    finite = {rate: losses for rate, losses in sorted(tried.items()) if np.isfinite(losses).all()}
    best = _best_tried(finite or tried).rate
    near = {math.log2(rate / best): losses for rate, losses in finite.items()}
    return {x: losses for x, losses in near.items() if abs(x) < window + 0.05}, best


def _best_tried(tried: Mapping[float, Sequence[float]]) -> Optimum:
    means = {rate: float(np.mean(losses)) for rate, losses in tried.items()}
    return Optimum(best_learning_rate(means), False, None)


FINEST = 1.0  # octaves (powers of 2) between the best rate and its neighbours when the search is over
FURTHEST = 4  # most coarse steps that the search goes beyond the grid


def next_learning_rate(tried: Mapping[float, float], grid: Sequence[float]) -> float | None:
    """Picks the rate to try next; None ends the search.

    First, the rates of the grid. While the lowest loss is at the lowest or highest rate tried, the grid is
    extended in that direction by its own step, at most `FURTHEST` times, after which the search ends with the
    best at an edge. Otherwise, the gaps on both sides of the best are halved until they are at most `FINEST`
    octaves.

    Args:
      tried: learning rate -> final loss; infinite where training diverged.
      grid: at least two rates, rising by one factor.
    """
    for rate in grid:
        if rate not in tried:
            return rate
    rates = sorted(tried)
    place = rates.index(best_learning_rate(tried))
    best, step = rates[place], (grid[-1] / grid[0]) ** (1 / (len(grid) - 1))
    furthest = step ** (FURTHEST - 0.5)  # the half keeps rounding from adding a step or losing one
    if place == 0:
        return best / step if best > grid[0] / furthest else None
    if place == len(rates) - 1:
        return best * step if best < grid[-1] * furthest else None
    # The better neighbour's side first: if it has a new best, the search is over.
    for neighbour in sorted((rates[place - 1], rates[place + 1]), key=lambda rate: tried[rate]):
        if abs(math.log2(best / neighbour)) > FINEST + 1e-9:
            return math.sqrt(best * neighbour)
    return None


def next_trial(
    tried: Mapping[float, Sequence[float]], grid: Sequence[float], seeds: int
) -> tuple[float, int] | None:
    """Picks (rate, seed index) of the next tuning run; None ends the search.

    The search uses one seed. Then the best rate and its two neighbours, which one run may rank wrongly, are
    repeated until they have `seeds` runs each; their means decide, and may continue the search.

    Args:
      tried: learning rate -> final losses, infinite where training diverged.
      grid: as in `next_learning_rate`.
      seeds: at least 1.
    """
    means = {rate: sum(losses) / len(losses) for rate, losses in tried.items()}
    rate = next_learning_rate(means, grid)
    if rate is not None:
        return rate, 0
    rates = sorted(tried)
    place = rates.index(best_learning_rate(means))
    for near in rates[max(0, place - 1) : place + 2]:
        if len(tried[near]) < seeds and math.isfinite(means[near]):
            return near, len(tried[near])
    return None


def next_trials(
    tried: Mapping[float, Sequence[float]], grid: Sequence[float], seeds: int
) -> list[tuple[float, int]]:
    """The next tuning runs that come whatever their losses, at first the grid; [] ends the search.

    Arguments as in `next_trial`, which picks the same runs one by one.
    """
    of_grid = [(rate, 0) for rate in grid if rate not in tried]
    one = None if of_grid else next_trial(tried, grid, seeds)
    return of_grid + ([one] if one else [])


def best_learning_rate(tried: Mapping[float, float]) -> float:
    """Rate with the lowest loss; of equal ones, and if all diverged, the lowest rate."""
    return min(tried, key=lambda rate: (tried[rate], rate))
