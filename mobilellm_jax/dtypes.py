"""The dtype that `compute_dtype="auto"` stands for, by platform and processor."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from mobilellm_jax.config import Config

_CPUINFO = Path("/proc/cpuinfo")  # of Linux


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the CPU can do, in the words of Linux, such as "amx_bf16"; empty where that is not known."""
    return frozenset(_CPUINFO.read_text().split() if _CPUINFO.exists() else ())


def has_bfloat16() -> bool:
    """True if the CPU multiplies in bfloat16, by AMX or AVX-512."""
    return not cpu_flags().isdisjoint({"amx_bf16", "avx512_bf16"})


def with_dtype(config: Config, platform: Callable[[], str]) -> Config:
    """Replaces `compute_dtype="auto"` by the fastest dtype on a platform of JAX: "cpu", "gpu", "tpu".

    A CPU without units for bfloat16 emulates it: a training step takes 1.5 to 2 times as long as in float32.
    """
    if config.model.compute_dtype != "auto":
        return config
    dtype = "float32" if platform() == "cpu" and not has_bfloat16() else "bfloat16"
    return dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype=dtype))
