"""Rows of token ids, some of which are not targets.

A row of T + 1 ids is T inputs and, shifted by one, T targets. An id that is input only (a question, a prompt,
padding) is stored as its bitwise complement `~token`, which is negative: -1 is token 0, not a target. The
loss skips negative targets. An id from 2**30 on holds two, see `asked`.
"""

from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Int

PADDING = ~0  # token 0, not a target: after the last token of a row, and in rows that fill up a batch
BITS = 15  # of each of the two ids that `asked` joins
_ASKED, _MASK = 1 << 30, (1 << BITS) - 1

T = TypeVar("T", int, np.ndarray)


def no_target(tokens: T) -> T:
    """Marks token ids as input only."""
    return ~tokens


def asked(inputs: T, targets: T) -> T:
    """Joins two ids below 2**15: the next input, and a target that is not fed back as an input."""
    return _ASKED | targets << BITS | inputs


def is_target(tokens: Int[Any, "*shape"]) -> Bool[Any, "*shape"]:
    return tokens >= 0


def inputs_and_targets(rows_BS: Int[Any, "B S"]) -> tuple[Int[Any, "B T"], Int[Any, "B T"]]:
    """Splits rows of S = T + 1 ids, NumPy or JAX arrays, into T inputs and T targets."""
    import jax.numpy as jnp  # here, as preparing data does without jax

    is_asked_BS = rows_BS >= _ASKED
    inputs_BS = jnp.where(is_target(rows_BS), rows_BS, ~rows_BS)
    inputs_BS = jnp.where(is_asked_BS, rows_BS & _MASK, inputs_BS)
    targets_BS = jnp.where(is_asked_BS, rows_BS >> BITS & _MASK, rows_BS)
    return inputs_BS[:, :-1], targets_BS[:, 1:]


def targets_of(rows_RS: np.ndarray) -> np.ndarray:
    """Targets of NumPy rows, [R, T]; negative where there is none."""
    ids_RT = rows_RS[:, 1:]
    return np.where(ids_RT >= _ASKED, ids_RT >> BITS & _MASK, ids_RT)
