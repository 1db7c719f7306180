"""The teacher of a run: another run, checked before anything is compiled.

What is kept of it, in `teacher.json` and in the record, are its name, step and hash, so that a run is resumed
with the teacher that it began with.
"""

import dataclasses
import json
import os
from typing import Any

from jax.sharding import Mesh

from mobilellm_jax.config import Config, ModelConfig
from mobilellm_jax.costs import accounting
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.adapters import adapted
from mobilellm_jax.parallel import partition, processes
from mobilellm_jax.runs.lineage import (
    check_apart,
    check_tokenizer,
    name_of,
    newest_step,
    read_run_config,
)
from mobilellm_jax.storage.checkpoint import find_damage, fingerprint, has_checkpoint
from mobilellm_jax.storage.files import AnyPath, path_of, write_atomically
from mobilellm_jax.storage.sealed import parse, seal, unseal
from mobilellm_jax.training import teacher as training
from mobilellm_jax.training.step import Distillation

TEACHER = "teacher.json"  # in the directory of a run that has a teacher


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A run that another learns from.

    Attributes:
      directory: of the run.
      stored: its model, with its adapters.
      distillation: its part in the loss.
      lineage: {"run" (name of the directory), "step", "manifest_sha256" (of its checkpoint)}.
    """

    directory: AnyPath
    stored: ModelConfig
    distillation: Distillation
    lineage: dict[str, Any]

    @property
    def for_training(self) -> training.Teacher:
        checkpoint = _checkpoint(self.directory, self.lineage["step"])
        return training.Teacher(checkpoint, self.stored, self.distillation)

    def as_field(self, config: Config) -> dict[str, Any]:
        """`Record.teacher`."""
        flops = accounting.forward_flops_per_token(self.distillation.model, config.data.sequence_length)
        return {**self.lineage, "flops_per_token": flops}

    def __str__(self) -> str:
        step, sha256 = self.lineage["step"], self.lineage["manifest_sha256"]
        d = self.distillation
        return (
            f"{self.directory}, step {step:,} (sha256 {sha256[:12]}), weight {d.weight:g}, temperature "
            f"{d.temperature:g}"
        )


def distillation_of(config: Config) -> Distillation | None:
    """The part of the teacher in the loss, by the configs of both runs; None without a teacher.

    The teacher computes in the dtype of this run. Collective.

    Raises:
      UserError: the teacher is missing, or has another vocabulary.
    """
    return _distillation(config, _config_of_teacher(config)) if config.train.has_teacher else None


def _config_of_teacher(config: Config) -> Config:
    name = config.train.teacher
    return read_run_config(path_of(os.path.expanduser(name)), f"train.teacher: {name}")


def _distillation(config: Config, of_teacher: Config) -> Distillation:
    t, m, there = config.train, config.model, of_teacher.model
    if there.vocab_size != m.vocab_size:
        raise UserError(
            f"train.teacher: {t.teacher} has another vocabulary: model.vocab_size is {there.vocab_size} "
            f"there and {m.vocab_size} here; use a teacher with the same one"
        )
    there = dataclasses.replace(there, compute_dtype=m.compute_dtype)
    return Distillation(there, t.teacher_weight, t.teacher_temperature)


def open_teacher(config: Config, workdir: AnyPath, mesh: Mesh) -> Teacher | None:
    """Opens the run that `train.teacher` names, if it has a part in the loss.

    Its newest intact checkpoint is used, or the one that the run in `workdir` began with. Collective: all
    processes of a run must call it.

    Raises:
      UserError: the teacher is missing, corrupt, `workdir` itself, of another vocabulary, not divided by the
        mesh, or not the one that the run in `workdir` began with.
    """
    if not config.train.has_teacher:
        return None
    check_apart(config, workdir)
    there = _config_of_teacher(config)
    stored, distillation = adapted(there), _distillation(config, there)
    partition.check_divisible(config, mesh, distillation.model)
    name = config.train.teacher
    directory = path_of(os.path.expanduser(name))
    if processes.of_first(lambda: has_checkpoint(workdir / "checkpoints")):
        lineage = processes.of_first(lambda: _kept(workdir, directory, name))
        return Teacher(directory, stored, distillation, lineage)
    step = newest_step(directory, f"train.teacher: {name}")
    sha256 = processes.of_first(lambda: fingerprint(_checkpoint(directory, step)))
    lineage = {"run": name_of(directory), "step": step, "manifest_sha256": sha256}
    return Teacher(directory, stored, distillation, lineage)


def claim_teacher(workdir: AnyPath, teacher: Teacher, card: dict[str, Any], config: Config) -> None:
    """Checks the tokenizer of a teacher against a data card, and writes `teacher.json`; collective.

    Raises:
      UserError: another tokenizer, or one that cannot be compared.
    """

    def claim() -> None:
        check_tokenizer(teacher.directory, f"train.teacher: {config.train.teacher}", card, config)
        text = json.dumps(seal(teacher.lineage), indent=1) + "\n"
        write_atomically(workdir / TEACHER, text.encode())

    processes.of_first(claim)


def _checkpoint(directory: AnyPath, step: int) -> AnyPath:
    return directory / "checkpoints" / str(step)


def _kept(workdir: AnyPath, directory: AnyPath, name: str) -> dict[str, Any]:
    """The lineage of the teacher that a run with checkpoints began with, which has to be there still."""
    path = workdir / TEACHER
    try:
        lineage = unseal(parse(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{path}: missing, although the run has checkpoints; restore the file") from None
    except ValueError as error:
        raise UserError(f"{path}: not the lineage of a teacher ({error}); restore the file") from None
    step, sha256 = lineage["step"], lineage["manifest_sha256"]
    checkpoint = _checkpoint(directory, step)
    problem, now = find_damage(checkpoint), fingerprint(checkpoint)
    if problem is None and now != sha256:
        problem = f"it is another one (sha256 {sha256[:12]} there, {str(now)[:12]} here)"
    if problem:
        raise UserError(
            f"train.teacher: {name}: the run in {workdir} began with its step {step:,}, but {problem}; "
            "restore it, or use a new --workdir"
        )
    return lineage
