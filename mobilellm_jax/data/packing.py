"""Rows of whole conversations, see `card.CONVERSATIONS`."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mobilellm_jax.config import DataConfig
from mobilellm_jax.data import chat
from mobilellm_jax.data.rows import PADDING
from mobilellm_jax.data.splits import Item
from mobilellm_jax.data.tokenizers import Tokenizer, UntrainedBPE
from mobilellm_jax.errors import UserError


def check_template(data: DataConfig, tokens: Tokenizer | UntrainedBPE) -> None:
    """Raises UserError for conversations and a tokenizer that cannot say where a reply ends."""
    if data.is_conversations and isinstance(tokens, Tokenizer) and tokens.eos_id is None:
        raise UserError(
            f"data.tokenizer: {data.tokenizer!r} has no EOS, which ends the replies of {data.source!r}; use "
            "one that has"
        )


def pack_conversations(
    packers: Mapping[str, Any], items: Iterable[Item], tokenizer: Tokenizer, size: int, batch: int
) -> None:
    """Packs conversations into rows of `size` ids and closes the packers, one for each split.

    At most `batch` bytes and one conversation are tokenised at a time.
    """
    rows = {split: RowOfTurns(size) for split in packers}
    for several in _batched(items, batch):
        turns = [item.document for item in several if isinstance(item.document, tuple)]
        for item, ids, said in zip(several, chat.encode(tokenizer, turns), turns, strict=True):
            packer, row = packers[item.split], rows[item.split]
            packer.start_document(item)
            for full in row.add(ids, said):
                packer.add_row(full)
            packer.starts.append(packer.rows * size + row.start)
    for split, packer in packers.items():
        for last in rows[split].end():
            packer.add_row(last)
        packer.counts = rows[split].counts
        packer.close()


def _batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields documents together until they have `size` bytes."""
    batch: list[Item] = []
    waiting = 0
    for item in items:
        batch.append(item)
        waiting += item.size
        if waiting >= size:
            yield batch
            batch, waiting = [], 0
    if batch:
        yield batch


class RowOfTurns:
    """Fills rows of `size` = T + 1 ids with whole conversations, in order.

    Attributes:
      start: place in the current row where the last conversation begins.
      counts: "targets", "target_bytes" (of the replies in rows), "padding" (ids of it), "cut" (conversations
        longer than a row, of which the first turns are used) and "left_out" (those whose first reply ends
        beyond a row).
    """

    def __init__(self, size: int) -> None:
        self.size, self.start = size, 0
        self._row: list[int] = []
        self.counts = dict.fromkeys(("targets", "target_bytes", "padding", "cut", "left_out"), 0)

    def add(self, ids: list[int], turns: chat.Conversation) -> Iterator[list[int]]:
        """Takes the ids of a conversation; yields the row that is full, if one is."""
        kept = chat.fitting(ids, self.size)
        wanted = chat.fitting(ids, len(ids))  # without what the other side says last
        self.counts["cut"] += 0 < len(kept) < len(wanted)
        self.counts["left_out"] += not kept
        if len(self._row) + len(kept) > self.size:
            yield from self.end()
        self.start = len(self._row)
        self._row += kept
        self.counts["targets"] += sum(i >= 0 for i in kept)
        said = [turn.text for turn in turns if turn.role in chat.MADE]
        replies = sum(kept[n - 1] < 0 <= kept[n] for n in range(1, len(kept)))
        self.counts["target_bytes"] += sum(len(text.encode()) for text in said[:replies])

    def end(self) -> Iterator[list[int]]:
        """Yields the current row, padded, unless it is empty; the next row is empty."""
        if self._row:
            padding = self.size - len(self._row)
            self.counts["padding"] += padding
            yield [*self._row, *[PADDING] * padding]
            self._row = []
