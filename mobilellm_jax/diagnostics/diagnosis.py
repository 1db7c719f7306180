"""The diagnosis of a model on held-out rows: all plans and readings, added up on the host in float64.

Letters: R rows of T targets, U units that rows or documents are joined to.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from mobilellm_jax import model
from mobilellm_jax.analysis.layers import effective_depth, interval, joined_units
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.rows import inputs_and_targets, is_target
from mobilellm_jax.diagnostics.layer_use import (
    costs,
    padded,
    plan_losses,
    plans_of,
    skipped,
    swapped,
    without,
)
from mobilellm_jax.diagnostics.readings import Readings, readings
from mobilellm_jax.model.uses import written_out
from mobilellm_jax.parallel import partition
from mobilellm_jax.sharing import LayerPlan
from mobilellm_jax.training.held_out import row_order

Batches = Callable[[], Iterator[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What the layers of a model do; losses are nats per token, lists are by layer applied.

    Attributes:
      plan: block of each layer.
      targets: tokens predicted.
      loss: of the trained plan.
      skipped: loss without one layer.
      costs: see `layer_use.costs`.
      swapped: loss with a layer and the next one exchanged, [L - 1].
      without: loss without all uses of a block, by block; None for a block that is used once.
      lens, cosine, distance, uniform_distance: see `Readings`, means over the targets; `lens` begins with
        that of the embedding, [L + 1]; `distance` is by layer and head.
      effective_depth: see `analysis.layers`: {"value", "low", "high" (None with one unit), "units"}.
    """

    plan: list[int]
    targets: int
    loss: float
    skipped: list[float]
    costs: list[float]
    swapped: list[float]
    without: list[float | None]
    lens: list[float]
    cosine: list[float]
    distance: list[list[float]]
    uniform_distance: float
    effective_depth: dict[str, int | float | None]


def diagnose(
    params: model.Params,
    config: ModelConfig,
    mesh: Mesh,
    batches: Batches,
    document_RT: Int[np.ndarray, "R T"] | None = None,
) -> Diagnosis:
    """Diagnoses a model.

    Args:
      params: of the model.
      config: its shape. Where uses of a block differ, each layer is a block of its own in the diagnosis.
      mesh: where to compute.
      batches: each call yields this process's part of int32 arrays [B, T + 1] of rows, all of one B, as
        `partition.process_share` has it.
      document_RT: of every target of the R rows in the order in which one process would read them; without
        it, the interval is over rows.
    """
    share = partition.process_share(mesh)
    params = jax.device_put(params, partition.shardings(params, mesh))
    params, config = written_out(params, config)
    place = functools.partial(jax.make_array_from_process_local_data, partition.batch_sharding(mesh))
    losses, read = _programs(config, mesh)
    plans = plans_of(config.plan)
    arrays = [np.array(padded(plan, config.effective_depth), np.int32) for plan in plans]
    # The last line of `by_unit` counts the targets.
    by_unit, sums, start = np.zeros((len(plans) + 1, 0)), dict[str, Any](), 0
    for batch in batches():
        rows = place(batch)
        order = row_order(rows.sharding, len(rows), **share)
        is_target_BT, found = jax.device_get(read(params, rows))
        for name, values in found._asdict().items():
            axis = 0 if values.ndim == 1 else 1  # behind that of the layers
            sums[name] = sums.get(name, 0.0) + values.sum(axis=axis, dtype=np.float64)
        nats = jax.device_get([losses(params, rows, plan_L) for plan_L in arrays])
        numbers_RT = start + np.arange(len(rows))[:, None] + np.zeros_like(is_target_BT, int)
        unit_RT = numbers_RT if document_RT is None else document_RT[start : start + len(rows)]
        is_target_RT = is_target_BT[order][: len(unit_RT)]
        lines = [nats_RT[order][: len(unit_RT)][is_target_RT] for nats_RT in nats]
        by_unit = _add(by_unit, [*lines, np.ones_like(lines[0])], unit_RT[is_target_RT])
        start += len(rows)
    by_unit = by_unit[:, by_unit[-1] > 0]
    return _summary(config.plan, dict(zip(plans, by_unit[:-1], strict=True)), sums)


def _add(by_unit: np.ndarray, lines: list[np.ndarray], unit: np.ndarray) -> np.ndarray:
    """Adds lines of numbers to sums by unit, [lines, U]; `unit` is that of each number in a line."""
    known = by_unit.shape[1]
    total = np.array([np.bincount(unit, line.astype(np.float64), known) for line in lines])
    total[:, :known] += by_unit
    return total


def _summary(plan: LayerPlan, nats_U: dict[LayerPlan, np.ndarray], sums: dict[str, Any]) -> Diagnosis:
    """Makes the diagnosis from nats by plan and unit, and from sums of `Readings` over all rows."""
    targets = int(sums["targets"])
    loss = {one: float(nats.sum()) / targets for one, nats in nats_U.items()}
    cost = costs(plan, loss)
    joined = {one: joined_units(nats) for one, nats in nats_U.items()}
    cost_LU = np.array(costs(plan, joined))
    low, high = interval(cost_LU)
    mean = {name: of / targets for name, of in sums.items()}
    places = range(len(plan))
    return Diagnosis(
        plan=list(plan),
        targets=targets,
        loss=loss[plan],
        skipped=[loss[skipped(plan, place)] for place in places],
        costs=cost,
        swapped=[loss[swapped(plan, place)] for place in places[:-1]],
        without=[loss[without(plan, u)] if plan.count(u) > 1 else None for u in range(len(set(plan)))],
        lens=[float(mean["embedding"]), *mean["lens"].tolist()],
        cosine=mean["cosine"].tolist(),
        distance=mean["distance"].tolist(),
        uniform_distance=float(mean["uniform"]),
        effective_depth={
            "value": float(effective_depth(np.array(cost))),
            "low": low,
            "high": high,
            "units": cost_LU.shape[1],
        },
    )


@functools.lru_cache(maxsize=1)
def _programs(config: ModelConfig, mesh: Mesh) -> tuple[Any, Any]:
    """(params, rows, plan) -> nats [B, T], and (params, rows) -> (is_target [B, T], `Readings`)."""

    def losses(params: model.Params, rows_BS: Array, plan_L: Array) -> Array:
        with partition.in_use(mesh):
            return plan_losses(params, rows_BS, plan_L, config)

    def read(params: model.Params, rows_BS: Array) -> tuple[Array, Readings]:
        with partition.in_use(mesh):
            _, targets_BT = inputs_and_targets(rows_BS)
            return is_target(targets_BT), readings(params, rows_BS, config)

    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(losses, out_shardings=everywhere), jax.jit(read, out_shardings=everywhere)
