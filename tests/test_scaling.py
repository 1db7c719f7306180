"""Power laws and their crossing, on losses made from known ones."""

import numpy as np
import pytest

from mobilellm_jax import scaling
from mobilellm_jax.errors import UserError

SIZES = (1e4, 1e5, 1e6)


def family(scale, exponent, spread, seeds=6, seed=0):
    generator = np.random.default_rng(seed)
    noise = {size: np.exp(spread * generator.normal(size=seeds)) for size in SIZES}
    return {size: list(scale * size**-exponent * noise[size]) for size in SIZES}


def test_exact_power_law_is_found():
    found = scaling.fit(family(12.0, 0.11, 0.0))
    assert (found.scale, found.exponent) == pytest.approx((12.0, 0.11))
    assert (found.low, found.high) == pytest.approx((0.11, 0.11))
    assert found(1e5) == pytest.approx(12.0 * 1e5**-0.11)


def test_interval_of_the_exponent_covers_the_truth():
    """A percentile bootstrap of 6 seeds covers somewhat less than 95 %."""
    laws = [scaling.fit(family(12.0, 0.11, 0.02, seed=seed)) for seed in range(40)]
    covered = np.mean([law.low <= 0.11 <= law.high for law in laws])
    assert 0.75 <= covered < 1


def test_crossing_of_known_laws():
    """10 n^-0.1 and 20 n^-0.16 are equal at n = 2^(1 / 0.06)."""
    found = scaling.crossing(family(10, 0.1, 0.003), family(20, 0.16, 0.003, seed=1))
    assert found.size == pytest.approx(2 ** (1 / 0.06), rel=0.3)
    assert found.low < 2 ** (1 / 0.06) < found.high
    assert found.share > 0.99


@pytest.mark.parametrize(
    ("second", "spread"),
    [((10, 0.1), 0.02), ((20, 0.16), 0.5), ((5, 0.04), 0.003), ((9, 0.1001), 0.0)],
    ids=["the same law", "too noisy", "the other way round", "below from the start"],
)
def test_no_statement_where_the_data_allow_none(second, spread):
    found = scaling.crossing(family(10, 0.1, spread), family(*second, spread, seed=1))
    assert found.low is None
    assert found.share < 0.95


@pytest.mark.parametrize("losses", [{1e4: [1.0, 2.0]}, {1e4: [1.0, 2.0], 1e5: [1.0]}, {}])
def test_too_few_sizes_or_seeds(losses):
    with pytest.raises(UserError, match="two sizes or more, with two seeds or more"):
        scaling.fit(losses)
