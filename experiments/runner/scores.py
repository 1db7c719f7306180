"""Scores of zero-shot tasks, as they are kept with a run."""

import datetime
from typing import Any

from experiments.runner.kept import Kept
from mobilellm_jax.storage.files import AnyPath

_KEPT = Kept("zero_shot", what="the scores of tasks", again="score")
results_path, read, check = _KEPT.path, _KEPT.read, _KEPT.check


def entry(result: Any) -> dict[str, Any]:
    """The score of a task (a `harness.TaskResult`), as it is kept."""
    return {
        "items": result.items,
        "metrics": {name: {"value": v, "standard_error": e} for name, (v, e) in result.metrics.items()},
        "chance": result.chance,
        "majority": result.majority,
        "data": result.data,
        **({"correct": result.correct} if result.correct is not None else {}),
    }


def keep(path: AnyPath, result: Any, settings: dict[str, Any]) -> None:
    """Adds the score of a task (a `harness.TaskResult`) and the settings that it was made with."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    _KEPT.add(path, result.task, {**entry(result), **settings, "created": now})
