"""Cross-entropy of a language model's head, fused with the product that makes the logits.

Letters: B batch, T position, C positions of one chunk, D width, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def head_logits(x_BTD: Float[Array, "B T D"], head_VD: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    """Returns x head^T in float32."""
    head_VD = head_VD.astype(x_BTD.dtype)
    return jnp.einsum("BTD,VD->BTV", x_BTD, head_VD, preferred_element_type=jnp.float32)


def _cross_entropy(
    x_BTD: Float[Array, "B T D"], head_VD: Float[Array, "V D"], targets_BT: Int[Array, "B T"], chunk: int
) -> Float[Array, ""]:
    """Returns -sum log softmax(x head^T)[target] over targets >= 0, `chunk` positions at a time.

    When it is differentiated, the forward pass computes the gradients along with the loss: the gradient of a
    sum only waits to be scaled, and the logits need not be computed again.
    """
    return _scan(x_BTD, head_VD, targets_BT, chunk, with_gradients=False)[0]


def _scan(
    x_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    chunk: int,
    with_gradients: bool,
) -> tuple[Float[Array, ""], Float[Array, "B T D"] | None, Float[Array, "V D"] | None]:
    """Returns the loss and, on request, its gradients with respect to `x_BTD` and `head_VD`."""
    length = x_BTD.shape[1]
    chunk = min(chunk, length)
    padding = -length % chunk
    if padding:
        x_BTD = jnp.pad(x_BTD, ((0, 0), (0, padding), (0, 0)))
        targets_BT = jnp.pad(targets_BT, ((0, 0), (0, padding)), constant_values=-1)
    dtype = x_BTD.dtype
    vocabulary_11V = jnp.arange(head_VD.shape[0])[None, None, :]

    def step(carry: Any, start: Int[Array, ""]) -> tuple[Any, None]:
        nats, dx_BTD, dhead_DV = carry
        x_BCD = lax.dynamic_slice_in_dim(x_BTD, start, chunk, axis=1)
        target_BC1 = lax.dynamic_slice_in_dim(targets_BT, start, chunk, axis=1)[..., None]
        logits_BCV = head_logits(x_BCD, head_VD)
        most_BC1 = jnp.max(logits_BCV, axis=-1, keepdims=True)
        e_BCV = jnp.exp(logits_BCV - most_BC1)
        z_BC1 = jnp.sum(e_BCV, axis=-1, keepdims=True)
        log_z_BC1 = most_BC1 + jnp.log(z_BC1)
        is_target_BCV = target_BC1 == vocabulary_11V
        counts_BC1 = target_BC1 >= 0
        nats += jnp.sum(jnp.where(counts_BC1, log_z_BC1, 0.0))
        nats -= jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0.0))
        if with_gradients:
            softmax_BCV = e_BCV * jnp.where(counts_BC1, 1 / z_BC1, 0.0)
            dlogits_BCV = (softmax_BCV - is_target_BCV).astype(dtype)
            dx_BCD = jnp.einsum("BCV,VD->BCD", dlogits_BCV, head_VD.astype(dtype))
            dx_BTD = lax.dynamic_update_slice_in_dim(dx_BTD, dx_BCD, start, axis=1)
            dhead_DV += jnp.einsum("BCD,BCV->DV", x_BCD, dlogits_BCV, preferred_element_type=jnp.float32)
        return (nats, dx_BTD, dhead_DV), None

    gradients = (jnp.zeros_like(x_BTD), jnp.zeros_like(head_VD.T)) if with_gradients else (None, None)
    starts = jnp.arange(0, x_BTD.shape[1], chunk)
    (nats, dx_BTD, dhead_DV), _ = lax.scan(step, (jnp.zeros(()), *gradients), starts)
    if not with_gradients:
        return nats, None, None
    # Else XLA puts the transposition into the product: slower on a CPU, and not there in bfloat16.
    dhead_DV = lax.optimization_barrier(dhead_DV)
    return nats, dx_BTD[:, :length], dhead_DV.T


def _forward(x_BTD: Array, head_VD: Array, targets_BT: Array, chunk: int) -> tuple[Array, Any]:
    nats, dx_BTD, dhead_VD = _scan(x_BTD, head_VD, targets_BT, chunk, with_gradients=True)
    return nats, (dx_BTD, dhead_VD)


def _backward(chunk: int, gradients: Any, dnats: Array) -> tuple[Array, Array, None]:
    dx_BTD, dhead_VD = gradients
    return (dx_BTD * dnats).astype(dx_BTD.dtype), dhead_VD * dnats, None


cross_entropy = jax.custom_vjp(_cross_entropy, nondiff_argnums=(3,))
cross_entropy.defvjp(_forward, _backward)
