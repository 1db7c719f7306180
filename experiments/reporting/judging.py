"""The judgement of a claim of the paper by the records of one study: agree, disagree or cannot tell."""

import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from experiments.reporting.tables import aspect_ratio, is_outside
from mobilellm_jax.analysis.comparable import data_hashes
from mobilellm_jax.analysis.facts import Point, have_base_shape
from mobilellm_jax.analysis.study import Study
from mobilellm_jax.analysis.verdicts import Comparison
from mobilellm_jax.config import BEFORE, IDLE, SEEDS, flatten

Pairs = Sequence[tuple[str, str]]  # labels of (point, other)
Side = Literal["for", "against", "open"]
Word = Literal["agree", "disagree", "cannot tell"]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper about shapes, and the comparisons that test it.

    Attributes:
      text, where: the claim, and its place in the paper.
      study: the study that tests it.
      pairs: the comparisons, by the labels of designs; the claim is that the first is `expected` compared
        with the second. A star matches any text. Empty: all pairs of the study.
      paper: the same pairs by the labels of the paper's table, if different. A size group has the pairs of
        which it has both rows.
      expected: "better", "worse", or not so by as much as the study's margin: "not worse", "not better".
      needs: pairs that the claim needs: "all" of them, or "any": an optimum somewhere along a line, which its
        far end does not contradict.
      in_range: only pairs of designs with aspect ratios that the paper covers count.
      note: what weakens the paper's evidence.
    """

    text: str
    where: str
    study: str
    pairs: Pairs = ()
    paper: Pairs = ()
    expected: Literal["better", "worse", "not worse", "not better"] = "better"
    needs: Literal["all", "any"] = "all"
    in_range: bool = False
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What one study says of a claim.

    Attributes:
      word: "agree" or "disagree" only where there are several arms, and all say so, or all parameterizations
        are the same: what one alone shows may be about that, not about shapes.
      by_arm: the word of each arm, by parameterization.
      counted: the comparisons that were judged.
      outside: comparisons of shapes that the paper does not cover.
    """

    word: Word
    by_arm: dict[str, Word]
    counted: list[Comparison]
    outside: list[Comparison]


def judgement(claim: Claim, study: Study) -> Judgement | None:
    """Judges a claim by the study that tests it; None without a record of any of its points."""
    by_arm: dict[str, Word] = {}
    counted: list[Comparison] = []
    outside: list[Comparison] = []
    for arm in arms(study):
        asked = _asked(claim, study, arm)
        kept = [c for c in asked if not (claim.in_range and _is_outside(c, study))]
        missing: list[Side] = ["open" for pair in claim.pairs if not any(_is(c, pair, study) for c in asked)]
        by_arm[arm] = judge([*(side(c, claim.expected) for c in kept), *missing], claim.needs)
        counted += kept
        outside += [c for c in asked if c not in kept]
    if not counted and not outside:
        return None
    agreed = (len(by_arm) > 1 or have_base_shape(study.points)) and len(set(by_arm.values())) == 1
    word = next(iter(by_arm.values())) if agreed else "cannot tell"
    return Judgement(word, by_arm, counted, outside)


def judge(sides: Sequence[Side], needs: str) -> Word:
    """Judges by comparisons that are each for the claim, against it, or open.

    A claim about all of them is refuted by one, and a claim that there is one is shown by one; the rest of
    each is known only if none is open.
    """
    if not sides:
        return "cannot tell"
    whole: dict[Side, bool] = {s: all(found == s for found in sides) for s in ("for", "against")}
    if needs == "all":
        return "disagree" if "against" in sides else "agree" if whole["for"] else "cannot tell"
    return "agree" if "for" in sides else "disagree" if whole["against"] else "cannot tell"


def side(c: Comparison, expected: str) -> Side:
    """What a comparison is to the claim that its point is `expected` compared with the other.

    "better", "worse" and "not better" go by the word of the verdict, "not worse" is non-inferiority by the
    study's margin.
    """
    if expected == "not better":
        return "against" if c.word == "better" else "open" if c.word == "cannot tell" else "for"
    if expected == "not worse":
        return "open" if c.not_worse is None else "for" if c.not_worse else "against"
    opposite = {"better": "worse", "worse": "better"}[expected]
    return "for" if c.word == expected else "against" if c.word == opposite else "open"


def arms(study: Study) -> list[str]:
    """The parameterizations that the study was run under, in its order."""
    return list(dict.fromkeys(_arm(point) for point in study.points.values()))


def identity(point: Point) -> Hashable:
    """Equal for points that train one design on the same data with the same seeds, in whatever study.

    The learning rate does not count: each study fits it to its own search, and so two of them take rates that
    differ in the last digits. Their runs are no two samples of anything.
    """
    run = point.finished[0]
    named = {"model.sharing", "model.num_repeats", "data.source"}  # the plan and the hashes say what they do
    free = IDLE | SEEDS | named | {"optimizer.learning_rate"}
    of_run = BEFORE | flatten(run.config)  # older configs lack fields
    settings = tuple(sorted((k, str(v)) for k, v in of_run.items() if k not in free))
    hashes = tuple(sorted(data_hashes(run.data).items()))
    return settings, hashes, tuple(point.layer_plan), tuple(run.seed for run in point.finished)


def same_runs(known: dict[Hashable, tuple[Study, str]], study: Study, labels: Iterable[str]) -> list[str]:
    """Names the points that another study has by `identity` as well, and adds the others to `known`."""
    said = []
    for label in dict.fromkeys(labels):
        point = study.points[label]
        if not point.finished:
            continue
        there, name = known.setdefault(identity(point), (study, label))
        if there.stem != study.stem:
            said.append(f"{label!r} is {name!r} of {there.facts.study}:{there.facts.preset}")
    return said


def _arm(point: Point) -> str:
    """The arm, or in a study without arms the parameterization of the config."""
    settings = point.config["model"]
    return point.runs[0].arm or settings.get("parameterization") or "standard"


def _asked(claim: Claim, study: Study, arm: str) -> list[Comparison]:
    """The comparisons of one arm that test the claim, of points that have records."""
    there = [
        c
        for c in study.verdict.comparisons
        if {c.point, c.other} <= study.points.keys() and _arm(study.points[c.point]) == arm
    ]
    return [c for c in there if not claim.pairs or any(_is(c, pair, study) for pair in claim.pairs)]


def _is(c: Comparison, pair: tuple[str, str], study: Study) -> bool:
    designs = (study.points[name].runs[0].design or name for name in (c.point, c.other))
    return all(fnmatchcase(design, pattern) for design, pattern in zip(designs, pair, strict=True))


def _is_outside(c: Comparison, study: Study) -> bool:
    return any(is_outside(aspect_ratio(study.points[name])) for name in (c.point, c.other))
