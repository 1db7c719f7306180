"""The data card: the JSON record of the inputs, hashes and sizes of prepared rows."""

import dataclasses
import hashlib
import json
from typing import Any

from mobilellm_jax.data.tokenizers import Tokenizer, UntrainedBPE, tokenizer_card

FORMAT_VERSION = 3  # raise it when the same input would give other rows, or another card
PACKING = (
    "documents, each BOS + ids + EOS where the tokenizer has them, joined into one stream; row i holds "
    "stream[i T : i T + T + 1], so neighbours share one token and every token but the first is predicted "
    "once; the remainder is dropped"
)
CONVERSATIONS = (
    "a row holds whole conversations and padding; one that does not fit begins the next row, and one that is "
    "longer than a row ends after its last reply that fits; targets are the assistant's texts and their EOS, "
    "all other ids are stored as ~id"
)
ATTENTION = "to all earlier tokens of the row, across the borders of documents"
CUTS = "long texts are encoded in pieces that begin at a single space"
# Not in the JSON where they are None.
_ADDED = ("cuts", "template", "held_out_documents_in_train", "files", "splits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataCard:
    """The card of rows on disk, in the field order of its JSON; run records copy it.

    Attributes:
      source, valid_source: as `Source.name`; the hashes cover their files.
      python_version: of the running Python, where it supplies the bundled text; else None.
      tokenizer: the spec without directories; None for token ids.
      tokenizer_sha256, vocab_size, bos_id, eos_id: None until a tokenizer is trained, or token ids are read.
      split: one of the sentences in `splits`.
      cuts: `CUTS`, where the tokenizer adds a space.
      template: of conversations, `chat.TEMPLATE`; None for other documents.
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
    template: str | None = None
    held_out_documents_in_train: int | None = None
    files: list[dict[str, Any]] | None = None
    splits: dict[str, dict[str, Any]] | None = None

    def with_tokenizer(self, tokens: Tokenizer | UntrainedBPE | None) -> "DataCard":
        """Fills in the fields that depend on the tokenizer."""
        if tokens is None:
            return self
        if isinstance(tokens, UntrainedBPE):
            return dataclasses.replace(self, tokenizer=tokens.spec)
        return dataclasses.replace(self, **tokenizer_card(tokens))

    def directory_name(self) -> str:
        """<kind of source>-<hash of all fields that determine the rows>."""
        others = ("python_version", "attention", "held_out_documents_in_train", "files", "splits")
        counts = {name: value for name, value in self.to_json().items() if name not in others}
        identity = json.dumps(counts, sort_keys=True)
        return f"{self.source.partition(':')[0]}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None or name not in _ADDED}
