"""What a layer is worth: the loss under a plan without it, or with two neighbours swapped.

Weights stay as they were trained, and so does the multiplier of the residual branches
(`parameterization.py`): what remains of the stack computes what it did before, on other inputs.

Letters as in model/__init__.py. A place of a plan is 0 to L - 1.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data.rows import inputs_and_targets
from mobilellm_jax.model import Params, uses
from mobilellm_jax.model.block import rope_table
from mobilellm_jax.model.ops.cross_entropy import token_cross_entropy
from mobilellm_jax.model.stack import apply_layer, embed, final_norm, head_matrix, pick
from mobilellm_jax.sharing import LayerPlan

NOTHING = -1  # in a padded plan: no block is applied at this place


def skipped(plan: LayerPlan, place: int) -> LayerPlan:
    """The plan without the layer at a place."""
    return plan[:place] + plan[place + 1 :]


def shortened(plan: LayerPlan, place: int) -> LayerPlan:
    """The plan without the layer at a place, and without the uses of the same block that follow in a row."""
    end = place
    while end < len(plan) and plan[end] == plan[place]:
        end += 1
    return plan[:place] + plan[end:]


def swapped(plan: LayerPlan, place: int) -> LayerPlan:
    """The plan with the layers at a place and after it exchanged."""
    return (*plan[:place], plan[place + 1], plan[place], *plan[place + 2 :])


def without(plan: LayerPlan, block: int) -> LayerPlan:
    """The plan without all uses of a block."""
    return tuple(u for u in plan if u != block)


def costs(plan: LayerPlan, loss: Mapping[LayerPlan, Any]) -> list[Any]:
    """Cost of every layer in nats per token, given the loss under every plan of `plans_of`.

    Of a layer whose neighbours are other blocks, it is the loss without it minus that of the whole plan. Of k
    uses of one block in a row, any one is skipped by the same plan, which says what a k-th use is worth, but
    not what the others are. So the j-th use costs what the loss rises by where j - 1 remain instead of j.
    """
    found = []
    for place, u in enumerate(plan):
        is_last = plan[place + 1 : place + 2] != (u,)
        with_it = plan if is_last else shortened(plan, place + 1)
        found.append(loss[shortened(plan, place)] - loss[with_it])
    return found


def plans_of(plan: LayerPlan) -> list[LayerPlan]:
    """Every plan that `costs` and the losses of a diagnosis need, each once, the trained one first."""
    places, pairs = range(len(plan)), range(len(plan) - 1)
    blocks = [u for u in sorted(set(plan)) if plan.count(u) > 1]
    return list(
        dict.fromkeys(
            [
                plan,
                *(skipped(plan, place) for place in places),
                *(shortened(plan, place) for place in places),
                *(swapped(plan, place) for place in pairs),
                *(without(plan, u) for u in blocks),
            ]
        )
    )


def padded(plan: LayerPlan, length: int) -> LayerPlan:
    """The plan with places at its end at which nothing is applied."""
    return (*plan, *[NOTHING] * (length - len(plan)))


def plan_losses(
    params: Params, rows_BS: Int[Array, "B S"], plan_L: Int[Array, "L"], config: ModelConfig
) -> Float[Array, "B T"]:
    """Cross-entropy of every target in nats under a plan, 0 where there is none.

    The plan is an argument, so that all padded plans of one length are one program.
    """
    tokens_BT, targets_BT = inputs_and_targets(rows_BS)
    x_BTD = hidden(params, tokens_BT, plan_L, config)
    return token_cross_entropy(x_BTD, head_matrix(params), targets_BT, config.loss_chunk)


def hidden(
    params: Params, tokens_BT: Int[Array, "B T"], plan_L: Int[Array, "L"], config: ModelConfig
) -> Float[Array, "B T D"]:
    """`model.hidden` under a padded plan; not to be differentiated, as it keeps all activations.

    Where uses of a block differ, `uses.written_out` has to have written out the blocks.
    """
    rope, own_U = rope_table(jnp.arange(tokens_BT.shape[1])[None, :], config), uses.of_layers(params, config)

    def layer(x_BTD: Float[Array, "B T D"], u: Int[Array, ""]) -> tuple[Float[Array, "B T D"], None]:
        def applied(x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
            return apply_layer(pick(params["blocks"], u), pick(own_U, u), x_BTD, config, rope)[0]

        return lax.cond(u == NOTHING, lambda x_BTD: x_BTD, applied, x_BTD), None

    x_BTD, _ = lax.scan(layer, embed(params, tokens_BT, config), plan_L)
    return final_norm(params, x_BTD, config)
