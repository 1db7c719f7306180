"""Where the first parameters of a run come from: config fields of `train`, a part of `config.py`."""

import dataclasses

from mobilellm_jax.errors import UserError
from mobilellm_jax.roles import science


@dataclasses.dataclass(frozen=True, kw_only=True)
class OriginConfig:
    """The parent of a run. See `runs/lineage.py`."""

    init_from: str = science(
        "directory of a run, trained or imported, whose newest intact checkpoint the run starts from; its "
        "model and tokenizer have to be those of this run; '' starts from random parameters",
        compiled=False,
        before="",
    )
    resume_optimizer: bool = science(
        "take over the state of its optimizer too; where data, batch and `data_seed` are its own, the order "
        "of the rows goes on where it stopped",
        compiled=False,
        before=False,
    )
    resize_embedding: bool = science(
        "take a parent with another vocabulary: rows of the embedding and head keep their ids, rows beyond "
        "its vocabulary are drawn at random",
        compiled=False,
        before=False,
    )

    def __post_init__(self) -> None:
        for name in ("resume_optimizer", "resize_embedding"):
            if getattr(self, name) and not self.init_from:
                raise UserError(f"train.{name}: True needs a run to start from; set train.init_from")
        if self.resume_optimizer and self.resize_embedding:
            raise UserError(
                "train.resume_optimizer: True does not go with train.resize_embedding, as the optimizer "
                "state has the parent's vocabulary; use one of them"
            )
