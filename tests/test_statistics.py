"""Statistics against published numbers, other formulas and calculation by hand. See test_calibration."""

import math
import time

import numpy as np
import pytest
from scipy import special, stats

from mobilellm_jax.analysis import simultaneous, statistics
from mobilellm_jax.analysis.noise import correlation_of, noise_of, variance_prior
from mobilellm_jax.analysis.statistics import (
    Difference,
    Estimate,
    decide,
    interval_of_sd,
    interval_of_share,
    mean_and_interval,
    not_worse,
    seeds_for_equality,
    standard_deviation,
)
from mobilellm_jax.analysis.wording import format_bound, format_difference, format_estimate, format_p

# Student (1908), table 1: additional hours of sleep under drugs 1 and 2, of ten patients.
DRUG_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
DRUG_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
PAIR = [("a", "b")]


def by_seed(**values) -> dict[str, dict[int, float]]:
    return {label: dict(enumerate(of)) for label, of in values.items()}


def noisy(seed: int, *sds: float, seeds: int = 5) -> dict[str, dict[int, float]]:
    """Scores of points p0, p1 and so on, with these standard deviations."""
    rng = np.random.default_rng(seed)
    return {f"p{i}": dict(enumerate(rng.normal(3.5, sd, seeds).tolist())) for i, sd in enumerate(sds)}


def all_pairs(count: int) -> list[tuple[str, str]]:
    return [(f"p{i}", f"p{j}") for i in range(count) for j in range(i)]


def lists(scores) -> list[list[float]]:
    return [[*of.values()] for of in scores.values()]


# --- one mean, one pair ---------------------------------------------------------------------------------


def test_interval_of_published_data():
    estimate = mean_and_interval([a - b for a, b in zip(DRUG_1, DRUG_2, strict=True)])
    # As printed by R's t.test(..., paired = TRUE).
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


def test_two_points_without_prior_are_compared_by_welch():
    scores = by_seed(a=DRUG_1, b=DRUG_2[:7])
    noise = noise_of(scores, may_pair=False, prior_df=0.0)
    (decision,) = decide(scores, PAIR, 1.0, noise=noise)
    other = stats.ttest_ind(DRUG_1, DRUG_2[:7], equal_var=False)
    low, high = other.confidence_interval()
    found = decision.difference
    assert (found.seeds, found.n) == ((10, 7), 7)
    assert (found.p_value, found.df) == pytest.approx((other.pvalue, other.df))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_two_points_with_correlated_seeds_are_compared_as_pairs():
    scores = by_seed(a=DRUG_1, b=DRUG_2)  # correlation 0.8
    noise = noise_of(scores)
    assert noise.paired
    (decision,) = decide(scores, PAIR, 1.0, noise=noise)
    # As printed by R's t.test(..., paired = TRUE).
    assert (decision.difference.low, decision.difference.high) == pytest.approx((-2.4598858, -0.7001142))
    assert decision.difference.p_value == pytest.approx(0.002833, abs=1e-6)


def test_seeds_are_blocks_only_if_their_correlation_is_large_and_sure():
    assert not noise_of(by_seed(a=DRUG_1, b=DRUG_2), may_pair=False).paired
    assert not noise_of(by_seed(a=DRUG_1[:3], b=DRUG_2[:3])).paired  # correlation 0.9, but three seeds
    assert not noise_of(noisy(0, 1, 1, 1, 1)).paired
    shift = np.random.default_rng(1).normal(0, 2, 5)
    shifted = {p: {s: v + shift[s] for s, v in of.items()} for p, of in noisy(0, 1, 1, 1, 1).items()}
    noise = noise_of(shifted)
    assert noise.paired
    # Randomised complete blocks: the residuals of an additive model, with (points - 1)(seeds - 1) df.
    table = np.array(lists(shifted))
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    assert (noise.df, noise.sd) == pytest.approx((12, math.sqrt(np.sum(rest**2) / 12)))
    (one, *_) = decide(shifted, all_pairs(4), 0.1, noise=noise_of(shifted, prior_df=math.inf))
    assert one.difference.se == pytest.approx(noise.sd * math.sqrt(2 / 5))


def test_blocks_are_the_seeds_that_all_points_have():
    scores = by_seed(a=DRUG_1, b=DRUG_2)
    scores["a"][10], scores["b"][11], scores["c"] = 50.0, -50.0, {0: 1.0}
    noise = noise_of(scores)
    assert noise.paired
    assert {label: spread.n for label, spread in noise.points.items()} == {"a": 10, "b": 10, "c": 1}
    (decision,) = decide(scores, PAIR, 1.0, noise=noise)
    assert decision.difference.mean == pytest.approx(-1.58)


def test_correlation_is_the_intraclass_correlation_of_the_two_way_layout():
    # Shrout and Fleiss (1979), table 2: six targets, four judges; ICC(3,1) is 0.71 and F = 11.24 / 1.02.
    table = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
    correlation, p = correlation_of(np.array(table, dtype=float).T)
    assert correlation == pytest.approx(0.715, abs=1e-3)
    assert p == pytest.approx(stats.f.sf(11.24 / 1.02, 5, 15), rel=0.02)
    assert correlation_of(np.ones((3, 4))) is None
    assert correlation_of(np.ones((1, 4))) is None


# --- moderated variances --------------------------------------------------------------------------------


def test_prior_fits_the_moments_of_the_log_variances():
    rng = np.random.default_rng(0)
    true = 6.0 * 0.04 / rng.chisquare(6.0, 4000)  # s0^2 = 0.04, d0 = 6
    s0, d0 = variance_prior((true * rng.chisquare(4, 4000) / 4).tolist(), [4.0] * 4000)
    assert d0 == pytest.approx(6.0, rel=0.15)
    assert s0 == pytest.approx(0.04 * 6 / 4, rel=0.1)  # the mean of this inverse chi-squared
    few = true[:6] * rng.chisquare(4, 6) / 4
    log = np.log(few) - special.digamma(2) + math.log(2)
    chance, error = special.polygamma(1, 2), special.polygamma(3, 2)
    excess = max(log.var(ddof=1) - chance, 0) + math.sqrt(2 * chance**2 / 5 + error / 6)
    _, d0 = variance_prior(few.tolist(), [4.0] * 6)
    assert special.polygamma(1, d0 / 2) == pytest.approx(excess)


def test_prior_needs_two_spreads():
    assert variance_prior([], []) == (0.0, 0.0)
    assert variance_prior([0.1, 0.0], [4.0, 4.0]) == (0.0, 0.0)


def test_variances_are_drawn_to_the_pooled_one():
    scores = noisy(2, 0.1, 0.1, 0.1, 1.0)
    noise = noise_of(scores)
    own = [np.var(values, ddof=1) for values in lists(scores)]
    assert noise.sd == pytest.approx(math.sqrt(np.mean(own)))
    assert noise.df == 16
    for spread, variance in zip(noise.points.values(), own, strict=True):
        share = noise.prior_df / (noise.prior_df + 4)
        assert spread.variance == pytest.approx(share * np.mean(own) + (1 - share) * variance)
        assert spread.df == pytest.approx(4 + noise.prior_df)
    alike = noise_of(scores, prior_df=math.inf)
    assert {spread.df for spread in alike.points.values()} == {16}


def test_a_point_without_spread_borrows_it():
    scores = by_seed(a=[0.0, 0.0, 0.0], b=[0.1, 0.2, 0.6], c=[0.2, 0.3, 0.5])
    for pair in (("a", "b"), ("b", "a"), ("b", "c")):
        (decision,) = decide(scores, [pair], 0.01)
        assert decision.difference.low < decision.difference.mean < decision.difference.high


# --- families -------------------------------------------------------------------------------------------


def test_family_with_one_variance_is_dunnett():
    scores = noisy(3, 1, 1, 1, 1, 1)
    scores["p2"] = {seed: score + 1.6 for seed, score in scores["p2"].items()}
    values = lists(scores)
    pairs = [(f"p{i}", "p0") for i in range(1, 5)]
    noise = noise_of(scores, may_pair=False, prior_df=math.inf)
    found = [decision.difference for decision in decide(scores, pairs, 0.1, noise=noise)]
    other = stats.dunnett(*values[1:], control=values[0], random_state=0)
    interval = other.confidence_interval()
    assert [d.p_value for d in found] == pytest.approx(other.pvalue.tolist(), abs=0.002)
    assert [d.low for d in found] == pytest.approx(interval.low.tolist(), abs=0.01)
    assert [d.high for d in found] == pytest.approx(interval.high.tolist(), abs=0.01)


def test_family_of_all_pairs_with_one_variance_is_tukey():
    scores = noisy(4, 1, 1, 1, 1)
    noise = noise_of(scores, may_pair=False, prior_df=math.inf)
    other = stats.tukey_hsd(*lists(scores))
    interval = other.confidence_interval()
    for (a, b), decision in zip(all_pairs(4), decide(scores, all_pairs(4), 0.1, noise=noise), strict=True):
        i, j = int(a[1]), int(b[1])
        assert decision.difference.p_value == pytest.approx(other.pvalue[i, j], abs=0.003)
        assert decision.difference.low == pytest.approx(interval.low[i, j], abs=0.02)


def test_smallest_p_of_pairs_far_apart_is_that_of_independent_tests():
    contrasts = [
        simultaneous.Contrast((2 * i, 2 * i + 1), (1.0, 1.0), 0.0, 8.0, (4.0, 4.0), 0.0) for i in range(6)
    ]
    lowest = simultaneous.smallest_p(contrasts)
    for p in (0.001, 0.0085, 0.05):
        assert np.mean(lowest <= p) == pytest.approx(1 - (1 - p) ** 6, abs=0.002)


def test_28_pairs_take_a_moment():
    scores, pairs = noisy(5, *range(1, 9)), all_pairs(8)
    times = []
    for _ in range(3):
        start = time.process_time()
        decide(scores, pairs, 0.1)
        times.append(time.process_time() - start)
    assert min(times) < 0.3


def test_p_is_below_5_percent_where_the_interval_excludes_0():
    for seed in range(20):
        scores = noisy(seed, 0.5, 1, 2, 0.1)
        scores["p1"] = {s: v + 1.5 for s, v in scores["p1"].items()}
        for planned in (None, 4):
            for decision in decide(scores, all_pairs(4), 0.1, planned=planned, draws=10):
                d = decision.difference
                assert (
                    (d.p_value < 0.05) == (d.low > 0 or d.high < 0) == (decision.word in ("better", "worse"))
                )


def test_interval_ends_where_p_crosses_5_percent():
    scores = noisy(6, 1, 1, 1)
    (decision, *_) = decide(scores, all_pairs(3), 0.1)
    end = decision.difference.low
    for step, found in ((1e-3, True), (-1e-3, False)):
        moved = {**scores, "p0": {s: v + end - step for s, v in scores["p0"].items()}}
        assert (decide(moved, all_pairs(3), 0.1)[0].difference.p_value < 0.05) == found


def test_a_pair_that_cannot_be_tested_counts():
    scores = noisy(7, 1, 1)
    alone = decide(scores, [("p1", "p0")], 0.1)[0].difference
    beside = decide(scores, [("p1", "p0"), ("p1", "gone")], 0.1)
    assert beside[1].difference is None
    assert beside[0].difference.p_value == pytest.approx(min(1, 2 * alone.p_value))
    ratio = stats.t.ppf(1 - 0.025 / 2, alone.df) / stats.t.ppf(1 - 0.025, alone.df)
    assert beside[0].difference.high - alone.mean == pytest.approx(ratio * (alone.high - alone.mean))


def test_error_of_the_rate_is_in_the_interval():
    scores = noisy(8, 0.02, 0.02)
    plain = decide(scores, [("p1", "p0")], 0.1)[0].difference
    excess = {"p1": 0.074 * 0.5**2, "p0": 0.074 * 0.3**2}
    wide = decide(scores, [("p1", "p0")], 0.1, rate_excess=excess)[0].difference
    # By simulation: the rate misses by a normal error, which costs curvature x error^2.
    rng = np.random.default_rng(0)
    cost = 0.074 * (rng.normal(0, 0.5, 1_000_000) ** 2 - rng.normal(0, 0.3, 1_000_000) ** 2)
    assert wide.se == pytest.approx(math.sqrt(plain.se**2 + np.mean(cost**2)), rel=0.005)
    assert (wide.mean, wide.df) == (plain.mean, plain.df)
    assert wide.high - wide.low > plain.high - plain.low


# --- more seeds than planned ----------------------------------------------------------------------------


def test_mixture_is_the_average_likelihood_ratio():
    """Of t, noncentral with effects from a normal distribution, by numerical integration."""
    t, df, size, weight = 2.7, 8.0, 2.5, 0.4
    effects = np.linspace(-12, 12, 4001)
    density = stats.norm.pdf(effects, 0, 1 / math.sqrt(weight))
    of_t = stats.nct.pdf(t, df, effects * math.sqrt(size))
    ratio = np.trapezoid(density * of_t, effects) / stats.t.pdf(t, df)
    assert simultaneous.mixture_p(t, df, size, weight) == pytest.approx(1 / ratio, rel=1e-4)


@pytest.mark.parametrize(("df", "size"), [(8.0, 2.5), (30.0, 8.0)])
def test_mixture_interval_agrees_with_its_p(df, size):
    weight = simultaneous.mixture_weight(0.01, 8.0, 2.5)
    t = simultaneous.mixture_t(0.01, df, size, weight)
    assert simultaneous.mixture_p(t, df, size, weight) == pytest.approx(0.01)
    assert t > stats.t.ppf(0.995, df)
    assert simultaneous.mixture_t(1e-4, 1.0, 1.0, 1.0) == math.inf


def test_weight_is_best_at_the_plan():
    weight = simultaneous.mixture_weight(0.05, 8.0, 2.5)
    at_plan = [simultaneous.mixture_t(0.05, 8.0, 2.5, w) for w in (weight / 2, weight, 2 * weight)]
    assert min(at_plan) == at_plan[1]


def test_no_interval_yet_is_no_decision():
    (decision,) = decide(noisy(9, 1, 1, seeds=2), [("p1", "p0")], 1e6, planned=20)
    assert (decision.difference.low, decision.word, decision.bound) == (None, "cannot tell", None)
    assert decision.difference.se > 0
    assert 0.05 < decision.difference.p_value <= 1


# --- words ----------------------------------------------------------------------------------------------


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
    scores = by_seed(a=[3.0 + d for d in differences], b=[3.0] * len(differences))
    (decision,) = decide(scores, PAIR, margin=0.01, noise=noise_of(scores, prior_df=0.0))
    assert decision.word == word


def test_equal_differences_have_no_interval_and_the_p_of_the_sign_test():
    a = [3.1, 3.2, 3.7]
    for scores, mean, p in (
        (by_seed(a=a, b=a), 0.0, None),
        (by_seed(a=a, b=[loss - 0.1 for loss in a]), 0.1, 2 / 2**3),
    ):
        found = decide(scores, PAIR, 0.2)[0].difference
        assert found.mean == pytest.approx(mean)
        assert (found.seeds, found.se, found.low, found.high, found.p_value) == ((3, 3), 0.0, None, None, p)
        assert decide(scores, [*PAIR, ("a", "c")], 0.2)[0].difference.p_value == (p and 2 * p)


def test_points_without_runs_or_with_one_seed_cannot_be_told_apart():
    for scores in ({"a": {0: 1.0}}, {}):
        (decision,) = decide(scores, PAIR, margin=1.0)
        assert (decision.word, decision.difference, decision.bound) == ("cannot tell", None, None)
    scores = {"a": {0: 1.0}, "b": {0: 2.0, 1: 2.1, 2: 2.2}, "c": {0: 5.1, 1: 5.0}}
    (decision,) = decide(scores, PAIR, margin=1.0)
    assert (decision.word, decision.difference.seeds) == ("cannot tell", (1, 3))
    assert (decision.difference.low, decision.difference.p_value) == (None, None)


def test_seeds_need_not_be_the_same():
    a, b = {0: 1.0, 1: 1.2, 2: 0.8}, {5: 2.0, 6: 2.1, 7: 2.2}
    assert decide({"a": a, "b": b}, PAIR, margin=0.1)[0].word == "better"


def test_a_difference_that_is_found_is_named_even_within_the_margin():
    scores = by_seed(a=[3 - 0.004, 3 - 0.005, 3 - 0.006], b=[3.0005, 3.0, 2.9995])
    (decision,) = decide(scores, PAIR, margin=0.1)
    assert decision.word == "better"
    assert decision.bound == -decision.difference.low < 0.1


def test_bound_is_the_far_end_of_the_interval():
    scores = noisy(11, 0.01, 0.01)
    (decision,) = decide(scores, [("p1", "p0")], margin=0.05)
    d = decision.difference
    assert decision.bound == max(-d.low, d.high)
    assert decision.word == "no difference"
    assert decide(scores, [("p1", "p0")], margin=0.99 * decision.bound)[0].word == "cannot tell"


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [(-0.2, 0.04, True), (0.01, 0.04, True), (0.06, 0.2, False), (0.01, 0.06, None), (-0.2, 0.06, None)],
)
def test_not_worse_is_judged_by_the_margin(low, high, found):
    assert not_worse(Difference((3, 3), (low + high) / 2, 0.1, 4.0, low, high, 0.5), 0.05) is found


def test_not_worse_without_an_interval():
    assert not_worse(None, 0.05) is None
    assert not_worse(Difference((1, 1), -1.0, 0.0, None, None, None, None), 0.05) is None
    assert not_worse(Difference((3, 3), 0.0, 0.0, None, None, None, None), 0.05) is True


# --- seeds for equality ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("tests", "margin"), [(1, 2.0), (1, 1.0), (6, 1.5)])
def test_seeds_for_equality_bring_both_ends_within_the_margin(tests, margin):
    noise = noise_of(noisy(12, 1, 1, seeds=5), prior_df=0.0)
    seeds, fewest, most = seeds_for_equality(noise, tests, margin)
    assert fewest < seeds < most

    def power(n):
        rng = np.random.default_rng(0)
        x = rng.normal(0, noise.sd, (20_000, 2, n))
        se = np.sqrt(x.var(axis=2, ddof=1).sum(axis=1) / n)
        half = stats.t.ppf(1 - 0.025 / tests, 2 * n - 2) * se
        return np.mean(np.abs(x[:, 0].mean(1) - x[:, 1].mean(1)) + half < margin)

    assert power(seeds) > 0.75
    assert power(seeds - 1) < 0.82


def test_seeds_for_equality_need_noise_and_a_margin():
    noise = noise_of(noisy(13, 1, 1))
    assert seeds_for_equality(noise, 1, 0.0) is None
    assert seeds_for_equality(noise_of({}), 1, 1.0) is None
    assert max(seeds_for_equality(noise, 10, 1e-3)) > 1_000_000


def test_interval_of_a_standard_deviation_and_of_a_share():
    # NIST/SEMATECH e-handbook, section 1.3.5.8: gear diameters, 100 values.
    assert interval_of_sd(0.00628, 99.0) == pytest.approx((0.00551, 0.00729), abs=1e-5)
    # Clopper and Pearson by the beta distribution.
    assert interval_of_share(2, 5) == pytest.approx(
        (stats.beta.ppf(0.025, 2, 4), stats.beta.ppf(0.975, 3, 3))
    )


# --- numbers as text ------------------------------------------------------------------------------------


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
    difference = Difference((3, 3), -0.0123, 0.1, 4.0, -0.03, 0.0054, 0.2)
    assert format_difference(difference, "loss") == "-0.0123 [-0.0300, +0.0054]"
    assert format_difference(difference, "error") == "-1.23 [-3.00, +0.54]"
    assert format_difference(Difference((1, 1), 0.5, 0.0, None, None, None, None), "loss") == "+0.5000"
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
