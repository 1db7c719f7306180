"""The printed table of zero-shot scores, a line as soon as a task is done, beside the paper's numbers."""

import statistics
from collections.abc import Mapping
from typing import Any

from experiments.reporting import paper_tables
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.inference.local_tasks import OTHER_COLUMNS, PAPER_COLUMNS

# Width of each column; the task's name stands before them, other metrics after.
_COLUMNS = {"items": 6, "acc": 11, "acc_norm": 11, "chance": 7, "majority": 9, "paper": 7}


class ScoreTable:
    """The table of one model; `add` takes a `harness.TaskResult`."""

    def __init__(self, model: ModelConfig):
        """Prints the head."""
        name, self._published = paper_tables.published(model) or ("", {})
        self._done: list[Any] = []
        if name:
            print(f"paper: {name}")
        _print_row("task", {column: column for column in _COLUMNS})

    def add(self, result: Any) -> None:
        self._done.append(result)
        metrics = dict(result.metrics)
        shares = {name: percent(*metrics.pop(name)) for name in ("acc", "acc_norm") if name in metrics}
        cells = {
            "items": f"{result.items:,}",
            **shares,
            "chance": percent(result.chance),
            "majority": percent(result.majority),
            "paper": self._published.get({**PAPER_COLUMNS, **OTHER_COLUMNS}.get(result.task, ""), ""),
        }
        other = ", ".join(f"{name} {_other(name, *value)}" for name, value in metrics.items())
        _print_row(result.task, cells, other)

    def end(self) -> None:
        """Prints the average over the paper's tasks that were asked, if there are several, and notes."""
        of_paper = [result for result in self._done if result.task in PAPER_COLUMNS]
        if len(of_paper) > 1:
            means = {
                name: statistics.fmean(r.metrics[name][0] for r in of_paper) for name in ("acc", "acc_norm")
            }
            for name in ("chance", "majority"):
                means[name] = statistics.fmean(getattr(r, name) for r in of_paper)
            cells = {name: percent(mean) for name, mean in means.items()}
            complete = len(of_paper) == len(PAPER_COLUMNS)
            cells["paper"] = self._published.get("Avg", "") if complete else ""
            _print_row(f"average, {len(of_paper)} of the paper's 8", cells)
        if self._published.keys() & {OTHER_COLUMNS.get(result.task) for result in self._done}:
            print(
                "paper, race and triviaqa: as others quote its table 4; its TriviaQA is F1 with one example "
                "in the prompt, not exact_match with none"
            )


def percent(share: float | None, error: float | None = None) -> str:
    """A share in percent, with its standard error."""
    if share is None:
        return ""
    return f"{100 * share:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _other(name: str, value: float, error: float | None) -> str:
    if name == "exact_match":
        return percent(value, error)
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _print_row(task: str, cells: Mapping[str, str], other: str = "") -> None:
    padded = [cells.get(name, "").rjust(width) for name, width in _COLUMNS.items()]
    print(" ".join([task.ljust(28), *padded, other]).rstrip(), flush=True)
