"""What trained models say: a sweep asks every run once, and reports have tables of it beside the paper's."""

import dataclasses

import pytest
from scipy import stats
from test_calls import ROUGE
from test_results import make_record
from test_sweep import points

from experiments.reporting import pages, replies
from experiments.runner import calling, sweeping
from experiments.runner.calling import Asked, Speaking
from mobilellm_jax.analysis.records import read_records
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.errors import UserError

STUDY = """
from configs import base
PRESETS = ("tiny",)

def get_config(preset="tiny"):
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    return base.update(config, {
        "model.vocab_size": 320, "model.depth": 1, "model.width": 16, "model.num_heads": 2,
        "model.ffn_width": 16, "data.source": "api_calls:conversations=64,tasks=1",
        "data.valid_source": "api_calls:split=combinations,conversations=30,tasks=1",
        "data.tokenizer": "bpe:320", "data.sequence_length": 160, "data.cache_dir": "FOLDER/cache",
        "optimizer.warmup_steps": 1, "train.steps": 2, "train.batch_size": 8, "train.eval_batch_size": 8,
        "train.eval_rows": 8})

def study(preset):
    return base.Study(question="Q?", scientific=["model.depth"], learning_rates=(), seeds=2,
                      matched="tokens", tolerance=0.0, margin=0.1, metric="wrong_calls")

def sweep(preset):
    yield {"model.depth": 1}
"""


@pytest.mark.slow
def test_a_sweep_asks_every_run_once(tmp_path, monkeypatch):
    path = tmp_path / "mini.py"
    path.write_text(STUDY.replace("FOLDER", str(tmp_path)))
    found, workdir = points(path), tmp_path / "w"
    asked = Speaking((Asked("values", 3),), ("json", "lower"), 2)
    assert sweeping.sweep(found, workdir, jobs=1, speaking=asked) == 0
    for record in read_records(workdir / "results"):
        assert record.calls is not None
        assert record.instructions is not None
        assert record.calls.keys() == {"values"}
        assert (record.calls["values"]["conversations"], record.calls["values"]["calls"]) == (3, 3)
        assert {*record.calls["values"]["metrics"]} == {"json", "intent", "slots", "call", *ROUGE}
        assert record.instructions.keys() == {"json", "lower"}
        assert record.instructions["json"]["prompts"] == 2
    report = (workdir / "reports/mini-tiny.md").read_text()
    assert "## API calls" in report
    assert "## Instructions" in report
    assert calling.lacking(found[0], workdir, asked) == 0
    more = dataclasses.replace(asked, rules=("json", "upper"))
    assert calling.lacking(found[0], workdir, more) == 2
    monkeypatch.setattr(calling, "open_run", None)  # what is there is not done again
    assert sweeping.sweep(found, workdir, jobs=1, speaking=asked) == 0


def test_runs_without_a_tokenizer_are_refused_first(tmp_path):
    path = tmp_path / "mini.py"
    text = STUDY.replace('"api_calls:conversations=64,tasks=1"', '"addition:digits=2"')
    text = text.replace('"api_calls:split=combinations,conversations=30,tasks=1"', '""')
    path.write_text(text.replace("FOLDER", str(tmp_path)).replace("wrong_calls", "error"))
    with pytest.raises(UserError, match=r"--calls, --instructions: runs on 'addition:.*' have no tokenizer"):
        sweeping.sweep(points(path), tmp_path / "w", jobs=1, speaking=Speaking((), ("json",), 2))
    assert not (tmp_path / "w").exists()


def scored(share, words):
    """The fields of a record with calls, all shares alike, and two rules."""
    metrics = {name: {"value": share, "standard_error": 0.01} for name in ("json", "intent", "slots", "call")}
    metrics |= {name: {"value": share / 2, "standard_error": None} for name in ROUGE}
    of_split = {"conversations": 9, "calls": 11, "replies": 12, "shortened": 0, "metrics": metrics}
    rule = {
        "kept": share,
        "standard_error": 0.1,
        "prompts": 24,
        "words": words,
        "empty": 0.5,
        "repeated": 0.25,
    }
    return {
        "calls": {"combinations": of_split, "values": of_split},
        "instructions": {"json": rule, "lower": {**rule, "kept": 0.0, "words": words + 2}},
    }


def study(name, metric="loss"):
    common = {"study": name, "point": "one", "pairs": [], "metric": metric}
    shares = (0.25, 0.5, 0.3)
    scores = (0.75, 0.5, 0.7) if metric != "loss" else (3.5, 3.6, 3.4)
    return study_of(
        [
            make_record(seed=seed, score=score, **common, **scored(share, 4.0))
            for seed, (share, score) in enumerate(zip(shares, scores, strict=True))
        ]
    )


def shown(values):
    mean = sum(values) / len(values)
    half = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=stats.sem(values))[1] - mean
    return f"{100 * mean:.1f} ± {100 * half:.1f}"


def test_calls_are_means_over_the_seeds_beside_table_6():
    found = study("api_calls", "wrong_calls")
    whole, half = shown([0.25, 0.5, 0.3]), shown([0.125, 0.25, 0.15])
    table = replies.calls(found)
    assert table["conversations"] == ["combinations", "values"]
    assert (table["calls"][0], table["seeds"][0]) == ("11", "3")
    for head in ("JSON", "intent", "slot names", "whole call"):
        assert table[head] == [whole, whole]
    assert table["ROUGE-1"] == table["ROUGE-L"] == [half, half]
    beside = replies.beside_paper(found)
    assert beside is not None
    said, columns = beside
    assert "not published" in said
    assert columns == {
        "of": ["ours, tiny", "paper", "paper"],
        "point": ["one", "MobileLLM-350M", "LLaMA-v2 7B"],
        "intent": [whole, "65.3", "62.8"],
        "whole call": [whole, "48.8", "50.9"],
        "ROUGE-1": [half, "46.8", "56.5"],
        "ROUGE-L": [half, "44.6", "54.3"],
    }


def test_instructions_are_means_over_the_seeds_beside_table_5():
    found = study("chat")
    table = replies.rules(found)
    assert table["rule"] == ["json", "lower"]
    assert table["kept"] == [shown([0.25, 0.5, 0.3]), "0.0"]
    assert table["words"] == ["4.0", "6.0"]
    beside = replies.beside_paper(found)
    assert beside is not None
    said, columns = beside
    assert "80 %" in said
    assert columns["instructions kept, %"][0] == shown([0.125, 0.25, 0.15])
    assert (columns["words"][0], columns["empty, %"][0], columns["repeated, %"][0]) == ("5.0", "50.0", "25.0")
    rows = list(zip(columns["point"], columns["MT-Bench"], columns["AlpacaEval, %"], strict=True))
    assert ("MobileLLM-125M", "2.33", "24.07") in rows
    assert ("MobileLLM-LS-350M", "3.16", "48.20") in rows
    assert ("OPT-125M", "1.21", "not found") in rows
    assert "win" not in "".join(columns)  # none of our own


def test_other_studies_have_neither():
    other = study("shape")
    assert replies.beside_paper(other) is None
    bare = study_of([make_record(seed=seed) for seed in (0, 1)])
    assert replies.calls(bare) == replies.rules(bare) == {}
    headings = [heading for heading, blocks in pages.contents(other, {"": "", "-curves": ""}) if blocks]
    assert "API calls" in headings
    assert "Instructions" in headings
