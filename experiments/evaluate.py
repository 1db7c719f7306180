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
    published = paper.published(config.model)
    table = _Table(published)
    for name, task in tasks.items():
        before = lm.shortened
        result = harness.run_task(lm, name, task, _LIMIT.value)
        table.add(result)
        document[name] = _entry(result, config, lm.shortened - before)
        if jax.process_index() == 0:
            results.write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
    if jax.process_index() == 0:
        table.print()
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


class _Table:
    """Accuracies in percent, with standard errors, beside what a guess and the paper's model get."""

    def __init__(self, published: tuple[str, paper.Cells] | None) -> None:
        self._results: list[Any] = []
        self._paper = published

    def add(self, result: Any) -> None:
        self._results.append(result)

    def print(self) -> None:
        head = ["task", "items", "acc", "acc_norm", "other", "chance", "majority"]
        rows = [head + ([self._paper[0]] if self._paper else [])]
        rows += [self._row(result) for result in self._results]
        eight = [result for result in self._results if result.task in PAPER_COLUMNS]
        if len(eight) > 1:
            rows.append(self._average(eight))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for first, *cells in rows:
            padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            print("  ".join([first.ljust(widths[0]), *padded]).rstrip())

    def _row(self, result: Any) -> list[str]:
        metrics = dict(result.metrics)
        shares = [_cell(*metrics.pop(name, (None, None))) for name in ("acc", "acc_norm")]
        other = ", ".join(f"{name} {_other(name, *value)}" for name, value in metrics.items())
        row = [result.task, f"{result.items:,}", *shares, other, _cell(result.chance), _cell(result.majority)]
        return row + ([self._paper[1].get(PAPER_COLUMNS.get(result.task, ""), "")] if self._paper else [])

    def _average(self, eight: list[Any]) -> list[str]:
        means = [
            _cell(sum(result.metrics[name][0] for result in eight) / len(eight))
            for name in ("acc", "acc_norm")
        ]
        baselines = [
            _cell(sum(getattr(r, name) for r in eight) / len(eight)) for name in ("chance", "majority")
        ]
        row = [f"average of {len(eight)} of the paper's 8", "", *means, "", *baselines]
        complete = len(eight) == len(PAPER_COLUMNS)
        return row + ([self._paper[1]["Avg"] if complete else ""] if self._paper else [])


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
