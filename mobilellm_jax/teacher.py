"""The teacher of a run: config fields of `train`, a part of `config.py`."""

import dataclasses

from mobilellm_jax.roles import science


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """A run whose predictions are learned along with the tokens. See `runs/teacher.py`.

    Not `compiled`: programs are keyed by the teacher's model, see `programs.compile_key`.
    """

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

    @property
    def has_teacher(self) -> bool:
        return bool(self.teacher) and self.teacher_weight > 0
