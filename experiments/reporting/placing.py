"""Places in a figure: shifts by points, and names at the ends of lines that do not hide each other."""

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.transforms import ScaledTranslation

LABEL = 0.155  # inches, height of a line of a label at the end of a line


def moved(axes: Axes, right: float, up: float = 0.0) -> Any:
    """Data transform, shifted by points (1/72 inch)."""
    return axes.transData + ScaledTranslation(right / 72, up / 72, axes.figure.dpi_scale_trans)


def raised(axes: Axes, up: float) -> Any:
    """A shift upwards by points (1/72 inch), to be added to a transform."""
    return ScaledTranslation(0, up / 72, axes.figure.dpi_scale_trans)


def label_ends(
    axes: Axes,
    ends: Mapping[str, tuple[float, float]],
    looks: Mapping[str, Mapping[str, Any]],
    height: float,
    notes: Mapping[str, str] | None = None,
    shifts: Mapping[str, float] | None = None,
) -> None:
    """Writes the name of each line to the right of the axes, in the order of its end, with a leader to it.

    Args:
      ends: place of the end of each line, in data; the limits of the axes must be final.
      height: of the axes in inches, about.
      notes: what follows a name in brackets.
      shifts: of the ends to the right, in points (1/72 inch).
    """
    (left, right), (low, high) = sorted(axes.get_xlim()), sorted(axes.get_ylim())  # also scales the axes
    to_axes = axes.transScale + axes.transLimits
    names = {name: _wrapped_name(name, (notes or {}).get(name, "")) for name in ends}
    tall = [(0.5 * LABEL * (1 + name.count("\n"))) / height for name in names.values()]
    places = {name: float(np.clip(to_axes.transform(end)[1], 0, 1)) for name, end in ends.items()}
    put = spread(places, dict(zip(names, tall, strict=True)))
    for name, (x, y) in ends.items():
        mark = {k: v for k, v in looks[name].items() if k in ("color", "marker")}
        end = min(max(x, left), right), min(max(y, low), high)
        leader = {
            "arrowstyle": "-",
            "color": mark["color"],
            "lw": 0.7,
            "alpha": 0.7,
            "shrinkA": 0,
            "shrinkB": 0,
        }
        begin = moved(axes, (shifts or {}).get(name, 0.0))
        axes.annotate("", end, (1.045, put[name]), begin, "axes fraction", arrowprops=leader)
        axes.plot(1.045, put[name], **mark, ms=5, ls="none", transform=axes.transAxes, clip_on=False)
        beside = {"fontsize": 8.5, "va": "center", "linespacing": 0.95, "transform": axes.transAxes}
        axes.text(1.075, put[name], names[name], **beside)


def labels_height(labels: Iterable[str], notes: Mapping[str, str] | None = None) -> float:
    """Height in inches that `label_ends` needs."""
    return sum(LABEL * (1 + _wrapped_name(name, (notes or {}).get(name, "")).count("\n")) for name in labels)


def _wrapped_name(name: str, note: str) -> str:
    return textwrap.fill(name + (f" ({note})" if note else ""), 20)


def spread(places: Mapping[str, float], half: Mapping[str, float]) -> dict[str, float]:
    """Moves places apart by half heights, as little as it takes, in their order; about 0 to 1."""
    order = sorted(places, key=lambda name: places[name])
    blocks: list[tuple[list[str], float]] = []  # names that touch, and their lower edge
    for name in order:
        names, low = [name], places[name] - half[name]
        while blocks:
            before, edge = blocks[-1]
            if edge + 2 * sum(half[n] for n in before) <= low:
                break
            names = before + names
            offsets = np.cumsum([0.0, *(2 * half[n] for n in names)])
            low = float(np.mean([places[n] - half[n] - o for n, o in zip(names, offsets, strict=False)]))
            blocks.pop()
        total = 2 * sum(half[n] for n in names)
        blocks.append((names, max(min(low, 1.02 - total), -0.02) if total <= 1.04 else 0.5 - total / 2))
    put = {}
    for names, low in blocks:
        for name in names:
            put[name] = low + half[name]
            low += 2 * half[name]
    return put
