"""Text around a figure: what is drawn, the scale of the runs, and the first warning."""

from collections.abc import Iterable

from experiments.reporting import tables
from mobilellm_jax.analysis.comparable import data_card, text_name
from mobilellm_jax.analysis.measures import MEASURES
from mobilellm_jax.analysis.records import span
from mobilellm_jax.analysis.study import Study


def bars(study: Study) -> str:
    """Describes the error bars and the number of seeds; "no run finished" if there are none."""
    estimates = study.verdict.estimates.values()
    if not estimates:
        return "no run finished"
    if all(estimate.n == 1 for estimate in estimates):
        return "no intervals: one seed"
    seeds = span([estimate.n for estimate in estimates], tables.quantity)
    return f"mean and 95 % t interval of {seeds} seeds, every dot a seed"


def measured(study: Study) -> str:
    """The measure with its unit, and what is drawn of it: the line below a title."""
    axis = MEASURES[study.facts.metric].axis
    return f"{axis[0].upper()}{axis[1:]}: {bars(study)}"


def caption(study: Study, first: str = "") -> str:
    """Text below a figure: `first`, the scale of the runs, and the first warning."""
    warnings = study.verdict.warnings
    notes = [first, f"Ours: {_scale(study)}"] if first else [_scale(study)]
    notes += [f"Warning: {warnings[0]}"] if warnings else []
    if len(warnings) > 1:
        more = len(warnings) - 1
        notes.append(f"And {more} more warning{'s' * (more > 1)}, in the report.")
    return "\n".join(notes)


def _scale(study: Study) -> str:
    """Size, horizon and data; hashes, versions and devices are in the report."""
    runs = study.runs
    compared = [run for run in runs if run.phase == "comparison"] or runs
    ended = [run for run in compared if run.status == "finished"] or compared

    def size(values: Iterable[float]) -> str:
        return span(values, tables.quantity)

    return (
        f"{size(r.parameters['non_embedding'] for r in runs)} non-embedding parameters; "
        f"{size(r.tokens_seen for r in ended)} training tokens in {size(r.steps for r in ended)} steps; "
        f"data: {', '.join(sorted({text_name(data_card(r)) for r in ended}))}. {tables.head(study)[1]}"
    )
