"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): W becomes W + alpha / R reduce expand.

Only the adapters are trained; everything else is frozen. They are rows of the table of parameters, stacked as
the matrix they adapt: a shared block has one for all its uses. The sum is made in float32 when a block is
picked, before it is cast, so the model that is trained is the model with merged weights, whose forward pass
knows nothing of adapters. The gradient of a whole matrix exists for one block at a time. A step thus costs
about what training all parameters does, but needs no gradient and no optimizer state for what is frozen.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from mobilellm_jax.config import Config, ExtendedModel, ModelConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.parameters import ADAPTER, Parameter, declared, nest, parameter, sizes
from mobilellm_jax.train_config import Adapters

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptedModel(ExtendedModel):
    """A model with adapters."""

    adapted_by: Adapters

    @property
    def adapters(self) -> Adapters | None:
        return self.adapted_by

    @property
    def adapter_rank(self) -> int:
        return self.adapted_by.rank


def adapted(config: Config) -> ModelConfig:
    """The model that a run trains: `config.model`, with the adapters that `config.train` asks for.

    Raises:
      UserError: `train.loops` is set too, no matrix is adapted, or a rank, that of `model.loop_rank` too, is
        above the inputs or outputs of a matrix.
    """
    t, m = config.train, config.model
    if m.loop_rank:
        _matrices("model.loop_rank", m.loop_rank, "model.loop_targets", m.loop_targets, m)
    if not t.lora_rank:
        return m
    if t.loops:
        raise UserError(
            f"train.loops: {t.loops!r} does not go with train.lora_rank={t.lora_rank}; train adapters with "
            "one number of loops, model.num_repeats"
        )
    targets = _matrices("train.lora_rank", t.lora_rank, "train.lora_targets", t.lora_targets, m)
    by = Adapters(t.lora_rank, t.lora_alpha, tuple(of.path for of in targets))
    return AdaptedModel(**m.plain_fields(), of=m, adapted_by=by)


def _matrices(field: str, rank: int, pattern_field: str, pattern: str, m: ModelConfig) -> list[Parameter]:
    """The matrices that get low-rank updates; UserError if there are none, or the rank is too large."""
    matrices = [of for of in declared(m) if of.kind == "matrix"]
    targets = [of for of in matrices if re.search(pattern, of.path)]
    if not targets:
        there = ", ".join(of.path for of in matrices)
        raise UserError(f"{pattern_field}: {pattern!r} is found in none of {there}")
    for of in targets:
        for what, letters in (("inputs", of.inputs), ("outputs", of.outputs)):
            size = math.prod(sizes(letters, m))
            if rank > size:
                raise UserError(
                    f"{field}: {rank} is above the {size} {what} of {of.path}; use at most "
                    f"{size}, or {pattern_field} without it"
                )
    return targets


def init_adapters(key: PRNGKeyArray, config: ModelConfig) -> dict[str, Float[Array, "..."]]:
    """First adapters by path: `reduce` from N(0, 1 / inputs), `expand` 0, so that W begins unchanged."""

    def initial(number: int, of: Parameter) -> Float[Array, "..."]:
        if of.inputs == "R":
            return jnp.zeros(of.shape(config))
        std = math.prod(sizes(of.inputs, config)) ** -0.5
        return std * jax.random.normal(jax.random.fold_in(key, number), of.shape(config))

    rows = [of for of in declared(config) if of.kind == "adapter"]
    return {of.path: initial(number, of) for number, of in enumerate(rows)}


def merged(params: Params, config: ModelConfig) -> Params:
    """All parameters, with the adapters added to their matrices."""
    return {**params, "blocks": merge(params["blocks"], config, "U")}


def merge(blocks: Params, config: ModelConfig, stack: str = "") -> Params:
    """A block, or with `stack` "U" all of them, with the adapters added to their matrices, in float32."""
    if config.adapters is None:
        return blocks
    scale = config.adapters.alpha / config.adapters.rank

    def add(path: str, weights: Params, name: str) -> Any:
        of, pair = parameter(f"blocks/{path}/{name}"), weights.get(name + ADAPTER)
        return weights[name] if pair is None else weights[name] + scale * product(of, pair, stack)

    return {
        path: {name: add(path, weights, name) for name in weights if not name.endswith(ADAPTER)}
        for path, weights in blocks.items()
    }


def product(of: Parameter, pair: Params, stack: str = "") -> Float[Array, "..."]:
    """What an adapter or an update adds to a matrix, but for its scale."""
    axes = f"{stack}{of.inputs}R,{stack}R{of.outputs}->{stack}{of.inputs}{of.outputs}"
    # The exported weights are merged on a CPU: no rounding to TF32 or bfloat16 here.
    return jnp.einsum(axes, pair["reduce"], pair["expand"], precision=lax.Precision.HIGHEST)


def split(params: Params, config: ModelConfig) -> tuple[Params, Params]:
    """Splits parameters into those that are trained and those that are frozen; the inverse of `join`."""
    if config.adapters is None:
        return params, {}
    named = by_path(params)
    trained = {path: leaf for path, leaf in named.items() if parameter(path).kind == "adapter"}
    return nest(trained), nest({path: leaf for path, leaf in named.items() if path not in trained})


def join(trained: Params, frozen: Params) -> Params:
    return nest(by_path(trained) | by_path(frozen)) if frozen else trained


def by_path(params: Params) -> dict[str, Any]:
    """The inverse of `parameters.nest`."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
