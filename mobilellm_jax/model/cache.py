"""Generation: `extend` runs the model on the next tokens of a text, with a cache of keys and values."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model import uses
from mobilellm_jax.model.block import Attend, rope_table
from mobilellm_jax.model.ops.attention import attend_to
from mobilellm_jax.model.stack import Params, apply_layer, embed, final_norm, pick

KeysValues = tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]  # of one layer

_MOST_UNROLLED = 128  # layers; a plan may have thousands, which would take minutes to compile


class Cache(NamedTuple):
    """Keys and values of the tokens read so far, with an entry for every layer *applied*.

    A block that is applied twice has different inputs each time, and therefore different keys.

    Attributes:
      layers: keys and values of each layer, an array each, so that a step updates them in place; slot s of
        row b contains token s - padding[b].
      padding: B; number of empty slots at the beginning of a row, so that rows of different lengths end
        together.
      used: number of filled slots, padding included.
    """

    layers: tuple[KeysValues, ...]
    padding: Int[Array, "B"]
    used: Int[Array, ""]


def empty_cache(padding_B: Int[Array, "B"], slots: int, config: ModelConfig) -> Cache:
    """Allocates a cache for `slots` tokens, padding included."""
    shape = (*padding_B.shape, config.num_kv_heads, slots, config.head_dim)

    def empty() -> Float[Array, "B K S H"]:
        return jnp.zeros(shape, config.compute_dtype)

    layers = tuple((empty(), empty()) for _ in config.plan)
    return Cache(layers, padding_B, jnp.zeros((), jnp.int32))


def extend(
    params: Params, tokens_BT: Int[Array, "B T"], cache: Cache, config: ModelConfig
) -> tuple[Float[Array, "B T D"], Cache]:
    """Computes `hidden` at the next T tokens of each row, and the cache with their keys and values added.

    One loop over the layer plan, compiled once whatever its length. It copies the weights of every layer,
    which is little beside the products of a prompt, but half the time of a single token. So a single token
    with a list of blocks (`unstack`) has no loop and no copies; it takes 0.2 s a layer to compile on a CPU.

    The caller must ensure that they fit: beyond the last slot, they overwrite earlier entries. The output at
    padding is undefined.
    """
    T, S = tokens_BT.shape[1], cache.layers[0][0].shape[2]
    slot_T, slot_S = cache.used + jnp.arange(T), jnp.arange(S)
    rope = rope_table(slot_T[None, :] - cache.padding[:, None], config)
    is_token_BS = slot_S[None, :] >= cache.padding[:, None]
    sees_BTS = is_token_BS[:, None, :] & (slot_S[None, :] <= slot_T[:, None])[None, :, :]

    def layer(weights: Params, own: Params, x_BTD: Float[Array, "B T D"], old: KeysValues) -> tuple[Any, Any]:
        return apply_layer(weights, own, x_BTD, config, rope, _attend_to_all(old, cache.used, sees_BTS))

    x_BTD, blocks, own_L = embed(params, tokens_BT, config), params["blocks"], uses.of_layers(params, config)
    if isinstance(blocks, list) and T == 1 and len(config.plan) <= _MOST_UNROLLED:
        layers = []
        for place, (u, old) in enumerate(zip(config.plan, cache.layers, strict=True)):
            x_BTD, new = layer(blocks[u], pick(own_L, place), x_BTD, old)
            layers.append(new)
    else:

        def pick_and_apply(x_BTD: Float[Array, "B T D"], at: Any) -> tuple[Any, Any]:
            u, own, *old = at
            return layer(pick(blocks, u), own, x_BTD, tuple(old))

        keys_LBKSH, values_LBKSH = map(jnp.stack, zip(*cache.layers, strict=True))
        over = jnp.array(config.plan), own_L, keys_LBKSH, values_LBKSH
        x_BTD, new = lax.scan(pick_and_apply, x_BTD, over)
        layers = list(zip(*map(jnp.unstack, new), strict=True))
    return final_norm(params, x_BTD, config), Cache(tuple(layers), cache.padding, cache.used + T)


def _attend_to_all(old: KeysValues, used: Int[Array, ""], sees_BTS: Bool[Array, "B T S"]) -> Attend:
    """Attention to the keys and values in the cache and the new ones, which it adds at slot `used`."""

    def attend(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array) -> tuple[Array, KeysValues]:
        at, (old_k_BKSH, old_v_BKSH) = (0, 0, used, 0), old
        k_BKSH = lax.dynamic_update_slice(old_k_BKSH, k_BTKH.swapaxes(1, 2), at)
        v_BKSH = lax.dynamic_update_slice(old_v_BKSH, v_BTKH.swapaxes(1, 2), at)
        return attend_to(q_BTNH, k_BKSH, v_BKSH, sees_BTS), (k_BKSH, v_BKSH)

    return attend
