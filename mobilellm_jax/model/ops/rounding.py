"""Rounding to integers of few bits, with a scale for each set of numbers that share one."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def to_integers(
    x: Float[Array, "*shape"], bits: int, axes: Sequence[int]
) -> tuple[Float[Array, "*shape"], Float[Array, "..."]]:
    """Integers q (as floats) and scales, x = q scale but for rounding; symmetric about 0, no zero point.

    Min-max: the number that is largest in magnitude along `axes` becomes 2^(bits - 1) - 1, so nothing is cut
    off, and the most negative code is not used. Where all numbers are 0, the scale is 1.
    """
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=tuple(axes), keepdims=True) / (2 ** (bits - 1) - 1)
    scale = jnp.where(scale > 0, scale, 1.0)
    return jnp.round(x / scale), scale


def _round_tokens(bits: int, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
    q, scale = to_integers(x, bits, range(2, x.ndim))
    return (q * scale).astype(x.dtype)


def _forward(bits: int, x: Array) -> tuple[Array, None]:
    return _round_tokens(bits, x), None


def _backward(bits: int, kept: None, dy: Array) -> tuple[Array]:
    return (dy,)


_straight_through = jax.custom_vjp(_round_tokens, nondiff_argnums=(0,))
_straight_through.defvjp(_forward, _backward)


def round_tokens(x: Float[Array, "B T ..."], bits: int) -> Float[Array, "B T ..."]:
    """Quantizes and dequantizes activations, with one scale for each token, in their own dtype.

    The gradient goes straight through, as if nothing was rounded; see `quantization/aware.py`.
    """
    return _straight_through(bits, x)
