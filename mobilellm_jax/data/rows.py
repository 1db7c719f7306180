"""The meaning of a row of token ids: inputs, targets, and which positions are no target."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def inputs_and_targets(rows_BS: Int[Array, "B S"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Splits rows of S = T + 1 tokens. A negative one is no target; as input it stands for its complement."""
    return jnp.where(rows_BS < 0, ~rows_BS, rows_BS)[:, :-1], rows_BS[:, 1:]
