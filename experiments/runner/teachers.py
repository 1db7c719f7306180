"""The teachers of points: what they add to the work, and the command that makes one that is not there."""

import os
from collections.abc import Sequence

from experiments.runner.points import Point
from mobilellm_jax.config import Config, ModelConfig, from_config_dict
from mobilellm_jax.errors import UserError
from mobilellm_jax.runs.directory import read_config
from mobilellm_jax.storage.files import path_of


def teacher_of(config: Config) -> ModelConfig | None:
    """The model of a config's teacher; None where it has none, or where it is not there yet."""
    path = path_of(os.path.expanduser(config.train.teacher)) / "config.json"
    if not config.train.has_teacher or not path.is_file():
        return None
    return from_config_dict(read_config(path)).model


def missing(points: Sequence[Point]) -> list[str]:
    """A line about each teacher that is not there, with the command that makes it, if the study has one."""
    absent = [p for p in points if p.config.train.has_teacher and p.teacher is None]
    said = {}
    for point in absent:
        command = f"; make it first: {point.makes_teacher}" if point.makes_teacher else "; check the path"
        said[f"train.teacher: {point.config.train.teacher}: no run found{command}"] = None
    return list(said)


def check(points: Sequence[Point]) -> None:
    """Raises UserError if the teacher of a point is not there."""
    for line in missing(points):
        raise UserError(line)
