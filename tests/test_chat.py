"""Talking: prompts hold what was said, replies stream, and files are those that judges read."""

import contextlib
import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest
from commands import command
from conftest import random_params, tiny_config

from experiments.runner import answering
from mobilellm_jax.data import chat, save_tokenizer
from mobilellm_jax.data.chat import Turn
from mobilellm_jax.data.tokenizers import BytesTokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.inference.generate import Generator
from mobilellm_jax.inference.talk import Speaker, Talk, answers, style
from mobilellm_jax.runs.directory import TOKENIZER, claim_workdir
from mobilellm_jax.storage.checkpoint import Checkpoints


class Scripted(Generator):
    """Replies to a prompt with `reply` of its text."""

    def __init__(self, reply, context=1000):
        self.reply, self.context, self.seen = reply, context, []

    def start(self, prompts, max_new_tokens, eos_id, seed, place=0):
        texts = [bytes(i for i in prompt if i < 256).decode() for prompt in prompts]
        self.seen.append((place, texts))
        said = [[*self.reply(text).encode(), eos_id] for text in texts]
        for step in range(max(map(len, said))):
            yield [ids[step] if step < len(ids) else None for ids in said]


def speaker(reply, **fields):
    return Speaker(Scripted(reply, **fields), BytesTokenizer(), bos=True)


def test_a_conversation_has_a_history():
    replies = iter(["Grüße!", '{"intent":"x"}', "Done.", "Anew."])
    of = speaker(lambda text: next(replies))
    talk = Talk(of, system="Be kind.")
    assert [*talk.say("user", " hello\n")] == ["G", "r", "ü", "ß", "e", "!"]
    assert "".join(talk.say("user", "do x")) == '{"intent":"x"}'
    assert "".join(talk.say("result", "ok")) == "Done."
    turns = [
        Turn("system", "Be kind."),
        Turn("user", "hello"),
        Turn("assistant", "Grüße!"),
        Turn("user", "do x"),
        Turn("call", '{"intent":"x"}'),
        Turn("result", "ok"),
        Turn("assistant", "Done."),
    ]
    assert talk.turns == turns
    assert of.generator.seen == [(n, [chat.render(turns[:k], ask=True)]) for n, k in enumerate((2, 4, 6))]
    talk.reset()
    assert talk.turns == turns[:1]
    assert "".join(talk.say("user", "hello")) == "Anew."
    assert of.generator.seen[3] == (3, [chat.render(turns[:2], ask=True)])


def test_a_reply_that_is_stopped_is_what_was_said():
    talk = Talk(speaker(lambda text: "never ends"))
    with contextlib.closing(talk.say("user", "go")) as pieces:
        assert [next(pieces) for _ in range(5)] == [*"never"]
    assert talk.turns == [Turn("user", "go"), Turn("assistant", "never")]


def test_a_conversation_that_is_too_long_loses_its_first_turns():
    of = speaker(lambda text: "ok", context=200)._replace(max_new_tokens=50)
    talk = Talk(of)
    for number in range(12):
        [*talk.say("user", f"turn {number}")]
    for _, (text,) in of.generator.seen:
        assert len(text) + 1 <= 150
        assert text.startswith(("<|user|>", "<|assistant|>"))
    assert "turn 11" in text
    assert "turn 8" in text
    [*talk.say("user", "u" * 300)]
    assert of.generator.seen[-1][1][0].endswith("u" * 50 + "\n" + chat.ASK)


@pytest.mark.parametrize("batch_size", [1, 2, 10])
def test_questions_of_several_turns(batch_size):
    questions = [["a", "b"], ["c"], ["d", "e", "f"]]
    of = speaker(lambda text: str(text.count("<|user|>")) + text[: -len("\n" + chat.ASK)][-1])
    assert answers(of, questions, batch_size) == [["1a", "2b"], ["1c"], ["1d", "2e", "3f"]]
    assert all(len(texts) <= batch_size for _, texts in of.generator.seen)


def test_style_of_a_plain_loop():
    texts = ["a b c a b c", "", "x", "c c c c c"]
    assert style(texts) == {"words": 12 / 4, "empty": 1 / 4, "repeated": (1 + 2) / (4 + 3)}
    assert style([]) == {"words": 0, "empty": 0, "repeated": 0}


MT_BENCH = [{"question_id": n, "category": "x", "turns": ["Hi", "And?"][: 1 + n % 2]} for n in (81, 82)]
ALPACA = [{"instruction": "Add 1 and 2.", "dataset": "mine", "output": "3"}, {"instruction": "Say ü."}]


def write(path, rows):
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return path


def test_answers_are_what_fastchat_reads(tmp_path):
    form, rows = answering.read_questions(write(tmp_path / "q.jsonl", MT_BENCH), None)
    assert (form, rows) == ("mt_bench", MT_BENCH)
    path = tmp_path / "a" / "model.jsonl"
    answering.write_answers(path, form, "model", rows, [["a", "ü"], ["c"]])
    answering.check_answers(path, form, rows)
    # as `load_model_answers` of fastchat/llm_judge/common.py does
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    by_id = {line["question_id"]: line for line in lines}
    assert by_id[81]["choices"][0]["turns"] == ["a", "ü"]
    assert len({line["answer_id"] for line in lines}) == 2
    answering.write_answers(path, form, "model", rows, [["a"], ["c"]])
    with pytest.raises(UserError, match="question 81: a turn has no answer"):
        answering.check_answers(path, form, rows)


def test_outputs_are_what_alpaca_eval_reads(tmp_path):
    form, rows = answering.read_questions(write(tmp_path / "q.json", ALPACA), None)
    path = tmp_path / "outputs.json"
    answering.write_answers(path, form, "model", rows, [["3"], [""]])
    answering.check_answers(path, form, rows)
    assert json.loads(path.read_text()) == [
        {"dataset": "mine", "instruction": "Add 1 and 2.", "output": "3", "generator": "model"},
        {"dataset": "unknown", "instruction": "Say ü.", "output": "", "generator": "model"},
    ]
    with pytest.raises(UserError, match="no answer to 'Again'"):
        answering.check_answers(path, form, [*rows, {"instruction": "Again"}])
    with pytest.raises(UserError, match="not the answers to these questions, in order"):
        answering.check_answers(path, form, rows[::-1])


@pytest.mark.parametrize(
    ("name", "rows", "form", "message"),
    [
        ("q.jsonl", [{"question_id": 1, "turns": "Hi"}], None, "row 1: 'turns' is not valid: 'Hi'"),
        ("q.jsonl", [*MT_BENCH, {"turns": ["a"]}], None, "row 3: no field 'question_id'"),
        (
            "q.jsonl",
            MT_BENCH,
            "alpaca_eval",
            "row 1: no field 'instruction'; expected the format alpaca_eval",
        ),
        ("q.json", [], None, "expected a list of at least one object"),
        ("none.jsonl", None, None, "there is no file"),
    ],
)
def test_bad_questions(tmp_path, name, rows, form, message):
    if rows is not None:
        write(tmp_path / name, rows)
    with pytest.raises(UserError) as error:
        answering.read_questions(tmp_path / name, form)
    assert message in str(error.value)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(**{"model.vocab_size": 258, "data.sequence_length": 90})
    claim_workdir(folder, config)
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(4, {"params": random_params(config.model)}, None)
    checkpoints.close()
    save_tokenizer(BytesTokenizer(), folder / TOKENIZER, chat.TEMPLATE)
    return folder


def test_chat_answers_questions(workdir, tmp_path):
    files = [f"--questions={write(tmp_path / 'q.jsonl', MT_BENCH)}", f"--answers={tmp_path}/a.jsonl"]
    result = command("experiments.chat", f"--workdir={workdir}", *files, "--max_new_tokens=3", "--model_id=m")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0].startswith("3 replies: ")
    assert result.stdout.endswith(f"2 answers in the format mt_bench; see {tmp_path}/a.jsonl\n")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [len(row["choices"][0]["turns"]) for row in rows] == [2, 1]
    again = command("experiments.chat", *files, "--check")
    assert (again.returncode, again.stdout) == (0, f"{tmp_path}/a.jsonl: 2 answers in the format mt_bench\n")
    lacking = command("experiments.chat", files[0])
    assert lacking.stderr == "error: --answers: missing; --questions and --answers go together\n"


@pytest.mark.slow
def test_chat_talks_on_a_terminal(workdir):
    terminal, other = pty.openpty()
    line = [sys.executable, "-m", "experiments.chat", f"--workdir={workdir}", "--max_new_tokens=5"]
    environment = {**os.environ, "PYTHONPATH": ".", "TERM": "dumb"}
    process = subprocess.Popen(line, stdin=other, stdout=other, stderr=other, env=environment)
    os.close(other)

    def read_until(text):
        seen, end = b"", time.monotonic() + 300
        while text not in seen and time.monotonic() < end:
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 4096)
        return seen

    read_until(b"you> ")
    replies = []
    for text in (b"hello\n", b"hello\n", b"/reset\n", b"hello\n"):
        os.write(terminal, text)
        replies.append(read_until(b"you> "))
    assert replies[0] == replies[3]
    os.write(terminal, b"\x04")
    assert process.wait(timeout=300) == 0
    os.close(terminal)
