"""Where runs are kept: a local directory, or a bucket of Google Cloud Storage, gs://bucket/folder.

A local path is a `pathlib.Path`, one in a bucket an `etils.epath.Path`. Buckets have no directories, nothing
is added to or renamed there, and an object is replaced in one step: what that changes is in this file alone.
"""

import contextlib
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
    """The path of a name, local or gs://; nothing is looked at."""
    if "://" not in os.fspath(name):
        return Path(name)
    quiet.buckets()
    return epath.Path(name)


def is_bucket(path: AnyPath) -> bool:
    return not isinstance(path, Path)


def local_directory(flag: str, name: str) -> Path:
    """The path that a flag names, ~ is home; UserError where it is not on this machine."""
    if "://" in name:
        raise UserError(f"--{flag}={name}: expected a local directory")
    return Path(os.path.expanduser(name))


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replaces the file at `path` in one step, creating its directory.

    Raises:
      UserError: it cannot be written; an old file is left as it was.
    """
    path = path_of(path)
    if not isinstance(path, Path):
        try:
            path.write_bytes(content)
        except Exception as error:  # of credentials, of the network, of gcsfs: they have no type in common
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


def files_below(directory: AnyPath) -> list[AnyPath]:
    """Returns all files in `directory` and below, sorted; none where it is not there."""
    if isinstance(directory, Path):
        return sorted(path for path in directory.rglob("*") if path.is_file())
    found = []
    for root, _, names in directory.walk():
        # Without the scheme by way of gcsfs, with it by way of TensorFlow, which epath prefers.
        folder = "gs://" + os.fspath(root).removeprefix("gs://")
        found += [epath.Path(folder) / name for name in names if name]
    return sorted(found)


def delete(directory: AnyPath) -> None:
    """Deletes a directory with all that is in it, as far as it is there."""
    if isinstance(directory, Path):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(directory)
    else:
        directory.rmtree(missing_ok=True)


class Appender:
    """A text file that grows. In a bucket it is written anew, whole, by every flush that finds more."""

    def __init__(self, path: AnyPath, text: str):
        """Replaces the file at `path` by one with `text`; UserError or OSError, as in all methods."""
        write_atomically(path, text.encode())
        self._path, self._text, self._more = path, text, ""
        self.file: IO[str] | None = path.open("a") if isinstance(path, Path) else None

    def write(self, text: str) -> None:
        """Adds text, which is safe once it is flushed."""
        if self.file:
            self.file.write(text)
        else:
            self._more += text

    def flush(self) -> None:
        """Hands all text to the disk, or to the bucket."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        elif self._more:
            self._text, self._more = self._text + self._more, ""
            write_atomically(self._path, self._text.encode())

    def close(self) -> None:
        """Writes what is left, and closes the file."""
        if self.file:
            self.file.close()
        else:
            self.flush()


@contextlib.contextmanager
def on_disk(path: AnyPath) -> Iterator[Path]:
    """Yields a local file with the content of the one at `path`: itself, or a copy that is deleted later."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        with path.open("rb") as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        yield copy


def reason(error: BaseException) -> str:
    """Returns in one line what an error says: that of the operating system, if it is one."""
    said = error.strerror if isinstance(error, OSError) else None
    return said or f"{type(error).__name__}: {error}".partition("\n")[0]
