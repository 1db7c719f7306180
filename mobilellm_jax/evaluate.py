"""Held-out scores: loss in nats per token and, where the data have right answers, the share of wrong rows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from mobilellm_jax import model
from mobilellm_jax.config import ModelConfig


def inputs_and_targets(rows_BS: Int[Array, "B S"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Splits rows of S = T + 1 tokens. A negative one is no target; as input it stands for its complement."""
    return jnp.where(rows_BS < 0, ~rows_BS, rows_BS)[:, :-1], rows_BS[:, 1:]


def eval_step(
    params: model.Params, rows_BS: Int[Array, "B S"], config: ModelConfig, answers: bool
) -> dict[str, Array]:
    """Returns sums over a batch of held-out rows: `nats` of loss, and `targets` they are over.

    With `answers` also the number of `rows` that have targets, and how many are `wrong`: at one target or
    more, another token is more probable. This takes a second forward pass, and logits of all positions.
    """
    tokens_BT, targets_BT = inputs_and_targets(rows_BS)
    nats, targets = model.loss(params, tokens_BT, targets_BT, config)
    if not answers:
        return {"nats": nats, "targets": targets}
    guesses_BT = jnp.argmax(model.apply(params, tokens_BT, config), axis=-1)
    is_target_BT = targets_BT >= 0
    wrong = jnp.sum(jnp.any(is_target_BT & (guesses_BT != targets_BT), axis=1))
    rows = jnp.sum(jnp.any(is_target_BT, axis=1))
    return {"nats": nats, "targets": targets, "wrong": wrong, "rows": rows}


def scores(sums: Sequence[Mapping[str, Any]]) -> tuple[float, float | None]:
    """Returns the loss in nats per token, and the share of rows with a wrong answer (None for text)."""
    total = {name: math.fsum(float(batch[name]) for batch in sums) for name in sums[0]}
    error = total["wrong"] / total["rows"] if "rows" in total else None
    return total["nats"] / total["targets"], error
