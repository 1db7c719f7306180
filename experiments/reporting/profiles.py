"""Own designs beside those on record, in every ability of the playground: one figure, two tables."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from experiments.reporting import abilities
from experiments.reporting.pages import WARNINGS, Section, write_page
from experiments.reporting.tables import Columns, plain_table, quantity
from mobilellm_jax.analysis.comparable import check_comparable
from mobilellm_jax.analysis.facts import Point
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.records import Record, span
from mobilellm_jax.analysis.study import Study, study_of
from mobilellm_jax.analysis.verdicts import Comparison
from mobilellm_jax.analysis.wording import format_estimate
from mobilellm_jax.storage.files import AnyPath

_NOTE = (
    "± a 95 % t interval over seeds. The best is that of the designs of equal size, by its mean: chosen "
    "after the fact, so that luck is part of it. Differences are from the baseline; their intervals hold for "
    "all pairs of an ability at once, those on record included. A distance is a divergence from the grammar, "
    "as a factor; right answers and stored facts are percentage points."
)


@dataclasses.dataclass(frozen=True)
class Ability:
    """One ability with the records of own designs and of others.

    Attributes:
      study: of all these records.
      own: labels of own designs.
      baseline: label of the design that they are compared with.
      warnings: differences in size, in versions or devices.
    """

    study: Study
    own: list[str]
    baseline: str
    warnings: list[str]


def beside(
    own: Sequence[Record], recorded: Sequence[Record], baseline: str, notes: Sequence[str] = ()
) -> Ability:
    """Joins the records of own designs with those on record, of one preset.

    Raises:
      UserError: they cannot be compared, see `comparable.check_comparable`.
    """
    study = study_of([*recorded, *own])
    differ: list[str] = []
    if recorded:
        before = study_of(recorded)
        known = check_comparable(before.facts, before.runs)
        differ = [line for line in check_comparable(study.facts, study.runs) if line not in known]
    # The pair of the own design is one more on purpose.
    differ = [line for line in differ if not line.startswith("The runs differ in pairs:")]
    labels = list(dict.fromkeys(record.point for record in own))
    return Ability(study, labels, baseline, [*notes, *differ])


def write(size: str, of_ability: Mapping[str, Ability], workdir: str | AnyPath) -> str:
    """Writes figures/ and reports/profile-<size>, and returns the text to print."""
    own = list(dict.fromkeys(label for of in of_ability.values() for label in of.own))
    title = f"Profile of {' and '.join(own)}: what it learns beside designs on record"
    studies = {ability: of.study for ability, of in of_ability.items()}
    images = abilities.save(f"profile-{size}", studies, title, workdir, marked=own)
    warnings = [f"{ability}: {line}" for ability, of in of_ability.items() for line in of.warnings]
    found = sentences(of_ability)
    tables = [values(of_ability), differences(of_ability), sizes(of_ability)]
    parts: list[Section] = [
        (WARNINGS, [warnings] if warnings else []),
        ("Abilities", [found, *images, _NOTE, *tables[:2]]),
        ("Sizes", [tables[2]]),
    ]
    path = write_page(f"profile-{size}", title, parts, workdir)
    said = [*(f"Warning: {line}" for line in warnings), title, *(f"- {line}" for line in found)]
    return "\n\n".join(["\n".join(said), *map(plain_table, tables), f"Report: {path}.html"])


def sentences(of_ability: Mapping[str, Ability]) -> list[str]:
    """What was found of each own design beside the baseline, decided abilities first."""
    found = []
    for label in dict.fromkeys(label for of in of_ability.values() for label in of.own):
        words = {
            ability: c.word for ability, of in of_ability.items() if (c := _comparison(of, label)) is not None
        }
        if words:
            found.append(f"{label} against the baseline: {abilities.by_word(words)}.")
    return found


def values(of_ability: Mapping[str, Ability]) -> Columns:
    """A row for each ability and own design: its value, the baseline's, and the best of equal size."""

    def row(of: Ability, label: str) -> list[str]:
        named = [_value(of, name) for name in (label, of.baseline, _best(of))]
        return [MEASURES[of.study.facts.metric].column, *named]

    return _table(of_ability, ("measure", "own", "baseline", "best of equal size"), row)


def differences(of_ability: Mapping[str, Ability]) -> Columns:
    """A row for each ability and own design: the finding beside the baseline."""

    def row(of: Ability, label: str) -> list[str]:
        c = _comparison(of, label)
        known = c and c.difference
        said = abilities.cell(c, of.study.facts.metric) if c and known else "not compared"
        return [f"{label} against {of.baseline}", said]

    return _table(of_ability, ("pair", "finding"), row)


def sizes(of_ability: Mapping[str, Ability]) -> Columns:
    """A row for each ability and own design: parameters and training FLOPs, beside those on record."""

    def row(of: Ability, label: str) -> list[str]:
        points = of.study.points
        equal = [p.parameters["non_embedding"] for p in _equal(of)]
        return [
            quantity(points[label].parameters["non_embedding"]),
            span(equal, quantity) if equal else "none",
            *(_flops(points[name]) if name in points else "none" for name in (label, of.baseline)),
        ]

    heads = ("non-embedding parameters", "on record", "training FLOPs", "of the baseline")
    return _table(of_ability, heads, row)


def _table(
    of_ability: Mapping[str, Ability], heads: Sequence[str], row: Callable[[Ability, str], list[str]]
) -> Columns:
    """A row for each ability, or for each own design in it if there are several."""
    rows = [
        [ability if len(of.own) == 1 else f"{ability}: {label}", *row(of, label)]
        for ability, of in of_ability.items()
        for label in of.own
    ]
    return {name: [cells[i] for cells in rows] for i, name in enumerate(("ability", *heads))}


def _equal(of: Ability) -> list[Point]:
    """The designs on record that are no controls."""
    return [p for label, p in of.study.points.items() if label not in of.own and not p.is_control]


def _best(of: Ability) -> str:
    estimates = of.study.verdict.estimates
    means = {p.label: estimates[p.label].mean for p in _equal(of) if p.label in estimates}
    return min(means, key=lambda label: means[label], default="")


def _value(of: Ability, label: str) -> str:
    estimate = of.study.verdict.estimates.get(label)
    if estimate is None:
        return "none"
    value = format_estimate(estimate, of.study.facts.metric)
    return value if label in of.own else f"{value} ({label})"


def _comparison(of: Ability, label: str) -> Comparison | None:
    found = of.study.verdict.comparisons
    return next((c for c in found if (c.point, c.other) == (label, of.baseline)), None)


def _flops(point: Point) -> str:
    """Training FLOPs of one run; of a run that did not finish, of as far as it came."""
    tokens = max((run.tokens_seen for run in point.comparison), default=math.nan)
    return quantity(tokens * point.budgets["train_flops_per_token"])
