"""Verdicts of a study: the decision about each pair of points. `wording` phrases them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from mobilellm_jax.analysis import statistics
from mobilellm_jax.analysis.facts import Facts, Point
from mobilellm_jax.analysis.statistics import Decision, PairedDifference


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Finding about one pair of the study; `wording.phrase` phrases it.

    Attributes:
      point, other: difference = point - other, in the study's metric; lower is better.
      word: "better", "worse", "no difference" or "cannot tell", see `statistics.decide`.
      difference: over the common seeds; None if there are none.
      holm_p: p-value by Holm's method over all `pairs` of the study.
      bound: the largest difference in the corrected interval: for "no difference" (None if equal in every
        seed), and for a significant difference that is too small to matter; else None.
      seeds_needed: for "cannot tell" only; None if the spread over seeds is unknown.
      diverged: points that the finished seeds favour but that diverged with other seeds, so that the word is
        "cannot tell".
    """

    point: str
    other: str
    word: str
    difference: PairedDifference | None
    holm_p: float | None
    bound: float | None
    seeds_needed: int | None
    diverged: tuple[str, ...] = ()


def compare(facts: Facts, points: Mapping[str, Point]) -> list[Comparison]:
    """Decides every pair of the study, in the order of `facts.pairs`.

    A point that diverged with some seeds is never called better than, or equal to, another: its finished
    seeds alone are biased in its favour.
    """
    scores = {label: point.scores for label, point in points.items() if point.scores}
    diverged = {
        label for label, point in points.items() if any(run.status == "diverged" for run in point.comparison)
    }
    decisions = statistics.decide(scores, facts.pairs, facts.margin)
    return [_compare(*both, diverged, facts) for both in zip(facts.pairs, decisions, strict=True)]


def _compare(pair: tuple[str, str], decision: Decision, diverged: set[str], facts: Facts) -> Comparison:
    (point, other), difference, word, bound = pair, decision.difference, decision.word, decision.bound
    favoured = {"better": [point], "worse": [other], "no difference": [point, other]}.get(word, [])
    survivors = tuple(name for name in favoured if name in diverged)
    needed = None
    if survivors:
        word = "cannot tell"
    elif word == "cannot tell" and difference is not None:
        needed = statistics.seeds_needed(difference, len(facts.pairs), facts.margin)
    if word == "cannot tell" or (word != "no difference" and bound is not None and bound > facts.margin):
        bound = None
    return Comparison(point, other, word, difference, decision.holm_p, bound, needed, survivors)


def mismatch(points: Mapping[str, Point]) -> dict[str, float]:
    """Mismatch of each budget: max / min - 1 over all runs; infinite if only the smallest is 0."""
    budgets = [run.budgets for point in points.values() for run in point.runs]
    return {name: _spread([of_run[name] for of_run in budgets]) for name in budgets[0]}


def _spread(values: Sequence[int | float]) -> float:
    return max(values) / min(values) - 1 if min(values) else (math.inf if max(values) else 0.0)


def seeds_vary(points: Mapping[str, Point]) -> str:
    """Names the randomness, initialisation or data order, that differs between the runs of a point."""
    kinds = {"train.init_seed": "initialisation", "train.data_seed": "data order"}
    varied = [
        kind
        for name, kind in kinds.items()
        if any(len({run.setting(name) for run in point.comparison}) > 1 for point in points.values())
    ]
    return " and ".join(varied) or "nothing"
