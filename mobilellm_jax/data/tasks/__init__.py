"""Synthetic tasks: short problems, drawn anew for every batch, that some depths can solve and others cannot.

A source such as "khop:hops=4,min_hops=1,symbols=9,queries=3" names a task and its parameters, one file each;
those that were added later have a default. Nothing is prepared on disk, and rows repeat only by chance (facts
to remember on purpose): batch n of a run comes from NumPy's counter-based Philox generator at counter n, so
the state of the data is the step alone. Held-out rows, and those for tuning, come from keys of their own, the
same for all runs.

Only answers are targets, see `rows.no_target`. In the examples of the files, ".a" is input only, "=b" an
answer. In training and evaluation, the right answers before a position are among its inputs, or of no use to
it, so that a row counts as right exactly when greedy decoding would have found all its answers. Where several
answers are right, see `Task.follow`.
"""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mobilellm_jax.config import TASKS, DataConfig
from mobilellm_jax.data.pipeline import local_batch_size, padded_batches
from mobilellm_jax.data.rows import PADDING
from mobilellm_jax.data.tasks.addition import Addition
from mobilellm_jax.data.tasks.breadth import Breadth
from mobilellm_jax.data.tasks.hops import KHop
from mobilellm_jax.data.tasks.knowledge import Knowledge
from mobilellm_jax.data.tasks.manipulation import Manipulation
from mobilellm_jax.data.tasks.recall import Recall
from mobilellm_jax.data.tasks.structure import Structure
from mobilellm_jax.data.tasks.task import Measures, Stream, Task
from mobilellm_jax.errors import UserError, did_you_mean

__all__ = ["Measures", "TaskData", "open_task"]

FORMAT_VERSION = 1  # raise it when the same spec would give other rows
# Training rows that are drawn together, and the random numbers for them, which should stay in the cache: 2 to
# 9 times faster than 32 at a time.
_ROWS, _NUMBERS = 1024, 1 << 16
_KEY = {"train": 0, "valid": 1, "tuning": 2}  # of the random stream of a split
_CLASSES: dict[str, type[Task]] = dict(
    zip(TASKS, (KHop, Addition, Recall, Structure, Manipulation, Knowledge, Breadth), strict=True)
)


# --- data made of a task -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TaskData:
    """The rows of a task, a `pipeline.Dataset`; they repeat only by chance.

    Attributes:
      train, valid: the task of each split ("tuning" has that of "valid"); they differ in studies of
        extrapolation.
      card: the data card, ready for JSON.
    """

    train: Task
    valid: Task
    card: dict[str, Any]

    @property
    def sequence_length(self) -> int:
        """T; a row holds T + 1 token ids."""
        return self.card["sequence_length"]

    def bytes_per_token(self, split: str) -> None:
        """None, as tasks have no text."""

    def tokenizer(self) -> None:
        """None, as tasks have no text."""

    def num_rows(self, split: str) -> None:
        """None, as rows are drawn without end."""

    def check_rows(self, split: str) -> None:
        """Every split of a task has rows."""

    def eval_documents(self, rows: int, split: str) -> None:
        """None, as tasks have no documents."""

    def train_batches(
        self,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[np.ndarray]:
        local_batch_size("train.batch_size", batch_size, process_count)
        rows_at_a_time = min(_ROWS, _NUMBERS // self.train.draws)
        at_a_time = max(1, rows_at_a_time // batch_size)
        # Every process draws all rows, and keeps its own: 0.3 to 6 ms at a time.
        several = (
            self.rows("train", batch_size, seed, range(step, step + at_a_time))
            for step in itertools.count(start_step, at_a_time)
        )
        return (
            rows[start : start + batch_size][process_index::process_count]
            for rows in several
            for start in range(0, len(rows), batch_size)
        )

    def eval_batches(
        self,
        *,
        batch_size: int,
        rows: int = 0,
        split: str = "valid",
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[np.ndarray]:
        local_batch_size("train.eval_batch_size", batch_size, process_count)
        drawn = self.rows(split, rows, 0)
        return padded_batches(drawn.__getitem__, np.arange(rows), batch_size, process_index, process_count)

    def of_split(self, split: str) -> Task:
        return self.train if split == "train" else self.valid

    def rows(self, split: str, count: int, seed: int, numbers: Sequence[int] = (0,)) -> np.ndarray:
        """The batches of these numbers, of `count` rows each, of the random stream of `seed` in a split.

        One below the other, int32 [rows, T + 1].
        """
        rows = self.of_split(split).batches(Stream(seed, _KEY[split]), count, numbers)
        padding = self.sequence_length + 1 - rows.shape[1]
        return np.pad(rows.astype(np.int32), ((0, 0), (0, padding)), constant_values=PADDING)


def open_task(data: DataConfig) -> TaskData:
    """Opens the task of `data.source`; held-out rows are those of `data.valid_source`, where it is set.

    Raises:
      UserError: a spec is not valid, its rows do not fit `data.sequence_length`, or the vocabularies differ.
    """
    specs = {"source": data.source}
    if data.valid_source:
        specs["valid_source"] = data.valid_source
    tasks = {name: _parse(spec, f"data.{name}") for name, spec in specs.items()}
    for name, task in tasks.items():
        if task.length > data.sequence_length:
            raise UserError(
                f"data.sequence_length: {data.sequence_length} is too short for data.{name}={specs[name]!r}; "
                f"the smallest valid value is {task.length}"
            )
    train, valid = tasks["source"], tasks.get("valid_source", tasks["source"])
    if train.vocab_size != valid.vocab_size:
        raise UserError(
            f"data.valid_source: {data.valid_source!r} has {valid.vocab_size} token ids; expected "
            f"{train.vocab_size}, as in data.source={data.source!r}"
        )
    kind = data.source.partition(":")[0]
    card = {
        "format": FORMAT_VERSION,
        "source": data.source,
        "source_sha256": _sha256(kind, _numbers(train)),
        "valid_source": data.valid_source or None,
        "valid_source_sha256": _sha256(kind, _numbers(valid)) if data.valid_source else None,
        "tokenizer": None,
        "tokenizer_sha256": _sha256(kind, train.vocab_size),
        "vocab_size": train.vocab_size,
        "sequence_length": data.sequence_length,
    }
    return TaskData(train, valid, card)


def _parse(spec: str, field: str) -> Task:
    kind, _, rest = spec.partition(":")
    task = _CLASSES[kind]
    fields = dataclasses.fields(task)  # type: ignore[arg-type]
    names = [f.name for f in fields]
    required = [f.name for f in fields if f.default is dataclasses.MISSING]
    shape = f"{kind}:" + ",".join(f"{name}=<integer>" for name in names)
    values: dict[str, int] = {}
    for item in rest.split(","):
        match = re.fullmatch(r"(\w+)=(\d{1,9})", item.strip())
        if match is None or match[1] in values:
            raise UserError(f"{field}: {spec!r} is not valid; expected {shape!r}")
        if match[1] not in names:
            raise UserError(
                f"{field}: {spec!r} has no parameter {match[1]!r}; {did_you_mean(match[1], names)}"
            )
        values[match[1]] = int(match[2])
    if missing := [name for name in required if name not in values]:
        raise UserError(f"{field}: {spec!r} lacks {', '.join(missing)}; expected {shape!r}")
    try:
        return task(**values)
    except UserError as error:
        raise UserError(f"{field}: {spec!r}: {error}") from None


def _numbers(task: Task) -> dict[str, int]:
    """The numbers of a spec that decide about rows; a later parameter that has its default is left out."""
    names = [f.name for f in dataclasses.fields(task) if f.name not in task.unhashed]  # type: ignore[arg-type]
    numbers = {name: getattr(task, name) for name in names}
    return {name: number for name, number in numbers.items() if number != getattr(type(task), name, None)}


def _sha256(kind: str, numbers: int | dict[str, int]) -> str:
    return hashlib.sha256(json.dumps([FORMAT_VERSION, kind, numbers], sort_keys=True).encode()).hexdigest()
