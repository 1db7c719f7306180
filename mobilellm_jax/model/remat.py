"""What the backward pass keeps and what it recomputes, by `model.remat`."""

import jax

from mobilellm_jax.model.ops import attention

# Primitives that fetch the weights of a block. Their results are never kept for the backward pass: kept,
# they would be a copy of every block for every layer applied.
_FETCH = frozenset({"dynamic_slice", "squeeze", "reshape", "convert_element_type", "transpose"})

REMAT_POLICIES = {
    "none": lambda primitive, *_, **__: primitive.name not in _FETCH,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names(attention.KEPT),
        ),
        lambda primitive, *_, **__: primitive.name in attention.KEPT_PRIMITIVES,
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
