"""The sweep: what runs, what is skipped, and what a failure leaves behind."""

import json
import shutil
from pathlib import Path

import pytest

from configs import base, depth_vs_width, layer_sharing
from experiments import cli, sweep
from mobilellm_jax import accounting, results
from mobilellm_jax.config import from_config_dict
from mobilellm_jax.errors import UserError

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
    return {"question": "Q?", "scientific": ["model.sharing"], "x": None, "x_label": "", "baseline": "none",
            "seeds": 2, "matched": "non_embedding", "tolerance": 0.0}

def sweep(preset):
    yield from base.zipped(model__sharing=("none", "reverse"), model__num_repeats=(1, 2))
"""


@pytest.fixture
def study(tmp_path):
    """A study of 2 points and 2 seeds on a corpus of 40 documents."""
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " * 10)
    path = tmp_path / "mini.py"
    path.write_text(STUDY.replace("CORPUS", str(tmp_path)))
    return path


def points(study: Path, overrides=None, seeds=None, only=()):
    return sweep.points_of(str(study), overrides or {}, seeds, only)


def test_a_sweep_leaves_records_figures_and_a_verdict_and_repeats_nothing(study, tmp_path, capsys):
    workdir = tmp_path / "w"
    assert sweep.sweep(points(study), workdir) == 0
    output = capsys.readouterr().out
    assert "0 of 4 runs are done already; the rest will take about 0:" in output
    assert "Q?" in output
    assert "lowest mean held-out loss" in output
    records = results.read_all(workdir / "results")
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
    assert {p.suffix for p in (workdir / "figures").iterdir()} == {".png", ".svg", ".csv", ".md"}
    log = workdir / "runs" / "mini" / "tiny" / "none-s0" / "metrics.jsonl"
    before = log.stat().st_mtime_ns
    assert sweep.sweep(points(study), workdir) == 0
    assert "Q?" in capsys.readouterr().out
    assert log.stat().st_mtime_ns == before


def test_a_point_that_fails_is_recorded_the_others_go_on_and_it_is_tried_again(
    study, tmp_path, monkeypatch, capsys
):
    workdir, real_run = tmp_path / "w", sweep.run

    def broken_run(config, directory, describe, say):
        if config.model.sharing == "none":
            raise RuntimeError("out of\nmemory")
        return real_run(config, directory, describe, say)

    monkeypatch.setattr(sweep, "run", broken_run)
    assert sweep.sweep(points(study, seeds=1), workdir) == 1
    failed, other = results.read_all(workdir / "results")
    assert (failed.status, failed.error) == ("failed", "RuntimeError: out of")
    assert other.status == "finished"
    assert "RuntimeError: out of" in capsys.readouterr().out
    assert "memory" in (workdir / "runs/mini/tiny/none-s0/error.txt").read_text()
    monkeypatch.setattr(sweep, "run", real_run)
    assert sweep.sweep(points(study, seeds=1), workdir) == 0


def test_a_point_that_diverges_is_recorded_and_not_repeated(study, tmp_path, capsys):
    chosen = points(study, {"optimizer.learning_rate": 1e30}, seeds=1, only=["reverse"])
    assert sweep.sweep(chosen, tmp_path / "w") == 1
    (record,) = results.read_all(tmp_path / "w" / "results")
    assert record.status == "diverged"
    assert sweep.sweep(chosen, tmp_path / "w") == 1
    assert "runs are done already" not in capsys.readouterr().out.partition("diverged")[2]


@pytest.mark.parametrize("record", [True, False], ids=["finished", "half-done"])
def test_a_workdir_of_another_sweep_is_refused_and_left_as_it_is(study, tmp_path, record):
    workdir = tmp_path / "w"
    sweep.sweep(points(study, seeds=1, only=["none"]), workdir)
    if not record:
        shutil.rmtree(workdir / "results")
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"optimizer\.warmup_steps"):
        sweep.sweep(points(study, {"optimizer.warmup_steps": 2}, seeds=1), workdir)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_logging_and_checkpointing_is_the_same_sweep(study, tmp_path, capsys):
    sweep.sweep(points(study, seeds=1, only=["none"]), tmp_path / "w")
    capsys.readouterr()
    assert sweep.sweep(points(study, {"train.log_every": 1}, seeds=1, only=["none"]), tmp_path / "w") == 0
    assert "step" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "only", "message"),
    [
        ({"model.sharing": "none"}, [], "varies this field"),
        ({"train.data_seed": 1}, [], "use --seeds"),
        ({}, ["reserve"], "no such point; valid: none, reverse"),
        ({"model.num_heads": 3}, [], r"point .*model.width: 16 is not divisible by model.num_heads=3"),
    ],
)
def test_bad_choices(study, overrides, only, message):
    with pytest.raises(UserError, match=message):
        points(study, overrides, only=only)


def test_bad_data_stops_the_sweep_before_anything_is_compiled(study, tmp_path, monkeypatch):
    def no_compilation(*_):
        raise AssertionError("compiled")

    monkeypatch.setattr(sweep, "expected_seconds", no_compilation)
    (tmp_path / "7.txt").write_bytes(b"a\0b")
    with pytest.raises(UserError, match=r"7\.txt"):
        sweep.sweep(points(study), tmp_path / "w")


def test_points_that_do_not_match_are_refused(study):
    study.write_text(
        study.read_text().replace("model__sharing", "model__ffn_width").replace('"none", "reverse"', "16, 24")
    )
    study.write_text(study.read_text().replace("model__num_repeats=(1, 2)", "model__num_repeats=(1, 1)"))
    with pytest.raises(UserError, match=r"equal non-embedding parameters within 0%.*apart"):
        points(study)


def test_a_collection_runs_its_studies(tmp_path):
    labels = {p.facts["study"] for p in points(Path("configs/tour.py"))}
    assert labels == {"depth_vs_width", "layer_sharing"}


@pytest.mark.parametrize("module", [depth_vs_width, layer_sharing], ids=lambda m: m.__name__)
def test_every_point_of_every_study_is_valid_and_matched(module):
    for preset in module.PRESETS:
        runs = points(Path(f"{module.__name__.replace('.', '/')}.py:{preset}"))
        assert len(runs) == module.study(preset)["seeds"] * len(list(module.sweep(preset)))
        assert len({run.name for run in runs}) == len(runs)


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


def test_a_config_file_alone_says_how_to_run_it():
    with pytest.raises(UserError, match="not a study"):
        points(Path("configs/mobilellm.py:125m"))
    assert json.dumps(cli.load_config("configs/mobilellm.py:125m")[2].to_dict())
