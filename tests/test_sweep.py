"""The sweep: what runs, what is skipped, and what a failure leaves behind."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_lowering import STUDIES

from configs import base, depth_vs_width, layer_sharing, repeats, shape_laws
from experiments import cli
from experiments.runner import progress, sweeping, view, workers
from experiments.runner.leases import Leases
from experiments.runner.listing import said_to_compare, table
from experiments.runner.studies import points_of, shard
from mobilellm_jax import data
from mobilellm_jax.analysis.records import read_record, read_records, write_record
from mobilellm_jax.analysis.statistics import power_of_equivalence
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.analysis.tuning import fit_rates
from mobilellm_jax.config import from_config_dict
from mobilellm_jax.costs import accounting
from mobilellm_jax.errors import Preempted, UserError
from mobilellm_jax.runs import run
from mobilellm_jax.runs.directory import claim_data, claim_workdir
from mobilellm_jax.runs.run import measured_fields
from mobilellm_jax.storage.checkpoint import find_damage
from mobilellm_jax.training.loop import Outcome
from mobilellm_jax.training.signals import RESUME_ME

ROOT = Path(__file__).parents[1]

STUDY = """
from configs import base
PRESETS = ("tiny",)

def get_config(preset="tiny"):
    base.check_preset(__file__, preset, PRESETS)
    config = base.get_config()
    return base.update(config, {
        "model.vocab_size": 264, "model.depth": 2, "model.width": 16, "model.num_heads": 2,
        "model.ffn_width": 16,
        "data.source": "files:CORPUS/*.txt", "data.tokenizer": "bytes", "data.valid_fraction": 0.3,
        "data.sequence_length": 16, "data.cache_dir": "CORPUS/cache", "optimizer.warmup_steps": 1,
        "train.steps": 4, "train.batch_size": 8, "train.eval_batch_size": 8, "train.eval_rows": 8})

def study(preset):
    return base.Study(question="Q?", scientific=["model.sharing"], baseline="none", learning_rates=GRID,
                      seeds=2, matched="non_embedding_parameters", tolerance=0.0, margin=0.1)

def sweep(preset):
    yield from base.zipped(model__sharing=("none", "reverse"), model__num_repeats=(1, 2))
"""


def write_study(folder):
    """Returns a study of 2 points and 2 seeds on a corpus of 40 documents; the learning rate is not tuned."""
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"document {i} " * 10)
    path = folder / "mini.py"
    path.write_text(STUDY.replace("CORPUS", str(folder)).replace("GRID", "()"))
    return path


@pytest.fixture
def study(tmp_path):
    return write_study(tmp_path)


@pytest.fixture
def tuned_study(study):
    study.write_text(study.read_text().replace("learning_rates=()", "learning_rates=(2**-9, 2**-7)"))
    return study


def points(study: Path, overrides=None, seeds=None, only=()):
    return points_of(str(study), overrides or {}, seeds, only)


def losses(curve, noise=lambda octave, seed: seed % 7 / 1000):
    """A stand-in for `run` whose final loss is a function of the octave of the learning rate."""

    def run(config, directory, describe, say):
        octave = math.log2(config.optimizer.learning_rate)
        loss = curve(octave) + noise(octave, config.train.init_seed)
        final = {"step": 4, "loss": loss, "bits_per_byte": None, "error": 1.0}
        outcome = Outcome(
            status="finished" if math.isfinite(loss) else "diverged",
            error=None if math.isfinite(loss) else "the loss is not finite at step 4",
            steps=4,
            evaluations=[final],
            train_curve=[[4, loss]],
            train_s=1.0,
            compile_s=1.0,
            wall_s=2.0,
        )
        card = data.prepare(config.data, config.model.vocab_size).card
        return describe(**measured_fields(config, card, outcome))

    return run


def test_every_point_is_tuned_and_then_judged_on_other_seeds(tuned_study, tmp_path, monkeypatch):
    """The grid 2^-9, 2^-7 has its best at the upper edge; the search goes on to 2^-4 and refines."""
    monkeypatch.setattr(sweeping, "run", losses(lambda octave: 3 + (octave + 4) ** 2))
    workdir = tmp_path / "w"
    assert sweeping.sweep(points(tuned_study, only=["none"]), workdir, jobs=1) == 0
    records = read_records(workdir / "results")
    tuning = [r for r in records if r.phase == "tuning"]
    comparison = [r for r in records if r.phase == "comparison"]
    assert sorted(math.log2(r.learning_rate) for r in tuning) == [-9, -7, -5, -4, -3]
    assert {r.learning_rate for r in comparison} == {2**-4}
    assert [r.seed for r in comparison] == [0, 1]
    seeds = {(r.config["train"]["init_seed"], r.config["train"]["data_seed"]) for r in tuning}
    assert len(seeds) == 1
    assert seeds.isdisjoint({(0, 0), (1, 1)})
    assert {r.tuning for r in records} == {"fitted"}
    assert [r.config["train"]["eval_every"] for r in tuning] == [r.config["train"]["steps"] for r in tuning]
    assert {(r.phase, r.setting("train.eval_split")) for r in records} == {
        ("tuning", "tuning"),
        ("comparison", "valid"),
    }
    assert not [warning for warning in study_of(records).verdict.warnings if "eval_every" in warning]


def test_the_mean_loss_of_several_seeds_chooses_the_rate(tuned_study, tmp_path, monkeypatch):
    """Also where the study compares errors; seed 0 alone prefers 2^-7 to 2^-6."""
    declared = "tuning_seeds=2, metric='error', margin="
    tuned_study.write_text(tuned_study.read_text().replace("margin=", declared))
    seeds = {1_000_000: {-7: 0}, 1_000_001: {-7: 3}}
    noise = lambda octave, seed: seeds.get(seed, {}).get(octave, (octave + 6.5) ** 2)  # noqa: E731
    monkeypatch.setattr(sweeping, "run", losses(lambda _: 1.0, noise))
    monkeypatch.setattr(sweeping, "_report", lambda *_: 0)
    sweeping.sweep(points(tuned_study, only=["none"]), tmp_path, jobs=1)
    records = read_records(tmp_path / "results")
    tuning = [(math.log2(r.learning_rate), r.seed) for r in records if r.phase == "tuning"]
    repeated = {octave for octave, seed in tuning if seed == 1_000_001}
    assert {-8, -7, -6} <= repeated
    assert {octave for octave, seed in tuning if seed == 1_000_000} >= repeated
    assert all(r.config["train"]["init_seed"] == r.config["train"]["data_seed"] == r.seed for r in records)
    trials = {2.0**octave: [] for octave, _ in tuning}
    for octave, seed in tuning:
        trials[2.0**octave].append(1 + noise(octave, seed))
    rate = fit_rates({"none": trials}).optima["none"].rate
    assert math.log2(rate) > -6.5  # one seed alone says below
    assert {r.learning_rate for r in records if r.phase == "comparison"} == {float(f"{rate:.3g}")}


def test_a_point_ends_with_the_first_run_that_fails(tuned_study, tmp_path, monkeypatch, capsys):
    def broken_run(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sweeping, "run", broken_run)
    assert sweeping.sweep(points(tuned_study, only=["none"]), tmp_path, jobs=1) == 1
    (record,) = read_records(tmp_path / "results")
    assert (record.phase, record.status, record.steps, record.final) == ("tuning", "failed", 0, None)
    assert record.error == "RuntimeError: out of memory"
    said = "mini/tiny/none  not compared, as its search is not over; run the same command again"
    assert said in capsys.readouterr().out


def test_fewer_seeds_than_there_are_leave_nothing_to_do(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweeping, "run", losses(lambda _: 3.0))
    monkeypatch.setattr(sweeping, "expected_seconds", lambda _: 0.0)
    monkeypatch.setattr(sweeping, "_report", lambda *_: 0)  # which takes seconds
    for seeds, said in ((2, "0 of about 2 runs"), (1, None), (3, "2 of about 3 runs")):
        capsys.readouterr()
        assert sweeping.sweep(points(study, seeds=seeds, only=["none"]), tmp_path, jobs=1) == 0
        output = capsys.readouterr().out
        assert said in output if said else "are done already" not in output


def test_records_say_what_the_study_declares(study):
    declared = (
        "metric='error', tuning_seeds=3, x='model.num_repeats', x_label='repeats', "
        "series='model.sharing', series_label='sharing', margin=0.25"
    )
    study.write_text(study.read_text().replace("margin=0.1", declared))
    chosen = points(study, {"train.eval_every": 2}, seeds=5)
    facts = {
        "study": "mini",
        "preset": "tiny",
        "question": "Q?",
        "matched": "non_embedding_parameters",
        "scientific": ["model.sharing"],
        "nuisance": ["optimizer.learning_rate"],
        "tuning": "none",
        "metric": "error",
        "pairs": [["reverse", "none"]],
        "margin": 0.25,
    }
    for index, (point, label) in enumerate(zip(chosen, ("none", "reverse"), strict=True)):
        assert point.facts.items() >= facts.items()
        assert (point.facts["point"], point.facts["point_index"]) == (label, index)
        x = {"label": "repeats", "value": index + 1, "log": True, "series": f"{label} sharing"}
        assert point.facts["x"] == x
        assert point.facts["overrides"] == {"model.sharing": label, "model.num_repeats": index + 1}
        assert (point.seeds, point.tuning_seeds) == (5, 3)
        runs = list(point.comparison_runs(0.01))
        assert [run.facts for run in runs] == [
            {**point.facts, "phase": "comparison", "seed": seed} for seed in range(5)
        ]
        assert {(r.config.train.eval_every, r.config.optimizer.learning_rate) for r in runs} == {(2, 0.01)}
        last = point.tuning_run(0.01, 2)
        assert (last.facts["phase"], last.facts["seed"]) == ("tuning", 1_000_002)
        assert last.config.train.eval_every == last.config.train.steps


def test_records_and_runs_of_other_data_are_found_before_anything_trains(study, tmp_path, monkeypatch):
    stub = losses(lambda octave: 3.0)
    monkeypatch.setattr(sweeping, "run", stub)
    workdir = tmp_path / "w"
    assert sweeping.sweep(points(study), workdir, jobs=1) == 0
    for path in (workdir / "results").rglob("*.json"):
        record = read_record(path)
        other = {**record.data, "source_sha256": "a", "tokenizer_sha256": "b"}
        write_record(dataclasses.replace(record, data=other), path)
    trained = []
    monkeypatch.setattr(sweeping, "run", lambda *arguments: trained.append(stub(*arguments)) or trained[-1])
    message = (
        r"results/mini/tiny/none-s0\.json: the run used other data: source sha256 a -> [0-9a-f]{12}, "
        r"tokenizer sha256 b -> [0-9a-f]{12} \(files:\*\.txt\); .* use another --workdir"
    )
    with pytest.raises(UserError, match=message):
        sweeping.sweep(points(study, seeds=3), workdir, jobs=1)
    assert (
        sweeping.sweep(points(study), workdir, jobs=1) == 0
    )  # nothing to do: the report is made all the same
    shutil.rmtree(workdir / "results")
    run = workdir / "runs/mini/tiny/none-s0"
    claim_data(run, {"source": "files:*.txt", "source_sha256": "a"})
    for folder in (run, workdir / "runs/mini/tiny/reverse-s0"):  # the other is of an earlier version
        claim_workdir(folder, points(study, only=["none"])[0].config)
        (folder / "checkpoints/4").mkdir(parents=True)
    with pytest.raises(UserError, match=r"none-s0: the data changed since step 4: source sha256 a -> "):
        sweeping.sweep(points(study, only=["none"]), workdir, jobs=1)
    assert not trained


def test_rates_that_diverge_are_recorded_and_tuned_around(tuned_study, tmp_path, monkeypatch):
    curve = lambda octave: math.inf if octave > -8 else 3 + (octave + 11) ** 2  # noqa: E731
    monkeypatch.setattr(sweeping, "run", losses(curve))
    assert sweeping.sweep(points(tuned_study, only=["none"]), tmp_path / "w", jobs=1) == 0
    records = read_records(tmp_path / "w" / "results")
    assert {r.learning_rate for r in records if r.phase == "comparison"} == {float(f"{2**-11:.3g}")}
    assert [r.learning_rate for r in records if r.status == "diverged"] == [2**-7]


def test_a_learning_rate_on_the_command_line_is_one_for_all(tuned_study, tmp_path):
    chosen = points(tuned_study, {"optimizer.learning_rate": 1e-3})
    assert {(p.learning_rates, p.facts["tuning"]) for p in chosen} == {((), "none")}


def test_a_transferred_rate_takes_a_parameterization_that_transfers(study):
    study.write_text(study.read_text().replace("learning_rates=()", "learning_rates=(), transferred=True"))
    with pytest.raises(UserError, match="transferred: needs points with mup or completep"):
        points(study)
    completep = {"model.parameterization": "completep"}
    assert {p.facts["tuning"] for p in points(study, completep)} == {"transferred"}
    given = points(study, {**completep, "optimizer.learning_rate": 1e-3})
    assert {p.facts["tuning"] for p in given} == {"none"}


def test_records_of_another_sweep_are_not_counted_as_done(tuned_study, tmp_path, monkeypatch):
    """Made with one rate for all, or with other steps: refused, and not reported as tuned."""
    monkeypatch.setattr(sweeping, "run", losses(lambda octave: 3 + (octave + 8) ** 2))
    sweeping.sweep(
        points(tuned_study, {"optimizer.learning_rate": 0.01}, only=["none"]), tmp_path / "w", jobs=1
    )
    with pytest.raises(UserError, match="was chosen in another way: 'none' there, 'fitted' here"):
        sweeping.sweep(points(tuned_study, only=["none"]), tmp_path / "w", jobs=1)
    sweeping.sweep(points(tuned_study, only=["none"]), tmp_path / "x", jobs=1)
    for path in (tmp_path / "x" / "results").rglob("*lr*.json"):
        path.unlink()
    with pytest.raises(UserError, match=r"train\.steps is 4 there and 5 here"):
        sweeping.sweep(points(tuned_study, {"train.steps": 5}, only=["none"]), tmp_path / "x", jobs=1)


def test_points_of_another_sweep_come_last_and_are_taken_over(tuned_study, tmp_path, monkeypatch, capsys):
    """Another sweep holds the first point when this one starts, and gives it back half done."""
    monkeypatch.setattr(sweeping, "run", losses(lambda octave: 3 + (octave + 8) ** 2))
    other = Leases(tmp_path / "w" / "runs" / ".leases")
    chosen = points(tuned_study)
    held = f"{chosen[0].name} tuning"
    assert other.take([held])
    monkeypatch.setattr(time, "sleep", lambda _: other.release(held))
    assert sweeping.sweep(chosen, tmp_path / "w", jobs=1) == 0
    output = capsys.readouterr().out
    assert output.index("none tuning  waiting: another sweep (") < output.index("none  learning rate")
    times = {r.point: r.created for r in read_records(tmp_path / "w" / "results") if r.phase == "tuning"}
    assert times["reverse"] <= times["none"]
    assert len({r.point for r in read_records(tmp_path / "w" / "results")}) == 2
    assert not list((tmp_path / "w" / "runs" / ".leases").iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1", "expected i/n"),
        ("2/2", "from 0 to n - 1"),
        ("-1/2", "expected"),
        ("2/3", "there are only 2 points"),
    ],
)
def test_bad_shards(study, text, message):
    with pytest.raises(UserError, match=f"--shard={text}: .*{message}"):
        shard(points(study), text)


def test_shards_make_up_the_whole(study):
    chosen = points(study)
    assert [p.facts["point"] for i in range(2) for p in shard(chosen, f"{i}/2")] == [
        "none",
        "reverse",
    ]
    assert shard(chosen, "0/1") == chosen


@pytest.mark.parametrize(
    ("vary", "seeds"),
    [
        ("", [(0, 0), (1, 1)]),
        (", vary=['init']", [(0, 0), (1, 0)]),
        (", vary=['data']", [(0, 0), (0, 1)]),
    ],
)
def test_seeds_change_what_the_study_varies(study, vary, seeds):
    study.write_text(study.read_text().replace("seeds=2", f"seeds=2{vary}"))
    trains = [run.config.train for run in points(study)[0].comparison_runs(1e-3)]
    assert [(t.init_seed, t.data_seed) for t in trains] == seeds


def test_seeds_can_start_elsewhere(study):
    first = {"train.init_seed": 1000, "train.data_seed": 2000}
    trains = [run.config.train for run in points(study, first)[0].comparison_runs(1e-3)]
    assert [(t.init_seed, t.data_seed) for t in trains] == [(1000, 2000), (1001, 2001)]


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ("baseline='nothing'", "no point 'nothing' to compare with; .*none"),
        ("pairs=[('none', 'revers')]", "no point 'revers' .*did you mean reverse"),
        ("labels=['a', 'a']", "do not tell 2 points apart"),
        ("learning_rates=(0.1,)", "two or more"),
        ("learning_rates=(0.1, 0.05)", "rising"),
        ("learning_rates=(1, 2, 8)", "rising by one factor"),
        ("nuisance=['optimizer.beta2']", "only optimizer.learning_rate can"),
        ("matched='non_embedding'", "no budget 'non_embedding'; did you mean non_embedding_parameters"),
    ],
)
def test_declarations_that_do_not_fit_the_points(study, declaration, message):
    name = declaration.partition("=")[0]
    text = re.sub(rf"\b{name}=(\"[^\"]*\"|[^,]*),", "", study.read_text())
    study.write_text(text.replace("base.Study(", f"base.Study({declaration}, "))
    with pytest.raises(UserError, match=message):
        points(study)


def test_all_pairs_are_compared_unless_the_study_says_which(study):
    assert points(study)[0].facts["pairs"] == [["reverse", "none"]]
    study.write_text(
        study.read_text()
        .replace('baseline="none", ', "")
        .replace('"none", "reverse"', "'none', 'reverse', 'immediate'")
        .replace("(1, 2)", "(1, 2, 2)")
    )
    pairs = [["reverse", "none"], ["immediate", "none"], ["immediate", "reverse"]]
    asked = [pair for point in points(study) for pair in point.facts["pairs"]]
    assert sorted(asked) == sorted(2 * pairs)  # each with both of its points
    study.write_text(study.read_text().replace("seeds=2", "seeds=2, pairs=[('none', 'immediate')]"))
    assert points(study)[0].facts["pairs"] == [["none", "immediate"]]


def test_records_hold_the_pairs_of_their_point_and_together_all(study, tmp_path, monkeypatch):
    study.write_text(
        study.read_text()
        .replace('baseline="none", ', "")
        .replace('"none", "reverse"', "'none', 'reverse', 'immediate'")
        .replace("(1, 2)", "(1, 2, 2)")
    )
    monkeypatch.setattr(sweeping, "run", losses(lambda _: 3.0))
    assert sweeping.sweep(points(study), tmp_path / "w", jobs=1) == 0
    records = read_records(tmp_path / "w" / "results")
    assert {r.point: r.pairs for r in records} == {
        "none": [["reverse", "none"], ["immediate", "none"]],
        "reverse": [["reverse", "none"], ["immediate", "reverse"]],
        "immediate": [["immediate", "none"], ["immediate", "reverse"]],
    }
    found = study_of(records).verdict
    asked = [("reverse", "none"), ("immediate", "none"), ("immediate", "reverse")]
    assert [(c.point, c.other) for c in found.comparisons] == asked
    assert not [warning for warning in found.warnings if "pairs" in warning]


ODD = ("A+", "A*")  # one name, were signs all that is left out


def test_points_of_equal_config_whose_labels_differ_in_signs_are_two(study, tmp_path, monkeypatch):
    text = study.read_text().replace("reverse", "none").replace("(1, 2)", "(1, 1)")
    study.write_text(text.replace('baseline="none"', f"labels={ODD}"))
    monkeypatch.setattr(sweeping, "run", losses(lambda _: 3.0))
    for _ in range(2):
        assert sweeping.sweep(points(study), tmp_path / "w", jobs=1) == 0
    records = read_records(tmp_path / "w" / "results")
    assert [(r.point, r.seed) for r in records] == [(label, seed) for label in ODD for seed in range(2)]


def test_an_explicit_plan_of_a_hundred_layers_has_names_that_fit(study, tmp_path, monkeypatch):
    plan = " ".join(map(str, range(100)))
    text = study.read_text().replace('"none", "reverse"', f'"none", "{plan}"').replace("(1, 2)", "(1, 1)")
    study.write_text(text.replace('matched="non_embedding_parameters"', 'matched="tokens"'))
    study.write_text(study.read_text().replace('"model.depth": 2', '"model.depth": 100'))
    monkeypatch.setattr(sweeping, "run", losses(lambda _: 3.0))
    assert sweeping.sweep(points(study), tmp_path / "w", jobs=1) == 0
    assert {r.point for r in read_records(tmp_path / "w" / "results")} == {"none", plan}


def test_every_record_is_read_once_before_a_sweep_starts(study, tmp_path, monkeypatch):
    """And of one point, before its process starts, its own alone: 1,000 points take seconds, not hours."""
    monkeypatch.setattr(sweeping, "run", losses(lambda _: 3.0))
    chosen = points(study, seeds=3)
    assert sweeping.sweep(chosen, tmp_path / "w", jobs=1) == 0
    read, seen = progress.read_record, []
    monkeypatch.setattr(progress, "read_record", lambda path: seen.append(path.name) or read(path))
    assert progress.Progress(chosen, tmp_path / "w").missing() == {point.name: 0 for point in chosen}
    assert sorted(seen) == [f"{name}-s{seed}.json" for name in ("none", "reverse") for seed in range(3)]
    seen.clear()
    assert progress.missing_of(chosen[1], tmp_path / "w") == 0
    assert sorted(seen) == [f"reverse-s{seed}.json" for seed in range(3)]
    seen.clear()
    monkeypatch.setattr(sweeping, "_report", lambda *_: 0)
    sweeping.sweep(points(study, seeds=4, only=["none"]), tmp_path / "w", jobs=1)  # also checks their data
    assert sorted(seen) == [f"{name}-s{seed}.json" for name in ("none", "reverse") for seed in range(3)]


def test_memory_is_shared_by_as_many_processes_as_there_are_points(study, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sweeping, "trials_of", lambda point, trials, jobs: asked.append(jobs) or 1)
    monkeypatch.setattr(sweeping, "run", losses(lambda _: 3.0))
    monkeypatch.setattr(sweeping, "_report", lambda *_: 0)
    sweeping.sweep(points(study, only=["none"]), tmp_path / "w", jobs=8, trials=2)
    assert set(asked) == {1}


def test_kernels_are_those_of_the_devices_of_the_groups(study, tmp_path, monkeypatch):
    chosen = points(study, {"model.attention": "splash"})
    monkeypatch.setattr(sweeping, "do_all", lambda *_: [])
    monkeypatch.setattr(sweeping, "_report", lambda *_: 0)
    with pytest.raises(UserError, match=r"^model\.attention: 'splash' needs a TPU"):
        sweeping.sweep(chosen, tmp_path / "w", jobs=1)
    assert sweeping.sweep(chosen, tmp_path / "w", groups=[{"TPU_VISIBLE_CHIPS": "0"}]) == 0


def test_progress_counts_what_is_done_and_left(tuned_study, tmp_path, monkeypatch):
    """Failed runs count as left; of a complete point nothing is left, whatever its tuning took."""
    point = points(tuned_study, only=["none"])[0]
    assert progress.progress(point, {}) == (0, point.runs)
    monkeypatch.setattr(sweeping, "run", losses(lambda octave: 3 + (octave + 8) ** 2))
    sweeping.sweep([point], tmp_path / "w", jobs=1)
    there = {f"{i}": r for i, r in enumerate(read_records(tmp_path / "w" / "results"))}
    assert progress.progress(point, there) == (len(there), 0)
    more = dataclasses.replace(point, seeds=point.seeds + 2)
    assert progress.progress(more, there) == (len(there), 2)
    failed = {name: dataclasses.replace(r, status="failed") for name, r in there.items()}
    assert progress.progress(point, failed) == (0, point.runs)


def test_a_disk_that_is_full_when_a_lease_is_taken_costs_that_point_alone(study, tmp_path, monkeypatch):
    chosen = points(study, seeds=1)
    folder = workers.leases_of(tmp_path / "w")._directory
    real = type(folder).write_text

    def full(path, text):
        if "none" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, text)

    monkeypatch.setattr(type(folder), "write_text", full)
    monkeypatch.setattr(sweeping, "run", losses(lambda _: 3.0))
    message = r"^mini/tiny/none: .*cannot write there \(No space left on device\)[^\n]*$"
    with pytest.raises(UserError, match=message):
        sweeping.sweep(chosen, tmp_path / "w", jobs=1)
    assert {r.point for r in read_records(tmp_path / "w" / "results")} == {"reverse"}
    assert not list(folder.iterdir())


def one_is_missing(*_):
    return 1


ANYTHING = workers.Task(sweeping.compare_point, one_is_missing)
NAMES = ("mini/tiny/none", "mini/tiny/reverse")
TALLY = view.Tally(0, dict.fromkeys(NAMES, 2), dict.fromkeys(NAMES, 2), dict.fromkeys(NAMES, 1.0), None)


@pytest.fixture
def processes_end(monkeypatch):
    """Makes the processes of a sweep threads that end as a table says: point -> statuses of its tries.

    Returns a function that takes the table, and gives the list of the points that each process did.
    """

    def use(statuses):
        begun = []

        class Process:
            exitcode = None

            def __init__(self, args, **_):
                self.channel, self.done = args[-1], []
                self.sentinel, self.end = os.pipe()
                begun.append(self.done)

            def start(self):
                self.channel = os.dup(self.channel.fileno())  # the parent closes its own
                self.thread = threading.Thread(target=self.work)
                self.thread.start()

            def work(self):
                status = 0
                with Connection(self.channel) as channel, contextlib.suppress(EOFError):
                    while not status:
                        _, point = channel.recv()
                        self.done.append(point.name)
                        if not (status := statuses[point.name].pop(0)):
                            channel.send(0)
                self.exitcode = status
                os.close(self.end)

            def join(self):
                self.thread.join()

            def terminate(self):
                with contextlib.suppress(OSError):  # it has ended
                    socket.socket(fileno=os.dup(self.channel)).shutdown(socket.SHUT_RDWR)

        monkeypatch.setattr(
            workers.multiprocessing, "get_context", lambda _: SimpleNamespace(Process=Process)
        )
        return begun

    return use


def test_a_process_that_a_signal_ended_has_a_second_try_and_no_third(study, tmp_path, processes_end, capsys):
    statuses = {"mini/tiny/none": [RESUME_ME, 0], "mini/tiny/reverse": [-9, -11]}
    processes_end(statuses)
    broken = workers.in_processes(points(study), tmp_path / "w", [{}, {}], ANYTHING, view.View(TALLY, 0))
    assert [said.partition(" ended")[0] for said in broken] == [
        "the process of mini/tiny/reverse (status -11)"
    ]
    assert statuses == {"mini/tiny/none": [], "mini/tiny/reverse": []}
    out = capsys.readouterr().out
    assert "mini/tiny/none  its process was stopped by a signal; trying once more" in out
    assert "mini/tiny/reverse  its process was ended by signal 9; trying once more" in out
    assert "run fewer points side by side (--jobs=1)" in broken[0]
    assert "2 of 2 points done" in out


def test_a_process_that_fails_by_itself_has_no_second_try(study, tmp_path, processes_end):
    begun = processes_end({name: [1] for name in NAMES})
    broken = workers.in_processes(points(study), tmp_path / "w", [{}], ANYTHING, view.View(TALLY, 0))
    assert [said.count("(status 1)") for said in broken] == [2]
    assert broken[0].endswith(" ended early; its output is above")
    assert sorted(begun) == [[name] for name in NAMES], "a process of its own for each"


def test_a_point_that_a_signal_stops_ends_its_process_with_the_status_to_start_it_again(study, tmp_path):
    def stop(*_):
        raise Preempted("stopped by SIGTERM after step 3; a checkpoint was saved")

    said, task = [], workers.Task(stop, one_is_missing)
    with pytest.raises(SystemExit) as end:
        workers._do(task, points(study)[0], tmp_path, said.append)
    assert (end.value.code, [event.error for event in said]) == (RESUME_ME, [True])


def test_one_process_does_several_points(study, tmp_path, processes_end):
    begun = processes_end({name: [0] for name in NAMES})
    assert not workers.in_processes(points(study), tmp_path / "w", [{}], ANYTHING, view.View(TALLY, 0))
    assert [sorted(done) for done in begun] == [list(NAMES)]


ONLY_TOO = (
    ("4 x 48,8 x 32", [["8 x 32", "1 x 96"], ["8 x 32", "4 x 48"]], "compares '8 x 32' with '4 x 48'"),
    ("1 x 96,8 x 32", [["8 x 32", "1 x 96"]], "compares '8 x 32' with '1 x 96'"),
    ("8 x 32", [["8 x 32", "1 x 96"]], "one point, so there is nothing to compare"),
)


@pytest.mark.parametrize(("only", "pairs", "said"), ONLY_TOO)
def test_points_chosen_are_compared_with_each_other(only, pairs, said):
    """As the study asks, or, without its baseline, all of them; what it asks for stays on record."""
    chosen = points_of("configs/depth_vs_width.py:tiny", {}, None, only.split(","))
    assert said_to_compare(chosen) == f"depth_vs_width: {said}"
    assert chosen[-1].facts["pairs"] == pairs


def test_points_that_run_one_by_one_plan_all_pairs_of_their_study():
    """Which are judged together at the end; a plan of its own would promise narrower intervals."""
    spec = "configs/shape_laws.py:300k_2"
    whole = points_of(spec, {}, None, [])[0].facts["plan"]
    assert whole["pairs"] == 13
    assert points_of(spec, {}, None, ["3 x 90 reverse"])[0].facts["plan"] == whole
    added = points_of("configs/depth_vs_width.py:tiny", {}, None, ["4 x 48", "8 x 32"])[0].facts["plan"]
    assert added["pairs"] == 3 + 1  # three against the baseline, and the one that was chosen


@pytest.mark.parametrize("preset", ["tiny", "small"])
@pytest.mark.parametrize(
    "name", ["roadmap", "depth_vs_width", "layer_sharing", "repeats", "embedding_sharing"]
)
def test_studies_of_the_paper_run_under_both_parameterizations(name, preset):
    """With one initialisation in both: 1 / sqrt(width) at the base shape."""
    planned = points_of(f"configs/{name}.py:{preset}", {}, None, [])
    assert {point.facts["arm"] for point in planned} == {*base.BOTH}
    models = [point.config.model for point in planned]
    assert [model.init_std for model in models] == pytest.approx([m.base_width**-0.5 for m in models])
    tied = {model.share_embedding for model in models}
    is_varied = name in ("roadmap", "embedding_sharing")
    assert tied == ({True, False} if is_varied else {False})  # untied, as in tables 2, 11 and 14


@pytest.mark.parametrize("cell", shape_laws.CELLS)
def test_cells_of_the_law_have_one_protocol(cell):
    """Untied, from one base shape; tuned under both parameterizations at 100k, else under CompleteP."""
    study, shared = shape_laws.study(cell), shape_laws.get_config(cell)
    assert (study.seeds, study.margin, study.transferred) == (3, 0.02, not study.learning_rates)
    both = cell.startswith("100k") and not study.transferred
    assert study.arms == (base.BOTH if both else base.COMPLETEP)
    model = shared.model
    assert (model.base_depth, model.base_width, model.share_embedding) == (2, 64, False)
    assert model.init_std == pytest.approx(64**-0.5)
    assert (shared.optimizer.schedule, shared.optimizer.final_fraction) == ("linear", 0.0)


def test_a_chosen_point_of_each_study_has_a_line_each():
    chosen = points_of("configs/playground.py:tiny", {}, None, ["4 x 26", "2 x 38", "1 x 28"])
    assert said_to_compare(chosen).splitlines() == [
        "playground:structure_tiny: compares '4 x 26' with '2 x 38'",
        "playground:manipulation_tiny: compares '4 x 26' with '2 x 38'",
        "playground:knowledge_tiny: one point, so there is nothing to compare",
    ]
    assert {line.split()[0] for line in table(chosen).splitlines()[1:]} == {
        f"playground:{ability}_tiny" for ability in ("structure", "manipulation", "knowledge")
    }


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "model__num_repeats",
            "model__num_repaets",
            r"point \{.*num_repaets': 1\}: model\.num_repaets: .*mean num",
        ),
        ("model__num_repeats", "modle__num_repeats", "no field 'modle'; did you mean model"),
        ("(1, 2)", "(1, 'two')", "model.num_repeats: 'two' does not fit"),
        ('["model.sharing"]', '["model.sharnig"]', "no field 'model.sharnig'; did you mean model.sharing"),
        ("seeds=2", "seeds=2, x='model.widht'", "no field 'model.widht'; did you mean model.width"),
        ("from base.zipped(", "from [] or (lambda **_: [])(", "yields no point"),
    ],
)
def test_a_typo_in_a_study_is_named(study, before, after, message):
    assert before in study.read_text()
    study.write_text(study.read_text().replace(before, after))
    with pytest.raises(UserError, match=rf"^--config={study}.*{message}[^\n]*$"):
        points(study)


@pytest.mark.slow
def test_points_side_by_side_give_the_same_records_as_one_after_the_other(tuned_study, tmp_path, capfd):
    """Real processes with one core each; the command of the record is the sweep's."""
    for workdir, jobs in (("one", 1), ("two", 2)):
        assert sweeping.sweep(points(tuned_study, seeds=1), tmp_path / workdir, jobs) == 0
    one, two = (read_records(tmp_path / workdir / "results") for workdir in ("one", "two"))
    key = lambda r: (r.point, r.phase, r.seed, r.learning_rate, r.command)  # noqa: E731
    assert list(map(key, one)) == list(map(key, two))
    assert [r.score for r in one] == pytest.approx([r.score for r in two], abs=1e-2)  # 8 devices, and 1
    output = capfd.readouterr().out
    assert "mini/tiny/reverse  2 of 2 points done" in output or "mini/tiny/none  2 of 2 points done" in output


@pytest.mark.slow  # 12 s; that of test_devices that sees other devices dies in the same way
def test_a_process_that_dies_is_named_and_the_others_finish(study, tmp_path):
    for path in tmp_path.glob("*.txt"):
        path.write_text(path.read_text() * 20)
    chosen = points(study)
    broken = dataclasses.replace(chosen[0], facts={**chosen[0].facts, "question": 7})
    with pytest.raises(UserError, match=r"the process of mini/tiny/none \(status 1\) ended early"):
        sweeping.sweep([broken, chosen[1]], tmp_path / "w", jobs=2)
    assert {r.point for r in read_records(tmp_path / "w" / "results")} == {"reverse"}


@pytest.mark.parametrize(
    ("number", "status", "flag"),
    [
        (signal.SIGINT, 130, "--jobs=2"),
        pytest.param(signal.SIGTERM, 75, "--jobs=2", marks=pytest.mark.slow),
        (signal.SIGTERM, 75, "--devices_per_run=1"),
        pytest.param(signal.SIGKILL, -9, "--jobs=2", marks=pytest.mark.slow),
    ],
    ids=["ctrl-c", "preemption", "preemption of a run on each device", "the sweep alone is killed"],
)
@pytest.mark.slow
def test_a_signal_stops_all_processes_after_a_checkpoint(study, tmp_path, number, status, flag):
    """It goes to all of them at once, as from a terminal or a scheduler, while both are in a run.

    SIGKILL goes to the sweep alone. Its processes share the pipes, which are closed when they have ended.
    """
    command = [sys.executable, "-m", "experiments.sweep", f"--config={study}", f"--workdir={tmp_path}/w"]
    command += [flag, "--config.train.steps=100000", "--config.train.log_every=10", "--seeds=1"]
    command += ["--lines_every=0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    seen = ""
    while not all(f"mini/tiny/{point}-s0  step 10" in seen for point in ("none", "reverse")):
        line = process.stdout.readline()
        assert line, process.communicate()
        seen += line
    (os.kill if number == signal.SIGKILL else os.killpg)(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in errors
    if number != signal.SIGKILL:
        assert errors.count("Run the same command again; what was saved is kept") == 1
    assert not list((tmp_path / "w/runs/.leases").iterdir())
    for point in ("none", "reverse"):
        saved = list((tmp_path / f"w/runs/mini/tiny/{point}-s0/checkpoints").iterdir())
        assert saved
        assert not any(map(find_damage, saved))


def test_a_sweep_leaves_records_figures_and_a_verdict_and_repeats_nothing(study, tmp_path, capsys):
    workdir = tmp_path / "w"
    assert sweeping.sweep(points(study), workdir, jobs=1) == 0
    output = capsys.readouterr().out
    assert "0 of about 4 runs are done already; the rest will take about 0:" in output
    (lines, _), names = output.split("Q?", 1), [f"{p}-s{s}" for p in ("none", "reverse") for s in (0, 1)]
    of_runs = [line for line in lines.splitlines() if re.match(r"mini/tiny/\S+-s\d  ", line)]
    for number, (name, line) in enumerate(zip(names, of_runs, strict=True), 1):
        left = "0:00" if number == 4 else r"\d:\d\d"
        told = rf"finished: loss \d\.\d{{4}} in 0:\d\d  \({number} of about 4 runs, {left} left\)"
        assert re.fullmatch(f"mini/tiny/{name}  {told}", line)
    assert re.search(r"mini/tiny/reverse  mean loss \d\.\d{4} of 2 seeds: \d\.\d{4} \d\.\d{4}\n", lines)
    assert "'reverse' and 'none'" in output or "'none' is better than 'reverse'" in output
    records = read_records(workdir / "results")
    assert [(r.point, r.seed, r.status) for r in records] == [
        ("none", 0, "finished"),
        ("none", 1, "finished"),
        ("reverse", 0, "finished"),
        ("reverse", 1, "finished"),
    ]
    assert records[2].layer_plan == [0, 1, 1, 0]
    assert records[2].tokens_seen == 4 * 8 * 16
    assert records[2].config["train"]["init_seed"] == records[2].config["train"]["data_seed"] == 0
    assert records[0].final["loss"] != records[1].final["loss"]
    assert {p.suffix for p in (workdir / "figures").iterdir()} == {".png", ".csv"}
    assert {p.suffix for p in (workdir / "reports").iterdir()} == {".html", ".md"}
    log = workdir / "runs" / "mini" / "tiny" / "none-s0" / "metrics.jsonl"
    before = log.stat().st_mtime_ns
    assert sweeping.sweep(points(study), workdir, jobs=1) == 0
    assert "Q?" in capsys.readouterr().out
    assert log.stat().st_mtime_ns == before


def test_a_point_that_fails_is_recorded_the_others_go_on_and_it_is_tried_again(
    study, tmp_path, monkeypatch, capsys
):
    workdir, real_run = tmp_path / "w", run.run

    def broken_run(config, directory, describe, say):
        if config.model.sharing == "none":
            raise RuntimeError("out of\nmemory")
        return real_run(config, directory, describe, say)

    monkeypatch.setattr(sweeping, "run", broken_run)
    assert sweeping.sweep(points(study, seeds=1), workdir, jobs=1) == 1
    failed, other = read_records(workdir / "results")
    assert (failed.status, failed.error) == ("failed", "RuntimeError: out of")
    assert other.status == "finished"
    assert "RuntimeError: out of" in capsys.readouterr().out
    assert "memory" in (workdir / "runs/mini/tiny/none-s0/error.txt").read_text()
    monkeypatch.setattr(sweeping, "run", real_run)
    assert sweeping.sweep(points(study, seeds=1), workdir, jobs=1) == 0


def test_a_run_that_fails_where_its_error_cannot_be_written_stops_no_other(
    study, tmp_path, monkeypatch, capsys
):
    real_run = run.run

    def broken_run(config, directory, describe, say):
        if config.model.sharing == "none":
            directory.parent.mkdir(parents=True, exist_ok=True)
            directory.write_text("in the way")
            raise UserError("the disk is full")
        return real_run(config, directory, describe, say)

    monkeypatch.setattr(sweeping, "run", broken_run)
    assert sweeping.sweep(points(study, seeds=1), tmp_path / "w", jobs=1) == 1
    failed, other = read_records(tmp_path / "w" / "results")
    assert (failed.status, other.status) == ("failed", "finished")
    out = capsys.readouterr().out
    assert "error.txt cannot be written: File exists)" in out
    assert "UserError: the disk is full" in out


def test_a_point_that_diverges_is_recorded_and_not_repeated(study, tmp_path, capsys):
    chosen = points(study, {"optimizer.learning_rate": 1e30}, seeds=1, only=["reverse"])
    assert sweeping.sweep(chosen, tmp_path / "w") == 1
    (record,) = read_records(tmp_path / "w" / "results")
    assert record.status == "diverged"
    capsys.readouterr()
    assert sweeping.sweep(chosen, tmp_path / "w", lines_every=0) == 1
    assert "tokens/s" not in capsys.readouterr().out


@pytest.mark.parametrize("record", [True, False], ids=["finished", "half-done"])
def test_a_workdir_of_another_sweep_is_refused_and_left_as_it_is(study, tmp_path, record):
    workdir = tmp_path / "w"
    sweeping.sweep(points(study, seeds=1, only=["none"]), workdir)
    if not record:
        shutil.rmtree(workdir / "results")
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"optimizer\.warmup_steps"):
        sweeping.sweep(points(study, {"optimizer.warmup_steps": 2}, seeds=1), workdir)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_other_logging_and_evaluations_are_the_same_sweep(study, tmp_path, capsys):
    sweeping.sweep(points(study, seeds=1, only=["none"]), tmp_path / "w", lines_every=0)
    assert "tokens/s" in capsys.readouterr().out
    often = {"train.log_every": 1, "train.eval_every": 1}
    again = points(study, often, seeds=1, only=["none"])
    assert sweeping.sweep(again, tmp_path / "w", lines_every=0) == 0
    assert "tokens/s" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_sweep_starts_without_what_reports_and_checkpoints_need():
    """Statistics take longer to load than jax; checkpoints and logs half a second each."""
    late = {"scipy.stats", "pandas", "orbax.checkpoint", "tensorboardX", "rich.live"}
    code = f"import sys, experiments.sweep, experiments.runner.sweeping; print({late} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"


@pytest.mark.parametrize(
    ("overrides", "only", "message"),
    [
        ({"model.sharing": "none"}, [], "varies this field"),
        ({}, ["revers"], r"no such point; did you mean 'reverse'\?"),
        ({}, ["8 x 8"], "no such point; valid: none, reverse"),
        ({"model.num_heads": 3}, [], r"point .*model.width: 16 is not divisible by model.num_heads=3"),
    ],
)
def test_bad_choices(study, overrides, only, message):
    with pytest.raises(UserError, match=message):
        points(study, overrides, only=only)


def test_labels_with_commas_are_shown_as_only_takes_them():
    with pytest.raises(UserError, match=r'valid: untied, tied, "tied, 1 more block", untied \(standard\)'):
        points_of("configs/embedding_sharing.py:tiny", {}, None, ["tied", "nothing like it"])


@pytest.fixture
def nothing_compiled(monkeypatch):
    def no_compilation(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(sweeping, "expected_seconds", no_compilation)


def test_bad_data_stops_the_sweep_before_anything_is_compiled(study, tmp_path, nothing_compiled):
    (tmp_path / "7.txt").write_bytes(b"a\0b")
    with pytest.raises(UserError, match=r"7\.txt"):
        sweeping.sweep(points(study), tmp_path / "w")


def test_too_little_held_out_text_for_tuning_stops_it_too(tuned_study, tmp_path, nothing_compiled):
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": "the only document " * 10}))
    overrides = {"data.valid_source": f"files:{tmp_path}/held.jsonl"}
    with pytest.raises(UserError, match="the tuning split of the held-out text has no row: 0 documents"):
        sweeping.sweep(points(tuned_study, overrides), tmp_path / "w")


def test_points_that_do_not_match_are_refused(study):
    study.write_text(
        study.read_text().replace("model__sharing", "model__ffn_width").replace('"none", "reverse"', "16, 24")
    )
    study.write_text(study.read_text().replace("model__num_repeats=(1, 2)", "model__num_repeats=(1, 1)"))
    study.write_text(study.read_text().replace("'none'", "None").replace('baseline="none", ', ""))
    study.write_text(study.read_text().replace("model.sharing", "model.ffn_width"))
    with pytest.raises(UserError, match=r"equal non-embedding parameters within 0%.*apart"):
        points(study)


def test_a_collection_runs_its_studies(tmp_path):
    labels = {p.facts["preset"] for p in points(Path("configs/playground.py"))}
    assert labels == {"structure_tiny", "manipulation_tiny", "knowledge_tiny"}


@pytest.mark.parametrize("module", STUDIES, ids=lambda m: m.__name__)
def test_every_point_of_every_study_is_valid_and_matched(module):
    collections = getattr(module, "COLLECTIONS", ())
    for preset in (preset for preset in module.PRESETS if preset not in collections):
        found = points(Path(f"{module.__name__.replace('.', '/')}.py:{preset}"))
        assert len(found) == len(list(module.sweep(preset))) * max(1, len(module.study(preset).arms))
        runs = [run for point in found for run in point.comparison_runs(1e-3)]
        assert len({run.name for run in runs}) == len(runs) == module.study(preset).seeds * len(found)


def test_paper_presets_have_the_papers_parameter_counts():
    """Tables 11 and 2 of the paper, in millions, without norm gains."""
    printed = {
        "paper_125m": [163.2, 142.6, 138.1, 134.1, 132.4, 132.4, 135.0, 134.6, 134.3],
        "paper_350m": [388.0, 381.4, 379.9, 386.7, 376.3, 373.8, 371.1, 380.3, 374.7, 376.2],
    }
    for preset, counts in printed.items():
        for expected, overrides in zip(counts, depth_vs_width.sweep(preset), strict=True):
            config = from_config_dict(base.update(depth_vs_width.get_config(preset), overrides))
            assert round(accounting.parameters(config.model).as_printed / 1e6, 1) == expected
    for preset, expected in (("paper_125m", 138.1), ("paper_350m", 386.7)):
        config = from_config_dict(layer_sharing.get_config(preset))
        assert round(accounting.parameters(config.model).as_printed / 1e6, 1) == expected


@pytest.mark.parametrize("preset", [cell for cell in shape_laws.CELLS if cell[:3] != "1m_"])
def test_controls_of_equal_flops_cost_what_the_shared_designs_do(preset):
    runs = designs(shape_laws, preset)
    longer = [label for label in runs if label.endswith(", equal FLOPs")]
    assert len(longer) == 2
    for label in longer:
        assert_equal_flops(runs[label], runs[label.replace(", equal FLOPs", " immediate")])


def designs(config, preset):
    """Configs by label."""
    rows = zip(config.study(preset).labels, config.sweep(preset), strict=True)
    return {label: from_config_dict(base.update(config.get_config(preset), row)) for label, row in rows}


def assert_equal_flops(long, shared):
    """In training, within what whole steps allow."""
    of_long, of_shared = (
        of.train.steps * accounting.train_flops_per_token(of.model, of.data.sequence_length)
        for of in (long, shared)
    )
    assert of_long / of_shared == pytest.approx(1, abs=0.0005 + 0.5 / shared.train.steps)


@pytest.mark.parametrize("preset", ["tiny", "small"])
@pytest.mark.parametrize(
    ("config", "shared", "long"),
    [
        (layer_sharing, "immediate", "none, equal FLOPs"),
        *((repeats, f"x{times}", f"x1, FLOPs of x{times}") for times in (2, 3, 4)),
    ],
)
def test_sharing_has_its_two_controls_beside_it(config, shared, long, preset):
    """As many blocks as layers, and as many training FLOPs, both compared with the shared design."""
    study, runs = config.study(preset), designs(config, preset)
    layers = runs[shared].model.effective_depth
    deep = f"{layers} blocks"
    assert runs[deep].model.plan == tuple(range(layers))
    assert runs[deep].train == runs[shared].train
    assert_equal_flops(runs[long], runs[shared])
    assert {(shared, deep), (shared, long)} <= set(study.pairs)
    assert {deep, long} <= set(study.controls)


def test_a_config_file_alone_says_how_to_run_it():
    with pytest.raises(UserError, match="not a study"):
        points(Path("configs/base.py"))
    assert json.dumps(cli.load_config("configs/mobilellm.py:125m")[2].to_dict())


def test_points_start_in_the_order_of_their_seconds():
    """By FLOPs alone, eight thin blocks would be the cheapest, start last and leave a core idle."""
    studies = ("depth_vs_width", "layer_sharing")
    points = [p for s in studies for p in points_of(f"configs/{s}.py:tiny", {}, None, (), ["completep"])]
    points = [point for point in points if not point.facts["plan"]["control"]]  # nobody timed these
    names = [point.name.split("/")[-1] for point in sorted(points, key=lambda point: -point.cost)]
    assert set(names[:3]) == {"immediate", "repeat_all", "reverse"}  # 120 to 135 s on a core
    assert names[3:] == ["8-x-32", "4-x-48", "none", "2-x-64", "1-x-96"]  # 83, 64, 68, 58 and 54 s


# --- two phases, arms and plans -------------------------------------------------------------------------

ARMS = (
    "arms={'completep': {'model.parameterization': 'completep', 'model.base_depth': 2, "
    "'model.base_width': 16}, 'standard': {}}, sd=0.02, "
)


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(sweeping, "expected_seconds", lambda _: 0.0)
    monkeypatch.setattr(sweeping, "_report", lambda *_: 0)  # which takes seconds


def with_arms(study):
    study.write_text(study.read_text().replace("base.Study(", f"base.Study({ARMS}"))
    return study


def test_every_design_runs_in_every_arm_and_is_compared_within_it(study):
    chosen = points(with_arms(study))
    labels = ["none", "reverse", "none (standard)", "reverse (standard)"]
    assert [point.facts["point"] for point in chosen] == labels
    assert [point.facts["point_index"] for point in chosen] == [0, 1, 2, 3]
    assert [(p.facts["design"], p.facts["arm"]) for p in chosen] == [
        (design, arm) for arm in ("completep", "standard") for design in ("none", "reverse")
    ]
    assert [p.config.model.parameterization for p in chosen] == ["completep"] * 2 + ["standard"] * 2
    assert chosen[0].facts["pairs"] == [["reverse", "none"]]
    assert chosen[3].facts["pairs"] == [["reverse (standard)", "none (standard)"]]
    assert [p.facts["plan"]["pairs"] for p in chosen] == [1] * 4
    (one,) = points_of(str(study), {}, None, ["none (standard)"], ["standard"])
    assert (one.name, one.facts["point_index"]) == (chosen[2].name, 2)
    with pytest.raises(UserError, match=r"--arms=mup: .* has no such arm; valid: completep, standard"):
        points_of(str(study), {}, None, (), ["mup"])
    with pytest.raises(UserError, match=r"base_depth: the arm 'completep' of .* sets this field; use --arms"):
        points(study, {"model.base_depth": 3})


def test_a_base_shape_of_no_design_is_said(study):
    assert points(with_arms(study))[0].notes == ()
    study.write_text(study.read_text().replace("'model.base_width': 16", "'model.base_width': 32"))
    (note,) = points(study)[0].notes
    assert "mini:tiny, completep: no design has the base shape 2 x 32" in note


def test_arms_that_are_the_same_for_all_designs_are_refused(study):
    heads = with_arms(study).read_text().replace("model__sharing", "model__num_heads")
    heads = heads.replace('("none", "reverse"), model__num_repeats=(1, 2)', "(1, 2)")
    study.write_text(heads.replace('["model.sharing"], baseline="none"', '["model.num_heads"], baseline="2"'))
    with pytest.raises(UserError, match="the arms 'completep' and 'standard' are the same, as every design"):
        points(study)
    same = study.read_text()
    for old, new in (
        ("'model.base_depth': 2", "'model.base_depth': 1"),
        ("'standard': {}", "'standard': {'optimizer.weight_decay': 0.0}"),
    ):
        study.write_text(same.replace(old, new))
        assert len(points(study)) == 4


def test_controls_may_lie_outside_the_budget(study):
    text = study.read_text().replace("model__num_repeats=(1, 2)", "model__num_repeats=(1, 2)")
    study.write_text(
        text.replace('"none", "reverse"', '"none", "none"').replace("model__sharing", "model__depth")
    )
    study.write_text(study.read_text().replace('"none", "none"', "2, 3").replace("(1, 2)", "(1, 1)"))
    study.write_text(study.read_text().replace('"model.sharing"', '"model.depth"').replace('"none"', '"2"'))
    with pytest.raises(UserError, match="apart"):
        points(study)
    study.write_text(study.read_text().replace("base.Study(", "base.Study(controls=['3'], "))
    assert len(points(study)) == 2
    study.write_text(study.read_text().replace("controls=['3']", "controls=['4']"))
    with pytest.raises(UserError, match="controls: no point '4'"):
        points(study)


def test_arms_are_fitted_apart_and_a_shard_helps_to_tune_its_arm(tuned_study, tmp_path, monkeypatch, quiet):
    """The other arm is left alone, and what is compared is the shard's own."""
    monkeypatch.setattr(sweeping, "run", losses(lambda octave: 3 + (octave + 6.3) ** 2))
    whole = points(with_arms(tuned_study))
    assert sweeping.sweep(shard(whole, "0/4"), tmp_path, jobs=1, whole=whole) == 0
    records = read_records(tmp_path / "results")
    assert {r.point for r in records if r.phase == "tuning"} == {"none", "reverse"}
    compared = [r for r in records if r.phase == "comparison"]
    assert {(r.point, r.learning_rate) for r in compared} == {("none", float(f"{2**-6.3:.3g}"))}
    assert {(r.design, r.arm) for r in compared} == {("none", "completep")}
    assert compared[0].plan == {
        "seeds": 2,
        "pairs": 1,
        "sd": 0.02,
        "power": power_of_equivalence(0.02, 2, 1, 0.1),
        "control": False,
    }


def test_a_point_that_is_compared_keeps_its_rate(tuned_study, tmp_path, monkeypatch, quiet):
    monkeypatch.setattr(sweeping, "run", losses(lambda octave: 3 + (octave + 6.3) ** 2))
    assert sweeping.sweep(points(tuned_study, only=["none"]), tmp_path, jobs=1) == 0
    monkeypatch.setattr(sweeping, "run", losses(lambda octave: 3 + 0.1 * (octave + 6.8) ** 2))
    for path in (tmp_path / "results").rglob("none-lr*.json"):
        path.unlink()
    assert sweeping.sweep(points(tuned_study, seeds=4), tmp_path, jobs=1) == 0
    compared = [r for r in read_records(tmp_path / "results") if r.phase == "comparison"]
    rates = {(r.point, r.learning_rate) for r in compared}
    assert rates == {("none", float(f"{2**-6.3:.3g}")), ("reverse", float(f"{2**-6.8:.3g}"))}


def test_the_plan_and_what_it_cannot_show_are_said_first(study, tmp_path, monkeypatch, quiet, capsys):
    study.write_text(study.read_text().replace("margin=0.1", "margin=0.02, sd=0.02"))
    monkeypatch.setattr(sweeping, "run", losses(lambda _: 3.0))
    assert sweeping.sweep(points(study, seeds=5), tmp_path, jobs=1) == 0
    out = capsys.readouterr().out
    assert "mini:tiny: plan: 5 seeds, 1 pair, margin 0.02, sd 0.02" in out
    assert "5 seeds with sd 0.02 give an interval of +-0.029; equality within 0.02 cannot be shown" in out
    assert sweeping.sweep(points(study, seeds=8), tmp_path, jobs=1) == 0
    assert "records there were planned with 5 seeds, now 8: the report uses a confidence" in (
        capsys.readouterr().out
    )
    records = read_records(tmp_path / "results")
    assert sorted({(r.seed > 4, r.plan["seeds"]) for r in records}) == [(False, 5), (True, 8)]
