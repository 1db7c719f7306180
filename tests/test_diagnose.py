"""`diagnose`, `evaluate --num_repeats`, `sweep` with both, and what reports make of the diagnostics."""

import dataclasses
import re

import numpy as np
import pytest
from commands import command
from scipy import stats
from test_diagnostics import numpy_loss
from test_results import make_record
from test_sweep import points, write_study

from experiments.reporting import figures, layers, pages
from experiments.runner import diagnosing, looping, samples, sweeping
from experiments.runner.studies import points_of
from mobilellm_jax import data
from mobilellm_jax.analysis.layers import effective_depth, layer_use
from mobilellm_jax.analysis.records import read_record, read_records, write_record
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.errors import UserError
from mobilellm_jax.runs.opening import open_run

PROMPT = "a b"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The points and the directory of a sweep of 2 points and 1 seed: diagnosed, scored, asked for a text."""
    folder = tmp_path_factory.mktemp("swept")
    found, workdir = points(write_study(folder), seeds=1), folder / "w"
    assert sweeping.sweep(found, workdir, jobs=1, diagnosed=True, loops=(1,), prompts=(PROMPT,)) == 0
    return found, workdir


@pytest.mark.slow
def test_a_sweep_keeps_texts_that_generate_writes_too(swept, monkeypatch):
    found, workdir = swept
    report = (workdir / "reports/mini-tiny.md").read_text().partition("## What they write")[2]
    for point, record in zip(found, read_records(workdir / "results"), strict=True):
        assert record.samples is not None
        text = record.samples[PROMPT]["text"]
        flags = [f"--workdir={workdir}/runs/{point.name}-s0", f"--prompt={PROMPT}", "--temperature=0.8"]
        done = command("experiments.generate", *flags)
        assert done.stdout == f"{PROMPT}{text}\n".replace("\r\n", "\n").replace("\r", "\n"), done.stderr
        assert f"| {PROMPT} | {record.point} |" in report
    monkeypatch.setattr(samples, "sample_run", None)  # what is there is not asked again
    assert sweeping.sweep(found, workdir, jobs=1, prompts=(PROMPT,)) == 0
    (task, *_) = points_of("configs/playground.py:hops_tiny5", {}, None, ())
    with pytest.raises(UserError, match=r"--sample: khop:.* is no text that a model could continue"):
        samples.check([task])


def entry_of(record):
    assert record.diagnostics is not None
    return record.diagnostics["layers"]


@pytest.mark.slow
def test_a_sweep_diagnoses_every_run(swept, monkeypatch):
    found, workdir = swept
    records = read_records(workdir / "results")
    assert [entry_of(record)["plan"] for record in records] == [[0, 1], [0, 1, 1, 0]]
    for record in records:
        entry, layers_applied = entry_of(record), len(record.layer_plan)
        assert record.final is not None
        assert entry["loss"] == pytest.approx(record.final["loss"], rel=1e-6)
        assert entry["lens"][-1] == pytest.approx(record.final["loss"], rel=1e-6)
        assert (entry["text"], entry["targets"], entry["units"]) == ("valid:8", 8 * 16, "documents")
        lengths = [len(entry[name]) for name in ("skipped", "costs", "swapped", "lens", "cosine", "distance")]
        L = layers_applied
        assert lengths == [L, L, L - 1, L + 1, L, L]
        depth = entry["effective_depth"]
        assert depth["value"] == pytest.approx(float(effective_depth(np.array(entry["costs"]))))
        assert depth["low"] <= depth["value"] <= depth["high"]
    report = (workdir / "reports" / "mini-tiny.md").read_text()
    assert "## Use of the layers" in report
    assert "(../figures/mini-tiny-layers.png)" in report
    assert [diagnosing.lacking(point, workdir) for point in found] == [0, 0]
    monkeypatch.setattr(diagnosing, "diagnose_run", None)  # what is there is not done again
    assert sweeping.sweep(found, workdir, jobs=1, diagnosed=True) == 0


@pytest.mark.slow
def test_the_command_prints_a_line_for_each_layer_and_keeps_them(swept):
    _, workdir = swept
    run, path = workdir / "runs/mini/tiny/reverse-s0", workdir / "results/mini/tiny/reverse-s0.json"
    before = read_record(path)
    write_record(dataclasses.replace(before, diagnostics=None), path)
    done = command("experiments.diagnose", f"--workdir={run}")
    assert done.returncode == 0, done.stderr
    head, names, embedding, *of_layers, first, second, depth, last = done.stdout.splitlines()
    assert head.startswith("valid:8: 128 tokens, ")
    assert names.split() == ["layer", "block", "skipped", "cost", "swapped", "lens", "cosine", "distance"]
    entry = entry_of(read_record(path))
    assert [float(embedding)] == pytest.approx(entry["lens"][:1], abs=6e-5)
    assert [line.split()[1] for line in of_layers] == ["0", "1", "1", "0"]
    skipped = [float(line.split()[2]) for line in of_layers]
    assert skipped == pytest.approx([loss - entry["loss"] for loss in entry["skipped"]], abs=6e-5)
    assert first.startswith("without all uses of block 0: ")
    assert second.startswith("without all uses of block 1: ")
    value = entry["effective_depth"]["value"]
    assert depth.startswith(f"effective depth {value:.2f} of 4 layers (95 % interval ")
    assert last == f"see {path} and {run / 'diagnostics.png'}"
    assert (run / "diagnostics.png").read_bytes().startswith(b"\x89PNG")
    assert entry["costs"] == pytest.approx(entry_of(before)["costs"], abs=1e-6)


@pytest.mark.slow
def test_loops_are_scored_where_there_are_loops(swept, monkeypatch):
    found, workdir = swept
    plain, reverse = read_records(workdir / "results")
    assert plain.loops is None
    assert reverse.loops is not None
    config, params = open_run(workdir / "runs/mini/tiny/reverse-s0")
    prepared = data.prepare(config.data, config.model.vocab_size)
    (rows,) = prepared.eval_batches(batch_size=8, rows=8)
    once = reverse.loops["1"]
    assert once["loss"] == pytest.approx(numpy_loss(params, rows, config.model, (0, 1)), rel=1e-5)
    assert (once["layers"], once["trained"], once["text"]) == (2, 2, "valid:8")
    assert "## Other numbers of loops" in (workdir / "reports" / "mini-tiny.md").read_text()
    assert [looping.lacking(point, workdir, (1,)) for point in found] == [0, 0]
    assert [looping.lacking(point, workdir, (1, 2)) for point in found] == [0, 1]


@pytest.mark.slow
def test_a_number_of_loops_that_a_model_cannot_have_is_left_out_of_a_sweep(swept, monkeypatch):
    """A model whose uses have parameters of their own has none for a further use."""
    point, workdir = swept[0][1], swept[1]
    m = dataclasses.replace(point.config.model, loop_gains=True)
    point = dataclasses.replace(point, config=dataclasses.replace(point.config, model=m))
    assert looping.lacking(point, workdir, (1, 3)) == 0
    assert looping.lacking(point, workdir, (2, 3)) == 1
    asked, told = [], []
    monkeypatch.setattr(looping, "score_loops", lambda counts, *_: asked.append(counts) or ())
    looping.score_point(point, workdir, told.append, (2, 3))
    assert asked == [[2]]
    (line,) = looping.left_out([swept[0][0], point], (2, 3))
    assert line.startswith("left out: mini/tiny/reverse: num_repeats=3: model.loop_gains=True is for the 2")


@pytest.mark.slow
def test_evaluate_and_generate_take_other_numbers_of_loops(swept):
    run = swept[1] / "runs/mini/tiny/reverse-s0"
    done = command("experiments.evaluate", f"--workdir={run}", "--num_repeats=2,1")
    assert done.returncode == 0, done.stderr
    _, once, twice, last = done.stdout.splitlines()
    record = read_record(swept[1] / "results/mini/tiny/reverse-s0.json")
    assert record.final is not None
    assert record.loops is not None
    assert once.split() == ["1", "2", f"{record.loops['1']['loss']:.5f}"]
    assert twice.split(maxsplit=3)[:2] == ["2", "4"]
    assert float(twice.split()[2]) == pytest.approx(record.final["loss"], abs=2e-5)
    assert twice.endswith("  as in training")
    assert last.startswith("see ")
    texts = [
        command(
            "experiments.generate",
            *(f"--workdir={run}", "--prompt=document", "--max_new_tokens=3", "--print_ids", *more),
        ).stdout
        for more in ([], ["--num_repeats=2"])
    ]
    assert texts[0] == texts[1] != ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("evaluate", ["--num_repeats=2"], "error: num_repeats=2: model.sharing='none' has no loops to count"),
        ("evaluate", ["--num_repeats=0"], "error: --num_repeats=0: '0' is not valid; expected numbers"),
        ("evaluate", ["--num_repeats=2", "--tasks=mobilellm"], "error: --num_repeats: cannot be combined"),
        ("generate", ["--num_repeats=2", "--prompt=a"], "error: num_repeats=2: model.sharing='none'"),
    ],
)
def test_loops_that_do_not_fit_are_one_line(swept, module, arguments, message):
    done = command(f"experiments.{module}", f"--workdir={swept[1] / 'runs/mini/tiny/none-s0'}", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: --workdir: missing"),
        (["--workdir=nowhere"], "error: --workdir=nowhere: no run found"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    done = command("experiments.diagnose", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(message)


# --- reports --------------------------------------------------------------------------------------------


def entry(costs, **changes):
    plan = list(range(len(costs)))
    low_high = {"low": 1.1, "high": 1.9, "units": 40}
    return {
        "plan": plan,
        "loss": 3.5,
        "targets": 100,
        "skipped": [3.5 + cost for cost in costs],
        "costs": costs,
        "swapped": [3.6] * (len(costs) - 1),
        "lens": [5.0, *(4.5 - 0.1 * place for place in plan)],
        "cosine": [0.5] * len(costs),
        "distance": [[1.0, 4.0]] * len(costs),
        "uniform_distance": 8.0,
        "effective_depth": {"value": float(effective_depth(np.array(costs))), **low_high},
        "text": "valid:all",
        "step": 500,
        "units": "documents",
        **changes,
    }


def study():
    costs = {2: [[0.4, 0.4], [0.4, 0.2]], 4: [[0.8, 0.1, 0.1, 0.0], [0.4, 0.4, 0.0, -0.1]]}
    return study_of(
        [
            make_record(depth=depth, seed=seed, diagnostics={"layers": entry(of_seed)})
            for depth, of_seeds in costs.items()
            for seed, of_seed in enumerate(of_seeds)
        ]
    )


def test_designs_stand_side_by_side():
    found = layer_use(study().points)
    assert [(of.point, of.layers) for of in found] == [("2 x 128", 2), ("4 x 128", 4)]
    depths = [(0.8**0.5 + 2 * 0.1**0.5) ** 2, 2.0]
    low, high = stats.t.interval(0.95, 1, loc=np.mean(depths), scale=stats.sem(depths))
    assert found[1].depth.mean == pytest.approx(np.mean(depths))
    assert found[1].depth.half_width == pytest.approx((high - low) / 2)
    assert found[1].costs == pytest.approx([0.6, 0.25, 0.05, -0.05])
    assert found[1].swapped == pytest.approx([0.1] * 3)
    assert found[1].distance == [2.5] * 4


def test_the_report_has_a_table_and_a_figure_only_where_runs_were_diagnosed():
    table = layers.table(study())
    assert table["effective depth"][0].startswith("1.97 ± ")
    assert table["share"] == ["99%", "54%"]
    assert table["over documents"] == ["[1.10, 1.90]"] * 2
    assert table["costliest layer"] == ["1: +0.4000", "1: +0.6000"]
    assert table["cheapest layer"] == ["2: +0.3000", "4: -0.0500"]
    assert table["distance"] == ["2.5 of 8.0"] * 2
    figure = layers.draw(study())
    assert figure is not None
    lines = figure.axes[0].get_lines()
    assert list(lines[2].get_ydata()) == pytest.approx([0.6, 0.25, 0.05, -0.05])
    plain = study_of([make_record(depth=d) for d in (2, 4)])
    assert (layers.table(plain), layers.draw(plain)) == ({}, None)
    images = {"": figures.Image("a.png", "", b""), "-curves": figures.Image("b.png", "", b"")}
    headings = {heading for heading, blocks in pages.contents(plain, images) if blocks}
    assert "Use of the layers" not in headings


def test_a_run_of_one_layer_is_drawn():
    lone = entry([0.5], effective_depth={"value": 1.0, "low": None, "high": None, "units": 1})
    figure = layers.draw_run(lone, "runs/one")
    assert re.search("Effective depth 1.00 of 1 layers", figure.texts[1].get_text())
