"""Checkpoints, written by orbax and verified by a manifest of sha256 checksums.

Orbax restores corrupt data without an error (measured: 36 of 36 single-bit flips), so every step gets a
manifest once it is complete, and only a step that matches its manifest is restored. A step without one is
incomplete: the manifest is written last and deleted first.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Container, Iterator
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
from mobilellm_jax.storage.sealed import SEAL, parse, seal, unseal

MANIFEST = "manifest.sha256.json"
PARAMS = "params.safetensors"  # in the checkpoint of an imported model


class Checkpoints:
    """The checkpoints of one run: the two latest, and the one with the lowest held-out loss."""

    def __init__(self, directory: AnyPath):
        """Opens `directory`, which the first save creates."""
        import orbax.checkpoint as ocp  # here: half a second that only saving and restoring need

        self._directory = _absolute(directory)
        # Created in the background, a directory that cannot be created costs a wait of 5 minutes at exit.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        self._saver = ocp.StandardCheckpointer(async_options=options)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: concurrent.futures.Future[None] | None = None

    def save(self, step: int, state: Any, loss: float | None) -> None:
        """Saves `state` in the background; `loss` is its held-out loss in nats per token, where known.

        Raises:
          UserError: this save or the previous one failed; earlier checkpoints are kept.
        """
        self.finish()
        with self._explained(step):
            self._saver.save(self._path(step), state, force=True)
        self._saving = self._thread.submit(self._complete, step, loss)

    def poll(self) -> None:
        """Raises the error of a failed save, as `save` does; does not wait for one in progress."""
        if self._saving is not None and self._saving.done():
            self.finish()

    def finish(self) -> None:
        """Waits for the save in progress; errors as in `save`."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def restore_latest(self, like: Any) -> tuple[int, Any] | None:
        """Restores the newest intact checkpoint: (step, state), or None where no save was completed.

        Args:
          like: a tree of `jax.ShapeDtypeStruct` with shardings: shapes and placement of the state.

        Raises:
          UserError: there are checkpoints, but all of them are corrupt.
        """
        step = self._newest_intact()
        return None if step is None else (step, self._saver.restore(self._path(step), like))

    def delete_after(self, step: int) -> None:
        """Deletes checkpoints later than `step`, after a fall-back to it, and the files of killed saves."""
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
        """Waits for orbax, then writes the manifest and deletes checkpoints that are no longer needed."""
        with self._explained(step):
            self._saver.wait_until_finished()
            if jax.process_index() == 0:
                _write_manifest(self._path(step), loss)
                self._retain()

    def _newest_intact(self) -> int | None:
        newest, damage = newest_intact(self._directory)
        if newest is not None or not damage:
            return newest
        # One checkpoint alone, without a manifest: the run was killed during its first save.
        steps = self._steps()
        if len(steps) > 1 or (self._path(steps[0]) / MANIFEST).exists():
            raise UserError(
                f"{self._directory}: no checkpoint is intact ({'; '.join(damage)}); "
                "restore the files, or delete the directory to train from the start"
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
                f"earlier checkpoints kept: {kept or 'none'}"
            ) from error


def newest_intact(directory: AnyPath) -> tuple[int | None, list[str]]:
    """The newest intact step in `directory`, None where there is none, and the problems of later ones.

    Collective: all processes of a run must call it.
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
    """An absolute path, which orbax requires; `absolute` of an epath would drop its gs://."""
    return directory.absolute() if isinstance(directory, Path) else directory


def _steps(directory: AnyPath) -> list[int]:
    # A file may have the name of a step. A bucket has no directories to test for.
    numbered = [path for path in directory.glob("*") if path.name.isdecimal()]
    return [int(path.name) for path in numbered if is_bucket(path) or path.is_dir()]


def load_params(directory: AnyPath, like: Any) -> Any:
    """Reads the parameters of the newest intact checkpoint as NumPy arrays; `directory` is not changed.

    Args:
      directory: the checkpoints of a run, which may be in progress.
      like: a tree of `jax.ShapeDtypeStruct`, the parameters by the run's config.

    Raises:
      UserError: there is no checkpoint, all of them are corrupt, or a parameter has another shape.
    """
    step, damage = newest_intact(directory)
    if step is None:
        why = f"no checkpoint is intact ({'; '.join(damage)})" if damage else "there is no checkpoint"
        raise UserError(f"{directory}: {why}")
    path = _absolute(directory) / str(step)
    if (path / PARAMS).exists():
        return _read_params(path, like)
    import orbax.checkpoint as ocp

    return _restore_params(path, like, lambda _: ocp.RestoreArgs(restore_type=np.ndarray))


def place_params(path: AnyPath, like: Any) -> Any:
    """Reads the parameters of a checkpoint straight onto the devices; every process reads its part.

    Args:
      path: the checkpoint, of a trained or an imported run.
      like: a tree of `jax.ShapeDtypeStruct` with shardings, the parameters by the run's config.

    Raises:
      UserError: a parameter has another shape.
    """
    path = _absolute(path)
    if (path / PARAMS).exists():
        return _place_tensors(path, like)
    import orbax.checkpoint as ocp

    return _restore_params(path, like, lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding))


def _restore_params(path: AnyPath, like: Any, how: Callable[[Any], Any]) -> Any:
    """Restores the parameters alone of a training state; `how` maps a leaf of `like` to orbax's arguments."""
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    there = handler.metadata(epath.Path(path)).tree["params"]
    _check_same_shapes(path, _shapes(there), _shapes(like))
    ways = jax.tree.map(how, like)
    args = ocp.args.PyTreeRestore({"params": like}, {"params": ways}, partial_restore=True)
    with ocp.Checkpointer(handler) as checkpointer:
        return checkpointer.restore(path, args=args)["params"]


def place_state(path: AnyPath, like: Any) -> Any:
    """Reads a whole training state; `path`, `like` as in `place_params`."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(_absolute(path), like)


def fingerprint(path: AnyPath) -> str | None:
    """The sha256 of a checkpoint's manifest, which has those of all its files; None where there is none.

    Raises:
      UserError: the manifest is corrupt.
    """
    try:
        return seal(_read_manifest(path))[SEAL]
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path / MANIFEST}: is not readable: {error}; restore the file") from None


def has_checkpoint(directory: AnyPath) -> bool:
    """True once a save into `directory` was completed, whether or not it is still intact."""
    return any((directory / str(step) / MANIFEST).exists() for step in _steps(directory))


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


def _place_tensors(path: AnyPath, like: Any) -> Any:
    with on_disk(path / PARAMS) as local, safetensors.safe_open(local, framework="np") as file:
        tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a mapping
        _check_same_shapes(path, {n: tuple(t.get_shape()) for n, t in tensors.items()}, _shapes(like))

        def place(key: tuple[Any, ...], leaf: Any) -> jax.Array:
            tensor = tensors[_name(key)]
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: tensor[index])

        return jax.tree_util.tree_map_with_path(place, like)


def _name(key: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(key, simple=True, separator="/")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    return {_name(key): tuple(leaf.shape) for key, leaf in leaves}


def _check_same_shapes(path: AnyPath, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            raise UserError(
                f"{path}: {name} has shape {there.get(name)}, but {wanted.get(name)} by config.json; "
                "restore the config.json of this run (None: no such parameter)"
            )


def find_damage(path: AnyPath) -> str | None:
    """The first problem of the checkpoint at `path`; None if every file matches the manifest.

    Files that the manifest does not list are ignored: .DS_Store, .nfs..., additions by hand.
    """
    try:
        expected = _read_manifest(path)["files"]
    except FileNotFoundError:
        return f"{path.name}/{MANIFEST} is missing: the save was interrupted"
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
    """The sha256 of every file below `path`, or of those in `names` alone, by name."""
    hashes = {}
    for file in files_below(path):
        name = file.relative_to(path).as_posix()
        if name == MANIFEST or not (names is None or name in names):
            continue
        with file.open("rb") as stream:
            hashes[name] = hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()
    return hashes


def _reason(error: Exception) -> str:
    """The operating system's message, if any, which tensorstore embeds in a long one."""
    hidden = re.search(r"os_error_code='(\d+)'", str(error))
    cause = error.__context__ if isinstance(error, UserError) else error  # of `write_atomically`
    number = cause.errno if isinstance(cause, OSError) else hidden and int(hidden[1])
    return os.strerror(number) if number else f"{type(error).__name__}: {error}".partition("\n")[0]
