"""What the records of a study allow one to say: paired differences, Holm's correction, a verdict."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
from scipy import stats

from mobilellm_jax.errors import UserError
from mobilellm_jax.results import Record, by_point, by_study, newest

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean of `n` values with its t interval; `half_width` is None for one value, or for equal values."""

    n: int
    mean: float
    half_width: float | None


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b over `n` common seeds, its 95 % t interval and the p-value of the paired t test.

    `low`, `high` and `p_value` are None with one seed, and where the difference is the same for every seed:
    a spread of zero says that the seed had no effect, not that the difference is certain.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    p_value: float | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One point against the reference; `word` is "better", "worse" or "cannot tell"."""

    word: str
    difference: PairedDifference | None  # None: no common seed
    holm_p: float | None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found in one study at one preset.

    Attributes:
      sentence: the finding, its uncertainty, and the runs that did not finish.
      estimates: final held-out loss (nats per token) of every point with a finished run, in study order.
      best: the point with the lowest mean loss; None if no run finished.
      reference: the baseline, or `best` where there is none; None if no run finished.
      comparisons: every other point of `estimates` against the reference.
      family: number of pairs that Holm's correction covers.
      warnings: from `check_comparable`.
    """

    sentence: str
    estimates: dict[str, Estimate]
    best: str | None
    reference: str | None
    comparisons: dict[str, Comparison]
    family: int
    warnings: list[str]


def mean_and_interval(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Returns the mean of at least one value and half the width of its t interval."""
    mean, n = float(np.mean(values)), len(values)
    if n == 1 or _equal(values, np.max(np.abs(values))):
        return Estimate(n, mean, None)
    _, high = stats.t.interval(level, n - 1, loc=mean, scale=stats.sem(values))
    return Estimate(n, mean, float(high) - mean)


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> PairedDifference:
    """Compares losses by seed, over the seeds that both have. Negative means: `a` is lower.

    Raises:
      UserError: there is no common seed.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise UserError(
            f"no seed in common: {sorted(a)} against {sorted(b)}; paired differences need equal seeds"
        )
    x, y = (np.array([losses[seed] for seed in seeds], dtype=float) for losses in (a, b))
    mean = float(np.mean(x - y))
    if len(seeds) == 1 or _equal(x - y, np.max(np.abs([x, y]))):
        return PairedDifference(len(seeds), mean, None, None, None)
    test = stats.ttest_rel(x, y)
    low, high = test.confidence_interval(LEVEL)
    return PairedDifference(len(seeds), mean, float(low), float(high), float(test.pvalue))


def _equal(values: Sequence[float] | np.ndarray, scale: float) -> bool:
    return bool(np.ptp(values) <= 1e-9 * scale)  # float32 losses differ by 1e-7 or not at all


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values adjusted for the whole family by Holm's step-down method (Holm 1979)."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()


def verdict(records: Sequence[Record]) -> Verdict:
    """Says what the runs of one study at one preset show about the final held-out loss.

    Every point is compared with the baseline, or, where the study has none, with the point that came out
    best. Which one that is depends on the data, so the correction then covers all pairs of points.

    Raises:
      UserError: the runs cannot be compared, see `check_comparable`.
    """
    if len(by_study(records)) != 1:
        raise ValueError(f"expected the records of one study and preset, not {sorted(by_study(records))}")
    warnings = check_comparable(records)
    losses: dict[str, dict[int, float]] = {}
    for point, runs in by_point(records).items():
        if finished := {run.seed: run.loss for run in runs if run.status == "finished"}:
            losses[point] = finished
    estimates = {point: mean_and_interval(list(values.values())) for point, values in losses.items()}
    failures = _failures(records)
    if not estimates:
        return Verdict(f"No run finished. {failures}", {}, None, None, {}, 0, warnings)

    best = min(estimates, key=lambda point: estimates[point].mean)
    baseline = newest(records).baseline
    reference = baseline if baseline in estimates else best
    others = [point for point in estimates if point != reference]
    family = [(point, reference) for point in others]
    if reference != baseline:
        family += combinations(others, 2)
    differences = {
        (a, b): paired_difference(losses[a], losses[b])
        for a, b in family
        if losses[a].keys() & losses[b].keys()
    }
    tested = {pair: d.p_value for pair, d in differences.items() if d.p_value is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    comparisons = {
        point: _compare(differences.get((point, reference)), adjusted.get((point, reference)))
        for point in others
    }
    sentence = f"{_sentence(estimates, best, reference, comparisons, len(tested))} {failures}".strip()
    if baseline is not None and reference != baseline:
        sentence = f"The baseline {baseline!r} has no finished run; the best is the reference. {sentence}"
    return Verdict(sentence, estimates, best, reference, comparisons, len(tested), warnings)


def _compare(difference: PairedDifference | None, holm_p: float | None) -> Comparison:
    if difference is None or holm_p is None or holm_p >= 1 - LEVEL:
        return Comparison("cannot tell", difference, holm_p)
    return Comparison("better" if difference.mean < 0 else "worse", difference, holm_p)


def _sentence(
    estimates: dict[str, Estimate], best: str, reference: str, comparisons: dict[str, Comparison], family: int
) -> str:
    loss = estimates[best]
    if len(estimates) == 1:
        return f"Only {best!r} finished, with a held-out loss of {format_estimate(loss)} nats per token."
    said = []
    for word in ("better", "worse", "cannot tell"):
        points = [f"{p!r} ({_evidence(c)})" for p, c in comparisons.items() if c.word == word]
        said += [f"{word}: {', '.join(points)}"] if points else []
    found = (
        f"{best!r} has the lowest mean held-out loss, {format_estimate(loss)} nats per token (n = {loss.n}). "
        f"Against {'it' if reference == best else repr(reference)}: {'; '.join(said)}."
    )
    seeds = max(c.difference.n if c.difference else 0 for c in comparisons.values())
    if seeds <= 1:
        return f"One seed proves nothing: it cannot tell a difference from the spread over seeds. {found}"
    wide = " Intervals from two seeds are very wide." if seeds == 2 else ""
    return f"{found} Brackets hold 95 % intervals over paired seeds; p is Holm's over {family} pairs.{wide}"


def _evidence(comparison: Comparison) -> str:
    difference = comparison.difference
    if difference is None:
        return "no common seed"
    if difference.low is None:
        why = "one seed" if difference.n == 1 else f"the same in all {difference.n} seeds"
        return f"{difference.mean:+.4f}, {why}"
    return f"{format_difference(difference)}, p {format_p(comparison.holm_p)}"


def format_estimate(estimate: Estimate) -> str:
    """Returns "3.1234 ± 0.0012", without the interval where there is none."""
    half = estimate.half_width
    return f"{estimate.mean:.4f}" + (f" ± {half:.4f}" if half is not None else "")


def format_difference(difference: PairedDifference) -> str:
    """Returns "+0.0120 [-0.0010, +0.0250]", without the interval where there is none."""
    if difference.low is None:
        return f"{difference.mean:+.4f}"
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def format_p(p: float | None) -> str:
    """Returns "= 0.012" or "< 0.001"."""
    return "unknown" if p is None else "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _failures(records: Sequence[Record]) -> str:
    """Counts the runs that failed, diverged, or left no record though other points have that seed."""
    points = by_point(records)
    seeds = {record.seed for record in records}
    gone = {word: [run.name for run in records if run.status == word] for word in ("diverged", "failed")}
    gone["left no record"] = [
        f"{point!r} seed {seed}"
        for point, runs in points.items()
        for seed in sorted(seeds - {run.seed for run in runs})
    ]
    total = len(points) * len(seeds)
    return " ".join(
        f"{len(names)} of {total} runs {word}: {', '.join(names)}." for word, names in gone.items() if names
    )


_SEEDS = {"train.init_seed", "train.data_seed"}
# Settings without influence on the loss, or that follow from others.
_IDLE = re.compile(
    r"train\.(init_seed|data_seed|log_every|checkpoint_every|eval_batch_size)|data\.cache_dir|mesh\..*"
    r"|model\.(num_kv_heads|head_dim|ffn_width|remat|scan_unroll|loss_chunk)"
)
# Settings without which losses mean different things.
_DECISIVE = re.compile(r"data\..*|train\.(steps|batch_size|eval_rows)")


def check_comparable(records: Iterable[Record]) -> list[str]:
    """Refuses to compare runs of one study and preset that differ in more than the point and the seed.

    A setting that the study names as scientific may differ; the hashes of data and tokenizer may never.

    Returns:
      Warnings: runs of different code, libraries or devices, or of a study that was changed in between.

    Raises:
      UserError: different data, tokenizer, sequence length, batch or steps; one run twice; one label for two
        designs. The message names the runs and the values.
    """
    warnings = []
    for (study, preset), group in by_study(records).items():
        facts: dict[tuple[bool, str], dict[str, list[Record]]] = {}
        for record in group:
            for name, value, decisive in _facts(record, group):
                facts.setdefault((decisive, name), {}).setdefault(str(value), []).append(record)
        for (decisive, name), runs in facts.items():
            if decisive and len(runs) > 1:
                a, b = list(runs)[:2]
                raise UserError(
                    f"{study}:{preset}: {name} is {a} in {runs[a][0].name}, but {b} in {runs[b][0].name}; "
                    "such runs are not compared: make them again under equal conditions, or apart"
                )
            if len(runs) > 1:
                counts = ", ".join(f"{value} ({len(records)} runs)" for value, records in runs.items())
                warnings.append(f"The runs differ in {name}: {counts}.")
        (run, count), *_ = Counter(record.name for record in group).most_common()
        if count > 1:
            raise UserError(f"{study}:{preset}: {count} records of {run}; keep one of them")
    return warnings


def _facts(record: Record, runs: Sequence[Record]) -> Iterator[tuple[str, object, bool]]:
    """Yields (name, value, whether a difference is decisive) of what should be equal over a study's runs."""
    scientific = set(newest(runs).scientific)
    varied = scientific.union(*(run.overrides for run in runs))
    design = {name: value for name, value in sorted(record.overrides.items()) if name not in _SEEDS}
    yield f"the design of {record.point!r}", design, True
    yield from (
        (f"{name} of the data", v, True) for name, v in record.data.items() if name.endswith("sha256")
    )
    if record.status == "finished" and not scientific & {"train.steps", "train.batch_size"}:
        yield "steps", record.steps, True
        yield "tokens seen", record.tokens_seen, True
    for group, settings in record.config.items():
        for field, value in settings.items():
            name = f"{group}.{field}"
            is_decisive = bool(_DECISIVE.fullmatch(name))
            if name not in scientific and not _IDLE.fullmatch(name) and (is_decisive or name not in varied):
                yield name, value, is_decisive
    yield "git commit", record.git_commit, False
    yield "device", record.device_name, False
    yield from ((f"{library} version", version, False) for library, version in record.versions.items())
    for name in ("question", "matched", "baseline", "scientific"):
        yield name, getattr(record, name), False
