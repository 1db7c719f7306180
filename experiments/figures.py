"""Draws figures from records alone: no training, no jax, the same bytes for the same records.

Three for each study: `outcome` (what came out, and every difference asked about), `curves` (held-out
evaluations during training) and `learning_rates` (the search for them). `experiments.report` writes them.
"""

import math
import textwrap
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation
from PIL import Image

from experiments import tables
from mobilellm_jax.results import Record, by_point, newest
from mobilellm_jax.verdicts import Comparison, Verdict

# Okabe and Ito's palette for all kinds of colour vision, without yellow, which is too pale for lines. The
# three lists have different lengths, so that the looks of many points differ, in grey print too.
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
}
styled = matplotlib.style.context(["default", STYLE])
# What the axes show. For "error" that is its complement, in percent: 100 is perfect, higher is better.
VALUES = {"loss": "held-out loss (nats per token)", "error": "exact match, held out (%)"}
DIFFERENCES = {"loss": "loss (nats per token)", "error": "error (percentage points)"}
SCALE = {"loss": 1, "error": 100}


@styled
def outcome(records: Sequence[Record], found: Verdict) -> Figure:
    """Returns the figure of one study: final values of every point above, differences of pairs below."""
    facts = newest(records)
    rows = [_pair(comparison) for comparison in found.comparisons]
    notes = [_caption(records, found), *(f"Warning: {warning}" for warning in found.warnings[:4])]
    notes += (
        [f"And {len(found.warnings) - 4} more warnings, in the report."] if len(found.warnings) > 4 else []
    )
    caption = "\n".join(textwrap.fill(note, 135, break_on_hyphens=False) for note in notes)
    title = textwrap.fill(facts.question, 80)
    labels, is_slanted = _categories(list(by_point(records)))
    heights = {  # inches
        "title": 0.12 + 0.25 * (title.count("\n") + 1),
        "values": 3.5 + (0.035 * max(map(len, labels)) if is_slanted else 0),
        "effects": 1.15 + sum(0.14 + 0.17 * (label.count("\n") + 1) for label in rows) if rows else 0.0,
        "caption": 0.15 + 0.175 * (caption.count("\n") + 1),
    }
    total = sum(heights.values())
    figure = Figure(figsize=(WIDTH, total))
    FigureCanvasAgg(figure)
    bottom, panels = heights["caption"] / total, (heights["values"] + heights["effects"]) / total
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, bottom, 1, panels), w_pad=0.08, h_pad=0.06))
    figure.text(0.01, 0.07 / total, caption, fontsize=9, color="0.25", linespacing=1.3)
    figure.text(0.5, 1 - 0.1 / total, title, fontsize=13, ha="center", va="top")
    # Each panel in a figure of its own: the long labels of the lower one would narrow the upper one.
    ratios = [heights["values"], *([heights["effects"]] if rows else [])]
    parts = np.ravel(figure.subfigures(len(ratios), 1, height_ratios=ratios, squeeze=False))
    _draw_values(parts[0].subplots(), records, found)
    if rows:
        _draw_effects(parts[1].subplots(), rows, found.comparisons, facts)
    return figure


@styled
def curves(records: Sequence[Record]) -> Figure:
    """Returns the held-out evaluations during training: each seed and the mean of every point."""
    runs, metric = comparison_runs(records), newest(records).metric
    labels = {point: _legend(point, _absent(of_point)) for point, of_point in runs.items()}
    figure, axes = _with_legend_beside(labels.values())
    late = []  # what finished runs reached after the first quarter
    for index, (point, of_point) in enumerate(runs.items()):
        look = _look(index)
        seeds = [_curve(run) for run in of_point]
        finished = [curve for curve, run in zip(seeds, of_point, strict=True) if run.status == "finished"]
        late += [value for curve in finished for at, value in curve.items() if at >= max(curve) / 4]
        for curve in seeds:
            axes.plot(list(curve), list(curve.values()), color=look["color"], lw=0.7, alpha=0.5)
        common = sorted(set.intersection(*(set(curve) for curve in finished))) if finished else []
        means = [float(np.mean([curve[tokens] for curve in finished])) for tokens in common]
        axes.plot(common, means, **look, ms=5, lw=1.8, label=labels[point])
    if late and metric == "loss":  # the steep start, and a run that diverges, would squeeze the rest
        low, high = min(late), max(late)
        axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
    axes.set_xlabel("training tokens seen")
    axes.set_ylabel(VALUES[metric])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tables.quantity(value)))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    start = "; steep start cut off" if metric == "loss" else ""
    axes.set_title(f"mean; thin lines are seeds{start}", fontsize=10, color="0.25")
    if runs:
        axes.figure.legend(loc="outside right upper", fontsize=9, frameon=False, handlelength=4)
    return figure


@styled
def learning_rates(records: Sequence[Record], found: Verdict) -> Figure | None:
    """Returns the loss against learning rate of every tuned point; None if no point was tuned."""
    if not found.tuning:
        return None
    order = list(by_point(records))
    best: list[float] = []
    figure, axes = _with_legend_beside([_legend(point) for point in found.tuning])
    gone: dict[float, list[str]] = {}  # by rate, the colours of the points that diverged or failed
    rates = sorted({rate for tuning in found.tuning.values() for rate, _ in tuning.curve})
    for point, tuning in found.tuning.items():
        look = _look(order.index(point))
        tried = {rate: value for rate, value in tuning.curve if value is not None}
        axes.plot(list(tried), list(tried.values()), **look, ms=5, lw=1.5, label=_legend(point))
        best += [min(tried.values())] if tried else []
        if tuning.chosen in tried:
            ring = {"marker": "o", "ms": 14, "mfc": "none", "mew": 2, "color": look["color"]}
            axes.plot(tuning.chosen, tried[tuning.chosen], **ring)
        for rate in (rate for rate, value in tuning.curve if value is None):
            gone.setdefault(rate, []).append(look["color"])
    low, high = axes.get_ylim()
    if best:  # a run that learned nothing would squeeze the optima to one line
        high = min(high, max(best) + 1)
        axes.set_ylim(low, high)
    if gone:  # crosses at the top, one below the other so that they don't hide each other
        most = max(map(len, gone.values()))
        room = (high - low) * min(1, 0.06 + 0.06 * most)
        axes.set_ylim(low, high + room)
        step = room / (high - low + room) / (most + 1)
        for rate, of_points in gone.items():
            for place, color in enumerate(of_points, start=1):
                at = axes.get_xaxis_transform()
                axes.plot(rate, 1 - step * place, "x", color=color, ms=8, mew=2, transform=at)
    axes.set_xscale("log", base=2)
    marked = _apart(rates, 1.6)  # refined rates lie too close together for a label each
    axes.set_xticks(marked, [f"{rate:.2g}" for rate in marked], rotation=30 if len(marked) > 8 else 0)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("learning rate")
    axes.set_ylabel(VALUES["loss"])
    crosses = "; cross: diverged or failed" if gone else ""
    axes.set_title(f"ring: the rate of the comparison{crosses}", fontsize=10, color="0.25")
    axes.figure.legend(loc="outside right upper", fontsize=9, frameon=False, handlelength=4)
    return figure


@styled
def render(figure: Figure) -> bytes:
    """Returns a PNG, the same bytes for the same figure."""
    drawn, small = BytesIO(), BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    # 255 colours look the same and take a third of the space; what matplotlib notes of itself is left behind.
    Image.open(drawn).convert("RGB").quantize(255).save(small, "png", optimize=True)
    return small.getvalue()


def comparison_runs(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Returns the runs that are compared, by point; a point that was only tuned so far has none."""
    return {
        point: [run for run in runs if run.phase == "comparison"] for point, runs in by_point(records).items()
    }


def _draw_values(axes: Axes, records: Sequence[Record], found: Verdict) -> None:
    points, metric = comparison_runs(records), newest(records).metric
    places = [runs[0].x for runs in by_point(records).values()]
    numeric = [place for place in places if place is not None]
    # Points at the same place would hide each other, and only their names would tell them apart.
    is_numeric = len({place["value"] for place in numeric}) == len(places)
    values = [place["value"] for place in numeric] if is_numeric else list(range(len(points)))
    # Seeds stand beside their mean, so that they don't hide under the error bar.
    beside = axes.transData + ScaledTranslation(7 / 72, 0, axes.figure.dpi_scale_trans)
    for index, (point, runs) in enumerate(points.items()):
        look = _look(index)
        color = look["color"]
        finished = [_shown(metric, run.score) for run in runs if run.status == "finished"]
        if estimate := found.estimates.get(point):
            half = estimate.half_width
            bar = None if half is None else half * SCALE[metric]
            mean = _shown(metric, estimate.mean)
            axes.errorbar(values[index], mean, bar, **look, ms=7, capsize=4)
            axes.plot(
                [values[index]] * len(finished), finished, ".", color=color, ms=5, alpha=0.6, transform=beside
            )
        if absent := _absent(runs):
            at_top = axes.get_xaxis_transform()
            axes.plot(values[index], 0.97, "x", color=color, ms=9, mew=2, transform=at_top, clip_on=False)
            axes.text(values[index], 0.92, absent, ha="center", va="top", fontsize=9, transform=at_top)
    if is_numeric:
        axes.set_xlabel(str(numeric[0]["label"]))
        if numeric[0]["log"]:
            axes.set_xscale("log", base=2)
            places = _apart(values, max(1.01, (max(values) / min(values)) ** 0.03))
            axes.set_xticks(places, [f"{place:g}" for place in places])
            axes.xaxis.set_minor_locator(NullLocator())
    else:
        labels, is_slanted = _categories(list(points))
        slant = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if is_slanted else {}
        axes.set_xticks(values, labels, fontsize=10, **slant)
    axes.margins(x=0.08, y=0.08)
    if any(_absent(runs) for runs in points.values()):  # room for their marks
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.22 * (high - low))
    if metric == "error":  # the room above 100 % is for the marks
        axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 100])
    axes.set_ylabel(VALUES[metric])
    bars = "mean, 95 % t interval; dots are seeds"
    if not found.estimates:
        axes.set_yticks([])
        bars = "no run finished"
    elif all(estimate.n == 1 for estimate in found.estimates.values()):
        bars = "no intervals: one seed"
    axes.set_title(bars, fontsize=10, color="0.25")


def _categories(points: list[str]) -> tuple[list[str], bool]:
    """Returns tick labels for categories, and whether they must be slanted to fit."""
    room = 90 // len(points)  # characters
    is_slanted = max(len(word) for point in points for word in point.split()) > room
    return [point if is_slanted else textwrap.fill(point, room) for point in points], is_slanted


def _draw_effects(axes: Axes, rows: list[str], comparisons: list[Comparison], facts: Record) -> None:
    """One row for each pair. An interval far wider than all differences is cut off, with an arrow there."""
    scale, margin = SCALE[facts.metric], SCALE[facts.metric] * facts.margin
    known = [c.difference for c in comparisons if c.difference]
    means = [scale * difference.mean for difference in known]
    ends = [
        scale * end for difference in known for end in (difference.low, difference.high) if end is not None
    ]
    reach = 4 * max([margin, *map(abs, means)]) or math.inf
    shown = [0, -margin, margin, *means, *(min(max(end, -reach), reach) for end in ends)]
    low, high = min(shown), max(shown)
    pad = 0.04 * (high - low) or 1e-3
    axes.axvspan(-margin, margin, color="0.92", lw=0)
    axes.axvline(0, color="0.3", lw=1)
    for place, comparison in enumerate(comparisons):
        color, text_color, marker, fill = WORDS[comparison.word]
        difference = comparison.difference
        if difference and difference.low is not None and difference.high is not None:
            start, stop = max(scale * difference.low, low), min(scale * difference.high, high)
            axes.plot([start, stop], [place] * 2, color=color, lw=2)
            is_cut = start > scale * difference.low, stop < scale * difference.high
            axes.plot(start, place, "<" if is_cut[0] else "|", color=color, ms=8, mew=2)
            axes.plot(stop, place, ">" if is_cut[1] else "|", color=color, ms=8, mew=2)
        if difference:
            axes.plot(scale * difference.mean, place, marker, color=color, ms=8, mfc=fill, mew=1.8)
        said = {"va": "center", "fontsize": 10, "transform": axes.get_yaxis_transform()}
        axes.text(1.02, place, textwrap.fill(comparison.phrase, 30), color=text_color, **said)
    axes.set_xlim(low - pad, high + pad)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first pair at the top
    axes.set_yticks(range(len(rows)), rows, fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    left, right = "\N{LEFTWARDS ARROW} first is better", "first is worse \N{RIGHTWARDS ARROW}"
    axes.set_xlabel(f"{left}      difference in {DIFFERENCES[facts.metric]}      {right}")
    notes = ["mean difference over paired seeds, 95 % interval"]
    unit = " points" if facts.metric == "error" else ""
    notes += [f"grey: within {margin:g}{unit}, too small to matter"] if margin else []
    family = (
        f"\nthe verdicts allow for {len(rows)} comparisons, the intervals do not" if len(rows) > 1 else ""
    )
    axes.set_title("; ".join(notes) + family, fontsize=10, color="0.25")


def _pair(comparison: Comparison) -> str:
    """Returns "a - b", on several lines where it is long."""
    label = f"{comparison.point} \N{MINUS SIGN} {comparison.other}"
    if len(label) <= 32:
        return label
    return "\n".join(
        textwrap.wrap(comparison.point, 32) + textwrap.wrap(f"\N{MINUS SIGN} {comparison.other}", 32)
    )


def _legend(point: str, note: str = "") -> str:
    return textwrap.fill(point + (f" ({note})" if note else ""), 30)


@styled
def _with_legend_beside(labels: Iterable[str]) -> tuple[Figure, Axes]:
    """Returns a figure that is high enough for a legend with these labels to the right of the axes."""
    lines = sum(1.25 + label.count("\n") for label in labels)
    figure = Figure(figsize=(WIDTH, max(4.2, 0.4 + 0.165 * lines)))
    FigureCanvasAgg(figure)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    return figure, figure.subplots()


def _shown(metric: str, value: float) -> float:
    """Returns what an axis shows for a value of `metric`, see `VALUES`."""
    return 100 * (1 - value) if metric == "error" else value


def _apart(values: Sequence[float], factor: float) -> list[float]:
    """Returns the values in ascending order without those that are less than `factor` above the last."""
    kept: list[float] = []
    for value in sorted(set(values)):
        kept += [value] if not kept or value >= factor * kept[-1] else []
    return kept


def _curve(run: Record) -> dict[int, float]:
    """Returns what was evaluated by training tokens seen, without what was not finite."""
    tokens_per_step = run.setting("train.batch_size") * run.setting("data.sequence_length")
    return {
        int(evaluation["step"] or 0) * tokens_per_step: _shown(run.metric, value)
        for evaluation in run.evaluations
        if (value := evaluation[run.metric]) is not None
    }


def _look(index: int) -> dict[str, Any]:
    lists = {"color": COLORS, "marker": MARKERS, "ls": DASHES}
    return {name: values[index % len(values)] for name, values in lists.items()}


def _absent(runs: Sequence[Record]) -> str:
    """Returns "1 of 3 diverged"; "" if all finished."""
    if not runs:
        return "no run"
    counts = {word: sum(run.status == word for run in runs) for word in ("diverged", "failed")}
    return ", ".join(f"{count} of {len(runs)} {word}" for word, count in counts.items() if count)


def _caption(records: Sequence[Record], found: Verdict) -> str:
    facts = newest(records)
    compared = [record for record in records if record.phase == "comparison"] or list(records)

    def span(values: Sequence[float]) -> str:
        low, high = tables.quantity(min(values)), tables.quantity(max(values))
        return low if low == high else f"{low} to {high}"

    devices = sorted({record.device_name for record in records})
    seeds = len({record.seed for record in compared})
    hashes = sorted({str(r.data["source_sha256"])[:8] for r in records if "source_sha256" in r.data})
    tokens = [r.tokens_seen for r in compared if r.status == "finished"] or [r.tokens_seen for r in compared]
    parts = [
        f"{span([r.parameters['total'] for r in records])} parameters "
        f"({span([r.parameters['non_embedding'] for r in records])} non-embedding)",
        f"{span(tokens)} training tokens",
        f"data: {facts.setting('data.source')} (sha256 {', '.join(hashes) or 'unknown'})",
        f"{seeds} seed{'s' if seeds > 1 else ''}",
        f"device: {', '.join(devices)}",
    ]
    return f"{'; '.join(parts)}. {tables.head(records, found)[1]}"
