"""Other numbers of loops than in training: the plan of the same strategy, multipliers as in training."""

import dataclasses

from mobilellm_jax.config import ModelConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.roles import science
from mobilellm_jax.sharing import LOOPED, LayerPlan, layer_plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopedModel(ModelConfig):
    """A model that applies its blocks `num_repeats` times, trained with `trained_repeats`."""

    trained_repeats: int = science("times each block is applied in the plan that multipliers are for")

    @property
    def trained_plan(self) -> LayerPlan:
        return layer_plan(self.sharing, self.depth, self.trained_repeats)


def with_repeats(config: ModelConfig, num_repeats: int) -> ModelConfig:
    """The model with each block applied `num_repeats` times, its weights and multipliers as they are.

    Under CompleteP, residual branches are divided by the number of layers applied. Here they keep the divisor
    of training. With another one, every layer would add another amount than it was trained to, the first loop
    included; with the same one, the first R loops of `repeat_all` compute what they did in training, and a
    further loop goes on from there.

    Raises:
      UserError: `model.sharing` is no strategy with loops, there are too many layers, or parameters of uses
        are for fewer.
    """
    if config.sharing not in LOOPED:
        raise UserError(
            f"num_repeats={num_repeats}: model.sharing={config.sharing!r} has no loops to count; it takes a "
            f"model of {', '.join(LOOPED[:-1])} or {LOOPED[-1]}"
        )
    if num_repeats == config.num_repeats:
        return config
    if type(config) not in (ModelConfig, LoopedModel):
        raise TypeError(f"{type(config).__name__}: what it adds to a model would be lost")
    fields = config.plain_fields()
    trained = config.trained_repeats if isinstance(config, LoopedModel) else config.num_repeats
    if num_repeats > trained and (field := config.differing_uses) not in ("", "loop_norm"):
        raise UserError(
            f"num_repeats={num_repeats}: model.{field}={getattr(config, field)!r} is for the {trained} uses "
            f"of training; use at most {trained}"
        )
    return LoopedModel(**{**fields, "num_repeats": num_repeats}, trained_repeats=trained)
