"""The figures of a study of shape: differences by horizon, loss by aspect ratio, the worth of a repeat."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from scipy import stats

from experiments.reporting import drawing, tables
from mobilellm_jax.analysis.cells import Cell, aspect_names, is_plain, moderated, size_of
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.shape_findings import Findings
from mobilellm_jax.analysis.shape_fit import Fit

PUBLISHED = 0.46  # exponent of a repeat, arXiv 2604.21106
_ORDERS = ("immediate", "repeat_all", "reverse", "equal depth, unshared", "equal FLOPs, unshared")


@drawing.styled
def differences(found: Findings) -> Figure | None:
    """Draws loss differences against tokens per parameter; a column for each size. None without any."""
    present = {(one.cell.arm, one.row) for one in found.differences}
    rows = [(arm, row) for arm in found.arms for row in sorted({row for a, row in present if a == arm})]
    if not rows:
        return None
    caption = (
        f"Below 0: the design is better. Grey: the margin, ±{found.margin:g} nats. Bars: 95 % for all "
        f"{len(found.differences)} differences at once (moderated t). D/L: width over layers, a range over "
        f"sizes; compared with {found.differences[0].against}. Shared designs and their two controls are "
        "compared with the unshared design of their width, which has half the layers. Long bars are cut."
    )
    figure = drawing.framed(
        _differ(found),
        "Loss difference in nats per token, against training tokens per parameter",
        caption,
        0.2 + 2.3 * len(rows),
        _width(len(found.sizes)),
    )
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    looks_of = _looks(found)
    for (arm, row), part in zip(rows, parts, strict=True):
        of_row = part.subplots(1, len(found.sizes), sharey=True, squeeze=False)[0]
        for size, axes in zip(found.sizes, of_row, strict=True):
            _draw_differences(axes, found, arm, row, size, looks_of)
            axes.set_title(f"{tables.quantity(size_of(found.cells, size))} parameters", fontsize=9)
        used = {d.label for d in found.differences if (d.cell.arm, d.row) == (arm, row)}
        handles = [
            Line2D([], [], **look, ms=5, lw=1.2, label=name)
            for name, look in looks_of.items()
            if name in used
        ]
        looks: dict[str, Any] = {"fontsize": 8, "title_fontsize": 9, "frameon": False, "alignment": "left"}
        title = f"{arm}: {row}".removeprefix(": ")
        part.legend(handles=handles, title=title, loc="outside upper left", ncols=3, **looks)
        of_row[0].set_ylabel("nats per token", fontsize=9)
    parts[-1].supxlabel("tokens per parameter", fontsize=9)
    return figure


def _differ(found: Findings) -> str:
    """How many differences are sure and matter, without a full stop."""
    sure = [d for d in found.differences if d.is_sure]
    better = sum(d.mean < 0 for d in sure)
    return (
        f"{len(sure)} of {len(found.differences)} differences are sure: {better} for the design, "
        f"{len(sure) - better} against it"
    )


def _looks(found: Findings) -> dict[str, dict[str, Any]]:
    """Colour and marker by label: of the aspect ratios, widest first, and of the shared and controls."""
    ratios = dict.fromkeys(aspect_names(found.cells).values())
    return {name: drawing.look(place) for names in (ratios, _ORDERS) for place, name in enumerate(names)}


def _draw_differences(
    axes: Axes, found: Findings, arm: str, row: str, size: str, looks_of: Mapping[str, dict[str, Any]]
) -> None:
    here = [d for d in found.differences if (d.cell.arm, d.row, d.cell.size) == (arm, row, size)]
    axes.axhspan(-found.margin, found.margin, color="0.9", zorder=0)
    axes.axhline(0, color="0.4", lw=0.8)
    looks = {name: look for name, look in looks_of.items() if any(d.label == name for d in here)}
    for place, (name, look) in enumerate(looks.items()):
        line = sorted((d for d in here if d.label == name), key=lambda d: d.cell.horizon)
        at = [d.cell.horizon * 1.09 ** (place - (len(looks) - 1) / 2) for d in line]  # side by side
        bars = [d.half_width or 0.0 for d in line]
        axes.errorbar(at, [d.mean for d in line], bars, **look, ms=4, lw=1.2, capsize=2, elinewidth=0.9)
    horizons = sorted({round(cell.horizon, 1) for cell in found.cells})
    axes.set_xlim(horizons[0] / 1.5, horizons[-1] * 1.5)  # the same for all sizes
    of_row = [d for d in found.differences if (d.cell.arm, d.row) == (arm, row)]
    room = 3 * float(np.median([d.half_width or 0.0 for d in of_row]))  # or one long bar sets the scale
    ends = [d.mean + sign * min(d.half_width or 0.0, room) for d in of_row for sign in (-1, 1)]
    axes.set_ylim(min(*ends, -found.margin) - 0.02, max(*ends, found.margin) + 0.02)
    drawing.log_axis(axes, horizons)
    axes.tick_params(labelsize=8)
    if not here:
        axes.text(0.5, 0.8, "no records", ha="center", color="0.5", fontsize=8, transform=axes.transAxes)


@drawing.styled
def aspects(found: Findings) -> Figure | None:
    """Draws loss against D/L of the unshared designs, and the optimum of the law. None without cells."""
    cells = [cell for cell in found.fitted if is_plain(cell)]
    if not cells:
        return None
    law = found.law if found.law is not None and "log_a" in found.law.free else None
    caption = "Dots: means over seeds with 95 % intervals (moderated t). "
    caption += (
        "Lines: the law. Grey line: its optimum at this size and its longest horizon, with its 95 % "
        "bootstrap interval."
        if law
        else "No law is drawn: see the report."
    )
    sizes, best = list(dict.fromkeys(cell.size for cell in cells)), found.best_aspect
    title = "No best aspect ratio can be named from these cells"
    if best is not None:
        known = "is about" if best.is_inside else "is not determined:"
        title = f"The best width over layers{best.where} {known} {best.text}"
    subtitle = "Held-out loss (nats per token) against width / layers"
    figure = drawing.framed(title, subtitle, caption, 3.4, _width(len(sizes)))
    *row, beside = figure.subplots(1, len(sizes) + 1, squeeze=False, width_ratios=[1] * len(sizes) + [0.6])[0]
    horizons = sorted({_horizon(cell) for cell in cells})
    sd, df = moderated(found.fitted)
    spread = {id(cell): pair for cell, *pair in zip(found.fitted, sd, df, strict=True)}
    for size, axes in zip(sizes, row, strict=True):
        here = [cell for cell in cells if cell.size == size]
        for horizon in sorted({_horizon(cell) for cell in here}):
            line = sorted((c for c in here if _horizon(c) == horizon), key=lambda c: c.aspect)
            looks = {**drawing.look(horizons.index(horizon)), "ls": "none"}
            bars = [_half(cell, *spread[id(cell)]) for cell in line]
            axes.errorbar([c.aspect for c in line], [c.loss for c in line], bars, **looks, ms=5, capsize=3)
            if law is not None:
                _draw_law(axes, law, line[0], looks["color"])
        if law is not None:
            _draw_optimum(axes, law, max(here, key=lambda cell: cell.tokens))
        axes.set_xlim(2.5, 250)
        drawing.log_axis(axes, [4, 12, 32, 96])
        axes.set_title(f"{tables.quantity(size_of(found.cells, size))} parameters", fontsize=10)
        axes.set_xlabel("width / layers")
        axes.tick_params(labelsize=9)
    handles = [
        Line2D([], [], **{**drawing.look(place), "ls": "none"}, label=f"{horizon} tokens\nper parameter")
        for place, horizon in enumerate(horizons)
    ]
    beside.set_axis_off()
    beside.legend(handles=handles, fontsize=8, loc="center left", frameon=False, borderaxespad=0)
    row[0].set_ylabel(MEASURES["loss"].axis)
    return figure


def _width(sizes: int) -> float:
    """Inches for a column for each size and one for the names of lines."""
    return max(drawing.WIDTH, 1.2 + 1.7 * sizes)


def _horizon(cell: Cell) -> int:
    return max(1, round(cell.horizon))


def _draw_law(axes: Axes, law: Fit, cell: Cell, color: Any) -> None:
    x = np.geomspace(2.7, 220, 60)
    curve = law.curve(cell, x)
    axes.plot(x, curve, color=color, lw=1.2)


def _draw_optimum(axes: Axes, law: Fit, cell: Cell) -> None:
    at = float(cell.parameters), float(cell.tokens)
    ends = law.optimum_interval(*at)
    if ends is not None:
        axes.axvspan(*np.clip(ends, 2.5, 250), color="0.88", zorder=0)
        axes.axvline(law.optimum(*at), color="0.45", lw=1)


def _half(cell: Cell, sd: float, df: float) -> float:
    return float(stats.t.ppf(0.975, max(df, 1)) * sd / len(cell.losses) ** 0.5)


@drawing.styled
def repeats(found: Findings) -> Figure | None:
    """Draws the exponent of a repeat for each order, and common, beside the published one. None without."""
    rows = found.worth
    if not rows:
        return None
    caption = (
        "A block applied r times counts as r^phi blocks in the law: with 0 a repeat is worth nothing, with 1 "
        f"as much as another block. Lines: 95 % bootstrap intervals. Dashed: {PUBLISHED}, arXiv 2604.21106, "
        "of much larger looped models with 1 to 8 repeats."
    )
    title = f"A block used twice counts as {rows[-1].blocks} blocks: {rows[-1].name}"
    subtitle = "Exponent phi of the number of repeats, with 95 % bootstrap intervals"
    figure = drawing.framed(title, subtitle, caption, 0.9 + 0.6 * len(rows))
    axes = figure.subplots()
    for value in (0, 1):
        axes.axvline(value, color="0.8", lw=1)
    axes.axvline(PUBLISHED, color=drawing.COLORS[1], ls="--", lw=1.5)
    for place, (_, phi, ends) in enumerate(rows):
        low, high = ends or (phi, phi)
        axes.plot([low, high], [place, place], color=drawing.COLORS[0], lw=2)
        axes.plot(phi, place, "o", color=drawing.COLORS[0], ms=7)
        axes.annotate(
            f"{phi:.2f}: two uses count as {2**phi:.2f} blocks",
            (phi, place),
            (0, 8),
            textcoords="offset points",
            fontsize=9,
            ha="center",
            bbox={"fc": "white", "ec": "none", "pad": 1},
        )
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.invert_yaxis()
    axes.margins(y=0.2)
    low = min(0.0, *((ends or (phi, phi))[0] for _, phi, ends in rows))
    high = max(1.0, *((ends or (phi, phi))[1] for _, phi, ends in rows))
    axes.set_xlim(low - 0.1, high + 0.1)
    axes.set_xlabel("exponent phi")
    return figure


def images(found: Findings) -> Sequence[tuple[str, str, Figure | None]]:
    """Suffix of the file, alternative text and figure."""
    return (
        ("differences", "Loss difference against tokens per parameter", differences(found)),
        ("aspects", "Loss against width over layers, with the fitted optimum", aspects(found)),
        ("repeats", "Exponent of a repeat for each order of sharing", repeats(found)),
    )
