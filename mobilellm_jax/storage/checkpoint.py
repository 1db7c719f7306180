"""Checkpoints: orbax writes them, a sha256 manifest says whether they are still what was written.

Orbax restores damaged data without an error (measured: 36 of 36 single-bit flips), so every step gets a
manifest once it is complete, and only a step that agrees with its manifest is restored. A step without one
was cut short: the manifest is written last and deleted first.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging
from etils import epath

from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel import processes
from mobilellm_jax.storage.files import AnyPath, delete, files_below, is_bucket, on_disk, write_atomically
from mobilellm_jax.storage.sealed import parse, seal, unseal

MANIFEST = "manifest.sha256.json"
PARAMS = "params.safetensors"  # in the checkpoint of an imported model


class Checkpoints:
    """The checkpoints of one run: the two latest, and the one with the lowest held-out loss."""

    def __init__(self, directory: AnyPath):
        """Opens `directory`, which is made by the first save."""
        import orbax.checkpoint as ocp  # here: half a second, for what saves and restores alone

        self._directory = _absolute(directory)
        # Made in the background, a directory that cannot be made costs a wait of 5 minutes at exit.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        self._saver = ocp.StandardCheckpointer(async_options=options)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: concurrent.futures.Future[None] | None = None

    def save(self, step: int, state: Any, loss: float | None) -> None:
        """Saves `state` in the background; `loss` is its held-out loss in nats per token, where known.

        Raises:
          UserError: this save or the one before cannot be written. What was saved earlier stays as it is.
        """
        self.finish()
        with self._explained(step):
            self._saver.save(self._path(step), state, force=True)
        self._saving = self._thread.submit(self._complete, step, loss)

    def poll(self) -> None:
        """Raises the error of a save that failed, as `save` does; returns at once while it goes on."""
        if self._saving is not None and self._saving.done():
            self.finish()

    def finish(self) -> None:
        """Waits for the save in progress; errors as in `save`."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def restore_latest(self, like: Any) -> tuple[int, Any] | None:
        """Returns the newest intact step and its state, or None where nothing was saved completely.

        Args:
          like: a tree of `jax.ShapeDtypeStruct` with shardings: shapes and placement of the state.

        Raises:
          UserError: there are checkpoints, but all of them are damaged.
        """
        step = self._newest_intact()
        return None if step is None else (step, self._saver.restore(self._path(step), like))

    def delete_after(self, step: int) -> None:
        """Deletes checkpoints later than `step`, after a fall-back to it, and what killed saves left."""
        if jax.process_index() == 0:
            for later in self._steps():
                if later > step:
                    self._delete(later)
            for leftover in self._directory.glob("*.orbax-checkpoint-tmp*"):
                with contextlib.suppress(OSError):
                    delete(leftover)

    def close(self) -> None:
        """Waits for the save in progress and releases the threads; errors as in `save`."""
        try:
            self.finish()
        finally:
            self._thread.shutdown()
            self._saver.close()

    def _complete(self, step: int, loss: float | None) -> None:
        """Waits for orbax, then certifies the step and deletes those that are no longer needed."""
        with self._explained(step):
            self._saver.wait_until_finished()
            if jax.process_index() == 0:
                _write_manifest(self._path(step), loss)
                self._retain()

    def _newest_intact(self) -> int | None:
        newest, damage = newest_intact(self._directory)
        if newest is not None or not damage:
            return newest
        # A kill cuts one save short, and that is the newest: alone, it is a run killed in its first save.
        steps = self._steps()
        if len(steps) > 1 or (self._path(steps[0]) / MANIFEST).exists():
            raise UserError(
                f"{self._directory}: no checkpoint is intact ({'; '.join(damage)}); "
                "delete the directory to train from the start"
            )
        return None

    def _retain(self) -> None:
        steps, losses = sorted(self._steps()), {}
        for step in steps:
            with contextlib.suppress(OSError, ValueError):
                loss = _read_manifest(self._path(step))["loss"]
                losses |= {} if loss is None else {step: loss}
        best = sorted(losses, key=lambda step: losses[step])[:1]
        for step in set(steps[:-2]) - set(best):
            self._delete(step)

    def _delete(self, step: int) -> None:
        (self._path(step) / MANIFEST).unlink(missing_ok=True)
        delete(self._path(step))

    def _steps(self) -> list[int]:
        return _steps(self._directory)

    def _path(self, step: int) -> AnyPath:
        return self._directory / str(step)

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax, tensorstore and the file system have no type in common
            kept = ", ".join(str(s) for s in sorted(self._steps()) if (self._path(s) / MANIFEST).exists())
            raise UserError(
                f"{self._directory}: step {step} could not be saved: {_reason(error)}; "
                f"saved before, and kept: {kept or 'nothing'}"
            ) from error


def newest_intact(directory: AnyPath) -> tuple[int | None, list[str]]:
    """Returns the newest step in `directory` that is as it was written, and what is wrong with later ones.

    The step is None where there is no such one. In a run over several processes all of them call this.
    """
    damage = []
    for step in sorted(_steps(directory), reverse=True):
        path = directory / str(step)
        problem = processes.of_first(lambda path=path: find_damage(path))
        if problem is None:
            return step, damage
        damage.append(problem)
        logging.warning("the checkpoint of step %d will not be used: %s", step, problem)
    return None, damage


def _absolute(directory: AnyPath) -> AnyPath:
    """Returns what orbax takes; an absolute path of epath would lose the gs:// in front."""
    return directory.absolute() if isinstance(directory, Path) else directory


def _steps(directory: AnyPath) -> list[int]:
    # A file that is named like a step is none of ours. In a bucket there are no directories to ask for.
    numbered = [path for path in directory.glob("*") if path.name.isdecimal()]
    return [int(path.name) for path in numbered if is_bucket(path) or path.is_dir()]


def load_params(directory: AnyPath, like: Any) -> Any:
    """Returns the parameters of the newest intact checkpoint, in NumPy; nothing in `directory` is changed.

    Args:
      directory: the checkpoints of a run, which may be in progress.
      like: a tree of `jax.ShapeDtypeStruct`, the parameters that the run's config asks for.

    Raises:
      UserError: there is no checkpoint, all of them are damaged, or they are of another shape.
    """
    step, damage = newest_intact(directory)
    if step is None:
        why = f"no checkpoint is intact ({'; '.join(damage)})" if damage else "there is no checkpoint"
        raise UserError(f"{directory}: {why}")
    path = _absolute(directory) / str(step)
    if (path / PARAMS).exists():
        return _read_params(path, like)
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    there = handler.metadata(epath.Path(path)).tree["params"]
    _check_same_shapes(path, _shapes(there), _shapes(like))
    numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
    args = ocp.args.PyTreeRestore({"params": like}, {"params": numpy}, partial_restore=True)
    with ocp.Checkpointer(handler) as checkpointer:
        return checkpointer.restore(path, args=args)["params"]


def save_params(path: AnyPath, params: Any) -> None:
    """Writes a checkpoint of parameters alone, for `load_params`.

    Orbax needs three times the memory of the parameters to write them (measured), safetensors none.
    """
    path.mkdir(parents=True)
    named = {_name(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(params)}
    safetensors.numpy.save_file(named, path / PARAMS)
    _write_manifest(path, None)


def _read_params(path: AnyPath, like: Any) -> Any:
    with on_disk(path / PARAMS) as local, safetensors.safe_open(local, framework="np") as file:
        names = file.keys()
        _check_same_shapes(path, {n: tuple(file.get_slice(n).get_shape()) for n in names}, _shapes(like))
        return jax.tree_util.tree_map_with_path(lambda key, _: file.get_tensor(_name(key)), like)


def _name(key: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(key, simple=True, separator="/")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    return {_name(key): tuple(leaf.shape) for key, leaf in leaves}


def _check_same_shapes(path: AnyPath, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            raise UserError(
                f"{path}: {name} has the shape {there.get(name)} there, and {wanted.get(name)} by config.json"
            )


def find_damage(path: AnyPath) -> str | None:
    """Names the first thing wrong with the checkpoint at `path`; None if every file is as it was written.

    Files that the manifest does not list are no part of it: .DS_Store, .nfs..., what people put there.
    """
    try:
        expected = _read_manifest(path)["files"]
    except FileNotFoundError:
        return f"{path.name}/{MANIFEST} is missing: the save was cut short"
    except (OSError, ValueError) as error:
        return f"{path.name}/{MANIFEST} is not readable: {error}"
    actual = _hash_files(path, expected)
    for name in sorted(expected):
        if name not in actual:
            return f"{path.name}/{name} is missing"
        if actual[name] != expected[name]:
            return f"{path.name}/{name} has changed"
    return None


def _write_manifest(path: AnyPath, loss: float | None) -> None:
    manifest = seal({"loss": loss, "files": _hash_files(path)})
    write_atomically(path / MANIFEST, json.dumps(manifest, indent=1).encode())


def _read_manifest(path: AnyPath) -> dict[str, Any]:
    return unseal(parse((path / MANIFEST).read_text()))


def _hash_files(path: AnyPath, names: Container[str] | None = None) -> dict[str, str]:
    """Computes the sha256 of the files below `path` by name; `names` limits it to these, if given."""
    hashes = {}
    for file in files_below(path):
        name = file.relative_to(path).as_posix()
        if name == MANIFEST or not (names is None or name in names):
            continue
        with file.open("rb") as stream:
            hashes[name] = hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()
    return hashes


def _reason(error: Exception) -> str:
    """Returns what the operating system said, if anything; tensorstore hides it in a long sentence."""
    hidden = re.search(r"os_error_code='(\d+)'", str(error))
    cause = error.__context__ if isinstance(error, UserError) else error  # of `write_atomically`
    number = cause.errno if isinstance(cause, OSError) else hidden and int(hidden[1])
    return os.strerror(number) if number else f"{type(error).__name__}: {error}".partition("\n")[0]
