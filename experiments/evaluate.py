"""Score a trained or imported model on zero-shot tasks, by EleutherAI's lm-evaluation-harness.

  python -m experiments.evaluate --workdir=runs/first --tasks=mobilellm --data_dir=eval
  python -m experiments.evaluate --workdir=runs/first --tasks=arc_easy,piqa,triviaqa,race --data_dir=eval
  python -m experiments.evaluate --workdir=runs/first --tasks=blimp,lambada_openai

`mobilellm` stands for the paper's eight tasks. Without --data_dir, questions come from the hub, and every
task of lm-eval can be asked. A local file is <task>*.jsonl, such as arc_easy_test.jsonl (also .gz, .xz, .zst;
the formats: mobilellm_jax/zero_shot.py). Results are added to zero_shot.json in the run's directory. Tasks
need the extra: pip install -e '.[eval]'.
"""

import datetime
import importlib.metadata
import json
import statistics
from pathlib import Path
from typing import Any

import jax
from absl import flags

from experiments import cli, paper
from mobilellm_jax import partition, results
from mobilellm_jax.config import Config, MeshConfig
from mobilellm_jax.errors import UserError
from mobilellm_jax.run import enable_compilation_cache, open_run, open_tokenizer
from mobilellm_jax.zero_shot import PAPER_COLUMNS

_WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run")
_TASKS = flags.DEFINE_list("tasks", [], "tasks or groups of lm-eval, or mobilellm, separated by commas")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "folder with local files; else the hub is asked")
_LIMIT = flags.DEFINE_integer("limit", None, "ask only so many questions of each task", 1)
_BOS = flags.DEFINE_bool(
    "bos", True, "begin texts with BOS, as in training; some models of others were trained without"
)

RESULTS = "zero_shot.json"


def main() -> int:
    """Evaluates, and returns the exit status."""
    if not _WORKDIR.value:
        raise UserError("--workdir: say which run, such as --workdir=runs/first")
    if not _TASKS.value:
        raise UserError("--tasks: say which, such as --tasks=mobilellm or --tasks=arc_easy,piqa")
    from mobilellm_jax import harness  # here: the extra is needed for tasks only

    workdir = Path(_WORKDIR.value)
    config, params = open_run(workdir)
    tokenizer = open_tokenizer(workdir)
    if tokenizer is None:
        raise UserError(f"{workdir}: this run has no tokenizer, so it cannot read the text of a task")
    path = workdir / RESULTS
    document = _read(path)
    data_dir = None if _DATA_DIR.value is None else Path(_DATA_DIR.value)
    tasks, left_out = harness.load_tasks(_TASKS.value, data_dir)
    enable_compilation_cache()
    mesh = partition.make_mesh(MeshConfig(data=-1, fsdp=1, tensor=1))  # a copy of the model on every device
    lm = harness.Adapter(params, config, tokenizer, mesh, _BOS.value)
    name, published = paper.published(config.model) or ("", {})
    say = jax.process_index() == 0
    if say and name:
        print(f"paper: {name}")
    if say:
        _print_row("task", {column: column for column in _COLUMNS})
    done = []
    for name, task in tasks.items():
        before = lm.shortened
        done.append(harness.run_task(lm, name, task, _LIMIT.value))
        document[name] = _entry(done[-1], config, lm.shortened - before)
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
    return 0


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


def _entry(result: Any, config: Config, shortened: int) -> dict[str, Any]:
    """Returns what zero_shot.json says of a task."""
    return {
        "items": result.items,
        "metrics": {name: {"value": v, "standard_error": e} for name, (v, e) in result.metrics.items()},
        "chance": result.chance,
        "majority": result.majority,
        "data": result.data,
        "limit": _LIMIT.value,
        "bos": _BOS.value,
        "context": config.data.sequence_length,
        "requests_shortened": shortened,
        "compute_dtype": config.model.compute_dtype,
        "lm_eval": importlib.metadata.version("lm_eval"),
        "command": cli.command(),
        "git_commit": results.git_commit(),
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


if __name__ == "__main__":
    cli.run(main)
