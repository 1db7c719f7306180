"""The dtype to ask of a matrix product, by what the processor has."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mobilellm_jax.dtypes import has_amx


def sum_dtype(dtype: DTypeLike) -> DTypeLike:
    """The dtype to ask of a product of two arrays of `dtype`, before it is cast to `dtype`.

    XLA uses AMX only where bfloat16 products give float32: 915 instead of 108 GFLOP/s for 1,024 x 576 x 1,536
    on a Xeon. Without AMX (EPYC, Zen 3), a training step in bfloat16 takes 1.1 times as long that way.
    """
    low_on_amx = jnp.dtype(dtype).itemsize == 2 and jax.default_backend() == "cpu" and has_amx()
    return jnp.float32 if low_on_amx else dtype
