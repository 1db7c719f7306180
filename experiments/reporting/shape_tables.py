"""Tables of the page of a study of shape: shapes tried, constants, predictions, horizons, cells."""

import math
from collections.abc import Callable

from experiments.reporting.pages import Block
from experiments.reporting.tables import Columns, is_outside, quantity
from mobilellm_jax.analysis.cells import aspect_names, is_plain
from mobilellm_jax.analysis.shape_findings import Findings
from mobilellm_jax.analysis.shape_fit import Fit
from mobilellm_jax.analysis.shape_law import N0, T0
from mobilellm_jax.analysis.wording import format_p

NAMES = {
    "E": "E, irreducible loss (nats)",
    "log_A": f"A N^-alpha at N = {quantity(N0)} (nats)",
    "alpha": "alpha, exponent of size",
    "log_B": f"B T^-beta at T = {quantity(T0)} (nats)",
    "beta": "beta, exponent of tokens",
    "kappa": "kappa, curvature over log D/L",
    "log_a": f"a, best D/L at N = {quantity(N0)}, T = {quantity(T0)}",
    "phi immediate": "phi, immediate",
    "phi repeat_all": "phi, repeat_all",
    "phi reverse": "phi, reverse",
    "phi": "phi, all orders alike",
    "drift": "change of log a with log N",
    "drift_T": "change of log a with log T",
    "kappa_T": "change of kappa with log T",
}


def shapes(found: Findings) -> list[Block]:
    """The unshared designs of each cell: by how much each is above the best of them."""
    plain = [cell for cell in found.fitted if is_plain(cell)]
    names = aspect_names(found.cells)
    presets = list(dict.fromkeys(cell.preset for cell in plain))
    columns: Columns = {"cell": presets, "best": []}
    columns |= {name: [] for name in dict.fromkeys(names.values())}
    for preset in presets:
        here = {names[cell.size, cell.aspect]: cell for cell in plain if cell.preset == preset}
        best = min(here.values(), key=lambda cell: cell.loss)
        columns["best"].append(best.design)
        for name in list(columns)[2:]:
            cell = here.get(name)
            columns[name].append("" if cell is None else f"{cell.loss - best.loss:+.3f}" * (cell is not best))
    return [
        "What was measured, without a law: the unshared design with the lowest loss, and by how many nats "
        "the others are above it. Seeds alone give a difference a standard error of "
        f"{math.sqrt(2) * found.noise:.3f}; what is surely different is in the next table.",
        columns,
    ]


def signs(found: Findings) -> list[tuple[str, list[str], list[str], list[str]]]:
    """For each design: where it is surely better than what it is compared with, surely worse, and neither.

    Sure is a difference whose band, which holds for all differences of the study at once, excludes 0.
    """
    rows: dict[str, tuple[list[str], list[str], list[str]]] = {}
    for d in found.differences:
        if d.cell.arm == found.arms[0]:
            better, worse, neither = rows.setdefault(f"{d.label} ({d.row})", ([], [], []))
            (neither if not d.is_sure else better if d.mean < 0 else worse).append(d.cell.preset)
    return [(label, *of) for label, of in rows.items()]


def signs_table(found: Findings) -> list[Block]:
    """`signs`, with a caption."""
    rows = signs(found)
    if not rows:
        return []
    columns: Columns = {"design": [label for label, *_ in rows]}
    for place, word in enumerate(("better at", "worse at", "neither at"), 1):
        columns[word] = [", ".join(row[place]) for row in rows]
    return [
        "Where each design is surely better or worse than what it is compared with: where its band, which "
        "holds for all differences of the study at once, excludes 0.",
        columns,
    ]


def constants(fit: Fit) -> Columns:
    """Value, interval, and the range over fits without one preset, of each constant."""
    columns: Columns = {"constant": [], "value": [], "95 % interval": [], "a preset left out": []}
    for name in fit.free:
        show = math.exp if name.startswith("log_") else float
        ends, without = fit.interval(name), fit.without.get(name)
        columns["constant"].append(NAMES.get(name, name))
        columns["value"].append(f"{show(fit.values[name]):.3g}")
        columns["95 % interval"].append(between(ends, show) + " (open)" * fit.is_open(name))
        columns["a preset left out"].append(between(without, show))
    return columns


def between(ends: tuple[float, float] | None, show: Callable[[float], float] = float) -> str:
    """ "1.2 to 3.4"; "" without ends."""
    return "" if ends is None else f"{show(ends[0]):.3g} to {show(ends[1]):.3g}"


def predictions(found: Findings) -> list[Block]:
    """Errors of the sizes left out, under each form."""
    if not found.predictions:
        return []
    columns: Columns = {"form": list(found.predictions)}
    for size in dict.fromkeys(cell.size for cell in found.fitted):
        columns[f"{size} left out"] = [
            "none" if of_form[size].absent else f"{of_form[size].error:.4f}"
            for of_form in found.predictions.values()
        ]
    scores = [found.score(name) for name in found.predictions]
    columns[" and ".join(found.judged) or "judged"] = ["none" if s is None else f"{s:.4f}" for s in scores]
    absent = {one.absent for of_form in found.predictions.values() for one in of_form.values() if one.absent}
    return [
        "Root mean square error in nats of cells that were predicted from all other sizes, smaller and "
        f"larger. Seeds alone give the cell means an error of {found.noise:.4f}.",
        columns,
        *([[f"None: {reason}." for reason in sorted(absent)]] if absent else []),
    ]


def trends(found: Findings) -> list[Block]:
    """How each difference changes with the horizon."""
    if not found.trends:
        return []
    tested = sum(trend.p_line is not None for trend in found.trends)
    columns: Columns = {
        name: []
        for name in ("design", "sizes", "nats for each doubling of tokens", "p if constant", "p if a line")
    }
    for t in found.trends:
        is_bent = t.p_line is not None and t.p_line < 0.05 / tested
        ends = f" [{t.slope - t.half_width:+.4f}, {t.slope + t.half_width:+.4f}]" * (not is_bent)
        row = (
            f"{t.label}; {t.row}" + f" ({t.arm})" * bool(t.arm),
            ", ".join(t.sizes),
            f"{t.slope:+.4f}{ends}",
            format_p(t.p_constant).removeprefix("= "),
            "" if t.p_line is None else format_p(t.p_line).removeprefix("= "),
        )
        for column, text in zip(columns.values(), row, strict=True):
            column.append(text)
    return [
        "How a difference changes with the horizon (below 0: the design gains on what it is compared with). "
        "95 % intervals, each alone. A small p says that the difference is not constant, or not a line. "
        "Where it is surely no line, the slope is an average over stretches that differ: no interval.",
        columns,
    ]


def worth(found: Findings) -> list[Block]:
    """The exponent of a repeat in each order."""
    rows = found.worth
    if not rows:
        return []
    columns: Columns = {
        "order": [of.name for of in rows],
        "phi": [f"{of.phi:.3f}" for of in rows],
        "95 % interval": [between(of.interval) for of in rows],
        "two uses count as (blocks)": [of.blocks for of in rows],
    }
    return [columns]


CELLS = (
    "Mean final loss over the seeds, nats per token; residual: loss minus the law. A star marks controls, "
    "which have more parameters or more tokens than their cell. Parameters: outside the embeddings, and all. "
    "D/L outside: of the 6 to 320 that the paper covers. The command at the top of configs/shape_laws.py "
    "runs a cell anew, with its name instead of `laptop`."
)


def cells(found: Findings) -> Columns:
    """One row for each cell."""
    residuals = (
        {} if found.law is None else dict(zip(map(id, found.law.cells), found.law.residuals, strict=True))
    )
    columns: Columns = {
        name: []
        for name in (
            "cell",
            "design",
            "D/L",
            "parameters",
            "all",
            "tokens",
            "FLOPs",
            "loss",
            "seeds",
            "residual",
        )
    }
    for cell in found.cells:
        residual = residuals.get(id(cell))
        row = [
            cell.preset + f" ({cell.arm})" * bool(cell.arm),
            cell.design + " *" * (not cell.within),
            f"{cell.aspect:.3g}" + " (outside)" * is_outside(cell.aspect),
            quantity(cell.parameters),
            quantity(cell.total),
            quantity(cell.tokens),
            quantity(cell.flops),
            f"{cell.loss:.4f}",
            str(len(cell.losses)) + f" ({cell.diverged} diverged)" * bool(cell.diverged),
            "" if residual is None else f"{residual:+.4f}",
        ]
        for column, text in zip(columns.values(), row, strict=True):
            column.append(text)
    return columns
