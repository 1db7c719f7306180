"""Data cards: what is in the JSON, and which facts name the directory of rows."""

import dataclasses
import hashlib
import json

import pytest

from mobilellm_jax.data import splits
from mobilellm_jax.data.card import CUTS, PACKING, DataCard
from mobilellm_jax.data.tokenizers import BytesTokenizer, UntrainedBPE

CARD = DataCard(
    source="files:a.jsonl",
    source_sha256="12",
    valid_source=None,
    valid_source_sha256=None,
    valid_fraction=0.1,
    text_field="text",
    python_version="3.11.7",
    tokenizer=None,
    sequence_length=8,
    dtype="<u2",
    split=splits.BY_HASH,
)
# What always names the directory, in the order of the card.
FIRST = {
    "format": 3,
    "source": "files:a.jsonl",
    "source_sha256": "12",
    "valid_source": None,
    "valid_source_sha256": None,
    "valid_fraction": 0.1,
    "text_field": "text",
    "python_version": "3.11.7",
    "tokenizer": None,
    "tokenizer_sha256": None,
    "vocab_size": None,
    "bos_id": None,
    "eos_id": None,
    "packing": PACKING,
    "sequence_length": 8,
    "dtype": "<u2",
    "split": splits.BY_HASH,
}


@pytest.mark.parametrize("later", [{}, {"cuts": CUTS}, {"split": splits.BY_PLACE}], ids=str)
def test_what_determines_the_rows_names_the_directory(later):
    facts = {name: value for name, value in FIRST.items() if name != "python_version"}
    text = json.dumps({**facts, **later}, sort_keys=True)
    name = f"files-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    assert dataclasses.replace(CARD, **later).directory_name() == name


def test_what_came_of_the_rows_does_not_name_the_directory():
    packed = dataclasses.replace(CARD, held_out_documents_in_train=3, files=[], splits={"train": {}})
    assert packed.directory_name() == CARD.directory_name()
    assert list(packed.to_json())[-3:] == ["held_out_documents_in_train", "files", "splits"]


def test_facts_that_do_not_apply_are_null_or_left_out():
    assert list(CARD.to_json()) == [*FIRST, "attention"]
    assert CARD.to_json()["valid_source"] is None


def test_a_tokenizer_that_is_there_fills_in_more_than_one_that_is_not():
    untrained, known = CARD.with_tokenizer(UntrainedBPE("bpe:300")), CARD.with_tokenizer(BytesTokenizer())
    assert (untrained.tokenizer, untrained.tokenizer_sha256, untrained.vocab_size) == ("bpe:300", None, None)
    assert (known.tokenizer, known.vocab_size, known.bos_id, known.eos_id) == ("bytes", 258, 256, 257)
    assert known.tokenizer_sha256 == BytesTokenizer.sha256
    assert CARD.with_tokenizer(None) == CARD
