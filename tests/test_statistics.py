"""Statistics against published numbers and scipy, calibration on simulated data, and what verdicts say."""

import dataclasses

import numpy as np
import pytest
from scipy import stats
from test_results import SETTINGS, make_diverged, make_record

from mobilellm_jax import statistics
from mobilellm_jax.errors import UserError
from mobilellm_jax.statistics import check_comparable, holm, mean_and_interval, paired_difference, verdict

NOISE = np.random.default_rng(3).normal(0, 0.01, (8, 8))  # [point, seed]


def runs(losses: dict[int, float], seeds: int, **changes):
    """Returns runs of points with these mean losses, and an effect of the seed common to all points."""
    return [
        make_record(depth=depth, seed=seed, loss=loss + 0.05 * seed + NOISE[i, seed], **changes)
        for i, (depth, loss) in enumerate(losses.items())
        for seed in range(seeds)
    ]


def test_interval_of_published_data():
    # Student (1908), table 1: additional hours of sleep under drugs 1 and 2, of ten patients.
    drug_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    drug_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    difference = paired_difference(dict(enumerate(drug_1)), dict(enumerate(drug_2)))
    assert difference.n == 10
    assert difference.mean == pytest.approx(-1.58)
    # As printed by R's t.test(..., paired = TRUE).
    assert (difference.low, difference.high) == pytest.approx((-2.4598858, -0.7001142), abs=1e-7)
    assert difference.p_value == pytest.approx(0.002833, abs=1e-6)
    estimate = mean_and_interval([a - b for a, b in zip(drug_1, drug_2, strict=True)])
    assert estimate.mean - estimate.half_width == pytest.approx(-2.4598858, abs=1e-7)


def test_interval_needs_two_different_values():
    assert mean_and_interval([3.0]).half_width is None
    assert mean_and_interval([3.1, 3.1, 3.1]).half_width is None
    two = mean_and_interval([1.0, 2.0])
    assert two.half_width == pytest.approx(0.5 * stats.t.ppf(0.975, 1))  # 12.7 standard errors
    assert mean_and_interval([1.0, 2.0], level=0.5).half_width == pytest.approx(0.5)


def test_only_common_seeds_are_paired():
    a, b = {0: 1.0, 1: 2.0, 2: 3.5, 7: 100.0}, {2: 3.0, 1: 1.0, 0: 0.5, 8: -100.0}
    difference = paired_difference(a, b)
    assert (difference.n, difference.mean) == (3, pytest.approx((0.5 + 1.0 + 0.5) / 3))
    with pytest.raises(UserError, match=r"no seed in common: \[7\] against \[8\]"):
        paired_difference({7: 1.0}, {8: 1.0})


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_equal_differences_are_no_evidence(offset):
    a = {0: 3.1, 1: 3.2, 2: 3.7}
    difference = paired_difference(a, {seed: loss - offset for seed, loss in a.items()})
    assert difference.mean == pytest.approx(offset)
    assert (difference.low, difference.high, difference.p_value) == (None, None, None)


def test_holm_by_hand():
    # Sorted: 4 x .005 = .02, 3 x .01 = .03, 2 x .03 = .06, 1 x .04 -> .06 as no later value may be smaller.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_same_design_twice_is_called_different_in_5_percent():
    rng = np.random.default_rng(1)
    seed_effect, noise = rng.normal(3.5, 0.1, (1500, 1, 5)), rng.normal(0, 0.02, (1500, 2, 5))
    called = [
        paired_difference(dict(enumerate(a)), dict(enumerate(b))).p_value < 0.05
        for a, b in (seed_effect + noise).tolist()
    ]
    assert 0.033 < np.mean(called) < 0.067  # standard error 0.006


def test_family_error_of_four_equal_points_is_5_percent(monkeypatch):
    """Although the reference is the point that is best by chance."""
    monkeypatch.setattr(statistics, "check_comparable", lambda records: [])  # slow, and tested below
    records = [make_record(depth=depth, seed=seed) for depth in range(4) for seed in range(5)]
    rng = np.random.default_rng(2)
    wrong = 0
    for losses in rng.normal(3.5, 0.02, (250, 20)).tolist():
        finals = [{"step": 500, "loss": loss, "bits_per_byte": None} for loss in losses]
        found = verdict([dataclasses.replace(r, final=f) for r, f in zip(records, finals, strict=True)])
        wrong += any(comparison.word != "cannot tell" for comparison in found.comparisons.values())
    assert 0.01 < wrong / 250 < 0.085  # standard error 0.014; without Holm's correction: 0.12


def test_true_effect_is_found():
    found = verdict(runs({2: 3.6, 4: 3.5, 8: 3.501}, seeds=8))
    assert found.best == found.reference == min(found.estimates, key=lambda p: found.estimates[p].mean)
    assert found.comparisons["2 x 128"].word == "worse"
    assert found.family == 3
    other = next(c for point, c in found.comparisons.items() if point != "2 x 128")
    assert other.word == "cannot tell"


def test_verdict_with_five_seeds_and_baseline():
    records = runs({2: 3.6, 4: 3.5, 8: 3.9}, seeds=5, baseline="2 x 128")
    found = verdict(records)
    assert found.reference == "2 x 128"
    assert {point: c.word for point, c in found.comparisons.items()} == {
        "4 x 128": "better",
        "8 x 128": "worse",
    }
    losses = {d: [r.loss for r in records if r.setting("model.depth") == d] for d in (2, 4, 8)}
    p = {d: stats.ttest_rel(losses[d], losses[2]).pvalue for d in (4, 8)}
    assert found.comparisons["8 x 128"].holm_p == pytest.approx(2 * min(p.values()))
    assert p[8] < p[4]
    difference = found.comparisons["4 x 128"].difference
    assert difference.mean == pytest.approx(np.mean(losses[4]) - np.mean(losses[2]))
    assert found.sentence.startswith("'4 x 128' has the lowest mean held-out loss, 3.6041 ± 0.0954 nats")
    assert "(n = 5). Against '2 x 128': better: '4 x 128' (-0." in found.sentence
    assert "; worse: '8 x 128' (+0." in found.sentence
    assert found.sentence.endswith("p is Holm's over 2 pairs.")


def test_verdict_with_one_seed():
    found = verdict(runs({2: 3.6, 4: 3.5}, seeds=1))
    assert found.sentence.startswith("One seed proves nothing: ")
    assert found.comparisons["2 x 128"].word == "cannot tell"
    assert "p =" not in found.sentence


def test_verdict_with_two_seeds():
    found = verdict(runs({2: 3.6, 4: 3.5}, seeds=2))
    assert "Intervals from two seeds are very wide." in found.sentence
    assert "very wide" not in verdict(runs({2: 3.6, 4: 3.5}, seeds=3)).sentence


def test_runs_that_did_not_finish_are_counted():
    records = runs({2: 3.6, 4: 3.5, 8: 3.7}, seeds=3)
    records[0] = make_diverged(depth=2, seed=0)
    records[4] = make_record(depth=4, seed=1, status="failed", error="out of memory", final=None)
    del records[8]
    found = verdict(records)
    assert (
        "1 of 9 runs diverged: '2 x 128' seed 0. 1 of 9 runs failed: '4 x 128' seed 1. "
        "1 of 9 runs left no record: '8 x 128' seed 2."
    ) in found.sentence
    assert found.estimates["2 x 128"].n == 2
    assert found.comparisons["2 x 128"].difference.n == 1  # seed 2 is the only one that both finished


def test_points_without_a_common_seed_cannot_be_told_apart():
    found = verdict([make_record(depth=2, seed=0), make_record(depth=4, seed=1, loss=9.0)])
    assert found.comparisons["4 x 128"].word == "cannot tell"
    assert "no common seed" in found.sentence


def test_verdict_when_almost_nothing_finished():
    gone = [make_diverged(depth=2, seed=seed) for seed in range(2)]
    assert (
        verdict(gone).sentence == "No run finished. 2 of 2 runs diverged: '2 x 128' seed 0, '2 x 128' seed 1."
    )
    assert verdict(gone).best is None
    found = verdict([*gone, make_record(depth=4)])
    assert found.sentence.startswith(
        "Only '4 x 128' finished, with a held-out loss of 3.5000 nats per token. 2 of 4"
    )


def test_baseline_that_did_not_finish():
    records = runs({4: 3.6, 8: 3.5}, seeds=3, baseline="2 x 128")
    records += [make_diverged(depth=2, seed=seed, baseline="2 x 128") for seed in range(3)]
    found = verdict(records)
    assert found.reference == "8 x 128"
    assert found.sentence.startswith(
        "The baseline '2 x 128' has no finished run; the best is the reference. "
    )


def test_seeds_without_effect_are_no_evidence():
    records = [make_record(depth=depth, seed=seed, loss=3.0 + depth) for depth in (1, 2) for seed in range(3)]
    found = verdict(records)
    assert found.comparisons["2 x 128"].word == "cannot tell"
    assert "the same in all 3 seeds" in found.sentence


def test_verdict_is_of_one_study():
    with pytest.raises(ValueError, match="one study and preset"):
        verdict([make_record(), make_record(preset="small")])


def with_setting(name: str, value: object, **changes):
    group, field = name.split(".")
    record = make_record(**changes)
    config = {**record.config, group: {**record.config[group], field: value}}
    return dataclasses.replace(record, config=config)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            make_record(seed=1, data={"source_sha256": "other", "tokenizer_sha256": "cd" * 32}),
            "source_sha256 of the data is abab.* in '4 x 128' seed 0, but other in '4 x 128' seed 1",
        ),
        (
            make_record(seed=1, data={"source_sha256": "ab" * 32, "tokenizer_sha256": None}),
            "tokenizer_sha256",
        ),
        (make_record(seed=1, steps=499), "steps is 500 in .* but 499 in"),
        (make_record(seed=1, tokens_seen=7), "tokens seen is 2048000 in .* but 7 in"),
        (with_setting("data.sequence_length", 512, seed=1), "data.sequence_length is 256 in .* but 512 in"),
        (with_setting("train.batch_size", 8, seed=1), "train.batch_size is 16 in .* but 8 in"),
        (with_setting("train.eval_rows", 8, seed=1), "train.eval_rows is 0 in .* but 8 in"),
        (make_record(), "2 records of '4 x 128' seed 0; keep one"),
        (make_record(seed=1, overrides={"model.depth": 5}), "the design of '4 x 128' is"),
    ],
)
def test_runs_under_unequal_conditions_are_refused(other, message):
    with pytest.raises(UserError, match=f"shape:tiny: {message}"):
        verdict([make_record(), other])


@pytest.mark.parametrize(
    ("other", "warning"),
    [
        (make_record(seed=1, git_commit=None), "git commit: 0123abc (1 runs), None (1 runs)"),
        (
            make_record(seed=1, device={"platform": "gpu", "kind": "H100", "count": 2}),
            "device: 1 x cpu (cpu) (1 runs), 2 x H100 (gpu) (1 runs)",
        ),
        (
            make_record(seed=1, versions={"python": "3.11.7", "jax": "0.11.0"}),
            "jax version: 0.10.2 (1 runs), 0.11.0",
        ),
        (make_record(seed=1, question="Why?"), "question: Does"),
        (
            with_setting("optimizer.learning_rate", 1e-3, seed=1),
            "optimizer.learning_rate: 0.002 (1 runs), 0.001",
        ),
    ],
)
def test_other_differences_are_warned_of(other, warning):
    (found,) = verdict([make_record(), other]).warnings
    assert found.startswith(f"The runs differ in {warning}")


def test_what_a_study_varies_is_neither_refused_nor_warned_of():
    records = [
        make_record(depth=2),
        with_setting(
            "train.init_seed",
            1,
            depth=2,
            seed=1,
            overrides={**make_record(depth=2).overrides, "train.init_seed": 1},
        ),
        with_setting("optimizer.learning_rate", 1e-3, overrides={"optimizer.learning_rate": 1e-3}),
        make_record(depth=8, study="other", data={"source_sha256": "x", "tokenizer_sha256": "y"}),
    ]
    assert check_comparable(records) == []
    horizon = {"scientific": ["train.steps"], "overrides": {"train.steps": 9}, "point": "short"}
    short = with_setting("train.steps", 9, steps=9, tokens_seen=9 * 16 * 256, created="2027", **horizon)
    assert check_comparable([make_record(scientific=["train.steps"]), short]) == []


def test_settings_of_the_fixture_are_compared():
    assert set(make_record().config) == {"model", *SETTINGS}
