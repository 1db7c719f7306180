"""The law of size, shape, repeats and horizon, on losses made from a known one."""

import dataclasses
import functools
import math

import numpy as np
import pytest
from scipy import optimize

from mobilellm_jax.analysis import shape_law
from mobilellm_jax.analysis.cells import Cell, differences, meant_aspects, moderated, trends
from mobilellm_jax.analysis.shape_findings import judged_sizes, leave_out
from mobilellm_jax.analysis.shape_fit import bootstrap, fit, leave_presets_out
from mobilellm_jax.analysis.shape_law import FORMS, LAW, Model
from mobilellm_jax.errors import UserError

# depth, width: width over depth about 96, 32, 12 and 4
SHAPES = {
    "33k": ((1, 52), (2, 38), (3, 30), (6, 22)),
    "100k": ((1, 90), (2, 64), (4, 46), (8, 32)),
    "300k": ((1, 158), (3, 90), (6, 64), (12, 46)),
    "1m": ((2, 200), (4, 140), (8, 104), (20, 66)),
}
PARAMETERS = {"33k": 33_000, "100k": 100_000, "300k": 300_000, "1m": 1_000_000}
PHI = {"immediate": 0.5, "repeat_all": 0.3, "reverse": 0.4}
TRUTH = {
    "E": 2.0, "log_A": 0.0, "alpha": 0.25, "log_B": -0.2, "beta": 0.4, "kappa": 0.05, "log_a": math.log(25),
    "drift": 0.0, "drift_T": 0.0, "kappa_T": 0.0, "phi none": 0.0, "phi": 0.0,
    **{f"phi {order}": value for order, value in PHI.items()},
}  # fmt: skip


def cell(size, horizon, depth, width, order="none", longer=1, deeper=1, **changes):
    repeats = 1 if order == "none" else 2
    design = f"{depth * deeper} x {width}" + f" {order}" * (order != "none") + ", equal FLOPs" * (longer > 1)
    n = PARAMETERS[size]
    fields = {
        "preset": f"{size}_{horizon}",
        "size": size,
        "horizon": float(horizon),
        "design": design,
        "arm": "completep",
        "order": order,
        "within": longer == deeper == 1,
        "parameters": n * deeper,
        "total": 2 * n * deeper,
        "uses": (repeats,) * (depth * deeper),
        "width": width,
        "layers": depth * deeper * repeats,
        "tokens": int(n * horizon * longer),
        "flops": 6.0 * n * n * horizon,
        "losses": (0.0,),
        "diverged": 0,
        "trigram": None,
    }
    return Cell(**{**fields, **changes})


def grid(sizes=("33k", "100k", "300k"), horizons=(2, 8, 32), check="1m"):
    """The cells of the study, without losses."""
    cells = []
    for size, horizon in [(s, h) for s in sizes for h in horizons] + [(check, 8)] * bool(check):
        shapes = SHAPES[size]
        cells += [cell(size, horizon, *shape) for shape in shapes]
        for shape in shapes[1:3] if size != "1m" else ():
            cells += [cell(size, horizon, *shape, order) for order in PHI]
            cells += [cell(size, horizon, *shape, deeper=2), cell(size, horizon, *shape, longer=1.8)]
    return cells


def truth(cells, **changes):
    """Losses by the formula, written as a plain loop."""
    v = {**TRUTH, **changes}
    losses = []
    for c in cells:
        n = c.parameters / 1e5 * np.mean([uses ** v[f"phi {c.order}"] for uses in c.uses])
        best = (
            v["log_a"] + v["drift"] * math.log(c.parameters / 1e5) + v["drift_T"] * math.log(c.tokens / 1e6)
        )
        bend = (v["kappa"] + v["kappa_T"] * math.log(c.tokens / 1e6)) * (
            math.log(c.width / c.layers) - best
        ) ** 2
        by_size = math.exp(v["log_A"]) * n ** -v["alpha"]
        by_tokens = math.exp(v["log_B"]) * (c.tokens / 1e6) ** -v["beta"]
        losses.append(v["E"] + by_tokens + (by_size + bend if v.get("plus") else by_size * math.exp(bend)))
    return np.array(losses)


def simulated(cells, losses, seed=0, sd=0.015, rate_excess=0.0, spread=0.0, seeds=3):
    """Cells with losses of seeds: their noise (`sd` may be by cell), and what is common to a cell.

    That is the cost of an error of its rate, which is never below 0, and its distance from the law.
    """
    generator = np.random.default_rng(seed)
    shared = losses + spread * generator.normal(size=len(cells))
    noise = np.multiply(np.reshape(sd, (-1, 1)), generator.normal(size=(len(cells), seeds)))
    shared = shared + rate_excess * generator.normal(size=len(cells)) ** 2
    return [
        dataclasses.replace(c, losses=tuple(map(float, mean + noises)), rate_excess=rate_excess)
        for c, mean, noises in zip(cells, shared, noise, strict=True)
    ]


@functools.cache
def small(seed=0, **noise):
    """A study of two sizes and one check."""
    cells = grid(("33k", "100k"), (2, 8, 32))
    return simulated(cells, truth(cells), seed, **noise)


@pytest.mark.parametrize("uses", [(1, 1), (2, 2), (1, 3)])
def test_losses_are_those_of_the_formula(uses):
    """Also where blocks are applied unequally often, as between a first and a last one."""
    cells = [dataclasses.replace(c, uses=uses, order="reverse") for c in grid()[:5]]
    found = dataclasses.replace(fit(small(), start=TRUTH), values=TRUTH)
    assert found.predict(cells) == pytest.approx(truth(cells), rel=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_jacobian_is_that_of_finite_differences(form):
    cells = small()
    found = fit(cells, form, start=TRUTH)
    values = {**TRUTH, "phi": 0.3, "drift": 0.1, "drift_T": -0.1, "kappa_T": 0.02}
    model = Model(form, cells, {**found.values, **values}, found.free)
    theta = np.array([values.get(name, 0.2) for name in found.free])
    expected = optimize.approx_fprime(theta, model, 1e-7)
    assert model.jacobian(theta) == pytest.approx(expected, abs=2e-5)


def test_exact_law_is_found():
    cells = grid()
    found = fit(simulated(cells, truth(cells), sd=0.0))
    assert {name: found.values[name] for name in found.free} == pytest.approx(
        {name: TRUTH[name] for name in found.free}, abs=1e-4
    )
    assert found.spread < 1e-4
    assert found.left_out == ()
    assert found.optimum(3e5, 1e7) == pytest.approx(25, rel=1e-3)


def test_known_constants_lie_within_their_intervals():
    """Intervals of 99.7 %, or one of ten constants would miss often."""
    cells = grid()
    found = bootstrap(fit(simulated(cells, truth(cells), seed=2)), 80)
    for name in found.free:
        low, high = found.interval(name)
        room = 0.5 * (high - low)
        assert low - room / 2 < TRUTH[name] < high + room / 2
        assert not found.is_open(name)
    low, high = found.optimum_interval(1e5, 1e6)
    assert low < found.optimum(1e5, 1e6) < high < 1.2 * low


def test_one_cell_that_went_wrong_moves_little():
    cells = small()
    wrong = [dataclasses.replace(cells[0], losses=tuple(x + 1.0 for x in cells[0].losses)), *cells[1:]]
    clean, found = fit(cells), fit(wrong)
    for order, room in (("immediate", 0.1), ("reverse", 0.1)):
        assert found.values[f"phi {order}"] == pytest.approx(clean.values[f"phi {order}"], abs=room)
    assert found.residuals[0] > 0.8
    assert found.spread > 3 * clean.spread  # which widens the intervals


def coverage(studies, resamples, **noise):
    """Share of the intervals that hold the constant that the losses were made from, by constant."""
    cells = grid()
    losses = truth(cells)
    hits = {}
    for seed in range(studies):
        found = fit(simulated(cells, losses, seed, **noise), start=TRUTH)
        found = bootstrap(found, resamples, seed)
        for name in found.free:
            low, high = found.interval(name)
            hits.setdefault(name, []).append(low <= TRUTH[name] <= high)
    return {name: float(np.mean(found)) for name, found in hits.items()}


def test_intervals_are_as_wide_as_estimates_vary():
    """Which takes one bootstrap and many fits, where coverage takes many bootstraps."""
    cells = grid(check=None)
    losses = truth(cells)
    estimates = {}
    for seed in range(50):
        found = fit(simulated(cells, losses, seed, spread=0.01), start=TRUTH)
        for name in found.free:
            estimates.setdefault(name, []).append(found.values[name])
    ratios = []
    for seed in (0, 1, 2):
        found = bootstrap(fit(simulated(cells, losses, seed, spread=0.01), start=TRUTH), 80, seed)
        ratios.append([np.std(found.samples[name]) / np.std(estimates[name]) for name in found.free])
    assert np.mean(ratios, axis=0) == pytest.approx(1, abs=0.35)
    assert np.mean(ratios) == pytest.approx(1, abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [{}, {"rate_excess": 0.007}, {"spread": 0.015}, {"seeds": 2}], ids=str)
def test_intervals_cover(noise):
    found = coverage(60, 100, **noise)
    assert min(found.values()) > 0.84
    assert 0.91 < np.mean(list(found.values())) < 0.985


def test_uncertain_learning_rates_widen_intervals():
    cells = small()
    rates_unsure = [dataclasses.replace(cell, rate_excess=0.02) for cell in cells]
    sure, unsure = (bootstrap(fit(found, LAW, TRUTH), 40) for found in (cells, rates_unsure))
    for order in PHI:
        (a, b), (c, d) = (found.interval(f"phi {order}") for found in (sure, unsure))
        assert d - c > 2 * (b - a)
    a, b = (differences(found)[0].half_width for found in (cells, rates_unsure))
    assert b > 2 * a


# Other forms.


@pytest.mark.parametrize(
    ("changes", "best"),
    [
        ({}, LAW.name),
        ({"drift": 0.4}, shape_law.SHAPES[1].name),
        ({"drift_T": 0.3, "kappa_T": 0.02}, shape_law.SHAPES[2].name),
        ({"plus": True}, "shape as a term of its own"),
        ({"kappa": 0.0}, None),
        ({f"phi {order}": 1.0 for order in PHI}, None),
    ],
)
def test_the_form_of_the_truth_predicts_best(changes, best):
    cells = grid(("33k", "100k", "300k"), (2, 8, 32))
    cells = simulated(cells, truth(cells, **changes), sd=0.003)
    found = {form.name: leave_out(fit(cells, form, start=TRUTH), "300k").error for form in FORMS}
    names = {None: {"no effect of shape", "a repeat is worth a block (phi = 1)"}}
    ours = {best} if best else names[None]
    assert min(found[name] for name in ours) < 0.006
    nested = {form.name for form in shape_law.SHAPES[:3]} if best == LAW.name else set()  # they hold it
    if best:
        others = [error for name, error in found.items() if name not in {best, *nested}]
        assert found[best] < min(others)
    else:
        assert found[LAW.name] < 0.006  # which holds them


def test_left_out_sizes_are_predicted_from_the_others_alone():
    cells = small()
    assert judged_sizes(cells) == ["1m"]
    of_others = fit([c for c in cells if c.size != "1m"])
    held = [c for c in cells if c.size == "1m"]
    expected = np.array([c.loss for c in held]) - of_others.predict(held)
    found = leave_out(fit(cells), "1m")
    assert found.errors == pytest.approx(expected, abs=1e-3)
    assert found.error == pytest.approx(math.sqrt(np.mean(expected**2)), abs=1e-3)


def test_what_hangs_on_one_preset_shows_in_the_range_without_it():
    """Cells that move together move a constant by more than intervals of independent cells say."""
    cells = grid(check=None)
    off = np.array([0.3 * (c.preset == "33k_2") for c in cells])
    found = leave_presets_out(bootstrap(fit(simulated(cells, truth(cells) + off, sd=0.003)), 40))
    low, high = found.without["beta"]
    assert low - 0.01 < TRUTH["beta"] < high + 0.01  # as the fit without that preset says
    assert max(low, high) - found.values["beta"] > found.values["beta"] - found.interval("beta")[0]


# What the cells do not tell.


@pytest.mark.parametrize(
    ("keep", "gone", "reason"),
    [
        (lambda c: c.order != "reverse", {"phi reverse"}, "no exponent for reverse: no cell has it"),
        (
            lambda c: c.order == "none",
            {"phi immediate", "phi repeat_all", "phi reverse"},
            "no exponent for immediate",
        ),
        (lambda c: c.horizon == 8, {"log_B", "beta"}, "no term of tokens: with one horizon"),
        (
            lambda c: c.order != "none" or not c.within or c.layers == 2,
            {"kappa", "log_a"},
            "no term of shape",
        ),
        (lambda c: c.size != "1m" and c.horizon > 2, {"E"}, "no irreducible loss E"),
    ],
)
def test_terms_that_cells_do_not_determine_are_left_out(keep, gone, reason):
    cells = small()
    every = {*fit(cells).free}
    found = fit([c for c in cells if keep(c)])
    assert every - {*found.free} == gone
    assert any(one.startswith(reason) for one in found.left_out)
    assert np.isfinite(found.residuals).all()


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda c: c.size == "100k", r"to 1 size \(100k\); it takes two: run the presets of another size"),
        (lambda c: False, r"to 0 size \(none\)"),
        (
            lambda c: c.horizon == 2 and c.layers == 2 and c.within,
            "fit 2 constants to 2 cells .* takes 4: wait",
        ),
    ],
)
def test_too_little_for_a_law(keep, message):
    with pytest.raises(UserError, match=message):
        fit([c for c in small() if keep(c) and (c.order == "none" or c.horizon > 2)])


def test_a_law_that_does_not_bend_has_no_optimum():
    cells = grid()
    found = bootstrap(fit(simulated(cells, truth(cells, kappa=0.0))), 40)
    assert found.optimum_interval(1e5, 1e6) is None


# Cells.


def test_spreads_are_shrunk_towards_that_of_all():
    generator = np.random.default_rng(0)
    cells = (grid() * 4)[:400]
    sd = np.sqrt(0.02**2 * 8 / generator.chisquare(8, len(cells)))
    cells = simulated(cells, np.zeros(len(cells)), sd=sd)
    found, df = moderated(cells)
    alone = np.array([np.std(c.losses, ddof=1) for c in cells])
    assert np.std(np.log(found / sd)) < 0.6 * np.std(np.log(alone / sd))
    assert df == pytest.approx(2 + 8, rel=0.35)  # its own, and those of the prior
    alike, many = moderated(simulated(cells, np.zeros(len(cells)), sd=0.02))
    assert np.mean(alike) == pytest.approx(0.02, rel=0.12)
    assert np.std(np.log(alike)) < 0.2  # 0.7 for those of three seeds alone
    assert min(many) > 8


@pytest.mark.slow
def test_bands_hold_for_all_differences_at_once():
    cells = grid(("33k",), (2, 8), None)
    sd = np.linspace(0.01, 0.03, len(cells))
    missed = []
    for seed in range(100):
        found = differences(simulated(cells, np.zeros(len(cells)), seed, sd=sd))
        missed.append(any(abs(d.mean) > d.half_width for d in found))
    assert len(found) == 26
    assert 0.01 <= np.mean(missed) <= 0.09


def test_designs_are_compared_with_the_unshared_of_their_shape():
    found = differences(simulated(grid(), truth(grid())))
    at = {(d.cell.preset, d.cell.design): d for d in found}
    assert at["33k_2", "1 x 52"].label == "D/L 52 to 158"  # nearer to 32, which 2 x 38 is
    assert at["33k_2", "1 x 52"].other.design == "2 x 38"
    assert at["100k_8", "8 x 32"].row == "depth"
    assert at["100k_8", "4 x 46 reverse"].other.design == "4 x 46"
    assert at["100k_8", "4 x 46 reverse"].row == "sharing at D/L 10 to 13"
    deep, long = at["100k_8", "8 x 46"], at["100k_8", "4 x 46, equal FLOPs"]
    assert (deep.label, deep.other.design) == ("equal depth, unshared", "4 x 46")
    assert (long.label, long.other.design) == ("equal FLOPs, unshared", "4 x 46")
    assert ("100k_8", "2 x 64") not in at
    assert deep.against == long.against == "D/L 10 to 13"
    assert set(meant_aspects(grid()).values()) == {96, 32, 12, 4}


def test_differences_without_any_spread_have_no_band():
    found = differences(simulated(grid(), truth(grid()), seeds=1))
    assert {(d.error, d.half_width) for d in found} == {(None, None)}
    assert trends(found) == []


def test_a_difference_that_rises_and_falls_is_no_line():
    cells = grid(("33k", "100k"), (2, 8, 32), None)
    gone = np.array([-0.1 * (c.design == "8 x 32" and c.preset == "100k_8") for c in cells])
    found = {t.label: t for t in trends(differences(simulated(cells, gone, sd=0.01))) if t.row == "depth"}
    bent, other = found["D/L 3.67 to 4"], found["D/L 10 to 11.5"]
    assert (bent.sizes, bent.against) == (("33k", "100k"), "D/L 19 to 32")
    assert max(bent.p_line, bent.p_constant) < 1e-3
    assert min(other.p_line, other.p_constant) > 0.01
    straight = [c for c in cells if c.preset != "100k_8" and c.preset != "33k_8"]
    found = trends(differences(simulated(straight, np.zeros(len(straight)), sd=0.01)))
    assert {trend.p_line for trend in found} == {None}


def test_a_difference_on_a_line_is_not_constant():
    """A slope contradicts the law as much as a bend: its term of tokens is the same for both designs."""
    cells = grid(("33k", "100k"), (2, 8, 32), None)
    made = np.array([0.03 * math.log2(c.horizon) * (c.design in ("6 x 22", "8 x 32")) for c in cells])
    found = {t.label: t for t in trends(differences(simulated(cells, made, sd=0.01))) if t.row == "depth"}
    deep = found["D/L 3.67 to 4"]
    assert deep.p_constant < 1e-6
    assert deep.p_line > 0.01
    assert deep.equal_tokens


@pytest.mark.slow
def test_interval_of_a_trend_covers_it():
    cells = grid(("100k",), (2, 8, 32), None)
    made = np.array([0.03 * math.log2(c.horizon) * (c.design == "8 x 32") for c in cells])
    hits, bends = [], []
    for seed in range(80):
        found = trends(differences(simulated(cells, made, seed, sd=0.01)))
        of = {trend.label: trend for trend in found if trend.row == "depth"}
        deep, other = of["D/L 4"], of["D/L 11.5"]  # one size has no range
        hits += [abs(deep.slope - 0.03) < deep.half_width, abs(other.slope) < other.half_width]
        bends += [deep.p_line < 0.05, other.p_line < 0.05]
    assert 0.87 < np.mean(hits) < 0.99
    assert np.mean(bends) < 0.12
    assert deep.half_width < 0.01
    assert deep.sizes == ("100k",)
