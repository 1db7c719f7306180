"""Text for readers: formatted numbers, and the finding in plain words."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from mobilellm_jax.analysis import statistics
from mobilellm_jax.analysis.facts import Facts, Point, have_base_shape
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.noise import Noise
from mobilellm_jax.analysis.statistics import Difference, Estimate
from mobilellm_jax.analysis.tuning import Drift, Tuning
from mobilellm_jax.analysis.verdicts import DEPENDS, Comparison, Family, Joint

_MANY = 24  # pairs that a paragraph names
_COUNTED = {
    "better": "differ",
    "worse": "differ",
    "no difference": "show no difference that matters",
    "cannot tell": "cannot be told apart",
    DEPENDS: "depend on the parameterization",
}


def format_score(value: float, metric: str) -> str:
    """Formats a loss in nats per token with four decimals, a share in percent with two."""
    measure = MEASURES[metric]
    return f"{measure.scale * value:.{measure.digits}f}"


def format_bound(value: float, metric: str) -> str:
    """Rounds up to two digits, to stay a bound: 0.0123 -> "0.013"; of a share, percentage "points"."""
    measure = MEASURES[metric]
    value = measure.scale * value
    step = 10.0 ** (math.floor(math.log10(value)) - 1) if value else 1.0
    return f"{math.ceil(value / step - 1e-9) * step:.6g}{measure.suffix}"


def format_estimate(estimate: Estimate, metric: str) -> str:
    """Formats mean and half width, "3.1234 ± 0.0012", or the mean; an error as exact match in percent."""
    mean = 1 - estimate.mean if MEASURES[metric].is_share else estimate.mean
    half = "" if estimate.half_width is None else f" ± {format_score(estimate.half_width, metric)}"
    return format_score(mean, metric) + half


def format_difference(difference: Difference, metric: str) -> str:
    """Formats mean and interval, "+0.0120 [-0.0010, +0.0250]", or the mean; a share in percentage points."""
    scale, digits = MEASURES[metric].scale, MEASURES[metric].digits
    mean, low, high = (
        v if v is None else scale * v for v in (difference.mean, difference.low, difference.high)
    )
    return f"{mean:+.{digits}f}" + ("" if low is None else f" [{low:+.{digits}f}, {high:+.{digits}f}]")


def format_p(p: float | None) -> str:
    """Formats a p-value with its relation: "= 0.012" or "< 0.001"."""
    return "unknown" if p is None else "< 0.001" if p < 0.001 else f"= {p:.3f}"


def phrase(c: Comparison, metric: str) -> str:
    """Phrases a finding: "no difference larger than 0.02", "cannot tell with 1 seed (needs at least 2)"."""
    said, reason = _parts(c, metric)
    return f"{said} ({reason})" if reason else said


def _parts(c: Comparison, metric: str) -> tuple[str, str]:
    """Splits the phrase of a pair into the finding, which several may share, and the pair's own reason."""
    if c.difference is None:
        return "cannot tell without finished runs", ""
    seeds = count_seeds(*c.difference.seeds)
    if c.word == "cannot tell":
        reason = ""
        if c.diverged:
            reason = f"{' and '.join(map(repr, c.diverged))} diverged"
        elif c.difference.n == 1:
            reason = "needs at least 2"
        return f"cannot tell with {seeds}", reason
    if c.word == "no difference":
        if c.bound is None:
            return f"no difference in any of {seeds}", ""
        return f"no difference larger than {format_bound(c.bound, metric)}", ""
    return c.word + _small(c, metric), ""


def _small(c: Comparison, metric: str) -> str:
    return "" if c.bound is None else f", but by no more than {format_bound(c.bound, metric)}"


def sentence(
    facts: Facts,
    points: Mapping[str, Point],
    families: Sequence[Family],
    joint: Sequence[Joint],
    noise: Noise,
    tuning: Mapping[str, Tuning],
    drifts: Sequence[Drift],
    seeds_vary: str,
) -> str:
    """The finding in plain words: differences, equal and undecided pairs, how sure, then failed runs.

    It speaks of designs without naming a parameterization only where all arms say the same.
    """
    scores = {label: list(point.scores.values()) for label, point in points.items() if point.scores}
    if not scores:
        parts = ["No comparison run finished.", *_best_rates(tuning)]
    elif not families:
        parts = [_means(scores, facts.metric)]
    elif joint:
        findings = _joint_findings(joint, families, facts.metric)
        parts = [*_counted(joint, findings), *_grounds(families, noise, facts)]
    else:
        arm, comparisons = sole_arm(points), families[0].comparisons
        parts = [f"Under {arm} alone:"] if arm else []
        parts += [
            *_counted(comparisons, _findings(comparisons, facts.metric)),
            *_grounds(families, noise, facts),
        ]
    parts += [f"{format_drift(drift)}." for drift in drifts]
    if scores and seeds_vary != "nothing":
        parts.append(f"Seeds change {seeds_vary}.")
    return " ".join([*parts, failures(points, "comparison")]).strip()


def format_drift(drift: Drift) -> str:
    """How the best learning rate moves along a line of the study's figure, without a full stop."""
    line = f" ({drift.series})" if drift.series else ""
    start, end = (f"{x:.6g}" for x in drift.span)
    octaves = (drift.octaves, drift.low, drift.high, drift.total)
    by, low, high, total = (f"{round(x, 2) + 0.0:+.2f}" for x in octaves)  # no -0.00
    return (
        f"The best learning rate{line} moves by {by} [{low}, {high}] octaves for each doubling of "
        f"{drift.label}, {total} from {start} to {end}"
    )


def sole_arm(points: Mapping[str, Point]) -> str:
    """The one parameterization of all points; "" if not recorded, if they differ, or at the base shape."""
    if have_base_shape(points):
        return ""
    names = {point.arm or point.config["model"].get("parameterization") or "" for point in points.values()}
    return names.pop() if len(names) == 1 else ""


def _counted(pairs: Sequence[Comparison | Joint], findings: Iterable[str]) -> Iterable[str]:
    """The findings; of more pairs than a paragraph can hold, how many have which word."""
    if len(pairs) <= _MANY:
        return findings
    counts = Counter(_COUNTED[pair.word] for pair in pairs).most_common()
    return [f"Of {len(pairs)} pairs {join([f'{number} {said}' for said, number in counts])}: see the table."]


def _findings(comparisons: Sequence[Comparison], metric: str) -> Iterator[str]:
    better: dict[str, list[str]] = {}
    rest: dict[str, dict[str, list[str]]] = {"no difference": {}, "cannot tell": {}}
    for c in comparisons:
        if c.difference is not None and c.word in ("better", "worse"):
            winner, loser = (c.point, c.other) if c.word == "better" else (c.other, c.point)
            better.setdefault(winner, []).append(f"{loser!r} ({_size(c, metric)})")
        else:
            said, reason = _parts(c, metric)
            names = f"{c.point!r} and {c.other!r}" + (f" ({reason})" if reason else "")
            rest[c.word].setdefault(said, []).append(names)
    for winner, losers in better.items():
        yield f"{winner!r} is better than {join(losers)}."
    for of_word in rest.values():
        for said, names in of_word.items():
            yield f"{said.capitalize()}: {'; '.join(names)}."


def _size(c: Comparison, metric: str) -> str:
    """Size of a difference that was found: "by 0.1200, p = 0.012"."""
    by = format_score(abs(c.difference.mean) if c.difference else math.nan, metric)
    return f"by {by}, p {format_p(c.p_value)}{_small(c, metric)}"


def _joint_findings(joint: Sequence[Joint], families: Sequence[Family], metric: str) -> Iterator[str]:
    arms = [family.arm for family in families]
    every = "both parameterizations" if len(arms) == 2 else f"all {len(arms)} parameterizations"
    found = {(c.designs, c.arm): c for family in families for c in family.comparisons}
    parts: dict[str, list[str]] = {}
    for pair in joint:
        a, b = pair.design, pair.other
        of_arm = {arm: found[(a, b), arm] for arm in pair.words}
        if pair.word in ("better", "worse"):
            winner, loser = (a, b) if pair.word == "better" else (b, a)
            sizes = "; ".join(f"{arm}: {_size(c, metric)}" for arm, c in of_arm.items())
            yield f"{winner!r} is better than {loser!r} under {every} ({sizes})."
        elif pair.word == DEPENDS:
            said = ", ".join(f"{phrase(c, metric)} under {arm}" for arm, c in of_arm.items())
            parts.setdefault("It depends on the parameterization", []).append(f"{a!r} against {b!r}: {said}")
        elif pair.word == "no difference" and all(c.bound is not None for c in of_arm.values()):
            bound = format_bound(max(c.bound or 0.0 for c in of_arm.values()), metric)
            parts.setdefault(f"No difference larger than {bound} under {every}", []).append(
                f"{a!r} and {b!r}"
            )
        else:
            alone = [
                f"{phrase(c, metric)} under {arm}" for arm, c in of_arm.items() if c.word != "cannot tell"
            ]
            only = f" ({', '.join(alone)} alone)" if alone and pair.word == "cannot tell" else ""
            parts.setdefault(f"{pair.word.capitalize()} under {every}", []).append(f"{a!r} and {b!r}{only}")
    yield from (f"{said}: {'; '.join(names)}." for said, names in parts.items())


def _grounds(families: Sequence[Family], noise: Noise, facts: Facts) -> Iterator[str]:
    """Unit, what p and intervals hold for, pairing, seeds beyond the plan, and seeds for equality."""
    comparisons = [c for family in families for c in family.comparisons]
    unit = MEASURES[facts.metric].unit
    if any(c.word in ("better", "worse") for c in comparisons):
        pairs = max(len(family.comparisons) for family in families)
        under = " of one parameterization" if len(families) > 1 else ""
        at_once = f", p and intervals hold for all {pairs} pairs{under} at once" if pairs > 1 else ""
        yield f"Differences are in {unit}{at_once}."
    if noise.correlation is not None:
        done = "their common effect is removed" if noise.paired else "not paired"
        yield f"Seeds correlate by {noise.correlation:.2f} over points: {done}."
    for planned in dict.fromkeys(family.planned for family in families):
        if planned is not None:
            yield (
                f"There are more seeds than the {planned} planned: p and intervals are those of a confidence "
                "sequence, which allows for looking after every seed."
            )
    is_open = any(c.word == "cannot tell" and not c.diverged for c in comparisons)
    powers = [family.power for family in families if family.power is not None]
    if is_open and powers and min(powers) < statistics.POWER:
        chance = f"{min(powers):.0%}" if min(powers) >= 0.005 else "less than 1%"
        within = format_bound(facts.margin, facts.metric)
        yield (
            f"By the plan, equal designs are shown to be so within {within} with a probability of {chance}: "
            "a pair that is not told apart may be equal."
        )
    if noise.sd and is_open:
        low, high = (format_score(sd, facts.metric) for sd in statistics.interval_of_sd(noise.sd, noise.df))
        for seeds in dict.fromkeys(family.seeds for family in families):
            if seeds is not None:
                about, fewest, most = map(_two_digits, seeds)
                yield (
                    f"With the pooled sd {format_score(noise.sd, facts.metric)} [{low}, {high}], equality "
                    f"within {format_bound(facts.margin, facts.metric)} takes about {about} seeds "
                    f"({fewest} to {most})."
                )


def _best_rates(tuning: Mapping[str, Tuning]) -> Iterator[str]:
    best = [f"{t.chosen:.3g} for {point!r}" for point, t in tuning.items() if math.isfinite(t.chosen)]
    if best:
        yield f"Best learning rates: {', '.join(best)}."


def _means(scores: Mapping[str, Sequence[float]], metric: str) -> str:
    found = []
    for point, values in scores.items():
        spread = statistics.standard_deviation(values)
        noise = "" if spread is None else f" (standard deviation {format_score(spread, metric)})"
        found.append(f"{point!r} {format_score(float(np.mean(values)), metric)}{noise}")
    of = MEASURES[metric]
    return f"No comparison was asked for. Mean {of.what} in {of.unit_of_mean}: {', '.join(found)}."


def join(names: Sequence[str]) -> str:
    """Joins names as prose does: \"a, b and c\"."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def count_seeds(*counts: int) -> str:
    """Formats "1 seed", "5 seeds", or of two points with different numbers "5 and 4 seeds"."""
    several = dict.fromkeys(counts)
    return " and ".join(map(str, several)) + (" seeds" if several != {1: None} else " seed")


def _two_digits(number: int) -> str:
    """Formats 11 as "11" and 1234 as "1,200": an estimate from few seeds supports no more digits."""
    return f"{round(number, min(0, 2 - len(str(number)))):,}"


def failures(points: Mapping[str, Point], phase: str) -> str:
    """Counts and names the runs that failed, diverged, or lack a record for a seed that other points have."""
    runs = [run for p in points.values() for run in (p.tuning if phase == "tuning" else p.comparison)]
    names = {
        word: [
            run.name + (f" at {run.learning_rate:.3g}" if phase == "tuning" else "")
            for run in runs
            if run.status == word
        ]
        for word in ("diverged", "failed")
    }
    total = len(runs)
    if phase == "comparison" and runs:
        there = {(run.point, run.seed) for run in runs}
        wanted = [(point, seed) for point in points for seed in sorted({run.seed for run in runs})]
        names["left no record"] = [f"{p!r} seed {seed}" for p, seed in wanted if (p, seed) not in there]
        total = len(wanted)
    return " ".join(
        f"{len(n)} of {total} {phase} runs {word}: {', '.join(n)}." for word, n in names.items() if n
    )
