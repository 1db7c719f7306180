"""Linear layers and SwiGLU with custom gradients, which are faster than those that JAX derives.

Letters as in `model/__init__.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def _linear(product: str, x: Float[Array, "..."], w: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes `jnp.einsum(product, x, w)`; `w` has first the axes that `x` loses, then those that it gains.

    XLA on a CPU transposes the first operand of the weight-gradient product; the custom gradient puts the
    smaller operand first. Against JAX's own gradient, a training step 128 wide takes 0.6 of the time, one 576
    wide 0.85.
    """
    return jnp.einsum(product, x, w)


def _linear_forward(product: str, x: Array, w: Array) -> tuple[Array, Any]:
    return jnp.einsum(product, x, w), (x, w)


def _linear_backward(product: str, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = kept
    x_axes, w_axes, y_axes = product.replace("->", ",").split(",")
    dx = jnp.einsum(f"{y_axes},{w_axes}->{x_axes}", dy, w)
    if x.size <= dy.size:
        return dx, jnp.einsum(f"{x_axes},{y_axes}->{w_axes}", x, dy)
    gained_first = "".join(sorted(w_axes, key=lambda axis: axis in x_axes))
    dw = jnp.einsum(f"{y_axes},{x_axes}->{gained_first}", dy, x)
    dw = lax.optimization_barrier(dw)  # else XLA would fuse the transposition below into the product
    return dx, jnp.einsum(f"{gained_first}->{w_axes}", dw)


linear = jax.custom_vjp(_linear, nondiff_argnums=(0,))
linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def swiglu(gate_BTF: Float[Array, "B T F"], up_BTF: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """Computes silu(gate) * up (Shazeer 2020) in float32.

    The custom gradient stores the operands only, no intermediate results.
    """
    gate = gate_BTF.astype(jnp.float32)
    return (gate * jax.nn.sigmoid(gate) * up_BTF).astype(gate_BTF.dtype)


def _swiglu_forward(gate_BTF: Array, up_BTF: Array) -> tuple[Array, Any]:
    return swiglu(gate_BTF, up_BTF), (gate_BTF, up_BTF)


def _swiglu_backward(kept: tuple[Array, Array], dy_BTF: Array) -> tuple[Array, Array]:
    gate_BTF, up_BTF = kept
    gate, dy, dtype = gate_BTF.astype(jnp.float32), dy_BTF.astype(jnp.float32), gate_BTF.dtype
    sigmoid = jax.nn.sigmoid(gate)
    dgate = dy * up_BTF * sigmoid * (1 + gate * (1 - sigmoid))
    return dgate.astype(dtype), (dy * gate * sigmoid).astype(dtype)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
