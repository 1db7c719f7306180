"""The paper's rows beside our points: what each study reproduces, from the tables in `experiments/paper/`."""

import csv
import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "paper"
# Questions of the paper's eight tasks, by column: the test sets of ARC and OpenBookQA, the validation sets of
# the others, as in lm-evaluation-harness. The files of `experiments.evaluate --data_dir` have as many.
QUESTIONS = {
    "ARC-e": 2376,
    "ARC-c": 1172,
    "BoolQ": 3270,
    "PIQA": 1838,
    "SIQA": 1954,
    "HellaSwag": 10_042,
    "OBQA": 500,
    "WinoGrande": 1267,
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One model of the paper.

    Attributes:
      label: its label in figures and tables.
      printed: parameters in millions, as printed (without norm gains); "" if not given.
      accuracy: average zero-shot accuracy on the paper's eight tasks, in percent; None if not given.
      error: standard error of `accuracy` from the choice of the questions; None if not given by task.
      x: its place on the x axis of the study's figure; None in studies without one.
      series: its line, if the figure has several over x; else "".
    """

    label: str
    printed: str
    accuracy: float | None
    error: float | None
    x: float | None
    series: str


Cells = dict[str, str]  # column -> text


@dataclasses.dataclass(frozen=True)
class Source:
    """Table of the paper for a study, and the rules to read its rows; names in braces are columns.

    Attributes:
      table: file name in `experiments/paper/`.
      what: figure and table of the paper, for captions.
      tokens: training tokens of its models.
      label, series: formats.
      printed: column of the printed parameters; "": the table does not have them.
      x: place on the x axis.
      group: size group; the study's preset is `paper_<group>`, or `paper` where there are no groups.
      only: True for rows that belong to the study.
    """

    table: str
    what: str
    label: str
    printed: str = "params_printed_M"
    tokens: str = "0.25T"
    x: Callable[[Cells], float] | None = None
    series: str = ""
    group: Callable[[Cells], str] = operator.itemgetter("group")
    only: Callable[[Cells], bool] = lambda _: True


_LATER = {"SmolLM-135M": "smollm", "SmolLM-360M": "smollm"} | {
    f"MobileLLM-R1-{size}": "r1" for size in ("140M", "360M", "950M")
}
SOURCES = {
    "depth_vs_width": Source(
        "table11_depth_vs_width", "figure 4, table 11", "{layers} x {dim}", x=lambda row: float(row["layers"])
    ),
    "head_groups": Source(
        "table13_fig5_heads_kvheads",
        "figure 5, table 13",
        "{heads} x {kv_heads}",
        x=lambda row: float(row["kv_heads"]),
        series="{heads} heads",
    ),
    "embedding_sharing": Source("table01_embedding_sharing", "table 1", "{variant}"),
    "layer_sharing": Source("table02_layer_sharing_strategy", "table 2", "{sharing}", "params_M"),
    "repeats": Source("table14_repeat_count", "table 14", "{repeat}", printed=""),
    "roadmap": Source(
        "table10_fig3_roadmap",
        "figure 3, table 10",
        "{technique}",
        only=lambda row: row["train_tokens"] == "0.25T",
    ),
    "distillation": Source("table16_knowledge_distillation", "table 16", "{loss}", printed=""),
    "mobilellm": Source(
        "table09_model_zoo",
        "tables 3, 8 and 9",
        "{model}",
        "params_printed_paper",
        tokens="1T",
        group=lambda _: "",
    ),
    "followups": Source(
        "followups",
        "the model cards",
        "{model}",
        "params_printed",
        group=lambda row: _LATER[row["model"]],
        only=lambda row: row["model"] in _LATER,
    ),
}


@functools.cache
def table(name: str) -> list[Cells]:
    """The rows of `experiments/paper/<name>.csv`."""
    with open(FOLDER / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def rows(study: str) -> dict[str, list[Row]]:
    """The paper's rows of a study by size group: "125M", "350M"; "" where there are no groups.

    They are in the order of the paper, which is that of the study's points at its `paper` presets. Empty for
    a study that is not in the paper.
    """
    groups: dict[str, list[Row]] = {}
    if study not in SOURCES:
        return groups
    source = SOURCES[study]
    for row in filter(source.only, table(source.table)):
        scores = row if "Avg" in row else _zero_shot_rows().get(row["model"], {})
        accuracy = scores.get("Avg")
        groups.setdefault(source.group(row), []).append(
            Row(
                label=source.label.format_map(row),
                printed=row[source.printed].partition(" ")[0] if source.printed else "",
                accuracy=float(accuracy) if accuracy else None,
                error=sampling_error(scores) if accuracy else None,
                x=source.x(row) if source.x else None,
                series=source.series.format_map(row),
            )
        )
    return groups


def of_preset(study: str, preset: str) -> list[Row]:
    """The paper's rows that are the points of a study at a `paper` preset, in their order; [] at others."""
    return {f"paper_{group.lower()}".strip("_"): of for group, of in rows(study).items()}.get(preset, [])


def published(model: Any) -> tuple[str, Cells] | None:
    """The name and the zero-shot accuracies, by column, of the published model of a shape, if any.

    Args:
      model: a `ModelConfig`.
    """
    for row in table("table09_model_zoo"):
        depth, applied = int(row["layers_distinct"]), int(row["layers_applied"])
        shape = {
            "depth": depth,
            "plan": tuple(u for u in range(depth) for _ in range(applied // depth)),
            "num_heads": int(row["heads"]),
            "num_kv_heads": int(row["kv_heads"]),
            "head_dim": int(row["head_dim"]),
            "width": int(row["dim"]),
            "ffn_width": int(row["ffn_hidden"]),
            "vocab_size": int(row["vocab"]),
            "share_embedding": row["tied_embeddings"] == "yes",
        }
        if all(getattr(model, field) == value for field, value in shape.items()):
            name = row["model"]
            return name, {**_zero_shot_rows()[name], **_other_rows().get(name, {})}
    return None


def agrees(printed: str, count: int) -> bool:
    """True if `count` rounds or truncates to the printed number ("134.1", "1.01B"; millions without a unit).

    The models' own cards do both: 949.6 million parameters are printed as 949M.
    """
    number = Decimal(printed.rstrip("MB"))
    exact = Decimal(count) / (10**9 if printed.endswith("B") else 10**6)
    return number in (exact.quantize(number, ROUND_HALF_UP), exact.quantize(number, ROUND_DOWN))


def sampling_error(row: Cells) -> float | None:
    """Standard error of the average of the eight tasks, in points: each question right or wrong on its own.

    A difference of two models has sqrt(2) of it, about 0.6 points; less if both fail at the same questions.
    None where a task is missing.
    """
    if not all(row.get(task) for task in QUESTIONS):
        return None
    shares = {task: float(row[task]) / 100 for task in QUESTIONS}
    variance = sum(share * (1 - share) / QUESTIONS[task] for task, share in shares.items())
    return 100 * math.sqrt(variance) / len(QUESTIONS)


def _zero_shot_rows() -> dict[str, Cells]:
    tables = (table("table03_main_zero_shot"), table("table08_larger_models_zero_shot"))
    return {row["model"]: row for of_table in tables for row in of_table}


def _other_rows() -> dict[str, Cells]:
    """TriviaQA and RACE scores by model, where the paper has them."""
    return {
        row["model"]: {column: text for column, text in row.items() if text != "not found"}
        for row in table("table04_tqa_race")
    }
