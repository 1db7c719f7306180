"""Does an ability predict text? Its correlation with the loss on text, over the designs that both have."""

import math
from collections.abc import Hashable, Iterable, Mapping

import numpy as np

from mobilellm_jax.analysis.facts import Point
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.study import Study

TEXT = "shape_laws"  # its presets are sizes and horizons
LEAST = 4  # designs; of 3, the interval of a correlation is not known
NOTE = (
    "Correlation of means over designs of equal shape and plan, trained as long as the shortest of their "
    "study; positive where a design that is better at the ability is better on text too. In brackets a 95 % "
    "interval (Fisher's z) from the choice of designs alone: the noise of the means is not in it."
)
_SHAPE = ("width", "num_heads", "num_kv_heads", "ffn_width")


def lines(of_size: Mapping[str, Study], studies: Iterable[Study]) -> list[str]:
    """A line for each ability and study of text that have designs in common, in order."""
    texts = [study for study in studies if study.facts.study == TEXT and study.facts.metric == "loss"]
    found = (_line(ability, study, text) for ability, study in of_size.items() for text in texts)
    return [line for line in found if line]


def correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Pearson's correlation of at least 4 pairs, and its 95 % interval by Fisher's z."""
    r = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
    if abs(r) == 1:
        return r, r, r
    half = 1.959964 / math.sqrt(len(x) - 3)
    return r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)


def _line(ability: str, study: Study, text: Study) -> str:
    ours, theirs = _means(study), _means(text)
    common = [design for design in ours if design in theirs]
    name = f"{ability} ({MEASURES[study.facts.metric].what}) and the loss on text ({text.facts.preset})"
    if not common:
        return ""
    if len(common) < LEAST:
        return f"{name}: {len(common)} common designs, too few for a correlation (at least {LEAST})."
    x, y = (np.array([of[design] for design in common]) for of in (ours, theirs))
    r, low, high = correlation(x, y)
    return f"{name}: {r:+.2f} [{low:+.2f}, {high:+.2f}] over {len(common)} designs."


def _means(study: Study) -> dict[Hashable, float]:
    """Mean of the metric by design, of one arm; longer trainings are left out."""
    points = [point for point in study.points.values() if point.arm in ("completep", None) and point.scores]
    shortest = min((_steps(point) for point in points), default=0)
    return {
        _design(point): study.verdict.estimates[point.label].mean
        for point in points
        if _steps(point) == shortest
    }


def _steps(point: Point) -> int:
    return point.config["train"]["steps"]


def _design(point: Point) -> Hashable:
    return tuple(point.layer_plan), *(point.config["model"][name] for name in _SHAPE)
