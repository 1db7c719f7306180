"""Dtypes that are fast in matrix products, by what the processor has, and in the stacks of loops."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mobilellm_jax.dtypes import has_bfloat16


def sum_dtype(dtype: DTypeLike) -> DTypeLike:
    """The dtype to ask of a product of two arrays of `dtype`, before it is cast to `dtype`.

    XLA uses the units of a CPU for bfloat16 only where products give float32: 915 instead of 108 GFLOP/s for
    1,024 x 576 x 1,536 with AMX (Xeon), 398 instead of 101 with AVX-512 (EPYC, Zen 4). Without such units
    (EPYC, Zen 3), a training step in bfloat16 takes 1.1 times as long that way.
    """
    is_low = jnp.dtype(dtype).itemsize == 2
    return jnp.float32 if is_low and jax.default_backend() == "cpu" and has_bfloat16() else dtype


def einsum(product: str, a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes `jnp.einsum(product, a, b)` of two arrays of one dtype, which the result has too."""
    return jnp.einsum(product, a, b, preferred_element_type=sum_dtype(a.dtype)).astype(a.dtype)


def keep(x: Float[Array, "*shape"], name: str) -> Float[Array, "*shape"]:
    """`checkpoint_name(x, name)`: x, which the backward pass may store under this name, see `remat.py`."""
    return checkpoint_name(x.astype(stack_dtype(x.dtype)), name).astype(x.dtype)


def stack_dtype(dtype: DTypeLike) -> DTypeLike:
    """The dtype in which a loop over layers should stack arrays of `dtype`.

    XLA on a CPU computes in float32 what is 16 bits wide, even where one layer is written into the stack of
    all: it converts the whole stack, once for each layer, three quarters of a step of 30 layers. So there
    the backward pass of bfloat16 needs the memory of float32.
    """
    return jnp.float32 if jnp.dtype(dtype).itemsize == 2 and jax.default_backend() == "cpu" else dtype
