"""The figures of a study; the same records give the same bytes.

In <workdir>/figures/, for each study and preset,

    <study>-<preset>.png                 final values, and the difference of every pair
    <study>-<preset>-paper.png           the paper's points beside ours, where the study is in the paper
    <study>-<preset>-costs.png           final values against parameters and training FLOPs
    <study>-<preset>-pareto.png          final values against latency and bytes, with the front
    <study>-<preset>-curves.png          held-out evaluations during training
    <study>-<preset>-learning_rates.png  the search for the learning rates
    <study>-<preset>-layers.png          what each layer is worth, where runs were diagnosed
    <study>-<preset>-loops.png           scores against loops, where runs were scored with other numbers

and the numbers behind them as .csv, -paper.csv and -comparisons.csv. On request, the figures are written as
.svg and .pdf too, and the tables of outcomes and comparisons as .tex and -comparisons.tex.
"""

import dataclasses
import math
import textwrap
from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from experiments.reporting import beside_paper, drawing, latex, layers, loops, pareto, tables
from experiments.reporting.drawing import WORDS, styled
from mobilellm_jax.analysis.facts import Facts
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.records import Record, by_study, read_records
from mobilellm_jax.analysis.study import Study, study_of
from mobilellm_jax.analysis.verdicts import Comparison
from mobilellm_jax.analysis.wording import phrase
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import AnyPath, path_of, write_atomically

FORMATS = ("png", "svg", "pdf", "tex")  # the pages show the first, which is always written
_VECTOR = FORMATS[1:3]


@dataclasses.dataclass(frozen=True)
class Image:
    """A PNG in figures/ and its alternative text."""

    name: str
    alt: str
    png: bytes


def read_studies(workdir: str | AnyPath) -> tuple[list[Study], list[str]]:
    """Analyses every study that has records in `workdir`; collects the errors of those that cannot be.

    Raises:
      UserError: there are no records, or one is corrupt.
    """
    results = path_of(workdir) / "results"
    found, refused = [], []
    for records in by_study(read_records(results)).values():
        try:
            found.append(study_of(records))
        except UserError as error:  # the other studies are still shown
            refused.append(str(error))
    if not found and not refused:
        raise UserError(
            f"{results}: no records of runs (*.json); "
            f"make some with: python -m experiments.sweep --workdir={workdir}"
        )
    return found, refused


def write(study: Study, workdir: str | AnyPath, formats: Collection[str] = FORMATS[:1]) -> dict[str, Image]:
    """Writes figures and tables (CSV) of one study at one preset. Returns the figures by suffix.

    `formats` are those of `FORMATS` to write.

    Raises:
      UserError: a file cannot be written.
    """
    drawn = {
        "": ("Final values and differences", outcome(study)),
        "-paper": ("The paper's points beside ours", beside_paper.draw(study)),
        "-costs": ("Final values against parameters and FLOPs", costs(study)),
        "-pareto": (
            "Final values against latency and bytes",
            pareto.draw(study, pareto.pareto_of(study, workdir)),
        ),
        "-curves": ("Held-out values during training", curves(study)),
        "-learning_rates": ("Final loss against learning rate", learning_rates(study)),
        "-layers": ("What each layer is worth, and the logit lens", layers.draw(study)),
        "-loops": ("Scores with other numbers of loops than in training", loops.draw(study)),
    }
    folder, name = path_of(workdir) / "figures", study.stem
    images = {
        suffix: save(f"{name}{suffix}", alt, figure, workdir, formats)
        for suffix, (alt, figure) in drawn.items()
        if figure is not None
    }
    texts = {
        ".csv": tables.csv_text(study),
        "-comparisons.csv": tables.comparisons_csv(study),
        "-paper.csv": beside_paper.csv_text(study),
    }
    if "tex" in formats:
        texts |= {".tex": latex.outcomes(study), "-comparisons.tex": latex.comparisons(study)}
    for suffix, text in texts.items():
        if text:
            write_atomically(folder / f"{name}{suffix}", text.encode())
    return images


def save(
    name: str, alt: str, figure: Figure, workdir: str | AnyPath, formats: Collection[str] = FORMATS[:1]
) -> Image:
    """Writes figures/<name>.png, and .svg and .pdf where asked for."""
    image, folder = Image(f"{name}.png", alt, drawing.render(figure)), path_of(workdir) / "figures"
    write_atomically(folder / image.name, image.png)
    for kind in _VECTOR:
        if kind in formats:
            write_atomically(folder / f"{name}.{kind}", drawing.vector(figure, kind))
    return image


@styled
def outcome(study: Study) -> Figure:
    """Draws the final values of every point above, and the differences of pairs below."""
    facts, comparisons = study.facts, study.verdict.comparisons
    rows = [_pair(comparison) for comparison in comparisons]
    said = [textwrap.fill(phrase(comparison, facts.metric), 30) for comparison in comparisons]
    labels, is_slanted = drawing.categories(list(study.points), 90)
    is_slanted = is_slanted and drawing.places_of(study) is None
    heights = [3.5 + (0.035 * max(map(len, labels)) if is_slanted else 0)]  # inches
    if rows:
        lines = [max(text.count("\n") for text in texts) + 1 for texts in zip(rows, said, strict=True)]
        heights.append(1.15 + sum(0.14 + 0.17 * n for n in lines))
    figure = drawing.framed(facts.question, drawing.caption(study), sum(heights))
    # Each panel in a figure of its own: the long labels of the lower one would narrow the upper one.
    parts = np.ravel(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False))
    drawing.draw_values(parts[0].subplots(), study)
    if rows:
        _draw_effects(parts[1].subplots(), rows, said, comparisons, facts)
    return figure


@styled
def costs(study: Study) -> Figure | None:
    """Draws final values against parameters and against training FLOPs; None if neither differs."""
    estimates = study.verdict.estimates
    points = {label: study.points[label] for label in study.points if label in estimates}
    places = {
        "non-embedding parameters": {p: of.parameters["non_embedding"] for p, of in points.items()},
        "training FLOPs of a run": {
            p: max(r.tokens_seen * r.train_flops_per_token for r in of.comparison) for p, of in points.items()
        },
    }
    if all(len(set(of_points.values())) < 2 for of_points in places.values()):
        return None
    order = list(study.points)
    labels = [drawing.legend(point) for point in points]
    text, height = drawing.caption(study), max(3.8, 0.3 + drawing.legend_height(labels))
    panels = drawing.framed(study.facts.question, text, height).subfigures()
    for axes, (label, of_points) in zip(panels.subplots(1, 2, sharey=True), places.items(), strict=True):
        shifts = _side_by_side(of_points)
        for point, place in of_points.items():
            look = drawing.look(order.index(point))
            drawing.draw_point(axes, place, points[point], estimates[point], look, shifts[point])
        low, high = min(of_points.values()), max(of_points.values())
        ratio = max(high / low, 1.1)  # at least 10 %, so that equal values look equal
        axes.set_xscale("log", base=2)
        axes.set_xlim(low / ratio**0.25, high * ratio**0.25)
        ticks = drawing.apart(of_points.values(), ratio**0.3)
        axes.set_xticks(ticks, [tables.quantity(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(y=0.08)
        axes.set_xlabel(label)
        axes.label_outer()
        title = "nearly equal x: side by side" if any(shifts.values()) else ""
        axes.set_title(title, fontsize=10, color="0.25")
    panels.suptitle("mean, 95 % t interval; dots are seeds", fontsize=10, color="0.25")
    panels.axes[0].set_ylabel(MEASURES[study.facts.metric].axis)
    marks = [Line2D([], [], **drawing.look(order.index(point))) for point in points]
    panels.legend(marks, labels, loc="outside right upper", fontsize=9, frameon=False, handlelength=4)
    return panels.figure


@styled
def curves(study: Study) -> Figure:
    """Draws the held-out evaluations during training: each seed and the mean of every point."""
    metric = study.facts.metric
    labels = {label: drawing.legend(label, drawing.absent(p.comparison)) for label, p in study.points.items()}
    figure, axes = drawing.beside_legend(labels.values())
    late = []  # values of finished runs after the first quarter of training
    for index, (label, point) in enumerate(study.points.items()):
        look = drawing.look(index)
        seeds = [_curve(run) for run in point.comparison]
        finished = [_curve(run) for run in point.finished]
        late += [value for curve in finished for at, value in curve.items() if at >= max(curve) / 4]
        for curve in seeds:
            axes.plot(list(curve), list(curve.values()), color=look["color"], lw=0.7, alpha=0.5)
        common = sorted(set.intersection(*(set(curve) for curve in finished))) if finished else []
        means = [float(np.mean([curve[tokens] for curve in finished])) for tokens in common]
        axes.plot(common, means, **look, ms=5, lw=1.8, label=labels[label])
    if late and not MEASURES[metric].is_share:  # the start, or a diverging run, would squeeze the rest
        low, high = min(late), max(late)
        axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
    axes.set_xlabel("training tokens seen")
    axes.set_ylabel(MEASURES[metric].axis)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tables.quantity(value)))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    start = "" if MEASURES[metric].is_share else "; steep start cut off"
    axes.set_title(f"mean; thin lines are seeds{start}", fontsize=10, color="0.25")
    axes.figure.legend(loc="outside right upper", fontsize=9, frameon=False, handlelength=4)
    return figure


@styled
def learning_rates(study: Study) -> Figure | None:
    """Draws the loss against the learning rate of every tuned point; None if no point was tuned."""
    searches, order = study.verdict.tuning, list(study.points)
    if not searches:
        return None
    best: list[float] = []
    figure, axes = drawing.beside_legend([drawing.legend(point) for point in searches])
    gone: dict[float, list[str]] = {}  # by rate, the colours of the points that diverged or failed
    rates = sorted({rate for tuning in searches.values() for rate, _ in tuning.curve})
    for point, tuning in searches.items():
        look = drawing.look(order.index(point))
        tried = {rate: value for rate, value in tuning.curve if value is not None}
        axes.plot(list(tried), list(tried.values()), **look, ms=5, lw=1.5, label=drawing.legend(point))
        best += [min(tried.values())] if tried else []
        is_fitted = study.facts.tuning == "fitted" and tried and min(tried) <= tuning.chosen <= max(tried)
        if tuning.chosen in tried or is_fitted:  # which lies between those tried
            at = np.interp(np.log(tuning.chosen), np.log(list(tried)), list(tried.values()))
            ring = {"marker": "o", "ms": 14, "mfc": "none", "mew": 2, "color": look["color"]}
            axes.plot(tuning.chosen, at, **ring)
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
    marked = drawing.apart(rates, 1.6)  # refined rates lie too close together for a label each
    axes.set_xticks(marked, [f"{rate:.2g}" for rate in marked], rotation=30 if len(marked) > 8 else 0)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("learning rate")
    axes.set_ylabel(MEASURES["loss"].axis)
    crosses = "; cross: diverged or failed" if gone else ""
    axes.set_title(f"ring: the rate of the comparison{crosses}", fontsize=10, color="0.25")
    axes.figure.legend(loc="outside right upper", fontsize=9, frameon=False, handlelength=4)
    return figure


def _side_by_side(places: Mapping[str, float]) -> dict[str, float]:
    """Horizontal shift of each point, since those less than 0.5 % apart would hide each other."""
    groups: list[list[str]] = []
    for point in sorted(places, key=lambda point: places[point]):
        if groups and places[point] < 1.005 * places[groups[-1][0]]:
            groups[-1].append(point)
        else:
            groups.append([point])
    return {
        point: (index - (len(group) - 1) / 2) * min(12, 130 / len(group))
        for group in groups
        for index, point in enumerate(group)
    }


def _draw_effects(
    axes: Axes, rows: list[str], said: list[str], comparisons: list[Comparison], facts: Facts
) -> None:
    """Draws one row for each pair. An interval far wider than all differences is clipped, with an arrow."""
    measure = MEASURES[facts.metric]
    scale, margin = measure.scale, measure.scale * facts.margin
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
        beside = {"va": "center", "fontsize": 10, "transform": axes.get_yaxis_transform()}
        axes.text(1.02, place, said[place], color=text_color, **beside)
    axes.set_xlim(low - pad, high + pad)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first pair at the top
    axes.set_yticks(range(len(rows)), rows, fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    left, right = "\N{LEFTWARDS ARROW} first is better", "first is worse \N{RIGHTWARDS ARROW}"
    axes.set_xlabel(f"{left}      difference in {measure.of_differences}      {right}")
    arms = Counter(c.arm for c in comparisons)
    most, under = max(arms.values()), " of a parameterization" * (len(arms) > 1)
    at_once = f" for all {most} pairs{under} at once" if most > 1 else ""
    notes = [f"difference of means, 95 % interval{at_once}"]
    notes += [f"grey: within {margin:g}{measure.suffix}, too small to matter"] if margin else []
    axes.set_title("; ".join(notes), fontsize=10, color="0.25")


def _pair(comparison: Comparison) -> str:
    """Label of the pair, "a - b", on several lines if it is long."""
    label = f"{comparison.point} \N{MINUS SIGN} {comparison.other}"
    if len(label) <= 32:
        return label
    return "\n".join(
        textwrap.wrap(comparison.point, 32) + textwrap.wrap(f"\N{MINUS SIGN} {comparison.other}", 32)
    )


def _curve(run: Record) -> dict[int, float]:
    """Evaluations by training tokens seen, without those that were not finite."""
    tokens_per_step = run.setting("train.batch_size") * run.setting("data.sequence_length")
    return {
        int(evaluation["step"] or 0) * tokens_per_step: drawing.shown(run.metric, value)
        for evaluation in run.evaluations
        if (value := evaluation.get(run.metric)) is not None
    }
