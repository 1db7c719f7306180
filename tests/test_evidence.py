"""What a verdict stands on, as tables; and questions paired, against statsmodels and by simulation."""

import dataclasses

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from test_results import make_record

from experiments.reporting import evidence, pages, tables
from mobilellm_jax.analysis.questions import paired_accuracy
from mobilellm_jax.analysis.study import study_of


def answers(rng, seeds, questions, gap=0.0, seed_sd=0.0):
    """Right answers of two points, [seeds, questions], to questions hard or easy for both."""
    ease = rng.beta(0.6, 0.6, questions)
    sides = []
    for shift in (gap, 0.0):
        chance = np.clip(ease + shift + rng.normal(0, seed_sd, (seeds, 1)), 0, 1)
        sides.append((rng.random((seeds, questions)) < chance).astype(float))
    return sides


def test_one_seed_is_mcnemar_s_test_and_the_paired_standard_error():
    a, b = answers(np.random.default_rng(0), 1, 400, gap=0.1)
    found = paired_accuracy("a", "b", "piqa", a, b)
    both = [[int(np.sum((a == x) & (b == y))) for y in (1, 0)] for x in (1, 0)]
    assert found.p_value == pytest.approx(mcnemar(both, exact=True).pvalue)
    only_a, only_b = both[0][1], both[1][0]
    assert found.p_value == pytest.approx(stats.binomtest(only_a, only_a + only_b).pvalue)
    assert found.error == pytest.approx(stats.sem((a - b)[0]))
    interval = stats.ttest_rel(a[0], b[0]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(interval))


def test_several_seeds_are_clustered_by_question():
    seeds, questions = 4, 300
    a, b = answers(np.random.default_rng(1), seeds, questions, gap=0.05, seed_sd=0.05)
    found = paired_accuracy("a", "b", "piqa", a, b)
    right = np.concatenate([a.ravel(), b.ravel()])
    design = np.repeat([1.0, 0.0], seeds * questions)
    groups = np.tile(np.arange(questions), 2 * seeds)
    options = {"groups": groups, "use_correction": False}
    fit = sm.OLS(right, sm.add_constant(design)).fit(cov_type="cluster", cov_kwds=options)
    assert found.mean == pytest.approx(fit.params[1])
    # statsmodels leaves out that the mean of the questions is estimated
    assert found.error == pytest.approx(fit.bse[1] * np.sqrt(questions / (questions - 1)), rel=1e-6)
    assert found.p_value is None
    assert found.high - found.low > 2 * 1.96 * found.error  # seeds are in it as well


def test_equal_answers_have_no_interval():
    a = np.array([[1.0, 0, 1, 1]])
    found = paired_accuracy("a", "b", "piqa", a, a)
    assert (found.mean, found.low, found.high, found.p_value) == (0, None, None, 1)


@pytest.mark.parametrize(("seeds", "seed_sd"), [(1, 0.0), (4, 0.0), (4, 0.05)])
def test_intervals_hold_the_true_difference(seeds, seed_sd):
    rng, worlds, held, gap = np.random.default_rng(3), 500, 0, 0.05
    ease = rng.beta(0.6, 0.6, 200_000)
    noise = rng.normal(0, seed_sd, ease.shape)
    true = np.mean(np.clip(ease + gap + noise, 0, 1) - np.clip(ease + noise, 0, 1))
    for _ in range(worlds):
        found = paired_accuracy("a", "b", "piqa", *answers(rng, seeds, 300, gap, seed_sd))
        held += found.low <= true <= found.high
    assert 0.92 <= held / worlds <= 0.99


def entry(correct):
    share = correct.count("1") / len(correct)
    metrics = {name: {"value": share, "standard_error": 0.05} for name in ("acc", "acc_norm")}
    return {
        "items": len(correct), "metrics": metrics, "chance": 0.5, "majority": 0.5, "data": "piqa.jsonl",
        "correct": correct,
    }  # fmt: skip


def test_report_pairs_questions_where_answers_were_kept():
    deep, shallow = entry("1110110101"), entry("1010010100")
    runs = [
        make_record(depth=4, zero_shot={"piqa": deep}),
        make_record(depth=2, zero_shot={"piqa": shallow}),
    ]
    assert evidence.paired_questions(study_of(runs)) == {
        "pair": ["4 x 128 against 2 x 128"],
        "task": ["piqa (10)"],
        "seeds": ["1, 1"],
        "acc, points": ["+30.0 [-4.6, +64.6]"],
        "standard error": ["15.3"],
        "McNemar's p": ["0.250"],
    }
    old = {name: value for name, value in deep.items() if name != "correct"}
    fewer = entry("111011010")
    for other in (old, fewer):
        one = dataclasses.replace(runs[0], zero_shot={"piqa": other})
        assert evidence.paired_questions(study_of([one, runs[1]])) == {}


def test_tables_of_floor_and_position():
    records = [
        make_record(
            depth=depth,
            seed=seed,
            score=3.6,
            floor={"tokens": 179_200, "unigram": 5.5, "bigram": 3.7, "trigram": trigram},
            by_position={"to": [1, 2, 4, 8, 16], "loss": [5, 4, 3.9, 3.8, far], "targets": [1, 1, 2, 4, 8]},
        )
        for depth, trigram, far in ((2, 3.1, 3.7), (4, 3.2, 3.8))
        for seed in range(3)
    ]
    study = study_of(records)
    assert evidence.floors(study) == {
        "point": ["2 x 128", "4 x 128"],
        "loss": ["3.6000", "3.6000"],
        "unigram": ["5.5000", "5.5000"],
        "bigram": ["3.7000", "3.7000"],
        "trigram": ["3.1000", "3.2000"],
        "counted on": ["179 k", "179 k"],
        "beyond 8 tokens": ["-0.1000", "+0.0000"],
    }
    assert evidence.positions(study) == {
        "point": ["2 x 128", "4 x 128"],
        "1": ["5.000", "5.000"],
        "2": ["4.000", "4.000"],
        "3 to 4": ["3.900", "3.900"],
        "5 to 8": ["3.800", "3.800"],
        "9 to 16": ["3.700", "3.800"],
    }
    old = study_of([dataclasses.replace(run, floor=None, by_position=None) for run in records])
    assert (evidence.floors(old), evidence.positions(old), evidence.documents(old)) == ({}, {}, {})


def test_report_has_the_tables_and_begins_with_what_cannot_be_judged():
    def documents(depth, seed):
        return {"nats": [(3.5 + 0.1 * depth + 0.01 * seed * (depth - 3)) * 400] * 9, "targets": [400] * 9}

    records = [
        make_record(
            depth=depth,
            seed=seed,
            documents=documents(depth, seed),
            floor={"tokens": 9, "unigram": 5.5, "bigram": 3.7, "trigram": 3.2},
        )
        for depth in (2, 4)
        for seed in range(3)
    ]
    study = study_of(records)
    images = dict.fromkeys(("", "-curves"), pages.Image("x.png", "x", b""))
    text = pages.to_markdown("Title", pages.contents(study, images))
    title, answer, reading, warning, *_ = text.split("\n\n")
    assert answer.endswith("architecture cannot be judged at this size and length, see the first warning.")
    assert (title, reading[:5], warning) == ("# Title", "Read ", "## Read this first")
    assert text.split("## Read this first\n\n")[1].startswith(
        "- Architecture cannot be judged here: a trigram "
    )
    for heading in ("Floor and context", "Other held-out documents"):
        assert f"\n## {heading}\n" in text
    columns = evidence.documents(study)
    (over,) = study.verdict.over_documents
    assert columns["over other documents too"] == [f"[{over.low:+.4f}, {over.high:+.4f}]"]
    assert columns["of documents"] == ["0.0000"]  # they are all alike
    assert "question by question" not in text


def test_aspect_ratio_is_width_over_layers_applied():
    def ratios(plans):
        runs = [make_record(depth=depth, layer_plan=plan) for depth, plan in plans.items()]
        study = study_of(runs)
        cells = [columns["D/L"] for columns in tables.designs(study) if "D/L" in columns]
        return cells[0] if cells else " ".join(tables.head(study))

    assert ratios({2: [0, 1], 4: [0, 1, 2, 3] * 8}) == ["64", "4 (outside)"]
    assert "D/L 4 (outside)" in ratios({2: [0, 1] * 16, 4: [0, 1, 2, 3] * 8})
    assert ratios({1: [0], 4: list(range(21))}) == ["128", "6.1"]
