"""Which dtype of matrix products is fastest, by what the processor has."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

_CPUINFO = Path("/proc/cpuinfo")  # of Linux


@functools.cache
def has_amx() -> bool:
    """True if the CPU multiplies matrices in bfloat16 by Intel's AMX; False where that is not known."""
    return _CPUINFO.exists() and "amx_bf16" in _CPUINFO.read_text().split()


def fastest_dtype(platform: str) -> str:
    """The dtype that `compute_dtype="auto"` stands for on a platform of JAX: "cpu", "gpu", "tpu".

    A CPU without AMX emulates bfloat16: a training step takes 1.5 to 2 times as long as in float32.
    """
    return "float32" if platform == "cpu" and not has_amx() else "bfloat16"


def sum_dtype(dtype: DTypeLike) -> DTypeLike:
    """The dtype to ask of a product of two arrays of `dtype`, before it is cast to `dtype`.

    XLA uses AMX only where bfloat16 products give float32: 915 instead of 108 GFLOP/s for 1,024 x 576 x 1,536
    on a Xeon. Without AMX (EPYC, Zen 3), a training step in bfloat16 takes 1.1 times as long that way.
    """
    low_on_amx = jnp.dtype(dtype).itemsize == 2 and jax.default_backend() == "cpu" and has_amx()
    return jnp.float32 if low_on_amx else dtype
