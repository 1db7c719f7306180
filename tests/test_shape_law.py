"""The law of size, shape, repeats and horizon, on losses made from a known one."""

import dataclasses
import math

import numpy as np

from mobilellm_jax.analysis.cells import Cell
from mobilellm_jax.analysis.shape_law import LAW

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
    "drift": 0.0, "phi none": 0.0, "phi": 0.0, **{f"phi {order}": value for order, value in PHI.items()},
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


def truth(cells, form=LAW, **changes):
    """Losses by the formula, written as a plain loop."""
    v = {**TRUTH, **changes}
    losses = []
    for c in cells:
        n = c.parameters / 1e5 * np.mean([uses ** v[f"phi {c.order}"] for uses in c.uses])
        bend = v["kappa"] * (math.log(c.width / c.layers) - v["log_a"]) ** 2
        losses.append(v["E"] + math.exp(v["log_A"]) * n ** -v["alpha"] * math.exp(bend)
                      + math.exp(v["log_B"]) * (c.tokens / 1e6) ** -v["beta"])  # fmt: skip
    return np.array(losses)


def simulated(cells, losses, seed=0, sd=0.015, rate_sd=0.0, spread=0.0, seeds=3):
    generator = np.random.default_rng(seed)
    shared = losses + math.hypot(rate_sd, spread) * generator.normal(size=len(cells))
    noise = sd * generator.normal(size=(len(cells), seeds))
    return [
        dataclasses.replace(c, losses=tuple(mean + noises))
        for c, mean, noises in zip(cells, shared, noise, strict=True)
    ]
