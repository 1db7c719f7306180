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
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from experiments.reporting import (
    beside_paper,
    captions,
    drawing,
    latex,
    layers,
    loops,
    numerals,
    pareto,
    placing,
    tables,
    titles,
)
from experiments.reporting.drawing import HALO, WORDS, styled
from mobilellm_jax.analysis.answer import answer
from mobilellm_jax.analysis.facts import Facts
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.records import Record, by_study, read_records
from mobilellm_jax.analysis.study import Study, study_of
from mobilellm_jax.analysis.verdicts import Comparison
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


def write(
    study: Study, standing: pareto.Pareto, workdir: str | AnyPath, formats: Collection[str] = FORMATS[:1]
) -> dict[str, Image]:
    """Writes figures and tables (CSV) of one study at one preset. Returns the figures by suffix.

    `formats` are those of `FORMATS` to write.

    Raises:
      UserError: a file cannot be written.
    """
    drawn = {
        "": ("Final values and differences", outcome(study)),
        "-paper": ("The paper's points beside ours", beside_paper.draw(study)),
        "-costs": ("Final values against parameters and FLOPs", costs(study)),
        "-pareto": ("Final values against latency and bytes", pareto.draw(study, standing)),
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
    comparisons = study.verdict.comparisons
    rows = [textwrap.fill(drawing.unbroken(titles.says(c, study)), 72) for c in comparisons]
    labels = list(study.points)
    heights = [drawing.categories_height(labels) if drawing.places_of(study) is None else 3.0]  # inches
    if rows:
        lines = max(row.count("\n") for row in rows) + 1
        heights.append(1.05 + len(rows) * (0.27 + 0.16 * lines))
    figure = drawing.framed(answer(study), captions.measured(study), captions.caption(study), sum(heights))
    # Each panel in a figure of its own: the long labels of one would narrow the other.
    parts = np.ravel(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False))
    drawing.draw_values(parts[0].subplots(), study)
    if rows:
        _draw_effects(parts[1].subplots(), rows, comparisons, study.facts)
    return figure


@styled
def costs(study: Study) -> Figure | None:
    """Draws final values against parameters and against training FLOPs, whichever differ; None if neither.

    Equal values say nothing, however they are drawn.
    """
    estimates, order = study.verdict.estimates, list(study.points)
    points = {label: study.points[label] for label in order if label in estimates}
    places = {
        "non-embedding parameters": {p: of.parameters["non_embedding"] for p, of in points.items()},
        "training FLOPs of a run": {
            p: max(r.tokens_seen * r.train_flops_per_token for r in of.comparison) for p, of in points.items()
        },
    }
    places = {name: of for name, of in places.items() if not drawing.are_equal(of.values())}
    if not places:
        return None
    looks = {point: drawing.look(order.index(point)) for point in points}
    height = max(2.3, placing.labels_height(points))
    fronts: dict[str, list[str]] = {}
    for name, of in places.items():
        fronts.setdefault(titles.front(of, study), []).append(name.partition(" of")[0])
    title = "; ".join(f"{front} for their {' and '.join(names)}" for front, names in fronts.items())
    shifts = {name: _side_by_side(of) for name, of in places.items()}
    apart = any(shift for of in shifts.values() for shift in of.values())
    text = captions.measured(study) + ". Designs at nearly the same x are drawn a little apart." * apart
    total = (height + 0.6) * len(places)
    figure = drawing.framed(title, text, captions.caption(study), total)
    for axes, (name, of) in zip(np.ravel(figure.subplots(len(places), 1)), places.items(), strict=True):
        for point, place in of.items():
            drawing.draw_point(
                axes, place, points[point], estimates[point], looks[point], shifts[name][point]
            )
        low, high = min(of.values()), max(of.values())
        axes.set_xscale("log", base=2)
        axes.set_xlim(low / (high / low) ** 0.15, high * (high / low) ** 0.15)
        ticks = drawing.apart(of.values(), (high / low) ** 0.16)
        axes.set_xticks(ticks, [tables.quantity(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(y=0.08)
        axes.set_xlabel(name)
        axes.set_ylabel(MEASURES[study.facts.metric].axis)
        ends = {p: (of[p], drawing.shown(study.facts.metric, estimates[p].mean)) for p in of}
        placing.label_ends(axes, ends, looks, height, shifts=shifts[name])
    return figure


@styled
def curves(study: Study) -> Figure:
    """Draws the held-out evaluations during training: each seed and the mean of every point."""
    metric, order = study.facts.metric, list(study.points)
    measure = MEASURES[metric]
    notes = {label: drawing.absent(point.comparison) for label, point in study.points.items()}
    looks = {label: drawing.look(order.index(label)) for label in order}
    height = max(3.4, placing.labels_height(order, notes) + 0.2)
    start = "" if measure.is_share else "; the start is cut off"
    subtitle = f"{measure.axis[0].upper()}{measure.axis[1:]}: thick lines are means, thin ones seeds{start}"
    figure = drawing.framed(titles.last(study), subtitle, captions.caption(study), height + 0.5)
    axes = figure.subplots()
    known = [curve for point in study.points.values() for run in point.finished if (curve := _curve(run))]
    # Values of finished runs in the second half of training.
    late = [value for curve in known for at, value in curve.items() if at >= max(curve) / 2]
    ends: dict[str, tuple[float, float]] = {}
    for label, point in study.points.items():
        seeds = [_curve(run) for run in point.comparison]
        finished = [_curve(run) for run in point.finished]
        for curve in seeds:
            axes.plot(list(curve), list(curve.values()), color=looks[label]["color"], lw=0.6, alpha=0.4)
        common = sorted(set.intersection(*(set(curve) for curve in finished))) if finished else []
        means = [float(np.mean([curve[tokens] for curve in finished])) for tokens in common]
        axes.plot(common, means, **looks[label], ms=4.5, lw=1.6, label=label)
        if common:
            ends[label] = common[-1], means[-1]
    if late and not measure.is_share:  # the start, or a diverging run, would squeeze the rest
        low, high = min(late), max(late)
        axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
        axes.set_xlim(left=0.3 * max(max(curve) for curve in known))
    axes.set_xlabel("training tokens seen")
    axes.set_ylabel(measure.axis)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tables.quantity(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    right, top = axes.get_xlim()[1], max(axes.get_ylim())
    axes.set_xlim(right=right)
    placing.label_ends(axes, {label: ends.get(label, (right, top)) for label in order}, looks, height, notes)
    return figure


@styled
def learning_rates(study: Study) -> Figure | None:
    """Draws the loss against the learning rate of every tuned point; None if no point was tuned."""
    searches, order = study.verdict.tuning, list(study.points)
    if not searches:
        return None
    best: list[float] = []
    looks = {point: drawing.look(order.index(point)) for point in searches}
    height = max(3.4, placing.labels_height(searches) + 0.2)
    gone: dict[float, list[str]] = {}  # by rate, the colours of the points that diverged or failed
    rates = sorted({rate for tuning in searches.values() for rate, _ in tuning.curve})
    is_lost = any(value is None for tuning in searches.values() for _, value in tuning.curve)
    crosses = "; cross: diverged or failed" if is_lost else ""
    subtitle = f"Held-out loss after tuning runs (nats per token); ring: rate of the comparison{crosses}"
    figure = drawing.framed(titles.best_rates(searches), subtitle, captions.caption(study), height + 0.5)
    axes, ends = figure.subplots(), {}
    for point, tuning in searches.items():
        look = looks[point]
        tried = {rate: value for rate, value in tuning.curve if value is not None}
        axes.plot(list(tried), list(tried.values()), **look, ms=4.5, lw=1.5, label=point)
        best += [min(tried.values())] if tried else []
        if tried:
            ends[point] = list(tried.items())[-1]
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
    axes.set_xticks(marked, [numerals.rate(rate) for rate in marked], rotation=30 if len(marked) > 8 else 0)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("learning rate")
    axes.set_ylabel(MEASURES["loss"].axis)
    right, top = axes.get_xlim()[1], axes.get_ylim()[1]
    axes.set_xlim(right=right)
    placing.label_ends(axes, {p: ends.get(p, (right, top)) for p in searches}, looks, height)
    return figure


def _side_by_side(places: Mapping[str, float]) -> dict[str, float]:
    """Horizontal shift in points of each point, since those less than 0.5 % apart would hide each other."""
    groups: list[list[str]] = []
    for point in sorted(places, key=lambda point: places[point]):
        if groups and places[point] < 1.005 * places[groups[-1][0]]:
            groups[-1].append(point)
        else:
            groups.append([point])
    return {
        point: (index - (len(group) - 1) / 2) * min(8, 32 / len(group))
        for group in groups
        for index, point in enumerate(group)
    }


def _draw_effects(axes: Axes, rows: list[str], comparisons: list[Comparison], facts: Facts) -> None:
    """Draws one row for each pair, with what is found of it.

    An interval far wider than all differences is clipped, with an arrow. As in the panel of the values, the
    side of the better ones is left of a loss, and right of a share of right answers.
    """
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
    arrows = "><" if measure.is_share else "<>"  # at the low and the high end
    for place, (row, comparison) in enumerate(zip(rows, comparisons, strict=True)):
        color, text_color, marker, fill = WORDS[comparison.word]
        difference = comparison.difference
        if difference and difference.low is not None and difference.high is not None:
            start, stop = max(scale * difference.low, low), min(scale * difference.high, high)
            axes.plot([start, stop], [place] * 2, color=color, lw=2)
            is_cut = start > scale * difference.low, stop < scale * difference.high
            axes.plot(start, place, arrows[0] if is_cut[0] else "|", color=color, ms=7, mew=2)
            axes.plot(stop, place, arrows[1] if is_cut[1] else "|", color=color, ms=7, mew=2)
        if difference:
            axes.plot(scale * difference.mean, place, marker, color=color, ms=7, mfc=fill, mew=1.8)
        above = {"va": "bottom", "fontsize": 9, "linespacing": 1.05, "color": text_color}
        lifted = axes.get_yaxis_transform() + placing.raised(axes, 7)
        axes.text(0.0, place, row, transform=lifted, path_effects=HALO, **above)
    axes.set_xlim(*((high + pad, low - pad) if measure.is_share else (low - pad, high + pad)))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(len(rows) - 0.6, -0.8)  # the first pair at the top
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    ends_said = ["\N{LEFTWARDS ARROW} first is better", "first is worse \N{RIGHTWARDS ARROW}"]
    if measure.is_share:
        ends_said = ["\N{LEFTWARDS ARROW} first is worse", "first is better \N{RIGHTWARDS ARROW}"]
    axes.set_xlabel(f"{ends_said[0]}        {ends_said[1]}\ndifference in {measure.of_differences}")
    arms = Counter(c.arm for c in comparisons)
    most, under = max(arms.values()), " of a parameterization" * (len(arms) > 1)
    at_once = f" for all {most} pairs{under} at once" if most > 1 else ""
    notes = [f"Difference of means, 95 % interval{at_once}"]
    notes += [f"grey: within {margin:g}{measure.suffix}, too small to matter"] if margin else []
    title = textwrap.fill("; ".join(notes), 74)
    axes.set_title(title, fontsize=9, color="0.3", loc="left", x=0.0)


def _curve(run: Record) -> dict[int, float]:
    """Evaluations by training tokens seen, without those that were not finite."""
    tokens_per_step = run.setting("train.batch_size") * run.setting("data.sequence_length")
    return {
        int(evaluation["step"] or 0) * tokens_per_step: drawing.shown(run.metric, value)
        for evaluation in run.evaluations
        if (value := evaluation.get(run.metric)) is not None
    }
