"""Held-out scores: loss, bits per byte of text and, for synthetic tasks, the share of wrong rows."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mobilellm_jax import data, model
from mobilellm_jax.config import Config
from mobilellm_jax.training.programs import Programs


class Scores(NamedTuple):
    """Loss in nats per token, the same in bits per byte (None without text), share of wrong rows (tasks)."""

    loss: float
    bits_per_byte: float | None
    error: float | None


def evaluate_held_out(
    programs: Programs,
    params: model.Params,
    prepared: data.Dataset,
    config: Config,
    share: dict[str, int],
) -> Scores:
    """Scores the held-out rows; `share` selects those of this process, see `partition.process_share`."""
    t = config.train
    batches = prepared.eval_batches(batch_size=t.eval_batch_size, rows=t.eval_rows, **share)
    loss, error = evaluate_batches(programs, params, batches)
    # Bytes per token is an average over all held-out text, even where `eval_rows` scores only a part of it.
    bytes_per_token = prepared.bytes_per_token("valid")
    bits = None if bytes_per_token is None else loss / math.log(2) / bytes_per_token
    return Scores(loss, bits, error)


def evaluate_batches(
    programs: Programs, params: model.Params, batches: Iterator[np.ndarray]
) -> tuple[float, float | None]:
    """Computes the loss in nats per token, and for tasks the share of rows with a wrong answer.

    Each batch is this process's part of an array of shape `programs.eval_rows`.
    """
    place = functools.partial(jax.make_array_from_process_local_data, programs.eval_rows.sharding)
    return scores(jax.device_get([programs.evaluate(params, place(rows)) for rows in batches]))


def scores(sums: Sequence[Mapping[str, Any]]) -> tuple[float, float | None]:
    """Computes loss (nats per token) and share of wrong rows (None for text) from the sums of `eval_step`."""
    total = {name: math.fsum(float(batch[name]) for batch in sums) for name in sums[0]}
    error = total["wrong"] / total["rows"] if "rows" in total else None
    return total["nats"] / total["targets"], error
