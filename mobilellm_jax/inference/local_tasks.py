"""Zero-shot tasks by the names of lm-evaluation-harness, and local files in place of its data sets.

Rows of local files are converted to the fields of the task's own data set, so that lm-eval's definition of
the task builds the prompt from either.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mobilellm_jax.data.sources import read_rows
from mobilellm_jax.errors import UserError
from mobilellm_jax.validation import Rule

# The paper's eight tasks: lm-eval's name, and the column of the paper's tables.
PAPER_COLUMNS = {
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "boolq": "BoolQ",
    "piqa": "PIQA",
    "social_iqa": "SIQA",
    "hellaswag": "HellaSwag",
    "openbookqa": "OBQA",
    "winogrande": "WinoGrande",
}
# Columns of its table 4: lm-eval's race is RACE high; TriviaQA there is F1 with one example in the prompt.
OTHER_COLUMNS = {"race": "RACE_high", "triviaqa": "TQA_F1_1shot"}
GROUPS = {"mobilellm": list(PAPER_COLUMNS)}
EXTENSIONS = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
Row = dict[str, Any]

_LETTERS = "ABCDEFGHIJ"


@dataclasses.dataclass(frozen=True)
class LocalTask:
    """A task that can be read from a local file.

    Attributes:
      stem: prefix of its file name.
      fields: required fields of a row; others are ignored.
      as_on_hub: converts a row to the fields that lm-eval's definition of the task reads.
    """

    stem: str
    fields: Mapping[str, Rule]
    as_on_hub: Callable[[Row], Row]


def _texts(least: int, most: int) -> Rule:
    def is_valid(texts: Any) -> bool:
        fits = isinstance(texts, list) and least <= len(texts) <= most
        return fits and all(isinstance(text, str) and text for text in texts)

    number = least if least == most else f"{least} to {most}"
    return is_valid, f"a list of {number} strings, none of them empty"


_TEXT: Rule = (lambda v: isinstance(v, str) and bool(v), "a string that is not empty")
_INDEX: Rule = (lambda v: type(v) is int and v >= 0, "the index of the right choice, from 0")


def _choices(choices: Rule, **others: Rule) -> dict[str, Rule]:
    return {**others, "choices": choices, "gold": _INDEX}


_TWO, _THREE, _FOUR, _SOME = _texts(2, 2), _texts(3, 3), _texts(4, 4), _texts(2, len(_LETTERS))
_PROBLEM = _choices(_FOUR, question=_TEXT)
_PROBLEMS: Rule = (
    lambda v: isinstance(v, list) and bool(v) and not any(_problem_of(row, _PROBLEM) for row in v),
    "a list of objects with the fields question, choices (4 strings) and gold",
)
_YES_NO: Rule = (lambda v: v == ["no", "yes"], '["no", "yes"]')
_ACTIVITY: Rule = (lambda v: isinstance(v, str) and ": " in v, "'<activity>: <text>'")
_GAP: Rule = (lambda v: isinstance(v, str) and "_" in v, "a string with a gap, '_'")


def _lettered(row: Row, question: str = "question") -> Row:
    choices = {"text": row["choices"], "label": list(_LETTERS[: len(row["choices"])])}
    return {question: row["question"], "choices": choices, "answerKey": _LETTERS[row["gold"]]}


def _boolq(row: Row) -> Row:
    question = row["question"].removesuffix("?")  # as in the data set: the prompt adds it
    return {"passage": row["passage"], "question": question, "label": row["gold"]}


def _piqa(row: Row) -> Row:
    first, second = row["choices"]
    return {"goal": row["question"], "sol1": first, "sol2": second, "label": row["gold"]}


def _winogrande(row: Row) -> Row:
    first, second = row["choices"]
    return {
        "sentence": row["sentence"],
        "option1": first,
        "option2": second,
        "answer": str(row["gold"] + 1),
    }


# The beginning of the sentence that is to be completed stands alone in `ctx_b`, where lm-eval capitalises it.
_HELLASWAG = re.compile(r"""(?P<a>.*[.!?]["')]?) (?P<b>[a-z][^.!?]*)""", re.DOTALL)


def _hellaswag(row: Row) -> Row:
    activity, _, context = row["context"].partition(": ")
    parts = _HELLASWAG.fullmatch(context)
    return {
        "activity_label": activity,
        "ctx_a": parts["a"] if parts else context,
        "ctx_b": parts["b"] if parts else "",
        "endings": row["choices"],
        "label": str(row["gold"]),
    }


def _siqa(row: Row) -> Row:
    answers = dict(zip(("answerA", "answerB", "answerC"), row["choices"], strict=True))
    return {"context": row["context"], "question": row["question"], **answers, "label": str(row["gold"] + 1)}


def _race(row: Row) -> Row:
    problems = [
        {"question": p["question"], "options": p["choices"], "answer": _LETTERS[p["gold"]]}
        for p in row["problems"]
    ]
    return {"article": row["article"], "problems": repr(problems)}  # the data set has them in one string


LOCAL_TASKS = {
    "arc_easy": LocalTask("arc_easy", _choices(_SOME, question=_TEXT), _lettered),
    "arc_challenge": LocalTask("arc_challenge", _choices(_SOME, question=_TEXT), _lettered),
    "boolq": LocalTask("boolq", _choices(_YES_NO, passage=_TEXT, question=_TEXT), _boolq),
    "piqa": LocalTask("piqa", _choices(_TWO, question=_TEXT), _piqa),
    "social_iqa": LocalTask("siqa", _choices(_THREE, context=_TEXT, question=_TEXT), _siqa),
    "hellaswag": LocalTask("hellaswag", _choices(_SOME, context=_ACTIVITY), _hellaswag),
    "openbookqa": LocalTask(
        "obqa", _choices(_SOME, question=_TEXT), lambda row: _lettered(row, "question_stem")
    ),
    "winogrande": LocalTask("winogrande", _choices(_TWO, sentence=_GAP), _winogrande),
    "triviaqa": LocalTask(
        "triviaqa",
        {"question": _TEXT, "aliases": _texts(1, 10_000)},
        lambda row: {"question": row["question"], "answer": {"aliases": row["aliases"]}},
    ),
    "race": LocalTask("race", {"article": _TEXT, "problems": _PROBLEMS}, _race),
}


def expand(names: list[str]) -> list[str]:
    """Replaces our groups by their tasks; each name once, in order."""
    return list(dict.fromkeys(task for name in names for task in GROUPS.get(name, [name])))


def find_file(task: str, data_dir: Path) -> Path | None:
    """The file of a task in `data_dir`; None where it has none.

    Raises:
      UserError: there are several files, no folder, or the task is not in `LOCAL_TASKS`.
    """
    if task not in LOCAL_TASKS:
        raise UserError(
            f"--data_dir: the task {task!r} cannot be read from local files; expected one of "
            f"{', '.join(LOCAL_TASKS)}"
        )
    if not data_dir.is_dir():
        raise UserError(f"--data_dir={data_dir}: there is no such folder")
    stem = LOCAL_TASKS[task].stem
    there = [path for path in sorted(data_dir.glob(f"{stem}*")) if path.name.endswith(EXTENSIONS)]
    if len(there) > 1:
        names = ", ".join(path.name for path in there)
        raise UserError(f"--data_dir={data_dir}: more than one file for the task {task}: {names}; keep one")
    return there[0] if there else None


def read_local(task: str, path: Path) -> list[Row]:
    """Reads a local file as the rows that lm-eval's definition of the task reads.

    Raises:
      UserError: the file cannot be read, or a row lacks a field; the message names file, line and field.
    """
    local = LOCAL_TASKS[task]
    rows = []
    for number, row in read_rows(str(path), lambda _: None):
        if problem := _problem_of(row, local.fields):
            raise UserError(f"{path}, line {number}: {problem}")
        rows.append(local.as_on_hub(row))
    return rows


def _problem_of(row: Any, fields: Mapping[str, Rule]) -> str | None:
    """The first problem of a row; None if it is valid."""
    if not isinstance(row, dict):
        return f"expected an object with the fields {', '.join(fields)}"
    for name, (is_valid, valid) in fields.items():
        if name not in row:
            return f"no field {name!r}; the row has the fields {', '.join(row)}"
        if not is_valid(row[name]):
            return f"{name!r}: {row[name]!r:.80} is not valid; expected {valid}"
    if "gold" in fields and row["gold"] >= len(row["choices"]):
        return f"'gold': {row['gold']} is not valid; expected less than the {len(row['choices'])} choices"
    return None
