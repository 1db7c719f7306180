"""The part `train` of `config.py`: what a run starts and learns from, how long, and what it writes when."""

import dataclasses
import re
from typing import NamedTuple

from mobilellm_jax import validation as rules
from mobilellm_jax.errors import UserError
from mobilellm_jax.roles import cadence, identity, placement, science

EVAL_SPLITS = ("valid", "tuning")
_ALL = "attention|ffn"


class Adapters(NamedTuple):
    """Low-rank updates of matrices: their rank, their scale times the rank, and the paths of the matrices."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


def _is_scheme(name: str) -> bool:
    """True for "" and for names of the form that `quantization.schemes.parse` reads."""
    return not name or re.fullmatch(r"w\d+(a\d+)?(:\d+)?", name) is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Origin, teacher, length, batch, seeds and cadence of a run.

    See `training/loop.py`; of the parent `runs/lineage.py`, of the teacher `runs/teacher.py`, which is not
    `compiled` as programs are keyed by its model, and of adapters `model/adapters.py`.
    """

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
    grow: str = science(
        "'' takes a parent of the same plan; 'unroll' makes a block of each layer that it applies; or the "
        "block of the parent that each block starts from, such as '0 1 0 1', see `model/growth.py`",
        compiled=False,
        before="",
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
    teacher: str = science(
        "directory of a run, trained or imported, whose newest intact checkpoint predicts every token as "
        "well; its tokenizer and vocabulary have to be those of this run, its shape need not; '' learns from "
        "the tokens alone",
        compiled=False,
        before="",
    )
    teacher_weight: float = science(
        "share of the teacher's predictions in the loss, from 0 to 1, the rest being that of the tokens; at "
        "0 the teacher is not used; without effect where there is none",
        compiled=False,
        before=0.5,
    )
    teacher_temperature: float = science(
        "divides the logits of teacher and student in the teacher's part of the loss, which is multiplied "
        "by its square, see `ops/cross_entropy.py`; at 1 the targets of one cross-entropy are a mixture of "
        "token and teacher",
        compiled=False,
        before=1.0,
    )
    quantize: str = science(
        "scheme of `experiments.quantize`, such as w4:32, that every forward pass rounds weights and "
        "activations to, with gradients straight through (quantization-aware training); losses are those of "
        "the quantized model, checkpoints hold full precision; '' rounds nothing",
        before="",
    )
    steps: int = science("optimizer steps", compiled=False, decisive=True)
    batch_size: int = science(
        "B, sequences in one optimizer step, over all devices and accumulation steps",
        decisive=True,
        shown=True,
    )
    accumulation_steps: int = science("parts that a batch is cut into, one after the other, to save memory")
    loops: str = science(
        "'', or a range such as '1..4' that the number of loops of each step is drawn from, with "
        "`data_seed`; evaluations and multipliers have `model.num_repeats`",
        before="",
    )
    init_seed: int = identity("seed of the initial parameters")
    data_seed: int = identity("seed of the order of the training rows")
    eval_every: int = cadence(
        "steps between evaluations on the held-out split; there is always one after the last step"
    )
    eval_rows: int = science(
        "held-out rows used, in a fixed order; 0 uses all of them", compiled=False, decisive=True
    )
    eval_split: str = science(
        "'valid', the held-out text that designs are compared on, or 'tuning', documents apart from it on "
        "which learning rates are chosen",
        compiled=False,
        decisive=True,
    )
    eval_batch_size: int = placement("rows in one evaluation batch, in which losses are summed", pinned=True)
    checkpoint_every: int = cadence("steps between checkpoints; there is always one after the last step")
    log_every: int = cadence("steps between progress lines")
    writers: str = cadence("copies of metrics.jsonl: some of tensorboard,wandb,trackio", before="tensorboard")

    def __post_init__(self) -> None:
        positive = "steps batch_size accumulation_steps eval_every eval_batch_size checkpoint_every log_every"
        rules.check_all(
            self,
            {
                **dict.fromkeys(positive.split(), rules.POSITIVE_INT),
                **dict.fromkeys(
                    ["init_seed", "data_seed"], (lambda v: 0 <= v < 2**32, "an integer from 0 to 2**32 - 1")
                ),
                "lora_rank": rules.COUNT,
                "lora_targets": rules.PATTERN,
                "lora_alpha": rules.POSITIVE,
                "quantize": (_is_scheme, "'' or a scheme such as w8a8 or w4:32"),
                "teacher_weight": rules.FRACTION,
                "teacher_temperature": rules.POSITIVE,
                "eval_rows": rules.COUNT,
                "eval_split": rules.one_of(EVAL_SPLITS),
                "writers": rules.some_of(("tensorboard", "wandb", "trackio")),
            },
            "train.",
        )
        if self.batch_size % self.accumulation_steps:
            raise UserError(
                f"train.accumulation_steps: {self.accumulation_steps} does not divide "
                f"train.batch_size={self.batch_size}; use a divisor of it"
            )
        for name in ("resume_optimizer", "grow", "resize_embedding", "lora_rank"):
            if (value := getattr(self, name)) and not self.init_from:
                raise UserError(f"train.{name}: {value} needs a run to start from; set train.init_from")
        for name in ("lora_rank", "loops"):
            if self.quantize and (value := getattr(self, name)):
                raise UserError(
                    f"train.quantize: {self.quantize!r} does not go with train.{name}={value!r}; "
                    "use one of them"
                )
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

        for name in ("resume_optimizer", "resize_embedding"):
            if self.grow and getattr(self, name):
                raise UserError(
                    f"train.grow: {self.grow!r} does not go with train.{name}=True; grow first, and start "
                    "another run from that"
                )

    @property
    def has_teacher(self) -> bool:
        return bool(self.teacher) and self.teacher_weight > 0
