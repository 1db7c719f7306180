"""Generation: `extend` runs the model on the next tokens of a text, with a cache of keys and values."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.block import Block, rope_table
from mobilellm_jax.model.stack import Params, cast, constrain, embed, final_norm, pick
from mobilellm_jax.sharing import uses_in_a_row


class Cache(NamedTuple):
    """Keys and values of the tokens read so far, with an entry for every layer *applied*.

    A block that is applied twice has different inputs each time, and therefore different keys.

    Attributes:
      keys, values: L B S K H; slot s of row b contains token s - padding[b].
      padding: B; number of empty slots at the beginning of a row, so that rows of different lengths end
        together.
      used: number of filled slots, padding included.
    """

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]
    padding: Int[Array, "B"]
    used: Int[Array, ""]


def empty_cache(padding_B: Int[Array, "B"], slots: int, config: ModelConfig) -> Cache:
    """Allocates a cache for `slots` tokens, padding included."""
    shape = (config.effective_depth, *padding_B.shape, slots, config.num_kv_heads, config.head_dim)
    keys, values = (jnp.zeros(shape, config.compute_dtype) for _ in range(2))
    return Cache(keys, values, padding_B, jnp.zeros((), jnp.int32))


def extend(
    params: Params, tokens_BT: Int[Array, "B T"], cache: Cache, config: ModelConfig
) -> tuple[Float[Array, "B T D"], Cache]:
    """Computes `hidden` at the next T tokens of each row, and the cache with their keys and values added.

    The caller must ensure that they fit: beyond the last slot, they overwrite earlier entries. The output at
    padding is undefined.
    """
    T = tokens_BT.shape[1]
    slot_T, slot_S = cache.used + jnp.arange(T), jnp.arange(cache.keys.shape[2])
    block, rope = Block(config), rope_table(slot_T[None, :] - cache.padding[:, None], config)
    is_token_BS = slot_S[None, :] >= cache.padding[:, None]
    sees_B1TS = is_token_BS[:, None, None, :] & (slot_S[None, :] <= slot_T[:, None])[None, None, :, :]

    def layer(carry: Any, weights: Params, l: Int[Array, ""]) -> Any:  # noqa: E741, the letter of layers
        x_BTD, *read = carry

        def attend(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array) -> tuple[Array, Any]:
            at = (l, 0, cache.used, 0, 0)
            whole = [
                lax.dynamic_update_slice(old_LBSKH, new_BTKH[None], at)
                for old_LBSKH, new_BTKH in zip(read, (k_BTKH, v_BTKH), strict=True)
            ]
            k_BSKH, v_BSKH = (lax.dynamic_index_in_dim(w_LBSKH, l, keepdims=False) for w_LBSKH in whole)
            return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=sees_B1TS), whole

        y_BTD, memory = block.apply({"params": weights}, x_BTD, rope, attend)
        return constrain(y_BTD, ("data", "fsdp")), *memory

    in_a_row = uses_in_a_row(config.plan)

    def layers(carry: Any, group: Any) -> tuple[Any, None]:
        """Applies one block `in_a_row` times but fetches it once, which is the purpose of `immediate`."""
        first, u = group
        weights = cast(pick(params["blocks"], u), config, "blocks/")
        for use in range(in_a_row):
            carry = layer(carry, weights, first + use)
        return carry, None

    groups = jnp.arange(0, config.effective_depth, in_a_row), jnp.array(config.plan[::in_a_row])
    carry = embed(params, tokens_BT, config), cache.keys, cache.values
    (x_BTD, keys, values), _ = lax.scan(layers, carry, groups)
    return final_norm(params, x_BTD, config), Cache(keys, values, cache.padding, cache.used + T)
