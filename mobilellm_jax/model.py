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

Reverse mode only: `kernels.linear`, `kernels.swiglu`, `attention.attend_causally` and `cross_entropy` have
their gradients written out (`jax.custom_vjp`), for speed and memory. So `jax.jvp`, `jax.jacfwd` and
`jax.hessian` of `apply`, `hidden`, `loss` and `extend` fail: "can't apply forward-mode autodiff (jvp) to a
custom_vjp function". Reverse over reverse works, as for the product of the Hessian and a vector.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec, get_abstract_mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mobilellm_jax import attention
from mobilellm_jax.attention import attend_causally
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.cross_entropy import cross_entropy, head_logits
from mobilellm_jax.kernels import linear, swiglu
from mobilellm_jax.parameterization import multipliers
from mobilellm_jax.sharing import uses_in_a_row

Params = dict[str, Any]
Rope = tuple[Float[Array, "#B T 1 h"], Float[Array, "#B T 1 h"]]  # cosines and sines, h = H / 2

# Primitives that fetch the weights of a block. Their results are never kept for the backward pass: kept,
# they would be a copy of every block for every layer applied.
_FETCH = frozenset({"dynamic_slice", "squeeze", "reshape", "convert_element_type", "transpose"})
_REMAT_POLICIES = {
    "none": lambda primitive, *_, **__: primitive.name not in _FETCH,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names(attention.KEPT),
        ),
        lambda primitive, *_, **__: primitive.name in attention.KEPT_PRIMITIVES,
    ),
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


# From queries, keys and values to the attention's output, and to whatever it has to remember.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


def attend_in_training(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array) -> tuple[Array, None]:
    """Attends to the same and to earlier positions; remembers nothing."""
    return attend_causally(q_BTNH, k_BTKH, v_BTKH), None


class Attention(nn.Module):
    """Self-attention with rotary positions and grouped queries (section 2.2.4)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], rope: Rope, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        c = self.config
        normal = nn.initializers.normal(c.init_std * multipliers(c).init_std)
        w_DNH = self.param("query", normal, (c.width, c.num_heads, c.head_dim))
        q_BTNH = linear("BTD,DNH->BTNH", x_BTD, w_DNH)
        w_DKH = self.param("key", normal, (c.width, c.num_kv_heads, c.head_dim))
        k_BSKH = linear("BSD,DKH->BSKH", x_BTD, w_DKH)
        w_DKH = self.param("value", normal, (c.width, c.num_kv_heads, c.head_dim))
        v_BSKH = linear("BSD,DKH->BSKH", x_BTD, w_DKH)
        out_BTNH, memory = attend(rotate(q_BTNH, rope), rotate(k_BSKH, rope), v_BSKH)
        w_NHD = self.param("output", normal, (c.num_heads, c.head_dim, c.width))
        return linear("BTNH,NHD->BTD", out_BTNH, w_NHD), memory


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020; section 2.2.1), or two matrices with ReLU or tanh-approximated GELU between."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        normal = nn.initializers.normal(c.init_std * multipliers(c).init_std)
        up_DF = self.param("up", normal, (c.width, c.ffn_width))
        y_BTF = linear("BTD,DF->BTF", x_BTD, up_DF)
        if c.ffn_kind == "swiglu":
            gate_DF = self.param("gate", normal, (c.width, c.ffn_width))
            y_BTF = swiglu(linear("BTD,DF->BTF", x_BTD, gate_DF), y_BTF)
        else:
            y_BTF = {"relu": jax.nn.relu, "gelu": jax.nn.gelu}[c.ffn_kind](y_BTF)
        down_FD = self.param("down", normal, (c.ffn_width, c.width))
        return linear("BTF,FD->BTD", y_BTF, down_FD)


class Block(nn.Module):
    """Pre-norm transformer block without biases. Sharing a layer shares the whole block, norms included.

    Returns its output, and what `attend` has to remember.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], rope: Rope, attend: Attend = attend_in_training
    ) -> tuple[Float[Array, "B T D"], Any]:
        epsilon, scale = self.config.norm_epsilon, multipliers(self.config).residual
        with jax.named_scope("attention"):
            y_BTD = RMSNorm(epsilon, name="attention_norm")(x_BTD)
            y_BTD, memory = Attention(self.config, name="attention")(y_BTD, rope, attend)
            x_BTD = x_BTD + scale * y_BTD
        with jax.named_scope("ffn"):
            y_BTD = RMSNorm(epsilon, name="ffn_norm")(x_BTD)
            return x_BTD + scale * FeedForward(self.config, name="ffn")(y_BTD), memory


def rope_table(position_BT: Int[Array, "B T"], config: ModelConfig) -> Rope:
    """Returns cosines and sines of the rotary angles t * base^(-2i / H) (Su et al. 2021)."""
    exponent_h = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequency_h = config.rope_base**-exponent_h
    angle_BT1h = position_BT.astype(jnp.float32)[:, :, None, None] * frequency_h[None, None, None, :]
    return jnp.cos(angle_BT1h), jnp.sin(angle_BT1h)


def rotate(x_BTNH: Float[Array, "B T N H"], rope: Rope) -> Float[Array, "B T N H"]:
    """Rotates pairs (i, i + H/2) of each head, the pairing of Hugging Face's Llama, in float32."""
    cos_BT1h, sin_BT1h = rope
    a_BTNh, b_BTNh = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = (a_BTNh * cos_BT1h - b_BTNh * sin_BT1h, b_BTNh * cos_BT1h + a_BTNh * sin_BT1h)
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


# --- the stack: one scan over the layer plan -----------------------------------------------------------


def init(key: PRNGKeyArray, config: ModelConfig) -> Params:
    """Returns float32 parameters: matrices from N(0, init_std) times their multiplier, norm gains 1."""
    embedding_key, head_key, blocks_key = jax.random.split(key, 3)
    normal = nn.initializers.normal(config.init_std)
    vocab_by_width = (config.vocab_size, config.width)
    x_BTD, rope = jnp.zeros((1, 1, config.width)), rope_table(jnp.zeros((1, 1), int), config)

    def init_block(block_key: PRNGKeyArray) -> Params:
        return dict(Block(config).init(block_key, x_BTD, rope)["params"])

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

    One loop over the layer plan, compiled once however long it is; or, with a `scan_unroll` of no fewer than
    the layers, no loop, which takes longer to compile and less time to run on a GPU.

    In the loop, the block of each layer is picked from the stack inside `jax.checkpoint`, so that the
    backward pass holds no copy of the blocks whatever the plan. It is cast to the compute dtype after the
    pick, so that the gradients of the several uses of a block add up in float32.
    """
    block, rope = Block(config), rope_table(jnp.arange(tokens_BT.shape[1])[None, :], config)
    remat = partial(jax.checkpoint, policy=_REMAT_POLICIES[config.remat], prevent_cse=False)

    def apply_block(weights: Params, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y_BTD, _ = block.apply({"params": _cast(weights, config)}, x_BTD, rope)
        return _constrain(y_BTD, ("data", "fsdp"))

    x_BTD = _embed(params, tokens_BT, config)
    if config.scan_unroll >= config.effective_depth:
        blocks, layer = _unstack(params["blocks"]), remat(apply_block)
        for u in config.plan:
            x_BTD = layer(blocks[u], x_BTD)
    else:

        @remat
        def pick_and_apply(x_BTD: Float[Array, "B T D"], u: Int[Array, ""]) -> tuple[Any, None]:
            return apply_block(_pick(params["blocks"], u), x_BTD), None

        x_BTD, _ = lax.scan(pick_and_apply, x_BTD, jnp.array(config.plan), unroll=config.scan_unroll)
    return _final_norm(params, x_BTD, config)


def _pick(blocks: Params, u: Int[Array, ""]) -> Params:
    """Returns block u of the stack."""
    return jax.tree.map(lambda w_U: lax.dynamic_index_in_dim(w_U, u, keepdims=False), blocks)


def _unstack(blocks: Params) -> list[Params]:
    """Returns all blocks of the stack.

    Their gradients are put together once, where those of so many picks would be added up as whole stacks.
    """
    leaves, tree = jax.tree.flatten(blocks)
    return [tree.unflatten(block) for block in zip(*map(jnp.unstack, leaves), strict=True)]


def _cast(weights: Params, config: ModelConfig) -> Params:
    """Returns a block with its matrices in the compute dtype; norm gains stay float32."""
    return jax.tree.map(lambda w: w.astype(config.compute_dtype) if w.ndim > 1 else w, weights)


def _embed(params: Params, tokens_BT: Int[Array, "B T"], config: ModelConfig) -> Float[Array, "B T D"]:
    with jax.named_scope("embedding"):
        embedding_VD = _constrain(params["embedding"], "tensor")
        return _constrain(embedding_VD[tokens_BT].astype(config.compute_dtype), ("data", "fsdp"))


def _final_norm(params: Params, x_BTD: Float[Array, "B T D"], config: ModelConfig) -> Float[Array, "B T D"]:
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
    return logits(params, hidden(params, tokens_BT, config))


def logits(params: Params, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Returns the float32 logits that `hidden` or `extend` lead to."""
    with jax.named_scope("head"):
        return head_logits(x_BTD, _head(params))


def _head(params: Params) -> Float[Array, "V D"]:
    return params.get("head", params["embedding"])


# --- one part of the text after the other ---------------------------------------------------------------


class Cache(NamedTuple):
    """Keys and values of the tokens read so far, with an entry for every layer *applied*.

    A block that is applied twice sees another input each time, and has other keys.

    Attributes:
      keys, values: L B S K H; slot s of row b holds its token s - padding[b].
      padding: B; slots at the beginning of a row that hold no token, so that rows of different lengths end
        together.
      used: slots that hold something.
    """

    keys: Float[Array, "L B S K H"]
    values: Float[Array, "L B S K H"]
    padding: Int[Array, "B"]
    used: Int[Array, ""]


def empty_cache(padding_B: Int[Array, "B"], slots: int, config: ModelConfig) -> Cache:
    """Returns a cache for `slots` tokens, padding included."""
    shape = (config.effective_depth, *padding_B.shape, slots, config.num_kv_heads, config.head_dim)
    keys, values = (jnp.zeros(shape, config.compute_dtype) for _ in range(2))
    return Cache(keys, values, padding_B, jnp.zeros((), jnp.int32))


def extend(
    params: Params, tokens_BT: Int[Array, "B T"], cache: Cache, config: ModelConfig
) -> tuple[Float[Array, "B T D"], Cache]:
    """Returns what `hidden` returns at the next T tokens of each row, and the cache with them in it.

    The caller sees to it that they fit: beyond the last slot they would overwrite what is there. What stands
    at padding has no meaning.
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
        return _constrain(y_BTD, ("data", "fsdp")), *memory

    in_a_row = uses_in_a_row(config.plan)

    def layers(carry: Any, group: Any) -> tuple[Any, None]:
        """Applies one block as often as it comes in a row; fetching it once is what `immediate` is for."""
        first, u = group
        weights = _cast(_pick(params["blocks"], u), config)
        for use in range(in_a_row):
            carry = layer(carry, weights, first + use)
        return carry, None

    groups = jnp.arange(0, config.effective_depth, in_a_row), jnp.array(config.plan[::in_a_row])
    carry = _embed(params, tokens_BT, config), cache.keys, cache.values
    (x_BTD, keys, values), _ = lax.scan(layers, carry, groups)
    return _final_norm(params, x_BTD, config), Cache(keys, values, cache.padding, cache.used + T)


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
