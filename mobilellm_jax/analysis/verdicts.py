"""Records in, findings out: what the runs of a study show, and what a sceptic must know first."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from mobilellm_jax.analysis import statistics
from mobilellm_jax.analysis.comparable import check_comparable
from mobilellm_jax.analysis.records import Record, budget_name, by_point, by_study, newest, pairs_of
from mobilellm_jax.analysis.statistics import Decision, Estimate, PairedDifference
from mobilellm_jax.analysis.tuning import Tuning, tuning_searches, tuning_warnings
from mobilellm_jax.analysis.wording import format_bound, format_p, format_score

TOLERANCE = 0.02  # of the matched budget


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was found about one pair that the study asks about.

    Attributes:
      point, other: difference = point - other, in the study's metric; lower is better.
      word: "better", "worse", "no difference" or "cannot tell", see `statistics.decide`.
      phrase: the same with its number: "no difference larger than 0.02", "cannot tell with 3 seeds (needs
        about 11)".
      difference: over the common seeds; None: there is none.
      holm_p: p-value by Holm's method over all `pairs` of the study.
      seeds_needed: only for "cannot tell"; None where the spread over seeds is unknown.
    """

    point: str
    other: str
    word: str
    phrase: str
    difference: PairedDifference | None
    holm_p: float | None
    seeds_needed: int | None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found in one study at one preset.

    Attributes:
      sentence: the finding in plain words.
      estimates: final metric by point, in study order, of the points with a finished comparison run.
      comparisons: in the order of `results.pairs_of`.
      tuning: learning-rate search by point; {} where nothing was tuned.
      noise: standard deviation of the metric over seeds by point; None with one seed.
      mismatch: by budget: max / min - 1 over the points; infinite where min is 0.
      failures: counts and names of failed, diverged and missing runs of both phases; "" if none.
      warnings: what a sceptic must read first.
      seeds_vary: what differs between the runs of a point: "initialisation and data order",
        "initialisation", "data order" or "nothing"; `noise` is the spread that this makes.
    """

    sentence: str
    estimates: dict[str, Estimate]
    comparisons: list[Comparison]
    tuning: dict[str, Tuning]
    noise: dict[str, float | None]
    mismatch: dict[str, float]
    failures: str
    warnings: list[str]
    seeds_vary: str


def verdict(records: Sequence[Record]) -> Verdict:
    """Says what the runs of one study at one preset show.

    Comparison runs alone decide; tuning runs only say how good the learning rates are. A point that diverged
    with some seeds is never called better than, or equal to, another on the strength of the seeds that
    survived.

    Raises:
      UserError: the runs cannot be compared, see `check_comparable`.
    """
    if len(by_study(records)) != 1:
        raise ValueError(f"expected the records of one study and preset, not {sorted(by_study(records))}")
    incomparable = check_comparable(records)
    facts = newest(records)
    compared = [run for run in records if run.phase == "comparison"]
    runs = by_point(compared)
    scores: dict[str, dict[int, float]] = {}
    for point, of_point in runs.items():
        if finished := {run.seed: run.score for run in of_point if run.status == "finished"}:
            scores[point] = finished
    diverged = Counter(run.point for run in compared if run.status == "diverged")
    pairs = pairs_of(records)
    decisions = statistics.decide(scores, pairs, facts.margin)
    comparisons = [
        _compare(pair, decision, diverged, facts, len(pairs))
        for pair, decision in zip(pairs, decisions, strict=True)
    ]
    tuning = tuning_searches(records)
    mismatch = {name: _mismatch([run.budgets[name] for run in records]) for name in facts.budgets}
    failures = {phase: _failures(records, phase) for phase in ("comparison", "tuning")}
    seeds_vary = _seeds_vary(runs)
    return Verdict(
        sentence=_sentence(facts, scores, comparisons, tuning, seeds_vary, failures["comparison"]),
        estimates={point: statistics.mean_and_interval(list(s.values())) for point, s in scores.items()},
        comparisons=comparisons,
        tuning=tuning,
        noise={point: statistics.standard_deviation(list(s.values())) for point, s in scores.items()},
        mismatch=mismatch,
        failures=" ".join(filter(None, failures.values())),
        warnings=[
            *incomparable,
            *_seed_warnings(facts, runs, scores, comparisons),
            *(_survivors(point, count, len(runs[point])) for point, count in diverged.items()),
            *tuning_warnings(facts, list(runs), tuning),
            *_mismatch_warnings(facts, mismatch),
        ],
        seeds_vary=seeds_vary,
    )


def _compare(
    pair: tuple[str, str], decision: Decision, diverged: Mapping[str, int], facts: Record, tests: int
) -> Comparison:
    (point, other), difference, word = pair, decision.difference, decision.word
    # What the surviving seeds say for a point is not said: its bad seeds are not among them.
    favoured = {"better": [point], "worse": [other], "no difference": [point, other]}.get(word, [])
    survivors = [name for name in favoured if diverged.get(name, 0)]
    needed = None
    if difference is None:
        phrase = "cannot tell with no common seed"
    elif survivors:
        word = "cannot tell"
        phrase = f"cannot tell with {_seeds(difference.n)} ({' and '.join(map(repr, survivors))} diverged)"
    elif word == "cannot tell":
        needed = statistics.seeds_needed(difference, tests, facts.margin)
        enough = "at least 2" if difference.n == 1 else f"about {_two_digits(needed)}" if needed else ""
        phrase = f"cannot tell with {_seeds(difference.n)}" + (f" (needs {enough})" if enough else "")
    elif word == "no difference" and decision.bound is None:
        phrase = f"no difference in any of {_seeds(difference.n)}"
    elif word == "no difference" and decision.bound is not None:
        phrase = f"no difference larger than {format_bound(decision.bound, facts.metric)}"
    elif decision.bound is not None and decision.bound <= facts.margin:
        phrase = f"{word}, but by no more than {format_bound(decision.bound, facts.metric)}"
    else:
        phrase = word
    return Comparison(point, other, word, phrase, difference, decision.holm_p, needed)


# --- words ----------------------------------------------------------------------------------------------


def _sentence(
    facts: Record,
    scores: Mapping[str, Mapping[int, float]],
    comparisons: Sequence[Comparison],
    tuning: Mapping[str, Tuning],
    seeds_vary: str,
    failures: str,
) -> str:
    """Returns who is better than whom, who is equal and who cannot be told apart; then the failures."""
    better: dict[str, list[str]] = {}
    rest: dict[str, list[str]] = {}
    for c in comparisons:
        if c.difference is not None and c.word in ("better", "worse"):
            winner, loser = (c.point, c.other) if c.word == "better" else (c.other, c.point)
            by = format_score(abs(c.difference.mean), facts.metric)
            phrase = c.phrase.removeprefix(c.word)
            better.setdefault(winner, []).append(f"{loser!r} (by {by}, p {format_p(c.holm_p)}{phrase})")
        else:
            needs = re.search(r" \(.*\)$", c.phrase)
            said = c.phrase.removesuffix(needs[0]) if needs else c.phrase
            rest.setdefault(said, []).append(f"{c.point!r} and {c.other!r}{needs[0] if needs else ''}")
    parts = [f"{winner!r} is better than {_join(losers)}." for winner, losers in better.items()]
    for word in ("no difference", "cannot tell"):
        said = {phrase: names for phrase, names in rest.items() if phrase.startswith(word)}
        parts += [f"{phrase.capitalize()}: {'; '.join(names)}." for phrase, names in said.items()]
    if better:
        unit = "nats per token" if facts.metric == "loss" else "percentage points of exact match"
        over = f", p is Holm's over {len(comparisons)} pairs" if len(comparisons) > 1 else ""
        parts.append(f"Differences are in {unit} over paired seeds{over}.")
    if not scores:
        best = [f"{t.chosen:.3g} for {point!r}" for point, t in tuning.items() if math.isfinite(t.chosen)]
        parts = ["No comparison run finished."] + (
            [f"Best learning rates: {', '.join(best)}."] if best else []
        )
    elif not comparisons:
        found = []
        for point, of_point in scores.items():
            values = list(of_point.values())
            spread = statistics.standard_deviation(values)
            noise = "" if spread is None else f" (standard deviation {format_score(spread, facts.metric)})"
            found.append(f"{point!r} {format_score(float(np.mean(values)), facts.metric)}{noise}")
        unit = "nats per token" if facts.metric == "loss" else "%"
        parts = [f"No comparison was asked for. Mean {facts.metric} in {unit}: {', '.join(found)}."]
    if scores and seeds_vary != "nothing":
        parts.append(f"Seeds change {seeds_vary}.")
    return " ".join([*parts, failures]).strip()


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _seeds(count: int) -> str:
    return f"{count} seed" + ("s" if count != 1 else "")


def _two_digits(number: int) -> str:
    """Returns 11 as "11" and 1234 as "1,200": an estimate from few seeds has no more digits than that."""
    return f"{round(number, min(0, 2 - len(str(number)))):,}"


def _failures(records: Sequence[Record], phase: str) -> str:
    """Counts the runs that failed, diverged, or left no record though other points have that seed."""
    runs = [run for run in records if run.phase == phase]
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
        wanted = [(point, seed) for point in by_point(records) for seed in sorted({run.seed for run in runs})]
        names["left no record"] = [f"{p!r} seed {seed}" for p, seed in wanted if (p, seed) not in there]
        total = len(wanted)
    return " ".join(
        f"{len(n)} of {total} {phase} runs {word}: {', '.join(n)}." for word, n in names.items() if n
    )


# --- warnings -------------------------------------------------------------------------------------------


def _seed_warnings(
    facts: Record,
    runs: Mapping[str, Sequence[Record]],
    scores: Mapping[str, Mapping[int, float]],
    comparisons: Sequence[Comparison],
) -> Iterator[str]:
    for count, why in ((1, "One seed proves nothing"), (2, "Intervals from two seeds are very wide")):
        if few := [repr(point) for point, by_seed in scores.items() if len(by_seed) == count]:
            yield f"{why}: {'all points' if len(few) == len(runs) else _join(few)}."
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
    for run in (run for of_point in runs.values() for run in of_point):
        orders.setdefault(run.seed, set()).add(run.setting("train.data_seed"))
    if mixed := [seed for seed, found in orders.items() if len(found) > 1]:
        yield f"Runs with equal seed saw the data in different orders (seeds {_numbers(mixed)}): not paired."


def _numbers(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds))) or "none"


def _survivors(point: str, count: int, total: int) -> str:
    if count == total:
        return f"{point!r} diverged with every seed: no comparison shows how bad it is at its learning rate."
    return (
        f"{point!r} diverged with {count} of {_seeds(total)}. The seeds that survived flatter it, so that "
        "nothing is concluded in its favour."
    )


def _mismatch(values: Sequence[int | float]) -> float:
    return max(values) / min(values) - 1 if min(values) else (math.inf if max(values) else 0.0)


def _mismatch_warnings(facts: Record, mismatch: Mapping[str, float]) -> Iterator[str]:
    matched = facts.matched
    if matched in mismatch and mismatch[matched] > TOLERANCE:
        yield (
            f"The points were to have equal {budget_name(matched)}, but differ by up to "
            f"{mismatch[matched]:.1%}: that may decide instead of what is compared."
        )


def _seeds_vary(runs: Mapping[str, Sequence[Record]]) -> str:
    """Says which of the two kinds of randomness differs between the seeds of a point."""
    kinds = {"train.init_seed": "initialisation", "train.data_seed": "data order"}
    varied = [
        kind
        for name, kind in kinds.items()
        if any(len({run.setting(name) for run in of_point}) > 1 for of_point in runs.values())
    ]
    return " and ".join(varied) or "nothing"
