"""Tokenizers in the form that llama.cpp takes. One that it would split differently is refused by name."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from mobilellm_jax.data import Tokenizer
from mobilellm_jax.data.tokenizers import SentencePieceTokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats.huggingface import bytes_tokenizer
from mobilellm_jax.storage.sealed import parse

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # SentencePiece has the same numbers
_NO_MERGE = "\ue000 \ue000"  # llama.cpp wants at least one; text as bytes has none of these characters


class Vocabulary(NamedTuple):
    """The tokenizer of a GGUF file.

    Attributes:
      model: "gpt2", which is byte-level BPE, or "llama", which is SentencePiece.
      pre: name of the rule that cuts a text into words.
      tokens, types: of all ids of the model.
      merges: pairs in order, of byte-level BPE.
      scores: of all ids, of SentencePiece.
      unknown: id of the unknown token, of SentencePiece.
      adds_space: whether a text is encoded as if a space stood before it, of SentencePiece.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    unknown: int
    adds_space: bool


def vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The vocabulary of a model with `size` ids; those that the tokenizer does not use get a name.

    Raises:
      UserError: llama.cpp has no form for the tokenizer.
    """
    if tokenizer.eos_id is None:
        raise UserError(
            f"{tokenizer.spec}: has no EOS, and llama.cpp would take another token for it; use a tokenizer "
            "with one, or --format=hf"
        )
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _sentencepiece(tokenizer, size)
    return _byte_level(tokenizer, size)


def chat_template(folder: Path) -> str | None:
    """The chat template beside a tokenizer that was imported; None if there is none."""
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    value = parse(settings.read_bytes()).get("chat_template") if settings.is_file() else None
    return value if isinstance(value, str) else None  # several with names are a list


def _refuse(tokenizer: Tokenizer, what: str) -> UserError:
    return UserError(f"{tokenizer.spec}: {what}, which llama.cpp would encode differently; use --format=hf")


def _fill(found: dict[int, tuple[str, int]], size: int) -> tuple[list[str], list[int]]:
    """Tokens and types of all ids, of which some are not used."""
    rows = [found.get(i, (f"[PAD{i}]", _UNUSED)) for i in range(size)]
    return [token for token, _ in rows], [kind for _, kind in rows]


# --- byte-level BPE -----------------------------------------------------------------------------------------


def _byte_level(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The form of a tokenizer.json, which is GPT-2's; bytes have no merges."""
    text = tokenizer.file_bytes.decode() or bytes_tokenizer()
    values = json.loads(text)
    _check_byte_level(tokenizer, values)
    kinds = {_id_of(added): _kind_of(added) for added in values["added_tokens"]}
    known = tokenizers.Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    found = {i: (token, kinds.get(i, _NORMAL)) for token, i in known.items()}
    merges = values["model"]["merges"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    tokens, types = _fill(found, size)
    return Vocabulary("gpt2", "gpt-2", tokens, types, merges or [_NO_MERGE], [], 0, False)


def _id_of(added: dict[str, Any]) -> int:
    return added["id"]


def _kind_of(added: dict[str, Any]) -> int:
    return _CONTROL if added["special"] else _USER_DEFINED


def _check_byte_level(tokenizer: Tokenizer, values: dict[str, Any]) -> None:
    """Checks that a tokenizer.json is plain byte-level BPE with GPT-2's words."""
    of, words = values["model"], values["pre_tokenizer"] or {}
    if of["type"] != "BPE":
        raise _refuse(tokenizer, f"is a {of['type']} model, and not BPE")
    if values["normalizer"] is not None:
        raise _refuse(tokenizer, f"normalizes text ({values['normalizer']['type']})")
    if words.get("type") != "ByteLevel":
        raise _refuse(tokenizer, f"cuts a text by {words.get('type')}, and not as GPT-2 does")
    if words["add_prefix_space"] or not (words["use_regex"] or not of["merges"]):
        raise _refuse(tokenizer, "cuts a text by ByteLevel with other options than GPT-2's")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if of.get(option):
            raise _refuse(tokenizer, f"has the option {option}={of[option]!r}")
    missing = [c for c in tokenizers.pre_tokenizers.ByteLevel.alphabet() if c not in of["vocab"]]
    if missing:
        raise _refuse(tokenizer, f"has no token for {len(missing)} of 256 bytes")
    stripping = [
        added["content"]
        for added in values["added_tokens"]
        if not added["special"] and any(added[flag] for flag in ("lstrip", "rstrip", "single_word"))
    ]
    if stripping:
        raise _refuse(tokenizer, f"has the token {stripping[0]!r}, which takes the spaces beside it")


# --- SentencePiece ------------------------------------------------------------------------------------------


def _sentencepiece(tokenizer: SentencePieceTokenizer, size: int) -> Vocabulary:
    """The form of a SentencePiece model like Llama's: BPE, with bytes for unknown characters."""
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    proto = messages.ModelProto.FromString(tokenizer.file_bytes)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.BPE:
        raise _refuse(tokenizer, "is a SentencePiece model of another kind than BPE")
    if not trainer.byte_fallback:
        raise _refuse(tokenizer, "has no bytes for unknown characters (byte_fallback)")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise _refuse(
            tokenizer,
            f"normalizes text ({normalizer.name or 'charsmap'}, "
            f"remove_extra_whitespaces={normalizer.remove_extra_whitespaces})",
        )
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise _refuse(tokenizer, "puts the spaces after words")
    found = {i: (piece.piece, piece.type) for i, piece in enumerate(proto.pieces)}
    tokens, types = _fill(found, size)
    scores = [piece.score for piece in proto.pieces] + [0.0] * (size - len(found))
    unknown, adds_space = trainer.unk_id, normalizer.add_dummy_prefix
    return Vocabulary("llama", "default", tokens, types, [], scores, unknown, adds_space)
