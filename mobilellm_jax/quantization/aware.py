"""Quantization-aware training: every forward pass rounds, and gradients go straight through the rounding.

The parameters that are trained, and kept in checkpoints, are those in full precision. They are rounded as
`apply.quantize` would round them, in training and in evaluations, so losses are those of the quantized model;
the gradient with respect to a rounded number is taken for that of the number itself (straight-through
estimator; Bengio et al. 2013, arXiv 1308.3432). No weight is ever cut off, as the largest makes the scale.
A rounded copy of all parameters exists during a step.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float

from mobilellm_jax.config import Config, ExtendedModel, ModelConfig
from mobilellm_jax.model.adapters import adapted
from mobilellm_jax.model.stack import Params, map_parameters
from mobilellm_jax.parameters import Parameter
from mobilellm_jax.quantization.apply import check_groups, rounded
from mobilellm_jax.quantization.schemes import Scheme, parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class AwareModel(ExtendedModel):
    """A model that is trained with rounded weights, and with rounded activations if the scheme has them."""

    scheme: Scheme

    @property
    def activation_bits(self) -> int:
        return self.scheme.activation_bits


def trained_model(config: Config) -> ModelConfig:
    """The model that a run trains: with the adapters, or the rounding, that `config.train` asks for.

    Raises:
      UserError: as `adapted`; or there is no such scheme, or its groups do not divide the inputs of a matrix.
    """
    if not config.train.quantize:
        return adapted(config)
    scheme, m = parse(config.train.quantize), config.model
    check_groups(m, scheme)
    return AwareModel(**m.plain_fields(), of=m, scheme=scheme)


def straight_through(params: Params, config: ModelConfig) -> Params:
    """Rounds the parameters of an `AwareModel`, with gradients as if it had not; those of others stay."""
    if not isinstance(config, AwareModel):
        return params
    return map_parameters(
        lambda of, w: w if of.is_gain else _round(of, config.scheme, w),
        params,
    )


def _rounded(of: Parameter, scheme: Scheme, w: Float[Array, "..."]) -> Float[Array, "..."]:
    return rounded(of, w, scheme)


def _forward(of: Parameter, scheme: Scheme, w: Array) -> tuple[Array, None]:
    return _rounded(of, scheme, w), None


def _backward(of: Parameter, scheme: Scheme, kept: Any, dw: Array) -> tuple[Array]:
    return (dw,)


_round = jax.custom_vjp(_rounded, nondiff_argnums=(0, 1))
_round.defvjp(_forward, _backward)
