"""Zero-shot tasks for `experiments.evaluate` and `experiments.sweep`: a table, and results in the record."""

import dataclasses
import datetime
import importlib.metadata
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from experiments import cli
from experiments.reporting import paper_tables
from experiments.runner.points import Point
from experiments.runner.workers import say
from mobilellm_jax import data
from mobilellm_jax.analysis.records import add_zero_shot, read_record
from mobilellm_jax.config import Config
from mobilellm_jax.errors import UserError
from mobilellm_jax.inference.local_tasks import OTHER_COLUMNS, PAPER_COLUMNS
from mobilellm_jax.model.stack import Params
from mobilellm_jax.parallel import processes
from mobilellm_jax.runs import provenance
from mobilellm_jax.runs.directory import begins_with_bos, open_run, open_tokenizer
from mobilellm_jax.runs.run import check
from mobilellm_jax.storage.checkpoint import newest_intact
from mobilellm_jax.storage.files import AnyPath, write_atomically

RESULTS = "zero_shot.json"


@dataclasses.dataclass(frozen=True)
class Questions:
    """What to ask.

    Attributes:
      names: tasks and groups.
      data_dir: folder with local files; None asks the hub.
      limit: questions of each task at most.
      bos: whether texts begin with BOS; None: as they did when the model was trained.
    """

    names: tuple[str, ...]
    data_dir: Path | None = None
    limit: int | None = None
    bos: bool | None = None


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
    """Returns what a model scores on tasks (`harness.TaskResult`), and keeps it as soon as a task is done.

    Args:
      questions: what to ask.
      workdir: directory of the run.
      config, params, tokenizer: the run's.
      mesh: where to compute.
      show: print a table.

    Raises:
      UserError: lm-evaluation-harness is not there, an unknown task, or data that cannot be had or read.
    """
    from mobilellm_jax.inference import harness  # here: it needs the extra `eval`

    bos = begins_with_bos(workdir, tokenizer) if questions.bos is None else questions.bos
    path, first = results_path(workdir), jax.process_index() == 0
    processes.of_first(lambda: _read(path) and None)  # that it can be read, before the work
    tasks, left_out = harness.load_tasks(questions.names, questions.data_dir)
    lm = harness.Adapter(params, config, tokenizer, mesh, bos)
    settings = {
        "limit": questions.limit,
        "bos": bos,
        "context": lm.max_length,
        "step": newest_intact(workdir / "checkpoints")[0],
        "compute_dtype": config.model.compute_dtype,
        "lm_eval": importlib.metadata.version("lm_eval"),
        "command": cli.command(),
        "git_commit": provenance.git_commit(),
    }
    model_name, published = paper_tables.published(config.model) or ("", {})
    show = show and first
    if show:
        if model_name:
            print(f"paper: {model_name}")
        _print_row("task", {column: column for column in _COLUMNS})
    done = []
    for name, task in tasks.items():
        before = lm.shortened
        done.append(harness.run_task(lm, name, task, questions.limit))
        if first:
            _keep(path, name, _entry(done[-1], {"requests_shortened": lm.shortened - before, **settings}))
        if show:
            _print_result(done[-1], published)
    if show:
        _print_average(done, published)
        _print_notes(questions, left_out, lm, published.keys() & {OTHER_COLUMNS.get(name) for name in tasks})
        print(f"see {path}")
    return done


def results_path(workdir: AnyPath) -> AnyPath:
    """Returns the record of a run; where it has none, as an imported one, zero_shot.json in its directory."""
    if (workdir / "record.json").exists():
        return workdir / "record.json"
    run = workdir.absolute()
    for parent in run.parents:  # of a sweep, runs/<name> has the record results/<name>.json
        record = parent.parent / "results" / f"{run.relative_to(parent)}.json"
        if parent.name == "runs" and record.exists():
            return record
    return workdir / RESULTS


def _keep(path: AnyPath, name: str, entry: dict[str, Any]) -> None:
    if path.name != RESULTS:
        return add_zero_shot(path, name, entry)
    text = json.dumps({**_read(path), name: entry}, indent=1) + "\n"
    return write_atomically(path, text.encode())


# --- every run of a sweep -------------------------------------------------------------------------------


def load(questions: Questions, points: Sequence[Point]) -> dict[str, str]:
    """Returns the data of each task by the task's name, after checking that all points can be asked.

    Raises:
      UserError: as `score_tasks`, or a point has no text.
    """
    for point in points:
        source = point.config.data
        if source.is_task or source.source.startswith("tokens:"):
            raise UserError(
                f"--tasks: {point.name} is trained on {source.source!r}; it has no tokenizer to be asked with"
            )
    from mobilellm_jax.inference import harness  # here: it needs the extra `eval`

    tasks, left_out = harness.load_tasks(questions.names, questions.data_dir)
    if left_out:
        print(f"left out, as {questions.data_dir} has no file for them: {', '.join(left_out)}")
    return {name: str(task.DATASET_PATH) for name, task in tasks.items()}


def lacking(point: Point, workdir: AnyPath, questions: Questions, known: Mapping[str, str]) -> int:
    """Returns how many finished runs of a point lack one of the tasks `known`, as `load` returns them."""
    return sum(bool(names) for names in _lacking(point, workdir, questions, known).values())


def _lacking(
    point: Point, workdir: AnyPath, questions: Questions, known: Mapping[str, str]
) -> dict[str, list[str]]:
    found = {}
    for name in point.run_names():
        path = workdir / "results" / f"{name}.json"
        record = read_record(path) if path.exists() else None
        if record is not None and record.status == "finished":
            entries = record.zero_shot or {}
            found[name] = [
                task
                for task, where in known.items()
                if task not in entries
                or (entries[task]["data"], entries[task]["limit"]) != (where, questions.limit)
            ]
    return found


def score_point(point: Point, workdir: AnyPath, questions: Questions, known: Mapping[str, str]) -> None:
    """Asks every finished run of a point the tasks that its record lacks; the record gets the answers."""
    todo = processes.of_first(lambda: _lacking(point, workdir, questions, known))
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
        shares = [f"{r.task} {_cell(*r.metrics['acc'])}" for r in done if "acc" in r.metrics]
        say(name, f"acc: {', '.join(shares) or 'none'}; the rest is in the record")


# --- what is kept, and printed --------------------------------------------------------------------------


def _read(path: AnyPath) -> dict[str, Any]:
    if path.name != RESULTS:
        return read_record(path).zero_shot or {}
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); delete it to begin anew") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: not the results of tasks; delete it to begin anew")
    return document


def _entry(result: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns what zero_shot.json says of a task."""
    return {
        "items": result.items,
        "metrics": {name: {"value": v, "standard_error": e} for name, (v, e) in result.metrics.items()},
        "chance": result.chance,
        "majority": result.majority,
        "data": result.data,
        **settings,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


# Width of each column of the table; the task's name stands before them, other metrics after.
_COLUMNS = {"items": 6, "acc": 11, "acc_norm": 11, "chance": 7, "majority": 9, "paper": 7}


def _print_row(task: str, cells: dict[str, str], other: str = "") -> None:
    padded = [cells.get(name, "").rjust(width) for name, width in _COLUMNS.items()]
    print(" ".join([task.ljust(28), *padded, other]).rstrip(), flush=True)


def _print_result(result: Any, published: paper_tables.Cells) -> None:
    metrics = dict(result.metrics)
    shares = {name: _cell(*metrics.pop(name)) for name in ("acc", "acc_norm") if name in metrics}
    cells = {
        "items": f"{result.items:,}",
        **shares,
        "chance": _cell(result.chance),
        "majority": _cell(result.majority),
        "paper": published.get({**PAPER_COLUMNS, **OTHER_COLUMNS}.get(result.task, ""), ""),
    }
    other = ", ".join(f"{name} {_other(name, *value)}" for name, value in metrics.items())
    _print_row(result.task, cells, other)


def _print_average(done: list[Any], published: paper_tables.Cells) -> None:
    """Prints averages over those of the paper's tasks that were asked, if there are several."""
    of_paper = [result for result in done if result.task in PAPER_COLUMNS]
    if len(of_paper) < 2:
        return
    means = {name: statistics.fmean(r.metrics[name][0] for r in of_paper) for name in ("acc", "acc_norm")}
    means |= {name: statistics.fmean(getattr(r, name) for r in of_paper) for name in ("chance", "majority")}
    complete = len(of_paper) == len(PAPER_COLUMNS)
    cells = {name: _cell(mean) for name, mean in means.items()}
    cells["paper"] = published.get("Avg", "") if complete else ""
    _print_row(f"average, {len(of_paper)} of the paper's 8", cells)


def _print_notes(questions: Questions, left_out: Sequence[str], lm: Any, second_hand: set[Any]) -> None:
    if second_hand:
        print(
            "paper, race and triviaqa: as others quote its table 4; its TriviaQA is F1 with one example in "
            "the prompt, not exact_match with none"
        )
    if left_out:
        print(f"left out, as {questions.data_dir} has no file for them: {', '.join(left_out)}")
    if lm.shortened:
        print(f"{lm.shortened:,} requests lost their beginning: they are longer than {lm.max_length} tokens")


def _cell(share: float | None, error: float | None = None) -> str:
    """Returns a share in percent, with its standard error."""
    if share is None:
        return ""
    return f"{100 * share:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _other(name: str, value: float, error: float | None) -> str:
    if name == "exact_match":
        return _cell(value, error)
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")
