"""The line of the best learning rate over size and horizon, against normal equations and a parabola."""

import dataclasses
import math

import numpy as np
import pytest
from test_shape_law import cell, grid

from mobilellm_jax.analysis.rate_line import carried, fit


def tuned(cells, noise=0.0, curvature=0.06):
    """Cells whose optima lie on -6 - 0.1 log2(N / 100k) - 0.2 log2(T / 1M), but for noise."""
    rng = np.random.default_rng(0)
    at = [-6 - 0.1 * math.log2(c.parameters / 1e5) - 0.2 * math.log2(c.tokens / 1e6) for c in cells]
    return [
        dataclasses.replace(c, optimum=x + noise * rng.normal(), curvature=curvature)
        for c, x in zip(cells, at, strict=True)
    ]


def by_normal_equations(cells):
    x = np.array([[1, math.log2(c.parameters) - math.log2(1e5), math.log2(c.tokens / 1e6)] for c in cells])
    return np.linalg.solve(x.T @ x, x.T @ [c.optimum for c in cells])


def test_constants_are_those_that_the_optima_were_made_with():
    line = fit(tuned(grid(check=None)))
    assert (line.at, line.of_parameters, line.of_tokens) == pytest.approx((-6, -0.1, -0.2))
    assert (line.error, line.curvature) == pytest.approx((0, 0.06), abs=1e-9)
    assert line.octaves(cell("1m", 8, 4, 140)) == pytest.approx(-6 - 0.1 * math.log2(10) - 0.2 * 3)


def test_each_preset_is_predicted_from_all_others():
    cells = tuned(grid(("33k", "100k"), check=None), noise=0.3)
    line = fit(cells)
    assert (line.at, line.of_parameters, line.of_tokens) == pytest.approx(tuple(by_normal_equations(cells)))
    squares = []
    for one in line.missed:
        at, of_parameters, of_tokens = by_normal_equations([c for c in cells if c.preset != one.preset])
        off = [
            c.optimum
            - (at + of_parameters * math.log2(c.parameters / 1e5) + of_tokens * math.log2(c.tokens / 1e6))
            for c in cells
            if c.preset == one.preset
        ]
        assert one.error == pytest.approx(math.sqrt(np.mean(np.square(off))))
        assert one.optimum - one.predicted == pytest.approx(np.mean(off))
        squares.append(np.mean(np.square(off)))
    assert line.error == pytest.approx(math.sqrt(np.mean(squares)))
    assert len(squares) == 6


def test_a_rate_costs_what_a_parabola_loses_on_average():
    """Over the optima that a cell may have: about the line, as far as the presets lie off it."""
    line = fit(tuned(grid(("33k", "100k"), check=None), noise=0.3))
    one = cell("300k", 8, 3, 90, untuned_rate=2**-6.0)
    other = cell("300k", 8, 3, 90, arm="standard", untuned_rate=2**-6.0)
    mine, searched, theirs = carried([one, cell("33k", 2, 2, 38), other], "completep", line)
    optima = np.random.default_rng(1).normal(line.octaves(one), line.error, 1_000_000)
    assert mine.rate_excess == pytest.approx(np.mean(0.06 * (optima + 6.0) ** 2), rel=0.01)
    assert searched.rate_excess == theirs.rate_excess == 0


@pytest.mark.parametrize(
    "cells",
    [
        [],
        grid(check=None),  # nothing was tuned
        tuned(grid(("100k",), check=None)),
        tuned(grid(horizons=(2,), check=None)),
        tuned(grid(("33k", "100k"), (2,), check=None) + grid(("33k",), (8,), check=None)),  # two, without one
    ],
)
def test_too_few_cells_give_no_line(cells):
    assert fit(cells) is None
