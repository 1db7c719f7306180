"""Causal attention that never stores its weights: the backward pass recomputes them from a log-sum-exp.

`attend_causally` is the one door to its kernels: cuDNN's FlashAttention on NVIDIA GPUs in 16 bits, splash
attention on TPUs (`attention_kernels.py`), and elsewhere the one that is implemented here, "chunks": the
algorithm of FlashAttention (Dao et al. 2022, algorithms 1 and 4) over chunks of queries, without its chunks
of keys. `plain_attention` is what all of them compute.
Letters as in `model/__init__.py`, and
  C queries of one chunk   P keys up to the last of these queries
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from mobilellm_jax.chunks import chunks
from mobilellm_jax.model.ops import attention_kernels
from mobilellm_jax.model.ops.attention_kernels import KEPT
from mobilellm_jax.model.ops.precision import einsum, keep


def plain_attention(
    q_BTNH: Float[Array, "B T N H"], k_BTKH: Float[Array, "B T K H"], v_BTKH: Float[Array, "B T K H"]
) -> Float[Array, "B T N H"]:
    """Computes `attend_causally` with all weights at once: the reference of its tests."""
    B, T = q_BTNH.shape[:2]
    sees_BTS = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
    return attend_to(q_BTNH, k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), sees_BTS)


def attend_causally(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    kernel: str = "auto",
) -> Float[Array, "B T N H"]:
    """Computes softmax(q k^T / sqrt(H)) v over the same and earlier positions, with softmax in float32.

    Query head n uses key/value head n // G, as in Llama. `kernel` is `model.attention` of the config.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    if kernel == "auto":
        kernel = attention_kernels.fastest(q_BTNH.dtype, T, H)
    if kernel in attention_kernels.KERNELS:
        return attention_kernels.KERNELS[kernel](q_BTNH, k_BTKH, v_BTKH)
    # Heads first: batches of plain matrix products, half the time of other layouts on a CPU.
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKTH, v_BKTH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    return _attend(q_BKGTH, k_BKTH, v_BKTH).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def attend_to(
    q_BTNH: Float[Array, "B T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    sees_BTS: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Computes softmax(q k^T / sqrt(H)) v over the positions that a query sees, with softmax in float32.

    Keys and values have heads first, as batches of matrix products need them. A query that sees nothing gets
    the mean of all values.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    score_BKGTS = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
    # Not -inf: a row of these would be NaN, which a later layer would cache and multiply by a weight of 0.
    least = jnp.finfo(jnp.float32).min
    score_BKGTS = jnp.where(sees_BTS[:, None, None, :, :], score_BKGTS * H**-0.5, least)
    weight_BKGTS = jax.nn.softmax(score_BKGTS, axis=-1).astype(v_BKSH.dtype)
    out_BKGTH = einsum("BKGTS,BKSH->BKGTH", weight_BKGTS, v_BKSH)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@jax.custom_vjp
def _attend(
    q_BKGTH: Float[Array, "B K G T H"], k_BKTH: Float[Array, "B K T H"], v_BKTH: Float[Array, "B K T H"]
) -> Float[Array, "B K G T H"]:
    return _forward(q_BKGTH, k_BKTH, v_BKTH)[0]


def _scores(q_BKGCH: Float[Array, "B K G C H"], k_BKPH: Float[Array, "B K P H"]) -> Float[Array, "B K G C P"]:
    """Computes scaled scores in float32, -inf at keys after the query."""
    C, P, H = q_BKGCH.shape[3], k_BKPH.shape[2], q_BKGCH.shape[4]
    score_BKGCP = jnp.einsum("BKGCH,BKPH->BKGCP", q_BKGCH, k_BKPH, preferred_element_type=jnp.float32)
    sees_CP = jnp.arange(P - C, P)[:, None] >= jnp.arange(P)[None, :]
    return jnp.where(sees_CP[None, None, None], score_BKGCP * H**-0.5, -jnp.inf)


def _forward(q_BKGTH: Array, k_BKTH: Array, v_BKTH: Array) -> tuple[Array, Any]:
    outs, log_zs, dtype = [], [], v_BKTH.dtype
    for C, P in chunks(q_BKGTH.shape[3]):
        score_BKGCP = _scores(q_BKGTH[:, :, :, C], k_BKTH[:, :, P])
        most_BKGC1 = jnp.max(score_BKGCP, axis=-1, keepdims=True)
        e_BKGCP = jnp.exp(score_BKGCP - most_BKGC1)
        z_BKGC1 = jnp.sum(e_BKGCP, axis=-1, keepdims=True)
        # Divided after the product, which has fewer elements than the weights.
        sum_BKGCH = jnp.einsum(
            "BKGCP,BKPH->BKGCH", e_BKGCP.astype(dtype), v_BKTH[:, :, P], preferred_element_type=jnp.float32
        )
        outs.append((sum_BKGCH / z_BKGC1).astype(dtype))
        log_zs.append(most_BKGC1 + jnp.log(z_BKGC1))
    out_BKGTH = keep(jnp.concatenate(outs, axis=3), KEPT)
    log_z_BKGT1 = keep(jnp.concatenate(log_zs, axis=3), KEPT)
    return out_BKGTH, (q_BKGTH, k_BKTH, v_BKTH, out_BKGTH, log_z_BKGT1)


def _backward(kept: Any, dout_BKGTH: Array) -> tuple[Array, Array, Array]:
    q_BKGTH, k_BKTH, v_BKTH, out_BKGTH, log_z_BKGT1 = kept
    dtype, scale = q_BKGTH.dtype, q_BKGTH.shape[-1] ** -0.5
    B, K, T, H = k_BKTH.shape
    # The term that all scores of a query share in their gradient: the derivative of log_z. A product with
    # ones, since XLA on a CPU fuses a sum into the matrix product below, at 8 % of a tiny model's step.
    common_BKGTH = dout_BKGTH.astype(jnp.float32) * out_BKGTH
    common_BKGT1 = jnp.einsum("BKGTH,H->BKGT", common_BKGTH, jnp.ones(H))[..., None]
    dqs, dk_BKHT, dv_BKHT = [], jnp.zeros((B, K, H, T)), jnp.zeros((B, K, H, T))
    for C, P in chunks(q_BKGTH.shape[3]):
        q_BKGCH, k_BKPH, dout_BKGCH = q_BKGTH[:, :, :, C], k_BKTH[:, :, P], dout_BKGTH[:, :, :, C]
        weight_BKGCP = jnp.exp(_scores(q_BKGCH, k_BKPH) - log_z_BKGT1[:, :, :, C])
        dweight_BKGCP = jnp.einsum(
            "BKGCH,BKPH->BKGCP", dout_BKGCH, v_BKTH[:, :, P], preferred_element_type=jnp.float32
        )
        dscore_BKGCP = (weight_BKGCP * (dweight_BKGCP - common_BKGT1[:, :, :, C]) * scale).astype(dtype)
        dqs.append(einsum("BKGCP,BKPH->BKGCH", dscore_BKGCP, k_BKPH))
        # Over the chunks, and over the queries of a group, in float32.
        to_keys, exact = "BKGCH,BKGCP->BKHP", jnp.float32
        dk_BKHP = jnp.einsum(to_keys, q_BKGCH, dscore_BKGCP, preferred_element_type=exact)
        dv_BKHP = jnp.einsum(to_keys, dout_BKGCH, weight_BKGCP.astype(dtype), preferred_element_type=exact)
        dk_BKHT, dv_BKHT = dk_BKHT.at[..., P].add(dk_BKHP), dv_BKHT.at[..., P].add(dv_BKHP)
    # Else XLA fuses the transposition into the product: slower on a CPU, and unsupported in bfloat16.
    dk_BKHT, dv_BKHT = lax.optimization_barrier((dk_BKHT, dv_BKHT))
    dk_BKTH, dv_BKTH = (d_BKHT.swapaxes(2, 3).astype(dtype) for d_BKHT in (dk_BKHT, dv_BKHT))
    return jnp.concatenate(dqs, axis=3), dk_BKTH, dv_BKTH


_attend.defvjp(_forward, _backward)
