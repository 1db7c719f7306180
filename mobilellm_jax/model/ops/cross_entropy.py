"""Cross-entropy of a language model's head, fused with the product that computes the logits.

Letters: B batch, T position, C positions of one chunk, D width, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def head_logits(x_BTD: Float[Array, "B T D"], head_VD: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    """Computes x head^T in float32."""
    head_VD = head_VD.astype(x_BTD.dtype)
    return jnp.einsum("BTD,VD->BTV", x_BTD, head_VD, preferred_element_type=jnp.float32)


def plain_cross_entropy(
    x_BTD: Float[Array, "B T D"], head_VD: Float[Array, "V D"], targets_BT: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Computes `cross_entropy`, in nats, with all logits at once: the reference of its tests."""
    log_p_BTV = jax.nn.log_softmax(head_logits(x_BTD, head_VD))
    log_p_BT1 = jnp.take_along_axis(log_p_BTV, jnp.maximum(targets_BT, 0)[..., None], axis=-1)
    return -jnp.sum(jnp.where(targets_BT >= 0, log_p_BT1[..., 0], 0.0))


def _pad(x_BTD: Array, targets_BT: Array, chunk: int) -> tuple[Array, Array, int]:
    """Pads to whole chunks with positions without a target; the chunk is at most the length."""
    chunk = min(chunk, x_BTD.shape[1])
    padding = -x_BTD.shape[1] % chunk
    if padding:
        x_BTD = jnp.pad(x_BTD, ((0, 0), (0, padding), (0, 0)))
        targets_BT = jnp.pad(targets_BT, ((0, 0), (0, padding)), constant_values=-1)
    return x_BTD, targets_BT, chunk


class _Chunk(NamedTuple):
    """The losses of C positions, and the terms of their gradient; softmax = e / z."""

    nats_BC1: Float[Array, "B C 1"]
    x_BCD: Float[Array, "B C D"]
    e_BCV: Float[Array, "B C V"]
    z_BC1: Float[Array, "B C 1"]
    is_target_BCV: Bool[Array, "B C V"]
    counts_BC1: Bool[Array, "B C 1"]


def _chunk(x_BTD: Array, head_VD: Array, targets_BT: Array, start: Int[Array, ""], chunk: int) -> _Chunk:
    x_BCD = lax.dynamic_slice_in_dim(x_BTD, start, chunk, axis=1)
    target_BC1 = lax.dynamic_slice_in_dim(targets_BT, start, chunk, axis=1)[..., None]
    logits_BCV = head_logits(x_BCD, head_VD)
    most_BC1 = jnp.max(logits_BCV, axis=-1, keepdims=True)
    e_BCV = jnp.exp(logits_BCV - most_BC1)
    z_BC1 = jnp.sum(e_BCV, axis=-1, keepdims=True)
    is_target_BCV = target_BC1 == jnp.arange(head_VD.shape[0])[None, None, :]
    counts_BC1 = target_BC1 >= 0
    target_logit_BC1 = jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0.0), axis=-1, keepdims=True)
    # Subtract before summing: the difference of two sums over all positions loses digits to large logits.
    nats_BC1 = jnp.log(z_BC1) - (target_logit_BC1 - most_BC1)
    nats_BC1 = jnp.where(counts_BC1, nats_BC1, 0.0)
    return _Chunk(nats_BC1, x_BCD, e_BCV, z_BC1, is_target_BCV, counts_BC1)


def _cross_entropy(
    x_BTD: Float[Array, "B T D"], head_VD: Float[Array, "V D"], targets_BT: Int[Array, "B T"], chunk: int
) -> Float[Array, ""]:
    """Computes -sum log softmax(x head^T)[target] over targets >= 0, `chunk` positions at a time.

    Under differentiation, the forward pass computes the gradients along with the loss: the backward pass only
    scales them, and the logits are not recomputed.
    """
    x_BTD, targets_BT, chunk = _pad(x_BTD, targets_BT, chunk)

    def step(nats: Array, start: Int[Array, ""]) -> tuple[Array, None]:
        return nats + jnp.sum(_chunk(x_BTD, head_VD, targets_BT, start, chunk).nats_BC1), None

    return lax.scan(step, jnp.zeros(()), jnp.arange(0, x_BTD.shape[1], chunk))[0]


def token_cross_entropy(
    x_BTD: Float[Array, "B T D"], head_VD: Float[Array, "V D"], targets_BT: Int[Array, "B T"], chunk: int
) -> Float[Array, "B T"]:
    """Computes the terms of `cross_entropy`, in nats; 0 without a target. Not to be differentiated."""
    (B, T), (x_BTD, targets_BT, chunk) = targets_BT.shape, _pad(x_BTD, targets_BT, chunk)
    starts = jnp.arange(0, x_BTD.shape[1], chunk)
    nats_BT1 = lax.map(lambda start: _chunk(x_BTD, head_VD, targets_BT, start, chunk).nats_BC1, starts)
    return jnp.moveaxis(nats_BT1, 0, 1).reshape(B, -1)[:, :T]


def _forward(x_BTD: Array, head_VD: Array, targets_BT: Array, chunk: int) -> tuple[Array, Any]:
    """Computes the loss, and its gradients with respect to `x_BTD` and `head_VD`."""
    length, dtype = x_BTD.shape[1], x_BTD.dtype
    x_BTD, targets_BT, chunk = _pad(x_BTD, targets_BT, chunk)

    def step(carry: Any, start: Int[Array, ""]) -> tuple[Any, None]:
        nats, dx_BTD, dhead_DV = carry
        c = _chunk(x_BTD, head_VD, targets_BT, start, chunk)
        softmax_BCV = c.e_BCV * jnp.where(c.counts_BC1, 1 / c.z_BC1, 0.0)
        dlogits_BCV = (softmax_BCV - c.is_target_BCV).astype(dtype)
        dx_BCD = jnp.einsum("BCV,VD->BCD", dlogits_BCV, head_VD.astype(dtype))
        dx_BTD = lax.dynamic_update_slice_in_dim(dx_BTD, dx_BCD, start, axis=1)
        dhead_DV += jnp.einsum("BCD,BCV->DV", c.x_BCD, dlogits_BCV, preferred_element_type=jnp.float32)
        return (nats + jnp.sum(c.nats_BC1), dx_BTD, dhead_DV), None

    zeros = jnp.zeros(()), jnp.zeros_like(x_BTD), jnp.zeros_like(head_VD.T)
    (nats, dx_BTD, dhead_DV), _ = lax.scan(step, zeros, jnp.arange(0, x_BTD.shape[1], chunk))
    # Else XLA fuses the transposition into the product: slower on a CPU, and unsupported in bfloat16.
    dhead_DV = lax.optimization_barrier(dhead_DV)
    return nats, (dx_BTD[:, :length], dhead_DV.T)


def _backward(chunk: int, gradients: Any, dnats: Array) -> tuple[Array, Array, None]:
    dx_BTD, dhead_VD = gradients
    return (dx_BTD * dnats).astype(dx_BTD.dtype), dhead_VD * dnats, None


cross_entropy = jax.custom_vjp(_cross_entropy, nondiff_argnums=(3,))
cross_entropy.defvjp(_forward, _backward)
