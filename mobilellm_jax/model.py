"""The transformer: pure functions `init`, `apply` and `loss` around one Flax block.

Letters in tensor names and einsums:
  B batch   T position (query)   S position (key)   D width       F feed-forward width   V vocabulary
  N query heads   K key/value heads   G = N / K queries per key/value head   H head size
  U distinct blocks   L layers applied (the length of the layer plan)

Parameters, all float32; the leading axis U of `blocks` stacks the blocks:
  embedding V D                                 final_norm/gain D                 head V D (if not shared)
  blocks/attention_norm/gain U D                blocks/ffn_norm/gain U D
  blocks/attention/query U D N H                blocks/attention/{key, value} U D K H
  blocks/attention/output U N H D               blocks/ffn/{gate, up} U D F       blocks/ffn/down U F D
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec, get_abstract_mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.parameterization import multipliers

Params = dict[str, Any]
Rope = tuple[Float[Array, "T 1 h"], Float[Array, "T 1 h"]]  # cosines and sines, h = H / 2

# Primitives that fetch the weights of a block. Their results are never kept for the backward pass: kept,
# they would be a copy of every block for every layer applied.
_FETCH = frozenset({"dynamic_slice", "squeeze", "reshape", "convert_element_type", "transpose"})
_REMAT_POLICIES = {
    "none": lambda primitive, *_, **__: primitive.name not in _FETCH,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


# --- the block: where to try an idea -------------------------------------------------------------------


def rms_norm(
    x_BTD: Float[Array, "B T D"], gain_D: Float[Array, "D"], epsilon: float
) -> Float[Array, "B T D"]:
    """Root-mean-square normalisation (Zhang and Sennrich 2019), computed in float32."""
    y_BTD = x_BTD.astype(jnp.float32)
    y_BTD = y_BTD * lax.rsqrt(jnp.mean(y_BTD**2, axis=-1, keepdims=True) + epsilon)
    return (y_BTD * gain_D[None, None, :]).astype(x_BTD.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a gain that starts at 1."""

    epsilon: float

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return rms_norm(x_BTD, self.param("gain", nn.initializers.ones, x_BTD.shape[-1:]), self.epsilon)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped queries (section 2.2.4)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], rope: Rope) -> Float[Array, "B T D"]:
        c = self.config
        normal = nn.initializers.normal(c.init_std * multipliers(c).init_std)
        w_DNH = self.param("query", normal, (c.width, c.num_heads, c.head_dim))
        q_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, w_DNH)
        w_DKH = self.param("key", normal, (c.width, c.num_kv_heads, c.head_dim))
        k_BSKH = jnp.einsum("BSD,DKH->BSKH", x_BTD, w_DKH)
        w_DKH = self.param("value", normal, (c.width, c.num_kv_heads, c.head_dim))
        v_BSKH = jnp.einsum("BSD,DKH->BSKH", x_BTD, w_DKH)
        # Query head n reads key/value head n // G, as in Llama.
        out_BTNH = jax.nn.dot_product_attention(
            rotate(q_BTNH, rope), rotate(k_BSKH, rope), v_BSKH, is_causal=True
        )
        w_NHD = self.param("output", normal, (c.num_heads, c.head_dim, c.width))
        return jnp.einsum("BTNH,NHD->BTD", out_BTNH, w_NHD)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020; section 2.2.1), or two matrices with ReLU or tanh-approximated GELU between."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        normal = nn.initializers.normal(c.init_std * multipliers(c).init_std)
        up_DF = self.param("up", normal, (c.width, c.ffn_width))
        y_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, up_DF)
        if c.ffn_kind == "swiglu":
            gate_DF = self.param("gate", normal, (c.width, c.ffn_width))
            y_BTF = y_BTF * jax.nn.silu(jnp.einsum("BTD,DF->BTF", x_BTD, gate_DF))
        else:
            y_BTF = {"relu": jax.nn.relu, "gelu": jax.nn.gelu}[c.ffn_kind](y_BTF)
        down_FD = self.param("down", normal, (c.ffn_width, c.width))
        return jnp.einsum("BTF,FD->BTD", y_BTF, down_FD)


class Block(nn.Module):
    """Pre-norm transformer block without biases. Sharing a layer shares the whole block, norms included."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"], rope: Rope) -> Float[Array, "B T D"]:
        epsilon, scale = self.config.norm_epsilon, multipliers(self.config).residual
        with jax.named_scope("attention"):
            y_BTD = RMSNorm(epsilon, name="attention_norm")(x_BTD)
            x_BTD = x_BTD + scale * Attention(self.config, name="attention")(y_BTD, rope)
        with jax.named_scope("ffn"):
            y_BTD = RMSNorm(epsilon, name="ffn_norm")(x_BTD)
            return x_BTD + scale * FeedForward(self.config, name="ffn")(y_BTD)


def rope_table(length: int, config: ModelConfig) -> Rope:
    """Returns cosines and sines of the rotary angles t * base^(-2i / H) (Su et al. 2021)."""
    exponent_h = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequency_h = config.rope_base**-exponent_h
    angle_T1h = jnp.arange(length, dtype=jnp.float32)[:, None, None] * frequency_h[None, None, :]
    return jnp.cos(angle_T1h), jnp.sin(angle_T1h)


def rotate(x_BTNH: Float[Array, "B T N H"], rope: Rope) -> Float[Array, "B T N H"]:
    """Rotates pairs (i, i + H/2) of each head, the pairing of Hugging Face's Llama, in float32."""
    cos_BTNh, sin_BTNh = (table_T1h[None] for table_T1h in rope)
    a_BTNh, b_BTNh = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = (a_BTNh * cos_BTNh - b_BTNh * sin_BTNh, b_BTNh * cos_BTNh + a_BTNh * sin_BTNh)
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


# --- the stack: one scan over the layer plan -----------------------------------------------------------


def init(key: PRNGKeyArray, config: ModelConfig) -> Params:
    """Returns float32 parameters: matrices from N(0, init_std) times their multiplier, norm gains 1."""
    embedding_key, head_key, blocks_key = jax.random.split(key, 3)
    normal = nn.initializers.normal(config.init_std)
    vocab_by_width = (config.vocab_size, config.width)
    x_BTD = jnp.zeros((1, 1, config.width))

    def init_block(block_key: PRNGKeyArray) -> Params:
        return dict(Block(config).init(block_key, x_BTD, rope_table(1, config))["params"])

    params: Params = {
        "embedding": normal(embedding_key, vocab_by_width),
        "blocks": jax.vmap(init_block)(jax.random.split(blocks_key, config.depth)),
        "final_norm": {"gain": jnp.ones(config.width)},
    }
    if not config.share_embedding:
        params["head"] = normal(head_key, vocab_by_width)
    return params


def hidden(params: Params, tokens_BT: Int[Array, "B T"], config: ModelConfig) -> Float[Array, "B T D"]:
    """Returns what the head turns into logits: the normalised output of the last layer, in the compute dtype.

    The block of each layer is picked from the stack inside `jax.checkpoint`, so that the backward pass holds
    no copy of the blocks whatever the plan; it is cast to the compute dtype after the pick, so that the
    gradients of the several uses of a block add up in float32.
    """
    dtype = jnp.dtype(config.compute_dtype)
    block, rope = Block(config), rope_table(tokens_BT.shape[1], config)

    @partial(jax.checkpoint, policy=_REMAT_POLICIES[config.remat], prevent_cse=False)
    def layer(x_BTD: Float[Array, "B T D"], u: Int[Array, ""]) -> tuple[Any, None]:
        def pick(w_U: Float[Array, "U ..."]) -> Float[Array, "..."]:
            w = lax.dynamic_index_in_dim(w_U, u, keepdims=False)
            return w.astype(dtype) if w.ndim > 1 else w  # norm gains stay float32

        y_BTD = block.apply({"params": jax.tree.map(pick, params["blocks"])}, x_BTD, rope)
        return _constrain(y_BTD, ("data", "fsdp")), None

    with jax.named_scope("embedding"):
        embedding_VD = _constrain(params["embedding"], "tensor")
        x_BTD = _constrain(embedding_VD[tokens_BT].astype(dtype), ("data", "fsdp"))
    x_BTD, _ = lax.scan(layer, x_BTD, jnp.array(config.plan), unroll=config.scan_unroll)
    with jax.named_scope("final_norm"):
        x_BTD = rms_norm(x_BTD, params["final_norm"]["gain"], config.norm_epsilon)
        return multipliers(config).logits * x_BTD  # here once, instead of in every place that makes logits


def _constrain(x: Any, *axes: Any) -> Any:
    """Splits an array over these axes, and no others, of the mesh in use (`partition.in_use`), if any.

    Left alone, the compiler splits activations the way `fsdp` splits weights, along D, and every device
    computes all rows of the batch.
    """
    return x if get_abstract_mesh().empty else lax.with_sharding_constraint(x, PartitionSpec(*axes))


def apply(params: Params, tokens_BT: Int[Array, "B T"], config: ModelConfig) -> Float[Array, "B T V"]:
    """Returns float32 logits of the token after each position."""
    with jax.named_scope("head"):
        return _logits(hidden(params, tokens_BT, config), _head(params))


def _head(params: Params) -> Float[Array, "V D"]:
    return params.get("head", params["embedding"])


def _logits(x_BTD: Float[Array, "B T D"], head_VD: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    head_VD = head_VD.astype(x_BTD.dtype)
    return jnp.einsum("BTD,VD->BTV", x_BTD, head_VD, preferred_element_type=jnp.float32)


# --- the loss -------------------------------------------------------------------------------------------


def loss(
    params: Params, tokens_BT: Int[Array, "B T"], targets_BT: Int[Array, "B T"], config: ModelConfig
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Returns the summed cross-entropy in nats, and the number of targets it is summed over.

    Negative targets are ignored. The logits of at most `loss_chunk` positions exist at one time.
    """
    x_BTD = hidden(params, tokens_BT, config)
    with jax.named_scope("loss"):
        nats = cross_entropy(x_BTD, _head(params), targets_BT, config.loss_chunk)
        return nats, jnp.sum(targets_BT >= 0)


def _cross_entropy(
    x_BTD: Float[Array, "B T D"], head_VD: Float[Array, "V D"], targets_BT: Int[Array, "B T"], chunk: int
) -> Float[Array, ""]:
    """Returns -sum log softmax(x head^T)[target] over targets >= 0, `chunk` positions at a time.

    When it is differentiated, the forward pass computes the gradients along with the loss: the gradient of a
    sum only waits to be scaled, and the logits need not be computed again.
    """
    return _cross_entropy_scan(x_BTD, head_VD, targets_BT, chunk, with_gradients=False)[0]


def _cross_entropy_scan(
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
        nats, dx_BTD, dhead_VD = carry
        x_BCD = lax.dynamic_slice_in_dim(x_BTD, start, chunk, axis=1)
        target_BC1 = lax.dynamic_slice_in_dim(targets_BT, start, chunk, axis=1)[..., None]
        logits_BCV = _logits(x_BCD, head_VD)
        log_z_BC1 = jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True)
        is_target_BCV = target_BC1 == vocabulary_11V
        counts_BC1 = target_BC1 >= 0
        nats += jnp.sum(jnp.where(counts_BC1, log_z_BC1, 0.0))
        nats -= jnp.sum(jnp.where(is_target_BCV, logits_BCV, 0.0))
        if with_gradients:
            softmax_BCV = jnp.where(counts_BC1, jnp.exp(logits_BCV - log_z_BC1), 0.0)
            dlogits_BCV = (softmax_BCV - is_target_BCV).astype(dtype)
            dx_BCD = jnp.einsum("BCV,VD->BCD", dlogits_BCV, head_VD.astype(dtype))
            dx_BTD = lax.dynamic_update_slice_in_dim(dx_BTD, dx_BCD, start, axis=1)
            dhead_VD += jnp.einsum("BCV,BCD->VD", dlogits_BCV, x_BCD, preferred_element_type=jnp.float32)
        return (nats, dx_BTD, dhead_VD), None

    gradients = (jnp.zeros_like(x_BTD), jnp.zeros_like(head_VD)) if with_gradients else (None, None)
    starts = jnp.arange(0, x_BTD.shape[1], chunk)
    (nats, dx_BTD, dhead_VD), _ = lax.scan(step, (jnp.zeros(()), *gradients), starts)
    return nats, dx_BTD[:, :length] if with_gradients else None, dhead_VD


def _cross_entropy_forward(x_BTD: Array, head_VD: Array, targets_BT: Array, chunk: int) -> tuple[Array, Any]:
    nats, dx_BTD, dhead_VD = _cross_entropy_scan(x_BTD, head_VD, targets_BT, chunk, with_gradients=True)
    return nats, (dx_BTD, dhead_VD)


def _cross_entropy_backward(chunk: int, gradients: Any, dnats: Array) -> tuple[Array, Array, None]:
    dx_BTD, dhead_VD = gradients
    return (dx_BTD * dnats).astype(dx_BTD.dtype), dhead_VD * dnats, None


cross_entropy = jax.custom_vjp(_cross_entropy, nondiff_argnums=(3,))
cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
