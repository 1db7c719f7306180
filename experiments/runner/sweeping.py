"""The engine of a sweep: which runs are missing, their order, and what happens when one fails."""

import functools
import os
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.runner import after, devices, looping, plans, questions, rates, samples
from experiments.runner.after import Do
from experiments.runner.points import Point, Run
from experiments.runner.progress import Progress, missing_of, record_path, settled
from experiments.runner.questions import Questions
from experiments.runner.schemes import Quantizing
from experiments.runner.view import FINISHED, Event, Tally, Tell, View, view_of
from experiments.runner.workers import TUNING, Task, Wait, in_processes, leases_of, take
from mobilellm_jax import data
from mobilellm_jax.analysis.records import Record, read_records, write_record
from mobilellm_jax.analysis.tuning import losses_of, next_trial
from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel import processes
from mobilellm_jax.runs.run import agreed_record, check, enable_compilation_cache, failed_fields, run
from mobilellm_jax.storage.files import AnyPath, reason
from mobilellm_jax.training.progress import StepLine, duration

# For the expected time only, measured on the tiny studies on 2 CPU cores: the share of the matrix rate that
# training reaches, and the seconds that a point (process, compilation) and a run (evaluation, saving) cost.
_EFFICIENCY, _POINT_S, _RUN_S = 0.12, 10.0, 1.2

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
    report: Report | None = None,
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
      report: what to do at the end, in place of a report on each study; returns the exit status.

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
    for point in whole:
        check(point.config)
        if quantized:
            quantized.check(point.config)
    if prompts:
        samples.check(points)
    known = questions.load(asked, points) if asked else {}
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
    environments = groups or [{}] * jobs
    size = jax.device_count() if groups else None
    untuned = processes.of_first(lambda: rates.unfinished(in_arms, workdir)) if in_arms else {}
    tally = _tally(points, missing, [point for point in in_arms if untuned[point.name]], expected_s)
    with view_of(tally, lines_every) as view:
        broken = []
        if in_arms:
            tune = Task(_on_devices(size, tune_point), rates.untuned, TUNING)
            mine = {point.name for point in points}
            own_first = sorted(in_arms, key=lambda point: point.name not in mine)
            chosen = [point for point in own_first if untuned[point.name]]
            broken += _all(chosen, workdir, environments, tune, view, mine)
        tuned = [point for point in todo if point.learning_rates]
        rate_of, lines = processes.of_first(lambda: rates.fitted(tuned, [*tuned, *in_arms], workdir))
        for line in lines:
            print(line, flush=True)
        todo = [
            point.at_rate(rate_of[point.name]) if point.learning_rates else point
            for point in todo
            if point.name in rate_of or not point.learning_rates
        ]
        compare = Task(_on_devices(size, compare_point), missing_of)
        broken += _all(todo, workdir, environments, compare, view)
        for do, lacking in after.tasks(asked, known, quantized, diagnosed, loops, prompts):
            left = processes.of_first(lambda: [point.name for point in points if lacking(point, workdir)])  # noqa: B023
            todo = [point for point in points if point.name in left]
            broken += _all(todo, workdir, environments, Task(_on_devices(size, do), lacking), view)
    try:
        status = processes.of_first(lambda: _finish(points, workdir, report or _report))
    except UserError as error:
        status = 0
        if not any(line.endswith(str(error)) for line in broken):  # a full disk, once
            broken.append(str(error))
    if broken:
        raise UserError("\n".join(broken))
    return status


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
      UserError: bad data, or records and runs of `progress` of other data.
    """
    cards: dict[Any, dict[str, Any]] = {}  # points that have the same data share a card
    of_study: dict[Path, dict[Any, dict[str, Any]]] = {}
    of_point = {}
    for point in points:
        key = point.config.data, point.config.model.vocab_size
        cards[key] = of_point[point.name] = cards[key] if key in cards else data.prepare(*key).card
        of_study.setdefault(Path(point.name).parent, {})[key] = cards[key]
    progress.check_data({study: known.values() for study, known in of_study.items()})
    return of_point


def _on_devices(size: int | None, do: Do) -> Do:
    """`do`, after a check that its process sees `size` devices, if that is given."""
    return do if size is None else functools.partial(_check_and_do, size, do)


def _check_and_do(size: int, do: Do, point: Point, workdir: AnyPath, tell: Tell) -> None:
    devices.check_seen(size)
    do(point, workdir, tell)


def _all(
    points: Sequence[Point],
    workdir: AnyPath,
    environments: Sequence[Mapping[str, str]],
    task: Task,
    view: View,
    first: Collection[str] = (),
) -> list[str]:
    """Does the points, side by side if there are several, and returns error messages.

    The processes of those named in `first` start first.
    """
    if min(len(environments), len(points)) < 2 and not any(environments):  # an environment needs a process
        return _one_by_one(points, workdir, task, view)
    # The longest first, so that no core waits long for the last.
    longest_first = sorted(points, key=lambda point: (point.name not in first, -point.cost))
    return in_processes(longest_first, workdir, environments[: len(points)], task, view)


def _one_by_one(points: Sequence[Point], workdir: AnyPath, task: Task, view: View) -> list[str]:
    """Does the points, those of other sweeps last; returns error messages."""
    leases, waiting, broken = leases_of(workdir), {task.lease(point): point for point in points}, []
    untaken: dict[str, list[str]] = {}  # by what the disk said; one line for all of them
    wait = Wait()
    while waiting:
        name, error = processes.of_first(lambda: take(leases, list(waiting)))
        if name is None:
            wait(leases)
            continue
        point = waiting.pop(name)
        if error:
            untaken.setdefault(error, []).append(name)
            continue
        view.begun(point.name)
        try:
            task.do(point, workdir, functools.partial(view.hear, point.name))
        except UserError as error:
            broken.append(f"{name}: {error}")
        finally:
            view.tally.settle(point.name, task.phase == TUNING)
            view.ended(point.name, task.ended(len(points) - len(waiting), len(points)))
            if jax.process_index() == 0:
                leases.release(name)
    return broken + [f"{', '.join(names)}: {error}" for error, names in untaken.items()]


def tune_point(point: Point, workdir: AnyPath, tell: Tell) -> None:
    """Looks for the learning rate of a point; every run leaves a record.

    A failed run ends the search, as there is nothing to learn about learning rates from it.
    """
    tried: dict[float, list[float]] = {}
    while trial := next_trial(tried, point.learning_rates, point.tuning_seeds):
        record = _do(point.tuning_run(*trial), workdir, tell)
        if record.status == "failed":
            return
        tried.setdefault(trial[0], []).extend(losses_of([record]))


def compare_point(point: Point, workdir: AnyPath, tell: Tell) -> None:
    """Does the seeds of a point at the learning rate of its config; every run leaves a record."""
    point = settled(point, workdir)
    runs = list(point.comparison_runs(point.config.optimizer.learning_rate))
    records = [_do(comparison, workdir, tell) for comparison in runs]
    scores = [record.score for record in records if record.status == "finished"]
    if scores:
        seeds = " ".join(f"{score:.4f}" for score in scores)
        said = f"mean {point.facts['metric']} {sum(scores) / len(scores):.4f} of {len(scores)} seeds: {seeds}"
        tell(Event(point.name, said))


def _do(run_: Run, workdir: AnyPath, tell: Tell) -> Record:
    """The record of a run, which is done if it has none; an error in it becomes a failed record."""
    path, directory = record_path(workdir, run_), workdir / "runs" / run_.name
    if (record := agreed_record(path, run_.config)) is not None:
        return record
    describe = functools.partial(Record, **run_.facts)

    def say(line: str) -> None:
        tell(Event(run_.name, line, line.share if isinstance(line, StepLine) else None))

    try:
        record = run(run_.config, directory, describe, say)
    except Exception as error:  # whatever goes wrong in one run, the others are worth having
        if jax.process_count() > 1:  # other processes may wait for this one; its end is what ends them
            raise
        record = describe(**failed_fields(run_.config, f"{type(error).__name__}: {error}".splitlines()[0]))
        say(f"failed: {record.error} ({_keep_traceback(directory / 'error.txt')})")
    processes.of_first(lambda: write_record(record, path))
    tell(Event(run_.name, _ending(record), over=True))
    return record


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


def expected_seconds(runs: Sequence[tuple[Point, int]]) -> float:
    """Estimated seconds of so many runs of these points, one after the other on all cores.

    From the rate of matrix products, measured here.
    """
    size = 1024
    x = jnp.ones((size, size), runs[0][0].config.model.compute_dtype)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    rate = 2 * size**3 / min(seconds) * jax.device_count()
    training = sum(point.flops * count for point, count in runs) / (rate * _EFFICIENCY)
    return training + len(runs) * _POINT_S + sum(count for _, count in runs) * _RUN_S
