"""Agreement of two experiments: words counted by hand, p-values against scipy's t-test, refusals."""

import dataclasses

import numpy as np
import pytest
from scipy import stats
from test_results import make_record

from experiments.reporting import replication
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.errors import UserError

PAIRS = [["4 x 128", "2 x 128"], ["8 x 128", "2 x 128"]]
NAMES = ("runs/one", "runs/two")


def study(losses, first_seed=0, **changes):
    """A study of one point for each depth, with these losses, and seeds from `first_seed` on."""
    records = [
        make_record(depth=depth, seed=seed, score=loss, pairs=PAIRS, **changes)
        for depth, of in losses.items()
        for seed, loss in enumerate(of)
    ]
    moved = []
    for record in records:
        seeds = dict.fromkeys(("init_seed", "data_seed"), record.seed + first_seed)
        config = {**record.config, "train": {**record.config["train"], **seeds}}
        moved.append(dataclasses.replace(record, config=config))
    return study_of(moved)


def around(mean, step=0.01):
    """Losses of four seeds; other steps for other means, as an equal difference in all seeds has no error."""
    return [mean - step, mean, mean + step, mean - step * mean / 10]


def test_same_opposite_and_undecided_pairs_are_counted():
    first = study({2: around(3.6), 4: around(3.4), 8: around(3.8)})
    second = study({2: around(3.6), 4: around(3.45), 8: around(3.4)}, first_seed=1000)
    text = replication.page([first], [second], NAMES)
    assert text.splitlines()[-1] == (
        "2 pairs in common: 1 same, 1 opposite, 0 one decides, 0 neither decides."
    )
    undecided = study({2: around(3.6), 4: around(3.6), 8: around(3.8)}, first_seed=1000)
    words = [word for *_, word in replication.pairs(first, undecided)]
    assert words == ["one decides", "same"]


def test_p_value_is_that_of_a_t_test_of_the_two_differences():
    """By simulation: under the null, the p-value is uniform."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(60):
        both = []
        for first_seed in (0, 1000):
            losses = {depth: list(3.6 + 0.01 * rng.standard_normal(4)) for depth in (2, 4, 8)}
            both.append(study(losses, first_seed))
        (_, _, p, _), *_ = replication.pairs(*both)
        found.append(p)
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert min(found) < 0.2
    (_, _, far, _), *_ = replication.pairs(
        study({2: around(3.6), 4: around(3.4), 8: around(3.6)}),
        study({2: around(3.6), 4: around(3.8), 8: around(3.6)}, first_seed=1000),
    )
    assert far < 1e-3


def test_runs_with_the_same_seeds_confirm_nothing():
    once = study({2: around(3.6), 4: around(3.4), 8: around(3.8)})
    with pytest.raises(
        UserError, match=r"runs/one and runs/two have runs with the same seeds \(init and data"
    ):
        replication.page([once], [once], NAMES)


def test_nothing_in_common_is_refused():
    once = study({2: around(3.6), 4: around(3.4), 8: around(3.8)})
    with pytest.raises(UserError, match="have no study in common"):
        replication.page([once], [], NAMES)
