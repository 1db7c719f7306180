"""Simulated studies with known answers: verdicts err as rarely, and are right as often, as they claim.

Most points differ in noise, as in the records: standard deviations of 0.02 to 0.04 nats, no correlation of
the seeds.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest
from scipy import stats

from mobilellm_jax.analysis import simultaneous
from mobilellm_jax.analysis.noise import noise_of
from mobilellm_jax.analysis.statistics import decide, seeds_for_equality
from mobilellm_jax.analysis.tuning import fit_rates

CURVATURE = 0.074  # nats per octave^2, the median over the committed searches
DRAWS = 9  # of the simulated null, which is the same for all studies: exact enough for a share of 5 %
Scores = dict[str, dict[int, float]]


def spreads(rng: np.random.Generator, points: int) -> np.ndarray:
    return rng.uniform(0.02, 0.04, points)


def by_seed(table: np.ndarray) -> Scores:
    return {f"p{i}": dict(enumerate(row)) for i, row in enumerate(table.tolist())}


def all_pairs(count: int) -> list[tuple[str, str]]:
    return [(f"p{i}", f"p{j}") for i in range(count) for j in range(i)]


def protocol(rng: np.random.Generator, points: int, seeds: int) -> tuple[Scores, dict[str, float], Scores]:
    """One study of equal designs whose best rates differ: tuned on a grid of 1 octave, then compared.

    Returns the scores at the fitted rates with the terms of the fit, and those at the best rates of the grid.
    """
    sd, best = spreads(rng, points), rng.uniform(-0.5, 0.5, points)
    octaves = np.arange(-2, 3)
    trials = 3.5 + CURVATURE * (octaves - best[:, np.newaxis]) ** 2
    trials += sd[:, np.newaxis] * rng.normal(size=trials.shape)
    fit = fit_rates(
        {
            f"p{i}": {2.0**x: [loss] for x, loss in zip(octaves, row, strict=True)}
            for i, row in enumerate(trials.tolist())
        }
    )
    fitted = np.array([math.log2(fit.optima[f"p{i}"].rate) for i in range(points)])
    terms = {
        label: fit.curvature * optimum.se**2
        for label, optimum in fit.optima.items()
        if fit.curvature is not None and optimum.se is not None
    }
    noise = 3.5 + sd[:, np.newaxis] * rng.normal(size=(points, seeds))
    picked = octaves[np.argmin(trials, axis=1)]
    scores, before = (
        by_seed(noise + (CURVATURE * (rate - best) ** 2)[:, np.newaxis]) for rate in (fitted, picked)
    )
    return scores, terms, before


def differs(
    scores: Scores, pairs: Sequence[tuple[str, str]], terms: Mapping[str, float] | None = None
) -> bool:
    found = decide(scores, pairs, 0.001, rate_excess=terms, draws=DRAWS)
    return any(decision.word in ("better", "worse") for decision in found)


def holm_differs(scores: Scores, pairs: Sequence[tuple[str, str]]) -> bool:
    """The protocol before: paired t tests at the best rate of the grid, Holm's correction."""
    values = {label: np.array([*of.values()]) for label, of in scores.items()}
    differences = np.array([values[a] - values[b] for a, b in pairs])
    return bool(np.any(paired_t(differences) > stats.t.ppf(1 - 0.025 / len(pairs), differences.shape[1] - 1)))


def paired_t(differences: np.ndarray) -> np.ndarray:
    """|t| of differences [pair, seed]."""
    se = differences.std(axis=1, ddof=1) / math.sqrt(differences.shape[1])
    return np.abs(differences.mean(axis=1)) / se


# Of 1,500 A/A pairs, 5.1 % (3 seeds), 6.2 % (5) and 5.1 % (8) are called different. Picking the best rate of
# the grid and pairing the seeds, as was done before, called 7.4 %, 12.3 % and 18.2 % different; of 500
# families of four, all pairs, 8.8 %, 15.4 % and 25.2 %, where now it is 6.8 %, 5.0 % and 3.6 %.
@pytest.mark.parametrize(("points", "seeds", "count"), [(2, 5, 500), (4, 5, 150)], ids=["pair", "family"])
def test_equal_designs_with_tuned_rates_are_called_different_in_5_percent(points, seeds, count):
    rng, pairs = np.random.default_rng(0), all_pairs(points)
    now, before = [], []
    for _ in range(count):
        scores, terms, picked = protocol(rng, points, seeds)
        now.append(differs(scores, pairs, terms))
        before.append(holm_differs(picked, pairs))
    assert 0.03 < np.mean(now) < 0.07  # standard error 0.01, 0.018
    assert np.mean(before) > 0.09


def studies(rng: np.random.Generator, count: int, means: Sequence[float], seeds: int) -> Iterator[Scores]:
    for _ in range(count):
        sd = spreads(rng, len(means))[:, np.newaxis]
        yield by_seed(np.array(means)[:, np.newaxis] + sd * rng.normal(size=(len(means), seeds)))


FAMILIES = {
    "all pairs of four": (4, all_pairs(4)),
    "five against a baseline": (6, [(f"p{i}", "p0") for i in range(1, 6)]),
    "three apart": (6, [("p1", "p0"), ("p3", "p2"), ("p5", "p4")]),
}


@pytest.mark.parametrize(
    "family",  # one in each run; all take long, and change with the statistics only
    [pytest.param(name, marks=[pytest.mark.slow] if i else []) for i, name in enumerate(FAMILIES)],
)
def test_a_family_of_equal_designs_is_called_different_in_5_percent(family):
    points, pairs = FAMILIES[family]
    found = [differs(scores, pairs) for scores in studies(np.random.default_rng(10), 200, [0] * points, 3)]
    assert 0.02 < np.mean(found) < 0.085  # standard error 0.015; uncorrected: 0.13 to 0.2


def test_all_intervals_of_a_study_hold_together_in_95_percent():
    """Though the pairs with the largest differences are picked by what came out."""
    means, right = [0.0, 0.01, -0.02, 0.03], []
    for scores in studies(np.random.default_rng(17), 200, means, seeds=4):
        found = [d.difference for d in decide(scores, all_pairs(4), 0.05, draws=DRAWS)]
        true = [means[int(a[1])] - means[int(b[1])] for a, b in all_pairs(4)]
        right.append(all(d.low <= t <= d.high for t, d in zip(true, found, strict=True)))
    assert 0.92 < np.mean(right) < 0.99  # standard error 0.015


def test_a_difference_as_large_as_the_margin_is_rarely_called_none():
    said = [
        decide(scores, [("p1", "p0")], 0.05)[0].word
        for scores in studies(np.random.default_rng(15), 400, [0, -0.05], seeds=12)
    ]
    assert said.count("no difference") / len(said) < 0.045  # 0.025, standard error 0.007


def test_equal_designs_are_called_so_with_the_seeds_said_to_be_needed():
    rng, margin, pairs = np.random.default_rng(14), 0.03, all_pairs(3)
    before = [noise_of(scores) for scores in studies(rng, 40, [0] * 3, seeds=8)]
    seeds = int(np.median([seeds_for_equality(noise, len(pairs), margin)[0] for noise in before]))
    said = [
        decide(scores, pairs, margin, draws=DRAWS)[0].word for scores in studies(rng, 200, [0] * 3, seeds)
    ]
    assert 0.7 < said.count("no difference") / len(said) < 0.9  # 80 % planned, standard error 0.03


def test_true_differences_are_found_by_moderation_where_pairs_are_not():
    """At 3 seeds and 14 pairs: what 2 degrees of freedom cannot show."""
    rng, pairs = np.random.default_rng(18), [(f"p{i}", "p0") for i in range(1, 8)]
    now, before = [], []
    for scores in studies(rng, 60, [0.0, *[0.12] * 7], seeds=3):
        now.append(np.mean([d.word == "worse" for d in decide(scores, pairs, 0.01, draws=DRAWS)]))
        values = np.array([[*of.values()] for of in scores.values()])
        before.append(np.mean(paired_t(values[1:] - values[0]) > stats.t.ppf(1 - 0.025 / len(pairs), 2)))
    assert np.mean(now) > 0.5
    assert np.mean(before) < 0.25


# --- looking after every seed ---------------------------------------------------------------------------


def test_looking_after_every_seed_errs_in_5_percent_by_the_confidence_sequence_only():
    plan, last, count = 5, 15, 4000
    rng = np.random.default_rng(19)
    runs = rng.uniform(0.02, 0.04, (count, 2, 1)) * rng.normal(size=(count, 2, last))
    weight = simultaneous.mixture_weight(0.05, 2.0 * plan - 2, plan / 2)
    sequence, fixed = np.zeros(count, bool), np.zeros(count, bool)
    for n in range(plan, last + 1):
        seen = runs[:, :, :n]
        t = np.abs(np.diff(seen.mean(axis=2))[:, 0]) / np.sqrt(seen.var(axis=2, ddof=1).sum(axis=1) / n)
        sequence |= t > simultaneous.mixture_t(0.05, 2.0 * n - 2, n / 2, weight)
        fixed |= t > stats.t.ppf(0.975, 2 * n - 2)
    assert fixed.mean() > 0.08  # 0.165
    assert 0.005 < sequence.mean() < 0.05  # standard error 0.003


def test_more_seeds_than_planned_widen_every_interval():
    scores = next(studies(np.random.default_rng(21), 1, [0, 0, 0], seeds=8))
    pairs = all_pairs(3)
    for fixed, sequence in zip(
        decide(scores, pairs, 0.05), decide(scores, pairs, 0.05, planned=5), strict=True
    ):
        assert sequence.difference.low < fixed.difference.low
        assert sequence.difference.high > fixed.difference.high
        assert sequence.difference.p_value > fixed.difference.p_value
