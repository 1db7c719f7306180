"""Storage of runs: a local directory, or a bucket of Google Cloud Storage, gs://bucket/folder.

A local path is a `pathlib.Path`, one in a bucket an `etils.epath.Path`. Buckets have no directories;
objects cannot be renamed or appended to, and are replaced in one step. This file handles the differences.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from etils import epath

from mobilellm_jax.errors import UserError
from mobilellm_jax.storage import quiet

AnyPath = Path | epath.Path


def path_of(name: str | os.PathLike[str]) -> AnyPath:
    """The path of a name, local or gs://; the file system is not accessed."""
    if "://" not in os.fspath(name):
        return Path(name)
    quiet.buckets()
    return epath.Path(name)


def is_bucket(path: AnyPath) -> bool:
    return not isinstance(path, Path)


def local_directory(flag: str, name: str) -> Path:
    """The local path in a flag, with ~ expanded; UserError for a URL."""
    if "://" in name:
        raise UserError(f"--{flag}={name}: expected a local directory")
    return Path(os.path.expanduser(name))


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replaces the file at `path` in one step, creating its directory.

    Raises:
      UserError: the write failed; an existing file is kept.
    """
    path = path_of(path)
    if not isinstance(path, Path):
        try:
            path.write_bytes(content)
        except Exception as error:  # errors of credentials, network and gcsfs have no type in common
            raise UserError(f"{path}: cannot be written: {reason(error)}") from error
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Excludes others that read the file at `path`, change it and write it back; they wait.

    The lock is that of the directory, so that no file is left. Nothing is locked in a bucket, or where the
    file system has no locks.
    """
    path = path_of(path)
    with contextlib.ExitStack() as closed:
        if isinstance(path, Path):
            with contextlib.suppress(OSError):
                folder = os.open(path.parent, os.O_RDONLY)
                closed.callback(os.close, folder)  # which unlocks it
                fcntl.flock(folder, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def new_file(flag: str, path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, the value of `flag`, renamed to it unless an error occurs.

    Raises:
      UserError: the path exists or cannot be written; nothing is left there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists():
            raise UserError(f"--{flag}={path}: already exists; use another name, or delete it")
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--{flag}={path}: cannot write there ({reason(error)})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def new_directory(flag: str, path: Path) -> Iterator[Path]:
    """Yields a temporary directory that is renamed to `path`, the value of `flag`, unless an error occurs.

    Raises:
      UserError: the path exists and is not an empty directory, or cannot be written.
    """
    final = path.absolute()
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        if final.exists() and (not final.is_dir() or any(final.iterdir())):
            raise UserError(f"--{flag}={path}: already exists; use another directory, or delete it")
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(final)
    except OSError as error:
        raise UserError(f"--{flag}={path}: cannot write there ({reason(error)})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # already renamed unless an error occurred


def files_below(directory: AnyPath) -> list[AnyPath]:
    """All files in `directory` and below, sorted; none if it does not exist."""
    if isinstance(directory, Path):
        return sorted(path for path in directory.rglob("*") if path.is_file())
    found = []
    for root, _, names in directory.walk():
        # gcsfs gives no scheme; TensorFlow, which epath prefers, gives one.
        folder = "gs://" + os.fspath(root).removeprefix("gs://")
        found += [epath.Path(folder) / name for name in names if name]
    return sorted(found)


def delete(directory: AnyPath) -> None:
    """Deletes a directory with its contents; it may be missing."""
    if isinstance(directory, Path):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(directory)
    else:
        directory.rmtree(missing_ok=True)


class Appender:
    """An append-only text file. In a bucket, every flush with new text rewrites the whole object."""

    def __init__(self, path: AnyPath, text: str):
        """Replaces the content of `path` by `text`; UserError or OSError, as in all methods."""
        write_atomically(path, text.encode())
        self._path, self._text, self._more = path, text, ""
        self.file: IO[str] | None = path.open("a") if isinstance(path, Path) else None

    def write(self, text: str) -> None:
        """Adds text, which is durable after `flush`."""
        if self.file:
            self.file.write(text)
        else:
            self._more += text

    def flush(self) -> None:
        """Syncs all text to the disk, or writes it to the bucket."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        elif self._more:
            self._text, self._more = self._text + self._more, ""
            write_atomically(self._path, self._text.encode())

    def close(self) -> None:
        """Writes pending text and closes the file."""
        if self.file:
            self.file.close()
        else:
            self.flush()


@contextlib.contextmanager
def on_disk(path: AnyPath) -> Iterator[Path]:
    """Yields `path` itself if it is local, else a temporary local copy."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        with path.open("rb") as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        yield copy


def reason(error: BaseException) -> str:
    """One line for an error: the operating system's message, if it has one."""
    said = error.strerror if isinstance(error, OSError) else None
    return said or f"{type(error).__name__}: {error}".partition("\n")[0]
