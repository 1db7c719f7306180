"""Tasks: answers that a plain reader of the row finds too, fresh rows, resume from the step, clear errors."""

import collections
import dataclasses
import hashlib
import itertools
import re

import numpy as np
import pytest
import scipy.stats
from conftest import tiny_config

from configs import base, khop
from mobilellm_jax import data
from mobilellm_jax.config import from_config_dict
from mobilellm_jax.costs import accounting
from mobilellm_jax.errors import UserError

KHOP = "khop:hops=3,min_hops=2,symbols=7,queries=2"
ADDITION = "addition:operands=3,digits=2"
RECALL = "recall:pairs=4,symbols=6,queries=3"
LENGTHS = {KHOP: 19, ADDITION: 11, RECALL: 9}
SPECS = list(LENGTHS)


def make(spec, **overrides):
    """Returns the data of a task, one token longer than it needs."""
    values = {"data.source": spec, "data.sequence_length": LENGTHS.get(spec, 30) + 1, "train.eval_rows": 8}
    config = tiny_config(**{**values, **overrides})
    return data.prepare(config.data, vocab_size=200)


def take(prepared, steps, **options):
    batches = prepared.train_batches(**{"batch_size": 6, "seed": 3, **options})
    return np.stack(list(itertools.islice(batches, steps)))


def rows_of(spec, count=300):
    """Returns [(tokens, is_answer)] of rows without their padding, as lists."""
    prepared = make(spec)
    (batch,) = take(prepared, 1, batch_size=count)
    assert (batch.shape, batch.dtype) == ((count, LENGTHS[spec] + 2), np.int32)
    assert (batch[:, -1] == -1).all()
    assert (batch[:, -2] >= 0).all()
    rows = [row.tolist() for row in batch[:, :-1]]
    return [([~t if t < 0 else t for t in row], [t >= 0 for t in row]) for row in rows]


def test_khop_rows_are_cycles_and_their_answers_follow_the_arrows():
    starts = collections.Counter()
    for tokens, is_answer in rows_of(KHOP):
        arrows = dict(divmod(token - 8, 7) for token in tokens[:7])
        seen, symbol = [], 0
        for _ in range(7):
            symbol = arrows[symbol]
            seen.append(symbol)
        assert sorted(seen) == list(range(7))
        assert is_answer[:7] == [False] * 7
        rest = tokens[7:]
        assert [t for t in rest if t == 7] == [7] * 5
        for k, part in ((3, rest[:7]), (2, rest[7:])):
            assert part[:k] == [7] * k
            questions, answers = part[k::2], part[k + 1 :: 2]
            assert len(set(questions)) == 2
            for question, answer in zip(questions, answers, strict=True):
                for _ in range(k):
                    question = arrows[question]
                assert answer == question
        assert is_answer[7:] == [False] * 3 + [False, True] * 2 + [False] * 2 + [False, True] * 2
        starts[rest[3], rest[4]] += 1
    assert len(starts) == 42  # every symbol leads to every other
    assert scipy.stats.chisquare(list(starts.values())).pvalue > 1e-3


def test_addition_rows_add_up():
    sums = []
    for tokens, is_answer in rows_of(ADDITION):
        text = "".join("0123456789+="[t] for t in tokens)
        problem, answer = text.split("=")
        numbers = [int(part[::-1]) for part in problem.split("+")]
        assert len(numbers) == 3
        assert [len(part) for part in problem.split("+")] == [2, 2, 2]
        assert int(answer[::-1]) == sum(numbers)
        assert is_answer == [False] * 9 + [True] * 3
        sums += numbers
    assert scipy.stats.kstest(np.array(sums) / 99, "uniform").pvalue > 1e-3


def test_recall_rows_ask_for_pairs_that_they_hold():
    places, values = collections.Counter(), collections.Counter()
    for tokens, is_answer in rows_of(RECALL):
        pairs = dict(divmod(token - 12, 6) for token in tokens[:4])
        assert len(pairs) == 4
        assert pairs.keys() <= set(range(6))
        asked = tokens[4::2]
        assert len(set(asked)) == 3
        assert [6 + pairs[key] for key in asked] == tokens[5::2]
        assert is_answer == [False] * 4 + [False, True] * 3
        places.update(list(pairs).index(key) for key in asked)
        values.update(pairs.values())
    assert sorted(places) == list(range(4))
    assert sorted(values) == list(range(6))
    assert scipy.stats.chisquare(list(places.values())).pvalue > 1e-3
    assert scipy.stats.chisquare(list(values.values())).pvalue > 1e-3


# Rows of batch 5 of seed 3, and held-out rows. If this fails, raise FORMAT_VERSION: old records are of other
# data.
HASHES = {KHOP: ("65bf", "1b43"), ADDITION: ("02db", "81ba"), RECALL: ("ccd8", "b563")}


@pytest.mark.parametrize("spec", SPECS)
def test_rows_stay_the_same(spec):
    prepared = make(spec)
    batches = [*take(prepared, 1, start_step=5), *prepared.eval_batches(batch_size=8, rows=8)]
    hashes = (hashlib.sha256(batch.astype("<i4").tobytes()).hexdigest()[:4] for batch in batches)
    assert tuple(hashes) == HASHES[spec]


@pytest.mark.parametrize("spec", SPECS)
def test_the_step_is_the_whole_state(spec):
    prepared = make(spec)
    np.testing.assert_array_equal(take(prepared, 3, start_step=4), take(prepared, 7)[4:])


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_rows_of_one(processes):
    prepared = make(KHOP)
    whole, split = take(prepared, 2), np.empty((2, 6, 21), np.int32)
    for i in range(processes):
        split[:, i::processes] = take(prepared, 2, process_index=i, process_count=processes)
    np.testing.assert_array_equal(split, whole)
    with pytest.raises(UserError, match=r"train\.batch_size: 6 is not divisible by the 4 processes"):
        take(prepared, 1, process_count=4)


def test_nothing_repeats_and_held_out_rows_are_no_training_rows():
    prepared = make("recall:pairs=8,symbols=12,queries=4", **{"data.sequence_length": 15})
    (held_out,) = prepared.eval_batches(batch_size=600, rows=600)
    rows = [held_out, *(take(prepared, 100, seed=seed).reshape(-1, 16) for seed in (0, 1, 2))]
    assert len(np.unique(np.concatenate(rows), axis=0)) == 600 + 3 * 600


def test_held_out_rows_are_the_same_for_every_run():
    prepared = make(ADDITION)
    (more,) = prepared.eval_batches(batch_size=20, rows=20)
    batches = list(prepared.eval_batches(batch_size=8, rows=11))
    np.testing.assert_array_equal(np.concatenate(batches)[:11], more[:11])
    assert (np.concatenate(batches)[11:] == -1).all()
    (part,) = prepared.eval_batches(batch_size=20, rows=20, process_index=1, process_count=2)
    np.testing.assert_array_equal(part, more[1::2])


def test_rows_for_tuning_are_a_stream_of_their_own():
    prepared = make("recall:pairs=8,symbols=12,queries=4", **{"data.sequence_length": 15})
    valid, tuning = (
        next(prepared.eval_batches(batch_size=600, rows=600, split=split)) for split in ("valid", "tuning")
    )
    rows = [valid, tuning, take(prepared, 100).reshape(-1, 16)]
    assert len(np.unique(np.concatenate(rows), axis=0)) == 600 + 600 + 600
    np.testing.assert_array_equal(valid, next(prepared.eval_batches(batch_size=600, rows=600)))


def test_the_held_out_task_may_have_other_numbers():
    other = KHOP.replace("hops=3,min_hops=2", "hops=3,min_hops=3")
    prepared = make(KHOP, **{"data.valid_source": other})
    (batch,) = prepared.eval_batches(batch_size=8, rows=8)
    assert ((batch == ~7).sum(axis=1) == 3).all()
    np.testing.assert_array_equal(take(prepared, 2), take(make(KHOP), 2))


def test_the_card_identifies_the_task_and_nothing_is_written(tmp_path):
    cache = {"data.cache_dir": str(tmp_path / "cache")}
    prepared = make(KHOP, **cache)
    assert not (tmp_path / "cache").exists()
    assert prepared.bytes_per_token("valid") is None
    card = prepared.card
    assert (card["source"], card["vocab_size"], card["tokenizer"]) == (KHOP, 57, None)
    same = make("khop:symbols=7, queries=2, hops=3, min_hops=2").card
    other = make(KHOP.replace("queries=2", "queries=1"), **{"data.valid_source": KHOP}).card
    assert same["source_sha256"] == card["source_sha256"] == other["valid_source_sha256"]
    assert other["source_sha256"] != card["source_sha256"]
    assert other["tokenizer_sha256"] == card["tokenizer_sha256"] != make(RECALL).card["tokenizer_sha256"]


SHORT = {"data.sequence_length": 18}
BAD = [
    ({"data.source": "khop:"}, "data.source: 'khop:' is not valid; expected 'khop:hops=<integer>,min_hops="),
    ({"data.source": "khop:hops=3"}, "data.source: 'khop:hops=3' lacks min_hops, symbols, queries; expected"),
    ({"data.source": f"{KHOP},hops=2"}, f"data.source: '{KHOP},hops=2' is not valid; expected"),
    ({"data.source": f"{RECALL},pear=2"}, "has no parameter 'pear'; did you mean pairs?"),
    ({"data.source": KHOP.replace("=3", "=x")}, "is not valid; expected"),
    ({"data.source": KHOP.replace("symbols=7", "symbols=6")}, "symbols: 6 is not valid; expected more than"),
    (
        {"data.source": KHOP.replace("min_hops=2", "min_hops=4")},
        "min_hops: 4 is not valid; expected 1 to hops",
    ),
    (
        {"data.source": KHOP.replace("queries=2", "queries=0")},
        "queries: 0 is not valid; expected 1 to symbols",
    ),
    ({"data.source": ADDITION.replace("=3", "=1")}, "operands: 1 is not valid; expected 2 to 1000"),
    ({"data.source": ADDITION.replace("=2", "=16")}, "digits: 16 is not valid; expected 1 to 15"),
    ({"data.source": RECALL.replace("symbols=6", "symbols=3")}, "symbols: 3 is not valid; expected at least"),
    (
        {"data.source": RECALL.replace("queries=3", "queries=5")},
        "queries: 5 is not valid; expected 1 to pairs",
    ),
    (
        SHORT,
        f"data.sequence_length: 18 is too short for data.source='{KHOP}'; the smallest valid value is 19",
    ),
    (
        {"data.valid_source": KHOP.replace("symbols=7", "symbols=8")},
        "symbols=8,queries=2' has 73 token ids; expected 57, as in data.source='khop:",
    ),
    ({"data.valid_source": "khop:hops=3"}, "data.valid_source: 'khop:hops=3' lacks min_hops"),
    ({"data.valid_source": RECALL}, f"data.valid_source: '{RECALL}' is not valid; expected khop, like"),
    ({"data.valid_source": "files:x"}, "data.valid_source: 'files:x' is not valid; expected khop, like"),
    ({"data.source": "khop"}, "data.source: 'khop' is not valid; expected 'bundled' or one of 'files:...'"),
    ({"train.eval_rows": 0}, "train.eval_rows: 0 is not valid; expected at least 1"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_is_named(overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make(KHOP, **{"data.sequence_length": 30, **overrides})


def test_the_vocabulary_must_hold_all_tokens():
    config = tiny_config(**{"data.source": KHOP, "data.sequence_length": 19, "train.eval_rows": 8})
    data.prepare(config.data, vocab_size=57)
    with pytest.raises(UserError, match=r"model\.vocab_size: 56 is too small .* smallest valid value is 57"):
        data.prepare(config.data, vocab_size=56)
    assert int(max(take(make(KHOP), 20).max(), (~take(make(KHOP), 20)).max())) <= 56


def test_the_largest_sums_do_not_overflow():
    task = make("addition:operands=12,digits=15", **{"data.sequence_length": 220}).train
    nines = np.full((1, task.draws), 10**15 - 1, np.uint64)
    answer = task.rows(nines)[0, -17:]
    assert int("".join(map(str, answer[::-1]))) == 12 * (10**15 - 1)
    assert dataclasses.astuple(task) == (12, 15)


@pytest.mark.parametrize("preset", khop.PRESETS)
def test_the_study_fits_its_task(preset):
    """Rows without padding, no unused token id, equal parameters, and pairs of points that are there."""
    study, labels, sizes = khop.study(preset), [], []
    for overrides in khop.sweep(preset):
        labels.append(" x ".join(str(overrides[name]) for name in study.scientific))
        config = from_config_dict(base.update(khop.get_config(preset), overrides))
        prepared = data.prepare(config.data, config.model.vocab_size)
        assert prepared.train.length == config.data.sequence_length
        assert prepared.train.vocab_size == config.model.vocab_size
        assert config.train.eval_every * 5 == config.train.steps
        sizes.append(accounting.parameters(config.model).non_embedding)
    assert len(set(labels)) == len(labels) == (3 if preset == "orders" else 7)
    assert {label for pair in study.pairs for label in pair} == set(labels)
    assert max(sizes) / min(sizes) - 1 <= study.tolerance
