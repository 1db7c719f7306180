"""Text for readers: formatted numbers, the finding in plain words, and warnings."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from mobilellm_jax.analysis import statistics
from mobilellm_jax.analysis.facts import Facts, Point
from mobilellm_jax.analysis.records import budget_name
from mobilellm_jax.analysis.statistics import Estimate, PairedDifference
from mobilellm_jax.analysis.tuning import Tuning
from mobilellm_jax.analysis.verdicts import Comparison

TOLERANCE = 0.02  # largest mismatch of the matched budget without a warning


def format_score(value: float, metric: str) -> str:
    """Formats a loss in nats per token with four decimals, an error in percent with two."""
    return f"{value:.4f}" if metric == "loss" else f"{100 * value:.2f}"


def format_bound(value: float, metric: str) -> str:
    """Rounds up to two digits, to stay a bound: 0.0123 -> "0.013"; of an error, percentage "points"."""
    value = value if metric == "loss" else 100 * value
    step = 10.0 ** (math.floor(math.log10(value)) - 1) if value else 1.0
    return f"{math.ceil(value / step - 1e-9) * step:.6g}" + ("" if metric == "loss" else " points")


def format_estimate(estimate: Estimate, metric: str) -> str:
    """Formats mean and half width, "3.1234 ± 0.0012", or the mean; an error as exact match in percent."""
    mean = estimate.mean if metric == "loss" else 1 - estimate.mean
    half = "" if estimate.half_width is None else f" ± {format_score(estimate.half_width, metric)}"
    return format_score(mean, metric) + half


def format_difference(difference: PairedDifference, metric: str) -> str:
    """Formats mean and interval, "+0.0120 [-0.0010, +0.0250]", or the mean; an error in percentage points."""
    scale, digits = (1, 4) if metric == "loss" else (100, 2)
    mean, low, high = (
        v if v is None else scale * v for v in (difference.mean, difference.low, difference.high)
    )
    return f"{mean:+.{digits}f}" + ("" if low is None else f" [{low:+.{digits}f}, {high:+.{digits}f}]")


def format_p(p: float | None) -> str:
    """Formats a p-value with its relation: "= 0.012" or "< 0.001"."""
    return "unknown" if p is None else "< 0.001" if p < 0.001 else f"= {p:.3f}"


def phrase(c: Comparison, metric: str) -> str:
    """Phrases a finding: "no difference larger than 0.02", "cannot tell with 3 seeds (needs about 11)"."""
    said, reason = _parts(c, metric)
    return f"{said} ({reason})" if reason else said


def _parts(c: Comparison, metric: str) -> tuple[str, str]:
    """Splits the phrase of a pair into the finding, which several may share, and the pair's own reason."""
    if c.difference is None:
        return "cannot tell with no common seed", ""
    seeds = _seeds(c.difference.n)
    if c.word == "cannot tell":
        reason = ""
        if c.diverged:
            reason = f"{' and '.join(map(repr, c.diverged))} diverged"
        elif c.difference.n == 1:
            reason = "needs at least 2"
        elif c.seeds_needed:
            reason = f"needs about {_two_digits(c.seeds_needed)}"
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
    comparisons: Sequence[Comparison],
    tuning: Mapping[str, Tuning],
    seeds_vary: str,
) -> str:
    """The finding in plain words: differences, equal and undecided pairs, then failed runs."""
    scores = {label: list(point.scores.values()) for label, point in points.items() if point.scores}
    if not scores:
        parts = ["No comparison run finished.", *_best_rates(tuning)]
    elif not comparisons:
        parts = [_means(scores, facts.metric)]
    else:
        parts = list(_findings(comparisons, facts.metric))
    if scores and seeds_vary != "nothing":
        parts.append(f"Seeds change {seeds_vary}.")
    return " ".join([*parts, failures(points, "comparison")]).strip()


def _findings(comparisons: Sequence[Comparison], metric: str) -> Iterator[str]:
    better: dict[str, list[str]] = {}
    rest: dict[str, dict[str, list[str]]] = {"no difference": {}, "cannot tell": {}}
    for c in comparisons:
        if c.difference is not None and c.word in ("better", "worse"):
            winner, loser = (c.point, c.other) if c.word == "better" else (c.other, c.point)
            by = format_score(abs(c.difference.mean), metric)
            lost = f"{loser!r} (by {by}, p {format_p(c.holm_p)}{_small(c, metric)})"
            better.setdefault(winner, []).append(lost)
        else:
            said, reason = _parts(c, metric)
            names = f"{c.point!r} and {c.other!r}" + (f" ({reason})" if reason else "")
            rest[c.word].setdefault(said, []).append(names)
    for winner, losers in better.items():
        yield f"{winner!r} is better than {_join(losers)}."
    for of_word in rest.values():
        for said, names in of_word.items():
            yield f"{said.capitalize()}: {'; '.join(names)}."
    if better:
        unit = "nats per token" if metric == "loss" else "percentage points of exact match"
        over = f", p is Holm's over {len(comparisons)} pairs" if len(comparisons) > 1 else ""
        yield f"Differences are in {unit} over paired seeds{over}."


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
    unit = "nats per token" if metric == "loss" else "%"
    return f"No comparison was asked for. Mean {metric} in {unit}: {', '.join(found)}."


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _seeds(count: int) -> str:
    return f"{count} seed" + ("s" if count != 1 else "")


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


# --- warnings -------------------------------------------------------------------------------------------


def warnings(
    facts: Facts,
    points: Mapping[str, Point],
    comparisons: Sequence[Comparison],
    tuning: Mapping[str, Tuning],
    mismatch: Mapping[str, float],
) -> Iterator[str]:
    """Yields threats to the validity of the verdict: seeds, divergence, tuning, unequal budgets."""
    compared = {label: point for label, point in points.items() if point.comparison}
    yield from _seed_warnings(facts, compared, comparisons)
    yield from filter(None, map(_survivors, compared.values()))
    yield from _tuning_warnings(facts, list(compared), tuning)
    if mismatch.get(facts.matched, 0) > TOLERANCE:
        yield (
            f"The points were to have equal {budget_name(facts.matched)}, but differ by up to "
            f"{mismatch[facts.matched]:.1%}: that may decide instead of what is compared."
        )


def _seed_warnings(
    facts: Facts, compared: Mapping[str, Point], comparisons: Sequence[Comparison]
) -> Iterator[str]:
    scores = {label: point.scores for label, point in compared.items() if point.scores}
    for count, why in ((1, "One seed proves nothing"), (2, "Intervals from two seeds are very wide")):
        if few := [repr(point) for point, by_seed in scores.items() if len(by_seed) == count]:
            yield f"{why}: {'all points' if len(few) == len(compared) else _join(few)}."
    points = dict.fromkeys(point for c in comparisons for point in (c.point, c.other))
    seeds = set().union(*(scores.get(point, {}) for point in points))
    if gone := [repr(point) for point in points if not scores.get(point)]:
        has, they = ("has", "it is") if len(gone) == 1 else ("have", "they are")
        yield f"{_join(gone)} {has} no finished run: {they} not compared."
    for point in points:
        missing = seeds - scores.get(point, {}).keys()
        if missing and missing != seeds:
            yield (
                f"{point!r} has no finished run with seed {_numbers(missing)}, unlike other points: its "
                "pairs are compared over the common seeds only."
            )
    if same := [c for c in comparisons if c.difference and c.difference.n > 1 and c.difference.sd == 0]:
        why = "the error is saturated" if facts.metric == "error" else "both are one computation"
        yield (
            f"The same difference in every seed: {'; '.join(f'{c.point!r} and {c.other!r}' for c in same)}. "
            f"Either {why}, or the seeds have no effect."
        )
    orders: dict[int, set[int]] = {}
    for run in (run for point in compared.values() for run in point.comparison):
        orders.setdefault(run.seed, set()).add(run.setting("train.data_seed"))
    if mixed := [seed for seed, found in orders.items() if len(found) > 1]:
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
            f"with {count} of {_seeds(total)}. The seeds that survived flatter it, so that nothing is "
            "concluded in its favour."
        )
    return f"{point.label!r} diverged {said}"


def _tuning_warnings(facts: Facts, points: Sequence[str], tuning: Mapping[str, Tuning]) -> Iterator[str]:
    """Yields reasons why the learning rates of the comparison may be unfair to one of `points`."""
    if facts.tuning == "none":
        yield (
            "The learning rate was not tuned: a point that looks better may only suit the given rate better."
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
        yield f"No optimum was fitted to the learning rates of {' and '.join(bent)}: the best one tried is used."
    for point, search in tuning.items() if facts.tuning == "grid" else ():
        if search.best is not None and search.chosen != search.best:
            yield (
                f"{point!r} was compared at learning rate {search.chosen:.3g}, but {search.best:.3g} was "
                "better in tuning."
            )
