"""What a sweep prints of its points before it starts, and --list without starting: shapes, costs, pairs."""

from collections import Counter
from collections.abc import Sequence

from experiments.reporting import paper_tables
from experiments.runner.points import Point
from experiments.runner.studies import by_study, pairs_among
from mobilellm_jax.costs import accounting

_HEADER = (
    *("study", "point", "plan", "parameters", "no gains", "paper"),
    *("non-emb.", "FLOPs/token", "tokens", "runs"),
)
_PAPER = _HEADER.index("paper")
_LEFT = 3  # columns of words; the numbers are aligned to the right


def table(points: Sequence[Point]) -> str:
    """The shape and cost of each point, one line for each.

    "no gains" counts parameters without the gains of the norms, as the paper does; "paper" is the count that
    it prints, where the points are rows of the paper.
    """
    names = _names(points)
    rows = [list(_HEADER), *([names[_study(point)], *_row(point)] for point in points)]
    if not any(row[_PAPER] for row in rows[1:]):
        rows = [[*row[:_PAPER], *row[_PAPER + 1 :]] for row in rows]
    return aligned(rows, _LEFT)


def aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """A table as text; the first `left` columns are aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(cells))

    return "\n".join(line(row).rstrip() for row in rows)


def _row(point: Point) -> list[str]:
    c, counts = point.config, accounting.parameters(point.config.model)
    printed = paper_tables.of_preset(point.facts["study"], point.facts["preset"])
    plan = " ".join(map(str, c.model.plan))
    return [
        point.facts["point"],
        plan if len(plan) <= 24 else f"{plan[:14]} ... ({c.model.effective_depth})",
        f"{counts.total:,}",
        f"{counts.as_printed:,}",
        printed[point.facts["point_index"] % len(printed)].printed if printed else "",
        f"{counts.non_embedding:,}",
        f"{point.flops_per_token:.3g}",
        f"{c.train.steps * c.train.batch_size * c.data.sequence_length:,}",
        f"{'about ' if point.learning_rates else ''}{point.runs}",
    ]


def said_to_compare(points: Sequence[Point]) -> str:
    """The pairs that a sweep of these points compares, one line for each study."""
    lines, names = [], _names(points)
    for study, chosen in by_study(points).items():
        said = ", ".join(f"{a!r} with {b!r}" for a, b in pairs_among(chosen))
        compares = f"compares {said}" if said else "one point, so there is nothing to compare"
        lines.append(f"{names[study]}: {compares}")
    return "\n".join(lines)


def said_to_cost(points: Sequence[Point], jobs: int | None) -> str:
    """What the points cost, here with so many side by side (None: as a sweep would) and elsewhere."""
    from experiments.runner.costs import costs, expected_seconds
    from experiments.runner.sweeping import default_jobs

    try:
        jobs = min(jobs or default_jobs(), len(points))
        seconds = expected_seconds([(point, point.runs) for point in points]) / jobs
    except RuntimeError as error:  # a TPU serves one process at a time
        return costs(points, None, f"as its devices cannot be used: {str(error).splitlines()[0]}")
    return costs(points, seconds, f"points side by side: {jobs}, by the rate of matrix products measured now")


def _names(points: Sequence[Point]) -> dict[tuple[str, str], str]:
    """Names of studies, with their presets if one study has several."""
    keys = dict.fromkeys(map(_study, points))
    counts = Counter(study for study, _ in keys)
    return {key: key[0] if counts[key[0]] == 1 else ":".join(key) for key in keys}


def _study(point: Point) -> tuple[str, str]:
    return point.facts["study"], point.facts["preset"]
