"""All abilities of the playground at one size, side by side: one figure and one table."""

import math
import textwrap
from collections.abc import Collection, Iterable, Mapping
from urllib.parse import quote

import numpy as np
from matplotlib.figure import Figure

from experiments.reporting import beside_text, drawing, figures
from experiments.reporting.drawing import styled
from experiments.reporting.pages import Links, Section, write_page
from experiments.reporting.pair_words import STUDY, by_size, roles
from experiments.reporting.tables import Columns, quantity
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.records import span
from mobilellm_jax.analysis.study import Study
from mobilellm_jax.analysis.verdicts import Comparison
from mobilellm_jax.analysis.wording import format_bound, join, sole_arm
from mobilellm_jax.storage.files import AnyPath

TITLE = "Which shape learns what: designs of equal size on generated data"
_IN = {"better": "at", "worse": "at", "no difference": "in", "cannot tell": "about"}
_MOST_INCHES = 12.0  # of the panels of a figure, which is 4.9 inches wide
_NOTE = (
    "Each cell compares the first design with the second, at equal size and steps unless the row says "
    "otherwise. Distances are divergences from the grammar, as factors with their intervals; right answers "
    "and stored facts are percentage points. Intervals hold for all pairs of an ability at once."
)


def write(
    studies: Iterable[Study], workdir: str | AnyPath, formats: Collection[str] = figures.FORMATS[:1]
) -> list[str]:
    """Writes figures/ and reports/playground-<size> for every size, and returns the texts to print."""
    said, studies = [], list(studies)
    for size, of_size in by_size(studies).items():
        name = f"{STUDY}-{size}"
        columns, found = table(of_size), sentences(of_size)
        # What depth does is the first question; a playground without it has another first line.
        main = next(
            (line for line in found if line.startswith("more, thinner")), found[0] if found else TITLE
        )
        title = f"{main[0].upper()}{main[1:]}".removesuffix(".")
        images = save(name, of_size, title, workdir, formats)
        regimes = [_caption(ability, study) for ability, study in of_size.items()]
        texts = beside_text.lines(of_size, studies)
        links = Links([(ability, f"{quote(study.stem)}.md", "") for ability, study in of_size.items()])
        sections: list[Section] = [
            ("", [f"{title}.", *_arms(of_size.values())]),
            ("All abilities", [found, *images, _NOTE, columns, regimes]),
            ("Does it predict text?", [beside_text.NOTE, texts] if texts else []),
            ("The report of each ability", [links]),
        ]
        path = write_page(name, TITLE, sections, workdir)
        lines = [f"- {sentence}" for sentence in found]
        said.append("\n".join([TITLE, "", *lines, "", f"Report: {path}.html"]))
    return said


def _arms(studies: Iterable[Study]) -> list[str]:
    """Names the only parameterization of the studies; [] where there are several, or all are one."""
    arms = {sole_arm(study.points) for study in studies}
    return [f"Under {name} alone: another parameterization may say otherwise." for name in arms if name]


def save(
    name: str,
    of_size: Mapping[str, Study],
    title: str,
    workdir: str | AnyPath,
    formats: Collection[str] = figures.FORMATS[:1],
    marked: Collection[str] = (),
) -> list[figures.Image]:
    """Draws all abilities and writes figures/<name>, then <name>-2 and so on where one would be too high."""
    parts: list[dict[str, Study]] = []
    for ability, study in of_size.items():
        if not parts or sum(map(_height, parts[-1].values())) + _height(study) > _MOST_INCHES:
            parts.append({})
        parts[-1][ability] = study
    images = []
    for number, part in enumerate(parts, start=1):
        which, of = (
            ("", "every ability") if len(parts) == 1 else (f" ({number} of {len(parts)})", join(list(part)))
        )
        stem = name if number == 1 else f"{name}-{number}"
        figure = draw(part, f"{title}{which}", marked)
        images.append(figures.save(stem, f"Every design in {of}", figure, workdir, formats))
    return images


@styled
def draw(of_size: Mapping[str, Study], title: str = TITLE, marked: Collection[str] = ()) -> Figure:
    """Draws a panel for each ability: every design with its seeds, floor and ceiling; some stand out."""
    caption = "\n".join(_caption(ability, study) for ability, study in of_size.items())
    heights = [_height(study) for study in of_size.values()]
    subtitle = "Mean and 95 % t interval by ability, every dot a seed"
    figure = drawing.framed(title, subtitle, caption, sum(heights))
    parts = np.ravel(figure.subfigures(len(of_size), 1, height_ratios=heights, squeeze=False))
    for part, (ability, study) in zip(parts, of_size.items(), strict=True):
        axes = part.subplots()
        drawing.draw_values(axes, study)
        axes.set_ylabel(textwrap.fill(axes.get_ylabel(), 32))
        for place, label in enumerate(study.points):
            if label in marked and drawing.places_of(study) is None:  # a point for each place
                axes.axhspan(place - 0.4, place + 0.4, color="#F0E442", alpha=0.3, lw=0, zorder=0)
                axes.get_yticklabels()[place].set_fontweight("bold")
        sides = ("left", "right") if drawing.places_of(study) is None else ("down", "up")
        side = sides[MEASURES[study.facts.metric].is_share]
        part.suptitle(f"{ability}: better is further {side}", fontsize=10)
    return figure


def _height(study: Study) -> float:
    if drawing.places_of(study) is None:
        return 0.3 + drawing.categories_height(list(study.points))
    return 3.4


def _caption(ability: str, study: Study) -> str:
    """Size, horizon and data of one ability; what threatens it is in its own report."""
    points = list(study.points.values())
    designs = [point for point in points if not point.is_control] or points
    sizes = span([point.parameters["non_embedding"] for point in designs], quantity)
    tokens = span([run.tokens_seen for point in designs for run in point.finished], quantity)
    seeds = span([len(point.scores) for point in study.points.values()], quantity)
    return (
        f"{ability}: {sizes} non-embedding parameters and {tokens} tokens (of the controls, one has twice as "
        f"many), {seeds} seeds; {designs[0].config['data']['source']}"
    )


def sentences(of_size: Mapping[str, Study]) -> list[str]:
    """What was found of each comparison of roles: the abilities by verdict, the decided ones first."""
    found = []
    for row, of in _by_roles(of_size).items():
        found.append(f"{row}: {by_word({ability: c.word for ability, c in of.items()})}.")
    return found


def by_word(words: Mapping[str, str]) -> str:
    """Abilities with their words, joined by word: "better at structure; cannot tell about hops"."""
    abilities: dict[str, list[str]] = {}
    for ability, word in words.items():
        abilities.setdefault(word, []).append(ability)
    ordered = sorted(abilities, key=list(_IN).index)
    return "; ".join(f"{word} {_IN[word]} {join(abilities[word])}" for word in ordered)


def table(of_size: Mapping[str, Study]) -> Columns:
    """One row for each comparison of roles, one column for each ability."""
    rows = _by_roles(of_size)
    columns: Columns = {"comparison": list(rows)}
    for ability, study in of_size.items():
        columns[ability] = [
            cell(of[ability], study.facts.metric) if ability in of else "" for of in rows.values()
        ]
    return columns


def _by_roles(of_size: Mapping[str, Study]) -> dict[str, dict[str, Comparison]]:
    """Comparisons by the words of their roles, then by ability."""
    rows: dict[str, dict[str, Comparison]] = {}
    for ability, study in of_size.items():
        for c in study.verdict.comparisons:
            if {c.point, c.other} <= study.points.keys():
                row = roles(study.points[c.point], study.points[c.other])
                if ability in rows.get(row, {}):  # of several such pairs, the first has the plain words
                    row = f"{row}, {c.point} against {c.other}"
                rows.setdefault(row, {})[ability] = c
    return rows


def cell(c: Comparison, metric: str) -> str:
    """The word and, where it is decided, the size with its interval."""
    measure = MEASURES[metric]
    d = c.difference
    if c.word == "no difference":
        return "no difference" if c.bound is None else f"no difference over {format_bound(c.bound, metric)}"
    if d is None or d.low is None or d.high is None:
        return c.word
    if metric == "log_divergence":
        mean, low, high = (math.exp(v) for v in (d.mean, d.low, d.high))
        size = f"{mean:.2f} of the distance [{low:.2f}, {high:.2f}]"
    else:
        # A failure less is a success more, so the ends change places.
        sign = -measure.scale if measure.is_share else 1
        ends = sorted((sign * d.low, sign * d.high))
        digits = 1 if measure.is_share else measure.digits
        size = f"{sign * d.mean:+.{digits}f} [{ends[0]:+.{digits}f}, {ends[1]:+.{digits}f}]"
    return f"{c.word}, {size}"
