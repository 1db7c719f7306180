"""Draws figures from records alone: no training, no jax, the same bytes for the same records.

Three for each study: `outcome` (what came out, and every difference asked about), `curves` (held-out
evaluations during training) and `learning_rates` (the search for them). `experiments.report` writes them.
"""

import math
import textwrap
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
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
WORDS = {  # colour and marker of a verdict
    "better": ("#0072B2", "o"),
    "worse": ("#D55E00", "D"),
    "no difference": ("#000000", "s"),
    "cannot tell": ("0.5", "o"),  # drawn hollow
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
    "svg.hashsalt": "mobilellm_jax",  # element ids would be random otherwise
}
# What the axes show. For "error" that is its complement, in percent: 100 is perfect, higher is better.
VALUES = {"loss": "held-out loss (nats per token)", "error": "exact match, held out (%)"}
DIFFERENCES = {"loss": "loss (nats per token)", "error": "error (share of answers not exactly right)"}


def outcome(records: Sequence[Record], found: Verdict) -> Figure:
    """Returns the figure of one study: final values of every point above, differences of pairs below."""
    facts, runs = newest(records), comparison_runs(records)
    rows = [textwrap.fill(f"{c.point} \N{MINUS SIGN} {c.other}", 34) for c in found.comparisons]
    notes = [_caption(records, found), *(f"Warning: {warning}" for warning in found.warnings)]
    caption = "\n".join(textwrap.fill(note, 135, break_on_hyphens=False) for note in notes)
    title = textwrap.fill(facts.question, 80)
    heights = {  # inches
        "title": 0.12 + 0.25 * (title.count("\n") + 1),
        "values": 3.5,
        "effects": 1.0 + sum(0.2 + 0.19 * (label.count("\n") + 1) for label in rows) if rows else 0.0,
        "caption": 0.15 + 0.175 * (caption.count("\n") + 1),
    }
    total = sum(heights.values())
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, total))
        FigureCanvasAgg(figure)
        bottom, panels = heights["caption"] / total, (heights["values"] + heights["effects"]) / total
        figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, bottom, 1, panels), w_pad=0.08, h_pad=0.06))
        figure.text(0.01, 0.07 / total, caption, fontsize=9, color="0.25", linespacing=1.3)
        figure.text(0.5, 1 - 0.1 / total, title, fontsize=13, ha="center", va="top")
        # Each panel in a figure of its own: the long labels of the lower one would narrow the upper one.
        ratios = [heights["values"], *([heights["effects"]] if rows else [])]
        parts = np.ravel(figure.subfigures(len(ratios), 1, height_ratios=ratios, squeeze=False))
        _draw_values(_axes(parts[0]), runs, found)
        if rows:
            _draw_effects(_axes(parts[1]), rows, found.comparisons, facts)
    return figure


def curves(records: Sequence[Record]) -> Figure:
    """Returns the held-out evaluations during training: each seed and the mean of every point."""
    runs, metric = comparison_runs(records), newest(records).metric
    labels = {point: point + (f" ({_absent(of)})" if _absent(of) else "") for point, of in runs.items()}
    figure, axes = _with_legend_beside(labels.values())
    with matplotlib.style.context(["default", STYLE]):
        finished_late = []
        for index, (point, of_point) in enumerate(runs.items()):
            color, marker, dash = _look(index)
            seeds = [_curve(run) for run in of_point]
            finished = [curve for curve, run in zip(seeds, of_point, strict=True) if run.status == "finished"]
            finished_late += [v for curve in finished for at, v in curve.items() if at >= max(curve) / 4]
            for curve in seeds:
                axes.plot(list(curve), list(curve.values()), color=color, lw=0.7, alpha=0.5)
            common = sorted(set.intersection(*(set(curve) for curve in finished))) if finished else []
            means = [float(np.mean([curve[tokens] for curve in finished])) for tokens in common]
            axes.plot(common, means, color=color, ls=dash, marker=marker, ms=5, lw=1.8, label=labels[point])
        if finished_late:  # the steep start, and a run that diverges, would squeeze the differences
            low, high = min(finished_late), max(finished_late)
            axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
        axes.set_xlabel("training tokens seen")
        axes.set_ylabel(VALUES[metric])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tables.quantity(value)))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_title("mean; thin lines are seeds; the first quarter may be cut off", fontsize=10, color="0.25")
        if runs:
            axes.figure.legend(loc="outside right upper", fontsize=9, frameon=False, handlelength=4)
    return figure


def learning_rates(records: Sequence[Record], found: Verdict) -> Figure | None:
    """Returns the value against learning rate of every tuned point; None if no point was tuned."""
    if not found.tuning:
        return None
    metric = newest(records).metric
    order = list(by_point(records))
    figure, axes = _with_legend_beside(found.tuning)
    gone: dict[float, int] = {}  # crosses drawn at a rate, so that they stand side by side
    worst, step = (0.97, -0.05) if metric == "loss" else (0.03, 0.05)
    rates = sorted({rate for tuning in found.tuning.values() for rate, _ in tuning.curve})
    with matplotlib.style.context(["default", STYLE]):
        for point, tuning in found.tuning.items():
            color, marker, dash = _look(order.index(point))
            tried = [(rate, _shown(metric, value)) for rate, value in tuning.curve if value is not None]
            axes.plot(
                [rate for rate, _ in tried],
                [value for _, value in tried],
                **{"color": color, "ls": dash, "marker": marker, "ms": 5, "lw": 1.5, "label": point},
            )
            chosen = [(r, v) for r, v in tried if math.isclose(r, tuning.chosen)]
            axes.plot(*zip(*chosen, strict=True), "o", ms=14, mfc="none", mec=color, mew=2) if chosen else None
            for rate in (rate for rate, value in tuning.curve if value is None):
                height = worst + step * gone.get(rate, 0)
                gone[rate] = gone.get(rate, 0) + 1
                at = axes.get_xaxis_transform()
                axes.plot(rate, height, "x", color=color, ms=8, mew=2, transform=at, clip_on=False)
        if gone:  # room for the crosses
            low, high = axes.get_ylim()
            room = (high - low) * (0.06 + 0.06 * max(gone.values()))
            axes.set_ylim(*((low, high + room) if metric == "loss" else (low - room, high)))
        axes.set_xscale("log", base=2)
        apart: list[float] = []  # refined rates lie too close together for a label each
        for rate in rates:
            apart += [rate] if not apart or rate / apart[-1] > 1.6 else []
        axes.set_xticks(apart, [f"{rate:.2g}" for rate in apart], rotation=30 if len(apart) > 8 else 0)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("learning rate")
        axes.set_ylabel(VALUES[metric])
        title = "ring: the rate of the comparison; cross: diverged or failed" if gone else None
        axes.set_title(title or "ring: the rate of the comparison", fontsize=10, color="0.25")
        axes.figure.legend(loc="outside right upper", fontsize=9, frameon=False, handlelength=4)
    return figure


def render(figure: Figure, suffix: str) -> bytes:
    """Returns "png" or "svg", the same bytes for the same figure: no dates, no versions, no random ids."""
    file = BytesIO()
    nothing = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[suffix]
    with matplotlib.style.context(["default", STYLE]):
        figure.savefig(file, format=suffix, dpi=150, metadata=nothing)
    if suffix == "png":  # 255 colours look the same and take a third of the space
        image = Image.open(file).convert("RGB").quantize(255)
        file = BytesIO()
        image.save(file, "png", optimize=True)
    return file.getvalue()


def comparison_runs(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Returns the runs that are compared, by point; a point that was only tuned so far has none."""
    return {
        point: [run for run in runs if run.phase == "comparison"] for point, runs in by_point(records).items()
    }


def _draw_values(axes: Axes, points: dict[str, list[Record]], found: Verdict) -> None:
    facts = [runs[0] for runs in points.values() if runs]
    metric = facts[0].metric if facts else "loss"
    places = [runs[0].x if runs else None for runs in points.values()]
    numeric = [place for place in places if place is not None]
    is_numeric = len(numeric) == len(places)
    values = [place["value"] for place in numeric] if is_numeric else list(range(len(points)))
    # Seeds stand beside their mean, so that they don't hide under the error bar.
    beside = axes.transData + ScaledTranslation(7 / 72, 0, axes.figure.dpi_scale_trans)
    for index, (point, runs) in enumerate(points.items()):
        color, marker, _ = _look(index)
        finished = [_shown(metric, run.score) for run in runs if run.status == "finished"]
        if estimate := found.estimates.get(point):
            half = estimate.half_width
            bar = None if half is None else half * (100 if metric == "error" else 1)
            mean = _shown(metric, estimate.mean)
            axes.errorbar(values[index], mean, bar, color=color, marker=marker, ms=7, capsize=4)
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
            axes.set_xticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))])
            axes.xaxis.set_minor_locator(NullLocator())
    else:
        long = len(points) > 5 and max(map(len, points)) * len(points) > 80
        slant = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if long else {}
        axes.set_xticks(values, [textwrap.fill(point, 18) for point in points], **slant)
    axes.margins(x=0.08, y=0.08)
    if any(_absent(runs) for runs in points.values()):  # room for their marks
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.22 * (high - low))
    axes.set_ylabel(VALUES[metric])
    bars = "mean, 95 % t interval; dots are seeds"
    if not found.estimates:
        axes.set_yticks([])
        bars = "no run finished"
    elif all(estimate.half_width is None for estimate in found.estimates.values()):
        bars = "no intervals: one seed"
    axes.set_title(bars, fontsize=10, color="0.25")


def _draw_effects(axes: Axes, rows: list[str], comparisons: list[Comparison], facts: Record) -> None:
    """One row for each pair; an interval that is far wider than all differences is cut, with an arrow."""
    known = [c.difference for c in comparisons if c.difference is not None]
    widest = max([facts.margin, *(abs(end) for d in known for end in (d.low, d.high) if end is not None)])
    largest = max([facts.margin, *(abs(d.mean) for d in known)])
    limit = 1.08 * min(widest, 5 * largest) if widest and largest else 1.08 * max(widest, largest, 1e-3)
    if facts.margin:
        axes.axvspan(-facts.margin, facts.margin, color="0.92", lw=0)
    axes.axvline(0, color="0.3", lw=1)
    for place, comparison in enumerate(comparisons):
        color, marker = WORDS[comparison.word]
        difference = comparison.difference
        if difference is not None and difference.low is not None and difference.high is not None:
            ends = [max(difference.low, -limit), min(difference.high, limit)]
            axes.plot(ends, [place] * 2, color=color, lw=2, solid_capstyle="butt")
            for end, side in ((difference.low, "<"), (difference.high, ">")):
                cut = abs(end) > limit
                axes.plot(np.clip(end, -limit, limit), place, side if cut else "|", color=color, ms=7, mew=1.5, clip_on=False)
        if difference is not None:
            fill = "white" if comparison.word == "cannot tell" else color
            axes.plot(difference.mean, place, marker, color=color, ms=8, mfc=fill, mew=1.8)
        axes.text(1.02, place, textwrap.fill(comparison.phrase, 30), color="0.35" if color == "0.5" else color, va="center", fontsize=10, transform=axes.get_yaxis_transform())
    axes.set_xlim(-limit, limit)
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first pair at the top
    axes.set_yticks(range(len(rows)), rows, fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"\N{LEFTWARDS ARROW} first is better      difference in {DIFFERENCES[facts.metric]}      first is worse \N{RIGHTWARDS ARROW}")
    band = f"; grey: less than {facts.margin:g} either way does not matter" if facts.margin else ""
    axes.set_title(f"mean difference over paired seeds, 95 % interval{band}", fontsize=10, color="0.25")


def _axes(figure: Figure | SubFigure) -> Axes:
    return figure.subplots()


def _with_legend_beside(names: Any) -> tuple[Figure, Axes]:
    """Returns a figure that is high enough for a legend with these names to the right of the axes."""
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH, max(4.2, 0.6 + 0.19 * len(list(names)))))
        FigureCanvasAgg(figure)
        figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
        return figure, figure.subplots()


def _shown(metric: str, value: float) -> float:
    """Returns what an axis shows for a value of `metric`, see `VALUES`."""
    return 100 * (1 - value) if metric == "error" else value


def _curve(run: Record) -> dict[int, float]:
    """Returns what was evaluated by training tokens seen, without what was not finite."""
    tokens_per_step = run.setting("train.batch_size") * run.setting("data.sequence_length")
    return {
        int(evaluation["step"] or 0) * tokens_per_step: _shown(run.metric, value)
        for evaluation in run.evaluations
        if (value := evaluation[run.metric]) is not None
    }


def _look(index: int) -> tuple[str, str, Any]:
    return COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)], DASHES[index % len(DASHES)]


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
    tuned = {
        "grid": "tuned for each point",
        "transferred": "transferred from another shape",
        "none": "not tuned",
    }[facts.tuning]
    parts = [
        f"{span([r.parameters['total'] for r in records])} parameters "
        f"({span([r.parameters['non_embedding'] for r in records])} non-embedding)",
        f"{span(tokens)} training tokens",
        f"data: {facts.setting('data.source')} (sha256 {', '.join(hashes) or 'unknown'})",
        f"{seeds} seed{'s' if seeds > 1 else ''}",
        f"held equal: {facts.matched.replace('_', ' ')}"
        + (f" within {found.mismatch[facts.matched]:.1%}" if facts.matched in found.mismatch else ""),
        f"learning rate: {tuned}",
        f"device: {', '.join(devices)}",
    ]
    return "; ".join(parts) + "."
