"""Batches from prepared rows, random for training and in a fixed order for evaluation, or from a task.

Letters: B rows in a batch, T tokens that a row predicts; a batch is int32 [B, T + 1]. With several
processes each gets B / process_count rows, and together they get the rows that one process would.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from mobilellm_jax.data.prepared import PreparedData
from mobilellm_jax.data.rows import PADDING
from mobilellm_jax.data.tasks import TaskData
from mobilellm_jax.errors import UserError


def train_batches(
    prepared: PreparedData | TaskData,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[np.ndarray]:
    """Yields int32 [B / process_count, T + 1] without end, shuffled anew in every epoch; tasks never repeat.

    Batches run over the border of two epochs, so a split of fewer rows than B is fine too.

    Args:
      prepared: the rows.
      batch_size: B, rows of all processes together.
      seed: of the order; 0 to 2**32 - 1.
      start_step: batches to leave out: the whole state of an interrupted run.
      process_index: this process, from 0.
      process_count: number of processes.

    Raises:
      UserError: B does not divide by `process_count`, or a file is damaged.
    """
    local = _local_batch_size("train.batch_size", batch_size, process_count)
    if isinstance(prepared, TaskData):
        # Every process draws all rows, and keeps its own: 0.1 ms for 32 rows, 2.5 ms for 1,024.
        batches = (prepared.rows("train", batch_size, seed, step) for step in itertools.count(start_step))
        return (batch[process_index::process_count] for batch in batches)
    import grain  # here, because it imports jax, which preparing data does without

    rows = _Rows(prepared, "train")
    # Not without end: of endless data in batches of one row, grain cannot say the length, and fails.
    order = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat(2**50 // len(rows))
    # Numbers are batched before the rows are read: reading rows one by one is ten times slower.
    batches = order[process_index::process_count].batch(local).map(rows.read)
    iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))
    iterator.set_state({"next_index": start_step})
    return iterator


def eval_batches(
    prepared: PreparedData | TaskData,
    *,
    batch_size: int,
    rows: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[np.ndarray]:
    """Yields int32 [B / process_count, T + 1] from the held-out rows, every row once.

    Args:
      prepared: the rows.
      batch_size: B, rows of all processes together. The last batch is filled up with rows of `PADDING`.
      rows: the first `rows` of one shuffled order, the same for every run; 0, or more than there are, takes
        all rows, in the order stored. Of a task, the first `rows` of its held-out stream.
      process_index: this process, from 0.
      process_count: number of processes.

    Raises:
      UserError: B does not divide by `process_count`, or a file is damaged.
    """
    _local_batch_size("train.eval_batch_size", batch_size, process_count)
    if isinstance(prepared, TaskData):
        drawn = prepared.rows("valid", rows, 0, 0)
        return padded_batches(drawn.__getitem__, np.arange(rows), batch_size, process_index, process_count)
    source = _Rows(prepared, "valid")
    order = np.arange(len(source))
    if 0 < rows < len(source):
        generator = random.Random(0)  # of all generators, only random() is promised never to change
        order = np.argsort([generator.random() for _ in order], kind="stable")[:rows]
    return padded_batches(source.read, order, batch_size, process_index, process_count)


def padded_batches(
    read: Callable[[np.ndarray], np.ndarray],
    order: np.ndarray,
    batch_size: int,
    process_index: int,
    process_count: int,
) -> Iterator[np.ndarray]:
    """Yields int32 [B / process_count, T + 1] from the rows that `read` returns for numbers in `order`."""
    for start in range(0, len(order), batch_size):
        rows = read(order[start : start + batch_size][process_index::process_count])
        batch = np.full((batch_size // process_count, rows.shape[1]), PADDING, np.int32)
        batch[: len(rows)] = rows
        yield batch


def _local_batch_size(field: str, batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise UserError(f"{field}: {batch_size} does not divide by the number of processes, {process_count}")
    return batch_size // process_count


class _Rows:
    """Random access to the rows of a split, from one thread at a time."""

    def __init__(self, prepared: PreparedData, split: str) -> None:
        shards = prepared.card["splits"][split]["shards"]
        self.width = prepared.sequence_length + 1
        self._dtype = np.dtype(prepared.card["dtype"])
        self._paths = [prepared.directory / shard["file"] for shard in shards]
        self._ends = np.cumsum([shard["rows"] for shard in shards])
        # no read-ahead: it is for reading in order
        self._readers: list[Any] = [ArrayRecordReader(str(p), "readahead_buffer_size:0") for p in self._paths]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns int32 [n, T + 1] for [n] row numbers."""
        batch = np.empty((len(indices), self.width), np.int32)
        shard_of = np.searchsorted(self._ends, indices, side="right")
        for shard in np.unique(shard_of):
            (places,) = np.nonzero(shard_of == shard)
            first = self._ends[shard - 1] if shard else 0
            try:
                records = self._readers[shard].read((np.asarray(indices)[places] - first).tolist())
                batch[places] = np.frombuffer(b"".join(records), self._dtype).reshape(-1, self.width)
            except (RuntimeError, ValueError) as error:
                raise _damaged(self._paths[shard], error) from None
        return batch


def _damaged(path: Any, error: Exception) -> UserError:
    return UserError(f"{path}: damaged ({error}); delete the directory {path.parent} and prepare again")
