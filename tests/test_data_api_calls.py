"""Generated API calls: the same everywhere, disjoint splits, typed values that the words say."""

import dataclasses
import hashlib
import json
import re

import numpy as np
import pytest
from test_data_prepare import config

from mobilellm_jax import data
from mobilellm_jax.data import api_calls, chat, phone
from mobilellm_jax.data.api_calls import SPLITS, TESTS, Spec, generate
from mobilellm_jax.data.phone import INTENTS
from mobilellm_jax.errors import UserError

# sha256 of 200 conversations of each split, in the template.
GOLDEN = {
    "train": "11cff8c4d91371b4",
    "combinations": "ad0cb60e2f3e6007",
    "values": "fb02e02e12810e53",
    "wordings": "71749d2b580b10cc",
}
SIZE = 600


@pytest.fixture(scope="module")
def several():
    return {split: list(generate(Spec(split=split, conversations=SIZE))) for split in SPLITS}


def calls_of(conversations):
    return [turn.text for turns in conversations for turn in turns if turn.role == "call"]


def wishes_of(conversations):
    """First sentences of tasks: those after an answer, or at the beginning."""
    found = []
    for turns in conversations:
        before = ["", *(turn.text for turn in turns)]
        found += [t.text for t, b in zip(turns, before, strict=False) if t.role == "user" and b[-1:] != "?"]
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_conversations_are_the_same_everywhere(several, split):
    text = "\0".join(map(chat.render, several[split][:200]))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == GOLDEN[split]


def test_a_longer_source_begins_like_a_shorter_one_and_seeds_differ():
    short, long = (list(generate(Spec(conversations=n))) for n in (5, 9))
    assert long[:5] == short
    assert list(generate(Spec(conversations=5, seed=1))) != short
    assert all(len(calls_of([turns])) == 1 for turns in generate(Spec(conversations=50, tasks=1)))
    two = {json.loads(text)["intent"] for text in calls_of(generate(Spec(conversations=50, intents=2)))}
    assert two == {"make_call", "play_song"}


def test_no_call_of_a_test_is_in_training(several):
    """Of other seeds neither."""
    train = {*calls_of(several["train"]), *calls_of(generate(Spec(conversations=SIZE, seed=7)))}
    for split in TESTS:
        assert len({*calls_of(several[split])} - train) == len({*calls_of(several[split])}) > 300


def test_combinations_have_values_and_wordings_of_training(several):
    def slots(split):
        pairs = {pair for text in calls_of(several[split]) for pair in json.loads(text).items()}
        return {(name, value) for name, value in pairs if isinstance(value, str) and ":" not in value}

    assert slots("combinations") <= slots("train")
    assert slots("wordings") <= slots("train")
    openings = {split: {text.split()[0] for text in wishes_of(several[split])} for split in SPLITS}
    assert openings["combinations"] <= openings["train"] >= openings["values"]


def test_every_call_of_values_has_an_unseen_value(several):
    seen = {value for text in calls_of(several["train"]) for value in json.loads(text).values()}
    assert all(set(json.loads(text).values()) - seen for text in calls_of(several["values"]))


def test_wordings_are_unseen(several):
    def patterns(which):
        found = []
        for intent in INTENTS.values():
            sentences = [*which(intent.wordings), *which(intent.short)]
            found += [re.sub(r"\\{\w+\\}", ".+", re.escape(sentence)) for sentence in sentences]
        return re.compile("|".join(found))

    known, new = patterns(lambda of: of[:-1]), patterns(lambda of: of[-1:])
    for split in SPLITS:
        wishes = wishes_of(several[split])
        assert all((new if split == "wordings" else known).fullmatch(wish) for wish in wishes)
    assert not any(known.fullmatch(wish) for wish in wishes_of(several["wordings"]))


def number(words):
    """A reading of numbers apart from the generator's."""
    tens = {name: 10 * (2 + i) for i, name in enumerate(phone.TENS)}
    ones = {name: i for i, name in enumerate(phone.ONES)}
    return int(words) if words.isdigit() else sum({**tens, **ones}[word] for word in words.split())


def clock(words):
    if match := re.fullmatch(r"(\d+):(\d\d)( am| pm)?", words):
        hour = int(match[1]) if not match[3] else int(match[1]) % 12 + 12 * (match[3] == " pm")
        return f"{hour:02}:{match[2]}"
    past, hour, half = re.fullmatch(r"(half past |quarter past |)(\w+) in the (\w+)", words).groups()
    minute = {"half past ": 30, "quarter past ": 15, "": 0}[past]
    return f"{number(hour) % 12 + 12 * (half == 'evening'):02}:{minute:02}"


def test_asked_slots_are_typed_as_said(several):
    """The assistant asks, and the next call has what was answered."""
    kinds, seen = {name: kind for i in INTENTS.values() for name, kind in i.slots.items()}, set()
    for turns in several["train"]:
        for place, turn in enumerate(turns):
            if turn.role == "call" and turns[place - 2].role == "assistant" and place >= 2:
                call = json.loads(turn.text)
                if not turns[place - 2].text.endswith("?"):
                    continue
                slot = INTENTS[call["intent"]].missing
                said = turns[place - 1].text
                read = clock if kinds[slot] == "time" else number if isinstance(call[slot], int) else str
                assert read(said) == call[slot]
                seen.add((call["intent"], type(call[slot])))
    assert {name for name, _ in seen} == set(INTENTS)
    assert {kind for _, kind in seen} == {int, str}


def test_every_conversation_is_valid_and_of_the_paper_s_length(several):
    conversations = [turns for split in SPLITS for turns in several[split]]
    for turns in conversations:
        chat.check(turns)
    assert 8 <= np.mean([*map(len, conversations)]) <= 11


def test_as_a_source(tmp_path):
    source = "api_calls:conversations=40,tasks=1"
    held_out = "api_calls:split=values,conversations=30,tasks=1"
    prepared = data.prepare(
        config(tmp_path, source=source, valid_source=held_out, tokenizer="bpe:400", sequence_length=127), 400
    )
    assert prepared.card["splits"]["train"]["documents"] == 40
    assert prepared.card["splits"]["valid"]["documents"] == 20
    assert prepared.card["held_out_documents_in_train"] == 0
    others = [source, "api_calls:conversations=40,tasks=1,seed=1", "api_calls:conversations=41,tasks=1"]
    hashes = [api_calls.open_api_calls(spec, "").sha256 for spec in others]
    assert hashes[0] == prepared.card["source_sha256"]
    assert len({*hashes}) == 3
    plain = api_calls.open_api_calls("api_calls:", "").sha256
    assert plain == api_calls.open_api_calls("api_calls:split=train,conversations=5000", "").sha256


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("api_calls:task=1", "did you mean tasks"),
        ("api_calls:tasks", "expected <name>=<value>"),
        ("api_calls:tasks=1,tasks=2", "'tasks=2' is not valid"),
        ("api_calls:tasks=x", "expected an integer"),
        ("api_calls:tasks=0", "tasks: 0 is not valid; expected 1 to 8"),
        ("api_calls:split=test", "expected train, combinations, values, wordings"),
    ],
)
def test_bad_specs(tmp_path, spec, message):
    with pytest.raises(UserError) as error:
        data.prepare(config(tmp_path, source=spec), 258)
    assert str(error.value).startswith(f"data.source: {spec!r}")
    assert message in str(error.value)


def test_defaults_are_the_paper_s_sizes():
    assert [Spec(split=split).count for split in SPLITS] == [5000, 2500, 2500, 2500]
    assert dataclasses.replace(Spec(), conversations=3).count == 3
