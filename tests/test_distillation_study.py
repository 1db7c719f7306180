"""The study of distillation: its budgets, how it asks for its teacher, and what its report says of time."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from conftest import tiny_config
from test_results import make_record

from configs import base, distillation, teachers
from experiments.reporting import step_times
from experiments.runner import needed
from experiments.runner.costs import costs, memory_bytes
from experiments.runner.listing import table
from experiments.runner.studies import points_of
from mobilellm_jax.config import from_config_dict, to_dict
from mobilellm_jax.costs import accounting
from mobilellm_jax.errors import UserError

SPEC = "configs/distillation.py:tiny"
SIZES = {"model.depth": 6, "model.width": 48, "model.ffn_width": 100, "model.vocab_size": 512}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder without teachers, from which the configs are found."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_teacher(folder):
    directory = folder / "runs" / "teacher_tiny"
    directory.mkdir(parents=True)
    config = from_config_dict(teachers.get_config("tiny"))
    (directory / "config.json").write_text(json.dumps(to_dict(config)))
    return config


def test_longer_runs_have_the_time_and_the_flops_of_the_run_with_a_teacher(elsewhere):
    make_teacher(elsewhere)
    points = label, taught, in_time, longer = points_of(SPEC, {}, None, ())
    assert [p.facts["point"] for p in points] == list(distillation._LABELS)
    assert (label.teacher, in_time.teacher, longer.teacher) == (None, None, None)
    assert label.tokens == taught.tokens
    assert in_time.tokens == pytest.approx(distillation.TIME["tiny"] * taught.tokens)
    assert longer.flops == pytest.approx(taught.flops, rel=2e-3)
    by_hand = accounting.train_flops_per_token(label.config.model, 64)
    by_hand += accounting.train_flops_per_token(taught.teacher, 64) / 3
    assert taught.flops / taught.tokens == pytest.approx(by_hand)
    assert 2.6 < taught.flops / label.flops < 3.2  # as in the paper
    more = memory_bytes(taught) - memory_bytes(label)
    assert more > 4 * accounting.parameters(taught.teacher).total
    assert f"{by_hand:.3g}" in table([taught])
    assert "teacher" not in costs([taught], None, "").replace("label + teacher", "")
    needed.check(list(points))


def test_a_teacher_that_is_not_there_is_asked_for_with_the_command_that_makes_it(elsewhere):
    points = points_of(SPEC, {}, None, ())
    command = "python -m experiments.train --config=configs/teachers.py:tiny --workdir=runs/teacher_tiny"
    message = f"train.teacher: runs/teacher_tiny: no run found; make it first: {command}"
    with pytest.raises(UserError) as error:
        needed.check(points)
    assert str(error.value) == message
    assert f"missing {message} (the work of a teacher is not counted above)" in costs(points, None, "")
    needed.check([points[0], points[2]])  # they need none
    lone = dataclasses.replace(points[1], makes={})
    assert needed.missing([lone]) == ["train.teacher: runs/teacher_tiny: no run found; check the path"]


@pytest.mark.parametrize("preset", ["paper_125m", "paper_350m"])
def test_the_paper_presets_have_its_hours_and_the_tokenizer_of_the_teacher(elsewhere, preset):
    label, taught, longer = points_of(f"configs/distillation.py:{preset}", {}, None, ())
    assert label.config.train.steps == taught.config.train.steps == 120_000
    hours = {"paper_125m": (29, 93), "paper_350m": (42, 109)}[preset]
    assert longer.config.train.steps == round(120_000 * hours[1] / hours[0])
    assert taught.config.train.teacher == "runs/llama2_7b"
    assert taught.config.data.tokenizer.startswith("sentencepiece:runs/llama2_7b/")
    assert "import_hf" in needed.missing([taught])[0]


def run(train_s, steps, teacher=None, **changes):
    timing = {"wall_s": 99.0, "compile_s": 1.0, "train_s": train_s, "tokens_per_second": 1.0}
    return make_record(timing=timing, steps=steps, teacher=teacher, **changes)


def test_times_of_a_step_are_those_of_training_alone():
    taught = {"run": "large", "step": 1, "manifest_sha256": "a", "flops_per_token": 2e6}
    plain = run(10.0, 100)
    flops = plain.budgets["train_flops_per_token"]
    assert (plain.train_flops_per_token, run(1.0, 1, taught).train_flops_per_token) == (flops, flops + 2e6)
    points = {
        "label": [run(10.0, 100), run(12.0, 100), run(50.0, 100)],
        "taught": [run(30.0, 100, taught), run(42.0, 100, taught), run(9.0, 50, taught, status="failed")],
        "longer": [run(33.0, 300)],
    }
    study = SimpleNamespace(points={name: SimpleNamespace(comparison=runs) for name, runs in points.items()})
    assert step_times.table(study) == {
        "point": ["label", "taught", "longer"],
        "steps": ["100", "100", "300"],
        "ms a step": ["120.00", "360.00", "110.00"],
        "times": ["1.00", "3.00", "0.92"],
        "FLOPs, times": ["1.00", f"{(flops + 2e6) / flops:.2f}", "1.00"],
        "minutes a run": ["0.2", "0.6", "0.6"],
    }
    alone = SimpleNamespace(points={"label": study.points["label"]})
    assert step_times.table(alone) == {}


def test_a_teacher_is_counted_by_accounting():
    model = tiny_config().model
    teacher = tiny_config(**SIZES).model
    length, rows = 9, 8
    for function, forward in (
        (accounting.train_flops_per_token, accounting.forward_flops_per_token),
        (accounting.executed_train_flops_per_token, accounting.executed_flops_per_token),
    ):
        assert function(model, length, teacher) == function(model, length) + forward(teacher, length)
    plain, taught = (accounting.activation_bytes(model, length, rows, t) for t in (None, teacher))
    assert taught > plain + 4 * rows * length * teacher.width
    assert base.get_config().train.teacher == ""
