"""Where a run starts from, and what of it is trained: config fields of `train`, a part of `config.py`."""

import dataclasses
import re
from typing import NamedTuple

from mobilellm_jax import validation as rules
from mobilellm_jax.errors import UserError
from mobilellm_jax.roles import science

_ALL = "attention|ffn"


class Adapters(NamedTuple):
    """Low-rank updates of matrices: their rank, their scale times the rank, and the paths of the matrices."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


def _is_pattern(text: str) -> bool:
    try:
        return bool(re.compile(text).pattern)
    except re.error:
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class OriginConfig:
    """The parent of a run, and adapters. See `runs/lineage.py` and `model/adapters.py`."""

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
    lora_rank: int = science(
        "R: matrices get trained updates of this rank (LoRA), and all else is frozen; 0 trains all "
        "parameters",
        before=0,
    )
    lora_targets: str = science(
        "regular expression; a matrix gets an update if it is found in the path, such as "
        "blocks/attention/query",
        before=_ALL,
    )
    lora_alpha: float = science("updates are multiplied by lora_alpha / lora_rank", before=16.0)

    def __post_init__(self) -> None:
        fields = {"lora_rank": rules.COUNT, "lora_targets": (_is_pattern, "a regular expression")}
        rules.check_all(self, {**fields, "lora_alpha": rules.POSITIVE}, "train.")
        for name in ("resume_optimizer", "resize_embedding", "lora_rank"):
            if (value := getattr(self, name)) and not self.init_from:
                raise UserError(f"train.{name}: {value} needs a run to start from; set train.init_from")
        if self.resume_optimizer and self.lora_rank:
            raise UserError(
                f"train.resume_optimizer: True does not go with train.lora_rank={self.lora_rank}, as the "
                "optimizer state is that of all parameters; use one of them"
            )
        if self.resume_optimizer and self.resize_embedding:
            raise UserError(
                "train.resume_optimizer: True does not go with train.resize_embedding, as the optimizer "
                "state has the parent's vocabulary; use one of them"
            )
