"""The regime of a study: whether its designs are past n-gram counts, and use what is far back in the row.

Where a trigram counted on the same tokens is better than a model, or its loss is flat beyond a few tokens,
its architecture has nothing to do yet: a comparison shows how fast each design learns to count neighbours.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mobilellm_jax.analysis.facts import Facts, Point
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.records import Record, span

CONTEXT = 8  # tokens; a trigram reads 2
FLAT = 0.01  # nats per token; context beyond `CONTEXT` tokens that is worth less counts as unused
_MANY = 6  # labels that a warning names
NGRAMS = ("unigram", "bigram", "trigram")


@dataclasses.dataclass(frozen=True)
class Regime:
    """Where a design stands, in nats per token, as means over its finished comparison runs that say so.

    Attributes:
      loss: final held-out loss.
      floor: loss of n-grams counted on the same training rows: "unigram", "bigram", "trigram"; {} if not
        counted.
      tokens: training tokens that they were counted on; 0 if not counted.
      by_position: last position of each bin, counted from 1 -> loss; {} if not measured.
      near: loss at the last bin up to `CONTEXT` tokens; None if not measured.
      far: mean loss of all targets beyond; None if not measured, or if the rows are not longer.
    """

    loss: float
    floor: dict[str, float]
    tokens: int
    by_position: dict[int, float]
    near: float | None
    far: float | None

    @property
    def above_trigram(self) -> bool:
        return bool(self.floor) and self.loss > self.floor["trigram"]

    @property
    def is_flat(self) -> bool:
        return self.near is not None and self.far is not None and self.far > self.near - FLAT


def regimes(facts: Facts, points: Mapping[str, Point]) -> dict[str, Regime]:
    """The regime of every point with a finished comparison run; {} for synthetic tasks, see `saturation`."""
    if facts.metric != "loss" or any(run.measures for of in points.values() for run in of.finished):
        return {}
    return {label: _regime(point.finished) for label, point in points.items() if point.finished}


def _regime(runs: Sequence[Record]) -> Regime:
    floors = [run.floor for run in runs if run.floor is not None]
    places = [run.by_position for run in runs if run.by_position is not None]
    floor = {name: _mean([of_run[name] for of_run in floors]) for name in NGRAMS} if floors else {}
    tokens = int(max((of_run["tokens"] for of_run in floors), default=0))
    loss = _mean([run.loss for run in runs])
    if not places:
        return Regime(loss, floor, tokens, {}, None, None)
    losses = np.mean([np.array(of_run["loss"], float) for of_run in places], axis=0)
    ends, targets = np.array(places[0]["to"], int), np.array(places[0]["targets"], float)  # as in all runs
    ends, losses, targets = ends[targets > 0], losses[targets > 0], targets[targets > 0]
    beyond = ends > CONTEXT
    near = float(losses[~beyond][-1]) if not beyond.all() else None
    far = float(np.average(losses[beyond], weights=targets[beyond])) if beyond.any() else None
    return Regime(loss, floor, tokens, dict(zip(ends.tolist(), losses.tolist(), strict=True)), near, far)


def warnings(found: Mapping[str, Regime]) -> Iterator[str]:
    """Says whether architecture can be judged; nothing where it can, or where there are no regimes."""
    reasons = list(filter(None, (_above(found), _flat(found))))
    if reasons:
        yield f"Architecture cannot be judged here: {'; '.join(reasons)}."
    unknown = [label for label, regime in found.items() if not regime.floor]
    if unknown:
        which = "" if len(unknown) == len(found) else f" for {', '.join(map(repr, unknown))}"
        yield f"The n-gram floor was not counted{which}: whether architecture can show here is not known."


def saturation(facts: Facts, points: Mapping[str, Point]) -> Iterator[str]:
    """Says that a task's measure cannot tell designs apart: all at its best value, or all at nothing learned.

    At means within the smallest difference that matters.
    """
    finished = {label: point.finished for label, point in points.items() if point.finished}
    runs = [run for of in finished.values() for run in of]
    known = [run.measures for run in runs if run.measures is not None]
    if not known or len(known) < len(runs):
        return
    means = [_mean([run.score for run in of]) for of in finished.values()]
    measure = MEASURES[facts.metric]
    values = span(map(measure.shown, means), lambda value: f"{value:.{measure.digits}f}")
    for name, where in (("ceiling", "reach the best there is"), ("floor", "are no better than a guess")):
        ends = [of[name][facts.metric] for of in known if facts.metric in of[name]]
        if len(ends) < len(known):
            continue
        past = [mean <= max(ends) + facts.margin for mean in means]
        if name == "floor":
            past = [mean >= min(ends) - facts.margin for mean in means]
        if all(past):
            end = measure.shown(_mean(ends))
            yield (
                f"Cannot tell designs apart here: all {len(means)} designs {where}, "
                f"{end:.{measure.digits}f} in {measure.axis}, to within what matters ({values})."
            )


def _above(found: Mapping[str, Regime]) -> str:
    above = {label: regime for label, regime in found.items() if regime.above_trigram}
    if not above:
        return ""
    losses, floors = [r.loss for r in above.values()], [r.floor["trigram"] for r in above.values()]
    return (
        f"a trigram counted on the same training tokens ({span(floors, _show)} nats) is better than "
        f"{_names(above, found)} ({span(losses, _show)})"
    )


def _flat(found: Mapping[str, Regime]) -> str:
    flat = {label: regime for label, regime in found.items() if regime.is_flat}
    said = f"context beyond {CONTEXT} tokens is worth less than {FLAT:g} nats per token to"
    return f"{said} {_names(flat, found)}" if flat else ""


def _names(some: Mapping[str, Regime], found: Mapping[str, Regime]) -> str:
    """All of them, or their labels; of many, how many, as the table of floors names them."""
    if len(some) == len(found) > 1:
        return f"all {len(found)} designs"
    return ", ".join(map(repr, some)) if len(some) <= _MANY else f"{len(some)} of {len(found)} designs"


def _show(loss: float) -> str:
    return f"{loss:.3f}"


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
