"""What the backward pass keeps and what it recomputes, by `model.remat`."""

import jax

from mobilellm_jax.model.ops import attention

# What "dots" keeps, by its `checkpoint_name`; all else is elementwise, and recomputed.
_KEPT = (
    *("query", "key", "value"),  # products with weights; the rotation is recomputed
    attention.KEPT,  # what attention returns, and the logarithms that its weights are recomputed from
    "output",  # a product with weights, which the input of the feed-forward layer is recomputed from
    *("gate", "up"),  # products with weights: what enters the activation function
)  # not "down": no gradient needs it

# What "none" does not keep: the primitives that fetch the weights of a block, else every layer applied would
# keep a copy of its block. Activations that go through them are recomputed, for nothing. By primitive, not by
# name: `save_anything_except_these_names` on the weights keeps what goes into the name instead (backward
# memory of 16 blocks applied twice: 2.1 times the blocks, against 0.14).
_FETCH = frozenset({"dynamic_slice", "squeeze", "reshape", "convert_element_type", "transpose"})

REMAT_POLICIES = {
    "none": lambda primitive, *_, **__: primitive.name not in _FETCH,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(*_KEPT),
        lambda primitive, *_, **__: primitive.name in attention.KEPT_PRIMITIVES,  # cuDNN's have no name
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
