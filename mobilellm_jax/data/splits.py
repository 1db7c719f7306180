"""The split of documents into training and held-out text, and checks that the two do not overlap."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from mobilellm_jax.config import DataConfig
from mobilellm_jax.data.sources import Document, OnRead, Source
from mobilellm_jax.errors import UserError

# Values of `DataCard.split`.
BY_HASH = "by document: its own hash decides, so that exact duplicates fall on one side"
BY_SOURCE = "valid_source, whole; documents that are also trained on are counted, shared passages are not"
BY_PLACE = "the end of the one text, from the paragraph, else line, else word nearest to valid_fraction"


class Item(NamedTuple):
    """A document, or a part of the only one.

    Attributes:
      split: "train" or "valid".
      sha256: of its content.
      size: bytes.
    """

    document: Document
    split: str
    sha256: bytes
    size: int


def check_apart(data: DataConfig, shared: frozenset[str]) -> None:
    """Raises UserError where `data.valid_source` is `data.source`, or shares files with it: `shared`."""
    if shared or data.valid_source == data.source:
        names = sorted(map(os.path.basename, shared)) or [data.source]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(
            f"data.valid_source: {data.valid_source!r} shares text with data.source={data.source!r}: "
            f"{', '.join(names[:3])}{more}; name other text, or leave it '' to hold out a part of data.source"
        )


def split_documents(
    source: Source, held_out: Source | None, valid_fraction: float | None, on_read: OnRead
) -> Iterator[Item]:
    """Yields every document with its split; empty documents are skipped.

    With a fraction, a document's own hash decides: duplicates fall on one side, and a document keeps its side
    when others are added. A text that is the only document is cut in two instead.
    """
    for document in source.read(on_read):
        if not document:
            continue
        if valid_fraction is not None and source.is_one_text and isinstance(document, str):
            at = _cut(document, valid_fraction)
            parts = {"train": document[:at], "valid": document[at:]}
            yield from (_item(part, split) for split, part in parts.items() if part)
            continue
        item = _item(document, "train")
        fraction = int.from_bytes(item.sha256[:8]) / 2**64
        is_valid = valid_fraction is not None and fraction < valid_fraction
        yield item._replace(split="valid") if is_valid else item
    for document in held_out.read(on_read) if held_out else ():
        if document:
            yield _item(document, "valid")


def _item(document: Document, split: str) -> Item:
    content = document.encode() if isinstance(document, str) else np.array(document, "<u4").tobytes()
    return Item(document, split, hashlib.sha256(content).digest(), len(content))


def _cut(text: str, valid_fraction: float) -> int:
    """The index where the held-out end begins: the border nearest to `valid_fraction`.

    A border that would halve the smaller part is too far away; the next kind of border is tried then.
    """
    target = round(len(text) * (1 - valid_fraction))
    reach = min(target, len(text) - target) // 2
    for border in ("\n\n", "\n", " "):
        before = text.rfind(border, target - reach, target)
        after = text.find(border, target - len(border) + 1, target + reach)
        ends = [at + len(border) for at in (before, after) if at >= 0]
        if ends:
            return min(ends, key=lambda end: abs(end - target))
    return target


class Shared:
    """Counts held-out documents with an exact duplicate in the training split."""

    def __init__(self, held_out: Source | None) -> None:
        documents = held_out.read(lambda count: None) if held_out else ()
        self._held_out = Counter(_item(document, "valid").sha256 for document in documents if document)
        self._found: set[bytes] = set()

    def noted(self, items: Iterable[Item]) -> Iterator[Item]:
        """Passes the items on, recording training documents that are also held out."""
        for item in items:
            if item.split == "train" and item.sha256 in self._held_out:
                self._found.add(item.sha256)
            yield item

    @property
    def count(self) -> int:
        """Held-out documents found in training so far."""
        return sum(self._held_out[sha256] for sha256 in self._found)
