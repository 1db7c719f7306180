"""Any text as rows: the rows that preparing it would give, and the rest of it."""

import dataclasses
import sys

import numpy as np
import pytest
from conftest import tiny_config

from mobilellm_jax import data
from mobilellm_jax.data.text import read_text
from mobilellm_jax.data.tokenizers import BytesTokenizer, train_bpe
from mobilellm_jax.errors import UserError

DOCUMENTS = ["Grüße, 世界!", "a b", "and " * 9000]  # the last is encoded in pieces


@pytest.fixture
def folder(tmp_path):
    for number, document in enumerate(DOCUMENTS):
        (tmp_path / f"{number}.txt").write_text(document)
    return tmp_path


@pytest.mark.parametrize(
    "make", [BytesTokenizer, lambda: train_bpe("bpe:260", DOCUMENTS)], ids=["bytes", "bpe"]
)
@pytest.mark.parametrize("add_bos", [True, False])
def test_rows_predict_every_token_once(folder, make, add_bos):
    tokenizer = make()
    text = read_text(f"files:{folder}/*.txt", "text", tokenizer, 7, add_bos)
    begin, end = [tokenizer.bos_id] * add_bos, tokenizer.eos_id
    stream = [i for ids in tokenizer.encode_batch(DOCUMENTS) for i in (*begin, *ids, end)]
    targets = text.rows_RS[:, 1:].ravel()
    assert targets[targets >= 0].tolist() == stream[1:]
    assert text.rows_RS[0, 0] == stream[0]
    np.testing.assert_array_equal(text.rows_RS[1:, 0], text.rows_RS[:-1, -1])  # the last is read, too
    assert np.all(text.rows_RS[:-1] >= 0)
    size = sum(len(document.encode()) for document in DOCUMENTS)
    assert (text.documents, text.text_bytes, text.tokens) == (3, size, len(stream) - 1)


def test_rows_are_those_of_the_held_out_split(folder):
    spec = f"files:{folder}/*.txt"
    (folder / "train").write_text(DOCUMENTS[0])
    fields = {"source": f"files:{folder}/train", "valid_source": spec, "tokenizer": "bytes"}
    config = dataclasses.replace(
        tiny_config().data, **fields, sequence_length=7, cache_dir=str(folder / "cache")
    )
    prepared = data.prepare(config, 258)
    there = np.concatenate(list(prepared.eval_batches(batch_size=8)))
    (folder / "1.txt").unlink()  # the second of three is for tuning
    text = read_text(spec, "text", BytesTokenizer(), 7, add_bos=True)
    rows = prepared.num_rows("valid")
    assert len(text.rows_RS) == rows + 1  # what preparing drops
    np.testing.assert_array_equal(text.rows_RS[:rows], there[:rows])
    assert text.text_bytes / text.tokens == prepared.bytes_per_token("valid")
    np.testing.assert_array_equal(np.concatenate(list(text.batches(8, 0, 1)))[:rows], there[:rows])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tokens:x.jsonl", "--text: 'tokens:x.jsonl' is not valid; expected bundled, files:<glob>, hub"),
        ("files", "--text: 'files' is not valid"),
        ("files:nowhere/*.txt", r"--text: 'files:nowhere/\*.txt' matches no file"),
    ],
)
def test_bad_texts_are_named(spec, message):
    with pytest.raises(UserError, match=message):
        read_text(spec, "text", BytesTokenizer(), 4, add_bos=True)


def test_a_text_without_a_token_to_predict_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=r"has 0 token\(s\); expected at least 2"):
        read_text(f"files:{tmp_path}/x.jsonl", "text", BytesTokenizer(), 4, add_bos=True)


def test_reading_shows_a_bar_on_a_terminal(folder, monkeypatch, capsys):
    spec = f"files:{folder}/*.txt"
    read_text(spec, "text", BytesTokenizer(), 7, True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    read_text(spec, "text", BytesTokenizer(), 7, True)
    assert f"reading {spec}: 100%" in capsys.readouterr().err
