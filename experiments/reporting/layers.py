"""What the layers of trained models do: the figure of one run, and table and figure of a study's designs."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.reporting import captions, drawing, placing
from experiments.reporting.drawing import styled
from experiments.reporting.tables import Columns
from mobilellm_jax.analysis.layers import layer_use
from mobilellm_jax.analysis.statistics import Estimate
from mobilellm_jax.analysis.study import Study

USE = (
    "Effective depth is (sum of the roots of the layers' costs)^2 / (sum of the costs): k where k layers "
    "cost the same and the others nothing. A layer costs what the held-out loss rises by without it, in nats "
    "per token; of uses of one block in a row, the j-th costs what the loss rises by where j - 1 of them "
    "remain instead of j. ± is a 95 % t interval over the seeds; the interval over held-out documents (or "
    "rows, where there are no documents) is that of a single run, a mean over the seeds. Swap is the rise of "
    "the loss where two neighbours are exchanged; cosine that of a layer's input and output; distance the "
    "number of tokens that attention looks back, and that of uniform attention: means over layers and heads."
)
_COST, _LENS = "rise of the loss (nats per token)", "loss (nats per token)"
_LINEAR = 0.01  # nats per token, below which the axis of costs is linear


def table(study: Study) -> Columns:
    """One row for each design; {} if no run was diagnosed."""
    found = layer_use(study.points)
    if not found:
        return {}
    return {
        "point": [of.point for of in found],
        "effective depth": [_estimate(of.depth) for of in found],
        "of layers": [str(of.layers) for of in found],
        "share": [f"{of.depth.mean / of.layers:.0%}" for of in found],
        "over documents": ["" if of.low is None else f"[{of.low:.2f}, {of.high:.2f}]" for of in found],
        "seeds": [str(of.depth.n) for of in found],
        "costliest layer": [_layer(of.costs, max) for of in found],
        "cheapest layer": [_layer(of.costs, min) for of in found],
        "swap, mean": [f"{sum(of.swapped) / len(of.swapped):+.4f}" if of.swapped else "" for of in found],
        "cosine": [f"{sum(of.cosine) / of.layers:.3f}" for of in found],
        "distance": [f"{sum(of.distance) / of.layers:.1f} of {of.uniform:.1f}" for of in found],
    }


def _estimate(of: Estimate) -> str:
    return f"{of.mean:.2f}" + ("" if of.half_width is None else f" ± {of.half_width:.2f}")


def _layer(costs: Sequence[float], which: Any) -> str:
    """The largest or smallest cost and its layer, counted from 1."""
    cost = which(costs)
    return f"{costs.index(cost) + 1}: {cost:+.4f}"


@styled
def draw(study: Study) -> Figure | None:
    """Draws what every layer costs, and the logit lens, a line for each design; None without diagnostics."""
    found = layer_use(study.points)
    if not found:
        return None
    order = list(study.points)
    looks = {of.point: drawing.look(order.index(of.point)) for of in found}
    depths = {of.point: f"depth {of.depth.mean:.2f}" for of in found}
    height = max(2.6, placing.labels_height(looks, depths))
    used = max(found, key=lambda of: of.depth.mean)
    title = f"{used.point!r} uses {used.depth.mean:.2f} of its {used.layers} layers"
    title += ", more than any other" * (len(found) > 1)
    subtitle = "Above: what leaving one layer out costs. Below: the logit lens. In brackets: effective depth"
    figure = drawing.framed(title, subtitle, captions.caption(study), 2 * (height + 0.6))
    upper, lower = figure.subplots(2, 1)
    for of in found:
        _costs(upper, of.costs, looks[of.point])
        lower.plot(range(of.layers + 1), of.lens, **looks[of.point], ms=5, lw=1.5)
    lower.set_ylabel(_LENS)
    for axes in (upper, lower):
        _layers(axes)
    right = {of.point: (of.layers, of.costs[-1]) for of in found}
    placing.label_ends(upper, right, looks, height, depths)
    placing.label_ends(lower, {of.point: (of.layers, of.lens[-1]) for of in found}, looks, height, depths)
    return figure


@styled
def draw_run(entry: Mapping[str, Any], name: str) -> Figure:
    """Draws the diagnostics of one run, as its record has them."""
    depth, layers = entry["effective_depth"], len(entry["plan"])
    known = "" if depth["low"] is None else f" [{depth['low']:.2f}, {depth['high']:.2f}]"
    title = f"Effective depth {depth['value']:.2f}{known} of {layers} layers"
    caption = (
        f"{name}, step {entry['step']:,}: {entry['targets']:,} tokens of {entry['text']}, "
        f"{entry['loss']:.4f} nats per token; blocks {' '.join(map(str, entry['plan']))}"
    )
    text = textwrap.fill(caption, 74, max_lines=5, placeholder=" ...")
    figure = drawing.framed(title, "Four views of the layers applied, from input to output", text, 11.0)
    panels = figure.subplots(4, 1)
    costs, lens, cosine, distance = panels.ravel()
    places = range(1, layers + 1)
    _costs(costs, entry["costs"], {**drawing.look(0), "label": "without this layer"})
    if layers > 1:
        rises = [loss - entry["loss"] for loss in entry["swapped"]]
        between = [place + 0.5 for place in places[:-1]]
        costs.plot(between, rises, **drawing.look(1), ms=5, lw=1, label="two layers exchanged")
    costs.legend(fontsize=9, frameon=False)
    lens.plot(range(layers + 1), entry["lens"], **drawing.look(0), ms=5, lw=1.5)
    lens.set_ylabel(_LENS)
    lens.set_title("logit lens", fontsize=10, color="0.25")
    cosine.plot(places, entry["cosine"], **drawing.look(0), ms=5, lw=1.5)
    cosine.set_ylabel("cosine of input and output")
    heads = entry["distance"]
    for place, of_layer in zip(places, heads, strict=True):
        distance.plot([place] * len(of_layer), of_layer, "o", color=drawing.COLORS[0], ms=5, alpha=0.6)
    means = [sum(of_layer) / len(of_layer) for of_layer in heads]
    distance.plot(places, means, color=drawing.COLORS[0], lw=1.5, label="mean; dots are heads")
    distance.axhline(entry["uniform_distance"], color="0.4", ls="--", label="uniform attention")
    distance.set_ylabel("attention looks back (tokens)")
    distance.legend(fontsize=9, frameon=False)
    for axes in panels.ravel():
        _layers(axes)
    return figure


def _costs(axes: Axes, costs: Sequence[float], look: Mapping[str, Any]) -> None:
    axes.plot(range(1, len(costs) + 1), costs, **look, ms=5, lw=1.5)
    axes.axhline(0, color="0.3", lw=1)
    axes.set_yscale("symlog", linthresh=_LINEAR)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel(_COST)


def _layers(axes: Axes) -> None:
    axes.set_xlabel("layer applied")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
