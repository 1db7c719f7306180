"""The splits of documents: training text, and held-out text for tuning and for comparison.

Of the held-out documents every third, beginning with the second, is "tuning", the others are "valid":
learning rates are chosen on other text than designs are compared on.
"""

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from mobilellm_jax.config import DataConfig
from mobilellm_jax.data import chat
from mobilellm_jax.data.sources import Document, OnRead, Source
from mobilellm_jax.errors import UserError

SPLITS = ("train", "tuning", "valid")
HELD_OUT = ("tuning", "valid")
# Values of `DataCard.split`.
BY_HASH = (
    "by document: its own hash decides, so that exact duplicates are trained on or held out together; of the "
    "held-out documents every third, from the second on, is for tuning"
)
BY_SOURCE = (
    "valid_source is held out: every third document, from the second on, or the first third of a single "
    "text, for tuning; documents that are also trained on are counted, shared passages are not"
)
BY_PLACE = (
    "the end of the one text, from the paragraph, else line, else word nearest to valid_fraction; the first "
    "third of it is for tuning"
)


class Item(NamedTuple):
    """A document, or a part of the only one.

    Attributes:
      split: one of `SPLITS`.
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

    With a fraction, a document's own hash decides whether it is held out: duplicates are held out together,
    and a document keeps its side when others are added. A text that is the only document is cut instead.
    """
    turns = itertools.cycle(("valid", "tuning", "valid"))
    for document in source.read(on_read):
        if not document:
            continue
        if valid_fraction is not None and source.is_one_text and isinstance(document, str):
            at = _cut(document, valid_fraction)
            yield from _items(document[:at], "train")
            yield from _held_out_parts(document[at:])
            continue
        item = _item(document, "train")
        fraction = int.from_bytes(item.sha256[:8]) / 2**64
        is_held_out = valid_fraction is not None and fraction < valid_fraction
        yield item._replace(split=next(turns)) if is_held_out else item
    for document in held_out.read(on_read) if held_out else ():
        if held_out and held_out.is_one_text and isinstance(document, str):
            yield from _held_out_parts(document)
        elif document:
            yield _item(document, next(turns))


def _held_out_parts(text: str) -> Iterator[Item]:
    """Cuts the only held-out text: its first third is for tuning."""
    at = _cut(text, 2 / 3)
    yield from _items(text[:at], "tuning")
    yield from _items(text[at:], "valid")


def _items(document: Document, split: str) -> Iterator[Item]:
    if document:
        yield _item(document, split)


def _item(document: Document, split: str) -> Item:
    is_text = isinstance(document, str | tuple)
    content = as_text(document).encode() if is_text else np.array(document, "<u4").tobytes()
    return Item(document, split, hashlib.sha256(content).digest(), len(content))


def as_text(document: Document) -> str:
    """The text of a document; of a conversation as in its template, without BOS and EOS."""
    return chat.render(document) if isinstance(document, tuple) else str(document)


def _cut(text: str, fraction: float) -> int:
    """The index where the end that holds `fraction` of the text begins: the nearest border.

    A border that would halve the smaller part is too far away; the next kind of border is tried then.
    """
    target = round(len(text) * (1 - fraction))
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
