"""Rows on disk: a prepared directory, which is whole or refused."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from mobilellm_jax.data.tokenizers import CARD_FILE
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.sealed import parse, unseal

FORMAT_VERSION = 2  # raise it when the same input would give other rows, or another card
SPLITS = ("train", "valid")


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Rows on disk.

    Attributes:
      directory: where they are; its name says what they are made of.
      card: the data card, ready for JSON and free of absolute paths: source, hashes, tokenizer, sizes.
    """

    directory: Path
    card: dict[str, Any]

    @property
    def sequence_length(self) -> int:
        """T; a row holds T + 1 token ids."""
        return self.card["sequence_length"]

    def num_rows(self, split: str) -> int:
        """Returns the number of rows of "train" or "valid"."""
        return self.card["splits"][split]["rows"]

    def bytes_per_token(self, split: str) -> float | None:
        """Returns bytes of text per token predicted; None where rows come from token ids without text."""
        size, tokens = (self.card["splits"][split][name] for name in ("text_bytes", "tokens"))
        return None if size is None else size / (tokens - 1)  # nothing predicts the first token


def open_prepared(directory: str | os.PathLike[str]) -> PreparedData:
    """Opens a prepared directory and checks that its files are there, whole.

    Of rows only the sizes: each has a checksum, which array_record looks at when it reads them.

    Raises:
      UserError: a file is missing or of the wrong size, or the card is damaged; the message names it.
    """
    directory = Path(directory)
    again = f"delete the directory {directory} and prepare again"
    try:
        card = parse((directory / CARD_FILE).read_bytes())
        if card["format"] != FORMAT_VERSION:
            raise UserError(f"{directory}: format {card['format']}, not {FORMAT_VERSION}; {again}")
        card = unseal(card)
        files = [*card["files"], *(shard for split in SPLITS for shard in card["splits"][split]["shards"])]
        sizes = {entry["file"]: entry["bytes"] for entry in files}
    except OSError as error:
        raise UserError(f"{directory / CARD_FILE}: {error.strerror}; {again}") from None
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory / CARD_FILE}: not a data card: {error}; {again}") from None
    for name, size in sizes.items():
        if name in ("", "..") or os.path.basename(name) != name:
            raise UserError(f"{directory / CARD_FILE}: {name!r} is not the name of a file in it; {again}")
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "missing" if found is None else f"{found} bytes, not the {size} of the data card"
            raise UserError(f"{path}: {state}; {again}")
    return PreparedData(directory, card)
