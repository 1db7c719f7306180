"""The page "What is a second use of a layer worth?", from the records of all studies with repeats."""

import dataclasses
from collections.abc import Iterable

from experiments.reporting.pages import Section, write_page
from experiments.reporting.tables import Columns, plain_table, quantity
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.records import span
from mobilellm_jax.analysis.second_use import Gap, gaps
from mobilellm_jax.analysis.study import Study
from mobilellm_jax.storage.files import AnyPath

NAME, TITLE = "second_use", "What is a second use of a layer worth?"
NOTE = (
    "A design that applies its blocks several times lies between the same blocks applied once and as "
    "many blocks as it applies layers, which cost the same FLOPs for each token. What it closes of the "
    "gap between them is (once - loop) / (once - deep) of the final metric: at 0 % a further use is "
    "worth nothing, at 100 % as much as new blocks. Brackets: 95 % by Fieller's theorem, of each loop alone, "
    "over seeds, with the moderated variance of each design; the error of the fitted learning rates is "
    "counted. A gap is sure where its one-sided test says so at 5 %. Models trained longer, for as many "
    "FLOPs as the loop takes, are in the reports of the playground."
)
SHORT = (
    "What further uses close of the gap to as many blocks, from the least to the most of the loops of a "
    "study that have a sure gap; how many have one; and of how many of these the interval, of each loop "
    "alone, lies above 0 %, and below 100 %. Above a trigram: designs with a loss above that of counted "
    "triples of tokens. Where these are all, architecture cannot be judged."
)
WORTH = (
    "Blocks: applied once, how many have the score of the loop, by interpolation over log(blocks); phi: "
    "they are blocks of the loop x uses^phi. Without an interval."
)
LITERATURE = (
    "phi = 0.46 in the loss on text, fitted to models of 1, 2, 4 and 8 recurrences; at 4, a looped model of "
    "410M is as good as one of 580M, and costs the training of one of 1B (arXiv 2604.21106, abstract).",
    "Relaxed recursive transformers: models that are converted from trained ones to loops, such as Gemma 2B "
    "to 1B, can recover most of their performance, and low-rank updates for each use improve them further "
    "(arXiv 2410.20672, abstract). Ours are trained from random weights.",
    "Huginn: 3.5B parameters, trained with random numbers of loops on 800B tokens, improves on reasoning "
    "with more loops at test time, up to the computation of 50B parameters (arXiv 2502.05171, abstract). "
    "The same is asked of ours by sweep --num_repeats; reports then have a table by number of loops.",
)


@dataclasses.dataclass(frozen=True)
class _Answers:
    """One study: its gaps, of the arm that is named first."""

    study: Study
    gaps: list[Gap]


def write(studies: Iterable[Study], workdir: str | AnyPath) -> str:
    """Writes reports/second_use, and returns the text to print; "" without a design that can be judged."""
    found = [_Answers(study, of) for study in studies if (of := _judged(study))]
    if not found:
        return ""
    found.sort(key=lambda of: MEASURES[of.study.facts.metric].column)  # equal measures stand together
    short = _short(found)
    sections: list[Section] = [
        ("In short", [SHORT, short]),
        ("How it is measured", [NOTE]),
        *((_heading(of.study), [_caption(of.study), _table(of), *_worth(of)]) for of in found),
        ("What others found", [list(LITERATURE)]),
        ("The reports", [[f"{_heading(of.study)}: {of.study.stem}.md" for of in found]]),
    ]
    path = write_page(NAME, TITLE, sections, workdir)
    return "\n".join([TITLE, "", plain_table(short), "", f"Report: {path}.html"])


def _judged(study: Study) -> list[Gap]:
    """The designs that have as many blocks beside them."""
    return [gap for gap in gaps(study) if gap.deep is not None]


def _heading(study: Study) -> str:
    return f"{study.facts.study}: {study.facts.preset}"


def _caption(study: Study) -> str:
    points = [point for point in study.points.values() if point.scores]
    tokens = span([run.tokens_seen for point in points for run in point.finished], quantity)
    size = span([point.parameters["non_embedding"] for point in points], quantity)
    seeds = span([len(point.scores) for point in points], str)
    return (
        f"{study.facts.question} {MEASURES[study.facts.metric].axis}; {size} non-embedding parameters, "
        f"{tokens} tokens, {seeds} seeds."
    )


def _table(of: _Answers) -> Columns:
    measure = MEASURES[of.study.facts.metric]

    def shown(value: float) -> str:
        return f"{measure.shown(value):.{2 if measure.is_share else measure.digits}f}"

    return {
        "loop": [_named(gap) for gap in of.gaps],
        "once": [f"{shown(gap.means[0])} ({gap.once})" for gap in of.gaps],
        measure.column: [shown(gap.means[1]) for gap in of.gaps],
        "as many blocks": [f"{shown(gap.means[2])} ({gap.deep})" for gap in of.gaps],
        "closed": [closed(gap) for gap in of.gaps],
    }


def _worth(of: _Answers) -> list[str | Columns]:
    known = [gap for gap in of.gaps if gap.blocks is not None]
    if not known:
        return []
    return [
        WORTH,
        {
            "loop": [_named(gap) for gap in known],
            "blocks": [f"{gap.blocks:.1f}{' or beyond' if gap.is_beyond else ''}" for gap in known],
            "phi": ["" if gap.exponent is None else f"{gap.exponent:.2f}" for gap in known],
        },
    ]


def _named(gap: Gap) -> str:
    is_said = not gap.arm or gap.arm == "completep" or gap.arm in gap.loop
    return gap.loop if is_said else f"{gap.loop} ({gap.arm})"


def closed(gap: Gap) -> str:
    """The part in percent with its interval, or why there is none."""
    if gap.closed is None:
        return "no gap is sure"
    ends = "" if gap.interval is None else f" [{100 * gap.interval[0]:.0f}, {100 * gap.interval[1]:.0f}]"
    return f"{100 * gap.closed:.0f} %{ends or ', not bounded'}"


def _short(found: list[_Answers]) -> Columns:
    """One row for each study."""
    rows = [_summary(of.gaps) for of in found]
    return {
        "measured": [MEASURES[of.study.facts.metric].column for of in found],
        "study": [_heading(of.study) for of in found],
        "closed": [closed for closed, *_ in rows],
        "sure gaps": [count for _, count, *_ in rows],
        "surely > 0 %": [some for *_, some, _ in rows],
        "surely < 100 %": [less for *_, less in rows],
        "above a trigram": [_above(of.study) for of in found],
    }


def _above(study: Study) -> str:
    """How many designs are above the loss of a trigram; "" where it was not counted."""
    known = [regime for regime in study.verdict.regimes.values() if regime.floor]
    return f"{sum(regime.above_trigram for regime in known)} of {len(known)}" if known else ""


def _summary(of: list[Gap]) -> tuple[str, str, str, str]:
    """From the least to the most that is closed, by how many loops; of how many some, and not all."""
    known = [gap for gap in of if gap.closed is not None]
    count = f"{len(known)} of {len(of)}"
    if not known:
        return "", count, "", ""
    parts = [f"{100 * part:.0f}" for part in sorted(gap.closed or 0.0 for gap in known)]
    some = sum(gap.interval is not None and gap.interval[0] > 0 for gap in known)
    less = sum(gap.interval is not None and gap.interval[1] < 1 for gap in known)
    return " to ".join(dict.fromkeys((parts[0], parts[-1]))) + " %", count, str(some), str(less)
