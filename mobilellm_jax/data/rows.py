"""Rows of token ids, some of which are not targets.

A row of T + 1 ids is T inputs and, shifted by one, T targets. An id that is input only (a question, a prompt,
padding) is stored as its bitwise complement `~token`, which is negative: -1 is token 0, not a target. The
loss skips negative targets.
"""

from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Int

PADDING = ~0  # token 0, not a target: after the last token of a row, and in rows that fill up a batch

T = TypeVar("T", int, np.ndarray)


def no_target(tokens: T) -> T:
    """Marks token ids as input only."""
    return ~tokens


def is_target(tokens: Int[Any, "*shape"]) -> Bool[Any, "*shape"]:
    return tokens >= 0


def inputs_and_targets(rows_BS: Int[Any, "B S"]) -> tuple[Int[Any, "B T"], Int[Any, "B T"]]:
    """Splits rows of S = T + 1 ids, NumPy or JAX arrays, into T inputs and T targets."""
    import jax.numpy as jnp  # here, as preparing data does without jax

    inputs_BS = jnp.where(is_target(rows_BS), rows_BS, ~rows_BS)
    return inputs_BS[:, :-1], rows_BS[:, 1:]
