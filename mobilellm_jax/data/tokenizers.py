"""Tokenizers: text to token ids and back, behind one small interface.

Specs: "bytes", "bpe:<vocabulary size>" (trained on the corpus), "sentencepiece:<file.model>" and
"huggingface:<tokenizer.json>". `load_tokenizer` opens the copy saved beside prepared rows.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import tokenizers

from mobilellm_jax.errors import UserError, of_extra
from mobilellm_jax.storage.files import AnyPath, path_of, reason
from mobilellm_jax.storage.sealed import parse

CARD_FILE = "card.json"
TEMPLATE_FILE = "chat_template.jinja"  # the name that transformers reads
_FILES = {"bpe": "tokenizer.json", "huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}
_BPE_SPECIAL = ["<bos>", "<eos>"]
_BPE_MIN_SIZE = 256 + len(_BPE_SPECIAL)
# Usual names of BOS and EOS, for a tokenizer.json without a tokenizer_config.json.
_BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>")
_EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>")


@runtime_checkable  # the tests check every annotation
class Tokenizer(Protocol):
    """The interface of all tokenizers.

    Attributes:
      spec: the spec, with directories left out.
      sha256: hash of all that determines its ids.
      vocab_size: one more than the largest id.
      bos_id, eos_id: ids of the begin and end marks of a document; None where it has none.
      file_bytes: content of its file; empty for "bytes".
    """

    spec: str
    sha256: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    file_bytes: bytes

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, encoded in parallel, without BOS and EOS, which text never encodes to."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; BOS, EOS and ids outside the vocabulary are skipped."""
        ...


class BytesTokenizer:
    """One token per byte of UTF-8."""

    spec = "bytes"
    sha256 = hashlib.sha256(b"bytes").hexdigest()
    vocab_size = 258
    bos_id: int | None = 256
    eos_id: int | None = 257
    file_bytes = b""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode(errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model; raises ValueError if `file_bytes` is not one, UserError without its package."""

    def __init__(self, spec: str, file_bytes: bytes) -> None:
        self.spec, self.file_bytes = spec, file_bytes
        self.sha256 = hashlib.sha256(file_bytes).hexdigest()
        # Here and not above: the package is an extra.
        self._processor: Any = of_extra(
            "sentencepiece", "sentencepiece", "a SentencePiece model"
        ).SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(file_bytes)
        except RuntimeError:
            raise ValueError("not a SentencePiece model") from None
        self.vocab_size = self._processor.vocab_size()
        bos_id, eos_id = self._processor.bos_id(), self._processor.eos_id()
        self.bos_id = bos_id if bos_id >= 0 else None
        self.eos_id = eos_id if eos_id >= 0 else None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, num_threads=os.cpu_count() or 1)

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def piece(self, token_id: int) -> str:
        """The entry of the vocabulary, as it stands in the model's file."""
        return self._processor.id_to_piece(token_id)


class HuggingFaceTokenizer:
    """A tokenizer.json, by the `tokenizers` library; raises ValueError if `file_bytes` is not one."""

    def __init__(self, spec: str, file_bytes: bytes, bos_id: int | None, eos_id: int | None) -> None:
        self.spec, self.file_bytes, self.bos_id, self.eos_id = spec, file_bytes, bos_id, eos_id
        self.sha256 = hashlib.sha256(file_bytes + f"\0{bos_id} {eos_id}".encode()).hexdigest()
        self._tokenizer = _from_json(file_bytes)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # else "<eos>" written in a document ends it; the file does not keep this setting
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(
            [int(i) for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=True
        )


@dataclasses.dataclass(frozen=True)
class UntrainedBPE:
    """A tokenizer not yet trained on the training text, "bpe:<vocabulary size>".

    Raises:
      UserError: the size is not valid.
    """

    spec: str

    def __post_init__(self) -> None:
        size = self.spec.partition(":")[2]
        if not (size.isascii() and size.isdecimal() and int(size) >= _BPE_MIN_SIZE):
            raise UserError(
                f"data.tokenizer: {self.spec!r} is not valid; expected bpe:<vocabulary size>, an integer of "
                f"at least {_BPE_MIN_SIZE} (256 bytes, {' and '.join(_BPE_SPECIAL)})"
            )

    @property
    def vocab_size(self) -> int:
        """The requested size; training on little text gives fewer ids."""
        return int(self.spec.partition(":")[2])


def of_spec(spec: str) -> Tokenizer | UntrainedBPE:
    """The tokenizer of a `data.tokenizer` spec; UserError as in `UntrainedBPE` and `open_tokenizer`."""
    return UntrainedBPE(spec) if spec.startswith("bpe:") else open_tokenizer(spec)


def open_tokenizer(spec: str) -> Tokenizer:
    """Opens an existing tokenizer: "bytes", "sentencepiece:<file>" or "huggingface:<file>".

    Raises:
      UserError: the file is missing or of another kind.
    """
    kind, _, rest = spec.partition(":")
    if kind == "bytes":
        return BytesTokenizer()
    path = Path(rest).expanduser()
    try:
        file_bytes = path.read_bytes()
        name = f"{kind}:{path.name}"
        if kind == "sentencepiece":
            return SentencePieceTokenizer(name, file_bytes)
        return HuggingFaceTokenizer(name, file_bytes, *_find_special(path, file_bytes))
    except OSError as error:
        raise UserError(f"data.tokenizer: {spec!r}: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"data.tokenizer: {spec!r}: {error}") from None


def train_bpe(spec: str, texts: Iterable[str]) -> Tokenizer:
    """Trains byte-level BPE; `texts` is read once, as a stream.

    The vocabulary is smaller than requested when no further pair occurs twice in the texts.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=UntrainedBPE(spec).vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=_BPE_SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return HuggingFaceTokenizer(spec, tokenizer.to_str().encode(), bos_id=0, eos_id=1)


def tokenizer_card(tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields of a data card that describe a tokenizer."""
    t = tokenizer
    return {
        "tokenizer": t.spec,
        "tokenizer_sha256": t.sha256,
        "vocab_size": t.vocab_size,
        "bos_id": t.bos_id,
        "eos_id": t.eos_id,
    }


def tokenizer_file(spec: str | None) -> str | None:
    """The name of the tokenizer's file in a prepared directory; None for "bytes" and token ids."""
    return _FILES.get((spec or "").partition(":")[0])


def save_tokenizer(tokenizer: Tokenizer, directory: AnyPath, template: str | None = None) -> None:
    """Creates `directory` with a copy of a tokenizer, for `load_tokenizer`, and of a template of chats."""
    directory.mkdir(parents=True, exist_ok=True)
    if template is not None:
        (directory / TEMPLATE_FILE).write_text(template)
    name = tokenizer_file(tokenizer.spec)
    if name is not None:
        (directory / name).write_bytes(tokenizer.file_bytes)
    (directory / CARD_FILE).write_text(json.dumps(tokenizer_card(tokenizer), indent=1) + "\n")


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Opens the tokenizer in a prepared directory, or in one that `save_tokenizer` wrote.

    Raises:
      UserError: the directory is neither, was prepared from token ids, or its tokenizer is corrupt.
    """
    directory = path_of(directory)
    try:
        card = parse((directory / CARD_FILE).read_bytes())
        spec = card["tokenizer"]
        if spec is None:
            raise UserError(f"{directory}: has no tokenizer, as its data were prepared from token ids")
        name = tokenizer_file(spec)
        file_bytes = (directory / name).read_bytes() if name else b""
        if name is None:
            tokenizer: Tokenizer = BytesTokenizer()
        elif spec.startswith("sentencepiece:"):
            tokenizer = SentencePieceTokenizer(spec, file_bytes)
        else:
            tokenizer = HuggingFaceTokenizer(spec, file_bytes, card["bos_id"], card["eos_id"])
        if tokenizer.sha256 != card["tokenizer_sha256"]:
            raise ValueError(f"{name} does not match its checksum in {CARD_FILE}")
    except OSError as error:
        raise UserError(
            f"{directory}: cannot read the tokenizer: {reason(error)}: {error.filename}"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{directory}: corrupt tokenizer: {error}; restore it or, if the directory is prepared data, "
            "delete the directory and run again"
        ) from None
    return tokenizer


_CUT = re.compile(r"(?<=\S) (?=\S)")
_PIECE = 1 << 14  # characters


def pieces(text: str, drop_space: bool = False, size: int = _PIECE) -> Iterator[str]:
    """Cuts a text into pieces of mostly `size` to 2 `size` characters, whose joined ids are the text's.

    Tokenizers need a hundred times the memory of the text they are given, and SentencePiece is twice as fast
    on pieces. A cut is made at a single space, where tokens begin too; where there is none, anywhere. A
    tokenizer that adds a space would add one there, so its piece extends to the next single space.

    Args:
      text: any text.
      drop_space: drop the space at a cut, instead of beginning the second piece with it; see `adds_space`.
      size: least length of all pieces but the last.
    """
    start = 0
    while len(text) - start > 2 * size:
        cut = _CUT.search(text, start + size, len(text) if drop_space else start + 2 * size)
        if cut is None and drop_space:
            break
        end = cut.start() if cut else start + size
        yield text[start:end]
        start = end + 1 if cut and drop_space else end
    yield text[start:]


def adds_space(tokenizer: Tokenizer) -> bool:
    """Whether it encodes a text as if a space stood before it, as most SentencePiece models do."""
    word, words = tokenizer.encode_batch(["a", "a a"])
    return words == word + word


def adds_bos(tokenizer: Tokenizer, directory: AnyPath) -> bool:
    """Whether transformers would put BOS before a text, given the files in `directory`."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _from_json(tokenizer.file_bytes).encode("").ids[:1] == [tokenizer.bos_id]
    path = directory / "tokenizer_config.json"
    settings = parse(path.read_text()) if path.exists() else {}
    return settings.get("add_bos_token", True)  # SentencePiece: Llama's default


def _from_json(file_bytes: bytes) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(file_bytes.decode())
    except Exception as error:  # the library raises no narrower type
        raise ValueError(f"not a tokenizer.json of the tokenizers library ({error})") from None


def _find_special(path: Path, file_bytes: bytes) -> tuple[int | None, int | None]:
    """Ids of BOS and EOS, from tokenizer_config.json beside the file, else by their usual names."""
    tokenizer = _from_json(file_bytes)
    config_path = path.with_name("tokenizer_config.json")
    names: list[Sequence[str]] = [_BOS_NAMES, _EOS_NAMES]
    if config_path.exists():
        config = parse(config_path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError(f"{config_path.name} beside it is not a JSON object")
        tokens = (config.get("bos_token"), config.get("eos_token"))  # a string, {"content": string} or null
        contents = [token.get("content") if isinstance(token, dict) else token for token in tokens]
        names = [[content] if content else [] for content in contents]
    special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    bos_id, eos_id = (next((special[n] for n in group if n in special), None) for group in names)
    return bos_id, eos_id
