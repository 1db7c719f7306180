"""Statistics against published numbers, other formulas and calculation by hand. See test_calibration."""

import math

import numpy as np
import pytest
from scipy import stats

from mobilellm_jax.analysis import statistics
from mobilellm_jax.analysis.statistics import (
    Estimate,
    PairedDifference,
    decide,
    holm,
    mean_and_interval,
    paired_difference,
    seeds_needed,
    standard_deviation,
)
from mobilellm_jax.analysis.wording import format_bound, format_difference, format_estimate, format_p


def test_interval_of_published_data():
    # Student (1908), table 1: additional hours of sleep under drugs 1 and 2, of ten patients.
    drug_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    drug_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    difference = paired_difference(dict(enumerate(drug_1)), dict(enumerate(drug_2)))
    assert difference.n == 10
    assert difference.mean == pytest.approx(-1.58)
    assert difference.sd == pytest.approx(1.229995, abs=1e-6)
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


def test_noise_is_the_standard_deviation_of_a_sample():
    assert standard_deviation([1.0, 2.0, 4.0]) == pytest.approx(math.sqrt(7 / 3))
    assert standard_deviation([1.0]) is None


def test_only_common_seeds_are_paired():
    a, b = {0: 1.0, 1: 2.0, 2: 3.5, 7: 100.0}, {2: 3.0, 1: 1.0, 0: 0.5, 8: -100.0}
    difference = paired_difference(a, b)
    assert (difference.n, difference.mean) == (3, pytest.approx((0.5 + 1.0 + 0.5) / 3))
    assert paired_difference({7: 1.0}, {8: 1.0}) is None
    assert paired_difference({0: 1.0}, {0: 3.0}) == PairedDifference(1, -2.0, 0.0, None, None, None)


def test_equal_differences_have_no_interval_and_the_p_of_the_sign_test():
    a = {0: 3.1, 1: 3.2, 2: 3.7}
    same = paired_difference(a, dict(a))
    assert same == PairedDifference(3, 0.0, 0.0, None, None, None)
    shifted = paired_difference(a, {seed: loss - 0.1 for seed, loss in a.items()})
    assert shifted.mean == pytest.approx(0.1)
    assert (shifted.sd, shifted.low, shifted.high, shifted.p_value) == (0.0, None, None, 2 / 2**3)


def test_holm_by_hand():
    # Sorted: 4 x .005 = .02, 3 x .01 = .03, 2 x .03 = .06, 1 x .04 -> .06 as no later value may be smaller.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
    assert holm([None, 0.01, 0.02]) == [None, pytest.approx(0.03), pytest.approx(0.04)]  # still three tests


def scores_of(*differences: float) -> dict[str, dict[int, float]]:
    """Returns the scores of two points whose mean difference and spread are by hand."""
    return {
        "a": {i: 3.0 + d for i, d in enumerate(differences)},
        "b": dict.fromkeys(range(len(differences)), 3.0),
    }


PAIR = [("a", "b")]


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ((-0.10, -0.11, -0.12), "better"),
        ((0.10, 0.11, 0.12), "worse"),
        ((-0.001, 0.001, 0.0), "no difference"),
        ((-0.03, 0.03, 0.01), "cannot tell"),
        ((-0.001, 0.0), "no difference"),
        ((-0.004, 0.0), "cannot tell"),  # two seeds: 12.7 standard errors of 0.002
        ((0.0, 0.0, 0.0), "no difference"),
        ((0.0,), "cannot tell"),
        ((-1.0,), "cannot tell"),
        ((0.5,) * 5, "cannot tell"),  # the sign test of five seeds: p = 0.0625
        ((0.5,) * 6, "worse"),
    ],
)
def test_words(differences, word):
    (decision,) = decide(scores_of(*differences), PAIR, margin=0.01)
    assert decision.word == word


def test_points_without_common_seed_cannot_be_told_apart():
    for scores in ({"a": {0: 1.0}, "b": {1: 9.0}}, {"a": {0: 1.0}}, {}):
        (decision,) = decide(scores, PAIR, margin=1.0)
        assert (decision.word, decision.difference, decision.bound) == ("cannot tell", None, None)


def test_bound_is_the_far_end_of_the_interval_corrected_for_the_family():
    scores = scores_of(-0.004, 0.001, 0.0, -0.002)
    scores["c"] = {seed: score + 1 for seed, score in scores["b"].items()}
    d = np.array([-0.004, 0.001, 0.0, -0.002])
    for pairs in (PAIR, [*PAIR, ("c", "b"), ("c", "a")]):
        half = stats.t.ppf(1 - 0.025 / len(pairs), 3) * d.std(ddof=1) / 2
        decision = decide(scores, pairs, margin=0.0075)[0]
        assert decision.bound == pytest.approx(abs(d.mean()) + half)
        # 0.0047 for one pair, 0.0067 for three
        assert decision.word == "no difference"
    assert decide(scores, pairs, margin=0.0066)[0].word == "cannot tell"
    assert decide(scores, PAIR, margin=0.0066)[0].word == "no difference"


def test_a_difference_that_is_found_is_named_even_within_the_margin():
    (decision,) = decide(scores_of(-0.004, -0.005, -0.006), PAIR, margin=0.1)
    assert decision.word == "better"
    assert decision.bound < 0.1


def power(effect: float, n: int, level: float) -> float:
    """Returns the power of a two-sided paired t test, from the noncentral t distribution."""
    critical, shift = stats.t.ppf(1 - level / 2, n - 1), effect * math.sqrt(n)
    return stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift)


def observed(mean: float, sd: float = 1.0, n: int = 3) -> PairedDifference:
    return PairedDifference(n, mean, sd, mean - 1, mean + 1, 0.5)


@pytest.mark.parametrize("tests", [1, 6])
@pytest.mark.parametrize("mean", [-0.3, 0.8, 1.5])
def test_seeds_needed_are_the_fewest_with_80_percent_power(mean, tests):
    seeds = seeds_needed(observed(mean), tests, margin=0.0)
    assert power(abs(mean), seeds, 0.05 / tests) >= 0.8
    assert power(abs(mean), seeds - 1, 0.05 / tests) < 0.8


def test_seeds_needed_for_equal_designs_bring_both_ends_within_the_margin():
    seeds, margin = seeds_needed(observed(0.0), 1, margin=0.5), 0.5
    d = np.random.default_rng(0).normal(0, 1, (20_000, seeds))
    half = stats.t.ppf(0.975, seeds - 1) * d.std(axis=1, ddof=1) / math.sqrt(seeds)
    assert np.mean(np.abs(d.mean(axis=1)) + half < margin) == pytest.approx(0.8, abs=0.02)


def test_seeds_needed_are_those_of_the_easier_decision():
    far_from_0, far_from_margin = seeds_needed(observed(0.9), 1, 1.0), seeds_needed(observed(0.1), 1, 1.0)
    assert far_from_0 == seeds_needed(observed(0.9), 1, 0.0)
    assert far_from_margin < seeds_needed(observed(0.1), 1, 0.0)
    assert seeds_needed(observed(0.5), 1, 1.0) > max(far_from_0, far_from_margin)


def test_seeds_needed_in_special_cases():
    assert seeds_needed(PairedDifference(1, 0.3, 0.0, None, None, None), 1, 0.1) is None
    assert seeds_needed(PairedDifference(3, 0.0, 0.0, None, None, None), 1, 0.1) is None
    assert seeds_needed(observed(0.0), 1, 0.0) is None
    assert seeds_needed(PairedDifference(3, 0.5, 0.0, None, None, 0.25), 1, 0.1) == 6  # 2 / 2^6 = 0.03
    assert seeds_needed(PairedDifference(3, 0.5, 0.0, None, None, 0.25), 6, 0.1) == 8  # 2 / 2^8 = 0.0078
    assert seeds_needed(observed(1e5, n=2), 20, 0.0) < 10
    assert seeds_needed(observed(3.0, n=40), 1, 0.0) == 41  # never what was not enough


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (0.0123, "loss", "0.013"),
        (0.02, "loss", "0.02"),
        (0.0200001, "loss", "0.021"),
        (1.23, "loss", "1.3"),
        (0.0, "loss", "0"),
        (0.0123, "error", "1.3 points"),
        (0.000999, "loss", "0.001"),
        (123.0, "loss", "130"),
    ],
)
def test_bound_is_rounded_up(value, metric, text):
    assert format_bound(value, metric) == text


def test_numbers_are_printed_in_the_unit_of_the_metric():
    difference = PairedDifference(3, -0.0123, 0.1, -0.03, 0.0054, 0.2)
    assert format_difference(difference, "loss") == "-0.0123 [-0.0300, +0.0054]"
    assert format_difference(difference, "error") == "-1.23 [-3.00, +0.54]"
    assert format_difference(PairedDifference(1, 0.5, 0.0, None, None, None), "loss") == "+0.5000"
    assert format_estimate(Estimate(3, 0.023, 0.01), "error") == "97.70 ± 1.00"
    assert format_estimate(Estimate(3, 3.5, 0.01), "loss") == "3.5000 ± 0.0100"
    assert format_estimate(Estimate(1, 3.5, None), "loss") == "3.5000"
    assert [format_p(p) for p in (None, 0.0004, 0.0123)] == ["unknown", "< 0.001", "= 0.012"]


@pytest.mark.parametrize(
    ("seeds", "pairs", "margin"), [(5, 1, 0.05), (5, 3, 0.05), (3, 3, 0.08), (16, 1, 0.02)]
)
def test_power_of_equivalence_is_that_of_simulated_pairs(seeds, pairs, margin):
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 0.02, (2, 40_000, seeds))
    spread = np.sqrt((a.var(axis=1, ddof=1) + b.var(axis=1, ddof=1)) / seeds)
    half = stats.t.ppf(1 - 0.05 / pairs / 2, 2 * (seeds - 1)) * spread
    shown = np.mean(np.abs(a.mean(axis=1) - b.mean(axis=1)) + half <= margin)
    assert statistics.power_of_equivalence(0.02, seeds, pairs, margin) == pytest.approx(shown, abs=0.01)


def test_seeds_for_equivalence_is_the_first_number_that_suffices():
    needed = statistics.seeds_for_equivalence(0.02, 3, 0.02)
    power = [statistics.power_of_equivalence(0.02, seeds, 3, 0.02) for seeds in (needed - 1, needed)]
    assert power[0] < statistics.POWER <= power[1]
    assert statistics.power_of_equivalence(0.02, 1, 3, 10.0) == 0
