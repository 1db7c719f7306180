"""Preparing: rows against a plain Python loop, the cache, interruption, and one clear error for bad input."""

import contextlib
import dataclasses
import hashlib
import importlib
import itertools
import json
import lzma
import os
import platform
import random
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import flipped
from test_data_tokenizers import UNICODE, sentencepiece_model, text_of

from mobilellm_jax import data
from mobilellm_jax.config import DataConfig
from mobilellm_jax.data import prepared as prepared_module
from mobilellm_jax.data import tokenizers
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.sealed import seal, unseal

prepare_module = importlib.import_module("mobilellm_jax.data.prepare")  # `data.prepare` is the function


def config(folder: Path, **overrides: Any) -> DataConfig:
    defaults = {
        "source": f"files:{folder}/train.jsonl",
        "valid_source": "",
        "valid_fraction": 0.3,
        "text_field": "text",
        "tokenizer": "bytes",
        "sequence_length": 8,
        "cache_dir": str(folder / "cache"),
    }
    return DataConfig(**{**defaults, **overrides})


def write_jsonl(path: Path, values: list[Any], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: value}) + "\n" for value in values))
    return path


def rows(prepared: data.PreparedData, split: str) -> list[list[int]]:
    count = prepared.num_rows(split)
    return prepared_module._Rows(prepared, split).read(np.arange(count)).tolist()


def reference_rows(documents: list[list[int]], length: int) -> list[list[int]]:
    """Packing as a person would write it."""
    stream = [token for document in documents for token in document]
    found = []
    start = 0
    while start + length + 1 <= len(stream):
        found.append(stream[start : start + length + 1])
        start += length
    return found


_WORDS = [3, 40, 1, 25, 60, 2, 0, 33, 80, 12, 5, 9, 200, 30]
TEXTS = [UNICODE, *(text_of(words, seed) for seed, words in enumerate(_WORDS))]


@pytest.fixture
def corpus(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", TEXTS)
    (tmp_path / "some.model").write_bytes(sentencepiece_model(bos_id=-1))
    return tmp_path


def test_rows_written_out_by_hand(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ["abc", "", "de"])
    write_jsonl(tmp_path / "valid.jsonl", ["xyz"])
    prepared = data.prepare(
        config(tmp_path, valid_source=f"files:{tmp_path}/valid.jsonl", sequence_length=3), vocab_size=258
    )
    assert rows(prepared, "train") == [[256, 97, 98, 99], [99, 257, 256, 100]]  # then 100 101 257: too short
    assert rows(prepared, "valid") == [[256, 120, 121, 122]]
    assert rows(prepared, "tuning") == []
    assert np.load(prepared.directory / "tuning-documents.npy").tolist() == []
    entry = prepared.card["splits"]["train"]
    assert (entry["documents"], entry["text_bytes"], entry["tokens"], entry["rows"]) == (2, 5, 9, 2)
    assert prepared.bytes_per_token("train") == 5 / 8
    assert np.load(prepared.directory / "valid-documents.npy").tolist() == [0]
    assert prepared.card["splits"]["tuning"]["documents"] == prepared.num_rows("tuning") == 0
    content = struct.pack("<8H", 256, 97, 98, 99, 99, 257, 256, 100)
    assert entry["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:270", "sentencepiece"])
@pytest.mark.parametrize("batch", [50, 1 << 20])
def test_rows_are_those_of_a_plain_loop(corpus, monkeypatch, tokenizer, batch):
    monkeypatch.setattr(prepare_module, "_BATCH", batch)  # flushes within documents
    spec = f"sentencepiece:{corpus}/some.model" if tokenizer == "sentencepiece" else tokenizer
    prepared = data.prepare(config(corpus, tokenizer=spec), vocab_size=300)
    loaded = data.load_tokenizer(prepared.directory)
    assert loaded.bos_id == {"bytes": 256, "bpe:270": 0, "sentencepiece": None}[tokenizer]
    assert loaded.vocab_size == {"bytes": 258, "bpe:270": 270, "sentencepiece": 120}[tokenizer]
    splits: dict[str, list[str]] = {"train": [], "tuning": [], "valid": []}
    held_out = 0
    for text in filter(None, TEXTS):
        fraction = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 16**16
        splits["train" if fraction >= 0.3 else "tuning" if held_out % 3 == 1 else "valid"].append(text)
        held_out += fraction < 0.3
    for split, texts in splits.items():
        bos = [] if loaded.bos_id is None else [loaded.bos_id]
        documents = [[*bos, *loaded.encode_batch([text])[0], loaded.eos_id] for text in texts]
        there = reference_rows(documents, 8)
        assert rows(prepared, split) == there
        if split != "train":  # the document of every target, in the order of the rows
            of_token = [i for i, document in enumerate(documents) for _ in document]
            expected = [of_token[8 * row + 1 : 8 * row + 9] for row in range(len(there))]
            assert prepared.eval_documents(0, split).tolist() == expected
            starts = [row[0] for row in expected]
            part = next(prepared.eval_batches(batch_size=3, rows=3, split=split))
            order = [there.index(row) for row in part.tolist()]
            assert [row[0] for row in prepared.eval_documents(3, split).tolist()] == [
                starts[i] for i in order
            ]
        entry = prepared.card["splits"][split]
        assert entry["documents"] == len(texts) > 0
        assert entry["text_bytes"] == sum(len(text.encode()) for text in texts)
        assert entry["tokens"] == sum(map(len, documents))
        assert prepared.bytes_per_token(split) == entry["text_bytes"] / (entry["tokens"] - 1)
    if tokenizer == "bpe:270":  # trained on the training documents alone
        assert loaded.file_bytes == tokenizers.train_bpe("bpe:270", splits["train"]).file_bytes


def test_bpe_is_trained_on_the_training_source_alone(corpus):
    (corpus / "valid.txt").write_text("zzzz" * 100)
    prepared = data.prepare(
        config(corpus, valid_source=f"files:{corpus}/valid.txt", tokenizer="bpe:300"), 300
    )
    expected = tokenizers.train_bpe("bpe:300", TEXTS)
    assert data.load_tokenizer(prepared.directory).file_bytes == expected.file_bytes


def test_one_giant_document(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "_BATCH", 30_000)
    text = text_of(30_000)
    assert len(text) > 150_000
    for name in ("giant", "copy"):
        (tmp_path / f"{name}.txt").write_text(text)
    sources = {"source": f"files:{tmp_path}/giant.txt", "valid_source": f"files:{tmp_path}/copy.txt"}
    prepared = data.prepare(config(tmp_path, **sources, tokenizer="bpe:300"), 300)
    (ids,) = data.load_tokenizer(prepared.directory).encode_batch([text])
    assert rows(prepared, "train") == reference_rows([[0, *ids, 1]], 8)


def test_many_shards(corpus, monkeypatch):
    whole = data.prepare(config(corpus), 258)
    monkeypatch.setattr(prepare_module, "_SHARD", 200)  # bytes: 12 rows
    sharded = data.prepare(config(corpus, cache_dir=str(corpus / "other")), 258)
    for split in ("train", "valid"):
        assert rows(sharded, split) == rows(whole, split)
        entry = sharded.card["splits"][split]
        assert entry["sha256"] == whole.card["splits"][split]["sha256"]
        assert [shard["rows"] for shard in entry["shards"][:-1]] == [12] * (len(entry["shards"]) - 1)
    assert len(sharded.card["splits"]["train"]["shards"]) > 2


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(1 << 16, 2), (100_000, 4)])
def test_token_ids(tmp_path, vocab_size, itemsize):
    documents = [[7, vocab_size - 1, 5, 6], [], [4, 3, 2, 1, 0]]
    write_jsonl(tmp_path / "a.jsonl", documents, "token_ids")
    write_jsonl(tmp_path / "b.jsonl", [[9, 8, 7, 6]], "token_ids")
    tokens = config(
        tmp_path,
        source=f"tokens:{tmp_path}/a.jsonl",
        valid_source=f"tokens:{tmp_path}/b.jsonl",
        sequence_length=3,
    )
    prepared = data.prepare(tokens, vocab_size)
    assert rows(prepared, "train") == [[7, vocab_size - 1, 5, 6], [6, 4, 3, 2]]
    assert np.dtype(prepared.card["dtype"]).itemsize == itemsize
    assert prepared.bytes_per_token("train") is None
    assert prepared.card["vocab_size"] == vocab_size
    assert prepared.card["splits"]["train"]["text_bytes"] is None
    names = ("tokenizer", "tokenizer_sha256", "bos_id", "eos_id")
    assert [prepared.card[name] for name in names] == [None] * 4
    with pytest.raises(UserError, match="has no tokenizer, as its data were prepared from token ids"):
        data.load_tokenizer(prepared.directory)
    for _ in range(2):  # the second time the rows are there
        with pytest.raises(
            UserError, match=rf"^model\.vocab_size: 50 is too small for .*value is {vocab_size}$"
        ):
            data.prepare(tokens, vocab_size=50)
        data.prepare(tokens, vocab_size)


def test_duplicates_fall_on_one_side_and_documents_stay_where_they_are(tmp_path):
    def sides(texts: list[str]) -> dict[str, set[str]]:
        write_jsonl(tmp_path / "train.jsonl", texts)
        prepared = data.prepare(config(tmp_path, sequence_length=1), 258)
        tokenizer = data.load_tokenizer(prepared.directory)
        found = {}
        for split in ("train", "tuning", "valid"):
            got = rows(prepared, split)
            text = tokenizer.decode([10 if i == 257 else i for i in [got[0][0], *(row[1] for row in got)]])
            side = "train" if split == "train" else "valid"
            found[side] = found.get(side, set()) | set(text.split())
        return found

    texts = [f"document-{i}" for i in range(100)]
    before = sides(texts)
    assert 15 <= len(before["valid"]) <= 45  # of 100, with a fraction of 0.3
    mixed = [*texts, *(f"new-{i}" for i in range(100)), *texts, *texts]
    random.Random(0).shuffle(mixed)
    after = sides(mixed)
    assert not after["train"] & after["valid"]
    for split in ("train", "valid"):
        assert before[split] == {text for text in after[split] if text.startswith("document")}


def test_bundled_records_its_python(tmp_path, monkeypatch):
    (tmp_path / "lib/pydoc_data").mkdir(parents=True)
    (tmp_path / "lib/pydoc_data/topics.py").write_text(f"topics = {dict(enumerate(TEXTS))!r}")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "lib"))
    prepared = data.prepare(config(tmp_path, source="bundled"), 258)
    assert prepared.card["python_version"] == platform.python_version()
    documents = sum(prepared.card["splits"][split]["documents"] for split in ("train", "tuning", "valid"))
    assert documents == len(TEXTS) - 1  # one is empty


def test_second_call_finds_the_rows(corpus, monkeypatch):
    first = data.prepare(config(corpus), 258)
    monkeypatch.setattr(prepare_module, "_make", None)
    assert data.prepare(config(corpus), 300) == first == data.open_prepared(first.directory)


def test_card_is_json_without_absolute_paths(corpus):
    write_jsonl(corpus / "valid.jsonl", TEXTS)
    prepared = data.prepare(
        config(
            corpus,
            valid_source=f"files:{corpus}/va*.jsonl",
            tokenizer=f"sentencepiece:{corpus}/some.model",
        ),
        120,
    )
    content = (prepared.directory / "card.json").read_text()
    assert unseal(json.loads(content)) == prepared.card
    assert str(corpus) not in content
    assert prepared.card["source"] == "files:train.jsonl"
    assert prepared.card["valid_source"] == "files:va*.jsonl"
    assert prepared.card["tokenizer"] == "sentencepiece:some.model"
    model = (corpus / "some.model").read_bytes()
    assert prepared.card["tokenizer_sha256"] == hashlib.sha256(model).hexdigest()
    for split in ("train", "valid"):
        for shard in prepared.card["splits"][split]["shards"]:
            content = (prepared.directory / shard["file"]).read_bytes()
            assert shard["sha256"] == hashlib.sha256(content).hexdigest()
            assert shard["bytes"] == len(content)


def test_everything_that_determines_the_rows_names_the_directory(corpus):
    texts = write_jsonl(corpus / "other.jsonl", TEXTS[::-1])
    base = config(corpus, tokenizer=f"sentencepiece:{corpus}/some.model")
    names = [data.prepare(base, 258).directory.name]
    changes = [
        {"source": f"files:{texts}"},
        {"valid_source": f"files:{texts}"},
        {"valid_fraction": 0.4},
        {"tokenizer": "bytes"},
        {"tokenizer": "bpe:258"},
        {"tokenizer": "bpe:259"},
        {"sequence_length": 9},
    ]
    names += [data.prepare(dataclasses.replace(base, **change), 300).directory.name for change in changes]
    (corpus / "some.model").write_bytes(sentencepiece_model(model_type="unigram", bos_id=-1))
    names.append(data.prepare(base, 258).directory.name)
    path = corpus / "train.jsonl"
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"abc", b"cba"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    names.append(data.prepare(base, 258).directory.name)
    assert len(set(names)) == len(changes) + 3
    moved = corpus / "moved"
    moved.mkdir()
    path.rename(moved / path.name)
    same = dataclasses.replace(base, source=f"files:{moved}/train.jsonl")
    assert data.prepare(same, 258).directory.name == names[-1]


@pytest.mark.parametrize("damage", ["missing", "shorter"])
@pytest.mark.parametrize(
    "name", ["train-00000.array_record", "valid-00000.array_record", "valid-documents.npy", "tokenizer.json"]
)
def test_damaged_directory_is_refused(corpus, name, damage):
    prepared = data.prepare(config(corpus, tokenizer="bpe:258"), 258)
    path = prepared.directory / name
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1)
    what = "missing" if damage == "missing" else r"\d+ bytes, expected \d+ by the data card"
    message = (
        rf"^{path}: {what}; delete the directory {prepared.directory} and run again to prepare the data anew$"
    )
    for again in (
        lambda: data.prepare(config(corpus, tokenizer="bpe:258"), 258),
        lambda: data.open_prepared(path.parent),
    ):
        with pytest.raises(UserError, match=message):
            again()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b'{"format": 1, "spl', "corrupt data card"),
        (b"\xff", "corrupt data card"),
        (b"[]", "corrupt data card"),
        (b"{}", "corrupt data card"),
        (b'{"format": 3}', "corrupt data card: not a JSON object with a sha256"),
        (b'{"format": 0}', "prepared in format 0, expected 3"),
    ],
)
def test_damaged_card_is_refused(corpus, content, message):
    path = data.prepare(config(corpus), 258).directory / "card.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{message}.*; delete the directory {path.parent} and run again"):
        data.prepare(config(corpus), 258)


def test_a_bit_flipped_in_the_card_is_noticed(corpus):
    path = data.prepare(config(corpus), 258).directory / "card.json"
    content, rng = path.read_bytes(), random.Random(0)
    for bit in rng.sample(range(8 * len(content)), 300):
        path.write_bytes(flipped(content, bit))
        with pytest.raises(UserError, match=f"^{path.parent}.* and run again to prepare the data anew$"):
            data.open_prepared(path.parent)


@pytest.mark.parametrize("name", ["../train.jsonl", "/etc/passwd", "..", "a/../../b"])
def test_a_card_names_no_file_outside_its_directory(corpus, name):
    path = data.prepare(config(corpus), 258).directory / "card.json"
    card = unseal(json.loads(path.read_text()))
    card["splits"]["train"]["shards"][0]["file"] = name
    path.write_text(json.dumps(seal(card)))
    with pytest.raises(UserError, match=f"'{name}' is not a plain file name"):
        data.open_prepared(path.parent)


def test_exchanged_tokenizer_is_refused(corpus):
    directory = data.prepare(config(corpus, tokenizer="bpe:260"), 260).directory
    other = tokenizers.train_bpe("bpe:260", ["zz zz"])
    (directory / "tokenizer.json").write_bytes(other.file_bytes)
    with pytest.raises(UserError, match=r"tokenizer\.json does not match its checksum in card\.json"):
        data.load_tokenizer(directory)
    with pytest.raises(UserError, match="cannot read the tokenizer: No such file"):
        data.load_tokenizer(corpus)


@pytest.mark.parametrize(
    ("overrides", "vocab_size", "message"),
    [
        (
            {},
            257,
            r"model\.vocab_size: 257 .* data\.tokenizer='bytes'; the smallest valid value is 258",
        ),
        (
            {"tokenizer": "bpe:500"},
            499,
            r"model\.vocab_size: 499 .*'bpe:500'; the smallest valid value is 500",
        ),
        (
            {"tokenizer": "sentencepiece:some.model"},
            119,
            r"model\.vocab_size: 119 .* the smallest valid value is 120",
        ),
    ],
)
def test_small_vocabulary_is_refused_before_anything_is_read(
    corpus, monkeypatch, overrides, vocab_size, message
):
    monkeypatch.chdir(corpus)
    with pytest.raises(UserError, match=f"^{message}$"):
        data.prepare(config(corpus, source="files:none", **overrides), vocab_size)


def test_vocabulary_that_the_corpus_cannot_reach_is_recorded_as_it_is(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [f"{i:030}" for i in range(10)])
    prepared = data.prepare(config(tmp_path, tokenizer="bpe:5000"), 5000)
    assert 258 < prepared.card["vocab_size"] < 300
    assert prepared.card["tokenizer"] == "bpe:5000"
    assert data.load_tokenizer(prepared.directory).vocab_size == prepared.card["vocab_size"]
    assert data.prepare(config(tmp_path, tokenizer="bpe:5000"), 5000) == prepared


@pytest.mark.parametrize(
    ("texts", "overrides", "message"),
    [
        (
            ["one document"],
            {"valid_fraction": 1e-9},
            r"^data\.valid_fraction: 1e-09 leaves the valid split without .* \(1 in",
        ),
        (
            ["one document"],
            {"valid_fraction": 0.999999},
            r"^data\.valid_fraction: .* leaves the train split without",
        ),
        (
            ["ab"],
            {"valid_source": "files:{}/short.txt"},
            "the train split has 4 tokens and one row needs 9",
        ),
        (
            TEXTS,
            {"valid_source": "files:{}/short.txt"},
            r"^files:short\.txt: .* valid split has 5 tokens .* needs 9",
        ),
        ([""], {}, "leaves the train split without a document"),
    ],
)
def test_too_little_text(tmp_path, texts, overrides, message):
    write_jsonl(tmp_path / "train.jsonl", texts)
    (tmp_path / "short.txt").write_text("four")
    overrides = {
        name: value.format(tmp_path) if name == "valid_source" else value for name, value in overrides.items()
    }
    with pytest.raises(UserError, match=message):
        data.prepare(config(tmp_path, **overrides), 258)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_bad_input_leaves_nothing_behind(corpus):
    with open(corpus / "train.jsonl", "a") as file:
        file.write("broken")
    with pytest.raises(UserError, match=r"train\.jsonl, line 16: invalid JSON"):
        data.prepare(config(corpus, tokenizer="bpe:300"), 300)
    assert [path.suffix for path in (corpus / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize("below", ["", "/below"])
def test_cache_dir_that_is_a_file(corpus, below):
    (corpus / "file").write_text("x")
    with pytest.raises(
        UserError,
        match=rf"^data\.cache_dir: .* in {corpus}/file{below}: (Not a directory|File exists)",
    ):
        data.prepare(config(corpus, cache_dir=f"{corpus}/file{below}"), 258)


# Other processes.

PROGRAM = """
import dataclasses, importlib, json, resource, sys
from absl import logging
from mobilellm_jax import data
from mobilellm_jax.config import DataConfig
from mobilellm_jax.errors import UserError

logging.set_verbosity(logging.INFO)
module = importlib.import_module("mobilellm_jax.data.prepare")
config, action = DataConfig(**json.loads(sys.argv[1])), sys.argv[2]
close = module._Packer.close
def close_later(packer):
    print("packed", flush=True)
    sys.stdin.read()
    close(packer)
if action == "wait":
    module._Packer.close = close_later
if action == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    print(data.prepare(config, 258).directory, flush=True)
except UserError as error:
    print("UserError:", error, flush=True)
"""


@pytest.fixture
def start():
    """Starts PROGRAM; what a failed test leaves running is killed."""
    with contextlib.ExitStack() as stack:

        def run(prepared_config: DataConfig, action: str) -> subprocess.Popen[str]:
            arguments = [
                sys.executable,
                "-c",
                PROGRAM,
                json.dumps(dataclasses.asdict(prepared_config)),
                action,
            ]
            environment = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2])}
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            process = stack.enter_context(subprocess.Popen(arguments, text=True, env=environment, **pipes))
            stack.callback(process.kill)
            return process

        yield run


def test_two_processes_at_once(corpus, start):
    first = start(config(corpus), "wait")
    assert first.stdout is not None
    assert first.stdout.readline() == "packed\n"
    second = start(config(corpus), "")
    assert second.stdout is not None
    assert second.stderr is not None
    assert "Waiting for another process that is preparing the same data" in second.stderr.readline()
    out1, err1 = first.communicate(timeout=60)
    out2, err2 = second.stdout.read(), second.stderr.read()
    assert out2 == out1.splitlines(keepends=True)[-1]
    assert "packing files:train.jsonl" in err1
    assert "packing" not in err2
    directory = Path(out2.strip())
    assert data.prepare(config(corpus), 258).directory == directory
    assert {path.name for path in directory.parent.iterdir()} == {directory.name, f"{directory.name}.lock"}


def test_killed_while_preparing(corpus, start):
    process = start(config(corpus), "wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "packed\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    (leftover,) = (path for path in (corpus / "cache").iterdir() if path.is_dir())
    assert ".tmp-" in leftover.name
    prepared = data.prepare(config(corpus), 258)
    reference = data.prepare(config(corpus, cache_dir=f"{corpus}/untouched"), 258)
    assert prepared.card == reference.card
    assert not leftover.exists()


@pytest.mark.parametrize("size", [200_000, 12_000_000])  # noticed when a shard is closed, and before
def test_full_disk(tmp_path, start, size):
    (tmp_path / "big.txt").write_text("a word " * (size // 7))
    (tmp_path / "small.txt").write_text("a word " * 200)
    sources = {"source": f"files:{tmp_path}/big.txt", "valid_source": f"files:{tmp_path}/small.txt"}
    process = start(config(tmp_path, **sources, sequence_length=1000), "full")
    out, err = process.communicate(timeout=60)
    assert out.startswith(f"UserError: data.cache_dir: cannot prepare data in {tmp_path}/cache: "), err
    assert "File too large" in out
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_progress_is_a_bar_on_a_terminal_and_two_lines_elsewhere(corpus, monkeypatch, capsys):
    logged = []
    monkeypatch.setattr(prepare_module.logging, "info", lambda text, *values: logged.append(text % values))
    data.prepare(config(corpus), 258)
    size = (corpus / "train.jsonl").stat().st_size
    assert logged == [f"packing files:train.jsonl: {size / 1e6:.1f} MB", "packing files:train.jsonl: done"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    data.prepare(config(corpus, tokenizer="bpe:300"), 300)
    bars = capsys.readouterr().err
    for what in ("training bpe:300", "packing files:train.jsonl"):
        assert f"{what}: 100%" in bars
    assert len(logged) == 2


def test_compressed_input_gives_the_same_rows(corpus):
    plain = data.prepare(config(corpus), 258)
    (corpus / "train.jsonl.xz").write_bytes(lzma.compress((corpus / "train.jsonl").read_bytes()))
    packed = data.prepare(config(corpus, source=f"files:{corpus}/train.jsonl.xz"), 258)
    for split, key in itertools.product(("train", "valid"), ("sha256", "documents_sha256", "rows")):
        assert plain.card["splits"][split][key] == packed.card["splits"][split][key]
