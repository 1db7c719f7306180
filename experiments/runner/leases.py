"""Who works on what: leases in a directory that all workers see, so that no two do the same at once.

A lease is a file `<escaped name>@<worker>` that its worker rewrites every few seconds. A worker that wants a
name looks for files of others, writes its own, and looks again: of two that do so at once, at least one sees
the other and gives way. No worker ever replaces a file of another, so directories without locks will do,
among them `gs://` buckets, as long as a listing shows every file written before.

A lease is over when its file is gone, when its process has died (seen on the same machine only), or when its
file has not changed for `LIFE_S` of the observer's own clock: clocks are not compared.
"""

import contextlib
import functools
import json
import os
import random
import socket
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from absl import logging
from etils import epath

from experiments.runner.names import escaped
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.files import AnyPath, reason
from mobilellm_jax.training import signals

BEAT_S, LIFE_S = 5.0, 60.0
IN_WORKDIR = "runs/.leases"  # those on the points of a sweep


class LeaseError(UserError):
    """The disk or network failed when the lease `name` was to be taken; nothing of it is left."""

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


class Leases:
    """The leases in one directory, as seen by one worker."""

    def __init__(self, directory: str | os.PathLike[str]):
        """Opens `directory`, making it if it is not there; OSError if that fails."""
        self._directory = epath.Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._mine: dict[str, threading.Event] = {}
        self._seen: dict[str, tuple[str, float]] = {}  # file name -> content, when it was first like this

    def take(self, names: Sequence[str]) -> str | None:
        """Takes the first of `names` that nobody else holds, and returns it; None if there is none.

        Raises:
          LeaseError: the lease cannot be written, for example on a full disk.
        """
        for name in self.free(names):
            if self._take(name):
                return name
        return None

    def _take(self, name: str) -> bool:
        path = self._path(name)
        signals.before_end[path] = functools.partial(self.release, name)
        try:
            path.write_text(_content())
            if self.free([name]):
                self._mine[name] = over = threading.Event()
                threading.Thread(target=_keep_alive, args=(path, over), daemon=True).start()
                return True
        except Exception as error:  # a bucket has other ones than OSError
            with contextlib.suppress(Exception):
                self._delete(path)  # else the others would wait for it
            why = f"{path.parent}: cannot write there ({reason(error)}); fix it, run the same command again"
            raise LeaseError(name, why) from None
        self._delete(path)
        return False

    def take_unless_alive(self, name: str) -> str | None:
        """Takes `name` as soon as those that hold it are known to be dead, for at most `LIFE_S`.

        Returns None; or the worker that holds it, once it is seen to be alive. Errors as in `take`.
        """
        first: dict[str, str] = {}
        while not self.take([name]):
            for path in self._directory.glob(f"{escaped(name)}@*"):
                with contextlib.suppress(OSError):  # released since
                    content = _read(path)
                    if content and content != first.setdefault(path.name, content):
                        return path.name.rpartition("@")[2]
            time.sleep(random.uniform(0.1, 0.5))  # of two that start at once, one comes first
        return None

    def release(self, name: str) -> None:
        """Lets others have `name`."""
        if over := self._mine.pop(name, None):  # none where a signal came while it was taken
            over.set()
        self._delete(self._path(name))

    def free(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that no other worker holds; deletes leases that are over."""
        held = self._held()
        return [name for name in names if escaped(name) not in held]

    def holders(self) -> dict[str, str]:
        """What other workers hold, to be shown: {name: worker}; a very long name is cut."""
        return {unquote(name): worker for name, worker in self._held().items()}

    def _held(self) -> dict[str, str]:
        found = {}
        for path in self._listing():
            name, _, worker = path.name.rpartition("@")
            if worker != self._worker:
                with contextlib.suppress(FileNotFoundError):  # released; by now its worker may hold it again
                    if self._is_over(path):
                        path.unlink()
                    else:
                        found[name] = worker
        return found

    def _delete(self, path: epath.Path) -> None:
        path.unlink(missing_ok=True)
        signals.before_end.pop(path, None)

    def _listing(self) -> list[epath.Path]:
        try:
            return list(self._directory.iterdir())
        except FileNotFoundError:  # a folder of a bucket is there for as long as there are files in it
            return []
        except OSError as error:
            raise UserError(f"{self._directory}: cannot read it ({reason(error)})") from None

    def _path(self, name: str) -> epath.Path:
        return self._directory / f"{escaped(name)}@{self._worker}"

    def _is_over(self, path: epath.Path) -> bool:
        try:
            content = _read(path)
        except FileNotFoundError:
            raise
        except OSError:  # a disk or network that fails: not known to be over
            return False
        first_content, since = self._seen.setdefault(path.name, (content, time.monotonic()))
        if content != first_content:
            self._seen[path.name] = content, time.monotonic()
            return False
        return _has_died(content) or time.monotonic() - since > LIFE_S


def shown(name: str) -> str:
    """The name of a lease as `seen` and `holders` give it: a very long one is cut."""
    return unquote(escaped(name))


def seen(directory: AnyPath) -> dict[str, tuple[str, float]]:
    """All leases but those of processes of this machine that have died: {name: (worker, age)}.

    The age is in seconds since the lease was last written, by the clocks here and of the disk; that of a
    worker that died on another machine grows. Nothing is changed.
    """
    found = {}
    for path in directory.iterdir() if directory.exists() else ():
        name, _, worker = path.name.rpartition("@")
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            if not _has_died(_read(epath.Path(path))):
                written = epath.Path(path).stat().mtime
                found[unquote(name)] = worker, max(time.time() - written, 0.0)
    return found


def left(directory: Path, age: int | float) -> list[Path]:
    """Leases of processes of this machine that have died, and those not written for `age` seconds."""
    found = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # released meanwhile
            if _has_died(_read(epath.Path(path))) or time.time() - path.stat().st_mtime > age:
                found.append(path)
    return found


def _content() -> str:
    """Text of a lease: it differs at every call, its length does not."""
    pid, beat = os.getpid(), time.monotonic_ns()
    return json.dumps({"beat": f"{beat:020}", "machine": _machine(), "pid": pid, "started": _started(pid)})


def _keep_alive(path: epath.Path, over: threading.Event) -> None:
    """Rewrites a lease until it is over; ends this process if another worker has taken it for dead."""
    while not over.wait(BEAT_S):
        try:
            _rewrite(path, _content())
        except FileNotFoundError:
            if not over.is_set():
                said = f"was unresponsive for {LIFE_S:g} s and another worker took over"
                print(f"error: lost the lock {path}: this process {said}", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)  # at once: what it works on belongs to another worker
        except Exception as error:  # a disk that hangs or is full, or no network: perhaps the next time
            logging.warning("%s: %s", path, error)


def _rewrite(path: epath.Path, content: str) -> None:
    """Writes a file that is there, or raises FileNotFoundError; `content` is as long as what it replaces."""
    if "://" not in os.fspath(path):
        with open(path, "r+") as file:  # makes no file
            file.write(content)
    elif path.exists():  # a bucket cannot do better
        path.write_text(content)
    else:
        raise FileNotFoundError(path)


def _read(path: epath.Path) -> str:
    """Text of a lease; what is no UTF-8 was written by something else, and only has to stay the same."""
    return path.read_bytes().decode(errors="replace")


def _has_died(content: str) -> bool:
    """Whether a lease is of a process of this machine that is no more; False where unknown."""
    machine = _machine()
    try:
        lease = json.loads(content)
        return (
            machine is not None and machine == lease["machine"] and lease["started"] != _started(lease["pid"])
        )
    except (ValueError, TypeError, KeyError):  # read while it was written, or not of this program
        return False


def _machine() -> str | None:
    """Identifies this machine and its namespace of process ids; None off Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Start of a process in ticks since boot; None if it does not exist or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
