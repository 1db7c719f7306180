"""Names of small twins of published models, as readers see them: "twin of MobileLLM-1B".

A study that shrinks published models labels its points with their names, and these are part of the names of
its records. A figure that says "MobileLLM-1B" of a model of half a million parameters would misinform.
"""

import dataclasses
import re
from collections.abc import Sequence

from mobilellm_jax.analysis.records import Record

_PUBLISHED = re.compile(r"[A-Za-z]\w*-(?:\w+-)*(\d+(?:\.\d+)?)([MB])")  # "MobileLLM-LS-125M"
_UNIT = {"M": 1e6, "B": 1e9}


def named(records: Sequence[Record]) -> list[Record]:
    """The records of one study, with every point that is far smaller than its name says called a twin."""
    twins = {run.point: run.point.replace(name, f"twin of {name}") for run in records if (name := _of(run))}
    if not twins:
        return list(records)
    return [
        dataclasses.replace(
            run,
            point=twins.get(run.point, run.point),
            design=run.design and (f"twin of {run.design}" if run.point in twins else run.design),
            pairs=[[twins.get(label, label) for label in pair] for pair in run.pairs],
        )
        for run in records
    ]


def _of(run: Record) -> str | None:
    """The published name of a run with less than half of the parameters that the name gives."""
    name = run.design or run.point
    found = _PUBLISHED.fullmatch(name)
    if found is None or name not in run.point:
        return None
    return name if 2 * run.parameters["total"] < float(found[1]) * _UNIT[found[2]] else None
