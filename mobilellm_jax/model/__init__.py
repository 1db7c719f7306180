"""The transformer: pure functions `init`, `apply` and `loss` around one Flax block.

Letters in tensor names and einsums:
  B batch   T position (query)   S position (key)   D width       F feed-forward width   V vocabulary
  N query heads   K key/value heads   G = N / K queries per key/value head   H head size
  U distinct blocks   L layers applied (the length of the layer plan)   R rank of adapters

The parameters are declared in `parameters.py`: float32, nested dictionaries; the leading axis U of `blocks`
stacks the blocks.

Reverse mode only: `linear`, `swiglu`, `attend_causally`, `cross_entropy` and `distillation` (in `ops/`)
define their gradients by `jax.custom_vjp`, for speed and memory. So `jax.jvp`, `jax.jacfwd` and `jax.hessian`
of `apply`, `hidden`, `loss` and `extend` fail: "can't apply forward-mode autodiff (jvp) to a custom_vjp
function".
Reverse over reverse works, for instance for Hessian-vector products.
"""

from mobilellm_jax.model.cache import Cache, empty_cache, extend
from mobilellm_jax.model.stack import (
    Params,
    apply,
    distillation_loss,
    hidden,
    init,
    logits,
    loss,
    token_losses,
)

__all__ = [
    "Cache",
    "Params",
    "apply",
    "distillation_loss",
    "empty_cache",
    "extend",
    "hidden",
    "init",
    "logits",
    "loss",
    "token_losses",
]
