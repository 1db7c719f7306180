"""Quality against latency and against bytes: which designs no other one beats in both.

The latency of a point is what its records say, else what a table in <workdir>/latency/ predicts, the one that
was measured last; without either, bytes alone are shown. Of quantized runs, a table of llama.cpp there says
how long a token takes in as many bits.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.reporting import captions, drawing, placing, tables, titles
from experiments.reporting.drawing import styled
from mobilellm_jax.analysis import statistics
from mobilellm_jax.analysis.facts import Point
from mobilellm_jax.analysis.latency_table import Table, read_table
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.statistics import Estimate
from mobilellm_jax.analysis.study import Study
from mobilellm_jax.analysis.wording import format_estimate
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.costs.latency import TIMES
from mobilellm_jax.storage.files import AnyPath, files_below, path_of
from mobilellm_jax.validation import from_mapping

FRONT = (
    "A design is on the front if no other one of its parameterization costs at most as much and has a better "
    "mean; behind another one if that one does and their 95 % intervals do not overlap; open if they do. "
    "Bytes are those of all weights in float32, and in integers and scales for the schemes of --quantize."
)
_NAMES = {"decode_ms": "ms of a token", "prefill_ms": "ms of a prompt"}
# What llama.cpp has for a scheme of --quantize; "": the model as it was trained.
_LLAMA_CPP = {"": "f16", "w8": "q8_0", "w8a8": "q8_0", "w4:32": "q4_0"}

Named = tuple[Table, str]  # and the name of its file


@dataclasses.dataclass(frozen=True)
class Cost:
    """One kind of cost of every point, and of its quantized copies.

    Attributes:
      name: with its unit.
      of: by label of a point, or of a quantized point.
      error: how far a predicted cost is from a measured one, as a median; 0 for one that is known.
      source: where it comes from; "" if it is counted.
    """

    name: str
    of: Mapping[str, float]
    error: float = 0.0
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A point, or a quantized point, with its final values over the seeds."""

    label: str
    point: str
    scheme: str
    estimate: Estimate


@dataclasses.dataclass(frozen=True)
class Pareto:
    """All entries of a study and their costs."""

    entries: Mapping[str, Entry]
    costs: tuple[Cost, ...]


def pareto_of(study: Study, workdir: str | AnyPath) -> Pareto:
    """Collects costs and final values.

    Raises:
      UserError: a table in <workdir>/latency/ cannot be read.
    """
    estimates = study.verdict.estimates
    points = {label: point for label, point in study.points.items() if label in estimates}
    entries = {label: Entry(label, label, "", estimates[label]) for label in points}
    sizes = {label: 4.0 * point.parameters["total"] for label, point in points.items()}
    for label, point in points.items():
        for scheme, values in _quantized(study, point).items():
            key = f"{label}, {scheme}"
            found = [entry["loss"] for entry in values]
            entries[key] = Entry(key, label, scheme, statistics.mean_and_interval(found))
            sizes[key] = float(values[0]["bytes"])
    files = [path for path in files_below(path_of(workdir) / "latency") if path.suffix == ".json"]
    tables_ = [(read_table(path), path.name) for path in files]
    costs = *_latency(points, tables_), *_in_llama_cpp(entries, points, tables_)
    return Pareto(entries, (*costs, Cost("bytes of the weights", sizes)))


def _quantized(study: Study, point: Point) -> dict[str, list[dict]]:
    """What quantized runs of a point lost, by scheme; {} where the study is not about the loss."""
    if study.facts.metric != "loss":
        return {}
    found: dict[str, list[dict]] = {}
    for run in point.finished:
        for scheme, entry in (run.quantized or {}).items():
            found.setdefault(scheme, []).append(entry)
    return found


def _latency(points: Mapping[str, Point], tables_: Sequence[Named]) -> list[Cost]:
    """Milliseconds of a token and of a prompt; [] where nobody knows."""
    known = {label: point.finished[0].latency for label, point in points.items() if point.finished}
    there = {label: of for label, of in known.items() if of}
    if there and len(there) == len(points):
        first = next(iter(there.values()))
        return [
            Cost(
                _NAMES[time],
                {label: of[time] for label, of in there.items()},
                max(of["median_error"][time] for of in there.values()),
                f"{first['table']} ({first['device']})",
            )
            for time in TIMES
        ]
    shapes = _shapes(points) if tables_ else {}
    newest = _newest(tables_, {model.compute_dtype for model, _ in shapes.values()})
    if newest is None:
        return []
    table, source = newest
    latency = table.latency()
    found = {label: latency.predict(*shape) for label, shape in shapes.items()}
    errors = [latency.median_errors(model) for model, _ in shapes.values()]
    return [
        Cost(
            _NAMES[time],
            {label: of[time] for label, of in found.items()},
            max(of[time] for of in errors),
            source,
        )
        for time in TIMES
    ]


def _in_llama_cpp(
    entries: Mapping[str, Entry], points: Mapping[str, Point], tables_: Sequence[Named]
) -> list[Cost]:
    """Milliseconds of a token in llama.cpp; [] where nothing is quantized, or nobody knows."""
    kinds = {label: _LLAMA_CPP[of.scheme] for label, of in entries.items() if of.scheme in _LLAMA_CPP}
    newest = _newest(tables_, set(kinds.values()))
    if newest is None or not any(of.scheme for of in entries.values()):
        return []
    table, source = newest
    shapes, latency = _shapes(points), {kind: table.latency(kind) for kind in set(kinds.values())}
    return [
        Cost(
            "ms of a token in llama.cpp",
            {
                label: latency[kind].predict(*shapes[entries[label].point])["decode_ms"]
                for label, kind in kinds.items()
            },
            max(of.fits[kind]["decode_ms"].median_error for kind, of in latency.items()),
            source,
        )
    ]


def _shapes(points: Mapping[str, Point]) -> dict[str, tuple[ModelConfig, int]]:
    """Model and slots of the cache of every point; the model alone, as older configs lack other fields."""
    return {
        label: (
            from_mapping(ModelConfig, point.config["model"]),
            point.config["data"]["sequence_length"],
        )
        for label, point in points.items()
    }


def _newest(tables_: Sequence[Named], kinds: set[str]) -> tuple[Table, str] | None:
    """The table of these types of weights that was measured last, and what it is, for people."""
    found = [(table, name) for table, name in tables_ if kinds <= set(table.fits)]
    if not found:
        return None
    table, name = max(found, key=lambda pair: pair[0].created)
    return table, f"{name} ({table.title})"


def standing(pareto: Pareto, cost: Cost, arms: Mapping[str, str | None]) -> dict[str, str]:
    """Says of every entry that has this cost where it stands: "front", "behind <entry>" or "open".

    Args:
      arms: parameterization of each point; those of others do not count.
    """
    entries = {label: entry for label, entry in pareto.entries.items() if label in cost.of}
    said = {}
    for label, entry in entries.items():
        better = [
            other
            for other in entries.values()
            if arms[other.point] == arms[entry.point]
            and cost.of[other.label] <= cost.of[label]
            and other.estimate.mean < entry.estimate.mean
        ]
        apart = [other for other in better if _ends(other.estimate)[1] < _ends(entry.estimate)[0]]
        if not better:
            said[label] = "front"
        elif apart:
            said[label] = f"behind {min(apart, key=lambda other: other.estimate.mean).label}"
        else:
            said[label] = "open"
    return said


def _ends(estimate: Estimate) -> tuple[float, float]:
    """The interval; with one seed there is none, so nothing lies apart from it."""
    half = float("inf") if estimate.half_width is None else estimate.half_width
    return estimate.mean - half, estimate.mean + half


def columns(study: Study, pareto: Pareto) -> tables.Columns:
    """One row for each entry: final value, and each cost with its standing."""
    arms = {label: point.arm for label, point in study.points.items()}
    found: tables.Columns = {
        "point": list(pareto.entries),
        MEASURES[study.facts.metric].column: [
            format_estimate(entry.estimate, study.facts.metric) for entry in pareto.entries.values()
        ],
    }
    for cost in pareto.costs:
        said = standing(pareto, cost, arms)
        found[cost.name] = [tables.quantity(cost.of[e]) if e in cost.of else "" for e in pareto.entries]
        found[f"by {cost.name}"] = [said.get(label, "") for label in pareto.entries]
    return found


def sources(pareto: Pareto) -> str:
    """Where predicted costs come from, and how far off they are; how to get them where there are none."""
    predicted = [cost for cost in pareto.costs if cost.source]
    if not predicted:
        return (
            "No latency: measure a table on an idle machine with python -m experiments.latency "
            "--out=<workdir>/latency/<name>.json, and make this report again."
        )
    errors = " and ".join(f"{cost.name} {cost.error:.0%}" for cost in predicted)
    sources_ = dict.fromkeys(cost.source for cost in predicted)
    return (
        f"Latencies are predicted, not measured, from {' and '.join(sources_)}: a prompt of half a row, and "
        f"a token with a cache of a row, at batch 1. Median error for shapes that its fit has not seen: "
        f"{errors}; the horizontal bars."
    )


@styled
def draw(study: Study, pareto: Pareto) -> Figure | None:
    """Draws final values against the time of a token and bytes, with the front of each parameterization.

    The time of a prompt takes the place of that of a token where a study holds it equal. None for one point,
    and where neither differs.
    """
    if len(pareto.entries) < 2:
        return None
    left_out = _NAMES["decode_ms" if study.facts.matched == "prefill_ms" else "prefill_ms"]
    costs = [
        cost for cost in pareto.costs if cost.name != left_out and not drawing.are_equal(cost.of.values())
    ]
    if not costs:
        return None
    order = list(study.points)
    looks = {label: drawing.look(order.index(label)) for label in study.points}
    unquantized = [label for label, entry in pareto.entries.items() if not entry.scheme]
    fronts: dict[str, list[str]] = {}
    for cost in costs:
        best = titles.front({label: cost.of[label] for label in unquantized if label in cost.of}, study)
        fronts.setdefault(best, []).append(cost.name)
    title = "; ".join(f"{best} for their {' and '.join(names)}" for best, names in fronts.items())
    text = f"{captions.measured(study).partition(', every')[0]}. Line: the front" + (
        "; hollow: quantized" if len(unquantized) < len(pareto.entries) else ""
    )
    height = max(2.3, placing.labels_height(unquantized))
    caption = f"{captions.caption(study)}\n{sources(pareto)}"
    figure = drawing.framed(title, text, caption, (height + 0.6) * len(costs))
    arms = {label: point.arm for label, point in study.points.items()}
    for axes, cost in zip(np.ravel(figure.subplots(len(costs), 1)), costs, strict=True):
        _draw_fronts(axes, study, pareto, cost, arms)
        for entry in pareto.entries.values():
            if entry.label in cost.of:
                _draw_entry(axes, study.facts.metric, entry, cost, looks[entry.point])
        _label(axes, cost)
        axes.margins(y=0.08)
        axes.set_ylabel(MEASURES[study.facts.metric].axis)
        ends = {
            label: (cost.of[label], drawing.shown(study.facts.metric, pareto.entries[label].estimate.mean))
            for label in unquantized
            if label in cost.of
        }
        placing.label_ends(axes, ends, looks, height)
    return figure


def _label(axes: Axes, cost: Cost) -> None:
    """Makes the x axis logarithmic, with room for the bars, and labels at some of the costs."""
    low, high = min(cost.of.values()), max(cost.of.values())
    ratio = max(high / low, 1.1)  # at least 10 %, so that equal costs look equal
    axes.set_xscale("log")
    axes.set_xlim(low * (1 - cost.error) / ratio**0.15, high * (1 + cost.error) * ratio**0.15)
    ticks = drawing.apart(cost.of.values(), ratio**0.3)
    axes.set_xticks(ticks, [tables.quantity(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(cost.name)


def _draw_entry(axes: Axes, metric: str, entry: Entry, cost: Cost, look: Mapping[str, Any]) -> None:
    look = {name: value for name, value in look.items() if name != "ls"}
    half = entry.estimate.half_width
    at = cost.of[entry.label]
    axes.errorbar(
        at,
        drawing.shown(metric, entry.estimate.mean),
        None if half is None else half * MEASURES[metric].scale,
        at * cost.error or None,
        **look,
        ls="none",
        ms=7,
        capsize=3,
        elinewidth=1,
        mfc="white" if entry.scheme else look["color"],
    )
    if entry.scheme:
        axes.annotate(
            entry.scheme,
            (at, drawing.shown(metric, entry.estimate.mean)),
            textcoords="offset points",
            xytext=(5, 4),
            fontsize=8,
            color="0.35",
        )


def _draw_fronts(
    axes: Axes, study: Study, pareto: Pareto, cost: Cost, arms: Mapping[str, str | None]
) -> None:
    said = standing(pareto, cost, arms)
    for place, arm in enumerate(dict.fromkeys(arms.values())):
        front = [
            (cost.of[label], drawing.shown(study.facts.metric, pareto.entries[label].estimate.mean))
            for label, word in said.items()
            if word == "front" and arms[pareto.entries[label].point] == arm
        ]
        xs, ys = zip(*sorted(front), strict=True) if front else ((), ())
        axes.step(xs, ys, where="post", color="0.6", lw=1.2, ls=drawing.DASHES[place], zorder=1)


def block(study: Study, pareto: Pareto) -> list[str | tables.Columns]:
    """What a report says below the figure; [] for a study without a finished run."""
    return [sources(pareto), FRONT, columns(study, pareto)] if pareto.entries else []
