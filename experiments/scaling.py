"""Loss against parameters for the shallowest and the deepest models, and where the two would cross.

  python -m experiments.sweep --config=configs/depth_scaling.py:laptop --workdir=runs/scaling
  python -m experiments.scaling --workdir=runs/scaling

Takes the records of all presets of a study that trained on the same data; presets of equal length make one
fit. Writes figures/<study>-scaling.png and reports/<study>-scaling.md.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from absl import flags
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from experiments import cli, drawing, tables
from mobilellm_jax import scaling
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import directory
from mobilellm_jax.results import Record, by_point, by_study, pairs_of, read_all, write_atomically
from mobilellm_jax.statistics import format_difference, format_p
from mobilellm_jax.verdicts import Comparison, Verdict, verdict


@dataclasses.dataclass(frozen=True)
class Size:
    """One preset: its shallowest and deepest point, and what was found of the two."""

    preset: str
    steps: int
    shallow: list[Record]
    deep: list[Record]
    found: Verdict
    comparison: Comparison

    @property
    def parameters(self) -> float:
        """Non-embedding parameters, mean of the two."""
        return float(
            np.mean([runs[0].budgets["non_embedding_parameters"] for runs in (self.shallow, self.deep)])
        )


def main() -> int:
    """Fits, draws and prints what is in --workdir, and returns the exit status."""
    workdir, study = directory("workdir", flags.FLAGS.workdir), flags.FLAGS.study
    presets = {
        preset: records
        for (name, preset), records in by_study(read_all(workdir / "results")).items()
        if name == study and preset in flags.FLAGS.presets
    }
    if not flags.FLAGS.presets:
        raise UserError("--presets: name the presets to take, separated by commas")
    if missing := [preset for preset in flags.FLAGS.presets if preset not in presets]:
        raise UserError(
            f"{workdir}/results: no records of {study}:{missing[0]}; make them with: "
            f"python -m experiments.sweep --config=configs/{study}.py:{missing[0]} --workdir={workdir}"
        )
    sizes = sorted(
        (size(preset, records) for preset, records in presets.items()), key=lambda s: (s.steps, s.parameters)
    )
    _check_same_data(sizes)
    text = report(sizes, f"{study}-scaling.png")
    write_atomically(workdir / "figures" / f"{study}-scaling.png", drawing.render(draw(sizes)))
    write_atomically(workdir / "reports" / f"{study}-scaling.md", text.encode())
    print(text)
    return 0


def size(preset: str, records: Sequence[Record]) -> Size:
    """Returns what the records of one preset say about its shallowest and its deepest point.

    Raises:
      UserError: one of the two has no finished run, or the study does not compare them.
    """
    found = verdict(records)
    runs = {
        point: [run for run in of_point if run.phase == "comparison" and run.status == "finished"]
        for point, of_point in by_point(records).items()
    }
    asked = {point for pair in pairs_of(records) for point in pair}
    if absent := sorted(point for point in asked if not runs.get(point)):
        raise UserError(
            f"{preset}: no finished run of {', '.join(map(repr, absent))}; leave it out of --presets"
        )
    ordered = sorted(runs, key=lambda point: by_point(records)[point][0].setting("model.depth"))
    shallow, deep = ordered[0], ordered[-1]
    comparison = next((c for c in found.comparisons if (c.point, c.other) == (deep, shallow)), None)
    if comparison is None:
        raise UserError(f"{preset}: the study does not compare {deep!r} with {shallow!r}")
    return Size(preset, runs[deep][0].steps, runs[shallow], runs[deep], found, comparison)


def _check_same_data(sizes: Sequence[Size]) -> None:
    for name in ("source_sha256", "tokenizer_sha256"):
        if len(hashes := {run.data[name] for size in sizes for run in size.shallow + size.deep}) > 1:
            raise UserError(
                f"the presets differ in {name} of the data: {', '.join(map(str, sorted(hashes)))}"
            )


def families(sizes: Sequence[Size]) -> tuple[dict[float, list[float]], dict[float, list[float]]]:
    """Returns the losses of the shallow and of the deep family by size."""
    shallow = {size.parameters: [run.score for run in size.shallow] for size in sizes}
    deep = {size.parameters: [run.score for run in size.deep] for size in sizes}
    return shallow, deep


def by_horizon(sizes: Sequence[Size]) -> dict[int, list[Size]]:
    """Groups sizes by training steps."""
    groups: dict[int, list[Size]] = {}
    for one in sizes:
        groups.setdefault(one.steps, []).append(one)
    return groups


def report(sizes: Sequence[Size], image: str) -> str:
    """Returns the findings as Markdown."""
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
        "preset": [s.preset for s in sizes],
        "non-embedding parameters": [f"{s.parameters:,.0f}" for s in sizes],
        "steps": [f"{s.steps:,}" for s in sizes],
        "shallow": [_named(s, s.shallow) for s in sizes],
        "deep": [_named(s, s.deep) for s in sizes],
        "deep - shallow (nats/token)": [_difference(s.comparison) for s in sizes],
        "p (Holm)": [format_p(s.comparison.holm_p).removeprefix("= ") for s in sizes],
        "deep is": [s.comparison.phrase for s in sizes],
    }
    lines += [tables.markdown_table(columns), ""]
    lines += ["Each with its tuned learning rate in brackets. All depths: the reports of the presets.", ""]
    warned = [f"- {s.preset}: {warning}" for s in sizes for warning in s.found.warnings]
    return "\n".join(lines + (["Warnings:", "", *warned, ""] if warned else []))


def _named(size: Size, runs: Sequence[Record]) -> str:
    mean = np.mean([run.score for run in runs])
    return f"{runs[0].point}: {mean:.3f} ({runs[0].learning_rate:.2g})"


def _difference(comparison: Comparison) -> str:
    difference = comparison.difference
    return "unknown" if difference is None else format_difference(difference, "loss")


def _fitted(group: Sequence[Size]) -> str:
    shallow, deep = families(group)
    laws = {"shallow": scaling.fit(shallow), "deep": scaling.fit(deep)}
    said = "; ".join(
        f"{name}: loss falls as N^-{law.exponent:.4f} [{law.low:.4f}, {law.high:.4f}]"
        for name, law in laws.items()
    )
    cross = scaling.crossing(shallow, deep)
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
    """Returns loss against non-embedding parameters, with the fits and, where they allow it, the crossing."""
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
                axes.plot(x, scaling.fit(losses)(x), dash, color=color, lw=1.5)
        if len(group) > 1:
            cross = scaling.crossing(*families(group))
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


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "experiments", "directory of results/, reports/ and figures/")
    flags.DEFINE_string("study", "depth_vs_width", "the study whose presets differ in size")
    flags.DEFINE_list(
        "presets", ["laptop_37k", "laptop_110k", "laptop_330k", "laptop_110k_long"], "its presets to take"
    )
    cli.run(main)
