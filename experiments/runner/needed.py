"""Runs that points need: teachers to learn from, parents to start from; and the commands that make them."""

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
    """A line about each run that is not there, with the command that makes it, if the study has one."""
    said = {}
    for point in points:
        train = point.config.train
        for field, name in (
            ("init_from", train.init_from),
            ("teacher", train.teacher if train.has_teacher else ""),
        ):
            if name and not (path_of(os.path.expanduser(name)) / "config.json").is_file():
                command = point.makes.get(name)
                advice = f"make it first: {command}" if command else "check the path"
                said[f"train.{field}: {name}: no run found; {advice}"] = None
    return list(said)


def check(points: Sequence[Point]) -> None:
    """Raises UserError if a run that a point needs is not there."""
    for line in missing(points):
        raise UserError(line)
