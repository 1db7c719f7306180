"""Redraws every table and figure from the records alone: no training, no jax.

    python -m experiments.figures [--workdir=experiments]

reads <workdir>/results/**.json and writes <workdir>/figures/<study>-<preset>.{png,svg,csv,md}.
"""

import textwrap
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import matplotlib.style
import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation
from PIL import Image

from experiments import cli, tables
from mobilellm_jax.errors import UserError
from mobilellm_jax.results import Record, by_point, by_study, newest, read_all, write_atomically
from mobilellm_jax.statistics import Verdict, verdict

# Okabe and Ito's palette for all kinds of colour vision, without yellow, which is too pale for lines. The
# three lists have different lengths, so that the looks of many points differ, in grey print too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
SIZE = (9.2, 5.2)  # inches; shown 800 pixels wide, 10 points are 12 pixels
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


def report(records: Sequence[Record], figures_dir: str | Path) -> str:
    """Writes figure (PNG, SVG) and table (CSV, Markdown) of one study at one preset.

    Returns:
      The text to print: warnings, tables, verdict, and where the figure lies.

    Raises:
      UserError: the runs cannot be compared, or a file cannot be written.
    """
    found = verdict(records)
    facts = newest(records)
    stem = f"{facts.study}-{facts.preset}" if facts.preset else facts.study
    path = Path(figures_dir) / stem
    warnings = [f"Warning: {warning}" for warning in found.warnings]
    figure = draw(records, found)
    for suffix in ("png", "svg"):
        write_atomically(f"{path}.{suffix}", _render(figure, suffix))
    write_atomically(f"{path}.csv", tables.csv_text(records, found).encode())
    commands = sorted({record.command for record in records})
    page = [
        f"# {stem}",
        *warnings,
        tables.markdown(records, found),
        found.sentence,
        f"![{facts.question}]({stem}.png)",
        _caption(records),
        "Made by:",
        *(f"    {command}" for command in commands),
    ]
    write_atomically(f"{path}.md", ("\n\n".join(page) + "\n").encode())
    said = textwrap.fill(found.sentence, 110, break_long_words=False, break_on_hyphens=False)
    return "\n".join([*warnings, tables.text(records, found), "", said, f"Figure: {path}.png"])


def draw(records: Sequence[Record], found: Verdict) -> Figure:
    """Returns the figure of one study: final losses on the left, loss curves on the right."""
    facts = newest(records)
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=SIZE)
        FigureCanvasAgg(figure)
        notes = [_caption(records), *(f"Warning: {warning}" for warning in found.warnings)]
        caption = "\n".join(textwrap.fill(note, 135, break_on_hyphens=False) for note in notes)
        bottom = 0.02 + 0.034 * (caption.count("\n") + 1)
        figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, bottom, 1, 1 - bottom), w_pad=0.08))
        figure.text(0.01, 0.015, caption, fontsize=9, color="0.25", linespacing=1.3)
        figure.suptitle(textwrap.fill(facts.question, 80), fontsize=13)
        left, right = figure.subplots(1, 2)
        _draw_losses(left, records, found)
        _draw_curves(right, records)
    return figure


def _draw_losses(axes: Axes, records: Sequence[Record], found: Verdict) -> None:
    points = by_point(records)
    places = [runs[0].x for runs in points.values()]
    numeric = [place for place in places if place is not None]
    is_numeric = len(numeric) == len(places)
    values = [place["value"] for place in numeric] if is_numeric else list(range(len(points)))
    # Seeds stand beside their mean, so that they don't hide under the error bar.
    beside = axes.transData + ScaledTranslation(7 / 72, 0, axes.figure.dpi_scale_trans)
    for index, (point, runs) in enumerate(points.items()):
        color, marker, _ = _look(index)
        losses = [run.loss for run in runs if run.status == "finished"]
        if estimate := found.estimates.get(point):
            axes.errorbar(
                values[index], estimate.mean, estimate.half_width, color=color, marker=marker, ms=7, capsize=4
            )
            axes.plot(
                [values[index]] * len(losses), losses, ".", color=color, ms=5, alpha=0.6, transform=beside
            )
        if len(losses) < len(runs):
            at_top = axes.get_xaxis_transform()
            axes.plot(values[index], 0.97, "x", color=color, ms=9, mew=2, transform=at_top, clip_on=False)
            axes.text(values[index], 0.92, _absent(runs), ha="center", va="top", fontsize=9, transform=at_top)
    if is_numeric:
        axes.set_xlabel(str(numeric[0]["label"]))
        if numeric[0]["log"]:
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))])
            axes.xaxis.set_minor_locator(NullLocator())
    else:
        slant = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(points) > 5 else {}
        axes.set_xticks(values, [textwrap.fill(point, 14) for point in points], **slant)
    axes.margins(x=0.12, y=0.08)
    if any(run.status != "finished" for run in records):  # room for the marks of the others
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.15 * (high - low))
    axes.set_ylabel("final held-out loss (nats per token)")
    bars = "mean, 95 % t interval; dots are seeds"
    if not found.estimates:
        axes.set_yticks([])
        bars = "no run finished"
    elif all(estimate.half_width is None for estimate in found.estimates.values()):
        bars = "no intervals: one seed"
    axes.set_title(bars, fontsize=10, color="0.25")


def _draw_curves(axes: Axes, records: Sequence[Record]) -> None:
    finished_late = []
    for index, (point, runs) in enumerate(by_point(records).items()):
        color, marker, dash = _look(index)
        curves = {run.seed: _curve(run) for run in runs}
        finished = [curves[run.seed] for run in runs if run.status == "finished"]
        finished_late += [loss for curve in finished for at, loss in curve.items() if at >= max(curve) / 4]
        for curve in curves.values():
            axes.plot(list(curve), list(curve.values()), color=color, lw=0.7, alpha=0.5)
        common = sorted(set.intersection(*(set(curve) for curve in finished))) if finished else []
        means = [np.mean([curve[tokens] for curve in finished]) for tokens in common]
        label = point + (f" ({_absent(runs)})" if len(finished) < len(runs) else "")
        axes.plot(common, means, color=color, ls=dash, marker=marker, ms=5, lw=1.8, label=label)
    if finished_late:  # the steep start, and a run that diverges, would squeeze the differences to nothing
        low, high = min(finished_late), max(finished_late)
        axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
    axes.set_xlabel("training tokens seen")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tables.quantity(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_title("mean; thin lines are seeds; steep start cut off", fontsize=10, color="0.25")
    few = len(by_point(records)) <= 5
    axes.legend(fontsize=10 if few else 8, framealpha=0.9, handlelength=4, loc="upper right")


def _curve(run: Record) -> dict[int, float]:
    """Returns held-out loss by training tokens seen, without evaluations that were not finite."""
    tokens_per_step = run.setting("train.batch_size") * run.setting("data.sequence_length")
    return {
        int(evaluation["step"] or 0) * tokens_per_step: evaluation["loss"]
        for evaluation in run.evaluations
        if evaluation["loss"] is not None
    }


def _look(index: int) -> tuple[str, str, object]:
    return COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)], DASHES[index % len(DASHES)]


def _absent(runs: Sequence[Record]) -> str:
    """Returns "1 of 3 diverged"."""
    counts = {word: sum(run.status == word for run in runs) for word in ("diverged", "failed")}
    return ", ".join(f"{count} of {len(runs)} {word}" for word, count in counts.items() if count)


def _caption(records: Sequence[Record]) -> str:
    facts = newest(records)

    def span(values: Sequence[float]) -> str:
        low, high = tables.quantity(min(values)), tables.quantity(max(values))
        return low if low == high else f"{low} to {high}"

    devices = sorted({record.device_name for record in records})
    seeds = len({record.seed for record in records})
    hashes = sorted(
        {str(record.data["source_sha256"])[:8] for record in records if "source_sha256" in record.data}
    )
    tokens = [r.tokens_seen for r in records if r.status == "finished"] or [r.tokens_seen for r in records]
    parts = [
        f"{span([r.parameters['total'] for r in records])} parameters "
        f"({span([r.parameters['non_embedding'] for r in records])} non-embedding)",
        f"{span(tokens)} training tokens",
        f"data: {facts.setting('data.source')} (sha256 {', '.join(hashes) or 'unknown'})",
        f"{seeds} seed{'s' if seeds > 1 else ''}",
        f"held equal: {facts.matched}",
        f"device: {', '.join(devices)}",
    ]
    return "; ".join(parts) + "."


def _render(figure: Figure, suffix: str) -> bytes:
    """Returns the same bytes for the same figure: no dates, no versions, no random ids."""
    file = BytesIO()
    nothing = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[suffix]
    with matplotlib.style.context(["default", STYLE]):
        figure.savefig(file, format=suffix, dpi=150, metadata=nothing)
    if suffix == "png":  # 255 colours look the same and take a third of the space
        image = Image.open(file).convert("RGB").quantize(255)
        file = BytesIO()
        image.save(file, "png", optimize=True)
    return file.getvalue()


def redraw(workdir: str | Path) -> None:
    """Reports every study that has records in `workdir`, and prints the reports.

    Raises:
      UserError: there are no records, one is damaged, or the runs of a study cannot be compared.
    """
    results = Path(workdir) / "results"
    studies = by_study(read_all(results))
    if not studies:
        raise UserError(
            f"{results}: no records of runs (*.json); "
            f"make some with: python -m experiments.sweep --workdir={workdir}"
        )
    refused = []
    for records in studies.values():
        try:
            print(report(records, Path(workdir) / "figures"), end="\n\n")
        except UserError as error:  # the other studies are drawn all the same
            refused.append(str(error))
    if refused:
        raise UserError("\n".join(refused))


def main() -> int:
    """Redraws what is in --workdir, and returns the exit status."""
    redraw(flags.FLAGS.workdir)
    return 0


if __name__ == "__main__":
    # Defined here and not on import: commands that import `report` define --workdir themselves.
    flags.DEFINE_string("workdir", "experiments", "directory that holds results/ and receives figures/")
    cli.run(main)
