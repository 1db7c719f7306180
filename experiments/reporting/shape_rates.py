"""Learning rates in a study of shape: the line through the optima, and cells that were not tuned."""

import math

from experiments.reporting.pages import Block
from experiments.reporting.tables import quantity
from mobilellm_jax.analysis.shape_findings import Findings
from mobilellm_jax.analysis.shape_law import N0, T0


def untuned(found: Findings) -> list[str]:
    """Says which cells have a rate that was not tuned, and what that may cost; [] where all were."""
    cells = [cell for cell in found.fitted if cell.untuned_rate is not None]
    if not cells:
        return []
    said = f"Learning rates were not tuned at {', '.join(dict.fromkeys(cell.preset for cell in cells))}"
    if found.rates is None:
        return [f"{said}; too few other cells were to say what that costs."]
    worst = max(found.rates.excess(cell) for cell in cells)
    return [
        f"{said}: they are what the optima of other cells predict, to {found.rates.error:.2f} octaves (root "
        f"mean square), which is expected to cost up to {worst:.3f} nats. That counts in the intervals."
    ]


def line(found: Findings) -> str:
    """The line in words, with its error; "" where there is none."""
    rates = found.rates
    if rates is None:
        return ""
    n, t = f"log2(N / {quantity(N0)})", f"log2(T / {quantity(T0)})"
    slopes = f"{rates.of_parameters:+.4f} {n} {rates.of_tokens:+.4f} {t}"
    return (
        f"Under {found.arms[0]}, log2 of the best learning rate is {rates.at:.3f} {slopes}, by least squares "
        "over the designs that were tuned. Each preset was left out once: its optima lie off the line of "
        f"the others by {rates.error:.2f} octaves (root mean square), which costs "
        f"{rates.curvature * rates.error**2:.4f} nats where the loss rises by {rates.curvature:.3f} nats per "
        "octave squared."
    )


def section(found: Findings) -> list[Block]:
    """The line, how it misses each tuned preset, and the rates that it gave to others."""
    rates = found.rates
    if rates is None:
        return []
    blocks: list[Block] = [
        line(found),
        {
            "tuned": [one.preset for one in rates.missed],
            "mean log2 of the best rate": [f"{one.optimum:.2f}" for one in rates.missed],
            "left out, predicted": [f"{one.predicted:.2f}" for one in rates.missed],
            "error (octaves)": [f"{one.error:.2f}" for one in rates.missed],
            "sd over its designs, with that of fits": [f"{one.spread:.2f}" for one in rates.missed],
        },
    ]
    given = {c.preset: (c, c.untuned_rate) for c in found.fitted if c.untuned_rate is not None and c.within}
    if given:
        blocks.append(
            {
                "not tuned": list(given),
                "log2 of the rate": [f"{math.log2(rate):.2f}" for _, rate in given.values()],
                "on the line": [f"{rates.octaves(cell):.2f}" for cell, _ in given.values()],
            }
        )
    return blocks
