"""The two-way bootstrap over seeds and documents: against scipy, and by simulation with known components."""

import math

import numpy as np
import pytest
from scipy import stats
from test_results import make_record

from mobilellm_jax.analysis.documents import two_way
from mobilellm_jax.analysis.study import study_of


def world(rng, seeds, documents, *, seed_sd, document_sd, residual_sd=0.0, difference=0.0, size_sd=0.7):
    """Nats [seeds, documents] of two designs, and targets [documents]; the sds are those per token."""
    targets = np.round(400 * np.exp(rng.normal(0, size_sd, documents)))
    common = 3.5 + rng.normal(0, 0.3, documents)  # how hard a document is: the same for both
    sides = []
    for shift in (difference, 0.0):
        loss = common + shift + rng.normal(0, seed_sd, (seeds, 1))
        loss = loss + rng.normal(0, document_sd / math.sqrt(2), documents)
        sides.append((loss + rng.normal(0, residual_sd, (seeds, documents))) * targets)
    return sides[0], sides[1], targets


def test_mean_is_the_ratio_of_sums():
    a, b, targets = world(np.random.default_rng(0), 3, 20, seed_sd=0.02, document_sd=0.1)
    found = two_way(a, b, targets)
    assert found.documents == 20
    losses = [np.mean([sum(nats) / sum(targets) for nats in side]) for side in (a, b)]
    assert found.mean == pytest.approx(losses[0] - losses[1])
    assert found.low < found.mean < found.high
    swapped = two_way(b, a, targets)
    assert swapped.mean == pytest.approx(-found.mean)
    assert two_way(a, b, targets) == found  # a fixed seed


def test_one_factor_alone_is_scipy_s_bootstrap():
    documents, seeds = 40, 6
    a, b, targets = world(np.random.default_rng(1), seeds, documents, seed_sd=0.03, document_sd=0.1)
    found = two_way(a, b, targets, 20_000)
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)

    def ratio(index, axis):
        return np.sum((mean_a - mean_b)[index], axis=axis) / np.sum(targets[index], axis=axis)

    indices = (np.arange(documents),)
    scipy = stats.bootstrap(indices, ratio, n_resamples=20_000, method="percentile", rng=2)
    grown = math.sqrt(documents / (documents - 1))  # one draw fewer
    assert found.documents_error == pytest.approx(scipy.standard_error * grown, rel=0.03)

    losses = [side.sum(axis=1) / targets.sum() for side in (a, b)]
    scipy = stats.bootstrap(
        losses,
        lambda x, y, axis: np.mean(x, axis=axis) - np.mean(y, axis=axis),
        n_resamples=20_000,
        method="percentile",
        rng=2,
    )
    assert found.seeds_error == pytest.approx(scipy.standard_error * math.sqrt(seeds / (seeds - 1)), rel=0.03)
    # over equal seeds, what is left is Welch's interval of the seeds, and over equal documents a t interval
    still = (
        np.broadcast_to(a.mean(axis=1, keepdims=True), a.shape),
        np.broadcast_to(b.mean(axis=1, keepdims=True), b.shape),
    )
    even = two_way(*still, np.full(documents, 400.0), 20_000)
    welch = stats.ttest_ind(*(side[:, 0] / 400 for side in still), equal_var=False).confidence_interval(0.95)
    assert (even.low, even.high) == pytest.approx(tuple(welch), abs=0.03 * (welch.high - welch.low))


@pytest.mark.parametrize(
    ("seeds", "documents", "seed_sd", "document_sd"),
    [(5, 40, 0.03, 0.0), (5, 40, 0.002, 0.1), (4, 30, 0.03, 0.1), (3, 120, 0.02, 0.2)],
)
def test_intervals_hold_the_true_difference(seeds, documents, seed_sd, document_sd, record_property):
    rng, worlds, held = np.random.default_rng(7), 200, 0
    for _ in range(worlds):
        sides = world(
            rng, seeds, documents, seed_sd=seed_sd, document_sd=document_sd, residual_sd=0.02, difference=0.05
        )
        found = two_way(*sides, 150)
        held += found.low <= 0.05 <= found.high
    record_property("figures", {f"share missed, seeds {seed_sd} documents {document_sd}": 1 - held / worlds})
    assert 0.91 <= held / worlds <= 0.99  # 95 %; simulated 200 times, its standard error is 1.5 %


@pytest.mark.parametrize("shape", [(1, 5), (3, 1)])
def test_one_seed_or_one_document_has_no_interval(shape):
    a, b, targets = world(np.random.default_rng(0), *shape, seed_sd=0.02, document_sd=0.1)
    found = two_way(a, b, targets)
    assert (found.low, found.high) == (None, None)


def records(gaps, targets, **changes):
    """Two points of 4 seeds, which differ by `gaps` in the nats per token of each document."""
    made = []
    for depth, differences in ((2, np.zeros(len(gaps))), (4, np.array(gaps))):
        for seed in range(4):
            per_token = 3.5 + 0.002 * seed * (depth - 3) + differences
            sums = {"nats": (per_token * targets).tolist(), "targets": list(targets)}
            score = sum(sums["nats"]) / sum(targets)
            made.append(make_record(depth=depth, seed=seed, score=score, **{"documents": sums, **changes}))
    return made


def test_a_pair_that_rests_on_few_documents_is_warned_of():
    targets = [400] * 12
    one = study_of(records([-2.0] + [0.02] * 11, targets)).verdict
    assert one.comparisons[0].word == "better"
    (over,) = one.over_documents
    assert over is not None
    assert over.low < 0 < over.high
    (said,) = [w for w in one.warnings if "other text" in w]
    assert said.startswith("The difference between '4 x 128' and '2 x 128' (-0.1423 [")
    assert said.endswith(" holds for these 12 held-out documents; other text may decide otherwise.")
    every = study_of(records([-0.15] * 12, targets)).verdict
    assert every.over_documents[0].high < 0
    assert not [w for w in every.warnings if "other text" in w]


def test_without_documents_nothing_is_said():
    targets = [400] * 12
    assert study_of(records([-0.15] * 12, targets, documents=None)).verdict.over_documents == [None]
    other = records([-0.15] * 12, targets)[:4] + records([-0.15] * 12, [500] * 12)[4:]
    assert study_of(other).verdict.over_documents == [None]
