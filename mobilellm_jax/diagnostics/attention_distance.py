"""How far back heads look: the mean distance t - s from a query to its keys, weighted by attention."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mobilellm_jax.model.ops.attention import attend_causally


def attend_and_measure(
    q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"], v_BTKH: Float[Array, "B T K H"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attends as in training, and gives the mean distance of every query and head, in tokens.

    The mean position is attention with positions for values, in float32: no weights are stored. Takes the
    place of `block.attention_in_training`.
    """
    out_BTNH = attend_causally(q_BTNH, k_BTKH, v_BTKH)
    T = q_BTNH.shape[1]
    position_T = jnp.arange(T, dtype=jnp.float32)
    position_BTKH = jnp.broadcast_to(position_T[None, :, None, None], v_BTKH.shape)
    q_BTNH, k_BTKH = q_BTNH.astype(jnp.float32), k_BTKH.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):  # else a TPU rounds positions to 8 bits
        mean_BTN = attend_causally(q_BTNH, k_BTKH, position_BTKH, "chunks")[..., 0]
    return out_BTNH, position_T[None, :, None] - mean_BTN
