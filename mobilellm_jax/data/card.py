"""The data card: what prepared rows are made of, and what came of it."""

import dataclasses
import hashlib
import json
from typing import Any

from mobilellm_jax.data import splits
from mobilellm_jax.data.tokenizers import Tokenizer, UntrainedBPE, tokenizer_card

FORMAT_VERSION = 2  # raise it when the same input would give other rows, or another card
PACKING = (
    "documents, each BOS + ids + EOS where the tokenizer has them, joined into one stream; row i holds "
    "stream[i T : i T + T + 1], so neighbours share one token and every token but the first is predicted "
    "once; the remainder is dropped"
)
ATTENTION = "to all earlier tokens of the row, across the borders of documents"
CUTS = "long texts are encoded in pieces that begin at a single space"
# Not in the JSON where they are None.
_ADDED = ("cuts", "held_out_documents_in_train", "files", "splits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataCard:
    """Facts about rows on disk, in the order and by the names of the JSON; records of runs keep them.

    Attributes:
      source, valid_source: as `Source.name`; the hashes are of their files.
      python_version: where the bundled text is that of the running Python.
      tokenizer: the spec without directories; None for token ids.
      tokenizer_sha256, vocab_size, bos_id, eos_id: None until a tokenizer is trained, or token ids are read.
      split: one of the sentences in `splits`.
      cuts: `CUTS`, where the tokenizer adds a space.
      held_out_documents_in_train: None where the split is by place.
      files, splits: what is in the directory; None until the rows are written.
    """

    format: int = FORMAT_VERSION
    source: str
    source_sha256: str
    valid_source: str | None
    valid_source_sha256: str | None
    valid_fraction: float | None
    text_field: str
    python_version: str | None
    tokenizer: str | None
    tokenizer_sha256: str | None = None
    vocab_size: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    packing: str = PACKING
    sequence_length: int
    dtype: str
    split: str
    attention: str = ATTENTION
    cuts: str | None = None
    held_out_documents_in_train: int | None = None
    files: list[dict[str, Any]] | None = None
    splits: dict[str, dict[str, Any]] | None = None

    def with_tokenizer(self, tokens: Tokenizer | UntrainedBPE | None) -> "DataCard":
        """Fills in what the tokenizer says of itself."""
        if tokens is None:
            return self
        if isinstance(tokens, UntrainedBPE):
            return dataclasses.replace(self, tokenizer=tokens.spec)
        return dataclasses.replace(self, **tokenizer_card(tokens))

    def directory_name(self) -> str:
        """Kind of the source, and a hash of everything that determines the rows.

        Facts that the card has had from the start always count; those that came later only where they are not
        what they always were, so that directories of earlier versions are found.
        """
        later = ("attention", "held_out_documents_in_train", "files", "splits")
        counts = {name: value for name, value in self.to_json().items() if name not in later}
        if self.split == splits.BY_HASH:
            del counts["split"]
        identity = json.dumps({**counts, "python_version": None}, sort_keys=True)
        return f"{self.source.partition(':')[0]}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None or name not in _ADDED}
