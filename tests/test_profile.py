"""A profile: the points are those of the study with one design more, and it stands beside the record."""

import dataclasses
import json
import math
import shlex

import numpy as np
import pytest
from commands import command
from test_playground import PLANS, record

from configs import base, playground
from experiments.reporting import abilities, drawing, profiles
from experiments.runner import profiles as planning
from experiments.runner import sweeping
from experiments.runner.profiles import Design, designs_of, planned
from experiments.runner.studies import points_of
from mobilellm_jax import data
from mobilellm_jax.analysis.records import read_record, read_records, write_record
from mobilellm_jax.config import ModelConfig, flatten, from_config_dict, to_dict
from mobilellm_jax.costs import accounting
from mobilellm_jax.errors import UserError
from mobilellm_jax.runs.run import measured_fields
from mobilellm_jax.training.loop import Outcome

RECORDS = planning.cli.ROOT / "experiments"
SIZES = {"depth": 2, "width": 38, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "ffn_width": 100}


def design(label="own", **model):
    default = from_config_dict(base.get_config()).model
    return Design(label, dataclasses.replace(default, **SIZES | model))


def test_a_profile_has_the_conditions_of_the_study_and_the_model_of_the_design():
    own = design(sharing="0 1 1", norm_epsilon=1e-3)
    profile = planned([own], "tiny", RECORDS)
    assert [point.name for point in profile.points] == [
        f"playground/{a}/own" for a in playground.COLLECTIONS["tiny"]
    ]
    for point in profile.points:
        preset = point.facts["preset"]
        of_study = {
            p.facts["point"]: p
            for p in points_of(f"configs/playground.py:{preset}", {}, None, (), ("completep",))
        }
        baseline = of_study[profile.baselines[preset]]
        now, then = flatten(to_dict(point.config)), flatten(to_dict(baseline.config))
        changed = {name for name in now if now[name] != then[name]}
        assert changed >= {"model.sharing", "model.norm_epsilon"}
        for name in changed:
            assert now[name] == getattr(own.model, name.removeprefix("model."))
        assert point.config.model.vocab_size == then["model.vocab_size"]
        assert point.config.model.parameterization == "completep"
        assert (point.seeds, point.learning_rates) == (baseline.seeds, baseline.learning_rates)
        assert point.facts["pairs"] == [["own", baseline.facts["point"]]]
        assert point.facts["plan"]["pairs"] == 1 + len(playground.study(preset).pairs)


def test_every_field_of_a_model_is_taken_or_set_by_the_ability():
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert {*planning.TAKEN} | planning.NOT_TAKEN == fields
    assert not planning.NOT_TAKEN.intersection(planning.TAKEN)


def sizes(preset):
    """Non-embedding parameters of the designs of equal size."""
    study = playground.study(preset)
    for label, row in zip(study.labels, playground.sweep(preset), strict=True):
        if label not in study.controls:
            config = from_config_dict(base.update(playground.get_config(preset), row))
            yield accounting.parameters(config.model).non_embedding


@pytest.mark.slow
def test_another_size_is_said_and_fit_makes_it_equal():
    own = design(ffn_kind="relu", ffn_width=150)
    loose, fitted = (planned([own], "tiny", RECORDS, fit=fit) for fit in (False, True))
    assert [bool(notes) for notes in loose.notes.values()] == [False, False, True]
    assert [point.control for point in loose.points] == [False, False, True]
    assert "own has 32," in loose.warnings()[0]
    assert fitted.warnings() == []
    for before, after in zip(loose.points, fitted.points, strict=True):
        known = [*sizes(after.facts["preset"]), accounting.parameters(after.config.model).non_embedding]
        assert max(known) <= 1.02 * min(known)
        assert (after.config.model.depth, after.config.model.ffn_kind) == (2, "relu")
        assert before.config.model == own_model(own, before)


def own_model(own, point):
    taken = {name: getattr(own.model, name) for name in planning.TAKEN}
    return dataclasses.replace(point.config.model, **taken)


@pytest.mark.slow
def test_the_command_in_the_note_finds_the_shape_that_fit_takes():
    own = design(sharing="0 1 1")
    (note,) = planned([own], "tiny", RECORDS).notes["knowledge_tiny"]
    words = shlex.split(note.partition("python -m ")[2])
    result = command(*words)
    assert result.returncode == 0, result.stderr
    fitted = planned([own], "tiny", RECORDS, fit=True).points[2].config.model
    assert f"model__width=({fitted.width},)," in result.stdout
    assert f"model__ffn_width=({fitted.ffn_width},)," in result.stdout
    assert f"model__num_heads=({fitted.num_heads},)," in result.stdout


def test_records_of_other_conditions_are_refused(tmp_path):
    name = "results/playground/structure_tiny/2-x-38-s0.json"
    there = read_record(RECORDS / name)
    there.config["train"]["steps"] += 1
    (tmp_path / name).parent.mkdir(parents=True)
    write_record(there, tmp_path / name)
    with pytest.raises(
        UserError, match=r"'2 x 38' was trained with train.steps (\d+), now \d+; name records"
    ):
        planned([design()], "tiny", tmp_path)


@pytest.mark.parametrize(
    ("label", "size", "message"),
    [
        ("4 x 26", "tiny", "--name=4 x 26: is a design of configs/playground.py:structure_tiny already"),
        ("own", "tinny", "--size=tinny: no collection of configs/playground.py; did you mean tiny"),
    ],
)
def test_bad_names_are_refused(label, size, message):
    with pytest.raises(UserError, match=message):
        planned([design(label)], size, RECORDS)


def test_designs_of_a_study_are_those_that_differ_in_shape():
    points = points_of("configs/layer_sharing.py:tiny", {}, None, ())
    assert [found.label for found in designs_of(points)] == [
        f"own {label}" for label in ("none", "immediate", "repeat_all", "reverse", "6 blocks")
    ]  # a control that trains longer is the same model
    assert [found.label for found in designs_of(points_of("configs/noise.py:init", {}, None, ()))] == [
        "own A"
    ]


# The report.

MEANS = {"once": -2.0, "thin": -2.4, "twice": -2.7, "long": -2.7, "deep": -3.0}


def scores(place, mean):
    """Of four seeds."""
    return [mean + 0.01 * np.sin(5 * seed + 1.7 * place) for seed in range(4)]


def recorded():
    return [
        record("structure", label, PLANS[label], float(score), seed, steps=200 if label == "long" else 100)
        for place, (label, mean) in enumerate(MEANS.items())
        for seed, score in enumerate(scores(place, mean))
    ]


def own_records(**changes):
    return [
        dataclasses.replace(
            record("structure", "thin", [0, 1, 1], float(score), seed),
            point="own",
            point_index=9,
            pairs=[["own", "once"]],
            **changes,
        )
        for seed, score in enumerate(scores(9, -2.5))
    ]


def test_a_design_stands_beside_the_baseline_and_the_best(tmp_path):
    ability = profiles.beside(own_records(), recorded(), "once")
    assert ability.warnings == []
    own, once, deep = (np.mean(scores(*of)) for of in ((9, -2.5), (0, -2.0), (4, -3.0)))
    table = profiles.values({"structure": ability})
    assert [cells[0].split(" ")[0] for cells in list(table.values())[2:]] == [
        f"{mean:.4f}" for mean in (own, once, deep)
    ]
    assert table["best of equal size"][0].endswith("(deep)")
    (finding,) = profiles.differences({"structure": ability})["finding"]
    assert finding.startswith(f"better, {np.exp(own - once):.2f} of the distance [")
    assert profiles.sentences({"structure": ability}) == ["own against the baseline: better at structure."]
    said = profiles.write("tiny", {"structure": ability}, tmp_path)
    assert said.startswith("Profile of own")
    assert "own against the baseline: better" in (tmp_path / "reports" / "profile-tiny.md").read_text()
    drawn = [drawing.render(abilities.draw({"structure": ability.study}, "T", own)) for own in ([], ["own"])]
    assert drawn[0] != drawn[1]


def test_differences_in_versions_and_devices_come_first(tmp_path):
    other = {"versions": {"python": "3.12.1", "jax": "0.10.2"}}
    ability = profiles.beside(own_records(**other), recorded(), "once", ["own is larger"])
    said = profiles.write("tiny", {"structure": ability}, tmp_path).splitlines()
    assert said[0] == "Warning: structure: own is larger"
    assert (
        said[1] == "Warning: structure: The runs differ in python version: 3.11.7 (20 runs), 3.12.1 (4 runs)."
    )
    assert said[2].startswith("Profile of own")


def test_without_records_a_design_stands_alone(tmp_path):
    ability = profiles.beside(own_records(), [], "once", ["no records"])
    table = profiles.values({"structure": ability})
    assert (table["baseline"], table["best of equal size"]) == (["none"], ["none"])
    assert profiles.sizes({"structure": ability})["on record"] == ["none"]
    assert "not compared" in profiles.write("tiny", {"structure": ability}, tmp_path)


def fake_run(config, directory, describe, say):
    """A run whose scores are those of a design between the others."""
    seed = config.train.init_seed % 10 / 100
    distance = abs(math.log2(config.optimizer.learning_rate) + 7) / 100
    final = {"step": config.train.steps, "loss": 0.5 + seed + distance, "bits_per_byte": None, "error": 0.5}
    final |= {"log_divergence": -2 + seed, "wrong": 0.2 + seed, "forgotten": 0.3 + seed}
    outcome = Outcome(
        status="finished",
        error=None,
        steps=config.train.steps,
        evaluations=[final],
        train_curve=[[1, 0.5]],
        train_s=1.0,
        compile_s=1.0,
        wall_s=2.0,
    )
    return describe(
        **measured_fields(config, data.prepare(config.data, config.model.vocab_size).card, outcome)
    )


@pytest.mark.slow
def test_a_profile_is_a_sweep_that_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweeping, "run", fake_run)
    monkeypatch.setattr(sweeping, "expected_seconds", lambda _: 0.0)
    profile = planned([design(sharing="0 1 1")], "tiny", RECORDS, seeds=2)
    assert planning.run(profile, tmp_path, RECORDS, jobs=1) == 0
    said = capsys.readouterr().out
    assert "Warning: knowledge: own has 32,718 non-embedding parameters" in said
    assert "own against the baseline: " in said
    records = read_records(tmp_path / "results")
    assert {(r.preset, r.point) for r in records} == {
        (preset, "own") for preset in playground.COLLECTIONS["tiny"]
    }
    assert [r.seed for r in records if r.phase == "comparison"] == [0, 1] * 3
    assert (tmp_path / "figures" / "profile-tiny.png").stat().st_size > 30_000
    monkeypatch.setattr(sweeping, "run", None)
    assert planning.run(profile, tmp_path, RECORDS, jobs=1) == 0


# The command.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir=nowhere"], "error: --workdir=nowhere: no run found"),
        (["--config.train.steps=3"], "error: --config.train.steps: a profile takes the model's shape alone"),
        (["--config.model.vocab_size=99"], "error: --config.model.vocab_size: a profile takes"),
    ],
)
def test_the_command_refuses_in_one_line(flags, message):
    result = command("experiments.profile", *flags)
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_the_command_takes_the_model_of_a_run_with_a_change(tmp_path):
    config = to_dict(from_config_dict(base.get_config()))
    config["model"] |= SIZES
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    result = command(
        "experiments.profile", f"--workdir={tmp_path / 'mine'}", "--config.model.sharing=0 1 1", "--list"
    )
    assert result.returncode == 0, result.stderr
    assert "playground:structure_tiny     mine   0 1 1" in result.stdout
    assert "warning: knowledge_tiny: mine has 32,718 non-embedding parameters" in result.stdout


def test_a_sweep_lists_the_profile_of_its_designs():
    result = command("experiments.sweep", "--config=configs/layer_sharing.py:tiny", "--profile", "--list")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("own reverse") >= 3
    result = command("experiments.sweep", "--profile", "--list")
    assert result.stderr == "error: --profile: this study is the playground; leave the flag out\n"
