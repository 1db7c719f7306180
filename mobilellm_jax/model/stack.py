"""The stack: `init`, `hidden`, `apply` and `loss`, one scan over the layer plan for every strategy."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec, get_abstract_mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.model import uses
from mobilellm_jax.model.adapters import by_path, init_adapters, join, merge
from mobilellm_jax.model.block import Attend, Block, Rope, initial, rms_norm, rope_table
from mobilellm_jax.model.ops.cross_entropy import (
    cross_entropy,
    distillation,
    head_logits,
    token_cross_entropy,
)
from mobilellm_jax.model.ops.precision import stack_dtype
from mobilellm_jax.model.ops.rounding import round_tokens
from mobilellm_jax.model.parameterization import multipliers
from mobilellm_jax.model.remat import REMAT_POLICIES
from mobilellm_jax.parameters import Parameter, nest, parameter

Params = dict[str, Any]


def init(key: PRNGKeyArray, config: ModelConfig) -> Params:
    """Initialises float32 parameters: matrices from N(0, init_std) times their multiplier, norm gains 1.

    Adapters as in `init_adapters`, and what uses of a block have of their own as in `uses.initial_uses`.
    """
    embedding_key, head_key, blocks_key = jax.random.split(key, 3)
    x_BTD, rope = jnp.zeros((1, 1, config.width)), rope_table(jnp.zeros((1, 1), int), config)

    def init_block(block_key: PRNGKeyArray) -> Params:
        return dict(Block(config).init(block_key, x_BTD, rope)["params"])

    params: Params = {
        "embedding": initial(parameter("embedding"), embedding_key, config),
        "blocks": _declared(jax.vmap(init_block)(jax.random.split(blocks_key, config.depth)), config),
        "final_norm": {"gain": initial(parameter("final_norm/gain"), key, config)},
    }
    if not config.share_embedding:
        params["head"] = initial(parameter("head"), head_key, config)
    own = uses.initial_uses(embedding_key, config)
    return join(params, nest(own | init_adapters(blocks_key, config)))


def _declared(blocks: Params, config: ModelConfig) -> Params:
    """Blocks without the gains that each use has of its own."""
    if not config.loop_gains:
        return blocks
    return nest(
        {p: leaf for p, leaf in by_path(blocks).items() if parameter(f"blocks/{p}").condition(config)}
    )


def apply(params: Params, tokens_BT: Int[Array, "B T"], config: ModelConfig) -> Float[Array, "B T V"]:
    """Float32 logits of the token after each position."""
    return logits(params, hidden(params, tokens_BT, config))


def loss(
    params: Params, tokens_BT: Int[Array, "B T"], targets_BT: Int[Array, "B T"], config: ModelConfig
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Summed cross-entropy in nats, and the number of targets.

    Negative targets are ignored. The logits of at most `loss_chunk` positions exist at one time.
    """
    x_BTD = hidden(params, tokens_BT, config)
    with jax.named_scope("loss"):
        nats = cross_entropy(x_BTD, head_matrix(params), targets_BT, config.loss_chunk)
        return nats, jnp.sum(targets_BT >= 0)


def distillation_loss(
    params: Params,
    teacher: Params,
    tokens_BT: Int[Array, "B T"],
    targets_BT: Int[Array, "B T"],
    config: ModelConfig,
    teacher_config: ModelConfig,
    weight: int | float,
    temperature: int | float,
) -> tuple[Float[Array, ""], tuple[Int[Array, ""], Float[Array, ""], Float[Array, ""]]]:
    """Summed nats of the targets and of a teacher's predictions, see `cross_entropy.distillation`.

    Memory as in `loss`: the teacher's logits of at most `loss_chunk` positions exist as well.

    Returns:
      The loss, which has gradients with respect to `params` alone; and the number of targets, and the terms
      of the loss without their factors: nats of the targets, and of the teacher's predictions.
    """
    x_BTD = hidden(params, tokens_BT, config)
    with jax.named_scope("teacher"):
        teacher = lax.stop_gradient(teacher)
        teacher_x_BTE = hidden(teacher, tokens_BT, teacher_config)
    with jax.named_scope("loss"):
        heads = head_matrix(params), head_matrix(teacher)
        nats, label, soft = distillation(
            x_BTD, heads[0], targets_BT, teacher_x_BTE, heads[1], config.loss_chunk, weight, temperature
        )
        return nats, (jnp.sum(targets_BT >= 0), label, soft)


def token_losses(
    params: Params, tokens_BT: Int[Array, "B T"], targets_BT: Int[Array, "B T"], config: ModelConfig
) -> Float[Array, "B T"]:
    """Cross-entropy of every target in nats, 0 where there is none; memory as in `loss`, but no gradient."""
    x_BTD = hidden(params, tokens_BT, config)
    with jax.named_scope("loss"):
        return token_cross_entropy(x_BTD, head_matrix(params), targets_BT, config.loss_chunk)


def hidden(params: Params, tokens_BT: Int[Array, "B T"], config: ModelConfig) -> Float[Array, "B T D"]:
    """Normalised output of the last layer, in the compute dtype: the input of the head.

    One loop over the layer plan, compiled once whatever its length; or, with a `scan_unroll` of at least the
    number of layers, no loop, which takes longer to compile and less time to run on a GPU.

    In the loop, the block of each layer is picked from the stack inside `jax.checkpoint`, so that the
    backward pass stores no copy of the blocks, whatever the plan. It is cast to the compute dtype after the
    pick, so that the gradients of several uses of a block add up in float32.
    """
    rope = rope_table(jnp.arange(tokens_BT.shape[1])[None, :], config)
    remat = partial(jax.checkpoint, policy=REMAT_POLICIES[config.remat], prevent_cse=False)

    def layer(weights: Params, own: Params, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return apply_layer(weights, own, x_BTD, config, rope)[0]

    x_BTD, own_L = embed(params, tokens_BT, config), uses.of_layers(params, config)
    if config.scan_unroll >= config.effective_depth:
        blocks, layer = unstack(params)["blocks"], remat(layer)
        for place, u in enumerate(config.plan):
            x_BTD = layer(blocks[u], pick(own_L, place), x_BTD)
    else:
        dtype = x_BTD.dtype
        carried = stack_dtype(dtype)  # the input of a layer is stored, too

        @remat
        def pick_and_apply(x_BTD: Float[Array, "B T D"], at: Any) -> tuple[Any, None]:
            u, own = at
            return layer(pick(params["blocks"], u), own, x_BTD.astype(dtype)).astype(carried), None

        over = jnp.array(config.plan), own_L
        x_BTD, _ = lax.scan(pick_and_apply, x_BTD.astype(carried), over, unroll=config.scan_unroll)
        x_BTD = x_BTD.astype(dtype)
    return final_norm(params, x_BTD, config)


def apply_layer(
    weights: Params,
    own: Params,
    x_BTD: Float[Array, "B T D"],
    config: ModelConfig,
    rope: Rope,
    attend: Attend | None = None,
) -> tuple[Float[Array, "B T D"], Any]:
    """Applies one layer: a block (float32, or cast already), with what this use of it has of its own.

    Computes its output and the memory of `attend`, by default that in training.
    """
    x_BTD = uses.enter(own, x_BTD, config)
    weights = cast(uses.joined(merge(weights, config), own), config, "blocks/")
    y_BTD, memory = Block(config).apply({"params": weights}, x_BTD, rope, attend)
    return constrain(y_BTD, ("data", "fsdp")), memory


def embed(params: Params, tokens_BT: Int[Array, "B T"], config: ModelConfig) -> Float[Array, "B T D"]:
    with jax.named_scope("embedding"):
        embedding_VD = constrain(params["embedding"], "tensor")
        return constrain(embedding_VD[tokens_BT].astype(config.compute_dtype), ("data", "fsdp"))


def final_norm(params: Params, x_BTD: Float[Array, "B T D"], config: ModelConfig) -> Float[Array, "B T D"]:
    with jax.named_scope("final_norm"):
        x_BTD = rms_norm(x_BTD, params["final_norm"]["gain"], config.norm_epsilon)
        x_BTD = multipliers(config).logits * x_BTD  # here once, instead of at every use of the head
        bits = config.activation_bits
        return round_tokens(x_BTD, bits) if bits else x_BTD


def logits(params: Params, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Float32 logits from the output of `hidden` or `extend`."""
    with jax.named_scope("head"):
        return head_logits(x_BTD, head_matrix(params))


def head_matrix(params: Params) -> Float[Array, "V D"]:
    return params.get("head", params["embedding"])


# --- weights and meshes ---------------------------------------------------------------------------------


def pick(blocks: Params | list[Params], u: int | Int[Array, ""]) -> Params:
    """Block u of a stack, or of a list."""
    if isinstance(blocks, list):
        return lax.switch(u, [lambda block=block: block for block in blocks])
    return jax.tree.map(lambda w_U: lax.dynamic_index_in_dim(w_U, u, keepdims=False), blocks)


def unstack(params: Params) -> Params:
    """Splits the stack of blocks into a list of blocks.

    Their gradients are concatenated once; those of `pick` would be added up as a whole stack for each use.
    """
    leaves, tree = jax.tree.flatten(params["blocks"])
    return {**params, "blocks": [tree.unflatten(b) for b in zip(*map(jnp.unstack, leaves), strict=True)]}


def cast(params: Params, config: ModelConfig, prefix: str = "") -> Params:
    """Casts matrices and embeddings to the compute dtype; gains stay float32."""
    dtype = config.compute_dtype
    return map_parameters(lambda of, w: w if of.is_gain else w.astype(dtype), params, prefix)


def map_parameters(function: Callable[[Parameter, Any], Any], tree: Any, prefix: str = "") -> Any:
    """Maps function(row, leaf) over a tree of parameters; `prefix` completes the paths of a subtree.

    Raises:
      UserError: a path has no row in `parameters.py`.
    """

    def at(path: Any, leaf: Any) -> Any:
        return function(parameter(prefix + jax.tree_util.keystr(path, simple=True, separator="/")), leaf)

    return jax.tree_util.tree_map_with_path(at, tree)


def constrain(x: Any, *axes: Any) -> Any:
    """Constrains the sharding of an array to these axes of the mesh in use (`partition.in_use`), if any.

    Without the constraint, the compiler splits activations as `fsdp` splits weights, along D, and every
    device computes all rows of the batch.
    """
    return x if get_abstract_mesh().empty else lax.with_sharding_constraint(x, PartitionSpec(*axes))
