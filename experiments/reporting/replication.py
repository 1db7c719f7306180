"""Two sets of records of the same studies, pair by pair: does a second experiment say the same?"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from scipy import stats

from experiments.reporting.tables import Columns, plain_table
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.study import Study
from mobilellm_jax.analysis.verdicts import Comparison
from mobilellm_jax.analysis.wording import format_difference, format_p
from mobilellm_jax.errors import UserError

DECIDED = ("better", "worse")
SAME, OPPOSITE, ONE, NEITHER = "same", "opposite", "one decides", "neither decides"
_NOTE = (
    "same: both decide alike. opposite: one says better, the other worse. one decides: the other cannot tell "
    "or shows a small difference only. p: how often two experiments on the same designs differ by more."
)


def page(here: Iterable[Study], there: Iterable[Study], names: tuple[str, str]) -> str:
    """Tables of all pairs that both have, by study, and a sentence that counts them.

    Args:
      names: of the two sets, for the headings.

    Raises:
      UserError: no study is in both, one of them was made with the same seeds in both, or its metric differs.
    """
    others = {study.stem: study for study in there}
    shared = [(study, others[study.stem]) for study in here if study.stem in others]
    if not shared:
        raise UserError(f"{names[0]} and {names[1]} have no study in common; nothing to compare")
    parts, words = [], Counter[str]()
    for study, other in shared:
        _check_independent(study, other, names)
        rows = pairs(study, other)
        words.update(word for *_, word in rows)
        parts += [f"{study.stem}: {MEASURES[study.facts.metric].column_of_differences}"]
        parts += [plain_table(_columns(rows, study.facts.metric, names)), ""]
    counts = ", ".join(f"{words[word]} {word}" for word in (SAME, OPPOSITE, ONE, NEITHER))
    return "\n".join([*parts, _NOTE, "", f"{words.total()} pairs in common: {counts}."])


def pairs(study: Study, other: Study) -> list[tuple[Comparison, Comparison, float | None, str]]:
    """Each pair of both studies: the two findings, the p-value of their difference, and how they agree."""
    again = {(c.point, c.other): c for c in other.verdict.comparisons}
    found = [(c, again[c.point, c.other]) for c in study.verdict.comparisons if (c.point, c.other) in again]
    return [(first, second, p_value(first, second), agreement(first, second)) for first, second in found]


def agreement(first: Comparison, second: Comparison) -> str:
    decided = [c.word for c in (first, second) if c.word in DECIDED]
    if len(decided) < 2:
        return ONE if decided else NEITHER
    return SAME if decided[0] == decided[1] else OPPOSITE


def p_value(first: Comparison, second: Comparison) -> float | None:
    """Two-sided p-value that both estimate one difference, by Welch's t-test; None without two errors."""
    a, b = first.difference, second.difference
    if not (a and b and a.se and b.se and a.df and b.df):
        return None
    variance = a.se**2 + b.se**2
    df = variance**2 / (a.se**4 / a.df + b.se**4 / b.df)
    return float(2 * stats.t.sf(abs(a.mean - b.mean) / math.sqrt(variance), df))


def _check_independent(study: Study, other: Study, names: tuple[str, str]) -> None:
    if study.facts.metric != other.facts.metric:
        raise UserError(
            f"{study.stem}: {names[0]} compares {study.facts.metric}, {names[1]} {other.facts.metric}; "
            "make both again with one version of the study"
        )
    seeds = [
        {tuple(run.config["train"][f"{kind}_seed"] for kind in ("init", "data")) for run in of.runs}
        for of in (study, other)
    ]
    if common := sorted(seeds[0] & seeds[1]):
        raise UserError(
            f"{study.stem}: {names[0]} and {names[1]} have runs with the same seeds "
            f"(init and data {common[0]}), so one does not confirm the other; start the second at others "
            "with --config.train.init_seed=1000 --config.train.data_seed=1000"
        )


def _columns(
    rows: Sequence[tuple[Comparison, Comparison, float | None, str]], metric: str, names: tuple[str, str]
) -> Columns:
    def said(c: Comparison) -> str:
        return f"{format_difference(c.difference, metric)} {c.word}" if c.difference else c.word

    return {
        "pair": [f"{first.point} against {first.other}" for first, *_ in rows],
        names[0]: [said(first) for first, *_ in rows],
        names[1]: [said(second) for _, second, *_ in rows],
        "p": [format_p(p) for *_, p, _ in rows],
        "agreement": [word for *_, word in rows],
    }
