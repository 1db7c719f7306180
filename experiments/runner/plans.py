"""What a sweep says of its plan before the first run: seeds, margin, power, repetition of the text."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from experiments.runner.points import Point
from experiments.runner.studies import by_study
from mobilellm_jax.analysis.records import span
from mobilellm_jax.costs import accounting


def with_power(points: Sequence[Point]) -> list[Point]:
    """The points with the power of their plan, where a spread is expected.

    The probability that a pair of equal designs is shown to lie within the margin.
    """
    known: dict[tuple[Any, ...], float] = {}
    found = []
    for point in points:
        plan = point.facts["plan"]
        if plan["sd"] is not None:
            key = (plan["sd"], plan["seeds"], plan["pairs"], point.facts["margin"])
            if key not in known:
                from mobilellm_jax.analysis.statistics import power_of_equivalence  # here: it loads scipy

                known[key] = power_of_equivalence(*key)
            plan = {**plan, "power": known[key]}
        found.append(replace(point, facts={**point.facts, "plan": plan}))
    return found


def lines(
    points: Sequence[Point], other_plans: Mapping[str, Sequence[int]], cards: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """What is to be known of each study before it runs.

    Args:
      points: with their power.
      other_plans: numbers of seeds that records of a study were planned with, other than these, by study.
      cards: data cards by the point's name.
    """
    said = []
    for (study, preset), of_study in by_study(points).items():
        name = f"{study}:{preset}"
        said += [_regime(name, of_study)]
        said += list(dict.fromkeys(note for point in of_study for note in point.notes))
        said += _plan(name, max(of_study, key=lambda point: point.facts["plan"]["pairs"]))
        if other_plans.get(name):
            seeds = of_study[0].facts["plan"]["seeds"]
            there = " and ".join(map(str, other_plans[name]))
            said.append(
                f"{name}: records there were planned with {there} seeds, now {seeds}: the report uses a "
                "confidence sequence, which allows for that"
            )
        said += _epochs(name, of_study, cards)
    return said


def _regime(name: str, points: Sequence[Point]) -> str:
    """Parameterizations, size and horizon, so that nobody takes the answer for one about another regime."""
    models = [point.config.model for point in points]
    under = " and ".join(dict.fromkeys(model.parameterization for model in models))
    sizes = [accounting.parameters(model).non_embedding for model in models]
    horizons = [point.tokens / size for point, size in zip(points, sizes, strict=True)]
    return (
        f"{name}: under {under}; {span(sizes, '{:,.0f}'.format)} non-embedding parameters, "
        f"{span(horizons, '{:.2g}'.format)} training tokens for each"
    )


def _plan(name: str, point: Point) -> list[str]:
    plan, margin = point.facts["plan"], point.facts["margin"]
    seeds, pairs, sd, power = (plan[key] for key in ("seeds", "pairs", "sd", "power"))
    line = f"{name}: plan: {_count(seeds, 'seed')}, {_count(pairs, 'pair')}, margin {margin:g}"
    if sd is None or not pairs:
        return [f"{line}; power not known, as the study expects no sd" if pairs else line]
    from mobilellm_jax.analysis.statistics import POWER, half_width, seeds_for_equivalence

    half = half_width(sd, seeds, pairs)
    said = [f"{line}, sd {sd:g}: intervals of about +-{half:.2g}, equality is shown with power {power:.0%}"]
    if power < POWER:
        needed = seeds_for_equivalence(sd, pairs, margin)
        shown = "cannot be shown" if half > margin else f"is shown with power {power:.0%} only"
        said.append(
            f"warning: {name}: {_count(seeds, 'seed')} with sd {sd:g} give an interval of +-{half:.2g}; "
            f"equality within {margin:g} {shown}: needs about {needed} seeds"
        )
    return said


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _epochs(name: str, points: Sequence[Point], cards: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line if some point sees a text more than once."""
    seen = {}
    for point in points:
        there = cards.get(point.name, {}).get("splits", {}).get("train", {}).get("tokens")
        if there:
            seen[point.tokens / there] = there
    times = max(seen, default=0.0)
    if times <= 1:
        return []
    return [f"{name}: the text has {seen[times] / 1e6:.2g} M tokens and is seen {times:.2g} times"]
