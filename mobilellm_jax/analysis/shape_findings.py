"""What the records of a study of shape say together: cells, laws, predictions of sizes left out."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mobilellm_jax.analysis import rate_line, shape_law
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
from mobilellm_jax.analysis.shape_law import COMMON, DRIFTS, FORMS, LAW, Fit
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
        others = shape_law.fit(rest, found.form, found.values)
    except UserError as error:
        return Prediction(size, (), np.zeros(0), str(error))
    return Prediction(size, held, np.array([cell.loss for cell in held]) - others.predict(held))


def judged_sizes(cells: Sequence[Cell]) -> list[str]:
    """Sizes whose prediction from the others judges a form: the third smallest and all above it."""
    return sorted({cell.size for cell in cells}, key=lambda size: size_of(cells, size))[2:]


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
      law, common, drifting: with bootstrap samples; None where it could not be fitted.
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
    drifting: Fit | None
    refused: str
    predictions: dict[str, dict[str, Prediction]]
    missing: list[str]

    @property
    def sizes(self) -> list[str]:
        return list(dict.fromkeys(cell.size for cell in self.cells))

    @property
    def arms(self) -> list[str]:
        """The arm that is fitted first."""
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

    def score(self, form: str) -> float | None:
        """Root mean square error of the predicted sizes that judge a form; None if one has no prediction."""
        found = [self.predictions.get(form, {}).get(size) for size in self.judged]
        if not found or any(one is None or one.absent for one in found):
            return None
        errors = np.concatenate([one.errors for one in found if one is not None])
        return float(np.sqrt(np.mean(errors**2)))


def findings_of(
    records: Sequence[Record],
    resamples: int = shape_law.RESAMPLES,
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
    law, common, drifting = (
        shape_law.bootstrap(fits[form.name], resamples) if form.name in fits else None
        for form in (LAW, COMMON, DRIFTS)
    )
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
        drifting,
        refused,
        predictions,
        missing,
    )


def _fits(cells: Sequence[Cell]) -> tuple[dict[str, Fit], str]:
    """Fits by name of the form, without those that equal the law for want of cells; why there is no law."""
    fits: dict[str, Fit] = {}
    try:
        law = fits[LAW.name] = shape_law.fit(cells, LAW)
    except UserError as error:
        return fits, str(error)
    for form in FORMS[1:]:
        try:
            found = shape_law.fit(cells, form, law.values)
        except UserError:  # it has more constants than the law, and there are too few cells for them
            continue
        if {*found.free} != {*law.free} or (form.shape == "plus" and "kappa" in found.free):
            fits[form.name] = found
    return fits, ""
