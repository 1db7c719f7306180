"""How far a sweep is: which runs its workdir has records of, and whether they belong to this sweep."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from experiments.runner.points import Point, Run
from mobilellm_jax.analysis import comparable
from mobilellm_jax.analysis.records import Record, read_record
from mobilellm_jax.errors import UserError
from mobilellm_jax.runs.directory import check_data, check_same, check_workdir, read_config
from mobilellm_jax.storage.files import AnyPath, files_below

T = TypeVar("T")


def record_path(workdir: AnyPath, run: Run) -> AnyPath:
    return workdir / "results" / f"{run.name}.json"


def finished_records(point: Point, workdir: AnyPath) -> dict[str, Record]:
    """Records of the comparison runs of a point that finished, by the run's name."""
    paths = {name: workdir / "results" / f"{name}.json" for name in point.run_names()}
    records = {name: read_record(path) for name, path in paths.items() if path.exists()}
    return {name: record for name, record in records.items() if record.status == "finished"}


class Progress:
    """The records of some points and their studies in a workdir: each is read once, by process 0 alone."""

    def __init__(self, points: Sequence[Point], workdir: AnyPath):
        self._points, self._workdir = points, workdir
        self._records: dict[AnyPath, Record] = {}

    def missing(self) -> dict[str, int]:
        """About how many runs of each point are missing, by the point's name; its own records alone are read.

        Raises:
          UserError: in all processes, where `workdir` holds runs of another sweep.
        """
        return _of_first(self._missing)

    def check_data(self, cards: Mapping[Path, Iterable[dict[str, Any]]]) -> None:
        """Checks the data cards of studies, given by folder, against all records and runs of these studies.

        Raises:
          UserError: in all processes, where one was made with other data.
        """
        _of_first(lambda: self._check_data(cards))

    def records(self) -> dict[str, dict[str, Record]]:
        """The records of each point, by its name and then by file name; read by the process that calls."""
        there: dict[tuple[str, ...], dict[str, Record]] = {}
        for study in dict.fromkeys(Path(point.name).parent for point in self._points):
            names = tuple(f"{Path(p.name).name}-" for p in self._points if Path(p.name).parent == study)
            for path, record in self._read(study, names):
                there.setdefault((record.study, record.preset, record.point), {})[path.stem] = record
        return {
            point.name: there.get((point.facts["study"], point.facts["preset"], point.facts["point"]), {})
            for point in self._points
        }

    def rates(self) -> dict[str, float]:
        """Fitted rates of the comparisons that have begun, by the point's name; read as in `records`."""
        points = [point for point in self._points if point.facts["tuning"] == "fitted"]
        found, records = {}, self.records() if points else {}
        for point in points:
            compared = [record for record in records[point.name].values() if record.phase == "comparison"]
            compared.sort(key=lambda record: record.status == "failed")
            rates = [record.learning_rate for record in compared] or list(self._half_done(point))
            if rates:
                found[point.name] = rates[0]
        return found

    def other_plans(self) -> dict[str, list[int]]:
        """Numbers of seeds that records of a study were planned with, other than this sweep's, by study.

        Read by process 0, for all.
        """
        return _of_first(self._other_plans)

    def _other_plans(self) -> dict[str, list[int]]:
        found: dict[str, set[int]] = {}
        records = self.records()
        for point in self._points:
            plans = [record.plan["seeds"] for record in records[point.name].values() if record.plan]
            others = set(plans) - {point.facts["plan"]["seeds"]}
            if others:
                found.setdefault(f"{point.facts['study']}:{point.facts['preset']}", set()).update(others)
        return {study: sorted(seeds) for study, seeds in found.items()}

    def _half_done(self, point: Point) -> Iterator[float]:
        """Yields the learning rates of the comparison runs of a point that have checkpoints."""
        for name in point.run_names():
            folder = self._workdir / "runs" / name
            if any(folder.glob("checkpoints/*")):
                yield read_config(folder / "config.json")["optimizer"]["learning_rate"]

    def _missing(self) -> dict[str, int]:
        missing, records = {}, self.records()
        for point in self._points:
            check_point(point, self._workdir, records[point.name])
            missing[point.name] = progress(point, records[point.name])[1]
        return missing

    def _check_data(self, cards: Mapping[Path, Iterable[dict[str, Any]]]) -> None:
        for study, of_study in cards.items():
            for card in of_study:
                for path, record in self._read(study):
                    comparable.check_same_data(path, record, card)
                for run in (self._workdir / "runs" / study).glob("*"):
                    check_data(run, card)

    def _read(self, study: Path, names: tuple[str, ...] = ("",)) -> Iterator[tuple[AnyPath, Record]]:
        """Yields the records of a study whose file names begin with one of `names`."""
        for path in files_below(self._workdir / "results" / study):
            if path.suffix == ".json" and path.name.startswith(names):
                if path not in self._records:
                    self._records[path] = read_record(path)
                yield path, self._records[path]


def missing_of(point: Point, workdir: AnyPath) -> int:
    """About how many runs of one point are missing; errors as in `Progress.missing`."""
    return Progress([settled(point, workdir)], workdir).missing()[point.name]


def settled(point: Point, workdir: AnyPath) -> Point:
    """The point at the learning rate that its comparison has begun with, if it has."""
    begun = _of_first(Progress([point], workdir).rates)
    return point.at_rate(begun[point.name]) if point.name in begun else point


def check_point(point: Point, workdir: AnyPath, there: Mapping[str, Record]) -> None:
    """Checks that the records (`there`, by file name) and runs of a point belong to this sweep.

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
    for record in there.values():
        if record.status != "failed" and record.tuning != point.facts["tuning"]:
            raise UserError(
                f"{workdir}: the learning rate of {record.name} was chosen in another way: {record.tuning!r} "
                f"there, {point.facts['tuning']!r} here; use another --workdir, or delete these records"
            )
    for run in known:
        record = there.get(Path(run.name).name)
        if record is None or record.status == "failed":
            check_workdir(workdir / "runs" / run.name, run.config)
        if record is not None:
            check_same(record_path(workdir, run), record.config, run.config)


def progress(point: Point, there: Mapping[str, Record]) -> tuple[int, int]:
    """How many runs of a point are done, and about how many are left, from its records by file name."""
    done = [record for record in there.values() if record.status != "failed"]
    compared = sum(record.phase == "comparison" and record.seed < point.seeds for record in done)
    done_runs = compared + sum(record.phase == "tuning" for record in done)
    if compared == point.seeds:
        return done_runs, 0
    return done_runs, max(point.runs - done_runs, point.seeds - compared)


def _of_first(function: Callable[[], T]) -> T:
    from mobilellm_jax.parallel import processes  # here: it imports jax, which --status does without

    return processes.of_first(function)
