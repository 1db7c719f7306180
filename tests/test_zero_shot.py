"""Rows of local files as lm-eval's own definitions read them, and what is said of files that do not fit."""

import json
import lzma
import re
import sys

import pytest

from mobilellm_jax.data.tokenizers import BytesTokenizer, HuggingFaceTokenizer, adds_bos, train_bpe
from mobilellm_jax.errors import UserError
from mobilellm_jax.inference import local_tasks

# A row of each task, and fields that the data set on the hub has instead of it.
ROWS = {
    "arc_easy": (
        {"question": "Why?", "choices": ["a", "b", "c"], "gold": 2},
        {
            "question": "Why?",
            "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]},
            "answerKey": "C",
        },
    ),
    "boolq": (
        {"passage": "It is.", "question": "is it?", "choices": ["no", "yes"], "gold": 1},
        {"passage": "It is.", "question": "is it", "label": 1},
    ),
    "piqa": (
        {"question": "Cut.", "choices": ["knife", "spoon"], "gold": 0},
        {"goal": "Cut.", "sol1": "knife", "sol2": "spoon", "label": 0},
    ),
    "social_iqa": (
        {"context": "C.", "question": "Q?", "choices": ["a", "b", "c"], "gold": 1},
        {"context": "C.", "question": "Q?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "2"},
    ),
    "hellaswag": (
        {"context": 'Golf: A man "swings." He hits. the ball', "choices": ["x", "y"], "gold": 1},
        {
            "activity_label": "Golf",
            "ctx_a": 'A man "swings." He hits.',
            "ctx_b": "the ball",
            "endings": ["x", "y"],
            "label": "1",
        },
    ),
    "openbookqa": (
        {"question": "The sun", "choices": ["a", "b", "c", "d"], "gold": 0},
        {"question_stem": "The sun", "answerKey": "A"},
    ),
    "winogrande": (
        {"sentence": "_ won.", "choices": ["Ann", "Bob"], "gold": 0},
        {"sentence": "_ won.", "option1": "Ann", "option2": "Bob", "answer": "1"},
    ),
    "triviaqa": (
        {"question": "Who?", "answer": "A", "aliases": ["A", "B"]},
        {"question": "Who?", "answer": {"aliases": ["A", "B"]}},
    ),
    "race": (
        {"article": "T.", "problems": [{"question": "Q", "choices": ["a", "b", "c", "d"], "gold": 3}]},
        {"article": "T.", "problems": "[{'question': 'Q', 'options': ['a', 'b', 'c', 'd'], 'answer': 'D'}]"},
    ),
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("task", ROWS)
def test_rows_become_those_of_the_data_set(task, tmp_path):
    row, expected = ROWS[task]
    stem = local_tasks.LOCAL_TASKS[task].stem
    write(tmp_path / f"{stem}_test.jsonl", {"id": "x/0", **row})
    path = local_tasks.find_file(task, tmp_path)
    assert path is not None
    (found,) = local_tasks.read_local(task, path)
    assert expected.items() <= found.items()


@pytest.mark.parametrize(
    ("context", "last"),
    [
        ("A: He stands. She sits. then", "then"),
        ('A: How to bake. Mix it. Say " i bake... " and smile.', ""),  # whole sentences, of WikiHow
        ("A: a man", ""),
    ],
)
def test_the_sentence_to_complete_stands_alone(context, last):
    found = local_tasks.LOCAL_TASKS["hellaswag"].as_on_hub({"context": context, "choices": ["x"], "gold": 0})
    assert found["ctx_b"] == last
    assert " ".join([found["ctx_a"], last]).strip() == context.removeprefix("A: ")


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("piqa", {"gold": None}, "'gold': None is not valid; expected the index of the right choice, from 0"),
        ("piqa", {"gold": True}, "'gold': True is not valid"),
        ("piqa", {"gold": 2}, "'gold': 2 is not valid; expected less than the 2 choices"),
        (
            "piqa",
            {"choices": ["a"]},
            "'choices': ['a'] is not valid; expected a list of 2 strings, none of them empty",
        ),
        ("piqa", {"choices": ["a", ""]}, "'choices': ['a', ''] is not valid"),
        ("piqa", {"question": 3}, "'question': 3 is not valid; expected a string that is not empty"),
        ("arc_easy", {"choices": ["a"] * 11}, "expected a list of 2 to 10 strings"),
        ("boolq", {"choices": ["yes", "no"]}, 'expected ["no", "yes"]'),
        ("hellaswag", {"context": "no activity"}, "expected '<activity>: <text>'"),
        ("winogrande", {"sentence": "Ann won."}, "expected a string with a gap, '_'"),
        (
            "race",
            {"problems": [{"question": "Q"}]},
            "expected a list of objects with the fields question, choices",
        ),
        ("triviaqa", {"aliases": []}, "'aliases': [] is not valid"),
    ],
)
def test_a_row_that_does_not_fit_is_named(task, change, message, tmp_path):
    row = ROWS[task][0]
    path = write(tmp_path / "file.jsonl", row, {**row, **change})
    with pytest.raises(UserError, match=f"file.jsonl, line 2: .*{re.escape(message)}"):
        local_tasks.read_local(task, path)


@pytest.mark.parametrize("task", ROWS)
def test_every_field_is_needed(task, tmp_path):
    row = ROWS[task][0]
    for name in local_tasks.LOCAL_TASKS[task].fields:
        path = write(tmp_path / "file.jsonl", {key: value for key, value in row.items() if key != name})
        with pytest.raises(UserError, match=f"file.jsonl, line 1: no field '{name}'; the row has the fields"):
            local_tasks.read_local(task, path)


def test_files_are_found_compressed_and_only_if_there_is_one(tmp_path):
    assert local_tasks.find_file("openbookqa", tmp_path) is None
    with lzma.open(tmp_path / "obqa_test.jsonl.xz", "wt") as file:
        file.write(json.dumps(ROWS["openbookqa"][0]))
    path = local_tasks.find_file("openbookqa", tmp_path)
    assert path is not None
    assert len(local_tasks.read_local("openbookqa", path)) == 1
    (tmp_path / "obqa.md").write_text("not data")
    assert local_tasks.find_file("openbookqa", tmp_path) == path
    (tmp_path / "obqa_valid.jsonl").write_text("")
    with pytest.raises(
        UserError, match=r"more than one file for the task openbookqa: obqa_test\.jsonl\.xz, obqa_"
    ):
        local_tasks.find_file("openbookqa", tmp_path)
    with pytest.raises(UserError, match="nowhere: there is no such folder"):
        local_tasks.find_file("openbookqa", tmp_path / "nowhere")
    with pytest.raises(
        UserError, match="the task 'mmlu' cannot be read from local files; expected one of arc_easy, "
    ):
        local_tasks.find_file("mmlu", tmp_path)


def test_the_group_is_the_papers_eight_tasks():
    names = local_tasks.expand(["piqa", "mobilellm", "race"])
    assert names[0] == "piqa"
    assert names[-1] == "race"
    assert len(names) == 9


def test_without_the_extra_its_name_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "mobilellm_jax.inference.harness", raising=False)
    with pytest.raises(UserError, match=r"pip install -e '\.\[eval\]'"):
        import mobilellm_jax.inference.harness  # noqa: F401


def test_an_imported_tokenizer_says_whether_it_adds_bos(tmp_path):
    plain = train_bpe("bpe:260", ["ab ab"])
    assert not adds_bos(plain, tmp_path)
    values = json.loads(plain.file_bytes)
    piece = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<bos>": {"id": "<bos>", "ids": [0], "tokens": ["<bos>"]}}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": piece,
        "pair": [*piece, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": special,
    }
    assert adds_bos(HuggingFaceTokenizer("huggingface:x", json.dumps(values).encode(), 0, 1), tmp_path)
    assert adds_bos(BytesTokenizer(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert not adds_bos(BytesTokenizer(), tmp_path)
