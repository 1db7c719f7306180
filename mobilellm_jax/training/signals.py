"""Signals that stop a process: SIGINT from a person, SIGTERM from a scheduler, SIGHUP from a terminal.

No signal handler of a command raises an exception. One raised in a callback of the garbage collector is
ignored, and one raised while XLA compiles or an extension is imported causes a segmentation fault (jax 0.10).
Instead, a thread reads the signals from a pipe, even while the main thread is in C++. Inside `noted_signals`,
the thread appends them to a list. Elsewhere it ends the process at once, which is safe because files are
renamed into place.

Imports the standard library only: commands call `watch` before they import jax.
"""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mobilellm_jax.errors import Interrupted, Preempted

RESUME_ME = os.EX_TEMPFAIL  # exit status 75: a scheduler should run the command again
AGAIN = "Run the same command again; what was saved is kept"
# What draws on the terminal sets this; it is called before the line that says why the process ends.
leave_terminal: Callable[[], object] | None = None
# Cleanups that `watch` runs before a signal ends the process, newest first: release a lease, stop a child.
before_end: dict[Any, Callable[[], object]] = {}

PARENT = "MOBILELLM_JAX_PARENT"  # environment variable for `end_with_parent`

_ASKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CLEANUP_S = 5.0  # a disk or network that hangs must not keep the process alive
_lock = threading.Lock()
_received: list[str] = []
_watching = _noting = False


def watch(tell: bool = True) -> None:
    """Starts the thread that reads signals; commands call this in their main thread.

    Signals that are ignored stay ignored: SIGHUP under nohup, SIGINT in a background job.

    Args:
      tell: print a line to stderr when a signal ends the process.
    """
    global _watching
    if _watching:
        return
    _watching = True
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _catch()
    threading.Thread(target=_read, args=(reader, tell), name="signals", daemon=True).start()


def end_with_parent() -> None:
    """Sends this process SIGTERM as soon as its parent is not the process whose id `PARENT` gives."""
    parent = int(os.environ.pop(PARENT))

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def noted_signals() -> Iterator[list[str]]:
    """Yields a list to which the names of signals are appended; the caller polls it, and stops or clears it.

    A second SIGINT acts as it would outside of this context. A second SIGTERM does not: scheduler and sweep
    may send one each, and neither must interrupt the save.
    """
    global _noting
    if not _watching:
        with _noted_by_handlers() as received:
            yield received
        return
    _catch()  # again, since the runtime of a device may have installed its own handler of SIGTERM
    with _lock:
        before, _noting = _noting, True
    try:
        yield _received
    finally:
        with _lock:
            _noting = before


def stopped(received: Sequence[str], when: str) -> Interrupted:
    """Builds the exception for the signals in `received`; [] means that another process received one."""
    cause = received[0] if received else "another process"
    return (Interrupted if cause == "SIGINT" else Preempted)(f"stopped by {cause} {when}")


def exit_status(stop: Interrupted) -> int:
    return RESUME_ME if isinstance(stop, Preempted) else 130


@contextlib.contextmanager
def scratch_directory(prefix: str) -> Iterator[Path]:
    """Yields a temporary directory, which is deleted even if a signal ends the process."""
    with tempfile.TemporaryDirectory(prefix=prefix) as name:
        before_end[name] = lambda: shutil.rmtree(name, ignore_errors=True)
        try:
            yield Path(name)
        finally:
            del before_end[name]


@contextlib.contextmanager
def _noted_by_handlers() -> Iterator[list[str]]:
    """`noted_signals` without `watch`: in a notebook, or in another program that calls the library."""
    received: list[str] = []
    previous: dict[int, Any] = {}

    def receive(number: int, _: object) -> None:
        received.append(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(number, previous[number])

    for number in _ASKED:
        if signal.getsignal(number) != signal.SIG_IGN:
            previous[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _catch() -> None:
    for number in _ASKED:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)  # does nothing: Python writes the number into the pipe


def _read(reader: int, tell: bool) -> None:
    while True:
        for number in os.read(reader, 64):
            if number in _ASKED:
                _receive(signal.Signals(number).name, tell)


def _receive(name: str, tell: bool) -> None:
    with _lock:  # held to the end, so that no training loop starts meanwhile
        _received.append(name)
        is_being_stopped = _noting or len(_received) > 1
        if not is_being_stopped or _received.count("SIGINT") > 1:
            stop = stopped([name], f"{_doing()}nothing to save" if len(_received) == 1 else "at once")
            _end(f"{stop}. {AGAIN}\n" if tell else "", exit_status(stop))


def _end(line: str, status: int) -> None:
    def clean_up() -> None:
        with contextlib.suppress(Exception):
            if leave_terminal:
                leave_terminal()
        os.write(2, line.encode())
        for act in [*reversed(before_end.values()), sys.stdout.flush]:
            with contextlib.suppress(Exception):  # one that fails must not prevent the others
                act()

    try:
        thread = threading.Thread(target=clean_up, daemon=True)
        thread.start()
        thread.join(_CLEANUP_S)
    finally:
        os._exit(status)  # without destructors, which would race with the main thread


def _doing() -> str:
    """Describes the activity of the main thread, from its stack."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    doing = "with "
    while frame:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if file.endswith("jax/_src/compiler.py") and function != "<module>":
            return "while compiling; "  # also where it imports something for that
        if file.startswith("<frozen importlib"):
            doing = "while importing; "
        frame = frame.f_back
    return doing
