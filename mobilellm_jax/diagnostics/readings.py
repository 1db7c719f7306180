"""What is read in one pass down the trained plan: logit lens, cosines and attention distances by layer."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.rows import inputs_and_targets, is_target
from mobilellm_jax.diagnostics.attention_distance import attend_and_measure
from mobilellm_jax.model import Params, uses
from mobilellm_jax.model.block import rope_table
from mobilellm_jax.model.ops.cross_entropy import token_cross_entropy
from mobilellm_jax.model.stack import apply_layer, embed, final_norm, head_matrix, pick


class Readings(NamedTuple):
    """Sums over the targets of each row; layers in the order of the plan.

    Attributes:
      targets: their number.
      embedding: logit lens (nostalgebraist 2020) before the first layer: nats where its input goes through
        the final norm and the head at once.
      lens: the same after each layer; the last is the model's loss.
      cosine: between the input and the output of a layer, residual stream included: 1 where the layer does
        nothing. 1 - cosine is the block influence of ShortGPT (Men et al. 2024, arXiv 2403.03853).
      distance: of attention, by head, in tokens.
      uniform: what this distance is where attention is uniform.
    """

    targets: Int[Array, "B"]
    embedding: Float[Array, "B"]
    lens: Float[Array, "L B"]
    cosine: Float[Array, "L B"]
    distance: Float[Array, "L B N"]
    uniform: Float[Array, "B"]


def readings(params: Params, rows_BS: Int[Array, "B S"], config: ModelConfig) -> Readings:
    """Reads one batch of rows."""
    tokens_BT, targets_BT = inputs_and_targets(rows_BS)
    counts_BT = is_target(targets_BT)
    positions_T = jnp.arange(tokens_BT.shape[1])
    rope = rope_table(positions_T[None, :], config)

    def lens(x_BTD: Float[Array, "B T D"]) -> Float[Array, "B"]:
        x_BTD = final_norm(params, x_BTD, config)
        nats_BT = token_cross_entropy(x_BTD, head_matrix(params), targets_BT, config.loss_chunk)
        return jnp.sum(nats_BT, axis=1)

    def layer(x_BTD: Float[Array, "B T D"], at: Any) -> tuple[Array, Any]:
        u, own = at
        weights = pick(params["blocks"], u)
        y_BTD, distance_BTN = apply_layer(weights, own, x_BTD, config, rope, attend_and_measure)
        cosine_B = jnp.sum(jnp.where(counts_BT, cosine(x_BTD, y_BTD), 0.0), axis=1)
        distance_BN = jnp.sum(jnp.where(counts_BT[..., None], distance_BTN, 0.0), axis=1)
        return y_BTD, (lens(y_BTD), cosine_B, distance_BN)

    x_BTD, over = embed(params, tokens_BT, config), (jnp.array(config.plan), uses.of_layers(params, config))
    _, (lens_LB, cosine_LB, distance_LBN) = lax.scan(layer, x_BTD, over)
    uniform_B = jnp.sum(jnp.where(counts_BT, positions_T[None, :] / 2, 0.0), axis=1)
    return Readings(jnp.sum(counts_BT, axis=1), lens(x_BTD), lens_LB, cosine_LB, distance_LBN, uniform_B)


def cosine(x_BTD: Float[Array, "B T D"], y_BTD: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """Cosine of the angle between two vectors at each position, in float32."""
    x_BTD, y_BTD = x_BTD.astype(jnp.float32), y_BTD.astype(jnp.float32)
    lengths_BT = jnp.linalg.norm(x_BTD, axis=-1) * jnp.linalg.norm(y_BTD, axis=-1)
    return jnp.sum(x_BTD * y_BTD, axis=-1) / jnp.maximum(lengths_BT, jnp.finfo(jnp.float32).tiny)
