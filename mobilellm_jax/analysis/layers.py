"""Whether a model uses its depth: effective depth, and what the layers of a study's designs are worth."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from mobilellm_jax.analysis import statistics
from mobilellm_jax.analysis.facts import Point
from mobilellm_jax.analysis.records import LAYERS
from mobilellm_jax.analysis.statistics import LEVEL, Estimate

RESAMPLES = 2000
_MOST_UNITS = 500  # neighbours are joined, as in `Record.documents`


def effective_depth(costs: Float[np.ndarray, "*batch L"]) -> Float[np.ndarray, "*batch"]:
    """Participation ratio of the effects of the layers: (sum of sqrt(cost))^2 / (sum of costs).

    It is k where k layers cost the same and the others nothing, so it lies between 1 and the number of
    layers; 0 where no layer costs anything. A layer without which the loss is lower costs 0.

    Why this one. A participation ratio (Bell and Dean 1970, "Atomic vibrations in vitreous silica") has no
    threshold and no scale: the costs of a good and of a bad model are comparable. It is taken of square roots
    because the loss of a trained model rises with the square of what is removed from it (LeCun et al. 1990,
    "Optimal brain damage"), so the root of a cost is the size of a layer's effect. Of the costs themselves it
    would be hardly above 1 for most models: all later layers read what the first one wrote, and without it
    the loss rises by many times what any other layer costs. The price is that noise in costs near 0 counts:
    a cost that is 1 % of the largest adds a fifth of a layer.

    A cost is what the trained model loses without the layer, not what a model trained without it would lose.
    The record has all costs, so that other definitions need no other run.
    """
    gains = np.maximum(np.asarray(costs, np.float64), 0)
    total = np.sum(gains, axis=-1)
    effects = np.sum(np.sqrt(gains), axis=-1)
    return np.divide(effects**2, total, out=np.zeros_like(total), where=total > 0)


def interval(
    nats_LU: Float[np.ndarray, "L U"], resamples: int = RESAMPLES
) -> tuple[float, float] | tuple[None, None]:
    """95 % percentile interval of the effective depth, by a bootstrap over held-out units.

    Args:
      nats_LU: what every layer costs in U units (documents or rows), as sums over their targets. Units are
        drawn again with all their targets and layers.
      resamples: how many.

    Returns:
      Its ends; None with one unit.
    """
    units = nats_LU.shape[1]
    if units < 2:
        return None, None
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(units, np.full(units, 1 / units), resamples).astype(float)
    values = effective_depth(drawn @ nats_LU.T)
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def joined_units(sums_U: Float[np.ndarray, "U"]) -> Float[np.ndarray, "V"]:
    """Joins neighbours, evenly, where there are more than 500 units."""
    groups = min(len(sums_U), _MOST_UNITS)
    return np.add.reduceat(sums_U, np.arange(groups) * len(sums_U) // groups)


# --- the designs of a study -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LayerUse:
    """What the layers of one design are worth; lists are means over the seeds, by layer applied.

    Attributes:
      layers: L.
      depth: effective depth, over the seeds.
      low, high: ends of the runs' own intervals over held-out units, means over the seeds; None without.
      costs: see `diagnostics.layer_use.costs`; nats per token.
      swapped: rise of the loss where a layer and the next one are exchanged, [L - 1].
      lens: loss after each layer, that of the embedding first, [L + 1].
      cosine: of input and output.
      distance: of attention, mean over the heads, in tokens; `uniform` is that of uniform attention.
    """

    point: str
    layers: int
    depth: Estimate
    low: float | None
    high: float | None
    costs: list[float]
    swapped: list[float]
    lens: list[float]
    cosine: list[float]
    distance: list[float]
    uniform: float


def layer_use(points: Mapping[str, Point]) -> list[LayerUse]:
    """One for each point of which runs were diagnosed, in the study's order."""
    found = []
    for label, point in points.items():
        entries = [entry for run in point.finished if (entry := (run.diagnostics or {}).get(LAYERS))]
        if entries:
            found.append(_of_point(label, entries))
    return found


def _of_point(label: str, entries: Sequence[dict[str, Any]]) -> LayerUse:
    def mean(name: str) -> list[float]:
        return np.mean([entry[name] for entry in entries], axis=0).tolist()

    depths = [entry["effective_depth"] for entry in entries]
    known = [(of["low"], of["high"]) for of in depths if of["low"] is not None]
    low, high = np.mean(known, axis=0).tolist() if known else (None, None)
    rises = [np.array(entry["swapped"]) - entry["loss"] for entry in entries]
    return LayerUse(
        point=label,
        layers=len(entries[0]["plan"]),
        depth=statistics.mean_and_interval([of["value"] for of in depths]),
        low=low,
        high=high,
        costs=mean("costs"),
        swapped=np.mean(rises, axis=0).tolist(),
        lens=mean("lens"),
        cosine=mean("cosine"),
        distance=np.mean([entry["distance"] for entry in entries], axis=(0, 2)).tolist(),
        uniform=float(np.mean([entry["uniform_distance"] for entry in entries])),
    )
