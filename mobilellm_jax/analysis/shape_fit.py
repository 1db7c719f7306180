"""Fits of the law of shape: Huber least squares, bootstrap intervals, and fits with each preset left out."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import optimize

from mobilellm_jax.analysis.cells import Cell, moderated, size_of
from mobilellm_jax.analysis.shape_law import BOUNDS, LAW, N0, T0, Form, Model
from mobilellm_jax.errors import UserError

RESAMPLES, LEVEL = 400, 0.95
HUBER = 1.345  # standard deviations from where on a residual counts by its size, not by its square


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted form.

    Attributes:
      values: constants by name, fixed ones included: E, log_A, alpha (at `N0` parameters), log_B, beta (at
        `T0` tokens), kappa, log_a (at both), their changes with log N or log T (drift, drift_T, kappa_T),
        and phi by order as "phi immediate", or "phi" if common.
      free: names of the fitted ones.
      samples: of the fitted ones by name, from the bootstrap; {} before `bootstrap`.
      without: lowest and highest value of the fitted ones by name, with each preset left out once; {} before
        `leave_presets_out`.
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
    without: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

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
        low, high = BOUNDS[name.split()[0]]
        room = 1e-3 * (high - low)
        return ends is not None and (ends[0] < low + room or ends[1] > high - room)

    def optimum(self, parameters: float, tokens: float) -> float:
        """Best D/L at a size and horizon; without meaning where `optimum_interval` is None."""
        v = self.values
        return float(np.exp(v["log_a"] + self._drift(v, parameters, tokens)))

    def optimum_interval(self, parameters: float, tokens: float) -> tuple[float, float] | None:
        """Percentile interval of `optimum`; None without samples, or if over 5 % of them curve downwards."""
        if "log_a" not in self.samples:
            return None
        samples = {**self.values, **self.samples}
        curvature = samples["kappa"] + samples["kappa_T"] * math.log(tokens / T0)
        if np.mean(curvature <= 0) > 1 - LEVEL:
            return None
        best = samples["log_a"] + self._drift(samples, parameters, tokens)
        low, high = np.quantile(best, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(np.exp(low)), float(np.exp(high))

    @staticmethod
    def _drift(values: Mapping[str, Any], parameters: float, tokens: float) -> Any:
        return values["drift"] * math.log(parameters / N0) + values["drift_T"] * math.log(tokens / T0)

    def curve(self, cell: Cell, aspects: np.ndarray) -> np.ndarray:
        """Losses of designs with the parameters, tokens and uses of `cell` at other ratios D/L."""
        theta = np.array([self.values[name] for name in self.free])
        model = Model(self.form, [cell] * len(aspects), self.values, self.free)
        model.aspect = np.log(aspects)
        return model(theta)

    def predict(self, cells: Sequence[Cell]) -> np.ndarray:
        """Losses of cells."""
        theta = np.array([self.values[name] for name in self.free])
        return Model(self.form, cells, self.values, self.free)(theta)


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
    # The cost c e^2 of a normal error e has mean m and variance 2 m^2; the mean is not subtracted.
    rate = math.sqrt(3) * np.array([cell.rate_excess for cell in cells])
    noise = np.sqrt(sd**2 / [len(cell.losses) for cell in cells] + rate**2)
    losses = np.array([cell.loss for cell in cells])
    model = Model(form, cells, values, free)
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
        "drift_T": 0.0,
        "kappa_T": 0.0,
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
            free += ["kappa", "log_a"]
            if form.shape == "drifts":
                free += ["drift"] * (len(several) > 1)
                reasons += ["no drift of the optimum: one size has three aspect ratios"] * (len(several) < 2)
            if form.shape == "tokens":
                free += ["drift_T", "kappa_T"] * (len(horizons) > 1)
                reasons += ["no drift with tokens: there is one horizon"] * (len(horizons) < 2)
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
        "drift_T": 0.0,
        "kappa_T": 0.0,
    }
    return np.array([values.get(name, 0.5) for name in free])


def _solve(model: Model, losses: np.ndarray, sd: np.ndarray, start: np.ndarray) -> optimize.OptimizeResult:
    low, high = np.array([BOUNDS[name.split()[0]] for name in model.free]).T
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
    too, as in a t interval, for the cells may be few. Errors of different cells are independent: what moves a
    preset as a whole is in `leave_presets_out`.
    """
    cells, generator = found.cells, np.random.default_rng(seed)
    sd, _ = moderated(cells)
    counts = np.array([len(cell.losses) for cell in cells])
    rate = np.sqrt(np.maximum(found.noise**2 - sd**2 / counts, 0))
    pool = np.concatenate([np.zeros(0), *(_deviations(cell, s) for cell, s in zip(cells, sd, strict=True))])
    values = np.array([found.values[name] for name in found.free])
    model = Model(found.form, cells, found.values, found.free)
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


def leave_presets_out(found: Fit) -> Fit:
    """Adds the lowest and highest value of each constant over fits without one preset (size and horizon)."""
    values: dict[str, list[float]] = {}
    for preset in dict.fromkeys(cell.preset for cell in found.cells):
        try:
            rest = fit([cell for cell in found.cells if cell.preset != preset], found.form, found.values)
        except UserError:  # too few are left
            continue
        for name in rest.free:
            values.setdefault(name, []).append(rest.values[name])
    return dataclasses.replace(found, without={name: (min(of), max(of)) for name, of in values.items()})


def _deviations(cell: Cell, sd: float) -> np.ndarray:
    """Deviations of the seeds from their mean in standard deviations, with the variance of one seed."""
    n = len(cell.losses)
    if n < 2 or sd == 0:
        return np.zeros(0)
    return (np.array(cell.losses) - cell.loss) / (sd * math.sqrt((n - 1) / n))
