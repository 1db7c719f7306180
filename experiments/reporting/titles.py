"""Titles that answer: what a figure shows, in one sentence without a full stop."""

import math
from collections.abc import Mapping

from experiments.reporting import numerals
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.study import Study
from mobilellm_jax.analysis.tuning import Tuning
from mobilellm_jax.analysis.verdicts import Comparison
from mobilellm_jax.analysis.wording import join, phrase


def says(c: Comparison, study: Study) -> str:
    """The finding about a pair as a sentence without a full stop: "'a' is better than 'b'"."""
    point, other = map(repr, c.designs)
    found = phrase(c, study.facts.metric)
    if c.word in ("better", "worse"):
        said = f"{point} is {c.word} than {other}{found.removeprefix(c.word)}"
    else:
        said = f"{point} and {other}: {found}"
    return said + (f" ({c.arm})" if c.arm and len(study.verdict.families) > 1 else "")


def front(places: Mapping[str, float], study: Study) -> str:
    """Names the designs that have a better mean than all that cost less."""
    means = {label: study.verdict.estimates[label].mean for label in places}
    front, best = [], math.inf
    for label in sorted(places, key=lambda label: (places[label], means[label])):
        if means[label] < best:
            front.append(label)
            best = means[label]
    if len(front) > 3:
        return f"{len(front)} of {len(places)} designs have the best mean"
    return f"{join([repr(label) for label in front])} {'has' if len(front) == 1 else 'have'} the best mean"


def last(study: Study) -> str:
    """Which designs end lowest and highest."""
    metric, estimates = study.facts.metric, study.verdict.estimates
    if not estimates:
        return "No run has finished"
    ranked = sorted(estimates, key=lambda label: estimates[label].mean)
    values = [f"{MEASURES[metric].shown(estimates[p].mean):.{MEASURES[metric].digits}f}" for p in ranked]
    if len(ranked) == 1:
        return f"{ranked[0]!r} ends at {values[0]}"
    return f"{ranked[0]!r} ends best, at {values[0]}, {ranked[-1]!r} last, at {values[-1]}"


def best_rates(searches: Mapping[str, Tuning]) -> str:
    """How far apart the best learning rates of the points lie, without a full stop."""
    best = [tuning.best for tuning in searches.values() if tuning.best]
    if not best:
        return "No learning rate was found"
    low, high = (numerals.rate(of(best)) for of in (min, max))
    if len(best) == 1 or low == high:
        which = f"of {next(iter(searches))!r}" if len(best) == 1 else "tried of all designs"
        return f"The best rate {which} is {low}"
    return f"The best rates tried lie within a factor of {max(best) / min(best):.3g}: {low} to {high}"
