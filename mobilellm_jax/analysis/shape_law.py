"""The law of size, shape, repeats and horizon: its forms, fits and bootstrap intervals.

    L = E + A (N_once + r^phi N_rec)^-alpha exp(kappa (log(D/L) - log a)^2) + B T^-beta

L: held-out loss; N_once, N_rec: non-embedding parameters of blocks applied once and r times; D: width; L in
D/L: layers applied; T: training tokens. The factor r^phi is that of arXiv 2604.21106, which measured 0.46.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy import optimize

from mobilellm_jax.analysis.cells import Cell, moderated, size_of
from mobilellm_jax.errors import UserError

N0, T0 = 1e5, 1e6  # parameters and tokens at which the two decreasing terms are stated
RESAMPLES, LEVEL = 400, 0.95
HUBER = 1.345  # standard deviations from where on a residual counts by its size, not by its square
# Lowest, highest: no data within a laptop's reach ask for more.
_BOUNDS = {
    "E": (0.0, 10.0),
    "log_A": (-8.0, 3.0),
    "alpha": (0.01, 2.0),
    "log_B": (-8.0, 3.0),
    "beta": (0.01, 2.0),
    "kappa": (-0.5, 1.0),
    "log_a": (math.log(0.5), math.log(1000.0)),
    "drift": (-2.0, 2.0),
    "phi": (-3.0, 4.0),
}


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of the law.

    Attributes:
      shape: how the aspect ratio enters: as a factor on the term of size ("times"), the same with an optimum
        linear in log N ("drifts"), as a term of its own ("plus"), or not at all.
      repeats: an exponent for each "order", one "common", or fixed: 0 (a repeat is worth nothing), 1 (a new
        block).
    """

    name: str
    shape: Literal["times", "drifts", "plus", "none"] = "times"
    repeats: Literal["order", "common", 0, 1] = "order"


LAW = Form("the law")
COMMON = Form("one exponent for all orders", repeats="common")
DRIFTS = Form("optimal D/L drifts with log N", shape="drifts")
FORMS = (
    LAW,
    COMMON,
    DRIFTS,
    Form("shape as a term of its own", shape="plus"),
    Form("no effect of shape", shape="none"),
    Form("a repeat is worth nothing (phi = 0)", repeats=0),
    Form("a repeat is worth a block (phi = 1)", repeats=1),
)


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted form.

    Attributes:
      values: constants by name, fixed ones included: E, log_A, alpha (at `N0` parameters), log_B, beta (at
        `T0` tokens), kappa, log_a, drift, and phi by order as "phi immediate", or "phi" if common.
      free: names of the fitted ones.
      samples: of the fitted ones by name, from the bootstrap; {} before `bootstrap`.
      residuals, noise: loss minus fit, and standard error of the loss (seeds and learning rate), by cell.
      spread: standard deviation of the cells about the law beyond that of seeds and learning rates, nats.
      left_out: terms that the cells cannot determine, one sentence each.
    """

    form: Form
    cells: tuple[Cell, ...]
    values: dict[str, float]
    free: tuple[str, ...]
    samples: dict[str, np.ndarray]
    residuals: np.ndarray
    noise: np.ndarray
    spread: float
    left_out: tuple[str, ...]

    @property
    def orders(self) -> list[str]:
        return [name.removeprefix("phi ") for name in self.free if name.startswith("phi ")]

    def interval(self, name: str) -> tuple[float, float] | None:
        """Percentile interval of a constant at `LEVEL`; None if it was not fitted or not resampled."""
        if name not in self.samples:
            return None
        low, high = np.quantile(self.samples[name], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    def is_open(self, name: str) -> bool:
        """True if the interval of a fitted constant reaches a bound: the cells do not determine it."""
        ends = self.interval(name)
        low, high = _BOUNDS[name.split()[0]]
        room = 1e-3 * (high - low)
        return ends is not None and (ends[0] < low + room or ends[1] > high - room)

    def optimum(self, parameters: float) -> float:
        """Best D/L at a size; without meaning where `optimum_interval` is None."""
        return float(np.exp(self.values["log_a"] + self.values["drift"] * math.log(parameters / N0)))

    def optimum_interval(self, parameters: float) -> tuple[float, float] | None:
        """Percentile interval of `optimum`; None without samples, or if over 5 % of them curve downwards."""
        if "log_a" not in self.samples or np.mean(self.samples["kappa"] <= 0) > 1 - LEVEL:
            return None
        drift = self.samples.get("drift", np.zeros(1)) * math.log(parameters / N0)
        low, high = np.quantile(self.samples["log_a"] + drift, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(np.exp(low)), float(np.exp(high))

    def curve(self, cell: Cell, aspects: np.ndarray) -> np.ndarray:
        """Losses of designs with the parameters, tokens and uses of `cell` at other ratios D/L."""
        theta = np.array([self.values[name] for name in self.free])
        model = _Model(self.form, [cell] * len(aspects), self.values, self.free)
        model.aspect = np.log(aspects)
        return model(theta)

    def predict(self, cells: Sequence[Cell]) -> np.ndarray:
        """Losses of cells."""
        theta = np.array([self.values[name] for name in self.free])
        return _Model(self.form, cells, self.values, self.free)(theta)


class _Model:
    """Losses and their derivatives by the free constants, for one form and one list of cells."""

    def __init__(
        self, form: Form, cells: Sequence[Cell], values: Mapping[str, float], free: Sequence[str]
    ) -> None:
        self.form, self.values, self.free = form, values, free
        self.log_n = np.log([cell.parameters / N0 for cell in cells])
        self.log_t = np.log([cell.tokens / T0 for cell in cells])
        self.aspect = np.log([cell.aspect for cell in cells])
        self.phi = [_phi(form, cell.order) for cell in cells]
        times = sorted({uses for cell in cells for uses in cell.uses})
        self.times = np.array(times, float)
        self.shares = np.array([[cell.uses.count(n) / len(cell.uses) for n in times] for cell in cells])

    def _parts(self, theta: np.ndarray) -> tuple[np.ndarray, ...]:
        v = {**self.values, **dict(zip(self.free, theta, strict=True))}
        phi = np.array([v[name] for name in self.phi])
        worth = self.shares * self.times ** phi[:, None]  # of blocks, by the times that they are applied
        from_ = self.aspect - v["log_a"] - v["drift"] * self.log_n
        size = self.log_n + np.log(worth.sum(1))
        is_factor = self.form.shape != "plus"
        bend = v["kappa"] * from_**2
        by_size = np.exp(v["log_A"] - v["alpha"] * size + (bend if is_factor else 0))
        by_tokens = np.exp(v["log_B"] - v["beta"] * self.log_t)
        scale = by_size if is_factor else np.ones_like(by_size)  # of the shape
        loss = v["E"] + by_size + by_tokens + (0 if is_factor else bend)
        by_phi = -v["alpha"] * by_size * (worth @ np.log(self.times)) / worth.sum(1)
        along = -2 * v["kappa"] * from_ * scale
        return loss, size, from_, by_size, by_tokens, scale, by_phi, along

    def __call__(self, theta: np.ndarray) -> np.ndarray:
        return self._parts(theta)[0]

    def jacobian(self, theta: np.ndarray) -> np.ndarray:
        """[cells, free constants]."""
        _, size, from_, by_size, by_tokens, scale, by_phi, along = self._parts(theta)
        columns = {
            "E": np.ones_like(size),
            "log_A": by_size,
            "alpha": -size * by_size,
            "log_B": by_tokens,
            "beta": -self.log_t * by_tokens,
            "kappa": from_**2 * scale,
            "log_a": along,
            "drift": along * self.log_n,
        }
        for name in self.free:
            if name.startswith("phi"):
                columns[name] = by_phi * [name == mine for mine in self.phi]
        return np.stack([columns[name] for name in self.free], axis=1)


def _phi(form: Form, order: str) -> str:
    return f"phi {order}" if form.repeats == "order" else "phi"


def fit(
    cells: Sequence[Cell],
    form: Form = LAW,
    start: Mapping[str, float] | None = None,
) -> Fit:
    """Fits a form to cell means by Huber least squares.

    A cell weighs by the standard deviation of its mean over seeds, that of its learning rate, and the spread
    of cells about the law, which is estimated from the residuals.

    Args:
      cells: of one arm; their losses are means over seeds.
      start: constants to start from, which takes a tenth of the time; else a few starts, the best counts.

    Raises:
      UserError: one size only, or too few cells.
    """
    values, free, left_out = _terms(cells, form)
    sd, _ = moderated(cells)
    rate = math.sqrt(2) * np.array([cell.rate_excess for cell in cells])  # c e^2 of a normal error e
    noise = np.sqrt(sd**2 / [len(cell.losses) for cell in cells] + rate**2)
    losses = np.array([cell.loss for cell in cells])
    model = _Model(form, cells, values, free)
    starts = (
        [np.array([start[name] for name in free])]
        if start and {*free} <= start.keys()
        else [_start(free, losses, alpha, 0.4, aspect) for alpha in (0.1, 0.4) for aspect in (12.0, 40.0)]
    )
    first = np.hypot(noise, 0.01)
    theta = min((_solve(model, losses, first, one) for one in starts), key=lambda one: one.cost).x
    for _ in range(2):
        spread = _spread(losses - model(theta), noise, len(free))
        theta = _solve(model, losses, np.hypot(noise, spread), theta).x
    residuals = losses - model(theta)
    spread = _spread(residuals, noise, len(free))
    values = {**values, **dict(zip(free, map(float, theta), strict=True))}
    return Fit(form, tuple(cells), values, free, {}, residuals, noise, spread, left_out)


def _spread(residuals: np.ndarray, noise: np.ndarray, free: int) -> float:
    """Standard deviation that the residuals have beyond the noise; a trace of it where they have none."""
    beyond = np.sum(residuals**2) / (len(residuals) - free) - np.mean(noise**2)
    return math.sqrt(max(float(beyond), 1e-12))


def _terms(cells: Sequence[Cell], form: Form) -> tuple[dict[str, float], tuple[str, ...], tuple[str, ...]]:
    """Fixed constants, names of the free ones, and why terms are left out."""
    sizes = sorted({cell.size for cell in cells}, key=lambda size: size_of(cells, size))
    if len(sizes) < 2:
        raise UserError(
            f"cannot fit a law of size to {len(sizes)} size ({', '.join(sizes) or 'none'}); it takes two: "
            "run the presets of another size"
        )
    horizons = {round(math.log2(cell.horizon)) for cell in cells}
    aspects = {
        size: {
            round(math.log(c.aspect), 1) for c in cells if c.size == size and c.order == "none" and c.within
        }
        for size in sizes
    }
    orders = sorted({cell.order for cell in cells} - {"none"})
    reasons = []
    values = {
        "E": 0.0,
        "log_B": -math.inf,
        "beta": 1.0,
        "kappa": 0.0,
        "log_a": 0.0,
        "drift": 0.0,
        "phi none": 0.0,
    }
    free = ["log_A", "alpha"]
    if max(len(sizes), len(horizons)) > 2:
        free.append("E")
    else:
        reasons.append("no irreducible loss E: it takes three sizes or three horizons")
    if len(horizons) > 1:
        free += ["log_B", "beta"]
    else:
        reasons.append("no term of tokens: with one horizon, tokens and parameters rise together")
    if form.shape != "none":
        several = [size for size in sizes if len(aspects[size]) > 2]
        if not several:
            reasons.append("no term of shape: no size has three aspect ratios")
        else:
            free += ["kappa", "log_a"] + ["drift"] * (form.shape == "drifts" and len(several) > 1)
            if form.shape == "drifts" and len(several) < 2:
                reasons.append("no drift of the optimum: one size has three aspect ratios")
    known = {"immediate", "repeat_all", "reverse"}
    reasons += [f"no exponent for {order}: no cell has it" for order in sorted(known - set(orders))]
    if form.repeats == "order":
        free += [f"phi {order}" for order in orders]
    elif form.repeats == "common":
        free += ["phi"] if orders else []
    values["phi"] = float(form.repeats) if form.repeats in (0, 1) else 0.0
    if len(cells) < len(free) + 2:
        raise UserError(
            f"cannot fit {len(free)} constants to {len(cells)} cells (designs at a size and horizon); it "
            f"takes {len(free) + 2}: wait for more records, or run more presets"
        )
    return values, tuple(free), tuple(reasons)


def _start(free: Sequence[str], losses: np.ndarray, alpha: float, beta: float, aspect: float) -> np.ndarray:
    half = math.log(np.ptp(losses) + 0.1)
    values = {
        "E": 0.7 * float(np.min(losses)),
        "log_A": half if "E" in free else math.log(float(np.mean(losses))),
        "alpha": alpha,
        "log_B": half,
        "beta": beta,
        "kappa": 0.05,
        "log_a": math.log(aspect),
        "drift": 0.0,
    }
    return np.array([values.get(name, 0.5) for name in free])


def _solve(model: _Model, losses: np.ndarray, sd: np.ndarray, start: np.ndarray) -> optimize.OptimizeResult:
    low, high = np.array([_BOUNDS[name.split()[0]] for name in model.free]).T
    options: dict[str, Any] = {
        "loss": "huber",
        "f_scale": HUBER,
        "x_scale": "jac",
        "xtol": 1e-6,
        "ftol": 1e-8,
    }
    return optimize.least_squares(
        lambda theta: (model(theta) - losses) / sd,
        np.clip(start, low + 1e-6, high - 1e-6),
        bounds=(low, high),
        **options,
        jac=lambda theta: model.jacobian(theta) / sd[:, None],  # pyright: ignore[reportArgumentType]
    )


def bootstrap(found: Fit, resamples: int = RESAMPLES, seed: int = 0) -> Fit:
    """Adds bootstrap samples of the constants to a fit.

    Every resample is the fitted law with errors of three kinds: seeds, drawn from the deviations of all
    cells from their means (those of one cell are too few: a bootstrap of 3 seeds within cells covers 80 %
    where it says 95); learning rate; and the spread of the cells about the law. Their common scale is drawn
    too, as in a t interval, for the cells may be few.
    """
    cells, generator = found.cells, np.random.default_rng(seed)
    sd, _ = moderated(cells)
    counts = np.array([len(cell.losses) for cell in cells])
    rate = np.sqrt(np.maximum(found.noise**2 - sd**2 / counts, 0))
    pool = np.concatenate([np.zeros(0), *(_deviations(cell, s) for cell, s in zip(cells, sd, strict=True))])
    values = np.array([found.values[name] for name in found.free])
    model = _Model(found.form, cells, found.values, found.free)
    scale, fitted = np.hypot(found.noise, found.spread), model(values)
    degrees, samples = len(cells) - len(found.free), []
    for _ in range(resamples):
        if len(pool):
            drawn = pool[generator.integers(len(pool), size=(len(cells), max(counts)))]
            seeds = np.sum(drawn * (np.arange(max(counts)) < counts[:, None]), axis=1) / counts
        else:
            seeds = np.zeros(len(cells))
        errors = seeds * sd + np.hypot(rate, found.spread) * generator.standard_normal(len(cells))
        errors *= math.sqrt(degrees / generator.chisquare(degrees))
        samples.append(_solve(model, fitted + errors, scale, values).x)
    return dataclasses.replace(found, samples=dict(zip(found.free, np.transpose(samples), strict=True)))


def _deviations(cell: Cell, sd: float) -> np.ndarray:
    """Deviations of the seeds from their mean in standard deviations, with the variance of one seed."""
    n = len(cell.losses)
    if n < 2 or sd == 0:
        return np.zeros(0)
    return (np.array(cell.losses) - cell.loss) / (sd * math.sqrt((n - 1) / n))
