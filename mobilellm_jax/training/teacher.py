"""The teacher of a run: parameters on the devices, which training reads and does not change."""

import dataclasses

import jax
from jax.sharding import Mesh

from mobilellm_jax import model
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.parallel import partition
from mobilellm_jax.storage.files import AnyPath
from mobilellm_jax.training.programs import Programs, with_shardings
from mobilellm_jax.training.start import read_merged
from mobilellm_jax.training.step import Distillation


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A run whose predictions are learned.

    Attributes:
      checkpoint: of that run.
      stored: its model, with its adapters.
      distillation: its part in the loss, with a model whose adapters are merged.
    """

    checkpoint: AnyPath
    stored: ModelConfig
    distillation: Distillation


def place_teacher(programs: Programs, teacher: Teacher | None, mesh: Mesh) -> tuple[model.Params, ...]:
    """Reads the parameters of a teacher straight into their shardings; () without one."""
    if teacher is None:
        return ()
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), teacher.stored))
    like = with_shardings(shapes, partition.shardings(shapes, mesh))
    params, (wanted,) = read_merged(teacher.checkpoint, like, teacher.stored), programs.teacher
    return (jax.tree.map(lambda w, leaf: w.astype(leaf.dtype), params, wanted),)
