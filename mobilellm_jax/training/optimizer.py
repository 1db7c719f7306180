"""AdamW or Muon, and the learning-rate schedule (paper section 3.1 and the official training script)."""

from typing import Any

import jax
import optax
import optax.contrib

from mobilellm_jax.config import ModelConfig, OptimizerConfig
from mobilellm_jax.model.parameterization import multipliers


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step, counted from 0.

    All schedules warm up linearly from 0 over `warmup_steps`. "cosine" then falls to `final_fraction` of the
    peak at `steps`; "wsd" stays at the peak and falls there linearly over the last `decay_fraction` of the
    steps (Hu et al. 2024); "constant" stays.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    final = peak * config.final_fraction
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, steps - warmup), alpha=config.final_fraction)
    elif config.schedule == "wsd":
        decay = max(1, min(round(config.decay_fraction * steps), steps - warmup))
        after = optax.linear_schedule(peak, final, decay, transition_begin=steps - warmup - decay)
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), after], [warmup])


def is_matrix(params: Any) -> Any:
    """Returns a tree of booleans: True for matrices, False for norm gains.

    By name, since stacked norm gains have two axes.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "gain", params)


def make_optimizer(config: OptimizerConfig, model: ModelConfig) -> optax.GradientTransformation:
    """Returns clipping by the global norm, Adam or Muon, and decoupled decay of matrices, in this order.

    Its updates are for a learning rate of 1, still to be subtracted: the learning rate is an argument of
    `train.train_step`, so that runs which differ in it share one compiled program.
    """
    m = multipliers(model)
    update = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    if config.name == "muon":
        update = _muon(config)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        # Adam's update is the same for gradients of any scale, but for epsilon: this divides epsilon.
        _scale(blocks=1 / m.epsilon_blocks, others=1 / m.epsilon_others),
        update,
        _scale(matrices=m.learning_rate),
        optax.add_decayed_weights(config.weight_decay, mask=is_matrix),  # learning rate x decay: never scaled
    )


def _scale(blocks: float = 1.0, others: float = 1.0, matrices: float = 1.0) -> optax.GradientTransformation:
    """Multiplies what belongs to `blocks` and to `others`, and besides the `matrices` of the blocks."""

    def update(updates: Any, _: Any) -> Any:
        def scale(path: Any, u: jax.Array) -> jax.Array:
            if path[0].key != "blocks":
                return others * u
            return blocks * (1.0 if path[-1].key == "gain" else matrices) * u

        return jax.tree_util.tree_map_with_path(scale, updates)

    return optax.stateless(update)


# Axes of the stacked weights that Muon takes for rows and columns of one matrix; axis 0, the blocks, is left
# out, so that every block has its own update.
_MUON_AXES = {
    **dict.fromkeys(["query", "key", "value"], ((1,), (2, 3))),  # U D N H
    "output": ((1, 2), (3,)),  # U N H D
    **dict.fromkeys(["gate", "up", "down"], ((1,), (2,))),
}


def muon_axes(params: Any) -> Any:
    """Returns the `MuonDimensionNumbers` of every matrix of the blocks, and None for what Adam updates.

    Without them, `optax.contrib.muon` leaves everything that has three axes to Adam, and takes stacked norm
    gains and the embedding, which have two, for matrices.
    """

    def axes(path: Any, _: Any) -> Any:
        of_matrix = path[0].key == "blocks" and _MUON_AXES.get(path[-1].key)
        return optax.contrib.MuonDimensionNumbers(*of_matrix) if of_matrix else None

    return jax.tree_util.tree_map_with_path(axes, params)


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns Muon (Jordan 2024) for the matrices of the blocks, Adam with Nesterov momentum for the rest.

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
    return optax.chain(muon, optax.scale(-1.0))  # muon's updates are to be added
