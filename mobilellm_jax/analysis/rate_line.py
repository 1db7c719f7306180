"""The best learning rate over size and horizon: a line through the fitted optima, for cells that have none.

Under CompleteP the best rate depends on the shape by less than a fit of it can tell, but it falls with the
number of tokens. So cells that are too costly to tune take a rate that the others predict, and what its error
costs counts in theirs.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from mobilellm_jax.analysis.cells import Cell
from mobilellm_jax.analysis.shape_law import N0, T0


@dataclasses.dataclass(frozen=True)
class Missed:
    """The optima of one preset, and what the line through those of all other presets says of them.

    Attributes:
      optimum, predicted: means of log2(rate) over its designs.
      error: root mean square over its designs, octaves.
      spread: standard deviation of the optima of its designs, that of their fits included, octaves.
    """

    preset: str
    optimum: float
    predicted: float
    error: float
    spread: float


@dataclasses.dataclass(frozen=True)
class RateLine:
    """log2(rate) = at + of_parameters log2(N / N0) + of_tokens log2(T / T0), by least squares.

    Attributes:
      missed: for each tuned preset, when it is left out.
      curvature: of the loss in log2(rate), nats per octave^2, mean over the tuned designs.
    """

    at: float
    of_parameters: float
    of_tokens: float
    missed: tuple[Missed, ...]
    curvature: float

    @property
    def error(self) -> float:
        """Root mean square of `missed`, octaves."""
        return math.sqrt(sum(one.error**2 for one in self.missed) / len(self.missed))

    def octaves(self, cell: Cell) -> float:
        """log2 of the rate for a cell."""
        return float(_design([cell])[0] @ (self.at, self.of_parameters, self.of_tokens))

    def excess(self, cell: Cell) -> float:
        """Nats that a cell's rate is expected to cost, by the line's error and how far off it it is."""
        off = math.log2(cell.untuned_rate) - self.octaves(cell) if cell.untuned_rate else 0.0
        return self.curvature * (self.error**2 + off**2)


def fit(cells: Sequence[Cell]) -> RateLine | None:
    """Fits the line to the tuned cells of one arm; None if they are too few to leave a preset out."""
    tuned = [cell for cell in cells if cell.optimum is not None]
    missed = []
    for preset in dict.fromkeys(cell.preset for cell in tuned):
        held = [cell for cell in tuned if cell.preset == preset]
        solution = _solve([cell for cell in tuned if cell.preset != preset])
        if solution is None:
            return None
        predicted, optima = _design(held) @ solution, _optima(held)
        error = float(np.sqrt(np.mean((optima - predicted) ** 2)))
        spread = float(np.std(optima, ddof=1)) if len(held) > 1 else 0.0
        missed.append(Missed(preset, float(np.mean(optima)), float(np.mean(predicted)), error, spread))
    solution = _solve(tuned)
    if solution is None:
        return None
    at, of_parameters, of_tokens = map(float, solution)
    curvature = float(np.mean([cell.curvature or 0.0 for cell in tuned]))
    return RateLine(at, of_parameters, of_tokens, tuple(missed), curvature)


def carried(cells: Sequence[Cell], arm: str, line: RateLine) -> list[Cell]:
    """The cells; those of the arm that were not tuned with `RateLine.excess`."""
    return [
        cell
        if cell.untuned_rate is None or cell.arm != arm
        else dataclasses.replace(cell, rate_excess=line.excess(cell))
        for cell in cells
    ]


def _design(cells: Sequence[Cell]) -> np.ndarray:
    return np.array([(1.0, math.log2(c.parameters / N0), math.log2(c.tokens / T0)) for c in cells])


def _optima(cells: Sequence[Cell]) -> np.ndarray:
    return np.array([cell.optimum for cell in cells], float)


def _solve(cells: Sequence[Cell]) -> np.ndarray | None:
    """The three constants; None where the cells do not determine them: at one size, or at one horizon."""
    enough = len({c.preset for c in cells}) > 2 and len({c.size for c in cells}) > 1
    if not enough or len({round(c.horizon) for c in cells}) < 2:
        return None
    return np.linalg.lstsq(_design(cells), _optima(cells), rcond=None)[0]
