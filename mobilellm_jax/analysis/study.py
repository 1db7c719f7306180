"""One study at one preset: facts, points and verdict, the input of tables, figures and pages."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Sequence

from mobilellm_jax.analysis import documents, regime, statistics, threats, twins, verdicts, wording
from mobilellm_jax.analysis.comparable import check_comparable
from mobilellm_jax.analysis.documents import TwoWay
from mobilellm_jax.analysis.facts import Facts, Point, facts_of, points_of
from mobilellm_jax.analysis.noise import Noise, noise_of
from mobilellm_jax.analysis.records import Record
from mobilellm_jax.analysis.regime import Regime
from mobilellm_jax.analysis.statistics import Estimate
from mobilellm_jax.analysis.tuning import Drift, Tuning, drifts, tuning_searches
from mobilellm_jax.analysis.verdicts import Comparison, Family, Joint


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Findings of one study at one preset.

    Attributes:
      sentence: the finding in plain words.
      estimates: final metric by point, in study order, of the points with a finished comparison run.
      families: pairs by arm, each family corrected for by itself; comparisons: all of them, in the order of
        `Facts.pairs`.
      joint: findings over the arms; [] unless there are several.
      tuning: learning-rate search by point; {} if nothing was tuned.
      drifts: how its optimum moves along the lines of the study's figure.
      noise: standard deviation of the metric over seeds by point; None with one seed.
      spread: what the comparisons take for the noise of each point.
      rate_excess: by point, what the error of its fitted learning rate is expected to cost in the metric.
      unstable: seeds of runs that finished, but far above the others, by point; see `verdicts.unstable`.
      mismatch: by budget: max / min - 1 over the points; infinite where min is 0.
      unmatched: that of the matched budget, without the controls; None if it is no budget of the shape.
      failures: counts and names of failed, diverged and missing runs of both phases; "" if none.
      warnings: threats to the validity of the verdict, one sentence each; first, whether architecture can be
        judged at all.
      seeds_vary: randomness that differs between the runs of a point: "initialisation and data order",
        "initialisation", "data order" or "nothing"; `noise` is the resulting spread.
      regimes: by point, where it stands beside n-gram counts; {} for synthetic tasks.
      over_documents: for each of `comparisons`, the difference over other documents too; None where the
        records do not hold it.
    """

    sentence: str
    estimates: dict[str, Estimate]
    families: list[Family]
    comparisons: list[Comparison]
    joint: list[Joint]
    tuning: dict[str, Tuning]
    drifts: list[Drift]
    noise: dict[str, float | None]
    spread: Noise
    rate_excess: dict[str, float]
    unstable: dict[str, list[int]]
    mismatch: dict[str, float]
    unmatched: float | None
    failures: str
    warnings: list[str]
    seeds_vary: str
    regimes: dict[str, Regime]
    over_documents: list[TwoWay | None]


@dataclasses.dataclass(frozen=True)
class Study:
    """One study at one preset, analysed; built once, by `study_of`.

    Attributes:
      points: by label, in the study's order.
    """

    facts: Facts
    points: dict[str, Point]
    verdict: Verdict

    @functools.cached_property
    def runs(self) -> list[Record]:
        """All runs, by point: first its comparison runs, then its tuning runs."""
        return _runs(self.points.values())

    @property
    def stem(self) -> str:
        """Name of the study's files without suffix: "<study>-<preset>"."""
        return file_stem(self.facts.study, self.facts.preset)


def file_stem(*names: str) -> str:
    """Joins the names with "-", and replaces characters that are unsafe in a file name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(filter(None, names)))


def study_of(records: Sequence[Record]) -> Study:
    """Analyses the records of one study at one preset, in any order.

    The verdict depends on comparison runs only; tuning runs show how good the learning rates are. Points
    that are named after published models, but are far smaller, are called twins.

    Raises:
      UserError: the runs cannot be compared, see `check_comparable`.
      ValueError: the records are of several studies or presets.
    """
    studies = sorted({(run.study, run.preset) for run in records})
    if len(studies) != 1:
        raise ValueError(f"expected the records of one study and preset, not {studies}")
    records = twins.named(records)
    facts, points = facts_of(records), points_of(records)
    incomparable = check_comparable(facts, _runs(points.values()))
    tuning, unstable = tuning_searches(points), verdicts.unstable(points)
    mismatch, seeds_vary = verdicts.mismatch(points), verdicts.seeds_vary(points)
    designs = {label: point for label, point in points.items() if not point.is_control} or points
    unmatched = verdicts.mismatch(designs).get(facts.matched)
    by_seed = {label: point.scores for label, point in points.items() if point.scores}
    spread = noise_of(by_seed, may_pair=not verdicts.mixed_orders(points))
    moves = drifts(points, tuning)
    rate_excess = {
        label: search.excess
        for label, search in tuning.items()
        if facts.tuning == "fitted" and search.excess is not None
    }
    families = verdicts.compare(facts, points, spread, rate_excess)
    order = {pair: place for place, pair in enumerate(facts.pairs)}
    comparisons = sorted(
        (c for family in families for c in family.comparisons), key=lambda c: order[c.point, c.other]
    )
    joint = verdicts.joint(families)
    scores = {label: list(of.values()) for label, of in by_seed.items()}
    regimes = regime.regimes(facts, points)
    over_documents = documents.over_documents(facts, points, comparisons)
    found = Verdict(
        sentence=wording.sentence(facts, points, families, joint, spread, tuning, moves, seeds_vary),
        estimates={label: statistics.mean_and_interval(values) for label, values in scores.items()},
        families=families,
        comparisons=comparisons,
        joint=joint,
        tuning=tuning,
        drifts=moves,
        noise={label: statistics.standard_deviation(values) for label, values in scores.items()},
        spread=spread,
        rate_excess=rate_excess,
        unstable=unstable,
        mismatch=mismatch,
        unmatched=unmatched,
        failures=" ".join(filter(None, (wording.failures(points, p) for p in ("comparison", "tuning")))),
        warnings=[
            *regime.warnings(regimes),
            *regime.saturation(facts, points),
            *incomparable,
            *threats.threats(facts, points, comparisons, spread, unstable, tuning, unmatched),
            *documents.warnings(comparisons, over_documents),
        ],
        seeds_vary=seeds_vary,
        regimes=regimes,
        over_documents=over_documents,
    )
    return Study(facts, points, found)


def _runs(points: Iterable[Point]) -> list[Record]:
    return [run for point in points for run in (*point.comparison, *point.tuning)]
