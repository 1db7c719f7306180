"""The page of a study of shape: the law and its constants, what predicts best, figures, cells, limits."""

import math
from collections.abc import Sequence

from experiments.reporting import shape_figures, shape_rates
from experiments.reporting.figures import Image
from experiments.reporting.pages import Block, Section
from experiments.reporting.tables import Columns, quantity
from mobilellm_jax.analysis.cells import Trend, size_of
from mobilellm_jax.analysis.shape_findings import Findings
from mobilellm_jax.analysis.shape_law import COMMON, DRIFTS, LAW, N0, T0, Fit
from mobilellm_jax.analysis.wording import format_p

TITLE = "The shape of small language models: size, aspect ratio, repeats and horizon in one law"
_FORMULA = (
    "L = E + A (N_once + r^phi N_rec)^-alpha exp(kappa (log(D/L) - log a)^2) + B T^-beta, with N_once and "
    "N_rec the non-embedding parameters of blocks applied once and r times, D the width, L the layers "
    "applied, and T the training tokens."
)
_NAMES = {
    "E": "E, irreducible loss (nats)",
    "log_A": f"A N^-alpha at N = {quantity(N0)} (nats)",
    "alpha": "alpha, exponent of size",
    "log_B": f"B T^-beta at T = {quantity(T0)} (nats)",
    "beta": "beta, exponent of tokens",
    "kappa": "kappa, curvature over log D/L",
    "log_a": "a, best D/L",
    "phi immediate": "phi, immediate",
    "phi repeat_all": "phi, repeat_all",
    "phi reverse": "phi, reverse",
    "phi": "phi, all orders alike",
    "drift": "drift of log a with log N",
}


def sections(found: Findings, images: Sequence[Image]) -> list[Section]:
    """Sections of the page; what is missing and what limits the answer come first."""
    by_name = {image.name.removesuffix(".png").rpartition("-")[2]: image for image in images}

    def shown(name: str) -> list[Block]:
        return [by_name[name]] if name in by_name else []

    return [
        ("", [answer(found)]),
        ("Read this first", [warnings(found)]),
        ("In short", [summary(found)]),
        ("Cell by cell", _signs(found)),
        ("Against the horizon", [*shown("differences"), *_trends(found)]),
        ("Against the aspect ratio", shown("aspects")),
        ("What a repeat is worth", [*shown("repeats"), *_worth(found)]),
        ("The law", [_FORMULA, *_constants(found)]),
        ("Predicting a size from the others", _predictions(found)),
        ("Learning rates", shape_rates.section(found)),
        ("Cells", [_CELLS, cells(found)]),
        ("Where this holds", [limits(found)]),
    ]


def warnings(found: Findings) -> list[str]:
    """What is missing, and what threatens the answer."""
    said = [_floor(found)]
    said += [f"No law: {found.refused}."] if found.refused else []
    if found.law is not None:
        said += [f"Left out: {reason}." for reason in found.law.left_out]
        said += [
            f"{_NAMES.get(name, name)} is not determined: its interval reaches the bound of the search."
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


def _floor(found: Findings) -> str:
    known = [cell for cell in found.cells if cell.trigram is not None]
    above = [cell for cell in known if cell.trigram is not None and cell.loss > cell.trigram]
    if not known:
        return "The records hold no loss of n-grams, so nothing says from which cell on context is used."
    if not above:
        return ""
    return (
        f"{len(above)} of {len(known)} cells are above the loss of a trigram counted on the same tokens: at "
        f"{', '.join(dict.fromkeys(cell.preset for cell in above))} architecture can hardly be judged."
    )


def answer(found: Findings) -> str:
    """The worth of a repeat and the best aspect ratio, as far as they are known, in one sentence."""
    parts = []
    for _, phi, interval in shape_figures.worth(found)[-1:]:
        parts.append(f"a block used twice counts as {shape_figures.in_blocks(phi, interval)} blocks")
    if found.law is not None and "log_a" in found.law.free:
        best, ends = found.law.optimum(N0), found.law.optimum_interval(N0)
        parts.append(
            f"the best width over layers is {best:.3g} [{ends[0]:.3g}, {ends[1]:.3g}]"
            if ends is not None and shape_figures.is_inside(ends, found.fitted)
            else "the best width over layers is not determined"
        )
    said = " and ".join(parts)
    if parts and _unexplained(found):
        said = f"on average over horizons that differ, {said}"
    return f"{said[:1].upper()}{said[1:]}." if parts else summary(found)[0]


def summary(found: Findings) -> list[str]:
    """The answers with their intervals, in plain words."""
    law = found.law
    if law is None:
        return ["The records do not allow a law yet; the differences of single cells are below."]
    said = []
    if "log_a" in law.free:
        said += [_aspect(law, found), _cost(law)]
    for name, phi, interval in shape_figures.worth(found):
        inside = ""
        if interval is not None:
            low, high = interval
            where = "inside" if low <= shape_figures.PUBLISHED <= high else "outside"
            inside = f" [{low:.2f}, {high:.2f}]; {shape_figures.PUBLISHED} of arXiv 2604.21106 is {where}"
        said.append(f"A repeat, {name}: phi = {phi:.2f}{inside}.")
    return [*said, *_bends(found), best_form(found)]


def signs(found: Findings) -> list[tuple[str, list[str], list[str], list[str]]]:
    """For each design: where it is surely better than what it is compared with, surely worse, and neither.

    Sure is a difference whose band, which holds for all differences of the study at once, excludes 0.
    """
    rows: dict[str, tuple[list[str], list[str], list[str]]] = {}
    for d in found.differences:
        if d.cell.arm == found.arms[0]:
            better, worse, neither = rows.setdefault(f"{d.label} ({d.row})", ([], [], []))
            is_sure = d.half_width is not None and abs(d.mean) > d.half_width
            (neither if not is_sure else better if d.mean < 0 else worse).append(d.cell.preset)
    return [(label, *of) for label, of in rows.items()]


def _signs(found: Findings) -> list[Block]:
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


def _bent(found: Findings) -> list[Trend]:
    """The differences that are no line over the horizons: Bonferroni at 5 % over those that can be tested."""
    tested = [(trend, p) for trend in found.trends if (p := trend.p_line) is not None]
    return [trend for trend, p in tested if p < 0.05 / len(tested)]


def _unexplained(found: Findings) -> list[Trend]:
    """Those of them between designs trained on as many tokens, which the law takes for lines."""
    return [trend for trend in _bent(found) if trend.equal_tokens]


def _bends(found: Findings) -> list[str]:
    """Says which differences bend though the law has them as lines; [] where none is known to."""
    bent, tested = _unexplained(found), sum(trend.p_line is not None for trend in found.trends)
    if not bent:
        return []
    return [
        f"{len(bent)} of {tested} differences bend with the horizon (all at once at 5 %): what holds at "
        "one does not hold at another. The law has no term for that, and so its exponents are averages: "
        f"{'; '.join(f'{trend.label} ({trend.row})' for trend in bent)}."
    ]


def _aspect(law: Fit, found: Findings) -> str:
    ends = law.optimum_interval(N0)
    if ends is None:
        return "No best aspect ratio can be named: the loss over log(D/L) is not surely curved."
    estimate = f"{law.optimum(N0):.3g} [{ends[0]:.3g}, {ends[1]:.3g}]"
    if shape_figures.is_inside(ends, found.fitted):
        return f"Best width over layers: {estimate}.{_drift(found.drifting)}"
    tried = [cell.aspect for cell in found.fitted]
    return (
        f"The best width over layers is not determined: {estimate} leaves the ratios tried, "
        f"{min(tried):.3g} to {max(tried):.3g}."
    )


def _drift(fit: Fit | None) -> str:
    ends = fit.interval("drift") if fit is not None else None
    if fit is None or ends is None:
        return ""
    factors = [10**drift for drift in (fit.values["drift"], *ends)]
    return (
        " If it may drift, it changes by a factor of {:.2f} [{:.2f}, {:.2f}] for ten times the size.".format(
            *factors
        )
    )


def _cost(law: Fit) -> str:
    ends = law.interval("kappa")
    interval = f" [{_off(ends[0]):+.1%}, {_off(ends[1]):+.1%}]" if ends else ""
    return (
        "A design four times as wide or as narrow for its depth as the best has a term of size larger by "
        f"{_off(law.values['kappa']):.1%}{interval}."
    )


def _off(kappa: float) -> float:
    return math.expm1(kappa * math.log(4) ** 2)


def best_form(found: Findings) -> str:
    """Which form predicts the sizes left out best."""
    scores = {name: score for name in found.predictions if (score := found.score(name)) is not None}
    if LAW.name not in scores:
        return "No size can be left out to test the law: that takes three sizes, with enough cells."
    law, best = scores[LAW.name], min(scores, key=lambda name: scores[name])
    judged = " and ".join(found.judged)
    said = f"Predicted from the other sizes, {judged} are missed by {law:.4f} nats (root mean square)"
    if best == LAW.name:
        return f"{said}; no other form tried does better."
    close = ", by less than the noise of a cell" if law - scores[best] < found.noise else ""
    return f'{said}; another form predicts better: "{best}" misses by {scores[best]:.4f}{close}.'


def _constants(found: Findings) -> list[Block]:
    blocks: list[Block] = []
    for form, fit in ((LAW, found.law), (COMMON, found.common), (DRIFTS, found.drifting)):
        if fit is None:
            continue
        columns: Columns = {"constant": [], "value": [], "95 % interval": []}
        for name in fit.free:
            ends = fit.interval(name)
            is_log = name.startswith("log_")
            low, value, high = (
                math.exp(x) if is_log else x
                for x in ((ends or (0, 0))[0], fit.values[name], (ends or (0, 0))[1])
            )
            columns["constant"].append(_NAMES.get(name, name))
            columns["value"].append(f"{value:.3g}")
            columns["95 % interval"].append(
                ("" if ends is None else f"{low:.3g} to {high:.3g}") + " (open)" * fit.is_open(name)
            )
        blocks += [
            f"{form.name[0].upper()}{form.name[1:]}, fitted to {len(fit.cells)} cells. Beyond the noise of "
            f"their means they lie about it with a standard deviation of {fit.spread:.4f} nats.",
            columns,
        ]
    if blocks:
        blocks.append(
            "Huber least squares on cell means; intervals from a bootstrap of seeds (pooled over cells), of "
            "the uncertainty of the learning rates where known, and of the spread of the cells about the law."
        )
    return blocks


def _predictions(found: Findings) -> list[Block]:
    if not found.predictions:
        return []
    sizes = list(dict.fromkeys(cell.size for cell in found.fitted))
    columns: Columns = {"form": list(found.predictions)}
    for size in sizes:
        columns[f"{size} left out"] = [
            "none" if of_form[size].absent else f"{of_form[size].error:.4f}"
            for of_form in found.predictions.values()
        ]
    scores = [found.score(name) for name in found.predictions]
    columns[" and ".join(found.judged) or "judged"] = ["none" if s is None else f"{s:.4f}" for s in scores]
    absent = {one.absent for of_form in found.predictions.values() for one in of_form.values() if one.absent}
    return [
        best_form(found),
        "Root mean square error in nats of cells that were predicted from all other sizes. Seeds alone give "
        f"the cell means an error of {found.noise:.4f}.",
        columns,
        *([[f"None: {reason}." for reason in sorted(absent)]] if absent else []),
    ]


def _trends(found: Findings) -> list[Block]:
    if not found.trends:
        return []
    bent = _bent(found)
    columns: Columns = {
        "design": [
            f"{trend.label}; {trend.row}" + f" ({trend.arm})" * bool(trend.arm) for trend in found.trends
        ],
        "sizes": [", ".join(trend.sizes) for trend in found.trends],
        "nats for each doubling of tokens": [
            f"{t.slope:+.4f}"
            + f" [{t.slope - t.half_width:+.4f}, {t.slope + t.half_width:+.4f}]" * (t not in bent)
            for t in found.trends
        ],
        "p of a line": [
            "" if t.p_line is None else format_p(t.p_line).removeprefix("= ") for t in found.trends
        ],
    }
    return [
        "How a difference changes with the horizon (below 0: the design gains on what it is compared with). "
        "95 % intervals, each alone. p of a line: a small one says that the difference bends. Where that is "
        "sure, as listed above, the slope is an average over stretches that differ, and has no interval.",
        columns,
    ]


def _worth(found: Findings) -> list[Block]:
    rows = shape_figures.worth(found)
    if not rows:
        return []
    columns: Columns = {
        "order": [name for name, _, _ in rows],
        "phi": [f"{phi:.3f}" for _, phi, _ in rows],
        "95 % interval": ["" if e is None else f"{e[0]:.3f} to {e[1]:.3f}" for _, _, e in rows],
        "two uses count as (blocks)": [f"{2**phi:.2f}" for _, phi, _ in rows],
    }
    return [columns]


_CELLS = (
    "Mean final loss over the seeds, nats per token; residual: loss minus the law. A star marks controls, "
    "which have more parameters or more tokens than their cell."
)


def cells(found: Findings) -> Columns:
    """One row for each cell."""
    residuals = (
        {} if found.law is None else dict(zip(map(id, found.law.cells), found.law.residuals, strict=True))
    )
    columns: Columns = {
        name: []
        for name in ("cell", "design", "D/L", "parameters", "tokens", "FLOPs", "loss", "seeds", "residual")
    }
    for cell in found.cells:
        residual = residuals.get(id(cell))
        row = [
            cell.preset + f" ({cell.arm})" * bool(cell.arm),
            cell.design + " *" * (not cell.within),
            f"{cell.aspect:.3g}",
            quantity(cell.parameters),
            quantity(cell.tokens),
            quantity(cell.flops),
            f"{cell.loss:.4f}",
            str(len(cell.losses)) + f" ({cell.diverged} diverged)" * bool(cell.diverged),
            "" if residual is None else f"{residual:+.4f}",
        ]
        for column, text in zip(columns.values(), row, strict=True):
            column.append(text)
    return columns


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
        "One corpus, tokenizer, context and batch size. Differences that grow or shrink with the horizon or "
        "the size are read off the figures, not off the law, which knows no such interaction.",
        f"Parameterization: {', '.join(filter(None, found.arms)) or 'as in the records'}.",
    ]


def text(found: Findings) -> str:
    """What the command prints."""
    said = [*(f"Warning: {line}" for line in warnings(found)), *summary(found), shape_rates.line(found)]
    return "\n".join(filter(None, said))
