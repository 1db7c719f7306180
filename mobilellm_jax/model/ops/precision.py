"""Dtypes that are fast in matrix products, by what the processor has, and in the stacks of loops."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mobilellm_jax.dtypes import has_amx


def sum_dtype(dtype: DTypeLike) -> DTypeLike:
    """The dtype to ask of a product of two arrays of `dtype`, before it is cast to `dtype`.

    XLA uses AMX only where bfloat16 products give float32: 915 instead of 108 GFLOP/s for 1,024 x 576 x 1,536
    on a Xeon. Without AMX (EPYC, Zen 3), a training step in bfloat16 takes 1.1 times as long that way.
    """
    low_on_amx = jnp.dtype(dtype).itemsize == 2 and jax.default_backend() == "cpu" and has_amx()
    return jnp.float32 if low_on_amx else dtype


def keep(x: Float[Array, "*shape"], name: str) -> Float[Array, "*shape"]:
    """`checkpoint_name(x, name)`: x, which the backward pass may store under this name, see `remat.py`.

    XLA on a CPU computes in float32 what is 16 bits wide, even where one layer is written into the stack of
    all: it converts the whole stack, once for each layer, three quarters of a step of 30 layers. Of integers
    it writes the layer alone, so there the bits of x are stored.
    """
    return _keep_bits(name, x) if stacks_integers(x.dtype) else checkpoint_name(x, name)


def stacks_integers(dtype: DTypeLike) -> bool:
    """True if a loop should stack the bits of arrays of `dtype`, not the arrays, or numbers of 32 bits."""
    return jnp.dtype(dtype).itemsize == 2 and jax.default_backend() == "cpu"


def _bits(name: str, x: Array) -> Array:
    bits = checkpoint_name(lax.bitcast_convert_type(x, jnp.uint16), name)
    return lax.bitcast_convert_type(bits, x.dtype)


def _bits_forward(name: str, x: Array) -> tuple[Array, None]:
    return _bits(name, x), None


def _bits_backward(name: str, kept: None, dy: Array) -> tuple[Array]:
    return (dy,)


_keep_bits: Any = jax.custom_vjp(_bits, nondiff_argnums=(0,))
_keep_bits.defvjp(_bits_forward, _bits_backward)
