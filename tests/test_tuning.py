"""The search for a learning rate, on curves whose best rate is known."""

import math

import pytest

from mobilellm_jax.analysis.tuning import FURTHEST, best_learning_rate, next_learning_rate, next_trial

GRID = (2**-9, 2**-7, 2**-5)


def search(loss, grid=GRID):
    """Returns the rates in the order in which they were tried, with their losses."""
    tried = {}
    while (rate := next_learning_rate(tried, grid)) is not None:
        assert rate not in tried
        tried[rate] = loss(math.log2(rate))
        assert len(tried) < 30
    return tried


def within_reach(grid):
    """Returns the octaves that the search finds from a grid."""
    low, high = math.log2(grid[0]), math.log2(grid[-1])
    reach = (FURTHEST - 1) * (math.log2(grid[1]) - low)
    return [octave for octave in range(-16, 3) if low - reach <= octave <= high + reach]


GRIDS = [GRID, (2**-8, 2**-6), (2**-10, 2**-9, 2**-8), (2**-9, 2**-5)]


@pytest.mark.parametrize(("grid", "best"), [(grid, best) for grid in GRIDS for best in within_reach(grid)])
def test_finds_the_best_power_of_two(grid, best):
    """On a curve that diverges three octaves above its best."""
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
    assert best_learning_rate(tried) == 2.0**-12
    assert 2.0**-11 in tried


@pytest.mark.parametrize("grid", [(3e-4, 1.2e-3), (5e-3, 1e-2), (1e-3, 1e-2), (1e-4, 1e-3, 1e-2)])
def test_grids_of_other_numbers(grid):
    """Rates that are no powers of 2 are found too, within an octave of the best."""
    tried = search(lambda octave: (octave + 8.3) ** 2, grid)
    assert abs(math.log2(best_learning_rate(tried)) + 8.3) <= 0.5
    assert len(tried) <= 8


def test_equal_losses_take_the_lower_rate():
    assert best_learning_rate({0.1: 1.0, 0.01: 1.0, 0.001: 2.0}) == 0.01


def test_a_lucky_run_is_found_out():
    """2^-5 has a lucky first run; its repetition sends the search back to 2^-7, which is best."""
    lucky = {(-5, 0): 0.0}
    tried = {}
    while trial := next_trial(tried, GRID, seeds=3):
        rate, index = trial
        assert index == len(tried.get(rate, []))
        octave = math.log2(rate)
        tried.setdefault(rate, []).append(lucky.get((octave, index), 1 + abs(octave + 7)))
    means = {rate: sum(losses) / len(losses) for rate, losses in tried.items()}
    assert best_learning_rate(means) == 2**-7
    assert [len(tried[2.0**octave]) for octave in (-8, -7, -6)] == [3, 3, 3]
    assert len(tried[2**-9]) == 1


def test_a_rate_that_diverges_is_not_repeated():
    tried = {}
    while trial := next_trial(tried, GRID, seeds=2):
        octave = math.log2(trial[0])
        tried.setdefault(trial[0], []).append(math.inf if octave > -7 else abs(octave + 7))
    assert {math.log2(rate): len(losses) for rate, losses in tried.items()} == {
        -9: 1,
        -8: 2,
        -7: 2,
        -6: 1,
        -5: 1,
    }
