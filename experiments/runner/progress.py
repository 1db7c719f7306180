"""How far a sweep is: which runs its workdir has records of, and whether they are of this sweep at all."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.runner.points import Point, Run
from mobilellm_jax.analysis.records import Record, read_record
from mobilellm_jax.errors import UserError
from mobilellm_jax.runs.directory import check_same, check_workdir
from mobilellm_jax.storage.files import AnyPath, files_below


def record_path(workdir: AnyPath, run: Run) -> AnyPath:
    """Where the record of a run is kept."""
    return workdir / "results" / f"{run.name}.json"


def missing_runs(points: Sequence[Point], workdir: AnyPath) -> dict[str, int]:
    """By the names of points about how many runs are missing of each; every record is read once.

    Raises:
      UserError: `workdir` holds runs of another sweep.
    """
    there: dict[tuple[str, ...], dict[str, Record]] = {}
    for folder in dict.fromkeys(Path(point.name).parent for point in points):
        names = tuple(f"{Path(p.name).name}-" for p in points if Path(p.name).parent == folder)
        for path in files_below(workdir / "results" / folder):
            if path.suffix == ".json" and path.name.startswith(names):
                record = read_record(path)
                there.setdefault((record.study, record.preset, record.point), {})[path.stem] = record
    missing = {}
    for point in points:
        mine = there.get(tuple(point.facts[name] for name in ("study", "preset", "point")), {})
        check_point(point, workdir, mine)
        missing[point.name] = progress(point, mine)[1]
    return missing


def missing_of(point: Point, workdir: AnyPath) -> int:
    """The same of one point, whose records alone are read."""
    return missing_runs([point], workdir)[point.name]


def check_point(point: Point, workdir: AnyPath, there: Mapping[str, Record]) -> None:
    """Checks that what `workdir` holds of a point is of this sweep; `there` are its records by file name.

    Raises:
      UserError: it holds runs with another config, or with a learning rate of another kind.
    """
    if not point.learning_rates:
        known = list(point.comparison_runs(point.config.optimizer.learning_rate))
    else:
        known = [point.tuning_run(rate, 0) for rate in point.learning_rates]
    compared = [r for r in there.values() if r.phase == "comparison" and r.status != "failed"]
    for rate in {record.learning_rate for record in compared}:
        known += point.comparison_runs(rate)
    for record in compared:
        if record.tuning != point.facts["tuning"]:
            raise UserError(
                f"{workdir}: the learning rate of {record.name} is of another kind, {record.tuning!r} "
                f"and not {point.facts['tuning']!r}. Use another --workdir, or delete what is there"
            )
    for run in known:
        record = there.get(Path(run.name).name)
        if record is None or record.status == "failed":
            check_workdir(workdir / "runs" / run.name, run.config)
        if record is not None:
            check_same(record_path(workdir, run), record.config, run.config)


def progress(point: Point, there: Mapping[str, Record]) -> tuple[int, int]:
    """How many runs of a point are done, and about how many are left, given its records."""
    done = [record for record in there.values() if record.status != "failed"]
    compared = sum(record.phase == "comparison" and record.seed < point.seeds for record in done)
    done_runs = compared + sum(record.phase == "tuning" for record in done)
    if compared == point.seeds:
        return done_runs, 0
    return done_runs, max(point.runs - done_runs, point.seeds - compared)
