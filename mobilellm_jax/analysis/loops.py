"""Scores of a study's designs with other numbers of loops than in training."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mobilellm_jax.analysis import statistics
from mobilellm_jax.analysis.facts import Point
from mobilellm_jax.analysis.statistics import Estimate


@dataclasses.dataclass(frozen=True)
class Looped:
    """One design with one number of loops; means are over the seeds.

    Attributes:
      count, trained: number of loops here and in training.
      layers: applied.
      loss: nats per token.
      value: of the study's metric, which may be the loss; None where it is not known.
      levels: {"name", "level", "accuracy"} of a task, lists by level; None without levels.
    """

    point: str
    count: int
    trained: int
    layers: int
    loss: Estimate
    value: Estimate | None
    levels: dict[str, Any] | None


def looped(points: Mapping[str, Point], metric: str) -> list[Looped]:
    """By point in the study's order, then by number of loops; [] if no run was scored so."""
    found = []
    for label, point in points.items():
        of_counts: dict[int, list[dict[str, Any]]] = {}
        for run in point.finished:
            for count, entry in (run.loops or {}).items():
                of_counts.setdefault(int(count), []).append(entry)
        found += [_of(label, count, entries, metric) for count, entries in sorted(of_counts.items())]
    return found


def _of(label: str, count: int, entries: list[dict[str, Any]], metric: str) -> Looped:
    values = [entry[metric] for entry in entries if entry.get(metric) is not None]
    levels = [entry["levels"] for entry in entries if entry["levels"]]
    return Looped(
        point=label,
        count=count,
        trained=entries[0]["trained"],
        layers=entries[0]["layers"],
        loss=statistics.mean_and_interval([entry["loss"] for entry in entries]),
        value=statistics.mean_and_interval(values) if values else None,
        levels={
            "name": levels[0]["name"],
            "level": levels[0]["level"],
            "accuracy": np.mean([of["accuracy"] for of in levels], axis=0).tolist(),
        }
        if levels
        else None,
    )
