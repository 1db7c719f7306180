"""Linear layers and SwiGLU with custom gradients, which are faster than those that JAX derives.

Letters as in `model/__init__.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mobilellm_jax.model.ops.precision import sum_dtype


def _linear(product: str, x: Float[Array, "..."], w: Float[Array, "..."]) -> Float[Array, "..."]:
    """Computes `jnp.einsum(product, x, w)`; `w` has first the axes that `x` loses, its last, in their order.

    XLA on a CPU transposes the first operand of the weight-gradient product; the custom gradient puts the
    smaller operand first. Against JAX's own gradient, a training step 128 wide takes 0.6 of the time, one 576
    wide 0.85.
    """
    lost = _lost(product)
    return _product(x, w, range(x.ndim - lost, x.ndim), range(lost))


def _linear_forward(product: str, x: Array, w: Array) -> tuple[Array, Any]:
    return _linear(product, x, w), (x, w)


def _linear_backward(product: str, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    (x, w), lost = kept, _lost(product)
    common = range(x.ndim - lost)  # axes of both x and y, the first ones
    dx = _product(dy, w, range(len(common), dy.ndim), range(lost, w.ndim))
    if x.size <= dy.size:
        return dx, _product(x, dy, common, common)
    dw = _product(dy, x, common, common)
    dw = lax.optimization_barrier(dw)  # else XLA would fuse the transposition below into the product
    return dx, jnp.moveaxis(dw, range(w.ndim - lost, w.ndim), range(lost))


def _lost(product: str) -> int:
    """Number of axes of x that are summed over."""
    x_axes, _, y_axes = product.replace("->", ",").split(",")
    return len(set(x_axes) - set(y_axes))


def _product(a: Array, b: Array, of_a: range, of_b: range) -> Array:
    """Sums over axes of both, in their order: `jnp.einsum` sorts them by letter, and XLA copies a matrix."""
    axes = (tuple(of_a), tuple(of_b)), ((), ())
    return lax.dot_general(a, b, axes, preferred_element_type=sum_dtype(a.dtype)).astype(a.dtype)


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
