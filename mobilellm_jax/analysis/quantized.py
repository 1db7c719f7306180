"""What quantization costs the designs of a study: the gap to full precision, over seeds, and its pairs.

The gap of a run is the loss of the quantized model minus that of the same model in full precision, so the
noise of training cancels in it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mobilellm_jax.analysis import statistics
from mobilellm_jax.analysis.facts import Point
from mobilellm_jax.analysis.statistics import Difference, Estimate

# The smallest difference between two gaps that matters, nats per token: at 8 bits of weights, and at fewer.
# A gap at 8 bits is about 0.001, and one at 4 bits 0.1 to 0.2.
MARGIN_8, MARGIN = 0.005, 0.02
WORDS = {"better": "less fragile", "worse": "more fragile"}


@dataclasses.dataclass(frozen=True)
class Gap:
    """One design under one scheme.

    Attributes:
      gap: nats per token, over the seeds.
      loss: of the quantized model, mean over the seeds.
      bytes, full_bytes: of all weights.
      agreement: share of equal greedy tokens, mean over the seeds.
    """

    point: str
    scheme: str
    gap: Estimate
    loss: float
    bytes: int
    full_bytes: int
    agreement: float


@dataclasses.dataclass(frozen=True)
class GapPair:
    """Difference of the gaps of two designs, with an interval for all pairs of the scheme at once.

    Attributes:
      word: "less fragile" if the gap of `point` is smaller than that of `other`, "more fragile", "no
        difference" (within the margin) or "cannot tell".
    """

    point: str
    other: str
    scheme: str
    difference: Difference | None
    margin: float
    word: str


def gaps(points: Mapping[str, Point]) -> list[Gap]:
    """By scheme, in order of first appearance, then by point; [] if nothing was quantized."""
    found = []
    for scheme in _schemes(points):
        for label, point in points.items():
            entries = [*_entries(point, scheme).values()]
            if entries:
                found.append(
                    Gap(
                        label,
                        scheme,
                        statistics.mean_and_interval([entry["gap"] for entry in entries]),
                        float(np.mean([entry["loss"] for entry in entries])),
                        entries[0]["bytes"],
                        entries[0]["full_bytes"],
                        float(np.mean([entry["agreement"] for entry in entries])),
                    )
                )
    return found


def gap_pairs(points: Mapping[str, Point], pairs: Sequence[tuple[str, str]]) -> list[GapPair]:
    """Compares the gaps of the study's pairs, one family of tests a scheme; [] if nothing was quantized."""
    found = []
    for scheme in _schemes(points):
        of_points = {label: _entries(point, scheme) for label, point in points.items()}
        scores = {
            label: {seed: entry["gap"] for seed, entry in entries.items()}
            for label, entries in of_points.items()
            if entries
        }
        margin = MARGIN_8 if scheme.startswith("w8") else MARGIN
        known = [pair for pair in pairs if all(label in points for label in pair)]
        for pair, decision in zip(known, statistics.decide(scores, known, margin), strict=True):
            word = WORDS.get(decision.word, decision.word)
            found.append(GapPair(*pair, scheme, decision.difference, margin, word))
    return found


def _entries(point: Point, scheme: str) -> dict[int, dict[str, Any]]:
    """What the finished runs of a point say of a scheme, by seed."""
    known = {run.seed: (run.quantized or {}).get(scheme) for run in point.finished}
    return {seed: entry for seed, entry in known.items() if entry is not None}


def _schemes(points: Mapping[str, Point]) -> list[str]:
    """Names of the schemes, from many bits to few."""
    runs = [run for point in points.values() for run in point.finished]
    names = {name for run in runs for name in run.quantized or {}}
    return sorted(names, key=lambda name: (-int(name[1]), name))
