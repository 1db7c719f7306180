"""Files of questions and answers, as the judges MT-bench (FastChat) and AlpacaEval read them."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mobilellm_jax.data.sources import read_rows
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import write_atomically
from mobilellm_jax.storage.sealed import parse

FORMATS = ("mt_bench", "alpaca_eval")
Row = dict[str, Any]


def read_questions(path: Path, format_name: str | None) -> tuple[str, list[Row]]:
    """Reads questions, a JSON list or a jsonl file; returns their format, one of `FORMATS`, and the rows.

    Rows of MT-bench have "question_id" and "turns", a list of strings; those of AlpacaEval "instruction".

    Raises:
      UserError: the file cannot be read, or a row is of another format than asked for or than the first.
    """
    rows = _rows(path, "questions")
    found = format_name or ("mt_bench" if "turns" in rows[0] else "alpaca_eval")
    for number, row in enumerate(rows, start=1):
        if problem := _problem(row, _QUESTION[found]):
            raise UserError(f"--questions: {path}: row {number}: {problem}; expected the format {found}")
    return found, rows


def turns_of(format_name: str, row: Row) -> list[str]:
    """What the user says in a question, turn by turn."""
    return row["turns"] if format_name == "mt_bench" else [row["instruction"]]


def write_answers(
    path: Path, format_name: str, model_id: str, rows: Sequence[Row], replies: Sequence[Sequence[str]]
) -> None:
    """Writes answers: jsonl for MT-bench, a JSON list for AlpacaEval; UserError if it cannot be written."""
    if format_name == "mt_bench":
        now = time.time()
        lines = [
            {
                "question_id": row["question_id"],
                "answer_id": hashlib.sha256(f"{model_id}\0{row['question_id']}".encode()).hexdigest()[:22],
                "model_id": model_id,
                "choices": [{"index": 0, "turns": list(turns)}],
                "tstamp": now,
            }
            for row, turns in zip(rows, replies, strict=True)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    else:
        outputs = [
            {
                "dataset": row.get("dataset", "unknown"),
                "instruction": row["instruction"],
                "output": turns[0],
                "generator": model_id,
            }
            for row, turns in zip(rows, replies, strict=True)
        ]
        text = json.dumps(outputs, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode(errors="replace"))


def check_answers(path: Path, format_name: str, questions: Sequence[Row]) -> None:
    """Checks that a file of answers is what the judge reads: a valid answer for every question, and one only.

    Raises:
      UserError: it is not; the message names the row.
    """
    rows, key = _rows(path, "answers"), "question_id" if format_name == "mt_bench" else "instruction"
    for number, row in enumerate(rows, start=1):
        if problem := _problem(row, _ANSWER[format_name]):
            raise UserError(f"--answers: {path}: row {number}: {problem}; expected the format {format_name}")
    asked, answered = [row[key] for row in questions], [row[key] for row in rows]
    if asked != answered:
        lacking = [value for value in asked if value not in answered]
        what = (
            f"no answer to {lacking[0]!r:.80}" if lacking else "not the answers to these questions, in order"
        )
        raise UserError(f"--answers: {path}: {what}")
    if format_name == "mt_bench":
        for question, row in zip(questions, rows, strict=True):
            if len(row["choices"][0]["turns"]) != len(question["turns"]):
                raise UserError(
                    f"--answers: {path}: question {question['question_id']}: a turn has no answer"
                )


def _rows(path: Path, flag: str) -> list[Row]:
    if path.suffix != ".json":
        if not path.is_file():
            raise UserError(f"--{flag}: there is no file {path}")
        return [row for _, row in read_rows(str(path), lambda count: None)]
    try:
        rows = parse(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"--{flag}: {path} cannot be read: {error}") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"--{flag}: {path}: expected a list of at least one object")
    return rows


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _are_choices(value: Any) -> bool:
    if not isinstance(value, list) or not value or not isinstance(value[0], dict):
        return False
    return "index" in value[0] and _are_texts(value[0].get("turns"))


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str)


Checks = dict[str, Callable[[Any], bool]]
_QUESTION: dict[str, Checks] = {
    "mt_bench": {"question_id": _is_id, "turns": _are_texts},
    "alpaca_eval": {"instruction": _is_text},
}
_ANSWER: dict[str, Checks] = {
    "mt_bench": {
        "question_id": _is_id,
        "answer_id": _is_text,
        "model_id": _is_text,
        "choices": _are_choices,
        "tstamp": lambda value: isinstance(value, float),
    },
    "alpaca_eval": dict.fromkeys(("instruction", "output", "generator", "dataset"), _is_text),
}


def _problem(row: Row, checks: Checks) -> str | None:
    for name, is_valid in checks.items():
        if name not in row:
            return f"no field {name!r}"
        if not is_valid(row[name]):
            return f"{name!r} is not valid: {row[name]!r:.80}"
    return None
