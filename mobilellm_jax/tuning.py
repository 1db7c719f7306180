"""The search for a learning rate: a coarse grid, extended where the best lies at its edge, then refined."""

import math
from collections.abc import Mapping, Sequence

FINEST = 1.0  # octaves (powers of 2) between the best rate and its neighbours when the search is over
FURTHEST = 4  # coarse steps that the search goes beyond the grid before it gives up


def next_learning_rate(tried: Mapping[float, float], grid: Sequence[float]) -> float | None:
    """Returns the rate to try next, or None when the search is over.

    First come the rates of the grid. While the lowest loss is at the lowest or highest rate tried, the grid
    goes on in that direction by its own step, at most `FURTHEST` times; then the gaps on both sides of the
    best are halved until they are at most `FINEST` octaves. Where the search gave up, the best is still at an
    edge.

    Args:
      tried: learning rate -> final loss; infinite where training diverged.
      grid: at least two rates, rising by one factor.
    """
    for rate in grid:
        if rate not in tried:
            return rate
    rates = sorted(tried)
    place = rates.index(best_learning_rate(tried))
    best, step = rates[place], (grid[-1] / grid[0]) ** (1 / (len(grid) - 1))
    furthest = step ** (FURTHEST - 0.5)  # the half keeps rounding from adding a step or losing one
    if place == 0:
        return best / step if best > grid[0] / furthest else None
    if place == len(rates) - 1:
        return best * step if best < grid[-1] * furthest else None
    # The better neighbour's side first: where that finds a new best, the search is over.
    for neighbour in sorted((rates[place - 1], rates[place + 1]), key=lambda rate: tried[rate]):
        if abs(math.log2(best / neighbour)) > FINEST + 1e-9:
            return math.sqrt(best * neighbour)
    return None


def next_trial(
    tried: Mapping[float, Sequence[float]], grid: Sequence[float], seeds: int
) -> tuple[float, int] | None:
    """Returns (rate, index of its seed) of the run to do next, or None when the search is over.

    The search is made with one seed. Then the best rate and its two neighbours, whose order one run may well
    get wrong, are repeated until they have `seeds` runs each; means decide, and may send the search on.

    Args:
      tried: learning rate -> final losses, infinite where training diverged.
      grid: as in `next_learning_rate`.
      seeds: at least 1.
    """
    means = {rate: sum(losses) / len(losses) for rate, losses in tried.items()}
    rate = next_learning_rate(means, grid)
    if rate is not None:
        return rate, 0
    rates = sorted(tried)
    place = rates.index(best_learning_rate(means))
    for near in rates[max(0, place - 1) : place + 2]:
        if len(tried[near]) < seeds and math.isfinite(means[near]):
            return near, len(tried[near])
    return None


def best_learning_rate(tried: Mapping[float, float]) -> float:
    """Returns the rate with the lowest loss; of equal ones, and where all diverged, the lowest."""
    return min(tried, key=lambda rate: (tried[rate], rate))
