"""The engine of a sweep: which runs are missing, their order, and what happens when one fails."""

import dataclasses
import functools
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.runner import after, devices, looping, plans, rates
from experiments.runner.after import Do
from experiments.runner.calling import Speaking
from experiments.runner.costs import expected_seconds
from experiments.runner.points import Point, Run
from experiments.runner.progress import Progress, missing_of, record_path, settled
from experiments.runner.questions import Questions
from experiments.runner.schemes import Quantizing
from experiments.runner.trials import parts, trials_of
from experiments.runner.view import FINISHED, Event, Tally, Tell, view_of
from experiments.runner.workers import TUNING, Task, do_all, leases_of
from mobilellm_jax import data
from mobilellm_jax.analysis.records import Record, read_records, write_record
from mobilellm_jax.analysis.tuning import losses_of, next_trials
from mobilellm_jax.config import Config
from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel import processes
from mobilellm_jax.runs.run import (
    Asked,
    agreed_record,
    check,
    enable_compilation_cache,
    failed_fields,
    run,
    run_together,
)
from mobilellm_jax.storage.files import AnyPath, reason
from mobilellm_jax.training.progress import StepLine, duration

Report = Callable[[Sequence[Point], AnyPath], int]


def sweep(
    points: Sequence[Point],
    workdir: AnyPath,
    jobs: int | None = None,
    groups: Sequence[Mapping[str, str]] | None = None,
    asked: Questions | None = None,
    whole: Sequence[Point] | None = None,
    quantized: Quantizing | None = None,
    lines_every: int | float = 60,
    diagnosed: bool = False,
    loops: Sequence[int] = (),
    prompts: Sequence[str] = (),
    speaking: Speaking | None = None,
    report: Report | None = None,
    trials: int | None = 1,
) -> int:
    """Does the runs that `workdir` has no record of, reports on all, and returns the exit status.

    In two phases: all points are tuned first, as the best rates of an arm are fitted together; then each runs
    its seeds at its own.

    Args:
      points: what `points_of` returns.
      workdir: where everything is kept.
      jobs: points that run side by side, each in a process with its part of the CPU cores; 1 runs all in this
        process; None takes one for each core on a CPU and 1 on an accelerator.
      groups: what `devices.groups` returns, to have instead a process for each of these groups of devices;
        this process sees as many simulated devices as there are in a group (`devices.stay_off`).
      asked: questions for every finished run of the points.
      whole: all points of their studies, where `points` is one worker's part. It then helps to tune those
        that share an arm with its own, and waits for what others tune.
      quantized: how to quantize every finished run of the points.
      lines_every: seconds between two lines about the steps of a point, where there is no terminal.
      diagnosed: diagnose every finished run of the points.
      loops: numbers of loops to score every finished run with, where its model has loops.
      prompts: texts that the first finished run of every point is to continue.
      speaking: calls and instructions to ask every finished run for.
      report: what to do at the end, in place of a report on each study; returns the exit status.
      trials: runs of a point that train in one program, see `trials.trials_of`.

    Raises:
      UserError: bad data, or a `workdir` of another sweep or data; found before anything is compiled.
        Or a point broke off, for example when memory ran out; the others are done and reported.
    """
    if jax.process_count() > 1 and jobs not in (None, 1):
        raise UserError(f"--jobs={jobs}: expected 1, as {jax.process_count()} processes share every run")
    jobs = jobs or default_jobs()
    enable_compilation_cache()
    points = plans.with_power(points)
    whole = points if whole is None else plans.with_power(whole)
    environments = groups or [{}] * jobs
    beside = min(len(environments), len(whole))  # processes at most, which share the memory of a CPU
    for point in whole:
        # The processes of groups see other devices than this one, and check kernels and memory themselves.
        check(_with_any_kernel(point.config) if groups else point.config)
        if not groups:
            trials_of(point, trials, beside)
    known = after.check(whole, asked, quantized, prompts, speaking)
    processes.of_first(lambda: make_workdir(workdir))
    progress = Progress(points, workdir)
    missing = progress.missing()
    todo = [point for point in points if missing[point.name]]
    begun = processes.of_first(progress.rates)
    of_arms = {point.arm for point in todo if point.learning_rates and point.name not in begun}
    in_arms = [point for point in whole if point.arm in of_arms and point.learning_rates]
    cards = _prepare([*todo, *in_arms], progress)
    expected_s = None
    for line in looping.left_out(points, loops):
        print(line, flush=True)
    if todo:
        for line in plans.lines(todo, progress.other_plans(), cards):
            print(line)
        total, left = sum(point.runs for point in points), sum(missing.values())
        if groups:
            each = f"{jax.device_count()} of the devices of this host"
            rest = f"{min(len(groups), len(todo))} points at a time, each on {each}"
        else:
            seconds = expected_seconds([(point, missing[point.name]) for point in todo])
            expected_s = seconds / min(jobs, len(todo))
            rest = f"the rest will take about {duration(expected_s)} (m:ss)"
        # In one piece, as a signal may come while the time is measured, and has a line of its own.
        print(f"\n{total - left} of about {total} runs are done already; {rest}", flush=True)
    size = jax.device_count() if groups else None
    untuned = processes.of_first(lambda: rates.unfinished(in_arms, workdir)) if in_arms else {}
    tally = _tally(points, missing, [point for point in in_arms if untuned[point.name]], expected_s)
    with view_of(tally, lines_every) as view:
        broken = []
        if in_arms:
            do = functools.partial(tune_point, trials=trials, jobs=beside)
            tune = Task(_on_devices(size, do), rates.untuned, TUNING)
            mine = {point.name for point in points}
            own_first = sorted(in_arms, key=lambda point: point.name not in mine)
            chosen = [point for point in own_first if untuned[point.name]]
            broken += do_all(chosen, workdir, environments, tune, view, mine)
        tuned = [point for point in todo if point.learning_rates]
        rate_of, lines = processes.of_first(lambda: rates.fitted(tuned, [*tuned, *in_arms], workdir))
        for line in lines:
            print(line, flush=True)
        todo = [
            point.at_rate(rate_of[point.name]) if point.learning_rates else point
            for point in todo
            if point.name in rate_of or not point.learning_rates
        ]
        do = functools.partial(compare_point, trials=trials, jobs=beside)
        compare = Task(_on_devices(size, do), missing_of)
        broken += do_all(todo, workdir, environments, compare, view)
        for do, lacking in after.tasks(asked, known, quantized, diagnosed, loops, prompts, speaking):
            left = processes.of_first(lambda: [point.name for point in points if lacking(point, workdir)])  # noqa: B023
            todo = [point for point in points if point.name in left]
            broken += do_all(todo, workdir, environments, Task(_on_devices(size, do), lacking), view)
    try:
        status = processes.of_first(lambda: _finish(points, workdir, report or _report))
    except UserError as error:
        status = 0
        if not any(line.endswith(str(error)) for line in broken):  # a full disk, once
            broken.append(str(error))
    if broken:
        raise UserError("\n".join(broken))
    return status


def _with_any_kernel(config: Config) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))


def default_jobs() -> int:
    """Points side by side: one for each core on a CPU, 1 on an accelerator or where processes share runs."""
    alone = jax.process_count() == 1
    return len(os.sched_getaffinity(0)) if alone and jax.default_backend() == "cpu" else 1


def _tally(
    points: Sequence[Point], missing: Mapping[str, int], untuned: Sequence[Point], expected_s: float | None
) -> Tally:
    """Counts the runs of `points`, and the searches of other sweeps that this one helps with."""
    searches = {point.name: point.runs - point.seeds for point in untuned}
    own = {point.name: point.seeds for point in points}
    return Tally(
        done=sum(point.runs for point in points) - sum(missing.values()),
        left={**searches, **missing},
        compared=dict.fromkeys(searches, 0) | own,
        costs={point.name: point.cost for point in (*untuned, *points)},
        expected_s=expected_s,
    )


def _prepare(points: Sequence[Point], progress: Progress) -> dict[str, dict[str, Any]]:
    """Prepares the data of points, and returns their cards by the point's name.

    Raises:
      UserError: bad data, none of it for tuning, or records and runs of `progress` of other data.
    """
    known: dict[Any, data.Dataset] = {}  # points that have the same data share them
    of_study: dict[Path, dict[Any, dict[str, Any]]] = {}
    of_point = {}
    for point in points:
        key = point.config.data, point.config.model.vocab_size
        prepared = known[key] = known[key] if key in known else data.prepare(*key)
        if point.learning_rates:
            prepared.check_rows("tuning")
        of_study.setdefault(Path(point.name).parent, {})[key] = of_point[point.name] = prepared.card
    progress.check_data({study: cards.values() for study, cards in of_study.items()})
    return of_point


def _on_devices(size: int | None, do: Do) -> Do:
    """`do`, after a check that its process sees `size` devices, if that is given."""
    return do if size is None else functools.partial(_check_and_do, size, do)


def _check_and_do(size: int, do: Do, point: Point, workdir: AnyPath, tell: Tell) -> None:
    devices.check_seen(size)
    do(point, workdir, tell)


def tune_point(point: Point, workdir: AnyPath, tell: Tell, trials: int | None = 1, jobs: int = 1) -> None:
    """Looks for the learning rate of a point; every run leaves a record.

    A failed run ends the search, as there is nothing to learn about learning rates from it.
    """
    tried: dict[float, list[float]] = {}
    most = trials_of(point, trials, jobs)
    while following := next_trials(tried, point.learning_rates, point.tuning_seeds):
        records = _do_all([point.tuning_run(*trial) for trial in following], workdir, tell, most)
        for (rate, _), record in zip(following, records, strict=True):
            if record.status == "failed":
                return
            tried.setdefault(rate, []).extend(losses_of([record]))


def compare_point(point: Point, workdir: AnyPath, tell: Tell, trials: int | None = 1, jobs: int = 1) -> None:
    """Does the seeds of a point at the learning rate of its config; every run leaves a record."""
    point, most = settled(point, workdir), trials_of(point, trials, jobs)
    runs = list(point.comparison_runs(point.config.optimizer.learning_rate))
    records = list(_do_all(runs, workdir, tell, most))
    scores = [record.score for record in records if record.status == "finished"]
    if scores:
        seeds = " ".join(f"{score:.4f}" for score in scores)
        said = f"mean {point.facts['metric']} {sum(scores) / len(scores):.4f} of {len(scores)} seeds: {seeds}"
        tell(Event(point.name, said))


def _do_all(runs: Sequence[Run], workdir: AnyPath, tell: Tell, trials: int) -> Iterator[Record]:
    """The records of runs, at most `trials` of which train together; those after are not yet begun."""
    for part, count in parts(runs, trials):
        yield from _do(part, count, workdir, tell)


def _do(part: Mapping[int, Run], count: int, workdir: AnyPath, tell: Tell) -> list[Record]:
    """The records of runs by place in one program; those without are done, an error in it fails them all."""
    records = {at: agreed_record(record_path(workdir, run_), run_.config) for at, run_ in part.items()}
    left = {at: run_ for at, run_ in part.items() if records[at] is None}
    asked = {at: _asked(run_, workdir, tell, len(left)) for at, run_ in left.items()}
    done: dict[int, Record] = {}
    try:
        if count == 1:
            done = {at: run(a.config, a.workdir, a.describe, a.say) for at, a in asked.items()}
        elif asked:
            done = run_together(asked, count)
    except Exception as error:  # whatever goes wrong in one run, the others are worth having
        if jax.process_count() > 1:  # other processes may wait for this one; its end is what ends them
            raise
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        for at, a in asked.items():
            done[at] = a.describe(**failed_fields(a.config, said))
            a.say(f"failed: {said} ({_keep_traceback(a.workdir / 'error.txt')})")
    for at, record in done.items():
        processes.of_first(lambda: write_record(record, record_path(workdir, left[at])))  # noqa: B023
        tell(Event(left[at].name, _ending(record), over=True))
    return [record for record in (records | done).values() if record]


def _asked(run_: Run, workdir: AnyPath, tell: Tell, together: int) -> Asked:
    """A run as it is to be done; its lines stand for the steps of all that train together."""

    def say(line: str) -> None:
        share = together * line.share if isinstance(line, StepLine) else None
        tell(Event(run_.name, line, share))

    describe = functools.partial(Record, **run_.facts)
    return Asked(run_.config, workdir / "runs" / run_.name, describe, say)


def _ending(record: Record) -> str:
    """How a run ended, in a line."""
    if record.status != "finished":
        return f"{record.status}: {record.error}"
    score = f"{record.score:.1%} wrong" if record.metric == "error" else f"{record.metric} {record.score:.4f}"
    return f"{FINISHED}: {score} in {duration(record.timing['wall_s'] or 0.0)}"


def _keep_traceback(path: AnyPath) -> str:
    """Writes the traceback of the error at hand, and returns where it is, or in a line why it is not."""
    text = traceback.format_exc()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:  # the disk may be what failed
        return f"no traceback: {path} cannot be written: {reason(error)}"
    return f"traceback in {path}"


def make_workdir(workdir: AnyPath) -> None:
    """Makes what a sweep writes into; UserError if that fails."""
    try:
        leases_of(workdir)
        (workdir / "results").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot write there ({reason(error)})") from None


def _finish(points: Sequence[Point], workdir: AnyPath, report: Report) -> int:
    """Reports on the studies that the points belong to, and returns the exit status."""
    leases = leases_of(workdir)
    while not leases.take(["report"]):  # of two sweeps that end at once, one writes after the other
        time.sleep(0.2)
    try:
        return report(points, workdir)
    finally:
        leases.release("report")


def _report(points: Sequence[Point], workdir: AnyPath) -> int:
    # Here: two seconds that the processes of the points need not spend.
    from experiments.reporting import abilities, index, pages
    from mobilellm_jax.analysis.study import study_of

    unfinished, refused, reported = [], [], []
    for study in dict.fromkeys(Path(point.name).parent for point in points):
        records = read_records(workdir / "results" / study)
        if not records:
            continue
        try:
            analysed = study_of(records)
            print("\n" + pages.report(analysed, workdir)[0])
            reported.append(analysed)
        except UserError as error:  # the other studies are reported all the same
            refused.append(str(error))
        # A rate that diverges in tuning is what the search was looking for: the upper end.
        found = [r for r in records if (r.phase, r.status) != ("tuning", "diverged")]
        unfinished += [record for record in found if record.status != "finished"]
    for said in abilities.write(reported, workdir):
        print("\n" + said)
    if reported:
        print(f"\nAll reports: {index.write(workdir)}.html")
    for record in unfinished:
        print(f"{record.study}, {record.name}: {record.status}: {record.error}")
    if refused:
        raise UserError("\n".join(refused))
    return 1 if unfinished else 0
