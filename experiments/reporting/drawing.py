"""Elements of all figures: colours, axes, points with their seeds, captions, and files."""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from matplotlib.transforms import ScaledTranslation
from PIL import Image

from experiments.reporting import tables
from mobilellm_jax.analysis.comparable import data_card, text_name
from mobilellm_jax.analysis.facts import Point
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.records import Record, span
from mobilellm_jax.analysis.statistics import Estimate
from mobilellm_jax.analysis.study import Study

# Okabe and Ito's palette for all kinds of colour vision, without yellow, which is too pale for lines. The
# three lists have different lengths, so that the styles of many points differ, even in greyscale.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
WORDS = {  # colour, colour of text, marker and its inside
    "better": ("#0072B2", "#0072B2", "o", "#0072B2"),
    "worse": ("#D55E00", "#B34A00", "D", "#D55E00"),
    "no difference": ("#000000", "#000000", "s", "#000000"),
    "cannot tell": ("0.5", "0.35", "o", "white"),
}
WIDTH = 9.2  # inches; shown 800 pixels wide, 10 points are 12 pixels
STYLE = {
    "font.size": 11,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "text.parse_math": False,
    "svg.hashsalt": "mobilellm_jax",  # else names of clip paths are random
    "pdf.fonttype": 42,  # TrueType: some publishers refuse matplotlib's Type 3
}
styled = matplotlib.style.context(["default", STYLE])


@styled
def render(figure: Figure) -> bytes:
    """Encodes a figure as PNG; equal figures give equal bytes."""
    drawn, small = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    # 255 colours look the same at a third of the size; this also drops matplotlib's version metadata.
    Image.open(drawn).convert("RGB").quantize(255).save(small, "png", optimize=True)
    return small.getvalue()


@styled
def vector(figure: Figure, kind: str) -> bytes:
    """Encodes a figure as "svg" or "pdf"; equal figures give equal bytes."""
    _settle(figure)
    drawn = BytesIO()
    # Without the date, and without the version of matplotlib.
    gone = {"svg": ("Date", "Creator"), "pdf": ("CreationDate", "Creator", "Producer")}[kind]
    figure.savefig(drawn, format=kind, metadata=dict.fromkeys(gone))
    return _with_plain_ids(drawn.getvalue()) if kind == "svg" else drawn.getvalue()


def _settle(figure: Figure) -> None:
    """Lays a figure out for good, at places of 5 digits: the solver's last ones vary."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.get_axes():
        axes.set_position([round(float(place), 5) for place in axes.get_position().bounds])


def _with_plain_ids(svg: bytes) -> bytes:
    """Numbers the clip paths of an SVG, whose names are hashes of more digits than it shows."""
    names = dict.fromkeys(re.findall(rb'<clipPath id="(\w+)"', svg))
    for number, name in enumerate(names):
        svg = svg.replace(name, b"clip%d" % number)
    return svg


@styled
def framed(title: str, caption: str, height: float) -> Figure:
    """Creates a figure with `height` inches between title and caption."""
    title = textwrap.fill(title, 80)
    above, below = 0.12 + 0.25 * (title.count("\n") + 1), 0.15 + 0.175 * (caption.count("\n") + 1)
    total = above + height + below
    figure = Figure(figsize=(WIDTH, total))
    FigureCanvasAgg(figure)
    room = (0, below / total, 1, height / total)
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=room, w_pad=0.08, h_pad=0.06))
    figure.text(0.01, 0.07 / total, caption, fontsize=9, color="0.25", linespacing=1.3)
    figure.text(0.5, 1 - 0.1 / total, title, fontsize=13, ha="center", va="top")
    return figure


@styled
def beside_legend(labels: Iterable[str]) -> tuple[Figure, Axes]:
    """Creates a figure that is high enough for a legend with these labels to the right of the axes."""
    figure = Figure(figsize=(WIDTH, max(4.2, 0.4 + legend_height(labels))))
    FigureCanvasAgg(figure)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    return figure, figure.subplots()


def legend_height(labels: Iterable[str]) -> float:
    """Height in inches of a legend in small print."""
    return 0.165 * sum(1.25 + label.count("\n") for label in labels)


def legend(point: str, note: str = "") -> str:
    """Label of a point in a legend beside the axes, wrapped."""
    return textwrap.fill(point + (f" ({note})" if note else ""), 30)


def look(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the point or line at `index`."""
    lists = {"color": COLORS, "marker": MARKERS, "ls": DASHES}
    return {name: values[index % len(values)] for name, values in lists.items()}


def shown(metric: str, value: float) -> float:
    """Converts a value of `metric` to the unit of its axis."""
    return MEASURES[metric].shown(value)


def absent(runs: Sequence[Record]) -> str:
    """Counts the runs that did not finish, as "1 of 3 diverged"; "" if all finished."""
    if not runs:
        return "no run"
    counts = {word: sum(run.status == word for run in runs) for word in ("diverged", "failed")}
    return ", ".join(f"{count} of {len(runs)} {word}" for word, count in counts.items() if count)


def apart(values: Iterable[float], factor: float) -> list[float]:
    """Sorts the values, and drops those that are less than `factor` times the last one kept."""
    kept: list[float] = []
    for value in sorted(set(values)):
        kept += [value] if not kept or value >= factor * kept[-1] else []
    return kept


def log_axis(axes: Axes, values: Sequence[float], room: int = 90) -> None:
    """Makes the x axis logarithmic, with a label at each value that fits; the axis has `room` characters."""
    axes.set_xscale("log", base=2)
    places = apart(values, max(1.01, (max(values) / min(values)) ** (2.7 / room)))
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.xaxis.set_minor_locator(NullLocator())


def categories(labels: Sequence[str], room: int) -> tuple[list[str], bool]:
    """Wraps tick labels for an axis of `room` characters; the flag is True if they must be slanted to fit."""
    each = room // len(labels)
    is_slanted = max(len(word) for label in labels for word in label.split()) > each
    return [label if is_slanted else textwrap.fill(label, each) for label in labels], is_slanted


def category_axis(axes: Axes, labels: Sequence[str], room: int) -> None:
    """Labels the ticks 0, 1, 2, ... of an x axis of `room` characters."""
    labels, is_slanted = categories(labels, room)
    slant = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if is_slanted else {}
    axes.set_xticks(range(len(labels)), labels, fontsize=10, **slant)


def series_of(study: Study) -> list[str]:
    """Names of the lines over x, in the order of their points; [] if there is only one."""
    places = [point.x for point in study.points.values()]
    return list(dict.fromkeys(place["series"] for place in places if place and "series" in place))


def places_of(study: Study) -> dict[str, float] | None:
    """Place on a numeric x axis by point; None if the points are categories.

    Points of one line at the same place become categories, since they would hide each other.
    """
    numeric = {label: point.x for label, point in study.points.items() if point.x is not None}
    distinct = {(x.get("series"), x["value"]) for x in numeric.values()}
    return {label: x["value"] for label, x in numeric.items()} if len(distinct) == len(study.points) else None


def draw_point(
    axes: Axes,
    place: float,
    point: Point,
    estimate: Estimate,
    looks: Mapping[str, Any],
    shift: float = 0.0,
) -> None:
    """Draws the mean with its interval, and the seeds beside it, clear of the error bar.

    `shift` to the right, in points (1/72 inch), separates points at the same place.
    """
    metric = point.comparison[0].metric
    half = None if estimate.half_width is None else estimate.half_width * MEASURES[metric].scale
    mean, at = shown(metric, estimate.mean), {"transform": moved(axes, shift)} if shift else {}
    axes.errorbar(place, mean, half, **looks, ms=7, capsize=4, **at)
    seeds = [shown(metric, score) for score in point.scores.values()]
    ends = mean - (half or 0), mean + (half or 0), *seeds
    axes.update_datalim(
        [(place, end) for end in ends]
    )  # a shifted artist does not extend the limits by itself
    dots = {"color": looks["color"], "ms": 5, "alpha": 0.6, "transform": moved(axes, shift + 7)}
    axes.plot([place] * len(seeds), seeds, ".", **dots)


def moved(axes: Axes, by: float) -> Any:
    """Data transform, shifted to the right by points (1/72 inch)."""
    return axes.transData + ScaledTranslation(by / 72, 0, axes.figure.dpi_scale_trans)


def draw_values(
    axes: Axes,
    study: Study,
    looks: Mapping[str, Mapping[str, Any]] | None = None,
    room: int = 90,
    is_reversed: bool = False,
) -> None:
    """Draws the final values of every point: as lines over x, as points over x or as categories.

    Args:
      looks: style of each line by series ("" if there is only one), for points that are joined to lines.
        None: one style for each line in a study of several lines, else one for each point.
      room: characters that fit side by side below the axis.
      is_reversed: invert the y axis where lower values are better, so that they are above.
    """
    measure, places, lines = MEASURES[study.facts.metric], places_of(study), series_of(study)
    of_lines = looks or {line: look(index) for index, line in enumerate(lines)}
    if places is None:
        _draw_points(axes, study, {label: i for i, label in enumerate(study.points)}, looks and looks[""])
        category_axis(axes, list(study.points), room)
    else:
        if of_lines:
            _draw_lines(axes, study, places, lines or [""], of_lines)
        else:
            _draw_points(axes, study, places)
        _label_x_axis(axes, study, places, room)
    axes.margins(x=0.08, y=0.08)
    if is_reversed and not measure.is_share:
        axes.invert_yaxis()
    if any(absent(point.comparison) for point in study.points.values()):  # room for their marks
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.22 * (high - low))
    _draw_ends(axes, study)
    if measure.is_share:  # the room above 100 % is for the marks
        axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 100])
    axes.set_ylabel(measure.axis)
    axes.set_title(_bars(axes, study), fontsize=10, color="0.25")
    if places and lines:
        handles = [Line2D([], [], **of_lines[line], label=line) for line in lines]
        axes.legend(handles=handles, fontsize=9, handlelength=4)


def _draw_ends(axes: Axes, study: Study) -> None:
    """Draws the best value of a task's measure, and that of nothing learned, where the axis reaches them."""
    metric, limits = study.facts.metric, axes.get_ylim()
    known = [run.measures for run in study.runs if run.measures is not None]
    for name in ("floor", "ceiling"):
        ends = {shown(metric, of[name][metric]) for of in known if metric in of[name]}
        for end in ends if len(ends) == 1 else ():
            if min(limits) <= end <= max(limits):
                axes.axhline(end, color="0.45", ls=(0, (2, 2)), lw=1.2)
                beside = {"transform": axes.get_yaxis_transform(), "fontsize": 9, "color": "0.35"}
                axes.text(1.0, end, f" {name}", va="center", ha="left", **beside)
    axes.set_ylim(limits)


def _draw_points(
    axes: Axes, study: Study, places: Mapping[str, float], same: Mapping[str, Any] | None = None
) -> None:
    """Draws every point at its place, each in its own style or all in the same one."""
    for index, (label, point) in enumerate(study.points.items()):
        mine = same or look(index)
        if estimate := study.verdict.estimates.get(label):
            draw_point(axes, places[label], point, estimate, mine)
        _mark_absent(axes, places[label], point, mine["color"])


def _draw_lines(
    axes: Axes,
    study: Study,
    places: Mapping[str, float],
    lines: Sequence[str],
    looks: Mapping[str, Mapping[str, Any]],
) -> None:
    """Draws the points of each line joined; lines that share a place are side by side there."""
    last: dict[str, tuple[float, float]] = {}
    for label, point in study.points.items():
        line, place = (point.x or {}).get("series", ""), places[label]
        shift = 12.0 * (lines.index(line) - (len(lines) - 1) / 2)
        mine = looks[line]
        if estimate := study.verdict.estimates.get(label):
            draw_point(axes, place, point, estimate, mine, shift)
            end = place, shown(study.facts.metric, estimate.mean)
            if line in last:
                xs, ys = zip(last[line], end, strict=True)
                axes.plot(xs, ys, color=mine["color"], ls=mine["ls"], lw=1.5, transform=moved(axes, shift))
            last[line] = end
        _mark_absent(axes, place, point, mine["color"])


def _mark_absent(axes: Axes, place: float, point: Point, color: str) -> None:
    """Marks a point of which runs are missing with a cross at the top and their count."""
    if gone := absent(point.comparison):
        at_top = axes.get_xaxis_transform()
        axes.plot(place, 0.97, "x", color=color, ms=9, mew=2, transform=at_top, clip_on=False)
        axes.text(place, 0.92, gone, ha="center", va="top", fontsize=9, transform=at_top)


def _label_x_axis(axes: Axes, study: Study, places: Mapping[str, float], room: int) -> None:
    x = study.facts.x or {}
    axes.set_xlabel(str(x["label"]))
    if x["log"]:
        log_axis(axes, list(places.values()), room)


def _bars(axes: Axes, study: Study) -> str:
    """Describes the error bars; "no run finished" if there are none."""
    estimates = study.verdict.estimates.values()
    if not estimates:
        axes.set_yticks([])
        return "no run finished"
    if all(estimate.n == 1 for estimate in estimates):
        return "no intervals: one seed"
    return "mean, 95 % t interval; dots are seeds"


def caption(study: Study, first: str = "") -> str:
    """Text below a figure: `first`, the scale of the runs, and the first four warnings."""
    warnings = study.verdict.warnings
    notes = [first, f"Ours: {_scale(study)}"] if first else [_scale(study)]
    notes += [f"Warning: {warning}" for warning in warnings[:4]]
    if len(warnings) > 4:
        notes.append(f"And {len(warnings) - 4} more warnings, in the report.")
    return "\n".join(textwrap.fill(note, 128, break_on_hyphens=False) for note in notes)


def _scale(study: Study) -> str:
    runs = study.runs
    compared = [run for run in runs if run.phase == "comparison"] or runs
    ended = [run for run in compared if run.status == "finished"] or compared

    def size(values: Iterable[float]) -> str:
        return span(values, tables.quantity)

    def known(name: str, digits: int) -> str:
        return ", ".join(sorted({str(r.data[name])[:digits] for r in runs if name in r.data})) or "unknown"

    seeds = size([e.n for e in study.verdict.estimates.values()] or [len({run.seed for run in compared})])
    parts = [
        f"{size(r.parameters['total'] for r in runs)} parameters "
        f"({size(r.parameters['non_embedding'] for r in runs)} non-embedding)",
        f"vocabulary of {known('vocab_size', 9)}",
        f"{size(r.tokens_seen for r in ended)} training tokens in {size(r.steps for r in ended)} steps",
        f"data: {', '.join(sorted({text_name(data_card(r)) for r in ended}))} "
        f"(sha256 {known('source_sha256', 8)})",
        f"{seeds} seed{'' if seeds == '1' else 's'}",
        f"device: {', '.join(sorted({run.device_name for run in runs}))}",
    ]
    return f"{'; '.join(parts)}. {tables.head(study)[1]}"
