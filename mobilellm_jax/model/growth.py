"""Growth: the parameters of a deeper or looped model from those of a trained one, block by block."""

import re
from typing import Any

import jax
import jax.numpy as jnp

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.adapters import by_path
from mobilellm_jax.model.uses import check_blocks, unrolled
from mobilellm_jax.parameters import nest

Params = dict[str, Any]
UNROLL = "unroll"


def sources(grow: str, there: ModelConfig, m: ModelConfig) -> tuple[int, ...]:
    """The number of the parent's block, or with "unroll" of its layer, that each block starts from.

    Args:
      grow: `train.grow`.
      there: the parent.
      m: the model to be grown.

    Raises:
      UserError: there are more or fewer of them than blocks, the parent has no such block, or uses of its
        blocks differ in a way that the blocks cannot take over.
    """
    if grow == UNROLL:
        check_blocks(there, f"train.grow: {grow!r} of a parent")
        if m.depth != there.effective_depth:
            raise UserError(
                f"train.grow: {grow!r} makes a block of each of the {there.effective_depth} layers that the "
                f"parent applies, but model.depth={m.depth}; use model.depth={there.effective_depth}"
            )
        return tuple(range(m.depth))
    if not re.fullmatch(r"\d{1,5}( \d{1,5})*", grow):
        raise UserError(
            f"train.grow: {grow!r} is not valid; expected '', 'unroll', or a block of the parent for each of "
            "this model, such as '0 1 0 1'"
        )
    found = tuple(map(int, grow.split()))
    if there.differing_uses:
        field = there.differing_uses
        raise UserError(
            f"train.grow: uses of a block differ in the parent (model.{field}={getattr(there, field)!r}), so "
            f"{grow!r} names no whole blocks; use 'unroll'"
        )
    if len(found) != m.depth or max(found) >= there.depth:
        raise UserError(
            f"train.grow: {grow!r} has to name a block of the parent, 0 to {there.depth - 1}, for each of "
            f"the {m.depth} here (model.depth)"
        )
    return found


def grown(params: Params, fresh: Params, there: ModelConfig, m: ModelConfig, grow: str) -> Params:
    """Parameters of `m` from those of a parent; what uses have of their own, but for gains, is as in `fresh`.

    With "unroll" and a plan of blocks applied once, the function is that of the parent. By number, it is
    where the plan applies the same blocks in the same order, and the multiplier of residual branches, which
    CompleteP derives from the number of layers, is the same.
    """
    rows_U = jnp.array(sources(grow, there, m))
    if grow == UNROLL:
        params, _ = unrolled(params, there)
    blocks = jax.tree.map(lambda w: w[rows_U], params["blocks"])
    named = by_path({**params, "blocks": blocks})
    if m.loop_gains:
        for norm in ("attention_norm", "ffn_norm"):
            named[f"loops/{norm}/gain"] = named[f"blocks/{norm}/gain"][jnp.array(m.plan)]
    return nest({path: named.get(path, leaf) for path, leaf in by_path(fresh).items()})
