"""Records in, findings out: what the runs of a study show, and what a sceptic must know first."""

import dataclasses
from collections.abc import Sequence

from mobilellm_jax.results import Record
from mobilellm_jax.statistics import Estimate, PairedDifference


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
class Tuning:
    """The learning-rate search of one point.

    Attributes:
      curve: (learning rate, final metric) in ascending order; None: the run diverged or failed.
      chosen: the rate of the point's comparison runs; before there are any, the best rate tried; NaN where
        none finished.
      at_edge: on one side of the best rate tried, no rate was worse (diverged included).
      sensitivity: mean increase of the metric from the best rate to its neighbours in the grid; infinite where
        a neighbour diverged, None without neighbours.
    """

    curve: list[tuple[float, float | None]]
    chosen: float
    at_edge: bool
    sensitivity: float | None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found in one study at one preset.

    Attributes:
      sentence: the finding in plain words.
      estimates: final metric by point, in study order, of the points with a finished comparison run.
      comparisons: in the order of the study's `pairs`.
      tuning: learning-rate search by point; {} where nothing was tuned.
      noise: standard deviation of the metric over seeds by point; None with one seed.
      mismatch: by budget: max / min - 1 over the points; infinite where min is 0.
      failures: counts and names of failed, diverged and missing runs of both phases; "" if none.
      warnings: what a sceptic must read first.
      seeds_vary: what differs between the seeds of a point: "initialisation and data order", "initialisation",
        "data order" or "nothing".
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

    Raises:
      UserError: the runs cannot be compared, see `check_comparable`.
    """
    raise NotImplementedError
