"""The search for a learning rate, on curves whose best rate is known."""

import math

import pytest

from mobilellm_jax.tuning import FURTHEST, best_learning_rate, next_learning_rate

GRID = (2**-9, 2**-7, 2**-5)


def search(loss, grid=GRID):
    """Returns the rates in the order in which they were tried, with their losses."""
    tried = {}
    while (rate := next_learning_rate(tried, grid)) is not None:
        assert rate not in tried
        tried[rate] = loss(math.log2(rate))
        assert len(tried) < 30
    return tried


@pytest.mark.parametrize("best", range(-16, 3))
@pytest.mark.parametrize("grid", [GRID, (2**-8, 2**-6), (2**-10, 2**-9, 2**-8), (2**-9, 2**-5)])
def test_finds_the_best_power_of_two(best, grid):
    """Within FURTHEST steps of the grid, on a curve that diverges three octaves above its best."""
    octaves = [math.log2(rate) for rate in grid]
    step = octaves[1] - octaves[0]
    reach = (FURTHEST - 1) * step
    if not octaves[0] - reach <= best <= octaves[-1] + reach:
        pytest.skip("further than the search goes")
    tried = search(lambda octave: math.inf if octave > best + 3 else abs(octave - best), grid)
    assert best_learning_rate(tried) == 2.0**best
    assert {2.0 ** (best - 1), 2.0 ** (best + 1)} <= tried.keys()


def test_number_of_runs():
    """Three of the grid and one or two that refine; every extension costs one more."""
    assert len(search(lambda octave: (octave + 7) ** 2)) == 5
    assert len(search(lambda octave: (octave + 6.1) ** 2)) == 4
    assert len(search(lambda octave: (octave + 5) ** 2)) == 6
    assert len(search(lambda octave: (octave + 3) ** 2)) == 7


@pytest.mark.parametrize(
    ("slope", "edge"), [(-1, 2.0 ** (-5 + 2 * FURTHEST)), (1, 2.0 ** (-9 - 2 * FURTHEST))]
)
def test_gives_up_at_an_edge_that_is_never_left(slope, edge):
    tried = search(lambda octave: slope * octave)
    assert best_learning_rate(tried) == edge
    assert edge in (min(tried), max(tried))


def test_goes_down_where_all_rates_diverge():
    tried = search(lambda octave: math.inf if octave > -12 else -octave)
    assert best_learning_rate(tried) == 2.0**-12 or tried[best_learning_rate(tried)] < math.inf
    assert min(tried) < 2**-12


def test_equal_losses_take_the_lower_rate():
    assert best_learning_rate({0.1: 1.0, 0.01: 1.0, 0.001: 2.0}) == 0.01
