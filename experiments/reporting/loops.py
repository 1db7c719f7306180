"""Table and figure of a study's designs with other numbers of loops than in training."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.reporting import captions, drawing, placing
from experiments.reporting.drawing import styled
from experiments.reporting.tables import Columns
from mobilellm_jax.analysis.loops import Looped, looped
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.statistics import Estimate
from mobilellm_jax.analysis.study import Study

LOOPS = (
    "The same weights with each block applied another number of times; a star marks the number of training. "
    "Multipliers of the residual branches stay those of training. Means over the seeds, ± a 95 % t interval; "
    "accuracies by level are in percent."
)


def table(study: Study) -> Columns:
    """One row for each design and number of loops; {} if no run was scored so."""
    found = looped(study.points, study.facts.metric)
    if not found:
        return {}
    metric = study.facts.metric
    columns: Columns = {
        "point": [of.point for of in found],
        "loops": [f"{of.count}{' *' if of.count == of.trained else ''}" for of in found],
        "layers": [str(of.layers) for of in found],
        "seeds": [str(of.loss.n) for of in found],
        "loss": [_estimate(of.loss, 1, 4) for of in found],
    }
    if metric != "loss":
        measure = MEASURES[metric]
        columns[measure.column] = [_shown(of.value, metric) for of in found]
    for level, name in _levels(found):
        columns[f"{level} {name}"] = [_accuracy(of, level) for of in found]
    return columns


def _shown(of: Estimate | None, metric: str) -> str:
    measure = MEASURES[metric]
    if of is None:
        return ""
    mean, half = measure.shown(of.mean), of.half_width
    shown = Estimate(of.n, mean, None if half is None else measure.scale * half)
    return _estimate(shown, 1, measure.digits)


def _estimate(of: Estimate, scale: int, digits: int) -> str:
    half = "" if of.half_width is None else f" ± {scale * of.half_width:.{digits}f}"
    return f"{scale * of.mean:.{digits}f}{half}"


def _levels(found: Sequence[Looped]) -> list[tuple[int, str]]:
    """All levels that were measured, with what they count."""
    return sorted({(level, of.levels["name"]) for of in found if of.levels for level in of.levels["level"]})


def _accuracy(of: Looped, level: int) -> str:
    if of.levels is None or level not in of.levels["level"]:
        return ""
    return f"{100 * of.levels['accuracy'][of.levels['level'].index(level)]:.1f}"


@styled
def draw(study: Study) -> Figure | None:
    """Draws the loss, and right answers at the highest level, against loops: a line for each design."""
    found = looped(study.points, study.facts.metric)
    if not found:
        return None
    points, hardest = list(dict.fromkeys(of.point for of in found)), _levels(found)[-1:]
    order = list(study.points)
    looks = {point: drawing.look(order.index(point)) for point in points}
    height, count = max(2.4, placing.labels_height(points)), 1 + len(hardest)
    subtitle = "Means over the seeds by number of loops; ring: as many as in training"
    figure = drawing.framed(_answer(found), subtitle, captions.caption(study), count * (height + 0.6))
    axes = figure.subplots(count, 1, squeeze=False)[:, 0]
    ends: list[dict[str, tuple[float, float]]] = [{} for _ in axes]
    for point in points:
        mine = [of for of in found if of.point == point]
        values = [[of.loss.mean for of in mine]]
        values += [[float(_accuracy(of, level) or "nan") for of in mine] for level, _ in hardest]
        for panel, of_panel, end in zip(axes, values, ends, strict=True):
            _line(panel, mine, of_panel, looks[point])
            end[point] = mine[-1].count, of_panel[-1]
    axes[0].set_ylabel("held-out loss (nats per token)")
    for level, name in hardest:
        axes[1].set_ylabel(f"right answers, {level} {name} (%)")
    for panel, end in zip(axes, ends, strict=True):
        panel.set_xlabel("loops")
        drawing.log_axis(panel, sorted({float(of.count) for of in found}))
        placing.label_ends(panel, {p: e for p, e in end.items() if e[1] == e[1]}, looks, height)
    return figure


def _answer(found: Sequence[Looped]) -> str:
    """How many designs score best with the loops of training."""
    best: dict[str, Looped] = {}
    for of in found:
        if of.point not in best or of.loss.mean < best[of.point].loss.mean:
            best[of.point] = of
    same = [of for of in best.values() if of.count == of.trained]
    return f"{len(same)} of {len(best)} designs have their lowest loss with as many loops as in training"


def _line(axes: Axes, of_point: Sequence[Looped], values: Sequence[float], look: dict[str, Any]) -> None:
    axes.plot([of.count for of in of_point], values, **look, ms=5, lw=1.5)
    for of, value in zip(of_point, values, strict=True):
        if of.count == of.trained:
            axes.plot(of.count, value, "o", ms=13, mfc="none", mew=1.8, color=look["color"])
