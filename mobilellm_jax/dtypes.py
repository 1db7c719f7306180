"""The dtype that `compute_dtype="auto"` stands for, by platform and processor."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from mobilellm_jax.config import Config

_CPUINFO = Path("/proc/cpuinfo")  # of Linux


@functools.cache
def has_amx() -> bool:
    """True if the CPU multiplies matrices in bfloat16 by Intel's AMX; False where that is not known."""
    return _CPUINFO.exists() and "amx_bf16" in _CPUINFO.read_text().split()


def with_dtype(config: Config, platform: Callable[[], str]) -> Config:
    """Replaces `compute_dtype="auto"` by the fastest dtype on a platform of JAX: "cpu", "gpu", "tpu".

    A CPU without AMX emulates bfloat16: a training step takes 1.5 to 2 times as long as in float32.
    """
    if config.model.compute_dtype != "auto":
        return config
    dtype = "float32" if platform() == "cpu" and not has_amx() else "bfloat16"
    return dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype=dtype))
