"""Reads prepared directories; an incomplete one is refused."""

import dataclasses
import hashlib
import io
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from mobilellm_jax.data.card import FORMAT_VERSION
from mobilellm_jax.data.pipeline import local_batch_size, padded_batches
from mobilellm_jax.data.rows import is_target
from mobilellm_jax.data.splits import SPLITS
from mobilellm_jax.data.tokenizers import CARD_FILE, Tokenizer, load_tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.sealed import parse, unseal


def documents_file(split: str) -> str:
    """Name of the file with the places in the stream of a held-out split where documents begin."""
    return f"{split}-documents.npy"


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Rows on disk, a `pipeline.Dataset`.

    Attributes:
      directory: named by `DataCard.directory_name`.
      card: the data card, ready for JSON and free of absolute paths: source, hashes, tokenizer, sizes.
    """

    directory: Path
    card: dict[str, Any]

    @property
    def sequence_length(self) -> int:
        """T; a row holds T + 1 token ids."""
        return self.card["sequence_length"]

    @property
    def has_masks(self) -> bool:
        """True for conversations, of which only replies are targets."""
        return bool(self.card.get("template"))

    def num_rows(self, split: str) -> int:
        return self.card["splits"][split]["rows"]

    def check_rows(self, split: str) -> None:
        if self.num_rows(split) == 0:
            entry, source = self.card["splits"][split], self.card["valid_source"] or self.card["source"]
            raise UserError(
                f"{source}: the {split} split of the held-out text has no row: {entry['documents']} "
                f"documents, {entry['tokens']} tokens, and one row needs {self.sequence_length + 1}; hold "
                "out more text (data.valid_fraction, data.valid_source), shorten data.sequence_length or, "
                "for a single run, use train.eval_split='valid'"
            )

    def bytes_per_token(self, split: str) -> float | None:
        """None where rows come from token ids without text; of conversations, of the replies alone."""
        if self.has_masks:
            entry = self.card["splits"][split]
            return entry["target_bytes"] / entry["targets"]
        size, tokens = (self.card["splits"][split][name] for name in ("text_bytes", "tokens"))
        return None if size is None else size / (tokens - 1)  # nothing predicts the first token

    def tokenizer(self) -> Tokenizer | None:
        return load_tokenizer(self.directory) if self.card["tokenizer"] else None

    def train_batches(
        self,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[np.ndarray]:
        """`Dataset.train_batches`, reshuffled in every epoch.

        Batches cross the border of two epochs, so a split may have fewer rows than B.
        """
        local = local_batch_size("train.batch_size", batch_size, process_count)
        import grain  # here, because it imports jax, which preparing data does without

        rows = _Rows(self, "train")
        # Not endless: grain fails to compute the length of endless data in batches of one row.
        order = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat(2**50 // len(rows))
        # Numbers are batched before the rows are read: reading rows one by one is ten times slower.
        batches = order[process_index::process_count].batch(local).map(rows.read)
        iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))
        iterator.set_state({"next_index": start_step})
        return iterator

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
        self.check_rows(split)
        order, read = self._eval_order(split, rows), _Rows(self, split).read
        return padded_batches(read, order, batch_size, process_index, process_count)

    def eval_documents(self, rows: int, split: str) -> np.ndarray:
        path = self.directory / documents_file(split)
        content = path.read_bytes()
        (entry,) = (entry for entry in self.card["files"] if entry["file"] == path.name)
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise _damaged(path, ValueError("checksum mismatch"))
        # Rows of text share a token with their neighbours, rows of conversations do not.
        T, each = self.sequence_length, self.sequence_length + self.has_masks
        first_R = self._eval_order(split, rows) * each
        starts = np.lib.format.read_array(io.BytesIO(content))
        document_RT = np.searchsorted(starts, first_R[:, None] + np.arange(1, T + 1), side="right") - 1
        if self.has_masks:
            document_RT[~is_target(self.eval_rows(rows, split)[:, 1:])] = -1
        return document_RT

    def eval_rows(self, rows: int, split: str) -> np.ndarray:
        """The rows that `eval_batches` takes, in one piece: int32 [R, T + 1]."""
        return _Rows(self, split).read(self._eval_order(split, rows))

    def _eval_order(self, split: str, rows: int) -> np.ndarray:
        """Numbers of the rows that an evaluation takes, int64 [R]."""
        order = np.arange(self.num_rows(split))
        if 0 < rows < len(order):
            generator = random.Random(0)  # Python guarantees the sequence of random() alone
            order = np.argsort([generator.random() for _ in order], kind="stable")[:rows]
        return order


def open_prepared(directory: str | os.PathLike[str]) -> PreparedData:
    """Opens a prepared directory after checking its card and the sizes of its files.

    Rows are checked when they are read: array_record stores a checksum of each.

    Raises:
      UserError: a file is missing or of the wrong size, or the card is corrupt; the message names it.
    """
    directory = Path(directory)
    again = f"delete the directory {directory} and run again to prepare the data anew"
    try:
        card = parse((directory / CARD_FILE).read_bytes())
        if card["format"] != FORMAT_VERSION:
            raise UserError(
                f"{directory}: prepared in format {card['format']}, expected {FORMAT_VERSION}; {again}"
            )
        card = unseal(card)
        files = [*card["files"], *(shard for split in SPLITS for shard in card["splits"][split]["shards"])]
        sizes = {entry["file"]: entry["bytes"] for entry in files}
    except OSError as error:
        raise UserError(f"{directory / CARD_FILE}: cannot be read: {error.strerror}; {again}") from None
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory / CARD_FILE}: corrupt data card: {error}; {again}") from None
    for name, size in sizes.items():
        if name in ("", "..") or os.path.basename(name) != name:
            raise UserError(f"{directory / CARD_FILE}: {name!r} is not a plain file name; {again}")
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "missing" if found is None else f"{found} bytes, expected {size} by the data card"
            raise UserError(f"{path}: {state}; {again}")
    return PreparedData(directory, card)


class _Rows:
    """Random access to the rows of a split, from one thread at a time."""

    def __init__(self, prepared: PreparedData, split: str) -> None:
        shards = prepared.card["splits"][split]["shards"]
        self.width = prepared.sequence_length + 1
        self._dtype = np.dtype(prepared.card["dtype"])
        self._paths = [prepared.directory / shard["file"] for shard in shards]
        self._ends = np.cumsum([shard["rows"] for shard in shards])
        # read-ahead only helps sequential reads
        self._readers: list[Any] = [ArrayRecordReader(str(p), "readahead_buffer_size:0") for p in self._paths]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Rows int32 [n, T + 1] by their numbers [n]."""
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
    again = f"delete the directory {path.parent} and run again to prepare the data anew"
    return UserError(f"{path}: corrupt rows ({error}); {again}")
