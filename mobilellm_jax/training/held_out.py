"""Held-out scores: loss in nats per token and, where the data have right answers, the share of wrong rows."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mobilellm_jax import data, model
from mobilellm_jax.config import Config
from mobilellm_jax.training.programs import Programs


def evaluate_held_out(
    programs: Programs,
    params: model.Params,
    prepared: data.PreparedData | data.TaskData,
    config: Config,
    share: dict[str, int],
) -> tuple[float, float | None]:
    """Returns the held-out loss in nats per token, and for tasks the fraction of rows with a wrong answer.

    `share` is that of this process in the rows, see `partition.process_share`.
    """
    t = config.train
    batches = data.eval_batches(prepared, batch_size=t.eval_batch_size, rows=t.eval_rows, **share)
    return evaluate_batches(programs, params, batches)


def evaluate_batches(
    programs: Programs, params: model.Params, batches: Iterator[np.ndarray]
) -> tuple[float, float | None]:
    """Returns the loss in nats per token, and for tasks the share of rows with a wrong answer.

    Batches are this process's part of rows of the shape of `programs.eval_rows`.
    """
    place = functools.partial(jax.make_array_from_process_local_data, programs.eval_rows.sharding)
    return scores(jax.device_get([programs.evaluate(params, place(rows)) for rows in batches]))


def scores(sums: Sequence[Mapping[str, Any]]) -> tuple[float, float | None]:
    """Returns the loss in nats per token, and the share of rows with a wrong answer (None for text)."""
    total = {name: math.fsum(float(batch[name]) for batch in sums) for name in sums[0]}
    error = total["wrong"] / total["rows"] if "rows" in total else None
    return total["nats"] / total["targets"], error
