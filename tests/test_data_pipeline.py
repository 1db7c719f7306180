"""Batches: every row once an epoch, exact resume from one integer, equal for any number of processes."""

import dataclasses
import importlib
import itertools
import json

import numpy as np
import pytest

from mobilellm_jax import data
from mobilellm_jax.config import DataConfig
from mobilellm_jax.errors import UserError

LENGTH = 4  # T


def make(folder, train_rows, valid_rows=1):
    """Prepares rows that begin with 0, 4, 8, ...: row i holds 4 i to 4 i + 4, shifted by 1000 in valid."""
    folder.mkdir(exist_ok=True)
    for name, rows, start in (("train", train_rows, 0), ("valid", valid_rows, 1000)):
        ids = list(range(start, start + rows * LENGTH + 1))
        (folder / f"{name}.jsonl").write_text(json.dumps({"token_ids": ids}))
    config = DataConfig(
        source=f"tokens:{folder}/train.jsonl",
        valid_source=f"tokens:{folder}/valid.jsonl",
        valid_fraction=0.0,
        text_field="text",
        tokenizer="bytes",
        sequence_length=LENGTH,
        cache_dir=str(folder / "cache"),
    )
    return data.prepare(config, vocab_size=20_000)


def numbers(batch, start=0):
    """Returns the row numbers in a batch, after checking every id in it; -1 for padding."""
    first = batch[:, :1]
    np.testing.assert_array_equal(batch, np.where(first < 0, -1, first + np.arange(LENGTH + 1)))
    return [(n - start) // LENGTH if n >= 0 else -1 for n in batch[:, 0].tolist()]


ROWS = 150  # grain's shuffle is slow for few rows: 2 ms a row at 27 rows, 0.04 ms at 1,000


def take(prepared, steps, **options):
    batches = prepared.train_batches(**{"batch_size": 24, "seed": 0, **options})
    return [numbers(batch) for batch in itertools.islice(batches, steps)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return make(tmp_path_factory.mktemp("rows"), train_rows=ROWS, valid_rows=11)


def test_batches_are_int32_rows(prepared):
    batch = next(prepared.train_batches(batch_size=6, seed=0))
    assert (batch.shape, batch.dtype) == ((6, LENGTH + 1), np.int32)
    batch = next(prepared.eval_batches(batch_size=6))
    assert (batch.shape, batch.dtype) == ((6, LENGTH + 1), np.int32)


def test_every_row_once_in_every_epoch_in_an_order_of_its_own(prepared):
    stream = [n for step in take(prepared, 25) for n in step]
    epochs = [stream[i : i + ROWS] for i in range(0, 4 * ROWS, ROWS)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(ROWS))
    assert len(set(map(tuple, [*epochs, range(ROWS)]))) == 5


def test_batches_of_one_row_are_the_rows_of_larger_ones(prepared):
    ones = take(prepared, 48, batch_size=1)
    assert [n for step in ones for n in step] == [n for step in take(prepared, 2) for n in step]
    assert take(prepared, 3, batch_size=2, process_index=1, process_count=2) == ones[1:6:2]


def test_order_follows_from_the_seed(prepared):
    assert take(prepared, 3, seed=3) == take(prepared, 3, seed=3)
    orders = {str(take(prepared, 3, seed=seed)) for seed in (0, 1, 2, 2**32 - 1)}
    assert len(orders) == 4


@pytest.mark.parametrize(
    ("rows", "batch_size", "steps"), [(150, 24, 20), (144, 24, 20), (5, 6, 5), (1, 2, 4)]
)
def test_resume_continues_the_same_batches(tmp_path, rows, batch_size, steps):
    prepared = make(tmp_path, rows)
    whole = take(prepared, steps, batch_size=batch_size)
    for step in {0, 1, 5, 6, 7, 13} if rows > 100 else {2}:
        assert take(prepared, steps - step, batch_size=batch_size, start_step=step) == whole[step:]


def test_far_resume_is_quick(prepared):
    (batch,) = take(prepared, 1, start_step=10_000_000)
    assert len(set(batch)) > 1


@pytest.mark.parametrize("count", [2, 4, 8])
def test_number_of_processes_does_not_change_the_rows_of_a_step(prepared, count):
    whole = take(prepared, 12, batch_size=8)
    parts = [take(prepared, 12, batch_size=8, process_index=i, process_count=count) for i in range(count)]
    for step, batch in enumerate(whole):
        assert {len(part[step]) for part in parts} == {8 // count}
        assert sorted(n for part in parts for n in part[step]) == sorted(batch)
    resumed = take(prepared, 2, batch_size=8, process_index=1, process_count=count, start_step=10)
    assert resumed == parts[1][10:]


def evaluate(prepared, **options):
    return [numbers(batch, 1000) for batch in prepared.eval_batches(**{"batch_size": 4, **options})]


def test_eval_takes_all_rows_in_order_and_fills_the_last_batch(prepared):
    assert evaluate(prepared) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, -1]]
    assert evaluate(prepared, batch_size=11) == [list(range(11))]
    assert evaluate(prepared, rows=11) == evaluate(prepared, rows=99) == evaluate(prepared)


def test_eval_takes_the_first_rows_of_one_shuffled_order(prepared):
    def order(count):
        return [n for batch in evaluate(prepared, rows=count) for n in batch if n >= 0]

    assert order(10) == [3, 7, 5, 2, 8, 4, 9, 1, 6, 0]  # must never change: losses are compared over it
    for count in range(1, 10):
        assert order(count) == order(10)[:count]
    assert [len(batch) for batch in evaluate(prepared, rows=5)] == [4, 4]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("rows", [0, 5, 9])
def test_eval_processes_share_the_rows_of_a_batch(prepared, count, rows):
    whole = evaluate(prepared, rows=rows)
    parts = [evaluate(prepared, rows=rows, process_index=i, process_count=count) for i in range(count)]
    for step, batch in enumerate(whole):
        assert {len(part[step]) for part in parts} == {4 // count}
        assert sorted(n for part in parts for n in part[step]) == sorted(batch)


def test_rows_from_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("mobilellm_jax.data.prepare"), "_SHARD", 50)  # bytes: 5 rows
    prepared = make(tmp_path, train_rows=27, valid_rows=11)
    assert len(prepared.card["splits"]["train"]["shards"]) == 6
    assert sorted(n for step in take(prepared, 9, batch_size=3) for n in step) == list(range(27))
    assert evaluate(prepared) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, -1]]


def test_batch_size_must_divide_by_the_number_of_processes(prepared):
    options = {"batch_size": 6, "process_count": 4}
    with pytest.raises(
        UserError, match=r"^train\.batch_size: 6 is not divisible by the 4 processes; use a multiple of 4$"
    ):
        prepared.train_batches(seed=0, **options)
    with pytest.raises(
        UserError,
        match=r"^train\.eval_batch_size: 6 is not divisible by the 4 processes; use a multiple of 4$",
    ):
        prepared.eval_batches(**options)


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("damage", ["bits", "length", "gone"])
def test_damaged_rows_are_noticed(tmp_path, split, damage):
    prepared = make(tmp_path, train_rows=2000, valid_rows=2000)
    path = prepared.directory / f"{split}-00000.array_record"
    if damage == "bits":
        content = bytearray(path.read_bytes())
        for at in range(1000, len(content), 50):
            content[at] ^= 1
        path.write_bytes(content)
    elif damage == "gone":
        path.unlink()
    else:  # a card of other rows
        prepared = dataclasses.replace(prepared, card={**prepared.card, "sequence_length": LENGTH - 1})

    def read():
        if split == "train":
            return list(itertools.islice(prepared.train_batches(batch_size=500, seed=0), 4))
        return list(prepared.eval_batches(batch_size=500))

    with pytest.raises(
        UserError, match=rf"^{path}: corrupt rows .*; delete the directory {prepared.directory} and"
    ):
        read()
