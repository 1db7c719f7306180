"""Zero-shot tasks for `experiments.evaluate`: a table, and zero_shot.json in the directory of the run."""

import datetime
import importlib.metadata
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from experiments import cli, paper
from mobilellm_jax import data, results
from mobilellm_jax.config import Config
from mobilellm_jax.errors import UserError
from mobilellm_jax.model import Params
from mobilellm_jax.run import begins_with_bos
from mobilellm_jax.zero_shot import PAPER_COLUMNS

RESULTS = "zero_shot.json"


def score_tasks(
    names: Sequence[str],
    workdir: Path,
    config: Config,
    params: Params,
    tokenizer: data.Tokenizer,
    mesh: Mesh,
    *,
    data_dir: Path | None,
    limit: int | None,
    bos: bool | None,
) -> None:
    """Prints what a model scores on tasks, and adds it to zero_shot.json as soon as a task is done.

    Args:
      names: tasks and groups.
      workdir: directory of the run.
      config, params, tokenizer: the run's.
      mesh: where to compute.
      data_dir: folder with local files; None asks the hub.
      limit: questions of each task at most.
      bos: whether texts begin with BOS; None: as they did when the model was trained.

    Raises:
      UserError: lm-evaluation-harness is not there, an unknown task, or data that cannot be had or read.
    """
    from mobilellm_jax import harness  # here: it needs the extra `eval`

    if bos is None:
        bos = begins_with_bos(workdir, tokenizer)
    path = workdir / RESULTS
    document = _read(path)
    tasks, left_out = harness.load_tasks(names, data_dir)
    lm = harness.Adapter(params, config, tokenizer, mesh, bos)
    settings = {
        "limit": limit,
        "bos": bos,
        "context": lm.max_length,
        "compute_dtype": config.model.compute_dtype,
        "lm_eval": importlib.metadata.version("lm_eval"),
        "command": cli.command(),
        "git_commit": results.git_commit(),
    }
    model_name, published = paper.published(config.model) or ("", {})
    say = jax.process_index() == 0
    if say:
        if model_name:
            print(f"paper: {model_name}")
        _print_row("task", {column: column for column in _COLUMNS})
    done = []
    for name, task in tasks.items():
        before = lm.shortened
        done.append(harness.run_task(lm, name, task, limit))
        document[name] = _entry(done[-1], {"requests_shortened": lm.shortened - before, **settings})
        if say:
            _print_result(done[-1], published)
            results.write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
    if say:
        _print_average(done, published)
        if left_out:
            print(f"left out, as {data_dir} has no file for them: {', '.join(left_out)}")
        if lm.shortened:
            print(
                f"{lm.shortened:,} requests lost their beginning: they are longer than {lm.max_length} tokens"
            )
        print(f"see {path}")


def _read(path: Path) -> dict[str, Any]:
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


def _print_result(result: Any, published: paper.Cells) -> None:
    metrics = dict(result.metrics)
    shares = {name: _cell(*metrics.pop(name)) for name in ("acc", "acc_norm") if name in metrics}
    cells = {
        "items": f"{result.items:,}",
        **shares,
        "chance": _cell(result.chance),
        "majority": _cell(result.majority),
        "paper": published.get(PAPER_COLUMNS.get(result.task, ""), ""),
    }
    other = ", ".join(f"{name} {_other(name, *value)}" for name, value in metrics.items())
    _print_row(result.task, cells, other)


def _print_average(done: list[Any], published: paper.Cells) -> None:
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


def _cell(share: float | None, error: float | None = None) -> str:
    """Returns a share in percent, with its standard error."""
    if share is None:
        return ""
    return f"{100 * share:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _other(name: str, value: float, error: float | None) -> str:
    if name == "exact_match":
        return _cell(value, error)
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")
