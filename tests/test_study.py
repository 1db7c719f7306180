"""A study as one view of its records: the same whatever their order, with what every table needs."""

from test_results import make_diverged, make_record, make_tuning

from mobilellm_jax.analysis.study import study_of

PAIRS = [["4 x 128", "2 x 128"]]


def records():
    compared = [make_record(depth=d, seed=s, score=d + s, pairs=PAIRS) for d in (4, 2) for s in (1, 0)]
    return [*make_tuning(depth=4, pairs=PAIRS), *compared, make_diverged(depth=2, seed=2, pairs=PAIRS)]


def test_order_of_the_records_does_not_matter():
    one, other = study_of(records()), study_of(records()[::-1])
    assert one == other
    assert one.runs == other.runs
    assert len(one.runs) == len(records())


def test_points_hold_their_runs_apart_by_phase():
    study = study_of(records())
    assert list(study.points) == ["2 x 128", "4 x 128"]
    shallow, deep = study.points.values()
    assert [run.seed for run in shallow.comparison] == [0, 1, 2]
    assert shallow.tuning == []
    assert shallow.scores == {0: 2.0, 1: 3.0}  # the third diverged
    rates = [run.learning_rate for run in deep.tuning]
    assert len(rates) == 5
    assert rates == sorted(rates)
    assert {run.phase for run in deep.comparison} == {"comparison"}
    assert deep.config["model"]["depth"] == 4
    assert study.facts.pairs == [("4 x 128", "2 x 128")]


def test_names_of_files_are_safe():
    assert study_of([make_record(study="../../a b", preset="c/d", pairs=[])]).stem == "..-..-a-b-c-d"
