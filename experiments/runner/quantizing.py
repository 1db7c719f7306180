"""Quantizes trained runs and says what that costs, for `experiments.quantize` and `experiments.sweep`."""

import dataclasses
import datetime
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from experiments.runner import scores
from experiments.runner.kept import Kept, made_with
from experiments.runner.points import Point
from experiments.runner.progress import finished_records
from experiments.runner.questions import Questions
from experiments.runner.rows import Batches, held_out_rows
from experiments.runner.schemes import Quantizing
from experiments.runner.view import Event, Tell
from mobilellm_jax.config import Config
from mobilellm_jax.errors import UserError
from mobilellm_jax.inference.quantized import Answers, answers
from mobilellm_jax.model.stack import Params
from mobilellm_jax.parallel import processes
from mobilellm_jax.quantization.apply import quantize, short_rows, weight_bytes
from mobilellm_jax.quantization.schemes import Scheme
from mobilellm_jax.runs.directory import begins_with_bos, open_tokenizer
from mobilellm_jax.runs.opening import open_run
from mobilellm_jax.runs.run import check
from mobilellm_jax.storage.files import AnyPath

_KEPT = Kept("quantized", what="results of quantization", again="quantize")
results_path, read = _KEPT.path, _KEPT.read
Entry = dict[str, Any]


# --- one run --------------------------------------------------------------------------------------------


def quantize_run(
    asked: Quantizing,
    path: AnyPath,
    workdir: AnyPath,
    config: Config,
    params: Params,
    batches: Batches,
    text: str | None = None,
) -> Iterator[tuple[Scheme, Entry]]:
    """Yields the result of each scheme, as soon as it is kept in `path`.

    Raises:
      UserError: a scheme does not fit the model, or its weights cannot be quantized.
    """
    mesh = check(config)
    asked.check(config)
    _KEPT.check(path)
    full = answers(params, config.model, mesh, batches())
    settings = {
        "text": text or f"{config.train.eval_split}:{config.train.eval_rows or 'all'}",
        "targets": len(full.best),
        "full_loss": full.loss,
        "full_bytes": weight_bytes(config.model, None),
        **made_with(workdir, config),
    }
    for scheme in asked.schemes:
        new, model_config = quantize(params, config.model, scheme, asked.short_groups)
        found = answers(new, model_config, mesh, batches())
        entry = {**_entry(scheme, config, full, found), **settings}
        if asked.questions:
            quantized = dataclasses.replace(config, model=model_config)
            entry["zero_shot"] = _zero_shot(asked.questions, workdir, quantized, new, mesh)
        if jax.process_index() == 0:
            _KEPT.add(path, scheme.name, entry)
        yield scheme, entry


def _entry(scheme: Scheme, config: Config, full: Answers, found: Answers) -> Entry:
    return {
        "loss": found.loss,
        "gap": found.loss - full.loss,
        "bytes": weight_bytes(config.model, scheme),
        "agreement": full.agreement(found),
        "short_groups": short_rows(config.model, scheme),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _zero_shot(
    questions: Questions, workdir: AnyPath, config: Config, params: Params, mesh: Mesh
) -> dict[str, Entry]:
    """Scores of a quantized model by task, as `scores.keep` writes those of the run itself."""
    from mobilellm_jax.inference import harness  # here: it needs the extra `eval`

    tokenizer = open_tokenizer(workdir)
    if tokenizer is None:
        raise UserError(f"{workdir}: this run has no tokenizer, which --tasks needs")
    bos = begins_with_bos(workdir, tokenizer) if questions.bos is None else questions.bos
    tasks, _ = harness.load_tasks(questions.names, questions.data_dir)
    lm = harness.Adapter(params, config, tokenizer, mesh, bos)
    results = [harness.run_task(lm, name, task, questions.limit) for name, task in tasks.items()]
    return {result.task: scores.entry(result) for result in results}


# --- the runs of a sweep --------------------------------------------------------------------------------


def lacking(point: Point, workdir: AnyPath, asked: Quantizing) -> int:
    """Number of finished comparison runs of a point whose record lacks one of the schemes."""
    return sum(map(bool, _lacking_schemes(point, workdir, asked).values()))


def _lacking_schemes(point: Point, workdir: AnyPath, asked: Quantizing) -> dict[str, list[str]]:
    """Names of the schemes that the record of each finished run of a point lacks, by the run's name."""
    names = [scheme.name for scheme in asked.schemes]
    return {
        run: [name for name in names if name not in (record.quantized or {})]
        for run, record in finished_records(point, workdir).items()
    }


def quantize_point(point: Point, workdir: AnyPath, tell: Tell, asked: Quantizing) -> None:
    """Quantizes every finished run of a point to the schemes that its record lacks."""
    todo = processes.of_first(lambda: _lacking_schemes(point, workdir, asked))
    for name, lacks in todo.items():
        if not lacks:
            continue
        directory = workdir / "runs" / name
        config, params = open_run(directory)
        config = dataclasses.replace(config, mesh=point.config.mesh)
        schemes = tuple(scheme for scheme in asked.schemes if scheme.name in lacks)
        these = dataclasses.replace(asked, schemes=schemes)
        path = results_path(directory)
        done = quantize_run(these, path, directory, config, params, held_out_rows(config))
        gaps = ", ".join(f"{scheme.name} {entry['gap']:+.4f}" for scheme, entry in done)
        tell(Event(name, f"gap: {gaps}"))
