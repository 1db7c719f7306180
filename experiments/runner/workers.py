"""Points side by side, in processes of their own, and beside other sweeps in the same directory."""

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import jax

from experiments.runner.leases import IN_WORKDIR, LeaseError, Leases
from experiments.runner.points import Point
from experiments.runner.view import Event, Tell, View, say
from mobilellm_jax.errors import Interrupted, UserError
from mobilellm_jax.runs.run import enable_compilation_cache
from mobilellm_jax.storage import quiet
from mobilellm_jax.storage.files import AnyPath
from mobilellm_jax.training import signals
from mobilellm_jax.training.malloc import keep_freed_memory

_POLL_S = 2.0  # between two looks for a point that no other sweep holds
TUNING = "tuning"  # the first phase of a sweep
_TAKEN = 3  # exit status of a process whose point another sweep took first


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


@dataclasses.dataclass(frozen=True)
class Worker:
    """A process at work on a point, the slot that is free when it ends, and where it tells its events."""

    process: BaseProcess
    point: Point
    slot: Slot
    events: Connection


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
    waiting, running, broken = list(points), dict[int, Worker](), list[str]()  # running by sentinel
    died: set[str] = set()  # points whose process a signal ended once, as where others took the memory
    with signals.noted_signals() as received, _ended(running, view):
        while (waiting or running) and not received:
            while free and (point := _first_free(waiting, leases, task)):
                waiting.remove(point)
                if task.missing(point, workdir):  # else another sweep has done it
                    worker = _started(point, workdir, task, free.pop(0))
                    running[worker.process.sentinel] = worker
                    view.begun(point.name)
                else:
                    view.tally.settle(point.name, task.phase == TUNING)
            if waiting and not running:
                wait(leases)
            for sentinel in _over(running, view):
                worker = running.pop(sentinel)
                worker.process.join()
                _hear(worker, view)
                worker.events.close()
                free.append(worker.slot)
                if _is_to_be_repeated(worker, died):
                    waiting.append(worker.point)
                    continue
                if worker.process.exitcode:
                    broken.append(f"{worker.point.name} (status {worker.process.exitcode})")
                view.tally.settle(worker.point.name, task.phase == TUNING)
                ended = len(points) - len(waiting) - len(running)
                view.ended(worker.point.name, task.ended(ended, len(points)))
    if received:
        raise signals.stopped(received, "with the runs at work, which saved what there was")
    if not broken:
        return []
    return [
        f"the process of {', '.join(broken)} ended early; its output is above. A negative status is the "
        "signal that ended it: -9 where memory ran out; run fewer points side by side (--jobs=1)"
    ]


def _slots(environments: Sequence[Mapping[str, str]]) -> list[Slot]:
    cores, count = sorted(os.sched_getaffinity(0)), len(environments)
    return [Slot(cores[i::count] or cores, environment) for i, environment in enumerate(environments)]


def _started(point: Point, workdir: AnyPath, task: Task, slot: Slot) -> Worker:
    context = multiprocessing.get_context("spawn")
    events, channel = multiprocessing.Pipe(duplex=False)
    process = context.Process(target=_child, args=(task, point, workdir, slot.cores, channel), daemon=True)
    with _without_sigint(), _variables({**slot.environment, signals.PARENT: str(os.getpid())}):
        process.start()
    channel.close()  # so that `events` ends with the process
    return Worker(process, point, slot, events)


def _over(running: Mapping[int, Worker], view: View) -> list[int]:
    """Passes on what the workers tell until some have ended, or `_POLL_S` have passed; their sentinels."""
    until, telling = time.monotonic() + _POLL_S, {worker.events: worker for worker in running.values()}
    while running:
        wait_s = max(until - time.monotonic(), 0.0)
        ready = multiprocessing.connection.wait([*running, *telling], wait_s)
        for events in set(ready) & set(telling):
            if not _hear(telling[events], view):
                del telling[events]
        ended = [sentinel for sentinel in running if sentinel in ready]
        if ended or not ready:
            return ended
    return []


def _hear(worker: Worker, view: View) -> bool:
    """Passes on what a worker has told so far; False if nothing more will come."""
    try:
        while worker.events.poll():
            event = worker.events.recv()
            view.hear(worker.point.name, event)
    except (EOFError, OSError):  # OSError: it was killed in the middle of a message
        return False
    return True


def _is_to_be_repeated(worker: Worker, died: set[str]) -> bool:
    """Whether another sweep took the point, or a signal ended the process for the first time (see `died`)."""
    status, name = worker.process.exitcode, worker.point.name
    if status == _TAKEN:
        return True
    if status is None or status >= 0 or name in died:
        return False
    died.add(name)
    say(name, f"its process was ended by signal {-status}; trying once more")
    return True


def _child(task: Task, point: Point, workdir: AnyPath, cores: Sequence[int], channel: Connection) -> None:
    """What the process of a point does."""

    def tell(event: Event) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more: the sweep was killed
            channel.send(event)

    os.sched_setaffinity(0, cores)  # before jax starts its threads
    keep_freed_memory()
    quiet.settings()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals.watch(tell=False)
    enable_compilation_cache()
    leases = leases_of(workdir)
    lease = task.lease(point)
    name, error = take(leases, [lease])
    if error:
        tell(Event(name or point.name, f"error: {error}", error=True))
        sys.exit(1)
    if name is None:
        sys.exit(_TAKEN)
    try:
        task.do(point, workdir, tell)
    except UserError as error:
        tell(Event(point.name, f"error: {error}", error=True))
        sys.exit(1)
    except Interrupted as stop:
        tell(Event(point.name, str(stop), error=True))
        sys.exit(1)
    finally:
        leases.release(lease)


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
def _ended(running: Mapping[int, Worker], view: View) -> Iterator[None]:
    """Ends the processes in `running` when it is left; the runs in them save a checkpoint."""
    try:
        yield
    finally:
        for worker in running.values():
            worker.process.terminate()
        for worker in running.values():
            worker.process.join()
            _hear(worker, view)


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
