"""Generation: `extend` runs the model on the next tokens of a text, with a cache of keys and values."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model import uses
from mobilellm_jax.model.block import Attend, rope_table
from mobilellm_jax.model.ops.attention import attend_to
from mobilellm_jax.model.stack import Params, apply_layer, embed, final_norm, logits, pick
from mobilellm_jax.sharing import LayerPlan, loop_starts

KeysValues = tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]  # of one layer

MOST_UNROLLED = 128  # layers; a plan may have thousands, which would take minutes to compile


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
    T = tokens_BT.shape[1]
    layer = _layer(cache, T, config)
    x_BTD, blocks, own_L = embed(params, tokens_BT, config), params["blocks"], uses.of_layers(params, config)
    if isinstance(blocks, list) and T == 1 and len(config.plan) <= MOST_UNROLLED:
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


def exit_places(plan: LayerPlan) -> tuple[int, ...]:
    """Numbers of layers after which generation may stop: whole loops; every layer where nothing repeats."""
    starts = loop_starts(plan)
    return tuple(place for place in range(1, len(plan)) if starts[place] or not any(starts))


def extend_until_sure(
    params: Params,
    tokens_B1: Int[Array, "B 1"],
    cache: Cache,
    config: ModelConfig,
    exits: tuple[int, ...],
    threshold: float,
) -> tuple[Float[Array, "B 1 D"], Cache, Int[Array, ""]]:
    """`extend` by one token that leaves out what follows once the model is sure; gives the layers applied.

    At the exits the state goes through final norm and head. Where the largest probability is above
    the threshold in all rows, the rest of the layers is not applied; later tokens find there the keys and
    values of the state as it was left (as in CALM, Schuster et al. 2022, arXiv 2207.07061).

    Args:
      params: with a list of blocks (`unstack`).
      tokens_B1: the next token of each row.
      cache: of the tokens before.
      config: the model's.
      exits: numbers of layers after which it may stop, rising.
      threshold: from 0, where one loop is enough, to 1, where all layers are applied.
    """
    layer, own_L, plan = _layer(cache, 1, config), uses.of_layers(params, config), config.plan
    x_B1D, applied, is_sure = embed(params, tokens_B1, config), jnp.int32(0), jnp.bool_(False)
    ends, layers = (*exits, len(plan)), list(cache.layers)
    for start, end in zip((0, *ends[:-1]), ends, strict=True):

        def go_on(x_B1D: Array, old: Any, places: Any = range(start, end)) -> tuple[Array, Any]:
            new = []
            for place, of_layer in zip(places, old, strict=True):
                x_B1D, kept = layer(params["blocks"][plan[place]], pick(own_L, place), x_B1D, of_layer)
                new.append(kept)
            return x_B1D, new

        def leave(x_B1D: Array, old: Any, places: Any = range(start, end)) -> tuple[Array, Any]:
            # What only the output depends on, the compiler leaves out: all but norm, keys and values.
            return x_B1D, [
                layer(params["blocks"][plan[place]], pick(own_L, place), x_B1D, of_layer)[1]
                for place, of_layer in zip(places, old, strict=True)
            ]

        x_B1D, layers[start:end] = lax.cond(is_sure, leave, go_on, x_B1D, layers[start:end])
        applied += jnp.where(is_sure, 0, end - start)
        if end < len(plan):
            p_BV = jax.nn.softmax(logits(params, final_norm(params, x_B1D, config))[:, 0])
            is_sure |= jnp.all(jnp.max(p_BV, axis=-1) > threshold)
    return final_norm(params, x_B1D, config), Cache(tuple(layers), cache.padding, cache.used + 1), applied


def _layer(cache: Cache, T: int, config: ModelConfig) -> Callable[..., tuple[Any, KeysValues]]:
    """(weights, own, x_BTD, old keys and values) -> output and new ones, at the next T tokens of a cache."""
    slot_T, slot_S = cache.used + jnp.arange(T), jnp.arange(cache.layers[0][0].shape[2])
    rope = rope_table(slot_T[None, :] - cache.padding[:, None], config)
    is_token_BS = slot_S[None, :] >= cache.padding[:, None]
    sees_BTS = is_token_BS[:, None, :] & (slot_S[None, :] <= slot_T[:, None])[None, :, :]

    def layer(weights: Params, own: Params, x_BTD: Float[Array, "B T D"], old: KeysValues) -> tuple[Any, Any]:
        return apply_layer(weights, own, x_BTD, config, rope, _attend_to_all(old, cache.used, sees_BTS))

    return layer


def _attend_to_all(old: KeysValues, used: Int[Array, ""], sees_BTS: Bool[Array, "B T S"]) -> Attend:
    """Attention to the keys and values in the cache and the new ones, which it adds at slot `used`."""

    def attend(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array) -> tuple[Array, KeysValues]:
        at, (old_k_BKSH, old_v_BKSH) = (0, 0, used, 0), old
        k_BKSH = lax.dynamic_update_slice(old_k_BKSH, k_BTKH.swapaxes(1, 2), at)
        v_BKSH = lax.dynamic_update_slice(old_v_BKSH, v_BTKH.swapaxes(1, 2), at)
        return attend_to(q_BTNH, k_BKSH, v_BKSH, sees_BTS), (k_BKSH, v_BKSH)

    return attend
