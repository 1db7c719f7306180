"""What the workdir of a sweep has, lacks, and is at work on. Nothing there is changed."""

from collections.abc import Mapping, Sequence

from experiments.runner import leases
from experiments.runner.listing import aligned
from experiments.runner.points import Point
from experiments.runner.progress import Progress, check_point, progress
from experiments.runner.rates import search_of
from experiments.runner.studies import by_study
from mobilellm_jax.analysis.records import Record
from mobilellm_jax.storage.files import AnyPath

_HEADER = ("point", "search", "learning rate", "seeds done", "runs left", "at work")


def status(points: Sequence[Point], workdir: AnyPath) -> str:
    """A table for each study, a line for each point, and the sums over all.

    Raises:
      UserError: `workdir` holds runs of another sweep, or a record is corrupt.
    """
    there = Progress(points, workdir)
    records, rates, held = there.records(), there.rates(), leases.seen(workdir / leases.IN_WORKDIR)
    for point in points:
        check_point(point, workdir, records[point.name])
    lines, at_work = list[str](), 0
    for (study, preset), of_study in by_study(points).items():
        rows = [_row(point, records[point.name], rates, held) for point in of_study]
        at_work += sum(bool(row[-1]) for row in rows)
        lines += [f"{study}:{preset}", aligned([_HEADER, *rows], left=2), ""]
    counts = [progress(point, records[point.name]) for point in points]
    done, left = (sum(numbers) for numbers in zip(*counts, strict=True))
    states = [record.status for of_point in records.values() for record in of_point.values()]
    bad = ", ".join(f"{states.count(word)} {word}" for word in ("failed", "diverged") if word in states)
    lines.append(
        f"{workdir}: {done} of about {done + left} runs are done{f' ({bad})' if bad else ''}, about {left} "
        f"are missing; {at_work} of {len(points)} points are being worked on"
    )
    return "\n".join(lines)


def _row(
    point: Point,
    records: Mapping[str, Record],
    rates: Mapping[str, float],
    held: Mapping[str, tuple[str, float]],
) -> tuple[str, ...]:
    tried = sum(record.phase == "tuning" and record.status != "failed" for record in records.values())
    compared = [r for r in records.values() if r.phase == "comparison" and r.seed < point.seeds]
    finished = sum(record.status == "finished" for record in compared)
    search, rate = "none", f"{point.config.optimizer.learning_rate:.3g}"
    if point.learning_rates:
        is_over = search_of(point, records)[1] is None
        search = f"{tried} tried, {'over' if is_over else 'goes on'}"
        rate = f"{rates[point.name]:.3g}" if point.name in rates else "not fitted"
    workers = [
        f"{phase.strip() or 'comparison'} by {worker}, {age:.0f} s ago"
        for phase in (" tuning", "")
        if (lease := held.get(leases.shown(f"{point.name}{phase}")))
        for worker, age in [lease]
    ]
    left = progress(point, records)[1]
    label = str(point.facts["point"])
    return label, search, rate, f"{finished}/{point.seeds}", f"{left}", "; ".join(workers)
