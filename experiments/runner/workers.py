"""Points side by side, in several processes, and beside other sweeps in the same directory."""

import contextlib
import dataclasses
import functools
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import jax

from experiments.runner.leases import IN_WORKDIR, LeaseError, Leases
from experiments.runner.points import Point
from experiments.runner.view import Event, Tell, View, say
from mobilellm_jax.errors import Interrupted, UserError
from mobilellm_jax.parallel import processes
from mobilellm_jax.runs.run import enable_compilation_cache
from mobilellm_jax.storage import quiet
from mobilellm_jax.storage.files import AnyPath
from mobilellm_jax.training import signals
from mobilellm_jax.training.malloc import keep_freed_memory

_POLL_S = 2.0  # between two looks for a point that no other sweep holds
TUNING = "tuning"  # the first phase of a sweep
_DONE, _TAKEN = 0, 3  # what a worker says at the end of a point: done, or another sweep took it first


@dataclasses.dataclass(frozen=True)
class Task:
    """What to do for every point: `do` it, if there are runs `missing`; both take a point and the workdir.

    `do` also takes what it tells its events to.

    Attributes:
      phase: a word in the leases, so that a worker does not wait for later phases of others ("": the last).
    """

    do: Callable[[Point, AnyPath, Tell], None]
    missing: Callable[[Point, AnyPath], int]
    phase: str = ""

    def lease(self, point: Point) -> str:
        """What a worker holds while it is at work on a point; no name of a point has a space."""
        return f"{point.name} {self.phase}".rstrip()

    def ended(self, number: int, total: int) -> str:
        return f"{number} of {total} points {'tuned' if self.phase == TUNING else 'done'}"


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place for one process: its CPU cores, and the environment variables that it gets."""

    cores: Sequence[int]
    environment: Mapping[str, str]


@dataclasses.dataclass
class Worker:
    """A process that does one point after another, as its start and its imports take seconds.

    Attributes:
      process: what runs `_child`.
      slot: what is free when it ends.
      channel: takes a task and a point; gives events, then `_DONE` or `_TAKEN`.
      point: what it is at work on; None if it waits for one.
    """

    process: BaseProcess
    slot: Slot
    channel: Connection
    point: Point | None = None

    def begin(self, task: Task, point: Point) -> None:
        self.point = point
        with contextlib.suppress(OSError):  # it was killed while it waited, which `hear` tells
            self.channel.send((task, point))

    def hear(self, view: View) -> int | None:
        """Passes on what it has told so far, up to the end of its point or of the process.

        Returns:
          The exit status of the process if it has ended, `_DONE` or `_TAKEN` if the point is over, else None.
        """
        try:
            while self.channel.poll():
                told = self.channel.recv()
                if isinstance(told, int):
                    return told
                if self.point:
                    view.hear(self.point.name, told)
        except (EOFError, OSError):  # OSError: it was killed in the middle of a message
            self.process.join()
        return self.process.exitcode


def do_all(
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


def in_processes(
    points: Sequence[Point],
    workdir: AnyPath,
    environments: Sequence[Mapping[str, str]],
    task: Task,
    view: View,
) -> list[str]:
    """Does the points in processes side by side, one for each of `environments`, which share the CPU cores.

    Points that other sweeps are at work on come last. A tiny model does not keep two cores busy: with a core
    each, two of them train in 0.6 to 0.7 of the time.

    Returns:
      An error message, if the processes of some points ended early.

    Raises:
      Interrupted, Preempted: on SIGINT, on SIGTERM or SIGHUP; the runs at work have saved.
    """
    free, leases, wait = _slots(environments), leases_of(workdir), Wait()
    waiting, workers, broken, over = list(points), list[Worker](), dict[str, int](), 0
    died: set[str] = set()  # points whose process a signal ended once, as where others took the memory
    with signals.noted_signals() as received, _ended(workers, view):
        while over < len(points) and not received:
            idle = [worker for worker in workers if not worker.point]
            while (idle or free) and (point := _first_free(waiting, leases, task)):
                waiting.remove(point)
                if not task.missing(point, workdir):  # another sweep has done it
                    view.tally.settle(point.name, task.phase == TUNING)
                    over += 1
                    continue
                if idle:
                    worker = idle.pop()
                else:
                    worker = _started(workdir, free.pop(0))
                    workers.append(worker)
                worker.begin(task, point)
                view.begun(point.name)
            if waiting and not any(worker.point for worker in workers):
                wait(leases)
            for worker, status in _over(workers, view):
                point, worker.point = worker.point, None
                if worker.process.exitcode is not None or not waiting:
                    worker.channel.close()  # which ends the process, if it still waits for a point
                    worker.process.join()
                    workers.remove(worker)
                    free.append(worker.slot)
                if point is None:
                    continue
                if not received and _is_to_be_repeated(point, status, died):
                    waiting.append(point)
                    continue
                if status != _DONE:
                    broken[point.name] = status
                view.tally.settle(point.name, task.phase == TUNING)
                over += 1
                view.ended(point.name, task.ended(over, len(points)))
    if received:
        raise signals.stopped(received, "with the runs at work, which saved what there was")
    return [_ended_early(broken)] if broken else []


def _ended_early(broken: Mapping[str, int]) -> str:
    """The error message for points whose processes ended with these statuses."""
    names = ", ".join(f"{name} (status {status})" for name, status in broken.items())
    advice = (
        ". A negative status is the signal that ended it: -9 where memory ran out; run fewer points side by "
        "side (--jobs=1)"
    )
    killed = any(status < 0 for status in broken.values())
    return f"the process of {names} ended early; its output is above{advice if killed else ''}"


def _slots(environments: Sequence[Mapping[str, str]]) -> list[Slot]:
    cores, count = sorted(os.sched_getaffinity(0)), len(environments)
    return [Slot(cores[i::count] or cores, environment) for i, environment in enumerate(environments)]


def _started(workdir: AnyPath, slot: Slot) -> Worker:
    context = multiprocessing.get_context("spawn")
    ours, its = multiprocessing.Pipe()
    process = context.Process(target=_child, args=(workdir, slot.cores, its), daemon=True)
    with _without_sigint(), _variables({**slot.environment, signals.PARENT: str(os.getpid())}):
        process.start()
    its.close()  # so that `ours` ends with the process
    return Worker(process, slot, ours)


def _over(workers: Sequence[Worker], view: View) -> list[tuple[Worker, int]]:
    """Waits for points that are over or processes that ended, but `_POLL_S` at most.

    Passes on what the workers tell meanwhile.

    Returns:
      The workers of these, with what `Worker.hear` returned.
    """
    until = time.monotonic() + _POLL_S
    of_signs: dict[Any, Worker] = {worker.channel: worker for worker in workers}
    of_signs |= {worker.process.sentinel: worker for worker in workers}
    while workers:
        ready = multiprocessing.connection.wait(of_signs, max(until - time.monotonic(), 0.0))
        told = {id(of_signs[sign]): of_signs[sign] for sign in ready}.values()  # each once
        over = [(worker, status) for worker in told if (status := worker.hear(view)) is not None]
        if over or not ready:
            return over
    return []


def _is_to_be_repeated(point: Point, status: int, died: set[str]) -> bool:
    """Whether another sweep took the point, or a signal ended its process for the first time (see `died`)."""
    if status == _TAKEN:
        return True
    if not (status < 0 or status == signals.RESUME_ME) or point.name in died:
        return False
    died.add(point.name)
    how = f"ended by signal {-status}" if status < 0 else "stopped by a signal"
    say(point.name, f"its process was {how}; trying once more")
    return True


def _child(workdir: AnyPath, cores: Sequence[int], channel: Connection) -> None:
    """Does the points that come through the channel.

    Ends with status 1 where one goes wrong, and with `RESUME_ME` on a signal other than the sweep's SIGINT.
    """

    def tell(what: Event | int) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more: the sweep was killed
            channel.send(what)

    os.sched_setaffinity(0, cores)  # before jax starts its threads
    keep_freed_memory()
    quiet.settings()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals.watch(tell=False)
    enable_compilation_cache()
    with contextlib.suppress(EOFError):  # there are no more points
        while True:
            task, point = channel.recv()
            tell(_do(task, point, workdir, tell))


def _do(task: Task, point: Point, workdir: AnyPath, tell: Tell) -> int:
    """Does a point, unless another sweep is at work on it; `_DONE` or `_TAKEN`."""
    leases, lease = leases_of(workdir), task.lease(point)
    name, error = take(leases, [lease])
    if error:
        tell(Event(name or point.name, f"error: {error}", error=True))
        sys.exit(1)
    if name is None:
        return _TAKEN
    try:
        task.do(point, workdir, tell)
    except UserError as error:
        tell(Event(point.name, f"error: {error}", error=True))
        sys.exit(1)
    except Interrupted as stop:
        tell(Event(point.name, str(stop), error=True))
        sys.exit(signals.exit_status(stop))
    finally:
        leases.release(lease)
    return _DONE


class Wait:
    """Waits a little for other sweeps; the first time, prints which."""

    def __init__(self) -> None:
        self._said = False

    def __call__(self, leases: Leases) -> None:
        if not self._said:
            for name, worker in (leases.holders() if jax.process_index() == 0 else {}).items():
                say(name, f"waiting: another sweep ({worker}) is running this point")
        self._said = True
        time.sleep(_POLL_S * random.uniform(0.5, 1))  # not all in step


def _first_free(points: Sequence[Point], leases: Leases, task: Task) -> Point | None:
    free = set(leases.free(list(map(task.lease, points))))
    return next((point for point in points if task.lease(point) in free), None)


def take(leases: Leases, names: Sequence[str]) -> tuple[str | None, str]:
    """`Leases.take`, and "" or the error that kept the name from being taken."""
    try:
        return leases.take(names), ""
    except LeaseError as error:
        return error.name, str(error)


def leases_of(workdir: AnyPath) -> Leases:
    """The leases on the points of `workdir`."""
    return Leases(workdir / IN_WORKDIR)


@contextlib.contextmanager
def _ended(workers: Sequence[Worker], view: View) -> Iterator[None]:
    """Ends the processes of `workers` when it is left; the runs in them save a checkpoint."""
    try:
        yield
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()
            worker.hear(view)


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
