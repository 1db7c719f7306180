"""Prepare once: tokenise a source and pack it into fixed-length rows on disk.

A prepared directory is written beside its final name, synced, and renamed, so that it is complete or absent.
Its name is a hash of everything that determines the rows.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import platform
import shutil
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from filelock import FileLock, Timeout

from mobilellm_jax.config import DataConfig
from mobilellm_jax.data import chat, splits, tokenizers
from mobilellm_jax.data.bars import reading
from mobilellm_jax.data.card import CONVERSATIONS, CUTS, PACKING, DataCard
from mobilellm_jax.data.conversations import open_any
from mobilellm_jax.data.packing import check_template, pack_conversations
from mobilellm_jax.data.pipeline import Dataset
from mobilellm_jax.data.prepared import documents_file, open_prepared
from mobilellm_jax.data.sources import Source
from mobilellm_jax.data.splits import HELD_OUT, SPLITS, Item
from mobilellm_jax.data.tasks import open_task
from mobilellm_jax.data.tokenizers import CARD_FILE, Tokenizer, UntrainedBPE
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import local_directory
from mobilellm_jax.storage.sealed import seal

# None where the source is token ids already.
TokenSource = Tokenizer | UntrainedBPE | None
_BATCH = 2 << 20  # characters, or ids, taken at a time
_SHARD = 1 << 30  # bytes of rows in a file


def prepare(data: DataConfig, vocab_size: int) -> Dataset:
    """Opens the rows of `data`, preparing them on disk at first use; tasks need no files.

    Safe to interrupt, and to call from several processes at once: one prepares, the others wait.

    Args:
      data: the source, the tokenizer, the split and the length of the rows.
      vocab_size: the model's; above every token id.

    Raises:
      UserError: bad input, text too short for a row, held-out text that is trained on as well, a vocabulary
        that is too small, or a failed write.
    """
    if data.is_task:
        task = open_task(data)
        _check_vocab_size(vocab_size, task.train.vocab_size, f"data.source={data.source!r}")
        return task
    if data.source == "imported":
        raise UserError("data.source: 'imported' marks weights with unknown training data; set data.source")
    tokens = None if data.source.startswith("tokens:") else tokenizers.of_spec(data.tokenizer)
    if tokens:  # the largest of given token ids is known only once they are read
        _check_vocab_size(vocab_size, tokens.vocab_size, f"data.tokenizer={data.tokenizer!r}")
    if tokens:
        check_template(data, tokens)
    source = open_any(data.source, data.text_field)
    valid = data.valid_source
    held_out = open_any(valid, data.text_field, "data.valid_source") if valid else None
    if held_out:
        splits.check_apart(data, source.files & held_out.files)
    card = _card(data, source, held_out, tokens, tokens.vocab_size if tokens else vocab_size)
    cache_dir = local_directory("config.data.cache_dir", data.cache_dir).expanduser()
    directory = cache_dir / card.directory_name()
    try:
        if not directory.exists():
            cache_dir.mkdir(parents=True, exist_ok=True)
            with _locked(cache_dir / f"{directory.name}.lock"):
                if not directory.exists():  # else another process made it while this one waited
                    _make(directory, card, source, held_out, tokens, vocab_size)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: cannot prepare data in {cache_dir}: {error.strerror or error}"
        ) from None
    prepared = open_prepared(directory)
    _check_vocab_size(vocab_size, prepared.card["vocab_size"], f"data.source={data.source!r}")
    return prepared


def _card(
    data: DataConfig, source: Source, held_out: Source | None, tokens: TokenSource, ids: int
) -> DataCard:
    """The card before the source is read; token ids are below `ids`."""
    split = splits.BY_SOURCE if held_out else splits.BY_PLACE if source.is_one_text else splits.BY_HASH
    adds_space = isinstance(tokens, Tokenizer) and tokenizers.adds_space(tokens)
    is_bundled = "bundled" in (data.source, data.valid_source)
    has_masks = data.is_conversations
    dtype = "<u2" if ids <= 1 << 16 else "<u4"
    if has_masks:  # ~id is negative
        dtype = "<i2" if ids <= 1 << 15 else "<i4"
    card = DataCard(
        source=source.name,
        source_sha256=source.sha256,
        valid_source=held_out.name if held_out else None,
        valid_source_sha256=held_out.sha256 if held_out else None,
        valid_fraction=None if held_out else data.valid_fraction,
        text_field=data.text_field,
        python_version=platform.python_version() if is_bundled else None,
        tokenizer=None,
        sequence_length=data.sequence_length,
        dtype=dtype,
        split=split,
        packing=CONVERSATIONS if has_masks else PACKING,
        cuts=CUTS if adds_space and not has_masks else None,
        template=chat.TEMPLATE if has_masks else None,
    )
    return card.with_tokenizer(tokens)


def _check_vocab_size(vocab_size: int, needed: int, what: str) -> None:
    if vocab_size < needed:
        raise UserError(
            f"model.vocab_size: {vocab_size} is too small for {what}; the smallest valid value is {needed}"
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logging.warning("Waiting for another process that is preparing the same data (lock: %s).", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(
    directory: Path,
    card: DataCard,
    source: Source,
    held_out: Source | None,
    tokens: TokenSource,
    vocab_size: int,
) -> None:
    """Writes `directory`; the caller has its lock, so temporary directories are left by killed processes."""
    for leftover in directory.parent.glob(f"{directory.name}.tmp-*"):
        shutil.rmtree(leftover)
    work = directory.with_name(f"{directory.name}.tmp-{os.getpid()}")
    work.mkdir()
    try:
        tokenizer = _trained(tokens, source, card.valid_fraction)
        card = card.with_tokenizer(tokenizer)
        shared = splits.Shared(held_out)
        with reading(f"packing {card.source}", [s for s in (source, held_out) if s]) as on_read:
            documents = splits.split_documents(source, held_out, card.valid_fraction, on_read)
            packers = _pack(work, card, shared.noted(documents), tokenizer)
        if tokenizer is None:
            card = dataclasses.replace(card, vocab_size=1 + max(packer.max_id for packer in packers.values()))
            _check_vocab_size(vocab_size, card.vocab_size or 0, f"the token ids of {card.source!r}")
        _check_rows(packers, card)
        files = []
        if tokenizer and (name := tokenizers.tokenizer_file(tokenizer.spec)):
            (work / name).write_bytes(tokenizer.file_bytes)
            files.append({"file": name, "bytes": len(tokenizer.file_bytes)})
        files += [packers[split].write_starts() for split in HELD_OUT]
        card = dataclasses.replace(
            card,
            # the parts of a single text are not documents
            held_out_documents_in_train=None if card.split == splits.BY_PLACE else shared.count,
            files=files,
            splits={name: packer.card() for name, packer in packers.items()},
        )
        (work / CARD_FILE).write_text(json.dumps(seal(card.to_json()), indent=1) + "\n")
        for path in [*work.iterdir(), work]:
            _sync(path)
        work.rename(directory)
        _sync(directory.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)  # already renamed unless an error occurred


def _trained(tokens: TokenSource, source: Source, valid_fraction: float | None) -> Tokenizer | None:
    """Trains an `UntrainedBPE` on the training split; passes others on."""
    if not isinstance(tokens, UntrainedBPE):
        return tokens
    with reading(f"training {tokens.spec}", [source]) as on_read:
        documents = splits.split_documents(source, None, valid_fraction, on_read)
        texts = (splits.as_text(item.document) for item in documents if item.split == "train")
        return tokenizers.train_bpe(tokens.spec, texts)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _pack(
    directory: Path, card: DataCard, items: Iterable[Item], tokenizer: Tokenizer | None
) -> dict[str, "_Packer"]:
    """Writes the rows of all splits, tokenising in batches of bounded size whatever the documents' sizes."""
    packers = {split: _Packer(directory, split, card) for split in SPLITS}
    if card.template and tokenizer:
        pack_conversations(packers, items, tokenizer, card.sequence_length + 1, _BATCH)
        return packers
    drop_space = tokenizer is not None and tokenizers.adds_space(tokenizer)
    bos, eos = ([] if i is None else [i] for i in (card.bos_id, card.eos_id))
    batch: list[tuple[_Packer, Any, bool, list[int]]] = []
    waiting = 0

    def flush() -> None:
        nonlocal waiting
        parts = [part for _, part, _, _ in batch]
        encoded = tokenizer.encode_batch(parts) if tokenizer else parts
        for (packer, _, is_first, after), ids in zip(batch, encoded, strict=True):
            if is_first:
                packer.starts.append(packer.tokens)
            packer.add([*(bos if is_first else ()), *ids, *after])
        for packer in packers.values():
            packer.write_rows()
        batch.clear()
        waiting = 0

    for item in items:
        packer, document = packers[item.split], item.document
        packer.start_document(item)
        parts = list(tokenizers.pieces(document, drop_space)) if isinstance(document, str) else [document]
        for i, part in enumerate(parts):
            batch.append((packer, part, i == 0, eos if i == len(parts) - 1 else []))
            waiting += len(part)
            if waiting >= _BATCH:
                flush()
    flush()
    for packer in packers.values():
        packer.close()
    return packers


def _check_rows(packers: dict[str, "_Packer"], card: DataCard) -> None:
    total = sum(packer.documents for packer in packers.values())
    for split in ("train", "valid"):  # without rows for tuning, a run that asks for them is refused
        packer = packers[split]
        if card.split == splits.BY_HASH and packer.documents == 0:
            raise UserError(
                f"data.valid_fraction: {card.valid_fraction} leaves the {split} split without a document "
                f"({total} in all, assigned by hash); change the fraction or set data.valid_source"
            )
        if packer.rows == 0:
            name = card.valid_source if split == "valid" and card.valid_source else card.source
            if packer.documents and packer.counts:
                raise UserError(
                    f"{name}: none of the {packer.documents} conversations of the {split} split has a reply "
                    f"that ends within a row of {card.sequence_length + 1} tokens; use a longer "
                    "data.sequence_length"
                )
            raise UserError(
                f"{name}: too little text: the {split} split has {packer.tokens} tokens and one row needs "
                f"{card.sequence_length + 1}; use more text or a shorter data.sequence_length"
            )


class _Packer:
    """Cuts a stream of token ids into overlapping rows and writes them to the shards of one split."""

    def __init__(self, directory: Path, split: str, card: DataCard) -> None:
        self._directory, self._split, self._has_text = directory, split, card.tokenizer is not None
        self._length, self._dtype = card.sequence_length, np.dtype(card.dtype)
        self._pending: list[np.ndarray] = []
        self._writer: Any = None
        self._shards: list[dict[str, Any]] = []
        self._rows_hash, self._documents_hash = hashlib.sha256(), hashlib.sha256()
        self.documents = self.text_bytes = self.tokens = self.rows = 0
        self.starts = array("q")  # tokens before each document
        self.counts: dict[str, int] = {}  # of conversations, for the card
        self.max_id = -1

    def start_document(self, item: Item) -> None:
        self.documents += 1
        self.text_bytes += item.size
        self._documents_hash.update(item.sha256)

    def add(self, ids: list[int]) -> None:
        self.tokens += len(ids)
        self.max_id = max(self.max_id, max(ids, default=-1))
        if self.max_id <= np.iinfo(self._dtype).max:  # larger ids are refused in `_make`
            self._pending.append(np.array(ids, self._dtype))

    def add_row(self, ids: list[int]) -> None:
        """Writes one row of T + 1 ids."""
        self.tokens += self._length
        self._write(np.array(ids, self._dtype).tobytes())

    def write_rows(self) -> None:
        """Writes all complete rows."""
        if not self._pending:
            return
        stream = np.concatenate(self._pending)
        count = max(0, (len(stream) - 1) // self._length)
        content, step = stream.tobytes(), self._length * stream.itemsize
        size = step + stream.itemsize
        for start in range(0, count * step, step):
            self._write(content[start : start + size])
        self._pending = [stream[count * self._length :]]

    def _write(self, row: bytes) -> None:
        try:
            if self._writer is None:
                name = f"{self._split}-{len(self._shards):05d}.array_record"
                self._shards.append({"file": name, "rows": 0})
                # one row to a group, because they are read in random order
                self._writer = ArrayRecordWriter(str(self._directory / name), "group_size:1,uncompressed")
            self._writer.write(row)
        except RuntimeError as error:  # how the library reports a full disk
            raise OSError(str(error)) from None
        self._rows_hash.update(row)
        self.rows += 1
        self._shards[-1]["rows"] += 1
        if self._shards[-1]["rows"] * len(row) >= _SHARD:
            self.close()

    def close(self) -> None:
        """Finishes the current shard and checks that it can be read back."""
        if self._writer is None:
            return
        shard = self._shards[-1]
        path = self._directory / shard["file"]
        try:
            self._writer.close()
            reader = ArrayRecordReader(str(path))
            found = reader.num_records()
            reader.close()
        except RuntimeError as error:
            raise OSError(f"{path}: {error}") from None
        if found != shard["rows"]:
            raise OSError(f"{path}: wrote {shard['rows']} rows, found {found}")
        with open(path, "rb") as file:
            shard["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        shard["bytes"] = path.stat().st_size
        self._writer = None

    def write_starts(self) -> dict[str, Any]:
        """Writes where in the stream documents begin, int64; gives the file's entry in the card."""
        content = io.BytesIO()
        np.save(content, np.array(self.starts, "<i8"))
        (self._directory / documents_file(self._split)).write_bytes(content.getvalue())
        return {
            "file": documents_file(self._split),
            "bytes": len(content.getvalue()),
            "sha256": hashlib.sha256(content.getvalue()).hexdigest(),
        }

    def card(self) -> dict[str, Any]:
        """The split's entry in the data card."""
        return {
            "documents": self.documents,
            "documents_sha256": self._documents_hash.hexdigest(),  # of the documents' own hashes, in order
            "text_bytes": self.text_bytes if self._has_text else None,
            "tokens": self.tokens,
            "rows": self.rows,
            **self.counts,
            "sha256": self._rows_hash.hexdigest(),
            "shards": self._shards,
        }
