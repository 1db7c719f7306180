"""Rounding to integers of few bits, with a scale for each set of numbers that share one."""

from collections.abc import Sequence

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


def round_tokens(x: Float[Array, "B T ..."], bits: int) -> Float[Array, "B T ..."]:
    """Quantizes and dequantizes activations, with one scale for each token, in their own dtype."""
    q, scale = to_integers(x, bits, range(2, x.ndim))
    return (q * scale).astype(x.dtype)
