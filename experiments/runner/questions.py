"""Which zero-shot tasks to ask, and which of a sweep's finished runs have not answered them yet."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.runner.points import Point
from experiments.runner.progress import finished_records
from mobilellm_jax.config import Config
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import AnyPath


@dataclasses.dataclass(frozen=True)
class Questions:
    """What to ask.

    Attributes:
      names: tasks and groups.
      data_dir: folder with local files; None takes the questions from the hub.
      limit: questions of each task at most.
      bos: whether texts begin with BOS; None: as they did when the model was trained.
    """

    names: tuple[str, ...]
    data_dir: Path | None = None
    limit: int | None = None
    bos: bool | None = None


def has_tokenizer(config: Config) -> bool:
    """Whether runs of a config have a tokenizer: not those on synthetic tasks or token ids."""
    return not (config.data.is_task or config.data.source.startswith("tokens:"))


def left_out_line(questions: Questions, left_out: Sequence[str]) -> str:
    return f"left out, as {questions.data_dir} has no file for them: {', '.join(left_out)}"


def load(questions: Questions, points: Sequence[Point]) -> dict[str, str]:
    """Where the questions of each task come from, by its name; checks that all points train on text.

    Raises:
      UserError: as `scoring.score_tasks`, or a point has no text.
    """
    for point in points:
        if not has_tokenizer(point.config):
            raise UserError(
                f"--tasks: {point.name} trains on {point.config.data.source!r}, which has no tokenizer; "
                "choose points that train on text with --only"
            )
    from mobilellm_jax.inference import harness  # here: it needs the extra `eval`

    tasks, left_out = harness.load_tasks(questions.names, questions.data_dir)
    if left_out:
        print(left_out_line(questions, left_out))
    return {name: str(task.DATASET_PATH) for name, task in tasks.items()}


def lacking(point: Point, workdir: AnyPath, questions: Questions, known: Mapping[str, str]) -> int:
    """Number of finished runs of a point whose record lacks one of the tasks `known`, from `load`."""
    return sum(map(bool, lacking_tasks(point, workdir, questions, known).values()))


def lacking_tasks(
    point: Point, workdir: AnyPath, questions: Questions, known: Mapping[str, str]
) -> dict[str, list[str]]:
    """The tasks of `known` that the record of each finished run of a point lacks, by the run's name."""
    found = {}
    for name, record in finished_records(point, workdir).items():
        entries = record.zero_shot or {}
        found[name] = [
            task
            for task, where in known.items()
            if task not in entries
            or (entries[task]["data"], entries[task]["limit"]) != (where, questions.limit)
        ]
    return found
