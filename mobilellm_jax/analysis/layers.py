"""Whether a model uses its depth: effective depth, and what the layers of a study's designs are worth."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from mobilellm_jax.analysis import statistics
from mobilellm_jax.analysis.facts import Point
from mobilellm_jax.analysis.statistics import LEVEL, Estimate

ENTRY = "layers"  # name of the entry in `Record.diagnostics`
RESAMPLES = 2000
_MOST_UNITS = 500  # neighbours are joined, as in `Record.documents`


def effective_depth(costs: Float[np.ndarray, "*batch L"]) -> Float[np.ndarray, "*batch"]:
    """Participation ratio of the costs of the layers, (sum of costs)^2 / (sum of squared costs).

    It is k where k layers cost the same and the others nothing, so it lies between 1 and the number of
    layers; 0 where no layer costs anything. A layer without which the loss is lower counts as 0.

    Why this one. It has no threshold, and no scale: the costs of a good and of a bad model are comparable.
    Being a ratio of second moments (the participation ratio of Bell and Dean 1970, "Atomic vibrations in
    vitreous silica"; the Hill number of order 2), it is moved little by costs near 0, which are mostly noise;
    counts above a threshold and the entropy are moved a lot. It is low where one layer carries almost all:
    often the first, without which the others read what they never saw. The record has the costs, which say
    whether that is so. A cost is what the trained model loses without the layer, not what a model trained
    without it would lose.
    """
    gains = np.maximum(np.asarray(costs, np.float64), 0)
    most = np.max(gains, axis=-1, keepdims=True)
    shares = np.divide(gains, most, out=np.zeros_like(gains), where=most > 0)  # squares must not underflow
    squares = np.sum(shares**2, axis=-1)
    return np.divide(np.sum(shares, axis=-1) ** 2, squares, out=np.zeros_like(squares), where=squares > 0)


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
        entries = [entry for run in point.finished if (entry := (run.diagnostics or {}).get(ENTRY))]
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
