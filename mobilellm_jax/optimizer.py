"""AdamW and the learning-rate schedule (paper section 3.1 and the official training script)."""

from typing import Any

import jax
import optax

from mobilellm_jax.config import OptimizerConfig


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


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns clipping by the global norm, Adam, and decoupled weight decay on matrices, in this order.

    Its updates are for a learning rate of 1, still to be subtracted: the learning rate is an argument of
    `train.train_step`, so that runs which differ in it share one compiled program.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=is_matrix),
    )
