"""Text as rows of token ids in memory, packed like held-out rows but with no remainder dropped."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from mobilellm_jax.data import tokenizers
from mobilellm_jax.data.bars import reading
from mobilellm_jax.data.pipeline import padded_batches
from mobilellm_jax.data.rows import PADDING
from mobilellm_jax.data.sources import open_source
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError

_KINDS = ("bundled", "files", "hub", "tfds")


@dataclasses.dataclass(frozen=True)
class Text:
    """Letters: R rows of S = T + 1 tokens; the last row is padded with `PADDING`.

    Attributes:
      rows_RS: int32; the packing is `card.PACKING`, except that nothing is dropped.
      documents, text_bytes: size of the text.
      tokens: predicted tokens: all but the first, with EOS and BOS of documents, if any.
    """

    rows_RS: np.ndarray
    documents: int
    text_bytes: int
    tokens: int

    def batches(self, batch_size: int, process_index: int, process_count: int) -> Iterator[np.ndarray]:
        """Yields int32 [B / process_count, T + 1], as `pipeline.eval_batches` does."""
        order = np.arange(len(self.rows_RS))
        return padded_batches(self.rows_RS.__getitem__, order, batch_size, process_index, process_count)


def read_text(spec: str, text_field: str, tokenizer: Tokenizer, sequence_length: int, add_bos: bool) -> Text:
    """Reads all text of a source into rows that predict `sequence_length` tokens.

    `add_bos` begins every document with BOS, where the tokenizer has one.

    Raises:
      UserError: the source is not text, cannot be read, or is empty.
    """
    kind = spec.partition(":")[0]
    if kind not in _KINDS or (kind == spec) != (kind == "bundled"):
        raise UserError(
            f"--text: {spec!r} is not valid; expected bundled, files:<glob>, hub:<name> or tfds:<name>"
        )
    drop_space = tokenizers.adds_space(tokenizer)
    bos_id = tokenizer.bos_id if add_bos else None
    before, after = ([] if i is None else [i] for i in (bos_id, tokenizer.eos_id))
    parts, documents, text_bytes = [], 0, 0
    source = open_source(spec, text_field, "--text")
    with reading(f"reading {spec}", [source]) as on_read:
        for document in source.read(on_read):
            if not isinstance(document, str) or not document:
                continue
            encoded = tokenizer.encode_batch(list(tokenizers.pieces(document, drop_space)))
            parts += [np.array(ids, np.int32) for ids in (before, *encoded, after)]
            documents, text_bytes = documents + 1, text_bytes + len(document.encode())
    stream = np.concatenate([np.empty(0, np.int32), *parts])
    tokens = len(stream) - 1
    if tokens < 1:
        raise UserError(f"--text: {spec!r} has {len(stream)} token(s); expected at least 2")
    starts_R = np.arange(0, tokens, sequence_length)
    stream = np.pad(stream, (0, sequence_length), constant_values=PADDING)
    rows_RS = stream[starts_R[:, None] + np.arange(sequence_length + 1)[None, :]]
    return Text(rows_RS, documents, text_bytes, tokens)
