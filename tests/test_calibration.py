"""Verdicts on simulated studies are wrong as rarely, and right as often, as they claim."""

import gc
import math

import numpy as np
import pytest

from mobilellm_jax.analysis.statistics import PairedDifference, decide, seeds_needed

SPREAD = 0.02  # of one run; of a paired difference, times the square root of 2


@pytest.fixture(autouse=True)
def _no_garbage_collection(monkeypatch):
    """multipletests calls gc.collect each time: 0.3 s under pytest, 500 times what the statistics take."""
    monkeypatch.setattr(gc, "collect", lambda *args: 0)


def studies(rng: np.random.Generator, count: int, means: list[float], seeds: int):
    """Yields the scores of `count` studies: points with these means, a common effect of the seed, noise."""
    noise = rng.normal(0, SPREAD, (count, len(means), seeds))
    seed_effect = rng.normal(3.5, 0.1, (count, 1, seeds))
    for study in (noise + seed_effect + np.array(means)[:, np.newaxis]).tolist():
        yield {f"p{i}": dict(enumerate(scores)) for i, scores in enumerate(study)}


def words(rng, count, means, seeds, margin, pairs=(("p1", "p0"),)):
    """Returns the words said about each pair in each study, [study, pair]."""
    found = [decide(scores, pairs, margin) for scores in studies(rng, count, means, seeds)]
    return np.array([[decision.word for decision in decisions] for decisions in found])


def share(said, *wanted: str) -> float:
    """Returns the share of studies in which any pair is called one of `wanted`."""
    return float(np.mean(np.any(np.isin(said, wanted), axis=1)))


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_same_design_twice_is_called_different_in_5_percent(seeds):
    said = words(np.random.default_rng(seeds), 1200, [0, 0], seeds, margin=0.01)
    assert 0.03 < share(said, "better", "worse") < 0.07  # standard error 0.006
    assert share(said, "better") > 0.01
    assert share(said, "worse") > 0.01


ALL_PAIRS = [(f"p{i}", f"p{j}") for i in range(4) for j in range(i)]
FAMILIES = {
    "all pairs of four": (4, ALL_PAIRS),
    "five against a baseline": (6, [(f"p{i}", "p0") for i in range(1, 6)]),
    "three apart": (6, [("p1", "p0"), ("p3", "p2"), ("p5", "p4")]),
}


@pytest.mark.parametrize(
    "family",  # one in each run; all take 6 s, and change with the statistics only
    [pytest.param(name, marks=[pytest.mark.slow] if i else []) for i, name in enumerate(FAMILIES)],
)
def test_a_family_of_equal_designs_is_called_different_in_at_most_5_percent(family):
    points, pairs = FAMILIES[family]
    said = words(np.random.default_rng(10), 500, [0] * points, seeds=5, margin=0.001, pairs=pairs)
    assert 0.015 < share(said, "better", "worse") < 0.07  # standard error 0.01; uncorrected: 0.13 to 0.2


def test_a_family_with_true_differences_is_called_wrongly_in_5_percent():
    """Holm's method, unlike Bonferroni's, spends all 5 % on the pair that is left: p1 and p2 are equal."""
    pairs = [("p1", "p0"), ("p2", "p0"), ("p2", "p1")]
    said = words(np.random.default_rng(11), 1000, [0.2, 0, 0], seeds=6, margin=0.001, pairs=pairs)
    assert share(said[:, :2], "worse", "no difference", "cannot tell") < 0.005
    assert 0.03 < share(said[:, 2:], "better", "worse") < 0.07  # standard error 0.007


@pytest.mark.parametrize(("effect", "tests"), [(0.02, 1), (0.04, 1), (0.03, 3)])
def test_a_true_difference_is_found_with_the_seeds_said_to_be_needed(effect, tests):
    sd = SPREAD * math.sqrt(2)
    seeds = seeds_needed(PairedDifference(2, effect, sd, -1.0, 1.0, 0.5), tests, margin=0.0)
    assert seeds is not None
    # The other pairs of the family have no difference, and so leave the level of this one at 5 % / tests.
    means = [0, effect, *[0] * (2 * tests - 2)]
    pairs = [(f"p{2 * i + 1}", f"p{2 * i}") for i in range(tests)]
    said = words(np.random.default_rng(12), 600, means, seeds, margin=0.0, pairs=pairs)
    assert 0.76 < share(said[:, :1], "worse") < 0.88  # standard error 0.016; whole seeds give a little more
    assert share(said[:, :1], "better") == 0
    fewer = words(np.random.default_rng(13), 200, means, max(2, seeds // 2), margin=0.0, pairs=pairs)
    assert share(fewer[:, :1], "worse") < 0.6


@pytest.mark.parametrize("tests", [1, 3])
def test_equal_designs_are_called_so_with_the_seeds_said_to_be_needed(tests):
    margin, sd = 0.03, SPREAD * math.sqrt(2)
    seeds = seeds_needed(PairedDifference(2, 0.0, sd, -1.0, 1.0, 0.5), tests, margin)
    assert seeds is not None
    pairs = [(f"p{2 * i + 1}", f"p{2 * i}") for i in range(tests)]
    said = words(np.random.default_rng(14), 600, [0] * 2 * tests, seeds, margin, pairs)
    decided = share(said[:, :1], "no difference")
    assert 0.76 < decided + share(said[:, :1], "better", "worse") < 0.9
    assert decided > 0.74


@pytest.mark.parametrize(("seeds", "sign"), [(3, -1), (12, 1)])
def test_a_difference_as_large_as_the_margin_is_rarely_called_none(seeds, sign):
    margin = 0.05
    said = words(np.random.default_rng(15), 1200, [0, sign * margin], seeds, margin)
    wrong = share(said, "no difference")
    assert wrong < 0.07
    # By the interval shown (95 %), it is half of what the usual 90 % interval of equivalence tests allows;
    # some of it is found to be a difference first.
    assert wrong < 0.035


def test_a_family_of_differences_as_large_as_the_margin_is_rarely_called_none():
    margin, seeds = 0.05, 12
    said = words(
        np.random.default_rng(16), 600, [0, margin, -margin], seeds, margin, [("p1", "p0"), ("p2", "p0")]
    )
    assert share(said, "no difference") < 0.07


def test_all_bounds_of_a_study_hold_together_in_95_percent():
    """Though the pairs with the smallest bounds are picked by what came out."""
    rng, means = np.random.default_rng(17), [0.0, 0.01, -0.02, 0.03]
    right = []
    for scores in studies(rng, 500, means, seeds=4):
        bounds = [decision.bound for decision in decide(scores, ALL_PAIRS, margin=0.05)]
        true = [abs(means[int(a[1])] - means[int(b[1])]) for a, b in ALL_PAIRS]
        right.append(all(b is not None and t <= b for t, b in zip(true, bounds, strict=True)))
    assert np.mean(right) > 0.93  # standard error 0.01
