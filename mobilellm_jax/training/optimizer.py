"""AdamW or Muon, and the learning-rate schedule (paper section 3.1 and the official training script)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from mobilellm_jax.config import ModelConfig, OptimizerConfig
from mobilellm_jax.model.parameterization import multipliers
from mobilellm_jax.model.stack import map_parameters
from mobilellm_jax.parameters import Parameter


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Builds the learning rate as a function of the step, counted from 0.

    All schedules warm up linearly from 0 over `warmup_steps`. "cosine" and "linear" then fall to
    `final_fraction` of the peak at `steps`; "wsd" stays at the peak and falls there linearly
    over the last `decay_fraction` of the steps (Hu et al. 2024); "constant" stays.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    final = peak * config.final_fraction
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, steps - warmup), alpha=config.final_fraction)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, final, max(1, steps - warmup))
    elif config.schedule == "wsd":
        decay = max(1, min(round(config.decay_fraction * steps), steps - warmup))
        after = optax.linear_schedule(peak, final, decay, transition_begin=steps - warmup - decay)
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), after], [warmup])


def is_decayed(params: Any) -> Any:
    """Weight-decay mask: a tree of booleans, True for matrices and embeddings, False for gains."""
    return map_parameters(lambda parameter, _: not parameter.is_gain, params)


def make_optimizer(config: OptimizerConfig, model: ModelConfig) -> optax.GradientTransformation:
    """Chains clipping by the global norm, Adam or Muon, and decoupled weight decay, in this order.

    The updates are for a learning rate of 1 and must be subtracted: the learning rate is an argument of
    `step.train_step`, so that runs which differ in it share one compiled program.
    """
    m = multipliers(model)
    update = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    if config.name == "muon":
        update = _muon(config)
    return optax.chain(
        _clip(config.clip_norm),
        # Adam's update is invariant to the scale of the gradients but for epsilon: this divides epsilon.
        _scale({"U": 1 / m.epsilon_blocks, "L": 1 / m.epsilon_uses, "": 1 / m.epsilon_others}),
        update,
        _scale({}, matrices=m.learning_rate),
        # After the multiplier: learning rate x decay is never scaled.
        optax.add_decayed_weights(config.weight_decay, mask=is_decayed),
    )


def _clip(norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` by a factor: XLA multiplies where it reads, but stores quotients."""

    def clip(updates: Any, _: Any) -> Any:
        factor = jnp.minimum(1.0, norm / optax.tree.norm(updates))
        return jax.tree.map(lambda u: factor * u, updates)

    return optax.stateless(clip)


def _scale(factors: Mapping[str, float], matrices: float = 1.0) -> optax.GradientTransformation:
    """Multiplies parameters by the factor of their stack axis, by default 1, and matrices by `matrices`."""

    def scale(parameter: Parameter, u: jax.Array) -> jax.Array:
        part = factors.get(parameter.stack, 1.0)
        return part * (matrices if parameter.kind == "matrix" else 1.0) * u

    return optax.stateless(lambda updates, _: map_parameters(scale, updates))


def muon_axes(params: Any) -> Any:
    """A tree of `MuonDimensionNumbers` for matrices, and None for parameters that Adam updates.

    The leading stack axis is in neither rows nor columns, so that every block has its own update. By default,
    `optax.contrib.muon` would leave every parameter of three axes to Adam, and treat stacked norm gains and
    the embedding, which have two, as matrices.
    """

    def axes(parameter: Parameter, _: Any) -> Any:
        if parameter.kind != "matrix":
            return None
        first, end = len(parameter.stack), len(parameter.axes)
        columns = end - len(parameter.outputs)
        return optax.contrib.MuonDimensionNumbers(tuple(range(first, columns)), tuple(range(columns, end)))

    return map_parameters(axes, params)


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the matrices of the blocks, Adam with Nesterov momentum for the rest.

    Muon's updates are scaled to the root mean square 0.2 that Adam's have in practice, so that learning rate
    and weight decay mean the same for both (Liu et al. 2025, arXiv 2502.16982).
    """
    muon = optax.contrib.muon(
        learning_rate=1.0,
        beta=config.momentum,
        eps=config.epsilon,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        muon_weight_dimension_numbers=muon_axes,
        consistent_rms=0.2,
    )
    return optax.chain(muon, optax.scale(-1.0))  # the sign: optax's muon expects its updates to be added
