"""The interface of all training data: batches of rows.

Letters: B rows in a batch, T tokens that a row predicts; a batch is int32 [B, T + 1], see `rows`. With
several processes each gets B / process_count rows, and together they get the rows that one process would.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mobilellm_jax.data.rows import PADDING
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError


@runtime_checkable
class Dataset(Protocol):
    """The rows of a run: `PreparedData` of text or token ids, `TaskData` of a task."""

    @property
    def card(self) -> dict[str, Any]:
        """The data card, ready for JSON and free of absolute paths: source, hashes, sizes."""
        ...

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the text; None where rows come from no text."""
        ...

    def bytes_per_token(self, split: str) -> float | None:
        """Bytes of text per token predicted in a split; None where rows come from no text."""
        ...

    def num_rows(self, split: str) -> int | None:
        """Rows of a split, "train", "tuning" or "valid"; None where they never run out."""
        ...

    def check_rows(self, split: str) -> None:
        """Raises UserError where a split has no row to evaluate."""
        ...

    def train_batches(
        self,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[np.ndarray]:
        """Yields int32 [B / process_count, T + 1] without end.

        Args:
          batch_size: B, rows of all processes together.
          seed: of the order; 0 to 2**32 - 1.
          start_step: batches to skip; the only state that resuming needs.
          process_index: this process, from 0.
          process_count: number of processes.

        Raises:
          UserError: B is not divisible by `process_count`, or a file is corrupt.
        """
        ...

    def eval_batches(
        self,
        *,
        batch_size: int,
        rows: int = 0,
        split: str = "valid",
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[np.ndarray]:
        """Yields int32 [B / process_count, T + 1] from the rows of a held-out split, every row once.

        Args:
          batch_size: B, rows of all processes together. The last batch is filled up with rows of `PADDING`.
          rows: the first `rows` of one shuffled order, the same for every run; 0, or more than there are,
            takes all rows, in the order stored. Of a task, the first `rows` of its held-out stream.
          split: "valid" or "tuning".
          process_index: this process, from 0.
          process_count: number of processes.

        Raises:
          UserError: B is not divisible by `process_count`, the split has no row, or a file is corrupt.
        """
        ...

    def eval_documents(self, rows: int, split: str) -> np.ndarray | None:
        """Document of every target of R evaluated rows, int [R, T], in the order of `eval_batches`.

        Documents are numbered from 0 in the order of the split; -1 where there is no target. None where rows
        come from no documents.

        Raises:
          UserError: a file is corrupt.
        """
        ...


def padded_batches(
    read: Callable[[np.ndarray], np.ndarray],
    order: np.ndarray,
    batch_size: int,
    process_index: int,
    process_count: int,
) -> Iterator[np.ndarray]:
    """Yields int32 [B / process_count, T + 1]: the rows numbered in `order`, the last batch padded."""
    for start in range(0, len(order), batch_size):
        rows = read(order[start : start + batch_size][process_index::process_count])
        batch = np.full((batch_size // process_count, rows.shape[1]), PADDING, np.int32)
        batch[: len(rows)] = rows
        yield batch


def local_batch_size(field: str, batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise UserError(
            f"{field}: {batch_size} is not divisible by the {process_count} processes; use a multiple of "
            f"{process_count}"
        )
    return batch_size // process_count
