"""Measures of tasks: from a model's guesses to the record, the verdict, the report and the figure."""

import dataclasses
import functools
import json
import math
import re
import zlib

import jax
import numpy as np
import pytest
from conftest import tiny_config
from test_results import make_record

from experiments.reporting import drawing, evidence, figures, pages, tables
from mobilellm_jax import data, model
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.records import Record, read_record, write_record
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.costs import accounting
from mobilellm_jax.data.rows import inputs_and_targets, is_target, targets_of
from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel import partition
from mobilellm_jax.runs.run import run
from mobilellm_jax.training import held_out
from mobilellm_jax.training.held_out import evaluate_held_out
from mobilellm_jax.training.programs import compile_key, compile_programs

SPECS = {
    "structure:levels=2,symbols=3,rules=2,grammar=5,tokens=24": (24, ["divergence", "log_divergence"]),
    "manipulation:modulus=3,operations=3,operators=2": (7, ["wrong"]),
    "knowledge:people=20,attributes=2,values=4,wordings=2,symbols=3,exposures=24": (
        6,
        ["bits", "bits_per_parameter", "bits_per_non_embedding_parameter", "forgotten", "wrong"],
    ),
    "breadth:vertices=4,parents=2": (9, ["wrong"]),
    "khop:hops=1,min_hops=1,symbols=3,queries=2": (7, ["wrong"]),
}


def config_of(spec, **overrides):
    values = {
        "data.source": spec,
        "data.sequence_length": SPECS[spec][0] + 1,  # with padding
        "model.vocab_size": 40,
        "train.steps": 60,
        "train.batch_size": 8,
        "train.eval_rows": 27,  # the last batch is not full
        "train.eval_batch_size": 8,
        "train.eval_every": 30,
        "optimizer.learning_rate": 0.02,
    }
    return tiny_config(**{**values, **overrides})


describe = functools.partial(
    Record,
    **{
        name: getattr(make_record(), name)
        for name in (
            *(
                "study",
                "preset",
                "point",
                "point_index",
                "seed",
                "phase",
                "question",
                "matched",
                "scientific",
            ),
            *("nuisance", "tuning", "pairs", "margin", "x", "overrides", "git_commit", "command"),
        )
    },
)


@pytest.mark.parametrize(
    "spec", [spec if i == 0 else pytest.param(spec, marks=pytest.mark.slow) for i, spec in enumerate(SPECS)]
)
def test_a_run_records_what_its_task_measures(tmp_path, spec):
    _, names = SPECS[spec]
    config = config_of(spec)
    said = []
    record = run(config, tmp_path, functools.partial(describe, metric="loss"), said.append)
    assert [e["step"] for e in record.evaluations] == [30, 60]
    for evaluation in record.evaluations:
        assert list(evaluation) == ["step", "loss", "bits_per_byte", "error", *names]
        assert (evaluation["error"] is None) == spec.startswith(("structure", "knowledge"))
    assert any(f"  {names[0]} {record.final[names[0]]:.4g}" in line for line in said)
    assert record.measures.keys() == {"floor", "ceiling", "levels"}
    assert (record.measures["levels"] is None) == spec.startswith("structure")
    metric = next(name for name in names if name in MEASURES)
    record = dataclasses.replace(record, metric=metric)
    write_record(record, tmp_path / "record.json")
    assert read_record(tmp_path / "record.json") == record
    assert record.score == record.final[metric]
    again = run(
        config, tmp_path, functools.partial(describe, metric=metric), said.append
    )  # from the checkpoint
    assert (again.final, again.evaluations, again.measures) == (
        record.final,
        record.evaluations,
        record.measures,
    )


@pytest.mark.slow
def test_structure_is_judged_by_the_nats_of_a_plain_loop():
    spec = next(iter(SPECS))
    config = config_of(spec)
    params, prepared, scores = evaluated(config)
    rows = prepared.rows("valid", 27, 0)
    tokens, targets = inputs_and_targets(rows)
    targets = np.asarray(targets)
    logits = model.apply(params, tokens, config.model)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    nats = -np.take_along_axis(log_p, np.maximum(targets, 0)[..., None], axis=2)[..., 0][is_target(targets)]
    true = -prepared.valid.log_probability(rows).sum() / (27 * 24)
    assert scores.measures["divergence"] == pytest.approx(nats.mean() - true, rel=1e-4)
    assert scores.measures["log_divergence"] == pytest.approx(math.log(nats.mean() - true), rel=1e-4)


def evaluated(config, seed=1):
    mesh = partition.make_mesh(config.mesh)
    programs = compile_programs(compile_key(config), mesh)
    params = jax.tree.map(lambda p: p * 4, programs.init(jax.random.key(seed)).params)
    prepared = data.prepare(config.data, config.model.vocab_size)
    share = partition.process_share(mesh)
    return params, prepared, evaluate_held_out(programs, params, prepared, config, share)


def greedy(before):
    """A made-up model of `breadth:vertices=4`: mostly some vertex that may come next, sometimes any other."""
    arrows = [divmod(token - 5, 4) for token in before[:5] if token > 4]
    needed = {before[5]}
    for _ in range(4):
        needed |= {parent for parent, child in arrows if child in needed}
    told = before[6:]
    ready = [v for v in sorted(needed - {*told}) if all(p in told for p, child in arrows if child == v)]
    choice = zlib.crc32(bytes(before))
    return ready[choice % len(ready)] if ready and choice % 5 else choice % 4


@pytest.mark.slow
def test_breadth_is_judged_as_greedy_decoding_token_by_token(monkeypatch):
    def evaluated_by_greedy(programs, params, batches):
        for rows in batches:
            tokens, targets = np.where(rows < 0, ~rows, rows)[:, :-1].tolist(), rows[:, 1:]
            guesses = [[greedy(row[: t + 1]) if t > 4 else 0 for t in range(len(row))] for row in tokens]
            counts = {name: np.float64(1) for name in ("targets", "wrong", "rows")}
            yield {"nats": np.zeros(targets.shape), "guesses": np.array(guesses), **counts}

    monkeypatch.setattr(held_out, "_evaluated", lambda *given: list(evaluated_by_greedy(*given)))
    monkeypatch.setattr(held_out, "_order", lambda *_, **__: np.arange(32))
    sizes = {"train.eval_rows": 300, "train.eval_batch_size": 32}
    config = config_of("breadth:vertices=4,parents=2", **sizes)
    prepared = data.prepare(config.data, config.model.vocab_size)
    mesh = partition.make_mesh(config.mesh)
    programs, share = compile_programs(compile_key(config), mesh), {"process_index": 0, "process_count": 1}
    scores = evaluate_held_out(programs, {}, prepared, config, share)
    right, others = 0, 0
    for row in prepared.rows("valid", 300, 0).tolist():
        decoded = [~token if token < 0 else token for token in row[:6]]
        wanted = [token for token in row[6:] if token >= 0]
        while len(decoded) < 6 + len(wanted):
            decoded.append(greedy(decoded))
        answer, arrows = decoded[6:], [divmod(token - 5, 4) for token in decoded[:5] if token > 4]
        in_order = all(a in answer[: answer.index(b)] for a, b in arrows if b in answer)
        is_right = sorted(answer) == sorted(wanted) and in_order
        right += is_right
        others += is_right and answer != wanted
    assert scores.error == pytest.approx(1 - right / 300)
    assert 50 < right < 250
    assert others > 2


def test_a_run_of_too_few_steps_is_refused_before_anything_is_compiled(tmp_path):
    spec = next(spec for spec in SPECS if spec.startswith("knowledge"))
    with pytest.raises(UserError, match=r"train\.steps: 61 steps .* use train\.steps=60"):
        run(config_of(spec, **{"train.steps": 61}), tmp_path, describe, print)


@pytest.mark.slow
def test_bits_are_divided_by_the_parameters_of_the_model():
    spec = next(spec for spec in SPECS if spec.startswith("knowledge"))
    config = config_of(spec)
    _, _, scores = evaluated(config)
    counts, found = accounting.parameters(config.model), scores.measures
    assert found["bits_per_parameter"] == pytest.approx(found["bits"] / counts.total)
    assert found["bits_per_non_embedding_parameter"] == pytest.approx(found["bits"] / counts.non_embedding)
    assert found["bits"] == pytest.approx(80 * (1 - found["forgotten"]))
    assert found["forgotten"] == pytest.approx(scores.loss / math.log(4))


def test_targets_of_agrees_with_what_training_reads():
    rows = np.concatenate(
        [data.prepare(config_of(spec).data, 40).rows("train", 5, 0)[:, :8] for spec in SPECS]
    )
    np.testing.assert_array_equal(targets_of(rows), inputs_and_targets(rows)[1])


# --- from records on -----------------------------------------------------------------------------------

LEVELS = {
    "name": "operations",
    "level": [1, 2],
    "accuracy": [0.9, 0.5],
    "floor": [0.25, 0.3],
    "ceiling": [1.0, 1.0],
    "answers": [400, 200],
}
FLOOR = {"wrong": 0.725, "log_divergence": -0.5, "forgotten": 1.0}


def two_points(metric, a, b, seeds=3, **changes):
    of_task = {"floor": FLOOR, "ceiling": {"wrong": 0.0, "forgotten": 0.0}, "levels": LEVELS}
    return [
        make_record(
            depth=depth,
            seed=seed,
            score=score + 0.004 * (seed * depth % 3),
            metric=metric,
            measures=of_task,
            **changes,
        )
        for depth, score in ((2, a), (4, b))
        for seed in range(seeds)
    ]


def test_wrong_answers_are_shown_as_right_ones_and_compared_in_points():
    study = study_of(two_points("wrong", 0.4, 0.1))
    assert "'4 x 128' is better than '2 x 128' (by 30.00, p" in study.verdict.sentence
    assert "Differences are in percentage points of right answers" in study.verdict.sentence
    assert tables.outcomes(study)["right, %"][0].startswith("59.60 ±")
    assert "difference (wrong answers, points)" in tables.comparisons(study)
    assert "Smallest difference that matters: 2 points." in tables.head(study)[1]
    levels = evidence.levels(study)
    assert levels == {
        "point": ["2 x 128", "4 x 128", "floor"],
        "1 operations (400)": ["90.0", "90.0", "25.0"],
        "2 operations (200)": ["50.0", "50.0", "30.0"],
    }


def test_divergences_are_compared_by_their_logarithm():
    study = study_of(two_points("log_divergence", -2.0, -3.0))
    assert "'4 x 128' is better than '2 x 128' (by 1.0000, p" in study.verdict.sentence
    assert "Differences are in natural logarithms of the divergence" in study.verdict.sentence
    assert tables.outcomes(study)["ln divergence (nats/token)"][0].startswith("-1.9960 ±")
    assert "Smallest difference that matters: 0.02 ln nats per token." in tables.head(study)[1]


@pytest.mark.parametrize(
    ("metric", "a", "b", "said"),
    [
        (
            "wrong",
            0.01,
            0.004,
            "all 2 designs reach the best there is, 100.00 in right answers, mean over levels",
        ),
        ("wrong", 0.72, 0.71, "all 2 designs are no better than a guess, 27.50 in right answers, mean over"),
        (
            "forgotten",
            0.99,
            1.02,
            "all 2 designs are no better than a guess, 0.00 in facts stored (%), to within",
        ),
        (
            "log_divergence",
            -0.5,
            -0.49,
            "all 2 designs are no better than a guess, -0.5000 in divergence from the",
        ),
        ("wrong", 0.01, 0.1, ""),
        ("wrong", 0.72, 0.3, ""),
    ],
)
def test_a_measure_that_cannot_tell_designs_apart_says_so_first(metric, a, b, said):
    first = study_of(two_points(metric, a, b)).verdict.warnings[:1]
    if said:
        assert first[0].startswith(f"Cannot tell designs apart here: {said}")
    else:
        assert not any(
            "apart here" in warning for warning in study_of(two_points(metric, a, b)).verdict.warnings
        )


def test_records_without_ends_are_not_judged_by_them():
    records = two_points("wrong", 0.01, 0.004)
    records[0] = dataclasses.replace(records[0], measures=None)
    assert not any("apart here" in warning for warning in study_of(records).verdict.warnings)


@pytest.mark.parametrize(
    ("metric", "a", "b", "ends"),
    [("wrong", 0.76, 0.02, 2), ("wrong", 0.5, 0.02, 1), ("log_divergence", -2, -3, 0)],
)
def test_floor_and_ceiling_are_drawn_where_the_axis_reaches_them(metric, a, b, ends):
    figure = figures.outcome(study_of(two_points(metric, a, b)))
    axes = figure.subfigs[0].axes[0]
    found = [
        text.get_text().strip() for text in axes.texts if text.get_text().strip() in ("floor", "ceiling")
    ]
    assert len(found) == ends
    assert MEASURES[metric].axis in (axes.get_xlabel(), axes.get_ylabel())
    drawing.render(figure)


@pytest.mark.parametrize("metric", ["wrong", "log_divergence", "forgotten"])
def test_reports_are_written_for_every_measure(tmp_path, metric):
    said, _ = pages.report(study_of(two_points(metric, 0.4, 0.1)), tmp_path)
    page = (tmp_path / "reports" / "shape-tiny.md").read_text()
    assert MEASURES[metric].caption in page
    assert "## By level" in page
    assert MEASURES[metric].column in said


def test_a_record_of_an_unknown_metric_is_refused(tmp_path):
    write_record(make_record(metric="wrong", score=0.2), tmp_path / "a.json")
    text = json.loads((tmp_path / "a.json").read_text())
    text.pop("sha256", None)
    with pytest.raises(UserError, match=r"metric: 'sad' is unknown; known: loss, error, wrong, "):
        write_record(
            dataclasses.replace(make_record(metric="wrong", score=0.2), metric="sad"), tmp_path / "b.json"
        )
    record = make_record(metric="wrong", score=0.2)
    del record.final["wrong"]
    with pytest.raises(UserError, match=r"final\.wrong: missing from a finished run"):
        write_record(record, tmp_path / "c.json")
    assert re.search(r'"wrong"', (tmp_path / "a.json").read_text())
