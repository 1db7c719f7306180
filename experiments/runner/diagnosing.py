"""Diagnoses trained runs, for `experiments.diagnose` and `experiments.sweep`."""

import dataclasses
import datetime
from typing import Any

import jax

from experiments.runner.kept import Kept, made_with
from experiments.runner.points import Point
from experiments.runner.progress import finished_records
from experiments.runner.rows import Batches, held_out_rows
from experiments.runner.view import Event, Tell
from mobilellm_jax import data
from mobilellm_jax.analysis.records import LAYERS
from mobilellm_jax.config import Config
from mobilellm_jax.model.stack import Params
from mobilellm_jax.parallel import processes
from mobilellm_jax.runs.opening import open_run
from mobilellm_jax.runs.run import check
from mobilellm_jax.storage.files import AnyPath

_KEPT = Kept("diagnostics", what="the diagnostics of a run", again="diagnose")
results_path = _KEPT.path
Entry = dict[str, Any]


def diagnose_run(
    path: AnyPath,
    workdir: AnyPath,
    config: Config,
    params: Params,
    batches: Batches,
    text: str | None = None,
) -> Entry:
    """Diagnoses a run on the rows of `batches`, keeps the result in `path` and returns it.

    The interval of the effective depth is over the documents of held-out rows, else over rows.
    """
    from mobilellm_jax.diagnostics.diagnosis import diagnose  # here: it loads scipy

    _KEPT.check(path)
    t, documents = config.train, None
    if not text:
        prepared = data.prepare(config.data, config.model.vocab_size)
        documents = prepared.eval_documents(t.eval_rows, t.eval_split)
    found = diagnose(params, config.model, check(config), batches, documents)
    entry = {
        **dataclasses.asdict(found),
        "units": "rows" if documents is None else "documents",
        "text": text or f"{t.eval_split}:{t.eval_rows or 'all'}",
        **made_with(workdir, config),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if jax.process_index() == 0:
        _KEPT.add(path, LAYERS, entry)
    return entry


def lacking(point: Point, workdir: AnyPath) -> int:
    """Number of finished comparison runs of a point that were not diagnosed."""
    return len(_lacking_runs(point, workdir))


def _lacking_runs(point: Point, workdir: AnyPath) -> list[str]:
    records = finished_records(point, workdir)
    return [name for name, record in records.items() if LAYERS not in (record.diagnostics or {})]


def diagnose_point(point: Point, workdir: AnyPath, tell: Tell) -> None:
    """Diagnoses every finished run of a point whose record has no diagnostics."""
    for name in processes.of_first(lambda: _lacking_runs(point, workdir)):
        directory = workdir / "runs" / name
        config, params = open_run(directory)
        config = dataclasses.replace(config, mesh=point.config.mesh)
        path = results_path(directory)
        entry = diagnose_run(path, directory, config, params, held_out_rows(config))
        depth = entry["effective_depth"]["value"]
        tell(Event(name, f"effective depth {depth:.2f} of {len(entry['plan'])} layers"))
