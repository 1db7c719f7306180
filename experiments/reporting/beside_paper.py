"""The paper's points beside ours: one figure and one table for each study that is in the paper.

The paper's metric, average zero-shot accuracy after 0.25 trillion tokens, is meaningless for small models. So
each side has its own metric and its own x axis, with better values further up: only the order of the points
can be compared.
"""

import dataclasses
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from experiments.reporting import captions, claims, drawing, judging, paper_tables, placing, tables
from mobilellm_jax.analysis.answer import answer
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.study import Study, study_of
from mobilellm_jax.analysis.wording import format_estimate

_TITLE = {"fontsize": 9, "color": "0.3", "loc": "left"}


@drawing.styled
def draw(study: Study) -> Figure | None:
    """Draws the paper's accuracies, one panel for each size group, and our values; None if it has none.

    A study that compares each of its points with the one before is drawn as a staircase, with the change at
    every step.
    """
    groups = accuracies(study.facts.study)
    if not groups:
        return None
    title = "\n".join(": ".join(of) for of in judged(study)) or answer(study)
    source = paper_tables.SOURCES[study.facts.study]
    is_across = source.x is None
    arm, study = _first_arm(study, is_across)
    facts = study.facts
    first = (
        f"The paper ({source.what}): average zero-shot accuracy on eight tasks after {source.tokens} "
        f"training tokens, one run of each model at one learning rate."
    )
    labels = [[row.label for row in rows] for rows in groups.values()]
    heights = [drawing.categories_height(of) + 0.2 if is_across else 2.1 for of in labels]
    heights.append(drawing.categories_height(list(study.points)) + 0.5 if is_across else 2.9)
    side = "to the right" if is_across else "up"
    subtitle = f"Above: the paper. Below: ours. Better is further {side} in every panel"
    figure = drawing.framed(title, subtitle, captions.caption(study, first), sum(heights))
    parts = np.ravel(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False))
    ours = drawing.series_of(study) or [""]
    lines = dict.fromkeys([*(row.series for rows in groups.values() for row in rows), *ours])
    looks = {line: drawing.look(index) for index, line in enumerate(lines)}
    is_stairs = len(facts.pairs) > 1 and all(a[0] == b[1] for a, b in pairwise(facts.pairs))
    _draw_paper(list(parts[:-1]), groups, looks, facts.x["label"] if facts.x else "", is_stairs, heights)
    axes = parts[-1].subplots()
    drawing.draw_values(axes, study, looks, is_reversed=True, height=2.1)
    reversed_axis = "" if MEASURES[facts.metric].is_share else "; axis reversed"
    under = f", {arm}" if arm else ""
    said = f"ours, {facts.preset}{under}: {captions.bars(study)}{reversed_axis}"
    axes.set_title(textwrap.fill(said, 56), **_TITLE)
    if is_stairs:
        _climb(axes, study)
    return figure


def judged(study: Study) -> list[tuple[str, str]]:
    """The paper's claims that the study tests, without full stops, each with our judgement."""
    return [
        (claim.text.removesuffix("."), judgement.word)
        for claim in claims.CLAIMS
        if claim.study == study.facts.study and (judgement := judging.judgement(claim, study))
    ]


def _first_arm(study: Study, is_across: bool) -> tuple[str | None, Study]:
    """The study's first arm, and its records alone, analysed without the other arms.

    Without places on an x axis, if the paper's points `is_across` as categories.
    """
    arm = next(iter(study.points.values())).arm
    if arm is None and not (is_across and study.facts.x):
        return None, study
    runs = [run for point in study.points.values() if point.arm == arm for run in point.runs]
    places = [None if is_across else _without(arm or "", run.x) for run in runs]
    return arm, study_of(
        [dataclasses.replace(run, arm=None, x=x) for run, x in zip(runs, places, strict=True)]
    )


def _without(arm: str, x: dict[str, Any] | None) -> dict[str, Any] | None:
    """The place on the x axis, with the arm left out of the line's name."""
    if not x or "series" not in x:
        return x
    line = x["series"].removesuffix(arm).removesuffix(", ")
    return {**x, "series": line} if line else {k: v for k, v in x.items() if k != "series"}


def table(study: Study) -> tables.Columns:
    """Our points, and the paper's rows below them; {} for a study that is not in the paper."""
    rows = sorted(_rows(study), key=lambda row: row["of"] != "ours")  # ours first: the paper has up to 30
    metric, found = study.facts.metric, study.verdict
    if not rows:
        return {}

    def column(name: str) -> list[str]:
        return ["" if row[name] is None else str(row[name]) for row in rows]

    estimates = [found.estimates.get(row["point"]) if row["of"] == "ours" else None for row in rows]
    return {
        "of": [f"{row['of']}, {row['size']}".removesuffix(", ") for row in rows],
        "point": column("point"),
        "parameters": [_size(row["parameters_printed"], row["parameters"]) for row in rows],
        "accuracy, %": column("accuracy"),
        MEASURES[metric].column: [
            format_estimate(estimate, metric) if estimate else "" for estimate in estimates
        ],
        "seeds": column("seeds"),
    }


def csv_text(study: Study) -> str:
    """The same table with every number in full precision; "" for a study that is not in the paper."""
    rows = _rows(study)
    return tables.to_csv(rows) if rows else ""


def accuracies(study: str) -> dict[str, list[paper_tables.Row]]:
    """The paper's rows of a study that have an accuracy, by size group."""
    groups = {
        group: [row for row in rows if row.accuracy is not None]
        for group, rows in paper_tables.rows(study).items()
    }
    return {group: rows for group, rows in groups.items() if rows}


def _rows(study: Study) -> list[dict[str, Any]]:
    """One row for each point of the paper, then of ours; None where a side does not have the number."""
    facts = study.facts
    rows: list[dict[str, Any]] = [
        {
            "of": "paper",
            "size": group,
            "point": row.label,
            "x": row.x,
            "line": row.series,
            "parameters_printed": row.printed or None,
            "parameters": None,
            "accuracy": row.accuracy,
            "metric": None,
            "score_mean": None,
            "score_interval_half_width": None,
            "seeds": None,
        }
        for group, of_group in accuracies(facts.study).items()
        for row in of_group
    ]
    if not rows:
        return []
    for label, point in study.points.items():
        estimate, x = study.verdict.estimates.get(label), point.x or {}
        rows.append(
            {
                "of": "ours",
                "size": facts.preset,
                "point": label,
                "x": x.get("value"),
                "line": x.get("series", ""),
                "parameters": point.parameters["total"],
                "metric": facts.metric,
                "score_mean": estimate and estimate.mean,
                "score_interval_half_width": estimate and estimate.half_width,
                "seeds": estimate.n if estimate else 0,
            }
        )
    return [dict.fromkeys(rows[0]) | row for row in rows]


def _size(printed: str | None, count: int | None) -> str:
    """The digits that the paper prints, in millions unless it says so; or three of our own."""
    if printed is None:
        return "" if count is None else tables.quantity(count)
    return f"{printed[:-1]} {printed[-1]}" if printed[-1] in "MB" else f"{printed} M"


def _draw_paper(
    panels: Sequence[SubFigure],
    groups: dict[str, list[paper_tables.Row]],
    looks: dict[str, dict[str, Any]],
    x_label: str,
    is_stairs: bool,
    heights: Sequence[float],
) -> None:
    """Draws a panel for each size group; all have the same scale, so that steps can be compared."""
    every = [[row.accuracy or 0.0 for row in rows] for rows in groups.values()]
    reach = 1.4 * max(max(values) - min(values) for values in every)
    for panel, (group, rows), values, height in zip(panels, groups.items(), every, heights, strict=False):
        axes = panel.subplots()
        middle = (max(values) + min(values)) / 2
        limits = middle - reach / 2, middle + reach / 2
        axes.set_title(f"the paper, {group}".removesuffix(", "), **_TITLE)
        if any(row.x is not None for row in rows):
            ends = _draw_lines(axes, rows, looks)
            axes.set_ylim(limits)
            axes.margins(x=0.08)
            axes.set_ylabel("accuracy (%)")
            axes.set_xlabel(x_label)
            if len(ends) > 1:
                placing.label_ends(axes, ends, looks, height - 0.8)
        else:
            drawing.category_axis(axes, [row.label for row in rows])
            look: dict[str, Any] = {**looks[rows[0].series], "ls": "none"}
            axes.plot(values, range(len(values)), **look, ms=7)
            axes.set_xlim(limits)
            axes.set_xlabel("average zero-shot accuracy (%)")
            if is_stairs:
                _stairs(axes, list(enumerate(values)))
                for place, (before, after) in enumerate(pairwise(values), start=1):
                    _beside(axes, (before, after), place, f"{after - before:+.1f}", "0.2")


def _draw_lines(
    axes: Axes, rows: Sequence[paper_tables.Row], looks: dict[str, dict[str, Any]]
) -> dict[str, tuple[float, float]]:
    """Draws accuracies over x, and returns the end of each line on the right."""
    ends = {}
    for line in dict.fromkeys(row.series for row in rows):
        of_line = [(row.x, row.accuracy) for row in rows if row.series == line]
        axes.plot(*zip(*of_line, strict=True), **looks[line], ms=6, lw=1.5)
        ends[line] = max((x or 0.0, accuracy or 0.0) for x, accuracy in of_line)
    drawing.log_axis(axes, [row.x for row in rows if row.x is not None])
    return ends


def _stairs(axes: Axes, steps: Sequence[tuple[int, float]]) -> None:
    """Joins values at rows by steps half-way between the rows."""
    for (row, value), (next_row, next_value) in pairwise(steps):
        middle = (row + next_row) / 2
        places = [(value, row), (value, middle), (next_value, middle), (next_value, next_row)]
        axes.plot(*zip(*places, strict=True), color="0.5", lw=1.2, zorder=1)


def _beside(axes: Axes, values: Sequence[float], row: int, text: str, color: str) -> None:
    """Writes a change at the second of `values`, on the side that its step does not come from."""
    left, right = axes.get_xlim()
    is_right = (values[1] >= values[0]) == (right > left)
    at = {"ha": "left" if is_right else "right", "va": "bottom", "fontsize": 8.5, "color": color}
    offset = {"xytext": (5 if is_right else -5, 3), "textcoords": "offset points"}
    axes.annotate(text, (values[1], row), **at, **offset, path_effects=drawing.HALO)


def _climb(axes: Axes, study: Study) -> None:
    """Joins our points to a staircase, and writes the change at every step, with its verdict.

    A step of which a point is missing is left out.
    """
    points, metric, found = list(study.points), study.facts.metric, study.verdict
    left, right = axes.get_xlim()
    axes.set_xlim(left - 0.25 * (right - left), right + 0.25 * (right - left))  # room for the words
    for comparison in found.comparisons:
        if comparison.difference is not None:
            ends = comparison.other, comparison.point
            rows = [points.index(point) for point in ends]
            means = [drawing.shown(metric, found.estimates[point].mean) for point in ends]
            _stairs(axes, list(zip(rows, means, strict=True)))
            change = f"{comparison.difference.mean * MEASURES[metric].scale:+.2g}"
            color = drawing.WORDS[comparison.word][1]
            _beside(axes, means, rows[1], f"{change}, {comparison.word}", color)
