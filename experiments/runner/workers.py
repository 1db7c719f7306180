"""Points side by side, in processes of their own, and beside other sweeps in the same directory."""

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import jax

from experiments.runner import devices
from experiments.runner.leases import LeaseError, Leases
from experiments.runner.points import Point
from mobilellm_jax.errors import Interrupted, UserError
from mobilellm_jax.runs.run import enable_compilation_cache
from mobilellm_jax.storage.files import AnyPath
from mobilellm_jax.training import signals
from mobilellm_jax.training.malloc import keep_freed_memory

_POLL_S = 2.0  # between two looks for a point that no other sweep holds
_TAKEN = 3  # exit status of a process whose point another sweep took first


def say(name: str, line: str) -> None:
    """Prints a line about a point or run."""
    print(f"{name}  {line}", flush=True)


def in_processes(
    points: Sequence[Point],
    workdir: AnyPath,
    environments: Sequence[Mapping[str, str]],
    do_point: Callable[[Point, AnyPath], None],
    missing: Callable[[Point, AnyPath], int],
    devices_per_run: int | None = None,
) -> list[str]:
    """Does the points in processes side by side, each with one of `environments` and a part of the CPU cores.

    Points that other sweeps are at work on come last. A tiny model does not keep two cores busy: with a core
    each, two of them train in 0.6 to 0.7 of the time.

    Args:
      points, workdir: as in `sweep`.
      environments: for each of the processes side by side the variables that differ from those of this one.
      do_point, missing: what a process does, and whether there is anything left to do.
      devices_per_run: how many devices a process is to see; checked in it before it starts.

    Returns what to say of points whose process ended early.

    Raises:
      Interrupted, Preempted: on SIGINT, on SIGTERM or SIGHUP; the runs at work have saved.
    """
    context = multiprocessing.get_context("spawn")
    cores, jobs = sorted(os.sched_getaffinity(0)), len(environments)
    free = [(cores[i::jobs] or cores, environments[i]) for i in range(jobs)]
    leases, waiting, running, broken, wait = leases_of(workdir), list(points), {}, [], Wait()
    died: set[str] = set()  # points whose process a signal ended once, as where others took the memory
    with signals.noted_signals() as received, _ended(running):
        while (waiting or running) and not received:
            while free and (point := _first_free(waiting, leases)):
                waiting.remove(point)
                if not missing(point, workdir):  # another sweep has done it
                    continue
                mine = free.pop(0)
                arguments = do_point, point, workdir, mine[0], devices_per_run
                process = context.Process(target=_child, args=arguments, daemon=True)
                with _without_sigint(), _variables({**mine[1], signals.PARENT: str(os.getpid())}):
                    process.start()
                running[process.sentinel] = process, point, mine
            if waiting and not running:
                wait(leases)
            for sentinel in multiprocessing.connection.wait(list(running), _POLL_S) if running else ():
                process, point, mine = running.pop(sentinel)
                process.join()
                free.append(mine)
                if process.exitcode == _TAKEN:
                    waiting.append(point)
                    continue
                if process.exitcode < 0 and point.name not in died:
                    died.add(point.name)
                    waiting.append(point)
                    say(point.name, f"its process was ended by signal {-process.exitcode}; one more try")
                    continue
                if process.exitcode:
                    broken.append(f"{point.name} (status {process.exitcode})")
                left = f"{len(points) - len(waiting) - len(running)} of {len(points)} points done"
                say(point.name, left)
    if received:
        raise signals.stopped(received, "with the runs at work, which saved what there was")
    if not broken:
        return []
    return [
        f"the process of {', '.join(broken)} ended early; what it said is above. A negative status is the "
        "signal that ended it: -9 where memory ran out, for which fewer side by side may help (--jobs=1)"
    ]


def _child(
    do_point: Callable[[Point, AnyPath], None],
    point: Point,
    workdir: AnyPath,
    cores: Sequence[int],
    devices_per_run: int | None,
) -> None:
    """What the process of a point does."""
    os.sched_setaffinity(0, cores)  # before jax starts its threads
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals.watch(tell=False)
    enable_compilation_cache()
    leases = leases_of(workdir)
    name, error = take(leases, [point.name])
    if error:
        sys.exit(f"{name}  error: {error}")
    if name is None:
        sys.exit(_TAKEN)
    try:
        if devices_per_run:
            devices.check_seen(devices_per_run)
        do_point(point, workdir)
    except UserError as error:
        sys.exit(f"{point.name}  error: {error}")
    except Interrupted as stop:
        sys.exit(f"{point.name}  {stop}")
    finally:
        leases.release(point.name)


class Wait:
    """Waits a little for other sweeps, and says so the first time."""

    def __init__(self) -> None:
        self._said = False

    def __call__(self, leases: Leases) -> None:
        if not self._said:
            for name, worker in (leases.holders() if jax.process_index() == 0 else {}).items():
                say(name, f"waiting for the sweep that is at work on it, {worker}")
        self._said = True
        time.sleep(_POLL_S * random.uniform(0.5, 1))  # not all in step


def _first_free(points: Sequence[Point], leases: Leases) -> Point | None:
    free = set(leases.free([point.name for point in points]))
    return next((point for point in points if point.name in free), None)


def take(leases: Leases, names: Sequence[str]) -> tuple[str | None, str]:
    """`Leases.take`, and "" or the error that kept the name from being taken."""
    try:
        return leases.take(names), ""
    except LeaseError as error:
        return error.name, str(error)


def leases_of(workdir: AnyPath) -> Leases:
    """Returns the leases on the points of `workdir`."""
    return Leases(workdir / "runs" / ".leases")


@contextlib.contextmanager
def _ended(running: Mapping[int, tuple[BaseProcess, Point, Any]]) -> Iterator[None]:
    """Ends the processes in `running` when it is left; the runs in them save a checkpoint."""
    try:
        yield
    finally:
        for process, _, _ in running.values():
            process.terminate()
        for process, _, _ in running.values():
            process.join()


@contextlib.contextmanager
def _without_sigint() -> Iterator[None]:
    """Processes started in here get no Ctrl-C, which a terminal sends to all: the sweep stops them itself.

    Blocked here and not ignored, a SIGINT to the sweep itself still reaches the thread that watches for it.
    """
    multiprocessing.resource_tracker.ensure_running()  # its first start would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Processes started in here have these environment variables."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
