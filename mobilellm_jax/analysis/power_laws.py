"""Loss against size: power-law fits to two families of models, and their crossing."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from mobilellm_jax.errors import UserError

RESAMPLES = 2000
LEVEL = 0.95

Losses = Mapping[float, Sequence[float]]  # size -> one loss for each seed


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """loss = scale * size^-exponent, with a percentile bootstrap interval of the exponent.

    There is no constant term (irreducible loss): fitting it takes more sizes than a small study has.
    """

    scale: float
    exponent: float
    low: float
    high: float

    def __call__(self, size: float | np.ndarray) -> float | np.ndarray:
        return self.scale * np.asarray(size, float) ** -self.exponent


@dataclasses.dataclass(frozen=True)
class Crossing:
    """Where two power laws are equal.

    Attributes:
      size: crossing of the fits to all seeds; None if they are parallel.
      low, high: percentile bootstrap interval; None if it is unbounded or reaches below the smallest size.
      share: fraction of resamples that cross above the smallest size, with the second family lower beyond.
    """

    size: float | None
    low: float | None
    high: float | None
    share: float


def fit(losses: Losses) -> PowerLaw:
    """Fits log loss against log size by least squares, over all seeds.

    The bootstrap resamples seeds within each size.

    Raises:
      UserError: fewer than two sizes, or a size with fewer than two seeds.
    """
    (slope, intercept), samples = _bootstrap([losses])
    low, high = np.quantile(-samples[0], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return PowerLaw(float(np.exp(intercept)), float(-slope), float(low), float(high))


def crossing(first: Losses, second: Losses) -> Crossing:
    """Computes the size above which the second family has the lower loss. Errors as in `fit`."""
    estimate, samples = _bootstrap([first, second])
    size = _crossing(*estimate)
    sizes = _crossing(*samples)
    smallest = min([*first, *second])
    crosses = np.isfinite(sizes) & (sizes >= smallest) & (samples[2] < samples[0])
    already_below = samples[3] + samples[2] * np.log(smallest) < samples[1] + samples[0] * np.log(smallest)
    sizes = np.where(crosses, sizes, np.where(already_below, 0, np.inf))
    # "inverted_cdf" does not interpolate, which would fail between an infinite and a finite size.
    low, high = np.quantile(sizes, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    is_known = low > 0 and np.isfinite(high)
    return Crossing(
        size=float(size) if np.isfinite(size) else None,
        low=float(low) if is_known else None,
        high=float(high) if is_known else None,
        share=float(np.mean(crosses)),
    )


def _crossing(slope_1: Any, intercept_1: Any, slope_2: Any, intercept_2: Any) -> Any:
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        return np.exp(np.asarray(intercept_2 - intercept_1) / (slope_1 - slope_2))


def _bootstrap(families: Sequence[Losses]) -> tuple[np.ndarray, np.ndarray]:
    """Slope and intercept of each family: estimates [2 families], bootstrap [2 families, RESAMPLES]."""
    for losses in families:
        if len(losses) < 2 or min(map(len, losses.values())) < 2:
            found = ", ".join(f"{size:,.0f} ({len(values)} seeds)" for size, values in losses.items())
            raise UserError(
                "cannot fit a power law: it takes two or more sizes with two or more seeds each; "
                f"found {found}"
            )
    # The least-squares line of each family is a fixed matrix times its losses.
    solvers = [
        np.linalg.pinv(np.vander(np.concatenate([np.full(len(v), np.log(n)) for n, v in f.items()]), 2))
        for f in families
    ]
    counts = [len(losses) for losses in families]

    def lines(*columns: np.ndarray, axis: int = -1) -> np.ndarray:
        """Slope and intercept of each family, on a new first axis."""
        found, start = [], 0
        for solver, count in zip(solvers, counts, strict=True):
            y = np.concatenate(columns[start : start + count], axis=axis)
            found += list(np.moveaxis(y @ solver.T, -1, 0))
            start += count
        return np.array(found)

    columns = [np.log(np.asarray(values, float)) for losses in families for values in losses.values()]
    samples = stats.bootstrap(
        columns,
        lines,
        vectorized=False,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return lines(*columns), samples.bootstrap_distribution
