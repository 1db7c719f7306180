"""Scores of API calls: broken JSON, ROUGE, standard errors, prompts of true conversations, runs, commands."""

import functools
import json
import math
import random

import numpy as np
import pytest
from commands import command
from conftest import tiny_config
from test_measures import describe

from mobilellm_jax.analysis.records import read_record, write_record
from mobilellm_jax.data import chat
from mobilellm_jax.data.api_calls import Spec, generate
from mobilellm_jax.data.chat import Turn
from mobilellm_jax.data.tokenizers import BytesTokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.inference import calls
from mobilellm_jax.inference.generate import Generator
from mobilellm_jax.runs.directory import TOKENIZER, open_tokenizer
from mobilellm_jax.runs.run import run

OURS = {"intent": "set_timer", "minutes": 7, "label": "tea"}
THEIRS = {"service": "Media", "method": "Find", "parameters": {"genre": "Comedy", "year": "1999"}}


def scored(said, right=OURS):
    return [int(value) for value in calls.score_call(said, right).values()]


@pytest.mark.parametrize(
    ("said", "right", "expected"),
    [
        ('{"intent":"set_timer","minutes":7,"label":"tea"}', OURS, [1, 1, 1, 1]),
        (' {"label": "tea", "intent": "set_timer", "minutes": 7.0}\n', OURS, [1, 1, 1, 1]),
        ('{"intent":"set_timer","minutes":"7","label":"tea"}', OURS, [1, 1, 1, 0]),
        ('{"intent":"set_timer","minutes":true,"label":"tea"}', {**OURS, "minutes": 1}, [1, 1, 1, 0]),
        ('{"intent":"set_timer","minutes":7}', OURS, [1, 1, 0, 0]),
        ('{"intent":"set_alarm","minutes":7,"label":"tea"}', OURS, [1, 0, 0, 0]),
        ('{"intent":["set_timer"]}', OURS, [1, 0, 0, 0]),
        ("{}", OURS, [1, 0, 0, 0]),
        ("[]", OURS, [0, 0, 0, 0]),
        ('"set_timer"', OURS, [0, 0, 0, 0]),
        ("Done.", OURS, [0, 0, 0, 0]),
        ("", OURS, [0, 0, 0, 0]),
        ('{"intent":"set_timer","minutes":7,"label":"tea"', OURS, [0, 0, 0, 0]),
        ('{"intent":"set_timer","minutes":7,"label":"tea"}}', OURS, [0, 0, 0, 0]),
        ('{"intent":"x","intent":"set_timer","minutes":7,"label":"tea"}', OURS, [0, 0, 0, 0]),
        ('{"intent":"set_timer","minutes":NaN,"label":"tea"}', OURS, [0, 0, 0, 0]),
        ('{"minutes":' + "9" * 5000 + "}", OURS, [0, 0, 0, 0]),
        ("[" * 100_000, OURS, [0, 0, 0, 0]),
        ('{"a":' * 100_000, OURS, [0, 0, 0, 0]),
        (json.dumps(THEIRS), THEIRS, [1, 1, 1, 1]),
        (json.dumps({**THEIRS, "service": "Music"}), THEIRS, [1, 0, 0, 0]),
        (json.dumps({**THEIRS, "parameters": {"year": "2", "genre": "x"}}), THEIRS, [1, 1, 1, 0]),
        (json.dumps({**THEIRS, "parameters": ["year", "genre"]}), THEIRS, [1, 1, 0, 0]),
        (json.dumps({**THEIRS, "more": 1}), THEIRS, [1, 1, 1, 0]),
    ],
)
def test_calls(said, right, expected):
    assert scored(said, right) == expected


def test_broken_calls_are_wrong_and_never_an_error():
    """Every cut, and thousands of random changes, of calls; a score is never below a later one."""
    rng = random.Random(0)
    for right in (OURS, THEIRS):
        text = json.dumps(right)
        said = [text[:n] for n in range(len(text))]
        for _ in range(3000):
            letters = list(text)
            for _ in range(rng.randrange(1, 4)):
                letters[rng.randrange(len(letters))] = rng.choice('{}[]":,\\0e9-\x00\ud800ünNaInfity')
            said.append("".join(letters))
        said += ["".join(rng.choices('{}[]":,1e-tru\\ ', k=rng.randrange(40))) for _ in range(3000)]
        for one in said:
            found = scored(one, right)
            assert found == sorted(found, reverse=True)
            try:
                whole = json.loads(one) == right
            except (ValueError, RecursionError):
                whole = False
            assert found[-1] <= whole


def plain_rouge(said, right):
    """By all common subsequences."""
    a, b = (
        "".join(c if c.isalnum() and c.isascii() else " " for c in t.lower()).split() for t in (said, right)
    )

    @functools.cache
    def common(i, j):
        if i == len(a) or j == len(b):
            return 0
        return max(common(i + 1, j), common(i, j + 1), (a[i] == b[j]) + common(i + 1, j + 1))

    both = sum(min(a.count(word), b.count(word)) for word in {*a})
    found = []
    for count in (both, common(0, 0)):
        p, r = count / len(a) if a else 0.0, count / len(b) if b else 0.0
        found.append(2 * p * r / (p + r) if p + r else 0.0)
    return found


ROUGE = ["rouge1", "rougeL"]
SENTENCES = [
    "Your alarm is set.",
    "the alarm is set is your",
    "",
    "Grüße, 7:30 am!",
    "a a b a",
    "b a a",
    "set",
]


@pytest.mark.parametrize("right", SENTENCES)
def test_rouge(right):
    for said in SENTENCES:
        assert [*calls.rouge(said, right).values()] == pytest.approx(plain_rouge(said, right))


def test_rouge_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rougeL"])
    for said in SENTENCES:
        for right in SENTENCES:
            expected = [score.fmeasure for score in scorer.score(right, said).values()]
            assert [*calls.rouge(said, right).values()] == pytest.approx(expected)


def test_standard_errors_are_over_conversations():
    """Where each has one turn, that of a mean; where turns repeat each other, no smaller."""
    values = np.random.default_rng(0).random(30)
    mean, error = calls.mean_and_error(values.tolist(), [*range(30)])
    assert (mean, error) == pytest.approx((values.mean(), values.std(ddof=1) / math.sqrt(30)))
    twice = calls.mean_and_error([*values, *values], [*range(30), *range(30)])
    assert twice == pytest.approx((mean, error))
    assert calls.mean_and_error([0.0, 1.0], [4, 4]) == (0.5, None)


class Oracle(Generator):
    """Says what stands after the prompt in a true conversation, changed by `change`."""

    def __init__(self, conversations, change, context, prompts):
        encoded = chat.encode(BytesTokenizer(), conversations)
        self.known = [[max(i, ~i) for i in ids] for ids in encoded]
        self.change, self.context, self.prompts = change, context, prompts

    def start(self, prompts, max_new_tokens, eos_id, seed, place=0):
        texts = []
        for prompt in prompts:
            assert len(prompt) + max_new_tokens <= self.context
            self.prompts.append(bytes(i for i in prompt if i < 256).decode())
            found = next((ids[len(prompt) :] for ids in self.known if ids[: len(prompt)] == prompt), [eos_id])
            said = bytes(found[: found.index(eos_id)]).decode()
            texts.append([*self.change(said).encode(), eos_id])
        for step in range(max(map(len, texts))):
            yield [text[step] if step < len(text) else None for text in texts]


def asked_of_oracle(monkeypatch, conversations, change=lambda text: text, context=2000):
    prompts = []
    monkeypatch.setattr(calls, "Generator", lambda *of: Oracle(conversations, change, of[-1], prompts))
    found = calls.score({}, tiny_config().model, BytesTokenizer(), conversations, context, 7, True)
    return found, prompts


CONVERSATIONS = list(generate(Spec(split="combinations", conversations=6)))


def test_the_true_turns_are_right(monkeypatch):
    found, prompts = asked_of_oracle(monkeypatch, CONVERSATIONS)
    made = [turn.role for turns in CONVERSATIONS for turn in turns if turn.role in chat.MADE]
    assert (found.conversations, found.shortened) == (6, 0)
    assert (found.calls, found.replies) == (made.count("call"), made.count("assistant"))
    assert found.metrics == dict.fromkeys((*calls.OF_CALLS, *calls.OF_REPLIES), (1.0, 0.0))
    expected = {
        chat.render(turns[:n], ask=True)
        for turns in CONVERSATIONS
        for n, turn in enumerate(turns)
        if turn.role in chat.MADE
    }
    assert {*prompts} == expected


def test_wrong_values_are_counted_and_a_prompt_that_is_too_long_loses_first_turns(monkeypatch):
    def change(text):
        return text.replace('"intent":"', '"intent":"my_') if "minutes" in text or "time" in text else text

    found, prompts = asked_of_oracle(monkeypatch, CONVERSATIONS, change, context=350)
    calls_made = [turn.text for turns in CONVERSATIONS for turn in turns if turn.role == "call"]
    full, long = [], []
    for turns in CONVERSATIONS:
        for n, turn in enumerate(turns):
            if turn.role in chat.MADE:
                full.append(chat.render(turns[:n], ask=True))
                ends = sum(one.role in chat.MADE for one in turns[: n + 1])
                if 1 + len(full[-1]) + len(turn.text) + ends > 350:
                    long.append(full[-1])
    assert found.shortened == len(long) > 2
    for prompt in {*prompts} - {*full}:
        assert any(text.endswith(prompt) for text in long)
        assert prompt.startswith("<|")
    assert found.metrics["json"][0] < 1  # the oracle knows no prompt that was cut
    assert 0 < found.metrics["intent"][0] < found.metrics["json"][0]
    assert found.calls == len(calls_made)


def test_calls_that_are_no_json_are_refused(monkeypatch):
    turns = (Turn("user", "a"), Turn("call", "say(1)"))
    with pytest.raises(UserError, match="is no JSON object"):
        asked_of_oracle(monkeypatch, [turns])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on conversations of one task, whose held-out calls are new."""
    folder = tmp_path_factory.mktemp("calls")
    config = tiny_config(
        **{
            "data.source": "api_calls:conversations=64,tasks=1",
            "data.valid_source": "api_calls:split=combinations,conversations=30,tasks=1",
            "data.tokenizer": "bpe:320",
            "data.sequence_length": 160,
            "data.cache_dir": str(folder / "cache"),
            "model.vocab_size": 320,
            "train.steps": 4,
            "train.eval_rows": 11,
            "train.eval_every": 2,
        }
    )
    said = []
    record = run(config, folder / "run", functools.partial(describe, metric="wrong_calls"), said.append)
    write_record(record, folder / "run" / "record.json")
    return folder / "run", config, record


@pytest.mark.slow
def test_a_run_records_calls_and_keeps_the_template(trained):
    folder, _, record = trained
    assert read_record(folder / "record.json") == record
    assert record.final["wrong_calls"] == record.score == 1.0
    assert record.final["error"] is None
    assert record.measures == {"floor": {"wrong_calls": 1.0}, "ceiling": {"wrong_calls": 0.0}, "levels": None}
    assert (folder / TOKENIZER / "chat_template.jinja").read_text() == chat.TEMPLATE
    assert record.data["template"] == chat.TEMPLATE
    assert record.floor["trigram"] < record.floor["bigram"] < record.floor["unigram"]  # of replies


@pytest.mark.slow
def test_calls_of_rows_are_counted_as_decoded(trained):
    """A row counts as right where its call, decoded from guesses, is the true one, with its end."""
    folder, _, _ = trained
    tokenizer, rng = open_tokenizer(folder), np.random.default_rng(0)
    conversations = list(generate(Spec(conversations=40, tasks=1)))
    ids = [[*of, *[-1] * (201 - len(of))] for of in chat.encode(tokenizer, conversations)]
    rows = np.array(ids, np.int32)
    targets = rows[:, 1:]
    guesses = np.where(rng.random(targets.shape) < 0.97, np.maximum(targets, 0), 5)
    right = 0
    for row, guess, turns in zip(targets.tolist(), guesses.tolist(), conversations, strict=True):
        replies, said = [], []
        for target, token in zip(row, guess, strict=True):
            said += [token] if target >= 0 else []
            if target == tokenizer.eos_id:
                replies.append(tokenizer.decode(said[:-1]) if said[-1] == tokenizer.eos_id else "no end")
                said = []
        made = [turn for turn in turns if turn.role in chat.MADE]
        right += sum(r == t.text for r, t in zip(replies, made, strict=True) if t.role == "call")
    assert 0 < right < 40
    assert chat.wrong_calls(rows, guesses, tokenizer) == pytest.approx(1 - right / 40)


@pytest.mark.slow
def test_evaluate_prints_and_keeps_scores(trained):
    folder, _, _ = trained
    arguments = [f"--workdir={folder}", "--calls=combinations:1,values:2", "--batch_size=4"]
    result = command("experiments.evaluate", *arguments)
    assert result.returncode == 0, result.stderr
    head, *lines = result.stdout.splitlines()
    assert head.split() == ["conversations", "calls", "json", "intent", "slots", "call", "replies", *ROUGE]
    assert [line.split(")")[0] for line in lines[:2]] == ["combinations (1", "values (2"]
    assert lines[-1].endswith(f"see {folder / 'record.json'}")
    kept = read_record(folder / "record.json").calls
    assert kept.keys() == {"combinations", "values"}
    assert kept["values"]["source"] == "api_calls:split=values,conversations=2,seed=0,tasks=1,intents=12"
    assert kept["values"]["metrics"]["call"]["value"] == 0.0
    assert kept["values"]["calls"] == 2


@pytest.mark.slow
def test_evaluate_reads_conversations_of_files(trained, tmp_path):
    folder, _, _ = trained
    call = {"role": "call", "content": THEIRS}
    good = [{"role": "user", "content": "hi"}, call, {"role": "result", "content": []}]
    empty = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]
    lines = [json.dumps({"messages": messages}) for messages in (good, empty)]
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    result = command(
        "experiments.evaluate", f"--workdir={folder}", f"--calls=conversations:{tmp_path}/*.jsonl"
    )
    assert result.returncode == 0, result.stderr
    (kept,) = [v for k, v in read_record(folder / "record.json").calls.items() if k.startswith("conv")]
    assert (kept["calls"], kept["replies"], kept["left_out"]) == (1, 0, 1)
    assert kept["source"] == "conversations:*.jsonl"


@pytest.mark.slow
def test_unknown_calls_are_refused(trained):
    folder, _, _ = trained
    result = command("experiments.evaluate", f"--workdir={folder}", "--calls=combination:5")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --calls: 'combination:5' is not valid; did you mean combinations?\n"
