"""Elements of all figures: colours, axes, points with their seeds, captions, and files."""

import re
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullLocator
from PIL import Image

from experiments.reporting import placing
from mobilellm_jax.analysis.facts import Point
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.records import Record
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
# Inches: on a phone, 358 pixels wide, 10 points are 10 pixels. So panels stand below each other.
WIDTH, DPI = 4.9, 150
STYLE = {
    "figure.dpi": DPI,
    "font.size": 10,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "text.parse_math": False,
    "svg.hashsalt": "mobilellm_jax",  # else names of clip paths are random
    "pdf.fonttype": 42,  # TrueType: some publishers refuse matplotlib's Type 3
}
HALO = [withStroke(linewidth=2.5, foreground="white")]  # of text over lines
styled = matplotlib.style.context(["default", STYLE])


@styled
def render(figure: Figure) -> bytes:
    """Encodes a figure as PNG; equal figures give equal bytes."""
    _settle(figure)
    drawn, small = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
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
        left, bottom, width, height = (round(float(place), 5) for place in axes.get_position().bounds)
        axes.set_position((left, bottom, width, height))


def _with_plain_ids(svg: bytes) -> bytes:
    """Numbers the clip paths of an SVG, whose names are hashes of more digits than it shows."""
    names = dict.fromkeys(re.findall(rb'<clipPath id="(\w+)"', svg))
    for number, name in enumerate(names):
        svg = svg.replace(name, b"clip%d" % number)
    return svg


def unbroken(text: str) -> str:
    """Keeps names in quotes, as '4 x 48', on one line, up to 28 characters."""
    return re.sub(r"'[^']{1,28}'", lambda name: name[0].replace(" ", "\N{NO-BREAK SPACE}"), text)


@styled
def framed(title: str, subtitle: str, caption: str, height: float, width: float = WIDTH) -> Figure:
    """Creates a figure with `height` inches between the lines above and the caption.

    Args:
      title: what is found.
      subtitle: what is drawn: measure, unit, number of seeds.
    """
    title, subtitle, caption = (
        "\n".join(
            textwrap.fill(line, round(room * width / WIDTH), break_on_hyphens=False)
            for line in text.splitlines()
        )
        for text, room in ((unbroken(title), 50), (subtitle, 70), (caption, 74))
    )
    below_title = 0.1 + 0.205 * (title.count("\n") + 1)
    above = below_title + (0.06 + 0.16 * (subtitle.count("\n") + 1) if subtitle else 0)
    below = 0.12 + 0.15 * (caption.count("\n") + 1) if caption else 0.05
    total = above + height + below
    figure = Figure(figsize=(width, total))
    FigureCanvasAgg(figure)
    room = (0, below / total, 1, height / total)
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=room, w_pad=0.08, h_pad=0.06))
    figure.text(0.02, 0.07 / total, caption, fontsize=8, color="0.25", linespacing=1.3)
    at: dict[str, Any] = {"ha": "left", "va": "top"}
    figure.text(0.02, 1 - 0.08 / total, title, fontsize=11.5, fontweight="bold", **at)
    figure.text(0.02, 1 - below_title / total, subtitle, fontsize=9, color="0.3", **at)
    return figure


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


def are_equal(costs: Collection[float]) -> bool:
    """True for costs that differ by less than 2 %: a figure says nothing about them."""
    return not costs or max(costs) <= 1.02 * min(costs)


def apart(values: Iterable[float], factor: float) -> list[float]:
    """Sorts the values, and drops those that are less than `factor` times the last one kept."""
    kept: list[float] = []
    for value in sorted(set(values)):
        kept += [value] if not kept or value >= factor * kept[-1] else []
    return kept


def log_axis(axes: Axes, values: Sequence[float], room: int = 50) -> None:
    """Makes the x axis logarithmic, with a label at each value that fits; the axis has `room` characters."""
    axes.set_xscale("log", base=2)
    places = apart(values, max(1.01, (max(values) / min(values)) ** (2.7 / room)))
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.xaxis.set_minor_locator(NullLocator())


def category_axis(axes: Axes, labels: Sequence[str]) -> None:
    """Labels the ticks 0, 1, 2, ... of a y axis, the first at the top."""
    axes.set_yticks(range(len(labels)), [textwrap.fill(label, 20) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)


def categories_height(labels: Sequence[str]) -> float:
    """Height in inches of axes with such categories."""
    return 0.8 + sum(0.16 + 0.15 * (1 + textwrap.fill(label, 20).count("\n")) for label in labels)


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
    is_across: bool = False,
) -> None:
    """Draws the mean with its interval, and every seed beside it, clear of the error bar.

    Args:
      shift: to the right, in points (1/72 inch), which separates points at the same place.
      is_across: the values are on the x axis, and `place` is on the y axis.
    """
    measure = MEASURES[point.comparison[0].metric]
    half = None if estimate.half_width is None else estimate.half_width * measure.scale
    mean = measure.shown(estimate.mean)
    low, high = mean - (half or 0), mean + (half or 0)
    if measure.is_share:  # a t interval knows no bounds
        low, high = max(low, min(0.0, mean)), min(high, max(100.0, mean))
    bars = None if half is None else [[mean - low], [high - mean]]
    seeds = [measure.shown(score) for score in point.scores.values()]
    dots = {"color": looks["color"], "ms": 8, "alpha": 0.75, "mew": 0}
    if is_across:
        axes.errorbar(mean, place, xerr=bars, **looks, ms=6.5, capsize=3.5)
        axes.plot(seeds, [place] * len(seeds), ".", **dots, transform=placing.moved(axes, 0, -7))
        axes.update_datalim([(end, place) for end in (low, high, *seeds)])
        return
    at = {"transform": placing.moved(axes, shift)} if shift else {}
    axes.errorbar(place, mean, bars, **looks, ms=6.5, capsize=3.5, **at)
    # A shifted artist does not extend the limits by itself.
    axes.update_datalim([(place, end) for end in (low, high, *seeds)])
    axes.plot([place] * len(seeds), seeds, ".", **dots, transform=placing.moved(axes, shift + 7))


def draw_values(
    axes: Axes,
    study: Study,
    looks: Mapping[str, Mapping[str, Any]] | None = None,
    is_reversed: bool = False,
    height: float = 2.6,
) -> None:
    """Draws the final values of every point: as lines over x, as points over x, or across as categories.

    Args:
      looks: style of each line by series ("" if there is only one), for points that are joined to lines.
        None: one style for each line in a study of several lines, else one for each point.
      is_reversed: invert the axis of the values where lower ones are better, so that these are further up, or
        to the right.
      height: of the axes in inches, about.
    """
    measure, places, lines = MEASURES[study.facts.metric], places_of(study), series_of(study)
    of_lines = looks or {line: look(index) for index, line in enumerate(lines)}
    is_across, ends = places is None, dict[str, tuple[float, float]]()
    if places is None:
        _draw_points(
            axes, study, {label: i for i, label in enumerate(study.points)}, looks and looks[""], True
        )
        category_axis(axes, list(study.points))
    elif of_lines:
        ends = _draw_lines(axes, study, places, lines or [""], of_lines)
    else:
        _draw_points(axes, study, places)
    if places is not None:
        _label_x_axis(axes, study, places)
    values = "x" if is_across else "y"
    axes.margins(x=0.08, y=None if is_across else 0.08)
    if is_reversed and not measure.is_share:
        axes.invert_xaxis() if is_across else axes.invert_yaxis()
    get, put = getattr(axes, f"get_{values}lim"), getattr(axes, f"set_{values}lim")
    if any(absent(point.comparison) for point in study.points.values()):  # room for their marks
        low, high = get()
        put(low, high + 0.22 * (high - low))
    _draw_ends(axes, study, values)
    if measure.is_share:  # the room above 100 % is for the marks
        ticks = [tick for tick in getattr(axes, f"get_{values}ticks")() if 0 <= tick <= 100]
        getattr(axes, f"set_{values}ticks")(ticks)
    getattr(axes, f"set_{values}label")(measure.axis)
    if not study.verdict.estimates:
        getattr(axes, f"set_{values}ticks")([])
    if lines and ends:
        placing.label_ends(axes, ends, of_lines, height)


def _draw_ends(axes: Axes, study: Study, values: str) -> None:
    """Draws the best value of a task's measure, and that of nothing learned, where the axis reaches them.

    `values` is the axis of the values, "x" or "y".
    """
    metric, limits = study.facts.metric, getattr(axes, f"get_{values}lim")()
    known = [run.measures for run in study.runs if run.measures is not None]
    look = {"color": "0.45", "ls": (0, (2, 2)), "lw": 1.2}
    beside = {"fontsize": 8.5, "color": "0.35"}
    for name in ("floor", "ceiling"):
        ends = {shown(metric, of[name][metric]) for of in known if metric in of[name]}
        for end in ends if len(ends) == 1 else ():
            if not min(limits) <= end <= max(limits):
                continue
            if values == "x":
                axes.axvline(end, **look)
                axes.text(
                    end, 1.0, name, va="bottom", ha="center", transform=axes.get_xaxis_transform(), **beside
                )
            else:
                axes.axhline(end, **look)
                axes.text(1.0, end, f" {name}", va="center", transform=axes.get_yaxis_transform(), **beside)
    getattr(axes, f"set_{values}lim")(limits)


def _draw_points(
    axes: Axes,
    study: Study,
    places: Mapping[str, float],
    same: Mapping[str, Any] | None = None,
    is_across: bool = False,
) -> None:
    """Draws every point at its place, each in its own style or all in the same one."""
    for index, (label, point) in enumerate(study.points.items()):
        mine = same or look(index)
        if estimate := study.verdict.estimates.get(label):
            draw_point(axes, places[label], point, estimate, mine, is_across=is_across)
        _mark_absent(axes, places[label], point, mine["color"], is_across)


def _draw_lines(
    axes: Axes,
    study: Study,
    places: Mapping[str, float],
    lines: Sequence[str],
    looks: Mapping[str, Mapping[str, Any]],
) -> dict[str, tuple[float, float]]:
    """Draws the points of each line joined, and returns the line's end on the right.

    Lines that share a place are side by side there.
    """
    last: dict[str, tuple[float, float]] = {}
    ends: dict[str, tuple[float, float]] = {}
    for label, point in study.points.items():
        line, place = (point.x or {}).get("series", ""), places[label]
        shift = 10.0 * (lines.index(line) - (len(lines) - 1) / 2)
        mine = looks[line]
        if estimate := study.verdict.estimates.get(label):
            draw_point(axes, place, point, estimate, mine, shift)
            end = place, shown(study.facts.metric, estimate.mean)
            if line in last:
                xs, ys = zip(last[line], end, strict=True)
                axes.plot(
                    xs, ys, color=mine["color"], ls=mine["ls"], lw=1.5, transform=placing.moved(axes, shift)
                )
            last[line] = end
            ends[line] = max(ends.get(line, end), end)
        _mark_absent(axes, place, point, mine["color"])
    return ends


def _mark_absent(axes: Axes, place: float, point: Point, color: str, is_across: bool = False) -> None:
    """Marks a point of which runs are missing with a cross at the far end of the values, and their count."""
    if not (gone := absent(point.comparison)):
        return
    look = {"color": color, "ms": 8, "mew": 2, "clip_on": False}
    if is_across:
        axes.plot(0.97, place, "x", **look, transform=axes.get_yaxis_transform())
        axes.text(
            0.94, place, gone, ha="right", va="center", fontsize=8.5, transform=axes.get_yaxis_transform()
        )
    else:
        axes.plot(place, 0.97, "x", **look, transform=axes.get_xaxis_transform())
        text = textwrap.fill(gone, 10)
        axes.text(
            place, 0.92, text, ha="center", va="top", fontsize=8.5, transform=axes.get_xaxis_transform()
        )


def _label_x_axis(axes: Axes, study: Study, places: Mapping[str, float]) -> None:
    x = study.facts.x or {}
    axes.set_xlabel(str(x["label"]))
    if x["log"]:
        log_axis(axes, list(places.values()))
