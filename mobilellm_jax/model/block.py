"""The transformer block, in Flax: the place to try an architecture idea.

To add a parameter, add a row in `parameters.py` and a call of `weight` here.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model.ops.attention import attend_causally
from mobilellm_jax.model.ops.linear import linear, swiglu
from mobilellm_jax.model.ops.precision import keep
from mobilellm_jax.model.ops.rounding import round_tokens
from mobilellm_jax.model.parameterization import multipliers
from mobilellm_jax.parameters import Parameter, parameter

Rope = tuple[Float[Array, "#B T 1 h"], Float[Array, "#B T 1 h"]]  # cosines and sines, h = H / 2

# From queries, keys and values to the output of attention, and to its memory (the cache in generation).
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


def attention_in_training(config: ModelConfig) -> Attend:
    """Attention to the same and earlier positions by the kernel of the config; without memory."""

    def attend(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array) -> tuple[Array, None]:
        return attend_causally(q_BTNH, k_BTKH, v_BTKH, config.attention), None

    return attend


class Block(nn.Module):
    """Pre-norm transformer block without biases. Sharing a layer shares the whole block, norms included.

    A call computes the block's output and the memory of `attend`, by default that in training.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], rope: Rope, attend: Attend | None = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        c, scale = self.config, multipliers(self.config).residual
        with jax.named_scope("attention"):
            y_BTD = RMSNorm(c, name="attention_norm")(x_BTD)
            attend = attend or attention_in_training(c)
            y_BTD, memory = Attention(c, name="attention")(y_BTD, rope, attend)
            x_BTD = x_BTD + scale * y_BTD
        with jax.named_scope("ffn"):
            y_BTD = RMSNorm(c, name="ffn_norm")(x_BTD)
            return x_BTD + scale * FeedForward(c, name="ffn")(y_BTD), memory


class Attention(nn.Module):
    """Self-attention with rotary positions and grouped queries (section 2.2.4)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: Float[Array, "B T D"], rope: Rope, attend: Attend
    ) -> tuple[Float[Array, "B T D"], Any]:
        q_BTNH = project(self, "query", "BTD,DNH->BTNH", x_BTD)
        k_BSKH = project(self, "key", "BSD,DKH->BSKH", x_BTD)
        v_BSKH = project(self, "value", "BSD,DKH->BSKH", x_BTD)
        out_BTNH, memory = attend(rotate(q_BTNH, rope), rotate(k_BSKH, rope), v_BSKH)
        return project(self, "output", "BTNH,NHD->BTD", out_BTNH), memory


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020; section 2.2.1), or two matrices with ReLU or tanh-approximated GELU between."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y_BTF = project(self, "up", "BTD,DF->BTF", x_BTD)
        if self.config.ffn_kind == "swiglu":
            y_BTF = swiglu(project(self, "gate", "BTD,DF->BTF", x_BTD), y_BTF)
        else:
            y_BTF = {"relu": jax.nn.relu, "gelu": jax.nn.gelu}[self.config.ffn_kind](y_BTF)
        return project(self, "down", "BTF,FD->BTD", y_BTF)


class RMSNorm(nn.Module):
    """`rms_norm` with a gain that starts at 1."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return rms_norm(x_BTD, weight(self, "gain"), self.config.norm_epsilon)


def rms_norm(
    x_BTD: Float[Array, "B T D"], gain_D: Float[Array, "D"], epsilon: float
) -> Float[Array, "B T D"]:
    """Root-mean-square normalisation (Zhang and Sennrich 2019), computed in float32."""
    y_BTD = x_BTD.astype(jnp.float32)
    y_BTD = y_BTD * lax.rsqrt(jnp.mean(y_BTD**2, axis=-1, keepdims=True) + epsilon)
    return (y_BTD * gain_D[None, None, :]).astype(x_BTD.dtype)


def rope_table(position_BT: Int[Array, "B T"], config: ModelConfig) -> Rope:
    """Cosines and sines of the rotary angles t * base^(-2i / H) (Su et al. 2021)."""
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


# --- parameters, by their rows in parameters.py ---------------------------------------------------------


def project(
    module: Attention | FeedForward, name: str, product: str, x: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Computes einsum(product, x, weight), and names the result after the weight, for `remat.py`."""
    if bits := module.config.activation_bits:
        x = round_tokens(x, bits)
    return keep(linear(product, x, weight(module, name)), name)


def weight(module: Attention | FeedForward | RMSNorm, name: str) -> Float[Array, "..."]:
    """The parameter "blocks/<path of the module>/<name>" of the current block."""
    config, of = module.config, parameter("/".join(["blocks", *module.path, name]))
    return module.param(name, lambda key: initial(of, key, config))


def initial(of: Parameter, key: PRNGKeyArray, config: ModelConfig) -> Float[Array, "..."]:
    """Initialises a parameter, of one block if stacked: 1 for a gain, else N(0, init_std)."""
    if of.is_gain:
        return jnp.ones(of.unstacked_shape(config))
    scale = multipliers(config).init_std if of.kind == "matrix" else 1.0
    return nn.initializers.normal(config.init_std * scale)(key, of.unstacked_shape(config))
