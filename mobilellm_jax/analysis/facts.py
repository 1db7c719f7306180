"""Facts and points of one study at one preset, collected from its records before any statistics."""

import dataclasses
import functools
import graphlib
import heapq
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from mobilellm_jax.analysis.records import Record, Scalar

_PLAN = {"depth", "sharing", "num_repeats"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """Question and protocol of a study, from the run that ended last; fields as in `Record`.

    Attributes:
      pairs: (point, other) for every requested comparison, merged over all records.
    """

    study: str
    preset: str
    question: str
    matched: str
    scientific: list[str]
    nuisance: list[str]
    tuning: Literal["fitted", "grid", "transferred", "none"]
    metric: str
    pairs: list[tuple[str, str]]
    margin: float
    x: dict[str, Any] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One design point and its runs; the fields from `x` to `arm` are those of `Record`.

    Attributes:
      budgets: with those of latency, `Record.costs`.
      comparison: the runs that are compared, in order of seed; [] for a point that was only tuned so far.
      tuning: the runs of the learning-rate search, in order of rate and seed.
    """

    label: str
    index: int
    x: dict[str, Any] | None
    overrides: dict[str, Scalar]
    config: dict[str, dict[str, Any]]
    layer_plan: list[int]
    budgets: dict[str, int | float]
    parameters: dict[str, int]
    design: str | None
    arm: str | None
    comparison: list[Record]
    tuning: list[Record]

    @property
    def is_control(self) -> bool:
        """True for a design that lies outside the matched budget on purpose."""
        return any(run.plan is not None and run.plan["control"] for run in self.runs)

    @property
    def runs(self) -> list[Record]:
        """All runs, in order of seed."""
        return sorted([*self.comparison, *self.tuning], key=lambda run: run.seed)

    @functools.cached_property
    def finished(self) -> list[Record]:
        """Comparison runs that finished."""
        return [run for run in self.comparison if run.status == "finished"]

    @functools.cached_property
    def scores(self) -> dict[int, float]:
        """Final value of the metric by seed, of the finished comparison runs."""
        return {run.seed: run.score for run in self.finished}


def facts_of(records: Iterable[Record]) -> Facts:
    """Collects the facts of one study; where records disagree, the run that ended last decides."""
    records = list(records)
    speaker = max(records, key=lambda run: (run.created, run.point_index, run.seed))
    fields = {field.name: getattr(speaker, field.name) for field in dataclasses.fields(Facts)}
    return Facts(**{**fields, "pairs": pairs_of(records)})


def points_of(records: Iterable[Record]) -> dict[str, Point]:
    """Groups records into points by label, in the study's order, whatever the order of the records."""
    groups: dict[str, list[Record]] = {}
    for run in sorted(records, key=lambda r: (r.point_index, r.point, r.seed, r.phase, r.learning_rate)):
        groups.setdefault(run.point, []).append(run)
    points = {}
    for label, runs in groups.items():
        first = runs[0]
        points[label] = Point(
            label=label,
            index=first.point_index,
            x=first.x,
            overrides=first.overrides,
            config=first.config,
            layer_plan=first.layer_plan,
            budgets=first.costs,
            parameters=first.parameters,
            design=first.design,
            arm=first.arm,
            comparison=[run for run in runs if run.phase == "comparison"],
            tuning=sorted((r for r in runs if r.phase == "tuning"), key=lambda r: (r.learning_rate, r.seed)),
        )
    return points


def used_once(point: Point, points: Iterable[Point]) -> list[Point]:
    """Those that apply blocks like the point's once each: any number of blocks, trained in any way."""
    return [
        other
        for other in points
        if other.layer_plan == list(range(len(other.layer_plan))) and _block(other) == _block(point)
    ]


def _block(point: Point) -> dict[str, str]:
    """What one block is: not the plan, nor what each use has of its own."""
    model = point.config["model"].items()
    return {k: repr(v) for k, v in model if k not in _PLAN and not k.startswith("loop_")}


def have_base_shape(points: Mapping[str, Point]) -> bool:
    """True where all have the base shape, at which mup and completep are standard."""
    return all(
        (model.get("base_depth"), model.get("base_width")) == (len(point.layer_plan), model["width"])
        and model["depth"] == len(point.layer_plan)
        for point in points.values()
        for model in [point.config["model"]]
    )


def pairs_of(records: Iterable[Record]) -> list[tuple[str, str]]:
    """Merges the (point, other) pairs of all records of one study, in the study's order.

    Each record has some of the pairs, in order: a topological sort merges them. Ties are broken by the
    indices of other and point.
    """
    places: dict[str, int] = {}
    lists: set[tuple[tuple[str, str], ...]] = set()
    for record in records:
        places[record.point] = record.point_index
        lists.add(tuple(dict.fromkeys((a, b) for a, b in record.pairs)))

    def place(pair: tuple[str, str]) -> list[tuple[int | float, str]]:
        return [(places.get(point, math.inf), point) for point in reversed(pair)]

    sorter = graphlib.TopologicalSorter({pair: () for part in lists for pair in part})
    for part in lists:
        for before, after in itertools.pairwise(part):
            sorter.add(after, before)
    try:
        sorter.prepare()
    except graphlib.CycleError:  # the study's order was changed between the runs
        return sorted({pair for part in lists for pair in part}, key=place)
    order, ready = [], []
    while sorter.is_active():
        for pair in sorter.get_ready():
            heapq.heappush(ready, (place(pair), pair))
        order.append(heapq.heappop(ready)[1])
        sorter.done(order[-1])
    return order
