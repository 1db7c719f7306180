"""Verdicts of a study: the decision about each pair, by arm and over arms. `wording` phrases them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from mobilellm_jax.analysis import statistics
from mobilellm_jax.analysis.facts import Facts, Point
from mobilellm_jax.analysis.noise import Noise
from mobilellm_jax.analysis.statistics import Decision, Difference

DEPENDS = "depends on the parameterization"
UNSTABLE = 5.0  # robust standard deviations above the median of a point, or above a run's own minimum


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Finding about one pair of the study; `wording.phrase` phrases it.

    Attributes:
      point, other: difference = point - other, in the study's metric; lower is better.
      word: "better", "worse", "no difference" or "cannot tell", see `statistics.decide`.
      difference: with the interval and the p-value that hold for all pairs of the arm at once; None if a
        point has no finished run.
      bound: the largest difference in the interval: for "no difference" (None if equal in every seed), and
        for a difference that is too small to matter; else None.
      diverged: points that the finished seeds favour but that diverged with other seeds, so that the word is
        "cannot tell".
      not_worse: whether `point` is worse by less than the margin, see `statistics.not_worse`; None if not
        shown, or if it is seeds that survived who say so.
      arm: parameterization of the two points; None in a study without arms.
      designs: labels of the two architectures, the same in all arms.
    """

    point: str
    other: str
    word: str
    difference: Difference | None
    bound: float | None
    diverged: tuple[str, ...]
    not_worse: bool | None
    arm: str | None
    designs: tuple[str, str]

    @property
    def p_value(self) -> float | None:
        return self.difference and self.difference.p_value


@dataclasses.dataclass(frozen=True)
class Family:
    """The pairs of one arm, which are corrected for together.

    Attributes:
      arm: None in a study without arms.
      planned: seeds planned before, if a point has more: intervals are a confidence sequence; else None.
      power: planned probability that equal designs are shown so; None if not known.
      seeds: for equal designs to be shown so, with the ends of its range, see
        `statistics.seeds_for_equality`; None below five seeds.
    """

    arm: str | None
    comparisons: list[Comparison]
    planned: int | None
    power: float | None
    seeds: tuple[int, int, int] | None


@dataclasses.dataclass(frozen=True)
class Joint:
    """Finding about one pair of designs over all arms.

    Attributes:
      design, other: labels of the architectures.
      words: by arm.
      word: the word of all arms; "cannot tell" if one cannot, or was not run; else `DEPENDS`.
    """

    design: str
    other: str
    words: dict[str, str]
    word: str


def compare(
    facts: Facts, points: Mapping[str, Point], noise: Noise, rate_excess: Mapping[str, float]
) -> list[Family]:
    """Decides every pair of the study, by arm, in the order of `facts.pairs`.

    A point that diverged with some seeds is never called better than, or equal to, another: its finished
    seeds alone are biased in its favour.
    """
    scores = {label: point.scores for label, point in points.items() if point.scores}
    diverged = {
        label for label, point in points.items() if any(run.status == "diverged" for run in point.comparison)
    }
    found = []
    for arm in dict.fromkeys(_arm(points, pair) for pair in facts.pairs):
        pairs = [pair for pair in facts.pairs if _arm(points, pair) == arm]
        planned = _planned(points, pairs)
        decisions = statistics.decide(
            scores, pairs, facts.margin, noise=noise, rate_excess=rate_excess, planned=planned
        )
        comparisons = [
            _compare(pair, decision, diverged, facts.margin, points)
            for pair, decision in zip(pairs, decisions, strict=True)
        ]
        most = max((c.difference.n for c in comparisons if c.difference), default=0)
        seeds = statistics.seeds_for_equality(noise, len(pairs), facts.margin) if most >= 5 else None
        found.append(Family(arm, comparisons, planned, _power(points, pairs), seeds))
    return found


def _arm(points: Mapping[str, Point], pair: tuple[str, str]) -> str | None:
    return next((points[label].arm for label in pair if label in points), None)


def _planned(points: Mapping[str, Point], pairs: Sequence[tuple[str, str]]) -> int | None:
    """Smallest planned number of seeds of a point of the family that has more; None if none has more."""
    exceeded = []
    for label in dict.fromkeys(label for pair in pairs for label in pair if label in points):
        runs = points[label].comparison
        plans = [run.plan["seeds"] for run in runs if run.plan]
        if plans and len({run.seed for run in runs}) > min(plans):
            exceeded.append(min(plans))
    return min(exceeded, default=None)


def _power(points: Mapping[str, Point], pairs: Sequence[tuple[str, str]]) -> float | None:
    """The smallest power in the plans of the points of the pairs; None if none is known."""
    labels = dict.fromkeys(label for pair in pairs for label in pair if label in points)
    plans = [run.plan for label in labels for run in points[label].comparison if run.plan]
    return min((plan["power"] for plan in plans if plan["power"] is not None), default=None)


def _compare(
    pair: tuple[str, str],
    decision: Decision,
    diverged: set[str],
    margin: float,
    points: Mapping[str, Point],
) -> Comparison:
    (point, other), word, bound = pair, decision.word, decision.bound
    favoured = {"better": [point], "worse": [other], "no difference": [point, other]}.get(word, [])
    survivors = tuple(name for name in favoured if name in diverged)
    if survivors:
        word = "cannot tell"
    if word == "cannot tell" or (word != "no difference" and bound is not None and bound > margin):
        bound = None
    not_worse = statistics.not_worse(decision.difference, margin)
    if not_worse is not None and (point if not_worse else other) in diverged:
        not_worse = None
    arm = _arm(points, pair)
    first, second = (points[label].design or label if label in points else label for label in pair)
    return Comparison(
        point, other, word, decision.difference, bound, survivors, not_worse, arm, (first, second)
    )


def joint(families: Sequence[Family]) -> list[Joint]:
    """Compares the words of the arms, for every pair of designs; [] if only one arm was run."""
    arms = [family.arm for family in families if family.arm is not None]
    if len(arms) < 2:
        return []
    words: dict[tuple[str, str], dict[str, str]] = {}
    for family in families:
        for c in family.comparisons:
            words.setdefault(c.designs, {})[family.arm or ""] = c.word
    return [
        Joint(*pair, of, _joint_word([of.get(arm, "cannot tell") for arm in arms]))
        for pair, of in words.items()
    ]


def _joint_word(words: Sequence[str]) -> str:
    if len({*words}) == 1:
        return words[0]
    return "cannot tell" if "cannot tell" in words else DEPENDS


def unstable(points: Mapping[str, Point]) -> dict[str, list[int]]:
    """Seeds of finished runs that went wrong without diverging, by point.

    Their final loss is more than `UNSTABLE` robust standard deviations (1.4826 MAD) above the median of their
    point, or above the lowest loss of the run itself. The robust standard deviation pooled over all points is
    the least that counts: three runs may agree by luck.
    """
    losses = {
        label: {run.seed: run.loss for run in point.finished if run.final and run.final["loss"] is not None}
        for label, point in points.items()
    }
    away = {label: _deviations([*of.values()]) for label, of in losses.items() if of}
    together = np.concatenate([np.empty(0), *away.values()])
    pooled = 1.4826 * float(np.median(together)) if len(together) else 0.0
    found: dict[str, list[int]] = {}
    for label, of in losses.items():
        if not of or not pooled:
            continue
        own = 1.4826 * float(np.median(away[label])) if len(away[label]) else 0.0
        limit = UNSTABLE * max(pooled, own)
        median = float(np.median([*of.values()]))
        for run in points[label].finished:
            seen = [e["loss"] for e in run.evaluations if e["loss"] is not None]
            if run.seed in of and of[run.seed] > min([median, *seen]) + limit:
                found.setdefault(label, []).append(run.seed)
    return found


def _deviations(values: Sequence[float]) -> np.ndarray:
    """Absolute deviations from the median; of an odd number, without the median's own, which is always 0."""
    away = np.sort(np.abs(np.asarray(values) - np.median(values)))
    return away[len(away) % 2 :] if len(away) > 1 else away[:0]


def mixed_orders(points: Mapping[str, Point]) -> list[int]:
    """Seeds whose runs saw the data in different orders at different points, so that they are no pairs."""
    orders: dict[int, set[int]] = {}
    for run in (run for point in points.values() for run in point.comparison):
        orders.setdefault(run.seed, set()).add(run.setting("train.data_seed"))
    return sorted(seed for seed, found in orders.items() if len(found) > 1)


def mismatch(points: Mapping[str, Point]) -> dict[str, float]:
    """Mismatch of each budget: max / min - 1 over all runs; infinite if only the smallest is 0."""
    budgets = [run.costs for point in points.values() for run in point.runs]
    known = [name for name in budgets[0] if all(name in of_run for of_run in budgets)]
    return {name: _spread([of_run[name] for of_run in budgets]) for name in known}


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
