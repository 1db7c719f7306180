"""Threats to the validity of a verdict, a sentence each: seeds, divergence, tuning, unequal budgets."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mobilellm_jax.analysis import verdicts
from mobilellm_jax.analysis.facts import Facts, Point, used_once
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.noise import Noise
from mobilellm_jax.analysis.records import budget_name
from mobilellm_jax.analysis.tuning import Tuning
from mobilellm_jax.analysis.verdicts import Comparison
from mobilellm_jax.analysis.wording import count_seeds, join

TOLERANCE = 0.02  # largest mismatch of the matched budget without a warning


def threats(
    facts: Facts,
    points: Mapping[str, Point],
    comparisons: Sequence[Comparison],
    noise: Noise,
    unstable: Mapping[str, Sequence[int]],
    tuning: Mapping[str, Tuning],
    unmatched: float | None,
) -> Iterator[str]:
    """Yields all that apply to a study."""
    compared = {label: point for label, point in points.items() if point.comparison}
    yield from _seed_warnings(facts, compared, comparisons, noise)
    yield from filter(None, map(_survivors, compared.values()))
    if unstable:
        names = [
            f"{len(seeds)} of {len(points[label].finished)} runs of {label!r} (seed {_numbers(seeds)})"
            for label, seeds in unstable.items()
        ]
        yield (
            f"Unstable: {join(names)} ended far above the median of their point, or above the lowest loss "
            "of their own. They count in the comparison."
        )
    yield from _tuning_warnings(facts, list(compared), tuning)
    yield from _control_warnings(compared, comparisons)
    if unmatched is not None and unmatched > TOLERANCE:
        yield (
            f"The points were to have equal {budget_name(facts.matched)}, but differ by up to "
            f"{unmatched:.1%}: that may decide instead of what is compared."
        )


def _seed_warnings(
    facts: Facts, compared: Mapping[str, Point], comparisons: Sequence[Comparison], noise: Noise
) -> Iterator[str]:
    scores = {label: point.scores for label, point in compared.items() if point.scores}
    for count, why in ((1, "One seed proves nothing"), (2, "Intervals from two seeds are very wide")):
        if few := [repr(point) for point, by_seed in scores.items() if len(by_seed) == count]:
            yield f"{why}: {'all points' if len(few) == len(compared) else join(few)}."
    points = dict.fromkeys(point for c in comparisons for point in (c.point, c.other))
    seeds = set().union(*(scores.get(point, {}) for point in points))
    if gone := [repr(point) for point in points if not scores.get(point)]:
        has, they = ("has", "it is") if len(gone) == 1 else ("have", "they are")
        yield f"{join(gone)} {has} no finished run: {they} not compared."
    for point in points:
        missing = seeds - scores.get(point, {}).keys()
        if missing and missing != seeds:
            only = ": all pairs are compared over the common seeds only" if noise.paired else ""
            yield f"{point!r} has no finished run with seed {_numbers(missing)}, unlike other points{only}."
    if same := [c for c in comparisons if c.difference and c.difference.n > 1 and c.difference.se == 0]:
        is_share = MEASURES[facts.metric].is_share
        why = f"the {MEASURES[facts.metric].what} is saturated" if is_share else "both are one computation"
        yield (
            f"The same difference in every seed: {'; '.join(f'{c.point!r} and {c.other!r}' for c in same)}. "
            f"Either {why}, or the seeds have no effect."
        )
    if mixed := verdicts.mixed_orders(compared):
        yield f"Runs with equal seed saw the data in different orders (seeds {_numbers(mixed)}): not paired."


def _numbers(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds))) or "none"


def _survivors(point: Point) -> str:
    total, count = len(point.comparison), sum(run.status == "diverged" for run in point.comparison)
    if not count:
        return ""
    if count == total:
        said = "with every seed: no comparison shows how bad it is at its learning rate."
    else:
        said = (
            f"with {count} of {count_seeds(total)}. The seeds that survived flatter it, so that nothing is "
            "concluded in its favour."
        )
    return f"{point.label!r} diverged {said}"


def _tuning_warnings(facts: Facts, points: Sequence[str], tuning: Mapping[str, Tuning]) -> Iterator[str]:
    """Yields reasons why the learning rates of the comparison may be unfair to one of `points`."""
    if facts.tuning == "none":
        yield (
            "The learning rate was not tuned: a point that looks better may only suit the given rate better."
        )
    if facts.tuning == "transferred":
        yield (
            "The learning rate was not tuned, but comes from other shapes, sizes or horizons: what its error "
            "costs is not in the intervals."
        )
    if facts.tuning in ("grid", "fitted") and (untuned := [point for point in points if point not in tuning]):
        names = " and ".join(map(repr, untuned))
        yield f"No tuning run was made for {names}: the learning rate may not suit it."
    if edges := [repr(point) for point, search in tuning.items() if search.at_edge]:
        yield (
            f"The best learning rate of {' and '.join(edges)} lies at the edge of those tried: a better one "
            "may lie beyond, and the comparison is unfair to it."
        )
    bent = [repr(p) for p, t in tuning.items() if t.best and t.fitted is None and not t.at_edge]
    if facts.tuning == "fitted" and bent:
        names = " and ".join(bent)
        yield f"No interior optimum was fitted to the learning rates of {names}: the best one tried is used."
    if facts.tuning == "fitted" and (off := list(filter(None, (_off(p, t) for p, t in tuning.items())))):
        yield (
            f"Compared at another rate than is fitted now, by more than the standard error: {join(off)}. The "
            "rate was fitted to fewer runs."
        )
    for point, search in tuning.items() if facts.tuning == "grid" else ():
        if search.best is not None and search.chosen != search.best:
            yield (
                f"{point!r} was compared at learning rate {search.chosen:.3g}, but {search.best:.3g} was "
                "better in tuning."
            )


def _control_warnings(points: Mapping[str, Point], comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Yields which points use the blocks of another one more often, without the two controls of sharing.

    More uses are more layers and more FLOPs. What these bring alone shows an unshared stack of as many
    layers, and the blocks used once that are trained for as many FLOPs.
    """
    no_deep, no_long = list[str](), list[str]()
    for c in comparisons:
        if c.point not in points or c.other not in points:
            continue
        point, other = points[c.point], points[c.other]
        if _blocks(point) != _blocks(other) or _uses(point) <= _uses(other):
            continue
        once = used_once(point, points.values())
        if not any(len(p.layer_plan) == len(point.layer_plan) for p in once):
            no_deep.append(repr(point.design or point.label))
        long = [_flops(p) for p in once if len(p.layer_plan) == point.config["model"]["depth"]]
        if not any(abs(flops / _flops(point) - 1) < TOLERANCE for flops in long):
            no_long.append(repr(point.design or point.label))
    for labels, what, unknown in (
        (no_deep, "layers", "how near a repeat comes to a block of its own is not known"),
        (no_long, "training FLOPs", "longer training may bring as much as a repeat"),
    ):
        if labels:
            each = " or ".join(dict.fromkeys(labels))
            yield f"No point without sharing has as many {what} as {each}: {unknown}."


def _blocks(point: Point) -> dict[str, Any]:
    """The model without how often, and in which order, its blocks are used."""
    return {k: v for k, v in point.config["model"].items() if k not in ("sharing", "num_repeats")}


def _uses(point: Point) -> float:
    """How often a block is used, on average."""
    return len(point.layer_plan) / point.config["model"]["depth"]


def _flops(point: Point) -> float:
    """FLOPs of training for each token of a batch, those of a teacher included."""
    return point.config["train"]["steps"] * point.comparison[0].train_flops_per_token


def _off(point: str, search: Tuning) -> str:
    """How far the rate of the comparison is from the fitted optimum; "" within the standard error of it."""
    if search.fitted is None or search.se is None:
        return ""
    octaves = math.log2(search.chosen / search.fitted)
    return f"{point!r} by {octaves:+.2f} octaves" if abs(octaves) > search.se else ""
