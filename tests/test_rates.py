"""Learning rates of a comparison where the search found no minimum inside: what is said, and what is used."""

import math

import pytest
from test_results import make_record
from test_sweep import losses, points, write_study

from experiments.runner import sweeping
from mobilellm_jax.analysis.records import read_records
from mobilellm_jax.analysis.study import study_of


@pytest.mark.parametrize(
    ("curve", "rate", "words"),
    [
        (lambda octave: 3 - 0.01 * (octave + 20) ** 2, 2**1, "the best one tried is used"),
        (lambda _: math.inf, 2**-17, "all of them diverged"),
    ],
    ids=["better and better", "diverged"],
)
def test_a_search_without_an_interior_optimum_is_said(tmp_path, monkeypatch, capsys, curve, rate, words):
    """The grid 2^-9, 2^-7 is extended by four steps at most."""
    study = write_study(tmp_path)
    study.write_text(study.read_text().replace("learning_rates=()", "learning_rates=(2**-9, 2**-7)"))
    monkeypatch.setattr(sweeping, "run", losses(curve))
    monkeypatch.setattr(sweeping, "expected_seconds", lambda _: 0.0)
    monkeypatch.setattr(sweeping, "_report", lambda *_: 0)
    assert sweeping.sweep(points(study, only=["none"]), tmp_path / "w", jobs=1) == 0
    low, high = sorted((rate, 2**-9 if rate > 2**-9 else 2**-7))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "no interior optimum" in line]
    assert line == (
        f"mini/tiny/none  no interior optimum in {low:.3g} to {high:.3g}: learning rate {rate:.3g}, {words}"
    )
    compared = [r for r in read_records(tmp_path / "w/results") if r.phase == "comparison"]
    assert {r.learning_rate for r in compared} == {rate}


def search(depth, losses, tuning):
    """Tuning and comparison runs of a design with these losses at 1, 2 and 4e-3."""
    tried = [
        make_record(depth=depth, score=loss, learning_rate=rate, phase="tuning", tuning=tuning)
        for rate, loss in zip((1e-3, 2e-3, 4e-3), losses, strict=True)
    ]
    return [*tried, *(make_record(depth=depth, seed=s, score=3 + s / 100, tuning=tuning) for s in range(3))]


@pytest.mark.parametrize("tuning", ["fitted", "grid"])
def test_a_report_warns_of_a_fit_without_an_interior_optimum(tuning):
    """Flat curves of the others bend the common parabola so little that its minimum lies outside."""
    runs = [
        *search(2, (3.001, 3.0, 3.001), tuning),
        *search(3, (3.001, 3.0, 3.001), tuning),
        *search(4, (3.5, 3.0, 3.001), tuning),
    ]
    found = study_of(runs).verdict
    assert {label: t.at_edge for label, t in found.tuning.items()} == dict.fromkeys(found.tuning, False)
    assert {label: t.fitted is None for label, t in found.tuning.items()} == {
        "2 x 128": False,
        "3 x 128": False,
        "4 x 128": True,
    }
    warned = [warning for warning in found.warnings if "interior" in warning]
    assert warned == [
        "No interior optimum was fitted to the learning rates of '4 x 128': the best one tried is used."
    ] * (tuning == "fitted")
