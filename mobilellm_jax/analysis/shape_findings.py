"""What the records of a study of shape say together: cells, laws, predictions of sizes left out."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mobilellm_jax.analysis import rate_line, shape_fit
from mobilellm_jax.analysis.cells import (
    Cell,
    Difference,
    Trend,
    cells_of,
    differences,
    moderated,
    size_of,
    trends,
)
from mobilellm_jax.analysis.rate_line import RateLine
from mobilellm_jax.analysis.records import Record
from mobilellm_jax.analysis.shape_fit import Fit, bootstrap, leave_presets_out
from mobilellm_jax.analysis.shape_law import FORMS, LAW, N0, SHAPES, T0
from mobilellm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Cells of one size, predicted from all others.

    Attributes:
      errors: loss minus prediction, by cell.
      absent: why there is no prediction; "" if there is one.
    """

    size: str
    cells: tuple[Cell, ...]
    errors: np.ndarray
    absent: str = ""

    @property
    def error(self) -> float:
        """Root mean square, nats per token."""
        return float(np.sqrt(np.mean(self.errors**2)))


def leave_out(found: Fit, size: str) -> Prediction:
    """Predicts the cells of one size from those of all other sizes, as far as their orders were seen there.

    `found` is the fit to all cells: its form is fitted anew, and its constants are where that starts.
    """
    cells = found.cells
    rest = [cell for cell in cells if cell.size != size]
    orders = {cell.order for cell in rest}
    held = tuple(cell for cell in cells if cell.size == size and cell.order in orders)
    if not held:
        return Prediction(size, (), np.zeros(0), "no cell has an order that other sizes have")
    try:
        others = shape_fit.fit(rest, found.form, found.values)
    except UserError as error:
        return Prediction(size, (), np.zeros(0), str(error))
    return Prediction(size, held, np.array([cell.loss for cell in held]) - others.predict(held))


def judged_sizes(cells: Sequence[Cell]) -> list[str]:
    """Sizes whose prediction from the others judges a form: the third smallest and all above it."""
    return sorted({cell.size for cell in cells}, key=lambda size: size_of(cells, size))[2:]


def rms(predictions: Mapping[str, Prediction], sizes: Sequence[str]) -> float | None:
    """Root mean square error of all cells of the sizes, nats; None without a prediction of each."""
    found = [predictions[size] for size in sizes if size in predictions and not predictions[size].absent]
    if not sizes or len(found) < len(sizes):
        return None
    return float(np.sqrt(np.mean(np.concatenate([one.errors for one in found]) ** 2)))


class BestAspect(NamedTuple):
    """The best width over layers.

    Attributes:
      is_inside: whether its interval lies within the ratios tried.
      where: at which size and horizon, as " at 100k parameters"; "" where it is the same at all.
    """

    value: float
    interval: tuple[float, float]
    is_inside: bool
    where: str

    @property
    def text(self) -> str:
        return f"{self.value:.3g} [{self.interval[0]:.3g}, {self.interval[1]:.3g}]"


class Worth(NamedTuple):
    """What a repeat is worth in one order, or in all: the exponent of the number of uses."""

    name: str
    phi: float
    interval: tuple[float, float] | None

    @property
    def blocks(self) -> str:
        """How many blocks one used twice counts as, with the interval, if there is one."""
        ends = "" if self.interval is None else " [{:.2f}, {:.2f}]".format(*(2**end for end in self.interval))
        return f"{2**self.phi:.2f}{ends}"


@dataclasses.dataclass(frozen=True)
class Findings:
    """Findings of a study of shape.

    Attributes:
      study: its name.
      margin: the smallest difference that matters.
      cells: all, of all arms.
      fitted: those that the law is fitted to: of the arm with the most cells, without diverged runs.
      rates: the line through the optima of that arm, which says what rates not tuned may cost; None if there
        are too few.
      differences, trends: see `cells.differences` and `cells.trends`.
      law: in the form of `SHAPES` that predicts the judged sizes best, with bootstrap samples and presets
        left out; None where it could not be fitted.
      common: the same with one exponent for all orders.
      refused: why there is no law; "" if there is one.
      predictions: by name of the form, then by size left out.
      missing: what the study lacks so far, one sentence each.
    """

    study: str
    margin: float
    cells: list[Cell]
    fitted: list[Cell]
    rates: RateLine | None
    differences: list[Difference]
    trends: list[Trend]
    law: Fit | None
    common: Fit | None
    refused: str
    predictions: dict[str, dict[str, Prediction]]
    missing: list[str]

    @property
    def sizes(self) -> list[str]:
        return list(dict.fromkeys(cell.size for cell in self.cells))

    @property
    def arms(self) -> list[str]:
        """All arms, the one that is fitted first."""
        return list(dict.fromkeys([cell.arm for cell in self.fitted] + [cell.arm for cell in self.cells]))

    @property
    def judged(self) -> list[str]:
        """Sizes whose prediction from the others judges a form, see `judged_sizes`."""
        return judged_sizes(self.fitted)

    @property
    def noise(self) -> float:
        """Root mean square standard error of the cell means from the seeds alone, nats."""
        sd, _ = moderated(self.fitted)
        return float(np.sqrt(np.mean(sd**2 / [len(cell.losses) for cell in self.fitted])))

    @property
    def best_aspect(self) -> BestAspect | None:
        """At `N0` parameters and `T0` tokens; None where the loss is not surely curved over log(D/L)."""
        law = self.law
        if law is None or "log_a" not in law.free or (ends := law.optimum_interval(N0, T0)) is None:
            return None
        tried = [cell.aspect for cell in self.fitted]
        places = {"drift": f" at {N0 / 1e3:.0f}k parameters", "drift_T": f" at {T0 / 1e6:.0f}M tokens"}
        where = "".join(place for name, place in places.items() if name in law.free)
        return BestAspect(law.optimum(N0, T0), ends, min(tried) <= ends[0] and ends[1] <= max(tried), where)

    @property
    def worth(self) -> list[Worth]:
        """For each order, and last for all alike."""
        if self.law is None or not self.law.orders:
            return []
        each = [(order, f"phi {order}", self.law) for order in self.law.orders]
        common = [("all orders alike", "phi", self.common)] if self.common is not None else []
        return [Worth(name, fit.values[phi], fit.interval(phi)) for name, phi, fit in (*each, *common)]

    @property
    def changing(self) -> tuple[list[Trend], int]:
        """Differences that change with the horizon though the law has them constant, and how many could.

        Of the arm that is fitted, between designs of as many tokens; Bonferroni at 5 %. A law in which the
        best ratio drifts with tokens has none of them constant.
        """
        if self.law is not None and self.law.form.shape == "tokens":
            return [], 0
        tested = [trend for trend in self.trends if trend.arm == self.arms[0] and trend.equal_tokens]
        return [trend for trend in tested if trend.p_constant < 0.05 / len(tested)], len(tested)

    def nearer(self, form: str) -> tuple[int, int]:
        """How many of the judged cells a form predicts better than the law, and how many there are."""
        ours, theirs = (
            np.concatenate([self.predictions[name][size].errors for size in self.judged])
            for name in (LAW.name, form)
        )
        return int(np.sum(np.abs(theirs) < np.abs(ours))), len(ours)

    def score(self, form: str) -> float | None:
        """Root mean square error of the predicted sizes that judge a form; None if one has no prediction."""
        return rms(self.predictions.get(form, {}), self.judged)


def findings_of(
    records: Sequence[Record],
    resamples: int = shape_fit.RESAMPLES,
    planned: Sequence[str] = (),
) -> Findings:
    """Analyses the records of one study, at whatever presets have any.

    Args:
      records: of all its presets.
      resamples: of each bootstrap.
      planned: the presets that the study is to have, as in `cells_of`.

    Raises:
      UserError: runs cannot be compared, or there is no finished comparison run.
    """
    cells, missing = cells_of(records, planned)
    study = records[0].study
    if not cells:
        raise UserError(f"{study}: no finished comparison run yet; wait for the sweep to finish a point")
    arms = [cell.arm for cell in cells]
    arm = max(dict.fromkeys(arms), key=arms.count)
    rates = rate_line.fit([cell for cell in cells if cell.arm == arm])
    cells = rate_line.carried(cells, arm, rates) if rates else cells
    fitted = [cell for cell in cells if cell.arm == arm and not cell.diverged]
    fits, refused = _fits(fitted)
    sizes = dict.fromkeys(cell.size for cell in fitted)
    predictions = {name: {size: leave_out(found, size) for size in sizes} for name, found in fits.items()}
    law = common = None
    if fits:
        scores = {name: rms(of, judged_sizes(fitted)) for name, of in predictions.items()}
        used = min((form for form in SHAPES if form.name in fits), key=lambda f: scores[f.name] or math.inf)
        law = leave_presets_out(bootstrap(fits[used.name], resamples))
        if law.orders:
            alike = dataclasses.replace(used, repeats="common")
            common = bootstrap(shape_fit.fit(fitted, alike, law.values), resamples)
    compared = differences(cells)
    return Findings(
        study,
        max(record.margin for record in records),
        cells,
        fitted,
        rates,
        compared,
        trends(compared),
        law,
        common,
        refused,
        predictions,
        missing,
    )


def _fits(cells: Sequence[Cell]) -> tuple[dict[str, Fit], str]:
    """Fits by name of the form, without those that equal the law for want of cells; why there is no law."""
    fits: dict[str, Fit] = {}
    try:
        law = fits[LAW.name] = shape_fit.fit(cells, LAW)
    except UserError as error:
        return fits, str(error)
    for form in FORMS[1:]:
        try:
            found = shape_fit.fit(cells, form, law.values)
        except UserError:  # it has more constants than the law, and there are too few cells for them
            continue
        if {*found.free} != {*law.free} or (form.shape == "plus" and "kappa" in found.free):
            fits[form.name] = found
    return fits, ""
