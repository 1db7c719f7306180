"""What others found of loops and depth on such tasks, judged by the records of the playground."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Literal

from experiments.reporting import judging
from experiments.reporting.judging import Side, Word
from experiments.reporting.pair_words import by_size, roles
from experiments.reporting.tables import Columns, markdown_table, plain, quantity
from mobilellm_jax.analysis.records import span
from mobilellm_jax.analysis.study import Study
from mobilellm_jax.analysis.verdicts import Comparison
from mobilellm_jax.analysis.wording import format_difference, phrase

HEADING = "## What others found of loops and depth, and what we found"
_NOTE = (
    "Judged on the generated tasks of the playground, where the first design of a pair has as many "
    "parameters outside the embedding as the second. One parameterization is enough here, and is named. *No "
    "difference* needs an interval within the smallest difference that matters; *not raised*, one that "
    "excludes a gain of that size. Differences are percentage points of wrong answers, percentage points of "
    "facts not stored, or ln divergence: lower is better. Intervals hold for all pairs of a study at once."
)
Kind = Literal["once", "equal FLOPs", "deeper"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim about one ability.

    Attributes:
      text, where: the claim, and its source.
      ability: as in the presets of the playground.
      kind: the pairs that test it: blocks applied twice against once, for as many steps or FLOPs, or shapes
        of equal size by depth.
      expected: the first compared with the second; of depth, the deeper with the shallower.
    """

    text: str
    where: str
    ability: str
    kind: Kind
    expected: Literal["better", "no difference", "not better"]


_OURO, _CAPACITY, _DEPTH = "arXiv 2510.25741", "arXiv 2404.05405", "arXiv 2407.20311"
FINDINGS = (
    Finding("Loops leave the bits per parameter unchanged.", _OURO, "knowledge", "once", "no difference"),
    Finding("Loops raise manipulation at equal parameters.", _OURO, "manipulation", "once", "better"),
    Finding(
        "At equal FLOPs, loops do not raise manipulation.", "", "manipulation", "equal FLOPs", "not better"
    ),
    Finding("Deeper is better at equal parameters: structure.", _DEPTH, "structure", "deeper", "better"),
    Finding(
        "Deeper is better at equal parameters: manipulation.", _DEPTH, "manipulation", "deeper", "better"
    ),
    Finding("Capacity does not depend on depth.", _CAPACITY, "knowledge", "deeper", "no difference"),
)


def section(studies: Iterable[Study]) -> str:
    """The section in Markdown; "" without records of the playground."""
    found = by_size(studies)
    if not found:
        return ""
    columns: Columns = {"claim": [], **{word: [] for word in ("agree", "disagree", "cannot tell")}}
    parts = []
    for finding in FINDINGS:
        judged: dict[str, list[str]] = {}
        lines = []
        for of_size in found.values():
            study = of_size.get(finding.ability)
            pairs = [] if study is None else _pairs(finding, study)
            if study is None or not pairs:
                continue
            for arm in dict.fromkeys(c.arm for c in pairs):
                of_arm = [c for c in pairs if c.arm == arm]
                word = judge(finding, of_arm, study)
                under = f"{arm or 'one parameterization'} alone"
                judged.setdefault(word, []).append(f"{plain(study.facts.preset)} ({under})")
                lines.append(_line(word, of_arm, study, under))
        columns["claim"].append(finding.text)
        for word in list(columns)[1:]:
            columns[word].append(", ".join(judged.get(word, [])))
        source = f" ({finding.where})" if finding.where else ""
        parts.append(f"**{finding.text}**{source}\n\n" + ("\n".join(lines) or "Not run here."))
    return "\n\n".join([HEADING, _NOTE, markdown_table(columns), *parts])


def judge(finding: Finding, pairs: Iterable[Comparison], study: Study) -> Word:
    """All pairs have to say so, and one refutes it."""
    return judging.judge([_side(finding, c, study) for c in pairs], "all")


def _side(finding: Finding, c: Comparison, study: Study) -> Side:
    """What a pair is to the claim; a design that is shallower is turned round."""
    margin, d = study.facts.margin, c.difference
    is_turned = finding.kind == "deeper" and _depth(study, c.point) < _depth(study, c.other)
    word = {"better": "worse", "worse": "better"}.get(c.word, c.word) if is_turned else c.word
    if finding.expected == "better":
        return "for" if word == "better" else "against" if word == "worse" else "open"
    if finding.expected == "no difference":
        is_small = c.bound is not None and c.bound <= margin
        if word == "no difference" or is_small:
            return "for"
        return "open" if word == "cannot tell" else "against"
    if d is not None and d.low is not None and d.high is not None:
        least = -d.high if is_turned else d.low
        if least > -margin:
            return "for"
    return "against" if word == "better" else "open"


def _pairs(finding: Finding, study: Study) -> list[Comparison]:
    is_one: dict[Kind, Callable[[str], bool]] = {
        "once": lambda words: words.endswith("against once"),
        "equal FLOPs": lambda words: words.endswith("for as many FLOPs"),
        "deeper": lambda words: words.endswith("blocks"),
    }
    return [
        c
        for c in study.verdict.comparisons
        if {c.point, c.other} <= study.points.keys()
        and is_one[finding.kind](roles(study.points[c.point], study.points[c.other], with_arm=False))
    ]


def _depth(study: Study, label: str) -> int:
    return len(study.points[label].layer_plan)


def _line(word: str, pairs: list[Comparison], study: Study, under: str) -> str:
    facts, points = study.facts, study.points
    seeds = max((c.difference.n for c in pairs if c.difference), default=0)
    compared = [points[name] for c in pairs for name in (c.point, c.other)]
    size = span([point.parameters["non_embedding"] for point in compared], quantity)
    tokens = span([run.tokens_seen for point in compared for run in point.finished] or [0], quantity)
    said = "; ".join(_said(c, facts.metric) for c in pairs)
    return (
        f"- **{word}** at [{facts.preset}](reports/{study.stem}.md) ({size} non-embedding parameters, "
        f"{tokens} tokens, {seeds} seeds, {under}): {plain(said)}."
    )


def _said(c: Comparison, metric: str) -> str:
    change = f"{format_difference(c.difference, metric)}, " if c.difference else ""
    return f"{c.point} against {c.other}: {change}{phrase(c, metric)}"
