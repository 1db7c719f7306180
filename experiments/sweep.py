"""Run a study: tune every point, run its seeds, then say what was found.

  python -m experiments.sweep                                                  # the first look, on a laptop
  python -m experiments.sweep --config=configs/layer_sharing.py:small --workdir=runs/small
  python -m experiments.sweep --config=configs/depth_vs_width.py:paper_125m --list
  python -m experiments.sweep --only='4 x 48,8 x 32' --seeds=8 --config.train.steps=1000

Every point looks for its own learning rate first, with a seed of its own, and then trains with the same seeds
as all others. Finished runs are skipped and a half-done one is resumed, so the same command again goes on
after an interruption; SIGTERM saves checkpoints and exits with status 75, "start me again". A run that fails
or diverges is recorded as such, and the others go on. In --workdir: results/ has one JSON record for each
run, reports/ and figures/ what they show, runs/ checkpoints and logs.
"""

import contextlib
import functools
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import cli, report
from experiments.points import Point, Run, points_of, table
from mobilellm_jax import data, results
from mobilellm_jax.errors import UserError
from mobilellm_jax.run import (
    check,
    claim_workdir,
    enable_compilation_cache,
    failed_fields,
    finished_record,
    run,
)
from mobilellm_jax.signals import preempt
from mobilellm_jax.train import duration
from mobilellm_jax.tuning import best_learning_rate, next_trial

_WORKDIR = flags.DEFINE_string("workdir", "runs", "directory of results/, figures/, reports/ and runs/")
_LIST = flags.DEFINE_bool("list", False, "print the points with what they cost, and train nothing")
_ONLY = flags.DEFINE_list("only", [], "labels of the points to run, separated by commas; empty runs all")
_SEEDS = flags.DEFINE_integer("seeds", None, "number of seeds for each point; default: as the study says", 1)
_JOBS = flags.DEFINE_integer(
    "jobs", None, "points that run side by side; default: one for each CPU core, 1 on an accelerator", 1
)

# For the expected time only, measured on the tiny studies on 2 CPU cores: the share of the matrix rate that
# training reaches, and the seconds that a point (process, compilation) and a run (evaluation, saving) cost.
_EFFICIENCY, _POINT_S, _RUN_S = 0.12, 10.0, 1.2


def main() -> int:
    """Runs the sweep, and returns the exit status."""
    points = points_of(cli.config_spec(), cli.overrides(), _SEEDS.value, _ONLY.value)
    print(table(points))
    if _LIST.value:
        return 0
    return sweep(points, Path(_WORKDIR.value), _JOBS.value)


def sweep(points: Sequence[Point], workdir: Path, jobs: int | None = None) -> int:
    """Does the runs that `workdir` has no record of, reports on all, and returns the exit status.

    Args:
      points: what `points_of` returns.
      workdir: where everything is kept.
      jobs: points that run side by side, each in a process with its part of the CPU cores; 1 runs all in this
        process; None takes one for each core on a CPU and 1 on an accelerator.

    Raises:
      UserError: bad data, or a `workdir` of or in use by another sweep; found before anything is compiled.
        Or a point broke off, for example when memory ran out; the others are done and reported.
    """
    with _locked(workdir):
        return _sweep(points, workdir, jobs)


def _sweep(points: Sequence[Point], workdir: Path, jobs: int | None) -> int:
    enable_compilation_cache()
    if jobs is None:
        jobs = len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else 1
    missing = {point.name: _check(point, workdir) for point in points}
    todo = [point for point in points if missing[point.name]]
    for data_config, vocab_size in dict.fromkeys((p.config.data, p.config.model.vocab_size) for p in todo):
        data.prepare(data_config, vocab_size)
    if todo:
        total, left = sum(point.runs for point in points), sum(missing.values())
        print(f"\n{total - left} of about {total} runs are done already", end="; ")
        seconds = expected_seconds([(point, missing[point.name]) for point in todo])
        print(f"the rest will take about {duration(seconds / min(jobs, len(todo)))} (m:ss)", flush=True)
    if jobs > 1 and len(todo) > 1:
        broken = _in_processes(sorted(todo, key=lambda point: -point.flops), workdir, min(jobs, len(todo)))
    else:
        broken = _one_by_one(todo, workdir)
    status = _finish(points, workdir)
    if broken:
        raise UserError("\n".join(broken))
    return status


def _one_by_one(points: Sequence[Point], workdir: Path) -> list[str]:
    """Does the points, and returns what went wrong with any."""
    broken = []
    for point in points:
        try:
            do_point(point, workdir)
        except UserError as error:
            broken.append(f"{point.name}: {error}")
    return broken


def do_point(point: Point, workdir: Path) -> None:
    """Looks for the learning rate of a point, then does its seeds; every run leaves a record.

    The search is for the lowest loss, whatever the study compares: it still moves where an error rate is 0
    or 1. A failed run ends the point, as there is nothing to learn about learning rates from it.
    """
    rate = point.config.optimizer.learning_rate
    if point.learning_rates:
        tried: dict[float, list[float]] = {}
        while trial := next_trial(tried, point.learning_rates, point.tuning_seeds):
            record = _do(point.tuning_run(*trial), workdir)
            if record.status == "failed":
                return
            tried.setdefault(trial[0], []).append(record.loss if record.status == "finished" else math.inf)
        rate = best_learning_rate({rate: float(np.mean(losses)) for rate, losses in tried.items()})
        _say(point.name, f"learning rate {rate:.3g}, of {len(tried)} tried")
    for comparison in point.comparison_runs(rate):
        _do(comparison, workdir)


def _do(run_: Run, workdir: Path) -> results.Record:
    """Returns the record of a run, making it if it is not there; an error in it goes no further."""
    path, directory = _record_path(workdir, run_), workdir / "runs" / run_.name
    if (record := finished_record(path, run_.config)) is not None:
        return record
    describe = functools.partial(results.Record, **run_.facts)
    say = functools.partial(_say, run_.name)
    try:
        record = run(run_.config, directory, describe, say)
    except Exception as error:  # whatever goes wrong in one run, the others are worth having
        (directory / "error.txt").write_text(traceback.format_exc())
        record = describe(**failed_fields(run_.config, f"{type(error).__name__}: {error}".splitlines()[0]))
        say(f"failed: {record.error} (traceback in {directory / 'error.txt'})")
    results.write(record, path)
    return record


def _say(name: str, line: str) -> None:
    print(f"{name}  {line}", flush=True)


def _record_path(workdir: Path, run_: Run) -> Path:
    return workdir / "results" / f"{run_.name}.json"


def _check(point: Point, workdir: Path) -> int:
    """Returns how many runs are missing, after checking that the machine and the workdir fit the point."""
    check(point.config)
    if not point.learning_rates:
        known = list(point.comparison_runs(point.config.optimizer.learning_rate))
    else:
        known = [point.tuning_run(rate, 0) for rate in point.learning_rates]
    for run_ in known:
        if finished_record(_record_path(workdir, run_), run_.config) is None:
            claim_workdir(workdir / "runs" / run_.name, run_.config)
    done = results.read_all(workdir / "results" / Path(point.name).parent)
    mine = [record for record in done if record.point == point.facts["point"] and record.status != "failed"]
    compared = [record for record in mine if record.phase == "comparison"]
    for record in compared:
        if record.tuning != point.facts["tuning"]:
            raise UserError(
                f"{workdir}: the learning rate of {record.name} is of another kind, {record.tuning!r} "
                f"and not {point.facts['tuning']!r}. Use another --workdir, or delete what is there"
            )
    for rate in {record.learning_rate for record in compared}:
        for run_ in point.comparison_runs(rate):
            finished_record(_record_path(workdir, run_), run_.config)  # raises if made with other settings
    there = sum(record.seed < point.seeds for record in compared)
    if there == point.seeds:
        return 0
    return max(point.runs - there - len(mine) + len(compared), point.seeds - there)


def _finish(points: Sequence[Point], workdir: Path) -> int:
    """Reports on the studies that the points belong to, and returns the exit status."""
    unfinished, refused = [], []
    for study in dict.fromkeys(Path(point.name).parent for point in points):
        records = results.read_all(workdir / "results" / study)
        if not records:
            continue
        try:
            print("\n" + report.report(records, workdir))
        except UserError as error:  # the other studies are reported all the same
            refused.append(str(error))
        # A rate that diverges in tuning is what the search was looking for: the upper end.
        found = [r for r in records if (r.phase, r.status) != ("tuning", "diverged")]
        unfinished += [record for record in found if record.status != "finished"]
    for record in unfinished:
        print(f"{record.study}, {record.name}: {record.status}: {record.error}")
    if refused:
        raise UserError("\n".join(refused))
    return 1 if unfinished else 0


def expected_seconds(runs: Sequence[tuple[Point, int]]) -> float:
    """Returns about how long so many runs of these points take one after the other, on all cores.

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


# --- points side by side --------------------------------------------------------------------------------


def _in_processes(points: Sequence[Point], workdir: Path, jobs: int) -> list[str]:
    """Does the points in processes of their own, `jobs` at a time, each on its part of the CPU cores.

    A tiny model does not keep two cores busy: with a core each, two of them train in 0.6 to 0.7 of the time.

    Returns what to say of points whose process ended early.
    """
    context = multiprocessing.get_context("spawn")
    cores = sorted(os.sched_getaffinity(0))
    free = [cores[i::jobs] or cores for i in range(jobs)]
    waiting, running, broken = list(points), {}, []
    with _interrupted_by_sigterm():
        try:
            while waiting or running:
                while waiting and free:
                    point, mine = waiting.pop(0), free.pop(0)
                    process = context.Process(target=_child, args=(point, workdir, mine), daemon=True)
                    with _without_sigint():
                        process.start()
                    running[process.sentinel] = process, point, mine
                for sentinel in multiprocessing.connection.wait(list(running)):
                    process, point, mine = running.pop(sentinel)
                    process.join()
                    free.append(mine)
                    if process.exitcode:
                        broken.append(f"{point.name} (status {process.exitcode})")
                    left = f"{len(points) - len(waiting) - len(running)} of {len(points)} points done"
                    _say(point.name, left)
        except BaseException:
            for process, _, _ in running.values():
                process.terminate()  # the run in it saves a checkpoint
            for process, _, _ in running.values():
                process.join()
            raise
    if not broken:
        return []
    return [
        f"the process of {', '.join(broken)} ended early; what it said is above. A negative status is the "
        "signal that ended it: -9 where memory ran out, for which --jobs=1 may help"
    ]


def _child(point: Point, workdir: Path, cores: Sequence[int]) -> None:
    """What the process of a point does."""
    os.sched_setaffinity(0, cores)  # before jax starts its threads
    enable_compilation_cache()
    try:
        do_point(point, workdir)
    except UserError as error:
        sys.exit(f"{point.name}  error: {error}")
    except KeyboardInterrupt as stop:
        sys.exit(f"{point.name}  {stop}")


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    """Keeps a second sweep out of `workdir`, which would train the same runs in the same directories."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(workdir / ".lock", timeout=0):
            yield
    except filelock.Timeout:
        raise UserError(f"--workdir={workdir}: another sweep is at work there") from None
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot write there ({error.strerror})") from None


@contextlib.contextmanager
def _without_sigint() -> Iterator[None]:
    """Processes started in here ignore Ctrl-C, which a terminal sends to all: the sweep stops them itself."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    previous: Callable[..., Any] | int | None = signal.signal(signal.SIGTERM, preempt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    cli.run(main, default_config="configs/tour.py:tiny")
