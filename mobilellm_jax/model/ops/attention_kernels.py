"""Kernels of others for causal attention, by the names that `model.attention` has for them.

  "cudnn"   FlashAttention of cuDNN: NVIDIA GPUs from Ampere on, 16 bits, head size up to 128
  "splash"  JAX's splash attention in Pallas: TPUs, any head size

Both pad heads to sizes that the kernel takes: zeros appended to queries and keys change no score, and those
appended to values are removed from the output. Letters as in `model/__init__.py`.
"""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, get_abstract_mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# Residuals that are expensive to recompute: their name for `jax.checkpoint`, and the primitives of cuDNN.
KEPT = "attention"
KEPT_PRIMITIVES = ("dot_product_attention_fwd", "dot_product_attention_fwd_wrapper")

_HEADS = PartitionSpec(("data", "fsdp"), "tensor")  # axes of the mesh that split rows and heads
_LANES, _TESTED_HEADS, _LARGEST_BLOCK = 128, 64, 512  # of splash: tokens; head sizes; tokens of a block


def fastest(dtype: DTypeLike, length: int, head_size: int) -> str:
    """The kernel that `model.attention="auto"` stands for on the devices of this process."""
    if jax.default_backend() == "tpu" and length >= _LANES:  # shorter rows would be padding
        return "splash"
    return "chunks" if missing("cudnn", dtype, head_size) else "cudnn"


def missing(kernel: str, dtype: DTypeLike, head_size: int) -> str:
    """What the kernel needs and the devices of this process or the model lack; "" if it can be used."""
    if kernel == "splash" and jax.default_backend() != "tpu":
        return f"a TPU, but this process runs on {jax.default_backend()}"
    if kernel != "cudnn":
        return ""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    if re.fullmatch(r"([89]|\d\d)\.\d", capability) is None:
        return f"an NVIDIA GPU from Ampere on, but this process runs on {jax.devices()[0].device_kind}"
    if jnp.dtype(dtype).itemsize != 2:
        return f"model.compute_dtype=bfloat16, but it is {jnp.dtype(dtype).name}"
    return f"heads of size 128 at most, but they have {head_size}" if head_size > 128 else ""


def attend_by_jax(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    implementation: str = "cudnn",
) -> Float[Array, "B T N H"]:
    """Computes `attend_causally` by an implementation of `jax.nn.dot_product_attention`.

    cuDNN requires a head size that is a multiple of 8.
    """
    H = q_BTNH.shape[-1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -H % 8))) for x in (q_BTNH, k_BTKH, v_BTKH))
    attend: Any = jax.nn.dot_product_attention
    return attend(q, k, v, is_causal=True, scale=H**-0.5, implementation=implementation)[..., :H]


def attend_by_splash(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Computes `attend_causally` by splash attention; `interpret` emulates the kernel on a CPU.

    Heads are padded to a multiple of 64, the sizes that JAX tests it with, and rows to one of 128 tokens: no
    query sees the keys that are appended, and the queries are removed. On a mesh every device attends in its
    own rows and heads: XLA cannot split a kernel.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    q_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)  # splash does not scale the scores
    pads = (0, 0), (0, 0), (0, -T % _LANES), (0, -H % _TESTED_HEADS)
    heads_first = (jnp.pad(x.swapaxes(1, 2), pads) for x in (q_BTNH, k_BTKH, v_BTKH))
    attend: Any = partial(_splash, interpret=interpret)
    if not get_abstract_mesh().empty:
        attend = jax.shard_map(attend, in_specs=_HEADS, out_specs=_HEADS, check_vma=False)
    return attend(*heads_first)[:, :, :T, :H].swapaxes(1, 2)


def _splash(q_BNTH: Array, k_BKTH: Array, v_BKTH: Array, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # takes a second to import

    N, T = q_BNTH.shape[1:3]
    block = next(size for size in range(_LARGEST_BLOCK, 0, -_LANES) if T % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kernel: Any = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((T, T)) for _ in range(N)]),
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    return jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH)


KERNELS = {"cudnn": attend_by_jax, "splash": attend_by_splash}
