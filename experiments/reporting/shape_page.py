"""The page of a study of shape: the law and its constants, what predicts best, figures, cells, limits."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.reporting import shape_figures, shape_rates, shape_tables
from experiments.reporting.figures import Image
from experiments.reporting.pages import Block, Section
from experiments.reporting.shape_tables import NAMES
from experiments.reporting.tables import quantity
from mobilellm_jax.analysis.cells import Cell, size_of
from mobilellm_jax.analysis.shape_findings import Findings
from mobilellm_jax.analysis.shape_fit import LEVEL, Fit
from mobilellm_jax.analysis.shape_law import FORMS, LAW, N0, NO_SHAPE, SHAPES, T0

TITLE = "The shape of small language models: size, aspect ratio, repeats and horizon in one law"
_FORMULA = (
    "loss = E + A N_eff^-alpha exp(kappa ln(D/L / a)^2) + B T^-beta, with N_eff = N_once + r^phi N_rec. "
    "loss: held out, nats per token; N_once and N_rec: non-embedding parameters of blocks applied once and r "
    "times; D: width; L: layers applied; T: training tokens; a: the best D/L; phi: 0 where a repeat is worth "
    "nothing, 1 where it is worth as much as a new block."
)


def sections(found: Findings, images: Sequence[Image]) -> list[Section]:
    """Sections of the page; what is missing and what limits the answer come first."""
    by_name = {image.name.removesuffix(".png").rpartition("-")[2]: image for image in images}

    def shown(name: str) -> list[Block]:
        return [by_name[name]] if name in by_name else []

    return [
        ("", [answer(found)]),
        ("Read this first", [warnings(found)]),
        ("In short", [summary(found)]),
        ("The shapes tried", shape_tables.shapes(found)),
        ("Cell by cell", shape_tables.signs_table(found)),
        ("Against the horizon", [*shown("differences"), *shape_tables.trends(found)]),
        ("Against the aspect ratio", shown("aspects")),
        ("What a repeat is worth", [*shown("repeats"), *shape_tables.worth(found)]),
        ("The law", [_FORMULA, *_constants(found)]),
        ("Predicting a size from the others", shape_tables.predictions(found)),
        ("Learning rates", shape_rates.section(found)),
        ("Cells", [shape_tables.CELLS, shape_tables.cells(found)]),
        ("Where this holds", [limits(found)]),
    ]


def warnings(found: Findings) -> list[str]:
    """What is missing, and what threatens the answer."""
    said = [_floor(found)]
    said += [f"No law: {found.refused}."] if found.refused else []
    if found.law is not None:
        said += [f"Left out: {reason}." for reason in found.law.left_out]
        said += [
            f"{NAMES.get(name, name)} is not determined: its interval reaches the bound of the search."
            for name in found.law.free
            if found.law.is_open(name)
        ]
    if others := found.arms[1:]:
        said.append(
            f"The law is fitted to {found.arms[0]} alone; {', '.join(others)} "
            f"({sum(cell.arm in others for cell in found.cells)} cells) is in figures and tables."
        )
    said += shape_rates.untuned(found)
    said += [
        f"{cell.name}: {cell.diverged} runs diverged; the cell is left out of the law."
        for cell in found.cells
        if cell.diverged
    ]
    return [line for line in said if line] + [f"Missing: {line}" for line in found.missing]


def _above(found: Findings) -> tuple[list[Cell], int]:
    """Cells above the loss of a trigram, and how many have one."""
    known = [(cell, cell.trigram) for cell in found.cells if cell.trigram is not None]
    return [cell for cell, trigram in known if cell.loss > trigram], len(known)


def _floor(found: Findings) -> str:
    above, known = _above(found)
    if not known:
        return "The records hold no loss of n-grams, so nothing says from which cell on context is used."
    if not above:
        return ""
    return (
        f"{len(above)} of {known} cells are above the loss of a trigram counted on the same tokens: at "
        f"{', '.join(dict.fromkeys(cell.preset for cell in above))} architecture cannot be judged."
    )


def answer(found: Findings) -> str:
    """The worth of a repeat and the best aspect ratio, as far as they are known, and where they hold."""
    parts = []
    if found.worth:
        parts.append(f"a block used twice counts as {found.worth[-1].blocks} blocks")
    if found.law is not None and "log_a" in found.law.free:
        best = found.best_aspect
        parts.append(
            f"the best width over layers{best.where} is {best.text}"
            if best is not None and best.is_inside
            else "the best width over layers is not determined"
        )
    said = " and ".join(parts)
    if parts and found.changing[0]:
        said = f"on average over horizons that differ, {said}"
    said = f"{said[:1].upper()}{said[1:]}." if parts else summary(found)[0]
    above, known = _above(found)
    return said + f" {len(above)} of {known} cells are above a trigram's loss." * bool(above)


def summary(found: Findings) -> list[str]:
    """The answers with their intervals, in plain words."""
    law = found.law
    if law is None:
        return ["The records do not allow a law yet; the differences of single cells are below."]
    said = [*_aspect(law, found), *_cost(law)] if "log_a" in law.free else []
    for name, phi, interval in found.worth:
        inside = ""
        if interval is not None:
            low, high = interval
            where = "inside" if low <= shape_figures.PUBLISHED <= high else "outside"
            inside = f" [{low:.2f}, {high:.2f}]; {shape_figures.PUBLISHED} of arXiv 2604.21106 is {where}"
        said.append(f"A repeat, {name}: phi = {phi:.2f}{inside}.")
    return [*said, *_changes(found), best_form(found)]


def _changes(found: Findings) -> list[str]:
    """Says which differences change with the horizon though the law has them constant; [] where none does."""
    changing, tested = found.changing
    if not changing:
        return []
    said = (
        f"{len(changing)} of {tested} differences between designs trained on as many tokens change with the "
        "horizon (all at once at 5 %), where the law has them constant: its constants are averages over "
        f"horizons. They are: {'; '.join(f'{trend.label} ({trend.row})' for trend in changing)}."
    )
    (against, *others) = dict.fromkeys(trend.against for trend in changing)
    if len(changing) > 1 and not others:
        said += f" All are from the unshared design of {against}: that one may be what changes."
    return [said]


def _aspect(law: Fit, found: Findings) -> list[str]:
    best = found.best_aspect
    if best is None:
        return ["No best aspect ratio can be named: the loss over log(D/L) is not surely curved."]
    if best.is_inside:
        return [f"Best width over layers{best.where}: {best.text}.", *_drifts(law)]
    tried = [cell.aspect for cell in found.fitted]
    return [
        f"The best width over layers is not determined: {best.text} leaves the ratios tried, "
        f"{min(tried):.3g} to {max(tried):.3g}."
    ]


def _drifts(law: Fit) -> list[str]:
    """By how much the best ratio changes for ten times the parameters or tokens."""
    said = []
    for name, what in (("drift", "parameters"), ("drift_T", "tokens")):
        if ends := law.interval(name):
            value, low, high = (10**drift for drift in (law.values[name], *ends))
            said.append(
                f"For ten times the {what} it changes by a factor of {value:.2f} [{low:.2f}, {high:.2f}]."
            )
    return said


def _cost(law: Fit) -> list[str]:
    """What a ratio off the best costs, in nats."""
    is_factor = law.form.shape != "plus"

    def cost(kappa: Any, log_a: Any) -> Any:
        off = kappa * math.log(4) ** 2
        return np.exp(log_a) * np.expm1(off) if is_factor else off

    value = float(cost(law.values["kappa"], law.values["log_A"]))
    interval = ""
    if "kappa" in law.samples:
        costs = cost(law.samples["kappa"], law.samples["log_A"])
        low, high = np.quantile(costs, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        interval = f" [{low:.3f}, {high:.3f}]"
    return [
        f"A design of {quantity(N0)} parameters four times as wide or as narrow for its depth as the best "
        f"loses {value:.3f}{interval} nats"
        f"{' at ' + quantity(T0) + ' tokens' if 'kappa_T' in law.free else ''}."
    ]


def best_form(found: Findings) -> str:
    """Which form predicts the sizes left out best, which is the one that is used."""
    scores = {form.name: score for form in FORMS if (score := found.score(form.name)) is not None}
    if found.law is None or LAW.name not in scores:
        return "No size can be left out to test the law: that takes three sizes, with enough cells."
    used, names = found.law.form.name, [form.name for form in (*SHAPES, NO_SHAPE) if form.name in scores]
    others = [f'{scores[name]:.4f} under "{name}"' for name in names if name != used]
    nearer = (
        ""
        if used == LAW.name
        else ' It is nearer than "{}" in {} of {} cells.'.format(LAW.name, *found.nearer(used))
    )
    return (
        f'The form used is the one that predicts sizes left out best, "{used}". From the other sizes, '
        f"{' and '.join(found.judged)} are missed by {scores[used]:.4f} nats (root mean square); by "
        f"{', '.join(others)}. Seeds alone: {found.noise:.4f}.{nearer}"
    )


def _constants(found: Findings) -> list[Block]:
    blocks: list[Block] = []
    for fit in (found.law, found.common):
        if fit is not None:
            alike = ", with one exponent for all orders" * (fit is found.common)
            blocks += [
                f"{fit.form.name[0].upper()}{fit.form.name[1:]}{alike}, fitted to {len(fit.cells)} cells. "
                "Beyond the noise of their means they lie about it with a standard deviation of "
                f"{fit.spread:.4f} nats.",
                shape_tables.constants(fit),
            ]
    if blocks:
        blocks.append(
            "Huber least squares on cell means. Intervals are from simulated errors about the law: of seeds "
            "(pooled over cells), of learning rates where known, and of the spread of the cells about it; "
            "those of different cells are independent. A preset left out: lowest to highest value over the "
            "fits without one size and horizon; what hangs on one is less sure than its interval says."
        )
    return blocks


def limits(found: Findings) -> list[str]:
    """The region that the cells span, beyond which nothing is known."""
    every = found.cells
    sizes = [size_of(every, size) for size in found.sizes]
    ranges = {
        "Non-embedding parameters": [quantity(min(sizes)), quantity(max(sizes))],
        "Training tokens": [quantity(min(c.tokens for c in every)), quantity(max(c.tokens for c in every))],
        "Tokens per parameter": [
            f"{min(c.horizon for c in every):.2g}",
            f"{max(c.horizon for c in every):.2g}",
        ],
        "Width over layers": [f"{min(c.aspect for c in every):.2g}", f"{max(c.aspect for c in every):.2g}"],
        "Layers applied": [str(min(c.layers for c in every)), str(max(c.layers for c in every))],
    }
    return [
        *(f"{name}: {' to '.join(dict.fromkeys(ends))}." for name, ends in ranges.items()),
        "One corpus, tokenizer, context and batch size. How differences change with the horizon or the size "
        "is read off the figures, not off the law.",
        f"Parameterization: {', '.join(filter(None, found.arms)) or 'as in the records'}.",
    ]


def text(found: Findings) -> str:
    """What the command prints."""
    said = [*(f"Warning: {line}" for line in warnings(found)), *summary(found), shape_rates.line(found)]
    return "\n".join(filter(None, said))
