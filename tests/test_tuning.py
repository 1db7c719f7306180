"""The search for a learning rate, on curves whose best rate is known."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import optimize, stats
from test_results import make_record

from mobilellm_jax.analysis.facts import points_of
from mobilellm_jax.analysis.records import read_records
from mobilellm_jax.analysis.study import study_of
from mobilellm_jax.analysis.tuning import (
    FURTHEST,
    Tuning,
    best_learning_rate,
    drifts,
    fit_rates,
    next_learning_rate,
    next_trial,
    tuning_searches,
)

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


def parabolas(optima, rng, sd=0.03, curvature=0.1, repeats=1, octaves=range(-10, -3)):
    """Tuning losses of points whose best rates are known, in octaves."""
    return {
        f"p{i}": {
            2.0**x: list(3 + i + curvature * (x - best) ** 2 + sd * rng.normal(size=repeats)) for x in octaves
        }
        for i, best in enumerate(optima)
    }


def in_window(trials, window=2.05):
    """Yields (point, octave, loss) within the window round the best mean of each point, by a plain loop."""
    for point, tried in trials.items():
        best = min(tried, key=lambda rate: np.mean(tried[rate]))
        for rate, losses in tried.items():
            if abs(math.log2(rate / best)) < window and np.isfinite(losses).all():
                yield from ((point, math.log2(rate), loss) for loss in losses)


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_fit_is_that_of_ordinary_and_of_non_linear_least_squares(repeats):
    trials = parabolas((-7.3, -6.1, -8.2), np.random.default_rng(3), repeats=repeats)
    found, rows = fit_rates(trials), list(in_window(trials))
    which = np.array([list(trials).index(point) for point, _, _ in rows])
    octave, loss = (np.array([row[column] for row in rows]) for column in (1, 2))
    dummies = np.eye(3)[which]
    ols = sm.OLS(loss, np.column_stack([dummies, dummies * octave[:, None], octave**2])).fit()
    assert found.df == ols.df_resid
    assert found.sd == pytest.approx(math.sqrt(ols.scale))
    assert (found.curvature, found.curvature_se) == pytest.approx((ols.params[-1], ols.bse[-1]))
    model = lambda _, *p: np.array(p[:3])[which] + p[6] * (octave - np.array(p[3:6])[which]) ** 2  # noqa: E731
    values, covariance = optimize.curve_fit(model, octave, loss, [3, 4, 5, -7, -7, -7, 0.1])
    for place, optimum in enumerate(found.optima.values()):
        assert optimum.interior
        assert math.log2(optimum.rate) == pytest.approx(values[3 + place], abs=1e-5)
        assert optimum.se == pytest.approx(math.sqrt(covariance[3 + place, 3 + place]), rel=1e-3)


def test_the_standard_error_covers_the_true_rate():
    """In 95 % of simulated searches, by a t interval; curvature x se^2 is the loss that the error costs."""
    rng, true, inside, cost, said = np.random.default_rng(0), (-7.3, -6.6, -6.9, -7.0), [], [], []
    for _ in range(300):
        found = fit_rates(parabolas(true, rng, octaves=(-9, -8, -7, -6, -5)))
        reach = stats.t.ppf(0.975, found.df)
        for best, optimum in zip(true, found.optima.values(), strict=True):
            error = math.log2(optimum.rate) - best
            inside.append(abs(error) < reach * optimum.se)
            cost.append(0.1 * error**2)
            said.append(found.curvature * optimum.se**2)
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)
    assert np.mean(said) == pytest.approx(np.mean(cost), rel=0.1)


def test_points_without_an_optimum_inside_keep_the_best_rate_tried():
    falling = {2.0**x: [4 - 0.3 * x] for x in range(-9, -4)}
    inside = {2.0**x: [3 + 0.1 * (x + 7) ** 2] for x in range(-9, -4)}
    found = fit_rates({"falling": falling, "inside": inside, "none": {2**-9: [math.inf], 2**-7: [math.inf]}})
    assert [(o.rate, o.interior, o.se) for label, o in found.optima.items() if label != "inside"] == [
        (2**-5, False, None),
        (2**-9, False, None),
    ]
    assert found.optima["inside"].interior
    bent = {"a": {2.0**x: [3 - 0.1 * (x + 7) ** 2] for x in range(-9, -4)}}  # no minimum at all
    assert not fit_rates(bent).optima["a"].interior


def test_rates_that_diverge_and_rates_far_away_are_no_part_of_the_fit():
    near = {2.0**x: [3 + 0.1 * (x + 7.2) ** 2] for x in (-9, -8, -7, -6)}
    found = fit_rates({"a": {**near, 2**-5: [math.inf], 2**-4: [3.0, math.inf], 2**-12: [9.0]}})
    assert math.log2(found.optima["a"].rate) == pytest.approx(-7.2)
    assert found.curvature == pytest.approx(0.1)
    assert found.df == 1


def test_three_trials_are_fitted_without_a_standard_error():
    found = fit_rates({"a": {2.0**x: [3 + 0.1 * (x + 7.2) ** 2] for x in (-8, -7, -6)}})
    assert math.log2(found.optima["a"].rate) == pytest.approx(-7.2)
    assert found.df == 0
    assert found.optima["a"].se is found.curvature_se is None
    two = fit_rates({"a": {0.1: [1.0], 0.2: [2.0]}})
    assert (two.curvature, two.optima["a"].rate, two.optima["a"].interior) == (None, 0.1, False)


def test_two_rates_of_a_point_borrow_the_curvature_of_the_others():
    trials = parabolas((-7, -6.6), np.random.default_rng(0), sd=0.0)
    trials["p1"] = {2.0**x: trials["p1"][2.0**x] for x in (-7, -6)}
    found = fit_rates(trials)
    assert math.log2(found.optima["p1"].rate) == pytest.approx(-6.6)


def tuning_runs(trials, arm, tuning="fitted"):
    return [
        make_record(
            point=point,
            seed=1_000_000 + index,
            phase="tuning",
            tuning=tuning,
            arm=arm,
            score=loss,
            learning_rate=rate,
        )
        for point, tried in trials.items()
        for rate, losses in tried.items()
        for index, loss in enumerate(losses)
    ]


def test_records_of_fitted_rates_are_fitted_again_within_each_arm():
    rng = np.random.default_rng(1)
    arms = {
        arm: parabolas((-7.3, -6.2), rng, curvature=c) for arm, c in (("completep", 0.1), ("standard", 0.3))
    }
    arms["standard"] = {f"{label} (standard)": tried for label, tried in arms["standard"].items()}
    records = [run for arm, trials in arms.items() for run in tuning_runs(trials, arm)]
    found = tuning_searches(points_of(records))
    for trials in arms.values():
        fit = fit_rates(trials)
        for label, optimum in fit.optima.items():
            search = found[label]
            assert (search.fitted, search.chosen) == (
                pytest.approx(optimum.rate),
                pytest.approx(optimum.rate),
            )
            assert (search.se, search.excess) == pytest.approx((optimum.se, fit.curvature * optimum.se**2))
            assert search.curvature == pytest.approx(fit.curvature)
    grid = tuning_searches(points_of(tuning_runs(arms["completep"], None, "grid")))
    assert all(search.fitted for search in grid.values())  # for the report; they ran at the best rate tried
    assert {search.chosen for search in grid.values()} <= arms["completep"]["p0"].keys()


def test_the_error_of_a_rate_costs_in_the_measure_that_is_compared():
    """Here three times the loss; a measure that the rate does not move costs nothing."""
    trials = parabolas((-7.3, -6.2), np.random.default_rng(1))
    runs = tuning_runs(trials, "completep")
    for factor in (3.0, 0.0):
        of = [replace(run, metric="error", final=run.final | {"error": factor * run.loss}) for run in runs]
        found = tuning_searches(points_of(of))
        fit = fit_rates(trials)
        for label, optimum in fit.optima.items():
            assert found[label].se == pytest.approx(optimum.se)
            assert found[label].excess == pytest.approx(factor * fit.curvature * optimum.se**2)


def test_a_rate_that_is_not_fitted_is_unsure_by_a_step_of_the_grid():
    rng = np.random.default_rng(2)
    trials = parabolas((-7.3, -7.0), rng) | {"falling": {2.0**x: [4 - 0.3 * x] for x in range(-9, -4)}}
    found, fit = tuning_searches(points_of(tuning_runs(trials, "completep"))), fit_rates(trials)
    assert (found["falling"].fitted, found["falling"].se) == (None, None)
    assert found["falling"].excess == pytest.approx(fit.curvature)  # the next rate is an octave away


def test_a_drift_is_the_weighted_line_through_the_optima():
    widths, octaves, se = (64, 128, 256, 512), (-6.5, -7.1, -7.4, -8.3), (0.05, 0.1, 0.05, 0.2)
    x = [{"label": "width", "value": width, "log": True} for width in widths]
    runs = [make_record(point=str(width), x=at) for width, at in zip(widths, x, strict=True)]
    searches = {
        str(width): Tuning([], 2**octave, False, None, 2**octave, 2**octave, error)
        for width, octave, error in zip(widths, octaves, se, strict=True)
    }
    (found,) = drifts(points_of(runs), searches)
    line = sm.WLS(octaves, sm.add_constant(np.log2(widths)), weights=1 / np.square(se)).fit()
    assert line.scale > 1  # the optima scatter by more than their errors
    assert found.octaves == pytest.approx(line.params[1])
    assert (found.low, found.high) == pytest.approx(line.conf_int()[1])
    assert found.total == pytest.approx(3 * line.params[1])
    assert drifts(points_of(runs), {name: searches[name] for name in ("64", "128")}) == []


@pytest.mark.parametrize(
    ("preset", "low", "high"),
    [("width_standard", -1.5, -1.2), ("width_completep", -0.2, 0.2), ("depth_completep", -0.2, 0.2)],
)
def test_the_committed_rates_move_with_width_under_standard_alone(preset, low, high):
    """Octaves over the whole range; read off the records by another fit: -1.4 and 0.16."""
    folder = Path(__file__).parents[1] / "experiments" / "results" / "lr_transfer" / preset
    (drift,) = study_of(read_records(folder)).verdict.drifts
    assert low < drift.total < high
    assert (drift.low <= 0 <= drift.high) == (preset != "width_standard")
