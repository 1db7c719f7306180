"""Structure: strings of a grammar, and their exact probabilities, against a plain recursive enumeration."""

import collections
import hashlib
import itertools
import math
import re

import numpy as np
import pytest
from conftest import tiny_config

from mobilellm_jax import data
from mobilellm_jax.data.tasks.grammar import Grammar, draw_grammar
from mobilellm_jax.data.tasks.structure import Structure
from mobilellm_jax.data.tasks.task import Stream
from mobilellm_jax.errors import UserError
from mobilellm_jax.inference import strings

SPEC = "structure:levels=2,symbols=3,rules=2,grammar=5,tokens=24"
# "aaa" has two derivations from the start: S -> X Y with X = aa, Y = a.. and the other way round.
AMBIGUOUS = Grammar(
    ((((0, 1), (1, 0), (1, 1, 1)),), (((0, 0), (0, 0, 1), (1, 0)), ((0, 0, 0), (0, 1), (1, 1)))), 2
)
GRAMMARS = {
    "drawn": draw_grammar(2, 3, 2, 5),
    "three levels": draw_grammar(3, 2, 1, 0),
    "more rules": draw_grammar(2, 2, 3, 7),
    "ambiguous": AMBIGUOUS,
}


def language(grammar):
    """Probability of every string, by listing all derivations one by one."""

    def strings(level, symbol):
        if level == len(grammar.rules):
            return [((symbol,), 1.0)]
        rules = grammar.rules[level][symbol]
        return [
            (
                tuple(itertools.chain.from_iterable(s for s, _ in parts)),
                math.prod(p for _, p in parts) / len(rules),
            )
            for rule in rules
            for parts in itertools.product(*(strings(level + 1, child) for child in rule))
        ]

    found, derivations = collections.Counter(), collections.Counter()
    for string, p in strings(0, 0):
        found[string] += p
        derivations[string] += 1
    return found, derivations


@pytest.mark.parametrize("name", GRAMMARS)
def test_inside_probabilities_are_those_of_all_derivations(name):
    grammar = GRAMMARS[name]
    found, derivations = language(grammar)
    assert sum(found.values()) == pytest.approx(1)
    assert (max(derivations.values()) > 1) == (name in ("ambiguous", "more rules"))
    strings = [np.array(string) for string in found]
    log = grammar.log_probabilities(strings, [True] * len(strings))
    np.testing.assert_allclose(np.exp(log), list(found.values()), rtol=1e-12)
    assert grammar.lengths[0][0] == (min(map(len, found)), max(map(len, found)))
    expected = [
        sum(p * string.count(token) for string, p in found.items()) for token in range(grammar.symbols)
    ]
    np.testing.assert_allclose(grammar.frequencies, expected, rtol=1e-12)


@pytest.mark.parametrize("name", GRAMMARS)
def test_probabilities_to_begin_so_are_sums_over_all_strings(name):
    grammar = GRAMMARS[name]
    found, _ = language(grammar)
    begins = collections.Counter()
    for string, p in found.items():
        for length in range(len(string) + 1):
            begins[string[:length]] += p
    prefixes = [*begins]
    log = grammar.log_probabilities([np.array(p, int) for p in prefixes], [False] * len(prefixes))
    np.testing.assert_allclose(np.exp(log), list(begins.values()), rtol=1e-10)
    for prefix in prefixes[:: len(prefixes) // 20 + 1]:
        law = [begins.get((*prefix, token), 0.0) for token in range(grammar.symbols)] + [
            found.get(prefix, 0.0)
        ]
        np.testing.assert_allclose(grammar.next_law(prefix), np.array(law) / begins[prefix], atol=1e-12)


def test_what_is_no_string_has_no_probability():
    grammar = GRAMMARS["drawn"]
    found, _ = language(grammar)
    every = list(itertools.product(range(3), repeat=4))
    log = grammar.log_probabilities([np.array(string) for string in every], [True] * len(every))
    assert {s for s, value in zip(every, log, strict=True) if value > -np.inf} == {
        s for s in found if len(s) == 4
    }
    assert grammar.log_probabilities([np.zeros(30, int)], [True])[0] == -np.inf
    with pytest.raises(ValueError, match=r"no string of the grammar begins with \[0, 0, 0, 0, 0"):
        grammar.next_law([0] * 12)


def test_drawn_strings_follow_the_law_of_the_grammar():
    grammar = AMBIGUOUS
    found, _ = language(grammar)
    drawn = grammar.strings(Stream(3, 0).numbers(20_000 * grammar.choices, 0).reshape(20_000, -1))
    counts = collections.Counter(tuple(x for x in row if x < grammar.symbols) for row in drawn.tolist())
    assert counts.keys() <= found.keys()
    for string, p in found.items():
        assert abs(counts[string] - 20_000 * p) < 5 * math.sqrt(20_000 * p * (1 - p)) + 1


class Unscaled(Grammar):
    _scale = 1.0


def test_long_strings_are_scaled_and_none_underflows():
    grammar = draw_grammar(6, 3, 2, 1)
    drawn = grammar.strings(Stream(0, 0).numbers(4 * grammar.choices, 0).reshape(4, -1))
    strings = [row[row < 3] for row in drawn]
    assert min(map(len, strings)) > 150
    ends = [True, False, True, False]
    log = grammar.log_probabilities(strings, ends)
    np.testing.assert_allclose(log, Unscaled(grammar.rules, 3).log_probabilities(strings, ends), rtol=1e-12)
    longest = draw_grammar(8, 3, 2, 1)
    drawn = longest.strings(Stream(0, 0).numbers(longest.choices, 0).reshape(1, -1))
    strings = [drawn[drawn < 3]]
    assert Unscaled(longest.rules, 3).log_probabilities(strings, [True])[0] == -np.inf
    assert -1000 < longest.log_probabilities(strings, [True])[0] < -745  # log of the smallest float64


def make(spec=SPEC, length=24):
    config = tiny_config(**{"data.source": spec, "data.sequence_length": length, "train.eval_rows": 8})
    return data.prepare(config.data, vocab_size=200)


def pieces(row, separator=3):
    """Strings of a row of tokens, each with whether it is whole."""
    text = "".join("abc;"[token] for token in row)
    assert text[0] == "abc;"[separator]
    parts = text[1:].split(";")
    return [(tuple("abc".index(c) for c in part), place < len(parts) - 1) for place, part in enumerate(parts)]


def test_rows_are_strings_between_separators_and_every_token_is_a_target():
    prepared = make()
    found, _ = language(prepared.train.drawn)
    begins = {string[:length] for string in found for length in range(len(string) + 1)}
    rows = prepared.rows("train", 200, 3)
    assert rows.shape == (200, 25)
    assert (rows >= 0).all()
    for row in rows.tolist():
        for string, is_whole in pieces(row):
            assert string in (found if is_whole else begins)


def test_true_probability_of_a_row_is_the_product_of_its_strings():
    prepared = make()
    found, _ = language(prepared.train.drawn)
    begins = collections.Counter()
    for string, p in found.items():
        for length in range(len(string) + 1):
            begins[string[:length]] += p
    rows = prepared.rows("valid", 50, 0)
    expected = [
        sum(math.log((found if whole else begins)[string]) for string, whole in pieces(row))
        for row in rows.tolist()
    ]
    np.testing.assert_allclose(prepared.valid.log_probability(rows), expected, rtol=1e-10)
    # the same with the padding of a longer sequence_length
    np.testing.assert_allclose(prepared.valid.log_probability(make(length=30).rows("valid", 50, 0)), expected)


def test_divergence_is_what_a_model_pays_beyond_the_true_laws():
    """A model that gives each next token its true law has divergence 0; one that mixes in a guess, the KL."""
    task = make().train
    rows, laws = make().rows("valid", 40, 0), {}
    nats = np.zeros((40, 24))
    for i, row in enumerate(rows.tolist()):
        start = 0
        for t, token in enumerate(row[1:]):
            prefix = tuple(row[start + 1 : t + 1])
            if prefix not in laws:
                laws[prefix] = task.drawn.next_law(prefix)
            nats[i, t] = -math.log(laws[prefix][token])
            start = t + 1 if token == 3 else start
    found = task.measures(rows, nats, rows[:, 1:], {"total": 1, "non_embedding": 1})
    assert found.values["divergence"] == pytest.approx(0, abs=1e-12)
    assert found.values["log_divergence"] == pytest.approx(math.log(1e-5))
    mixed = task.measures(rows, nats + 0.25, rows[:, 1:], {"total": 1, "non_embedding": 1})
    assert mixed.values == pytest.approx({"divergence": 0.25, "log_divergence": math.log(0.25)})
    # knowing nothing: the frequencies of tokens, here counted on many rows
    many = make().rows("train", 4000, 1)[:, 1:]
    counted = np.bincount(many.ravel(), minlength=4) / many.size
    sampled = -np.log(counted)[rows[:, 1:]].mean() - nats.mean()
    assert found.floor["divergence"] == pytest.approx(sampled, abs=0.01)
    assert found.ceiling == {"divergence": 0.0}


def test_rules_of_a_level_differ_and_another_seed_draws_others():
    for seed in range(5):
        for level in draw_grammar(4, 3, 4, seed).rules:
            rules = [rule for of_symbol in level for rule in of_symbol]
            assert len(set(rules)) == len(rules) == 4 * len(level)
            assert {len(rule) for rule in rules} <= {2, 3}
    assert len({draw_grammar(4, 3, 2, seed).rules for seed in range(5)}) == 5
    assert [len(level) for level in draw_grammar(3, 4, 2, 0).rules] == [1, 4, 4]


def test_rows_stay_the_same():
    prepared = make()
    (train,), (valid,) = (
        [next(prepared.train_batches(batch_size=6, seed=3, start_step=5))],
        [next(prepared.eval_batches(batch_size=8, rows=8))],
    )
    hashes = [hashlib.sha256(batch.astype("<i4").tobytes()).hexdigest()[:4] for batch in (train, valid)]
    assert hashes == ["265c", "9b3d"]


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_string_parses_where_it_has_a_derivation(name):
    grammar = GRAMMARS[name]
    found, _ = language(grammar)
    every = [s for length in range(7) for s in itertools.product(range(grammar.symbols), repeat=length)]
    strings = [*every, *found, (grammar.symbols,), (-1, 0)]
    parses = grammar.parse([np.array(string, int) for string in strings])
    assert parses.tolist() == [string in found for string in strings]
    assert 0 < parses.sum() < len(strings)


def test_strings_are_drawn_up_to_the_next_separator(monkeypatch):
    """Of 300: some of the language, one that is not, one empty, one without an end."""
    task = Structure(levels=2, symbols=3, rules=2, grammar=5, tokens=24)
    words = sorted(language(task.drawn)[0])
    longest = max(map(len, words))
    texts = [words[place % len(words)] for place in range(297)] + [(0,) * longest, (), (0,) * (longest + 1)]

    class Fake:
        def __init__(self, params, config, sampling, context):
            assert (sampling.temperature, context) == (1, longest + 2)

        def start(self, prompts, max_new_tokens, eos_id, seed, place):
            assert (prompts, max_new_tokens, eos_id) == ([[3]] * len(prompts), longest + 1, 3)
            here = [*texts[place : place + len(prompts)], *([()] * len(prompts))][: len(prompts)]
            for step in range(max_new_tokens):
                yield [(*text, 3, *[None] * longest)[step] for text in here]

    monkeypatch.setattr(strings, "Generator", Fake)
    drawn = strings.draw_strings({}, tiny_config().model, task, 300, seed=0)
    assert [s if s is None else tuple(s.tolist()) for s in drawn] == [*texts[:-1], None]
    assert (0,) * longest not in words
    assert strings.count_parsed(task, drawn) == 297


BAD = [
    ("levels=2", "levels=0", "levels: 0 is not valid; expected 1 to 9"),
    ("levels=2", "levels=900000000", "levels: 900000000 is not valid; expected 1 to 9"),
    ("symbols=3", "symbols=1", "symbols: 1 is not valid; expected 2 to 100"),
    ("symbols=3,rules=2", "symbols=2,rules=7", "rules: 7 is not valid; expected 1 to 6, so that no two"),
    (
        "tokens=24",
        "tokens=5",
        "tokens: 5 is too short for the longest string of the grammar and a separator; the",
    ),
    ("tokens=24", "tokens=40", "data.sequence_length: 24 is too short for data.source="),
]


@pytest.mark.parametrize(("old", "new", "message"), BAD, ids=range(len(BAD)))
def test_bad_numbers_are_named(old, new, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make(SPEC.replace(old, new))


def test_the_smallest_row_that_is_offered_is_taken():
    with pytest.raises(UserError) as caught:
        Structure(levels=3, symbols=3, rules=2, grammar=1, tokens=5)
    smallest = int(re.search(r"smallest valid value is (\d+)", str(caught.value))[1])
    Structure(levels=3, symbols=3, rules=2, grammar=1, tokens=smallest)
    with pytest.raises(UserError):
        Structure(levels=3, symbols=3, rules=2, grammar=1, tokens=smallest - 1)
