"""The page on the change of a difference with size: fits, a table, a figure."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from experiments.reporting import drawing, tables
from mobilellm_jax.analysis import power_laws
from mobilellm_jax.analysis.facts import Point
from mobilellm_jax.analysis.study import Study
from mobilellm_jax.analysis.verdicts import Comparison
from mobilellm_jax.analysis.wording import format_difference, format_p, phrase
from mobilellm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Size:
    """One preset: its shallowest and deepest point, and their comparison."""

    study: Study
    shallow: Point
    deep: Point
    comparison: Comparison

    @property
    def steps(self) -> int:
        return self.deep.finished[0].steps

    @property
    def parameters(self) -> float:
        """Non-embedding parameters, mean of the two points."""
        return float(np.mean([p.budgets["non_embedding_parameters"] for p in (self.shallow, self.deep)]))


def size(study: Study) -> Size:
    """Finds the shallowest and the deepest point of a study at one preset, and their comparison.

    Raises:
      UserError: one of the two has no finished run, or the study does not compare them.
    """
    preset, points = study.facts.preset, study.points
    asked = {label for pair in study.facts.pairs for label in pair}
    if absent := sorted(label for label in asked if label not in study.verdict.estimates):
        raise UserError(
            f"{preset}: no finished run of {', '.join(map(repr, absent))}; leave it out of --presets"
        )
    ordered = sorted(points, key=lambda label: points[label].config["model"]["depth"])
    shallow, deep = ordered[0], ordered[-1]
    pairs = {(c.point, c.other): c for c in study.verdict.comparisons}
    if (deep, shallow) not in pairs:
        raise UserError(
            f"{preset}: the study does not compare {deep!r} with {shallow!r}; leave it out of --presets"
        )
    return Size(study, points[shallow], points[deep], pairs[deep, shallow])


def check_same_data(sizes: Sequence[Size]) -> None:
    for name in ("source_sha256", "tokenizer_sha256"):
        if (
            len(
                hashes := {
                    run.data[name] for size in sizes for run in size.shallow.finished + size.deep.finished
                }
            )
            > 1
        ):
            raise UserError(
                f"--presets: different data, {name} is {' or '.join(map(str, sorted(hashes)))}; "
                "leave out the presets that differ, or rerun them on the same data"
            )


def families(sizes: Sequence[Size]) -> tuple[dict[float, list[float]], dict[float, list[float]]]:
    """Losses of the shallow and of the deep family, by size."""
    shallow = {size.parameters: list(size.shallow.scores.values()) for size in sizes}
    deep = {size.parameters: list(size.deep.scores.values()) for size in sizes}
    return shallow, deep


def by_horizon(sizes: Sequence[Size]) -> dict[int, list[Size]]:
    """Groups sizes by training steps."""
    groups: dict[int, list[Size]] = {}
    for one in sizes:
        groups.setdefault(one.steps, []).append(one)
    return groups


def report(sizes: Sequence[Size], image: str) -> str:
    """Writes the findings as Markdown."""
    lines = [
        "# Does depth pay, and from which size on?",
        "",
        f"![Loss against parameters](../figures/{image})",
        "",
    ]
    for steps, group in by_horizon(sizes).items():
        if len(group) > 1:
            lines += [f"After {steps:,} steps: {_fitted(group)}", ""]
    columns: tables.Columns = {
        "preset": [s.study.facts.preset for s in sizes],
        "non-embedding parameters": [f"{s.parameters:,.0f}" for s in sizes],
        "steps": [f"{s.steps:,}" for s in sizes],
        "shallow": [_named(s.shallow) for s in sizes],
        "deep": [_named(s.deep) for s in sizes],
        "deep - shallow (nats/token)": [_difference(s.comparison) for s in sizes],
        "p": [format_p(s.comparison.p_value).removeprefix("= ") for s in sizes],
        "deep is": [phrase(s.comparison, s.study.facts.metric) for s in sizes],
    }
    lines += [tables.markdown_table(columns), ""]
    lines += ["Each with its tuned learning rate in brackets. All depths: the reports of the presets.", ""]
    warned = [f"- {s.study.facts.preset}: {warning}" for s in sizes for warning in s.study.verdict.warnings]
    return "\n".join(lines + (["Warnings:", "", *warned, ""] if warned else []))


def _named(point: Point) -> str:
    mean = np.mean(list(point.scores.values()))
    return f"{point.label}: {mean:.3f} ({point.finished[0].learning_rate:.2g})"


def _difference(comparison: Comparison) -> str:
    difference = comparison.difference
    return "unknown" if difference is None else format_difference(difference, "loss")


def _fitted(group: Sequence[Size]) -> str:
    shallow, deep = families(group)
    laws = {"shallow": power_laws.fit(shallow), "deep": power_laws.fit(deep)}
    said = "; ".join(
        f"{name}: loss falls as N^-{law.exponent:.4f} [{law.low:.4f}, {law.high:.4f}]"
        for name, law in laws.items()
    )
    cross = power_laws.crossing(shallow, deep)
    if cross.low is None or cross.high is None or cross.size is None:
        return (
            f"{said}. No statement about a crossing: in {cross.share:.0%} of the bootstrap samples the deep "
            "family falls below the shallow one at or above the smallest size."
        )
    return (
        f"{said}. The deep family falls below the shallow one at {cross.size:,.0f} parameters "
        f"[{cross.low:,.0f}, {cross.high:,.0f}]."
    )


@drawing.styled
def draw(sizes: Sequence[Size]) -> Figure:
    """Draws loss against non-embedding parameters, with the fits and, if within range, their crossing."""
    figure = Figure(figsize=(drawing.WIDTH, 4.6), layout="constrained")
    axes = figure.subplots()
    largest, smallest = max(s.parameters for s in sizes), min(s.parameters for s in sizes)
    for index, (steps, group) in enumerate(by_horizon(sizes).items()):
        for family, losses in zip(("shallow", "deep"), families(group), strict=True):
            color = drawing.COLORS[0 if family == "shallow" else 1]
            marker, dash = drawing.MARKERS[index], drawing.DASHES[index]
            for n, values in losses.items():
                label = f"{family}est, {steps:,} steps" if n == min(losses) else None
                axes.plot([n] * len(values), values, marker, color=color, ms=5, alpha=0.7, label=label)
            if len(losses) > 1:
                x = np.geomspace(smallest / 1.5, largest * 3, 50)
                axes.plot(x, power_laws.fit(losses)(x), dash, color=color, lw=1.5)
        if len(group) > 1:
            cross = power_laws.crossing(*families(group))
            if cross.low is not None and cross.high is not None:
                axes.axvspan(cross.low, min(cross.high, largest * 3), color="0.85", zorder=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: tables.quantity(value))
    axes.set_xlabel("non-embedding parameters")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_title(
        "every dot a seed; lines: power laws; grey: 95 % interval of a crossing", fontsize=10, color="0.25"
    )
    axes.legend(fontsize=9)
    return figure
