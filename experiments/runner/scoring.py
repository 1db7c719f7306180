"""Asks a trained model zero-shot tasks, for `experiments.evaluate` and `experiments.sweep`."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from experiments.runner import scores
from experiments.runner.kept import made_with
from experiments.runner.points import Point
from experiments.runner.questions import Questions, lacking_tasks, left_out_line
from experiments.runner.score_table import ScoreTable, percent
from experiments.runner.view import Event, Tell
from mobilellm_jax import data
from mobilellm_jax.config import Config
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.stack import Params
from mobilellm_jax.parallel import processes
from mobilellm_jax.runs.directory import begins_with_bos, open_tokenizer
from mobilellm_jax.runs.opening import open_run
from mobilellm_jax.runs.run import check
from mobilellm_jax.storage.files import AnyPath


def score_tasks(
    questions: Questions,
    workdir: AnyPath,
    config: Config,
    params: Params,
    tokenizer: data.Tokenizer,
    mesh: Mesh,
    *,
    show: bool = True,
) -> list[Any]:
    """The scores of a model on tasks (`harness.TaskResult`); each is kept as soon as its task is done.

    Args:
      questions: what to ask.
      workdir: directory of the run.
      config, params, tokenizer: the run's.
      mesh: where to compute.
      show: print a table.

    Raises:
      UserError: lm-evaluation-harness is not installed, a task is unknown, or its data cannot be read.
    """
    from mobilellm_jax.inference import harness  # here: it needs the extra `eval`

    bos = begins_with_bos(workdir, tokenizer) if questions.bos is None else questions.bos
    path, first = scores.results_path(workdir), jax.process_index() == 0
    scores.check(path)
    tasks, left_out = harness.load_tasks(questions.names, questions.data_dir)
    lm = harness.Adapter(params, config, tokenizer, mesh, bos)
    settings = {
        "limit": questions.limit,
        "bos": bos,
        "context": lm.max_length,
        **made_with(workdir, config),
        "lm_eval": importlib.metadata.version("lm_eval"),
    }
    table = ScoreTable(config.model) if show and first else None
    done = []
    for name, task in tasks.items():
        before = lm.shortened
        done.append(harness.run_task(lm, name, task, questions.limit))
        if first:
            scores.keep(path, done[-1], {"requests_shortened": lm.shortened - before, **settings})
        if table:
            table.add(done[-1])
    if table:
        table.end()
        if left_out:
            print(left_out_line(questions, left_out))
        if lm.shortened:
            print(f"{lm.shortened:,} prompts were truncated to their last {lm.max_length} tokens")
        print(f"see {path}")
    return done


def score_point(
    point: Point, workdir: AnyPath, tell: Tell, questions: Questions, known: Mapping[str, str]
) -> None:
    """Asks every finished run of a point the tasks that its record lacks; the record gets the answers."""
    todo = processes.of_first(lambda: lacking_tasks(point, workdir, questions, known))
    for name, tasks in todo.items():
        if not tasks:
            continue
        directory = workdir / "runs" / name
        config, params = open_run(directory)
        tokenizer = open_tokenizer(directory)
        if tokenizer is None:
            raise UserError(f"{directory}: this run has no tokenizer, which --tasks needs")
        asked = dataclasses.replace(questions, names=tuple(tasks))
        config = dataclasses.replace(config, mesh=point.config.mesh)
        done = score_tasks(asked, directory, config, params, tokenizer, check(config), show=False)
        shares = [f"{r.task} {percent(*r.metrics['acc'])}" for r in done if "acc" in r.metrics]
        tell(Event(name, f"acc: {', '.join(shares) or 'none'}; the rest is in the record"))
