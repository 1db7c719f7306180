"""Cross-entropy of a language model's head, fused with the product that computes the logits.

Targets are the tokens themselves (`cross_entropy`), or these and the predictions of a teacher
(`distillation`), whose logits are computed in the same way.

Letters: B batch, T position, C positions of one chunk, D width, E width of the teacher, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mobilellm_jax.model.ops.precision import einsum


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


def plain_distillation(
    x_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    teacher_x_BTE: Float[Array, "B T E"],
    teacher_head_VE: Float[Array, "V E"],
    weight: int | float,
    temperature: int | float,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Computes `distillation` with all logits at once: the reference of its tests."""
    log_p_BTV = jax.nn.log_softmax(head_logits(x_BTD, head_VD) / temperature)
    teacher_BTV = jax.nn.softmax(head_logits(teacher_x_BTE, teacher_head_VE) / temperature)
    soft = -jnp.sum(jnp.where(targets_BT >= 0, jnp.sum(teacher_BTV * log_p_BTV, axis=-1), 0.0))
    label = plain_cross_entropy(x_BTD, head_VD, targets_BT)
    return (1 - weight) * label + weight * temperature**2 * soft, label, soft


def _pad(x_BTD: Array, targets_BT: Array, chunk: int) -> tuple[Array, Array, int]:
    """Pads to whole chunks with positions without a target; the chunk is at most the length."""
    chunk = min(chunk, x_BTD.shape[1])
    padding = -x_BTD.shape[1] % chunk
    if padding:
        x_BTD = jnp.pad(x_BTD, ((0, 0), (0, padding), (0, 0)))
        targets_BT = jnp.pad(targets_BT, ((0, 0), (0, padding)), constant_values=-1)
    return x_BTD, targets_BT, chunk


class _Chunk(NamedTuple):
    """The losses of C positions, and the terms of their gradient; softmax = e / z.

    `shifted` are the logits minus the largest of their position: e = exp(shifted).
    """

    nats_BC1: Float[Array, "B C 1"]
    x_BCD: Float[Array, "B C D"]
    shifted_BCV: Float[Array, "B C V"]
    e_BCV: Float[Array, "B C V"]
    z_BC1: Float[Array, "B C 1"]
    is_target_BCV: Bool[Array, "B C V"]
    counts_BC1: Bool[Array, "B C 1"]


def _chunk(x_BTD: Array, head_VD: Array, targets_BT: Array, start: Int[Array, ""], chunk: int) -> _Chunk:
    x_BCD = lax.dynamic_slice_in_dim(x_BTD, start, chunk, axis=1)
    target_BC1 = lax.dynamic_slice_in_dim(targets_BT, start, chunk, axis=1)[..., None]
    logits_BCV = head_logits(x_BCD, head_VD)
    most_BC1 = jnp.max(logits_BCV, axis=-1, keepdims=True)
    shifted_BCV = logits_BCV - most_BC1
    e_BCV = jnp.exp(shifted_BCV)
    z_BC1 = jnp.sum(e_BCV, axis=-1, keepdims=True)
    is_target_BCV = target_BC1 == jnp.arange(head_VD.shape[0])[None, None, :]
    counts_BC1 = target_BC1 >= 0
    target_logit_BC1 = jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0.0), axis=-1, keepdims=True)
    # Subtract before summing: the difference of two sums over all positions loses digits to large logits.
    nats_BC1 = jnp.log(z_BC1) - (target_logit_BC1 - most_BC1)
    nats_BC1 = jnp.where(counts_BC1, nats_BC1, 0.0)
    return _Chunk(nats_BC1, x_BCD, shifted_BCV, e_BCV, z_BC1, is_target_BCV, counts_BC1)


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


def _with_gradients(
    x_BTD: Array,
    head_VD: Array,
    targets_BT: Array,
    chunk: int,
    sums: Any,
    terms: Callable[[_Chunk, Int[Array, ""]], tuple[Any, Array]],
) -> tuple[Any, tuple[Array, Array]]:
    """Adds up losses over chunks of positions, and their gradients with respect to `x_BTD` and `head_VD`.

    Args:
      x_BTD, head_VD, targets_BT, chunk: those of `cross_entropy`.
      sums: zeros, one for each loss.
      terms: function(chunk, first position) that gives the losses of its positions, and the gradient with
        respect to their logits.
    """
    length, dtype = x_BTD.shape[1], x_BTD.dtype
    x_BTD, targets_BT, chunk = _pad(x_BTD, targets_BT, chunk)

    def step(carry: Any, start: Int[Array, ""]) -> tuple[Any, None]:
        sums, dx_BTD, dhead_DV = carry
        c = _chunk(x_BTD, head_VD, targets_BT, start, chunk)
        losses, dlogits_BCV = terms(c, start)
        dlogits_BCV = dlogits_BCV.astype(dtype)
        dx_BCD = einsum("BCV,VD->BCD", dlogits_BCV, head_VD.astype(dtype))
        dx_BTD = lax.dynamic_update_slice_in_dim(dx_BTD, dx_BCD, start, axis=1)
        dhead_DV += jnp.einsum("BCD,BCV->DV", c.x_BCD, dlogits_BCV, preferred_element_type=jnp.float32)
        sums = jax.tree.map(lambda total, loss: total + jnp.sum(loss), sums, losses)
        return (sums, dx_BTD, dhead_DV), None

    zeros = sums, jnp.zeros_like(x_BTD), jnp.zeros_like(head_VD.T)
    (sums, dx_BTD, dhead_DV), _ = lax.scan(step, zeros, jnp.arange(0, x_BTD.shape[1], chunk))
    # Else XLA fuses the transposition into the product: slower on a CPU, and unsupported in bfloat16.
    dhead_DV = lax.optimization_barrier(dhead_DV)
    return sums, (dx_BTD[:, :length], dhead_DV.T)


def _softmax(c: _Chunk) -> Float[Array, "B C V"]:
    """Softmax of the logits; 0 at positions without a target."""
    return c.e_BCV * jnp.where(c.counts_BC1, 1 / c.z_BC1, 0.0)


def _forward(x_BTD: Array, head_VD: Array, targets_BT: Array, chunk: int) -> tuple[Array, Any]:
    """Computes the loss, and its gradients with respect to `x_BTD` and `head_VD`."""

    def terms(c: _Chunk, start: Int[Array, ""]) -> tuple[Array, Array]:
        return c.nats_BC1, _softmax(c) - c.is_target_BCV

    return _with_gradients(x_BTD, head_VD, targets_BT, chunk, jnp.zeros(()), terms)


def _backward(chunk: int, gradients: Any, dnats: Array) -> tuple[Array, Array, None]:
    dx_BTD, dhead_VD = gradients
    return (dx_BTD * dnats).astype(dx_BTD.dtype), dhead_VD * dnats, None


cross_entropy = jax.custom_vjp(_cross_entropy, nondiff_argnums=(3,))
cross_entropy.defvjp(_forward, _backward)


# --- with a teacher -------------------------------------------------------------------------------------


def _soft_terms(
    c: _Chunk, teacher_logits_BCV: Array, weight: int | float, temperature: int | float
) -> tuple[Array, Array]:
    """Nats of the teacher's targets, and the gradient of the whole loss with respect to the logits."""
    target_BCV = jnp.where(c.counts_BC1, jax.nn.softmax(teacher_logits_BCV / temperature), 0.0)
    tempered = c
    if temperature != 1:
        e_BCV = jnp.exp(c.shifted_BCV / temperature)
        tempered = c._replace(e_BCV=e_BCV, z_BC1=jnp.sum(e_BCV, axis=-1, keepdims=True))
    mean_BC1 = jnp.sum(target_BCV * c.shifted_BCV, axis=-1, keepdims=True) / temperature
    nats_BC1 = jnp.where(c.counts_BC1, jnp.log(tempered.z_BC1) - mean_BC1, 0.0)
    if temperature == 1:
        return nats_BC1, _softmax(c) - ((1 - weight) * c.is_target_BCV + weight * target_BCV)
    soft_BCV = weight * temperature * (_softmax(tempered) - target_BCV)
    return nats_BC1, (1 - weight) * (_softmax(c) - c.is_target_BCV) + soft_BCV


def _distillation(
    x_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    teacher_x_BTE: Float[Array, "B T E"],
    teacher_head_VE: Float[Array, "V E"],
    chunk: int,
    weight: int | float,
    temperature: int | float,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Computes the loss of the tokens and of a teacher's predictions, `chunk` positions at a time.

    With the student's distribution p at the temperature tau, p(tau) = softmax(x head^T / tau), and the
    teacher's q(tau), summed over targets >= 0:

      (1 - weight) * -log p(1)[target] + weight * tau^2 * -sum_v q(tau)[v] log p(tau)[v]

    as in Hinton et al. (arXiv 1503.02531), where tau^2 keeps the size of the gradient. At tau = 1 this is one
    cross-entropy with the targets (1 - weight) * onehot + weight * q.

    Returns:
      That loss in nats, which alone has gradients, with respect to `x_BTD` and `head_VD`; and its two terms,
      without their factors: nats of the tokens, and of the teacher's predictions.
    """
    return _distillation_forward(
        x_BTD, head_VD, targets_BT, teacher_x_BTE, teacher_head_VE, chunk, weight, temperature
    )[0]


def _distillation_forward(
    x_BTD: Array,
    head_VD: Array,
    targets_BT: Array,
    teacher_x_BTE: Array,
    teacher_head_VE: Array,
    chunk: int,
    weight: int | float,
    temperature: int | float,
) -> tuple[tuple[Array, Array, Array], Any]:
    chunk = min(chunk, x_BTD.shape[1])
    teacher_x_BTE = jnp.pad(teacher_x_BTE, ((0, 0), (0, -x_BTD.shape[1] % chunk), (0, 0)))

    def terms(c: _Chunk, start: Int[Array, ""]) -> tuple[tuple[Array, Array], Array]:
        teacher_x_BCE = lax.dynamic_slice_in_dim(teacher_x_BTE, start, chunk, axis=1)
        logits_BCV = head_logits(teacher_x_BCE, teacher_head_VE)
        soft_BC1, dlogits_BCV = _soft_terms(c, logits_BCV, weight, temperature)
        return (c.nats_BC1, soft_BC1), dlogits_BCV

    zeros = jnp.zeros(()), jnp.zeros(())
    (label, soft), gradients = _with_gradients(x_BTD, head_VD, targets_BT, chunk, zeros, terms)
    return ((1 - weight) * label + weight * temperature**2 * soft, label, soft), gradients


def _distillation_backward(
    chunk: int, weight: int | float, temperature: int | float, gradients: Any, dnats: tuple[Array, ...]
) -> tuple[Array, Array, None, None, None]:
    return *_backward(chunk, gradients, dnats[0]), None, None


distillation = jax.custom_vjp(_distillation, nondiff_argnums=(5, 6, 7))
distillation.defvjp(_distillation_forward, _distillation_backward)
