"""Learning rates of a sweep: the search of each point, read from its records, and the fit of an arm."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.runner.points import Point
from experiments.runner.progress import Progress
from mobilellm_jax.analysis.records import Record
from mobilellm_jax.analysis.tuning import fit_rates, losses_of, next_trial
from mobilellm_jax.storage.files import AnyPath

Trials = dict[float, list[float]]  # rate -> final losses


def search_of(point: Point, there: Mapping[str, Record]) -> tuple[Trials, tuple[float, int] | None]:
    """The trials of a point that have records (`there`, by file name), and (rate, seed index) of the next.

    The search is for the lowest loss, whatever the study compares: it still moves where an error rate is 0
    or 1. A run that failed is to be repeated. None: the search is over.
    """
    tried: Trials = {}
    while trial := next_trial(tried, point.learning_rates, point.tuning_seeds):
        record = there.get(Path(point.tuning_run(*trial).name).name)
        if record is None or record.status == "failed":
            return tried, trial
        tried.setdefault(trial[0], []).extend(losses_of([record]))
    return tried, None


def untuned(point: Point, workdir: AnyPath) -> int:
    """1 if the search of a point is not over, else 0."""
    return unfinished([point], workdir)[point.name]


def unfinished(points: Sequence[Point], workdir: AnyPath) -> dict[str, int]:
    """`untuned` of each point, by its name."""
    records = Progress(points, workdir).records()
    return {point.name: int(search_of(point, records[point.name])[1] is not None) for point in points}


def fitted(
    points: Sequence[Point], arms: Sequence[Point], workdir: AnyPath
) -> tuple[dict[str, float], list[str]]:
    """Learning rates of the comparison by the point's name, and lines that say where they come from.

    Each is the optimum of `fit_rates` in three significant digits, or, without an optimum inside, the best
    rate tried. A point whose comparison has begun keeps its rate, and one whose search is not over has none.

    Args:
      points: whose rates are wanted.
      arms: all points of their arms, which are fitted together.
      workdir: of the sweep.
    """
    progress = Progress(arms, workdir)
    begun, records = progress.rates(), progress.records()
    groups: dict[tuple[str, str, str | None], dict[str, Trials]] = {}
    for point in arms:
        tried, following = search_of(point, records[point.name])
        if following is None:
            groups.setdefault(point.arm, {})[point.name] = tried
    optima, trials = {}, dict[str, Trials]()
    for of_arm in groups.values():
        optima |= fit_rates(of_arm).optima
        trials |= of_arm
    rates, lines = {}, []
    for name in (point.name for point in points):
        if name in begun:
            rates[name] = begun[name]
            continue
        if name not in optima:
            lines.append(f"{name}  not compared, as its search is not over; run the same command again")
            continue
        found, count = optima[name], len(trials[name])
        if found.interior:
            rates[name] = float(f"{found.rate:.3g}")
            error = "" if found.se is None else f" +- {found.se:.2f} octaves"
            lines.append(f"{name}  learning rate {rates[name]:.3g}{error}, fitted to {count} tried")
        else:
            rates[name] = found.rate
            spread = f"{min(trials[name]):.3g} to {max(trials[name]):.3g}"
            none = all(not np.isfinite(losses).all() for losses in trials[name].values())
            said = "all of them diverged" if none else "the best one tried is used"
            lines.append(f"{name}  no interior optimum in {spread}: learning rate {found.rate:.3g}, {said}")
    return rates, lines
