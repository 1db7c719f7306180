"""Where the scores of zero-shot tasks are kept: in the record of a run, or beside an imported one."""

import datetime
import json
from typing import Any

from mobilellm_jax.analysis.records import add_zero_shot, read_record
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import AnyPath, write_atomically

RESULTS = "zero_shot.json"


def results_path(workdir: AnyPath) -> AnyPath:
    """The record of the run in `workdir`; where it has none, as an imported one, zero_shot.json in there."""
    if (workdir / "record.json").exists():
        return workdir / "record.json"
    run = workdir.absolute()
    for parent in run.parents:  # of a sweep, runs/<name> has the record results/<name>.json
        record = parent.parent / "results" / f"{run.relative_to(parent)}.json"
        if parent.name == "runs" and record.exists():
            return record
    return workdir / RESULTS


def read(path: AnyPath) -> dict[str, Any]:
    """The scores by task.

    Raises:
      UserError: the file is damaged.
    """
    if path.name != RESULTS:
        return read_record(path).zero_shot or {}
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); delete it to score again") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: not the scores of tasks; delete it to score again")
    return document


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
    kept = {**entry(result), **settings, "created": now}
    if path.name != RESULTS:
        return add_zero_shot(path, result.task, kept)
    text = json.dumps({**read(path), result.task: kept}, indent=1) + "\n"
    return write_atomically(path, text.encode())
