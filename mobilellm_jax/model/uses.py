"""What uses of one block do not share, all of it optional: `model.loop_*` in the config.

| field          | what each use has                                  | at first     | literature       |
|----------------|----------------------------------------------------|--------------|------------------|
| loop_gains     | gains of both norms, instead of those of the block | 1            |                  |
| loop_rank      | W + reduce expand for matrices W of the block      | W            | arXiv 2410.20672 |
| loop_scale     | a factor on each residual branch, learned or fixed | 1 if learned |                  |
| loop_embedding | a vector, added to the state where a loop begins   | 0            | arXiv 1807.03819 |
| loop_norm      | an RMSNorm of the state between loops, one gain    | no identity  |                  |

Where loops begin is `sharing.loop_starts`. The parameters are rows of `parameters.py` under "loops/", with an
axis L for the layers applied in training or C for the uses of a block. Without the last row, a model computes
at first what it would without extras. The first three are joined to the float32 weights of a block when it
is picked; so a block of its own for each layer can be written out (`written_out`) for formats that know
nothing of them. A further loop than in training has no parameters; fewer take those of the first.

Letters as in model/__init__.py, and: M rank of updates, C uses of a block, at most.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.adapters import product
from mobilellm_jax.model.block import rms_norm
from mobilellm_jax.parameters import Parameter, declared, parameter, sizes
from mobilellm_jax.sharing import fixed_scales, loop_starts, uses_of

Params = dict[str, Any]
ENTRY = "entry"  # what happens to the state before a layer; in parameters that are written out, by layer
_SCALED = {"attention": "output", "ffn": "down"}  # the matrix that ends a residual branch


def initial_uses(key: PRNGKeyArray, config: ModelConfig) -> dict[str, Float[Array, "..."]]:
    """First values by path; `reduce` from N(0, 1 / inputs)."""

    def value(number: int, of: Parameter) -> Float[Array, "..."]:
        if of.kind == "gain":
            return jnp.ones(of.shape(config))
        if of.kind == "embedding" or of.inputs == "M":
            return jnp.zeros(of.shape(config))
        std = math.prod(sizes(of.inputs, config)) ** -0.5
        return std * jax.random.normal(jax.random.fold_in(key, number), of.shape(config))

    rows = [of for of in declared(config) if of.path.startswith("loops/")]
    return {of.path: value(number, of) for number, of in enumerate(rows)}


def of_layers(params: Params, config: ModelConfig) -> Params:
    """What each layer of the plan has of its own, with a leading axis L; {} where uses are all alike."""
    if ENTRY in params:
        return {ENTRY: params[ENTRY]}
    if not config.differing_uses:
        return {}
    loops = dict(params.get("loops", {}))
    embedding_CD, norm = loops.pop("embedding", None), loops.pop("norm", None)
    plan, trained, uses_L = config.plan, config.trained_plan, uses_of(config.plan)
    starts_L = loop_starts(plan)
    if len(plan) < len(trained):  # fewer loops
        place = {use: place for place, use in enumerate(zip(trained, uses_of(trained), strict=True))}
        rows_L = [place[use] for use in zip(plan, uses_L, strict=True)]
        starts_L = [loop_starts(trained)[row] for row in rows_L]
        loops = jax.tree.map(lambda w_L: w_L[jnp.array(rows_L)], loops)
    if fixed := fixed_scales(config.loop_scale, config.num_uses):
        scale_L = jnp.array([fixed[use] for use in uses_L])
        loops |= {branch: {**loops.get(branch, {}), "scale": scale_L} for branch in _SCALED}
    starts_L, entry = jnp.array(starts_L), {}
    if norm is not None:
        gain_D = jnp.asarray(norm["gain"])
        entry["gain"] = jnp.broadcast_to(gain_D, (len(plan), *gain_D.shape))
        entry["is_between"] = starts_L & (jnp.array(uses_L) > 0)
    if embedding_CD is not None:
        entry["vector"] = jnp.where(starts_L[:, None], jnp.asarray(embedding_CD)[jnp.array(uses_L)], 0.0)
    return loops | ({ENTRY: entry} if entry else {})


def enter(own: Params, x_BTD: Float[Array, "B T D"], config: ModelConfig) -> Float[Array, "B T D"]:
    """The state that a layer reads and adds to."""
    entry = own.get(ENTRY, {})
    if "gain" in entry:
        normed_BTD = rms_norm(x_BTD, entry["gain"], config.norm_epsilon)
        x_BTD = jnp.where(entry["is_between"], normed_BTD, x_BTD)
    if "vector" in entry:
        x_BTD = x_BTD + entry["vector"].astype(x_BTD.dtype)[None, None, :]
    return x_BTD


def joined(block: Params, own: Params) -> Params:
    """The weights of a block for one use of it, a plain block again."""
    block = {part: dict(weights) for part, weights in block.items()}
    for part, mine in own.items():
        if part == ENTRY:
            continue
        weights = block.setdefault(part, {})
        for name, leaf in mine.items():
            if name == "gain":
                weights[name] = leaf
            elif name != "scale":
                weights[name] = weights[name] + product(parameter(f"blocks/{part}/{name}"), leaf)
        if "scale" in mine:
            last = _SCALED[part]
            weights[last] = mine["scale"] * weights[last]
    return block


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrittenOut(ModelConfig):
    """A model with a block for each layer of another, whose multipliers it has."""

    of: ModelConfig

    @property
    def scaled_depth(self) -> int:
        return self.of.scaled_depth

    @property
    def activation_bits(self) -> int:
        return self.of.activation_bits


def written_out(params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
    """`unrolled` where uses of a block differ, else the model as it is."""
    return unrolled(params, config) if config.differing_uses else (params, config)


def unrolled(params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
    """The same function with a block of its own for each layer, in float32.

    `loop_embedding` and `loop_norm` stay beside the blocks, as `ENTRY`.
    """
    own_L, plan_L = of_layers(params, config), jnp.array(config.plan)
    blocks_L = jax.tree.map(lambda w_U: jnp.asarray(w_U)[plan_L], params["blocks"])
    rest = {name: leaf for name, leaf in params.items() if name not in ("blocks", "loops")}
    entry = {ENTRY: own_L[ENTRY]} if ENTRY in own_L else {}
    return {**rest, **entry, "blocks": jax.vmap(joined)(blocks_L, own_L)}, _plain(config)


def _plain(config: ModelConfig) -> ModelConfig:
    fields = config.plain_fields()
    alike = {
        "loop_gains": False,
        "loop_rank": 0,
        "loop_scale": "",
        "loop_embedding": False,
        "loop_norm": False,
    }
    fields |= {**alike, "depth": config.effective_depth, "sharing": "none", "num_repeats": 1}
    return WrittenOut(**fields, of=config)


def as_blocks(params: Params, config: ModelConfig, what: str) -> tuple[Params, ModelConfig]:
    """`written_out` in NumPy, for what holds blocks alone, such as a format; errors as in `check_blocks`."""
    check_blocks(config, what)
    params, config = written_out(params, config)
    return jax.device_get(params), config


def check_blocks(config: ModelConfig, what: str) -> None:
    """Checks that a block for each layer is all that uses of a block need.

    Args:
      config: of the model.
      what: begins the message, such as "--format=hf".

    Raises:
      UserError: the state changes between blocks, by `loop_embedding` or `loop_norm`.
    """
    for field in ("loop_embedding", "loop_norm"):
        if getattr(config, field):
            raise UserError(
                f"{what}: model.{field}=True changes the state between blocks, which cannot be written into "
                "a block for each layer; only loop_gains, loop_rank and loop_scale can"
            )
