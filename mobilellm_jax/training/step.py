"""The training state, one optimizer step, and one evaluation step: pure functions."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from mobilellm_jax import model
from mobilellm_jax.config import ModelConfig, OptimizerConfig
from mobilellm_jax.data.rows import inputs_and_targets, is_target
from mobilellm_jax.model.adapters import join, split
from mobilellm_jax.quantization.aware import straight_through
from mobilellm_jax.training.optimizer import make_optimizer

Metrics = dict[str, Float[Array, "*trials"]]  # of a run alone without an axis
Sums = dict[str, Shaped[Array, "*shape"]]


class TrainState(NamedTuple):
    """All state that a step changes; with the config it determines the rest of the run.

    `opt_state` is that of the trained parameters, see `model.adapters.split`.
    """

    step: Int[Array, ""]
    params: model.Params
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The part of a teacher in the loss, see `model.distillation_loss`. Hashable: a static argument.

    Attributes:
      model: of the teacher.
      weight: of its predictions, above 0; 1 - weight is that of the tokens.
      temperature: that divides its logits and the student's.
    """

    model: ModelConfig
    weight: float
    temperature: float


def init_state(key: PRNGKeyArray, model_config: ModelConfig, optimizer: OptimizerConfig) -> TrainState:
    params = model.init(key, model_config)
    trained, _ = split(params, model_config)
    return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(optimizer, model_config).init(trained))


def gradients(
    params: model.Params,
    rows_AMS: Int[Array, "A M S"],
    config: ModelConfig,
    frozen: model.Params | None = None,
    teacher: model.Params | None = None,
    distillation: Distillation | None = None,
) -> tuple[Metrics, model.Params]:
    """Losses and the gradient, as means over the targets of A micro-batches of M rows, S = T + 1.

    The gradient is that of `params`; `frozen` has the other parameters, if any. The losses are `loss` of the
    targets, in nats per token, and with a teacher `teacher_loss` of its predictions.
    """

    def nats_and_terms(params: model.Params, rows_MS: Int[Array, "M S"]) -> Any:
        params, batch, d = join(params, frozen or {}), inputs_and_targets(rows_MS), distillation
        params = straight_through(params, config)
        if d is None:
            nats, count = model.loss(params, *batch, config)
            return nats, (count,)
        assert teacher is not None
        return model.distillation_loss(params, teacher, *batch, config, d.model, d.weight, d.temperature)

    def add(total: Any, rows_MS: Int[Array, "M S"]) -> tuple[Any, None]:
        value = jax.value_and_grad(nats_and_terms, has_aux=True)(params, rows_MS)
        return jax.tree.map(jnp.add, total, value), None

    # The first micro-batch starts the sum, so that a batch in one piece costs no extra gradient buffer.
    value = jax.value_and_grad(nats_and_terms, has_aux=True)(params, rows_AMS[0])
    if rows_AMS.shape[0] > 1:
        value, _ = jax.lax.scan(add, value, rows_AMS[1:])
    (nats, (count, *terms)), grads = value
    named = zip(("loss", "teacher_loss"), terms or [nats], strict=False)
    losses = {name: total / count for name, total in named}
    return losses, jax.tree.map(lambda g: (1 / count) * g, grads)  # no quotients, see `optimizer`


def train_step(
    state: TrainState,
    rows_BS: Int[Array, "B S"],
    learning_rate: Float[Array, ""],
    model_config: ModelConfig,
    optimizer: OptimizerConfig,
    accumulation_steps: int,
    teacher: model.Params | None = None,
    distillation: Distillation | None = None,
) -> tuple[TrainState, Metrics]:
    """Takes one optimizer step on B rows of S = T + 1 tokens; a teacher does not change.

    Metrics: `loss` in nats per token before the step, with a teacher `teacher_loss` of its predictions as
    well, and `grad_norm` before clipping.
    """
    B, S = rows_BS.shape
    # Micro-batches take every A-th row, so that no row moves to another device.
    rows_AMS = rows_BS.reshape(B // accumulation_steps, accumulation_steps, S).swapaxes(0, 1)
    trained, frozen = split(state.params, model_config)
    losses, grads = gradients(trained, rows_AMS, model_config, frozen, teacher, distillation)
    with jax.named_scope("optimizer"):
        transformation = make_optimizer(optimizer, model_config)
        updates, opt_state = transformation.update(grads, state.opt_state, trained)
        params = join(jax.tree.map(lambda p, u: p - learning_rate * u, trained, updates), frozen)
    metrics = {**losses, "grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, opt_state), metrics


def eval_step(params: model.Params, rows_BS: Int[Array, "B S"], config: ModelConfig, answers: bool) -> Sums:
    """Scores a batch of held-out rows: `nats` float32 [B, T] of every target, and the number of `targets`.

    `nats` is 0 where there is no target. With `answers` also the most probable tokens, `guesses` [B, T], the
    number of `rows` that have targets, and of `wrong` rows: those where a guess is not the target. This takes
    a second forward pass, with logits at all positions. Weights are rounded as in training.
    """
    tokens_BT, targets_BT = inputs_and_targets(rows_BS)
    params = straight_through(params, config)
    nats_BT = model.token_losses(params, tokens_BT, targets_BT, config)
    is_target_BT = is_target(targets_BT)
    targets = jnp.sum(is_target_BT)
    if not answers:
        return {"nats": nats_BT, "targets": targets}
    guesses_BT = jnp.argmax(model.apply(params, tokens_BT, config), axis=-1)
    wrong = jnp.sum(jnp.any(is_target_BT & (guesses_BT != targets_BT), axis=1))
    rows = jnp.sum(jnp.any(is_target_BT, axis=1))
    return {"nats": nats_BT, "guesses": guesses_BT, "targets": targets, "wrong": wrong, "rows": rows}
