"""How far a difference carries to other held-out documents: a two-way bootstrap over seeds and documents.

The tests of `statistics` ask what other seeds would give on the same held-out text. Here the text is a sample
as well: documents are drawn again, jointly for both points, and seeds independently for each of them (Owen,
The pigeonhole bootstrap, 2007).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import stats

from mobilellm_jax.analysis.facts import Facts, Point
from mobilellm_jax.analysis.records import Record
from mobilellm_jax.analysis.statistics import LEVEL
from mobilellm_jax.analysis.verdicts import Comparison

RESAMPLES = 2000
Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class TwoWay:
    """Difference of two points over seeds and documents, in nats per token.

    Attributes:
      documents: number of held-out documents, or of runs of neighbours.
      mean: difference of the token-weighted losses.
      seeds_error, documents_error: standard error from the choice of the seeds, and of the documents, alone.
      low, high: 95 % interval for other seeds and other documents; None with one seed or one document.
    """

    documents: int
    mean: float
    seeds_error: float
    documents_error: float
    low: float | None
    high: float | None


def two_way(nats_a: Array, nats_b: Array, targets: Array, resamples: int = RESAMPLES) -> TwoWay:
    """Bootstraps the difference a - b of nats per token, a ratio of sums over documents.

    Each resample draws one fewer than there are, without which its variance is too small by (n - 1) / n; and
    the interval is a t interval with the bootstrap's standard error, since with 3 to 8 seeds percentiles are
    too narrow. Its degrees of freedom are those of the three factors together (Satterthwaite), where
    documents count by their effective number, (sum of sizes)^2 / (sum of squares). What is special to one
    seed on one document enters more than once, so that the interval is rather too wide.

    Args:
      nats_a, nats_b: [seeds, documents], of the two points.
      targets: [documents], tokens predicted in each.
      resamples: how many.
    """
    rng = np.random.default_rng(0)
    size = float(np.sum(targets) ** 2 / np.sum(np.square(targets, dtype=float)))
    whole = np.full((1, len(targets)), 1.0)
    documents_RD = _weights(rng, len(targets), resamples)
    seeds_a, seeds_b = (_weights(rng, len(nats), resamples) for nats in (nats_a, nats_b))
    same_a, same_b = (np.full((1, len(nats)), 1.0) for nats in (nats_a, nats_b))

    def losses(seeds: Array, nats: Array, documents: Array) -> Array:
        """Nats per token of each resample; weights [resamples or 1, seeds], [resamples or 1, documents]."""
        of_seeds = seeds @ nats / np.sum(seeds, axis=1, keepdims=True)
        return np.sum(of_seeds * documents, axis=1) / (documents @ targets)

    a, b = losses(same_a, nats_a, whole), losses(same_b, nats_b, whole)
    factors = [
        (losses(seeds_a, nats_a, whole), len(nats_a) - 1),
        (losses(seeds_b, nats_b, whole), len(nats_b) - 1),
        (losses(same_a, nats_a, documents_RD) - losses(same_b, nats_b, documents_RD), size - 1),
    ]
    variances = [float(np.var(values)) for values, _ in factors]
    mean = float(a[0] - b[0])
    low = high = None
    if all(freedom > 0 for _, freedom in factors) and sum(variances) > 0:
        both = losses(seeds_a, nats_a, documents_RD) - losses(seeds_b, nats_b, documents_RD)
        total = sum(variances) ** 2
        freedom = total / sum(v**2 / df for v, (_, df) in zip(variances, factors, strict=True))
        half = float(stats.t.ppf((1 + LEVEL) / 2, freedom) * np.std(both))
        low, high = mean - half, mean + half
    return TwoWay(
        len(targets), mean, math.sqrt(variances[0] + variances[1]), math.sqrt(variances[2]), low, high
    )


def _weights(rng: np.random.Generator, count: int, resamples: int) -> Array:
    """How often each of `count` is drawn, [resamples, count], in `count` - 1 draws."""
    return rng.multinomial(max(1, count - 1), np.full(count, 1 / count), resamples).astype(float)


def over_documents(
    facts: Facts, points: Mapping[str, Point], comparisons: Sequence[Comparison]
) -> list[TwoWay | None]:
    """One for each comparison; None where the records do not hold the same documents for both points."""
    if facts.metric != "loss":
        return [None] * len(comparisons)
    found = {label: _sums(point.finished) for label, point in points.items()}
    results: list[TwoWay | None] = []
    for c in comparisons:
        a, b = found.get(c.point), found.get(c.other)
        same = a is not None and b is not None and np.array_equal(a[1], b[1])
        results.append(two_way(a[0], b[0], a[1]) if same and a and b else None)
    return results


def _sums(runs: Sequence[Record]) -> tuple[Array, Array] | None:
    """Nats [seeds, documents] and targets [documents] of finished runs; None if any lacks or differs."""
    known = [run.documents for run in runs if run.documents is not None]
    if not known or len(known) < len(runs) or any(of["targets"] != known[0]["targets"] for of in known):
        return None
    return np.array([of["nats"] for of in known], float), np.array(known[0]["targets"], float)


def warnings(comparisons: Sequence[Comparison], found: Sequence[TwoWay | None]) -> Iterator[str]:
    """Yields the decided pairs that other documents may decide otherwise."""
    names: dict[int, list[str]] = {}
    for c, over in zip(comparisons, found, strict=True):
        if over is None or over.low is None or over.high is None or c.word not in ("better", "worse"):
            continue
        if over.low <= 0 <= over.high:
            said = f"{c.point!r} and {c.other!r} ({over.mean:+.4f} [{over.low:+.4f}, {over.high:+.4f}])"
            names.setdefault(over.documents, []).append(said)
    for count, pairs in names.items():
        yield (
            f"The difference between {'; '.join(pairs)} holds for these {count} held-out documents; other "
            "text may decide otherwise."
        )
