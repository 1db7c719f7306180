"""What is held out: the end of a single text, nothing that is trained on, and what is said of duplicates."""

import lzma
import shutil
from pathlib import Path

import pytest
from test_data_prepare import TEXTS, config, rows, write_jsonl
from test_data_tokenizers import text_of

from mobilellm_jax import data
from mobilellm_jax.analysis import comparable
from mobilellm_jax.data import splits, tokenizers
from mobilellm_jax.errors import UserError
from mobilellm_jax.runs.directory import data_notes

PARAGRAPHS = [f"{i}: {text_of(20, seed=i)}" for i in range(40)]


def decoded(prepared: data.PreparedData, split: str) -> str:
    """The text of a split, to the last whole row, BOS and EOS left out."""
    found = rows(prepared, split)
    return data.load_tokenizer(prepared.directory).decode(
        [*found[0][:1], *(i for row in found for i in row[1:])]
    )


@pytest.mark.parametrize("name", ["one.txt", "one.txt.xz"])
def test_the_end_of_a_single_text_is_held_out(tmp_path, name):
    text = "\n\n".join(PARAGRAPHS)
    (tmp_path / "one.txt").write_text(text)
    if name.endswith("xz"):
        (tmp_path / name).write_bytes(lzma.compress(text.encode()))
    made = config(tmp_path, source=f"files:{tmp_path}/{name}", sequence_length=1, valid_fraction=0.2)
    prepared = data.prepare(made, 258)
    train, tuning, compared = (decoded(prepared, split) for split in splits.SPLITS)
    valid = tuning + compared
    assert train + valid == text
    assert train.endswith("\n\n")
    assert tuning.endswith("\n\n")
    assert abs(len(tuning) / len(valid) - 1 / 3) < 0.08
    assert abs(len(valid) / len(text) - 0.2) < 0.02
    assert "end of the one text" in prepared.card["split"]
    assert "held_out_documents_in_train" not in prepared.card
    (note,) = data_notes(prepared.card)
    size = len(valid.encode())
    share = f"{size / len(text.encode()):.1%}"
    assert note == f"files:{name} is one document: its last {share} ({size:,} bytes) are held out"
    trained = data.prepare(config(tmp_path, source=made.source, tokenizer="bpe:300", valid_fraction=0.2), 300)
    expected = tokenizers.train_bpe("bpe:300", [train])
    assert data.load_tokenizer(trained.directory).file_bytes == expected.file_bytes


@pytest.mark.parametrize(
    ("text", "fraction", "valid"),
    [
        ("a a\n\nb b\nc c\nd d", 0.4, "c c\nd d"),  # the paragraph is too far away
        ("one two three four", 0.25, "four"),
        ("x" * 100, 0.1, "x" * 10),
        ("aaaa\n\nbbbb", 0.5, "bbbb"),
        ("aaaa\n\n\n\nbbbb", 0.5, "\n\nbbbb"),
        ("aaaaaaaa\n\naaaa\nbbbb\n", 0.25, "bbbb\n"),
    ],
)
def test_the_cut_is_at_the_nearest_border(text, fraction, valid):
    assert text[splits._cut(text, fraction) :] == valid


@pytest.mark.parametrize("text", ["x", "ab", "a b c"])
def test_a_single_text_that_is_too_short_is_refused(tmp_path, text):
    (tmp_path / "one.txt").write_text(text)
    with pytest.raises(UserError, match=r"^files:one\.txt: too little text: the train split has"):
        data.prepare(config(tmp_path, source=f"files:{tmp_path}/one.txt"), 258)


def test_several_texts_and_single_rows_are_split_by_document_as_ever(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(PARAGRAPHS))
    write_jsonl(tmp_path / "one.jsonl", ["\n\n".join(PARAGRAPHS)])
    with pytest.raises(UserError, match="without a document"):
        data.prepare(config(tmp_path, source=f"files:{tmp_path}/one.jsonl"), 258)
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"document {i} " * 10)
    prepared = data.prepare(config(tmp_path, source=f"files:{tmp_path}/??.txt"), 258)
    assert prepared.card["split"].startswith("by document")
    assert prepared.card["held_out_documents_in_train"] == 0


def held_out_texts(tmp_path, texts: list[str], *, as_one_text: bool = False) -> data.PreparedData:
    write_jsonl(tmp_path / "train.jsonl", TEXTS)
    path = tmp_path / "valid.txt" if as_one_text else write_jsonl(tmp_path / "valid.jsonl", texts)
    if as_one_text:
        path.write_text("\n\n".join(texts))
    return data.prepare(config(tmp_path, valid_source=f"files:{path}", sequence_length=1), 258)


def test_every_third_held_out_document_is_for_tuning(tmp_path):
    texts = [f"text {i}." for i in range(8)]
    prepared = held_out_texts(tmp_path, [*texts[:3], "", *texts[3:]])
    assert decoded(prepared, "tuning").split(".") == ["text 1", "text 4", "text 7", ""]
    assert decoded(prepared, "valid").split(".") == ["text 0", "text 2", "text 3", "text 5", "text 6", ""]
    assert [prepared.card["splits"][split]["documents"] for split in splits.HELD_OUT] == [3, 5]


def test_a_single_held_out_text_is_cut_at_a_paragraph_for_tuning(tmp_path):
    prepared = held_out_texts(tmp_path, PARAGRAPHS, as_one_text=True)
    tuning, valid = (decoded(prepared, split) for split in splits.HELD_OUT)
    assert tuning + valid == "\n\n".join(PARAGRAPHS)
    assert tuning.endswith("\n\n")
    assert abs(len(tuning) / len(tuning + valid) - 1 / 3) < 0.02


def test_a_split_for_tuning_without_rows_is_refused_only_where_it_is_asked_for(tmp_path):
    prepared = held_out_texts(tmp_path, ["one document"])
    prepared.check_rows("valid")
    message = (
        r"^files:valid\.jsonl: the tuning split of the held-out text has no row: 0 documents, 0 tokens, and "
        r"one row needs 2; hold out more text"
    )
    for asks in (
        lambda: prepared.check_rows("tuning"),
        lambda: prepared.eval_batches(batch_size=1, split="tuning"),
    ):
        with pytest.raises(UserError, match=message):
            asks()


def test_damaged_places_of_documents_are_noticed(tmp_path):
    prepared = held_out_texts(tmp_path, ["one document", "another"])
    path = prepared.directory / "valid-documents.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=rf"^{path}: corrupt .*checksum mismatch.*; delete the directory"):
        prepared.eval_documents(0, "valid")


@pytest.mark.parametrize(
    ("source", "valid"),
    [
        ("bundled", "bundled"),
        ("files:{}/a.txt", "files:{}/a.txt"),
        ("files:{}/a.txt", "files:{}/*.txt"),
        ("files:{}/*.txt", "files:{}/../corpus/[ab].txt"),
        ("files:{}/a.txt", "files:{}/link"),
        ("tokens:{}/t.jsonl", "tokens:{}/t*"),
    ],
)
def test_held_out_files_that_are_trained_on_are_refused(tmp_path, source, valid):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(text_of(50))
    write_jsonl(folder / "t.jsonl", [[1, 2, 3]], "token_ids")
    (folder / "link").symlink_to(folder / "a.txt")
    source, valid = source.format(folder), valid.format(folder)
    with pytest.raises(
        UserError, match=r"^data\.valid_source: '.*' shares text with data\.source='.*': .*; name"
    ):
        data.prepare(config(tmp_path, source=source, valid_source=valid), 258)


def test_held_out_documents_that_are_trained_on_are_counted(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [*TEXTS, TEXTS[2], "only here " * 5])
    write_jsonl(tmp_path / "valid.jsonl", ["something else " * 9, TEXTS[2], "", TEXTS[2], TEXTS[4]])
    apart = write_jsonl(tmp_path / "apart.jsonl", ["something else " * 9])
    card = data.prepare(config(tmp_path, valid_source=f"files:{tmp_path}/valid.jsonl"), 258).card
    assert card["held_out_documents_in_train"] == 3
    sentence = "3 of 4 held-out documents (75.0%) are in the training text as well."
    assert comparable.leakage(card) == sentence
    assert data_notes(card) == [f"warning: {sentence}"]
    card = data.prepare(config(tmp_path, valid_source=f"files:{apart}"), 258).card
    assert card["held_out_documents_in_train"] == 0
    assert data_notes(card) == []


def test_a_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.txt").write_text("\n\n".join(PARAGRAPHS))
    shutil.copy(tmp_path / "x.txt", tmp_path / "y.txt")
    write_jsonl(tmp_path / "t.jsonl", [[1, 2, 3] * 9], "token_ids")
    write_jsonl(tmp_path / "u.jsonl", [[1, 2, 3] * 9], "token_ids")
    made = config(Path("~"), source="files:~/x.txt", valid_source="files:~/y*", cache_dir="~/cache")
    assert data.prepare(made, 258).directory.is_relative_to(tmp_path / "cache")
    tokens = config(
        Path("~"), source="tokens:~/t.jsonl", valid_source="tokens:~/[u].jsonl", cache_dir="~/cache"
    )
    assert data.prepare(tokens, 258).card["source"] == "tokens:t.jsonl"
