"""The command `quantize`, `sweep --quantize`, and what reports make of the gaps."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import command
from conftest import tiny_config
from scipy import stats
from test_results import make_record
from test_sweep import points, write_study

from configs import base, quantization
from experiments.reporting import pages
from experiments.reporting import quantized as tables
from experiments.runner import quantizing, sweeping
from experiments.runner.quantizing import lacking, quantize_run, read
from experiments.runner.rows import rows_of_text
from experiments.runner.schemes import Quantizing, schemes_of
from experiments.runner.studies import points_of
from mobilellm_jax.analysis.quantized import gap_pairs, gaps
from mobilellm_jax.analysis.records import Record, add_entry, read_record, read_records, write_record
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.costs import accounting
from mobilellm_jax.data.rows import PADDING
from mobilellm_jax.errors import UserError
from mobilellm_jax.formats import huggingface
from mobilellm_jax.quantization.apply import check_groups
from mobilellm_jax.quantization.schemes import parse
from mobilellm_jax.runs.opening import open_run

STORIES = Path(__file__).parents[2] / "shared/data/weights/stories260K"


def quantized(record: Record) -> dict[str, Any]:
    assert record.quantized is not None
    return record.quantized


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The points and the directory of a sweep of 2 points and 2 seeds, all quantized."""
    folder = tmp_path_factory.mktemp("swept")
    found, workdir = points(write_study(folder)), folder / "w"
    how = Quantizing(schemes_of("quantize", ["w8a8", "w3:8"]))
    assert sweeping.sweep(found, workdir, jobs=1, quantized=how) == 0
    return found, workdir


@pytest.mark.slow
def test_a_sweep_quantizes_every_run(swept, monkeypatch):
    found, workdir = swept
    records = read_records(workdir / "results")
    assert len(records) == 4
    for record in records:
        assert list(quantized(record)) == ["w3:8", "w8a8"]  # sorted in the file
        assert record.final is not None
        for entry in quantized(record).values():
            assert entry["full_loss"] == pytest.approx(record.final["loss"], rel=1e-6)
            assert entry["gap"] == pytest.approx(entry["loss"] - entry["full_loss"], abs=1e-12)
            assert 0 < entry["agreement"] <= 1
            assert (entry["text"], entry["targets"]) == ("valid:8", 8 * 16)
        assert quantized(record)["w8a8"]["agreement"] > quantized(record)["w3:8"]["agreement"]
        assert quantized(record)["w8a8"]["bytes"] < quantized(record)["w8a8"]["full_bytes"] / 2
    report = (workdir / "reports" / "mini-tiny.md").read_text()
    assert "## Quantization" in report
    assert "| reverse against none | w3:8 | " in report
    # What is there is not done again, and what is not, is.
    known = Quantizing(schemes_of("quantize", ["w8a8"]))
    more = Quantizing(schemes_of("quantize", ["w8a8", "w8"]))
    assert [lacking(point, workdir, known) for point in found] == [0, 0]
    assert [lacking(point, workdir, more) for point in found] == [2, 2]
    monkeypatch.setattr(quantizing, "quantize_run", None)
    assert sweeping.sweep(found, workdir, jobs=1, quantized=known) == 0


@pytest.mark.slow
def test_a_sweep_refuses_groups_before_it_trains(swept, tmp_path):
    how = Quantizing(schemes_of("quantize", ["w4:32"]))
    with pytest.raises(UserError, match=r"groups of 32 do not divide .*divide all rows: 2, 4, 8, 16\."):
        sweeping.sweep(swept[0], tmp_path / "w", jobs=1, quantized=how)
    assert not (tmp_path / "w").exists()
    with pytest.raises(UserError, match=r"^--quantize: scheme 'int8': expected"):
        schemes_of("quantize", ["int8"])


@pytest.mark.slow
def test_the_command_prints_a_line_for_each_scheme_and_keeps_it(swept):
    _, workdir = swept
    run, path = workdir / "runs/mini/tiny/none-s0", workdir / "results/mini/tiny/none-s0.json"
    before = read_record(path)
    done = command("experiments.quantize", f"--workdir={run}", "--schemes=w8a8,w2:16")
    assert done.returncode == 0, done.stderr
    head, names, first, second, last = done.stdout.splitlines()
    assert head.startswith("valid:8: 128 tokens, full precision ")
    assert names.split()[:3] == ["scheme", "loss", "gap"]
    record = read_record(path)
    for line, name in ((first, "w8a8"), (second, "w2:16")):
        entry = quantized(record)[name]
        words = line.split()
        assert words[0] == name
        assert [float(word) for word in words[1:3]] == pytest.approx([entry["loss"], entry["gap"]], abs=6e-6)
        assert words[3] == f"{entry['bytes']:,}"
    assert last == f"see {path}"
    assert quantized(record).keys() == {"w8a8", "w3:8", "w2:16"}
    assert quantized(record)["w8a8"]["loss"] == pytest.approx(quantized(before)["w8a8"]["loss"], rel=1e-6)
    assert dataclasses.replace(record, quantized=None) == dataclasses.replace(before, quantized=None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schemes=w8a8"], "error: --workdir: missing"),
        (["--workdir=nowhere", "--schemes=w8a8"], "error: --workdir=nowhere: no run found"),
        (["--workdir=nowhere", "--schemes=w8b8"], "error: --schemes: scheme 'w8b8': expected w<bits>"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    done = command("experiments.quantize", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(message)


def test_each_document_of_tokens_begins_a_row(tmp_path):
    config = tiny_config()  # 9 tokens a row, 48 in the vocabulary
    path = tmp_path / "ids.jsonl"
    documents = [list(range(13)), [5], [7, 8]]
    path.write_text("".join(json.dumps({"token_ids": ids}) + "\n" for ids in documents))
    (batch,) = rows_of_text(f"tokens:{path}", "text", tmp_path, config)()
    assert batch.shape == (8, 10)
    assert batch[0].tolist() == [*range(10)]
    assert batch[1].tolist() == [9, 10, 11, 12, *[PADDING] * 6]
    assert batch[2].tolist() == [7, 8, *[PADDING] * 8]
    assert (batch[3:] == PADDING).all()
    path.write_text('{"token_ids": [1, 48]}\n')
    with pytest.raises(UserError, match="token 48 is not valid; expected 0 to 47"):
        rows_of_text(f"tokens:{path}", "text", tmp_path, config)
    path.write_text('{"token_ids": [1]}\n')
    with pytest.raises(UserError, match="no document of at least 2 tokens"):
        rows_of_text(f"tokens:{path}", "text", tmp_path, config)


def test_damaged_results_are_named(tmp_path):
    path = tmp_path / "quantized.json"
    assert read(path) == {}
    for text in ("{", "[1]"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"quantized\.json: not .*; delete it to quantize again"):
            read(path)


@pytest.mark.skipif(not STORIES.exists(), reason="stories260K is not here")
def test_stories260k_bounds(tmp_path, record_property):
    """W8A8 costs nothing measurable, 4 bits in groups of 32 cost 0.15 to 0.20 nats per token."""
    workdir = tmp_path / "stories"
    huggingface.import_run(STORIES, workdir, base.get_config(), "", 1)
    reference = json.loads((STORIES / "reference.json").read_text())
    documents = [json.dumps({"token_ids": document["ids"]}) for document in reference["tinystories_docs"]]
    (tmp_path / "docs.jsonl").write_text("\n".join(documents) + "\n")
    config, params = open_run(workdir)
    rows = rows_of_text(f"tokens:{tmp_path}/docs.jsonl", "text", workdir, config)
    asked = Quantizing(schemes_of("schemes", ["w8a8", "w4:32"]), short_groups=True)
    done = quantize_run(asked, workdir / "quantized.json", workdir, config, params, rows, "docs")
    found = {scheme.name: entry for scheme, entry in done}
    figures = {f"stories260K, gap of {name} (nats)": entry["gap"] for name, entry in found.items()}
    record_property("figures", figures)
    assert found["w8a8"]["full_loss"] == pytest.approx(reference["tinystories_mean_nll"], abs=1e-5)
    assert abs(found["w8a8"]["gap"]) < 0.002
    assert 0.15 < found["w4:32"]["gap"] < 0.20
    assert found["w4:32"]["short_groups"] == ["blocks/ffn/down"]  # of 172 inputs
    assert read(workdir / "quantized.json") == found
    with pytest.raises(UserError, match=r"ffn/down \(172 inputs\); groups that divide all rows: 2, 4\."):
        check_groups(config.model, parse("w4:32"))


# --- records and reports --------------------------------------------------------------------------------


def entry(gap: float, **changes):
    return {
        "loss": 3.5 + gap,
        "full_loss": 3.5,
        "gap": gap,
        "bytes": 1_000_000,
        "full_bytes": 4_000_000,
        "agreement": 0.9,
        **changes,
    }


def records_of(gaps_of_depth):
    """Records of two depths; gaps by depth, then by seed."""
    return [
        make_record(depth=depth, seed=seed, quantized={"w4:32": entry(gap), "w8a8": entry(gap / 100)})
        for depth, of_seed in gaps_of_depth.items()
        for seed, gap in enumerate(of_seed)
    ]


def test_records_keep_results_and_older_code_reads_those_without(tmp_path):
    path = tmp_path / "r.json"
    record = make_record()
    write_record(record, path)
    assert "quantized" not in json.loads(path.read_text())
    add_entry(path, "quantized", "w8a8", entry(0.001))
    add_entry(path, "quantized", "w4:32", entry(0.2))
    kept = {"w8a8": entry(0.001), "w4:32": entry(0.2)}
    assert read_record(path) == dataclasses.replace(record, quantized=kept)


def test_gaps_have_intervals_over_seeds():
    shallow, deep = [0.10, 0.11, 0.12, 0.11], [0.20, 0.22, 0.21, 0.23]
    study = study_of(records_of({2: shallow, 4: deep}))
    found = gaps(study.points)
    assert [(of.scheme, of.point) for of in found] == [
        ("w8a8", "2 x 128"),
        ("w8a8", "4 x 128"),
        ("w4:32", "2 x 128"),
        ("w4:32", "4 x 128"),
    ]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(deep), scale=stats.sem(deep))
    assert found[3].gap.mean == pytest.approx(np.mean(deep))
    assert found[3].gap.half_width == pytest.approx((high - low) / 2)
    (eight, four) = gap_pairs(study.points, study.facts.pairs)
    assert (four.point, four.other, four.word, four.margin) == ("4 x 128", "2 x 128", "more fragile", 0.02)
    assert four.difference is not None
    assert four.difference.low is not None
    assert four.difference.high is not None
    assert four.difference.mean == pytest.approx(np.mean(deep) - np.mean(shallow))
    assert 0 < four.difference.low < four.difference.mean < four.difference.high
    # The same, a hundredth as large, and within the margin.
    assert (eight.scheme, eight.margin) == ("w8a8", 0.005)
    assert eight.difference is not None
    assert eight.difference.high is not None
    assert eight.difference.high < 0.005
    other = gap_pairs(study.points, [("2 x 128", "4 x 128")])
    assert [pair.word for pair in other][1] == "less fragile"
    close = study_of(records_of({2: [0.10, 0.101, 0.102], 4: [0.101, 0.102, 0.1]}))
    assert {pair.word for pair in gap_pairs(close.points, close.facts.pairs)} == {"no difference"}


def test_the_report_has_tables_only_where_something_was_quantized():
    study = study_of(records_of({2: [0.1, 0.12], 4: [0.2, 0.21]}))
    costs, pairs = tables.costs(study), tables.pairs(study)
    assert costs["gap"][2].startswith("+0.1100 ± 0.")
    assert (costs["bytes"][0], costs["of full"][0], costs["same token"][0]) == ("1 M", "25.0%", "90.0%")
    assert pairs["pair"] == ["4 x 128 against 2 x 128"] * 2
    assert pairs["difference of gaps"][1].startswith("+0.0950 [")
    assert len(pages._quantization(study)) == 4
    assert pages._quantization(study_of([make_record(depth=d) for d in (2, 4)])) == []


# --- the study ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", quantization.PRESETS)
def test_the_study_can_be_quantized_in_groups_of_32(preset):
    found = points_of(f"configs/quantization.py:{preset}", {}, None, ())
    sizes = [accounting.parameters(point.config.model).non_embedding for point in found]
    assert max(sizes) / min(sizes) < 1.03
    for point in found:
        for name in ("w8a8", "w4:32", "w3:32"):
            check_groups(point.config.model, parse(name))
    if preset != "tiny":
        printed = {"paper_125m": 124.6, "paper_350m": 345.3}[preset]  # of table 9, in millions
        counts = {round(accounting.parameters(p.config.model).as_printed / 1e6, 1) for p in found}
        assert counts == {printed}
        assert [len(point.config.model.plan) // point.config.model.depth for point in found] == [1, 2]
    else:
        assert [len(point.config.model.plan) for point in found] == [3, 6, 6, 6, 12, 1]
