"""Rematerialisation policies: the activations that are stored for the backward pass, by `model.remat`."""

import jax

from mobilellm_jax.model.ops.attention_kernels import KEPT, KEPT_PRIMITIVES

# Activations stored by "dots", by their `checkpoint_name`; the rest is elementwise, and recomputed.
_KEPT = (
    *("query", "key", "value"),  # products with weights; the rotation is recomputed
    KEPT,  # the output of attention, and the logarithms from which its weights are recomputed
    "output",  # a product with weights, from which the input of the feed-forward layer is recomputed
    *("gate", "up"),  # products with weights: the inputs of the activation function
)  # not "down": no gradient needs it

# "none" recomputes the results of the primitives that fetch the weights of a block: stored, every layer
# applied would have a copy of its block. Activations that go through these primitives are recomputed at no
# cost. By primitive, not by name: `save_anything_except_these_names` on the weights stores the operand of the
# name instead (backward memory of 16 blocks applied twice: 2.1 times the blocks, against 0.14).
_FETCH = frozenset({"dynamic_slice", "squeeze", "reshape", "convert_element_type", "transpose"})

REMAT_POLICIES = {
    "none": lambda primitive, *_, **__: primitive.name not in _FETCH,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(*_KEPT),
        lambda primitive, *_, **__: primitive.name in KEPT_PRIMITIVES,  # cuDNN's have no name
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}
