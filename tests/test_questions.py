"""Which runs of a sweep still lack the answers to zero-shot tasks, and the table of answers."""

import json
from types import SimpleNamespace

import pytest
from test_results import make_diverged, make_record
from test_sweep import points, write_study

from configs import base, mobilellm
from experiments.runner import calling, quantizing, scores
from experiments.runner.questions import Questions, lacking, lacking_tasks
from experiments.runner.schemes import Quantizing, schemes_of
from experiments.runner.score_table import ScoreTable
from mobilellm_jax.analysis.records import add_entry, write_record
from mobilellm_jax.config import from_config_dict
from mobilellm_jax.data.tokenizers import BytesTokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel import processes


def test_finished_runs_lack_tasks_that_were_not_asked_of_the_same_data(tmp_path):
    (point,) = points(write_study(tmp_path), seeds=3, only=["none"])
    asked, known = Questions(("piqa", "boolq"), limit=5), {"piqa": "piqa.jsonl", "boolq": "boolq.jsonl"}
    assert lacking(point, tmp_path, asked, known) == 0  # no run is finished
    first, second, third = (tmp_path / "results" / f"{name}.json" for name in point.run_names())
    for path in (first, second):
        write_record(make_record(), path)
    write_record(make_diverged(), third)
    entry = {"metrics": {}, "data": "piqa.jsonl", "limit": 5}
    add_entry(first, "zero_shot", "piqa", entry)
    add_entry(first, "zero_shot", "boolq", {**entry, "data": "boolq.jsonl"})
    add_entry(second, "zero_shot", "boolq", {**entry, "data": "boolq.jsonl", "limit": 6})
    assert list(lacking_tasks(point, tmp_path, asked, known).values()) == [[], ["piqa", "boolq"]]
    assert lacking(point, tmp_path, asked, known) == 1


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A point with one finished run, told to all processes as JSON."""
    (point,) = points(write_study(tmp_path), seeds=1, only=["none"])
    (name,) = point.run_names()
    write_record(make_record(), tmp_path / "results" / f"{name}.json")
    monkeypatch.setattr(processes, "of_first", lambda function: json.loads(json.dumps(function())))
    for module in (calling, quantizing):
        monkeypatch.setattr(module, "open_run", lambda _: (point.config, {}))
    return point, tmp_path / "results" / f"{name}.json"


def test_a_finished_run_lacks_calls_and_rules_of_another_number(finished, tmp_path, monkeypatch):
    point, record = finished
    asked = calling.asked_speaking(["values:9", "values:3", "combinations"], ["json", "upper:4"])
    assert calling.asked_speaking([], []) is None
    said = []
    monkeypatch.setattr(calling, "open_tokenizer", lambda _: BytesTokenizer())
    monkeypatch.setattr(calling, "_scored", lambda _, these: said.append([o.name for o in these]) or [])
    monkeypatch.setattr(calling, "_followed", lambda _, rules, count: said.append([*rules, count]) or [])

    def ask():
        said.clear()
        calling.ask_point(point, tmp_path, said.append, asked)
        return said, calling.lacking(point, tmp_path, asked)

    assert ask() == ([["values", "combinations"], ["json", "upper", 4]], 1)
    for field, name, number in (
        ("calls", "values", {"limit": 3}),
        ("calls", "combinations", {"limit": 2}),
        ("instructions", "json", {"prompts": 4}),
        ("instructions", "upper", {"prompts": 1}),
    ):
        add_entry(record, field, name, number)
    assert ask() == ([["combinations"], ["upper", 4]], 1)
    add_entry(record, "calls", "combinations", {"limit": None})
    add_entry(record, "instructions", "upper", {"prompts": 4})
    assert ask() == ([], 0)


def test_a_finished_run_is_quantized_to_the_schemes_that_it_lacks(finished, tmp_path, monkeypatch):
    point, record = finished
    asked, done = Quantizing(schemes_of("quantize", ["w8a8", "w4:8"])), []
    add_entry(record, "quantized", "w8a8", {"gap": 0.1})
    monkeypatch.setattr(quantizing, "held_out_rows", lambda _: None)
    monkeypatch.setattr(quantizing, "quantize_run", lambda these, *_: done.append(these.schemes) or [])
    quantizing.quantize_point(point, tmp_path, done.append, asked)
    assert done[0] == schemes_of("quantize", ["w4:8"])


def result(task, share, **metrics):
    return SimpleNamespace(
        task=task,
        items=1000,
        data="file.jsonl",
        metrics=metrics or {"acc": (share, 0.01), "acc_norm": (share, 0.01)},
        chance=0.5 if not metrics else None,
        majority=0.6 if not metrics else None,
        correct=None,
    )


def test_the_table_has_the_papers_numbers_and_an_average_of_its_tasks(capsys):
    table = ScoreTable(from_config_dict(mobilellm.get_config("125m")).model)
    for done in (result("piqa", 0.5), result("boolq", 0.6), result("triviaqa", 0, exact_match=(0.1, None))):
        table.add(done)
    table.end()
    head, _, piqa, boolq, trivia, average, note = capsys.readouterr().out.splitlines()
    assert head == "paper: MobileLLM-125M"
    assert piqa.split() == ["piqa", "1,000", *["50.0", "±", "1.0"] * 2, "50.0", "60.0", "65.3"]
    assert boolq.split()[-1] == "60.2"
    assert trivia.split()[-2:] == ["exact_match", "10.0"]
    assert average.split() == ["average,", "2", "of", "the", "paper's", "8", "55.0", "55.0", "50.0", "60.0"]
    assert note.startswith("paper, race and triviaqa: as others quote its table 4")
    ScoreTable(from_config_dict(base.get_config()).model).end()
    assert len(capsys.readouterr().out.splitlines()) == 1  # a model that is not the paper's


def test_scores_of_a_run_without_a_record_are_in_a_file_of_its_own(tmp_path):
    path = scores.results_path(tmp_path)
    for task, share in (("piqa", 0.5), ("boolq", 0.6), ("piqa", 0.7)):
        scores.keep(path, result(task, share), {"limit": None})
    found = scores.read(path)
    assert {task: entry["metrics"]["acc"]["value"] for task, entry in found.items()} == {
        "piqa": 0.7,
        "boolq": 0.6,
    }
    path.write_text("[1]")
    with pytest.raises(
        UserError, match=r"zero_shot\.json: not the scores of tasks; delete it to score again"
    ):
        scores.read(path)
    record = tmp_path / "results/study/tiny/a-s0.json"
    write_record(make_record(), record)
    assert scores.results_path(tmp_path / "runs/study/tiny/a-s0") == record
