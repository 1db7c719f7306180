"""Manipulation, knowledge, breadth and hops against plain solvers of single rows; floors against sampling."""

import collections
import hashlib
import itertools
import math
import re

import numpy as np
import pytest
import scipy.stats
from conftest import tiny_config

from mobilellm_jax import data
from mobilellm_jax.data.rows import targets_of
from mobilellm_jax.data.tasks.task import NO_LEVEL
from mobilellm_jax.errors import UserError

ARITHMETIC = "manipulation:modulus=5,operations=4,operators=3"
FACTS = "knowledge:people=50,attributes=3,values=8,wordings=2,symbols=4,exposures=6"
GRAPHS = "breadth:vertices=6,parents=2"
HOPS = "khop:hops=2,min_hops=1,symbols=7,queries=3,tokens_per_node=2"
LENGTHS = {ARITHMETIC: 9, FACTS: 8, GRAPHS: 15, HOPS: 54}
SIZES = {"total": 200, "non_embedding": 100}


def make(spec, length=None, **overrides):
    values = {
        "data.source": spec,
        "data.sequence_length": length or LENGTHS.get(spec, 20),
        "train.eval_rows": 8,
    }
    return data.prepare(tiny_config(**{**values, **overrides}).data, vocab_size=200)


def take(prepared, steps, **options):
    batches = prepared.train_batches(**{"batch_size": 6, "seed": 3, **options})
    return np.concatenate(list(itertools.islice(batches, steps)))


def read(ids):
    """Inputs and targets (None where there is none) of one row, read as `rows.py` says."""
    inputs, targets = [], []
    for i in ids:
        asked = i >= 2**30
        inputs.append((i & 32767) if asked else ~i if i < 0 else i)
        targets.append((i >> 15 & 32767) if asked else None if i < 0 else i)
    return inputs[:-1], targets[1:]


# --- manipulation --------------------------------------------------------------------------------------


def test_every_operator_asks_for_the_value_of_what_it_ends():
    prepared, shapes = make(ARITHMETIC, 10), collections.Counter()
    rows = prepared.rows("train", 400, 3)
    levels = prepared.train.levels_of(rows)
    for row, level in zip(rows.tolist(), levels.tolist(), strict=True):
        inputs, targets = read(row)
        assert (targets[9], level[9]) == (None, NO_LEVEL)  # padding
        stack, seen = [], ""
        for token, target, size in zip(inputs[:9], targets, level, strict=False):
            if token < 5:
                assert (target, size) == (None, NO_LEVEL)
                stack.append((token, 0))
            else:
                (right, of_right), (left, of_left) = stack.pop(), stack.pop()
                value = {5: left + right, 6: left - right, 7: left * right}[token] % 5
                stack.append((value, of_left + of_right + 1))
                assert (target, size) == stack[-1]
            seen += "n" if token < 5 else "o"
        assert len(stack) == 1
        shapes[seen] += 1
    assert len(shapes) == 14  # binary trees with 4 operators
    assert scipy.stats.chisquare(list(shapes.values())).pvalue > 1e-3


def test_numbers_and_operators_are_drawn_alike():
    rows = make(ARITHMETIC).rows("train", 2000, 1)
    tokens = np.array([read(row)[0] for row in rows.tolist()]).ravel()
    counts = np.bincount(tokens, minlength=8)
    assert scipy.stats.chisquare(counts[:5]).pvalue > 1e-3
    assert scipy.stats.chisquare(counts[5:]).pvalue > 1e-3
    two = make(ARITHMETIC.replace("operators=3", "operators=2")).rows("train", 200, 1)
    assert {token for row in two.tolist() for token in read(row)[0]} == set(range(7))


# --- knowledge -----------------------------------------------------------------------------------------


def test_rows_tell_the_facts_of_one_table_in_several_wordings():
    prepared = make(FACTS)
    names, facts = prepared.train.table()
    assert (names.shape, facts.shape) == ((50, 3), (50, 3))
    people = {tuple(name): tuple(values) for name, values in zip(names.tolist(), facts.tolist(), strict=True)}
    assert len(people) == 50
    cues, orders = collections.Counter(), collections.Counter()
    for row in take(prepared, 50).tolist():
        inputs, targets = read(row)
        told = people[tuple(token - 14 for token in inputs[:3])]
        order = [(cue - 8) // 2 for cue in inputs[3::2]]
        assert sorted(order) == [0, 1, 2]
        values = [told[attribute] for attribute in order]
        assert targets == [None, None, None, values[0], None, values[1], None, values[2]]
        assert inputs[4::2] == values[:2]
        cues.update(inputs[3::2])
        orders[tuple(order)] += 1
    assert scipy.stats.chisquare(list(cues.values())).pvalue > 1e-3
    assert len(orders) == 6
    assert scipy.stats.chisquare(list(orders.values())).pvalue > 1e-3
    assert scipy.stats.chisquare(np.bincount(facts.ravel(), minlength=8)).pvalue > 1e-3


@pytest.mark.parametrize("batch", [6, 50, 64])
def test_each_pass_tells_of_everybody_once_in_another_order(batch):
    steps = -(-50 * 6 // batch)
    rows = take(make(FACTS), steps, batch_size=batch)[: 50 * 6]
    passes = [[tuple(row[:3]) for row in part] for part in rows.reshape(6, 50, -1).tolist()]
    assert all(len(set(part)) == 50 for part in passes)
    assert len({tuple(part) for part in passes}) == 6
    other = take(make(FACTS), steps, batch_size=batch, seed=4)[: 50 * 6]
    assert (other != rows).any()
    later = take(make(FACTS), 2, batch_size=batch, start_step=3)  # the step is the whole state
    np.testing.assert_array_equal(later, take(make(FACTS), 5, batch_size=batch)[3 * batch :])


def test_every_split_asks_about_everybody_once():
    prepared = make(FACTS)
    rows = {split: prepared.rows(split, 50, 0) for split in ("valid", "tuning")}
    for of_split in rows.values():
        assert len({tuple(row[:3]) for row in of_split.tolist()}) == 50
    assert (rows["valid"] != rows["tuning"]).any()


def test_bits_are_those_that_a_uniform_code_pays_more():
    prepared = make(FACTS)
    rows = prepared.rows("valid", 50, 0)
    targets = targets_of(rows)
    # A model that knows half of the facts, and of the others only which four of eight it may be.
    nats = np.where(targets >= 0, np.where(np.arange(50)[:, None] < 25, 0.0, math.log(4)), 0.0)
    guesses = np.where(np.arange(50)[:, None] < 25, targets, 9)
    found = prepared.valid.measures(rows, nats, guesses, SIZES)
    bits = 25 * 3 * 3 + 25 * 3 * 1
    assert found.values == pytest.approx(
        {
            "bits": bits,
            "bits_per_parameter": bits / 200,
            "bits_per_non_embedding_parameter": bits / 100,
            "forgotten": 1 - bits / 450,
            "wrong": 0.5,
        }
    )
    assert found.floor == pytest.approx({"bits": 0, "forgotten": 1, "wrong": 7 / 8})
    assert found.ceiling == pytest.approx({"bits": 450, "forgotten": 0, "wrong": 0})
    uniform = prepared.valid.measures(rows, np.where(targets >= 0, math.log(8), 0), guesses, SIZES)
    assert uniform.values["bits"] == pytest.approx(0, abs=1e-9)


def test_steps_must_tell_of_everybody_as_often_as_the_spec_says():
    task = make(FACTS).train
    task.check_steps(50, 6)
    task.check_steps(5, 64)  # 300 rows in whole steps of 64
    with pytest.raises(UserError) as caught:
        task.check_steps(49, 6)
    assert str(caught.value) == (
        "train.steps: 49 steps of 6 rows tell of each of 50 people 5.88 times, but data.source has "
        "exposures=6; use train.steps=50"
    )
    with pytest.raises(UserError, match=r"use train\.steps=5$"):
        task.check_steps(6, 64)


def test_other_exposures_are_other_training_but_not_other_data():
    more = FACTS.replace("exposures=6", "exposures=12")
    a, b = make(FACTS), make(more, 8)
    assert a.card["source_sha256"] == b.card["source_sha256"]
    np.testing.assert_array_equal(take(a, 4), take(b, 4))
    assert make(FACTS.replace("people=50", "people=51"), 8).card["source_sha256"] != a.card["source_sha256"]


# --- breadth -------------------------------------------------------------------------------------------


def graph(tokens, vertices=6):
    """Parents of each vertex, and the vertex asked about."""
    edges = sum(min(child, 2) for child in range(vertices))
    arrows = [divmod(token - vertices - 1, vertices) for token in tokens[:edges] if token != vertices]
    assert all(0 <= a < vertices for a, _ in arrows)
    assert len(set(arrows)) == len(arrows)
    parents = {vertex: {a for a, b in arrows if b == vertex} for vertex in range(vertices)}
    return parents, tokens[edges], edges


def ancestors(parents, vertex):
    return set().union(*({p} | ancestors(parents, p) for p in parents[vertex])) if parents[vertex] else set()


def is_valid(parents, asked, answer):
    wanted = ancestors(parents, asked) | {asked}
    in_order = all(parents[vertex] <= set(answer[:place]) for place, vertex in enumerate(answer))
    return sorted(answer) == sorted(wanted) and in_order


def test_answers_are_all_ancestors_in_an_order_that_is_valid():
    prepared, sizes, roots = make(GRAPHS, 17), collections.Counter(), collections.Counter()
    rows = prepared.rows("train", 500, 3)
    levels = prepared.train.levels_of(rows)
    for row, level in zip(rows.tolist(), levels.tolist(), strict=True):
        inputs, targets = read(row)
        parents, asked, edges = graph(inputs)
        assert all(len(of) <= 2 for of in parents.values())
        answer = [target for target in targets if target is not None]
        assert targets[edges : edges + len(answer)] == answer
        assert is_valid(parents, asked, answer)
        assert [level for level in level if level != NO_LEVEL] == [len(answer)]
        assert level[edges + len(answer) - 1] == len(answer)
        sizes[len(answer)] += 1
        roots[answer[0]] += 1
    assert set(sizes) == {2, 3, 4, 5, 6}
    assert scipy.stats.chisquare(list(roots.values())).pvalue > 1e-3


def greedy(parents, asked, prefer):
    """The answer of a decoder that takes, at every place, the vertex it prefers after the answer so far."""
    answer = []
    while len(answer) < 6 and (not answer or answer[-1] != asked):
        answer.append(prefer(tuple(answer)))
    return answer


@pytest.mark.parametrize("mistakes", [0.0, 0.1, 0.5])
def test_following_the_guesses_decides_as_greedy_decoding_would(mistakes):
    """Of decoders with preferences of their own, some right in another order than the row's, some wrong."""
    task = make(GRAPHS).train
    rows = make(GRAPHS).rows("valid", 200, 0)
    problems = [graph(read(row)[0]) for row in rows.tolist()]

    def prefer(i, answer):
        """The next vertex of decoder i, a function of the answer so far, mostly a valid one."""
        parents, asked, _ = problems[i]
        rng = np.random.default_rng([i, len(answer), *answer])
        wanted = ancestors(parents, asked) | {asked}
        valid = [v for v in sorted(wanted - set(answer)) if parents[v] <= set(answer)]
        if rng.random() < mistakes or not valid:
            return int(rng.integers(6))
        return valid[int(rng.integers(len(valid)))]

    def guesses_of(rows):
        found = np.full((len(rows), rows.shape[1] - 1), -7)
        for i, row in enumerate(rows.tolist()):
            _, targets = read(row)
            start = problems[i][2]
            for place in range(6):
                found[i, start + place] = prefer(
                    i, tuple(t for t in targets[start : start + place] if t is not None)
                )
        return found

    followed, passes = rows, 0
    while True:
        guesses, passes = guesses_of(followed), passes + 1
        ahead = task.follow(followed, guesses)
        if (ahead == followed).all():
            break
        followed = ahead
    assert passes <= 7
    right = task.right(followed, guesses)[:, 0]
    expected = [
        is_valid(parents, asked, greedy(parents, asked, lambda answer, i=i: prefer(i, answer)))
        for i, (parents, asked, _) in enumerate(problems)
    ]
    assert right.tolist() == expected
    assert (sum(expected) == 200) == (mistakes == 0)
    assert sum(expected) > 0
    if mistakes == 0:
        assert (followed != rows).any(axis=1).sum() > 15  # other orders than the rows'


# --- hops of two tokens --------------------------------------------------------------------------------


def test_two_tokens_a_node_tell_the_same_problem():
    one = make(HOPS.removesuffix(",tokens_per_node=2"), 25)
    two = make(HOPS)
    assert two.train.vocab_size == 7
    for short, long in zip(one.rows("train", 50, 3).tolist(), two.rows("train", 50, 3).tolist(), strict=True):
        (inputs, targets), (long_inputs, long_targets) = read(short), read(long)
        expected, answers = [], []
        for token, target in zip([*inputs[:19], 0], [None, *targets[:19]], strict=True):
            if token > 7:  # an arrow
                for symbol in divmod(token - 8, 7):
                    expected += [symbol // 3, 3 + symbol % 3]
                    answers += [None, None]
            elif token == 7:
                expected, answers = [*expected, 6], [*answers, None]
            else:
                digits = [token // 3, 3 + token % 3]
                expected += digits
                answers += [None, None] if target is None else digits
        length = len(expected) - 2
        assert long_inputs[:length] == expected[:length]
        assert long_targets[: length - 1] == answers[1:length]


def test_an_answer_of_two_tokens_is_right_if_both_are():
    task, rows = make(HOPS).train, make(HOPS).rows("valid", 40, 0)
    guesses = targets_of(rows).copy()
    levels = task.levels_of(rows)
    ends = np.argwhere(levels != NO_LEVEL)
    assert len(ends) == 40 * 6
    assert (targets_of(rows)[levels != NO_LEVEL] >= 3).all()  # second digits
    for place, (row, column) in enumerate(ends):
        if place % 3 == 0:  # a third has a wrong first digit
            guesses[row, column - 1] = 99
    found = task.by_level(rows, guesses)
    assert (found["level"], found["answers"]) == ([1, 2], [120, 120])
    assert np.dot(found["accuracy"], found["answers"]) == pytest.approx(160)


# --- floors and measures of all ------------------------------------------------------------------------

FLOORS = [
    ARITHMETIC,
    ARITHMETIC.replace("modulus=5", "modulus=2").replace("operators=3", "operators=1"),
    "addition:operands=3,digits=2",
    "recall:pairs=4,symbols=6,queries=3",
    FACTS,
]


@pytest.mark.parametrize("spec", FLOORS)
def test_floors_are_the_share_of_the_commonest_answer(spec):
    prepared = make(spec, 20)
    rows = prepared.rows("train", 20_000 if "knowledge" not in spec else 50, 1)
    levels, targets = prepared.train.levels_of(rows), targets_of(rows)
    for level, floor in prepared.train.floors().items():
        answers = targets[levels == level]
        assert len(answers) > 0
        counts = np.bincount(answers)
        error = math.sqrt(floor * (1 - floor) / len(answers))
        tolerance = 0.1 if "knowledge" in spec else 5 * error + 1e-9
        assert abs(counts.max() / len(answers) - floor) <= tolerance + 2 * error


def test_the_floors_of_manipulation_are_those_of_all_expressions():
    def values(size):
        """Values of all expressions with so many operators, one for each tree, operator and number."""
        if size == 0:
            return [0, 1, 2]
        return [
            x % 3
            for left in range(size)
            for a, b in itertools.product(values(left), values(size - 1 - left))
            for x in (a + b, a - b, a * b)
        ]

    floors = make("manipulation:modulus=3,operations=3,operators=3").train.floors()
    for size in (1, 2, 3):
        every = values(size)
        assert floors[size] == pytest.approx(max(np.bincount(every)) / len(every), rel=1e-12)


def test_the_floor_of_hops_is_a_symbol_other_than_the_one_asked_about():
    spec = "khop:hops=2,min_hops=1,symbols=5,queries=1"
    rows = make(spec, 11).rows("train", 20_000, 1)
    task = make(spec, 11).train
    levels, targets = task.levels_of(rows), targets_of(rows)
    for level, floor in task.floors().items():
        r, c = np.nonzero(levels == level)
        asked = ~rows[r, c]  # the id before the answer
        assert floor == 1 / 4
        counts = np.bincount(asked * 5 + targets[r, c], minlength=25).reshape(5, 5)
        shares = counts / counts.sum(axis=1, keepdims=True)
        assert shares.max() == pytest.approx(floor, abs=0.035)


def test_the_floor_of_breadth_is_one_answer_of_as_many_vertices():
    task, rows = make(GRAPHS).train, make(GRAPHS).rows("train", 60_000, 1)
    targets, levels = targets_of(rows)[:, 9:15], task.levels_of(rows)
    size = levels.max(axis=1)
    for vertices in (2, 3):
        found = targets[size == vertices][:, :vertices]
        asked = found[:, -1] == 4
        answers = collections.Counter(map(tuple, found[asked].tolist()))
        floor = task.floors()[vertices]
        assert len(answers) == round(1 / floor) == math.perm(5, vertices - 1)
        assert scipy.stats.chisquare(list(answers.values())).pvalue > 1e-3


@pytest.mark.parametrize("spec", [ARITHMETIC, GRAPHS, HOPS])
def test_accuracy_by_level_is_that_of_a_loop(spec):
    task, rows = make(spec).train, make(spec).rows("valid", 60, 0)
    rng, targets = np.random.default_rng(0), targets_of(rows)
    guesses = np.where(rng.random(targets.shape) < 0.2, 99, targets)
    right, wrong_rows = collections.defaultdict(list), 0
    levels = task.levels_of(rows)
    for i in range(60):
        wrong_rows += any(t >= 0 and g != t for t, g in zip(targets[i], guesses[i], strict=True))
        for place, level in enumerate(levels[i]):
            if level == NO_LEVEL:
                continue
            answer = [place]
            if spec == HOPS:
                answer = [place - 1, place]
            if spec == GRAPHS:
                answer = [p for p, t in enumerate(targets[i]) if t >= 0]
            right[level].append(all(guesses[i][p] == targets[i][p] for p in answer))
    found = task.measures(rows, np.zeros(targets.shape), guesses, SIZES)
    assert found.levels["level"] == sorted(right)
    means = [np.mean(right[level]) for level in sorted(right)]
    np.testing.assert_allclose(found.levels["accuracy"], means)
    assert found.levels["answers"] == [len(right[level]) for level in sorted(right)]
    assert found.values == pytest.approx({"error": wrong_rows / 60, "wrong": 1 - np.mean(means)})
    assert ("error" in found.floor) == (spec == GRAPHS)
    perfect = task.measures(rows, np.zeros(targets.shape), targets, SIZES)
    assert perfect.values == pytest.approx({"error": 0, "wrong": 0})


# Rows of batch 5 of seed 3, and held-out rows. If this fails, raise FORMAT_VERSION: old records are of other
# data.
HASHES = {
    ARITHMETIC: ("b1ba", "4b09"),
    FACTS: ("bbb8", "a167"),
    GRAPHS: ("60c5", "5530"),
    HOPS: ("5b7c", "193c"),
}


@pytest.mark.parametrize("spec", HASHES)
def test_rows_stay_the_same(spec):
    prepared = make(spec)
    batches = [take(prepared, 1, start_step=5), *prepared.eval_batches(batch_size=8, rows=8)]
    hashes = (hashlib.sha256(batch.astype("<i4").tobytes()).hexdigest()[:4] for batch in batches)
    assert tuple(hashes) == HASHES[spec]


@pytest.mark.parametrize("spec", HASHES)
def test_rows_drawn_together_are_those_drawn_alone(spec):
    prepared = make(spec)
    alone = [prepared.train.batches(data.tasks.Stream(3, 0), 64, [step]) for step in range(20)]
    np.testing.assert_array_equal(take(prepared, 20, batch_size=64), np.concatenate(alone))


def test_a_later_parameter_with_its_default_is_the_same_task():
    old = "khop:hops=3,min_hops=2,symbols=7,queries=2"
    card = make(old, 19).card
    assert card["source_sha256"] == "a8ef4b4cc5b396a18c6c13b22b5e849786b53f499f15cb50295aec97bc8bc175"
    assert make(f"{old},tokens_per_node=1", 19).card["source_sha256"] == card["source_sha256"]
    assert make(f"{old},tokens_per_node=2", 50).card["source_sha256"] != card["source_sha256"]


BAD = [
    (ARITHMETIC, "modulus=5", "modulus=6", "modulus: 6 is not a prime; the nearest one is 5"),
    (ARITHMETIC, "modulus=5", "modulus=1", "modulus: 1 is not valid; expected a prime from 2 to 1000"),
    (ARITHMETIC, "operations=4", "operations=0", "operations: 0 is not valid; expected 1 to 500"),
    (
        ARITHMETIC,
        "operators=3",
        "operators=4",
        "operators: 4 is not valid; expected 1 to 3, the first of +-*",
    ),
    (ARITHMETIC, "operations=4", "operations=5", "data.sequence_length: 9 is too short for data.source="),
    (
        FACTS,
        "people=50",
        "people=65",
        "people: 65 are more than the 64 names of 3 tokens of symbols=4; symbols=5",
    ),
    (FACTS, "values=8", "values=1", "values: 1 is not valid; expected 2 to 100000"),
    (FACTS, "exposures=6", "exposures=0", "exposures: 0 is not valid; expected at least 1"),
    (FACTS, ",exposures=6", "", "lacks exposures; expected 'knowledge:people=<integer>,"),
    (
        GRAPHS,
        "parents=2",
        "parents=6",
        "parents: 6 is not valid; expected 1 to 5: a graph of vertices=6 has no",
    ),
    (GRAPHS, "vertices=6", "vertices=151", "vertices: 151 is not valid; expected 2 to 150"),
    (GRAPHS, "parents=2", "edges=9", "has no parameter 'edges'; valid names: parents, vertices"),
    (HOPS, "tokens_per_node=2", "tokens_per_node=3", "tokens_per_node: 3 is not valid; expected 1 or 2"),
    (HOPS, "hops=2,min_hops=1", "hops=4,min_hops=1", "symbols: 7 is not valid; expected more than 2 hops=8"),
]


@pytest.mark.parametrize(("spec", "old", "new", "message"), BAD, ids=range(len(BAD)))
def test_bad_numbers_are_named(spec, old, new, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make(spec.replace(old, new), LENGTHS[spec])
