"""The part of `config.ModelConfig` by which uses of one block may differ, see `model/uses.py`."""

import dataclasses

from mobilellm_jax import validation as rules
from mobilellm_jax.errors import UserError
from mobilellm_jax.roles import science
from mobilellm_jax.sharing import LayerPlan, fixed_scales, uses_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class UsesConfig:
    """What each use of a block has of its own; the defaults leave all uses alike."""

    loop_gains: bool = science("each use of a block has norm gains of its own", before=False)
    loop_rank: int = science(
        "rank of the updates of matrices that each use of a block has (relaxed recursive transformers, arXiv "
        "2410.20672); 0: none",
        before=0,
    )
    loop_targets: str = science(
        "regular expression; a matrix has such updates if it is found in the path, such as "
        "blocks/attention/query",
        before="attention|ffn",
    )
    loop_scale: str = science(
        "factors on the residual branches of each use: '', 'learned' (from 1), or a number for each use of a "
        "block, such as '1 0.5'",
        before="",
    )
    loop_embedding: bool = science(
        "a learned vector, 0 at first, is added to the residual stream where a loop begins", before=False
    )
    loop_norm: bool = science("the residual stream goes through an RMSNorm between loops", before=False)

    @property
    def trained_plan(self) -> LayerPlan:
        """The plan that multipliers and parameters of uses are for; another in `loops.LoopedModel`."""
        raise NotImplementedError

    @property
    def num_uses(self) -> int:
        """C, how often the block that is applied most often is applied in training."""
        return 1 + max(uses_of(self.trained_plan))

    @property
    def differing_uses(self) -> str:
        """The first field by which uses of a block differ; "" if they are all alike."""
        fields = ("loop_gains", "loop_rank", "loop_scale", "loop_embedding", "loop_norm")
        return next((field for field in fields if getattr(self, field)), "")

    def check_uses(self) -> None:
        """Raises UserError unless the fields are valid, and the plan has repeats where it needs them."""
        valid = {"loop_rank": rules.COUNT, "loop_targets": rules.PATTERN}
        rules.check_all(self, valid, "model.")
        if self.num_uses == 1 and (field := self.differing_uses):
            plan = " ".join(map(str, self.trained_plan))
            raise UserError(
                f"model.{field}: {getattr(self, field)!r} has no meaning in the plan {plan[:40]}, which "
                "applies every block once; choose one with repeats by model.sharing and model.num_repeats"
            )
        fixed_scales(self.loop_scale, self.num_uses)
