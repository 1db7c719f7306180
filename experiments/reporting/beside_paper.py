"""The paper's points beside ours: one figure and one table for each study that is in the paper.

The paper's metric, average zero-shot accuracy after 0.25 trillion tokens, is meaningless for small models. So
each side has its own metric and its own x axis, with better values further up: only the order of the points
can be compared.
"""

import dataclasses
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from experiments.reporting import claims, drawing, paper_tables, tables
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.study import Study, study_of
from mobilellm_jax.analysis.wording import format_estimate

ROOM = 38  # characters of tick labels that fit side by side below a panel of half the width


@drawing.styled
def draw(study: Study) -> Figure | None:
    """Draws the paper's accuracies, one panel for each size group, and our values; None if it has none.

    A study that compares each of its points with the one before is drawn as a staircase, with the change at
    every step.
    """
    groups = accuracies(study.facts.study)
    if not groups:
        return None
    arm, study = _first_arm(study)
    facts = study.facts
    source = paper_tables.SOURCES[facts.study]
    notes = [claim.note for claim in claims.CLAIMS if claim.study == facts.study and claim.note]
    first = (
        f"The paper ({source.what}): average zero-shot accuracy on eight tasks after {source.tokens} "
        f"training tokens, one run of each model at one learning rate. {' '.join(notes)}"
    )
    sides = [*([row.label for row in rows] for rows in groups.values()), list(study.points)]
    is_slanted = source.x is None and any(drawing.categories(side, ROOM)[1] for side in sides)
    height = 4.2 + (0.04 * max(len(label) for side in sides for label in side) if is_slanted else 0)
    figure = drawing.framed(facts.question, drawing.caption(study, first), height)
    left, right = figure.subfigures(1, 2)
    ours = drawing.series_of(study) or [""]
    lines = dict.fromkeys([*(row.series for rows in groups.values() for row in rows), *ours])
    looks = {line: drawing.look(index) for index, line in enumerate(lines)}
    is_stairs = len(facts.pairs) > 1 and all(a[0] == b[1] for a, b in pairwise(facts.pairs))
    _draw_paper(left, groups, looks, facts.x["label"] if facts.x else "", is_stairs)
    axes = right.subplots()
    drawing.draw_values(axes, study, looks, ROOM, is_reversed=True)
    up = "up is better" if MEASURES[facts.metric].is_share else "axis reversed: up is better"
    under = f", {arm}" if arm else ""
    axes.set_title(f"ours, {facts.preset}{under}; {up}\n{axes.get_title()}", fontsize=10, color="0.25")
    if is_stairs:
        _climb(axes, study)
    return figure


def _first_arm(study: Study) -> tuple[str | None, Study]:
    """The study's first arm, and its records alone, analysed without the other arms."""
    arm = next(iter(study.points.values())).arm
    if arm is None:
        return None, study
    runs = [run for point in study.points.values() if point.arm == arm for run in point.runs]
    return arm, study_of([dataclasses.replace(run, arm=None, x=_without(arm, run.x)) for run in runs])


def _without(arm: str, x: dict[str, Any] | None) -> dict[str, Any] | None:
    """The place on the x axis, with the arm left out of the line's name."""
    if not x or "series" not in x:
        return x
    line = x["series"].removesuffix(arm).removesuffix(", ")
    return {**x, "series": line} if line else {k: v for k, v in x.items() if k != "series"}


def table(study: Study) -> tables.Columns:
    """The paper's rows, and our points below them; {} for a study that is not in the paper."""
    rows = _rows(study)
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
    panel: SubFigure,
    groups: dict[str, list[paper_tables.Row]],
    looks: dict[str, dict[str, Any]],
    x_label: str,
    is_stairs: bool,
) -> None:
    """Draws a panel for each size group; all have the same scale, so that steps can be compared."""
    every = [[row.accuracy or 0.0 for row in rows] for rows in groups.values()]
    span = 1.3 * max(max(values) - min(values) for values in every)
    panels = panel.subplots(len(groups), 1, squeeze=False)[:, 0]
    for axes, (group, rows), values in zip(panels, groups.items(), every, strict=True):
        numeric = [row.x for row in rows if row.x is not None]
        for line in dict.fromkeys(row.series for row in rows):
            of_line = [row for row in rows if row.series == line]
            places = [row.x for row in of_line] if numeric else list(range(len(of_line)))
            look = looks[line] if numeric else looks[line] | {"ls": "none"}
            axes.plot(places, [row.accuracy for row in of_line], **look, ms=7, lw=1.5)
        if is_stairs:
            axes.step(range(len(values)), values, where="mid", color="0.5", lw=1.2)
            for place, (before, after) in enumerate(pairwise(values), start=1):
                above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 9}
                axes.annotate(f"{after - before:+.1f}", (place, after), **above)
        if numeric:
            drawing.log_axis(axes, numeric, ROOM)
        else:
            drawing.category_axis(axes, [row.label for row in rows], ROOM)
        middle = (max(values) + min(values)) / 2
        axes.set_ylim(middle - span / 2, middle + span / 2)
        axes.margins(x=0.08)
        axes.set_title(f"the paper, {group}".removesuffix(", "), fontsize=10, color="0.25")
        if axes is not panels[-1] and not numeric:
            axes.tick_params(axis="x", labelbottom=False)
    panels[-1].set_xlabel(x_label)
    panel.supylabel("average zero-shot accuracy (%)", fontsize=11)


def _climb(axes: Axes, study: Study) -> None:
    """Joins our points to a staircase, and writes the change at every step below it, with its verdict.

    A step of which a point is missing is left out.
    """
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.25 * (high - low), high)
    points, metric, found = list(study.points), study.facts.metric, study.verdict
    for comparison in found.comparisons:
        if comparison.difference is not None:
            ends = comparison.other, comparison.point
            places = [points.index(point) for point in ends]
            means = [drawing.shown(metric, found.estimates[point].mean) for point in ends]
            axes.step(places, means, where="mid", color="0.5", lw=1.2)
            change = f"{comparison.difference.mean * MEASURES[metric].scale:+.2g}"
            said = {"ha": "center", "va": "bottom", "fontsize": 9, "color": drawing.WORDS[comparison.word][1]}
            text = f"{change}\n{comparison.word}".replace("cannot tell", "cannot\ntell")
            axes.text(places[1], 0.02, text, transform=axes.get_xaxis_transform(), **said)
