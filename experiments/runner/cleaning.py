"""What nobody needs any more: old checkpoints, leftovers of killed saves, leases of the dead, old caches.

Nothing of a run that somebody holds a lease on is ever listed, and removing an item asks once more. All
directories are local.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from experiments.runner import leases
from experiments.runner.kept import record_of
from mobilellm_jax.analysis.records import read_record
from mobilellm_jax.data.tokenizers import CARD_FILE
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.checkpoint import MANIFEST, find_damage

STALE_S = 3600.0  # a lease that lives is written every few seconds; clocks of two machines differ by less
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # of `write_atomically`
_PREPARED = re.compile(r"(?P<name>.+?)(\.tmp-.*|\.lock)?")


@dataclasses.dataclass(frozen=True)
class Item:
    """Something to remove.

    Attributes:
      what: its kind.
      path: a file or a directory.
      size: bytes.
      run: the directory of the run that it belongs to; None where it belongs to none.
      lock: a lock to hold while it is removed.
    """

    what: str
    path: Path
    size: int
    run: Path | None = None
    lock: Path | None = None


def in_workdir(workdir: Path, newest_too: bool) -> tuple[list[Item], list[Path]]:
    """Items in the directory of a run, or of a sweep, and the runs that were left out as they are worked on.

    Args:
      newest_too: list the newest checkpoint of a finished run as well.
    """
    found, busy, below = list[Item](), list[Path](), _below(workdir)
    for checkpoints in (path for path in below if path.name == "checkpoints" and path.is_dir()):
        run = checkpoints.parent
        if is_held(run):
            busy.append(run)
        else:
            found += _of_run(run, newest_too)
    for folder in (path for path in below if path.name == ".leases"):
        found += [Item("lease of a dead worker", path, _size(path)) for path in leases.left(folder, STALE_S)]
    for path in (path for path in below if _TEMPORARY.fullmatch(path.name) and path.is_file()):
        if _unwritten(path) > STALE_S:
            found.append(Item("half-written file", path, _size(path)))
    return found, busy


def _of_run(run: Path, newest_too: bool) -> Iterator[Item]:
    """Half-written saves and, of a finished run, complete checkpoints but the newest, if that is intact."""
    steps = {}
    _, names, _ = next(os.walk(run / "checkpoints"), ("", [], []))  # none where it is gone by now
    for path in (run / "checkpoints" / name for name in names):
        if ".orbax-checkpoint-tmp" in path.name:
            yield Item("half-written save", path, _size(path), run)
        elif path.name.isdecimal():
            steps[int(path.name)] = path
    complete = {step: path for step, path in steps.items() if (path / MANIFEST).exists()}
    for step in sorted(steps.keys() - complete.keys()):
        yield Item("half-written save", steps[step], _size(steps[step]), run)
    record = record_of(run)
    if not complete or record is None or read_record(record).status != "finished":
        return
    newest = max(complete)
    if not newest_too and (len(complete) == 1 or find_damage(complete[newest])):
        return  # where the newest is damaged, an older one is needed
    for step in sorted(complete):
        if newest_too or step != newest:
            yield Item("checkpoint of a finished run", complete[step], _size(complete[step]), run)


def is_held(run: Path) -> bool:
    """True if a worker is at work on the run in this directory, or on its point in a sweep."""
    if _alive(run / ".leases"):
        return True
    path = run.absolute()
    for parent in path.parents:
        if parent.name == "runs":
            name = path.relative_to(parent).as_posix()
            # A lease is "<point> <phase>", of which a long one is cut at "~"; runs begin with their point.
            held = {lease.partition(" ")[0].partition("~")[0] for lease in _alive(parent / ".leases")}
            if any(name.startswith(point) for point in held):
                return True
    return False


def _alive(folder: Path) -> list[str]:
    return [name for name, (_, age) in leases.seen(folder).items() if age <= STALE_S]


def in_cache(cache: Path, compiled: Path, age: int | float) -> list[Item]:
    """Prepared data and compiled programs that were not used for `age` seconds, and leftovers beside them."""
    found = []
    for path in sorted(cache.iterdir()) if cache.is_dir() else ():
        name = _PREPARED.fullmatch(path.name)
        if path.is_dir() and (path / CARD_FILE).exists() and name and not name[2] and _unused(path) > age:
            found.append(Item("prepared data", path, _size(path), lock=_lock(path)))
        elif path.is_dir() and name and (name[2] or "").startswith(".tmp-") and _unused(path) > STALE_S:
            found.append(Item("half-prepared data", path, _size(path), lock=_lock(cache / name["name"])))
        elif name and name[2] == ".lock" and not (cache / name["name"]).exists() and _unused(path) > age:
            found.append(Item("lock", path, _size(path), lock=path))
    for path in sorted(compiled.glob("*-cache")):
        beside = path.with_name(f"{path.name.removesuffix('-cache')}-atime")  # jax writes it at each use
        pair = [path, *([beside] if beside.exists() else [])]
        if min(map(_unused, pair)) > age:
            found += [Item("compiled program", one, _size(one)) for one in pair]
    return found


def remove(item: Item) -> bool:
    """Removes an item; False if it is in use by now, or gone.

    Raises:
      UserError: it cannot be removed.
    """
    if item.run is not None and is_held(item.run):
        return False
    try:
        with _holding(item.lock):
            if item.path.is_dir():
                manifest = item.path / MANIFEST
                manifest.unlink(missing_ok=True)  # first: without it, the rest is a save that was interrupted
                gone = item.path.with_name(f"{item.path.name}.tmp-{os.getpid()}")
                target = item.path.rename(gone) if item.lock and ".tmp-" not in item.path.name else item.path
                shutil.rmtree(target)
            else:
                item.path.unlink()
    except (FileNotFoundError, Timeout):
        return False
    except OSError as error:
        raise UserError(f"{item.path}: cannot be removed: {error.strerror or error}") from None
    return True


def total(items: Iterable[Item]) -> int:
    return sum(item.size for item in items)


def _lock(directory: Path) -> Path:
    """The lock of `data.prepare` for a directory of prepared data."""
    return directory.with_name(f"{directory.name}.lock")


def _holding(lock: Path | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if lock is None else FileLock(lock).acquire(timeout=0)


def _below(folder: Path) -> list[Path]:
    """All directories and files in a directory and below, sorted; what is deleted meanwhile is left out."""
    walk = os.walk(folder)  # without an error where a directory is gone
    return sorted(Path(root, name) for root, names, files in walk for name in (*names, *files))


def _stats(path: Path, look: Callable[[Path], os.stat_result] = Path.stat) -> list[os.stat_result]:
    """Those of a file, or of all files in a directory; of files deleted meanwhile there are none."""
    found = []
    for file in _below(path) if path.is_dir() else [path]:
        with contextlib.suppress(FileNotFoundError):
            if file.is_file():
                found.append(look(file))
    return found


def _size(path: Path) -> int:
    return sum(stat.st_size for stat in _stats(path, Path.lstat))


def _unwritten(path: Path) -> float:
    """Seconds since a file of it, or the directory itself, was written; 0 where it is gone."""
    times = [stat.st_mtime for stat in _stats(path)]
    with contextlib.suppress(FileNotFoundError):
        times.append(path.stat().st_mtime)
    return time.time() - max(times, default=time.time())


def _unused(path: Path) -> float:
    """Seconds since a file of it was read or written; disks note a reading once a day at the latest."""
    read = max((stat.st_atime for stat in _stats(path)), default=0.0)  # to list a directory reads it
    return min(_unwritten(path), time.time() - read)
